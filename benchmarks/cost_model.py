"""Predict the time and memory of a merge from sizes and the machine's rates, and check it.

    python benchmarks/cost_model.py

The formulas are those of docs/costs.md. The rates (checking, reading, Gram products, the core of
one module, multiplying out, writing, and what any merge costs at least) are measured first, on
tensors of one shape. Then adapters of several sizes with random entries are merged, each in a
process of its own, and the time and the peak of memory are compared with the prediction. One
thread; CPU seconds, which on a machine that does nothing else are the wall seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import harness
import torch
from merge_llm import memory
from torch import Tensor

from manifold_merge.adapters import RELEASE_EVERY
from manifold_merge.merge_extras import CLOSENESS_SAMPLE
from manifold_merge.merge_plan import DEFAULT_BUDGET

DTYPE = torch.bfloat16
MERGES: dict[str, dict[str, Any]] = {
    "chordal": {"geometry": "embedded", "distance": "chordal"},
    "lifted": {"geometry": "lifted"},
}


@dataclasses.dataclass(frozen=True)
class Size:
    """A language model's linear layers, and the adapters on all of them."""

    name: str
    blocks: int
    hidden: int
    intermediate: int
    keys: int  # rows of the key and value projections
    adapters: int
    rank: int
    output_rank: int

    @property
    def stacked(self) -> int:
        """K, the sum of the ranks."""
        return self.adapters * self.rank

    def shapes(self) -> Iterator[tuple[str, int, int]]:
        """Name, rows and columns of every module."""
        h, f, kv = self.hidden, self.intermediate, self.keys
        layers = {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (f, h),
            "mlp.up_proj": (f, h),
            "mlp.down_proj": (h, f),
        }
        for block in range(self.blocks):
            for name, (rows, columns) in layers.items():
                yield f"model.layers.{block}.{name}", rows, columns

    def modules(self) -> int:
        """L."""
        return 7 * self.blocks


SIZES = (
    Size("small", 2, 1024, 2816, 1024, 4, 8, 8),
    Size("medium", 4, 2048, 5632, 2048, 8, 16, 16),
    Size("8 blocks of 7B", 8, 4096, 11008, 4096, 8, 16, 16),
    Size("1 block of 7B, 32 adapters", 1, 4096, 11008, 4096, 32, 16, 16),
)
# Nothing but what each merge does once: folders, headers, configuration, first calls.
TINY = Size("tiny", 1, 16, 16, 16, 4, 1, 1)
# Llama 3.1 405B: 126 layers, hidden 16384, intermediate 53248, 8 key and value heads of 128.
TARGET = Size("405B, 64 adapters", 126, 16384, 53248, 1024, 64, 16, 16)


# --- the model -----------------------------------------------------------------------------------


def cost(size: Size) -> dict[str, int]:
    """Bytes and flops of a merge; see the table in docs/costs.md."""
    width = sum(m + n for _, m, n in size.shapes())
    stacked, bytes_each = size.stacked, DTYPE.itemsize
    return {
        "read": bytes_each * stacked * width,
        "written": bytes_each * size.output_rank * width,
        "gram": 2 * stacked**2 * width,
        "expand": 2 * stacked * size.output_rank * width,
    }


