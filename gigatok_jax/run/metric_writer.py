"""Writes the numbers of a run, on process 0: metrics.jsonl, TensorBoard events, progress lines.

Keys are `<prefix>/<name>`. Values under `time/` depend on the machine and cannot be reproduced.
"""

import collections
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

import jax
import numpy as np
import tensorboardX
from etils import epath

from gigatok_jax import files
from gigatok_jax.errors import GigatokError

FILE = "metrics.jsonl"
PROGRESS_SECONDS = 5.0  # between two lines of `Progress`


class StepTimer:
    """Timer of the share of wall time that each activity takes; the rest of the time is `other`."""

    def __init__(self):
        self._start = self._mark = time.perf_counter()
        self._total: collections.Counter[str] = collections.Counter()
        self._interval: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Adds the time that a `with` block takes to an activity; blocks do not nest."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._total[activity] += seconds
            self._interval[activity] += seconds

    def interval(self) -> tuple[float, dict[str, float]]:
        """Returns the seconds since the last call, and each activity's share of them in [0, 1].

        Starts a new interval; the first interval starts when the timer is created.
        """
        now = time.perf_counter()
        seconds, measured = now - self._mark, self._interval
        self._mark, self._interval = now, collections.Counter()
        return seconds, _shares(measured, seconds)

    def total(self) -> tuple[float, dict[str, float]]:
        """Returns the seconds since the timer was created, and each activity's share in [0, 1]."""
        seconds = time.perf_counter() - self._start
        return seconds, _shares(self._total, seconds)


class Progress:
    """Progress report of long work: a line every few seconds with amount, speed and time left.

    The first piece often compiles too: the speed leaves that piece out as soon as others have
    followed.
    """

    def __init__(
        self, what: str, total: float, unit: str, *, done: float = 0, file: TextIO | None = None
    ):
        """Starts the clock of the work, and counts the amount that earlier runs have done.

        Args:
            what: name of the work, the first word of each line.
            total: amount of all work, including that of earlier runs.
            unit: unit of `total`, such as "images" or "GB".
            done: amount that earlier runs have done.
            file: stream for the lines; None is the standard output.
        """
        self._what, self._total, self._unit, self._done, self._file = what, total, unit, done, file
        self._start = self._shown = time.perf_counter()
        self._first: tuple[float, float] | None = None  # amount and seconds of the first piece
        self._added = 0.0

    @property
    def seconds(self) -> float:
        """Number of seconds since the clock of the work was started."""
        return time.perf_counter() - self._start

    @property
    def rate(self) -> float:
        """Amount of work done per second; 0 before the first piece.

        The first piece is left out if others have followed.
        """
        amount, seconds = self._first or (0.0, 0.0)
        if self._added > amount:
            amount, seconds = self._added - amount, self.seconds - seconds
        return amount / max(seconds, 1e-9)

    def add(self, amount: float) -> None:
        """Counts a piece of work as done, and prints a line every few seconds and at the end."""
        self._added, self._done = self._added + amount, self._done + amount
        self._first = self._first or (amount, self.seconds)
        now = time.perf_counter()
        if now - self._shown >= PROGRESS_SECONDS or self._done >= (1 - 1e-9) * self._total:
            self._shown = now
            print(self._line(), file=self._file, flush=True)

    def _line(self) -> str:
        form = "d" if isinstance(self._total, int) else ".2f"
        left = duration(max(self._total - self._done, 0) / max(self.rate, 1e-9))
        amounts = f"{self._what} {self._done:{form}}/{self._total:{form}} {self._unit}"
        return f"{amounts} | {self.rate:.3g} {self._unit}/s | {left} left"


def count_bytes(what: str, total: int) -> Callable[[int], None]:
    """Starts a `Progress` in GB on stderr, and returns a function that counts a piece as done.

    Sizes of all work and of a piece are numbers of bytes.
    """
    progress = Progress(what, total / 1e9, "GB", file=sys.stderr)
    return lambda count: progress.add(count / 1e9)


