"""The README does what it says: its code runs, its commands work, its links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)


@pytest.fixture
def newcomer(bundled_adapters, tmp_path, monkeypatch) -> Path:
    """A folder with the adapters that the README names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    for name, folder in zip(("math", "law", "code"), bundled_adapters.values(), strict=True):
        (tmp_path / "adapters" / name).symlink_to(folder)
    return tmp_path


def test_python_of_the_readme_runs(newcomer, capsys):
    code = blocks(ROOT / "README.md", "python")
    assert len(code) >= 3
    names: dict[str, object] = {"__name__": "readme"}
    for i, block in enumerate(code):
        exec(compile(block, f"README.md, block {i + 1}", "exec"), names)
    printed = capsys.readouterr().out
    assert "lifted" in printed  # the adapters are of different tasks
    assert "tensor(True)" in printed  # same models, same mean
    assert "tensor([1." in printed  # the mean of two lines


def commands(page: Path) -> list[list[str]]:
    """Calls of the command line tool, comments and continuations resolved."""
    text = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    return [
        shlex.split(line, comments=True)
        for line in text.splitlines()
        if line.startswith("manifold-merge ")
    ]


def test_commands_of_the_readme_work(newcomer):
    found = commands(ROOT / "README.md")
    assert len(found) >= 2
    for words in found:
        if words[1] not in {"adapters", "inspect"}:
            continue  # they need a base model; their own tests run them
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
        done = subprocess.run(
            [sys.executable, "-m", "manifold_merge", *words[1:]],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
    assert (newcomer / "merged" / "adapter_model.safetensors").is_file()
    assert (newcomer / "merged" / "README.md").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_on_the_page_exists(page):
    from typer.main import get_command

    from manifold_merge.cli import app

    known = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in get_command(app).commands.items()
    }
    for words in commands(page):
        assert words[1] in known, f"{page.name}: manifold-merge has no command {words[1]!r}"
        options = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
        assert options <= known[words[1]], f"{page.name}: {sorted(options - known[words[1]])}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    mathematics = r"\$\$.*?\$\$|\$[^$\n]*(?:\n[^$\n]+)?\$"
    prose = re.sub(mathematics, "", page.read_text("utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_the_page_is_python(page):
    for i, block in enumerate(blocks(page, "python")):
        compile(block, f"{page.name}, block {i + 1}", "exec")


def test_commands_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    for page in PAGES:
        for target in re.findall(r"^make ([\w-]+)", "\n".join(blocks(page, "console")), re.M):
            assert target in targets, f"{page.name}: make {target}"
