"""Where PEFT's own merging is silently wrong, and what this library does with the same folders.

Each test first reproduces the error with PEFT's ``add_weighted_adapter``, so that a fix in a later
PEFT shows up here, then states our behaviour: right, or refused by name.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft_models as models
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from manifold_merge.adapter_config import AdapterError
from manifold_merge.adapter_sets import check_compatible
from manifold_merge.adapter_writer import write_adapter
from manifold_merge.adapters import Adapter

TARGETS = ["up", "mid", "down"]


def adapter_folder(folder: Path, seed: int = 1, **config: Any) -> Path:
    options = {"target_modules": TARGETS} | config
    return models.save(models.adapt(models.Mlp, seed, **options), folder)


def peft_merge(
    folders: Sequence[Path], weights: Sequence[float], combination_type: str, **options: Any
) -> PeftModel:
    """Merge with PEFT as its documentation says; the result is the active adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(models.make(models.Mlp), str(folders[0]), "0")
        for i, folder in enumerate(folders[1:], 1):
            model.load_adapter(str(folder), str(i))
        names = [str(i) for i in range(len(folders))]
        model.add_weighted_adapter(
            names, list(weights), "merged", combination_type=combination_type, **options
        )
        model.set_adapter("merged")
    return model.eval()


def our_merge(folders: Sequence[Path], weights: Sequence[float], output: Path) -> Path:
    """The weighted sum of the updates, exact at rank sum(r), through our reader and writer alone.

    Every merge of adapters reads and writes through these.
    """
    adapters = [Adapter(folder) for folder in folders]
    check_compatible(adapters)
    for adapter in adapters:
        adapter.validate()
    modules = {}
    for name in adapters[0].modules:
        factors = [adapter.factors(name) for adapter in adapters]
        B = torch.cat([weight * B for weight, (B, _) in zip(weights, factors, strict=True)], 1)
        modules[name] = B, torch.cat([A for _, A in factors])
    extras = {
        name: sum(w * a.extra(name) for w, a in zip(weights, adapters, strict=True))
        for name in adapters[0].extras
    }
    return write_adapter(output, modules, like=adapters, extras=extras)


def updates(model: PeftModel, name: str = "merged") -> dict[str, Tensor]:
    layers = models.lora_layers(model)
    return {key: layer.get_delta_weight(name).detach() for key, layer in layers.items()}


