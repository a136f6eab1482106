"""Checks the machinery on your own model and data before a long run: the same numbers, computed in different ways.

    ./run.sh check --train_data=jsonl:mine.jsonl --layers=last:8

Takes a few training examples, from the shortest to those of median length, and the flags of the run to come. Exit
code 1 if a check fails.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, flags
from experiments.settings import CheckFlags
from in2core_jax import gradients
from in2core_jax.data import batches
from in2core_jax.errors import how_many
from in2core_jax.gradients import Tree, tree_dot
from in2core_jax.parallel import processes, sharding
from in2core_jax.params import subtree
from in2core_jax.pipeline.session import BoundSubtree, Session, choose, open_session

log = logging.getLogger(__name__)

POOL = 64  # records of each part that are read; the examples are chosen among them

# How precisely products are computed -> the largest error that rounding explains. Several times what was measured.
PRECISIONS = ("float32", "tensorfloat32", "bfloat16")
TOLERANCES = {
  "direction": (1e-6, 1e-4, 5e-3),
  "length": (1e-4, 5e-3, 5e-2),
  "scores": (1e-4, 5e-3, 5e-2),
  "finite differences": (1e-2, 5e-2, 1e-1),
  "boundary": (1e-4, 5e-3, 5e-2),
  "curvature": (1e-3, 2e-2, 1e-1),
  "ids": (0.0, 0.0, 0.0),
}


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table.

  Attributes:
    check: what should be equal.
    measure: what `error` is.
    error: NaN fails; None when skipped.
    tolerance: largest error that passes.
    skipped: why it was not done.
  """

  check: str
  measure: str
  error: float | None
  tolerance: float
  skipped: str = ""

  @property
  def failed(self) -> bool:
    """Whether the error is above the tolerance, or no number."""
    return not self.skipped and not self.error <= self.tolerance

  @property
  def verdict(self) -> str:
    """In words."""
    return f"skipped: {self.skipped}" if self.skipped else "FAILED" if self.failed else "ok"


