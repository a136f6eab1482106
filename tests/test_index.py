"""The index of a large pool: the same rows whatever happens on the way, and the same choice as from whole features."""

import pathlib

import numpy as np
import pytest
import tiny
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax.index import store
from in2core_jax.pipeline import index
from in2core_jax.pipeline.index_settings import IndexSettings
from in2core_jax.pipeline.projection import Projection
from in2core_jax.runs.run_folder import RunDir


def settings(folder: pathlib.Path, **changes) -> IndexSettings:
  small = {
    "index_size": 512,
    "index_hidden": 128,
    "sketch_size": 32,
    "run_dir": str(folder / "index"),
    "policy": "auto",
  }
  return tiny.run_settings(folder, kind=IndexSettings, **(small | changes))


def files_of(folder: str) -> dict[str, bytes]:
  """Content of the files that hold results, by name."""
  root = pathlib.Path(folder)
  kept = [
    path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in ("index.json", "manifest.json")
  ]
  return {str(path.relative_to(root)): path.read_bytes() for path in kept if not path.name.startswith(".")}


def rows_of(s: IndexSettings, bench):
  held = store.IndexStore.load(s.run_dir)
  train = bench.splits["train"]
  return held, held.read_rows(store.keys_of(train.tokens, train.response_mask), train.ids)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A finished index with a basis that misses nothing, its settings and its session."""
  folder = tmp_path_factory.mktemp("index")
  s = settings(folder)
  bench = tiny.open_session(s)
  index.run(s, bench)
  return s, bench


def test_rows_have_the_products_and_lengths_of_whole_sketched_gradients(made):
  s, bench = made
  held, rows = rows_of(s, bench)
  whole = Projection(bench, s, bench.model.params, s.seed).features("train")
  block = rows.take(np.arange(len(rows)))
  exact = whole @ whole.T
  np.testing.assert_allclose(block.square, np.diag(exact), rtol=1e-5)
  found = block.gradients @ block.gradients.T
  np.testing.assert_allclose(found, exact, atol=1e-2 * np.abs(exact).max())
