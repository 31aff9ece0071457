"""What an inspection of adapters found: plain data, for tables, figures and JSON.

Users import :mod:`manifold_merge.report`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "AdapterSummary",
    "Inspection",
    "MergePreview",
    "ModulePair",
    "ModulePreview",
    "ModuleSummary",
    "PairSummary",
]


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter as a whole.

    Attributes:
        name: The end of its path that tells it from the others.
        path: Its folder.
        base_model: What it names as its base model, or ``None``.
        modules: How many modules it adapts.
        ranks: The distinct ranks, ascending.
        scalings: The distinct factors on B A, ascending.
        rslora: Whether the scaling is α/√r instead of α/r.
        dtypes: The distinct stored types.
        parameters: Numbers stored in the factors.
        norm: Frobenius norm of the whole update, all modules together.
        stable_rank: Mean over modules of |W|²/σ₁², between 1 and the rank: how many directions
            carry the update.
        extras: Number of tensors beside the factors, by kind.
        notes: What is unusual about it, in words.
    """

    name: str
    path: str
    base_model: str | None
    modules: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    rslora: bool
    dtypes: tuple[str, ...]
    parameters: int
    norm: float
    stable_rank: float
    extras: Mapping[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ModuleSummary:
    """One module in all k adapters; an adapter that lacks it has rank 0 and no singular values.

    Attributes:
        name: Its name in the base model.
        kind: ``"linear"``, ``"conv"`` or ``"embedding"``.
        out_features: Rows m of the update.
        in_features: Columns n of the update.
        ranks: Rank of the factors in each adapter.
        numerical_ranks: Number of singular values above ``max(m, n) * eps`` of the largest, with
            eps of float32 (of float64 for factors stored so), as NumPy's ``matrix_rank`` counts.
        norms: Frobenius norm of the update in each adapter.
        spectra: Singular values of the update in each adapter, descending.
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    ranks: tuple[int, ...]
    numerical_ranks: tuple[int, ...]
    norms: tuple[float, ...]
    spectra: tuple[tuple[float, ...], ...]

    def stable_rank(self, adapter: int) -> float:
        """|W|²/σ₁² in one adapter; 0 where the update is zero or absent."""
        largest = max(self.spectra[adapter], default=0.0)
        return (self.norms[adapter] / largest) ** 2 if largest else 0.0


@dataclass(frozen=True)
class ModulePair:
    """One module in two adapters that both adapt it.

    Attributes:
        name: The module.
        cosine: <W_i, W_j>/(|W_i||W_j|).
        distance: |W_i - W_j|_F.
        column_cosines: Cosines of the principal angles between the column spaces (of B),
            descending, as many as the lower numerical rank.
        row_cosines: The same for the row spaces (of A).
    """

    name: str
    cosine: float
    distance: float
    column_cosines: tuple[float, ...]
    row_cosines: tuple[float, ...]


@dataclass(frozen=True)
class PairSummary:
    """Two adapters.

    Attributes:
        first: Index of one.
        second: Index of the other.
        cosine: Cosine between the whole updates; a module that one lacks counts as zero there.
        distance: |W_i - W_j|/√(½(|W_i|² + |W_j|²)) of the whole updates: 0 if they are the same,
            √2 if orthogonal, at most 2.
        column_cosine: Mean cosine of the principal angles between column spaces, over all angles
            of all shared modules; NaN if there is none.
        row_cosine: The same for the row spaces.
        column_chance: What random subspaces of these sizes have, √(r/m), over the same modules.
        row_chance: The same for the row spaces, √(r/n).
        only_first: Modules that only the first adapts.
        only_second: Modules that only the second adapts.
        modules: The shared modules.
    """

    first: int
    second: int
    cosine: float
    distance: float
    column_cosine: float
    row_cosine: float
    column_chance: float
    row_chance: float
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    modules: tuple[ModulePair, ...]


@dataclass(frozen=True)
class ModulePreview:
    """The merge of one module against each adapter.

    Attributes:
        name: The module.
        norm: Frobenius norm of the merged update M.
        distances: |M - W_i|_F for each adapter, W_i = 0 where the module is absent.
        kept: <M, W_i>/|W_i|² for each adapter, the share of its update that the merge keeps along
            the update's own direction; NaN where the update is zero or absent.
    """

    name: str
    norm: float
    distances: tuple[float, ...]
    kept: tuple[float, ...]


@dataclass(frozen=True)
class MergePreview:
    """What ``merge_adapters`` with ``geometry="auto"`` makes of the adapters.

    Distances are between weights and need no data. The errors of the outputs are predicted from
    statistics of the inputs, where every adapter has them (:mod:`manifold_merge.mergeability`).

    Attributes:
        geometry: The geometry that it takes.
        distance: Its distance (``"exact"``, ``"aligned"``, ``"chordal"``), if it has a choice.
        reason: Why.
        closeness: Least cosine between two of the updates, over the modules that were looked at.
        norm: Frobenius norm of the whole merged update.
        distances: For each adapter |M - W_i|/|W_i| of the whole updates; 1 is as far as no adapter
            at all. NaN if W_i is zero.
        kept: For each adapter <M, W_i>/|W_i|² of the whole updates.
        modules: The same by module.
        output_errors: Predicted error of each module's output for each adapter, modules x adapters,
            |(M - W_i)x|/|W_i x| in root mean squares on the adapter's calibration texts; ``None``
            without statistics of the inputs, NaN where W_i is zero or absent.
        output_bounds: What these errors cannot exceed on those texts; they differ where Grams are
            stored at low rank.
    """

    geometry: str
    distance: str | None
    reason: str
    closeness: float
    norm: float
    distances: tuple[float, ...]
    kept: tuple[float, ...]
    modules: tuple[ModulePreview, ...]
    output_errors: tuple[tuple[float, ...], ...] | None = None
    output_bounds: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class Inspection:
    """Everything that :func:`inspect_adapters` measured.

    Attributes:
        adapters: Each adapter, in the given order.
        modules: Each module, in natural order (layer 2 before layer 10).
        pairs: Each two adapters; empty if they cannot be compared.
        merge: What the default merge makes of them; ``None`` for one adapter and where refused.
        refusal: Why the adapters cannot be merged as they are, with the remedy.
        notes: What is unusual about the adapters together, in words.
    """

    adapters: tuple[AdapterSummary, ...]
    modules: tuple[ModuleSummary, ...]
    pairs: tuple[PairSummary, ...]
    merge: MergePreview | None
    refusal: str | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists for JSON; numbers to six digits, NaN as ``None``."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def worst_modules(self, count: int = 5) -> tuple[tuple[ModuleSummary, float], ...]:
        """Modules that a merge damages most, each with its share of the whole.

        Returns:
            At most ``count`` modules and their shares of Σ |M - W_i|² over all modules and
            adapters; of Σ |W_i|² where there is no merge. Largest first.
        """
        if self.merge is not None:
            energy = {m.name: math.fsum(d * d for d in m.distances) for m in self.merge.modules}
        else:
            energy = {m.name: math.fsum(x * x for x in m.norms) for m in self.modules}
        total = math.fsum(energy.values()) or 1.0
        ranked = sorted(self.modules, key=lambda m: -energy.get(m.name, 0.0))
        return tuple((m, energy.get(m.name, 0.0) / total) for m in ranked[:count])


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(x) for x in value]
    return value
