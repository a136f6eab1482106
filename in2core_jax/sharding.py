"""Where numbers live on several devices: the mesh, the partition rules, batches, and the start of several processes.

Axes of the mesh, outermost (slowest links) first
  data     examples only: every group of devices along it holds the same parameters
  fsdp     examples too, and every parameter and iHVP vector is cut along it; the scan gathers one layer at a time
  tensor   the inner width of attention and MLP is cut along it, examples are not

A leaf's partition_spec follows from its path: the first rule whose regex is found in the path wins. Vectors shaped
like the subtree (queries, iHVPs, LiSSA states, optimizer moments) have the same paths, hence the same specs. Jitted
code knows nothing of all this: the axes are of type Auto, so `jax.jit` propagates the shardings of its arguments.

With several processes every process runs the same programs on the same global arrays; it holds its own devices' part.
A process that shall work alone makes its mesh from `jax.local_devices()` and takes its `process_slice` of the work.
"""

import importlib.util
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from in2core_jax.errors import UserError

Tree = Any
Rules = Sequence[tuple[str, PartitionSpec]]

AXES = ("data", "fsdp", "tensor")
# Examples go over fsdp as well: devices that hold different parts of the weights and saw the same examples would all
# compute the same thing. It also makes fsdp exact data parallelism in cost, with parameter memory divided by its size.
BATCH_AXES = ("data", "fsdp")

_P = PartitionSpec
_INTO = r"(q_proj|k_proj|v_proj|gate_proj|up_proj)"  # D -> inner width
_OUT_OF = r"(o_proj|down_proj)"  # inner width -> D

# regex found in the leaf's path -> spec of the leaf. Axis 0 of a layer leaf is the stack of layers, which the scan
# slices: cut along the mesh, each step would have to fetch its layer from one owner, so it is never sharded.
PARTITION_RULES: Rules = (
  (rf"layers/.*{_INTO}/kernel$", _P(None, "fsdp", "tensor")),
  (rf"layers/.*{_OUT_OF}/kernel$", _P(None, "tensor", "fsdp")),
  (rf"layers/.*{_INTO}/(lora_a|left)$", _P(None, "fsdp", None)),
  (rf"layers/.*{_INTO}/(lora_b|right)$", _P(None, None, ("tensor", "fsdp"))),
  (rf"layers/.*{_OUT_OF}/(lora_a|left)$", _P(None, ("tensor", "fsdp"), None)),
  (rf"layers/.*{_OUT_OF}/(lora_b|right)$", _P(None, None, "fsdp")),
  (r"layers/.*/core$", _P(None, "fsdp", None)),
  (rf"layers/.*{_INTO}/bias$", _P(None, "tensor")),
  (rf"layers/.*{_OUT_OF}/bias$", _P()),
  (r"(layers/\w+|final)_norm/scale$", _P()),
  (r"embed/embedding$", _P("tensor", "fsdp")),
  (r"lm_head/kernel$", _P("fsdp", "tensor")),
)


