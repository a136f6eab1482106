"""The gradients that policies compare are those of the layers and modules that were asked for."""

import jax
import numpy as np
import pytest
import tiny
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax.errors import UserError
from in2core_jax.estimate import stage_phases
from in2core_jax.params import subtree
from in2core_jax.pipeline import select_index
from in2core_jax.pipeline.projection import Projection


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  folder = tmp_path_factory.mktemp("projection")
  return tiny.run_settings(folder, sketch_size=4, train_limit=12, eval_limit=4, layers="last:1")


@pytest.fixture(scope="module")
def session(settings):
  return tiny.open_session(settings)


def projection(session, settings, modules):
  return Projection(session, settings.replace(modules=modules), session.model.params, 0)


def test_modules_choose_the_matrices_that_are_compared(session, settings):
  whole = projection(session, settings, "all")
  every, places, start = whole.features("eval"), {}, 0
  for path, leaf in zip(whole.sketch.tree.paths, jax.tree.leaves(whole.chosen.problem.sub), strict=True):
    places[path], start = np.arange(start, start + leaf.size), start + leaf.size
  for modules, wanted in (("attention", "attention/"), ("mlp/up_proj,norms", "mlp/up_proj")):
    some = projection(session, settings, modules)
    kept = np.concatenate([columns for path, columns in places.items() if path.startswith(wanted)])
    np.testing.assert_array_equal(some.features("eval"), every[:, kept])
    assert some.sketch.identity() != whole.sketch.identity()
    price = stage_phases.sketched(session, "select", settings.replace(modules=modules))
    assert price.sizes.subtree == len(kept) == subtree.count(some.chosen.problem.sub)


@pytest.mark.parametrize("modules", ["matrices", "attention,mlp", "norms", "lora", "all,embed"])
def test_all_matrices_are_compared_where_modules_name_all_or_none(modules, session, settings):
  assert projection(session, settings, modules).sketch.identity() == (
    projection(session, settings, "all").sketch.identity()
  )


def test_an_index_has_all_matrices(settings):
  with pytest.raises(UserError, match="--modules=mlp: an index has gradients of all matrices: leave it or --index out"):
    select_index.run(settings.replace(index="there", modules="mlp", solver="identity"))
