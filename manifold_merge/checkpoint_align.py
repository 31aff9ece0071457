"""Rebase one checkpoint onto another: the same function, in the other's order and bases."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from manifold_merge._version import __version__
from manifold_merge.checkpoint_symmetry import checkpoint_symmetry, read_state
from manifold_merge.checkpoint_writer import CheckpointWriter
from manifold_merge.checkpoints import Checkpoint, check_same_architecture
from manifold_merge.network_align import align, chosen_gauges
from manifold_merge.symmetry import NetworkSymmetry

__all__ = ["ModelAlignment", "align_models"]

Path_ = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class ModelAlignment:
    """What aligning one checkpoint to another produced.

    Attributes:
        output: The folder that was written: the function of the model, aligned.
        recipe: All options.
        distance_before: Distance of the parameters before.
        distance_after: The same for the result.
        moved: How many elements have another place.
        elements: How many elements there are, in all permuted sets.
    """

    output: Path
    recipe: dict[str, Any]
    distance_before: float
    distance_after: float
    moved: int
    elements: int


def align_models(
    model: Path_ | Checkpoint,
    to: Path_ | Checkpoint,
    output: Path_,
    *,
    symmetry: NetworkSymmetry | None = None,
    method: str = "anneal",
    rescale: bool | Literal["auto"] = "auto",
    basis: bool | Literal["auto"] = "auto",
    starts: int = 1,
    seed: int = 0,
    allow_different_config: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ModelAlignment:
    """Rebase a model to bring it as close as possible to another one, by symmetries alone.

    Units, heads and experts are reordered; scales of ReLU units and bases inside heads are brought
    to those of the other. The written model computes what ``model`` computes. Averages
    of it with ``to``, by any tool, then mean something.

    Args:
        model: The checkpoint that is reordered, a folder or an opened one.
        to: The checkpoint that stays as it is.
        output: Folder to write.
        symmetry: The symmetry of the network; by default it is derived, with transformers, from
            the class that ``config.json`` names, and proved.
        method: See :func:`~manifold_merge.align`.
        rescale: Bring positive scales of ReLU units to those of ``to`` as well; ``"auto"``: where
            there are any, but not those of a norm's gains.
        basis: Bring the bases inside attention heads to those of ``to`` as well; ``"auto"``: where
            there are any.
        starts: Starts of the matching; the closest result wins.
        seed: Seed of the starts.
        allow_different_config: Accept configurations that differ in what a model computes.
        overwrite: Replace an existing folder that holds nothing but a model.
        progress: Called with the number of entries written and in all.

    Returns:
        The folder, and distances before and after.

    Raises:
        FileNotFoundError: A folder or shard is missing.
        CheckpointError: A checkpoint is damaged, or the two do not fit.
        SymmetryError: The symmetry of the network could not be proved.
        FileExistsError: The output exists; pass ``overwrite=True``.

    Source: Ainsworth, Hayase and Srinivasa, *Git Re-Basin*, arXiv:2209.04836.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file, save_file
        >>> from manifold_merge import symmetry_of
        >>> network = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> symmetry = symmetry_of(network, torch.randn(5, 3))
        >>> state = network.state_dict()
        >>> root = Path(tempfile.mkdtemp())
        >>> save_file(state, root / "a.safetensors")
        >>> save_file(symmetry.permute(state, {"0": torch.randperm(8)}), root / "b.safetensors")
        >>> found = align_models(
        ...     root / "b.safetensors", root / "a.safetensors", root / "out", symmetry=symmetry)
        >>> back = load_file(found.output / "model.safetensors")
        >>> all(torch.equal(back[name], state[name]) for name in state)
        True
    """
    moving, fixed = (x if isinstance(x, Checkpoint) else Checkpoint(x) for x in (model, to))
    check_same_architecture([moving, fixed], allow_different_config=allow_different_config)
    writer = CheckpointWriter(output, moving, [moving, fixed], overwrite=overwrite)
    symmetry = checkpoint_symmetry(moving) if symmetry is None else symmetry
    states = [read_state(x) for x in (moving, fixed)]
    found = align(
        states[0], states[1], symmetry, method=method, rescale=rescale, basis=basis, starts=starts,
        seed=seed,
    )  # fmt: skip
    recipe = {
        "manifold_merge": __version__,
        "model": moving.path.resolve().name,
        "to": fixed.path.resolve().name,
        "method": method,
        "rescale": rescale,
        "basis": basis,
        "starts": starts,
        "seed": seed,
    }
    files = [str(moving.path.resolve()), str(fixed.path.resolve())]
    prints = [moving.fingerprint(), fixed.fingerprint()]
    text = json.dumps([recipe, files, prints, symmetry.to_dict()])
    writer.write(
        lambda entry: [found.state[entry.name].reshape(-1)],
        f"# {recipe['model']}, aligned to {recipe['to']}\n\nThe same function in other "
        f"numbers: {_what_changed(symmetry, rescale, basis)}; made with manifold-merge "
        f"{__version__}.\n\n```json\n"
        f"{json.dumps(recipe, indent=2)}\n```\n",
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        progress=progress,
    )
    orders = found.permutations.values()
    return ModelAlignment(
        output=writer.path,
        recipe=recipe,
        distance_before=found.distance_before,
        distance_after=found.distance_after,
        moved=sum(int((order != torch.arange(len(order))).sum()) for order in orders),
        elements=sum(len(order) for order in orders),
    )


def _what_changed(symmetry: NetworkSymmetry, rescale: bool | str, basis: bool | str) -> str:
    scales, bases = chosen_gauges(symmetry, rescale, basis, fisher=False, name="rescale")
    changes = ["units in another order"]
    changes += ["positive scales of units"] if scales else []
    changes += ["bases inside heads"] if bases else []
    return ", ".join(changes)
