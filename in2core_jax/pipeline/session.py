"""What every stage needs, made once and shared: data, model, batches, hidden states, compiled objectives."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from in2core_jax import __version__ as version
from in2core_jax.data import batches, packing
from in2core_jax.influence import kernels
from in2core_jax.model import weights
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.objective import make_objective, sample_labels_fn
from in2core_jax.parallel import sharding
from in2core_jax.params import subtree
from in2core_jax.pipeline import auto_batch
from in2core_jax.pipeline.batching import Batching
from in2core_jax.pipeline.hidden_states import HiddenCache, Place
from in2core_jax.pipeline.loaded_model import LoadedModel, open_model
from in2core_jax.pipeline.reference_model import ReferenceModel
from in2core_jax.pipeline.settings import Settings
from in2core_jax.pipeline.splits import Splits, read_records, refuse_pairs, refuse_weights, tokenized_splits
from in2core_jax.runs import resumable, run_folder
from in2core_jax.runs.progress import Progress, track

# Flags that change no number of a result.
_WHERE_AND_HOW_FAST = (
  *("boundary_cache", "boundary_cache_gb", "batch_tokens", "microbatch", "mesh"),
  *("checkpoint_every", "keep_checkpoints", "query_block", "shard_batches", "skip_bad_records", "coreset_format"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Session:
  """The parts that stages share which follow each other in one process.

  Attributes:
    settings: of the groups run, data and model; stages pass their own for the rest.
    splits: the examples.
    model: the base model.
    batching: how examples are cut into batches.
    hidden: hidden states that are kept.
    reference: log ratios of preference pairs.
    compiled: subtree -> its kernels.
  """

  settings: Settings
  splits: Splits
  model: LoadedModel
  batching: Batching
  hidden: HiddenCache
  reference: ReferenceModel
  compiled: dict[subtree.Subtree, kernels.CompiledObjective] = dataclasses.field(default_factory=dict)

  # ---- the same with a change ----------------------------------------------------------

  def with_settings(self, **changes) -> "Session":
    """The same model and examples, losses made or examples cut in another way; itself when nothing changes.

    Raises:
      ValueError: a change that would need another model or other examples.
    """
    other = self.settings.replace(**changes)
    if other == self.settings:
      return self
    if not set(changes) <= {"loss_reduction", "max_length"}:
      raise ValueError(f"a session of its own is needed for {sorted(changes)}")
    if other.max_length == self.settings.max_length:
      return dataclasses.replace(self, settings=other)
    cut = open_session(other, model=self.model)  # examples of other lengths are other batches and hidden states
    return dataclasses.replace(cut, compiled=self.compiled)

  def with_splits(self, splits: Splits) -> "Session":
    """The same model with other examples, which get batches and hidden states of their own."""
    other = make_session(self.settings, splits, self.model)
    return dataclasses.replace(other, compiled=self.compiled, reference=self.reference)

  def with_evals(self, rows: np.ndarray) -> "Session":
    """The same with some rows of the evaluation examples; batches stay those of all: the same programs serve."""
    splits = self.splits.with_parts(eval=self.splits["eval"].take(rows))
    return dataclasses.replace(self, splits=splits, hidden=self.hidden.with_eval(splits))

  def with_train(self, rows: np.ndarray) -> "Session":
    """The same with some rows of the training examples; batches and hidden states stay those of all."""
    splits = self.splits.with_parts(train=self.splits["train"].take(rows))
    return dataclasses.replace(self, splits=splits, hidden=self.hidden.with_rows("train", rows))

  def of_rows(self, **rows: np.ndarray) -> "Session":
    """The same with some rows of some parts: the same programs serve, and only these have their hidden states made."""
    splits = self.splits.with_parts(**{part: self.splits[part].take(own) for part, own in rows.items()})
    return dataclasses.replace(self, splits=splits, hidden=self.hidden.of_rows(splits, rows))

  # ---- what results depend on ----------------------------------------------------------

  def identity(self, stage: str, settings: Settings, groups: tuple[str, ...], parts: tuple[str, ...]) -> dict:
    """What the results of a stage depend on; the run folder refuses another one. Arguments as in `check_folder`."""
    return self._known(stage, settings, groups, parts) | {"model_hash": self.model.hash}

  def own_identity(self, stage: str, settings: Settings, groups: tuple[str, ...], parts: tuple[str, ...]) -> dict:
    """`identity`, where `check_folder` refuses nothing, whose arguments these are."""
    self.check_folder(stage, settings, groups, parts)
    return self.identity(stage, settings, groups, parts)

  def check_folder(self, stage: str, settings: Settings, groups: tuple[str, ...], parts: tuple[str, ...]) -> None:
    """Holds the run folder against what of `identity` is known before weights are read. Collective.

    Args:
      stage: or command, whose results are in the run folder.
      settings: the flags.
      groups: those that the results depend on.
      parts: of the data.

    Raises:
      UserError: the run folder holds results of other settings or data.
    """
    if not settings.overwrite:
      run_folder.RunDir.refuse_other(settings.run_dir, self._known(stage, settings, groups, parts))

  def _known(self, stage: str, settings: Settings, groups: tuple[str, ...], parts: tuple[str, ...]) -> dict:
    flags_ = settings.identity(*groups)
    for name in _WHERE_AND_HOW_FAST:
      flags_.pop(name, None)
    if self.splits.template_date is None:
      flags_.pop("template_date", None)
    return {"stage": stage, "version": version, "flags": flags_, "data": self.splits.identity(*parts)}

  def checkpoint_params(self, folder: str, step: int | None = None) -> Any:
    """Parameters of `LoadedModel.at_checkpoint`; those of the base model when `folder` is empty."""
    return self.model.at_checkpoint(folder, step, self.splits.template_date) if folder else self.model.params

  # ---- batches -------------------------------------------------------------------------

  def batcher(
    self, part: str, chosen: subtree.Subtree | None = None, params=None, rows=None, layout=None
  ) -> batches.Batcher:
    """Batches of a part, with hidden states from the boundary cache where `chosen` allows one.

    Args:
      part: train, eval or test.
      chosen: the subtree whose boundary counts; None for plain token batches.
      params: parameters that the layers below the boundary have.
      rows: only these examples.
      layout: batch sizes; those of scoring the training set when None, so that all parts run the same programs.
    """
    layout = self.batching.layout if layout is None else layout
    dataset, hidden = self._examples(part, chosen, params, rows)
    return batches.Batcher(
      dataset,
      self.batching.shapes,
      self.settings.loss_reduction,
      hidden,
      multiple_of=self.batching.groups,
      layout=layout,
      pairs=self._pairs(part, rows),
    )

  def packer(
    self, part: str, chosen: subtree.Subtree | None = None, params=None, rows=None, shapes=None, weights=None
  ) -> packing.Packer:
    """Packed rows of a part, for all that needs no row for each example; arguments as in `batcher`.

    Args:
      part: train, eval or test.
      chosen: the subtree whose boundary counts; None for plain token batches.
      params: parameters that the layers below the boundary have.
      rows: only these examples.
      shapes: sizes of the batches; those of scoring any of the parts when None.
      weights: of the losses in a training, f64 [rows]; None: all alike.
    """
    shapes = self.batching.packed_shapes if shapes is None else shapes
    dataset, hidden = self._examples(part, chosen, params, rows)
    pairs = self._pairs(part, rows)
    return packing.Packer(dataset, self.settings.loss_reduction, hidden, self.batching.groups, shapes, pairs, weights)

  def _pairs(self, part: str, rows) -> batches.PairTerms | None:
    """What the loss of preference pairs needs; arguments as in `batcher`."""
    return self.reference.terms(part, self.splits[part], self.batching, self.settings.beta, rows)

  def _examples(self, part: str, chosen: subtree.Subtree | None, params, rows):
    """(data set, hidden states or None) of a part or some rows of it; arguments as in `batcher`."""
    dataset = self.splits[part]
    hidden = None if chosen is None else self.hidden.below(part, chosen, params)
    if rows is not None:
      dataset, hidden = dataset.take(rows), hidden.take(np.asarray(rows)) if hidden is not None else None
    return dataset, hidden

  def stream(
    self, batcher: batches.Batcher | packing.Packer, what: str = "", pieces: resumable.ShardSpec | None = None
  ) -> resumable.Stream:
    """A function that yields (rows, batch on the devices).

    Args:
      batcher: of the examples.
      what: names the work in a progress display; empty shows none.
      pieces: where passes over the stream keep what a killed run goes on from; None keeps nothing.
    """
    plan = batcher.sequential_plan(self.batching.batch_tokens)
    build = lambda part: ((rows, self.batching.place(batch)) for rows, batch in batcher.planned(part))  # noqa: E731
    if pieces is not None:
      return resumable.ResumableStream(plan, build, pieces, lambda: Progress(len(plan), what, "batches"))
    return lambda: track(build(plan), len(plan), what) if what else build(plan)

  # ---- objectives ----------------------------------------------------------------------

  def kernels(self, chosen: subtree.Subtree) -> kernels.CompiledObjective:
    """Compiled kernels for a subtree; bind parameters with `.at(sub, frozen)`."""
    if chosen not in self.compiled:
      config = self.model.config
      objective, relabel = make_objective(config, chosen), sample_labels_fn(config, chosen)
      self.compiled[chosen] = kernels.CompiledObjective(objective, None, None, self.settings.microbatch, relabel)
    return self.compiled[chosen]


def open_session(
  s: Settings, mesh: Any = None, model: LoadedModel | None = None, pairs: bool = False, weighted: bool = False
) -> Session:
  """Reads the data; the model's weights are read when they are first needed, so that wrong data is told before.

  Args:
    s: the settings of the groups run, data and model.
    mesh: the devices; those of --mesh when None.
    model: one that there is already, with its devices; that of --model when None.
    pairs: whether the caller can do with preference pairs.
    weighted: whether the caller trains by the weights of training examples.

  Raises:
    UserError: whatever is wrong with the data, the devices, or the model as far as it is described.
  """
  described, splits = read_described(s, model, pairs, weighted)
  if model is None:
    model = open_model(s, described, sharding.make_mesh(s.mesh) if mesh is None else mesh)
  return make_session(s, splits, model)


def read_described(
  s: Settings, model: LoadedModel | None = None, pairs: bool = True, weighted: bool = True
) -> tuple[tuple[ModelConfig, Any], Splits]:
  """((config, tokenizer), examples): all that can be told without weights; wrong records are told first.

  Args:
    s: the settings of the groups data and model.
    model: one that there is already; that of --model when None.
    pairs: whether the caller can do with preference pairs.
    weighted: whether the caller trains by the weights of training examples.
  """
  records, bad = read_records(s)
  if not pairs:
    refuse_pairs(records)
  if not weighted:
    refuse_weights(records)
  described = (model.config, model.tokenizer) if model else weights.describe_model(s.model)
  return described, tokenized_splits(s, *described, records, bad)


def make_session(
  s: Settings,
  splits: Splits,
  model: LoadedModel,
  auto: Callable[[auto_batch.Work, Callable], int] = auto_batch.largest_batch,
) -> Session:
  """The parts that follow from examples and model.

  Args:
    s: the settings of the groups run, data and model.
    splits: the examples.
    model: the base model.
    auto: decides on the tokens of a batch for --batch_tokens=auto.
  """
  where = Place(s.boundary_cache, s.boundary_cache_gb, s.run_dir)
  work = lambda: auto_batch.Work.of(s, model.config, splits, model.mesh, where.serves)  # noqa: E731
  size = (lambda own: auto(work(), own.packed_shapes_for)) if s.batch_tokens == "auto" else s.batch_tokens
  batching = Batching(splits, model.mesh, s.max_shapes, size)
  hidden, reference = HiddenCache(splits, model, batching, where), ReferenceModel(model, s.run_dir)
  return Session(s, splits, model, batching, hidden, reference)


@dataclasses.dataclass(frozen=True)
class BoundSubtree:
  """A subtree at parameters: what `split` gives, with its problem.

  Attributes:
    tree: the subtree.
    params: the whole model.
    problem: kernels bound to it.
  """

  tree: subtree.Subtree
  params: dict
  problem: kernels.CompiledObjective


def choose(session: Session, params, layers: str, modules: str) -> BoundSubtree:
  """Cuts `params` along the flags' choice and binds the kernels.

  Raises:
    UserError: layers or modules that the model does not have.
  """
  tree = subtree.make_subtree(params, layers, modules)
  return BoundSubtree(tree, params, session.kernels(tree).at(*subtree.split(params, tree)))
