"""Carry out a recipe of mergekit: its weights for each tensor, and the same mean here."""

from __future__ import annotations

import collections
import glob
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from manifold_merge.checkpoint_merge import ModelMerge, merge_models
from manifold_merge.checkpoints import Checkpoint
from manifold_merge.mergekit_config import MergekitError, MergekitRecipe, Slice, read_mergekit

__all__ = ["merge_mergekit", "mergekit_weights"]

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"(.*?)\.(\d+)\.")
# What comes before and after the layers, where slices say different things about them.
_BEFORE = re.compile(r"(^|[._])(embed_tokens|embeddings?|wte|wpe|embed_in|embed_positions)[._]")
_AFTER = re.compile(
    r"(^|[._])(norm|ln_f|final_layer_?norm|final_norm|lm_head|embed_out|score|pooler|classifier)[._]"
)
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
               "added_tokens.json", "spiece.model")  # fmt: skip


def merge_mergekit(
    config: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    max_shard_size: int | None = None,
    max_bytes: int | None = None,
    allow_different_config: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ModelMerge:
    """Merge whole models by a YAML configuration of mergekit.

    ``linear`` and ``task_arithmetic`` are weighted averages, ``slerp`` and ``karcher`` means on the
    sphere (:func:`~manifold_merge.merge_models` with ``geometry="sphere"``). What mergekit has and
    this does not is refused by name, before any weight is read.

    Args:
        config: The YAML file. Folders in it are relative to the working directory, as in mergekit.
        output: As for ``merge_models``, and so are the other arguments.
        device: Where to compute.
        max_shard_size: Bytes of tensors in one file.
        max_bytes: Bytes of the models in memory at a time.
        allow_different_config: Accept configurations that differ in what a model computes.
        overwrite: Replace an existing folder that holds a merged model.
        progress: Called with the number of entries done and in all.

    Returns:
        The folder and the recipe, in the words of ``merge_models``.

    Raises:
        MergekitError: A key, method or parameter is not supported, or does not fit the models.
        FileNotFoundError: The file or a model is missing.
        CheckpointError: A checkpoint is damaged, holds NaN, or does not fit the others.
        FileExistsError: The output exists; pass ``overwrite=True``.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file, save_file
        >>> root = Path(tempfile.mkdtemp())
        >>> for name, value in (("a", 1.0), ("b", 3.0)):
        ...     (root / name).mkdir()
        ...     save_file({"w": torch.full((2,), value)}, root / name / "model.safetensors")
        >>> text = f'''
        ... merge_method: linear
        ... models:
        ...   - {{model: {root}/a, parameters: {{weight: 3}}}}
        ...   - {{model: {root}/b, parameters: {{weight: 1}}}}
        ... '''
        >>> _ = (root / "recipe.yml").write_text(text)
        >>> merged = merge_mergekit(root / "recipe.yml", root / "merged")
        >>> load_file(merged.output / "model.safetensors")["w"]
        tensor([1.5000, 1.5000])
    """
    recipe = read_mergekit(config)
    models = [Checkpoint(name) for name in recipe.models]
    _check_tokenizers(recipe, models)
    names = [x.name for x in models[0].tensors.values() if x.dtype.is_floating_point]
    weights = mergekit_weights(recipe, names, models[0].config)
    usual = collections.Counter(weights.values()).most_common(1)[0][0] if weights else None
    spherical = recipe.method in ("slerp", "karcher")
    if recipe.method == "karcher" and recipe.parameters:
        logger.warning(
            "%s: %s: the mean is iterated to round-off in any case", recipe.path,
            ", ".join(recipe.parameters),
        )  # fmt: skip
    return merge_models(
        models,
        output,
        weights=usual,
        layer_weights=_patterns(weights, usual),
        geometry="sphere" if spherical else "euclidean",
        dtype=recipe.dtype,
        device=device,
        max_shard_size=max_shard_size,
        max_bytes=max_bytes,
        allow_different_config=allow_different_config,
        overwrite=overwrite,
        progress=progress,
    )


def mergekit_weights(
    recipe: MergekitRecipe, names: Sequence[str], config: dict[str, Any]
) -> dict[str, tuple[float, ...]]:
    """The weights of the models for each tensor; they sum to 1.

    Args:
        recipe: From :func:`~manifold_merge.mergekit_config.read_mergekit`.
        names: Of the tensors that are averaged.
        config: ``config.json`` of the first model, for the number of layers.

    Returns:
        Name to one weight for each of ``recipe.models``.

    Raises:
        MergekitError: A parameter is missing or out of range, or slices do not cover all layers.
    """
    places = _places(recipe, names, config)
    return {name: _weights(recipe, name, *places[name]) for name in names}


def _weights(recipe: MergekitRecipe, name: str, part: Slice, t: float | None) -> tuple[float, ...]:
    def of(key: str, default: float | None = None) -> float:
        value = recipe.setting(key, name, t, part)
        value = default if value is None else value
        if value is None:
            raise MergekitError(f"{recipe.path}: parameters.{key} is missing for tensor {name!r}")
        return float(value)

    count = len(recipe.models)
    if recipe.method == "karcher":
        return (1 / count,) * count
    if recipe.method == "slerp":
        share = of("t")
        if not 0 <= share <= 1:
            raise MergekitError(f"{recipe.path}: t: expected 0 to 1, got {share} for {name!r}")
        return (1 - share, share)
    sources = {source.model: source for source in part.sources}
    arithmetic = recipe.method == "task_arithmetic"
    given = []
    for model in recipe.models[1:] if arithmetic else recipe.models:
        value = recipe.setting("weight", name, t, part, sources[model])
        if value is None:
            raise MergekitError(
                f"{recipe.path}: weight of {model} is missing for tensor {name!r}; give it in the "
                "parameters of the model"
            )
        given.append(float(value))
    total = sum(given)
    if of("normalize", 0.0 if arithmetic else 1.0):
        if total <= 0:
            raise MergekitError(
                f"{recipe.path}: the weights {given} of tensor {name!r} have no positive sum"
            )
        given = [w / total for w in given]
    if arithmetic:  # base + λ Σ wᵢ (xᵢ - base)
        given = [of("lambda", 1.0) * w for w in given]
        own = 1 - sum(given)
        given = [0.0 if abs(own) < 1e-9 else own, *given]  # 0.7 + 0.2 + 0.1 is not 1
    elif abs(sum(given) - 1) > 1e-6:
        raise MergekitError(
            f"{recipe.path}: normalize: false with weights of sum {sum(given):.6g} for tensor "
            f"{name!r}: a sum that is not 1 is no mean; set normalize: true"
        )
    if min(given) < 0:
        extra = f" for the base ({1 - given[0]:.6g} of the tasks)" if arithmetic else ""
        raise MergekitError(
            f"{recipe.path}: tensor {name!r} has a negative weight{extra}, {given}; only means are "
            "taken here: lower the weights, or merge adapters with manifold-merge adapters --sum"
        )
    return tuple(given)


def _places(
    recipe: MergekitRecipe, names: Sequence[str], config: dict[str, Any]
) -> dict[str, tuple[Slice, float | None]]:
    """For each tensor its slice, and how deep in it the tensor is."""
    numbered = {name: match for name in names if (match := _LAYER.match(name))}
    stacks = sorted({match[1] for match in numbered.values()})
    whole = [source.layers for part in recipe.slices for source in part.sources] == [None] * len(
        recipe.models
    )
    counts = [config[key] for key in _LAYER_COUNTS if isinstance(config.get(key), int)]
    count = counts[0] if counts else 1 + max((int(m[2]) for m in numbered.values()), default=0)
    if whole:
        ranges = [(0, count)]
    else:
        ranges = _ranges(recipe, count)
        if len(stacks) > 1:
            raise MergekitError(
                f"{recipe.path}: slices of a model with the stacks {', '.join(stacks)}: it cannot "
                "be told which of them layer_range means; use models:"
            )
    found: dict[str, tuple[Slice, float | None]] = {}
    for name in names:
        number: int = 0
        t: float | None = 0.0  # also for what comes after the layers, as in mergekit 0.1
        if name in numbered:
            layer = int(numbered[name][2])
            number = next((i for i, (a, b) in enumerate(ranges) if a <= layer < b), 0)
            first, last = ranges[number]
            t = None
            if len(stacks) == 1 and first <= layer < last:
                t = (layer - first) / (last - first - 1) if last - first > 1 else 1.0
        elif _AFTER.search(name):
            number = len(ranges) - 1
        elif len(ranges) > 1 and not _BEFORE.search(name):
            raise MergekitError(
                f"{recipe.path}: it cannot be told which of the slices tensor {name!r} is in; use "
                "models:, with a filter for it"
            )
        found[name] = recipe.slices[number], t
    return found


def _ranges(recipe: MergekitRecipe, count: int) -> list[tuple[int, int]]:
    """Layers of each slice; together they have to be all layers, in order."""
    ranges: list[tuple[int, int]] = []
    end = 0
    for number, part in enumerate(recipe.slices):
        layers = {source.layers for source in part.sources}
        one = next(iter(layers))
        if len(layers) > 1 or one is None or one[0] != end:
            raise MergekitError(
                f"{recipe.path}: slices[{number}]: the same layers of all models are expected, "
                f"from layer {end} on; got {sorted(map(str, layers))}. Other orders make a new "
                "architecture, which is no mean"
            )
        ranges.append(one)
        end = one[1]
    if end != count:
        raise MergekitError(
            f"{recipe.path}: the slices end at layer {end}, and the models have {count}; a mean "
            "has all layers"
        )
    return ranges


def _patterns(
    weights: dict[str, tuple[float, ...]], usual: Sequence[float] | None
) -> dict[str, list[float]]:
    """Patterns for the tensors whose weights are not the usual ones; whole layers together."""
    layers: dict[str, set[tuple[float, ...]]] = {}
    for name, own in weights.items():
        if match := _LAYER.match(name):
            layers.setdefault(match[0], set()).add(own)
    patterns: dict[str, list[float]] = {}
    for name, own in weights.items():
        if own == usual:
            continue
        match = _LAYER.match(name)
        together = match is not None and len(layers[match[0]]) == 1
        pattern = f"{glob.escape(match[0])}*" if match and together else glob.escape(name)
        patterns[pattern] = list(own)
    return patterns


def _check_tokenizers(recipe: MergekitRecipe, models: Sequence[Checkpoint]) -> None:
    """Raise if rows of embeddings would have to be brought to another vocabulary."""
    if recipe.tokenizer is None:
        return
    known = ("base", "union", *recipe.models)
    if recipe.tokenizer not in known:
        raise MergekitError(
            f"{recipe.path}: tokenizer_source: {recipe.tokenizer} is none of the models; the "
            f"output has the tokenizer of {recipe.models[0]}, copy another one into it"
        )
    first = models[0].folder
    for other in models[1:]:
        for file in _VOCABULARY:
            one, two = first / file, other.folder / file
            if _content(one) != _content(two):
                raise MergekitError(
                    f"{recipe.path}: tokenizer_source: {two} differs from {one}, so that rows of "
                    "the embeddings would have to be reordered; bring the models to one tokenizer "
                    "first (mergekit-tokensurgeon)"
                )


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None
