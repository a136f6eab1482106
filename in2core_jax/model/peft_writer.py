"""LoRA factors out: a PEFT folder that PEFT loads, and factors folded into their matrices."""

import collections
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from flax import traverse_util

from in2core_jax.errors import UserError
from in2core_jax.model import hf_folder, peft_folder
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.families import FAMILIES
from in2core_jax.model.tensors import pairs_together, rotated_heads
from in2core_jax.runs import adapter_folder

# (A [in, r], B [r, out], s) of one matrix.
_Factors = tuple[np.ndarray, np.ndarray, float]


def write_adapter(
  folder: str | pathlib.Path, config: ModelConfig, params: Mapping[str, Any], base: str, revision: str | None = None
) -> None:
  """Writes adapter_config.json and adapter_model.safetensors, for `PeftModel.from_pretrained(model, folder)`.

  Layers whose B is 0 are left out, unless it is 0 everywhere; a fused matrix (Phi-3) gets the factors of its parts in
  one, B block-diagonal.

  Args:
    folder: made when absent; files of the same names are replaced.
    config: the model's shape.
    params: the parameter tree with `lora_a` and `lora_b` beside kernels, NumPy or JAX arrays, float32 or bfloat16.
    base: the model that they are for, as `base_model_name_or_path` says it: a folder or a name on the Hub.
    revision: of the base on the Hub; None for what is newest.

  Raises:
    UserError: no factors in the parameters, or a folder with a model.
  """
  folder = pathlib.Path(folder)
  flat = traverse_util.flatten_dict(params, sep="/")
  factors = {leaf[len("layers/") : -len("/lora_a")] for leaf in flat if leaf.endswith("/lora_a")}
  if not factors:
    raise UserError(f"export to {folder}: the model has no LoRA factors; fine-tune with --trainable=lora")
  if (folder / "config.json").exists() or (folder / "model.safetensors").exists():
    raise UserError(f"export to {folder}: a model is there; give an empty folder")
  read = {module: _layers_of(flat, config, module) for module in sorted(factors)}
  used = {i for layers in read.values() for i, (_, b, _) in layers.items() if b.any()} or set(range(config.num_layers))
  written = {}
  for name, modules in peft_folder.modules_of(config, peft_folder.shapes_of(config)).items():
    for i in sorted(used) if factors & set(modules) else ():
      widths = [flat[f"layers/{module}/kernel"].shape[2] for module in modules]
      written[name, i] = _joined([read[module][i] if module in read else None for module in modules], widths)
  tensors = {}
  for (name, i), (a, b, _) in written.items():
    prefix = f"base_model.model.model.layers.{i}.{name}"
    tensors |= {
      f"{prefix}.lora_A.weight": np.ascontiguousarray(a.T),
      f"{prefix}.lora_B.weight": np.ascontiguousarray(b.T),
    }
  folder.mkdir(parents=True, exist_ok=True)
  partial = folder / (adapter_folder.WEIGHTS + hf_folder.PARTIAL)
  safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
  partial.replace(folder / adapter_folder.WEIGHTS)
  hf_folder.write_json(
    folder / adapter_folder.CONFIG, _values(written, used, config.num_layers, base) | {"revision": revision}
  )


def _layers_of(flat: Mapping[str, Any], config: ModelConfig, module: str) -> dict[int, _Factors]:
  """Layer -> the factors of a module, without the zeros that fill up its rank, rows as the files have them."""
  a, b = (np.asarray(flat[f"layers/{module}/lora_{name}"]) for name in "ab")
  scale = flat.get(f"layers/{module}/lora_scale")
  family = FAMILIES.get(config.model_type)
  heads = rotated_heads(config, f"layers/{module}/kernel") if family and family.interleaved else 0
  found = {}
  for i in range(config.num_layers):
    filled = np.flatnonzero(a[i].any(axis=0) | b[i].any(axis=1))
    rank = int(filled[-1]) + 1 if len(filled) else 1
    right = pairs_together(np.ascontiguousarray(b[i, :rank].T), heads).T if heads else b[i, :rank]
    found[i] = a[i, :, :rank], right, 1.0 if scale is None else float(np.asarray(scale)[i, 0])
  return found


def _joined(parts: list[_Factors | None], widths: list[int]) -> _Factors:
  """Factors of the matrix that holds those of several parts one after the other; all of one rank, so that it is known
  which columns are whose. None: a part without factors, zeros."""
  if len(parts) == 1:
    return parts[0]
  known = [part for part in parts if part is not None]
  rank, scale = max(a.shape[1] for a, _, _ in known), known[0][2]
  inputs, dtype = known[0][0].shape[0], known[0][0].dtype
  joined_a, joined_b = np.zeros((inputs, rank * len(parts)), dtype), np.zeros((rank * len(parts), sum(widths)), dtype)
  for number, part in enumerate(parts):
    if part is not None:
      a, b, own = part
      start, at = number * rank, sum(widths[:number])
      joined_a[:, start : start + a.shape[1]] = a
      joined_b[start : start + len(b), at : at + widths[number]] = b if own == scale else b * np.float32(own / scale)
  return joined_a, joined_b, scale


def _values(written: Mapping[tuple[str, int], _Factors], used: set[int], depth: int, base: str) -> dict[str, Any]:
  """The keys of adapter_config.json; what most matrices have stands first, and patterns name the others."""
  ranks = {key: a.shape[1] for key, (a, _, _) in written.items()}
  alphas = {key: scale * a.shape[1] for key, (a, _, scale) in written.items()}
  rank, rank_pattern = _with_pattern(ranks)
  alpha, alpha_pattern = _with_pattern(alphas)
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": rank,
    "lora_alpha": alpha,
    "rank_pattern": rank_pattern,
    "alpha_pattern": alpha_pattern,
    "lora_dropout": 0.0,
    "target_modules": sorted({name.rpartition(".")[2] for name, _ in written}),
    "layers_to_transform": None if len(used) == depth else sorted(used),
    "layers_pattern": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "inference_mode": True,
  }


def _with_pattern(numbers: Mapping[tuple[str, int], float]) -> tuple[float, dict[str, float]]:
  """(the most common number, pattern -> the others)."""
  whole = {key: int(number) if number == int(number) else number for key, number in numbers.items()}
  common = collections.Counter(whole.values()).most_common(1)[0][0]
  patterns: dict[str, float] = {}
  for name in dict.fromkeys(name for name, _ in whole):
    own = {i: number for (other, i), number in whole.items() if other == name}
    if len(set(own.values())) == 1:
      own = {"": min(own.values())}
    patterns |= {name if i == "" else f"layers.{i}.{name}": number for i, number in own.items() if number != common}
  return common, patterns


def fold_lora(params) -> dict:
  """The same tree without LoRA leaves: kernel + lora_scale lora_a lora_b."""
  flat = dict(traverse_util.flatten_dict(params, sep="/"))
  for leaf in [leaf for leaf in flat if leaf.endswith("/lora_a")]:
    base = leaf.removesuffix("lora_a")
    a, b = (np.asarray(flat.pop(base + name), np.float32) for name in ("lora_a", "lora_b"))
    if base + "lora_scale" in flat:
      a = a * np.asarray(flat.pop(base + "lora_scale"), np.float32)[:, :, None]
    kernel = np.asarray(flat[base + "kernel"])
    flat[base + "kernel"] = (kernel.astype(np.float32) + a @ b).astype(kernel.dtype)
  return traverse_util.unflatten_dict(flat, sep="/")
