"""Several adapters together: are they updates of one model, and which modules go side by side?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from manifold_merge.adapter_config import CONFIG_NAME, AdapterError
from manifold_merge.adapters import Adapter, AdapterModule

__all__ = ["ModuleGroup", "check_compatible", "group_modules", "module_coverage"]

logger = logging.getLogger(__name__)

MissingPolicy = Literal["zero", "present", "error"]
ExtrasPolicy = Literal["mean", "drop"]


def module_coverage(adapters: Sequence[Adapter]) -> dict[str, tuple[int, ...]]:
    """Tell for each module which of the adapters adapt it.

    Returns:
        Module name to the indices of the adapters that have it, sorted by name.
    """
    names = sorted({name for adapter in adapters for name in adapter.modules})
    return {
        name: tuple(i for i, adapter in enumerate(adapters) if name in adapter.modules)
        for name in names
    }


@dataclass(frozen=True)
class ModuleGroup:
    """Modules whose factors can be stacked and merged as one batch.

    Attributes:
        out_features: Rows ``m`` of each update.
        in_features: Columns ``n`` of each update.
        ranks: The rank in each adapter; 0 where the adapter lacks these modules.
        names: The modules.
    """

    out_features: int
    in_features: int
    ranks: tuple[int, ...]
    names: tuple[str, ...]


def group_modules(adapters: Sequence[Adapter]) -> list[ModuleGroup]:
    """Group the modules of compatible adapters by equal ``(m, n)`` and equal ranks.

    Returns:
        The groups, in the order of their first module; each module is in exactly one.
    """
    groups: dict[tuple[int, int, tuple[int, ...]], list[str]] = {}
    for name, present in module_coverage(adapters).items():
        module = adapters[present[0]].modules[name]
        ranks = tuple(
            adapter.modules[name].rank if name in adapter.modules else 0 for adapter in adapters
        )
        groups.setdefault((module.out_features, module.in_features, ranks), []).append(name)
    return [ModuleGroup(*key, names=tuple(names)) for key, names in groups.items()]


def check_compatible(
    adapters: Sequence[Adapter],
    *,
    allow_different_base: bool = False,
    missing: MissingPolicy = "zero",
    extras: ExtrasPolicy = "mean",
) -> None:
    """Check that adapters are updates of one base model, so that their average has a meaning.

    Args:
        adapters: At least one adapter.
        allow_different_base: Accept different ``base_model_name_or_path`` or ``revision`` with a
            warning in the log, for example for copies of one model under several paths.
        missing: What a module that some adapters lack means: ``"zero"``, a zero update (what the
            model computes); ``"present"``, nothing, only the adapters that have it count;
            ``"error"``, a mistake.
        extras: ``"mean"`` checks that the extra tensors can be averaged; ``"drop"`` ignores them.

    Raises:
        ValueError: ``adapters`` is empty or a policy is unknown.
        AdapterError: Names the two adapters, what differs, and the remedy.
    """
    if not adapters:
        raise ValueError("adapters is empty; give at least one")
    if missing not in ("zero", "present", "error"):
        raise ValueError(f"missing is {missing!r}, expected 'zero', 'present' or 'error'")
    if extras not in ("mean", "drop"):
        raise ValueError(f"extras is {extras!r}, expected 'mean' or 'drop'")
    _check_bases(adapters, allow_different_base)

    first_seen: dict[str, Adapter] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            other = first_seen.setdefault(name, adapter)
            expected = _layout(other.modules[name])
            if _layout(module) != expected:
                raise AdapterError(
                    f"module {name!r} is {_layout(module)} in {adapter.path} but {expected} in "
                    f"{other.path}; the adapters belong to different base models"
                )
        if missing == "error" and adapter.modules.keys() != adapters[0].modules.keys():
            differing = sorted(adapter.modules.keys() ^ adapters[0].modules.keys())
            raise AdapterError(
                f"{adapter.path} and {adapters[0].path} adapt different modules: {differing[0]!r}"
                f"{f' and {len(differing) - 1} more' if len(differing) > 1 else ''} in only one of "
                "them; choose missing='zero' or missing='present'"
            )
    if extras == "mean":
        _check_extras(adapters, missing)


def _layout(module: AdapterModule) -> str:
    shape = (module.out_features, *(module.kernel or (module.in_features,)))
    return f"{module.kind} {'x'.join(map(str, shape))}"


def _check_bases(adapters: Sequence[Adapter], allow_different_base: bool) -> None:
    first = adapters[0]
    for adapter in adapters[1:]:
        if bool(adapter.config.get("fan_in_fan_out")) != bool(first.config.get("fan_in_fan_out")):
            raise AdapterError(
                f"fan_in_fan_out differs between {first.path} and {adapter.path}: the layers of "
                "the base models store their weights differently; correct the wrong "
                f"{CONFIG_NAME} (true for transformers' Conv1D, as in GPT-2)"
            )
    for key in ("base_model_name_or_path", "revision"):
        stated = [(a.config[key], a.path) for a in adapters if a.config.get(key)]
        for value, path in stated[1:]:
            if value == stated[0][0]:
                continue
            message = (
                f"{key} is {stated[0][0]!r} in {stated[0][1]} but {value!r} in {path}; updates of "
                "different models have no common average"
            )
            if not allow_different_base:
                raise AdapterError(
                    f"{message}; if both name the same weights, pass allow_different_base=True"
                )
            logger.warning("%s, merged because allow_different_base=True", message)


def _check_extras(adapters: Sequence[Adapter], missing: MissingPolicy) -> None:
    remedy = "pass extras='drop' to leave such tensors out"
    for name in sorted({name for adapter in adapters for name in adapter.extras}):
        having = [adapter for adapter in adapters if name in adapter.extras]
        first = having[0].extras[name]
        for adapter in having[1:]:
            if adapter.extras[name].shape != first.shape:
                raise AdapterError(
                    f"{first.kind} tensor {name!r} has shape {first.shape} in {having[0].path} but "
                    f"{adapter.extras[name].shape} in {adapter.path}, so it has no average; "
                    f"{remedy}"
                )
        lacking = [adapter.path for adapter in adapters if name not in adapter.extras]
        if lacking and first.replaces_base and missing != "present":
            raise AdapterError(
                f"{first.kind} tensor {name!r} is in {having[0].path} but not in {lacking[0]}, "
                "where the base model's own tensor is used, which the adapter does not hold; pass "
                f"missing='present' to average it where it is, or {remedy}"
            )
