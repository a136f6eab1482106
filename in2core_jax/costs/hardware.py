"""What a dry run compares with: the devices that are here, measured in seconds, or others by their data sheets."""

import dataclasses
import pathlib
import platform
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax.costs import device_memory, flop_counts, timing
from in2core_jax.errors import UserError
from in2core_jax.model import decoder

# Chip: memory in bytes, dense bfloat16 FLOP/s, bytes/s of all its links in one direction; from vendors' data sheets.
CHIPS = {
  "v4": (32e9, 275e12, 150e9),
  "v5e": (16e9, 197e12, 100e9),
  "v5p": (95e9, 459e12, 300e9),
  "v6e": (32e9, 918e12, 224e9),
  "a100": (80e9, 312e12, 300e9),
  "h100": (80e9, 989e12, 450e9),
  "h200": (141e9, 989e12, 450e9),
}
# The number in these names counts cores, two of which make a chip: v5p-32 has 16 chips, each one device.
_NAMED_BY_CORES = ("v4", "v5p")
# Share of the data sheet's FLOP/s that a pass reaches: least, expected, most. An assumption until it is measured there.
SHARES = (0.25, 0.4, 0.55)
PRODUCT_SIZE = 2048  # n of the matrix product that is measured here
_TENSOR_CORES = ("a100", "h100", "h200")  # whose float32 products run at half the bfloat16 rate (TF32)


@dataclasses.dataclass(frozen=True)
class Hardware:
  """Devices that are all alike.

  Attributes:
    name: as in `--hardware`, or what JAX calls the devices here.
    count: devices.
    memory: bytes of one device that a run may plan with.
    rates: FLOP/s of one device in this model's passes: least, expected, most.
    link: bytes/s between devices, or 0 where that is not known.
    measured: whether the rates were measured here.
    shares_host: device memory is the machine's memory (CPU).
  """

  name: str
  count: int
  memory: int
  rates: tuple[float, float, float]
  link: float = 0.0
  measured: bool = False
  shares_host: bool = False

  def seconds(self, flops: float, gathered: float = 0.0) -> tuple[float, float, float]:
    """(least, expected, most) seconds of FLOPs over all devices; the most hides no gathering of parameters behind them.

    Args:
      flops: of all devices together.
      gathered: bytes that each device receives.
    """
    wait = gathered / self.link if self.link else 0.0
    slow, usual, fast = (flops / self.count / rate for rate in self.rates)
    return max(fast, wait), max(usual, wait), slow + wait


def on_paper(name: str, dtype: str) -> Hardware:
  """Hardware by name and number of devices: v5e-8, v5p-32 (16 chips), h100-8.

  Raises:
    UserError: a name that is not known.
  """
  found = re.fullmatch(r"(\w+)-(\d+)", name)
  if not found or found[1] not in CHIPS or int(found[2]) < 1:
    raise UserError(f"--hardware={name} is not known; use a chip and a number such as v5e-8: {', '.join(CHIPS)}")
  memory, rate, link = CHIPS[found[1]]
  count = max(1, int(found[2]) // (2 if found[1] in _NAMED_BY_CORES else 1))
  rate /= 2 if dtype == "float32" and found[1] in _TENSOR_CORES else 1
  usable = int(memory * device_memory.ACCELERATOR_SHARE)
  return Hardware(name, count, usable, tuple(rate * share for share in SHARES), link)


# ---- here ----------------------------------------------------------------------------


def processor() -> str:
  """The processor's name where the system tells it; else its kind, such as aarch64."""
  file = pathlib.Path("/proc/cpuinfo")
  lines = file.read_text().splitlines() if file.is_file() else []
  return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def here(config: decoder.ModelConfig, dtype: str, rows: int, length: int) -> Hardware:
  """The devices that JAX sees, with rates measured on one of them in a few seconds.

  One layer of the model's own shape, forward, gives the expected rate; a plain matrix product, which nothing beats,
  the most; half of the layer's rate the least, since derivatives move more memory and machines are shared.

  Args:
    config: the model's shape.
    dtype: of the weights.
    rows: W of the layer's batch.
    length: T.
  """
  device = jax.local_devices()[0]
  on_cpu = device.platform == "cpu"
  share = jax.local_device_count() if on_cpu else 1  # simulated devices share the cores
  work, flops = timing.matrix_product(PRODUCT_SIZE, 1 if on_cpu else 16, jnp.dtype(dtype))
  product = flops / _best_seconds(work) / share
  layer = layer_rate(config, dtype, rows, length) / share
  rates = (0.5 * layer, layer, max(layer, product))
  # On a CPU it is asked whether things fit at all, not how large a batch may grow beside others.
  memory = device_memory.device_bytes(device) if on_cpu else device_memory.usable_bytes(device)
  return Hardware(device.device_kind, len(jax.devices()), memory, rates, 0.0, True, on_cpu)


def layer_rate(config: decoder.ModelConfig, dtype: str, rows: int, length: int) -> float:
  """FLOP/s of one layer's forward pass over W rows of T tokens, on the first device."""
  shape = dataclasses.replace(config, num_layers=1, vocab_size=2)
  with jax.default_device(jax.local_devices()[0]):
    params = decoder.init_params(shape, jax.random.key(0), jnp.dtype(dtype))["layers"]
    hidden = jax.random.normal(jax.random.key(1), (rows, length, config.hidden_size), jnp.dtype(dtype))
    offsets = jnp.broadcast_to(jnp.arange(length), (rows, length))
    run = jax.jit(lambda p, h, o: decoder.run_layers(shape, p, h, o))
    seconds = _best_seconds(lambda: run(params, hidden, offsets))
  a_layer = flop_counts.layer_matrices({"layers": params})
  sizes = flop_counts.Sizes(a_layer, 0, 0, 1, 0, config.num_heads * config.head_dim, 0, False, 0, ())
  return flop_counts.below_flops(sizes, flop_counts.Work(rows * length, rows * length**2)) / seconds


def _best_seconds(run, budget: float = 0.5, most: int = 20) -> float:
  """Least seconds of a call after a first one that compiles; stops after `most` calls or `budget` seconds."""
  jax.block_until_ready(run())
  found, end = [], time.perf_counter() + budget
  while not found or (len(found) < most and time.perf_counter() < end):
    began = time.perf_counter()
    jax.block_until_ready(run())
    found.append(time.perf_counter() - began)
  return float(np.min(found))
