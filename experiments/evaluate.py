"""Stage 5: retrains from the base model on each selection with one recipe and compares perplexities on the test set.

python -m experiments.evaluate --select_runs=runs/a,runs/b --policies=full,random,opponents --seeds=0,1,2
python -m experiments.evaluate --select_runs=runs/a --fractions=0.05,0.1,0.25,0.5,0.75 --equal=steps,epochs
"""

import dataclasses
import itertools
import logging

import numpy as np
from etils import epath

from experiments import cli, dry_run, flags
from experiments.finetune import recipe_of, trainable_rows
from experiments.flags import Settings, listed, seeds_of, shares
from experiments.judging import judged, tell_size, test_examples
from experiments.pictures import write_figure
from experiments.policy_inputs import ChoiceInputs
from experiments.refusals import budget_of, check_budget
from experiments.retraining import Candidate, Judge, equal_of, equal_steps, many_passes, perplexity_on_test
from experiments.workbench import Workbench
from in2core_jax import artifacts, coreset, evaluation, finetune, report, report_facts, report_html, verdict
from in2core_jax.errors import UserError
from in2core_jax.records import raw_lines

log = logging.getLogger(__name__)


def read_selection(folder: str, bench: Workbench) -> tuple[str, dict[str, np.ndarray]]:
  """(policy, columns of scores.parquet) of a select run, checked against the training set.

  Raises:
    UserError: not a finished select run, or one over other examples.
  """
  path = epath.Path(folder)
  if not (path / "summary.json").exists():
    raise UserError(f"--select_runs: {folder} has no summary.json, so it is no finished select run; run select first")
  chosen = artifacts.RunDir.load(folder)
  columns = chosen.read_scores("scores.parquet")
  if tuple(columns["example_id"]) != bench.parts["train"].ids:
    raise UserError(f"--select_runs: {folder} scored other training examples: give evaluate the same data flags")
  # Equal ids do not make equal examples: what was selected must be what stands there now.
  train, rows = bench.parts["train"], np.flatnonzero(columns["selected"])
  kept = raw_lines(train.records, rows).encode("utf-8", errors="backslashreplace")
  coreset_file = path / "coreset.jsonl"
  if not coreset_file.exists() or coreset_file.read_bytes() != kept:
    raise UserError(
      f"--select_runs: {folder}/coreset.jsonl is not what it selected from --train_data: the data changed"
    )
  return chosen.load_json("summary.json")["policy"], columns


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be compared, before any policy has chosen.

  Attributes:
    runs: (name, columns of scores.parquet) of each of --select_runs.
    policies: (policy, seed) of this call, in order.
    seeds: of the selections of `runs`.
    fractions: budgets of a sweep, growing; empty where there is one budget.
    equal: what trainings that are compared have in common, words of `EQUAL`.
  """

  runs: list[tuple[str, dict[str, np.ndarray]]]
  policies: list[tuple[str, int]]
  seeds: tuple[int, ...]
  fractions: tuple[float, ...]
  equal: list[str]


def plan_of(bench: Workbench, s: Settings) -> Plan:
  """Reads the flags and the select runs.

  Raises:
    UserError: an unknown policy, two candidates of one name, a run that does not fit, selections of several sizes.
  """
  seeds, fixed = seeds_of(s)
  folders, fractions = listed(s.select_runs), fractions_of(s)
  runs = [read_selection(folder, bench) for folder in folders]
  wanted = listed(s.policies)
  if not wanted and not runs:
    raise UserError("--policies and --select_runs are empty: name what is to be compared, as in --policies=full,random")
  for policy in wanted:
    if policy != "full" and policy not in coreset.POLICIES:
      raise UserError(f"--policies={s.policies}: unknown {policy!r}; use full, {', '.join(coreset.POLICIES)}")
    if not runs and policy in coreset.SCORE_POLICIES:
      raise UserError(f"--policies={s.policies}: {policy} needs the scores of a select run: give --select_runs")
  if fractions and len(runs) > 1:
    raise UserError(f"--fractions takes the scores of one select run: --select_runs={s.select_runs} names {len(runs)}")
  names = [policy for policy, _ in runs]
  if fractions and set(names) & {*coreset.GRADIENT_POLICIES, *coreset.SIMILARITIES}:
    _check_same_rule(folders[0], bench, s)
  chosen_here = [policy for policy in wanted if policy != evaluation.FULL]
  sizes = [int(columns["selected"].sum()) for _, columns in runs]
  if len(set(sizes)) > 1 and chosen_here:
    raise UserError(
      f"--select_runs={s.select_runs} have selected {', '.join(map(str, sizes))} examples, and "
      f"{', '.join(chosen_here)} of --policies would have one size for all: give runs of one size, each run in an "
      "evaluation of its own, or --policies=full"
    )
  called = [
    name if names.count(name) == 1 else f"{name} ({epath.Path(folder).name})"
    for name, folder in zip(names, folders, strict=True)
  ]
  if fractions:  # the runs give scores; what they have chosen is one budget only
    wanted += [name for name in dict.fromkeys(names) if name not in wanted]
    called = []
  twice = sorted({name for name in wanted + called if (wanted + called).count(name) > 1})
  if twice:
    raise UserError(
      f"--policies={s.policies} --select_runs={s.select_runs}: two candidates are named {twice[0]!r}; leave out of "
      "--policies what a select run has chosen"
    )
  policies = [(name, seed) for name in wanted for seed in (seeds if name in coreset.SEEDED_POLICIES else fixed)]
  columns = [columns for _, columns in runs]
  return Plan(list(zip(called or names, columns, strict=True)), policies, fixed, fractions, equal_of(s))


def _check_same_rule(folder: str, bench: Workbench, s: Settings) -> None:
  """In a sweep a policy that matches gradients chooses anew: it must do so as the select run did that names it.

  Raises:
    UserError: another model or other flags of the choice.
  """
  run = artifacts.RunDir.load(folder).load_json("summary.json")["identity"]
  if run["model_hash"] != bench.model_hash:
    raise UserError(
      f"--fractions chooses anew by the rule of --select_runs={folder}, which took its gradients at another --model "
      f"(hash {run['model_hash'][:12]}) than {s.model} (hash {bench.model_hash[:12]}): give evaluate the same"
    )
  policy = run["flags"].get("policy")
  names = ("layers", "sketch_size", "loss_reduction") if policy in coreset.GRADIENT_POLICIES else ()
  names += ("matching_target", "matching_shrink") if policy in coreset.FEATURE_POLICIES else ()
  names += ("aggregate",) if policy in (*coreset.SIMILARITIES, "auto") else ()
  for name in names:
    theirs, ours = run["flags"].get(name), getattr(s, name)
    if theirs != ours:
      raise UserError(
        f"--fractions chooses anew by the rule of --select_runs={folder}, which has --{name}={theirs} and not {ours}: "
        "give evaluate the same"
      )
  if policy in coreset.GRADIENT_POLICIES and run["checkpoint"] != finetune.checkpoint_hash(s.checkpoint):
    raise UserError(
      f"--fractions chooses anew by the rule of --select_runs={folder}, which took its gradients at another model than "
      f"--checkpoint={s.checkpoint}: give evaluate the --checkpoint of the select run"
    )


def fractions_of(s: Settings) -> tuple[float, ...]:
  """The budgets of --fractions; 1 is the policy `full`."""
  found = shares(s.fractions, "fractions")
  if found == (1.0,):
    raise UserError("--fractions=1 is all of the data: give a share below 1 besides, such as 0.25,0.5")
  if found and (s.num_examples or s.token_budget):
    raise UserError("--fractions with --num_examples or --token_budget: give one of them")
  return tuple(share for share in found if share < 1)


def candidates(bench: Workbench, s: Settings, plan: Plan) -> tuple[list[Candidate], list[str]]:
  """Every (budget, policy, seed) to retrain, with its rows; and what looks risky about the sets chosen here."""
  inputs = _inputs(bench, s, plan)
  found, warnings = [], []
  if plan.fractions:
    budgets = [(fraction, coreset.Budget(fraction=fraction)) for fraction in plan.fractions]
  elif plan.runs:  # as many examples as the selections that they are compared with
    budgets = [(None, coreset.Budget(num_examples=int(plan.runs[0][1]["selected"].sum())))]
  else:
    budgets = [(None, budget_of(s))]
  for policy, seed in plan.policies:
    if policy == "full":
      found.append(Candidate(policy, seed, trainable_rows(bench)))
      continue
    for fraction, budget in budgets:
      rows = np.sort(coreset.select_rows(policy, inputs, budget, seed))
      found.append(Candidate(policy, seed, rows, fraction))
      if policy in coreset.GRADIENT_POLICIES:
        where = policy if fraction is None else f"{policy}, {fraction:.0%}"
        warnings += [f"{where}: {warning}" for warning in coreset.selection_warnings(rows, inputs, seed)]
  if not plan.fractions:
    for name, columns in plan.runs:
      found += [Candidate(name, seed, np.flatnonzero(columns["selected"])) for seed in plan.seeds]
  return found, warnings


def _inputs(bench: Workbench, s: Settings, plan: Plan) -> coreset.PolicyInputs:
  """What the policies of this call choose from; scores are those of the first select run."""
  scores = plan.runs[0][1] if plan.runs else {}
  inputs = coreset.inputs_of(bench.parts["train"], scores.get("influence"), scores.get("loss"))
  # Gradients where the select stage would take them: at the model that was fine-tuned on all examples, if there is one.
  policies = {policy for policy, _ in plan.policies}
  params = bench.checkpoint_params(s.checkpoint if policies & set(coreset.GRADIENT_POLICIES) else "")
  return dataclasses.replace(inputs, **ChoiceInputs(bench, s, params).of(policies))


def kept_candidates(run_dir: artifacts.RunDir, bench: Workbench, s: Settings, plan: Plan) -> list[Candidate]:
  """`candidates`, chosen once and kept in the run folder: a run started again does not choose again."""
  if not run_dir.holds("candidates.json"):
    found, warnings = candidates(bench, s, plan)
    for warning in warnings:
      log.warning("%s", warning)
    rows = [dataclasses.asdict(candidate) | {"rows": candidate.rows.tolist()} for candidate in found]
    run_dir.write_json("candidates.json", {"candidates": rows, "warnings": warnings})
  kept = run_dir.read_json("candidates.json")["candidates"]
  return [Candidate(**item | {"rows": np.array(item["rows"], np.int64)}) for item in kept]


class Trainings:
  """The retrained models of a run folder: a file for each, and a judge where one is missing."""

  def __init__(self, run_dir: artifacts.RunDir, bench: Workbench, s: Settings, chosen: list[Candidate]):
    self._run_dir, self._bench, self._settings, self._chosen = run_dir, bench, s, chosen
    self._judge: Judge | None = None

  @property
  def judge(self) -> Judge:
    """Made when it is first needed: a finished run compiles nothing."""
    if self._judge is None:
      self._judge = Judge(self._bench, self._settings, [candidate.rows for candidate in self._chosen])
    return self._judge

  def base_losses(self) -> np.ndarray:
    """Of the base model on the test set, float64 [N]."""
    if not self._run_dir.holds("base.json"):
      self._run_dir.write_json("base.json", {"losses": self.judge.losses(self.judge.sub).tolist()})
    return np.array(self._run_dir.read_json("base.json")["losses"])

  def row(self, candidate: Candidate, steps: int, label: str) -> evaluation.RetrainRow:
    """The candidate's training over so many steps, done now unless it was."""
    name = [candidate.policy, candidate.seed, candidate.fraction, steps]
    file = f"trainings/{artifacts.hash_of(name)[:12]}.json"
    rows = artifacts.hash_of(candidate.rows.tolist())
    if not self._run_dir.holds(file) or self._run_dir.read_json(file).get("rows_sha256", rows) != rows:
      row = self.judge.retrain(candidate, label, steps)
      self._run_dir.write_json(file, row.as_json() | {"rows_sha256": rows})
      log.info("%s, %d steps: test perplexity %.3f", candidate, steps, row.perplexity)
    return judged(self._bench.parts["test"], evaluation.RetrainRow.from_json(self._run_dir.read_json(file)))


