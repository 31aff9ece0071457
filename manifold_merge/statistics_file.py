"""Statistics as one safetensors file."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from manifold_merge.statistics_gram import Gram

__all__ = ["STATISTICS_NAME", "DiagonalFile", "Statistics"]

STATISTICS_NAME = "merge_statistics.safetensors"

_FORMAT = "manifold_merge.statistics"
_SCHEMA = 1
_REMEDY = "collect the statistics again"
_DIAGONAL = "diagonal/"
_PARTS = ("matrix", "factor", "remainder", "mean")


@dataclass(frozen=True)
class Statistics:
    """Statistics of a model on some data, by module name.

    Attributes:
        kind: ``"input_gram"``, ``"kfac"`` (input and output Grams) or ``"diagonal"``.
        input_grams: The distinct input Grams, means over tokens.
        owners: Module name to the key in ``input_grams``; modules that are fed the same tensor
            share one.
        output_grams: For ``"kfac"``, module name to the Gram of output gradients, a mean over
            examples.
        diagonals: For ``"diagonal"``, parameter name to the mean over examples of the squared
            gradient, of the parameter's shape.
        examples: How many examples (texts, images) were seen.
        model_name: What was measured, as stated by the caller or by the model.
        options: Everything else that decides what the numbers mean.
    """

    kind: str
    input_grams: Mapping[str, Gram] = field(default_factory=dict)
    owners: Mapping[str, str] = field(default_factory=dict)
    output_grams: Mapping[str, Gram] = field(default_factory=dict)
    diagonals: Mapping[str, Tensor] = field(default_factory=dict)
    examples: int = 0
    model_name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("input_grams", "owners", "output_grams", "diagonals", "options"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __repr__(self) -> str:
        return (
            f"Statistics({self.kind!r}, modules={len(self.names)}, examples={self.examples}, "
            f"bytes={self.nbytes})"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The modules that have Grams, or the parameters that have a diagonal."""
        return tuple(self.owners) or tuple(self.diagonals)

    @property
    def nbytes(self) -> int:
        """Size of the file that :meth:`save` writes by default, without its header."""
        return sum(t.numel() * 4 for t in _to_tensors(self).values())

    def gram(self, name: str) -> Gram:
        """The input Gram of a module, the mean over tokens of x xᵀ, ``(n, n)``.

        Raises:
            KeyError: There is none; says for which modules there is one.
        """
        if name not in self.owners:
            raise KeyError(self._missing("an input Gram", name, self.owners))
        return self.input_grams[self.owners[name]]

    def output_gram(self, name: str) -> Gram:
        """The Gram of a module's output gradients, the mean over examples of Σ g gᵀ, ``(m, m)``.

        Raises:
            KeyError: There is none; says for which modules there is one.
        """
        if name not in self.output_grams:
            raise KeyError(self._missing("an output Gram", name, self.output_grams))
        return self.output_grams[name]

    def diagonal(self, name: str) -> Tensor:
        """The diagonal Fisher of a parameter, of the parameter's shape.

        Raises:
            KeyError: There is none; says for which parameters there is one.
        """
        if name not in self.diagonals:
            raise KeyError(self._missing("a diagonal Fisher", name, self.diagonals))
        return self.diagonals[name]

    def _missing(self, what: str, name: str, known: Iterable[str]) -> str:
        names = sorted(known)
        some = ", ".join(names[:3]) or "nothing"
        return (
            f"these statistics of kind {self.kind!r} have no {what.split(' ', 1)[1]} of {name!r}, "
            f"but of {some}{' ...' if len(names) > 3 else ''}; collect them again with "
            "modules=[...] and the kind needed"
        )

    def compress(self, rank: int) -> Statistics:
        """Low rank plus diagonal for every Gram that this makes less than half as large.

        Args:
            rank: Greatest rank kept; ``gram(name).energy`` then tells the share of the trace that
                it explains. Diagonals stay exact.

        Raises:
            ValueError: ``rank`` is not positive.
        """

        def small(gram: Gram) -> Gram:
            if gram.matrix is None or (rank + 1) * 4 >= gram.features + 1:
                return gram
            return gram.compress(rank)

        return replace(
            self,
            input_grams={k: small(g) for k, g in self.input_grams.items()},
            output_grams={k: small(g) for k, g in self.output_grams.items()},
            options={**self.options, "rank": rank},
        )

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> None:
        """Write one safetensors file, completely or not at all.

        Args:
            path: The file, or a folder in which ``merge_statistics.safetensors`` is written.
            dtype: Type of the stored numbers. Symmetric matrices are stored as one triangle.

        Raises:
            ValueError: A number is NaN or infinite, also in ``dtype``; names the module.
            OSError: The file cannot be written.
        """
        _save(self, path, dtype)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        modules: Iterable[str] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Statistics:
        """Read and check a file that :meth:`save` wrote.

        Args:
            path: The file, or the folder that holds ``merge_statistics.safetensors``.
            modules: Modules that must be there.
            dtype: Type of the result.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated, from another program or a newer version, holds NaN
                or negative variances, or lacks a module; says which and what to do.
        """
        return _load(path, modules, dtype)


