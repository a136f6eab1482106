"""Which rule of selection can be trusted: many of them on one pool, each retrained and held against random halves.

python -m experiments.study --flagfile=experiments/flags/study.flags --run_dir=runs/study-chatterbot

Every variant changes one thing of a rule, or a few that belong together: the parameters at which gradients are taken,
the solver with its damping, the layers, the length bias, quotas, the size of the evaluation set. All are trained by one
recipe; a selection's seeds change the order of its data, a random set's the set too.
"""

import dataclasses
import logging
import re

import numpy as np

from experiments import flags
from experiments.study.settings import RuleSettings, StudySettings
from in2core_jax.data import tokenizing
from in2core_jax.data.subsets import distinct_points
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics, verdict
from in2core_jax.params import subtree
from in2core_jax.pipeline import finetune
from in2core_jax.pipeline.checks import budget_of, check_policies, check_size
from in2core_jax.pipeline.evaluate_results import Group
from in2core_jax.pipeline.finetune import trainable_rows
from in2core_jax.pipeline.judging import judged, of_the_target, tell_size, test_examples
from in2core_jax.pipeline.policy_inputs import MOST_PAIRS, ChoiceInputs
from in2core_jax.pipeline.retraining import (
  EQUAL,
  Retrainer,
  TrainingSubset,
  equal_of,
  equal_steps,
  many_passes,
  perplexity_on_test,
)
from in2core_jax.pipeline.scoring import score
from in2core_jax.pipeline.session import Session, choose, open_session
from in2core_jax.pipeline.settings import OTHER_POLICIES, Settings, listed, refuse, seeds_of, words
from in2core_jax.pipeline.solver_inputs import num_curvature_examples, solver_settings
from in2core_jax.report import table_text
from in2core_jax.report.plots import perplexity_plot, write_figure
from in2core_jax.runs import run_folder
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.runs.unfinished import FOLDER, Work
from in2core_jax.selection import coreset, cosines
from in2core_jax.selection.inputs import Budget, PolicyInputs, inputs_of

log = logging.getLogger(__name__)

_DOES = "study's rules say themselves how they score and choose, all with one budget, and it fine-tunes by itself"
_REFUSED = (
  *("checkpoint", "damping", "normalize", "write", "trajectory"),
  *("score_path=projected", "fractions"),
  *OTHER_POLICIES,
)
FULL, RANDOM = statistics.FULL, statistics.RANDOM
# Flags of the choice, which scores do not depend on.
_OF_THE_CHOICE = (
  *("policy", "fraction", "num_examples", "token_budget"),
  *("sketch_size", "matching_target", "matching_shrink"),
)


@dataclasses.dataclass(frozen=True)
class Variant:
  """A rule of selection.

  Attributes:
    policy: word of `coreset.POLICIES`.
    changes: flags that it changes.
    trained: scores and gradients at the model that was fine-tuned on all examples, not at the base model.
    unit: gradients of length 1, so that no example counts more than another (matching).
    queries: only so many evaluation examples, drawn at random; 0: all.
    copies_last: no example a second time while there is another text.
  """

  policy: str
  changes: tuple[tuple[str, object], ...] = ()
  trained: bool = False
  unit: bool = False
  queries: int = 0
  copies_last: bool = False

  @property
  def key(self) -> tuple:
    """Names it among what is kept; the 0.0 stands where older versions had a share to leave out."""
    return self.policy, self.changes, self.trained, self.unit, 0.0, self.queries, self.copies_last


_OWN = {field.name for field in dataclasses.fields(Variant)}  # what of a variant is no flag


def _variant(policy: str, **changes) -> Variant:
  own = {name: changes.pop(name) for name in _OWN if name in changes}
  return Variant(policy, tuple(changes.items()), **own)


