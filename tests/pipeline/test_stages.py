"""The stages end to end on a small random model and real conversations: files, resuming, refusals."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import markupsafe
import numpy as np
import pytest
import tiny

from experiments import demo, flags
from in2core_jax.data import subsets, summaries, tokenizing
from in2core_jax.errors import UserError
from in2core_jax.estimate import dry_run
from in2core_jax.evaluation import statistics
from in2core_jax.parallel import sharding
from in2core_jax.params import subtree
from in2core_jax.pipeline import checks, evaluate, finetune, scoring, select, solver_inputs
from in2core_jax.pipeline import session as sessions
from in2core_jax.pipeline.advice import few_queries, risky_settings, unused_inverse, without_effect
from in2core_jax.pipeline.compared import read_selection
from in2core_jax.pipeline.retraining import Retrainer
from in2core_jax.pipeline.session import choose
from in2core_jax.pipeline.settings import Settings
from in2core_jax.pipeline.splits import split_sources
from in2core_jax.report import facts, html_page, table_text
from in2core_jax.runs import run_folder
from in2core_jax.selection import aggregation, coreset, matching
from in2core_jax.training import train_loop as finetune_lib
from in2core_jax.training.recipe import make_optimizer

quick_compile = tiny.quick_compile


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  return tiny.run_settings(tmp_path_factory.mktemp("stages"), epochs=2.0, sketch_size=4)


@pytest.fixture(scope="module")
def session(settings):
  return tiny.open_session(settings)


@pytest.fixture(scope="module")
def trained(settings, session, tmp_path_factory):
  """A finished fine-tuning: its checkpoint folder."""
  return finetune.run(settings.replace(run_dir=str(tmp_path_factory.mktemp("full") / "run")), session)


def leaves(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_finetune_learns_and_resumes_to_the_same_bytes(settings, session, trained, tmp_path):
  lines = [json.loads(line) for line in (pathlib.Path(trained).parent / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(1, 11))
  losses = [line["loss"] for line in lines]
  assert max(losses[-3:]) < losses[0] - 0.03  # only the first one was measured before any step

  again = settings.replace(run_dir=str(tmp_path / "run"))
  with tiny.killed_after_step(5):
    finetune.run(again, session)
  resumed = finetune.run(again, session)
  relined = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [(line["step"], line["loss"]) for line in relined] == [(line["step"], line["loss"]) for line in lines]
  ours, theirs = session.checkpoint_params(resumed), session.checkpoint_params(trained)
  for a, b in zip(leaves(ours), leaves(theirs), strict=True):
    np.testing.assert_array_equal(a, b)
  assert any(not np.array_equal(a, b) for a, b in zip(leaves(ours), leaves(session.model.params), strict=True))


@pytest.mark.slow
def test_trainings_of_other_lengths_are_one_program(settings, session):
  """The rate is an argument of the step; the numbers are those of a loop with the recipe's own optimiser."""
  rows = np.arange(16)
  judge = Retrainer(session, settings.replace(weight_decay=0.1), [rows])
  problem = judge.problem.at(judge.sub, judge.frozen)
  for steps in (3, 7):
    ours = judge.train(rows, 0, "training", steps)
    recipe = dataclasses.replace(judge.recipe, steps=steps)
    optimizer, sub = make_optimizer(recipe), judge.sub
    state = optimizer.init(sub)
    packer = session.packer("train", judge.chosen, session.model.params, rows, judge.shapes)
    for _, (_, batch) in zip(range(steps), finetune_lib.stream(packer, recipe, 0), strict=False):
      placed = session.batching.place(batch)
      gradient = problem.at(sub, judge.frozen).mean_gradient(lambda placed=placed: [(np.arange(8), placed)])
      updates, state = optimizer.update(jax.tree.map(lambda leaf: leaf[0], gradient), state, sub)
      sub = jax.tree.map(lambda a, b: a + b, sub, updates)
    moved = [np.abs(a - b).max() for a, b in zip(leaves(sub), leaves(judge.sub), strict=True)]
    for a, b in zip(leaves(ours.sub), leaves(sub), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-2 * max(moved))
  assert judge.trainer._step._cache_size() == 1


def test_a_training_without_folder_can_be_stopped(settings, session, tmp_path):
  rows = np.arange(16)
  judge, asked = Retrainer(session, settings, [rows]), iter([False, True])
  packer = session.packer("train", judge.chosen, session.model.params, rows, judge.shapes)
  run_dir = run_folder.RunDir.open(tmp_path, {})
  log = finetune_lib.TrainLog(run_dir=run_dir, stop_requested=lambda: next(asked))
  result = judge.trainer.train(judge.sub, judge.frozen, packer, 0, log, steps=7)
  assert len(result.losses) == len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_only_the_chosen_layers_are_trained(session, trained):
  base, tuned = (
    subtree.leaf_paths(p) and p["layers"] for p in (session.model.params, session.checkpoint_params(trained))
  )
  for a, b in zip(leaves(base), leaves(tuned), strict=True):
    np.testing.assert_array_equal(a[:2], b[:2])
  kernel = lambda tree: np.asarray(tree["mlp"]["up_proj"]["kernel"])[2:]  # noqa: E731
  assert not np.array_equal(kernel(base), kernel(tuned))


