"""Words for people: counts and what agrees with them."""

import pytest

from in2core_jax.errors import how_many


@pytest.mark.parametrize(
  ("count", "what", "said"),
  [
    (0, "file", "0 files"),
    (1, "training example", "1 training example"),
    (2000, "training example", "2,000 training examples"),
    (1, "quer[y|ies] [has|have] no text", "1 query has no text"),
    (3, "quer[y|ies] [has|have] no text", "3 queries have no text"),
    (1, "process[es]", "1 process"),
    (2, "of the 9 examples [is a duplicate|are duplicates]", "2 of the 9 examples are duplicates"),
  ],
)
def test_words_agree_with_their_count(count, what, said):
  assert how_many(count, what) == said
