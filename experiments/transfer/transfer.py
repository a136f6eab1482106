"""One model selects, another one is trained: does a small model's choice serve a larger one, or one of another family?

python -m experiments.transfer --flagfile=experiments/flags/transfer.flags
"""

import dataclasses
import functools
import logging

import numpy as np

from experiments import flags
from experiments.solvers.solvers import spearman_interval
from experiments.transfer.settings import TransferSettings
from in2core_jax.data import tokenizing
from in2core_jax.data.subsets import distinct_points
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics, verdict
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
from in2core_jax.report import table_text
from in2core_jax.report.markdown import retrain_rows
from in2core_jax.report.plots import perplexity_plot, write_figure
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
  "fractions",
)
# What a choice is held against beside full data and random sets: what length or dropped copies alone would give.
AS_LONG, COPIES_LAST, LONGEST = "random, as long", "random, copies last", "longest"
_LOSSES = ("its evaluation loss as given", "its evaluation loss where it scores")
_RATIOS = {"token": "ratio", "example": "ratio by example"}
_OF_SCORERS = ("score_models", "model_layers", "model_trains", "model_rates", "layers")  # in the names of the cells


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A model that selects.

  Attributes:
    model: word of --model.
    layers: word of --layers, of its own layers.
    trains: word of --trainable_layers, for the training before it scores.
    rate: --learning_rate of that training.
  """

  model: str
  layers: str
  trains: str
  rate: float


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
        f"--{name}={getattr(s, name)} has {len(words)} words for {len(models)} models: give one, or as many"
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
  """The trained model's bench and judge, and what each scorer makes of the same examples."""

  def __init__(self, bench: Session, s: TransferSettings, run_dir: run_folder.RunDir):
    self.bench, self.settings, self.run_dir, self.cells = bench, s, run_dir, ResultCache(run_dir)
    self.train = bench.splits["train"]

  def bench_of(self, scorer: Scorer) -> Session:
    """A bench with the same data flags and another model.

    Raises:
      UserError: its examples are others, which equal data flags do not allow.
    """
    if scorer.model == self.settings.model:
      return self.bench
    other = open_session(self.settings.replace(model=scorer.model), self.bench.batching.mesh)
    for part in ("train", "eval"):
      if other.splits[part].ids != self.bench.splits[part].ids:
        raise UserError(f"--score_models: {scorer.model} read other {part} examples than {self.settings.model}")
    return other

  def scored(self, scorer: Scorer) -> dict:
    """The cell of a scorer: influence [N] by example_id, the chosen ids, facts of the model.

    A word such as hf:DIR may name other weights tomorrow: the cell is that of the weights and the tokens of today, so
    that each model is read even when its scores are there.
    """
    bench = self.bench_of(scorer)
    content = run_folder.hash_of([bench.model.hash, bench.splits.identity("train", "eval")])
    name = ("scores", *dataclasses.astuple(scorer), content)
    return self.cells.get(lambda: self.score_anew(scorer, bench, run_folder.hash_of(name)[:16]), *name)

  def score_anew(self, scorer: Scorer, bench: Session, name: str) -> dict:
    """What `scored` keeps.

    Args:
      scorer: the model that selects.
      bench: its own (`bench_of`).
      name: of the folder for what is unfinished.
    """
    s = settings_of(self.settings, scorer)
    params, before, losses = self.params_of(bench, s)
    chosen = choose(bench, params, s.layers, s.modules)
    work = Work(self.run_dir, s.shard_batches, f"unfinished/{name}")
    found = score(bench, s, chosen, work)
    work.remove()
    train = bench.splits["train"]
    more = ChoiceInputs(bench, s, params, stored=False).of({s.policy})
    inputs = inputs_for(self.train, train, scores=found.influence, loss=found.loss, **more)
    rows = coreset.select_rows(s.policy, inputs, budget_of(s), s.seed)
    return {
      "influence": dict(zip(train.ids, map(float, found.influence), strict=True)),
      "selected": [train.ids[row] for row in rows],
      "layers in all": bench.model.config.num_layers,
      "parameters": subtree.count(bench.model.params),
      "eval loss as given": before,
      "eval loss": losses,
    }

  def params_of(self, bench: Session, s: TransferSettings) -> tuple[dict, float, float]:
    """(parameters at which a scorer takes gradients, its mean evaluation loss as given, its mean loss there)."""
    rows = trainable_rows(bench)
    judge = Retrainer(bench, s, [rows])
    sub = judge.sub if s.score_at == "base" else judge.train(rows, s.seed, f"{s.model}: full").sub
    counted = bench.splits["eval"].num_response_tokens > 0
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
    s, usable = self.settings, trainable_rows(self.bench)
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
    judge = functools.cache(lambda: Retrainer(self.bench, self.settings, [candidate.rows for candidate in candidates]))
    found = []
    for number, candidate in enumerate(candidates):
      label = f"train {number + 1}/{len(candidates)}: {candidate.policy}, seed {candidate.seed}"

      make = lambda candidate=candidate, label=label: judge().retrain(candidate, label).as_json()  # noqa: E731
      which = run_folder.hash_of(candidate.rows.tolist())[:16]
      cell = self.cells.get(make, "training", candidate.policy, which, candidate.seed)
      found.append(judged(self.bench.splits["test"], statistics.RetrainRow.from_json(cell)))
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


