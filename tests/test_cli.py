"""The command line: options, output, errors in its own words, exit codes, interruption."""

from __future__ import annotations

import inspect as python_inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import run
from peft_models import write_plain
from safetensors.torch import load_file
from small_adapters import FEWER, adapter, rewrite
from typer.testing import CliRunner

import manifold_merge.merge
from manifold_merge import __version__ as package_version
from manifold_merge.adapters import Adapter
from manifold_merge.cli import app
from manifold_merge.cli_options import Distance, Extras, Geometry, Missing, parse_bytes
from manifold_merge.cli_results import REMEDIES, remedy
from manifold_merge.cli_session import in_cli_words
from manifold_merge.lora import DISTANCES
from manifold_merge.merge import GEOMETRIES, merge_adapters
from manifold_merge.solution import Status

ROOT = Path(__file__).resolve().parent.parent


def products(folder: Path) -> dict[str, torch.Tensor]:
    opened = Adapter(folder)
    return {name: opened.delta_weight(name, torch.float64) for name in opened.modules}


def same(first: Path, second: Path) -> bool:
    one, two = products(first), products(second)
    return one.keys() == two.keys() and all(
        torch.allclose(one[n], two[n], rtol=1e-5, atol=1e-7) for n in one
    )


# --- merging -------------------------------------------------------------------------------------


def test_merge_writes_what_the_library_writes(two: list[Path], tmp_path: Path) -> None:
    result = run("adapters", *two, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    merge_adapters(two, tmp_path / "expected")
    assert same(tmp_path / "out", tmp_path / "expected")
    for said in (
        "Mean of 2 adapters of base",
        "lifted (least pairwise cosine",
        "different tasks",
        "0.5, 0.5",
        "3 of rank 4 to 6",
        "3 modules converged",
        f"Wrote {tmp_path / 'out'} (float32, ",
    ):
        assert said in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if "Wrote" not in line)


SCHEMA: dict[str, type | tuple[type, ...]] = {
    "manifold_merge": str,
    "command": str,
    "output": str,
    "recipe": dict,
    "closeness": float,
    "modules": int,
    "ranks": list,
    "dtypes": list,
    "extras": int,
    "bytes": int,
    "status": dict,
    "converged": bool,
    "logarithms": dict,
    "gauge_residual": (float, type(None)),
    "seconds": float,
    "warnings": list,
}


def test_json_is_one_object_and_nothing_else(two: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run("adapters", *two, "--output", output, "--json", "--check-gauge")
    assert result.exit_code == 0
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found.keys() == SCHEMA.keys()
    for key, kind in SCHEMA.items():
        assert isinstance(found[key], kind), key
    assert found["output"] == str(output)
    assert found["recipe"]["geometry"] == "lifted"
    assert found["ranks"] == [4, 6]
    assert found["dtypes"] == ["float32"]
    assert found["status"] == {"converged": 3}
    assert found["gauge_residual"] < 1e-3
    assert found["bytes"] == sum(file.stat().st_size for file in output.iterdir())


def test_quiet_prints_nothing_but_errors(two: list[Path], tmp_path: Path) -> None:
    other = adapter(tmp_path / "other", seed=2, base_model_name_or_path="other")
    arguments = ["adapters", *two, other, "--output", tmp_path / "out", "--quiet"]
    result = run(*arguments, "--allow-different-base")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    refused = run(*arguments)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ")


def test_warnings_are_shown_in_words_of_the_command_line(two: list[Path], tmp_path: Path) -> None:
    other = adapter(tmp_path / "other", seed=2, base_model_name_or_path="other")
    arguments = ["adapters", *two, other, "--output", tmp_path / "out", "--allow-different-base"]
    shown = run(*arguments)
    assert shown.exit_code == 0
    assert shown.stderr.startswith("warning: base_model_name_or_path is 'base'")
    assert "--allow-different-base" in shown.stderr
    assert "=True" not in shown.stderr
    again = json.loads(run(*arguments, "--overwrite", "--json").stdout)
    assert [f"warning: {text}\n" for text in again["warnings"]] == [shown.stderr]


# options, what merge_adapters is called with
PASSED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "weights": (["--weights", "1,3"], {"weights": [1.0, 3.0]}),
    "negative": (["--sum", "--weights", "1,-0.5"], {"weights": [1.0, -0.5], "sum": True}),
    "negative-first": (["--sum", "--weights", "-0.5,1"], {"weights": [-0.5, 1.0]}),
    "layer-weights": (
        ["--layer-weights", "*.0.*=1,0", "--layer-weights", "a=b*=0,1"],
        {"layer_weights": {"*.0.*": [1.0, 0.0], "a=b*": [0.0, 1.0]}},
    ),
    "geometry": (["--geometry", "polar"], {"geometry": "polar"}),
    "distance": (["--distance", "aligned"], {"distance": "aligned"}),
    "rank": (["--rank", "5"], {"rank": 5}),
    "full": (["--rank", "full"], {"rank": "full"}),
    "scale": (["--scale", "0.45"], {"scale": 0.45}),
    "median": (["--median"], {"p": 1}),
    "missing": (["--missing", "present"], {"missing": "present"}),
    "extras": (["--extras", "drop"], {"extras": "drop"}),
    "base": (["--allow-different-base"], {"allow_different_base": True}),
    "dtype": (["--dtype", "bfloat16"], {"dtype": torch.bfloat16}),
    "device": (["--device", "cpu"], {"device": torch.device("cpu")}),
    "gauge": (["--check-gauge"], {"gauge_check": True}),
    "memory": (["--max-memory", "64MB"], {"max_bytes": 64_000_000}),
    "overwrite": (["--overwrite"], {"overwrite": True}),
}


