"""Score one adapter refined by the functional distance, on the open multi-task benchmark.

    python benchmarks/score_refined.py BENCH --set r16 --rank 16 --split val

BENCH is the folder of the benchmark, with its ``bench.py``. The adapters are merged without data,
refined on the first ``--texts`` unlabelled training texts of each task, and scored with each task's
own head. A score is the accuracy divided by that of the task's own adapter ("normalised"); its
standard error is that of a paired bootstrap over the texts. Choose options on ``--split val``; look
at ``--split test`` once, with the final recipe.

This is gradient refinement on unlabelled texts: its scores do not belong into one table with those
of data-free merges.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from manifold_merge.adapted_model import AdaptedModel, Updates
from manifold_merge.merge import merge_adapters
from manifold_merge.refine import Refinement, refine_adapters

BOOTSTRAP = 2000
MAX_TOKENS = 64  # the adapters were trained with texts cut here


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("bench", type=Path, help="folder of the benchmark")
    add("--set", choices=["r16", "mixed"], default="r16", help="ranks 16, or 4 to 32")
    add("--part", choices=["open", "heldout", "all"], default="open")
    add("--split", choices=["val", "test"], default="val")
    add("--texts", type=int, default=512, help="unlabelled texts of each task")
    add("--rank", type=int, default=16)
    add("--features", default="mean+tokens")
    add("--start", default="sequential")
    add("--merged", type=Path, help="merged adapter to begin with (default: merged without data)")
    add("--steps", type=int, default=800)
    add("--batch-size", type=int, default=8)
    add("--learning-rate", type=float)
    add("--variation", type=float)
    add("--held-back", type=float)
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--checkpoint", type=Path)
    add("--output", type=Path, help="write the refined adapter here")
    add("--refined", type=Path, help="only score this adapter, refined before")
    add("--json", type=Path, help="write all numbers here")
    return parser.parse_args()


def predictions(bench: Any, model: AdaptedModel, updates: Updates, tok: Any, task: str,
            options: argparse.Namespace) -> Tensor:  # fmt: skip
    """The predicted label of each text of a task."""
    texts, _ = bench.load_split(task, options.split)
    weight, bias = bench.load_head(task, options.set)
    model.current = updates
    features = bench.embed(model.model, tok, texts)
    model.current = Updates({})
    return (features @ weight.T + bias).argmax(1)


def normalised(
    pairs: dict[str, tuple[Tensor, Tensor, Tensor]],
) -> tuple[dict[str, Any], float, float]:
    """Score of each task, their mean, and its standard error by a paired bootstrap."""
    generator = torch.Generator().manual_seed(0)
    rows, draws = {}, []
    for task, (predicted, theirs, labels) in pairs.items():
        merged, individual = ((p == labels).double() for p in (predicted, theirs))
        index = torch.randint(len(merged), (BOOTSTRAP, len(merged)), generator=generator)
        drawn = merged[index].mean(1) / individual[index].mean(1)
        draws.append(drawn)
        rows[task] = {
            "accuracy": float(merged.mean()),
            "individual": float(individual.mean()),
            "normalised": float(merged.mean() / individual.mean()),
            "standard_error": float(drawn.std()),
            "agreement": float((predicted == theirs).double().mean()),
        }
    mean = sum(row["normalised"] for row in rows.values()) / len(rows)
    return rows, mean, float(torch.stack(draws).mean(0).std())


def refine(
    options: argparse.Namespace, base: Any, tok: Any, folders: list[str], data: list[list[str]]
) -> tuple[Refinement, dict[str, Any]]:
    """Merge without data, refine, and tell what it took."""
    clock, cpu = time.perf_counter(), time.process_time()
    merged: Any = options.merged
    if merged is None:
        merged = merge_adapters(folders, rank=options.rank).modules
    given = {
        name: value
        for name in ("learning_rate", "variation", "held_back")
        if (value := getattr(options, name)) is not None
    }
    refined = refine_adapters(
        merged, folders, base, data, options.output, rank=options.rank, tokenizer=tok,
        max_tokens=MAX_TOKENS, features=options.features, start=options.start,
        steps=options.steps, batch_size=options.batch_size, seed=options.seed,
        checkpoint=options.checkpoint, resume=options.checkpoint is not None, overwrite=True,
        **given,
    )  # fmt: skip
    measured = {
        "seconds": time.perf_counter() - clock,
        "cpu_seconds": time.process_time() - cpu,
        "recipe": refined.recipe,
        "history": refined.history,
        "before": refined.before,
        "started": refined.started,
        "after": refined.after,
        "steps": refined.steps,
        "best_step": refined.best_step,
    }
    return refined, measured


def main() -> None:
    """Merge, refine, score, print."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("manifold_merge").setLevel(logging.INFO)
    torch.set_num_threads(options.threads)
    sys.path.insert(0, str(options.bench.resolve()))
    bench = importlib.import_module("bench")
    base, tok = bench.load_base()
    tasks = [t for t, entry in bench.tasks(options.part).items()
             if options.set == "r16" or entry.get("mixed_rank")]  # fmt: skip
    folders = [bench.adapter_dir(task, options.set) for task in tasks]
    data = [bench.load_split(task, "train")[0][: options.texts] for task in tasks]

    source: Any = options.refined
    refined: Refinement | None = None
    measured: dict[str, Any] = {}
    if source is None:
        refined, measured = refine(options, base, tok, folders, data)
        source = refined.output or refined.modules
    updates = Updates.read(source)
    anchors = {task: Updates.read(folder) for task, folder in zip(tasks, folders, strict=True)}
    with torch.no_grad(), AdaptedModel(base, [updates, *anchors.values()]) as model:
        pairs = {
            task: (
                predictions(bench, model, updates, tok, task, options),
                predictions(bench, model, anchors[task], tok, task, options),
                bench.load_split(task, options.split)[1],
            )
            for task in tasks
        }
    rows, mean, error = normalised(pairs)
    print(f"{'task':20s} {'accuracy':>9s} {'individual':>11s} {'normalised':>11s} "
          f"{'':9s} {'agreement':>10s}")  # fmt: skip
    for task, row in rows.items():
        print(
            f"{task:20s} {row['accuracy']:9.4f} {row['individual']:11.4f} "
            f"{row['normalised']:11.4f} +- {row['standard_error']:.4f} {row['agreement']:10.4f}"
        )
    worst = min(rows, key=lambda task: rows[task]["normalised"])
    agreement = sum(row["agreement"] for row in rows.values()) / len(rows)
    print(
        f"mean normalised accuracy {mean:.4f} +- {error:.4f} on {options.split}, worst {worst}; "
        f"agreement with the adapters {agreement:.4f}"
    )
    if refined is not None:
        distance = [sum(d) / len(tasks) for d in (refined.before, refined.started, refined.after)]
        print(
            f"{refined.steps} steps, best {refined.best_step}; {measured['seconds']:.0f} s, "
            f"{measured['cpu_seconds']:.0f} CPU-s; distance {distance[0]:.4f} -> "
            f"{distance[1]:.4f} -> {distance[2]:.4f}"
        )
    if options.json is not None:
        document = {
            "options": {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items()},
            "tasks": rows, "mean": mean, "standard_error": error, "agreement": agreement,
            **measured,
        }  # fmt: skip
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
