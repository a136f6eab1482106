"""The one error type that entry points turn into a single line and exit code 2; words and text for people."""

import re

# Controls (C0 but the space, DEL, C1), line and paragraph separators, marks that turn the direction of a text, the
# byte-order mark, halves of surrogate pairs: what moves a cursor, hides or reorders text, or cannot be written.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

_AGREEING = re.compile(r"\[(?:([^|\]]*)\|)?([^\]]*)\]")  # [one|many] or [many]


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


def how_many(count: int, what: str) -> str:
  """A count and the words that agree with it.

  `how_many(n, "file")` is "1 file" or "2,000 files"; `how_many(n, "quer[y|ies] [has|have] no text")` is "1 query has no
  text" or "2 queries have no text".

  Args:
    count: of what is told.
    what: [one|many] stands for what follows the number 1 and any other number, [many] for what follows any other;
      without brackets an s is added.
  """
  words = what if "[" in what else f"{what}[s]"
  return f"{count:,} " + _AGREEING.sub(lambda match: (match[1] or "") if count == 1 else match[2], words)
