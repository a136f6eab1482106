"""Progress of long loops: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType

from tqdm import tqdm

from in2core_jax.errors import printable

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
_silent = contextvars.ContextVar("silent", default=False)


@contextlib.contextmanager
def silent() -> Iterator[None]:
  """Inside of it no loop shows progress: for what takes seconds and has a line of its own."""
  token = _silent.set(True)
  try:
    yield
  finally:
    _silent.reset(token)


class Progress:
  """Shows how far a loop is, its rate and the time left.

      with Progress(len(dataset), "scores", "examples") as progress:
        for rows, batch in batches:
          ...
          progress.update(len(rows), loss=loss)

  On a terminal this is a tqdm bar on stderr; elsewhere (CI, nohup) the logger gets a line every ten seconds and one at
  the end. The rate counts only what this run did, not what it found done.
  """

  def __init__(self, total: int | None, what: str, unit: str = "examples", initial: int = 0, every: float = 0.0):
    """
    Args:
      total: how many units the whole loop has; None when not known.
      what: what the loop computes, in a word or two.
      unit: what is counted, plural.
      initial: units that an earlier run has done.
      every: seconds between two lines in a log; 0: ten.
    """
    self.total, self.what, self.unit, self.count = total, printable(what), unit, initial
    self._initial, self._every = initial, every
    self._start = self._last_line = time.monotonic()
    self._shown: dict[str, object] = {}
    self._last_count: int | None = None
    self._bar, self._silent = None, _silent.get()
    if sys.stderr.isatty() and not self._silent:
      self._bar = tqdm(
        total=total, desc=self.what, unit=f" {unit}", initial=initial, dynamic_ncols=True, file=sys.stderr
      )

  def update(self, count: int = 1, **shown: object) -> None:
    """Counts `count` more units; `shown` are figures to show beside them (a loss, a residual)."""
    self.count += count
    self._shown = shown or self._shown
    if self._bar is not None:
      self._bar.set_postfix_str(_figures(self._shown), refresh=False)
      self._bar.update(count)
    elif not self._silent and time.monotonic() - self._last_line >= (self._every or SECONDS_BETWEEN_LINES):
      self._last_line, self._last_count = time.monotonic(), self.count
      log.info("%s", self.line())

  def expect(self, total: int) -> None:
    """Another total, as it has become known: the time that is left follows from it."""
    self.total = max(total, self.count)
    if self._bar is not None:
      self._bar.total = self.total
      self._bar.refresh()

  def skip(self, count: int) -> None:
    """Counts units that an earlier run has done: they are none of this run's rate."""
    self.count += count
    self._initial += count
    if self._bar is not None:
      self._bar.initial += count
      self._bar.update(count)

  def line(self) -> str:
    """The state in one line: `scores: 120/1000 examples, 35.2 examples/s, 0:25 left, loss 1.73`."""
    seconds = time.monotonic() - self._start
    done = self.count - self._initial
    parts = [f"{self.what}: {self.count}{'' if self.total is None else f'/{self.total}'} {self.unit}"]
    if done and seconds > 0:
      rate = done / seconds
      parts.append(f"{_round(rate)} {self.unit}/s" if rate >= 1 else f"{_round(1 / rate)} s each")
      if self.total is not None and self.count < self.total:
        parts.append(f"{_clock((self.total - self.count) / rate)} left")
      elif self.count == self.total:
        parts.append(f"took {_clock(seconds)}")
    return ", ".join([*parts, *([_figures(self._shown)] if self._shown else [])])

  def close(self) -> None:
    """Ends the bar, or logs the last line."""
    if self._bar is not None:
      self._bar.close()
    elif not self._silent and self._last_count != self.count:  # the last update may have said it all
      log.info("%s", self.line())

  def __enter__(self) -> Progress:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self.close()


def _figures(shown: dict[str, object]) -> str:
  return ", ".join(
    f"{name} {value:.4g}" if isinstance(value, float) else printable(f"{name} {value}") for name, value in shown.items()
  )


def _round(value: float) -> str:
  return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def track(source: Iterable, total: int, what: str) -> Iterator:
  """Wraps an iterator of batches with a progress display."""
  with Progress(total, what, "batches") as progress:
    for item in source:
      yield item
      progress.update(1)