# Name -> what it is; the first of each family is the rule itself. The others change one thing of it, some a second with
# it: a solver has its damping; "summed losses" of proponents has no curvature; "plain" and "unit gradients" of matching
# aim at the mean over examples, "plain" without shrinking.
VARIANTS = {
  "proponents": _variant("proponents", trained=True),
  "proponents, base model": _variant("proponents"),
  "proponents, no curvature": _variant("proponents", trained=True, solver="identity"),
  "proponents, cg": _variant("proponents", trained=True, solver="cg", damping_ratio=0.01),
  "random, copies last": _variant("random", copies_last=True),
  "proponents, datainf": _variant("proponents", trained=True, solver="datainf"),
  "proponents, summed losses": _variant("proponents", trained=True, solver="identity", loss_reduction="sum"),
  "proponents, quota": _variant("topic_quota", trained=True),
  "opponents": _variant("opponents", trained=True),
  "matching": _variant("matching", trained=True),
  "matching, base model": _variant("matching"),
  "matching, plain": _variant("matching", trained=True, matching_target="examples", matching_shrink=False),
  "matching, summed losses": _variant("matching", trained=True, loss_reduction="sum"),
  "matching, unit gradients": _variant("matching", trained=True, unit=True, matching_target="examples"),
  "matching, 16 queries": _variant("matching", trained=True, queries=16),
  # Scored on the first so many tokens of each example; trained on, and judged by, all that --max_length keeps.
  "matching, cut at 48": _variant("matching", trained=True, max_length=48),
  "auto": _variant("auto", trained=True),
  "auto, base model": _variant("auto"),
  "hybrid": _variant("hybrid", trained=True),
  "hybrid, base model": _variant("hybrid"),
  "matching, hybrid, base model": _variant("matching_hybrid"),
  "hybrid, nearest": _variant("hybrid", aggregate="nearest"),
  "whitened cosine, base model": _variant("whitened_cosine"),
  "whitened cosine, mean": _variant("whitened_cosine", aggregate="mean"),
  "whitened embedding": _variant("whitened_embedding"),
  "embedding": _variant("embedding"),
  "embedding, in turns": _variant("embedding", aggregate="round_robin"),
  "rds": _variant("rds"),
  "bm25": _variant("bm25"),
  "bm25, in turns": _variant("bm25", aggregate="round_robin"),
  "length-matched random": _variant("length_matched_random"),
  "longest": _variant("longest"),
  "highest loss": _variant("highest_loss", solver="identity"),
}


class Study:
  """One pool of examples, and the rows that each variant chooses of it."""

  def __init__(self, bench: Session, s: StudySettings, checkpoint: str, run_dir: run_folder.RunDir):
    """Keeps what all variants share.

    Args:
      bench: data and model.
      s: the flags that variants change.
      checkpoint: of the training on all examples.
      run_dir: where scores are kept, also while they are computed.
    """
    self.bench, self.settings, self.checkpoint = bench, s, checkpoint
    self._run_dir, self._cells = run_dir, ResultCache(run_dir)

  def rows(self, variant: Variant, seed: int) -> np.ndarray:
    """The rows that a variant chooses, int64 [S], sorted."""
    s = settings_of(self.settings, variant).replace(checkpoint=self.checkpoint if variant.trained else "")
    bench = bench_of(self.bench, s).with_queries(variant.queries)
    whole = self.bench.splits["train"]
    budget = budget_for(s, variant, whole, bench.splits["train"])
    # What is chosen is trained on as a whole, however it was cut to be scored: a budget of tokens counts all of them.
    inputs = dataclasses.replace(self._inputs(bench, s, variant), num_tokens=whole.num_tokens)
    if not variant.copies_last:
      return np.sort(coreset.select_rows(variant.policy, inputs, budget, seed))
    first_of = distinct_points(bench.splits["train"])
    return np.sort(coreset.select_copies_last(variant.policy, inputs, budget, first_of, seed))

  def _inputs(self, bench: Session, s: StudySettings, variant: Variant) -> PolicyInputs:
    """What the variant chooses from."""
    policy = variant.policy
    params = bench.checkpoint_params(s.checkpoint)
    influence = loss = None
    if policy in coreset.SCORE_POLICIES:
      influence, loss = self._scores(bench, s.replace(policy="proponents"), params)
    more = ChoiceInputs(bench, s, params).of({policy})
    if variant.unit:
      more |= {name: cosines.unit(more[name]) for name in ("features", "target")}
    return inputs_of(bench.splits["train"], influence, loss, **more)

  def _scores(self, bench: Session, s: StudySettings, params) -> tuple[np.ndarray, np.ndarray]:
    """Influence and loss of the training examples, float64 [N] each, computed once for all policies."""
    depends_on = s.identity("data", "select") | {"checkpoint": bool(s.checkpoint)}
    depends_on |= {"queries": bench.splits.identity("eval")}  # of a variant fewer than --eval_limit
    depends_on = {name: value for name, value in depends_on.items() if name not in _OF_THE_CHOICE}

    def compute() -> dict:
      # A folder of its own: what a killed run has kept of other scores must not be taken for these.
      work = Work(self._run_dir, s.shard_batches, f"{FOLDER}/{run_folder.hash_of(depends_on)[:16]}")
      scored = score(bench, s, choose(bench, params, s.layers, s.modules), work)
      work.remove()
      return {"influence": scored.influence.tolist(), "loss": scored.loss.tolist()}

    kept = self._cells.get(compute, "scores", depends_on)
    return np.array(kept["influence"]), np.array(kept["loss"])


