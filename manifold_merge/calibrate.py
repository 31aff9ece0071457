"""Calibrate an adapter: measure on a few unlabelled texts what its merges should preserve.

The result is a small file beside the adapter, ``merge_statistics.safetensors``, with second moments
of the inputs of its layers. It stands in for the texts: ``merge_adapters(geometry="fisher")`` needs
nothing else, so that nobody has to share data. What such a file can leak is said in docs/fisher.md.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_merge.adapted_model import AdaptedModel, Updates
from manifold_merge.adapters import Adapter
from manifold_merge.examples import Batch, as_examples, collate
from manifold_merge.functional import by_length
from manifold_merge.statistics import STATISTICS_NAME, Statistics, collect_statistics

__all__ = ["DEFAULT_DRAWS", "DEFAULT_RANK", "DEFAULT_TEXTS", "calibrate_adapter"]

# Keeps the file no larger than a few adapters and the pass below 1.5 forward passes.
DEFAULT_RANK = 128
DEFAULT_TEXTS = 128
# With one draw a text, Grams of gradients were too noisy to help; four added little to two.
DEFAULT_DRAWS = 2


def calibrate_adapter(
    adapter: str | os.PathLike[str] | Adapter,
    model: nn.Module,
    data: Sequence[Any],
    output: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    kind: Literal["input_gram", "kfac"] = "input_gram",
    likelihood: Literal["gaussian", "categorical"] = "gaussian",
    rank: int | None = DEFAULT_RANK,
    draws: int = DEFAULT_DRAWS,
    limit: int | None = DEFAULT_TEXTS,
    max_tokens: int = 512,
    batch_size: int = 32,
    seed: int = 0,
    model_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Measure the inputs of an adapter's layers, with the adapter applied, in one pass.

    Args:
        adapter: A folder in PEFT's format, or an opened :class:`Adapter`.
        model: The base model, without adapters; it is left as it was.
        data: Unlabelled texts of the adapter's task (with a tokenizer), lists of token ids, or
            tensors, such as images.
        output: Where to write: a file, or a folder. Nothing is written if ``None``.
        tokenizer: Called with a list of texts, as those of transformers are.
        kind: ``"input_gram"`` needs forward passes only; ``"kfac"`` adds output-gradient Grams
            and backward passes.
        likelihood: For ``"kfac"``: ``"gaussian"``, changes of the last hidden state, averaged over
            the tokens, count by their squared length relative to its variance between texts;
            ``"categorical"``, changes of the logits' distribution count.
        rank: Rank at which wide Grams are stored, beside their exact diagonal; those of output
            gradients keep half of it. ``None`` stores every Gram exactly.
        draws: For ``"kfac"``: backward passes for each batch, each of random directions.
        limit: Use that many of the data, drawn at random; all if ``None``.
        max_tokens: Longer texts are cut.
        batch_size: Texts in one batch.
        seed: Of the drawn texts, and of labels drawn from the model.
        model_name: What to call the model in the file; what the adapter says if ``None``.
        progress: Called with the number of batches done and in all.

    Returns:
        The statistics, of the modules that the adapter adapts.

    Raises:
        AdapterError: The adapter is damaged.
        ValueError: The model lacks a module of the adapter, the data are empty or of mixed kinds,
            or an option is unknown; the message says what to do.

    Example:
        >>> import json, tempfile
        >>> from safetensors.torch import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["0"]}
        >>> _ = (folder / "adapter_config.json").write_text(json.dumps(config))
        >>> save_file({"base_model.model.0.lora_A.weight": torch.randn(1, 3),
        ...            "base_model.model.0.lora_B.weight": torch.randn(4, 1)},
        ...           folder / "adapter_model.safetensors")
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> images = list(torch.randn(10, 3))
        >>> calibrate_adapter(folder, model, images, folder)
        Statistics('input_gram', modules=1, examples=10, bytes=36)
        >>> (folder / "merge_statistics.safetensors").exists()
        True
    """
    if kind not in ("input_gram", "kfac"):
        raise ValueError(
            f"kind must be input_gram or kfac, got {kind!r}; a diagonal Fisher does not keep "
            "updates low-rank"
        )
    if likelihood not in ("gaussian", "categorical"):
        raise ValueError(f"likelihood must be gaussian or categorical; got {likelihood!r}")
    if draws < 1:
        raise ValueError(f"draws: expected 1 or more, got {draws}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a positive number or None, got {limit}")
    opened = adapter if isinstance(adapter, Adapter) else Adapter(adapter)
    chosen = list(data)
    if limit is not None and len(chosen) > limit:
        chosen = random.Random(seed).sample(chosen, limit)
    examples = as_examples(chosen, tokenizer, max_tokens=max_tokens)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    updates = Updates.read(opened, dtype, device)
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    batches = by_length(examples, batch_size)

    def collated() -> Iterator[dict[str, Tensor]]:
        for done, batch in enumerate(batches):
            if progress is not None:
                progress(done, len(batches))
            one = collate(batch, device, pad)
            mask = {} if one.mask is None else {"attention_mask": one.mask}
            yield {"inputs": one.inputs, **mask}
        if progress is not None:
            progress(len(batches), len(batches))

    adapted = AdaptedModel(model, [updates], pad=pad)

    def forward(_: nn.Module, batch: dict[str, Tensor]) -> Any:
        mask = batch.get("attention_mask")
        if kind == "kfac" and likelihood == "categorical":
            return _logits(model, batch["inputs"], mask)
        return adapted(Batch(batch["inputs"], mask), updates)

    variance = _Variance()

    def features(hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        mask = batch.get("attention_mask")
        if likelihood == "categorical":
            return hidden
        if mask is not None and hidden.ndim == 3:
            kept = mask[..., None].to(hidden)
            hidden = (hidden * kept).sum(1) / kept.sum(1)
        variance.add(hidden.detach())
        return hidden

    # Until the last backward pass, which uses the replaced tensors too.
    with adapted, adapted._replace(updates.replaced):
        adapted.current = updates
        statistics = collect_statistics(
            model,
            collated(),
            sorted(updates.factors),
            kind=kind,
            rank=rank,
            forward=forward,
            output=features,
            likelihood=likelihood,
            draws=draws,
            output_rank=None if rank is None else max(1, rank // 2),
            seed=seed,
            model_name=model_name or opened.base_model,
        )
    if kind == "kfac" and likelihood == "gaussian":
        # Adapters whose features spread more would else count more than the others.
        spread = variance.total() or 1.0
        statistics = dataclasses.replace(
            statistics,
            output_grams={n: g.scaled(1 / spread) for n, g in statistics.output_grams.items()},
            options={**statistics.options, "feature_variance": spread},
        )
    if output is not None:
        target = Path(output)
        statistics.save(target / STATISTICS_NAME if target.is_dir() else target)
    return statistics


class _Variance:
    """Sum of the variances of all features between examples, over batches."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, torch.zeros(()), 0.0

    def add(self, features: Tensor) -> None:
        rows = features.reshape(len(features), -1).double().cpu()
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0)
        self.squares += float(rows.square().sum())

    def total(self) -> float:
        mean = self.sum / max(self.count, 1)
        variance = self.squares / max(self.count, 1) - float(mean.square().sum())
        # Of one text, or of copies of one, only the rounding of this difference is left.
        return variance if variance > 1e-9 * self.squares else 0.0


def _logits(model: nn.Module, inputs: Tensor, mask: Tensor | None) -> Tensor:
    result = model(inputs) if mask is None else model(input_ids=inputs, attention_mask=mask.long())
    logits = getattr(result, "logits", result)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"likelihood='categorical': {type(model).__name__} returns no logits; use 'gaussian', "
            "or a model with its head"
        )
    return logits
