"""The command ``manifold-merge refine``."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from manifold_merge.cli_options import (
    AdapterOutput,
    Debug,
    Device,
    DifferentBase,
    DType,
    Json,
    Quiet,
    Weights,
    parse_device,
    parse_weights,
)
from manifold_merge.cli_session import Session, session

__all__ = ["RefineCommand", "refine"]

MANY = ("--adapters", "--data")
_NAMES = (
    "batch_size|evaluate_every|features|held_back|learning_rate|max_tokens|metric|patience|rank|"
    "resume|seed|start|steps|variation"
)


class Start(StrEnum):
    """Names of the starts of ``refine_adapters``."""

    sequential = "sequential"
    merged = "merged"


class RefineCommand(TyperCommand):
    """Options that take several values: ``--adapters A B C``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the name of such an option before each of its values."""
        expanded: list[str] = []
        current: str | None = None
        values = 0
        for argument in args:
            if argument.startswith("-") and argument != "-":
                current, values = argument if argument in MANY else None, 0
            elif current is not None:
                if values:
                    expanded.append(current)
                values += 1
            expanded.append(argument)
        return super().parse_args(ctx, expanded)


def refine(
    merged: Annotated[
        Path,
        typer.Argument(
            metavar="MERGED", help="Merged adapter to begin with; comes first.", show_default=False
        ),
    ],
    adapters: Annotated[
        list[Path],
        typer.Option(
            metavar="DIR...", help="The adapters that were merged, one or more.", show_default=False
        ),
    ],
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE...",
            help="Texts of each adapter, in their order, or one file for all: .jsonl, or one text "
            "a line. Labels are not read.",
            show_default=False,
        ),
    ],
    output: AdapterOutput,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="M",
            help="Folder or Hub name of the base model. Default: what the adapters name.",
        ),
    ] = None,
    weights: Weights = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="R", help="Rank of the result. Default: that of MERGED."),
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="What is compared: mean over the tokens, last token, tokens; joined by +.",
        ),
    ] = "mean+tokens",
    start: Annotated[
        Start,
        typer.Option(help="Least squares module by module, or MERGED itself."),
    ] = Start.sequential,
    steps: Annotated[int, typer.Option(help="Greatest number of steps.")] = 800,
    batch_size: Annotated[int, typer.Option(help="Texts of each adapter in a step.")] = 8,
    learning_rate: Annotated[
        float,
        typer.Option(help="Length of a step, relative to the adapters' updates."),
    ] = 0.06,
    variation: Annotated[
        float,
        typer.Option(
            help="Share of the training texts that are varied (tokens dropped, texts spliced); 0 "
            "for none.",
        ),
    ] = 0.75,
    held_back: Annotated[
        float,
        typer.Option(
            help="Share, or number from 1, of the texts that decide when to stop; 0 for none.",
        ),
    ] = 0.125,
    evaluate_every: Annotated[
        int, typer.Option(help="Steps between evaluations on them, and between checkpoints.")
    ] = 50,
    patience: Annotated[
        int, typer.Option(help="Evaluations without progress after which to stop.")
    ] = 3,
    texts: Annotated[
        int | None, typer.Option(metavar="N", help="Use only the first N texts of each file.")
    ] = None,
    key: Annotated[str, typer.Option(help="Key of the text in .jsonl files.")] = "text",
    max_tokens: Annotated[int, typer.Option(help="Longer texts are cut.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the order of texts and their variation.")] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the state is kept until the end. Default: OUT.checkpoint.safetensors.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint of an interrupted run.")
    ] = False,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Type of the written tensors. Default: the widest of the inputs."),
    ] = None,
    device: Device = "cpu",
    allow_different_base: DifferentBase = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an existing adapter folder or checkpoint."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Bring a merged adapter's function close to the adapters', on unlabelled texts.

    Gradient descent on the base model: no labels are needed, but the model and some hundred texts
    of each adapter are.
    """
    with session(as_json=as_json, quiet=quiet, debug=debug) as shell, _option_names():
        start_time = time.perf_counter()
        given = None if weights is None else parse_weights("--weights", weights, adapters)
        where = parse_device(device)
        import torch

        from manifold_merge.adapters import Adapter
        from manifold_merge.base_model import load_base_model
        from manifold_merge.examples import read_texts
        from manifold_merge.refine import check_request, refine_adapters

        # All that can be found wrong is, before the model is loaded.
        opened = [Adapter(folder) for folder in (merged, *adapters)]
        state = checkpoint or output.with_name(f"{output.name}.checkpoint.safetensors")
        options: dict[str, Any] = {
            "weights": given, "rank": rank, "features": features, "start": start.value,
            "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate,
            "variation": variation, "held_back": held_back, "evaluate_every": evaluate_every,
            "patience": patience, "max_tokens": max_tokens, "seed": seed,
            "checkpoint": state, "resume": resume, "overwrite": overwrite,
            "allow_different_base": allow_different_base,
        }  # fmt: skip
        check_request(opened[0], opened[1:], output, **options)
        if len(data) not in (1, len(adapters)):
            raise ValueError(
                f"--data: expected one file, or {len(adapters)}, one for each adapter; got "
                f"{len(data)}"
            )
        files = data if len(data) == len(adapters) else data * len(adapters)
        inputs = [read_texts(file, key=key, limit=texts) for file in files]
        name = base_model or opened[1].base_model
        if name is None:
            raise ValueError("the adapters do not name their base model; give --base-model")
        model, tokenizer = load_base_model(name, opened, device=where)
        try:
            with shell.progress("refining", "steps") as progress:
                refined = refine_adapters(
                    opened[0], opened[1:], model, inputs, output, tokenizer=tokenizer,
                    dtype=None if dtype is None else getattr(torch, dtype.value),
                    progress=progress, **options,
                )  # fmt: skip
        except KeyboardInterrupt:
            if state.exists():
                shell.warn(f"the state is kept in {state}; go on with --resume")
            raise
        result = {
            "output": str(refined.output),
            "recipe": refined.recipe,
            "base_model": str(name),
            "before": refined.before,
            "started": refined.started,
            "after": refined.after,
            "steps": refined.steps,
            "best_step": refined.best_step,
            "history": refined.history,
            "seconds": time.perf_counter() - start_time,
        }
        shell.result("refine", result, lambda: _show(shell, result))


