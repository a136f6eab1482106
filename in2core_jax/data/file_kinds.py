"""What a path given as data holds: refuses what is no JSON text, in one line that says what it is and what to do."""

from __future__ import annotations

import glob
import os
import pathlib
import re
import stat

from in2core_jax.errors import UserError

_TO_JSON = (
  "convert it to JSON lines, for example with datasets.load_dataset({kind!r}, data_files=FILE)['train'].to_json"
)
_UNPACK = "unpack it first: {command} FILE"
# First bytes -> what such a file is, what to do.
_MAGIC = (
  (b"\x1f\x8b", "compressed by gzip", _UNPACK.format(command="gunzip -k")),
  (b"\x28\xb5\x2f\xfd", "compressed by zstd", _UNPACK.format(command="zstd -d")),
  (b"BZh", "compressed by bzip2", _UNPACK.format(command="bunzip2 -k")),
  (b"\xfd7zXZ\x00", "compressed by xz", _UNPACK.format(command="unxz -k")),
  (b"\x04\x22\x4d\x18", "compressed by lz4", _UNPACK.format(command="lz4 -d")),
  (b"7z\xbc\xaf\x27\x1c", "a 7-zip archive", "unpack it first"),
  (b"PK\x03\x04", "a zip archive", _UNPACK.format(command="unzip")),
  (b"PAR1", "a Parquet file", _TO_JSON.format(kind="parquet")),
  (b"ARROW1", "an Arrow (Feather) file", _TO_JSON.format(kind="arrow")),
  (b"FEA1", "a Feather file", "convert it to JSON lines, for example with pandas.read_feather(FILE).to_json"),
  (b"\xff\xff\xff\xff", "an Arrow stream", _TO_JSON.format(kind="arrow")),
  (b"ORC", "an ORC file", "convert it to JSON lines"),
  (b"Obj\x01", "an Avro file", "convert it to JSON lines"),
  (b"SQLite format 3\x00", "an SQLite data base", "write its rows as JSON lines: sqlite3 -json FILE 'select ...'"),
  (b"\x89HDF\r\n", "an HDF5 file", "convert it to JSON lines"),
  (b"\x93NUMPY", "a NumPy file", "convert it to JSON lines"),
  (b"\xd0\xcf\x11\xe0", "an old Excel file", "save it as CSV and convert that to JSON lines"),
  (b"%PDF", "a PDF", "give conversations as JSON lines"),
  (b"GGUF", "a GGUF model", "it goes into --model=gguf:FILE; data are JSON lines"),
  (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file: git lfs pull"),
  (b"\x89PNG", "a picture", "give conversations as JSON lines"),
  (b"\xff\xd8\xff", "a picture", "give conversations as JSON lines"),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_HEAD = 4096
_TABLE_HEAD = r"[\w \"'-]+([,\t][\w \"'-]+)+\s*$"
# A file's bytes, its text, and the lists and objects made of it: an estimate, not a measurement.
_MEMORY_FACTOR = 3


def check_data_file(path: pathlib.Path) -> None:
  """Refuses what cannot be read as JSON text, before any of it is kept in memory.

  Raises:
    UserError: says what is there, and what to do.
  """
  try:
    found = path.stat()
  except (OSError, ValueError) as error:
    raise UserError(f"{path}: {_missing(path, error)}") from error
  if stat.S_ISDIR(found.st_mode):
    raise UserError(f"{path} is a folder{_inside(path)}; give the path of a JSON lines file or of a JSON array")
  if not stat.S_ISREG(found.st_mode):
    kind = "a pipe" if stat.S_ISFIFO(found.st_mode) else "a socket" if stat.S_ISSOCK(found.st_mode) else "a device"
    raise UserError(
      f"{path} is {kind}, which can be read once only or never ends; write its contents into a file first"
    )
  free = available_bytes()
  if found.st_size * _MEMORY_FACTOR > free:
    raise UserError(
      f"{path}: {found.st_size / 1e9:,.1f} GB need about {_MEMORY_FACTOR} times as much memory, and "
      f"{free / 1e9:,.1f} GB are free; give a part of the file, such as its first lines: head -n 100000 FILE"
    )
  with path.open("rb") as file:
    head = file.read(_HEAD)
  told = _kind_of(path, head)
  if told:
    raise UserError(f"{path} is {told[0]}; {told[1]}".replace("FILE", path.name))


def available_bytes() -> int:
  """Memory that is free for this process, by what Linux and its container say; without an answer, all there is."""
  try:
    free = next(line for line in pathlib.Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    found = int(free.split()[1]) * 1024
  except (OSError, StopIteration):
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit = pathlib.Path("/sys/fs/cgroup/memory.max")
  text = limit.read_text().strip() if limit.is_file() else "max"
  return found if not text.isdecimal() else min(found, int(text))


def _missing(path: pathlib.Path, error: Exception) -> str:
  """Why there is no file, and what may have been meant."""
  if not isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
    return f"{getattr(error, 'strerror', None) or error}; give the path of a JSON lines file or of a JSON array"
  text = str(path)
  if re.match(r"\w+:/", text):
    return "nothing is fetched from the network; copy the file here and give its path"
  if any(sign in text for sign in "*?["):
    names = sorted(glob.glob(text, recursive=True))[:3]
    such = f", which stands for {' and '.join(names)}" if names else ""
    return f"a pattern{such}; name each file: jsonl:ONE.jsonl+jsonl:OTHER.jsonl"
  if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.suffix:
    return (
      "no such file; if it is the name of a data set on a hub: nothing is downloaded, save it as JSON lines first and "
      "give the path of that file"
    )
  return "no such file; give the path of a JSON lines file or of a JSON array"


def _inside(path: pathlib.Path) -> str:
  """What a folder is, by the names in it."""
  names = sorted(entry.name for entry in os.scandir(path))
  if "adapter_config.json" in names:
    return " with an adapter, a part of a model and no data"
  if "config.json" in names and any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names):
    return " with a model, which goes into --model=hf:FOLDER"
  if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= set(names):
    return " that datasets.save_to_disk has written: save it anew with load_from_disk(FOLDER)[SPLIT].to_json"
  if "dataset_info.json" in names:
    return " of a prepared tensorflow_datasets set, which goes by tfds:NAME/SPLIT@DATA_DIR"
  if "manifest.json" in names and "coreset.jsonl" in names:
    return " of a select run: its selection is coreset.jsonl in it"
  files = [name for name in names if name.endswith((".jsonl", ".json"))]
  if files:
    return f" with {', '.join(files[:3])}{' and others' if len(files) > 3 else ''}: name each file, joined by +"
  kinds = sorted({pathlib.PurePath(name).suffix for name in names} - {""})[:4]
  return f" with {len(names):,} entries" + (f" ({', '.join(kinds)})" if kinds else "")


def _kind_of(path: pathlib.Path, head: bytes) -> tuple[str, str] | None:
  """(what a file is, what to do) of one that is no JSON text, by its first bytes."""
  for magic, what, remedy in _MAGIC:
    if head.startswith(magic):
      if magic == b"PK\x03\x04" and (path.suffix.lower() in (".xlsx", ".xlsm", ".ods") or b"xl/" in head):
        return "an Excel file (xlsx)", "save it as CSV and convert that to JSON lines"
      if magic == b"PK\x03\x04" and path.suffix.lower() in (".pt", ".pth", ".bin", ".npz"):
        return "a PyTorch or NumPy archive", "such files are not opened; give conversations as JSON lines"
      return what, remedy
  if head[257:262] == b"ustar":
    return "a tar archive", _UNPACK.format(command="tar xf")
  if _PICKLE.match(head):
    return "a Python pickle", "such files can run code and are not opened; give conversations as JSON lines"
  if len(head) > 9 and head[8:10] == b'{"' and head[4:8] == b"\0\0\0\0":
    return (
      "a safetensors file, weights of a model",
      "it belongs into a folder for --model=hf:FOLDER; data are JSON lines",
    )
  if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
    return "UTF-32 text", "save it as UTF-8: iconv -f UTF-32 -t UTF-8 FILE"
  if head.startswith(_UTF_16) or (len(head) > 3 and (head[1::2].count(0) > 0.4 * len(head[1::2]))):
    return "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE"
  if b"\x00" in head:
    return "a binary file, not text", "give JSON lines, or a JSON array"
  return _kind_of_text(path, head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").lstrip())


def _kind_of_text(path: pathlib.Path, text: str) -> tuple[str, str] | None:
  first = text.partition("\n")[0]
  if re.match(r"<(!doctype|html|head|\?xml)", text, re.IGNORECASE):
    return "a web page (HTML) or XML, perhaps saved instead of the file", "download the file itself"
  named = path.suffix.lower() in (".csv", ".tsv")
  if not text or text[0] in "{[":
    return None
  if not named and re.match(r"-?\d|(true|false|null|NaN)\b", text):
    return None  # JSON values, though no records
  if named or re.match(_TABLE_HEAD, first):
    kind = "separated by tabs (TSV)" if "\t" in first else "separated by commas (CSV)"
    return f"a table {kind}", _TO_JSON.format(kind="csv")
  return None
