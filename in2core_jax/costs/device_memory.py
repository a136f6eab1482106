"""How much memory a device has for a program, and how many tokens of a batch it can use."""

from __future__ import annotations

from typing import Any

from in2core_jax.errors import UserError
from in2core_jax.parallel import sharding
from in2core_jax.parallel.host import host_bytes

# Larger batches are not faster on a CPU.
CPU_TOKENS = 2048


# On accelerators the matrices are busy far below this on each device; what is larger only pads small data sets more.
DEVICE_TOKENS = 2**14


# Of what a device has: the allocator needs room to move, and on a CPU others live there too.
ACCELERATOR_SHARE, CPU_SHARE = 0.9, 0.5


def device_bytes(device: Any) -> int:
  """Memory of a device: its own, or on a CPU its part of the machine's.

  Total and not free memory: the same command shall take the same batches when it is started again.

  Raises:
    UserError: an accelerator that does not tell.
  """
  if device.platform == "cpu":
    return host_bytes() // len(device.client.local_devices())
  stats = device.memory_stats() or {}
  if "bytes_limit" not in stats:
    raise UserError(f"{device} does not report how much memory it has: give --batch_tokens a number, such as 8192")
  return int(stats["bytes_limit"])


def usable_bytes(device: Any) -> int:
  """Memory of a device that a run may plan with."""
  return int(device_bytes(device) * (CPU_SHARE if device.platform == "cpu" else ACCELERATOR_SHARE))


def most_tokens(device: Any, mesh: Any) -> int:
  """Beyond this a larger batch is no faster."""
  return CPU_TOKENS if device.platform == "cpu" else DEVICE_TOKENS * sharding.batch_multiple(mesh)
