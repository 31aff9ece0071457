"""Put the tables of the last runs, ``results/*.json``, into ``README.md`` and the pages.

    python benchmarks/update_readme.py          # rewrite them
    python benchmarks/update_readme.py --check  # fail if that would change one

A page holds a pair of comments for each result, ``<!-- NAME -->`` and ``<!-- /NAME -->``. What
stands between them is what the script that wrote the result prints; nothing is typed by hand.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from pathlib import Path

import accuracy
import comparison
import harness

HERE = Path(__file__).resolve().parent
READMES = (
    HERE / "README.md",
    HERE.parent / "README.md",
    *sorted((HERE.parent / "docs").glob("*.md")),
)
# The script whose ``render`` turns a result into Markdown, where it is not the result's name.
SUMMARIES = {  # of several results
    "accuracy": accuracy.render,
    "accuracy_tasks": accuracy.tasks,
    "comparison": comparison.render,
    "refined": accuracy.refined,
}
SCRIPTS = {
    "score_bench_val": "score_bench",
    "score_bench_test": "score_bench",
    "peers_r16": "peers",
    "peers_mixed": "peers",
}


def filled(text: str, results: Path) -> str:
    """The text with every section renewed."""

    def section(match: re.Match[str]) -> str:
        name = match["name"]
        if name in SUMMARIES:
            return f"<!-- {name} -->\n\n{SUMMARIES[name](results)}\n\n<!-- /{name} -->"
        file = results / f"{name}.json"
        if not file.exists():
            body = "Not run yet."
        else:
            script = importlib.import_module(SCRIPTS.get(name, name))
            body = script.render(json.loads(file.read_text("utf-8")))
        return f"<!-- {name} -->\n\n{body}\n\n<!-- /{name} -->"

    pattern = r"^<!-- (?P<name>\w+) -->$.*?^<!-- /(?P=name) -->$"  # pages include them by name too
    return re.sub(pattern, section, text, flags=re.DOTALL | re.MULTILINE)


def main() -> None:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args()
    for readme in READMES:
        before = readme.read_text("utf-8")
        after = filled(before, harness.RESULTS)
        if options.check:
            if before != after:
                raise SystemExit(f"{readme} is not what the results say: run without --check")
            continue
        readme.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
