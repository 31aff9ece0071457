"""Merge whole checkpoints from folders to a folder: time, memory and rounding.

    python benchmarks/merge_checkpoints.py

Three checkpoints of 500 MB in bfloat16, in shards of 200 MB, with random entries, in a temporary
folder that is removed afterwards; for Fisher merging also their diagonals in float32. Each merge
runs in its own process and is compared with a bare streaming average of the same bytes: read each
tensor of each model, convert, add, divide, convert back, save each shard.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import harness
import torch

MODELS, SHARDS = 3, 3
HIDDEN, FEED_FORWARD = 1024, 4096
CASES = {
    "average": {"geometry": "euclidean"},
    "Fisher": {"geometry": "fisher"},
    "sphere (SLERP, karcher)": {"geometry": "sphere"},
    "geometric median": {"geometry": "euclidean", "p": 1},
}
BARE = "bare streaming average"
BARE_FISHER = "the same, reading diagonals too"


def shapes(megabytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Tensors of each shard, together about the given size in bfloat16."""
    block = {
        "attention.qkv.weight": (3 * HIDDEN, HIDDEN),
        "attention.out.weight": (HIDDEN, HIDDEN),
        "mlp.up.weight": (FEED_FORWARD, HIDDEN),
        "mlp.down.weight": (HIDDEN, FEED_FORWARD),
        "norm.weight": (HIDDEN,),
    }
    size = 2 * sum(torch.Size(shape).numel() for shape in block.values())
    count = max(SHARDS, round(megabytes * 1e6 / size))
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(SHARDS)]
    for i in range(count):
        parts[i * SHARDS // count] |= {f"layers.{i:02d}.{k}": v for k, v in block.items()}
    return parts


def make(root: Path, megabytes: int) -> None:
    """Write the checkpoints and their Fisher diagonals."""
    from safetensors.torch import save_file

    from manifold_merge.statistics_file import Statistics

    parts = shapes(megabytes)
    common = torch.Generator().manual_seed(99)
    for number in range(MODELS):
        generator = torch.Generator().manual_seed(number)
        common.manual_seed(99)
        folder = root / f"model{number}"
        folder.mkdir(parents=True)
        places, diagonals = {}, {}
        for i, part in enumerate(parts):
            file = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
            tensors = {}
            for name, shape in part.items():
                x = torch.randn(shape, generator=common)
                x += 0.3 * torch.randn(shape, generator=generator)
                tensors[name] = x.bfloat16()
                diagonals[name] = torch.rand(shape, generator=generator)
            save_file(tensors, folder / file, {"format": "pt"})
            places |= dict.fromkeys(tensors, file)
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text("{}")
        Statistics("diagonal", diagonals=diagonals, examples=1).save(root / f"fisher{number}")


def bare(folders: list[Path], output: Path, diagonals: list[Path]) -> None:
    """The least that a streaming average has to do, and as much for each diagonal, if given."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    output.mkdir()
    for shard in sorted(x.name for x in folders[0].glob("*.safetensors")):
        files = [safe_open(folder / shard, "pt") for folder in folders]
        information = [safe_open(file, "pt") for file in diagonals]
        merged = {}
        for name in files[0].keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            total = files[0].get_tensor(name).float()
            for file in files[1:]:
                total += file.get_tensor(name).float()
            merged[name] = (total / len(files)).bfloat16()
            if information:
                total = information[0].get_tensor(f"diagonal/{name}").clone()
                for file in information[1:]:
                    total += file.get_tensor(f"diagonal/{name}")
        save_file(merged, output / shard, {"format": "pt"})


class Peak(threading.Thread):
    """Greatest anonymous memory of this process; pages of mapped files belong to the system."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_value = self.value = self.read()
        self.running = True

    @staticmethod
    def read() -> int:
        """Anonymous memory now, in bytes."""
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise KeyError("RssAnon")

    def run(self) -> None:
        """Look every few milliseconds."""
        while self.running:
            self.value = max(self.value, self.read())
            time.sleep(0.004)


def child(options: argparse.Namespace) -> None:
    """Run one case and print what it took as JSON."""
    from manifold_merge.checkpoint_merge import merge_models

    torch.set_num_threads(options.threads)
    torch.ones(8, 8) @ torch.ones(8, 8)
    root, output = options.scratch, options.scratch / "merged"
    folders = [root / f"model{i}" for i in range(MODELS)]
    peak = Peak()
    peak.start()
    diagonals = [root / f"fisher{i}" for i in range(MODELS)]
    if options.child in (BARE, BARE_FISHER):
        given_diagonals = diagonals if options.child == BARE_FISHER else []
        _, elapsed = harness.once(lambda: bare(folders, output, given_diagonals))
    else:
        given: dict[str, Any] = dict(CASES[options.child])
        if given["geometry"] == "fisher":
            given["statistics"] = diagonals
        _, elapsed = harness.once(lambda: merge_models(folders, output, **given))
    peak.running = False
    peak.join()
    result = {**elapsed, "peak": peak.value, "started": peak.start_value}
    if options.child == "average":
        result["wrong"] = wrongly_rounded(folders, output)
    print(json.dumps(result))


def wrongly_rounded(folders: list[Path], output: Path) -> float:
    """Share of entries that are not the exact mean rounded to bfloat16, in the first shard."""
    from safetensors import safe_open

    shard = min(x.name for x in output.glob("*.safetensors"))
    files = [safe_open(folder / shard, "pt") for folder in folders]
    found = safe_open(output / shard, "pt")
    wrong = total = 0
    for name in list(found.keys())[:5]:
        exact = sum(file.get_tensor(name).double() for file in files) / len(files)
        wrong += int((found.get_tensor(name) != exact.bfloat16()).sum())
        total += exact.numel()
    return wrong / total


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Make the checkpoints and run every case, each repeat in turn."""
    make(scratch, options.megabytes)
    result: dict[str, Any] = {
        "command": harness.command(),
        "environment": harness.environment(),
        "load_average": {"before": harness.load()},
        "megabytes": sum(
            x.stat().st_size for x in (scratch / "model0").glob("*.safetensors")
        ) / 1e6,
        "threads": options.threads,
        "repeats": options.repeats,
        "runs": [],
    }  # fmt: skip
    for _ in range(options.repeats):
        for case in (BARE, BARE_FISHER, *CASES):
            shutil.rmtree(scratch / "merged", ignore_errors=True)
            arguments = ["--child", case, "--threads", str(options.threads)]
            done = subprocess.run(
                [sys.executable, __file__, *arguments, "--scratch", str(scratch)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            result["runs"].append({"case": case, **json.loads(done.stdout)})
    result["load_average"]["after"] = harness.load()
    return result


def render(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    found: dict[str, dict[str, float]] = {}
    for case in (BARE, BARE_FISHER, *CASES):
        runs = [x for x in result["runs"] if x["case"] == case]
        found[case] = {
            key: statistics.median(x[key] for x in runs) for key in ("wall", "cpu", "peak")
        }
    rows = []
    for case, x in found.items():
        least = found[BARE_FISHER if "isher" in case else BARE]
        row = [case]
        for clock in ("wall", "cpu"):
            row += [harness.seconds(x[clock]), f"{x[clock] / least[clock]:.2f} x"]
        rows.append([*row, harness.mebibytes(x["peak"])])
    wrong = max(x["wrong"] for x in result["runs"] if "wrong" in x)
    return "\n\n".join(
        [
            f"{MODELS} checkpoints of {result['megabytes']:.0f} MB in bfloat16, {SHARDS} shards "
            f"each, {result['threads']} thread(s), median of {result['repeats']} repeats, each in "
            "a process of its own; Fisher merging is compared with reading and adding the float32 "
            "diagonals too.",
            harness.table(
                ["merge", "wall time", "of bare", "CPU time", "of bare", "peak anonymous memory"],
                rows,
            ),
            f"Entries of the average that differ from the exact mean rounded once: {wrong:.1e} of "
            "all.",
            harness.footer(result),
        ]
    )


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500, help="size of a checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where the temporary folder is made")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    scratch = Path(tempfile.mkdtemp(prefix="merge_checkpoints-", dir=options.scratch))
    try:
        result = run(options, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    harness.finish("merge_checkpoints", result, render, options.output)


if __name__ == "__main__":
    main()
