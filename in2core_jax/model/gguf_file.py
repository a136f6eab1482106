"""A GGUF file: its metadata as a dict and its tensors as float32 arrays.

`gguf.GGUFReader` builds a NumPy view for every vocabulary entry and merge, which takes seconds for a 49k vocabulary and
longer than dequantising the model. The header is a plain list of tagged values, so it is walked here directly;
dequantisation itself is `gguf.dequantize`. Layout: the GGUF specification, versions 2 and 3, little-endian.
"""

import dataclasses
import hashlib
import math
import pathlib
import struct
from typing import Any

import gguf
import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.model import model_files, schema
from in2core_jax.model.schema import plain

# Value type -> struct format, for the scalar types.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LEAST_VALUE, _LEAST_TENSOR = 13, 32  # bytes of the shortest entries of a header
_MAX_NESTED, _MAX_ITEMS = 4, 1 << 24  # of arrays

# A file, or the parts that it was cut into, in order.
Place = str | pathlib.Path | tuple[pathlib.Path, ...]


@dataclasses.dataclass(frozen=True)
class GgufTensor:
  """Where one tensor lies: quantisation type, shape in row-major order, first byte."""

  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]
  start: int

  @property
  def bytes(self) -> int:
    """How many bytes it takes."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
    return math.prod(self.shape) // block * block_bytes


@dataclasses.dataclass(frozen=True)
class GgufFile:
  """The header of a GGUF file, and access to its tensors.

  Attributes:
    path: the file, or its first part.
    metadata: key -> value; arrays are lists.
    tensors: name -> where it lies.
  """

  path: pathlib.Path
  metadata: dict[str, Any]
  tensors: dict[str, GgufTensor]
  _bytes: np.ndarray = dataclasses.field(repr=False)

  def read(self, name: str) -> np.ndarray:
    """Dequantised tensor, float32, row-major ([out, in] for a matrix).

    Raises:
      UserError: its quantisation cannot be undone.
    """
    tensor = self.tensors[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
    row_bytes = tensor.shape[-1] // block * block_bytes
    packed = self._bytes[tensor.start : tensor.start + tensor.bytes].reshape(*tensor.shape[:-1], row_bytes)
    try:
      return gguf.dequantize(packed, tensor.kind).reshape(tensor.shape)
    except NotImplementedError:
      raise UserError(
        f"{self.path}: tensor {name} is quantised as {tensor.kind.name}, which cannot be turned into float32; "
        "use a file quantised as Q4_0, Q4_1, Q8_0, a K-quant, F16 or F32"
      ) from None


def parts_of(place: Place) -> tuple[pathlib.Path, ...]:
  """The parts of a file; a file in one piece is its only part."""
  return place if isinstance(place, tuple) else (pathlib.Path(place),)


def file_hash(place: Place) -> str:
  """SHA-256 of a file's content, however many parts it comes in."""
  digest = hashlib.sha256()
  for part in parts_of(place):
    with part.open("rb") as stream:
      while piece := stream.read(1 << 20):
        digest.update(piece)
  return digest.hexdigest()


def read_gguf(place: Place) -> GgufFile:
  """Reads the header of a GGUF file; tensors are memory-mapped and read on demand.

  Args:
    place: the file; one that comes in parts is held in memory as a whole.

  Raises:
    UserError: no such file, not a GGUF file, an unsupported version, a header that is cut off or says what cannot be,
      tensors that overlap or pass the end.
  """
  parts = parts_of(place)
  for part in parts:
    if part.is_dir():
      found = sorted(part.glob("*.gguf"))
      hint = (
        f"give gguf:{found[0]}" if found else f"give hf:{part}" if (part / "config.json").exists() else "give a file"
      )
      raise UserError(f"{part}: is a folder, and gguf: takes a file; {hint}")
    if not part.is_file():
      raise UserError(f"{part}: no such GGUF file; give the path of a .gguf file")
  path, size = parts[0], sum(part.stat().st_size for part in parts)
  kind = model_files.kind_of(model_files.head_of(path))
  if kind and "GGUF" not in kind:
    raise UserError(f"{path}: not a GGUF file: it is {kind}")
  if size < 24:
    raise UserError(f"{path}: {size} bytes are too few for a GGUF file; fetch it again")
  mapped = [np.memmap(part, np.uint8, mode="r") for part in parts]
  data = mapped[0] if len(parts) == 1 else np.concatenate(mapped)
  if data[:4].tobytes() != b"GGUF":
    raise UserError(f"{path}: starts with {data[:4].tobytes()!r}, not with b'GGUF': not a GGUF file")
  try:
    return _parse(path, data)
  except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
    raise UserError(f"{path}: the GGUF header is cut off or damaged ({error}); fetch the file again") from error


