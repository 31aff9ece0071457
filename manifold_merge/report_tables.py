"""The tables and sentences of an inspection, once for the terminal and for HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from manifold_merge.report_data import AdapterSummary, Inspection, ModuleSummary

__all__ = [
    "READING",
    "Column",
    "Table",
    "adapters_table",
    "fixed",
    "headline",
    "merge_table",
    "modules_table",
    "notes",
    "number",
    "pairs_table",
    "span",
    "verdict",
]

NOTHING = "–"

READING = {
    "norm": "Frobenius norm of the whole update ΔW = scaling · B A, all modules together.",
    "stable rank": "how many directions carry an update, |W|²/σ₁², mean over modules.",
    "cosine": "1 the same direction, 0 unrelated, negative opposed.",
    "distance": "|Wi − Wj| / √(½|Wi|² + ½|Wj|²): 0 the same, 1.41 orthogonal, 2 opposite.",
    "columns (B), rows (A)": (
        "overlap of the spaces that updates write to and read from, mean cosine of the principal "
        "angles: 1 the same, 0 orthogonal; in brackets, an upper bound for random spaces."
    ),
    "kept": "how much of an adapter's update the merge holds along the update's own direction.",
    "output error": (
        "|(M − Wi)x| / |Wi x|, root mean square over the calibration texts x of adapter i and over "
        "modules: 0 none, 1 as large as without the adapter. Predicted from statistics, each "
        "module by itself; on those texts it cannot exceed the number beside it."
    ),
    "merge distance": (
        "|M − Wi| / |Wi| from the merge M: 0 the same, 1 as far as no adapter. About 1 is usual "
        "for different tasks, since M holds the other tasks too."
    ),
}


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its heading.
        text: Whether it holds text, which stands left, or numbers, which stand right.
    """

    title: str
    text: bool = False


@dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        columns: The columns.
        rows: The rows, each with one string for each column.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> Table:
        """Make a table and leave out columns in which no row says anything."""
        body = [tuple(row) for row in rows]
        used = [j for j in range(len(columns)) if any(row[j] != NOTHING for row in body)]
        return cls(
            tuple(columns[j] for j in used), tuple(tuple(row[j] for j in used) for row in body)
        )


def number(value: float) -> str:
    """Two decimals, or three significant digits of very large and small numbers."""
    if not math.isfinite(value):
        return NOTHING
    plain = value == 0 or 0.01 <= abs(value) < 1000
    return f"{value:.2f}" if plain else f"{value:.3g}"


def fixed(value: float) -> str:
    """Two decimals, for numbers of a known range."""
    text = f"{value:.2f}" if math.isfinite(value) else NOTHING
    return "0.00" if text == "-0.00" else text


def span(values: Sequence[float]) -> str:
    """One value, or the range of several, given in ascending order."""
    ends = f"{values[0]:.3g}", f"{values[-1]:.3g}"
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else NOTHING


def headline(inspection: Inspection) -> str:
    """How many adapters of which base model."""
    count = len(inspection.adapters)
    bases = {a.base_model for a in inspection.adapters}
    what = f"{count} LoRA adapters" if count > 1 else "LoRA adapter"
    if len(bases) > 1:
        return f"{what} of {len(bases)} base models"
    return f"{what} of {bases.pop() or 'a base model that is not named'}"


def verdict(inspection: Inspection) -> str | None:
    """What ``geometry="auto"`` does with the adapters and why; ``None`` for one adapter."""
    if inspection.refusal is not None:
        return f"cannot be merged as they are: {inspection.refusal}"
    if inspection.merge is None:
        return None
    merge = inspection.merge
    distance = f" with {merge.distance} distance" if merge.distance else ""
    return f"--geometry auto takes {merge.geometry}{distance} ({merge.reason})"


def notes(inspection: Inspection) -> list[str]:
    """What is unusual, one sentence each."""
    own = [f"{a.name}: {note}" for a in inspection.adapters for note in a.notes]
    return [*own, *inspection.notes]


def adapters_table(inspection: Inspection, *, wide: bool = False) -> Table:
    """One row for each adapter; ``wide`` adds its folder and number of parameters."""
    columns = [
        Column("#"), Column("adapter", text=True), Column("base model", text=True),
        Column("modules"), Column("rank"), Column("scaling"),
        Column("type", text=True), Column("norm"), Column("stable rank"),
        Column("extras", text=True),
    ]  # fmt: skip
    rows = [_adapter_row(i, a) for i, a in enumerate(inspection.adapters, 1)]
    if len({a.base_model for a in inspection.adapters}) == 1:
        for row in rows:
            row[2] = NOTHING  # it is said above the table
    if wide:
        columns += [Column("parameters"), Column("folder", text=True)]
        for row, a in zip(rows, inspection.adapters, strict=True):
            row += [f"{a.parameters:,}", a.path]
    return Table.of(columns, rows)


