"""Federated LoRA in Flower's simulation engine: averages of factors beside Fréchet means.

    python benchmarks/federated_bench.py --bench BENCH [--split test]

Clients hold texts of one task, with different labels at each, and train LoRA factors and a head on
the last two layers of a frozen MiniLM encoder. Flower's own ``FedAvg`` and ``FedMedian`` average
factors; ``FedFrechet`` averages their products. In turn, client 0 is like the others, sends the
same model in other factors, sends ten times its update with the wrong sign, or 10⁶ times its
update. Needs ``pip install "manifold-merge[flwr,peft]" "flwr[simulation]"``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import torch
from bench_data import Bench

BEHAVIOURS = {
    "honest": "all honest",
    "re-based": "one re-based",
    "flipped": "one × -10",
    "huge": "one × 10⁶",
}
RANK, LAYERS, MIXED_RANKS = 8, 2, (2, 4, 8)


def strategies(clients: int) -> dict[str, Any]:
    """The rows of the table."""
    from flwr.serverapp.strategy import FedAvg, FedMedian

    from manifold_merge.flower import FedFrechet

    options: dict[str, Any] = {
        "fraction_evaluate": 0.0,
        "min_train_nodes": clients,
        "min_available_nodes": clients,
    }
    mean: dict[str, Any] = options | {"invalid": "drop"}  # clients that diverge send NaN
    median = mean | {"p": 1, "equal_weights": True}
    return {
        "FedAvg of factors (Flower)": FedAvg(**options),
        "FedMedian of factors (Flower)": FedMedian(**options),
        "Fréchet mean": FedFrechet(**mean),
        "Fréchet median": FedFrechet(**median),
        "Fréchet mean, ranks 2, 4, 8": FedFrechet(rank=RANK, **mean),
        "Fréchet median, ranks 2, 4, 8": FedFrechet(rank=RANK, **median),
    }


def shares(labels: torch.Tensor, clients: int, concentration: float, seed: int) -> torch.Tensor:
    """Which client holds which text: for each label, shares drawn from a Dirichlet distribution."""
    torch.manual_seed(seed)
    owner = torch.empty(len(labels), dtype=torch.long)
    draw = torch.distributions.Dirichlet(torch.full((clients,), concentration))
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        owner[rows] = torch.multinomial(draw.sample(), len(rows), replacement=True)
    return owner


def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All rows and behaviours, one after the other, in one simulation."""
    # Flower is needed to run, not to print the tables.
    import federated_client as client
    from flwr.app import ArrayRecord, ConfigRecord, Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    bench = Bench(options.bench)
    rows: list[dict[str, Any]] = []
    _, labels = bench.loader.load_split(options.task, "train")
    owner = shares(labels, options.clients, options.concentration, options.seed)
    files = {name: str(folder / f"{name}.safetensors") for name in ("train", options.split)}
    for split, file in files.items():
        owners = owner if split == "train" else None
        client.prepare(bench, options.task, split, Path(file), LAYERS, owners)
    count = len(labels.unique())
    config = {
        "bench": str(options.bench.resolve()), "texts": files["train"], "labels": count,
        "seed": options.seed, "rank": RANK, "layers": LAYERS,
        "lr": options.lr, "lr-head": options.lr_head, "steps": options.steps,
    }  # fmt: skip
    first = client.trained_tensors(client.model_of(config["bench"], count, RANK, LAYERS))
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        for behaviour in options.behaviours:
            for name in options.rows or strategies(options.clients):
                ranks = [RANK] * options.clients
                if "ranks" in name:
                    if behaviour not in ("honest", "flipped"):
                        continue
                    ranks = [MIXED_RANKS[i % 3] for i in range(options.clients)]
                strategy = strategies(options.clients)[name]
                sent = {**config, "behaviour": behaviour, "ranks": json.dumps(ranks)}
                begin = time.perf_counter()
                result = strategy.start(
                    grid,
                    ArrayRecord(dict(first)),
                    num_rounds=options.rounds,
                    train_config=ConfigRecord(sent),
                )
                tensors = result.arrays.to_torch_state_dict()
                finite = all(bool(x.isfinite().all()) for x in tensors.values())
                right = client.correct(
                    tensors,
                    client.model_of(config["bench"], count, RANK, LAYERS),
                    files[options.split],
                )
                distances = getattr(getattr(strategy, "merge", None), "distances", None)
                rows.append(
                    {
                        "row": name,
                        "behaviour": behaviour,
                        "accuracy": 100 * float(right.double().mean()),
                        "finite": finite,
                        "right": "".join(map(str, right.int().tolist())),
                        "distances": None if distances is None else list(distances.values()),
                        "seconds": time.perf_counter() - begin,
                    }
                )
                (folder / "rows.json").write_text(json.dumps(rows))
                print(f"{behaviour:10} {name:32} {rows[-1]['accuracy']:.1f}", flush=True)

    run_simulation(
        server,
        client.app,
        num_supernodes=options.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": options.processes, "include_dashboard": False},
        },
    )
    return rows


