"""Signals that end a run between two steps."""

import signal

import jax
from absl import logging

from gigatok_jax.run import processes


class Interrupts:
    """Notes Ctrl-C and SIGTERM, so that the loop can end between two steps.

    A second signal of the same kind acts at once, as if nobody had asked for the first. Of several
    processes each tells the others with every step, and hears them one step late: so all end after
    the same step, whoever got the signal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received: int | None = None
        self._before = {}
        self._told: jax.Array | None = None  # with the step before

    def __enter__(self) -> "Interrupts":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether all processes end after this step; called once in each."""
        if jax.process_count() == 1:
            return bool(self.received)
        before, self._told = self._told, processes.largest(self.received or 0)
        if before is not None and int(before):
            self.received = int(before)
            return True
        return False

    def _note(self, number, frame) -> None:
        del frame
        self.received = number
        signal.signal(number, self._before[number])
        name = signal.Signals(number).name
        logging.warning("%s: the run ends after this step, with its state saved", name)
