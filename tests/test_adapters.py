"""Reading adapter folders: products as PEFT computes them, and refusals by name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_models as models
import pytest
import torch
from peft import LoraConfig
from peft_models import STEM, plain_tensors, write_plain
from safetensors.torch import load_file

from manifold_merge.adapter_config import AdapterError
from manifold_merge.adapter_writer import write_adapter
from manifold_merge.adapters import Adapter

PATTERNS = {
    "target_modules": ["query", "value", "dense"],
    "rank_pattern": {"query": 2, "layer.1.attention.self.value": 5, "^encoder.layer.0.output": 7},
    "alpha_pattern": {"value": 10, "encoder.layer.[01].output.dense": 1, "query": 0.5},
}
KINDS = ["embed", "conv1d", "conv2d", "point", "conv3d", "head"]

# name, base model, configuration, options of save_pretrained
CASES: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any], dict[str, Any]]] = {
    "plain": (models.bert, {"target_modules": ["query", "dense"]}, {}),
    "rslora": (models.bert, {"target_modules": ["query", "dense"], "use_rslora": True}, {}),
    "patterns": (models.bert, PATTERNS, {}),
    "patterns-rslora": (models.bert, {**PATTERNS, "use_rslora": True}, {}),
    "lora_bias": (models.bert, {"target_modules": ["query", "dense"], "lora_bias": True}, {}),
    "bias-lora_only": (models.bert, {"target_modules": ["value"], "bias": "lora_only"}, {}),
    "bias-all": (models.bert, {"target_modules": ["value"], "bias": "all"}, {}),
    "modules_to_save": (
        models.bert,
        {"target_modules": ["query"], "modules_to_save": ["layer.1.output", "word_embeddings"]},
        {},
    ),
    "task-head": (
        models.bert_classifier,
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
        {},
    ),
    "fan_in_fan_out": (
        models.gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {},
    ),
    "embedding-saved": (
        models.gpt2,
        {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True},
        {"save_embedding_layers": True},
    ),
    "conv-embedding": (models.Mixed, {"target_modules": KINDS}, {}),
    "conv-embedding-patterns": (
        models.Mixed,
        {"target_modules": KINDS, "rank_pattern": {"embed": 2, "block.conv2d": 4}},
        {},
    ),
    "attention": (
        models.Attention,
        {"target_modules": ["attention"], "rank_pattern": {"attention": 2}},
        {},
    ),
    "regex-target": (models.bert, {"target_modules": r".*layer\.1\.(?!output).*dense"}, {}),
    "layers": (models.bert, {"target_modules": ["dense"], "layers_to_transform": [1]}, {}),
    "gaussian": (models.Mlp, {"target_modules": ["up"], "init_lora_weights": "gaussian"}, {}),
    "orthogonal": (
        models.Mlp,
        {"target_modules": ["up"], "r": 4, "init_lora_weights": "orthogonal"},
        {},
    ),
    "velora": (models.Mlp, {"target_modules": ["up"], "velora_config": {"num_groups": 2}}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_products_and_result_are_those_of_peft(case: str, tmp_path: Path) -> None:
    build, config, options = CASES[case]
    model = models.adapt(build, **config)
    adapter = Adapter(models.save(model, tmp_path / "in", **options))
    layers = models.lora_layers(model)
    assert adapter.modules.keys() == layers.keys()
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default")
        torch.testing.assert_close(adapter.delta_weight(name), expected, rtol=1e-12, atol=1e-12)

    # Another representative of every product, at a rank that differs between modules.
    written = {}
    for i, (name, module) in enumerate(adapter.modules.items()):
        B, A = adapter.factors(name)
        gauge = torch.randn(module.rank, module.rank + i % 3, dtype=torch.float64)
        written[name] = B @ gauge, torch.linalg.pinv(gauge) @ A
    extras = {name: adapter.extra(name) for name in adapter.extras}
    output = write_adapter(tmp_path / "out", written, like=[adapter], extras=extras)

    loaded = models.load(build, output)
    scalings = {layer.scaling["default"] for layer in models.lora_layers(loaded).values()}
    assert scalings == {1.0}
    expected = models.output(model)
    assert (expected - models.output(models.make(build))).abs().max() > 1e-2
    torch.testing.assert_close(models.output(loaded), expected, rtol=1e-9, atol=1e-9)


def test_mica_is_read_as_plain_lora(tmp_path: Path) -> None:
    # PEFT initialises MiCA in single precision only.
    model = models.adapt(
        models.Mlp, dtype=torch.float32, target_modules=["up", "mid"], init_lora_weights="mica"
    )
    adapter = Adapter(models.save(model, tmp_path / "in"))
    modules = {name: adapter.factors(name) for name in adapter.modules}
    output = write_adapter(tmp_path / "out", modules, like=[adapter])
    loaded = models.load(models.Mlp, output, torch.float32)
    torch.testing.assert_close(models.output(loaded), models.output(model), rtol=1e-6, atol=1e-6)


def test_converted_pissa_is_plain_lora(tmp_path: Path) -> None:
    model = models.adapt(
        models.Mlp, dtype=torch.float32, target_modules=["up", "mid"], init_lora_weights="pissa"
    )
    folder = models.save(model, tmp_path / "trained")
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        Adapter(folder)

    model = models.get_peft_model(
        models.make(models.Mlp, torch.float32),
        LoraConfig(r=3, lora_alpha=6, target_modules=["up", "mid"], init_lora_weights="pissa"),
    )
    initial = models.save(model, tmp_path / "initial")
    models.randomise(model, 1)
    trained = models.output(model)
    converted = models.save(
        model, tmp_path / "converted", path_initial_model_for_weight_conversion=str(initial)
    )
    adapter = Adapter(converted)
    base = models.make(models.Mlp, torch.float32)
    for name in adapter.modules:
        base.get_submodule(name).weight.data += adapter.delta_weight(name)
    torch.testing.assert_close(models.output(base), trained, rtol=1e-5, atol=1e-5)


def test_default_configuration_of_peft_is_read(tmp_path: Path) -> None:
    adapter = Adapter(write_plain(tmp_path))
    assert list(adapter.modules) == ["layer.0.query", "layer.1.query"]
    assert adapter.base_model == "base"
    assert repr(adapter) == f"Adapter({str(tmp_path)!r}, modules=2, ranks=[2])"


# configuration, what the message names and advises
REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "not-lora": ({"peft_type": "IA3"}, ["peft_type", "'IA3'", "save_as_lora"]),
    "no-type": ({"peft_type": None}, ["peft_type", "expected 'LORA'"]),
    "dora": ({"use_dora": True}, ["use_dora", "DoRA", "merge_and_unload"]),
    "qalora": ({"use_qalora": True}, ["use_qalora", "QALoRA", "again"]),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, ["use_bdlora", "block", "again"]),
    "alora": ({"alora_invocation_tokens": [7]}, ["alora_invocation_tokens", "aLoRA", "again"]),
    "arrow": ({"arrow_config": {"top_k": 3}}, ["arrow_config", "Arrow", "merge"]),
    "kasa": ({"kasa_config": {"beta": 1.0}}, ["kasa_config", "KaSA", "again"]),
    "monteclora": ({"monteclora_config": {"num_samples": 8}}, ["monteclora_config", "again"]),
    "replication": ({"layer_replication": [[0, 4], [2, 5]]}, ["layer_replication", "again"]),
    "megatron": ({"megatron_config": {"a": 1}}, ["megatron_config", "extract"]),
    "parameters": ({"target_parameters": ["experts.w"]}, ["target_parameters", "again"]),
    "tokens": ({"trainable_token_indices": [1]}, ["trainable_token_indices", "again"]),
    "tying": ({"ensure_weight_tying": True}, ["ensure_weight_tying=True", "=False"]),
    "unknown": ({"new_trick": {"x": 1}}, ["new_trick", "{'x': 1}", "ignore_config_keys"]),
    **{
        init: ({"init_lora_weights": init}, ["init_lora_weights", repr(init), "save_pretrained"])
        for init in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga")
    },
    "loftq": ({"init_lora_weights": "loftq"}, ["init_lora_weights", "'loftq'", "again"]),
    "new-init": ({"init_lora_weights": "abc"}, ["init_lora_weights", "'abc'", "again"]),
    "rank-zero": ({"r": 0}, ["r is 0", "positive integer", "correct"]),
    "rank-text": ({"r": "8"}, ["r is '8'", "positive integer", "correct"]),
    "rank-bool": ({"rank_pattern": {"a": True}}, ["rank_pattern['a']", "positive integer"]),
    "alpha-nan": ({"lora_alpha": float("nan")}, ["lora_alpha is nan", "finite", "correct"]),
    "alpha-pattern": ({"alpha_pattern": {"a": "b"}}, ["alpha_pattern['a']", "finite", "correct"]),
    "pattern-list": ({"rank_pattern": [1]}, ["rank_pattern is [1]", "expected an object"]),
    "pattern-regex": ({"rank_pattern": {"a(": 2}}, ["rank_pattern", "'a('", "correct"]),
    "rslora-text": ({"use_rslora": "yes"}, ["use_rslora is 'yes'", "true or false"]),
    "bias": ({"bias": "some"}, ["bias is 'some'", "lora_only"]),
    "saved-text": ({"modules_to_save": "head"}, ["modules_to_save is 'head'", "list"]),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_refused_configuration(case: str, tmp_path: Path) -> None:
    config, fragments = REFUSED_CONFIGS[case]
    with pytest.raises(AdapterError) as caught:
        Adapter(write_plain(tmp_path, config))
    for fragment in [str(tmp_path / "adapter_config.json"), *fragments]:
        assert fragment in str(caught.value)


FACTOR = STEM.format(0) + ".lora_{}.weight"
A, B = FACTOR.format("A"), FACTOR.format("B")
half = torch.float16
# tensors, configuration, what the message names and advises
REFUSED_TENSORS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "A-without-B": ({B: None}, {}, [f"tensor {B!r} is missing", A, "save"]),
    "B-without-A": ({A: None}, {}, [f"tensor {A!r} is missing", B, "save"]),
    "shapes": ({A: torch.ones(3, 4)}, {}, ["(3, 4)", "(5, 2)", "expected A (2, n)", "save"]),
    "rank": (
        {A: torch.ones(3, 4), B: torch.ones(5, 3)},
        {},
        ["'layer.0.query'", "(3, 4)", "rank 2", "save"],
    ),
    "rank-pattern": ({}, {"rank_pattern": {"query": 4}}, ["'layer.0.query'", "rank 4", "save"]),
    "vector": ({A: torch.ones(8)}, {}, ["'layer.0.query'", "(8,)", "gather the shards"]),
    "empty": ({A: torch.ones(0, 4)}, {}, ["'layer.0.query'", "(0, 4)", "gather the shards"]),
    "grouped": (
        {A: torch.ones(2, 4, 3, 3), B: torch.ones(6, 1, 1, 1)},
        {},
        ["'layer.0.query'", "grouped", "target_modules"],
    ),
    "kernel-of-B": (
        {A: torch.ones(2, 4, 3, 3), B: torch.ones(6, 2, 3, 3)},
        {},
        ["'layer.0.query'", "(6, 2, 3, 3)", "save"],
    ),
    "dtype": ({A: torch.ones(2, 4, dtype=torch.int8)}, {}, [A, "I8", "BF16", "convert"]),
    "prefix": ({"lora_unet.down": torch.ones(2)}, {}, ["'lora_unet.down'", "base_model.model."]),
    "adapter-name": (
        {STEM.format(0) + ".lora_C.default.weight": torch.ones(2)},
        {},
        ["lora_C.default", "save_pretrained"],
    ),
    "dora-magnitude": (
        {STEM.format(0) + ".lora_magnitude_vector": torch.ones(5)},
        {},
        ["lora_magnitude_vector", "DoRA", "save"],
    ),
    "tokens": (
        {"base_model.model.embed.token_adapter.trainable_tokens_delta": torch.ones(2, 2)},
        {},
        ["trainable_tokens_delta", "embedding"],
    ),
    "bias-without-flag": (
        {STEM.format(0) + ".lora_B.bias": torch.ones(5)},
        {},
        [STEM.format(0) + ".lora_B.bias", "lora_bias", "save"],
    ),
    "parameter": (
        {"base_model.model.scale": torch.ones(5)},
        {},
        ["'base_model.model.scale'", "not understood", "remove"],
    ),
    "nothing": (
        {FACTOR.replace("0", str(i)).format(f): None for i in range(2) for f in "AB"}
        | {"base_model.model.head.weight": torch.ones(2, 2)},
        {},
        ["no lora_A", "save_pretrained"],
    ),
}


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_refused_tensors(case: str, tmp_path: Path) -> None:
    tensors, config, fragments = REFUSED_TENSORS[case]
    with pytest.raises(AdapterError) as caught:
        Adapter(write_plain(tmp_path, config, tensors))
    for fragment in [str(tmp_path / "adapter_model.safetensors"), *fragments]:
        assert fragment in str(caught.value)


def _truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _nest(folder: Path) -> None:
    (folder / "best").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).rename(folder / "best" / name)


# damage to a good folder, type of the error, what the message names and advises
DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], list[str]]] = {
    "truncated": (_truncate, AdapterError, ["adapter_model.safetensors", "truncated", "again"]),
    "not-safetensors": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99),
        AdapterError,
        ["adapter_model.safetensors", "damaged", "again"],
    ),
    "lfs-pointer": (
        lambda folder: (folder / "adapter_model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"
        ),
        AdapterError,
        ["adapter_model.safetensors", "Git LFS pointer", "git lfs pull"],
    ),
    "no-tensors": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        FileNotFoundError,
        ["adapter_model.safetensors is missing", "again"],
    ),
    "pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        AdapterError,
        ["adapter_model.bin", "safe_serialization=True"],
    ),
    "no-config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        FileNotFoundError,
        ["adapter_config.json is missing", "is this an adapter folder"],
    ),
    "nested": (_nest, FileNotFoundError, ["did you mean", "best"]),
    "not-json": (
        lambda folder: (folder / "adapter_config.json").write_text("{'r': 2}"),
        AdapterError,
        ["adapter_config.json", "JSON", "line 1", "again"],
    ),
    "not-an-object": (
        lambda folder: (folder / "adapter_config.json").write_text("[2]"),
        AdapterError,
        ["adapter_config.json", "list", "JSON object"],
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_folder(case: str, tmp_path: Path) -> None:
    damage, kind, fragments = DAMAGES[case]
    damage(write_plain(tmp_path))
    with pytest.raises(kind) as caught:
        Adapter(tmp_path)
    for fragment in [str(tmp_path), *fragments]:
        assert fragment in str(caught.value)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="snapshot_download"):
        Adapter(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match=r"file is a file; give the adapter folder"):
        Adapter(tmp_path / "file")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    bad = torch.ones(5, 2, dtype=dtype)
    bad[3, 1] = value
    adapter = Adapter(write_plain(tmp_path, {}, {B: bad}))
    with pytest.raises(AdapterError, match=rf"adapter_model.safetensors: tensor '{re.escape(B)}'"):
        adapter.validate()
    with pytest.raises(AdapterError, match="earlier checkpoint"):
        adapter.factors("layer.0.query")
    adapter.factors("layer.1.query")


def test_validating_lets_go_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that were read count as memory: a large adapter is let go of on the way."""
    bad = torch.ones(5, 2)
    bad[3, 1] = torch.nan
    released = []
    release = Adapter.release
    monkeypatch.setattr(Adapter, "release", lambda x: (released.append(x), release(x)))
    adapter = Adapter(write_plain(tmp_path / "good", {}, {}))
    adapter.validate()
    assert not released
    monkeypatch.setattr("manifold_merge.adapters.RELEASE_EVERY", 1)
    adapter.validate()
    assert len(released) == 2 * len(adapter.modules) + len(adapter.extras)
    with pytest.raises(AdapterError, match="earlier checkpoint"):
        Adapter(write_plain(tmp_path / "bad", {}, {B: bad})).validate()


