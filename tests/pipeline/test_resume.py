"""Killed and started again: what is kept, what is trusted, and the same bytes in the end."""

import logging
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import Killed, quick_compile  # noqa: F401, an autouse fixture

from experiments import kill_test
from experiments.settings import KillTestFlags
from in2core_jax.errors import UserError
from in2core_jax.pipeline import finetune, select
from in2core_jax.pipeline import session as sessions
from in2core_jax.pipeline.batching import Batching
from in2core_jax.runs import resumable, run_folder, stopping, unfinished
from in2core_jax.runs.progress import Progress
from in2core_jax.training import train_loop as finetune_lib

# ---- passes --------------------------------------------------------------------------


class Numbers:
  """A kept stream of ten small batches, in shards of three unless told, that notes which batches it builds."""

  def __init__(self, path, at=None, action=None, hold=resumable._never_stop, size=3, **depends_on):
    self.built, self.at, self.action = [], at, action
    run_dir = run_folder.RunDir.open(path, {"numbers": 10})
    pieces = resumable.ShardSpec(run_dir, "unfinished/numbers", depends_on, size, hold)
    self.stream = resumable.ResumableStream(
      list(range(10)), self.build, pieces, lambda: Progress(10, "numbers", "batches")
    )

  def build(self, plan):
    for number in plan:
      if number == self.at:
        self.action()
      self.built.append(number)
      yield np.array([2 * number, 2 * number + 1]), jnp.asarray([number, number + 0.5], jnp.float32)

  def results(self):
    """Values by row, as a kernel with two outputs gives them."""
    kernel = jax.jit(lambda batch: {"root": jnp.sqrt(batch), "pair": jnp.stack([batch, -batch], 1)})
    found = {}
    for rows, values in resumable.results(self.stream, "roots", kernel):
      found |= dict(zip(rows.tolist(), zip(values["root"].tolist(), values["pair"].tolist(), strict=True), strict=True))
    return dict(sorted(found.items()))

  def total(self):
    """A sum in which the order of the additions shows, and a count."""
    step = jax.jit(lambda found, batch: (found[0] * 1.1 + jnp.sum(jnp.sin(batch)), found[1] + 1), donate_argnums=0)
    found = resumable.total(self.stream, "sum", lambda found, item: step(found, item[1]), (jnp.zeros(()), jnp.int32(0)))
    return float(found[0]), int(found[1])


def kill():
  raise Killed


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


def assert_a_killed_pass_goes_on(path, way, expected):
  """Killed in its third shard it computes that one and the last; finished, nothing."""
  with pytest.raises(Killed):
    getattr(Numbers(path, 8, kill), way)()
  for built in ([6, 7, 8, 9], []):
    again = Numbers(path)
    assert getattr(again, way)() == expected and again.built == built


def test_finished_shards_are_read_back_and_not_even_built(tmp_path):
  wanted = Numbers(tmp_path / "alone")
  expected = wanted.results()
  assert (
    wanted.built == list(range(10))
    and len(expected) == 20
    and expected[6] == (float(np.sqrt(np.float32(3))), [3.0, -3.0])
  )
  assert_a_killed_pass_goes_on(tmp_path / "run", "results", expected)


def test_at_most_one_shard_is_lost_wherever_the_kill_falls(tmp_path):
  for at in range(1, 10):
    killed = Numbers(tmp_path / str(at), at, kill)
    with pytest.raises(Killed):
      killed.results()
    resumed = Numbers(tmp_path / str(at))
    assert len(resumed.results()) == 20
    # One shard, and the batch that was under way on the device when the one before it was fetched.
    assert at - resumed.built[0] <= 3 + 1


def test_damaged_and_foreign_shards_are_named_and_computed_again(tmp_path, caplog):
  expected = Numbers(tmp_path / "run").results()
  folder = tmp_path / "run" / "unfinished" / "numbers" / "roots"
  damaged = bytearray((folder / "000001.shard").read_bytes())
  damaged[-3] ^= 1
  (folder / "000001.shard").write_bytes(damaged)
  (folder / "000003.shard").write_bytes((folder / "000000.shard").read_bytes())
  with caplog.at_level(logging.WARNING):
    resumed = Numbers(tmp_path / "run")
    assert resumed.results() == expected and resumed.built == [3, 4, 5, 9]
  assert "000001.shard: damaged" in caplog.text and "000003.shard: a copy of shard 0" in caplog.text
  other = Numbers(tmp_path / "run", direction="another")
  assert other.results() == expected and other.built == list(range(10))
  assert "000000.shard: written for other settings" in caplog.text


def test_shards_that_were_cut_in_another_way_are_foreign(tmp_path):
  expected = Numbers(tmp_path / "run", size=5).results()
  other = Numbers(tmp_path / "run", size=6)  # two shards as well: batch 5 is in the first now
  assert other.results() == expected and other.built == list(range(10))


