"""All experiments in one command, with tiny programs in their place: commands, notes, resuming, publishing."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags as absl_flags
from safetensors.numpy import save_file

from experiments import flags
from experiments.paper import commands, paper, provenance, results
from experiments.paper.settings import PaperSettings
from in2core_jax.data import tokenizing
from in2core_jax.errors import UserError
from in2core_jax.evaluation import coverage
from in2core_jax.pipeline import session
from in2core_jax.runs import stopping

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Stands for an experiment: counts its starts, keeps a file from start to start, writes a table and its devices.
CHILD = """
import json, pathlib, sys
folder, code, kind, mark = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
folder.mkdir(parents=True, exist_ok=True)
(folder.parent / (folder.name + "-full")).mkdir(exist_ok=True)
with (folder / "starts").open("a") as file: file.write(mark)
if code: sys.exit(code)
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
    self.flagfile.write_text("--train_limit=5\n")
    self.write_alpaca("answer")
    self.settings = PaperSettings(
      run_dir=str(folder / "runs"), results_dir=str(folder / "results"), alpaca=str(self.alpaca)
    )
    self.codes, self.kind, self.mark, self.started = {}, "cpu", "x", []
    steps = (
      paper.Step("first", "select", "table", str(self.flagfile), "scores"),
      paper.Step("second", "evaluate", "table", str(self.flagfile), "sweep", ("--select_runs={runs}/first",)),
      paper.Step("third", "study", "table", str(self.flagfile), "Alpaca", ("--train_data=jsonl:{alpaca}",)),
    )
    monkeypatch.setattr(paper, "STEPS", steps)
    monkeypatch.setattr(paper, "command", self._command)
    monkeypatch.setattr(paper, "commit", lambda: "abc")

  def write_alpaca(self, answer):
    self.alpaca.write_text(json.dumps([{"instruction": "a question", "input": "", "output": answer}]))

  def _command(self, step, s, named=()):
    self.started.append(step.name)
    own = [str(paper.folder_of(s, step.name)), str(self.codes.get(step.name, 0)), self.kind, self.mark]
    return [sys.executable, "-S", "-c", CHILD, *own]

  def run(self, named=(), **changes):
    """(exit code, names of the experiments that were started)."""
    self.started.clear()
    code = paper.run(self.settings.replace(**changes), named)
    return code, list(self.started)

  def starts(self, name):
    return (pathlib.Path(self.settings.run_dir) / name / "starts").read_text()

  def note(self, name):
    return paper.read_note(self.settings, name)

  def page(self, name):
    return (pathlib.Path(self.settings.results_dir) / "quick" / name).read_text()


@pytest.fixture
def made(tmp_path, monkeypatch):
  return Made(tmp_path, monkeypatch)


ALL = ["first", "second", "third"]


# ---- what is run again ---------------------------------------------------------------


def test_finished_steps_are_kept_while_their_commands_are_the_same(made):
  assert made.run() == (0, ALL)
  pages = [made.page(f"{name}/table.md") for name in ALL]
  assert made.run() == (0, [])
  assert [made.page(f"{name}/table.md") for name in ALL] == pages
  moved = made.alpaca.with_name("elsewhere.json")
  made.alpaca.rename(moved)
  assert made.run(alpaca=str(moved)) == (0, [])  # the content is the same


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"seed": 3}, "--seed was not given and is '3' now"),
    ({"dtype": "bfloat16"}, "--dtype was not given and is 'bfloat16' now"),
    ({"model": "gemma3"}, "--model was not given and is 'gemma3' now"),
  ],
)
def test_another_command_starts_finished_steps_anew_and_says_why(made, caplog, changes, said):
  made.run()
  made.mark = "y"
  with caplog.at_level("INFO"):
    assert made.run(**changes) == (0, ALL)
  assert said in caplog.text and "first starts anew" in caplog.text
  assert made.starts("first") == "y"  # nothing of the earlier run is left
  assert made.run(**changes) == (0, [])


def test_a_longer_list_of_rules_goes_on_with_what_is_there(made, caplog, monkeypatch):
  more = lambda *changes: paper.Step("more", "study", "table", str(made.flagfile), "rules", changes)  # noqa: E731
  monkeypatch.setattr(paper, "STEPS", (more("--variants=matching"),))
  assert made.run() == (0, ["more"])
  made.mark = "y"
  monkeypatch.setattr(paper, "STEPS", (more("--variants=matching; longest", "--fixed_seeds=0,1"),))
  with caplog.at_level("INFO"):
    assert made.run() == (0, ["more"]) and made.run() == (0, [])
  assert made.starts("more") == "xy" and "starts anew" not in caplog.text
  assert "longest" in made.page("more/table.md")
  monkeypatch.setattr(paper, "STEPS", (more("--variants=matching", "--max_length=12"),))
  assert made.run() == (0, ["more"]) and made.starts("more") == "y"  # another number: anew


