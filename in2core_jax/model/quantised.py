"""Quantised checkpoints in Hugging Face folders: their tensors as float32, under the names that plain folders have.

What is stored, for a matrix W [out, in]; q are whole numbers, numbers in brackets of one 32-bit word start at its
lowest bits:

  bitsandbytes nf4, fp4   W.flat[i] = table[q_i] absmax[i / block], two q a byte, the first in the high half; with
                          double quantisation absmax[j] = table2[a_j] absmax2[j / block2] + offset
  bitsandbytes int8       W = q SCB[out] / 127
  gptq                    W^T = scales[g, out] (q - zeros[g, out]), g = g_idx[in]; q packed along in; stored zeros are
                          less by 1 (but in the format gptq_v2)
  awq (gemm)              the same with g = in / group, zeros as they are, and words that hold columns 0 2 4 6 1 3 5 7
  fp8                     W = q scale, a scale for each block (weight_scale_inv), row or tensor (weight_scale)
  compressed-tensors      the same, of int8 or fp8; packed: W = (q - zero) scale[out, group], q less 2^(bits - 1)
  mxfp4                   experts [E, in, out]: W^T = table[q] 2^(scale - 127) in blocks of 32 along in, two q a byte,
                          the first in the low half

Activations, which some of these round too, are not rounded here.
"""

import functools
import json
import math
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from in2core_jax.errors import UserError, how_many
from in2core_jax.model import model_files
from in2core_jax.model.schema import plain, shown
from in2core_jax.params import quantisation
from in2core_jax.params.quantisation import FULL

FLOATS = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16}
_DTYPES = FLOATS | {"I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1", "F8_E4M3": ml_dtypes.float8_e4m3fn}
_METHODS = ("bitsandbytes", "gptq", "awq", "fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4")
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense")
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble of a word holds each column
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # E2M1 without its sign, the highest of four bits
_MX = ("_proj_blocks", "_proj_scales")  # how the two parts of an mxfp4 tensor end
_WHAT = "use the unquantised checkpoint, or save it dequantised"
# What lies beside a weight, and what of it no matrix depends on.
_UNUSED = (".input_scale", ".weight_format", ".k_scale", ".v_scale", ".activation_scale", ".weight_g_idx")


def without(values: dict[str, Any], origin: str) -> dict[str, Any]:
  """The keys of a config.json without its quantization_config, where that is one of those above.

  Raises:
    UserError: it is another one, named.
  """
  found = values.get("quantization_config")
  if found is None:
    return values
  if not isinstance(found, dict):
    raise UserError(f"{origin}: quantization_config is {shown(found)}; it must be an object")
  method = _method(found)
  if method not in _METHODS:
    raise UserError(
      f"{origin}: quantization_config: the method {shown(method)} is not read; known: {', '.join(_METHODS)}; {_WHAT}"
    )
  allowed = {"gptq": ("bits", (2, 4, 8)), "awq": ("bits", (4,))}.get(method)
  if allowed and found.get(allowed[0]) not in allowed[1]:
    raise UserError(
      f"{origin}: quantization_config: {method} with bits {shown(found.get('bits'))} is not read; "
      f"{' or '.join(map(str, allowed[1]))} are; {_WHAT}"
    )
  word, right = {
    "gptq": ("checkpoint_format", ("gptq", "gptq_v2")),
    "awq": ("version", ("gemm",)),
    "compressed-tensors": ("format", _FORMATS),
  }.get(method, ("", ()))
  stated = found.get(word)
  if word and stated is not None and str(stated).lower() not in right:
    raise UserError(
      f"{origin}: quantization_config: {method} in the format {shown(stated)} is not read; {', '.join(right)} are; "
      f"{_WHAT}"
    )
  return {key: value for key, value in values.items() if key != "quantization_config"}


def _method(found: Mapping[str, Any]) -> Any:
  if found.get("load_in_4bit") or found.get("load_in_8bit"):
    return "bitsandbytes"
  return found.get("quant_method")


