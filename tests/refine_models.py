"""Small models with adapters and inputs, for the functional distance and its minimisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft_models as models
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def gauges(adapter: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same updates from other factors."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, (b, a) in adapter.items():
        g = torch.randn(b.shape[1], b.shape[1], generator=generator, dtype=b.dtype)
        g += 3 * torch.eye(len(g), dtype=b.dtype)
        moved[name] = b @ g, torch.linalg.inv(g) @ a
    return moved


def random_factors(
    model: nn.Module, names: list[str], rank: int, seed: int, size: float = 0.3
) -> dict[str, tuple[Tensor, Tensor]]:
    """Random updates of linear layers, in the model's type."""
    generator = torch.Generator().manual_seed(seed)
    found, factors = dict(model.named_modules()), {}
    for name in names:
        weight = found[name].weight
        m, n = weight.shape if isinstance(found[name], nn.Linear) else weight.shape[::-1]
        b = torch.randn(m, rank, generator=generator, dtype=weight.dtype)
        a = torch.randn(rank, n, generator=generator, dtype=weight.dtype)
        factors[name] = size * b, size * a
    return factors


BERT_NAMES = [
    f"encoder.layer.{i}.{part}"
    for i in range(2)
    for part in ("attention.self.query", "attention.self.value", "output.dense")
]


Adapters = list[dict[str, tuple[Tensor, Tensor]]]

MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "encoder": (models.bert, BERT_NAMES),
    "decoder with Conv1D": (models.gpt2, ["h.0.attn.c_attn", "h.1.mlp.c_fc", "h.1.mlp.c_proj"]),
    "decoder with a head": (
        llama,
        ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
        + [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"],
    ),
}


def texts(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(2, 9, (), generator=generator))
        body = torch.randint(3, models.VOCABULARY, (length,), generator=generator).tolist()
        made.append([1, *body, 2])
    return made


def setting(kind: str = "encoder", rank: int = 2, size: float = 0.5) -> tuple[Any, ...]:
    """A model, two adapters, their mean at the same rank, and inputs."""
    build, names = MODELS[kind]
    model = models.make(build)
    adapters = [random_factors(model, names, rank, seed, size) for seed in (1, 2)]
    mean = {}
    for name in names:
        total = sum(0.5 * x[name][0] @ x[name][1] for x in adapters)
        u, s, vt = torch.linalg.svd(total, full_matrices=False)
        mean[name] = u[:, :rank] * s[:rank], vt[:rank]
    return model, adapters, mean, [texts(24, 3), texts(24, 4)]


QUICK = {"steps": 20, "evaluate_every": 8, "batch_size": 4, "learning_rate": 0.03}


def conv_data() -> tuple[nn.Module, Adapters, Any, list[list[Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5)
    ).double()

    def factors() -> dict[str, tuple[Tensor, Tensor]]:
        return {
            "0": (torch.randn(3, 2).double(), torch.randn(2, 18).double()),
            "3": (torch.randn(5, 2).double(), torch.randn(2, 12).double()),
        }

    data = [list(torch.randn(60, 2, 4, 4).double()) for _ in range(2)]
    return model, [factors(), factors()], factors(), data
