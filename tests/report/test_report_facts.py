"""What a report says: near copies, kept and dropped, coverage, findings, the geometry of pictures, figures."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_run import make_record, make_records, make_run, make_summary

from in2core_jax.data import tokenizing
from in2core_jax.errors import UserError
from in2core_jax.report import answer, charts, facts, findings, near_duplicates
from in2core_jax.report.plots import figure_bytes, score_edges
from in2core_jax.runs.run_folder import RunDir

# ------------------------------------------------------------------------------------------------- near copies


def test_similarity_is_the_jaccard_of_runs_of_five_words():
  texts = ["a b c d e f g h", "A, b; c d e f? g x", "a b c", "a B c!", "...", "", "p q r s t"]
  found = near_duplicates.similarities(texts)
  # abcde bcdef cdefg defgh against abcde bcdef cdefg defgx: 3 shared of 5
  assert found[0, 1] == pytest.approx(3 / 5) and found[1, 0] == found[0, 1]
  assert found[2, 3] == 1 and found[0, 2] == 0 and found[0, 6] == 0
  assert not found[4].any() and not found[5].any()  # no words: like nothing, not even each other
  sets = [near_duplicates.shingles(text) for text in texts]
  for i, a in enumerate(sets):
    for j, b in enumerate(sets):
      assert found[i, j] == pytest.approx(len(a & b) / max(len(a | b), 1))


def test_groups_are_chains_of_similar_pairs():
  words = [f"w{i}" for i in range(40)]
  chain = [
    " ".join(words[start : start + 25]) for start in (0, 5, 10)
  ]  # neighbours share 16 of 26 shingles, ends 11 of 31
  texts = ["something else that is long enough", chain[2], "more of it to read here", chain[0], chain[1], chain[0]]
  (group,) = near_duplicates.near_copies(texts)
  assert group.rows.tolist() == [1, 3, 4, 5]
  np.testing.assert_allclose(group.similarity, [16 / 26, 1, 16 / 26, 1])
  pairs = near_duplicates.near_copies(texts, threshold=0.9)
  assert [group.rows.tolist() for group in pairs] == [[3, 5]]
  assert (
    near_duplicates.near_copies([])
    == near_duplicates.near_copies(["a"])
    == near_duplicates.near_copies(["a", "b"])
    == []
  )


def test_top_copies_are_rows_of_the_table(monkeypatch):
  monkeypatch.setattr(facts, "TOP", 10)
  records = make_records(60)
  order = make_run(records).order
  for row in (order[4], order[9], order[10]):  # the last one is not among the top
    records[row] = make_record(row, records[order[2]].messages[0]["content"], records[order[2]].messages[1]["content"])
  (group,) = make_run(records).top_copies
  assert group.rows.tolist() == [order[2], order[4], order[9]] and group.similarity.tolist() == [1, 1, 1]


# ------------------------------------------------------------------------------------------------------- tables


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_length_classes_part_the_examples(lengths):
  run = make_run([make_record(i, "p", " ".join(["w"] * n)) for i, n in enumerate(lengths)])
  rows = facts.length_rows(run)
  assert 1 <= len(rows) <= 8 and sum(row["examples"] for row in rows) == len(lengths)
  assert sum(row["selected"] for row in rows) == run.selected.sum()
  end = -1
  for row in rows:
    low, high = (int(part) for part in (row["response tokens"].split(" to ") * 2)[:2])
    if " to " in row["response tokens"]:
      high = int(row["response tokens"].split(" to ")[1])
    inside = (run.response_tokens >= low) & (run.response_tokens <= high)
    assert low > end and row["examples"] == inside.sum() and row["selected"] == run.selected[inside].sum()
    assert row["left out"] == row["examples"] - row["selected"]
    end = high


@pytest.mark.parametrize(
  ("lengths", "labels"),
  [
    ([1] * 90 + [5, 7], ["1", "5 to 7"]),  # all inner quantiles are the shortest length
    ([2] * 2 + [9] * 30, ["2 to 9"]),  # all are the longest
    ([2] * 4 + [9] * 28, ["2", "9"]),
  ],
)
def test_length_classes_of_lopsided_lengths(lengths, labels):
  run = make_run([make_record(i, "p", " ".join(["w"] * n)) for i, n in enumerate(lengths)])
  assert [row["response tokens"] for row in facts.length_rows(run)] == labels


def test_coverage_by_hand():
  selected = [True, False, True]
  made = make_run([make_record(i, "p", "r") for i in range(3)], 2)
  scores = np.array([[3.0, -1.0, 1.0], [-2.0, -4.0, -3.0]], np.float32)
  run = make_run(made.records, 2, columns=dict(made.columns) | {"selected": selected}, queries=scores)
  found = {name: values.tolist() for name, values in facts.coverage(run).items()}
  assert found["mean"] == [1, -3] and found["selected_mean"] == [2, -2.5] and found["highest"] == [3, -2]
  assert found["positive"] == [4, 0] and found["positive_selected"][0] == 1 and np.isnan(found["positive_selected"][1])


def test_layers_by_hand():
  made = make_run([make_record(i, "p", "r") for i in range(4)])
  layers = {"layer 0": np.array([3.0, 1.0, -1.0, -3.0]), "layer 1": np.array([-0.5, 0.5, 1.0, -2.0])}
  first, second = facts.layer_rows(make_run(made.records, layers=layers))
  assert first["mean size of contribution"] == 2 and first["share %"] == 66.7 and second["share %"] == 33.3
  assert first["Spearman with all"] == pytest.approx(1) and second["Spearman with all"] == pytest.approx(0.2)
  assert first["top-half overlap with all"] == 1 and second["top-half overlap with all"] == 0.5
  assert facts.layer_rows(made) == []


# ----------------------------------------------------------------------------------------------------- findings


def fine_run(records=None, **changes):
  """Nothing truncated, no warnings, a converged solver, lengths and losses without relation to the scores."""
  records = records or [make_record(i, f"p{i}", f"r{i} " * (1 + (i * 7) % 5)) for i in range(200)]
  summary = make_summary(warnings=[], solver={"solver": "cg", "converged": True}, solver_residual=0.001)
  return make_run(records, **({"summary": summary, "truncated": np.zeros(len(records), bool)} | changes))


def test_an_honest_run_has_nothing_to_mind():
  run = fine_run()
  assert findings.warnings(run) == []
  assert len(findings.fine(run)) == 9


def test_what_decides_a_ranking_by_influence_is_minded_only_where_it_has_decided():
  made = fine_run()
  lengths = dict(made.columns) | {
    "num_response_tokens": 300 - made.columns["rank"],
    "selected": np.arange(200) % 2 == 0,
  }
  said = "Influence and response length: Spearman +1.00. A ranking by influence is partly a ranking by response length."
  assert findings.warnings(fine_run(columns=lengths)) == [said]
  summary = dict(made.summary) | {"policy": "auto", "rule": "hybrid"}
  other = fine_run(columns=lengths, summary=summary)
  assert findings.warnings(other) == [] and said in findings.fine(other)


def test_short_responses_are_minded_once():
  made = fine_run()
  columns = dict(made.columns) | {"num_response_tokens": made.columns["rank"], "influence": np.zeros(200)}
  (said,) = findings.warnings(fine_run(columns=columns))
  assert said.endswith("The selection prefers short responses.")
  kept = dict(made.summary) | {"warnings": ["It has few tokens: it prefers short responses. Use the policy matching."]}
  assert findings.warnings(fine_run(columns=columns, summary=kept)) == kept["warnings"]


def test_warnings_are_told_once_also_where_the_run_has_kept_them():
  run = fine_run(truncated=np.arange(200) < 20)
  kept = findings.warnings(run)
  again = fine_run(truncated=np.arange(200) < 20, summary=dict(run.summary) | {"warnings": kept})
  assert findings.warnings(again) == kept and len(kept) == 1
  judged = {"table": [], "verdict": [], "recipe": {}, "warnings": ["Too few test examples.", kept[0]]}
  retrained = fine_run(truncated=np.arange(200) < 20, retrain=judged)
  assert findings.warnings(retrained) == ["Too few test examples.", kept[0]]  # those of the comparison first
  both = fine_run(retrain=judged, summary=dict(run.summary) | {"warnings": ["Of select."]})
  assert findings.warnings(both) == ["Too few test examples.", kept[0], "Of select."]


def test_each_trouble_is_said_with_its_numbers():
  records = list(fine_run().records)
  order = fine_run().order
  same = records[order[0]].messages
  records[order[1]] = make_record(order[1], same[0]["content"], same[1]["content"])
  assert findings.warnings(fine_run(records)) == [
    "1 of the 200 training examples is a duplicate of an earlier one; 1 of the selected is a duplicate of another "
    "selected one. To leave them out, use --dedup in finetune, select and evaluate."
  ]
  every = [make_record(i, f"p{i % 190}", f"r{i % 190} " * (1 + (i % 190 * 7) % 5)) for i in range(200)]
  few = dict(fine_run(every).columns) | {"selected": np.arange(200) % 2 == 0}  # one of each pair
  few["selected"][190:] = False
  assert findings.warnings(fine_run(every, columns=few)) == []  # one in 20 is not many
  more = [make_record(i, f"p{i % 180}", f"r{i % 180} " * (1 + (i % 180 * 7) % 5)) for i in range(200)]
  few["selected"][180:] = False
  assert findings.warnings(fine_run(more, columns=few))[0].startswith("20 of the 200 training examples are duplicates")
  records = list(fine_run().records)
  records[3] = make_record(3, "p", "")
  assert findings.warnings(fine_run(records)) == [
    "1 training example has no response token: influence 0, never selected."
  ]
  made = fine_run()
  overlap = {"train/eval": {"same_messages": 2, "same_prompt": 3}}
  told = ["2 evaluation examples occur in the training set, and 3 have a prompt that occurs there."]
  assert findings.warnings(fine_run(data=made.data | {"overlap": overlap})) == told
  assert findings.overlap_warnings(overlap) == told
  assert not findings.overlap_warnings({"train/test": {"same_messages": 0, "same_prompt": 0}})
  lengths = dict(made.columns) | {"num_response_tokens": 300 - made.columns["rank"]}
  by_choice, by_score = findings.warnings(fine_run(columns=lengths))
  assert (
    by_score
    == "Influence and response length: Spearman +1.00. A ranking by influence is partly a ranking by response length."
  )
  kept, left = (lengths["num_response_tokens"][made.selected == chosen].mean() for chosen in (True, False))
  assert by_choice == (
    f"Selected examples have {kept:.1f} response tokens on average, the others {left:.1f}. The selection prefers "
    "long responses."
  )
  # A policy that chooses by something else than the ranking is judged by what it has chosen.
  even = dict(lengths) | {"selected": np.arange(200) % 2 == 0}
  assert [text.split(":")[0] for text in findings.warnings(fine_run(columns=even))] == ["Influence and response length"]
  # Neither examples without response nor a handful of selected ones make a choice one by length.
  empty = dict(made.columns) | {"num_response_tokens": np.where(np.arange(200) < 80, 0, 1 + np.arange(200) * 7 % 5)}
  empty |= {
    "selected": (np.arange(200) >= 80) & (np.arange(200) % 2 == 0),
    "influence": np.where(np.arange(200) < 80, 0, 1),
  }
  assert not [text for text in findings.warnings(fine_run(columns=empty)) if text.startswith("Selected examples")]
  few = dict(made.columns) | {"selected": np.isin(np.arange(200), np.argsort(-made.response_tokens)[[0, 90, 100]])}
  assert not [text for text in findings.warnings(fine_run(columns=few)) if text.startswith("Selected examples")]
  (text,) = findings.warnings(fine_run(truncated=np.arange(200) < 20))
  cut = int(made.selected[:20].sum())
  assert text.startswith(f"20 training examples (10.0%) are truncated; {cut} of them are selected. What was cut off")
  few = dict(made.columns) | {"influence": np.where(made.columns["rank"] <= 2, 100.0, made.influence)}
  (text,) = findings.warnings(fine_run(columns=few))
  share = 200 / (200 + np.maximum(made.influence, 0)[made.columns["rank"] > 2].sum())
  assert text == f"The strongest 1 % of the examples (2) bring {share:.0%} of all positive influence."


def test_the_solver_s_trouble_comes_after_the_warnings():
  first, second = findings.warnings(fine_run(summary=make_summary(warnings=["First."])))
  assert first == "First." and second == (
    "lissa stopped above its tolerance, at a relative residual of 0.2 after 30 steps. What helps: --solver=cg, more "
    "--depth, a higher --damping_ratio."
  )
  worse = "at a relative residual of 3.5 after 30 steps. That is worse than no answer, whose residual is 1."
  solver = {"solver": "lissa", "tol": 0.01, "converged": False}
  (said,) = findings.warnings(fine_run(summary=make_summary(warnings=[], solver=solver, solver_residual=3.5)))
  assert said.startswith(f"lissa stopped above its tolerance of 0.01, {worse} What helps: --solver=cg,")
  by_cg = make_summary(warnings=[], solver={"solver": "cg", "converged": False})
  by_cg["identity"]["flags"] |= {"solver_tol": 0.02, "damping": 0.1}
  (said,) = findings.warnings(fine_run(summary=by_cg))
  assert "tolerance of 0.02" in said and "--solver" not in said and said.endswith("more --depth, a higher --damping.")


@pytest.mark.parametrize(
  ("solver", "residual", "said"),
  [
    (
      {"solver": "ekfac"},
      3.5,
      "ekfac: relative residual 3.5 after 30 steps, worse than no answer, whose residual is 1.",
    ),
    ({"solver": "low_rank"}, 1.0, None),  # knows no tolerance
    ({"solver": "cg", "converged": True}, 0.01, None),
    ({"solver": "datainf"}, None, "The residual of datainf was not measured."),
    ({"solver": "identity"}, None, None),
  ],
)
def test_a_solver_without_trouble_is_fine(solver, residual, said):
  run = fine_run(summary=make_summary(warnings=[], solver=solver, solver_residual=residual))
  assert findings.warnings(run) == ([said] if said else [])


# ------------------------------------------------------------------------------------------------------- the answer


def retrained(policy, ratio=None, **changes):
  """A row of evaluation.json; `ratio` is (ratio, low, high) to random sets by token."""
  row = {"policy": policy, "equal": "steps", "fraction": None, "seeds": 3, "trained_tokens": 1000}
  for name in ("to_random", "example_to_random", "to_full"):
    row |= dict(zip((name, f"{name}_low", f"{name}_high"), changes.pop(name, (None,) * 3), strict=True))
  if ratio:
    row |= dict(zip(("to_random", "to_random_low", "to_random_high"), ratio, strict=True))
    row.setdefault("example_to_random", None)
  return row | changes


def judged_run(*rows, **more):
  table = [retrained("full", (0.9, 0.85, 0.95)), retrained("random"), *rows]
  return fine_run(retrain={"table": table, "verdict": [], "recipe": {}, "candidate": "mine"} | more)


BETTER, SAME, WORSE = (0.9, 0.8, 0.98), (1.01, 0.97, 1.05), (1.1, 1.02, 1.2)
BY_TOKEN = "retrained on it, the test perplexity by token is 10 % lower (95 % interval 20 % lower to 2 % lower)"


@pytest.mark.parametrize(
  ("token", "example", "word", "why"),
  [
    (BETTER, BETTER, answer.USE, f"{BY_TOKEN} than with random sets."),
    (BETTER, SAME, answer.USE, f"{BY_TOKEN} than with random sets."),
    (SAME, BETTER, answer.USE, "retrained on it, the test perplexity by example is 10 % lower"),
    (WORSE, SAME, answer.RANDOM, "retrained on this set, the test perplexity by token is 10 % higher"),
    (SAME, WORSE, answer.RANDOM, "retrained on this set, the test perplexity by example is 10 % higher"),
    (BETTER, WORSE, answer.UNCLEAR, "retrained on this set, the test perplexity by token is 10 % lower"),
    (SAME, SAME, answer.UNCLEAR, "retrained on this set, the test perplexity by token is 1 % higher"),
    ((0.9, None, None), (0.9, None, None), answer.UNCLEAR, "retrained on this set, the test perplexity is 10 % lower"),
  ],
)
def test_the_answer_says_no_more_than_the_intervals(token, example, word, why):
  said = answer.answer(judged_run(retrained("mine", token, example_to_random=example)))
  assert said.word == word and said.why.startswith(why)


def test_an_open_answer_says_what_leaves_it_open():
  both = answer.answer(judged_run(retrained("mine", BETTER, example_to_random=WORSE)))
  assert both.why.endswith("than with random sets, but by example it is the other way round.")
  none = answer.answer(judged_run(retrained("mine", SAME, example_to_random=SAME)))
  assert none.why.endswith("than with random sets. The interval includes 0: it may be chance.")
  little = answer.answer(judged_run(retrained("mine", SAME, example_to_random=(0.9996, 0.9994, 0.9998))))
  assert little.word == answer.UNCLEAR and little.why.endswith("Less than 0.5 % is no reason to prefer it.")


def test_the_answer_tells_what_else_belongs_to_it():
  row = retrained("mine", BETTER, example_to_random=SAME, to_full=(1.02, 0.99, 1.05), trained_tokens=600)
  table = [retrained("random", trained_tokens=1000), row]
  more = answer.answer(judged_run(table=table)).more
  assert more[0] == "By example it is 1 % higher (95 % interval 3 % lower to 5 % higher)."
  assert more[1].startswith("Against all data it is 2 % higher")
  assert more[2] == "It was trained on 60% of the response tokens of the random sets."
  bare = retrained("mine", (0.9, None, None), trained_tokens=380)
  assert answer.answer(judged_run(table=[table[0], bare])).more == (
    "It was trained on 38% of the response tokens of the random sets.",
  )
  assert answer.answer(judged_run()).why == "no model was retrained on this set in this evaluation."
  nobody = answer.answer(judged_run(retrained("mine")))
  assert nobody.word == answer.UNCLEAR and "Add random to --policies" in nobody.why


@pytest.mark.parametrize(
  ("calls", "word", "why"),
  [
    ((BETTER, BETTER), answer.USE, "retrained on it, models are better in all 2 comparisons with random sets."),
    ((SAME, WORSE), answer.RANDOM, "retrained on this set, models are worse in 1 of 2 comparisons with random sets"),
    (
      (SAME, SAME),
      answer.UNCLEAR,
      "none of 2 comparisons with random sets shows a difference beyond its interval",
    ),
    ((BETTER, SAME), answer.UNCLEAR, "it depends. Models are better in 1 of 2 comparisons with random sets and worse"),
    ((BETTER, WORSE), answer.UNCLEAR, "it depends."),
  ],
)
def test_several_comparisons_answer_only_together(calls, word, why):
  rows = [retrained("mine", call, fraction=share) for call, share in zip(calls, (0.1, 0.5), strict=True)]
  run = judged_run(*rows)
  said = answer.answer(run)
  assert said.word == word and said.why.startswith(why)
  assert [gain.name for gain in answer.gains(run)] == ["This set, 10 %", "This set, 50 %"]
  if word == answer.UNCLEAR and BETTER in calls:
    assert said.more[0] == "Better: 10 %." and (WORSE not in calls or said.more[1] == "Worse: 50 %.")


APART = {"distance": 0.034, "share": 0.5, "p": 0.005}


@pytest.mark.parametrize(
  ("summary", "word", "why"),
  [
    (
      {"rule": "hybrid", "apart": APART, "another_kind": True, "queries": 60},
      answer.USE,
      "the evaluation set is of an",
    ),
    (
      {"rule": "hybrid", "apart": APART | {"distance": 0.62}, "another_kind": True, "queries": 60},
      answer.UNCLEAR,
      "nothing in the training set seems to be like the evaluation set (squared distance 0.62, p =",
    ),
    (
      {"rule": "matching_hybrid", "apart": APART, "another_kind": True},
      answer.UNCLEAR,
      "the evaluation set is of anoth",
    ),
    (
      {"rule": "random without copies", "apart": APART, "another_kind": False, "queries": 60},
      answer.RANDOM,
      "the evaluation set is of the same kind as the training set",
    ),
    (
      {"rule": "random without copies", "apart": APART, "another_kind": False, "queries": 12},
      answer.UNCLEAR,
      "12 evaluation examples are too few to show whether they differ in kind",
    ),
    ({"rule": "random without copies", "apart": None}, answer.RANDOM, "that is what this set is."),
    ({"rule": "proponents"}, answer.UNCLEAR, "nothing in this run measures what the rule"),
    ({}, answer.UNCLEAR, "nothing in this run measures"),  # a run of before
  ],
)
def test_without_a_retraining_the_measured_distance_answers(summary, word, why):
  said = answer.answer(fine_run(summary=make_summary(**summary)))
  assert said.word == word and said.why.startswith(why)
  assert any("run evaluate" in line for line in said.more)


def test_a_large_choice_is_said_to_be_beyond_what_was_measured():
  summary = make_summary(rule="hybrid", apart=APART, another_kind=True, queries=60)
  said = "choices of that size were not measured"
  assert said in " ".join(answer.answer(fine_run(summary=summary)).more)
  few = dict(fine_run().columns) | {"selected": np.arange(200) < 20}
  assert said not in " ".join(answer.answer(fine_run(summary=summary, columns=few)).more)


def test_three_numbers_and_the_gain_of_the_set_and_of_all_data():
  kept, tokens, duplicates = answer.numbers(fine_run())
  assert (kept["value"], kept["note"]) == ("100", "50.0% of 200 examples") and tokens["what"] == "tokens kept"
  assert duplicates["value"] == "0"
  run = judged_run(retrained("mine", BETTER, example_to_random=SAME))
  assert [(gain.name, gain.by_token) for gain in answer.gains(run)] == [
    ("This set", BETTER),
    ("All data", (0.9, 0.85, 0.95)),
  ]
  assert answer.gains(fine_run()) == []
  sweep = [retrained("mine", SAME, equal=equal, fraction=f / 10) for equal in ("steps", "tokens") for f in range(1, 6)]
  assert [gain.name for gain in answer.gains(judged_run(*sweep))] == [
    f"This set, equal steps, {10 * f} %" for f in range(1, 6)
  ]


def test_rows_in_order_of_choice_come_before_those_left_out():
  made = fine_run()
  choice = np.zeros(200, np.int64)
  choice[[7, 3, 11]] = [2, 1, 3]
  run = fine_run(columns=dict(made.columns) | {"choice": choice, "reason": [""] * 200})
  left = [row for row in made.order if row not in (3, 7, 11)]
  assert run.first.tolist() == [3, 7, 11, *left] and made.first.tolist() == made.order.tolist()
  three = fine_run(columns=dict(run.columns) | {"selected": choice > 0})
  assert three.searched.tolist() == [3, 7, 11]  # near-duplicates are looked for in the choice
  assert made.searched.tolist() == made.order.tolist()


def test_a_run_that_does_not_fit_together_is_refused():
  made = make_run(make_records(6), 2)
  with pytest.raises(UserError, match="no column rank, topic"):
    make_run(made.records, columns={k: v for k, v in made.columns.items() if k not in ("rank", "topic")})
  with pytest.raises(UserError, match="differ in length or are empty: .*'records': 5"):
    make_run(made.records, records=made.records[:5])
  with pytest.raises(UserError, match=r"have shape \(2, 5\), not \(2, 6\)"):
    make_run(made.records, 2, queries=made.queries[:, :5])
  with pytest.raises(UserError, match="'layer 0': 4"):
    make_run(made.records, layers={"layer 0": np.zeros(4)})


def test_query_scores_go_to_their_evaluation_examples(tmp_path):
  made = make_run(make_records(5), 4)
  part = lambda name, records: tokenizing.TokenizedDataset(  # noqa: E731
    name, tuple(records), *[[np.zeros(1, np.int32)] * len(records)] * 2, np.zeros(len(records), bool)
  )
  train, evals = part("train", made.records), part("eval", made.query_records)
  run = RunDir.open(tmp_path, {})
  run.write_parquet("scores.parquet", made.columns)
  run.write_json("data_summary.json", made.data)
  run.write_json("summary.json", made.summary)
  written = {
    "query": np.repeat(np.array(evals.ids, dtype=object), 5),
    "example": np.tile(np.array(train.ids, dtype=object), 4),
    "influence": made.queries.reshape(-1),
  }
  run.write_parquet("query_scores.parquet", written)
  for rows in ([0, 1, 2, 3], [2, 0, 3, 1]):
    loaded = facts.SelectRun.load(tmp_path, train, part("eval", [made.query_records[row] for row in rows]))
    np.testing.assert_array_equal(loaded.queries, made.queries[rows])
    assert loaded.queries.dtype == np.float32
  others = part("eval", [*made.query_records[:3], make_record(99, "p", "r")])  # as many
  for examples, queries in ((train, others), (train, evals.take([0, 1])), (train.take(range(4)), evals)):
    with pytest.raises(UserError, match="query_scores.parquet: 20 rows are not those of these .*the data are others"):
      facts.SelectRun.load(tmp_path, examples, queries)
  mixed = written | {"query": written["query"][::-1].copy()}
  mixed["query"][[0, 19]] = mixed["query"][[19, 0]]
  run.write_parquet("query_scores.parquet", mixed)
  with pytest.raises(UserError, match="the data are others"):
    facts.SelectRun.load(tmp_path, train, evals)


# ------------------------------------------------------------------------------------------- pictures, figures


def test_histogram_counts_every_example():
  run = make_run(make_records(300))
  chart = charts.histogram(run.influence, run.selected)
  unit = (charts.BOTTOM - charts.TOP) / float(chart.y_ticks[-1]["text"])
  counts = [sum(bar["height"] for bar in chart.bars if bar["series"] == series) / unit for series in (0, 1)]
  assert counts == pytest.approx([150, 150], rel=1e-2)
  edges = score_edges(run.influence, 50)
  assert chart.zero == pytest.approx(1 - 98 * edges[0] / (edges[-1] - edges[0]), abs=0.01)
  assert [tick["anchor"] for tick in chart.x_ticks] == ["start", "middle", "middle", "middle", "end"]
  assert float(chart.x_ticks[0]["text"]) == pytest.approx(edges[0], rel=0.05)
  flat = charts.histogram(np.zeros(4), np.array([True, False, False, False]))
  assert sum(bar["height"] for bar in flat.bars) > 0


def test_bars_stack_from_the_floor():
  chart = charts.bars(["a", "b"], {"selected": [3, 0], "left out": [1, 2]})
  a_selected, a_left, b_left = chart.bars
  assert a_selected["y"] + a_selected["height"] == charts.BOTTOM
  assert a_left["y"] + a_left["height"] == a_selected["y"] and a_left["y"] == charts.TOP  # 4 is the top tick
  assert b_left["height"] == pytest.approx(2 * a_left["height"]) and b_left["text"] == "b: 0 selected, 2 left out"
  assert [tick["text"] for tick in chart.y_ticks] == ["1", "2", "3", "4"]
  assert charts.bars(["a"], {"x": [0]}).bars == ()


@given(st.floats(1e-12, 1e12))
def test_ticks_are_round_and_reach_the_highest_value(highest):
  ticks = charts._round_ticks(highest)
  assert 3 <= len(ticks) <= 6 and ticks[0] == 0
  assert ticks[-1] >= highest * (1 - 1e-9) and ticks[-2] < highest


def test_curve_runs_from_the_first_to_the_last_step():
  chart = charts.curve([1, 10, 31], np.array([[0.1], [0.01], [0.001]]))
  assert [(p["x"], p["y"]) for p in chart.points] == [(1, 14), (30.4, 99), (99, 184)]
  assert chart.points[1]["text"] == "step 10: residual 0.01" and len(chart.lines) == 2
  assert {tick["text"] for tick in chart.y_ticks} == {"0.1", "0.01", "0.001"}
  level = charts.curve([1, 2], np.array([[1.0], [1.0]]))
  assert level.points[0]["y"] == level.points[1]["y"]


def test_intervals_stand_where_their_ratios_are():
  nan = float("nan")
  chart = charts.intervals([("mine", [(0.9, 0.8, 1.1), (1.2, nan, nan)]), ("all", [(nan, nan, nan), (9.0, 0.5, 50.0)])])
  mine, bare, far = chart.marks
  assert mine["low"] < mine["x"] < chart.zero < mine["high"] and bare["low"] is None and bare["x"] > mine["high"]
  assert far["x"] == far["high"] < charts.RIGHT  # beyond the axis: cut off in the picture, not in the text
  assert far["text"] == "all, by example: 9 times random's, 95 % interval 0.5 to 50"
  assert bare["text"] == "mine, by example: 1.2 times random's, without an interval"
  assert [name["text"] for name in chart.names] == ["mine", "all"] and chart.names[0]["y"] < chart.names[1]["y"]
  assert {tick["text"] for tick in chart.ticks} >= {"0", "-50 %", "+100 %"}
  near = charts.intervals([("mine", [(0.99, 0.97, 1.01)])])
  assert [tick["text"] for tick in near.ticks] == ["-3 %", "-2 %", "-1 %", "0", "+1 %"]


def test_figures_are_svg_files_with_equal_bytes():
  records = [make_record(i, "p", "r " * (i % 5), "$x^2$ <b>&" if i % 2 else "") for i in range(30)]
  figures = facts.figures(make_run(records, 3))
  drawn = {name: figure_bytes(figure, "svg") for name, figure in figures.items()}
  plain = {"scores.svg", "residual.svg", "kept-by-topic.svg", "kept-by-length.svg"}
  assert set(drawn) == plain | {"layers.svg", "coverage.svg"}
  for text in drawn.values():
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
  again = facts.figures(make_run(records, 3))["kept-by-topic.svg"]
  assert figure_bytes(again, "svg") == drawn["kept-by-topic.svg"]
  short = make_run(records, summary=make_summary(solver_curve=[[4, [0.3]]]))
  assert set(facts.figures(short)) == plain - {"residual.svg"}