def change(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest relative Frobenius distance between two sets of updates."""
    return max(float((first[k] - second[k]).norm() / first[k].norm()) for k in first)


@pytest.mark.parametrize("combination_type", ["svd", "linear", "cat"])
@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"use_rslora": True}, None),
        ({"lora_bias": True}, None),
        ({"use_dora": True}, "use_dora"),
    ],
    ids=["rslora", "lora_bias", "dora"],
)
def test_one_adapter_with_weight_one_is_changed(
    config: dict[str, Any], refused: str | None, combination_type: str, tmp_path: Path
) -> None:
    # The merged adapter inherits use_rslora, so that its scaling is sqrt(r) instead of one; it
    # inherits lora_bias and use_dora too, but not the biases and magnitudes.
    folder = adapter_folder(tmp_path / "in", **config)
    expected = models.output(models.load(models.Mlp, folder))
    by_peft = models.output(peft_merge([folder], [1.0], combination_type))
    assert (by_peft - expected).abs().max() > 0.1

    if refused:
        with pytest.raises(AdapterError, match=rf"{refused}=True is not supported.*DoRA"):
            our_merge([folder], [1.0], tmp_path / "out")
    else:
        output = our_merge([folder], [1.0], tmp_path / "out")
        by_us = models.output(models.load(models.Mlp, output))
        torch.testing.assert_close(by_us, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_merging_changes_the_base_model(init: str, tmp_path: Path) -> None:
    # The merged adapter inherits the initialisation, which is carried out once more.
    folder = models.save(
        models.adapt(
            models.Mlp, dtype=torch.float32, target_modules=TARGETS, init_lora_weights=init
        ),
        tmp_path / "in",
    )
    model = models.load(models.Mlp, folder, torch.float32)
    weight = model.base_model.model.net["mid"].base_layer.weight
    before = weight.detach().clone()
    model.add_weighted_adapter(["default"], [1.0], "merged", combination_type="svd")
    after = model.base_model.model.net["mid"].base_layer.weight
    assert (after - before).norm() > 0.1 * before.norm()

    with pytest.raises(AdapterError, match=f"init_lora_weights='{init}' is not supported"):
        Adapter(folder)


def test_linear_with_a_rank_pattern_cannot_be_loaded_again(tmp_path: Path) -> None:
    folders = [
        adapter_folder(tmp_path / str(seed), seed, rank_pattern={"mid": 2}) for seed in (1, 2)
    ]
    merged = peft_merge(folders, [0.5, 0.5], "linear")
    saved = models.save(merged, tmp_path / "peft", selected_adapters=["merged"]) / "merged"
    with pytest.raises(RuntimeError, match="size mismatch"):
        models.load(models.Mlp, saved)
    with pytest.raises(AdapterError, match=r"'net\.mid'.*give rank 3; the two files do not"):
        Adapter(saved)

    output = our_merge(folders, [0.5, 0.5], tmp_path / "out")
    mean = {
        name: (Adapter(folders[0]).delta_weight(name) + Adapter(folders[1]).delta_weight(name)) / 2
        for name in Adapter(output).modules
    }
    assert change(mean, updates(models.load(models.Mlp, output), "default")) < 1e-12


def test_too_few_weights_leave_adapters_out(tmp_path: Path) -> None:
    folders = [adapter_folder(tmp_path / str(seed), seed) for seed in (1, 2)]
    merged = updates(peft_merge(folders, [1.0], "svd"))
    first = {name: Adapter(folders[0]).delta_weight(name) for name in merged}
    assert change(first, merged) < 1e-6

    merge = pytest.importorskip("manifold_merge.merge")
    with pytest.raises(ValueError, match="weights"):
        merge.merge_adapters(folders, tmp_path / "out", weights=[1.0])
    assert not (tmp_path / "out").exists()


def test_nan_is_merged(tmp_path: Path) -> None:
    folders = [adapter_folder(tmp_path / str(seed), seed) for seed in (1, 2)]
    file = folders[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.net.mid.lora_B.weight"
    tensors[key][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert models.output(peft_merge(folders, [0.5, 0.5], "linear")).isnan().any()

    with pytest.raises(AdapterError, match=rf"'{key}' holds NaN"):
        our_merge(folders, [0.5, 0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_do_not_merge_to_themselves(copies: int, tmp_path: Path) -> None:
    # The square root of the weight goes to A and to B: sums of k copies are k times too large.
    folder = adapter_folder(tmp_path / "in")
    alone = {name: Adapter(folder).delta_weight(name) for name in Adapter(folder).modules}
    weights = [1 / copies] * copies
    linear = updates(peft_merge([folder] * copies, weights, "linear"))
    assert change({name: copies * update for name, update in alone.items()}, linear) < 1e-6

    output = our_merge([folder] * copies, weights, tmp_path / "out")
    assert change(alone, updates(models.load(models.Mlp, output), "default")) < 1e-12


def test_an_existing_name_is_left_as_it_is(tmp_path: Path) -> None:
    folders = [adapter_folder(tmp_path / str(seed), seed) for seed in (1, 2)]
    model = peft_merge(folders, [0.5, 0.5], "svd")
    before = updates(model)
    model.add_weighted_adapter(["0", "1"], [1.0, 0.0], "merged", combination_type="svd")
    assert change(before, updates(model)) == 0.0

    output = our_merge(folders, [0.5, 0.5], tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        our_merge(folders, [1.0, 0.0], output)


def regauge(folder: Path, target: Path, seed: int) -> Path:
    """The same adapter in other coordinates: (B G, inv(G) A) for each module."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in tensors if ".lora_A." in key]:
        rank = tensors[key].shape[0]
        gauge = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
        tensors[key] = torch.linalg.solve(gauge, tensors[key]).contiguous()
        key_B = key.replace(".lora_A.", ".lora_B.")
        tensors[key_B] = tensors[key_B] @ gauge
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("combination_type", "invariant"),
    [
        ("linear", False),
        ("ties", False),
        ("magnitude_prune", False),
        ("svd", True),
        ("cat", True),
        ("ties_svd", True),
    ],
)
def test_change_of_gauge(combination_type: str, invariant: bool, tmp_path: Path) -> None:
    # Numbers that mean the same models must not change what their merge means.
    options = {"density": 0.5} if "ties" in combination_type or "prune" in combination_type else {}
    folders = [adapter_folder(tmp_path / str(seed), seed) for seed in (1, 2)]
    others = [regauge(folder, tmp_path / f"{folder.name}g", i) for i, folder in enumerate(folders)]
    for folder, other in zip(folders, others, strict=True):
        for name in Adapter(folder).modules:
            torch.testing.assert_close(
                Adapter(folder).delta_weight(name), Adapter(other).delta_weight(name)
            )
    merges = [
        updates(peft_merge(pair, [0.5, 0.5], combination_type, **options))
        for pair in (folders, others)
    ]
    difference = change(*merges)
    assert difference < 1e-6 if invariant else difference > 0.3

    ours = [
        updates(
            models.load(models.Mlp, our_merge(pair, [0.5, 0.5], tmp_path / f"out{i}")), "default"
        )
        for i, pair in enumerate((folders, others))
    ]
    assert change(*ours) < 1e-9
