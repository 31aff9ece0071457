"""The accuracy tables of the README, from the results of the scoring scripts; it runs nothing.

The three classes of merges ask for different things and are never mixed: no data at all, statistics
that travel beside the adapters, or training on unlabelled texts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import harness

# Names in score_bench.py's and score_calibrated.py's results, and what the README calls them.
SETS = {"r16": "rank 16", "mixed": "mixed ranks"}
PLAIN = {
    "base model": ("frozen base, the adapters' heads", ""),
    "PEFT svd, rank 16": ("PEFT `svd`", "16"),
    "ours, auto, full rank": ("default (`lifted`)", "full"),
    "ours, auto, rank 16": ("default (`lifted`)", "16"),
}


def render(results: Path) -> str:
    """One table for each class, in Markdown."""
    blocks = []
    for title, rows in (
        ("without data", _without_data(results)),
        ("statistics of 128 unlabelled texts a task (`calibrate`)", _statistics(results)),
        ("training on 512 unlabelled texts a task (`refine`)", _refined(results)),
    ):
        header = [title, "output rank", *(f"adapters of {name}" for name in SETS.values())]
        blocks.append(harness.table(header, rows))
    return "\n\n".join(blocks)


def _load(results: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((results / f"{name}.json").read_text("utf-8"))
    return document


def _cell(mean: float, error: float) -> str:
    return f"{100 * mean:.1f} ± {100 * error:.1f} %"


def _without_data(results: Path) -> list[list[str]]:
    sets = {x["set"]: x["rows"] for x in _load(results, "score_bench_test")["sets"]}
    return [
        [
            name,
            rank,
            *(_cell(sets[s][row]["mean_normalised"], sets[s][row]["error"]) for s in SETS.values()),
        ]
        for row, (name, rank) in PLAIN.items()
    ]


def _statistics(results: Path) -> list[list[str]]:
    found = {s: _load(results, f"score_calibrated_{s}") for s in SETS}
    rows = []
    for rank in ("full", 16):
        cells = []
        for document in found.values():
            (row,) = (
                r
                for r in document["tables"]["Statistics only"]
                if r["method"] in ("fisher", "fisher (default)") and str(r["rank"]) == str(rank)
            )
            cells.append(_cell(row["mean"], row["standard_error"]))
        rows.append(["default (`fisher`)", str(rank), *cells])
    return rows


def _refined(results: Path) -> list[list[str]]:
    cells = []
    for name in SETS:
        files = sorted(results.glob(f"refined_{name}*.json"))  # one for each seed
        runs = [_load(results, file.stem) for file in files]
        mean, error = (sum(x[key] for x in runs) / len(runs) for key in ("mean", "standard_error"))
        each = ", ".join(f"{100 * x['mean']:.1f}" for x in runs)
        cells.append(_cell(mean, error) + (f" (seeds: {each})" if len(runs) > 1 else ""))
    return [["`refine`", "16", *cells]]


def refined(results: Path) -> str:
    """Every run of ``refine`` on the test texts, task by task."""
    rows, names = [], []
    for key, title in SETS.items():
        for file in sorted(results.glob(f"refined_{key}*.json")):
            run = _load(results, file.stem)
            names = list(run["tasks"])
            distances = [
                sum(run[stage]) / len(run[stage]) for stage in ("before", "started", "after")
            ]
            rows.append(
                [
                    title,
                    str(run["options"]["seed"]),
                    *(f"{task['normalised']:.3f}" for task in run["tasks"].values()),
                    _cell(run["mean"], run["standard_error"]),
                    f"{100 * run['agreement']:.1f} %",
                    " → ".join(f"{x:.3f}" for x in distances),
                ]
            )
    last = ["mean", "same label as the own adapter", "distance"]
    return harness.table(["adapters", "seed", *names, *last], rows)
