"""Prices passes over the data: the plans of the real run through the cost model, without reading a weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from in2core_jax.costs import device_memory, flop_counts, memory
from in2core_jax.costs.hardware import Hardware
from in2core_jax.data import packed_rows, packing
from in2core_jax.errors import how_many
from in2core_jax.model import embeddings, experts, hidden_cache
from in2core_jax.parallel import sharding
from in2core_jax.params import subtree
from in2core_jax.pipeline import auto_batch, phases, shapes
from in2core_jax.pipeline.loaded_model import open_model
from in2core_jax.pipeline.session import Session, make_session, read_described
from in2core_jax.pipeline.settings import Settings
from in2core_jax.pipeline.splits import Splits

FLOAT = 4  # bytes
_GATHERS = {"losses": 1, "jvp": 1}  # how often a pass runs through the layers; others come back through them


@dataclasses.dataclass(frozen=True)
class Phase:
  """A part of a stage.

  Attributes:
    stage: finetune, select or evaluate.
    name: in words.
    flops: of all devices together.
    device: bytes on one device by purpose: parameters, vectors, program.
    host: bytes of the machine's memory that stay occupied afterwards (boundary cache).
    disk: bytes written.
    gathered: bytes that each device receives when parameters are cut over devices.
  """

  stage: str
  name: str
  flops: float = 0.0
  device: dict[str, float] = dataclasses.field(default_factory=dict)
  host: float = 0.0
  disk: float = 0.0
  gathered: float = 0.0

  @property
  def device_bytes(self) -> float:
    """On one device, in all."""
    return sum(self.device.values())


@dataclasses.dataclass(frozen=True)
class Described:
  """A session of which no weight is read, perhaps for devices elsewhere.

  Attributes:
    session: examples, the model's shape, and batches that follow from them.
    elsewhere: devices that are not here; None: those that JAX sees.
  """

  session: Session
  elsewhere: Hardware | None = None

  def varied(self, **changes) -> Described:
    """The same data with other settings of batches, devices and solver."""
    s, session = self.session.settings.replace(**changes), self.session
    described = session.model.config, session.model.tokenizer
    return Described(described_session(s, described, session.splits, self.elsewhere), self.elsewhere)


def described(s: Settings, elsewhere: Hardware | None = None) -> Described:
  """What --dry_run prices: reads the data and the model's shape.

  Args:
    s: the flags of the run.
    elsewhere: devices that are not here; those that JAX sees when None.

  Raises:
    UserError: whatever is wrong with flags, model or data.
  """
  return Described(described_session(s, *read_described(s), elsewhere), elsewhere)


def described_session(s: Settings, described: tuple, splits: Splits, elsewhere: Hardware | None = None) -> Session:
  """A session of which no weight is read; `described` is the model's (config, tokenizer)."""
  model = open_model(s, described, _mesh(s, elsewhere))
  return make_session(s, splits, model, lambda work, _: _expected_batch(work, elsewhere))


def _mesh(s: Settings, elsewhere: Hardware | None) -> Any:
  """By `--mesh`, of devices here or on paper."""
  if elsewhere is None:
    return sharding.make_mesh(s.mesh)
  found = f"{how_many(elsewhere.count, 'device')} ({elsewhere.name})"
  return AbstractMesh(sharding.mesh_shape(s.mesh, elsewhere.count, found), sharding.AXES)


def _expected_batch(work: auto_batch.Work, elsewhere: Hardware | None) -> int:
  """`--batch_tokens=auto`: what the cost model expects to fit, without compiling."""
  if elsewhere is None:
    device = jax.local_devices()[0]
    usable, most = device_memory.usable_bytes(device), device_memory.most_tokens(device, work.mesh)
  else:
    usable, most = elsewhere.memory, device_memory.DEVICE_TOKENS * sharding.batch_multiple(work.mesh)
  return auto_batch.estimated_batch(work, usable - work.resident_bytes, most)