def test_checkpoint_of_another_model_is_refused(settings, trained, tmp_path):
  wider = dataclasses.replace(tiny.CONFIG, hidden_size=32)
  other = tiny.open_session(settings.replace(model=tiny.write_model(tmp_path, wider)))
  with pytest.raises(UserError, match="give the model that the checkpoint started from"):
    other.checkpoint_params(trained)
  with pytest.raises(UserError, match="no such folder"):
    other.checkpoint_params(str(tmp_path / "nothing"))


def test_select_writes_what_it_promises(settings, session, trained, tmp_path):
  chosen = settings.replace(run_dir=str(tmp_path / "run"), checkpoint=trained, write="query", query_block=16, depth=4)
  folder = pathlib.Path(select.run(chosen, session))
  scores = run_folder.read_scores(folder / "scores.parquet")
  names = ["example_id", "influence", "rank", "selected", "loss", "num_tokens", "num_response_tokens", "topic"]
  assert list(scores) == [*names, "choice", "reason"]
  train = session.splits["train"]
  assert tuple(scores["example_id"]) == train.ids and scores["selected"].sum() == 20
  order = np.lexsort((np.array(train.ids), -scores["influence"]))  # copies have equal scores; their ids decide
  assert list(scores["rank"][order]) == list(range(1, 41)) and scores["selected"][order[:20]].all()
  assert list(scores["choice"][order]) == [*range(1, 21), *[0] * 20]
  assert list(scores["reason"][order]) == [*(f"rank {n} of 40 by influence" for n in range(1, 21)), *[""] * 20]
  kept = [record.raw for record, chosen in zip(train.records, scores["selected"], strict=True) if chosen]
  assert (folder / "coreset.jsonl").read_text().splitlines() == kept
  summary = json.loads((folder / "summary.json").read_text())
  assert summary["solver"]["solver"] == "lissa" and np.isfinite(summary["solver_residual"])
  assert {"boundary", "query gradients", "solver", "scores"} <= set(summary["seconds"])
  assert "Strongest proponents" in (folder / "report.md").read_text()
  assert "| policy | proponents |" in (folder / "report.md").read_text() and summary["target_kept"] is None
  found = facts.SelectRun.load(folder, train, session.splits["eval"])  # from the files alone: the same page
  assert (folder / "report.html").read_text() == html_page.select_page(found)
  assert {path.name for path in (folder / "plots").glob("*.svg")} >= {"scores.svg", "kept-by-topic.svg", "coverage.svg"}
  queries = run_folder.read_parquet(folder / "query_scores.parquet")
  assert len(queries["influence"]) == 10 * 40 and set(queries["query"]) == set(session.splits["eval"].ids)
  # the flagfile repeats the run: same flags, same folder, nothing to do
  text = (folder / "flags.txt").read_text()
  assert f"--checkpoint={trained}" in text and "--write=query" in text
  before = (folder / "scores.parquet").stat().st_mtime_ns
  select.run(chosen, session)
  assert (folder / "scores.parquet").stat().st_mtime_ns == before
  # nor is there for other forms, but to write them
  select.run(chosen.replace(coreset_format="tokens", write="query,pool"), session)
  assert (folder / "scores.parquet").stat().st_mtime_ns == before
  assert len(run_folder.read_parquet(folder / "pool_scored.parquet", only=["rank"])["rank"]) == 40
  assert (folder / "coreset_tokens" / "state.json").exists()
  assert not (folder / "coreset_chat.jsonl").exists()  # these records are conversations
  assert 'data_files="coreset.jsonl"' in (folder / "train_with.md").read_text()
  assert [row["weight"] for row in summary["sources"]] == [1.0]
  with pytest.raises(UserError, match="depth is 4 there and 5 now"):
    select.run(chosen.replace(depth=5), session)


@pytest.mark.parametrize("stage", [finetune, select, evaluate])
def test_a_folder_of_other_settings_is_refused_before_weights_are_read(settings, session, tmp_path, stage):
  def load():
    raise AssertionError("weights are read")

  other = dataclasses.replace(session, model=dataclasses.replace(session.model, load=load))
  s = settings.replace(run_dir=str(tmp_path / "run"), policies="full,random")
  name = stage.__name__.rpartition(".")[2]
  run_folder.RunDir.open(s.run_dir, {"stage": name, "flags": {"max_length": 7}})
  with pytest.raises(UserError, match="--max_length is 7 there and 48 now. Give another --run_dir"):
    stage.run(s, other)


def test_a_rule_that_takes_no_inverse_is_told_how_to_leave_it_out(settings):
  s = Settings()
  assert "--policy=auto chooses without the inverse of --solver=cg" in unused_inverse(s)
  needed = ({"policy": "proponents"}, {"solver": "identity"}, {"write": "query"}, {"normalize": "cosine"})
  assert not any(unused_inverse(s.replace(**changes)) for changes in needed)


