"""Intervals for new test examples and new trainings: coverage under a known truth, and the parts by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from in2core_jax.errors import UserError
from in2core_jax.evaluation import paired
from in2core_jax.evaluation.statistics import confidence_interval

TRUTH = 0.03  # nats that policy A is above B for an example of log length 3; longer ones differ by TILT more
TILT = 0.02
SIGMA = 0.8  # of the log lengths


def oracle(by):
  """The difference over endless test examples and trainings: by token, lengths weigh themselves (a log-normal)."""
  return TRUTH + (TILT * SIGMA**2 if by == "token" else 0.0)


def draw(rng, size, ours, theirs, seeds=0.0, examples=0.0, both=0.0, copies=1, differ=1.0):
  """Losses of policies a and b on `size` test examples, their tokens and groups.

  Args:
    rng: of the draws.
    size, ours, theirs: test examples, trainings of a and of b.
    seeds, examples, both: standard deviations of what a training, an example, and the two together add to a loss.
    copies: how often each example is there.
    differ: 0 for two policies that do not differ.
  """
  groups = np.arange(size) // copies
  count = groups[-1] + 1
  length = rng.normal(3, SIGMA, count)
  own = rng.normal(0, examples, count) + differ * (TRUTH + TILT * (length - 3))
  hard = rng.normal(2, 1, count)
  of = lambda trained: rng.normal(0, seeds, (trained, 1)) + rng.normal(0, both, (trained, count))  # noqa: E731
  losses = {"a": hard + own + of(ours), "b": hard + of(theirs)}
  # Lengths are not rounded: the oracle is exact.
  return {name: one[:, groups] for name, one in losses.items()}, np.maximum(np.exp(length), 1.0)[groups], groups


CASES = {
  # a training that shifts all losses; examples that a policy suits or not; luck of a training on an example
  "few examples, one training against three": (26, 1, 3, {"examples": 0.15, "both": 0.1}),
  "few examples, pure noise": (26, 3, 3, {"both": 0.15}),
  "few examples, noise and one training": (26, 1, 3, {"both": 0.15}),
  "all three": (100, 3, 3, {"seeds": 0.01, "examples": 0.1, "both": 0.1}),
  "trainings decide": (200, 2, 5, {"seeds": 0.03, "examples": 0.02, "both": 0.02}),
  "two trainings each": (60, 2, 2, {"seeds": 0.01, "examples": 0.1, "both": 0.05}),
  "examples decide": (400, 5, 5, {"seeds": 0.003, "examples": 0.15, "both": 0.05}),
  "copies": (120, 3, 3, {"seeds": 0.005, "examples": 0.1, "both": 0.05, "copies": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_intervals_cover_the_truth_as_often_as_they_say(name):
  size, ours, theirs, parts = CASES[name]
  rng, draws, covered = np.random.default_rng(1), 400, {"token": 0, "example": 0}
  for _ in range(draws):
    losses, tokens, groups = draw(rng, size, ours, theirs, **parts)
    found = paired.Paired(losses, tokens, groups)
    for by in paired.BY:
      interval = found.difference("a", "b", by).interval()
      covered[by] += interval.low <= oracle(by) <= interval.high
  for by, count in covered.items():
    assert 0.93 <= count / draws <= 0.99, (by, count / draws)


def test_what_takes_one_source_of_variation_for_all_does_not_cover_the_truth():
  """The interval over seeds that stood here before, over examples alone, and over copies as if they were others."""
  rng, draws, covered = np.random.default_rng(2), 300, np.zeros(3)
  for _ in range(draws):
    losses, tokens, groups = draw(rng, 60, 3, 3, seeds=0.02, examples=0.1, both=0.05, copies=3)
    shares, truth = tokens / tokens.sum(), oracle("token")
    means = {name: own @ shares for name, own in losses.items()}
    seeds = stats.ttest_ind(means["a"], means["b"], equal_var=False).confidence_interval(0.95)
    alone = confidence_interval((losses["a"].mean(axis=0) - losses["b"].mean(axis=0))[::3])
    copies = paired.Paired(losses, tokens).difference("a", "b", "token").interval()
    bounds = ((seeds.low, seeds.high, truth), (alone.low, alone.high, TRUTH), (copies.low, copies.high, truth))
    covered += [low <= wanted <= high for low, high, wanted in bounds]
  assert (covered / draws < [0.85, 0.92, 0.92]).all(), covered / draws


@pytest.mark.parametrize(("ours", "theirs"), [(1, 3), (3, 3), (1, 5)])
def test_pure_noise_on_a_few_test_examples_is_rarely_called_a_difference(ours, theirs):
  rng, draws, calls = np.random.default_rng(ours), 400, 0
  for _ in range(draws):
    found = paired.Paired(*draw(rng, 26, ours, theirs, both=0.15, seeds=0.003, differ=0.0))
    calls += abs(found.difference("a", "b", "token").mean) > found.difference("a", "b", "token").half()
  assert calls / draws < 0.06


def test_the_parts_by_hand():
  """Equal shares: Student's t over examples, where the trainings of a policy are all alike."""
  rng = np.random.default_rng(0)
  a, b = rng.normal(2, 1, 30), rng.normal(2, 1, 30)
  alike = paired.Paired({"a": np.stack([a, a]), "b": b}, np.full(30, 7)).difference("a", "b", "token")
  wanted = stats.ttest_rel(a, b)
  interval, found = wanted.confidence_interval(0.95), alike.interval()
  assert (found.mean, found.low, found.high) == pytest.approx((np.mean(a - b), interval.low, interval.high))
  assert alike.p == pytest.approx(wanted.pvalue, rel=1e-6) and found.count == 30
  # Trainings that shift every loss alike: Welch's t over them, and nothing from the examples.
  shifts = {"a": np.array([[0.1], [0.3], [0.2]]), "b": np.array([[1.0], [1.5], [1.2], [1.1]])}
  shifted = paired.Paired({name: a + own for name, own in shifts.items()}, np.full(30, 7)).difference("a", "b", "token")
  welch = stats.ttest_ind(shifts["a"][:, 0], shifts["b"][:, 0], equal_var=False).confidence_interval(0.95)
  found = shifted.interval()
  assert (found.low, found.high) == pytest.approx((welch.low, welch.high))
  # One training borrows the spread of the others, as a new observation of theirs.
  one = paired.Paired({"a": a + 0.1, "b": a + shifts["b"]}, np.full(30, 7)).difference("a", "b", "token")
  half = stats.t.ppf(0.975, 3) * shifts["b"].std(ddof=1) * math.sqrt(1.25)
  assert one.seeds == pytest.approx(shifts["b"].var(ddof=1) * 1.25) and one.half() == pytest.approx(half, rel=1e-6)


