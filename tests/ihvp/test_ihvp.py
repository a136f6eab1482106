"""Solvers against dense float64 solves of the same system, and against everything that published solvers get wrong."""

import dataclasses
import re

import jax
import jax.flatten_util
import jax.numpy as jnp
import lissa_scan
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax.errors import UserError
from in2core_jax.ihvp import krylov, solvers, tree_math

SIZE = 12
KEY = jax.random.key(7)


def join(v):
  return jnp.concatenate([v["a"], v["b"].reshape(v["b"].shape[0], -1)], axis=1)


def cut(rows):
  return {"a": rows[:, :4], "b": rows[:, 4:].reshape(-1, 2, 4)}


def matrix_product(context, batch, v):
  """H v for H = context, the same for every batch: f(theta) = 1/2 theta^T H theta."""
  del batch
  return cut(join(v) @ context)


def one(batch):
  del batch
  return 1.0


def row_product(context, batch, v):
  """Least squares: sum over the rows of a batch of weight * x x^T v; padding rows have valid 0 (and x = 1e3)."""
  dots = join(v) @ batch["x"].T
  return cut((dots * batch["valid"] * context) @ batch["x"])


def valid_rows(batch):
  return batch["valid"].sum()


def spectrum_matrix(eigenvalues, seed=0):
  q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))
  return (q * np.asarray(eigenvalues)) @ q.T


def queries(count=3, seed=1, dtype=np.float64):
  return cut(jnp.asarray(np.random.default_rng(seed).normal(size=(count, SIZE)), dtype))


def matrix_curvature(h, dtype=np.float64):
  return solvers.Curvature(matrix_product, one, jnp.asarray(h, dtype))


def matrix_matvec(h, dtype=np.float64):
  return solvers.fixed_matvec(matrix_curvature(h, dtype), [0])


def whole(h, dtype=np.float64):
  """Every minibatch is the whole data set: the recursion is deterministic."""
  return solvers.StochasticCurvature(matrix_curvature(h, dtype), lambda key: 0, matrix_matvec(h, dtype))


def dense_solve(h, v, damping):
  return np.linalg.solve(h + damping * np.eye(len(h)), tree_math.ravel(v).T).T


def error(solution, wanted):
  """Largest relative error of a query."""
  difference = tree_math.ravel(solution) - wanted
  return float(np.max(np.linalg.norm(difference, axis=1) / np.linalg.norm(wanted, axis=1)))


def least_squares(count=48, seed=3):
  x = np.random.default_rng(seed).normal(size=(count, SIZE)) * np.geomspace(1, 0.1, SIZE)
  return x, 2.0 * x.T @ x / count


def padded(x, size):
  rows = np.concatenate([x, np.full((size - len(x), SIZE), 1e3)])
  return {"x": rows, "valid": np.arange(size) < len(x)}


def pick(x, size):
  def draw(key):
    return padded(x[np.asarray(jax.random.choice(key, len(x), (size,), replace=False))], size)

  return draw


# --- exact and dense


def test_dense_matrix_and_exact(x64):
  h, v = spectrum_matrix(np.geomspace(5, 0.01, SIZE)), queries()
  matvec = matrix_matvec(h)
  np.testing.assert_allclose(solvers.dense_matrix(matvec, v, chunk=5), h, atol=1e-14)
  result = solvers.exact(matvec, v, 0.1)
  assert error(result.solution, dense_solve(h, v, 0.1)) < 1e-12
  assert result.residual.max() < 1e-12 and result.residual.shape == (3,)
  assert result.info["lambda_max"] == pytest.approx(5) and result.info["positive_definite"]


def test_exact_refuses_what_it_cannot_do(x64):
  v = queries()
  with pytest.raises(UserError, match="12 parameters, more than 11"):
    solvers.exact(matrix_matvec(np.eye(SIZE)), v, 0.1, limit=11)
  with pytest.raises(UserError, match="not symmetric"):
    solvers.exact(matrix_matvec(np.triu(np.ones((SIZE, SIZE)))), v, 0.1)
  with pytest.raises(UserError, match="singular"):
    solvers.exact(matrix_matvec(spectrum_matrix([0] * 4 + [1] * 8)), v, 0.0)
  with pytest.raises(UserError, match="damping -1"):
    solvers.exact(matrix_matvec(np.eye(SIZE)), v, -1)
  indefinite = spectrum_matrix(np.linspace(-1, 1, SIZE))
  result = solvers.exact(matrix_matvec(indefinite), v, 0.05)
  assert not result.info["positive_definite"]
  assert error(result.solution, dense_solve(indefinite, v, 0.05)) < 1e-10


def test_identity_measures_how_far_it_is_from_an_inverse(x64):
  v = queries()
  result = solvers.identity(v, matrix_matvec(3 * np.eye(SIZE)), damping=0.5)
  np.testing.assert_array_equal(tree_math.ravel(result.solution), tree_math.ravel(v))
  np.testing.assert_allclose(result.residual, 2.5, rtol=1e-12)
  assert np.isnan(solvers.identity(v).residual).all() and not solvers.identity(v).info["residual_measured"]


# --- LiSSA


@pytest.mark.parametrize("condition", [10, 1e4])
@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3])
def test_lissa_equals_the_dense_solve_at_two_scales(x64, condition, ratio):
  # Fails when damping is multiplied by scale, when its sign is wrong, or when the answer is not divided by scale.
  h, v = spectrum_matrix(np.geomspace(3, 3 / condition, SIZE)), queries()
  damping = 3 * ratio
  wanted, found = dense_solve(h, v, damping), []
  for scale in (0.6 * (3 + damping), 2 * (3 + damping)):
    depth = int(20 * scale / (damping + 3 / condition))
    settings = solvers.LissaSettings(damping, scale)
    solution, curve = lissa_scan.lissa_scan(matrix_curvature(h), v, jnp.zeros(depth), settings)
    assert error(solution, wanted) < 1e-6
    assert curve.shape == (depth, 3) and float(curve[-1].max()) < 1e-6
    found.append(tree_math.ravel(solution))
  np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.parametrize("acceleration", ["none", "momentum", "chebyshev"])
@pytest.mark.parametrize("ratio", [1e-1, 1e-2])
def test_lissa_with_automatic_scale_stops_when_converged(x64, acceleration, ratio):
  h, v = spectrum_matrix(np.geomspace(3, 3e-4, SIZE)), queries()
  settings = solvers.LissaSettings(3 * ratio, depth=4000, tol=1e-8, check_every=50, acceleration=acceleration)
  result = solvers.lissa(whole(h), v, KEY, settings)
  assert error(result.solution, dense_solve(h, v, 3 * ratio)) < 1e-6
  assert result.info["converged"] and result.steps < 4000 and result.steps % 50 == 0
  assert result.info["lambda_max"] == pytest.approx(3, rel=0.02)
  assert result.info["scale"] == pytest.approx(1.2 * 3 * (1 + ratio), rel=0.05)
  np.testing.assert_array_equal(result.curve[-1][1], result.residual)
  np.testing.assert_allclose(
    result.residual, solvers.relative_residual(matrix_matvec(h), result.solution, v, 3 * ratio), rtol=1e-12
  )


