"""The command ``manifold-merge models``."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manifold_merge.cli_options import (
    Debug,
    Device,
    DifferentConfig,
    DType,
    Json,
    ModelMemory,
    ModelOutput,
    ModelOverwrite,
    Quiet,
    ShardSize,
    parse_bytes,
    parse_device,
    parse_layer_weights,
    parse_weights,
)
from manifold_merge.cli_session import Session, session

if TYPE_CHECKING:
    from manifold_merge.checkpoint_merge import ModelMerge

__all__ = ["align", "models", "show_merge"]


class ModelGeometry(StrEnum):
    """Names of the geometries of ``merge_models``."""

    euclidean = "euclidean"
    sphere = "sphere"
    fisher = "fisher"
    permutation = "permutation"


class Scope(StrEnum):
    """What is one point."""

    tensor = "tensor"
    model = "model"


def models(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR",
            help="Folders with safetensors weights, sharded or not, as transformers saves them.",
            show_default=False,
        ),
    ],
    output: ModelOutput,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...",
            help="One weight for each model; divided by their sum. Default: equal.",
        ),
    ] = None,
    layer_weights: Annotated[
        list[str],
        typer.Option(
            metavar="PATTERN=W,W,...",
            help="Weights of the tensors whose name matches a shell pattern. Repeatable.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    geometry: Annotated[
        ModelGeometry,
        typer.Option(
            help="euclidean, the average of weights; sphere, directions and norms averaged apart "
            "(SLERP, karcher); fisher, entries weighted by their Fisher information; permutation, "
            "units, heads and experts brought into one order first, ReLU units into one scale and "
            "heads into one basis (all models in memory).",
        ),
    ] = ModelGeometry.euclidean,
    scope: Annotated[
        Scope,
        typer.Option(help="What is one point, for sphere and --median: a tensor or the model."),
    ] = Scope.tensor,
    statistics: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="For fisher, the diagonal statistics of each model, in order. Repeatable.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    damping: Annotated[
        float,
        typer.Option(help="For fisher: share of the mean information added to each entry."),
    ] = 1e-2,
    median: Annotated[
        bool,
        typer.Option(
            "--median",
            help="Geometric median instead of the mean: a corrupted model cannot move it far.",
        ),
    ] = False,
    balance: Annotated[
        bool | None,
        typer.Option(
            "--balance/--no-balance",
            help="For permutation: remove positive scales of ReLU units, and of norms' gains, too. "
            "Default: where units have them, not those of gains.",
            show_default=False,
        ),
    ] = None,
    basis: Annotated[
        bool | None,
        typer.Option(
            "--basis/--no-basis",
            help="For permutation: remove changes of basis inside attention heads too. "
            "Default: where there are any.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Type of the written tensors. Default: that of the first model."),
    ] = None,
    max_shard_size: ShardSize = None,
    max_memory: ModelMemory = None,
    allow_different_config: DifferentConfig = False,
    device: Device = "cpu",
    overwrite: ModelOverwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge whole models of one architecture, tensor by tensor.

    Memory does not grow with the size of the models. After an interruption the same command goes
    on where it was.
    """
    with session(as_json=as_json, quiet=quiet, debug=debug) as shell:
        options: dict[str, Any] = {
            "weights": None if weights is None else parse_weights("--weights", weights, folders),
            "layer_weights": parse_layer_weights(layer_weights),
            "max_shard_size": None
            if max_shard_size is None
            else parse_bytes("--max-shard-size", max_shard_size),
            "balance": "auto" if balance is None else balance,
            "basis": "auto" if basis is None else basis,
            "max_bytes": None if max_memory is None else parse_bytes("--max-memory", max_memory),
        }
        for folder in folders:
            if folder.suffix in (".yml", ".yaml"):
                raise ValueError(
                    f"{folder} is no folder of a model; a recipe of mergekit is run by "
                    f"manifold-merge mergekit {folder} --output {output}"
                )
        import torch

        from manifold_merge.checkpoint_merge import merge_models

        start = time.perf_counter()
        try:
            with shell.progress("merging", "MB") as progress:
                merged = merge_models(
                    folders,
                    output,
                    geometry=geometry.value,
                    scope=scope.value,
                    statistics=statistics or None,
                    damping=damping,
                    p=1 if median else 2,
                    dtype=None if dtype is None else getattr(torch, dtype.value),
                    device=parse_device(device),
                    allow_different_config=allow_different_config,
                    overwrite=overwrite,
                    progress=lambda done, total: progress(done // 10**6, -(-total // 10**6)),
                    **options,
                )
        except KeyboardInterrupt:
            shell.warn("what is done is kept; run the same command again to go on")
            raise
        show_merge(shell, "models", merged, time.perf_counter() - start)


class Method(StrEnum):
    """Names of the matchings of ``align``."""

    anneal = "anneal"
    coordinate = "coordinate"
    frank_wolfe = "frank_wolfe"


def align(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The model to reorder.", show_default=False)
    ],
    to: Annotated[
        Path, typer.Option(metavar="DIR", help="The model that stays.", show_default=False)
    ],
    output: ModelOutput,
    method: Annotated[Method, typer.Option(help="How units are matched.")] = Method.anneal,
    rescale: Annotated[
        bool | None,
        typer.Option(
            "--rescale/--no-rescale",
            help="Bring positive scales of ReLU units, and of norms' gains, to those of --to too. "
            "Default: where units have them, not those of gains.",
            show_default=False,
        ),
    ] = None,
    basis: Annotated[
        bool | None,
        typer.Option(
            "--basis/--no-basis",
            help="Bring the bases inside attention heads to those of --to too. "
            "Default: where there are any.",
            show_default=False,
        ),
    ] = None,
    starts: Annotated[int, typer.Option(min=1, help="Starts of the matching.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the starts.")] = 0,
    allow_different_config: DifferentConfig = False,
    overwrite: ModelOverwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rebase a model onto another: the same function, in the other's order, scales and bases."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as shell:
        from manifold_merge.checkpoint_align import align_models

        start = time.perf_counter()
        with shell.progress("writing", "MB") as progress:
            found = align_models(
                folder,
                to,
                output,
                method=method.value,
                rescale="auto" if rescale is None else rescale,
                basis="auto" if basis is None else basis,
                starts=starts,
                seed=seed,
                allow_different_config=allow_different_config,
                overwrite=overwrite,
                progress=lambda done, total: progress(done // 10**6, -(-total // 10**6)),
            )
        result = {
            "output": str(found.output),
            "recipe": found.recipe,
            "distance_before": found.distance_before,
            "distance_after": found.distance_after,
            "moved": found.moved,
            "elements": found.elements,
            "seconds": time.perf_counter() - start,
        }
        shell.result("align", result, lambda: _show_alignment(shell, result))


def _show_alignment(shell: Session, result: dict[str, Any]) -> None:
    shell.say(f"{result['recipe']['model']}, aligned to {result['recipe']['to']}")
    shell.pairs(
        {
            "distance": f"{result['distance_before']:.6g} -> {result['distance_after']:.6g}",
            "moved": f"{result['moved']} of {result['elements']} units, heads and experts",
            "time": f"{result['seconds']:.1f} s",
        }
    )
    shell.line(f"Wrote {result['output']}")


def show_merge(shell: Session, command: str, merged: ModelMerge, seconds: float) -> None:
    """Print what a merge of models has written."""
    files = sorted(merged.output.glob("*.safetensors"))
    result = {
        "output": str(merged.output),
        "recipe": merged.recipe,
        "tensors": merged.tensors,
        "copied": len(merged.copied),
        "shards": len(files),
        "resumed": merged.resumed,
        "bytes": sum(file.stat().st_size for file in files),
        "seconds": seconds,
    }
    shell.result(command, result, lambda: _show(shell, result))


def _show(shell: Session, result: dict[str, Any]) -> None:
    recipe = result["recipe"]
    kind = "Median" if recipe["p"] == 1 else "Mean"
    shell.say(f"{kind} of {len(recipe['models'])} models")
    again = f", {result['resumed']} of them from an interrupted run" if result["resumed"] else ""
    shell.pairs(
        {
            "geometry": recipe["geometry"],
            "weights": ", ".join(f"{w:.4g}" for w in recipe["weights"]),
            "tensors": f"{result['tensors']} averaged, {result['copied']} copied",
            "files": f"{result['shards']}{again}",
            "time": f"{result['seconds']:.1f} s",
        }
    )
    shell.line(f"Wrote {result['output']} ({result['bytes'] / 1e6:.3g} MB)")