def test_more_rules_on_a_file_that_has_moved_start_anew(made, caplog, monkeypatch):
  """The run folder holds the path: it would refuse to go on, and so for good."""
  more = lambda rules: paper.Step(  # noqa: E731
    "more", "study", "table", str(made.flagfile), "rules", ("--train_data=jsonl:{alpaca}", f"--variants={rules}")
  )
  monkeypatch.setattr(paper, "STEPS", (more("matching"),))
  assert made.run() == (0, ["more"])
  moved = made.alpaca.with_name("elsewhere.json")
  made.alpaca.rename(moved)
  assert made.run(alpaca=str(moved)) == (0, [])
  monkeypatch.setattr(paper, "STEPS", (more("matching; longest"),))
  made.mark = "y"
  assert made.run(alpaca=str(moved)) == (0, ["more"]) and made.starts("more") == "y"
  assert "more starts anew" in caplog.text and "--alpaca was" in caplog.text


def test_other_weights_under_the_same_name_start_anew(made, caplog, tmp_path):
  folder = tmp_path / "mine"
  folder.mkdir()
  (folder / "config.json").write_text("{}")
  (folder / "tokenizer.json").write_text("{}")
  write = lambda value: save_file({"a": np.full(9, value, "f4")}, folder / "model.safetensors")  # noqa: E731
  write(1)
  run = lambda: made.run(model=f"truncated:hf:{folder}:2", only="first")  # noqa: E731
  assert run() == (0, ["first"]) and run() == (0, [])
  write(1)  # a copy
  assert run() == (0, [])
  write(2)
  assert run() == (0, ["first"]) and "the content of --model changed" in caplog.text
  (folder / "tokenizer.json").write_text("[]")
  assert run() == (0, ["first"])
  # A note of an older version does not know the content, and a model that is gone removes no results.
  note = made.note("first")
  content = note["command"].pop("content of --model")
  (pathlib.Path(made.settings.run_dir) / "first.json").write_text(json.dumps(note))
  assert run() == (0, [])
  note["command"]["content of --model"] = content
  (pathlib.Path(made.settings.run_dir) / "first.json").write_text(json.dumps(note))
  (folder / "config.json").unlink()
  assert run() == (0, [])
  file = tmp_path / "mine.gguf"
  file.write_bytes(b"1")
  first = commands.model_content(f"gguf:{file}")
  file.write_bytes(b"22")
  assert first and commands.model_content(f"gguf:{file}") != first and commands.model_content("smollm2") == ""


def test_how_fast_is_no_other_command(made):
  made.run()
  assert made.run(mesh="data:8", microbatch=2) == (0, [])


def test_another_flagfile_or_alpaca_file_starts_those_that_read_it(made, caplog):
  made.run()
  made.write_alpaca("another answer")
  assert made.run() == (0, ["third"])
  assert "the content of --alpaca changed" in caplog.text
  made.flagfile.write_text("--train_limit=6\n")
  assert made.run() == (0, ALL)
  assert "the content of own.flags changed" in caplog.text


def test_a_step_follows_the_one_whose_results_it_reads(made, monkeypatch):
  made.run()
  first, *others = paper.STEPS
  changed = paper.dataclasses.replace(first, changes=("--fraction=0.1",))
  monkeypatch.setattr(paper, "STEPS", (changed, *others))
  assert made.run() == (0, ["first", "second"])
  assert made.run() == (0, [])


def test_only_runs_what_the_named_step_reads_first_where_it_is_not_there(made, caplog):
  with caplog.at_level("INFO"):
    assert made.run(only="second") == (0, ["first", "second"])
  assert "for --only=second the results of first are read, not all there yet: first these" in caplog.text
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
  reads = {step.name: step.reads for step in paper.STEPS if step.reads}
  assert reads == {"scores": ("tuned",), "sweep": ("tuned", "scores"), "layers": ("layers-tuned",)}
  fresh = PaperSettings(only="sweep", run_dir="nowhere")
  assert [step.name for step in paper.steps_of(fresh)] == ["tuned", "scores", "sweep"]
  assert [step.name for step in paper.steps_of(fresh.replace(only="layers"))] == ["layers-tuned", "layers"]