def agreement_rows(
  scorers: list[Scorer], cells: dict[str, dict], rows: list[statistics.RetrainRow], at: str
) -> list[dict]:
  """One row a scorer: agreement with the trained model's own scores and choice, perplexity against its own choice.

  Args:
    scorers: the trained model first.
    cells: model -> what `Transfer.scored` gave.
    rows: the retrained models.
    at: word of --score_at.
  """
  own = next(iter(cells.values()))
  ids = sorted(own["influence"])
  values = lambda cell: np.array([cell["influence"][example] for example in ids])  # noqa: E731
  compared, mine = verdict.Comparison(rows), f"chosen by {scorers[0].model}"
  table = []
  for number, scorer in enumerate(scorers):
    cell = cells[scorer.model]
    row = {"scores by": scorer.model, "layers": f"{scorer.layers} of {cell['layers in all']}"}
    row |= {"parameters": cell["parameters"], "fine-tuned": at == "full", "learning rate": scorer.rate}
    row |= dict(zip(_LOSSES, (cell["eval loss as given"], cell["eval loss"]), strict=True))
    rank = spearman_interval(values(cell), values(own))
    row |= {"Spearman": rank.mean, "Spearman low": rank.low, "Spearman high": rank.high}
    row["top-half overlap"] = statistics.top_overlap(values(cell), values(own), 0.5)
    row["overlap of the choices"] = len(set(cell["selected"]) & set(own["selected"])) / len(own["selected"])
    name = f"chosen by {scorer.model}"
    row["perplexity"] = float(np.mean([one.perplexity for one in compared.groups[name]]))
    if number:
      for by, word in _RATIOS.items():
        ratio = compared.difference(name, mine, by).ratio()
        row |= {f"{word} to own": ratio.mean, f"{word} low": ratio.low, f"{word} high": ratio.high}
    table.append(row)
  return table


def sentences(table: list[dict], share: float, by_scores: bool = True) -> list[str]:
  """For each other model: is its choice as good for the trained model as the trained model's own?

  Args:
    table: `agreement_rows`.
    share: of the examples that is kept, which is the overlap that two random choices have.
    by_scores: whether the policy chooses by influence, so that agreement of scores says something of the choice.
  """
  lines = []
  for row in table[1:]:
    said = " and ".join(_against_own(row, *one) for one in _RATIOS.items())
    agreement = f"its choice shares {row['overlap of the choices']:.0%} with the model's own, {share:.0%} by chance"
    agreement += f"; Spearman of the scores {row['Spearman']:.2f}" if by_scores else ""
    lines.append(f"Chosen by {row['scores by']} ({agreement}): {said}.")
  before, after = _LOSSES
  for row in table:
    if row["fine-tuned"] and row[after] >= row[before]:
      lines.append(
        f"Mind that fine-tuning at learning rate {row['learning rate']:g} did not lower the evaluation loss of "
        f"{row['scores by']} ({row[before]:.3f} before, {row[after]:.3f} after): overfitted or diverged, it says "
        "little about the model; --model_rates gives it a rate of its own."
      )
  return lines


