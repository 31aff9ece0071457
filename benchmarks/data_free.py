"""Data-free merges that were tried, none with a scale to tune, on validation texts.

    python benchmarks/data_free.py --bench BENCH

The default, and what stands beside it: each transform of the anchors with each rule for the scale,
at full rank and at rank 16. Test texts are not read.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import harness
import torch
from bench_data import SETS, Bench
from peers import Scorer

from manifold_merge import merge_adapters

RANK = 16
MEAN = {"geometry": "embedded", "distance": "chordal"}
NORM = {**MEAN, "scale": "norm"}
LIFTED = {"geometry": "lifted"}
# What the anchors go through, what is done with them, and the options that say so.
TRIED: list[tuple[str, str, dict[str, Any]]] = [
    ("as they are", "lifted (default)", LIFTED),
    ("as they are", "mean", MEAN),
    ("as they are", "mean, norm restored", NORM),
    ("whitened by half", "mean, norm restored", {**NORM, "transform": "whiten=0.5"}),
    ("whitened", "mean, norm restored", {**NORM, "transform": "whiten=1"}),
    ("spectra half flat", "lifted", {**LIFTED, "transform": "isotropic=0.5"}),
    ("spectra flat", "lifted", {**LIFTED, "transform": "isotropic=1"}),
    ("spectra half flat", "mean, norm restored", {**NORM, "transform": "isotropic=0.5"}),
    ("TIES, 20 % kept", "mean", {**MEAN, "transform": "ties=0.2"}),
    ("TIES, 20 % kept", "mean, norm restored", {**NORM, "transform": "ties=0.2"}),
    ("TIES, 20 % kept", "lifted", {**LIFTED, "transform": "ties=0.2"}),
    ("TIES, 50 % kept", "lifted", {**LIFTED, "transform": "ties=0.5"}),
]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Both sets, both ranks."""
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
        for anchors, rule, given in TRIED:
            for rank in ("full", RANK):
                modules = merge_adapters(scorer.folders, rank=rank, **given).modules
                updates = {x: b.double() @ a.double() for x, (b, a) in modules.items()}
                found = scorer.score(updates, 1.0, "val")
                result["rows"].append(
                    {"set": name, "anchors": anchors, "rule": rule, "rank": rank, **found}
                )
    result["load_average"]["after"] = harness.load()
    return result


def render(result: Mapping[str, Any]) -> str:
    """One line for each merge, in Markdown."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        cell = f"{100 * row['mean']:.1f} ± {100 * row['standard_error']:.1f}"
        lines.setdefault((row["anchors"], row["rule"]), []).append(cell)
    columns = [f"{name}, {rank}" for name in SETS for rank in ("full", f"cut to {RANK}")]
    table = harness.table(
        ["anchors", "merge", *columns], [[*key, *cells] for key, cells in lines.items()]
    )
    return f"{table}\n\n{harness.footer(result)}"


if __name__ == "__main__":
    harness.main_on_bench("data_free", __doc__, run, render, limit={"help": "texts of each task"})
