"""One differentiable number for any ELBO, also for those that Pyro gives none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from pyro.infer import TraceGraph_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

__all__ = ["differentiable_loss", "valued"]


def differentiable_loss(elbo: Any, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The loss of an ELBO as a number whose gradient is the one that the ELBO estimates.

    This is the ELBO's own ``differentiable_loss`` if it has one. ``TraceGraph_ELBO`` has a surrogate loss,
    which includes the losses of baselines. Any other ELBO (``RenyiELBO``, ``ReweightedWakeSleep``, a user's)
    computes its gradients with ``loss_and_grads``, which are then handed on; these are the gradients of
    parameters only, not of other tensors, and are summed over backward passes as usual.

    Args:
        elbo: an ELBO, or any object with ``loss_and_grads``.
        model: the model.
        guide: the guide.
        *args: their arguments.
        **kwargs: their keyword arguments.

    Returns:
        The loss, ``()``.

    Raises:
        TypeError: ``elbo`` is a class, or has no ``loss_and_grads``.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer import TraceGraph_ELBO
        >>> from pyro_guides import AmortizedGuide
        >>> from pyro_guides.objectives import differentiable_loss
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> guide = AmortizedGuide(model)
        >>> loss = differentiable_loss(TraceGraph_ELBO(), model, guide, torch.randn(5))
        >>> loss.backward()
    """
    for name, function in (("model", model), ("guide", guide)):
        if not callable(function):
            raise TypeError(f"{name} must be a function or module, got a {type(function).__name__}")
    if isinstance(elbo, type):
        raise TypeError(f"elbo must be an object, got the class {elbo.__name__}; write {elbo.__name__}()")
    if hasattr(elbo, "differentiable_loss"):
        return torch.as_tensor(elbo.differentiable_loss(model, guide, *args, **kwargs))
    if isinstance(elbo, TraceGraph_ELBO):
        bound, surrogate = elbo._loss_and_surrogate_loss(model, guide, args, kwargs)
        return valued(surrogate, -torch.as_tensor(bound))
    if not callable(getattr(elbo, "loss_and_grads", None)):
        hint = "SVI takes a function as a loss; write a class with loss_and_grads" if callable(elbo) else ""
        raise TypeError(
            f"elbo must be an ELBO such as Trace_ELBO(), got {elbo!r}{'; ' + hint if hint else ''}"
        )
    return _handed_on(elbo, model, guide, args, kwargs)


def valued(surrogate: Any, value: Tensor) -> Tensor:
    """A number with one tensor's gradient and another one's value."""
    if not isinstance(surrogate, Tensor) or not surrogate.requires_grad:
        return value.detach()
    return value.detach() + (surrogate - surrogate.detach())


def _handed_on(elbo: Any, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The loss of an ELBO that runs its own backward pass, with the gradients of that pass."""
    modules = [function for function in (model, guide) if isinstance(function, nn.Module)]
    with _Borrowed() as borrowed, torch.enable_grad():
        for module in modules:
            borrowed.take(_parameters(module))
        loss = elbo.loss_and_grads(model, guide, *args, **kwargs)
        loss = sum(loss) if isinstance(loss, tuple) else loss  # wake-sleep has two
        for module in modules:
            borrowed.take(_parameters(module), fresh=True)  # those that the first call has made
        gradients = borrowed.gradients()
    if not (gradients and torch.is_grad_enabled()):
        return torch.as_tensor(loss)
    parameters, values = zip(*gradients, strict=True)
    handed: Any = _HandOn.apply(torch.as_tensor(loss, dtype=values[0].dtype), values, *parameters)
    return handed


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    # Not its own method: a guide that is not set up yet refuses it.
    return [parameter for _, parameter in nn.Module.named_parameters(module)]


@final
class _Borrowed(Messenger):
    """Takes the gradients off all parameters that are met, and gives them back in the end."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, tuple[Tensor, Tensor | None]] = {}

    def take(self, parameters: Iterable[Tensor], *, fresh: bool = False) -> None:
        """Note parameters, and clear their gradients unless these were computed just now."""
        for parameter in parameters:
            if id(parameter) not in self._before:
                self._before[id(parameter)] = (parameter, None if fresh else parameter.grad)
                if not fresh:
                    parameter.grad = None

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """The parameters that have gradients now, and these."""
        parameters = [parameter for parameter, _ in self._before.values()]
        return [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        parameter = value.unconstrained() if hasattr(value, "unconstrained") else value
        if parameter.is_leaf:
            self.take([parameter])

    def __exit__(self, *error: Any) -> None:
        for parameter, gradient in self._before.values():
            parameter.grad = gradient
        super().__exit__(*error)


@final
class _HandOn(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
        return None, None, *(weight * gradient for gradient in ctx.gradients)
