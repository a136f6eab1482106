"""The run folder: identity, refusals, atomic and reproducible files, shards that are never trusted blindly."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import fsspec
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from fsspec.registry import _registry as fsspec_registry

from in2core_jax.errors import UserError
from in2core_jax.parallel import processes
from in2core_jax.runs import files, locks, resumable, run_folder
from in2core_jax.runs.progress import Progress, silent
from in2core_jax.runs.run_folder import RunDir
from in2core_jax.runs.shards import ShardStore

IDENTITY = {"layers": "last:8", "data": {"train": "abc", "seed": 0}}
SCORES = {
  "example_id": ["a", "b", "c"],
  "influence": np.array([0.5, -1.0, 2.0], np.float32),
  "rank": np.array([1, 2, 0], np.int32),
  "selected": np.array([True, False, True]),
}


# --- hashes ---


def test_hash_of_equal_values_is_equal_and_known():
  assert files.hash_of({"b": 1, "a": (1, 2)}) == files.hash_of({"a": [1, 2], "b": np.int64(1)})
  assert files.hash_of({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # sha256 of "{}"
  assert files.hash_of({"a": 1}) != files.hash_of({"a": "1"})
  with pytest.raises(ValueError):
    files.hash_of(float("nan"))


def test_file_sha256(tmp_path):
  (tmp_path / "f").write_bytes(b"abc")
  assert files.file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- opening ---


def test_same_identity_continues(tmp_path):
  first = RunDir.open(tmp_path / "run", IDENTITY)
  first.write_text("report.md", "x")
  second = RunDir.open(tmp_path / "run", {"data": {"seed": 0, "train": "abc"}, "layers": "last:8"})
  assert (first.resumed, second.resumed) == (False, True)
  assert second.entries == ["report.md"] and (tmp_path / "run/report.md").read_text() == "x"
  assert json.loads((tmp_path / "run/manifest.json").read_text())["identity"] == IDENTITY


def test_other_identity_is_refused_and_named(tmp_path):
  RunDir.open(tmp_path, IDENTITY).write_text("report.md", "x")
  with pytest.raises(UserError) as caught:
    RunDir.open(tmp_path, {"layers": "all", "data": {"train": "abc", "seed": 1}, "damping": 0.1})
  message = str(caught.value)
  assert "layers is 'last:8' there and 'all' now" in message
  assert "data.seed is 0 there and 1 now" in message and "damping is not set there and 0.1 now" in message
  assert "data.train" not in message and "--overwrite" in message and "--run_dir" in message
  assert (tmp_path / "report.md").exists()


def test_settings_that_differ_are_told_by_the_names_of_flags(tmp_path):
  old = {"fraction": 0.5, "num_examples": 0, "token_budget": 0, "per_query": False, "per_layer": True}
  old |= {"drop_copies": False, "layers": "last:8"}
  RunDir.open(tmp_path, {"flags": old})
  new = old | {"num_examples": 100, "per_query": True, "drop_copies": True}
  with pytest.raises(UserError) as caught:
    RunDir.open(tmp_path, {"flags": new})
  assert (
    "--budget is '0.5' there and '100' now; --dedup is False there and True now; "
    "--write is 'layer' there and 'query,layer' now. Give"
  ) in str(caught.value)


def test_a_folder_is_refused_by_what_is_known_of_the_identity(tmp_path):
  run_folder.RunDir.open(
    tmp_path / "run", {"flags": {"seed": 0, "mesh": ""}, "data": {"train": "a"}, "model_hash": "m"}
  )
  refuse = run_folder.RunDir.refuse_other
  for known in ({"flags": {"seed": 0}}, {"flags": {"seed": 0, "newer": 1}, "data": {"train": "a"}}, {}):
    refuse(tmp_path / "run", known)
  refuse(tmp_path / "elsewhere", {"flags": {"seed": 1}})
  with pytest.raises(UserError, match="--seed is 0 there and 1 now. Give"):
    refuse(tmp_path / "run", {"flags": {"seed": 1}, "data": {"train": "a"}})
  with pytest.raises(UserError, match="data.train is 'a' there and 'b' now"):
    refuse(tmp_path / "run", {"flags": {"seed": 0}, "data": {"train": "b"}})


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("loop", "loop: no folder can have this name .Too many levels of symbolic links."),
    ("loop/below", "loop/below: no folder can have this name .Too many levels"),
    ("dangling", "dangling: a symbolic link to nothing; choose another --run_dir"),
    ("x" * 300, "no folder can have this name .File name too long.; choose another"),
    ("/".join(["x" * 200] * 30), "no folder can have this name .File name too long.; choose another"),
    ("file", "file: a file, not a folder"),
    ("file/below", "cannot be made"),
  ],
)
def test_what_can_be_no_folder_is_named(tmp_path, name, message):
  (tmp_path / "loop").symlink_to(tmp_path / "loop")
  (tmp_path / "dangling").symlink_to(tmp_path / "nothing/there")
  (tmp_path / "file").write_text("x")
  with pytest.raises(UserError, match=message):
    RunDir.open(tmp_path / name, IDENTITY)
  with pytest.raises(UserError, match=message):  # before the work that comes before the folder is opened
    RunDir.refuse_held(tmp_path / name)


def test_a_place_that_may_not_be_written_is_named_before_any_work_but_a_finished_run_is_read(tmp_path, monkeypatch):
  (tmp_path / "run").mkdir()
  monkeypatch.setattr(os, "access", lambda path, _: str(path) != str(tmp_path))
  with pytest.raises(UserError, match=rf"below: cannot be made \({tmp_path} may not be written\); choose another"):
    RunDir.refuse_held(tmp_path / "other" / "below")
  RunDir.refuse_held(tmp_path / "run")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
  run = RunDir.open(tmp_path, IDENTITY)
  run.write_text("report.md", "x")
  (tmp_path / "report.md").unlink()
  (tmp_path / "report.md").mkdir()
  with pytest.raises(UserError, match=r"report.md: a folder where a file of this run belongs; move it away"):
    run.damaged()


def test_overwrite_removes_ours_and_nothing_else(tmp_path):
  run = RunDir.open(tmp_path, IDENTITY)
  run.write_json("summary.json", {})
  run.write_text("plots/curve.svg", "<svg/>")
  (run.folder("checkpoints") / "step").write_text("7")
  (tmp_path / "notes.txt").write_text("the user's")
  (tmp_path / "mine").mkdir()
  del run  # the job has ended, and its lock with it
  again = RunDir.open(tmp_path, {"layers": "all"}, overwrite=True)
  assert (tmp_path / locks.NAME).exists()
  (tmp_path / locks.NAME).unlink()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "mine", "notes.txt"]
  assert not again.resumed and RunDir.load(tmp_path).identity == {"layers": "all"}


def test_folder_of_somebody_else_is_refused_even_with_overwrite(tmp_path):
  (tmp_path / "thesis.tex").write_text("precious")
  for overwrite in (False, True):
    with pytest.raises(UserError, match="thesis.tex"):
      RunDir.open(tmp_path, IDENTITY, overwrite=overwrite)
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwrite_does_not_follow_links_or_names_outside(tmp_path):
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "f").write_text("keep")
  run = RunDir.open(tmp_path / "run", IDENTITY)
  run.file("link")
  (tmp_path / "run/link").symlink_to(tmp_path / "other")
  RunDir.open(tmp_path / "run", IDENTITY, overwrite=True)
  assert not (tmp_path / "run/link").exists() and (tmp_path / "other/f").read_text() == "keep"
  manifest = json.loads((tmp_path / "run/manifest.json").read_text())
  (tmp_path / "run/manifest.json").write_text(json.dumps(manifest | {"entries": ["../other"]}))
  with pytest.raises(UserError, match="other"):
    RunDir.open(tmp_path / "run", IDENTITY, overwrite=True)
  assert (tmp_path / "other/f").read_text() == "keep"


def test_damaged_and_changed_manifests_are_refused(tmp_path):
  RunDir.open(tmp_path, IDENTITY)
  text = (tmp_path / "manifest.json").read_text()
  (tmp_path / "manifest.json").write_text(text.replace("last:8", "last:4"))
  with pytest.raises(UserError, match="changed by hand"):
    RunDir.open(tmp_path, IDENTITY | {"layers": "last:4"})
  (tmp_path / "manifest.json").write_text(text[:40])
  with pytest.raises(UserError, match="not JSON"):
    RunDir.open(tmp_path, IDENTITY)
  (tmp_path / "manifest.json").write_text('{"name": "web app"}')
  with pytest.raises(UserError, match="not the manifest of a run folder"):
    RunDir.load(tmp_path)


def test_what_cannot_be_a_run_folder(tmp_path):
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file", tmp_path / "file" / "below", ""):
    with pytest.raises(UserError):
      RunDir.open(path, IDENTITY)
  with pytest.raises(UserError, match="not a run folder"):
    RunDir.load(tmp_path / "nowhere")


def test_leftovers_of_a_killed_first_write_do_not_block(tmp_path):
  (tmp_path / f".manifest.json.1-ab{files.TEMPORARY}").write_text("{")
  RunDir.open(tmp_path, IDENTITY)
  assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_what_another_process_is_writing_is_left_alone(tmp_path):
  machine = files._MACHINE
  gone = subprocess.Popen([sys.executable, "-c", ""])
  gone.wait()
  names = {
    "alive": f".scores.{machine}-{os.getppid()}-0a1b2c3d{files.TEMPORARY}",
    "killed": f".scores.{machine}-{gone.pid}-0a1b2c3d{files.TEMPORARY}",
    "elsewhere": f".scores.00000000-1-0a1b2c3d{files.TEMPORARY}",
    "elsewhere, long ago": f".old.00000000-1-0a1b2c3d{files.TEMPORARY}",
  }
  for name in names.values():
    (tmp_path / name).write_bytes(b"")
  os.utime(tmp_path / names["elsewhere, long ago"], (0, 0))
  files.remove_leftovers(tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {names["alive"], names["elsewhere"]}


def test_other_processes_write_no_shared_files(tmp_path, monkeypatch):
  monkeypatch.setattr(processes, "is_writer", lambda: False)
  with pytest.raises(UserError, match="not all processes see the folder that process 0 has made"):
    RunDir.open(tmp_path / "elsewhere", IDENTITY)
  with monkeypatch.context() as patch:
    patch.setattr(processes, "is_writer", lambda: True)
    RunDir.open(tmp_path / "run", IDENTITY)
  other = RunDir.open(tmp_path / "run", IDENTITY)
  other.write_text("report.md", "x")
  assert [path.name for path in (tmp_path / "run").iterdir()] == ["manifest.json"]
  with pytest.raises(UserError, match="other settings"):
    RunDir.open(tmp_path / "run", {"layers": "all"}, overwrite=True)


# --- writing ---


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  files.write_text(tmp_path / "f", "old")

  def no_space(handle):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", no_space)
  with pytest.raises(OSError, match="No space"):
    files.write_text(tmp_path / "f", "new")
  assert [path.name for path in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


def test_killed_writer_leaves_whole_files(tmp_path):
  program = (
    "import sys\nfrom in2core_jax.runs import files\ni = 0\n"
    "while True:\n  i += 1\n  files.write_text(sys.argv[1], str(i % 10) * 200000)\n  print(i, flush=True)"
  )
  for _ in range(3):
    root = Path(__file__).resolve().parents[2]
    arguments = [sys.executable, "-c", program, str(tmp_path / "f")]
    process = subprocess.Popen(arguments, cwd=root, stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.05)
    process.kill()
    process.communicate()
    text = (tmp_path / "f").read_text()
    assert len(text) == 200000 and len(set(text)) == 1


def test_written_files_are_as_readable_as_the_user_wants(tmp_path):
  before = os.umask(0o027)
  try:
    files.write_text(tmp_path / "f", "x")
  finally:
    os.umask(before)
  assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_json_round_trip_and_no_nan(tmp_path):
  value = {"b": np.float32(0.5), "a": [np.int64(1), float("nan")], "text": "ö\u202e", "array": np.arange(3)}
  files.write_json(tmp_path / "f", value)
  assert files.read_json(tmp_path / "f") == {"b": 0.5, "a": [1, None], "text": "ö\u202e", "array": [0, 1, 2]}
  with pytest.raises(UserError, match="no such file"):
    files.read_json(tmp_path / "g")


def test_lone_surrogates_do_not_stop_a_report(tmp_path):
  files.write_text(tmp_path / "f", "a\ud800b")
  assert (tmp_path / "f").read_text() == "a\\ud800b"


def test_same_table_gives_same_bytes_at_any_time(tmp_path):
  files.write_parquet(tmp_path / "a.parquet", SCORES)
  time.sleep(1.1)  # a time stored in seconds would differ now
  files.write_parquet(tmp_path / "b.parquet", dict(SCORES))
  assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_scores_round_trip(tmp_path):
  files.write_parquet(tmp_path / "scores.parquet", SCORES)
  scores = files.read_scores(tmp_path / "scores.parquet")
  assert list(scores) == list(SCORES) and scores["example_id"].tolist() == ["a", "b", "c"]
  assert scores["influence"].dtype == np.float32 and scores["selected"].dtype == bool
  np.testing.assert_array_equal(scores["influence"], SCORES["influence"])


def test_query_scores_are_a_column_of_rows(tmp_path):
  matrix = np.arange(12, dtype=np.float32).reshape(4, 3)
  files.write_parquet(tmp_path / "q.parquet", {"query_id": list("abcd"), "influence": matrix})
  np.testing.assert_array_equal(files.read_parquet(tmp_path / "q.parquet")["influence"], matrix)


def test_repeated_texts_are_read_as_they_are_and_made_once(tmp_path):
  words = ["a", "b", "a", None, "b"] * 40
  files.write_parquet(tmp_path / "t", {"word": words, "value": np.arange(200)})
  found = files.read_parquet(tmp_path / "t", repeated=["word"])
  assert found["word"].tolist() == words and found["value"].tolist() == list(range(200))
  assert len({id(word) for word in found["word"]}) == 3


@pytest.mark.parametrize(
  ("columns", "seen"),
  [
    ({"example_id": ["a"], "score": [1.0]}, "no column influence; it has example_id, score"),
    (SCORES | {"influence": np.array([0, np.nan, 1], np.float32)}, "b"),
    (SCORES | {"example_id": ["a", "b", "a"]}, "1 example id occurs twice, such as a"),
  ],
)
def test_bad_scores_are_refused(tmp_path, columns, seen):
  files.write_parquet(tmp_path / "s", columns)
  with pytest.raises(UserError, match=seen):
    files.read_scores(tmp_path / "s")


def test_scores_that_are_no_table(tmp_path):
  (tmp_path / "s").write_text("example_id,influence\n")
  with pytest.raises(UserError, match="not a Parquet file"):
    files.read_scores(tmp_path / "s")


def test_flagfile_is_read_back_by_absl(tmp_path):
  from absl import flags

  text = ["--layers=last:8", "--system_prompt=Be brief. # not a comment", "--note=a=b"]
  run_folder.write_flags(tmp_path / "flags.txt", text, ["repeats the run", "line one\nline two"])
  assert (tmp_path / "flags.txt").read_text().startswith("# repeats the run\n# line one\n# line two\n--layers")
  values = flags.FlagValues()
  for name in ("layers", "system_prompt", "note"):
    flags.DEFINE_string(name, "", "", flag_values=values)
  values(["program", f"--flagfile={tmp_path}/flags.txt"])
  assert (values.layers, values.system_prompt, values.note) == ("last:8", "Be brief. # not a comment", "a=b")
  with pytest.raises(UserError, match="--system_prompt"):
    run_folder.write_flags(tmp_path / "flags.txt", ["--system_prompt=two\nlines"])


def test_record_of_versions_and_devices():
  versions = run_folder.package_versions()
  assert versions["python"] == ".".join(map(str, sys.version_info[:3])) and {"jax", "numpy", "in2core_jax"} <= set(
    versions
  )
  summary = run_folder.device_summary()
  assert (summary["platform"], summary["num_devices"], summary["num_processes"]) == ("cpu", 8, 1)


# --- gs:// ---


def test_object_store(monkeypatch):
  """The remote branch, on fsspec's store in memory in the place of the one on the network."""
  memory = fsspec.get_filesystem_class("memory")
  for scheme in ("gs", "gcs"):
    monkeypatch.setitem(fsspec_registry, scheme, memory)
  monkeypatch.setattr(locks, "_REMOTE_SETTLES", 0.0)
  memory.store.clear()
  run = RunDir.open("gs://bucket/run", IDENTITY)
  assert files.is_remote(run.path) and not files.is_remote(epath.Path("/tmp/x"))
  run.write_parquet("scores.parquet", SCORES)
  store = ShardStore(run, "shards", {})
  store.write(3, {"scores": np.ones(2, np.float32)})
  assert store.done() == (3,)
  assert RunDir.open("gs://bucket/run", IDENTITY).resumed
  assert files.read_scores("gs://bucket/run/scores.parquet")["rank"].tolist() == [1, 2, 0]
  del run, store
  assert not epath.Path(f"gs://bucket/run/{locks.NAME}").exists()
  RunDir.open("gs://bucket/run", {"layers": "all"}, overwrite=True)
  assert [path.name for path in epath.Path("gs://bucket/run").iterdir()] == ["manifest.json"]