def run(settings: Settings, bench: Workbench | None = None) -> str:
  """Retrains, compares, writes; returns the run folder. Finished trainings are kept, also when the run is killed."""
  s = settings
  artifacts.RunDir.refuse_held(s.run_dir)  # before the work that comes before the folder is opened
  bench = bench or Workbench(s)
  plan = plan_of(bench, s)
  identity = bench.identity("evaluate", s, ("data", "model", "finetune", "evaluate", "run"), ("train", "eval", "test"))
  of_policies = ("fraction", "num_examples", "token_budget", "layers", "sketch_size")
  of_policies += ("aggregate", "matching_target", "matching_shrink")
  identity["flags"] |= {name: getattr(s, name) for name in of_policies}
  if s.checkpoint and {policy for policy, _ in plan.policies} & set(coreset.GRADIENT_POLICIES):
    identity["checkpoint"] = finetune.checkpoint_hash(s.checkpoint)
  identity["select_runs"] = {
    name: artifacts.hash_of([columns[part].tolist() for part in ("influence", "loss", "selected")])[:16]
    for name, columns in plan.runs
  }
  check_budget(s, bench.parts["train"])  # told before there is a run folder
  tell_size(bench.parts["test"])
  run_dir = artifacts.RunDir.open(s.run_dir, identity, overwrite=s.overwrite)
  bench.write_skipped(run_dir)
  run_dir.write_flags("flags.txt", s.as_flags(), ["python -m experiments.evaluate --flagfile=THIS"])
  chosen = kept_candidates(run_dir, bench, s, plan)
  for candidate in chosen:
    run_dir.write_text(f"coresets/{candidate.file_name}.jsonl", raw_lines(bench.parts["train"].records, candidate.rows))
  trainings = Trainings(run_dir, bench, s, chosen)
  base, groups = trainings.base_losses(), []
  for number, equal in enumerate(plan.equal):
    rows = {}
    for place, candidate in enumerate(chosen):
      label = f"train {number * len(chosen) + place + 1}/{len(plan.equal) * len(chosen)}: {candidate}"
      rows[candidate.name] = trainings.row(candidate, equal_steps(bench, s, candidate.rows, equal), label)
    for fraction in plan.fractions or (None,):
      ours = [rows[candidate.name] for candidate in chosen if candidate.fraction in (None, fraction)]
      groups.append(Group(equal, fraction, ours))
  return write_tables(run_dir, bench, s, groups, base)


