"""Score merges of calibrated adapters on the open multi-task benchmark, beside data-free ones.

    python benchmarks/score_calibrated.py BENCH --set r16 --split val

BENCH is the folder of the benchmark, with its ``bench.py``. Each adapter is calibrated on
``--texts`` unlabelled training texts of its own task, drawn with each seed; nothing else is taken
from the data, and no scale is tuned. Each merge is one encoder, run with each task's own head. A
score is the accuracy divided by that of the task's own adapter ("normalised"); its standard error
is that of a paired bootstrap over the texts, and the spread over seeds is shown beside it. Choose
options on ``--split val``; look at ``--split test`` once, with the final recipe.

Two tables are printed, which are two classes: merges without any data, and merges by statistics
that travel beside the adapters. Gradient refinement is a third class (``score_refined.py``).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from score_refined import normalised, predictions
from torch import Tensor

from manifold_merge import merge_adapters
from manifold_merge.adapted_model import AdaptedModel, Updates
from manifold_merge.calibrate import DEFAULT_DRAWS, DEFAULT_RANK, calibrate_adapter
from manifold_merge.statistics import Statistics

Predictions = dict[str, tuple[Tensor, Tensor, Tensor]]

# Name, rank (None: the sum of the ranks), options of merge_adapters.
DATA_FREE: list[tuple[str, str, dict[str, Any]]] = [
    ("lifted (default)", "full", {}),
    ("mean of the updates", "full", {"geometry": "embedded", "distance": "chordal"}),
    ("lifted", "R", {}),
    ("truncated mean (PEFT svd)", "R", {"geometry": "embedded", "distance": "chordal"}),
]
STATISTICS: list[tuple[str, str, dict[str, Any]]] = [
    ("fisher (default)", "full", {}),
    ("fisher, RegMean's options", "full", {"damping": 1e-6, "shrinkage": 0.1}),
    ("fisher", "R", {}),
    ("fisher, RegMean's options", "R", {"damping": 1e-6, "shrinkage": 0.1}),
]


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
    add("--texts", type=int, default=128, help="unlabelled texts of each task")
    add("--rank", type=int, default=16, help="rank of the low-rank rows")
    add("--statistics-rank", type=int, default=DEFAULT_RANK, help="rank of stored Grams, 0: exact")
    add("--kind", choices=["input_gram", "kfac"], default="input_gram")
    add("--draws", type=int, default=DEFAULT_DRAWS, help="of labels a text, for kfac")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--only-statistics", action="store_true", help="leave out the data-free table")
    add("--threads", type=int, default=1)
    add("--json", type=Path, help="write all numbers here")
    return parser.parse_args()


class Scorer:
    """The benchmark's encoder and what each task's own adapter predicts."""

    def __init__(self, options: argparse.Namespace) -> None:
        sys.path.insert(0, str(options.bench.resolve()))
        self.bench: Any = importlib.import_module("bench")
        self.options = options
        self.model, self.tokenizer = self.bench.load_base()
        self.entries = self.bench.tasks(options.part)
        self.tasks = [
            t for t, e in self.entries.items() if options.set == "r16" or e.get("mixed_rank")
        ]
        self.folders = [self.bench.adapter_dir(t, options.set) for t in self.tasks]
        self.own = {
            task: self.predict(Updates.read(folder), [task])[task]
            for task, folder in zip(self.tasks, self.folders, strict=True)
        }

    @torch.no_grad()
    def predict(self, updates: Updates, tasks: list[str]) -> dict[str, Tensor]:
        """Predicted labels of the texts of each task."""
        with AdaptedModel(self.model, [updates]) as adapted:
            return {
                task: predictions(self.bench, adapted, updates, self.tokenizer, task, self.options)
                for task in tasks
            }

    def score(self, modules: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """Normalised accuracies of one merged adapter."""
        found = self.predict(Updates.read(modules), self.tasks)
        pairs = {
            task: (found[task], self.own[task], self.bench.load_split(task, self.options.split)[1])
            for task in self.tasks
        }
        rows, mean, error = normalised(pairs)
        return {"tasks": rows, "mean": mean, "standard_error": error}

    def calibrate(self, seed: int, folder: Path) -> tuple[list[Path], list[float]]:
        """Statistics of each adapter; returns the files and the seconds that each took."""
        files, seconds = [], []
        for task, adapter in zip(self.tasks, self.folders, strict=True):
            file = folder / f"{task}-{seed}.safetensors"
            clock = time.perf_counter()
            calibrate_adapter(
                adapter, self.model, self.bench.load_split(task, "train")[0], file,
                tokenizer=self.tokenizer, max_tokens=self.bench.MAX_LEN, limit=self.options.texts,
                rank=self.options.statistics_rank or None, kind=self.options.kind,
                draws=self.options.draws, seed=seed,
            )  # fmt: skip
            seconds.append(time.perf_counter() - clock)
            files.append(file)
        return files, seconds

    def probe(self) -> dict[str, Any]:
        """Frozen encoder and linear probe, trained on all labels: from the benchmark's own file."""
        accuracies = {task: _probe(self.entries[task]) for task in self.tasks}
        return {task: value for task, value in accuracies.items() if value is not None}


