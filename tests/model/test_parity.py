"""The decoder against PyTorch's implementation of the same weights (third_party/make_reference.py made the values)."""

import functools
import json
import pathlib

import exported
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from in2core_jax import gradients
from in2core_jax.data import assets, batches, tokenizing
from in2core_jax.data.records import Record
from in2core_jax.model import decoder, weights
from in2core_jax.model.objective import make_objective
from in2core_jax.params import subtree

REFERENCE = pathlib.Path(__file__).resolve().parents[2] / "third_party" / "reference"
PROMPTS = json.loads((REFERENCE / "prompts.json").read_text(encoding="utf-8"))["prompts"]
GEMMA3_PROMPTS = json.loads((REFERENCE / "gemma3_prompts.json").read_text(encoding="utf-8"))["prompts"]
TINY = json.loads((REFERENCE / "tiny.json").read_text(encoding="utf-8"))
EXPORTS = json.loads((REFERENCE / "exports.json").read_text(encoding="utf-8"))
LENGTHS = (80, 256)  # few shapes, few compilations; padding on the right changes nothing under a causal mask


@pytest.fixture(scope="module")
def embedded():
  config, params = weights.load_gguf(assets.asset_path(weights.EMBEDDED_MODEL))
  return config, jax.device_put(params)


@pytest.fixture(scope="module")
def smollm2(embedded):
  return logits_fn(*embedded)


@pytest.fixture(scope="module")
def gemma3():
  config, params, tokenizer, _ = weights.load_model("gemma3")
  return config, jax.device_put(params), tokenizer


@pytest.fixture(scope="module")
def gemma3_logits(gemma3):
  return logits_fn(*gemma3[:2])


