"""The installed program in processes of its own: streams, exit codes, interruption, terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_adapters import adapter

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [adapter(tmp_path / f"a{i}", seed=i, dtype=torch.float32) for i in range(2)]


def program(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "manifold_merge", *map(str, arguments)],
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80"} | options,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_installed_program(two: list[Path], tmp_path: Path) -> None:
    # Not even a terminal that knows ASCII only stops it.
    result = program(
        "adapters", *two, "--output", tmp_path / "out", "--json", PYTHONIOENCODING="ascii"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == b""
    assert json.loads(result.stdout)["output"] == str(tmp_path / "out")
    shown = program("inspect", *two, PYTHONIOENCODING="ascii")
    assert shown.returncode == 0, shown.stderr
    assert b"stable rank" in shown.stdout
    failed = program("adapters", *two, "--output", tmp_path / "out")
    assert failed.returncode == 2
    assert failed.stdout == b""
    assert re.fullmatch(rb"error: output .* exists; .*--overwrite\n", failed.stderr)


SLOW_WRITE = """
import signal, time
# A shell starts background jobs with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from manifold_merge.cli import main
from manifold_merge.tensor_file import TensorFileWriter
TensorFileWriter.write = lambda self, name, tensor: time.sleep(60)
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are sent as on Unix")
def test_interruption_leaves_nothing_behind(two: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "results"
    place.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITE, "adapters", *map(str, two), "-o", str(place / "out")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 240
    while not list(place.glob(".*/*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (stdout, stderr) == (b"", b"error: interrupted\n")
    assert list(place.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="uses a Linux pseudo-terminal")
def test_progress_is_shown_on_a_terminal_only(two: list[Path], tmp_path: Path) -> None:
    import pty

    parent, child = pty.openpty()
    command = [sys.executable, "-m", "manifold_merge", "adapters", *map(str, two), "--json"]
    with subprocess.Popen(
        [*command, "-o", str(tmp_path / "out")],
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=child,
    ) as process:
        os.close(child)
        shown = b""
        try:
            while chunk := os.read(parent, 4096):
                shown += chunk
        except OSError:  # Linux: the other end is closed
            pass
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["converged"]
    os.close(parent)
    assert b"merging" in shown
    assert b"3/3" in shown
