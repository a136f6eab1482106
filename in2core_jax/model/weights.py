"""Weights in and out: GGUF and Hugging Face folders in, Hugging Face folders out; every name map is a table.

All readers fill the parameter tree of `decoder.py`: kernels are [in, out] and stacked over layers, [L, in, out]. Files
store [out, in] per layer. A reader takes every tensor of the file or refuses: a tensor that nobody reads would mean
that the decoder computes something else than the file's author did.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from in2core_jax.data import assets, hub
from in2core_jax.errors import UserError, how_many
from in2core_jax.model import (
  decoder,
  hf_config,
  hf_folder,
  model_files,
  parameter_tree,
  peft_folder,
  peft_writer,
  quantised,
  stacks,
)
from in2core_jax.model import tokenizer as tokenizer_lib
from in2core_jax.model.config import ModelConfig
from in2core_jax.model.families import FAMILIES
from in2core_jax.model.gguf_config import ARCHITECTURES, gguf_config
from in2core_jax.model.gguf_file import Place, read_gguf
from in2core_jax.model.gguf_file import file_hash as _file_hash
from in2core_jax.model.gguf_rope import FACTOR_TENSORS
from in2core_jax.model.schema import plain
from in2core_jax.model.tensors import (
  GGUF_NAMES,
  HF_NAMES,
  fuse,
  fused_pieces,
  hf_names,
  is_matrix,
  pairs_apart,
  pairs_together,
  piece_names,
  places,
  rotated_heads,
  text_names,
)
from in2core_jax.params import quantisation
from in2core_jax.params.quantisation import FULL
from in2core_jax.runs import adapter_folder

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
EMBEDDED_MODEL = "smollm2-135m-instruct-q4_1"
EMBEDDED_MODELS = {"smollm2": EMBEDDED_MODEL, "gemma3": "gemma-3-270m-q4_k_m"}  # word of --model -> asset
SPECS = "smollm2, gemma3, hf:DIR, gguf:FILE, hub:ORG/NAME, random:CONFIG.json or truncated:MODEL:LAYERS"


def load_model(
  spec: str, dtype: str = "float32", seed: int = 0, mesh: Any = None, kind: str = FULL
) -> tuple[ModelConfig, Any, Any, str]:
  """Model, tokenizer and a hash of the weights for what `--model` says.

  Args:
    spec: smollm2 or gemma3 (embedded, nothing is downloaded), hf:DIR (of a PEFT adapter too, which is merged into its
      base), gguf:FILE, hub:ORG/NAME, random:CONFIG.json, or truncated:MODEL:LAYERS, the first layers of another one.
    dtype: float32 or bfloat16, of the weights in memory.
    seed: of the weights of `random:`; unused otherwise.
    mesh: devices onto which the weights of a large file go tensor by tensor, with no copy of all on the host
      (`stacks`); without, or where they are small, in parts or merged, they are NumPy or JAX arrays to be placed.
    kind: of matrices of layers: full, or a word of `quantisation.KINDS`.

  Returns:
    (config, params, tokenizer, model_hash). The hash names the file contents, not `dtype`: SHA-256 of a GGUF file;
    `hf_hash` of a folder; configuration and seed of random weights; whole model and layers of a truncated one; of
    matrices in few bits which these are.

  Raises:
    UserError: unknown form, or whatever the readers find wrong.
  """
  config, params, tokenizer, digest = _load(spec, dtype, seed, mesh, kind)
  if kind == FULL:
    return config, params, tokenizer, digest
  params = quantisation.quantise_tree(params, kind)  # what its reader could not make so
  return config, params, tokenizer, hashlib.sha256(f"{digest} as {kind}".encode()).hexdigest()


def _load(spec: str, dtype: str, seed: int, mesh: Any, few: str) -> tuple[ModelConfig, Any, Any, str]:
  """`load_model`, where the hash is that of what is read; merged and random weights are still full."""
  if spec.startswith("truncated:"):
    return _load_truncated(spec, dtype, seed, few)
  kind, path = _parse_spec(spec)
  if kind == "gguf":
    config, params = load_gguf(path, _dtype(dtype), mesh, few)
    return config, params, tokenizer_lib.tokenizer_from_gguf(path), _file_hash(path)
  if kind == "adapter":
    config, params, tokenizer, digest = load_model(adapter_folder.base_of(path), dtype, seed)
    params = peft_folder.read_adapter(path, config).merged(params)
    digest = hashlib.sha256(f"adapter {adapter_folder.sha256(path)} on {digest}".encode()).hexdigest()
    return config, params, _adapter_tokenizer(path, tokenizer), digest
  if kind == "hf":
    config, params = load_hf_dir(path, _dtype(dtype), mesh, few)
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
    return gguf_config(read_gguf(path)), tokenizer_lib.tokenizer_from_gguf(path)
  if kind == "adapter":
    config, tokenizer = describe_model(adapter_folder.base_of(path))
    return config, _adapter_tokenizer(path, tokenizer)
  if kind == "hf":
    return _hf_config(path), tokenizer_lib.tokenizer_from_dir(path)
  config = hf_config.read_config(path)
  return config, _embedded_tokenizer(path, config)


def _load_truncated(spec: str, dtype: str, seed: int, few: str) -> tuple[ModelConfig, Any, Any, str]:
  """The first layers of another model below its own final norm and vocabulary; as `_load`."""
  whole, layers = _parse_truncated(spec)
  config, params, tokenizer, digest = _load(whole, dtype, seed, None, few)
  config = _fewer_layers(spec, config, layers)
  params = params | {"layers": quantisation.tree_map(lambda leaf: leaf[:layers], params["layers"])}
  return config, params, tokenizer, hashlib.sha256(f"truncated {digest} layers {layers}".encode()).hexdigest()


def _parse_truncated(spec: str) -> tuple[str, int]:
  """truncated:MODEL:LAYERS -> (MODEL, LAYERS)."""
  whole, _, layers = spec.removeprefix("truncated:").rpartition(":")
  if not whole or not layers.isdecimal():
    raise UserError(f"--model={spec} is not understood; write truncated:MODEL:LAYERS, such as truncated:smollm2:15")
  return whole, int(layers)


def _fewer_layers(spec: str, config: ModelConfig, layers: int) -> ModelConfig:
  if not 0 < layers <= config.num_layers:
    raise UserError(
      f"--model={spec}: the whole model has {how_many(config.num_layers, 'layer')}; keep 1 to {config.num_layers}"
    )
  return dataclasses.replace(config, num_layers=layers)


def source_of(spec: str) -> tuple[str, Any]:
  """(hf, gguf or random; its folder, file or parts) of what `--model` says: of the whole, of an adapter's base."""
  while spec.startswith("truncated:"):
    spec, _ = _parse_truncated(spec)
  kind, place = _parse_spec(spec)
  return source_of(adapter_folder.base_of(place)) if kind == "adapter" else (kind, place)


