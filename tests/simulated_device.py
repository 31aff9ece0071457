"""An accelerator that is not there: CPU tensors that say ``cuda``, or ``mps``, and keep apart.

The arithmetic stays on the CPU, so that results can be compared to the last bit. Without it only a
machine with an accelerator would notice a constant that was made on the CPU, a generator of another
device, a tensor that is handed to numpy, or, on ``mps``, a number in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

# Copies between devices are what these are for, and indices may stay on the CPU.
ACROSS = {"copy_", "__getitem__", "__setitem__"}
TO_HOST = {"numpy", "__array__", "data_ptr", "__dlpack__"}
# A CPU number without dimensions may take part in arithmetic, but not in these.
STRICT = {"cat", "stack", "matmul", "mm", "bmm", "einsum", "hstack", "vstack", "__matmul__"}


class Simulated(Tensor):
    """A tensor that says that it is elsewhere."""

    where = torch.device("cuda", 0)
    device = property(lambda self: self.where)
    is_cuda = property(lambda self: self.where.type == "cuda")
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func}: a tensor on {cls.where} outlived its simulation")


class SimulatedMPS(Simulated):
    """One on a device that has no float64."""

    where = torch.device("mps", 0)


KINDS = {"cuda": Simulated, "mps": SimulatedMPS}


def simulated(x: Any) -> bool:
    """Whether a tensor is on the simulated device."""
    return isinstance(x, Simulated)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


def device_of(x: Tensor) -> torch.device:
    """What ``x.device`` says."""
    return x.where if isinstance(x, Simulated) else CPU


def _placed(result: Any, given: list[Tensor], target: torch.device) -> Any:
    """The result of a function, on its device."""
    if isinstance(result, Tensor):
        if target.type == "mps" and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64: MPS has no float64")
        kept = any(result is x for x in given)
        if kept and device_of(result).type == target.type:
            return result
        # On a real device a transfer makes a new tensor.
        result = result.clone() if kept else result
        return result.as_subclass(KINDS.get(target.type, Tensor))
    if isinstance(result, list | tuple) and not isinstance(result, torch.Size):
        items = [_placed(x, given, target) for x in result]
        return type(result)(*items) if hasattr(result, "_fields") else type(result)(items)
    return result


def _is_device(value: Any) -> bool:
    if isinstance(value, str):
        return value.split(":")[0] in ("cpu", *KINDS)
    return isinstance(value, torch.device)


class SimulatedDevice(TorchFunctionMode):
    """While it is active, ``x.to("cuda")`` and ``device="mps"`` work, and mistakes raise."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("cpu", "cuda"):
            func, name, args, kwargs = torch.Tensor.to, "to", (args[0], name), {}
        given = list(tensors_of([args, kwargs]))
        away = [x for x in given if simulated(x)]
        if name in TO_HOST and away:
            raise TypeError(f"can't convert {away[0].where} device type tensor to numpy ({name})")
        target, args, kwargs = self._target(name, args, kwargs)
        if target is None:
            others = [x for x in given if not simulated(x) and (x.ndim or name in STRICT)]
            if away and others and name not in ACROSS:
                shapes = ", ".join(str(tuple(x.shape)) for x in others)
                raise RuntimeError(f"{name}: tensors on {away[0].where}, and on the CPU ({shapes})")
            target = device_of(args[0] if name in ACROSS else away[0]) if away else CPU
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != target.type:
            raise RuntimeError(f"{name}: generator on {generator.device}, tensor on {target}")
        with torch._C.DisableTorchFunctionSubclass():
            return _placed(func(*args, **kwargs), given, target)

    def _target(self, name: str, args: Any, kwargs: Any) -> Any:
        """Where the result is asked to be, and the arguments as the CPU needs them."""
        target = None
        if kwargs.get("device") is not None:
            target, kwargs["device"] = torch.device(kwargs["device"]), CPU
        elif name == "to":
            args = list(args)
            for i, item in enumerate(args[1:], 1):
                if _is_device(item):
                    target, args[i] = torch.device(item), CPU
                elif isinstance(item, Tensor):
                    target = device_of(item)
        return target, tuple(args), kwargs


class SimulatedGenerator(torch.Generator):
    """A source of random numbers that keeps to its device."""

    def __new__(cls, device: Any = "cpu") -> SimulatedGenerator:
        made = super().__new__(cls)
        made.__dict__["_device"] = torch.device(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()

    @property
    def device(self) -> torch.device:
        """Where its numbers go."""
        found: torch.device = self.__dict__["_device"]
        return found


def open_scripts(monkeypatch: Any) -> None:
    """Let the device through geoopt's compiled functions, which no mode sees into."""
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "geoopt"]:
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.jit.ScriptFunction):
                monkeypatch.setattr(module, name, _opened(value))


def _opened(script: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        given = list(tensors_of([args, kwargs]))
        target = next((device_of(x) for x in given if simulated(x)), CPU)
        with torch._C.DisableTorchFunctionSubclass():
            return _placed(script(*args, **kwargs), given, target)

    return call
