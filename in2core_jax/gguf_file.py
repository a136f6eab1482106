"""A GGUF file: its metadata as a dict and its tensors as float32 arrays.

`gguf.GGUFReader` builds a NumPy view for every vocabulary entry and merge, which takes seconds for a 49k vocabulary and
longer than dequantising the model. The header is a plain list of tagged values, so it is walked here directly;
dequantisation itself is `gguf.dequantize`. Layout: the GGUF specification, versions 2 and 3, little-endian.
"""

import dataclasses
import pathlib
import struct
from typing import Any

import gguf
import numpy as np

from in2core_jax.errors import UserError

# Value type -> struct format, for the scalar types.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# A file, or the parts that it was cut into, in order.
Place = str | pathlib.Path | tuple[pathlib.Path, ...]


@dataclasses.dataclass(frozen=True)
class GgufTensor:
  """Where one tensor lies: quantisation type, shape in row-major order, first byte."""

  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]
  start: int


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
      UserError: the file ends before the tensor does, or its quantisation cannot be undone.
    """
    tensor = self.tensors[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
    row_bytes = tensor.shape[-1] // block * block_bytes
    stop = tensor.start + int(np.prod(tensor.shape[:-1], dtype=np.int64)) * row_bytes
    if stop > self._bytes.size:
      raise UserError(
        f"{self.path}: the file ends inside tensor {name} (byte {self._bytes.size} of {stop}); fetch it again"
      )
    packed = self._bytes[tensor.start : stop].reshape(*tensor.shape[:-1], row_bytes)
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


def read_gguf(place: Place) -> GgufFile:
  """Reads the header of a GGUF file; tensors are memory-mapped and read on demand.

  Args:
    place: the file; one that comes in parts is held in memory as a whole.

  Raises:
    UserError: no such file, not a GGUF file, an unsupported version, or a header that is cut off.
  """
  parts = parts_of(place)
  for part in parts:
    if not part.is_file():
      raise UserError(f"{part}: no such GGUF file; give the path of a .gguf file")
  path, size = parts[0], sum(part.stat().st_size for part in parts)
  if size < 24:
    raise UserError(f"{path}: {size} bytes are too few for a GGUF file; fetch it again")
  mapped = [np.memmap(part, np.uint8, mode="r") for part in parts]
  data = mapped[0] if len(parts) == 1 else np.concatenate(mapped)
  if data[:4].tobytes() != b"GGUF":
    raise UserError(f"{path}: starts with {data[:4].tobytes()!r}, not with b'GGUF': not a GGUF file")
  try:
    return _parse(path, data)
  except (struct.error, UnicodeDecodeError) as error:
    raise UserError(f"{path}: the GGUF header is cut off or damaged ({error}); fetch the file again") from error


def _parse(path: pathlib.Path, data: np.ndarray) -> GgufFile:
  cursor = _Cursor(memoryview(data), 4)
  version = cursor.scalar("I")
  if version not in (2, 3):
    raise UserError(f"{path}: GGUF version {version} (or big-endian) is not supported; known: little-endian 2 and 3")
  num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
  metadata = {}
  for _ in range(num_values):
    key = cursor.string()
    metadata[key] = cursor.value(cursor.scalar("I"))
  raw = {}
  for _ in range(num_tensors):
    name = cursor.string()
    shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]  # stored with the fastest axis first
    raw[name] = (cursor.scalar("I"), shape, cursor.scalar("Q"))
  alignment = metadata.get("general.alignment", 32)
  base = -(-cursor.position // alignment) * alignment
  known = {kind.value: kind for kind in gguf.GGMLQuantizationType}
  strange = sorted({kind for kind, _, _ in raw.values()} - set(known))
  if strange:
    raise UserError(f"{path}: quantisation types {strange} are not known to this version of gguf")
  tensors = {name: GgufTensor(known[kind], shape, base + offset) for name, (kind, shape, offset) in raw.items()}
  return GgufFile(path, metadata, tensors, data)


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

  def value(self, kind: int):
    """The next metadata value, of a type of the GGUF format; arrays as lists."""
    if kind == _STRING:
      return self.string()
    if kind == _ARRAY:
      item, length = self.scalar("I"), self.scalar("Q")
      if item not in _SCALARS:
        return [self.value(item) for _ in range(length)]
      form = f"<{length}{_SCALARS[item]}"
      values = struct.unpack_from(form, self.view, self.position)
      self.position += struct.calcsize(form)
      return list(values)
    if kind not in _SCALARS:
      raise struct.error(f"value type {kind} at byte {self.position} is not known")
    return self.scalar(_SCALARS[kind])
