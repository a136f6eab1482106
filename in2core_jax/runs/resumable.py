"""A pass over a stream of batches: one result a batch, or their sum; kept on disk where a killed run is to go on.

  for rows, values in results(stream, "losses", kernel)     # kernel(batch) of every batch, on the host
  sums = total(stream, "gradient", step, start)             # step(... step(step(start, item), item) ..., item)

Over a plain stream that is all. A `ResumableStream` is cut into shards: finished ones are read back, their batches are
not even built, and the rest is computed. The cut follows from the plan of the batches alone and numbers are stored bit
for bit, so a run that was killed ends in the bytes of one that was not.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax.errors import how_many
from in2core_jax.parallel import processes
from in2core_jax.runs import files
from in2core_jax.runs.progress import Progress
from in2core_jax.runs.run_folder import RunDir
from in2core_jax.runs.shards import ShardStore

log = logging.getLogger(__name__)

Tree = Any
# Yields (rows of the data set, batch on the devices), the same at every call.
Stream = Callable[[], Iterator[tuple[np.ndarray, Any]]]

MOST_SHARDS = 1000  # of a pass: more would be slow to read back, above all from gs://
_SAVING_SHARE = 0.05  # of the time, at most, goes into saving the state of a sum or a recursion

Arrays = dict[str, np.ndarray]


@contextlib.contextmanager
def _never_stop() -> Iterator[Callable[[], bool]]:
  yield lambda: False


@dataclasses.dataclass(frozen=True)
class ShardSpec:
  """Where the finished pieces of one computation are kept.

  Attributes:
    run_dir: the run folder; its identity is all that the pieces depend on, but for `depends_on`.
    folder: name in the run folder.
    depends_on: JSON object, such as the hash of a direction (`tree_sha256`).
    shard_batches: batches of a shard, at least: what a kill can cost.
    hold: context manager around work that should come to the end of a piece when the process is told to stop; yields
      a function: whether it is (`stopping.finish_on_sigterm`).
  """

  run_dir: RunDir
  folder: str
  depends_on: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  shard_batches: int = 16
  hold: Callable[[], contextlib.AbstractContextManager[Callable[[], bool]]] = _never_stop

  def store(self, name: str, **depends_on: Any) -> ShardStore:
    """Opens the store of a part of the computation; other devices or another JAX round differently."""
    where = {"jax": jax.__version__, "devices": [jax.default_backend(), jax.devices()[0].device_kind]}
    return ShardStore(self.run_dir, f"{self.folder}/{name}", where | dict(self.depends_on) | depends_on)


@dataclasses.dataclass(frozen=True, eq=False)
class ResumableStream:
  """A `Stream` whose passes are kept: `results` and `total` go on where a killed run was stopped.

  Attributes:
    plan: what each batch is made of, with a JSON form; in order.
    build: some of the plan -> its (rows, batch on the devices).
    pieces: where the results are kept; one folder for each pass over the stream.
    show: gives the progress display of a pass, in batches.
  """

  plan: Sequence[Any]
  build: Callable[[Sequence[Any]], Iterator[Any]]
  pieces: ShardSpec
  show: Callable[[], Progress]

  def __call__(self) -> Iterator[Any]:
    """All batches, as any stream; nothing is kept."""
    return self.build(self.plan)

  @functools.cached_property
  def shards(self) -> list[Sequence[Any]]:
    """The plan, cut."""
    size = max(self.pieces.shard_batches, -(-len(self.plan) // MOST_SHARDS))
    return [self.plan[start : start + size] for start in range(0, len(self.plan), size)]

  @functools.cached_property
  def _plan_sha256(self) -> str:
    digest = hashlib.sha256(b"[")  # of `files.hash_of(self.shards)`, without the text of all of them
    for number, shard in enumerate(self.shards):
      digest.update(("," if number else "").encode() + files.canonical_json([*shard]).encode())
    digest.update(b"]")
    return digest.hexdigest()

  def store(self, name: str) -> ShardStore:
    """Where a pass over this stream keeps its shards."""
    return self.pieces.store(name, plan=self._plan_sha256)


def without_rows(stream: Stream) -> Callable[[], Iterator[Any]]:
  """The same stream, of batches alone."""
  only = lambda items: (batch for _, batch in items)  # noqa: E731
  if isinstance(stream, ResumableStream):
    return dataclasses.replace(stream, build=lambda plan: only(stream.build(plan)))
  return lambda: only(stream())


# ---- pieces ------------------------------------------------------------------------


def read(store: ShardStore, index: int) -> Arrays | None:
  """A piece that every process can read and trusts, or None; collective: all processes take the same turn."""
  found = store.read(index)
  return found if processes.all_true(found is not None) else None


def write(store: ShardStore, index: int, arrays: Arrays) -> None:
  """Writes a piece that every process has: the pieces of a pass are dealt to the processes."""
  if index % jax.process_count() == jax.process_index():
    store.write(index, arrays)


def kept(store: ShardStore, index: int, compute: Callable[[], Arrays]) -> Arrays:
  """A piece as an earlier run has written it, or computed and written now."""
  found = read(store, index)
  if found is None:
    found = compute()
    write(store, index, found)
  return found


# ---- results, batch by batch ---------------------------------------------------------


def results(stream: Stream, name: str, kernel: Callable[[Any], Any]) -> Iterator[tuple[np.ndarray, Any]]:
  """Yields (rows, kernel(batch) on the host) of every batch; what was stored comes first.

  Args:
    stream: the batches.
    name: of this pass, a folder's name; different for different kernels on one stream.
    kernel: batch -> an array, or a dictionary of arrays.
  """
  if not isinstance(stream, ResumableStream):
    yield from _one_late(stream(), kernel)
    return
  store, missing = stream.store(name), []
  with stream.show() as progress:
    for index, shard in enumerate(stream.shards):
      found = read(store, index)
      if found is None:
        missing.append(index)
      else:
        progress.skip(len(shard))
        yield from _unpack(found)
    _tell(stream, name, len(stream.shards) - len(missing))
    yield from _compute(stream, store, missing, kernel, progress)


def _compute(stream: ResumableStream, store: ShardStore, missing: list[int], kernel, progress: Progress) -> Iterator:
  """The results of the missing shards, each stored before its own are given out."""
  walk = (((index, rows), batch) for index in missing for rows, batch in stream.build(stream.shards[index]))
  found: list[tuple[np.ndarray, Any]] = []
  with stream.pieces.hold() as stop_requested:
    for (index, rows), values in _one_late(walk, kernel):
      found.append((rows, values))
      progress.update(1)
      if len(found) < len(stream.shards[index]):
        continue
      write(store, index, _pack(found))  # while the device computes the first batch of the next shard
      yield from found
      found = []
      if stop_requested():
        break


def _one_late(items: Iterable[tuple[Any, Any]], kernel: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
  """Yields (key, kernel(batch) on the host) one batch late: fetching leaves the device busy with the next one."""
  waiting = None
  for key, batch in items:
    ready, waiting = waiting, (key, processes.settle(kernel(batch)))
    if ready is not None:
      yield ready[0], processes.to_host(ready[1])
  if waiting is not None:
    yield waiting[0], processes.to_host(waiting[1])


def _pack(found: list[tuple[np.ndarray, Any]]) -> Arrays:
  """Results of some batches as named arrays: "number|rows", and "number|" or "number|name" of a dictionary."""
  arrays = {}
  for number, (rows, values) in enumerate(found):
    named = values if isinstance(values, dict) else {"": values}
    arrays |= {f"{number:06d}|{name}": value for name, value in ({"rows": rows} | named).items()}
  return arrays


def _unpack(arrays: Arrays) -> Iterator[tuple[np.ndarray, Any]]:
  for _, keys in itertools.groupby(sorted(arrays), lambda key: key.split("|")[0]):
    named = {key.split("|")[1]: arrays[key] for key in keys}
    rows = named.pop("rows")
    yield rows, named.get("", named)


# ---- sums ----------------------------------------------------------------------------


def total(stream: Callable[[], Iterator[Any]], name: str, step: Callable[[Tree, Any], Tree], start: Tree) -> Tree:
  """step(... step(step(start, item), item) ..., item) over the items of a stream; kept, the sum so far is saved.

  Args:
    stream: of any items; (rows, batch) in a `Stream`.
    name: of this sum, a folder's name.
    step: (sum, item) -> sum; may donate the sum.
    start: the first sum, a pytree of arrays.

  Returns:
    Pytree like `start`.
  """
  if not isinstance(stream, ResumableStream):
    return functools.reduce(lambda found, item: processes.settle(step(found, item)), stream(), start)
  snapshot, restore = Snapshot(stream.store(name)), _restorer(start)
  saved = snapshot.load()
  done = 0 if saved is None else int(saved["done"])
  found = start if saved is None else restore(saved)
  _tell(stream, name, done)
  with stream.show() as progress, stream.pieces.hold() as stop_requested:
    progress.skip(sum(map(len, stream.shards[:done])))
    for number in range(done, len(stream.shards)):
      for item in stream.build(stream.shards[number]):
        found = processes.settle(step(found, item))
        progress.update(1)
      stop, last = stop_requested(), number + 1 == len(stream.shards)
      snapshot.save(lambda found=found, done=number + 1: leaves(found) | {"done": np.int64(done)}, now=stop or last)
      if stop:
        break
  return restore(leaves(found))  # by the same road as when it is read back, so that what follows runs alike


def _tell(stream: ResumableStream, name: str, done: int) -> None:
  if done:
    log.info("%s: kept from an earlier run: %d of %s", name, done, how_many(len(stream.shards), "shard"))


def leaves(tree: Tree) -> Arrays:
  """The leaves of a pytree as named host arrays."""
  return {f"{number:06d}": leaf for number, leaf in enumerate(jax.tree.leaves(processes.to_host(tree)))}


def from_leaves(arrays: Arrays, like: Tree) -> Tree:
  """Inverse of `leaves`: host arrays in the structure of `like`."""
  structure = jax.tree.structure(like)
  return jax.tree.unflatten(structure, [arrays[f"{number:06d}"] for number in range(structure.num_leaves)])


def _restorer(like: Tree) -> Callable[[Arrays], Tree]:
  """A function that makes a tree of `leaves`, each leaf where that of `like` is; `like` may be donated meanwhile."""
  committed = lambda leaf: isinstance(leaf, jax.Array) and leaf.committed  # noqa: E731
  where = jax.tree.map(lambda leaf: leaf.sharding if committed(leaf) else None, like)

  def put(value, sharding):
    if sharding is None:
      return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

  return lambda arrays: jax.tree.map(put, from_leaves(arrays, like), where, is_leaf=lambda node: node is None)


class Snapshot:
  """The newest state of a long computation; each one replaces the last, and saving takes a small share of the time."""

  def __init__(self, store: ShardStore):
    """Keeps the state in the store's shard 0."""
    self._store, self._not_before = store, 0.0

  def load(self) -> Arrays | None:
    """The state that was saved last; None where there is none to be trusted."""
    return read(self._store, 0)

  def save(self, arrays: Callable[[], Arrays], now: bool = False) -> None:
    """Saves, or does nothing when the last saving is too short ago for what it took.

    Args:
      arrays: gives the state; asked only when it is saved.
      now: save in any case.
    """
    began = time.monotonic()
    if not processes.from_writer(now or began >= self._not_before):
      return
    state = arrays()
    write(self._store, 0, state)
    ended = time.monotonic()
    self._not_before = ended + (ended - began) / _SAVING_SHARE


# ---- names ---------------------------------------------------------------------------


def tree_sha256(tree: Tree) -> str:
  """sha256 (hex) of a pytree's arrays, bit for bit, with their paths, dtypes and shapes."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    values = np.ascontiguousarray(processes.to_host(leaf))
    digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}\n".encode())
    digest.update(values.reshape(-1).view(np.uint8))
  return digest.hexdigest()
