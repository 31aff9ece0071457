"""Write a folder completely or not at all.

The files are written into a hidden sibling of the output, flushed to disk, and put in place by one
rename, so that neither an error nor a kill leaves half a folder behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no file locks of this kind
    fcntl = None  # type: ignore[assignment]

__all__ = ["atomic_folder", "check_output_folder", "resumable_folder", "unfinished_folder"]

_PARTIAL = ".manifold-merge-partial-"
_FINGERPRINT = "fingerprint"
_ABANDONED_AFTER = 60.0  # seconds


def check_output_folder(
    output: str | os.PathLike[str], *, replaceable: Collection[str], overwrite: bool = False
) -> Path:
    """Check, before any work, that a folder can be written.

    Args:
        output: The folder to write. It may be missing or empty.
        replaceable: File names that an existing folder may hold to be overwritten. Anything else in
            it was not written by us and is never deleted.
        overwrite: Whether to replace an existing folder.

    Returns:
        The absolute path, symbolic links resolved.

    Raises:
        FileExistsError: The output exists and cannot be replaced; says why and what to do.
        PermissionError: The parent folder is not writable.
    """
    path = Path(output).resolve()
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir():
        raise FileExistsError(f"{parent} is a file, so {path} cannot be made; choose another path")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"cannot write into {parent}; choose another output folder")
    if not path.exists():
        return path
    if not path.is_dir():
        raise FileExistsError(f"output {path} is a file; choose a folder")
    if os.path.ismount(path):
        raise FileExistsError(f"output {path} is a mount point; choose a folder inside it")
    foreign = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.name not in replaceable or not entry.is_file()
    )
    if foreign:
        raise FileExistsError(
            f"output {path} holds other files, such as {foreign[0]!r}, and is never overwritten; "
            "choose another folder"
        )
    if not overwrite and any(path.iterdir()):
        raise FileExistsError(
            f"output {path} exists; choose another folder, or pass overwrite=True (--overwrite)"
        )
    return path


@contextlib.contextmanager
def atomic_folder(
    output: str | os.PathLike[str], *, replaceable: Collection[str], overwrite: bool = False
) -> Iterator[Path]:
    """Give a folder to write into, which becomes ``output`` when the block ends without an error.

    Before, ``output`` is what it was. On Linux an existing folder is exchanged in one step;
    elsewhere it is renamed to ``<output>.replaced-...`` for the moment of the change. What earlier
    killed runs left beside ``output`` is removed.

    Args:
        output: As in :func:`check_output_folder`, which is called first.
        replaceable: As there.
        overwrite: As there.

    Yields:
        A new, empty folder beside ``output``.

    Raises:
        FileExistsError: As in :func:`check_output_folder`.
        PermissionError: As there.
        OSError: The disk is full, or any other error of the file system.

    Example:
        >>> import tempfile
        >>> output = Path(tempfile.mkdtemp()) / "result"
        >>> with atomic_folder(output, replaceable={"data.txt"}) as folder:
        ...     _ = (folder / "data.txt").write_text("complete")
        ...     output.exists()
        False
        >>> (output / "data.txt").read_text()
        'complete'
    """
    path = check_output_folder(output, replaceable=replaceable, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    partial = path.parent / (_PARTIAL + secrets.token_hex(8))
    partial.mkdir()
    try:
        with _locked(partial):
            yield partial
            for file in partial.iterdir():
                _flush(file)
            _flush(partial)
            # The folder may have changed during a long run.
            check_output_folder(path, replaceable=replaceable, overwrite=overwrite)
            _put_in_place(partial, path)
            _flush(path.parent)
    finally:
        # After an exchange this is the folder that was replaced.
        shutil.rmtree(partial, ignore_errors=True)


def unfinished_folder(output: Path) -> Path:
    """Where :func:`resumable_folder` keeps the work on an output."""
    return output.parent / f".{output.name}.unfinished"


@contextlib.contextmanager
def resumable_folder(
    output: str | os.PathLike[str],
    fingerprint: str,
    *,
    replaceable: Collection[str],
    overwrite: bool = False,
) -> Iterator[Path]:
    """Like :func:`atomic_folder`, but what an interrupted run has written is there again.

    The work is kept in ``.<output>.unfinished`` beside the output. Files in it are complete if the
    caller writes each under another name and renames it.

    Args:
        output: As in :func:`check_output_folder`.
        fingerprint: Of all that the result depends on. Work with another fingerprint is removed.
        replaceable: As there.
        overwrite: As there.

    Yields:
        The folder to write into, with the files of the interrupted run, if any.

    Raises:
        FileExistsError: As in :func:`check_output_folder`, or another process writes there.
    """
    path = check_output_folder(output, replaceable=replaceable, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = unfinished_folder(path)
    partial.mkdir(exist_ok=True)
    with _locked(partial) as held:
        if fcntl is not None and not held:
            raise FileExistsError(
                f"another process is writing {path}; wait for it, or choose another output"
            )
        state = partial / _FINGERPRINT
        if not state.is_file() or state.read_text("utf-8") != fingerprint:
            for old in partial.iterdir():
                old.unlink()
            state.write_text(fingerprint, "utf-8")
        yield partial
        state.unlink()
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
        check_output_folder(path, replaceable=replaceable, overwrite=overwrite)
        _put_in_place(partial, path)
        _flush(path.parent)
        shutil.rmtree(partial, ignore_errors=True)  # after an exchange, the folder replaced


def _put_in_place(partial: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        partial.rename(path)  # replaces an empty folder
    elif not _exchange(partial, path):
        replaced = path.with_name(f"{path.name}.replaced-{secrets.token_hex(4)}")
        path.rename(replaced)
        try:
            partial.rename(path)
        except BaseException:
            replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system cannot (see renameat2(2))."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    names = os.fsencode(first), os.fsencode(second)
    return bool(renameat2(at_fdcwd, names[0], at_fdcwd, names[1], rename_exchange) == 0)


def _flush(path: Path) -> None:
    # Some systems cannot open or flush a folder; the rename is in order all the same.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a lock on a folder if nobody else does; yields whether it is held.

    The system frees the lock when the process ends, however it ends, so that a folder without a
    lock belongs to nobody.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held by another process, or not offered by this file system
            held = False
        yield held
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            # A folder just made may not be locked yet.
            if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER:
                with _locked(folder) as unused:
                    if unused:
                        shutil.rmtree(folder, ignore_errors=True)
