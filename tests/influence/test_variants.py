"""Normalised scores, self-influence, TracIn and LESS against a loop of `jax.grad`, dense inverses and Adam itself."""

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax import gradients
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.ihvp import ekfac, low_rank, tree_math
from in2core_jax.influence import normalize, trajectory
from in2core_jax.influence.kernels import CompiledObjective
from in2core_jax.influence.trajectory import AdamDirection, Checkpoint
from in2core_jax.params import moment_probes
from in2core_jax.training.recipe import Recipe, make_optimizer

N, FEATURES, WIDTH, SILENT = 7, 4, 3, 2
P = FEATURES * WIDTH + WIDTH
ANSWERED = np.arange(N) != SILENT
# The same examples in one batch, in two of other orders and padding, one by one.
CUTS = {
  "whole": [(range(N), 10)],
  "mixed": [((4, 1, 3), 5), ((5, 0, 2, 6), 5)],
  "single": [((i,), 1) for i in (3, 0, 6, 5, 1, 2, 4)],
}
DAMPING = 0.05


# ---- a small network -----------------------------------------------------------------


class Points(NamedTuple):
  """A batch of the network; an example without weight is one without response."""

  x: Any
  y: Any
  weight: Any
  valid: Any


def outputs(sub, frozen, batch):
  module = sub["first"]
  y = batch.x @ module["kernel"]
  if "kernel_probe" in module:
    y = moment_probes.observe(batch.x, y, module["kernel_probe"])
  return jnp.tanh(y) @ sub["second"]


def losses(z, frozen, batch):
  return (jnp.logaddexp(0, z) - batch.y * z) * batch.weight * batch.valid * frozen["factor"]


NETWORK = gradients.Objective(outputs, losses)


