"""The files of a Hugging Face folder, out: weights in shards, tensor by tensor; what the source has beside them.

A shard is laid out as safetensors files are: the header's length in 8 bytes, the header as JSON, the tensors. Writing
it here keeps one tensor beside the parameters in memory; the library's writer wants all of a shard at once.
"""

import dataclasses
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.model import hf_config, hf_options, model_files
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.families import FAMILIES, TEXT_PARTS
from in2core_jax.runs import files

log = logging.getLogger(__name__)

SHARD_BYTES = 5_000_000_000  # as transformers cuts
PARTIAL = ".partial"
_CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16"}
# What belongs to a model beside config.json and weights: copied byte for byte.
_BESIDE = (
  *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
  *("added_tokens.json", "vocab.json", "merges.txt", "*.model", "*.tiktoken", "tekken.json"),
  *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*"),
)
_WRITTEN = (
  *_BESIDE,
  "adapter_config.json",
  "adapter_model.safetensors",
  "config.json",
  "model.safetensors",
  "model-*-of-*.safetensors",
  "model.safetensors.index.json",
)
# Of other code, of another place, or of what is undone in the copy.
_LEFT_OUT = ("auto_map", "_name_or_path", "_commit_hash", "quantization_config")


# ---- weights ---------------------------------------------------------------------------------------------------------


def shards_of(sizes: Mapping[str, int], most: int = SHARD_BYTES) -> dict[str, list[str]]:
  """File -> names of its tensors, in their order; a tensor that is larger than `most` has a file of its own.

  Args:
    sizes: bytes of each tensor.
    most: bytes of a file.
  """
  groups: list[list[str]] = []
  room = 0
  for name, size in sizes.items():
    if not groups or size > room:
      groups.append([])
      room = most
    groups[-1].append(name)
    room -= size
  if len(groups) == 1:
    return {"model.safetensors": groups[0]}
  return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_weights(
  folder: pathlib.Path, tensors: Mapping[str, np.ndarray], most: int = SHARD_BYTES, resume: bool = False
) -> None:
  """Writes model.safetensors, or shards and their index; each is whole or not there.

  The space of all of them is reserved before the first is written.

  Args:
    folder: there already.
    tensors: float32 or bfloat16, as they are to be stored; views are copied one at a time.
    most: bytes of a file.
    resume: keep files that are there: they are of the same weights.

  Raises:
    UserError: the folder holds other weights.
    OSError: no space; nothing is left of what was reserved.
  """
  shards = shards_of({name: array.nbytes for name, array in tensors.items()}, most)
  index = folder / "model.safetensors.index.json"
  foreign = sorted(
    path.name
    for path in (*folder.glob("*.safetensors*"), *folder.glob("adapter_*"))
    if path.name not in shards and not path.name.endswith(PARTIAL) and (path != index or len(shards) == 1)
  )
  if foreign:
    raise UserError(f"export to {folder}: {foreign[0]} of another model is there; give an empty folder")
  heads = {name: _header({key: tensors[key] for key in group}) for name, group in shards.items()}
  missing = [name for name in shards if not (resume and _is_there(folder / name, *heads[name]))]
  reserved: list[pathlib.Path] = []
  try:
    for name in missing:
      reserved.append(folder / (name + PARTIAL))
      reserved[-1].unlink(missing_ok=True)
      files.reserve(reserved[-1], heads[name][1])
    for name in missing:
      _fill(folder / name, heads[name][0], (tensors[key] for key in shards[name]))
      log.info("%s: %.2f GB", name, heads[name][1] / 1e9)
  finally:
    for path in reserved:
      path.unlink(missing_ok=True)
  if len(shards) > 1:
    where = {key: name for name, group in shards.items() for key in group}
    total = sum(array.nbytes for array in tensors.values())
    write_json(index, {"metadata": {"total_size": total}, "weight_map": where})


def _header(tensors: Mapping[str, np.ndarray]) -> tuple[bytes, int]:
  """(the header with its length in front, bytes of the whole file)."""
  entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  at = 0
  for name, array in tensors.items():
    offsets = [at, at + array.nbytes]
    entries[name] = {"dtype": _CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
    at = offsets[1]
  text = json.dumps(entries, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text, 8 + len(text) + at


def _is_there(path: pathlib.Path, head: bytes, size: int) -> bool:
  """Whether a file of that header and size is there; under its own name a file is whole."""
  if not path.is_file() or path.stat().st_size != size:
    return False
  with path.open("rb") as file:
    return file.read(len(head)) == head


def _fill(path: pathlib.Path, head: bytes, arrays: Iterable[np.ndarray]) -> None:
  """Writes a file into the space that is reserved for it, then gives it its name."""
  partial = path.with_name(path.name + PARTIAL)
  with partial.open("r+b") as file:
    file.write(head)
    for array in arrays:
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    file.flush()
    os.fsync(file.fileno())
  partial.replace(path)


def write_json(path: pathlib.Path, values: Any) -> None:
  """Writes JSON as such folders have it, whole or not at all."""
  partial = path.with_name(path.name + PARTIAL)
  partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
  partial.replace(path)


# ---- what is beside them ---------------------------------------------------------------------------------------------


def copy_beside(source: pathlib.Path, folder: pathlib.Path) -> list[str]:
  """Copies tokenizer, chat template, generation settings and licence byte for byte; returns their names."""
  found = sorted({path for pattern in _BESIDE for path in source.glob(pattern) if path.is_file()})
  for path in found:
    target = folder / path.relative_to(source)
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(target.name + PARTIAL)
    shutil.copyfile(path, partial)
    partial.replace(target)
  return [path.relative_to(source).as_posix() for path in found]


def foreign_files(folder: pathlib.Path) -> list[str]:
  """Names of files in a folder that no export writes, in order."""
  ours = {path for pattern in _WRITTEN for path in folder.glob(pattern)}
  others = (path for path in folder.rglob("*") if path not in ours and path.is_file())
  return sorted(path.relative_to(folder).as_posix() for path in others)


def copied_config(source: pathlib.Path, config: ModelConfig, dtype: str) -> dict[str, Any] | None:
  """The keys of a folder's config.json, as far as they say of `config` what is so.

  Changed are the class, the dtype, the number of layers and whether embeddings are tied. Of a model of several parts it
  is the language model's.

  Args:
    source: the folder that the model was read from.
    config: what the weights are of.
    dtype: of the weights that go out.

  Returns:
    The keys; None where they would mean another model, which `hf_config.write_config` can express.
  """
  values = model_files.read_object(source / "config.json", "fetch it")
  part, kind = TEXT_PARTS.get(values.get("model_type"), ("", ""))
  if isinstance(values.get(part), dict):
    kept = {key: values[key] for key in (*hf_options.KEPT, "tie_word_embeddings") if key in values}
    values = kept | {"model_type": kind} | values[part]
  values = {key: value for key, value in values.items() if key not in _LEFT_OUT}
  values["architectures"] = [FAMILIES[values["model_type"]].architecture]
  values["dtype" if "dtype" in values else "torch_dtype"] = dtype
  values["num_hidden_layers"] = config.num_layers
  if values.get("tie_word_embeddings", FAMILIES[values["model_type"]].defaults.get("tie_word_embeddings")) is not None:
    values["tie_word_embeddings"] = config.tie_embeddings
  try:
    read = hf_config.parse_config(values, "export")
  except UserError:
    return None
  names = [field.name for field in dataclasses.fields(config) if field.compare]
  return values if all(getattr(read, name) == getattr(config, name) for name in names) else None
