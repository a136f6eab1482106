"""LiSSA: the inverse Hessian product as a stochastic recursion over minibatches, with its residual measured on others.

Letters: Q queries, H curvature, u the iterate in LiSSA's scaling (the answer is x = u / scale). The outer loop is
Python, because batches come from the host in several shapes; one step is one compiled program per batch shape.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.ihvp import tree_math
from in2core_jax.ihvp.lissa_schedule import effective_damping, step_factors
from in2core_jax.ihvp.lissa_state import LissaSettings, LissaState, StochasticCurvature
from in2core_jax.ihvp.operators import (
  DivergenceError,
  Matvec,
  NegativeCurvatureError,
  SolveResult,
  fixed_matvec,
  mean_product,
  power_iteration,
  relative_residual,
)
from in2core_jax.ihvp.tree_math import Tree

# Keys of run r are fold_in(key, r); those of the spectrum's probes start here, far above any number of runs.
_PROBE_KEY = 1 << 30


def _advance(hu, v, iterate, factors):
  """One step, given H_B u; pure. Returns the next (u, momentum, mean), norms [Q] of u and of the step's residual."""
  u, momentum, mean = iterate
  a, b, weight, damping, scale = factors
  residual = tree_math.subtract(v, tree_math.scaled(1 / scale, tree_math.axpy(damping, u, hu)))
  if momentum is None:
    # Without acceleration b is 1: u <- v + u - (H_B u + damping u) / scale.
    u = jax.tree.map(jnp.add, u, residual)
  else:
    momentum = jax.tree.map(lambda d, r: d * jnp.asarray(a, d.dtype) + jnp.asarray(b, d.dtype) * r, momentum, residual)
    u = jax.tree.map(jnp.add, u, momentum)
  if mean is not None:
    mean = tree_math.axpy(weight, tree_math.subtract(u, mean), mean)
  return (u, momentum, mean), tree_math.norm(u), tree_math.norm(residual)


# Apart from the product, so that a minibatch of several shapes runs the programs compiled for each shape already.
_step = partial(jax.jit, donate_argnums=(2,))(_advance)


def _advice(settings: LissaSettings) -> str:
  return f"try a larger scale, a damping above {settings.damping:.3g}, or more examples in a curvature batch"


def choose_scale(sampled: StochasticCurvature, v: Tree, key: jax.Array, settings: LissaSettings) -> tuple[float, float]:
  """The scale in use and the estimated largest eigenvalue of H behind it.

  scale = safety * (max(lambda_max(H), lambda_max(H_B) of a few minibatches) + damping): a minibatch has a larger top
  eigenvalue than the mean, and the recursion applies minibatches.

  Args:
    sampled: minibatches and the held-out product.
    v: gives shapes, leaves [Q, ...].
    key: PRNG key.
    settings: scale or None, lambda_max or None, safety, power_steps, scale_probes.

  Returns:
    (scale, lambda_max); lambda_max is NaN when the scale was given and nothing else was known.

  Raises:
    NegativeCurvatureError: H + damping I has a dominant negative eigenvalue.
    DivergenceError: the given scale is too small for the known largest eigenvalue.
  """
  known = settings.lambda_max
  if settings.scale is None:
    probe_key = jax.random.fold_in(key, _PROBE_KEY)
    if known is None:
      known, vector = _largest(sampled.matvec, v, probe_key, settings)
    else:
      vector = tree_math.random_normal(probe_key, v) if sampled.top is None else sampled.top
    largest = known
    for index in range(settings.scale_probes):
      batch = sampled.draw(jax.random.fold_in(key, _PROBE_KEY + 1 + index))
      probe = power_iteration(fixed_matvec(sampled.curvature, [batch]), v, probe_key, 5, 1e-2, vector)
      largest = max(largest, probe.lambda_max)
    if not largest + settings.damping > 0:
      raise UserError("H is 0 and so is the damping: nothing to invert; give a damping above 0")
    return settings.safety * (largest + settings.damping), known
  if known is None:
    return settings.scale, float("nan")
  _check_scale(settings, known)
  return settings.scale, known


