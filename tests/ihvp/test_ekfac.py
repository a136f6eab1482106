"""EK-FAC against dense Fisher matrices in float64, and against everything that must not change it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax import gradients
from in2core_jax.data import batches
from in2core_jax.errors import UserError
from in2core_jax.ihvp import ekfac, ekfac_store, solvers, tree_math
from in2core_jax.model import decoder
from in2core_jax.model.objective import sample_labels_fn
from in2core_jax.params import moment_probes

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(5)
FISHER = ekfac.EkfacSettings(curvature="fisher")
KERNEL = "layers/mlp/up_proj/kernel"


# --- a softmax regression, y = x W: one token, one matrix -----------------------------------------------------------


class Rows(NamedTuple):
  x: Any
  label: Any
  valid: Any


def softmax_outputs(sub, frozen, batch):
  y = batch.x @ sub["kernel"]
  return moment_probes.observe(batch.x, y, sub["kernel_probe"]) if "kernel_probe" in sub else y


def softmax_losses(z, frozen, batch):
  picked = jnp.take_along_axis(z, batch.label[:, None], axis=1)[:, 0]
  return (jax.nn.logsumexp(z, axis=1) - picked) * batch.valid


SOFTMAX = gradients.Objective(softmax_outputs, softmax_losses)


def every_label(inputs=7, size=4, labels=3):
  """Each input once with each label: at W = 0 the empirical Fisher is the true one, and exactly a Kronecker product."""
  x = np.random.default_rng(0).normal(size=(inputs, size))
  label = np.tile(np.arange(labels), inputs)
  return Rows(jnp.asarray(np.repeat(x, labels, axis=0)), jnp.asarray(label), jnp.ones(len(label)))


def softmax_source(batch, kernel=None):
  sub = {"kernel": jnp.zeros((4, 3)) if kernel is None else jnp.asarray(kernel)}
  return ekfac.Source(SOFTMAX, sub, {}, lambda: iter([(np.arange(len(batch.valid)), batch)]))


# --- the tiny decoder -------------------------------------------------------------------------------------------------


def make_tiny(modules="all", layers="1,2", **extra):
  return tiny.make_tiny(layers, modules, jnp.float64, config=tiny.smaller_config(), **extra)


def tiny_source(t, cuts=(range(6),), sizes=(tiny.SIZE,), pad_id=0):
  """The tiny examples, cut into batches."""

  def stream():
    for rows, size in zip(cuts, sizes, strict=True):
      batch = tiny.make_batch(t.config, rows, size=size, pad_id=pad_id)
      yield np.asarray(rows), batch if len(cuts) == 1 else batch._replace(slots=None)  # one shape for all parts

  return ekfac.Source(t.objective, t.sub, t.frozen, stream, sample_labels_fn(t.config, t.subtree))


@functools.cache
def fisher_fit():
  """The whole subtree fitted to the labels of the data; shared, since nothing changes it."""
  t = make_tiny()
  return t, ekfac.fit(tiny_source(t), KEY, FISHER)


def example_gradients(t):
  """g_i of the tiny examples by a loop of `jax.grad`, leaf path -> [6, ...]."""
  batch = t.batch._replace(slots=None)
  grad = jax.jit(jax.grad(lambda s, one: jnp.sum(gradients.per_example_losses(t.objective, s, t.frozen, one))))
  rows = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch) for i in range(6)]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[grad(t.sub, one) for one in rows])
  return traverse_util.flatten_dict(stacked, sep="/")


def dense_ggn(t, batch):
  product = gradients.over_queries(gradients.ggn_product)
  curvature = solvers.Curvature(
    lambda context, batch, v: product(t.objective, *context, batch, v),
    lambda batch: jnp.sum(batch.valid),
    (t.sub, t.frozen),
  )
  return solvers.dense_matrix(solvers.fixed_matvec(curvature, [batch]), tiny.direction(t.sub, queries=1))


def flat_rows(g):
  return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(g)], axis=1)


def assert_same_fit(found, wanted, rtol):
  """Equal as operators: eigenvectors have free signs."""
  assert set(found.factors) == set(wanted.factors) and set(found.diagonals) == set(wanted.diagonals)
  for path, values in wanted.diagonals.items():
    np.testing.assert_allclose(found.diagonals[path], values, rtol=rtol, atol=rtol * values.max())
  for path, factor in wanted.factors.items():
    other = found.factors[path]
    np.testing.assert_allclose(other.values, factor.values, rtol=rtol, atol=rtol * factor.values.max())
    np.testing.assert_allclose(np.abs(other.left), np.abs(factor.left), atol=100 * rtol)


# --- oracles ----------------------------------------------------------------------------------------------------------


def kronecker(fitted):
  """The same factors without eigenvalue correction, lambda = diag(A) diag(S)^T: plain K-FAC, to compare with."""
  plain = {
    path: dataclasses.replace(factor, values=factor.left_values[..., :, None] * factor.right_values[..., None, :])
    for path, factor in fitted.factors.items()
  }
  return dataclasses.replace(fitted, factors=plain)


@pytest.mark.parametrize("eigen_dtype", ["float64", "float32"])
def test_equals_the_dense_inverse_where_the_fisher_is_a_kronecker_product(eigen_dtype):
  batch = every_label()
  settings = dataclasses.replace(FISHER, matrices="kernel", eigen_dtype=eigen_dtype)
  fitted = ekfac.fit(softmax_source(batch), KEY, settings)
  g = np.asarray(jax.vmap(lambda x, y: jnp.outer(x, 1 / 3 - jax.nn.one_hot(y, 3)))(batch.x, batch.label)).reshape(
    -1, 12
  )
  fisher = g.T @ g / len(g)
  v = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4, 3)))
  for damping in (1e-3, 1e-1, 10.0):
    result = ekfac.ekfac({"kernel": v}, fitted, damping=damping)
    wanted = np.linalg.solve(fisher + damping * np.eye(12), np.asarray(v).reshape(5, 12).T).T.reshape(5, 4, 3)
    tolerance = 1e-8 if eigen_dtype == "float64" else 1e-4  # the device's eigenvectors are orthogonal to f32 rounding
    np.testing.assert_allclose(result.solution["kernel"], wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
  np.testing.assert_allclose(kronecker(fitted).factors["kernel"].values, fitted.factors["kernel"].values, atol=1e-6)


def test_values_are_the_dense_fishers_diagonal_in_the_eigenbasis():
  """Every leaf of the subtree: lambda = diag(U^T F U), U = U_A kron U_S, with F from a loop of `jax.grad`."""
  t, fitted = fisher_fit()
  wanted = example_gradients(t)
  assert set(fitted.factors) == {path for path in wanted if path.endswith("kernel")} and len(fitted.factors) == 7
  assert set(fitted.diagonals) == {path for path in wanted if path.endswith("scale")} and len(fitted.diagonals) == 2
  assert fitted.info["examples"] == 6  # the one without response counts, the two padding rows do not
  for path, factor in fitted.factors.items():
    for layer in range(2):
      g = wanted[path][:, layer].reshape(6, -1)
      basis = np.kron(factor.left[layer], factor.right[layer])
      np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-12)
      diagonal = np.diag(basis.T @ (g.T @ g / 6) @ basis).reshape(factor.values.shape[1:])
      np.testing.assert_allclose(factor.values[layer], diagonal, rtol=1e-8, atol=1e-8 * diagonal.max())
  for path, values in fitted.diagonals.items():
    np.testing.assert_allclose(values, np.mean(wanted[path] ** 2, axis=0), rtol=1e-8)


def test_factors_are_the_covariances_of_inputs_and_output_gradients():
  """Of the lowest chosen v_proj's inputs and the last down_proj's output gradients, both written out by hand."""
  t, fitted = fisher_fit()
  fitted = fitted.factors
  batch = t.batch._replace(slots=None)
  below = decoder.run_below(t.config, t.subtree, t.frozen, batch.tokens)
  norm = {"params": {"scale": t.params["layers"]["attention_norm"]["scale"][1]}}
  inputs = np.asarray(decoder.Norm(t.config.rms_eps).apply(norm, below))
  last = [max(i for i, role in enumerate(roles) if role == "r") if "r" in roles else 0 for roles in tiny.ROLES]
  tokens = np.concatenate([inputs[i, : last[i]] for i in range(6)])  # the last response token is predicted one before
  assert len(tokens) == 6 + 9 + 4 + 0 + 8 + 6
  value = fitted["layers/attention/v_proj/kernel"]
  rebuilt = (value.left[0] * value.left_values[0]) @ value.left[0].T
  np.testing.assert_allclose(rebuilt, tokens.T @ tokens / len(tokens), atol=1e-12)

  top = decoder.run_above(t.config, t.subtree, t.sub, t.frozen, below)

  def loss(h):
    hidden = decoder.Norm(t.config.rms_eps).apply({"params": t.params["final_norm"]}, h)
    nll = -jax.nn.log_softmax(hidden @ t.params["embed"]["embedding"].T)
    rows = np.arange(tiny.SIZE)[:, None]
    return jnp.sum(nll[rows, batch.position, batch.target] * batch.weight)

  g = np.asarray(jax.grad(loss)(top)).reshape(-1, t.config.hidden_size)
  down = fitted["layers/mlp/down_proj/kernel"]
  np.testing.assert_allclose((down.right[1] * down.right_values[1]) @ down.right[1].T, g.T @ g / 6, atol=1e-12)


@pytest.mark.slow
def test_lora_and_sketch_matrices_are_fitted_like_kernels():
  t = make_tiny("lora,sketch", lora=2, sketch=3)
  fitted = ekfac.fit(tiny_source(t), KEY, FISHER)
  wanted = example_gradients(t)
  assert len(fitted.factors) == 21 and not fitted.diagonals
  for path, factor in fitted.factors.items():
    rotated = np.einsum("kia,nkij,kjb->nkab", factor.left, wanted[path], factor.right)
    np.testing.assert_allclose(factor.values, np.mean(rotated**2, axis=0), rtol=1e-8, atol=1e-20)


@pytest.mark.slow
def test_closer_to_the_dense_inverse_than_kfac_and_identity():
  """More examples than parameters of a matrix, as in use; right-hand sides are gradients, dampings 0.1 and 0.01."""
  t = make_tiny("mlp", layers="2")
  rng, size = np.random.default_rng(4), 96
  tokens, target = rng.integers(0, 11, (size, 6)).astype(np.int32), rng.integers(0, 11, (size, 3)).astype(np.int32)
  position = np.tile(np.arange(2, 5, dtype=np.int32), (size, 1))
  weight = np.full((size, 3), 1 / 3, np.float32)
  batch = batches.Batch(tokens, None, position, target, weight, np.ones(size, np.float32))
  source = dataclasses.replace(tiny_source(t), stream=lambda: iter([(np.arange(size), batch)]))
  fitted = ekfac.fit(source, KEY)
  fits = {
    "ekfac": fitted,
    "kfac": kronecker(fitted),
    "diagonal": ekfac.fit(source, KEY, ekfac.EkfacSettings(matrices=None)),
  }
  dense = dense_ggn(t, batch)
  few = jax.tree.map(lambda leaf: leaf[:8], batch)
  v = gradients.per_example_gradients(t.objective, t.sub, t.frozen, few)
  for ratio in (0.1, 0.01):
    damping = ratio * np.linalg.eigvalsh(dense)[-1]
    wanted = np.linalg.solve(dense + damping * np.eye(len(dense)), tree_math.ravel(v).T).T
    found = {name: ekfac.ekfac(v, fit, damping).solution for name, fit in fits.items()}
    found["identity"] = tree_math.scaled(1 / damping, v)
    error = {name: np.linalg.norm(tree_math.ravel(x) - wanted) / np.linalg.norm(wanted) for name, x in found.items()}
    assert error["ekfac"] < 0.9 * error["kfac"], (ratio, error)
    assert error["ekfac"] < 0.6 * error["identity"], (ratio, error)
    if ratio == 0.1:  # at 0.01 either is far from the inverse: the blocks between matrices count
      assert error["ekfac"] < 0.95 * error["diagonal"], error


# --- what must not change it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", [pytest.param("ggn", marks=pytest.mark.slow), "fisher"])
def test_does_not_depend_on_the_cut_into_batches_nor_on_padding(curvature):
  t = make_tiny()
  settings = ekfac.EkfacSettings(curvature=curvature, microbatch=3)
  wanted = ekfac.fit(tiny_source(t), KEY, settings)
  cuts, sizes = ([3, 0, 4], [5], [1, 2]), (3, 3, 3)  # the first has no padding row, and no whole number of microbatches
  found = ekfac.fit(tiny_source(t, cuts, sizes, pad_id=7), KEY, dataclasses.replace(settings, microbatch=2))
  assert found.info["examples"] == wanted.info["examples"] == 6
  assert found.lambda_max == pytest.approx(wanted.lambda_max, rel=1e-10)
  assert_same_fit(found, wanted, 1e-9)


def test_damping_is_absolute_and_the_ratio_relative_to_the_largest_value():
  t, fitted = fisher_fit()
  peak = max(float(f.values.max()) for f in fitted.factors.values())
  peak = max([peak, *(float(d.max()) for d in fitted.diagonals.values())])
  assert fitted.lambda_max == pytest.approx(peak, rel=1e-12)
  factor = fitted.factors[KERNEL]
  # An eigenvector's answer is itself over lambda + damping, whatever the scale of the curvature.
  v = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape)), t.sub)
  v["layers"]["mlp"]["up_proj"]["kernel"] = (
    v["layers"]["mlp"]["up_proj"]["kernel"].at[0, 1].set(jnp.outer(factor.left[1, :, -1], factor.right[1, :, -1]))
  )
  for options, damping in (({"damping": 0.3}, 0.3), ({"damping_ratio": 0.5}, 0.5 * peak)):
    result = ekfac.ekfac(v, fitted, **options)
    assert result.info["damping"] == pytest.approx(damping, rel=1e-12)
    wanted = jax.tree.map(lambda leaf, d=damping: leaf / (factor.values[1, -1, -1] + d), v)
    tiny.assert_trees_close(result.solution, wanted, 1e-10)
  norms = v["layers"]["mlp_norm"] = {"scale": jnp.ones((1, 2, 6))}
  solved = ekfac.ekfac(v, fitted, damping=0.3).solution["layers"]["mlp_norm"]["scale"]
  np.testing.assert_allclose(solved, norms["scale"] / (fitted.diagonals["layers/mlp_norm/scale"] + 0.3), rtol=1e-12)


def test_symmetric_and_positive_definite():
  t, fitted = fisher_fit()
  matrix = solvers.dense_matrix(
    ekfac.preconditioner(fitted, 1e-6 * fitted.lambda_max), tiny.direction(t.sub, queries=1)
  )
  np.testing.assert_allclose(matrix, matrix.T, atol=1e-10 * np.abs(matrix).max())
  eigenvalues = np.linalg.eigvalsh(matrix)
  assert eigenvalues[0] > 0
  assert eigenvalues[-1] <= 1e6 / fitted.lambda_max * (1 + 1e-9)


# --- drawn labels -----------------------------------------------------------------------------------------------------


def test_drawn_labels_make_the_mean_square_the_ggn():
  """mean |U^T g_i|^2 over 4000 draws = the dense Gauss-Newton matrix's diagonal, within five standard errors."""
  t = make_tiny("mlp/up_proj/kernel", layers="2")
  source = tiny_source(t)
  batch = t.batch._replace(slots=None)
  eigenvectors = np.linalg.eigh(dense_ggn(t, t.batch))

  @jax.jit
  @jax.vmap
  def squares(key):
    drawn = source.relabel(t.sub, t.frozen, batch, jax.random.split(key, tiny.SIZE))
    g = gradients.per_example_gradients(t.objective, t.sub, t.frozen, drawn)
    return jnp.sum((flat_rows(g) @ eigenvectors[1]) ** 2, axis=0) / 6  # in eigenvectors of the ggn: no other basis

  found = np.asarray(squares(jax.random.split(KEY, 4000)))
  error = found.std(axis=0) / np.sqrt(len(found))
  wanted = eigenvectors[0]
  assert np.all(np.abs(found.mean(axis=0) - wanted) < 5 * error + 1e-12)
  assert found.sum(axis=1).mean() == pytest.approx(wanted.sum(), rel=0.05)