@dataclasses.dataclass(frozen=True)
class Group:
  """Trainings that are compared with each other.

  Attributes:
    equal: what they have in common, a word of `EQUAL`.
    fraction: share of the training examples that the policies kept; None where there is one budget.
    rows: of all candidates, full data among them.
  """

  equal: str
  fraction: float | None
  rows: list[evaluation.RetrainRow]

  @property
  def title(self) -> str:
    """In words."""
    share = "" if self.fraction is None else f", {self.fraction:.3g} of the examples"
    return f"equal {self.equal}{share}"

  def table(self) -> list[dict]:
    """A dictionary for each policy: the group, then what `verdict.summarise` says."""
    return [{"equal": self.equal, "fraction": self.fraction} | row for row in verdict.summarise(self.rows)]


def write_tables(run_dir, bench: Workbench, s: Settings, groups: list[Group], base: np.ndarray) -> str:
  """The tables as Markdown, CSV, LaTeX and JSON, verdicts, plots; evaluation.json comes last."""
  test = bench.parts["test"]
  counted = test.num_response_tokens > 0
  tokens = test.num_response_tokens[counted]
  base_perplexity = perplexity_on_test(bench, base)
  tables = [group.table() for group in groups]
  verdicts = [verdict.verdict(group.rows) for group in groups]
  compared = {group.title if len(groups) > 1 else "": group.rows for group in groups}
  notes = [note for group in groups for note in many_passes(group.equal, group.rows, s.batch_size)]
  notes += [*verdict.many_comparisons(compared), *verdict.sensitivity(list(compared.values()))]
  notes += filter(None, [test_examples(test).about])
  recipe = {
    "base model's test perplexity": f"{base_perplexity:.3f}",
    "test examples": int(counted.sum()),
    "test response tokens": int(tokens.sum()),
    "trained": f"{s.trainable}, layers {s.trainable_layers}, {s.trainable_modules}",
    "learning rate": s.learning_rate,
    "batch size": s.batch_size,
    "steps of full data": recipe_of(s, len(trainable_rows(bench))).steps,
  }
  many = len(groups) > 1
  sections = {
    group.title if many else "": (table, words) for group, table, words in zip(groups, tables, verdicts, strict=True)
  }
  images = _write_plots(run_dir, groups, tables)
  every = [row for table in tables for row in table]
  printed = report.retrain_rows(every)
  page = report.retrain_report_markdown(sections, recipe, images, notes=notes, overviews=overviews(groups, tables))
  run_dir.write_text("evaluation.md", page)
  run_dir.write_text("evaluation.csv", report.csv_table(every))
  run_dir.write_text("evaluation.tex", report.latex_table(printed))
  lines = [
    f"{group.title}: {line}" if many else line
    for group, words in zip(groups, verdicts, strict=True)
    for line in words.splitlines()
  ]
  found = {"base_perplexity": base_perplexity, "table": every, "verdict": lines + notes, "recipe": recipe}
  _write_reports(run_dir, bench, s, found)
  run_dir.write_json("evaluation.json", found | {"devices": artifacts.device_summary()})
  log.info("\n%s\n%s", report.markdown_table(printed), "" if many else "\n".join(found["verdict"]))
  return str(run_dir.path)


