"""Embeddings against hidden states taken apart by hand, and BM25 against its formula with numbers worked out."""

import math
import types

import jax
import numpy as np
import pytest
import tiny
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax.errors import UserError
from in2core_jax.model import decoder, embeddings, hidden_cache
from in2core_jax.params import subtree
from in2core_jax.selection import bm25, cosines

CONFIG = tiny.make_config()


def job_of(params, batch_tokens, tree=None, config=CONFIG):
  tree = embeddings.above_all(config.num_layers) if tree is None else tree
  return hidden_cache.BoundaryJob(config, tree, params, batch_tokens)


def one_by_one(params, dataset, config=CONFIG, by_position=False):
  """Each example alone in its row, by the model's own layers and RMS norm written out."""
  found = []
  for tokens in dataset.tokens:
    h = np.asarray(
      decoder.run_layers(config, params["layers"], decoder.embed(config, params, tokens[None]))[0], np.float64
    )
    scale = config.norm_offset + np.asarray(params["final_norm"]["scale"])
    h = h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + config.rms_eps) * scale
    weights = np.arange(1, len(tokens) + 1) if by_position else np.ones(len(tokens))
    found.append(weights @ h / weights.sum())
  return np.array(found)


def test_hidden_states_that_are_kept_give_the_same_embeddings():
  params, dataset = tiny.make_params(CONFIG), tiny.make_dataset(CONFIG.vocab_size)
  tree = subtree.make_subtree(params, "last:2")
  cache = hidden_cache.compute_boundary(job_of(params, 26, tree), dataset)
  found = embeddings.pooled(job_of(params, 26), dataset, (cache, tree.boundary))
  wanted = embeddings.pooled(job_of(params, 26), dataset)
  assert tuple(found) == embeddings.POOLINGS
  for name, values in wanted.items():
    np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)


def test_weights_by_position_are_those_of_rds_plus():
  params, dataset = tiny.make_params(CONFIG), tiny.make_dataset(CONFIG.vocab_size)
  found = embeddings.pooled(job_of(params, 26), dataset)["position"]
  np.testing.assert_allclose(found, one_by_one(params, dataset, by_position=True), rtol=1e-4, atol=1e-5)


def test_the_last_token_stands_alone():
  params, dataset = tiny.make_params(CONFIG), tiny.make_dataset(CONFIG.vocab_size)
  found = embeddings.pooled(job_of(params, 26), dataset)["last"]
  totals = [len(tokens) * one for tokens, one in zip(dataset.tokens, one_by_one(params, dataset), strict=True)]
  cut = types.SimpleNamespace(tokens=[tokens[:-1] for tokens in dataset.tokens])
  before = [len(tokens) * one for tokens, one in zip(cut.tokens, one_by_one(params, cut), strict=True)]
  np.testing.assert_allclose(found, np.array(totals) - np.array(before), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm_offset", [0.0, 1.0])
def test_embeddings_are_means_over_the_examples_own_tokens(norm_offset):
  config = tiny.make_config(norm_offset=norm_offset)
  params, dataset = tiny.make_params(config), tiny.make_dataset(config.vocab_size)
  wanted = one_by_one(params, dataset, config)
  found = embeddings.pooled(job_of(params, 26, config=config), dataset)["mean"]
  assert found.dtype == np.float32 and found.shape == (len(tiny.ROLES), CONFIG.hidden_size)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_embeddings_depend_neither_on_the_batches_nor_on_the_neighbours():
  params, dataset = tiny.make_params(CONFIG), tiny.make_dataset(CONFIG.vocab_size)
  whole = embeddings.pooled(job_of(params, 1000), dataset)["mean"]
  cut = embeddings.pooled(job_of(params, 1), dataset)["mean"]
  np.testing.assert_allclose(whole, cut, rtol=1e-4, atol=1e-5)
  others = types.SimpleNamespace(ids=dataset.ids[:2], tokens=dataset.tokens[:2])
  np.testing.assert_allclose(embeddings.pooled(job_of(params, 1000), others)["mean"], whole[:2], rtol=1e-4, atol=1e-5)


def test_embeddings_need_all_layers_and_a_token():
  params, dataset = tiny.make_params(CONFIG), tiny.make_dataset(CONFIG.vocab_size)
  with pytest.raises(UserError, match="all layers below the boundary, which is 2: use above_all"):
    embeddings.pooled(job_of(params, 26, subtree.make_subtree(params, "2,3")), dataset)
  dataset.tokens = (*dataset.tokens[:1], np.zeros(0, np.int32), *dataset.tokens[2:])
  with pytest.raises(UserError, match="'example-1' has no token"):
    embeddings.pooled(job_of(params, 26), dataset)
  assert not jax.tree.leaves(subtree.split(params, embeddings.above_all(CONFIG.num_layers))[0])


def test_cosines_are_those_of_the_definition():
  a, b = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[4.0, 3.0], [-3.0, -4.0], [8.0, -6.0]])
  np.testing.assert_allclose(cosines.cosine_to(a, b), [[0.96, -1.0, 0.0], [0.0, 0.0, 0.0]], atol=1e-7)
  assert np.abs(cosines.cosine_to(1e-20 * a, a)).max() <= 1
  with pytest.raises(UserError, match="of one width"):
    cosines.cosine_to(a, np.ones((3, 4)))
  with pytest.raises(UserError, match="not finite"):
    cosines.cosine_to(a * np.nan, b)


