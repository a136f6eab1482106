"""An index on disk: a run folder with the basis, the queries and shards of rows, to which examples are added.

Every shard of rows says itself which examples it holds: the hash of their tokens and response mask. So an index knows
what it has, whatever file the examples came from; examples that it has are never computed again, copies are kept once.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from in2core_jax.errors import UserError, how_many
from in2core_jax.index.basis import Basis
from in2core_jax.index.rows import NARROW, Rows
from in2core_jax.runs.run_folder import RunDir
from in2core_jax.runs.shards import ShardStore

MARK = "index.json"  # written last
VERSION = 1  # of what a row is and how it lies
PARTS = "parts.json"
_KEY = np.dtype("S32")
_NARROWED = ("gradients", "hidden")


def keys_of(tokens: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> np.ndarray:
  """Names examples by what a row depends on: a hash of token ids and response mask, S32 [N]."""

  def name(ids: np.ndarray, mask: np.ndarray) -> bytes:
    digest = hashlib.blake2b(np.ascontiguousarray(ids, np.int32).tobytes(), digest_size=16)
    digest.update(np.packbits(mask).tobytes())
    return digest.hexdigest().encode()

  return np.fromiter((name(*both) for both in zip(tokens, masks, strict=True)), _KEY)


def firsts(keys: np.ndarray) -> np.ndarray:
  """Rows of the first of each key, growing."""
  return np.sort(np.unique(keys, return_index=True)[1])


class IndexStore:
  """The files of an index, in an open run folder."""

  def __init__(self, run_dir: RunDir):
    """Wraps the folder."""
    self.run_dir = run_dir
    self._basis = ShardStore(run_dir, "basis", {})
    self._queries = ShardStore(run_dir, "queries", {})
    self._rows = ShardStore(run_dir, "rows", {})

  @classmethod
  def load(cls, path: str) -> "IndexStore":
    """A finished index, to read from.

    Raises:
      UserError: no index there, or one that is not finished.
    """
    run_dir = RunDir.load(path)
    if run_dir.identity.get("stage") != "index":
      raise UserError(f"--index={path}: not an index; give the --run_dir of an `index` run")
    if (version := run_dir.identity.get("index")) != VERSION:
      raise UserError(
        f"--index={path} has version {version}, and this program reads version {VERSION}: make the index anew"
      )
    if not run_dir.wrote(MARK):
      raise UserError(f"--index={path} is not finished: start its `index` command again, and it continues")
    return cls(run_dir)

  # ---- basis and queries -------------------------------------------------------------

  def read_basis(self) -> Basis | None:
    """The basis; None where there is none."""
    arrays = self._basis.read(0)
    return None if arrays is None else Basis.of_arrays(self.run_dir.identity["basis"]["kind"], arrays)

  def load_basis(self) -> Basis:
    """The basis that the rows are in.

    Raises:
      UserError: missing or damaged; another one would not go with the rows.
    """
    found = self.read_basis()
    if found is None:
      raise UserError(
        f"{self._basis.file(0)}: missing or damaged, and all rows are in this basis: bring the file back, or make the "
        "index anew with --overwrite"
      )
    return found

  def write_basis(self, basis: Basis) -> None:
    """By the process that writes."""
    self._basis.write(0, basis.arrays())

  def read_queries(self) -> dict[str, np.ndarray] | None:
    """The rows of the queries that the basis was made of, with their `keys`."""
    found = self._queries.read(0)
    return None if found is None else found | {"keys": _of_bytes(found["keys"])}

  def write_queries(self, arrays: Mapping[str, np.ndarray], keys: np.ndarray) -> None:
    """By the process that writes; in float32."""
    self._queries.write(0, dict(arrays) | {"keys": _as_bytes(keys)})

  # ---- rows --------------------------------------------------------------------------

  def write_rows(self, number: int, arrays: Mapping[str, np.ndarray], keys: np.ndarray) -> None:
    """A shard: float32 arrays as `rows` names them, of examples with these keys."""
    narrow = {name: values.astype(NARROW if name in _NARROWED else np.float32) for name, values in arrays.items()}
    self._rows.write(number, narrow | {"keys": _as_bytes(keys)})

  def has_rows(self, number: int) -> bool:
    """Whether a shard is there and whole."""
    return self._rows.map(number) is not None

  def keys(self, numbers: Iterable[int]) -> np.ndarray:
    """The keys of the examples of some shards, those that are missing left out."""
    found = [shard["keys"] for number in numbers if (shard := self._rows.map(number)) is not None]
    return _of_bytes(np.concatenate(found)) if found else np.zeros(0, _KEY)

  def shards(self, parts: Sequence[Mapping[str, Any]]) -> list[int]:
    """The numbers of the shards of some parts, those left out that were damaged and whose examples lie elsewhere."""
    every = (number for part in parts for number in range(part["first"], part["first"] + part["shards"]))
    lost = {number for part in parts for number in part.get("lost", [])}
    return [number for number in every if number not in lost]

  def read_rows(self, keys: np.ndarray, ids: Sequence[str]) -> Rows:
    """The rows of some examples, memory-mapped; each shard is checked once.

    Args:
      keys: S32 [N]. ids: N names, for messages.

    Raises:
      UserError: a shard is damaged, or examples are not in the index.
    """
    numbers = self.shards(self.run_dir.load_json(PARTS))
    segments = [self._rows.map(number) for number in numbers]
    damaged = [number for number, segment in zip(numbers, segments, strict=True) if segment is None]
    if damaged:
      raise UserError(
        f"{self._rows.file(damaged[0])}: missing or damaged, {how_many(len(damaged), 'shard')} in all: start the "
        "`index` command once more, it computes these again"
      )
    known = _of_bytes(np.concatenate([segment["keys"] for segment in segments]))
    order = np.argsort(known, kind="stable")
    place = np.minimum(np.searchsorted(known, keys, sorter=order), len(known) - 1)
    position = order[place]
    missing = np.flatnonzero(known[position] != keys)
    if missing.size:
      raise UserError(
        f"{how_many(missing.size, f'of the {len(keys):,} training examples [is|are]')} not in the index "
        f"{self.run_dir.path} (such as {ids[missing[0]]}): run `index` with this --train_data and "
        f"--run_dir={self.run_dir.path}, it adds them. With another --max_length or --system_prompt than the index "
        "has, or another tokenizer, an example is another one"
      )
    return Rows(segments, position)


def _as_bytes(keys: np.ndarray) -> np.ndarray:
  """Hex names as uint8 [n, 16]."""
  return np.frombuffer(bytes.fromhex(b"".join(keys.tolist()).decode()), np.uint8).reshape(-1, 16)


def _of_bytes(numbers: np.ndarray) -> np.ndarray:
  """Inverse of `_as_bytes`."""
  text = np.ascontiguousarray(numbers).tobytes().hex().encode()
  return np.frombuffer(text, _KEY).copy()


def name_of(keys: np.ndarray, more: str) -> str:
  """A name of some examples in an order, and of more: hex."""
  return hashlib.sha256(more.encode() + np.ascontiguousarray(keys).tobytes()).hexdigest()


def check_finite(arrays: Mapping[str, np.ndarray], number: int) -> None:
  """Refuses rows that are not numbers.

  Raises:
    UserError: tells how many.
  """
  good = np.ones(len(arrays["square"]), bool)
  for values in arrays.values():
    good &= np.isfinite(values).reshape(len(values), -1).all(axis=1)
  if not good.all():
    raise UserError(
      f"gradients or losses of {how_many(np.count_nonzero(~good), 'example')} of shard {number} are not finite: look "
      "for NaN in the weights, or at their losses"
    )
