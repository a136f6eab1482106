"""The scalars of every LiSSA step, in float64 on the host: step lengths, averaging weights, and what they amount to."""

import numpy as np

from in2core_jax.errors import UserError
from in2core_jax.ihvp.lissa_state import LissaSettings


def coefficients(acceleration: str, scale: float, damping: float, depth: int) -> list[tuple[float, float]]:
  """(a, b) of every step of d <- a d + b (v - (H_B u + damping u) / scale), u <- u + d.

  none: a = 0, b = 1, which is LiSSA. momentum: Polyak's heavy ball, optimal for eigenvalues in [damping, scale].
  chebyshev: Chebyshev semi-iteration on [damping, scale] (Saad, Iterative Methods, algorithm 12.1): after n steps at
  most 2 ((sqrt k - 1) / (sqrt k + 1))^n of the error is left, k = scale / damping, against (1 - 1/k)^n for LiSSA. Both
  accelerated methods pass on more of the minibatches' noise.

  Args:
    acceleration: one of ACCELERATIONS.
    scale: upper end of the spectrum of H + damping I when accelerated.
    damping: its lower end.
    depth: number of steps.

  Returns:
    depth pairs, float64.

  Raises:
    UserError: an accelerated method with scale <= damping.
  """
  if acceleration == "none":
    return [(0.0, 1.0)] * depth
  if scale <= damping:
    raise UserError(f"acceleration={acceleration} with scale {scale:.3g} <= damping {damping:.3g}: give a larger scale")
  if acceleration == "momentum":
    total = np.sqrt(scale) + np.sqrt(damping)
    pair = (float(((np.sqrt(scale) - np.sqrt(damping)) / total) ** 2), float(4 * scale / total**2))
    return [(0.0, pair[1])] + [pair] * (depth - 1)
  center, radius = (scale + damping) / 2, (scale - damping) / 2
  rho, pairs = radius / center, [(0.0, scale / center)]
  for _ in range(depth - 1):
    following = 1 / (2 * center / radius - rho)
    pairs.append((following * rho, 2 * following * scale / radius))
    rho = following
  return pairs[:depth]


def average_weights(average: float, depth: int) -> list[float]:
  """w of every step of mean <- mean + w (u - mean): 1 before the averaged share begins, then 1, 1/2, 1/3, ..."""
  start = depth - int(round(average * depth))
  return [1.0 / max(step + 1 - start, 1) for step in range(depth)]


def effective_damping(settings: LissaSettings, scale: float, steps: int) -> float:
  """The damping that a run of so many steps amounts to in flat directions of H.

  Where H is 0 the exact answer is v / damping; the recursion, cut off after `steps`, gives v / effective_damping.
  Without acceleration that is damping / (1 - (1 - damping / scale)^(steps + 1)), about scale / steps for a short run.

  Args:
    settings: damping, acceleration, average, depth.
    scale: LiSSA's scale.
    steps: steps of one run, at most depth.

  Returns:
    effective damping, at least `damping` up to the ripple of the accelerated methods.
  """
  u, momentum, mean = 1.0, 0.0, 1.0
  for a, b, weight in step_factors(settings, scale, settings.depth)[:steps]:
    momentum = a * momentum + b * (1 - settings.damping * u / scale)
    u += momentum
    mean += weight * (u - mean)
  return scale / mean


def step_factors(settings: LissaSettings, scale: float, depth: int) -> list[tuple[float, float, float]]:
  """(a, b, w) of every step: `coefficients` and `average_weights` side by side."""
  pairs = coefficients(settings.acceleration, scale, settings.damping, depth)
  return [(*pair, weight) for pair, weight in zip(pairs, average_weights(settings.average, depth), strict=True)]
