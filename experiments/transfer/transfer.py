"""One model selects, another one is trained: does a small model's choice serve a larger one, or one of another family?

./run.sh transfer --flagfile=experiments/flags/transfer.flags

Writes transfer.md, transfer.csv and pictures into --run_dir.
"""

import dataclasses
import functools
import logging

import numpy as np

from experiments import flags
from experiments.transfer.report import agreement_rows, write
from experiments.transfer.scorers import AS_LONG, COPIES_LAST, LONGEST, Scorer
from experiments.transfer.settings import TransferSettings
from in2core_jax.data import tokenizing
from in2core_jax.data.subsets import distinct_points
from in2core_jax.errors import UserError, how_many
from in2core_jax.evaluation import statistics
from in2core_jax.model import weights
from in2core_jax.params import subtree
from in2core_jax.pipeline import shapes
from in2core_jax.pipeline.checks import budget_of, check_budget, check_scores
from in2core_jax.pipeline.finetune import recipe_of, trainable_rows
from in2core_jax.pipeline.judging import judged, tell_size, test_examples
from in2core_jax.pipeline.lists import in_order
from in2core_jax.pipeline.policy_inputs import ChoiceInputs
from in2core_jax.pipeline.retraining import Retrainer, TrainingSubset
from in2core_jax.pipeline.scoring import score
from in2core_jax.pipeline.session import Session, choose, open_session
from in2core_jax.pipeline.settings import TRAINED, listed, refuse, seeds_of
from in2core_jax.runs import run_folder
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.runs.unfinished import Work
from in2core_jax.selection import coreset
from in2core_jax.selection.inputs import Budget, PolicyInputs, inputs_of

log = logging.getLogger(__name__)

_DOES = (
  "transfer fine-tunes every model itself (--score_at), has no store of gradients, chooses with one budget and writes "
  "no tables of scores"
)
_REFUSED = (
  *("checkpoint", "trajectory", "score_path=projected", "write"),
  *("fractions", "eval_weights"),
)
_OF_SCORERS = ("score_models", "model_layers", "model_trains", "model_rates", "layers")  # in the names of the cells


def scorers_of(s: TransferSettings) -> list[Scorer]:
  """The models that select; the one that is trained comes first, whether it is named or not.

  Raises:
    UserError: a model given twice, or lists of different lengths.
  """
  read = lambda text: listed(text, ";")  # noqa: E731
  models = read(s.score_models)
  if len(set(models)) < len(models):
    raise UserError(f"--score_models={s.score_models}: a model is given twice")
  lists, own_words = {}, (s.layers, s.trainable_layers, str(s.learning_rate))
  for name, default in zip(("model_layers", "model_trains", "model_rates"), own_words, strict=True):
    words = in_order(getattr(s, name), name, ";") or [default]
    words = words * len(models) if len(words) == 1 else words
    if len(words) != len(models):
      raise UserError(
        f"--{name}={getattr(s, name)} has {how_many(len(words), 'word')} for {how_many(len(models), 'model')}: give "
        "one, or as many"
      )
    lists[name] = words
  rates = [float(word) for word in lists["model_rates"]]
  found = [Scorer(*four) for four in zip(models, lists["model_layers"], lists["model_trains"], rates, strict=True)]
  own = [scorer for scorer in found if scorer.model == s.model]
  own = own or [Scorer(s.model, s.layers, s.trainable_layers, s.learning_rate)]
  return own + [scorer for scorer in found if scorer.model != s.model]


def settings_of(s: TransferSettings, scorer: Scorer) -> TransferSettings:
  """The flags with those of a scorer in their place."""
  s = s.replace(model=scorer.model, layers=scorer.layers, trainable_layers=scorer.trains, checkpoint="")
  return s.replace(learning_rate=scorer.rate)


def check_scorers(s: TransferSettings, scorers: list[Scorer]) -> None:
  """Tells before the first training what a model could not do whose turn comes later; reads no weight.

  Raises:
    UserError: names the model and the flag.
  """
  for scorer in scorers:
    named = scorer.model in listed(s.score_models, ";")
    layers = "--model_layers" if named and s.model_layers else "--layers"
    trains = "--model_trains" if named and s.model_trains else TRAINED[0]
    try:
      config, _ = weights.describe_model(scorer.model)
      own = settings_of(s, scorer)
      params, _ = shapes.trained_shapes(config, own, (trains, TRAINED[1]))
      check_scores(own, params, layers=layers)
    except UserError as error:
      if not named:  # the model that is trained
        raise
      raise UserError(f"--score_models, {scorer.model!r}: {error}") from error


