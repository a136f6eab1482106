"""What select warns of because of its settings and of what it chose from, in whole sentences.

What follows from the results alone is in `report.findings`, whose `warnings` is the one list that is shown.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from in2core_jax.data.tokenizing import TokenizedDataset
from in2core_jax.errors import how_many
from in2core_jax.params import quantisation, subtree
from in2core_jax.pipeline.settings import Settings
from in2core_jax.report import findings
from in2core_jax.report.answer import ENOUGH_QUERIES
from in2core_jax.selection import coreset, matching
from in2core_jax.selection.inputs import PolicyInputs
from in2core_jax.selection.warnings import selection_warnings

log = logging.getLogger(__name__)

_HARDLY_MATCHED = 0.1  # share of the way to the evaluation set's mean gradient below which it decides next to nothing


def tell(warnings: Sequence[str], before: Sequence[str] = ()) -> None:
  """Says on the terminal what the reports show, but for what this process has said before."""
  said = set(map(findings.as_line, before))
  for line in warnings:
    if line not in said:
      log.warning("%s", line)


def of_selection(
  s: Settings,
  inputs: PolicyInputs,
  rows: np.ndarray,
  aim: matching.Shrunk | None,
  evals: TokenizedDataset,
  rule: str,
) -> list[str]:
  """Everything that the settings, the evaluation set and the choice make risky, one sentence each.

  Args:
    s: flags of the run.
    inputs: what was chosen from.
    rows: int [S], the choice.
    aim: of the matching (`PolicyInputs.aim`); None where nothing was matched.
    evals: the evaluation set.
    rule: that chose; with the policy auto the one that it took.
  """
  size = int(np.count_nonzero(evals.num_response_tokens))
  found = [*risky_settings(s), *too_few_to_aim(s, inputs), *few_queries(s, aim, size)]
  # Duplicates are counted among the findings; for hybrid, topics and lengths of the queries are what was asked for.
  found += selection_warnings(rows, inputs, s.seed, copies=False, topics=rule != "hybrid")
  return found + without_effect(s)


def unused_inverse(s: Settings) -> str:
  """How to do without the inverse, where only the reported influence needs it; empty where more does."""
  needed = s.policy in coreset.SCORE_POLICIES or s.write or s.normalize != "none" or s.trajectory != "none"
  if needed or s.solver == "identity":
    return ""
  return (
    f"--policy={s.policy} chooses without the inverse of --solver={s.solver}, which only the reported influence takes: "
    "--solver=identity leaves it out and reports plain products of gradients"
  )


def without_effect(s: Settings) -> list[str]:
  """Flags that are of another solver or policy, one sentence each: a flagfile may serve several."""
  given = [name for name in ("repeat", "scale", "acceleration", "average") if s.solver != "lissa" and s.is_set(name)]
  found = [f"{s.as_flag(name)} is LiSSA's and changes nothing with --solver={s.solver}" for name in given]
  if s.policy not in coreset.FEATURE_POLICIES:
    idle = [name for name in ("matching_target", "matching_shrink") if s.is_set(name)]
    found += [f"{s.as_flag(name)} is of greedy matching and changes nothing with --policy={s.policy}" for name in idle]
  if s.policy in (*coreset.FEATURE_POLICIES, "matching_hybrid") and s.is_set("aggregate"):
    found.append(f"{s.as_flag('aggregate')} changes the reported scores alone: --policy={s.policy} matches a mean")
  return found


def spares_nothing(s: Settings, params: Any, tree: subtree.Subtree) -> list[str]:
  """Where --frozen_weights leaves no matrix in few bits, one sentence.

  Args:
    s: flags of the run.
    params: arrays or shapes, before chosen matrices are made full.
    tree: what of them is scored or trained.
  """
  if not s.is_set("frozen_weights"):
    return []
  leaves = traverse_util.flatten_dict(params["layers"], sep="/")
  rounded = {path for path, leaf in leaves.items() if isinstance(leaf, quantisation.Quantised)}
  if len(tree.layers) < tree.num_layers or not rounded <= {*tree.paths}:
    return []
  return [
    f"{s.as_flag('frozen_weights')} spares no memory: all matrices of layers are chosen, and those are full, at the "
    "rounded weights; choose fewer layers or LoRA factors"
  ]


def risky_settings(s: Settings) -> list[str]:
  """What makes the plain rule's scores say little of a retraining (their LDS, docs/paper.md), one sentence each."""
  found = []
  if s.policy in ("proponents", "topic_quota"):
    if not s.checkpoint:
      found.append(
        "The scores are those of the base model, where short responses rank high. Use the fine-tuned model "
        "(--checkpoint) or --policy=matching."
      )
    if s.solver == "identity" and s.normalize == "none" and s.trajectory == "none":
      found.append(
        "The scores are plain products of gradients, in which large gradients decide. Use --solver=cg, --solver=lissa "
        "or --policy=matching."
      )
  return found


def too_few_to_aim(s: Settings, inputs: PolicyInputs) -> list[str]:
  """Where --policy=auto draws at random and more evaluation examples might show otherwise, in one sentence."""
  if s.policy != "auto" or coreset.aims(inputs) or (size := inputs.asked) >= ENOUGH_QUERIES:
    return []
  return [
    f"{how_many(size, 'distinct evaluation example[s] [is|are] too few to show whether [it differs|they differ]')} "
    f"in kind from the training set. Use {ENOUGH_QUERIES} or more (--eval_data, --eval_limit), or "
    "--policy=hybrid where you know that they differ."
  ]


def few_queries(s: Settings, aim: matching.Shrunk | None, size: int) -> list[str]:
  """Where the evaluation set is too small to say what should be matched, in one sentence.

  Args:
    s: flags of the run.
    aim: of the matching (`PolicyInputs.aim`); None where nothing was matched.
    size: evaluation examples.
  """
  if aim is None or not s.matching_shrink or aim.kept >= _HARDLY_MATCHED:
    return []
  return [
    f"The {how_many(size, 'evaluation example[s] [is|are]')} too few: their mean gradient is mostly noise "
    f"({100 * aim.kept:.0f} % kept), so this selection reflects the training set. Use about ten times as many "
    "(--eval_data, --eval_limit)."
  ]
