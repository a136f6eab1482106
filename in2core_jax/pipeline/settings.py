"""The settings of every stage: defaults, help and checks, stated here and nowhere else; flags are made of them."""

import dataclasses
import datetime
import functools
import math
import re
from typing import Any

from in2core_jax.errors import UserError
from in2core_jax.influence.solver_names import PRECONDITIONERS, SOLVERS
from in2core_jax.pipeline.fields import Checked, setting
from in2core_jax.pipeline.fields import refuse as refuse
from in2core_jax.pipeline.lists import integers as integers
from in2core_jax.pipeline.lists import listed as listed
from in2core_jax.pipeline.lists import shares as shares
from in2core_jax.pipeline.lists import some_of
from in2core_jax.pipeline.lists import words as words
from in2core_jax.pipeline.ranges import COUNT, LIMIT, POSITIVE, SEED, SEEDS, SHARE, STEPS, Each, Range
from in2core_jax.runs.identities import OLD_WRITES as OLD_WRITES
from in2core_jax.selection import aggregation, coreset
from in2core_jax.selection.inputs import TARGETS, Budget

GROUPS = {
  "data": "data",
  "model": "model",
  "finetune": "fine-tuning",
  "select": "scores and selection",
  "evaluate": "comparison by retraining",
  "run": "run folder and devices",
}

TRAINED = ("--trainable_layers", "--trainable_modules")  # for `subtree.make_subtree`
LAYERS = "all, last:8, first:4, middle:6, every:3 or 0,5,29"


# ---- run -------------------------------------------------------------------------------------------------------------

_run = functools.partial(setting, "run")


def _batch_tokens(name: str, value: Any) -> int | str:
  """Reads "auto" or a whole number."""
  text = str(value)
  if text == "auto":
    return text
  if not re.fullmatch(r"\s*\d{1,18}\s*", text) or int(text) < 1:
    raise UserError(f"{name}={value} is neither auto nor a whole number of at least 1, such as 2048")
  return int(text)


@dataclasses.dataclass(frozen=True)
class RunSettings(Checked):
  """Where results go, and what computes them."""

  run_dir: str = _run("runs/run", "Folder of the results; the same command resumes there.")
  overwrite: bool = _run(
    False,
    "Delete the results in the run folder and start again.",
    repeats=False,
    more="Also results of other flags. Not for a job that is to be resumed.",
  )
  seed: int = _run(0, "Seeds data order, random choices and the solver's minibatches.", within=SEED)
  mesh: str = _run("", "Devices, such as data:4,fsdp:2; empty: all of them on data.", counts=True)
  batch_tokens: int | str = _run(
    2048,
    "Token positions in a batch that is scored; auto: as many as fit.",
    read=_batch_tokens,
    within=Range(1, 2**24),
    more="Padding counts. Training has --batch_size.",
  )
  dry_run: bool = _run(False, "Only print the cost: FLOPs, memory, disk, seconds.", repeats=False)
  hardware: str = _run("", "For --dry_run: devices elsewhere, such as v5e-8 or h100-8.", counts=True, repeats=False)
  coordinator: str = _run(
    "",
    "Several processes: host:port of process 0.",
    advanced=True,
    repeats=False,
    more="A TPU slice or srun needs none.",
  )
  process_id: int = _run(
    -1, "Several processes: number of this one, from 0.", within=Range(-1, 2**20), advanced=True, repeats=False
  )
  num_processes: int = _run(
    0,
    "Several processes: how many; 1: work alone.",
    within=Range(0, 2**20),
    advanced=True,
    repeats=False,
    more="0: as found. With 1 a larger job that is found is ignored.",
  )
  boundary_cache: str = _run(
    "auto", "Where hidden states below the layers are kept.", choices=("auto", "memory", "disk", "off"), advanced=True
  )
  boundary_cache_gb: float = _run(
    4.0, "--boundary_cache=auto: GB in memory at most, else on disk.", within=Range(0, 1e6), advanced=True
  )
  microbatch: int = _run(8, "Per-example gradients in memory at once.", within=Range(1, 2**16), advanced=True)
  shard_batches: int = _run(
    16,
    "Batches whose scores are saved together.",
    within=COUNT,
    advanced=True,
    more="A killed run computes at most so many again.",
  )

  def check(self) -> None:
    """Refuses --hardware of a run that would do its work here."""
    super().check()
    if self.hardware and not self.dry_run:
      raise UserError(f"hardware={self.hardware} is for dry_run=true: a run takes the devices that are here")


