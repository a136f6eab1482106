"""Several processes as one job: how they find each other, who writes, and values that all of them need.

Every process runs the same program on the same global arrays and holds its own devices' part of them. So all of them
must call every function here that says "collective", in the same order, and take the same branches: what depends on
files is decided by one of them (`from_writer`), what depends on what each one has is decided by all (`all_true`).
"""

import importlib.util
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from in2core_jax.errors import UserError

Tree = Any

log = logging.getLogger(__name__)

# ---- start ---------------------------------------------------------------------------


def initialize(
  coordinator: str | None = None, process_id: int | None = None, num_processes: int | None = None, timeout: int = 300
) -> bool:
  """Joins the processes of one job; the first thing that a program does, before it touches a device.

  By flags; else as SLURM started us (`srun`); else as a TPU pod slice is laid out; else nothing: one process.

  Args:
    coordinator: host:port of process 0, the same in all processes.
    process_id: 0 .. num_processes - 1.
    num_processes: how many processes; 1 alone switches detection off.
    timeout: seconds to wait for the others.

  Returns:
    Whether there are several processes (or JAX was already told so).

  Raises:
    UserError: some flags without the others, values out of range, or processes that do not find each other.
  """
  if jax.distributed.is_initialized():
    return True
  settings = start_settings(coordinator, process_id, num_processes, os.environ)
  if settings is None:
    return False
  where, number = settings.get("coordinator_address", "a TPU slice"), settings.get("process_id")
  # Told before, not after: XLA ends the process by itself when the others do not come in time.
  log.info("waiting for the other processes (%s), %d s at most; --num_processes=1 works alone", where, timeout)
  if number:
    _await_coordinator(where, timeout)
  try:
    jax.distributed.initialize(**settings, initialization_timeout=timeout)
  except (jax.errors.JaxRuntimeError, ValueError, OSError) as error:
    raise UserError(f"the processes did not find each other ({where}): {error}; {_TO_DO}") from error
  return True


_TO_DO = (
  "start all of them with the same --coordinator and --num_processes and a --process_id each, or give "
  "--num_processes=1 to work alone"
)


