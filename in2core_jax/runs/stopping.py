"""SIGTERM: the piece of work under way is finished, the rest is for the next start."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)


class Terminated(BaseException):
  """SIGTERM arrived. Like KeyboardInterrupt not an Exception: code that handles errors must not swallow it."""


def terminate(number: int, frame: object) -> None:
  """The handler of SIGTERM while no loop asks to finish its piece."""
  raise Terminated


@contextlib.contextmanager
def finish_on_sigterm() -> Iterator[Callable[[], bool]]:
  """Lets a loop end its piece of work when SIGTERM (a preemption) arrives, instead of being cut off in it.

      with stopping.finish_on_sigterm() as stop_requested:
        for index in shards:
          ...
          if stop_requested():
            break

  Yields a function: whether SIGTERM has arrived, in whichever process of the job; collective. The command exits with
  143 after the block; a second SIGTERM ends it at once.
  """
  from in2core_jax.parallel import processes

  requested = False

  def stop_requested() -> bool:
    nonlocal requested
    stop = not processes.all_true(not requested)
    if stop:  # and never back to False: the signal may arrive while the others are asked
      requested = True
    return stop

  def handle(number: int, frame: object) -> None:
    nonlocal requested
    if requested:
      raise Terminated
    requested = True
    log.warning("SIGTERM: finishing the piece under way, then stopping (a second SIGTERM stops at once)")

  before = signal.signal(signal.SIGTERM, handle)
  try:
    yield stop_requested
  finally:
    signal.signal(signal.SIGTERM, before)
  if stop_requested():  # asked of all once more: one process must not leave alone when the signal came late
    raise Terminated
