"""Predicted errors equal what is measured, and no measured error exceeds its bound."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_adapters import FEWER, PLAIN, adapter
from torch import Tensor, nn

from manifold_merge import merge_adapters
from manifold_merge.adapters import Adapter
from manifold_merge.cli import app
from manifold_merge.mergeability import (
    chain_bound,
    error_bound,
    output_errors,
    plot_output_errors,
    predicted_error,
    worst_gain,
)
from manifold_merge.report import inspect_adapters
from manifold_merge.report_html import render_report
from manifold_merge.statistics import Gram, Statistics, collect_statistics
from manifold_merge.statistics_gram import SketchSum

FLOAT64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def inputs(count: int, features: int, decay: float, seed: int) -> Tensor:
    """Correlated inputs, whose Gram matrix has a spectrum that falls off."""
    turn = torch.linalg.qr(draw(features, features, seed=seed + 1))[0]
    spectrum = torch.linspace(0, -decay, features, dtype=FLOAT64).exp()
    return draw(count, features, seed=seed) * spectrum @ turn + 0.3


def measured(change: tuple[Tensor, Tensor], x: Tensor) -> float:
    b, a = change
    return float((x @ a.T @ b.T).square().sum(1).mean())


STORED = ("whole", "truncated", "sketched", "sketched in float32", "diagonal")


def stored(x: Tensor, how: str, rank: int) -> Gram:
    if how.startswith("sketched"):
        kind = torch.float32 if how.endswith("32") else FLOAT64
        total = SketchSum(x.shape[1], rank, kind, x.device)
        for part in x.to(kind).split(7):
            total.add(part)
        return total.result().to(FLOAT64)
    gram = Gram(x.T @ x / len(x), count=len(x))
    if how == "truncated":
        return gram.compress(rank)
    # What a file keeps: float32.
    return gram.to(torch.float32).to(FLOAT64) if how == "whole" else gram


@pytest.mark.parametrize("how", STORED[:-1])
@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(3, 60),
    rank=st.integers(1, 10),
    decay=st.floats(0, 12),
    size=st.sampled_from([1e-4, 1.0, 1e3]),
)
def test_no_measured_error_exceeds_its_bound(how, seed, count, rank, decay, size):
    x = inputs(count, 24, decay, seed)
    change = (size * draw(9, 3, seed=seed + 2), draw(3, 24, seed=seed + 3))
    # The worst change there is: along what the stored form leaves out.
    gram = stored(x, how, rank)
    left_out = (
        x.T @ x / len(x)
        - gram.dense()
        + torch.diag(
            gram.remainder if gram.remainder is not None else torch.zeros(24, dtype=FLOAT64)
        )
    )
    worst = torch.linalg.eigh(left_out).eigenvectors[:, -2:].T
    for b, a in (change, (size * draw(9, 2, seed=seed), worst)):
        error = measured((b, a), x)
        assert error <= float(error_bound((b, a), gram))
        if how == "whole":
            assert math.isclose(error, float(predicted_error((b, a), gram)), rel_tol=1e-2) or (
                error < 1e-6 * float(gram.trace() * worst_gain((b, a)) ** 2)
            )


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_the_worst_gain_holds_for_inputs_never_seen(seed, scale):
    change = draw(9, 3, seed=seed), draw(3, 24, seed=seed + 1)
    x = scale * inputs(10, 24, 2.0, seed)
    gain = float(worst_gain(change))
    assert measured(change, x) <= gain**2 * float(x.square().sum(1).mean()) * (1 + 1e-12)
    assert gain == pytest.approx(float(torch.linalg.matrix_norm(change[0] @ change[1], 2)))


def test_embeddings_are_measured_by_how_often_words_occur():
    words = torch.tensor([0, 0, 1, 3])
    gram = Gram(remainder=torch.bincount(words, minlength=5).double() / 4, count=4)
    change = draw(3, 2), draw(2, 5, seed=1)
    x = nn.functional.one_hot(words, 5).double()
    assert float(predicted_error(change, gram)) == pytest.approx(measured(change, x))
    assert measured(change, x) <= float(error_bound(change, gram)) <= 1.01 * measured(change, x)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), depth=st.integers(1, 4))
def test_errors_along_a_chain_never_exceed_the_bound(seed, depth):
    widths = [6 + i for i in range(depth + 1)]
    weights = [draw(widths[i + 1], widths[i], seed=seed + i) for i in range(depth)]
    own = [
        (draw(w.shape[0], 2, seed=i), draw(2, w.shape[1], seed=i)) for i, w in enumerate(weights)
    ]
    merged = [
        (0.5 * draw(w.shape[0], 2, seed=90 + i), draw(2, w.shape[1], seed=70 + i))
        for i, w in enumerate(weights)
    ]
    theirs = ours = inputs(20, widths[0], 1.0, seed)
    errors, gains = [], []
    for w, (b, a), (c, d) in zip(weights, own, merged, strict=True):
        gram = Gram(theirs.T @ theirs / len(theirs))
        change = torch.cat((c, -b), 1), torch.cat((d, a), 0)
        errors.append(float(error_bound(change, gram)) ** 0.5)
        gains.append(float(torch.linalg.matrix_norm(w + c @ d, 2)))
        theirs, ours = (x @ (w + p @ q).T for x, p, q in ((theirs, b, a), (ours, c, d)))
        theirs, ours = theirs.relu(), ours.relu()
    error = float((ours - theirs).square().sum(1).mean().sqrt())
    assert error <= chain_bound(errors, gains)


class Chain(nn.Module):
    """Layers under the names of the small adapters, each with inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict(
            {
                "0": nn.ModuleDict({"query": nn.Linear(7, 9)}),
                "1": nn.ModuleDict({"query": nn.Linear(7, 9)}),
                "10": nn.ModuleDict({"up": nn.Linear(12, 8)}),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        self.seen = {"layer.0.query": x[:, :7], "layer.1.query": x[:, 7:14].relu()}
        self.seen["layer.10.up"] = torch.cat((x[:, :7], x[:, :5].tanh()), 1)
        layers = dict(self.named_modules())
        return torch.cat([layers[name](value) for name, value in self.seen.items()], 1)


@pytest.fixture
def calibrated(tmp_path: Path) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """Three adapters with statistics beside them, and the inputs of their layers."""
    model, folders, seen = Chain().double(), [], []
    for i, shapes in enumerate((PLAIN, PLAIN, FEWER)):
        folders.append(adapter(tmp_path / f"task{i}", shapes, seed=i))
        x = draw(50, 14, seed=i)
        collect_statistics(model, [x]).save(folders[-1])
        model(x)
        seen.append(model.seen)
    return folders, seen


def test_predictions_for_adapters_are_what_is_measured(calibrated):
    folders, seen = calibrated
    opened = [Adapter(folder) for folder in folders]
    merged = merge_adapters(folders, rank=2)
    assert merged.recipe["geometry"] == "fisher"
    errors = output_errors(opened, merged.modules, [Statistics.load(f) for f in folders])
    assert set(errors.names) == set(PLAIN)
    for row, name in enumerate(errors.names):
        b, a = merged.modules[name]
        for i, one in enumerate(opened):
            own = one.delta_weight(name) if name in one.modules else torch.zeros_like(b[:, :1])
            x = seen[i][name]
            error = float((x @ (b @ a - own).T).square().sum(1).mean())
            assert float(errors.predicted[row, i]) == pytest.approx(error, rel=1e-5)
            assert error <= float(errors.bound[row, i])
            size = float((x @ own.expand(b.shape[0], x.shape[1]).T).square().sum(1).mean())
            assert float(errors.own[row, i]) == pytest.approx(size, rel=1e-5, abs=1e-12)
    relative = errors.relative()
    assert torch.isnan(relative[errors.names.index("layer.1.query"), 2])  # no update of its own
    assert bool((errors.by_adapter() > 0).all())


def test_the_fisher_mean_predicts_less_error_than_other_merges(calibrated):
    folders, _ = calibrated
    opened, statistics = [Adapter(f) for f in folders], [Statistics.load(f) for f in folders]
    totals = {}
    for geometry in ("fisher", "lifted", "embedded"):
        merged = merge_adapters(folders, geometry=geometry, rank=3, damping=1e-6)
        totals[geometry] = float(output_errors(opened, merged.modules, statistics).predicted.sum())
    assert totals["fisher"] <= min(totals.values())


def test_the_report_shows_predictions_where_there_are_statistics(calibrated, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    folders, _ = calibrated
    inspection = inspect_adapters(folders)
    assert inspection.merge is not None
    found, bounds = inspection.merge.output_errors, inspection.merge.output_bounds
    assert found is not None
    assert bounds is not None
    assert len(found) == len(inspection.modules)
    for row, limit in zip(found, bounds, strict=True):
        for error, most in zip(row, limit, strict=True):
            assert math.isnan(error) or error <= most
    page = render_report(inspection)
    assert "Predicted error of the outputs by layer" in page
    assert "Not available" not in page
    axes = plot_output_errors(inspection)
    assert len(axes.get_lines()) == 4  # three adapters and the level of no adapter
    pyplot.close("all")
    plain = inspect_adapters([adapter(tmp_path / "x"), adapter(tmp_path / "y", seed=1)])
    assert plain.merge is not None
    assert plain.merge.output_errors is None
    assert "manifold-merge calibrate" in render_report(plain)
    with pytest.raises(ValueError, match="calibrate"):
        plot_output_errors(plain)


def test_the_command_line_shows_predictions(calibrated):
    from typer.testing import CliRunner

    folders, _ = calibrated
    shown = CliRunner().invoke(app, ["inspect", *map(str, folders)])
    assert shown.exit_code == 0, shown.output
    assert "output error" in shown.output


def test_the_bound_along_a_chain_is_reached():
    """Numbers instead of matrices, all errors of one sign: nothing can cancel."""
    weights, changes, x = [2.0, 3.0, 0.5], [0.5, 0.25, 1.0], 4.0
    theirs = ours = x
    errors, gains = [], []
    for w, change in zip(weights, changes, strict=True):
        errors.append(change * theirs)
        gains.append(w + change)
        theirs, ours = w * theirs, (w + change) * ours
    assert ours - theirs == pytest.approx(chain_bound(errors, gains), rel=1e-12)


def test_chains_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected 2"):
        chain_bound([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="negative"):
        chain_bound([1.0], [-1.0])