def overviews(groups: list[Group], tables: list[list[dict]]) -> dict[str, list[dict]]:
  """Title -> a row for each policy, its perplexity at every budget of a sweep; empty where there is one budget."""
  found = {}
  for group, table in zip(groups, tables, strict=True):
    if group.fraction is None:
      continue
    lines = found.setdefault(f"test perplexity by token at equal {group.equal}, by share of the examples", {})
    for row in table:
      share = f"{100 * group.fraction:.3g} %"
      lines.setdefault(row["policy"], {"policy": row["policy"]})[share] = f"{row['perplexity']:.3f}"
  return {title: list(lines.values()) for title, lines in found.items()}


def _write_plots(run_dir, groups: list[Group], tables: list[list[dict]]) -> dict[str, str]:
  """Pictures, as PNG and SVG; {caption: PNG file}. A sweep has a curve for what is equal, else a picture a group."""
  figures = {}
  if groups[0].fraction is not None:
    for equal in dict.fromkeys(group.equal for group in groups):
      rows = [row for table in tables for row in table if row["equal"] == equal]
      figures[f"Test perplexity at equal {equal}"] = (f"sweep-{equal}", report.sweep_plot(rows))
  else:
    for group, table in zip(groups, tables, strict=True):
      name = "perplexity" if len(groups) == 1 else f"perplexity-{group.equal}"
      figures[f"Test perplexity at equal {group.equal}"] = (name, report.perplexity_plot(table))
  for name, figure in figures.values():
    write_figure(run_dir, name, figure)
  return {caption: f"plots/{name}.png" for caption, (name, _) in figures.items()}


def _write_reports(run_dir, bench: Workbench, s: Settings, found: dict) -> None:
  """The select runs' reports once more, with the table of this comparison."""
  if not run_dir.writer:
    return
  folders = listed(s.select_runs)
  for name, folder in zip(report_names(folders), folders, strict=True):
    selected = report_facts.SelectRun.load(folder, bench.parts["train"], bench.parts["eval"], found)
    run_dir.write_text(name, report_html.select_page(selected))


def report_names(folders: list[str]) -> list[str]:
  """A file name for each select run's report: by the folder's own name, numbered where several end alike."""
  found: list[str] = []
  for folder in folders:
    own = epath.Path(folder).name
    free = (f"report-{own}{f'-{count}' if count > 1 else ''}.html" for count in itertools.count(1))
    found.append(next(name for name in free if name not in found))
  return found


def main(_) -> None:
  """Entry point."""
  settings = flags.read(tells_costs=True)
  if settings.dry_run:
    dry_run.run(settings, "evaluate")
  else:
    run(settings)


if __name__ == "__main__":
  flags.define(run_dir="runs/evaluate")
  cli.run(main)
