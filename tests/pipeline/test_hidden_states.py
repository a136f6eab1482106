"""Where hidden states are kept, under which name, and how long: those of other programs go, and then the oldest."""

import dataclasses
import errno
import os
import time
import types

import numpy as np
import pytest
import tiny

from in2core_jax.model import hidden_cache
from in2core_jax.pipeline import hidden_states
from in2core_jax.pipeline.hidden_states import HiddenCache, Place
from in2core_jax.runs import files, kept_files

quick_compile = tiny.quick_compile

LARGE = 1 << 25  # bytes that are worth keeping


@pytest.fixture
def place(tmp_path, monkeypatch):
  """Of a run folder on a disk of its own with 1 TB free, in a folder with the space that a test asks for."""
  run_dir, asked = tmp_path / "run", []
  run_dir.mkdir()
  above = types.SimpleNamespace(free=1e12, asked=asked)

  def disk_free(folder):
    asked.append(folder)
    return 1e12 if folder.startswith(str(run_dir)) else above.free

  monkeypatch.setattr(files, "disk_free", disk_free)
  return Place("auto", 4.0, str(run_dir)), above


def test_the_disk_that_counts_is_the_one_that_hidden_states_would_lie_on(place, tmp_path):
  where, above = place
  assert where.on_disk(LARGE)
  above.free = 5.0 * LARGE
  assert not where.on_disk(LARGE)
  assert set(above.asked) == {str(tmp_path / "boundary")}
  assert where.on_disk(int(5e9))  # more than fits into memory


@pytest.mark.parametrize("kept", [True, False])
def test_a_folder_that_cannot_be_written_leaves_them_in_memory(place, tmp_path, monkeypatch, kept):
  (tmp_path / "boundary").mkdir() if kept else None
  refused = tmp_path / "boundary" if kept else tmp_path
  monkeypatch.setattr(os, "access", lambda folder, _: str(folder) != str(refused))
  assert not place[0].on_disk(LARGE)
  assert dataclasses.replace(place[0], how="disk").on_disk(LARGE)  # asked for: what is wrong is told


def test_a_file_is_named_by_all_that_its_numbers_depend_on(tmp_path, monkeypatch):
  config = types.SimpleNamespace(hidden_size=4, num_layers=2)
  data = types.SimpleNamespace(num_tokens=np.array([3]))
  names = []
  made_of = hidden_states.hidden_cache
  monkeypatch.setattr(made_of, "compute_boundary", lambda _job, _data, file, _keep: names.append(file.name))
  monkeypatch.setattr(HiddenCache, "_job", lambda *_: None)

  def made(key=("train", 1, "base"), model="m", dtype="float32", tokens="t"):
    class Parts(dict):
      identity = staticmethod(lambda part: {part: tokens})

    own = types.SimpleNamespace(config=config, hash=model, dtype=dtype)
    cache = HiddenCache(Parts(train=data, eval=data), own, None, Place("disk", 4.0, str(tmp_path / "run")))
    cache._compute(key, types.SimpleNamespace(num_layers=2), None)

  made()
  made()
  assert len(set(names)) == 1
  others = [{"model": "n"}, {"dtype": "bfloat16"}, {"tokens": "u"}]
  others += [{"key": key} for key in (("eval", 1, "base"), ("train", 0, "base"), ("train", 1, "other"))]
  for other in others:
    made(**other)
  monkeypatch.setattr(hidden_states, "_code", lambda: "mended")
  made()
  assert len(set(names)) == 1 + len(others) + 1


STEM, NOW = f"train-{16 * 'a'}", 8 * "c"  # of some data at some model; of the programs as they are


def write(folder, stem: str, code: str, size: int, hours: float):
  """A file of hidden states that was last used so many hours ago, and its checksum."""
  folder.mkdir(exist_ok=True)
  file = folder / f"{stem}-{code}.bin"
  file.write_bytes(bytes(size))
  kept_files.checksum_file(file).write_text("")
  os.utime(file, (time.time() - 3600 * hours,) * 2)
  return file


def names(folder) -> set[str]:
  """Of the files, without their checksums, which are there for each of them."""
  found = {path.name for path in folder.iterdir()}
  assert all(f"{name}.sha256" in found for name in found if name.endswith(".bin"))
  return {name for name in found if not name.endswith(".sha256")}