def _check_scale(settings: LissaSettings, largest: float) -> None:
  """Refuses a given scale with which the recursion diverges."""
  least = (largest + settings.damping) / (2 if settings.acceleration == "none" else 1)
  if settings.scale is not None and settings.scale <= least:
    raise DivergenceError(
      f"LiSSA at step 0: scale {settings.scale:.3g} is not above {least:.3g}, where the recursion diverges "
      f"(largest eigenvalue {largest:.3g}, damping {settings.damping:.3g}, acceleration {settings.acceleration}); "
      + _advice(settings)
    )


def _largest(matvec: Matvec, v: Tree, key: jax.Array, settings: LissaSettings) -> tuple[float, Tree]:
  """Largest eigenvalue on the held-out batches and its vector; refuses an H dominated by negative curvature."""
  power = power_iteration(matvec, v, key, settings.power_steps)
  if power.dominant + settings.damping < 0:
    raise NegativeCurvatureError(
      f"LiSSA: H has the eigenvalue {power.dominant:.3g}, negative and larger than any other in size, with "
      f"damping {settings.damping:.3g} the recursion would diverge; "
      f"use a damping above {-power.dominant:.3g} or --curvature=ggn"
    )
  return power.lambda_max, power.vector


class _Watch:
  """Notices divergence: NaN, an iterate beyond what a convergent recursion can reach, a residual that keeps growing."""

  def __init__(self, sampled: StochasticCurvature, v: Tree, key: jax.Array, settings: LissaSettings, state: LissaState):
    self.sampled, self.v, self.key, self.settings, self.state = sampled, v, key, settings, state
    self.v_norm = np.asarray(_norm(v), np.float64)

  def norms(self, step: int, u_norm: jax.Array) -> None:
    """|u_k| <= (k + 1) |v| while 1 - (H + damping)/scale is in [-1, 1]; accelerated, (k + 1)^2 |v|; twice for slack."""
    u_norm = np.asarray(u_norm, np.float64)
    limit = 2 * (step + 1.0) ** (1 if self.settings.acceleration == "none" else 2) * self.v_norm
    # Not "u > limit": a NaN compares false.
    if not np.all(u_norm <= limit):
      self.stop(
        step, f"|u| = {float(np.max(u_norm)):.3g} is beyond {float(np.max(limit)):.3g}, a convergent run's bound"
      )

  def residuals(self, step: int, curve: list) -> None:
    """Above 1 the iterate is worse than zero. Noise and held-out batches may do that; geometric growth may not."""
    recent = [np.max(residual) for _, residual in curve[-4:]]
    growing = recent[-1] > (recent[-2] if len(recent) > 1 else 1.0)  # the answer zero has 1
    if not np.isfinite(recent[-1]) or (growing and recent[-1] > self.settings.max_residual):
      self.stop(step, f"the residual is {recent[-1]:.3g} and growing")
    if len(recent) == 4 and recent[-1] > 2 and np.all(np.divide(recent[1:], recent[:-1]) > 1.25):
      self.stop(step, f"the residual has grown by a quarter in three measurements running, to {recent[-1]:.3g}")

  def stop(self, step: int, seen: str) -> None:
    """Raises; the largest eigenvalue is estimated now if it was not known, since it is what the reader needs."""
    lambda_max = self.state.lambda_max
    start = (
      f"LiSSA diverged at step {step} of run {self.state.run}: {seen}. scale {self.state.scale:.3g}, "
      f"damping {self.settings.damping:.3g}, "
    )
    if np.isnan(lambda_max):
      try:
        lambda_max, _ = _largest(self.sampled.matvec, self.v, jax.random.fold_in(self.key, _PROBE_KEY), self.settings)
      except UserError as problem:
        raise DivergenceError(f"{start}largest eigenvalue not known: {problem}", step) from problem
    raise DivergenceError(f"{start}estimated largest eigenvalue {lambda_max:.3g}; {_advice(self.settings)}", step)


