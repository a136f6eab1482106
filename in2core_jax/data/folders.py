"""A path given as data -> the files that are read: one file, a folder, a pattern, what `datasets` saved, `-`."""

from __future__ import annotations

import collections
import functools
import glob
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence

from in2core_jax.data.file_kinds import CODEC_SUFFIXES, DataFile, check_data_file
from in2core_jax.errors import UserError, how_many, printable

log = logging.getLogger(__name__)

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
_STDIN = "standard input"
_MOST_OTHERS = 20  # files that are no data beside the data: a README, a licence, scripts; more are another folder
_MOST_NAMED = 4
# JSON files that tell about a data set and are none of it.
_ABOUT = frozenset(
  ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "features.json", "metadata.json"]
)
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
  ["validation", "valid", "val", "dev", "eval"], "validation"
)
# Names of data files for a shell, compressed or not.
DATA_PATTERNS = tuple(f"*{suffix}{codec}" for suffix in _SUFFIXES for codec in ("", *CODEC_SUFFIXES))


def data_files(path: pathlib.Path) -> list[DataFile]:
  """The files that a path stands for, in the order in which they are read.

  Args:
    path: a file; a folder, of which all data files are read in the order of their names; a pattern with `*`, `?` or
      `[...]`; a folder of `datasets.save_to_disk`; or `-`, standard input.

  Raises:
    UserError: there is nothing, it is of a kind that is not read, or several splits would become one.
  """
  if str(path) == "-":
    return [check_data_file(pathlib.Path(_standard_input().name), _STDIN)]
  if _is_folder(path):
    return _of_folder(path)
  if any(sign in str(path) for sign in "*?[") and not os.path.lexists(path):
    paths = [pathlib.Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    files = [check_data_file(found) for found in paths if found.name not in _ABOUT and not found.is_dir()]
    # Folders count where no file fits: `**` fits a folder and its files, which are not to be read twice.
    files = files or [file for found in paths if found.is_dir() for file in _of_folder(found)]
    if not files:
      raise UserError(f"{path}: no file fits this pattern; it is looked for in {pathlib.Path.cwd()}")
    _check_splits(str(path), [file.path for file in files], path.parent)
    _tell(str(path), [str(file.path) for file in files], [])
    return files
  return [check_data_file(path)]


def _is_folder(path: pathlib.Path) -> bool:
  try:
    return path.is_dir()
  except (OSError, ValueError):
    return False  # told with the other reasons why there is no file


@functools.cache
def _standard_input() -> tempfile._TemporaryFileWrapper:
  """Standard input as a file on the disk, once for all that read it; it outlives this function, not the process."""
  stream = getattr(sys.stdin, "buffer", None)  # a notebook has none
  if stream is None or sys.stdin.isatty():
    raise UserError("-: nothing is sent to standard input; send a file to it: ./run.sh ... < FILE")
  file = tempfile.NamedTemporaryFile(prefix="in2core-stdin-")  # noqa: SIM115
  shutil.copyfileobj(stream, file)
  file.flush()
  return file


def _of_folder(path: pathlib.Path) -> list[DataFile]:
  names = {entry.name for entry in os.scandir(path)}
  if {"dataset_info.json", "state.json"} <= names:
    return [check_data_file(path / name) for name in _saved_files(path)]
  if "dataset_dict.json" in names:
    return _of_saved_splits(path)
  _refuse_folder(path, names)
  found, others = found_in(path)
  if not found:
    seen = f"a folder with {_kinds(others, 'other file')} and no data file" if others else "an empty folder"
    raise UserError(f"{path} is {seen}; data files end in {', '.join(_SUFFIXES)}")
  if len(others) > max(_MOST_OTHERS, len(found)):
    raise UserError(
      f"{path} holds {_kinds(found, 'data file')}, such as {found[0].relative_to(path)}, among "
      f"{_kinds(others, 'other file')}, so it is no folder of data; give the folder or the file itself, or a pattern "
      f"such as '{path / '**' / f'*{found[0].suffix}'}'"
    )
  _check_splits(str(path), found, path)
  _tell(str(path), [str(file.relative_to(path)) for file in found], others)
  return [check_data_file(file) for file in found]


def _kinds(files: Sequence[str | pathlib.Path], noun: str) -> str:
  """How many files, and of which kinds: `3 data files (2 .jsonl, 1 .csv)`."""
  counts = collections.Counter(pathlib.Path(file).suffix or "without ending" for file in files).most_common()
  told = ", ".join(f"{count:,} {kind}" for kind, count in counts[:_MOST_NAMED])
  return f"{how_many(len(files), noun)} ({told}{', ...' if len(counts) > _MOST_NAMED else ''})"


def _tell(shown: str, found: list[str], others: list[pathlib.Path]) -> None:
  """One line: what is read of a folder or by a pattern, and what is not."""
  names = ", ".join(found[:_MOST_NAMED]) + (", ..." if len(found) > _MOST_NAMED else "")
  line = f"{shown}: reads {_kinds(found, 'data file')}: {names}"
  line += f"; skips {_kinds(others, 'other file')}" if others else ""
  log.info("%s", printable(line))


def _unreadable(error: OSError) -> None:
  raise UserError(f"{error.filename} cannot be read ({error.strerror}); give the files by a pattern") from error


def found_in(path: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """(files of data, other files) of a folder and the folders in it; hidden ones and those about the data in neither."""
  found, others = [], []
  for folder, inner, files in os.walk(path, onerror=_unreadable):
    inner[:] = [name for name in inner if not name.startswith((".", "_"))]
    for name in files:
      if not name.startswith((".", "_")) and name not in _ABOUT:
        (found if is_data_name(name) else others).append(pathlib.Path(folder, name))
  return sorted(found), sorted(others)


def is_data_name(name: str) -> bool:
  """Whether a file is data by its name, compressed or not."""
  lower = name.lower()
  bare = next((lower.removesuffix(suffix) for suffix in CODEC_SUFFIXES if lower.endswith(suffix)), lower)
  return bare.endswith(_SUFFIXES)


def split_of(path: pathlib.PurePath) -> str:
  """train, test or validation by the words in a path such as `data/train-00000-of-00002.parquet`, or ""."""
  words = [word for part in reversed(path.parts) for word in re.split(r"[^a-z]+", part.lower())]
  return next((_SPLITS[word] for word in words if word in _SPLITS), "")


def words_of_split(word: str) -> list[str]:
  """A word, and the others that mean the same split."""
  return [word, *(other for other in _SPLITS if _SPLITS[other] == _SPLITS.get(word.lower()) and other != word)]


def _check_splits(shown: str, files: list[pathlib.Path], folder: pathlib.Path) -> None:
  """Refuses a folder in which training and test files would become one pool without a word."""
  splits: dict[str, pathlib.Path] = {}
  for file in files:
    relative = file.relative_to(folder) if file.is_relative_to(folder) else file
    splits.setdefault(split_of(relative), file)
  if len(splits.keys() - {""}) > 1:
    found = ", ".join(sorted(splits.keys() - {""}))
    raise UserError(
      f"{shown} holds several splits ({found}), which would become one; give the files of one, by a pattern such as "
      f"'{folder / '**' / '*train*'}', or each by its own path, joined by +"
    )


def _refuse_folder(path: pathlib.Path, names: set[str]) -> None:
  """Refuses folders that are known to hold something else."""
  told = None
  if "adapter_config.json" in names:
    told = "with an adapter, a part of a model and no data; it is no source of data"
  elif "config.json" in names and any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names):
    told = "with a model, which goes into --model=hf:FOLDER"
  elif "manifest.json" in names and "coreset.jsonl" in names:
    told = "of a select run; its selection is coreset.jsonl in it: give that path"
  elif "dataset_info.json" in names and any(".array_record" in name or ".tfrecord" in name for name in names):
    told = "of a prepared tensorflow_datasets set, which goes by tfds:NAME/SPLIT@DATA_DIR"
  if told:
    raise UserError(f"{path} is a folder {told}")


# ---- datasets.save_to_disk -------------------------------------------------------------------------------------------


def _saved_json(path: pathlib.Path, key: str) -> list:
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); save the data set again") from error
  value = found.get(key) if isinstance(found, dict) else None
  if not isinstance(value, list):
    raise UserError(f"{path} names no {key!r}; save the data set again with save_to_disk")
  return value


def _saved_files(path: pathlib.Path) -> list[str]:
  """Names of the Arrow files of one split, in their order."""
  names = [
    entry.get("filename") if isinstance(entry, dict) else None
    for entry in _saved_json(path / "state.json", "_data_files")
  ]
  for name in names:
    if not isinstance(name, str) or pathlib.PurePath(name).name != name:
      raise UserError(f"{path / 'state.json'} names a file {name!r} outside its folder; save the data set again")
  if not names:
    raise UserError(f"{path} is a saved data set without rows")
  return names


def _of_saved_splits(path: pathlib.Path) -> list[DataFile]:
  splits = [str(split) for split in _saved_json(path / "dataset_dict.json", "splits")] or ["(none)"]
  if len(splits) != 1:
    raise UserError(f"{path} holds the splits {', '.join(splits)}; name one: {path / splits[0]}")
  if pathlib.PurePath(splits[0]).name != splits[0] or not (path / splits[0]).is_dir():
    raise UserError(f"{path / 'dataset_dict.json'} names a split {splits[0]!r}, which is not there; save it again")
  return _of_folder(path / splits[0])
