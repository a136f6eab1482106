"""Keys of a Hugging Face config.json that hold one field of `ModelConfig` each, as `families` lists them."""

import dataclasses
from typing import Any

from in2core_jax.errors import UserError
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.families import Family

KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # no computation uses them
# Two spellings of one number; the model types read one of them, and releases hold either.
_SPELLINGS = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}
_WHOLE = {field.name for field in dataclasses.fields(ModelConfig) if field.type is int}


def one_spelling(values: dict[str, Any], family: Family, origin: str) -> dict[str, Any]:
  """The same keys, with what stands under another spelling than the family's under that of the family."""
  for key, other in _SPELLINGS.items():
    if key not in family.options or values.get(other) is None:
      continue
    if values.get(key, values[other]) != values[other]:
      raise UserError(f"{origin}: {key} and {other} say different things; remove one of them")
    values = {name: value for name, value in values.items() if name != other} | {key: values[other]}
  if family.partial_rotary and values.get("rotary_dim") and values.get("head_dim"):
    part = values["rotary_dim"] / values["head_dim"]
    if values.get("partial_rotary_factor", part) != part:
      raise UserError(f"{origin}: rotary_dim and partial_rotary_factor say different things; remove one of them")
    values = {name: value for name, value in values.items() if name != "rotary_dim"} | {"partial_rotary_factor": part}
  return values


def read_options(values: dict[str, Any], family: Family) -> dict[str, Any]:
  """Fields of `ModelConfig` that the family's keys hold."""
  fields: dict[str, Any] = {}
  for key, names in family.options.items():
    value = values.get(key)
    if value is not None:
      kept = isinstance(value, bool) or names[0] in _WHOLE
      fields |= dict.fromkeys(names, value if kept else float(value))
  if "n_shared_experts" in family.options:  # so many times the width of one
    fields["shared_size"] = (values["n_shared_experts"] or 0) * fields["intermediate_size"]
  return fields


def kept(family: Family) -> tuple[str, ...]:
  """Keys that export writes as they were read; where experts have a size of their own, nothing else uses the other."""
  return (*KEPT, "intermediate_size") if "moe_intermediate_size" in family.options else KEPT


def write_options(config: ModelConfig, family: Family) -> dict[str, Any]:
  """Keys of config.json by which a model differs from what the decoder is without them, as its family spells them."""
  plain = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
  found = {key: getattr(config, names[0]) for key, names in family.options.items()}
  found = {key: v for key, v in found.items() if v != plain[family.options[key][0]] or key in family.defaults}
  if "n_shared_experts" in found:
    found["n_shared_experts"] = config.shared_size // config.intermediate_size
  if found.get("attention_multiplier", 1) is None:
    found["attention_multiplier"] = config.score_scale
  scalar = found.get("query_pre_attn_scalar", 1) or config.head_dim
  if "query_pre_attn_scalar" in found and scalar == int(scalar):
    found["query_pre_attn_scalar"] = int(scalar)  # transformers wants a whole number
  return found