def test_risky_settings_are_told(settings, session, tmp_path, caplog):
  risky = settings.replace(solver="identity", run_dir=str(tmp_path / "run"))
  folder = pathlib.Path(select.run(risky, session))
  told = json.loads((folder / "summary.json").read_text())["warnings"]
  assert told[:2] == risky_settings(risky)
  assert sum("--dedup" in line for line in told) == 1  # of this corpus, whose copies are selected too
  assert (
    "--checkpoint" in told[0] and "--solver=lissa" in told[1] and told[0][:40] in (folder / "report.md").read_text()
  )
  page = (folder / "report.html").read_text()
  said = [record.message for record in caplog.records if record.levelname == "WARNING"]
  for line in told:  # the same on the terminal, in report.md and on the page
    assert line in said and table_text.escape_markdown(line, 1000) in (folder / "report.md").read_text()
    assert str(markupsafe.escape(line)) in page
  assert risky_settings(risky.replace(policy="matching")) == []
  assert risky_settings(risky.replace(checkpoint="somewhere", solver="lissa")) == []
  momentum = risky.replace(solver="cg", acceleration="momentum", repeat=4)
  assert [line.split(" ")[0] for line in without_effect(momentum)] == ["--repeat=4", "--acceleration=momentum"]
  assert without_effect(momentum.replace(solver="lissa")) == without_effect(risky) == []


def test_an_evaluation_set_that_is_mostly_noise_is_told(settings):
  apart, unknown = (matching.Shrunk(np.zeros(2), kept, 0.47) for kept in (0.6, 0.04))
  told = settings.replace(policy="matching")
  assert "The 1,200 evaluation examples" in few_queries(told, unknown, 1200)[0]
  assert "mostly noise (4 % kept)" in few_queries(told, unknown, 1200)[0]
  assert few_queries(told, apart, 1200) == few_queries(told, None, 1200) == []
  assert few_queries(told.replace(matching_shrink=False), unknown, 1200) == []


@pytest.mark.slow
def test_variants_and_parts_of_the_scores(settings, session, trained, tmp_path):
  common = settings.replace(checkpoint=trained, solver="ekfac", damping_ratio=0.5, curvature="fisher")
  run = lambda name, **changes: pathlib.Path(  # noqa: E731
    select.run(common.replace(run_dir=str(tmp_path / name), **changes), session)
  )
  plain = run("plain", write="layer,token,self")
  scores = run_folder.read_parquet(plain / "scores.parquet")
  ids = {name: row for row, name in enumerate(scores["example_id"])}
  scale = np.abs(scores["influence"]).max()
  for file, parts in (("layer_scores.parquet", ["layer 2", "layer 3"]), ("token_scores.parquet", None)):
    table = run_folder.read_parquet(plain / file)
    sums = np.bincount([ids[name] for name in table["example_id"]], table["influence"], len(ids))
    np.testing.assert_allclose(sums, scores["influence"], atol=1e-5 * scale)
    assert parts is None or sorted(set(table["layer"])) == parts
  tokens = run_folder.read_parquet(plain / "token_scores.parquet")
  assert len(tokens["token"]) == session.splits["train"].num_response_tokens.sum()
  answered = scores["num_response_tokens"] > 0
  assert (scores["self_influence"][answered] > 0).all() and not scores["self_influence"][~answered].any()
  relative = run_folder.read_parquet(run("relatif", normalize="relatif") / "scores.parquet")["influence"]
  wanted = scores["influence"][answered] / np.sqrt(scores["self_influence"][answered])
  np.testing.assert_allclose(relative[answered], wanted, rtol=1e-3)
  cosines = run_folder.read_parquet(run("cosine", normalize="cosine", solver="lissa") / "scores.parquet")["influence"]
  assert np.abs(cosines).max() <= 1 and np.abs(cosines).max() > 0.01


@pytest.mark.slow
def test_a_store_estimates_the_scores_and_is_used_again(settings, session, tmp_path, monkeypatch):
  common = settings.replace(solver="identity", sketch_size=32)
  exact = pathlib.Path(select.run(common.replace(run_dir=str(tmp_path / "exact")), session))
  wide = common.replace(score_path="projected")
  first = pathlib.Path(select.run(wide.replace(run_dir=str(tmp_path / "first")), session))
  a, b = (run_folder.read_scores(folder / "scores.parquet")["influence"] for folder in (exact, first))
  assert statistics.spearman(a, b) > 0.9  # 16 to 32 rows and columns, projected to 32: little is lost
  (store,) = (tmp_path / "projected").iterdir()
  assert json.loads((store / "self_agreement.json").read_text())["mean"] > 0.8
  # Another command on the same training set computes no training gradient.
  features = scoring.Projection.features
  monkeypatch.setattr(
    scoring.Projection, "features", lambda self, part, rows=None: {"eval": features}[part](self, part)
  )
  again = pathlib.Path(select.run(wide.replace(run_dir=str(tmp_path / "again"), policy="matching"), session))
  np.testing.assert_array_equal(run_folder.read_scores(again / "scores.parquet")["influence"], b)


