"""What a merge will cost, before anybody runs it: errors of layer outputs, predicted and bounded.

On the inputs x of a task, a merge M in place of its own update W_i changes a layer's output by
(M - W_i) x. With the input Gram G_i of the task's calibration texts the mean square of that is
tr((M - W_i) G_i (M - W_i)ᵀ), exactly; nothing has to be run. The prediction is for each layer with
the inputs that the task's own model gives it. How errors add up along a chain of layers is what
:func:`chain_bound` says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manifold_merge.adapters import Adapter
from manifold_merge.linalg import adjoint
from manifold_merge.statistics import Gram, Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from manifold_merge.report_data import Inspection

__all__ = [
    "OutputErrors",
    "chain_bound",
    "error_bound",
    "output_errors",
    "plot_output_errors",
    "predicted_error",
    "worst_gain",
]

Factors = tuple[Tensor, Tensor]

# Statistics are stored in float32: their rounding, and that of the sums behind them.
ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True)
class OutputErrors:
    """Predicted errors of the outputs of L modules for k adapters, as mean squares.

    Attributes:
        names: The modules.
        predicted: E|(M - W_i) x|² on adapter i's calibration texts, ``(L, k)``.
        bound: What the measured error on those texts cannot exceed, ``(L, k)``. It is the
            prediction, but for rounding, where the Gram is stored exactly.
        own: E|W_i x|², what the adapter itself does there, ``(L, k)``.
        gain: Largest singular value of M - W_i, ``(L, k)``: on any inputs whatever the mean
            squared error is at most gain² E|x|².
    """

    names: tuple[str, ...]
    predicted: Tensor
    bound: Tensor
    own: Tensor
    gain: Tensor

    def relative(self) -> Tensor:
        """√(predicted/own), ``(L, k)``: 0 is no error, 1 that of leaving the adapter out.

        NaN where the adapter does nothing.
        """
        return (self.predicted / torch.where(self.own > 0, self.own, math.nan)).sqrt()

    def by_adapter(self) -> Tensor:
        """The relative error of each adapter, ``(k,)``: root of the mean over its modules."""
        squared = self.relative().square()
        return torch.nanmean(squared, 0).sqrt()


@torch.no_grad()
def output_errors(
    adapters: Sequence[Adapter],
    merged: Mapping[str, Factors],
    statistics: Sequence[Statistics],
) -> OutputErrors:
    """Predict and bound the errors of layer outputs that a merge makes.

    Args:
        adapters: k adapters.
        merged: Merged factors by module, B ``(m, R)`` and A ``(R, n)``.
        statistics: Statistics of each adapter. A module that one of them lacks has the error NaN
            there.

    Returns:
        Errors of each module for each adapter. A module that an adapter lacks is an update of zero.
    """
    rows: dict[str, list[list[float]]] = {}
    for name, (b, a) in merged.items():
        rows[name] = []
        for adapter, one in zip(adapters, statistics, strict=True):
            if name not in one.owners:
                rows[name].append([math.nan] * 4)
                continue
            gram = one.gram(name)
            dtype = gram.dtype
            left, right = b.cpu().to(dtype), a.cpu().to(dtype)
            own = left.new_zeros(()), left.new_zeros(())
            if name in adapter.modules:
                pair = adapter.factors(name, dtype)
                own = predicted_error(pair, gram), worst_gain(pair)
                left, right = torch.cat((left, -pair[0]), 1), torch.cat((right, pair[1]), 0)
            change = (left, right)
            found = (predicted_error(change, gram), error_bound(change, gram), own[0])
            rows[name].append([*map(float, found), float(worst_gain(change))])
        for adapter in adapters:
            adapter.release()
    table = torch.tensor(list(rows.values()), dtype=torch.float64)
    table = table.reshape(len(rows), len(adapters), 4)
    predicted, bound, own_size, gain = table.unbind(-1)
    return OutputErrors(tuple(rows), predicted, bound, own_size, gain)


def predicted_error(change: Factors, gram: Gram) -> Tensor:
    """E|D x|² = tr(D G Dᵀ) of a change D = B A, a scalar.

    Args:
        change: B ``(m, r)`` and A ``(r, n)``.
        gram: The input Gram, of size n.

    Returns:
        The mean squared change of the output on the inputs of the Gram.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> gram = Gram(x.T @ x / 2)
        >>> predicted_error((torch.ones(1, 1), torch.tensor([[1.0, 1.0]])), gram)
        tensor(5.)
    """
    b, a = change
    inner = a @ (gram @ adjoint(a))
    return ((adjoint(b) @ b) * inner).sum().clamp(min=0)


def error_bound(change: Factors, gram: Gram) -> Tensor:
    """What E|D x|² cannot exceed on the inputs from which the Gram was made, a scalar.

    A Gram stored as N + diag(d), with N = F Fᵀ not larger than G, leaves out E = G - N, of which
    the diagonal d is known. As E is positive semi-definite, |E_jk| ≤ √(d_j d_k), so that
    tr(D E Dᵀ) ≤ (Σ √d_j |D_j|)² with the columns D_j of D; and tr(D E Dᵀ) ≤ σ₁(D)² Σ d_j. The
    smaller of the two is added to tr(D N Dᵀ).

    Args:
        change: B ``(m, r)`` and A ``(r, n)``.
        gram: The input Gram, of size n.

    Returns:
        The bound; it equals :func:`predicted_error`, but for rounding, for a Gram stored whole.
    """
    if gram.matrix is not None:
        # Rounding of stored entries: at most a share of the whole trace, for any change.
        slack = torch.finfo(torch.float32).eps * gram.trace() * worst_gain(change) ** 2
        return predicted_error(change, gram) * (1 + ROUNDING) + slack
    known = (
        predicted_error(change, Gram(factor=gram.factor, remainder=None))
        if (gram.factor is not None)
        else change[0].new_zeros(())
    )
    b, a = change
    rest = change[0].new_zeros(()) if gram.remainder is None else _remainder_bound(b, a, gram)
    slack = torch.finfo(torch.float32).eps * gram.trace() * worst_gain(change) ** 2
    return (known + rest) * (1 + ROUNDING) + slack


def _remainder_bound(b: Tensor, a: Tensor, gram: Gram) -> Tensor:
    assert gram.remainder is not None
    if gram.factor is None:  # one-hot inputs: the diagonal is the whole Gram
        return predicted_error((b, a), gram)
    columns = ((adjoint(b) @ b @ a) * a).sum(0).clamp(min=0).sqrt()
    by_columns = (gram.remainder.clamp(min=0).sqrt() * columns).sum() ** 2
    by_gain = worst_gain((b, a)) ** 2 * gram.remainder.sum()
    return torch.minimum(by_columns, by_gain)


def worst_gain(change: Factors) -> Tensor:
    """Largest singular value of D = B A: |D x| ≤ gain |x| for each x, a scalar.

    Args:
        change: B ``(m, r)`` and A ``(r, n)``.
    """
    left = torch.linalg.qr(change[0], mode="r")[1]
    right = torch.linalg.qr(adjoint(change[1]), mode="r")[1]
    return torch.linalg.matrix_norm(left @ adjoint(right), 2)


def chain_bound(errors: Sequence[float], gains: Sequence[float]) -> float:
    """Bound the error at the end of a chain of layers by the errors of each.

    With y_l = f_l(y_{l-1}) and merged layers f̂_l that are Lipschitz with constant L_l,
    |ŷ_l - y_l| ≤ L_l |ŷ_{l-1} - y_{l-1}| + |f̂_l(y_{l-1}) - f_l(y_{l-1})|, and root mean squares
    obey the same inequality (Minkowski). The last term is what :func:`output_errors` bounds, on the
    inputs of the task's own model. For a linear layer followed by an activation of slope at most 1
    the constant is the largest singular value of the merged weight. Layer normalisation and
    attention have no constant that holds everywhere: no such bound is claimed through them.

    Args:
        errors: Root mean squared error of each layer, first to last.
        gains: Lipschitz constant of each merged layer.

    Returns:
        A bound on the root mean squared error of the last output.

    Raises:
        ValueError: There are not as many gains as errors, or a number is negative.

    Example:
        >>> chain_bound([1.0, 0.5], [3.0, 2.0])
        2.5
    """
    if len(errors) != len(gains):
        raise ValueError(f"gains: expected {len(errors)}, one for each error; got {len(gains)}")
    if min([*errors, *gains], default=0) < 0:
        raise ValueError("errors and gains must not be negative")
    total = 0.0
    for error, gain in zip(errors, gains, strict=True):
        total = gain * total + error
    return total


def plot_output_errors(inspection: Inspection, ax: Axes | None = None) -> Axes:
    """Draw the predicted error of the outputs, layer by layer, for each adapter.

    Args:
        inspection: Of adapters that have statistics.
        ax: Where to draw; a new figure if ``None``.

    Returns:
        The axes.

    Raises:
        ValueError: There are no predictions.
        ImportError: matplotlib is not installed.
    """
    from manifold_merge.plots_style import _axes, _layer_axis, _layers, _legend, _line

    merge = inspection.merge
    if merge is None or merge.output_errors is None:
        raise ValueError("predicted errors need statistics of every adapter; calibrate them first")
    ax = _axes(ax)
    layers = _layers([m.name for m in inspection.modules])
    for i, adapter in enumerate(inspection.adapters):
        values = []
        for indices in layers.values():
            squares = [merge.output_errors[j][i] ** 2 for j in indices]
            known = [x for x in squares if math.isfinite(x)]
            values.append(math.sqrt(sum(known) / len(known)) if known else math.nan)
        ax.plot(values, label=adapter.name, **_line(i))
    ax.axhline(1, color="0.5", linestyle=":", label="no adapter at all")
    _layer_axis(ax, layers)
    ax.set_ylabel(r"relative error $|(M - W_i)x|\,/\,|W_i x|$ (root mean square)")
    ax.set_ylim(bottom=0)
    ax.set_title("Predicted error of the outputs by layer")
    _legend(ax)
    return ax
