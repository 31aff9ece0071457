"""The functional distance: hooks against PEFT, features and padding, gauges, examples, errors."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_models as models
import pytest
import torch
from refine_models import BERT_NAMES, gauges, llama, random_factors
from torch import Tensor, nn
from transformers import BartConfig, BartModel

from manifold_merge.adapted_model import AdaptedModel, Updates, balanced_factors
from manifold_merge.examples import (
    Batch,
    Frame,
    Sampler,
    as_examples,
    collate,
    read_texts,
    vary,
)
from manifold_merge.functional import functional_distances, parse_features

IDS = [[1, 5, 6, 7, 2], [1, 9, 2], [1, 4, 11, 3, 8, 12, 2], [1, 10, 13, 2]]


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "bert": (models.bert, {"target_modules": ["query", "key", "value", "dense"]}),
    "bert embeddings": (models.bert, {"target_modules": ["word_embeddings", "query"]}),
    "bert, rank pattern": (
        models.bert,
        {"target_modules": ["query", "dense"], "rank_pattern": {"query": 2}, "use_rslora": True},
    ),
    "bert, lora_bias": (
        models.bert,
        {"target_modules": ["query", "value"], "lora_bias": True},
    ),
    "bert, trained biases": (models.bert, {"target_modules": ["query"], "bias": "all"}),
    "bert, saved module": (
        models.bert,
        {"target_modules": ["query"], "modules_to_save": ["LayerNorm"]},
    ),
    "gpt2": (models.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "all kinds": (
        models.Mixed,
        {"target_modules": ["embed", "conv1d", "conv2d", "point", "conv3d", "head"]},
    ),
    "conv, lora_bias": (models.Mixed, {"target_modules": ["conv2d"], "lora_bias": True}),
}


# --- the adapted model ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_hooks_compute_what_peft_computes(case: str, tmp_path: Path) -> None:
    build, config = CASES[case]
    folder = models.save(models.adapt(build, **config), tmp_path / "a")
    base = models.make(build)
    updates = Updates.read(folder, torch.float64)
    inputs = models.inputs()
    with torch.no_grad(), AdaptedModel(base, [updates]) as adapted:
        got = adapted(Batch(inputs, torch.ones_like(inputs, dtype=torch.bool)), updates)
    expected = models.output(models.load(build, folder))
    assert not torch.allclose(models.output(base), expected, atol=1e-3)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_the_model_is_left_as_it_was() -> None:
    model = models.make(models.bert).train()
    model.embeddings.requires_grad_(False)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    updates = Updates.read(random_factors(model, BERT_NAMES, 2, 0))
    replaced = Updates({}, {}, {"encoder.layer.0.output.dense.bias": torch.ones(12).double()})
    ids = models.inputs()
    with torch.no_grad(), AdaptedModel(model, [updates]) as adapted:
        adapted(Batch(ids, None), updates)
        assert not torch.equal(
            adapted(Batch(ids, None), replaced), adapted(Batch(ids, None), Updates({}))
        )
    with pytest.raises(RuntimeError, match="stop"), AdaptedModel(model, [updates]):
        raise RuntimeError("stop")
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]


def test_features_of_a_model_with_a_head_are_those_of_its_body() -> None:
    torch.manual_seed(0)
    model = llama().double().eval()
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    updates = Updates.read(random_factors(model, names, 2, 0), torch.float64)
    ids = models.inputs()
    with torch.no_grad(), AdaptedModel(model, [updates]) as adapted:
        hidden = adapted(Batch(ids, torch.ones_like(ids).bool()), Updates({}))
    assert hidden.shape == (2, 10, 12)
    torch.testing.assert_close(model.lm_head(hidden), model(ids).logits)


@pytest.mark.parametrize(("m", "n", "r"), [(5, 7, 3), (7, 5, 3), (3, 9, 4)])
def test_balanced_factors_forget_the_gauge(m: int, n: int, r: int) -> None:
    b, a = torch.randn(m, r).double(), torch.randn(r, n).double()
    one = balanced_factors(b, a)
    other = balanced_factors(*gauges({"x": (b, a)}, 1)["x"])
    torch.testing.assert_close(one[0] @ one[1], b @ a)
    torch.testing.assert_close(one[0].mT @ one[0], one[1] @ one[1].mT, atol=1e-9, rtol=0)
    for x, y in zip(one, other, strict=True):
        # Columns of a vanishing singular value have no direction; they are tiny in both.
        torch.testing.assert_close(x, y, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("build", "name", "shape", "message"),
    [
        (models.bert, "encoder.layer.9.query", (12, 12), "is not in BertModel.* named like"),
        (models.bert, BERT_NAMES[0], (12, 13), "12 x 12 in the model but 12 x 13"),
        (models.bert, "encoder.layer.0", (12, 12), "is a BertLayer, which no adapter updates"),
        (models.Attention, "layer.attention.out_proj", (8, 8), "MultiheadAttention"),
        (lambda: nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), "0", (4, 2), "2 groups"),
    ],
)
def test_a_model_that_does_not_fit_is_named(
    build: Callable[[], nn.Module], name: str, shape: tuple[int, int], message: str
) -> None:
    updates = Updates.read({name: (torch.ones(shape[0], 1), torch.ones(1, shape[1]))})
    with pytest.raises(ValueError, match=message):
        AdaptedModel(models.make(build, torch.float32), [updates])


def test_a_peft_model_is_refused() -> None:
    with pytest.raises(ValueError, match="give the base model"):
        AdaptedModel(models.adapt(models.bert, target_modules=["query"]), [])


# --- distances -----------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["mean", "tokens", "last"])
@pytest.mark.parametrize(
    ("build", "names"),
    [
        (models.bert, BERT_NAMES),
        (llama, ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj"]),
    ],
)
def test_distance_is_its_definition(
    build: Callable[[], nn.Module], names: list[str], features: str
) -> None:
    torch.manual_seed(0)
    model = build().double().eval()
    one, two = (random_factors(model, names, 2, seed) for seed in (1, 2))

    def rows(factors: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        changed = build().double().eval()
        changed.load_state_dict(model.state_dict())
        for name, (b, a) in factors.items():
            changed.get_submodule(name).weight.data += b @ a
        body, collected = changed.base_model, []
        for ids in IDS:  # one at a time: no padding
            with torch.no_grad():
                hidden = body(torch.tensor([ids])).last_hidden_state[0]
            collected.append(
                {"mean": hidden.mean(0, keepdim=True), "tokens": hidden, "last": hidden[-1:]}[
                    features
                ]
            )
        return torch.cat(collected)

    h, target = rows(one), rows(two)
    spread = (target - target.mean(0)).square().sum(1).mean()
    expected = (h - target).square().sum(1).mean() / spread
    got = functional_distances(one, [two], model, [IDS], features=features)
    torch.testing.assert_close(got[0], expected, rtol=1e-9, atol=0)
    assert float(functional_distances(two, [two], model, [IDS], features=features)) == 0


def test_layers_count_alike_and_each_in_its_own_unit() -> None:
    model = models.make(models.bert)
    one, two = (random_factors(model, BERT_NAMES, 2, seed) for seed in (1, 2))
    anchors = [Updates.read(x, torch.float64) for x in (one, two)]
    ids = torch.tensor(IDS[0])[None]
    with torch.no_grad(), AdaptedModel(model, anchors) as adapted:
        batch = Batch(ids, torch.ones_like(ids).bool())
        states = [adapted.states(batch, x, layers=True) for x in anchors]
    assert [x.shape for x in states[0]] == [(1, 5, 12)] * 2
    first, target = states[0][0][0], states[1][0][0]
    spread = (target - target.mean(0)).square().sum(1).mean()
    layer = float((first - target).square().sum(1).mean() / spread)
    (got,) = functional_distances(one, [two], model, [[IDS[0]]], features="layers")
    assert float(got) == pytest.approx(layer)
    (last,) = functional_distances(one, [two], model, [[IDS[0]]], features="tokens")
    weights = {"layers": 3.0, "tokens": 1.0}
    (both,) = functional_distances(one, [two], model, [[IDS[0]]], features=weights)
    assert float(both) == pytest.approx((3 * layer + float(last)) / 4)
    plain = {"net.up": (torch.ones(10, 1).double(), torch.ones(1, 8).double())}
    with pytest.raises(ValueError, match="does not return the states of its layers"):
        functional_distances(
            plain, [plain], models.make(models.Mlp), [[[1, 2], [2, 3]]], features="layers"
        )


@pytest.mark.parametrize("features", ["mean", "last", "mean+tokens"])
def test_batches_and_gauges_change_nothing(features: str) -> None:
    model = models.make(models.bert)
    one, two = (random_factors(model, BERT_NAMES, 3, seed) for seed in (1, 2))

    def measure(first: Any, second: Any, size: int) -> Tensor:
        return functional_distances(
            first, [second, first], model, [IDS, IDS], features=features, batch_size=size
        )

    expected = measure(one, two, 32)
    assert expected[0] > 1e-3
    torch.testing.assert_close(measure(one, two, 1), expected, rtol=1e-9, atol=1e-12)
    moved = measure(gauges(one, 3), gauges(two, 4), 32)
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("pooled", "'pooled' is unknown; expected mean"),
        ("", "is unknown"),
        ({}, "features is empty"),
        ({"mean": 0.0}, "expected above 0"),
    ],
)
def test_unknown_features(features: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_features(features)


def test_features_that_do_not_vary_have_no_unit() -> None:
    model = models.make(models.bert)
    factors = random_factors(model, BERT_NAMES, 2, 0)
    with pytest.raises(ValueError, match="do not vary over its 3 examples"):
        functional_distances(factors, [factors], model, [[[1, 2]] * 3])
    with pytest.raises(ValueError, match="expected 1, one for each adapter; got 2"):
        functional_distances(factors, [factors], model, [IDS, IDS])


def test_a_model_without_a_mask_wants_texts_of_one_length() -> None:
    model = models.make(models.Mlp)
    factors = {"net.up": (torch.ones(10, 1).double(), torch.ones(1, 8).double())}
    with pytest.raises(ValueError, match="takes no attention_mask"):
        functional_distances(factors, [factors], model, [IDS])
    assert functional_distances(factors, [factors], model, [IDS], batch_size=1).tolist() == [0]


def test_encoder_decoders_are_refused() -> None:
    config = BartConfig(
        vocab_size=models.VOCABULARY, d_model=12, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=20,
        decoder_ffn_dim=20, max_position_embeddings=16,
    )  # fmt: skip
    model = BartModel(config).double().eval()
    factors = random_factors(model, ["encoder.layers.0.fc1"], 2, 0)
    with pytest.raises(ValueError, match="BartModel is an encoder with a decoder"):
        functional_distances(factors, [factors], model, [IDS])


# --- examples ------------------------------------------------------------------------------------


def test_read_texts(tmp_path: Path) -> None:
    lines, objects = tmp_path / "a.txt", tmp_path / "b.jsonl"
    lines.write_text("one\n\n two \n", "utf-8")
    objects.write_text('{"body": "x", "label": 1}\n\n"y"\n{"body": "z"}\n', "utf-8")
    assert read_texts(lines) == ["one", " two "]
    assert read_texts(objects, key="body") == ["x", "y", "z"]
    assert read_texts(objects, key="body", limit=2) == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text"\n', "line 2: not JSON"),
        ("a.jsonl", '{"label": 1}\n', "line 1: expected a text under the key 'text', got keys"),
        ("a.jsonl", "3\n", "line 1: expected a text"),
        ("a.txt", "\n\n", "holds no text"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": " "}\n',
            "line 2: the text under the key 'text' is empty",
        ),
    ],
)
def test_bad_data_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_texts(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data is empty"),
        (["a"], "pass tokenizer="),
        ([[1, 2], []], r"data\[1\] has no tokens"),
        ([[1, 2], "a"], r"data\[1\] is a str"),
        ([torch.ones(3), torch.ones(4)], "mixes examples of shapes"),
        ([torch.ones(3), [1, 2]], "mixes examples of shapes"),
    ],
)
def test_bad_examples(data: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_examples(data)


def test_examples_of_all_kinds() -> None:
    def tokenizer(texts: list[str], truncation: bool, max_length: int) -> dict[str, Any]:
        return {"input_ids": [list(map(len, t.split()))[:max_length] for t in texts]}

    assert as_examples(["a bb ccc", "dd"], tokenizer, max_tokens=2) == [[1, 2], [2]]
    assert as_examples([torch.tensor([1, 2, 3])], max_tokens=2) == [[1, 2]]
    image = torch.zeros(3, 4, 4, dtype=torch.long)
    assert as_examples([image])[0] is image
    batch = collate([[1, 2], [3]], torch.device("cpu"), pad=9)
    assert batch.inputs.tolist() == [[1, 2], [3, 9]]
    assert batch.mask is not None
    assert batch.mask.tolist() == [[True, True], [True, False]]


def test_variation_keeps_frames_and_tokens() -> None:
    frame = Frame.of(IDS)
    assert frame == Frame(1, 1)
    generator = random.Random(0)
    made: list[Any] = []
    for _ in range(50):
        batch = vary(IDS, 1.0, frame, generator)
        assert len(batch) == len(IDS)
        made += batch
    tokens = {token for ids in IDS for token in ids[1:-1]}
    for ids in made:
        assert ids[0] == 1
        assert ids[-1] == 2
        assert set(ids[1:-1]) <= tokens
        assert len(ids) > 2
        assert len(ids) <= max(map(len, IDS))
    assert sum(ids not in IDS for ids in made) > 50
    assert vary(IDS, 0.0, frame, generator) == IDS
    assert Frame.of([[1, 2], [1, 2]]) == Frame(2, 0)
    assert vary([[1, 2], [1, 2]], 1.0, Frame(2, 0), generator) == [[1, 2], [1, 2]]
    images = [torch.ones(2), torch.zeros(2)]
    assert all(x is y for x, y in zip(vary(images, 1.0, frame, generator), images, strict=True))


def test_batches_are_a_function_of_the_step() -> None:
    texts = [[i] * (1 + i % 5) for i in range(23)]
    sampler = Sampler(texts, 4, 0.5, "seed")
    steps = [sampler.batch(step) for step in range(15)]
    again = Sampler(texts, 4, 0.5, "seed")
    assert [again.batch(step) for step in reversed(range(15))] == steps[::-1]
    varied = Sampler(IDS, len(IDS), 1.0, "seed")
    assert sorted(varied.batch(0)) != sorted(varied.batch(1))  # new ones at each step
    plain = Sampler(texts, 4, 0.0, "seed")
    epoch = [tuple(x) for step in range(5) for x in plain.batch(step)]
    assert len(set(epoch)) == 20  # each at most once in an epoch
    assert [plain.batch(0)] != [plain.batch(5)]
    assert len(Sampler(texts[:3], 8, 0.0, 0).batch(7)) == 3