def _to_tensors(statistics: Statistics) -> dict[str, Tensor]:
    """All numbers under the keys of the file; a symmetric matrix is its upper triangle."""
    tensors = {_DIAGONAL + name: value for name, value in statistics.diagonals.items()}
    for side, grams in _sides(statistics).items():
        for name, gram in grams.items():
            for part in _PARTS:
                value = getattr(gram, part)
                if value is not None:
                    tensors[f"{side}/{name}/{part}"] = _pack(value) if part == "matrix" else value
    return tensors


def _sides(statistics: Statistics) -> dict[str, Mapping[str, Gram]]:
    return {"input": statistics.input_grams, "output": statistics.output_grams}


def _pack(matrix: Tensor) -> Tensor:
    size = matrix.shape[0]
    return matrix[tuple(torch.triu_indices(size, size))]


def _unpack(triangle: Tensor) -> Tensor:
    size = (math.isqrt(8 * triangle.numel() + 1) - 1) // 2
    matrix = triangle.new_zeros(size, size)
    matrix.masked_scatter_(torch.ones(size, size, dtype=torch.bool).triu(), triangle)
    return matrix + matrix.triu(1).T


def _save(statistics: Statistics, path: str | os.PathLike[str], dtype: torch.dtype) -> None:
    target = Path(path)
    if target.is_dir():
        target = target / STATISTICS_NAME
    tensors = {k: v.to(dtype).contiguous() for k, v in _to_tensors(statistics).items()}
    for key, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"{key!r} has NaN or infinite numbers as {dtype}; save with dtype=torch.float32 "
                f"or {_REMEDY}"
            )
    header = {
        "schema": _SCHEMA,
        "kind": statistics.kind,
        "model_name": statistics.model_name,
        "examples": statistics.examples,
        "owners": dict(statistics.owners),
        "options": dict(statistics.options),
        "keys": sorted(tensors),
        "grams": {
            f"{side}/{name}": {"count": gram.count, "energy": gram.energy}
            for side, grams in _sides(statistics).items()
            for name, gram in grams.items()
        },
        # Damping is relative to it; a streamed merge then need not read each diagonal twice.
        "means": {
            key: float(value.mean(dtype=torch.float64)) if value.numel() else 0.0
            for key, value in tensors.items()
            if key.startswith(_DIAGONAL)
        },
    }
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        save_file(tensors, partial, metadata={"format": _FORMAT, "header": json.dumps(header)})
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        # The file is made readable by its owner alone, but it is meant to be passed on.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _load(
    path: str | os.PathLike[str], modules: Iterable[str] | None, dtype: torch.dtype
) -> Statistics:
    file = Path(path)
    if file.is_dir():
        file = file / STATISTICS_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; collect the statistics and save them there")
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            metadata = handle.metadata() or {}
            header = _header(file, metadata)
            missing = sorted(set(header["keys"]) - set(handle.keys()))
            if missing:
                raise ValueError(f"{file}: tensor {missing[0]!r} is missing; {_REMEDY}")
            tensors = {key: handle.get_tensor(key).to(dtype) for key in header["keys"]}
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); {_REMEDY}") from error
    for key, value in tensors.items():
        _check_tensor(file, key, value)
    grams: dict[str, dict[str, Gram]] = {"input": {}, "output": {}}
    for key, facts in header["grams"].items():
        side, name = key.split("/", 1)
        parts = {p: tensors[f"{key}/{p}"] for p in _PARTS if f"{key}/{p}" in tensors}
        if "matrix" in parts:
            parts["matrix"] = _unpack(parts["matrix"])
        sizes = {value.shape[0] for value in parts.values()}
        if len(sizes) != 1 or not parts.keys() - {"mean"}:
            raise ValueError(f"{file}: the parts of {key!r} do not fit together; {_REMEDY}")
        if facts["count"] < 1:
            raise ValueError(f"{file}: {key!r} is a mean over {facts['count']} items; {_REMEDY}")
        grams[side][name] = Gram(**parts, count=facts["count"], energy=facts["energy"])
    lost = sorted(set(header["owners"].values()) - grams["input"].keys())
    if lost:
        raise ValueError(f"{file}: the Gram {lost[0]!r} is missing; {_REMEDY}")
    statistics = Statistics(
        kind=header["kind"],
        input_grams=grams["input"],
        owners=header["owners"],
        output_grams=grams["output"],
        diagonals={
            k.removeprefix(_DIAGONAL): t for k, t in tensors.items() if k.startswith(_DIAGONAL)
        },
        examples=header["examples"],
        model_name=header["model_name"],
        options=header["options"],
    )
    absent = sorted(set(modules or ()) - set(statistics.names))
    if absent:
        raise ValueError(
            f"{file} has no statistics of {absent[0]!r}"
            f"{f' and {len(absent) - 1} more modules' if len(absent) > 1 else ''}; collect them "
            "again from the model that has these modules"
        )
    return statistics