def _show(shell: Session, result: dict[str, Any]) -> None:
    recipe = result["recipe"]
    count = len(recipe["adapters"])
    shell.say(
        f"Refined {recipe['merged']} towards {count} adapters of {result['base_model']} on "
        f"{sum(recipe['examples'])} texts"
    )
    rows = {
        name: f"{before:.4f} -> {after:.4f}"
        for name, before, after in zip(
            recipe["adapters"], result["before"], result["after"], strict=True
        )
    }
    rows["mean"] = " -> ".join(f"{sum(result[k]) / count:.4f}" for k in ("before", "after"))
    shell.say("Squared functional distance (0 the same features, 1 as good as a constant)")
    shell.pairs(rows)
    best = f"step {result['best_step']}" if result["best_step"] else "the least-squares start"
    stopped = "" if result["steps"] == recipe["steps"] else ", no progress any more"
    shell.pairs(
        {
            "steps": f"{result['steps']} of {recipe['steps']}{stopped}; the best was {best}",
            "time": f"{result['seconds']:.0f} s",
        }
    )
    shell.line(f"Wrote {result['output']}")


@contextlib.contextmanager
def _option_names() -> Iterator[None]:
    """Let errors name the options of the command line."""
    try:
        yield
    except ValueError as error:

        def option(match: re.Match[str]) -> str:
            return f"--{match[1].replace('_', '-')}"

        text = re.sub(rf"\b({_NAMES})='?([\w.+-]+)'?",
                      lambda m: f"{option(m)} {m[2]}", str(error))  # fmt: skip
        text = re.sub(rf"^({_NAMES})(?=:| must| is )", option, text)
        raise type(error)(text) from error