def make_points(size=N, seed=0):
  """(x, y, weight) of examples that the network can learn; the one of SILENT has no response."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((size, FEATURES))
  y = (x @ [1.0, -2.0, 1.0, 0.5] > 0).astype(float)
  return x, y, np.where(np.arange(size) == SILENT, 0.0, rng.uniform(0.5, 1.5, size))


def make_stream(cuts="whole", data=None):
  """Batches cut as CUTS says, padded with rows that would be seen if they counted."""
  x, y, weight = data or make_points()

  def stream():
    for rows, size in CUTS[cuts] if isinstance(cuts, str) else cuts:
      rows, short = np.asarray(rows), size - len(rows)
      parts = [np.concatenate([v[rows], np.full((short, *v.shape[1:]), 7)]) for v in (x, y, weight)]
      yield rows, jax.tree.map(jnp.asarray, Points(*parts, np.arange(size) < len(rows)))

  return stream


def make_problem(microbatch=4, factor=1.0):
  rng = np.random.default_rng(1)
  sub = {"first": {"kernel": rng.standard_normal((FEATURES, WIDTH))}, "second": rng.standard_normal(WIDTH)}
  return CompiledObjective(NETWORK, jax.tree.map(jnp.asarray, sub), {"factor": jnp.asarray(factor)}, microbatch)


class Dense(NamedTuple):
  """What a loop of `jax.grad` says about the examples."""

  problem: CompiledObjective
  g: np.ndarray  # [N, P]
  losses: np.ndarray
  directions: Any
  fisher: np.ndarray  # [P, P]
  inverse: np.ndarray  # (Fisher + DAMPING I)^-1


def make_dense(problem, stream, size):
  found = []
  for _, batch in stream():
    loss = lambda s, one: jnp.sum(gradients.per_example_losses(problem.objective, s, problem.frozen, one))  # noqa: E731
    both = jax.jit(jax.value_and_grad(loss))
    found += [both(problem.sub, jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)) for i in range(size)]
  g = np.concatenate([tree_math.ravel(jax.tree.map(lambda leaf: leaf[None], gradient)) for _, gradient in found])
  fisher = g.T @ g / size
  inverse = np.linalg.inv(fisher + DAMPING * np.eye(g.shape[1]))
  values = np.array([float(value) for value, _ in found])
  return Dense(problem, g, values, tiny.direction(problem.sub, queries=3), fisher, inverse)


@pytest.fixture
def dense(x64):
  return make_dense(make_problem(), make_stream(), N)


def apply_matrix(matrix, g):
  """A dense symmetric matrix [P, P] as the function of a GradientMap."""
  leaves, structure = jax.tree.flatten(g)
  rows = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1) @ matrix
  cuts = np.cumsum([leaf[0].size for leaf in leaves])[:-1]
  parts = jnp.split(rows, cuts, axis=1)
  return jax.tree.unflatten(structure, [p.reshape(leaf.shape) for p, leaf in zip(parts, leaves, strict=True)])


def with_matrix(matrix):
  return normalize.GradientMap(apply_matrix, jnp.asarray(matrix))


def assert_measures(found, dense, matrix):
  """Everything that is measured, against its definition in NumPy."""
  r, mapped = tree_math.ravel(dense.directions), dense.g @ matrix
  wanted = {
    "scores": r @ dense.g.T,
    "losses": dense.losses,
    "norms": np.linalg.norm(dense.g, axis=1),
    "self_influence": np.sum(dense.g * mapped, axis=1),
    "inverse_norms": np.linalg.norm(mapped, axis=1),
    "direction_norms": np.linalg.norm(r, axis=1),
  }
  for name, values in wanted.items():
    np.testing.assert_allclose(getattr(found, name), values, rtol=1e-9, atol=1e-12, err_msg=name)


# ---- what is measured ----------------------------------------------------------------


@pytest.mark.parametrize("cuts", list(CUTS))
@pytest.mark.parametrize("microbatch", [None, 1, 3, 4])
def test_measures_are_a_loop_of_grad_however_the_data_is_cut(dense, cuts, microbatch):
  found = normalize.measure(
    make_problem(microbatch), make_stream(cuts), N, dense.directions, with_matrix(dense.inverse)
  )
  assert_measures(found, dense, dense.inverse)


def test_measures_of_the_decoder_are_a_loop_of_grad(x64):
  """With its flat response slots, which one example at a time has to do without."""
  t = tiny.make_tiny("1,2", "all", jnp.float64, config=tiny.smaller_config())
  problem, size = CompiledObjective(t.objective, t.sub, t.frozen, microbatch=3), len(tiny.ROLES)
  stream = lambda: iter([(np.arange(size), t.batch)])  # noqa: E731
  without = t.batch._replace(slots=None)
  dense = make_dense(problem, lambda: iter([(None, without)]), size)
  assert normalize.observes(problem) and not normalize.observes(problem, with_matrix(dense.inverse))
  for inverse, matrix in ((with_matrix(dense.inverse), dense.inverse), (normalize.IDENTITY, np.eye(dense.g.shape[1]))):
    found = normalize.measure(problem, stream, size, dense.directions, inverse)
    assert_measures(found, dense, matrix)
    for values in (found.losses, found.norms, found.self_influence, normalize.cosine(found)[0]):
      assert values[tiny.NO_RESPONSE] == 0 and np.count_nonzero(values) == size - 1


def self_influence(problem, stream, size, inverse=normalize.IDENTITY):
  """g_i . M g_i of every example."""
  return normalize.measure(problem, stream, size, None, inverse).self_influence


def test_without_an_inverse_self_influence_is_the_squared_norm(dense):
  found = normalize.measure(dense.problem, make_stream(), N, dense.directions)
  assert_measures(found, dense, np.eye(P))
  alone = self_influence(dense.problem, make_stream("mixed"), N)
  np.testing.assert_allclose(alone, np.sum(dense.g**2, axis=1), rtol=1e-10)


def test_scores_are_those_of_the_problem(dense):
  """The unnormalised score is the score of the pipeline, so that a variant differs by its normalisation alone."""
  stream = make_stream()
  found = normalize.measure(dense.problem, stream, N, dense.directions)
  for path in ("jvp", "vmap"):
    np.testing.assert_allclose(found.scores, dense.problem.scores(stream, N, dense.directions, path), rtol=1e-6)


def ekfac_matrix(fitted, damping):
  """The inverse that EK-FAC applies, dense [P, P], from its eigenvectors and eigenvalues."""
  factor = fitted.factors["first/kernel"]
  basis = np.kron(factor.left, factor.right)
  matrix = np.diag(np.append(np.zeros(FEATURES * WIDTH), 1 / (fitted.diagonals["second"] + damping)))
  matrix[: FEATURES * WIDTH, : FEATURES * WIDTH] = (basis / (np.ravel(factor.values) + damping)) @ basis.T
  return matrix


def fit_ekfac(problem, stream):
  source = ekfac.Source(problem.objective, problem.sub, problem.frozen, stream)
  return ekfac.fit(source, jax.random.key(0), ekfac.EkfacSettings("fisher", matrices="first/kernel"))


def test_ekfac_self_influence_is_that_of_its_dense_operator(dense):
  fitted = fit_ekfac(dense.problem, make_stream())
  for damping in (1e-3, 1.0):
    inverse = normalize.inverse_map("ekfac", fitted, damping)
    found = normalize.measure(dense.problem, make_stream("mixed"), N, dense.directions, inverse)
    assert_measures(found, dense, ekfac_matrix(fitted, damping))
    # The solver and the preconditioner apply the same inverse.
    rows = tree_math.ravel(dense.directions) @ ekfac_matrix(fitted, damping)
    np.testing.assert_allclose(
      tree_math.ravel(ekfac.preconditioner(fitted, damping)(dense.directions)), rows, rtol=1e-9, atol=1e-12
    )
  with pytest.raises(UserError, match="fitted to another subtree"):
    ekfac.apply_inverse(fitted, 0.1, {"first": dense.directions["first"]})


def test_low_rank_self_influence_is_that_of_its_dense_operator(dense):
  like = tiny.direction(dense.problem.sub, queries=1)
  matvec = lambda v: apply_matrix(jnp.asarray(dense.fisher), v)  # noqa: E731
  fitted = low_rank.fit_low_rank(matvec, like, jax.random.key(0), low_rank.LowRankSettings(4))
  v = tree_math.ravel(fitted.vectors)
  matrix = v.T @ np.diag(1 / (fitted.eigenvalues + 0.1) - 1 / 0.1) @ v + np.eye(P) / 0.1
  inverse = normalize.inverse_map("low_rank", fitted, 0.1)
  found = normalize.measure(dense.problem, make_stream(), N, dense.directions, inverse)
  assert_measures(found, dense, matrix)
  bent = low_rank.LowRank(fitted.vectors, np.array([3.0, 1.0, 0.5, -1.0]), fitted.errors, -1.0)
  with pytest.raises(UserError, match="eigenvalue -1.*use a damping well above 1"):
    self_influence(dense.problem, make_stream(), N, normalize.inverse_map("low_rank", bent, 0.1))


# ---- normalisations ------------------------------------------------------------------


def test_relatif_against_the_dense_inverse(dense):
  """Queries are examples 0 and 4; directions are solved with the inverse that normalises."""
  g, inverse = dense.g, dense.inverse
  solved = tree_math.unravel(g[[0, 4]] @ inverse, dense.directions)
  found = normalize.measure(dense.problem, make_stream(), N, solved, with_matrix(inverse))
  influence, own = g[[0, 4]] @ inverse @ g.T, np.sum((g @ inverse) * g, axis=1)
  relative = normalize.relatif(found)
  assert relative.dtype == np.float32 and relative.shape == (2, N)
  np.testing.assert_allclose(relative[:, ANSWERED], influence[:, ANSWERED] / np.sqrt(own[ANSWERED]), rtol=1e-6)
  theta = normalize.theta_relatif(found)
  np.testing.assert_allclose(
    theta[:, ANSWERED], influence[:, ANSWERED] / np.linalg.norm(g @ inverse, axis=1)[ANSWERED], rtol=1e-6
  )
  # Cauchy and Schwarz: nothing explains a query better than the query itself, and it does so by exactly sqrt(own).
  assert list(np.argmax(relative, axis=1)) == [0, 4]
  np.testing.assert_allclose(relative[[0, 1], [0, 4]], np.sqrt(own[[0, 4]]), rtol=1e-6)


def test_cosine_is_1_for_an_example_against_itself_and_never_beyond(dense):
  directions = tree_math.unravel(np.concatenate([dense.g, -2 * dense.g[:1]]), dense.directions)
  found = normalize.cosine(normalize.measure(dense.problem, make_stream(), N, directions))
  assert found.dtype == np.float32 and np.all(np.abs(found) <= 1)
  np.testing.assert_allclose(np.diag(found[:N])[ANSWERED], 1, rtol=1e-6)
  assert found[N, 0] == pytest.approx(-1)
  unit = dense.g[ANSWERED] / np.linalg.norm(dense.g[ANSWERED], axis=1, keepdims=True)
  np.testing.assert_allclose(found[:N][np.ix_(ANSWERED, ANSWERED)], unit @ unit.T, rtol=1e-5, atol=1e-7)
  # The example without response: neither as an example nor as a query does it point anywhere.
  assert np.all(found[:, SILENT] == 0) and np.all(found[SILENT] == 0)


def test_rounding_does_not_push_a_cosine_beyond_1():
  one = np.ones(1)
  measures = normalize.Measures(np.array([[1.0 + 1e-7], [-1.0 - 1e-7]]), one, one, one, one, np.ones(2))
  assert normalize.cosine(measures).tolist() == [[1.0], [-1.0]]


def test_an_example_without_response_has_0_everywhere():
  found = normalize.measure(make_problem(), make_stream(), N, tiny.direction(make_problem().sub, queries=2))
  for name in ("losses", "norms", "self_influence", "inverse_norms"):
    values = getattr(found, name)
    assert values[SILENT] == 0 and np.count_nonzero(values) == N - 1
  for normalise in (normalize.cosine, normalize.relatif, normalize.theta_relatif):
    scores = normalise(found)
    assert np.all(scores[:, SILENT] == 0) and np.count_nonzero(scores) == 2 * (N - 1)
    assert np.all(np.isfinite(scores))


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_tiny_and_huge_gradients_keep_their_direction(factor):
  """In float32 the squares of these gradients would be 0 or infinite."""
  directions = tiny.direction(make_problem().sub, queries=2)
  found, wanted = (normalize.measure(make_problem(factor=by), make_stream(), N, directions) for by in (factor, 1.0))
  np.testing.assert_allclose(found.self_influence, factor**2 * wanted.self_influence, rtol=1e-4)
  for normalise in (normalize.cosine, normalize.relatif, normalize.theta_relatif):
    np.testing.assert_allclose(normalise(found), normalise(wanted), rtol=1e-4, atol=1e-6)


# ---- one program per batch shape -----------------------------------------------------


def test_a_second_call_compiles_nothing(caplog):
  problem = make_problem()
  fitted = fit_ekfac(problem, make_stream())
  moved = problem.at(jax.tree.map(lambda leaf: 1.01 * leaf, problem.sub))

  def compiled(problem, cuts, damping, seed):
    inverse = normalize.inverse_map("ekfac", fitted, damping)
    directions, stream = tiny.direction(problem.sub, seed, queries=2), make_stream(cuts, make_points(seed=seed))
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
      normalize.measure(problem, stream, N, directions, inverse)
      self_influence(problem, stream, N)
    return sum(record.getMessage().startswith("Compiling") for record in caplog.records)

  assert compiled(problem, "mixed", 0.1, 2) > 0
  assert compiled(problem, "mixed", 0.1, 2) == 0
  assert compiled(moved, "mixed", 0.3, 5) == 0
  assert compiled(problem, "whole", 0.1, 2) > 0  # the count does count: another batch shape


def numbers_in(program):
  """(numbers in the largest array that a program or a loop in it makes, and in its largest constant)."""
  made = [var.aval for eqn in program.eqns for var in eqn.outvars]
  held = [*program.consts, *(var.val for eqn in program.eqns for var in eqn.invars if isinstance(var, Literal))]
  found = [(max([int(np.prod(aval.shape)) for aval in made], default=0), max(map(np.size, held), default=0))]
  for value in jax.tree.leaves([list(eqn.params.values()) for eqn in program.eqns]):
    if isinstance(value, ClosedJaxpr | Jaxpr):
      found.append(numbers_in(value if isinstance(value, ClosedJaxpr) else ClosedJaxpr(value, ())))
  return tuple(map(max, zip(*found, strict=True)))


def test_weights_and_factors_are_no_constants_and_no_gradient_of_a_batch_exists(dense):
  """Captured arrays would be folded into the program, gigabytes of them."""
  fitted = fit_ekfac(dense.problem, make_stream())
  like = tiny.direction(dense.problem.sub, queries=1)
  matvec = lambda v: apply_matrix(jnp.asarray(dense.fisher), v)  # noqa: E731
  krylov = low_rank.fit_low_rank(matvec, like, jax.random.key(0), low_rank.LowRankSettings(4))
  problem, (_, batch) = dense.problem, next(make_stream()())
  for inverse in (normalize.inverse_map("ekfac", fitted, 0.1), normalize.inverse_map("low_rank", krylov, 0.1)):
    maps, contexts = (normalize.IDENTITY.function, inverse.function), ((), inverse.context)
    program = jax.make_jaxpr(normalize._kernel, static_argnums=(0, 1, 2))(
      problem.objective, maps, 4, contexts, problem.sub, problem.frozen, batch, dense.directions
    )
    examples = batch.valid.shape[0]
    assert sum(np.prod(aval.shape) for aval in program.out_avals) == examples * (4 + 3)
    made, held = numbers_in(program)
    assert 4 * FEATURES * WIDTH <= made < examples * FEATURES * WIDTH
    assert held <= 4  # the eigenvalues


# ---- mistakes ------------------------------------------------------------------------


def test_what_is_not_finite_is_refused():
  problem, (x, y, weight) = make_problem(), make_points()
  directions = tiny.direction(problem.sub, queries=1)
  x[[0, 5]] = np.nan
  with pytest.raises(UserError, match=rf"2 of {N} losses are not finite \(first rows \[0, 5\]\)"):
    normalize.measure(problem, make_stream("mixed", (x, y, weight)), N, directions)
  with pytest.raises(UserError, match="7 of 7 scores are not finite.*in the directions"):
    normalize.measure(problem, make_stream(), N, jax.tree.map(lambda leaf: leaf * np.inf, directions))
  with pytest.raises(UserError, match=f"{N} of {N} self influence are not finite"):
    nan = normalize.GradientMap(lambda context, g: jax.tree.map(lambda leaf: leaf / 0, g))
    self_influence(problem, make_stream(), N, nan)
  with pytest.raises(UserError, match="stream of batches is empty"):
    self_influence(problem, lambda: iter(()), N)


def test_an_inverse_that_is_not_positive_is_refused(dense):
  found = normalize.measure(dense.problem, make_stream(), N, dense.directions, with_matrix(-dense.inverse))
  with pytest.raises(UserError, match=rf"{N - 1} examples have a gradient but no positive self-influence"):
    normalize.relatif(found)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("datainf",), "--solver=datainf gives no inverse.*all pairs.*use one of identity, ekfac, low_rank"),
    (("lissa",), "--solver=lissa gives no inverse.*recursion"),
    (("newton",), "--solver=newton gives no inverse.*unknown"),
    (("ekfac",), "needs what it fitted"),
    (("ekfac", ekfac.Ekfac({}, {}, {})), "needs an absolute damping"),
    (("ekfac", ekfac.Ekfac({}, {}, {}), 0.0), "above 0"),
    (("low_rank", ekfac.Ekfac({}, {}, {}), 0.1), "needs what it fitted"),
    (("identity", None, 0.1), "takes neither damping"),
  ],
)
def test_inverses_that_do_not_exist_are_refused(arguments, message):
  with pytest.raises(UserError, match=message):
    normalize.inverse_map(*arguments)


# ---- what it is for ------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_self_influence_finds_wrong_labels(seed):
  """One label in ten is turned around before the network is fitted."""
  size = 300
  x, y, weight = make_points(size, seed)
  wrong = np.arange(size) % 10 == 0
  stream = make_stream([(range(size), size)], (x, np.where(wrong, 1 - y, y), np.ones_like(weight)))
  problem = make_problem(microbatch=None)
  for _ in range(100):
    step = problem.mean_gradient(stream)
    problem = problem.at(jax.tree.map(lambda leaf, d: leaf - 1.0 * d[0], problem.sub, step))
  fitted = fit_ekfac(problem, stream)
  for inverse in (normalize.IDENTITY, normalize.inverse_map("ekfac", fitted, 0.1 * fitted.lambda_max)):
    auc = statistics.roc_auc(self_influence(problem, stream, size, inverse), wrong)
    print(auc)
    assert auc.low > 0.8


# ---- sums over checkpoints -----------------------------------------------------------


RECIPE = Recipe(steps=6, batch_size=N, learning_rate=0.1, weight_decay=0.01)


def train(optimizer=None, steps=(1, 4)):
  """Checkpoints of a training on all examples, with the state that the next step starts from."""
  optimizer = optimizer or make_optimizer(RECIPE)
  problem, kept = make_problem(), []
  state = optimizer.init(problem.sub)
  for step in range(max(steps) + 1):
    if step in steps:
      kept.append(Checkpoint(problem, [0.5, 0.2, 0.3, 0.4, 0.25][step], state))
    gradient = jax.tree.map(lambda leaf: leaf[0], problem.mean_gradient(make_stream()))
    updates, state = optimizer.update(gradient, state, problem.sub)
    problem = problem.at(optax.apply_updates(problem.sub, updates))
  return kept


def eval_gradients(problem):
  """g_q of five queries at a problem's parameters, leaves [5, ...]; queries 1 and 2 are 0, as without response."""
  return problem.gradients(make_stream([((4, 3, 0), 3)], make_points(seed=9)), 5)


