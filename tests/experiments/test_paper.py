"""All experiments in one command, with tiny programs in their place: commands, notes, resuming, publishing."""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import sys
import time
import types

import pytest
from absl import flags as absl_flags

from experiments import flags
from experiments.paper import job, paper, results
from experiments.paper.job import Job
from experiments.paper.settings import HOW_FAST, PASSED, PaperSettings
from experiments.paper.steps import STEPS, Step
from in2core_jax.data import tokenizing
from in2core_jax.errors import UserError
from in2core_jax.evaluation import coverage
from in2core_jax.pipeline import session as sessions
from in2core_jax.runs import run_folder, stopping

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Stands for an experiment: counts its starts, keeps a file from start to start, writes a table and its devices; refuses
# a folder of another mark.
CHILD = """
import json, pathlib, shutil, sys
folder, code, kind, mark = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if "--overwrite" in sys.argv: shutil.rmtree(folder, ignore_errors=True)
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file: file.write(mark)
manifest = folder / "manifest.json"
if manifest.exists() and manifest.read_text() != json.dumps(mark): sys.exit(2)
if code: sys.exit(code)
manifest.write_text(json.dumps(mark))
(folder / "table.md").write_text(f"# Results in {folder}\\n\\n![a](plots/a.png)\\n")
(folder / f"{mark}.csv").write_text("a\\n1\\n")
(folder / "plots").mkdir(exist_ok=True)
(folder / "plots" / "a.svg").write_text("<svg/>")
devices = {"platform": "cpu" if kind == "cpu" else "gpu", "device_kind": kind, "num_devices": 8}
(folder / "table.json").write_text(json.dumps({"devices": devices}))
"""


class Made:
  """A folder of runs and results, and how the experiments behave that are started there."""

  def __init__(self, folder, monkeypatch):
    self.flagfile, self.alpaca = folder / "own.flags", folder / "alpaca.json"
    monkeypatch.setattr(job, "FLAGS", folder)
    whole = lambda path: types.SimpleNamespace(is_whole=lambda mark: (path / mark).exists())  # noqa: E731
    monkeypatch.setattr(run_folder.RunDir, "load", whole)
    self.flagfile.write_text("--train_limit=5\n")
    self.write_alpaca("answer")
    self.settings = PaperSettings(
      run_dir=str(folder / "runs"), results_dir=str(folder / "results"), alpaca=str(self.alpaca)
    )
    self.codes, self.kind, self.mark, self.started = {}, "cpu", "x", []
    steps = (
      Step("first", "select", "table", "own.flags", "scores"),
      Step("second", "evaluate", "table", "own.flags", "sweep", ("--select_runs={runs}/first",)),
      Step("third", "study", "table", "own.flags", "Alpaca", ("--train_data=jsonl:{alpaca}",)),
    )
    monkeypatch.setattr(paper, "STEPS", steps)
    monkeypatch.setattr(Job, "command", lambda each, anew=False: self._command(each, anew))
    monkeypatch.setattr(job, "commit", lambda: "abc")

  def write_alpaca(self, answer):
    self.alpaca.write_text(json.dumps([{"instruction": "a question", "input": "", "output": answer}]))

  def _command(self, each, anew):
    self.started.append(each.step.name)
    own = [str(each.folder), str(self.codes.get(each.step.name, 0)), self.kind, self.mark]
    return [sys.executable, "-S", "-c", CHILD, *own, *(["--overwrite"] if anew else [])]

  def run(self, named=None, **changes):
    """(exit code, names of the experiments that were started)."""
    self.started.clear()
    code = paper.run(self.settings.replace(**changes), changes if named is None else named)
    return code, list(self.started)

  def starts(self, name):
    return (pathlib.Path(self.settings.run_dir) / name / "starts").read_text()

  def note(self, name):
    return job.read_note(pathlib.Path(self.settings.run_dir) / name)

  def page(self, name):
    return (pathlib.Path(self.settings.results_dir) / "quick" / name).read_text()


