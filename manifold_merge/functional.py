"""The functional distance: how far the features of two adapted models are apart on inputs.

    d(θ, θᵢ)² = E_x |h(x; θ) - h(x; θᵢ)|²,  x drawn from unlabelled inputs of anchor i

It is a distance between *models*: whatever leaves the function alone, a change of gauge of the
factors above all, leaves it alone too. Distances are given relative to the spread of the anchor's
features, E|h(x; θᵢ) - E h|², so that 0 is the anchor itself, and 1 is as good as a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manifold_merge.adapted_model import AdaptedModel, Source, Updates
from manifold_merge.examples import Batch, Example, as_examples

__all__ = [
    "FEATURES",
    "Features",
    "FunctionalDistance",
    "by_length",
    "functional_distances",
    "parse_features",
]

FEATURES = ("mean", "tokens", "last", "layers")

Features = str | Mapping[str, float]


def parse_features(features: Features) -> dict[str, float]:
    """Read ``"mean+tokens"`` or ``{"mean": 1.0, "tokens": 0.5}``.

    Raises:
        ValueError: A name is unknown or a weight is not positive.

    Example:
        >>> parse_features("mean+tokens")
        {'mean': 1.0, 'tokens': 1.0}
    """
    if isinstance(features, str):
        features = {name.strip(): 1.0 for name in features.split("+")}
    for name, weight in features.items():
        if name not in FEATURES:
            raise ValueError(
                f"features: {name!r} is unknown; expected {', '.join(FEATURES)}, or several of "
                "them joined by +"
            )
        if not 0 < weight < float("inf"):
            raise ValueError(f"features: the weight of {name!r} is {weight}, expected above 0")
    if not features:
        raise ValueError(f"features is empty; expected {', '.join(FEATURES)}")
    return {name: float(weight) for name, weight in features.items()}


def _select(kind: str, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Features as rows ``(N, d)``."""
    if hidden.ndim != 3:  # one vector, or one image, for each example
        return hidden.flatten(1)
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"the model returns features {tuple(hidden.shape)} for tokens {tuple(mask.shape)}; "
            "wrap it in a module that returns (batch, seq, d) or (batch, d)"
        )
    if kind == "tokens":
        return hidden[mask]
    if kind == "last":
        return hidden[torch.arange(len(hidden), device=mask.device), mask.sum(1) - 1]
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


