"""An environment of its own for other trainers: made beside, swapped in when it is whole, kept while its pins stay."""

import logging
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

from in2core_jax.errors import UserError
from in2core_jax.runs import run_folder
from in2core_jax.runs.cache_folder import cache_folder

log = logging.getLogger(__name__)

REQUIREMENTS = pathlib.Path(__file__).with_name("requirements.txt")
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_STAMP = "in2core-stamp"  # what it was made from; written last
_NEEDED = 3_000_000_000  # bytes; with PyTorch for a GPU it is several times as much
_NO_NETWORK = ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "ReadTimeout", "Max retries exceeded")


def python(requirements: pathlib.Path = REQUIREMENTS, cache: pathlib.Path | None = None) -> pathlib.Path:
  """The Python of the environment, which is made when it is missing or its pins have changed.

  Args:
    requirements: pinned packages, as pip reads them.
    cache: where it lies; `.cache` of the project, or the user's, when None.

  Raises:
    UserError: no space, no network, another job that makes it, or what pip says.
  """
  folder = (cache or (_ROOT / ".cache" if (_ROOT / "run.sh").is_file() else cache_folder())) / "interop"
  if _is_ready(folder, requirements):
    return _python_in(folder)
  lock = run_folder.hold(folder.with_name("interop-setup"))
  try:
    if not _is_ready(folder, requirements):  # whoever held the lock may have made it
      _make(folder, requirements)
  finally:
    lock.release()
  return _python_in(folder)


def _python_in(folder: pathlib.Path) -> pathlib.Path:
  return folder / "bin" / "python"


def _wanted(requirements: pathlib.Path) -> str:
  return f"python {sysconfig.get_python_version()}\n{requirements.read_text(encoding='utf-8')}"


def _is_ready(folder: pathlib.Path, requirements: pathlib.Path) -> bool:
  stamp = folder / _STAMP
  return stamp.is_file() and stamp.read_text(encoding="utf-8") == _wanted(requirements)


def _make(folder: pathlib.Path, requirements: pathlib.Path) -> None:
  """Makes the environment under another name; what a killed set-up left goes first."""
  new, old = (folder.with_name(f"interop.{word}") for word in ("new", "old"))
  trace = folder.with_name("interop.log")
  free = shutil.disk_usage(folder.parent).free
  if free < _NEEDED:
    raise UserError(f"disk full: the environment needs about 3 GB in {folder.parent}, and {free / 1e9:.1f} GB are free")
  for path in (new, old):
    shutil.rmtree(path, ignore_errors=True)
  log.info("setting up %s: PyTorch, TRL and what they need, a few minutes (log: %s)", folder, trace)
  pip = ["-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
  try:
    _call([sys.executable, "-P", "-m", "venv", str(new)], trace, "wb")
    _call([str(_python_in(new)), "-P", *pip, "-r", str(requirements)], trace, "ab")
    (new / _STAMP).write_text(_wanted(requirements), encoding="utf-8")
    if folder.exists():
      folder.rename(old)
    new.rename(folder)
  finally:
    for path in (new, old):
      shutil.rmtree(path, ignore_errors=True)


def _call(command: list[str], trace: pathlib.Path, mode: str) -> None:
  """Runs a program whose output goes into a file.

  Raises:
    UserError: it failed; with its last error, and what to do where that is known.
  """
  with trace.open(mode) as file:
    code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=clean_environment()).returncode
  if code == 0:
    return
  said = trace.read_text(encoding="utf-8", errors="replace")
  if "No space left on device" in said:
    raise UserError(f"disk full while installing {REQUIREMENTS.name}: free some space and run the same command again")
  if any(word in said for word in _NO_NETWORK):
    raise UserError(f"no network: pip cannot reach a package index; check the connection or pip's settings ({trace})")
  errors = [line for line in said.splitlines() if line.startswith(("ERROR", "Error"))] or said.splitlines() or [""]
  raise UserError(f"the environment of interop could not be made: {errors[-1][:300]} (log: {trace})")


def clean_environment(**changes: str) -> dict[str, str]:
  """The variables of this process without those by which one Python finds another's packages."""
  out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSAFEPATH")
  return {name: value for name, value in os.environ.items() if name not in out} | changes