@pytest.mark.slow
def test_sums_over_checkpoints(settings, session, tmp_path):
  full = settings.replace(run_dir=str(tmp_path / "full"), checkpoint_every=4, keep_checkpoints=0)
  checkpoint = finetune.run(full, session)
  steps = finetune_lib.kept_steps(checkpoint)
  assert steps == [4, 8, 10]
  common = settings.replace(checkpoint=checkpoint, solver="identity", layers="last:2")
  run = lambda name: run_folder.read_scores(  # noqa: E731
    pathlib.Path(select.run(common.replace(run_dir=str(tmp_path / name), trajectory=name), session)) / "scores.parquet"
  )["influence"]
  weights = finetune_lib.kept_weights(checkpoint)
  assert weights[4] > weights[10] > 0
  by_hand = 0.0
  for step in steps:
    at = choose(session, session.checkpoint_params(checkpoint, step), "last:2", "all")
    gradient = at.problem.mean_gradient(session.stream(session.batcher("eval", at.tree, at.params)))
    train = session.batcher("train", at.tree, at.params)
    by_hand += weights[step] * at.problem.scores(session.stream(train), len(train), gradient, "vmap")[0]
  np.testing.assert_allclose(run("tracin"), by_hand, rtol=1e-3, atol=1e-5 * np.abs(by_hand).max())
  cosines = run("less")
  assert 0 < np.abs(cosines).max() <= sum(weights.values()) + 1e-6
  # Scores of a trajectory that has lost a checkpoint are neither computed nor taken for those of the whole one.
  shutil.rmtree(pathlib.Path(checkpoint) / "4")
  with pytest.raises(UserError, match=r"steps \[8, 10\] out of \[4, 8, 10\]"):
    run("tracin")
  with pytest.raises(UserError, match="choose the same"):
    select.run(common.replace(run_dir=str(tmp_path / "other"), trajectory="less", layers="last:1"), session)


def test_select_refuses_before_it_makes_a_folder(settings, session, tmp_path):
  wrong = {
    "exact": {"solver": "exact", "layers": "all"},
    "precondition": {"precondition": "ekfac"},
    "--write=self": {"write": "self"},
    "normalize=relatif": {"normalize": "relatif"},
    "--write=layer": {"write": "layer", "aggregate": "topic_max"},
    "layers=last:9": {"layers": "last:9"},
    "trajectory=tracin": {"trajectory": "tracin"},
    "sketch_size": {"score_path": "projected"},
    "--modules=attention lacks": {"score_path": "projected", "sketch_size": 32, "modules": "attention"},
    "lower --depth": {"solver": "low_rank", "depth": 50, "modules": "final_norm"},
    "budget=1tok is less": {"budget": "1tok"},
    "write=layer does not go with --trajectory": {"trajectory": "tracin", "solver": "identity", "write": "layer"},
  }
  for words, changes in wrong.items():
    folder = tmp_path / words.split(":")[0]
    asked = settings.replace(run_dir=str(folder), **changes)
    with pytest.raises(UserError, match=words):
      select.run(asked, session)
    assert not folder.exists()
    with pytest.raises(UserError, match=words):
      dry_run.run(asked, "select")
  with pytest.raises(UserError, match="--trainable_layers=last:9"):
    finetune.run(settings.replace(run_dir=str(tmp_path / "f"), trainable_layers="last:9"), session)
  with pytest.raises(UserError, match="proponents needs the scores of a select run"):
    evaluate.run(settings.replace(run_dir=str(tmp_path / "e"), policies="proponents"), session)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"layers": "last:99"}, "^--layers=last:99: 99 is not between 1 and 4"),
    ({"solver": "exact"}, "^--solver=exact: the subtree has 4,672 parameters, more than 4,096"),
    (
      {"solver": "low_rank", "modules": "final_norm"},
      "--depth=50 vectors of a subtree of 16 parameters: lower --depth",
    ),
    ({"solver": "ekfac", "curvature": "hessian"}, "--solver=ekfac with --curvature=hessian"),
    ({"budget": 99}, "budget=99 is more than the 40 examples"),
    ({"trajectory": "tracin", "solver": "cg"}, "--trajectory=tracin has no inverse"),
    ({"trajectory": "less", "solver": "identity", "layers": "last:1"}, r"fine-tuning trains layers \[2, 3\]"),
    ({"trajectory": "tracin", "solver": "identity"}, "all 4 checkpoints, .*: give --keep_checkpoints=0"),
  ],
)
def test_a_demo_and_its_dry_run_refuse_before_the_fine_tuning(settings, session, monkeypatch, changes, words):
  s = settings.replace(**{"policies": "full,random", "steps": 12, "depth": 50} | changes)
  monkeypatch.setattr(finetune, "run", lambda *_: pytest.fail("a demo that cannot end was begun"))
  monkeypatch.setattr(demo, "open_session", lambda _: session)
  for asked in (s, s.replace(dry_run=True)):
    monkeypatch.setattr(flags, "read", lambda _, asked=asked, **options: asked)
    with pytest.raises(UserError, match=words):
      demo.main([])
  assert not pathlib.Path(s.run_dir).exists()


def test_a_demo_may_score_the_factors_that_it_trains(settings, session):
  own = settings.replace(trainable="lora", modules="lora", trajectory="less", solver="identity", keep_checkpoints=0)
  assert checks.check_demo(session, own) is None
  told = dry_run.text(own, "demo")
  trained, scored = (re.search(rf"^{word}: ([\d,]+) parameters", told, re.M)[1] for word in ("trained", "scored"))
  assert trained == scored


