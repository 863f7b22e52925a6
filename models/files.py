"""Files that appear whole or not at all, and never twice at once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.contract import ModelError

PARTIAL = ".partial"


def default_cache_dir() -> Path:
    """$LONGREACH_CACHE_DIR, else $XDG_CACHE_HOME/longreach, else ~/.cache/longreach."""
    own = os.environ.get("LONGREACH_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "longreach"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``.lock; another process that wants it waits. Freed even by a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def appearing(final: Path) -> Iterator[Path]:
    """A directory to fill; it becomes ``final`` when the block ends well and vanishes when it does not.

    What a killed process left under the partial name is removed first. Call with ``final`` locked.
    """
    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_disk(directory: Path, needed_bytes: int, what: str) -> None:
    """ModelError where the file system of ``directory`` has less than ``needed_bytes`` free."""
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise ModelError(
            f"{what} could not be fetched: it needs {needed_bytes / 1e9:.1f} GB in {directory}, "
            f"{free / 1e9:.1f} GB are free. Free some space or choose another cache directory "
            "(LONGREACH_CACHE_DIR)"
        )
