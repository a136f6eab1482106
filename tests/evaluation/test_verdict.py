"""What the verdict on retrained models may say, the table behind it, and how test examples are grouped."""

import itertools
import math
import types

import numpy as np
import pytest

from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics as ev
from in2core_jax.evaluation import verdict
from in2core_jax.pipeline import judging
from in2core_jax.report import near_duplicates

SIZE = 40
HARD = np.random.default_rng(0).normal(0, 0.5, SIZE)
HARD -= HARD.mean()


def row(policy, seed, value, tokens=1000, noise=0.02, losses=None):
  """A training whose perplexity is `value` by token and by example."""
  if losses is None:
    rng = np.random.default_rng((seed, sum(map(ord, policy))))
    luck = rng.normal(0, noise, SIZE)
    losses = math.log(value) + HARD + luck - luck.mean()
  found = float(np.exp(np.mean(losses)))
  return ev.RetrainRow(policy, seed, 10, 200, 100, 50, tokens, found, found, losses, np.full(SIZE, 7))


RANDOM = [row("random", s, p) for s, p in enumerate([4.00, 4.06, 4.12])]


def test_summarise():
  table = verdict.summarise([row("random", 0, 4.0), row("full", 0, 3.0), row("random", 1, 5.0)])
  assert [(t["policy"], t["seeds"]) for t in table] == [("random", 2), ("full", 1)]
  random, full = table
  assert random["perplexity"] == pytest.approx(4.5) and full["response_tokens"] == 100
  assert (random["perplexity_min"], random["perplexity_max"]) == pytest.approx((4.0, 5.0))
  assert random["perplexity_low"] < 4.5 < random["perplexity_high"] and math.isnan(random["to_random"])
  assert full["to_random"] == full["example_to_random"] == pytest.approx(3 / math.sqrt(20))
  assert full["to_random_low"] < full["to_random"] < full["to_random_high"]  # with the spread of the random sets
  assert random["to_full"] == pytest.approx(1 / full["to_random"])
  with pytest.raises(UserError, match="no retrained models"):
    verdict.summarise([])
  with pytest.raises(UserError, match="two rows of seed 0"):
    verdict.summarise([row("random", 0, 4.0), row("random", 0, 4.0)])


def test_verdict_calls_a_clear_difference():
  rows = [row("full", s, 3.32 + s / 100) for s in range(3)] + RANDOM
  first, second = verdict.verdict(rows + [row("proponents", s, 7.8 + s / 10) for s in range(3)]).split("\n")
  assert first.startswith(
    "Full data: perplexity 3.330 (mean of 3 seeds, 3.320 to 3.340); lower (better) than random, by"
  )
  assert first.endswith("Random sets: perplexity 4.060 (mean of 3 seeds, 4.000 to 4.120).")
  assert second.startswith(
    "proponents: perplexity 7.900 (mean of 3 seeds, 7.800 to 8.000); higher (worse) than random, by token (1.9"
  )
  assert "higher (worse) than full data, by token (2.37" in second and " and by example (2.37" in second


def test_verdict_does_not_claim_what_the_interval_does_not_allow():
  text = verdict.verdict(RANDOM + [row("matching", 0, 3.95)])  # below all three, within what a fourth could be
  assert "cannot be distinguished from random, by token" in text and "better" not in text
  assert "Full data: not retrained." in text and "full data's" not in text
  assert "lower (better) than random, by token" in verdict.verdict(RANDOM + [row("matching", 0, 3.0)])
  # The same means, on test examples that suit the policy or do not: another test set could say otherwise.
  rng = np.random.default_rng(1)
  suits = rng.normal(0, 1.5, SIZE)
  wild = row("matching", 0, 3.0, losses=math.log(3.0) + HARD + suits - suits.mean())
  assert wild.perplexity == pytest.approx(3.0)
  assert "cannot be distinguished from random" in verdict.verdict(RANDOM + [wild])


def test_a_difference_by_token_alone_is_told_as_that():
  tokens = np.array([100] * 20 + [1] * 20)
  rows = []
  for policy, seed, shift in [("random", 0, 0), ("random", 1, 0), ("random", 2, 0), ("longest", 0, -0.5)]:
    luck = np.random.default_rng(seed + 10 * len(policy)).normal(0, 0.02, SIZE)
    losses = 1.5 + HARD + luck + np.where(tokens > 1, shift, -2 * shift * (np.arange(SIZE) % 2))
    own = [math.exp(np.average(losses, weights=w)) for w in (tokens, np.ones(SIZE))]
    rows.append(ev.RetrainRow(policy, seed, 10, 200, 100, 50, 1000, *own, losses, tokens))
  text = verdict.verdict(rows)
  assert "by token lower (better) than random (" in text
  assert ", but by example cannot be distinguished from random (" in text