class FunctionalDistance:
    """Squared distances, relative to the spread of each anchor's features.

    Args:
        adapted: The hooked model.
        anchors: The adapters whose functions are approached.
        features: ``"mean"`` over the tokens, ``"last"`` token, each of the ``"tokens"``, each token
            in each of the ``"layers"`` before the last, or several of them with weights.
    """

    def __init__(
        self, adapted: AdaptedModel, anchors: Sequence[Updates], features: Features = "mean"
    ) -> None:
        self.adapted = adapted
        self.anchors = list(anchors)
        self.features = parse_features(features)
        self.spread: list[dict[str, float]] = [{} for _ in anchors]

    @torch.no_grad()
    def measure_spread(self, index: int, batches: Sequence[Sequence[Example]]) -> None:
        """Measure E|h - E h|² of one anchor, the unit of its distances.

        Raises:
            ValueError: The features do not vary, or are not finite.
        """
        counts: dict[str, int] = {}
        sums: dict[str, Tensor] = {}
        squares: dict[str, float] = {}
        for examples in batches:
            batch = self.adapted.collate(examples)
            states = self._states(batch, self.anchors[index])
            for key, rows in self._rows(states, batch.mask).items():
                wide = rows.cpu().double()
                counts[key] = counts.get(key, 0) + len(wide)
                sums[key] = sums.get(key, 0.0) + wide.sum(0)
                squares[key] = squares.get(key, 0.0) + float(wide.square().sum())
        for key, count in counts.items():
            square = squares[key] / count
            spread = square - float((sums[key] / count).square().sum())
            if not spread > 1e-12 * square:
                why = "do not vary" if square == square else "are not finite"
                raise ValueError(
                    f"the features of adapter {index} {why} over its {count} examples; give more "
                    "examples that differ, and run the model in float32"
                )
            self.spread[index][key] = spread

    def __call__(self, index: int, examples: Sequence[Example], updates: Updates) -> Tensor:
        """Squared distance from one anchor on one batch, a scalar.

        Differentiable in the factors of ``updates``. :meth:`measure_spread` comes first.
        """
        squares = self._squares(index, examples, updates)
        return self._combine(index, {kind: total / n for kind, (total, n) in squares.items()})

    @torch.no_grad()
    def mean(self, index: int, batches: Sequence[Sequence[Example]], updates: Updates) -> float:
        """Squared distance from one anchor over several batches, however they are cut."""
        totals: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for examples in batches:
            for kind, (total, count) in self._squares(index, examples, updates).items():
                totals[kind] = total.double() + totals.get(kind, 0.0)
                counts[kind] = count + counts.get(kind, 0)
        return float(self._combine(index, {kind: totals[kind] / counts[kind] for kind in totals}))

    def _squares(
        self, index: int, examples: Sequence[Example], updates: Updates
    ) -> dict[str, tuple[Tensor, int]]:
        """Sum of squared differences and number of rows, by kind of features."""
        batch = self.adapted.collate(examples)
        with torch.no_grad():
            targets = self._states(batch, self.anchors[index])
        states = self._states(batch, updates)
        differences = [x - y for x, y in zip(states, targets, strict=True)]
        rows = self._rows(
            [x.to(torch.promote_types(x.dtype, torch.float32)) for x in differences], batch.mask
        )
        return {key: (x.square().sum(), len(x)) for key, x in rows.items()}

    def _states(self, batch: Batch, updates: Updates) -> list[Tensor]:
        return self.adapted.states(batch, updates, layers="layers" in self.features)

    def _rows(self, states: Sequence[Tensor], mask: Tensor | None) -> dict[str, Tensor]:
        """Features as rows ``(N, d)``, by kind; each layer is a kind of its own."""
        rows = {k: _select(k, states[-1], mask) for k in self.features if k != "layers"}
        for layer, state in enumerate(states[:-1]):
            rows[f"layers/{layer}"] = _select("tokens", state, mask)
        return rows

    def _combine(self, index: int, means: Mapping[str, Tensor]) -> Tensor:
        layers = sum(key.startswith("layers/") for key in means)
        total = next(iter(means.values())).new_zeros(())
        for key, mean in means.items():
            kind = key.split("/")[0]
            weight = self.features[kind] / (layers if kind == "layers" else 1)
            total = total + weight / self.spread[index][key] * mean
        return total / sum(self.features.values())


def functional_distances(
    merged: Source,
    adapters: Sequence[Source],
    model: nn.Module,
    data: Sequence[Sequence[Any]],
    *,
    features: Features = "mean",
    tokenizer: Any = None,
    max_tokens: int = 512,
    batch_size: int = 32,
) -> Tensor:
    """Measure how far a merged adapter's features are from each adapter's on its own inputs.

    Args:
        merged: The merged adapter: a folder, an opened one, or factors by module name.
        adapters: The adapters that it replaces.
        model: The base model.
        data: For each adapter its inputs: texts, token ids, or tensors.
        features: See :class:`FunctionalDistance`.
        tokenizer: Needed for texts.
        max_tokens: Longer texts are cut.
        batch_size: Inputs run at a time.

    Returns:
        E|h(x; merged) - h(x; adapter)|² / E|h(x; adapter) - E h|² for each adapter, ``(k,)``.

    Raises:
        ValueError: The model does not fit the adapters, or data do not fit the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> one = {"0": (torch.randn(4, 1), torch.randn(1, 3))}
        >>> two = {"0": (torch.randn(4, 1), torch.randn(1, 3))}
        >>> inputs = list(torch.randn(16, 3))
        >>> near, far = functional_distances(one, [one, two], model, [inputs, inputs])
        >>> bool(near == 0), bool(far > 0)
        (True, True)
    """
    if len(data) != len(adapters):
        raise ValueError(f"data: expected {len(adapters)}, one for each adapter; got {len(data)}")
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    working = torch.promote_types(dtype, torch.float32)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sources = [Updates.read(source, working, device) for source in (merged, *adapters)]
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    distances = []
    with torch.no_grad(), AdaptedModel(model, sources, pad=pad) as adapted:
        distance = FunctionalDistance(adapted, sources[1:], features)
        for i, own in enumerate(data):
            examples = as_examples(own, tokenizer, max_tokens=max_tokens, name=f"data[{i}]")
            batches = by_length(examples, batch_size)
            distance.measure_spread(i, batches)
            distances.append(distance.mean(i, batches, sources[0]))
    return torch.tensor(distances, dtype=torch.float64)


def by_length(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Cut examples into batches of like length."""
    ordered = sorted(examples, key=len)
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
