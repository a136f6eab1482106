"""Where numbers live on several devices: the mesh, the partition rules, batches.

Axes of the mesh, outermost (slowest links) first
  data     examples only: every group of devices along it holds the same parameters
  fsdp     examples too, and every parameter and iHVP vector is cut along it; the scan gathers one layer at a time
  tensor   the inner width of attention and MLP is cut along it, examples are not

A leaf's partition_spec follows from its path: the first rule whose regex is found in the path wins. Vectors shaped
like the subtree (queries, iHVPs, LiSSA states, optimizer moments) have the same paths, hence the same specs. Jitted
code knows nothing of all this: the axes are of type Auto, so `jax.jit` propagates the shardings of its arguments.

With several processes every process runs the same programs on the same global arrays; it holds its own devices' part.
A process that shall work alone makes its mesh from `jax.local_devices()`.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from in2core_jax.errors import UserError, how_many

Tree = Any
Rules = Sequence[tuple[str, PartitionSpec]]

AXES = ("data", "fsdp", "tensor")
# Examples go over fsdp as well: devices that hold different parts of the weights and saw the same examples would all
# compute the same thing. It also makes fsdp exact data parallelism in cost, with parameter memory divided by its size.
BATCH_AXES = ("data", "fsdp")

_P = PartitionSpec
_INTO = r"(q_proj|k_proj|v_proj|gate_proj|up_proj)"  # D -> inner width
_OUT_OF = r"(o_proj|down_proj)"  # inner width -> D
_KEPT = r"(/(codes|scale|parts/.*))?"  # of a matrix in few bits (`quantisation`), whose codes and scales have its axes

# regex found in the leaf's path -> spec of the leaf. Axis 0 of a layer leaf is the stack of layers, which the scan
# slices: cut along the mesh, each step would have to fetch its layer from one owner, so it is never sharded.
PARTITION_RULES: Rules = (
  (rf"layers/.*{_INTO}/kernel{_KEPT}$", _P(None, "fsdp", "tensor")),
  (rf"layers/.*{_OUT_OF}/kernel{_KEPT}$", _P(None, "tensor", "fsdp")),
  # Experts keep their own axis whole, and a device computes its part of every expert.
  (rf"layers/.*{_INTO}/experts{_KEPT}$", _P(None, None, "fsdp", "tensor")),
  (rf"layers/.*{_OUT_OF}/experts{_KEPT}$", _P(None, None, "tensor", "fsdp")),
  (rf"layers/.*{_INTO}/expert_bias$", _P(None, None, "tensor")),
  (r"layers/mlp/\w*router/(kernel|lora_a|left)$", _P(None, "fsdp", None)),
  (r"layers/.*(expert_bias|router/\w+|attention/sinks|mlp/correction)$", _P()),
  (rf"layers/.*{_INTO}/(lora_a|left)$", _P(None, "fsdp", None)),
  (rf"layers/.*{_INTO}/(lora_b|right)$", _P(None, None, ("tensor", "fsdp"))),
  (rf"layers/.*{_OUT_OF}/(lora_a|left)$", _P(None, ("tensor", "fsdp"), None)),
  (rf"layers/.*{_OUT_OF}/(lora_b|right)$", _P(None, None, "fsdp")),
  (r"layers/.*/core$", _P(None, "fsdp", None)),
  (r"layers/.*/lora_scale$", _P()),
  (rf"layers/.*{_INTO}/bias$", _P(None, "tensor")),
  (rf"layers/.*{_OUT_OF}/bias$", _P()),
  (r"(layers/(attention/)?\w+|final)_norm/scale$", _P()),
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
  processes = len({device.process_index for device in devices})
  found = f"{how_many(len(devices), f'{devices[0].platform} device')} in {how_many(processes, 'process[es]')}"
  shape = mesh_shape(spec, len(devices), found)
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(spec: str, num_devices: int, found: str) -> tuple[int, ...]:
  """Sizes of the axes `AXES` for so many devices; `found` names them in messages. Raises as `make_mesh` does."""
  sizes = _parse_mesh(spec)
  rest = [axis for axis, size in sizes.items() if size == -1]
  given = int(np.prod([size for size in sizes.values() if size != -1]))
  if rest and num_devices % given == 0:
    sizes[rest[0]] = num_devices // given
  elif rest or given != num_devices:
    asked = f"a multiple of {how_many(given, 'device')}" if rest else how_many(given, "device")
    raise UserError(
      f"--mesh={spec} needs {asked}, and this job has {found}; use for example "
      f"--mesh={_fitting_spec(sizes, num_devices)}"
    )
  return tuple(sizes[axis] for axis in AXES)


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


def shardings(specs: Tree, mesh: Mesh) -> Tree:
  """NamedSharding for every spec: for `jax.jit`'s in_shardings and out_shardings, or `with_sharding_constraint`."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, _P))


def _report(notes: Sequence[str], strict: bool):
  if notes and strict:
    raise UserError(
      f"{how_many(len(notes), 'dimension[s] [does|do]')} not divide: {'; '.join(notes)}; choose other --mesh sizes"
    )
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
      f"no partition rule covers {how_many(len(uncovered), 'lea[f|ves]')}: {', '.join(uncovered)}; add a (regex, "
      "PartitionSpec) rule"
    )
  return jax.tree_util.tree_unflatten(structure, specs), notes


def _fit(rule: PartitionSpec, path: str, shape: tuple[int, ...], mesh: Mesh) -> tuple[list, list[str]]:
  """The entries of `rule` that `mesh` has and `shape` can follow, and a note for each one that it cannot."""
  if len(rule) > len(shape):
    raise UserError(f"partition rule {rule} has {how_many(len(rule), 'dimension')}, but {path} has shape {list(shape)}")
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
      f"a batch of {how_many(size, 'example')} cannot be cut over {shards} devices ({'x'.join(BATCH_AXES)} of the "
      f"mesh): pad it to a multiple of {shards} (Batcher(multiple_of=sharding.batch_multiple(mesh)) does)"
    )
  if per_process:
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)
  return jax.tree.map(lambda leaf: _put(leaf, sharding), batch)
