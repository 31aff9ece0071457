"""add_frechet_adapter on live models, against the folders' merge and PEFT's own ``svd``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import bert

from manifold_merge import merge_adapters
from manifold_merge.adapter_config import AdapterError
from manifold_merge.peft_integration import add_frechet_adapter

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {"r": 2, "lora_alpha": 4},
    "law": {"r": 3, "lora_alpha": 3, "use_rslora": True},
    "code": {"r": 2, "rank_pattern": {"0.attention.self.query": 4}, "lora_alpha": 8},
}


def model_with(configs: dict[str, dict[str, Any]]) -> PeftModel:
    torch.manual_seed(0)
    model: Any = bert().eval()
    for name, given in configs.items():
        config = LoraConfig(target_modules=["query", "value"], init_lora_weights=False, **given)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, name)
    return model.eval()


def delta(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    return {
        key: layer.get_delta_weight(name).detach()
        for key, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and name in layer.lora_A
    }


def test_same_as_the_merge_of_folders(tmp_path: Path) -> None:
    model = model_with(CONFIGS)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    merge = add_frechet_adapter(model, list(CONFIGS), [1, 2, 1], "mean", geometry="lifted")
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    folders = [tmp_path, tmp_path / "law", tmp_path / "code"]
    expected = merge_adapters(folders, weights=[1, 2, 1], geometry="lifted").modules
    found = delta(model, "mean")
    assert len(found) == len(expected) == 4
    for name, (b, a) in expected.items():
        assert torch.allclose(found[f"base_model.model.{name}"], b @ a, atol=1e-6)
    assert merge.recipe["adapters"] == list(CONFIGS)
    assert merge.output is None
    assert model.active_adapters == ["default"]  # as add_weighted_adapter leaves it
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_embedded_chordal_is_peft_svd() -> None:
    model = model_with({"one": {"r": 2}, "two": {"r": 2}})
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "theirs", combination_type="svd")
    add_frechet_adapter(
        model, ["one", "two"], None, "ours", geometry="embedded", distance="chordal"
    )
    ours, theirs = delta(model, "ours"), delta(model, "theirs")
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], atol=1e-5)


def test_the_adapter_can_be_used_and_saved(tmp_path: Path) -> None:
    model = model_with({"default": {"r": 2}})
    add_frechet_adapter(model, ["default"], adapter_name="copy")
    inputs = torch.arange(6)[None]
    with torch.no_grad():
        first = model(inputs).last_hidden_state
        model.set_adapter("copy")
        second = model(inputs).last_hidden_state
    assert torch.allclose(first, second, atol=1e-5)
    model.save_pretrained(str(tmp_path), selected_adapters=["copy"], save_embedding_layers=False)
    assert (tmp_path / "copy" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"adapters": ["default", "lore"]}, ValueError, "no adapter 'lore'; it has code, default"),
        ({"adapter_name": "law"}, ValueError, "has an adapter 'law' already"),
        ({"adapter_name": "a"}, ValueError, "PEFT mistakes 'a' for a part of the prefix"),
        ({"weights": [1.0]}, ValueError, "weights: expected 3"),
        ({"output": "x"}, ValueError, "save it with model.save_pretrained"),
        ({"geometry": "flat"}, ValueError, "geometry must be one of"),
    ],
)
def test_errors_leave_the_model_as_it_was(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = model_with(CONFIGS)
    with pytest.raises(error, match=message):
        add_frechet_adapter(model, **({"adapters": list(CONFIGS)} | options))
    assert sorted(model.peft_config) == sorted(CONFIGS)


def test_what_cannot_be_merged_is_refused_by_name() -> None:
    model = model_with({"plain": {"r": 2}, "dora": {"r": 2, "use_dora": True}})
    with pytest.raises(AdapterError, match="DoRA"):
        add_frechet_adapter(model, ["plain", "dora"])
