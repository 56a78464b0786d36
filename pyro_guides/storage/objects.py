"""Trees of objects in files: written by structure and read without running anything.

Numbers, strings, containers, tensors, and objects and modules of this package and of ``torch.nn``, by their
attributes. Two references to one object stay two references to one object. What a file cannot hold, because
it is somebody else's code, can be left out by name and given again when the file is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_guides.storage.decoding import Decoder
from pyro_guides.storage.encoding import Encoder, described
from pyro_guides.storage.files import Path_, UnreadableFileError, read, write

__all__ = ["decode", "encode", "is_writable", "load", "save"]

_NOTHING: Mapping[str, Any] = {}


def encode(tree: Any, external: Mapping[str, object] = _NOTHING) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What JSON can say about a tree of objects, and the tensors in it.

    Args:
        tree: numbers, strings, None, ``dict``, ``list``, ``tuple``, ``set``, tensors, parameters, modules.
        external: objects that are left out, by the names under which they will be given again.

    Raises:
        TypeError: the tree holds something else, or lies within itself.
        ValueError: it is nested too deeply.

    Example:
        >>> import torch
        >>> description, tensors = encode({"step": 3, "rates": [0.1, torch.ones(2)]})
        >>> tensors
        {'rates.1': tensor([1., 1.])}
        >>> decode(description, tensors)
        {'step': 3, 'rates': [0.1, tensor([1., 1.])]}
    """
    encoder = Encoder(external)
    root = encoder.value(tree)
    names = {name: described(value) for name, value in external.items()}
    return {"root": root, "external": names, "nodes": encoder.nodes}, encoder.tensors


def is_writable(tree: Any) -> bool:
    """Whether a file can hold a tree of objects as it is."""
    try:
        encode(tree)
    except (TypeError, ValueError):
        return False
    return True


def decode(
    description: Any,
    tensors: Mapping[str, Tensor],
    external: Mapping[str, object] = _NOTHING,
    *,
    device: torch.device | str | None = None,
) -> Any:
    """The tree of objects that :func:`encode` described.

    Args:
        description: its description.
        tensors: its tensors.
        external: what was left out, by name.
        device: where all tensors go; they stay where they are if None.

    Raises:
        ValueError: the description is none, or names a class or function that no file may name.
    """
    decoder = Decoder(tensors, external, None if device is None else torch.device(device))
    try:
        decoder.make(description["nodes"])
        return decoder.value(description["root"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"holds no description of objects: it {error}") from error


def save(path: Path_, tree: Any, kind: str, external: Mapping[str, object] = _NOTHING) -> None:
    """Write a tree of objects to a file, which takes the place of any earlier one in one step.

    Args:
        path: where to.
        tree: see :func:`encode`.
        kind: what the file is, as :func:`load` must be told.
        external: see :func:`encode`.

    Raises:
        OSError: the file cannot be written; an earlier one is unchanged.
        TypeError, ValueError: see :func:`encode`.
    """
    description, tensors = encode(tree, external)
    write(path, tensors, {"kind": kind, **description})


def load(
    path: Path_,
    kind: str,
    supply: Callable[[Mapping[str, str]], Mapping[str, object]] = lambda needed: _NOTHING,
    *,
    device: torch.device | str | None = None,
) -> Any:
    """Read a tree of objects from a file.

    Args:
        path: the file.
        kind: what it must be.
        supply: from what was left out, as names and descriptions, to the objects by name.
        device: see :func:`decode`.

    Raises:
        UnreadableFileError: the file is damaged, foreign, of another kind or of a newer version.
        OSError: there is no such file, or it may not be read.
    """
    tensors, description = read(path)
    found = description.get("kind") if isinstance(description, dict) else None
    if not isinstance(found, str) or found != kind:
        raise UnreadableFileError(path, f"holds a {found}, not a {kind}; load it as what it is")
    names = description.get("external")
    if not isinstance(names, dict):
        raise UnreadableFileError(path, "does not say what was left out of it")
    external = supply({str(name): str(what) for name, what in names.items()})
    try:
        return decode(description, tensors, external, device=device)
    except ValueError as error:
        raise UnreadableFileError(path, str(error)) from error
