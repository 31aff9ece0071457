"""The comparison of the README, from the results of the other scripts; it runs nothing.

What a library does not do is said of what it documents; times are those of one run with its peer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import harness

NONE = "–"


def render(results: Path) -> str:
    """Tools that merge models, and libraries of means, in Markdown."""
    speed = {
        x["threads"]: x["timings"] for x in _load(results, "merge_speed")["runs"]
        if x["dtype"] == "float32"
    }  # fmt: skip
    scores = {x["set"]: x["rows"] for x in _load(results, "score_bench_test")["sets"]}
    networks = _load(results, "match_networks")["pairs"]
    spaces = _load(results, "mean_speed")["spaces"]

    def accuracy(row: str) -> str:
        values = [scores[name][row]["mean_normalised"] for name in ("rank 16", "mixed ranks")]
        return " and ".join(f"{100 * x:.1f} %" for x in values)

    def wall(name: str) -> str:
        return harness.seconds(speed[1][name]["wall"]["median"])

    def pair(name: str) -> str:
        row = networks[name]
        barriers = [f"{row[f'{part} barrier']['mean']:.4f}" for part in ("train", "test")]
        return f"{' and '.join(barriers)}, {harness.seconds(row['seconds']['mean'])}"

    def mean(space: str, name: str) -> str:
        seconds = spaces[space]["seconds"]
        return harness.seconds(seconds[name]) if name in seconds else NONE

    def by_hand(space: str) -> str:
        return mean(space, "geoopt, plain loop") + " (a loop by hand)"

    batches = [harness.seconds(spaces[space]["batch"]) for space in ("spd", "sphere")]
    merging = [
        [
            "merged adapter is the same in any gauge",
            "yes, tested",
            "`svd`, `cat`: yes; `linear`: no",
            NONE,
        ],
        ["adapters merged without the base model", "yes", "no", NONE],
        ["ranks and scalings may differ", "yes", "`svd`, `cat`", NONE],
        ["metrics from data (Fisher, RegMean, K-FAC)", "yes", "no", "no"],
        ["robust median", "yes", "no", "no"],
        [
            "neurons, channels, heads, experts in any order",
            "yes, derived, proved for each model",
            "no",
            "neurons, channels",
        ],
        [
            "one layer, 4096 x 4096, 8 adapters, one thread",
            wall("chordal, rank 16"),
            wall("PEFT svd"),
            NONE,
        ],
        [
            "accuracy at rank 16, no data (equal, mixed ranks)",
            accuracy("ours, auto, rank 16"),
            accuracy("PEFT svd, rank 16"),
            NONE,
        ],
        ["two networks of digits: barriers, time", pair("order and scale"), NONE, pair("rebasin")],
    ]
    means = [
        ["mean, median, variance, principal components", "yes", NONE, "yes", "mean, median"],
        [
            "manifolds",
            "geoopt's, and your own in 60 lines",
            "many",
            "many",
            "positive definite matrices",
        ],
        ["batches of problems at once", "yes, each with its own stop", NONE, "yes", "no"],
        ["implicit gradients to points and weights", "yes", NONE, "no", "no"],
        ["trust regions, conjugate gradients", "pymanopt's", NONE, "no", "no"],
        [
            "20 positive definite 10 x 10 matrices",
            mean("spd", "manifold_merge"),
            by_hand("spd"),
            mean("spd", "geomstats"),
            mean("spd", "pyriemann"),
        ],
        [
            "50 points of the 2-sphere",
            mean("sphere", "manifold_merge"),
            by_hand("sphere"),
            mean("sphere", "geomstats"),
            NONE,
        ],
        ["the same in a batch of 1,000, each", " and ".join(batches), NONE, NONE, NONE],
    ]
    return "\n\n".join(
        [
            harness.table(["merging", "manifold_merge", "PEFT", "rebasin"], merging),
            harness.table(["means", "manifold_merge", "geoopt", "geomstats", "pyriemann"], means),
        ]
    )


def _load(results: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((results / f"{name}.json").read_text("utf-8"))
    return document
