"""`run.sh` for real, in a copy of its own with almost empty requirements: set-up, repair, refusals."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import console

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path):
  """A project whose requirements are nothing, so that a set-up takes seconds."""
  for folder in ("experiments/flags", "third_party", "tests", "bin"):
    (tmp_path / folder).mkdir(parents=True)
  for name in ("run.sh", "experiments/console.py"):
    shutil.copy(ROOT / name, tmp_path / name)
  (tmp_path / "requirements.txt").write_text("# nothing\n")
  (tmp_path / "third_party/requirements-assets.txt").write_text("# nothing\n")
  shown = "os.getcwd(), sys.argv[1:], os.environ.get('HF_HUB_OFFLINE'), sys.prefix"
  body = f'import os, sys\nif __name__ == "__main__":\n  print({shown})\n'
  for name in ("__init__", "flags", "cli", "workbench", "select", "demo"):
    (tmp_path / f"experiments/{name}.py").write_text(body if name in ("select", "demo") else "")
  return tmp_path


def run(project: Path, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
  """Calls run.sh with programs in the project's `bin` before all others."""
  settings = environment_of(project) | environment
  command = [str(project / "run.sh"), *arguments]
  return subprocess.run(command, cwd=cwd or project, env=settings, capture_output=True, text=True, timeout=300)


def environment_of(project: Path) -> dict[str, str]:
  kept = {name: value for name, value in os.environ.items() if not name.startswith(("IN2CORE_", "HF_", "JAX_"))}
  return kept | {"PATH": f"{project}/bin{os.pathsep}{kept['PATH']}", "IN2CORE_PYTHON": sys.executable}


def fake(project: Path, name: str, body: str) -> str:
  path = project / "bin" / name
  path.write_text(f"#!/bin/sh\n{body}\n")
  path.chmod(0o755)
  return str(path)


def assert_one_line(result: subprocess.CompletedProcess, *seen: str) -> None:
  assert (result.returncode, result.stdout) == (2, "")
  last = result.stderr.splitlines()[-1]
  assert last.startswith("error: ") and all(word in last for word in seen), result.stderr


def test_help_and_unknown_command_need_no_environment(project):
  shown = run(project)
  assert shown.returncode == 0 and all(f"\n  {name:<10} {job}\n" in shown.stdout for name, job in console.MAIN.items())
  result = run(project, "slect")
  assert_one_line(result, "'slect'", "setup test lint docs help demo select")
  assert "cli" not in result.stderr and "workbench" not in result.stderr and result.stderr.count("\n") == 1
  for name in ("cli", "workbench", "__init__", "../run", "demo select", "sel*"):
    assert_one_line(run(project, name), "unknown command")
  assert not (project / ".venv").exists()