@pytest.fixture
def made(tmp_path, monkeypatch):
  return Made(tmp_path, monkeypatch)


ALL = ["first", "second", "third"]


# ---- what is run again ---------------------------------------------------------------


def test_finished_steps_are_kept_while_their_commands_are_the_same(made, caplog):
  assert made.run() == (0, ALL)
  pages = [made.page(f"{name}/table.md") for name in ALL]
  with caplog.at_level("INFO"):
    assert made.run() == (0, [])
  assert "=== 3 of 3: third, Alpaca" in caplog.text and "third is finished already" in caplog.text
  assert [made.page(f"{name}/table.md") for name in ALL] == pages
  moved = made.alpaca.with_name("elsewhere.json")
  made.alpaca.rename(moved)
  assert made.run(alpaca=str(moved)) == (0, [])  # the content is the same
  assert made.run(alpaca=str(moved), mesh="data:8", microbatch=2) == (0, [])  # how fast is no other command


@pytest.mark.parametrize("changes", [{"seed": 3}, {"dtype": "bfloat16"}, {"model": "gemma3"}])
def test_another_command_is_left_to_the_run_folder_which_refuses_until_overwritten(made, caplog, changes):
  made.run()
  pages, note = [made.page(f"{name}/table.md") for name in ALL], made.note("third")
  made.mark = "y"  # of other settings
  assert made.run(**changes) == (1, ["first", "third"])  # the second reads the first
  assert "third failed with exit code 2" in caplog.text and "--overwrite --only=NAME starts one again" in caplog.text
  assert "second was not started: it reads first, which failed" in caplog.text
  assert [made.page(f"{name}/table.md") for name in ALL] == pages and made.note("third") == note
  assert made.run(overwrite=True, **changes) == (0, ALL)
  assert made.starts("first") == "y"  # nothing of the earlier run is left
  assert made.run(**changes) == (0, [])


def test_a_run_folder_that_goes_on_keeps_when_it_was_made(made):
  made.run()
  note = made.note("first")
  made.flagfile.write_text("--train_limit=5\n# a comment\n")
  assert made.run() == (0, ALL)
  later = made.note("first")
  assert later.pop("fingerprint") != note.pop("fingerprint") and later == note
  assert made.run() == (0, [])


def test_other_files_behind_the_flags_start_those_that_read_them(made, tmp_path):
  made.run()
  made.write_alpaca("another answer")
  assert made.run() == (0, ["third"])
  made.flagfile.write_text("--train_limit=6\n")
  assert made.run() == (0, ALL)
  folder = tmp_path / "mine"
  folder.mkdir()
  (folder / "config.json").write_text("{}")
  run = lambda: made.run(model=f"truncated:hf:{folder}:2", only="first")  # noqa: E731
  assert run() == (0, ["first"]) and run() == (0, [])
  (folder / "model.safetensors").write_bytes(b"1")
  assert run() == (0, ["first"]) and run() == (0, [])


def test_a_step_follows_the_one_whose_results_it_reads(made, monkeypatch):
  made.run()
  first, *others = paper.STEPS
  changed = dataclasses.replace(first, changes=("--fraction=0.1",))
  monkeypatch.setattr(paper, "STEPS", (changed, *others))
  assert made.run() == (0, ["first", "second"])
  assert made.run() == (0, [])


def test_only_runs_what_the_named_step_reads_first_where_it_is_not_there(made, caplog):
  with caplog.at_level("INFO"):
    assert made.run(only="second") == (0, ["first", "second"])
  assert "--only=second reads the results of first, which are not finished: first these" in caplog.text
  assert made.run(only="second") == (0, [])
  assert made.run(only="second,first", overwrite=True) == (0, ["first", "second"])  # whatever the order of the names
  assert made.run(only="second", overwrite=True) == (0, ["second"])  # what is there is not made anew
  made.codes["first"] = 3
  made.run(only="first", overwrite=True)
  made.codes.clear()
  assert made.run(only="second", overwrite=True) == (0, ["first", "second"])
  assert made.starts("first") == "xx"  # it went on: --overwrite is for the named ones
  (pathlib.Path(made.settings.run_dir) / "first" / "table.md").unlink()
  assert made.run(only="second") == (0, [])  # a finished step reads nothing


