"""The one error type that entry points turn into a single line and exit code 2, and text that a terminal can show."""

import re

# Controls (C0 but the space, DEL, C1), line and paragraph separators, marks that turn the direction of a text, the
# byte-order mark, halves of surrogate pairs: what moves a cursor, hides or reorders text, or cannot be written.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


class UserError(ValueError):
  """A mistake in what the caller gave: a flag, a file, a checkpoint, a data set.

  The message says what was seen (file, line, id, value), why it is wrong and what to do about it, in one line.
  Entry points print it without a traceback and exit with code 2; anything else that is raised is our own bug.
  """


def printable(text: str) -> str:
  r"""Writes control characters, line separators and bidirectional marks as escapes (\x1b, \u202e); the rest stays."""
  return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(error: BaseException, most: int = 300) -> str:
  """What a library's error says, in one line of at most so many characters; its class where it says nothing."""
  return " ".join(str(error).split())[:most] or type(error).__name__
