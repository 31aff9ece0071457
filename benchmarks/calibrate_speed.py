"""What calibration costs beside the forward passes that it needs, and merging what it made.

    python benchmarks/calibrate_speed.py --bench BENCH

One adapter of the benchmark is calibrated on 128 of its training texts, tokenised beforehand, in
turn with plain forward passes over the same batches: through PEFT's model with the adapter loaded,
and through this library's; K-FAC needs backward passes too. Then four calibrated adapters are
merged from disk to disk.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import harness
import torch
from bench_data import Bench
from peft import PeftModel

from manifold_merge import merge_adapters
from manifold_merge.adapted_model import AdaptedModel, Updates
from manifold_merge.calibrate import DEFAULT_RANK, DEFAULT_TEXTS, calibrate_adapter
from manifold_merge.examples import as_examples, collate
from manifold_merge.functional import by_length

BATCH = 32  # calibrate_adapter's own
PEFT, OURS = "forward passes, PEFT's model", "forward passes, this library's"
BACK = "one forward and two backward passes, this library's"
CALIBRATIONS: dict[str, dict[str, Any]] = {
    f"calibrate, Grams of rank {DEFAULT_RANK} (default)": {},
    "calibrate, exact Grams": {"rank": None},
    "calibrate, K-FAC": {"kind": "kfac"},
}


def tokens(bench: Bench, task: str) -> list[list[int]]:
    """Token ids of the texts that are drawn."""
    _, tokenizer = bench.loader.load_base()
    texts = bench.loader.load_split(task, "train")[0]
    chosen = random.Random(0).sample(list(texts), DEFAULT_TEXTS)
    ids: list[list[int]] = tokenizer(chosen, truncation=True, max_length=bench.loader.MAX_LEN)[
        "input_ids"
    ]
    return ids


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Time both parts."""
    torch.set_num_threads(options.threads)
    bench = Bench(options.bench)
    result: dict[str, Any] = {
        "command": harness.command(),
        "environment": harness.environment(),
        "threads": options.threads,
        "load_average": {"before": harness.load()},
    }
    folders = bench.adapters("rank 16")
    task, folder = bench.tasks[0], folders[0]
    data = tokens(bench, task)
    device = torch.device("cpu")
    batches = [collate(x, device) for x in by_length(as_examples(data, None), BATCH)]
    plain = bench.base().eval()
    peft = PeftModel.from_pretrained(bench.base(), str(folder)).eval()
    updates = Updates.read(folder)

    @torch.no_grad()
    def through_peft() -> None:
        for batch in batches:
            assert batch.mask is not None
            peft(input_ids=batch.inputs, attention_mask=batch.mask.long())

    @torch.no_grad()
    def through_ours() -> None:
        with AdaptedModel(plain, [updates]) as adapted:
            for batch in batches:
                adapted(batch, updates)

    def there_and_back() -> None:
        # Gradients of features by the outputs of the adapted layers, and nothing done with them.
        outputs: list[torch.Tensor] = []

        def keep(module: object, args: object, result: torch.Tensor) -> torch.Tensor:
            kept = result if result.requires_grad else result.detach().requires_grad_()
            outputs.append(kept)
            return kept

        with AdaptedModel(plain, [updates]) as adapted:
            handles = [module.register_forward_hook(keep) for module in adapted.modules.values()]
            for batch in batches:
                outputs.clear()
                hidden = adapted(batch, updates)
                direction = torch.randn_like(hidden)
                for left in (2, 1):
                    torch.autograd.grad((hidden * direction).sum(), outputs, retain_graph=left > 1)
            for handle in handles:
                handle.remove()

    functions: dict[str, Callable[[], object]] = {
        PEFT: through_peft,
        OURS: through_ours,
        BACK: there_and_back,
    }
    for name, given in CALIBRATIONS.items():
        functions[name] = lambda given=given: calibrate_adapter(folder, plain, data, **given)  # type: ignore[misc]
    result["calibration"] = harness.measure(functions, options.repeats)
    result["texts"], result["tokens"] = len(data), sum(map(len, data))

    with tempfile.TemporaryDirectory() as scratch:
        files: dict[str, list[Path]] = {"input_gram": [], "kfac": []}
        for kind, made in files.items():
            for name, adapter in zip(bench.tasks, folders, strict=True):
                made.append(Path(scratch) / f"{name}-{kind}.safetensors")
                calibrate_adapter(adapter, plain, tokens(bench, name), made[-1], kind=kind)  # type: ignore[arg-type]
        result["statistics_bytes"] = files["input_gram"][0].stat().st_size
        result["kfac_bytes"] = files["kfac"][0].stat().st_size
        result["adapter_bytes"] = (folder / "adapter_model.safetensors").stat().st_size

        def merge(kind: str, rank: int | str) -> None:
            merge_adapters(
                folders, Path(scratch) / "out", statistics=files[kind], rank=rank, overwrite=True
            )

        cases: list[tuple[str, int | str]] = [
            (kind, rank) for kind in files for rank in ("full", 16, "auto")
        ]
        result["merges"] = harness.measure(
            {
                f"{kind}, rank {rank}": lambda kind=kind, rank=rank: merge(kind, rank)  # type: ignore[misc]
                for kind, rank in cases
            },
            options.repeats,
        )
    result["load_average"]["after"] = harness.load()
    return result


def render(result: Mapping[str, Any]) -> str:
    """Both tables in Markdown."""
    timed = result["calibration"]
    base = {kind: timed[PEFT][kind]["median"] for kind in ("wall", "cpu")}
    lines = [
        [
            name,
            harness.spread(row["wall"]),
            f"{row['wall']['median'] / base['wall']:.2f} x",
            harness.spread(row["cpu"]),
            f"{row['cpu']['median'] / base['cpu']:.2f} x",
        ]
        for name, row in timed.items()
    ]
    header = ["one adapter", "wall time", "of PEFT's passes", "CPU time", "of PEFT's passes"]
    share = result["statistics_bytes"] / result["adapter_bytes"]
    text = (
        f"{result['texts']} texts of {result['tokens']:,} tokens, {result['threads']} thread(s). "
        f"The statistics of one adapter have {result['statistics_bytes'] / 1e6:.1f} MB, "
        f"{share:.1f} times the adapter; with K-FAC {result['kfac_bytes'] / 1e6:.1f} MB."
    )
    merges = [
        [name, harness.spread(row["wall"]), harness.spread(row["cpu"])]
        for name, row in result["merges"].items()
    ]
    return "\n\n".join(
        [
            text,
            harness.table(header, lines),
            harness.table(["four calibrated adapters, disk to disk", "wall", "CPU"], merges),
            harness.footer(result),
        ]
    )


if __name__ == "__main__":
    harness.main_on_bench(
        "calibrate_speed", __doc__, run, render, threads=2, repeats={"default": 3}
    )
