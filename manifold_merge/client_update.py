"""What one client of a federated round sent, read as an adapter that is in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from manifold_merge.adapters import Adapter, AdapterModule, ExtraTensor
from manifold_merge.lora_log import balance

__all__ = ["ClientUpdate", "UpdateError"]

Pairs = Sequence[tuple[str, str]]
Scaling = Callable[[int], float]

# PEFT's names with and without that of the adapter, and those of models that hold bare factors.
_FACTOR = re.compile(r"(.*?)lora_(embedding_)?([AB])(\..+)?")
_BIAS = re.compile(r".*lora_B(\..+)?\.bias")
# Beyond this, squared products of two factors leave the range of float64.
_GREATEST = 1e60
# Singular values below this fraction of the greatest are rounding.
_NO_RANK = 1e-13


class UpdateError(ValueError):
    """What a client sent cannot be averaged; the message names the client and the tensor."""


class ClientUpdate(Adapter):
    """The tensors of one client, in float64, in place of an adapter folder.

    Args:
        name: What to call the client in messages.
        tensors: Tensors or NumPy arrays by name: factors B ``(m, r)`` and A ``(r, n)``, or with
            the kernel dimensions of a convolution, and any other trained tensors.
        pairs: Names of (B, A) of each pair; found by ``lora_B`` and ``lora_A`` if ``None``.
        scaling: Function from the rank of a pair to the factor s of the model's s B A; 1 if
            ``None``.

    Attributes:
        name: The client's name.

    Raises:
        UpdateError: A factor has no partner or a shape that does not fit it, or a tensor holds
            NaN or infinite values.

    Example:
        >>> import torch
        >>> update = ClientUpdate("node 7", {"q.lora_A": torch.ones(1, 3),
        ...                                  "q.lora_B": torch.ones(2, 1), "head": torch.ones(4)})
        >>> update.pair_names, list(update.extras)
        ([('q.lora_B', 'q.lora_A')], ['head'])
        >>> ClientUpdate("node 7", {"q.lora_A": torch.ones(1, 3)})
        Traceback (most recent call last):
        manifold_merge.client_update.UpdateError: node 7: 'q.lora_A' has no partner 'q.lora_B'...
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Any],
        pairs: Pairs | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        self.name = name
        self.path = Path(name)  # what a merge calls an adapter in its messages
        self.config = MappingProxyType({})
        self._finite: set[str] = set()
        given = {key: torch.as_tensor(value).detach() for key, value in tensors.items()}
        self._dtypes = {key: x.dtype for key, x in given.items()}
        self._shapes = {key: tuple(x.shape) for key, x in given.items()}
        self._tensors = {key: self._checked(key, x) for key, x in given.items()}
        self.pair_names = self._found_pairs() if pairs is None else list(pairs)
        if not self.pair_names:
            raise UpdateError(
                f"{name}: no names with lora_B and lora_A among {_some(given)}; give the names of "
                "the factors as pairs=[(B, A), ...]"
            )
        modules = {b: self._parsed(b, a, scaling) for b, a in self.pair_names}
        factors = {key for pair in self.pair_names for key in pair}
        self._keys = {
            stored: own
            for module, pair in zip(modules.values(), self.pair_names, strict=True)
            for stored, own in zip(module.factor_keys, pair, strict=True)
        }
        self.modules = MappingProxyType(dict(sorted(modules.items())))
        extras = sorted(self._tensors.keys() - factors)
        for key in extras:
            if scaling is not None and _BIAS.fullmatch(key):
                raise ValueError(
                    f"scaling: {key!r} is scaled as its factors are, which is not supported; train "
                    "without lora_bias, or give all clients one scaling and leave it out here"
                )
        self.extras = MappingProxyType(
            {
                key: ExtraTensor(
                    key, "modules_to_save", self.shape(key) or (1,), torch.float64, key
                )
                for key in extras
            }
        )

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor as it came."""
        return self._shapes[key]

    def check_fits(self, other: ClientUpdate) -> None:
        """Check that both hold the same tensors, of the same shapes up to the ranks.

        Raises:
            UpdateError: Names the client, the tensor and what was expected.
        """
        missing, unknown = (
            other._tensors.keys() - self._tensors.keys(),
            self._tensors.keys() - other._tensors.keys(),
        )
        if missing:
            raise UpdateError(
                f"{self.name}: {_some(missing)} missing; a client sends every tensor that it was "
                f"sent, under the same name, as {other.name} has it"
            )
        if unknown:
            raise UpdateError(
                f"{self.name}: {_some(unknown)} unknown to {other.name}; send the trained tensors "
                "only, under the names that the server gave them"
            )
        for b, a in self.pair_names:
            for key, mine, theirs in (
                (b, self._without_rank(b, 1), other._without_rank(b, 1)),
                (a, self._without_rank(a, 0), other._without_rank(a, 0)),
            ):
                if mine != theirs:
                    raise UpdateError(
                        f"{self.name}: {key!r} has shape {self.shape(key)}, but {other.shape(key)} "
                        f"in {other.name}; only ranks may differ"
                    )
        for key in self.extras:
            if self.shape(key) != other.shape(key):
                raise UpdateError(
                    f"{self.name}: {key!r} has shape {self.shape(key)}, but {other.shape(key)} in "
                    f"{other.name}; clients train tensors of one shape"
                )

    def named_like(
        self,
        modules: Mapping[str, tuple[Tensor, Tensor]],
        extras: Mapping[str, Tensor],
        scaling: Scaling | None,
    ) -> dict[str, Tensor]:
        """Merged factors and other tensors under the names, in the types and layouts of this one.

        Args:
            modules: B ``(m, R)`` and A ``(R, n)`` by the name of B, s B A being the update.
            extras: Other tensors by name.
            scaling: Function from a rank to s.

        Raises:
            UpdateError: A value is too large for its type.
        """
        found: dict[str, Tensor] = {}
        for key_b, key_a in self.pair_names:
            b, a = modules[key_b]
            rank = b.shape[1]
            (b, a_transposed), _, _ = balance((b, a.mT))
            root = 1.0 if scaling is None else scaling(rank) ** -0.5
            b, a = root * b, root * a_transposed.mT
            # Zero rows of A beside zero columns of B would never learn: such directions get rows of
            # A as they were, as before training, where B = 0.
            sizes = b.square().sum(0)
            idle = (sizes <= _NO_RANK * sizes.max()).nonzero()[:, 0]
            idle = idle[idle < self.modules[key_b].rank]
            b[:, idle], a[idle] = 0.0, self._tensors[key_a].flatten(1)[idle]
            found[key_b] = b.reshape(*b.shape, *self.shape(key_b)[2:])
            found[key_a] = a.reshape(rank, *self.shape(key_a)[1:])
        found |= {key: x.reshape(self.shape(key)) for key, x in extras.items()}
        return {key: _cast(key, found[key], dtype) for key, dtype in self._dtypes.items()}

    # --- hooks -----------------------------------------------------------------------------------

    def _get(self, key: str) -> Tensor:
        return self._tensors[self._keys.get(key, key)]

    def release(self) -> None:
        """Nothing is mapped, nothing to let go of."""

    def _checked(self, key: str, x: Tensor) -> Tensor:
        if x.is_complex():
            raise UpdateError(f"{self.name}: {key!r} is {x.dtype}; only real tensors have a mean")
        x = x.to("cpu", torch.float64).reshape(x.shape or (1,))
        if x.numel() and not bool((x.abs() <= _GREATEST).all()):
            raise UpdateError(
                f"{self.name}: {key!r} holds NaN or infinite values; its training diverged: leave "
                "this client out (invalid='drop'), or lower its learning rate"
            )
        return x

    def _found_pairs(self) -> list[tuple[str, str]]:
        found = []
        for key in sorted(self._tensors):
            match = _FACTOR.fullmatch(key)
            if not match or _BIAS.fullmatch(key):
                continue
            stem, form, side, end = match[1], match[2] or "", match[3], match[4] or ""
            partner = f"{stem}lora_{form}{'A' if side == 'B' else 'B'}{end}"
            if partner not in self._tensors:
                raise UpdateError(
                    f"{self.name}: {key!r} has no partner {partner!r}; send both factors, or name "
                    "the pairs as pairs=[(B, A), ...]"
                )
            if side == "B":
                found.append((key, partner))
        return found

    def _parsed(self, key_b: str, key_a: str, scaling: Scaling | None) -> AdapterModule:
        for key in (key_b, key_a):
            if key not in self._tensors:
                raise UpdateError(f"{self.name}: {key!r} missing, a factor that pairs= names")
        b, a = self._tensors[key_b], self._tensors[key_a]
        fits = b.ndim >= 2 and a.ndim >= 2 and b.shape[1] == a.shape[0] and b.shape[1] > 0
        if not fits or b.numel() != b.shape[0] * b.shape[1]:
            raise UpdateError(
                f"{self.name}: {key_b!r} has shape {tuple(b.shape)} and {key_a!r} "
                f"{tuple(a.shape)}; expected (m, r) and (r, n) of one rank r"
            )
        rank = b.shape[1]
        return AdapterModule(
            name=key_b, kind="linear", out_features=b.shape[0], in_features=a[0].numel(),
            rank=rank, scaling=1.0 if scaling is None else float(scaling(rank)),
            dtype=torch.float64,
        )  # fmt: skip

    def _without_rank(self, key: str, axis: int) -> tuple[int, ...]:
        shape = self.shape(key)
        return shape[:axis] + shape[axis + 1 :]


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(map(repr, listed[:3])) + more if listed else "nothing"


def _cast(key: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point:
        x = x.round()
    limit = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if x.numel() and float(x.abs().max()) > limit.max:
        raise UpdateError(
            f"mean: {key!r} does not fit into {dtype}, because a client sent huge values; leave "
            "that client out, or take the median (p=1)"
        )
    return x.to(dtype).contiguous()