def test_without_an_interval_the_reason_is_told():
  text = verdict.verdict([row("random", 0, 4.0), row("matching", 0, 3.9)])
  assert "0.975 times random's by token and 0.975 times by example, without an interval: one training each" in text
  old = [ev.RetrainRow(name, 0, 10, 200, 100, 50, 1000, 4.0, 5.0) for name in ("random", "matching")]
  assert "without an interval: no losses by test example are kept" in verdict.verdict(old)
  assert verdict.many_comparisons({"": old}) == verdict.sensitivity([old]) == []


def test_rows_are_read_back_with_what_intervals_need():
  one = row("random", 0, 4.0)
  again = ev.RetrainRow.from_json(one.as_json() | {"seconds": 3})
  np.testing.assert_array_equal(again.test_tokens, one.test_tokens)
  np.testing.assert_array_equal(again.loss_per_test_example, one.loss_per_test_example)
  old = {name: value for name, value in one.as_json().items() if not name.startswith("test_")}
  assert ev.RetrainRow.from_json(old).test_tokens.size == 0


def test_verdict_minds_trained_tokens_and_nothing_to_judge():
  text = verdict.verdict(RANDOM + [row("longest", 0, 3.0, tokens=1500)])
  assert "Mind that longest trained on 150% of the response tokens that random did." in text
  assert "Mind" not in verdict.verdict(RANDOM + [row("matching", 0, 3.0, tokens=1080)])
  assert "no selection to judge" in verdict.verdict(RANDOM)


def test_many_comparisons_are_counted_once_for_all_verdicts():
  rows = RANDOM + [row("matching", 0, 3.0), row("longest", 0, 4.05)]
  (said,) = verdict.many_comparisons({"": rows})
  assert said == (
    "4 comparisons by token or by example, each at 95%: where nothing differs, about 0.2 of 4 intervals exclude 1 by "
    "chance; 2 do. With Holm's correction for all 4, 2 do: matching against random by token; matching against random "
    "by example."
  )
  (said,) = verdict.many_comparisons({"a": rows, "b": RANDOM + [row("longest", 0, 4.05)]})
  assert said.startswith("6 comparisons") and "a: matching against random by token" in said
  assert verdict.many_comparisons({"": RANDOM}) == verdict.many_comparisons({}) == []


def test_what_the_test_set_could_have_seen_is_measured():
  (said,) = verdict.sensitivity([RANDOM + [row("matching", 0, 3.9)]])
  assert said.startswith("Measured on these 40 test examples: a difference of ") and "more --seeds" in said


def test_every_pair_of_counts_gives_a_sentence():
  for ours, theirs, full in itertools.product((1, 2), (0, 1, 3), (0, 1, 2)):
    rows = [row("p", s, 3 + s / 10) for s in range(ours)]
    rows += [row("random", s, 4 + s / 10) for s in range(theirs)] + [row("full", s, 2 + s / 10) for s in range(full)]
    text = verdict.verdict(rows)
    assert "nan" not in text and "p: perplexity 3.0" in text
    verdict.many_comparisons({"": rows}), verdict.sensitivity([rows])


# ---- the test examples ---------------------------------------------------------------


def part_of(texts, topics=None, tokens=20):
  records = [types.SimpleNamespace(messages=[{"role": "user", "content": text}], content_key=text) for text in texts]
  return types.SimpleNamespace(
    records=records,
    topics=topics or [""] * len(texts),
    num_response_tokens=np.full(len(texts), tokens),
    second=None,
  )


def words(number, count=30):
  return " ".join(map(str, np.random.default_rng(number).integers(0, 10**6, count)))


def test_copies_and_near_copies_are_drawn_together():
  long = words(1)
  found = judging.test_examples(part_of([long, words(2), f"{long} more", "hi", "hi", words(3)]))
  a, b, again, hi, copy, c = found.groups
  assert a == again and hi == copy and len({a, b, hi, c}) == 4
  assert found.about.startswith("2 of the 6 test examples are duplicates or near-duplicates")
  shared = words(0)  # an instruction that all have makes no near copies
  assert (
    len(np.unique(near_duplicates.alike([f"{shared} {words(n, 8)}" for n in range(1, 40)], list(map(str, range(39))))))
    == 39
  )


def test_topics_are_groups_where_there_are_enough():
  texts = [words(n) for n in range(1, 81)]
  few = judging.test_examples(part_of(texts, [f"t{n % 5}" for n in range(80)]))
  assert len(np.unique(few.groups)) == 80 and "5 topics are too few" in few.about
  many = judging.test_examples(part_of(texts, [f"t{n % 40}" for n in range(80)]))
  assert len(np.unique(many.groups)) == 40 and "40 topics" in many.about
  assert judging.test_examples(part_of(texts)).about == ""


def test_a_test_set_that_is_too_small_is_told_with_the_size_that_would_do():
  (said,) = judging.too_small(part_of([words(n) for n in range(1, 27)]))
  assert said.startswith("The 26 test examples are too few to see a difference of 1 %")
  assert "To see 1 %, use about 800 test examples or more" in said