def settings_of(s: Settings, variant: Variant) -> Settings:
  """The flags with those of a variant in their place; no cut keeps more of an example than --max_length."""
  own = s.replace(policy=variant.policy, **dict(variant.changes))
  return own.replace(max_length=min(own.max_length, s.max_length))


def bench_of(bench: Session, s: Settings) -> Session:
  """The bench with losses and lengths of a variant's `settings_of`."""
  return bench.with_settings(loss_reduction=s.loss_reduction, max_length=s.max_length)


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
    raise UserError(f"it is to choose {count} examples, but only {left} have a response within {s.max_length} tokens")
  return Budget(num_examples=count)


def check_variants(bench: Session, s: StudySettings) -> None:
  """Tells before the work what a variant could not do.

  Raises:
    UserError: names the variant.
  """
  queries = len(bench.splits["eval"])
  for name, variant in variants_of(s).items():
    own = settings_of(s, variant)
    try:
      check_policies(bench, {variant.policy})
      if queries < variant.queries:
        raise UserError(f"it draws {variant.queries} of {queries} evaluation examples (--eval_data, --eval_limit)")
      if variant.policy in (*coreset.SCORE_POLICIES, *coreset.GRADIENT_POLICIES):
        tree = subtree.make_subtree(bench.model.params, own.layers, own.modules)
      if variant.policy in coreset.SCORE_POLICIES:
        solver_settings(own)
        check_size(own, subtree.size_of(bench.model.params, tree), f"--solver={own.solver}")
      budget_for(own, variant, bench.splits["train"], bench_of(bench, own).splits["train"])
    except UserError as error:
      raise UserError(f"--variants, {name!r}: {error}; change that, or name only other rules in --variants") from error


def rules_of(name: str) -> list[str]:
  """The rules that one of that name changes, the nearest first: of "proponents, cg, copies last" two."""
  parts = name.split(", ")
  return [", ".join(parts[:stop]) for stop in range(len(parts) - 1, 0, -1)]


def variants_of(s: RuleSettings) -> dict[str, Variant]:
  """The variants that the flags ask for.

  Raises:
    UserError: a name that is unknown.
  """
  for name in listed(s.variants, ";"):
    rule = next((rule for rule in rules_of(name) if rule in VARIANTS), None)
    if name not in VARIANTS and rule is not None:
      raise UserError(f"--variants: there is no rule {name!r}: name {rule!r}, and change its flags on the command line")
  wanted = words(s.variants, "variants", VARIANTS, ";") or list(VARIANTS)
  if s.variants.strip() and not s.variants.strip(" ;"):
    raise UserError(f"--variants={s.variants} names no rule: leave it empty for all, or name some, joined by ;")
  return {name: VARIANTS[name] for name in wanted}


def with_enough_queries(bench: Session, s: StudySettings) -> StudySettings:
  """Without --variants: all of them but those that draw more evaluation examples than there are, which is told."""
  if s.variants.strip():
    return s
  queries = len(bench.splits["eval"])
  left_out = [name for name, variant in VARIANTS.items() if variant.queries > queries]
  if left_out:
    log.warning("left out with %d evaluation examples: %s", queries, "; ".join(left_out))
  if len(bench.splits["train"]) > MOST_PAIRS:
    large = [name for name, variant in VARIANTS.items() if variant.policy == "matching_hybrid"]
    log.warning("left out with more than %d training examples: %s", MOST_PAIRS, "; ".join(large))
    left_out += large
  return s.replace(variants="; ".join(name for name in VARIANTS if name not in left_out))


