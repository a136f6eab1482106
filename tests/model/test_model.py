"""The decoder against one written again in plain NumPy, and what padding, prompts and dtypes may and may not change."""

import dataclasses
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax import gradients
from in2core_jax.data import batches
from in2core_jax.errors import UserError
from in2core_jax.model import decoder, hidden_cache, objective
from in2core_jax.model.objective import head_chunk, head_ggn, make_objective, token_losses_fn, token_nll
from in2core_jax.params import adapters, subtree
from in2core_jax.runs import files

LLAMA3 = (
  ("factor", 8.0),
  ("high_freq_factor", 4.0),
  ("low_freq_factor", 1.0),
  ("original_max_position_embeddings", 64),
  ("rope_type", "llama3"),
)
CONFIGS = {
  "tied, grouped queries": {},
  "untied": {"tie_embeddings": False},
  "one key head": {"num_kv_heads": 1},
  "as many key heads as queries": {"num_kv_heads": 4},
  "attention bias": {"attention_bias": True},
  "sliding window": {"sliding_window": 3},
  "llama3 rope": {"rope_scaling": LLAMA3, "head_dim": 8, "rope_theta": 500.0},
  "linear rope": {"rope_scaling": (("factor", 4.0), ("rope_type", "linear"))},
  "gemma 3": tiny.GEMMA3,
}


def token_nlls(config, chosen, sub, frozen, batch):
  """Per-token negative log-likelihood [B,R] at the response slots; zero on padding slots."""
  filled = batch.weight > 0
  nlls = token_losses_fn(config, chosen)(sub, frozen, batch._replace(weight=filled))
  return jnp.where(filled, nlls, 0)


def frequencies_in_numpy(config, local=False):
  """Angular frequency of each rotary pair; the three cases of Llama 3 written as three cases."""
  scaling = {} if local else dict(config.rope_scaling or ())
  found = []
  for pair in range(config.head_dim // 2):
    frequency = (config.local_rope_theta if local else config.rope_theta) ** (-2 * pair / config.head_dim)
    if scaling.get("rope_type") == "linear":
      frequency /= scaling["factor"]
    if scaling.get("rope_type") == "llama3":
      turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)  # turns within the old context
      low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
      if turns < low:
        frequency /= scaling["factor"]
      elif turns <= high:
        part = (turns - low) / (high - low)
        frequency = (1 - part) * frequency / scaling["factor"] + part * frequency
    found.append(frequency)
  return np.array(found)


def rotate_in_numpy(config, x, position, local=False):
  """Half-rotation form: entry i and entry i + head_dim / 2 are one complex number, turned by position * frequency."""
  half = config.head_dim // 2
  turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies_in_numpy(config, local))
  return np.concatenate([turned.real, turned.imag])


def norm_in_numpy(config, x, scale):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_eps) * (config.norm_offset + scale)


def project_in_numpy(module, x):
  y = x @ module["kernel"] + module.get("bias", 0.0)
  if "lora_a" in module:
    y = y + x @ (module["lora_a"] @ module["lora_b"])
  if "core" in module:
    y = y + x @ (module["left"] @ module["core"] @ module["right"])
  return y