# --- shards ---


@pytest.fixture
def store(tmp_path):
  return ShardStore(RunDir.open(tmp_path, IDENTITY), "scores", {"rows": 64})


ARRAYS = {
  "scores": np.arange(6, dtype=np.float32).reshape(2, 3),
  "mask": np.array([True, False]),
  "hidden": np.array([[1.5, -2.0]], ml_dtypes.bfloat16),
  "empty": np.zeros((0, 4), np.int64),
  "scalar": np.float64(3.25),
}


def test_shard_round_trip(store):
  store.write(7, ARRAYS)
  arrays = store.read(7)
  assert set(arrays) == set(ARRAYS)
  for name, array in ARRAYS.items():
    assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape
    np.testing.assert_array_equal(arrays[name], array)
  assert arrays["scores"].flags.writeable and arrays["scores"].flags.aligned
  assert store.read(8) is None and store.done() == (7,)


def test_shard_bytes_do_not_depend_on_order_or_layout(store):
  store.write(0, ARRAYS)
  first = store.file(0).read_bytes()
  store.write(0, dict(reversed(ARRAYS.items())) | {"scores": np.asfortranarray(ARRAYS["scores"]).astype(">f4")})
  assert store.file(0).read_bytes() == first


def test_any_damaged_byte_is_noticed(store, caplog):
  store.write(0, ARRAYS)
  good = store.file(0).read_bytes()
  for at in (0, 25, 90, good.index(b"\n", 90) - 3, len(good) - 1):
    store.file(0).write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    assert store.read(0) is None and store.done() == ()
  for length in (0, 10, 85, len(good) - 1):
    store.file(0).write_bytes(good[:length])
    assert store.read(0) is None
  store.file(0).write_bytes(good)
  assert store.read(0) is not None
  assert "000000.shard: damaged" in caplog.text and "recomputed" in caplog.text