def test_several_draws_are_averaged():
  """The sum of lambda is mean |G_i|^2 in any basis: of three draws, the mean of the three alone."""
  t = make_tiny("mlp/up_proj/kernel", layers="2")
  source = tiny_source(t)
  fitted = ekfac.fit(source, KEY, ekfac.EkfacSettings(draws=3))
  assert fitted.info["examples"] == 6 and fitted.info["draws"] == 3

  @jax.jit
  def trace(draw):
    keys = jnp.stack([jax.random.fold_in(jax.random.fold_in(KEY, draw), row) for row in [*range(6), 0, 0]])
    drawn = source.relabel(t.sub, t.frozen, t.batch, keys)
    return jnp.sum(flat_rows(gradients.per_example_gradients(t.objective, t.sub, t.frozen, drawn)) ** 2) / 6

  alone = [float(trace(draw)) for draw in range(3)]
  assert float(fitted.factors[KERNEL].values.sum()) == pytest.approx(np.mean(alone), rel=1e-10)
  assert np.ptp(alone) > 0.01 * np.mean(alone)


@pytest.mark.parametrize("modules", ["all", "all,lm_head"])
def test_drawn_labels_follow_the_models_softmax(modules):
  t = make_tiny(modules, seed=3) if "lm_head" not in modules else None
  if t is None:
    t = tiny.make_tiny("1,2", modules, jnp.float64, config=tiny.smaller_config(tie_embeddings=False), seed=3)
  relabel = sample_labels_fn(t.config, t.subtree)
  draw = jax.jit(jax.vmap(lambda key: relabel(t.sub, t.frozen, t.batch, jax.random.split(key, tiny.SIZE)).target))
  labels = np.asarray(draw(jax.random.split(KEY, 4000)))
  logits = decoder.logits(t.config, t.params, t.batch.tokens)
  for row, slot in ((0, 0), (4, 7), (5, 1)):
    p = np.asarray(jax.nn.softmax(logits[row, t.batch.position[row, slot]]))
    seen = np.bincount(labels[:, row, slot], minlength=t.config.vocab_size) / 4000
    assert np.all(np.abs(seen - p) < 5 * np.sqrt(p * (1 - p) / 4000) + 1e-12)
  both = np.mean(labels[:, 0, 0] == labels[:, 0, 1])  # slots are drawn apart
  q = [np.asarray(jax.nn.softmax(logits[0, t.batch.position[0, slot]])) for slot in (0, 1)]
  assert abs(both - q[0] @ q[1]) < 0.04
  batch = relabel(t.sub, t.frozen, t.batch, jax.random.split(KEY, tiny.SIZE))
  np.testing.assert_allclose(batch.weight**2, t.batch.weight, rtol=1e-6)


