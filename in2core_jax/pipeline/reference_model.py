"""The reference model of the DPO loss, which is the base model: its log ratios, computed once and kept on disk."""

import dataclasses
import logging
from collections.abc import Callable

import jax
import numpy as np

from in2core_jax import __version__ as version
from in2core_jax.data import packing
from in2core_jax.data.batches import PairTerms
from in2core_jax.data.tokenizing import TokenizedDataset
from in2core_jax.model import hidden_cache
from in2core_jax.model.objective import make_objective
from in2core_jax.parallel import processes
from in2core_jax.params import subtree
from in2core_jax.pipeline import phases
from in2core_jax.pipeline.batching import Batching
from in2core_jax.pipeline.loaded_model import LoadedModel
from in2core_jax.runs import files, run_folder, shards
from in2core_jax.runs.progress import track

log = logging.getLogger(__name__)

_MAGIC = b"in2core_jax reference 1 "


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceModel:
  """Log ratios of preference pairs at the base model.

  Attributes:
    model: the base model.
    run_dir: the run folder beside which they are kept, in `reference/`.
    known: hash of a part's examples -> its log ratios.
  """

  model: LoadedModel
  run_dir: str
  known: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def terms(self, part: str, dataset: TokenizedDataset, batching: Batching, beta: float, rows=None) -> PairTerms | None:
    """What batches of a part need; None where it is no preference pairs. Nothing is computed before the first batch.

    Args:
      part: train, eval or test.
      dataset: all of its examples.
      batching: how they are cut into batches.
      beta: scale of the loss.
      rows: int [n], the only examples of the batches; None: all.
    """
    if dataset.second is None:
      return None
    every = lambda: self.log_ratios(part, dataset, batching)  # noqa: E731
    return PairTerms(beta, every if rows is None else lambda: every()[np.asarray(rows, np.int64)])

  def log_ratios(self, part: str, dataset: TokenizedDataset, batching: Batching) -> np.ndarray:
    """log ref_w - log ref_l of each example, float32 [N]: sums over the response tokens of either side."""
    masks = [np.packbits(mask).tobytes() for mask in dataset.response_mask]
    name = files.hash_of([hidden_cache.data_hash(dataset), [mask.hex() for mask in masks]])
    if name not in self.known:
      identity = files.hash_of([name, self.model.hash, self.model.dtype, version])
      path = run_folder.beside(self.run_dir, "reference") / f"{part}-{identity[:16]}.bin"
      self.known[name] = _kept(path, identity, lambda: self._computed(part, dataset, batching))
    return self.known[name]

  def _computed(self, part: str, dataset: TokenizedDataset, batching: Batching) -> np.ndarray:
    """By a pass of the whole model over packed rows."""
    params = self.model.params
    tree = subtree.make_subtree(params, "last:1", "all")
    sub, frozen = subtree.split(params, tree)
    nothing = PairTerms(1.0, lambda: np.zeros(len(dataset)))  # beta 1 and reference 0: the margin is the log ratio
    packer = packing.Packer(dataset, "sum", None, batching.groups, batching.packed_shapes, nothing)
    outputs = jax.jit(make_objective(self.model.config, tree).outputs)
    plan = packer.sequential_plan(batching.batch_tokens)
    found = np.zeros(len(dataset), np.float32)
    for rows, batch in track(packer.planned(plan), len(plan), phases.reference(part)):
      values = processes.to_host(outputs(sub, frozen, batching.place(batch)))
      there = np.flatnonzero(rows >= 0)
      found[rows[there]] = values[there]
    return found


def _kept(path, identity: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
  """The numbers of an earlier run, or computed and written now; a damaged file is told and made again. Collective."""
  found = None
  if processes.from_writer(path.exists()):
    try:
      header, arrays = shards.unpack(_MAGIC, path.read_bytes())
      found = arrays["log_ratios"] if header["identity"] == identity else None
    except (OSError, shards.DamagedError) as error:
      log.warning("%s is damaged (%s); the reference model is run again", path, error)
  if processes.all_true(found is not None):
    return found
  found = compute()
  if processes.is_writer():
    files.write_bytes(path, shards.pack(_MAGIC, {"identity": identity}, {"log_ratios": found}))
  return found
