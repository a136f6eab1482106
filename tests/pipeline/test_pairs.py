"""Preference pairs: the DPO loss by its definition, its derivatives against dense matrices, the stages."""

import json
import pathlib
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from jax.flatten_util import ravel_pytree
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax import gradients
from in2core_jax.data import batches, packing, ragged, record_shapes, tokenizing
from in2core_jax.errors import UserError
from in2core_jax.evaluation import statistics
from in2core_jax.model import decoder
from in2core_jax.model.objective import make_objective, token_losses_fn
from in2core_jax.params import subtree
from in2core_jax.pipeline import evaluate, evaluate_pairs, finetune, select
from in2core_jax.pipeline import session as sessions
from in2core_jax.pipeline.train_elsewhere import recipe_elsewhere, write_train_with
from in2core_jax.runs.run_folder import RunDir

BETA = 0.5  # a number that float32 holds
# (chosen, rejected) by role of each token; the last pair has no response on one side, so none at all.
SIDES = (("PPrrr", "PPrr"), ("PPrPPrr", "PPrPPr"), ("Pr", "Prrrrr"), ("PPP", "PPr"))
COUNT, SIZE = len(SIDES), 6


def make_pairs(vocab_size: int):
  """As much of a `TokenizedDataset` of pairs as a `Batcher` needs."""
  rng = np.random.default_rng(3)
  draw = lambda roles: rng.integers(0, vocab_size, len(roles)).astype(np.int32)  # noqa: E731
  tokens = [(draw(won), draw(lost)) for won, lost in SIDES]
  masks = [np.array([role == "r" for role in won + lost]) for won, lost in SIDES]
  return types.SimpleNamespace(
    ids=tuple(f"pair-{i}" for i in range(COUNT)),
    tokens=tuple(np.concatenate(both) for both in tokens),
    response_mask=tuple(mask & all("r" in side for side in sides) for mask, sides in zip(masks, SIDES, strict=True)),
    second=np.array([len(won) for won, _ in SIDES]),
  )


def margins(config, params, dataset):
  """log pi_w - log pi_l of each pair by its definition, [B]: each side alone in a row, all logits, log-softmax."""
  sides, masks = np.zeros((2, COUNT, 8), np.int32), np.zeros((2, COUNT, 8), bool)
  for row, at in enumerate(dataset.second):
    for side, cut in enumerate((slice(None, at), slice(at, None))):
      size = len(dataset.tokens[row][cut])
      sides[side, row, :size], masks[side, row, :size] = dataset.tokens[row][cut], dataset.response_mask[row][cut]
  every = jax.nn.log_softmax(decoder.logits(config, params, sides.reshape(-1, 8)), axis=-1)
  said = jnp.take_along_axis(every[:, :-1], sides.reshape(-1, 8)[:, 1:, None], axis=-1)[..., 0]
  won, lost = jnp.sum(said * masks.reshape(-1, 8)[:, 1:], axis=-1).reshape(2, COUNT)
  return won - lost


def make(config, layers, modules, dtype=jnp.float64, **extra):
  """(objective, subtree, parameters, reference log ratios, row batch, (places, packed batch), data set)."""
  params, dataset = tiny.make_params(config, dtype, **extra), make_pairs(config.vocab_size)
  reference = np.array([0.7, -1.1, 0.2, 0.4])  # of another model
  pairs = batches.PairTerms(BETA, lambda: reference)
  shape = batches.Shape(16, 8)
  rows = batches.Batcher(dataset, (shape,), "mean", pairs=pairs).batch(range(COUNT), shape, SIZE)
  ((where, packed),) = packing.Packer(dataset, pairs=pairs).sequential(96)
  chosen = subtree.make_subtree(params, layers, modules)
  return make_objective(config, chosen), chosen, params, BETA * reference, rows, (where, packed), dataset


class Case(NamedTuple):
  """A model on pairs, and what its loss and derivatives must be: dense, from margins alone."""

  objective: Any
  sub: Any
  frozen: Any
  chosen: Any
  config: Any
  rows: Any
  packed: Any
  v: Any
  direction: np.ndarray
  losses: np.ndarray
  jacobian: np.ndarray
  products: dict


