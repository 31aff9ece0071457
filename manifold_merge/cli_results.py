"""What commands print for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manifold_merge import report_tables as tables
from manifold_merge.cli_session import Session
from manifold_merge.report_data import Inspection

__all__ = ["REMEDIES", "remedy", "show_inspection", "show_merge"]


# What to do about each way in which a mean does not converge, the worst last.
REMEDIES = {
    "stalled": "the adapters are too far apart for this distance; try --distance chordal",
    "max_iterations": "the mean was stopped early; try --distance chordal",
    "cancelled": "opposite updates cancel and the merge is zero there; leave one of them out",
}


def remedy(status: Mapping[str, int]) -> str:
    """What to do where the mean of a module did not converge; status is that of the merge."""
    return next((text for name, text in reversed(REMEDIES.items()) if status.get(name)), "")


def show_merge(shell: Session, result: dict[str, Any], base: str | None) -> None:
    """Print what a merge did."""
    recipe = result["recipe"]
    kind = "Sum" if recipe["sum"] else "Median" if recipe["p"] == 1 else "Mean"
    distance = f" with {recipe['distance']} distance" if recipe["distance"] else ""
    why = {"given": "as asked", "sum": "the geometry of sums"}
    reason = why.get(recipe["chosen_because"], recipe["chosen_because"])
    # Each count with its noun: "36 modules converged".
    status = ", ".join(
        f"{count} {'module' if count == 1 else 'modules'} {how.replace('_', ' ')}"
        for how, count in result["status"].items()
    )
    size = result["bytes"] / 1e6
    rows = {
        "geometry": f"{recipe['geometry']}{distance} ({reason})",
        "weights": ", ".join(f"{weight:.4g}" for weight in recipe["weights"]),
        "closeness": f"{result['closeness']:.2f}, least cosine of two updates (1 same, 0 none)",
        "modules": f"{result['modules']} of rank {tables.span(result['ranks'])}",
        "rank": "",
        "status": status if result["converged"] else f"{status}: {remedy(result['status'])}",
        "logarithms": ", ".join(f"{count} {way}" for way, count in result["logarithms"].items()),
        "gauge": "",
        "time": f"{tables.number(result['seconds'])} s",
    }
    if result["gauge_residual"] is not None:
        rows["gauge"] = f"changes the merge by {result['gauge_residual']:.1e} at most (relative)"
    if recipe["rank_chosen_because"] != "given":
        rows["rank"] = f"{recipe['rank']}: {recipe['rank_chosen_because']}"
    if recipe["scale"] == "norm":
        rows["geometry"] += ", scaled to the norm of the adapters"
    elif recipe["scale"] != 1:
        rows["geometry"] += f", times {recipe['scale']:g}"
    if "transform" in recipe:
        rows["geometry"] += f", after {recipe['transform']}"
    errors = [error for error in recipe.get("output_errors", ()) if error is not None]
    if errors:
        shown = ", ".join(f"{error:.2f}" for error in errors)
        both = recipe["statistics"]["kind"] == "kfac"
        where = "in the features of texts" if both else "at layer outputs"
        rows["errors"] = f"{shown} predicted {where} (0 none, 1 as without the adapter)"
    if result["extras"]:
        rows["modules"] += f", and {result['extras']} other tensors"
    count = len(recipe["adapters"])
    shell.say(f"{kind} of {count} adapters of {base or 'a base model that is not named'}")
    shell.pairs({key: value for key, value in rows.items() if value})
    stored = f"{', '.join(result['dtypes'])}, {tables.number(size)} MB"
    shell.line(f"Wrote {result['output']} ({stored})")


def show_inspection(
    shell: Session, inspection: Inspection, modules: int, written: str | None
) -> None:
    """Print what adapters hold and how they go together."""
    shell.say(tables.headline(inspection))
    verdict = tables.verdict(inspection)
    if verdict is not None:
        shell.say(verdict[0].upper() + verdict[1:])
    for note in tables.notes(inspection):
        shell.say(f"* {note}", indent="  ")
    shell.table("Adapters", tables.adapters_table(inspection))
    read = ["norm", "stable rank"]
    if inspection.pairs:
        shell.table("Pairs", tables.pairs_table(inspection))
        read += ["cosine", "distance", "columns (B), rows (A)"]
    if inspection.merge is not None:
        shell.table("What the default merge keeps", tables.merge_table(inspection))
        read += ["kept", "merge distance"]
    if modules:
        what = "squared norm" if inspection.merge is None else "squared distance from the merge"
        table = tables.modules_table(inspection, modules)
        shell.table(f"Modules with the largest share of the {what}", table)
    shell.say("")
    shell.pairs({key: tables.READING[key] for key in read}, dim=True)
    if written is not None:
        shell.line(f"Wrote {written}")