def _await_coordinator(address: str, timeout: float) -> None:
  """Returns when something listens at process 0's address; refuses after the timeout."""
  host, port = address.rsplit(":", 1)
  deadline = time.monotonic() + timeout
  while True:
    try:
      socket.create_connection((host, int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() >= deadline:
        raise UserError(
          f"--coordinator={address}: no answer from there after {timeout} s ({error}): is process 0 running on that "
          f"machine, and may this one reach the port? {_TO_DO}"
        ) from error
    time.sleep(0.2)


def leave() -> None:
  """Ends a joined process well: waits until the others are done too, else they would be told that this one died."""
  jax.distributed.shutdown()


def start_settings(
  coordinator: str | None, process_id: int | None, num_processes: int | None, environ: Mapping[str, str]
) -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize`, or None for a single process; see `initialize`."""
  given = {"coordinator": coordinator, "process_id": process_id, "num_processes": num_processes}
  named = ", ".join(f"--{name}={value}" for name, value in given.items() if value not in (None, ""))
  if num_processes is not None and num_processes < 1:
    raise UserError(f"{named}: num_processes must be at least 1")
  if num_processes == 1 and not process_id:
    return None
  if named:
    missing = [f"--{name}" for name, value in given.items() if value in (None, "")]
    if missing:
      raise UserError(f"{named} without {' and '.join(missing)}: several processes need all three, in every process")
    if not 0 <= process_id < num_processes:
      raise UserError(f"{named}: process_id must be between 0 and {num_processes - 1}")
    if not re.fullmatch(r".+:\d+", coordinator):
      raise UserError(f"{named}: the coordinator must be host:port of process 0, for example 10.0.0.1:8476")
    return _exact(coordinator, process_id, num_processes, None)
  if _slurm_tasks(environ) > 1:
    return _slurm_settings(environ)
  return {} if _is_tpu_pod(environ) else None


def _exact(coordinator, process_id, num_processes, local_device_ids):
  # "deactivate": left to itself JAX gives every process of a SLURM step one GPU only, even one process per node.
  return {
    "coordinator_address": coordinator,
    "process_id": process_id,
    "num_processes": num_processes,
    "local_device_ids": local_device_ids,
    "cluster_detection_method": "deactivate",
  }


def _slurm_tasks(environ: Mapping[str, str]) -> int:
  """Tasks of the `srun` step that started us; 1 outside of a step: a batch script alone is one process of its job."""
  inside = "SLURM_PROCID" in environ and "SLURM_STEP_NODELIST" in environ
  return int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))) if inside else 1


def _slurm_settings(environ: Mapping[str, str]) -> dict[str, Any]:
  head, number, tail = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", environ["SLURM_STEP_NODELIST"]).groups()
  job, step = int(environ.get("SLURM_JOB_ID", "0")), environ.get("SLURM_STEP_ID", "0")
  port = 61440 + (job + 131 * (int(step) if step.isdigit() else 0)) % 4096  # steps of one job may run side by side
  here = _slurm_tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "1")))
  local_tasks = here[min(int(environ.get("SLURM_NODEID", "0")), len(here) - 1)]
  visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
  local = None  # one process a node, or a task that sees only its own GPU: all that is visible
  if local_tasks > 1 and len(visible) != 1:
    share, rank = max(1, len(visible) // local_tasks), int(environ.get("SLURM_LOCALID", "0"))
    local = list(range(rank * share, (rank + 1) * share))
  coordinator = f"{head}{number or ''}{tail}:{port}"
  return _exact(coordinator, int(environ["SLURM_PROCID"]), _slurm_tasks(environ), local)


def _slurm_tasks_per_node(text: str) -> list[int]:
  """Expands SLURM's "4(x2),3" to [4, 4, 3]."""
  counts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()) for part in text.split(",")]
  return [int(count[1]) for count in counts if count for _ in range(int(count[2] or 1))] or [1]


def _is_tpu_pod(environ: Mapping[str, str]) -> bool:
  """Whether this is one of several hosts of a TPU slice; JAX itself knows how to find the others."""
  if "tpu" not in environ.get("JAX_PLATFORMS", "tpu") or importlib.util.find_spec("libtpu") is None:
    return False
  hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
  if hosts is not None:
    return "," in hosts or int(environ.get("MEGASCALE_NUM_SLICES", "1")) > 1
  return "TPU_SKIP_MDS_QUERY" not in environ  # JAX sets it on import where it sees no TPU chip


# ---- one job -------------------------------------------------------------------------


def _alone() -> bool:
  """Whether there is one process; tells without looking for devices where none were joined, which would take them."""
  return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_writer() -> bool:
  """Whether this process writes the files that the processes share, and tells people what happens."""
  return _alone() or jax.process_index() == 0


def barrier(name: str) -> None:
  """Returns when all processes have come here; collective. What they wrote before is there afterwards."""
  if not _alone():
    multihost_utils.sync_global_devices(name)


def from_writer(value: Any) -> Any:
  """The writer's value in every process; collective.

  Args:
    value: anything with a JSON form; ignored but in the writer.

  Returns:
    The writer's value, read back from JSON (tuples become lists).
  """
  text = np.frombuffer(json.dumps(value if is_writer() else None).encode(), np.uint8)
  if not _alone():
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = np.pad(text, (0, max(0, size - len(text))))[:size]  # all processes must pass the same shape
    text = np.asarray(multihost_utils.broadcast_one_to_all(text), np.uint8)
  return json.loads(text.tobytes())


def checked_by_writer(check: Callable[[], None]) -> None:
  """Lets the writer alone look at files; what it refuses is raised in every process, so that none waits. Collective.

  Args:
    check: raises a UserError.

  Raises:
    UserError: that of the check.
  """
  refusal = None
  if is_writer():
    try:
      check()
    except UserError as error:
      refusal = str(error)
  refusal = from_writer(refusal)
  if refusal is not None:
    raise UserError(refusal)


def deals(number: int) -> bool:
  """Whether a numbered piece that every process has is this one's to write."""
  return number % jax.process_count() == jax.process_index()


def all_true(value: bool) -> bool:
  """Whether `value` is true in every process; collective."""
  if _alone():
    return bool(value)
  return bool(np.all(multihost_utils.process_allgather(np.array([value], np.int32))))


def settle(tree: Tree) -> Tree:
  """Waits for values where two programs must not run side by side, and gives them back.

  XLA's CPU client has one thread for each simulated device. Two programs that exchange values between all devices, both
  under way because neither needs the other's result, can each hold threads that the other waits for, for ever.
  Call it on what such a program gives before the next one starts. GPUs and TPUs run programs in order: no wait there.
  """
  return jax.block_until_ready(tree) if jax.default_backend() == "cpu" and jax.device_count() > 1 else tree


def to_host(tree: Tree) -> Tree:
  """Whole leaves as NumPy arrays in every process; a collective when the arrays span processes: all must call it."""

  def fetch(leaf):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
      return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

  for leaf in jax.tree.leaves(tree):  # start all copies before waiting for the first
    if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
      leaf.copy_to_host_async()
  return jax.tree.map(fetch, tree)
