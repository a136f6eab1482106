"""What every stage needs, made once and shared: data, model, devices, batch shapes, boundary caches, kernels."""

import copy
import dataclasses
import functools
import hashlib
import logging
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax import __version__ as version
from in2core_jax.data import batches, packing, tokenizing
from in2core_jax.data.records import BadRecords
from in2core_jax.errors import UserError
from in2core_jax.influence import kernels
from in2core_jax.model import decoder, embeddings, hidden_cache, weights
from in2core_jax.model.objective import make_objective, sample_labels_fn
from in2core_jax.parallel import sharding
from in2core_jax.params import adapters, subtree
from in2core_jax.pipeline import auto_batch
from in2core_jax.pipeline.settings import Settings, listed
from in2core_jax.pipeline.splits import PARTS, limit_sources, limited, of_topics, split_sources, without_copies
from in2core_jax.runs import cache_folder, resumable, run_folder
from in2core_jax.runs.progress import Progress
from in2core_jax.training import train_loop

log = logging.getLogger(__name__)

# Flags that change no number of a result.
_WHERE_AND_HOW_FAST = (
  *("boundary_cache", "boundary_cache_gb", "batch_tokens", "microbatch", "mesh"),
  *("checkpoint_every", "keep_checkpoints", "query_block", "shard_batches", "skip_bad_records"),
)


