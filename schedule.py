"""How long to train, and at what rate: stretches by epochs or by the clock, and the schedules over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from config import Train


@dataclass(frozen=True)
class Stretch:
    """A stretch of training with one schedule over it.

    Attributes
    ----------
    start, target : int
        Epochs done before it, and at its end; `target` is 0 where the clock decides.
    minutes : float
        Wall time of the stretch; 0 where epochs decide.
    elapsed : float
        Seconds of it that are spent, over all interruptions.
    """

    start: int
    target: int
    minutes: float = 0.0
    elapsed: float = 0.0

    def progress(self, epoch: float, elapsed: float) -> float:
        """How much of the stretch is done, 0 to 1, after `epoch` epochs (with fractions) and `elapsed` seconds."""
        if self.minutes:
            return min(elapsed / (60 * self.minutes), 1.0)
        return min((epoch - self.start) / max(self.target - self.start, 1), 1.0)

    def done(self, epoch: int) -> bool:
        return self.elapsed >= 60 * self.minutes if self.minutes else epoch >= self.target


def plan_stretch(
    epoch: int, saved: Stretch | None, n_epoch: int | None, minutes: float | None, train: Train, changed: bool = False
) -> Stretch:
    """What to train now.

    Parameters
    ----------
    epoch : int
        Epochs done.
    saved : Stretch or None
        The stretch of the checkpoint.
    n_epoch, minutes : optional
        What the user asked for on the command line.
    changed : bool
        The user has set another length in `train` than the checkpoint was trained for.

    Raises
    ------
    ValueError
        Less than nothing is asked for.

    Notes
    -----
    The stretch of the checkpoint goes on to its end when nothing else is asked for, or the same again; so a command
    that is simply repeated after a crash ends where it would have ended. Else what is asked for counts from here.
    """
    for name, value in (("--epoch", n_epoch), ("--minutes", minutes)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} {value}: wanted more than 0")
    asked = minutes is not None or n_epoch is not None
    if saved is not None and not asked and not changed:
        return saved
    if saved is not None and asked and not saved.done(epoch):
        if minutes is not None and saved.minutes == minutes:
            return saved
        if minutes is None and not saved.minutes and saved.target - saved.start == n_epoch:
            return saved
    if n_epoch is not None:
        return Stretch(epoch, epoch + n_epoch)
    if minutes is not None or train.minutes:
        return Stretch(epoch, 0, minutes or train.minutes)
    return Stretch(epoch, max(train.n_epoch, epoch))


def _constant(progress: float, epoch: int, train: Train) -> float:
    return 1.0


def _step(progress: float, epoch: int, train: Train) -> float:
    return train.step_factor ** (epoch // train.step_epochs)


def _onecycle(progress: float, epoch: int, train: Train) -> float:
    """Up and down in straight lines (Smith and Topin 2017, arXiv:1708.07120)."""
    if progress < train.warm_up:
        return progress / train.warm_up
    return (1 - progress) / max(1 - train.warm_up, 1e-9)


def _cosine(progress: float, epoch: int, train: Train) -> float:
    """Up in a straight line, down along a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    if progress < train.warm_up:
        return progress / train.warm_up
    return 0.5 * (1 + math.cos(math.pi * (progress - train.warm_up) / max(1 - train.warm_up, 1e-9)))


#: (progress in [0, 1], epoch, settings) -> factor on the learning rate; without a state of its own, so a resume is
#: exact
SCHEDULES: dict[str, Callable[[float, int, Train], float]] = {
    "constant": _constant,
    "step": _step,
    "onecycle": _onecycle,
    "cosine": _cosine,
}