@pytest.mark.parametrize("case", PASSED)
def test_options_reach_the_library(
    case: str, two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def record(adapters: Any, output: Path, **options: Any) -> None:
        given.update(options, folders=[a.path for a in adapters], output=output)
        raise ValueError("recorded")

    monkeypatch.setattr(manifold_merge.merge, "merge_adapters", record)
    options, expected = PASSED[case]
    result = run("adapters", *two, "--output", tmp_path / "out", *options)
    assert result.stderr == "error: recorded\n"
    assert given["folders"] == two
    assert given["output"] == tmp_path / "out"
    assert {key: given[key] for key in expected} == expected
    # What was not asked for is what the library takes by itself.
    defaults = python_inspect.signature(merge_adapters).parameters
    del given["progress"], given["folders"], given["output"]
    for key in given.keys() - expected.keys() - {"device", "layer_weights", "max_bytes", "sum"}:
        assert given[key] == defaults[key].default, key


def test_names_of_options_are_those_of_the_library() -> None:
    assert [str(g) for g in Geometry] == sorted(GEOMETRIES, key=[*map(str, Geometry)].index)
    assert {str(d) for d in Distance} == set(DISTANCES)
    assert {str(m) for m in Missing} == {"zero", "present", "error"}
    assert {str(e) for e in Extras} == {"mean", "drop"}


def test_output_types_and_config_keys(two: list[Path], tmp_path: Path) -> None:
    write_plain(tmp_path / "odd", {"new_key": "harmless"})
    output = tmp_path / "out"
    refused = run("adapters", tmp_path / "odd", "-o", output)
    assert refused.exit_code == 2
    assert "list it in --ignore-config-key" in refused.stderr
    result = run(
        "adapters", tmp_path / "odd", "-o", output,
        "--ignore-config-key", "new_key", "--dtype", "float16",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    stored = load_file(output / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}


def test_each_status_has_a_remedy() -> None:
    assert ["converged", *REMEDIES] == [status.name.lower() for status in Status]
    assert remedy({"converged": 2, "stalled": 1, "cancelled": 1}) == REMEDIES["cancelled"]
    assert remedy({"converged": 2, "stalled": 1}) == REMEDIES["stalled"]


def test_strict_exits_with_1_if_a_mean_did_not_converge(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / "plus"), adapter(tmp_path / "minus", size=-1.0)]
    arguments = ["adapters", *folders, "-o", tmp_path / "out", "--overwrite"]
    lax = run(*arguments)
    assert lax.exit_code == 0
    assert "3 modules cancelled: opposite updates cancel" in " ".join(lax.stdout.split())
    assert "warning: merge: 3 of 3 modules did not converge\n" in lax.stderr
    strict = run(*arguments, "--strict", "--quiet")
    assert strict.exit_code == 1
    assert strict.stderr.startswith(
        "error: not converged, the output is written: opposite updates cancel"
    )
    assert run("adapters", folders[0], "-o", tmp_path / "one", "--strict").exit_code == 0


# --- errors --------------------------------------------------------------------------------------

STEM = "base_model.model.layer.0.query"


def _truncate(folders: list[Path]) -> None:
    file = folders[1] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _poison(folders: list[Path]) -> None:
    rewrite(folders[1], lambda t: t[f"{STEM}.lora_A.weight"].fill_(float("nan")))


def _config(**updates: Any) -> Callable[[list[Path]], None]:
    def change(folders: list[Path]) -> None:
        file = folders[1] / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | updates))

    return change