class Workbench:
  """Loads lazily and keeps what it has loaded, so that stages that follow each other in one process share it."""

  def __init__(self, settings: Settings):
    """Keeps the settings of the groups run, data and model; stages pass their own for the rest."""
    self.settings = settings
    self._caches: dict = {}
    self._hidden: dict = {}
    self._embedded: dict[str, dict[str, np.ndarray]] = {}

  def with_settings(self, **changes) -> "Workbench":
    """The same model and examples, losses made or examples cut in another way; itself when nothing changes.

    Raises:
      ValueError: a change that would need another model or other examples.
    """
    other = self.settings.replace(**changes)
    if other == self.settings:
      return self
    if not set(changes) <= {"loss_reduction", "max_length"}:
      raise ValueError(f"a workbench of its own is needed for {sorted(changes)}")
    if other.max_length == self.settings.max_length:
      bench = copy.copy(self)
      bench.settings = other
      return bench
    bench = type(self)(other)  # examples of other lengths are other batches and hidden states
    bench._loaded, bench._caches = self._loaded, self._caches
    return bench

  def with_queries(self, count: int) -> "Workbench":
    """The same with `count` of the evaluation examples, drawn as `--eval_limit` draws them; itself for 0 or all."""
    evals = self.parts["eval"]
    if not 0 < count < len(evals):
      return self
    drawn = {id(record) for record in limited(evals.records, "eval", count, 0)}
    return self.with_evals(np.flatnonzero([id(record) in drawn for record in evals.records]))

  def with_evals(self, rows: np.ndarray) -> "Workbench":
    """The same with some rows of the evaluation examples."""
    for made_for_all in ("shapes", "packed_shapes", "layout"):  # so that the same programs serve
      getattr(self, made_for_all)
    bench = copy.copy(self)
    bench.__dict__["parts"] = self.parts | {"eval": self.parts["eval"].take(rows)}
    bench.__dict__.pop("summary", None)
    bench._hidden = {key: hidden for key, hidden in self._hidden.items() if key[0] != "eval"}
    bench._embedded = {part: found for part, found in self._embedded.items() if part != "eval"}
    return bench

  # ---- model -------------------------------------------------------------------------

  @functools.cached_property
  def mesh(self):
    """Devices by `--mesh`."""
    return sharding.make_mesh(self.settings.mesh)

  @functools.cached_property
  def _loaded(self):
    self.parts  # noqa: B018 - refuses wrong data first
    log.info("loading model %s", self.settings.model)
    config, params, tokenizer, model_hash = weights.load_model(
      self.settings.model, self.settings.dtype, self.settings.seed
    )
    return config, self.place_params(params), tokenizer, model_hash

  @functools.cached_property
  def _described(self):
    """(config, tokenizer), which need no weights: what is wrong with the data is told before these are read."""
    if "_loaded" in self.__dict__:
      return self._loaded[0], self._loaded[2]
    return weights.describe_model(self.settings.model)

  @property
  def config(self) -> decoder.ModelConfig:
    """The model's shape."""
    return self._described[0]

  @property
  def params(self):
    """The base model's parameters, on the devices."""
    return self._loaded[1]

  @property
  def tokenizer(self):
    """The model's tokenizer."""
    return self._described[1]

  @property
  def model_hash(self) -> str:
    """Names the base weights."""
    return self._loaded[3]

  def checkpoint_params(self, folder: str, step: int | None = None):
    """The base model with a checkpoint's subtree put in; the base model itself when `folder` is empty.

    Args:
      folder: of checkpoints.
      step: which of them; the newest when None.

    Raises:
      UserError: no checkpoint there, or one of another model.
    """
    if not folder:
      return self.params
    meta = train_loop.checkpoint_meta(folder)
    if meta["model_hash"] != self.model_hash:
      raise UserError(
        f"--checkpoint={folder} was trained from model {meta['model']} (hash {meta['model_hash'][:12]}), but --model="
        f"{self.settings.model} has hash {self.model_hash[:12]}: give the model that the checkpoint started from"
      )
    if meta["step"] < meta["steps"]:
      done = f"{meta['step']} of {meta['steps']}"
      raise UserError(f"--checkpoint={folder} stopped at step {done}: run that finetune command again first")
    self._check_template_date(folder, meta)
    params = self.params
    if meta["lora_rank"]:
      params = self.place_params(adapters.add_lora(params, meta["lora_rank"], jax.random.key(meta["seed"])))
    saved = meta["subtree"]
    chosen = subtree.Subtree(
      tuple(saved["layers"]), self.config.num_layers, tuple(saved["paths"]), tuple(saved["extras"])
    )
    sub, frozen = subtree.split(params, chosen)
    return subtree.merge(train_loop.load_sub(folder, sub, step), frozen, chosen)

  # ---- data --------------------------------------------------------------------------

  @functools.cached_property
  def parts(self) -> dict[str, tokenizing.TokenizedDataset]:
    """Tokenised train, eval and test sets."""
    s, self.bad = self.settings, BadRecords(self.settings.skip_bad_records)
    records = split_sources(s, self.bad)
    self.bad.raise_if_any()
    for part in PARTS:
      if part != "train" and s.eval_topics:
        records[part] = of_topics(records[part], part, listed(s.eval_topics))
      if part == "train" and s.dedup:
        records[part] = without_copies(records[part])
      if part == "train":
        records[part] = limit_sources(records[part], s)
      records[part] = limited(records[part], part, getattr(s, f"{part}_limit"), s.limit_block)
    made = {part: self.tokenized(part, records[part], self.bad) for part in PARTS}
    self.bad.raise_if_any()
    for part, dataset in made.items():
      if not len(dataset):
        raise UserError(f"the {part} set is empty: none of its records can be used; look at the data")
      if not np.any(dataset.num_response_tokens):
        raise UserError(
          f"the {part} set has no response token within --max_length={s.max_length}: raise it or look at the data"
        )
    self.summary = self._summary_of(made)  # hashes every record: once
    for line in tokenizing.told_lines(self.summary):
      log.warning("%s", line)
    return made

  def tokenized(
    self, part: str, records: list[tokenizing.Record], bad: BadRecords | None = None
  ) -> tokenizing.TokenizedDataset:
    """Records as a part, by the flags' template and lengths; arguments and errors of `tokenizing.tokenize`."""
    s = self.settings
    return tokenizing.tokenize(
      records,
      self.tokenizer,
      s.max_length,
      s.system_prompt,
      name=part,
      vocab_size=self.config.vocab_size,
      date=s.template_date,
      bad=bad,
    )

  @functools.cached_property
  def summary(self) -> dict:
    """Counts of every part, duplicates, overlap, and what of the data is not used."""
    return self._summary_of(self.parts)

  def _summary_of(self, parts: dict[str, tokenizing.TokenizedDataset]) -> dict:
    s, bad = self.settings, self.__dict__.get("bad")
    summary = tokenizing.data_summary(parts)
    if s.eval_data and not s.test_data:
      halves = " and ".join(f"{len(parts[part]):,} of them are the {part} set" for part in ("eval", "test"))
      summary["halved"] = f"--eval_data is cut in two, for there is no --test_data: {halves}"
    return summary | ({"skipped_records": bad.summary()} if bad else {})

  def write_skipped(self, run_dir: run_folder.RunDir) -> None:
    """Writes the records that --skip_bad_records has left out into a run folder, where there are some."""
    bad = self.__dict__.get("bad")
    if bad:
      run_dir.write_text("skipped_records.jsonl", bad.lines())

  @property
  def template_date(self) -> str | None:
    """The date that the chat template prints; None where it prints none."""
    return next((part.template["date"] for part in self.parts.values() if "date" in part.template), None)

  def _check_template_date(self, folder: str, meta: dict) -> None:
    """Refuses a checkpoint that was trained on conversations of another date."""
    ours, theirs = self.template_date, meta.get("template_date")
    if ours and theirs and ours != theirs:
      raise UserError(
        f"--checkpoint={folder} was trained on conversations in which the chat template prints {theirs}, not "
        f"--template_date={ours}: give --template_date={theirs}"
      )
    if ours and not theirs:
      log.warning(
        "the chat template prints a date, and --checkpoint=%s does not tell which it was trained with: "
        "--template_date=%s may be another one; train it again to be sure",
        folder,
        ours,
      )

  def data_identity(self, *names: str) -> dict:
    """Hashes of the parts that results depend on."""
    return {name: _dataset_hash(self.parts[name]) for name in names}

  def identity(self, stage: str, settings: Settings, groups: tuple[str, ...], parts: tuple[str, ...]) -> dict:
    """What the results of a stage depend on; the run folder refuses another one."""
    flags_ = settings.identity(*groups)
    for name in _WHERE_AND_HOW_FAST:
      flags_.pop(name, None)
    if self.template_date is None:
      flags_.pop("template_date", None)
    return {
      "stage": stage,
      "version": version,
      "flags": flags_,
      "model_hash": self.model_hash,
      "data": self.data_identity(*parts),
    }

  @functools.cached_property
  def shapes(self) -> tuple[batches.Shape, ...]:
    """Batch shapes that serve all three parts, so that each program is compiled once."""
    tokens = np.concatenate([part.num_tokens for part in self.parts.values()])
    responses = np.concatenate([part.num_response_tokens for part in self.parts.values()])
    return batches.plan_shapes(tokens, responses, self.settings.max_shapes)

  # ---- batches -----------------------------------------------------------------------

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
    layout = self.layout if layout is None else layout
    dataset, hidden = self._examples(part, chosen, params, rows)
    return batches.Batcher(
      dataset,
      self.shapes,
      self.settings.loss_reduction,
      hidden,
      multiple_of=sharding.batch_multiple(self.mesh),
      layout=layout,
    )

  def packer(
    self, part: str, chosen: subtree.Subtree | None = None, params=None, rows=None, shapes=None
  ) -> packing.Packer:
    """Packed rows of a part, for all that needs no row for each example; arguments as in `batcher`.

    Args:
      part: train, eval or test.
      chosen: the subtree whose boundary counts; None for plain token batches.
      params: parameters that the layers below the boundary have.
      rows: only these examples.
      shapes: sizes of the batches; those of scoring any of the parts when None.
    """
    shapes = self.packed_shapes if shapes is None else shapes
    dataset, hidden = self._examples(part, chosen, params, rows)
    groups = sharding.batch_multiple(self.mesh)
    return packing.Packer(dataset, self.settings.loss_reduction, hidden, groups, shapes)

  def _examples(self, part: str, chosen: subtree.Subtree | None, params, rows):
    """(data set, hidden states or None) of a part or some rows of it; arguments as in `batcher`."""
    dataset, hidden = self.parts[part], None
    if chosen is not None and self.uses_cache(chosen):
      hidden = self._boundary(part, chosen, params)
    if rows is not None:
      dataset, hidden = dataset.take(rows), hidden.take(np.asarray(rows)) if hidden is not None else None
    return dataset, hidden

  @functools.cached_property
  def batch_tokens(self) -> int:
    """`--batch_tokens`, or for `auto` the most that fits (`auto_batch.largest_batch`)."""
    given = self.settings.batch_tokens
    return auto_batch.largest_batch(self) if given == "auto" else given

  @functools.cached_property
  def packed_shapes(self) -> tuple[packing.PackedShape, ...]:
    """Packed sizes that serve all three parts when they are scored."""
    return self.packed_shapes_for(self.batch_tokens)

  def packed_shapes_for(self, batch_tokens: int) -> tuple[packing.PackedShape, ...]:
    """The same, for batches of so many tokens."""
    plain = [self.packer(part, shapes=()) for part in PARTS]
    return packing.sequential_shapes(plain, batch_tokens)

  @functools.cached_property
  def layout(self) -> dict[batches.Shape, batches.Layout]:
    """Batch sizes and response slots of each shape when the training set is scored."""
    multiple = sharding.batch_multiple(self.mesh)
    plain = batches.Batcher(self.parts["train"], self.shapes, self.settings.loss_reduction, multiple_of=multiple)
    return plain.layout_of(plain.sequential_plan(self.batch_tokens))

  def place(self, batch: batches.Batch) -> batches.Batch:
    """Puts a batch onto the devices."""
    return sharding.place_batch(batch, self.mesh)

  def place_params(self, params):
    """Puts parameters, or what is shaped like some of them, onto the devices; what is there already stays."""
    return sharding.place_params(params, self.mesh)

  def stream(
    self, batcher: batches.Batcher | packing.Packer, what: str = "", pieces: resumable.Pieces | None = None
  ) -> resumable.Stream:
    """A function that yields (rows, batch on the devices).

    Args:
      batcher: of the examples.
      what: names the work in a progress display; empty shows none.
      pieces: where passes over the stream keep what a killed run goes on from; None keeps nothing.
    """
    plan = batcher.sequential_plan(self.batch_tokens)
    build = lambda part: ((rows, self.place(batch)) for rows, batch in batcher.planned(part))  # noqa: E731
    if pieces is not None:
      return resumable.KeptStream(plan, build, pieces, lambda: Progress(len(plan), what, "batches"))
    return lambda: track(build(plan), len(plan), what) if what else build(plan)

  def kernels(self, chosen: subtree.Subtree) -> kernels.Problem:
    """Compiled kernels for a subtree; bind parameters with `.at(sub, frozen)`."""
    if chosen not in self._caches:
      objective = make_objective(self.config, chosen)
      relabel = sample_labels_fn(self.config, chosen)
      self._caches[chosen] = kernels.Problem(objective, None, None, self.settings.microbatch, relabel)
    return self._caches[chosen]

  def uses_cache(self, chosen: subtree.Subtree) -> bool:
    """Whether hidden states below a subtree are kept."""
    return self.settings.boundary_cache != "off" and "embed" not in chosen.extras

  def _boundary(self, part: str, chosen: subtree.Subtree, params) -> hidden_cache.BoundaryCache:
    below = _below_hash(params, chosen, self.params)
    key = (part, chosen.boundary, below)
    if key not in self._hidden:
      for old in [one for one in self._hidden if one[-1] not in ("base", below)]:
        del self._hidden[old]  # of another trained model: one is in use at a time
      s = self.settings
      dtype = jnp.dtype(s.dtype)
      size = hidden_cache.cache_bytes(self.parts[part].num_tokens, self.config.hidden_size, dtype)
      file = None
      if cache_on_disk(s, size):
        name = run_folder.hash_of([key, self.model_hash, self.data_identity(part), s.dtype, version])[:16]
        file = _scratch_file(s.run_dir, f"{part}-{name}")
      # The layers below do not depend on which modules are chosen above: one program and one cache for all of them.
      below = subtree.Subtree(tuple(range(chosen.boundary, chosen.num_layers)), chosen.num_layers, ())
      what = f"hidden states below layer {chosen.boundary} ({part})"
      job = self._below_job(below, params, what)
      self._hidden[key] = hidden_cache.compute_boundary(job, self.parts[part], file)
    return self._hidden[key]

  def _below_job(self, tree: subtree.Subtree, params, what: str) -> hidden_cache.BoundaryJob:
    """How the layers below a boundary are run over packed rows, with progress shown."""
    return hidden_cache.BoundaryJob(
      self.config,
      tree,
      params,
      self.batch_tokens,
      jnp.dtype(self.settings.dtype),
      lambda rows: sharding.place_batch(rows, self.mesh),
      sharding.batch_multiple(self.mesh),
      lambda source, total: track(source, total, what),
    )

  def embeddings(self, part: str, pooling: str = "mean") -> np.ndarray:
    """Pooled last hidden states of a part's examples at the base model, float32 [N, D].

    Args:
      part: train, eval or test.
      pooling: a word of `embeddings.POOLINGS`; all are made in one pass.
    """
    if part not in self._embedded:
      # What scoring keeps at the base model need not be run again.
      kept = {key[1]: hidden for key, hidden in self._hidden.items() if key[0] == part and key[2] == "base"}
      below = (kept[max(kept)], max(kept)) if kept else None
      tree = embeddings.above_all(self.config.num_layers)
      job = self._below_job(tree, self.params, f"embeddings ({part})")
      self._embedded[part] = embeddings.pooled(job, self.parts[part], below)
    return self._embedded[part][pooling]


