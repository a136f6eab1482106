"""What a file of data holds, by its first bytes: how it is read, or one line that says what it is and what to do."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import re
import stat
from typing import BinaryIO

import pyarrow as pa

from in2core_jax.errors import UserError
from in2core_jax.parallel.host import available_bytes

_GIVE = "give JSON lines, a JSON array, CSV, Parquet or Arrow"
# First bytes -> how the file is compressed, how it is read.
_CODECS = (
  (b"\x1f\x8b", "gzip"),
  (b"\x28\xb5\x2f\xfd", "zstd"),
  (b"BZh", "bz2"),
  (b"\x04\x22\x4d\x18", "lz4"),
)
_TABLES = ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow"))
CODEC_SUFFIXES = (".gz", ".zst", ".bz2", ".lz4")
_UNPACK = "unpack it first: {command} FILE"
# First bytes of what is not read -> what such a file is, what to do.
_MAGIC = (
  (b"\xfd7zXZ\x00", "compressed by xz", _UNPACK.format(command="unxz -k")),
  (b"7z\xbc\xaf\x27\x1c", "a 7-zip archive", "unpack it first"),
  (b"PK\x03\x04", "a zip archive", _UNPACK.format(command="unzip")),
  (b"PARE", "an encrypted Parquet file", "decrypt it first"),
  (b"FEA1", "a Feather file", "convert it to JSON lines, for example with pandas.read_feather(FILE).to_json"),
  (b"ORC", "an ORC file", "convert it to JSON lines"),
  (b"Obj\x01", "an Avro file", "convert it to JSON lines"),
  (b"SQLite format 3\x00", "an SQLite data base", "write its rows as JSON lines: sqlite3 -json FILE 'select ...'"),
  (b"\x89HDF\r\n", "an HDF5 file", "convert it to JSON lines"),
  (b"\x93NUMPY", "a NumPy file", "convert it to JSON lines"),
  (b"\xd0\xcf\x11\xe0", "an old Excel file", "save it as CSV (UTF-8)"),
  (b"%PDF", "a PDF", _GIVE),
  (b"GGUF", "a GGUF model", "it goes into --model=gguf:FILE; data are JSON lines"),
  (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file: git lfs pull"),
  (b"\x89PNG", "a picture", _GIVE),
  (b"\xff\xd8\xff", "a picture", _GIVE),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_HEAD = 4096
_TABLE_HEAD = r"[\w \"'-]+([,\t][\w \"'-]+)+\s*$"
# Records lie on the disk; token ids and what is planned with them take less than the text that they are made of.
_MEMORY_FACTOR = 1


@dataclasses.dataclass(frozen=True)
class DataFile:
  """A file that can be read.

  Attributes:
    path: of the file.
    kind: json, csv, parquet or arrow.
    codec: gzip, zstd, bz2, lz4, or None.
    shown: the name of the file in messages and as a record's source.
  """

  path: pathlib.Path
  kind: str
  codec: str | None
  shown: str

  def open(self) -> BinaryIO:
    """Opens its contents, which are decompressed as they are read."""
    if self.codec is None:
      return self.path.open("rb")
    stream = pa.CompressedInputStream(pa.OSFile(str(self.path)), self.codec)
    return io.BufferedReader(_Unpacked(stream, self.shown), 1 << 20)

  def broken(self, line: int, error: Exception) -> UserError:
    """What is told where reading on fails: damaged compression, a disk, a file that is gone."""
    return UserError(f"{self.shown}:{line}: cannot be read on ({' '.join(str(error).split())}); get the file again")


class _Unpacked(io.RawIOBase):
  """A stream that is decompressed as it is read, and refused when it turns out larger than the memory."""

  def __init__(self, stream: pa.NativeFile, shown: str):
    super().__init__()
    self._stream, self._shown = stream, shown
    self._left = available_bytes() // _MEMORY_FACTOR

  def readable(self) -> bool:
    """As `io.RawIOBase` has it."""
    return True

  def readinto(self, buffer: memoryview) -> int:
    """Reads into a buffer, and refuses what unpacks to more than the free memory."""
    data = self._stream.read(len(buffer))
    buffer[: len(data)] = data
    self._left -= len(data)
    if self._left < 0:
      raise UserError(f"{self._shown}: unpacked it is too large for the memory that is free; give a part of it")
    return len(data)

  def close(self) -> None:
    """Closes the file below too."""
    self._stream.close()
    super().close()


def check_data_file(path: pathlib.Path, shown: str | None = None) -> DataFile:
  """Recognises a file by its contents, before any of it is kept in memory.

  Args:
    path: of the file.
    shown: its name in messages; None: the path.

  Raises:
    UserError: it cannot be read; says what is there, and what to do.
  """
  shown = str(path) if shown is None else shown
  try:
    found = path.stat()
  except (OSError, ValueError) as error:
    raise UserError(f"{shown}: {_missing(path, error)}") from error
  if not stat.S_ISREG(found.st_mode):
    kind = "a pipe" if stat.S_ISFIFO(found.st_mode) else "a socket" if stat.S_ISSOCK(found.st_mode) else "a device"
    raise UserError(
      f"{shown} is {kind}, which can be read once only or never ends; write its contents into a file first, or give "
      "- and send them to standard input"
    )
  free = available_bytes()
  if found.st_size * _MEMORY_FACTOR > free:
    raise UserError(
      f"{shown}: {found.st_size / 1e9:,.1f} GB may need as much memory as token ids, and "
      f"{free / 1e9:,.1f} GB are free; give a part of the file, such as its first lines: head -n 100000 FILE"
    )
  with path.open("rb") as file:
    head = file.read(_HEAD)
  codec = next((name for magic, name in _CODECS if head.startswith(magic)), None)
  name = path
  if codec:
    name = path.with_suffix("") if path.suffix.lower() in CODEC_SUFFIXES else path
    opened = DataFile(path, "json", codec, shown)
    try:
      with opened.open() as stream:
        head = stream.read(_HEAD)
    except OSError as error:
      raise opened.broken(1, error) from error
  table = next((kind for magic, kind in _TABLES if head.startswith(magic)), None)
  if table and codec:
    raise UserError(f"{shown} is a table compressed by {codec} as a whole; {_UNPACK.format(command='gunzip -k')}")
  kind = table or _kind_of_bytes(name, head)
  if isinstance(kind, tuple):
    raise UserError(f"{shown} is {kind[0]}; {kind[1]}".replace("FILE", name.name))
  return DataFile(path, kind, codec, shown)


def _missing(path: pathlib.Path, error: Exception) -> str:
  """Why there is no file, and what may have been meant."""
  if not isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
    return f"{getattr(error, 'strerror', None) or error}; give the path of a file of data"
  text = str(path)
  if re.match(r"\w+:/", text):
    return "nothing is fetched from the network; copy the file here and give its path"
  if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.suffix:
    return f"no such file; if it is the name of a data set on a hub, write hub:{text}"
  return "no such file; give the path of a file of data: JSON lines, a JSON array, CSV, Parquet or Arrow"


def _kind_of_bytes(path: pathlib.Path, head: bytes) -> str | tuple[str, str]:
  """json or csv, or else (what a file is, what to do), by its first bytes."""
  for magic, what, remedy in _MAGIC:
    if head.startswith(magic):
      if magic == b"PK\x03\x04" and (path.suffix.lower() in (".xlsx", ".xlsm", ".ods") or b"xl/" in head):
        return "an Excel file (xlsx)", "save it as CSV (UTF-8)"
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
  if head.startswith(_UTF_16) or (len(head) > 3 and head[1] == 0 and (head[1::2].count(0) > 0.4 * len(head[1::2]))):
    return "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE"
  if b"\x00" in head and head.lstrip()[:1] not in (b"{", b"["):  # of lines, one may be damaged
    return "a binary file, not text", _GIVE
  return _kind_of_text(path, head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").lstrip())


def _kind_of_text(path: pathlib.Path, text: str) -> str | tuple[str, str]:
  first = text.partition("\n")[0]
  if re.match(r"<(!doctype|html|head|\?xml)", text, re.IGNORECASE):
    return "a web page (HTML) or XML, possibly saved instead of the file", "download the file itself"
  named = path.suffix.lower() in (".csv", ".tsv")
  if not text or text[0] in "{[":
    return "json"
  if not named and re.match(r"-?\d|(true|false|null|NaN)\b", text):
    return "json"  # JSON values, though no records
  return "csv" if named or re.match(_TABLE_HEAD, first) else "json"
