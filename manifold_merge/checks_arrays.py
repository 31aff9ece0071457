"""Laws about arrays: shapes, batches, precision, vmap, and no writing into arguments.

Source: the docstrings of geoopt's ``Manifold``, where the last ``ndim`` dimensions are one point
and all before them are batch. Users import :mod:`manifold_merge.checks`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from manifold_merge.checks_frame import LAWS, NotApplicable, Sample, convert, register_law
from manifold_merge.checks_report import Measurement, claim, crash
from manifold_merge.linalg import broadcast_shapes

# Each method with its arguments: x, y points; u, v tangent at x; a any array.
METHODS = {
    "projx": "x",
    "proju": "xa",
    "egrad2rgrad": "xa",
    "inner": "xuv",
    "component_inner": "xu",
    "retr": "xu",
    "expmap": "xu",
    "logmap": "xy",
    "dist": "xy",
    "transp": "xyv",
    "retr_transp": "xuv",
    "expmap_transp": "xuv",
}
SCALAR = ("inner", "dist")


def arguments(sample: Sample, x: Tensor) -> dict[str, Tensor]:
    """Draw one of each kind of argument at the point ``x``."""
    return {
        "x": x,
        "y": sample.near(x),
        "u": sample.tangent(x),
        "v": sample.tangent(x),
        "a": sample.ambient(x),
    }


def call(sample: Sample, name: str, drawn: dict[str, Tensor], **options: bool) -> list[Tensor]:
    """Call a method on drawn arguments and return its outputs as a list."""
    # Copies, so that a method that writes into its arguments spoils its own law alone.
    given = (drawn[k].clone() for k in METHODS[name])
    out = getattr(sample.manifold, name)(*given, **options)
    return list(out) if isinstance(out, tuple) else [out]


@register_law(
    "shapes",
    remedy="return tensors of the shape, dtype and device of the arguments; "
    "keepdim=True keeps ndim dimensions of size one",
)
def check_shapes(sample: Sample) -> Iterator[Measurement]:
    """Every method keeps shape, dtype and device; scalars have the batch shape."""
    drawn = arguments(sample, sample.x)
    point, batch = tuple(sample.x.shape), tuple(sample.x.shape[: sample.x.dim() - sample.ndim])
    for name in METHODS:
        cases: list[tuple[dict[str, bool], tuple[int, ...]]] = [({}, point)]
        if name in SCALAR:
            kept = batch + (1,) * sample.ndim
            cases = [({}, batch), ({"keepdim": False}, batch), ({"keepdim": True}, kept)]
        for options, expected in cases:
            given = [*METHODS[name], *(f"{k}={v}" for k, v in options.items())]
            label = f"{name}({', '.join(given)})"
            try:
                outputs = call(sample, name, drawn, **options)
            except NotImplementedError:
                continue
            except Exception as error:  # each method is judged by itself
                yield crash(label, error)
                continue
            for out in outputs:
                got = tuple(out.shape)
                if name == "component_inner":
                    got = tuple(broadcast_shapes(got, point))
                yield claim(f"{label} has shape {got}, expected {expected}", got == expected)
                kind, wanted = (out.dtype, out.device), (sample.x.dtype, sample.x.device)
                yield claim(f"{label} is of {kind}, expected {wanted}", kind == wanted)


@register_law(
    "arguments_unchanged", remedy="replace in-place operations on arguments by out-of-place ones"
)
def check_arguments_unchanged(sample: Sample) -> Iterator[Measurement]:
    """No method writes into its arguments."""
    drawn = arguments(sample, sample.x)
    for name, letters in METHODS.items():
        given = [drawn[k].clone() for k in letters]
        try:
            getattr(sample.manifold, name)(*given)
        except NotImplementedError:
            continue
        for k, tensor in zip(letters, given, strict=True):
            yield claim(f"{name}({', '.join(letters)}) changes {k}", torch.equal(tensor, drawn[k]))


def _compare_with_singles(sample: Sample, shared: str) -> Iterator[Measurement]:
    """Compare calls on three stacked draws, sharing some arguments, with single calls."""
    singles = [arguments(sample, sample.x if shared else x) for x in sample.points[:3]]
    for name, letters in METHODS.items():
        if shared and letters == shared:
            continue
        stacked = {k: torch.stack([single[k] for single in singles]) for k in letters}
        stacked |= {k: singles[0][k] for k in shared}
        try:
            together = call(sample, name, stacked)
            apart = [call(sample, name, single) for single in singles]
        except NotImplementedError:
            continue
        except Exception as error:  # each method is judged by itself
            yield crash(name, error)
            continue
        for i, out in enumerate(together):
            yield sample.close(f"{name} of a batch", out, torch.stack([each[i] for each in apart]))


@register_law(
    "batching", remedy="treat all dimensions before the last ndim as batch, each by itself"
)
def check_batching(sample: Sample) -> Iterator[Measurement]:
    """A batched call gives the stacked results of single calls."""
    yield from _compare_with_singles(sample, shared="")


@register_law(
    "broadcasting", remedy="let batch dimensions of point and vectors broadcast against each other"
)
def check_broadcasting(sample: Sample) -> Iterator[Measurement]:
    """One point against a batch of vectors or points gives the stacked single results."""
    yield from _compare_with_singles(sample, shared="x")


@register_law(
    "vmap", remedy="avoid branches on values, in-place writes and torch.jit in what is mapped"
)
def check_vmap(sample: Sample) -> Iterator[Measurement]:
    """torch.func.vmap over inner, proju, retr and egrad2rgrad equals the batched call."""
    singles = [arguments(sample, x) for x in sample.points[:3]]
    stacked = {k: torch.stack([single[k] for single in singles]) for k in singles[0]}
    for name in ("inner", "proju", "retr", "egrad2rgrad"):
        given = [stacked[k].clone() for k in METHODS[name]]
        try:
            mapped = torch.func.vmap(getattr(sample.manifold, name))(*given)
        except Exception as error:  # each method is judged by itself
            yield crash(f"vmap({name})", error)
            continue
        yield sample.close(f"vmap({name})", mapped, call(sample, name, stacked)[0])


SINGLE_PRECISION_LAWS = (
    "shapes",
    "valid_points",
    "point_projection",
    "projections",
    "metric",
    "gradient",
    "retraction",
    "transport",
    "retr_transp",
    "exp_log",
    "optimisers",
)


@register_law(
    "single_precision",
    remedy="look for thresholds and constants that only suit float64, and for hidden dtype changes",
)
def check_single_precision(sample: Sample) -> Iterator[Measurement]:
    """The basic laws hold in float32 with the tolerances of float32."""
    if sample.x.dtype == torch.float32:
        raise NotApplicable("the sample is in float32 already")
    manifold = convert(sample.manifold, torch.float32, sample.x.device)
    single = dataclasses.replace(
        sample,
        manifold=manifold,
        points=tuple(manifold.projx(p.float()) for p in sample.points),
        given_cost=None,  # the user's cost may hold float64 constants
        rtol=max(sample.rtol, math.sqrt(torch.finfo(torch.float32).eps)),
    )
    for name in SINGLE_PRECISION_LAWS:
        if name in LAWS and LAWS[name].run(sample).status == "passed":
            for measured in LAWS[name].run(single).measurements:
                yield dataclasses.replace(measured, what=f"{name}: {measured.what}")