def test_python_loop_equals_scan(x64):
  h, v = spectrum_matrix(np.geomspace(3, 0.3, SIZE)), queries()
  for acceleration, average in (("none", 0), ("none", 0.4), ("momentum", 0), ("chebyshev", 0), ("chebyshev", 0.9)):
    settings = solvers.LissaSettings(0.2, scale=3.5, depth=25, tol=0, acceleration=acceleration, average=average)
    loop = solvers.lissa(whole(h), v, KEY, settings)
    scan, _ = lissa_scan.lissa_scan(matrix_curvature(h), v, jnp.zeros(25), settings)
    np.testing.assert_allclose(tree_math.ravel(loop.solution), tree_math.ravel(scan), rtol=1e-12)
    assert loop.steps == 25


def test_acceleration_is_better_than_lissa_by_about_the_root_of_the_condition(x64):
  h, v = spectrum_matrix(np.geomspace(1, 1e-6, SIZE)), queries()
  final = {}
  for acceleration in ("none", "momentum", "chebyshev"):
    settings = solvers.LissaSettings(1e-3, scale=1.1, acceleration=acceleration)
    solution, _ = lissa_scan.lissa_scan(matrix_curvature(h), v, jnp.zeros(400), settings)
    final[acceleration] = error(solution, dense_solve(h, v, 1e-3))
  assert final["none"] > 0.1
  assert final["momentum"] < 1e-6 and final["chebyshev"] < 1e-6
  # Chebyshev keeps its bound 2 ((sqrt k - 1) / (sqrt k + 1))^n on the whole interval.
  root = np.sqrt(1.1 / 1e-3)
  start = np.linalg.norm(tree_math.ravel(v) / 1.1 - dense_solve(h, v, 1e-3), axis=1)
  start = np.max(start / np.linalg.norm(dense_solve(h, v, 1e-3), axis=1))
  assert final["chebyshev"] < 2 * ((root - 1) / (root + 1)) ** 400 * start * 1.01 + 1e-12


@pytest.mark.parametrize("solver", ["lissa", "chebyshev", "cg"])
def test_single_precision(solver):
  h, v = spectrum_matrix(np.geomspace(1, 0.1, SIZE)), queries(dtype=np.float32)
  if solver == "cg":
    result = solvers.cg(matrix_matvec(h, np.float32), v, solvers.CgSettings(0.05, tol=1e-6))
  else:
    acceleration = "none" if solver == "lissa" else solver
    settings = solvers.LissaSettings(0.05, depth=300, tol=1e-6, acceleration=acceleration)
    result = solvers.lissa(whole(h, np.float32), v, KEY, settings)
  assert error(result.solution, dense_solve(h, v, 0.05)) < 1e-5
  assert {leaf.dtype for leaf in jax.tree.leaves(result.solution)} == {jnp.dtype("float32")}


def test_half_precision_right_hand_side_is_iterated_in_single():
  h, v = spectrum_matrix(np.geomspace(1, 0.1, SIZE)), queries(dtype=jnp.bfloat16)
  result = solvers.cg(matrix_matvec(h, np.float32), v, solvers.CgSettings(0.05, tol=1e-6))
  assert error(result.solution, dense_solve(h, v, 0.05)) < 1e-5


@pytest.mark.parametrize("acceleration", ["none", "momentum", "chebyshev"])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.45])
def test_too_small_a_scale_is_an_error_within_a_few_steps(x64, fraction, acceleration):
  h, v = spectrum_matrix(np.geomspace(3, 0.03, SIZE)), queries()
  scale = fraction * 3.03
  settings = solvers.LissaSettings(0.03, scale=scale, depth=5000, check_every=5, acceleration=acceleration)
  with pytest.raises(solvers.DivergenceError) as caught:
    solvers.lissa(whole(h), v, KEY, settings)
  message = str(caught.value)
  assert int(re.search(r"step (\d+)", message).group(1)) <= 40
  assert f"scale {scale:.3g}" in message and "larger scale" in message and "damping above" in message
  assert float(re.search(r"largest eigenvalue ([\d.]+)", message).group(1)) == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("depth", [5, 10, 12])
@pytest.mark.parametrize("fraction", [0.42, 0.44, 0.47])
def test_too_small_a_scale_is_an_error_in_a_short_run_too(x64, fraction, depth):
  h, v = np.diag([3.0] + [0.03] * (SIZE - 1)), queries()
  with pytest.raises(solvers.DivergenceError, match="largest eigenvalue 3"):
    solvers.lissa(whole(h), v, KEY, solvers.LissaSettings(0.03, scale=fraction * 3.03, depth=depth))


def test_slow_divergence_shows_in_the_residual(x64):
  # Growth by 2 % a step: far below the bound on |u| when the residual has already given it away.
  h, v = spectrum_matrix(np.geomspace(3, 0.03, SIZE)), queries()
  settings = solvers.LissaSettings(0.03, scale=0.495 * 3.03, depth=5000, check_every=20)
  with pytest.raises(solvers.DivergenceError, match="the residual") as caught:
    solvers.lissa(whole(h), v, KEY, settings)
  assert int(re.search(r"step (\d+)", str(caught.value)).group(1)) <= 300


def test_a_known_largest_eigenvalue_refuses_the_scale_at_once(x64):
  settings = solvers.LissaSettings(0.1, scale=1.5, lambda_max=3.0)
  with pytest.raises(solvers.DivergenceError, match="step 0.*1.55"):
    solvers.lissa(whole(3 * np.eye(SIZE)), queries(), KEY, settings)


def test_values_that_are_not_finite_are_an_error(x64):
  v = queries()
  poisoned = np.eye(SIZE)
  poisoned[2, 2] = np.nan
  for call in (
    lambda: solvers.lissa(whole(poisoned), v, KEY, solvers.LissaSettings(0.1, scale=2.0)),
    lambda: solvers.lissa(whole(poisoned), v, KEY, solvers.LissaSettings(0.1)),
    lambda: solvers.cg(matrix_matvec(poisoned), v, solvers.CgSettings(0.1)),
    lambda: solvers.exact(matrix_matvec(poisoned), v, 0.1),
    lambda: solvers.lissa(whole(np.eye(SIZE)), tree_math.scaled(np.nan, v), KEY, solvers.LissaSettings(0.1)),
    lambda: solvers.cg(matrix_matvec(np.eye(SIZE)), tree_math.scaled(np.nan, v), solvers.CgSettings(0.1)),
    lambda: solvers.fit_low_rank(matrix_matvec(poisoned), v, KEY, solvers.LowRankSettings(3)),
  ):
    with pytest.raises(solvers.DivergenceError, match="finite|NaN|nan"):
      call()
  with pytest.raises(solvers.DivergenceError, match="step [12] of run 0.*not known"):
    solvers.lissa(whole(poisoned), v, KEY, solvers.LissaSettings(0.1, scale=2.0))


