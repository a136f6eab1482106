"""Records with stable ids.

What a record looks like is told in `record_shapes.py`; nothing here knows a file format or a tokenizer.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from in2core_jax.data import ragged, record_file
from in2core_jax.data.bad_records import BadRecords, shorten
from in2core_jax.data.record_file import LEARNT, PAIR, UNREAD, WEIGHTED, Records
from in2core_jax.data.record_shapes import Conversation, Messages, is_learnt, read_record
from in2core_jax.data.turns import Message, type_name
from in2core_jax.errors import UserError


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
    weight: how much its loss counts in a training, beside others'.
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
  weight: float = 1.0

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


def content_digests(records: Sequence[Record]) -> np.ndarray:
  """SHA-256 of all that is rendered, S32 [N]: equal for duplicates; see `Records.column`."""
  if isinstance(records, Records):
    return records.column("content")
  return np.array([bytes.fromhex(record.content_key) for record in records], "S32")


def prompt_digests(records: Sequence[Record]) -> np.ndarray:
  """The same of what is rendered before the first response."""
  if isinstance(records, Records):
    return records.column("prompt")
  return np.array([bytes.fromhex(record.prompt_key) for record in records], "S32")


def content_keys(records: Sequence[Record]) -> Iterator[str]:
  """`Record.content_key` of each, one after the other."""
  return (_hex(digest) for digest in content_digests(records))


def _hex(digest: bytes) -> str:
  return digest.ljust(32, b"\0").hex()  # NumPy takes zeros at the end off


def ids_of(records: Sequence[Record]) -> Sequence[str]:
  """Their ids."""
  return records.ids if isinstance(records, Records) else tuple(record.example_id for record in records)


def topics_of(records: Sequence[Record]) -> tuple[str, ...]:
  """Their topics, "" where there is none."""
  return tuple(records.names("topic") if isinstance(records, Records) else (record.topic for record in records))


def sources_of(records: Sequence[Record]) -> Iterable[str]:
  """The file or data set of each."""
  return records.names("source") if isinstance(records, Records) else (record.source for record in records)


def first_pair(records: Sequence[Record]) -> Record | None:
  """The first preference pair; None where there is none."""
  return _first(records, PAIR, lambda record: bool(record.rejected))


def first_plain(records: Sequence[Record]) -> Record | None:
  """The first conversation that is no preference pair; None where there is none."""
  if isinstance(records, Records):
    rows = np.flatnonzero(records.column("flags") & PAIR == 0)
    return records[int(rows[0])] if len(rows) else None
  return next((record for record in records if not record.rejected), None)


def first_weighted(records: Sequence[Record]) -> Record | None:
  """The first whose loss counts more or less than others'; None where there is none."""
  return _first(records, WEIGHTED, lambda record: record.weight != 1)


def weights_of(records: Sequence[Record]) -> np.ndarray | None:
  """How much the loss of each counts, f64 [N]; None where all count alike."""
  if first_weighted(records) is None:
    return None
  return np.array([record.weight for record in records])


def has_response(records: Sequence[Record]) -> bool:
  """Whether any of them has a response that is learnt."""
  return _first(records, LEARNT, lambda record: record.has_response) is not None


def with_unread(records: Sequence[Record]) -> Iterable[Record]:
  """Those that have keys which nobody reads."""
  if isinstance(records, Records):
    records = records.take(np.flatnonzero(records.column("flags") & UNREAD))
  return (record for record in records if record.unread)


def _first(records: Sequence[Record], flag: int, fits: Callable[[Record], bool]) -> Record | None:
  if not isinstance(records, Records):
    return next(filter(fits, records), None)
  rows = np.flatnonzero(records.column("flags") & flag)
  return records[int(rows[0])] if len(rows) else None


def first_of(records: Sequence[Record]) -> np.ndarray:
  """The place of the first record with the content of each, int64 [N]: the same number for copies."""
  _, first, number = np.unique(content_digests(records), return_index=True, return_inverse=True)
  return first[number.reshape(-1)].astype(np.int64)


