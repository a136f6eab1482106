"""Measuring: interleaved repetitions, the matrix product as a ceiling, compile seconds, peak memory.

Machines are shared and change their pace within seconds. So everything that is compared is measured once in each
round, and ratios are taken within a round before the median over the rounds.
"""

import dataclasses
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

# Called with nothing, returns when its work is done on the devices.
Work = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Timings:
  """Seconds of everything that was measured.

  Attributes:
    seconds: name -> float64 [rounds].
  """

  seconds: dict[str, np.ndarray]

  def median(self, name: str) -> float:
    """Median over the rounds, seconds."""
    return float(np.median(self.seconds[name]))

  def ratio(self, name: str, other: str) -> float:
    """Median over the rounds of seconds[name] / seconds[other], each taken within its round."""
    return float(np.median(self.seconds[name] / self.seconds[other]))


def interleaved(
  references: Mapping[str, Work], rows: Mapping[str, Work], rounds: int, on_measured: Callable[[str], None]
) -> Timings:
  """Measures every row once in each round; what it is compared with, once before and once after the rows.

  Every second round goes backwards, so that no row is always near the same end. A reference counts with the mean of
  its two measurements. Everything runs once before the first round, which compiles it.

  Args:
    references: what ratios are taken to.
    rows: what is measured.
    rounds: at least 1.
    on_measured: called with the name after every measurement, those of the round before the first included.
  """
  found: dict[str, list[float]] = {name: [] for name in (*references, *rows)}
  for name, work in (references | dict(rows)).items():
    work()
    on_measured(name)
  for number in range(rounds):
    order = list(rows) if number % 2 == 0 else list(reversed(rows))
    seconds: dict[str, list[float]] = {}
    for name in (*references, *order, *references):
      began = time.perf_counter()
      (references[name] if name in references else rows[name])()
      seconds.setdefault(name, []).append(time.perf_counter() - began)
      on_measured(name)
    for name, values in seconds.items():
      found[name].append(sum(values) / len(values))
  return Timings({name: np.array(values) for name, values in found.items()})


def matrix_product(size: int, repeat: int, dtype) -> tuple[Work, int]:
  """A chain of large matrix products, the ceiling that other work is held against.

  Args:
    size: n of the n x n matrices.
    repeat: products in one program, enough to hide its start.
    dtype: of both matrices.

  Returns:
    (work, its floating point operations, 2 n^3 repeat).
  """
  keys = jax.random.split(jax.random.key(0))
  # Deviation 1 / sqrt(n): the products neither grow nor vanish, which would change the power that a device draws.
  left, right = (jax.random.normal(key, (size, size), dtype) / jnp.asarray(size**0.5, dtype) for key in keys)
  chain = jax.jit(lambda x, w: jax.lax.fori_loop(0, repeat, lambda _, y: y @ w, x))
  return lambda: jax.block_until_ready(chain(left, right)), 2 * size**3 * repeat


class CompileMeter:
  """What JAX reports about making programs while the meter is open.

      with CompileMeter() as meter:
        ...
      meter.compile_seconds

  Attributes:
    compile_seconds: of XLA; for a program out of the persistent cache, the seconds to read it.
    lower_seconds: from JAX's own form to XLA's input.
    programs: how many were compiled or read.
    cached: how many of them were read from the persistent cache.
  """

  _COMPILE = "/jax/core/compile/backend_compile_duration"
  _LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"
  _HIT = "/jax/compilation_cache/cache_hits"

  def __init__(self):
    self.compile_seconds = self.lower_seconds = 0.0
    self.programs = self.cached = 0

  def _on_seconds(self, event: str, seconds: float, **_) -> None:
    if event == self._COMPILE:
      self.compile_seconds += seconds
      self.programs += 1
    elif event == self._LOWER:
      self.lower_seconds += seconds

  def _on_event(self, event: str, **_) -> None:
    self.cached += event == self._HIT

  def __enter__(self) -> "CompileMeter":
    jax.monitoring.register_event_duration_secs_listener(self._on_seconds)
    jax.monitoring.register_event_listener(self._on_event)
    return self

  def __exit__(self, *_) -> None:
    jax.monitoring.unregister_event_duration_listener(self._on_seconds)
    jax.monitoring.unregister_event_listener(self._on_event)


_LINUX_STATUS, _LINUX_RESET = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def reset_peak_memory() -> bool:
  """Lets the process's peak start anew at what it holds now; False where the system has no such reset."""
  if not _LINUX_RESET.exists():
    return False
  _LINUX_RESET.write_text("5")  # proc(5): resets the peak resident set size
  return True


def peak_memory() -> int:
  """Bytes that were held at most: of the first device where it counts them, else of this process's memory."""
  counted = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in counted:
    return int(counted["peak_bytes_in_use"])
  if _LINUX_STATUS.exists():
    (line,) = (line for line in _LINUX_STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
  unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) counts bytes on macOS, kibibytes elsewhere
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_bytes(tree, device: jax.Device) -> int:
  """Bytes of a tree's arrays that lie on one device."""
  return sum(
    shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device == device
  )
