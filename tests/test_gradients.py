"""Derivatives over a subtree against plain `jax.grad`, dense matrices and each other (method.md section 6)."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax import gradients
from in2core_jax.model import decoder, objective
from in2core_jax.model.objective import make_objective
from in2core_jax.params import subtree

TOLERANCE = {jnp.float32: 1e-5, jnp.float64: 1e-10}


@pytest.fixture(params=[jnp.float32, jnp.float64], ids=["f32", "f64"])
def dtype(request):
  """Both precisions, with 64-bit types switched on for the second one only."""
  with jax.enable_x64(request.param == jnp.float64):
    yield request.param


# Double precision is the stricter one: where either compiles for long, the other is for the slow tier.
single_is_slow = pytest.mark.parametrize(
  "dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.float64], ids=["f32", "f64"], indirect=True
)


def jitted(fn, objective, **static):
  """A derivative of `gradients` as a compiled function of arrays only."""
  return jax.jit(functools.partial(fn, objective, **static))


def whole_loss_gradients(t):
  """The oracle: a Python loop of `jax.grad` of the plain loss of the whole model, one example at a time."""
  grad = jax.jit(jax.grad(lambda params, one: tiny.plain_losses(t.config, params, one)[0]))
  found = []
  for row in range(len(tiny.ROLES)):
    one = tiny.make_batch(t.config, [row], 11, 8, size=1, pad_id=row)  # less padding than in the batch, other ids
    found.append(subtree.split(grad(t.params, one), t.subtree)[0])
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


@pytest.mark.parametrize(
  ("layers", "modules", "changes", "extra"),
  [
    pytest.param("0,3,4", "all,final_norm", {"attention_bias": True}, {}, marks=pytest.mark.slow),
    ("3", "lora,embed", {}, {"lora": 2}),
    ("2,3", "mlp,embed,lm_head", {"tie_embeddings": False, "sliding_window": 4}, {}),
    pytest.param("1,3", "all,embed", tiny.GEMMA3, {}, marks=pytest.mark.slow),
  ],
  ids=["not contiguous", "lora and tied embedding", "untied head", "gemma 3"],
)
def test_per_example_gradients_are_a_loop_of_grad(layers, modules, changes, extra, x64):
  t = tiny.make_tiny(layers, modules, jnp.float64, tiny.make_config(**changes), **extra)
  wanted = whole_loss_gradients(t)
  count = len(tiny.ROLES)

  @jax.jit
  def measure(*args):
    return gradients.per_example_gradients(t.objective, *args), gradients.sum_gradient(t.objective, *args)

  found, total = measure(t.sub, t.frozen, t.batch)
  tiny.assert_trees_close(jax.tree.map(lambda leaf: leaf[:count], found), wanted, 1e-10)
  for leaf in jax.tree.leaves(found):
    assert not np.any(leaf[count:])  # padding rows
    assert not np.any(leaf[tiny.NO_RESPONSE])
  tiny.assert_trees_close(total, jax.tree.map(lambda leaf: leaf.sum(0), wanted), 1e-10)


def test_per_example_gradients_for_any_order_and_padding(dtype):
  t = tiny.make_tiny("2", "mlp", dtype, tiny.make_config(num_layers=4))
  wanted = whole_loss_gradients(t)
  derivative = jitted(gradients.per_example_gradients, t.objective, microbatch=3)  # divides neither batch
  found = derivative(t.sub, t.frozen, t.batch)
  assert {(leaf.dtype, leaf.shape[0]) for leaf in jax.tree.leaves(found)} == {(jnp.dtype(dtype), tiny.SIZE)}
  tiny.assert_trees_close(jax.tree.map(lambda leaf: leaf[: len(tiny.ROLES)], found), wanted, TOLERANCE[dtype])
  order = [5, 0, 1, 2, 4]
  bucket = tiny.make_batch(t.config, order, 16, 8, size=5, pad_id=9)
  found = derivative(t.sub, t.frozen, bucket)
  tiny.assert_trees_close(found, jax.tree.map(lambda leaf: leaf[np.array(order)], wanted), TOLERANCE[dtype])


def logistic_objective():
  """A model that compiles at once: logistic regression with two leaves, and no output_hvp of its own."""

  def outputs(sub, frozen, batch):
    return batch["x"] @ sub["w"] * frozen + sub["b"]

  def losses(z, frozen, batch):
    return jnp.logaddexp(0, -batch["y"] * z)

  return gradients.Objective(outputs, losses)


@pytest.mark.parametrize("size", [1, 8])
def test_any_microbatch_size_gives_the_closed_form(size, dtype):
  rng, objective = np.random.default_rng(5), logistic_objective()
  x, y = rng.standard_normal((size, 4)), rng.choice([-1.0, 1.0], size)
  w, b, v = rng.standard_normal(4), 0.3, rng.standard_normal((2, 5))
  z = 2.0 * x @ w + b
  slope = -y / (1 + np.exp(y * z))
  rows = np.concatenate([2.0 * x, np.ones((size, 1))], axis=1)  # dz/dsub
  each = slope[:, None] * rows
  put = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)  # noqa: E731
  args = put(({"w": w, "b": b}, 2.0, {"x": x, "y": y}))
  directions = put({"w": v[:, :4], "b": v[:, 4]})
  close = functools.partial(np.testing.assert_allclose, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
  for microbatch in (None, 1, 3, 4, 7, 100):
    found = jitted(gradients.per_example_gradients, objective, microbatch=microbatch)(*args)
    close(np.column_stack([found["w"], found["b"]]), each)
    scores = jitted(gradients.vmap_scores, objective, microbatch=microbatch)(*args, directions)
    close(scores, v @ each.T)
  one = jax.tree.map(lambda leaf: leaf[0], directions)
  close(jitted(tiny.jvp_scores, objective)(*args, one), each @ v[0])
  hessian = (rows * (np.exp(y * z) / (1 + np.exp(y * z)) ** 2)[:, None]).T @ rows
  for name, wanted in {
    "ggn": hessian,
    "hessian": hessian,
    "fisher": each.T @ each,
  }.items():  # z is linear: ggn = hessian
    found = jitted(gradients.over_queries(PRODUCTS[name]), objective)(*args, directions)
    close(np.column_stack([found["w"], found["b"]]), v @ wanted)


@single_is_slow
def test_scores_are_the_same_by_every_path(dtype):
  t = tiny.make_tiny("0,1", "mlp,norms,sketch,final_norm", dtype, tiny.make_config(num_layers=2), sketch=3)
  v = tiny.direction(t.sub, queries=2)
  one = jax.tree.map(lambda leaf: leaf[0], v)

  @jax.jit
  def measure(sub, frozen, batch, v, one):
    args = (t.objective, sub, frozen, batch)
    leaves = gradients.leaf_scores(*args, v, microbatch=3)
    paths = {"jvp": tiny.jvp_scores(*args, one)[None], "vmap": gradients.vmap_scores(*args, v)}
    paths["layers"] = sum(subtree.layer_sums(leaves, t.subtree).values())
    total = gradients.tree_dot(gradients.sum_gradient(*args), one)
    return gradients.per_example_gradients(*args), leaves, paths, total

  each, leaves, paths, total = measure(t.sub, t.frozen, t.batch, v, one)
  flat = matrix_of(each)
  directions = matrix_of(v)
  wanted = directions @ flat.T
  # Relative to the norm product: a dot product of nearly orthogonal vectors has no relative precision of its own.
  scale = np.linalg.norm(directions, axis=1)[:, None] * np.linalg.norm(flat, axis=1)[None] + 1e-300
  assert np.median(np.abs(wanted[:, :3]) / scale[:, :3]) > 1e-3
  for name, found in paths.items():
    found = np.asarray(found, np.float64)
    error = np.abs(found - wanted[: len(found)]) / scale[: len(found)]
    assert error.max() < TOLERANCE[dtype], (name, error)
    assert not np.any(found[:, [tiny.NO_RESPONSE, 6, 7]]), name  # exactly zero
  assert {leaf.shape[:2] for leaf in jax.tree.leaves(leaves)} == {(2, tiny.SIZE)}
  np.testing.assert_allclose(float(total), wanted[0].sum(), atol=TOLERANCE[dtype] * scale[0].sum())


def matrix_of(tree):
  """Leaves [N, ...] side by side as float64 [N, P]."""
  leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
  return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def test_the_gradient_of_a_sketch_is_the_projected_gradient_of_its_kernel(x64):
  config = tiny.make_config(num_layers=3)
  t = tiny.make_tiny("1,2", "sketch", jnp.float64, config, sketch=3)
  found = jitted(gradients.per_example_gradients, t.objective)(t.sub, t.frozen, t.batch)["layers"]
  kernels = subtree.make_subtree(t.params, "1,2", "matrices")
  sub, frozen = subtree.split(t.params, kernels)
  each = jitted(gradients.per_example_gradients, make_objective(t.config, kernels))(sub, frozen, t.batch)["layers"]
  for block, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
    for name in names:
      held = t.params["layers"][block][f"{name}_proj"]
      left, right = (np.asarray(held[side])[[1, 2]] for side in ("left", "right"))
      wanted = np.einsum("kip,nkio,kqo->nkpq", left, each[block][f"{name}_proj"]["kernel"], right)
      np.testing.assert_allclose(found[block][f"{name}_proj"]["core"], wanted, rtol=1e-10, atol=1e-12)
      assert np.abs(wanted).max() > 1e-3


PRODUCTS = {
  "ggn": gradients.ggn_product,
  "fisher": gradients.fisher_product,
  "hessian": gradients.hessian_product,
}


@single_is_slow
def test_the_boundary_cache_changes_nothing(dtype):
  t = tiny.make_tiny("2", "all", dtype, tiny.make_config(num_layers=3))
  hidden = jax.jit(functools.partial(decoder.run_below, t.config, t.subtree))(t.frozen, t.batch.tokens)
  assert hidden.shape == (tiny.SIZE, tiny.NUM_TOKENS, t.config.hidden_size)
  # Tokens of the cached batch are never looked at again, and the layers below the boundary are never run again.
  cached = t.batch._replace(hidden=hidden, tokens=np.zeros_like(t.batch.tokens))
  poisoned = jax.tree.map(lambda leaf: leaf.at[: t.subtree.boundary].set(jnp.nan), t.frozen["layers"])
  broken = t.frozen | {"layers": poisoned}
  v = tiny.direction(t.sub)

  @jax.jit
  def measure(sub, frozen, batch, v):
    losses = gradients.per_example_losses(t.objective, sub, frozen, batch)
    gradient = gradients.sum_gradient(t.objective, sub, frozen, batch)
    return losses, gradient, [product(t.objective, sub, frozen, batch, v) for product in PRODUCTS.values()]

  tiny.assert_trees_close(measure(t.sub, broken, cached, v), measure(t.sub, t.frozen, t.batch, v), TOLERANCE[dtype])


def flat_problem(layers, modules, **changes):
  """A tiny problem in float64 with its logits and losses as functions of the ravelled subtree, by the plain model."""
  config = tiny.smaller_config(**changes)
  t = tiny.make_tiny(layers, modules, jnp.float64, config)
  t = t._replace(batch=tiny.make_batch(config, [0, 1, 2, 3], 11, 5, size=5))
  flat, unravel = ravel_pytree(t.sub)
  rows = np.arange(5)[:, None]

  def logits(x):
    params = subtree.merge(unravel(x), t.frozen, t.subtree)
    return decoder.logits(config, params, t.batch.tokens)[rows, t.batch.position]

  def losses(x):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits(x)), t.batch.target[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * t.batch.weight, axis=-1)

  return t, flat, unravel, logits, losses


def dense_ggn(logits, flat, weight):
  """sum over tokens of weight J^T (diag p - p p^T) J, J the Jacobian of the *logits*: no head, no hidden state."""
  p = np.asarray(jax.nn.softmax(jax.jit(logits)(flat)))
  jacobian = np.asarray(jax.jit(jax.jacfwd(logits))(flat))  # [B, R, V, P]
  inner = np.einsum("brv,vw->brvw", p, np.eye(p.shape[-1])) - np.einsum("brv,brw->brvw", p, p)
  return np.einsum("br,brvp,brvw,brwq->pq", weight, jacobian, inner, jacobian, optimize=True)


def dense_by_products(product, t, unravel, size):
  """The matrix whose columns are the product with each unit vector, all of them as queries at once."""
  basis = jax.vmap(unravel)(jnp.eye(size))
  columns = jitted(gradients.over_queries(product), t.objective)(t.sub, t.frozen, t.batch, basis)
  return np.asarray(jax.vmap(lambda tree: ravel_pytree(tree)[0])(columns)).T


@pytest.mark.parametrize(
  ("layers", "modules", "changes"),
  [
    pytest.param("0,2", "attention/q_proj,mlp/down_proj,norms,final_norm", {}, marks=pytest.mark.slow),
    ("2", "mlp/up_proj,lm_head", {"tie_embeddings": False}),
    pytest.param("1,2", "attention/k_proj,norms", tiny.GEMMA3, marks=pytest.mark.slow),
  ],
  ids=["hidden states as outputs", "logits as outputs", "gemma 3"],
)
def test_products_are_the_columns_of_dense_matrices(layers, modules, changes, x64):
  t, flat, unravel, logits, losses = flat_problem(layers, modules, **changes)
  jacobian = np.asarray(jax.jit(jax.jacrev(losses))(flat))
  wanted = {
    "ggn": dense_ggn(logits, flat, t.batch.weight),
    "fisher": jacobian.T @ jacobian,
    "hessian": np.asarray(jax.jit(jax.hessian(lambda x: jnp.sum(losses(x))))(flat)),
  }
  for name, matrix in wanted.items():
    found = dense_by_products(PRODUCTS[name], t, unravel, len(flat))
    np.testing.assert_allclose(found, matrix, rtol=1e-8, atol=1e-8 * np.abs(matrix).max(), err_msg=name)
  eigenvalues = np.linalg.eigvalsh(wanted["ggn"])
  assert eigenvalues[0] > -1e-10 * eigenvalues[-1]
  assert np.linalg.eigvalsh(wanted["hessian"])[0] < -1e-3  # what the solvers must notice does occur


@pytest.mark.parametrize(
  "outputs",
  [pytest.param(gradients.OUTPUTS_AT_ONCE, marks=pytest.mark.slow), 1, 2000],
  ids=["queries at once", "single", "groups"],
)
def test_the_head_in_chunks_gives_the_same_products(outputs, monkeypatch, x64):
  t, flat, unravel, _, _ = flat_problem("2", "mlp/up_proj")
  whole = {name: dense_by_products(product, t, unravel, len(flat)) for name, product in PRODUCTS.items()}
  monkeypatch.setattr(objective, "HEAD_CHUNK", 7)  # 25 slots: four chunks, the last one filled up
  monkeypatch.setattr(gradients, "OUTPUTS_AT_ONCE", outputs)
  for name, product in PRODUCTS.items():
    found = dense_by_products(product, t, unravel, len(flat))
    np.testing.assert_allclose(found, whole[name], rtol=1e-11, atol=1e-11 * np.abs(whole[name]).max(), err_msg=name)


def test_a_single_query_is_spared_the_batch_dimension(x64):
  t = tiny.make_tiny("2", "mlp", jnp.float64, tiny.smaller_config())
  v = tiny.direction(t.sub, queries=1)
  product = gradients.over_queries(gradients.ggn_product)
  found = jax.jit(product, static_argnums=0)(t.objective, t.sub, t.frozen, t.batch, v)
  two = jax.tree.map(lambda leaf: jnp.concatenate([leaf, -leaf]), v)
  wanted = jax.tree.map(
    lambda leaf: leaf[:1], jax.jit(product, static_argnums=0)(t.objective, t.sub, t.frozen, t.batch, two)
  )
  tiny.assert_trees_close(found, wanted, 1e-12)


def test_silent_rows_add_nothing_to_any_product():
  t = tiny.make_tiny("0", "mlp", config=tiny.make_config(num_layers=2))
  silent = np.isin(np.arange(tiny.SIZE), [tiny.NO_RESPONSE, 6, 7])
  v = tiny.direction(t.sub)

  @jax.jit
  def measure(batch):
    products = [product(t.objective, t.sub, t.frozen, batch, v) for product in PRODUCTS.values()]
    return products, gradients.sum_gradient(t.objective, t.sub, t.frozen, batch)

  only = t.batch._replace(weight=np.where(silent[:, None], t.batch.weight, 0))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(measure(only)))
  other = np.where(silent[:, None], (t.batch.tokens + 5) % 37, t.batch.tokens).astype(np.int32)
  assert np.any(other != t.batch.tokens)
  tiny.assert_trees_equal(measure(t.batch._replace(tokens=other)), measure(t.batch))


@pytest.mark.slow
def test_bfloat16_weights_give_float32_results_near_those_of_float32():
  config = tiny.make_config(attention_bias=True, num_layers=2)
  results = []
  for dtype in (jnp.float32, jnp.bfloat16):
    t = tiny.make_tiny("1", "all,final_norm", dtype, config)
    v = tiny.direction(t.sub, queries=1, dtype=jnp.float32)
    one = jax.tree.map(lambda leaf: leaf[0], v)

    @jax.jit
    def measure(sub, frozen, batch, v, one, objective=t.objective):
      args = (objective, sub, frozen, batch)
      return {
        "losses": gradients.per_example_losses(*args),
        "gradients": gradients.per_example_gradients(*args),
        "jvp": tiny.jvp_scores(*args, one),
        "vmap": gradients.vmap_scores(*args, v),
        "products": [product(*args, one) for product in PRODUCTS.values()],
      }

    results.append(measure(t.sub, t.frozen, t.batch, v, one))
  wide, narrow = results
  assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.float32)}
  for name in wide:
    a, b = (np.asarray(ravel_pytree(result[name])[0], np.float64) for result in (wide, narrow))
    error = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert error < (0.05 if name in ("losses", "gradients") else 0.15), (name, error)  # eight bits of mantissa


def test_a_second_call_with_the_same_shapes_compiles_nothing(caplog):
  t = tiny.make_tiny("3", "mlp")
  v = tiny.direction(t.sub)
  step = jax.jit(tiny.jvp_scores, static_argnums=0)

  def compiled(objective, batch):
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
      jax.block_until_ready(step(objective, t.sub, t.frozen, batch, v))
    return sum("Compiling" in record.getMessage() for record in caplog.records)

  assert compiled(t.objective, t.batch) > 0
  other = tiny.make_batch(t.config, [4, 2, 1, 0, 5, 3], pad_id=3)
  assert compiled(t.objective, other) == 0
  assert compiled(make_objective(t.config, t.subtree), t.batch) == 0  # the same choice, made again
  assert compiled(t.objective, tiny.make_batch(t.config, num_tokens=16)) > 0
  assert step._cache_size() == 2
