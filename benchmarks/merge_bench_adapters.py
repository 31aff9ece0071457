"""Merge the benchmark's real adapters, all modules: ours against PEFT's ``svd``, in one run.

    python benchmarks/merge_bench_adapters.py --bench ../shared/bench

Four tasks, 36 modules of a real encoder. PEFT needs the base model and the adapters in memory;
``merging alone`` is ``add_weighted_adapter`` and nothing else, ``folders to folder`` adds loading
the base model and the adapters and saving the result. Ours always goes from folders to a folder.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from bench_data import SETS, Bench
from peft import PeftModel
from torch import Tensor

from manifold_merge.adapters import Adapter
from manifold_merge.merge import merge_adapters

CHORDAL = {"geometry": "embedded", "distance": "chordal"}
ALONE, WHOLE, THIN = (
    "PEFT svd, merging alone",
    "PEFT svd, folders to folder",
    "PEFT svd without full matrices, merging alone",
)


def peft_model(bench: Bench, folders: Sequence[Path]) -> tuple[PeftModel, list[str]]:
    """The base model with the adapters loaded."""
    names = [folder.name for folder in folders]
    model = PeftModel.from_pretrained(bench.base(), str(folders[0]), names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), name)
    return model, names


def peft_merge(model: PeftModel, names: Sequence[str], **options: Any) -> None:
    """Merge with equal weights, as PEFT's documentation says."""
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    weights = [1 / len(names)] * len(names)
    model.add_weighted_adapter(names, weights, "merged", combination_type="svd", **options)


def peft_whole(bench: Bench, folders: Sequence[Path], output: Path) -> None:
    """From folders to a folder."""
    model, names = peft_model(bench, folders)
    peft_merge(model, names)
    model.save_pretrained(str(output), selected_adapters=["merged"])


def differences(model: PeftModel, folders: Sequence[Path], rank: int) -> dict[str, float]:
    """Greatest relative differences per module, with the dense decomposition in float64."""
    ours = merge_adapters(folders, rank=rank, **CHORDAL).modules
    adapters = [Adapter(folder) for folder in folders]
    layers = dict(model.base_model.model.named_modules())
    found: dict[str, list[float]] = {"ours from PEFT": [], "PEFT": [], "ours": []}
    for name, (b, a) in ours.items():
        mine = b.double() @ a.double()
        theirs: Tensor = layers[name].get_delta_weight("merged").double()
        mean = sum(x.delta_weight(name, torch.float64) for x in adapters) / len(adapters)
        u, s, vh = torch.linalg.svd(mean, full_matrices=False)
        exact = (u[:, :rank] * s[:rank]) @ vh[:rank]
        pairs = ((mine, theirs), (theirs, exact), (mine, exact))
        for values, (x, y) in zip(found.values(), pairs, strict=True):
            values.append(float((x - y).norm() / y.norm()))
    return {"modules": len(ours), **{key: max(values) for key, values in found.items()}}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both sets of adapters."""
    torch.set_num_threads(options.threads)
    bench = Bench(options.bench)
    result: dict[str, Any] = {
        "command": harness.command(),
        "environment": harness.environment(),
        "load_average": {"before": harness.load()},
        "threads": options.threads,
        "repeats": options.repeats,
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for which in SETS:
            folders = bench.adapters(which)
            result["runs"].append({"set": which, **one_set(bench, folders, options, Path(scratch))})
    result["load_average"]["after"] = harness.load()
    return result


@torch.no_grad()
def one_set(
    bench: Bench, folders: Sequence[Path], options: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """Measure one set of adapters."""
    model, names = peft_model(bench, folders)
    ranks = [max(m.rank for m in Adapter(folder).modules.values()) for folder in folders]
    output = scratch / "merged"

    def ours(**arguments: Any) -> Callable[[], object]:
        return lambda: merge_adapters(folders, output, overwrite=True, **arguments)

    slow: dict[str, Callable[[], object]] = {
        ALONE: lambda: peft_merge(model, names),
        THIN: lambda: peft_merge(model, names, svd_full_matrices=False),
        WHOLE: lambda: peft_whole(bench, folders, scratch / "peft"),
    }
    fast = {
        f"ours, chordal, rank {max(ranks)}, folders to folder": ours(**CHORDAL),
        "ours, auto, full rank, folders to folder": ours(),
        f"ours, auto, rank {max(ranks)}, folders to folder": ours(rank=max(ranks)),
    }
    counts = dict.fromkeys(slow, options.repeats) | dict.fromkeys(fast, 3 * options.repeats)
    timings = harness.measure({**slow, **fast}, counts)
    geometry = merge_adapters(folders).recipe["geometry"]
    shutil.rmtree(output)
    return {
        "tasks": [folder.name for folder in folders],
        "ranks": ranks,
        "geometry": geometry,
        "difference": differences(model, folders, max(ranks)),
        "timings": timings,
    }


def render(result: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    blocks = [
        f"{result['threads']} thread(s); median of {result['repeats']} repeats of PEFT and "
        f"{3 * result['repeats']} of ours (least to greatest), in turn in one process. Ratio: "
        f"median of *{ALONE}* over this one."
    ]
    for entry in result["runs"]:
        peer = entry["timings"][ALONE]
        rows = [
            [
                name,
                harness.spread(timing["wall"]),
                f"{peer['wall']['median'] / timing['wall']['median']:.1f} x",
                harness.spread(timing["cpu"]),
                f"{peer['cpu']['median'] / timing['cpu']['median']:.1f} x",
            ]
            for name, timing in entry["timings"].items()
        ]
        difference = entry["difference"]
        blocks.append(
            f"**{entry['set']}**: {difference['modules']} modules, ranks "
            f"{', '.join(map(str, entry['ranks']))}; auto chose {entry['geometry']}; our chordal "
            f"updates differ from PEFT's by at most {difference['ours from PEFT']:.0e} relative; "
            f"from a dense decomposition in float64, PEFT's differ by {difference['PEFT']:.0e} and "
            f"ours by {difference['ours']:.0e}"
        )
        blocks.append(harness.table(["merge", "wall time", "ratio", "CPU time", "CPU ratio"], rows))
    blocks.append(harness.footer(result))
    return "\n\n".join(blocks)


if __name__ == "__main__":
    harness.main_on_bench(
        "merge_bench_adapters",
        __doc__,
        run,
        render,
        repeats={"default": 3, "help": "of PEFT's merge"},
    )