def candidates(study: Study, s: StudySettings, cells: ResultCache) -> list[TrainingSubset]:
  """Full data, random sets and every variant, with their seeds; what was chosen is kept."""
  usable, (seeds, fixed) = trainable_rows(study.bench), seeds_of(s)
  found = [TrainingSubset(FULL, seed, usable) for seed in fixed]
  found += [TrainingSubset(RANDOM, seed, study.rows(_variant("random"), seed)) for seed in seeds]
  for name, variant in variants_of(s).items():
    seeded = variant.policy in coreset.SEEDED_POLICIES
    for seed in seeds if seeded else fixed:
      drawn = seed if seeded else 0
      choose_rows = lambda variant=variant, drawn=drawn: {"rows": study.rows(variant, drawn).tolist()}  # noqa: E731
      kept = cells.get(choose_rows, "rows", name, variant.key, drawn)
      found.append(TrainingSubset(name, seed, np.array(kept["rows"], np.int64)))
  return found


def retrained(
  judge: Retrainer, cells: ResultCache, candidate: TrainingSubset, steps: int, label: str
) -> statistics.RetrainRow:
  """The candidate's training, done now unless it was; the same rows, order and steps are trained once."""
  train = lambda: judge.retrain(candidate, label, steps).as_json()  # noqa: E731
  stored = cells.get(train, "training", candidate.rows.tolist(), candidate.seed, steps)
  return judged(judge.bench.splits["test"], statistics.RetrainRow.from_json(stored | {"policy": candidate.policy}))


def run(settings: StudySettings, bench: Session | None = None) -> str:
  """Chooses, retrains, compares; returns the run folder. Finished cells are kept."""
  s = settings
  refuse(s, _REFUSED, _DOES)
  variants_of(s)
  equal = equal_of(s)
  seeds_of(s)
  run_folder.RunDir.refuse_held(s.run_dir)  # before the work that comes before the folder is opened
  bench = bench or open_session(s)
  s = with_enough_queries(bench, s)
  check_variants(bench, s)
  identity = bench.identity(
    "study", s, ("data", "model", "finetune", "select", "run"), ("train", "eval", "test")
  )  # not the lists of variants and seeds: more of them go on in the same folder
  tell_size(bench.splits["test"])
  run_dir = run_folder.RunDir.open(s.run_dir, identity, overwrite=s.overwrite)
  bench.splits.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.study --flagfile=THIS"])
  # Beside the tables: a run folder of its own, as `in2core_jax.pipeline.finetune` makes it.
  checkpoint = finetune.run(s.replace(run_dir=f"{s.run_dir.rstrip('/')}-full"), bench)
  cells, study = ResultCache(run_dir), Study(bench, s, checkpoint, run_dir)
  chosen = candidates(study, s, cells)
  judge = Retrainer(bench, s.replace(checkpoint=checkpoint), [candidate.rows for candidate in chosen])
  base = cells.get(lambda: {"losses": judge.losses(judge.sub).tolist()}, "base")["losses"]
  groups, of_sets = [], SetFacts(shared_with_their_rule(chosen), shares_of_target(bench, chosen))
  for word in equal:
    rows = []
    for number, candidate in enumerate(chosen):
      steps = equal_steps(bench, s, candidate.rows, word)
      label = f"equal {word}, {number + 1}/{len(chosen)}: {candidate}"
      rows.append(retrained(judge, cells, candidate, steps, label))
    groups.append(Group(word, None, rows))
  write_tables(run_dir, bench, s, groups, np.array(base), of_sets)
  return str(run_dir.path)


# ---- tables --------------------------------------------------------------------------

_RATIOS = {"to ": "token", "by example, to ": "example"}
_PERPLEXITIES = {"perplexity": "random sets beaten", "example_perplexity": "beaten by example"}


def shared_with_their_rule(chosen: list[TrainingSubset]) -> dict[str, float]:
  """For each variant the share of its examples that the rule which it changes has chosen too.

  "proponents, cg, cut at 96" changes "proponents, cg", or "proponents" where that was not asked for; rules without one
  are left out. Of several seeds the first counts.
  """
  first: dict[str, np.ndarray] = {}
  for candidate in chosen:
    first.setdefault(candidate.policy, candidate.rows)
  shared = {}
  for name, rows in first.items():
    rule = next((rule for rule in rules_of(name) if rule in first), None)
    if rule is not None:
      shared[name] = len(np.intersect1d(rows, first[rule])) / max(1, len(rows))
  return shared