def test_a_sum_goes_on_to_the_same_bits(tmp_path, monkeypatch):
  monkeypatch.setattr(resumable, "_SAVING_SHARE", math.inf)  # save after every shard
  expected = Numbers(tmp_path / "alone").total()
  assert expected[1] == 10
  assert_a_killed_pass_goes_on(tmp_path / "run", "total", expected)


def test_saving_a_sum_takes_a_small_share_of_the_time(tmp_path):
  run_dir = run_folder.RunDir.open(tmp_path / "run", {})
  snapshot = resumable.Snapshot(resumable.ShardSpec(run_dir, "unfinished").store("state"))
  saved = []

  def state():
    saved.append(len(saved))
    return {"number": np.array(len(saved))}

  for _ in range(3):
    snapshot.save(state)
  assert saved == [0]  # the second comes too early for what the first one took
  snapshot.save(state, now=True)
  assert saved == [0, 1] and snapshot.load()["number"] == 2


@pytest.mark.parametrize("way", ["results", "total"])
def test_sigterm_waits_for_the_shard(tmp_path, way):
  expected = getattr(Numbers(tmp_path / "alone"), way)()
  before = signal.getsignal(signal.SIGTERM)
  stopped = Numbers(tmp_path / "run", 4, terminate, stopping.finish_on_sigterm)
  with pytest.raises(stopping.Terminated):
    getattr(stopped, way)()
  assert signal.getsignal(signal.SIGTERM) is before
  resumed = Numbers(tmp_path / "run")
  assert getattr(resumed, way)() == expected and resumed.built == [6, 7, 8, 9]


# ---- select --------------------------------------------------------------------------


class Counter:
  """Counts the batches that go to the device; `action` is called before number `at`."""

  placed, at, action = 0, None, None

  def __init__(self, session):
    self.session = session

  def count(self):
    if self.placed == self.at:
      self.at = None
      self.action()
    self.placed += 1

  def until(self, at, action=kill):
    """Counts anew."""
    self.placed, self.at, self.action = 0, at, action
    return self.session


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  return tiny.run_settings(
    tmp_path_factory.mktemp("resume"),
    kind=KillTestFlags,
    eval_limit=8,
    test_limit=8,
    steps=3,
    batch_tokens=144,
    shard_batches=2,
    depth=12,
    solver_tol=1e-9,
    curvature_batch=4,
    checkpoint_every=2,
    keep_checkpoints=0,
  )


@pytest.fixture(scope="module")
def counter(settings):
  made, place = Counter(tiny.open_session(settings)), Batching.place
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Batching, "place", lambda self, batch: made.count() or place(self, batch))
    yield made


@pytest.fixture(scope="module")
def session(counter):
  return counter.session


@pytest.fixture
def commands_handler():
  """SIGTERM where no piece is under way, as in a command: it stops at once, and does not end the tests' process."""
  before = signal.signal(signal.SIGTERM, stopping.terminate)
  yield
  signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def checkpoint(settings, session, counter, tmp_path_factory):
  """A training that SIGTERM has stopped at step 1 and that went on; and one that was left alone, to compare with."""
  root = tmp_path_factory.mktemp("trained")
  alone = finetune.run(settings.replace(run_dir=str(root / "alone")), session)
  chosen = settings.replace(run_dir=str(root / "stopped"))
  with pytest.raises(stopping.Terminated):
    finetune.run(chosen, counter.until(0, terminate))
  assert finetune_lib.kept_steps(f"{chosen.run_dir}/checkpoint") == [1]
  resumed = finetune.run(chosen, counter.until(None))
  assert counter.placed == 2 and finetune_lib.kept_steps(resumed) == [1, 2, 3]
  ours, theirs = (jax.tree.leaves(session.checkpoint_params(folder)) for folder in (resumed, alone))
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  return resumed


@pytest.fixture(scope="module")
def alone(settings, counter, tmp_path_factory):
  """(results, batches placed) of a run with the plain settings that is left alone."""
  folder = tmp_path_factory.mktemp("alone") / "run"
  select.run(settings.replace(run_dir=str(folder)), counter.until(None))
  return kill_test.results_of(folder), counter.placed


PATHS = {
  "lissa": {},
  "ekfac": {"solver": "ekfac", "normalize": "relatif", "write": "self", "aggregate": "topic_max"},
  "cg": {"solver": "cg", "damping_ratio": 0.01},
  "datainf": {"solver": "datainf", "write": "query,layer,token", "query_block": 4},
  "trajectory": {"solver": "identity", "trajectory": "tracin"},
}


