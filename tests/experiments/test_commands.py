"""Every command in README, the tutorial and the how-to pages runs: on a slice, with a tiny model.

The slice's flags come last, where the last one wins. What is not run here is listed with the reason; a test holds the
list against the pages.
"""

import importlib.util
import json
import os
import pathlib
import shutil
import sys

import pytest
import tiny

from experiments import demo, flags
from experiments import settings as commands
from experiments.study import study
from experiments.study.settings import StudySettings
from in2core_jax.data import sources
from in2core_jax.estimate import dry_run
from in2core_jax.pipeline import evaluate, finetune, index, select

quick_compile = tiny.quick_compile
ROOT = pathlib.Path(__file__).resolve().parents[2]

_spec = importlib.util.spec_from_file_location("docs_check_docs", ROOT / "docs" / "check_docs.py")
sys.modules[_spec.name] = check_docs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_docs)

KINDS = {
  "finetune": commands.FinetuneFlags,
  "select": commands.SelectFlags,
  "evaluate": commands.EvaluateFlags,
  "demo": commands.DemoFlags,
  "index": commands.IndexFlags,
  "study": StudySettings,
}
STAGES = {"finetune": finetune.run, "index": index.run, "select": select.run, "evaluate": evaluate.run}
_ADAPTER = "tests/model/test_adapters.py scores an adapter, on its factors and merged"
# Beginnings of commands that are not run here -> why.
NOT_RUN = {
  "setup": "tests/test_run_sh.py runs it with requirements of its own",
  "test": "it is what runs this test",
  "docs": "the build of the documentation is a part of the continuous integration",
  "solvers": "tests/experiments/test_solvers.py and test_solvers_dense.py run it on a slice",
  "kill_test": "tests/pipeline/test_resume.py runs it on a slice",
  "check": "tests/experiments/test_check.py runs it, on one device and on two",
  "recommend": "tests/recommendation/test_recommend.py runs it on a slice",
  "export": "tests/pipeline/test_export.py runs it for every family",
  "interop": "it makes an environment of its own; tests/experiments/test_interop.py has its parts",
  "large_pools": "tests/index/test_index_rules.py runs its rules on a drawn pool",
  "select --model=hf:path/to/llama --train_data=jsonl:mine.jsonl --checkpoint=path/to/adapter": _ADAPTER,
  "select --model=hf:path/to/adapter": _ADAPTER,
  "select --flagfile=runs/mine/select/flags.txt": "it goes on from a run of another page",
  "select --flagfile=mine.flags --mesh=data:2,fsdp:8": "needs two machines with a shared folder",
  "select --flagfile=mine.flags --coordinator": "needs two processes; tests/parallel/test_processes.py starts them",
  "select --flagfile=mine.flags --mesh=data:4,fsdp:4": "needs TPUs and a bucket",
}
SLICE = (
  *("--train_limit=16", "--eval_limit=6", "--test_limit=6", "--max_length=48", "--system_prompt=none"),
  *("--layers=last:1", "--trainable_layers=last:1", "--steps=2", "--batch_size=4", "--sketch_size=4"),
  *("--solver=lissa", "--depth=2", "--curvature_examples=4", "--curvature_batch=4", "--seeds=0", "--fixed_seeds=0"),
)
# Of single commands: a demo that must end, a study and a sweep of few trainings.
MORE = {
  "study": ("--variants=proponents; bm25",),
  "evaluate": ("--equal=steps",),
  "demo": ("--policies=full,random",),
}


def pages():
  named = ("README.md", "docs/tutorial.md", "docs/howto/")
  return [page for page in check_docs.pages() if str(page.path).startswith(named)]


def lines_of(page) -> list[str]:
  """The commands of a page without ./run.sh, each once."""
  found = (words[1:] for words in check_docs.commands(page.text))
  return list(dict.fromkeys(" ".join(words) for words in found if words and words[0].isidentifier()))


def begins(line: str, start: str) -> bool:
  """Whether a command is one of `NOT_RUN`."""
  return line == start or line.startswith((f"{start} ", f"{start}="))


def is_run(line: str) -> bool:
  """Whether a command is run here."""
  return not any(begins(line, start) for start in NOT_RUN)


def test_what_is_not_run_is_in_the_pages_and_the_rest_can_be_run():
  lines = [line for page in pages() for line in lines_of(page)]
  left = [start for start in NOT_RUN if not any(begins(line, start) for line in lines)]
  assert not left, f"no page has them any more: {left}"
  run = [line for line in lines if is_run(line)]
  assert len(run) > 20 and {line.split()[0] for line in run} <= set(KINDS)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with what the pages name: data of the reader's own, models, a flagfile."""
  folder = tmp_path_factory.mktemp("reader")
  for name in ("llama", "model"):
    tiny.write_model(folder / "path" / "to" / name)
  records = sources.load_records("chatterbot")[::7][:90]
  lines = [json.dumps({"messages": record.messages, "topic": record.topic}) for record in records]
  parts = {"mine": lines, "pool": lines, "wanted": lines[60:], "eval": lines[:12], "test": lines[12:24]}
  for name, own in parts.items():
    (folder / f"{name}.jsonl").write_text("\n".join(own) + "\n")
  pairs = [{"prompt": "Say it.", "chosen": f"Yes, {n} of them.", "rejected": f"No, {n}."} for n in range(60)]
  (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  coreset = folder / "runs" / "mine" / "select" / "coreset.jsonl"
  (folder / "mine.flags").write_text("--train_data=jsonl:mine.jsonl\n--dedup\n")
  return folder, coreset


def run(line: str, monkeypatch) -> None:
  """Runs a command as its process would, in this one."""
  name, *own = line.split(" ")
  read = flags.Parser(KINDS[name], tells_costs=name in STAGES or name == "demo")
  model = [] if any(word.startswith("--model=") for word in own) else ["--model=hf:path/to/model"]
  settings = read(*(word for word in own if word not in ("...", "--help")), *SLICE, *MORE.get(name, ()), *model)
  if settings.dry_run:
    dry_run.run(settings, name)
  elif name in STAGES:
    STAGES[name](settings)
  else:
    with monkeypatch.context() as patch:
      patch.setattr(flags, "read", lambda *_, **__: settings)
      assert not {"demo": demo, "study": study}[name].main([])


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.path.stem)
def test_the_commands_of_a_page_run_one_after_another(page, place, monkeypatch):
  folder, coreset = place
  monkeypatch.chdir(folder)
  shutil.rmtree(folder / "runs", ignore_errors=True)
  if page.path.stem == "train-elsewhere":  # it goes on from a run of another page
    coreset.parent.mkdir(parents=True)
    shutil.copy("mine.jsonl", coreset)
  for line in lines_of(page):
    if is_run(line):
      run(line, monkeypatch)
  assert os.getcwd() == str(folder)
