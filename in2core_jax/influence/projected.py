"""A store of projected gradients: written once for the training set, then new queries cost a matrix product each.

  score(i, q) = <L^T G_i R, L^T S_q R> summed over the kernels,   E[score(i, q)] = <G_i, S_q>

G_i is the gradient of example i in a kernel, S_q the query's direction there: its gradient, or that gradient times the
inverse Hessian, which must be applied before the projection because the store has no curvature. L [in, p], R [out, p]
hold independent signs over sqrt(p) (`adapters.add_sketch`), so that E[L L^T] = E[R R^T] = I and the estimate is
unbiased; a side that is no longer than p is kept whole. Its standard deviation is about |G| |S| / p where gradients
share no directions, and up to 2 |G| |S| / sqrt(p) where they do. What that makes of a ranking is measured, not assumed:
scores of two seeds are compared (`measure_self_agreement`).

Only kernels and the matrices of experts are covered. Norm scales, biases, LoRA factors, embeddings and the head are no
matrices beside which a sketch stands: what they would add to a score is missing from it. `uncovered_share` says how
much that is.

A store is a run folder of its own, so that runs with other evaluation sets share it. Its identity names the weights,
the data and the sketch; a folder of another identity is refused. Shards that are damaged or foreign are named and
computed again.

Letters: N examples, Q queries, k chosen layers, p numbers a side, W numbers of one projected gradient (k p^2 a kernel).
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax import traverse_util

from in2core_jax.errors import UserError, how_many
from in2core_jax.evaluation import statistics
from in2core_jax.gradients import HIGHEST, Tree, widen
from in2core_jax.parallel import processes
from in2core_jax.params import adapters, subtree
from in2core_jax.runs import resumable
from in2core_jax.runs.run_folder import RunDir
from in2core_jax.runs.shards import ShardStore

log = logging.getLogger(__name__)

MIN_SIZE, MAX_SIZE = 32, 128  # of the size that `size_of` finds
MOST_NUMBERS = 2**19  # of a projected gradient then: 2 MB
AGREEMENT = "self_agreement.json"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# Rows of the training set -> their projected gradients, float32 [len(rows), W]; the same at every call.
Features = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SketchSettings:
  """How gradients are projected and kept.

  Attributes:
    size: p, numbers per side.
    seed: of the signs.
    dtype: of the numbers on disk, float32 or bfloat16 (half the space, three digits; products add up in float32).
    shard_bytes: about how much a shard holds: what is lost when a run is killed, and what is in memory at once.
    allow_small: take a size below MIN_SIZE nevertheless, to measure how bad it is.
  """

  size: int = MIN_SIZE
  seed: int = 0
  dtype: str = "float32"
  shard_bytes: int = 2**26
  allow_small: bool = False

  def __post_init__(self):
    if self.size < 1 or (self.size < MIN_SIZE and not self.allow_small):
      raise UserError(
        f"--sketch_size={self.size} is below {MIN_SIZE}: scores of rank-16 projections agree with those of another "
        f"seed only at a rank correlation of about 0.44, so they rank mostly noise; use {MIN_SIZE} or more"
      )
    if self.dtype not in _DTYPES:
      raise UserError(f"dtype={self.dtype!r} of the projected store is unknown; use one of {', '.join(_DTYPES)}")
    if self.shard_bytes < 1:
      raise UserError(f"shard_bytes={self.shard_bytes} must be at least 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Sketch:
  """A projection that has been drawn. Make one with `make_sketch`.

  Attributes:
    settings: how.
    params: the model's parameters with `left`, `core` and `right` beside every kernel.
    tree: the cores of the chosen layers: gradients in this subtree are projected gradients.
  """

  settings: SketchSettings
  params: Any
  tree: subtree.Subtree

  @property
  def width(self) -> int:
    """W."""
    return subtree.count(jax.eval_shape(lambda params: subtree.split(params, self.tree)[0], self.params))

  def sides(self, module: str) -> tuple[jax.Array, jax.Array]:
    """left [k, in, p] and right [k, p, out] of the chosen layers beside a kernel, such as "mlp/up_proj".

    Beside the matrices of E experts they are [k, E, in, p] and [k, E, p, out].
    """
    flat = traverse_util.flatten_dict(self.params["layers"], sep="/")
    rows = np.asarray(self.tree.layers)
    return flat[f"{module}/left"][rows], flat[f"{module}/right"][rows]

  def matrix(self, module: str) -> str:
    """The leaf that a module's sketch covers, such as "mlp/up_proj/kernel"."""
    experts = f"{module}/experts"
    return experts if experts in subtree.leaf_paths(self.params) else f"{module}/kernel"

  @property
  def modules(self) -> tuple[str, ...]:
    """The modules whose kernels are covered."""
    return tuple(path.removesuffix("/core") for path in self.tree.paths)

  def identity(self) -> dict[str, Any]:
    """All that a projected gradient depends on beside weights and data, as a JSON object.

    The signs themselves are hashed: a random generator that draws others from the same seed gives another identity.
    """
    digest = hashlib.sha256()
    for module in self.modules:
      for side in self.sides(module):
        digest.update(np.ascontiguousarray(processes.to_host(side), np.float32).tobytes())
    return {
      "size": self.settings.size,
      "seed": self.settings.seed,
      "layers": list(self.tree.layers),
      "modules": list(self.modules),
      "signs_sha256": digest.hexdigest(),
    }


