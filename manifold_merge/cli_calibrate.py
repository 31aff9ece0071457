"""The command ``manifold-merge calibrate``."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from manifold_merge.cli_options import (
    Debug,
    Device,
    Json,
    Quiet,
)
from manifold_merge.cli_session import session

__all__ = ["calibrate"]


class Kind(StrEnum):
    """Names of the statistics of ``calibrate_adapter``."""

    input_gram = "input_gram"
    kfac = "kfac"


class Likelihood(StrEnum):
    """Names of the likelihoods of ``calibrate_adapter``."""

    gaussian = "gaussian"
    categorical = "categorical"


def calibrate(
    adapter: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Adapter folder in PEFT's format.", show_default=False),
    ],
    base_model: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="Folder of the base model, or its name.", show_default=False
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Unlabelled texts of the adapter's task: .jsonl with a key for the text, or one "
            "text a line.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write. Default: merge_statistics.safetensors in DIR.",
        ),
    ] = None,
    key: Annotated[str, typer.Option(help="Key of the text in each JSON object.")] = "text",
    texts: Annotated[
        int, typer.Option(min=1, help="How many texts to use, drawn at random.")
    ] = 128,
    rank: Annotated[
        str,
        typer.Option(
            metavar="R|full",
            help="Rank at which wide Grams are stored; full stores them exactly.",
        ),
    ] = "128",
    kind: Annotated[
        Kind,
        typer.Option(help="kfac adds Grams of output gradients, by backward passes."),
    ] = Kind.input_gram,
    draws: Annotated[int, typer.Option(min=1, help="For kfac: backward passes of each batch.")] = 2,
    likelihood: Annotated[
        Likelihood,
        typer.Option(help="For kfac: what differentiates, the last hidden state or the logits."),
    ] = Likelihood.gaussian,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longer texts are cut.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in one batch.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the drawn texts and labels.")] = 0,
    device: Device = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing statistics.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure an adapter on a few unlabelled texts, so that it merges better.

    Writes merge_statistics.safetensors beside the adapter: averages of what its layers see. With
    such a file beside each adapter, `manifold-merge adapters` needs neither texts nor the base
    model. The file holds no texts, but it is no anonymisation either: averages over few texts, and
    word frequencies where embeddings are adapted, can tell what they were about. Publish
    statistics only of texts that you could publish.
    """
    with session(as_json=as_json, quiet=quiet, debug=debug) as shell:
        stored = None if rank == "full" else _number("--rank", rank)
        from manifold_merge.cli_options import parse_device
        from manifold_merge.statistics import STATISTICS_NAME

        target = adapter / STATISTICS_NAME if output is None else output
        if output is not None and output.is_dir():
            target = output / STATISTICS_NAME
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} exists; pass --overwrite to replace it")
        if not target.parent.is_dir() and output is not None:
            raise FileNotFoundError(f"folder {target.parent} does not exist; make it first")
        from manifold_merge.adapters import Adapter
        from manifold_merge.base_model import load_base_model
        from manifold_merge.calibrate import calibrate_adapter
        from manifold_merge.examples import read_texts

        opened = Adapter(adapter)
        lines = read_texts(data, key=key)
        model, tokenizer = load_base_model(base_model, [opened], device=parse_device(device))
        start = time.perf_counter()
        with shell.progress("calibrating", "batches") as progress:
            statistics = calibrate_adapter(
                opened,
                model,
                lines,
                target,
                tokenizer=tokenizer,
                kind=kind.value,
                likelihood=likelihood.value,
                rank=stored,
                draws=draws,
                limit=texts,
                max_tokens=max_tokens,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
            )
        result: dict[str, Any] = {
            "output": str(target),
            "kind": statistics.kind,
            "texts": statistics.examples,
            "modules": len(statistics.names),
            "bytes": target.stat().st_size,
            "seconds": time.perf_counter() - start,
        }
        if statistics.examples < texts:
            shell.warn(f"only {statistics.examples} texts in {data}, {texts} were asked for")
        shell.result("calibrate", result, lambda: _show(shell, result))


def _show(shell: Any, result: dict[str, Any]) -> None:
    measured = "averages of layer inputs"
    if result["kind"] == "kfac":
        measured += " and of gradients of features"
    shell.line(f"wrote {result['output']}")
    shell.pairs(
        {
            "measured": f"{result['modules']} modules on {result['texts']} texts",
            "kind": result["kind"],
            "size": f"{result['bytes'] / 1e6:.1f} MB",
            "time": f"{result['seconds']:.1f} s",
            "note": f"{measured}, no texts; publish it only if you could publish them",
        }
    )


def _number(option: str, given: str) -> int:
    try:
        value = int(given)
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(f"{option}: expected a positive integer or full, got {given!r}")
    return value