def sample(s: CheckFlags, mesh: Any = None) -> Session:
  """A session whose training set is a few examples with a response, from the shortest to the median length.

  Args:
    s: the flags of the run to come.
    mesh: the devices; those of --mesh when None.
  """
  least = lambda limit: min(limit, POOL) if limit else POOL  # noqa: E731
  limits = {f"{part}_limit": least(getattr(s, f"{part}_limit")) for part in ("train", "eval", "test")}
  cache = "off" if s.boundary_cache == "off" else "memory"
  # Two shapes are enough to see that padding does not matter, and fewer programs are compiled.
  whole = open_session(s.replace(boundary_cache=cache, max_shapes=min(s.max_shapes, 2), **limits), mesh)
  train = whole.splits["train"]
  usable = np.flatnonzero(train.num_response_tokens)
  ranked = usable[np.argsort(train.num_tokens[usable], kind="stable")]
  places = np.linspace(0, len(ranked) // 2, min(s.check_examples, len(ranked)))
  few = train.take(ranked[np.unique(places.round().astype(int))])
  return whole.with_splits(whole.splits.with_parts(train=few))


class Subject:
  """What is checked: a subtree of a model, examples in a batch with padding rows, and a direction to look along.

  Attributes:
    session: data and model.
    chosen: the subtree at its parameters.
    size: examples.
    batch: all of them, as a run would see them (hidden states from the boundary cache, if it has one).
    whole: the same through the whole model.
    direction: half along their mean gradient, half at random; unit length.
  """

  def __init__(self, session: Session):
    """Loads everything and compiles the derivatives that several checks share."""
    s = session.settings
    self.session, self.size = session, len(session.splits["train"])
    params = session.checkpoint_params(s.checkpoint)
    self.chosen: BoundSubtree = choose(session, params, s.layers, s.modules)
    objective = self.chosen.problem.objective
    self.losses = jax.jit(partial(gradients.per_example_losses, objective))
    self.pair = jax.jit(partial(gradients.losses_and_jvp_scores, objective))
    self.by_leaf = jax.jit(partial(gradients.leaf_scores, objective), static_argnames="microbatch")
    self.product = jax.jit(partial(gradients.CURVATURE_PRODUCTS[s.curvature], objective))
    self.gradient = jax.jit(partial(_one_gradient, objective))
    self.batcher = session.batcher("train", self.chosen.tree, params, layout={})
    self.plain = session.batcher("train", layout={})
    self.batch, self.whole = (session.batching.place(self.build(batcher)) for batcher in (self.batcher, self.plain))
    total = jax.jit(partial(gradients.sum_gradient, objective))(*self.at, self.batch)
    noise = _random_like(total, s.seed)
    mixed = jax.tree.map(lambda a, b: a / _norm(total) + b / _norm(noise), total, noise)
    self.total, self.direction = total, jax.tree.map(lambda leaf: leaf / _norm(mixed), mixed)

  @property
  def at(self) -> tuple[Tree, Tree]:
    """(sub, frozen)."""
    return self.chosen.problem.sub, self.chosen.problem.frozen

  def build(self, batcher: batches.Batcher) -> batches.Batch:
    """The batch of all examples on the host, with a padding row at least."""
    rows = np.arange(self.size)
    return batcher.batch(rows, batcher.shape_of(rows), batches.round_up(self.size + 1, batcher.multiple_of))

  def build_alone(self, row: int) -> batches.Batch:
    """The batch of one example on the host, in the smallest shape that holds it, every response slot computed."""
    shape, size = self.batcher.shape_of([row]), self.batcher.multiple_of
    return self.batcher.batch([row], shape, size, num_slots=shape.num_responses)

  def measure(self, batch: batches.Batch) -> np.ndarray:
    """Losses and scores along the direction, [2, B]."""
    return np.stack([processes.to_host(values) for values in self.pair(*self.at, batch, self.direction)])

  @functools.cached_property
  def precision(self) -> str:
    """One of PRECISIONS: how this device multiplies numbers of this dtype."""
    if self.session.settings.dtype == "bfloat16":
      return "bfloat16"
    platform, asked = jax.default_backend(), jax.config.jax_default_matmul_precision
    if platform == "cpu" or asked in ("highest", "float32"):
      return "float32"
    return "bfloat16" if platform == "tpu" else "tensorfloat32"

  def row(self, check: str, measure: str, error, kind: str, skipped: str = "") -> Row:
    """A row with the tolerance of its kind."""
    error = None if skipped else float(error)
    return Row(check, measure, error, TOLERANCES[kind][PRECISIONS.index(self.precision)], skipped)


def _one_gradient(objective, sub, frozen, batch, row):
  """Gradient of the loss of one row of a batch; its neighbours run along."""
  return gradients.widen(jax.grad(lambda s: gradients.per_example_losses(objective, s, frozen, batch)[row])(sub))


_norm = lambda tree: jnp.sqrt(tree_dot(tree, tree))  # noqa: E731
_gap = lambda a, b: _norm(jax.tree.map(jnp.subtract, a, b)) / _norm(b)  # noqa: E731


def _random_like(tree: Tree, seed: int) -> Tree:
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  drawn = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(structure, drawn)


def relative(found, wanted) -> float:
  """Largest difference, relative to the largest number; NaN if any number is."""
  found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
  return float(np.max(np.abs(found - wanted)) / max(np.max(np.abs(wanted)), np.finfo(np.float32).tiny))


# ---- the checks ----------------------------------------------------------------------


def alone(x: Subject) -> list[Row]:
  """Neighbours and padding change nothing about an example's gradient."""
  angles, lengths = [], []
  for row in range(x.size):
    inside = x.gradient(*x.at, x.batch, row)
    single = x.gradient(*x.at, x.session.batching.place(x.build_alone(row)), 0)
    sizes = _norm(inside), _norm(single)
    angles.append(1 - float(tree_dot(inside, single) / (sizes[0] * sizes[1])))
    lengths.append(abs(float(sizes[0] / sizes[1]) - 1))
  name = "an example alone = in a batch"
  return [
    x.row(name, "1 - cosine of its gradients", np.max(angles), "direction"),
    x.row(name, "relative length of its gradients", np.max(lengths), "length"),
  ]


def modes(x: Subject) -> list[Row]:
  """Forward mode, reverse mode and per-example gradients give the same scores."""
  forward = x.measure(x.batch)[1]
  error = relative(forward, by_examples(x, x.session.settings.microbatch))
  summed = relative(np.sum(forward), tree_dot(x.total, x.direction))
  return [x.row("jvp = reverse mode", "relative difference of scores", np.maximum(error, summed), "scores")]


def by_examples(x: Subject, microbatch: int | None) -> np.ndarray:
  """Scores [B] along the direction from per-example gradients."""
  return sum(processes.to_host(leaf)[0].sum(-1) for leaf in jax.tree.leaves(_leaf_scores(x, microbatch)))


def _leaf_scores(x: Subject, microbatch: int | None) -> Tree:
  size = x.batch.valid.shape[0]
  microbatch = None if microbatch is None or microbatch >= size else microbatch
  return x.by_leaf(*x.at, x.batch, jax.tree.map(lambda leaf: leaf[None], x.direction), microbatch=microbatch)


def finite_differences(x: Subject) -> list[Row]:
  """The derivative is the slope of the loss: (8 (l(e) - l(-e)) - (l(2e) - l(-2e))) / 12 e, the better of two steps e.

  The weights move in float32 at least: steps that a derivative can be read off vanish in half precision.
  """
  forward = x.measure(x.batch)[1]
  sub, frozen = gradients.widen(x.at)
  step = 0.02 / np.max(np.abs(forward))  # nats: far above the rounding of a loss, far below its bends

  def losses(step):
    moved = jax.tree.map(lambda leaf, d: leaf + jnp.asarray(step, leaf.dtype) * d, sub, x.direction)
    return np.asarray(processes.to_host(x.losses(moved, frozen, x.batch)), np.float64)

  rises = {k: losses(k * step) - losses(-k * step) for k in (1, 2, 4)}
  slopes = [(8 * rises[k] - rises[2 * k]) / (12 * k * step) for k in (1, 2)]
  error = min(relative(forward, slope) for slope in slopes)
  return [x.row("jvp = finite differences", "relative difference of scores", error, "finite differences")]


def boundary(x: Subject) -> list[Row]:
  """Hidden states from the boundary cache stand for the layers below."""
  names = ("boundary cache = whole model", "relative difference of losses and scores")
  product = ("boundary cache = whole model", f"relative difference of {x.session.settings.curvature} products")
  if x.batch.hidden is None:
    why = "no boundary cache with these flags"
    return [x.row(*names, None, "boundary", why), x.row(*product, None, "curvature", why)]
  errors = [relative(*pair) for pair in zip(x.measure(x.batch), x.measure(x.whole), strict=True)]
  gap = _gap(*(x.product(*x.at, batch, x.direction) for batch in (x.batch, x.whole)))
  return [x.row(*names, np.max(errors), "boundary"), x.row(*product, gap, "curvature")]


def layers(x: Subject) -> list[Row]:
  """The layers' scores add up to the total, and each is the score along its own part of the direction."""
  named = subtree.layer_sums(_leaf_scores(x, x.session.settings.microbatch), x.chosen.tree)
  total = x.measure(x.batch)[1]
  error = relative(sum(processes.to_host(value)[0] for value in named.values()), total)
  if x.chosen.tree.layers:
    first = x.direction | {"layers": jax.tree.map(lambda leaf: leaf.at[1:].set(0), x.direction["layers"])}
    first |= {name: jax.tree.map(jnp.zeros_like, x.direction[name]) for name in x.chosen.tree.extras}
    part = processes.to_host(x.pair(*x.at, x.batch, first)[1])
    gap = part - processes.to_host(named[f"layer {x.chosen.tree.layers[0]}"])[0]
    error = np.maximum(error, relative(total + gap, total))
  return [x.row("sum of layers = total", "relative difference of scores", error, "scores")]


def microbatches(x: Subject) -> list[Row]:
  """How many gradients exist at the same time does not matter."""
  every = by_examples(x, None)
  sizes = sorted({2, x.session.settings.microbatch} - {x.batch.valid.shape[0]})
  error = np.max([relative(by_examples(x, size), every) for size in sizes])
  return [x.row("any microbatch", "relative difference of scores", error, "scores")]


def ids(x: Subject) -> list[Row]:
  """Ids behind the last response token, padding slots and padding rows count exactly nothing; a response id does."""
  batch, rng = x.build(x.plain), np.random.default_rng(x.session.settings.seed)
  real = batch.weight > 0
  last = np.max(np.where(real, batch.position, -1), axis=1)
  behind = np.arange(batch.tokens.shape[1])[None, :] > last[:, None]
  drawn = lambda shape: rng.integers(0, x.session.model.config.vocab_size, shape).astype(np.int32)  # noqa: E731
  tokens = np.where(behind, drawn(batch.tokens.shape), batch.tokens)
  changed = batch._replace(tokens=tokens, target=np.where(real, batch.target, drawn(real.shape)))
  wrong = batch._replace(target=np.where(real, (batch.target + 1) % x.session.model.config.vocab_size, batch.target))

  before, after, other = (x.measure(x.session.batching.place(one)) for one in (batch, changed, wrong))
  error = np.maximum(np.max(np.abs(after - before)), np.max(np.abs(before[:, x.size :])))
  if not np.all(other[0, : x.size] != before[0, : x.size]):
    error = math.inf  # a loss that does not depend on its response would pass everything else
  return [x.row("padding and prompt ids count nothing", "difference of losses and scores", error, "ids")]


def devices(x: Subject) -> list[Row]:
  """All devices together compute what one of them computes."""
  names = ("sharded = single device", "relative difference of losses and scores")
  if x.session.batching.mesh.size == 1:
    return [x.row(*names, None, "scores", "one device")]
  single = sharding.make_mesh("", jax.local_devices()[:1])
  host = processes.to_host((*x.at, x.direction))
  sub, frozen, direction = (sharding.place_params(tree, single) for tree in host)
  batch = sharding.place_batch(x.build(x.batcher), single)
  one = [processes.to_host(values) for values in x.pair(sub, frozen, batch, direction)]
  error = np.max([relative(*pair) for pair in zip(x.measure(x.batch), one, strict=True)])
  return [x.row(*names, error, "scores")]


CHECKS: tuple[Callable[[Subject], list[Row]], ...] = (
  alone,
  modes,
  finite_differences,
  boundary,
  layers,
  microbatches,
  ids,
  devices,
)


def table(rows: list[Row]) -> str:
  """Aligned text, one line per check."""
  number = lambda value: "" if value is None else f"{value:.1e}" if value else "0"  # noqa: E731
  cells = [("check", "measured", "error", "tolerance", "verdict")]
  cells += [(row.check, row.measure, number(row.error), number(row.tolerance), row.verdict) for row in rows]
  widths = [max(len(line[i]) for line in cells) for i in range(5)]
  return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def run(settings: CheckFlags) -> list[Row]:
  """Runs every check; a table and a verdict go to stdout."""
  began = time.perf_counter()
  subject = Subject(sample(settings))
  tree, tokens = subject.chosen.tree, subject.session.splits["train"].num_tokens
  log.info(
    "checking %s of %d to %d tokens; %s numbers in layers %s; products in %s",
    how_many(subject.size, "example"), tokens.min(), tokens.max(),
    f"{subtree.count(subject.at[0]):,}", tree.layers, subject.precision,
  )  # fmt: skip
  rows = []
  for check in CHECKS:
    rows += check(subject)
    log.info("%s: %s (%.0f s)", rows[-1].check, rows[-1].verdict, time.perf_counter() - began)
  failed, skipped = sum(row.failed for row in rows), sum(bool(row.skipped) for row in rows)
  done = len(rows) - skipped
  verdict = f"{how_many(done, 'check')} passed" + (f", {skipped} skipped" if skipped else "")
  if failed:
    verdict = (
      f"{failed} of {how_many(done, 'check')} failed: scores of this model, data and device are not to be trusted"
    )
  if processes.is_writer():
    print(f"{table(rows)}\n{verdict}")
  return rows


def main(_) -> int:
  """Entry point."""
  return int(any(row.failed for row in run(flags.read(CheckFlags))))


if __name__ == "__main__":
  flags.define(CheckFlags)
  cli.run(main)
