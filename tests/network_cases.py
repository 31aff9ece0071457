"""Small networks whose symmetries are written by hand, for the tests of matching and merging."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from manifold_merge import GaugeGroup, NetworkSymmetry, PermutedSet, Placement


def mlp_symmetry(*widths: int) -> NetworkSymmetry:
    """Of ``nn.Sequential`` with linear layers 0, 2, 4, ... and ReLU between them."""
    sets, gauges, shapes = [], [], {}
    for i in range(len(widths) - 1):
        shapes[f"{2 * i}.weight"] = (widths[i + 1], widths[i])
        shapes[f"{2 * i}.bias"] = (widths[i + 1],)
        if i < len(widths) - 2:
            ins = (Placement(f"{2 * i}.weight", 0), Placement(f"{2 * i}.bias", 0))
            out = f"{2 * i + 2}.weight"
            sets.append(PermutedSet(f"{2 * i}", widths[i + 1], (*ins, Placement(out, 1))))
            places = (*ins, Placement(out, 1, inverse=True))
            gauges.append(GaugeGroup(f"{2 * i}.scale", "positive", widths[i + 1], places))
    return NetworkSymmetry(tuple(sets), tuple(gauges), shapes)


def mlp(*widths: int) -> nn.Sequential:
    """The network of :func:`mlp_symmetry`, with random weights."""
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def random_state(symmetry: NetworkSymmetry, seed: int = 0) -> dict[str, Tensor]:
    """Standard normal tensors of the shapes of a symmetry, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator)
        for name, shape in symmetry.shapes.items()
    }


def experts_symmetry(experts: int, width: int, features: int) -> NetworkSymmetry:
    """A mixture of experts kept as whole tensors, with a router; neurons inside each expert."""
    inner = tuple(
        PermutedSet(
            f"experts.{e}.neurons",
            width,
            (Placement(f"experts.{e}.up", 0), Placement(f"experts.{e}.down", 1)),
            parent=("experts", e),
        )
        for e in range(experts)
    )
    roles = tuple(tuple(f"experts.{e}.{r}" for e in range(experts)) for r in ("up", "down", "bias"))
    outer = PermutedSet("experts", experts, (Placement("router", 0),), roles)
    shapes: dict[str, tuple[int, ...]] = {"router": (experts, features)}
    for e in range(experts):
        shapes[f"experts.{e}.up"] = (width, features)
        shapes[f"experts.{e}.down"] = (features, width)
        shapes[f"experts.{e}.bias"] = (features,)
    return NetworkSymmetry((*inner, outer), (), shapes)


def stacked_experts_symmetry(experts: int, width: int, features: int) -> NetworkSymmetry:
    """The same with the experts stacked in one tensor for each role."""
    inner = tuple(
        PermutedSet(
            f"neurons.{e}",
            width,
            (Placement("up", 1, within=((0, e),)), Placement("down", 2, within=((0, e),))),
            parent=("experts", e),
        )
        for e in range(experts)
    )
    places = (Placement("router", 0), Placement("up", 0), Placement("down", 0))
    shapes = {
        "router": (experts, features),
        "up": (experts, width, features),
        "down": (experts, features, width),
    }
    return NetworkSymmetry((*inner, PermutedSet("experts", experts, places)), (), shapes)


def heads_symmetry(heads: int, width: int, features: int) -> NetworkSymmetry:
    """Attention with a fused projection of queries, keys and values, each head a block of rows."""
    fused = tuple(Placement("qkv", 0, block=width, start=part * heads * width) for part in range(3))
    places = (*fused, Placement("out", 1, block=width))
    size = heads * width
    shapes = {"qkv": (3 * size, features), "out": (features, size)}
    return NetworkSymmetry((PermutedSet("heads", heads, places),), (), shapes)


def residual_symmetry(stream: int, width: int) -> NetworkSymmetry:
    """A residual stream that a square matrix maps to itself: one set on both axes of a tensor."""
    stream_places = (
        Placement("embed", 1),
        Placement("square", 0),
        Placement("square", 1),
        Placement("up", 1),
        Placement("down", 0),
        Placement("head", 1),
    )
    sets = (
        PermutedSet("hidden", width, (Placement("up", 0), Placement("down", 1))),
        PermutedSet("stream", stream, stream_places),
    )
    shapes = {
        "embed": (11, stream),
        "square": (stream, stream),
        "up": (width, stream),
        "down": (stream, width),
        "head": (3, stream),
    }
    return NetworkSymmetry(sets, (), shapes)


def flattened_symmetry(channels: int, pixels: int) -> NetworkSymmetry:
    """Convolution, batch normalisation, flatten, linear: a channel owns a block of columns."""
    places = (
        Placement("conv.weight", 0),
        Placement("bn.weight", 0),
        Placement("bn.bias", 0),
        Placement("bn.running_mean", 0),
        Placement("bn.running_var", 0),
        Placement("fc.weight", 1, block=pixels),
    )
    shapes = {
        "conv.weight": (channels, 2, 3, 3),
        "bn.weight": (channels,),
        "bn.bias": (channels,),
        "bn.running_mean": (channels,),
        "bn.running_var": (channels,),
        "fc.weight": (4, channels * pixels),
        "fc.bias": (4,),
    }
    return NetworkSymmetry((PermutedSet("channels", channels, places),), (), shapes)


NETWORKS = {
    "mlp": mlp_symmetry(5, 8, 9, 7, 3),
    "experts as tensors": experts_symmetry(3, 5, 4),
    "stacked experts": stacked_experts_symmetry(3, 5, 4),
    "fused heads": heads_symmetry(5, 2, 6),
    "residual stream": residual_symmetry(6, 8),
    "flattened channels": flattened_symmetry(6, 4),
}
