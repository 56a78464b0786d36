"""Files that a run goes on from after it was killed."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from pyro_guides import storage

__all__ = ["Checkpoints"]

logger = logging.getLogger("pyro_guides")

_KIND = "checkpoint of pyro_guides.fit"
_VERSION = 1  # of what a run's state is made of; storage has one of its own for how that is written


@final
class Checkpoints:
    """Writes what a run has come to, and reads it again.

    Args:
        path: the file; None for none.
        every: after how many steps to write.
        resume: whether to go on from the file, if there is one.
        writes: whether this process writes.

    Raises:
        FileExistsError: there is a file already, and it is not to be resumed.
        OSError: no file can be there.
        ValueError: the file is damaged, or was written by another version of the package.
    """

    def __init__(self, path: str | Path | None, every: int, *, resume: bool, writes: bool = True) -> None:
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"checkpoint must be a path or None, got {path!r}")
        self._path = None if path is None else Path(path)
        self._every = every
        self._writes = writes
        self._identity: dict[str, Any] = {}
        self._seconds = 0.0
        self._begun = time.monotonic()
        self._found: dict[str, Any] | None = None
        if self._path is None:
            if resume:
                raise ValueError("resume=True needs a file to go on from: give checkpoint=path, too")
            return
        _check_place(self._path)
        if self._path.exists():
            if not resume:
                raise FileExistsError(
                    f"checkpoint '{self._path}' exists and would be lost: give resume=True to go on from it, "
                    "another path, or delete it"
                )
            self._found = self._read()

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = storage.load(self._path or "", kind=_KIND)
        if found.get("version") != _VERSION:
            raise ValueError(
                f"checkpoint '{self._path}' is of version {found.get('version')}, and this version of "
                f"pyro_guides goes on from version {_VERSION} only; finish the run with the version that "
                "began it, or give another path"
            )
        return found

    @property
    def seconds(self) -> float:
        """How long the run has taken, over all resumes."""
        return self._seconds + time.monotonic() - self._begun

    @property
    def seed(self) -> int | None:
        """The seed of the run that is to go on."""
        return None if self._found is None else int(self._found["seed"])

    def identify(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Say what is trained and how; returns the state to go on from.

        Raises:
            ValueError: the file belongs to something else.
        """
        self._identity = dict(identity)
        if self._found is None:
            return None
        saved = self._found["identity"]
        different = {
            key: (saved.get(key), self._identity.get(key))
            for key in saved.keys() | self._identity.keys()
            if saved.get(key) != self._identity.get(key)
        }
        if different:
            said = "; ".join(f"{key} was {old}, is {new}" for key, (old, new) in sorted(different.items()))
            raise ValueError(
                f"checkpoint '{self._path}' belongs to another run: {said}. Resume with the same model, "
                "guide, data and arguments, or give another path"
            )
        self._seconds = float(self._found["seconds"])
        state: dict[str, Any] = self._found["state"]
        self._found = {"seed": self._found["seed"]}  # the state may be large
        return state

    @property
    def wanted(self) -> bool:
        """Whether there is a file to write."""
        return self._path is not None

    def due(self, step: int) -> bool:
        """Whether it is time to write."""
        return self.wanted and step % self._every == 0

    def write(self, seed: int, state: Mapping[str, Any], *, first: bool = False) -> None:
        """Write what the run has come to; what goes wrong stops it at the first time only.

        Raises:
            OSError, TypeError, ValueError: the file cannot be written, at the first time.
        """
        if self._path is None or not self._writes:
            return
        tree = {
            "version": _VERSION,
            "identity": self._identity,
            "seed": seed,
            "seconds": self.seconds,
            "state": dict(state),
        }
        try:
            storage.save(self._path, tree, kind=_KIND)
        except (OSError, TypeError, ValueError) as error:
            if first:
                raise
            logger.error(
                "checkpoint '%s' could not be written (%s); training goes on, and the file is what it was",
                self._path,
                error,
            )


def _check_place(path: Path) -> None:
    """Raise an OSError if no file can be written there, before any work is done."""
    folder = path.resolve().parent
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "checkpoint must be a file, and this is a folder", str(path))
    if not folder.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, "checkpoint lies in a folder that is not there; make it first", str(path)
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            errno.EACCES, "checkpoint lies in a folder that this user may not write to", str(path)
        )