_norm = jax.jit(tree_math.norm)
_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
_scaled = jax.jit(tree_math.scaled)
_axpy = jax.jit(tree_math.axpy)


def _key_data(key: jax.Array) -> np.ndarray:
  return np.asarray(jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key)


def _first_state(sampled: StochasticCurvature, v: Tree, key: jax.Array, settings: LissaSettings) -> LissaState:
  scale, lambda_max = choose_scale(sampled, v, key, settings)
  mean = v if settings.average else None
  vectors = (v, _rest(v, settings), mean, tree_math.zeros_like(v))
  return LissaState(*vectors, 0, 0, 0, settings.damping, scale, lambda_max, _key_data(key), (), ())


def _rest(v: Tree, settings: LissaSettings) -> Tree:
  return None if settings.acceleration == "none" else tree_math.zeros_like(v)


def _check_resume(state: LissaState, v: Tree, key: jax.Array, settings: LissaSettings) -> LissaState:
  """The state on the device, refused unless it was made with the same key, scale and kind of recursion."""
  if not np.array_equal(state.key_data, _key_data(key)):
    raise UserError("the saved LiSSA state was made with another key: resume with the same seed or start afresh")
  if settings.damping != state.damping:
    raise UserError(f"the saved LiSSA state has damping {state.damping:.6g}, not {settings.damping:.6g}: start afresh")
  if settings.scale is not None and settings.scale != state.scale:
    raise UserError(f"the saved LiSSA state has scale {state.scale:.6g}, asked for {settings.scale:.6g}: start afresh")
  if (state.momentum is None) != (settings.acceleration == "none"):
    raise UserError("the saved LiSSA state was made with another acceleration: start afresh")
  if (state.mean is None) != (settings.average == 0):
    raise UserError("the saved LiSSA state was made with another average: start afresh")
  if state.run >= settings.repeat or state.step > settings.depth:
    raise UserError(
      f"the saved LiSSA state is at run {state.run}, step {state.step}: beyond repeat or depth; start afresh"
    )
  u, momentum, mean, total = jax.tree.map(jnp.asarray, (state.u, state.momentum, state.mean, state.total))
  return dataclasses.replace(state, u=u, momentum=momentum, mean=mean, total=total)


def _finished(state: LissaState, settings: LissaSettings) -> bool:
  """Whether the present run is over: all steps done, or converged at the check just made."""
  if state.step >= settings.depth:
    return True
  measured = state.step > 0 and state.curve and state.curve[-1][0] == state.done + state.step
  return bool(measured) and bool(np.all(state.curve[-1][1] <= settings.tol))


def _answer(state: LissaState) -> Tree:
  """The iterate that counts: the last, or the average."""
  return state.u if state.mean is None else state.mean


def _run(
  sampled: StochasticCurvature, v: Tree, key: jax.Array, settings: LissaSettings, state: LissaState, on_state
) -> LissaState:
  """Carries the present run to its end."""
  curvature, run_key = sampled.curvature, jax.random.fold_in(key, state.run)
  steps = step_factors(settings, state.scale, settings.depth)
  watch = _Watch(sampled, v, key, settings, state)
  iterate = _copy((state.u, state.momentum, state.mean))
  pending = None
  while not _finished(state, settings):
    step = state.step
    batch = sampled.draw(jax.random.fold_in(run_key, step))
    factors = (*steps[step], settings.damping, state.scale)
    hu, _ = mean_product(curvature, [batch], iterate[0])
    iterate, u_norm, _ = _step(hu, v, iterate, factors)
    # One step late, so that the host draws the next batch while the device computes.
    if pending is not None:
      watch.norms(step, pending)
    pending = u_norm
    state = dataclasses.replace(state, step=step + 1)
    if state.step % settings.check_every and state.step < settings.depth:
      continue
    watch.norms(state.step, u_norm)
    u, momentum, mean = _copy(iterate)
    state = dataclasses.replace(state, u=u, momentum=momentum, mean=mean)
    residual = relative_residual(sampled.matvec, _scaled(1 / state.scale, _answer(state)), v, settings.damping)
    curve = (*state.curve, (state.done + state.step, residual))
    state = dataclasses.replace(state, curve=curve)
    watch.residuals(state.step, [entry for entry in curve if entry[0] > state.done])
    if on_state is not None:
      on_state(state)
  return state


