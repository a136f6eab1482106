"""A PEFT adapter folder where a model or a checkpoint is asked for: whether it is one, its base model, its name."""

import json
import pathlib
import re
from typing import Any

from in2core_jax.errors import UserError
from in2core_jax.runs import files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SPEC = r"\w+|(hf|hub|gguf|random|truncated):.+"  # what --model takes, as our own exports name models without a folder


def is_adapter(folder: Any) -> bool:
  """Whether a folder holds an adapter and no model."""
  if not str(folder) or files.is_remote(folder):
    return False
  path = pathlib.Path(files.absolute(folder))
  return (path / CONFIG).is_file() and not (path / "config.json").exists()


def read_values(folder: Any) -> dict[str, Any]:
  """The keys of adapter_config.json.

  Raises:
    UserError: it is no JSON object.
  """
  path = pathlib.Path(files.absolute(folder)) / CONFIG
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path}: cannot be read as JSON ({error}); fetch it again") from error
  if not isinstance(values, dict):
    raise UserError(f"{path}: holds a JSON {type(values).__name__}, expected an object with keys")
  return values


def base_of(folder: Any) -> str:
  """What `--model` says for the model that an adapter was trained on.

  Raises:
    UserError: adapter_config.json names none that is here.
  """
  values, path = read_values(folder), pathlib.Path(files.absolute(folder))
  named, revision = values.get("base_model_name_or_path"), values.get("revision")
  remedy = f"give --model=hf:BASE --checkpoint={folder}"
  if not isinstance(named, str) or not named.strip() or "\0" in named:
    raise UserError(f"{path / CONFIG}: base_model_name_or_path names no base model; {remedy}")
  for place in (pathlib.Path(named), path / named):
    if (place / "config.json").is_file():
      return f"hf:{place}"
  if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", named):
    return f"hub:{named}@{revision}" if isinstance(revision, str) and revision else f"hub:{named}"
  if re.fullmatch(_SPEC, named):
    return named
  raise UserError(f"{path / CONFIG}: its base model {named[:200]!a} is not here; {remedy}")


def sha256(folder: Any) -> str:
  """Names an adapter: its configuration and every byte of its weights.

  Raises:
    UserError: its weights are not there.
  """
  path = pathlib.Path(files.absolute(folder))
  if not (path / WEIGHTS).is_file():
    pickled = ": pickled weights are never loaded, save it as safetensors"
    why = pickled if (path / "adapter_model.bin").exists() else "; fetch it again"
    raise UserError(f"{path}: an adapter without {WEIGHTS}{why}")
  values = {key: value for key, value in read_values(folder).items() if key != "base_model_name_or_path"}
  return files.hash_of([json.dumps(values, sort_keys=True), files.file_sha256(path / WEIGHTS)])


def checkpoint_meta(folder: Any) -> dict[str, Any]:
  """What a checkpoint says of itself (`finetune.meta_of`), as far as it is known of an adapter: a finished training."""
  values = read_values(folder)
  rank, base = values.get("r"), values.get("base_model_name_or_path")
  known = {"model": base if isinstance(base, str) else "", "model_hash": "", "identity": "", "seed": 0}
  known |= {"step": 1, "steps": 1, "lora_rank": rank if isinstance(rank, int) else 1}
  return known | {"weights_sha256": sha256(folder)}
