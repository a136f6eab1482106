"""Records with stable ids, and the account of those that could not be read.

What a record looks like is told in `record_shapes.py`; nothing here knows a file format or a tokenizer.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from in2core_jax.data.record_shapes import Conversation, Messages, is_learnt, read_record
from in2core_jax.data.turns import Message, type_name
from in2core_jax.errors import UserError, printable


@dataclasses.dataclass(frozen=True)
class Record:
  """One conversation of a data source.

  Attributes:
    example_id: unique within its source: the given id, or the first 16 hex digits of the content key; a repetition of
      the same messages gets the suffix -2, -3, ... in source order. The name of its source, if it has one, is in front.
    messages: ({"role": "system" | "user" | "assistant" | "tool", "content": text}, ...), ending with the last response;
      what else a message may have is told in `turns.py`.
    topic: column `topic`, `source` or `category`, or "".
    raw: the source record as one JSON line, exactly as it was read.
    source: the file or data set that it came from.
    line: 1-based line of the file, row of a table (position in the split for tfds).
    tools: definitions of the tools that the conversation may use, for the template.
    unread: names of keys that nobody renders and that are not known to be without meaning.
    origin: the source of the pool that it is of, which may be many files; "": `source` itself.
    rejected: of a preference pair, the conversation with the rejected answer; `messages` is that with the chosen one.
  """

  example_id: str
  messages: Messages
  topic: str
  raw: str
  source: str
  line: int
  tools: tuple[dict[str, Any], ...] = ()
  unread: tuple[str, ...] = ()
  origin: str = ""
  rejected: Messages = ()

  @property
  def content_key(self) -> str:
    """SHA-256 of all that is rendered: equal for duplicates, whatever their ids and topics."""
    return content_key(self.messages, self.tools, self.rejected)

  @property
  def prompt_key(self) -> str:
    """SHA-256 of what is rendered before the first response."""
    first = next((i for i, m in enumerate(self.messages) if m["role"] == "assistant"), len(self.messages))
    return content_key(self.messages[:first], self.tools)

  @property
  def has_response(self) -> bool:
    """Whether there is an assistant turn that is learnt."""
    return any(map(is_learnt, self.messages))

  @property
  def place(self) -> str:
    """Where it stands, for messages."""
    return f"{self.source}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Item:
  """A source record before it is understood.

  Attributes:
    value: the JSON value.
    raw: its text.
    source, line: its place.
    fields: {role: column} of its source.
    origin: see `Record`.
    name: that the user gave its source, in front of all ids of it; "": none.
  """

  value: Any
  raw: str
  source: str
  line: int
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  origin: str = ""
  name: str = ""

  @property
  def place(self) -> str:
    """Where it stands, for messages."""
    return f"{self.source}:{self.line}"


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
      return f"the {self.looked_at:,} records that limits, topics or --dedup leave of {self.read:,}"
    return f"{self.read:,} records" if self.read >= len(self) else "the records"

  def _told_kinds(self, most: int = 3) -> str:
    told = [f"{count:,} x {kind}" for kind, count in self.kinds.most_common(most)]
    more = len(self.kinds) - len(told)
    return "; ".join(told) + (f"; and {more} more kinds" if more else "")

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


def content_key(messages: Sequence[Message], tools: Sequence[Any] = (), rejected: Sequence[Message] = ()) -> str:
  """SHA-256 (hex) of the canonical JSON of all that is rendered.

  Of plain turns it is the hash of their roles and contents. What a turn has besides (reasoning, tool calls, names, its
  place in the loss) is a third entry, and tools stand at the end, so that a record with them is another one. So does
  the rejected side of a preference pair. Ids of tool calls are drawn by chance, and few templates render them: which
  call a result answers counts, not its name.
  """
  canonical: list[Any] = [_canonical(message) for message in _without_ids(messages)]
  canonical += [{"tools": list(tools)}] if tools else []
  canonical += [{"rejected": [_canonical(message) for message in _without_ids(rejected)]}] if rejected else []
  text = json.dumps(canonical, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
  return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _without_ids(messages: Sequence[Message]) -> Iterable[Message]:
  """The messages without ids of tool calls; results that do not come in the order of the calls have their number."""
  calls: dict[str, int] = {}
  made = answered = 0
  for message in messages:
    if "tool_calls" in message:
      bare = [{key: item for key, item in call.items() if key != "id"} for call in message["tool_calls"]]
      calls |= {call["id"]: made + j for j, call in enumerate(message["tool_calls"]) if "id" in call}
      answered, made = made, made + len(bare)
      message = {**message, "tool_calls": bare}
    elif message["role"] == "tool":
      number = calls.get(message.get("tool_call_id"), answered)
      message = {key: item for key, item in message.items() if key != "tool_call_id"}
      message |= {"answers": number} if number != answered else {}
      answered += 1
    yield message


def _canonical(message: Message) -> list[Any]:
  more = {key: item for key, item in message.items() if key not in ("role", "content")}
  return [message["role"], message["content"], *([more] if more else [])]


def spoken(message: Message) -> str:
  """All that a message says in one text, for readers and for searches: reasoning, content, tool calls as JSON."""
  calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
  return "\n".join(filter(None, [message.get("reasoning_content", ""), message["content"], *calls]))


def first_of(records: Sequence[Record]) -> np.ndarray:
  """The place of the first record with the content of each, int64 [N]: the same number for copies."""
  places: dict[str, int] = {}
  return np.array([places.setdefault(record.content_key, at) for at, record in enumerate(records)], np.int64)


def firsts(records: Sequence[Record]) -> np.ndarray:
  """Which records are the first of their content, bool [N]."""
  return first_of(records) == np.arange(len(records))


def drawn_share(records: Sequence[Record], share: float) -> list[Record]:
  """A share of the conversations, in source order: those whose hashes come first, the same whatever the order.

  A larger share has all that a smaller one has; copies of a conversation stay together.

  Args:
    records: of one source.
    share: above 0; at least one conversation is kept.
  """
  order = lambda key: hashlib.sha256(f"share/{key}".encode()).digest()  # noqa: E731
  keys = sorted({record.content_key for record in records}, key=order)
  kept = set(keys[: max(1, round(share * len(keys)))])
  return [record for record in records if record.content_key in kept]


def rejected_turns(record: Record) -> Messages:
  """What a preference pair says on its rejected side after the prompt that both sides share; nothing for others."""
  shared = next((i for i, (a, b) in enumerate(zip(record.messages, record.rejected, strict=False)) if a != b), None)
  return record.rejected[len(record.messages) :] if shared is None else record.rejected[shared:]


def raw_lines(records: Sequence[Record], rows: Iterable[int]) -> str:
  """Some of the records exactly as they were read, one a line: the text of a `coreset.jsonl`."""
  return "".join(records[row].raw + "\n" for row in rows)


def to_records(items: Iterable[Item], bad: BadRecords) -> list[Record]:
  """Reads the items as conversations and gives them unique ids.

  Args:
    items: the source records, in source order.
    bad: gets those that cannot be read.

  Returns:
    One record for each of the others, in the same order.
  """
  read: list[tuple[Item, Conversation]] = []
  for item in items:
    bad.read += 1
    try:
      if not isinstance(item.value, dict):
        raise UserError(f"the record is {type_name(item.value)}, not a JSON object: {shorten(item.raw)}")
      read.append((dataclasses.replace(item, value=None), read_record(item.value, item.fields)))
    except UserError as error:
      bad.refuse(item.place, item.raw, str(error))
  keys = [content_key(found.messages, found.tools, found.rejected) for _, found in read]
  read, given, keys = _told_apart(read, keys, bad)
  ids = _unique_ids(given, keys, [item.name for item, _ in read])
  return [
    Record(
      *(one, found.messages, found.topic, item.raw, item.source, item.line, found.tools, found.unread, item.origin),
      found.rejected,
    )
    for one, (item, found) in zip(ids, read, strict=True)
  ]


def _told_apart(
  read: list[tuple[Item, Conversation]], keys: list[str], bad: BadRecords
) -> tuple[list[tuple[Item, Conversation]], list[str | None], list[str]]:
  """Makes given ids name one conversation each.

  An id that two files use for different conversations gets the file's name in front, in both; a file that does so
  within itself is wrong. Sources with names of their own have them in front in any case.

  Returns:
    (the records that stay, their given ids, their content keys).
  """
  first: dict[tuple[str, str], int] = {}
  contents: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
  stay, given = [], []
  for i, (item, found) in enumerate(read):
    name = found.given_id
    if name is not None:
      other = first.setdefault((item.source, name), i)
      if keys[other] != keys[i]:
        where = f"{read[other][0].place} and {item.place}"
        bad.refuse(
          item.place,
          item.raw,
          f"id {name!r} names two different conversations, at {where}; make ids unique, or leave them out to get "
          "content hashes",
        )
        continue
      contents[item.name, name].add(keys[i])
    stay.append(i)
    given.append(name)
  labels = source_labels(dict.fromkeys(item.source for item, _ in read))
  given = [
    f"{labels[read[i][0].source]}:{name}" if name is not None and len(contents[read[i][0].name, name]) > 1 else name
    for i, name in zip(stay, given, strict=True)
  ]
  return [read[i] for i in stay], given, [keys[i] for i in stay]


def source_labels(sources: Iterable[str]) -> dict[str, str]:
  """A short name for each source: the last parts of its path, as many as tell all of them apart."""
  parts = {source: pathlib.PurePath(source).with_suffix("").parts or (source,) for source in sources}
  for length in range(1, max(map(len, parts.values()), default=0) + 1):
    labels = {source: "/".join(whole[-length:]) for source, whole in parts.items()}
    if len(set(labels.values())) == len(labels):
      return labels
  return {source: source for source in parts}


def _unique_ids(given: list[str | None], keys: list[str], names: list[str]) -> list[str]:
  wanted = [given[i] if given[i] is not None else key[:16] for i, key in enumerate(keys)]
  wanted = [f"{name}:{one}" if name else one for name, one in zip(names, wanted, strict=True)]
  first: dict[str, int] = {}
  for i, name in enumerate(given):
    if name is not None:
      first.setdefault(wanted[i], i)
  taken: set[str] = set()
  copies: dict[str, int] = {}
  ids = []
  for i, base in enumerate(wanted):
    unique = base
    while unique in taken or (unique in first and first[unique] != i):
      copies[base] = copies.get(base, 1) + 1
      unique = f"{base}-{copies[base]}"
    taken.add(unique)
    ids.append(unique)
  return ids
