"""The settings of every stage, each with group, default, choices and help; flags are made of them."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from in2core_jax.errors import UserError
from in2core_jax.influence.solve import PRECONDITIONERS, SOLVERS
from in2core_jax.selection import aggregation, coreset
from in2core_jax.selection.inputs import TARGETS

GROUPS = {
  "run": "where results go, and on what they are computed",
  "data": "stage 1: sources, chat template, lengths",
  "model": "stage 2: which model",
  "finetune": "stage 3: what is trained, and how",
  "select": "stage 4: influence, solver, selection",
  "evaluate": "stage 5: retraining and judging",
  "check": "self-check before a long run",
  "solvers": "comparison of the solvers",
  "study": "rules of selection, retrained",
  "targets": "what rules find in a mixed pool",
  "paper": "all experiments in one command",
  "fidelity": "do the scores foretell what retraining gives: linear datamodeling score, leave-out curves",
  "transfer": "one model selects, another one is trained",
  "benchmark": "seconds, memory, compilation",
  "ablate_layers": "how many layers are enough",
  "coverage": "which test points the training set does not cover",
  "kill_test": "runs, killed and started again",
}


def _flag(group: str, default: Any, text: str, choices: tuple[str, ...] | None = None, kind: type | None = None):
  return dataclasses.field(
    default=default, metadata={"group": group, "help": text, "choices": choices, "kind": kind or type(default)}
  )


TRAINED = ("--trainable_layers", "--trainable_modules")  # for `subtree.make_subtree`


_ADDED = (
  "limit_block",
  "source_limits",
  "model_rates",
  "drop_copies",
  "template_date",
  "skip_bad_records",
)  # flags that older run folders did not know


# A flagfile repeats a run: it removes none, is the same in every process, and does the work.
_NOT_REPEATED = ("overwrite", "coordinator", "process_id", "num_processes", "dry_run", "hardware")


@dataclasses.dataclass(frozen=True)
class Settings:
  """All flags with their defaults; field names are flag names."""

  run_dir: str = _flag("run", "runs/run", "folder that a run writes into; the same command started again resumes there")
  overwrite: bool = _flag(
    "run",
    False,
    "remove what the run folder holds, of these or other flags, and start anew; not for a job that is to be resumed",
  )
  seed: int = _flag("run", 0, "seeds the order of the data, LiSSA's minibatches, random choices and sketches")
  mesh: str = _flag("run", "", "devices as data:4,fsdp:2; empty: all on data")
  coordinator: str = _flag("run", "", "several processes: host:port of process 0; a TPU slice or srun needs no flag")
  process_id: int = _flag("run", -1, "several processes: which one this is, from 0; -1: not said")
  num_processes: int = _flag("run", 0, "several processes: how many; 1: work alone, whatever is found; 0: not said")
  boundary_cache: str = _flag(
    "run", "auto", "hidden states below the chosen layers are kept here", ("auto", "memory", "disk", "off")
  )
  boundary_cache_gb: float = _flag("run", 4.0, "auto: in memory up to so many GB, beyond that on disk")
  batch_tokens: int | str = _flag(
    "run", 2048, "padded token positions in a batch that is scored, not trained; auto: the most that fits", kind=str
  )
  microbatch: int = _flag("run", 8, "per-example gradients that exist at the same time")
  shard_batches: int = _flag(
    "run", 16, "batches, at least, whose scores are saved together: what a killed run computes again"
  )
  dry_run: bool = _flag("run", False, "only tell what it would take: FLOPs, memory, disk, seconds, what does not fit")
  hardware: str = _flag("run", "", "of a dry run: devices that are not here, such as v5e-8, v5p-32, h100-8")

  train_data: str = _flag(
    "data",
    "chatterbot",
    "chatterbot[:topic,topic] | file:PATH (or jsonl:PATH; JSON, CSV, Parquet, Arrow; a file, a folder, a pattern) | - "
    "(standard input) | tfds:NAME/SPLIT | hub:ORG/NAME[/SPLIT]; several are joined by +, each with a name before and a "
    "share behind if need be: talk=chatterbot+own=file:a.jsonl*0.5",
  )
  eval_data: str = _flag("data", "", "source that guides the selection; empty: a part of --train_data")
  test_data: str = _flag("data", "", "source that judges it; empty: a part of --train_data, or half of --eval_data")
  data_fields: str = _flag("data", "", "column names, as prompt=question,response=answer,id=key,topic=kind")
  split: str = _flag(
    "data", "0.7,0.15,0.15", "shares of train, eval, test when one source is given (by hash of the messages)"
  )
  eval_topics: str = _flag("data", "", "keep only these topics, separated by commas, in evaluation and test set")
  train_limit: int = _flag("data", 0, "keep at most so many training examples, chosen by hash of the id; 0: all")
  eval_limit: int = _flag("data", 0, "the same for the evaluation set")
  test_limit: int = _flag("data", 0, "the same for the test set")
  source_limits: str = _flag(
    "data", "", "the most training examples of each source of --train_data, in its order, as 500,0,200; 0: all"
  )
  limit_block: int = _flag(
    "data", 0, "which so many examples the limits keep: 0 the first, 1 the next, without copies of the first, ..."
  )
  drop_copies: bool = _flag(
    "data", False, "leave out training examples that repeat an earlier one, message for message, before the limits"
  )
  skip_bad_records: bool = _flag(
    "data", False, "leave out records that cannot be used, into skipped_records.jsonl; otherwise they stop the command"
  )
  max_length: int = _flag("data", 512, "tokens kept of an example; what was cut is counted")
  system_prompt: str = _flag("data", "default", "default (the template's own) | none | a text")
  template_date: str = _flag(
    "data", "2024-07-26", "the day that a chat template which prints the date is told, YYYY-MM-DD"
  )
  max_shapes: int = _flag("data", 4, "batch shapes to compile at most")
  loss_reduction: str = _flag("data", "mean", "loss of an example over its response tokens", ("mean", "sum"))

  model: str = _flag(
    "model",
    "smollm2",
    "smollm2 | gemma3 | hf:DIR | hub:ORG/NAME | gguf:FILE | random:CONFIG.json | truncated:MODEL:LAYERS",
  )
  dtype: str = _flag("model", "float32", "of the weights; reductions are float32 at least", ("float32", "bfloat16"))

  trainable: str = _flag("finetune", "full", "full weights or LoRA factors", ("full", "lora"))
  trainable_layers: str = _flag(
    "finetune", "all", "layers that are trained: all | last:8 | first:4 | middle:6 | every:3 | 0,5"
  )
  trainable_modules: str = _flag(
    "finetune", "all", "modules that full training changes: all | attention | mlp | matrices ..."
  )
  lora_rank: int = _flag("finetune", 8, "rank of the LoRA factors")
  learning_rate: float = _flag("finetune", 1e-4, "peak of the warm-up and cosine schedule")
  epochs: float = _flag("finetune", 2.0, "passes over the full training set; every compared run takes as many steps")
  steps: int = _flag("finetune", 0, "optimiser steps; above 0 it replaces --epochs")
  batch_size: int = _flag("finetune", 16, "examples per optimiser step")
  warmup_ratio: float = _flag("finetune", 0.1, "share of the steps with linear warm-up")
  weight_decay: float = _flag("finetune", 0.0, "AdamW's, on kernels and LoRA factors; embedding and head do not decay")
  max_grad_norm: float = _flag("finetune", 1.0, "global clipping norm; 0: none")
  checkpoint_every: int = _flag("finetune", 50, "steps between checkpoints")
  keep_checkpoints: int = _flag("finetune", 2, "newest checkpoints that stay; 0: all, for --trajectory")

  checkpoint: str = _flag("select", "", "`checkpoint` folder of a finetune run; empty: the base model")
  layers: str = _flag("select", "last:8", "chosen layers: all | last:8 | first:4 | middle:6 | every:3 | 0,5,29")
  modules: str = _flag("select", "all", "chosen modules: all | attention | mlp | matrices | lora")
  solver: str = _flag("select", "cg", "inverse Hessian product; lissa is In2Core's own", SOLVERS)
  precondition: str = _flag("select", "none", "of CG", PRECONDITIONERS)
  ekfac_examples: int = _flag("select", 0, "training examples that EK-FAC is fitted to; 0: all with a response")
  curvature: str = _flag("select", "ggn", "what is inverted", ("ggn", "fisher", "hessian"))
  damping: float = _flag("select", math.nan, "absolute damping; unset: --damping_ratio is used")
  damping_ratio: float = _flag("select", 0.01, "damping over the largest eigenvalue (datainf: over its blocks' mean)")
  depth: int = _flag("select", 50, "steps of LiSSA (each run) or CG at most; vectors that low_rank keeps")
  repeat: int = _flag("select", 1, "independent LiSSA runs that are averaged")
  scale: float = _flag("select", math.nan, "LiSSA's scale; unset: from the largest eigenvalue")
  acceleration: str = _flag("select", "none", "of LiSSA", ("none", "momentum", "chebyshev"))
  solver_tol: float = _flag("select", 0.01, "relative residual at which LiSSA and CG stop")
  average: float = _flag("select", 0.5, "share of LiSSA's last iterates that are averaged; 0: the plain recursion")
  curvature_examples: int = _flag(
    "select", 64, "fixed examples: all of CG's curvature; LiSSA's residual and eigenvalue"
  )
  curvature_batch: int = _flag("select", 32, "examples of a LiSSA minibatch")
  normalize: str = _flag(
    "select",
    "none",
    "scores by cosine, or over what the inverse (ekfac, identity) makes of the example: relatif, theta_relatif; "
    "whitened_cosine (identity): of projected gradients, freed of what all of them share",
    ("none", "cosine", "relatif", "theta_relatif", "whitened_cosine"),
  )
  self_influence: bool = _flag(
    "select", False, "also write each example's influence on itself, large for wrong answers (solver ekfac or identity)"
  )
  per_layer: bool = _flag("select", False, "also write each layer's share of the scores; before --normalize")
  per_token: bool = _flag("select", False, "also write each response token's share of the scores; before --normalize")
  policy: str = _flag(
    "select",
    "auto",
    "how the coreset is chosen. auto: what is similar to the evaluation examples by gradients and hidden states "
    "(hybrid) where these are of another kind than the training set, else at random without copies; proponents: the "
    "paper's rule",
    coreset.POLICIES,
  )
  aggregate: str = _flag(
    "select",
    "auto",
    "how values on single evaluation examples become one: their mean, that of the nearest, examples or topics in turn, "
    "in weighted turns (longer responses more often); "
    "auto: round_robin for hybrid and rds, nearest for parts of hybrid, mean for all others",
    ("auto", *aggregation.AGGREGATES),
  )
  fraction: float = _flag("select", 0.5, "share of the training examples to keep")
  num_examples: int = _flag("select", 0, "examples to keep; above 0 it replaces --fraction")
  token_budget: int = _flag("select", 0, "tokens to keep; above 0 it replaces --fraction")
  per_query: bool = _flag(
    "select", False, "also write the score of every evaluation example with every training example; before --normalize"
  )
  query_block: int = _flag("select", 8, "per_query: evaluation gradients that exist at the same time")
  score_path: str = _flag(
    "select",
    "auto",
    "how scores are computed; projected: estimated from a store on disk, for other queries on the same training set",
    ("auto", "jvp", "vmap", "projected"),
  )
  sketch_size: int = _flag("select", 32, "matching and projected: gradients become so many numbers a side")
  matching_target: str = _flag(
    "select",
    "both",
    "matching aims at the gradient of the evaluation loss: a mean over its response tokens (as the perplexity of the "
    "tables is), over its examples, or half of each; nothing to choose with --loss_reduction=sum",
    TARGETS,
  )
  matching_shrink: bool = _flag(
    "select",
    True,
    "policies matching and matching_quota draw that gradient towards the training set's as far as its sampling error "
    "leaves open (James-Stein)",
  )
  trajectory: str = _flag(
    "select",
    "none",
    "add up over all checkpoints of --checkpoint, with --solver=identity: products (tracin), cosines with Adam's steps",
    ("none", "tracin", "less"),
  )

  select_runs: str = _flag(
    "evaluate", "", "select run folders, separated by commas; each adds its policy to the comparison"
  )
  policies: str = _flag("evaluate", "full,random,opponents", "what is compared besides the selections of --select_runs")
  seeds: str = _flag("evaluate", "0,1,2", "seeds of the random subsets and of the order of the data")
  fixed_seeds: str = _flag("evaluate", "", "seeds for policies that choose one set; empty: --seeds")
  fractions: str = _flag("evaluate", "", "several budgets in place of one, such as 0.05,0.1,0.25,0.5,0.75: a sweep")
  equal: str = _flag(
    "evaluate",
    "steps",
    "what compared trainings have in common, one or a list: steps or tokens (of responses) of all data, epochs of "
    "their own set, budget_tokens (as many tokens as a random set of their size has in so many epochs)",
  )

  check_examples: int = _flag("check", 4, "training examples that a self-check looks at")

  compare_ratios: str = _flag("solvers", "0.1,0.01,0.001", "damping ratios at which residuals are compared")
  agreement_ratios: str = _flag("solvers", "0.1,0.01", "those of them at which scores are compared")
  curve_every: int = _flag("solvers", 5, "LiSSA steps between two measurements of the residual")
  cg_steps: int = _flag("solvers", 30, "CG steps at most")
  krylov: int = _flag("solvers", 16, "vectors that low_rank keeps")
  compare_bfloat16: bool = _flag("solvers", True, "also score with bfloat16 weights")
  mislabelled: float = _flag("solvers", 0.1, "share of the training examples whose answers are shuffled; 0: not at all")
  mislabelled_layers: str = _flag("solvers", "last:1", "layers that are trained and searched for mislabelled examples")

  variants: str = _flag("study", "", "rules that are compared, separated by semicolons; empty: all")

  targets: str = _flag(
    "targets", "", "sources or topics that examples are wanted for: semicolons between targets, commas inside of one"
  )
  target_queries: int = _flag("targets", 60, "evaluation examples of a target, at most")
  target_tests: int = _flag("targets", 120, "test examples of a target, at most")
  retrained: str = _flag("targets", "", "those of --variants whose choices are trained on; empty: none")
  retrained_targets: str = _flag("targets", "", "those of --targets that --retrained is for; empty: all")
  choices_of: str = _flag(
    "targets",
    "",
    "a finished targets run of another model on the same pool: what it chose is trained on and judged, too",
  )

  preset: str = _flag("paper", "quick", "how much: two cores, or an accelerator", ("quick", "full"))
  alpaca: str = _flag("paper", "", "path of an Alpaca JSON file, for the experiments on it; empty: they are left out")
  only: str = _flag(
    "paper",
    "",
    "names of experiments, separated by commas; those whose results they read are run too, where not finished; empty: "
    "all but ablations, study-distinct, study-length, study-mixed-fresh, study-queries",
  )
  results_dir: str = _flag("paper", "docs/results", "folder of the tables and pictures")

  halves: int = _flag("fidelity", 64, "random halves of the training set that are retrained")
  halves_again: int = _flag("fidelity", 16, "so many of them once more with another seed: the noise ceiling; 0: none")
  lds_solvers: str = _flag("fidelity", "identity,datainf,ekfac,low_rank,cg,lissa", "solvers compared; --solver is one")
  lds_layers: str = _flag(
    "fidelity", "last:2;last:1", "layers compared, words of --layers separated by semicolons; the first is the default"
  )
  lds_ratios: str = _flag("fidelity", "0.01,0.1", "damping ratios compared; the first is the default")
  lds_every: bool = _flag(
    "fidelity",
    True,
    "other layers, dampings and places with every solver; false: with --solver and the plain baselines only",
  )
  lds_at: str = _flag(
    "fidelity", "full,base", "where gradients are taken: base model, trained on the full set; the first is the default"
  )
  curve_solvers: str = _flag("fidelity", "cg,identity", "solvers whose top examples are left out; empty: no curves")
  left_out: str = _flag("fidelity", "0.05,0.1,0.2,0.3", "shares of the training examples that are left out")

  score_models: str = _flag("transfer", "smollm2", "models that select, words of --model; semicolons between them")
  model_layers: str = _flag(
    "transfer", "", "--layers of each of them, semicolons between; one word for all; empty: same"
  )
  model_trains: str = _flag(
    "transfer", "", "--trainable_layers of each before it scores, semicolons between; one for all; empty: same"
  )
  model_rates: str = _flag(
    "transfer", "", "--learning_rate of each before it scores, semicolons between; one for all; empty: same"
  )
  score_at: str = _flag(
    "transfer", "full", "where they score: fine-tuned on the full set, or as given", ("full", "base")
  )

  ablate_counts: str = _flag("ablate_layers", "1,2,4,8,16", "numbers of layers; all layers are always there")
  ablate_positions: str = _flag(
    "ablate_layers", "last,first,middle,spread", "where they are, of last, first, middle and spread (evenly)"
  )
  ablate_modules: str = _flag("ablate_layers", "all,attention,mlp", "words of --modules, each alone")
  ablate_solvers: str = _flag(
    "ablate_layers",
    "identity,datainf",
    "solvers; choices of these two share one pass, any other is run for each choice",
  )
  ablate_retrain: str = _flag(
    "ablate_layers",
    "last:1,last:8",
    "choices to retrain, as last:8 or spread:4/attention, besides all layers and the cheapest that agree, up to the "
    "first that is enough; empty: nothing is retrained",
  )
  ablate_measure: str = _flag(
    "ablate_layers",
    "last:8",
    "choices whose score pass is measured in a process of its own, besides all layers and the one that is enough; "
    "empty: none",
  )
  ablate_examples: int = _flag("ablate_layers", 64, "training examples of such a measured score pass")

  hold_out_topics: str = _flag(
    "coverage",
    "3",
    "topics that a fold removes from the training set: how many, or names separated by commas (one fold)",
  )
  folds: int = _flag("coverage", 3, "sets of held-out topics")
  coverage_signal: str = _flag(
    "coverage", "maximum cosine, trained", "the signal by which test points are listed and influence is judged"
  )

  kills: int = _flag("kill_test", 10, "how often a run is killed")
  kill_command: str = _flag("kill_test", "select", "which one", ("select", "finetune", "evaluate", "study"))

  measure: str = _flag("benchmark", "times,compile,memory", "what is measured, of times, compile and memory")
  scaling: bool = _flag("benchmark", False, "instead: the score pass over --device_counts (simulated on a CPU)")
  rounds: int = _flag("benchmark", 5, "times every pass is measured; medians count")
  score_layers: str = _flag("benchmark", "last:8,last:4,all", "layers of the score passes, words of --layers")
  memory_examples: str = _flag("benchmark", "256,2048", "training examples whose score passes' memory is compared")
  device_counts: str = _flag("benchmark", "1,2,4,8", "devices of --scaling")
  synthetic_length: int = _flag(
    "benchmark", 0, "above 0: random examples of so many tokens, the second half a response, in place of data"
  )
  alone: str = _flag(
    "benchmark", "", "one measurement in this very process; the benchmark starts these itself", ("", "select", "score")
  )

  def replace(self, **changes) -> "Settings":
    """A copy with other values."""
    return dataclasses.replace(self, **changes)

  def is_set(self, name: str) -> bool:
    """Whether a flag has another value than the table's default."""
    value, default = getattr(self, name), getattr(Settings, name)
    unset = isinstance(value, float) and math.isnan(value) and math.isnan(default)
    return value != default and not unset

  def as_flag(self, name: str) -> str:
    """A flag as a line of a flagfile."""
    value = getattr(self, name)
    return f"--{name}={str(value).lower() if isinstance(value, bool) else value}"

  def as_flags(self) -> list[str]:
    """Lines of a flagfile: values other than the table's, and flags of which the command has a default of its own."""
    names = (field.name for field in dataclasses.fields(self) if field.name not in _NOT_REPEATED)
    return [self.as_flag(name) for name in names if self.is_set(name) or self.has_own_default(name)]

  def has_own_default(self, name: str) -> bool:
    """Whether the command that runs has another default than the table's: none, unless flags were read."""
    return False

  def identity(self, *groups: str) -> dict[str, Any]:
    """The values of some groups, for the identity of a run folder (NaN as null).

    A flag of `_ADDED` is not among them while it has its default: run folders from before it go on.
    """
    unset = lambda value: None if isinstance(value, float) and math.isnan(value) else value  # noqa: E731
    return {
      field.name: unset(getattr(self, field.name))
      for field in dataclasses.fields(self)
      if field.metadata["group"] in groups and field.name not in ("run_dir", *_NOT_REPEATED)
      if field.name not in _ADDED or self.is_set(field.name)
    }


