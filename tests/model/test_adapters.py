"""LoRA adapters of PEFT: read beside the weights and merged, against PEFT's own numbers; written and read again.

third_party/make_adapter_reference.py made the values, on models of families.json.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as parquet
import pytest
import safetensors.numpy
import test_export
import test_families
import tiny
from flax import traverse_util
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax.errors import UserError
from in2core_jax.model import decoder, peft_folder, peft_writer, weights
from in2core_jax.params import adapters, subtree
from in2core_jax.pipeline import export, select, shapes
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs import adapter_folder
from in2core_jax.training import train_loop

ADAPTERS = json.loads((test_families.REFERENCE / "adapters.json").read_text(encoding="utf-8"))
FUSED, DORA, HEAD = "phi3 fused, patterns", "gemma2 dora", "llama head factors"


def tensors_of(entry: dict) -> dict[str, np.ndarray]:
  """The factors, as make_adapter_reference.py draws them."""
  rng, found = np.random.default_rng(entry["seed"]), {}
  for key in sorted(entry["shapes"]):
    draw = rng.standard_normal(entry["shapes"][key])
    found[key] = (1 + 0.2 * np.abs(draw) if "magnitude" in key else 0.3 * draw).astype(np.float32)
  return found


def write(folder: pathlib.Path, name: str, tensors=None, **changes) -> pathlib.Path:
  """A base model and an adapter that names it."""
  entry = ADAPTERS[name]
  folder.mkdir(exist_ok=True)
  test_families.write(folder / "base", entry["base"])
  (folder / "adapter").mkdir(exist_ok=True)
  values = entry["values"] | {"base_model_name_or_path": str(folder / "base")} | changes
  (folder / "adapter/adapter_config.json").write_text(json.dumps(values))
  safetensors.numpy.save_file(tensors or tensors_of(entry), folder / "adapter/adapter_model.safetensors")
  return folder / "adapter"


def read(folder: pathlib.Path):
  """(configuration, base parameters, adapter)."""
  config, params = weights.load_hf_dir(folder.parent / "base")
  return config, params, peft_folder.read_adapter(folder, config)


def wide(params):
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)


QUICK = ("helium rslora", FUSED, DORA)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in ADAPTERS])
def test_adapter_matches_peft(name, tmp_path, x64):
  entry = ADAPTERS[name]
  folder = write(tmp_path, name)
  config, params, adapter = read(folder)
  tokens = jnp.asarray(test_families.MODELS[entry["base"]]["token_ids"])
  with np.load(test_families.REFERENCE / "adapters.npz") as stored:
    wanted, gradients = stored[f"{name}/logits"], stored[f"{name}/gradients"]
  if name == DORA:
    merged = jax.jit(decoder.logits, static_argnums=0)(config, wide(adapter.merged(wide(params))), tokens)
    np.testing.assert_allclose(merged[:, -wanted.shape[1] :], wanted, rtol=0, atol=1e-4)  # as in test_families
    with pytest.raises(UserError, match=r"a DoRA adapter.*give --model=hf:.*merges it"):
      adapter.beside(params)
    return
  beside = wide(adapter.beside(wide(params)))
  found = jax.eval_shape(lambda: beside)
  assert jax.tree.map(lambda leaf: leaf.shape, found) == jax.tree.map(lambda leaf: leaf.shape, adapter.shapes(params))
  # No gradients of copies of a shared A, nor of factors of the head, which are merged.
  plain, with_gradients = test_families.losses_and_logits, name not in (FUSED, HEAD)
  measure = jax.value_and_grad(plain, 1, has_aux=True) if with_gradients else lambda *args: (plain(*args), None)
  found, gradient = jax.jit(measure, static_argnums=0)(config, beside, tokens)
  logits = found[1][1]
  np.testing.assert_allclose(logits[:, -wanted.shape[1] :], wanted, rtol=0, atol=1e-4)
  folded, merged = peft_writer.fold_lora(adapter.beside(params)), adapter.merged(params)
  jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=2e-6), folded, merged)
  if not with_gradients:
    return
  names = {module: path for path, (module,) in peft_folder.modules_of(config, peft_folder.shapes_of(config)).items()}
  ours = {}
  for module in adapter.factors:
    leaves = gradient["layers"]
    for part in module.split("/"):
      leaves = leaves[part]
    for i in range(config.num_layers):
      prefix = f"base_model.model.model.layers.{i}.{names[module]}"
      a, b = np.asarray(leaves["lora_a"][i]), np.asarray(leaves["lora_b"][i])
      heads = peft_folder.rotated_heads(config, f"layers/{module}/kernel") if config.model_type == "helium" else 0
      b = peft_writer.pairs_together(np.ascontiguousarray(b.T), heads) if heads else b.T
      ours |= {f"{prefix}.lora_A.weight": a.T, f"{prefix}.lora_B.weight": b}
  ours = np.concatenate([test_families.pick(ours[key]) for key in sorted(entry["shapes"]) if "lora_" in key])
  np.testing.assert_allclose(ours, gradients, rtol=2e-4, atol=1e-5 * np.abs(gradients).max())


def test_factors_are_w_plus_scale_b_a(x64):
  """By hand, in float64: the model with factors beside W is the model with W + s A B, for every matrix."""
  config = tiny.make_config()
  params = tiny.make_params(config, jnp.float64, lora=2)
  rng = np.random.default_rng(5)
  folded = jax.tree.map(lambda leaf: leaf, params)
  for block in ("attention", "mlp"):
    for name, module in params["layers"][block].items():
      if "lora_a" in module:
        scale = rng.uniform(0.2, 3, (config.num_layers, 1))
        module["lora_scale"] = jnp.asarray(scale)
        kernel = module["kernel"] + scale[:, :, None] * np.einsum("lir,lro->lio", module["lora_a"], module["lora_b"])
        folded["layers"][block][name] = {"kernel": kernel}
  tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 9)))
  ours, wanted = (decoder.logits(config, tree, tokens) for tree in (params, folded))
  np.testing.assert_allclose(ours, wanted, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(
    peft_writer.fold_lora(params)["layers"]["mlp"]["up_proj"]["kernel"],
    folded["layers"]["mlp"]["up_proj"]["kernel"],
    atol=1e-6,  # folded in float32
  )
  chosen = subtree.make_subtree(params, "all", "mlp/up_proj,lora")
  assert not any(path.endswith("lora_scale") for path in chosen.paths)  # a constant is no parameter


def trained(folder: pathlib.Path, name: str):
  """(config, base parameters, those with factors of rank 2, B not 0 in the last two layers) of a model of families."""
  config, base = weights.load_hf_dir(test_families.write(folder, name))
  rng, flat = np.random.default_rng(3), traverse_util.flatten_dict(base, sep="/")
  for module in adapters.kernel_modules(base):
    layers, inputs, outputs = flat[f"layers/{module}/kernel"].shape
    flat[f"layers/{module}/lora_a"] = 0.3 * rng.standard_normal((layers, inputs, 2), "f4")
    flat[f"layers/{module}/lora_b"] = 0.3 * rng.standard_normal((layers, 2, outputs), "f4")
    flat[f"layers/{module}/lora_b"][0] = 0
  return config, base, traverse_util.unflatten_dict(flat, sep="/")


@pytest.mark.parametrize("name", ["phi3", "helium"])
def test_our_factors_go_out_and_come_back(name, tmp_path):
  config, _, params = trained(tmp_path / "model", name)
  peft_writer.write_adapter(tmp_path / "adapter", config, params, str(tmp_path / "model"))
  values = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert values["layers_to_transform"] == [1, 2] and values["peft_type"] == "LORA"
  leaves = peft_folder.read_adapter(tmp_path / "adapter", config).leaves()
  assert leaves and not any(path.endswith("lora_scale") for path in leaves)
  for path, leaf in leaves.items():
    ours = params["layers"]
    for part in path.split("/"):
      ours = ours[part]
    np.testing.assert_array_equal(leaf[1:], ours[1:], err_msg=path)
    assert not leaf[0].any()


def test_other_ranks_and_scales_go_out_as_patterns(tmp_path):
  folder = write(tmp_path, "helium rslora")
  config, params, adapter = read(folder)
  for change in (0, 1):
    a, b, scale = adapter.factors["attention/q_proj"]
    a[0, :, 1:], b[0, 1:], scale[1 + change] = 0, 0, 2.5
  peft_writer.write_adapter(tmp_path / "out", config, adapter.beside(params), "smollm2")
  values = json.loads((tmp_path / "out/adapter_config.json").read_text())
  assert values["rank_pattern"] == {"layers.0.self_attn.q_proj": 1}
  assert set(values["alpha_pattern"]) == {f"layers.{i}.self_attn.q_proj" for i in range(3)}
  again = peft_folder.read_adapter(tmp_path / "out", config)
  for module, parts in adapter.factors.items():
    for ours, theirs in zip(again.factors[module], parts, strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=module)
  assert adapter_folder.base_of(tmp_path / "out") == "smollm2"


# ---- what is refused -------------------------------------------------------------------------------------------------

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def without(key):
  return {name: value for name, value in tensors_of(ADAPTERS["helium rslora"]).items() if name != key}


@pytest.mark.parametrize(
  ("changes", "more", "message"),
  [
    ({"peft_type": "IA3"}, {}, "peft_type 'IA3' is not supported; LORA is"),
    ({"layer_replication": [[0, 2]]}, {}, "layer_replication .* merge the adapter with PEFT"),
    ({"lora_alpha": "x"}, {}, "must be numbers"),
    ({"rank_pattern": {"q_proj": 5}}, {}, "q_proj has rank 3, adapter_config.json says 5"),
    ({"rank_pattern": {"(": 5}}, {}, "is no pattern"),
    ({"use_dora": True}, {}, "use_dora is True, but .* does not agree"),
    (
      {},
      {f"{Q}.lora_A.weight": np.ones((3, 9), "f4")},
      "layers.0.self_attn.q_proj are .* another model",
    ),
    ({}, {f"{Q}.lora_A.weight": np.full((3, 32), np.nan, "f4")}, "NaN or infinity"),
    ({}, {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": np.ones((3, 32), "f4")}, "lora_A alone"),
    ({}, {f"{Q}.lora_B.bias": np.ones(3, "f4")}, "lora_B.bias is not supported"),
    ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((3, 3), "f4")}, "lora_embedding_A is not"),
    ({}, {"base_model.model.score.weight": np.ones((3, 3), "f4")}, "score was saved whole .* no such part"),
    ({}, {"base_model.model.lm_head.weight": np.ones((3, 3), "f4")}, r"lm_head is \(3, 3\).* resized"),
  ],
)
def test_adapters_that_would_be_another_model_are_refused(changes, more, message, tmp_path):
  tensors = tensors_of(ADAPTERS["helium rslora"]) | more
  with pytest.raises(UserError, match=message) as caught:
    read(write(tmp_path, "helium rslora", tensors, **changes))
  assert "\n" not in str(caught.value)


def test_files_that_are_missing_are_named(tmp_path):
  folder = write(tmp_path, "helium rslora", without(f"{Q}.lora_A.weight"))
  with pytest.raises(UserError, match="q_proj has lora_B alone"):
    read(folder)
  lost = {key: value for key, value in tensors_of(ADAPTERS["helium rslora"]).items() if f"{Q}." not in key}
  with pytest.raises(UserError, match="q_proj has factors in 2 of 3 layers, not in layer 0"):
    read(write(tmp_path, "helium rslora", lost))
  for named, message in (
    (None, "names no base model"),
    ("/not/there", "'/not/there' is not here; give --model=hf:BASE"),
  ):
    folder = write(tmp_path, "helium rslora", base_model_name_or_path=named)
    with pytest.raises(UserError, match=message):
      adapter_folder.base_of(folder)
  assert adapter_folder.base_of(write(tmp_path, HEAD, base_model_name_or_path="a/b", revision="c")) == "hub:a/b@c"
  (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
  with pytest.raises(UserError, match="pickled weights are never loaded"):
    train_loop.checkpoint_meta(folder)


# ---- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_adapter_is_a_checkpoint_and_a_model(tmp_path):
  """Scores at --checkpoint=ADAPTER, on factors and on weights; those on weights are those of the merged --model."""
  settings = tiny.run_settings(tmp_path, solver="identity", train_limit=12, eval_limit=4, test_limit=4)
  base = pathlib.Path(settings.model.removeprefix("hf:"))
  config, params = weights.load_hf_dir(base)
  params = adapters.add_lora(jax.tree.map(jnp.asarray, params), 2, jax.random.key(0))
  rng = np.random.default_rng(4)
  draw = lambda path, leaf: 0.3 * rng.standard_normal(leaf.shape, "f4") if path[-1].key == "lora_b" else leaf  # noqa: E731
  params = jax.tree_util.tree_map_with_path(draw, params)
  peft_writer.write_adapter(tmp_path / "adapter", config, params, str(base))
  runs = {
    "factors": {"checkpoint": str(tmp_path / "adapter"), "modules": "lora"},
    "weights": {"checkpoint": str(tmp_path / "adapter"), "modules": "matrices"},
    "merged": {"model": f"hf:{tmp_path / 'adapter'}", "modules": "matrices"},
  }
  found = {}
  for name, changes in runs.items():
    own = settings.replace(run_dir=str(tmp_path / name), **changes)
    session = tiny.open_session(own)
    if name == "factors":
      assert shapes.scored_shapes(config, own)[1].paths == subtree.make_subtree(params, "last:2", "lora").paths
      with pytest.raises(UserError, match="is an adapter, the end of a training alone"):
        select.run(own.replace(trajectory="tracin"), session)
    found[name] = scores_of(select.run(own, session))
  np.testing.assert_allclose(found["weights"], found["merged"], rtol=2e-4, atol=1e-5 * np.abs(found["merged"]).max())
  assert np.abs(np.corrcoef(found["factors"], found["weights"])[0, 1]) < 0.9999


@pytest.mark.slow
def test_export_writes_the_factors_of_a_checkpoint_for_peft(tmp_path):
  tiny.write_model(tmp_path / "base")
  base, tuned = test_export.write_checkpoint(tmp_path / "checkpoint", f"hf:{tmp_path / 'base'}")
  out = tmp_path / "out"
  settings = Settings(checkpoint=str(tmp_path / "checkpoint"))
  export.run(settings, str(out), adapter=True)
  assert {path.name for path in out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
  assert not {"config.json", "model.safetensors"} & {path.name for path in out.iterdir()}
  assert adapter_folder.base_of(out) == f"hf:{tmp_path / 'base'}"
  _, merged, _, digest = weights.load_model(f"hf:{out}")
  folded = peft_writer.fold_lora(tuned)
  jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-7), merged, folded)
  assert digest != weights.load_model(f"hf:{tmp_path / 'base'}")[3]
  export.run(settings.replace(overwrite=True), str(out), adapter=True)  # it knows its own files
  again = Settings(checkpoint=str(out))  # an adapter goes out merged, too
  export.run(again, str(tmp_path / "merged"))
  _, read = weights.load_hf_dir(tmp_path / "merged")
  jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-7), read, folded)
  with pytest.raises(UserError, match="--adapter: --checkpoint= has no LoRA factors"):
    export.run(Settings(model=f"hf:{tmp_path / 'base'}"), str(tmp_path / "none"), adapter=True)


def scores_of(run_dir: str) -> np.ndarray:
  table = parquet.read_table(pathlib.Path(run_dir) / "scores.parquet").to_pydict()
  return np.array([value for _, value in sorted(zip(table["example_id"], table["influence"], strict=True))])


if __name__ == "__main__":  # folders for make_adapter_reference.py --written
  jax.config.update("jax_enable_x64", True)
  for model in ("phi3", "helium", "gemma2"):
    where = pathlib.Path(sys.argv[1]) / model
    where.mkdir(parents=True)
    shape, _, tuned = trained(where / "model", model)
    peft_writer.write_adapter(where / "adapter", shape, tuned, str(where / "model"))
    ids = np.array(test_families.MODELS[model]["token_ids"])
    np.savez(where / "ours.npz", tokens=ids, logits=decoder.logits(shape, wide(tuned), jnp.asarray(ids)))
