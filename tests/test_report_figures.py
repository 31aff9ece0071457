"""Figures of an inspection, and the HTML report."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from small_adapters import MORE, adapter

from manifold_merge import report
from manifold_merge.report import Inspection, inspect_adapters
from manifold_merge.report_html import check_report, render_report, write_report

matplotlib.use("Agg")

PLOTS = {
    "distances": report.plot_distances,
    "norms": report.plot_norms,
    "spectra": report.plot_spectra,
    "principal_angles": report.plot_principal_angles,
    "merge_error": report.plot_merge_error,
}


@pytest.fixture
def inspection(tmp_path: Path) -> Inspection:
    folders = [adapter(tmp_path / f"a{i}", MORE, seed=i) for i in range(3)]
    return inspect_adapters(folders)


@pytest.mark.parametrize("name", PLOTS)
def test_figures_draw_on_the_given_axes_and_name_their_axes(
    name: str, inspection: Inspection
) -> None:
    from matplotlib import pyplot

    _, ax = pyplot.subplots()
    assert PLOTS[name](inspection, ax) is ax
    assert ax.get_title()
    if name == "distances":
        labels = [t.get_text() for t in (*ax.get_xticklabels(), *ax.get_yticklabels())]
        assert labels == ["a0", "a1", "a2"] * 2
        bar = ax.figure.axes[1]
        assert "(no unit)" in bar.get_ylabel()
    else:
        assert ax.get_xlabel()
        assert re.search(r"\((no unit|units of the weights|degrees)\)", ax.get_ylabel())
        assert ax.get_legend() is not None
    fresh = PLOTS[name](inspection)
    assert fresh is not ax
    pyplot.close("all")


def test_figures_show_the_numbers(inspection: Inspection) -> None:
    from matplotlib.figure import Figure

    def lines(plot: Callable[..., Any], **options: Any) -> list[np.ndarray]:
        ax = plot(inspection, Figure().add_subplot(), **options)
        return [line.get_ydata() for line in ax.lines]

    layers = ["layer.0", "layer.1", "layer.2", "layer.10"]
    for i, values in enumerate(lines(report.plot_norms)):
        expected = [
            math.sqrt(
                sum(
                    m.norms[i] ** 2
                    for m in inspection.modules
                    if m.name.rpartition(".")[0] == layer
                )
            )
            for layer in layers
        ]
        assert values == pytest.approx(expected)
    spectrum = lines(report.plot_spectra)[0]
    first = [np.array(m.spectra[0]) / m.spectra[0][0] for m in inspection.modules]
    assert spectrum[1] == pytest.approx(np.median([row[1] for row in first if len(row) > 1]))
    assert len(spectrum) == 3
    merge = inspection.merge
    assert merge is not None
    errors = lines(report.plot_merge_error)[2]
    expected = [
        p.distances[2] / m.norms[2] for p, m in zip(merge.modules, inspection.modules, strict=True)
    ]
    assert errors == pytest.approx(expected)  # one module a layer
    columns = lines(report.plot_principal_angles, pair=(2, 0))[0]
    (pair,) = [p for p in inspection.pairs if (p.first, p.second) == (0, 2)]
    full = [m.column_cosines for m in pair.modules if len(m.column_cosines) == 3]
    smallest = [np.degrees(np.arccos(m.column_cosines[0])) for m in pair.modules]
    assert min(smallest) <= columns[0] <= max(smallest)
    assert len(full) == 2
    ax = report.plot_distances(inspection, Figure().add_subplot())
    table = ax.images[0].get_array()
    for p in inspection.pairs:
        assert table[p.first, p.second] == table[p.second, p.first] == pytest.approx(p.distance)
    with pytest.raises(ValueError, match=r"pair \(0, 7\)"):
        report.plot_principal_angles(inspection, pair=(0, 7))


def test_many_layers_and_adapters_stay_readable(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    shapes = {f"model.layers.{i}.q_proj": (4, 4, 1) for i in range(80)}
    many = inspect_adapters([adapter(tmp_path / f"a{i}", shapes, seed=i) for i in range(9)])
    ax = report.plot_norms(many, Figure().add_subplot())
    assert len(ax.get_xticks()) <= 24
    assert ax.get_xlabel() == "layer (N of model.layers.N)"
    assert [t.get_text() for t in ax.get_xticklabels()][:3] == ["0", "4", "8"]
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in ax.lines}
    assert len(styles) == 9


# --- the HTML report ------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "action")]
        if tag == "img":
            assert dict(attrs)["alt"]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_report_is_one_file_with_its_figures(inspection: Inspection, tmp_path: Path) -> None:
    file = write_report(inspection, tmp_path / "out.html")
    page = Page(file.read_text(encoding="utf-8"))
    assert page.tags.count("img") == len(PLOTS)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert "script" not in page.tags
    assert "link" not in page.tags
    text = " ".join(page.words)
    for said in ("a0", "a1 and a2", "lifted", "Not available", *(m for m in MORE)):
        assert said in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a0", "a1", "a2", "out.html"]


def test_report_of_one_adapter_has_what_one_has(tmp_path: Path) -> None:
    page = Page(render_report(inspect_adapters([adapter(tmp_path / "a")])))
    assert page.tags.count("img") == 2


def test_report_is_the_same_each_time_and_escapes_names(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / "<b>&amp;"), adapter(tmp_path / "plain", seed=1)]
    inspection = inspect_adapters(folders)
    text = render_report(inspection)
    assert text == render_report(inspection)
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;amp;" in text


def test_report_is_checked_before_the_work(
    tmp_path: Path, inspection: Inspection, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.html"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=r"out.html exists.*--overwrite"):
        check_report(file)
    with pytest.raises(FileExistsError, match="is a folder"):
        check_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_report(tmp_path / "no" / "out.html")
    assert file.read_text() == "mine"

    def fail(file: Path, *_: Any, **__: Any) -> None:
        file.write_bytes(b"half a report")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="No space"):
            write_report(inspection, file, overwrite=True)
    assert file.read_text() == "mine"
    assert not list(tmp_path.glob(".out*"))
    write_report(inspection, file, overwrite=True)
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_missing_matplotlib_is_named_with_the_remedy(
    tmp_path: Path, inspection: Inspection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    hint = re.escape('pip install "manifold-merge[plot]"')
    with pytest.raises(ImportError, match=hint):
        check_report(tmp_path / "out.html")
    with pytest.raises(ImportError, match=hint):
        report.plot_norms(inspection)
