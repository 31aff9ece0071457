"""What the keys of a PEFT ``adapter_config.json`` mean for the tensors beside it.

A configuration is accepted only if it says that the model computes ``base + scaling * B @ A`` with
the unchanged base model. Every key is either known not to matter, or refused with a reason and a
remedy, or unknown and then refused as soon as it is set. The keys are those of ``LoraConfig`` in
PEFT 0.21 (https://github.com/huggingface/peft).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["CONFIG_NAME", "KNOWN_KEYS", "AdapterError", "pattern_value", "read_config"]

CONFIG_NAME = "adapter_config.json"

# Keys that are read here, or that never change what the stored factors mean: they say how the
# adapter was trained or initialised, or which modules PEFT looks for. VeLoRA belongs to the latter:
# it replaces a backward pass only.
KNOWN_KEYS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
        "velora_config",
    }
)

_RETRAIN = "train the adapter again without it"
_EXTRACT = (
    "merge the adapter into its base model with PEFT (merge_and_unload), and extract a plain LoRA "
    "adapter from the difference of the weights"
)
# Keys that, when set, make the model compute something else than base + scaling * B @ A.
_REFUSED_KEYS: Mapping[str, tuple[str, str]] = {
    "use_dora": ("DoRA also rescales the base weights column by column", _EXTRACT),
    "use_qalora": ("QALoRA pools the input of each module in groups", _RETRAIN),
    "use_bdlora": ("BD-LoRA stores block-diagonal factors in a packed form", _RETRAIN),
    "alora_invocation_tokens": ("aLoRA acts only after its invocation tokens", _RETRAIN),
    "arrow_config": ("Arrow routes each token to other adapters", "merge the routed adapters"),
    "kasa_config": ("KaSA truncates the base weights and inserts a diagonal", _RETRAIN),
    "monteclora_config": ("MonteCLoRA adds random samples to the factors", _RETRAIN),
    "layer_replication": ("the adapter belongs to a base model with repeated layers", _RETRAIN),
    "megatron_config": ("Megatron's parallel layers hold shards of the factors", _EXTRACT),
    "target_parameters": ("stacked expert parameters have one factor pair each", _RETRAIN),
    "trainable_token_indices": ("single rows of the embedding are replaced", _RETRAIN),
    "ensure_weight_tying": (
        "PEFT makes the factors of tied layers share memory, which no merge of the layers keeps",
        "train the adapter again with ensure_weight_tying=False",
    ),
}

# Initialisations after which base + 0 is still the model that was trained from. The others (pissa,
# olora, corda, loftq, lora_ga) also subtract the initial B @ A from, or quantise, the base weights.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")


class AdapterError(ValueError):
    """An adapter folder cannot be read, merged or written as asked; the message has the remedy."""


def read_config(file: Path, ignored: frozenset[str]) -> dict[str, Any]:
    """Read and check the configuration; ``file`` names it in errors."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(
            f"{file} is not valid JSON ({error}); save or download it again"
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file} holds a {type(config).__name__}, expected a JSON object")

    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{file}: peft_type is {config.get('peft_type')!r}, expected 'LORA'; many other PEFT "
            "methods can be approximated by LoRA with peft.save_as_lora"
        )
    for key, value in config.items():
        if not value or key in KNOWN_KEYS or key in ignored:
            continue
        if key in _REFUSED_KEYS:
            reason, remedy = _REFUSED_KEYS[key]
            raise AdapterError(
                f"{file}: {key}={value!r} is not supported, because {reason}; {remedy}"
            )
        raise AdapterError(
            f"{file}: unknown key {key!r} with value {value!r}, which may change what the tensors "
            "mean; if it does not, remove it from the file or list it in ignore_config_keys"
        )
    _check_initialisation(file, config.get("init_lora_weights", True))

    for key in ("use_rslora", "lora_bias", "fan_in_fan_out"):
        if config.get(key) not in (None, False, True):
            raise AdapterError(f"{file}: {key} is {config[key]!r}, expected true or false")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise AdapterError(f"{file}: {key} is {config[key]!r}, expected an object")
        for pattern in config.get(key) or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise AdapterError(
                    f"{file}: {key} has the key {pattern!r}, which is no regular expression "
                    f"({error}); correct it"
                ) from error
    numbers = {"r": config.get("r", 8), "lora_alpha": config.get("lora_alpha", 8)}
    numbers |= {f"rank_pattern[{k!r}]": v for k, v in (config.get("rank_pattern") or {}).items()}
    numbers |= {f"alpha_pattern[{k!r}]": v for k, v in (config.get("alpha_pattern") or {}).items()}
    for key, value in numbers.items():
        is_rank = key == "r" or key.startswith("rank_pattern")
        number = isinstance(value, int if is_rank else (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or (is_rank and value < 1):
            expected = "a positive integer" if is_rank else "a finite number"
            raise AdapterError(f"{file}: {key} is {value!r}, expected {expected}; correct it")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise AdapterError(f"{file}: modules_to_save is {saved!r}, expected a list of names")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise AdapterError(
            f"{file}: bias is {config['bias']!r}, expected 'none', 'all' or 'lora_only'"
        )
    return config


def _check_initialisation(file: Path, init: Any) -> None:
    if init is None or isinstance(init, bool) or str(init).lower() in _PLAIN_INITS:
        return
    remedy = "train the adapter again with a plain initialisation"
    if str(init).lower().startswith(_CONVERTIBLE_INITS):
        remedy = (
            "save the trained adapter again from PEFT with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=<the adapter as initialised>), which "
            "converts it to plain LoRA"
        )
    raise AdapterError(
        f"{file}: init_lora_weights={init!r} is not supported, because this initialisation also "
        f"changes the base weights and the adapter fits only the changed ones; {remedy}"
    )


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Look a module up in ``rank_pattern`` or ``alpha_pattern`` as PEFT's ``get_pattern_key``."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
