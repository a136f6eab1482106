"""The phases of every stage, in the order in which a run enters them.

A run shows its progress under these names, and `--dry_run` prices the same tables (`estimate.stage_phases`). Where a
detail follows (a number of products, the rows of a block), the text shown begins with the name.
"""

from collections.abc import Collection

from in2core_jax.influence import kernels
from in2core_jax.pipeline.index_settings import IndexSettings
from in2core_jax.pipeline.settings import Settings
from in2core_jax.selection import aggregation, coreset
from in2core_jax.selection.inputs import SIMILARITIES

QUERIES = "query gradients"
FACTORS = "EK-FAC"
LOSSES = "losses"
SCORES = "losses and scores"
NORMS = "scores and norms"
AT_STEPS = "scores at"  # the checkpoints of a training
LAYERS, TOKENS, BLOCKS = "scores by layer", "scores by token", "scores of evaluation examples"
RESULTS = "scores and coreset"  # files only: shows no progress
TRAINING, TRAININGS, TEST = "training", "trainings", "test losses"
DROP = "training on evaluation examples"
RECOMMENDATION = "recommendation"  # of the demo
SAMPLE, ASKED, INDEX = "a sample of the pool", "evaluation gradients", "index"

WHITENED = "whitened_cosine"  # a word of --normalize that measures in a metric of its own (`whitening`)


def hidden(boundary: int, part: str) -> str:
  """Hidden states that enter the lowest chosen layer."""
  return f"hidden states below layer {boundary} ({part})"


def reference(part: str) -> str:
  """Log ratios of preference pairs at the reference model; where there are pairs, before every other phase."""
  return f"reference model ({part})"


def projected(part: str) -> str:
  """Per-example gradients through a random projection."""
  return f"projected gradients ({part})"


def embedded(part: str) -> str:
  """Hidden states above the top layer, pooled."""
  return f"embeddings ({part})"


# ---- what settings decide --------------------------------------------------------------


def score_aggregate(s: Settings) -> str:
  """How scores on single queries become the influence of an example, a word of `aggregation.AGGREGATES`.

  A policy by similarity aggregates that, not the scores, which are reported beside it.
  """
  by_similarity = s.policy in (*SIMILARITIES, *coreset.HYBRID_POLICIES)
  return "mean" if s.aggregate == "auto" or by_similarity else s.aggregate


def way_of(s: Settings, queries: int) -> str:
  """How the training set is scored: trajectory, projected, whitened, norms, or the path of plain scores, jvp or vmap.

  Args:
    s: the flags.
    queries: aggregated ones, Q.
  """
  if s.trajectory != "none":
    return "trajectory"
  if s.score_path == "projected":
    return "projected"
  if s.normalize == WHITENED:
    return "whitened"
  if s.normalize != "none" or s.writes("self"):
    return "norms"
  return kernels.score_path(s.score_path, queries)


def aggregates_blocks(s: Settings) -> bool:
  """Whether scores of single evaluation examples, a block of them at a time, are aggregated afterwards."""
  return score_aggregate(s) in aggregation.BY_QUERY and s.trajectory == "none" and s.normalize != WHITENED


def needs_factors(s: Settings) -> bool:
  """Whether the solver, or its preconditioner, is fitted to per-example gradients first."""
  return s.solver == "ekfac" or s.precondition != "none"


# ---- the tables ------------------------------------------------------------------------


def of_choice(policies: Collection[str]) -> list[str]:
  """What policies choose from beside scores (`policy_inputs.ChoiceInputs`)."""
  found = []
  if set(policies) & set(coreset.GRADIENT_POLICIES):
    found += [projected("train"), projected("eval")]
  if set(policies) & set(coreset.HIDDEN_POLICIES):
    found += [embedded("train"), embedded("eval")]
  if "loss_drop" in policies:
    found.append(DROP)
  return found


def of_scores(s: Settings, queries: int) -> list[str]:
  """Losses and scores of the training set."""
  found = {
    "trajectory": [AT_STEPS, LOSSES],
    "projected": [projected("train"), LOSSES],
    "whitened": [projected("train"), projected("eval"), LOSSES],
    "norms": [NORMS],
    "jvp": [SCORES],
    "vmap": [SCORES],
  }[way_of(s, queries)]
  return [*found, *([BLOCKS] if aggregates_blocks(s) else [])]


def of_select(s: Settings, boundary: int | None, queries: int) -> list[str]:
  """Influence of every training example, and the coreset.

  Args:
    s: the flags.
    boundary: lowest chosen layer, below which hidden states are kept; None where they are not.
    queries: aggregated ones, Q.

  Returns:
    Names, in order; a phase that some policy shares with the scores is there once.
  """
  found = [] if boundary is None else [hidden(boundary, "train"), hidden(boundary, "eval")]
  found.append(QUERIES)
  if s.trajectory == "none" and s.solver != "identity":
    found += [s.solver, *([FACTORS] if needs_factors(s) else [])]
  found += of_scores(s, queries)
  found += [name for name in of_choice({s.policy}) if name not in found]
  found += [name for word, name in (("layer", LAYERS), ("token", TOKENS), ("query", BLOCKS)) if s.writes(word)]
  return [*found, RESULTS]


def of_finetune(boundary: int | None) -> list[str]:
  """Fine-tuning on the full training set; `boundary` as in `of_select`."""
  return [*([] if boundary is None else [hidden(boundary, "train")]), TRAINING]


def of_index(s: IndexSettings) -> list[str]:
  """A new index of the training set; one that has its basis enters the last phase alone."""
  return [SAMPLE, *([ASKED] if s.index_basis == "queries" else []), INDEX]


def of_evaluate(policies: Collection[str], boundary: int | None) -> list[str]:
  """Retraining on every compared set, and the test losses; `boundary` of what is trained, as in `of_select`."""
  kept = [] if boundary is None else [hidden(boundary, "train"), hidden(boundary, "test")]
  return [*kept, *of_choice(policies), TRAININGS, TEST]
