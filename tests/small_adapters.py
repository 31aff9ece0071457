"""Adapters of any shapes with random factors, made without PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft_models import plain_config
from safetensors.torch import load_file, save_file

Shapes = dict[str, tuple[int, int, int]]  # module: m, n, r

PLAIN: Shapes = {"layer.0.query": (9, 7, 3), "layer.1.query": (9, 7, 3), "layer.10.up": (8, 12, 2)}
OTHER_RANKS: Shapes = {
    "layer.0.query": (9, 7, 2),
    "layer.1.query": (9, 7, 5),
    "layer.10.up": (8, 12, 2),
}
FEWER: Shapes = {"layer.0.query": (9, 7, 3)}
MORE: Shapes = PLAIN | {"layer.2.key": (4, 4, 1)}


def adapter(
    folder: Path,
    shapes: Shapes = PLAIN,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    size: float = 1.0,
    **config: Any,
) -> Path:
    """An adapter with random factors; ranks by ``rank_pattern``, scaling alpha/r = 4/r."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (m, n, r) in shapes.items():
        stem = f"base_model.model.{name}"
        a, b = (torch.randn(s, generator=generator, dtype=dtype) for s in ((r, n), (m, r)))
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a, b * size
    config = {
        "rank_pattern": {f"^{re.escape(name)}": r for name, (_, _, r) in shapes.items()},
        "target_modules": list(shapes),
    } | config
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(plain_config(**config)))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