def make_case(layers, modules, changes, hessian):
  """The oracle in NumPy; `hessian`: with that product too."""
  config = tiny.smaller_config(num_layers=2, **changes)
  objective, chosen, params, reference, rows, packed, dataset = make(config, layers, modules)
  sub, frozen = subtree.split(params, chosen)
  flat, back = ravel_pytree(sub)
  v = tiny.direction(sub)
  direction = np.asarray(ravel_pytree(v)[0])
  ours = lambda vector: margins(config, subtree.merge(back(vector), frozen, chosen), dataset)  # noqa: E731

  @jax.jit
  def oracle(vector):
    bent = jax.jvp(jax.jacrev(ours), (vector,), (direction,))[1] if hessian else jnp.zeros(())
    return ours(vector), jax.jacrev(ours)(vector), bent

  found, slopes, bent = map(np.asarray, oracle(flat))
  u = (BETA * found - np.float32(reference))[:3]  # the last pair counts nothing
  share = 1 / (1 + np.exp(u))  # sigmoid(-u)
  jacobian = np.concatenate([-BETA * share[:, None] * slopes[:3], np.zeros((1, len(flat)))])
  weight = BETA**2 * share * (1 - share)  # second derivative of the logistic loss in the margin
  products = {
    "ggn": np.einsum("i,ip,iq,q->p", weight, slopes[:3], slopes[:3], direction),
    "fisher": jacobian.T @ (jacobian @ direction),
  }
  if hessian:
    products["hessian"] = products["ggn"] - BETA * share @ bent[:3]
  losses = np.array([*np.log1p(np.exp(-u)), 0])  # TRL's sigmoid loss, -logsigmoid(beta * logits)
  return Case(objective, sub, frozen, chosen, config, rows, packed, v, direction, losses, jacobian, products)


def close(got, want):
  """In double precision."""
  np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)


def check_sums(t, batch, places):
  """Losses, scores, gradient and curvature products of a batch."""

  @jax.jit
  def measure(batch):
    losses, scores = gradients.losses_and_jvp_scores(t.objective, t.sub, t.frozen, batch, t.v)
    products = {
      name: gradients.CURVATURE_PRODUCTS[name](t.objective, t.sub, t.frozen, batch, t.v) for name in t.products
    }
    return losses, scores, gradients.sum_gradient(t.objective, t.sub, t.frozen, batch), products

  losses, scores, total, products = jax.tree.map(np.asarray, measure(batch))
  there = np.array([np.flatnonzero(places == row)[0] for row in range(COUNT)])
  close(losses[there], t.losses)
  assert np.count_nonzero(losses) == 3  # not the padding, nor the pair without response
  close(scores[there], t.jacobian @ t.direction)
  close(ravel_pytree(total)[0], t.jacobian.sum(0))
  for name, want in t.products.items():
    close(ravel_pytree(products[name])[0], want)


def test_loss_scores_and_curvature_are_those_of_the_definition(x64):
  t = make_case("1", "mlp", {}, hessian=False)
  check_sums(t, t.packed[1], t.packed[0])


@pytest.mark.slow
@pytest.mark.parametrize(
  ("layers", "modules", "changes"),
  [("1", "mlp", {}), ("0,1", "all,lm_head", {"tie_embeddings": False})],
  ids=["hidden states", "the head is chosen"],
)
def test_a_row_for_each_pair_gives_the_same_and_single_gradients(layers, modules, changes, x64):
  t = make_case(layers, modules, changes, hessian=True)
  check_sums(t, t.rows, np.arange(COUNT))

  @jax.jit
  def apart(batch):
    losses = lambda s: token_losses_fn(t.config, t.chosen)(s, t.frozen, batch)  # noqa: E731
    each = gradients.per_example_gradients(t.objective, t.sub, t.frozen, batch, microbatch=4)
    return each, jax.jvp(losses, (t.sub,), (t.v,))[1]

  each, tokens = jax.tree.map(np.asarray, apart(t.rows))
  rows = [ravel_pytree(jax.tree.map(lambda leaf, row=row: leaf[row], each))[0] for row in range(COUNT)]
  close(np.stack(rows), t.jacobian)
  close(np.sum(tokens, axis=1)[:COUNT], t.jacobian @ t.direction)  # a pair's score is the sum of its tokens' scores


