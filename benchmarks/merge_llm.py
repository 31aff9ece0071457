"""Merge adapters of a language model's size from folders to a folder: time and memory.

    python benchmarks/merge_llm.py

Eight adapters of rank 16 in bfloat16 for all seven linear layers of each block of a 7B model
(32 blocks: 224 modules, 80 MB an adapter) with random entries, in a temporary folder that is
removed afterwards. Each merge runs in its own process. It is compared with the least that any merge
has to do with the same bytes: read all factors and convert them, form the Gram products of each
module's stacked factors, and write tensors of the result's shapes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

HIDDEN, FEED_FORWARD, BLOCKS = 4096, 11008, 32
DTYPE = torch.bfloat16
RANK, ADAPTERS = 16, 8
# Shapes (out_features, in_features) of the linear layers of one block.
LAYERS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
    "mlp.up_proj": (FEED_FORWARD, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
}
CASES: dict[str, dict[str, Any]] = {
    "chordal, rank 16": {"geometry": "embedded", "distance": "chordal"},
    "auto (lifted), rank 16": {"rank": RANK},
    "auto (lifted), full rank": {},
}
# The result's rank decides what has to be written.
OUTPUT_RANKS = {
    "chordal, rank 16": RANK,
    "auto (lifted), rank 16": RANK,
    "auto (lifted), full rank": RANK * ADAPTERS,
}
FLOORS = {"float32": torch.float32, "float64": torch.float64}


def module_shapes(blocks: int) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of every module."""
    for block in range(blocks):
        for name, (rows, columns) in LAYERS.items():
            yield f"model.layers.{block}.{name}", rows, columns


def stored_bytes(blocks: int, rank: int) -> int:
    """Size of an adapter's tensors."""
    return sum((m + n) * rank * DTYPE.itemsize for _, m, n in module_shapes(blocks))


def largest_group(blocks: int) -> int:
    """Stored size of all adapters' factors of the modules of one shape, for the largest group."""
    groups: dict[tuple[int, int], int] = {}
    for _, m, n in module_shapes(blocks):
        groups[m, n] = groups.get((m, n), 0) + (m + n) * RANK * DTYPE.itemsize * ADAPTERS
    return max(groups.values())


def make_adapters(root: Path, blocks: int) -> None:
    """Write the adapters as PEFT lays them out."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    targets = sorted({name.rpartition(".")[2] for name in LAYERS})
    for number in range(ADAPTERS):
        folder = root / f"task{number}"
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, m, n in module_shapes(blocks):
            for factor, shape in (("lora_B", (m, RANK)), ("lora_A", (RANK, n))):
                values = torch.randn(shape, generator=generator) / max(shape) ** 0.5
                tensors[f"base_model.model.{name}.{factor}.weight"] = values.to(DTYPE)
        config = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=targets,
            base_model_name_or_path="random-7b",
            task_type="CAUSAL_LM",
        )
        config.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


# --- what runs in a process of its own -----------------------------------------------------------


def memory(field: str) -> int:
    """A field of ``/proc/self/status``, in bytes."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def floor(
    root: Path, output: Path, blocks: int, rank: int, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Read, multiply, write: seconds of each part."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    parts = {name: {"wall": 0.0, "cpu": 0.0} for name in ("reading", "Gram products", "writing")}

    def timed(part: str, function: Callable[[], Any]) -> Any:
        value, elapsed = harness.once(function)
        for clock in elapsed:
            parts[part][clock] += elapsed[clock]
        return value

    folders = sorted(root.glob("task*"))
    files = [safe_open(x / "adapter_model.safetensors", framework="pt") for x in folders]

    def stacked(key: str, dimension: int) -> Tensor:
        return torch.cat([file.get_tensor(key).to(dtype) for file in files], dimension)

    for name, _, _ in module_shapes(blocks):
        key = f"base_model.model.{name}.lora_{{}}.weight"
        b = timed("reading", partial(stacked, key.format("B"), 1))
        a = timed("reading", partial(stacked, key.format("A"), 0))
        timed("Gram products", partial(torch.matmul, b.mT, b))
        timed("Gram products", partial(torch.matmul, a, a.mT))
    tensors = {}
    for name, m, n in module_shapes(blocks):
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(m, rank, dtype=DTYPE)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(rank, n, dtype=DTYPE)
    output.mkdir()
    file = output / "adapter_model.safetensors"
    timed("writing", lambda: save_file(tensors, file, {"format": "pt"}))
    return parts


