"""The self-check passes on a sound model, and each of its rows fails when what it looks at is broken."""

import copy
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from tiny import quick_compile  # noqa: F401, an autouse fixture

from experiments import check
from experiments.settings import CheckFlags
from in2core_jax.parallel import sharding
from in2core_jax.pipeline import session as sessions

pytestmark = pytest.mark.real  # a tokenizer, and a process of its own
CONFIG = dataclasses.replace(
  tiny.CONFIG, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16
)
TALK = [
  ("Hi", "Hello there"),
  ("What is two and two?", "Four."),
  ("Sing", "La la la, la la"),
  ("Who?", "Me"),
  ("Bye", ""),
]


@pytest.fixture(scope="module", autouse=True)
def two_devices():
  """Two of the eight simulated devices: XLA's CPU client has a thread for each device, so two programs with collectives
  over all eight, in flight at once as here, wait for each other for ever."""
  with pytest.MonkeyPatch.context() as patch:
    make = sharding.make_mesh
    patch.setattr(sessions.sharding, "make_mesh", lambda spec, devices=None: make("", devices or jax.devices()[:2]))
    yield


def write_inputs(folder: Path) -> list[str]:
  """A random model and ten conversations, one without an answer; returns the flags."""
  lines = [
    json.dumps({"id": f"{i}-{j}", "prompt": f"{p} {j}", "response": r}) for i, (p, r) in enumerate(TALK) for j in "ab"
  ]
  (folder / "talk.jsonl").write_text("\n".join(lines) + "\n")
  source = f"jsonl:{folder}/talk.jsonl"
  model = tiny.write_model(folder / "model", CONFIG)
  return [f"model={model}", *(f"{part}_data={source}" for part in ("train", "eval", "test"))]


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
  texts = dict(flag.split("=", 1) for flag in write_inputs(tmp_path_factory.mktemp("inputs")))
  settings = CheckFlags(**texts, layers="last:1", microbatch=3, system_prompt="none", max_shapes=1)
  return check.Subject(check.sample(settings))


def test_every_check_passes_on_a_sound_model(subject):
  rows = [row for one in check.CHECKS for row in one(subject)]
  assert {row.verdict for row in rows} == {"ok"}, check.table(rows)
  assert len(rows) == 10 and len({(row.check, row.measure) for row in rows}) == 10
  assert subject.session.batching.mesh.size > 1  # so the last row did compare
  assert any(row.error > 0 for row in rows)  # different roads, not the same numbers twice
  assert subject.session.splits["train"].num_response_tokens.min() > 0


def broken(subject, **changes):
  other = copy.copy(subject)
  for name, value in changes.items():
    setattr(other, name, value)
  return other


def failures(one, subject):
  return [row.measure for row in one(subject) if row.failed]


def test_gradients_rescaled_by_the_batch_or_mixed_with_a_neighbours_are_found(subject):
  scaled = lambda sub, frozen, batch, row: jax.tree.map(  # noqa: E731
    lambda leaf: leaf * (1 + row), subject.gradient(sub, frozen, batch, row)
  )
  assert failures(check.alone, broken(subject, gradient=scaled)) == ["relative length of its gradients"]

  def mixed(sub, frozen, batch, row):
    pair = (subject.gradient(sub, frozen, batch, r) for r in (row, 1))
    return jax.tree.map(lambda a, b: a + 0.1 * b, *pair)

  assert "1 - cosine of its gradients" in failures(check.alone, broken(subject, gradient=mixed))


def test_scores_that_differ_by_the_road_are_found(subject):
  wrong = lambda *args, microbatch: jax.tree.map(  # noqa: E731
    lambda leaf: leaf * (1.01 if microbatch else 1.0), subject.by_leaf(*args, microbatch=microbatch)
  )
  other = broken(subject, by_leaf=wrong)
  for one in (check.modes, check.layers, check.microbatches):
    assert failures(one, other) == ["relative difference of scores"]
  # A total of the right size whose layers are not what they are called.
  moved = lambda *args: (subject.pair(*args)[0], subject.pair(*args)[1] + 1.0)  # noqa: E731
  assert failures(check.layers, broken(subject, pair=moved))


def test_a_loss_that_is_not_the_derivatives_own_is_found(subject):
  wrong = lambda *args: 1.1 * subject.losses(*args)  # noqa: E731
  assert failures(check.finite_differences, broken(subject, losses=wrong))


def test_a_stale_boundary_cache_is_found(subject):
  stale = subject.batch._replace(hidden=jnp.roll(subject.batch.hidden, 1, axis=0))  # other examples'
  assert len(failures(check.boundary, broken(subject, batch=stale))) == 2


def test_padding_that_counts_and_responses_that_do_not_are_found(subject):
  everything = lambda sub, frozen, batch, v: subject.pair(  # noqa: E731
    sub, frozen, batch._replace(weight=batch.weight + 1e-3, slots=None), v
  )
  assert failures(check.ids, broken(subject, pair=everything))
  nothing = lambda sub, frozen, batch, v: subject.pair(sub, frozen, batch._replace(weight=0 * batch.weight), v)  # noqa: E731
  [row] = check.ids(broken(subject, pair=nothing))
  assert row.failed and row.error == math.inf


def test_devices_that_see_other_weights_are_found(subject):
  heavier = subject.batch._replace(weight=subject.batch.weight * 1.01)
  assert failures(check.devices, broken(subject, batch=heavier))


def test_without_a_boundary_cache_its_rows_are_skipped(subject):
  rows = check.boundary(broken(subject, batch=subject.whole))
  assert [row.verdict for row in rows] == ["skipped: no boundary cache with these flags"] * 2


def test_a_row_without_a_number_fails_and_the_table_says_so():
  rows = [
    check.Row("a = b", "gap", math.nan, 0.1),
    check.Row("c", "gap", 0.05, 0.1),
    check.Row("d", "gap", None, 0, "no"),
  ]
  assert [row.failed for row in rows] == [True, False, False]
  lines = check.table(rows).splitlines()
  assert lines[1].split() == ["a", "=", "b", "gap", "nan", "1.0e-01", "FAILED"]
  assert lines[2].endswith("5.0e-02  1.0e-01    ok") and lines[3].endswith("skipped: no")


def test_a_failed_check_is_exit_code_1(tmp_path):
  body = (
    "from experiments import check, cli, flags\n"
    "check.CHECKS = (lambda x: [check.Row('a', 'gap', 0.2, 0.1), check.Row('b', 'gap', 0.0, 0.1)],)\n"
    "flags.define()\ncli.run(check.main)\n"
  )
  environment = tiny.child_environment(devices=1)
  command = [sys.executable, "-c", body, *(f"--{flag}" for flag in write_inputs(tmp_path)), "--layers=last:1"]
  done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
  assert done.returncode == 1, done.stderr
  assert done.stdout.splitlines()[1].split() == ["a", "gap", "2.0e-01", "1.0e-01", "FAILED"]
  assert done.stdout.splitlines()[-1].startswith("1 of 2 checks failed")