def size_of(params, layers: str | tuple[int, ...], size: int, modules: str = "sketch") -> int:
  """p where `size` is 0: as large as W up to MOST_NUMBERS allows, a multiple of 16; else `size`.

  Args:
    params: the model's parameters, or their shapes.
    layers, modules: as `make_sketch` takes them.
    size: `--sketch_size`.
  """
  if size:
    return size
  ones = jax.eval_shape(lambda own: adapters.add_sketch(own, 1, jax.random.key(0)), params)  # a number for each matrix
  tree = subtree.make_subtree(ones, layers, modules)
  matrices = subtree.count(jax.eval_shape(lambda own: subtree.split(own, tree)[0], ones))
  return int(np.clip(int(np.sqrt(MOST_NUMBERS / matrices)) // 16 * 16, MIN_SIZE, MAX_SIZE))


def make_sketch(params, layers: str | tuple[int, ...], settings: SketchSettings, modules: str = "sketch") -> Sketch:
  """Draws the projection of the chosen layers' kernels from the settings' seed.

  Args:
    params: the model's parameters.
    layers: as `subtree.make_subtree` takes them.
    settings: size and seed.
    modules: "sketch" for all kernels, or paths of cores such as "mlp/up_proj/core".
  """
  sketched = adapters.add_sketch(params, settings.size, jax.random.key(settings.seed))
  tree = subtree.make_subtree(sketched, layers, modules)
  if tree.extras or any(not path.endswith("/core") for path in tree.paths):
    raise UserError(f"modules={modules}: a sketch has cores only; use sketch, or paths such as mlp/up_proj/core")
  return Sketch(settings, sketched, tree)


def project_direction(direction: Tree, sketch: Sketch) -> jax.Array:
  """L^T S_q R of every covered kernel, as rows beside those of `CompiledObjective.adapter_features`.

  For directions that are no gradients: r = (H + damping I)^-1 g_q of a solver. Leaves that are no covered kernel (norm
  scales, biases, embeddings) are left out; see `uncovered_share`.

  Args:
    direction: like the `sub` of a subtree with the sketch's layers and at least its kernels, leaves [Q, k, in, out].
    sketch: the projection.

  Returns:
    [Q, W], float32 at least.

  Raises:
    UserError: a covered kernel is missing in the direction, or has other layers.
  """
  flat = traverse_util.flatten_dict(direction.get("layers", {}), sep="/")
  projected = {}
  for module in sketch.modules:
    left, right = sketch.sides(module)
    leaf = flat.get(sketch.matrix(module))
    wanted = (*left.shape[:-1], right.shape[-1])
    if leaf is None or leaf.shape[1:] != wanted:
      seen = "is missing" if leaf is None else f"has the shape {leaf.shape}"
      raise UserError(
        f"{sketch.matrix(module)} {seen} in the direction, and the sketch covers it with "
        f"[Q, {', '.join(map(str, wanted))}]: "
        "use the same layers for both, and modules that hold every covered kernel (--modules=matrices or all)"
      )
    parts = "kia,qkio,kbo->qkab" if left.ndim == 3 else "keia,qkeio,kebo->qkab"  # experts share a core
    projected[f"{module}/core"] = jnp.einsum(parts, left, widen(leaf), right, precision=HIGHEST)
  leaves = jax.tree.leaves(traverse_util.unflatten_dict(projected, sep="/"))  # the order of the cores in `sub`
  return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def uncovered_share(direction: Tree, sketch: Sketch) -> np.ndarray:
  """Share of |direction|^2 that no sketch covers: norm scales, biases, LoRA factors, embeddings, head; [Q] in [0, 1].

  Args:
    direction: any tree like `sub` with a leading axis: gradients of queries or examples, or a solver's solution.
    sketch: the projection.
  """
  covered = {f"layers/{sketch.matrix(module)}" for module in sketch.modules}
  flat = traverse_util.flatten_dict(direction, sep="/")
  squares = {path: np.asarray(processes.to_host(_squares(leaf)), np.float64) for path, leaf in flat.items()}
  total = sum(squares.values())
  outside = sum((square for path, square in squares.items() if path not in covered), np.zeros_like(total))
  return np.divide(outside, total, out=np.zeros_like(total), where=total > 0)


def _squares(leaf):
  wide = widen(leaf).reshape(leaf.shape[0], -1)
  return jnp.einsum("qp,qp->q", wide, wide, precision=HIGHEST)


class ProjectedStore:
  """Projected gradients of N examples on disk, in shards of consecutive rows.

  sketch = make_sketch(params, "last:4", SketchSettings(size=32))
  problem = kernels(sketch.tree).at(*subtree.split(sketch.params, sketch.tree))
  features = lambda rows: problem.adapter_features(stream_of(rows), len(rows))
  store = ProjectedStore.open("stores/mine", {"weights": sha256, "data": sha256}, sketch, num_examples)
  store.fill(features)                                  # computes what is not there yet
  scores = store.scores(project_direction(r, sketch))   # float32 [Q, N], for any number of queries, any day
  """

  def __init__(self, run_dir: RunDir, sketch: Sketch, num_examples: int):
    """Wraps an open folder; use `open`."""
    self.run_dir, self.sketch, self.num_examples, self.width = run_dir, sketch, num_examples, sketch.width
    self._dtype = _DTYPES[sketch.settings.dtype]
    self.shard_examples = max(1, sketch.settings.shard_bytes // (self._dtype.itemsize * self.width))
    self._shards = ShardStore(run_dir, "projected", {"width": self.width, "shard_examples": self.shard_examples})

  @classmethod
  def open(
    cls,
    path: epath.PathLike,
    identity: Mapping[str, Any],
    sketch: Sketch,
    num_examples: int,
    overwrite: bool = False,
  ) -> "ProjectedStore":
    """Makes the store's folder, or opens that of the same identity.

    Args:
      path: a folder of its own, local or gs://.
      identity: JSON object that names weights, data and all that gradients depend on (loss reduction, length limits).
      sketch: the projection.
      num_examples: N.
      overwrite: start anew where another store is.

    Raises:
      UserError: the folder holds another store; the message says what differs.
    """
    whole = {
      "projected_store": 1,
      "gradients": dict(identity),
      "sketch": sketch.identity() | {"dtype": sketch.settings.dtype},
      "num_examples": num_examples,
    }
    return cls(RunDir.open(path, whole, overwrite=overwrite, shared=True), sketch, num_examples)

  def slices(self) -> list[np.ndarray]:
    """The rows of each shard."""
    return [
      np.arange(start, min(start + self.shard_examples, self.num_examples))
      for start in range(0, self.num_examples, self.shard_examples)
    ]

  def fill(self, features: Features, stop_requested: Callable[[], bool] = lambda: False) -> int:
    """Computes and writes the shards that are not there, or not to be trusted; returns how many. Collective.

    A killed run loses the shard in work; the same call goes on, to the same bytes. Reads what is there, to check it.

    Args:
      features: of some rows.
      stop_requested: whether to stop after a shard, which leaves the store unfinished.

    Raises:
      UserError: a projected gradient is not finite.
    """
    computed = 0
    for index, rows in enumerate(self.slices()):
      if resumable.read(self._shards, index) is not None:
        continue
      found = np.asarray(features(rows))
      if found.shape != (len(rows), self.width):
        raise ValueError(f"features gave {found.shape} for {len(rows)} rows of {self.width} numbers")
      bad = np.flatnonzero(~np.all(np.isfinite(found), axis=1))
      if bad.size:
        raise UserError(
          f"projected gradients of {how_many(bad.size, 'example')} are not finite (first rows "
          f"{rows[bad[:5]].tolist()}): look at their losses"
        )
      resumable.write(self._shards, index, {"features": found.astype(self._dtype)})
      computed += 1
      if stop_requested():
        break
    processes.barrier("store filled")  # every process reads what the others have written
    return computed

  def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (rows, float32 [n, W]) shard by shard, each checked against its checksum.

    Raises:
      UserError: a shard is missing or not to be trusted.
    """
    for index, rows in enumerate(self.slices()):
      arrays = self._shards.read(index)
      if arrays is None:
        raise UserError(f"{self._shards.file(index)}: missing or damaged; fill the store again, it keeps the others")
      yield rows, arrays["features"].astype(np.float32, copy=False)

  def features(self) -> np.ndarray:
    """All projected gradients, float32 [N, W]: what the matching policies choose from."""
    out = np.zeros((self.num_examples, self.width), np.float32)
    for rows, block in self.blocks():
      out[rows] = block
    return out

  def scores(self, queries: np.ndarray) -> np.ndarray:
    """Estimates of influence(i, q) for projected queries, float32 [Q, N]; one shard in memory at a time.

    Args:
      queries: [Q, W], of `project_direction` or `CompiledObjective.adapter_features` under this store's sketch.

    Raises:
      UserError: queries of another width or not finite, or a shard that cannot be read.
    """
    queries = _checked(queries, self.width)
    out = np.zeros((len(queries), self.num_examples), np.float32)
    for rows, block in self.blocks():
      out[:, rows] = queries @ block.T
    return out

  @property
  def agreement(self) -> dict[str, Any] | None:
    """What `measure_self_agreement` wrote, or None."""
    return self.run_dir.read_json(AGREEMENT) if self.run_dir.holds(AGREEMENT) else None


def _checked(queries, width: int) -> np.ndarray:
  queries = np.asarray(queries, np.float32)
  if queries.ndim != 2 or queries.shape[1] != width:
    raise UserError(
      f"projected queries have the shape {queries.shape}, the store holds {width} numbers an example: "
      "project them with the store's own sketch"
    )
  if not np.all(np.isfinite(queries)):
    bad = np.flatnonzero(~np.all(np.isfinite(queries), axis=1))
    raise UserError(f"projected queries {bad[:5].tolist()} are not finite: look at the evaluation losses")
  return queries


def queries_sha256(queries: np.ndarray) -> str:
  """Names projected queries."""
  return hashlib.sha256(np.ascontiguousarray(queries, np.float32).tobytes()).hexdigest()


def self_agreement(scores: np.ndarray, again: np.ndarray) -> np.ndarray:
  """Spearman's rank correlation between the scores of two independent seeds, for each query.

  Both estimate the same numbers with independent errors, so this bounds how far a ranking can be trusted: it is the
  reliability of one seed's scores; their correlation with the unprojected ones is about its square root. Examples
  that score exactly 0 under both (no response) say nothing about the projection and are left out.

  Args:
    scores: [Q, N], one seed. again: [Q, N], the other.

  Returns:
    float64 [Q]; NaN where fewer than two examples are left or all scores are equal.
  """
  if scores.shape != again.shape:
    raise UserError(f"scores of {scores.shape} and of {again.shape}: give the same queries and examples twice")
  kept = [np.flatnonzero((a != 0) | (b != 0)) for a, b in zip(scores, again, strict=True)]
  return np.array(
    [
      statistics.spearman(a[rows], b[rows]) if len(rows) > 1 else np.nan
      for a, b, rows in zip(scores, again, kept, strict=True)
    ]
  )


@dataclasses.dataclass(frozen=True)
class Again:
  """The same examples and queries under the sketch of another seed.

  Attributes:
    sketch: of another seed and the same settings, layers and modules.
    queries: [Q, W], the queries of the comparison under it.
    features: of training rows under it.
  """

  sketch: Sketch
  queries: np.ndarray
  features: Features


def measure_self_agreement(
  store: ProjectedStore, queries: np.ndarray, again: Again, num_examples: int = 512
) -> dict[str, Any]:
  """Compares the store's scores with those of another seed, and notes the outcome in the store.

  Args:
    store: filled.
    queries: [Q, W] under the store's sketch.
    again: the same under another seed; its gradients are computed here and not kept.
    num_examples: how many training examples are compared at most, evenly spread over the data.

  Returns:
    What `store.agreement` gives from now on: size, seeds, examples, spearman (a list over queries; None where a query
    has no order), mean over the queries that have one.

  Raises:
    UserError: the other sketch is not another seed of the same projection.
  """
  ours, theirs = store.sketch.identity(), again.sketch.identity()
  if ours["seed"] == theirs["seed"]:  # other seeds may have the same signs: none, where every side is kept whole
    raise UserError(f"both sketches have the seed {ours['seed']}: they agree whatever they are worth; use two seeds")
  different = [name for name in ("size", "layers", "modules") if ours[name] != theirs[name]]
  if different:
    raise UserError(f"the two sketches differ in {', '.join(different)}: only the seed may be another")
  count = min(num_examples, store.num_examples)
  rows = np.unique(np.linspace(0, store.num_examples - 1, count).round().astype(np.int64))
  second = _checked(again.queries, store.width) @ np.asarray(again.features(rows), np.float32).T
  found = self_agreement(store.scores(queries)[:, rows], second)
  known = found[np.isfinite(found)]
  outcome = {
    "size": ours["size"],
    "seeds": [ours["seed"], theirs["seed"]],
    "examples": len(rows),
    "queries_sha256": queries_sha256(queries),
    "spearman": [float(each) if np.isfinite(each) else None for each in found],
    "mean": float(np.mean(known)) if known.size else None,
  }
  store.run_dir.write_json(AGREEMENT, outcome)
  log.info("projected store, p = %d: Spearman between two seeds %s (mean)", ours["size"], outcome["mean"])
  return outcome