def firsts(records: Sequence[Record]) -> np.ndarray:
  """Which records are the first of their content, bool [N]."""
  return first_of(records) == np.arange(len(records))


def drawn_share(records: Sequence[Record], share: float) -> np.ndarray:
  """Rows of a share of the conversations: those whose hashes come first, the same whatever the order.

  A larger share has all that a smaller one has; copies of a conversation stay together.

  Args:
    records: of one source.
    share: above 0; at least one conversation is kept.
  """
  distinct, number = np.unique(content_digests(records), return_inverse=True)
  hashes = (hashlib.sha256(f"share/{_hex(digest)}".encode()).digest() for digest in distinct)
  order = np.argsort(np.fromiter(hashes, "S32", len(distinct)), kind="stable")
  kept = np.zeros(len(distinct), bool)
  kept[order[: max(1, round(share * len(distinct)))]] = True
  return np.flatnonzero(kept[number.reshape(-1)])


def rejected_turns(record: Record) -> Messages:
  """What a preference pair says on its rejected side after the prompt that both sides share; nothing for others."""
  shared = next((i for i, (a, b) in enumerate(zip(record.messages, record.rejected, strict=False)) if a != b), None)
  return record.rejected[len(record.messages) :] if shared is None else record.rejected[shared:]


class Raws(Sequence):
  """The records exactly as they were read, each when it is asked for; with weights, these are put into them."""

  def __init__(self, records: Sequence[Record], weights: np.ndarray | None = None):
    """Of records; weights: f64, one for each, or None."""
    self._records, self._weights = records, weights

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    raw = self._records.raw(index) if isinstance(self._records, Records) else self._records[index].raw
    return raw if self._weights is None else with_weight(raw, float(self._weights[index]))


def with_weight(raw: str, weight: float) -> str:
  """A record with how much its loss counts, to six digits; all else of it as it was read."""
  if '"weight"' in raw:  # perhaps a key of the record: one of the two counts
    return json.dumps(json.loads(raw) | {"weight": float(f"{weight:.6g}")}, ensure_ascii=False)
  return f'{raw.rstrip()[:-1].rstrip()}, "weight": {weight:.6g}}}'


def raw_lines(records: Sequence[Record], rows: Iterable[int], weights: np.ndarray | None = None) -> str:
  """Some of the records exactly as they were read, one a line: the text of a `coreset.jsonl`.

  Args:
    records: N records.
    rows: of them.
    weights: f64 [N], put into them; None: none.
  """
  taken = np.fromiter(rows, np.int64)
  return "".join(raw + "\n" for raw in Raws(ragged.taken(records, taken), None if weights is None else weights[taken]))


def to_records(items: Iterable[Item], bad: BadRecords) -> Records:
  """Reads the items as conversations and gives them unique ids.

  Args:
    items: the source records, in source order.
    bad: gets those that cannot be read.

  Returns:
    One record for each of the others, in the same order.
  """
  writer, given = record_file.Writer(), []
  for item in items:
    bad.read += 1
    try:
      if not isinstance(item.value, dict):
        raise UserError(f"the record is {type_name(item.value)}, not a JSON object: {shorten(item.raw)}")
      found = read_record(item.value, item.fields)
    except UserError as error:
      bad.refuse(item.place, item.raw, str(error))
      continue
    writer.append(_written(item, found))
    given.append(found.given_id)
  records = writer.done(_record)
  rows, given = _told_apart(records, given, bad)
  records = records.take(rows) if len(rows) < len(records) else records
  if all(name is None for name in given):
    return records.with_ids(_hash_ids(records))
  return records.with_ids(_unique_ids(given, records.column("content"), records.names("name")))


def _written(item: Item, found: Conversation) -> record_file.Written:
  """What is kept of a record."""
  bare = Record("", found.messages, found.topic, "", item.source, item.line, found.tools, rejected=found.rejected)
  flags = LEARNT * bare.has_response | PAIR * bool(found.rejected) | UNREAD * bool(found.unread)
  flags |= WEIGHTED * (found.weight != 1)
  digests = bytes.fromhex(bare.content_key), bytes.fromhex(bare.prompt_key)
  said = found.messages, found.tools, found.unread, found.rejected, found.weight
  return record_file.Written(
    said, item.raw, item.line, *digests, item.source, item.origin, item.name, found.topic, flags
  )


