"""Peak memory of loading a large folder: what the host holds above the weights that stay.

python -m experiments.benchmark.loading FOLDER GIGABYTES

writes a synthetic bfloat16 model of so many gigabytes into FOLDER, where it is not there yet, and loads it in processes
of their own: stacked on the host and placed afterwards, tensor by tensor onto the devices, and with the matrices of
layers in 8 and 4 bits. On a CPU the devices' copy counts as what stays; on an accelerator the first way holds all of it
on the host in addition.
"""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from in2core_jax.model import hf_config, hf_folder, peft_folder, stacks, weights
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.tensors import HF_NAMES
from in2core_jax.parallel import sharding

_SHARD = 500_000_000  # bytes
# Way -> (tensor by tensor, --frozen_weights)
_WAYS = {
  "stacked on the host": (False, "full"),
  "tensor by tensor": (True, "full"),
  "matrices in int8": (False, "int8"),
  "matrices in nf4": (False, "nf4"),
}


def synthetic(gigabytes: float) -> ModelConfig:
  """A decoder of about so many gigabytes as bfloat16."""
  shape = ModelConfig(32768, 2048, 5632, 1, 16, 16, 128, model_type="llama", tie_embeddings=False)
  sizes = peft_folder.shapes_of(shape)
  layer = sum(int(np.prod(size)) for leaf, size in sizes.items() if leaf.startswith("layers/"))
  outside = sum(int(np.prod(size)) for size in sizes.values()) - layer
  layers = max(1, round((gigabytes * 1e9 / 2 - outside) / layer))
  return ModelConfig(32768, 2048, 5632, layers, 16, 16, 128, model_type="llama", tie_embeddings=False)


def write(folder: pathlib.Path, config: ModelConfig) -> None:
  """Writes config.json and shards; no more than one of them is in memory."""
  folder.mkdir(parents=True, exist_ok=True)
  shapes: dict[str, tuple[int, ...]] = {}
  for leaf, size in peft_folder.shapes_of(config).items():
    of_layers = leaf.startswith("layers/")
    size = size[1:] if of_layers else size
    size = size[::-1] if leaf.endswith("/kernel") else size
    shapes |= {HF_NAMES[leaf].format(i=i): size for i in range(config.num_layers if of_layers else 1)}
  shards = hf_folder.shards_of({name: 2 * int(np.prod(size)) for name, size in shapes.items()}, _SHARD)
  draw = np.random.default_rng(0).standard_normal(1 << 20, "f4").astype(ml_dtypes.bfloat16)
  for file, names in shards.items():
    tensors = {name: np.resize(draw, shapes[name]) for name in names}
    safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
  where = {name: file for file, names in shards.items() for name in names}
  hf_folder.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
  hf_folder.write_json(folder / "config.json", hf_config.write_config(config, "bfloat16"))


class Peak(threading.Thread):
  """Samples the memory of the process that no file backs."""

  def __init__(self):
    super().__init__(daemon=True)
    self.most, self.running = 0, True

  def run(self):
    while self.running:
      self.most = max(self.most, anonymous())
      time.sleep(0.002)


def anonymous() -> int:
  """Bytes of this process that no file backs: pages of mapped files can be dropped at any time."""
  text = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1])


def load(folder: str, way: str) -> None:
  """Loads the folder in bfloat16; prints what was held, as JSON."""
  streamed, kind = _WAYS[way]
  mesh = sharding.make_mesh("")
  stacks.has_own_memory = lambda mesh: streamed  # so that a CPU measures what accelerators do
  before, peak, began = anonymous(), Peak(), time.perf_counter()
  peak.start()
  config, params = weights.load_hf_dir(folder, "bfloat16", mesh, kind)
  params = sharding.place_params(params, mesh)
  seconds = time.perf_counter() - began
  peak.running = False
  peak.join()
  sizes = peft_folder.shapes_of(config)
  tensors = [2 * int(np.prod(size[path.startswith("layers/") :])) for path, size in sizes.items()]
  stays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  found = {"stays": stays, "largest": max(tensors), "seconds": round(seconds, 1), "peak": peak.most - before}
  print(json.dumps(found | {"layers": config.num_layers}))


def main(folder: str, gigabytes: str) -> None:
  """Prints a line for each way of loading."""
  place = pathlib.Path(folder)
  if not (place / "config.json").exists():
    write(place, synthetic(float(gigabytes)))
  for way in _WAYS:
    command = [sys.executable, "-m", "experiments.benchmark.loading", folder, "--load", way]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    found = json.loads(done.stdout.splitlines()[-1])
    above = found["peak"] - found["stays"]
    print(
      f"{way}: {found['stays'] / 1e9:.2f} GB stay, {above / 1e9:.2f} GB more at the peak "
      f"({above / found['largest']:.1f} times the largest tensor), {found['seconds']} s",
      flush=True,
    )


if __name__ == "__main__":
  if sys.argv[2:3] == ["--load"]:
    load(sys.argv[1], sys.argv[3])
  elif len(sys.argv) == 3:
    main(*sys.argv[1:])
  else:
    sys.exit(__doc__)
