"""LoRA adapters as PEFT stores them: read beside the matrices or merged into them, and written.

PEFT's forward pass is y = x W + s (x A) B with s = alpha / r, or alpha / sqrt(r) (rsLoRA). Ours is the same: `lora_a`,
`lora_b` and, where it is not 1, the constant `lora_scale` lie beside a kernel (`decoder.Projection`), so a gradient in
the factors is that of PEFT's own. Layers of other ranks, or without factors, are filled with zeros on both sides:
products and gradients there are exactly 0.

A matrix that a family stores fused (Phi-3's qkv_proj) has one A. On load every part gets a copy of it and its rows of
B, which is the same function; written, the parts stand on the diagonal of one B, which is recognised when read again.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from in2core_jax.errors import UserError
from in2core_jax.model import decoder, model_files
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.families import FAMILIES
from in2core_jax.model.schema import plain, shown
from in2core_jax.model.tensors import HF_NAMES, hf_names, pairs_apart, rotated_heads, text_names
from in2core_jax.params import quantisation
from in2core_jax.runs import adapter_folder

_LAYER = "model.layers.{i}."
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
_WHOLE = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.modules_to_save|\.base_layer)?(?:\.default)?\.weight")
# Keys that change what is computed, where they are neither null nor false.
_OTHERS = (
  *("layer_replication", "alora_invocation_tokens", "use_qalora", "lora_bias", "use_bdlora", "kasa_config"),
  *("velora_config", "monteclora_config", "arrow_config", "target_parameters", "trainable_token_indices"),
)


@dataclasses.dataclass(frozen=True)
class Adapter:
  """A LoRA adapter in the parameter tree's layout.

  Attributes:
    folder: that it was read from.
    factors: module of a layer, such as "attention/q_proj" -> (A [L, in, r], B [L, r, out], s [L]), float32.
    magnitudes: of DoRA: module -> the length of each column of the matrix that it makes, [L, out]; NaN in layers
      without factors.
    head: the same (A [in, r], B [r, out], s) of the vocabulary projection, which is merged in any case.
    whole: leaf -> {layer or 0: [in, out], [out] or [V, D]} of what the adapter replaces (`modules_to_save`).
  """

  folder: pathlib.Path
  factors: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
  magnitudes: dict[str, np.ndarray]
  head: tuple[np.ndarray, np.ndarray, float] | None
  whole: dict[str, dict[int, np.ndarray]]

  def leaves(self) -> dict[str, np.ndarray]:
    """Path of a leaf below "layers/" -> what `beside` puts there, float32."""
    found: dict[str, np.ndarray] = {}
    for module, (a, b, scale) in self.factors.items():
      found |= {f"{module}/lora_a": a, f"{module}/lora_b": b}
      found |= {f"{module}/lora_scale": scale[:, None]} if (scale != 1).any() else {}
    return found

  def beside(self, params: Mapping[str, Any]) -> dict:
    """The parameters with the factors beside their matrices, in the dtype of these.

    Raises:
      UserError: of DoRA, whose matrices are not W plus a product.
    """
    if self.magnitudes:
      raise UserError(
        f"--checkpoint={self.folder} is a DoRA adapter, which has no factors beside the weights: give "
        f"--model=hf:{self.folder}, which merges it into its base model"
      )
    flat = self._replaced(params)
    for path, leaf in self.leaves().items():
      kernel = flat[f"layers/{path.rpartition('/')[0]}/kernel"]
      flat[f"layers/{path}"] = leaf if path.endswith("lora_scale") else leaf.astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat, sep="/")

  def merged(self, params: Mapping[str, Any]) -> dict:
    """The parameters with W + s A B in place of W, added in float32 and rounded to the dtype of W; NumPy arrays."""
    flat = self._replaced(params)
    for module, (a, b, scale) in self.factors.items():
      kernel = np.array(flat[f"layers/{module}/kernel"])
      for i in np.flatnonzero((b != 0).any(axis=(1, 2)) | (module in self.magnitudes)):
        whole = kernel[i].astype(np.float32) + scale[i] * (a[i] @ b[i])
        length = self.magnitudes[module][i] if module in self.magnitudes else None
        if length is not None and not np.isnan(length).any():
          whole *= length / np.linalg.norm(whole, axis=0)
        kernel[i] = whole
      flat[f"layers/{module}/kernel"] = kernel
    return traverse_util.unflatten_dict(flat, sep="/")

  def _replaced(self, params: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves with what the adapter replaces, the vocabulary projection merged."""
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    for leaf, rows in self.whole.items():
      for i, row in rows.items():
        flat[leaf] = _with_row(flat[leaf], i if leaf.startswith("layers/") else slice(None), row)
    if self.head is not None:
      a, b, scale = self.head
      whole = np.float32(scale) * (a @ b) + flat["lm_head/kernel"].astype(np.float32)
      flat["lm_head/kernel"] = whole.astype(flat["lm_head/kernel"].dtype)
    return flat

  def shapes(self, shapes: Mapping[str, Any]) -> dict:
    """What `beside` makes, of shapes."""
    flat = dict(traverse_util.flatten_dict(shapes, sep="/"))
    for path, leaf in self.leaves().items():
      dtype = leaf.dtype if path.endswith("lora_scale") else flat[f"layers/{path.rpartition('/')[0]}/kernel"].dtype
      flat[f"layers/{path}"] = jax.ShapeDtypeStruct(leaf.shape, dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


def _with_row(array, place, row: np.ndarray):
  """The array, NumPy, JAX or in few bits, with something else in one place."""
  if quantisation.is_leaf(array):
    order = np.arange(array.shape[0])
    order[place] = len(order)
    return quantisation.joined([array, row[None].astype(array.dtype)], order)
  if isinstance(array, jax.Array):
    return array.at[place].set(row.astype(array.dtype))
  array = np.array(array)
  array[place] = row
  return array


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_adapter(folder: str | pathlib.Path, config: ModelConfig) -> Adapter:
  """Reads adapter_config.json and adapter_model.safetensors.

  Args:
    folder: of the adapter.
    config: shape of the model that it is for.

  Raises:
    UserError: not LoRA, an option or a tensor that is not understood, or shapes of another model; each is named.
  """
  folder = pathlib.Path(folder).expanduser()
  values = model_files.read_object(folder / adapter_folder.CONFIG, "give an adapter's folder")
  _check_options(values, str(folder / adapter_folder.CONFIG))
  adapter_folder.sha256(folder)  # refuses a folder without weights
  file = folder / adapter_folder.WEIGHTS
  reader = _Reader(file, values, config)
  tensors, whole = _sorted_tensors(file)
  found = {"whole": {}, "head": None}
  for name, array in whole.items():
    leaf, i, row = reader.replaced(name, array)
    found["whole"].setdefault(leaf, {})[i] = row
  if "lm_head" in tensors:
    found["head"] = reader.head(tensors.pop("lm_head"))
  by_module: dict[str, dict[int, dict[str, np.ndarray]]] = {}
  for name, parts in tensors.items():
    place = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if place is None or place[2] not in reader.modules or int(place[1]) >= config.num_layers:
      raise UserError(
        f"{file}: {plain(name)} is no matrix of this model's {config.num_layers} layers that an adapter can change "
        f"here; known: {', '.join([*reader.modules, 'lm_head'])}"
      )
    by_module.setdefault(place[2], {})[int(place[1])] = parts
  _check_complete(values, by_module, config.num_layers, file)
  factors, magnitudes = {}, {}
  for name, layers in by_module.items():
    factors |= reader.factors(name, layers)
    magnitudes |= reader.magnitudes(name, layers)
  return Adapter(folder, factors, magnitudes, **found)


def _check_options(values: dict[str, Any], origin: str) -> None:
  """Refuses what is no LoRA as we compute it."""
  if values.get("peft_type") != "LORA":
    raise UserError(f"{origin}: peft_type {shown(values.get('peft_type'))} is not supported; LORA is")
  for key in _OTHERS:
    if values.get(key):
      raise UserError(f"{origin}: {key} {shown(values[key])} is not supported; merge the adapter with PEFT first")
  for key in ("rank_pattern", "alpha_pattern"):
    if not isinstance(values.get(key) or {}, dict):
      raise UserError(f"{origin}: {key} is {shown(values[key])}; it must be an object")
  alphas = [values.get("lora_alpha", 8), *(values.get("alpha_pattern") or {}).values()]
  if any(isinstance(alpha, bool) or not isinstance(alpha, int | float) for alpha in alphas):
    raise UserError(f"{origin}: lora_alpha and alpha_pattern hold {shown(alphas)}; they must be numbers")


def _sorted_tensors(file: pathlib.Path) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
  """(module -> {lora_A, lora_B, lora_magnitude_vector}, name of a module -> a tensor that replaces its weight)."""
  handle = model_files.open_safetensors(file)
  tensors: dict[str, dict[str, np.ndarray]] = {}
  whole: dict[str, np.ndarray] = {}
  for name in handle.keys():  # noqa: SIM118, a handle is no mapping
    factor, replaced = _FACTOR.fullmatch(name), _WHOLE.fullmatch(name)
    if factor is None and (replaced is None or "lora" in name):
      raise UserError(f"{file}: tensor {plain(name)} is not supported; merge the adapter with PEFT first")
    array = np.asarray(handle.get_tensor(name), np.float32)
    if not np.isfinite(array).all():
      raise UserError(f"{file}: tensor {plain(name)} holds NaN or infinity; use another checkpoint")
    module = _plain_name(factor[1] if factor else replaced[1])
    if factor:
      tensors.setdefault(module, {})[factor[2]] = array
    else:
      whole[module] = array
  for module, parts in tensors.items():
    if not {"lora_A", "lora_B"} <= set(parts):
      raise UserError(f"{file}: {plain(module)} has {', '.join(sorted(parts))} alone; the file is incomplete")
  return tensors, whole


def _plain_name(module: str) -> str:
  """A module's name as folders of a language model alone have it."""
  name = text_names([f"{module}.weight"])[f"{module}.weight"]
  return (name or f"{module}.weight").removesuffix(".weight")


def _check_complete(values: dict[str, Any], by_module: dict[str, dict], layers: int, file: pathlib.Path) -> None:
  """Refuses a file that lacks a layer of a module that is targeted in all of them, and one without factors."""
  if not by_module:
    raise UserError(f"{file}: holds no LoRA factors of a layer; is it another kind of adapter?")
  targets = values.get("target_modules")
  plain_targets = isinstance(targets, list) and all(isinstance(t, str) and "." not in t for t in targets)
  if not plain_targets or values.get("layers_to_transform") is not None or values.get("exclude_modules"):
    return
  for name, found in by_module.items():
    missing = sorted(set(range(layers)) - set(found))
    if missing:
      raise UserError(
        f"{file}: {name} has factors in {len(found)} of {layers} layers, not in layer {missing[0]}; is it of another "
        "model, or incomplete?"
      )


class _Reader:
  """Turns PEFT's tensors into leaves."""

  def __init__(self, file: pathlib.Path, values: dict[str, Any], config: ModelConfig):
    self.file, self.values, self.config = file, values, config
    self.shapes = shapes_of(config)
    self.modules = modules_of(config, self.shapes)
    family = FAMILIES.get(config.model_type)
    self.interleaved = family is not None and family.interleaved

  def _scale(self, name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r), by PEFT's patterns."""
    patterns = self.values.get("rank_pattern") or {}, self.values.get("alpha_pattern") or {}
    stated = patterns[0].get(_pattern_of(patterns[0], name), self.values.get("r", 8))
    if stated != rank:
      raise UserError(f"{self.file}: {name} has rank {rank}, adapter_config.json says {shown(stated)}")
    alpha = patterns[1].get(_pattern_of(patterns[1], name), self.values.get("lora_alpha", 8))
    return float(alpha) / (rank**0.5 if self.values.get("use_rslora") else rank)

  def _checked(self, name: str, parts: dict[str, np.ndarray], inputs: int, outputs: int):
    """(A [r, in], B [out, r], scale) of one matrix."""
    a, b = parts["lora_A"], parts["lora_B"]
    if a.ndim != 2 or b.ndim != 2 or (a.shape[1], b.shape[0]) != (inputs, outputs) or a.shape[0] != b.shape[1]:
      raise UserError(
        f"{self.file}: factors of {name} are {a.shape} and {b.shape}, and its matrix is {(outputs, inputs)} ([out, "
        "in]): the adapter is of another model"
      )
    return a, b, self._scale(name, a.shape[0])

  def head(self, parts: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
    """Factors of the vocabulary projection."""
    if "lm_head/kernel" not in self.shapes:
      raise UserError(f"{self.file}: lm_head has factors, but the embeddings are tied; merge it with PEFT first")
    if "lora_magnitude_vector" in parts:
      raise UserError(f"{self.file}: DoRA of lm_head is not supported; merge it with PEFT first")
    a, b, scale = self._checked("lm_head", parts, *self.shapes["lm_head/kernel"])
    return a.T, b.T, scale

  def factors(self, name: str, layers: dict[int, dict[str, np.ndarray]]):
    """Module of ours -> (A, B, s) over all layers, of one name of theirs."""
    modules = self.modules[name]
    kernels = [self.shapes[f"layers/{module}/kernel"] for module in modules]
    cuts = np.cumsum([0, *(kernel[2] for kernel in kernels)])
    read = {i: self._checked(f"model.layers.{i}.{name}", parts, kernels[0][1], cuts[-1]) for i, parts in layers.items()}
    diagonal = len(modules) > 1 and _is_block_diagonal(read.values(), cuts)
    if len(modules) > 1 and not diagonal:
      model_files.say(
        f"{self.file}: {name} is one matrix there and {len(modules)} here: each part has a copy of its lora_A, which "
        "is the same model; influence on the factors takes the copies as parameters of their own"
      )
    found = {}
    for part, module in enumerate(modules):
      own = {}
      for i, (a, b, scale) in read.items():
        rank = len(a) // len(modules)
        rows = slice(part * rank, (part + 1) * rank) if diagonal else slice(None)
        own[i] = a[rows].T, self._unrotated(b[cuts[part] : cuts[part + 1], rows], module).T, scale
      found[module] = _stacked(own, kernels[part])
    return found

  def magnitudes(self, name: str, layers: dict[int, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Module of ours -> DoRA's lengths over all layers."""
    stated = bool(self.values.get("use_dora"))
    if stated != all("lora_magnitude_vector" in parts for parts in layers.values()):
      raise UserError(f"{self.file}: use_dora is {stated}, but {name} does not agree; the file is incomplete")
    found, start = {}, 0
    for module in self.modules[name] if stated else ():
      depth, _, outputs = self.shapes[f"layers/{module}/kernel"]
      found[module] = np.full((depth, outputs), np.nan, np.float32)
      for i, parts in layers.items():
        found[module][i] = self._unrotated(parts["lora_magnitude_vector"].reshape(-1)[start : start + outputs], module)
      start += outputs
    return found

  def _unrotated(self, rows: np.ndarray, module: str) -> np.ndarray:
    heads = rotated_heads(self.config, f"layers/{module}/kernel") if self.interleaved else 0
    return pairs_apart(rows, heads) if heads else rows

  def replaced(self, name: str, array: np.ndarray) -> tuple[str, int, np.ndarray]:
    """(leaf, layer or 0, its value) of a module that was saved whole."""
    place = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    wanted = f"{_LAYER}{place[2]}.weight" if place else f"{name}.weight"
    leaves = {theirs: leaf for leaf, theirs in hf_names(self.config).items() if leaf in self.shapes}
    leaf = leaves.get(wanted)
    if self.config.tie_embeddings and name in ("lm_head", "model.embed_tokens"):
      raise UserError(
        f"{self.file}: {name} was saved whole (modules_to_save), but this model's embeddings are tied; merge the "
        "adapter with PEFT first"
      )
    if leaf is None or (place and int(place[1]) >= self.config.num_layers):
      raise UserError(f"{self.file}: {plain(name)} was saved whole (modules_to_save), but this model has no such part")
    right = self.shapes[leaf][1:] if place else self.shapes[leaf]
    row = self._unrotated(array, leaf.removeprefix("layers/").rpartition("/")[0])
    row = row.T if leaf.endswith("/kernel") else row
    if row.shape != right:
      raise UserError(f"{self.file}: {name} is {array.shape}, this model's is {right} ([in, out]); is it resized?")
    return leaf, int(place[1]) if place else 0, row


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Leaf -> its shape in the parameter tree."""
  shapes = jax.eval_shape(lambda key: decoder.init_params(config, key), jax.random.key(0))
  return {leaf: value.shape for leaf, value in traverse_util.flatten_dict(shapes, sep="/").items()}


def modules_of(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
  """A matrix's name behind "model.layers.N." in Hugging Face models -> our modules, several where it is fused."""
  found = {}
  for leaf, name in hf_names(config).items():
    if leaf.endswith("/kernel") and leaf in shapes and name.startswith(_LAYER) and ":" not in name:
      found[name.removeprefix(_LAYER).removesuffix(".weight")] = (leaf[len("layers/") : -len("/kernel")],)
  family = FAMILIES.get(config.model_type)
  for end, leaves in family.fused.items() if family else ():
    if all(leaf.endswith("/kernel") for leaf in leaves):
      for leaf in leaves:
        found.pop(HF_NAMES[leaf].removeprefix(_LAYER).removesuffix(".weight"), None)
      found[end.removesuffix(".weight")] = tuple(leaf[len("layers/") : -len("/kernel")] for leaf in leaves)
  return found


def _pattern_of(patterns: Mapping[str, Any], name: str) -> str:
  """The first pattern that PEFT takes for a module, or its name."""
  for pattern in patterns:
    try:
      if re.match(rf"(.*\.)?({pattern})$", name):
        return pattern
    except re.error as error:
      raise UserError(f"adapter_config.json: {shown(pattern)} is no pattern ({error})") from error
  return name


def _is_block_diagonal(read, cuts: np.ndarray) -> bool:
  """Whether every part of a fused matrix has columns of B of its own, as `write_adapter` stores them."""
  count, any_number = len(cuts) - 1, False
  for a, b, _ in read:
    if len(a) % count:
      return False
    own = np.zeros(b.shape, bool)
    for part in range(count):
      own[cuts[part] : cuts[part + 1], part * len(a) // count : (part + 1) * len(a) // count] = True
    if b[~own].any():
      return False
    any_number = any_number or bool(b.any())
  return any_number


def _stacked(own: dict[int, tuple[np.ndarray, np.ndarray, float]], kernel: tuple[int, int, int]):
  """(A [L, in, r], B [L, r, out], s [L]) of the layers' factors, zeros elsewhere."""
  depth, inputs, outputs = kernel
  rank = max(a.shape[1] for a, _, _ in own.values())
  a, b, scale = np.zeros((depth, inputs, rank), "f4"), np.zeros((depth, rank, outputs), "f4"), np.ones(depth, "f4")
  for i, (left, right, s) in own.items():
    a[i, :, : left.shape[1]], b[i, : len(right)], scale[i] = left, right, s
  return a, b, scale
