"""How far two samples are apart in a kernel K, beyond what chance makes of two samples of one kind. NumPy only.

The squared maximum mean discrepancy (Gretton et al. 2012, "A kernel two-sample test"), over pairs of different
examples, so that it is 0 on average for draws of one distribution and does not depend on how many there are:

  d2 = mean K(q, q') + mean K(p, p') - 2 mean K(q, p)

Letters: Q and P examples of the two samples.
"""

import dataclasses

import numpy as np

_PERMUTATIONS = 199


@dataclasses.dataclass(frozen=True)
class Apart:
  """What `apart` gives.

  Attributes:
    distance: squared distance d2 between the means of queries and pool, freed of sampling error; it can be negative.
    share: of the distance between the two samples' means, sampling error included: what is beyond chance, 0 to 1.
    p: how often two samples of one kind, of these sizes, would be as far apart.
  """

  distance: float
  share: float
  p: float


def apart(kernel: np.ndarray, queries: int) -> Apart:
  """Squared maximum mean discrepancy of two samples, with the p value of a permutation test.

  Args:
    kernel: K of every pair, queries first, f64 [Q + P, Q + P].
    queries: Q, at least 2, as is P.
  """
  size, rng = len(kernel), np.random.default_rng(0)  # the same numbers at every call
  first = np.zeros((1 + _PERMUTATIONS, size))
  first[0, :queries] = 1
  for row in first[1:]:
    row[rng.permutation(size)[:queries]] = 1
  along, own = first @ kernel, np.diag(kernel)
  inside, touched, total = np.einsum("sn,sn->s", along, first), along.sum(axis=1), kernel.sum()
  outside, between = total - 2 * touched + inside, touched - inside
  own_first, counts = first @ own, (queries, size - queries)
  parts = ((inside, own_first), (outside, own.sum() - own_first))
  cross = 2 * between / (counts[0] * counts[1])
  unbiased = sum((all_ - same) / (n * (n - 1)) for (all_, same), n in zip(parts, counts, strict=True)) - cross
  biased = sum(all_ / n**2 for (all_, _), n in zip(parts, counts, strict=True)) - cross
  share = float(np.clip(unbiased[0] / biased[0], 0, 1)) if biased[0] > 0 else 0.0
  as_far = np.count_nonzero(unbiased[1:] >= unbiased[0] - 1e-12)
  return Apart(float(unbiased[0]), share, (1 + as_far) / (1 + _PERMUTATIONS))
