"""Influence distillation: weights of examples whose mean gradient, as one step, takes most off the target's loss.

  minimise over w >= 0, sum w = n:   -m.t + |m|^2 / 2 + (lambda s / 2) |w / n|^2,   m = F^T w / n

First order: the step along m lowers the loss of the target by m.t. Second order: with a curvature that is the same in
all directions, so that with the first it is |m - t|^2 / 2 but for a constant. The last term spreads the weights; s is
the mean |f_i|^2 (after arXiv 2505.19051). So a choice of fewer is no beginning of a choice of more. NumPy only.

Letters: P examples of the pool, d features, n chosen, v = w / n on the simplex.
"""

import numpy as np

LEAST, MOST = 1e-2, 1e4  # lambda: below, it changes the spread of a mean by less than 1 %; above, weights are alike
_HALVINGS = 20
_ITERATIONS = 5000
_FEW = 64  # examples that the search begins with
_GAP = 1e-8  # of KKT, in units of s


def simplex(point: np.ndarray) -> np.ndarray:
  """The closest v >= 0 with sum v = 1 (Held, Wolfe, Crowder 1974), f64 [P]."""
  falling = -np.sort(-point)
  excess = (np.cumsum(falling) - 1) / np.arange(1, len(point) + 1)
  last = int(np.flatnonzero(falling > excess)[-1])
  return np.maximum(point - excess[last], 0.0)


def solved(
  gram: np.ndarray, products: np.ndarray, spread: float, start: np.ndarray | None = None, gap: float = _GAP
) -> np.ndarray:
  """argmin_v v.G v / 2 - p.v + spread |v|^2 / 2 on the simplex.

  Solved on a few examples, to which those are added that would lower the value, until max_v' grad.(v - v') over all of
  them, which bounds how far the value is above its least, is below the gap.

  Args:
    gram: G, f64 [P, P], positive semidefinite.
    products: p, f64 [P].
    spread: lambda s, above 0.
    start: f64 [P], a guess; the examples with the largest products when None.
    gap: in the units of G.

  Returns:
    f64 [P].
  """
  few = np.argsort(-products, kind="stable")[:_FEW] if start is None else np.flatnonzero(start)
  found = np.zeros(len(gram))
  first = None if start is None else start[few] / start[few].sum()
  while True:
    own = _solved(gram[np.ix_(few, few)], products[few], spread, first, gap / 2)
    found[:] = 0
    found[few] = own
    kept = np.flatnonzero(found)
    slope = gram[:, kept] @ found[kept] - products + spread * found
    better = np.flatnonzero(slope < slope @ found - gap)
    better = better[~np.isin(better, few)]
    if not len(better):
      return found
    better = better[np.argsort(slope[better], kind="stable")][: max(_FEW, len(kept))]
    few = np.sort(np.concatenate([few, better]))
    first = found[few]


def _solved(gram: np.ndarray, products: np.ndarray, spread: float, start: np.ndarray | None, gap: float) -> np.ndarray:
  """`solved` on all of the examples: FISTA with restarts (Beck and Teboulle 2009; O'Donoghue and Candes 2015)."""
  # No eigenvalue is above the largest sum of a row, nor above the trace.
  steepest = min(float(np.abs(gram).sum(axis=1).max()), float(np.trace(gram))) + spread
  slope = lambda v: gram @ v - products + spread * v  # noqa: E731
  v = ahead = np.full(len(gram), 1 / len(gram)) if start is None else start
  momentum = 1.0
  for step in range(_ITERATIONS):
    after = simplex(ahead - slope(ahead) / steepest)
    if step % 8 == 0:
      down = slope(after)
      if down @ after - down.min() <= gap:
        return after
    if (ahead - after) @ (after - v) > 0:
      momentum, ahead = 1.0, after
    else:
      following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
      momentum, ahead = following, after + (momentum - 1) / following * (after - v)
    v = after
  return v


def order(gram: np.ndarray, products: np.ndarray, count: int) -> tuple[np.ndarray, float]:
  """(rows by falling weight, those without one by slope; the least lambda tried that gives `count` examples a weight).

  Args:
    gram: G = F F^T, f64 [P, P].
    products: p = F t, f64 [P].
    count: n.

  Returns:
    int [P] and lambda.
  """
  scale = _scale(gram)
  if scale == 0:
    return np.arange(len(gram)), MOST
  low, high, v = np.log(LEAST), np.log(MOST), None
  rough = _GAP * 10 * scale  # close enough that a support is that of the minimum
  at = lambda log, start: solved(gram, products, np.exp(log) * scale, start, rough)  # noqa: E731
  v = at(low, None)
  if np.count_nonzero(v) < count:
    v = at(high, v)
    for _ in range(_HALVINGS):
      middle = (low + high) / 2
      tried = at(middle, v)
      size = np.count_nonzero(tried)
      low, high, v = (low, middle, tried) if size >= count else (middle, high, v)
      if count <= size <= count + count // 50:  # close enough: those beyond the budget have the least weights
        break
    found = high
  else:
    found = low
  slope = gram @ v - products + np.exp(found) * scale * v
  return np.lexsort((slope, -v)), float(np.exp(found))


def weights(gram: np.ndarray, products: np.ndarray, strength: float) -> np.ndarray:
  """w of the examples that were chosen, all above 0, mean 1; lambda grows until each of them has a weight.

  Args:
    gram: of the chosen, f64 [n, n].
    products: of the chosen, f64 [n].
    strength: lambda to begin with.

  Returns:
    f64 [n].
  """
  scale, size = _scale(gram), len(gram)
  while scale and strength <= MOST * size:
    v = solved(gram, products, strength * scale, gap=_GAP * scale)
    if v.min() > 1e-3 / size:
      return v * size
    strength *= 2
  return np.ones(size)


def _scale(gram: np.ndarray) -> float:
  return float(np.trace(gram)) / len(gram)
