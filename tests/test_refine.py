"""Refinement: the sequential start, the descent, gauges, ranks, resuming, stopping, output."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft_models as models
import pytest
import torch
from refine_models import MODELS, QUICK, conv_data, gauges, setting, texts
from torch import Tensor, nn

from manifold_merge.adapted_model import AdaptedModel, Updates
from manifold_merge.adapters import Adapter
from manifold_merge.functional import functional_distances
from manifold_merge.merge import merge_adapters
from manifold_merge.refine import Refinement, refine_adapters
from manifold_merge.refine_run import Descent, _at_rank


def products(refined: Refinement) -> dict[str, Tensor]:
    return {name: b @ a for name, (b, a) in refined.modules.items()}


def bits(refined: Refinement) -> list[Tensor]:
    return [t for pair in refined.modules.values() for t in pair]


# --- the descent ---------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", ["sequential", "merged"])
@pytest.mark.parametrize("kind", MODELS)
def test_refinement_lowers_the_distance(kind: str, begin: str) -> None:
    model, adapters, mean, data = setting(kind)
    refined = refine_adapters(mean, adapters, model, data, start=begin, **QUICK)
    assert sum(refined.after) < 0.97 * sum(refined.started)
    assert sum(refined.after) < 0.9 * sum(refined.before)
    if begin == "merged":
        assert refined.started == pytest.approx(refined.before, rel=1e-6)
    fresh = [texts(60, 13), texts(60, 14)]
    measured = functional_distances(refined.modules, adapters, model, fresh)
    assert measured.sum() < functional_distances(mean, adapters, model, fresh).sum()
    assert {b.shape[1] for b, _ in refined.modules.values()} == {2}


def test_images() -> None:
    model, adapters, mean, data = conv_data()
    options = QUICK | {"start": "merged"}
    refined = refine_adapters(mean, adapters, model, data, **options)
    assert sum(refined.after) < 0.9 * sum(refined.before)


@pytest.mark.parametrize("rank", [1, 3, 99])
@pytest.mark.parametrize("begin", ["sequential", "merged"])
def test_any_rank(rank: int, begin: str) -> None:
    model, adapters, mean, data = setting()
    refined = refine_adapters(mean, adapters, model, data, start=begin, rank=rank, **QUICK)
    assert {b.shape[1] for b, _ in refined.modules.values()} == {min(rank, 12)}
    assert sum(refined.after) <= sum(refined.started) < 1.01 * sum(refined.before)


def test_more_rank_comes_closer() -> None:
    model, adapters, mean, data = setting()
    after = [
        sum(refine_adapters(mean, adapters, model, data, rank=r, **QUICK).after) for r in (1, 2, 4)
    ]
    assert after[0] > after[1] > after[2]


def test_new_directions_change_little_and_have_full_rank() -> None:
    b, a = torch.randn(7, 2).double(), torch.randn(2, 6).double()
    grown = _at_rank(b, a, 4, torch.Generator().manual_seed(0))
    assert int(torch.linalg.matrix_rank(grown[0] @ grown[1])) == 4
    values = torch.linalg.svdvals(b @ a)
    assert torch.linalg.matrix_norm(grown[0] @ grown[1] - b @ a, 2) <= 0.011 * values[1]
    zero = _at_rank(0 * b, a, 2, torch.Generator().manual_seed(0))
    assert int(torch.linalg.matrix_rank(zero[0] @ zero[1])) == 2


@pytest.mark.parametrize(
    ("begin", "metric"),
    [("sequential", "mixed"), ("merged", "mixed"), ("merged", "invariant")],
)
def test_gauges_change_nothing(begin: str, metric: str) -> None:
    model, adapters, mean, data = setting()
    options = QUICK | {"start": begin, "metric": metric}
    expected = refine_adapters(mean, adapters, model, data, **options)
    moved = refine_adapters(
        gauges(mean, 5), [gauges(x, 6 + i) for i, x in enumerate(adapters)], model, data, **options
    )
    assert sum(expected.after) < sum(expected.started)
    assert moved.after == pytest.approx(expected.after, rel=1e-8)
    for name, product in products(moved).items():
        torch.testing.assert_close(product, products(expected)[name], rtol=1e-7, atol=1e-8)


def test_the_step_itself_commutes_with_gauges(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not because all begin in balanced form: without that the path is the same.
    from manifold_merge import refine_run

    model, adapters, mean, data = setting()
    options = QUICK | {"start": "merged"}
    expected = products(refine_adapters(mean, adapters, model, data, **options))
    plain = refine_run._at_rank

    def elsewhere(*arguments: Any) -> Any:
        return gauges({"x": plain(*arguments)}, 9)["x"]

    monkeypatch.setattr(refine_run, "_at_rank", elsewhere)
    for name, product in products(refine_adapters(mean, adapters, model, data, **options)).items():
        torch.testing.assert_close(product, expected[name], rtol=1e-6, atol=1e-8)


def test_the_order_of_adapters_does_not_matter() -> None:
    model, adapters, mean, data = setting()
    one = refine_adapters(mean, adapters, model, data, weights=[1, 3], **QUICK)
    other = refine_adapters(mean, adapters[::-1], model, data[::-1], weights=[3, 1], **QUICK)
    assert one.after == pytest.approx(other.after[::-1], rel=1e-8)
    for name, product in products(other).items():
        torch.testing.assert_close(product, products(one)[name], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("begin", ["sequential", "merged"])
def test_weights(begin: str) -> None:
    model, adapters, mean, data = setting()
    options = QUICK | {"start": begin, "held_back": 0, "rank": 1}
    even = refine_adapters(mean, adapters, model, data, **options).after
    first = refine_adapters(mean, adapters, model, data, weights=[9, 1], **options).after
    assert first[0] < even[0]
    assert first[1] > even[1]


def test_an_adapter_of_weight_zero_has_no_say() -> None:
    model, adapters, mean, data = setting()
    one = refine_adapters(mean, adapters, model, data, weights=[1, 0], **QUICK)
    other = refine_adapters(mean, [adapters[0], mean], model, data, weights=[2, 0], **QUICK)
    for name, product in products(one).items():
        torch.testing.assert_close(products(other)[name], product, rtol=1e-2, atol=1e-2)
    assert one.after[0] == pytest.approx(other.after[0], rel=0.5)


def test_the_unit_of_the_learning_rate_is_the_size_of_updates() -> None:
    torch.manual_seed(0)
    data = [list(torch.randn(30, 5).double()) for _ in range(2)]
    weight = torch.randn(4, 5).double()
    pairs = [(torch.randn(4, 1).double(), torch.randn(1, 5).double()) for _ in range(3)]
    found = []
    for size in (1.0, 10.0):
        model = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
        model[0].weight.data = size * weight
        mean, *adapters = ({"0": (size * b, a)} for b, a in pairs)
        options = QUICK | {"start": "merged", "rank": 1}
        found.append(products(refine_adapters(mean, adapters, model, data, **options))["0"])
    assert not torch.allclose(found[0], pairs[0][0] @ pairs[0][1], rtol=0.1)
    torch.testing.assert_close(found[1], 10 * found[0], rtol=1e-5, atol=1e-5)


def test_half_precision_models() -> None:
    model, adapters, mean, data = setting()
    refined = refine_adapters(mean, adapters, model.bfloat16(), data, **QUICK)
    assert all(t.dtype == torch.float32 for t in bits(refined))
    assert sum(refined.after) < sum(refined.before)


def test_modules_outside_the_features_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    model, adapters, mean, data = setting("decoder with a head")
    head = (torch.ones(models.VOCABULARY, 1).double(), torch.ones(1, 12).double())
    merged = mean | {"lm_head": head}
    refined = refine_adapters(merged, adapters, model, data, **QUICK | {"steps": 2})
    assert "'lm_head' takes no part in the features" in caplog.text
    torch.testing.assert_close(products(refined)["lm_head"], head[0] @ head[1])


# --- stopping and resuming -----------------------------------------------------------------------


def test_it_stops_and_returns_the_best_point(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapters, mean, data = setting()
    evaluated: list[tuple[float, dict[str, Tensor]]] = []
    plain = Descent.evaluate

    def record(self: Descent, updates: Updates) -> tuple[float, ...]:
        held = plain(self, updates)
        point = {n: (b @ a).detach().clone() for n, (b, a) in updates.factors.items()}
        evaluated.append((sum(held) / 2, point))
        return held

    monkeypatch.setattr(Descent, "evaluate", record)
    # Two training texts each, which are learnt by heart; those held back tell.
    options = QUICK | {"steps": 400, "patience": 2, "variation": 0.0, "held_back": 22}
    refined = refine_adapters(mean, adapters, model, data, rank=4, start="merged", **options)
    assert 16 < refined.steps < 400
    assert refined.steps == refined.best_step + 2 * 8
    assert [entry[2] for entry in refined.history] == [value for value, _ in evaluated[2:]]
    value, point = min(evaluated[1:], key=lambda entry: entry[0])
    assert sum(refined.after) / 2 == pytest.approx(value, rel=1e-12)
    for name, product in products(refined).items():
        torch.testing.assert_close(product, point[name])


def test_without_held_back_examples_the_last_point_is_returned() -> None:
    model, adapters, mean, data = setting()
    refined = refine_adapters(mean, adapters, model, data, held_back=0, **QUICK)
    assert refined.best_step == refined.steps == 20
    assert sum(refined.after) < sum(refined.before)
    options = {"features": "mean+tokens"}
    for factors, stated in ((mean, refined.before), (refined.modules, refined.after)):
        measured = functional_distances(factors, adapters, model, data, **options)
        assert measured.tolist() == pytest.approx(stated, rel=1e-6)


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop", [5, 8, 13])
def test_resuming_is_exact_to_the_bit(tmp_path: Path, stop: int) -> None:
    model, adapters, mean, data = setting()
    expected = refine_adapters(mean, adapters, model, data, **QUICK)
    file = tmp_path / "state" / "run.safetensors"

    def interrupt(done: int, _: int) -> None:
        if done == stop:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        refine_adapters(mean, adapters, model, data, checkpoint=file, progress=interrupt, **QUICK)
    assert file.exists() == (stop > 8)
    seen: list[int] = []
    resumed = refine_adapters(
        mean, adapters, model, data, checkpoint=file, resume=True,
        progress=lambda done, _: seen.append(done), **QUICK,
    )  # fmt: skip
    assert seen[0] == (9 if stop > 8 else 1)
    assert not file.exists()
    assert dataclasses.replace(resumed, modules={}) == dataclasses.replace(expected, modules={})
    assert all(torch.equal(x, y) for x, y in zip(bits(resumed), bits(expected), strict=True))


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    model, adapters, mean, data = setting()
    file = tmp_path / "run.safetensors"

    def interrupt(done: int, _: int) -> None:
        if done == 9:
            raise _Interrupted

    def run(**changes: Any) -> Refinement:
        options = {"adapters": adapters, "data": data, "checkpoint": file} | QUICK | changes
        return refine_adapters(mean, options.pop("adapters"), model, options.pop("data"), **options)

    with pytest.raises(_Interrupted):
        run(progress=interrupt)
    with pytest.raises(FileExistsError, match=r"pass resume=True \(--resume\)"):
        run()
    for change in (
        {"steps": 40}, {"seed": 1}, {"weights": [1, 2]}, {"data": [data[0], data[0]]},
        {"adapters": [adapters[0], adapters[0]]}, {"features": "mean"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="belongs to a run with other"):
            run(resume=True, **change)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged or none of a refinement"):
        run(resume=True)
    assert run(overwrite=True).steps == 20
    assert not file.exists()


# --- folders -------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        models.save(
            models.adapt(models.bert, seed, target_modules=["query", "dense"], lora_bias=True),
            tmp_path / f"a{seed}",
        )
        for seed in (1, 2)
    ]


def test_output_is_what_peft_loads(folders: list[Path], tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge_adapters(folders, merged, rank=3)
    model, data = models.make(models.bert), [texts(40, 3), texts(40, 4)]
    refined = refine_adapters(merged, folders, model, data, tmp_path / "out", **QUICK)
    assert refined.output == tmp_path / "out"
    assert refined.modules == {}
    assert sum(refined.after) < sum(refined.before)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "functional distance" in card
    assert json.loads(card.split("```json")[1].split("```")[0])["steps"] == 20
    written = Updates.read(tmp_path / "out", torch.float64)
    assert written.biases.keys() == Updates.read(merged).biases.keys()
    with torch.no_grad(), AdaptedModel(model, [written]) as adapted:
        ids = models.inputs()
        ours = adapted(adapted.collate(ids.tolist()), written)
    torch.testing.assert_close(
        ours, models.output(models.load(models.bert, tmp_path / "out")), rtol=1e-9, atol=1e-9
    )
    assert Adapter(tmp_path / "out").modules.keys() == Adapter(merged).modules.keys()
    with pytest.raises(FileExistsError, match="exists"):
        refine_adapters(merged, folders, model, data, tmp_path / "out", **QUICK)
    with pytest.raises(FileExistsError, match="one of the input adapters"):
        refine_adapters(merged, folders, model, data, merged, overwrite=True, **QUICK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "zero"}, "start must be one of sequential, merged; got 'zero'"),
        ({"metric": "flat"}, "metric must be one of"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"variation": 1.5}, "variation must be between 0 and 1"),
        ({"held_back": 24}, "leaves none of 24 examples"),
        ({"weights": [1]}, "weights: expected 2, one for each adapter; got 1"),
        ({"weights": [0, 0]}, "not all zero"),
        ({"weights": [-1, 2]}, "non-negative"),
        ({"features": "pooled"}, "'pooled' is unknown"),
        ({"output": "out"}, "output needs at least one adapter folder"),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str) -> None:
    model, adapters, mean, data = setting()
    with pytest.raises(ValueError, match=message):
        refine_adapters(mean, adapters, model, data, **QUICK | changes)


def test_divergence_is_an_error() -> None:
    model, adapters, mean, data = setting()
    options = QUICK | {"learning_rate": 1e30}
    with pytest.raises(ValueError, match=r"learning_rate=1e\+30: the descent diverged at step 1"):
        refine_adapters(mean, adapters, model.float(), data, **options)


def test_bad_data() -> None:
    model, adapters, mean, data = setting()
    with pytest.raises(ValueError, match="data: expected 2, one for each adapter; got 1"):
        refine_adapters(mean, adapters, model, data[:1])
    with pytest.raises(ValueError, match=r"data\[1\] is empty"):
        refine_adapters(mean, adapters, model, [data[0], []])
    with pytest.raises(ValueError, match="adapters is empty"):
        refine_adapters(mean, [], model, [])


def test_no_steps_return_the_start() -> None:
    model, adapters, mean, data = setting()
    refined = refine_adapters(mean, adapters, model, data, steps=0, start="merged")
    assert refined.steps == 0
    for name, product in products(refined).items():
        torch.testing.assert_close(product, mean[name][0] @ mean[name][1])
