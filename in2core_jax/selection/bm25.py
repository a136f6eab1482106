"""BM25: how well the words of one text match those of another; knows no model.

  bm25(q, i) = sum over the words w of q of idf(w) f(w, i) (k1 + 1) / (f(w, i) + k1 (1 - b + b |i| / mean |i|))
  idf(w) = ln(1 + (N - n(w) + 1/2) / (n(w) + 1/2))

f(w, i) counts w in document i, |i| its words, n(w) the documents with w (Robertson and Zaragoza 2009, "The
probabilistic relevance framework: BM25 and beyond", section 3.4). The 1 in the logarithm, which Lucene adds, keeps
words of more than half of the documents from counting against them. A word that stands twice in the query counts twice.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import sparse

K1, B = 1.2, 0.75


def words(text: str) -> list[str]:
  """The words of a text in order, in lower case and without punctuation."""
  return re.findall(r"\w+", text.lower())


def bm25(queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
  """Okapi BM25 of every query with every document, k1 = 1.2 and b = 0.75.

  Args:
    queries: Q texts.
    documents: N texts, which n(w) and the mean length are taken from.

  Returns:
    float64 [Q, N], not negative; 0 where they share no word.
  """
  column: dict[str, int] = {}
  for text in documents:
    for word in words(text):
      column.setdefault(word, len(column))
  counts = _counts(documents, column)
  lengths = counts.sum(axis=1)
  with_word = np.bincount(counts.indices, minlength=counts.shape[1])
  idf = np.log1p((len(documents) - with_word + 0.5) / (with_word + 0.5))
  long = K1 * (1 - B + B * lengths / max(lengths.mean() if len(lengths) else 0.0, 1e-300))
  f = counts.data
  weight = idf[counts.indices] * f * (K1 + 1) / (f + np.repeat(long, np.diff(counts.indptr)))
  weights = sparse.csr_array((weight, counts.indices, counts.indptr), shape=counts.shape)
  return (_counts(queries, column) @ weights.T).toarray()


def _counts(texts: Sequence[str], column: dict[str, int]) -> sparse.csr_array:
  """float64 [len(texts), words]: how often each text has each of the known words."""
  found = [Counter(column[word] for word in words(text) if word in column) for text in texts]
  starts = np.concatenate([[0], np.cumsum([len(own) for own in found], dtype=np.int64)])
  places = np.array([place for own in found for place in own], np.int64)
  values = np.array([count for own in found for count in own.values()], np.float64)
  return sparse.csr_array((values, places, starts), shape=(len(texts), max(len(column), 1)))
