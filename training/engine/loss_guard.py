"""Stops a training that has gone wrong before it spoils its checkpoint; every loop asks it after
every step.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.engine.checkpoint import DivergedError, load_metadata

_MOST_NAMES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class LossGuardConfig:
    """When a loss that is still a number counts as diverged."""

    window: int = 20
    """Steps whose mean is looked at, at least 1: a single bad batch stops nothing."""
    factor: float = 20.0
    """That mean is this many times, above 1, the mean of all steps before. Losses weighted by
    scores grow a few times in a healthy training; a diverging one grows without end."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.factor <= 1:
            raise ValueError(
                f"window must be at least 1 and factor above 1, got {self.window} and {self.factor}"
            )


class LossGuard:
    """Watches the loss of one run; a resumed run begins with an empty history."""

    def __init__(
        self, checkpoint: Path, config: LossGuardConfig | None = None, *, counts: str = "steps"
    ) -> None:
        """Watch a run whose checkpoint is written to ``checkpoint``, with its number of ``counts``
        as its step.
        """
        self._checkpoint = checkpoint
        self._counts = counts
        self._config = LossGuardConfig() if config is None else config
        self._recent: deque[float] = deque(maxlen=self._config.window)
        self._sum = 0.0
        self._count = 0

    def check(self, loss: float, *, step: int, images: Sequence[str]) -> None:
        """Raise ``DivergedError`` if the run must stop; call it before the step's checkpoint.

        Args:
            loss: Of the step.
            step: 0-based.
            images: Names or ids of the images of the step's batch.
        """
        if not math.isfinite(loss):
            raise DivergedError(self._message(f"the loss is {loss}", step, images))
        if len(self._recent) == self._config.window:
            self._sum += self._recent[0]
            self._count += 1
        self._recent.append(loss)
        if not self._count:
            return
        before, now = self._sum / self._count, sum(self._recent) / len(self._recent)
        if now > self._config.factor * before > 0:
            what = (
                f"the loss diverges: its mean over the last {self._config.window} steps is "
                f"{now:.3g}, over all steps before {before:.3g}"
            )
            raise DivergedError(self._message(what, step, images))

    def _message(self, what: str, step: int, images: Sequence[str]) -> str:
        shown = ", ".join(images[:_MOST_NAMES])
        more = f" and {len(images) - _MOST_NAMES} more" if len(images) > _MOST_NAMES else ""
        return (
            f"step {step}: {what}. Images of the step: {shown}{more}. {self._last_checkpoint()} "
            "Look at these images and boxes, or lower the learning rate (in another folder)."
        )

    def _last_checkpoint(self) -> str:
        if not self._checkpoint.is_file():
            return "No checkpoint was written yet."
        step = load_metadata(self._checkpoint)["step"]
        return f"The last good checkpoint is {self._checkpoint}, after {step} {self._counts}."
