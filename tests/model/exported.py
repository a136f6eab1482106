"""Small models of every family as our reader read them and our exporter writes them.

    PYTHONPATH=.:tests python tests/model/exported.py OUT

writes their folders for third_party/make_reference.py --exports=OUT, which reads them with transformers; the tests make
the same folders again and compare (tests/model/test_parity.py).
"""

import dataclasses
import json
import pathlib
import sys
import zlib

import jax
import numpy as np
import safetensors.numpy
import test_families
import tiny
from test_weights import GEMMA3_IN_GGUF, VARIANTS, write_gguf

from in2core_jax.model import weights

REFERENCE = pathlib.Path(__file__).resolve().parents[2] / "third_party" / "reference"
TINY = json.loads((REFERENCE / "tiny.json").read_text(encoding="utf-8"))
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 5], "temperature": 0.5, "do_sample": True}
GGUF = ("gguf-llama", "gguf-gemma3")
NAMES = (*TINY, *GGUF, "head")


def tiny_tensors(name: str) -> dict[str, np.ndarray]:
  """The weights of a model of tiny.json, as tiny_weights in make_reference.py draws them."""
  entry = TINY[name]
  rng = np.random.default_rng(entry["seed"])
  tensors = {}
  for key in sorted(entry["shapes"]):
    draw = rng.standard_normal(entry["shapes"][key])
    tensors[key] = (1 + 0.1 * draw if "norm" in key else 0.2 * draw).astype(np.float32)
  return tensors


def export(name: str, source: pathlib.Path, out: pathlib.Path):
  """Writes a source, reads it, exports it; returns what was read: (config, params)."""
  source.mkdir(parents=True, exist_ok=True)
  if name in GGUF:
    config, architecture = VARIANTS["llama"], name.removeprefix("gguf-")
    values = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5}
    if architecture == "gemma3":
      config = dataclasses.replace(VARIANTS["gemma3"], **GEMMA3_IN_GGUF, num_layers=7)  # the sixth is global
      values = {"attention.sliding_window": config.sliding_window, "attention.key_length": config.head_dim}
      values = {f"gemma3.{key}": value for key, value in values.items()}
    params = jax.tree.map(np.asarray, tiny.make_params(config))  # drawn by NumPy, alike on every machine
    values[f"{architecture}.context_length"] = 96
    path = write_gguf(source / "m.gguf", config, params, architecture=architecture, **values)
    config, params = weights.load_gguf(path)
  else:  # "head": config.json says tied, and another head is stored
    base = "linear" if name == "head" else name
    tensors = tiny_tensors(base)
    if name == "head":
      tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(TINY[base]["config"] | {"bos_token_id": 1, "eos_token_id": [2, 5]}))
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    config, params = weights.load_hf_dir(source)
  weights.save_hf_dir(out, config, params)
  return config, params


def checksum(tensors: dict[str, np.ndarray]) -> int:
  """CRC-32 over names and bytes, in the order of names."""
  crc = 0
  for name in sorted(tensors):
    crc = zlib.crc32(np.ascontiguousarray(tensors[name]).tobytes(), zlib.crc32(name.encode(), crc))
  return crc


if __name__ == "__main__":
  for each in NAMES:
    export(each, pathlib.Path(sys.argv[1]) / "sources" / each, pathlib.Path(sys.argv[1]) / each)
  for each in test_families.MODELS:
    made = test_families.write(pathlib.Path(sys.argv[1]) / "sources" / each, each)
    weights.save_hf_dir(pathlib.Path(sys.argv[1]) / "families" / each, *weights.load_hf_dir(made))
