"""The command ``manifold-merge mergekit``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from manifold_merge.cli_models import show_merge
from manifold_merge.cli_options import (
    Debug,
    Device,
    DifferentConfig,
    Json,
    ModelMemory,
    ModelOutput,
    ModelOverwrite,
    Quiet,
    ShardSize,
    parse_bytes,
    parse_device,
)
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
    output: ModelOutput,
    max_shard_size: ShardSize = None,
    max_memory: ModelMemory = None,
    allow_different_config: DifferentConfig = False,
    device: Device = "cpu",
    overwrite: ModelOverwrite = False,
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