def _record(name: str, said: list[Any], raw: str, line: int, source: str, origin: str, topic: str) -> Record:
  *lists, weight = said
  messages, tools, unread, rejected = map(tuple, lists)
  return Record(name, messages, topic, raw, source, line, tools, unread, origin, rejected, weight)


def _told_apart(records: Records, given: list[str | None], bad: BadRecords) -> tuple[np.ndarray, list[str | None]]:
  """Makes given ids name one conversation each.

  An id that two files use for different conversations gets the file's name in front, in both; a file that does so
  within itself is wrong. Sources with names of their own have them in front in any case.

  Args:
    records: all of them, without ids.
    given: what they are called, or None.
    bad: gets those that share an id.

  Returns:
    (rows of the records that stay, their given ids).
  """
  if not any(name is not None for name in given):
    return np.arange(len(records)), given
  keys, sources, names = records.column("content"), records.names("source"), records.names("name")
  in_source: dict[str, dict[str, int]] = collections.defaultdict(dict)
  of_name: dict[str, dict[str, int]] = collections.defaultdict(dict)
  several: set[tuple[str, str]] = set()
  stay = []
  for row, name in enumerate(given):
    if name is not None:
      other = in_source[sources[row]].setdefault(name, row)
      if keys[other] != keys[row]:
        again = records[row]
        bad.refuse(
          again.place,
          again.raw,
          f"id {name!r} names two different conversations, at {records[other].place} and {again.place}; make ids "
          "unique, or leave them out to get content hashes",
        )
        continue
      if keys[of_name[names[row]].setdefault(name, row)] != keys[row]:
        several.add((names[row], name))
    stay.append(row)
  labels = source_labels(dict.fromkeys(sources))
  apart = [
    f"{labels[sources[row]]}:{given[row]}" if (names[row], given[row]) in several else given[row] for row in stay
  ]
  return np.array(stay, np.int64), apart


def source_labels(sources: Iterable[str]) -> dict[str, str]:
  """A short name for each source: the last parts of its path, as many as tell all of them apart."""
  parts = {source: pathlib.PurePath(source).with_suffix("").parts or (source,) for source in sources}
  for length in range(1, max(map(len, parts.values()), default=0) + 1):
    labels = {source: "/".join(whole[-length:]) for source, whole in parts.items()}
    if len(set(labels.values())) == len(labels):
      return labels
  return {source: source for source in parts}


def _hash_ids(records: Records) -> Iterator[str]:
  """`_unique_ids` of records without given ids; a million of them are never texts at the same time."""
  begins = records.column("content").view(np.uint8).reshape(-1, 32)[:, :8].copy().view(">u8").ravel().astype(np.uint64)
  names = records.column("name")
  order = np.lexsort((begins, names))  # stable: copies stay in order
  first = np.r_[True, (np.diff(begins[order]) != 0) | (np.diff(names[order]) != 0)][: len(order)]
  place = np.arange(len(order))
  copy = np.empty(len(order), np.int64)
  copy[order] = place - np.maximum.accumulate(np.where(first, place, 0))
  for begin, name, earlier in zip(begins, records.names("name"), copy, strict=True):
    yield (f"{name}:" if name else "") + f"{begin:016x}" + (f"-{earlier + 1}" if earlier else "")


def _unique_ids(given: list[str | None], digests: np.ndarray, names: list[str]) -> list[str]:
  """An id for each: the given one, or else the first 16 hex digits of the digest (S32 [N]); the name in front."""
  keys = digests.view(np.uint8).reshape(-1, 32)[:, :8].tobytes().hex()
  wanted = [keys[16 * i : 16 * i + 16] if one is None else one for i, one in enumerate(given)]
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