def _header(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{file} is no statistics file (its format is {metadata.get('format')!r}, expected "
            f"{_FORMAT!r}); give the {STATISTICS_NAME} of the adapter"
        )
    try:
        header: dict[str, Any] = json.loads(metadata["header"])
        schema = header["schema"]
        if not isinstance(schema, int) or schema > _SCHEMA:
            raise ValueError(
                f"{file} has schema {schema}, this version reads up to {_SCHEMA}; upgrade "
                "manifold-merge"
            )
        for key in ("kind", "model_name", "examples", "owners", "options", "keys", "grams"):
            header[key]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} has a damaged header ({error!r}); {_REMEDY}") from error
    return header


def _check_tensor(file: Path, key: str, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise ValueError(f"{file}: tensor {key!r} has NaN or infinite numbers; {_REMEDY}")
    signless = key.endswith("/remainder") or key.startswith(_DIAGONAL)
    if signless and bool((value < 0).any()):
        raise ValueError(f"{file}: tensor {key!r} has negative variances; {_REMEDY}")
    if key.endswith("/matrix"):
        size = (math.isqrt(8 * value.numel() + 1) - 1) // 2
        if value.ndim != 1 or size * (size + 1) // 2 != value.numel():
            raise ValueError(f"{file}: tensor {key!r} is no triangle of a matrix; {_REMEDY}")


class DiagonalFile:
    """A statistics file of kind ``"diagonal"`` that is read parameter by parameter.

    Args:
        path: The file, or its folder.

    Attributes:
        path: The file.
        shapes: Parameter name to shape.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds statistics of another kind.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        file = Path(path)
        self.path = file / STATISTICS_NAME if file.is_dir() else file
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path} is missing; collect the statistics and save them there"
            )
        self._handle: Any = None
        try:
            header = _header(self.path, self._opened().metadata() or {})
            keys = [x for x in self._opened().keys() if x.startswith(_DIAGONAL)]  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{self.path} is truncated or damaged ({error}); {_REMEDY}") from error
        if header["kind"] != "diagonal":
            raise ValueError(
                f"{self.path} holds statistics of kind {header['kind']!r}; whole models need "
                "kind='diagonal' of collect_statistics"
            )
        self.shapes: dict[str, tuple[int, ...]] = {
            key.removeprefix(_DIAGONAL): tuple(self._opened().get_slice(key).get_shape())
            for key in keys
        }
        self._means: dict[str, float] = header.get("means", {})

    def _opened(self) -> Any:
        if self._handle is None:
            self._handle = safe_open(self.path, framework="pt", device="cpu")
        return self._handle

    def read(self, name: str) -> Tensor:
        """The diagonal of one parameter, a view of the file."""
        tensor: Tensor = self._opened().get_tensor(_DIAGONAL + name)
        return tensor

    def mean(self, name: str) -> float:
        """The mean of the diagonal of one parameter, from the header where it is stored there."""
        known = self._means.get(_DIAGONAL + name)
        if known is None:  # written by an earlier version
            known = float(self.read(name).mean(dtype=torch.float32))
        return known

    def release(self) -> None:
        """Let go of the file."""
        self._handle = None

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of the file."""
        status = self.path.stat()
        return [(self.path.name, status.st_size, status.st_mtime_ns)]
