"""What the benchmarks share: timing side by side, the machine's state, tables and results."""

from __future__ import annotations

import os

# Spinning threads on a busy machine cost more than they bring; set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import manifold_merge

RESULTS = Path(__file__).resolve().parent / "results"


@dataclasses.dataclass
class Timing:
    """Wall and CPU seconds of one function, a pair for each repeat."""

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Medians and extremes beside all measurements."""
        row: dict[str, Any] = {}
        for name, values in (("wall", self.wall), ("cpu", self.cpu)):
            row[name] = {
                "median": statistics.median(values),
                "least": min(values),
                "greatest": max(values),
                "all": values,
            }
        return row


def measure(
    functions: Mapping[str, Callable[[], object]],
    repeats: int | Mapping[str, int],
) -> dict[str, dict[str, Any]]:
    """Time functions in turn, so that a change of the machine's load meets all of them.

    Args:
        functions: What to call, by name.
        repeats: How often, for all or by name. Those called more often than the rarest are called
            once before, unmeasured.

    Returns:
        For each name, medians, extremes and all measurements of wall and CPU seconds.
    """
    counts = dict.fromkeys(functions, repeats) if isinstance(repeats, int) else dict(repeats)
    timings = {name: Timing() for name in functions}
    rounds = min(counts.values())
    for name, function in functions.items():
        if counts[name] > rounds:
            function()
    for turn in range(rounds):
        for name, function in functions.items():
            for _ in range(counts[name] // rounds + (turn < counts[name] % rounds)):
                cpu, wall = time.process_time(), time.perf_counter()
                function()
                timings[name].wall.append(time.perf_counter() - wall)
                timings[name].cpu.append(time.process_time() - cpu)
    return {name: timing.as_json() for name, timing in timings.items()}


def once(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Call a function; returns its result and its wall and CPU seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    elapsed = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return result, elapsed


def load() -> float:
    """How many processes want a core, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def environment() -> dict[str, Any]:
    """Versions and processor, without anything that identifies the machine."""
    packages = ("manifold-merge", "torch", "geoopt", "peft", "transformers", "safetensors")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["manifold-merge"] = manifold_merge.__version__
    sources = sorted(Path(manifold_merge.__file__).parent.glob("*.py"))
    return {
        "source": hashlib.sha256(b"".join(x.read_bytes() for x in sources)).hexdigest()[:16],
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "wait_policy": os.environ["OMP_WAIT_POLICY"],
        "packages": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "?")


def quiet() -> None:
    """Silence the libraries' remarks on valid use, which would drown the tables."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    warnings.filterwarnings("ignore", "Could not find a config file in")


# --- output --------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    widths = [max(len(x) for x in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [x.rjust(w) for x, w in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *padded])} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def seconds(value: float) -> str:
    """Three significant digits, with the unit."""
    if value < 0.9995:
        return f"{1e3 * value:#.3g}".rstrip(".") + " ms"
    return f"{value:#.3g}".rstrip(".") + " s"


def spread(measured: Mapping[str, Any]) -> str:
    """Median, and least to greatest in parentheses."""
    low, high = seconds(measured["least"]), seconds(measured["greatest"])
    if low.split()[1] == high.split()[1]:
        low = low.split()[0]
    return f"{seconds(measured['median'])} ({low} to {high})"


def mebibytes(count: float) -> str:
    """A count of bytes in MiB."""
    return f"{count / 2**20:,.0f} MiB"


def footer(result: Mapping[str, Any]) -> str:
    """One line on the machine and its load during the run."""
    packages = result["environment"]["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "peft"))
    processor = " ".join(result["environment"]["processor"].split())
    loads = result["load_average"]
    return (
        f"{result['environment']['cores']} cores ({processor}), load average "
        f"{loads['before']} before and {loads['after']} after; {versions}; "
        f"`{result['command']}`"
    )


def command() -> str:
    """The command of this run, with paths outside the repository shortened."""
    policy = os.environ["OMP_WAIT_POLICY"]
    words = [f"benchmarks/{Path(sys.argv[0]).name}"]
    for word in sys.argv[1:]:
        words.append(Path(word).name if os.sep in word else word)
    return " ".join(
        [*([] if policy == "PASSIVE" else [f"OMP_WAIT_POLICY={policy}"]), "python", *words]
    )


def finish(
    name: str, result: dict[str, Any], render: Callable[[Mapping[str, Any]], str], output: Path
) -> None:
    """Write the result as ``NAME.json`` into ``output`` and print its tables."""
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    (output / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(render(result))


def main_on_bench(
    name: str,
    description: str,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    render: Callable[[Mapping[str, Any]], str],
    *,
    threads: int = 1,
    **options: Mapping[str, Any],
) -> None:
    """The command line of a benchmark that needs the folder of the multi-task benchmark.

    Args:
        name: Of the file of results.
        description: The script's docstring.
        run: From the parsed options to what is written.
        render: From that to Markdown.
        threads: Default of ``--threads``.
        options: Further options of whole numbers, with the arguments of ``add_argument``.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--bench", type=Path, required=True, help="folder of the benchmark")
    for option, given in options.items():
        parser.add_argument(f"--{option}", type=int, **given)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    quiet()
    finish(name, run(parsed), render, parsed.output)