def shares_of_target(bench: Session, chosen: list[TrainingSubset]) -> dict[str, float]:
  """For each rule the share of its examples that come from where the evaluation examples do, a mean over its seeds.

  Empty where that is not known (`judging.of_the_target`).
  """
  mask = of_the_target(bench.splits["train"], bench.splits["eval"])
  if mask is None:
    return {}
  found: dict[str, list[float]] = {}
  for candidate in chosen:
    found.setdefault(candidate.policy, []).append(float(mask[candidate.rows].mean()))
  return {name: float(np.mean(shares)) for name, shares in found.items()}


@dataclasses.dataclass(frozen=True)
class SetFacts:
  """What is told of the sets that rules choose, by name of the rule.

  Attributes:
    shared: see `shared_with_their_rule`.
    of_target: see `shares_of_target`.
  """

  shared: dict[str, float] = dataclasses.field(default_factory=dict)
  of_target: dict[str, float] = dataclasses.field(default_factory=dict)


def comparison(rows: list[statistics.RetrainRow], of_sets: SetFacts = SetFacts()) -> list[dict]:
  """A row for each rule: perplexities, their ratios to random sets' and full data's, how many random sets it beats.

  Args:
    rows: trainings that have something in common, full data and random sets among them.
    of_sets: of the rules' sets.
  """
  by_rule: dict[str, list[statistics.RetrainRow]] = {}
  for row in rows:
    by_rule.setdefault(row.policy, []).append(row)
  random = {field: np.array([getattr(row, field) for row in by_rule[RANDOM]]) for field in _PERPLEXITIES}
  compared = verdict.Comparison(rows)
  found = []
  for name, own in by_rule.items():
    mean = lambda field, own=own: float(np.mean([getattr(row, field) for row in own]))  # noqa: E731
    line = {
      "rule": name,
      "seeds": len(own),
      "examples": round(mean("examples")),
      "steps": round(mean("steps")),
      "trained tokens": round(mean("trained_tokens")),
      "perplexity": round(mean("perplexity"), 3),
      "by example": round(mean("example_perplexity"), 3),
    }
    for column, by in _RATIOS.items():
      for other in (RANDOM, FULL):
        ratio = "" if name == other else verdict.shown(compared.difference(name, other, by).ratio())
        line[f"{column}{other}"] = ratio
    for field, column in _PERPLEXITIES.items():
      beaten = int(np.sum(mean(field) < random[field]))
      line[column] = "" if name == RANDOM else f"{beaten} of {len(random[field])}"
    line["shared with its rule"] = f"{of_sets.shared[name]:.2f}" if name in of_sets.shared else ""
    line["of the target"] = f"{of_sets.of_target[name]:.2f}" if name in of_sets.of_target else ""
    found.append(line)
  return found


def ranges(rows: list[statistics.RetrainRow]) -> str:
  """The lowest and the highest perplexity of every rule that was trained several times, by token and by example."""
  by_rule: dict[str, list[statistics.RetrainRow]] = {}
  for row in rows:
    by_rule.setdefault(row.policy, []).append(row)
  told = []
  for name, own in by_rule.items():
    if len(own) > 1:
      token, example = (sorted(getattr(row, field) for row in own) for field in _PERPLEXITIES)
      told.append(f"{name} {token[0]:.3f} to {token[-1]:.3f} ({example[0]:.3f} to {example[-1]:.3f})")
  return f"Lowest and highest of several trainings, by example in brackets: {'; '.join(told)}." if told else ""


_COLUMNS = (
  '"to random" is the ratio of a rule\'s perplexity by token to random sets\', "to full" to full data\'s, both also by '
  "example. In brackets: 95 % intervals that hold for new test examples and for new trainings; a rule with one "
  "training has the spread of those with several. "
  '"Beaten": below how many of the random sets it is. "Of the target": the share of its examples that have the '
  "topic, or else the source, of evaluation examples. Each rule, and what it chose by:"
)