def test_labels_come_from_the_key_and_a_fit_repeats_bit_for_bit():
  t = make_tiny("mlp/up_proj/kernel", layers="2")
  first, again = (ekfac.fit(tiny_source(t), KEY) for _ in range(2))
  tiny.assert_trees_equal(first.factors, again.factors)
  other = ekfac.fit(tiny_source(t), jax.random.key(6))
  assert not np.allclose(other.factors[KERNEL].values, first.factors[KERNEL].values, rtol=1e-3)


# --- preconditioners --------------------------------------------------------------------------------------------------


def badly_scaled():
  """Softmax regression, inputs of scales 1 to 1000 turned in pairs: the diagonal helps, the eigenbasis helps more."""
  rng = np.random.default_rng(2)
  x = rng.normal(size=(200, 8)) * np.logspace(-1.5, 1.5, 8)
  turn = np.linalg.qr(rng.normal(size=(2, 2)))[0]
  x = np.concatenate([x[:, i : i + 2] @ turn for i in range(0, 8, 2)], axis=1)
  kernel = rng.normal(size=(8, 5)) * 0.05
  p = np.exp(x @ kernel)
  label = [rng.choice(5, p=row / row.sum()) for row in p]
  return Rows(jnp.asarray(x), jnp.asarray(label), jnp.ones(200)), kernel


