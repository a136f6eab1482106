"""Writes the table of docs/models.md: every family, and how far our numbers are from PyTorch's.

    PYTHONPATH=.:tests:tests/model python tests/model/families_table.py

The columns about reading and writing are those that test_families.py and test_parity.py hold; the errors are measured
here. A test compares all columns but the errors with the committed table.
"""

import json
import os
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import test_families
import test_gguf

from in2core_jax.model import weights
from in2core_jax.model.families import FAMILIES, TEXT_PARTS
from in2core_jax.model.gguf_config import ARCHITECTURES
from in2core_jax.model.gguf_cuts import CUTS

DOC = pathlib.Path(__file__).resolve().parents[2] / "docs" / "models.md"
HEAD = "| reference model | `model_type` | config | weights | GGUF | adapter | export | loss | logits | gradient |\n"
HEAD += "|---" * 10 + "|"
# Reference model -> architecture of the GGUF files that are read as the same model.
GGUF = {name: architecture for name, architecture, _ in test_gguf.CASES} | {"gemma3": "gemma3"}
TINY = json.loads((test_families.REFERENCE / "tiny.json").read_text(encoding="utf-8"))
# Reference models whose adapters are held against PEFT's own numbers.
_ADAPTERS = json.loads((test_families.REFERENCE / "adapters.json").read_text(encoding="utf-8"))
ADAPTERS = {entry["base"] for entry in _ADAPTERS.values()}
# What the reference models of tiny.json have beyond the sizes.
_QUIET = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
_QUIET |= {"num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "model_type", "rope_theta"}
_QUIET |= {"pad_token_id", "eos_token_id"}


def options(config: dict) -> str:
  """The keys of a reference model that switch something on."""
  found = [key for key, value in config.items() if key not in _QUIET and value not in (False, None)]
  scaling = config.get("rope_scaling") or {}
  kind = scaling.get("rope_type", scaling.get("type"))
  return ", ".join(f"rope {kind}" if key == "rope_scaling" else key for key in found if "original_max" not in key)


def rows() -> list[str]:
  """Rows without their errors: a name, and the columns up to export."""
  made = [(name, entry["config"], "equal") for name, entry in test_families.MODELS.items()]
  made += [(name, entry["config"], "equal") for name, entry in TINY.items()]
  made.sort(key=lambda row: (list(FAMILIES).index(row[1]["model_type"]), row[0]))
  return [
    f"| {name} | {config['model_type']} | {options(config)} | yes | {GGUF.get(name, 'no')} | "
    f"{adapter(name)} | {export} |"
    for name, config, export in made
  ]


def adapter(name: str) -> str:
  """What is known of its adapters."""
  return "equal" if name in ADAPTERS else "read"


def checked_adapters() -> str:
  """Which adapters were held against PEFT."""
  named = [f"- {entry['base']}: {name}" for name, entry in _ADAPTERS.items()]
  return "\n".join(
    [
      "Adapters of these models are held against PEFT's numbers (`test_adapters.py`).",
      "Those of the others go through the same code, by the names of their modules.",
      "",
      *named,
    ]
  )


def errors(name: str) -> str:
  """Largest relative error of losses, largest error of logits, and of gradients over the largest entry."""
  if name not in test_families.MODELS:
    return " (`test_parity.py`) | | |"
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    config, params = weights.load_hf_dir(test_families.write(path / "in", name))
    measure = jax.jit(jax.value_and_grad(test_families.losses_and_logits, 1, has_aux=True), static_argnums=0)
    (_, (losses, logits)), gradient = measure(config, params, jnp.asarray(test_families.MODELS[name]["token_ids"]))
    found = test_families.stored_gradients(path / "out", config, gradient)
  wanted = test_families.expected(name)
  loss = np.max(np.abs(np.asarray(losses) / test_families.MODELS[name]["losses"] - 1))
  logit = np.max(np.abs(np.asarray(logits)[:, -wanted["logits"].shape[1] :] - wanted["logits"]))
  slope = np.max(np.abs(found - wanted["gradients"])) / np.max(np.abs(wanted["gradients"]))
  return f" {loss:.0e} | {logit:.0e} | {slope:.0e} |"


def gguf_kinds() -> str:
  """What follows about GGUF files."""
  names = [f"- `{name}`: {one.known}" for name, one in ARCHITECTURES.items()]
  kinds = ", ".join(f"`{name}`" for name in CUTS)
  text = ["GGUF files of these architectures are read:", "", *names, "", f"Their vocabularies: Gemma's, and {kinds}."]
  return "\n".join(text)


def known() -> str:
  """The sentence about multimodal folders follows from the table too."""
  parts = ", ".join(f"`{outer}` (as `{inner}`)" for outer, (_, inner) in TEXT_PARTS.items())
  return f"Of multimodal folders the text part is read: {parts}."


def main() -> None:
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  jax.config.update("jax_default_matmul_precision", "highest")
  jax.config.update("jax_disable_most_optimizations", True)  # quick to compile
  lines = [row + errors(row.split("|")[1].strip()) for row in rows()]
  text = DOC.read_text(encoding="utf-8")
  body = "\n".join([HEAD, *lines, "", checked_adapters(), "", known(), "", gguf_kinds(), ""])
  text = re.sub(r"(<!-- table -->\n).*?(<!-- end -->)", lambda m: m[1] + body + m[2], text, flags=re.DOTALL)
  DOC.write_text(text, encoding="utf-8")


if __name__ == "__main__":
  main()