def lissa(
  sampled: StochasticCurvature,
  v: Tree,
  key: jax.Array,
  settings: LissaSettings,
  on_state: Callable[[LissaState], Any] | None = None,
  resume_from: LissaState | None = None,
) -> SolveResult:
  """(H + damping I)^-1 v by u <- v + u - (H_B u + damping u) / scale from u = v, answer u / scale.

  method.md section 3 (Agarwal, Bullins and Hazan 2017, with the damping outside of the scaling): the fixed point is
  (H + damping I)^-1 v for every scale above (largest eigenvalue + damping) / 2. Every step draws a new minibatch by
  fold_in(fold_in(key, run), step), so a resumed run draws what the killed one would have drawn.

  Args:
    sampled: curvature, minibatches, and the held-out product that measures the residual.
    v: right-hand side, leaves [Q, ...].
    key: PRNG key.
    settings: damping, scale, depth, repeat, ...
    on_state: called after every measurement of the residual with a state that `resume_from` accepts.
    resume_from: such a state; the result has the same bytes as that of an uninterrupted run.

  Returns:
    SolveResult. curve counts steps over all runs, each of which starts anew; for repeat > 1 it ends with the mean's.

  Raises:
    DivergenceError: the recursion grows, or the given scale is known to be too small.
    NegativeCurvatureError: H + damping I has a dominant negative eigenvalue.
    UserError: a malformed v, or a state of another run.
  """
  queries = tree_math.num_queries(v)
  v = tree_math.promote(v)
  if not np.all(np.isfinite(np.asarray(_norm(v)))):
    raise DivergenceError("LiSSA: the right-hand side holds NaN or infinity: look for NaN in the weights or in a query")
  state = (
    _first_state(sampled, v, key, settings) if resume_from is None else _check_resume(resume_from, v, key, settings)
  )
  while True:
    state = _run(sampled, v, key, settings, state, on_state)
    total = _axpy(1 / state.scale, _answer(state), state.total)
    done, runs = state.done + state.step, (*state.runs, state.curve[-1][1])
    if state.run + 1 == settings.repeat:
      break
    first = dataclasses.replace(state, u=v, momentum=_rest(v, settings), mean=v if settings.average else None)
    state = dataclasses.replace(first, total=total, run=state.run + 1, step=0, done=done, runs=runs)
  solution = _scaled(1 / settings.repeat, total)
  curve, residual = list(state.curve), runs[-1]
  if settings.repeat > 1:
    residual = relative_residual(sampled.matvec, solution, v, settings.damping)
    curve.append((done, residual))
  if np.max(residual) > 1 and np.isnan(state.lambda_max):
    # A short run with too small a scale has not grown far enough to be noticed.
    _check_scale(settings, _largest(sampled.matvec, v, jax.random.fold_in(key, _PROBE_KEY), settings)[0])
  return SolveResult(solution, residual, done, curve, _facts(settings, state, residual, runs) | {"queries": queries})


def _facts(settings: LissaSettings, state: LissaState, residual: np.ndarray, runs: tuple) -> dict[str, Any]:
  """What is printed and saved about a finished solve."""
  facts = {
    "solver": "lissa",
    "acceleration": settings.acceleration,
    "average": settings.average,
    "damping": settings.damping,
    "scale": state.scale,
    "lambda_max": state.lambda_max,
    "effective_damping": effective_damping(settings, state.scale, state.step),  # of the last run
    "depth": settings.depth,
    "repeat": settings.repeat,
    "tol": settings.tol,
    "max_residual": float(np.max(residual)),
    "run_residuals": [float(np.max(run)) for run in runs],
    "converged": bool(np.all(residual <= settings.tol)),
  }
  if facts["max_residual"] > 1:
    facts["warning"] = "the residual is above 1: worse than the answer zero; " + _advice(settings)
  return facts