def rules_table(s: StudySettings, usable: int) -> list[dict]:
  """For every variant its policy, where its gradients are taken, its solver and what else it changes.

  Args:
    s: the flags.
    usable: training examples with a response.
  """
  found = []
  for name, variant in variants_of(s).items():
    own, policy = settings_of(s, variant), variant.policy
    scored = policy in coreset.SCORE_POLICIES and policy != "highest_loss"
    compared = policy in coreset.GRADIENT_POLICIES
    damped = scored and own.solver != "identity"
    shown = ("solver", "damping_ratio", "layers")
    more = [f"--{flag}={str(getattr(own, flag)).lower()}" for flag, _ in variant.changes if flag not in shown]
    more += ["gradients of length 1"] if variant.unit else []
    more += [f"{variant.queries} evaluation examples"] if variant.queries else []
    more += ["no text twice before every text is in"] if variant.copies_last else []
    line = {
      "rule": name,
      "policy": policy,
      "gradients at": ("the fine-tuned model" if variant.trained else "the base model") if scored or compared else "",
      "layers": own.layers if scored or compared else "",
      "solver": own.solver if scored else "",
      "damping ratio": f"{own.damping_ratio:g}" if damped else "",
      "curvature of": _curvature_of(own, usable) if damped else "",
      "more": "; ".join(more),
    }
    found.append(line)
  return found


def _curvature_of(s: StudySettings, usable: int) -> str:
  """Which training examples a solver's curvature is that of, in words."""
  if s.solver == "datainf" or s.solver == "ekfac" and not s.ekfac_examples:
    return "all examples"
  if s.solver == "ekfac":
    return f"{min(s.ekfac_examples, usable)} examples"
  if s.solver == "lissa":
    return f"{s.depth} minibatches of {min(s.curvature_batch, usable)}"
  return f"{num_curvature_examples(s, usable)} examples"


def _sources(s: StudySettings) -> str:
  """The training data without the folders of files, and which block of it."""
  named = " + ".join(
    re.sub(r"^((?:\w[\w.-]*=)?(?:jsonl|file):).*/", r"\1", source) for source in s.train_data.split("+")
  )
  return f"{named} (block {s.limit_block} of the limits' size)" if s.limit_block else named


def remove_pictures(run_dir: run_folder.RunDir, equal: list[str]) -> None:
  """Removes the pictures of a longer --equal: they would be published beside tables that do not show them."""
  for word in EQUAL:
    for kind in ("svg", "png") if word not in equal else ():
      run_dir.remove(f"plots/study-{word}.{kind}")


def write_tables(run_dir, bench: Session, s: StudySettings, groups: list[Group], base, of_sets: SetFacts) -> None:
  """study.md, .csv, .tex, .json and the pictures."""
  num_test, perplexity = np.count_nonzero(bench.splits["test"].num_response_tokens), perplexity_on_test(bench, base)
  parts = [
    "# Rules of selection, retrained",
    f"{len(trainable_rows(bench)):,} training examples of {_sources(s)}, {s.model}, layers "
    f"{s.trainable_layers} trained, learning rate {s.learning_rate:g}, batches of {s.batch_size}; "
    f"{num_test} test examples; the base model's test perplexity is {perplexity:.3f}. In brackets: 95 % intervals "
    "that hold for new test examples and for new trainings.",
    test_examples(bench.splits["test"]).about,
  ]
  titled = {f"equal {group.equal}" if len(groups) > 1 else "": group.rows for group in groups}
  notes = [note for group in groups for note in many_passes(group.equal, group.rows, s.batch_size)]
  notes += [*verdict.many_comparisons(titled), *verdict.sensitivity(list(titled.values()))]
  parts += [table_text.escape_markdown(note, 4000) for note in notes]
  every = []
  remove_pictures(run_dir, [group.equal for group in groups])
  for group in groups:
    table = comparison(group.rows, of_sets)
    every += [{"equal": group.equal} | row for row in table]
    write_figure(run_dir, f"study-{group.equal}", perplexity_plot(verdict.summarise(group.rows)))
    parts += [f"## Equal {group.equal}", table_text.markdown_table(table).rstrip(), ranges(group.rows)]
    parts += [f"![Test perplexity at equal {group.equal}](plots/study-{group.equal}.png)"]
  rules = rules_table(s, len(trainable_rows(bench)))
  parts += ["## Rules", _COLUMNS, table_text.markdown_table(rules).rstrip()]
  run_dir.write_text("study.md", "\n\n".join(filter(None, parts)) + "\n")
  run_dir.write_text("study.csv", table_text.csv_table(every))
  run_dir.write_text("study.tex", table_text.latex_table(every))
  facts = {"base_perplexity": perplexity, "table": every, "notes": notes}
  run_dir.write_json("study.json", facts | {"devices": run_folder.device_summary()})
  log.info("\n%s", "\n\n".join(parts))


def main(_) -> None:
  """Entry point."""
  run(flags.read(StudySettings))
