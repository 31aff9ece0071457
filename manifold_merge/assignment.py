"""Linear assignment, exact and softened: which element of one set belongs to which of another."""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["assign", "inverse_permutation", "sinkhorn", "softassign"]

# Entries of a plan below e⁻³⁰ are rounding; as denormal numbers they would slow every product down.
SMALLEST_LOG = -30.0


class _Assign(torch.autograd.Function):
    """scipy's assignment, opaque to autograd and ``vmap``: a mapped dimension is a batch."""

    @staticmethod
    def forward(score: Tensor) -> Tensor:
        flat = score.detach().reshape(-1, *score.shape[-2:])
        # NaN has no best assignment; any will do, as the distances that follow are NaN as well.
        array = flat.nan_to_num().cpu().numpy()
        found = [torch.from_numpy(linear_sum_assignment(x, maximize=True)[1]) for x in array]
        empty = torch.zeros((0, score.shape[-1]), dtype=torch.long)
        permutations = torch.stack(found) if found else empty
        return permutations.to(score.device).reshape(score.shape[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], score: Tensor) -> Any:
        return _Assign.apply(score.movedim(in_dims[0], 0)), 0


def assign(score: Tensor) -> Tensor:
    """Find the permutations that maximise Σᵢ score[i, p[i]], exactly.

    Args:
        score: ``(..., n, n)``; how well element i of one set fits element j of the other.

    Returns:
        Permutations p, ``(..., n)``.

    Raises:
        ValueError: If the matrices are not square.

    Source: Crouse, *On implementing 2D rectangular assignment algorithms* (2016), in scipy.

    Example:
        >>> import torch
        >>> assign(torch.tensor([[1.0, 3.0], [2.0, 3.0]]))
        tensor([1, 0])
    """
    if score.ndim < 2 or score.shape[-1] != score.shape[-2]:
        raise ValueError(f"score: expected square matrices (..., n, n), got {tuple(score.shape)}")
    return _Assign.apply(score)


def inverse_permutation(permutation: Tensor) -> Tensor:
    """The permutation that undoes another, ``(..., n)``.

    Example:
        >>> import torch
        >>> inverse_permutation(torch.tensor([2, 0, 1]))
        tensor([1, 2, 0])
    """
    return permutation.argsort(-1)


def sinkhorn(score: Tensor, temperature: float | Tensor, iterations: int = 100) -> Tensor:
    """The doubly stochastic plan that maximises Σ P score + temperature · entropy(P).

    Rows and columns are normalised in turn in the logarithmic domain. The plan is differentiable in
    the score; as the temperature falls it tends to the permutation of :func:`assign`.

    Args:
        score: ``(..., n, n)``.
        temperature: Positive, in the units of the score.
        iterations: Normalisations of rows and of columns.

    Returns:
        P, ``(..., n, n)``; columns sum to 1 exactly, rows as far as the iterations got.

    Raises:
        ValueError: If the temperature is not positive.

    Source: Sinkhorn (1964); Cuturi, arXiv:1306.0895; Mena et al., arXiv:1802.08665.

    Example:
        >>> import torch
        >>> plan = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), temperature=0.1)
        >>> plan.round(decimals=3).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    if not bool(torch.as_tensor(temperature) > 0):
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    log = score / temperature
    for _ in range(iterations):
        log = log - log.logsumexp(-1, keepdim=True)
        log = log - log.logsumexp(-2, keepdim=True)
    return log.exp()


def softassign(
    score: Tensor, temperature: float, potential: Tensor, iterations: int = 5
) -> tuple[Tensor, Tensor]:
    """A few steps of :func:`sinkhorn` from a potential, for temperatures that fall slowly.

    The exponential is taken once; the normalisations are products of matrix and vector.

    Args:
        score: ``(n, n)``.
        temperature: Positive, in the units of the score.
        potential: What is added to each column of the score, ``(n,)``.
        iterations: Normalisations of rows and of columns.

    Returns:
        The plan ``(n, n)`` and the new potential ``(n,)``.

    Source: Gold and Rangarajan, *A graduated assignment algorithm for graph matching* (1996).

    Example:
        >>> import torch
        >>> plan, potential = softassign(torch.eye(3), 0.05, torch.zeros(3))
        >>> bool((plan - torch.eye(3)).abs().max() < 1e-6)
        True
    """
    log = (score + potential) / temperature
    log = log - log.amax(1, keepdim=True)
    kernel = log.clamp_(min=SMALLEST_LOG).exp_()
    rows, columns = kernel.sum(1), torch.ones_like(potential)
    for _ in range(iterations):
        columns = 1 / (kernel.T @ (1 / rows))
        rows = kernel @ columns
    plan = kernel.mul_(columns).div_(rows[:, None])
    return plan, potential + temperature * columns.log()
