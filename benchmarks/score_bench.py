"""Score merges of real adapters on the real model, against PEFT's ``svd``.

    python benchmarks/score_bench.py --bench ../shared/bench --split val

Every merged adapter is written to a folder, loaded with ``PeftModel.from_pretrained`` and run over
the texts of each task with that task's head. Normalised accuracy is accuracy divided by that of the
task's own adapter on the same texts. Standard errors are bootstrapped over texts, the same texts
for all rows, so that the error of a difference is that of paired scores. No row has an option that
was chosen by its score here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import torch
from bench_data import SETS, Bench
from peft import PeftModel
from torch import Tensor

from manifold_merge.merge import merge_adapters

RANK = 16
BASE, OWN, PEER = "base model", "own adapter", f"PEFT svd, rank {RANK}"
OURS: dict[str, dict[str, Any]] = {
    "ours, auto, full rank": {},
    f"ours, auto, rank {RANK}": {"rank": RANK},
    f"ours, embedded chordal, rank {RANK}": {
        "geometry": "embedded",
        "distance": "chordal",
        "rank": RANK,
    },
}
RESAMPLES = 4000

Correct = dict[str, Tensor]


@torch.no_grad()
def peft_svd(bench: Bench, folders: list[Path], output: Path) -> Path:
    """PEFT's merge with equal weights, saved by PEFT."""
    names = [folder.name for folder in folders]
    model = PeftModel.from_pretrained(bench.base(), str(folders[0]), names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), name)
    model.add_weighted_adapter(
        names, [1 / len(names)] * len(names), "merged", combination_type="svd", svd_rank=RANK
    )
    model.save_pretrained(str(output), selected_adapters=["merged"])
    return output / "merged"


def score(bench: Bench, adapter: Path | None, which: str, options: argparse.Namespace) -> Correct:
    """Which texts of each task are right."""
    model = bench.base()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    scored = {}
    for task in bench.tasks:
        scored[task] = bench.correct(model, task, which, options.split, options.limit)
    return scored


def score_set(
    bench: Bench, which: str, options: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """All rows of one set of adapters."""
    folders = bench.adapters(which)
    rows: dict[str, Correct] = {BASE: score(bench, None, which, options), OWN: {}}
    for task, folder in zip(bench.tasks, folders, strict=True):
        model = PeftModel.from_pretrained(bench.base(), str(folder)).eval()
        rows[OWN][task] = bench.correct(model, task, which, options.split, options.limit)
    merged = {PEER: peft_svd(bench, folders, scratch / which / "peft")}
    recipes = {}
    for name, arguments in OURS.items():
        merged[name] = scratch / which / str(len(merged))
        recipes[name] = merge_adapters(folders, merged[name], **arguments).recipe
    for name, folder in merged.items():
        rows[name] = score(bench, folder, which, options)
        print(f"scored {which}: {name}", file=sys.stderr, flush=True)
    checked = {}
    if options.evaluate:
        chosen = (PEER, f"ours, embedded chordal, rank {RANK}")
        checked = {name: evaluate(bench, merged[name], which, options, scratch) for name in chosen}
    return {
        "set": which,
        "texts": {task: len(right) for task, right in rows[BASE].items()},
        "recipes": recipes,
        "rows": summarise(rows),
        "evaluate.py": checked,
    }


def evaluate(
    bench: Bench, adapter: Path, which: str, options: argparse.Namespace, scratch: Path
) -> dict[str, float]:
    """The benchmark's own command on a folder: task to accuracy."""
    file = scratch / "evaluate.json"
    arguments = [
        *(str(bench.folder / "evaluate.py"), "--adapter", str(adapter), "--json", str(file)),
        *("--part", options.part, "--split", options.split, "--seed-set", SETS[which]),
        *("--threads", str(options.threads)),
    ]
    if options.limit:
        arguments += ["--limit", str(options.limit)]
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    tasks = json.loads(file.read_text("utf-8"))["tasks"]
    return {task: entry["acc"] for task, entry in tasks.items()}


def summarise(rows: Mapping[str, Correct]) -> dict[str, Any]:
    """Accuracies, mean normalised accuracies and their bootstrapped standard errors."""
    generator = torch.Generator().manual_seed(0)
    resampled: dict[str, Tensor] = {name: torch.zeros(RESAMPLES) for name in rows}
    tasks = list(rows[OWN])
    for task in tasks:
        count = len(rows[OWN][task])
        draw = torch.randint(count, (RESAMPLES, count), generator=generator)
        own = rows[OWN][task].double()[draw].mean(1)
        for name, right in rows.items():
            resampled[name] = resampled[name] + right[task].double()[draw].mean(1) / own
    result = {}
    for name, right in rows.items():
        accuracies = {task: float(right[task].double().mean()) for task in tasks}
        shares = [accuracies[task] / float(rows[OWN][task].double().mean()) for task in tasks]
        result[name] = {
            "accuracy": accuracies,
            "mean_accuracy": sum(accuracies.values()) / len(tasks),
            "mean_normalised": sum(shares) / len(tasks),
            "error": float((resampled[name] / len(tasks)).std()),
            "error_from_peft": float(((resampled[name] - resampled[PEER]) / len(tasks)).std()),
        }
    return result


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Score the chosen sets."""
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "command": harness.command(),
        "environment": harness.environment(),
        "load_average": {"before": harness.load()},
        "split": options.split,
        "sets": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for which in options.sets:
            bench = Bench(options.bench, options.part, which)
            result["sets"].append(score_set(bench, which, options, Path(scratch)))
    result["load_average"]["after"] = harness.load()
    return result


def render(result: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    blocks = []
    for entry in result["sets"]:
        tasks = list(entry["texts"])
        peer = entry["rows"][PEER]["mean_normalised"]
        lines = []
        for name, row in entry["rows"].items():
            normalised = row["mean_normalised"]
            lines.append(
                [
                    name,
                    *(f"{100 * row['accuracy'][task]:.1f}" for task in tasks),
                    f"{100 * row['mean_accuracy']:.1f}",
                    f"{100 * normalised:.1f} ± {100 * row['error']:.1f}",
                    f"{100 * (normalised - peer):+.1f} ± {100 * row['error_from_peft']:.1f}",
                ]
            )
        texts = ", ".join(f"{count} {task}" for task, count in entry["texts"].items())
        chosen = next(iter(entry["recipes"].values()))
        blocks.append(
            f"**{entry['set']}**, {result['split']} split ({texts}), accuracy in %. Auto chose "
            f"{chosen['geometry']} ({chosen['chosen_because']})."
        )
        header = ["model", *tasks, "mean", "mean normalised", "minus PEFT svd"]
        blocks.append(harness.table(header, lines))
        for name, checked in entry["evaluate.py"].items():
            accuracies = entry["rows"][name]["accuracy"]
            off = max(abs(checked[task] - accuracies[task]) for task in tasks)
            found = "the same accuracies" if off < 1e-6 else f"accuracies up to {off:.0e} away"
            blocks.append(f"`evaluate.py --adapter` on the folder of *{name}*: {found}.")
    blocks.append(harness.footer(result))
    return "\n\n".join(blocks)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", type=Path, required=True, help="folder of the benchmark")
    parser.add_argument("--part", choices=["open", "heldout", "all"], default="open")
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--evaluate", action="store_true", help="also run evaluate.py")
    parser.add_argument("--limit", type=int, help="texts of each task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    harness.quiet()
    harness.finish(f"score_bench_{options.split}", run(options), render, options.output)


if __name__ == "__main__":
    main()
