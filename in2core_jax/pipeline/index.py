"""An index of a large pool: a few numbers for each example, from which `select --index` chooses in seconds.

One pass over the pool. The same command goes on where it was stopped, and adds what is new in --train_data.
"""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from in2core_jax.data import packing, records, spots
from in2core_jax.data.subsets import by_id
from in2core_jax.data.tokenizing import TokenizedDataset
from in2core_jax.errors import how_many
from in2core_jax.index import basis as bases
from in2core_jax.index import store
from in2core_jax.index.rows import NARROW
from in2core_jax.influence.index_pass import IndexPass, OnDevice
from in2core_jax.model.objective import losses_and_hidden_fn
from in2core_jax.parallel import processes
from in2core_jax.pipeline import phases
from in2core_jax.pipeline.index_settings import IndexSettings
from in2core_jax.pipeline.projection import Projection
from in2core_jax.pipeline.scoring import Clock
from in2core_jax.pipeline.session import Session, open_session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs import resumable, run_folder, stopping
from in2core_jax.runs.progress import Progress
from in2core_jax.runs.unfinished import Work
from in2core_jax.selection import hybrid
from in2core_jax.selection.whitening import spread_among
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)

# What `select --index` takes from the index.
MADE_WITH = ("model", "checkpoint", "layers", "sketch_size", "seed", "loss_reduction", "dtype", "frozen_weights")
_RAW_ROWS = 128  # examples whose whole sketched gradients make a piece
_MOST_SHARDS = 1000


class Pool:
  """Examples of one session, as the index sees them."""

  def __init__(self, session: Session, s: Settings):
    """Draws the sketch and reads the weights."""
    self.session, self.settings = session, s
    params = session.checkpoint_params(s.checkpoint)
    self.projection = Projection(session, s, params, s.seed)
    self._own_hidden = params is session.model.params  # views are those of the base model, as in `policy_inputs`
    sketch = self.projection.sketch
    self._pass = IndexPass(losses_and_hidden_fn(session.model.config, sketch.tree), sketch, params)

  def keys(self, part: str) -> np.ndarray:
    """The names of a part's examples."""
    dataset = self.session.splits[part]
    return store.keys_of(dataset.tokens, dataset.response_mask)

  def raw(self, part: str, rows: np.ndarray, pieces: resumable.ShardSpec | None, what: str) -> bases.Raw:
    """Whole sketched gradients of some rows, kept in pieces where a killed run goes on from."""
    if not len(rows):
      width = self.projection.sketch.width
      views = np.zeros((0, len(hybrid.VIEWS), self.session.model.config.hidden_size), np.float32)
      return bases.Raw(np.zeros((0, width), np.float32), views, np.zeros(0, np.float32))
    found = []
    with Progress(len(rows), what, "examples") as progress:
      for number, own in enumerate(raw_pieces(rows)):
        compute = lambda own=own: dataclasses.asdict(self._raw(part, own))  # noqa: E731
        kept = compute() if pieces is None else resumable.kept(pieces.store("raw"), number, compute)
        found.append(bases.Raw(**kept))
        progress.update(len(own))
    return bases.Raw(
      *(np.concatenate([getattr(piece, field.name) for piece in found]) for field in dataclasses.fields(bases.Raw))
    )

  def _raw(self, part: str, rows: np.ndarray) -> bases.Raw:
    packer = self.session.packer(part, rows=rows)
    plan = packer.sequential_plan(self.session.batching.batch_tokens)
    most = spots.most_in_a_row(plan)
    raw = self._pass.raw(self._items(packer, plan, most), len(rows), most)
    return raw if self._own_hidden else dataclasses.replace(raw, hidden=self._base_hidden(part, rows))

  def _items(self, packer: packing.Packer, plan: Sequence, most: int):
    place = self.session.batching.place
    for shape, cells in plan:
      own, batch = packer.batch(cells, shape)
      where = spots.spots_of(cells, shape, packer.dataset.tokens, most)
      yield own, place(batch), spots.Spots(*(place((value,))[0] for value in where))

  def _base_hidden(self, part: str, rows: np.ndarray) -> np.ndarray:
    found = self.session.hidden.pooled_rows(part, rows)
    return np.stack([found[view] for view in hybrid.VIEWS], axis=1)

  def rows(self, planned: "Planned", plan: Sequence, basis: OnDevice) -> dict[str, np.ndarray]:
    """Rows of the index for some batches of new training examples, in the order of the batches."""
    order = order_of(plan)
    back = np.full(len(planned.rows) + 1, -1)  # the last one is -1's own
    back[order] = np.arange(len(order))
    items = self._items(planned.packer, plan, planned.most)
    found = self._pass.rows(((back[own], *rest) for own, *rest in items), len(order), planned.most, basis)
    if not self._own_hidden and basis.arrays["hidden"].size:
      found |= self._pass.hidden_rows(self._base_hidden("train", planned.rows[order]), basis)
    return found

  def rows_of(self, raw: bases.Raw, basis: OnDevice) -> dict:
    """Rows of the index from whole sketched gradients."""
    return self._pass.rows_of(raw, basis)


