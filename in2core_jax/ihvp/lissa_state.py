"""What LiSSA is told, what it is given, and what it can be resumed from."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.ihvp import tree_math
from in2core_jax.ihvp.operators import Curvature, Matvec, check_damping
from in2core_jax.ihvp.tree_math import Tree
from in2core_jax.parallel import processes

ACCELERATIONS = ("none", "momentum", "chebyshev")


@dataclasses.dataclass(frozen=True)
class LissaSettings:
  """Settings of `lissa`.

  Attributes:
    damping: absolute, in the unit of H: the answer is (H + damping I)^-1 v whatever the scale.
    scale: divides the products; None: safety * (largest eigenvalue + damping), by power iteration.
    depth: steps of one run at most.
    repeat: independent runs, averaged.
    check_every: steps between measurements of the residual (each costs one product on the held-out batches).
    tol: a run stops early when every query's residual is at most this; 0 runs to the end.
    acceleration: "none", or "momentum" / "chebyshev" tuned to eigenvalues within [damping, scale]: for a fixed set of
      examples; they amplify the noise of small minibatches, up to divergence.
    average: share of the last steps whose iterates are averaged, 0 to 1; 0 takes the last iterate. Removes most of the
      noise of small minibatches.
    lambda_max: largest eigenvalue of H if it is known already; saves the power iteration.
    safety: factor of the automatic scale, 1 to 2.
    power_steps: products of the power iteration at most.
    scale_probes: minibatches whose own largest eigenvalue the automatic scale also covers.
    max_residual: a growing residual above this stops the run. On held-out batches even the exact answer of the
      recursion's batches can have a residual far above 1, when damping is small for the number of examples.
  """

  damping: float
  scale: float | None = None
  depth: int = 100
  repeat: int = 1
  check_every: int = 10
  tol: float = 1e-3
  acceleration: str = "none"
  average: float = 0.0
  lambda_max: float | None = None
  safety: float = 1.2
  power_steps: int = 20
  scale_probes: int = 2
  max_residual: float = 10.0

  def __post_init__(self):
    check_damping(self.damping)
    if self.acceleration not in ACCELERATIONS:
      raise UserError(f"unknown acceleration {self.acceleration!r}: choose one of {', '.join(ACCELERATIONS)}")
    if self.acceleration != "none" and self.damping == 0:
      raise UserError(f"acceleration={self.acceleration} needs a damping above 0: it is tuned to [damping, scale]")
    if self.scale is not None and not (np.isfinite(self.scale) and self.scale > 0):
      raise UserError(f"scale={self.scale} must be finite and above 0; leave it out to have it estimated")
    for name in ("depth", "repeat", "check_every", "power_steps"):
      if getattr(self, name) < 1:
        raise UserError(f"{name}={getattr(self, name)}: LiSSA needs at least 1")
    if self.scale_probes < 0 or not self.tol >= 0:
      raise UserError(f"scale_probes={self.scale_probes}, tol={self.tol}: both must be 0 or more")
    if not 0 <= self.average < 1:
      raise UserError(f"average={self.average} is outside [0, 1): it is the share of the last steps that is averaged")
    if not 1 <= self.safety <= 2:
      raise UserError(
        f"safety={self.safety} is outside [1, 2]: below 1 the recursion may diverge, above 2 it only slows"
      )


@dataclasses.dataclass(frozen=True)
class Sampled:
  """A curvature with the minibatches that a stochastic solver draws, and a fixed set that it never draws from.

  Attributes:
    curvature: products of H on one batch.
    draw: draw(key) -> minibatch; a pure function of the key, or resuming gives other bytes.
    matvec: H v on held-out batches (`fixed_matvec`): measures the residual and the largest eigenvalue.
    top: about the eigenvector of matvec's largest eigenvalue, leaves [1, ...], where it is known: minibatches have
      nearly the same one, so that their own largest eigenvalue takes fewer products to find.
  """

  curvature: Curvature
  draw: Callable[[jax.Array], Tree]
  matvec: Matvec
  top: Tree | None = None


@dataclasses.dataclass(frozen=True)
class LissaState:
  """All that a killed run needs to go on to the same bytes (`state_to_arrays` makes it storable).

  Attributes:
    u: iterate of the present run, leaves [Q, ...].
    momentum: last update, leaves [Q, ...]; None without acceleration.
    mean: average of the iterates so far, leaves [Q, ...]; None without averaging.
    total: sum of the solutions of the finished runs, leaves [Q, ...].
    run: index of the present run.
    step: steps done in the present run.
    done: steps done in the finished runs.
    damping: the damping in use.
    scale: the scale in use.
    lambda_max: the estimate behind it; NaN if none was made.
    key_data: uint32, the words of the key.
    curve: (step over all runs, residual [Q]) so far.
    runs: residual [Q] of each finished run.
  """

  u: Tree
  momentum: Tree
  mean: Tree
  total: Tree
  run: int
  step: int
  done: int
  damping: float
  scale: float
  lambda_max: float
  key_data: np.ndarray
  curve: tuple[tuple[int, np.ndarray], ...]
  runs: tuple[np.ndarray, ...]


def state_to_arrays(state: LissaState) -> dict[str, np.ndarray]:
  """The state as named host arrays, ready for `numpy.savez`; no pickle needed."""
  arrays = {}
  for name in ("u", "momentum", "mean", "total"):
    for index, leaf in enumerate(jax.tree.leaves(getattr(state, name))):
      arrays[f"{name}_{index}"] = processes.to_host(leaf)
  arrays["counts"] = np.array([state.run, state.step, state.done], np.int64)
  arrays["spectrum"] = np.array([state.damping, state.scale, state.lambda_max], np.float64)
  arrays["key_data"] = state.key_data
  queries = tree_math.num_queries(state.u)
  arrays["curve_steps"] = np.array([step for step, _ in state.curve], np.int64)
  arrays["curve_residuals"] = np.array([residual for _, residual in state.curve]).reshape(-1, queries)
  arrays["runs"] = np.array(state.runs).reshape(-1, queries)
  return arrays


def state_from_arrays(arrays: dict[str, np.ndarray], like: Tree) -> LissaState:
  """Inverse of `state_to_arrays`.

  Args:
    arrays: named arrays, e.g. an opened .npz file.
    like: pytree of v's structure.

  Returns:
    LissaState.

  Raises:
    UserError: the arrays belong to another tree.
  """
  leaves, structure = jax.tree.flatten(like)

  def tree(name):
    names = [f"{name}_{index}" for index in range(len(leaves))]
    missing = [key for key in names if key not in arrays]
    if missing or any(arrays[key].shape != leaf.shape for key, leaf in zip(names, leaves, strict=True)):
      raise UserError(f"the saved LiSSA state does not fit this subtree and these queries ({name}): start afresh")
    return jax.tree.unflatten(structure, [np.asarray(arrays[key]) for key in names])

  momentum, mean = (tree(name) if f"{name}_0" in arrays else None for name in ("momentum", "mean"))
  run, step, done = (int(count) for count in arrays["counts"])
  damping, scale, lambda_max = (float(value) for value in arrays["spectrum"])
  curve = tuple((int(s), r) for s, r in zip(arrays["curve_steps"], arrays["curve_residuals"], strict=True))
  key_data, runs = np.asarray(arrays["key_data"]), tuple(arrays["runs"])
  u, total = tree("u"), tree("total")
  return LissaState(u, momentum, mean, total, run, step, done, damping, scale, lambda_max, key_data, curve, runs)