def _adapter_row(i: int, a: AdapterSummary) -> list[str]:
    return [
        str(i),
        a.name,
        a.base_model or "not named",
        str(a.modules),
        span(a.ranks),
        span(a.scalings) + (" (rsLoRA)" if a.rslora else ""),
        ", ".join(a.dtypes),
        number(a.norm),
        number(a.stable_rank),
        ", ".join(f"{n} {kind}" for kind, n in a.extras.items()) or NOTHING,
    ]


def pairs_table(inspection: Inspection, *, wide: bool = False) -> Table:
    """One row for each two adapters, by number; ``wide`` names them."""
    columns = [
        Column("pair"), Column("adapters", text=True), Column("cosine"), Column("distance"),
        Column("columns (B)"), Column("rows (A)"), Column("shared modules"),
    ]  # fmt: skip
    rows = []
    for p in inspection.pairs:
        first, second = (inspection.adapters[i].name for i in (p.first, p.second))
        overlap = [
            f"{fixed(value)} ({fixed(chance)})" if p.modules else NOTHING
            for value, chance in (
                (p.column_cosine, p.column_chance),
                (p.row_cosine, p.row_chance),
            )
        ]
        rows.append(
            [
                f"{p.first + 1}, {p.second + 1}",
                f"{first} and {second}" if wide else NOTHING,
                fixed(p.cosine),
                fixed(p.distance),
                *overlap,
                str(len(p.modules)),
            ]
        )
    return Table.of(columns, rows)


def merge_table(inspection: Inspection) -> Table:
    """What the default merge keeps of each adapter; there has to be a merge."""
    assert inspection.merge is not None
    columns = [
        Column("#"), Column("adapter", text=True), Column("kept"), Column("merge distance"),
        Column("output error"), Column("at most"),
    ]  # fmt: skip
    merge = inspection.merge
    rows = zip(inspection.adapters, merge.kept, merge.distances, strict=True)
    return Table.of(
        columns,
        (
            [str(i), adapter.name, _percent(kept), fixed(far),
             _error(merge.output_errors, i - 1), _error(merge.output_bounds, i - 1)]
            for i, (adapter, kept, far) in enumerate(rows, 1)
        ),
    )  # fmt: skip


def _error(errors: Sequence[Sequence[float]] | None, adapter: int) -> str:
    """Root mean square over modules of the relative output errors of one adapter."""
    known = [row[adapter] for row in errors or () if math.isfinite(row[adapter])]
    return fixed(math.sqrt(math.fsum(x * x for x in known) / len(known))) if known else NOTHING


def modules_table(inspection: Inspection, count: int, *, wide: bool = False) -> Table:
    """The modules that matter most; ``wide`` adds their shapes and norms.

    Without a merge they are those of the largest norm, with it those that contribute most to the
    squared distances between the merge and the adapters. In brackets, the pair with the lowest
    cosine, and the adapter that the merge is farthest from.
    """
    merged = inspection.merge is not None
    columns = [
        Column("module", text=True), Column("shape"), Column("share"), Column("stable rank"),
        Column("lowest cosine"), Column("merge distance"),
    ]  # fmt: skip
    rows = []
    for module, share in inspection.worst_modules(count):
        stable = [module.stable_rank(i) for i, norm in enumerate(module.norms) if norm]
        rows.append(
            [
                module.name,
                f"{module.out_features} × {module.in_features}" if wide else NOTHING,
                _percent(share),
                fixed(sum(stable) / len(stable)) if stable and (wide or not merged) else NOTHING,
                _conflict(inspection, module),
                _farthest(inspection, module),
            ]
        )
        if wide:
            rows[-1] += [
                number(norm) if rank else NOTHING
                for norm, rank in zip(module.norms, module.ranks, strict=True)
            ]
    if wide:
        columns += [Column(f"norm {i + 1}") for i in range(len(inspection.adapters))]
    return Table.of(columns, rows)


def _conflict(inspection: Inspection, module: ModuleSummary) -> str:
    """The lowest cosine over the pairs that share a module, and the pair."""
    found = [
        (m.cosine, f"({p.first + 1}, {p.second + 1})")
        for p in inspection.pairs
        for m in p.modules
        if m.name == module.name
    ]
    cosine, pair = min(found, default=(math.nan, ""))
    return f"{fixed(cosine)} {pair}".rstrip()


def _farthest(inspection: Inspection, module: ModuleSummary) -> str:
    """The largest relative distance of the merge of a module, and the adapter that it is from."""
    if inspection.merge is None:
        return NOTHING
    distances = next(m.distances for m in inspection.merge.modules if m.name == module.name)
    found = [
        (far / norm, f"({i})")
        for i, (far, norm) in enumerate(zip(distances, module.norms, strict=True), 1)
        if norm
    ]
    far, adapter = max(found, default=(math.nan, ""))
    return f"{fixed(far)} {adapter}".rstrip()
