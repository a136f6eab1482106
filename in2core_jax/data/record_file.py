"""Records in files of their own, each made when it is asked for: no Python object for a record stays.

There are two files, without a name and gone with the process, in the folder for temporary files (TMPDIR). One has what
passes over all records look at, in entries of one size; the other the texts:

    heads   start, sizes, line, digests, numbers of source, origin, topic     | the same of the next record | ...
    texts   what is rendered, as JSON | the record as it was read             | ...

They are read by offset and not mapped, so that what was read is no memory of this process.
"""

from __future__ import annotations

import itertools
import json
import operator
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from in2core_jax.errors import UserError

LEARNT, PAIR, UNREAD, WEIGHTED = 1, 2, 4, 8  # flags of a head: see `Written`
_TOGETHER = 1 << 20  # bytes that are written at once
_BLOCK = 8192  # records of which the heads are read at once
_HEAD = np.dtype(
  [("start", np.int64), ("said", np.int64), ("raw", np.int64), ("line", np.int64)]
  + [("content", "S32"), ("prompt", "S32"), ("source", np.int32), ("origin", np.int32), ("name", np.int32)]
  + [("topic", np.int32), ("flags", np.int32)]
)


class Written(NamedTuple):
  """What is kept of a record.

  Attributes:
    said: JSON values that are rendered or told of.
    raw: the record as it was read.
    line: where it stands in its source.
    content, prompt: SHA-256 of all that is rendered, and of what comes before the first response.
    source, origin, name, topic: texts that many records have in common.
    flags: LEARNT: it has a response that is learnt; PAIR: it is a preference pair; UNREAD: it has keys that nobody
      reads; WEIGHTED: its loss counts more or less than others'.
  """

  said: Any
  raw: str
  line: int
  content: bytes
  prompt: bytes
  source: str
  origin: str
  name: str
  topic: str
  flags: int


class Texts(Sequence):
  """Short texts in one Arrow array; equal to a tuple of the same texts."""

  def __init__(self, found: pa.Array):
    self._found = found

  @classmethod
  def of(cls, texts: Iterable[str]) -> Texts:
    """Copies the texts, which may hold what is no UTF-8, as names of files do."""
    texts, blocks = iter(texts), []
    while some := [text.encode("utf-8", "surrogatepass") for text in itertools.islice(texts, _BLOCK)]:
      blocks.append(pa.array(some, pa.large_binary()))
    found = pa.concat_arrays(blocks) if blocks else pa.array([], pa.large_binary())
    return cls(found if found.nbytes >= 2**31 else found.cast(pa.binary()))

  def take(self, rows: np.ndarray) -> Texts:
    """Some of them."""
    return Texts(self._found.take(pa.array(rows)))

  def order(self) -> np.ndarray:
    """int64 [n], which text comes first, second ... by code points, equal ones as they stand."""
    return pc.sort_indices(self._found).to_numpy().astype(np.int64)  # UTF-8 sorts as its code points do

  def __len__(self) -> int:
    return len(self._found)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return tuple(self[i] for i in range(*index.indices(len(self))))
    at = index + len(self) if index < 0 else index
    if not 0 <= at < len(self):
      raise IndexError(f"text {index} of {len(self)}")
    return self._found[int(at)].as_py().decode("utf-8", "surrogatepass")

  def __iter__(self) -> Iterator[str]:
    for start in range(0, len(self), _BLOCK):
      yield from (text.decode("utf-8", "surrogatepass") for text in self._found[start : start + _BLOCK].to_pylist())

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

  def __hash__(self) -> int:
    return hash(tuple(self))

  def __repr__(self) -> str:
    return repr(tuple(self))


class _File:
  """A file without a name, to which texts are added and of which any part is read."""

  def __init__(self):
    self.size, self._waiting, self._held = 0, [], 0
    try:
      self._handle, path = tempfile.mkstemp(prefix="in2core-records-")
      os.unlink(path)
    except OSError as error:
      raise _no_room(error) from error
    weakref.finalize(self, os.close, self._handle)

  def add(self, data: bytes) -> None:
    """Adds bytes behind the others."""
    self._waiting.append(data)
    self.size += len(data)
    self._held += len(data)
    if self._held >= _TOGETHER:
      self.flush()

  def flush(self) -> None:
    """Writes what waits; nothing is read before."""
    data, self._waiting, self._held = memoryview(b"".join(self._waiting)), [], 0
    try:
      while data:
        data = data[os.write(self._handle, data) :]
    except OSError as error:
      raise _no_room(error) from error

  def read(self, start: int, size: int) -> bytes:
    """Reads a part."""
    parts = []
    while size:
      part = os.pread(self._handle, size, start)
      if not part:
        raise EOFError("the file of records ends early")
      parts.append(part)
      start, size = start + len(part), size - len(part)
    return b"".join(parts) if len(parts) != 1 else parts[0]


