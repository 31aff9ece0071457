"""An inspection as one HTML file that needs no other: tables, figures, and how to read them."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manifold_merge._version import __version__
from manifold_merge.mergeability import plot_output_errors
from manifold_merge.plots import (
    PLOT_HINT,
    plot_distances,
    plot_merge_error,
    plot_norms,
    plot_principal_angles,
    plot_spectra,
)
from manifold_merge.report_data import Inspection
from manifold_merge.report_tables import (
    READING,
    Table,
    adapters_table,
    headline,
    merge_table,
    modules_table,
    notes,
    number,
    pairs_table,
    verdict,
)

__all__ = ["check_report", "render_report", "write_report"]

WORST = 15

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
.sub { color: #555; margin-top: .2rem; } figure { margin: 1.2rem 0; }
figure img { width: 100%; max-width: 54rem; height: auto; }
figcaption, dl { color: #444; font-size: .9rem; }
table { border-collapse: collapse; font-size: .9rem; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd;
  white-space: nowrap; }
th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
.t { text-align: left; } td.t { white-space: normal; }
td.t:last-child { overflow-wrap: anywhere; min-width: 12rem; }
.box { border-left: 4px solid #0072B2; background: #f2f7fb; padding: .6rem 1rem; }
.stop { border-color: #D55E00; background: #fdf3ec; } code { font-size: .9em; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 1rem; }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""


def check_report(file: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Check, before any work, that a report can be written.

    Args:
        file: The HTML file to write.
        overwrite: Whether an existing file is replaced.

    Returns:
        The absolute path.

    Raises:
        ImportError: matplotlib, which draws the figures, is not installed.
        FileExistsError: The file exists, or is a folder.
        FileNotFoundError: Its folder does not exist.
        PermissionError: Its folder is not writable.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(PLOT_HINT) from error
    path = Path(file).absolute()
    if path.is_dir():
        raise FileExistsError(f"report {path} is a folder; give a file name, such as report.html")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"report {path} exists; choose another file, or pass overwrite=True (--overwrite)"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} for the report does not exist; make it")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write into {path.parent}; choose another place")
    return path


def write_report(
    inspection: Inspection, file: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write the report of an inspection; the file appears complete or not at all.

    Args:
        inspection: What :func:`~manifold_merge.report.inspect_adapters` found.
        file: The HTML file to write.
        overwrite: Whether an existing file is replaced.

    Returns:
        The absolute path.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: As :func:`check_report` says.
    """
    path = check_report(file, overwrite=overwrite)
    text = render_report(inspection)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
    return path


def render_report(inspection: Inspection) -> str:
    """The report as one HTML document, figures embedded as SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    count = len(inspection.adapters)
    title = "Inspection of " + (f"{count} adapters" if count > 1 else inspection.adapters[0].name)
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="sub">{_text(headline(inspection))} · manifold-merge {__version__}</p>',
        *_verdict(inspection),
        *_notes(inspection),
        "<h2>Adapters</h2>",
        _table(adapters_table(inspection, wide=True)),
        _figure(plot_norms, inspection, "Frobenius norm of the update, all modules of a layer."),
        _figure(plot_spectra, inspection, "The steeper, the fewer directions matter."),
    ]
    if inspection.pairs:
        body += [
            "<h2>Distances</h2>",
            _table(pairs_table(inspection, wide=True)),
            _figure(plot_distances, inspection, READING["distance"]),
            _figure(
                plot_principal_angles,
                inspection,
                "0° is a shared direction, 90° an unrelated one. Dotted: random spaces, root "
                "mean square.",
            ),
        ]
    body += [*_merge(inspection), *_modules(inspection), "<h2>How to read this</h2>", "<dl>"]
    body += [f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in READING.items()]
    body += ["</dl>"]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


# --- sections ------------------------------------------------------------------------------------


def _verdict(inspection: Inspection) -> list[str]:
    said = verdict(inspection)
    if said is None:
        return []
    style = "box" if inspection.refusal is None else "box stop"
    return [f'<p class="{style}">{_text(said[0].upper() + said[1:])}.</p>']


def _notes(inspection: Inspection) -> list[str]:
    items = [f"<li>{_text(note)}</li>" for note in notes(inspection)]
    return ["<h2>Worth a look</h2>", "<ul>", *items, "</ul>"] if items else []


def _merge(inspection: Inspection) -> list[str]:
    if inspection.merge is None:
        return []
    return [
        "<h2>The merge</h2>",
        "<p>A preview of what the default merge makes of them; nothing was written. The merged "
        f"update has norm {number(inspection.merge.norm)}.</p>",
        _table(merge_table(inspection)),
        _figure(plot_merge_error, inspection, READING["merge distance"]),
        "<h3>Predicted error of the outputs</h3>",
        *_output_errors(inspection),
    ]


def _output_errors(inspection: Inspection) -> list[str]:
    assert inspection.merge is not None
    if inspection.merge.output_errors is None:
        return [
            "<p>Not available. The errors above are between weights; what they do to the outputs "
            "depends on the inputs, and there are no statistics of them here: make them with "
            "<code>manifold-merge calibrate</code>.</p>"
        ]
    return [_figure(plot_output_errors, inspection, READING["output error"])]


def _modules(inspection: Inspection) -> list[str]:
    what = "squared norm of the updates"
    if inspection.merge is not None:
        what = "squared distance between the merge and the adapters"
    table = modules_table(inspection, WORST, wide=True)
    return [
        "<h2>Modules that matter most</h2>",
        f"<p>The {len(table.rows)} of {len(inspection.modules)} modules with the largest share of "
        f"the {what}.</p>",
        _table(table),
    ]


# --- HTML ----------------------------------------------------------------------------------------


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(table: Table) -> str:
    kinds = [' class="t"' if column.text else "" for column in table.columns]
    titles = [_text(column.title) for column in table.columns]
    heads = (f"<th{k}>{t}</th>" for k, t in zip(kinds, titles, strict=True))
    lines = [f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>"]
    for row in table.rows:
        cells = (f"<td{k}>{_text(c)}</td>" for k, c in zip(kinds, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _figure(plot: Callable[..., Any], inspection: Inspection, caption: str) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    height = 4.4 if plot is not plot_distances else 0.6 * len(inspection.adapters) + 2.2
    # A fixed salt and no date: the same inspection gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "manifold-merge", "font.size": 10}):
        figure = Figure(figsize=(8.5, height), layout="constrained")
        title = plot(inspection, figure.add_subplot()).get_title()
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return (
        f'<figure><img alt="{_text(title)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )
