"""Recipes of mergekit: the same means, by hand and by mergekit; what is refused, and how."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_cli import run

from manifold_merge import merge_mergekit, merge_models
from manifold_merge.mergekit_config import MergekitError, read_mergekit
from manifold_merge.mergekit_merge import mergekit_weights

LAYERS = 4
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(LAYERS)
      for part in ("self_attn.q_proj", "mlp.up_proj")),
    "model.norm.weight",
    "lm_head.weight",
]  # fmt: skip


def model(folder: Path, seed: int, **config: Any) -> Path:
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors = {name: torch.randn(6, 5, generator=generator, dtype=torch.float64) for name in NAMES}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "toy", "num_hidden_layers": LAYERS} | config
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(config.get("vocabulary", {})))
    return folder


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Path]:
    return {name: model(tmp_path / name, seed) for seed, name in enumerate("abc")}


Write = Callable[[dict[str, Any]], Path]


@pytest.fixture
def recipe(three: dict[str, Path], tmp_path: Path) -> Write:
    """Write a configuration; the letters a, b, c stand for the folders of the models."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(x) for key, x in value.items()}
        if isinstance(value, list):
            return [named(x) for x in value]
        if isinstance(value, str) and value in three:
            return str(three[value])
        return value

    def write(document: dict[str, Any]) -> Path:
        file = tmp_path / "recipe.yml"
        file.write_text(yaml.safe_dump(named(document)))
        return file

    return write


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def of(*names: str, **weights: float) -> list[dict[str, Any]]:
    return [{"model": name} for name in names] + [
        {"model": name, "parameters": {"weight": w}} for name, w in weights.items()
    ]


SLERP = {"merge_method": "slerp", "base_model": "a", "models": of("a", "b")}
WHOLE = [0, LAYERS]


def both(layers: list[int], **more: Any) -> dict[str, Any]:
    return {"sources": [{"model": name, "layer_range": layers} for name in "ab"], **more}


@pytest.mark.parametrize(
    ("document", "same"),
    [
        ({"merge_method": "linear", "models": of(a=3, b=1)}, {"weights": [3, 1]}),
        (
            {"merge_method": "linear", "models": of(a=0.75, b=0.25),
             "parameters": {"normalize": False}},
            {"weights": [3, 1]},
        ),
        (
            {"merge_method": "linear", "models": of("a", "b"), "parameters": {"weight": 2.0}},
            {},
        ),
        ({**SLERP, "parameters": {"t": "3e-1"}}, {"weights": [0.7, 0.3], "geometry": "sphere"}),
        (
            {**SLERP, "models": of("b"), "parameters": {"t": 0.3}, "dtype": "float32"},
            {"weights": [0.7, 0.3], "geometry": "sphere", "dtype": torch.float32},
        ),
        (
            {**SLERP, "models": None, "slices": [both(WHOLE)], "parameters": {"t": 0.3},
             "dtype": "float32", "out_dtype": "bfloat16", "tokenizer_source": "union"},
            {"weights": [0.7, 0.3], "geometry": "sphere", "dtype": torch.bfloat16},
        ),
        ({"merge_method": "karcher", "models": of("a", "b")}, {"geometry": "sphere"}),
        (
            {"merge_method": "task_arithmetic", "base_model": "a", "models": of("a", b=0.5),
             "parameters": {"lambda": 0.5}},
            {"weights": [0.75, 0.25]},
        ),
        (
            {"merge_method": "task_arithmetic", "base_model": "a", "models": of(b=4),
             "parameters": {"normalize": True, "lambda": 0.25}},
            {"weights": [0.75, 0.25]},
        ),
        (
            {**SLERP, "parameters": {"t": [
                {"filter": "self_attn", "value": [0, 0.5, 1]},
                {"filter": "mlp", "value": 0.25},
                {"value": [1, 0]},
            ]}},
            {"geometry": "sphere", "weights": [0.75, 0.25], "layer_weights": {
                "*.0.self*": [1, 0], "*.1.self*": [2, 1], "*.2.self*": [1, 2], "*.3.self*": [0, 1],
                "*embed*": [0, 1], "model.norm*": [0, 1], "lm_head*": [0, 1],
            }},
        ),
        (
            {"merge_method": "linear", "slices": [
                both([0, 1], parameters={"weight": 1}),
                {"sources": [
                    {"model": "a", "layer_range": [1, 4], "parameters": {"weight": [1, 0]}},
                    {"model": "b", "layer_range": [1, 4], "parameters": {"weight": [0, 1]}},
                ]},
            ]},
            {"layer_weights": {
                "*embed*": [1, 1], "*.0.*": [1, 1], "*.1.*": [1, 0], "*.2.*": [1, 1],
                "*.3.*": [0, 1], "model.norm*": [1, 0], "lm_head*": [1, 0],
            }},
        ),
    ],
)  # fmt: skip
def test_a_recipe_is_a_call_of_merge_models(
    document: dict[str, Any],
    same: dict[str, Any],
    recipe: Write,
    three: dict[str, Path],
    tmp_path: Path,
) -> None:
    document = {key: value for key, value in document.items() if value is not None}
    merged = merge_mergekit(recipe(document), tmp_path / "out")
    expected = merge_models([three["a"], three["b"]], tmp_path / "expected", **same)
    found, wanted = read(merged.output), read(expected.output)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        # Weights as mergekit writes them differ from those here in the last digit.
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-12, msg=name)