# ---- data ------------------------------------------------------------------------------------------------------------

_data = functools.partial(setting, "data")


@dataclasses.dataclass(frozen=True)
class DataSettings(Checked):
  """Sources, split, limits, chat template, lengths."""

  train_data: str = _data(
    "chatterbot",
    "File, folder, hub:ORG/NAME, tfds:NAME/SPLIT, - or chatterbot[:topic,...]; + joins several.",
    more="file:PATH, jsonl:PATH or a bare path: JSON, CSV, Parquet, Arrow; a file, a folder, a pattern. - is standard "
    "input. A name before and a share behind are possible: talk=chatterbot+own=file:a.jsonl*0.5.",
  )
  eval_data: str = _data("", "Examples to select for; empty: a part of --train_data.")
  test_data: str = _data(
    "", "Examples to judge by; empty: a part of the others.", more="Of --train_data, or half of --eval_data."
  )
  data_fields: str = _data(
    "", "Column names, as prompt=question,response=answer.", more="Also id=key,topic=kind,weight=share."
  )
  split: str = _data(
    "0.7,0.15,0.15",
    "Shares of train, eval and test when one source is given.",
    each=Each(float, Range(0, 1)),
    more="An example's part follows from a hash of its messages.",
  )
  eval_topics: str = _data("", "Keep only these topics in the eval and test sets.", more="Separated by commas.")
  train_limit: int = _data(
    0, "Most training examples; 0: all.", within=LIMIT, more="Chosen by a hash of the id, whatever the order."
  )
  eval_limit: int = _data(0, "Most evaluation examples; 0: all.", within=LIMIT)
  test_limit: int = _data(0, "Most test examples; 0: all.", within=LIMIT)
  dedup: bool = _data(
    False,
    "Drop training examples that repeat an earlier one.",
    added=True,
    more="Message for message, and before the limits.",
  )
  skip_bad_records: bool = _data(
    False,
    "Skip records that cannot be used, instead of stopping.",
    added=True,
    more="They go to skipped_records.jsonl.",
  )
  max_length: int = _data(512, "Most tokens of an example; the rest is cut.", within=Range(1, 2**24))
  system_prompt: str = _data("default", "default (the chat template's own), none, or a text.")
  source_limits: str = _data(
    "",
    "Most training examples of each source, as 500,0,200.",
    advanced=True,
    added=True,
    more="In the order of --train_data; 0: all.",
  )
  limit_block: int = _data(
    0,
    "Which examples the limits keep: 0 the first, 1 the next.",
    within=LIMIT,
    advanced=True,
    added=True,
    more="The next ones leave out duplicates of the first.",
  )
  template_date: str = _data("2024-07-26", "Date that a chat template prints.", advanced=True, added=True)
  beta: float = _data(0.1, "Scale of the DPO loss, for preference pairs.", within=POSITIVE, advanced=True, added=True)
  max_shapes: int = _data(4, "Most batch shapes to compile.", within=Range(1, 1000), advanced=True)
  loss_reduction: str = _data(
    "mean", "How the losses of response tokens become one.", choices=("mean", "sum"), advanced=True
  )

  def check(self) -> None:
    """Refuses a date that is none, and no training data."""
    super().check()
    try:
      datetime.date.fromisoformat(self.template_date)
    except ValueError:
      raise UserError(f"template_date={self.template_date} is no date such as 2024-07-26") from None
    if not self.train_data.strip():
      raise UserError("train_data= is empty: give chatterbot, file:FILE.jsonl or another source")

  def by_old_names(self, values: dict[str, Any]) -> dict[str, Any]:
    """Run folders of version 0.3.0 call it drop_copies."""
    return super().by_old_names({("drop_copies" if name == "dedup" else name): of for name, of in values.items()})


