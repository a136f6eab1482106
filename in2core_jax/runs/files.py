"""Files of a run: hashes, atomic writes, JSON and Parquet; local paths or `gs://` (etils.epath).

Every file is written whole or not at all: to a temporary name beside its own, flushed to disk, renamed. Object stores
do that by themselves. The same content always gives the same bytes: no times, no host names, one order of keys.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from in2core_jax.errors import UserError, how_many, one_line
from in2core_jax.runs import locks

TEMPORARY = ".in2core-tmp"  # ends the names of files that are being written
SHARD = ".shard"  # ends the names of pieces that carry a checksum of their own (shards.py)
# In these names, beside a process number, which means something on its own machine, and in its own container, only.
_MACHINE = hashlib.sha256(f"{platform.node()} {locks.process_namespace()}".encode()).hexdigest()[:8]


# --- hashes -----------------------------------------------------------------------------------------------------------


def canonical_json(obj: Any) -> str:
  """The one JSON text of a value: sorted keys, no spaces, tuples as lists.

  Raises:
    TypeError: the value holds something that JSON has no form for.
    ValueError: it holds NaN or an infinity.
  """
  return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
  """NumPy numbers, small arrays and paths as JSON values."""
  if isinstance(value, np.generic | np.ndarray):
    return value.tolist()
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def hash_of(obj: Any) -> str:
  """sha256 (hex) of a value's canonical JSON: equal values give equal hashes, on any machine."""
  return hashlib.sha256(canonical_json(obj).encode()).hexdigest()


def bytes_sha256(data: bytes) -> str:
  """sha256 (hex) of bytes."""
  return hashlib.sha256(data).hexdigest()


def file_sha256(path: epath.PathLike) -> str:
  """sha256 (hex) of a file's bytes, read in blocks of 1 MiB."""
  digest = hashlib.sha256()
  with epath.Path(path).open("rb") as file:
    while block := file.read(1 << 20):
      digest.update(block)
  return digest.hexdigest()


# --- values that carry their own checksum -----------------------------------------------------------------------------

SEAL = "content_sha256"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
  """A JSON object with the checksum of all that stands in it; NaN and infinities are null in it, as in `write_json`."""
  content = json.loads(canonical_json(_finite(content)))  # as it will be read
  return {**content, SEAL: hash_of(content)}


def unsealed(stored: Any, name: str) -> tuple[dict[str, Any], bool]:
  """What was sealed, and whether there was a seal: files of older versions have none.

  Args:
    stored: JSON object as it was read.
    name: of the place, for the message.

  Raises:
    UserError: the checksum does not fit, or it is no JSON object.
  """
  if not isinstance(stored, dict):
    raise UserError(f"{name}: damaged or changed by hand (it holds no JSON object)")
  content = {key: value for key, value in stored.items() if key != SEAL}
  if SEAL in stored and stored[SEAL] != hash_of(content):
    raise UserError(f"{name}: damaged or changed by hand (its checksum does not fit)")
  return content, SEAL in stored


# --- atomic writes ----------------------------------------------------------------------------------------------------


def is_remote(path: epath.PathLike) -> bool:
  """True for `gs://` and its kin."""
  return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
  """The path whatever folder the process is in, with ~ replaced; remote paths are so already."""
  return epath.Path(path) if is_remote(path) else epath.Path(path).expanduser().absolute()


