"""Algebra that every solver must keep for any matrix, right-hand side and damping: hypothesis looks for exceptions."""

import jax
import jax.numpy as jnp
import lissa_scan
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax.ihvp import solvers, tree_math

SIZE, DEPTH, COUNT = 6, 40, 24
KEY = jax.random.key(3)

seeds = st.integers(0, 2**32 - 1)
dampings = st.floats(-3, 1).map(lambda exponent: 10.0**exponent)
few = settings(deadline=None, max_examples=20)


@pytest.fixture(autouse=True, scope="module")
def double():
  with jax.enable_x64(True):
    yield


def cut(rows):
  rows = jnp.asarray(rows)
  return {"a": rows[:, :2], "b": rows[:, 2:].reshape(-1, 2, 2)}


def row_product(context, batch, v):
  """sum over the valid rows of x x^T v."""
  del context
  flat = jnp.concatenate([v["a"], v["b"].reshape(v["b"].shape[0], -1)], axis=1)
  out = (flat @ batch["x"].T * batch["valid"]) @ batch["x"]
  return {"a": out[:, :2], "b": out[:, 2:].reshape(-1, 2, 2)}


def valid_rows(batch):
  return batch["valid"].sum()


CURVATURE = solvers.Curvature(row_product, valid_rows)


def as_gradients(context, batch):
  del context
  return {"a": batch["x"][:, :2], "b": batch["x"][:, 2:].reshape(-1, 2, 2)}, batch["valid"]


def padded(x):
  return {"x": np.pad(x, ((0, COUNT - len(x)), (0, 0))), "valid": (np.arange(COUNT) < len(x)).astype(np.float64)}