def test_a_demo_is_settled_before_its_first_stage():
  s = Settings(policies="full,random,proponents,opponents")
  assert demo.settled(s) == s  # as in demo.flags, with the default policy
  chosen = s.replace(policy="proponents")
  assert demo.settled(chosen) == chosen.replace(policies="full,random,opponents")
  assert demo.settled(chosen.replace(fractions="0.5")) == chosen.replace(fractions="0.5")
  for changes, words in (
    ({"checkpoint": "runs/x"}, "--checkpoint=runs/x: demo fine-tunes and selects by itself; leave it out"),
    ({"select_runs": "runs/x"}, "--select_runs=runs/x: demo"),
    ({"policy": "random"}, "--policy=random --policies=full,random,.* one name"),
    ({"policies": "full,best"}, "unknown 'best'"),
    ({"equal": "cost"}, "--equal=cost: unknown 'cost'"),
    ({"fractions": "0.5,2"}, "^fractions=0.5,2: '2' is wrong in this list of numbers, each above 0 and at most 1"),
    ({"fractions": "0.5,0.5"}, "--fractions=0.5,0.5 is not a list of different shares"),
    ({"seeds": ""}, "--seeds is empty"),
  ):
    with pytest.raises(UserError, match=words):
      demo.settled(s.replace(**changes))


@pytest.mark.parametrize("curvature_examples", [1, 8, 500])
def test_lissa_never_draws_the_examples_of_its_residual(settings, session, curvature_examples):
  changed = settings.replace(curvature_examples=curvature_examples)
  rows = solver_inputs.curvature_rows(session, changed)
  answered = np.flatnonzero(session.splits["train"].num_response_tokens)
  assert sorted([*rows.fixed, *rows.drawn]) == answered.tolist()  # each once: no example is on both sides
  chosen = choose(session, session.model.params, settings.layers, settings.modules)
  shown = [own[own >= 0] for own, _ in solver_inputs.curvature_data(session, changed, chosen).fixed()]
  assert sorted(rows.fixed[np.concatenate(shown)]) == rows.fixed.tolist()


@pytest.mark.slow
def test_two_runs_give_the_same_bytes(settings, session, tmp_path):
  files = []
  for name in ("a", "b"):
    fresh = tiny.open_session(settings) if name == "b" else session
    folder = pathlib.Path(select.run(settings.replace(run_dir=str(tmp_path / name)), fresh))
    files.append([(folder / file).read_bytes() for file in ("scores.parquet", "coreset.jsonl", "report.md")])
  assert files[0] == files[1]
  (tmp_path / "b" / "coreset.jsonl").write_bytes(b"another's\n")  # "finished" means that all files are whole
  (tmp_path / "b" / "report.md").unlink()
  with pytest.raises(UserError, match="coreset.jsonl: damaged or changed since it was written"):
    read_selection(str(tmp_path / "b"), session)
  folder = pathlib.Path(select.run(settings.replace(run_dir=str(tmp_path / "b")), session))
  assert [(folder / file).read_bytes() for file in ("scores.parquet", "coreset.jsonl", "report.md")] == files[0]


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_of_a_select_run_is_named_or_harmless_and_mended(settings, session, tmp_path):
  settings = settings.replace(run_dir=str(tmp_path / "run"), write="layer")
  folder = pathlib.Path(select.run(settings, session))
  policy, wanted = read_selection(str(folder), session)
  scores = (folder / "scores.parquet").read_bytes()
  for path in sorted(path for path in folder.rglob("*") if path.is_file()):
    data = path.read_bytes()
    at = len(data) // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    try:
      found, columns = read_selection(str(folder), session)
      assert found == policy and all((columns[name] == wanted[name]).all() for name in wanted), path.name
    except UserError as error:
      assert path.name in str(error) and "\n" not in str(error)
    if path.name == run_folder.MANIFEST:
      with pytest.raises(UserError, match=r"manifest.json: (damaged|not JSON)"):
        select.run(settings, session)
      path.write_bytes(data)
      continue
    select.run(settings, session)
    assert not run_folder.RunDir.load(folder).damaged(), path.name
    assert (folder / "scores.parquet").read_bytes() == scores


@pytest.mark.real
def test_two_devices_give_the_scores_of_one(settings, session):
  # Parameters and examples cut over two devices; see test_check.two_devices for why not eight.
  two = sharding.make_mesh("data:1,fsdp:2", jax.devices()[:2])
  wide = sessions.open_session(settings, model=session.model.on(two))
  scores = []
  for each in (session, wide):
    chosen = choose(each, each.model.params, "last:2", "all")
    v, _ = scoring.queries(each, settings, chosen)
    train = each.batcher("train", chosen.tree, each.model.params)
    scores.append(chosen.problem.scores(each.stream(train), len(train), v))
  np.testing.assert_allclose(scores[1], scores[0], rtol=1e-4, atol=1e-5 * np.abs(scores[0]).max())


@pytest.mark.parametrize("solver", ["identity", pytest.param("datainf", marks=pytest.mark.slow), "cg"])
def test_other_solvers_and_policies(settings, session, tmp_path, solver):
  policy = {"identity": "matching", "datainf": "highest_loss", "cg": "random"}[solver]
  chosen = settings.replace(run_dir=str(tmp_path / "run"), solver=solver, policy=policy, budget=7)
  if solver == "identity":
    chosen = chosen.replace(write="query", query_block=4)
  folder = pathlib.Path(select.run(chosen, session))
  scores = run_folder.read_scores(folder / "scores.parquet")
  assert scores["selected"].sum() == 7 and np.all(np.isfinite(scores["influence"]))
  if solver == "identity":  # the mean over the queries, in blocks of four, is the aggregated query
    pairs = run_folder.read_parquet(folder / "query_scores.parquet")["influence"].reshape(10, 40)
    np.testing.assert_allclose(pairs.mean(0), scores["influence"], rtol=1e-3, atol=1e-5 * np.abs(pairs).max())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["policy"] == "matching" and 0 <= summary["target_beyond_chance"] <= summary["target_kept"] <= 1
  if policy == "highest_loss":
    assert scores["loss"][scores["selected"]].min() >= np.sort(scores["loss"])[-7]