class Transfer:
  """The trained model's session and judge, and what each scorer makes of the same examples."""

  def __init__(self, session: Session, s: TransferSettings, run_dir: run_folder.RunDir):
    self.session, self.settings, self.run_dir, self.cells = session, s, run_dir, ResultCache(run_dir)
    self.train = session.splits["train"]

  def session_of(self, scorer: Scorer) -> Session:
    """A session with the same data flags and another model.

    Raises:
      UserError: its examples are others, which equal data flags do not allow.
    """
    if scorer.model == self.settings.model:
      return self.session
    other = open_session(self.settings.replace(model=scorer.model), self.session.batching.mesh)
    for part in ("train", "eval"):
      if other.splits[part].ids != self.session.splits[part].ids:
        raise UserError(f"--score_models: {scorer.model} read other {part} examples than {self.settings.model}")
    return other

  def scored(self, scorer: Scorer) -> dict:
    """The cell of a scorer: influence [N] by example_id, the chosen ids, facts of the model.

    A word such as hf:DIR may name other weights tomorrow: the cell is that of the weights and the tokens of today, so
    that each model is read even when its scores are there.
    """
    session = self.session_of(scorer)
    content = run_folder.hash_of([session.model.hash, session.splits.identity("train", "eval")])
    name = ("scores", *dataclasses.astuple(scorer), content)
    return self.cells.get(lambda: self.score_anew(scorer, session, run_folder.hash_of(name)[:16]), *name)

  def score_anew(self, scorer: Scorer, session: Session, name: str) -> dict:
    """What `scored` keeps.

    Args:
      scorer: the model that selects.
      session: its own (`session_of`).
      name: of the folder for what is unfinished.
    """
    s = settings_of(self.settings, scorer)
    params, before, losses = self.params_of(session, s)
    chosen = choose(session, params, s.layers, s.modules)
    work = Work(self.run_dir, s.shard_batches, f"unfinished/{name}")
    found = score(session, s, chosen, work)
    work.remove()
    train = session.splits["train"]
    more = ChoiceInputs(session, s, params, stored=False).of({s.policy})
    inputs = inputs_for(self.train, train, scores=found.influence, loss=found.loss, **more)
    rows = coreset.select_rows(s.policy, inputs, budget_of(s), s.seed)
    return {
      "influence": dict(zip(train.ids, map(float, found.influence), strict=True)),
      "selected": [train.ids[row] for row in rows],
      "layers in all": session.model.config.num_layers,
      "parameters": subtree.count(session.model.params),
      "eval loss as given": before,
      "eval loss": losses,
    }

  def params_of(self, session: Session, s: TransferSettings) -> tuple[dict, float, float]:
    """(parameters at which a scorer takes gradients, its mean evaluation loss as given, its mean loss there)."""
    rows = trainable_rows(session)
    judge = Retrainer(session, s, [rows])
    sub = judge.sub if s.score_at == "base" else judge.train(rows, s.seed, f"{s.model}: full").sub
    counted = session.splits["eval"].num_response_tokens > 0
    before, after = (float(judge.losses(one, "eval")[counted].mean()) for one in (judge.sub, sub))
    return subtree.merge(sub, judge.frozen, judge.chosen), before, after

  def rows_of(self, ids: list[str]) -> np.ndarray:
    """Rows of the training set of the model that is trained."""
    place = {example: row for row, example in enumerate(self.train.ids)}
    return np.sort([place[example] for example in ids])

  def candidates(self, chosen: dict[str, np.ndarray]) -> list[TrainingSubset]:
    """Every set to retrain on, with its seeds: full, random ones of the same size, the longest, each scorer's choice.

    Some of the random ones have the lengths of the trained model's own choice, some, where there are copies, no text
    twice while there is another.
    """
    s, usable = self.settings, trainable_rows(self.session)
    seeds, fixed = seeds_of(s)
    found = [TrainingSubset(statistics.FULL, seed, usable) for seed in fixed]
    own = next(iter(chosen.values()))
    inputs, budget = inputs_of(self.train), Budget(num_examples=len(own))
    lengths, first_of = self.train.num_response_tokens[usable], distinct_points(self.train)
    drawn = {
      statistics.RANDOM: lambda seed: coreset.select_rows("random", inputs, budget, seed),
      AS_LONG: lambda seed: usable[coreset.length_matched(np.searchsorted(usable, own), lengths, seed)],
      COPIES_LAST: lambda seed: coreset.select_copies_last("random", inputs, budget, first_of, seed),
    }
    if len(np.unique(first_of[usable])) == len(usable):
      drawn.pop(COPIES_LAST)
    found += [TrainingSubset(name, seed, np.sort(draw(seed))) for name, draw in drawn.items() for seed in seeds]
    chosen = {LONGEST: np.sort(coreset.select_rows("longest", inputs, budget_of(s)))} | {
      f"chosen by {name}": rows for name, rows in chosen.items()
    }
    return found + [TrainingSubset(name, seed, rows) for name, rows in chosen.items() for seed in fixed]

  def retrained(self, candidates: list[TrainingSubset]) -> list[statistics.RetrainRow]:
    """The trained model's test results for each set."""
    judge = functools.cache(
      lambda: Retrainer(self.session, self.settings, [candidate.rows for candidate in candidates])
    )
    found = []
    for number, candidate in enumerate(candidates):
      label = f"train {number + 1}/{len(candidates)}: {candidate.policy}, seed {candidate.seed}"

      make = lambda candidate=candidate, label=label: judge().retrain(candidate, label).as_json()  # noqa: E731
      which = run_folder.hash_of(candidate.rows.tolist())[:16]
      cell = self.cells.get(make, "training", candidate.policy, which, candidate.seed)
      found.append(judged(self.session.splits["test"], statistics.RetrainRow.from_json(cell)))
    return found