# ---- model, fine-tuning ----------------------------------------------------------------------------------------------

_model = functools.partial(setting, "model")


@dataclasses.dataclass(frozen=True)
class ModelSettings(Checked):
  """Which model."""

  model: str = _model(
    "smollm2", "smollm2, gemma3, hf:DIR, hub:ORG/NAME, gguf:FILE, random:JSON or truncated:MODEL:LAYERS."
  )
  dtype: str = _model("float32", "Of the weights; sums are float32 at least.", choices=("float32", "bfloat16"))
  frozen_weights: str = _model(
    "full", "Matrices of layers: full, or int8 or nf4.", choices=("full", "int8", "nf4"), advanced=True, added=True
  )


_finetune = functools.partial(setting, "finetune")


@dataclasses.dataclass(frozen=True)
class FinetuneSettings(Checked):
  """What is trained, and how."""

  trainable: str = _finetune("full", "Train the weights themselves, or LoRA factors.", choices=("full", "lora"))
  trainable_layers: str = _finetune("all", f"Layers to train: {LAYERS}.", counts=True)
  trainable_modules: str = _finetune("all", "Modules that full training changes: all, attention, mlp, matrices ...")
  learning_rate: float = _finetune(1e-4, "Peak of the warm-up and cosine schedule.", within=Range(0, 1000))
  epochs: float = _finetune(
    2.0,
    "Passes over the full training set.",
    within=Range(0, 1e6, open_low=True),
    more="Every compared training takes as many steps.",
  )
  steps: int = _finetune(0, "Optimiser steps; above 0 they replace --epochs.", within=Range(0, 10**7))
  batch_size: int = _finetune(16, "Examples per optimiser step.", within=Range(1, 2**16))
  keep_checkpoints: int = _finetune(
    2, "Newest checkpoints to keep; 0: all.", within=LIMIT, more="--trajectory needs all."
  )
  lora_rank: int = _finetune(8, "Rank of the LoRA factors.", within=Range(1, 2**14), advanced=True)
  warmup_ratio: float = _finetune(0.1, "Share of the steps with linear warm-up.", within=Range(0, 1), advanced=True)
  weight_decay: float = _finetune(
    0.0,
    "AdamW's weight decay.",
    within=Range(0, 1000),
    advanced=True,
    more="On kernels and LoRA factors; embedding and head do not decay.",
  )
  max_grad_norm: float = _finetune(1.0, "Global clipping norm; 0: none.", within=Range(0, 1e9), advanced=True)
  checkpoint_every: int = _finetune(50, "Steps between checkpoints.", within=COUNT, advanced=True)


# ---- select ----------------------------------------------------------------------------------------------------------

_select = functools.partial(setting, "select")
WRITES = ("query", "layer", "token", "self", "pool")
CORESET_FORMATS = ("jsonl", "parquet", "hf", "tokens")
OLD_BUDGETS = {"fraction": 0.5, "num_examples": 0, "token_budget": 0}  # with their defaults


def _budget(name: str, value: Any) -> str:
  """One spelling of a budget."""
  return str(Budget.read(value))