def test_topics_are_aggregated(settings, session, tmp_path):
  chosen = settings.replace(run_dir=str(tmp_path / "run"), solver="identity", aggregate="topic_max")
  assert run_folder.read_scores(pathlib.Path(select.run(chosen, session)) / "scores.parquet")["selected"].sum() == 20


def _answered(session):
  """Evaluation examples with a response, by their ids: the order in which they take turns."""
  evals = session.splits["eval"]
  return np.array(sorted(np.flatnonzero(evals.num_response_tokens), key=lambda row: evals.ids[row]))


@pytest.mark.slow
def test_scores_of_single_queries_are_aggregated(settings, session, tmp_path):
  """Their nearest, or in turns: from the very scores that --write=query writes."""
  plain = settings.replace(run_dir=str(tmp_path / "plain"), solver="identity", policy="proponents", write="query")
  folder = pathlib.Path(select.run(plain, session))
  pairs = run_folder.read_parquet(folder / "query_scores.parquet")["influence"].reshape(10, 40)
  answered = _answered(session)
  for how in ("nearest", "round_robin"):
    chosen = plain.replace(run_dir=str(tmp_path / how), aggregate=how, write="", query_block=3)
    found = run_folder.read_scores(pathlib.Path(select.run(chosen, session)) / "scores.parquet")["influence"]
    wanted = aggregation.aggregate(pairs[answered], [""] * len(answered), how, session.splits["train"].ids)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5 * np.abs(pairs).max())


@pytest.mark.slow
def test_less_in_turns_serves_every_query(settings, session, tmp_path):
  tuned = settings.replace(run_dir=str(tmp_path / "tuned"), keep_checkpoints=0, trainable_layers="last:1")
  checkpoint = finetune.run(tuned, session)
  less = tuned.replace(checkpoint=checkpoint, layers="last:1", solver="identity", trajectory="less", query_block=4)
  less = less.replace(policy="proponents", aggregate="round_robin", run_dir=str(tmp_path / "run"))
  scores = run_folder.read_scores(pathlib.Path(select.run(less, session)) / "scores.parquet")
  usable = (session.splits["train"].num_response_tokens > 0).sum()
  assert sorted(scores["influence"])[-usable:] == list(range(41 - usable, 41)) and scores["selected"].sum() == 20
  first = scoring.trajectory_scores(session, less, scoring.NOTHING_KEPT, {"first": _answered(session)[:1]})[0]
  assert np.argmax(scores["influence"]) == np.argmax(first[0])  # the first query takes its best


def test_whitened_cosines_are_scores_too(settings, session, tmp_path):
  own = settings.replace(run_dir=str(tmp_path / "run"), solver="identity", normalize="whitened_cosine")
  folder = pathlib.Path(select.run(own.replace(policy="proponents"), session))
  found = run_folder.read_scores(folder / "scores.parquet")["influence"]
  assert np.abs(found).max() <= 1 and len(set(found.tolist())) > 20
  assert "whitened" in json.loads((folder / "summary.json").read_text())["unit"]
  with pytest.raises(UserError, match="--normalize=whitened_cosine with --solver=cg"):
    select.run(own.replace(solver="cg", run_dir=str(tmp_path / "other")), session)


def test_the_default_policy_says_what_it_took_and_why(settings, session, tmp_path):
  own = settings.replace(run_dir=str(tmp_path / "run"), solver="identity", policy="auto")
  summary = json.loads((pathlib.Path(select.run(own, session)) / "summary.json").read_text())
  apart = summary["apart"]["distance"] >= coreset.LEAST_DISTANCE and summary["apart"]["p"] <= coreset.MOST_P
  assert summary["policy"] == "auto" and summary["rule"] == ("hybrid" if apart else "random without copies")
  assert ("distinct evaluation examples are too few" in " ".join(summary["warnings"])) != apart
  assert summary["another_kind"] == apart
  assert summary["queries"] == len({record.content_key for record in session.splits["eval"].records})
  forced = json.loads(
    (
      pathlib.Path(select.run(own.replace(run_dir=str(tmp_path / "h"), policy="hybrid"), session)) / "summary.json"
    ).read_text()
  )
  assert forced["rule"] == "hybrid" and forced["apart"] == summary["apart"]


