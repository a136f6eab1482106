"""The boundary cache: hidden states that enter the lowest chosen layer, computed once.

While scores are computed, LiSSA or CG iterates, or only layers above the boundary are trained, nothing below the
boundary changes. So the layers below run once over the data; afterwards only the top stack runs.
Hidden states are kept ragged (no padding), in memory or in a file that is memory-mapped.
"""

import dataclasses
import hashlib
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from in2core_jax.data import packed_rows, ragged
from in2core_jax.data.batches import rejected_starts
from in2core_jax.errors import UserError
from in2core_jax.model import decoder as model_lib
from in2core_jax.parallel import processes
from in2core_jax.params.subtree import Subtree
from in2core_jax.runs import files, kept_files

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BoundaryCache:
  """Hidden states of N examples, ragged.

  Attributes:
    values: [sum_i T_i, D] float32 or bfloat16, an array or a memory map.
    starts: int64 [N], where each example begins in `values`.
    lengths: int64 [N], T_i.
  """

  values: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray

  def gather(self, rows: np.ndarray, num_tokens: int) -> np.ndarray:
    """Hidden states [len(rows), num_tokens, D] of the examples `rows`, zero on padding."""
    out = np.zeros((len(rows), num_tokens, self.values.shape[1]), self.values.dtype)
    for slot, row in enumerate(rows):
      start, length = self.starts[row], self.lengths[row]
      out[slot, :length] = self.values[start : start + length]
    return out

  def lay_out(self, examples: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    """Hidden states [size, D] with those of each example from its place on, zero elsewhere (packed rows)."""
    out = np.zeros((size, self.values.shape[1]), self.values.dtype)
    for row, place in zip(examples, places, strict=True):
      start, length = self.starts[row], self.lengths[row]
      out[place : place + length] = self.values[start : start + length]
    return out

  def take(self, rows: np.ndarray) -> "BoundaryCache":
    """The cache of a subset of the examples, sharing the stored values."""
    return BoundaryCache(self.values, self.starts[rows], self.lengths[rows])


def cache_bytes(num_tokens: np.ndarray, width: int, dtype: np.dtype) -> int:
  """Bytes that the cache of these examples takes."""
  return int(np.sum(num_tokens)) * width * np.dtype(dtype).itemsize


def data_hash(dataset: Any) -> str:
  """Hash of the token ids of a data set in order: what a boundary cache depends on besides the model."""
  second = rejected_starts(dataset)
  digest = hashlib.sha256(b"" if second is None else np.asarray(second, np.int64).tobytes())
  for tokens in dataset.tokens:
    digest.update(np.int64(len(tokens)).tobytes())
    digest.update(np.asarray(tokens, np.int32).tobytes())
  return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class BoundaryJob:
  """What `compute_boundary` needs: the model below the boundary, and how to run it.

  Attributes:
    config: the model's shape.
    subtree: gives the boundary.
    frozen: parameters outside the subtree.
    batch_tokens: padded token positions per batch.
    dtype: of the stored values.
    place: puts (tokens [W,T], offsets [W,T]) of packed rows on the devices.
    multiple_of: rows of a batch are rounded up to a multiple of this (devices that share them).
    track: wraps the iterator of (rows, batch) with a progress display.
  """

  config: model_lib.ModelConfig
  subtree: Subtree
  frozen: Any
  batch_tokens: int = 4096
  dtype: Any = np.float32
  place: Callable[[tuple], tuple] = lambda rows: rows
  multiple_of: int = 1
  track: Callable[[Iterator, int], Iterator] = lambda batches, total: batches


def compute_boundary(
  job: BoundaryJob, dataset: Any, file: pathlib.Path | None = None, keep: bool = True
) -> BoundaryCache:
  """Runs the layers below the boundary over a data set, examples packed into rows.

  Args:
    job: the model and how to run it.
    dataset: has `tokens`, int32 [T_i] for each example, and where they are preference pairs `second`.
    file: where to keep the values (written aside, then renamed, so that a killed run leaves no half file under this
      name); in memory when None. An existing file that is as it was written is reused: its checksum lies beside it.
    keep: whether the values are written there; False: they are in memory, unless the file is there and whole.

  Returns:
    The cache.

  Raises:
    UserError: the subtree begins at the embedding, so there is nothing constant below it.
  """
  if "embed" in job.subtree.extras:
    raise UserError("the embedding is chosen, so no hidden state stays constant; use --boundary_cache=off")
  lengths = ragged.lengths_of(dataset.tokens).astype(np.int64)
  starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
  shape = (int(lengths.sum()), job.config.hidden_size)
  dtype = np.dtype(job.dtype)
  whole = file is not None and _is_whole(file, shape[0] * shape[1] * dtype.itemsize)
  if processes.all_true(whole):
    return BoundaryCache(kept_files.mapped(file, dtype, shape), starts, lengths)
  part, file = None, file if keep else None
  if file is not None:
    files.remove_leftovers(file.parent)  # of killed runs
    part = files.temporary_beside(file)
    files.reserve(part, shape[0] * shape[1] * dtype.itemsize)
  values = np.memmap(part, dtype, "r+", shape=shape) if part is not None else np.empty(shape, dtype)
  plan = packed_rows.packed_plan(lengths, job.batch_tokens, job.multiple_of)
  waiting: tuple | None = None  # results are fetched one batch late, so that the host prepares the next one meanwhile
  for packed in job.track(packed_rows.packed_batches(dataset.tokens, plan, second=rejected_starts(dataset)), len(plan)):
    tokens, offsets = job.place((packed.tokens, packed.offsets))
    hidden = processes.settle(_below(job.config, job.subtree, job.frozen, tokens, offsets))
    if waiting is not None:
      _store(values, starts, lengths, *waiting)
    waiting = (packed, hidden)
  if waiting is not None:
    _store(values, starts, lengths, *waiting)
  if part is not None:
    values.flush()
    checksum = _checksum(part, file.name)
    part.rename(file)
    files.write_text(kept_files.checksum_file(file), checksum)
    values = kept_files.mapped(file, dtype, shape)
  return BoundaryCache(values, starts, lengths)


def _checksum(content: pathlib.Path, name: str) -> str:
  """A line with the sha256 of a file's bytes, and the name that they belong to: no other cache's are taken for them."""
  return f"{files.file_sha256(content)}  {name}\n"


def _is_whole(file: pathlib.Path, size: int) -> bool:
  """Whether hidden states are there, `size` bytes of them, as they were written; what is not is named."""
  if not file.exists():
    return False
  if file.stat().st_size != size:
    reason = f"{file.stat().st_size} bytes and not {size}"
  elif not kept_files.checksum_file(file).exists():
    reason = "without a checksum beside it, by a killed run or an older version"
  elif kept_files.checksum_file(file).read_bytes() != _checksum(file, file.name).encode():
    reason = "damaged (its checksum does not fit)"
  else:
    return True
  log.warning("%s: hidden states, %s; they are computed again", file, reason)
  return False


_below = jax.jit(model_lib.run_below, static_argnums=(0, 1))


def _store(values, starts, lengths, packed: packed_rows.PackedRows, hidden) -> None:
  host = processes.to_host(hidden).reshape(-1, hidden.shape[-1])
  for example, place in zip(packed.examples, packed.places, strict=True):
    start, length = starts[example], lengths[example]
    values[start : start + length] = host[place : place + length]