def test_foreign_shards_are_not_used(tmp_path, store, caplog):
  store.write(0, ARRAYS)
  same_run = RunDir.open(tmp_path, IDENTITY)
  assert ShardStore(same_run, "scores", {"rows": 64}).read(0) is not None
  assert ShardStore(same_run, "scores", {"rows": 32}).read(0) is None
  other_run = RunDir.open(tmp_path / "other", {"layers": "all"})
  other = ShardStore(other_run, "scores", {"rows": 64})
  other.file(0).write_bytes(store.file(0).read_bytes())
  assert other.read(0) is None and "written for other settings" in caplog.text
  store.file(1).write_bytes(store.file(0).read_bytes())
  assert store.done() == (0,) and "a copy of shard 0" in caplog.text


def test_shards_hold_no_objects(store):
  with pytest.raises(TypeError, match="object"):
    store.write(0, {"ids": np.array(["a", None], object)})
  with pytest.raises(TypeError):
    store.write(0, {"ids": np.array(["a"])})


# --- progress ---


def test_progress_logs_lines_without_a_terminal(caplog, monkeypatch):
  clock = iter(np.arange(0.0, 1000.0, 4.0))
  monkeypatch.setattr("in2core_jax.runs.progress.time.monotonic", lambda: float(next(clock)))
  with (
    caplog.at_level(logging.INFO, "in2core_jax.runs.progress"),
    Progress(40, "scores", "examples", initial=20) as progress,
  ):
    for _ in range(5):
      progress.update(4, loss=1.23456)
  lines = [record.getMessage() for record in caplog.records]
  assert 2 <= len(lines) < 6  # not one for each update
  assert lines[0].startswith("scores: ") and " left, loss 1.235" in lines[0]
  assert lines[-1].startswith("scores: 40/40 examples, ") and "took " in lines[-1]


