"""The public functions: the stages as calls that take settings and give back what they found.

    import in2core_jax as i2c

    settings = i2c.Settings(train_data="jsonl:mine.jsonl", layers="last:4", trainable_layers="last:4")
    tuned = i2c.finetune(settings, run_dir="runs/mine/finetune")
    chosen = i2c.select(settings, run_dir="runs/mine/select", checkpoint=tuned.checkpoint)
    judged = i2c.evaluate(settings, run_dir="runs/mine/evaluate", select_runs=[chosen])

The same functions stand behind the commands, and a run folder is the same whichever made it: a call with the settings
of a finished run reads what is there. Nothing here knows flags, and a mistake of the caller's is a `UserError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import pyarrow as pa

from in2core_jax.errors import UserError, how_many
from in2core_jax.pipeline import evaluate as stage_evaluate
from in2core_jax.pipeline import finetune as stage_finetune
from in2core_jax.pipeline import select as stage_select
from in2core_jax.pipeline.fields import in_parameters
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.recommendation import results as recommendation_results
from in2core_jax.recommendation import run as stage_recommend
from in2core_jax.recommendation.settings import RecommendSettings
from in2core_jax.report import recommendation_page
from in2core_jax.report.table_text import markdown_table
from in2core_jax.runs.run_folder import CHECKPOINT, RunDir

_SHOWN = 10  # rows of a table that a result prints


@dataclasses.dataclass(frozen=True)
class _Result:
  """What a stage left in its run folder.

  Attributes:
    run_dir: the folder.
    summary: facts of the run, as its JSON file has them.
  """

  run_dir: pathlib.Path
  summary: Mapping[str, Any] = dataclasses.field(repr=False)

  title: ClassVar[str]
  kind: ClassVar[type[Settings]] = Settings  # whose flags its texts name

  def _facts(self) -> dict[str, Any]:
    return {}

  def _rows(self) -> list[dict]:
    return []

  def _notes(self) -> Sequence[str]:
    return ()

  def __repr__(self) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in self._facts().items())
    parts = [f"{self.title} in {self.run_dir}: {facts}"]
    if self._rows():
      parts.append(markdown_table(self._rows()).rstrip())
    return "\n".join([*parts, *(_in_words(note, self.kind) for note in self._notes())])

  def _repr_html_(self) -> str:
    """For notebooks; texts of the data set are escaped."""
    text = lambda value: html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))  # noqa: E731
    facts = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in self._facts().items())
    found = f"<p><b>{text(self.title)}</b> in <code>{text(self.run_dir)}</code></p><table>{facts}</table>"
    if rows := self._rows():
      head = "".join(f"<th>{text(name)}</th>" for name in rows[0])
      body = "".join(f"<tr>{''.join(f'<td>{text(value)}</td>' for value in row.values())}</tr>" for row in rows)
      found += f"<table><tr>{head}</tr>{body}</table>"
    return found + "".join(f"<p>{text(_in_words(note, self.kind))}</p>" for note in self._notes())


@dataclasses.dataclass(frozen=True, repr=False)
class Finetuned(_Result):
  """A fine-tuned model.

  Attributes:
    checkpoint: folder of the checkpoint, for `select(settings, checkpoint=...)`.
  """

  checkpoint: pathlib.Path

  title: ClassVar[str] = "Fine-tuned model"

  def _facts(self) -> dict[str, Any]:
    return {name: self.summary[name] for name in ("steps", "examples", "first_loss", "last_loss", "seconds")}


@dataclasses.dataclass(frozen=True, repr=False)
class Selected(_Result):
  """A selection.

  Attributes:
    scores: a row for each training example in source order: example_id, influence, rank, selected, loss, num_tokens,
      num_response_tokens, topic, choice (1 = chosen first, 0 = left out), reason (docs: files and columns).
    coreset: JSON lines of the chosen examples, each as it was read.
    warnings: what to mind, in whole sentences.
  """

  scores: pa.Table
  coreset: pathlib.Path
  warnings: tuple[str, ...]

  title: ClassVar[str] = "Selection"

  @property
  def ids(self) -> list[str]:
    """The chosen examples' ids, in source order."""
    return self.scores.filter(self.scores["selected"])["example_id"].to_pylist()

  def _facts(self) -> dict[str, Any]:
    kept, size = self.summary["selected"], self.scores.num_rows
    return {"policy": self.summary["policy"], "selected": f"{kept:,} of {how_many(size, 'example')}"}

  def _rows(self) -> list[dict]:
    names = ("choice", "example_id", "reason", "influence", "loss")
    names = [name for name in names if name in self.scores.column_names]  # an older run has no order of choice
    first = self.scores.filter(self.scores["selected"]).sort_by([(names[0], "ascending")]).slice(0, _SHOWN)
    return first.select(names).to_pylist()

  def _notes(self) -> Sequence[str]:
    return self.warnings


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluated(_Result):
  """Models retrained on the compared training sets.

  Attributes:
    table: a row for each policy: perplexity on the test set by token and by example, with 95 % intervals; DPO loss and
      accuracy where the test set has preference pairs.
    verdict: what the intervals carry, in sentences.
  """

  table: pa.Table
  verdict: tuple[str, ...]

  title: ClassVar[str] = "Evaluation"

  def _facts(self) -> dict[str, Any]:
    return {"policies": self.table.num_rows, **self.summary["recipe"]}

  def _rows(self) -> list[dict]:
    names = ("policy", "seeds", "examples", "steps", "perplexity", "loss", "accuracy")  # the last two of pairs
    names = [name for name in names if name in self.table.column_names]
    return self.table.select(names).to_pylist()

  def _notes(self) -> Sequence[str]:
    return tuple(dict.fromkeys([*self.summary.get("warnings", ()), *self.verdict]))


