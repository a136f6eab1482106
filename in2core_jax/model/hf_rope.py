"""The rotary keys of a Hugging Face config.json, in every spelling; refuses what would not map exactly."""

from typing import Any

from in2core_jax.errors import UserError, how_many
from in2core_jax.model import schema
from in2core_jax.model.families import Family
from in2core_jax.model.rotary import KINDS as ROPE_KINDS
from in2core_jax.model.schema import shown


def by_kind_of_layer(values: dict[str, Any], local_theta: float, origin: str) -> tuple[dict[str, Any], float]:
  """(values whose rotary keys are those of the global layers alone, the base of local layers)."""
  rope = values.get("rope_parameters") or {}
  if rope:  # the newer spelling has a dictionary for each kind of layer
    near, far = (rope.get(kind) or {} for kind in ("sliding_attention", "full_attention"))
    if not isinstance(near, dict) or not isinstance(far, dict):
      raise UserError(f"{origin}: rope_parameters {shown(rope)} must hold an object for each kind of layer")
    schema.check(near, schema.ROPE, f"{origin}: sliding_attention")
    strange = set(rope) - {"sliding_attention", "full_attention"} or set(near) - {"rope_type", "rope_theta"}
    if strange or near.get("rope_type", "default") != "default" or values.get("rope_scaling"):
      raise UserError(
        f"{origin}: rope_parameters {shown(rope)} is not supported; it must have sliding_attention, unscaled, and "
        "full_attention, and no rope_scaling beside it"
      )
    local_theta = near.get("rope_theta", local_theta)
    values = values | {"rope_parameters": {"rope_theta": values["rope_theta"]} | far}
  return values, float(local_theta)


def read_rope(values: dict[str, Any], family: Family, head_dim: int, origin: str) -> tuple[float, Any, int]:
  """Rotary base, scaling, and how many entries of a head are rotated.

  `rope_parameters` is the newer spelling of `rope_theta` and `rope_scaling`.
  """
  old, new = values.get("rope_scaling") or {}, values.get("rope_parameters") or {}
  given = dict(new or old)
  if any(isinstance(value, dict) for value in given.values()):
    raise UserError(f"{origin}: rotary scaling that differs between layers is not supported for this model type")
  schema.check(given, schema.ROPE, f"{origin}: rotary scaling")
  if old and new and any(old[key] != new[key] for key in old if key in new):
    raise UserError(f"{origin}: rope_scaling and rope_parameters say different things; remove one of them")
  theta = float(given.pop("rope_theta", None) or values.get("rope_theta") or 10000.0)
  kinds = {given.pop(key) for key in ("rope_type", "type") if key in given} - {None} or {"default"}
  kinds = {family.rope_words.get(kind, kind) for kind in kinds}
  known, kind = family.rope_kinds or tuple(ROPE_KINDS), kinds.pop()
  if kind not in known or kinds:
    raise UserError(
      f"{origin}: rotary scaling {' and '.join(map(shown, [kind, *kinds]))} is not supported; known: {', '.join(known)}"
    )
  part = given.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor") or 1
  if part != 1 and not family.partial_rotary:
    raise UserError(f"{origin}: partial_rotary_factor {part} is not supported; it must be 1")
  rotated = int(head_dim * part)
  if rotated < 2 or rotated % 2:
    raise UserError(f"{origin}: partial_rotary_factor {part} rotates {rotated} of {head_dim} entries; it must be pairs")
  return theta, _scaling(kind, given, values, rotated, origin), rotated


def _scaling(kind: str, given: dict[str, Any], values: dict[str, Any], rotated: int, origin: str) -> Any:
  """Rotary scaling as `ModelConfig` holds it: sorted pairs; None where nothing is scaled."""
  given = {key: value for key, value in given.items() if value is not None}
  need, may = ROPE_KINDS[kind]
  trained, length = "original_max_position_embeddings", "max_position_embeddings"
  if kind in ("yarn", "longrope") and values.get(trained) is not None:
    given[trained] = values[trained]  # outside it takes precedence, as in transformers
  if kind == "yarn" and values.get(length) is not None:
    given.setdefault(trained, values[length])
  if length in need or (length in may and "factor" not in given):
    given |= {length: values[length]} if values.get(length) is not None else {}
    need = (*need, length)
  absent = [key for key in need if key not in given]
  if absent:
    raise UserError(f"{origin}: rotary scaling {kind} needs {', '.join(absent)}")
  strange = set(given) - {*need, *may, trained, length}
  if strange:
    raise UserError(
      f"{origin}: rotary scaling {kind} has no {', '.join(map(ascii, sorted(strange)))}; known: {(*need, *may)}"
    )
  if kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
    raise UserError(f"{origin}: rotary scaling llama3 needs a low_freq_factor below its high_freq_factor")
  for key in ("short_factor", "long_factor"):
    if kind == "longrope" and len(given[key]) != rotated // 2:
      raise UserError(
        f"{origin}: {key} has {how_many(len(given[key]), 'number')}; "
        f"{how_many(rotated // 2, 'pair[s] of a head [is|are] rotated')}"
      )
  if kind == "default":
    return None
  kept = [(key, given[key]) for key in dict.fromkeys((*need, *may)) if key in given]
  return tuple(sorted([("rope_type", kind), *((k, tuple(v) if isinstance(v, list) else v) for k, v in kept)]))