def _exists(folders: list[Path]) -> None:
    merge_adapters(folders, folders[0].parent / "out")


def _foreign(folders: list[Path]) -> None:
    (folders[0].parent / "out").mkdir()
    (folders[0].parent / "out" / "thesis.tex").touch()


def _fewer(folders: list[Path]) -> None:
    (folders[1] / "adapter_config.json").unlink()
    (folders[1] / "adapter_model.safetensors").unlink()
    folders[1].rmdir()
    adapter(folders[1], FEWER, seed=1)


# what is wrong with the second of two adapters or the output, options, what the line says
ERRORS: dict[str, tuple[Callable[[list[Path]], None] | None, list[str], list[str]]] = {
    "no-folder": (None, ["nowhere"], ["nowhere"]),
    "truncated": (
        _truncate,
        [],
        ["a1/adapter_model.safetensors is truncated", "download it again"],
    ),
    "nan": (_poison, [], ["a1", f"{STEM}.lora_A.weight", "NaN"]),
    "base": (
        _config(base_model_name_or_path="other"),
        [],
        ["'base'", "'other'", "pass --allow-different-base"],
    ),
    "dora": (_config(use_dora=True), [], ["a1/adapter_config.json: use_dora=True", "DoRA"]),
    "kind": (_config(peft_type="LOHA"), [], ["peft_type is 'LOHA'"]),
    "json": (
        lambda folders: (folders[1] / "adapter_config.json").write_text("{"),
        [],
        ["adapter_config.json is not valid JSON"],
    ),
    "exists": (_exists, [], ["out exists", "or pass --overwrite"]),
    "foreign": (_foreign, ["--overwrite"], ["'thesis.tex'", "never overwritten"]),
    "missing": (_fewer, ["--missing", "error"], ["adapt different modules", "--missing zero"]),
    "weights-number": (None, ["--weights", "1,1,1"], ["--weights: expected 2", "got 3"]),
    "weights-text": (None, ["--weights", "1;2"], ["--weights: expected numbers", "'1;2'"]),
    "weights-spaces": (
        None,
        ["--weights", "1", "2", "3"],
        ["folder 2 does not exist", "separated by commas: --weights 1,2,3"],
    ),
    "weights-sign": (
        None,
        ["--weights", "1,-2"],
        ["--weights: [1.0, -2.0] has a negative entry", "use --distance chordal"],
    ),
    "layer-weights": (
        None,
        ["--layer-weights", "*.0.*=1"],
        ["--layer-weights '*.0.*': expected 2"],
    ),
    "layer-weights-text": (
        None,
        ["--layer-weights", "1,2"],
        ["--layer-weights: expected PATTERN=w,w,...", "'1,2'"],
    ),
    "layer-weights-twice": (
        None,
        ["--layer-weights", "a=1,2", "--layer-weights", "a=2,1"],
        ["pattern 'a' is given twice"],
    ),
    "rank": (None, ["--rank", "0"], ["--rank: expected a positive integer, 'full'", "got 0"]),
    "rank-text": (None, ["--rank", "half"], ["--rank: expected a positive integer", "'half'"]),
    "scale": (None, ["--scale", "nan"], ["--scale: expected a finite number"]),
    "lifted-distance": (
        None,
        ["--geometry", "lifted", "--distance", "exact"],
        ["--distance exact: --geometry lifted brings its own distance"],
    ),
    "sum-median": (None, ["--sum", "--median"], ["--sum and --median contradict each other"]),
    "sum-distance": (
        None,
        ["--sum", "--distance", "exact"],
        ["--sum: a sum is the solution of the chordal geometry only", "--distance chordal"],
    ),
    "lifted-median": (
        None,
        ["--geometry", "lifted", "--median"],
        ["--median: --geometry lifted has a mean only; use --geometry embedded"],
    ),
    "device": (None, ["--device", "tpu"], ["--device: expected cpu, cuda", "'tpu'"]),
    "memory": (None, ["--max-memory", "much"], ["--max-memory: expected a size", "'much'"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_in_words_of_the_command_line(case: str, tmp_path: Path) -> None:
    damage, options, fragments = ERRORS[case]
    folders = [adapter(tmp_path / f"a{i}", seed=i) for i in range(2)]
    if damage is not None:
        damage(folders)
    output = tmp_path / "out"
    before = sorted(output.iterdir()) if output.exists() else None
    given = ["adapters", *folders, "--output", output, *options]
    result = run(*given, "--json")
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for fragment in fragments:
        assert fragment in line
    for word in ("Traceback", "=True", "='", "p=1"):
        assert word not in line.replace("use_dora=True", "")
    assert (sorted(output.iterdir()) if output.exists() else None) == before
    assert not list(tmp_path.glob(".manifold-merge*"))
    with pytest.raises((ValueError, OSError)):  # the error itself, for a bug report
        CliRunner().invoke(app, [*map(str, given), "--debug"], catch_exceptions=False)


USAGE = {
    "no-output": (["adapters", "a"], "--output"),
    "no-folder": (["adapters", "-o", "out"], "DIR"),
    "geometry": (["adapters", "a", "-o", "b", "--geometry", "flat"], "lifted"),
    "unknown": (["adapters", "a", "-o", "b", "--shape", "round"], "--shape"),
    "command": (["adapter", "a"], "adapter"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors_name_the_option(case: str) -> None:
    arguments, fragment = USAGE[case]
    result = run(*arguments)
    assert result.exit_code == 2
    assert fragment in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "code", "fragments"),
    [
        (KeyboardInterrupt(), 130, ["error: interrupted"]),
        (RuntimeError("a defect"), 3, ["RuntimeError: a defect", "please report", "--debug"]),
        (RuntimeError("CUDA out of memory. Tried"), 3, ["lower --max-memory"]),
        (MemoryError(), 3, ["lower --max-memory"]),
        (OSError(28, "No space left on device", "/x/out"), 2, ["/x/out: No space left"]),
        (PermissionError("cannot write into /x"), 2, ["error: cannot write into /x"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_other_errors_have_their_exit_codes(
    error: BaseException,
    code: int,
    fragments: list[str],
    two: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(manifold_merge.merge, "merge_adapters", fail)
    result = run("adapters", *two, "-o", tmp_path / "out")
    assert result.exit_code == code
    assert len(result.stderr.splitlines()) == 1
    for fragment in fragments:
        assert fragment in result.stderr


@pytest.mark.parametrize(
    "path",
    ["/hub/models--my_org--x_y/a", "/runs/rank=8/a", "/runs/lora-scale='2'/a", "a.geometry='x'"],
)
def test_paths_in_messages_stay_as_they_are(path: str) -> None:
    message = f"{path} is missing; save or download it again"
    assert in_cli_words(message) == message


@pytest.mark.parametrize(
    ("text", "size"),
    [("256MB", 256e6), ("1.5 GiB", 1.5 * 2**30), ("10k", 1e4), ("77", 77), ("2tb", 2e12)],
)
def test_sizes(text: str, size: float) -> None:
    assert parse_bytes("--max-memory", text) == size


@pytest.mark.parametrize("text", ["", "0", "-1MB", "1XB", "MB", "0.2"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="--max-memory: expected a size"):
        parse_bytes("--max-memory", text)


def test_help_and_version() -> None:
    assert run("--version").stdout == f"manifold-merge {package_version}\n"
    overview = run("--help")
    assert overview.exit_code == 0
    for command in ("adapters", "inspect", "130 interrupted"):
        assert command in overview.stdout
    text = run("adapters", "--help").stdout
    for option in python_inspect.signature(merge_adapters).parameters:
        option = {"p": "median", "gauge_check": "check-gauge", "max_bytes": "max-memory"}.get(
            option, option.replace("_", "-")
        )
        if option not in ("adapters", "progress"):
            assert f"--{option}" in text
