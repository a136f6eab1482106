"""The command `export`: what transformers finds in the folder, and what happens to a folder that is there."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import test_families
import tiny
import transformers
from tiny import quick_compile  # noqa: F401, an autouse fixture

from in2core_jax.errors import UserError
from in2core_jax.model import hf_folder, weights
from in2core_jax.params import adapters, subtree
from in2core_jax.pipeline import export
from in2core_jax.pipeline.settings import Settings
from in2core_jax.runs import files
from in2core_jax.training import checkpoints, train_loop

BESIDE = {
  "generation_config.json": '{"temperature": 0.5,\n "eos_token_id": [2, 5]}',
  "chat_template.jinja": "{{ messages }}\r\n",
  "merges.txt": "#version: 0.2\n",
  "LICENSE.txt": "theirs",
  "pytorch_model.bin": "not ours to copy",
}


def write_checkpoint(folder: pathlib.Path, model: str, rank: int = 2, **changes) -> tuple[dict, dict]:
  """A finished training of LoRA factors that nobody trained; returns (base parameters, those with the factors)."""
  _, base, _, digest = weights.load_model(model)
  params = adapters.add_lora(jax.tree.map(jnp.asarray, base), rank, jax.random.key(0))
  tree = subtree.make_subtree(params, "last:2", "lora")
  sub, frozen = subtree.split(params, tree)
  rng = np.random.default_rng(3)
  sub = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype), sub)
  meta = {"model": model, "model_hash": digest, "subtree": train_loop.subtree_meta(tree), "lora_rank": rank}
  meta |= {"seed": 0, "steps": 1, "recipe": {}} | changes
  with ocp.CheckpointManager(files.absolute(folder)) as manager:
    checkpoints.save(manager, 1, {"sub": sub, "optimizer": {"count": jnp.zeros(())}}, meta, [1.0])
  return base, subtree.merge(sub, frozen, tree)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
  """A model with a tokenizer and what else lies in such folders."""
  folder = tmp_path_factory.mktemp("models") / "source"
  tiny.write_model(folder)
  values = json.loads((folder / "config.json").read_text())
  values |= {"rope_theta": 1e4, "transformers_version": "4.51.0", "pretraining_tp": 1, "_name_or_path": "elsewhere"}
  (folder / "config.json").write_text(json.dumps(values))
  for name, text in BESIDE.items():
    (folder / name).write_bytes(text.encode())
  return folder


def test_a_lora_checkpoint_goes_out_merged_with_the_files_of_its_source(source, tmp_path):
  model, out = f"hf:{source}", tmp_path / "out"
  base, tuned = write_checkpoint(tmp_path / "checkpoint", model)
  export.run(Settings(checkpoint=str(tmp_path / "checkpoint")), str(out))  # the checkpoint names its model
  assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]
  _, read = weights.load_hf_dir(out)
  for module in ("attention/q_proj", "mlp/down_proj"):
    found, was, with_factors = (_module(tree, module) for tree in (read, base, tuned))
    low_rank = np.asarray(with_factors["lora_a"]) @ np.asarray(with_factors["lora_b"])
    np.testing.assert_array_equal(found["kernel"], was["kernel"] + low_rank)
    assert np.abs(low_rank[2:]).min() > 0 and not low_rank[:2].any()
  for name in ("tokenizer.json", "tokenizer_config.json", *BESIDE):
    if name != "pytorch_model.bin":
      assert (out / name).read_bytes() == (source / name).read_bytes(), name
  assert not (out / "pytorch_model.bin").exists()
  theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
  assert ours == {key: value for key, value in theirs.items() if key != "_name_or_path"}
  known = transformers.AutoConfig.from_pretrained(out)
  assert (known.model_type, known.num_hidden_layers) == ("llama", tiny.CONFIG.num_layers)
  assert len(transformers.AutoTokenizer.from_pretrained(out)) == tiny.CONFIG.vocab_size


def _module(params: dict, name: str) -> dict:
  for part in ("layers", *name.split("/")):
    params = params[part]
  return params


@pytest.mark.parametrize("name", test_families.MODELS)
def test_the_config_of_every_family_is_copied(name, tmp_path):
  """Every key is the source's, but for the class and the dtype; what is read of the copy is the same model."""
  source = tmp_path / "in"
  source.mkdir()
  given = test_families.MODELS[name]["config"] | {"bos_token_id": 1, "initializer_range": 0.02, "auto_map": {"a": "b"}}
  (source / "config.json").write_text(json.dumps(given))
  config = weights.hf_config.read_config(source / "config.json")
  values = hf_folder.copied_config(source, config, "bfloat16")
  own = {"architectures", "torch_dtype", "tie_word_embeddings", "num_hidden_layers"}
  assert {key: value for key, value in values.items() if key not in own} == {
    key: value for key, value in given.items() if key not in own | {"auto_map"}
  }
  assert (values["torch_dtype"], values["num_hidden_layers"]) == ("bfloat16", config.num_layers)
  assert weights.hf_config.parse_config(values, "the copy") == config


