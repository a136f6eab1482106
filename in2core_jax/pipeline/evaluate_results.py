"""What an evaluation writes."""

import dataclasses
import itertools
import logging

import numpy as np
from etils import epath

from in2core_jax.evaluation import statistics, verdict
from in2core_jax.pipeline.advice import tell
from in2core_jax.pipeline.finetune import recipe_of, trainable_rows
from in2core_jax.pipeline.judging import test_examples, too_small
from in2core_jax.pipeline.retraining import many_passes, perplexity_on_test
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings, listed
from in2core_jax.report import answer, facts, findings, html_page, table_text
from in2core_jax.report.markdown import retrain_report_markdown, retrain_rows
from in2core_jax.report.plots import perplexity_plot, sweep_plot, write_figure
from in2core_jax.runs import run_folder

log = logging.getLogger(__name__)


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
  rows: list[statistics.RetrainRow]

  @property
  def title(self) -> str:
    """In words."""
    share = "" if self.fraction is None else f", {self.fraction:.3g} of the examples"
    return f"equal {self.equal}{share}"

  def table(self) -> list[dict]:
    """A dictionary for each policy: the group, then what `verdict.summarise` says."""
    return [{"equal": self.equal, "fraction": self.fraction} | row for row in verdict.summarise(self.rows)]


def write_tables(run_dir, session: Session, s: Settings, groups: list[Group], base: np.ndarray) -> str:
  """The tables as Markdown, CSV, LaTeX and JSON, verdicts, plots; evaluation.json comes last."""
  test = session.splits["test"]
  base_perplexity = perplexity_on_test(session, base)
  tables = [group.table() for group in groups]
  verdicts = [verdict.verdict(group.rows) for group in groups]
  many = len(groups) > 1
  titles = [group.title if many else "" for group in groups]
  compared = dict(zip(titles, (group.rows for group in groups), strict=True))
  notes = [note for group in groups for note in many_passes(group.equal, group.rows, s.batch_size)]
  risky = [*run_dir.read_json("candidates.json")["warnings"], *too_small(test), *notes]
  notes += [*verdict.many_comparisons(compared), *verdict.sensitivity(list(compared.values()))]
  notes += filter(None, [test_examples(test).about])
  recipe = _recipe(session, s, base_perplexity)
  images = _write_plots(run_dir, groups, tables)
  every = [row for table in tables for row in table]
  printed = retrain_rows(every)
  run_dir.write_text("evaluation.csv", table_text.csv_table(every))
  run_dir.write_text("evaluation.tex", table_text.latex_table(printed))
  lines = [
    f"{title}: {line}" if many else line
    for title, words in zip(titles, verdicts, strict=True)
    for line in words.splitlines()
  ]
  found = {"base_perplexity": base_perplexity, "table": every, "verdict": lines + notes, "recipe": recipe}
  found["warnings"] = list(map(findings.as_line, risky))
  runs = _selections(session, s, found)
  told = _gathered(found["warnings"], runs)
  notes = [note for note in notes if findings.as_line(note) not in told]
  sections = dict(zip(titles, zip(tables, verdicts, strict=True), strict=True))
  sweep = overviews(groups, tables)
  page = retrain_report_markdown(sections, recipe, images, notes=notes, overviews=sweep, warnings=told)
  run_dir.write_text("evaluation.md", page)
  if run_dir.writer:
    for name, run in runs.items():
      run_dir.write_text(name, html_page.select_page(run))
  run_dir.write_json("evaluation.json", found | {"devices": run_folder.device_summary()})
  said = [line for line in found["verdict"] if findings.as_line(line) not in told]
  log.info("\n%s\n%s", table_text.markdown_table(printed), "" if many else "\n".join(said))
  tell(told, too_small(test))
  for name, run in runs.items():
    log.info("%s: %s", name, answer.answer(run))
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
      figures[f"Test perplexity at equal {equal}"] = (f"sweep-{equal}", sweep_plot(rows))
  else:
    for group, table in zip(groups, tables, strict=True):
      name = "perplexity" if len(groups) == 1 else f"perplexity-{group.equal}"
      figures[f"Test perplexity at equal {group.equal}"] = (name, perplexity_plot(table))
  for name, figure in figures.values():
    write_figure(run_dir, name, figure)
  return {caption: f"plots/{name}.png" for caption, (name, _) in figures.items()}


def _recipe(session: Session, s: Settings, base_perplexity: float) -> dict:
  """What all trainings have in common, for the reports."""
  tokens = session.splits["test"].num_response_tokens
  return {
    "base model's test perplexity": f"{base_perplexity:.3f}",
    "test examples": int(np.count_nonzero(tokens)),
    "test response tokens": int(tokens.sum()),
    "trained": f"{s.trainable}, layers {s.trainable_layers}, {s.trainable_modules}",
    "learning rate": s.learning_rate,
    "batch size": s.batch_size,
    "steps of full data": recipe_of(s, len(trainable_rows(session))).steps,
  }


def _selections(session: Session, s: Settings, found: dict) -> dict[str, facts.SelectRun]:
  """The select runs with the table of this comparison, by the name of the report of each."""
  folders, runs = listed(s.select_runs), {}
  names = {row["policy"] for row in found["table"]}
  for name, folder in zip(report_names(folders), folders, strict=True):
    run = facts.SelectRun.load(folder, session.splits["train"], session.splits["eval"], found)
    policy = run.summary["policy"]
    own = policy if policy in names else f"{policy} ({epath.Path(folder).name})"  # as `compared.plan_of` calls it
    runs[name] = dataclasses.replace(run, retrain=found | {"candidate": own})
  return runs


def _gathered(own: list[str], runs: dict[str, facts.SelectRun]) -> list[str]:
  """The warnings of the comparison and of the select runs, each once; of several runs with the name of the report."""
  lines = list(own)
  for name, run in runs.items():
    lines += [line if len(runs) == 1 else f"{name}: {line}" for line in findings.warnings(run) if line not in own]
  return list(dict.fromkeys(lines))


def report_names(folders: list[str]) -> list[str]:
  """A file name for each select run's report: by the folder's own name, numbered where several end alike."""
  found: list[str] = []
  for folder in folders:
    own = epath.Path(folder).name
    free = (f"report-{own}{f'-{count}' if count > 1 else ''}.html" for count in itertools.count(1))
    found.append(next(name for name in free if name not in found))
  return found
