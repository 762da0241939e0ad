"""Handles signals that end a run between two steps, and ends a run that hangs."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator

import jax
from absl import logging

from gigatok_jax.run import processes

LOST = 75  # exit status when another process is gone or stuck: the same command may help


class Interrupts:
    """Context manager that notes Ctrl-C and SIGTERM, so that a loop can end between two steps.

    A second signal of the same kind acts at once, by the handler from before the run. Several
    processes exchange their signals with every step and read them one step late, so all processes
    end after the same step, whichever process got the signal.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received: int | None = None
        self._before = {}
        self._largest: jax.Array | None = None  # of all processes, asked for a step ago

    def __enter__(self) -> "Interrupts":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Returns whether all processes end after this step, because one of them got a signal.

        Every process calls this method once in each step.
        """
        if jax.process_count() == 1:
            return bool(self.received)
        before, self._largest = self._largest, processes.largest(self.received or 0)
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


class Watchdog:
    """Context manager that ends a process which has finished nothing for too long.

    The watchdog first prints the stacks of the threads. A collective that one process never enters
    holds all others for ever, so all processes end.
    """

    def __init__(self, minutes: float):
        """Sets how long the process may go without finishing anything.

        Args:
            minutes: limit, longer than the longest compilation or save; 0 turns the watchdog off.
        """
        self._seconds, self._last = minutes * 60, time.monotonic()
        self._stopped = threading.Event()

    def beat(self) -> None:
        """Notes that the process has finished something; the watchdog's time starts anew."""
        self._last = time.monotonic()

    def hears(self, items: Iterable) -> Iterator:
        """Yields the items of an iterable, and notes with each item that something was finished."""
        for item in items:
            self.beat()
            yield item

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        period = min(self._seconds / 4, 10)
        while not self._stopped.wait(period):
            if (quiet := time.monotonic() - self._last) > self._seconds:
                self._tell(quiet)
                if jax.process_count() > 1:  # jax ends the others with this one: let them tell too
                    self._stopped.wait(2 * period + 5)
                os._exit(LOST)

    def _tell(self, quiet: float) -> None:
        print(
            f"{processes.name()} has finished nothing for {quiet / 60:.1f} min"
            " (config.cluster.hang_minutes); where its threads are:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