def test_evaluate_compares_and_keeps_finished_trainings(settings, session, trained, tmp_path, monkeypatch):
  runs = [
    select.run(settings.replace(run_dir=str(tmp_path / "p"), solver="identity"), session),
    select.run(settings.replace(run_dir=str(tmp_path / "m"), solver="identity", policy="matching"), session),
  ]
  chosen = settings.replace(run_dir=str(tmp_path / "e"), select_runs=",".join(runs), epochs=1.0)
  folder = pathlib.Path(evaluate.run(chosen, session))
  result = json.loads((folder / "evaluation.json").read_text())
  table = {row["policy"]: row for row in result["table"]}
  assert set(table) == {"full", "random", "opponents", "proponents", "matching"}
  assert table["random"]["seeds"] == 2 and table["full"]["seeds"] == 1
  assert {row["steps"] for row in table.values()} == {5} and table["full"]["examples"] == 40
  assert all(row["examples"] == 20 for name, row in table.items() if name != "full")
  assert all(1 < row["perplexity"] < result["base_perplexity"] * 1.2 for row in table.values())
  assert "full" in (folder / "evaluation.md").read_text()
  kept = [folder / "base.json", folder / "candidates.json", next((folder / "trainings").iterdir())]
  whole = [path.read_bytes() for path in kept]
  for path, content in zip(kept, whole, strict=True):  # other numbers that are no less JSON
    path.write_bytes(content.replace(b"1", b"2"))
  evaluate.run(chosen, session)
  assert [path.read_bytes() for path in kept] == whole
  assert json.loads((folder / "evaluation.json").read_text()) == result
  monkeypatch.setattr(evaluate.Retrainer, "retrain", lambda *_: pytest.fail("a finished training was done again"))
  evaluate.run(chosen, session)
  with pytest.raises(UserError, match="unknown 'best'"):
    evaluate.run(chosen.replace(policies="best"), session)


@pytest.mark.slow
def test_boundary_cache_changes_nothing(settings, session, tmp_path):
  scores = []
  for cache in ("memory", "disk", "off"):
    other = tiny.open_session(settings.replace(boundary_cache=cache, run_dir=str(tmp_path / "x")), session.model)
    chosen = choose(other, other.model.params, "last:2", "all")
    assert (other.batcher("train", chosen.tree, other.model.params).hidden is None) == (cache == "off")
    v, _ = scoring.queries(other, settings, chosen)
    train = other.batcher("train", chosen.tree, other.model.params)
    scores.append(chosen.problem.scores(other.stream(train), len(train), v))
  np.testing.assert_allclose(scores[0], scores[2], rtol=1e-4, atol=1e-5 * np.abs(scores[2]).max())
  np.testing.assert_array_equal(scores[0], scores[1])
  kept = [path.suffix for path in (tmp_path / "boundary").iterdir()]
  assert kept and set(kept) == {".bin", ".sha256"}


@pytest.mark.slow
def test_lora_trains_and_scores(settings, session, tmp_path):
  lora = settings.replace(run_dir=str(tmp_path / "l"), trainable="lora", lora_rank=2, trainable_layers="all")
  checkpoint = finetune.run(lora, session)
  chosen = settings.replace(run_dir=str(tmp_path / "s"), checkpoint=checkpoint, modules="lora", solver="datainf")
  assert run_folder.read_scores(pathlib.Path(select.run(chosen, session)) / "scores.parquet")["selected"].sum() == 20
  with pytest.raises(UserError, match="has no 'lora'"):
    select.run(settings.replace(run_dir=str(tmp_path / "t"), modules="lora"), session)


def test_sources_are_split_as_documented(settings, tmp_path):
  lines = [json.dumps({"instruction": f"say {i}", "input": "", "output": f"word {i}"}) for i in range(200)]
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  (tmp_path / "b.jsonl").write_text("\n".join(line.replace("say", "tell") for line in lines))
  a, b = f"jsonl:{tmp_path / 'a.jsonl'}", f"jsonl:{tmp_path / 'b.jsonl'}"
  one, _ = split_sources(settings.replace(train_data=a))
  assert sum(map(len, one.values())) == 200 and 120 < len(one["train"]) < 160
  two, _ = split_sources(settings.replace(train_data=a, eval_data=b))
  assert len(two["train"]) == 200 and len(two["eval"]) + len(two["test"]) == 200 and len(two["eval"]) > 70
  named, _ = split_sources(
    settings.replace(train_data="chatterbot:food", eval_data=b, data_fields="prompt=instruction,response=output")
  )
  assert len(named["eval"]) + len(named["test"]) == 200  # the corpus has no columns to name
  tested, _ = split_sources(settings.replace(train_data=a, test_data=b))
  assert len(tested["test"]) == 200 and len(tested["train"]) + len(tested["eval"]) == 200
  for bad in ("1,2", "a,b,c", "0.5,0.5,0.5", "1.2,-0.1,-0.1", "nan,0.5,0.5"):
    with pytest.raises(UserError, match=rf"^(--)?split={bad}"):
      split_sources(settings.replace(train_data=a, split=bad))
  with pytest.raises(UserError, match="--split=0.5,0.1,0.1"):  # as with one source, whatever of it is used
    split_sources(settings.replace(train_data=a, test_data=b, split="0.5,0.1,0.1"))


def test_an_empty_evaluation_set_is_refused(settings, session):
  with pytest.raises(UserError, match="the eval set is empty"):
    tiny.open_session(settings.replace(split="0.9,0.0,0.1", train_limit=5), session.model)


def test_an_empty_part_is_told_with_what_helps(settings, tmp_path):
  one = tmp_path / "one.jsonl"
  one.write_text('{"prompt": "a", "response": "b"}\n')
  with pytest.raises(UserError, match="of --eval_data none .* give more of them, or --eval_data and --test_data both"):
    split_sources(settings.replace(train_data="chatterbot:food", eval_data=f"jsonl:{one}"))
  with pytest.raises(UserError, match="its records have no topic, source or category"):
    subsets.of_topics(tokenizing.load_records(f"jsonl:{one}"), "eval", ["x"])
  one.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "resp')
  with pytest.raises(UserError, match="one.jsonl:2: broken JSON"):  # and not that a part is empty
    split_sources(settings.replace(train_data=f"jsonl:{one}"))