def test_tokens_weigh_and_few_long_responses_decide():
  losses = {"a": [[1.0, 3.0], [1.0, 3.0]], "b": [[0.0, 0.0]]}
  found = paired.Paired(losses, [30, 10])
  assert found.difference("a", "b", "token").mean == pytest.approx(1.5)
  assert found.difference("a", "b", "example").mean == pytest.approx(2.0)
  assert found.mean("a", "token").mean == pytest.approx(1.5)
  rng = np.random.default_rng(0)
  losses = {"a": rng.normal(size=(2, 40)), "b": rng.normal(size=(2, 40))}
  long = paired.Paired(losses, [1000] + [10] * 39).difference("a", "b", "token")
  assert (
    long.examples_freedom == 1.0
    and long.half() > 5 * paired.Paired(losses, [10] * 40).difference("a", "b", "token").half()
  )


def test_groups_are_drawn_as_a_whole():
  rng = np.random.default_rng(0)
  losses = {name: rng.normal(size=(2, 20)) for name in "ab"}
  tokens = rng.integers(1, 50, 20)
  once = paired.Paired(losses, tokens).difference("a", "b", "token")
  twice = {name: np.repeat(own, 3, axis=1) for name, own in losses.items()}
  again = paired.Paired(twice, np.repeat(tokens, 3), np.repeat(np.arange(20), 3)).difference("a", "b", "token")
  assert again.ratio().low == pytest.approx(once.ratio().low) and again.ratio().high == pytest.approx(once.ratio().high)
  assert (again.count, again.groups) == (60, 20)


