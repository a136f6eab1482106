"""Quantised folders: every way of packing undone, against the libraries' numbers and packed here by hand."""

import json
import logging
import math
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
from test_families import REFERENCE
from test_families import write as write_family
from test_weights import CONFIG, edit_config, make_params

from in2core_jax.errors import UserError
from in2core_jax.model import model_files, quantised, weights
from in2core_jax.params import quantisation

SAVED = {"float8_e4m3fn": "F8_E4M3", "int32": "I32", "int8": "I8", "uint8": "U8", "int64": "I64", "float32": "F32"}
SAVED |= {"float16": "F16", "bfloat16": "BF16"}
CONFIGS = {
  **dict.fromkeys(("nf4", "nf4 double", "fp4", "fp4 double"), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
  "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
  **{
    case: {"quant_method": "gptq", "bits": bits, "group_size": 16, "desc_act": case == "gptq ordered"}
    for case, bits in (("gptq", 4), ("gptq 8 bits", 8), ("gptq 2 bits", 2), ("gptq ordered", 4))
  },
  "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"},
  **dict.fromkeys(("packed", "packed asymmetric"), {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
}


def save(file, tensors):
  """A safetensors file; the library's own writer knows no fp8 of NumPy."""
  head, at = {}, 0
  for name, array in tensors.items():
    head[name] = {"dtype": SAVED[array.dtype.name], "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
    at += array.nbytes
  text = json.dumps(head).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values()))


def view_of(folder, values, tensors):
  """Tensors behind "x." as a folder would hold them, opened."""
  save(folder / "model.safetensors", {f"x.{name}": np.ascontiguousarray(array) for name, array in tensors.items()})
  handle = model_files.open_safetensors(folder / "model.safetensors")
  where = dict.fromkeys(handle.keys(), folder / "model.safetensors")
  return quantised.Dequantised(values, where, {folder / "model.safetensors": handle})


@pytest.mark.parametrize("case", CONFIGS)
def test_packed_tensors_are_what_the_library_makes_of_them(case, tmp_path):
  with np.load(REFERENCE / ("gptq_awq.npz" if case.startswith(("gptq", "awq")) else "quantised.npz")) as stored:
    tensors = {key.removeprefix(f"{case}/"): stored[key] for key in stored.files if key.startswith(f"{case}/")}
  wanted = tensors.pop("=")
  view = view_of(tmp_path, CONFIGS[case], tensors)
  assert list(view.parts) == ["x.weight"] and not view.others
  assert view.get_slice("x.weight").get_shape() == list(wanted.shape)
  np.testing.assert_allclose(view.get_slice("x.weight")[1:3], wanted[1:3], rtol=1e-6)
  np.testing.assert_allclose(view.get_tensor("x.weight"), wanted, rtol=1e-6)


@pytest.mark.parametrize(("case", "kind"), [("nf4", "nf4"), ("nf4 double", "nf4"), ("int8", "int8")])
def test_codes_of_bitsandbytes_stay_as_they_are_in_frozen_weights(case, kind, tmp_path):
  with np.load(REFERENCE / "quantised.npz") as stored:
    tensors = {key.removeprefix(f"{case}/"): stored[key] for key in stored.files if key.startswith(f"{case}/")}
  wanted = tensors.pop("=")
  kept = quantisation.quantise(view_of(tmp_path, CONFIGS[case], tensors).get_tensor("x.weight").T, kind)
  np.testing.assert_array_equal(kept.codes.T, tensors["weight"].reshape(len(wanted), -1))
  np.testing.assert_allclose(np.asarray(kept).T, wanted, rtol=5e-3 if "double" in case else 1e-6)  # in bfloat16


# ---- by hand ---------------------------------------------------------------------------------------------------------


def words(numbers, bits, order=None):
  """Whole numbers [rows, columns] in 32-bit words, one at a time: the oracle of `_unpacked`."""
  each = 32 // bits
  found = np.zeros((numbers.shape[0], numbers.shape[1] // each), np.uint32)
  for row, column in np.ndindex(numbers.shape):
    place = (order or range(each))[column % each]
    found[row, column // each] |= np.uint32(int(numbers[row, column]) << (bits * place))
  return found.view(np.int32)


def gptq(weight, rng, bits=4, stored="gptq"):
  """GPTQ in groups of 16 inputs with activation order: (tensors, matrix)."""
  outputs, inputs = weight.shape
  numbers, group = rng.integers(0, 2**bits, (inputs, outputs)), rng.permutation(np.arange(inputs) // 16)
  zeros = rng.integers(1, 2**bits, (inputs // 16, outputs))
  scales = rng.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
  tensors = {"qweight": words(numbers.T, bits).T, "qzeros": words(zeros - (stored == "gptq"), bits)}
  found = np.empty((outputs, inputs), np.float32)
  for i in range(inputs):
    found[:, i] = scales[group[i]].astype(np.float32) * (numbers[i] - zeros[group[i]])
  return tensors | {"scales": scales, "g_idx": group.astype(np.int32)}, found


def awq(weight, rng):
  outputs, inputs = weight.shape
  numbers, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (inputs // 16, outputs))
  scales, order = rng.uniform(0.01, 0.1, zeros.shape).astype(np.float16), (0, 4, 1, 5, 2, 6, 3, 7)
  found = (numbers - np.repeat(zeros, 16, 0)) * np.repeat(scales.astype(np.float32), 16, 0)
  return {"qweight": words(numbers, 4, order), "qzeros": words(zeros, 4, order), "scales": scales}, found.T


def fp8(weight, rng, scale):
  """fp8 with scales of a shape: of blocks of 16 x 24, of rows, or one."""
  numbers = rng.uniform(-400, 400, weight.shape).astype(ml_dtypes.float8_e4m3fn)
  outputs, inputs = weight.shape
  shape = {"block": (-(-outputs // 16), -(-inputs // 24)), "rows": (outputs, 1), "one": (1,)}[scale]
  scales = rng.uniform(1e-4, 1e-3, shape).astype(np.float32)
  name = "weight_scale_inv" if scale == "block" else "weight_scale"
  spread = np.empty(weight.shape, np.float32)
  for i, j in np.ndindex(weight.shape):
    spread[i, j] = scales[i // 16, j // 24] if scale == "block" else scales[i if scale == "rows" else 0].item()
  return {"weight": numbers, name: scales}, numbers.astype(np.float32) * spread


def int8_rows(weight, rng):
  numbers, scales = rng.integers(-128, 128, weight.shape), rng.uniform(0.01, 0.1, (len(weight), 1))
  zero = rng.integers(-5, 5, scales.shape)
  tensors = {"weight": numbers.astype(np.int8), "weight_zero_point": zero.astype(np.int8)}
  return tensors | {"weight_scale": scales.astype(np.float32)}, ((numbers - zero) * scales.astype("f4")).astype("f4")


BY_HAND = {
  "gptq": (gptq, {}, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}),
  "gptq 8 bits": (gptq, {"bits": 8}, {"quant_method": "gptq", "bits": 8, "group_size": 16}),
  "gptq_v2": (gptq, {"stored": "v2"}, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}),
  "awq": (awq, {}, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}),
  "fp8": (fp8, {"scale": "block"}, {"quant_method": "fp8", "weight_block_size": [16, 24]}),
  "fbgemm": (fp8, {"scale": "rows"}, {"quant_method": "fbgemm_fp8"}),
  "float": (fp8, {"scale": "one"}, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
  "int": (int8_rows, {}, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
}


def quantise(folder, tensors, how, skip=("embed", "norm", "lm_head")):
  """Packs the matrices of a folder's tensors at random; returns the matrices that they stand for."""
  make, options, values = how
  rng, packed, found = np.random.default_rng(0), {}, {}
  for name, tensor in tensors.items():
    if tensor.ndim < 2 or any(word in name for word in skip):
      packed[name] = tensor
      continue
    parts, found[name] = make(tensor, rng, **options)
    packed |= {f"{name.removesuffix('.weight')}.{key}": np.ascontiguousarray(part) for key, part in parts.items()}
  save(folder / "model.safetensors", packed)
  edit_config(folder, quantization_config=values)
  return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """A folder that is not quantised."""
  folder = tmp_path_factory.mktemp("models") / "plain"
  weights.save_hf_dir(folder, CONFIG, make_params(CONFIG))
  return folder


@pytest.mark.parametrize("case", BY_HAND)
def test_a_quantised_folder_is_the_folder_of_its_matrices(case, plain, tmp_path, caplog):
  shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
  tensors = safetensors.numpy.load_file(plain / "model.safetensors")
  matrices = quantise(tmp_path, tensors, BY_HAND[case])
  with caplog.at_level(logging.WARNING):
    config, params = weights.load_hf_dir(tmp_path)
  count = sum(math.prod(matrix.shape) for matrix in matrices.values())
  assert f"{len(matrices)} matrices are stored by {BY_HAND[case][2]['quant_method']} in 0.00 GB" in caplog.text
  assert f"as float32 they take {count * 4 / 1e9:.2f} GB" in caplog.text
  (tmp_path / "plain").mkdir()
  weights.save_hf_dir(tmp_path / "plain", config, params)
  written = safetensors.numpy.load_file(tmp_path / "plain/model.safetensors")
  for name, tensor in (tensors | matrices).items():
    np.testing.assert_allclose(written[name], tensor, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("kind", quantisation.KINDS)
def test_frozen_weights_are_rounded_while_they_are_read(kind, plain, tmp_path, caplog):
  config, params = weights.load_hf_dir(plain)
  wanted = quantisation.quantise_tree(params, kind)
  tiny.assert_trees_equal(weights.load_hf_dir(plain, "float32", None, kind)[1], wanted)
  assert config == weights.load_hf_dir(plain, "bfloat16", None, kind)[0]
  few = [leaf for leaf in jax.tree.leaves(wanted, is_leaf=quantisation.is_leaf) if quantisation.is_leaf(leaf)]
  assert len(few) == 7
  shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
  quantise(tmp_path, safetensors.numpy.load_file(plain / "model.safetensors"), BY_HAND["fp8"])
  with caplog.at_level(logging.WARNING):
    weights.load_hf_dir(tmp_path, "float32", None, kind)
  assert f"and rounded once more: as {kind} they take 0.00 GB" in caplog.text


def test_fused_matrices_are_dequantised_and_split(tmp_path):
  write_family(tmp_path, "phi3")
  tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  matrices = quantise(tmp_path, tensors, BY_HAND["fp8"])
  config, params = weights.load_hf_dir(tmp_path)
  qkv = matrices["model.layers.1.self_attn.qkv_proj.weight"]
  parts = [params["layers"]["attention"][f"{name}_proj"]["kernel"][1].T for name in "qkv"]
  np.testing.assert_allclose(np.concatenate(parts), qkv, rtol=1e-6)
  assert jax.tree.leaves(params)[0].dtype == np.float32 and config.model_type == "phi3"


def mxfp4(experts, rng):
  """Parts of experts [E, in, out] and what they stand for, number by number (OCP Microscaling Formats, MXFP4)."""
  count, inputs, outputs = experts.shape
  blocks = np.zeros((count, outputs, inputs // 32, 16), np.uint8)
  scales = rng.integers(120, 130, blocks.shape[:3]).astype(np.uint8)
  found = np.empty(experts.shape, np.float32)
  for e, i, o in np.ndindex(found.shape):
    sign, exponent, fraction = (int(rng.integers(n)) for n in (2, 4, 2))
    blocks[e, o, i // 32, i % 32 // 2] |= (8 * sign + 2 * exponent + fraction) << (4 * (i % 2))
    number = (1 + fraction / 2) * 2.0 ** (exponent - 1) if exponent else fraction / 2
    found[e, i, o] = (-1) ** sign * number * 2.0 ** (int(scales[e, o, i // 32]) - 127)
  return {"blocks": blocks, "scales": scales}, found


def test_experts_of_gpt_oss_are_read_as_they_are_published(tmp_path):
  write_family(tmp_path, "gpt oss")
  rng, packed, wanted = np.random.default_rng(0), {}, {}
  for name, tensor in safetensors.numpy.load_file(tmp_path / "model.safetensors").items():
    parts = {"": tensor}
    if name.endswith("experts.gate_up_proj"):
      parts, wanted[name] = mxfp4(tensor, rng)
    packed |= {f"{name}_{key}" if key else name: part for key, part in parts.items()}
  save(tmp_path / "model.safetensors", packed)
  edit_config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
  config, params = weights.load_hf_dir(tmp_path)
  (tmp_path / "plain").mkdir()
  weights.save_hf_dir(tmp_path / "plain", config, params)
  written = safetensors.numpy.load_file(tmp_path / "plain/model.safetensors")
  assert len(wanted) == config.num_layers
  for name, tensor in wanted.items():
    np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_blocks_without_their_scales_are_named(tmp_path):
  tensors, _ = mxfp4(np.zeros((1, 32, 2)), np.random.default_rng(0))
  named = {f"gate_up_proj_{key}": part for key, part in tensors.items()}
  with pytest.raises(UserError, match="x.gate_up_proj has no block_scales; fetch the folder again"):
    view_of(tmp_path, {"quant_method": "mxfp4"}, {"gate_up_proj_blocks": tensors["blocks"]}).get_tensor(
      "x.gate_up_proj"
    )
  named["gate_up_proj_scales"] = tensors["scales"][:, 1:]
  with pytest.raises(UserError, match=r"scales \(1, 1, 1\) for blocks \(1, 2, 1, 16\)"):
    view_of(tmp_path, {"quant_method": "mxfp4"}, named).get_tensor("x.gate_up_proj")


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"quant_method": "exl2"}, "the method 'exl2' is not read; known: bitsandbytes, gptq"),
    ({"quant_method": "gptq", "bits": 3}, "gptq with bits 3 is not read; 2 or 4 or 8 are"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq in the format 'gemv' is not read; gemm are"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized' is not read"),
    ([4], "it must be an object"),
  ],
)
def test_other_methods_are_refused_by_name(values, message, plain, tmp_path):
  shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
  edit_config(tmp_path, quantization_config=values)
  with pytest.raises(UserError, match=message) as caught:
    weights.load_hf_dir(tmp_path)
  assert "\n" not in str(caught.value)


def test_parts_that_do_not_fit_are_named(tmp_path):
  tensors, _ = gptq(np.zeros((16, 32)), np.random.default_rng(0))
  values = BY_HAND["gptq"][2]
  lost = {key: value for key, value in tensors.items() if key != "scales"}
  with pytest.raises(UserError, match="x.weight has no scales; fetch the folder again"):
    view_of(tmp_path, values, lost).get_tensor("x.weight")
  wrong = tensors | {"g_idx": tensors["g_idx"] + 7}
  with pytest.raises(UserError, match=r"parts of x.weight do not fit each other \(groups of 32 inputs"):
    view_of(tmp_path, values, wrong).get_tensor("x.weight")
  block = {"weight": np.zeros((32, 48), ml_dtypes.float8_e4m3fn), "weight_scale_inv": np.ones((3, 2), np.float32)}
  with pytest.raises(UserError, match=r"scales \(3, 2\) for blocks of 16 x 24"):
    view_of(tmp_path, BY_HAND["fp8"][2], block).get_tensor("x.weight")