def _against_own(row: dict, by: str, word: str) -> str:
  """One clause of `sentences`, by token or by example."""
  ratio, low, high = (row[f"{word} {end}"] for end in ("to own", "low", "high"))
  if np.isnan(low):
    return f"by {by} {ratio:.3f} times the perplexity of the model's own choice (no interval: one training each)"
  bounds = f"{ratio:.3f} times, 95 % interval {low:.3f} to {high:.3f}"
  if low > 1 or high < 1:
    return f"by {by} perplexity {'above' if low > 1 else 'below'} that of the model's own choice ({bounds})"
  return f"by {by} perplexity not to be told apart from that of the model's own choice ({bounds})"


def beside(rows: list[statistics.RetrainRow]) -> list[str]:
  """For each choice its perplexity's ratio to that of sets as long as the own choice, without copies, the longest."""
  compared, lines = verdict.Comparison(rows), []
  for name in (name for name in compared.groups if name.startswith("chosen by ")):
    there = [other for other in (AS_LONG, COPIES_LAST, LONGEST) if other in compared.groups]
    lines.append(f"{name}: {'; '.join(verdict.clause(compared, name, other, other) for other in there)}.")
  return lines


def chance(rows: list[statistics.RetrainRow]) -> list[str]:
  """`verdict.many_comparisons` of all that is told: against full data, random sets, the own choice and its likes."""
  compared = verdict.Comparison(rows)
  chosen = [name for name in compared.groups if name.startswith("chosen by ")]
  likes = [name for name in (*chosen[:1], AS_LONG, COPIES_LAST, LONGEST) if name in compared.groups]
  more = {
    f"{name} against {other} by {by}": compared.difference(name, other, by)
    for name in chosen
    for other in likes
    for by in _RATIOS
    if name != other
  }
  return verdict.chance_sentence(compared.estimates() | more)


def printed(table: list[dict]) -> list[dict]:
  """`agreement_rows` with an interval in one cell."""

  def show(row: dict, *names: str) -> str:
    mean, low, high = (row[name] for name in names)
    return f"{mean:.3f}" if np.isnan(low) else f"{mean:.3f} ({low:.3f} to {high:.3f})"

  lines = []
  for row in table:
    line = {name: row[name] for name in ("scores by", "layers", "parameters", "learning rate", *_LOSSES)}
    line["Spearman with own scores"] = show(row, "Spearman", "Spearman low", "Spearman high")
    line |= {name: row[name] for name in ("top-half overlap", "overlap of the choices")}
    line["perplexity"] = f"{row['perplexity']:.3f}"
    for word in _RATIOS.values():
      names = [f"{word} {end}" for end in ("to own", "low", "high")]
      line[f"{word} to own choice"] = show(row, *names) if names[0] in row else "1"
    lines.append(line)
  return lines


