"""The pages do what they say: code runs, commands work, links lead somewhere, names are known."""

import ast
import dataclasses
import enum
import fnmatch
import glob
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import manifold_merge

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *DOCS]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
SOURCES = sorted((ROOT / "manifold_merge").glob("*.py"))


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def newcomer(bundled_adapters, tmp_path, monkeypatch) -> Path:
    """A folder with the adapters that the README names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    for name, folder in zip(("math", "law", "code"), bundled_adapters.values(), strict=True):
        (tmp_path / "adapters" / name).symlink_to(folder)
    return tmp_path


# --- code runs -----------------------------------------------------------------------------------


def test_python_of_the_readme_runs(newcomer, capsys):
    code = blocks(ROOT / "README.md", "python")
    assert len(code) >= 3
    run(ROOT / "README.md", {})
    printed = capsys.readouterr().out
    assert "lifted" in printed  # the adapters are of different tasks
    assert "tensor(True)" in printed  # same models, same mean
    assert "tensor([1." in printed  # the mean of two lines


def run(page: Path, names: dict[str, Any]) -> None:
    """Run the code blocks of a page one after the other, as a reader would."""
    names["__name__"] = page.stem
    for i, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {i + 1}", "exec"), names)


def training_names(folder: Path) -> dict[str, Any]:
    """What "stands for yours" on the page about training loops."""
    import transformers

    class Regression(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.line(x) - labels).square().mean()}

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return model(*batch)["loss"]

    models = [Regression() for _ in range(4)]
    loader = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(3)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=10, use_cpu=True, report_to=[], disable_tqdm=True
    )
    return {
        "mean": models[0],
        "model": models[0],
        **{f"model_{i}": models[i] for i in (1, 2, 3)},
        "teammates": models[1:],
        "loader": loader,
        "loss": loss,
        "train_step": lambda model, batch: loss(model, batch),
        "arguments": arguments,
        "data": [{"x": x, "labels": y} for x, y in zip(*map(torch.cat, zip(*loader)))],  # noqa: B905
    }


def functional_names(folder: Path) -> dict[str, Any]:
    """Three small adapters, their merge, a small model, and texts."""
    import peft_models as models

    from manifold_merge import merge_adapters

    for i, name in enumerate("ABC"):
        models.save(models.adapt(models.bert, i, target_modules=["query", "value"]), folder / name)
    merge_adapters([folder / name for name in "ABC"], folder / "merged", rank=2)

    def tokenizer(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1, *(3 + len(w) for w in text.split()), 2] for text in texts]}

    texts = [f"{'a' * (i % 5 + 1)} {'b' * (i % 7 + 1)} {'c' * (i % 3 + 1)}" for i in range(24)]
    return {
        "model": models.make(models.bert).eval(),
        "tokenizer": tokenizer,
        **{f"texts_{name}": texts for name in "abc"},
    }


PRELUDES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "training.md": training_names,
    "functional.md": functional_names,
}


@pytest.fixture
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("page", [p for p in DOCS if blocks(p, "python")], ids=named)
def test_python_on_the_page_runs(page, newcomer, monkeypatch, default_dtype):
    from manifold_merge import refine_adapters

    monkeypatch.setitem(refine_adapters.__kwdefaults__, "steps", 8)  # a page shows the call
    run(page, PRELUDES.get(page.name, lambda _: {})(newcomer))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_on_the_page_is_python(page):
    for i, block in enumerate(blocks(page, "python")):
        compile(block, f"{page.name}, block {i + 1}", "exec")


def test_each_method_of_the_table_has_its_line_in_a_block():
    page = ROOT / "docs" / "methods.md"
    code = re.sub(r"\s+", " ", "\n".join(blocks(page, "python")))
    rows = re.findall(r"^\|.*\| `([^`]+)` \|$", page.read_text("utf-8"), re.M)
    assert len(rows) >= 12
    for line in rows:
        assert line in code, f"{page.name}: the table has a line that no block runs: {line}"


def test_cost_model_is_that_of_the_recorded_run():
    names: dict[str, Any] = {}
    run(ROOT / "docs" / "costs.md", names)
    recorded = json.loads((ROOT / "benchmarks" / "results" / "merge_llm.json").read_text("utf-8"))
    model = names["model"]
    assert recorded["modules"] == 224
    assert recorded["read"] == model["read"]
    assert recorded["largest_group"] == model["largest_group"]
    for one in recorded["runs"]:
        if one["case"] == one["which"] and "rank 16" in one["case"]:
            beside = one["written"] - model["written"]  # headers
            assert 0 < beside < 0.01 * model["written"]
            assert one["peak"] < 2 * model["largest_group"] + one["written"]


def test_size_of_statistics_on_the_page_is_that_of_calibrate(minilm, bundled_adapters, tmp_path):
    from manifold_merge.calibrate import calibrate_adapter

    names: dict[str, Any] = {}
    run(ROOT / "docs" / "costs.md", names)
    adapter, texts = next(iter(bundled_adapters.values())), ["a few", "words each"]
    file = tmp_path / "statistics.safetensors"
    found = calibrate_adapter(adapter, minilm.fresh(), texts, file, tokenizer=minilm.tokenizer)
    expected = names["statistics_bytes"](names["encoder"])
    assert f"bytes={expected}" in repr(found)
    assert expected < file.stat().st_size < 1.01 * expected


# --- commands work -------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """Calls of the command line tool, comments and continuations resolved."""
    text = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    lines = [re.sub(r"^cd \S+ && ", "", line) for line in text.splitlines()]
    return [
        shlex.split(line, comments=True) for line in lines if line.startswith("manifold-merge ")
    ]


def runnable(page: Path) -> list[list[str]]:
    """Commands that need no base model; the others are run by tests of their own."""
    made_later = {"better", "refined"}
    found = [words[1:] for words in commands(page) if words[1] in {"adapters", "inspect"}]
    assert len(found) >= 2
    return [words for words in found if not made_later & set(words)]


def test_commands_of_the_readme_work(newcomer):
    for given in runnable(ROOT / "README.md"):
        # As a shell would, and without leaving anything in /tmp.
        words = [w for word in given for w in (sorted(glob.glob(word)) if "*" in word else [word])]
        words = [word.replace("/tmp/", "trial/") for word in words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
        done = subprocess.run(
            [sys.executable, "-m", "manifold_merge", *words],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
    assert (newcomer / "merged" / "adapter_model.safetensors").is_file()
    assert (newcomer / "merged" / "README.md").is_file()


@pytest.mark.parametrize("page", ["docs/start.md", "docs/migration.md"])
def test_commands_of_the_page_work(page, newcomer):
    from typer.testing import CliRunner

    from manifold_merge.cli import app

    for words in runnable(ROOT / page):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}"
    assert (newcomer / "merged" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=named)
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


def test_commands_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    for page in PAGES:
        for target in re.findall(r"^make ([\w-]+)", "\n".join(blocks(page, "console")), re.M):
            assert target in targets, f"{page.name}: make {target}"


# --- links lead somewhere ------------------------------------------------------------------------


def prose(page: Path) -> str:
    text = page.read_text("utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.sub(r"\$\$.*?\$\$|\$[^$\n]*(?:\n[^$\n]+)?\$", "", text, flags=re.S)


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=named)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose(page)):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", DOCS, ids=named)
def test_references_between_pages_lead_to_pages(page):
    for target in re.findall(r"\{doc\}`(?:[^`<]*<)?/?([\w/]+)>?`", page.read_text("utf-8")):
        here = ROOT if target.startswith("docs/") else page.parent
        assert (here / f"{target}.md").is_file(), f"{page.name} refers to {target}"


# --- names are documented ------------------------------------------------------------------------

REFERENCE = "\n".join(p.read_text("utf-8") for p in (ROOT / "docs" / "reference").glob("*.md"))
PUBLIC = [name for name in manifold_merge.__all__ if name != "__version__"]


def test_public_names_are_counted():
    assert len(PUBLIC) == len(set(PUBLIC)) >= 18


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_in_the_reference(name):
    module = getattr(manifold_merge, name).__module__
    assert name in importlib.import_module(module).__all__, f"{module}.__all__ lacks {name}"
    # Modules that no page names are gathered on one; the built inventory is checked below.
    assert f"automodule:: {module}\n" in REFERENCE or "{other-modules}" in REFERENCE


def sections_of(value: Any) -> dict[str, bool]:
    """Sections that a docstring needs: name to whether it has to be there."""
    if inspect.isclass(value):
        if issubclass(value, enum.Enum | BaseException):
            return {}
        if dataclasses.is_dataclass(value):
            documented = "Attributes:" in (value.__doc__ or "") or "Args:" in (value.__doc__ or "")
            return {} if documented else {"Attributes:": True}
        own = value.__dict__.get("__init__")
        takes = own is not None and len(inspect.signature(own).parameters) > 1
        return {"Args:": takes, "Raises:": own is not None and "raise " in inspect.getsource(own)}
    signature = inspect.signature(value)
    returns = signature.return_annotation not in (None, "None", inspect.Signature.empty)
    return {
        "Args:": bool(signature.parameters),
        "Returns:": returns,
        "Raises:": "raise " in inspect.getsource(inspect.unwrap(value)),
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstring_has_its_sections(name):
    value = getattr(manifold_merge, name)
    assert value.__doc__, f"{name} has no docstring"
    for section, needed in sections_of(value).items():
        assert not needed or section in value.__doc__, f"{name}: the section {section} is missing"
    if inspect.isclass(value):
        for method, function in vars(value).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                assert inspect.getdoc(getattr(value, method)), f"{name}.{method} has no docstring"


def messages() -> list[str]:
    """Everything that the library can say: constant parts of all texts in its code."""
    found = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_on_the_page_are_those_of_the_library():
    said = "\n".join(messages())
    quoted = blocks(ROOT / "docs" / "faq.md", "text")
    assert len(quoted) >= 15
    for message in quoted:
        for part in message.strip().split("…"):
            assert part.strip() in said, f"the library does not say {part.strip()!r}"


# --- the house -----------------------------------------------------------------------------------


def floors() -> dict[str, list[str]]:
    """The table of docs/design.md: floor to patterns of modules, from the ground up."""
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    table = text[text.index("| floor | files |") :].split("\n\n")[0].splitlines()[2:]
    rows = (line.strip("| ").split(" | ") for line in table)
    return {floor: re.findall(r"`([\w*]+)`", files) for floor, files in rows}


def floor_of(module: str) -> int | None:
    """Number of the floor; an exact name counts before a pattern."""
    lists = list(floors().values())
    for test in (str.__eq__, fnmatch.fnmatch):
        for number, patterns in enumerate(lists):
            if any(test(module, pattern) for pattern in patterns):
                return number
    return None


def imports(file: Path) -> Iterator[str]:
    """Modules of this library that a module imports, those for type checkers left out."""
    tree = ast.parse(file.read_text("utf-8"))
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing:
            head, _, module = (node.module or "").partition(".")
            if head == "manifold_merge" and module:
                yield module


def test_imports_go_one_way():
    placed = {file.stem: floor_of(file.stem) for file in SOURCES}
    assert sum(floor is not None for floor in placed.values()) > 60
    for file in SOURCES:
        mine = placed[file.stem]
        for module in imports(file):
            theirs = placed[module]
            if mine is not None and theirs is not None:
                assert theirs <= mine, f"{file.stem} imports {module}, which lies above it"
            if file.stem.startswith("checks"):
                assert module.startswith("checks") or theirs == 0, f"{file.stem}: {module}"


# --- the site ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    out = tmp_path / "out"
    options = ["-q", "-W", "--keep-going", "-D", "nb_execution_mode=off"]
    folders = ["-c", "docs", "-d", str(tmp_path / "trees"), ".", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-b", "html", *options, *folders],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    inventory = (out / "objects.inv").read_bytes()
    listed = zlib.decompress(inventory.split(b"\n", 4)[4]).decode()
    for name in PUBLIC:
        value = getattr(manifold_merge, name)
        assert re.search(rf"^{re.escape(f'{value.__module__}.{name}')} py:", listed, re.M), name
    page = (out / "docs" / "mathematics.html").read_text("utf-8")
    assert 'id="equation-eq-lift"' in page  # labels of formulas are targets
    assert "$$" not in re.sub(r"<script.*?</script>|<pre>.*?</pre>", "", page, flags=re.S)