def dense_at(checkpoint):
  """(g_i [N, P], g_q [5, P]) at a checkpoint."""
  dense = make_dense(checkpoint.problem, make_stream(), N)
  return dense.g, tree_math.ravel(eval_gradients(checkpoint.problem))


def row_tree(row, like):
  """A row [P] as a tree like `like`."""
  single = tree_math.unravel(row[None], jax.tree.map(lambda leaf: leaf[None], like))
  return jax.tree.map(lambda leaf: leaf[0], single)


def cosines(a, b):
  """[Q, N] of rows a [Q, P] and b [N, P]; 0 where a row is 0."""
  lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
  return np.divide(a @ b.T, lengths, out=np.zeros_like(lengths), where=lengths > 0)


@pytest.mark.parametrize("path", ["auto", "jvp", "vmap"])
def test_tracin_is_the_weighted_sum_over_checkpoints(path, x64):
  checkpoints = train()
  found = trajectory.tracin(checkpoints, make_stream("mixed"), N, eval_gradients, path)
  pairs = [dense_at(at) for at in checkpoints]
  wanted = 0.2 * pairs[0][1] @ pairs[0][0].T + 0.25 * pairs[1][1] @ pairs[1][0].T
  assert found.dtype == np.float32 and found.shape == (5, N)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
  # Queries are taken at their checkpoint, and both checkpoints count.
  assert not np.allclose(pairs[0][1], pairs[1][1], rtol=0.1)
  alone = trajectory.tracin(checkpoints[:1], make_stream(), N, eval_gradients)
  np.testing.assert_allclose(alone, 0.2 * pairs[0][1] @ pairs[0][0].T, rtol=1e-5, atol=1e-7)


