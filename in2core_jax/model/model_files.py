"""What lies where `--model` says: strict JSON, other kinds of files by name, a folder's weight files."""

import functools
import json
import logging
import pathlib
import re
from typing import Any

import safetensors

from in2core_jax.errors import UserError, how_many
from in2core_jax.model.schema import plain, shown

log = logging.getLogger(__name__)

MAX_JSON = 256 << 20  # bytes; indexes of the largest checkpoints have a few MB
# How other files begin -> what they are, and the remedy.
_KINDS = (
  (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull` there"),
  (b"GGUF", "a GGUF file: give gguf:FILE"),
  (b"<!doctype html", "a web page, not the file itself: fetch the raw file"),
  (b"<html", "a web page, not the file itself: fetch the raw file"),
  (b"\x1f\x8b", "compressed by gzip: unpack it"),
  (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it"),
  (b"PK\x03\x04", "a zip archive, such as pickled PyTorch weights, which are never loaded: save them as safetensors"),
  (b"\x80\x02", "pickled, which is never loaded: save the weights as safetensors"),
)
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_MERGE = "merge it first: PeftModel.from_pretrained(base, DIR).merge_and_unload().save_pretrained(OUT)"
_QUANTISED = ("quantize_config.json", "hf_quant_config.json", "quant_config.json")
# Weights of other programs, or the same ones again; what trainers keep (optimizer.pt, ...) is none.
_OTHER_WEIGHTS = re.compile(
  r"(consolidated.*\.(pth|safetensors)|pytorch_model.*\.bin|.*\.(gguf|msgpack|h5|onnx|pth|pt|bin|safetensors))$"
)
_TRAINERS = re.compile(r"(optimizer|scheduler|scaler|rng_state.*|training_args|random_states_.*)\.(pt|pth|bin|pkl)$")


@functools.cache
def say(text: str) -> None:
  """Logs a warning, once in a process."""
  log.warning("%s", text)


def kind_of(head: bytes) -> str:
  """What a file that begins so is, with the remedy; empty when it is not one that people confuse."""
  start = head[:64].lstrip(b"\xef\xbb\xbf \r\n\t")
  return next((words for magic, words in _KINDS if start.lower().startswith(magic.lower())), "")


def head_of(path: pathlib.Path) -> bytes:
  """A file's first bytes."""
  with path.open("rb") as file:
    return file.read(64)


def read_object(path: pathlib.Path, remedy: str) -> dict[str, Any]:
  """Reads a JSON object as strictly as JSON is written: no key twice, no NaN, not nested without end.

  Raises:
    UserError: it is not one; `remedy` ends the line where there is no such file.
  """
  try:
    size = path.stat().st_size
    data = path.read_bytes() if size <= MAX_JSON else b""
  except FileNotFoundError:
    raise UserError(f"{path}: no such file; {remedy}") from None
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror}); give a config.json, not its folder") from error
  if size > MAX_JSON:
    raise UserError(f"{path}: {size} bytes are too many for such a file; fetch it again")
  kind = kind_of(data)
  if kind:
    raise UserError(f"{path}: is {kind}")
  try:
    values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
  except RecursionError:
    raise UserError(f"{path}: its lists or objects are nested without end; fetch it again") from None
  except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and numbers of thousands of digits
    raise UserError(f"{path}: broken JSON ({error}); correct it or fetch it again") from error
  if not isinstance(values, dict):
    raise UserError(f"{path}: holds a JSON {type(values).__name__}, expected an object with keys")
  return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    seen: set[str] = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise ValueError(f"the key {shown(twice)} stands twice in one object")
  return found


def _no_constant(word: str) -> None:
  raise ValueError(f"{word} is no JSON number")


def open_safetensors(file: pathlib.Path):
  """A handle on a safetensors file whose header is whole.

  Raises:
    UserError: it is another kind of file, cut off or damaged.
  """
  head = head_of(file)
  # Such a file begins with the length of its header, whose bytes may be those that another kind begins with.
  kind = "" if head[5:9] == b"\0\0\0{" else kind_of(head)
  if kind:
    raise UserError(f"{file}: is {kind}")
  try:
    return safetensors.safe_open(file, framework="np")
  except safetensors.SafetensorError as error:
    raise UserError(f"{file}: not a complete safetensors file ({error}); fetch it again") from error


def check_folder(folder: pathlib.Path) -> None:
  """Refuses what is no model folder of its own; tells of weights in it that are not read.

  Raises:
    UserError: a file, an adapter, a quantised checkpoint, no such folder.
  """
  if folder.is_file():
    kind = kind_of(head_of(folder))
    hint = kind or f"hf: takes the model's folder: give hf:{folder.parent}"
    raise UserError(f"{folder}: is a file, not a folder; {'it is ' if kind else ''}{hint}")
  if not folder.is_dir():
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder))
    hint = _download(str(folder)) if hub else "give a local Hugging Face folder"
    raise UserError(f"{folder}: no such folder; {hint}")
  for name in _ADAPTERS:
    if (folder / name).exists():
      there = "beside a model" if (folder / "config.json").exists() else "without its base model"
      raise UserError(f"{folder}: {name} is there: a LoRA adapter {there}, which is not applied; {_MERGE}")
  for name in _QUANTISED:
    if (folder / name).exists() and not read_object(folder / "config.json", "fetch it").get("quantization_config"):
      raise UserError(f"{folder}: {name} is there: a quantised checkpoint, which is not read; use the unquantised one")


def weight_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Tensor name -> safetensors file that holds it: of model.safetensors, or of the shards of its index.

  Raises:
    UserError: no weights, an index that points out of the folder, names other tensors than the shards hold, or stands
      beside other weights of a model.
  """
  single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
  if not single.is_file() and not index.is_file():
    pickled = " Pickled weights (*.bin) are never loaded: save them as safetensors." if [*folder.glob("*.bin")] else ""
    ggufs = sorted(folder.glob("*.gguf"))
    pickled = f" It holds a GGUF file: give gguf:{ggufs[0]}" if ggufs and not pickled else pickled
    raise UserError(f"{folder}: neither {single.name} nor {index.name} is there; give a Hugging Face folder.{pickled}")
  if index.is_file():
    where = _sharded(folder, index)
    if single.is_file() and single not in where.values():
      raise UserError(
        f"{folder}: holds both {single.name} and {index.name} of other files; remove the one that is not the model"
      )
  else:
    where = dict.fromkeys(open_safetensors(single).keys(), single)
  _tell_others(folder, set(where.values()))
  return where


def _sharded(folder: pathlib.Path, index: pathlib.Path) -> dict[str, pathlib.Path]:
  values = read_object(index, "fetch it")
  weight_map = values.get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f"{index}: not a safetensors index: it has no weight_map of tensor names to files; fetch it again")
  for name, file in weight_map.items():
    parts = re.split(r"[/\\]", file) if isinstance(file, str) else []
    if not parts or not file.endswith(".safetensors") or ".." in parts or "" in parts or ":" in file or "\0" in file:
      raise UserError(
        f"{index}: tensor {shown(name)} is said to lie in {shown(file)}, which is no safetensors file of this folder; "
        "fetch the index again"
      )
  files = sorted(set(weight_map.values()))
  absent = [file for file in files if not (folder / file).is_file()]
  if absent:
    raise UserError(
      f"{folder}: {how_many(len(absent), f'shard[s] named in {index.name} [is|are] missing')}: "
      f"{', '.join(map(plain, absent[:5]))}; fetch them"
    )
  for file in files:
    held = set(open_safetensors(folder / file).keys())
    mapped = {name for name, place in weight_map.items() if place == file}
    lost, extra = sorted(mapped - held), sorted(held - mapped)
    if lost:
      raise UserError(
        f"{folder / file}: the index says that it holds {plain(lost[0])}, but it does not; fetch it again"
      )
    if extra:
      twice = weight_map.get(extra[0])
      why = f"is in {twice} too" if twice else f"is not in {index.name}"
      raise UserError(f"{folder / file}: tensor {plain(extra[0])} {why}: which one is meant? fetch the folder again")
  return {name: folder / file for name, file in weight_map.items()}


def _tell_others(folder: pathlib.Path, read: set[pathlib.Path]) -> None:
  """Shards that no index names are refused; weights of other programs are told."""
  others = sorted(
    entry.name
    for entry in folder.iterdir()
    if entry not in read and _OTHER_WEIGHTS.match(entry.name) and not _TRAINERS.match(entry.name)
  )
  shards = [name for name in others if re.match(r"model.*\.safetensors$", name)]
  if shards:
    raise UserError(
      f"{folder}: {how_many(len(shards), 'weight file[s] [belongs|belong]')} to no index, such as {plain(shards[0])}: "
      "parts of another model? fetch the folder again, or remove them"
    )
  if others:
    say(f"{folder}: not read: {', '.join(map(plain, others[:5]))}; the model is what its safetensors hold")


# --- what --model says ------------------------------------------------------------------------------------------------


def full_spec(spec: str, known: tuple[str, ...], forms: str) -> str:
  """What `--model` says with its kind in front: a bare path becomes hf:, gguf: or random: where it is one.

  Args:
    spec: of one model.
    known: words for embedded models.
    forms: all that may be written, for messages.

  Raises:
    UserError: a name on the Hub, or nothing that is understood.
  """
  kind, _, rest = spec.partition(":")
  if spec in known or (kind in ("hf", "gguf", "random", "hub") and rest):
    return spec
  bare = expand(spec) if spec else None
  if bare is not None and bare.is_dir() and ((bare / "config.json").exists() or (bare / _ADAPTERS[0]).exists()):
    taken = f"hf:{spec}"
  elif bare is not None and bare.is_file() and head_of(bare).startswith(b"GGUF"):
    taken = f"gguf:{spec}"
  elif re.fullmatch(r"https?://.*", spec) or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", spec):
    raise UserError(f"--model={spec}: {_download(spec)}")
  else:
    raise UserError(f"--model={spec} is not understood; use {forms}")
  say(f"--model={spec} is taken as {taken}")
  return taken


def _download(name: str) -> str:
  cached = "" if ":" in name else f"; or give hub:{name}, its place in the Hub's cache"
  return (
    "a name on the Hugging Face Hub is not a local folder, and nothing is downloaded: fetch it with "
    f"`hf download {name} --local-dir DIR` and give hf:DIR{cached}"
  )


def expand(path: str) -> pathlib.Path:
  """A path with ~ replaced.

  Raises:
    UserError: ~ without a home directory, or a name that no file can have.
  """
  try:
    found = pathlib.Path(path).expanduser()
    if "\0" in path:  # pathlib says of such a name only that nothing is there
      raise ValueError("it holds a zero byte")
    found.exists()
  except RuntimeError as error:
    raise UserError(f"{path}: no home directory is known for ~: write the whole path") from error
  except (ValueError, OSError) as error:
    raise UserError(f"{path[:100]!a}: no file can have this name ({error})") from error
  return found
