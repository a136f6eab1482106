"""Weights in and out: GGUF and Hugging Face folders in, Hugging Face folders out; every name map is a table.

All readers fill the parameter tree of `model.py`: kernels are [in, out] and stacked over layers, [L, in, out]. Files
store [out, in] per layer. A reader takes every tensor of the file or refuses: a tensor that nobody reads would mean
that the decoder computes something else than the file's author did.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from in2core_jax import assets, hf_config, model
from in2core_jax import tokenizer as tokenizer_lib
from in2core_jax.errors import UserError
from in2core_jax.gguf_file import GgufFile, Place, parts_of, read_gguf
from in2core_jax.model_config import ModelConfig

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
EMBEDDED_MODEL = "smollm2-135m-instruct-q4_1"
EMBEDDED_MODELS = {"smollm2": EMBEDDED_MODEL, "gemma3": "gemma-3-270m-q4_k_m"}  # word of --model -> asset
SPECS = "smollm2, gemma3, hf:DIR, gguf:FILE, random:CONFIG.json or truncated:MODEL:LAYERS"

# Leaf path in the parameter tree -> tensor name; {i} is the layer.
GGUF_NAMES = {
  "embed/embedding": "token_embd.weight",
  "final_norm/scale": "output_norm.weight",
  "lm_head/kernel": "output.weight",
  "layers/attention_norm/scale": "blk.{i}.attn_norm.weight",
  "layers/attention/q_proj/kernel": "blk.{i}.attn_q.weight",
  "layers/attention/k_proj/kernel": "blk.{i}.attn_k.weight",
  "layers/attention/v_proj/kernel": "blk.{i}.attn_v.weight",
  "layers/attention/o_proj/kernel": "blk.{i}.attn_output.weight",
  "layers/mlp_norm/scale": "blk.{i}.ffn_norm.weight",
  "layers/mlp/gate_proj/kernel": "blk.{i}.ffn_gate.weight",
  "layers/mlp/up_proj/kernel": "blk.{i}.ffn_up.weight",
  "layers/mlp/down_proj/kernel": "blk.{i}.ffn_down.weight",
  "layers/attention/q_norm/scale": "blk.{i}.attn_q_norm.weight",
  "layers/attention/k_norm/scale": "blk.{i}.attn_k_norm.weight",
  "layers/attention_post_norm/scale": "blk.{i}.post_attention_norm.weight",
  "layers/mlp_post_norm/scale": "blk.{i}.post_ffw_norm.weight",
}
HF_NAMES = {
  "embed/embedding": "model.embed_tokens.weight",
  "final_norm/scale": "model.norm.weight",
  "lm_head/kernel": "lm_head.weight",
  "layers/attention_norm/scale": "model.layers.{i}.input_layernorm.weight",
  "layers/attention/q_proj/kernel": "model.layers.{i}.self_attn.q_proj.weight",
  "layers/attention/k_proj/kernel": "model.layers.{i}.self_attn.k_proj.weight",
  "layers/attention/v_proj/kernel": "model.layers.{i}.self_attn.v_proj.weight",
  "layers/attention/o_proj/kernel": "model.layers.{i}.self_attn.o_proj.weight",
  "layers/attention/q_proj/bias": "model.layers.{i}.self_attn.q_proj.bias",
  "layers/attention/k_proj/bias": "model.layers.{i}.self_attn.k_proj.bias",
  "layers/attention/v_proj/bias": "model.layers.{i}.self_attn.v_proj.bias",
  "layers/mlp_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
  "layers/mlp/gate_proj/kernel": "model.layers.{i}.mlp.gate_proj.weight",
  "layers/mlp/up_proj/kernel": "model.layers.{i}.mlp.up_proj.weight",
  "layers/mlp/down_proj/kernel": "model.layers.{i}.mlp.down_proj.weight",
  "layers/attention/q_norm/scale": "model.layers.{i}.self_attn.q_norm.weight",
  "layers/attention/k_norm/scale": "model.layers.{i}.self_attn.k_norm.weight",
}
# With norms behind attention and MLP, Llama's name for the norm before the MLP means the one behind attention.
HF_POST_NORM_NAMES = HF_NAMES | {
  "layers/attention_post_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
  "layers/mlp_norm/scale": "model.layers.{i}.pre_feedforward_layernorm.weight",
  "layers/mlp_post_norm/scale": "model.layers.{i}.post_feedforward_layernorm.weight",
}
# Tensors that old exports carry and that follow from the configuration.
HF_IGNORED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
GGUF_ROTARY = {"layers/attention/q_proj/kernel": "num_heads", "layers/attention/k_proj/kernel": "num_kv_heads"}


def load_model(spec: str, dtype: str = "float32", seed: int = 0) -> tuple[ModelConfig, Any, Any, str]:
  """Model, tokenizer and a hash of the weights for what `--model` says.

  Args:
    spec: smollm2 or gemma3 (embedded, nothing is downloaded), hf:DIR, gguf:FILE, random:CONFIG.json, or
      truncated:MODEL:LAYERS, the first layers of another one.
    dtype: float32 or bfloat16, of the weights in memory.
    seed: of the weights of `random:`; unused otherwise.

  Returns:
    (config, params, tokenizer, model_hash). The hash names the file contents, not `dtype`: SHA-256 of a GGUF file;
    `hf_hash` of a folder; configuration and seed of random weights; whole model and layers of a truncated one.

  Raises:
    UserError: unknown form, or whatever the readers find wrong.
  """
  if spec.startswith("truncated:"):
    return _load_truncated(spec, dtype, seed)
  kind, path = _parse_spec(spec)
  if kind == "gguf":
    config, params = load_gguf(path, _dtype(dtype))
    return config, params, tokenizer_lib.tokenizer_from_gguf(path), _file_hash(path)
  if kind == "hf":
    config, params = load_hf_dir(path, _dtype(dtype))
    return config, params, tokenizer_lib.tokenizer_from_dir(path), hf_hash(path)
  config, params = load_random(path, seed, _dtype(dtype))
  digest = hashlib.sha256(f"random {config} seed {seed}".encode()).hexdigest()
  return config, params, _embedded_tokenizer(path, config), digest


def describe_model(spec: str) -> tuple[ModelConfig, Any]:
  """(config, tokenizer) of what `--model` says, without reading its weights; arguments and errors of `load_model`."""
  if spec.startswith("truncated:"):
    whole, layers = _parse_truncated(spec)
    config, tokenizer = describe_model(whole)
    return _fewer_layers(spec, config, layers), tokenizer
  kind, path = _parse_spec(spec)
  if kind == "gguf":
    return _gguf_config(read_gguf(path)), tokenizer_lib.tokenizer_from_gguf(path)
  if kind == "hf":
    return hf_config.read_config(path / "config.json"), tokenizer_lib.tokenizer_from_dir(path)
  config = hf_config.read_config(path)
  return config, _embedded_tokenizer(path, config)


def _load_truncated(spec: str, dtype: str, seed: int) -> tuple[ModelConfig, Any, Any, str]:
  """The first layers of another model below its own final norm and vocabulary; as `load_model`."""
  whole, layers = _parse_truncated(spec)
  config, params, tokenizer, digest = load_model(whole, dtype, seed)
  config = _fewer_layers(spec, config, layers)
  params = params | {"layers": jax.tree.map(lambda leaf: leaf[:layers], params["layers"])}
  return config, params, tokenizer, hashlib.sha256(f"truncated {digest} layers {layers}".encode()).hexdigest()


def _parse_truncated(spec: str) -> tuple[str, int]:
  """truncated:MODEL:LAYERS -> (MODEL, LAYERS)."""
  whole, _, layers = spec.removeprefix("truncated:").rpartition(":")
  if not whole or not layers.isdecimal():
    raise UserError(f"--model={spec} is not understood; write truncated:MODEL:LAYERS, such as truncated:smollm2:15")
  return whole, int(layers)


def _fewer_layers(spec: str, config: ModelConfig, layers: int) -> ModelConfig:
  if not 0 < layers <= config.num_layers:
    raise UserError(f"--model={spec}: the whole model has {config.num_layers} layers; keep 1 to {config.num_layers}")
  return dataclasses.replace(config, num_layers=layers)


def _parse_spec(spec: str) -> tuple[str, Any]:
  """(hf, gguf or random; its folder or file, or the parts of its file)."""
  if spec in EMBEDDED_MODELS:
    return "gguf", assets.asset_parts(EMBEDDED_MODELS[spec])
  kind, _, rest = spec.partition(":")
  if kind not in ("hf", "gguf", "random") or not rest:
    raise UserError(f"--model={spec} is not understood; use {SPECS}")
  return kind, pathlib.Path(rest).expanduser()


def _embedded_tokenizer(path: pathlib.Path, config: ModelConfig) -> Any:
  """The tokenizer that `random:` uses, refused where the model has too few vocabulary entries for it."""
  tokenizer = tokenizer_lib.tokenizer_from_gguf(assets.asset_path(EMBEDDED_MODEL))
  if config.vocab_size < len(tokenizer):
    raise UserError(
      f"{path}: vocab_size {config.vocab_size} is smaller than the {len(tokenizer)} entries of the embedded tokenizer, "
      f"which random: uses; write vocab_size {len(tokenizer)} or more"
    )
  return tokenizer


def load_gguf(place: Place, dtype=np.float32) -> tuple[ModelConfig, dict]:
  """Reads a GGUF file of the architecture llama or gemma3, dequantised.

  Of llama the format stores query and key rows permuted for interleaved rotary pairs (2j, 2j + 1); this decoder rotates
  the halves (j, j + head_dim / 2), so the rows are put back: [H, head_dim / 2, 2, D] -> [H, 2, head_dim / 2, D].
  Of gemma3 it stores the factors of norms, 1 + scale.

  Args:
    place: the .gguf file.
    dtype: float32 or bfloat16, of the returned arrays.

  Returns:
    The configuration and the parameters as NumPy arrays.

  Raises:
    UserError: unknown architecture, tensors missing, left over, misshapen or with NaN; each is named.
  """
  dtype = _dtype(dtype)
  file = read_gguf(place)
  config = _gguf_config(file)

  def read(name: str, leaf: str) -> np.ndarray:
    array = file.read(name)
    if leaf.endswith("_norm/scale"):
      return array - np.float32(config.norm_offset)
    if leaf not in GGUF_ROTARY or file.metadata["general.architecture"] != "llama":
      return array
    heads = getattr(config, GGUF_ROTARY[leaf])
    return array.reshape(heads, config.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)

  return config, _assemble(config, GGUF_NAMES, set(file.tensors), read, dtype, str(file.path))


def load_hf_dir(path: str | pathlib.Path, dtype=np.float32) -> tuple[ModelConfig, dict]:
  """Reads config.json and model.safetensors (or the shards of model.safetensors.index.json).

  Args:
    path: the folder.
    dtype: float32 or bfloat16, of the returned arrays; the files may hold float64, float32, float16 or bfloat16.

  Returns:
    The configuration and the parameters as NumPy arrays.

  Raises:
    UserError: not such a folder, a model type that does not map exactly, a missing shard, or tensors missing, left
      over, misshapen or with NaN; each is named.
  """
  dtype, folder = _dtype(dtype), pathlib.Path(path)
  config = hf_config.read_config(folder / "config.json")
  where = _hf_files(folder)
  handles = {file: _open_safetensors(file) for file in sorted(set(where.values()))}

  def read(name: str, leaf: str) -> np.ndarray:
    stored = handles[where[name]].get_slice(name).get_dtype()
    if stored not in ("F64", "F32", "F16", "BF16"):
      raise UserError(f"{where[name]}: tensor {name} is stored as {stored}; convert it to float32, float16 or bfloat16")
    return handles[where[name]].get_tensor(name)

  missing = [name for name, file in where.items() if name not in set(handles[file].keys())]
  if missing:
    raise UserError(f"{where[missing[0]]}: the index says that it holds {missing[0]}, but it does not; fetch it again")
  ignored = {name for name in where if re.fullmatch(HF_IGNORED, name)}
  if config.tie_embeddings:
    ignored.add(HF_NAMES["lm_head/kernel"])  # some exports write the tied matrix twice
  return config, _assemble(config, _hf_names(config), set(where) - ignored, read, dtype, str(folder))


def load_random(path: str | pathlib.Path, seed: int = 0, dtype=np.float32) -> tuple[ModelConfig, Any]:
  """Random weights for a configuration with the keys of a Hugging Face config.json; same seed, same weights."""
  config = hf_config.read_config(pathlib.Path(path))
  return config, model.init_params(config, jax.random.key(seed), _dtype(dtype))


def save_hf_dir(path: str | pathlib.Path, config: ModelConfig, params, tokenizer=None) -> None:
  """Writes config.json and model.safetensors (and the tokenizer) for transformers to load.

  LoRA factors are folded in: W + A B, added in float32 and rounded to the dtype of W.

  Args:
    path: the folder; made when absent, files of the same names are replaced.
    config: the model's shape.
    params: the parameter tree, NumPy or JAX arrays, float32 or bfloat16.
    tokenizer: a transformers tokenizer, saved beside the weights when given.

  Raises:
    UserError: a configuration that no known Hugging Face model type expresses, or leaves that have no place there.
  """
  folder = pathlib.Path(path)
  leaves, names = traverse_util.flatten_dict(_fold_lora(params), sep="/"), _hf_names(config)
  absent = sorted(set(leaves) - set(names))
  if absent:
    raise UserError(
      f"export to {folder}: no Hugging Face tensor stands for {', '.join(absent)}; remove or merge it first"
    )
  tensors = {}
  for leaf, stacked in leaves.items():
    array = np.asarray(stacked)
    rows = enumerate(array) if leaf.startswith("layers/") else [(0, array)]
    for i, row in rows:
      tensors[names[leaf].format(i=i)] = np.ascontiguousarray(row.T if leaf.endswith("/kernel") else row)
  values = hf_config.write_config(config, tensors[HF_NAMES["embed/embedding"]].dtype.name)
  folder.mkdir(parents=True, exist_ok=True)
  if tokenizer is not None:
    tokenizer.save_pretrained(folder)
    values |= {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
  partial = folder / "model.safetensors.partial"
  safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
  partial.replace(folder / "model.safetensors")
  partial = folder / "config.json.partial"
  partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
  partial.replace(folder / "config.json")


def hf_hash(path: str | pathlib.Path) -> str:
  """Content hash of a Hugging Face folder: config.json and every byte of its weight files, at about 1 GB a second."""
  folder = pathlib.Path(path)
  digest = hashlib.sha256((folder / "config.json").read_bytes())
  weight_files = sorted(set(_hf_files(folder).values()))
  with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing leaves the interpreter free
    for file, content in zip(weight_files, pool.map(_file_hash, weight_files), strict=True):
      digest.update(f"{file.name} {content}\n".encode())
  return digest.hexdigest()


def _dtype(dtype) -> np.dtype:
  """The dtype by name or as it is."""
  found = DTYPES.get(dtype) if isinstance(dtype, str) else np.dtype(dtype)
  if found not in DTYPES.values():
    raise UserError(f"dtype {dtype} is not supported for weights; use {' or '.join(DTYPES)}")
  return found


def _hf_names(config: ModelConfig) -> dict[str, str]:
  return HF_POST_NORM_NAMES if config.post_norms else HF_NAMES


def _file_hash(place: Place) -> str:
  """SHA-256 of a file's content, however many parts it comes in."""
  digest = hashlib.sha256()
  for part in parts_of(place):
    with part.open("rb") as stream:
      while piece := stream.read(1 << 20):
        digest.update(piece)
  return digest.hexdigest()


