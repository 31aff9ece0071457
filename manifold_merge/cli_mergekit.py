"""The command ``manifold-merge mergekit``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from manifold_merge.cli_models import show_merge
from manifold_merge.cli_options import Debug, Json, Quiet, parse_bytes, parse_device
from manifold_merge.cli_session import session

__all__ = ["mergekit"]


def mergekit(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.yml",
            help="A configuration of mergekit: linear, slerp, karcher or task_arithmetic.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Folder to write; from_pretrained loads it.",
            show_default=False,
        ),
    ],
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Bytes in one file, such as 5GB. Default: the shards of the first model.",
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Bytes of the models in memory at a time, such as 512MB. Default: 1GiB.",
        ),
    ] = None,
    allow_different_config: Annotated[
        bool,
        typer.Option(
            "--allow-different-config",
            help="Accept configurations that differ in what a model computes.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(metavar="cpu|cuda|mps", help="Where to compute.")] = "cpu",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a merged model that is there."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge whole models by a recipe of mergekit.

    Keys, methods and parameters that have no counterpart here are refused by name, before any
    weight is read.
    """
    with session(as_json=as_json, quiet=quiet, debug=debug) as shell:
        limit = None if max_shard_size is None else parse_bytes("--max-shard-size", max_shard_size)
        budget = None if max_memory is None else parse_bytes("--max-memory", max_memory)
        from manifold_merge.mergekit_merge import merge_mergekit

        start = time.perf_counter()
        try:
            with shell.progress("merging", "MB") as progress:
                merged = merge_mergekit(
                    config,
                    output,
                    device=parse_device(device),
                    max_shard_size=limit,
                    max_bytes=budget,
                    allow_different_config=allow_different_config,
                    overwrite=overwrite,
                    progress=lambda done, total: progress(done // 10**6, -(-total // 10**6)),
                )
        except KeyboardInterrupt:
            shell.warn("what is done is kept; run the same command again to go on")
            raise
        show_merge(shell, "mergekit", merged, time.perf_counter() - start)