def test_the_base_may_have_no_share(recipe: Write) -> None:
    """1 - (0.2 + 0.4 + 0.3 + 0.1) is -2e-16: round-off is not taken for a negative weight."""
    models = [{"model": x, "parameters": {"weight": w}}
              for x, w in zip("wxyz", (0.2, 0.4, 0.3, 0.1), strict=True)]  # fmt: skip
    document = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    (weights,) = set(mergekit_weights(read_mergekit(recipe(document)), NAMES, {}).values())
    assert weights == (0, 0.2, 0.4, 0.3, 0.1)


def test_three_by_hand(recipe: Write, three: dict[str, Path], tmp_path: Path) -> None:
    document = {"merge_method": "linear", "models": of(a=1, b=2, c=1)}
    found = read(merge_mergekit(recipe(document), tmp_path / "out").output)
    a, b, c = (read(folder) for folder in three.values())
    for name in NAMES:
        assert torch.allclose(found[name], (a[name] + 2 * b[name] + c[name]) / 4, atol=1e-12)


def test_slerp_by_hand(recipe: Write, three: dict[str, Path], tmp_path: Path) -> None:
    """Shoemake's formula for the directions; norms in between."""
    found = read(merge_mergekit(recipe({**SLERP, "parameters": {"t": 0.3}}), tmp_path / "o").output)
    a, b = read(three["a"]), read(three["b"])
    for name in NAMES:
        x, y = a[name], b[name]
        angle = math.acos(float((x * y).sum() / (x.norm() * y.norm())))
        direction = math.sin(0.7 * angle) * x / x.norm() + math.sin(0.3 * angle) * y / y.norm()
        expected = (0.7 * x.norm() + 0.3 * y.norm()) * direction / math.sin(angle)
        assert torch.allclose(found[name], expected, atol=1e-10)


def test_the_output_has_the_files_of_the_base(
    recipe: Write, three: dict[str, Path], tmp_path: Path
) -> None:
    (three["b"] / "config.json").write_text(
        json.dumps({"model_type": "toy", "num_hidden_layers": LAYERS, "_name_or_path": "mine"})
    )
    document = {**SLERP, "base_model": "b", "parameters": {"t": 0}}
    merged = merge_mergekit(recipe(document), tmp_path / "out")
    assert json.loads((merged.output / "config.json").read_text())["_name_or_path"] == "mine"
    assert torch.allclose(read(merged.output)["lm_head.weight"], read(three["b"])["lm_head.weight"])