def _assemble(
  config: ModelConfig, names: dict[str, str], stored: set[str], read: Callable, dtype: np.dtype, origin: str
) -> dict:
  """Fills the parameter tree of `config` from `read(name, leaf)`, which returns [out, in] arrays one at a time."""
  shapes = jax.eval_shape(lambda key: model.init_params(config, key), jax.random.key(0))
  shapes = {leaf: value.shape for leaf, value in traverse_util.flatten_dict(shapes, sep="/").items()}
  strange = sorted(leaf for leaf in shapes if leaf not in names)
  if strange:
    raise UserError(f"{origin}: this file format has no tensor for {', '.join(strange)}")
  layers = range(config.num_layers)
  wanted = {
    leaf: [names[leaf].format(i=i) for i in (layers if leaf.startswith("layers/") else (0,))] for leaf in shapes
  }
  expected = {name for group in wanted.values() for name in group}
  _refuse(origin, expected - stored, "tensors are missing", "the file is incomplete or of another architecture")
  _refuse(origin, stored - expected, "tensors are not part of this decoder", "the model is of another architecture")
  params = {}
  for leaf, shape in shapes.items():
    stacked = np.empty(shape, dtype)
    for i, name in enumerate(wanted[leaf]):
      target = stacked[i] if leaf.startswith("layers/") else stacked
      array = read(name, leaf)
      array = array.T if leaf.endswith("/kernel") else array
      if array.shape != target.shape:
        raise UserError(
          f"{origin}: tensor {name} is {array.shape} ([in, out]), the configuration asks for {target.shape}; "
          "file and configuration do not belong together"
        )
      target[...] = array
      if not np.isfinite(target).all():
        raise UserError(
          f"{origin}: tensor {name} holds NaN or infinity; the weights are damaged, use another checkpoint"
        )
    params[leaf] = stacked
  return traverse_util.unflatten_dict(params, sep="/")


