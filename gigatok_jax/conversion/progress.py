"""A bar of bytes on stderr."""

import sys
import time

WIDTH = 30  # characters
EVERY = {True: 0.5, False: 10.0}  # seconds between two looks, of a terminal and of a file


class Progress:
    """Counts bytes towards a total; call it with those of each piece."""

    def __init__(self, total: int, what: str):
        self._total, self._what = max(total, 1), what
        self._live = sys.stderr.isatty()
        self._done, self._start = 0, time.monotonic()
        self._shown = self._start

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._shown >= EVERY[self._live] or self._done == self._total:
            self._shown = now
            self._show(now - self._start)

    def _show(self, seconds: float) -> None:
        share = min(self._done / self._total, 1.0)
        bar = f"[{'#' * round(share * WIDTH):{WIDTH}}]"
        speed, left = self._done / max(seconds, 1e-9), seconds / share - seconds
        last = self._done >= self._total
        print(
            f"{self._what} {bar} {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB,"
            f" {speed / 1e6:.0f} MB/s, {seconds:.0f} s, {left:.0f} s left",
            end="\n" if last or not self._live else "\r",
            file=sys.stderr,
            flush=True,
        )
