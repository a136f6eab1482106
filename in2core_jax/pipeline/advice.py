"""What select warns of, in whole sentences."""

import numpy as np

from in2core_jax.ihvp import solvers
from in2core_jax.pipeline.settings import Settings
from in2core_jax.selection import coreset, matching
from in2core_jax.selection.inputs import PolicyInputs

_MANY_COPIES = 0.05  # share of the training set from which select warns of them


# Retrained halves of four pools with 0.35 and more: proponents a little ahead of matching at equal tokens; 0: behind.
_ANOTHER_KIND = 0.3


_ENOUGH_QUERIES = 40  # of a source that is 43 % of a pool, 40 were told apart from it in 15 of 20 draws, 20 in none


_HARDLY_MATCHED = 0.1  # share of the way to the evaluation set's mean gradient below which it decides next to nothing


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


def risky_settings(s: Settings) -> list[str]:
  """What made the plain rule lose to random halves where it was measured (docs/selection.md), one sentence each."""
  found = []
  if s.policy in ("proponents", "topic_quota"):
    if not s.checkpoint:
      found.append(
        "The scores are those of the base model, where short responses rank high. Give --checkpoint, the fine-tuned "
        "model, or use the policy matching."
      )
    if s.solver == "identity" and s.normalize == "none" and s.trajectory == "none":
      found.append(
        "The scores are plain products of gradients, in which large gradients decide. Use --solver=cg, --solver=lissa "
        "or the policy matching."
      )
  return found


def unsolved(s: Settings, result: solvers.SolveResult) -> list[str]:
  """That a solver has stopped above its tolerance, in one sentence; nothing where it has none."""
  if result.info.get("converged") is not False:
    return []
  damping = "--damping_ratio" if np.isnan(s.damping) else "--damping"
  other = "" if s.solver == "cg" else "--solver=cg, "
  return [
    f"{s.solver} stopped above its tolerance of {s.solver_tol:g}, at a relative residual of "
    f"{float(np.max(result.residual)):.3g} after {result.steps} steps. What helps: {other}more --depth, a higher "
    f"{damping}."
  ]


def risky_data(summary: dict) -> list[str]:
  """What of the training set made rules lose where it was measured (docs/selection.md), one sentence each.

  Args:
    summary: `tokenizing.data_summary`.
  """
  copies, size = (summary["parts"]["train"][name] for name in ("duplicates", "examples"))
  if copies <= _MANY_COPIES * size:
    return []
  return [
    f"{copies:,} of the {size:,} training examples repeat an earlier one, message for message, and may fill the "
    "selection. Give --drop_copies, to finetune, select and evaluate alike: they choose among different examples then."
  ]


def better_policy(s: Settings, aim: matching.Shrunk | None) -> list[str]:
  """Where the scores that are there anyway did better than matching (docs/selection.md), in one sentence.

  Args:
    s: flags of the run.
    aim: of the matching (`PolicyInputs.aim`); None where nothing was matched.
  """
  # With LiSSA at 0.1 the highest scores did worse than matching: by CG they did not.
  trusted = s.checkpoint and s.solver == "cg" and s.matching_shrink and s.policy == "matching"
  if aim is None or aim.beyond_chance < _ANOTHER_KIND or not trusted:
    return []
  return [
    "The evaluation set is of another kind than the training set, as far as gradients tell "
    f"({100 * aim.beyond_chance:.0f} % of the difference of their means is more than chance). For such sets the half "
    "with the highest influence by CG retrained as well as matching's, a little better at equal response tokens. "
    "To compare both: evaluate with --policies=full,random,proponents."
  ]


def too_few_to_aim(s: Settings, inputs: PolicyInputs) -> list[str]:
  """Where --policy=auto draws at random and more evaluation examples might show otherwise, in one sentence."""
  if s.policy != "auto" or coreset.aims(inputs) or (size := len(inputs.similarities["hybrid"])) >= _ENOUGH_QUERIES:
    return []
  return [
    f"{size:,} distinct evaluation examples are few to tell whether they are of another kind than the training set: "
    f"give {_ENOUGH_QUERIES} or more (--eval_data, --eval_limit), or --policy=hybrid where you know that they are."
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
    f"The {size:,} evaluation examples know their own mean gradient less well than the training set does: "
    f"{100 * aim.kept:.0f} % of the difference is matched, so that the selection stands for the training set and "
    "hardly for them. Give more of them (--eval_data, --eval_limit), ten times as many where there are."
  ]