def adam_steps(checkpoint, g, optimizer, rate):
  """What one real step of optax with each example's gradient alone takes off the parameters, over the rate; [N, P]."""
  sub, rows = checkpoint.problem.sub, []
  for row in g:
    updates, _ = optimizer.update(row_tree(row, sub), checkpoint.optimizer_state, sub)
    moved = optax.apply_updates(sub, updates)
    rows.append(tree_math.ravel(jax.tree.map(lambda a, b: (a - b)[None] / rate, sub, moved))[0])
  return np.stack(rows)


@pytest.mark.parametrize("settings", [{}, {"b1": 0.8, "b2": 0.95, "eps": 1e-3}])
def test_less_compares_the_steps_that_adam_takes(settings, x64):
  optimizer = optax.adam(0.05, **settings)
  checkpoints = train(optimizer)
  wanted = np.zeros((5, N))
  for at in checkpoints:
    g, queries = dense_at(at)
    steps = adam_steps(at, g, optimizer, 0.05)
    state = trajectory.find_adam_state(at.optimizer_state, at.problem.sub)
    rows = tree_math.unravel(g, jax.tree.map(lambda leaf: leaf[None], at.problem.sub))
    gamma = tree_math.ravel(AdamDirection(**settings)(state, rows))
    np.testing.assert_allclose(gamma, steps, rtol=1e-9, atol=1e-12)
    wanted += at.weight * cosines(queries, steps)
  found = trajectory.less(checkpoints, make_stream("mixed"), N, eval_gradients, AdamDirection(**settings))
  assert found.dtype == np.float32
  np.testing.assert_allclose(found[:, ANSWERED], wanted[:, ANSWERED], rtol=1e-5, atol=1e-7)
  # Without response there is no gradient; the momentum's cosine is none of the example's doing.
  assert np.all(found[:, SILENT] == 0) and np.all(wanted[[0, 3, 4], SILENT] != 0)
  assert np.all(found[1:3] == 0)


