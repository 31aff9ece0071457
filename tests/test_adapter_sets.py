"""Several adapters together: compatibility, coverage and groups."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import STEM, write_plain

from manifold_merge.adapter_config import AdapterError
from manifold_merge.adapter_sets import check_compatible, group_modules, module_coverage
from manifold_merge.adapters import Adapter

A, B = STEM.format(0) + ".lora_A.weight", STEM.format(0) + ".lora_B.weight"


def folders(tmp_path: Path, *configs: dict[str, Any]) -> list[Adapter]:
    return [Adapter(write_plain(tmp_path / str(i), config)) for i, config in enumerate(configs)]


def test_compatible_adapters(tmp_path: Path) -> None:
    check_compatible(folders(tmp_path, {}, {"lora_alpha": 9}, {"base_model_name_or_path": None}))


HEAD = "base_model.model.head.weight"
# second adapter's configuration and tensors, options, what the message names and advises
INCOMPATIBLE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[str]]] = {
    "base": (
        {"base_model_name_or_path": "other"},
        {},
        {},
        ["base_model_name_or_path", "'base'", "'other'", "allow_different_base=True"],
    ),
    "fan": ({"fan_in_fan_out": True}, {}, {}, ["fan_in_fan_out", "correct"]),
    "shape": (
        {},
        {A: torch.ones(2, 3)},
        {},
        ["'layer.0.query'", "linear 5x3", "linear 5x4", "different base models"],
    ),
    "kind": (
        {},
        {A: torch.ones(2, 1, 2, 2), B: torch.ones(5, 2, 1, 1)},
        {},
        ["'layer.0.query'", "conv 5x1x2x2", "linear 5x4"],
    ),
    "modules": (
        {},
        {A: None, B: None},
        {"missing": "error"},
        ["'layer.0.query'", "only one of them", "missing='zero'"],
    ),
    "extra-shape": (
        {},
        {HEAD: torch.ones(2, 2)},
        {},
        ["base_weight", "'head.weight'", "(3, 3)", "(2, 2)", "extras='drop'"],
    ),
    "extra-missing": (
        {},
        {HEAD: None},
        {},
        ["base_weight", "'head.weight'", "missing='present'", "extras='drop'"],
    ),
}


@pytest.mark.parametrize("case", INCOMPATIBLE)
def test_incompatible_adapters(case: str, tmp_path: Path) -> None:
    config, tensors, options, fragments = INCOMPATIBLE[case]
    head = {HEAD: torch.ones(3, 3)}
    pair = [
        Adapter(write_plain(tmp_path / "first", {}, head)),
        Adapter(write_plain(tmp_path / "second", config, head | tensors)),
    ]
    for adapters in (pair, pair[::-1]):
        with pytest.raises(AdapterError) as caught:
            check_compatible(adapters, **options)
        for fragment in [str(tmp_path / "first"), str(tmp_path / "second"), *fragments]:
            assert fragment in str(caught.value)
    if case.startswith("extra"):
        check_compatible(pair, extras="drop")
    if case == "extra-missing":
        check_compatible(pair, missing="present")


def test_different_bases_may_be_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair = folders(tmp_path, {}, {"base_model_name_or_path": "copy"})
    check_compatible(pair, allow_different_base=True)
    assert "'copy'" in caplog.text


@pytest.mark.parametrize("options", [{"missing": "nil"}, {"extras": "sum"}])
def test_unknown_policies(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))} is '.*', expected"):
        check_compatible(folders(tmp_path, {}), **options)
    with pytest.raises(ValueError, match="adapters is empty"):
        check_compatible([])


def test_coverage_and_groups(tmp_path: Path) -> None:
    wide = {
        STEM.format(2) + ".lora_A.weight": torch.ones(2, 6),
        STEM.format(2) + ".lora_B.weight": torch.ones(5, 2),
    }
    adapters = [
        Adapter(write_plain(tmp_path / "0", {}, wide)),
        Adapter(write_plain(tmp_path / "1", {}, {A: None, B: None})),
    ]
    names = [f"layer.{i}.query" for i in range(3)]
    assert module_coverage(adapters) == {names[0]: (0,), names[1]: (0, 1), names[2]: (0,)}
    groups = group_modules(adapters)
    assert [(g.out_features, g.in_features, g.ranks, g.names) for g in groups] == [
        (5, 4, (2, 0), (names[0],)),
        (5, 4, (2, 2), (names[1],)),
        (5, 6, (2, 0), (names[2],)),
    ]
    assert [g.names for g in group_modules(adapters[:1])] == [tuple(names[:2]), (names[2],)]
