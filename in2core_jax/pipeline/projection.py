"""The training set's projected gradients at some parameters, kept beside the run folder and used again."""

import dataclasses

import jax
import numpy as np

from in2core_jax.influence import projected
from in2core_jax.influence.projected import MOST_NUMBERS as MOST_NUMBERS
from in2core_jax.params import adapters, subtree
from in2core_jax.pipeline import phases
from in2core_jax.pipeline.session import BoundSubtree, Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs import run_folder, stopping
from in2core_jax.training import train_loop


class Projection:
  """The training set's projected gradients at some parameters, kept beside the run folder and used again."""

  def __init__(self, session: Session, s: Settings, params, seed: int):
    """Draws the projection; `params` are those at which gradients are taken."""
    self.session, self.params, self.settings = session, params, s
    cores = adapters.cores_of(params, s.modules)
    size = projected.size_of(params, s.layers, s.sketch_size, cores)
    how = projected.SketchSettings(size, seed, allow_small=size < projected.MIN_SIZE)
    drawn = projected.make_sketch(params, s.layers, how, cores)
    self.sketch = dataclasses.replace(drawn, params=session.model.place(drawn.params))
    tree = self.sketch.tree
    self.chosen = BoundSubtree(tree, params, session.kernels(tree).at(*subtree.split(self.sketch.params, tree)))

  def features(self, part: str, rows: np.ndarray | None = None) -> np.ndarray:
    """Projected gradients of a part's examples, float32 [N, W]."""
    batcher = self.session.batcher(part, self.chosen.tree, self.params, rows)  # a sketch changes no hidden state
    stream = self.session.stream(batcher, phases.projected(part))
    return self.chosen.problem.adapter_features(stream, len(batcher))

  def columns_of_layers(self) -> list[np.ndarray]:
    """Which numbers of `features` are of each chosen layer, int [w] for each."""
    found: list[list[np.ndarray]] = [[] for _ in self.sketch.tree.layers]
    start = 0
    for leaf in jax.tree.leaves(self.chosen.problem.sub):  # [k, ...] each, one after the other
      for place, own in enumerate(np.arange(start, start + leaf.size).reshape(leaf.shape[0], -1)):
        found[place].append(own)
      start += leaf.size
    return [np.concatenate(own) for own in found]

  def store(self) -> projected.ProjectedStore:
    """The training set's, computed where they are not on disk yet."""
    s, session = self.settings, self.session
    identity = {
      "model": session.model.hash,
      "checkpoint": train_loop.checkpoint_meta(s.checkpoint) if self.params is not session.model.params else {},
      "data": session.splits.identity("train"),
      "loss_reduction": s.loss_reduction,
      "dtype": s.dtype,
    }
    if session.splits["train"].second is not None:
      identity["beta"] = session.settings.beta
    name = run_folder.hash_of([identity, self.sketch.identity()])[:16]
    folder = run_folder.beside(s.run_dir, "projected") / name
    store = projected.ProjectedStore.open(folder, identity, self.sketch, len(session.splits["train"]))
    with stopping.finish_on_sigterm() as stop_requested:
      store.fill(lambda rows: self.features("train", rows), stop_requested)
    return store
