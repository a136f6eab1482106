"""Which rule finds what a target needs in a mixed pool, and what training on its choice is worth: many targets at once.

./run.sh targets --train_data=chatterbot+jsonl:alpaca.json+jsonl:gsm8k.json \\
    --dedup --targets="gsm8k; trivia; gsm8k, chatterbot" --run_dir=runs/targets

A target is one or several sources or topics of the pool. Its queries are evaluation examples of these, its test
examples are theirs too, and which training examples are of them is known: so a rule can be judged twice. Its recall,
the share of the target in its choice of as many examples as the target has, costs no training; the perplexity of models
that are trained on small choices, against random sets of the same size, does. Writes targets.md and targets.csv into
--run_dir.
"""

import dataclasses
import logging
import pathlib

import numpy as np

from experiments import flags
from experiments.study.study import session_of
from experiments.study.variants import VARIANTS, Variant, settings_of, variants_of
from experiments.targets.retraining import MATCHED, Trial, recommended, retrain
from experiments.targets.settings import BASE, MODELS, WARM, TargetsSettings
from experiments.targets.settings import FULL as FULL_MODEL
from experiments.targets.target import Target, labels_of, size_of
from in2core_jax.data import records, tokenizing
from in2core_jax.data.sources import names_of
from in2core_jax.errors import UserError, how_many
from in2core_jax.evaluation import statistics
from in2core_jax.pipeline import finetune
from in2core_jax.pipeline.along_training import random_part
from in2core_jax.pipeline.checks import budget_of
from in2core_jax.pipeline.finetune import start_params, trainable_rows
from in2core_jax.pipeline.judging import test_examples
from in2core_jax.pipeline.policy_inputs import ChoiceInputs
from in2core_jax.pipeline.retraining import equal_of
from in2core_jax.pipeline.session import Session, open_session
from in2core_jax.pipeline.settings import OTHER_POLICIES, listed, refuse, seeds_of, shares, words
from in2core_jax.report import table_text
from in2core_jax.runs import run_folder
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.selection import coreset
from in2core_jax.selection.inputs import SIMILARITIES, Budget, inputs_of
from in2core_jax.selection.whitening import spread_among

log = logging.getLogger(__name__)

_DOES = "targets' rules say themselves how they choose, by gradients at the base or the fine-tuned model"
_REFUSED = (
  *("checkpoint", "normalize", "write", "trajectory"),
  *("score_path=projected", "eval_weights", *OTHER_POLICIES),
)
FULL, RANDOM = statistics.FULL, statistics.RANDOM
_LEAST = 5  # queries of a target
_WARM_SHARE, _WARM_EPOCHS = 0.05, 4.0