@pytest.mark.parametrize("acceleration", ["none", "chebyshev"])
def test_minibatches_stay_within_the_reported_residual(x64, acceleration):
  x, h = least_squares()
  v, damping = queries(), 0.2
  curvature = solvers.Curvature(row_product, valid_rows, jnp.asarray(2.0))
  matvec = solvers.fixed_matvec(curvature, [padded(x, 50)])
  settings = solvers.LissaSettings(damping, depth=200, repeat=3, acceleration=acceleration, safety=2.0)
  result = solvers.lissa(solvers.StochasticCurvature(curvature, pick(x, 24), matvec), v, KEY, settings)
  wanted = dense_solve(h, v, damping)
  # error = (H + damping I)^-1 residual
  bound = result.residual * np.linalg.norm(tree_math.ravel(v), axis=1) / (np.linalg.eigvalsh(h)[0] + damping)
  assert np.all(np.linalg.norm(tree_math.ravel(result.solution) - wanted, axis=1) <= bound * (1 + 1e-9))
  assert 1e-4 < result.residual.max() < 0.5
  assert error(result.solution, wanted) < 0.25


def test_repeats_are_independent_and_averaged(x64):
  x, _ = least_squares()
  curvature = solvers.Curvature(row_product, valid_rows, jnp.asarray(2.0))
  sampled = solvers.StochasticCurvature(curvature, pick(x, 16), solvers.fixed_matvec(curvature, [padded(x, 48)]))
  ends = {}
  settings = solvers.LissaSettings(0.2, depth=25, repeat=4, check_every=10, tol=0, scale=8.0)
  result = solvers.lissa(sampled, queries(), KEY, settings, on_state=lambda state: ends.update({state.run: state}))
  runs = [tree_math.ravel(ends[run].u) / 8.0 for run in range(4)]
  np.testing.assert_allclose(tree_math.ravel(result.solution), np.mean(runs, axis=0), rtol=1e-12)
  assert np.abs(runs[0] - runs[1]).max() > 1e-3
  assert [step for step, _ in result.curve] == [10, 20, 25, 35, 45, 50, 60, 70, 75, 85, 95, 100, 100]
  assert result.steps == 100 and result.residual.max() < np.mean(result.info["run_residuals"])
  other = solvers.lissa(sampled, queries(), jax.random.key(8), settings)
  assert np.abs(tree_math.ravel(other.solution) - tree_math.ravel(result.solution)).max() > 1e-4


def test_averaging_takes_the_mean_of_the_last_iterates_and_removes_noise(x64):
  x, h = least_squares()
  v, curvature = queries(), solvers.Curvature(row_product, valid_rows, jnp.asarray(2.0))
  sampled = solvers.StochasticCurvature(curvature, pick(x, 8), solvers.fixed_matvec(curvature, [padded(x, 48)]))
  states = []
  plain = solvers.LissaSettings(0.2, scale=12.0, depth=300, check_every=1, tol=0)
  last = solvers.lissa(sampled, v, KEY, plain, on_state=states.append)
  mean = solvers.lissa(sampled, v, KEY, dataclasses.replace(plain, average=0.5, check_every=100))
  iterates = [tree_math.ravel(state.u) / 12.0 for state in states[150:]]
  np.testing.assert_allclose(tree_math.ravel(mean.solution), np.mean(iterates, axis=0), rtol=1e-10)
  assert mean.residual.max() < last.residual.max() / 2
  assert error(mean.solution, dense_solve(h, v, 0.2)) < error(last.solution, dense_solve(h, v, 0.2)) / 2


def test_every_repeat_runs_until_it_has_converged(x64):
  h, v = spectrum_matrix(np.geomspace(1, 0.5, SIZE)), queries()
  single = solvers.lissa(whole(h), v, KEY, solvers.LissaSettings(0.5, tol=1e-6, check_every=7))
  double = solvers.lissa(whole(h), v, KEY, solvers.LissaSettings(0.5, tol=1e-6, check_every=7, repeat=2))
  assert 7 < single.steps < 100 and double.steps == 2 * single.steps
  assert double.info["converged"] and error(double.solution, dense_solve(h, v, 0.5)) < 2e-6


@pytest.mark.parametrize("average", [0.0, 0.5])
@pytest.mark.parametrize(
  ("acceleration", "damping"),
  [("none", 0.0), ("none", 0.01), ("none", 0.5), ("momentum", 0.01), ("chebyshev", 0.01), ("chebyshev", 0.5)],
)
def test_effective_damping_is_what_flat_directions_get(x64, acceleration, damping, average):
  h, v = np.diag([2.0] * 6 + [0.0] * 6), queries()
  settings = solvers.LissaSettings(damping, scale=2.6, depth=30, tol=0, acceleration=acceleration, average=average)
  result = solvers.lissa(whole(h), v, KEY, settings)
  effective = result.info["effective_damping"]
  np.testing.assert_allclose(tree_math.ravel(result.solution)[:, 6:], tree_math.ravel(v)[:, 6:] / effective, rtol=1e-10)
  if damping == 0 and average == 0:
    assert effective == pytest.approx(2.6 / 31, rel=1e-12)


def test_indefinite_curvature_is_named(x64):
  h = spectrum_matrix(np.linspace(-2, 1, SIZE))
  with pytest.raises(solvers.NegativeCurvatureError, match=r"eigenvalue -(2|1\.99).*damping above (2|1\.99).*ggn"):
    solvers.lissa(whole(h), queries(), KEY, solvers.LissaSettings(0.1, power_steps=200))
  # Not dominant, so the power iteration cannot see it: the recursion notices.
  hidden = spectrum_matrix(np.linspace(-0.6, 1, SIZE))
  with pytest.raises(solvers.DivergenceError, match="diverged"):
    solvers.lissa(whole(hidden), queries(), KEY, solvers.LissaSettings(0.1, depth=500))


@pytest.mark.parametrize(("acceleration", "average"), [("none", 0), ("none", 0.5), ("chebyshev", 0.7)])
def test_killed_and_resumed_gives_the_same_bytes(x64, tmp_path, acceleration, average):
  x, _ = least_squares()
  v, curvature = queries(), solvers.Curvature(row_product, valid_rows, jnp.asarray(2.0))
  sampled = solvers.StochasticCurvature(curvature, pick(x, 24), solvers.fixed_matvec(curvature, [padded(x, 48)]))
  settings = solvers.LissaSettings(
    0.3, depth=25, repeat=2, check_every=10, tol=0, acceleration=acceleration, average=average
  )
  files, kept = [], []

  def save(state):
    kept.append(state)
    files.append(tmp_path / f"{len(files)}.npz")
    np.savez(files[-1], **solvers.state_to_arrays(state))

  straight = solvers.lissa(sampled, v, KEY, settings, on_state=save)
  assert len(files) == 6
  for file in files:
    with np.load(file, allow_pickle=False) as stored:
      resumed = solvers.lissa(sampled, v, KEY, settings, resume_from=solvers.state_from_arrays(stored, v))
    assert tree_math.ravel(resumed.solution).tobytes() == tree_math.ravel(straight.solution).tobytes()
    assert resumed.residual.tobytes() == straight.residual.tobytes()
    assert resumed.steps == straight.steps and resumed.info == straight.info
    assert [(s, r.tobytes()) for s, r in resumed.curve] == [(s, r.tobytes()) for s, r in straight.curve]

  # A state kept in memory outlives the buffers that the next steps reuse.
  resumed = solvers.lissa(sampled, v, KEY, settings, resume_from=kept[0])
  assert tree_math.ravel(resumed.solution).tobytes() == tree_math.ravel(straight.solution).tobytes()


