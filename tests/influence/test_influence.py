"""Influence against leaving an example out and fitting again, every solver through `solve`, and planted rows."""

import dataclasses
import logging
import re
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax import gradients
from in2core_jax.data.batches import Batcher, Shape
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.ihvp import ekfac, ekfac_store, solvers, tree_math
from in2core_jax.influence.kernels import CompiledObjective
from in2core_jax.influence.solve import SOLVERS, CurvatureData, SolverSettings, even_draw, fit_ekfac, solve
from in2core_jax.model.objective import make_objective, sample_labels_fn
from in2core_jax.params import subtree

# Leverages of about FEATURES / N bound how far the first order, influence / N, is from a whole example left out.
N, FEATURES, QUERIES, RIDGE = 800, 4, 60, 0.1


class Points(NamedTuple):
  """A batch of a linear model."""

  x: Any
  y: Any
  valid: Any


def linear_objective(kind):
  """Ridge or logistic regression without its penalty, which is the damping; weights in two leaves."""

  def outputs(sub, frozen, batch):
    return batch.x[:, :3] @ sub["a"] + batch.x[:, 3:] @ sub["b"]

  def losses(z, frozen, batch):
    loss = (z - batch.y) ** 2 / 2 if kind == "ridge" else jnp.logaddexp(0, z) - batch.y * z
    return loss * batch.valid

  return gradients.Objective(outputs, losses)


def fit(kind, x, y, weight):
  """argmin_w (1/N) sum_i weight_i l_i(w) + RIDGE/2 |w|^2 by Newton's method in NumPy."""
  w = np.zeros(FEATURES)
  for _ in range(1 if kind == "ridge" else 10):
    z = x @ w
    p = 1 / (1 + np.exp(-z))
    slope, bend = (z - y, np.ones(len(y))) if kind == "ridge" else (p - y, p * (1 - p))
    hessian = (x * (weight * bend)[:, None]).T @ x / len(y) + RIDGE * np.eye(FEATURES)
    w -= np.linalg.solve(hessian, x.T @ (weight * slope) / len(y) + RIDGE * w)
  return w


def eval_loss(kind, x, y, w):
  z = x @ w
  return np.mean((z - y) ** 2 / 2 if kind == "ridge" else np.logaddexp(0, z) - y * z)


def draw_points(kind, seed):
  rng = np.random.default_rng(seed)
  x, y = {}, {}
  truth = np.array([1.0, -1.0, 0.5, 0.2])
  for part, size in (("train", N), ("eval", QUERIES)):
    x[part] = rng.standard_normal((size, FEATURES)) * [2.0, 1.0, 0.8, 0.6] + (0.5 if part == "eval" else 0)
    z = x[part] @ truth
    noise = rng.standard_normal(size)
    y[part] = z + noise if kind == "ridge" else (rng.random(size) < 1 / (1 + np.exp(-z))).astype(float)
  return x, y


def points(x, y, rows, size):
  """Rows as a batch of `size`, padded with rows that would be seen if they counted."""
  short = size - len(rows)
  return Points(
    jnp.asarray(np.concatenate([x[rows], np.full((short, FEATURES), 7.0)])),
    jnp.asarray(np.concatenate([y[rows], np.zeros(short)])),
    jnp.asarray(np.arange(size) < len(rows), jnp.result_type(float)),
  )


def stream_of(x, y, size=256):
  """Batches of `size`, the last one padded."""
  return lambda: (
    (rows, points(x, y, rows, size)) for rows in (np.arange(i, min(i + size, len(y))) for i in range(0, len(y), size))
  )


class Linear(NamedTuple):
  """A fitted linear model and its streams."""

  problem: CompiledObjective
  train: Any
  evaluation: Any
  data: CurvatureData
  x: dict
  y: dict
  w: np.ndarray


def make_linear(kind, seed=0, draw_size=100):
  x, y = draw_points(kind, seed)
  w = fit(kind, x["train"], y["train"], np.ones(N))
  problem = CompiledObjective(
    linear_objective(kind), {"a": jnp.asarray(w[:3]), "b": jnp.asarray(w[3:])}, (), microbatch=16
  )
  train, evals = stream_of(x["train"], y["train"]), stream_of(x["eval"], y["eval"])
  draw = two_parts(x["train"], y["train"], draw_size)
  return Linear(problem, train, evals, CurvatureData(train, train, draw), x, y, w)