def child(options: argparse.Namespace) -> None:
    """Run one case and print what it took as JSON."""
    from manifold_merge.merge import merge_adapters

    torch.set_num_threads(options.threads)
    for function in (torch.linalg.svd, torch.linalg.eigh, torch.linalg.cholesky):
        function(torch.eye(8))  # load the libraries
    root, output = options.scratch / "adapters", options.scratch / "merged"
    result: dict[str, Any] = {"load_average": harness.load()}
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # forget the peak so far
    before = memory("VmRSS")
    if options.child in CASES:
        folders = sorted(root.glob("task*"))
        merged, elapsed = harness.once(
            lambda: merge_adapters(folders, output, **CASES[options.child])
        )
        result |= elapsed | {"modules": merged.modules_merged, "geometry": merged.recipe}
    else:
        parts = floor(root, output, options.layers, options.rank, FLOORS[options.child])
        wall, cpu = (sum(part[clock] for part in parts.values()) for clock in ("wall", "cpu"))
        result |= {"wall": wall, "cpu": cpu, "parts": parts}
    result |= {"peak": memory("VmHWM") - before, "before": before}
    result["written"] = (output / "adapter_model.safetensors").stat().st_size
    print(json.dumps(result))


# --- the whole -----------------------------------------------------------------------------------


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Make the adapters and run every case, each repeat in turn."""
    blocks = options.layers
    result: dict[str, Any] = {
        "command": harness.command(),
        "environment": harness.environment(),
        "load_average": {"before": harness.load()},
        "blocks": blocks,
        "modules": sum(1 for _ in module_shapes(blocks)),
        "threads": options.threads,
        "repeats": options.repeats,
        "read": stored_bytes(blocks, RANK) * ADAPTERS,
        "largest_group": largest_group(blocks),
        "runs": [],
    }
    make_adapters(scratch / "adapters", blocks)
    for _ in range(options.repeats):
        for case, rank in OUTPUT_RANKS.items():
            if options.cases and case not in options.cases:
                continue
            for which in (*FLOORS, case):
                arguments = [
                    *(sys.executable, __file__, "--child", which, "--rank", str(rank)),
                    *("--scratch", str(scratch), "--layers", str(blocks)),
                    *("--threads", str(options.threads)),
                ]
                done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"{which!r} failed; its error is above")
                measured = json.loads(done.stdout.splitlines()[-1])
                result["runs"].append({"case": case, "which": which, **measured})
                shutil.rmtree(scratch / "merged")
    result["load_average"]["after"] = harness.load()
    return result


def render(result: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    runs = result["runs"]

    def median(case: str, which: str, key: str = "wall") -> float:
        values = [r[key] for r in runs if r["case"] == case and r["which"] == which]
        return float(statistics.median(values))

    cases = list(dict.fromkeys(r["case"] for r in runs))
    times, memories = [], []
    for case in cases:
        row = [case]
        for clock in ("wall", "cpu"):
            taken = median(case, case, clock)
            row.append(harness.seconds(taken))
            for name in FLOORS:
                least = median(case, name, clock)
                row.append(f"{harness.seconds(least)} ({taken / least:.1f} x)")
        times.append(row)
        peak = max(r["peak"] for r in runs if r["case"] == r["which"] == case)
        written = int(median(case, case, "written"))
        allowed = 2 * result["largest_group"] + written
        memories.append([case, *map(harness.mebibytes, (peak, written, allowed))])
    shares = []
    for name in FLOORS:
        parts = [r["parts"] for r in runs if r["which"] == name]
        seconds = {key: statistics.median(p[key]["cpu"] for p in parts) for key in parts[0]}
        told = ", ".join(f"{key} {harness.seconds(value)}" for key, value in seconds.items())
        shares.append(f"{name}: {told}")
    header = [f"{clock} time" for clock in ("wall", "CPU")]
    header = [y for x in header for y in (x, *(f"floor, {name}" for name in FLOORS))]
    return "\n\n".join(
        [
            f"{result['modules']} modules ({result['blocks']} blocks of a 7B model), "
            f"{ADAPTERS} adapters of rank {RANK} in bfloat16, {harness.mebibytes(result['read'])} "
            f"read from disk, {result['threads']} thread(s), median of {result['repeats']} "
            "repeats, each in a process of its own. Floor: reading, Gram products in the given "
            "type and writing the same bytes (and how many times the floor the merge takes).",
            harness.table(["merge", *header], times),
            f"CPU time of the floor's parts, medians over all cases, in {'; in '.join(shares)}.",
            "Peak memory above that of the started process, against twice the largest group of "
            f"modules of one shape ({harness.mebibytes(result['largest_group'])} stored) plus the "
            "output:",
            harness.table(["merge", "peak", "output", "2 x group + output"], memories),
            harness.footer(result),
        ]
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=BLOCKS, help="blocks of the model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="only these")
    parser.add_argument("--scratch", type=Path, help="where the temporary folder is made")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=RANK, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    needed = stored_bytes(options.layers, RANK) * ADAPTERS * 3
    free = shutil.disk_usage(options.scratch or tempfile.gettempdir()).free
    if free < needed:
        raise SystemExit(
            f"{harness.mebibytes(needed)} of disk are needed, {harness.mebibytes(free)} are free: "
            "give another --scratch folder or fewer --layers"
        )
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        result = run(options, Path(scratch))
    harness.finish("merge_llm", result, render, options.output)


if __name__ == "__main__":
    main()