def test_a_state_of_another_run_is_refused(x64):
  h, v, states = np.eye(SIZE), queries(), []
  settings = solvers.LissaSettings(0.1, depth=20, tol=0, scale=2.0)
  solvers.lissa(whole(h), v, KEY, settings, on_state=states.append)
  with pytest.raises(UserError, match="another key"):
    solvers.lissa(whole(h), v, jax.random.key(0), settings, resume_from=states[0])
  with pytest.raises(UserError, match="damping 0.1, not 0.2"):
    solvers.lissa(whole(h), v, KEY, solvers.LissaSettings(0.2, scale=2.0), resume_from=states[0])
  with pytest.raises(UserError, match="scale 2"):
    solvers.lissa(whole(h), v, KEY, solvers.LissaSettings(0.1, scale=3.0), resume_from=states[0])
  with pytest.raises(UserError, match="another acceleration"):
    solvers.lissa(
      whole(h), v, KEY, solvers.LissaSettings(0.1, scale=2.0, acceleration="momentum"), resume_from=states[0]
    )
  with pytest.raises(UserError, match="another average"):
    solvers.lissa(whole(h), v, KEY, solvers.LissaSettings(0.1, scale=2.0, average=0.5), resume_from=states[0])
  with pytest.raises(UserError, match="beyond repeat or depth"):
    solvers.lissa(whole(h), v, KEY, solvers.LissaSettings(0.1, scale=2.0, depth=5), resume_from=states[0])
  with pytest.raises(UserError, match="does not fit"):
    solvers.state_from_arrays(solvers.state_to_arrays(states[0]), queries(4))


def test_one_program_per_batch_shape_and_weights_are_arguments(x64):
  x, traces = least_squares()[0], []

  def counted(context, batch, v):
    traces.append(batch["x"].shape)
    return row_product(context, batch, v)

  def draw(key):
    size = 16 if int(jax.random.bits(key)) % 2 else 24
    return padded(x[:size], size)

  v, settings = queries(), solvers.LissaSettings(0.2, scale=8.0, depth=30, tol=0)
  answers = []
  for weight in (2.0, 1.0, 2.0):
    curvature = solvers.Curvature(counted, valid_rows, jnp.asarray(weight))
    matvec = solvers.fixed_matvec(curvature, [padded(x, 48)])
    answers.append(
      tree_math.ravel(solvers.lissa(solvers.StochasticCurvature(curvature, draw, matvec), v, KEY, settings).solution)
    )
    assert sorted(set(traces)) == sorted(traces) == [(16, SIZE), (24, SIZE), (48, SIZE)]
  np.testing.assert_array_equal(answers[0], answers[2])
  assert np.abs(answers[0] - answers[1]).max() > 1e-2


# --- CG


@pytest.mark.parametrize("condition", [10, 1e4, 1e7])
@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3, 0])
def test_cg_equals_the_dense_solve(x64, condition, ratio):
  h, v = spectrum_matrix(np.geomspace(3, 3 / condition, SIZE)), queries()
  result = solvers.cg(matrix_matvec(h), v, solvers.CgSettings(3 * ratio, tol=1e-13, max_steps=300))
  assert error(result.solution, dense_solve(h, v, 3 * ratio)) < 1e-6
  measured = solvers.relative_residual(matrix_matvec(h), result.solution, v, 3 * ratio)
  np.testing.assert_allclose(result.residual, measured, rtol=1e-2, atol=1e-9)
  assert result.steps <= 100


def test_cg_uses_its_tolerance_and_says_when_it_fails(x64):
  h, v = spectrum_matrix(np.geomspace(1, 1e-4, SIZE)), queries()
  loose = solvers.cg(matrix_matvec(h), v, solvers.CgSettings(1e-3, tol=1e-1))
  tight = solvers.cg(matrix_matvec(h), v, solvers.CgSettings(1e-3, tol=1e-9))
  assert loose.steps < tight.steps
  assert 1e-9 < loose.residual.max() <= 1e-1 and tight.residual.max() <= 1e-9
  short = solvers.cg(matrix_matvec(h), v, solvers.CgSettings(1e-3, tol=1e-9, max_steps=3))
  assert short.steps == 3 and not short.info["converged"] and short.residual.max() > 1e-9
  np.testing.assert_allclose(short.residual, short.curve[-1][1], rtol=1e-9)


def test_preconditioner_helps_and_changes_nothing_else(x64):
  h = spectrum_matrix(np.ones(SIZE)) * 0.1 + np.diag(np.geomspace(1, 1e5, SIZE))
  h[0, 1] = h[1, 0] = 0.2
  v, settings = queries(), solvers.CgSettings(1e-2, tol=1e-10)
  inverse = jnp.asarray(1 / (np.diag(h) + 1e-2))
  plain = solvers.cg(matrix_matvec(h), v, settings)
  helped = solvers.cg(matrix_matvec(h), v, settings, precondition=lambda r: cut(join(r) * inverse))
  assert helped.steps < plain.steps
  assert error(helped.solution, dense_solve(h, v, 1e-2)) < 1e-8
  with pytest.raises(UserError, match="preconditioner must be symmetric and positive definite"):
    solvers.cg(matrix_matvec(h), v, settings, precondition=lambda r: tree_math.scaled(-1.0, r))


def test_cg_refuses_negative_curvature(x64):
  h = spectrum_matrix(np.linspace(-0.5, 1, SIZE))
  with pytest.raises(solvers.NegativeCurvatureError, match=r"p\.\(H \+ damping I\) p = -.*damping well above.*ggn"):
    solvers.cg(matrix_matvec(h), queries(), solvers.CgSettings(0.1))
  assert solvers.cg(matrix_matvec(h), queries(), solvers.CgSettings(0.6)).info["converged"]


def test_cg_from_a_converged_start_takes_no_step(x64):
  h, v = spectrum_matrix(np.geomspace(1, 0.1, SIZE)), queries()
  wanted = dense_solve(h, v, 0.1)
  result = solvers.cg(matrix_matvec(h), v, solvers.CgSettings(0.1, tol=1e-10), start=cut(jnp.asarray(wanted)))
  assert result.steps == 0 and error(result.solution, wanted) < 1e-14
  again = solvers.cg(matrix_matvec(h), v, solvers.CgSettings(0.1, tol=0, max_steps=100), start=cut(jnp.asarray(wanted)))
  assert np.isfinite(tree_math.ravel(again.solution)).all() and error(again.solution, wanted) < 1e-12