def targets_of(parts: dict[str, tokenizing.TokenizedDataset], s: TargetsSettings) -> list[Target]:
  """Reads --targets; of each label at most --target_queries and --target_tests examples, drawn by a hash of their ids.

  Raises:
    UserError: a label that a part does not have, too few queries, or a target that is all of the pool.
  """
  found, absent = [], set(listed(s.absent))
  answered = {part: dataset.num_response_tokens > 0 for part, dataset in parts.items()}
  for part in ("eval", "test"):  # a text that is there many times is one query and one test example
    answered[part] = answered[part] & records.firsts(parts[part].records)
  for text in listed(s.targets, ";"):
    names = listed(text)
    rows = {}
    for part, dataset in parts.items():
      labels = [labels_of(record) for record in dataset.records]
      of = {name: np.flatnonzero([name in own for own in labels] & answered[part]) for name in names}
      for name, own in of.items():
        if not own.size and not (part == "train" and name in absent):
          known = sorted(set().union(*labels))
          raise UserError(
            f"--targets={s.targets}: the {part} set has nothing of {name!r}; it has {', '.join(known[:20])}"
          )
      most = {"train": 0, "eval": s.target_queries, "test": s.target_tests}[part]
      share = -(-most // len(names))  # of several labels the same number
      drawn = {name: spread_among(dataset.ids, own, share or len(own)) for name, own in of.items()}
      rows[part] = np.unique(np.concatenate(list(drawn.values())))
    if len(rows["eval"]) < _LEAST:
      raise UserError(
        f"--targets={s.targets}: {text!r} has {how_many(len(rows['eval']), 'quer[y|ies]')}; a target needs {_LEAST}"
      )
    mine = np.zeros(len(parts["train"]), bool)
    mine[rows["train"]] = True
    if mine[answered["train"]].all():
      raise UserError(f"--targets={s.targets}: all training examples are of {text!r}, so that every choice finds it")
    found.append(Target("+".join(names), rows["eval"], rows["test"], mine))
  if not found:
    raise UserError("--targets is empty: name sources or topics, such as --targets='gsm8k; trivia; gsm8k, trivia'")
  return found


def reported(targets: list[Target], s: TargetsSettings) -> list[Target]:
  """Those of --retrained_targets.

  Raises:
    UserError: one that is not among --targets.
  """
  wanted = ["+".join(listed(text)) for text in listed(s.retrained_targets, ";")]
  missing = [name for name in wanted if name not in {target.name for target in targets}]
  if missing:
    raise UserError(f"--retrained_targets={s.retrained_targets}: {missing[0]!r} is not among --targets={s.targets}")
  return [target for target in targets if not wanted or target.name in wanted]


def pool_of(train: tokenizing.TokenizedDataset, s: TargetsSettings) -> tokenizing.TokenizedDataset:
  """The training examples without those of --absent.

  Raises:
    UserError: it names what the pool does not have, or leaves nothing.
  """
  absent, labels = set(listed(s.absent)), [labels_of(record) for record in train.records]
  kept = np.flatnonzero([not own & absent for own in labels])
  unknown = sorted(absent - set().union(*labels))
  if unknown or not kept.size:
    why = f"the training set has nothing of {unknown[0]!r}" if unknown else "nothing of the training set is left"
    raise UserError(f"--absent={s.absent}: {why}")
  return train.take(kept) if absent else train


def with_targets(session: Session, s: TargetsSettings) -> tuple[Session, list[Target]]:
  """(the same with the pool, and what the targets need of evaluation and test set; the targets, of rows of these)."""
  parts = {**session.splits, "train": pool_of(session.splits["train"], s)}
  every = targets_of(parts, s)
  for part, name in (("eval", "queries"), ("test", "tests")):
    used = np.unique(np.concatenate([getattr(target, name) for target in every]))
    parts[part] = parts[part].take(used)
    every = [dataclasses.replace(target, **{name: np.searchsorted(used, getattr(target, name))}) for target in every]
  return session.with_splits(session.splits.with_parts(**parts)), every


class Chooser:
  """The rows that rules choose for targets; what they choose from is computed once for each place of gradients."""

  def __init__(self, session: Session, s: TargetsSettings, checkpoints: dict[str, str], trains: bool = False):
    """Computes nothing yet.

    Args:
      session: data and model.
      s: the flags that rules change.
      checkpoints: of the models where rules take gradients.
      trains: whether trainings follow, whose hidden states serve pooled ones too, if they are made first.
    """
    self.session, self.settings, self._checkpoints, self._trains = session, s, checkpoints, trains
    self._made: dict[str, ChoiceInputs] = {}

  def order(self, variant: Variant, target: Target, seed: int) -> np.ndarray:
    """All rows of the pool, best first."""
    s = settings_of(self.settings, variant)
    session, models = session_of(self.session, s), models_of(self.settings, variant)
    places = [self._inputs(session, s.replace(checkpoint=self._checkpoints[model]), len(models)) for model in models]
    found = [place.of({variant.policy}, target.queries, s.aggregate) for place in places]
    if len(found) > 1:
      found[0]["similarities"] = {variant.policy: np.mean([f["similarities"][variant.policy] for f in found], axis=0)}
    inputs = inputs_of(session.splits["train"], **found[0])
    return coreset.select_rows(variant.policy, inputs, Budget(fraction=1.0), seed)

  def _inputs(self, session: Session, s: TargetsSettings, kept: int) -> ChoiceInputs:
    """What rules choose from at one model; that of `kept` models is held, because projected gradients are large."""
    key = run_folder.hash_of([s.replace(policy="auto", aggregate="auto").identity("data", "select")])
    if key not in self._made:
      if self._trains:
        self.session.packer("train", start_params(self.session, self.settings)[1], self.session.model.params)
      while len(self._made) >= kept:
        self._made.pop(next(iter(self._made)))
      self._made[key] = ChoiceInputs(session, s, session.checkpoint_params(s.checkpoint))
    return self._made[key]


def models_of(s: TargetsSettings, variant: Variant) -> list[str]:
  """Where a rule takes gradients.

  Raises:
    UserError: an unknown word in --gradients_at.
  """
  return [FULL_MODEL] if variant.trained else words(s.gradients_at, "gradients_at", MODELS) or [BASE]


def checkpoints_of(session: Session, s: TargetsSettings, models: set[str]) -> dict[str, str]:
  """The checkpoint of each model that is wanted, trained now unless it was."""
  root, found = s.run_dir.rstrip("/"), {BASE: ""}
  if FULL_MODEL in models:
    found[FULL_MODEL] = finetune.run(s.replace(run_dir=f"{root}-full"), session)
  if WARM in models:  # as LESS does (arXiv 2402.04333)
    few = session.of_rows(train=random_part(session, _WARM_SHARE))
    found[WARM] = finetune.run(s.replace(run_dir=f"{root}-warm-up", epochs=_WARM_EPOCHS), few)
  return found


def _trains(variant: Variant) -> bool:
  """Whether a rule is more than its policy: trainings while it chooses."""
  return variant.rounds > 1 or variant.warm_up > 0


def _refusal(variant: Variant) -> str:
  """Why a rule cannot be tried on targets, in words; empty where it can."""
  if variant.policy in coreset.WEIGHTED_POLICIES:
    return "gives weights, which nothing here trains by"
  needs = variant.policy in coreset.SCORE_POLICIES or _trains(variant)
  return "needs scores or trainings of each target" if needs else ""


def _known() -> dict[str, Variant]:
  """The rules that see a target's queries, and can be tried on all of them."""
  which = {*coreset.GRADIENT_POLICIES, *SIMILARITIES}
  return {name: rule for name, rule in VARIANTS.items() if rule.policy in which and not _refusal(rule)}


def check(s: TargetsSettings) -> tuple[dict[str, Variant], list[str], tuple[float, ...]]:
  """(rules, names of those that are retrained, budgets).

  Raises:
    UserError: rules that need scores, or a budget of everything.
  """
  rules = variants_of(s) if s.variants.strip() else _known()
  if MATCHED in listed(s.retrained, ";"):
    rules.pop(MATCHED, None)  # it has no scores here: it takes the lengths of what the first of the others chooses
  for name, variant in rules.items():
    if why := _refusal(variant):
      raise UserError(f"--variants: {name!r} {why}; use some of {'; '.join(_known())}")
    if variant.policy not in SIMILARITIES and len(models_of(s, variant)) > 1:
      raise UserError(f"--gradients_at={s.gradients_at}: {name!r} has no similarities to average: give one model")
  retrained = words(s.retrained, "retrained", (*rules, MATCHED), ";")
  if not set(retrained) - {MATCHED} and (retrained or s.recommend_minutes):
    raise UserError(f"--retrained={s.retrained}: also name a rule whose response lengths {MATCHED} takes")
  budgets = shares(s.fractions, "fractions") or (0.1,)
  if budgets[-1] >= 1:
    raise UserError(f"--fractions={s.fractions}: a budget below 1, such as 0.025,0.05,0.1")
  return rules, retrained, budgets


def with_siblings(s: TargetsSettings) -> TargetsSettings:
  """--with_siblings as --train_data: after its sources the other .json and .jsonl files of their folders, by name."""
  given = s.train_data.split("+")
  files = [pathlib.Path(spec.partition(":")[2]) for spec in given if spec.startswith(("jsonl:", "file:"))]
  if not s.with_siblings or not files:
    return s
  known = {file.resolve() for file in files}
  beside = sorted({one.resolve() for file in files for one in file.parent.glob("*.json*")} - known)
  return s.replace(train_data="+".join([*given, *(f"jsonl:{file}" for file in beside)]), with_siblings=False)


def run(settings: TargetsSettings, session: Session | None = None) -> str:
  """Chooses for every target, retrains, compares; returns the run folder. Finished cells are kept."""
  s = with_siblings(settings)
  refuse(s, (*_REFUSED, *(["budget"] if budget_of(s).fraction is None else [])), _DOES)
  rules, retrained, budgets = check(s)
  equal, _ = equal_of(s), seeds_of(s)
  run_folder.RunDir.refuse_held(s.run_dir)  # before the work that comes before the folder is opened
  session, targets = with_targets(session or open_session(s), s)
  judged_targets = reported(targets, s)
  chosen_elsewhere = read_choices(s, session, judged_targets, max(budgets))
  identity = session.own_identity(
    "targets", s, ("data", "model", "finetune", "select", "run"), ("train", "eval", "test")
  )
  run_dir = run_folder.RunDir.open(s.run_dir, identity, overwrite=s.overwrite)
  session.splits.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.targets --flagfile=THIS"])
  checkpoints = checkpoints_of(session, s, {model for rule in rules.values() for model in models_of(s, rule)})
  cells, chooser = ResultCache(run_dir), Chooser(session, s, checkpoints, trains=bool(retrained))
  orders = orders_of(cells, chooser, rules, targets)
  found = {"recall": recall_table(targets, orders, budgets), "choices": choices_of(orders, session, max(budgets))}
  found["contents"] = contents_of(found["choices"], session)
  log.info("\n%s", table_text.markdown_table(found["recall"]))
  if retrained:
    judged = {name: orders[name] for name in retrained if name != MATCHED} | chosen_elsewhere
    trial = Trial(session, s, cells, judged_targets, judged, MATCHED in retrained, budgets, equal)
    run_dir.folder("recommend")  # of this run, so that --overwrite removes it
    answers = recommended(trial, chooser) if s.recommend_minutes else {}
    found |= {"recommended": {name: own.told for name, own in answers.items()}} if answers else {}
    found |= retrain(trial, answers)
  write_tables(run_dir, session, s, targets, found)
  return str(run_dir.path)


def orders_of(
  cells: ResultCache, chooser: Chooser, rules: dict[str, Variant], targets: list[Target]
) -> dict[str, dict[str, np.ndarray]]:
  """Rule -> target -> all rows, best first; what was chosen is kept."""
  found: dict[str, dict[str, np.ndarray]] = {}
  for name, variant in rules.items():
    for target in targets:
      choose = lambda variant=variant, target=target: {"rows": chooser.order(variant, target, 0).tolist()}  # noqa: E731
      what = name, variant.order_key, target.name, target.queries.tolist()
      models = models_of(chooser.settings, variant)
      named = ["warm-up" if model == WARM else model for model in models]  # older versions drew another part
      kept = cells.get(choose, "order", *what, *([] if variant.trained or models == [BASE] else named))
      found.setdefault(name, {})[target.name] = np.array(kept["rows"], np.int64)
  return found


# ---- choices of other models ---------------------------------------------------------


def choices_of(orders: dict[str, dict[str, np.ndarray]], session: Session, most: float) -> dict:
  """Rule -> target -> ids, best first, as many as the largest budget has: what `--choices_of` reads."""
  ids = session.splits["train"].ids
  size = size_of(most, len(trainable_rows(session)))
  return {
    name: {target: [ids[row] for row in rows[:size]] for target, rows in of_targets.items()}
    for name, of_targets in orders.items()
  }


def contents_of(choices: dict, session: Session) -> dict:
  """Rule -> target -> hash of what was chosen: equal ids do not make equal examples."""
  key_of = {record.example_id: record.content_key for record in session.splits["train"].records}
  return {
    name: {target: run_folder.hash_of([key_of.get(one) for one in ids]) for target, ids in of_targets.items()}
    for name, of_targets in choices.items()
  }


def read_choices(
  s: TargetsSettings, session: Session, targets: list[Target], most: float
) -> dict[str, dict[str, np.ndarray]]:
  """What the rules of `--retrained` chose in another run, as rules of this one.

  Raises:
    UserError: no finished targets run, one that did not choose for these, or chose fewer or other examples.
  """
  if not s.choices_of:
    return {}
  other = run_folder.RunDir.load(s.choices_of)
  told, whose = other.load_json("targets.json"), other.identity["flags"]["model"]
  row_of = {name: row for row, name in enumerate(session.splits["train"].ids)}
  size = size_of(most, len(trainable_rows(session)))
  found: dict[str, dict[str, np.ndarray]] = {}
  for name in (name for name in words(s.retrained, "retrained", (), ";") if name != MATCHED):
    for target in targets:
      ids = told.get("choices", {}).get(name, {}).get(target.name, ())
      unknown = [one for one in ids if one not in row_of]
      theirs = told.get("contents", {}).get(name, {}).get(target.name)  # None: of an older version
      if theirs not in (None, contents_of({name: {target.name: ids}}, session)[name][target.name]):
        raise UserError(f"--choices_of={s.choices_of}, {name!r}: its examples have changed; run it on the same data")
      if len(ids) < size or unknown:
        why = (
          f"{unknown[0]!r} is not in this pool"
          if unknown
          else f"it chose {how_many(len(ids), 'example')}, {how_many(size, '[is|are] needed')}"
        )
        raise UserError(f"--choices_of={s.choices_of}, {name!r} for {target.name}: {why}; run it on the same data")
      found.setdefault(f"{name}, chosen by {whose}", {})[target.name] = np.array([row_of[one] for one in ids])
  return found


# ---- recall --------------------------------------------------------------------------


def share_found(order: np.ndarray, mine: np.ndarray, count: int) -> float:
  """Share of the first `count` rows that are of the target, of what a choice of that size could have: 1 at best."""
  return float(mine[order[:count]].sum() / min(count, mine.sum()))


def recall_table(
  targets: list[Target], orders: dict[str, dict[str, np.ndarray]], budgets: tuple[float, ...]
) -> list[dict]:
  """A row for each rule: its recall of every target at the target's own size; medians there and at the budgets."""
  size = len(next(iter(next(iter(orders.values())).values())))
  targets = [target for target in targets if target.mine.any()]  # of the others there is nothing to find
  table = [{"rule": "random, expected"} | {target.name: f"{target.mine.sum() / size:.2f}" for target in targets}]
  for name, of_targets in orders.items():
    at = lambda count, of=of_targets: [share_found(of[t.name], t.mine, count(t)) for t in targets]  # noqa: E731
    recall = at(lambda target: int(target.mine.sum()))
    row = {"rule": name} | {target.name: f"{value:.2f}" for target, value in zip(targets, recall, strict=True)}
    row["median"] = f"{np.median(recall):.3f}"
    for budget in budgets:
      found = at(lambda target, budget=budget: size_of(budget, size))
      row[f"median at {100 * budget:g} %"] = f"{np.median(found):.3f}"
    table.append(row)
  return table


# ---- tables --------------------------------------------------------------------------


def write_tables(run_dir, session: Session, s: TargetsSettings, targets: list[Target], found: dict) -> None:
  """targets.md, .csv, .tex and .json."""
  about = (
    f"{len(trainable_rows(session)):,} training examples of {_sources(session)}; {s.model}, layers {s.layers} "
    f"compared, {s.trainable_layers} trained, learning rate {s.learning_rate:g}, batches of {s.batch_size}."
  )
  sizes = [
    {
      "target": target.name,
      "training examples": int(target.mine.sum()),
      "queries": len(target.queries),
      "test examples": len(target.tests),
      "in the pool": "yes" if target.mine.any() else "no",
      "counted apart": len(np.unique(test_examples(session.splits["test"].take(target.tests)).groups)),
    }
    for target in targets
  ]
  parts = [
    "# Targets in a mixed pool",
    about,
    table_text.markdown_table(sizes).rstrip(),
    "## What rules find",
    "Share of the target in a choice of as many examples as the pool has of it. At a budget: of what a choice of that "
    "size could have of it.",
    table_text.markdown_table(found["recall"]).rstrip(),
  ]
  if "overview" in found:
    parts += [
      "## What it is worth",
      "Perplexity by example over random sets' of the same size. In brackets: 95 % intervals that hold for new test "
      "examples and for new trainings.",
      table_text.markdown_table(found["overview"]).rstrip(),
      "The same by token:",
      table_text.markdown_table(found["by_token"]).rstrip(),
      *_first_parts(found),
      *_matched_parts(found),
      *(table_text.escape_markdown(note, 4000) for note in found["notes"]),
    ]
    for title, table in found["tables"].items():
      parts += [f"### {title}", table_text.markdown_table(table).rstrip()]
  run_dir.write_text("targets.md", "\n\n".join(parts) + "\n")
  run_dir.write_text("targets.csv", table_text.csv_table(found["recall"]))
  run_dir.write_text("targets.tex", table_text.latex_table(found["recall"]))
  run_dir.write_json("targets.json", found | {"sizes": sizes, "devices": run_folder.device_summary()})


def _first_parts(found: dict) -> list[str]:
  """The first rule over each other one, where there are others."""
  told = "The first rule's perplexity over that of each other rule:"
  return [told, table_text.markdown_table(found["first"]).rstrip()] if found["first"] else []


def _matched_parts(found: dict) -> list[str]:
  """The same over length-matched random sets, and what `recommend` answered, where there are any."""
  parts = []
  if "over_matched" in found:
    parts += ["Over random sets with the response lengths of the first rule's choice:"]
    parts += [table_text.markdown_table(found["over_matched"]).rstrip()]
  for name, own in found.get("recommended", {}).items():
    parts.append(f"`recommend` for {name}: {table_text.escape_markdown(own['sentence'], 1000)}")
  return parts


def _sources(session: Session) -> str:
  names = [pathlib.PurePath(name).name for name in names_of(session.splits["train"].records)]
  return ", ".join(f"{names.count(name):,} of {name}" for name in dict.fromkeys(names))


def main(_) -> None:
  """Entry point."""
  run(flags.read(TargetsSettings))