@dataclasses.dataclass(frozen=True, repr=False)
class Recommended(_Result):
  """What to train on, of a trial on the data at hand.

  Attributes:
    sentence: the answer: which examples, how many, what they are worth.
    rule: that chooses them: random, full or the name of a rule.
    budget: share of the training set.
    coreset: JSON lines of the examples, each as it was read.
    table: a row for each candidate: rule, budget, seeds, ratios with corrected intervals (`summary` has all).
  """

  sentence: str
  rule: str
  budget: float
  coreset: pathlib.Path
  table: pa.Table

  title: ClassVar[str] = "Recommendation"
  kind: ClassVar[type[Settings]] = RecommendSettings

  def _facts(self) -> dict[str, Any]:
    return {"rule": self.rule, "examples": self.summary["examples"], "minutes": self.summary["minutes"]}

  def _rows(self) -> list[dict]:
    names = ("rule", "budget", "examples", "ratio_to_random", "ratio_to_full")
    return self.table.select(names).to_pylist()

  def _notes(self) -> Sequence[str]:
    found = self.summary
    return (found["sentence"], found["checked"], found["to_know_more"]["sentence"], *found["warnings"])


def finetune(settings: Settings | None = None, *, session: Session | None = None, **changes: Any) -> Finetuned:
  """Fine-tunes on the training set; a training that was cut off goes on.

  Args:
    settings: of the run; those of `Settings()` when None.
    session: data and model that an earlier call has loaded, of the same settings of both.
    **changes: settings that are other ones here, such as `run_dir="runs/mine"`.

  Raises:
    UserError: a mistake in the settings, the data or the model, with what to do about it.
  """
  s = _settled(settings, changes)
  with _in_parameters():
    checkpoint = pathlib.Path(stage_finetune.run(s, session))
    folder = RunDir.load(checkpoint.parent)
    return Finetuned(pathlib.Path(folder.path), folder.load_json("finetune.json"), checkpoint)


def select(settings: Settings | None = None, *, session: Session | None = None, **changes: Any) -> Selected:
  """Scores every training example and chooses a coreset.

  Args and errors: as `finetune`. `checkpoint` is where influence is measured; without one at the base model.
  """
  s = _settled(settings, changes)
  with _in_parameters():
    return _read_selected(stage_select.run(s, session))


def evaluate(
  settings: Settings | None = None,
  *,
  select_runs: Sequence[Selected | str] | str = (),
  session: Session | None = None,
  **changes: Any,
) -> Evaluated:
  """Retrains on each chosen set and on those of other policies, and compares perplexity on the test set.

  Args and errors: as `finetune`.
    select_runs: results of `select`, or their run folders.
  """
  runs = [select_runs] if isinstance(select_runs, str) else select_runs
  folders = ",".join(str(run.run_dir) if isinstance(run, Selected) else str(run) for run in runs)
  s = _settled(settings, changes | ({"select_runs": folders} if folders else {}))
  with _in_parameters():
    return _read_evaluated(stage_evaluate.run(s, session))