def write_bytes(path: epath.PathLike, data: bytes) -> None:
  """Writes a file whole or not at all; its folder is made when missing.

  A reader, or the same run after a kill or a power cut, sees the old file or the new one, never a part. On an object
  store a plain write already behaves so.
  """
  path = epath.Path(path)
  locks.check(path)  # a folder that was removed must not come back in part
  path.parent.mkdir(parents=True, exist_ok=True)
  if is_remote(path):
    path.write_bytes(data)
    return
  temporary = temporary_beside(Path(path))
  try:
    with temporary.open("xb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException as error:
    temporary.unlink(missing_ok=True)
    if isinstance(error, OSError) and error.filename is None:  # of a failed write: which disk is full?
      error.filename = str(path)
    raise
  _sync_folder(path.parent)


def _sync_folder(path: epath.Path) -> None:
  """Flushes a folder to disk, or a rename in it could be lost."""
  folder = os.open(path, os.O_RDONLY)
  try:
    os.fsync(folder)
  finally:
    os.close(folder)


def write_streamed(path: epath.PathLike, write: Callable[[BinaryIO], None], note: Callable[[str], Any]) -> None:
  """Writes a file piece by piece, whole or not at all, like `write_bytes` of what need not be in memory.

  Args:
    path: the file.
    write: puts its content into a stream.
    note: gets the sha256 before the file has its name.
  """
  path = epath.Path(path)
  locks.check(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # An object store takes whole files: of one that goes there the pieces are gathered here.
  temporary = Path(tempfile.mkdtemp()) / path.name if is_remote(path) else temporary_beside(Path(path))
  try:
    with temporary.open("xb") as file:
      write(file)
      file.flush()
      os.fsync(file.fileno())
    note(file_sha256(temporary))
    if is_remote(path):
      path.write_bytes(temporary.read_bytes())
    else:
      os.replace(temporary, path)
      _sync_folder(path.parent)
  finally:
    temporary.unlink(missing_ok=True)
    if is_remote(path):
      temporary.parent.rmdir()


def temporary_beside(path: Path) -> Path:
  """A name of this call's own to write a local file under: several processes may write the same file at once.

  The last rename wins. What is never renamed is for `remove_leftovers`, which knows such names.
  """
  return path.with_name(f".{path.name}.{_MACHINE}-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")


def disk_free(folder: str) -> float:
  """Free bytes where a folder is, or would be made."""
  path = Path(folder).expanduser().absolute()
  while not path.exists():
    path = path.parent
  return float(shutil.disk_usage(path).free)


def reserve(path: Path, size: int) -> None:
  """Makes a new local file of `size` bytes, all of them zero, whose space on disk is taken.

  Raises:
    OSError: no space, a quota or a size limit; nothing is left then. A sparse file would end the process much later,
      by a bus error, when a page of it finds no room.
  """
  with path.open("xb") as file:
    try:
      if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(file.fileno(), 0, size)
      else:
        for start in range(0, size, 1 << 24):
          file.write(bytes(min(1 << 24, size - start)))
        file.flush()
    except OSError as error:
      path.unlink(missing_ok=True)
      raise OSError(error.errno, f"{error.strerror}, {size:,} bytes are needed", str(path)) from error


def write_text(path: epath.PathLike, text: str) -> None:
  """Writes UTF-8 text, atomically. What UTF-8 has no form for (lone surrogates) becomes backslash escapes."""
  write_bytes(path, text_bytes(text))


def text_bytes(text: str) -> bytes:
  """The bytes that `write_text` writes."""
  return text.encode("utf-8", errors="backslashreplace")


def write_json(path: epath.PathLike, obj: Any) -> None:
  """Writes indented JSON, atomically, keys in the given order. NaN and infinities become null: JSON has neither."""
  write_bytes(path, json_bytes(obj))


def json_bytes(obj: Any) -> bytes:
  """The bytes that `write_json` writes."""
  return text_bytes(json.dumps(_finite(obj), indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n")


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(item) for item in value]
  if isinstance(value, np.generic | np.ndarray):
    return _finite(value.tolist())
  return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: epath.PathLike) -> Any:
  """Reads a JSON file.

  Raises:
    UserError: there is no such file, or it is not JSON.
  """
  try:
    return parse_json(epath.Path(path).read_bytes(), path)
  except FileNotFoundError as error:
    raise UserError(f"{path}: no such file") from error


def parse_json(data: bytes, path: epath.PathLike) -> Any:
  """The value of a JSON file's bytes; `path` is for the message.

  Raises:
    UserError: it is not JSON.
  """
  try:
    return json.loads(data)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path}: not JSON ({error}); it was written by something else or damaged: remove it") from error


# --- tables -----------------------------------------------------------------------------------------------------------


def write_parquet(path: epath.PathLike, columns: Mapping[str, Any]) -> None:
  """Writes a table, atomically; the same columns give the same bytes.

  Args:
    path: the file.
    columns: name -> values, all of one length N: a list, an array [N], or an array [N, K] (stored as lists of K).
  """
  write_bytes(path, parquet_bytes(columns))


def parquet_bytes(columns: Mapping[str, Any]) -> bytes:
  """The bytes that `write_parquet` writes."""
  table = pa.table({name: _column(values) for name, values in columns.items()})
  buffer = io.BytesIO()
  pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
  return buffer.getvalue()


def _column(values: Any) -> pa.Array:
  if isinstance(values, np.ndarray) and values.ndim == 2:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])
  return pa.array(values)


