"""What a command tells people: standard output and error that may be lost, and text that cannot steer a terminal.

A log on a full disk, or a pipe whose reader has gone, ends no job: what can no longer be told there is written into
`log_lost.txt` in the run folder, and the work goes on.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from in2core_jax.errors import printable
from in2core_jax.runs import locks

LOST_LOG = "log_lost.txt"  # `run_folder.LOST_LOG`, whose import is slow
_MOST_WAITING = 1000  # lines that are kept until there is a run folder to write them into


def printable_lines(text: str) -> str:
  """`printable`, line breaks kept."""
  return "\n".join(printable(line) for line in text.split("\n"))


class Formatter(logging.Formatter):
  """Log lines whose texts cannot steer a terminal."""

  def format(self, record: logging.LogRecord) -> str:
    """The line, escaped."""
    return printable_lines(super().format(record))


class Handler(logging.Handler):
  """Plain lines on stderr, above a progress bar when there is one."""

  def __init__(self, told: Callable[[BaseException], bool] = lambda error: False):
    """
    Args:
      told: whether an error ends the command in one line: the traceback that a library logs of it is left out.
    """
    super().__init__()
    self._told = told

  def emit(self, record: logging.LogRecord) -> None:
    """Writes the line."""
    if record.exc_info and record.exc_info[1] is not None and self._told(record.exc_info[1]):
      return
    tqdm.write(self.format(record), file=sys.stderr)


class Stream(io.TextIOBase):
  """Standard output or error: writes as the stream does until that fails, then into the run folder.

  Attributes:
    error: why the stream was lost; None while it is not. A reader that has seen enough (`| head`) is BrokenPipeError.
  """

  def __init__(self, stream: TextIO | None, name: str, escaped: bool):
    """
    Args:
      stream: `sys.stdout` or `sys.stderr`; None where it was closed before the start.
      name: stdout or stderr.
      escaped: whether whole texts are made `printable` here; not where a progress bar moves the cursor.
    """
    self._stream, self._name, self._escaped = stream, name, escaped
    self._waiting: list[str] = []
    self.error: Exception | None = None
    if stream is None:
      self.error = OSError("it was closed")
    elif hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="backslashreplace")  # a locale without UTF-8 is no reason to stop

  @property
  def encoding(self) -> str:
    """Of the stream."""
    return getattr(self._stream, "encoding", None) or "utf-8"

  @property
  def buffer(self) -> object:
    """The stream's own."""
    return self._stream.buffer

  def writable(self) -> bool:
    """Always: what cannot be written there is written elsewhere."""
    return True

  def isatty(self) -> bool:
    """Whether a person looks at it."""
    return self.error is None and self._stream.isatty()

  def fileno(self) -> int:
    """Of the stream."""
    if self._stream is None:
      raise io.UnsupportedOperation("fileno")
    return self._stream.fileno()

  def write(self, text: str) -> int:
    """Writes and, at the end of a line, flushes, so that a loss is known when it happens."""
    shown = printable_lines(text) if self._escaped else text
    if self.error is None:
      try:
        self._stream.write(shown)
        if "\n" in shown:
          self._stream.flush()
        return len(text)
      except (OSError, ValueError) as error:  # ValueError: closed
        self._lose(error)
    self._keep(shown)
    return len(text)

  def flush(self) -> None:
    """Flushes; a loss is noted, not raised."""
    if self.error is None:
      try:
        self._stream.flush()
      except (OSError, ValueError) as error:
        self._lose(error)

  def _lose(self, error: Exception) -> None:
    """Notes the loss; what the buffers still hold must not fail once more at the exit."""
    self.error = error
    with contextlib.suppress(OSError, ValueError):
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)
    self._keep(f"--- {self._name} was lost ({error}); the job continues, and its messages are here ---\n")

  def _keep(self, text: str) -> None:
    """Appends to the file in the run folder; waits for one where there is none yet."""
    self._waiting = [*self._waiting[-_MOST_WAITING:], text]
    folder = next((path for path in locks.folders() if not locks.is_remote(path)), None)
    if folder is None:
      return
    text = "".join(self._waiting).encode("utf-8", "backslashreplace")
    # That disk may be full too: nothing is left then to tell it on.
    with contextlib.suppress(OSError), (Path(folder) / LOST_LOG).open("ab") as file:
      file.write(text)
    self._waiting = []


def guard() -> None:
  """Puts `Stream`s in the place of standard output and error, and escapes what tracebacks show."""
  if not isinstance(sys.stdout, Stream):
    sys.stdout = Stream(sys.stdout, "stdout", escaped=True)
  if not isinstance(sys.stderr, Stream):
    sys.stderr = Stream(sys.stderr, "stderr", escaped=False)  # tqdm moves the cursor there
  sys.excepthook = _show
  sys.unraisablehook = _pass_over_late_answers


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
  """A traceback in which no text of the data steers the terminal."""
  sys.stderr.write(printable_lines("".join(traceback.format_exception(kind, error, trace))))


def _pass_over_late_answers(unraisable: sys.UnraisableHookArgs) -> None:
  """Shows what could be raised nowhere, but for answers to a loop that has gone.

  The library that writes checkpoints gives one for each array that is still being written when another write has
  failed. That failure is raised, and told.
  """
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def loss(stream: TextIO | None) -> Exception | None:
  """Why a standard stream was lost, but for a reader that has seen enough or a stream that never was there."""
  if isinstance(stream, Stream) and stream.error is not None and stream._stream is not None:
    return None if isinstance(stream.error, BrokenPipeError) else stream.error
  return None