REFUSED = {
    "unknown key": ({**SLERP, "colour": "red"}, "the configuration has the key 'colour'"),
    "modules": ({"merge_method": "linear", "modules": {"x": 1}}, "modules: models of several"),
    "chat template": ({**SLERP, "chat_template": "auto"}, "chat_template: leave it out"),
    "method": ({**SLERP, "merge_method": "ties"}, "'ties' is not supported (linear, slerp"),
    "multislerp": ({**SLERP, "merge_method": "multislerp"}, "write merge_method: karcher"),
    "both": ({**SLERP, "slices": [both(WHOLE)]}, "exactly one of models: and slices:"),
    "no base": ({"merge_method": "slerp", "models": of("a", "b")}, "slerp needs base_model"),
    "three": ({**SLERP, "models": of("a", "b", "c")}, "slerp takes two models, got 3; use karcher"),
    "twice": ({"merge_method": "karcher", "models": of("a", "a")}, "listed twice"),
    "no t": (SLERP, "parameters.t is missing for tensor 'lm_head.weight'"),
    "t": ({**SLERP, "parameters": {"t": 2}}, "t: expected 0 to 1, got 2.0"),
    "parameter": ({**SLERP, "parameters": {"t": 0.5, "embed_slerp": True}}, "'embed_slerp'"),
    "weight": (
        {**SLERP, "models": of("a", b=1), "parameters": {"t": 0.5}},
        "models[1].parameters has 'weight'",
    ),
    "karcher weight": (
        {"merge_method": "karcher", "models": of(a=1, b=1)},
        "its models have equal weights: use manifold-merge models --geometry sphere",
    ),
    "no weight": (
        {"merge_method": "linear", "models": of("a", b=1)}, "is missing for tensor"
    ),
    "sum": (
        {"merge_method": "linear", "models": of(a=1, b=1), "parameters": {"normalize": False}},
        "normalize: false with weights of sum 2",
    ),
    "negative": (
        {"merge_method": "linear", "models": of(a=2, b=-1)}, "has a negative weight, [2.0, -1.0]"
    ),
    "too far": (
        {"merge_method": "task_arithmetic", "base_model": "a", "models": of(b=1, c=1)},
        "negative weight for the base (2 of the tasks)",
    ),
    "text": ({**SLERP, "parameters": {"t": "half"}}, "parameters.t: expected a number"),
    "condition": (
        {**SLERP, "parameters": {"t": [{"filter": "mlp", "values": 1}]}}, "the key 'values'"
    ),
    "unmatched": (
        {**SLERP, "parameters": {"t": [{"filter": "mlp", "value": 1}]}}, "t is missing for tensor"
    ),
    "part of the stack": (
        {"merge_method": "linear", "slices": [both([0, 2], parameters={"weight": 1})]},
        "the slices end at layer 2, and the models have 4",
    ),
    "another order": (
        {"merge_method": "linear", "slices": [both([2, 4]), both([0, 2])]}, "from layer 0 on"
    ),
    "a stack of slices": (
        {"merge_method": "linear",
         "slices": [both([0, 2]), {"sources": [{"model": "c", "layer_range": [2, 4]}]}]},
        "slices[1] has other models than slices[0]",
    ),
    "range": (
        {"merge_method": "linear", "slices": [{"sources": [{"model": "a", "layer_range": [3]}]}]},
        "slices[0].sources[0].layer_range: expected [first, last + 1], got [3]",
    ),
    "method of another kind": (
        {"merge_method": ["linear"], "models": of("a")}, "merge_method: expected one of linear"
    ),
    "capitals": ({**SLERP, "merge_method": "SLERP"}, "write slerp"),
    "negative t": ({**SLERP, "parameters": {"t": -0.1}}, "t: expected 0 to 1, got -0.1"),
    "t of one layer": ({**SLERP, "parameters": {"t": [0, 2]}}, "t: expected 0 to 1, got 1.33"),
    "zeros": ({"merge_method": "linear", "models": of(a=0, b=0)}, "have no positive sum"),
    "true": ({"merge_method": "linear", "models": of(a=True, b=1)}, "number, a list of numbers"),
    "false in quotes": (
        {"merge_method": "linear", "models": of(a=1, b=1), "parameters": {"normalize": "false"}},
        "parameters.normalize: expected true or false, got 'false'",
    ),
    "several filters": (
        {**SLERP, "parameters": {"t": [{"filter": ["mlp", "attn"], "value": 1}, {"value": 0}]}},
        "filter: expected a part of the names of tensors, such as mlp, got ['mlp', 'attn']",
    ),
    "a condition that is not reached": (
        {**SLERP, "parameters": {"t": [{"value": 0}, {"filtre": "mlp", "value": 1}]}},
        "parameters.t has the key 'filtre'",
    ),
    "a value that is not used": (
        {"merge_method": "linear", "models": of(a=1, b=1), "parameters": {"weight": "much"}},
        "parameters.weight: expected a number",
    ),
    "twice in a slice": (
        {"merge_method": "linear", "parameters": {"weight": 1},
         "slices": [{"sources": [{"model": "a", "layer_range": WHOLE}] * 2}]},
        "listed twice",
    ),
    "residual": (
        {"merge_method": "linear", "slices": [both(WHOLE, residual_weight=0.5)]},
        "slices[0] has the key 'residual_weight'",
    ),
    "adapter": (
        {"merge_method": "linear", "models": of("base+math", "base+law")},
        "manifold-merge adapters math OTHER ... --output MERGED, and load base with MERGED",
    ),
    "revision": (
        {"merge_method": "linear", "models": of("hub/model@main")}, "snapshot_download"
    ),
    "dtype": ({**SLERP, "dtype": "int8"}, "dtype: expected one of float16"),
    "tokens": (
        {**SLERP, "tokenizer": {"source": "union", "tokens": {}}}, "tokenizer has the key 'tokens'"
    ),
    "tokenizer twice": (
        {**SLERP, "tokenizer_source": "base", "tokenizer": {"source": "base"}}, "keep one"
    ),
    "tokenizer": (
        {**SLERP, "parameters": {"t": 0.5}, "tokenizer_source": "c"}, "is none of the models"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name: str, recipe: Write, tmp_path: Path) -> None:
    document, text = REFUSED[name]
    with pytest.raises(MergekitError) as error:
        merge_mergekit(recipe(document), tmp_path / "out")
    assert text in str(error.value)
    assert "recipe.yml" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_differ(recipe: Write, three: dict[str, Path], tmp_path: Path) -> None:
    (three["b"] / "tokenizer.json").write_text('{"more": 1}')
    document = {**SLERP, "parameters": {"t": 0.5}}
    merge_mergekit(recipe(document), tmp_path / "first")  # as mergekit: that of the base
    with pytest.raises(MergekitError, match=r"differs from .* one tokenizer first"):
        merge_mergekit(recipe({**document, "tokenizer_source": "base"}), tmp_path / "out")


@pytest.mark.parametrize("text", ["- 1", "models: [a]", "a: [", "a: 1\n---\nb: 2\n"])
def test_files_that_are_no_recipe(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text(text)
    with pytest.raises(MergekitError, match=r"x\.yml"):
        read_mergekit(tmp_path / "x.yml")
    with pytest.raises(FileNotFoundError, match=r"y\.yml does not exist"):
        read_mergekit(tmp_path / "y.yml")


def test_a_depth_that_is_not_known(recipe: Write) -> None:
    read_recipe = read_mergekit(recipe({**SLERP, "parameters": {"t": [0, 1]}}))
    two = ["encoder.layer.0.w", "decoder.layer.0.w"]
    with pytest.raises(MergekitError, match=r"how deep tensor 'encoder\.layer\.0\.w' is"):
        mergekit_weights(read_recipe, two, {})
    with pytest.raises(MergekitError, match=r"or more layers than config\.json says"):
        mergekit_weights(read_recipe, ["model.layers.4.w"], {"num_hidden_layers": 4})


def test_the_closest_scope_counts(recipe: Write) -> None:
    """That of the model, of the slice, of all; a slice of one layer takes the last value."""
    first = both([0, 1], parameters={"weight": 1})
    first["sources"][0]["parameters"] = {"weight": [7, 3]}
    document = {"merge_method": "linear", "slices": [first, both([1, 4])],
                "parameters": {"weight": 9}}  # fmt: skip
    weights = mergekit_weights(read_mergekit(recipe(document)), NAMES, {"num_hidden_layers": 4})
    assert weights["model.layers.0.mlp.up_proj.weight"] == (0.75, 0.25)
    assert weights["model.layers.1.mlp.up_proj.weight"] == (0.5, 0.5)
    assert weights["model.embed_tokens.weight"] == (7 / 8, 1 / 8)


def test_the_command(recipe: Write, three: dict[str, Path], tmp_path: Path) -> None:
    file = recipe({"merge_method": "linear", "models": of(a=3, b=1)})
    result = run("mergekit", file, "-o", tmp_path / "out", "--max-shard-size", "1KB")
    assert result.exit_code == 0, result.stderr
    assert "Mean of 2 models" in result.stdout
    models = [three["a"], three["b"]]
    expected = merge_models(models, tmp_path / "e", weights=[3, 1], max_shard_size=1000)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(
        f.name for f in expected.output.iterdir()
    )
    wrong = recipe({"merge_method": "della", "models": of("a")})
    result = run("mergekit", wrong, "-o", tmp_path / "other")
    assert result.exit_code == 2
    assert "'della' is not supported" in result.stderr
    result = run("models", wrong, "-o", tmp_path / "other")
    assert result.exit_code == 2
    assert "is run by manifold-merge mergekit" in result.stderr


# --- mergekit itself ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small Llama, and two fine-tunes of it."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("llamas")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    found = {}
    for name in "abc":
        other = copy.deepcopy(base)
        if name != "a":
            for p in other.parameters():
                p.data += 0.1 * p.std(correction=0).clamp(min=0.01) * torch.randn_like(p)
        other.save_pretrained(root / name)
        found[name] = root / name
    return found


ORACLE = {
    "linear": {"merge_method": "linear", "models": of(a=3, b=1, c=2)},
    "linear by depth": {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": [1, 0.2]}},
            {"model": "b", "parameters": {"weight": [{"filter": "mlp", "value": [0, 1, 0.5]},
                                                     {"value": 1}]}},
        ],
    },
    "task arithmetic": {"merge_method": "task_arithmetic", "base_model": "a",
                        "models": of(b=0.3, c=0.5)},
    "slerp": {**SLERP, "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]},
                                            {"value": 0.4}]}},
    "slerp, base last": {**SLERP, "models": of("b", "a"), "parameters": {"t": [0.1, 0.4]}},
    "slices": {"merge_method": "linear", "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 1], "parameters": {"weight": 1}},
                     {"model": "b", "layer_range": [0, 1], "parameters": {"weight": [3, 1]}}]},
        {"sources": [{"model": "b", "layer_range": [1, 3], "parameters": {"weight": [1, 2]}},
                     {"model": "a", "layer_range": [1, 3]}],
         "parameters": {"weight": [{"filter": "mlp", "value": [5, 1, 2, 7]}, {"value": 0.5}]}},
    ]},
    "task arithmetic, of the base too": {
        "merge_method": "task_arithmetic", "base_model": "a", "models": of(a=0.9, b=0.3, c=1),
        "parameters": {"normalize": True, "lambda": "5e-1"}},
    "karcher, base not listed": {"merge_method": "karcher", "base_model": "a",
                                 "models": of("b", "c"),
                                 "parameters": {"max_iter": 100, "tol": 1e-9}},
    "karcher": {"merge_method": "karcher", "models": of("a", "b", "c"),
                "parameters": {"max_iter": 100, "tol": 1e-9}},
}  # fmt: skip
# mergekit's slerp combines the tensors with their norms, so that the shares of unequal norms
# differ; its karcher takes arccos of float32 numbers. The differences are relative to the tensor.
AGREE = {"slerp": 1e-3, "karcher": 5e-4}


@pytest.mark.parametrize("name", ORACLE)
@pytest.mark.filterwarnings("ignore")
def test_mergekit_agrees(name: str, llamas: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("mergekit")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    text = yaml.safe_dump(ORACLE[name])
    for letter, folder in llamas.items():
        text = re.sub(rf"model: {letter}$", f"model: {folder}", text, flags=re.MULTILINE)
    (tmp_path / "recipe.yml").write_text(text)
    merged = merge_mergekit(tmp_path / "recipe.yml", tmp_path / "ours")
    configuration = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(configuration, str(tmp_path / "theirs"),
              MergeOptions(copy_tokenizer=False, device="cpu"))  # fmt: skip
    ours, theirs = read(merged.output), read(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        difference = float((ours[tensor] - value).norm() / value.norm())
        assert difference < AGREE.get(name.split(",")[0], 1e-6), (tensor, difference)
