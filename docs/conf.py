"""Sphinx configuration: ``make docs``, or ``sphinx-build -W --keep-going -c docs . site``.

The source folder is the root of the repository, so that links between README, docs, notebooks and
benchmarks are the same here and on a code host.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.main import get_command

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import manifold_merge  # noqa: E402
from manifold_merge import __version__  # noqa: E402
from manifold_merge.cli import app  # noqa: E402

project = "manifold_merge"
author = "manifold_merge contributors"
copyright = author
release = version = __version__

root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "tutorials/*.ipynb",
    "tutorials/demo/data/ATTRIBUTION.md",
    "benchmarks/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
]
exclude_patterns = [".*", "site", "build", "dist", "demo_output"]
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
]
# README and the licences of the demo are pages so that links to them work.
suppress_warnings = ["toc.not_included"]

html_theme = "furo"
html_title = f"manifold_merge {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_extra_path = ["_root"]
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = "$ "

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
# Notebooks are committed without outputs and run here, from top to bottom; an error is an error.
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_execution_cache_path = str(ROOT / "build" / "jupyter_cache")

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
napoleon_use_rtype = False


def leave_out(
    sphinx: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any
) -> bool | None:
    """Document each class and function in the module that defines it, and nowhere else."""
    if what != "module" or not (inspect.isclass(value) or inspect.isroutine(value)):
        return None
    page = sphinx.env.temp_data.get("autodoc:module")
    return True if page and getattr(value, "__module__", page) != page else None


def norms_are_no_substitutions(
    _: Sphinx, __: str, ___: str, ____: Any, _____: Any, lines: list[str]
) -> None:
    """Docstrings write |W| for a norm, which reStructuredText takes for something else."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = line.split("``")
            parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
            lines[i] = "``".join(parts)


class OtherModules(SphinxDirective):
    """One section for each module that defines a public name and that no other page shows."""

    def run(self) -> list[nodes.Node]:
        """Parse the sections as if they stood on the page."""
        pages = (ROOT / "docs" / "reference").glob("*.md")
        shown = set(
            re.findall(r"automodule:: (\S+)", "\n".join(p.read_text("utf-8") for p in pages))
        )
        public = [getattr(manifold_merge, name) for name in manifold_merge.__all__]
        modules = sorted({getattr(value, "__module__", "") for value in public} - shown - {""})
        sections = (
            f"## `{module.rpartition('.')[2]}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n"
            for module in modules
            if module.startswith("manifold_merge.")
        )
        return self.parse_text_to_nodes("\n".join(sections), allow_section_headings=True)


class PublicNames(SphinxDirective):
    """A table of what the package exports, each name with the first line of its docstring."""

    def run(self) -> list[nodes.Node]:
        """Parse the table as if it stood on the page."""
        rows = ["| name | what it is |", "|---|---|"]
        for name in manifold_merge.__all__:
            value = getattr(manifold_merge, name)
            if hasattr(value, "__module__"):
                line = (inspect.getdoc(value) or "").splitlines()[0].replace("|", "\\|")
                line = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"`\1`", line)
                rows.append(f"| {{py:obj}}`~{value.__module__}.{name}` | {line} |")
        return self.parse_text_to_nodes("\n".join(rows))


class CommandLine(SphinxDirective):
    """Commands and options of ``manifold-merge``, from the program itself."""

    def run(self) -> list[nodes.Node]:
        """Write one section for each command."""
        found: list[nodes.Node] = []
        group: Any = get_command(app)
        for name, command in group.commands.items():
            section = nodes.section(ids=[f"manifold-merge-{name}"])
            section += nodes.title("", "", nodes.literal("", f"manifold-merge {name}"))
            section += nodes.paragraph("", (command.help or "").split("\f")[0].strip())
            options = nodes.definition_list()
            for parameter in command.params:
                context = command.context_class(command, info_name=name)
                record = parameter.get_help_record(context)
                label, text = record or (parameter.make_metavar(context), "")
                item = nodes.definition_list_item()
                item += nodes.term("", "", nodes.literal("", label))
                item += nodes.definition("", nodes.paragraph("", text or "see above"))
                options += item
            section += options
            found.append(section)
        return found


def setup(app: Sphinx) -> None:
    """Register what is defined here."""
    app.add_directive("command-line", CommandLine)
    app.add_directive("other-modules", OtherModules)
    app.add_directive("public-names", PublicNames)
    app.connect("autodoc-process-docstring", norms_are_no_substitutions)
    app.connect("autodoc-skip-member", leave_out)
