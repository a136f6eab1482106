"""JSON files as source records: JSON lines, or one JSON array.

A line that cannot be read is one bad record. An array that breaks has no next element, so the whole file is refused.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping

from in2core_jax.data.file_kinds import check_data_file
from in2core_jax.data.json_text import Decoder, Refused
from in2core_jax.data.records import BadRecords, Item, shorten
from in2core_jax.errors import UserError

_WHOLE = 50_000_000  # bytes of a file that is looked at as one object when its first line breaks


def json_items(path: pathlib.Path, fields: Mapping[str, str], bad: BadRecords) -> Iterator[Item]:
  """Yields the elements of a JSON array, or else of JSON lines.

  Args:
    path: of the file.
    fields: {role: column} of its records.
    bad: gets the lines that cannot be read.

  Raises:
    UserError: no such file, no text, or a broken array.
  """
  check_data_file(path)
  with path.open("rb") as file:
    head = b""
    while not head.strip() and (block := file.read(1 << 16)):
      head = block.removeprefix(b"\xef\xbb\xbf") if file.tell() <= 1 << 16 else block
  if not head.strip():
    raise UserError(f"{path} is empty; it must hold one JSON object a line, or one JSON array")
  return _array_items(path, fields, bad) if head.lstrip()[:1] == b"[" else _line_items(path, fields, bad)


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
  return f"byte {data[error.start]:#04x} is not UTF-8; save the file as UTF-8"


def _line_items(path: pathlib.Path, fields: Mapping[str, str], bad: BadRecords) -> Iterator[Item]:
  # Lines end at \n and nowhere else: str.splitlines would also cut at U+2028 and its kin, which JSON allows in strings.
  decoder, first = Decoder(), True
  with path.open("rb") as file:
    for number, data in enumerate(file, 1):
      data = data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data
      data = data.removesuffix(b"\n").removesuffix(b"\r")
      if not data.strip():
        continue
      place, line = f"{path}:{number}", data.decode("utf-8", "replace")
      try:
        line = data.decode("utf-8")
        value = decoder.whole(line)
      except UnicodeDecodeError as error:
        bad.read += 1
        bad.refuse(place, line, _not_utf8(data, error))
      except Refused as error:
        if first:
          _refuse_one_object(path)
        bad.read += 1
        bad.refuse(place, line, _why_broken(error, line))
      else:
        yield Item(value, line, str(path), number, fields)
      first = False


def _why_broken(error: Refused, line: str) -> str:
  if error.position is None or "deep" in str(error):
    return f"{error}; mend or remove it"
  return (
    f"broken JSON ({error}) in {shorten(line, 80)!r}; each line must be one whole JSON object (or the file one JSON "
    "array)"
  )


def _refuse_one_object(path: pathlib.Path) -> None:
  """Refuses a file that is one JSON object over several lines."""
  if path.stat().st_size > _WHOLE:
    return
  try:
    whole = Decoder().whole(path.read_bytes().decode("utf-8-sig"))
  except (UnicodeDecodeError, Refused):
    return
  if isinstance(whole, dict):
    lists = [key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    where = f"its list {lists[0]!r} may be what is meant: write that list alone" if lists else "write it on one line"
    raise UserError(f"{path} is one JSON object over several lines, not one a line; {where}")


def _array_items(path: pathlib.Path, fields: Mapping[str, str], bad: BadRecords) -> Iterator[Item]:
  data = path.read_bytes()
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = data.count(b"\n", 0, error.start) + 1
    raise UserError(f"{path}:{line}: {_not_utf8(data, error)}") from error
  del data
  decoder, end = Decoder(), len(text)

  def skip_space(at: int) -> int:
    while at < end and text[at] in " \t\r\n":
      at += 1
    return at

  def broken(what: str, at: int) -> UserError:
    line = text.count("\n", 0, at) + 1
    return UserError(f"{path}:{line}: broken JSON array ({what}) at {shorten(text[at : at + 41], 40)!r}")

  at = skip_space(skip_space(0) + 1)
  line, counted = 1, 0
  closed = at < end and text[at] == "]"
  while not closed:
    try:
      value, stop, problem = decoder.value_at(text, at)
    except Refused as error:
      raise broken(str(error), min(at if error.position is None else error.position, end)) from error
    line, counted = line + text.count("\n", counted, at), at
    source_text = text[at:stop]
    if problem:
      bad.read += 1
      bad.refuse(f"{path}:{line}", " ".join(source_text.splitlines()), f"{problem}; mend or remove it")
    else:
      # `raw` is one line; an element that was printed over several lines has to be printed anew.
      raw = json.dumps(value, ensure_ascii=False) if "\n" in source_text else source_text.replace("\r", "")
      yield Item(value, raw, str(path), line, fields)
    at = skip_space(stop)
    if at >= end or text[at] not in ",]":
      raise broken("expected a comma or the closing bracket", at)
    closed = text[at] == "]"
    at = at if closed else skip_space(at + 1)
  if skip_space(at + 1) < end:
    raise broken("text after the closing bracket", skip_space(at + 1))