# ---- records -------------------------------------------------------------------------


def turns(*texts):
  """Turns of a user and an assistant, one after the other."""
  return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


GOOD, BAD = turns("Q", "good"), turns("Q", "bad")
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: Q\n\nAssistant: "
SPELLINGS = {
  "TRL, explicit prompt": {"prompt": GOOD[:1], "chosen": GOOD[1:], "rejected": BAD[1:]},
  "TRL, implicit prompt": {"chosen": GOOD, "rejected": BAD},
  "texts": {"prompt": "Q", "chosen": "good", "rejected": "bad"},
  "UltraFeedback": {"prompt": "Q", "messages": GOOD, "chosen": GOOD, "rejected": BAD, "score_chosen": 8.5},
  "Argilla": {"instruction": "Q", "chosen_response": "good", "rejected_response": "bad", "chosen_avg_rating": 4.5},
  "Orca": {"system": "S", "question": "Q", "chosen": "good", "rejected": "bad"},
  "LLaMA-Factory": {
    "conversations": [{"from": "human", "value": "Q"}],
    "chosen": {"from": "gpt", "value": "good"},
    "rejected": {"from": "gpt", "value": "bad"},
  },
  "HH-RLHF": {"chosen": HH + "good", "rejected": HH + "bad"},
  "columns": {"q": "Q", "better": "good", "worse": "bad"},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_pair_is_read_in_every_spelling(name):
  fields = {"prompt": "q", "chosen": "better", "rejected": "worse"} if name == "columns" else {}
  found = record_shapes.read_record(SPELLINGS[name], fields)
  before = {"Orca": [{"role": "system", "content": "S"}], "HH-RLHF": turns("hi", "hello")}.get(name, [])
  before = [{**m, "train": False} if m["role"] == "assistant" else m for m in before]  # the prompt is not learnt
  assert found.messages == (*before, *GOOD) and found.rejected == (*before, *BAD)
  assert not found.unread


@pytest.mark.parametrize(
  ("value", "words"),
  [
    ({"prompt": "Q", "chosen": "good", "rejected": "good"}, "are equal: there is nothing to prefer"),
    ({"prompt": "Q", "chosen": "good", "rejected": ""}, "'rejected' is empty beside 'chosen'"),
    ({"prompt": "Q", "response": "good", "chosen": "good"}, "'chosen' is there without the other answer"),
    ({"chosen": GOOD, "rejected": turns("P", "bad")}, 'answer different prompts, "Q" and "P"'),
    ({"prompt": "P", "chosen": GOOD, "rejected": BAD}, 'the prompt "P" is not the one'),
    ({"chosen": "good", "rejected": "bad"}, "answers without a prompt: add a column 'prompt'"),
    ({"prompt": "Q", "chosen": GOOD, "rejected": "bad"}, "'chosen' begins with the prompt and 'rejected' with the"),
    ({"chosen": GOOD, "rejected": GOOD[:1]}, "'rejected' has no answer"),
  ],
)
def test_what_is_no_pair_is_told(value, words):
  with pytest.raises(UserError, match=words):
    record_shapes.read_record(value, {})


# ---- stages --------------------------------------------------------------------------


def write_pairs(path, count):
  """Pairs in a file: the chosen answer repeats the prompt, the rejected one says something else."""
  words = ["red", "blue", "green", "gold", "grey"]
  lines = []
  for i in range(count):
    asked = f"{words[i % 5]} {words[i // 5 % 5]} {i}"
    lines.append(json.dumps({"prompt": asked, "chosen": f"I say {asked}", "rejected": f"no {words[(i + 2) % 5]}"}))
  path.write_text("\n".join(lines) + "\n")
  return lines


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pairs")
  write_pairs(folder / "pairs.jsonl", 60)
  return tiny.run_settings(
    folder,
    train_data=f"jsonl:{folder / 'pairs.jsonl'}",
    solver="cg",
    epochs=2.0,
    sketch_size=4,
    beta=0.5,
    budget="0.25",
  )


@pytest.fixture(scope="module")
def session(settings):
  return sessions.open_session(settings, tiny.one_device(), pairs=True)


def test_what_does_not_serve_pairs_is_refused_by_name(settings, session):
  for changes, words in [
    ({"solver": "ekfac"}, "--solver=ekfac fits factors"),
    ({"precondition": "diagonal"}, "--precondition=diagonal fits factors"),
    ({"policy": "auto"}, "policy auto compares hidden states"),
    ({"coreset_format": "tokens"}, "--coreset_format=tokens: the training set has preference pairs"),
  ]:
    with pytest.raises(UserError, match=words):
      select.prepare(settings.replace(**changes), session)
  with pytest.raises(UserError, match=r"preference pairs \(.*pairs.jsonl:\d+\), which this command"):
    tiny.open_session(settings)


def test_trainers_are_told_both_answers_and_the_dpo_loss(settings, session, tmp_path):
  run_dir = RunDir.open(str(tmp_path / "run"), {})
  write_train_with(run_dir, session, settings, np.array([2, 0]), recipe_elsewhere(settings, session))
  page = (run_dir.path / "train_with.md").read_text()
  assert "DPOConfig(" in page and "beta=0.5" in page and "SFT" not in page and "coreset_tokens" not in page
  lines = [json.loads(line) for line in (run_dir.path / "coreset_chat.jsonl").read_text().splitlines()]
  for line, record in zip(lines, [session.splits["train"].records[row] for row in (0, 2)], strict=True):
    assert set(line) == {"prompt", "chosen", "rejected"} and len(line["chosen"]) == len(line["rejected"]) == 1
    assert [*line["prompt"], *line["chosen"]] == list(record.messages)
    assert [*line["prompt"], *line["rejected"]] == list(record.rejected)


def test_a_cut_side_and_a_mixed_part_are_told(settings, session, tmp_path):
  path = tmp_path / "mixed.jsonl"
  path.write_text("\n".join([*write_pairs(path, 8), json.dumps({"prompt": "a", "response": "b"})]) + "\n")
  records = tokenizing.load_records(f"jsonl:{path}")
  with pytest.raises(UserError, match=r"conversations \(.*:9\) and preference pairs \(.*:1\).*keep one kind"):
    tokenizing.tokenize(records, session.model.tokenizer, 48, "none")
  whole = tokenizing.tokenize(records[:8], session.model.tokenizer, 48, "none")
  starts = [np.flatnonzero(mask[at:])[0] for mask, at in zip(whole.response_mask, whole.second, strict=True)]
  most = int(min(starts)) + 1  # of the rejected answers
  cut = tokenizing.tokenize(records[:8], session.model.tokenizer, most, "none")
  assert cut.truncated.all() and cut.longest == most
  there = cut.num_response_tokens > 0  # a pair counts where both of its answers begin before the cut
  assert there.tolist() == [start < most for start in starts] and there.any() and not there.all()
  take = whole.take([3, 1])
  assert take.second.tolist() == whole.second[[3, 1]].tolist() and take.longest <= whole.longest


@pytest.mark.slow
def test_pairs_are_chosen_trained_and_judged_by_the_dpo_loss(settings, session, tmp_path):
  """Losses of the base model are log 2; training lowers them; the selection is the original lines."""
  tuned = finetune.run(settings.replace(run_dir=str(tmp_path / "finetune")), session)
  report = json.loads((tmp_path / "finetune" / "finetune.json").read_text())
  lines = [json.loads(line) for line in (tmp_path / "finetune" / "metrics.jsonl").read_text().splitlines()]
  assert abs(lines[0]["loss"] - np.log(2)) < 1e-5 and report["last_loss"] < 0.6
  chosen = settings.replace(run_dir=str(tmp_path / "select"), checkpoint=str(tuned), write="token,layer")
  folder = pathlib.Path(select.run(chosen, session))
  table = pq.read_table(folder / "scores.parquet").to_pydict()
  kept = (folder / "coreset.jsonl").read_text().splitlines()
  assert kept == [r.raw for r, on in zip(session.splits["train"].records, table["selected"], strict=True) if on]
  assert set(kept) <= set(write_pairs(tmp_path / "again.jsonl", 60))
  scores = {name: np.zeros(len(table["influence"])) for name in ("token", "layer")}
  place = {name: row for row, name in enumerate(table["example_id"])}
  for name, total in scores.items():
    parts = pq.read_table(folder / f"{name}_scores.parquet").to_pydict()
    np.add.at(total, [place[one] for one in parts["example_id"]], parts["influence"])
    np.testing.assert_allclose(total, table["influence"], atol=1e-4 * np.abs(table["influence"]).max())
  summary = json.loads((folder / "summary.json").read_text())
  assert summary["beta"] == 0.5 and "DPO with beta 0.5" in summary["unit"]
  reference = sorted((pathlib.Path(settings.run_dir).parent / "reference").iterdir())  # of the session's run folder
  assert [path.name.partition("-")[0] for path in reference] == ["eval", "train"]
  judged = evaluate.run(
    settings.replace(run_dir=str(tmp_path / "evaluate"), select_runs=str(folder), policies="full,random"), session
  )
  found = json.loads((pathlib.Path(judged) / "evaluation.json").read_text())
  rows = {row["policy"]: row for row in found["table"]}
  assert found["recipe"]["base model's DPO loss"] == "0.6931"
  assert rows["full"]["loss"] < 0.6 and rows["full"]["accuracy"] > 0.8
  assert rows["full"]["loss_minus_random_low"] <= rows["full"]["loss_minus_random"]
  assert "accuracy" in (pathlib.Path(judged) / "evaluation.md").read_text()


@pytest.mark.slow
def test_influence_of_pairs_on_conversations_and_the_other_way(settings, tmp_path):
  """Training and evaluation set may be of different kinds; sketches and per-example gradients serve both."""
  for number, changes in enumerate(({"train_data": "chatterbot:trivia"}, {"eval_data": "chatterbot:trivia"})):
    own = settings.replace(eval_data=settings.train_data).replace(**changes)
    own = own.replace(run_dir=str(tmp_path / f"run{number}"), policy="matching", write="query", batch_tokens="auto")
    folder = pathlib.Path(select.run(own, sessions.open_session(own, tiny.one_device(), pairs=True)))
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    queries = pq.read_table(folder / "query_scores.parquet").to_pydict()
    assert np.isfinite(table["influence"]).all() and sum(table["selected"]) == round(len(table["selected"]) / 4)
    mean = np.array(queries["influence"]).reshape(-1, len(table["influence"])).mean(0)
    np.testing.assert_allclose(mean, table["influence"], atol=0.1 * np.abs(mean).max())  # CG stops at 1 %


@pytest.mark.slow
def test_influence_of_a_pair_is_what_leaving_it_out_does(x64):
  """theta minimises the mean DPO loss + damping / 2 |theta - theta_0|^2; each pair is left out, theta found anew."""
  config, damping, size, queries = tiny.smaller_config(num_layers=2, tie_embeddings=False), 0.5, 12, 4
  rng = np.random.default_rng(4)
  sides = [(rng.integers(0, 11, 4 + i % 3), rng.integers(0, 11, 3 + i % 4)) for i in range(size + queries)]
  answer = lambda tokens: np.arange(len(tokens)) >= 2  # noqa: E731
  dataset = types.SimpleNamespace(
    ids=tuple(map(str, range(len(sides)))),
    tokens=tuple(np.concatenate(both).astype(np.int32) for both in sides),
    response_mask=tuple(np.concatenate([answer(won), answer(lost)]) for won, lost in sides),
    second=np.array([len(won) for won, _ in sides]),
  )
  params = tiny.make_params(config, jnp.float64)
  chosen = subtree.make_subtree(params, "1", "attention,lm_head")
  sub, frozen = subtree.split(params, chosen)
  start, back = ravel_pytree(sub)
  objective, shape = make_objective(config, chosen), batches.Shape(16, 8)
  terms = batches.PairTerms(0.1, lambda: np.zeros(len(sides)))
  batch = batches.Batcher(dataset, (shape,), pairs=terms).batch(range(len(sides)), shape, len(sides))
  losses = jax.jit(lambda x: gradients.per_example_losses(objective, back(x), frozen, batch))
  penalised = lambda x, w: w @ losses(x)[:size] / size + damping / 2 * jnp.sum((x - start) ** 2)  # noqa: E731
  slope = jax.jit(jax.grad(penalised))
  newton = jax.jit(lambda x, w: x - jnp.linalg.solve(jax.hessian(penalised)(x, w), slope(x, w)))
  down = jax.jit(lambda w: jax.lax.fori_loop(0, 400, lambda _, x: x - 0.1 * slope(x, w), start))

  def fit(weight, x):
    for _ in range(6):
      x = newton(x, weight)
    assert np.linalg.norm(slope(x, weight)) < 1e-9
    return x

  whole = fit(np.ones(size), down(np.ones(size)))
  jacobian = np.asarray(jax.jacrev(losses)(whole))
  inverse = np.linalg.inv(jax.hessian(penalised)(whole, np.ones(size)))  # the damping is in it
  influence = jacobian[size:].mean(0) @ inverse @ jacobian[:size].T
  query = lambda x: float(losses(x)[size:].mean())  # noqa: E731
  without = lambda share: [query(fit(1 - share * row, whole)) - query(whole) for row in np.eye(size)]  # noqa: E731
  np.testing.assert_allclose(without(0.01), 0.01 * influence / size, rtol=0.02, atol=2e-7)
  assert statistics.spearman(influence, np.array(without(1.0))) > 0.9  # one of twelve is no small change


# ---- what holds token ids ------------------------------------------------------------


def test_flat_arrays_give_back_what_they_got():
  """Also beyond 16 bits, across the arrays that are joined, and empty; a part shares the content."""
  rng = np.random.default_rng(0)
  sizes = [0, 1, 7, 8, 9, 30, *rng.integers(0, 5, 4200)]
  ids = [rng.integers(0, 70_000 if i == 4 else 60_000, size).astype(np.int32) for i, size in enumerate(sizes)]
  masks = [rng.random(size) < 0.5 for size in sizes]
  for kind, items, dtype in ((ragged.TokenIds, ids, np.int32), (ragged.Masks, masks, bool)):
    found = kind.of(items)
    assert len(found) == len(items) and all(one.dtype == dtype for one in found[:6])
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, items, strict=True))
    np.testing.assert_array_equal(ragged.counts_of(found), [np.count_nonzero(item) for item in items])
    part = ragged.taken(found, np.array([5, 2]))
    assert part.flat is found.flat and ragged.lengths_of(part).tolist() == [30, 7]
    np.testing.assert_array_equal(part[0], items[5])
    with pytest.raises(IndexError):
      part[2]