@dataclasses.dataclass(frozen=True)
class SelectSettings(Checked):
  """Influence, its inverse, and the selection that follows."""

  checkpoint: str = _select("", "`checkpoint` folder of a finetune run, or a PEFT adapter; empty: the base model.")
  layers: str = _select("last:8", f"Layers to score: {LAYERS}.", counts=True)
  modules: str = _select(
    "all",
    "Modules to score: all, attention, mlp, matrices or lora.",
    more="Policies by gradients compare the matrices of them.",
  )
  index: str = _select("", "Run folder of `index`: select from it, without a pass over the examples.", added=True)
  solver: str = _select("cg", "How the inverse Hessian is applied.", choices=SOLVERS, more="lissa is In2Core's own.")
  damping_ratio: float = _select(
    0.01,
    "Damping over the curvature's largest eigenvalue.",
    within=Range(0, 1e9),
    more="datainf: over the mean of its blocks.",
  )
  policy: str = _select(
    "auto",
    "How the coreset is chosen; auto: hybrid or random.",
    choices=coreset.POLICIES,
    gone=coreset.GONE,
    more="auto measures whether evaluation and training examples are of one kind. If they differ, it takes hybrid: "
    "similar gradients and hidden states. If not, it draws at random, without duplicates. proponents is the paper's "
    "rule.",
  )
  budget: str | float | int = _select(
    "0.5",
    "How much to keep: 0.5 or 1.0 (share), 500 (examples) or 40000tok (tokens).",
    read=_budget,
    more="1 is one example; 1.0 is all of them.",
  )
  write: str = _select(
    "",
    "What to write too: query, layer, token, self, pool.",
    read=functools.partial(some_of, WRITES),
    more="By commas. query: each evaluation example with each training example. layer, token: shares of each layer, of "
    "each response token. self: an example's influence on itself (solver ekfac or identity). Before --normalize. pool: "
    "all training records with their scores, as a table.",
  )
  coreset_format: str = _select(
    "jsonl",
    "Other formats of the coreset: parquet, hf, tokens.",
    read=functools.partial(some_of, CORESET_FORMATS, always=("jsonl",)),
    added=True,
    more="By commas. coreset.jsonl is always written. hf: a folder for datasets.load_from_disk. tokens: such a folder "
    "of token ids and labels, as they were scored. A finished run adds what is not there.",
  )
  depth: int = _select(50, "Most steps of LiSSA or CG; vectors of low_rank.", within=STEPS)
  solver_tol: float = _select(0.01, "Relative residual at which LiSSA and CG stop.", within=POSITIVE)
  normalize: str = _select(
    "none",
    "How scores are normalised.",
    choices=("none", "cosine", "relatif", "theta_relatif", "whitened_cosine"),
    more="cosine; relatif and theta_relatif: over what the inverse (ekfac, identity) makes of the example; "
    "whitened_cosine (identity): of projected gradients, without what they all share.",
  )
  trajectory: str = _select(
    "none",
    "Sum scores over all checkpoints of the training.",
    choices=("none", "tracin", "less"),
    more="Needs --solver=identity. tracin: products. less: cosines with Adam's steps.",
  )
  aggregate: str = _select(
    "auto",
    "How scores of evaluation examples become one.",
    choices=("auto", *aggregation.AGGREGATES),
    advanced=True,
    more="auto: round_robin for hybrid and rds, nearest for parts of hybrid, mean for all others. nearest: that of the "
    "nearest example. weighted_turns: longer responses have more turns.",
  )
  eval_weights: str = _select(
    "",
    "Weights of the sources of evaluation examples, as 0.7,0.3.",
    advanced=True,
    added=True,
    more="In the order of --eval_data: their shares of the mean, or of the turns. Empty: all examples count the same.",
  )
  precondition: str = _select("none", "Preconditioner of CG.", choices=PRECONDITIONERS, advanced=True)
  ekfac_examples: int = _select(0, "Training examples to fit EK-FAC to; 0: all.", within=LIMIT, advanced=True)
  curvature: str = _select("ggn", "Curvature matrix.", choices=("ggn", "fisher", "hessian"), advanced=True)
  damping: float = _select(
    math.nan, "Absolute damping; nan: --damping_ratio.", within=Range(0, 1e9, may_be_unset=True), advanced=True
  )
  repeat: int = _select(1, "Independent LiSSA runs to average.", within=STEPS, advanced=True)
  scale: float = _select(
    math.nan,
    "LiSSA's scale; nan: from the largest eigenvalue.",
    within=Range(0, 1e30, open_low=True, may_be_unset=True),
    advanced=True,
  )
  acceleration: str = _select(
    "none", "Acceleration of LiSSA.", choices=("none", "momentum", "chebyshev"), advanced=True
  )
  average: float = _select(
    0.5, "Share of LiSSA's last iterates to average.", within=Range(0, 1, open_high=True), advanced=True
  )
  curvature_examples: int = _select(
    64,
    "Examples of CG's curvature.",
    within=COUNT,
    advanced=True,
    more="LiSSA measures its residual and eigenvalue on them.",
  )
  curvature_batch: int = _select(32, "Examples of a LiSSA minibatch.", within=Range(1, 2**16), advanced=True)
  query_block: int = _select(8, "Evaluation gradients in memory at once.", within=Range(1, 2**16), advanced=True)
  score_path: str = _select(
    "auto",
    "How scores are computed.",
    choices=("auto", "jvp", "vmap", "projected"),
    advanced=True,
    more="projected: estimated from a store on disk, which also works for other queries on the same training set.",
  )
  sketch_size: int = _select(
    32,
    "Side of a projected gradient's matrix.",
    within=Range(0, 4096),
    advanced=True,
    more="For matching and projected. 0: as large as half a million numbers of an example allow, 32 to 128.",
  )
  matching_target: str = _select(
    "both",
    "Evaluation loss that matching aims at.",
    choices=TARGETS,
    advanced=True,
    more="A mean over response tokens, over examples, or half of each. No choice with --loss_reduction=sum.",
  )
  matching_shrink: bool = _select(
    True,
    "Shrink the target of matching by its sampling error.",
    advanced=True,
    more="James-Stein, towards the training set's mean gradient; policy matching.",
  )

  def writes(self, what: str) -> bool:
    """Whether a word of `WRITES`, or a coreset in a form of `CORESET_FORMATS`, is asked for."""
    return what in self.write.split(",") or what in self.coreset_format.split(",")

  def by_old_names(self, values: dict[str, Any]) -> dict[str, Any]:
    """Run folders of version 0.3.0 have three settings for the budget, and one for each word of `write`."""
    values = dict(values)
    if "budget" in values:
      budget = dataclasses.asdict(Budget.read(values.pop("budget")))
      values |= {name: unset if budget[name] is None else budget[name] for name, unset in OLD_BUDGETS.items()}
    if "write" in values:
      del values["write"]
      values |= {old: self.writes(word) for word, old in OLD_WRITES.items()}
    return super().by_old_names(values)