def test_a_failed_step_goes_on_with_the_same_command_and_at_another_speed(made):
  made.codes["second"] = 3
  assert made.run() == (1, ALL)  # the others are not lost
  seconds = made.note("second")["seconds"]
  assert made.run() == (1, ["second"]) and made.starts("second") == "xx"
  assert made.run(microbatch=2, only="second") == (1, ["second"]) and made.starts("second") == "xxx"
  assert made.note("second")["seconds"] > seconds > 0
  made.codes.clear()
  assert made.run(microbatch=2, dtype="bfloat16", only="second") == (0, ["second"])
  assert made.starts("second") == "x"  # other numbers: anew


def test_a_removal_that_was_cut_off_is_done_again(made):
  made.run()
  paper.clear(made.settings, paper.STEPS[0])
  (pathlib.Path(made.settings.run_dir) / "first").mkdir()
  (pathlib.Path(made.settings.run_dir) / "first" / "starts").write_text("rest")
  assert made.run() == (0, ["first"]) and made.starts("first") == "x"


def test_a_note_of_an_older_version_removes_nothing(made):
  made.run()
  note = made.note("first")
  del note["command"]
  (pathlib.Path(made.settings.run_dir) / "first.json").write_text(json.dumps(note))
  assert made.run() == (0, ["first"]) and made.starts("first") == "xx"
  assert made.run() == (0, [])


def test_overwrite_starts_anew_what_it_names(made):
  made.run()
  runs = pathlib.Path(made.settings.run_dir)
  (runs / "third-full" / "old").write_text("")
  (runs / "first-full" / "old").write_text("")
  assert made.run(overwrite=True, only="third") == (0, ["third"])
  assert made.starts("third") == "x" and not (runs / "third-full" / "old").exists()
  assert (runs / "first-full" / "old").exists()
  assert made.run(overwrite=True) == (0, ALL)
  assert made.starts("first") == "x" and not (runs / "first-full" / "old").exists()
  with pytest.raises(UserError, match="preset is 'quick' there and 'full' now.*without --only"):
    made.run(overwrite=True, only="third", preset="full")


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
  step = next(step for step in paper.STEPS if step.name == "fidelity")
  s = PaperSettings(
    run_dir=str(tmp_path), mesh="data:2", batch_tokens=64, seed=3, boundary_cache_gb=1.5, model="gemma3"
  )
  found = parsed(paper.command(step, s)[4:])
  assert [found[name] for name in ("mesh", "batch_tokens", "seed", "boundary_cache_gb", "model")] == [
    *("data:2", "64", "3", "1.5", "gemma3"),
  ]
  assert (found["num_processes"], found["run_dir"]) == ("1", str(tmp_path / "fidelity"))
  assert found["boundary_cache"] == "memory" and found["dtype"] == "float32"  # the flagfile's; the default
  full = s.replace(preset="full")
  assert parsed(paper.command(step, full)[4:])["dtype"] == "bfloat16"
  # A default that was asked for undoes a flagfile, and is not said where there is nothing to undo.
  assert commands.given(step, PaperSettings(), ("boundary_cache", "dtype", "seed")) == ["--boundary_cache=auto"]
  assert parsed(paper.command(step, full, ("dtype",))[4:])["dtype"] == "float32"
  assert set(paper.HOW_FAST) < set(session._WHERE_AND_HOW_FAST)


def test_the_full_preset_means_all_data_layers_and_modules():
  found = {}
  for step in paper.STEPS:
    s = PaperSettings(preset="full", alpaca="alpaca.json", run_dir="runs")
    found[step.name] = parsed(paper.command(step, s)[4:])
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
    *("python", "-m", "experiments.study", "--flagfile=own.flags", "--train_data=jsonl:ALPACA.json"),
    *("--mesh=data:8", "--model=hf:mine", "--num_processes=1", "--run_dir=runs/paper/third"),
  ]
  for path in pathlib.Path(made.settings.results_dir).rglob("*.*"):
    assert str(tmp_path) not in path.read_text(), path
  assert "# Results in runs/paper/third" in made.page("third/table.md")


def test_flagfiles_of_the_project_are_shown_with_their_folder():
  step = next(step for step in paper.STEPS if step.name == "transfer")
  shown = commands.shown_command(step, PaperSettings(preset="full", batch_tokens=512))
  assert "--flagfile=experiments/flags/transfer.flags" in shown and "--batch_tokens=512" in shown
  assert "--flagfile=experiments/flags/paper-full.flags" in shown and str(ROOT) not in shown
  assert "'--score_models=smollm2;truncated:smollm2:15;gemma3'" in shown  # to be pasted into a shell


