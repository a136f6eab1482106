"""Examples that take what queries send to their nearest, shared among those that are alike. NumPy only.

Each query sends the mass 1 / Q to its k nearest examples, to each in inverse proportion to how crowded its place is:

  p_i = (1/Q) sum_q [i in N_k(q)] (1/rho_i) / sum_{j in N_k(q)} (1/rho_j),   rho_i = sum_j max(0, 1 - d_ij^2 / h^2)

So m copies of a text together get what one of them would (the KNN-KDE assignment of TSDS, arXiv 2410.11303, with an
Epanechnikov kernel). What no query sends anything to comes last.

Letters: Q queries, N examples of the pool.
"""

import numpy as np

NEAREST = 32  # k
WIDTH = 0.4  # h^2: d^2 = 2 - 2 cos of unit vectors, so that cosines above 0.8 count as near


def transported(similarity: np.ndarray, kernel: np.ndarray, nearest: int = NEAREST, width: float = WIDTH) -> np.ndarray:
  """p_i, f64 [N], which sums to 1.

  Args:
    similarity: of queries and examples, [Q, N]; equal ones go by row.
    kernel: inner products of the examples, [N, N]; d_ij^2 = K_ii + K_jj - 2 K_ij.
    nearest: k; all where there are fewer.
    width: h^2, positive.
  """
  own = np.diag(kernel)
  crowded = np.maximum(0, 1 - (own[:, None] + own[None, :] - 2 * kernel) / width).sum(axis=1)
  near = np.argsort(-similarity, axis=1, kind="stable")[:, :nearest]
  share = 1 / crowded[near]
  share /= share.sum(axis=1, keepdims=True)
  return np.bincount(near.ravel(), share.ravel(), len(own)) / len(similarity)
