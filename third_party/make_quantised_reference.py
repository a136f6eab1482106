"""Makes reference/quantised.npz: small matrices as the libraries pack them, and as they unpack them again.

Run it in an environment of its own, never in the project's:

    python3.11 -m venv /tmp/reference
    /tmp/reference/bin/pip install torch==2.13.0 transformers==5.23.0 bitsandbytes==0.50.2 compressed-tensors==0.20.1
    /tmp/reference/bin/python third_party/make_quantised_reference.py

Each case CASE/... has the tensors under the names that a checkpoint gives them behind "x.", and CASE/= the matrix
[out, in] that the library makes of them. bitsandbytes on a CPU, compressed-tensors on a CPU.
"""

import pathlib

import bitsandbytes.functional as bnb
import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

OUT = pathlib.Path(__file__).resolve().parent / "reference" / "quantised.npz"
OUTPUTS, INPUTS = 6, 128  # whole blocks in a row: others bitsandbytes unpacks differently on CPU and GPU


def make() -> None:
  """Writes quantised.npz."""
  torch.manual_seed(0)
  arrays: dict[str, np.ndarray] = {}
  for kind in ("nf4", "fp4"):
    for nested in (False, True):
      weight = torch.randn(OUTPUTS, INPUTS) * torch.logspace(-2, 1, OUTPUTS)[:, None]
      weight = weight.to(torch.bfloat16 if nested else torch.float32)
      packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
      case = f"{kind}{' double' if nested else ''}"
      arrays[f"{case}/weight"] = packed.numpy()
      arrays |= {f"{case}/weight.{key}": value.numpy() for key, value in state.as_dict(packed=True).items()}
      arrays[f"{case}/="] = bnb.dequantize_4bit(packed, state).float().numpy()
  weight = torch.randn(OUTPUTS, INPUTS).half()
  numbers, scale, _ = bnb.int8_vectorwise_quant(weight)
  arrays |= {"int8/weight": numbers.numpy(), "int8/SCB": scale.numpy()}
  arrays["int8/="] = bnb.int8_vectorwise_dequant(numbers, scale).float().numpy()
  for case, group in (("packed", 32), ("packed asymmetric", 64)):
    numbers = torch.randint(-8, 8, (OUTPUTS, INPUTS), dtype=torch.int8)
    scale, zero = torch.rand(OUTPUTS, INPUTS // group), torch.zeros(OUTPUTS, INPUTS // group, dtype=torch.int8)
    if "asymmetric" in case:
      zero = torch.randint(-8, 8, zero.shape, dtype=torch.int8)
      arrays[f"{case}/weight_zero_point"] = pack_to_int32(zero, 4, packed_dim=0).numpy()
    arrays |= {f"{case}/weight_packed": pack_to_int32(numbers, 4).numpy(), f"{case}/weight_scale": scale.numpy()}
    arrays[f"{case}/weight_shape"] = np.array([OUTPUTS, INPUTS])
    spread = (value.repeat_interleave(group, 1) for value in (zero, scale))
    arrays[f"{case}/="] = ((numbers.float() - next(spread)) * next(spread)).numpy()
  np.savez_compressed(OUT, **arrays)
  print(len(arrays), OUT.stat().st_size)


if __name__ == "__main__":
  make()
