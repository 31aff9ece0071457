"""The README that travels with a merged adapter: what it is made of and how."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from manifold_merge.adapters import Adapter

__all__ = ["model_card"]


def model_card(recipe: Mapping[str, Any], adapters: Sequence[Adapter]) -> str:
    """Describe a merge in Markdown.

    Args:
        recipe: :attr:`manifold_merge.merge.AdapterMerge.recipe`.
        adapters: The inputs, in the order of the recipe.

    Returns:
        Text with a table of the inputs, their weights and ranks, and the exact recipe.
    """
    rows = []
    for adapter, weight in zip(adapters, recipe["weights"], strict=True):
        ranks = sorted({module.rank for module in adapter.modules.values()})
        rows.append(f"| `{adapter.path.resolve().name}` | {weight:.6g} | {str(ranks)[1:-1]} |")
    table = "\n".join(rows)
    base = adapters[0].base_model or "not stated by the adapters"
    rank = f"Rank {recipe['rank']}: {recipe['rank_chosen_because']}.\n\n"
    kind = "sum" if recipe["sum"] else "Fréchet median" if recipe["p"] == 1 else "Fréchet mean"
    return (
        f"# Merged LoRA adapter\n\nA {kind} of {len(adapters)} LoRA adapters of `{base}`, made "
        f"with manifold-merge {recipe['manifold_merge']}. The scaling of each input is folded in, "
        "the scaling of this adapter is 1 (`lora_alpha` equals the rank).\n\n"
        f"| adapter | weight | ranks |\n|---|---|---|\n{table}\n\n{rank}"
        f"## Recipe\n\n```json\n{json.dumps(recipe, indent=2)}\n```\n"
    )