def render(result: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    behaviours = list(dict.fromkeys(x["behaviour"] for x in result["rows"]))
    names = list(dict.fromkeys(x["row"] for x in result["rows"]))
    found = {(x["row"], x["behaviour"]): x for x in result["rows"]}
    table = harness.table(
        ["aggregation", *(BEHAVIOURS[x] for x in behaviours)],
        [
            [name, *(_cell(found.get((name, x)), found[name, "honest"]) for x in behaviours)]
            for name in names
        ],
    )  # fmt: skip
    o = result["options"]
    error = (0.24 / len(result["rows"][0]["right"])) ** 0.5 * 100
    honest = {name: found[name, "honest"] for name in names}
    factors, *others = honest
    beyond = ", ".join(f"{x} {_difference(honest[x], honest[factors])}" for x in others)
    return (
        f"Accuracy in % on {len(result['rows'][0]['right'])} {o['split']} texts of {o['task']} "
        f"({result['labels']} labels; standard error about {error:.0f}) after {o['rounds']} rounds "
        f"of {o['steps']} steps at {o['clients']} clients, label shares Dirichlet("
        f"{o['concentration']:g}), LoRA of rank {RANK} on query and value of the last "
        f"{LAYERS} layers, Flower {result['flwr']}, Ray {result['ray']}. *One* is client 0, in "
        f"every round; it holds {result['odd_share']:.0f} % of the texts. In parentheses: the "
        "difference from all honest, on the same texts, and its standard error.\n\n"
        f"{table}\n\nAll honest, difference from {factors}: {beyond}.\n\n"
        f"{harness.footer(result)}"
    )


def _cell(row: Mapping[str, Any] | None, honest: Mapping[str, Any]) -> str:
    """Accuracy, and what the odd client cost."""
    if row is None:
        return "-"
    if not row["finite"]:
        return f"{row['accuracy']:.1f} (not finite)"
    if row is honest:
        return f"{row['accuracy']:.1f}"
    return f"{row['accuracy']:.1f} ({_difference(row, honest)})"


def _difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """Difference of two accuracies on the same texts, with its standard error."""
    right = [torch.tensor(list(map(float, x["right"]))) for x in (one, two)]
    values = 100 * (right[0] - right[1])
    return f"{float(values.mean()):+.1f} ± {float(values.std() / len(values) ** 0.5):.1f}"


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", type=Path, required=True, help="the benchmark folder")
    parser.add_argument("--task", default="debian_section")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="what is scored")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="local steps of a round")
    parser.add_argument("--lr", type=float, default=3e-3, help="of the factors")
    parser.add_argument("--lr-head", type=float, default=1e-2)
    parser.add_argument("--concentration", type=float, default=1.0, help="of labels at clients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="clients that run at a time")
    parser.add_argument("--behaviours", nargs="+", choices=BEHAVIOURS, default=list(BEHAVIOURS))
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    harness.quiet()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    before = harness.load()
    # Actors find the module of the client where this script found it.
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory(prefix="federated-") as folder:
        rows = run(options, Path(folder))
    _, labels = Bench(options.bench).loader.load_split(options.task, "train")
    owner = shares(labels, options.clients, options.concentration, options.seed)
    import flwr
    import ray

    result = {
        "command": harness.command(),
        "environment": harness.environment(),
        "load_average": {"before": before, "after": harness.load()},
        "options": {k: v for k, v in vars(options).items() if k not in ("bench", "output", "rows")},
        "labels": len(labels.unique()),
        "odd_share": 100 * float((owner == 0).double().mean()),
        "flwr": flwr.__version__,
        "ray": ray.__version__,
        "rows": rows,
    }
    name = f"federated_bench{'' if options.split == 'test' else '_val'}"
    harness.finish(name, result, render, options.output)


if __name__ == "__main__":
    main()