def test_tiny_right_hand_sides_do_not_underflow():
  h, v = spectrum_matrix(np.geomspace(1, 0.1, SIZE)), queries(dtype=np.float32)
  tiny = tree_math.scaled(1e-30, v)
  result = solvers.cg(matrix_matvec(h, np.float32), tiny, solvers.CgSettings(0.1, tol=1e-6))
  assert error(result.solution, 1e-30 * dense_solve(h, v, 0.1)) < 1e-5
  assert result.steps > 0 and result.residual.max() < 1e-5


# --- properties that all solvers share


def all_solvers(h, v, matvec=None, sampled=None):
  matvec, sampled = matvec or matrix_matvec(h), sampled or whole(h)
  source = solvers.ExampleGradients(lambda context, batch: batch, lambda: iter([gradient_batch()]))
  fitted = solvers.fit_low_rank(matvec, v, KEY, solvers.LowRankSettings(5))
  return {
    "identity": solvers.identity(v, matvec, 0.1),
    "exact": solvers.exact(matvec, v, 0.1),
    "cg": solvers.cg(matvec, v, solvers.CgSettings(0.1, tol=1e-8)),
    "lissa": solvers.lissa(sampled, v, KEY, solvers.LissaSettings(0.1, depth=30, tol=0)),
    "chebyshev": solvers.lissa(sampled, v, KEY, solvers.LissaSettings(0.1, depth=30, tol=0, acceleration="chebyshev")),
    "datainf": solvers.datainf(v, source, solvers.DataInfSettings(0.1), matvec),
    "low_rank": solvers.low_rank(v, fitted, 0.1, matvec),
  }


def gradient_batch():
  return cut(jnp.asarray(np.random.default_rng(5).normal(size=(6, SIZE)))), jnp.ones(6)


def test_zero_right_hand_side_gives_exact_zeros(x64):
  h = spectrum_matrix(np.geomspace(1, 0.1, SIZE))
  for name, result in all_solvers(h, tree_math.zeros_like(queries())).items():
    assert not tree_math.ravel(result.solution).any(), name
    assert (result.residual == 0).all(), name
  mixed = jax.tree.map(lambda leaf: leaf.at[1].set(0), queries())
  for name, result in all_solvers(h, mixed).items():
    rows = tree_math.ravel(result.solution)
    assert not rows[1].any() and np.abs(rows[[0, 2]]).min() > 0 and result.residual[1] == 0, name
  started = solvers.cg(matrix_matvec(h), mixed, solvers.CgSettings(0.1), start=queries())
  assert not tree_math.ravel(started.solution)[1].any()


def test_several_queries_are_each_alone(x64):
  h, v = spectrum_matrix(np.geomspace(1, 1e-3, SIZE)), queries()
  together = all_solvers(h, v)
  for index in range(3):
    for name, alone in all_solvers(h, jax.tree.map(lambda leaf, i=index: leaf[i : i + 1], v)).items():
      rows = tree_math.ravel(together[name].solution)[index : index + 1]
      np.testing.assert_allclose(tree_math.ravel(alone.solution), rows, rtol=1e-9, atol=1e-12, err_msg=name)
      np.testing.assert_allclose(alone.residual[0], together[name].residual[index], rtol=1e-2, atol=1e-9, err_msg=name)


