"""Load the base model of adapters with the class whose modules they name."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from manifold_merge.adapters import Adapter

__all__ = ["load_base_model"]

logger = logging.getLogger(__name__)

# Tried in this order where neither the adapters nor the model name a class that fits.
_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForMaskedLM",
    "AutoModelForTokenClassification",
)


def load_base_model(
    name: str | os.PathLike[str],
    adapters: Sequence[Adapter],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[nn.Module, Any]:
    """Load a transformers model and its tokenizer.

    The names of modules depend on the class: ``layers.0`` of a bare model is ``model.layers.0`` of
    one with a language head. The class is found without reading weights.

    Args:
        name: Folder, or name on the Hub.
        adapters: Adapters of this model.
        device: Where to put the model.
        dtype: Type of its weights. Default: float32 on the CPU, elsewhere the stored one.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ImportError: transformers is not installed.
        OSError: There is no such model.
        ValueError: The folder holds no model that transformers knows, or no class of it has the
            modules that the adapters name.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "a base model is loaded with transformers; pip install 'manifold-merge[peft]'"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except ValueError as error:
        raise ValueError(
            f"base model {str(name)!r} cannot be loaded ({str(error).splitlines()[0]}); give a "
            "folder in which transformers saved a model"
        ) from error
    wanted = sorted({module for adapter in adapters for module in adapter.modules})
    tried: list[str] = []
    for cls in _candidates(transformers, config, adapters):
        with torch.device("meta"):
            try:
                skeleton = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
            except (
                AttributeError,
                TypeError,
                ValueError,
            ):  # this class does not exist for this architecture
                continue
        found = dict(skeleton.named_modules())
        missing = [module for module in wanted if module not in found]
        if missing:
            tried.append(f"{type(skeleton).__name__} has no {missing[0]!r}")
            continue
        logger.info("base model %s as %s", name, type(skeleton).__name__)
        device = torch.device(device)
        stored = torch.float32 if device.type == "cpu" else "auto"
        with _no_bar(transformers.utils.logging):
            model: nn.Module = cls.from_pretrained(name, dtype=dtype or stored)
        return model.to(device).eval(), transformers.AutoTokenizer.from_pretrained(name)
    raise ValueError(
        f"base model {name} does not have the modules of the adapters ({'; '.join(tried)}); give "
        "the model that they were trained on"
    )


@contextlib.contextmanager
def _no_bar(logs: Any) -> Iterator[None]:
    """Progress bars are the command line's."""
    shown = logs.is_progress_bar_enabled()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logs.enable_progress_bar()


def _candidates(transformers: Any, config: Any, adapters: Sequence[Adapter]) -> Iterator[Any]:
    names = [(a.config.get("auto_mapping") or {}).get("base_model_class") for a in adapters]
    names += [*(getattr(config, "architectures", None) or []), *_CLASSES]
    for name in dict.fromkeys(names):
        cls = getattr(transformers, name, None) if name else None
        if cls is not None:
            yield cls