def cache_on_disk(s: Settings, size: int) -> bool:
  """Whether a boundary cache of so many bytes goes to disk."""
  return s.boundary_cache == "disk" or (s.boundary_cache == "auto" and size > s.boundary_cache_gb * 1e9)


def _scratch_file(run_dir: str, name: str) -> pathlib.Path:
  """Where this process keeps hidden states: beside the run folder, or on the local disk when that is gs://.

  They are memory-mapped, and every process of a job has a file of its own, with all examples.
  """
  folder = pathlib.Path(run_dir).parent / "boundary"
  if run_folder.is_remote(run_dir):
    folder = cache_folder.cache_folder() / "boundary"
    log.info("hidden states are kept in %s: they are read at random, which needs a local disk", folder)
  folder.mkdir(parents=True, exist_ok=True)
  count = jax.process_count()
  return folder / (f"{name}.bin" if count == 1 else f"{name}-{jax.process_index()}of{count}.bin")


def track(source, total: int, what: str) -> Iterator:
  """Wraps an iterator of batches with a progress display."""
  with Progress(total, what, "batches") as progress:
    for item in source:
      yield item
      progress.update(1)


def _dataset_hash(dataset: tokenizing.TokenizedDataset) -> str:
  digest = hashlib.sha256(hidden_cache.data_hash(dataset).encode())
  for record, mask in zip(dataset.records, dataset.response_mask, strict=True):
    # The raw record and the topic too: they end up in coreset.jsonl and in quotas.
    named = "\0".join((record.example_id, record.topic, record.raw, "")).encode("utf-8", "surrogatepass")
    digest.update(named + np.packbits(mask).tobytes())
  return digest.hexdigest()