def test_sharded_parameters_give_the_same_answers(x64):
  h, v = spectrum_matrix(np.geomspace(1, 1e-2, SIZE)), queries()
  mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
  placed = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "fsdp"))), v)
  matrix = jax.device_put(jnp.asarray(h), NamedSharding(mesh, P()))
  curvature = solvers.Curvature(matrix_product, one, matrix)
  matvec = solvers.fixed_matvec(curvature, [0])
  sharded = all_solvers(h, placed, matvec, solvers.StochasticCurvature(curvature, lambda key: 0, matvec))
  for name, alone in all_solvers(h, v).items():
    found, wanted = tree_math.ravel(sharded[name].solution), tree_math.ravel(alone.solution)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(sharded[name].residual, alone.residual, rtol=1e-2, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("sizes", [[12, 12, 12, 12], [1, 30, 10, 7]])
def test_answer_does_not_depend_on_how_the_data_is_cut(x64, sizes):
  # Fails when inverses, or means of unequal batches, are averaged over batches.
  x, h = least_squares()
  v, curvature = queries(), solvers.Curvature(row_product, valid_rows, jnp.asarray(2.0))
  parts = [padded(part, 32) for part in np.split(x, np.cumsum(sizes)[:-1])]
  for batches in ([padded(x, 48)], parts, lambda: iter(parts)):
    matvec = solvers.fixed_matvec(curvature, batches)
    sampled = solvers.StochasticCurvature(curvature, lambda key: padded(x, 64), matvec)
    assert error(solvers.exact(matvec, v, 0.05).solution, dense_solve(h, v, 0.05)) < 1e-10
    assert error(solvers.cg(matvec, v, solvers.CgSettings(0.05, tol=1e-10)).solution, dense_solve(h, v, 0.05)) < 1e-8
    settings = solvers.LissaSettings(0.05, depth=400, tol=1e-8, acceleration="chebyshev")
    assert error(solvers.lissa(sampled, v, KEY, settings).solution, dense_solve(h, v, 0.05)) < 1e-6
  with pytest.raises(UserError, match="no example at all"):
    solvers.fixed_matvec(curvature, [padded(x[:0], 4)])(v)


def test_malformed_right_hand_sides():
  matvec = matrix_matvec(np.eye(SIZE), np.float32)
  for bad, seen in (({}, "no array"), ({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}, r"\[2, 3\]")):
    with pytest.raises(UserError, match=seen):
      solvers.cg(matvec, bad, solvers.CgSettings(0.1))
  with pytest.raises(UserError, match="int32"):
    solvers.cg(matvec, {"a": jnp.ones((2, 3), jnp.int32)}, solvers.CgSettings(0.1))


@pytest.mark.parametrize(
  "make",
  [
    lambda: solvers.CgSettings(-1e-3),
    lambda: solvers.CgSettings(float("nan")),
    lambda: solvers.CgSettings(0.1, tol=-1),
    lambda: solvers.CgSettings(0.1, max_steps=0),
    lambda: solvers.LissaSettings(-0.1),
    lambda: solvers.LissaSettings(0.1, scale=0.0),
    lambda: solvers.LissaSettings(0.1, depth=0),
    lambda: solvers.LissaSettings(0.1, safety=0.5),
    lambda: solvers.LissaSettings(0.1, tol=float("nan")),
    lambda: solvers.LissaSettings(0.1, average=1.0),
    lambda: solvers.LissaSettings(0.1, acceleration="nesterov"),
    lambda: solvers.LissaSettings(0.0, acceleration="chebyshev"),
    lambda: solvers.LowRankSettings(5, rank=6),
    lambda: solvers.DataInfSettings(),
    lambda: solvers.DataInfSettings(0.1, damping_ratio=0.1),
    lambda: solvers.DataInfSettings(0.0),
    lambda: solvers.DataInfSettings(damping_ratio=0.0),
    lambda: solvers.DataInfSettings(0.1, granularity="row"),
    lambda: solvers.resolve_damping(None, None, 1.0),
    lambda: solvers.resolve_damping(0.1, 0.1, 1.0),
    lambda: solvers.resolve_damping(None, 0.1, -1.0),
  ],
)
def test_settings_that_mean_nothing_are_refused(make):
  with pytest.raises(UserError):
    make()


def test_damping_ratio_is_relative_to_the_largest_eigenvalue():
  assert solvers.resolve_damping(None, 0.1, 5.0) == 0.5 and solvers.resolve_damping(0.3, None, 5.0) == 0.3


# --- one Krylov space for the eigenvalue and the solution


@pytest.mark.parametrize("condition", [10, 1e4])
@pytest.mark.parametrize("ratio", [0.1, 0.01])
def test_cg_goes_on_from_the_steps_that_found_the_eigenvalue(x64, condition, ratio):
  h, v = spectrum_matrix(np.geomspace(3, 3 / condition, SIZE)), queries()
  space = krylov.explore(matrix_matvec(h), v)
  assert space.lambda_max == pytest.approx(3, rel=0.05) and space.lambda_max <= 3 * (1 + 1e-12)
  settings = solvers.CgSettings(3 * ratio, tol=1e-9, max_steps=300)
  plain = solvers.cg(matrix_matvec(h), v, settings)
  shared = solvers.cg(matrix_matvec(h), v, settings, space=space)
  assert shared.steps == plain.steps  # not one more, though its first steps knew no damping
  # Later ones differ where CG by itself has lost the orthogonality of its residuals to rounding.
  for step in range(len(space.diagonal) + 1):
    assert plain.curve[step][0] == shared.curve[step][0] == step
    np.testing.assert_allclose(shared.curve[step][1], plain.curve[step][1], rtol=1e-4)
  assert error(shared.solution, dense_solve(h, v, 3 * ratio)) < 1e-7


def test_a_krylov_space_that_closes_and_queries_of_zero(x64):
  h = np.diag(np.r_[np.full(4, 2.0), np.zeros(SIZE - 4)])
  v = jax.tree.map(lambda leaf: leaf.at[0].set(0), queries())
  products = []
  matvec = matrix_matvec(h)
  space = krylov.explore(lambda x: products.append(1) or matvec(x), v, steps=9)
  assert space.lambda_max == pytest.approx(2) and len(products) <= 3  # three distinct values at most: closed
  result = solvers.cg(matvec, v, solvers.CgSettings(0.02, tol=1e-12), space=space)
  np.testing.assert_allclose(tree_math.ravel(result.solution), dense_solve(h, v, 0.02), rtol=1e-9)
  assert not tree_math.ravel(result.solution)[0].any()


def test_a_loose_tolerance_stops_inside_the_space(x64):
  h, v = spectrum_matrix(np.geomspace(3, 1, SIZE)), queries()
  space = krylov.explore(matrix_matvec(h), v, steps=6, tol=0)
  loose = solvers.cg(matrix_matvec(h), v, solvers.CgSettings(0.3, tol=0.1), space=space)
  plain = solvers.cg(matrix_matvec(h), v, solvers.CgSettings(0.3, tol=0.1))
  assert error(loose.solution, tree_math.ravel(plain.solution)) < 1e-9 and loose.residual.max() <= 0.1
  np.testing.assert_allclose(loose.residual, plain.residual, rtol=1e-6)


# --- power iteration


def test_power_iteration(x64):
  v = queries()
  result = solvers.power_iteration(matrix_matvec(spectrum_matrix(np.geomspace(4, 0.1, SIZE))), v, KEY, 200, 1e-9)
  assert result.lambda_max == pytest.approx(4, rel=1e-6) and result.converged and result.dominant == result.lambda_max
  estimates = [value for _, value in result.curve]
  assert np.all(np.diff(estimates) > -1e-12) and estimates[-1] <= 4 * (1 + 1e-12)
  negative = solvers.power_iteration(matrix_matvec(spectrum_matrix(np.linspace(-3, 2, SIZE))), v, KEY, 400, 1e-9)
  assert negative.dominant == pytest.approx(-3, rel=1e-5) and negative.lambda_max == pytest.approx(2, rel=1e-4)
  few = solvers.power_iteration(matrix_matvec(spectrum_matrix(np.linspace(-100, 0.5, SIZE))), v, KEY, 10, 2e-2)
  assert not few.converged  # the largest one is lost in the rounding of the shift, and that is said
  zero = solvers.power_iteration(matrix_matvec(np.zeros((SIZE, SIZE))), v, KEY)
  assert zero.lambda_max == 0 and zero.converged
  with pytest.raises(UserError, match="at least 1"):
    solvers.power_iteration(matrix_matvec(np.eye(SIZE)), v, KEY, steps=0)
  with pytest.raises(UserError, match="H is 0"):
    solvers.lissa(whole(np.zeros((SIZE, SIZE))), v, KEY, solvers.LissaSettings(0.0))


# --- a network


def network(sub, x):
  return jnp.tanh(x @ sub["first"]) @ sub["second"]


def network_ggn(context, batch, v):
  """sum_i J_i^T H_out,i J_i v of the softmax cross-entropy, for every query."""

  def single(direction):
    out = lambda s: network(s, batch["x"])  # noqa: E731
    logits, moved = jax.jvp(out, (context,), (direction,))
    p = jax.nn.softmax(logits)
    return jax.vjp(out, context)[1](p * moved - p * jnp.sum(p * moved, -1, keepdims=True))[0]

  return jax.vmap(single)(v)


def test_small_network_against_its_dense_ggn(x64):
  keys = jax.random.split(KEY, 5)
  sub = {"first": jax.random.normal(keys[0], (4, 5)), "second": jax.random.normal(keys[1], (5, 3))}
  x = jax.random.normal(keys[2], (20, 4))
  flat, unflatten = jax.flatten_util.ravel_pytree(sub)
  jacobian = np.asarray(jax.jit(jax.jacrev(lambda theta: network(unflatten(theta), x)))(flat))
  p = np.asarray(jax.nn.softmax(network(sub, x)))
  outer = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]
  ggn = np.einsum("nap,nab,nbq->pq", jacobian, outer, jacobian) / len(x)
  curvature = solvers.Curvature(network_ggn, lambda batch: batch["x"].shape[0], sub)
  matvec = solvers.fixed_matvec(curvature, [{"x": x[:7]}, {"x": x[7:]}])
  v = tree_math.random_normal(keys[3], jax.tree.map(lambda leaf: leaf[None], sub), 2)
  np.testing.assert_allclose(solvers.dense_matrix(matvec, v), ggn, atol=1e-8)
  largest = np.linalg.eigvalsh(ggn)[-1]
  for ratio in (1e-1, 1e-2, 1e-3):
    wanted = dense_solve(ggn, v, ratio * largest)
    assert error(solvers.exact(matvec, v, ratio * largest).solution, wanted) < 1e-8
    assert error(solvers.cg(matvec, v, solvers.CgSettings(ratio * largest, tol=1e-10)).solution, wanted) < 1e-6
    settings = solvers.LissaSettings(ratio * largest, depth=1000, tol=1e-9, acceleration="chebyshev", check_every=50)
    sampled = solvers.StochasticCurvature(curvature, lambda key: {"x": x}, matvec)
    assert error(solvers.lissa(sampled, v, keys[4], settings).solution, wanted) < 1e-6