# ---- verdicts ------------------------------------------------------------------------


def made_row(policy, seed, losses):
  """A retrained model with these DPO losses."""
  ones = np.ones(len(losses), np.int64)
  return statistics.RetrainRow(policy, seed, 5, 50, 20, 3, 30, 1.0, 1.0, losses, ones, np.arange(len(losses)))


def test_a_verdict_on_pairs_says_loss_and_accuracy():
  rng = np.random.default_rng(0)
  hard = rng.normal(0, 0.1, 200)  # how hard each pair is
  losses = {
    **{("random", seed): 0.686 + 0.001 * seed + hard + rng.normal(0, 0.01, 200) for seed in range(4)},
    ("good", 0): 0.6 + hard,
    ("same", 0): 0.685 + hard + rng.normal(0, 0.05, 200),
  }
  rows = [made_row(policy, seed, own) for (policy, seed), own in losses.items()]
  table = {row["policy"]: row for row in evaluate_pairs.summarise(rows)}
  assert np.isclose(table["good"]["loss"], np.mean(losses["good", 0]))
  assert np.isclose(table["good"]["accuracy"], np.mean(losses["good", 0] < np.log(2)))
  both = np.mean([losses["random", seed] for seed in range(4)])
  assert np.isclose(table["good"]["loss_minus_random"], np.mean(losses["good", 0]) - both)
  assert table["good"]["loss_minus_random_high"] < 0 < table["same"]["loss_minus_random_high"]
  said = {line.partition(":")[0]: line for line in evaluate_pairs.sentences(rows)}
  assert "its loss is lower (better) than that of random sets" in said["good"]
  assert "its loss cannot be distinguished from that of random sets" in said["same"]
  assert "2 comparisons of losses" in evaluate_pairs.chance({"": rows})[0]
  assert evaluate_pairs.accuracies(np.array([0.1, np.log(2), 2.0])).tolist() == [1, 0.5, 0]