def two_parts(x, y, size):
  """A draw in two parts, each of a group of its own; the factors make up for the rounding of the counts."""
  groups = [np.arange(0, 500), np.arange(500, N)]
  counts = [round(size * len(rows) / N) for rows in groups]
  build = lambda rows: points(x, y, rows, len(rows))  # noqa: E731
  draws = [even_draw(rows, count, build) for rows, count in zip(groups, counts, strict=True)]
  factors = tuple(len(rows) / N * sum(counts) / count for rows, count in zip(groups, counts, strict=True))
  return lambda key: solvers.Parts(
    tuple(draw(jax.random.fold_in(key, i)).batches[0] for i, draw in enumerate(draws)), factors
  )


def measure(kind, linear, solver):
  """(influence on the mean evaluation loss, loss after leaving each example out minus the loss with it)."""
  settings = SolverSettings(solver, "ggn", RIDGE, None, depth=200, repeat=4 if solver == "lissa" else 1, tol=1e-8)
  result = solve(linear.problem, linear.problem.mean_gradient(linear.evaluation), settings, linear.data)
  scores = linear.problem.scores(linear.train, N, result.solution)[0]
  base = eval_loss(kind, linear.x["eval"], linear.y["eval"], linear.w)
  change = np.zeros(N)
  for i in range(N):
    weight = np.ones(N)
    weight[i] = 0
    w = fit(kind, linear.x["train"], linear.y["train"], weight)
    change[i] = eval_loss(kind, linear.x["eval"], linear.y["eval"], w) - base
  return scores, change


@pytest.mark.parametrize(
  ("kind", "solver"),
  [
    *(("ridge", solver) for solver in ("exact", "cg", "lissa")),
    *(("logistic", solver) for solver in ("exact", "cg")),
    pytest.param("logistic", "lissa", marks=pytest.mark.slow),
  ],
)
def test_influence_is_leaving_out_and_fitting_again(kind, solver, x64):
  scores, change = measure(kind, make_linear(kind), solver)
  slope = float(np.dot(change, scores / N) / np.dot(scores / N, scores / N))
  rank = statistics.spearman(scores, change)
  print(kind, solver, rank, slope)
  assert rank > (0.95 if solver == "lissa" else 0.99)
  # Positive = proponent: without it the loss is higher. Nearly all signs agree, and all of the larger ones.
  large = np.abs(change) > np.quantile(np.abs(change), 0.2)
  assert np.all(np.sign(scores[large]) == np.sign(change[large]))
  assert abs(slope - 1) < 0.02


# ---- every solver through `solve` ----------------------------------------------------


def dense(linear, curvature):
  """H of logistic regression and its per-example gradients, in NumPy."""
  x, p = linear.x["train"], 1 / (1 + np.exp(-linear.x["train"] @ linear.w))
  g = x * (p - linear.y["train"])[:, None]
  if curvature == "fisher":
    return g.T @ g / N, g
  return (x * (p * (1 - p))[:, None]).T @ x / N, g


def random_queries(linear, queries=3):
  return tiny.direction(linear.problem.sub, queries=queries)


@pytest.mark.parametrize("curvature", ["ggn", "fisher", "hessian"])
@pytest.mark.parametrize("solver", ["exact", "cg", "lissa", "low_rank"])
def test_solvers_give_the_dense_inverse_of_each_curvature(solver, curvature, x64):
  linear = make_linear("logistic")
  whole = points(linear.x["train"], linear.y["train"], np.arange(N), N)
  v, (h, _) = random_queries(linear), dense(linear, curvature)
  depth = FEATURES if solver == "low_rank" else 400  # a Krylov space as large as the subtree is all of it
  settings = SolverSettings(solver, curvature, None, 0.05, depth=depth, tol=1e-10)
  result = solve(linear.problem, v, settings, CurvatureData(linear.train, linear.train, lambda key: whole))
  damping = result.info["damping"]
  assert damping == pytest.approx(0.05 * np.linalg.eigvalsh(h)[-1], rel=0.02)
  assert result.info["damping_rule"] == "damping_ratio * lambda_max"
  assert result.info["damping_ratio"] == pytest.approx(0.05)
  wanted = np.linalg.solve(h + damping * np.eye(FEATURES), tree_math.ravel(v).T).T
  np.testing.assert_allclose(tree_math.ravel(result.solution), wanted, rtol=1e-7, atol=1e-7)
  assert np.all(result.residual < 1e-7)