def first_calls(project: Path, cwd: Path) -> list[tuple[int, str, str]]:
  """Two first calls at once."""
  settings = os.environ | {"IN2CORE_PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  command = [project / "run.sh", "select", "--flagfile=F", "a b"]
  calls = [subprocess.Popen(command, env=settings, cwd=cwd, **pipes) for _ in range(2)]
  ends = [call.communicate(timeout=300) for call in calls]
  return [(call.returncode, *end) for call, end in zip(calls, ends, strict=True)]


@pytest.mark.slow
@pytest.mark.real
def test_set_up_once_then_repair_and_update(project):
  work = project / "elsewhere"
  work.mkdir()
  ends = first_calls(project, work)
  for code, out, err in ends:
    assert (code, out) == (0, f"{work} ['--flagfile=F', 'a b'] 1 {project}/.venv\n"), err
  if shutil.which("flock"):  # without it, nothing keeps them apart
    assert sorted("set-up done" in err for _, _, err in ends) == [False, True]
    assert sorted("waiting for it" in err for _, _, err in ends) == [False, True]

  # Later calls start at once; a current folder of modules that would shadow ours does not matter.
  later = run(project, "demo", "--x=1", cwd=project / "experiments")
  assert later.stderr == ""
  flagfile = f"--flagfile={project}/experiments/flags/demo.flags"
  assert later.stdout == f"{project}/experiments ['{flagfile}', '--x=1'] 1 {project}/.venv\n"

  # A set-up that was broken off is made anew.
  (project / ".venv/in2core-unfinished").touch()
  (project / ".venv/bin/python").unlink()
  repaired = run(project, "select")
  assert repaired.returncode == 0 and "setting up .venv" in repaired.stderr
  assert not (project / ".venv/in2core-unfinished").exists()

  # Changed requirements are installed into what is there.
  (project / ".venv/kept").touch()
  (project / "requirements.txt").write_text("# still nothing\n")
  assert "requirements are new or changed" in run(project, "select").stderr
  assert (project / ".venv/kept").exists()

  # A failure says why and leaves what there was. Nothing listens on port 9 of this machine: as good as a cut cable.
  (project / "requirements.txt").write_text("six==1.17.0\n")
  offline = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "PIP_CONFIG_FILE": os.devnull}
  alone = {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1"}
  for _ in range(2):
    failed = run(project, "select", **offline, **alone)
    assert_one_line(failed, "no network", "requirements.txt", "setup.log", ".venv is as it was")
  with_gpus = run(project, "select", IN2CORE_ACCELERATOR="cuda12", **offline, **alone)
  assert_one_line(with_gpus, "no network", ".venv is as it was")
  (project / "requirements.txt").write_text("# still nothing\n")
  assert run(project, "select").stderr == ""
  assert (project / ".venv/kept").exists()

  # Scripts of a swapped environment name the place where it is.
  first = (project / ".venv/bin/pip").read_text().splitlines()[0]
  assert str(project / ".venv/bin/python") in first, first

  # Killed between the two renames of the swap: the whole new environment, or else the old one, is put back.
  for there in (".cache/venv.new", ".cache/venv.old"):
    (project / ".venv").rename(project / there)
    assert run(project, "select").stderr == "", there
    assert (project / ".venv/kept").exists() and not (project / there).exists()

  # Through a symbolic link to run.sh, and to a link to it; a linked .venv is replaced, and what it points to stays.
  (project / "bin/in2core").symlink_to("../run.sh")
  (work / "again").symlink_to(project / "bin/in2core")
  called = subprocess.run(
    [work / "again", "select"], cwd=work, env=environment_of(project), capture_output=True, text=True
  )
  assert (called.stdout, called.stderr) == (f"{work} [] 1 {project}/.venv\n", "")
  (project / ".venv").rename(work / "linked")
  (project / ".venv").symlink_to(work / "linked")
  (project / "requirements.txt").write_text("# nothing once more\n")
  assert "set-up done" in run(project, "select").stderr
  assert not (project / ".venv").is_symlink() and (work / "linked/kept").exists()


def stand_in_environment(project: Path) -> None:
  """A .venv that run.sh takes for ready, whose Python only shows its arguments and fails when told to."""
  (project / ".venv/bin").mkdir(parents=True)
  (project / ".venv/pyvenv.cfg").write_text("version = 3.11.7\n")
  files = [project / "requirements.txt", project / "third_party/requirements-assets.txt"]
  digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
  (project / ".venv/in2core-stamp").write_text(f"python 3.11.7\naccelerator cpu\nrequirements {digest}\n")
  python = project / ".venv/bin/python"
  python.write_text('#!/bin/sh\necho "$*"\ncase "$*" in *"${FAILING:-nothing}"*) exit 1 ;; esac\n')
  python.chmod(0o755)


def test_docs_are_checked_then_built_and_what_builds_them_is_installed_once(project):
  (project / "requirements-docs.txt").write_text("# nothing\n")
  stand_in_environment(project)
  checked, built = "docs/check_docs.py", "-m sphinx -q -E -W --keep-going -j auto -b html docs docs/_build"
  first = run(project, "docs", cwd=project / "experiments")
  assert (first.returncode, first.stdout) == (0, f"{checked}\n{built}\n"), first.stderr
  said = first.stderr.splitlines()
  assert "installing what builds the documentation" in said[0]
  assert said[1:] == [f"ready: open {project}/docs/_build/index.html"]
  assert "-r " + str(project / "requirements-docs.txt") in (project / ".cache/setup.log").read_text()

  again = run(project, "docs", "-D", "x=1")  # arguments go to Sphinx
  assert (again.returncode, again.stdout) == (0, f"{checked}\n{built} -D x=1\n")
  assert again.stderr.splitlines() == said[1:]
  faults = run(project, "docs", FAILING="check_docs")  # nothing is built of pages with faults
  assert (faults.returncode, faults.stdout, faults.stderr) == (1, f"{checked}\n", "")
  warnings = run(project, "docs", FAILING="sphinx")
  assert (warnings.returncode, warnings.stderr) == (1, "")

  # Other requirements are installed; what pip cannot do is said, and tried again.
  (project / "requirements-docs.txt").write_text("# still nothing\n")
  for _ in range(2):
    assert_one_line(run(project, "docs", FAILING="pip install"), "requirements-docs.txt", "setup.log")
  assert "installing what builds the documentation" in run(project, "docs").stderr


def test_unsuited_pythons_are_named(project):
  old = fake(project, "old", "echo 3.9 /usr/bin/python3.9")
  assert_one_line(run(project, "setup", IN2CORE_PYTHON=old), f"{old} is 3.9", "3.11, 3.12 or 3.13")
  bare = fake(project, "bare", "echo 3.11")
  assert_one_line(run(project, "setup", IN2CORE_PYTHON=bare), "cannot make environments", "python3.11-venv")
  assert_one_line(run(project, "setup", IN2CORE_PYTHON="/nowhere/python"), "/nowhere/python does not start")
  for name in ("python3.11", "python3.12", "python3.13"):
    fake(project, name, "exit 127")
  fake(project, "python3", "echo 3.10 /usr/bin/python3.10")
  assert_one_line(run(project, "setup", IN2CORE_PYTHON=""), "no Python 3.11, 3.12 or 3.13 found", "python3 is 3.10")
  assert not (project / ".venv").exists()


def test_full_disk_and_wrong_accelerator_are_said_first(project):
  fake(project, "df", "echo Filesystem 1024-blocks Used Available; echo /dev/x 9 9 1200345 99% /")
  assert_one_line(run(project, "setup"), "disk full", "about 3 GB", "1200 MB are free")
  assert_one_line(run(project, "setup", IN2CORE_ACCELERATOR="gpu"), "IN2CORE_ACCELERATOR is 'gpu'")
  assert not (project / ".venv").exists()


def test_an_environment_of_somebody_else_is_not_deleted(project):
  (project / ".venv").mkdir()
  (project / ".venv/thesis.tex").write_text("precious")
  assert_one_line(run(project, "setup"), "was not made by run.sh", "move it away")
  assert (project / ".venv/thesis.tex").exists()
