"""Kept files that are not as they were written: named, computed again or refused, never used."""

import json
import logging
import random
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from in2core_jax.errors import UserError
from in2core_jax.ihvp import ekfac, ekfac_store
from in2core_jax.model import hidden_cache
from in2core_jax.runs import files, shards
from in2core_jax.runs.result_cache import ResultCache
from in2core_jax.runs.run_folder import MANIFEST, RunDir
from in2core_jax.training import checkpoints, train_loop
from in2core_jax.training.recipe import Recipe, make_optimizer

IDENTITY = {"stage": "test", "seed": 0}
SCORES = {
  "example_id": [f"example-{i}" for i in range(30)],
  "influence": np.linspace(-1, 1, 30).astype(np.float32),
  "selected": np.arange(30) % 2 == 0,
}


def damages(data: bytes, other: bytes, flips: int = 6):
  """(name, bytes or None for deleted) of what may happen to a file: flipped bits, cut, zeros, gone, another's."""
  draw = random.Random(len(data))
  places = {0, 1, len(data) // 2, len(data) - 1, *(draw.randrange(len(data)) for _ in range(flips))}
  for at in sorted(places):
    yield f"bit at {at}", data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
  yield from {"cut": data[: len(data) // 2], "empty": b"", "zeros": bytes(len(data)), "gone": None}.items()
  if other != data:
    yield "another's", other


def put(path, data):
  if data is None:
    path.unlink()
  else:
    path.write_bytes(data)


def written(path) -> RunDir:
  run = RunDir.open(path, IDENTITY)
  run.write_parquet("scores.parquet", SCORES)
  run.write_json("summary.json", {"policy": "matching", "perplexity": 3.25})
  run.write_text("plots/curve.svg", "<svg/>")
  return run


def test_a_damaged_file_of_a_run_is_never_read_and_the_run_is_not_finished(tmp_path, caplog):
  written(tmp_path)
  readers = {
    "scores.parquet": RunDir.read_scores,
    "summary.json": RunDir.load_json,
    "plots/curve.svg": RunDir.read_bytes,
  }
  whole = {name: (tmp_path / name).read_bytes() for name in readers}
  assert RunDir.open(tmp_path, IDENTITY).is_whole("summary.json") and not caplog.text
  for name, read in readers.items():
    other = whole["summary.json" if name != "summary.json" else "plots/curve.svg"]
    for what, data in damages(whole[name], other, 20):
      put(tmp_path / name, data)
      caplog.clear()
      with pytest.raises(UserError, match=name):
        read(RunDir.load(tmp_path), name)
      assert not RunDir.open(tmp_path, IDENTITY).is_whole("summary.json"), (name, what)
      assert f"{name}: " in caplog.text and "computed again" in caplog.text
    (tmp_path / name).write_bytes(whole[name])
  assert RunDir.open(tmp_path, IDENTITY).is_whole("summary.json")


def test_a_damaged_manifest_is_refused_or_harmless(tmp_path):
  run = written(tmp_path)
  whole = (tmp_path / MANIFEST).read_bytes()
  for at in range(len(whole)):
    (tmp_path / MANIFEST).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    try:
      found = RunDir.load(tmp_path)
    except UserError:
      continue
    assert (found.identity, found.entries, found.checksums) == (run.identity, run.entries, run.checksums)


def test_files_that_the_run_has_not_written_are_not_taken_for_its_own(tmp_path):
  run = RunDir.open(tmp_path, IDENTITY)
  (tmp_path / "base.json").write_text('{"losses": [1]}')
  assert not run.holds("base.json")
  with pytest.raises(UserError, match="not written by this run"):
    run.load_json("base.json")


def test_a_folder_of_an_older_version_goes_on_and_is_checked_from_then_on(tmp_path, caplog):
  written(tmp_path)
  manifest = json.loads((tmp_path / MANIFEST).read_text())
  for name in ("checksums", files.SEAL):
    del manifest[name]
  (tmp_path / MANIFEST).write_text(json.dumps(manifest))
  assert RunDir.load(tmp_path).load_json("summary.json")["perplexity"] == 3.25
  assert "of an older version, without checksums" in caplog.text
  run = RunDir.open(tmp_path, IDENTITY)
  assert run.is_whole("summary.json") and set(run.checksums) == {"scores.parquet", "summary.json", "plots/curve.svg"}
  (tmp_path / "summary.json").write_text('{"perplexity": 1.25}')
  assert not RunDir.open(tmp_path, IDENTITY).is_whole("summary.json")


def test_damaged_tables_that_are_read_alone_give_no_traceback(tmp_path):
  files.write_parquet(tmp_path / "t", SCORES)
  whole = (tmp_path / "t").read_bytes()
  for _, data in damages(whole, b"", 150):
    if data is not None:
      (tmp_path / "t").write_bytes(data)
      try:
        files.read_parquet(tmp_path / "t")
      except UserError as error:
        assert "\n" not in str(error)


def test_damaged_cells_and_their_arrays_are_made_again(tmp_path, caplog):
  made = []

  def get(seed):
    cells = ResultCache(RunDir.open(tmp_path, IDENTITY))

    def make():
      made.append(seed)
      cells.write_array(np.full(3, seed), "cell", seed)
      return {"seconds": 0.0, "value": 0.1 * seed}

    return cells.get(make, "cell", seed, with_array=True), cells.read_array("cell", seed).tolist()

  wanted, _ = get(1), get(2)
  first = ResultCache(RunDir.open(tmp_path, IDENTITY))._files("cell", 1)
  second = ResultCache(RunDir.open(tmp_path, IDENTITY))._files("cell", 2)
  for name, another in zip(first, second, strict=True):
    whole, other = (tmp_path / name).read_bytes(), (tmp_path / another).read_bytes()
    for what, data in damages(whole, other, 2):
      put(tmp_path / name, data)
      made.clear()
      caplog.clear()
      assert get(1) == wanted and made == [1], what
      assert (tmp_path / name).read_bytes() == whole and name in caplog.text


def test_shards_are_refused_for_any_bit(tmp_path):
  data = shards.pack(b"magic ", {"index": 1}, {"a": np.arange(5, dtype=np.float32)})
  for at in range(len(data)):
    with pytest.raises(shards.DamagedError):
      shards.unpack(b"magic ", data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])


def test_factors_of_ekfac_are_refused_for_any_damage(tmp_path):
  path = tmp_path / "fit.ekfac"
  ekfac_store.save(path, ekfac.Ekfac({}, {"leaf": jnp.ones((2, 3))}, {"examples": 4}), "identity")
  whole = path.read_bytes()
  for _, data in damages(whole, b"another's", 40):
    put(path, data)
    with pytest.raises(UserError, match="no readable EK-FAC file"):
      ekfac_store.load(path, "identity")


def test_damaged_hidden_states_are_named_and_computed_again(tmp_path, monkeypatch, caplog):
  """Of the right size too: zeros, flipped bits, another data set's."""
  runs = []
  monkeypatch.setattr(hidden_cache, "_below", lambda *a: runs.append(1) or a[3][..., None] * jnp.arange(1.0, 5))
  config = types.SimpleNamespace(hidden_size=4)
  job = hidden_cache.BoundaryJob(config, types.SimpleNamespace(extras=()), None, 16)
  data = types.SimpleNamespace(tokens=tuple(np.arange(1, n + 1, dtype=np.int32) for n in (3, 5, 4)))
  file, beside = tmp_path / "train-a.bin", tmp_path / "train-a.bin.sha256"

  def values():
    runs.clear()
    return np.array(hidden_cache.compute_boundary(job, data, file).values)

  wanted = values()
  whole = file.read_bytes()
  np.testing.assert_array_equal(values(), wanted)
  assert not runs and not caplog.text
  for place in (file, beside):
    content = place.read_bytes()
    for what, damaged in damages(content, bytes(reversed(content)), 3):
      caplog.clear()
      put(place, damaged)
      np.testing.assert_array_equal(values(), wanted)
      assert runs and file.read_bytes() == whole, what
      assert "computed again" in caplog.text or (place, damaged) == (file, None)
  shutil.copy(file, tmp_path / "train-b.bin")  # under another name with its checksum: other hidden states
  shutil.copy(beside, tmp_path / "train-b.bin.sha256")
  file = tmp_path / "train-b.bin"
  values()
  assert runs


# ---- checkpoints ---------------------------------------------------------------------

SUB = {"layers": {"kernel": jnp.arange(24.0).reshape(2, 3, 4), "bias": jnp.ones(5)}}
META = {"steps": 2, "recipe": {"steps": 2}, "identity": "x"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A folder with checkpoints of steps 1 and 2."""
  folder = tmp_path_factory.mktemp("trained") / "checkpoint"
  save(train_loop.TrainLog(folder, meta=META), (1, 2))
  return folder


def save(log, steps, factor=1.0):
  for step in steps:
    sub = jax.tree.map(lambda leaf, step=step: factor * leaf + step, SUB)
    log.save(step, sub, make_optimizer(Recipe(2)).init(sub), [0.5] * step)
  log.close()


def leaves(folder, step=None):
  return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(train_loop.load_sub(folder, SUB, step))]


def test_damaged_checkpoints_are_refused_and_a_training_falls_back_to_an_older_one(trained, tmp_path, caplog):
  wanted, state = leaves(trained), make_optimizer(Recipe(2)).init(SUB)
  paths = [path.relative_to(trained) for path in sorted((trained / "2").rglob("*")) if path.is_file()]
  for number, path in enumerate(paths):
    whole = (trained / path).read_bytes()
    cases = list(damages(whole, b"another's", 0))
    what, data = cases[number % len(cases)]
    folder = tmp_path / str(number)
    shutil.copytree(trained, folder)
    put(folder / path, data)
    try:
      assert leaves(folder) == wanted, (path, what)  # the list of files alone may be gone
      assert path.name == "files.sha256"
    except UserError as error:
      assert "\n" not in str(error) and str(folder) in str(error)
    caplog.clear()
    log = train_loop.TrainLog(folder, meta=META)
    done, sub, _, losses = log.restore(SUB, state)
    assert (done, losses) in ((1, [0.5]), (2, [0.5, 0.5]))
    assert done == 2 or "continues from an older checkpoint" in caplog.text
    save(log, range(done + 1, 3))
    assert leaves(folder) == wanted, (path, what)


def test_one_changed_weight_is_another_identity_and_is_refused_without_the_list_of_files(trained, tmp_path):
  other = tmp_path / "other"
  save(train_loop.TrainLog(other, meta=META), (1, 2), factor=1.0 + 1e-6)
  assert train_loop.checkpoint_hash(other) != train_loop.checkpoint_hash(trained)
  mixed = tmp_path / "mixed"  # the other's arrays under this one's note
  shutil.copytree(trained, mixed)
  shutil.rmtree(mixed / "2" / "state")
  shutil.copytree(other / "2" / "state", mixed / "2" / "state")
  with pytest.raises(UserError, match="is damaged"):
    leaves(mixed)
  (mixed / "2" / "files.sha256").unlink()
  with pytest.raises(UserError, match="weights of step 2 are damaged"):
    leaves(mixed)


def test_a_checkpoint_of_another_training_is_named(trained, tmp_path):
  run = RunDir.open(tmp_path / "run", {"stage": "finetune"})
  shutil.copytree(trained, run.file("checkpoint"))
  with pytest.raises(UserError, match="is of another training than manifest.json in the same folder"):
    train_loop.checkpoint_meta(tmp_path / "run/checkpoint")
  other = tmp_path / "foreign"
  save(train_loop.TrainLog(other, meta=META | {"identity": "y"}), (1, 2))
  shutil.rmtree(other / "1")
  shutil.copytree(trained / "1", other / "1")
  with pytest.raises(UserError, match="step 1 is of another training than step 2"):
    leaves(other, 1)


def test_checkpoints_of_older_versions_are_taken_with_a_warning(trained, tmp_path, caplog):
  folder = tmp_path / "old"
  shutil.copytree(trained, folder)
  (folder / "2" / "files.sha256").unlink()
  note = json.loads((folder / "2" / "meta" / "metadata").read_text())
  (folder / "2" / "meta" / "metadata").write_text(json.dumps({name: note[name] for name in ("meta", "losses")}))
  with caplog.at_level(logging.WARNING):
    assert leaves(folder) == leaves(trained)
  assert "of an older version, without checksums" in caplog.text
  assert train_loop.checkpoint_meta(folder) == META | {"step": 2}
  assert checkpoints.steps(folder) == [1, 2]
