"""Examples that say nearly the same: groups by the Jaccard similarity of their word shingles.

    similarity(a, b) = |A and B| / |A or B|,   A = the set of runs of 5 words in a row in the text of a

Words are compared in lower case and without punctuation (Broder 1997, "On the resemblance and containment of
documents"). All pairs are compared exactly, so this is for some hundred texts. Writing without spaces between words
counts as few long words, of which only whole copies are found.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from scipy import sparse

SHINGLE = 5  # words
MOST_WORDS = 5_000  # of one text; what comes later is not looked at
THRESHOLD = 0.5
_SHARED_BY = 10  # texts: what more than so many and a tenth of all say is not compared by `alike`


@dataclasses.dataclass(frozen=True)
class Group:
  """Texts that are near copies of at least one other of the group.

  Attributes:
    rows: int64 [n >= 2], positions among the texts, in their order.
    similarity: float64 [n], of each to the nearest other of the group; 1 for copies up to case and punctuation.
  """

  rows: np.ndarray
  similarity: np.ndarray


def shingles(text: str) -> set[tuple[str, ...]]:
  """Runs of five words in a row; the whole text when it has fewer words, nothing when it has none."""
  words = re.findall(r"\w+", text.lower())[:MOST_WORDS]
  if len(words) <= SHINGLE:
    return {tuple(words)} if words else set()
  return set(zip(*(words[start:] for start in range(SHINGLE)), strict=False))


def _members(texts: Sequence[str]) -> sparse.csr_array:
  """Which text has which shingle: 1 or nothing, [n, shingles]."""
  sets = [shingles(text) for text in texts]
  column: dict[tuple[str, ...], int] = {}
  found = [[column.setdefault(shingle, len(column)) for shingle in sorted(own)] for own in sets]
  places = np.array([place for own in found for place in own], np.int64)
  starts = np.concatenate([[0], np.cumsum([len(own) for own in found])])
  return sparse.csr_array((np.ones(len(places)), places, starts), shape=(len(sets), max(len(column), 1)))


def similarities(texts: Sequence[str]) -> np.ndarray:
  """Jaccard similarity of every pair: float64 [n, n], 0 with a text that has no word."""
  member = _members(texts)
  sizes = member.sum(axis=1)
  both = (member @ member.T).toarray()
  either = sizes[:, None] + sizes[None, :] - both
  return both / np.maximum(either, 1)


def near_copies(texts: Sequence[str], threshold: float = THRESHOLD) -> list[Group]:
  """Groups of texts that a chain of similar pairs (similarity >= threshold) connects, in order of their first text."""
  if len(texts) < 2:
    return []
  similar = similarities(texts)
  np.fill_diagonal(similar, 0.0)
  _, label = sparse.csgraph.connected_components(sparse.csr_array(similar >= threshold), directed=False)
  groups = []
  for name in dict.fromkeys(label.tolist()):
    rows = np.flatnonzero(label == name)
    if len(rows) > 1:
      groups.append(Group(rows, similar[np.ix_(rows, rows)].max(axis=1)))
  return groups


def alike(texts: Sequence[str], keys: Sequence[str], threshold: float = THRESHOLD, block: int = 512) -> np.ndarray:
  """Numbers the groups that copies and near copies make: int [n], equal within a group, for many texts.

  What more than a tenth of the texts say (an instruction that they share) makes no near copies and is not compared.

  Args:
    texts: n of them.
    keys: n names, equal for copies.
    threshold: of the similarity.
    block: texts that are compared at a time with all others.
  """
  size = len(texts)
  member = _members(texts)
  member = member[:, np.asarray(member.sum(axis=0)).ravel() <= max(_SHARED_BY, size // 10)].tocsr()
  sizes, edges = np.asarray(member.sum(axis=1)).ravel(), [np.zeros((2, 0), np.int64)]
  for start in range(0, size, block):
    both = (member[start : start + block] @ member.T).tocoo()
    either = sizes[start + both.row] + sizes[both.col] - both.data
    close = both.data >= threshold * either
    edges.append(np.stack([start + both.row[close], both.col[close]]))
  first: dict[str, int] = {}
  edges.append(np.array([[first.setdefault(key, row), row] for row, key in enumerate(keys)], np.int64).reshape(-1, 2).T)
  rows, columns = np.concatenate(edges, axis=1)
  linked = sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape=(size, size))
  return sparse.csgraph.connected_components(linked, directed=False)[1].astype(np.int64)
