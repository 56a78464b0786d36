"""Files that are whole or not there: tensors and a JSON description, under one checksum.

A file is an ordinary safetensors file, so that any tool reads its tensors. Its metadata hold, under the key
``pyro_guides``, a JSON object with ``sha256``, ``version`` and ``description``. The checksum is that of the
whole file with its own 64 digits set to zero. It guards against accidents, not against forgery: what the
description may say is :mod:`pyro_guides.storage.decoding`'s business.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn, final

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

if sys.platform != "win32":
    import fcntl

__all__ = ["UnreadableFileError", "read", "write"]

_KEY = "pyro_guides"
_VERSION = 1
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its header
_LARGEST_HEADER = 100_000_000  # of safetensors; what is longer is read by nobody
_NO_DIGEST = "0" * hashlib.sha256().digest_size * 2
# The first one is ours; quotes inside the description are escaped once more.
_DIGEST = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')

Path_ = str | os.PathLike[str]


@final
class UnreadableFileError(ValueError):
    """A file that is damaged, of another kind or of a newer version; the message says which."""

    def __init__(self, path: Path_, reason: str) -> None:
        super().__init__(f"{os.fspath(path)} {reason}")


def write(path: Path_, tensors: Mapping[str, Tensor], description: Any) -> None:
    """Write a file that takes the place of any earlier one in one step.

    Whatever goes wrong - a full disk, a killed process, a lost machine - ``path`` holds either all of the old
    file or all of the new one.

    Args:
        path: where to; a link is followed.
        tensors: dense tensors by name; they may share memory, and lie anywhere.
        description: what JSON can hold; NaN and infinities are allowed.

    Raises:
        OSError: the file cannot be written; the earlier one is unchanged.
        TypeError: a tensor or the description is of a kind that cannot be written.
        ValueError: the description is longer than 100 MB, or a tensor is named ``__metadata__``.
    """
    data = _packed(tensors, description)
    target = Path(os.path.realpath(path))
    try:
        _replace(target, data)
    except OSError as error:
        reason = f"{error.strerror or error}; nothing was written, and an earlier file is unchanged"
        raise OSError(error.errno, reason, os.fspath(path)) from error


def read(path: Path_) -> tuple[dict[str, Tensor], Any]:
    """The tensors, on the CPU, and the description of a file that :func:`write` wrote.

    Raises:
        UnreadableFileError: the file is damaged, not of this format, or of a newer version.
        OSError: there is no such file, or it may not be read.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        if not 0 < length <= min(size - _LENGTH_BYTES, _LARGEST_HEADER):
            _refuse(path)
        start += file.read(length)
        header = _parsed(path, start[_LENGTH_BYTES:])
        contents = _contents(path, header)
        if _expected_size(path, header, length) != size:
            _refuse(path)
        data = bytearray(start + file.read())
    given = _zero_digest(data)
    if given is None or given != hashlib.sha256(data).hexdigest().encode():
        _refuse(path)
    try:
        # Copies lie in memory as new tensors do; where they lie may decide about the last digits of a sum.
        tensors = {name: tensor.clone() for name, tensor in safetensors.load(bytes(data)).items()}
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UnreadableFileError(path, f"has a header that makes no sense ({error})") from error
    return tensors, contents["description"]


# --- writing


def _packed(tensors: Mapping[str, Tensor], description: Any) -> bytearray:
    """The bytes of a file."""
    contents = {"sha256": _NO_DIGEST, "version": _VERSION, "description": description}
    metadata = {_KEY: json.dumps(contents)}
    own = {name: _own(name, tensor) for name, tensor in tensors.items()}
    try:
        data = bytearray(safetensors.save(own, metadata))
    except (KeyError, SafetensorError, ValueError, TypeError) as error:
        kinds = sorted({str(tensor.dtype) for tensor in own.values()})
        raise TypeError(f"safetensors cannot hold tensors of these kinds, {kinds}: {error!r}") from error
    if int.from_bytes(data[:_LENGTH_BYTES], "little") > _LARGEST_HEADER:
        raise ValueError(f"the description is longer than {_LARGEST_HEADER} bytes; keep data in tensors")
    _zero_digest(data, hashlib.sha256(data).hexdigest().encode())
    return data


def _own(name: str, tensor: Tensor) -> Tensor:
    """The values of a tensor in memory of their own, row by row."""
    if name == "__metadata__":
        raise ValueError("no tensor may be named '__metadata__' in a safetensors file; rename it")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise TypeError(f"tensor '{name}' is {tensor.layout} of {tensor.dtype}, expected a dense one")
    plain = tensor.detach().to("cpu").resolve_conj().resolve_neg()
    return plain.clone(memory_format=torch.contiguous_format)


def _zero_digest(data: bytearray, new: bytes = _NO_DIGEST.encode()) -> bytes | None:
    """Replace the digits of the checksum; returns those that were there, None if there are none."""
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    found = _DIGEST.search(data, _LENGTH_BYTES, end)
    if found is None:
        return None
    start, stop = found.span(1)
    old = bytes(data[start:stop])
    data[start:stop] = new
    return old


def _replace(target: Path, data: bytearray) -> None:
    """Write beside the target, make sure that the disk has it, and move it into place."""
    if target.exists() and not target.is_file():
        raise OSError(errno.EISDIR if target.is_dir() else errno.EINVAL, "this is no ordinary file")
    _remove_leftovers(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:  # with the permissions that any new file gets
            _lock(file)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if sys.platform == "win32":
                file.close()  # open files cannot be moved there
            temporary.replace(target)  # under the lock, so that nobody takes it for a leftover
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writers of this file left; those still at work hold a lock."""
    pattern = f".{glob.escape(target.name)}.{'[0-9a-f]' * 16}.tmp"
    for leftover in target.parent.glob(pattern):
        with suppress(OSError), leftover.open("rb+") as file:
            _lock(file)
            leftover.unlink()


def _lock(file: IO[bytes]) -> None:
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync_directory(directory: Path) -> None:
    """Make the move itself outlast a loss of power, where the file system can."""
    if sys.platform == "win32":
        return
    with suppress(OSError):  # the new file is in place and whole, whether or not this is possible
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- reading


def _parsed(path: Path_, text: bytes | str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        _refuse(path)
    if not isinstance(found, dict):
        _refuse(path)
    return found


def _contents(path: Path_, header: Mapping[str, Any]) -> dict[str, Any]:
    """What the metadata hold for us."""
    metadata = header.get("__metadata__")
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise UnreadableFileError(
            path, "is a safetensors file of something else: no guide or checkpoint of pyro_guides"
        )
    contents = _parsed(path, text)
    version = contents.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise UnreadableFileError(
            path,
            f"has format version {version}, and {_VERSION} is the newest known here: upgrade pyro_guides",
        )
    if version != _VERSION or "description" not in contents:
        _refuse(path)
    return contents


def _expected_size(path: Path_, header: Mapping[str, Any], length: int) -> int:
    """How many bytes the file has if nothing is missing, from its header alone."""
    try:
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (KeyError, IndexError, TypeError, ValueError):
        _refuse(path)
    return _LENGTH_BYTES + length + max(ends, default=0)


def _refuse(path: Path_) -> NoReturn:
    raise UnreadableFileError(
        path,
        "is damaged, cut short, or no file of pyro_guides: its checksum or its layout is wrong. Take "
        "another copy of it; what other programs wrote, such as a .pt file, is not read",
    )
