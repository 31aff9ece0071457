"""The command ``manifold-merge``: a thin shell over the library."""

from __future__ import annotations

import dataclasses
import io
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from manifold_merge._version import __version__
from manifold_merge.cli_calibrate import calibrate
from manifold_merge.cli_mergekit import mergekit
from manifold_merge.cli_models import align, models
from manifold_merge.cli_options import (
    AdapterOutput,
    Debug,
    Device,
    DifferentBase,
    Distance,
    DType,
    Extras,
    Folders,
    Geometry,
    IgnoredKeys,
    Json,
    MaxMemory,
    Missing,
    Normalisation,
    Quiet,
    Weights,
    parse_bytes,
    parse_device,
    parse_layer_weights,
    parse_rank,
    parse_scale,
    parse_weights,
)
from manifold_merge.cli_refine import RefineCommand, refine
from manifold_merge.cli_session import in_cli_words, session

# The library is imported inside the commands: torch takes seconds, and --help should not.

__all__ = ["app", "main"]

app = typer.Typer(
    name="manifold-merge",
    no_args_is_help=True,
    # Plain help and usage errors: boxes cut option names off in a terminal of 80 columns.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Merge LoRA adapters and whole models as Fréchet means.",
    epilog="Exit codes: 0 done, 1 not converged (with --strict), 2 bad input, 3 an error of the "
    "program, 130 interrupted.",
)


def main() -> None:
    """Run the command line; the entry point of ``manifold-merge`` and ``python -m``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Σ shows a question mark
            stream.reconfigure(errors="replace")
    app(prog_name="manifold-merge")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"manifold-merge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command()
def adapters(
    folders: Folders,
    output: AdapterOutput,
    weights: Weights = None,
    layer_weights: Annotated[
        list[str],
        typer.Option(
            metavar="PATTERN=W,W,...",
            help="Weights for modules whose name matches a shell pattern, such as "
            "'*.layer.0.*=1,0'; the first match counts. Repeatable.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 - typer copies it
    geometry: Annotated[
        Geometry,
        typer.Option(
            help="fisher for adapters with statistics (see calibrate); lifted for different tasks; "
            "mixed, invariant, embedded or polar for variants of one task; auto takes fisher if "
            "all adapters have statistics, else chooses by how close they are.",
        ),
    ] = Geometry.auto,
    distance: Annotated[
        Distance | None,
        typer.Option(
            help="How distances are found; not for lifted and fisher. Default: exact for close "
            "adapters, chordal for others.",
        ),
    ] = None,
    statistics: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="Statistics of each adapter, in order, for fisher. Default: those beside them.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    damping: Annotated[
        float,
        typer.Option(min=0, help="For fisher: share of the mean eigenvalue added to each Gram."),
    ] = 1e-2,
    shrinkage: Annotated[
        float,
        typer.Option(min=0, max=1, help="For fisher: how far Grams are shrunk to their diagonal."),
    ] = 0.0,
    normalisation: Annotated[
        Normalisation,
        typer.Option(help="For fisher: what each adapter's metric is divided by."),
    ] = Normalisation.none,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="R|full|auto",
            help="Rank of the result: a number, full (the sum of the ranks), or auto, the least "
            "that gives up at most 1 % of the unconstrained merge (auto=0.05: 5 %). Default: full "
            "for lifted and fisher, else the greatest rank.",
        ),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            metavar="X|norm",
            help="Factor on the merged update; norm restores the norm of the adapters.",
        ),
    ] = "1",
    transform: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[=X]",
            help="Change of the adapters before they are averaged: ties (density), whiten or "
            "isotropic (power), such as ties=0.2.",
        ),
    ] = None,
    median: Annotated[
        bool,
        typer.Option(
            "--median",
            help="Geometric median instead of the mean: a corrupted adapter cannot move it far.",
        ),
    ] = False,
    sum_: Annotated[
        bool,
        typer.Option(
            "--sum",
            help="Weighted sum with the weights as they are, negative ones too, not a mean.",
        ),
    ] = False,
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Type of the written tensors. Default: the widest of the inputs.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an existing adapter folder."),
    ] = False,
    missing: Annotated[
        Missing,
        typer.Option(
            help="A module that some adapters lack: zero, an update of zero; present, the mean of "
            "those that have it; error, refuse.",
        ),
    ] = Missing.zero,
    extras: Annotated[
        Extras,
        typer.Option(help="Average biases and fully trained modules, or drop them."),
    ] = Extras.mean,
    allow_different_base: DifferentBase = False,
    ignore_config_key: IgnoredKeys = [],  # noqa: B006
    device: Device = "cpu",
    max_memory: MaxMemory = "256MB",
    check_gauge: Annotated[
        bool,
        typer.Option(
            "--check-gauge",
            help="Merge again from other factors of the same updates, and report the difference.",
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Exit with 1 if a module did not converge."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge LoRA adapters of one base model into one.

    The base model itself is not needed. Weights, ranks and scalings may differ.
    """
    with session(as_json=as_json, quiet=quiet, debug=debug) as shell:
        options: dict[str, Any] = {
            "weights": None if weights is None else parse_weights("--weights", weights, folders),
            "layer_weights": parse_layer_weights(layer_weights),
            "rank": parse_rank(rank),
            "max_bytes": parse_bytes("--max-memory", max_memory),
        }
        import torch

        from manifold_merge.adapters import Adapter
        from manifold_merge.cli_results import remedy, show_merge
        from manifold_merge.merge import merge_adapters

        start = time.perf_counter()
        opened = [Adapter(folder, ignore_config_keys=ignore_config_key) for folder in folders]
        with shell.progress("merging") as progress:
            merged = merge_adapters(
                opened,
                output,
                geometry=geometry.value,
                distance=None if distance is None else distance.value,
                statistics=statistics or None,
                damping=damping,
                shrinkage=shrinkage,
                normalisation=normalisation.value,
                scale=parse_scale(scale),
                transform=transform,
                p=1 if median else 2,
                sum=sum_,
                missing=missing.value,
                extras=extras.value,
                allow_different_base=allow_different_base,
                dtype=None if dtype is None else getattr(torch, dtype.value),
                device=parse_device(device),
                overwrite=overwrite,
                gauge_check=check_gauge,
                progress=progress,
                **options,
            )
        converged = set(merged.status) <= {"converged"}
        written = Adapter(merged.output or output)
        parts = written.modules.values()
        result = {
            "output": str(merged.output),
            "recipe": merged.recipe,
            "closeness": merged.closeness,
            "modules": merged.modules_merged,
            "ranks": sorted({module.rank for module in parts}),
            "dtypes": sorted({str(module.dtype).removeprefix("torch.") for module in parts}),
            "extras": len(written.extras),
            "bytes": sum(file.stat().st_size for file in written.path.iterdir()),
            "status": merged.status,
            "converged": converged,
            "logarithms": {way: count for way, count in merged.paths.items() if count},
            "gauge_residual": merged.gauge_residual,
            "seconds": time.perf_counter() - start,
        }
        base = opened[0].base_model
        shell.result("adapters", result, lambda: show_merge(shell, result, base))
        if strict and not converged:
            shell.error(f"not converged, the output is written: {remedy(merged.status)}")
            raise typer.Exit(1)