def opened(
  folder: pathlib.Path, where: dict[str, pathlib.Path], handles: Mapping[pathlib.Path, Any], dtype: str, few: str = FULL
) -> tuple[dict[str, pathlib.Path], Mapping[pathlib.Path, Any]]:
  """(tensor name -> file, file -> handle) as of a folder with plain weights; what was given where nothing is quantised.

  Args:
    folder: of the model.
    where: tensor name -> file, of what is stored.
    handles: file -> open file.
    dtype: of the weights in memory, to tell what they take.
    few: `quantisation`'s word for how matrices of layers are kept.

  Raises:
    UserError: parts of a quantised tensor are missing, or do not fit each other.
  """
  values = model_files.read_object(folder / "config.json", "fetch it").get("quantization_config")
  if not isinstance(values, dict):
    return where, handles
  view = Dequantised(values, where, handles)
  if not view.parts:
    return where, handles
  count = sum(math.prod(view.shape(name)) for name in view.parts)
  stored = sum(view.bytes_of(part) for parts in view.parts.values() for part in parts.values())
  size = {"float32": 4, "bfloat16": 2}[dtype] if few == FULL else quantisation.bits(few) / 8
  same = values.get("bnb_4bit_quant_type") if values.get("load_in_4bit") else values.get("load_in_8bit") and "int8"
  how = (
    f"dequantised: as {dtype}"
    if few == FULL
    else "kept: as they are"
    if same == few
    else f"rounded once more: as {few}"
  )
  model_files.say(
    f"{folder}: {how_many(len(view.parts), 'matri[x is|ces are]')} stored by {_method(values)} in {stored / 1e9:.2f} "
    f"GB, and {how} they take {count * size / 1e9:.2f} GB; what was rounded stays so"
  )
  names = {name: where[next(iter(parts.values()))] for name, parts in view.parts.items()} | view.others
  return names, dict.fromkeys(handles, view)


