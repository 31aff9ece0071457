"""The command line in this process, in a terminal of fixed width."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from manifold_merge.cli import app


def run(*arguments: object, **environment: str) -> Result:
    # A fixed width: the tests may themselves run in a narrow terminal.
    return CliRunner().invoke(
        app,
        [str(argument) for argument in arguments],
        prog_name="manifold-merge",
        env={"COLUMNS": "80", "TERM": "dumb"} | environment,
    )
