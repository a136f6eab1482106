"""Which rule of selection can be trusted: many of them on one pool, each retrained and held against random halves.

./run.sh study --flagfile=experiments/flags/study.flags --run_dir=runs/study-chatterbot

Every variant changes one thing of a rule, or a few that belong together: the parameters at which gradients are taken,
the solver with its damping, the layers, the length bias, quotas, the size of the evaluation set. All are trained by one
recipe; a selection's seeds change the order of its data, a random set's the set too. Writes study.md and study.csv
into --run_dir.
"""

import dataclasses
import functools
import logging

import numpy as np

from experiments import flags
from experiments.study.report import FULL, RANDOM, SetFacts, shared_with_their_rule, shares_of_target, write_tables
from experiments.study.settings import StudySettings
from experiments.study.variants import VARIANTS, Variant, make_variant, settings_of, variants_of
from in2core_jax.data import tokenizing
from in2core_jax.data.subsets import distinct_points
from in2core_jax.errors import UserError, how_many
from in2core_jax.evaluation import statistics
from in2core_jax.params import subtree
from in2core_jax.pipeline import finetune, sequential, target_weights
from in2core_jax.pipeline.along_training import along
from in2core_jax.pipeline.checks import budget_of, check_policies, check_size
from in2core_jax.pipeline.evaluate_results import Group
from in2core_jax.pipeline.finetune import trainable_rows
from in2core_jax.pipeline.judging import judged, tell_size
from in2core_jax.pipeline.metagradient import check_trained, metagradient
from in2core_jax.pipeline.policy_inputs import MOST_PAIRS, OF_PAIRS, ChoiceInputs
from in2core_jax.pipeline.retraining import (
  Retrainer,
  TrainingSubset,
  equal_of,
  equal_steps,
)
from in2core_jax.pipeline.scoring import score
from in2core_jax.pipeline.session import Session, choose, open_session
from in2core_jax.pipeline.settings import OTHER_POLICIES, Settings, refuse, seeds_of
from in2core_jax.pipeline.solver_inputs import solver_settings
from in2core_jax.runs import run_folder
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.runs.unfinished import FOLDER, Work
from in2core_jax.selection import coreset
from in2core_jax.selection.inputs import Budget, PolicyInputs, inputs_of

log = logging.getLogger(__name__)

_DOES = "study's rules say themselves how they score and choose, all with one budget, and it fine-tunes by itself"
_REFUSED = (
  *("checkpoint", "damping", "normalize", "write", "trajectory"),
  *("score_path=projected", "fractions"),
  *OTHER_POLICIES,
)
# Flags of the choice, which scores do not depend on.
_OF_THE_CHOICE = (
  *("policy", "fraction", "num_examples", "token_budget"),
  *("sketch_size", "matching_target", "matching_shrink"),
)


