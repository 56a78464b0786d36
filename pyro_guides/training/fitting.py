"""``fit``: training as one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pyro.infer import ELBO, Trace_ELBO

from pyro_guides.families import Family
from pyro_guides.statistics.arguments import flag
from pyro_guides.training import randomness
from pyro_guides.training.checkpoints import Checkpoints
from pyro_guides.training.gradients import Limit
from pyro_guides.training.ladder import check_ladder
from pyro_guides.training.legs import Done, Legs
from pyro_guides.training.preparing import check_finite, identity, seed_for, sources, steps_for
from pyro_guides.training.processes import Processes
from pyro_guides.training.reporting import MetricsLogger, Report
from pyro_guides.training.result import FitResult
from pyro_guides.training.schedule import warmup_cosine
from pyro_guides.training.settings import MakeOptimizer, Settings, check_counts, check_elbo, check_functions
from pyro_guides.training.stages import Stages
from pyro_guides.training.task import Task

__all__ = ["fit"]

_LOOKS = 60  # at the validation rows, at most
_APART = 10  # steps, where that leaves as many looks


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    *,
    loss: ELBO | None = None,
    batch_size: int | None = 128,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    validation: Any = "auto",
    patience: int | None = 20,
    learning_rate: float = 0.01,
    schedule: Callable[[float], float] | None = warmup_cosine,
    optimizer: MakeOptimizer | None = None,
    clip: Limit = "auto",
    tempering: AbstractContextManager[Any] | None = None,
    whiten: bool = True,
    restarts: int = 1,
    ladder: Sequence[Family] = (),
    max_skips: int = 10,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    seed: int | None = None,
    logger: MetricsLogger | None = None,
    progress: bool | None = None,
    accelerator: str = "cpu",
    devices: int | str = 1,
    num_nodes: int = 1,
) -> FitResult:
    r"""Train guide and model together; both are changed in place.

    Minimizes the negative ELBO per row, over minibatches of B of the N rows,

    .. math:: -\frac{1}{N}\, E_q\Bigl[ \log p(g) - \log q(g)
        + \frac{N}{B} \sum_{i \in \text{batch}} \log p(x_i, z_i \mid g) - \log q(z_i \mid x_i, g) \Bigr]

    where g are the latents that rows share. If the model's plates do not count N rows for B, ``fit`` does.
    All parameters that guide and model use are trained: of modules, and of ``pyro.param`` and
    ``pyro.module``. At the end the weights are those with the best validation ELBO. Random numbers are the
    run's own: the same seed gives the same result, and those outside are left alone.

    Args:
        model: a Pyro model.
        guide: its guide, an :class:`~pyro_guides.AmortizedGuide` or any other.
        data: what the model takes: a tensor, a tuple of arguments, a dict of keyword arguments, whose tensors
            have the rows in their first dimension; or a ``Dataset`` or ``DataLoader`` of such. Of several
            processes each loads its share; a loader with an order of its own needs a ``DistributedSampler``.
        loss: an ELBO of Pyro or of :mod:`pyro_guides.objectives`; ``Trace_ELBO()`` if None.
        batch_size: B, of all processes together, a multiple of their number. None passes ``data`` as they
            are to every step: for models that subsample by themselves, or need all rows.
        max_steps: how many steps; 3,000 if neither this nor ``max_epochs`` is given.
        max_epochs: the same in passes over the rows; with ``batch_size=None`` each step is one.
        validation: the share of rows to hold out, taken before anything is learned from them, or other data
            of the same kind; None for no validation. "auto" is a tenth, or None where no latents belong to
            rows, since a posterior that all rows share needs them all, or where nothing can be held out: with
            ``batch_size=None``, or a DataLoader of your own.
        patience: stop after so many looks at the validation rows without a gain beyond its standard error,
            over rows and draws; a look is taken 60 times. None never stops early.
        learning_rate: Adam's, at its peak.
        schedule: from the share of steps done to a factor on the learning rate; up over 5 % of the steps and
            down along a cosine by default. None for a constant rate.
        optimizer: from parameters to a torch optimizer, in place of Adam.
        clip: the largest norm of the gradient; "auto" for ten times its running mean, "normalize" for norm 1.
        tempering: what weighs the latents' terms, such as :class:`~pyro_guides.objectives.LinearWarmup`.
        whiten: whether to begin with :func:`~pyro_guides.starting.find_start`, if the guide is untrained;
            beside amortized groups it looks at some of the rows.
        restarts: how many starts to try for a tenth of the steps each; the best goes on. Those without a
            finite loss are given up.
        ladder: richer families, to be climbed as long as the family is what holds q back: after ``max_steps
            / 2`` steps shared by all but the last of them, the one that is rich enough gets ``max_steps``
            more.
        max_skips: how many steps in a row may be skipped for want of a finite loss or gradient.
        checkpoint: a file to go on from, written every ``checkpoint_every`` steps and at the end by the first
            process, and read by all.
        checkpoint_every: how many steps lie between.
        resume: whether to go on from the file, if there is one, with a fresh guide of the same kind: on a CPU
            to the last bit as if never stopped. After Ctrl-C it goes on from the last time it was written.
        seed: of all random numbers; drawn from torch's if None.
        logger: one of Lightning's, for instance ``lightning_fabric.loggers.CSVLogger(".")``.
        progress: whether to show a progress bar; only in a terminal if None.
        accelerator: "cpu", "gpu" or "auto".
        devices: how many processes, as Lightning Fabric has it; each takes its share of every batch.
        num_nodes: on how many machines.

    Returns:
        What happened; see :class:`FitResult`.

    Raises:
        ImportError: Lightning Fabric is not installed (``pip install 'pyro-guides[fit]'``).
        TypeError, ValueError: an argument is not what it should be, or the share of rows cannot be held out.
        FloatingPointError: steps have no finite loss, of all starts; says at which site and rows.
        FileExistsError: there is a checkpoint already, and ``resume`` is False.
        UnreadableFileError: the checkpoint is damaged.
        OSError: it cannot be written when training begins.
        NotImplementedError: the model makes parameters during training, in one of several processes.

    Source: Matthew D. Hoffman, David M. Blei, Chong Wang, John Paisley, "Stochastic Variational Inference",
    2013, arXiv:1206.7051.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_guides import AmortizedGuide, fit
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> guide = AmortizedGuide(model)
        >>> result = fit(model, guide, 1.25**0.5 * torch.randn(500), max_steps=100, seed=1)
        >>> result.stopped_by
        'steps'
        >>> guide.median(torch.tensor([1.0]))["z"].shape
        torch.Size([1])
    """
    check_functions(model, guide, tempering)
    check_counts(batch_size=batch_size, restarts=restarts, checkpoint_every=checkpoint_every, devices=devices)
    flag("resume", resume)
    flag("whiten", whiten)
    elbo = Trace_ELBO() if loss is None else check_elbo(loss)
    processes = Processes(accelerator, devices, num_nodes)
    checkpoints = Checkpoints(checkpoint, checkpoint_every, resume=resume, writes=processes.first)
    seed = seed_for(seed, checkpoints.seed, processes)
    train, held = sources(model, data, batch_size, validation, seed, processes)
    steps = steps_for(max_steps, max_epochs, train)
    every = max(1, steps // _LOOKS, min(_APART, steps // _APART))
    settings = Settings(steps, every, learning_rate, optimizer, schedule, clip, patience, max_skips)
    report = Report(progress, logger) if processes.first else Report(progress=False, logger=None)
    with randomness.own_numbers(seed):
        task = Task(model, guide, elbo, train, held, settings, processes, tempering, seed)
        check_finite(task)
        if whiten:
            task.find_start()
        done = _carried_out(task, restarts, ladder, checkpoints, report)
    return FitResult.of(task, done, checkpoints.seconds)


def _carried_out(
    task: Task, restarts: int, ladder: Sequence[Family], checkpoints: Checkpoints, report: Report
) -> Done:
    """What was done in the end, from where a checkpoint was written."""
    rungs = check_ladder(task.guide, ladder)
    resumed = checkpoints.identify(identity(task, restarts, rungs))
    if resumed is None:
        done, run, weights = Done(), None, None
    else:
        done, run, weights = Done.of(resumed["done"]), resumed["run"], resumed["weights"]
    stages = Stages(Legs(task, done, run, checkpoints, report), restarts, rungs)
    if weights is not None:
        task.weights.load(weights)
    if not done.ended_by:
        stages.go()
    report.finish()
    return done