def logits_fn(config, params):
  run = jax.jit(lambda params, tokens: decoder.logits(config, params, tokens))

  def logits(ids):
    tokens = np.zeros((1, next(length for length in LENGTHS if length >= len(ids))), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(run(params, tokens)[0, : len(ids)])

  return logits


@pytest.mark.parametrize("prompts", [PROMPTS, GEMMA3_PROMPTS], ids=["smollm2", "gemma3"])
def test_reference_covers_real_conversations(prompts):
  assert len(prompts) >= 8
  assert max(len(prompt["token_ids"]) for prompt in prompts) >= 190
  assert any(sum(m["role"] == "assistant" for m in prompt["messages"]) > 1 for prompt in prompts)
  assert all(len(prompt["nll"]) == len(prompt["token_ids"]) - 1 for prompt in prompts)


@pytest.mark.real
@pytest.mark.parametrize("row", range(len(PROMPTS)), ids=[prompt["name"] for prompt in PROMPTS])
def test_embedded_model_matches_pytorch(smollm2, row):
  assert_matches(smollm2, PROMPTS[row], "logits.npz", row)


@pytest.mark.real
@pytest.mark.parametrize("row", range(len(GEMMA3_PROMPTS)), ids=[prompt["name"] for prompt in GEMMA3_PROMPTS])
def test_embedded_gemma3_matches_pytorch(gemma3_logits, row):
  assert_matches(gemma3_logits, GEMMA3_PROMPTS[row], "gemma3_logits.npz", row)


@pytest.mark.slow
@pytest.mark.real
def test_curvature_products_of_many_queries_are_those_of_each(embedded):
  """jaxlib 0.10.2 on CPU compiled the products of 11 or more queries of this model wrongly, for all but the first."""
  config, params = embedded
  chosen = subtree.make_subtree(params, "last:1", "attention")
  sub, frozen = subtree.split(params, chosen)
  rng = np.random.default_rng(0)
  tokens, positions = (
    rng.integers(0, config.vocab_size, (2, 24), np.int32),
    np.tile(np.arange(8, 20, dtype=np.int32), (2, 1)),
  )
  batch = batches.Batch(
    *(tokens, None, positions, np.take_along_axis(tokens, positions + 1, 1), np.full((2, 12), 1 / 12, np.float32)),
    np.ones(2, np.float32),
  )
  objective = make_objective(config, chosen)
  v = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal((12, *leaf.shape), np.float32)), sub)
  for product in gradients.CURVATURE_PRODUCTS.values():
    if product is gradients.hessian_product:
      continue
    many = jax.jit(functools.partial(gradients.over_queries(product), objective))(sub, frozen, batch, v)
    one = jax.jit(functools.partial(product, objective))
    for query in (0, 1, 11):
      alone = one(sub, frozen, batch, jax.tree.map(lambda leaf, query=query: leaf[query], v))
      for found, wanted in zip(jax.tree.leaves(many), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(found[query], wanted, rtol=1e-3, atol=1e-5 * float(jnp.abs(wanted).max()))


def assert_matches(logits, prompt, file, row):
  ids = np.array(prompt["token_ids"])
  ours = logits(ids)
  with np.load(REFERENCE / file) as stored:
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
    assert_greedy(smollm2, greedy)


@pytest.mark.real
def test_greedy_decoding_of_gemma3_matches_pytorch(gemma3, gemma3_logits):
  continued = [prompt["greedy"] for prompt in GEMMA3_PROMPTS if "greedy" in prompt]
  assert len(continued) == 2 and all(len(greedy["new_ids"]) == 12 for greedy in continued)
  for greedy in continued:
    assert_greedy(gemma3_logits, greedy)
    assert gemma3[2].decode(greedy["new_ids"], skip_special_tokens=True) == greedy["text"]


def assert_greedy(logits, greedy):
  # One pass over prompt and answer: the largest logit before each new token must be that token.
  start, new = len(greedy["prompt_ids"]), greedy["new_ids"]
  best = logits(greedy["prompt_ids"] + new).argmax(axis=-1)
  assert best[start - 1 : -1].tolist() == new


@pytest.mark.real
def test_gemma3_conversations_are_tokenised_as_by_sentencepiece(gemma3):
  records = [Record(prompt["name"], tuple(prompt["messages"]), "", "{}", "memory", 1) for prompt in GEMMA3_PROMPTS]
  dataset = tokenizing.tokenize(records, gemma3[2], 500)
  for prompt, tokens, mask in zip(GEMMA3_PROMPTS, dataset.tokens, dataset.response_mask, strict=True):
    assert gemma3[2].decode(tokens) == prompt["text"]
    assert tokens.tolist() == prompt["token_ids"], prompt["name"]
    assert mask.tolist() == [bool(m) for m in prompt["response_mask"]], prompt["name"]


@pytest.mark.real
def test_per_example_losses_match_pytorch(embedded):
  short = [prompt for prompt in PROMPTS if len(prompt["token_ids"]) <= 80]
  assert len(short) == 8
  assert_losses(*embedded, short)


@pytest.mark.real
def test_per_example_losses_of_gemma3_match_pytorch(gemma3):
  short = [prompt for prompt in GEMMA3_PROMPTS if len(prompt["token_ids"]) <= 60]
  assert len(short) >= 6
  assert_losses(*gemma3[:2], short)


def assert_losses(config, params, short):
  tokens, target, position = (np.zeros((len(short), n), np.int32) for n in (80, 40, 40))
  weight = np.zeros((len(short), 40), np.float32)
  for row, prompt in enumerate(short):
    ids, slots = np.array(prompt["token_ids"]), np.flatnonzero(prompt["response_mask"])
    tokens[row, : len(ids)] = ids
    target[row, : len(slots)], position[row, : len(slots)] = ids[slots], slots - 1
    weight[row, : len(slots)] = 1 / len(slots)
  batch = batches.Batch(tokens, None, position, target, weight, np.ones(len(short), np.float32))
  chosen = subtree.make_subtree(params, "last:8")
  objective = make_objective(config, chosen)
  losses = jax.jit(lambda sub, frozen: objective.losses(objective.outputs(sub, frozen, batch), frozen, batch))
  expected = [prompt["response_mean_nll"] for prompt in short]
  np.testing.assert_allclose(losses(*subtree.split(params, chosen)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_tiny_model_matches_pytorch(name, tmp_path):
  entry, tensors = TINY[name], exported.tiny_tensors(name)
  checksum = sum(np.abs(tensor.astype(np.float64)).sum() for tensor in tensors.values())
  assert checksum == pytest.approx(entry["checksum"], rel=1e-9), "NumPy draws other numbers: make the reference again"
  (tmp_path / "config.json").write_text(json.dumps(entry["config"]))
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")

  config, params = weights.load_hf_dir(tmp_path)
  ours = np.asarray(decoder.logits(config, params, jnp.asarray(entry["token_ids"])))
  with np.load(REFERENCE / "tiny.npz") as stored:
    expected = stored[name]
  np.testing.assert_allclose(ours, expected, rtol=0, atol=4.3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", exported.NAMES)
def test_exports_are_read_by_pytorch_and_by_us(name, tmp_path):
  """The folders are the very ones that transformers read for make_reference.py: same config.json, same tensors."""
  entry, out = EXPORTS[name], tmp_path / "out"
  read, _ = exported.export(name, tmp_path / "source", out)
  written = json.loads((out / "config.json").read_text())
  assert written == entry["config"], "the exporter writes other folders: make the reference again"
  assert exported.checksum(safetensors.numpy.load_file(out / "model.safetensors")) == entry["checksum"]
  length = 96 if name in exported.GGUF else 128
  assert written["max_position_embeddings"] == entry["max_position_embeddings"] == length
  generation = out / "generation_config.json"
  if name != "gguf-gemma3":  # whose file has no token ids
    kept = json.loads(generation.read_text())
    assert kept["eos_token_id"] == entry["eos_token_id"] == [2, 5]
    assert name in exported.GGUF or kept == exported.GENERATION

  config, params = weights.load_hf_dir(out)
  assert config == read and config.carried == read.carried
  ours = np.asarray(decoder.logits(config, params, jnp.asarray(entry["token_ids"])))
  with np.load(REFERENCE / "exports.npz") as stored:
    expected = stored[name]
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
