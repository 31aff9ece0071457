"""Merge LoRA adapter folders into one, as a Fréchet mean, without the base model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from manifold_merge.adapter_sets import (
    check_compatible,
    module_coverage,
)
from manifold_merge.adapter_writer import check_adapter_output, write_adapter
from manifold_merge.adapters import Adapter
from manifold_merge.distributed import rank as process_rank
from manifold_merge.distributed import wait_for_all
from manifold_merge.merge_plan import DEFAULT_BUDGET, GEOMETRIES, MergePlan
from manifold_merge.merge_result import AdapterMerge, Tally
from manifold_merge.model_card import model_card
from manifold_merge.solution import Status
from manifold_merge.statistics import Statistics
from manifold_merge.transforms import Transform

__all__ = ["GEOMETRIES", "AdapterMerge", "merge_adapters"]

logger = logging.getLogger(__name__)

Path_ = str | os.PathLike[str]


def merge_adapters(
    adapters: Sequence[Path_ | Adapter],
    output: Path_ | None = None,
    *,
    weights: Sequence[float] | None = None,
    layer_weights: Mapping[str, Sequence[float]] | None = None,
    geometry: str = "auto",
    distance: str | None = None,
    statistics: Sequence[Path_ | Statistics] | None = None,
    damping: float = 1e-2,
    shrinkage: float = 0.0,
    normalisation: str = "none",
    rank: int | str | None = None,
    scale: float | str = 1.0,
    transform: str | Transform | None = None,
    p: int = 2,
    sum: bool = False,
    missing: str = "zero",
    extras: str = "mean",
    allow_different_base: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    gauge_check: bool = False,
    max_bytes: int = DEFAULT_BUDGET,
    progress: Callable[[int, int], None] | None = None,
) -> AdapterMerge:
    """Merge LoRA adapters of one base model as a Fréchet mean; the base model is not needed.

    In processes that torchrun has started (:mod:`manifold_merge.distributed`) each does its share,
    and the first one has or writes the result.

    Args:
        adapters: Folders in PEFT's format, or opened :class:`Adapter` objects, at least one.
        output: Folder to write, which ``PeftModel.from_pretrained`` loads. If ``None``, the factors
            are returned instead.
        weights: One weight for each adapter; divided by their sum. Equal if ``None``.
        layer_weights: Weights for modules whose name matches a shell pattern, such as
            ``{"*.layer.0.*": [1, 0, 0]}``; the first matching pattern counts.
        geometry: ``"fisher"``, the mean in which each adapter's distance is the change of the
            layer outputs on its own inputs, measured by statistics that travel beside the adapter
            (:func:`~manifold_merge.calibrate.calibrate_adapter`); ``"lifted"``
            (:func:`~manifold_merge.lift.lifted_mean`, for different tasks), a metric of
            :class:`~manifold_merge.lora.LoRAQuotient` (``"mixed"``, ``"invariant"``,
            ``"embedded"``, for variants of one task), ``"polar"``, or ``"auto"``: ``"fisher"`` if
            all adapters have statistics, else by the closeness of the adapters, ``"mixed"`` if
            each two have a cosine of 0.5 or more, else ``"lifted"``.
        distance: ``"exact"``, ``"aligned"`` or ``"chordal"``; not for ``"lifted"`` and
            ``"fisher"``. Default: ``"exact"`` for the mean of close adapters and ``"chordal"``
            for all else.
        statistics: Statistics of each adapter, files or folders, for ``"fisher"``; those beside
            the adapters if ``None``.
        damping: λ in G + λ (tr G / n) I, for each Gram G of ``"fisher"``.
        shrinkage: σ in (1 - σ) G + σ diag(G), for each Gram G of ``"fisher"``.
        normalisation: ``"none"``: every adapter counts by the change of its outputs; ``"trace"``:
            Grams are divided by their mean eigenvalue first; ``"task"``: each adapter's metric is
            divided by the squared length of its own update.
        rank: Rank of the result, an integer, ``"full"`` (the sum of the ranks) or ``"auto"``: the
            least rank that gives up at most 1 % (``"auto=0.02"``: 2 %) of what the unconstrained
            mean does, in the metric of ``"fisher"``, else in squared norm
            (:func:`~manifold_merge.rank_choice.choose_rank`); this merges twice. Default: full for
            ``"lifted"`` and ``"fisher"``, else the greatest of the adapters' ranks in that module.
        scale: Factor on the merged update, or ``"norm"``: in each module the factor that restores
            the root mean squared norm of the anchors.
        transform: What is done to the anchors before they are averaged, a function or a name of
            :data:`~manifold_merge.transforms.TRANSFORMS`, such as ``"ties=0.2"``.
        p: 2 for the mean, 1 for the geometric median, which a corrupted adapter cannot move far.
        sum: Return Σ wᵢ Wᵢ with weights as they are, negative ones included. That is not a mean:
            only the chordal geometry has it.
        missing: What a module that some adapters lack means: ``"zero"``, a zero update, as the
            model computes; ``"present"``, the mean over the adapters that have it; ``"error"``.
        extras: ``"mean"`` averages biases and fully trained modules; ``"drop"`` leaves them out.
        allow_different_base: Accept adapters that name different base models.
        dtype: Type of the written tensors; the widest of the inputs if ``None``.
        device: Where to compute; CPU if ``None``. On MPS, which has no float64, in float32.
        overwrite: Replace an existing adapter folder.
        gauge_check: Merge again from random gauges of each adapter and report the difference.
        max_bytes: Bytes of factors worked on at a time; more is faster on small modules.
        progress: Called with the number of modules done and in all; each counts twice with
            ``rank="auto"``.

    Returns:
        The merged factors or the folder, with the recipe.

    Raises:
        FileNotFoundError: A folder or file is missing.
        AdapterError: An adapter is damaged, of an unsupported kind, or does not fit the others.
        FileExistsError: The output exists; pass ``overwrite=True``.
        ValueError: An option is unknown or contradicts another; the message says which.

    Example:
        >>> import json, tempfile, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> def adapter(seed):
        ...     folder = Path(tempfile.mkdtemp())
        ...     config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
        ...     _ = (folder / "adapter_config.json").write_text(json.dumps(config))
        ...     g = torch.Generator().manual_seed(seed)
        ...     save_file({"base_model.model.q.lora_A.weight": torch.randn(1, 8, generator=g),
        ...                "base_model.model.q.lora_B.weight": torch.randn(8, 1, generator=g)},
        ...               folder / "adapter_model.safetensors")
        ...     return folder
        >>> merged = merge_adapters([adapter(0), adapter(1)])
        >>> merged.recipe["geometry"], merged.modules["q"][0].shape
        ('lifted', torch.Size([8, 2]))
    """
    if isinstance(adapters, str | os.PathLike | Adapter):
        raise ValueError(
            f"adapters: expected a list of folders, got a {type(adapters).__name__}; write "
            f"[{str(getattr(adapters, 'path', adapters))!r}]"
        )
    opened = [x if isinstance(x, Adapter) else Adapter(x) for x in adapters]
    plan = MergePlan.make(
        opened, weights=weights, layer_weights=layer_weights, geometry=geometry,
        distance=distance, rank=rank, scale=scale, transform=transform, p=p, sum=sum,
        missing=missing, extras=extras, device=device, gauge_check=gauge_check,
        max_bytes=max_bytes, statistics=statistics,
        metric_options={
            "damping": damping, "shrinkage": shrinkage, "normalisation": normalisation,
        },
    )  # fmt: skip
    check_compatible(
        opened,
        allow_different_base=allow_different_base,
        missing=missing,  # type: ignore[arg-type]
        extras=extras,  # type: ignore[arg-type]
    )
    if output is not None:
        check_adapter_output(output, like=opened, overwrite=overwrite)
    for adapter in opened:
        adapter.validate()
        adapter.release()
    plan.decide()
    wait_for_all()  # every process has checked the output before one writes it

    merged_extras = plan.merge_extras()
    total = len(module_coverage(opened))
    tally = Tally()
    count = _counter(progress, total * plan.passes)
    plan.decide_rank(count)
    factors = plan.merge_modules(tally, count)
    if output is None:
        modules, folder = dict(factors), None
        if dtype is not None:
            modules = {k: (b.to(dtype), a.to(dtype)) for k, (b, a) in modules.items()}
    elif process_rank():
        modules, folder = dict(factors), Path(output).resolve()
    else:
        modules = {}
        folder = write_adapter(
            output, factors, like=opened, extras=merged_extras, dtype=dtype,
            model_card=model_card(plan.recipe, opened), overwrite=overwrite,
        )  # fmt: skip
    wait_for_all()  # the output is there when any process returns
    if any(count for status, count in tally.status.items() if status != Status.CONVERGED):
        logger.warning(
            "merge: %d of %d modules did not converge; see AdapterMerge.status",
            total - tally.status[Status.CONVERGED],
            total,
        )
    return AdapterMerge(
        recipe=plan.recipe,
        closeness=plan.closeness,
        modules=modules,
        extras=merged_extras,
        modules_merged=total,
        status={Status(k).name.lower(): v for k, v in sorted(tally.status.items())},
        paths=dict(tally.paths),
        gauge_residual=tally.gauge_residual,
        output=folder,
    )


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """Adds up the modules that are done, and tells."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return count