def test_as_preconditioner_of_cg_steps_drop():
  batch, kernel = badly_scaled()
  source = softmax_source(batch, kernel)
  settings = dataclasses.replace(FISHER, matrices="kernel")
  product = gradients.over_queries(gradients.ggn_product)
  curvature = solvers.Curvature(
    lambda context, batch, v: product(SOFTMAX, context, {}, batch, v), lambda batch: batch.valid.sum(), source.sub
  )
  matvec = solvers.fixed_matvec(curvature, [batch])
  v = {"kernel": jnp.asarray(np.random.default_rng(3).normal(size=(2, 8, 5)))}
  damping = 1e-3
  fits = {
    "none": None,
    "diagonal": ekfac.preconditioner(ekfac.fit(source, KEY, dataclasses.replace(settings, matrices=None)), damping),
    "ekfac": ekfac.preconditioner(ekfac.fit(source, KEY, settings), damping),
  }
  options = solvers.CgSettings(damping=damping, tol=1e-8)
  results = {name: solvers.cg(matvec, v, options, precondition=fitted) for name, fitted in fits.items()}
  assert all(result.info["converged"] for result in results.values())
  for result in results.values():
    tiny.assert_trees_close(result.solution, results["none"].solution, 1e-4)
  steps = {name: result.steps for name, result in results.items()}
  assert steps["diagonal"] <= 0.7 * steps["none"], steps
  assert steps["ekfac"] <= 0.3 * steps["none"], steps