def recommend(settings: Settings | None = None, *, session: Session | None = None, **changes: Any) -> Recommended:
  """Tries the rules on the data at hand and says which examples to train on, how many, and whether it is as good.

  Args and errors: as `finetune`. `minutes` is the most that it may take, `rules` and `fractions` are what is tried,
  `budget` is the most that the answer may have. Some settings have defaults of their own (`RecommendSettings`): they
  give way to those that differ from `Settings()`.
  """
  given = settings or Settings()
  set_ = {field.name: getattr(given, field.name) for field in dataclasses.fields(given) if given.is_set(field.name)}
  own = given if isinstance(given, RecommendSettings) else _settled(RecommendSettings(), set_)
  s = _settled(own, changes)
  with _in_parameters(RecommendSettings):
    return _read_recommended(stage_recommend.run(s, session))


def load(run_dir: str | pathlib.Path) -> Finetuned | Selected | Evaluated | Recommended:
  """What a finished run folder of `finetune`, `select`, `evaluate` or `recommend` holds.

  Raises:
    UserError: no run folder, or one that is not finished.
  """
  folder = RunDir.load(str(run_dir))
  stage = folder.identity.get("stage")
  files = {"finetune": "finetune.json", "select": "summary.json", "evaluate": "evaluation.json"}
  files |= {"recommend": recommendation_results.FILE}
  if stage not in files:
    raise UserError(f"{run_dir} is of the stage {stage!r}; load reads {', '.join(files)}")
  if not folder.is_whole(files[stage]):
    raise UserError(f"{run_dir} is not finished: start the same call, or the same command, again")
  if stage == "select":
    return _read_selected(str(run_dir))
  if stage == "evaluate":
    return _read_evaluated(str(run_dir))
  if stage == "recommend":
    return _read_recommended(str(run_dir))
  path = pathlib.Path(folder.path)
  return Finetuned(path, folder.load_json("finetune.json"), path / CHECKPOINT)


def _read_selected(path: str) -> Selected:
  folder = RunDir.load(path)
  summary = folder.load_json("summary.json")
  here = pathlib.Path(folder.path)
  columns = pa.table(folder.read_parquet("scores.parquet"))
  return Selected(here, summary, columns, here / "coreset.jsonl", tuple(summary["warnings"]))


def _read_evaluated(path: str) -> Evaluated:
  folder = RunDir.load(path)
  found = folder.load_json("evaluation.json")
  return Evaluated(pathlib.Path(folder.path), found, pa.Table.from_pylist(found["table"]), tuple(found["verdict"]))


def _read_recommended(path: str) -> Recommended:
  folder = RunDir.load(path)
  found, here = folder.load_json(recommendation_results.FILE), pathlib.Path(folder.path)
  shown = recommendation_page.shown
  ratios = ("ratio_to_random", "ratio_to_full")
  rows = [
    {name: row[name] for name in ("rule", "budget", "examples", "steps", "seeds")}
    | {name: shown(row[name]["example"]) for name in ratios}
    for row in found["candidates"]
  ]
  answer = found["sentence"], found["rule"], found["budget"]
  return Recommended(here, found, *answer, here / "coreset.jsonl", pa.Table.from_pylist(rows))


# ---- settings --------------------------------------------------------------------------

S = TypeVar("S", bound=Settings)


def _settled(settings: S | None, changes: Mapping[str, Any]) -> S:
  """Settings with changes; paths become texts.

  Raises:
    UserError: a name that is no setting.
  """
  settings = settings or Settings()
  known = {field.name for field in dataclasses.fields(settings)}
  unknown = sorted(set(changes) - known)
  if unknown:
    raise UserError(f"{unknown[0]} is no setting; those that there are: help(in2core_jax.{type(settings).__name__})")
  texts = {name: str(value) if isinstance(value, pathlib.PurePath) else value for name, value in changes.items()}
  with _in_parameters(type(settings)):
    return settings.replace(**texts)


def _in_words(text: str, kind: type[Settings] = Settings) -> str:
  """A text that names flags, in the words of a caller: `--run_dir=x` becomes `run_dir=x`."""
  return in_parameters(text, kind)


@contextlib.contextmanager
def _in_parameters(kind: type[Settings] = Settings) -> Iterator[None]:
  """Errors name parameters here, where the command line names flags."""
  try:
    yield
  except UserError as error:
    raise UserError(_in_words(str(error), kind)) from None  # the line says it all
