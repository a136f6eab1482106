"""The policies against brute force, the budget, the ties and the warnings."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest

from in2core_jax.errors import UserError
from in2core_jax.selection import aggregation, coreset, density, matching
from in2core_jax.selection.coreset import select_rows
from in2core_jax.selection.inputs import SIMILARITIES, Budget, PolicyInputs, matching_target
from in2core_jax.selection.two_samples import Apart
from in2core_jax.selection.warnings import selection_warnings


def make_inputs(size=40, seed=0, width=6, **changes):
  rng = np.random.default_rng(seed)
  responses = rng.integers(1, 60, size)
  values = {
    "scores": rng.normal(size=size),
    "loss": rng.gamma(2.0, size=size),
    "num_tokens": responses + rng.integers(5, 20, size),
    "num_response_tokens": responses,
    "topics": [("food", "sport", "trivia")[i] for i in rng.choice(3, size, p=(0.6, 0.3, 0.1))],
    "ids": [f"id{i:04d}" for i in rng.permutation(size)],
    "features": rng.normal(size=(size, width)),
    "target": rng.normal(size=(5, width)),
    "similarities": {name: rng.uniform(-1, 1, (5, size)) for name in SIMILARITIES},
    "kernel": (lambda z: z @ z.T)(rng.normal(size=(size, 7))),
    "towards": rng.normal(size=size),
    "apart": Apart(0.05, 0.5, 0.005),
    "drop": rng.uniform(size=size),
    "similar_tokens": rng.integers(1, 30, 5),
  }
  return PolicyInputs(**{**values, **changes})


def naive_greedy(features, target, count, ids):
  """Every step tries every example: O(N^2 d)."""
  chosen = []
  for _ in range(count):
    free = sorted((i for i in range(len(ids)) if i not in chosen), key=lambda i: ids[i])
    distance = [np.linalg.norm(features[[*chosen, i]].mean(axis=0) - target) for i in free]
    chosen.append(free[int(np.argmin(distance))])
  return chosen


# ------------------------------------------------------------------------------------------------ budget


@pytest.mark.parametrize(
  ("given", "match"),
  [
    ({}, "none given"),
    ({"fraction": 0.5, "num_examples": 3}, "exactly one"),
    ({"fraction": 0.0}, "outside"),
    ({"fraction": 1.5}, "outside"),
    ({"fraction": float("nan")}, "outside"),
    ({"num_examples": 0}, "at least 1"),
    ({"num_examples": 2.5}, "whole number"),
    ({"token_budget": 0}, "at least 1"),
  ],
)
def test_budget_refuses(given, match):
  with pytest.raises(UserError, match=match):
    Budget(**given)


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 20), (0.0125, 1), (0.3625, 15), (1.0, 40), (1e-9, 1)])
def test_fraction_rounds_half_up(fraction, count):
  assert len(select_rows("proponents", make_inputs(), Budget(fraction=fraction))) == count


def test_num_examples_beyond_the_pool():
  with pytest.raises(UserError, match="budget=41 is more than the 40"):
    select_rows("proponents", make_inputs(), Budget(num_examples=41))


@pytest.mark.parametrize("policy", coreset.POLICIES)
def test_token_budget_ends_where_the_next_would_exceed(policy):
  inputs = make_inputs()
  everything = select_rows(policy, inputs, Budget(num_examples=40), seed=3)
  rows = select_rows(policy, inputs, Budget(token_budget=400), seed=3)
  total = inputs.num_tokens[rows].sum()
  assert 0 < total <= 400
  # The draw, and how far weights are spread, depend on how many are wanted.
  if policy not in ("length_matched_random", *coreset.WEIGHTED_POLICIES):
    assert rows.tolist() == everything[: len(rows)].tolist()
    assert total + inputs.num_tokens[everything[len(rows)]] > 400


def test_token_budget_counts_all_tokens_and_does_not_skip():
  inputs = PolicyInputs([3, 2, 1], None, [10, 30, 5], [1, 1, 1], ["t"] * 3, ["a", "b", "c"])
  assert select_rows("proponents", inputs, Budget(token_budget=20)).tolist() == [0]
  assert select_rows("proponents", inputs, Budget(token_budget=40)).tolist() == [0, 1]
  assert select_rows("proponents", inputs, Budget(token_budget=10**9)).tolist() == [0, 1, 2]
  with pytest.raises(UserError, match="less than the shortest example's 5"):
    select_rows("proponents", inputs, Budget(token_budget=4))
  with pytest.raises(UserError, match="10 tokens of the first choice"):
    select_rows("proponents", inputs, Budget(token_budget=6))


# ------------------------------------------------------------------------------------------- every policy


@pytest.mark.parametrize("policy", coreset.POLICIES)
def test_every_policy_ignores_the_order_of_reading_and_empty_examples(policy):
  inputs = make_inputs()
  responses = inputs.num_response_tokens.copy()
  empty = [3, 17, 30]
  responses[empty] = 0
  scores = inputs.scores.copy()
  scores[empty] = np.nan  # what cannot be chosen must not matter
  names = ("loss", "num_tokens", "topics", "ids", "features", "drop")
  shuffle = np.random.default_rng(1).permutation(40)

  def at(order):
    changes = {name: np.asarray(getattr(inputs, name))[order] for name in names}
    changes |= {"kernel": inputs.kernel[np.ix_(order, order)], "towards": inputs.towards[order]}
    changes["similarities"] = {name: values[:, order] for name, values in inputs.similarities.items()}
    return make_inputs(scores=scores[order], num_response_tokens=responses[order], **changes)

  here, there = at(np.arange(40)), at(shuffle)
  rows = select_rows(policy, here, Budget(num_examples=18), seed=5)
  others = select_rows(policy, there, Budget(num_examples=18), seed=5)
  assert len(set(rows.tolist())) == 18 and not set(rows.tolist()) & set(empty)
  assert [here.ids[r] for r in rows] == [there.ids[r] for r in others]
  assert len(select_rows(policy, here, Budget(fraction=1.0))) == 37
  with pytest.raises(UserError, match="more than the 37 examples with response tokens"):
    select_rows(policy, here, Budget(num_examples=38))


def test_similarities_choose_by_their_mean_their_nearest_or_in_turns():
  inputs = make_inputs()
  seven = Budget(num_examples=7)
  for name, values in inputs.similarities.items():
    best = lambda means: np.argsort(-means)[:7].tolist()  # noqa: E731
    wanted = {"mean": best(values.mean(axis=0)), "nearest": best(aggregation.nearest_mean(values))}
    for how, rows in wanted.items():
      assert select_rows(name, dataclasses.replace(inputs, aggregate=how), seven).tolist() == rows
    shares = {"round_robin": np.ones(5), "weighted_turns": aggregation.turn_shares(inputs.similar_tokens, 5)}
    for how, share in shares.items():
      wanted[how] = turns = select_rows(name, dataclasses.replace(inputs, aggregate=how), seven).tolist()
      for turn, row in zip(aggregation.turn_order(share, 7), turns, strict=True):  # the best of its own that is left
        left = [other for other in range(40) if other not in turns[: turns.index(row)]]
        assert row == left[int(np.argmax(values[turn, left]))]
    assert select_rows(name, inputs, seven).tolist() == wanted[SIMILARITIES[name]]
    with pytest.raises(UserError, match=f"policy {name} needs {name}"):
      select_rows(name, make_inputs(similarities={}), seven)


def test_auto_aims_at_queries_of_another_kind_alone():
  inputs = make_inputs(alike=np.arange(40) // 2)
  ten = Budget(num_examples=10)
  assert select_rows("auto", inputs, ten, 3).tolist() == select_rows("hybrid", inputs, ten).tolist()
  own_kind = [dataclasses.replace(inputs, apart=one) for one in (Apart(0.001, 0.5, 0.005), Apart(0.05, 0.1, 0.2), None)]
  drawn, *others = (select_rows("auto", own, Budget(num_examples=20), 3) for own in own_kind)
  assert all(other.tolist() == drawn.tolist() for other in others)
  assert len(set(drawn // 2)) == 20  # no two that say nearly the same
  assert (
    drawn.tolist() == coreset.select_copies_last("random", inputs, Budget(num_examples=20), inputs.alike, 3).tolist()
  )


@pytest.mark.parametrize("policy", SIMILARITIES)
def test_near_copies_share_one_slot(policy):
  plain = make_inputs()
  order = select_rows(policy, plain, Budget(fraction=1.0))
  alike = np.arange(40)
  alike[order[1]] = alike[order[2]] = alike[order[0]]  # the three best say nearly the same
  chosen = select_rows(policy, dataclasses.replace(plain, alike=alike), Budget(num_examples=38))
  assert chosen[0] == order[0] and chosen.tolist() == [order[0], *order[3:]]


def test_ties_go_by_id():
  inputs = make_inputs(
    scores=np.zeros(40), loss=np.ones(40), num_tokens=np.full(40, 9), num_response_tokens=np.full(40, 4)
  )
  by_id = np.argsort(np.asarray(inputs.ids)).tolist()
  for policy in ("proponents", "opponents", "longest", "highest_loss"):
    assert select_rows(policy, inputs, Budget(num_examples=40)).tolist() == by_id
  copies = make_inputs(features=np.tile(np.random.default_rng(0).normal(size=6), (40, 1)).astype(np.float32))
  assert select_rows("matching", copies, Budget(num_examples=40)).tolist() == by_id


def test_sorting_policies():
  inputs = make_inputs()
  by = {"proponents": -inputs.scores, "opponents": inputs.scores, "highest_loss": -inputs.loss}
  for policy, key in by.items():
    expected = sorted(range(40), key=lambda i, key=key: (key[i], inputs.ids[i]))
    assert select_rows(policy, inputs, Budget(num_examples=40)).tolist() == expected
  expected = sorted(range(40), key=lambda i: (-inputs.num_response_tokens[i], -inputs.num_tokens[i], inputs.ids[i]))
  assert select_rows("longest", inputs, Budget(num_examples=40)).tolist() == expected


def test_random_depends_on_the_seed_only():
  inputs = make_inputs()
  draws = {tuple(select_rows("random", inputs, Budget(fraction=0.5), seed)) for seed in range(10)}
  assert len(draws) == 10
  assert tuple(select_rows("random", inputs, Budget(fraction=0.5), 4)) in draws


def test_length_matched_random_has_the_histogram_of_the_proponents():
  responses = np.repeat(np.arange(1, 11), 40)  # ten lengths, so that every length has a bin of its own
  inputs = make_inputs(
    400, scores=-responses + np.random.default_rng(2).normal(size=400), num_response_tokens=responses
  )
  budget = Budget(fraction=0.3)
  chosen, drawn = (select_rows(p, inputs, budget, seed=1) for p in ("proponents", "length_matched_random"))
  np.testing.assert_array_equal(np.bincount(responses[chosen]), np.bincount(responses[drawn]))
  assert len(set(drawn) & set(chosen)) < len(chosen)
  many = make_inputs(1000, seed=4)
  chosen, drawn = (select_rows(p, many, budget, seed=1) for p in ("proponents", "length_matched_random"))
  sums = [many.num_response_tokens[r].sum() for r in (chosen, drawn)]
  assert abs(sums[0] / sums[1] - 1) < 0.03


def test_topic_quota_keeps_the_fraction_of_every_topic_at_every_size():
  inputs = make_inputs(100)
  topics, scores = np.asarray(inputs.topics), inputs.scores
  for count in (10, 37, 50, 99):
    rows = select_rows("topic_quota", inputs, Budget(num_examples=count))
    for topic in set(inputs.topics):
      members = np.flatnonzero(topics == topic)
      kept = rows[topics[rows] == topic]
      assert abs(len(kept) - count / 100 * len(members)) <= 1.0
      assert kept.tolist() == members[np.argsort(-scores[members])][: len(kept)].tolist()


# ----------------------------------------------------------------------------------------------- matching


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("gram_bytes", [0, 2**28])
def test_matching_equals_the_naive_greedy(dtype, gram_bytes, monkeypatch):
  monkeypatch.setattr(matching, "_GRAM_BYTES", gram_bytes)  # both ways of getting F F^T
  inputs = make_inputs(30, seed=7, features=np.random.default_rng(7).normal(size=(30, 6)).astype(dtype))
  rows = select_rows("matching", inputs, Budget(num_examples=25))
  expected = naive_greedy(inputs.features.astype(np.float64), inputs.target.mean(axis=0), 25, inputs.ids)
  assert rows.tolist() == expected


def test_herding_is_greedy_matching_of_any_features_with_that_kernel():
  rng = np.random.default_rng(0)
  features, target = rng.normal(size=(30, 8)), rng.normal(size=8)
  found = matching.herding(features @ features.T, features @ target, 12)
  assert found.tolist() == naive_greedy(features, target, 12, [f"{row:02d}" for row in range(30)])


def test_matching_with_copies_equals_the_naive_greedy():
  base = np.random.default_rng(3).normal(size=(8, 6))
  inputs = make_inputs(32, features=np.tile(base, (4, 1)))
  rows = select_rows("matching", inputs, Budget(num_examples=20))
  unique_mean = inputs.features[rows].mean(axis=0)
  expected = naive_greedy(inputs.features, inputs.target.mean(axis=0), 20, inputs.ids)
  assert rows.tolist() == expected
  np.testing.assert_allclose(unique_mean, inputs.features[expected].mean(axis=0))


def test_a_shrunk_target_has_less_error_than_the_mean_of_the_queries():
  rng = np.random.default_rng(0)
  pool = rng.normal(size=(400, 30)) + 1
  far, near = [], []
  for _ in range(50):
    queries = rng.normal(size=(10, 30)) + 1  # of the pool's kind: ten of them know less than the pool
    target, kept, beyond_chance = matching.shrunk_target(queries, pool.astype(np.float32), np.ones(10), np.ones(400))
    near.append([np.sum((value - 1) ** 2) for value in (target, queries.mean(axis=0))])
    assert 0 <= beyond_chance <= kept < 0.6
    queries += 3  # of another kind: believed
    target, kept, beyond_chance = matching.shrunk_target(queries, pool, np.ones(10), np.ones(400))
    far.append([np.sum((value - 4) ** 2) for value in (target, queries.mean(axis=0))])
    assert kept >= beyond_chance > 0.97
  near, far = np.mean(near, axis=0), np.mean(far, axis=0)
  assert near[0] < 0.3 * near[1] and far[0] < 1.01 * far[1]


def test_many_queries_are_believed_more_than_a_small_pool():
  rng, errors = np.random.default_rng(3), []
  for _ in range(50):
    queries, pool = rng.normal(size=(500, 100)), rng.normal(size=(50, 100))
    found = matching.shrunk_target(queries, pool, np.ones(500), np.ones(50))
    errors.append([np.sum(value**2) for value in (found.target, queries.mean(axis=0), pool.mean(axis=0))])
    assert found.kept > 0.8 and found.beyond_chance < 0.3
  shrunk, plain, other = np.mean(errors, axis=0)
  assert shrunk < plain < 0.2 * other


def test_a_shrunk_target_follows_its_formula_and_weights_are_repetitions_of_the_mean():
  rng = np.random.default_rng(1)
  queries, pool, weights = rng.normal(size=(3, 4)) + 1, rng.normal(size=(1500, 4)), np.array([1, 0, 3])
  target, kept, beyond_chance = matching.shrunk_target(queries, pool, weights, np.ones(1500))
  share = weights / 4
  q, p = share @ queries, pool.mean(axis=0)
  noise = np.sum(share**2 * np.sum((queries - q) ** 2, axis=1)) / (1 - np.sum(share**2))
  assert kept == pytest.approx(1 - noise / np.sum((q - p) ** 2)) and 0 < kept < 1
  noise += np.var(pool, axis=0, ddof=1).sum() / 1500
  assert beyond_chance == pytest.approx(1 - noise / np.sum((q - p) ** 2)) and 0 < beyond_chance < kept
  np.testing.assert_allclose(target, p + kept * (q - p))
  # Copies are one draw: they weigh in the mean, and make it no surer.
  copies = matching.shrunk_target(queries[[0, 2, 2, 2]], pool, np.ones(4), np.ones(1500))
  np.testing.assert_allclose(copies[0], target)
  assert copies[1] == pytest.approx(kept)
  far, near = (matching.shrunk_target(p + [[step, 0, 0, 0]], pool, [1], np.ones(1500)) for step in (9, 1))
  one = np.var(pool, axis=0, ddof=1).sum() / 81
  assert near.kept == near.beyond_chance == 0 and far.kept == pytest.approx(1 - one)
  assert far.beyond_chance == pytest.approx(1 - one * (1 + 1 / 1500))


def test_matching_aims_at_the_tokens_of_the_queries_and_at_the_pool_when_they_tell_nothing_else():
  rng = np.random.default_rng(2)
  features = rng.normal(size=(60, 8))
  features[-1] = 0
  tokens = np.r_[rng.integers(1, 9, 59), 0]  # the last one has no response
  queries, counts = rng.normal(size=(5, 8)), np.array([1, 2, 3, 4, 9])
  task = make_inputs(
    60, features=features, target=queries, query_tokens=counts, num_response_tokens=tokens, target_mean="tokens"
  )
  np.testing.assert_allclose(matching_target(task), counts @ queries / counts.sum())
  shrunk = dataclasses.replace(task, shrink=True)
  expected = matching.shrunk_target(queries, features[:-1], counts, tokens[:-1])[0]
  np.testing.assert_allclose(matching_target(shrunk), expected)
  equal = dataclasses.replace(shrunk, target_mean="examples", query_tokens=None)
  expected = matching.shrunk_target(queries, features[:-1], np.ones(5), np.ones(59))[0]
  np.testing.assert_allclose(matching_target(equal), expected)
  both = matching_target(dataclasses.replace(shrunk, target_mean="both"))
  np.testing.assert_allclose(both, (matching_target(shrunk) + expected) / 2)
  assert 0 <= shrunk.aim.beyond_chance <= shrunk.aim.kept < 1 == task.aim.kept
  rows = select_rows("matching", shrunk, Budget(num_examples=20))
  wanted = matching.greedy_matching(features, matching_target(shrunk), 20, rows=shrunk.pool())
  assert list(rows) == list(wanted) and 59 not in rows
  with pytest.raises(UserError, match="query_tokens have shape .3,. for 5 queries"):
    matching_target(dataclasses.replace(task, query_tokens=np.ones(3)))
  with pytest.raises(UserError, match="target_mean=mode is unknown; choose one of both, tokens, examples"):
    matching_target(dataclasses.replace(task, target_mean="mode"))


def test_matching_beats_proponents_where_the_target_needs_two_kinds():
  rng = np.random.default_rng(0)
  features = np.concatenate([[4.0, 0.0] + rng.normal(size=(50, 2)) * 0.1, [0.0, 1.0] + rng.normal(size=(50, 2)) * 0.1])
  target = np.array([2.0, 0.5])
  inputs = make_inputs(100, scores=features @ target, features=features, target=target)
  distance = {}
  for policy in ("proponents", "matching"):
    rows = select_rows(policy, inputs, Budget(fraction=0.5))
    distance[policy] = np.linalg.norm(features[rows].mean(axis=0) - target)
  assert distance["matching"] < 0.05 < 1.0 < distance["proponents"]


# ------------------------------------------------------------------------------------------- aggregation


# ------------------------------------------------------------------------------------------------ refusals


def test_not_finite_scores_tell_how_many_and_which():
  scores = np.arange(40.0)
  scores[[2, 5, 6, 9]] = np.nan, np.inf, np.nan, -np.inf
  inputs = make_inputs(scores=scores, ids=[f"n{i:02d}" for i in range(40)])
  with pytest.raises(UserError, match=r"scores: 4 of 40 are NaN or infinite \(first: n02, n05, n06\)"):
    select_rows("proponents", inputs, Budget(fraction=0.5))
  assert len(select_rows("random", inputs, Budget(fraction=0.5))) == 20  # does not look at scores
  features = np.ones((40, 2))
  features[7, 1] = np.nan
  bad = make_inputs(features=features, target=np.ones(2), ids=inputs.ids)
  with pytest.raises(UserError, match="features: 1 of 40 .* n07"):
    select_rows("matching", bad, Budget(fraction=0.5))


def test_refusals_say_what_is_missing():
  with pytest.raises(UserError, match="policy=best is unknown; choose one of auto, proponents"):
    select_rows("best", make_inputs(), Budget(fraction=0.5))
  with pytest.raises(UserError, match="policy matching needs features"):
    select_rows("matching", make_inputs(features=None, target=None), Budget(fraction=0.5))
  with pytest.raises(UserError, match="needs target"):
    select_rows("matching", make_inputs(target=None), Budget(fraction=0.5))
  with pytest.raises(UserError, match="needs scores"):
    select_rows("proponents", make_inputs(scores=None), Budget(fraction=0.5))
  with pytest.raises(UserError, match="call aggregate first"):
    make_inputs(scores=np.zeros((40, 2)))
  with pytest.raises(UserError, match="39 entries for 40"):
    make_inputs(loss=np.zeros(39))
  with pytest.raises(UserError, match="same width"):
    make_inputs(target=np.zeros(5))
  with pytest.raises(UserError, match="none of the 40 examples has response tokens"):
    select_rows("random", make_inputs(num_response_tokens=np.zeros(40)), Budget(fraction=0.5))


# ------------------------------------------------------------------------------------------------ warnings


def test_warnings_of_a_risky_selection():
  size = 400
  topic = np.arange(size) % 4
  lengths = np.where(topic == 0, 50, 10)
  features = np.eye(4)[topic] + np.random.default_rng(0).normal(size=(size, 4)) * 0.05
  inputs = make_inputs(
    size,
    scores=topic + np.linspace(0, 0.5, size),  # the long topic "t0" ranks last
    topics=[f"t{t}" for t in topic],
    num_response_tokens=lengths,
    num_tokens=lengths + 5,
    features=features,
    target=features.mean(axis=0),
  )
  found = selection_warnings(select_rows("proponents", inputs, Budget(fraction=0.5)), inputs)
  assert len(found) == 4
  assert found[0].startswith("Topic 't0' is almost dropped: 0 of its 100 examples with a response are selected where ")
  assert "would be 50. Use the policy topic_quota" in found[0] and "'t1'" in found[1]
  unnamed = dataclasses.replace(inputs, topics=["" if name == "t0" else name for name in inputs.topics])
  told = selection_warnings(select_rows("proponents", unnamed, Budget(fraction=0.5)), unnamed)
  assert told[0].startswith("Topic '(none)' is almost dropped")
  assert "2,000 response tokens, 50% of what 200 average examples would have (4,000)" in found[2]
  assert "further than all 20 random selections" in found[3] and "Use the policy matching" in found[3]
  for policy in ("random", "matching"):
    assert selection_warnings(select_rows(policy, inputs, Budget(fraction=0.5), seed=1), inputs) == []


def test_warning_of_copies():
  """By content: ids are unique, also those of copies."""
  plain = make_inputs(40, features=None, target=None)
  inputs = dataclasses.replace(plain, content_keys=["same"] * 3 + [f"key {i}" for i in range(37)])
  found = selection_warnings(np.arange(40), inputs)
  assert found == [
    "2 of the 40 selected examples are duplicates of another selected one. To leave them out, use --dedup in "
    "finetune, select and evaluate."
  ]
  assert selection_warnings(np.arange(40), inputs, copies=False) == []
  assert selection_warnings(np.arange(2, 40), inputs) == selection_warnings(np.arange(40), plain) == []
  with pytest.raises(UserError, match="content_keys has 39 entries for 40"):
    make_inputs(40, content_keys=["key"] * 39)


def test_matching_in_blocks_comes_nearly_as_close():
  rng = np.random.default_rng(3)
  features, target = rng.normal(size=(400, 30)) + 0.3, rng.normal(size=30) * 0.3
  distance = lambda rows: np.linalg.norm(features[rows].mean(axis=0) - target)  # noqa: E731
  exact = distance(matching.greedy_matching(features, target, 100))
  blocks = matching.greedy_matching(features, target, 100, block=10)
  random = np.mean([distance(rng.permutation(400)[:100]) for _ in range(20)])
  assert len(set(blocks.tolist())) == 100
  assert distance(blocks) < 1.1 * exact < 0.6 * random
  # One row a target between two updates is the rule itself, also without the Gram matrix.
  by_one = matching.greedy_matching(features.astype(np.float32), target, 10)
  assert by_one.tolist() == matching.greedy_matching(features, target, 10).tolist()


def test_matching_per_token_takes_what_decreases_the_distance_most_for_a_token():
  inputs = make_inputs(target_mean="examples")
  target, lengths, chosen = matching_target(inputs), inputs.num_response_tokens, []
  for _ in range(15):
    free = sorted((i for i in range(40) if i not in chosen), key=lambda i: inputs.ids[i])
    far = lambda rows: np.sum((inputs.features[rows].mean(axis=0) - target) ** 2) if rows else target @ target  # noqa: E731
    decrease = np.array([far(chosen) - far([*chosen, i]) for i in free])
    value = decrease / lengths[free] if (decrease > 0).any() else decrease
    chosen.append(free[int(np.argmax(value))])
  assert select_rows("matching_per_token", inputs, Budget(num_examples=15)).tolist() == chosen
  plain = select_rows("matching", inputs, Budget(num_examples=15))
  assert lengths[chosen].sum() < lengths[plain].sum()


def test_matching_in_strata_keeps_the_shares_of_response_lengths():
  inputs = make_inputs(size=200)
  bins = coreset.length_bins(inputs.num_response_tokens)
  order = select_rows("matching_strata", inputs, Budget(fraction=1.0))
  for size in (20, 50, 100):
    kept = np.bincount(bins[order[:size]], minlength=bins.max() + 1)
    assert np.all(np.abs(kept - np.bincount(bins) * size / 200) <= 1.5)
  first = [row for row in order if bins[row] == bins[order[0]]][0]
  alone = inputs.features[bins == bins[first]]
  assert np.sum((inputs.features[first] - matching_target(inputs)) ** 2) == pytest.approx(
    np.min(np.sum((alone - matching_target(inputs)) ** 2, axis=1))
  )


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_copies_together_get_what_one_example_would(copies):
  rng = np.random.default_rng(0)
  unit = rng.normal(size=(12, 40))
  unit /= np.linalg.norm(unit, axis=1, keepdims=True)
  similarity = rng.uniform(size=(3, 12))
  one = density.transported(similarity, unit @ unit.T)
  times = np.array([copies, *[1] * 11])
  many = np.repeat(unit, times, axis=0)
  found = density.transported(np.repeat(similarity, times, axis=1), many @ many.T)
  assert found[:copies].sum() == pytest.approx(one[0]) and found[copies:] == pytest.approx(one[1:])
  assert found.sum() == pytest.approx(1.0)
  # Where nothing is alike, each query's mass goes in equal parts to its nearest.
  nearest = density.transported(similarity, np.eye(12), nearest=4)
  wanted = [np.mean([(row >= np.sort(row)[-4])[i] / 4 for row in similarity]) for i in range(12)]
  assert nearest == pytest.approx(np.array(wanted))


def test_ranks_of_layers_have_no_scale():
  rng = np.random.default_rng(0)
  layers = rng.normal(size=(3, 4, 9))
  found = aggregation.mean_ranks(list(layers))
  assert found == pytest.approx(aggregation.mean_ranks([layers[0], 1e3 * layers[1] - 5, layers[2] ** 3]))
  best = np.full((4, 9), 0.0)
  best[:, 2] = 1.0
  assert np.all(np.argmax(aggregation.mean_ranks([best, best]), axis=1) == 2)
  assert aggregation.mean_ranks([layers[0]])[0] == pytest.approx((np.argsort(np.argsort(layers[0][0])) + 1) / 9)


# ------------------------------------------------------------------------------------------------- reasons

_CLOSER = r"(first choice: brings .* closest|brings .* gradient closer|of those left, moves .* away least)"
REASONS = {
  "proponents": r"rank {n} of 40 by influence",
  "opponents": r"rank {n} of 40 by influence, lowest first",
  "longest": r"rank {n} of 40 by response tokens",
  "highest_loss": r"rank {n} of 40 by loss",
  "embedding": r"rank {n} of 40 by similarity to the evaluation examples",
  "random": "drawn at random",
  "length_matched_random": "drawn at random among responses of its length",
  "topic_quota": r"rank \d+ of \d+ in its topic by influence",
  "hybrid": r"in turn for query {q}, round {turn}",
  "matching": _CLOSER,
  "matching_hybrid": r".*the set's mean gradient and hidden states .*",
  "matching_per_token": _CLOSER,
  "loss_drop": r"rank {n} of 40 by the loss that the evaluation examples take off",
  "density": r"rank {n} of 40 by what the evaluation examples send to it, shared with its like",
}


def test_the_example_of_the_page_on_new_rules_is_a_rule(monkeypatch):
  page = (pathlib.Path(__file__).parents[2] / "docs/howto/add-a-rule.md").read_text()
  [block] = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
  names = dict(vars(coreset))
  exec(block, names)
  monkeypatch.setattr(coreset, "_POLICIES", names["_POLICIES"])
  inputs = make_inputs()
  choice = coreset.select_by("shortest", inputs, Budget(num_examples=5))
  lengths = inputs.num_response_tokens
  assert sorted(lengths[choice.rows]) == sorted(lengths)[:5]
  assert choice.reasons[0] == "rank 1 of 40 by fewest response tokens"


@pytest.mark.parametrize("policy", REASONS)
def test_every_choice_has_its_reason_in_words(policy):
  queries = [f"q{i}" for i in range(5)]
  inputs = make_inputs(similar_ids=queries, similar_tokens=np.ones(5, int))
  choice = coreset.select_by(policy, inputs, Budget(fraction=0.5), seed=3)
  np.testing.assert_array_equal(choice.rows, select_rows(policy, inputs, Budget(fraction=0.5), seed=3))
  assert len(choice.reasons) == len(choice.rows) == 20
  for place, reason in enumerate(choice.reasons):
    wanted = REASONS[policy].format(n=place + 1, q=queries[place % 5], turn=place // 5 + 1)
    assert re.fullmatch(wanted, reason), reason


@pytest.mark.parametrize("policy", ["matching", "matching_hybrid"])
def test_a_choice_is_said_to_bring_the_set_closer_exactly_where_it_does(policy):
  inputs = make_inputs(target_mean="examples", similar_ids=None)
  choice = coreset.select_by(policy, inputs, Budget(fraction=0.9))
  inner = inputs.features if policy != "matching_hybrid" else np.linalg.cholesky(inputs.kernel + 1e-9 * np.eye(40))
  if policy == "matching_hybrid":
    target = np.linalg.lstsq(inner, inputs.towards, rcond=None)[0]
  else:
    target = matching_target(inputs)
  said = []
  for step in range(1, len(choice.rows)):
    own = choice.rows[: step + 1]
    now, before = (np.linalg.norm(inner[rows].mean(axis=0) - target) for rows in (own, own[:-1]))
    said.append(now < before)
    assert ("closer" in choice.reasons[step]) == (now < before), step
  assert any(said) and not all(said)


def test_a_reason_tells_that_an_example_repeats_another_and_escapes_names():
  inputs = make_inputs(size=4, alike=np.array([0, 0, 1, 2]), similar_ids=["a\u202e\n", "", "c", "d", "e"])
  reasons = coreset.select_by("hybrid", inputs, Budget(fraction=1.0)).reasons
  assert [reason.endswith("; a duplicate, taken when every other example was in") for reason in reasons] == [
    False,
    False,
    False,
    True,
  ]
  told = " ".join(reasons)
  assert "\u202e" not in told and "\n" not in told and ("query a\\u202e\\n," in told or "query (none)," in told)


def test_the_reason_names_the_query_whose_turn_it_was_also_where_turns_go_by_tokens():
  tokens = np.array([1, 30, 2, 9, 4])
  inputs = make_inputs(similar_tokens=tokens, aggregate="weighted_turns", similar_ids=list("abcde"))
  choice = coreset.select_by("hybrid", inputs, Budget(fraction=1.0))
  shares = (tokens / tokens.sum() + 1 / 5) / 2
  names = [reason.removeprefix("in turn for query ").split(",")[0] for reason in choice.reasons]
  assert names == ["abcde"[query] for query in aggregation.turn_order(shares, 40)]
  rounds = [int(reason.rpartition(" ")[2]) for reason in choice.reasons]
  assert all(round_ == names[: place + 1].count(names[place]) for place, round_ in enumerate(rounds))
  free = set(range(40))
  by_id = sorted(free, key=lambda row: inputs.ids[row])
  for row, name in zip(choice.rows, names, strict=True):  # and it took the best that was left by that query
    wanted = inputs.similarities["hybrid"]["abcde".index(name)]
    assert row == max((r for r in by_id if r in free), key=lambda r: wanted[r])
    free.remove(row)