@pytest.mark.parametrize(
  ("losses", "tokens", "groups", "note"),
  [
    ({"a": [[1.0, 2.0]], "b": [[1.0, 2.0]]}, [3, 4], None, "one training each"),
    ({"a": [[1.0], [2.0]], "b": [[1.0]]}, [3], None, "one test example"),
    ({"a": [[1.0, 2.0], [2.0, 2.0]], "b": [[1.0, 2.0]]}, [3, 4], [5, 5], "all test examples are one group"),
  ],
)
def test_where_there_is_no_interval_the_reason_is_told(losses, tokens, groups, note):
  found = paired.Paired(losses, tokens, groups).difference("a", "b", "token")
  assert note in found.note and math.isnan(found.ratio().low) and math.isnan(found.p) and not math.isnan(found.mean)
  assert note in str(found.ratio())


def test_losses_of_other_examples_are_refused():
  with pytest.raises(UserError, match="b was judged on 3 test examples and not on 2"):
    paired.Paired({"a": [[1.0, 2.0]], "b": [[1.0, 2.0, 3.0]]}, [3, 4])
  with pytest.raises(UserError, match="a: losses .* diverged"):
    paired.Paired({"a": [[1.0, np.nan]]}, [3, 4])
  with pytest.raises(UserError, match="response tokens"):
    paired.Paired({"a": [[1.0, 2.0]]}, [3, 0])


def test_holms_correction_by_hand():
  at = lambda p: paired.Estimate(stats.norm.isf(p / 2), 0.0, 1.0, 1.0, 1e9, 9, 9)  # noqa: E731
  none = paired.Estimate(1.0, *[math.nan] * 4, 9, 9, "none")
  given = {"first": at(0.04), "second": at(0.001), "third": at(0.015), "fourth": at(0.6), "unknown": none}
  assert given["third"].p == pytest.approx(0.015, rel=1e-5)
  # Of four: 0.001 < 0.05 / 4, 0.015 < 0.05 / 3, 0.04 > 0.05 / 2.
  assert paired.by_chance(given) == (["first", "second", "third"], ["second", "third"])


def test_a_test_set_says_before_what_it_will_see():
  """Measured afterwards on differences of the spread that was foretold, it is the same; enough examples see 1 %."""
  small = paired.before(np.full(26, 20))
  assert small.seen == pytest.approx(0.1 / math.sqrt(26) * stats.t.ppf([0.975, 0.8], 25).sum())
  needed = math.ceil(small.examples_for())
  assert needed == pytest.approx((0.1 * 2.8016 / math.log(1.01)) ** 2, abs=1)
  assert paired.before(np.full(needed, 20)).seen == pytest.approx(math.log(1.01), rel=0.01)
  assert paired.before(np.array([500] + [5] * 99)).seen > 5 * paired.before(np.full(100, 20)).seen
  rng = np.random.default_rng(0)
  seen = 0
  for _ in range(300):  # so large a difference is seen in four of five cases
    losses = {"a": 2 + small.seen + np.tile(rng.normal(0, 0.1, 26), (2, 1)), "b": np.full((1, 26), 2.0)}
    seen += paired.Paired(losses, np.full(26, 20)).difference("a", "b", "token").interval().low > 0
  assert seen / 300 == pytest.approx(0.8, abs=0.05)