def test_the_text_part_of_a_multimodal_config_is_copied(tmp_path):
  inner = json.loads((test_families.REFERENCE / "tiny.json").read_text())["gemma3"]["config"]
  outer = {"model_type": "gemma3", "text_config": inner, "vision_config": {}, "eos_token_id": [1, 106]}
  (tmp_path / "config.json").write_text(json.dumps(outer))
  config = weights.hf_config.read_config(tmp_path / "config.json")
  values = hf_folder.copied_config(tmp_path, config, "float32")
  assert values["architectures"] == ["Gemma3ForCausalLM"] and values["eos_token_id"] == [1, 106]
  assert not values.keys() & {"text_config", "vision_config"}
  assert weights.hf_config.parse_config(values, "the copy") == config


def test_a_truncated_model_gets_a_config_of_its_own(source, tmp_path):
  export.run(Settings(model=f"truncated:hf:{source}:1", dtype="bfloat16"), str(tmp_path / "out"))
  values = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (values["num_hidden_layers"], values["torch_dtype"]) == (1, "bfloat16")
  tensors = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  assert {array.dtype.name for array in tensors.values()} == {"bfloat16"}
  assert not any(".layers.1." in name for name in tensors)


# ---- shards ----------------------------------------------------------------------------------------------------------


def test_shards_hold_every_tensor_once_and_are_kept_when_a_stopped_export_goes_on(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  tensors = {f"t{i}": rng.standard_normal((i + 1, 3)).astype(np.float32)[:, ::-1] for i in range(5)}  # views
  assert hf_folder.shards_of({"a": 5, "b": 5, "c": 20, "d": 1}, 10) == {
    "model-00001-of-00003.safetensors": ["a", "b"],
    "model-00002-of-00003.safetensors": ["c"],
    "model-00003-of-00003.safetensors": ["d"],
  }
  fill, calls = hf_folder._fill, []

  def stop_at_the_second(path, *rest):
    calls.append(path.name)
    if len(calls) == 2:
      raise KeyboardInterrupt
    fill(path, *rest)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(hf_folder, "_fill", stop_at_the_second)
    hf_folder.write_weights(tmp_path, tensors, 72)
  assert sorted(path.name for path in tmp_path.iterdir()) == [calls[0]]  # no reserved space is left
  monkeypatch.setattr(hf_folder, "_fill", lambda path, *rest: (calls.append(path.name), fill(path, *rest)))
  hf_folder.write_weights(tmp_path, tensors, 72, resume=True)
  assert calls.count(calls[0]) == 1 and len(calls) > 3
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
  found = weights.model_files.weight_files(tmp_path)  # refuses an index that does not fit
  assert set(found) == set(tensors)
  for name, path in found.items():
    np.testing.assert_array_equal(safetensors.numpy.load_file(path)[name], tensors[name])


def test_without_space_nothing_is_written(tmp_path, monkeypatch):
  def full(path, size):
    raise OSError(28, f"No space left on device, {size:,} bytes are needed", str(path))

  monkeypatch.setattr(files, "reserve", full)
  with pytest.raises(OSError, match="bytes are needed"):
    hf_folder.write_weights(tmp_path, {"a": np.zeros(3, np.float32)})
  assert not any(tmp_path.iterdir())


# ---- folders that are there ------------------------------------------------------------------------------------------


def test_folders_that_are_there(source, tmp_path):
  s, out = Settings(model=f"hf:{source}"), tmp_path / "out"
  export.run(s, str(out))
  before = (out / "model.safetensors").read_bytes()
  with pytest.raises(UserError, match="the folder holds files; give a new one, or --overwrite"):
    export.run(s, str(out))
  export.run(s.replace(overwrite=True, dtype="bfloat16"), str(out))
  assert (out / "model.safetensors").stat().st_size < len(before)
  (out / "thesis.tex").write_text("mine")
  with pytest.raises(UserError, match=r"thesis\.tex is not one of its files"):
    export.run(s.replace(overwrite=True), str(out))
  (tmp_path / "new.partial").mkdir()
  (tmp_path / "new.partial" / "mine").write_text("")
  with pytest.raises(UserError, match="is of no export"):
    export.run(s, str(tmp_path / "new"))
  for to, why in (("", "is empty"), ("gs://bucket/x", "a local folder"), (str(out / "thesis.tex"), "is no folder")):
    with pytest.raises(UserError, match=why):
      export.check_target(to, True)


def test_an_unfinished_export_of_other_weights_is_started_anew(source, tmp_path):
  folder = tmp_path / "out.partial"
  folder.mkdir()
  files.write_json(folder / export.NOTE, {"model": "another"})
  (folder / "model.safetensors").write_bytes(b"another's")
  export.run(Settings(model=f"hf:{source}"), str(tmp_path / "out"))
  assert weights.load_hf_dir(tmp_path / "out")[0] == weights.load_hf_dir(source)[0]


@pytest.mark.slow
def test_a_source_without_a_folder_gets_files_of_our_making(tmp_path, caplog):
  values = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 8, "intermediate_size": 8}
  values |= {"num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 2}
  (tmp_path / "config.json").write_text(json.dumps(values))
  out = export.run(Settings(model=f"random:{tmp_path / 'config.json'}"), str(tmp_path / "out"))
  config = json.loads((pathlib.Path(out) / "tokenizer_config.json").read_text())
  assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 knows too
  ours, theirs = weights.describe_model(f"hf:{out}")[1], transformers.AutoTokenizer.from_pretrained(out)
  turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
  assert ours.apply_chat_template(turns, tokenize=False) == theirs.apply_chat_template(turns, tokenize=False)
  assert ours("two words").input_ids == theirs("two words").input_ids