class Study:
  """One pool of examples, and the rows that each variant chooses of it."""

  def __init__(self, session: Session, s: StudySettings, checkpoint: str, run_dir: run_folder.RunDir):
    """Keeps what all variants share.

    Args:
      session: data and model.
      s: the flags that variants change.
      checkpoint: of the training on all examples.
      run_dir: where scores are kept, also while they are computed.
    """
    self.session, self.settings, self.checkpoint = session, s, checkpoint
    self._run_dir, self._cells = run_dir, ResultCache(run_dir)

  def rows(self, variant: Variant, seed: int) -> np.ndarray:
    """The rows that a variant chooses, int64 [S], sorted."""
    return self.chosen(variant, seed)[0]

  def chosen(self, variant: Variant, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
    """These, and the weights that the variant gives them, f64 [S], or None."""
    s = settings_of(self.settings, variant).replace(checkpoint=self.checkpoint if variant.trained else "")
    session = session_of(self.session, s)
    whole = self.session.splits["train"]
    budget = budget_for(s, variant, whole, session.splits["train"])
    # What is chosen is trained on as a whole, however it was cut to be scored: a budget of tokens counts all of them.
    if variant.rounds > 1:
      return sequential.choose(session, s, variant.policy, budget.limit(whole.num_tokens), variant.rounds), None
    inputs = dataclasses.replace(self._inputs(session, s, variant), num_tokens=whole.num_tokens)
    if not variant.copies_last:
      return coreset.select_by(variant.policy, inputs, budget, seed).in_source_order
    first_of = distinct_points(session.splits["train"])
    return np.sort(coreset.select_copies_last(variant.policy, inputs, budget, first_of, seed)), None

  def _inputs(self, session: Session, s: StudySettings, variant: Variant) -> PolicyInputs:
    """What the variant chooses from."""
    policy = variant.policy
    params = session.checkpoint_params(s.checkpoint)
    influence = loss = None
    if variant.unrolled:
      influence = metagradient(session, s)
    elif policy in coreset.SCORE_POLICIES:
      influence, loss = self._scores(session, s.replace(policy="proponents"), params)
    of_policy = ChoiceInputs(session, s, params).of
    more = along(session, s, variant.warm_up) if variant.warm_up else of_policy({policy})
    return inputs_of(session.splits["train"], influence, loss, **more)

  def _scores(self, session: Session, s: StudySettings, params) -> tuple[np.ndarray, np.ndarray]:
    """Influence and loss of the training examples, float64 [N] each, computed once for all policies."""
    depends_on = s.identity("data", "select") | {
      "checkpoint": bool(s.checkpoint),
      "queries": session.splits.identity("eval"),
    }
    depends_on = {name: value for name, value in depends_on.items() if name not in _OF_THE_CHOICE}

    def compute() -> dict:
      # A folder of its own: what a killed run has kept of other scores must not be taken for these.
      work = Work(self._run_dir, s.shard_batches, f"{FOLDER}/{run_folder.hash_of(depends_on)[:16]}")
      scored = score(session, s, choose(session, params, s.layers, s.modules), work)
      work.remove()
      return {"influence": scored.influence.tolist(), "loss": scored.loss.tolist()}

    kept = self._cells.get(compute, "scores", depends_on)
    return np.array(kept["influence"]), np.array(kept["loss"])


def session_of(session: Session, s: Settings) -> Session:
  """The session with losses and lengths of a variant's `settings_of`."""
  return session.with_settings(loss_reduction=s.loss_reduction, max_length=s.max_length)


def budget_for(
  s: StudySettings, variant: Variant, whole: tokenizing.TokenizedDataset, cut: tokenizing.TokenizedDataset
) -> Budget:
  """How much a variant chooses: as many examples as if none was cut.

  Args:
    s: flags of the budget.
    variant: the rule.
    whole: the training set as it is trained on.
    cut: as it is scored, where some responses may be cut off.

  Raises:
    UserError: fewer examples than that still have a response.
  """
  budget = budget_of(s)
  if budget.token_budget:
    return budget
  count = budget.limit(whole.num_tokens[whole.num_response_tokens > 0])
  left = np.count_nonzero(cut.num_response_tokens)
  if left < count:
    raise UserError(
      f"it is to choose {how_many(count, 'example')}, but only {left} have a response within {s.max_length} tokens"
    )
  return Budget(num_examples=count)


def check_variants(session: Session, s: StudySettings) -> None:
  """Tells before the work what a variant could not do.

  Raises:
    UserError: names the variant.
  """
  for name, variant in variants_of(s).items():
    own = settings_of(s, variant)
    try:
      check_policies(session, {variant.policy})
      target_weights.check(session, own, {variant.policy})
      if variant.unrolled and own.eval_weights:
        raise UserError(f"--eval_weights={own.eval_weights}: it is of the mean evaluation loss")
      if variant.policy in (*coreset.SCORE_POLICIES, *coreset.GRADIENT_POLICIES):
        tree = subtree.make_subtree(session.model.params, own.layers, own.modules)
      if variant.unrolled:
        check_trained(own)
      if variant.policy in coreset.SCORE_POLICIES and not variant.unrolled:
        solver_settings(own)
        check_size(own, subtree.size_of(session.model.params, tree), f"--solver={own.solver}")
      budget_for(own, variant, session.splits["train"], session_of(session, own).splits["train"])
    except UserError as error:
      raise UserError(f"--variants, {name!r}: {error}; change that, or name only other rules in --variants") from error


def with_rules(session: Session, s: StudySettings) -> StudySettings:
  """Without --variants: all of them but those that are not for so many training examples, which is told."""
  if s.variants.strip():
    return s
  left_out = []
  if len(session.splits["train"]) > MOST_PAIRS:
    left_out = [name for name, variant in VARIANTS.items() if variant.policy in OF_PAIRS]
    log.warning("left out with more than %d training examples: %s", MOST_PAIRS, "; ".join(left_out))
  return s.replace(variants="; ".join(name for name in VARIANTS if name not in left_out))


def candidates(study: Study, s: StudySettings, cells: ResultCache) -> list[TrainingSubset]:
  """Full data, random sets and every variant, with their seeds; what was chosen is kept."""
  usable, (seeds, fixed) = trainable_rows(study.session), seeds_of(s)
  found = [TrainingSubset(FULL, seed, usable) for seed in fixed]
  found += [TrainingSubset(RANDOM, seed, study.rows(make_variant("random"), seed)) for seed in seeds]
  for name, variant in variants_of(s).items():
    seeded = variant.policy in coreset.SEEDED_POLICIES
    for seed in seeds if seeded else fixed:
      drawn = seed if seeded else 0
      kept = cells.get(functools.partial(_kept, study, variant, drawn), "rows", name, variant.key, drawn)
      weights = np.array(kept["weights"]) if "weights" in kept else None
      found.append(TrainingSubset(name, seed, np.array(kept["rows"], np.int64), weights=weights))
  return found


def _kept(study: Study, variant: Variant, seed: int) -> dict:
  """The cell of a choice."""
  rows, weights = study.chosen(variant, seed)
  return {"rows": rows.tolist()} | ({} if weights is None else {"weights": weights.tolist()})


def retrained(
  judge: Retrainer, cells: ResultCache, candidate: TrainingSubset, steps: int, label: str
) -> statistics.RetrainRow:
  """The candidate's training, done now unless it was; the same rows, order and steps are trained once."""
  train = lambda: judge.retrain(candidate, label, steps).as_json()  # noqa: E731
  stored = cells.get(train, "training", *candidate.key, candidate.seed, steps)
  return judged(judge.session.splits["test"], statistics.RetrainRow.from_json(stored | {"policy": candidate.policy}))


def run(settings: StudySettings, session: Session | None = None) -> str:
  """Chooses, retrains, compares; returns the run folder. Finished cells are kept."""
  s = settings
  refuse(s, _REFUSED, _DOES)
  variants_of(s)
  equal = equal_of(s)
  seeds_of(s)
  run_folder.RunDir.refuse_held(s.run_dir)  # before the work that comes before the folder is opened
  session = session or open_session(s)
  s = with_rules(session, s)
  check_variants(session, s)
  identity = session.own_identity(
    "study", s, ("data", "model", "finetune", "select", "run"), ("train", "eval", "test")
  )  # not the lists of variants and seeds: more of them go on in the same folder
  tell_size(session.splits["test"])
  run_dir = run_folder.RunDir.open(s.run_dir, identity, overwrite=s.overwrite)
  session.splits.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.study --flagfile=THIS"])
  # Beside the tables: a run folder of its own, as `in2core_jax.pipeline.finetune` makes it.
  checkpoint = finetune.run(s.replace(run_dir=f"{s.run_dir.rstrip('/')}-full"), session)
  cells, study = ResultCache(run_dir), Study(session, s, checkpoint, run_dir)
  chosen = candidates(study, s, cells)
  judge = Retrainer(session, s.replace(checkpoint=checkpoint), [candidate.rows for candidate in chosen])
  base = cells.get(lambda: {"losses": judge.losses(judge.sub).tolist()}, "base")["losses"]
  groups, of_sets = [], SetFacts(shared_with_their_rule(chosen), shares_of_target(session, chosen))
  for word in equal:
    rows = []
    for number, candidate in enumerate(chosen):
      steps = equal_steps(session, s, candidate.rows, word)
      label = f"equal {word}, {number + 1}/{len(chosen)}: {candidate}"
      rows.append(retrained(judge, cells, candidate, steps, label))
    groups.append(Group(word, None, rows))
  write_tables(run_dir, session, s, groups, np.array(base), of_sets)
  return str(run_dir.path)


def main(_) -> None:
  """Entry point."""
  run(flags.read(StudySettings))