def test_steps_say_what_they_read():
  reads = {step.name: step.reads for step in STEPS if step.reads}
  assert reads == {"scores": ("tuned",), "sweep": ("tuned", "scores"), "layers": ("layers-tuned",)}
  fresh = PaperSettings(only="sweep", run_dir="nowhere")
  assert [each.step.name for each in paper.jobs_of(fresh)] == ["tuned", "scores", "sweep"]
  assert [each.step.name for each in paper.jobs_of(fresh.replace(only="layers"))] == ["layers-tuned", "layers"]


def test_a_failed_step_goes_on_with_the_same_command_and_the_others_are_not_lost(made):
  made.codes["second"] = 3
  assert made.run() == (1, ALL)
  seconds = made.note("second")["seconds"]
  assert made.run() == (1, ["second"]) and made.starts("second") == "xx"
  assert made.run(microbatch=2, only="second") == (1, ["second"]) and made.starts("second") == "xxx"
  assert made.note("second")["seconds"] > seconds > 0
  made.codes.clear()
  assert made.run() == (0, ["second"]) and made.starts("second") == "xxxx"


def test_a_note_of_an_older_version_goes_on_and_loses_nothing(made):
  made.run()
  note = made.note("first")
  del note["fingerprint"]
  note["date"] = "2026-01-01"
  (pathlib.Path(made.settings.run_dir) / "first.json").write_text(json.dumps(note | {"command": {"module": "select"}}))
  assert made.run() == (0, ["first"])
  assert made.run() == (0, []) and "2026-01-01" in made.page("first/table.md")


# ---- commands ------------------------------------------------------------------------


def parsed(arguments):
  """The flags as an experiment reads them."""
  own = absl_flags.FlagValues()
  defaults = {field.name: str(field.default) for field in flags.every_field()}
  for name in flags.names():
    absl_flags.DEFINE_string(name, defaults.get(name), "", flag_values=own)
  own(["program", *arguments])
  return {name: own[name].value for name in own}


def test_commands_get_what_was_given_and_work_alone(tmp_path):
  step = next(step for step in STEPS if step.name == "fidelity")
  given = {"mesh": "data:2", "batch_tokens": 64, "seed": 3, "boundary_cache_gb": 1.5, "model": "gemma3"}
  s = PaperSettings(run_dir=str(tmp_path), **given)
  found = parsed(Job(step, s, tuple(given)).command()[4:])
  assert [found[name] for name in ("mesh", "batch_tokens", "seed", "boundary_cache_gb", "model")] == [
    *("data:2", "64", "3", "1.5", "gemma3"),
  ]
  assert (found["num_processes"], found["run_dir"]) == ("1", str(tmp_path / "fidelity"))
  assert found["boundary_cache"] == "memory" and found["dtype"] == "float32"  # the flagfile's; the default
  full = s.replace(preset="full")
  assert parsed(Job(step, full).command()[4:])["dtype"] == "bfloat16"
  # A default that was asked for undoes a flagfile.
  assert parsed(Job(step, full, ("dtype",)).command()[4:])["dtype"] == "float32"
  assert "--overwrite" in Job(step, s).command(anew=True) and "--overwrite" not in Job(step, s).shown()
  assert set(HOW_FAST) < set(sessions._WHERE_AND_HOW_FAST)