def test_bm25_is_its_formula():
  documents = ["The cat sat.", "the dog; the dog barked at the cat", "birds"]
  found = bm25.bm25(["Cat dog dog", "birds", "nothing here", ""], documents)
  idf = lambda n: math.log(1 + (3 - n + 0.5) / (n + 0.5))  # noqa: E731
  lengths = [3, 8, 1]
  tf = lambda f, i: f * 2.2 / (f + 1.2 * (0.25 + 0.75 * lengths[i] / 4))  # noqa: E731
  wanted = np.zeros((4, 3))
  wanted[0, 0] = idf(2) * tf(1, 0)
  wanted[0, 1] = idf(2) * tf(1, 1) + 2 * idf(1) * tf(2, 1)
  wanted[1, 2] = idf(1) * tf(1, 2)
  np.testing.assert_allclose(found, wanted, rtol=1e-12)
  assert found.dtype == np.float64


def test_bm25_ranks_as_it_should_and_takes_what_is_empty():
  # A rare word beats a common one, a short document a long one, and no word counts against a document.
  documents = ["apple pie", "apple tart", "apple cake zebra", "apple apple apple " + "crust " * 30]
  scores = bm25.bm25(["apple zebra", "apple"], documents)
  assert scores[0].argmax() == 2 and scores[1, 0] > scores[1, 2] and (scores[1] > 0).all()
  assert bm25.bm25([], ["a"]).shape == (0, 1) and bm25.bm25(["a"], []).shape == (1, 0)
  assert not bm25.bm25(["a"], ["", "?!"]).any()
  # Words beyond ASCII are words.
  assert bm25.bm25(["Füße 犬"], ["füße", "犬 猫", "fusse"])[0].tolist()[2] == 0


def test_whitened_embeddings_have_no_direction_in_common():
  rng = np.random.default_rng(4)
  x = rng.standard_normal((400, 5)) * [30, 3, 1, 1, 1] + 7
  white = cosines.whitening(x, 1e-9)(x)
  np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-9)
  np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(5), atol=1e-5)
  cov = np.cov(x.T, bias=True)
  metric = np.linalg.inv(cov + 0.1 * np.linalg.eigvalsh(cov)[-1] * np.eye(5))
  image, other = cosines.whitening(x, 0.1)(x[:3]), x[:3] - x.mean(axis=0)
  np.testing.assert_allclose(image @ image.T, other @ metric @ other.T)
  for vectors, ratio in ((x, 0.0), (np.ones((4, 5)), 0.1)):
    with pytest.raises(UserError, match="need different ones, above 0"):
      cosines.whitening(vectors, ratio)