def inputs_for(trained: tokenizing.TokenizedDataset, scored: tokenizing.TokenizedDataset, **more) -> PolicyInputs:
  """What a scorer chooses from, for the model that is trained.

  Args:
    trained: the training set as the trained model reads it: where the scorer's tokenizer cuts a response off, the
      example is still there.
    scored: as the scorer reads it, whose mean gradients are over its own response tokens.
    more: other fields of `inputs.PolicyInputs`.
  """
  return PolicyInputs(
    num_tokens=scored.num_tokens,
    num_response_tokens=trained.num_response_tokens,
    token_weights=scored.num_response_tokens,
    topics=scored.topics,
    ids=scored.ids,
    **more,
  )


def run(settings: TransferSettings, session: Session | None = None) -> str:
  """Scores with each model, retrains --model on each choice, writes transfer.md and its kin; returns the run folder."""
  s = settings
  scorers = scorers_of(s)
  seeds_of(s)
  refuse(s, _REFUSED, _DOES)
  if s.model_rates and s.score_at == "base":
    raise UserError(f"--model_rates={s.model_rates}: nothing is fine-tuned with --score_at=base, leave it out")
  check_scorers(s, scorers)
  run_folder.RunDir.refuse_held(s.run_dir)  # before the work that comes before the folder is opened
  session = session or open_session(s)
  check_budget(s, session.splits["train"])
  tell_size(session.splits["test"])
  groups = ("data", "model", "finetune", "select", "transfer", "run")
  identity = session.own_identity("transfer", s, groups, ("train", "eval", "test"))
  for name in _OF_SCORERS:
    identity["flags"].pop(name, None)
  run_dir = run_folder.RunDir.open(s.run_dir, identity, s.overwrite)
  session.splits.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.transfer --flagfile=THIS"])
  task = Transfer(session, s, run_dir)
  cells = {scorer.model: task.scored(scorer) for scorer in scorers}
  chosen = {name: task.rows_of(cell["selected"]) for name, cell in cells.items()}
  rows = task.retrained(task.candidates(chosen))
  plan = recipe_of(s, len(trainable_rows(session)))
  recipe = {
    "trained model": s.model,
    "trained": f"{s.trainable}, layers {s.trainable_layers}, {s.trainable_modules}",
    "policy": s.policy,
    "solver": s.solver,
    "scores at": {"full": "each model fine-tuned on the full training set", "base": "each model as given"}[s.score_at],
    "training examples": len(trainable_rows(session)),
    "evaluation examples": len(session.splits["eval"]),
    "test examples": len(session.splits["test"]),
    "steps": plan.steps,
    "batch size": plan.batch_size,
    "learning rate": plan.learning_rate,
  }
  about = test_examples(session.splits["test"]).about
  write(run_dir, s, agreement_rows(scorers, cells, rows, s.score_at), rows, recipe, about)
  return str(run_dir.path)


def main(_) -> None:
  """Entry point."""
  run(flags.read(TransferSettings))