def _probe(entry: Mapping[str, Any]) -> float | None:
    for key, value in entry.items():
        if "probe" in key and isinstance(value, (int, float)):
            return float(value) / (100 if value > 1 else 1)
    return None


def main() -> None:
    """Merge, score, print."""
    options = parse()
    torch.set_num_threads(options.threads)
    scorer = Scorer(options)
    tables: dict[str, list[dict[str, Any]]] = {}
    if not options.only_statistics:
        tables["Without data"] = [
            _merged(scorer, name, rank, [given]) for name, rank, given in DATA_FREE
        ]
    with tempfile.TemporaryDirectory() as folder:
        calibrated = [scorer.calibrate(seed, Path(folder)) for seed in options.seeds]
        loaded = [[Statistics.load(file) for file in files] for files, _ in calibrated]
        tables["Statistics only"] = [
            _merged(scorer, name, rank, [
                {"geometry": "fisher", "statistics": one, **given} for one in loaded
            ])
            for name, rank, given in STATISTICS
            if options.kind == "input_gram" or not given
        ]  # fmt: skip
        size = sum(file.stat().st_size for file in calibrated[0][0]) / len(scorer.tasks)
    print(render(scorer, tables, options))
    seconds = [s for _, each in calibrated for s in each]
    print(
        f"\nCalibration: {options.texts} texts a task, {sum(seconds) / len(seconds):.1f} s and "
        f"{size / 1e6:.1f} MB an adapter."
    )
    if options.json is not None:
        document = {
            "options": {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items()},
            "tables": tables,
            "calibration_seconds": seconds,
            "statistics_bytes": size,
            "probe": scorer.probe(),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def _merged(scorer: Scorer, name: str, rank: str, variants: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: the mean over variants, which differ by the seed of their statistics."""
    number: int | str = "full" if rank == "full" else scorer.options.rank
    runs, seconds = [], []
    for given in variants:
        clock = time.perf_counter()
        modules = merge_adapters(scorer.folders, rank=number, **given).modules
        seconds.append(time.perf_counter() - clock)
        runs.append(scorer.score(modules))
    tasks = {
        task: sum(run["tasks"][task]["normalised"] for run in runs) / len(runs)
        for task in scorer.tasks
    }
    means = torch.tensor([run["mean"] for run in runs])
    return {
        "method": name,
        "rank": number,
        "tasks": tasks,
        "mean": float(means.mean()),
        "standard_error": sum(run["standard_error"] for run in runs) / len(runs),
        "seeds": float(means.std()) if len(runs) > 1 else None,
        "merge_seconds": sum(seconds) / len(seconds),
        "runs": runs,
    }


def render(
    scorer: Scorer, tables: Mapping[str, list[dict[str, Any]]], options: argparse.Namespace
) -> str:
    """Both tables in Markdown."""
    own = {
        task: float((scorer.own[task] == scorer.bench.load_split(task, options.split)[1])
                    .double().mean())
        for task in scorer.tasks
    }  # fmt: skip
    header = ["method", "rank", *scorer.tasks, "mean", "worst", "merge"]
    lines = []
    for title, rows in tables.items():
        lines += [f"\n### {title} ({options.set}, {options.split})\n", _line(header)]
        lines.append(_line([":--", *["--:"] * (len(header) - 1)]))
        for row in rows:
            spread = "" if row["seeds"] is None else f" (seeds {100 * row['seeds']:.1f})"
            worst = min(row["tasks"], key=row["tasks"].__getitem__)
            lines.append(
                _line([
                    row["method"], str(row["rank"]),
                    *(f"{100 * row['tasks'][task]:.1f}" for task in scorer.tasks),
                    f"{100 * row['mean']:.1f} ± {100 * row['standard_error']:.1f}{spread}",
                    worst, f"{row['merge_seconds']:.1f} s",
                ])
            )  # fmt: skip
        lines.append(
            _line(["own adapter, accuracy", "", *(f"{100 * own[t]:.1f}" for t in scorer.tasks),
                   "", "", ""])
        )  # fmt: skip
        probe = scorer.probe()
        if len(probe) == len(scorer.tasks) and options.split == "test":
            cells = [probe[t] / own[t] for t in scorer.tasks]
            mean = sum(cells) / len(cells)
            lines.append(
                _line(["frozen encoder, linear probe on labels", "",
                       *(f"{100 * c:.1f}" for c in cells), f"{100 * mean:.1f}", "", ""])
            )  # fmt: skip
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
