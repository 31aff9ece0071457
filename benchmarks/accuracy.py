"""The accuracy tables of the README, from the results of the scoring scripts; it runs nothing.

The three classes of merges ask for different things and are never mixed: no data at all, statistics
that travel beside the adapters, or training on unlabelled texts. Within a class every method has
its output rank beside it. The frozen linear probe, which was trained on all labels of each task and
merges nothing, opens every table as the mark that a merge should pass.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

# Names in score_bench.py's results, and what tables call them.
SETS = {"r16": "rank 16", "mixed": "mixed ranks"}
BASE = ("base model", "frozen base, the adapters' heads", "")
PLAIN = (
    ("ours, auto, full rank", "default (`lifted`)", "full"),
    ("PEFT svd, rank 16", "PEFT `svd`", "16"),
    ("ours, auto, rank 16", "default (`lifted`)", "16"),
)
# Names in score_calibrated.py's results.
CALIBRATED = {
    "fisher, RegMean's options": "RegMean (off-diagonal entries x 0.9)",
    "fisher": "default (`fisher`)",
    "fisher (default)": "default (`fisher`)",
}
KFAC = "`calibrate --kind kfac`"
PROBE = "frozen base, linear probe on all labels"
# What the summary takes of peers.py's results.
SUMMARY = ("KnOTS-TIES", "Core Space + Iso", "TSV-M", "PEFT `svd`")

NO_DATA = "without data"
STATISTICS = "statistics of 128 unlabelled texts a task (`calibrate`)"
TRAINING = "training on 512 unlabelled texts a task (`refine`)"


@dataclasses.dataclass(frozen=True)
class Row:
    """One method on one set of adapters.

    Attributes:
        method: Its name.
        rank: Output rank, empty where nothing is merged.
        tasks: Normalised accuracy of each task.
        error: Standard error of their mean, unless unknown.
        scale: The factor on the update, where it was chosen on labelled validation texts.
        runs: Means of the single runs, where several were made.
    """

    method: str
    rank: str
    tasks: Mapping[str, float]
    error: float | None = None
    scale: float | None = None
    runs: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Mean over the tasks."""
        return sum(self.tasks.values()) / len(self.tasks)

    @property
    def cell(self) -> str:
        """The mean in per cent, with its standard error and the single runs."""
        text = f"{100 * self.mean:.1f}"
        text += " %" if self.error is None else f" ± {100 * self.error:.1f} %"
        each = ", ".join(f"{100 * x:.1f}" for x in self.runs)
        return text + (f" (seeds: {each})" if len(self.runs) > 1 else "")


def render(results: Path) -> str:
    """The summary: one table for each class, both sets of adapters side by side."""
    blocks = []
    found = {key: classes(results, key) for key in SETS}
    for title in (NO_DATA, STATISTICS, TRAINING):
        lines: dict[tuple[str, str], dict[str, str]] = {}
        for key, tables in found.items():
            for row in tables[title]:
                name = row.method.removesuffix(", Iso-C")  # the same at this rank
                if row.scale is not None:
                    if not name.startswith(SUMMARY):
                        continue
                    name += ", scale tuned on labels"
                lines.setdefault((name, row.rank), {})[key] = row.cell
        header = [title, "output rank", *(f"adapters of {name}" for name in SETS.values())]
        rows = [[*names, *(cells[key] for key in SETS)] for names, cells in lines.items()]
        blocks.append(harness.table(header, rows))
    return "\n\n".join(blocks)


def tasks(results: Path) -> str:
    """Task by task: one table for each class and set of adapters."""
    blocks = []
    for key, name in SETS.items():
        own = _load(results, f"peers_{key}")["individual"]
        for title, rows in classes(results, key).items():
            tuned = any(row.scale is not None for row in rows)
            blocks.append(f"**Adapters of {name}, {title}**")
            header = ["method", "rank", *(["scale"] if tuned else []), *own, "mean", "worst task"]
            lines = [_line(row, list(own), tuned) for row in rows]
            cells = [f"{100 * x:.1f}" for x in own.values()]
            mean = f"{100 * sum(own.values()) / len(own):.1f} %"
            blank = [""] * (1 + tuned)
            lines.append(["*accuracy of the own adapter*", *blank, *cells, mean, ""])
            blocks.append(harness.table(header, lines))
    return "\n\n".join(blocks)


def _line(row: Row, names: Sequence[str], tuned: bool) -> list[str]:
    scale = "" if row.scale is None else f"{row.scale:g}"
    worst = min(names, key=lambda task: row.tasks[task])
    return [
        row.method,
        row.rank,
        *([scale] if tuned else []),
        *(f"{100 * row.tasks[task]:.1f}" for task in names),
        row.cell.partition(" (")[0],
        worst,
    ]


def classes(results: Path, key: str) -> dict[str, list[Row]]:
    """The rows of each class of one of :data:`SETS`, by output rank and with ours last."""
    peers = _load(results, f"peers_{key}")
    own = peers["individual"]
    probe = Row(PROBE, "", {task: x / own[task] for task, x in peers["probe"].items()})
    tables = {
        NO_DATA: [*_plain(results, key), *_peers(peers)],
        STATISTICS: _statistics(results, key),
        TRAINING: [_refined(results, key)],
    }
    return {title: [probe, *sorted(rows, key=_order)] for title, rows in tables.items()}


def _order(row: Row) -> tuple[int, bool]:
    ranks = {"": 0, "full": 2, "16": 3}
    return ranks.get(row.rank, 1), row.method.startswith(("default", "`"))


def _load(results: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((results / f"{name}.json").read_text("utf-8"))
    return document


def _peers(document: Mapping[str, Any]) -> list[Row]:
    return [
        Row(
            row["method"],
            str(row["rank"]),
            {task: x["normalised"] for task, x in row["tasks"].items()},
            row["standard_error"],
            row["scale"],
        )
        for row in document["rows"]
    ]


def _plain(results: Path, key: str) -> list[Row]:
    sets = {x["set"]: x["rows"] for x in _load(results, "score_bench_test")["sets"]}
    rows = sets[SETS[key]]
    own = rows["own adapter"]["accuracy"]
    return [
        Row(
            name,
            rank,
            {task: x / own[task] for task, x in rows[stored]["accuracy"].items()},
            rows[stored]["error"],
        )
        for stored, name, rank in (BASE, *PLAIN)
    ]


def _statistics(results: Path, key: str) -> list[Row]:
    return [
        Row(
            name if file == f"score_calibrated_{key}" else KFAC,
            str(row["rank"]),
            row["tasks"],
            row["standard_error"],
        )
        for file in (f"score_calibrated_{key}", f"score_calibrated_{key}_kfac")
        for row in _load(results, file)["tables"]["Statistics only"]
        if (name := CALIBRATED.get(row["method"]))
    ]


def _refined(results: Path, key: str) -> Row:
    files = sorted(results.glob(f"refined_{key}*.json"))  # one for each seed
    runs = [_load(results, file.stem) for file in files]
    names = list(runs[0]["tasks"])
    return Row(
        "`refine`",
        "16",
        {t: sum(x["tasks"][t]["normalised"] for x in runs) / len(runs) for t in names},
        sum(x["standard_error"] for x in runs) / len(runs),
        runs=tuple(x["mean"] for x in runs),
    )


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
                    f"{100 * run['mean']:.1f} ± {100 * run['standard_error']:.1f} %",
                    f"{100 * run['agreement']:.1f} %",
                    " → ".join(f"{x:.3f}" for x in distances),
                ]
            )
    last = ["mean", "same label as the own adapter", "distance"]
    return harness.table(["adapters", "seed", *names, *last], rows)