def test_the_full_preset_means_all_data_layers_and_modules():
  found = {}
  for step in STEPS:
    s = PaperSettings(preset="full", alpaca="alpaca.json", run_dir="runs")
    found[step.name] = parsed(Job(step, s).command()[4:])
    own = found[step.name]
    assert own["max_length"] == "512"
    sized = {flag.partition("=")[0].lstrip("-"): flag.partition("=")[2] for flag in step.full}
    for name in ("train_limit", "eval_limit", "test_limit"):
      assert own[name] == sized.get(name, "0"), (step.name, name)
    assert ("train_limit" in sized) == (step.name in ("fidelity", "study-alpaca"))
    words = ("trainable_layers", "trainable_modules", "layers", "modules", "model_layers", "model_trains")
    assert {own[name] for name in words} == {"all"}, step.name
    assert own["lds_layers"].split(";")[0] == "all" and own["batch_tokens"] == "auto"
  assert found["transfer"]["score_models"].count(";") == 2  # changes of the step that are no sizes stay
  assert found["study-mixed"]["eval_topics"] == "trivia"
  # The folds fit the topics of the whole corpus.
  train, evals, _ = tokenizing.split_records(tokenizing.load_records("chatterbot"), (0.7, 0.15, 0.15))
  topics = {record.topic for record in train} & {record.topic for record in evals}
  own = found["coverage"]
  folds = coverage.deal_topics(sorted(topics), int(own["hold_out_topics"]), int(own["folds"]), 0)
  assert {topic for fold in folds for topic in fold} == topics


def test_the_published_command_is_the_one_that_ran_without_paths(made, tmp_path):
  made.run(mesh="data:8", model=f"hf:{tmp_path}/models/mine")
  (line,) = (line for line in made.page("third/table.md").splitlines() if line.startswith("`"))
  shown = line.split("`")[1]
  assert shlex.split(shown) == [
    *("python", "-m", "experiments.study", "--flagfile=experiments/flags/own.flags", "--train_data=jsonl:ALPACA.json"),
    *("--mesh=data:8", "--model=hf:mine", "--num_processes=1", "--run_dir=runs/paper/third"),
  ]
  for path in pathlib.Path(made.settings.results_dir).rglob("*.*"):
    assert str(tmp_path) not in path.read_text(), path
  assert "# Results in runs/paper/third" in made.page("third/table.md")


def test_flagfiles_of_the_project_are_shown_with_their_folder():
  step = next(step for step in STEPS if step.name == "transfer")
  shown = Job(step, PaperSettings(preset="full", batch_tokens=512), ("batch_tokens",)).shown()
  assert "--flagfile=experiments/flags/transfer.flags" in shown and "--batch_tokens=512" in shown
  assert "--flagfile=experiments/flags/paper-full.flags" in shown and str(ROOT) not in shown
  assert "'--score_models=smollm2;truncated:smollm2:15;gemma3'" in shown  # to be pasted into a shell


def test_what_cannot_go_well_is_refused_before_the_work(made):
  for named, changes, said in (
    (["epochs", "mesh"], {}, "--epochs is not passed on"),
    ([], {"run_dir": "gs://bucket/runs"}, "give a local folder"),
    ([], {"results_dir": str(made.flagfile)}, "give a local folder, which is made"),
    ([], {"results_dir": ""}, "give a local folder, which is made"),
    ([], {"alpaca": str(made.flagfile) + "x"}, "there is no such file"),
  ):
    with pytest.raises(UserError, match=said):
      made.run(named, **changes)
  assert made.started == [] and not pathlib.Path(made.settings.run_dir).exists()


# ---- notes ---------------------------------------------------------------------------


def test_machine_and_devices_are_those_of_the_run(made, monkeypatch):
  made.kind = "Accelerator 9"
  monkeypatch.setattr(job, "machine", lambda: "2 cores of here")
  made.run(only="first")
  monkeypatch.setattr(job, "machine", lambda: "4 cores of there")
  made.run(only="first")  # published once more, not run
  assert "8 x Accelerator 9, 2 cores of here, " in made.page("first/table.md") and "abc" in made.page("first/table.md")
  made.codes["second"], made.kind = 1, "cpu"
  made.run(only="second")
  made.codes.clear()
  monkeypatch.setattr(job, "machine", lambda: "6 cores")
  made.run(only="second")
  assert ", 4 cores of there, then 6 cores, " in made.page("second/table.md")


