"""The test examples that every model is judged on: which of them are drawn as a whole, and what they can show."""

import dataclasses
import functools
import logging

import numpy as np
from scipy import sparse

from in2core_jax.data import tokenizing
from in2core_jax.data.records import spoken
from in2core_jax.data.sources import names_of
from in2core_jax.errors import how_many
from in2core_jax.evaluation import paired, verdict
from in2core_jax.evaluation.statistics import RetrainRow
from in2core_jax.report import near_duplicates

log = logging.getLogger(__name__)

ENOUGH_TOPICS = 20  # of about equal size, as an interval over new topics needs them


def loss_tokens(test: tokenizing.TokenizedDataset) -> np.ndarray:
  """By how many tokens the loss of a test example is a mean, int [N]; 1 for a preference pair, 0 without response."""
  tokens = test.num_response_tokens
  return tokens if test.second is None else np.minimum(tokens, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class TestExamples:
  """The test examples that have a response.

  Attributes:
    tokens: int [N], response tokens (`loss_tokens`).
    groups: int [N], equal for those that are drawn as a whole: copies, near copies, and where there are enough topics
      those of one topic.
    about: what the groups are, in a sentence.
  """

  __test__ = False  # no class of tests

  tokens: np.ndarray
  groups: np.ndarray
  about: str


def test_examples(test: tokenizing.TokenizedDataset) -> TestExamples:
  """Groups the test examples."""
  rows = np.flatnonzero(test.num_response_tokens)
  records, topics = [test.records[row] for row in rows], tuple(test.topics[row] for row in rows)
  keys = tuple(record.content_key for record in records)
  return _grouped(tuple(map(_text, records)), keys, topics, tuple(loss_tokens(test)[rows].tolist()))


@functools.lru_cache(maxsize=4)  # near copies are looked for once
def _grouped(
  texts: tuple[str, ...], keys: tuple[str, ...], topics: tuple[str, ...], lengths: tuple[int, ...]
) -> TestExamples:
  size, tokens = len(texts), np.array(lengths, np.int64)
  copies = near_duplicates.alike(texts, keys)
  joined = _joined(copies, np.array(topics, dtype=np.str_))
  known = len(set(topics) - {""})
  enough = known > 1 and min(_effective(joined, tokens), _effective(joined, np.ones(size))) >= ENOUGH_TOPICS
  groups = joined if enough else copies
  less = size - len(np.unique(copies))
  alike = "[is a duplicate or near-duplicate of another|are duplicates or near-duplicates of others]"
  said = how_many(less, f"of the {size:,} test examples {alike} and [counts with it|count with them]")
  parts = [said] if less else []
  if enough:
    parts.append(f"test examples of one topic are drawn together ({known:,} topics), so intervals hold for new topics")
  elif known > 1:
    parts.append(
      f"{known:,} topics are too few, or too unequal, for intervals over new topics: they hold for new test examples "
      "of the same topics"
    )
  about = "; ".join(parts)
  return TestExamples(tokens, groups, f"{about[0].upper()}{about[1:]}." if about else "")


def _text(record: tokenizing.Record) -> str:
  """What was asked and answered; a system prompt is the same for many."""
  return " ".join(spoken(message) for message in record.messages if message["role"] != "system")


def _joined(copies: np.ndarray, topics: np.ndarray) -> np.ndarray:
  """Groups that copies or a topic connect; examples without topic are connected by copies alone."""
  size = len(copies)
  own = np.where(topics == "", np.char.add("\0", np.arange(size).astype(np.str_)), topics)
  by_topic = np.unique(own, return_inverse=True)[1] + copies.max(initial=0) + 1
  rows = np.concatenate([copies, by_topic])
  edges = sparse.coo_array((np.ones(size), (copies, by_topic)), shape=(rows.max(initial=0) + 1,) * 2)
  _, label = sparse.csgraph.connected_components(edges, directed=False)
  return np.unique(label[copies], return_inverse=True)[1]


def _effective(groups: np.ndarray, weights: np.ndarray) -> float:
  return paired.effective(np.bincount(groups, weights / weights.sum()))


def judged(test: tokenizing.TokenizedDataset, row: RetrainRow) -> RetrainRow:
  """A row with what its intervals need of the test examples; also one that was kept without."""
  points = test_examples(test)
  return dataclasses.replace(row, test_tokens=points.tokens, test_groups=points.groups)


def too_small(test: tokenizing.TokenizedDataset) -> list[str]:
  """That a test set is too small to see 1 %, with the size that would do, before anything is trained."""
  if test.second is not None:  # it is known of perplexities only
    return []
  points = test_examples(test)
  found = paired.before(points.tokens, points.groups)
  if found.seen <= paired.SEEN:
    return []
  groups = "" if found.groups == found.count else f" in {how_many(found.groups, 'group')} of duplicates or topics"
  return [
    f"The {found.count:,} test examples{groups} are too few to see a difference of 1 %. With them, a perplexity must "
    f"differ by about {verdict.percent(found.seen)} to be seen in four of five cases. To see 1 %, use about "
    f"{verdict.rounded(found.examples_for()):,} test examples or more (--test_data, --test_limit, --split). This "
    f"estimate is for models whose losses differ by {paired.DIFFERENCE:g} nats between test examples, as on Alpaca. "
    "What these models can show is measured after the trainings."
  ]


def tell_size(test: tokenizing.TokenizedDataset) -> None:
  """Warns of a test set that is `too_small`, and says which of its examples count together."""
  for line in (*filter(None, [test_examples(test).about]), *too_small(test)):
    log.warning("%s", line)


def of_the_target(train: tokenizing.TokenizedDataset, evals: tokenizing.TokenizedDataset) -> np.ndarray | None:
  """Which training examples come from where the evaluation examples come from, bool [N].

  That is their topic, or without a topic the source. None where it says nothing: all of them or none do.
  """
  wanted = {topic or name for topic, name in zip(evals.topics, names_of(evals.records), strict=True)}
  named = zip(train.topics, names_of(train.records), strict=True)
  found = np.array([(topic or name) in wanted for topic, name in named])
  return found if found.any() and not found.all() else None
