"""A merge spread over processes: each does its share, the first one writes.

Start the command line, or a script that calls ``merge_adapters`` or ``merge_models``, with
torchrun::

    torchrun --nproc-per-node 2 -m manifold_merge adapters law code --output merged

Pieces of work (chunks of modules, shards of a checkpoint) are dealt out in turn. A piece is
computed by the same operations whoever does it, so that the result is that of one process, bit for
bit.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

__all__ = ["Team", "from_first", "in_turn", "process_group", "rank", "wait_for_all", "world_size"]

logger = logging.getLogger(__name__)

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return torch.distributed.get_rank() if _active() else 0


def world_size() -> int:
    """How many processes share the work, 1 without a process group."""
    return torch.distributed.get_world_size() if _active() else 1


def _active() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; leave them at the end.

    A process group that exists already is used as it is.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or _active() or "RANK" not in os.environ:
        yield
        return
    # Results travel through the memory of the host, whatever device they were computed on.
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def in_turn(
    pieces: Iterable[Piece], work: Callable[[Piece], Result]
) -> Iterator[tuple[Piece, Result]]:
    """Results of all pieces in order on the first process; nothing on the others, which compute.

    Args:
        pieces: The same on each process, in the same order.
        work: Computes the result of one piece, an object that can be pickled.

    Raises:
        RuntimeError: Another process ended before it had done its share.

    Example:
        >>> list(in_turn([1, 2, 3], lambda x: x * x))
        [(1, 1), (2, 4), (3, 9)]
    """
    own, count = rank(), world_size()
    for number, piece in enumerate(pieces):
        owner = number % count
        if owner == own:
            result = work(piece)
            if own:
                _talk(lambda: torch.distributed.send_object_list([result], dst=0), 0)  # noqa: B023
        if own:
            continue
        if owner:
            received: list[Any] = [None]
            _talk(lambda: torch.distributed.recv_object_list(received, src=owner), owner)  # noqa: B023
            result = received[0]
        yield piece, result


def from_first(value: Result) -> Result:
    """What the first process passes, on every process: an object that can be pickled.

    Raises:
        RuntimeError: Another process ended before.

    Example:
        >>> from_first(16)
        16
    """
    if world_size() == 1:
        return value
    sent: list[Any] = [value]
    _talk(lambda: torch.distributed.broadcast_object_list(sent, src=0), 0)
    result: Result = sent[0]
    return result


def wait_for_all() -> None:
    """Return when every process has come here.

    Raises:
        RuntimeError: Another process ended before.
    """
    if world_size() > 1:
        _talk(torch.distributed.barrier, None)


def _talk(exchange: Callable[[], Any], other: int | None) -> None:
    try:
        exchange()
    except RuntimeError as error:
        who = "another process" if other is None else f"process {other}"
        raise RuntimeError(
            f"{who} of {world_size()} ended before it had done its share; see its error above, or "
            f"whether it ran out of memory ({str(error).splitlines()[0][:120]})"
        ) from error


class Team:
    """What the processes of one ``torch.distributed`` group tell each other, and their failures.

    Tensors travel over the device that the backend serves, in their own type. All methods are
    collective: each process calls them in the same order.

    Args:
        group: A process group that this process belongs to.

    Attributes:
        size: Number of processes.
        rank: Number of this process within the group.
        names: Number of each process among all processes, as torchrun counts them.

    Raises:
        ValueError: This is no process group, or this process is not in it.
    """

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        if not isinstance(group, torch.distributed.ProcessGroup):
            raise ValueError(
                f"process_group: expected a torch.distributed.ProcessGroup, got {group!r}; call "
                "init_process_group and pass torch.distributed.group.WORLD, and call this in the "
                "processes of the group only"
            )
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self.names = torch.distributed.get_process_group_ranks(group)
        on_gpu = torch.distributed.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None
        self._failure: Exception | None = None

    def agree(self, work: Callable[[], Result]) -> Result:
        """Do something here that may fail; if it fails anywhere, raise in every process.

        Args:
            work: What each process does on its own.

        Returns:
            The result of this process.

        Raises:
            ValueError: Or whatever the first process that failed raised, with its number.
        """
        result: Any = None
        try:
            result = work()
        except Exception as error:  # whatever it is, the others have to hear of it
            self._failure = error
        self._raise_failures()
        return result

    def same(self, options: dict[str, Any]) -> None:
        """Raise in every process unless all have passed the same options.

        Args:
            options: Name of an argument to a value that can be compared and pickled.

        Raises:
            ValueError: Names two processes, the argument and both values.
        """
        everyone = self.collect(options)
        for name in options:
            for other, number in zip(everyone, self.names, strict=True):
                if other[name] != everyone[0][name]:
                    raise ValueError(
                        f"{name}: process {number} has {other[name]!r}, process {self.names[0]} "
                        f"has {everyone[0][name]!r}; pass the same in every process of the group"
                    )

    def collect(self, own: Any) -> list[Any]:
        """What each process has, in order: any object that can be pickled."""
        found: list[Any] = [None] * self.size
        _talk(lambda: torch.distributed.all_gather_object(found, own, group=self.group), None)
        return found

    @contextlib.contextmanager
    def may_fail(self) -> Iterator[None]:
        """Hold back an error until the next :meth:`total` or :meth:`greatest`, where all raise."""
        try:
            yield
        except Exception as error:
            self._failure = error

    def total(self, *tensors: Tensor) -> list[Tensor]:
        """Sums over the processes, of the shapes and types given, in one exchange.

        Raises:
            ValueError: Or what was held back by :meth:`may_fail` in some process.
        """
        packed = self._reduced(tensors, torch.distributed.ReduceOp.SUM)
        parts = packed.split([x.numel() for x in tensors])
        return [p.reshape(x.shape).to(x) for p, x in zip(parts, tensors, strict=True)]

    def greatest(self, tensor: Tensor) -> Tensor:
        """Entry-wise maximum over the processes, of the shape given.

        Raises:
            ValueError: Or what was held back by :meth:`may_fail` in some process.
        """
        packed = self._reduced((tensor,), torch.distributed.ReduceOp.MAX)
        return packed.reshape(tensor.shape).to(tensor)

    def _reduced(self, tensors: tuple[Tensor, ...], operation: Any) -> Tensor:
        kind = tensors[0].dtype
        for x in tensors:
            kind = torch.promote_types(kind, x.dtype)
        flag = torch.full((1,), self._failure is not None)
        flat = [x.reshape(-1).to(self._device or "cpu", kind) for x in (*tensors, flag)]
        packed = torch.cat(flat)
        _talk(lambda: torch.distributed.all_reduce(packed, operation, group=self.group), None)
        if bool(packed[-1]):
            self._raise_failures()
        return packed[:-1]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of one process of the group, of the same shape and type everywhere."""
        sent = tensor.detach().to(self._device or "cpu").contiguous()
        sent = sent.clone() if sent.data_ptr() == tensor.data_ptr() else sent
        number = self.names[source]
        _talk(lambda: torch.distributed.broadcast(sent, number, group=self.group), number)
        return sent.to(tensor.device)

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """The tensors of all processes, in order, on the first of the group; else ``None``."""
        sent = tensor.to(self._device or "cpu").contiguous()
        found = [torch.empty_like(sent) for _ in self.names] if self.rank == 0 else None
        first = self.names[0]
        _talk(lambda: torch.distributed.gather(sent, found, first, group=self.group), None)
        return None if found is None else [x.to(tensor.device) for x in found]

    def _raise_failures(self) -> None:
        own, self._failure = self._failure, None
        told = self.collect(None if own is None else (_kind_of(own), str(own)))
        failed = [i for i, x in enumerate(told) if x is not None]
        if not failed:
            return
        kind, text = told[failed[0]]
        also = [self.names[i] for i in failed[1:]]
        more = f" (also process {', '.join(map(str, also))})" if also else ""
        raise kind(f"process {self.names[failed[0]]} of {self.size}: {text}{more}") from own


def _kind_of(error: Exception) -> type[Exception]:
    """The closest error that takes one text, so that it can be raised elsewhere."""
    for kind in (NotImplementedError, ValueError, TypeError):
        if isinstance(error, kind):
            return kind
    return RuntimeError
