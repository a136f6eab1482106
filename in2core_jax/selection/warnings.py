"""What to mind about a selection."""

import numpy as np

from in2core_jax.errors import how_many
from in2core_jax.selection.inputs import PolicyInputs, matching_target


def selection_warnings(
  rows: np.ndarray, inputs: PolicyInputs, seed: int = 0, copies: bool = True, topics: bool = True
) -> list[str]:
  """What looks risky about a selection, from the selection alone: one sentence each, with numbers and a remedy.

  Looks at topics of more than 2 % of the pool that keep less than 20 % of their share, response tokens below 80 % of
  the share of examples, the distance of the mean feature to the target beyond all of 20 random draws, and copies.

  Args:
    rows: int [S], the selection. inputs: what it was chosen from; copies are found by its content_keys, where given.
    seed: of the random draws. copies: False where the reader has been told of the copies in the training set already.
    topics: False where topics and lengths of the queries are what was asked for.
  """
  rows, pool = np.asarray(rows), inputs.pool()
  found = _dropped_topics(rows, inputs, pool) if topics else []
  share = rows.size / pool.size
  tokens, total = (int(inputs.num_response_tokens[r].sum()) for r in (rows, pool))
  if topics and tokens < 0.8 * share * total:
    found.append(
      f"The selection has {tokens:,} response tokens, {tokens / (share * total):.0%} of what "
      f"{how_many(rows.size, 'average example')} would have ({share * total:,.0f}): it prefers short responses. "
      f"Use the policy matching, or a token budget."
    )
  if inputs.features is not None and inputs.target is not None and rows.size < pool.size:
    found += _poor_coverage(rows, inputs, pool, seed)
  if copies and inputs.content_keys is not None:
    repeats = rows.size - len(np.unique(np.asarray(inputs.content_keys)[rows]))
    if repeats:
      said = how_many(repeats, f"of the {rows.size:,} selected examples [is a duplicate|are duplicates]")
      found.append(f"{said} of another selected one. To leave them out, use --dedup in finetune, select and evaluate.")
  return found


def _dropped_topics(rows: np.ndarray, inputs: PolicyInputs, pool: np.ndarray) -> list[str]:
  topics = np.asarray(inputs.topics, dtype=np.str_)
  found = []
  for topic, size in zip(*np.unique(topics[pool], return_counts=True), strict=True):
    if size <= 0.02 * pool.size:
      continue
    kept, share = int(np.sum(topics[rows] == topic)), size * rows.size / pool.size
    named = topic or "(none)"
    if share >= 1 and kept < 0.2 * share:
      found.append(
        f"Topic '{named}' is almost dropped: {how_many(kept, f'of its {size} examples with a response [is|are]')} "
        f"selected where an even share would be {share:.0f}. Use the policy topic_quota or matching."
      )
  return found


def _poor_coverage(rows: np.ndarray, inputs: PolicyInputs, pool: np.ndarray, seed: int, draws: int = 20) -> list[str]:
  rng = np.random.default_rng(seed)
  weights = np.zeros((1 + draws, len(inputs.ids)))
  weights[0, rows] = 1 / rows.size
  for draw in weights[1:]:
    draw[rng.permutation(pool)[: rows.size]] = 1 / rows.size
  means = np.zeros((1 + draws, inputs.features.shape[1]))
  for start in range(0, len(inputs.ids), 1024):
    means += weights[:, start : start + 1024] @ inputs.features[start : start + 1024].astype(np.float64)
  target = matching_target(inputs)
  distance = np.linalg.norm(means - target, axis=1) / max(np.linalg.norm(target), np.finfo(np.float64).tiny)
  if distance[0] <= distance[1:].max():
    return []
  return [
    f"The mean gradient of the selection is {distance[0]:.3g} target lengths away from the evaluation set's. That is "
    f"further than all {draws} random selections of the same size ({distance[1:].min():.3g} to "
    f"{distance[1:].max():.3g}). Use the policy matching or random."
  ]
