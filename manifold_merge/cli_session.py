"""What every command of the command line shares: output, progress, warnings, errors, exit codes."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from manifold_merge._version import __version__

if TYPE_CHECKING:
    from manifold_merge.report_tables import Table

__all__ = ["Session", "in_cli_words", "session"]

BAD_INPUT, PROGRAM_ERROR, INTERRUPTED = 2, 3, 130

# Options that the command line has under the same name; a path may hold text that looks like them.
_VALUED = (
    "damping|device|distance|dtype|extras|geometry|missing|rank|scale|scope|statistics|weights"
)
_WORDS = (
    (r"\b\w+=True \((--[\w-]+)\)", r"\1"),
    (r"\ballow_different_base=True", "--allow-different-base"),
    (r"\ballow_different_config=True", "--allow-different-config"),
    (r"\bmax_shard_size\b", "--max-shard-size"),
    (r"\bsum=True", "--sum"),
    (r"\bp=1\b", "--median"),
    (r"\bignore_config_keys\b", "--ignore-config-key"),
    (r"^layer_weights\[('[^']*')\]", r"--layer-weights \1"),
    (rf"(?<![\w/.-])({_VALUED})='([^']*)'", r"--\1 \2"),
    (rf"(?<![\w/.-])({_VALUED})=([\w.]+)", r"--\1 \2"),
    (rf"^({_VALUED})(?=:| must| is )", r"--\1"),
    (r"\buse a chordal distance\b", "use --distance chordal"),
    (r"; see AdapterMerge\.status", ""),
)


def in_cli_words(message: str) -> str:
    """Say a message of the library with the options of the command line, on one line.

    Example:
        >>> in_cli_words("output out exists; pass overwrite=True (--overwrite)")
        'output out exists; pass --overwrite'
        >>> in_cli_words("if both are the same, pass allow_different_base=True")
        'if both are the same, pass --allow-different-base'
        >>> in_cli_words("weights: expected 2, one for each adapter; got 3")
        '--weights: expected 2, one for each adapter; got 3'
    """
    text = " ".join(message.split())
    for pattern, words in _WORDS:
        text = re.sub(pattern, words, text)
    return text


class Session:
    """Where a command writes: results to stdout, everything else to stderr."""

    def __init__(self, *, as_json: bool, quiet: bool, process: int = 0) -> None:
        self.as_json = as_json
        self.process = process
        self.quiet = quiet
        self.warnings: list[str] = []
        self._out = Console(highlight=False)
        self._err = Console(stderr=True, highlight=False)

    def result(self, command: str, result: Mapping[str, Any], show: Callable[[], None]) -> None:
        """Print a result as JSON, as ``show`` does, or not at all."""
        if self.as_json:
            document = {"manifold_merge": __version__, "command": command, **result}
            document["warnings"] = self.warnings
            typer.echo(json.dumps(_finite(document), indent=2, allow_nan=False))
        elif not self.quiet:
            show()

    @contextlib.contextmanager
    def progress(self, what: str, unit: str = "modules") -> Iterator[Callable[[int, int], None]]:
        """A progress bar on stderr if that is a terminal; yields what the library calls."""
        bar = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            console=self._err,
            transient=True,
            disable=self.quiet or not self._err.is_terminal,
        )
        with bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def say(self, text: str, indent: str = "") -> None:
        """Print a paragraph; its later lines start with ``indent``."""
        first, *rest = Text(text).wrap(self._out, self._out.width - len(indent))
        self._out.print(first)
        for line in rest:
            self._out.print(Text(indent) + line)

    def pairs(self, rows: Mapping[str, str], *, dim: bool = False) -> None:
        """Print names and what they are, in two columns."""
        grid = RichTable.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for key, value in rows.items():
            grid.add_row(Text(key), Text(value))
        self._out.print(Padding(grid, (0, 0, 0, 2), expand=False), style="dim" if dim else None)

    def line(self, text: str) -> None:
        """Print one line that is never wrapped, so that a path in it can be copied."""
        self._out.print(Text(text), soft_wrap=True)

    def table(self, title: str, table: Table) -> None:
        """Print a table of an inspection."""
        shown = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for column in table.columns:
            # Folded, never cut: half a number is a wrong one.
            justify: Literal["left", "right"] = "left" if column.text else "right"
            shown.add_column(column.title, justify=justify, overflow="fold")
        for row in table.rows:
            shown.add_row(*map(Text, row))
        self._out.print()
        self._out.print(Text(title, style="bold"))
        self._out.print(Padding(shown, (0, 0, 0, 2), expand=False))

    def warn(self, message: str) -> None:
        """Print a warning to stderr, and remember it for JSON."""
        text = in_cli_words(message)
        self.warnings.append(text)
        if not self.quiet:
            self._line(f"warning: {text}", "yellow")

    def error(self, message: str) -> None:
        """Print an error to stderr, on one line whatever the width of the terminal."""
        who = f" (process {self.process})" if self.process else ""
        self._line(f"error{who}: {in_cli_words(message)}", "red")

    def debug(self, message: str) -> None:
        """Print what the library logs."""
        self._line(message, "dim")

    def _line(self, text: str, style: str) -> None:
        self._err.print(Text(text, style=style), soft_wrap=True)


class _Log(logging.Handler):
    """The library's log records as warnings of a session."""

    def __init__(self, shell: Session) -> None:
        super().__init__()
        self.shell = shell

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.shell.warn(record.getMessage())
        else:
            self.shell.debug(f"{record.name}: {record.getMessage()}")


@contextlib.contextmanager
def session(*, as_json: bool, quiet: bool, debug: bool) -> Iterator[Session]:
    """Run a command: report the library's warnings, and turn errors into a line and an exit code.

    Exit codes: 2 for bad input, 3 for an error of the program, 130 if interrupted.
    """
    number = int(os.environ.get("RANK", "0"))
    if number:  # torchrun: the first process speaks for all
        as_json, quiet = False, True
    shell = Session(as_json=as_json, quiet=quiet, process=number)
    logger, handler = logging.getLogger("manifold_merge"), _Log(shell)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    logger.propagate = False
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            if quiet:
                warnings.simplefilter("ignore")
            if os.environ.get("WORLD_SIZE", "1") != "1":
                from manifold_merge.distributed import process_group

                stack.enter_context(process_group())
            yield shell
    except (typer.Exit, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        shell.error("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            raise
        code, message = _explain(error)
        shell.error(message)
        raise typer.Exit(code) from None
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _explain(error: Exception) -> tuple[int, str]:
    if isinstance(error, (ValueError, ImportError)):
        return BAD_INPUT, str(error)
    if isinstance(error, OSError):
        if error.strerror is None:  # raised by the library, with a sentence of its own
            return BAD_INPUT, str(error)
        where = f"{error.filename}: " if error.filename is not None else ""
        return BAD_INPUT, f"{where}{error.strerror}"
    memory = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
    if memory:
        return PROGRAM_ERROR, "out of memory; lower --max-memory, or use another --device"
    return PROGRAM_ERROR, (
        f"{type(error).__name__}: {error} - please report this, with what --debug prints"
    )


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by ``None``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return value
