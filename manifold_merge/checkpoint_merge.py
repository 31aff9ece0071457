"""Merge whole checkpoints into one as a Fréchet mean, streamed tensor by tensor."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from manifold_merge._version import __version__
from manifold_merge.accurate import weighted_sum
from manifold_merge.checkpoint_parts import DEFAULT_BUDGET, PartReader
from manifold_merge.checkpoint_span import core_coefficients, stacked_gram_of
from manifold_merge.checkpoint_symmetry import checkpoint_symmetry, read_state
from manifold_merge.checkpoint_writer import CheckpointWriter
from manifold_merge.checkpoints import (
    Checkpoint,
    CheckpointError,
    TensorEntry,
    check_same_architecture,
)
from manifold_merge.fisher_mean import mean_by_shares
from manifold_merge.frechet import normalized_weights
from manifold_merge.linalg import all_finite
from manifold_merge.network_merge import merge_networks
from manifold_merge.statistics_file import DiagonalFile
from manifold_merge.symmetry import NetworkSymmetry

__all__ = ["MODEL_GEOMETRIES", "ModelMerge", "merge_models"]

logger = logging.getLogger(__name__)

MODEL_GEOMETRIES = ("euclidean", "sphere", "fisher", "permutation")
SCOPES = ("tensor", "model")

Path_ = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class ModelMerge:
    """What a merge of checkpoints produced.

    Attributes:
        output: The folder that was written.
        recipe: All options, as in the model card.
        tensors: Number of tensors averaged.
        copied: Tensors taken from the first checkpoint because they hold no real numbers.
        resumed: Shards that an interrupted run had written before.
    """

    output: Path
    recipe: dict[str, Any]
    tensors: int
    copied: tuple[str, ...]
    resumed: int


@torch.no_grad()
def merge_models(
    models: Sequence[Path_ | Checkpoint],
    output: Path_,
    *,
    weights: Sequence[float] | None = None,
    layer_weights: Mapping[str, Sequence[float]] | None = None,
    geometry: str = "euclidean",
    scope: str = "tensor",
    symmetry: NetworkSymmetry | None = None,
    balance: bool | Literal["auto"] = "auto",
    basis: bool | Literal["auto"] = "auto",
    statistics: Sequence[Path_] | None = None,
    damping: float = 1e-2,
    p: int = 2,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    max_shard_size: int | None = None,
    max_bytes: int | None = None,
    allow_different_config: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ModelMerge:
    """Merge checkpoints of one architecture; memory does not grow with their size.

    The work is resumed after an interruption: run it again with the same inputs and options.

    Args:
        models: Folders with safetensors weights (sharded or not), files, or opened
            :class:`Checkpoint` objects, at least one.
        output: Folder to write: weights in shards, index, configuration and tokenizer of the first
            model, and a model card.
        weights: One weight for each model; divided by their sum. Equal if ``None``.
        layer_weights: Weights for tensors whose name matches a shell pattern, such as
            ``{"*.layers.0.*": [1, 0, 0]}``; the first matching pattern counts.
        geometry: ``"euclidean"``, the average of weights; ``"sphere"``, directions averaged on the
            sphere and norms apart (SLERP for two models, for more the mean that mergekit calls
            ``karcher``; single numbers are averaged as they are); ``"fisher"``, each entry weighted
            by the diagonal Fisher information that
            :func:`~manifold_merge.statistics.collect_statistics` measured.
            ``"permutation"``: units, heads and experts are brought into one order first, as
            independently trained models need it (:func:`~manifold_merge.merge_networks`); this one
            holds all models in memory.
        symmetry: For ``"permutation"``, the symmetry of the network; by default it is derived, with
            transformers, from the class that ``config.json`` names, and proved.
        balance: For ``"permutation"``, remove positive scales of units as well; see there.
        basis: For ``"permutation"``, remove changes of basis inside heads as well; see there.
        scope: What is one point for ``"sphere"`` and for medians: each ``"tensor"``, or the whole
            ``"model"``.
        statistics: For ``"fisher"``, one statistics file for each model, of kind ``"diagonal"``.
        damping: λ in f + λ mean(f), the mean over one tensor, for ``"fisher"``.
        p: 2 for the mean, 1 for the geometric median (``"euclidean"`` and ``"sphere"``).
        dtype: Type of the written tensors; that of the first model, tensor by tensor, if ``None``.
        device: Where to compute; CPU if ``None``.
        max_shard_size: Bytes of tensors in one file; the shards of the first model if ``None``.
        max_bytes: Bytes of the inputs that are in memory at a time, read from mapped files or
            worked on, above what Python and torch take; 1 GiB if ``None``.
        allow_different_config: Accept configurations that differ in what a model computes.
        overwrite: Replace an existing folder that holds a merged model.
        progress: Called with the number of entries done and in all.

    Returns:
        The folder and the recipe.

    Raises:
        FileNotFoundError: A folder, shard or statistics file is missing.
        CheckpointError: A checkpoint is damaged, holds NaN, or does not fit the others.
        FileExistsError: The output exists; pass ``overwrite=True``.
        ValueError: An option is unknown or contradicts another.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file, save_file
        >>> root = Path(tempfile.mkdtemp())
        >>> for i, value in enumerate((1.0, 3.0)):
        ...     (root / str(i)).mkdir()
        ...     save_file({"w": torch.full((2, 2), value)}, root / str(i) / "model.safetensors")
        >>> merged = merge_models([root / "0", root / "1"], root / "merged", weights=[3, 1])
        >>> load_file(merged.output / "model.safetensors")["w"]
        tensor([[1.5000, 1.5000],
                [1.5000, 1.5000]])
    """
    if symmetry is not None and geometry != "permutation":
        raise ValueError(
            f"symmetry: geometry={geometry!r} has none; leave it out, or use geometry='permutation'"
        )
    for option, value in (("balance", balance), ("basis", basis)):
        if value != "auto" and geometry != "permutation":
            raise ValueError(
                f"{option}: geometry={geometry!r} removes no symmetry; leave it out, or use "
                "geometry='permutation'"
            )
    if not models:
        raise ValueError("models is empty; give at least one folder")
    opened = [x if isinstance(x, Checkpoint) else Checkpoint(x) for x in models]
    plan = _Plan.make(
        opened, weights, dict(layer_weights or {}), geometry=geometry, scope=scope,
        statistics=statistics, damping=damping, p=p, dtype=dtype, device=device,
        max_bytes=max_bytes,
    )  # fmt: skip
    check_same_architecture(opened, allow_different_config=allow_different_config)
    plan.check_statistics()
    if geometry == "permutation":
        plan.symmetry = checkpoint_symmetry(opened[0]) if symmetry is None else symmetry
        plan.gauges = {"balance": balance, "basis": basis}
    writer = CheckpointWriter(
        output, opened[0], opened, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite
    )
    resumed = writer.write(
        plan.merged, _card(plan.recipe), fingerprint=plan.fingerprint(writer.layout()),
        begin=plan.begin, release=plan.release, progress=progress,
    )  # fmt: skip
    return ModelMerge(
        writer.path, plan.recipe, len(opened[0].tensors) - len(plan.copied), plan.copied, resumed
    )


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """A shell pattern; a recipe may have hundreds, more than fnmatch remembers."""
    return re.compile(fnmatch.translate(pattern))


def _card(recipe: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"| `{model}` | {weight:.6g} |"
        for model, weight in zip(recipe["models"], recipe["weights"], strict=True)
    )
    kind = "Fréchet median" if recipe["p"] == 1 else "Fréchet mean"
    return (
        f"---\ntags:\n- merge\n- manifold-merge\n---\n# Merged model\n\nA {kind} of "
        f"{len(recipe['models'])} models, made with manifold-merge {__version__}.\n\n"
        f"| model | weight |\n|---|---|\n{rows}\n\n## Recipe\n\n```json\n"
        f"{json.dumps(recipe, indent=2)}\n```\n"
    )


@dataclasses.dataclass
class _Plan:
    """A checked request, and how each tensor is merged."""

    models: list[Checkpoint]
    weights: list[float]
    layer_weights: dict[str, list[float]]
    geometry: str
    scope: str
    p: int
    damping: float
    dtype: torch.dtype | None
    device: torch.device
    diagonals: list[DiagonalFile] | None
    reader: PartReader
    symmetry: NetworkSymmetry | None = None
    gauges: dict[str, Any] = dataclasses.field(default_factory=dict)
    whole: Tensor | None = None
    state: dict[str, Tensor] | None = None

    @classmethod
    def make(
        cls,
        models: list[Checkpoint],
        weights: Sequence[float] | None,
        layer_weights: dict[str, Sequence[float]],
        max_bytes: int | None = None,
        **options: Any,
    ) -> _Plan:
        geometry, scope, p = (options[key] for key in ("geometry", "scope", "p"))
        if geometry not in MODEL_GEOMETRIES:
            raise ValueError(
                f"geometry must be one of {', '.join(MODEL_GEOMETRIES)}; got {geometry!r}"
            )
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}; got {scope!r}")
        if p not in (1, 2):
            raise ValueError(f"p must be 2 (mean) or 1 (median); got {p!r}")
        if geometry == "permutation" and (layer_weights or scope == "model"):
            raise ValueError(
                "layer_weights and scope: with geometry='permutation' the whole network is one "
                "point with one weight; leave them out"
            )
        if geometry == "permutation" and max_bytes is not None:
            raise ValueError(
                "max_bytes: geometry='permutation' holds all models in memory; leave it out"
            )
        if geometry == "fisher" and p == 1:
            raise ValueError("p=1: geometry='fisher' has a mean only; use geometry='euclidean'")
        if not 0 <= options["damping"] < math.inf:
            raise ValueError(f"damping: expected a number >= 0, got {options['damping']}")
        if scope == "model" and layer_weights:
            raise ValueError(
                "layer_weights: with scope='model' all tensors are one point and have one weight; "
                "leave one of the two out"
            )
        statistics = options.pop("statistics")
        if (statistics is not None) != (geometry == "fisher"):
            raise ValueError(
                "statistics: geometry='fisher' needs one file for each model, other geometries "
                f"none; got geometry={geometry!r} and "
                f"{'no statistics' if statistics is None else f'{len(statistics)} of them'}"
            )
        if statistics is not None and len(statistics) != len(models):
            raise ValueError(
                f"statistics: expected {len(models)}, one for each model; got {len(statistics)}"
            )

        def normalised(what: str, given: Sequence[float] | None) -> list[float]:
            like = torch.zeros(1, dtype=torch.float64)
            if given is not None and any(w < 0 for w in given):
                raise ValueError(
                    f"{what}: {list(given)} has a negative entry, and a mean of models has none; "
                    "to take a model away, write a task_arithmetic recipe for manifold-merge "
                    "mergekit"
                )
            try:
                shares = normalized_weights(given, len(models), like=like)
            except ValueError as error:
                raise ValueError(f"{what}: {str(error).removeprefix('weights: ')}") from error
            return [float(w) for w in shares]

        patterns = {k: normalised(f"layer_weights[{k!r}]", v) for k, v in layer_weights.items()}
        device = torch.device(options.pop("device") or "cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={str(device)!r}: no CUDA device is available here")
        diagonals = None if statistics is None else [DiagonalFile(x) for x in statistics]
        reader = PartReader(
            models, diagonals or [], device, DEFAULT_BUDGET if max_bytes is None else max_bytes
        )
        return cls(
            models, normalised("weights", weights), patterns, device=device, diagonals=diagonals,
            reader=reader, **options,
        )  # fmt: skip

    def check_statistics(self) -> None:
        """Raise if a diagonal does not fit the model, or is there for some of the models only."""
        for entry in self.models[0].tensors.values():
            having = [x for x in self.diagonals or () if entry.name in x.shapes]
            for diagonal in having:
                if diagonal.shapes[entry.name] != entry.shape:
                    raise CheckpointError(
                        f"{diagonal.path}: the Fisher information of {entry.name!r} has shape "
                        f"{diagonal.shapes[entry.name]}, expected {entry.shape}; collect it from "
                        "the model that is merged"
                    )
            if having and len(having) < len(self.models):
                without = next(x for x in self.diagonals or () if entry.name not in x.shapes)
                raise CheckpointError(
                    f"{without.path} has no Fisher information of {entry.name!r}, and another "
                    "statistics file has; collect all with the same parameters"
                )
        if self.diagonals:
            plain = [x for x in self._averaged if x not in self.diagonals[0].shapes]
            if len(plain) == len(self._averaged):
                raise CheckpointError(
                    f"{self.diagonals[0].path} has no Fisher information of any tensor of "
                    f"{self.models[0].path}, such as {plain[0]!r}; its names begin with "
                    f"{next(iter(self.diagonals[0].shapes))!r}: collect it from the same class"
                )
            if plain:
                logger.warning(
                    "%d tensors without Fisher information, such as %r, are averaged with the "
                    "weights alone", len(plain), plain[0],
                )  # fmt: skip

    # --- one tensor ------------------------------------------------------------------------------

    def merged(self, entry: TensorEntry) -> Iterator[Tensor]:
        """Parts of the merged tensor, flat, in order."""
        if self.state is not None:
            yield self.state[entry.name].reshape(-1)
            return
        if not entry.dtype.is_floating_point:
            yield from self._equal(entry)
            return
        weights = torch.tensor(self.weights_of(entry.name), dtype=torch.float64)
        floors: list[float] = []
        if self.diagonals is not None and entry.name in self.diagonals[0].shapes:
            floors = [self.damping * file.mean(entry.name) for file in self.diagonals]
        elif self.needs_gram:
            gram = self.whole
            if gram is None:
                gram = self._gram(entry)
            # One number has a sign and no direction that could be averaged.
            single = entry.numel == 1 and self.whole is None
            geometry = "euclidean" if single else self.geometry
            weights = core_coefficients(gram, weights, geometry, self.p)
        for part, fishers in self.reader.parts(entry.name, fisher=bool(floors)):
            if fishers:
                shares = self._shares(entry.name, fishers, weights, floors, part)
                mean = mean_by_shares(part, shares)
            else:
                mean = weighted_sum(weights.to(part), part)
            if not all_finite(mean):
                raise self._bad_values(entry)
            yield mean

    def _gram(self, entry: TensorEntry) -> Tensor:
        """Inner products of the anchors' tensors, ``(k, k)``."""
        gram = stacked_gram_of(part for part, _ in self.reader.parts(entry.name))
        if not all_finite(gram):
            raise self._bad_values(entry)
        return gram

    def _shares(
        self, name: str, fishers: list[Tensor], weights: Tensor, floors: list[float], like: Tensor
    ) -> Iterator[Tensor]:
        """Shares w (f + floor) of one part of a tensor; all but the first come in one buffer."""
        buffer = None
        for index, fisher in enumerate(fishers):
            weight, floor = float(weights[index]), floors[index]
            f = fisher.to(like.device, like.dtype)
            base = torch.tensor(weight * floor, dtype=like.dtype, device=like.device)
            if index < 2:
                buffer = torch.empty_like(like[0])
            share = torch.add(base, f, alpha=weight, out=buffer)
            # Rounding is monotone: a share is below that of zero only where f is.
            seen, bound = (share, base) if weight > 0 else (f, torch.zeros_like(base))
            least = seen.amin()
            if not bool(least >= bound if floor > 0 else least > bound):
                raise self._bad_fisher(name, index, float(f.amin()))
            yield share

    def _bad_fisher(self, name: str, index: int, least: float) -> CheckpointError:
        why = (
            "has entries of zero; pass damping > 0, and collect it on inputs that this parameter "
            "acts on"
            if least == 0
            else "is negative or not finite; collect it again"
        )
        path = self.diagonals[index].path if self.diagonals else ""
        return CheckpointError(f"{path}: the Fisher information of {name!r} {why}")

    def _equal(self, entry: TensorEntry) -> Iterator[Tensor]:
        counter = entry.name.endswith("num_batches_tracked")
        for (first, *others), _ in self.reader.stored(entry.name):
            if not counter and not all(torch.equal(first, x) for x in others):
                raise CheckpointError(
                    f"tensor {entry.name!r} holds {entry.dtype} numbers, which have no mean, and "
                    "they differ between the models; merge models with the same"
                )
            yield first

    def _bad_values(self, entry: TensorEntry) -> CheckpointError:
        for model in self.models:
            model.check_finite(entry.name, model.read(entry.name))
        return CheckpointError(f"the mean of tensor {entry.name!r} is beyond float32")

    # --- all tensors -----------------------------------------------------------------------------

    @property
    def needs_gram(self) -> bool:
        """Whether the mean is a combination of the anchors that depends on their inner products."""
        return len(self.models) > 1 and (self.geometry == "sphere" or self.p == 1)

    def begin(self) -> None:
        """What has to be known of all tensors before the first one is merged."""
        if self.geometry == "permutation":
            self._merge_networks()
            return
        if not self.needs_gram or self.scope == "tensor":
            return
        total = torch.zeros(len(self.models), len(self.models), dtype=torch.float64)
        for name in self._averaged:
            total += self._gram(self.models[0].tensors[name])
        self.release()
        self.whole = total

    @property
    def _averaged(self) -> list[str]:
        tensors = self.models[0].tensors.values()
        return [entry.name for entry in tensors if entry.dtype.is_floating_point]

    @property
    def copied(self) -> tuple[str, ...]:
        """Tensors that are not averaged."""
        tensors = self.models[0].tensors.values()
        return tuple(x.name for x in tensors if not x.dtype.is_floating_point)

    def weights_of(self, name: str) -> list[float]:
        """Normalised weights of the models for one tensor."""
        for pattern, weights in self.layer_weights.items():
            if _compiled(pattern).match(name):
                return weights
        return self.weights

    def _merge_networks(self) -> None:
        assert self.symmetry is not None
        states = [read_state(model) for model in self.models]
        self.release()
        merge = merge_networks(states, self.symmetry, self.weights, p=self.p, **self.gauges)
        if not merge.solution.converged:
            logger.warning("merge of networks: %s", merge.solution.message)
        self.state = merge.state

    def release(self) -> None:
        """Let go of the files."""
        self.reader.release()

    @property
    def recipe(self) -> dict[str, Any]:
        """All options."""
        return {
            "manifold_merge": __version__,
            "models": [model.path.resolve().name for model in self.models],
            "weights": self.weights,
            "layer_weights": self.layer_weights,
            "geometry": self.geometry,
            "scope": self.scope,
            "p": self.p,
            **({"damping": self.damping} if self.diagonals else {}),
            **self.gauges,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
        }

    def fingerprint(self, layout: Mapping[str, Sequence[str]]) -> str:
        """Of everything that the result depends on."""
        files = [model.fingerprint() for model in self.models]
        files += [file.fingerprint() for file in self.diagonals or ()]
        paths = [str(model.path.resolve()) for model in self.models]
        symmetry = None if self.symmetry is None else self.symmetry.to_dict()
        text = json.dumps([self.recipe, self.device.type, paths, files, layout, symmetry])
        return hashlib.sha256(text.encode()).hexdigest()