def _adapter_tokenizer(folder: pathlib.Path, tokenizer: Any) -> Any:
  """The tokenizer that was saved with an adapter, with its chat template; that of its base model where none was."""
  return tokenizer_lib.tokenizer_from_dir(folder) if (folder / "tokenizer.json").is_file() else tokenizer


def _parse_spec(spec: str) -> tuple[str, Any]:
  """(hf, adapter, gguf or random; its folder or file, or the parts of its file)."""
  kind, _, rest = full_spec(spec).partition(":")
  if spec in EMBEDDED_MODELS:
    return "gguf", assets.asset_parts(EMBEDDED_MODELS[spec])
  if kind == "hub":
    return "hf", hub.hub_model(rest)
  path = model_files.expand(rest)
  if kind == "random" and path.is_dir():
    raise UserError(f"--model={spec}: random: takes a file: give random:{path / 'config.json'}, or hf:{path}")
  return ("adapter" if kind == "hf" and adapter_folder.is_adapter(path) else kind), path


def full_spec(spec: str) -> str:
  """What `--model` says with its kind in front: a bare path becomes hf: or gguf: where it is one."""
  return spec if spec.startswith("truncated:") else model_files.full_spec(spec, tuple(EMBEDDED_MODELS), SPECS)


def _embedded_tokenizer(path: pathlib.Path, config: ModelConfig) -> Any:
  """The tokenizer that `random:` uses, refused where the model has too few vocabulary entries for it."""
  tokenizer = tokenizer_lib.tokenizer_from_gguf(assets.asset_path(EMBEDDED_MODEL))
  if config.vocab_size < len(tokenizer):
    raise UserError(
      f"{path}: vocab_size {config.vocab_size} is smaller than the {len(tokenizer)} entries of the embedded tokenizer, "
      f"which random: uses; write vocab_size {len(tokenizer)} or more"
    )
  return tokenizer


