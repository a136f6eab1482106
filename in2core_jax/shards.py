"""Shards: the pieces of a long computation, each written whole, each checked when it is read back.

A killed run keeps its finished shards; the same command reads them and computes the rest. A shard is trusted only when
its bytes have the checksum that it names and it was written for the same work: anything else is named, and recomputed.

A shard file is a line `in2core_jax shard 1 SHA256` (of all that follows), a line of JSON (index, identity, names,
dtypes and shapes of the arrays), and the arrays' bytes, little-endian, row-major, by name. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from in2core_jax import files
from in2core_jax.artifacts import RunDir

log = logging.getLogger(__name__)

_MAGIC = b"in2core_jax shard 1 "
_HEAD = len(_MAGIC) + 64 + 1  # the magic, the checksum in hex, the line's end
_SUFFIX = ".shard"
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
    return self.path / f"{index:06d}{_SUFFIX}"

  def write(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a shard, atomically; the same arrays give the same bytes.

    Args:
      index: the shard's number, from 0.
      arrays: name -> array of any numeric or boolean dtype, bfloat16 included.
    """
    arrays = {name: _little_endian(np.asarray(arrays[name])) for name in sorted(arrays)}
    header = {
      "index": index,
      "identity_sha256": self.identity_sha256,
      "arrays": {name: [array.dtype.name, list(array.shape)] for name, array in arrays.items()},
    }
    body = b"".join(
      [
        files.canonical_json(header).encode(),
        b"\n",
        *(np.ascontiguousarray(array).tobytes() for array in arrays.values()),
      ]
    )
    files.write_bytes(self.file(index), _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)

  def read(self, index: int) -> dict[str, np.ndarray] | None:
    """Reads a shard; None when there is none, or none to be trusted (a warning names the file and why)."""
    path = self.file(index)
    try:
      data = path.read_bytes()
    except FileNotFoundError:
      return None
    reason = self._distrust(index, data)
    if reason == _FOREIGN:
      if not self._told_foreign:  # once: the others of the store will be so too
        log.warning("%s: %s; shards like it are recomputed", path, reason)
      self._told_foreign = True
      return None
    if reason:
      log.warning("%s: %s; it is recomputed", path, reason)
      return None
    header, start = _header(data)
    return _arrays(header, data, start)

  def _distrust(self, index: int, data: bytes) -> str | None:
    """Why a shard's bytes are not to be used, or None."""
    if not data.startswith(_MAGIC):
      return "not a shard" if data else "empty"
    if hashlib.sha256(data[_HEAD:]).hexdigest().encode() != data[len(_MAGIC) : _HEAD - 1]:
      return "damaged (its checksum does not fit)"
    header, _ = _header(data)
    if header["identity_sha256"] != self.identity_sha256:
      return _FOREIGN
    if header["index"] != index:
      return f"a copy of shard {header['index']}"
    return None

  def done(self) -> tuple[int, ...]:
    """The numbers of the shards that `read` would return, in order. Reads every one of them."""
    numbers = (re.fullmatch(rf"(\d{{6,}}){re.escape(_SUFFIX)}", path.name) for path in self.path.iterdir())
    return tuple(sorted(i for i in (int(number[1]) for number in numbers if number) if self.read(i) is not None))


def _header(data: bytes) -> tuple[dict[str, Any], int]:
  """The JSON line of a shard whose checksum fits, and where the arrays start."""
  end = data.index(b"\n", _HEAD)
  return json.loads(data[_HEAD:end]), end + 1


def _arrays(header: Mapping[str, Any], data: bytes, start: int) -> dict[str, np.ndarray]:
  arrays = {}
  for name in sorted(header["arrays"]):
    dtype_name, shape = header["arrays"][name]
    dtype = _dtype(dtype_name)
    count = int(np.prod(shape, dtype=np.int64))
    # A copy: the file's bytes are read-only and not aligned.
    arrays[name] = np.frombuffer(data, dtype, count, start).reshape(shape).copy()
    start += count * dtype.itemsize
  return arrays


def _dtype(name: str) -> np.dtype:
  """bfloat16 and the float8 types are not NumPy's own."""
  return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


def _little_endian(array: np.ndarray) -> np.ndarray:
  if array.dtype.hasobject or array.dtype.kind in "SUMm":
    raise TypeError(f"a shard holds numbers and truth values, not {array.dtype}")
  return array.astype(array.dtype.newbyteorder("<"), copy=False) if array.dtype.byteorder == ">" else array