@dataclasses.dataclass(frozen=True, eq=False)
class Planned:
  """New training examples, cut into batches and shards.

  Attributes:
    rows: int64 [n], of the training set, copies once.
    packer: of them.
    shards: for each shard its batches, whose rows count from 0 among the n.
    most: examples that a packed row holds at most.
    name: of examples and batches.
  """

  rows: np.ndarray
  packer: packing.Packer
  shards: list[Sequence]
  most: int
  name: str


def order_of(plan: Sequence) -> np.ndarray:
  """The examples of some batches in order, int64 [n]."""
  return np.array([example for _, cells in plan for example in spots.examples_of(cells)], np.int64)


def raw_pieces(rows: np.ndarray) -> list[np.ndarray]:
  """Examples whose whole sketched gradients are computed and kept together."""
  return [rows[start : start + _RAW_ROWS] for start in range(0, len(rows), _RAW_ROWS)]


def sample_rows(train: TokenizedDataset, size: int) -> np.ndarray:
  """The training examples that the basis follows: at most `size` with a response, of copies the first, by their ids."""
  counted = np.flatnonzero((train.num_response_tokens > 0) & records.firsts(train.records))
  return spread_among(train.ids, counted, size)


def other_rows(train: TokenizedDataset, sample: np.ndarray) -> np.ndarray:
  """The training examples whose rows a new index computes in its pass: copies once, and not those of the sample."""
  keys = store.keys_of(train.tokens, train.response_mask)
  rows = store.firsts(keys)
  return rows[~np.isin(keys[rows], keys[sample])]


def row_bytes(s: IndexSettings) -> int:
  """Bytes that an index keeps of an example, its name among them; its shards have a few more."""
  return NARROW.itemsize * (s.index_size + len(hybrid.VIEWS) * s.index_hidden) + 4 * (2 + len(hybrid.VIEWS)) + 16


# ---- the stage -----------------------------------------------------------------------


def run(s: IndexSettings, session: Session | None = None) -> str:
  """Makes the index, or adds to it what is new; returns the run folder."""
  run_folder.RunDir.refuse_held(s.run_dir)
  session = session or open_session(s)
  pool = Pool(session, s)
  run_dir = run_folder.RunDir.open(s.run_dir, identity_of(pool, s), overwrite=s.overwrite)
  index, keys = store.IndexStore(run_dir), pool.keys("train")
  parts = list(run_dir.read_json(store.PARTS)) if run_dir.holds(store.PARTS) else []
  basis = index.load_basis() if parts else index.read_basis()  # rows in another one would not go with those there
  known = index.keys(index.shards(parts))
  if run_dir.holds(store.MARK) and np.isin(keys, known).all():
    log.info("%s has all of %s already", run_dir.path, how_many(len(keys), "example"))
    return str(run_dir.path)
  session.splits.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.index --flagfile=THIS"])
  run_dir.remove(store.MARK)
  work, clock = Work(run_dir, s.shard_batches), Clock()
  basis, sample = _basis(pool, s, index, work, parts, basis)
  clock.lap("basis")
  _fill(pool, s, index, keys, parts, basis, sample)
  clock.lap("pass over the pool")
  _finish(pool, s, index, parts, clock)
  work.remove()
  return str(run_dir.path)