def test_a_stop_lets_the_experiment_save_and_keeps_the_seconds(made, monkeypatch, tmp_path):
  ready, saved = tmp_path / "ready", tmp_path / "saved"
  script = (
    "import pathlib, signal, sys, time\n"
    f"def save(*_): pathlib.Path({str(saved)!r}).touch(); sys.exit(143)\n"
    f"signal.signal(signal.SIGTERM, save); pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
  )
  monkeypatch.setattr(Job, "command", lambda *_: [sys.executable, "-S", "-c", script])
  monkeypatch.setattr(job, "_NOTE_SECONDS", 0.05)
  while_running = []

  def stop_when_ready(*_):
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    if ready.exists() and made.note("first").get("seconds", 0.0) > 0.2:  # noted while it runs
      signal.setitimer(signal.ITIMER_REAL, 0)
      while_running.append(made.note("first"))
      os.kill(os.getpid(), signal.SIGTERM)

  before = signal.signal(signal.SIGTERM, stopping.terminate), signal.signal(signal.SIGALRM, stop_when_ready)
  signal.setitimer(signal.ITIMER_REAL, 0.02)
  began = time.monotonic()
  try:
    with pytest.raises(stopping.Terminated):
      paper.run(made.settings)
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGALRM, before[1])
  assert time.monotonic() - began < 30 and saved.exists()
  note = made.note("first")
  assert note["seconds"] >= while_running[0]["seconds"] > 0.2 and not note["finished"]


# ---- results -------------------------------------------------------------------------


def test_the_index_tells_when_where_and_how_long(made):
  made.run()
  rows = [line for line in made.page("README.md").splitlines() if line.startswith("| ")]
  assert [word in rows[0] for word in ("date", "commit", "seconds", "machine")] == [True] * 4
  assert all("cores of" in row and made.note("first")["date"] in row for row in rows[1:]) and len(rows) == 4
  total = sum(made.note(name)["seconds"] for name in ALL)
  assert f"{total:,.0f} seconds in all" in made.page("README.md")
  linked = [row.split("](")[1].split(")")[0] for row in rows[1:]]
  assert linked == [f"{name}/table.md" for name in ALL] and all(made.page(path) for path in linked)


def test_a_failure_leaves_the_earlier_page_and_the_index_says_so(made):
  made.run()
  page = made.page("second/table.md")
  made.codes["second"] = 2
  assert made.run(dtype="bfloat16", overwrite=True) == (1, ALL)
  assert made.page("second/table.md") == page and "--dtype=bfloat16" in made.page("third/table.md")
  assert "Of an earlier run, the last one is not finished or failed: second." in made.page("README.md")


def test_nothing_finished_is_an_index_without_rows(made):
  made.codes = dict.fromkeys(ALL, 1)
  assert made.run() == (1, ["first", "third"])
  assert "0 seconds in all" in made.page("README.md")


def test_files_of_an_earlier_run_do_not_stay(made):
  made.run(only="first")
  results = pathlib.Path(made.settings.results_dir) / "quick" / "first"
  (results / "somebody's.txt").write_text("")
  made.mark = "y"
  made.run(only="first", overwrite=True)
  assert {path.name for path in results.rglob("*.*")} == {"table.md", "y.csv", "a.svg", "run.json", "somebody's.txt"}


def test_a_large_file_is_left_out_and_named(made, monkeypatch, caplog):
  monkeypatch.setattr(results, "_MOST_BYTES", 5)
  made.run(only="first")
  assert "a.svg is not published: 6 bytes, more than 5" in caplog.text
  assert not (pathlib.Path(made.settings.results_dir) / "quick" / "first" / "plots").exists()


def test_every_flag_of_paper_is_its_own_or_passed_on():
  fields = dataclasses.fields(PaperSettings)
  of_paper = {field.name for field in fields if field.metadata["group"] == "paper"}
  assert of_paper < set(paper._OWN) and set(PASSED).isdisjoint(paper._OWN)
  assert {*PASSED, *paper._OWN} <= {field.name for field in fields}