def _refuse(origin: str, names: Iterable[str], what: str, why: str) -> None:
  """Raises when `names` is not empty, naming the first five."""
  listed = sorted(names)
  if listed:
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    raise UserError(f"{origin}: {what}: {', '.join(listed[:5])}{more}; {why}")


def _gguf_config(file: GgufFile) -> ModelConfig:
  """The shape that a GGUF file of a known architecture states in its metadata."""
  values, origin = file.metadata, str(file.path)
  architecture = values.get("general.architecture")
  if architecture not in ("llama", "gemma3"):
    raise UserError(
      f"{origin}: architecture {architecture!r} is not supported; known: llama (Llama, Mistral, SmolLM2), gemma3"
    )
  embedding = file.tensors.get(GGUF_NAMES["embed/embedding"])
  if embedding is None:
    raise UserError(f"{origin}: tensor {GGUF_NAMES['embed/embedding']} is missing; the file is incomplete")

  def get(key: str, default=None):
    value = values.get(f"{architecture}.{key}", default)
    if value is None:
      raise UserError(f"{origin}: metadata {architecture}.{key} is missing; the file is incomplete")
    # The file holds float32: 9.99999975e-06 was written as 1e-05.
    return float(str(np.float32(value))) if isinstance(value, float) else value

  heads = get("attention.head_count")
  head_dim = get("attention.key_length", get("embedding_length") // heads)
  scaling = values.get(f"{architecture}.rope.scaling.type", "none")
  partial_rotary = get("rope.dimension_count", head_dim) != head_dim
  if scaling not in ("none", "linear") or "rope_freqs.weight" in file.tensors or partial_rotary:
    raise UserError(
      f"{origin}: its rotary frequencies are scaled in a way that is not read from GGUF; use the model's hf: folder"
    )
  factor = (("factor", get("rope.scaling.factor")), ("rope_type", "linear")) if scaling == "linear" else None
  if architecture == "llama":
    family = {"sliding_window": values.get("llama.attention.sliding_window")}
  else:
    family = _gemma3_traits(get, origin)
  return ModelConfig(
    vocab_size=embedding.shape[0],
    hidden_size=get("embedding_length"),
    intermediate_size=get("feed_forward_length"),
    num_layers=get("block_count"),
    num_heads=heads,
    num_kv_heads=get("attention.head_count_kv", heads),
    head_dim=head_dim,
    rope_theta=get("rope.freq_base", 10000.0),
    rms_eps=get("attention.layer_norm_rms_epsilon"),
    tie_embeddings=GGUF_NAMES["lm_head/kernel"] not in file.tensors,
    rope_scaling=factor,
    **family,
  )


def _gemma3_traits(get: Callable, origin: str) -> dict[str, Any]:
  """What files of the architecture gemma3 leave to the program that reads them (llama.cpp holds the same constants)."""
  if get("block_count") == 62 or get("final_logit_softcapping", 0.0) or get("attention.sliding_window_pattern", 6) != 6:
    raise UserError(
      f"{origin}: Gemma 3 27B, capped logits and other turns of local and global layers than five to one are not read "
      "from GGUF; use the model's hf: folder"
    )
  return hf_config.GEMMA3 | {
    "sliding_window": get("attention.sliding_window"),
    "global_every": 6,
    "local_rope_theta": get("rope.freq_base_swa", 10000.0),
    "query_scalar": float(get("attention.key_length")),
  }


def _hf_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Tensor name -> safetensors file that holds it."""
  single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
  if single.is_file():
    return dict.fromkeys(_open_safetensors(single).keys(), single)
  if not index.is_file():
    pickled = " Pickled weights (*.bin) are never loaded: save them as safetensors." if [*folder.glob("*.bin")] else ""
    raise UserError(f"{folder}: neither {single.name} nor {index.name} is there; give a Hugging Face folder.{pickled}")
  try:
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
  except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
    raise UserError(f"{index}: not a safetensors index ({error!r}); fetch it again") from error
  absent = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
  if absent:
    raise UserError(
      f"{folder}: {len(absent)} shards named in {index.name} are missing: {', '.join(absent[:5])}; fetch them"
    )
  return {name: folder / file for name, file in weight_map.items()}


def _open_safetensors(file: pathlib.Path):
  try:
    return safetensors.safe_open(file, framework="np")
  except safetensors.SafetensorError as error:
    raise UserError(f"{file}: not a complete safetensors file ({error}); fetch it again") from error


def _fold_lora(params) -> dict:
  """The same tree without LoRA leaves: kernel + lora_a lora_b."""
  flat = traverse_util.flatten_dict(params, sep="/")
  for leaf in [leaf for leaf in flat if leaf.endswith("/lora_a")]:
    base = leaf.removesuffix("lora_a")
    a, b = (np.asarray(flat.pop(base + name), np.float32) for name in ("lora_a", "lora_b"))
    kernel = np.asarray(flat[base + "kernel"])
    flat[base + "kernel"] = (kernel.astype(np.float32) + a @ b).astype(kernel.dtype)
  return traverse_util.unflatten_dict(flat, sep="/")
