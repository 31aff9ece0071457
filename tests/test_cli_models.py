"""The command ``manifold-merge models``: options, output, errors in its words, a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import run

from manifold_merge.checkpoint_merge import merge_models


def write(folder: Path, seed: int, **config: Any) -> Path:
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    tensors = {f"layers.{i}.weight": torch.randn(30, 20, generator=generator) for i in range(4)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"} | config))
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"m{i}", i) for i in range(2)]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ([], {}),
        (["--weights", "3,1"], {"weights": [3, 1]}),
        (["--geometry", "sphere", "--scope", "model"], {"geometry": "sphere", "scope": "model"}),
        (["--median", "--max-shard-size", "3KB"], {"p": 1, "max_shard_size": 3000}),
        (["--layer-weights", "*.0.*=1,0"], {"layer_weights": {"*.0.*": [1, 0]}}),
        (["--dtype", "bfloat16"], {"dtype": torch.bfloat16}),
    ],
)
def test_options_reach_the_library(
    options: list[str], same: dict[str, Any], two: list[Path], tmp_path: Path
) -> None:
    result = run("models", *two, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    expected = weights_of(merge_models(two, tmp_path / "expected", **same).output)
    found = weights_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_json_and_words(two: list[Path], tmp_path: Path) -> None:
    shown = run("models", *two, "-o", tmp_path / "out", "--weights", "3,1")
    assert "Mean of 2 models" in shown.stdout
    assert "0.75, 0.25" in shown.stdout
    assert "4 averaged, 0 copied" in shown.stdout
    document = json.loads(
        run("models", *two, "-o", tmp_path / "out", "--overwrite", "--json").stdout
    )
    assert document["command"] == "models"
    assert document["tensors"] == 4
    assert document["recipe"]["geometry"] == "euclidean"
    assert run("models", *two, "-o", tmp_path / "quiet", "--quiet").stdout == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "1"], "error: --weights: expected 2"),
        (["--weights", "a,b"], "error: --weights: expected numbers"),
        (["--max-shard-size", "x"], "error: --max-shard-size: expected a size"),
        (["--geometry", "fisher"], "error: --statistics: --geometry fisher needs one file"),
        (["--device", "tpu"], "error: --device: expected cpu"),
    ],
)
def test_errors_name_the_option(
    options: list[str], message: str, two: list[Path], tmp_path: Path
) -> None:
    result = run("models", *two, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_configurations_that_differ(tmp_path: Path) -> None:
    two = [write(tmp_path / "a", 0, rope_theta=1e4), write(tmp_path / "b", 1, rope_theta=1e6)]
    result = run("models", *two, "-o", tmp_path / "out")
    assert "'rope_theta' = 1000000.0" in result.stderr
    assert "pass --allow-different-config" in result.stderr
    assert run("models", *two, "-o", tmp_path / "out", "--allow-different-config").exit_code == 0


KILLED = """
import sys, time
from manifold_merge.cli import main
from manifold_merge.tensor_file import TensorFileWriter
write, count = TensorFileWriter.write_parts, 0
def slow(*arguments):
    global count
    count += 1
    write(*arguments)
    if count == 3:
        print("ready", flush=True)
        time.sleep(60)
TensorFileWriter.write_parts = slow
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on Unix")
def test_a_kill_leaves_no_output_and_the_same_command_goes_on(
    two: list[Path], tmp_path: Path
) -> None:
    arguments = ["models", *map(str, two), "-o", str(tmp_path / "out"), "--max-shard-size", "2401"]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    document = json.loads(run(*arguments, "--json").stdout)
    assert document["resumed"] == 2
    expected = weights_of(merge_models(two, tmp_path / "expected").output)
    found = weights_of(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [x.name for x in tmp_path.iterdir() if x.name.startswith(".")] == []