def problem(seed):
  """Rows whose second-moment matrix has a condition number up to about 1e6, and three queries."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(COUNT, SIZE)) * 10 ** rng.uniform(-3, 0, SIZE)
  return x, x.T @ x / COUNT, rng.normal(size=(3, SIZE))


def solve(name, x, v, damping):
  """One of the solvers that are linear maps of v: truncated ones too, when the number of steps is fixed."""
  matvec = solvers.fixed_matvec(CURVATURE, [padded(x)])
  scale = 1.2 * (float(np.linalg.eigvalsh(x.T @ x / COUNT)[-1]) + damping)
  if name in ("none", "momentum", "chebyshev"):
    batches = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (DEPTH, *leaf.shape)), padded(x))
    options = solvers.LissaSettings(damping, scale, acceleration=name)
    solution = lissa_scan.lissa_scan(CURVATURE, cut(v), batches, options)[0]
  elif name == "cg":
    solution = solvers.cg(matvec, cut(v), solvers.CgSettings(damping, tol=1e-13)).solution
  elif name == "exact":
    solution = solvers.exact(matvec, cut(v), damping).solution
  elif name == "datainf":
    source = solvers.ExampleGradients(as_gradients, lambda: iter([padded(x)]))
    solution = solvers.datainf(cut(v), source, solvers.DataInfSettings(damping)).solution
  else:
    fitted = solvers.fit_low_rank(matvec, cut(v), KEY, solvers.LowRankSettings(3))
    solution = solvers.low_rank(cut(v), fitted, damping).solution
  return tree_math.ravel(solution)


SOLVERS = ["none", "momentum", "chebyshev", "cg", "exact", "datainf", "low_rank"]


@pytest.mark.parametrize("name", SOLVERS)
@few
@given(seed=seeds, damping=dampings, weights=st.tuples(st.floats(-5, 5), st.floats(-5, 5)))
def test_linear_in_v(name, seed, damping, weights):
  x, _, v = problem(seed)
  v[2] = weights[0] * v[0] + weights[1] * v[1]
  r = solve(name, x, v, damping)
  # A sum can cancel: the error is measured against its terms.
  size = 1e-12 + abs(weights[0]) * np.linalg.norm(r[0]) + abs(weights[1]) * np.linalg.norm(r[1])
  assert np.linalg.norm(r[2] - weights[0] * r[0] - weights[1] * r[1]) <= 1e-7 * size


@pytest.mark.parametrize("name", SOLVERS)
@few
@given(seed=seeds, damping=dampings)
def test_symmetric_and_positive(name, seed, damping):
  x, _, v = problem(seed)
  gram = v @ solve(name, x, v, damping).T
  assert np.abs(gram - gram.T).max() <= 1e-7 * np.abs(gram).max()
  assert np.linalg.eigvalsh((gram + gram.T) / 2).min() > -1e-9 * np.abs(gram).max()


@few
@given(seed=seeds, damping=dampings)
def test_energy_error_of_cg_never_grows(seed, damping):
  x, h, v = problem(seed)
  matvec, damped = solvers.fixed_matvec(CURVATURE, [padded(x)]), h + damping * np.eye(SIZE)
  wanted, before = np.linalg.solve(damped, v.T).T, np.inf
  for steps in range(1, SIZE + 3):
    result = solvers.cg(matvec, cut(v), solvers.CgSettings(damping, tol=1e-14, max_steps=steps))
    error = tree_math.ravel(result.solution) - wanted
    energy = np.einsum("qi,ij,qj->q", error, damped, error)
    start = np.einsum("qi,ij,qj->q", wanted, damped, wanted)
    assert np.all(energy <= before + 1e-12 * start)
    before = energy
  assert np.all(before <= 1e-9 * start)


@few
@given(seed=seeds, damping=dampings)
def test_residual_of_lissa_never_grows_on_a_fixed_set(seed, damping):
  x, h, v = problem(seed)
  scale = 1.01 * (float(np.linalg.eigvalsh(h)[-1]) + damping)
  batches = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (DEPTH, *leaf.shape)), padded(x))
  _, curve = lissa_scan.lissa_scan(CURVATURE, cut(v), batches, solvers.LissaSettings(damping, scale))
  assert np.all(np.diff(np.asarray(curve), axis=0) <= 1e-12) and np.all(np.asarray(curve[0]) <= 1)


@few
@given(seed=seeds, damping=dampings, cuts=st.lists(st.integers(0, COUNT), min_size=0, max_size=5), order=seeds)
def test_no_dependence_on_batch_cuts_or_order(seed, damping, cuts, order):
  x, h, v = problem(seed)
  shuffled = np.random.default_rng(order).permutation(x)
  parts = [padded(part) for part in np.split(shuffled, sorted(cuts))]
  matvec = solvers.fixed_matvec(CURVATURE, parts)
  np.testing.assert_allclose(tree_math.ravel(matvec(cut(v))), v @ h, rtol=1e-9, atol=1e-12)
  solution = solvers.cg(matvec, cut(v), solvers.CgSettings(damping, tol=1e-12)).solution
  wanted = np.linalg.solve(h + damping * np.eye(SIZE), v.T).T
  assert np.linalg.norm(tree_math.ravel(solution) - wanted) <= 1e-6 * np.linalg.norm(wanted)
  source = solvers.ExampleGradients(as_gradients, lambda: iter(parts))
  options = solvers.DataInfSettings(damping_ratio=0.1)
  whole = solvers.ExampleGradients(as_gradients, lambda: iter([padded(x)]))
  found, wanted = (tree_math.ravel(solvers.datainf(cut(v), one, options).solution) for one in (source, whole))
  np.testing.assert_allclose(found, wanted, rtol=1e-9)


@few
@given(seed=seeds, damping=st.floats(-1, 1).map(lambda e: 10.0**e), factors=st.tuples(*[st.floats(0.55, 4)] * 2))
def test_fixed_point_of_lissa_does_not_depend_on_scale(seed, damping, factors):
  x, h, v = problem(seed)
  largest = float(np.linalg.eigvalsh(h)[-1]) + damping
  batches = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (2000, *leaf.shape)), padded(x))
  wanted = np.linalg.solve(h + damping * np.eye(SIZE), v.T).T
  for factor in factors:
    options = solvers.LissaSettings(damping, factor * largest)
    found = tree_math.ravel(lissa_scan.lissa_scan(CURVATURE, cut(v), batches, options)[0])
    assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)


@few
@given(seed=seeds, exponent=st.floats(-150, 100))
def test_norm_neither_underflows_nor_overflows(seed, exponent):
  v = np.random.default_rng(seed).normal(size=(3, SIZE))
  found = np.asarray(tree_math.norm(cut(v * 10.0**exponent)))
  np.testing.assert_allclose(found / 10.0**exponent, np.linalg.norm(v, axis=1), rtol=1e-12)