app.command()(calibrate)
app.command()(models)
app.command()(mergekit)
app.command()(align)


@app.command()
def inspect(
    folders: Folders,
    weights: Weights = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write a report with figures; needs matplotlib.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an existing report."),
    ] = False,
    modules: Annotated[
        int,
        typer.Option(min=0, help="How many of the modules to list."),
    ] = 5,
    allow_different_base: DifferentBase = False,
    ignore_config_key: IgnoredKeys = [],  # noqa: B006
    max_memory: MaxMemory = "256MB",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what adapters hold and how well they go together."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as shell:
        given = None if weights is None else parse_weights("--weights", weights, folders)
        budget = parse_bytes("--max-memory", max_memory)
        from manifold_merge.adapters import Adapter
        from manifold_merge.cli_results import show_inspection
        from manifold_merge.report import inspect_adapters
        from manifold_merge.report_html import check_report, write_report

        if report is not None:
            check_report(report, overwrite=overwrite)
        opened = [Adapter(folder, ignore_config_keys=ignore_config_key) for folder in folders]
        with shell.progress("measuring") as progress:
            inspection = inspect_adapters(
                opened,
                weights=given,
                allow_different_base=allow_different_base,
                max_bytes=budget,
                progress=progress,
            )
        if inspection.refusal is not None:
            refusal = in_cli_words(inspection.refusal)
            inspection = dataclasses.replace(inspection, refusal=refusal)
        written = None
        if report is not None:
            written = str(write_report(inspection, report, overwrite=overwrite))
        found = {**inspection.to_dict(), "report": written}
        shell.result("inspect", found, lambda: show_inspection(shell, inspection, modules, written))


app.command(cls=RefineCommand)(refine)
