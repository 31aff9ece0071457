"""Options that commands share, and how their texts are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

__all__ = [
    "AdapterOutput",
    "DType",
    "Debug",
    "Device",
    "DifferentBase",
    "DifferentConfig",
    "Distance",
    "Extras",
    "Folders",
    "Geometry",
    "IgnoredKeys",
    "Json",
    "MaxMemory",
    "Missing",
    "ModelMemory",
    "ModelOutput",
    "ModelOverwrite",
    "Normalisation",
    "Quiet",
    "ShardSize",
    "Weights",
    "parse_bytes",
    "parse_device",
    "parse_layer_weights",
    "parse_rank",
    "parse_scale",
    "parse_weights",
]  # fmt: skip


class Geometry(StrEnum):
    """Names of the geometries of ``merge_adapters``."""

    auto = "auto"
    fisher = "fisher"
    lifted = "lifted"
    mixed = "mixed"
    embedded = "embedded"
    invariant = "invariant"
    polar = "polar"


class Distance(StrEnum):
    """Names of the distances of ``merge_adapters``."""

    exact = "exact"
    aligned = "aligned"
    chordal = "chordal"


class Missing(StrEnum):
    """What a module that some adapters lack means."""

    zero = "zero"
    present = "present"
    error = "error"


class Extras(StrEnum):
    """What to do with biases and fully trained modules."""

    mean = "mean"
    drop = "drop"


class Normalisation(StrEnum):
    """Names of the normalisations of ``merge_adapters``."""

    none = "none"
    trace = "trace"
    task = "task"


class DType(StrEnum):
    """Types of written tensors."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float64 = "float64"


Folders = Annotated[
    list[Path],
    typer.Argument(metavar="DIR", help="Adapter folders in PEFT's format.", show_default=False),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="W,W,...",
        help="One weight for each adapter; divided by their sum. Default: equal.",
    ),
]
DifferentBase = Annotated[
    bool,
    typer.Option(
        "--allow-different-base",
        help="Accept adapters that name different base models.",
    ),
]
IgnoredKeys = Annotated[
    list[str],
    typer.Option(
        "--ignore-config-key",
        metavar="KEY",
        help="An unknown key of adapter_config.json that you know not to matter. Repeatable.",
        show_default=False,
    ),
]
MaxMemory = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="Bytes of factors worked on at a time, such as 64MB or 2GB.",
    ),
]
Device = Annotated[str, typer.Option(metavar="cpu|cuda|mps", help="Where to compute.")]
AdapterOutput = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="Folder to write; PeftModel.from_pretrained loads it.",
        show_default=False,
    ),
]
ModelOutput = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="Folder to write; from_pretrained loads it.",
        show_default=False,
    ),
]
ModelOverwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")]
ShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Bytes in one file, such as 5GB. Default: the shards of the first model.",
    ),
]
ModelMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Bytes of the models in memory at a time, such as 512MB. Default: 1GiB.",
    ),
]
DifferentConfig = Annotated[
    bool,
    typer.Option(
        "--allow-different-config",
        help="Accept configurations that differ in what a model computes.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object and nothing else."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Log each step; show where errors arise."),
]


def parse_weights(option: str, text: str, folders: Sequence[Path] = ()) -> list[float]:
    """Read ``1,-0.5`` as numbers; errors name the option.

    Args:
        option: The option's name.
        text: What it was given.
        folders: The arguments of the command: numbers among them that are no folders are weights
            that were separated by spaces.
    """
    stray = [str(f) for f in folders if re.fullmatch(r"[\d.]+", str(f)) and not f.exists()]
    if stray:
        raise ValueError(
            f"adapter folder {stray[0]} does not exist; weights are separated by commas: "
            f"{option} {','.join([text, *stray])}"
        )
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option}: expected numbers separated by commas, such as 1,1,0.5; got {text!r}"
        ) from None


def parse_bytes(option: str, text: str) -> int:
    """Read a size such as ``256MB``, ``1.5 GiB`` or a number of bytes; errors name the option.

    Example:
        >>> parse_bytes("--max-memory", "256MB"), parse_bytes("--max-memory", "1GiB")
        (256000000, 1073741824)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    size = 0
    if match:
        size = int(
            float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " ")
        )
    if size < 1:
        raise ValueError(f"{option}: expected a size such as 64MB or 2GB, got {text!r}")
    return size


def parse_layer_weights(given: Sequence[str]) -> dict[str, list[float]]:
    """Read each ``PATTERN=w,w,...``."""
    parsed: dict[str, list[float]] = {}
    for item in given:
        pattern, equals, weights = item.rpartition("=")
        if not equals or not pattern:
            raise ValueError(
                f"--layer-weights: expected PATTERN=w,w,... such as '*.layer.0.*=1,0', got {item!r}"
            )
        if pattern in parsed:
            raise ValueError(f"--layer-weights: pattern {pattern!r} is given twice; leave one out")
        parsed[pattern] = parse_weights(f"--layer-weights {pattern!r}", weights)
    return parsed


def parse_rank(given: str | None) -> int | str | None:
    """Read a number, ``full`` or ``auto``, which may come with a tolerance."""
    if given is None or given == "full" or given.partition("=")[0] == "auto":
        return given
    try:
        return int(given)
    except ValueError:
        raise ValueError(
            f"--rank: expected a positive integer, full or auto, got {given!r}"
        ) from None


def parse_scale(given: str) -> float | str:
    """Read a number or ``norm``."""
    if given == "norm":
        return given
    try:
        return float(given)
    except ValueError:
        raise ValueError(f"--scale: expected a number or norm, got {given!r}") from None


def parse_device(given: str) -> torch.device:
    """Read ``cpu``, ``cuda``, ``cuda:1`` or ``mps``."""
    import torch

    try:
        device = torch.device(given)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device: expected cpu, cuda (or cuda:1, ...) or mps, got {given!r}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: no Apple GPU is available here; use --device cpu")
    return device
