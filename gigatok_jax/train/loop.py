"""What every training loop needs: signals, and numbers that arrive one step late."""

import signal
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging

from gigatok_jax.errors import NonFiniteError


class Interrupts:
    """Notes Ctrl-C and SIGTERM, so that the loop can end between two steps.

    A second signal of the same kind acts at once, as if nobody had asked for the first.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received: int | None = None
        self._before = {}

    def __enter__(self) -> "Interrupts":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        del frame
        self.received = number
        signal.signal(number, self._before[number])
        name = signal.Signals(number).name
        logging.warning("%s: the run ends after this step, with its state saved", name)


class LateScalars:
    """Metrics of each step, fetched while the next one runs, and refused when not finite."""

    def __init__(self):
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None

    def push(self, step: int, scalars: Mapping[str, jax.Array]):
        """Takes the arrays of a step that was started; gives the step before it, or None."""
        ready, self._pending = self.pop(), (step, scalars)
        return ready

    def pop(self) -> tuple[int, dict[str, float]] | None:
        """Waits for the last step: its number and its finite values.

        Raises:
            NonFiniteError: a value is not a number or infinite; the first such name is told.
        """
        if self._pending is None:
            return None
        (step, scalars), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        check_finite(step, values)
        return step, values


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises NonFiniteError for the first value that is not finite, single terms before sums."""
    sums = ("loss", "gradient_norm", "discriminator_loss", "discriminator_gradient_norm")
    for name in sorted(values, key=lambda name: name in sums):
        if not np.isfinite(values[name]):
            raise NonFiniteError(
                f"step {step}: {name} is {values[name]}; the last checkpoint is from before."
                " Lower optim.learning_rate or optim.clip, or look at the images of this step"
            )
