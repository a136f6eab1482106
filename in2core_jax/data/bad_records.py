"""The account of records that could not be read: refused together, or left out and counted."""

from __future__ import annotations

import collections
import json
import re
from typing import Any

from in2core_jax.errors import UserError, how_many, printable


class BadRecords:
  """The records that could not be read: refused together, or left out and counted.

  Attributes:
    skip: whether they are left out (`--skip_bad_records`).
    read: how many records there were, bad ones too.
    looked_at: how many of them were looked at, where limits, topics or --dedup have left some out; None: all.
    kept: {"place", "reason", "record"} of each, in the order in which they were found; the first alone without `skip`.
    kinds: how many there are of each kind of reason.
  """

  def __init__(self, skip: bool = False):
    self.skip = skip
    self.read = 0
    self.looked_at: int | None = None
    self.kept: list[dict[str, str]] = []
    self.kinds: collections.Counter[str] = collections.Counter()

  def __len__(self) -> int:
    return sum(self.kinds.values())

  def refuse(self, place: str, raw: str, reason: str) -> None:
    """Takes a record out.

    Args:
      place: file and line, or whatever else names it.
      raw: its text.
      reason: what is wrong with it and what to do, without the place.
    """
    entry = {"place": place, "reason": reason, "record": raw}
    if self.skip:
      self.kept.append(entry)
    elif not self.kept or _comes_before(place, self.kept[0]["place"]):
      self.kept = [entry]
    kind = re.sub(r"'[^']*'|\"[^\"]*\"", "...", reason.partition(";")[0])
    self.kinds[shorten(re.sub(r"\d[\d,.]*", "N", kind), 100)] += 1

  def raise_if_any(self) -> None:
    """Tells of all of them at once.

    Raises:
      UserError: there are some, and they are not to be left out.
    """
    if self.skip or not self.kept:
      return
    first = f"{self.kept[0]['place']}: {self.kept[0]['reason']}"
    if len(self) == 1:
      raise UserError(printable(f"{first}; 1 of {self._all()}; --skip_bad_records leaves it out"))
    raise UserError(
      printable(f"{len(self):,} of {self._all()} cannot be used ({self._told_kinds()}); the first is {first}")
      + "; --skip_bad_records leaves them out"
    )

  def _all(self) -> str:
    if self.looked_at is not None and len(self) <= self.looked_at < self.read:
      return f"the {how_many(self.looked_at, 'record')} that limits, topics or --dedup leave of {self.read:,}"
    return how_many(self.read, "record") if self.read >= len(self) else "the records"

  def _told_kinds(self, most: int = 3) -> str:
    told = [f"{count:,} x {kind}" for kind, count in self.kinds.most_common(most)]
    more = len(self.kinds) - len(told)
    return "; ".join(told) + (f"; and {how_many(more, 'more kind')}" if more else "")

  def summary(self) -> dict[str, Any]:
    """What data_summary.json says: `count`, and `reasons`, how many of each kind."""
    return {"count": len(self), "reasons": dict(self.kinds.most_common())}

  def lines(self) -> str:
    """The text of skipped_records.jsonl: source by source, in the order of their lines."""
    order: dict[str, int] = {}

    def place_of(entry: dict[str, str]) -> tuple[int, int]:
      source, _, line = entry["place"].rpartition(":")
      return order.setdefault(source, len(order)), int(line) if line.isdecimal() else 0

    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in sorted(self.kept, key=place_of))


def _comes_before(place: str, other: str) -> bool:
  """Whether a place is an earlier line of the same file: broken lines are found before what is wrong in whole ones."""
  (source, _, line), (source_there, _, line_there) = place.rpartition(":"), other.rpartition(":")
  return source == source_there and line.isdecimal() and line_there.isdecimal() and int(line) < int(line_there)


def shorten(text: str, limit: int = 120) -> str:
  """Cuts a text for an error message, and writes its control characters as escapes."""
  return printable(text if len(text) <= limit else text[:limit] + "...")
