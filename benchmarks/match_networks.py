"""Matching and averaging trained networks: accuracy of means, barriers, variance and time.

The networks of the folder given; ten digits networks, trained once and kept in ``--cache``; and,
where it is installed, the package ``rebasin`` beside ours in one process and one thread::

    python benchmarks/match_networks.py FOLDER --cache CACHE
"""

from __future__ import annotations

import harness  # isort: skip  (sets the environment before torch is imported)

import argparse
import contextlib
import io
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import geoopt
import torch
from network_data import (
    State,
    accuracy,
    average,
    barrier,
    digits,
    digits_networks,
    load_models,
    mlp,
)
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

from manifold_merge import (
    NetworkQuotient,
    NetworkSymmetry,
    PermutationQuotient,
    align,
    frechet_mean,
    merge_networks,
    reestimate_batch_norm,
    repair,
    symmetry_of,
    unit_responses,
)

PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
FIVES = (range(5), range(5, 10))
SETTINGS: dict[str, dict[str, Any]] = {
    "order": {"balance": False},
    "order and scale": {"balance": True},
    "order and scale, Frank-Wolfe": {"balance": True, "method": "frank_wolfe"},
    "order, coordinate descent": {"balance": False, "method": "coordinate"},
}
# What choose_matching.py chose on validation images of other networks: order and scale; and, where
# there are batch normalisations, whose statistics need data anyway, responses to the same data.
CHOSEN: dict[str, dict[str, Any]] = {
    "order": SETTINGS["order"],
    "order and scale": SETTINGS["order and scale"],
}
RESPONSES = "order and scale, weights and responses"
RESPONSE_SCALE = 1.0
PARTS = ("pairs", "fives", "wide", "stored")
RUNS = 5


def stored_networks(folder: Path) -> dict[str, Any]:
    """Accuracy of the means of the folder's networks, and the planted permutation."""
    models = load_models(folder)
    data = models.digits()
    states = [load_file(folder / f"digits_mlp_seed{i}.safetensors") for i in range(3)]
    symmetry = symmetry_of(models.mlp(), data[0][:4])
    planted = load_file(folder / "digits_mlp_seed0_permuted.safetensors")
    found = align(planted, to=states[0], symmetry=symmetry)
    result: dict[str, Any] = {
        "planted permutation recovered exactly": all(
            torch.equal(found.state[name], t) for name, t in states[0].items()
        ),
        "digits": {"networks": [accuracy(models.mlp(), s, *data[2:]) for s in states]},
    }
    result["digits"]["naive"] = _accuracies(
        states, lambda parts: accuracy(models.mlp(), average(parts), *data[2:])
    )
    for name, options in CHOSEN.items():

        def merged(parts: Sequence[State], options: dict[str, Any] = options) -> dict[str, float]:
            mean = merge_networks(parts, symmetry, **options)
            model = models.mlp()
            plain = accuracy(model, mean.state, *data[2:])
            references = [models.mlp() for _ in parts]
            for reference, state in zip(references, mean.aligned, strict=True):
                reference.load_state_dict(state)
            repair(model, references, data[0].split(500))
            return {"mean": plain, "repaired": accuracy(model, model.state_dict(), *data[2:])}

        result["digits"][name] = _accuracies(states, merged)

    data = models.mnist()
    states = [load_file(folder / f"mnist_cnnbn_seed{i}.safetensors") for i in range(3)]
    symmetry = symmetry_of(models.CNN().eval(), data[0][:2])
    result["mnist"] = {"networks": [accuracy(models.CNN(), s, *data[2:]) for s in states]}

    def reestimated(state: State) -> dict[str, float]:
        model = models.CNN()
        plain = accuracy(model, state, *data[2:])
        reestimate_batch_norm(model, data[0].split(500))
        return {"mean": plain, "re-estimated": accuracy(model, model.state_dict(), *data[2:])}

    result["mnist"]["naive"] = _accuracies(states, lambda parts: reestimated(average(parts)))
    seen = _responses(models.CNN, states, symmetry, data[0].split(500))
    chosen = {**CHOSEN, RESPONSES: {"balance": True, "response_scale": RESPONSE_SCALE}}
    for name, options in chosen.items():

        def averaged(parts: Sequence[State], options: dict[str, Any] = options) -> State:
            return merge_networks(parts, symmetry, **_given(parts, seen, options)).state

        result["mnist"][name] = _accuracies(states, lambda parts, f=averaged: reestimated(f(parts)))
    return result


