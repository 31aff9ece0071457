"""Tiny base models, PEFT adapters for them with random contents, and folders made by hand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2Model

VOCABULARY = 23


def _bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
        num_labels=3,
    )


def bert() -> nn.Module:
    return BertModel(_bert_config())


def bert_classifier() -> nn.Module:
    return BertForSequenceClassification(_bert_config())


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=12,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2Model(config)


class Mixed(nn.Module):
    """Every kind of layer that PEFT adapts, at the top level and below it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.conv1d = nn.Conv1d(8, 6, 3, padding=1)
        self.block = nn.ModuleDict(
            {
                "conv2d": nn.Conv2d(6, 5, (3, 2), padding=1),
                "point": nn.Conv2d(5, 4, 1),
                "conv3d": nn.Conv3d(4, 3, (1, 2, 2)),
            }
        )
        self.head = nn.Linear(3, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv1d(self.embed(input_ids).mT))
        x = torch.tanh(self.block["conv2d"](x.unsqueeze(-1)))
        x = torch.tanh(self.block["point"](x))
        x = torch.tanh(self.block["conv3d"](x.unsqueeze(2)))
        return self.head(x.mean((2, 3, 4)))


class Attention(nn.Module):
    """``torch.nn.MultiheadAttention``, which PEFT wraps twice, beside a layer it must not touch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layer = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})
        self.out_proj = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.out_proj(self.layer["attention"](x, x, x, need_weights=False)[0])


class Names(nn.Module):
    """Module names that are suffixes or prefixes of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.dense = nn.Linear(6, 6)
        self.layer = nn.ModuleDict({str(i): nn.Linear(6, 6) for i in (1, 11, 111)})
        self.block = nn.ModuleDict({"dense": nn.Linear(6, 6), "1": nn.Linear(6, 6)})
        self.sub = nn.ModuleDict({"layer": nn.ModuleDict({"1": nn.Linear(6, 6)})})

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.dense(self.embed(input_ids)))
        for layer in (*self.layer.values(), *self.block.values(), self.sub["layer"]["1"]):
            x = torch.tanh(layer(x))
        return x


class Mlp(nn.Module):
    """The smallest model with several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.net = nn.ModuleDict(
            {"up": nn.Linear(8, 10), "mid": nn.Linear(10, 10), "down": nn.Linear(10, 6)}
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.net["up"](self.embed(input_ids)))
        return self.net["down"](torch.tanh(self.net["mid"](x)))


def make(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same base model at every call, without dropout."""
    torch.manual_seed(0)
    return build().to(dtype).eval()


def inputs() -> Tensor:
    return torch.arange(20).reshape(2, 10) % VOCABULARY


def output(model: nn.Module) -> Tensor:
    """The model's output on :func:`inputs` as one tensor."""
    with torch.no_grad():
        result = model(input_ids=inputs())
    if isinstance(result, Tensor):
        return result
    return result.logits if "logits" in result else result.last_hidden_state


def randomise(model: nn.Module, seed: int) -> None:
    """Fill all that PEFT trains with random values, so that no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data += noise


def adapt(
    build: Callable[[], nn.Module],
    seed: int = 1,
    dtype: torch.dtype = torch.float64,
    **config: Any,
) -> PeftModel:
    """A model with a random LoRA adapter."""
    options = {"r": 3, "lora_alpha": 6} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT remarks on unusual but valid configurations
        torch.manual_seed(100 + seed)
        model = get_peft_model(make(build, dtype), LoraConfig(**options)).eval()
    randomise(model, seed)
    return model


def save(model: PeftModel, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), **options)
    return folder


def load(
    build: Callable[[], nn.Module], folder: Path, dtype: torch.dtype = torch.float64
) -> PeftModel:
    """Load with PEFT; its remark that keys are missing from the file is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(make(build, dtype), str(folder)).eval()


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's wrapped layers, by their name in the base model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


STEM = "base_model.model.layer.{}.query"


def plain_config(**updates: Any) -> dict[str, Any]:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["query"]).to_dict()
    config |= {"base_model_name_or_path": "base", "peft_type": "LORA", "target_modules": ["query"]}
    return config | updates


def plain_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(2):
        stem = STEM.format(i)
        tensors[f"{stem}.lora_A.weight"] = torch.randn(2, 4, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(5, 2, generator=generator)
    return tensors


def write_plain(
    folder: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor | None] | None = None,
) -> Path:
    """A folder made without PEFT; ``tensors`` are added, or removed where None."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(plain_config(**(config or {}))))
    merged = plain_tensors() | (tensors or {})
    save_file(
        {key: value for key, value in merged.items() if value is not None},
        folder / "adapter_model.safetensors",
    )
    return folder
