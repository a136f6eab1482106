"""The decoder against PyTorch's implementation of the same weights (third_party/make_reference.py made the values)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from in2core_jax import assets, batches, model, subtree, weights

REFERENCE = pathlib.Path(__file__).resolve().parent.parent / "third_party" / "reference"
PROMPTS = json.loads((REFERENCE / "prompts.json").read_text(encoding="utf-8"))["prompts"]
TINY = json.loads((REFERENCE / "tiny.json").read_text(encoding="utf-8"))
LENGTHS = (80, 256)  # few shapes, few compilations; padding on the right changes nothing under a causal mask


@pytest.fixture(scope="module")
def embedded():
  config, params = weights.load_gguf(assets.asset_path(weights.EMBEDDED_MODEL))
  return config, jax.device_put(params)


@pytest.fixture(scope="module")
def smollm2(embedded):
  config, params = embedded
  run = jax.jit(lambda params, tokens: model.logits(config, params, tokens))

  def logits(ids):
    tokens = np.zeros((1, next(length for length in LENGTHS if length >= len(ids))), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(run(params, tokens)[0, : len(ids)])

  return logits


def test_reference_covers_real_conversations():
  assert len(PROMPTS) >= 8
  assert max(len(prompt["token_ids"]) for prompt in PROMPTS) >= 200
  assert any(sum(m["role"] == "assistant" for m in prompt["messages"]) > 1 for prompt in PROMPTS)
  assert all(len(prompt["nll"]) == len(prompt["token_ids"]) - 1 for prompt in PROMPTS)


@pytest.mark.real
@pytest.mark.parametrize("row", range(len(PROMPTS)), ids=[prompt["name"] for prompt in PROMPTS])
def test_embedded_model_matches_pytorch(smollm2, row):
  prompt = PROMPTS[row]
  ids = np.array(prompt["token_ids"])
  ours = smollm2(ids)
  with np.load(REFERENCE / "logits.npz") as stored:
    positions, indices, expected = (stored[f"{key}_{row}"] for key in ("positions", "indices", "logits"))
  assert expected.shape == (4, 250)
  np.testing.assert_allclose(np.take_along_axis(ours[positions], indices, -1), expected, rtol=0, atol=1e-3)

  nll = np.asarray(jax.nn.logsumexp(jnp.asarray(ours[:-1]), axis=-1)) - ours[np.arange(len(ids) - 1), ids[1:]]
  np.testing.assert_allclose(nll, prompt["nll"], rtol=0, atol=1e-3)
  response = np.array(prompt["response_mask"][1:], bool)
  np.testing.assert_allclose(nll[response].astype(np.float64).mean(), prompt["response_mean_nll"], rtol=1e-5)


@pytest.mark.real
def test_greedy_decoding_matches_pytorch(smollm2):
  by_name = {prompt["name"]: prompt["greedy"] for prompt in PROMPTS if "greedy" in prompt}
  assert by_name["capital"]["text"] == "The capital of France is Paris."
  for greedy in by_name.values():
    # One pass over prompt and answer: the largest logit before each new token must be that token.
    start, new = len(greedy["prompt_ids"]), greedy["new_ids"]
    best = smollm2(greedy["prompt_ids"] + new).argmax(axis=-1)
    assert best[start - 1 : -1].tolist() == new


@pytest.mark.real
def test_per_example_losses_match_pytorch(embedded):
  config, params = embedded
  short = [prompt for prompt in PROMPTS if len(prompt["token_ids"]) <= 80]
  assert len(short) == 8
  tokens, target, position = (np.zeros((len(short), n), np.int32) for n in (80, 40, 40))
  weight = np.zeros((len(short), 40), np.float32)
  for row, prompt in enumerate(short):
    ids, slots = np.array(prompt["token_ids"]), np.flatnonzero(prompt["response_mask"])
    tokens[row, : len(ids)] = ids
    target[row, : len(slots)], position[row, : len(slots)] = ids[slots], slots - 1
    weight[row, : len(slots)] = 1 / len(slots)
  batch = batches.Batch(tokens, None, position, target, weight, np.ones(len(short), np.float32))
  chosen = subtree.make_subtree(params, "last:8")
  objective = model.make_objective(config, chosen)
  losses = jax.jit(lambda sub, frozen: objective.losses(objective.outputs(sub, frozen, batch), frozen, batch))
  expected = [prompt["response_mean_nll"] for prompt in short]
  np.testing.assert_allclose(losses(*subtree.split(params, chosen)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_tiny_model_matches_pytorch(name, tmp_path):
  entry = TINY[name]
  rng = np.random.default_rng(entry["seed"])
  tensors = {}
  for key in sorted(entry["shapes"]):  # as tiny_weights in make_reference.py draws them
    draw = rng.standard_normal(entry["shapes"][key])
    tensors[key] = (1 + 0.1 * draw if "norm" in key else 0.2 * draw).astype(np.float32)
  checksum = sum(np.abs(tensor.astype(np.float64)).sum() for tensor in tensors.values())
  assert checksum == pytest.approx(entry["checksum"], rel=1e-9), "NumPy draws other numbers: make the reference again"
  (tmp_path / "config.json").write_text(json.dumps(entry["config"]))
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")

  config, params = weights.load_hf_dir(tmp_path)
  ours = np.asarray(model.logits(config, params, jnp.asarray(entry["token_ids"])))
  with np.load(REFERENCE / "tiny.npz") as stored:
    np.testing.assert_allclose(ours, stored[name], rtol=0, atol=2e-5)
