"""JSON files as source records: JSON lines, one JSON array, or an object that holds one under `data`.

A line that cannot be read is one bad record. An array that breaks has no next element, so the whole file is refused.
Both are read piece by piece: no file is in memory as a whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from in2core_jax.data.file_kinds import DataFile
from in2core_jax.data.json_text import Decoder, Refused
from in2core_jax.data.records import BadRecords, Item, shorten
from in2core_jax.errors import UserError

_WHOLE = 50_000_000  # bytes of a file that is looked at as one object when its first line breaks
_PIECE = 1 << 20  # bytes that are read at once
# A value whose text is cut off breaks so near the end: `Infinit`, `\ud83`, `1e+`.
_CUT_OFF = 16
_LISTS = ("data", "records", "rows", "examples", "instances", "items")
_SCALAR = r'(?:"(?:[^"\\]|\\.)*"|[\w.+-]+)'
# {"data": [{ with nothing but numbers and texts before.
_WRAPPED = re.compile(rf'\s*\{{\s*(?:"[^"\\]*"\s*:\s*{_SCALAR}\s*,\s*)*"(?:{"|".join(_LISTS)})"\s*:\s*\[\s*\{{')


def json_items(file: DataFile, fields: Mapping[str, str], bad: BadRecords) -> Iterator[Item]:
  """Yields the elements of a JSON array, alone or as {"data": [...]}, or else of JSON lines.

  Args:
    file: what is read.
    fields: {role: column} of its records.
    bad: gets the lines that cannot be read.

  Raises:
    UserError: no text, a broken array, or damaged compression.
  """
  head = b""
  try:
    with file.open() as stream:
      while not head.strip() and (block := stream.read(1 << 16)):
        head = block
  except OSError as error:
    raise file.broken(1, error) from error
  head = head.removeprefix(b"\xef\xbb\xbf")
  if not head.strip():
    raise UserError(f"{file.shown} is empty; it must hold one JSON object a line, or one JSON array")
  if head.lstrip()[:1] == b"[":
    return _array_items(file, fields, bad)
  if _WRAPPED.match(head.decode("utf-8", "replace")) and not _first_line_is_a_value(file):
    return _wrapped_items(file, fields, bad)
  return _line_items(file, fields, bad)


def _first_line_is_a_value(file: DataFile) -> bool:
  """Whether the first line is JSON by itself and others follow: a record that happens to have a list called `data`."""
  with file.open() as stream:
    line, rest = stream.readline(_WHOLE), stream.read(1 << 16)
  try:
    Decoder().whole(line.decode("utf-8-sig"))
  except (UnicodeDecodeError, Refused):
    return False
  return bool(rest.strip())


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
  return f"byte {data[error.start]:#04x} is not UTF-8; save the file as UTF-8"


def numbered_lines(file: DataFile) -> Iterator[tuple[int, bytes]]:
  r"""Yields (1-based number, bytes) of each line, without a byte order mark and the end of the line.

  Lines end at \n and nowhere else: str.splitlines would also cut at U+2028 and its kin, which JSON allows in strings.

  Raises:
    UserError: the file cannot be read to its end.
  """
  number = 0
  try:
    with file.open() as stream:
      for number, data in enumerate(stream, 1):
        yield number, data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data
  except OSError as error:
    raise file.broken(number + 1, error) from error


def _line_items(file: DataFile, fields: Mapping[str, str], bad: BadRecords) -> Iterator[Item]:
  decoder, first = Decoder(), True
  for number, data in numbered_lines(file):
    data = data.removesuffix(b"\n").removesuffix(b"\r")
    if not data.strip():
      continue
    place, line = f"{file.shown}:{number}", data.decode("utf-8", "replace")
    try:
      line = data.decode("utf-8")
      value = decoder.whole(line)
    except UnicodeDecodeError as error:
      bad.read += 1
      bad.refuse(place, line, _not_utf8(data, error))
    except Refused as error:
      if first:
        _refuse_one_object(file)
      bad.read += 1
      bad.refuse(place, line, _why_broken(error, line))
    else:
      yield Item(value, line, file.shown, number, fields)
    first = False


def _why_broken(error: Refused, line: str) -> str:
  if error.position is None or "deep" in str(error):
    return f"{error}; mend or remove it"
  return (
    f"broken JSON ({error}) in {shorten(line, 80)!r}; each line must be one whole JSON object (or the file one JSON "
    "array)"
  )


def _refuse_one_object(file: DataFile) -> None:
  """Refuses a file that is one JSON object over several lines."""
  with file.open() as stream:
    data = stream.read(_WHOLE + 1)
  if len(data) > _WHOLE:
    return
  try:
    whole = Decoder().whole(data.decode("utf-8-sig"))
  except (UnicodeDecodeError, Refused):
    return
  if isinstance(whole, dict):
    lists = [key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    where = f"its list {lists[0]!r} may be what is meant: write that list alone" if lists else "write it on one line"
    raise UserError(f"{file.shown} is one JSON object over several lines, not one a line; {where}")


class _Text:
  """The text of a file, read on as it is needed; what has been used is dropped.

  Attributes:
    text: what is in memory.
    at: the character of it that is next.
  """

  def __init__(self, file: DataFile, stream: BinaryIO):
    self.text, self.at = "", 0
    self._file, self._stream = file, stream
    self._decode = codecs.getincrementaldecoder("utf-8-sig")()
    self._decoder = Decoder()
    self._line, self._counted, self._ended = 1, 0, False

  def line_of(self, at: int) -> int:
    """The 1-based line of a character that is not before an earlier one that was asked for."""
    self._line, self._counted = self._line + self.text.count("\n", self._counted, at), at
    return self._line

  def broken(self, what: str, at: int) -> UserError:
    """What is told of broken JSON at a character."""
    shown = shorten(self.text[at : at + 41], 40)
    return UserError(f"{self._file.shown}:{self.line_of(at)}: broken JSON array ({what}) at {shown!r}")

  def _more(self) -> bool:
    """Reads on, at least as much as is there, so that a long value is not read anew too often; False at the end."""
    if self._ended:
      return False
    self.line_of(self.at)
    self.text, self.at, self._counted = self.text[self.at :], 0, 0
    try:
      data = self._stream.read(max(_PIECE, len(self.text)))
      self._ended = not data
      self.text += self._decode.decode(data, final=not data)
    except UnicodeDecodeError as error:
      line = self.line_of(len(self.text)) + error.object.count(b"\n", 0, error.start)
      raise UserError(f"{self._file.shown}:{line}: {_not_utf8(error.object, error)}") from error
    except OSError as error:
      raise self._file.broken(self.line_of(len(self.text)), error) from error
    return True

  def next(self) -> str:
    """The next character that is no space, which is not used yet; "" at the end."""
    while True:
      while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
        self.at += 1
      if self.at < len(self.text) or not self._more():
        return self.text[self.at : self.at + 1]

  def expect(self, characters: str, what: str) -> str:
    """Uses the next character.

    Raises:
      UserError: it is none of these.
    """
    found = self.next()
    if not found or found not in characters:
      raise self.broken(f"expected {what}", self.at)
    self.at += 1
    return found

  def value(self) -> tuple[Any, str, int, str | None]:
    """Uses the next JSON value: (value, its text, its line, why it must not be used or None).

    Raises:
      UserError: broken JSON.
    """
    self.next()
    while True:
      try:
        found, end, problem = self._decoder.value_at(self.text, self.at)
        cut_off = end == len(self.text)
      except Refused as error:
        place = min(self.at if error.position is None else error.position, len(self.text))
        cut_off = place >= len(self.text) - _CUT_OFF or "Unterminated" in error.reason
        if not (cut_off and self._more()):
          # What was read on begins with this value.
          raise self.broken(error.reason, place) from error
        continue
      if not (cut_off and self._more()):
        break
    source_text, line = self.text[self.at : end], self.line_of(self.at)
    self.at = end
    return found, source_text, line, problem


def _array_items(file: DataFile, fields: Mapping[str, str], bad: BadRecords) -> Iterator[Item]:
  with file.open() as stream:
    text = _Text(file, stream)
    yield from _elements(text, file, fields, bad)
    if text.next():
      raise text.broken("text after the closing bracket", text.at)


def _elements(text: _Text, file: DataFile, fields: Mapping[str, str], bad: BadRecords) -> Iterator[Item]:
  """Yields the elements of the array that is next."""
  text.expect("[", "an opening bracket")
  closed = text.next() == "]"
  text.at += closed
  while not closed:
    value, source_text, line, problem = text.value()
    if problem:
      bad.read += 1
      bad.refuse(f"{file.shown}:{line}", " ".join(source_text.splitlines()), f"{problem}; mend or remove it")
    else:
      # `raw` is one line; an element that was printed over several lines has to be printed anew.
      raw = json.dumps(value, ensure_ascii=False) if "\n" in source_text else source_text.replace("\r", "")
      yield Item(value, raw, file.shown, line, fields)
    closed = text.expect(",]", "a comma or the closing bracket") == "]"


def _wrapped_items(file: DataFile, fields: Mapping[str, str], bad: BadRecords) -> Iterator[Item]:
  """Yields the elements of the list in one object; what the object says besides is about the file, not its records."""
  found = None
  with file.open() as stream:
    text = _Text(file, stream)
    text.expect("{", "an opening brace")
    more = True
    while more:
      key = text.value()[0]
      text.expect(":", "a colon")
      if text.next() == "[" and key in _LISTS and found is None:
        found = key
        yield from _elements(text, file, fields, bad)
      else:
        other = text.value()[0]
        if isinstance(other, list) and other and isinstance(other[0], dict):
          raise UserError(f"{file.shown} is one object with two lists, {found!r} and {key!r}; write each into a file")
      more = text.expect(",}", "a comma or the closing brace") == ","
    if text.next():
      raise text.broken(f"text after the object that holds {found!r}", text.at)