def load_gguf(place: Place, dtype=np.float32, mesh=None, few: str = FULL) -> tuple[ModelConfig, dict]:
  """Reads a GGUF file of one of `gguf_config.ARCHITECTURES`, dequantised.

  Of some architectures the format stores query and key rows permuted for interleaved rotary pairs (2j, 2j + 1). This
  decoder rotates the halves (j, j + head_dim / 2), so they are put back: [H, head_dim / 2, 2, D] becomes
  [H, 2, head_dim / 2, D].
  Of gemma3 it stores the factors of norms, 1 + scale.

  Args:
    place: the .gguf file.
    dtype: float32 or bfloat16, of the returned arrays.
    mesh, few: as `load_model` takes mesh and kind.

  Returns:
    The configuration and the parameters as NumPy arrays.

  Raises:
    UserError: unknown architecture, tensors missing, left over, misshapen or with NaN; each is named.
  """
  dtype = _dtype(dtype)
  file = read_gguf(place)
  config, kind = gguf_config(file), ARCHITECTURES[file.metadata["general.architecture"]]
  stored = {name: tensor.shape for name, tensor in file.tensors.items() if name not in FACTOR_TENSORS}
  stored |= {name: (1, *stored[name]) for name in stored if name.endswith("_shexp.weight") and len(stored[name]) == 1}
  pieces = fused_pieces(kind.fused, stored, parameter_tree.shapes_of(config), prefix="blk.{i}.")

  def read(name: str, leaf: str) -> np.ndarray:
    array = pieces[name].of(file.read(pieces[name].whole), leaf) if name in pieces else file.read(name)
    array = array[None] if array.ndim == 1 and is_matrix(leaf) else array  # of one output
    if leaf.endswith("_norm/scale"):
      return array - np.float32(config.norm_offset)
    heads = rotated_heads(config, leaf) if kind.paired else 0
    return pairs_apart(array, heads) if heads else array

  names = GGUF_NAMES | {leaf: f"blk.{{i}}.{end}" for leaf, end in piece_names(kind.fused).items()}
  return config, parameter_tree.assemble(config, names, stored, read, dtype, str(file.path), mesh, few)


def load_hf_dir(path: str | pathlib.Path, dtype=np.float32, mesh=None, few: str = FULL) -> tuple[ModelConfig, dict]:
  """Reads config.json and model.safetensors (or the shards of model.safetensors.index.json).

  Args:
    path: the folder.
    dtype: float32 or bfloat16, of the returned arrays; the files may hold float64, float32, float16 or bfloat16.
    mesh, few: as `load_model` takes mesh and kind.

  Returns:
    The configuration and the parameters as NumPy arrays.

  Raises:
    UserError: not such a folder, a model type that does not map exactly, a missing shard, or tensors missing, left
      over, misshapen or with NaN; each is named.
  """
  dtype, folder = _dtype(dtype), pathlib.Path(path)
  config, where = _hf_config(folder), model_files.weight_files(folder)
  handles = {file: model_files.open_safetensors(file) for file in sorted(set(where.values()))}
  where, handles = quantised.opened(folder, where, handles, dtype.name, few)

  text, stored = text_names(where), {}
  if config.tie_embeddings:  # equal to the embedding: some exports write the tied matrix twice
    text |= {name: None for name in where if text[name] == HF_NAMES["lm_head/kernel"]}
  for name, file in where.items():
    if text.get(name) is None:
      continue
    header = handles[file].get_slice(name)
    stored[text[name]] = tuple(header.get_shape())
    if header.get_dtype() not in ("F64", "F32", "F16", "BF16"):
      raise UserError(
        f"{file}: tensor {plain(name)} is stored as {header.get_dtype()}; convert it to float32, float16 or "
        "bfloat16 (of a quantised checkpoint use the unquantised one)"
      )
  source = {text[name]: (handles[file], name) for name, file in where.items() if text.get(name) is not None}
  family = FAMILIES[config.model_type]
  pieces = fused_pieces(family.fused, stored, parameter_tree.shapes_of(config), family.paired)

  def read(name: str, leaf: str) -> np.ndarray | stacks.StoredRows:
    piece = pieces.get(name)
    handle, place = source[piece.whole if piece else name]
    heads = rotated_heads(config, leaf) if family.interleaved else 0
    if piece is None and not heads:
      return stacks.StoredRows(handle.get_slice(place))
    array = piece.of(handle.get_tensor(place), leaf) if piece else handle.get_tensor(place)
    return pairs_apart(array, heads) if heads else array

  return config, parameter_tree.assemble(config, hf_names(config), stored, read, dtype, str(folder), mesh, few)


