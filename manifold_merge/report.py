"""How well do adapters go together? Norms, spectra, distances, angles, and what a merge keeps.

Everything is computed from the factors, through Gram products and small matrices in the span of the
data; no update is ever formed as an m x n matrix. :func:`inspect_adapters` measures, the functions
``plot_...`` draw what it found, and :mod:`manifold_merge.report_html` writes both to one file.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from manifold_merge.adapter_config import AdapterError
from manifold_merge.adapter_sets import ModuleGroup, check_compatible, group_modules
from manifold_merge.adapters import Adapter
from manifold_merge.lift import _singular_frames, pairwise_cosines
from manifold_merge.linalg import adjoint
from manifold_merge.lora import LoRAQuotient
from manifold_merge.merge import AdapterMerge, merge_adapters
from manifold_merge.merge_fisher import has_statistics
from manifold_merge.merge_plan import DEFAULT_BUDGET
from manifold_merge.mergeability import OutputErrors, output_errors
from manifold_merge.plots import (
    plot_distances,
    plot_merge_error,
    plot_norms,
    plot_principal_angles,
    plot_spectra,
)
from manifold_merge.report_data import (
    AdapterSummary,
    Inspection,
    MergePreview,
    ModulePair,
    ModulePreview,
    ModuleSummary,
    PairSummary,
)
from manifold_merge.statistics import Statistics

__all__ = [
    "AdapterSummary",
    "Inspection",
    "MergePreview",
    "ModulePair",
    "ModulePreview",
    "ModuleSummary",
    "PairSummary",
    "inspect_adapters",
    "plot_distances",
    "plot_merge_error",
    "plot_norms",
    "plot_principal_angles",
    "plot_spectra",
]

# With norms that differ by more than this factor, the largest adapter decides the mean.
UNBALANCED = 3.0
# A relative distance below this is rounding of the stored factors.
SAME = 1e-5
# Below this cosine two adapters undo each other's work.
OPPOSED = -0.1
# A module whose update is this many times the median of its adapter's stands out.
OUTLIER = 10.0


@torch.no_grad()
def inspect_adapters(
    adapters: Sequence[str | os.PathLike[str] | Adapter],
    *,
    weights: Sequence[float] | None = None,
    allow_different_base: bool = False,
    max_bytes: int = DEFAULT_BUDGET,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Measure adapters, each two of them, and what their default merge keeps of each.

    Args:
        adapters: Folders in PEFT's format, or opened :class:`Adapter` objects; one is enough.
        weights: Weights of the merge that is previewed; equal if ``None``.
        allow_different_base: Preview the merge of adapters that name different base models.
        max_bytes: Bytes of factors that are worked on at a time. The preview holds all merged
            factors beside them, which are as large as the adapters together.
        progress: Called with the number of modules measured and in all.

    Returns:
        The measurements. Adapters that cannot be merged are described all the same, with the
        reason in ``refusal``.

    Raises:
        FileNotFoundError: A folder or file is missing.
        AdapterError: An adapter is damaged or of an unsupported kind.
        ValueError: There is no adapter, or the weights do not fit.

    Source: principal angles after Björck and Golub (1973).

    Example:
        >>> import json, tempfile
        >>> from safetensors.torch import save_file
        >>> def adapter(seed):
        ...     folder = Path(tempfile.mkdtemp())
        ...     config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
        ...     _ = (folder / "adapter_config.json").write_text(json.dumps(config))
        ...     g = torch.Generator().manual_seed(seed)
        ...     save_file({"base_model.model.q.lora_A.weight": torch.randn(2, 64, generator=g),
        ...                "base_model.model.q.lora_B.weight": torch.randn(64, 2, generator=g)},
        ...               folder / "adapter_model.safetensors")
        ...     return folder
        >>> inspection = inspect_adapters([adapter(0), adapter(1)])
        >>> inspection.merge.geometry, abs(inspection.pairs[0].cosine) < 0.1
        ('lifted', True)
    """
    opened = [x if isinstance(x, Adapter) else Adapter(x) for x in adapters]
    if not opened:
        raise ValueError("adapters is empty; give at least one folder")
    for adapter in opened:
        adapter.validate()
        adapter.release()
    merged: AdapterMerge | None = None
    refusal: str | None = None
    if len(opened) > 1:
        try:
            merged = merge_adapters(
                opened,
                weights=weights,
                allow_different_base=allow_different_base,
                max_bytes=max_bytes,
            )
        except AdapterError as error:
            refusal = str(error)

    # Adapters whose modules have different shapes can only be described one by one.
    together = refusal is None or _comparable(opened)
    everyone = list(range(len(opened)))
    results = []
    sets = [everyone] if together else [[i] for i in everyone]
    total = sum(len({name for i in chosen for name in opened[i].modules}) for chosen in sets)
    done = 0
    for chosen in sets:
        result = _Measurement(opened, chosen, merged)
        results.append(result)
        for group in group_modules([opened[i] for i in chosen]):
            for names in _chunks(group, max_bytes):
                result.add(group, names)
                done += len(names)
                if progress is not None:
                    progress(done, total)

    modules = tuple(
        sorted((m for r in results for m in r.modules), key=lambda m: _natural_key(m.name))
    )
    preview = None if merged is None else results[0].merge_preview(merged, modules)
    if merged is not None and preview is not None and all(map(has_statistics, opened)):
        statistics = [Statistics.load(adapter.path) for adapter in opened]
        errors = output_errors(opened, merged.modules, statistics)
        preview = dataclasses.replace(preview, **_predictions(errors, modules))  # type: ignore[arg-type]
    summaries = _adapter_summaries(opened, modules)
    pairs = results[0].pair_summaries(modules) if together else ()
    return Inspection(
        adapters=summaries,
        modules=modules,
        pairs=pairs,
        merge=preview,
        refusal=refusal,
        notes=tuple(_joint_notes(opened, summaries, modules, pairs)),
    )