def make_mesh(spec: str = "", devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Reads the `--mesh` language: data:4,fsdp:2 | data:-1,fsdp:2 (the rest) | nothing (all devices on `data`).

  Args:
    spec: axis:size pairs; axes that are not named have size 1, except that `data` takes the rest of an empty spec.
    devices: all devices of all processes by default; `jax.local_devices()` for a process that works alone.

  Returns:
    Mesh with the axes `AXES`, all of type Auto.

  Raises:
    UserError: an axis that does not exist, a size that is not understood, or a product that is not the device count.

  Example:
    make_mesh("fsdp:2,data:-1").shape == {"data": 4, "fsdp": 2, "tensor": 1} on eight devices
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = _parse_mesh(spec)
  rest = [axis for axis, size in sizes.items() if size == -1]
  given = int(np.prod([size for size in sizes.values() if size != -1]))
  if rest and len(devices) % given == 0:
    sizes[rest[0]] = len(devices) // given
  elif rest or given != len(devices):
    processes = len({device.process_index for device in devices})
    asked = f"a multiple of {given} devices" if rest else f"{given} devices"
    raise UserError(
      f"--mesh={spec} needs {asked}, but there are {len(devices)} {devices[0].platform} devices in {processes} "
      f"process(es); use for example --mesh={_fitting_spec(sizes, len(devices))}"
    )
  shape = tuple(sizes[axis] for axis in AXES)
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _parse_mesh(spec: str) -> dict[str, int]:
  usage = f"use axis:size pairs such as data:4,fsdp:2; axes are {', '.join(AXES)}, one size may be -1 (the rest)"
  if not spec.strip():
    return {"data": -1, "fsdp": 1, "tensor": 1}
  sizes: dict[str, int] = {}
  for part in spec.split(","):
    pair = re.fullmatch(r"\s*(\w+)\s*[:=]\s*(-1|[1-9]\d*)\s*", part)
    if not pair:
      raise UserError(f"--mesh={spec}: {part.strip()!r} is not understood; {usage}")
    if pair[1] not in AXES or pair[1] in sizes:
      raise UserError(f"--mesh={spec}: {'repeated' if pair[1] in sizes else 'unknown'} axis {pair[1]!r}; {usage}")
    sizes[pair[1]] = int(pair[2])
  if list(sizes.values()).count(-1) > 1:
    raise UserError(f"--mesh={spec}: only one axis can take the rest; {usage}")
  return {axis: sizes.get(axis, 1) for axis in AXES}


def _fitting_spec(sizes: Mapping[str, int], num_devices: int) -> str:
  """A spec near the one that was asked for: fsdp and tensor cut down to divisors, data takes the rest."""
  tensor = int(np.gcd(max(sizes["tensor"], 1), num_devices))
  fsdp = int(np.gcd(max(sizes["fsdp"], 1), num_devices // tensor))
  near = {"data": num_devices // (tensor * fsdp), "fsdp": fsdp, "tensor": tensor}
  return ",".join(f"{axis}:{size}" for axis, size in near.items() if size > 1 or axis == "data")


def batch_multiple(mesh: Mesh) -> int:
  """How many shards the example axis is cut into: batch sizes must be a multiple of it (`Batcher.multiple_of`)."""
  return int(np.prod([mesh.shape.get(axis, 1) for axis in BATCH_AXES]))


# ---- partition rules -----------------------------------------------------------------


def param_specs(params: Tree, mesh: Mesh, rules: Rules = PARTITION_RULES, strict: bool = False) -> Tree:
  """partition_spec of every leaf, by the first rule whose regex is found in the leaf's path.

  Rules match the end of a path, so an optimizer state (".../mu/layers/mlp/up_proj/kernel") is covered as well; scalars
  are replicated without a rule. Mesh axes of size 1 are left out of the specs.

  Args:
    params: tree of arrays or shapes, layers stacked on axis 0.
    mesh: from `make_mesh`.
    rules: (regex, PartitionSpec) pairs.
    strict: refuse a dimension that its mesh axes do not divide, instead of replicating it and logging a note.

  Returns:
    Tree like `params` of PartitionSpec.

  Raises:
    UserError: leaves that no rule covers (all are listed), a rule with more dimensions than its leaf, or, when strict,
      dimensions that do not divide.
  """
  specs, notes = _specs(params, mesh, rules, first=0)
  _report(notes, strict)
  return specs


def vector_specs(sub: Tree, mesh: Mesh, query_axis: bool, rules: Rules = PARTITION_RULES, strict: bool = False) -> Tree:
  """partition_spec of vectors shaped like the subtree: those of the parameters, behind a query axis that is not cut.

  Args:
    sub: the vectors (arrays or shapes): leaves [k, ...], or [Q, k, ...] with `query_axis`.
    mesh: from `make_mesh`.
    query_axis: whether every leaf has a leading query axis Q.
    rules: as for `param_specs`.
    strict: as for `param_specs`.

  Returns:
    Tree like `sub` of PartitionSpec.
  """
  specs, notes = _specs(sub, mesh, rules, first=int(query_axis))
  _report(notes, strict)
  return specs


def partition_notes(params: Tree, mesh: Mesh, rules: Rules = PARTITION_RULES) -> list[str]:
  """What the rules would cut and the sizes forbid, one line per leaf and dimension; empty when everything divides."""
  return _specs(params, mesh, rules, first=0)[1]


def shardings(specs: Tree, mesh: Mesh) -> Tree:
  """NamedSharding for every spec: for `jax.jit`'s in_shardings and out_shardings, or `with_sharding_constraint`."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, _P))


def _report(notes: Sequence[str], strict: bool):
  if notes and strict:
    raise UserError(f"{len(notes)} dimensions do not divide: {'; '.join(notes)}; choose other --mesh sizes")
  for note in notes:
    logging.getLogger(__name__).info("%s", note)


def _specs(tree: Tree, mesh: Mesh, rules: Rules, first: int) -> tuple[Tree, list[str]]:
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  compiled = [(re.compile(pattern), spec) for pattern, spec in rules]
  specs, notes, uncovered = [], [], []
  for keys, leaf in leaves:
    path, shape = jax.tree_util.keystr(keys, simple=True, separator="/"), tuple(np.shape(leaf))[first:]
    rule = _P() if not shape else next((spec for pattern, spec in compiled if pattern.search(path)), None)
    if rule is None:
      uncovered.append(f"{path} {list(shape)}")
      continue
    spec, reasons = _fit(rule, path, shape, mesh)
    specs.append(_P(*[None] * first, *spec) if spec else _P())
    notes.extend(reasons)
  if uncovered:
    raise UserError(
      f"no partition rule covers {len(uncovered)} leaves: {', '.join(uncovered)}; add a (regex, PartitionSpec) rule"
    )
  return jax.tree_util.tree_unflatten(structure, specs), notes


def _fit(rule: PartitionSpec, path: str, shape: tuple[int, ...], mesh: Mesh) -> tuple[list, list[str]]:
  """The entries of `rule` that `mesh` has and `shape` can follow, and a note for each one that it cannot."""
  if len(rule) > len(shape):
    raise UserError(f"partition rule {rule} has {len(rule)} dimensions, but {path} has shape {list(shape)}")
  entries, notes = [], []
  for size, names in zip(shape, rule, strict=False):
    kept, parts = [], 1
    for name in (names,) if isinstance(names, str) else names or ():
      pieces = mesh.shape.get(name, 1)
      if size % (parts * pieces):
        notes.append(f"{path} {list(shape)}: {size} does not divide by {parts * pieces}, replicated over {name!r}")
      elif pieces > 1:
        kept, parts = [*kept, name], parts * pieces
    entries.append(tuple(kept) if len(kept) > 1 else kept[0] if kept else None)
  while entries and entries[-1] is None:
    entries.pop()
  return entries, notes


# ---- placing and fetching ------------------------------------------------------------


def place_params(params: Tree, mesh: Mesh, rules: Rules = PARTITION_RULES, strict: bool = False) -> Tree:
  """Puts parameters (or a subtree, or an optimizer state) onto the mesh as `param_specs` says, one leaf at a time.

  NumPy leaves, also memory-mapped ones, are read slice by slice: the host never holds a second copy of a leaf, and a
  process reads only what its own devices hold. With several processes all of them pass the same values.

  Returns:
    Tree of jax.Array.
  """
  return place(params, mesh, param_specs(params, mesh, rules, strict))


def place_vectors(vectors: Tree, mesh: Mesh, query_axis: bool, rules: Rules = PARTITION_RULES) -> Tree:
  """Puts vectors shaped like the subtree onto the mesh as `vector_specs` says."""
  return place(vectors, mesh, vector_specs(vectors, mesh, query_axis, rules))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
  """Puts a whole copy of every leaf onto every device; all processes pass the same values."""
  return place(tree, mesh, jax.tree.map(lambda _: _P(), tree))


def place(tree: Tree, mesh: Mesh, specs: Tree) -> Tree:
  """Puts every leaf onto the mesh under its spec (a tree like `tree` of PartitionSpec)."""
  return jax.tree.map(_put, tree, shardings(specs, mesh))


def _put(leaf, sharding: NamedSharding) -> jax.Array:
  if isinstance(leaf, jax.Array) and (sharding.is_fully_addressable or not leaf.is_fully_addressable):
    return jax.device_put(leaf, sharding)  # device to device; XLA moves the parts
  host = np.asanyarray(leaf)  # a single process's own array becomes part of a global one through the host
  return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def place_batch(batch: Tree, mesh: Mesh, per_process: bool = False) -> Tree:
  """Puts a batch onto the mesh, examples cut over `BATCH_AXES`; None leaves (no hidden states) stay None.

  Args:
    batch: pytree of host arrays [B, ...]: the whole batch, the same in every process (only its own rows are copied to
      a process's devices), or with `per_process` only the rows of this process, in the order of the processes.
    mesh: from `make_mesh`.
    per_process: whether `batch` holds this process's rows only; all processes must pass the same number of rows.

  Returns:
    Pytree of jax.Array [B, ...].

  Raises:
    UserError: leaves of different B, or a B that is not a multiple of the shards.
  """
  if getattr(batch, "offsets", None) is not None:  # packed: rows, and apart from them examples
    rows = {name: getattr(batch, name) for name in ("tokens", "hidden", "offsets")}
    rest = place_batch(batch._replace(**dict.fromkeys(rows)), mesh, per_process)
    return rest._replace(**place_batch(rows, mesh, per_process))
  if getattr(batch, "slots", None) is not None:  # [G, M]: one row for each shard, so it is cut like the examples
    rest = place_batch(batch._replace(slots=None), mesh, per_process)
    return rest._replace(slots=place_batch((batch.slots,), mesh, per_process)[0])
  sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
  if len(sizes) != 1 or sizes == {()}:
    raise UserError(f"a batch needs leaves [B, ...] of one size B, got leading axes {sorted(sizes)}")
  sharding = NamedSharding(mesh, _P(BATCH_AXES) if set(BATCH_AXES) <= set(mesh.axis_names) else _P("data"))
  size, shards = sizes.pop()[0], batch_multiple(mesh)
  if per_process:
    size *= len({device.process_index for device in mesh.devices.flat})
  if size % shards:
    raise UserError(
      f"a batch of {size} examples cannot be cut over {shards} devices ({'x'.join(BATCH_AXES)} of the mesh): "
      f"pad it to a multiple of {shards} (Batcher(multiple_of=sharding.batch_multiple(mesh)) does)"
    )
  if per_process:
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)
  return jax.tree.map(lambda leaf: _put(leaf, sharding), batch)


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


# ---- several processes ---------------------------------------------------------------


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
  try:
    jax.distributed.initialize(**settings, initialization_timeout=timeout)
  except (jax.errors.JaxRuntimeError, ValueError, OSError) as error:
    where = settings.get("coordinator_address", "detected TPU pod slice")
    raise UserError(
      f"the processes did not find each other ({where}): {error}; start all of them with the same --coordinator and "
      "--num_processes and a --process_id each, or give --num_processes=1 to work alone"
    ) from error
  return True


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


def process_slice(n: int) -> slice:
  """This process's share of n pieces of work: contiguous, sizes differ by at most one, nothing twice or left out."""
  index, count = jax.process_index(), jax.process_count()
  return slice(n * index // count, n * (index + 1) // count)
