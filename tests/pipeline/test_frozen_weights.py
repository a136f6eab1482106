"""Stages on matrices in few bits against stages on the dequantised ones."""

import dataclasses
import pathlib
from unittest import mock

import jax
import numpy as np
import pytest
import tiny

from in2core_jax.costs import memory
from in2core_jax.errors import UserError
from in2core_jax.model import weights
from in2core_jax.parallel import sharding
from in2core_jax.params import quantisation, subtree
from in2core_jax.pipeline import advice, export, finetune, select, shapes
from in2core_jax.pipeline.loaded_model import LoadedModel
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs import run_folder
from in2core_jax.training import train_loop

quick_compile = tiny.quick_compile


def as_arrays(params):
  return quantisation.tree_map(lambda leaf: np.asarray(quantisation.full(leaf)), params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", quantisation.KINDS)
def test_a_checkpoint_and_scores_are_those_of_the_dequantised_model(kind, tmp_path):
  settings = tiny.run_settings(tmp_path, frozen_weights=kind, epochs=1.0, layers="1,3", damping_ratio=1.0)
  session = tiny.open_session(settings)
  plain = dataclasses.replace(session.model, load=lambda: (as_arrays(session.model.params), session.model.hash))
  found = []
  for name, own in (("few", session), ("plain", tiny.open_session(settings, plain))):
    of = lambda stage, name=name: settings.replace(run_dir=str(tmp_path / name / stage))  # noqa: E731
    checkpoint = finetune.run(of("finetune"), own)
    folder = select.run(of("select").replace(checkpoint=checkpoint), own)
    found.append(run_folder.read_scores(pathlib.Path(folder) / "scores.parquet"))
  np.testing.assert_allclose(found[0]["loss"], found[1]["loss"], rtol=1e-4)
  most = np.abs(found[1]["influence"]).max()
  np.testing.assert_allclose(found[0]["influence"], found[1]["influence"], rtol=0, atol=2e-3 * most)
  trained = session.checkpoint_params(checkpoint)
  assert isinstance(trained["layers"]["mlp"]["up_proj"]["kernel"], quantisation.Mixed)
  out = export.run(Settings(checkpoint=checkpoint), str(tmp_path / "out"))  # it names its model, and how it is kept
  tiny.assert_trees_equal(
    jax.tree.map(np.asarray, weights.load_hf_dir(out)[1]), jax.tree.map(np.asarray, as_arrays(trained))
  )
  with pytest.raises(UserError, match=f"was trained with --frozen_weights={kind}, not full"):
    tiny.open_session(settings.replace(frozen_weights="full")).checkpoint_params(checkpoint)


def test_a_checkpoint_says_how_its_model_was_kept_before_weights_are_read(monkeypatch):
  known = {"frozen_weights": "int8", "model_hash": "h"}
  monkeypatch.setattr(train_loop, "checkpoint_meta", lambda _: known)
  read = mock.MagicMock()
  model = LoadedModel("m", "float32", None, None, None, read, "nf4")
  with pytest.raises(UserError, match="^--checkpoint=c was trained with --frozen_weights=int8, not nf4: give"):
    model.at_checkpoint("c")
  read.assert_not_called()


@pytest.mark.parametrize(
  ("layers", "modules", "lines"),
  [("all", "all", 1), ("all", "matrices", 1), ("last:3", "all", 0), ("all", "attention", 0), ("all", "lora", 0)],
)
def test_rounding_that_leaves_every_matrix_full_is_told(layers, modules, lines):
  params = shapes.param_shapes(tiny.CONFIG, "float32", 2, "int8")
  tree = subtree.make_subtree(params, layers, modules)
  told = advice.spares_nothing(Settings(frozen_weights="int8"), params, tree)
  assert [line.split(" ")[0] for line in told] == lines * ["--frozen_weights=int8"]
  assert not advice.spares_nothing(Settings(), params, tree)


def test_codes_and_scales_are_cut_over_devices_as_the_matrix_is():
  few = quantisation.quantise_tree(tiny.make_params(tiny.CONFIG), "nf4")
  placed = sharding.place_params(few, sharding.make_mesh("data:2,fsdp:2,tensor:2"))
  kernel = placed["layers"]["mlp"]["up_proj"]["kernel"]
  assert kernel.codes.addressable_shards[0].data.shape == (4, 4, 16)
  tiny.assert_trees_equal(jax.tree.map(np.asarray, placed), jax.tree.map(np.asarray, few))


def test_the_price_counts_codes_and_the_chosen_arrays():
  mesh = sharding.make_mesh("", jax.devices()[:1])
  plain, few = (shapes.param_shapes(tiny.CONFIG, "float32", 0, kind) for kind in ("full", "nf4"))
  made = quantisation.quantise_tree(tiny.make_params(tiny.CONFIG), "nf4")
  assert memory.tree_bytes(few, mesh) == sum(leaf.nbytes for leaf in jax.tree.leaves(made))
  tree = subtree.make_subtree(few, "last:2", "matrices")
  inside = sum(leaf.nbytes for leaf in jax.tree.leaves(subtree.split(made, tree)[0]))
  nodes = jax.tree.leaves(made["layers"], is_leaf=quantisation.is_leaf)
  before = sum(node.codes.nbytes + node.scale.nbytes for node in nodes if quantisation.is_leaf(node))
  assert memory.copied_bytes(few, tree, mesh) == inside + before
  assert memory.copied_bytes(plain, tree, mesh) == 2 * inside