def listed(text: str, separator: str = ",") -> list[str]:
  """The parts of a list."""
  return [part.strip() for part in text.split(separator) if part.strip()]


def words(text: str, name: str, known: Collection[str] = (), separator: str = ",") -> list[str]:
  """Reads a list of different words; `known`: the ones that there are, if they are few.

  Raises:
    UserError: one that is unknown, or given twice.
  """
  found = listed(text, separator)
  wrong = [word for word in found if known and word not in known]
  if wrong:
    raise UserError(f"--{name}={text}: unknown {wrong[0]!r}; use some of {f'{separator} '.join(known)}")
  if len(set(found)) < len(found):
    raise UserError(f"--{name}={text}: a word is given twice")
  return found


def shares(text: str, name: str) -> tuple[float, ...]:
  """Reads a list of different shares in (0, 1], in growing order.

  Raises:
    UserError: names the flag and the text.
  """
  try:
    found = tuple(float(word) for word in listed(text))
  except ValueError:
    found = (0.0,)
  if not all(0 < share <= 1 for share in found) or len(set(found)) < len(found):
    raise UserError(f"--{name}={text} is not a list of different shares in (0, 1], such as 0.05,0.25,0.5")
  return tuple(sorted(found))


def integers(text: str, name: str) -> tuple[int, ...]:
  """Reads a comma-separated list of integers.

  Raises:
    UserError: names the flag and the text.
  """
  try:
    return tuple(int(part) for part in listed(text))
  except ValueError:
    raise UserError(f"--{name}={text} is not a list of whole numbers such as 0,1,2") from None


def seeds_of(s: Settings) -> tuple[tuple[int, ...], tuple[int, ...]]:
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


def refuse(s: Settings, names: Collection[str], does: str) -> None:
  """Refuses flags that a command would pass over, although they ask for other numbers or other files than it makes.

  Flagfiles are shared between stages: name only flags that contradict what the command does, not those that are merely
  of no use to it (a budget where nothing is selected, layers where there is a list of them).

  Args:
    s: the flags.
    names: of flags that must have the default of the table; `name=value` refuses this value alone.
    does: what the command does instead, for the message.

  Raises:
    UserError: one of them is set.
  """
  for name in names:
    name, _, only = name.partition("=")
    if str(getattr(s, name)) == only if only else s.is_set(name):
      raise UserError(f"{s.as_flag(name)}: {does}; leave it out")
