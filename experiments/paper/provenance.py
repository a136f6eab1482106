"""Where a step has run: commit, machine, devices."""

import functools
import json
import os
import pathlib
import platform
import re
import subprocess
import sys

from experiments import subprocesses
from experiments.paper.commands import (
  ROOT,
)
from in2core_jax.runs import run_folder


def commit() -> str:
  """The commit that the code is of, or "unknown" outside a repository."""
  found = subprocess.run(
    ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
  )
  return found.stdout.strip() or "unknown"


def machine() -> str:
  """Processor and cores, with no name of the machine."""
  info = pathlib.Path("/proc/cpuinfo")
  named = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.is_file() else None
  return f"{os.cpu_count()} cores of {named[1] if named else platform.machine()}"


def devices(folder: pathlib.Path) -> str:
  """The accelerators that a finished step has told of in its run folder, as "8 x TPU v5 lite"; empty: the processor.

  Most experiments write them; those that do not have had the devices that a process started now has. This process must
  not look by itself: it would take the devices from the next experiment.
  """
  told = [run_folder.read_json(path) for path in sorted(folder.glob("*.json"))]
  found = [facts["devices"] for facts in told if isinstance(facts, dict) and isinstance(facts.get("devices"), dict)]
  summary = found[0] if found else _devices_here()
  accelerated = summary.get("platform", "cpu") != "cpu"
  return f"{summary['num_devices']} x {summary['device_kind']}" if accelerated else ""


@functools.cache
def _devices_here() -> dict:
  """`run_folder.device_summary` of a process of its own; empty when that one fails."""
  code = "import json; from in2core_jax.runs import run_folder; print(json.dumps(run_folder.device_summary()))"
  here = {"env": subprocesses.environment(), "capture_output": True, "text": True, "check": False}
  done = subprocess.run([sys.executable, "-P", "-c", code], **here)
  return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