def test_a_file_that_is_there_is_read_whatever_the_room_is_now(place, tmp_path):
  where, above = place
  file, keep = where.file(STEM, NOW, LARGE)
  assert (file, keep) == (tmp_path / "boundary" / f"{STEM}-{NOW}.bin", True)
  write(file.parent, STEM, NOW, 100, 0)
  above.free = 1.0
  assert where.file(STEM, NOW, LARGE) == (file, False)  # if it should be damaged, it is not written again
  assert where.file(STEM, NOW, 100) == (file, False)  # too small to be kept, but there
  assert where.file(f"eval-{16 * 'a'}", NOW, LARGE) == (None, False)
  assert dataclasses.replace(where, how="memory").file(STEM, NOW, LARGE) == (None, False)


def test_what_other_programs_have_made_of_the_same_is_removed_and_told(place, tmp_path, caplog):
  where, folder = place[0], tmp_path / "boundary"
  other = f"train-{16 * 'b'}"
  write(folder, STEM, 8 * "d", 10**7, 0)
  write(folder, other, 8 * "d", 10, 50)  # other data: who knows whose
  write(folder, "train", 16 * "e", 10**7, 0)  # a name of older versions
  (folder / "notes.bin").write_bytes(b"somebody's")
  (folder / "notes.bin.sha256").write_bytes(b"")
  with caplog.at_level("INFO"):
    file, keep = where.file(STEM, NOW, LARGE)
  assert keep and names(folder) == {f"{other}-{8 * 'd'}.bin", "notes.bin"}
  told = f"hidden states: 2 files (0.02 GB) removed from {folder}, made by other versions of the programs"
  assert [line.getMessage() for line in caplog.records] == [told]


def test_the_files_used_longest_ago_go_where_a_tenth_of_the_disk_does_not_hold_all(place, tmp_path, caplog):
  where, above = place
  folder, stems = tmp_path / "boundary", [f"train-{16 * letter}" for letter in "bde"]
  for stem, hours in zip(stems, (1, 3, 2), strict=True):
    write(folder, stem, NOW, LARGE // 2, hours)
  above.free = 10 * 2.0 * LARGE - 1.5 * LARGE  # a tenth of all but other files' is room for two of the size asked for
  with caplog.at_level("INFO"):
    assert where.file(STEM, NOW, LARGE)[1]
  assert names(folder) == {f"{stems[0]}-{NOW}.bin", f"{stems[2]}-{NOW}.bin"}
  assert "1 file (0.02 GB) removed" in caplog.text and "used longest ago" in caplog.text
  above.free = 10 * 1.0 * LARGE - 1.0 * LARGE
  values = kept_files.mapped(folder / f"{stems[2]}-{NOW}.bin", np.dtype(np.uint8), (LARGE // 2,))
  assert where.file(STEM, NOW, LARGE) == (None, False)  # what is mapped stays, and then the rest may stay too
  assert len(names(folder)) == 2
  assert dataclasses.replace(where, how="disk").file(STEM, NOW, LARGE)[1]  # asked for: room is made as far as it goes
  assert names(folder) == {f"{stems[2]}-{NOW}.bin"}
  del values
  above.free = 10.0 * LARGE
  assert where.file(STEM, NOW, LARGE)[1] and not names(folder)


def test_without_locks_a_file_that_was_used_today_is_left_alone(tmp_path, monkeypatch):
  def refused(*_):
    raise OSError(errno.ENOLCK, "no locks")

  monkeypatch.setattr(kept_files.fcntl, "flock", refused)
  recent, old = write(tmp_path, "train", NOW, 10, 23), write(tmp_path, "eval", NOW, 10, 25)
  assert kept_files.mapped(recent, np.dtype(np.uint8), (10,)).sum() == 0
  os.utime(recent, (time.time() - 3600 * 23,) * 2)
  assert kept_files.make_room(tmp_path, 5, 6.0, must=True) == [(old, 10)]


def test_a_damaged_file_is_computed_again_in_memory_where_it_may_not_be_written(tmp_path):
  t = tiny.make_tiny()
  dataset = tiny.make_dataset(t.config.vocab_size)
  job = hidden_cache.BoundaryJob(t.config, t.subtree, t.frozen)
  file = tmp_path / "train.bin"
  wanted = np.array(hidden_cache.compute_boundary(job, dataset, file).values)
  size = file.stat().st_size
  file.write_bytes(bytes(size))
  found = hidden_cache.compute_boundary(job, dataset, file, keep=False).values
  np.testing.assert_array_equal(found, wanted)
  assert not isinstance(found, np.memmap) and file.read_bytes() == bytes(size)