@pytest.mark.parametrize(
  "path", ["lissa", *(pytest.param(path, marks=pytest.mark.slow) for path in PATHS if path != "lissa")]
)
def test_killed_anywhere_a_run_ends_in_the_same_bytes(settings, counter, alone, tmp_path, monkeypatch, request, path):
  monkeypatch.setattr(resumable, "_SAVING_SHARE", math.inf)
  chosen = settings.replace(**PATHS[path])
  if path == "trajectory":
    chosen = chosen.replace(checkpoint=request.getfixturevalue("checkpoint"))
  wanted, batches = alone
  if PATHS[path]:
    select.run(chosen.replace(run_dir=str(tmp_path / "alone" / "run")), counter.until(None))
    wanted, batches = kill_test.results_of(tmp_path / "alone" / "run"), counter.placed
  resumed = tmp_path / "killed" / "run"  # caches lie beside a run folder
  again = chosen.replace(run_dir=str(resumed))
  done = 0
  for share in (0.35, 0.8):  # of the work of a run that is left alone
    with pytest.raises(Killed):
      select.run(again, counter.until(max(1, int(share * batches) - done)))
    done = int(share * batches)
    assert (resumed / unfinished.FOLDER).exists() and not (resumed / "summary.json").exists()
  select.run(again, counter.until(None))
  assert not (resumed / unfinished.FOLDER).exists()
  assert kill_test.differences(wanted, kill_test.results_of(resumed)) == []
  assert {"scores.parquet", "coreset.jsonl", "report.md", "summary.json"} <= wanted.keys()


def test_a_run_killed_while_it_scores_solves_nothing_again(settings, session, counter, alone, tmp_path, caplog):
  wanted, batches = alone
  again, folder = settings.replace(run_dir=str(tmp_path / "run")), tmp_path / "run"
  with pytest.raises(Killed):
    select.run(again, counter.until(batches - 1))  # before the last batch of the last pass
  shards = sorted((folder / unfinished.FOLDER / "scores" / "losses_and_scores").glob("*.shard"))
  assert len(shards) >= 2
  damaged = shards[1].read_bytes()
  shards[1].write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
  with caplog.at_level(logging.WARNING):
    select.run(again, counter.until(None))
  assert f"{shards[1].name}: damaged (its checksum does not fit); it is recomputed" in caplog.text
  chosen = sessions.choose(session, session.model.params, "last:2", "all")
  plan = session.packer("train", chosen.tree, session.model.params).sequential_plan(settings.batch_tokens)
  assert counter.placed == len(plan) - 2 * (len(shards) - 1)  # the batches of the shards that are not there, no others
  assert kill_test.differences(wanted, kill_test.results_of(folder)) == []


def test_sigterm_ends_a_run_at_the_next_shard_or_state(settings, counter, alone, tmp_path, commands_handler):
  wanted, batches = alone
  again = settings.replace(run_dir=str(tmp_path / "run"))
  for at in (batches // 2, 3):  # in the solver's recursion, then in the score pass of what is left
    with pytest.raises(stopping.Terminated):
      select.run(again, counter.until(at, terminate))
  select.run(again, counter.until(None))
  assert kill_test.differences(wanted, kill_test.results_of(tmp_path / "run")) == []


# ---- processes -----------------------------------------------------------------------


def test_kill_test_touches_no_other_results(settings, tmp_path):
  run_folder.RunDir.open(tmp_path / "mine", {"stage": "select"}).write_text("coreset.jsonl", "mine")
  with pytest.raises(UserError, match="mine"):
    kill_test.run(settings.replace(run_dir=str(tmp_path / "mine")))
  assert (tmp_path / "mine/coreset.jsonl").read_text() == "mine"


def test_differences_are_seen():
  wanted = {"a": b"1", "b": b"2"}
  assert kill_test.differences(wanted, dict(wanted)) == []
  assert kill_test.differences(wanted, {"a": b"0", "c": b"2"}) == ["a", "b", "c"]


def test_moments_cover_the_run():
  found = kill_test.moments(10, 50.0, 0)
  assert sorted(int(moment // 5) for moment in found) == list(range(10)) and found != sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["finetune", "evaluate", "study", "index"])
def test_other_commands_that_are_killed_end_in_the_same_bytes(settings, tmp_path, capsys, monkeypatch, command):
  for name, value in tiny.child_environment(devices=1).items():
    monkeypatch.setenv(name, value)
  own = settings.replace(
    run_dir=str(tmp_path / "kills"),
    kills=3,
    kill_command=command,
    policies="full,random,bm25",
    variants="matching; highest loss",
    steps=12,
    index_size=16,
  )
  assert kill_test.run(own)
  assert "killed and resumed: 3 of 3 identical" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.real
def test_a_process_that_is_killed_ends_in_the_same_bytes(settings, tmp_path, capsys, monkeypatch):
  for name, value in tiny.child_environment(devices=1).items():
    monkeypatch.setenv(name, value)
  assert kill_test.run(settings.replace(run_dir=str(tmp_path / "kills"), kills=1, seed=7))
  assert "killed and resumed: 1 of 1 identical" in capsys.readouterr().out