# --- DataInf

SHAPES = {"layers": {"q": (2, 3, 2), "up": (2, 4)}, "head": (5,)}


def layered(count, seed):
  keys = iter(np.random.default_rng(seed).integers(1 << 30, size=3))
  draw = lambda shape: jnp.asarray(np.random.default_rng(next(keys)).normal(size=(count, *shape)))  # noqa: E731
  return jax.tree.map(draw, SHAPES, is_leaf=lambda leaf: isinstance(leaf, tuple))


def dense_datainf(v, g, damping_of, joined):
  """(1/n) sum_i (damping_l I + g_il g_il^T)^-1 v_l by dense solves, block by block."""
  q = {("head",): lambda t: t["head"]}
  for layer in range(2):
    if joined:
      q["layer", layer] = lambda t, k=layer: jnp.concatenate(
        [t["layers"]["q"][:, k].reshape(len(t["head"]), -1), t["layers"]["up"][:, k]], axis=1
      )
    else:
      q["q", layer] = lambda t, k=layer: t["layers"]["q"][:, k].reshape(len(t["head"]), -1)
      q["up", layer] = lambda t, k=layer: t["layers"]["up"][:, k]
  answers = {}
  for name, block in q.items():
    gs, vs = np.asarray(block(g)), np.asarray(block(v))
    lam = damping_of(gs)
    inverses = [np.linalg.solve(lam * np.eye(gs.shape[1]) + np.outer(one, one), vs.T).T for one in gs]
    answers[name] = (np.mean(inverses, axis=0), block)
  return answers


@pytest.mark.parametrize("granularity", ["matrix", "layer"])
@pytest.mark.parametrize("damping", [{"damping": 0.05}, {"damping": 3.0}, {"damping_ratio": 0.1}])
def test_datainf_equals_its_dense_definition(x64, granularity, damping):
  g, v = layered(7, 1), layered(3, 2)

  def batches():
    # Uneven cuts; padding rows hold garbage that must not count.
    for first, last in ((0, 1), (1, 5), (5, 7)):
      part = jax.tree.map(lambda leaf, a=first, b=last: leaf[a:b], g)
      pad = jax.tree.map(lambda leaf: jnp.full((4 - leaf.shape[0], *leaf.shape[1:]), jnp.nan), part)
      yield jax.tree.map(lambda a, b: jnp.concatenate([a, b]), part, pad), jnp.arange(4) < last - first

  source = solvers.ExampleGradients(lambda context, batch: batch, batches)
  settings = solvers.DataInfSettings(**damping, granularity=granularity)
  result = solvers.datainf(v, source, settings)

  def damping_of(rows):
    return damping.get("damping") or 0.1 * np.mean(np.sum(rows**2, axis=1)) / rows.shape[1]

  for name, (wanted, block) in dense_datainf(v, g, damping_of, granularity == "layer").items():
    np.testing.assert_allclose(np.asarray(block(result.solution)), wanted, rtol=1e-10, atol=1e-12, err_msg=str(name))
  assert result.steps == 3 and result.info["examples"] == 7 and not result.info["residual_measured"]


@pytest.mark.parametrize("microbatch", [1, 3, 7, 8])
def test_datainf_does_not_depend_on_the_microbatch(x64, microbatch):
  g, v = layered(7, 1), layered(3, 2)
  seen = []

  def function(context, part):
    seen.append(part[1].shape[0])
    return part

  batches = lambda: iter([(g, jnp.ones(7))])  # noqa: E731
  settings = solvers.DataInfSettings(damping_ratio=0.1)
  whole = solvers.datainf(v, solvers.ExampleGradients(lambda context, batch: batch, batches), settings)
  found = solvers.datainf(v, solvers.ExampleGradients(function, batches, microbatch=microbatch), settings)
  np.testing.assert_allclose(tree_math.ravel(found.solution), tree_math.ravel(whole.solution), rtol=1e-12)
  assert found.info["examples"] == 7 and max(seen) == min(microbatch, 7)


def test_datainf_residual_uses_each_blocks_damping(x64):
  g, v = layered(7, 1), layered(3, 2)
  rows = tree_math.ravel(g)
  h = rows.T @ rows / 7
  matvec = lambda u: tree_math.unravel(tree_math.ravel(u) @ h, u)  # noqa: E731
  source = solvers.ExampleGradients(lambda context, batch: batch, lambda: iter([(g, jnp.ones(7))]))
  result = solvers.datainf(v, source, solvers.DataInfSettings(damping_ratio=0.1), matvec)
  lam = result.info["block_damping"]
  diagonal = np.concatenate([lam["head"] * 5, np.repeat(lam["layers/q"], 6), np.repeat(lam["layers/up"], 4)])
  left = tree_math.ravel(result.solution) @ (h + np.diag(diagonal)) - tree_math.ravel(v)
  wanted = np.linalg.norm(left, axis=1) / np.linalg.norm(tree_math.ravel(v), axis=1)
  np.testing.assert_allclose(result.residual, wanted, rtol=1e-10)


def test_datainf_of_a_block_without_gradient(x64):
  # LoRA at its start: lora_b is 0, hence so are all gradients of lora_a.
  g, v = layered(7, 1), layered(3, 2)
  g["layers"]["up"] = g["layers"]["up"].at[:, 1].set(0)
  source = solvers.ExampleGradients(lambda context, batch: batch, lambda: iter([(g, jnp.ones(7))]))
  with pytest.raises(UserError, match=r"layers/up\[1\] has damping 0"):
    solvers.datainf(v, source, solvers.DataInfSettings(damping_ratio=0.1))
  v["layers"]["up"] = v["layers"]["up"].at[:, 1].set(0)
  result = solvers.datainf(v, source, solvers.DataInfSettings(damping_ratio=0.1))
  assert not np.asarray(result.solution["layers"]["up"][:, 1]).any()
  assert np.isfinite(tree_math.ravel(result.solution)).all()
  empty = solvers.ExampleGradients(lambda context, batch: batch, lambda: iter([(g, jnp.zeros(7))]))
  with pytest.raises(UserError, match="no example"):
    solvers.datainf(v, empty, solvers.DataInfSettings(0.1))


# --- low rank


