"""The symmetry of the network whose weights a checkpoint holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_merge.checkpoints import CONFIG_NAME, Checkpoint, CheckpointError
from manifold_merge.symmetry import NetworkSymmetry
from manifold_merge.symmetry_derive import symmetry_of

__all__ = ["checkpoint_symmetry", "read_state"]

_TOKENS, _EXAMPLES = 7, 2
_REMEDY = "derive it with symmetry_of(model, inputs) and pass symmetry="


def checkpoint_symmetry(checkpoint: Checkpoint) -> NetworkSymmetry:
    """Derive and prove the symmetry of a Hugging Face model from its configuration alone.

    Args:
        checkpoint: A folder whose ``config.json`` names a class of transformers.

    Raises:
        ImportError: transformers is not installed.
        CheckpointError: There is no such class, its parameters have other names than the
            checkpoint's tensors, or it takes inputs of another kind than tokens or pixels.
        SymmetryError: See :func:`~manifold_merge.symmetry_of`.
    """
    config_file = checkpoint.folder / CONFIG_NAME
    if not checkpoint.config.get("model_type"):
        raise CheckpointError(
            f"{config_file} does not say what the network is (model_type); {_REMEDY}"
        )
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "the network is built with transformers; pip install 'manifold-merge[peft]', or "
            f"{_REMEDY}"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(str(checkpoint.folder))
    except ValueError as error:
        raise CheckpointError(f"{config_file}: {str(error).splitlines()[0]}; {_REMEDY}") from error
    names = checkpoint.config.get("architectures") or []
    cls = next((getattr(transformers, x) for x in names if hasattr(transformers, x)), None)
    with _kept_random_state():
        model = transformers.AutoModel.from_config(config) if cls is None else cls(config)
        inputs = _inputs(config, config_file)
    model = model.float().eval()
    absent = sorted(set(checkpoint.tensors) - set(model.state_dict()))
    if absent:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {absent[0]!r} is no parameter of {type(model).__name__}; "
            f"{_REMEDY}"
        )
    # Caches and attention maps are outputs too, but their heads may come in any order.
    return symmetry_of(model, output=_first, **inputs)


def read_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors in memory, real ones at least in float32.

    Raises:
        CheckpointError: A tensor holds NaN or infinity.
    """
    state = {}
    for name, entry in checkpoint.tensors.items():
        stored = checkpoint.read(name)
        kind = stored.dtype
        if entry.dtype.is_floating_point:
            kind = torch.promote_types(kind, torch.float32) if kind.itemsize > 1 else torch.float32
        state[name] = stored.to(kind, copy=True)
        checkpoint.check_finite(name, state[name])
    return state


def _first(result: Any) -> Any:
    return result[0]


def _inputs(config: Any, file: Path) -> dict[str, Any]:
    text = getattr(config, "vocab_size", None)
    if text:
        tokens = torch.randint(text, (_EXAMPLES, _TOKENS))
        both = {"input_ids": tokens}
        if getattr(config, "is_encoder_decoder", False):
            both["decoder_input_ids"] = tokens.flip(1)
        return both
    size = getattr(config, "image_size", None)
    if size:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(_EXAMPLES, channels, height, width)}
    raise CheckpointError(
        f"{file} names neither vocab_size nor image_size, so example inputs cannot be made; "
        f"{_REMEDY}"
    )


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
