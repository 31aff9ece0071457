"""How products, convolutions and normalisations act on labels."""

from __future__ import annotations

from collections.abc import Sequence

from manifold_merge.symmetry_combine import combine, multiply
from manifold_merge.symmetry_labels import Label
from manifold_merge.symmetry_rules import Call, rule

__all__: list[str] = []

SPATIAL = "neighbouring positions along the axis are combined"


def _plus(label: Label, bias: Label | None) -> Label:
    """Add a bias that broadcasts over the leading axes."""
    if bias is None:
        return label
    rank = len(label.axes)
    names = list(range(rank - len(bias.axes), rank))
    for axis, name in enumerate(names):
        if label.axes[name] and not bias.axes[axis]:
            label.fix_frames([name])
    for name in range(rank - len(bias.axes)):
        label.fix_frames([name])
    return combine(label, range(rank), bias, names, range(rank))


@rule("mm", "bmm", "matmul", "dot", "mv", "vdot")
def _matmul(call: Call) -> Label:
    x, y = call.labels
    return _product(x, y)


def _product(x: Label, y: Label) -> Label:
    if len(x.axes) == 1:
        x_names: list[str] = ["k"]
    else:
        x_names = [f"batch{n}" for n in range(len(x.axes) - 2, 0, -1)] + ["i", "k"]
    if len(y.axes) == 1:
        y_names: list[str] = ["k"]
    else:
        y_names = [f"batch{n}" for n in range(len(y.axes) - 2, 0, -1)] + ["k", "j"]
    longer = x_names if len(x_names) >= len(y_names) else y_names
    batch = [name for name in longer if name.startswith("batch")]
    out = batch + [name for name in ("i", "j") if name in x_names or name in y_names]
    return multiply(x, x_names, y, y_names, out)


@rule("addmm", "addmv", "baddbmm")
def _add_matmul(call: Call) -> Label:
    bias, x, y = call.labels
    return _plus(_product(x, y), bias)


@rule("linear")
def _linear(call: Call) -> Label:
    x, weight = call["input"], call["weight"]
    lead = list(range(len(x.axes) - 1))
    out = combine(x, [*lead, "k"], weight, ["j", "k"], [*lead, "j"])
    return _plus(out, call["bias"])


@rule("convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable")
def _convolution(call: Call) -> Label:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    rank = len(x.axes)
    spatial = list(range(2, rank))
    pixels = call.shapes[0][2:]
    groups = call["groups"] or 1
    for label in (x, weight):
        label.freeze(spatial, SPATIAL)
    x, weight = x.without_axes(spatial), weight.without_axes(spatial)
    if call["transposed"]:
        # Stored as (inputs, outputs / groups): the groups are blocks of the inputs.
        rows, columns = weight.shape
        weight = weight.reshaped([groups, rows // groups, columns]).permuted([0, 2, 1])
    else:
        rows, columns = weight.shape
        weight = weight.reshaped([groups, rows // groups, columns])
    batch, channels = x.shape
    x = x.reshaped([batch, groups, channels // groups])
    out = multiply(x, "ngi", weight, "goi", "ngo")
    out = out.reshaped([batch, call.shapes[0][1]])
    return _plus(out, bias).with_new_axes(pixels, SPATIAL)


def _scaled(x: Label, axes: Sequence[int], weight: Label | None, bias: Label | None) -> Label:
    """Multiply by a weight and add a bias after a normalisation, which fixed the frame of x."""
    x.fix_frames()
    if weight is None:
        return x
    names = range(len(x.axes))
    frames = dict.fromkeys(axes, "none")
    weight.fix_frames(positive=False)
    result = combine(x, names, weight, axes, names, frames, dict.fromkeys(axes, 1))  # type: ignore[arg-type]
    if bias is not None:
        result = combine(result, names, bias, axes, names)
    return result


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
@rule("cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_no_update", "batch_norm")
@rule("_batch_norm_impl_index", "_batch_norm_with_update", "native_batch_norm_legit")
def _batch_norm(call: Call) -> list[Label]:
    x = call["input"]
    names = range(len(x.axes))
    for statistic in (call["running_mean"], call["running_var"]):
        if statistic is not None:
            statistic.fix_frames()
            x = combine(x, names, statistic, [1], names)
    out = _scaled(x, [1], call["weight"], call["bias"])
    return _with_idle(call, out)


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(call: Call) -> list[Label]:
    x = call["input"]
    rank = len(x.axes)
    axes = list(range(rank - len(call["normalized_shape"]), rank))
    return _with_idle(call, _scaled(x.mixed_axes(axes), axes, call["weight"], call["bias"]))


@rule("native_group_norm", "group_norm")
def _group_norm(call: Call) -> list[Label]:
    x = call["input"]
    shape = list(x.shape)
    groups = call["group"] or call["num_groups"]
    grouped = x.reshaped([shape[0], groups, shape[1] // groups, *shape[2:]])
    grouped = grouped.mixed_axes(range(2, len(grouped.axes)))
    return _with_idle(call, _scaled(grouped.reshaped(shape), [1], call["weight"], call["bias"]))


def _with_idle(call: Call, out: Label) -> list[Label]:
    """The result, and frozen labels for saved statistics that nothing uses."""
    reason = "saved statistics of a normalisation"
    return [out, *(Label.fresh(call.families, shape, reason) for shape in call.shapes[1:])]


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "max_pool1d")
@rule("max_pool1d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool1d", "max_pool3d")
@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mkldnn_max_pool2d")
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_linear1d")
@rule("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
def _pool(call: Call) -> list[Label]:
    x = call.label
    spatial = int(next(d for d in call.name if d.isdigit()))
    axes = list(range(len(x.axes) - spatial, len(x.axes)))
    x.freeze(axes, SPATIAL)
    if "max" in call.name:
        x.fix_frames(positive=False)
    out = x.without_axes(axes).with_new_axes(call.shapes[0][-spatial:], SPATIAL)
    return _with_idle(call, out)


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d")
@rule("replication_pad1d", "pad")
def _pad(call: Call) -> Label:
    x, shape = call.label, call.shapes[0]
    padded = [axis for axis, (a, b) in enumerate(zip(x.shape, shape, strict=True)) if a != b]
    x.freeze(padded, SPATIAL)
    if call["value"]:
        x.fix_frames()
    kept = [axis for axis in range(len(shape)) if axis not in padded]
    out = x.without_axes(padded).with_new_axes([shape[axis] for axis in padded], SPATIAL)
    order = [kept.index(a) if a in kept else len(kept) + padded.index(a) for a in range(len(shape))]
    return out.permuted(order)