def test_low_rank_is_exact_when_the_rank_fits(x64):
  v = queries()
  h = spectrum_matrix([3, 2, 1, 0.5] + [0] * 8)
  fitted = solvers.fit_low_rank(matrix_matvec(h), v, KEY, solvers.LowRankSettings(6))
  np.testing.assert_allclose(fitted.eigenvalues, [3, 2, 1, 0.5, 0, 0], atol=1e-10)
  gram = tree_math.ravel(fitted.vectors) @ tree_math.ravel(fitted.vectors).T
  np.testing.assert_allclose(gram, np.eye(6), atol=1e-12)
  for damping in (1e-3, 0.1, 2.0):
    result = solvers.low_rank(v, fitted, damping, matrix_matvec(h))
    assert error(result.solution, dense_solve(h, v, damping)) < 1e-8 and result.residual.max() < 1e-8


def test_low_rank_basis_stays_orthonormal(x64):
  # One pass of Gram-Schmidt loses it as soon as eigenvalues have converged.
  h = spectrum_matrix(np.geomspace(1, 1e-9, SIZE))
  fitted = solvers.fit_low_rank(matrix_matvec(h), queries(), KEY, solvers.LowRankSettings(SIZE))
  gram = tree_math.ravel(fitted.vectors) @ tree_math.ravel(fitted.vectors).T
  np.testing.assert_allclose(gram, np.eye(SIZE), atol=1e-13)


def test_low_rank_with_repeated_eigenvalues_and_truncation(x64):
  v = queries()
  h = spectrum_matrix([3, 3, 3, 1, 1, 1, 1, 1, 0.2, 0.2, 0.2, 0.2])
  fitted = solvers.fit_low_rank(matrix_matvec(h), v, KEY, solvers.LowRankSettings(SIZE))
  np.testing.assert_allclose(fitted.eigenvalues, np.linalg.eigvalsh(h)[::-1], atol=1e-10)
  assert error(solvers.low_rank(v, fitted, 0.1).solution, dense_solve(h, v, 0.1)) < 1e-9
  top = solvers.fit_low_rank(matrix_matvec(h), v, KEY, solvers.LowRankSettings(SIZE, rank=3))
  values, vectors = np.linalg.eigh(h)
  truncated = (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T
  assert error(solvers.low_rank(v, top, 0.1).solution, dense_solve(truncated, v, 0.1)) < 1e-9


def test_low_rank_bounds_its_errors_in_single_precision():
  # Many small eigenvalues below a few large ones: what is small is not rounding yet.
  size, steps = 1_000_000, 12
  h = jnp.asarray(np.r_[1, 0.6, 0.3, np.random.default_rng(0).uniform(0, 2e-3, size - 3)], jnp.float32)
  matvec = lambda v: {"x": h * v["x"]}  # noqa: E731
  fitted = solvers.fit_low_rank(matvec, {"x": jnp.zeros((1, size))}, KEY, solvers.LowRankSettings(steps))
  vectors = np.asarray(fitted.vectors["x"], np.float64)
  true = np.linalg.norm(vectors * np.asarray(h, np.float64) - fitted.eigenvalues[:, None] * vectors, axis=1)
  rounding = np.finfo(np.float32).eps * np.sqrt(size)  # of a scalar product of unit vectors
  assert np.all(true <= 1.01 * fitted.errors + rounding) and true.max() > 2e-4
  assert fitted.eigenvalues[3] > 0.0018 and np.all(np.diff(fitted.eigenvalues) < 0)


def test_low_rank_keeps_small_answers_in_single_precision():
  """v lies mostly in the space, where the answer is 1e5 times smaller than v / damping."""
  size, damping, rng = 200, 1e-5, np.random.default_rng(0)
  space = np.linalg.qr(rng.normal(size=(size, 8)))[0]
  h = ((space * np.linspace(0.3, 1, 8)) @ space.T).astype(np.float32)
  v = (rng.normal(size=(3, 8)) @ space.T + 1e-3 * rng.normal(size=(3, size)) / np.sqrt(size)).astype(np.float32)
  matvec = lambda x: {"x": jnp.dot(x["x"], h, precision="highest")}  # noqa: E731
  right = {"x": jnp.asarray(v)}
  fitted = solvers.fit_low_rank(matvec, right, KEY, solvers.LowRankSettings(10))
  result = solvers.low_rank(right, fitted, damping, matvec)
  found, dense = np.asarray(result.solution["x"], np.float64), h.astype(np.float64) + damping * np.eye(size)
  wanted = np.linalg.solve(dense, v.T.astype(np.float64)).T
  # Outside of the space, single precision of v itself is worth about eps / damping.
  assert np.all(np.linalg.norm(found - wanted, axis=1) < 2e-3 * np.linalg.norm(wanted, axis=1))
  inside = np.linalg.norm((found - wanted) @ space, axis=1) / np.linalg.norm(wanted @ space, axis=1)
  true = np.linalg.norm(found @ dense - v, axis=1) / np.linalg.norm(v, axis=1)
  assert inside.max() < 1e-5 and true.max() < 1e-5
  np.testing.assert_allclose(result.residual, true, atol=2e-6)


def test_low_rank_refuses_what_it_cannot_invert(x64):
  v, h = queries(), spectrum_matrix(np.linspace(-1, 1, SIZE))
  fitted = solvers.fit_low_rank(matrix_matvec(h), v, KEY, solvers.LowRankSettings(SIZE))
  with pytest.raises(solvers.NegativeCurvatureError, match="eigenvalue -1"):
    solvers.low_rank(v, fitted, 0.5)
  top = solvers.fit_low_rank(matrix_matvec(h), v, KEY, solvers.LowRankSettings(SIZE, rank=3))
  with pytest.raises(solvers.NegativeCurvatureError, match="eigenvalue -1"):  # cut off, and there all the same
    solvers.low_rank(v, top, 0.5)
  with pytest.raises(UserError, match="above 0"):
    solvers.low_rank(v, fitted, 0.0)
  with pytest.raises(UserError, match="at most 12"):
    solvers.fit_low_rank(matrix_matvec(h), v, KEY, solvers.LowRankSettings(13))


def test_the_steps_that_are_left_follow_from_the_residuals():
  curve = [(step, np.array([0.5**step, 0.0])) for step in range(5)]  # the second query is done
  assert solvers.steps_left(curve, 0.5**9, 100) == 5 and solvers.steps_left(curve, 0.5**9, 3) == 3
  assert solvers.steps_left(curve, 0.1, 100) == 0
  standing = [(step, np.array([0.5])) for step in range(5)]
  for unknown in ([], curve[:1], standing):
    assert solvers.steps_left(unknown, 1e-3, 17) == 17
  matrix, seen = jnp.asarray(spectrum_matrix(np.geomspace(1e-2, 1, SIZE))), []
  v, settings = queries(dtype=np.float32), solvers.CgSettings(0.1, 1e-6, 50)
  result = solvers.cg(lambda p: cut(join(p) @ matrix), v, settings, on_step=lambda curve: seen.append(curve[-1]))
  assert [step for step, _ in seen] == list(range(1, result.steps + 1))