def _no_room(error: OSError) -> UserError:
  try:
    folder = tempfile.gettempdir()
  except OSError:  # it looks for a folder that has room
    folder = "no folder for temporary files"
  return UserError(
    f"{folder}: the records cannot be written there ({error.strerror or error}); set TMPDIR to a folder "
    "with as much room as twice the data"
  )


class Writer:
  """Writes records, one after the other."""

  def __init__(self):
    self._heads, self._texts = _File(), _File()
    self._numbers: dict[str, int] = {}

  def append(self, record: Written) -> None:
    """Writes one."""
    said = json.dumps(record.said, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    raw = record.raw.encode("utf-8", "surrogatepass")
    named = (record.source, record.origin, record.name, record.topic)
    head = (self._texts.size, len(said), len(raw), record.line, record.content, record.prompt)
    head += (*(self._numbers.setdefault(text, len(self._numbers)) for text in named), record.flags)
    self._heads.add(np.array(head, _HEAD).tobytes())
    self._texts.add(said)
    self._texts.add(raw)

  def done(self, make: Callable[..., Any]) -> Records:
    """The records, without ids as yet.

    Args:
      make: makes a record of (id, what was `said`, raw, line, source, origin, topic).
    """
    self._heads.flush()
    self._texts.flush()
    count = self._heads.size // _HEAD.itemsize
    return Records(_Store(self._heads, self._texts, list(self._numbers), make), np.arange(count, dtype=np.int32))


class _Store(NamedTuple):
  heads: _File
  texts: _File
  names: list[str]
  make: Callable[..., Any]

  def head(self, row: int) -> np.void:
    """Where a record lies, and its flags."""
    return np.frombuffer(self.heads.read(row * _HEAD.itemsize, _HEAD.itemsize), _HEAD)[0]


class Records(Sequence):
  """Records on disk, a sequence of them.

  Attributes:
    ids: of the records.
  """

  def __init__(self, store: _Store, rows: np.ndarray, ids: Sequence[str] = ()):
    self._store, self._rows, self.ids = store, rows, ids

  def with_ids(self, ids: Iterable[str]) -> Records:
    """The same with ids, a text for each."""
    return Records(self._store, self._rows, Texts.of(ids))

  def take(self, rows: Sequence[int] | np.ndarray) -> Records:
    """Some of them, int [n], in the order given."""
    rows = np.asarray(rows, np.int64).reshape(-1)
    return Records(self._store, self._rows[rows], self.ids.take(rows) if self.ids else ())

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    head = self._store.head(int(self._rows[index]))
    return self._made(head, self.ids[index] if self.ids else "")

  def __iter__(self) -> Iterator[Any]:
    return (self[i] for i in range(len(self)))

  def __add__(self, other: Sequence[Any]) -> list[Any]:
    return [*self, *other]

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))  # noqa: B905

  __hash__ = None

  def _made(self, head: np.void, name: str) -> Any:
    store, names = self._store, self._store.names
    both = store.texts.read(int(head["start"]), int(head["said"]) + int(head["raw"]))
    said = json.loads(both[: head["said"]].decode("utf-8", "surrogatepass"))
    raw = both[head["said"] :].decode("utf-8", "surrogatepass")
    return store.make(name, said, raw, int(head["line"]), *(names[head[key]] for key in ("source", "origin", "topic")))

  # ---- without making records --------------------------------------------------------------------

  def column(self, key: str) -> np.ndarray:
    """What all have under a key of their heads, [n]; digests as S32, items of which come without zeros at the end."""
    found = np.empty(len(self), _HEAD[key])
    sorted_already = bool(np.all(self._rows[1:] >= self._rows[:-1]))
    order = slice(None) if sorted_already else np.argsort(self._rows, kind="stable")
    rows = self._rows[order]
    values = found if sorted_already else np.empty_like(found)
    at = 0
    while at < len(rows):
      first = int(rows[at])
      end = int(np.searchsorted(rows, first + _BLOCK))
      size = (int(rows[end - 1]) - first + 1) * _HEAD.itemsize
      block = np.frombuffer(self._store.heads.read(first * _HEAD.itemsize, size), _HEAD)
      values[at:end] = block[key][rows[at:end] - first]
      at = end
    found[order] = values
    return found

  def names(self, key: str) -> list[str]:
    """`source`, `origin`, `name` or `topic` of each; equal ones are one object."""
    return [self._store.names[number] for number in self.column(key).tolist()]

  def raw(self, index: int) -> str:
    """One as it was read."""
    head = self._store.head(int(self._rows[index]))
    return self._store.texts.read(int(head["start"] + head["said"]), int(head["raw"])).decode("utf-8", "surrogatepass")
