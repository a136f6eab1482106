"""The record of a run: its flags as a file that starts it again, versions of packages, devices."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from typing import Any

from etils import epath

from in2core_jax.errors import UserError
from in2core_jax.runs import files

_PACKAGES = (
  *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "tokenizers", "safetensors", "gguf"),
  *("pyarrow", "tensorflow-datasets"),
)


def write_flags(path: epath.PathLike, flags: Iterable[str], header: Iterable[str] = ()) -> None:
  """Writes a flagfile: `# ` before each header line, then one `--name=value` a line; `--flagfile=PATH` repeats the run.

  Raises:
    UserError: a flag's value holds a line break, or blanks at its end, which a flagfile cannot hold.
  """
  files.write_bytes(path, flags_bytes(flags, header))


def flags_bytes(flags: Iterable[str], header: Iterable[str] = ()) -> bytes:
  """The bytes that `write_flags` writes; raises as it does."""
  flags = list(flags)
  for flag in flags:
    if flag != flag.strip() or len(flag.splitlines()) != 1:
      raise UserError(
        f"{flag.split('=')[0]}: the value holds a line break or ends in blanks, which a flagfile cannot hold"
      )
  lines = [f"# {line}".rstrip() for entry in header for line in entry.splitlines() or [""]]
  return files.text_bytes("\n".join([*lines, *flags]) + "\n")


def package_versions() -> dict[str, str]:
  """Versions of Python, of this project and of the packages that numbers depend on."""
  from in2core_jax import __version__

  versions = {"python": platform.python_version(), "in2core_jax": __version__}
  return versions | {name: importlib.metadata.version(name) for name in _PACKAGES}


def device_summary() -> dict[str, Any]:
  """What the run computes on: platform, kind and number of devices, processes, cores. Starts JAX's backend."""
  import jax

  devices = jax.devices()
  return {
    "platform": devices[0].platform,
    "device_kind": devices[0].device_kind,
    "num_devices": len(devices),
    "num_processes": jax.process_count(),
    "num_cores": os.cpu_count(),
    "machine": f"{platform.system()} {platform.machine()}",
  }
