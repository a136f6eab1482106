"""The passes that the benchmark times, each once over all training examples, through the code that the stages run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.settings import BenchmarkSettings
from in2core_jax.costs import flop_counts, timing
from in2core_jax.data import packing, tokenizing
from in2core_jax.data.records import Record
from in2core_jax.data.subsets import PARTS
from in2core_jax.errors import UserError
from in2core_jax.ihvp import solvers
from in2core_jax.index import basis as bases
from in2core_jax.influence.index_pass import OnDevice
from in2core_jax.model import weights
from in2core_jax.parallel import sharding
from in2core_jax.params import subtree
from in2core_jax.pipeline import index
from in2core_jax.pipeline.index_settings import IndexSettings
from in2core_jax.pipeline.loaded_model import open_model
from in2core_jax.pipeline.session import BoundSubtree, Session, choose, make_session, open_session
from in2core_jax.pipeline.splits import Splits
from in2core_jax.selection import hybrid
from in2core_jax.training import train_loop
from in2core_jax.training.recipe import Recipe

FORWARD = "forward only"


def measured_session(s: BenchmarkSettings, num_devices: int | None = None) -> Session:
  """A session on the first devices by `--mesh`, with random examples where `--synthetic_length` asks for them.

  Args:
    s: the flags.
    num_devices: all when None.
  """
  if not s.synthetic_length:
    return open_session(s, sharding.make_mesh(s.mesh, jax.devices()[:num_devices]))
  config, tokenizer = weights.describe_model(s.model)
  splits = Splits(synthetic_parts(s, config.vocab_size))
  mesh = sharding.make_mesh(s.mesh, jax.devices()[:num_devices])
  return make_session(s, splits, open_model(s, (config, tokenizer), mesh))


def synthetic_parts(s: BenchmarkSettings, vocab_size: int) -> dict[str, tokenizing.TokenizedDataset]:
  """Examples of `--synthetic_length` random tokens, the second half a response; as many as the limits say.

  Raises:
    UserError: --limit_block, no limit for a part, or examples too short to have a response.
  """
  if s.limit_block:
    raise UserError(f"--limit_block={s.limit_block}: examples of --synthetic_length are made up, leave it out")
  if s.synthetic_length < 2 or not all(getattr(s, f"{part}_limit") for part in PARTS):
    raise UserError(
      f"--synthetic_length={s.synthetic_length} needs 2 or more tokens, and --train_limit, --eval_limit and "
      "--test_limit above 0, which say how many examples to make"
    )
  rng = np.random.default_rng((s.seed, 29))
  mask = np.arange(s.synthetic_length) >= (s.synthetic_length + 1) // 2

  def make(part: str) -> tokenizing.TokenizedDataset:
    count = getattr(s, f"{part}_limit")
    records = tuple(Record(f"{part}-{i}", (), "", "{}", "synthetic", i + 1) for i in range(count))
    tokens = rng.integers(0, vocab_size, (count, s.synthetic_length), np.int32)
    return tokenizing.TokenizedDataset(part, records, tuple(tokens), (mask,) * count, np.zeros(count, bool))

  return {part: make(part) for part in PARTS}


@dataclasses.dataclass(frozen=True)
class Row:
  """One pass over all training examples.

  Attributes:
    work: does it and waits for the result.
    flops: its operations (`costs`).
  """

  work: timing.Work
  flops: int


class Rows:
  """Makes rows for one model and data set."""

  def __init__(self, session: Session):
    """Counts the tokens."""
    self.session, train = session, session.splits["train"]
    self.examples, self.tokens = len(train), int(train.num_tokens.sum())
    self.responses = int(train.num_response_tokens.sum())

  def chosen(self, layers: str, modules: str = "all") -> BoundSubtree:
    """Kernels of a choice of layers."""
    return choose(self.session, self.session.model.params, layers, modules)

  def flops(self, kind: str, tree: subtree.Subtree, cached: bool = False) -> int:
    """Operations of one pass over all training examples."""
    sizes = flop_counts.matrix_sizes(self.session.model.params, tree)
    return flop_counts.flops(kind, sizes, self.tokens, self.responses, cached)

  def forward(self) -> Row:
    """Losses of all examples: every layer, and the head at response tokens only."""
    nothing = subtree.Subtree((), self.session.model.config.num_layers, ())
    problem = self.session.kernels(nothing).at(*subtree.split(self.session.model.params, nothing))
    stream = self.session.stream(self.session.packer("train"))
    return Row(lambda: problem.losses(stream, self.examples), self.flops("losses", nothing))

  def score(self, chosen: BoundSubtree, cached: bool) -> Row:
    """Losses and scores along one direction by jvp, as `select` computes them for an aggregated query."""
    stream, v = self.session.stream(self._packer(chosen, cached)), direction(chosen.problem.sub)
    work = lambda: chosen.problem.losses_and_scores(stream, self.examples, v, "jvp")  # noqa: E731
    return Row(work, self.flops("jvp", chosen.tree, cached))

  def vmap_score(self, chosen: BoundSubtree) -> Row:
    """Scores along one direction by per-example gradients, contracted at once."""
    stream, v = self.session.stream(self.session.batcher("train")), direction(chosen.problem.sub)
    contraction = flop_counts.contraction_flops(
      flop_counts.matrix_sizes(self.session.model.params, chosen.tree), self.examples, 1
    )
    work = lambda: chosen.problem.scores(stream, self.examples, v, "vmap")  # noqa: E731
    return Row(work, self.flops("gradient", chosen.tree) + int(contraction))

  def gradients(self, chosen: BoundSubtree) -> Row:
    """Per-example gradients, those of one batch on the device at a time."""
    stream, source = self.session.stream(self.session.batcher("train")), chosen.problem.example_gradients(None)
    kernel = jax.jit(source.function)

    def work():
      for _, batch in stream():
        jax.block_until_ready(kernel(source.context, batch))

    return Row(work, self.flops("gradient", chosen.tree))

  def index(self, layers: str) -> Row:
    """Rows of an index: sketched gradients, losses, hidden states out of one pass, in the basis of default sizes."""
    s = IndexSettings.of(self.session.settings, layers=layers)
    pool = index.Pool(self.session, s)
    keys, sketch = pool.keys("train"), pool.projection.sketch
    basis = drawn_basis(sketch.width, self.session.model.config.hidden_size, s)
    planned = index.planned(pool, s, keys, keys[:0])
    plan = [batch for shard in planned.shards for batch in shard]
    sizes = flop_counts.matrix_sizes(sketch.params, sketch.tree)
    projection = flop_counts.contraction_flops(sizes, self.examples, basis.size)
    placed = OnDevice(basis)
    work = lambda: pool.rows(planned, plan, placed)  # noqa: E731
    return Row(work, flop_counts.flops("gradient", sizes, self.tokens, self.responses) + int(projection))

  def lissa(self, chosen: BoundSubtree, cached: bool) -> Row:
    """LiSSA steps (ggn) whose minibatches are all training examples, each once; its residual is not measured."""
    s = self.session.settings
    packer = self._training_packer(chosen, cached, min(s.curvature_batch, self.examples))
    curvature, v = chosen.problem.curvature("ggn"), direction(chosen.problem.sub)
    # A scale that no eigenvalue reaches, and no power iteration for it: seconds do not depend on it.
    steps = -(-self.examples // s.curvature_batch)
    options = solvers.LissaSettings(1.0, scale=1e9, depth=steps, check_every=steps, tol=0.0, average=s.average)

    def work():
      batches = packer.shuffled(min(s.curvature_batch, self.examples), 0, 0)
      sampled = solvers.StochasticCurvature(
        curvature, lambda _: self.session.batching.place(next(batches)[1]), lambda u: u
      )
      jax.block_until_ready(solvers.lissa(sampled, v, jax.random.key(0), options).solution)

    return Row(work, self.flops("ggn", chosen.tree, cached))

  def training(self, chosen: BoundSubtree, cached: bool) -> Row:
    """One epoch of training."""
    s, size = self.session.settings, min(self.session.settings.batch_size, self.examples)
    packer = self._training_packer(chosen, cached, size)
    recipe = Recipe(-(-self.examples // size), size, s.learning_rate)
    trainer = train_loop.Trainer(chosen.problem.objective, recipe, self.session.batching.place)
    work = lambda: jax.block_until_ready(  # noqa: E731
      trainer.train(chosen.problem.sub, chosen.problem.frozen, packer).sub
    )
    return Row(work, self.flops("gradient", chosen.tree, cached))

  def _packer(self, chosen: BoundSubtree, cached: bool, shapes=None) -> packing.Packer:
    """Packed training examples: tokens, or hidden states out of the boundary cache."""
    if not cached:
      return self.session.packer("train", shapes=shapes)
    packer = self.session.packer("train", chosen.tree, chosen.params, shapes=shapes)
    if packer.hidden is None:
      raise UserError(f"--boundary_cache={self.session.settings.boundary_cache}: the benchmark needs one, use auto")
    return packer

  def _training_packer(self, chosen: BoundSubtree, cached: bool, size: int) -> packing.Packer:
    shape = packing.training_shape([self.session.packer("train", shapes=())], size, epochs=1)
    return self._packer(chosen, cached, [shape])


def direction(sub):
  """A direction like the subtree with a query axis, leaves [1, ...]: seconds do not depend on its values."""
  return jax.tree.map(lambda leaf: jnp.full((1, *leaf.shape), 1e-3, jnp.float32), sub)


def drawn_basis(width: int, hidden: int, s: IndexSettings) -> bases.Basis:
  """A basis of the sizes that an index would have: seconds do not depend on its values."""
  rng, views = np.random.default_rng(s.seed), len(hybrid.VIEWS)
  kept = rng.standard_normal((width, s.index_size), np.float32) / np.float32(np.sqrt(width))
  turned = rng.standard_normal((views, hidden, s.index_hidden), np.float32)
  return bases.Basis("queries", kept, s.index_size, turned, np.zeros((views, hidden), np.float32))


def make_rows(session: Session, s: BenchmarkSettings, score_layers: list[str]) -> dict[str, Row]:
  """Every pass that is timed, by name; `FORWARD` first.

  `--score_layers` get score passes, the first of them also those by `vmap` and an index, as all layers have;
  `--layers` get LiSSA and training.
  """
  rows = Rows(session)
  made = {FORWARD: rows.forward()}
  for layers in score_layers:
    chosen = rows.chosen(layers)
    made[f"score {layers}"] = rows.score(chosen, False)
    if chosen.tree.boundary:
      made[f"score {layers}, boundary cache"] = rows.score(chosen, True)
  for layers in (score_layers[0], "all"):
    made[f"index {layers}"] = rows.index(layers)
  made["score all, attention"] = rows.score(rows.chosen("all", "attention"), False)
  first, own = rows.chosen(score_layers[0]), rows.chosen(s.layers, s.modules)
  made[f"score {score_layers[0]}, vmap"] = rows.vmap_score(first)
  made[f"gradients {score_layers[0]}, vmap(grad)"] = rows.gradients(first)
  made[f"LiSSA {s.layers}"] = rows.lissa(own, False)
  made["training all"] = rows.training(rows.chosen("all"), False)
  if own.tree.boundary:
    made[f"LiSSA {s.layers}, boundary cache"] = rows.lissa(own, True)
    made[f"training {s.layers}, boundary cache"] = rows.training(own, True)
  return made