def _below_hash(params, chosen: subtree.Subtree, base) -> str:
  """Names the weights under the boundary: "base" when they are the base model's, else their hash."""
  if params is base:
    return "base"
  below = lambda tree: [tree["embed"], jax.tree.map(lambda leaf: leaf[: chosen.boundary], tree["layers"])]  # noqa: E731
  ours, theirs = jax.tree.leaves(below(params)), jax.tree.leaves(below(base))
  if len(ours) == len(theirs) and all(bool(jnp.array_equal(a, b)) for a, b in zip(ours, theirs, strict=True)):
    return "base"
  return resumable.tree_sha256(ours)


@dataclasses.dataclass(frozen=True)
class Chosen:
  """A subtree at parameters: what `split` gives, with its problem.

  Attributes:
    tree: the subtree.
    params: the whole model.
    problem: kernels bound to it.
  """

  tree: subtree.Subtree
  params: dict
  problem: kernels.Problem


def choose(bench: Workbench, params, layers: str, modules: str) -> Chosen:
  """Cuts `params` along the flags' choice and binds the kernels.

  Raises:
    UserError: layers or modules that the model does not have.
  """
  tree = subtree.make_subtree(params, layers, modules)
  return Chosen(tree, params, bench.kernels(tree).at(*subtree.split(params, tree)))