def _predictions(
    errors: OutputErrors, modules: Sequence[ModuleSummary]
) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Relative errors and their bounds, in the order of the modules."""
    own = torch.where(errors.own > 0, errors.own, math.nan)
    found = {}
    for field, values in (("output_errors", errors.predicted), ("output_bounds", errors.bound)):
        relative = dict(zip(errors.names, (values / own).sqrt().tolist(), strict=True))
        found[field] = tuple(tuple(relative[m.name]) for m in modules)
    return found


def _comparable(adapters: Sequence[Adapter]) -> bool:
    try:
        check_compatible(adapters, allow_different_base=True, extras="drop")
    except AdapterError:
        return False
    return True


def _natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which layer 2 comes before layer 10."""
    return [(0, int(x)) if x.isdecimal() else (1, x) for x in re.split(r"(\d+)", name) if x]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that tells it from the others.

    >>> _short_names([Path("runs/law/last"), Path("runs/code/last"), Path("math")])
    ['law/last', 'code/last', 'math']
    """
    parts = [path.resolve().parts for path in paths]
    depths = [1] * len(parts)
    while True:
        names = ["/".join(p[-d:]) for p, d in zip(parts, depths, strict=True)]
        owners = defaultdict(set)
        for name, p in zip(names, parts, strict=True):
            owners[name].add(p)
        if all(len(paths_) == 1 for paths_ in owners.values()):
            return names
        depths = [d + (len(owners[n]) > 1) for n, d in zip(names, depths, strict=True)]


# --- measurements --------------------------------------------------------------------------------


def _chunks(group: ModuleGroup, max_bytes: int) -> Iterator[tuple[str, ...]]:
    # Stored factors, their float64 copies, and the frames.
    each = 32 * (group.out_features + group.in_features) * max(sum(group.ranks), 1)
    step = max(1, max_bytes // each)
    for i in range(0, len(group.names), step):
        yield group.names[i : i + step]


class _Measurement:
    """Measurements of the chosen ones of k adapters, collected group by group."""

    def __init__(
        self, adapters: Sequence[Adapter], chosen: Sequence[int], merged: AdapterMerge | None
    ) -> None:
        self.adapters = adapters
        self.chosen = chosen
        self.merged = merged
        self.modules: list[ModuleSummary] = []
        self.pairs: dict[tuple[int, int], dict[str, ModulePair]] = defaultdict(dict)
        self.previews: dict[str, ModulePreview] = {}

    def add(self, group: ModuleGroup, names: Sequence[str]) -> None:
        """Measure modules of one group, b in number, in all adapters that have them."""
        ranks = {i: r for i, r in zip(self.chosen, group.ranks, strict=True) if r}
        manifold = LoRAQuotient(group.out_features, group.in_features, distance="chordal")
        points = [_points(manifold, self.adapters[i].factors, names) for i in ranks]
        reduced, anchors, _ = manifold.reduce(points)
        u, v, s = _singular_frames(reduced, anchors)  # (k, b, K, r), (k, b, K, r), (k, b, r)
        dtypes = {self.adapters[i].modules[name].dtype for i in ranks for name in names}
        eps = torch.finfo(torch.float64 if dtypes == {torch.float64} else torch.float32).eps
        live = s > eps * max(group.out_features, group.in_features) * s[..., :1]
        norms = s.square().sum(-1).sqrt()

        for j, name in enumerate(names):
            module = self.adapters[next(iter(ranks))].modules[name]
            where = {i: row for row, i in enumerate(ranks)}
            k = range(len(self.adapters))
            self.modules.append(
                ModuleSummary(
                    name=name,
                    kind=module.kind,
                    out_features=module.out_features,
                    in_features=module.in_features,
                    ranks=tuple(ranks.get(i, 0) for i in k),
                    numerical_ranks=tuple(
                        int(live[where[i], j].sum()) if i in where else 0 for i in k
                    ),
                    norms=tuple(float(norms[where[i], j]) if i in where else 0.0 for i in k),
                    spectra=tuple(
                        tuple(s[where[i], j, : ranks[i]].tolist()) if i in where else () for i in k
                    ),
                )
            )
        kept = live[..., None, :].to(s.dtype)
        self._add_pairs(list(ranks), names, reduced, anchors, (u * kept, v * kept), live.sum(-1))
        if self.merged is not None:
            self._add_previews(list(ranks), names, manifold, points, norms)
        for i in self.chosen:
            self.adapters[i].release()

    def _add_pairs(
        self,
        present: list[int],
        names: Sequence[str],
        reduced: LoRAQuotient,
        anchors: Tensor,
        frames: tuple[Tensor, Tensor],
        ranks: Tensor,
    ) -> None:
        first, second = torch.triu_indices(len(present), len(present), 1)
        if not len(first):
            return
        cosines = pairwise_cosines(reduced, list(anchors))[first, second].tolist()
        distances = reduced.dist(anchors[first], anchors[second]).tolist()
        columns, rows = (
            torch.linalg.svdvals(adjoint(x[first]) @ x[second]).clamp(max=1) for x in frames
        )
        counts = torch.minimum(ranks[first], ranks[second])
        for p, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            for q, name in enumerate(names):
                angles = int(counts[p, q])
                self.pairs[present[i], present[j]][name] = ModulePair(
                    name=name,
                    cosine=cosines[p][q],
                    distance=distances[p][q],
                    column_cosines=tuple(columns[p, q, :angles].tolist()),
                    row_cosines=tuple(rows[p, q, :angles].tolist()),
                )

    def _add_previews(
        self,
        present: list[int],
        names: Sequence[str],
        manifold: LoRAQuotient,
        points: Sequence[Tensor],
        norms: Tensor,
    ) -> None:
        assert self.merged is not None
        mean = _points(manifold, self.merged.modules.__getitem__, names).double()
        squared = _product_inner(manifold, mean, mean).clamp(min=0)
        own = squared.new_zeros(len(self.adapters), len(names))
        inner = torch.zeros_like(own)
        for row, i in enumerate(present):
            own[i] = norms[row].square()
            inner[i] = _product_inner(manifold, mean, points[row].double())
        distances = (squared + own - 2 * inner).clamp(min=0).sqrt()
        kept = inner / own  # 0/0 is NaN: a zero update has no direction
        for q, name in enumerate(names):
            self.previews[name] = ModulePreview(
                name=name,
                norm=math.sqrt(float(squared[q])),
                distances=tuple(distances[:, q].tolist()),
                kept=tuple(kept[:, q].tolist()),
            )

    def pair_summaries(self, modules: Sequence[ModuleSummary]) -> tuple[PairSummary, ...]:
        return tuple(
            _pair_summary(i, j, self.pairs[i, j], modules)
            for i in self.chosen
            for j in self.chosen
            if i < j
        )

    def merge_preview(self, merged: AdapterMerge, modules: Sequence[ModuleSummary]) -> MergePreview:
        previews = tuple(self.previews[m.name] for m in modules)
        distances, kept = [], []
        for i in self.chosen:
            own = math.fsum(m.norms[i] ** 2 for m in modules)
            far = math.fsum(p.distances[i] ** 2 for p in previews)
            along = math.fsum(
                p.kept[i] * m.norms[i] ** 2
                for p, m in zip(previews, modules, strict=True)
                if m.norms[i]
            )
            distances.append(math.sqrt(far / own) if own else math.nan)
            kept.append(along / own if own else math.nan)
        return MergePreview(
            geometry=merged.recipe["geometry"],
            distance=merged.recipe["distance"],
            reason=merged.recipe["chosen_because"],
            closeness=merged.closeness,
            norm=math.sqrt(math.fsum(p.norm**2 for p in previews)),
            distances=tuple(distances),
            kept=tuple(kept),
            modules=previews,
        )


def _points(
    manifold: LoRAQuotient, factors: Callable[[str], tuple[Tensor, Tensor]], names: Sequence[str]
) -> Tensor:
    pairs = [factors(name) for name in names]
    return manifold.pack(torch.stack([b for b, _ in pairs]), torch.stack([a for _, a in pairs]))


def _product_inner(manifold: LoRAQuotient, x: Tensor, y: Tensor) -> Tensor:
    """<W_x, W_y> of points of any two ranks, of the batch shape."""
    (bx, ax), (by, ay) = manifold.unpack(x), manifold.unpack(y)
    return ((adjoint(bx) @ by) * (ax @ adjoint(ay))).sum((-2, -1))


def _pair_summary(
    i: int, j: int, shared: dict[str, ModulePair], modules: Sequence[ModuleSummary]
) -> PairSummary:
    own = [math.fsum(m.norms[a] ** 2 for m in modules) for a in (i, j)]
    inner = math.fsum(
        shared[m.name].cosine * m.norms[i] * m.norms[j] for m in modules if m.name in shared
    )
    squared = math.fsum(
        shared[m.name].distance ** 2 if m.name in shared else m.norms[i] ** 2 + m.norms[j] ** 2
        for m in modules
    )
    both = [m for m in modules if m.name in shared]
    counts = [len(shared[m.name].column_cosines) for m in both]
    total = sum(counts) or math.nan

    def chance(dimensions: Sequence[int]) -> float:
        wider = [max(m.numerical_ranks[i], m.numerical_ranks[j]) for m in both]
        parts = zip(counts, wider, dimensions, strict=True)
        return math.fsum(c * math.sqrt(w / d) for c, w, d in parts) / total

    return PairSummary(
        first=i,
        second=j,
        cosine=inner / math.sqrt(own[0] * own[1]) if all(own) else 0.0,
        distance=math.sqrt(2 * squared / sum(own)) if any(own) else 0.0,
        column_cosine=math.fsum(c for m in both for c in shared[m.name].column_cosines) / total,
        row_cosine=math.fsum(c for m in both for c in shared[m.name].row_cosines) / total,
        column_chance=chance([m.out_features for m in both]),
        row_chance=chance([m.in_features for m in both]),
        only_first=tuple(m.name for m in modules if m.ranks[i] and not m.ranks[j]),
        only_second=tuple(m.name for m in modules if m.ranks[j] and not m.ranks[i]),
        modules=tuple(shared[m.name] for m in both),
    )


# --- adapters in words ---------------------------------------------------------------------------


def _adapter_summaries(
    adapters: Sequence[Adapter], modules: Sequence[ModuleSummary]
) -> tuple[AdapterSummary, ...]:
    summaries = []
    names = _short_names([adapter.path for adapter in adapters])
    for i, (adapter, name) in enumerate(zip(adapters, names, strict=True)):
        own = [m for m in modules if m.ranks[i] and m.name in adapter.modules]
        parts = adapter.modules.values()
        stable = [m.stable_rank(i) for m in own if m.norms[i]]
        summaries.append(
            AdapterSummary(
                name=name,
                path=str(adapter.path),
                base_model=adapter.base_model,
                modules=len(parts),
                ranks=tuple(sorted({m.rank for m in parts})),
                scalings=tuple(sorted({m.scaling for m in parts})),
                rslora=bool(adapter.config.get("use_rslora")),
                dtypes=tuple(sorted({str(m.dtype).removeprefix("torch.") for m in parts})),
                parameters=sum(m.rank * (m.out_features + m.in_features) for m in parts),
                norm=math.sqrt(math.fsum(m.norms[i] ** 2 for m in own)),
                stable_rank=math.fsum(stable) / len(stable) if stable else 0.0,
                extras=dict(Counter(extra.kind for extra in adapter.extras.values())),
                notes=tuple(_notes(adapter, i, own)),
            )
        )
    return tuple(summaries)


def _notes(adapter: Adapter, i: int, modules: Sequence[ModuleSummary]) -> Iterator[str]:
    count = len(modules)
    if adapter.base_model is None:
        yield "names no base model, so that nothing tells whether it fits the others"
    kinds = Counter(m.kind for m in modules if m.kind != "linear")
    if kinds:
        yield "adapts " + " and ".join(f"{n} {kind} modules" for kind, n in sorted(kinds.items()))
    zero = [m for m in modules if not m.norms[i]]
    if len(zero) == count:
        yield "does nothing: every update is zero, as before training (B = 0)"
    elif zero:
        yield f"{len(zero)} of {count} updates are zero (B = 0), such as {zero[0].name}"
    low = [m for m in modules if 0 < m.numerical_ranks[i] < m.ranks[i]]
    if low:
        worst = min(low, key=lambda m: m.numerical_ranks[i] / m.ranks[i])
        yield (
            f"{len(low)} of {count} updates have a lower rank than their factors, down to "
            f"{worst.numerical_ranks[i]} of {worst.ranks[i]} in {worst.name}"
        )
    norms = sorted(m.norms[i] for m in modules if m.norms[i])
    if norms and norms[-1] > OUTLIER * norms[len(norms) // 2]:
        largest = max(modules, key=lambda m: m.norms[i])
        yield f"{largest.name} has {norms[-1] / norms[len(norms) // 2]:.0f} times the median norm"


def _joint_notes(
    adapters: Sequence[Adapter],
    summaries: Sequence[AdapterSummary],
    modules: Sequence[ModuleSummary],
    pairs: Sequence[PairSummary],
) -> Iterator[str]:
    if not pairs:
        return
    for pair in pairs:
        first, second = summaries[pair.first].name, summaries[pair.second].name
        if adapters[pair.first].path.resolve() == adapters[pair.second].path.resolve():
            yield f"{first} is given twice"
        elif pair.distance < SAME and summaries[pair.first].norm:
            yield f"{first} and {second} are the same update"
        elif pair.cosine < OPPOSED:
            yield f"{first} and {second} pull in opposite directions (cosine {pair.cosine:.2f})"
    norms = sorted((s.norm, s.name) for s in summaries if s.norm)
    if norms and norms[-1][0] > UNBALANCED * norms[0][0]:
        yield (
            f"the update of {norms[-1][1]} is {norms[-1][0] / norms[0][0]:.1f} times as large as "
            f"that of {norms[0][1]}, so with equal weights it decides most of the merge"
        )
    coverage: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for m in modules:
        coverage[tuple(i for i, rank in enumerate(m.ranks) if rank)].append(m.name)
    for present, names in coverage.items():
        if len(present) < len(adapters):
            who = " and ".join(summaries[i].name for i in present)
            yield f"{len(names)} modules are adapted only by {who}, such as {names[0]}"