def times(size: Size, rates: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each part of a merge.

    Args:
        size: What is merged.
        rates: Bytes per second ``check``, ``read`` and ``write``, flops per second ``gram`` and
            ``expand``, seconds of the core of one module, ``core``, and of any merge, ``start``.
    """
    work = cost(size)
    # Some modules are read and multiplied once before, to choose a geometry.
    twice = 1 + min(CLOSENESS_SAMPLE, size.modules()) / size.modules()
    return {
        "start": rates["start"],
        "check": work["read"] / rates["check"],
        "read": twice * work["read"] / rates["read"],
        "Gram products": twice * work["gram"] / rates["gram"],
        "core": size.modules() * rates["core"],
        "multiply out": work["expand"] / rates["expand"],
        "write": work["written"] / rates["write"],
    }


def peak_memory(size: Size, core_bytes: float = 0, start_bytes: float = 0) -> int:
    """Bytes above those of the started process, mapped files included.

    Args:
        size: What is merged.
        core_bytes: What the core of one module takes.
        start_bytes: What any merge takes.
    """
    stacked, bytes_each = size.stacked, DTYPE.itemsize
    # The files are checked one by one, and let go of on the way.
    checked = min(cost(size)["read"] // size.adapters, RELEASE_EVERY)
    groups: dict[tuple[int, int], int] = {}
    for _, m, n in size.shapes():
        groups[m, n] = groups.get((m, n), 0) + 1
    worst = checked
    for (m, n), count in groups.items():
        each = 24 * (m + n) * stacked + 64 * stacked**2
        chunk = min(count, max(1, DEFAULT_BUDGET // each))
        # The factors as stored and in float32, the result in float32 and as written.
        factors = (m + n) * (stacked * (bytes_each + 4) + size.output_rank * (4 + bytes_each))
        buffer = 8 * max(m, n) * stacked  # one module's factors in float64
        # The buffer is given back before the core begins.
        worst = max(worst, int(chunk * factors + max(chunk * core_bytes, buffer)))
    return worst + int(start_bytes)


# --- the machine ---------------------------------------------------------------------------------


def seconds_of(function: Callable[[], object], least: float = 0.3) -> float:
    """CPU seconds of one call: the median of three or more that take long enough together."""
    function()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < least:
        taken.append(harness.once(function)[1]["cpu"])
        if taken[-1] > 2:
            break
    return statistics.median(taken)


def bandwidths(scratch: Path) -> dict[str, float]:
    """Bytes per second of checking, of reading into float32, and of writing."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from manifold_merge.linalg import all_finite
    from manifold_merge.tensor_file import TensorFileWriter

    rows, rank, count = 8192, 16, 64
    file = scratch / "rates.safetensors"
    made = {f"{i}": torch.randn(rows, rank).to(DTYPE) for i in range(count)}
    save_file(made, file)
    size = count * rows * rank * DTYPE.itemsize
    place = torch.empty(count, rows, rank)

    def check() -> None:
        with safe_open(file, framework="pt") as handle:
            for name in made:
                assert all_finite(handle.get_tensor(name))

    def read() -> None:
        with safe_open(file, framework="pt") as handle:
            for name, out in zip(made, place, strict=True):
                tensor = handle.get_tensor(name)
                assert all_finite(tensor)
                out.copy_(tensor)

    def write() -> None:
        with TensorFileWriter(scratch / "written.safetensors", made) as writer:
            for name, tensor in zip(made, place, strict=True):
                writer.write(name, tensor.to(DTYPE))

    return {name: size / seconds_of(f) for name, f in
            (("check", check), ("read", read), ("write", write))}  # fmt: skip


def arithmetic(merge: str, adapters: int, rank: int, output_rank: int) -> dict[str, float]:
    """Flops per second of products, and seconds and bytes of the core of one module, for one K."""
    from manifold_merge import LoRAQuotient
    from manifold_merge.core import ColumnSpan, stacked_gram
    from manifold_merge.frechet import frechet_mean
    from manifold_merge.lift import lifted_mean

    stacked = adapters * rank
    # Modules hardly larger than K x K: all of their merge is core, but for products whose flops
    # are known.
    side = stacked + 16
    manifold = LoRAQuotient(side, side, "embedded", "chordal")
    batch = max(1, min(8, 2**19 // stacked**2))
    points = [torch.randn(batch, 2 * side, rank) for _ in range(adapters)]

    def mean() -> Tensor:
        if merge == "lifted":
            return lifted_mean(manifold, points, rank=output_rank).point
        return frechet_mean(manifold, points, rank=output_rank).point

    peak = peak_of(mean)
    whole = seconds_of(mean) / batch
    rows = max(4096, 4 * stacked)
    tall = [torch.randn(1, rows, rank) for _ in range(adapters)]
    gram = 2 * stacked**2 * rows / seconds_of(lambda: stacked_gram(tall, torch.float64))
    span = ColumnSpan(tall)
    coordinates = torch.randn(1, span.dimension, output_rank, dtype=torch.float64)
    flops = 2 * stacked * output_rank * rows
    expand = flops / seconds_of(lambda: span.expand(coordinates))
    products = 2 * side * 2 * stacked * (stacked / gram + output_rank / expand)
    return {"gram": gram, "expand": expand, "core": max(whole - products, 0.0),
            "core_bytes": peak / batch}  # fmt: skip


def peak_of(function: Callable[[], object]) -> int:
    """Bytes that a first call takes above what the process has."""
    for load in (torch.linalg.svd, torch.linalg.eigh, torch.linalg.cholesky, torch.linalg.qr):
        load(torch.eye(8))
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # forget the peak so far
    before = memory("VmRSS")
    function()
    return memory("VmHWM") - before


# --- what is measured ----------------------------------------------------------------------------


def make_adapters(root: Path, size: Size) -> None:
    """Write adapters with random entries as PEFT lays them out."""
    from safetensors.torch import save_file

    for number in range(size.adapters):
        folder = root / f"task{number:03d}"
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, m, n in size.shapes():
            for factor, shape in (("lora_B", (m, size.rank)), ("lora_A", (size.rank, n))):
                values = torch.randn(shape, generator=generator) / max(shape) ** 0.5
                tensors[f"base_model.model.{name}.{factor}.weight"] = values.to(DTYPE)
        targets = sorted({name.rpartition(".")[2] for name, _, _ in size.shapes()})
        config = {"peft_type": "LORA", "r": size.rank, "lora_alpha": size.rank,
                  "target_modules": targets, "base_model_name_or_path": "random"}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def child(options: argparse.Namespace) -> None:
    """One merge, or the rates of one K, in a process of its own; prints JSON."""
    from manifold_merge.merge import merge_adapters

    torch.set_num_threads(1)
    merge, adapters, rank, output_rank = options.child.split(",")
    if options.scratch is None:
        print(json.dumps(arithmetic(merge, int(adapters), int(rank), int(output_rank))))
        return
    folders = sorted((options.scratch / "adapters").glob("task*"))
    found: dict[str, float] = {}

    def merged() -> None:
        arguments = {"rank": int(output_rank), **MERGES[merge]}
        found.update(
            harness.once(lambda: merge_adapters(folders, options.scratch / "merged", **arguments))[
                1
            ]
        )

    found["peak"] = peak_of(merged)
    print(json.dumps(found))


def in_a_process(size: Size, merge: str, scratch: Path | None = None) -> dict[str, float]:
    """What :func:`child` prints."""
    what = f"{merge},{size.adapters},{size.rank},{size.output_rank}"
    words = [sys.executable, __file__, "--child", what]
    if scratch is not None:
        words += ["--scratch", str(scratch)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{merge} of {size.name} failed; its error is above")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(size: Size, scratch: Path, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Seconds and peak memory of merges, in turn."""
    make_adapters(scratch / "adapters", size)
    found: dict[str, list[dict[str, float]]] = {merge: [] for merge in MERGES}
    for _ in range(repeats):
        for merge in MERGES:
            found[merge].append(in_a_process(size, merge, scratch))
            shutil.rmtree(scratch / "merged")
    shutil.rmtree(scratch / "adapters")
    return found


def run(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measure the machine, then the merges."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "command": harness.command(),
        "environment": harness.environment(),
        "load_average": {"before": harness.load()},
        "repeats": options.repeats,
        "bandwidths": bandwidths(scratch),
        "arithmetic": {},
        "sizes": [],
    }
    once = measured(TINY, scratch, options.repeats)
    start = {key: statistics.median(r[key] for runs in once.values() for r in runs)
             for key in ("cpu", "peak")}  # fmt: skip
    result["start"] = start
    for size in (*SIZES, TARGET):
        row: dict[str, Any] = dataclasses.asdict(size) | {"modules": size.modules()}
        row |= {"cost": cost(size), "predicted": {}, "peak": {}}
        for merge in MERGES:
            key = f"{merge}, {size.adapters} x {size.rank}"
            if key not in result["arithmetic"]:
                result["arithmetic"][key] = in_a_process(size, merge)
            rates = result["bandwidths"] | result["arithmetic"][key] | {"start": start["cpu"]}
            row["predicted"][merge] = times(size, rates)
            row["peak"][merge] = peak_memory(size, rates["core_bytes"], start["peak"])
        if size is not TARGET:
            row["measured"] = measured(size, scratch, options.repeats)
        result["sizes"].append(row)
    result["load_average"]["after"] = harness.load()
    return result


def gigabytes(count: float) -> str:
    """A count of bytes in MB or GB."""
    return f"{count / 1e9:,.3g} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def duration(value: float) -> str:
    """Seconds, or minutes if they are many."""
    return harness.seconds(value) if value < 120 else f"{value / 60:,.0f} min"


def render(result: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    rows, parts = [], []
    for size in result["sizes"]:
        for merge, predicted in size["predicted"].items():
            total, expected = sum(predicted.values()), size["peak"][merge]
            row = [f"{size['name']}, {merge}", str(size["modules"]),
                   str(size["adapters"] * size["rank"]), gigabytes(size["cost"]["read"]),
                   f"{size['cost']['gram']:.2g}", duration(total)]  # fmt: skip
            if "measured" in size:
                runs = size["measured"][merge]
                taken = statistics.median(r["cpu"] for r in runs)
                peak = max(r["peak"] for r in runs)
                row += [f"{harness.seconds(taken)} ({taken / total:.2f} x)", gigabytes(expected),
                        f"{gigabytes(peak)} ({peak / expected:.2f} x)"]  # fmt: skip
            else:
                row += ["", gigabytes(expected), ""]
            rows.append(row)
            told = [f"{100 * value / total:.0f} %" for value in predicted.values()]
            parts.append([row[0], *told])
    rates = ", ".join(f"{k} {v / 1e9:.2g} GB/s" for k, v in result["bandwidths"].items())
    arithmetic = []
    for name, rate in result["arithmetic"].items():
        arithmetic.append(
            [
                name,
                *(f"{rate[k] / 1e9:.3g} Gflop/s" for k in ("gram", "expand")),
                harness.seconds(rate["core"]),
                gigabytes(rate["core_bytes"]),
            ]
        )
    header = ["merge", "modules", "K", "read", "Gram flops", "predicted", "measured",
              "memory, predicted", "measured"]  # fmt: skip
    names = next(iter(result["sizes"][0]["predicted"].values()))
    return "\n\n".join(
        [
            "Adapters in bfloat16, merged to rank 16 (small: 8), one thread, CPU seconds, median "
            f"of {result['repeats']} repeats, each in a process of its own (and how many times the "
            "prediction). The last two rows are a prediction only.",
            harness.table(header, rows),
            "Of which, as predicted:",
            harness.table(["merge", *names], parts),
            f"Rates of this machine: {rates}, {harness.seconds(result['start']['cpu'])} and "
            f"{gigabytes(result['start']['peak'])} for a merge of nearly nothing; and for each K:",
            harness.table(
                ["adapters x rank", "Gram products", "multiply out", "core", "core, memory"],
                arithmetic,
            ),
            harness.footer(result),
        ]
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where the temporary folder is made")
    parser.add_argument("--output", type=Path, default=harness.RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        result = run(options, Path(scratch))
    harness.finish("cost_model", result, render, options.output)


if __name__ == "__main__":
    main()