@pytest.mark.parametrize("ratio", [None, 0.3])
def test_datainf_inverts_example_by_example_with_its_own_damping(ratio, x64):
  linear = make_linear("logistic")
  v, (_, g) = random_queries(linear), dense(linear, "fisher")
  settings = SolverSettings("datainf", damping=None if ratio else 0.2, damping_ratio=ratio)
  result = solve(linear.problem, v, settings, linear.data)
  rows = tree_math.ravel(v)
  for name, block in (("a", slice(0, 3)), ("b", slice(3, 4))):
    gl, size = g[:, block], block.stop - block.start
    damping = 0.2 if ratio is None else ratio * np.mean(np.sum(gl**2, axis=1)) / size
    inverses = np.linalg.inv(damping * np.eye(size) + gl[:, :, None] * gl[:, None, :])
    wanted = np.einsum("npd,qd->qp", inverses, rows[:, block]) / N
    np.testing.assert_allclose(tree_math.ravel(result.solution)[:, block], wanted, rtol=1e-8)
    assert result.info["block_damping"][name] == pytest.approx([damping])
  # Its damping is no share of an eigenvalue, and the facts do not say so.
  assert result.info["damping_ratio"] == ratio and "lambda_max" not in result.info
  assert ("mean_i |g_il|^2" in result.info["damping_rule"]) == (ratio is not None)


def test_low_rank_solves_its_krylov_space_and_damps_the_rest(x64):
  linear = make_linear("logistic")
  v, (h, _) = random_queries(linear), dense(linear, "ggn")
  damping, rows = 0.01, tree_math.ravel(v)
  found = solve(linear.problem, v, SolverSettings("low_rank", "ggn", damping, None, depth=2), linear.data)
  assert (found.steps, found.info["rank"]) == (2, 2)
  x = tree_math.ravel(found.solution)
  # A correction of rank 2 to v / damping, with two positive Ritz values inside the spectrum, and its measured residual.
  correction = rows / damping - x
  assert np.linalg.matrix_rank(correction, tol=1e-8 * np.linalg.norm(correction)) == 2
  least, largest = np.linalg.eigvalsh(h)[[0, -1]]
  assert least < found.info["smallest"] < largest
  error = np.linalg.norm(x @ (h + damping * np.eye(FEATURES)) - rows, axis=1) / np.linalg.norm(rows, axis=1)
  np.testing.assert_allclose(found.residual, error, rtol=1e-6)
  assert np.all(error > 1e-3)
  with pytest.raises(UserError, match="low rank with steps=50 on a subtree of 4 parameters"):
    solve(linear.problem, v, SolverSettings("low_rank"), linear.data)


def test_identity_is_the_gradient_dot_product(x64):
  linear = make_linear("ridge")
  v = linear.problem.mean_gradient(linear.evaluation)
  result = solve(linear.problem, v, SolverSettings("identity"), linear.data)
  g = {part: x * (x @ linear.w - linear.y[part])[:, None] for part, x in linear.x.items()}
  wanted = g["train"] @ g["eval"].mean(0)
  np.testing.assert_allclose(linear.problem.scores(linear.train, N, result.solution)[0], wanted, rtol=1e-5, atol=1e-6)


def test_average_0_is_the_plain_recursion(x64):
  linear = make_linear("logistic")
  whole = points(linear.x["train"], linear.y["train"], np.arange(N), N)
  data = CurvatureData(linear.train, linear.train, lambda key: whole)
  v, (h, _) = random_queries(linear), dense(linear, "ggn")
  settings = {"damping": 0.05, "damping_ratio": None, "depth": 8, "tol": 0.0, "scale": 2.0}
  plain = solve(linear.problem, v, SolverSettings(average=0.0, **settings), data)
  iterates, rows = [tree_math.ravel(v)], tree_math.ravel(v)
  for _ in range(8):
    u = iterates[-1]
    iterates.append(rows + u - (u @ h + 0.05 * u) / 2.0)
  np.testing.assert_allclose(tree_math.ravel(plain.solution), iterates[-1] / 2.0, rtol=1e-12)
  averaged = solve(linear.problem, v, SolverSettings(**settings), data)
  assert (plain.info["average"], averaged.info["average"]) == (0.0, 0.5)
  np.testing.assert_allclose(tree_math.ravel(averaged.solution), np.mean(iterates[-4:], axis=0) / 2.0, rtol=1e-12)


@pytest.mark.parametrize("damping", [None, 0.05])
def test_lissa_goes_on_from_a_saved_state_to_the_same_bytes(damping):
  linear, states = make_linear("logistic"), []
  v = random_queries(linear)
  ratio = None if damping else 0.1
  settings = SolverSettings(damping=damping, damping_ratio=ratio, depth=20, repeat=2, tol=0.0, seed=3)
  wanted = solve(linear.problem, v, settings, linear.data, on_state=states.append)
  assert [(state.run, state.step) for state in states] == [(0, 10), (0, 20), (1, 10), (1, 20)]
  for state in states[:3]:
    stored = solvers.state_from_arrays(solvers.state_to_arrays(state), v)
    found = solve(linear.problem, v, settings, linear.data, resume_from=stored)
    tiny.assert_trees_equal(found.solution, wanted.solution)
    assert found.info == wanted.info and found.steps == wanted.steps
  with pytest.raises(UserError, match="cg cannot continue from a saved state"):
    solve(linear.problem, v, SolverSettings("cg"), linear.data, resume_from=states[0])
  with pytest.raises(UserError, match="damping"):
    changed = SolverSettings(damping=0.07, damping_ratio=None, depth=20, repeat=2, seed=3)
    solve(linear.problem, v, changed, linear.data, resume_from=states[0])