def _responses(
    make: Callable[[], torch.nn.Module],
    states: Sequence[State],
    symmetry: NetworkSymmetry,
    batches: Sequence[torch.Tensor],
) -> dict[int, dict[str, torch.Tensor]]:
    """Responses of each network's units to some training data, by the identity of its state."""
    found = {}
    for state in states:
        model = make()
        model.load_state_dict(state)
        found[id(state)] = unit_responses(model, symmetry, batches, samples=8000)
    return found


def _given(
    parts: Sequence[State],
    seen: Mapping[int, Mapping[str, torch.Tensor]],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Options of a merge, with the responses of its networks where it uses them."""
    if "response_scale" not in options:
        return dict(options)
    return {**options, "responses": [seen[id(state)] for state in parts]}


def _accuracies(states: Sequence[State], score: Callable[[Sequence[State]], Any]) -> dict[str, Any]:
    names = {"0+1": (0, 1), "0+2": (0, 2), "1+2": (1, 2), "all three": (0, 1, 2)}
    return {name: score([states[i] for i in which]) for name, which in names.items()}


# --- pairs and fives of digits networks -----------------------------------------------------------


def pairs(states: Sequence[State], data: Any, symmetry: NetworkSymmetry) -> dict[str, Any]:
    """Barriers and time of five pairs, ours and rebasin's in turn."""
    quotients = {
        name: NetworkQuotient(symmetry, states[0], **options) for name, options in SETTINGS.items()
    }

    def ours(quotient: NetworkQuotient) -> Callable[[State, State], tuple[State, State]]:
        def run(a: State, b: State) -> tuple[State, State]:
            x, y = quotient.pack(a), quotient.pack(b)
            return quotient.unpack(x), quotient.unpack(quotient.align(x, y))

        return run

    methods: dict[str, Callable[[State, State], tuple[State, State]]] = {
        "naive": lambda a, b: (a, b),
        **{name: ours(quotient) for name, quotient in quotients.items()},
    }
    peer = _rebasin(data[0][:8])
    if peer is not None:
        methods["rebasin"] = peer
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for i, j in PAIRS:
        for name, method in methods.items():
            found = []
            # The peer visits layers in random order: several runs of it make one row.
            for seed in range(RUNS if name == "rebasin" else 1):
                torch.manual_seed(seed)
                began = time.perf_counter()
                a, b = method(states[i], states[j])
                seconds = time.perf_counter() - began
                middle = {key: torch.lerp(a[key], b[key], 0.5) for key in a}
                row = {
                    "seconds": seconds,
                    "squared distance": sum(float((a[k] - b[k]).square().sum()) for k in a),
                    "train barrier": barrier(a, b, data[0], data[1]),
                    "test barrier": barrier(a, b, data[2], data[3]),
                    "midpoint accuracy": accuracy(mlp(), middle, data[2], data[3]),
                }
                found.append(row)
            rows[name].append({k: statistics.mean(row[k] for row in found) for k in found[0]})
    return {name: _means(each) for name, each in rows.items()}


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"all": list(rows)}
    for key in rows[0]:
        values = [row[key] for row in rows]
        summary[key] = {"mean": statistics.mean(values), "deviation": statistics.stdev(values)}
    return summary


def _rebasin(example: torch.Tensor) -> Callable[[State, State], tuple[State, State]] | None:
    try:
        from rebasin import PermutationCoordinateDescent
    except ImportError:
        return None

    def run(a: State, b: State) -> tuple[State, State]:
        first, second = mlp(), mlp()
        first.load_state_dict(a)
        second.load_state_dict(b)
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PermutationCoordinateDescent(first, second, example).rebasin()
        return first.state_dict(), second.state_dict()

    return run


def fives(states: Sequence[State], data: Any, symmetry: NetworkSymmetry) -> dict[str, Any]:
    """Fréchet variance, accuracy and time of the means of five networks."""
    result: dict[str, Any] = {}
    for name, options in SETTINGS.items():
        rows = []
        quotient = NetworkQuotient(symmetry, states[0], **options)
        for seeds in FIVES:
            points = [quotient.pack(states[i]) for i in seeds]
            began = time.perf_counter()
            solution = frechet_mean(quotient, points)
            rows.append(
                {
                    "seconds": time.perf_counter() - began,
                    "variance": float(solution.objective),
                    "accuracy": accuracy(mlp(), quotient.unpack(solution.point), *data[2:]),
                    "iterations": int(solution.iterations),
                    "converged": solution.converged,
                }
            )
        result[name] = rows
    return result


