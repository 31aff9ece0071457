"""Which operations keep an axis free, freeze it, or fix the basis along it."""

from __future__ import annotations

import pytest
import tiny_models as zoo
import torch
from torch import Tensor, nn

from manifold_merge import symmetry_of
from manifold_merge.symmetry_rules import RULES, Call


def test_an_operation_that_is_not_understood_freezes_its_axes() -> None:
    symmetry = symmetry_of(zoo.FixedFilter(), zoo.vectors(4))
    assert [(s.name, s.count) for s in symmetry.sets] == [("two", 6)]
    assert "_fft_r2c is not understood" in symmetry.frozen["one.weight[0]"]
    assert "_fft_r2c is not understood" in str(symmetry)


class Reversed(nn.Sequential):
    """Positions along the features matter."""

    def __init__(self, operation: object) -> None:
        super().__init__(nn.Linear(4, 6), nn.Linear(6, 3))
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self.operation(torch.tanh(self[0](x))))  # type: ignore[operator]


FREEZING = {
    "flip": lambda h: h.flip(-1),
    "roll": lambda h: h.roll(1, -1),
    "cumulative sum": lambda h: h.cumsum(-1),
    "constant": lambda h: h * torch.arange(6, dtype=h.dtype),
    "gather": lambda h: h[:, torch.tensor([3, 1, 0, 2, 5, 4])],
    "tolist": lambda h: h * (1.0 + sum(h[:, :].tolist()[0][:2])),
    "numpy": lambda h: h * float(h.numpy()[0, 0]),
    "mask": lambda h: h.tril(),
    "positions as numbers": lambda h: h + h.argmax(-1, keepdim=True).to(h.dtype),
    "sum of positions": lambda h: h + h.argmax(-1).sum().to(h.dtype),
    "assigned": lambda h: h.clone().index_fill_(1, torch.tensor([2]), 1.0),
    "random": lambda h: torch.where(torch.arange(6) < 3, h, -h),
    "convolved": lambda h: nn.functional.avg_pool1d(h[:, None], 3, 1, 1)[:, 0],
}


@pytest.mark.parametrize("name", FREEZING)
def test_operations_that_know_positions_freeze_the_axis(name: str) -> None:
    symmetry = symmetry_of(Reversed(FREEZING[name]), zoo.vectors(4))
    assert not [s for s in symmetry.sets if any(p.tensor == "0.weight" for p in s.placements)]
    assert {"0.weight[0]", "0.bias[0]"} <= set(symmetry.frozen)


def assigned(h: Tensor) -> Tensor:
    """Two rows per sample: one is copied, the other added to zeros."""
    both = torch.zeros(len(h), 2, 6, dtype=h.dtype)
    both[:, 0] = h
    both[:, 1].add_(h)
    return both


KEEPING = {
    "norm": lambda h: h / h.norm(dim=-1, keepdim=True),
    "softmax": lambda h: h.softmax(-1),
    "standardised": lambda h: (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True),
    "gram": lambda h: h @ (h.t() @ h),
    "einsum": lambda h: torch.einsum("bi,bj,bj->bi", h, h, h),
    "maximum kept": lambda h: torch.where(h == h.amax(-1, keepdim=True), h, 0.5 * h),
    "masked": lambda h: h.masked_fill(h < 0.1, 2.0),
    "one hot": lambda h: h * nn.functional.one_hot(h.argmax(-1), 6),
    "gathered": lambda h: h - h.gather(-1, h.argmax(-1, keepdim=True)),
    # The order of the values does not depend on the order of the units.
    "sorted": lambda h: h.sort(-1).values,
    "one selected": lambda h: h * h[:, 2:3],
    "cut and joined": lambda h: torch.cat([h[:, :2], h[:, 2:]], -1),
    "in place": lambda h: h.clone().mul_(2).add_(h).clamp_(min=0.1),
    "shape of one unit": lambda h: h * torch.ones(h[:, 0].shape)[:, None],
    "assigned to a slice": lambda h: assigned(h).sum(1),
    "filled where small": lambda h: h.clone().masked_fill_(h < 0.1, 2.0),
    "data": lambda h: h + h.detach().data,
}


