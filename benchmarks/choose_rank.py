"""What ``rank="auto"`` gives up at several tolerances, on validation texts.

    python benchmarks/choose_rank.py --bench BENCH

Each adapter is calibrated on 128 unlabelled training texts of its own task. For each tolerance the
adapters are merged at the rank that it leads to, and scored on the validation texts beside the
unconstrained merge. The default tolerance was chosen from this table; test texts are not read.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import torch
from bench_data import SETS, Bench
from peers import Scorer
from torch import Tensor

from manifold_merge import merge_adapters
from manifold_merge.calibrate import calibrate_adapter

TOLERANCES = (0.1, 0.05, 0.02, 0.01, 0.005)
TEXTS, RESAMPLES = 128, 2000


def calibrated(bench: Bench, scorer: Scorer, folder: Path) -> list[Path]:
    """Statistics of each adapter."""
    model, tokenizer = bench.loader.load_base()
    files = []
    for task, adapter in zip(bench.tasks, scorer.folders, strict=True):
        texts = bench.loader.load_split(task, "train")[0]
        files.append(folder / f"{task}.safetensors")
        calibrate_adapter(
            adapter, model, texts, files[-1], tokenizer=tokenizer,
            max_tokens=bench.loader.MAX_LEN, limit=TEXTS, seed=0,
        )  # fmt: skip
    return files


class Scores:
    """Normalised accuracy on the validation texts, and resamples of it, the same for all merges."""

    def __init__(self, bench: Bench, scorer: Scorer) -> None:
        self.scorer = scorer
        self.labels = {task: bench.labels(task, "val", scorer.limit) for task in bench.tasks}
        own = scorer.individual("val")
        self.own = {task: (own[task] == y).double() for task, y in self.labels.items()}
        generator = torch.Generator().manual_seed(0)
        self.draws = {
            task: torch.randint(len(y), (RESAMPLES, len(y)), generator=generator)
            for task, y in self.labels.items()
        }

    def of(self, modules: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[float, Tensor]:
        """The mean over the tasks, and its resamples."""
        self.scorer.put({name: b.double() @ a.double() for name, (b, a) in modules.items()})
        found = self.scorer.predict("val", list(self.labels))
        means, resampled = [], []
        for task, labels in self.labels.items():
            right, own = (found[task] == labels).double(), self.own[task]
            means.append(float(right.mean() / own.mean()))
            index = self.draws[task]
            resampled.append(right[index].mean(1) / own[index].mean(1))
        return sum(means) / len(means), torch.stack(resampled).mean(0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Both sets, with statistics and without."""
    torch.set_num_threads(options.threads)
    bench = Bench(options.bench)
    result: dict[str, Any] = {
        "command": harness.command(),
        "environment": harness.environment(),
        "load_average": {"before": harness.load()},
        "rows": [],
    }
    for name, key in SETS.items():
        scorer = Scorer(bench, key, options.limit)
        scores = Scores(bench, scorer)
        with tempfile.TemporaryDirectory() as folder:
            files = calibrated(bench, scorer, Path(folder))
            geometries: dict[str, dict[str, Any]] = {
                "fisher": {"geometry": "fisher", "statistics": files},
                "lifted": {"geometry": "lifted"},
            }
            for geometry, given in geometries.items():
                full = merge_adapters(scorer.folders, rank="full", **given)
                mean, draws = scores.of(full.modules)
                for tolerance in TOLERANCES:
                    merged = merge_adapters(scorer.folders, rank=f"auto={tolerance}", **given)
                    bounded, others = scores.of(merged.modules)
                    result["rows"].append(
                        {
                            "set": name,
                            "geometry": geometry,
                            "tolerance": tolerance,
                            "rank": merged.recipe["rank"],
                            **merged.recipe["rank_choice"],
                            "unconstrained": mean,
                            "mean": bounded,
                            "difference_error": float((others - draws).std()),
                        }
                    )
    result["load_average"]["after"] = harness.load()
    return result


def render(result: Mapping[str, Any]) -> str:
    """One line for each set and geometry, one column for each tolerance, in Markdown."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for row in result["rows"]:
        start = (
            f"{row['set']}, `{row['geometry']}`",
            str(row["unconstrained_rank"]),
            f"{100 * row['unconstrained']:.1f}",
        )
        difference = 100 * (row["mean"] - row["unconstrained"])
        lines.setdefault(start, []).append(
            f"{row['rank']}: {difference:+.1f} ± {100 * row['difference_error']:.1f}"
        )
    header = [
        "adapters, geometry", "full rank", "%",
        *(f"{100 * tolerance:g} % given up" for tolerance in TOLERANCES),
    ]  # fmt: skip
    table = harness.table(header, [[*start, *cells] for start, cells in lines.items()])
    return f"{table}\n\n{harness.footer(result)}"


if __name__ == "__main__":
    harness.main_on_bench("choose_rank", __doc__, run, render, limit={"help": "texts of each task"})