def test_what_cannot_go_well_is_refused_before_the_work(made):
  for named, changes, said in (
    (["epochs", "mesh"], {}, "--epochs is not passed on"),
    ([], {"run_dir": "gs://bucket/runs"}, "local folders"),
    ([], {"results_dir": str(made.flagfile)}, "give a folder, which is made"),
    ([], {"results_dir": ""}, "give a folder, which is made"),
    ([], {"alpaca": str(made.flagfile)}, "own.flags"),
  ):
    with pytest.raises(UserError, match=said):
      made.run(named, **changes)
  (made.alpaca.parent / "a+b.json").write_text(made.alpaca.read_text())
  with pytest.raises(UserError, match="joined by"):
    made.run(alpaca=str(made.alpaca.parent / "a+b.json"))
  assert made.started == [] and not pathlib.Path(made.settings.run_dir).exists()


# ---- notes ---------------------------------------------------------------------------


def test_machine_and_devices_are_those_of_the_run(made, monkeypatch):
  made.kind = "Accelerator 9"
  monkeypatch.setattr(paper, "machine", lambda: "2 cores of here")
  made.run(only="first")
  monkeypatch.setattr(paper, "machine", lambda: "4 cores of there")
  made.run(only="first")  # published once more, not run
  assert "8 x Accelerator 9, 2 cores of here, " in made.page("first/table.md") and "abc" in made.page("first/table.md")
  made.codes["second"], made.kind = 1, "cpu"
  made.run(only="second")
  made.codes.clear()
  monkeypatch.setattr(paper, "machine", lambda: "6 cores")
  made.run(only="second")
  assert ", 4 cores of there, then 6 cores, " in made.page("second/table.md")


def test_a_step_without_devices_in_its_files_asks_another_process(tmp_path, monkeypatch):
  (tmp_path / "table.json").write_text('{"devices": [1, 2]}')
  provenance._devices_here.cache_clear()
  summary = {"platform": "tpu", "device_kind": "TPU v5", "num_devices": 4}
  done = subprocess.CompletedProcess([], 0, f"a line\n{json.dumps(summary)}\n", "")
  monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
  assert paper.devices(tmp_path) == "4 x TPU v5"
  provenance._devices_here.cache_clear()
  monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no devices"))
  assert paper.devices(tmp_path) == ""
  provenance._devices_here.cache_clear()


def test_a_stop_lets_the_experiment_save_and_keeps_the_seconds(made, monkeypatch, tmp_path):
  ready, saved = tmp_path / "ready", tmp_path / "saved"
  script = (
    "import pathlib, signal, sys, time\n"
    f"def save(*_): pathlib.Path({str(saved)!r}).touch(); sys.exit(143)\n"
    f"signal.signal(signal.SIGTERM, save); pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
  )
  monkeypatch.setattr(paper, "command", lambda *_: [sys.executable, "-S", "-c", script])
  monkeypatch.setattr(paper, "_NOTE_SECONDS", 0.05)
  while_running = []

  def stop_when_ready(*_):
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    if ready.exists() and made.note("first")["seconds"] > 0.2:  # noted while it runs
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
  assert made.run(dtype="bfloat16") == (1, ALL)
  assert made.page("second/table.md") == page and "--dtype=bfloat16" in made.page("third/table.md")
  assert "Of an earlier run, the last one is not finished or failed: second." in made.page("README.md")


def test_nothing_finished_is_an_index_without_rows(made):
  made.codes = dict.fromkeys(ALL, 1)
  assert made.run() == (1, ALL)
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


def test_the_log_tells_what_is_left_and_how_long_it_took(made, caplog):
  with caplog.at_level("INFO"):
    made.run()
    assert "preset quick, to run: first, second, third\n" in caplog.text  # nothing is known yet
    assert "left: second, third\n" in caplog.text and "left: nothing" in caplog.text
    caplog.clear()
    made.run(dtype="bfloat16")
    assert "to run: first, second, third (last time 0:00:0" in caplog.text
    assert "first once more: --dtype" in caplog.text
    caplog.clear()
    made.run(dtype="bfloat16")
    assert "finished already: first, second, third" in caplog.text and "to run: nothing" in caplog.text


def test_every_flag_of_paper_is_its_own_or_passed_on():
  of_paper = {field.name for field in paper.dataclasses.fields(PaperSettings) if field.metadata["group"] == "paper"}
  assert of_paper < set(paper._OWN) and set(paper.PASSED).isdisjoint(paper._OWN)
  assert {*paper.PASSED, *paper._OWN} <= {field.name for field in paper.dataclasses.fields(PaperSettings)}
