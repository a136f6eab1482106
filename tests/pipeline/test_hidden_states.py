"""Where hidden states are kept, and under which name: on a disk that takes them, and never those of other programs."""

import dataclasses
import os
import types

import numpy as np
import pytest

from in2core_jax.pipeline import hidden_states
from in2core_jax.pipeline.hidden_states import HiddenCache, Place
from in2core_jax.runs import files

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
  monkeypatch.setattr(hidden_states.hidden_cache, "compute_boundary", lambda _job, _data, file: names.append(file.name))
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