def _parse(path: pathlib.Path, data: np.ndarray) -> GgufFile:
  cursor = _Cursor(memoryview(data), 4)
  version = cursor.scalar("I")
  if version not in (2, 3):
    raise UserError(f"{path}: GGUF version {version} (or big-endian) is not supported; known: little-endian 2 and 3")
  num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
  if num_values * _LEAST_VALUE + num_tensors * _LEAST_TENSOR > data.size:
    raise UserError(
      f"{path}: the header announces {num_tensors} tensors and {num_values} values, more than {data.size} bytes can "
      "hold; fetch the file again"
    )
  metadata: dict[str, Any] = {}
  for _ in range(num_values):
    key = cursor.string()
    if key in metadata:
      raise UserError(f"{path}: metadata {plain(key)} stands twice in the header; fetch the file again")
    metadata[key] = cursor.value(cursor.scalar("I"))
  schema.check(metadata, schema.GGUF_GENERAL, str(path))
  known = {kind.value: kind for kind in gguf.GGMLQuantizationType}
  raw: dict[str, tuple[int, tuple[int, ...], int]] = {}
  for _ in range(num_tensors):
    name, axes = cursor.string(), cursor.scalar("I")
    if name in raw:
      raise UserError(f"{path}: tensor {plain(name)} stands twice in the header; fetch the file again")
    if not 1 <= axes <= 4:
      raise UserError(f"{path}: tensor {plain(name)} has {axes} axes; 1 to 4 are possible; fetch the file again")
    shape = tuple(cursor.scalar("Q") for _ in range(axes))[::-1]  # stored with the fastest axis first
    raw[name] = (cursor.scalar("I"), shape, cursor.scalar("Q"))
  strange = sorted({kind for kind, _, _ in raw.values()} - set(known))
  if strange:
    raise UserError(f"{path}: quantisation types {strange[:5]} are not known to this version of gguf")
  alignment = metadata.get("general.alignment", 32)
  base = -(-cursor.position // alignment) * alignment
  tensors = {name: GgufTensor(known[kind], shape, base + offset) for name, (kind, shape, offset) in raw.items()}
  _check_places(path, tensors, alignment, data.size)
  return GgufFile(path, metadata, tensors, data)


def _check_places(path: pathlib.Path, tensors: dict[str, GgufTensor], alignment: int, size: int) -> None:
  """Refuses tensors without numbers, of broken rows, unaligned, past the end of the file, or over each other."""
  end, before = 0, ""
  for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
    block, stop = gguf.GGML_QUANT_SIZES[tensor.kind][0], tensor.start + tensor.bytes
    if not all(tensor.shape) or tensor.shape[-1] % block:
      raise UserError(
        f"{path}: tensor {plain(name)} has the shape {tensor.shape}, which {tensor.kind.name} cannot have (rows of "
        f"whole blocks of {block}); fetch the file again"
      )
    if stop > size:
      raise UserError(f"{path}: the file ends inside tensor {plain(name)} (byte {size} of {stop}); fetch it again")
    if tensor.start % alignment:
      raise UserError(
        f"{path}: tensor {plain(name)} starts at byte {tensor.start}, which is no multiple of general.alignment "
        f"{alignment}; fetch the file again"
      )
    if tensor.start < end:
      raise UserError(f"{path}: tensors {plain(before)} and {plain(name)} overlap; fetch the file again")
    end, before = stop, name


class _Cursor:
  """A position in the header that moves as values are read."""

  def __init__(self, view: memoryview, position: int):
    self.view, self.position = view, position

  def scalar(self, code: str):
    """The next number; `code` is its type as `struct` names it."""
    value = struct.unpack_from("<" + code, self.view, self.position)[0]
    self.position += struct.calcsize("<" + code)
    return value

  def string(self) -> str:
    """The next text: its length in bytes, then UTF-8."""
    length = struct.unpack_from("<Q", self.view, self.position)[0]
    start = self.position + 8
    if start + length > len(self.view):
      raise struct.error(f"a text of {length} bytes at byte {start} passes the end")
    self.position = start + length
    return bytes(self.view[start : self.position]).decode("utf-8")

  def value(self, kind: int, depth: int = 0):
    """The next metadata value, of a type of the GGUF format; arrays as lists."""
    if kind == _STRING:
      return self.string()
    if kind == _ARRAY:
      item, length = self.scalar("I"), self.scalar("Q")
      if length > _MAX_ITEMS or depth > _MAX_NESTED:
        raise struct.error(f"an array of {length} items, {depth} deep in others, at byte {self.position}")
      if item not in _SCALARS:
        return [self.value(item, depth + 1) for _ in range(length)]
      form = f"<{length}{_SCALARS[item]}"
      values = struct.unpack_from(form, self.view, self.position)
      self.position += struct.calcsize(form)
      return list(values)
    if kind not in _SCALARS:
      raise struct.error(f"value type {kind} at byte {self.position} is not known")
    return self.scalar(_SCALARS[kind])