def test_progress_that_is_silent_or_rare_logs_less(caplog, monkeypatch):
  clock = iter(range(0, 1000, 6))
  monkeypatch.setattr("in2core_jax.runs.progress.time.monotonic", lambda: float(next(clock)))
  counts = []
  for every, quiet in ((0.0, contextlib.nullcontext), (60.0, contextlib.nullcontext), (0.0, silent)):
    caplog.clear()
    with caplog.at_level(logging.INFO), quiet(), Progress(None, "rules", "trainings", every=every) as progress:
      for _ in range(12):
        progress.update(1)
    counts.append(len(caplog.records))
  assert counts[0] > 2 * counts[1] > 0 and counts[2] == 0


def test_progress_counts_the_rate_from_where_it_began(monkeypatch):
  now = [0.0]
  monkeypatch.setattr("in2core_jax.runs.progress.time.monotonic", lambda: now[0])
  progress = Progress(100, "scores", "examples", initial=50)
  now[0] = 5.0
  progress.update(10)
  assert progress.line() == "scores: 60/100 examples, 2 examples/s, 0:20 left"
  now[0] = 40.0
  assert progress.line() == "scores: 60/100 examples, 4 s each, 2:40 left"
  progress.expect(70)
  assert progress.line() == "scores: 60/70 examples, 4 s each, 0:40 left"


def test_the_hash_of_a_plan_is_that_of_its_shards_together():
  plan = [[(1, 2), [[number]]] for number in range(7)]
  stream = resumable.ResumableStream(plan, iter, types.SimpleNamespace(shard_batches=3), None)
  assert stream._plan_sha256 == files.hash_of([plan[:3], plan[3:6], plan[6:]])
