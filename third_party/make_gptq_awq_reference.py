"""Makes reference/gptq_awq.npz: small matrices as AutoGPTQ and AutoAWQ pack them, and as they unpack them again.

Run it in an environment of its own, never in the project's. The two packages need no GPU for this, but much else to be
imported whole: they are installed without what they depend on, and the files that pack and unpack are imported alone.

    python3.11 -m venv /tmp/reference
    /tmp/reference/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
    /tmp/reference/bin/pip install --no-deps auto-gptq==0.7.1
    /tmp/reference/bin/pip download --no-deps --no-binary :all: autoawq==0.2.9 && tar xzf autoawq-0.2.9.tar.gz
    /tmp/reference/bin/python third_party/make_gptq_awq_reference.py GPTQ_FOLDER AWQ_FOLDER

GPTQ_FOLDER holds auto_gptq/, AWQ_FOLDER holds awq/. Each case CASE/... has the tensors under the names that a
checkpoint gives them behind "x.", and CASE/= the matrix [out, in] that the library makes of them. Scales have so few
digits that products with them are exact in float16, in which the libraries multiply.
"""

import pathlib
import sys
import types

import numpy as np
import torch

OUT = pathlib.Path(__file__).resolve().parent / "reference" / "gptq_awq.npz"
OUTPUTS, INPUTS, GROUP = 32, 64, 16


def without_init(name: str, folder: pathlib.Path) -> None:
  """Makes a package of a folder whose __init__.py is not run."""
  package = types.ModuleType(name)
  package.__path__ = [str(folder / name.replace(".", "/"))]
  sys.modules[name] = package


def drawn(bits: int, generator: torch.Generator, least_zero: int):
  """(numbers [in, out], zeros [groups, out], scales [groups, out]) of a matrix."""
  numbers = torch.randint(0, 2**bits, (INPUTS, OUTPUTS), generator=generator)
  zeros = torch.randint(least_zero, 2**bits, (INPUTS // GROUP, OUTPUTS), generator=generator)
  scales = 2.0 ** -torch.randint(3, 8, zeros.shape, generator=generator)
  return numbers, zeros, scales * (1 + torch.randint(0, 4, zeros.shape, generator=generator) / 4)


def gptq(bits: int, generator: torch.Generator, ordered: bool) -> dict[str, np.ndarray]:
  """What AutoGPTQ packs; `ordered`: groups follow the order of activations."""
  from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

  numbers, zeros, scales = drawn(bits, generator, 1)
  group = torch.arange(INPUTS) // GROUP
  group = group[torch.randperm(INPUTS, generator=generator)] if ordered else group
  linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
  linear.weight.data = ((numbers - zeros[group]) * scales[group]).t().contiguous()
  packed = QuantLinear(bits, GROUP, INPUTS, OUTPUTS, False, weight_dtype=torch.float16)
  packed.pack(linear, scales.t().contiguous(), zeros.t().contiguous().float(), group.to(torch.int32))
  packed.scales = packed.scales.half()
  found = packed(torch.eye(INPUTS, dtype=torch.float16)).t()
  tensors = {name: getattr(packed, name).numpy() for name in ("qweight", "qzeros", "scales", "g_idx")}
  assert torch.equal(found.float(), linear.weight.data), "the library gives back what it packed"
  return tensors | {"=": found.float().numpy()}


def awq(generator: torch.Generator) -> dict[str, np.ndarray]:
  """What AutoAWQ packs."""
  from awq.modules.linear.gemm import WQLinear_GEMM
  from awq.utils.packing_utils import dequantize_gemm

  numbers, zeros, scales = drawn(4, generator, 0)
  linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
  linear.weight.data = ((numbers - zeros.repeat_interleave(GROUP, 0)) * scales.repeat_interleave(GROUP, 0)).t()
  packed = WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales, zeros=zeros)
  found = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, GROUP).t()
  tensors = {name: getattr(packed, name).numpy() for name in ("qweight", "qzeros", "scales")}
  assert torch.equal(found.float(), linear.weight.data), "the library gives back what it packed"
  return tensors | {"=": found.float().numpy()}


def make(gptq_folder: pathlib.Path, awq_folder: pathlib.Path) -> None:
  """Writes gptq_awq.npz."""
  for name in ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
    without_init(name, gptq_folder)
  for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
    without_init(name, awq_folder)
  generator = torch.Generator().manual_seed(0)
  cases = {
    "gptq": gptq(4, generator, False),
    "gptq 8 bits": gptq(8, generator, False),
    "gptq 2 bits": gptq(2, generator, False),
    "gptq ordered": gptq(4, generator, True),
    "awq": awq(generator),
  }
  arrays = {f"{case}/{name}": np.ascontiguousarray(part) for case, made in cases.items() for name, part in made.items()}
  np.savez_compressed(OUT, **arrays)
  print(len(arrays), OUT.stat().st_size)


if __name__ == "__main__":
  with torch.no_grad():
    make(*map(pathlib.Path, sys.argv[1:]))
