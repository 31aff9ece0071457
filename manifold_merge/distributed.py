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

__all__ = ["in_turn", "process_group", "rank", "wait_for_all", "world_size"]

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
