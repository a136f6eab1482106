"""What a data flag names -> its sources: `NAME=KIND:PLACE*SHARE`, joined by `+`; name and share may be left out."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re

from in2core_jax.errors import UserError

_KINDS = ("jsonl", "file", "tfds", "hub")  # besides chatterbot, which can stand alone, and - for standard input
_WORD = rf"(?:chatterbot(?:[:+*]|$)|(?:{'|'.join(_KINDS)}):|-(?:[+*]|$))"
_NAME = r"[A-Za-z][\w.-]*"
_JOINED = re.compile(rf"\+(?=(?:{_NAME}=)?{_WORD})")
_SHARE = re.compile(r"(.+)\*(\d*\.?\d+(?:e-?\d+)?)", re.DOTALL | re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Source:
  """One source of a pool.

  Attributes:
    text: as it was written, with `jsonl:` in front of a bare path and without name and share.
    kind: chatterbot, file, tfds or hub; or the unknown word.
    place: what follows the kind: a path, topics, a data set.
    name: that the user gave it, or "".
    share: of its conversations that are drawn, above 0 and at most 1.
  """

  text: str
  kind: str
  place: str
  name: str = ""
  share: float = 1.0

  @property
  def labels(self) -> tuple[str, ...]:
    """The words by which a flag can name it."""
    bare = re.sub(r"^(jsonl|file):", "", self.text)
    return tuple(dict.fromkeys(filter(None, (self.name, self.text, bare, f"jsonl:{bare}", f"file:{bare}"))))

  @property
  def origin(self) -> str:
    """What stands for it in tables: its name, or else its path or data set."""
    if self.name or self.kind == "chatterbot":
      return self.name or "chatterbot"
    return str(pathlib.PurePath(self.place)) if self.kind == "file" else self.text.partition("@")[0]

  @property
  def has_columns(self) -> bool:
    """Whether its records have columns, which `data_fields` can name."""
    return self.kind != "chatterbot"


def sources_of(spec: str) -> list[Source]:
  """The sources that a flag names.

  A path that is there is taken as it is, whatever signs it has: a `+`, `=` or `*` in it belongs to its name.

  Raises:
    UserError: a share that is none, or a name that two sources have.
  """
  found: list[Source] = []
  for part in _JOINED.split(spec):
    pieces = part.split("+") if not _is_there(part) else [part]
    # A + belongs to the name of a file unless what it parts are all sources.
    found += map(_source, pieces if len(pieces) > 1 and all(map(_is_source, pieces)) else [part])
  origins = [source.origin for source in found]
  for source in found:
    if (source.name or source.share < 1) and origins.count(source.origin) > 1:
      raise UserError(
        f"{spec}: two sources are called {source.origin!r}; give each its own name: one={source.text}+two=..."
      )
  return found


def _taken_apart(part: str) -> tuple[str, str, str | None]:
  """(name or "", source, share as written or None)."""
  if _is_there(part):
    return "", part, None
  name, rest = "", part
  named = re.match(rf"({_NAME})=(.+)", part, re.DOTALL)
  if named:
    name, rest = named[1], named[2]
  shared = _SHARE.fullmatch(rest)
  if shared and not _is_there(rest):
    return name, shared[1], shared[2]
  return name, rest, None


def _source(part: str) -> Source:
  name, text, written = _taken_apart(part)
  if not re.match(_WORD, text) and (_is_there(text) or _is_pattern(text)):
    text = f"jsonl:{text}"
  kind, _, place = text.partition(":")
  if kind == "-":
    kind, place = "file", "-"
  elif kind == "jsonl":
    kind = "file"
  return Source(text, kind, place, name, _share_of(text, written))


def _share_of(text: str, written: str | None) -> float:
  if written is None:
    return 1.0
  share = float(written)
  if share > 1:
    raise UserError(
      f"{text}*{written}: a source is never repeated, so that its share is at most 1; give the other sources smaller "
      "shares instead"
    )
  if not share > 0:
    raise UserError(f"{text}*{written}: a share of 0 leaves nothing of it; leave the source out")
  return share


def _is_source(part: str) -> bool:
  _, text, _ = _taken_apart(part)
  return (
    _is_there(text) or _is_pattern(text) or (not re.match(r"(jsonl|file):", text) and re.match(_WORD, text) is not None)
  )


def _is_pattern(text: str) -> bool:
  return ":" not in text and any(sign in text for sign in "*?[")


def _is_there(text: str) -> bool:
  path = re.sub(r"^(jsonl|file):", "", text)
  try:
    return bool(path) and os.path.lexists(os.path.expanduser(path))
  except ValueError:  # a zero byte
    return False