def read_parquet(
  path: epath.PathLike, required: Sequence[str] = (), only: Sequence[str] | None = None, repeated: Sequence[str] = ()
) -> dict[str, np.ndarray]:
  """Reads a table as name -> array [N], or [N, K] for columns of lists; `only` some of its columns when given.

  Each different text of the columns `repeated` is made once and shared by its rows: a tenth of the memory. Pages have
  checksums of their own, the rest of the file has none: `RunDir.read_parquet` checks all bytes of a run's tables.

  Raises:
    UserError: no such file, not Parquet, damaged, or a required column is missing.
  """
  try:
    data = epath.Path(path).read_bytes()
  except FileNotFoundError as error:
    raise UserError(f"{path}: no such file") from error
  return parse_parquet(data, path, required, only, repeated)


def parse_parquet(
  data: bytes,
  path: epath.PathLike,
  required: Sequence[str] = (),
  only: Sequence[str] | None = None,
  repeated: Sequence[str] = (),
) -> dict[str, np.ndarray]:
  """The table of a Parquet file's bytes; `path` is for messages, the rest as in `read_parquet`."""
  how = {"columns": only and list(only), "read_dictionary": list(repeated), "page_checksum_verification": True}
  try:
    table = pq.read_table(io.BytesIO(data), **how)
    table.validate(full=True)
    missing = [name for name in required if name not in table.column_names]
    if missing:
      raise UserError(f"{path}: no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    return {name: _array(table.column(name)) for name in table.column_names}
  except UserError:
    raise
  except Exception as error:  # of damaged bytes Arrow raises errors of many classes: OSError, KeyError, MemoryError ...
    raise UserError(f"{path}: not a Parquet file, or a damaged one ({one_line(error, 200)})") from error


def _array(column: pa.ChunkedArray) -> np.ndarray:
  if pa.types.is_fixed_size_list(column.type):
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
  if pa.types.is_dictionary(column.type):
    whole = column.unify_dictionaries().combine_chunks()
    words = np.append(whole.dictionary.to_numpy(zero_copy_only=False), None)  # the last one is for rows without
    return words[whole.indices.fill_null(-1).to_numpy()]
  return column.to_numpy()


SCORE_COLUMNS = ("example_id", "influence")


def read_scores(path: epath.PathLike) -> dict[str, np.ndarray]:
  """Reads `scores.parquet`: example_id, influence f32 [N] and the other columns that are there.

  Raises:
    UserError: no such table, no influence in it, an id twice, or an influence that is not a number.
  """
  return checked_scores(read_parquet(path, required=SCORE_COLUMNS), path)


def checked_scores(scores: dict[str, np.ndarray], path: epath.PathLike) -> dict[str, np.ndarray]:
  """A table with `SCORE_COLUMNS`, when its ids and numbers can be scores; `path` is for messages.

  Raises:
    UserError: an id twice, or an influence that is not a number.
  """
  bad = np.flatnonzero(~np.isfinite(scores["influence"]))
  if bad.size:
    names = ", ".join(map(str, scores["example_id"][bad[:3]]))
    raise UserError(
      f"{path}: the influence of {how_many(bad.size, 'example')} is not finite ({names}); compute the scores again"
    )
  ids, counts = np.unique(scores["example_id"].astype(str), return_counts=True)
  if (counts > 1).any():
    raise UserError(
      f"{path}: {how_many((counts > 1).sum(), 'example id[s] [occurs|occur]')} twice, such as {ids[counts > 1][0]}"
    )
  return scores


def remove_leftovers(path: epath.Path) -> None:
  """Removes what killed writes left in a folder, and nothing that another process is writing just now."""
  if not is_remote(path):
    for item in Path(path).iterdir():
      if item.name.endswith(TEMPORARY) and _is_abandoned(item):
        item.unlink(missing_ok=True)


def _is_abandoned(temporary: Path) -> bool:
  """Whether nobody can be writing it any more: its process is gone, or, on another machine, an hour has passed."""
  written_by = re.search(rf"\.([0-9a-f]+)-(\d+)-[0-9a-f]+{re.escape(TEMPORARY)}$", temporary.name)
  if written_by is None:
    return True
  machine, process = written_by[1], int(written_by[2])
  try:
    if machine != _MACHINE:
      return time.time() - temporary.stat().st_mtime > 3600
    os.kill(process, 0)  # sends nothing, only asks
  except ProcessLookupError:
    return True
  except (PermissionError, FileNotFoundError):  # somebody else's process; renamed meanwhile
    return False
  return process == os.getpid()