def test_adam_direction_is_the_formula_in_numpy(x64):
  rng = np.random.default_rng(3)
  g, mu, nu = rng.standard_normal((2, 5)), rng.standard_normal(5), rng.uniform(0, 1, 5)
  state = optax.ScaleByAdamState(jnp.asarray(3), {"w": jnp.asarray(mu)}, {"w": jnp.asarray(nu)})
  m = (0.9 * mu + 0.1 * g) / (1 - 0.9**4)
  v = (0.999 * nu + 0.001 * g**2) / (1 - 0.999**4)
  found = AdamDirection(eps=0.01)(state, {"w": jnp.asarray(g)})["w"]
  np.testing.assert_allclose(found, m / (np.sqrt(v) + 0.01), rtol=1e-6)


def test_a_proponent_by_less_lowers_the_loss_of_the_query(x64):
  optimizer = optax.adam(1e-5)
  (at,) = train(optimizer, steps=(3,))
  query = make_stream([((4, 3, 0), 3)], make_points(seed=9))
  g, _ = dense_at(at)
  scores = trajectory.less([at], make_stream(), N, lambda problem: problem.mean_gradient(query))[0]
  steps = adam_steps(at, g, optimizer, 1.0)
  # float64 losses: those of `CompiledObjective` are rounded to float32
  total = lambda sub: sum(  # noqa: E731
    float(jnp.sum(gradients.per_example_losses(NETWORK, sub, at.problem.frozen, batch))) for _, batch in query()
  )
  for i in np.flatnonzero(ANSWERED):
    step = row_tree(steps[i], at.problem.sub)
    gain = total(at.problem.sub) - total(jax.tree.map(jnp.subtract, at.problem.sub, step))
    assert np.sign(gain) == np.sign(scores[i])
  assert {-1, 1} <= set(np.sign(scores))


