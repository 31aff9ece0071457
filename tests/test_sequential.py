"""The sequential start: against least squares by hand, for all kinds of layers, and refusals."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import peft_models as models
import pytest
import torch
from refine_models import MODELS, Adapters, conv_data, setting, texts
from torch import Tensor, nn

from manifold_merge.adapted_model import AdaptedModel, Updates
from manifold_merge.functional import functional_distances
from manifold_merge.sequential import _within, sequential_start


def start(
    model: nn.Module, adapters: Adapters, mean: Any, data: Any, **options: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    anchors = [Updates.read(x, torch.float64) for x in adapters]
    merged = Updates.read(mean, torch.float64)
    weights = [1 / len(adapters)] * len(adapters)
    with AdaptedModel(model, [merged, *anchors]) as adapted:
        return sequential_start(adapted, anchors, data, weights, merged, **options)


@pytest.mark.parametrize("kind", MODELS)
def test_one_anchor_is_found_again(kind: str) -> None:
    model, adapters, mean, data = setting(kind)
    found = start(model, adapters[:1], mean, data[:1], damping=1e-10)
    (distance,) = functional_distances(found, adapters[:1], model, data[:1], features="tokens")
    assert distance < 1e-10


def test_convolutions() -> None:
    model, adapters, mean, data = conv_data()
    found = start(model, adapters[:1], mean, data[:1], damping=1e-10)
    (distance,) = functional_distances(found, adapters[:1], model, data[:1])
    assert distance < 1e-10
    both = start(model, adapters, mean, data)
    before = functional_distances(mean, adapters, model, data).sum()
    assert functional_distances(both, adapters, model, data).sum() < before


def test_embeddings() -> None:
    model = models.make(models.bert)
    names = ["embeddings.word_embeddings"]
    adapters = [
        {names[0]: (torch.randn(12, 3).double(), torch.randn(3, models.VOCABULARY).double())}
        for _ in range(2)
    ]
    data = [texts(60, 1), texts(60, 2)]
    found = start(model, adapters[:1], adapters[1], data[:1], damping=1e-10)
    (distance,) = functional_distances(found, adapters[:1], model, data[:1])
    assert distance < 1e-10
    used = sorted({token for text in data[0] for token in text})
    for (b, a), (c, d) in [(found[names[0]], adapters[0][names[0]])]:
        torch.testing.assert_close((b @ a)[:, used], (c @ d)[:, used], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("sizes", "rank"), [((6, 9), 2), ((9, 6), 2), ((5, 5), 5)])
def test_first_module_is_reduced_rank_regression(sizes: tuple[int, int], rank: int) -> None:
    m, n = sizes
    model = nn.Linear(n, m).double()
    holder = nn.Sequential(model)
    adapters = [{"0": (torch.randn(m, 3).double(), torch.randn(3, n).double())} for _ in range(2)]
    mean = {"0": (torch.randn(m, rank).double(), torch.randn(rank, n).double())}
    data = [list(torch.randn(count, n).double() * torch.linspace(0.2, 2, n)) for count in (30, 50)]
    damping = 0.1
    (found,) = start(holder, adapters, mean, data, damping=damping).values()

    # The same by whitening with the symmetric root of the Gram, without eigenvectors of M G Mᵀ.
    x = [torch.stack(own) for own in data]
    grams = [0.5 * own.mT @ own / len(own) for own in x]
    gram = sum(grams)
    size = damping * gram.diagonal().mean()
    cross = sum(b["0"][0] @ b["0"][1] @ g for b, g in zip(adapters, grams, strict=True))
    cross = cross + size * mean["0"][0] @ mean["0"][1]
    gram = gram + size * torch.eye(n).double()
    values, vectors = torch.linalg.eigh(gram)
    root = (vectors * values.sqrt()) @ vectors.mT
    u, s, vt = torch.linalg.svd(cross @ torch.linalg.inv(root), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(root)
    torch.testing.assert_close(found[0] @ found[1], expected)


def test_later_modules_see_the_merged_model() -> None:
    sizes = [6, 5, 5, 4]
    layers = [nn.Linear(n, m).double() for n, m in itertools.pairwise(sizes)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    names = ["0", "2", "4"]
    anchors, mean = [{}, {}], {}
    for name, layer in zip(names, layers, strict=True):
        m, n = layer.weight.shape
        for anchor in anchors:
            anchor[name] = torch.randn(m, 2).double(), torch.randn(2, n).double()
        mean[name] = torch.zeros(m, 5).double(), torch.zeros(5, n).double()
    theirs = ours = [torch.randn(40, 6).double() for _ in range(2)]
    found = start(model, anchors, mean, [list(own) for own in ours], damping=1e-12)
    for name, layer in zip(names, layers, strict=True):
        with torch.no_grad():
            targets = [
                layer(x) + x @ (anchor[name][0] @ anchor[name][1]).mT
                for x, anchor in zip(theirs, anchors, strict=True)
            ]
            inputs = torch.cat(ours)
            wanted = torch.cat(targets) - layer(inputs)
            update = torch.linalg.lstsq(inputs, wanted).solution.mT
            product = found[name][0] @ found[name][1]
            torch.testing.assert_close(product, update, rtol=1e-5, atol=1e-6)
            theirs = [torch.tanh(y) for y in targets]
            ours = [torch.tanh(layer(x) + x @ product.mT) for x in ours]


def test_later_modules_correct_earlier_ones() -> None:
    # The second layer sees what the merged first layer makes, and the anchors' own outputs.
    model, adapters, mean, data = setting()
    found = start(model, adapters, mean, data)
    kept = {name: mean[name] if "layer.0" in name else found[name] for name in mean}
    ahead = functional_distances(found, adapters, model, data).sum()
    assert ahead < functional_distances(mean, adapters, model, data).sum()
    assert ahead < functional_distances(kept, adapters, model, data).sum()


class _Stray(nn.Module):
    """A model that cannot be stepped through."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "one row":
            return x + self.one(x.mean(0, keepdim=True))
        if self.how == "order" and x[0, 0] > 0:
            return self.one(self.two(x))
        if self.how == "skips" and x[0, 0] > 0:
            return self.two(x)
        return self.two(self.one(x))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("one row", "cannot be told apart; use start='merged'"),
        ("order", "the model calls 'one' for some examples where it calls 'two'"),
        ("skips", "the model calls|does not call"),
    ],
)
def test_models_that_cannot_be_stepped_through(how: str, message: str) -> None:
    model = _Stray(how).double()
    factors = {n: (torch.ones(3, 1).double(), torch.ones(1, 3).double()) for n in ("one", "two")}
    low, high = [-torch.ones(3).double()] * 2, [torch.ones(3).double()] * 2
    threads = threading.active_count()
    with pytest.raises(ValueError, match=message):
        start(model, [factors, factors], factors, [low, high])
    assert threading.active_count() == threads
    assert not any(module._forward_hooks for module in model.modules())


def test_long_texts_are_taken_in_smaller_numbers() -> None:
    examples = [[1] * 10, [2] * 10, [3] * 10]
    assert _within(examples, 25) == examples[:2]
    assert _within(examples, 5) == examples[:1]
    images = [torch.ones(2), torch.zeros(2)]
    assert _within(images, 5) == images