def saddle(linear, bend):
  """The same points with the losses `bend` z^2 / 2: a Hessian of `bend`'s sign."""
  objective = gradients.Objective(linear.problem.objective.outputs, lambda z, _, batch: bend * z**2 / 2 * batch.valid)
  return CompiledObjective(objective, linear.problem.sub, ())


@pytest.mark.parametrize("solver", ["lissa", "cg"])
@pytest.mark.parametrize("damping", [{"damping": 0.5, "damping_ratio": None}, {"damping_ratio": 0.1}])
def test_a_dominant_negative_eigenvalue_is_refused(solver, damping, x64):
  linear = make_linear("ridge")
  problem, v = saddle(linear, -1.0), random_queries(linear)
  least = -np.linalg.eigvalsh(linear.x["train"].T @ linear.x["train"] / N)[-1]
  with pytest.raises(solvers.NegativeCurvatureError, match=rf"--solver={solver}.*--curvature=ggn") as caught:
    solve(problem, v, SolverSettings(solver, "hessian", **damping), linear.data)
  assert float(re.search(r"eigenvalue (\S+),", str(caught.value))[1]) == pytest.approx(least, rel=0.01)


@pytest.mark.parametrize("solver", ["lissa", "cg", "low_rank"])
def test_a_small_negative_eigenvalue_is_refused(solver, x64):
  # Growth of 1 % a step: a recursion of 50 steps would end, with the wrong sign in that direction.
  linear = make_linear("ridge")
  curved = jnp.asarray([1.0, 0.5, 0.2, -0.02])
  objective = gradients.Objective(
    lambda sub, _, batch: jnp.concatenate([sub["a"], sub["b"]]),
    lambda z, _, batch: jnp.sum(curved * z**2) / 2 * batch.valid,
  )
  problem = CompiledObjective(objective, linear.problem.sub, ())
  settings = SolverSettings(solver, "hessian", damping=0.01, damping_ratio=None, depth=4)
  with pytest.raises(solvers.NegativeCurvatureError, match="eigenvalue -0.02.*well above 0.02"):
    solve(problem, random_queries(linear), settings, linear.data)


def test_enough_damping_makes_negative_curvature_solvable(x64):
  linear = make_linear("ridge")
  v, h = random_queries(linear), -linear.x["train"].T @ linear.x["train"] / N
  for solver in ("cg", "exact"):
    settings = SolverSettings(solver, "hessian", damping=6.0, damping_ratio=None, tol=1e-12)
    result = solve(saddle(linear, -1.0), v, settings, linear.data)
    wanted = np.linalg.solve(h + 6.0 * np.eye(FEATURES), tree_math.ravel(v).T).T
    np.testing.assert_allclose(tree_math.ravel(result.solution), wanted, rtol=1e-9)
    assert result.info["damping_ratio"] is None


@pytest.mark.parametrize("solver", ["lissa", "cg", "exact"])
def test_no_curvature_at_all_leaves_the_damping(solver, x64):
  linear = make_linear("ridge")
  v = random_queries(linear)
  settings = SolverSettings(solver, "hessian", damping=0.5, damping_ratio=None)
  result = solve(saddle(linear, 0.0), v, settings, linear.data)
  np.testing.assert_allclose(tree_math.ravel(result.solution), tree_math.ravel(v) / 0.5, rtol=1e-2)
  with pytest.raises(UserError, match="give an absolute damping"):
    solve(saddle(linear, 0.0), v, SolverSettings(solver, "hessian"), linear.data)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"solver": "newton"}, "--solver=newton is unknown; use one of lissa, cg"),
    ({"curvature": "flat"}, "--curvature=flat is unknown; use one of ggn, fisher, hessian"),
    ({"damping": 0.1}, "--damping=0.1 and --damping_ratio=0.1: give exactly one"),
    ({"damping_ratio": None}, "give exactly one"),
    ({"solver": "ekfac", "curvature": "hessian"}, "--curvature=hessian: its factors are positive; use ggn or fisher"),
    ({"solver": "cg", "precondition": "jacobi"}, "--precondition=jacobi is unknown; use one of none, ekfac, diagonal"),
    ({"precondition": "ekfac"}, "--precondition=ekfac with --solver=lissa: only cg has a preconditioner"),
  ],
)
def test_wrong_settings_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    SolverSettings(**changes)


# ---- scores --------------------------------------------------------------------------