# --- files ------------------------------------------------------------------------------------------------------------


def test_saved_and_read_again_is_identical(tmp_path):
  t, fitted = fisher_fit()
  source = tiny_source(t)
  identity = ekfac_store.identity_of(source, KEY, ekfac.EkfacSettings(), {"ids": ["a", "b"]})
  ekfac_store.save(tmp_path / "fit.ekfac", fitted, identity)
  read = ekfac_store.load(tmp_path / "fit.ekfac", identity)
  assert read.info == fitted.info
  tiny.assert_trees_equal((read.factors, read.diagonals), (fitted.factors, fitted.diagonals))
  v = tiny.direction(t.sub, queries=2)
  tiny.assert_trees_equal(ekfac.ekfac(v, read, 0.1).solution, ekfac.ekfac(v, fitted, 0.1).solution)
  ekfac_store.save(tmp_path / "again.ekfac", read, identity)
  assert (tmp_path / "again.ekfac").read_bytes() == (tmp_path / "fit.ekfac").read_bytes()


def test_a_file_of_another_fit_or_a_damaged_one_is_refused(tmp_path):
  t = make_tiny("mlp/up_proj/kernel", layers="2")
  source, settings, data = tiny_source(t), ekfac.EkfacSettings(), {"ids": ["a", "b"]}
  identity = ekfac_store.identity_of(source, KEY, settings, data)
  moved = jax.tree.map(lambda leaf: leaf.at[0].add(1e-12), t.sub)
  others = {
    ekfac_store.identity_of(dataclasses.replace(source, sub=moved), KEY, settings, data),
    ekfac_store.identity_of(source, jax.random.key(6), settings, data),
    ekfac_store.identity_of(source, KEY, dataclasses.replace(settings, draws=2), data),
    ekfac_store.identity_of(source, KEY, settings, {"ids": ["a", "c"]}),
  }
  assert len(others | {identity}) == 5
  assert ekfac_store.identity_of(tiny_source(t), KEY, settings, dict(data)) == identity
  path = tmp_path / "fit.ekfac"
  ekfac_store.save(path, ekfac.fit(source, KEY), identity)
  for other in others:
    with pytest.raises(UserError, match="fitted from other weights"):
      ekfac_store.load(path, other)
  content = path.read_bytes()
  for damaged in (content[: len(content) // 2], content[:700] + b"\x00\x01\x02\x03" + content[704:], b"text"):
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="no readable EK-FAC file"):
      ekfac_store.load(path, identity)


@pytest.mark.parametrize(
  ("dtype", "rtol"), [pytest.param(jnp.float32, 1e-4, marks=pytest.mark.slow), (jnp.bfloat16, 0.1)]
)
def test_narrow_weights_have_factors_in_single_precision(dtype, rtol):
  _, wanted = fisher_fit()
  config = tiny.smaller_config()
  t = tiny.make_tiny("1,2", "all", dtype, config=config)
  fitted = ekfac.fit(tiny_source(t), KEY, FISHER)
  assert {leaf.dtype for leaf in jax.tree.leaves((fitted.factors, fitted.diagonals))} == {jnp.dtype(jnp.float32)}
  for path, factor in fitted.factors.items():  # the sum of lambda does not depend on the basis
    total, other = (np.asarray(f.values, np.float64).sum(axis=(1, 2)) for f in (factor, wanted.factors[path]))
    np.testing.assert_allclose(total, other, rtol=rtol)
  solution = ekfac.ekfac(tiny.direction(t.sub, queries=2), fitted, 0.1).solution
  assert all(leaf.dtype == jnp.float32 and bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(solution))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_nan_is_refused_in_weights_and_in_the_right_hand_side():
  t, fitted = fisher_fit()
  source = tiny_source(t)
  broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), t.sub)
  for matrices in (ekfac.MATRICES, None):
    with pytest.raises(solvers.DivergenceError, match="layers/.* holds NaN"):
      ekfac.fit(dataclasses.replace(source, sub=broken), KEY, dataclasses.replace(FISHER, matrices=matrices))
  v = tiny.direction(t.sub, queries=2)
  v["layers"]["mlp_norm"]["scale"] = v["layers"]["mlp_norm"]["scale"].at[1, 0, 0].set(jnp.nan)
  with pytest.raises(solvers.DivergenceError, match="right-hand side holds NaN"):
    ekfac.ekfac(v, fitted, 0.1)