def attention_in_numpy(config, module, x, layer):
  """One query head and one position at a time: x [T,D] -> [T,D]."""
  local = config.global_every is not None and (layer + 1) % config.global_every != 0
  window = config.sliding_window if local or config.global_every is None else None
  length, dim, group = len(x), config.head_dim, config.num_heads // config.num_kv_heads
  q, k, v = (project_in_numpy(module[f"{name}_proj"], x).reshape(length, -1, dim) for name in "qkv")
  if config.query_key_norms:
    q, k = (norm_in_numpy(config, y, module[f"{name}_norm"]["scale"]) for name, y in (("q", q), ("k", k)))
  mixed = np.zeros((length, config.num_heads, dim))
  for head in range(config.num_heads):
    for t in range(length):
      first = max(0, t - window + 1) if window else 0
      query = rotate_in_numpy(config, q[t, head], t, local)
      keys = [rotate_in_numpy(config, k[s, head // group], s, local) for s in range(first, t + 1)]
      weights = np.exp(np.array(keys) @ query / np.sqrt(config.query_scalar or dim))
      mixed[t, head] = weights / weights.sum() @ v[first : t + 1, head // group]
  return project_in_numpy(module["o_proj"], mixed.reshape(length, -1))


def activation_in_numpy(config, x):
  if config.activation == "silu":
    return x / (1 + np.exp(-x))
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def logits_in_numpy(config, params, tokens):
  """The whole decoder for one example: ids [T] -> logits [T,V], float64."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  h = params["embed"]["embedding"][tokens] * (np.sqrt(config.hidden_size) if config.scaled_embeddings else 1)
  again = lambda p, name, y: norm_in_numpy(config, y, p[name]["scale"]) if config.post_norms else y  # noqa: E731
  for layer in range(config.num_layers):
    p = jax.tree.map(lambda leaf, row=layer: leaf[row], params["layers"])
    x = norm_in_numpy(config, h, p["attention_norm"]["scale"])
    h = h + again(p, "attention_post_norm", attention_in_numpy(config, p["attention"], x, layer))
    x = norm_in_numpy(config, h, p["mlp_norm"]["scale"])
    gate = activation_in_numpy(config, project_in_numpy(p["mlp"]["gate_proj"], x))
    inner = gate * project_in_numpy(p["mlp"]["up_proj"], x)
    h = h + again(p, "mlp_post_norm", project_in_numpy(p["mlp"]["down_proj"], inner))
  h = norm_in_numpy(config, h, params["final_norm"]["scale"])
  return h @ (params["embed"]["embedding"].T if config.tie_embeddings else params["lm_head"]["kernel"])


@pytest.mark.slow
@pytest.mark.real
def test_curvature_of_the_head_is_right_for_many_queries():
  """At the real size: [12, 400, 49152] at once was compiled wrongly by jaxlib 0.10.2 on CPU, from 0.8 GB on."""
  rng = np.random.default_rng(0)
  matrix = jnp.asarray(0.05 * rng.standard_normal((49152, 32), "f4"))
  z, dz = jnp.asarray(rng.standard_normal((400, 32), "f4")), jnp.asarray(rng.standard_normal((12, 400, 32), "f4"))
  many = jax.jit(jax.vmap(head_ggn, (None, 0, None)))(z, dz, matrix)
  one = jax.jit(head_ggn)
  for query in (0, 1, 11):
    alone = one(z, dz[query], matrix)
    np.testing.assert_allclose(many[query], alone, rtol=1e-4, atol=1e-5 * float(jnp.abs(alone).max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_plain_decoder(name, x64, monkeypatch):
  monkeypatch.setattr(decoder, "SHORTEST_RUN", 3)  # 13 tokens in three runs of four and one of one
  config = tiny.make_config(**CONFIGS[name])
  params = tiny.make_params(config, jnp.float64)
  tokens = tiny.make_batch(config).tokens[:2]
  found = jax.jit(lambda p, t: decoder.logits(config, p, t))(params, tokens)
  assert found.dtype == jnp.float64
  wanted = np.stack([logits_in_numpy(config, params, row) for row in tokens])
  np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-10)
  plain = tiny.make_config(**{key: value for key, value in CONFIGS[name].items() if key in ("head_dim", "rope_theta")})
  if name in ("sliding window", "llama3 rope", "linear rope"):  # the option matters at these lengths
    assert np.abs(found - decoder.logits(plain, params, tokens)).max() > 1e-3


@pytest.mark.parametrize("field", tiny.GEMMA3)
def test_every_trait_of_gemma3_matters(field, x64):
  config = tiny.make_config(**tiny.GEMMA3)
  plain = {"norm_offset": 0.5, "sliding_window": 5}.get(field, getattr(tiny.make_config(), field))
  params = tiny.make_params(config, jnp.float64)
  tokens = tiny.make_batch(config).tokens[:1]
  other = dataclasses.replace(config, **{field: plain})
  assert np.abs(decoder.logits(config, params, tokens) - decoder.logits(other, params, tokens)).max() > 1e-3


def test_a_vocabulary_of_a_quarter_million_gets_shorter_chunks():
  assert [head_chunk(size) for size in (37, 49152, 262144)] == [512, 512, 96]


def test_llama3_frequencies_have_all_three_cases(x64):
  config = tiny.make_config(**CONFIGS["llama3 rope"])
  frequencies = frequencies_in_numpy(config)
  unscaled = 500.0 ** (-np.arange(0, 8, 2) / 8)
  assert frequencies[0] == unscaled[0]
  assert unscaled[1] / 8 < frequencies[1] < unscaled[1]
  np.testing.assert_allclose(frequencies[2:], unscaled[2:] / 8)
  cos, sin = decoder.rotary_tables(config, 9, jnp.float64)
  angle = np.arange(9)[:, None] * frequencies
  np.testing.assert_allclose(cos, np.cos(angle), atol=1e-14)
  np.testing.assert_allclose(sin, np.sin(angle), atol=1e-14)


def test_lora_and_sketch_factors_add_to_the_kernel(x64):
  config = tiny.make_config()
  params = tiny.make_params(config, jnp.float64, lora=2, sketch=3)
  params = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + 0.1 if path[-1].key == "core" else leaf, params)
  tokens = tiny.make_batch(config).tokens[:1]
  found = decoder.logits(config, params, tokens)
  np.testing.assert_allclose(found[0], logits_in_numpy(config, params, tokens[0]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("changes", [{"num_kv_heads": 3}, {"head_dim": 5}])
def test_impossible_shapes_are_refused(changes):
  with pytest.raises(UserError, match="model config"):
    tiny.make_config(**changes)


def test_unknown_rope_scaling_is_refused():
  config = tiny.make_config(rope_scaling=(("rope_type", "ntk"),))
  with pytest.raises(UserError, match="'ntk' is not supported; known: default, linear, llama3"):
    decoder.rotary_tables(config, 4, jnp.float32)


def test_fresh_parameters_have_the_contract_tree():
  config = tiny.make_config(tie_embeddings=False, attention_bias=True)
  params = decoder.init_params(config, jax.random.key(0), jnp.bfloat16)
  assert jax.tree.structure(params) == jax.tree.structure(tiny.make_params(config))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
  kernel = params["layers"]["mlp"]["up_proj"]["kernel"].astype(jnp.float32)
  assert 0.015 < float(kernel.std()) < 0.025
  assert not np.array_equal(kernel[0], kernel[1])


CHOICES = {
  "top layers": ("2,3", "all", {}),
  "not contiguous": ("0,3,4", "mlp", {}),
  "head": ("3", "mlp,lm_head", {"tie_embeddings": False}),
  "tied embedding": ("3", "mlp,embed", {}),
  "embedding below its own head": ("3", "mlp,embed", {"tie_embeddings": False}),
  "final norm alone": ("all", "final_norm", {}),
}


@pytest.mark.parametrize("name", CHOICES)
def test_losses_are_those_of_all_logits_for_any_subtree(name, x64):
  layers, modules, changes = CHOICES[name]
  t = tiny.make_tiny(layers, modules, jnp.float64, tiny.make_config(**changes))
  found = jax.jit(lambda s, f, b: tiny.gradients.per_example_losses(t.objective, s, f, b))(t.sub, t.frozen, t.batch)
  np.testing.assert_allclose(found, tiny.plain_losses(t.config, t.params, t.batch), rtol=1e-10, atol=1e-12)
  tokens = token_nlls(t.config, t.subtree, t.sub, t.frozen, t.batch)
  assert tokens.shape == t.batch.weight.shape
  np.testing.assert_allclose(jnp.sum(tokens * t.batch.weight, axis=-1), found, rtol=1e-10, atol=1e-12)
  assert not np.any(np.asarray(tokens)[t.batch.weight == 0])


def test_a_boundary_cache_below_a_chosen_embedding_is_refused():
  t = tiny.make_tiny("3", "mlp,embed")
  hidden = np.zeros((tiny.SIZE, tiny.NUM_TOKENS, t.config.hidden_size), np.float32)
  with pytest.raises(UserError, match="use no boundary cache"):
    t.objective.outputs(t.sub, t.frozen, t.batch._replace(hidden=hidden))


def test_another_machine_may_write_the_same_boundary_cache(tmp_path, monkeypatch):
  """On a file system that several see, where process numbers say nothing: here both have the same one."""
  t, file = tiny.make_tiny(), tmp_path / "train.bin"
  dataset = tiny.make_dataset(t.config.vocab_size)
  job = hidden_cache.BoundaryJob(t.config, t.subtree, t.frozen)
  wanted = hidden_cache.compute_boundary(job, dataset).values
  elsewhere = tmp_path / f".train.bin.00000000-{os.getpid()}-0a1b2c3d{files.TEMPORARY}"
  killed = tmp_path / f".train.bin.{files._MACHINE}-{os.getpid()}-0a1b2c3d{files.TEMPORARY}"
  for left in (elsewhere, killed):
    left.write_bytes(b"")

  def meanwhile(batches, total):
    with monkeypatch.context() as patch:
      patch.setattr(files, "_MACHINE", "0badcafe")
      np.testing.assert_array_equal(hidden_cache.compute_boundary(job, dataset, file).values, wanted)
    return batches

  found = hidden_cache.compute_boundary(dataclasses.replace(job, track=meanwhile), dataset, file)
  np.testing.assert_array_equal(found.values, wanted)
  assert {path.name for path in tmp_path.iterdir()} == {file.name, f"{file.name}.sha256", elsewhere.name}


def test_the_boundary_cache_may_be_narrower_than_the_weights():
  t = tiny.make_tiny()
  hidden = decoder.run_below(t.config, t.subtree, t.frozen, t.batch.tokens)
  narrow = t.batch._replace(hidden=hidden.astype(jnp.bfloat16))
  z = t.objective.outputs(t.sub, t.frozen, narrow)
  assert z.dtype == jnp.float32
  np.testing.assert_allclose(z, t.objective.outputs(t.sub, t.frozen, t.batch), atol=0.1)


# --- What may not change a loss. --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
  """(model, function batch -> (loss [B], token nll [B,R], gradient of the summed loss)), float32, compiled once."""
  t = tiny.make_tiny("0,3", "all,final_norm")

  @jax.jit
  def measure(batch):
    losses, pull = jax.vjp(lambda s: tiny.gradients.per_example_losses(t.objective, s, t.frozen, batch), t.sub)
    return losses, token_nlls(t.config, t.subtree, t.sub, t.frozen, batch), pull(jnp.ones_like(losses))[0]

  return t, measure


def other_ids(tokens, where):
  """The ids at `where` replaced by others, everywhere different."""
  return np.where(where, (tokens + 17) % 37, tokens).astype(np.int32)


def test_ids_that_nothing_is_predicted_from_change_nothing_at_all(measured):
  t, measure = measured
  batch = t.batch
  last = np.where(batch.weight > 0, batch.position, -1).max(axis=1)  # the last response token is predicted from here
  behind = np.arange(tiny.NUM_TOKENS)[None, :] > last[:, None]  # padding, a prompt at the end, the last response's id
  assert behind[tiny.MULTI_TURN].sum() == 4
  changed = batch._replace(tokens=other_ids(batch.tokens, behind))
  assert np.any(changed.tokens != batch.tokens)
  tiny.assert_trees_equal(measure(changed), measure(batch))
  # One id earlier is what the last response token is predicted from: that one does count.
  within = other_ids(batch.tokens, np.arange(tiny.NUM_TOKENS)[None, :] == last[:, None])
  moved = np.asarray(measure(batch._replace(tokens=within))[0] != measure(batch)[0])
  np.testing.assert_array_equal(moved, last >= 0)


def test_prompt_ids_are_no_targets_and_reach_only_what_comes_after_them(measured):
  t, measure = measured
  # Example "PPrrPPPrrrP": the ids of the second turn's prompt stand at 4, 5, 6; two responses come before, three after.
  where = np.zeros(t.batch.tokens.shape, bool)
  where[tiny.MULTI_TURN, 4:7] = True
  changed = t.batch._replace(tokens=other_ids(t.batch.tokens, where))
  before, after = measure(t.batch), measure(changed)
  others = np.arange(tiny.SIZE) != tiny.MULTI_TURN
  np.testing.assert_array_equal(np.asarray(after[1])[others], np.asarray(before[1])[others])
  turn = np.asarray(after[1])[tiny.MULTI_TURN] != np.asarray(before[1])[tiny.MULTI_TURN]
  np.testing.assert_array_equal(turn, [False, False, True, True, True, False, False, False, False])
  # Counting the first turn alone, the second turn's prompt is nowhere: not in the loss, not in the gradient.
  weight = t.batch.weight.copy()
  weight[tiny.MULTI_TURN, 2:] = 0
  tiny.assert_trees_equal(measure(changed._replace(weight=weight)), measure(t.batch._replace(weight=weight)))


def test_slots_without_weight_change_nothing_at_all(measured):
  t, measure = measured
  empty = t.batch.weight == 0
  junk = t.batch._replace(
    target=np.where(empty, 5, t.batch.target).astype(np.int32),
    position=np.where(empty, 3, t.batch.position).astype(np.int32),
  )
  tiny.assert_trees_equal(measure(junk)[:2], measure(t.batch)[:2])
  tiny.assert_trees_close(measure(junk)[2], measure(t.batch)[2], 1e-6)


def test_rows_without_response_and_padding_rows_are_exactly_zero(measured):
  t, measure = measured
  losses, tokens, _ = measure(t.batch)
  silent = np.array([tiny.NO_RESPONSE, 6, 7])
  assert t.batch.valid.tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
  assert not np.any(np.asarray(losses)[silent])
  assert not np.any(np.asarray(tokens)[silent])
  assert np.all(np.delete(np.asarray(losses), silent) > 1)
  only = t.batch._replace(weight=np.where(np.isin(np.arange(tiny.SIZE), silent)[:, None], t.batch.weight, 0))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(measure(only)[2]))


def test_right_padding_moves_nothing_beyond_rounding(x64):
  t = tiny.make_tiny(dtype=jnp.float64)
  losses = jax.jit(lambda batch: tiny.gradients.per_example_losses(t.objective, t.sub, t.frozen, batch))
  padded = losses(t.batch)
  for row in (0, 2):
    roles = tiny.ROLES[row]
    tight = losses(tiny.make_batch(t.config, [row], len(roles), roles.count("r"), size=1))
    np.testing.assert_allclose(padded[row], tight[0], rtol=1e-10, atol=0)


# --- The head in chunks. ----------------------------------------------------------------------------------------------


def head_derivatives(z, dz, matrix, target):
  """Value, gradient, jvp and the product of the Hessian with dz, of a weighted sum of token losses."""
  weight = jnp.arange(1.0, len(target) + 1).astype(z.dtype)
  total = lambda z: jnp.sum(weight * token_nll(z, matrix, target))  # noqa: E731
  jvp = jax.jvp(lambda z: token_nll(z, matrix, target), (z,), (dz,))[1]
  return total(z), jax.grad(total)(z), jvp, jax.jvp(jax.grad(total), (z,), (dz,))[1]


@pytest.mark.parametrize("chunk", [1, 4, 7, 19])
def test_the_head_in_chunks_is_the_head_in_one(chunk, monkeypatch, x64):
  rng = np.random.default_rng(3)
  z, dz, matrix = rng.standard_normal((19, 6)), rng.standard_normal((19, 6)), rng.standard_normal((23, 6))
  target = rng.integers(0, 23, 19).astype(np.int32)
  logits = z @ matrix.T
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  slope = (p - np.eye(23)[target]) @ matrix
  weight = np.arange(1.0, 20.0)
  moved = p * (dz @ matrix.T)
  product = (moved - p * moved.sum(-1, keepdims=True)) @ matrix
  wanted = (
    weight @ -np.log(p[np.arange(19), target]),
    weight[:, None] * slope,
    (slope * dz).sum(-1),
    weight[:, None] * product,
  )
  monkeypatch.setattr(objective, "HEAD_CHUNK", chunk)
  found = jax.jit(lambda *args: head_derivatives(*args))(z, dz, matrix, target)
  for got, want in zip(found, wanted, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)
  if chunk == 7:  # the rule under vmap: each mapped element has chunks of its own
    batched = jax.vmap(head_derivatives, in_axes=(0, 0, None, 0))(
      *(np.stack([a, a[::-1]]) for a in (z, dz)), matrix, np.stack([target, target[::-1]])
    )
    for got, want in zip(batched, found, strict=True):
      np.testing.assert_allclose(got[0], want, rtol=1e-11, atol=1e-12)


def test_no_array_of_all_logits_lives_outside_a_chunk(monkeypatch):
  monkeypatch.setattr(objective, "HEAD_CHUNK", 8)
  z, target = jnp.ones((64, 6)), jnp.zeros(64, jnp.int32)
  matrix = jnp.ones((1024, 6))
  value_and_slope = jax.value_and_grad(lambda z: jnp.sum(token_nll(z, matrix, target)))
  memory = jax.jit(value_and_slope).lower(z).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 64 * 1024 * 4  # one [64, V] array; a chunk needs an eighth of it, a few times


# --- Half precision. --------------------------------------------------------------------------------------------------


def test_bfloat16_weights_reduce_in_float32():
  wide = tiny.make_tiny("2,3", "all,embed", jnp.float32, tiny.make_config(attention_bias=True, tie_embeddings=False))
  narrow = tiny.make_tiny("2,3", "all,embed", jnp.bfloat16, wide.config)
  assert narrow.objective.outputs(narrow.sub, narrow.frozen, narrow.batch).dtype == jnp.bfloat16
  losses = [tiny.gradients.per_example_losses(t.objective, t.sub, t.frozen, t.batch) for t in (wide, narrow)]
  assert losses[1].dtype == jnp.float32
  np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)
  assert decoder.logits(narrow.config, narrow.params, narrow.batch.tokens).dtype == jnp.float32


def equations(jaxpr):
  """All equations of a jaxpr, those inside loops and calls too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from equations(inner)


def test_bfloat16_sums_over_positions_are_added_up_in_float32():
  # Read off the program: this CPU widens half-precision sums by itself, another machine need not.
  config = tiny.make_config(attention_bias=True, tie_embeddings=False)
  t = tiny.make_tiny("2,3", "all,embed,final_norm", jnp.bfloat16, config)
  program = jax.make_jaxpr(lambda s: tiny.gradients.sum_gradient(t.objective, s, t.frozen, t.batch))(t.sub)
  sums = [e for e in equations(program.jaxpr) if e.primitive.name in ("reduce_sum", "scatter-add", "cumsum")]
  assert len(sums) > 10
  narrow = [e for e in sums if e.invars[0].aval.dtype == jnp.bfloat16]
  # The one exception adds nothing up: the hidden states' cotangent, where each response slot has a place of its own.
  hidden = (tiny.SIZE, tiny.NUM_TOKENS, config.hidden_size)
  flat = (1, tiny.SIZE * tiny.NUM_TOKENS, config.hidden_size)
  assert [e for e in narrow if e.primitive.name != "scatter-add" or e.outvars[0].aval.shape not in (hidden, flat)] == []


@pytest.mark.parametrize(
  ("layers", "groups"),
  [("last:2", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("last:2", 1), ("all", 1), ("all", 2)))],
)
def test_flat_response_slots_change_nothing(layers, groups):
  """Computing only the filled response slots gives the losses, gradients and products of computing all of them."""
  config = decoder.ModelConfig(61, 16, 24, 3, 4, 2, 4)
  params = decoder.init_params(config, jax.random.key(0))
  tree = subtree.make_subtree(params, layers, "all")
  sub, frozen = subtree.split(params, tree)
  objective = make_objective(config, tree)
  rng = np.random.default_rng(0)
  lengths, answers = rng.integers(4, 12, 6), rng.integers(0, 4, 6)
  tokens = [rng.integers(0, 61, n).astype(np.int32) for n in lengths]
  masks = [np.arange(n) >= n - a for n, a in zip(lengths, answers, strict=True)]
  dataset = types.SimpleNamespace(tokens=tokens, response_mask=masks, ids=tuple("abcdef"))
  batcher = batches.Batcher(dataset, [batches.Shape(12, 4)], multiple_of=groups)
  flat = batcher.batch(range(6), batcher.shapes[0], 8, num_slots=24 // groups)
  assert flat.slots.shape[0] == groups and flat.slots.size < flat.target.size
  plain = flat._replace(slots=None)
  v = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(3), leaf.shape), sub)
  plain_ones = gradients.per_example_losses, gradients.sum_gradient, gradients.per_example_gradients
  along = tiny.jvp_scores, gradients.ggn_product, gradients.fisher_product, gradients.hessian_product

  @jax.jit
  def derivatives(sub, frozen, batch, v):
    args = objective, sub, frozen, batch
    return [fn(*args) for fn in plain_ones] + [fn(*args, v) for fn in along]

  got, want = derivatives(sub, frozen, flat, v), derivatives(sub, frozen, plain, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), got, want)


@pytest.mark.slow
def test_adapter_gradients_are_the_per_example_gradients():
  config = decoder.ModelConfig(61, 16, 24, 3, 4, 2, 4)
  params = adapters.add_sketch(decoder.init_params(config, jax.random.key(0)), 5, jax.random.key(1))
  tree = subtree.make_subtree(params, "last:2", "sketch")
  sub, frozen = subtree.split(params, tree)
  objective = make_objective(config, tree)
  rng = np.random.default_rng(1)
  tokens = [rng.integers(0, 61, 9).astype(np.int32) for _ in range(3)]
  masks = [np.arange(9) >= 9 - n for n in (2, 0, 4)]
  dataset = types.SimpleNamespace(tokens=tokens, response_mask=masks, ids=("a", "b", "c"))
  batch = batches.Batcher(dataset, [batches.Shape(10, 4)]).batch(range(3), batches.Shape(10, 4), 4)
  got = gradients.adapter_gradients(objective, sub, frozen, batch)
  want = gradients.per_example_gradients(objective, sub, frozen, batch)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), got, want)
  assert all(float(abs(leaf[1]).max()) == 0 and float(abs(leaf[0]).max()) > 0 for leaf in jax.tree.leaves(got))