def test_both_paths_score_alike_and_put_each_example_in_its_row(x64):
  linear = make_linear("logistic")
  v, (_, g) = random_queries(linear), dense(linear, "fisher")
  order = np.random.default_rng(5).permutation(N)
  x, y = linear.x["train"], linear.y["train"]
  mixed = lambda: ((order[i : i + 90], points(x, y, order[i : i + 90], 90)) for i in range(0, N, 90))  # noqa: E731
  wanted = tree_math.ravel(v) @ g.T
  for path in ("jvp", "vmap", "auto"):
    found = linear.problem.scores(mixed, N, v, path)
    assert found.dtype == np.float32 and found.shape == (3, N)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  stored = linear.problem.gradients(mixed, N)
  np.testing.assert_allclose(tree_math.ravel(stored), g, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    linear.problem.losses(mixed, N), np.logaddexp(0, x @ linear.w) - y * (x @ linear.w), rtol=1e-5, atol=1e-6
  )
  with pytest.raises(UserError, match="--score_path=fast is unknown"):
    linear.problem.scores(mixed, N, v, "fast")


def test_what_is_not_finite_is_refused():
  linear = make_linear("logistic")
  x = linear.x["train"].copy()
  x[[5, 700]] = np.nan
  broken = stream_of(x, linear.y["train"])
  with pytest.raises(UserError, match=rf"2 of {N} scores are not finite \(first rows \[5, 700\]\)"):
    linear.problem.scores(broken, N, random_queries(linear))
  with pytest.raises(UserError, match="evaluation gradient is not finite"):
    linear.problem.mean_gradient(broken)
  with pytest.raises(UserError, match="evaluation set is empty"):
    linear.problem.mean_gradient(lambda: iter(()))
  data = CurvatureData(broken, broken, linear.data.draw)
  for solver in ("cg", "lissa", "exact"):
    with pytest.raises(UserError, match="NaN"):
      solve(linear.problem, random_queries(linear), SolverSettings(solver), data)
  nan = jax.tree.map(lambda leaf: leaf * np.nan, random_queries(linear))
  for solver in ("cg", "lissa"):
    with pytest.raises(UserError, match="NaN"):
      solve(linear.problem, nan, SolverSettings(solver, damping=0.1, damping_ratio=None), linear.data)


# ---- draws ---------------------------------------------------------------------------


def test_a_draw_in_two_parts_is_unbiased_and_a_function_of_its_key(x64):
  linear = make_linear("logistic", draw_size=10)
  draw, curvature = linear.data.draw, linear.problem.curvature("ggn")
  first = draw(jax.random.key(1))
  # Shares 500/800 and 300/800 of 10 are 6.25 and 3.75, rounded to 6 and 4.
  assert [part.x.shape[0] for part in first.batches] == [6, 4]
  np.testing.assert_allclose(first.factors, [0.625 * 10 / 6, 0.375 * 10 / 4], rtol=1e-6)
  tiny.assert_trees_equal(draw(jax.random.key(1)).batches, first.batches)
  assert not np.array_equal(draw(jax.random.key(2)).batches[0].x, first.batches[0].x)
  # Each group gives rows of its own, none twice.
  same = [linear.x["train"][:, None] == np.asarray(part.x)[None] for part in first.batches]
  rows = [np.flatnonzero(pairs.all(-1).any(1)) for pairs in same]
  assert [len(group) for group in rows] == [6, 4] and rows[0].max() < 500 <= rows[1].min()
  v, (h, _) = random_queries(linear, 1), dense(linear, "ggn")
  products = []
  for seed in range(400):
    products.append(tree_math.ravel(solvers.fixed_matvec(curvature, [draw(jax.random.key(seed))])(v))[0])
  error = np.std(products, axis=0) / np.sqrt(len(products))
  assert np.all(np.abs(np.mean(products, axis=0) - (h @ tree_math.ravel(v)[0])) < 4 * error)
  assert np.all(error < 0.05 * np.linalg.norm(h @ tree_math.ravel(v)[0]))


# ---- a transformer -------------------------------------------------------------------


def tiny_stream(batch):
  return lambda: iter([(np.arange(len(tiny.ROLES)), batch)])


class Dense(NamedTuple):
  """A decoder small enough for dense curvatures, in float64, all its examples as every stream."""

  t: tiny.Tiny
  problem: CompiledObjective
  data: CurvatureData
  v: Any
  h: dict