class Dequantised:
  """The tensors of a folder under the names of a plain one; reads as an open safetensors file does."""

  def __init__(self, values: Mapping[str, Any], where: dict[str, pathlib.Path], handles: Mapping[pathlib.Path, Any]):
    self.values, self.where, self.handles = values, where, handles
    self.parts = _grouped(where, {name: handles[file].get_slice(name).get_dtype() for name, file in where.items()})
    taken = {part for parts in self.parts.values() for part in parts.values()}
    self.others = {
      name: file
      for name, file in where.items()
      if name not in taken and not (self.parts and name.endswith((*_UNUSED, ".weight_shape", ".g_idx")))
    }
    self._header = functools.cache(_header)
    self._last: tuple[str, np.ndarray] | None = None  # pieces of a fused matrix are asked for one after the other

  def get_slice(self, name: str) -> Any:
    """Shape, dtype and rows of a tensor."""
    return _Slice(self, name) if name in self.parts else self.handles[self.where[name]].get_slice(name)

  def get_tensor(self, name: str) -> np.ndarray:
    """A tensor, float32 where it was quantised."""
    if name not in self.parts:
      return self.handles[self.where[name]].get_tensor(name)
    if self._last is None or self._last[0] != name:
      self._last = None
      self._last = name, self._dequantised(name)
    return self._last[1]

  def shape(self, name: str) -> tuple[int, ...]:
    """[out, in] of a quantised matrix; [E, in, out] of experts in mxfp4."""
    parts = self.parts[name]
    if "blocks" in parts:
      experts, outputs, blocks, size = self._shape(parts["blocks"])
      return experts, 2 * size * blocks, outputs
    if "qweight" in parts:
      rows, columns = self._shape(parts["qweight"])
      per_word = 32 // self.values["bits"]
      return (columns * per_word, rows) if _method(self.values) == "awq" else (columns, rows * per_word)
    if "state" in parts:
      return tuple(self._state(parts)["shape"])
    if "weight_packed" in parts:
      return tuple(int(size) for size in self._raw(self._need(name, parts, "weight_shape")))
    return self._shape(parts["weight"])

  def bytes_of(self, part: str) -> int:
    """Bytes of a stored tensor."""
    begin, end = self._entry(part)["data_offsets"]
    return end - begin

  def _dequantised(self, name: str) -> np.ndarray:
    parts, shape = self.parts[name], self.shape(name)
    read = lambda part: self._raw(self._need(name, parts, part))  # noqa: E731
    try:
      if "blocks" in parts:
        return _mxfp4(read("blocks"), read("block_scales"))
      if "state" in parts:
        return self._four_bits(parts, read).reshape(shape)
      if "SCB" in parts:
        return read("weight").astype(np.float32) * (read("SCB").astype(np.float32)[:, None] / np.float32(127))
      if "qweight" in parts:
        return self._grouped_words(parts, read, shape)
      if "weight_packed" in parts:
        return self._packed(parts, read, shape)
      numbers, block = read("weight").astype(np.float32), self.values.get("weight_block_size")
      if "weight_zero_point" in parts:
        numbers -= _spread(read("weight_zero_point").astype(np.float32), shape, block)
      return numbers * _spread(read("scale").astype(np.float32), shape, block)
    except (ValueError, IndexError) as error:
      raise UserError(
        f"{self.where[next(iter(parts.values()))]}: the parts of {plain(name)} do not fit each other ({error}); fetch "
        "the folder again"
      ) from error

  def _four_bits(self, parts: Mapping[str, str], read) -> np.ndarray:
    state, absmax = self._state(parts), read("absmax")
    if "nested_absmax" in parts:
      scale = np.repeat(read("nested_absmax"), state["nested_blocksize"])[: absmax.size]
      absmax = read("nested_quant_map")[absmax] * scale + np.float32(state["nested_offset"])
    packed, size = read("weight").reshape(-1), math.prod(state["shape"])
    found = np.empty(2 * packed.size, np.float32)
    table = read("quant_map").astype(np.float32)
    found[0::2], found[1::2] = table[packed >> 4], table[packed & 15]
    found = found[:size] * np.repeat(absmax.astype(np.float32), state["blocksize"])[:size]
    return found.astype(_named_dtype(state["dtype"])).astype(np.float32)  # as bitsandbytes rounds what it makes

  def _grouped_words(self, parts: Mapping[str, str], read, shape: tuple[int, ...]) -> np.ndarray:
    """GPTQ and AWQ: [out, in]."""
    bits, is_awq, inputs = self.values["bits"], _method(self.values) == "awq", shape[1]
    words, zeros, scales = read("qweight"), read("qzeros").view(np.uint32), read("scales").astype(np.float32)
    order = _AWQ_ORDER if is_awq else None
    if not is_awq and self.values.get("checkpoint_format") != "gptq_v2":
      zeros = zeros + np.uint32(sum(1 << start for start in range(0, 32, bits)))
    zeros = _unpacked(zeros, bits, order)[:, : shape[0]]
    numbers = _unpacked(words.view(np.uint32), bits, order) if is_awq else _unpacked(words.T.view(np.uint32), bits).T
    group = np.arange(inputs) // _group_size(self.values, inputs)
    group = read("g_idx") if "g_idx" in parts else group
    if group.shape != (inputs,) or (group < 0).any() or (group >= len(scales)).any():
      raise ValueError(f"groups of {inputs} inputs, and {len(scales)} scales")
    found = (numbers.astype(np.float32) - zeros[group]) * scales[group]
    return found.T

  def _packed(self, parts: Mapping[str, str], read, shape: tuple[int, ...]) -> np.ndarray:
    """compressed-tensors: [out, in]."""
    words, scale = read("weight_packed"), read("scale").astype(np.float32)
    bits = 32 * words.shape[1] // shape[1]
    if bits not in (2, 4, 8) or "weight_g_idx" in parts:
      raise ValueError(f"{words.shape[1]} words for {shape[1]} numbers; 2, 4 and 8 bits in order are read")
    numbers = _unpacked(words.view(np.uint32), bits)[:, : shape[1]].astype(np.float32)
    zero = np.float32(2 ** (bits - 1))
    repeats = shape[1] // scale.shape[1]
    if "weight_zero_point" in parts:
      zero = _unpacked(read("weight_zero_point").T.view(np.uint32), bits)[:, : shape[0]].T.astype(np.float32)
      zero = np.repeat(zero, repeats, axis=1)
    return (numbers - zero) * np.repeat(scale, repeats, axis=1)

  # ---- what is stored ----

  def _need(self, name: str, parts: Mapping[str, str], part: str) -> str:
    if part not in parts:
      file = self.where[next(iter(parts.values()))]
      raise UserError(f"{file}: the quantised tensor {plain(name)} has no {part}; fetch the folder again")
    return parts[part]

  def _state(self, parts: Mapping[str, str]) -> dict[str, Any]:
    state = json.loads(self._raw(parts["state"]).tobytes())
    if state.get("blocksize", 0) < 1 or not isinstance(state.get("shape"), list):
      raise UserError(f"{self.where[parts['state']]}: {plain(parts['state'])} is no state of bitsandbytes")
    return state

  def _entry(self, part: str) -> dict[str, Any]:
    return self._header(self.where[part])[0][part]

  def _shape(self, part: str) -> tuple[int, ...]:
    return tuple(self._entry(part)["shape"])

  def _raw(self, part: str) -> np.ndarray:
    """A stored tensor, memory-mapped: the library's NumPy reader knows no fp8."""
    entry, start = self._entry(part), self._header(self.where[part])[1]
    if entry["dtype"] not in _DTYPES:
      raise UserError(f"{self.where[part]}: {plain(part)} is stored as {entry['dtype']}, which is not read; {_WHAT}")
    data = np.memmap(self.where[part], np.uint8, "r", start + entry["data_offsets"][0], (self.bytes_of(part),))
    return np.ascontiguousarray(data).view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])