def test_mistakes_are_told():
  t = make_tiny("mlp/up_proj/kernel", layers="2")
  source = tiny_source(t)
  fitted = ekfac.fit(source, KEY, FISHER)
  v = tiny.direction(t.sub, queries=1)
  for options in ({}, {"damping": 0.0}, {"damping": -1.0}, {"damping": 1.0, "damping_ratio": 0.1}):
    with pytest.raises(UserError, match="damping"):
      ekfac.ekfac(v, fitted, **options)
  with pytest.raises(UserError, match="another subtree: at layers/mlp/up_proj/kernel"):
    ekfac.ekfac(jax.tree.map(lambda leaf: leaf[..., :1], v), fitted, 0.1)
  with pytest.raises(UserError, match="give Source.relabel"):
    ekfac.fit(dataclasses.replace(source, relabel=None), KEY)
  with pytest.raises(UserError, match="got no example"):
    ekfac.fit(dataclasses.replace(source, stream=lambda: iter(())), KEY)
  with pytest.raises(UserError, match="no token of the loss reaches"):
    ekfac.fit(tiny_source(t, ([tiny.NO_RESPONSE],), (2,)), KEY)
  with pytest.raises(UserError, match="no matrix of the subtree matches"):
    ekfac.fit(source, KEY, ekfac.EkfacSettings(matrices="nothing"))
  for wrong in ({"curvature": "hessian"}, {"draws": 0}, {"draws": 2, "curvature": "fisher"}, {"eigen_dtype": "f16"}):
    with pytest.raises(UserError, match="EK-FAC with"):
      ekfac.EkfacSettings(**wrong)