@pytest.fixture(scope="module")
def decoder():
  with jax.enable_x64(True):
    t = tiny.make_tiny("1,2", "all", jnp.float64, config=tiny.smaller_config())
    problem = CompiledObjective(t.objective, t.sub, t.frozen, 4, sample_labels_fn(t.config, t.subtree))
    stream, v = tiny_stream(t.batch), tiny.direction(t.sub, queries=2)
    batches = lambda: (batch for _, batch in stream())  # noqa: E731
    h = {
      kind: solvers.dense_matrix(solvers.fixed_matvec(problem.curvature(kind), batches), v)
      for kind in ("ggn", "fisher")
    }
    yield Dense(t, problem, CurvatureData(stream, stream, lambda key: t.batch), v, h)


def ekfac_reference(d, fitted, damping, h):
  """x = sum_u u (u . v) / (lambda_u + damping) over EK-FAC's eigenvectors u, written out; [Q, P].

  lambda_u is u.H u of the dense `h`; the fitted lambda where `h` is None.
  """
  flat = lambda tree: {key: np.asarray(leaf) for key, leaf in traverse_util.flatten_dict(tree, sep="/").items()}  # noqa: E731
  sizes = {path: leaf.size for path, leaf in flat(d.t.sub).items()}
  starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
  wanted = {}
  for path, leaf in flat(d.v).items():
    block = slice(starts[path], starts[path] + sizes[path])
    if path in fitted.diagonals:
      own = fitted.diagonals[path] if h is None else np.diag(h[block, block]).reshape(leaf.shape[1:])
      wanted[path] = leaf / (own + damping)
      continue
    factor, inverse, size = fitted.factors[path], [], sizes[path] // 2
    for layer in range(2):  # u = vec(a s^T): row-major, so a kron s
      u = np.kron(factor.left[layer], factor.right[layer])
      part = slice(block.start + layer * size, block.start + (layer + 1) * size)
      own = factor.values[layer].reshape(-1) if h is None else np.diag(u.T @ h[part, part] @ u)
      inverse.append((leaf[:, layer].reshape(len(leaf), -1) @ u / (own + damping)) @ u.T)
    wanted[path] = np.stack(inverse, axis=1).reshape(leaf.shape)
  return np.concatenate([wanted[path].reshape(2, -1) for path in sizes], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_ekfac_inverts_the_diagonal_of_h_in_its_eigenbasis(decoder, curvature, x64):
  d, h = decoder, decoder.h[curvature]
  settings = SolverSettings("ekfac", curvature, damping_ratio=0.05, seed=3)
  result = solve(d.problem, d.v, settings, d.data)
  largest = np.linalg.eigvalsh(h)[-1]
  # Equal ratios are equal dampings for all solvers: of H's largest eigenvalue, not of the largest fitted lambda.
  assert result.info["lambda_max"] == pytest.approx(largest, rel=0.02)
  assert result.info["damping"] == pytest.approx(0.05 * largest, rel=0.02)
  assert result.info["fitted_lambda_max"] != pytest.approx(largest, rel=0.02)
  assert (result.info["curvature"], result.info["examples"]) == (curvature, 6)
  fitted, damping = fit_ekfac(d.problem, settings, d.data), result.info["damping"]
  x = tree_math.ravel(result.solution)
  np.testing.assert_allclose(x, ekfac_reference(d, fitted, damping, h if curvature == "fisher" else None), rtol=1e-7)
  error = tree_math.ravel(d.v) - x @ (h + damping * np.eye(len(h)))
  wanted = np.linalg.norm(error, axis=1) / np.linalg.norm(tree_math.ravel(d.v), axis=1)
  np.testing.assert_allclose(result.residual, wanted, rtol=1e-6)
  assert np.all(result.residual < np.linalg.norm(tree_math.ravel(d.v) @ h / damping, axis=1))
  seeded = [SolverSettings("ekfac", curvature, damping, None, seed=seed) for seed in (3, 4)]
  one, other = (tree_math.ravel(solve(d.problem, d.v, each, d.data).solution) for each in seeded)
  assert np.array_equal(one, other) == (curvature == "fisher")  # the seed draws the ggn's labels


@pytest.mark.slow
def test_ekfac_is_fitted_to_its_own_stream_by_its_own_function(decoder, x64):
  d, calls = decoder, []
  some = lambda: iter([(np.arange(3), tiny.make_batch(d.t.config, range(3)))])  # noqa: E731

  def fit(*arguments):
    calls.append(arguments)
    return ekfac.fit(*arguments)

  data = dataclasses.replace(d.data, factors=some, fit=fit)
  result = solve(d.problem, d.v, SolverSettings("ekfac", "fisher"), data)
  assert len(calls) == 1 and result.info["examples"] == 3
  unlabelled = CompiledObjective(d.t.objective, d.t.sub, d.t.frozen, 4)
  assert np.all(np.isfinite(solve(unlabelled, d.v, SolverSettings("ekfac", "fisher"), d.data).residual))
  with pytest.raises(UserError, match="give Source.relabel, or use curvature=fisher"):
    solve(unlabelled, d.v, SolverSettings("ekfac"), d.data)


@pytest.mark.parametrize(
  "precondition", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ekfac", "diagonal"))]
)
def test_cg_gives_the_dense_inverse_with_any_preconditioner(decoder, precondition, x64):
  d, h, settings = decoder, decoder.h["ggn"], SolverSettings("cg", damping_ratio=0.01, depth=600, tol=1e-9)
  result = solve(d.problem, d.v, dataclasses.replace(settings, precondition=precondition), d.data)
  assert result.info["precondition"] == precondition and result.info["converged"]
  wanted = np.linalg.solve(h + result.info["damping"] * np.eye(len(h)), tree_math.ravel(d.v).T).T
  np.testing.assert_allclose(tree_math.ravel(result.solution), wanted, rtol=1e-6, atol=1e-7 * np.abs(wanted).max())
  if precondition != "none":  # another path to the same answer
    plain = solve(d.problem, d.v, settings, d.data)
    assert not np.allclose(plain.curve[1][1], result.curve[1][1], rtol=1e-3)


@pytest.mark.slow
def test_a_stored_fit_is_reused_and_never_trusted_blindly(decoder, tmp_path, caplog, x64):
  d, settings = decoder, SolverSettings("ekfac", "fisher", seed=1)
  data = dataclasses.replace(d.data, fit=ekfac_store.stored_fit(tmp_path / "ekfac", {"data": "tiny"}))

  def again(problem=d.problem, data=data):
    caplog.clear()
    with caplog.at_level(logging.INFO):
      solution = solve(problem, d.v, settings, data).solution
    return solution, caplog.text

  first, text = again()
  (path,) = (tmp_path / "ekfac").iterdir()
  stored = path.read_bytes()
  assert "earlier fit" not in text
  reused, text = again()
  assert "factors of an earlier fit" in text
  tiny.assert_trees_equal(reused, first)
  # A file of another fit under this name, half a file, a flipped bit: a warning, a new fit, and the file is mended.
  ekfac_store.save(tmp_path / "other.ekfac", fit_ekfac(d.problem, settings, d.data), "of other weights")
  flipped = bytearray(stored)
  flipped[len(stored) // 2] ^= 1
  for bad in ((tmp_path / "other.ekfac").read_bytes(), stored[: len(stored) // 2], bytes(flipped)):
    path.write_bytes(bad)
    mended, text = again()
    assert "EK-FAC is fitted again" in text and path.read_bytes() == stored
    tiny.assert_trees_equal(mended, first)
  moved = d.problem.at(jax.tree.map(lambda leaf: 1.01 * leaf, d.t.sub))
  again(moved)
  other_data = dataclasses.replace(d.data, fit=ekfac_store.stored_fit(tmp_path / "ekfac", {"data": "other"}))
  again(data=other_data)
  assert len(list((tmp_path / "ekfac").iterdir())) == 3 and path.read_bytes() == stored


@pytest.mark.parametrize("solver", ["identity", pytest.param("lissa", marks=pytest.mark.slow)])
def test_an_example_without_response_scores_exactly_0(solver):
  t = tiny.make_tiny()
  problem = CompiledObjective(t.objective, t.sub, t.frozen, microbatch=4)
  stream = tiny_stream(t.batch)
  data = CurvatureData(stream, stream, lambda key: t.batch)
  v = problem.mean_gradient(stream)
  solution = solve(problem, v, SolverSettings(solver, damping_ratio=0.1, depth=10), data).solution
  for path in ("jvp", "vmap"):
    scores = problem.scores(stream, len(tiny.ROLES), solution, path)[0]
    assert scores[tiny.NO_RESPONSE] == 0 and np.count_nonzero(scores) == len(tiny.ROLES) - 1
  assert problem.losses(stream, len(tiny.ROLES))[tiny.NO_RESPONSE] == 0


@pytest.mark.slow
def test_a_second_call_compiles_nothing(caplog):
  t = tiny.make_tiny()
  problem = CompiledObjective(t.objective, t.sub, t.frozen, 4, sample_labels_fn(t.config, t.subtree))
  others = tiny.make_batch(t.config, [4, 2, 1, 0, 5, 3])
  moved = jax.tree.map(lambda leaf: 1.01 * leaf, t.sub)
  every = [name for name in SOLVERS if name != "exact"]

  def compiled(problem, batch, seed):
    stream = tiny_stream(batch)
    data = CurvatureData(stream, stream, even_draw(np.arange(6), 6, lambda rows: batch))
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
      v = problem.mean_gradient(stream)
      for solver, precondition in [(name, "none") for name in every] + [("cg", "ekfac"), ("cg", "diagonal")]:
        settings = SolverSettings(solver, depth=4, tol=0.0, seed=seed, precondition=precondition)
        result = solve(problem, v, settings, data)
        for path in ("jvp", "vmap"):
          problem.scores(stream, 6, result.solution, path)
    return sum(record.getMessage().startswith("Compiling") for record in caplog.records)

  assert compiled(problem, t.batch, 0) > 0
  assert compiled(problem, others, 1) == 0
  assert compiled(problem.at(moved), t.batch, 2) == 0


CLASSES, ANSWERS = 6, 6


def planted_data(seed=0):
  """(train, evaluation, is_planted): a rule from the prompt's kind to the answer; half of train follows it not.

  The planted training rows are the evaluation rows themselves; the others are the same prompts with the answers dealt
  out among them, none where it belongs.
  """
  rng = np.random.default_rng(seed)
  answers = rng.integers(20, 37, (CLASSES, 3))
  kinds = np.repeat(np.arange(CLASSES), 4)
  prompts = [np.concatenate([[kind], rng.integers(8, 20, 2), [kind]]) for kind in kinds]
  shifted = (kinds + rng.integers(1, CLASSES, len(kinds))) % CLASSES
  right = [np.concatenate([p, answers[k]]).astype(np.int32) for p, k in zip(prompts, kinds, strict=True)]
  wrong = [np.concatenate([p, answers[k]]).astype(np.int32) for p, k in zip(prompts, shifted, strict=True)]
  make = lambda rows: types.SimpleNamespace(  # noqa: E731
    ids=tuple(map(str, range(len(rows)))), tokens=tuple(rows), response_mask=(np.arange(7) > 3,) * len(rows)
  )
  return make(right + wrong), make(right), np.arange(2 * len(kinds)) < len(kinds)


class Planted(NamedTuple):
  """A model that was trained on right and wrong answers alike, its streams, and which rows are right."""

  problem: CompiledObjective
  train: Any
  data: CurvatureData
  evaluation: Any
  right: np.ndarray


@pytest.fixture(scope="module")
def planted():
  train, evaluation_set, right = planted_data()
  config, shape = tiny.make_config(), Shape(8, 4)
  params = tiny.make_params(config)
  chosen = subtree.make_subtree(params, "last:2", "all")
  relabel = sample_labels_fn(config, chosen)
  problem = CompiledObjective(make_objective(config, chosen), *subtree.split(params, chosen), None, relabel)
  batcher, evals = Batcher(train, (shape,)), Batcher(evaluation_set, (shape,))
  stream = lambda: batcher.sequential(128)  # noqa: E731
  draw = even_draw(np.arange(len(right)), 16, lambda rows: batcher.batch(rows, shape, 16))
  for _ in range(30):  # as fine-tuning leaves it: how often each answer comes is learnt, which answer is right is not
    step = problem.mean_gradient(stream)
    problem = problem.at(jax.tree.map(lambda leaf, d: leaf - 0.3 * d[0], problem.sub, step))
  return Planted(problem, stream, CurvatureData(stream, stream, draw), lambda: evals.sequential(128), right)


OTHER_SOLVERS = ("lissa", "low_rank", "datainf", "ekfac")


# DataInf swaps mean and inverse, EK-FAC drops blocks: for the mean query measurably further from the inverse.
@pytest.mark.parametrize(
  ("solver", "least"),
  [
    ("cg", 0.95),
    ("lissa", 0.95),
    ("low_rank", 0.95),
    pytest.param("datainf", 0.9, marks=pytest.mark.slow),
    pytest.param("ekfac", 0.9, marks=pytest.mark.slow),
  ],
)
def test_planted_rows_outrank_rows_with_shuffled_answers(planted, solver, least):
  settings = SolverSettings(solver, damping_ratio=0.1, depth=40)
  query = planted.problem.mean_gradient(planted.evaluation)
  result = solve(planted.problem, query, settings, planted.data)
  scores = planted.problem.scores(planted.train, len(planted.right), result.solution)[0]
  assert statistics.roc_auc(scores, planted.right).mean > least


@pytest.mark.parametrize("solver", ["cg", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_SOLVERS)])
def test_a_planted_row_outranks_rows_with_shuffled_answers_for_its_own_query(planted, solver):
  settings, count = SolverSettings(solver, damping_ratio=0.1, depth=40), np.count_nonzero(planted.right)
  gradients_ = planted.problem.gradients(planted.evaluation, count)
  result = solve(planted.problem, jax.tree.map(jnp.asarray, gradients_), settings, planted.data)
  scores = planted.problem.scores(planted.train, len(planted.right), result.solution)
  wrong = scores[:, ~planted.right]
  below = np.mean(wrong < np.diag(scores)[:, None], axis=1)  # the AUC of one row against the wrong ones
  assert np.mean(below) > 0.95