def identity_of(pool: Pool, s: IndexSettings) -> dict:
  """What a row depends on; not the pool, to which examples are added."""
  session = pool.session
  known = s.index_basis == "queries"
  return {
    "stage": "index",
    "index": store.VERSION,
    "model_hash": session.model.hash,
    "checkpoint": train_loop.checkpoint_hash(s.checkpoint),
    "gradients": {"loss_reduction": s.loss_reduction, "dtype": s.dtype},
    "sketch": pool.projection.sketch.identity(),
    "basis": {"kind": s.index_basis, "size": s.index_size, "hidden": s.index_hidden, "seed": s.seed},
    "data": session.splits.identity("eval") if known else {},
  }


def _basis(
  pool: Pool, s: IndexSettings, index: store.IndexStore, work: Work, parts: list, basis: bases.Basis | None
) -> tuple[bases.Basis, tuple[np.ndarray, bases.Raw] | None]:
  """The basis, made where there is none, and the sample of the training set while its rows are not written."""
  if basis is not None and parts and (len(parts) > 1 or _is_whole(index, parts[0])):
    return basis, None
  rows = sample_rows(pool.session.splits["train"], s.index_size)
  named = run_folder.hash_of([pool.session.splits.identity("train"), rows.tolist()])
  sample = pool.raw("train", rows, work.pieces("sample", rows=named), phases.SAMPLE)
  if basis is None:
    _make_basis(pool, s, index, work, sample)
    basis = index.read_basis()
  return basis, (rows, sample)


def _make_basis(pool: Pool, s: IndexSettings, index: store.IndexStore, work: Work, sample: bases.Raw) -> None:
  """Makes and writes the basis, and with it the queries."""
  asked = asked_rows(pool.session) if s.index_basis == "queries" else np.zeros(0, np.int64)
  queries = pool.raw("eval", asked, work.pieces("queries"), phases.ASKED)
  views = slice(None) if s.index_hidden else slice(0)
  cut = [dataclasses.replace(raw, hidden=raw.hidden[:, views]) for raw in (queries, sample)]
  basis, facts = bases.make(s.index_basis, *cut, s.index_size, s.index_hidden, s.seed)
  if processes.is_writer():
    if len(asked):
      index.write_queries(pool.rows_of(queries, OnDevice(basis)), pool.keys("eval")[asked])
    index.write_basis(basis)
  index.run_dir.write_json("basis.json", facts | {"sha256": resumable.tree_sha256(basis.arrays())})
  log.info("basis: %s", ", ".join(f"{name} {value}" for name, value in facts.items()))
  processes.barrier("basis written")


def asked_rows(session: Session) -> np.ndarray:
  """The evaluation examples with a response, in the order of their ids."""
  return by_id(session.splits["eval"], session.splits["eval"].num_response_tokens > 0)


def _fill(
  pool: Pool, s: IndexSettings, index: store.IndexStore, keys: np.ndarray, parts: list, basis: bases.Basis, sample
) -> None:
  """Computes and writes the shards that are not there: the sample's, those of an unfinished part, new ones."""
  placed = OnDevice(basis)
  if sample is not None:
    _fill_sample(pool, index, keys, parts, placed, sample)
  if len(parts) > 1 and not _is_whole(index, parts[-1]):
    other = planned(pool, s, keys, index.keys(index.shards(parts[:-1])))
    if other.name == parts[-1]["plan"]:
      _fill_part(pool, index, keys, parts[-1], other, placed)
    else:  # other examples by now: what is there stays, the rest is planned anew
      there = [number for number in index.shards(parts[-1:]) if index.has_rows(number)]
      parts[-1]["shards"] = there[-1] + 1 - parts[-1]["first"] if there else 0
  for part in parts:  # what is damaged in an older part is computed again in a new one
    lost = [number for number in index.shards([part]) if not processes.all_true(index.has_rows(number))]
    if lost:
      part["lost"] = [*part.get("lost", []), *lost]
  new = planned(pool, s, keys, index.keys(index.shards(parts)))
  if not new.shards:
    return
  parts.append({"first": parts[-1]["first"] + parts[-1]["shards"], "shards": len(new.shards), "plan": new.name})
  index.run_dir.write_json(store.PARTS, parts)
  _fill_part(pool, index, keys, parts[-1], new, placed)


