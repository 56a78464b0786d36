"""Modules that are made when the data first arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import Tensor, nn

__all__ = ["Late"]


@final
class Late(nn.Module):
    """A module that is made on its first call, in the dtype and on the device of its first argument.

    Args:
        make: from ``sizes`` and the keywords ``dtype`` and ``device`` to the module.
        sizes: what it is made with.

    Example:
        >>> import torch
        >>> layer = Late(nn.Linear, 3, 2)
        >>> layer(torch.ones(5, 3, dtype=torch.float64)).dtype
        torch.float64
    """

    def __init__(self, make: Callable[..., nn.Module], *sizes: int) -> None:
        super().__init__()
        self.make = make
        self.sizes = sizes
        self.module: nn.Module | None = None

    def forward(self, first: Tensor, *rest: Any) -> Tensor:
        module = self._build(first) if self.module is None else self.module
        output: Tensor = module(first, *rest)
        return output

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A module that was never made here may still be loaded; children are loaded after this.
        saved = [value for key, value in state_dict.items() if key.startswith(prefix + "module.")]
        if self.module is None and saved:
            self._build(saved[0])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _build(self, like: Tensor) -> nn.Module:
        self.module = self.make(*self.sizes, dtype=like.dtype, device=like.device)
        return self.module