def test_finite_values_whose_sum_overflows_pass(tmp_path: Path) -> None:
    adapter = Adapter(write_plain(tmp_path, {}, {B: torch.full((5, 2), 3e38)}))
    adapter.validate()


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("asked", [None, torch.bfloat16, torch.float32, torch.float64])
def test_types(stored: torch.dtype, asked: torch.dtype | None, tmp_path: Path) -> None:
    tensors = {key: value.to(stored) for key, value in plain_tensors().items()}
    config = {"use_rslora": True, "lora_alpha": 3}
    adapter = Adapter(write_plain(tmp_path, config, tensors))
    got_B, got_A = adapter.factors("layer.0.query", asked)
    expected = asked or torch.promote_types(stored, torch.float32)
    assert got_B.dtype == got_A.dtype == expected
    # One rounding of each factor, whatever the stored type.
    exact = tensors[B].double() * 3 / 2**0.5
    unit = 2 * torch.finfo(expected).eps if expected != torch.float64 else 1e-15
    torch.testing.assert_close(got_B.double(), exact, rtol=unit, atol=0)
    torch.testing.assert_close(got_A.double(), tensors[A].double(), rtol=unit, atol=0)


def test_returned_tensors_are_copies(tmp_path: Path) -> None:
    adapter = Adapter(write_plain(tmp_path, {"lora_alpha": 2}))
    for tensor in adapter.factors("layer.0.query"):
        tensor.zero_()
    again = adapter.factors("layer.0.query")
    assert all(tensor.abs().min() > 0 for tensor in again)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(stored[A], again[1])


def test_reading_goes_on_after_release(tmp_path: Path) -> None:
    adapter = Adapter(write_plain(tmp_path))
    before = adapter.factors("layer.0.query")
    adapter.release()
    assert all(map(torch.equal, before, adapter.factors("layer.0.query")))


def test_names_that_are_not_there(tmp_path: Path) -> None:
    adapter = Adapter(write_plain(tmp_path))
    with pytest.raises(KeyError, match=r"does not adapt 'layer\.9'"):
        adapter.factors("layer.9")
    with pytest.raises(KeyError, match="no extra tensor 'head'"):
        adapter.extra("head")


def test_unknown_key_may_be_declared_harmless(tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "in", {"lorap_lr_ratio": 16})
    adapter = Adapter(folder, ignore_config_keys=["lorap_lr_ratio"])
    modules = {name: adapter.factors(name) for name in adapter.modules}
    output = write_adapter(tmp_path / "out", modules, like=[adapter])
    assert "lorap_lr_ratio" not in Adapter(output).config