def wide_layer(width: int, features: int, repeats: int) -> dict[str, Any]:
    """Time to align one hidden layer, and of the product and the assignment that it has to do."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(width, features, generator=generator)
    y = x[torch.randperm(width, generator=generator)]
    y = y + torch.randn(width, features, generator=generator)
    manifold = PermutationQuotient(geoopt.Euclidean(1), width)
    score = (x @ y.T).numpy()
    timings = harness.measure(
        {
            "align": lambda: manifold.align(x, y),
            "product": lambda: x @ y.T,
            "assignment": lambda: linear_sum_assignment(score, maximize=True),
        },
        repeats,
    )
    floor = timings["product"]["wall"]["median"] + timings["assignment"]["wall"]["median"]
    ratio = timings["align"]["wall"]["median"] / floor
    return {"width": width, "features": features, "timings": timings, "ratio": ratio}


# --- output ---------------------------------------------------------------------------------------


def render(result: Mapping[str, Any]) -> str:
    """The tables of the page on permutations."""
    stored, parts = result["stored"], []
    exact = stored["planted permutation recovered exactly"]
    parts.append(f"Planted permutation recovered exactly: {'yes' if exact else 'no'}\n")
    for task, extra in (("digits", "repaired"), ("mnist", "re-estimated")):
        rows = []
        for name, scores in stored[task].items():
            if name == "networks":
                continue
            cells = []
            for which in ("0+1", "0+2", "1+2", "all three"):
                value = scores[which]
                if isinstance(value, dict):
                    cells.append(f"{100 * value['mean']:.1f} / {100 * value[extra]:.1f}")
                else:
                    cells.append(f"{100 * value:.1f}")
            rows.append([name, *cells])
        header = [f"{task}: mean / {extra}, %", "0+1", "0+2", "1+2", "all three"]
        parts.append(harness.table(header, rows) + "\n")
    keys = ("squared distance", "train barrier", "test barrier", "midpoint accuracy", "seconds")
    rows = [
        [name, *(f"{row[k]['mean']:#.4g} ± {row[k]['deviation']:.2g}" for k in keys)]
        for name, row in result["pairs"].items()
    ]
    parts.append(harness.table(["five pairs", *keys], rows) + "\n")
    rows = [
        [
            name,
            *(f"{r['variance']:.2f} / {100 * r['accuracy']:.1f} / {r['seconds']:.2g}" for r in row),
        ]
        for name, row in result["fives"].items()
    ]
    header = ["five networks: variance / accuracy, % / s", "seeds 0-4", "seeds 5-9"]
    parts.append(harness.table(header, rows) + "\n")
    wide = result["wide"]
    cells = [f"{wide['timings'][n]['wall']['median']:.3g}" for n in wide["timings"]]
    parts.append(
        harness.table(
            [f"width {wide['width']}, {wide['features']} a unit, s", *wide["timings"], "ratio"],
            [["median", *cells, f"{wide['ratio']:.2f}"]],
        )
        + "\n"
    )
    return "\n".join([*parts, harness.footer(result)])


def main() -> None:
    """Run all parts, print the tables and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="trained networks with their models.py")
    parser.add_argument("--cache", type=Path, required=True, help="where digits networks are kept")
    parser.add_argument("--width", type=int, default=4096, help="units of the wide layer")
    parser.add_argument("--features", type=int, default=8192, help="parameters of one of its units")
    parser.add_argument("--repeats", type=int, default=3, help="of the wide layer")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="what to run; the rest is kept from the results of an earlier run",
    )
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = arguments.output / "match_networks.json"
    result: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    result |= {
        "command": harness.command(),
        "environment": harness.environment(),
        "load_average": {"before": harness.load()},
    }
    data = digits()
    states = digits_networks(arguments.cache, data)
    symmetry = symmetry_of(mlp(), data[0][:4])
    run: dict[str, Callable[[], Any]] = {
        "pairs": lambda: pairs(states, data, symmetry),
        "fives": lambda: fives(states, data, symmetry),
        "wide": lambda: wide_layer(arguments.width, arguments.features, arguments.repeats),
        "stored": lambda: stored_networks(arguments.folder),
    }
    for part in arguments.parts:
        result[part] = run[part]()
    result["load_average"]["after"] = harness.load()
    harness.finish("match_networks", result, render, arguments.output)


if __name__ == "__main__":
    main()