def _hf_config(folder: pathlib.Path) -> ModelConfig:
  """The shape that config.json states; untied where a tied model stores a head that is not its embedding."""
  model_files.check_folder(folder)
  config = hf_config.read_config(folder / "config.json")
  if not config.tie_embeddings or not any((folder / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
    return config
  where = model_files.weight_files(folder)
  text = {name: stored for stored, name in text_names(where).items()}
  pair = [text.get(HF_NAMES[leaf], "") for leaf in ("embed/embedding", "lm_head/kernel")]
  if not all(name in where for name in pair):
    return config
  embedding, head = (model_files.open_safetensors(where[name]).get_slice(name) for name in pair)
  count, same = embedding.get_shape()[0], embedding.get_shape() == head.get_shape()
  for start in range(0, count, 4096):
    stop = min(count, start + 4096)
    same = same and np.array_equal(embedding[start:stop], head[start:stop])
  if same:
    return config
  model_files.say(
    f"{folder}: config.json says tie_word_embeddings, but the stored {pair[1]} is not the embedding: it is used, "
    "untied, as transformers does; write tie_word_embeddings false into config.json"
  )
  return dataclasses.replace(config, tie_embeddings=False)


def load_random(path: str | pathlib.Path, seed: int = 0, dtype=np.float32) -> tuple[ModelConfig, Any]:
  """Random weights for a configuration with the keys of a Hugging Face config.json; same seed, same weights."""
  config = hf_config.read_config(pathlib.Path(path))
  parameter_tree.check_memory(config, np.dtype(np.float32), str(path))  # drawn in float32, then rounded
  return config, decoder.init_params(config, jax.random.key(seed), _dtype(dtype))


def save_hf_dir(path: str | pathlib.Path, config: ModelConfig, params, tokenizer=None, resume: bool = False) -> None:
  """Writes config.json, model.safetensors (above 5 GB: shards) and what the model came with, for transformers to load.

  Kept of the source (`config.carried`): max_position_embeddings, token ids, generation_config.json.

  LoRA factors are folded in: W + A B, added in float32 and rounded to the dtype of W.

  Args:
    path: the folder; made when absent, files of the same names are replaced.
    config: the model's shape.
    params: the parameter tree, NumPy or JAX arrays, float32 or bfloat16.
    tokenizer: a transformers tokenizer, saved beside the weights when given.
    resume: keep whole weight files that are there: they are of the same weights.

  Raises:
    UserError: a configuration that no known Hugging Face model type expresses, leaves that have no place there, or a
      folder with other weights.
  """
  folder = pathlib.Path(path)
  leaves = traverse_util.flatten_dict(peft_writer.fold_lora(params), sep="/")
  values = hf_config.write_config(config, np.asarray(leaves["embed/embedding"]).dtype.name)
  names = hf_names(config, values["model_type"])
  absent = sorted(set(leaves) - set(names))
  if absent:
    raise UserError(
      f"export to {folder}: no Hugging Face tensor stands for {', '.join(absent)}; remove or merge it first"
    )
  family, tensors = FAMILIES[values["model_type"]], {}
  for leaf, stacked in leaves.items():
    array = np.asarray(stacked)
    for index, name in places(names[leaf], leaf, array.shape):
      row = array[index].swapaxes(-1, -2) if is_matrix(leaf) else array[index]
      heads = rotated_heads(config, leaf) if family.interleaved else 0
      row = pairs_together(row, heads) if heads else row
      tensors[name] = row
  fuse(tensors, family, config.num_layers)
  folder.mkdir(parents=True, exist_ok=True)
  hf_folder.write_weights(folder, tensors, resume=resume)
  if tokenizer is not None:
    tokenizer.save_pretrained(folder)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values = ids | values  # what the model itself came with is more exact: it may end a text with several tokens
  generation = json.loads(config.carried)["generation_config"] if config.carried else None
  if generation is not None:
    hf_folder.write_json(folder / "generation_config.json", generation)
  hf_folder.write_json(folder / "config.json", values)


def hf_hash(path: str | pathlib.Path) -> str:
  """Content hash of a Hugging Face folder: config.json and every byte of its weight files, at about 1 GB a second."""
  folder = pathlib.Path(path)
  digest = hashlib.sha256((folder / "config.json").read_bytes())
  files = sorted(set(model_files.weight_files(folder).values()))
  with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing leaves the interpreter free
    for file, content in zip(files, pool.map(_file_hash, files), strict=True):
      digest.update(f"{file.name} {content}\n".encode())
  return digest.hexdigest()


def _dtype(dtype) -> np.dtype:
  """The dtype by name or as it is."""
  found = DTYPES.get(dtype) if isinstance(dtype, str) else np.dtype(dtype)
  if found not in DTYPES.values():
    raise UserError(f"dtype {dtype} is not supported for weights; use {' or '.join(DTYPES)}")
  return found
