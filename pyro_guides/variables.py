"""What an export is made of: named NumPy arrays, and names for them that ArviZ and its files can keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, final

import numpy as np

__all__ = ["Exportable", "Variable"]

Array: TypeAlias = np.ndarray[Any, Any]
Groups: TypeAlias = dict[str, dict[str, "Variable"]]
Attributes: TypeAlias = dict[str, Any]

SAMPLE_DIMS = ("chain", "draw")


@final
@dataclass(frozen=True, eq=False)
class Variable:
    """An array with the names of its leading dimensions; the others are event dimensions.

    Args:
        values: the array.
        dims: names of its leading dimensions. An array of draws begins with ``"chain", "draw"``; plates
            follow, outermost first.

    Raises:
        TypeError: ``values`` is no NumPy array, or ``dims`` no tuple of strings.
        ValueError: ``dims`` has more names than the array has dimensions, or has one twice.

    Example:
        >>> import numpy as np
        >>> from pyro_guides.variables import Variable
        >>> z = Variable(np.zeros((1, 100, 5, 2)), ("chain", "draw", "row"))
        >>> z.has_draws, z.plates, z.event_dims
        (True, ('row',), 1)
    """

    values: Array
    dims: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.values, np.ndarray):
            kind = type(self.values).__name__
            raise TypeError(f"values must be a NumPy array, got {kind}; a tensor has .numpy(force=True)")
        if not isinstance(self.dims, tuple) or not all(isinstance(dim, str) for dim in self.dims):
            raise TypeError(f'dims must be a tuple of strings such as ("chain", "draw"), got {self.dims!r}')
        if self.event_dims < 0 or len(set(self.plates)) < len(self.plates):
            raise ValueError(
                f"dims must name the leading dimensions once each, got {self.dims} for an array of shape "
                f"{self.values.shape}"
            )

    @property
    def has_draws(self) -> bool:
        """Whether the first two dimensions are chains and draws."""
        return self.dims[:2] == SAMPLE_DIMS

    @property
    def plates(self) -> tuple[str, ...]:
        """The named dimensions but chains and draws."""
        return self.dims[2:] if self.has_draws else self.dims

    @property
    def event_dims(self) -> int:
        """How many trailing dimensions have no name."""
        return self.values.ndim - len(self.dims)


class Exportable(Protocol):
    """What can be exported: variables by group and name, and attributes that hold for all of them."""

    @property
    def attrs(self) -> Mapping[str, Any]:
        """Plain values, by name."""
        ...

    def to_groups(self) -> Groups:
        """Variables by group and name, such as ``{"posterior": {"z": Variable(...)}}``."""
        ...


def merge(parts: Sequence[Exportable]) -> tuple[Groups, dict[str, Attributes]]:
    """Put the variables of all parts together.

    Returns:
        Variables by group and name; and the attributes of each group: those of the parts that fill it.

    Raises:
        TypeError: a part cannot be exported, or has an attribute that a file cannot hold.
        ValueError: there is nothing to export, or two parts have the same variable.
    """
    groups: Groups = {}
    attrs: dict[str, list[Attributes]] = {}
    for part in parts:
        found, own = _opened(part)
        for group, variables in found.items():
            if variables:
                _add(groups.setdefault(group, {}), group, variables)
                attrs.setdefault(group, []).append(own)
    if not groups:
        raise ValueError("there is nothing to export: pass objects that have variables in to_groups()")
    return groups, {group: agreed(own) for group, own in attrs.items()}


def agreed(attrs: Iterable[Attributes]) -> Attributes:
    """What is said without contradiction; the rest would be false for some of the variables."""
    said = list(attrs)
    return {
        key: value
        for one in said
        for key, value in one.items()
        if all(o.get(key, value) == value for o in said)
    }


def _opened(part: Exportable) -> tuple[Groups, Attributes]:
    if isinstance(part, type) or not hasattr(part, "to_groups") or not hasattr(part, "attrs"):
        kind = part.__name__ if isinstance(part, type) else type(part).__name__
        raise TypeError(
            f"'{kind}' cannot be exported: pass what guide.posterior(...) returns, or any object with "
            "to_groups() and attrs, each as an argument of its own"
        )
    return part.to_groups(), {key: _plain(key, value) for key, value in part.attrs.items()}


def _add(known: dict[str, Variable], group: str, variables: Mapping[str, Variable]) -> None:
    if "/" in group:
        raise ValueError(f"group '{group}' has a '/', which separates groups in files; rename it")
    for name, variable in variables.items():
        if not isinstance(variable, Variable):
            kind = type(variable).__name__
            raise TypeError(f"'{name}' of group '{group}' must be a Variable(values, dims), got {kind}")
    if twice := sorted(set(known) & set(variables)):
        raise ValueError(f"two parts have {twice} in group '{group}'; export them one by one, or rename them")
    known.update(variables)


def _plain(key: str, value: Any) -> Any:
    """The value in a form that a file gives back as it was: netCDF has no booleans."""
    if isinstance(value, bool):
        return int(value)
    members = value if isinstance(value, (list, tuple)) else [value]
    if all(isinstance(member, str) for member in members) or all(map(_is_number, members)):
        return value
    raise TypeError(
        f"attribute '{key}' must be a string, a number or a list of either, got {value!r}; write it "
        "as a string"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


@final
class Names:
    """What variables and dimensions are called in ArviZ.

    It has no '/' in names, which separates groups in files; and it drops a variable that is called like a
    dimension without a word. So dimensions of such a name, and variables called ``chain`` or ``draw``, get
    a suffix.

    Args:
        groups: variables by group and name.
        event_dims: names of the event dimensions of variables, as many as the user wants to give.

    Raises:
        TypeError: the names of a variable's dimensions are no list of strings.
        ValueError: ``event_dims`` names unknown variables, too many dimensions or one twice; or two names
            would become one.
    """

    def __init__(self, groups: Groups, event_dims: Mapping[str, Sequence[str]]) -> None:
        most: dict[str, int] = {}
        plates: set[str] = set()
        for name, variable in (item for variables in groups.values() for item in variables.items()):
            most[name] = max(variable.event_dims, most.get(name, 0))
            plates |= set(variable.plates)
        _check_event_dims(event_dims, most)
        self._chosen = event_dims
        self.variables = _renamed("variables", most, set(SAMPLE_DIMS), "_site")
        self._taken = {*self.variables.values(), *SAMPLE_DIMS}
        self._dims = _renamed("dimensions", plates.union(*event_dims.values()), self._taken, "_dim")
        self._taken.update(self._dims.values())
        self._originals = {safe: name for name, safe in [*self.variables.items(), *self._dims.items()]}

    def dim(self, name: str) -> str:
        """What a dimension is called; names that are already ArviZ's stay."""
        return self._dims.get(name, name)

    def dims_of(self, name: str, variable: Variable) -> tuple[str, ...]:
        """Names of all dimensions of a variable.

        Raises:
            ValueError: two of them have the same name.
        """
        chosen = self._chosen.get(name, ())
        if len(chosen) > variable.event_dims:  # names for x are none for its log likelihood
            chosen = ()
        dims = [self._dims[dim] for dim in (*variable.plates, *chosen)]
        stem = f"{self.variables[name]}_dim"  # plates count too, as in ArviZ 0.x; 1.x alone would start at 0
        size = len(variable.plates) + variable.event_dims
        dims += [_free(f"{stem}_{i}", self._taken, "_dim") for i in range(len(dims), size)]
        if len(set(dims)) < len(dims):
            raise ValueError(
                f"the dimensions of '{name}' would be {dims}; give each a name of its own in dims"
            )
        return (*(SAMPLE_DIMS if variable.has_draws else ()), *dims)

    def attrs_of(self, name: str) -> dict[str, str]:
        """The name that a variable or dimension has in the model, if ArviZ calls it by another."""
        return {"original_name": self._originals[name]} if self._originals.get(name, name) != name else {}


def _check_event_dims(event_dims: Mapping[str, Sequence[str]], most: Mapping[str, int]) -> None:
    for name, dims in event_dims.items():
        if name not in most:
            raise ValueError(f"dims names '{name}', but the variables are {sorted(most)}")
        if isinstance(dims, str) or not all(isinstance(dim, str) for dim in dims):
            raise TypeError(f"dims['{name}'] must be a list of names, got {dims!r}")
        if len(dims) > most[name]:
            raise ValueError(
                f"'{name}' has {most[name]} event dimensions, but dims gives {list(dims)}; plates have their "
                "names already"
            )


def _renamed(what: str, names: Iterable[str], taken: set[str], suffix: str) -> dict[str, str]:
    renamed: dict[str, str] = {}
    origin: dict[str, str] = {}
    for name in sorted(names):
        safe = _free(name.replace("/", "."), taken, suffix)
        if safe in origin:
            raise ValueError(
                f"{what} '{origin[safe]}' and '{name}' would both be called '{safe}' in ArviZ; rename one of "
                "them"
            )
        renamed[name] = safe
        origin[safe] = name
    return renamed


def _free(name: str, taken: set[str], suffix: str) -> str:
    while name in taken:
        name += suffix
    return name