def write(
  run_dir: run_folder.RunDir, s: TransferSettings, table: list[dict], rows: list, recipe: dict, about: str = ""
) -> None:
  """transfer.md, .csv, .tex, retrained.csv, .tex, the figure; transfer.json last."""
  summary, words = verdict.summarise(rows), verdict.verdict(rows)
  share = rows[-1].examples / rows[0].examples  # the first is full data, the last a choice
  by_scores = s.policy in coreset.SCORE_POLICIES
  lines = [*sentences(table, share, by_scores), *(line for line in words.splitlines() if line.strip())]
  lines += [*beside(rows), *chance(rows), *verdict.sensitivity([rows])]
  lines += filter(None, [about])
  write_figure(run_dir, "transfer", perplexity_plot(summary))
  columns = list(dict.fromkeys(name for row in table for name in row))
  run_dir.write_text("transfer.csv", table_text.csv_table(table, columns))
  run_dir.write_text("transfer.tex", table_text.latex_table(printed(table), caption=f"Who selects for {s.model}"))
  run_dir.write_text("retrained.csv", table_text.csv_table(summary))
  run_dir.write_text("retrained.tex", table_text.latex_table(retrain_rows(summary), caption="Retrained"))
  named = [{"name": name, "value": table_text.format_value(value)} for name, value in recipe.items()]
  parts = [f"# Who selects for {table_text.escape_markdown(s.model)}"]
  parts += ["\n".join(f"- {table_text.escape_markdown(line, 1000)}" for line in lines)]
  parts += ["![Test perplexity](plots/transfer.svg)", table_text.markdown_table(printed(table)).rstrip()]
  parts += [
    "Spearman and overlaps are with the trained model's own scores and choice; the interval is a bootstrap over "
    "training examples. Chance is 0 for Spearman, one half for the top halves, and for the choices the share that is "
    f"kept. {verdict.BRACKETS}",
    f'"{AS_LONG}": random sets with the response lengths of the trained model\'s own choice (response_tokens below '
    "tell how far another choice is from them): where a choice is no better, its gain over random sets may be one of "
    "length.",
  ]
  if any(row.policy == COPIES_LAST for row in rows):
    parts[-1] += f' "{COPIES_LAST}": random sets without a text twice while there is another: the same of copies it '
    parts[-1] += "leaves out."
  parts += ["## Retrained", table_text.markdown_table(retrain_rows(summary)).rstrip()]
  parts += ["## Recipe", table_text.markdown_table(named, ["name", "value"])]
  text = "\n\n".join(parts)
  run_dir.write_text("transfer.md", text)
  facts = {"table": table, "retrained": summary, "conclusions": lines, "recipe": recipe}
  run_dir.write_json("transfer.json", facts | {"devices": run_folder.device_summary()})
  log.info("\n%s", text)


def run(settings: TransferSettings, bench: Session | None = None) -> str:
  """Scores with each model, retrains --model on each choice, writes transfer.md and its kin; returns the run folder."""
  s = settings
  scorers = scorers_of(s)
  seeds_of(s)
  refuse(s, _REFUSED, _DOES)
  if s.model_rates and s.score_at == "base":
    raise UserError(f"--model_rates={s.model_rates}: nothing is fine-tuned with --score_at=base, leave it out")
  check_scorers(s, scorers)
  run_folder.RunDir.refuse_held(s.run_dir)  # before the work that comes before the folder is opened
  bench = bench or open_session(s)
  check_budget(s, bench.splits["train"])
  tell_size(bench.splits["test"])
  groups = ("data", "model", "finetune", "select", "transfer", "run")
  identity = bench.identity("transfer", s, groups, ("train", "eval", "test"))
  for name in _OF_SCORERS:
    identity["flags"].pop(name, None)
  run_dir = run_folder.RunDir.open(s.run_dir, identity, s.overwrite)
  bench.splits.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.transfer --flagfile=THIS"])
  task = Transfer(bench, s, run_dir)
  cells = {scorer.model: task.scored(scorer) for scorer in scorers}
  chosen = {name: task.rows_of(cell["selected"]) for name, cell in cells.items()}
  rows = task.retrained(task.candidates(chosen))
  plan = recipe_of(s, len(trainable_rows(bench)))
  recipe = {
    "trained model": s.model,
    "trained": f"{s.trainable}, layers {s.trainable_layers}, {s.trainable_modules}",
    "policy": s.policy,
    "solver": s.solver,
    "scores at": {"full": "each model fine-tuned on the full training set", "base": "each model as given"}[s.score_at],
    "training examples": len(trainable_rows(bench)),
    "evaluation examples": len(bench.splits["eval"]),
    "test examples": len(bench.splits["test"]),
    "steps": plan.steps,
    "batch size": plan.batch_size,
    "learning rate": plan.learning_rate,
  }
  about = test_examples(bench.splits["test"]).about
  write(run_dir, s, agreement_rows(scorers, cells, rows, s.score_at), rows, recipe, about)
  return str(run_dir.path)


def main(_) -> None:
  """Entry point."""
  run(flags.read(TransferSettings))