def _is_whole(index: store.IndexStore, part: dict) -> bool:
  return all(processes.all_true(index.has_rows(number)) for number in index.shards([part]))


def _fill_sample(pool: Pool, index: store.IndexStore, keys: np.ndarray, parts: list, basis: OnDevice, sample) -> None:
  """The first part: rows of the examples that the basis was made of, which are computed already."""
  rows, raw = sample
  count = -(-len(rows) // _RAW_ROWS)
  parts[:] = [{"first": 0, "shards": count, "plan": "sample"}]
  index.run_dir.write_json(store.PARTS, parts)
  for number in range(count):
    own = slice(number * _RAW_ROWS, (number + 1) * _RAW_ROWS)
    if not processes.all_true(index.has_rows(number)):
      _write(index, number, pool.rows_of(raw.take(np.arange(len(rows))[own]), basis), keys[rows[own]])
  processes.barrier("sample written")


def planned(pool: Pool, s: IndexSettings, keys: np.ndarray, known: np.ndarray) -> Planned:
  """The training examples that are not known."""
  rows = store.firsts(keys)
  rows = rows[~np.isin(keys[rows], known)]
  packer = pool.session.packer("train", rows=rows)
  plan = packer.sequential_plan(pool.session.batching.batch_tokens)
  size = max(s.shard_batches, -(-len(plan) // _MOST_SHARDS))
  cut = [plan[start : start + size] for start in range(0, len(plan), size)]
  shapes = [[list(shape), [list(map(len, cell)) for cell in cells]] for shape, cells in plan]
  name = store.name_of(keys[rows[order_of(plan)]], run_folder.hash_of([size, shapes]))
  return Planned(rows, packer, cut, spots.most_in_a_row(plan), name)


def _fill_part(
  pool: Pool, index: store.IndexStore, keys: np.ndarray, part: dict, planned: Planned, basis: OnDevice
) -> None:
  total = sum(map(len, planned.shards))
  with Progress(total, phases.INDEX, "batches") as progress, stopping.finish_on_sigterm() as stop_requested:
    for number, plan in enumerate(planned.shards, part["first"]):
      if processes.all_true(index.has_rows(number)):
        progress.skip(len(plan))
        continue
      _write(index, number, pool.rows(planned, plan, basis), keys[planned.rows[order_of(plan)]])
      progress.update(len(plan))
      if stop_requested():
        break
  processes.barrier("part written")


def _write(index: store.IndexStore, number: int, found: dict, keys: np.ndarray) -> None:
  store.check_finite(found, number)
  if processes.deals(number):
    index.write_rows(number, found, keys)


def _finish(pool: Pool, s: IndexSettings, index: store.IndexStore, parts: list, clock: Clock) -> None:
  """Notes what the index is, as its last file."""
  evals, known = pool.session.splits["eval"], index.keys(index.shards(parts))
  index.run_dir.write_json(store.PARTS, parts)
  facts = {
    "examples": len(known),
    "flags": {name: getattr(s, name) for name in MADE_WITH},
    "evaluation_examples": len(evals),
    "basis": index.run_dir.read_json("basis.json"),
    "seconds": clock.seconds,
  }
  index.run_dir.write_json(store.MARK, facts)
  log.info("index of %s: %s", how_many(len(known), "example"), index.run_dir.path)