class Pricer:
  """Prices passes over the data at one subtree of the model."""

  def __init__(self, session: Session, stage: str, params: Any, tree: subtree.Subtree):
    """Prepares sizes; `params` are shapes."""
    self.session, self.stage, self.params, self.tree = session, stage, params, tree
    config, size = session.model.config, session.batching
    share = 1.0
    if config.num_experts:
      rows, length = max(1, size.batch_tokens // session.settings.max_length), session.settings.max_length
      share = experts.share(rows, length, config.experts_per_token, config.num_experts)
    self.sizes = flop_counts.matrix_sizes(params, tree, share)
    self.sub = flop_counts.split_shapes(params, tree)[0]
    self.cached = session.hidden.where.serves(tree)
    self.groups = sharding.batch_multiple(session.batching.mesh)

  # ---- plans: the same as those of the run

  def packed(self, part: str, rows=None) -> flop_counts.Work:
    """Scored as packed rows."""
    return flop_counts.packed_work(
      self.session.packer(part, rows=rows).sequential_plan(self.session.batching.batch_tokens)
    )

  def by_row(self, part: str, rows=None, every_slot: bool = True) -> flop_counts.Work:
    """With a row for each example; `every_slot`: under `vmap`, which computes all response slots."""
    batcher = self.session.batcher(part, rows=rows)
    plan = batcher.sequential_plan(self.session.batching.batch_tokens)
    return flop_counts.row_work(plan, None if every_slot else batcher.layout_of(plan), self.groups)

  # ---- memory of a device

  def device(self, program: float, vectors: float = 0.0) -> dict[str, float]:
    """Bytes by purpose: parameters with the copies that `split` makes, vectors like the subtree, a program."""
    session, mesh = self.session, self.session.batching.mesh
    params = memory.tree_bytes(self.params, mesh) + memory.copied_bytes(self.params, self.tree, mesh)
    return {
      "parameters": params,
      "vectors": vectors * memory.tree_bytes(self.sub, mesh, np.float32),
      "program": program + memory.gathered_bytes(session.model.config, self.params, mesh),
    }

  def program(self, kind: str, batches: tuple[packing.PackedShape, ...], queries: int = 1) -> int:
    """Bytes of the program of a pass over packed rows."""
    programs = [memory.Program(kind, shape.height, shape.num_tokens, shape.num_slots, queries) for shape in batches]
    config, dtype = self.session.model.config, self.session.settings.dtype
    return max(memory.program_bytes(config, self.sizes, program, dtype) for program in programs)

  def mapped(self, whole_batch: bool = False) -> float:
    """Bytes of a pass of per-example gradients: `microbatch` of them at a time, or of a whole batch kept at once."""
    session, s = self.session, self.session.settings
    most = 0.0
    for shape, layout in session.batching.layout.items():
      together = min(-(-s.microbatch // self.groups), layout.size)
      one = memory.Program("gradient", 1, shape.num_tokens, shape.num_responses)
      kept = layout.size // self.groups if whole_batch else together
      program = together * memory.program_bytes(session.model.config, self.sizes, one, s.dtype)
      most = max(most, program + FLOAT * self.sizes.subtree * (kept + together))
    return most

  # ---- phases

  def gathered(self, numbers: int, batches: float) -> float:
    """Bytes that a device receives when so many numbers are cut over devices and every batch needs them whole."""
    cut = self.session.batching.mesh.shape["fsdp"]
    return batches * numbers * jnp.dtype(self.session.settings.dtype).itemsize * (cut - 1) / cut

  def phase(self, name: str, flops: float, device: dict, batches: float, disk: float = 0.0) -> Phase:
    """A phase of this stage, in which so many batches run through the layers."""
    numbers = self.sizes.above + (0 if self.cached else self.sizes.below)
    return Phase(self.stage, name, flops, device, disk=disk, gathered=self.gathered(numbers, batches))

  @property
  def boundary(self) -> int | None:
    """The lowest chosen layer, below which hidden states are kept; None where they are not."""
    return self.tree.boundary if self.cached else None

  def fill(self, part: str) -> Phase:
    """Filling the boundary cache."""
    session, s, dataset = self.session, self.session.settings, self.session.splits[part]
    plan = packed_rows.packed_plan(dataset.num_tokens, session.batching.batch_tokens, self.groups)
    work = flop_counts.boundary_work(plan)
    most = max((height * length, height, length) for length, height, _ in plan)
    program = memory.Program("losses", -(-most[1] // self.groups), most[2], 0)
    size = hidden_cache.cache_bytes(dataset.num_tokens, session.model.config.hidden_size, jnp.dtype(s.dtype))
    host, disk = (0.0, size) if session.hidden.where.on_disk(size) else (size, 0.0)
    name = phases.hidden(self.tree.boundary, part)
    device = self.device(memory.program_bytes(session.model.config, self.sizes, program, s.dtype))
    moved = self.gathered(self.sizes.below, work.batches)
    return Phase(self.stage, name, flop_counts.below_flops(self.sizes, work), device, host, disk, moved)

  def reference(self, *parts: str) -> list[Phase]:
    """Log probabilities of preference pairs at the reference model, which runs as a whole."""
    session, found = self.session, []
    s = session.settings
    params = shapes.param_shapes(session.model.config, s.dtype, 0, s.frozen_weights)
    for part in (part for part in parts if session.splits[part].second is not None):
      whole = Pricer(session, self.stage, params, subtree.make_subtree(params, "last:1", "all"))
      whole.cached = False
      work = whole.packed(part)
      found.append(whole.packed_pass(phases.reference(part), "losses", work))
    return found

  def hidden_states(self, part: str) -> Phase:
    """The hidden states above the top layer; those that are kept below the chosen layers are not made again."""
    session = self.session
    plan = packed_rows.packed_plan(session.splits[part].num_tokens, session.batching.batch_tokens, self.groups)
    work = flop_counts.boundary_work(plan)
    whole = Pricer(session, self.stage, self.params, embeddings.above_all(session.model.config.num_layers))
    flops = flop_counts.below_flops(whole.sizes, work) - (
      flop_counts.below_flops(self.sizes, work) if self.cached else 0.0
    )
    rows, length = max(((height, length) for length, height, _ in plan), key=lambda shape: shape[0] * shape[1])
    program = memory.Program("losses", -(-rows // self.groups), length, 0)
    device = whole.device(memory.program_bytes(session.model.config, whole.sizes, program, session.settings.dtype))
    return self.phase(phases.embedded(part), flops, device, work.batches)

  def packed_pass(self, name: str, kind: str, work: flop_counts.Work, passes: int = 1, vectors: float = 0.0) -> Phase:
    """Passes of one kind over packed rows."""
    flops = passes * flop_counts.pass_flops(self.sizes, kind, work, self.cached)
    device = self.device(self.program(kind, self.session.batching.packed_shapes), vectors)
    return self.phase(name, flops, device, passes * work.batches * _GATHERS.get(kind, 2))

  def mapped_pass(
    self, name: str, work: flop_counts.Work, more: float, vectors: float, whole_batch: bool = False
  ) -> Phase:
    """A pass of per-example gradients and `more` FLOPs with them."""
    flops = flop_counts.pass_flops(self.sizes, "gradient", work, self.cached) + more
    return self.phase(name, flops, self.device(self.mapped(whole_batch), vectors), 2 * work.batches)
