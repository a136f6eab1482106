"""Shards: the pieces of a long computation, each written whole, each checked when it is read back.

A killed run keeps its finished shards; the same command reads them and computes the rest. A shard is trusted only when
its bytes have the checksum that it names and it was written for the same work: anything else is named, and recomputed.

A shard file is a line `in2core_jax shard 1 SHA256` (of all that follows), a line of JSON (index, identity, names,
dtypes and shapes of the arrays), and the arrays' bytes, little-endian, row-major, by name. No pickle. `pack` and
`unpack` write and read this form for other files too, under a first word of their own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from in2core_jax.runs import files
from in2core_jax.runs.run_folder import RunDir

log = logging.getLogger(__name__)

_MAGIC = b"in2core_jax shard 1 "
_FOREIGN = "written for other settings, such as other --batch_tokens, --microbatch, --mesh or devices"


class ShardStore:
  """Numbered shards in a folder of a run folder.

      store = ShardStore(run_dir, "scores", {"layers": [28, 29], "weights": sha256})
      for index, rows in enumerate(slices):
        arrays = store.read(index)
        if arrays is None:
          arrays = compute(rows)
          store.write(index, arrays)

  Several processes may write different shards of one store at once.
  """

  def __init__(self, run_dir: RunDir, name: str, identity: Mapping[str, Any]):
    """Opens the store; makes its folder.

    Args:
      run_dir: an open run folder.
      name: the store's folder in it.
      identity: JSON object: all that the shards depend on beyond the run's identity (how rows are cut, for one).
    """
    self.path = run_dir.folder(name)
    self.identity_sha256 = files.hash_of({"run": run_dir.identity, "store": name, "identity": identity})
    self._told_foreign = False
    if run_dir.writer:
      files.remove_leftovers(self.path)

  def file(self, index: int):
    """The path of a shard."""
    return self.path / f"{index:06d}{files.SHARD}"

  def write(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a shard, atomically; the same arrays give the same bytes.

    Args:
      index: the shard's number, from 0.
      arrays: name -> array of any numeric or boolean dtype, bfloat16 included.
    """
    header = {"index": index, "identity_sha256": self.identity_sha256}
    files.write_bytes(self.file(index), pack(_MAGIC, header, arrays))

  def read(self, index: int) -> dict[str, np.ndarray] | None:
    """Reads a shard; None when there is none, or none to be trusted (a warning names the file and why)."""
    try:
      return self._checked(index, self.file(index).read_bytes(), copy=True)
    except FileNotFoundError:
      return None

  def map(self, index: int) -> dict[str, np.ndarray] | None:
    """As `read`, but the arrays stay in the file, which is mapped into memory, and can only be read.

    The checksum is looked at now and not again. A remote file is read.
    """
    path = self.file(index)
    if files.is_remote(path):
      return self.read(index)
    try:
      with open(path, "rb") as file:
        size = file.seek(0, 2)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except FileNotFoundError:
      return None
    return self._checked(index, data, copy=False)

  def _checked(self, index: int, data: bytes | mmap.mmap, copy: bool) -> dict[str, np.ndarray] | None:
    """The arrays of a shard's bytes; None, and a warning, where they are not to be trusted."""
    path = self.file(index)
    try:
      header, arrays = unpack(_MAGIC, data, copy)
    except DamagedError as error:
      log.warning("%s: %s; it is recomputed", path, error)
      return None
    if header["identity_sha256"] != self.identity_sha256:
      if not self._told_foreign:  # once: the others of the store will be so too
        log.warning("%s: %s; shards like it are recomputed", path, _FOREIGN)
      self._told_foreign = True
      return None
    if header["index"] != index:
      log.warning("%s: a copy of shard %d; it is recomputed", path, header["index"])
      return None
    return arrays

  def done(self) -> tuple[int, ...]:
    """The numbers of the shards that `read` would return, in order. Reads every one of them."""
    numbers = (re.fullmatch(rf"(\d{{6,}}){re.escape(files.SHARD)}", path.name) for path in self.path.iterdir())
    return tuple(sorted(i for i in (int(number[1]) for number in numbers if number) if self.read(i) is not None))


class DamagedError(ValueError):
  """Bytes that `pack` has not made, or that have changed since; the message says which, in a few words."""


def pack(magic: bytes, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
  """Arrays and a JSON object as the bytes of a file whose first line holds the checksum of all others.

  Args:
    magic: how the file begins, with a blank at its end.
    header: JSON object; it gets one more key, "arrays".
    arrays: name -> array of any numeric or boolean dtype, bfloat16 included.
  """
  arrays = {name: _little_endian(np.asarray(arrays[name])) for name in sorted(arrays)}
  head = {**header, "arrays": {name: [array.dtype.name, list(array.shape)] for name, array in arrays.items()}}
  parts = (np.ascontiguousarray(array).tobytes() for array in arrays.values())
  body = b"".join([files.canonical_json(head).encode(), b"\n", *parts])
  return magic + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def unpack(magic: bytes, data: bytes | mmap.mmap, copy: bool = True) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Inverse of `pack`: (header, arrays), when every byte is as it was written.

  Args:
    magic: how the file begins.
    data: its bytes.
    copy: arrays of their own; else they lie in `data`, read-only and not aligned.

  Raises:
    DamagedError: another file, or a damaged one.
  """
  if data[: len(magic)] != magic:
    raise DamagedError("damaged (it does not begin as it should)" if data else "empty")
  start = len(magic) + 64 + 1  # the checksum in hex, the line's end
  if data[len(magic) : start] != hashlib.sha256(memoryview(data)[start:]).hexdigest().encode() + b"\n":
    raise DamagedError("damaged (its checksum does not fit)")
  end = data.find(b"\n", start)
  header = json.loads(data[start:end])
  return header, _arrays(header, data, end + 1, copy)


def _arrays(header: Mapping[str, Any], data: bytes | mmap.mmap, start: int, copy: bool) -> dict[str, np.ndarray]:
  arrays = {}
  for name in sorted(header["arrays"]):
    dtype_name, shape = header["arrays"][name]
    dtype = _dtype(dtype_name)
    count = int(np.prod(shape, dtype=np.int64))
    found = np.frombuffer(data, dtype, count, start).reshape(shape)
    arrays[name] = found.copy() if copy else found
    start += count * dtype.itemsize
  return arrays


def _dtype(name: str) -> np.dtype:
  """bfloat16 and the float8 types are not NumPy's own."""
  return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


def _little_endian(array: np.ndarray) -> np.ndarray:
  if array.dtype.hasobject or array.dtype.kind in "SUMm":
    raise TypeError(f"a shard holds numbers and truth values, not {array.dtype}")
  return array.astype(array.dtype.newbyteorder("<"), copy=False) if array.dtype.byteorder == ">" else array