class MetricWriter:
    """Writer that appends the metrics of a run to its workdir; only process 0 writes."""

    def __init__(self, workdir: epath.PathLike, total_steps: int, images_per_step: int):
        """Creates the workdir; files are opened later, since a resumed run may truncate them.

        Args:
            workdir: folder of the run, created if missing.
            total_steps: number of optimizer updates of the whole run.
            images_per_step: number of images of a global batch.
        """
        self.workdir = epath.Path(workdir)
        self._total_steps, self._images_per_step = total_steps, images_per_step
        self._active = jax.process_index() == 0
        self._events: tensorboardX.SummaryWriter | None = None
        self._resumed: int | None = None
        self._last_step = 0
        if self._active:
            self.workdir.mkdir(parents=True, exist_ok=True)

    def truncate_after(self, step: int) -> None:
        """Removes the metrics of all steps after a restored step, and a half-written last line.

        Nothing is lost if the metrics of a step are written before its checkpoint is saved.
        """
        self._resumed = self._last_step = step
        path = self.workdir / FILE
        if self._active and path.exists():
            kept = [json.dumps(row) + "\n" for row in read(self.workdir) if row["step"] <= step]
            files.write_bytes(path, "".join(kept).encode())

    def write(self, step: int, scalars: Mapping[str, float], prefix: str) -> None:
        """Appends a line `{"step": ..., "<prefix>/<name>": ...}` to metrics.jsonl, and adds events.

        Values that are not finite are null in the file, and left out of the TensorBoard events.

        Args:
            step: number of optimizer updates done.
            scalars: numbers or arrays without axes.
            prefix: group such as "train", "eval" or "time".

        Raises:
            GigatokError: the file cannot be written.
        """
        if not self._active:
            return
        values = {f"{prefix}/{name}": float(value) for name, value in scalars.items()}
        row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        try:
            with (self.workdir / FILE).open("a") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._tensorboard().add_scalar(name, value, step)
        except OSError as error:
            raise GigatokError(f"{self.workdir / FILE} cannot be written: {error}") from error

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Adds a picture uint8[h, w, 3] to the TensorBoard events of a run."""
        if self._active:
            self._tensorboard().add_image(name, picture, step, dataformats="HWC")

    def progress(self, step: int, losses: Mapping[str, float], timer: StepTimer) -> None:
        """Prints a line about the steps since the last call, and writes their `time/` metrics.

        Args:
            step: number of optimizer updates done.
            losses: numbers to print, in their order.
            timer: timer of the run, whose interval is read and restarted.
        """
        seconds, shares = timer.interval()
        steps, self._last_step = step - self._last_step, step
        if not self._active or steps <= 0:
            return
        speed = steps * self._images_per_step / seconds
        left = (self._total_steps - step) * seconds / steps
        times = {"images_per_second": speed, "step_seconds": seconds / steps}
        times |= {f"{activity}_share": share for activity, share in shares.items()}
        memory = peak_memory()
        self.write(step, times | memory, "time")
        usage = [f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005]
        usage += [f"memory {gib:.1f} GiB" for gib in memory.values()]
        numbers = [f"{name} {float(value):.4g}" for name, value in losses.items()]
        head = f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"
        line = [head, f"{speed:.1f} images/s", f"{duration(left)} left", " ".join(usage)]
        print(" | ".join([*line, " ".join(numbers)]), flush=True)

    def close(self) -> None:
        """Flushes and closes the TensorBoard events of a run."""
        if self._events:
            self._events.close()

    def _tensorboard(self) -> tensorboardX.SummaryWriter:
        if self._events is None:
            purge = None if self._resumed is None else self._resumed + 1
            # The suffix: a run that is resumed within a second must not replace its own file.
            self._events = tensorboardX.SummaryWriter(
                str(self.workdir),
                purge_step=purge,
                flush_secs=30,
                filename_suffix=f".{self._last_step}",
            )
        return self._events


def read(workdir: epath.PathLike) -> list[dict[str, float | None]]:
    """Reads the rows of a run's metrics.jsonl in order, without damaged lines.

    Returns an empty list if the file does not exist.
    """
    path = epath.Path(workdir) / FILE
    rows = []
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
    return rows


def peak_memory() -> dict[str, float]:
    """Returns the largest use of memory on the first device, {"peak_memory_gib": GiB}.

    The dict is empty where the device does not report memory, as on a CPU.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {} if peak is None else {"peak_memory_gib": peak / 2**30}


def duration(seconds: float) -> str:
    """Formats a number of seconds as "42 s", "12 min", "3 h 05 min" or "2 d 04 h"."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02d} h"


def _shares(measured: Mapping[str, float], seconds: float) -> dict[str, float]:
    seconds = max(seconds, 1e-9)
    shares = {activity: value / seconds for activity, value in measured.items()}
    return shares | {"other": max(0.0, 1 - sum(shares.values()))}