class _Slice:
  """What `get_slice` of an open safetensors file returns, of a quantised tensor."""

  def __init__(self, whole: Dequantised, name: str):
    self.whole, self.name = whole, name

  def get_shape(self) -> list[int]:
    return list(self.whole.shape(self.name))

  def get_dtype(self) -> str:
    return "F32"

  def __getitem__(self, rows) -> np.ndarray:
    return self.whole.get_tensor(self.name)[rows]


def _grouped(where: Mapping[str, pathlib.Path], dtypes: Mapping[str, str]) -> dict[str, dict[str, str]]:
  """Name of a quantised matrix -> {what: name of the tensor that stores it}."""
  ends = {
    **dict.fromkeys(("qweight", "qzeros", "scales", "g_idx", "SCB", "weight_packed", "weight_shape")),
    **dict.fromkeys(("weight_zero_point", "weight_g_idx")),
  }
  found: dict[str, dict[str, str]] = {}
  for name in where:
    base, _, end = name.rpartition(".")
    if name.endswith(_MX):
      whole, _, kind = name.rpartition("_")
      found.setdefault(whole, {})["blocks" if kind == "blocks" else "block_scales"] = name
    elif end in ends:
      found.setdefault(f"{base}.weight", {})[end] = name
    elif end in ("weight_scale", "weight_scale_inv"):
      found.setdefault(f"{base}.weight", {})["scale"] = name
    elif ".weight.quant_state." in name:
      found.setdefault(name.partition(".quant_state.")[0], {})["state"] = name
    elif base.endswith(".weight") and end in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
      found.setdefault(base, {})[end] = name
  for name, parts in found.items():
    if name in where:
      parts["weight"] = name
  bare = [name for name in where if dtypes[name] not in FLOATS and name.endswith(".weight") and name not in found]
  return found | {name: {"weight": name} for name in bare}


def _header(file: pathlib.Path) -> tuple[dict[str, Any], int]:
  """(entries of a safetensors file, where its tensors start)."""
  with file.open("rb") as stream:
    size = struct.unpack("<Q", stream.read(8))[0]
    return json.loads(stream.read(size)), 8 + size


def _unpacked(words: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
  """Numbers [rows, columns * 32 / bits] of words [rows, columns]."""
  places = np.arange(32 // bits) if order is None else np.array(order)
  shifts = (places * bits).astype(np.uint32)
  numbers = (words[:, :, None] >> shifts) & np.uint32(2**bits - 1)
  return numbers.astype(np.uint8).reshape(len(words), -1)


def _mxfp4(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """Experts [E, in, out] of packed [E, out, blocks, 16] and scales [E, out, blocks], both uint8."""
  if packed.ndim != 4 or scales.shape != packed.shape[:3]:
    raise ValueError(f"scales {scales.shape} for blocks {packed.shape}")
  experts, outputs, blocks, size = packed.shape
  table = np.concatenate([_FP4, -_FP4])
  found = np.empty((experts, 2 * size * blocks, outputs), np.float32)
  for expert, own in enumerate(packed):  # one at a time: the numbers take eight times their bytes
    numbers = np.stack([table[own & 15], table[own >> 4]], -1).reshape(outputs, blocks, 2 * size)
    found[expert] = np.ldexp(numbers, scales[expert][..., None].astype(np.int32) - 127).reshape(outputs, -1).T
  return found


def _spread(scale: np.ndarray, shape: tuple[int, ...], block: Any) -> np.ndarray:
  """What is given for each block, row or the whole of a matrix, to be multiplied with it."""
  if scale.size == 1:
    return scale.reshape(())
  if scale.size == shape[0] and scale.shape[-1] in (1, shape[0]):
    return scale.reshape(-1, 1)
  tall, wide = block or (-(-shape[0] // scale.shape[0]), -(-shape[1] // scale.shape[1]))
  if scale.shape != (-(-shape[0] // tall), -(-shape[1] // wide)):
    raise ValueError(f"scales {scale.shape} for blocks of {tall} x {wide} of {shape}")
  return np.repeat(np.repeat(scale, tall, 0), wide, 1)[: shape[0], : shape[1]]


def _group_size(values: Mapping[str, Any], inputs: int) -> int:
  size = values.get("group_size", values.get("q_group_size", 128))
  return inputs if size in (-1, None) else int(size)


def _named_dtype(name: str) -> Any:
  return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
