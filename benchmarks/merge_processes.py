"""Merge with one process and with two of one thread each: time, and whether results are equal.

    python benchmarks/merge_processes.py

Adapters of a 7B model's shape as in merge_llm.py (fewer blocks) and checkpoints as in
merge_checkpoints.py, in a temporary folder that is removed afterwards.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import merge_checkpoints
import merge_llm

PROCESSES = (1, 2)


def torchrun(count: int, arguments: list[str]) -> None:
    """Run the command line in several processes of one thread each."""
    subprocess.run(
        [
            *[sys.executable, "-m", "torch.distributed.run", "--standalone"],
            *["--nproc-per-node", str(count), "-m", "manifold_merge", *arguments, "--quiet"],
        ],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
    )


def same(one: Path, two: Path) -> bool:
    """Whether two folders hold the same weights, byte for byte."""
    files = sorted(file.name for file in one.glob("*.safetensors"))
    return bool(files) and all(
        (one / name).read_bytes() == (two / name).read_bytes() for name in files
    )


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Time each case with each number of processes."""
    merge_llm.make_adapters(scratch / "adapters", options.layers)
    merge_checkpoints.make(scratch / "checkpoints", options.megabytes)
    adapters = sorted(map(str, (scratch / "adapters").glob("task*")))
    models = sorted(map(str, (scratch / "checkpoints").glob("model*")))
    cases = {
        f"{len(adapters)} adapters, {7 * options.layers} modules": ["adapters", *adapters],
        f"{len(models)} checkpoints of {options.megabytes} MB": ["models", *models],
    }
    result: dict[str, Any] = {
        "command": harness.command(),
        "environment": harness.environment(),
        "load_average": {"before": harness.load()},
        "repeats": options.repeats,
        "runs": [],
    }
    for _ in range(options.repeats):
        for case, command in cases.items():
            for count in PROCESSES:
                output = scratch / f"out{count}"
                shutil.rmtree(output, ignore_errors=True)
                arguments = [*command, "-o", str(output)]
                _, elapsed = harness.once(lambda n=count, a=arguments: torchrun(n, a))
                result["runs"].append({"case": case, "processes": count, "wall": elapsed["wall"]})
            result["runs"][-1]["same"] = same(scratch / "out1", scratch / "out2")
    result["load_average"]["after"] = harness.load()
    return result


def render(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    rows = []
    for case in dict.fromkeys(run["case"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["case"] == case]
        walls = [
            statistics.median(run["wall"] for run in runs if run["processes"] == count)
            for count in PROCESSES
        ]
        equal = all(run.get("same", True) for run in runs)
        rows.append(
            [
                case,
                *map(harness.seconds, walls),
                f"{walls[0] / walls[1]:.2f} x",
                "yes" if equal else "NO",
            ]
        )
    header = ["merge", "one process", "two", "faster", "same bytes"]
    return "\n\n".join(
        [
            "The command line under torchrun, the start of Python and torch included; one thread a "
            f"process, median of {result['repeats']} repeats.",
            harness.table(header, rows),
            harness.footer(result),
        ]
    )


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="blocks of the model")
    parser.add_argument("--megabytes", type=int, default=500, help="size of a checkpoint")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="where the temporary folder is made")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="merge_processes-", dir=options.scratch))
    try:
        result = run(options, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    harness.finish("merge_processes", result, render, options.output)


if __name__ == "__main__":
    main()