def test_less_without_adam_sums_the_cosines_of_gradients(x64):
  checkpoints = train(optax.sgd(0.1))
  found = trajectory.less(checkpoints, make_stream("mixed"), N, eval_gradients, direction=None)
  wanted = sum(at.weight * cosines(*reversed(dense_at(at))) for at in checkpoints)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)


def test_another_checkpoint_compiles_nothing(caplog):
  first, second = train()
  run = lambda at: trajectory.less([at], make_stream(), N, lambda p: p.mean_gradient(make_stream()), AdamDirection())  # noqa: E731
  run(first)
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    caplog.clear()
    run(second)
  assert not [record for record in caplog.records if record.getMessage().startswith("Compiling")]


@pytest.mark.parametrize("changes", [{}, {"max_grad_norm": 0.0}, {"weight_decay": 0.0}, {"warmup_ratio": 0.0}])
def test_adam_is_found_in_the_state_of_every_recipe(changes):
  fields = {"steps": 6, "weight_decay": 0.01, "warmup_ratio": 0.2} | changes
  (at,) = train(make_optimizer(Recipe(**fields)), steps=(2,))
  state = trajectory.find_adam_state(at.optimizer_state, at.problem.sub)
  assert int(state.count) == 2
  assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves((state.mu, state.nu)))


