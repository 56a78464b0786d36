"""Devices and processes, through Lightning Fabric."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor, distributed

from pyro_guides.training.data import Arguments
from pyro_guides.training.weights import Weights

__all__ = ["Processes"]


@final
class Processes:
    """Where the steps are computed.

    Args:
        accelerator: "cpu", "gpu" or "auto", as Lightning has it.
        devices: how many processes.
        num_nodes: on how many machines.

    Raises:
        ImportError: Lightning Fabric is not installed.
    """

    def __init__(self, accelerator: str = "cpu", devices: int | str = 1, num_nodes: int = 1) -> None:
        try:
            from lightning_fabric import Fabric
        except ImportError as error:
            raise ImportError(
                "fit() needs Lightning Fabric: pip install 'pyro-guides[fit]'; plain SVI needs nothing"
            ) from error
        several = devices not in (1, "1") or num_nodes > 1
        # Gradients are averaged here, by one message per step, so that every ELBO will do.
        strategy = "ddp" if several else "auto"
        self._fabric: Any = Fabric(
            accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy
        )
        if several:
            self._fabric.launch()

    @property
    def rank(self) -> int:
        """Which process this is."""
        return int(self._fabric.global_rank)

    @property
    def world(self) -> int:
        """How many there are."""
        return int(self._fabric.world_size)

    @property
    def several(self) -> bool:
        """Whether there are more than one."""
        return self.world > 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and reports."""
        return self.rank == 0

    def receive(self, batch: Arguments) -> Arguments:
        """The batch on this process's device."""
        return batch.each(lambda tensor: tensor.detach().to(self._fabric.device))

    def reduce(self, tensor: Tensor, reduce_op: str) -> Any:
        """A tensor reduced over the processes, in place; "mean" is all there is."""
        distributed.all_reduce(tensor)  # Fabric's own waits for everybody once more
        return tensor.div_(self.world)

    def same(self, value: Any) -> Any:
        """The first process's value, on all of them."""
        return self._fabric.broadcast(value) if self.several else value

    def all(self, value: Any) -> list[Any]:
        """The values of all processes, in order; none goes on before all have come here."""
        values = [value] * self.world
        if self.several:
            distributed.all_gather_object(values, value)
        return values

    def align(self, weights: Weights) -> None:
        """Move the weights to the device, and give all processes the first one's."""
        for tensor in (*weights.parameters.values(), *weights.buffers.values()):
            tensor.data = tensor.data.to(self._fabric.device)
            if self.several:
                tensor.data.copy_(self.same(tensor.data))