@pytest.mark.parametrize("name", KEEPING)
def test_equivariant_operations_keep_the_axis_free(name: str) -> None:
    symmetry = symmetry_of(Reversed(KEEPING[name]), zoo.vectors(4))
    places = [p for s in symmetry.sets for p in s.placements if p.tensor == "0.weight"]
    assert places
    # Two parts, each free in itself; or two units before and three after the one that is picked.
    wanted = {"cut and joined": [2, 4], "one selected": [2, 3]}.get(name, [6])
    assert sorted(s.count for s in symmetry.sets) == wanted


class Between(nn.Module):
    """Something between two linear layers."""

    def __init__(self, operation: object) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)
        self.vector, self.scalar = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1))
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        h = self.operation(self, self.one(x))  # type: ignore[operator]
        return self.two(h)


FRAMES = {
    "identity": (lambda m, h: h, "general_linear"),
    "factor": (lambda m, h: -2.0 * h / 3, "general_linear"),
    "learned factor": (lambda m, h: h * m.scalar, "general_linear"),
    "learned shift": (lambda m, h: h + m.vector, "general_linear"),
    "twice": (lambda m, h: h + 0.5 * h, "general_linear"),
    "weighted samples": (lambda m, h: h.t().softmax(-1).t().detach() @ h.t() @ h, None),
    "mean over samples": (lambda m, h: h - h.mean(0), "general_linear"),
    "copied into zeros": (lambda m, h: torch.zeros_like(h).copy_(h), "general_linear"),
    "relu": (lambda m, h: h.relu(), "positive"),
    "leaky relu": (lambda m, h: nn.functional.leaky_relu(h), "positive"),
    "absolute": (lambda m, h: h.abs(), "positive"),
    "largest sample": (lambda m, h: nn.functional.max_pool1d(h.t()[None], 7)[0].t(), "positive"),
    # Scales multiply: one of the two would have to be fixed for the other to be followed.
    "learned gain": (lambda m, h: h * m.vector, None),
    "gain of a fixed factor": (lambda m, h: torch.tanh(h) * m.vector, "positive"),
    "gated by constants": (lambda m, h: h * torch.full((7, 1), 2.0), "general_linear"),
    "norm with a gain": (lambda m, h: nn.functional.layer_norm(h, (6,), m.vector), "positive"),
    "norm without a gain": (lambda m, h: nn.functional.layer_norm(h, (6,)), None),
    "shift by one number": (lambda m, h: h + 1.0, None),
    "learned shift by one number": (lambda m, h: h + m.scalar, None),
    "shift by the sum": (lambda m, h: h + h.sum(-1, keepdim=True), None),
    "relu6": (lambda m, h: nn.functional.relu6(h), None),
    "square": (lambda m, h: h * h, None),
    "threshold": (lambda m, h: torch.where(h > 0.3, h, 0.0), None),
}


@pytest.mark.parametrize("name", FRAMES)
def test_what_lies_between_linear_layers_decides_the_gauge(name: str) -> None:
    operation, kind = FRAMES[name]
    symmetry = symmetry_of(Between(operation), zoo.vectors(4), unused="freeze")
    found = {g.kind for g in symmetry.gauges if any(p.tensor == "two.weight" for p in g.placements)}
    assert found == ({kind} if kind else set())


def test_a_rule_that_does_not_fit_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Call) -> list:
        return [call.labels[5]]

    monkeypatch.setitem(RULES, "relu", broken)
    symmetry = symmetry_of(zoo.mlp(), zoo.vectors(6))
    assert not symmetry.members
    assert symmetry.frozen["0.bias[0]"] == "the operation relu is not understood"