def test_states_and_checkpoints_that_do_not_fit_are_refused():
  problem = make_problem()
  state = optax.adam(0.1).init(problem.sub)
  for other in (optax.sgd(0.1, momentum=0.9).init(problem.sub), None):
    with pytest.raises(UserError, match="holds 0 Adam states"):
      trajectory.less([Checkpoint(problem, 1.0, other)], make_stream(), N, eval_gradients)
  with pytest.raises(UserError, match="holds 2 Adam states"):
    trajectory.find_adam_state((state, state), problem.sub)
  with pytest.raises(UserError, match="those of another subtree"):
    trajectory.find_adam_state(state, {"first": problem.sub["first"]})
  with pytest.raises(UserError, match="those of another subtree"):
    trajectory.find_adam_state(state, jax.tree.map(lambda leaf: leaf[:2], problem.sub))
  for weight in (-0.1, np.nan):
    with pytest.raises(UserError, match="finite and not negative"):
      Checkpoint(problem, weight)
  with pytest.raises(UserError, match="0 checkpoints, none with a positive weight"):
    trajectory.tracin([], make_stream(), N, eval_gradients)
  with pytest.raises(UserError, match="1 checkpoint, none with a positive weight"):
    trajectory.less([Checkpoint(problem, 0.0, state)], make_stream(), N, eval_gradients)
  with pytest.raises(UserError, match="needs 0 <= b < 1"):
    AdamDirection(b1=1.0)
