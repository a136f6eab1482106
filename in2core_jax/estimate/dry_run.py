"""--dry_run: what a stage would take, told before any work: FLOPs, memory, disk, seconds, and what would not fit.

./run.sh select --dry_run --layers=last:8
./run.sh select --dry_run --hardware=v5p-32 --mesh=fsdp:16 --model=random:config.json
"""

import dataclasses
import itertools

from in2core_jax.costs import hardware
from in2core_jax.costs.hardware import Hardware
from in2core_jax.errors import how_many
from in2core_jax.estimate import pricing, stage_phases
from in2core_jax.estimate.pricing import Described, Phase
from in2core_jax.parallel.host import host_bytes
from in2core_jax.params import subtree
from in2core_jax.pipeline import checks, shapes
from in2core_jax.pipeline.judging import too_small
from in2core_jax.pipeline.session import Session
from in2core_jax.pipeline.settings import Settings
from in2core_jax.report import table_text
from in2core_jax.runs import files


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a stage would take.

  Attributes:
    phases: in order.
    where: the devices.
    disk_free: bytes, or infinity where that cannot be known (gs://, devices elsewhere).
  """

  phases: list[Phase]
  where: Hardware
  disk_free: float

  @property
  def seconds(self) -> tuple[float, float, float]:
    """(least, expected, most) of all phases together."""
    each = [self.where.seconds(phase.flops, phase.gathered) for phase in self.phases]
    return tuple(sum(column) for column in zip(*each, strict=True))

  @property
  def flops(self) -> float:
    """Of all phases together."""
    return sum(phase.flops for phase in self.phases)

  def too_large(self) -> list[str]:
    """What does not fit, one line each; empty when everything does."""
    found, held = [], 0.0
    where = self.where
    for phase in self.phases:
      held += phase.host
      need = phase.device_bytes + (held / where.count if where.shares_host else 0.0)
      if need > where.memory:
        parts = ", ".join(f"{name} {_gb(size)}" for name, size in phase.device.items() if size > 0)
        cache = f", boundary cache {_gb(held)}" if where.shares_host and held else ""
        found.append(f"{phase.stage}, {phase.name}: {_gb(need)} of {_gb(where.memory)} on each device ({parts}{cache})")
    host = host_bytes()
    if where.measured and not where.shares_host and held > host:
      found.append(f"boundary caches: {_gb(held)} of the {_gb(host)} of this machine's memory")
    disk = sum(phase.disk for phase in self.phases)
    if disk > self.disk_free:
      largest = max(self.phases, key=lambda phase: phase.disk)
      found.append(f"disk: {_gb(disk)} of {_gb(self.disk_free)} free, most of it for {largest.stage}, {largest.name}")
    return found


def estimate(described: Described, stage: str, where: Hardware) -> Estimate:
  """Prices a stage under the settings of the session."""
  s = described.session.settings
  free = float("inf") if described.elsewhere or files.is_remote(s.run_dir) else files.disk_free(s.run_dir)
  return Estimate(stage_phases.STAGES[stage](described.session, s), where, free)


# ---- what would help -----------------------------------------------------------------


def remedies(s: Settings, tokens: int, devices: int) -> dict[str, list]:
  """Flag -> values that need less, mild ones first; flags that change no number of a result come first."""
  found: dict[str, list] = {}
  if s.boundary_cache != "off":
    found["boundary_cache"] = [*([] if s.boundary_cache == "disk" else ["disk"]), "off"]
  less = lambda value: [value // 4**power for power in (1, 2, 3) if value // 4**power]  # noqa: E731
  found["batch_tokens"], found["microbatch"] = less(tokens), less(s.microbatch)
  found["mesh"] = [f"fsdp:{devices}"] if devices > 1 and "fsdp" not in s.mesh else []
  found["dtype"] = ["bfloat16"] if s.dtype == "float32" else []
  found["curvature_batch"], found["batch_size"] = less(s.curvature_batch), less(s.batch_size)
  return {name: values for name, values in found.items() if values}


def fixes(described: Described, stage: str, found: Estimate) -> list[str]:
  """Flags with which everything fits, as mild as will do: single ones, else pairs."""
  session = described.session
  known = remedies(session.settings, session.batching.batch_tokens, found.where.count)

  def fits(changes: dict) -> bool:
    return not estimate(described.varied(**changes), stage, found.where).too_large()

  for size in (1, 2):
    helpful = []
    for names in itertools.combinations(known, size):
      changes = {name: known[name][-1] for name in names}
      if not fits(changes):
        continue
      for name in names:
        changes[name] = next(value for value in known[name] if fits(changes | {name: value}))
      helpful.append(" ".join(f"--{name}={value}" for name, value in changes.items()))
    if helpful:
      return helpful
  return []


# ---- what is printed -----------------------------------------------------------------


def run(s: Settings, stage: str) -> None:
  """Prints what a stage would take; reads the data, but no weight, and makes no folder."""
  print(text(s, stage))


def text(s: Settings, stage: str) -> str:
  """What `run` prints.

  Raises:
    UserError: whatever is wrong with flags, model or data.
  """
  elsewhere = hardware.on_paper(s.hardware, s.dtype) if s.hardware else None
  described = pricing.described(s, elsewhere)
  session = described.session
  if stage in checks.BEFORE:
    checks.BEFORE[stage](session, s)
  longest = max(session.batching.packed_shapes, key=lambda shape: shape.num_tokens * shape.height)
  where = elsewhere or hardware.here(session.model.config, s.dtype, longest.height, longest.num_tokens)
  found = estimate(described, stage, where)
  small = too_small(session.splits["test"]) if stage in ("evaluate", "demo") else []
  lines = [*facts(session, stage, where), "", table(found), *totals(found), *small]
  too_large = found.too_large()
  if not too_large:
    return "\n".join([*lines, "Everything fits."])
  return "\n".join([*lines, *(f"Does not fit: {line}" for line in too_large), advice(described, stage, found)])


def advice(described: Described, stage: str, found: Estimate) -> str:
  """What to change when something does not fit."""
  helpful = fixes(described, stage, found)
  if helpful:
    return f"It fits with {' or '.join(helpful)}."
  session = described.session
  cut = "mesh" in remedies(session.settings, session.batching.batch_tokens, found.where.count)
  also = f", with --mesh=fsdp:{found.where.count}" if cut else ""
  return f"No two flags for batches and places are enough: choose fewer --layers or --modules{also}."


def facts(session: Session, stage: str, where: Hardware) -> list[str]:
  """What was chosen, and on what it would run."""
  s = session.settings
  every = subtree.count(shapes.param_shapes(session.model.config, s.dtype))
  kept = "" if s.frozen_weights == "full" else f", matrices of layers in {s.frozen_weights}"
  lines = [f"model: {every:,} parameters, {s.dtype}{kept}"]
  for name, stages, described in (
    ("trained", ("finetune", "evaluate", "demo"), shapes.trained_shapes),
    ("scored", ("select", "demo"), shapes.scored_shapes),
    ("sketched", ("index",), lambda config, own: shapes.scored_shapes(config, own.replace(modules="matrices"))),
  ):
    if stage in stages:
      params, tree = described(session.model.config, s)
      size = subtree.size_of(params, tree)
      layers = f"layers {tree.layers[0]} to {tree.layers[-1]}" if tree.layers else "no layer"
      lines.append(
        f"{name}: {size:,} parameters, {100 * size / every:.2f} %, {how_many(len(tree.layers), 'layer')} ({layers})"
      )
  counts = ", ".join(
    f"{part} {how_many(len(dataset), 'example')} of {int(dataset.num_tokens.sum()):,} tokens"
    for part, dataset in session.splits.items()
  )
  rows = ", ".join(f"{shape.height} x {shape.num_tokens}" for shape in session.batching.packed_shapes)
  mesh = ",".join(f"{axis}:{size}" for axis, size in session.batching.mesh.shape.items())
  rates = " to ".join(f"{rate / 1e9:,.0f}" for rate in (where.rates[0], where.rates[2]))
  origin = "measured here just now" if where.measured else "assumed from data sheets"
  return [
    *lines,
    f"data: {counts}",
    f"batches: {session.batching.batch_tokens:,} tokens, rows on a device: {rows}",
    f"devices: {where.count} x {where.name}, {_gb(where.memory)} each, mesh {mesh}; {rates} GFLOP/s each, {origin}",
  ]


def table(found: Estimate) -> str:
  """The phases, one a row."""
  rows = []
  for phase in found.phases:
    least, usual, most = found.where.seconds(phase.flops, phase.gathered)
    sizes = {f"{name} GB": round(phase.device.get(name, 0.0) / 1e9, 3) for name in ("parameters", "vectors", "program")}
    rows.append(
      {"stage": phase.stage, "phase": phase.name, "TFLOP": phase.flops / 1e12, "seconds": usual}
      | {"from": least, "to": most}
      | sizes
      | {"device GB": phase.device_bytes / 1e9, "memory kept GB": phase.host / 1e9, "disk GB": phase.disk / 1e9}
    )
  return table_text.markdown_table(rows, digits=3)


def totals(found: Estimate) -> list[str]:
  """Sums over the phases."""
  least, usual, most = found.seconds
  disk = sum(phase.disk for phase in found.phases)
  free = "" if found.disk_free == float("inf") else f" of {_gb(found.disk_free)} free"
  return [
    f"in all: {found.flops / 1e12:,.3g} TFLOP, about {_duration(usual)} ({_duration(least)} to {_duration(most)}): an "
    "estimate. Reading model and data, and compiling (a minute or so the first time), come on top.",
    f"device memory: {_gb(max(phase.device_bytes for phase in found.phases))} at most; disk: {_gb(disk)}{free}",
  ]


def _gb(size: float) -> str:
  return f"{size / 1e9:,.3g} GB"


def _duration(seconds: float) -> str:
  for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
    if seconds >= 2 * length:
      return f"{seconds / length:.3g} {unit}"
  return f"{seconds:.3g} seconds"
