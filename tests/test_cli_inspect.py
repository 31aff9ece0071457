"""``manifold-merge inspect``: tables, JSON, report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cli_runs import run
from small_adapters import adapter

from manifold_merge import __version__ as package_version


def test_inspect_shows_tables_and_what_auto_would_do(two: list[Path]) -> None:
    result = run("inspect", *two)
    assert result.exit_code == 0
    assert result.stderr == ""
    for said in (
        "2 LoRA adapters of base",
        "--geometry auto takes lifted (least pairwise cosine",
        "2 to 3",  # ranks
        "1.33 to 2",  # scalings 4/3 and 4/2
        "float32",
        "1, 2",
        "layer.10.up",
        "stable rank  ",
    ):
        assert said in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_inspect_one_adapter(two: list[Path]) -> None:
    result = run("inspect", two[0], "--modules", "1")
    assert result.exit_code == 0
    assert result.stdout.startswith("LoRA adapter of base")
    assert result.stdout.count("layer.") == 1
    for absent in ("Pairs", "--geometry", "cosine"):
        assert absent not in result.stdout


def test_inspect_says_why_adapters_do_not_merge(two: list[Path], tmp_path: Path) -> None:
    other = adapter(tmp_path / "other", seed=2, base_model_name_or_path="other")
    result = run("inspect", *two, other)
    assert result.exit_code == 0
    assert "Cannot be merged as they are: base_model_name_or_path" in result.stdout
    assert "--allow-different-base" in " ".join(result.stdout.split())


def test_inspect_as_json_and_report(two: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    result = run("inspect", *two, "--json", "--report", file)
    found = json.loads(result.stdout)
    assert found.keys() == {
        "manifold_merge", "command", "adapters", "modules", "pairs", "merge", "refusal", "notes",
        "report", "warnings",
    }  # fmt: skip
    assert found["manifold_merge"] == package_version
    assert found["report"] == str(file)
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert found["adapters"][0]["ranks"] == [2, 3]
    again = run("inspect", *two, "--report", file)
    assert again.exit_code == 2
    assert "report.html exists" in again.stderr
    assert "pass --overwrite" in again.stderr
    quiet = run("inspect", *two, "--report", file, "--overwrite", "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_inspect_needs_matplotlib_for_a_report_only(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("inspect", *two, "--report", tmp_path / "report.html")
    assert result.exit_code == 2
    assert result.stderr == 'error: figures need matplotlib: pip install "manifold-merge[plot]"\n'
    assert run("inspect", *two).exit_code == 0


def test_long_names_fit_80_columns(tmp_path: Path) -> None:
    name = "model.layers.17.self_attention.query_key_value_projection_of_the_model"
    folders = [
        adapter(tmp_path / f"an_adapter_whose_name_is_long_{i}", {name: (4, 5, 1)}, seed=i)
        for i in range(3)
    ]
    lines = run("inspect", *folders).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "long_0" in "".join(lines).replace(" ", "")
