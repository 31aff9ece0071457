"""Minimise the functional distance to several anchors over the LoRA quotient, end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from manifold_merge._version import __version__
from manifold_merge.adapted_model import AdaptedModel, Factors, Source, Updates
from manifold_merge.adapter_sets import check_compatible
from manifold_merge.adapter_writer import check_adapter_output, write_adapter
from manifold_merge.adapters import Adapter
from manifold_merge.examples import as_examples
from manifold_merge.functional import Features, parse_features
from manifold_merge.lora import LoRAQuotient
from manifold_merge.refine_run import Descent

__all__ = ["STARTS", "Refinement", "check_request", "refine_adapters"]

STARTS = ("sequential", "merged")


@dataclasses.dataclass(frozen=True)
class Refinement:
    """What a refinement produced.

    Attributes:
        recipe: All options.
        modules: Factors by module name, B ``(m, R)`` and A ``(R, n)``; empty if the result was
            written to a folder.
        output: The folder that was written.
        before: Relative squared functional distance from each adapter for the merged adapter as it
            was given, on held-back examples (of those used where none are held back).
        started: The same at the start of the descent.
        after: The same for the result.
        history: Step, mean training loss since the last line, and mean held-back distance.
        steps: Steps taken; less than asked for if the held-back distance did not fall any more.
        best_step: The step whose result is returned.
    """

    recipe: dict[str, Any]
    modules: dict[str, Factors]
    output: Path | None
    before: tuple[float, ...]
    started: tuple[float, ...]
    after: tuple[float, ...]
    history: tuple[tuple[int, float, float], ...]
    steps: int
    best_step: int


def refine_adapters(
    merged: Source,
    adapters: Sequence[Source],
    model: nn.Module,
    data: Sequence[Sequence[Any]],
    output: str | os.PathLike[str] | None = None,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    features: Features = "mean+tokens",
    start: str = "sequential",
    steps: int = 800,
    batch_size: int = 8,
    learning_rate: float = 0.06,
    metric: str = "mixed",
    variation: float = 0.75,
    held_back: float = 0.125,
    evaluate_every: int = 50,
    patience: int = 3,
    tokenizer: Any = None,
    max_tokens: int = 512,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    dtype: torch.dtype | None = None,
    allow_different_base: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Refinement:
    """Bring a merged adapter's function close to those of the adapters, on unlabelled inputs.

    Minimises Σᵢ wᵢ E|h(x; θ) - h(x; θᵢ)|² / E|h(x; θᵢ) - E h|² over the updates of the given rank:
    a Fréchet mean for the functional distance (:mod:`manifold_merge.functional`). It is a descent
    with geoopt's Riemannian Adam on :class:`~manifold_merge.lora.LoRAQuotient` from a closed-form
    start. No labels are needed; in the field's words it is a distillation of several teachers.

    The result depends on the updates of the adapters, not on the gauge of their factors: all start
    in balanced form, and each step commutes with changes of gauge.

    Args:
        merged: The merged adapter to begin with: a folder, an opened one, or factors by name. Its
            modules are the ones refined; its biases and saved modules are kept as they are.
        adapters: The adapters that were merged.
        model: The base model, unadapted. Its own weights are not changed.
        data: For each adapter its inputs: texts, lists of token ids, or tensors.
        output: Folder to write. If ``None``, the factors are returned instead.
        weights: One weight for each adapter, divided by their sum. Equal if ``None``.
        rank: Rank of the result; that of ``merged``, module by module, if ``None``.
        features: ``"mean"`` over tokens, ``"last"`` token, ``"tokens"``, each of them,
            ``"layers"``, each of them in each layer before the last, or several joined by ``+``,
            or weights by name.
        start: ``"sequential"`` (:func:`~manifold_merge.sequential.sequential_start`), or
            ``"merged"``, the merged adapter itself.
        steps: Greatest number of steps; 0 returns the start.
        batch_size: Examples of each adapter in one step.
        learning_rate: Length of a step in the Riemannian metric, relative to the root mean square
            of the norms of the adapters' updates. It falls to zero along a cosine.
        metric: Metric of the quotient.
        variation: Share of the training sequences that are varied
            (:func:`~manifold_merge.examples.vary`); 0 turns variation off.
        held_back: Share of the examples, or a whole number of them, that are not trained on but
            decide when to stop and which step's result is returned; 0 turns that off.
        evaluate_every: Steps between evaluations on them, and between checkpoints.
        patience: Evaluations without a smaller held-back distance after which to stop.
        tokenizer: Needed for texts, with the signature of those of transformers.
        max_tokens: Longer texts are cut.
        seed: Of the order of examples and of their variation.
        checkpoint: File in which to keep the state. It is removed when the run has ended well.
        resume: Go on from the checkpoint if there is one. The result is that of an uninterrupted
            run, bit for bit on one machine with one number of threads.
        dtype: Type of the written tensors; the widest of the inputs if ``None``.
        allow_different_base: Accept adapters that name different base models.
        overwrite: Replace an existing adapter folder, or checkpoint.
        progress: Called with the number of steps done and in all.

    Returns:
        The refined factors or the folder, with distances before and after.

    Raises:
        FileNotFoundError: A folder is missing.
        AdapterError: An adapter is damaged or does not fit the others.
        FileExistsError: The output or the checkpoint exists.
        ValueError: An option is unknown, the model does not fit the adapters, the checkpoint is of
            another run, or the descent diverges; the message says what to do.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
        >>> def factors():
        ...     return {"0": (torch.randn(6, 1), torch.randn(1, 6)),
        ...             "2": (torch.randn(4, 1), torch.randn(1, 6))}
        >>> one, two = factors(), factors()
        >>> mean = {n: (one[n][0] / 2, one[n][1]) for n in one}
        >>> inputs = [list(torch.randn(64, 6)) for _ in range(2)]
        >>> refined = refine_adapters(mean, [one, two], model, inputs, steps=50, evaluate_every=25)
        >>> sum(refined.after) < sum(refined.before)
        True
    """
    options = {
        "features": parse_features(features), "start": start, "rank": rank, "steps": steps,
        "batch_size": batch_size, "learning_rate": learning_rate, "metric": metric,
        "variation": variation, "held_back": held_back, "evaluate_every": evaluate_every,
        "patience": patience, "max_tokens": max_tokens, "seed": seed,
    }  # fmt: skip
    sources = [_open(source) for source in (merged, *adapters)]
    share = check_request(
        sources[0], sources[1:], output, weights=weights, checkpoint=checkpoint, resume=resume,
        allow_different_base=allow_different_base, overwrite=overwrite, **options,
    )  # fmt: skip
    if len(data) != len(adapters):
        raise ValueError(f"data: expected {len(adapters)}, one for each adapter; got {len(data)}")
    examples = [
        as_examples(own, tokenizer, max_tokens=max_tokens, name=f"data[{i}]")
        for i, own in enumerate(data)
    ]
    opened = [source for source in sources if isinstance(source, Adapter)]
    state_file = None if checkpoint is None else Path(checkpoint)

    parameter = next(model.parameters())
    working = torch.promote_types(parameter.dtype, torch.float32)
    updates = [Updates.read(source, working, parameter.device) for source in sources]
    recipe = {
        "manifold_merge": __version__,
        "adapters": [
            s.path.resolve().name if isinstance(s, Adapter) else None for s in sources[1:]
        ],
        "merged": sources[0].path.resolve().name if isinstance(sources[0], Adapter) else None,
        "weights": share,
        "examples": [len(own) for own in examples],
        **options,
    }
    for source in opened:
        source.validate()
        source.release()
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    with AdaptedModel(model, updates, pad=pad) as adapted:
        descent = Descent(adapted, updates, examples, share, options)
        descent.prepare(state_file if resume else None)
        descent.run(state_file, progress)
        modules = descent.best()
    state = descent.state
    result = Refinement(
        recipe=recipe,
        modules=modules,
        output=None,
        before=state.before,
        started=state.started,
        after=state.best_distances,
        history=tuple(state.history),
        steps=state.step,
        best_step=state.best_step,
    )
    if output is not None:
        result = _write(result, output, sources, opened, dtype, overwrite)
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    return result


def check_request(
    merged: Adapter | Mapping[str, Factors],
    adapters: Sequence[Adapter | Mapping[str, Factors]],
    output: str | os.PathLike[str] | None,
    *,
    weights: Sequence[float] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    allow_different_base: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> list[float]:
    """Check all of a request to :func:`refine_adapters` that needs neither model nor data.

    Returns:
        The weights, divided by their sum.

    Raises:
        AdapterError: The adapters do not fit each other.
        FileExistsError: The output or the checkpoint exists.
        ValueError: An option is unknown or out of bounds.
    """
    _check_options(options)
    if not adapters:
        raise ValueError("adapters is empty; give the adapters that were merged")
    share = _normalized(weights, len(adapters))
    opened = [source for source in (merged, *adapters) if isinstance(source, Adapter)]
    if opened:
        check_compatible(opened, allow_different_base=allow_different_base, extras="drop")
    if output is not None:
        if not opened:
            raise ValueError(
                "output needs at least one adapter folder, whose configuration is carried over; "
                "leave output out to get factors"
            )
        check_adapter_output(output, like=opened, overwrite=overwrite)
    if checkpoint is not None and Path(checkpoint).exists() and not (resume or overwrite):
        raise FileExistsError(
            f"checkpoint {checkpoint} exists; pass resume=True (--resume) to go on with it, or "
            "overwrite=True (--overwrite) to begin anew"
        )
    return share


def _check_options(options: Mapping[str, Any]) -> None:
    parse_features(options["features"])
    if options["start"] not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}; got {options['start']!r}")
    least = {"steps": 0, "batch_size": 1, "evaluate_every": 1, "patience": 1, "max_tokens": 1}
    for name, bound in least.items():
        if options[name] < bound:
            raise ValueError(f"{name} must be at least {bound}; got {options[name]}")
    if options["rank"] is not None and options["rank"] < 1:
        raise ValueError(f"rank must be at least 1; got {options['rank']}")
    if not 0 < options["learning_rate"] < math.inf:
        raise ValueError(f"learning_rate must be positive; got {options['learning_rate']}")
    if not 0 <= options["variation"] <= 1:
        raise ValueError(f"variation must be between 0 and 1; got {options['variation']}")
    if options["held_back"] < 0:
        raise ValueError(f"held_back must not be negative; got {options['held_back']}")
    LoRAQuotient(1, 1, options.get("metric", "mixed"))  # raises for an unknown metric


def _open(source: Source) -> Adapter | Mapping[str, Factors]:
    return source if isinstance(source, (Adapter, Mapping)) else Adapter(source)


def _normalized(weights: Sequence[float] | None, count: int) -> list[float]:
    given = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(given) != count:
        raise ValueError(f"weights: expected {count}, one for each adapter; got {len(given)}")
    if not all(0 <= w < math.inf for w in given) or not sum(given):
        raise ValueError(f"weights: expected non-negative numbers, not all zero; got {given}")
    return [w / sum(given) for w in given]


def _write(
    result: Refinement,
    output: str | os.PathLike[str],
    sources: Sequence[Adapter | Mapping[str, Factors]],
    opened: Sequence[Adapter],
    dtype: torch.dtype | None,
    overwrite: bool,
) -> Refinement:
    merged = sources[0]
    extras = {}
    if isinstance(merged, Adapter):
        extras = {name: merged.extra(name) for name in merged.extras}
    folder = write_adapter(
        output, result.modules, like=opened, extras=extras, dtype=dtype,
        model_card=_card(result, opened), overwrite=overwrite,
    )  # fmt: skip
    return dataclasses.replace(result, modules={}, output=folder)


def _card(result: Refinement, opened: Sequence[Adapter]) -> str:
    recipe = result.recipe
    columns = recipe["adapters"], recipe["weights"], recipe["examples"], result.before, result.after
    rows = "\n".join(
        f"| `{name}` | {weight:.4g} | {count} | {before:.4f} | {after:.4f} |"
        for name, weight, count, before, after in zip(*columns, strict=True)
    )
    base = opened[0].base_model or "a base model that is not named"
    return (
        f"# Merged and refined LoRA adapter\n\nA Fréchet mean of LoRA adapters of `{base}` for the "
        "functional distance, found by gradient descent on unlabelled examples with manifold-merge "
        f"{__version__}. The distance is the mean squared difference of features on held-back "
        "examples, relative to their variance.\n\n"
        "| adapter | weight | examples | distance before | after |\n|---|---|---|---|---|\n"
        f"{rows}\n\n## Recipe\n\n```json\n{json.dumps(recipe, indent=2)}\n```\n"
    )