def test_blocks_of_limits_are_disjoint_and_make_up_the_whole(settings, session, tmp_path):
  path = tmp_path / "many.jsonl"
  path.write_text("\n".join(json.dumps({"prompt": f"question {i}", "response": f"answer {i}"}) for i in range(50)))
  own = settings.replace(train_data=f"jsonl:{path}", split="0.6,0.2,0.2", train_limit=12, eval_limit=4, test_limit=4)
  ids = lambda block, part: [  # noqa: E731
    record.example_id
    for record in tiny.open_session(own.replace(limit_block=block), session.model).splits[part].records
  ]
  whole = [record.example_id for record in split_sources(own)[0]["train"]]
  blocks = [ids(block, "train") for block in range(2)]
  assert [len(block) for block in blocks] == [12, 12] and not {*blocks[0]} & {*blocks[1]}
  assert {*blocks[0], *blocks[1]} <= {*whole} and len(whole) > 24
  assert [name for name in whole if name in {*blocks[1]}] == blocks[1]  # in source order
  # Run folders that did not know the flag go on.
  assert "limit_block" not in own.identity("data") and own.replace(limit_block=1).identity("data")["limit_block"] == 1
  with pytest.raises(UserError, match=r"--limit_block=9: the train set has \d+ examples.*the last block is 2"):
    ids(9, "train")
  with pytest.raises(UserError, match="--limit_block=1 goes with --eval_limit"):
    tiny.open_session(own.replace(limit_block=1, eval_limit=0), session.model)


def test_copies_are_told_and_can_be_left_out(settings, session, tmp_path):
  """Of equal messages the first stays, before the limits, in training only; topics and ids do not make a difference."""
  path = tmp_path / "many.jsonl"
  item = lambda i: {"prompt": f"question {i % 20}", "response": f"answer {i % 20}", "topic": str(i), "id": str(i)}  # noqa: E731
  path.write_text("\n".join(json.dumps(item(i)) for i in range(60)))
  own = settings.replace(train_data=f"jsonl:{path}", split="0.6,0.2,0.2", train_limit=0, eval_limit=0, test_limit=0)
  every, distinct = (tiny.open_session(own.replace(dedup=drop), session.model) for drop in (False, True))
  assert [len(distinct.splits[part]) for part in ("eval", "test")] == [
    len(every.splits[part]) for part in ("eval", "test")
  ]
  train = distinct.splits["train"]
  assert 3 * len(train) == len(every.splits["train"]) and all(int(name) < 20 for name in train.ids)
  assert list(train.ids) == [name for name in every.splits["train"].ids if int(name) < 20]
  assert len(tiny.open_session(own.replace(dedup=True, train_limit=8), session.model).splits["train"]) == 8
  size, again = len(every.splits["train"]), every.splits.summary["parts"]["train"]["duplicates"]
  assert 3 * again == 2 * size and distinct.splits.summary["parts"]["train"]["duplicates"] == 0
  assert "drop_copies" not in own.identity("data") and own.replace(dedup=True).identity("data")["drop_copies"]


def test_examples_without_response_score_zero_and_are_listed(settings, session, tmp_path):
  lines = [{"prompt": f"question {i}", "response": f"answer {i}" if i % 4 else ""} for i in range(24)]
  path = tmp_path / "holes.jsonl"
  path.write_text("\n".join(map(json.dumps, lines)))
  spec = f"jsonl:{path}"
  holes = settings.replace(
    train_data=spec, eval_data="chatterbot:food", run_dir=str(tmp_path / "run"), solver="identity", train_limit=0
  )
  fresh = tiny.open_session(holes, session.model)
  folder = pathlib.Path(select.run(holes, fresh))
  scores = run_folder.read_scores(folder / "scores.parquet")
  empty = scores["num_response_tokens"] == 0
  assert empty.sum() == 6 and np.all(scores["influence"][empty] == 0) and not scores["selected"][empty].any()
  listed = json.loads((folder / "summary.json").read_text())["without_response"]
  assert sorted(listed) == sorted(scores["example_id"][empty])
  assert summaries.data_summary(fresh.splits)


def test_full_data_is_not_trained_twice(settings, session, trained, tmp_path, monkeypatch):
  alone = settings.replace(policies="full", seeds="0")
  retrained = evaluate.run(alone.replace(run_dir=str(tmp_path / "a")), session)
  with monkeypatch.context() as patch:
    patch.setattr(finetune_lib.Trainer, "train", lambda *_: pytest.fail("the checkpoint was not used"))
    reused = evaluate.run(alone.replace(run_dir=str(tmp_path / "b"), checkpoint=trained), session)
  rows = [
    json.loads((pathlib.Path(folder) / "evaluation.json").read_text())["table"][0] for folder in (retrained, reused)
  ]
  assert rows[0]["trained_tokens"] == rows[1]["trained_tokens"]
  np.testing.assert_allclose(rows[0]["perplexity"], rows[1]["perplexity"], rtol=1e-4)
  other = alone.replace(run_dir=str(tmp_path / "c"), checkpoint=trained, learning_rate=5e-3)
  monkeypatch.setattr(finetune_lib.Trainer, "train", lambda *_, **__: pytest.fail("trained anew"))
  with pytest.raises(pytest.fail.Exception, match="trained anew"):
    evaluate.run(other, session)
