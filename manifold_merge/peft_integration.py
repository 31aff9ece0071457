"""Merge adapters inside a live PEFT model, in place of ``add_weighted_adapter``."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifold_merge.merge import AdapterMerge, merge_adapters

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["add_frechet_adapter"]


def add_frechet_adapter(
    model: PeftModel,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    adapter_name: str = "merged",
    **options: Any,
) -> AdapterMerge:
    """Add the Fréchet mean of adapters of a PEFT model to it, as one more adapter.

    The habits are those of ``PeftModel.add_weighted_adapter``: the new adapter is there but not
    active, so call ``model.set_adapter(adapter_name)``. Unlike there, weights are divided by their
    sum (``sum=True`` takes them as they are), a name that is taken is an error, and what cannot be
    merged correctly is refused.

    Args:
        model: A model with LoRA adapters.
        adapters: Names of the adapters to merge, at least one.
        weights: One weight for each adapter. Equal if ``None``.
        adapter_name: Name of the new adapter.
        **options: Any other option of :func:`~manifold_merge.merge.merge_adapters`: ``geometry``,
            ``distance``, ``rank``, ``scale``, ...

    Returns:
        The merge, with its recipe; the factors are in the model.

    Raises:
        ValueError: A name is unknown or taken, or an option does not fit.
        AdapterError: An adapter cannot be merged correctly; the message says why.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), config, "law")
        >>> model.add_adapter("code", config)
        >>> merge = add_frechet_adapter(model, ["law", "code"], [2, 1], "both", rank=2)
        >>> merge.recipe["geometry"], sorted(model.peft_config)
        ('lifted', ['both', 'code', 'law'])
        >>> model.set_adapter("both")
    """
    known = sorted(model.peft_config)
    unknown = [name for name in adapters if name not in known]
    if unknown:
        raise ValueError(
            f"adapters: the model has no adapter {unknown[0]!r}; it has {', '.join(known)}"
        )
    if adapter_name in known:
        raise ValueError(
            f"adapter_name: the model has an adapter {adapter_name!r} already; choose another name "
            "or call model.delete_adapter first"
        )
    if adapter_name in "lora_":
        raise ValueError(
            f"adapter_name: PEFT mistakes {adapter_name!r} for a part of the prefix 'lora_' when "
            "it loads an adapter; choose another name"
        )
    if options.keys() & {"output", "overwrite"}:
        raise ValueError(
            "output: the result is added to the model; save it with model.save_pretrained"
        )
    # PEFT's own files carry every convention (scalings, patterns, saved modules) to one reader.
    with tempfile.TemporaryDirectory(prefix="manifold-merge-") as root:
        model.save_pretrained(
            root, selected_adapters=list(set(adapters)), save_embedding_layers=False
        )
        folders = [Path(root) if name == "default" else Path(root) / name for name in adapters]
        output = Path(root) / ".merged"
        merged = merge_adapters(folders, output, weights=weights, **options)
        model.load_adapter(str(output), adapter_name, is_trainable=False)
    recipe = {**merged.recipe, "adapters": list(adapters)}
    return dataclasses.replace(merged, recipe=recipe, output=None)
