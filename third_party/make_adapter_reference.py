"""Makes the reference values of tests/model/test_adapters.py with PEFT, independently of in2core_jax.

The base models are those of make_reference.py (reference/families.json), the numbers of the factors are drawn from a
seed in the order of their names. Run it in an environment of its own, never in the project's:

    python3.11 -m venv /tmp/reference
    /tmp/reference/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
    /tmp/reference/bin/python third_party/make_adapter_reference.py

With --written=DIR it loads the folders (a model and an adapter each) that `tests/model/test_adapters.py DIR` wrote
and says how far PEFT's logits are from ours. Written into third_party/reference/:

    adapters.json  for each adapter: its base, PEFT's adapter_config.json, names and shapes of its tensors, their seed
    adapters.npz   logits at the last positions [B, 4, V] in float64, entries of the gradient of the mean loss in the
                   factors
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
import peft
import safetensors.numpy
import torch
import transformers
from make_reference import LAST, OUT, pick, tiny_weights

SEED = 7
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
  "phi3 fused, patterns": (
    "phi3",
    {
      "r": 2,
      "lora_alpha": 6,
      "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"],
      "rank_pattern": {"o_proj": 3, "layers.1.mlp.gate_up_proj": 4},
      "alpha_pattern": {"gate_up_proj": 5},
    },
  ),
  "helium rslora": ("helium", {"r": 3, "lora_alpha": 4, "use_rslora": True, "target_modules": ALL}),
  "llama some layers, head": (
    "llama biases yarn",
    {
      "r": 2,
      "lora_alpha": 16,
      "target_modules": ["q_proj", "down_proj"],
      "layers_to_transform": [1, 2],
      "modules_to_save": ["lm_head"],
    },
  ),
  "llama head factors": ("llama dynamic", {"r": 2, "target_modules": ["up_proj", "lm_head"]}),
  "gemma2 dora": ("gemma2", {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["v_proj", "up_proj"]}),
}


def base_model(entry: dict):
  """A model of families.json in float64."""
  config = transformers.AutoConfig.for_model(**json.loads(json.dumps(entry["config"])))
  config._attn_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
  model.get_input_embeddings().padding_idx = None
  tensors = {key: torch.from_numpy(value) for key, value in tiny_weights(entry["shapes"], entry["seed"]).items()}
  model.load_state_dict(tensors, strict=False)
  return model


def drawn(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
  """Numbers of the tensors of an adapter; lengths of columns (DoRA) are positive."""
  rng, found = np.random.default_rng(SEED), {}
  for key in sorted(shapes):
    draw = rng.standard_normal(shapes[key])
    found[key] = (1 + 0.2 * np.abs(draw) if "magnitude" in key else 0.3 * draw).astype(np.float32)
  return found


def make() -> None:
  """Writes adapters.json and adapters.npz."""
  families = json.loads((OUT / "families.json").read_text(encoding="utf-8"))
  entries, arrays = {}, {}
  for name, (base, options) in ADAPTERS.items():
    adapted = peft.get_peft_model(base_model(families[base]), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with tempfile.TemporaryDirectory() as folder:
      adapted.save_pretrained(folder)
      file = pathlib.Path(folder) / "adapter_model.safetensors"
      shapes = {key: list(value.shape) for key, value in safetensors.numpy.load_file(file).items()}
      values = json.loads((pathlib.Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
      safetensors.numpy.save_file(drawn(shapes), file)
      adapted = peft.PeftModel.from_pretrained(base_model(families[base]), folder, is_trainable=True).double().eval()
    tokens = torch.tensor(families[base]["token_ids"])
    with torch.enable_grad():
      logits = adapted(tokens, use_cache=False).logits
      nll = -torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
      nll.mean(-1).mean().backward()
    grads = {key.replace(".default", ""): value.grad for key, value in adapted.named_parameters() if "lora_" in key}
    arrays[f"{name}/logits"] = logits[:, -LAST:].detach().numpy()
    arrays[f"{name}/gradients"] = np.concatenate([pick(grads[key].numpy()) for key in sorted(shapes) if key in grads])
    entries[name] = {"base": base, "values": values, "seed": SEED, "shapes": shapes}
    print(name, float(logits.abs().max()))
  lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry, default=str)}" for name, entry in entries.items())
  (OUT / "adapters.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
  np.savez_compressed(OUT / "adapters.npz", **arrays)


def check_written(root: pathlib.Path) -> None:
  """Loads folders that we wrote with PEFT, and compares logits with ours beside them."""
  for folder in sorted(root.iterdir()):
    adapted = peft.PeftModel.from_pretrained(loaded(folder / "model"), folder / "adapter").double().eval()
    with np.load(folder / "ours.npz") as ours, torch.no_grad():
      tokens, wanted = torch.from_numpy(ours["tokens"]), ours["logits"]
      logits, plain = (model(tokens, use_cache=False).logits.numpy() for model in (adapted, loaded(folder / "model")))
    error, effect = (float(np.abs(wanted - other).max()) for other in (logits, plain))
    print(f"{folder.name}: ours and PEFT's logits differ by {error:.1e}, those of the base model by {effect:.2f}")


def loaded(folder: pathlib.Path):
  """The base model in float64."""
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
  return model.eval()


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("--written", type=pathlib.Path)
  args = parser.parse_args()
  if args.written:
    check_written(args.written)
  else:
    make()