# ---- evaluate --------------------------------------------------------------------------------------------------------

_evaluate = functools.partial(setting, "evaluate")


@dataclasses.dataclass(frozen=True)
class EvaluateSettings(Checked):
  """What is retrained and compared."""

  select_runs: str = _evaluate("", "Run folders of select, separated by commas; their selections are compared.")
  policies: str = _evaluate("full,random,opponents", "What else is compared: full or words of --policy.")
  seeds: str = _evaluate("0,1,2", "Seeds of random subsets and of data order.", each=SEEDS)
  fixed_seeds: str = _evaluate("", "Seeds of policies that choose one set; empty: --seeds.", each=SEEDS)
  fractions: str = _evaluate("", "Several budgets, such as 0.05,0.1,0.25,0.5: a sweep.", each=Each(float, SHARE))
  equal: str = _evaluate(
    "steps",
    "What trainings have in common: steps, tokens, epochs, budget_tokens.",
    more="One or a list. steps or tokens (of responses) of all data; epochs of their own set; budget_tokens: the "
    "tokens that a random set of their size has in so many epochs.",
  )


# ---- all of them -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings(EvaluateSettings, SelectSettings, FinetuneSettings, ModelSettings, DataSettings, RunSettings):
  """The settings of all stages; each function reads those of its own."""

  def check(self) -> None:
    """Refuses to price what is read from an index."""
    super().check()
    if self.index and self.dry_run:
      raise UserError(
        f"index={self.index} with dry_run=true: nothing is priced there; it takes seconds, leave dry_run out"
      )


def seeds_of(s: EvaluateSettings) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """(seeds of random sets, seeds of policies that choose one set).

  Raises:
    UserError: there is none.
  """
  seeds = integers(s.seeds, "seeds")
  if not seeds:
    raise UserError("--seeds is empty: give at least one, such as 0,1,2")
  return seeds, integers(s.fixed_seeds, "fixed_seeds") or seeds


# For `refuse`, by commands that have no policy or keep the highest scores: all but the default and that very rule.
OTHER_POLICIES = tuple(f"policy={name}" for name in coreset.POLICIES if name not in (Settings.policy, "proponents"))
