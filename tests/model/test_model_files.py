"""Hostile and wrong model files: each is named in one line before anything is allocated; what is right stays right."""

import json
import logging
import struct
import time

import gguf
import numpy as np
import pytest
import safetensors.numpy
from test_weights import CONFIG, VARIANTS, edit_config, edit_tensors, make_params, shard, write_gguf

from in2core_jax.errors import UserError
from in2core_jax.model import gguf_file, hf_config, model_files, weights

LLAMA, GEMMA3, MISTRAL, QWEN2 = (
  hf_config.write_config(VARIANTS[name], "float32") for name in ("llama", "gemma3", "window", "biases")
)
NO_NUMBER = (0, -1, 1.5, 1e9, "32", True, None, [], {}, float("nan"), float("inf"), -float("inf"), 10**400, 10**9)
NO_REAL = (0, -1.0, "1e-5", True, [], {}, float("nan"), float("inf"), 10**400)
NO_TRUTH = (0, 1, "true", None, [], 0.0)


@pytest.fixture
def folder(tmp_path):
  weights.save_hf_dir(tmp_path, CONFIG, make_params(CONFIG))
  return tmp_path


# --- values of a config.json


@pytest.mark.parametrize("base", [LLAMA, GEMMA3, MISTRAL, QWEN2], ids=lambda base: base["model_type"])
def test_every_key_refuses_what_it_cannot_be(base):
  needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
  table = {key: [value for value in NO_NUMBER if value != 10**9] + [2**31] for key in needed}
  table |= dict.fromkeys(("head_dim", "num_key_value_heads"), [v for v in NO_NUMBER if v is not None] + [7])
  table |= dict.fromkeys(("rms_norm_eps", "rope_theta"), NO_REAL) | {"tie_word_embeddings": NO_TRUTH}
  table |= {key: (-5, "x", True, [], {}, float("nan")) for key in ("max_position_embeddings", "sliding_window")}
  table |= {"rope_scaling": (1, "linear", [1], True), "layer_types": ("full_attention", [1], ["chunked"], 3, [None])}
  table |= {"torch_dtype": (3, "int8", ["float32"]), "architectures": ("LlamaForCausalLM", [1], 3)}
  table |= {"eos_token_id": ("2", [2.5], {}, -7), "model_type": (None, 3, [], {}, "gpt2"), "attention_bias": (0, "no")}
  hf_config.parse_config(base, "right")
  for key, values in table.items():
    for value in values:
      with pytest.raises(UserError, match="c.json: ") as caught:
        hf_config.parse_config(base | {key: value}, "c.json")
      assert key in str(caught.value) or "head" in str(caught.value), (key, value)
      assert len(str(caught.value)) < 400


ROPES = [
  {"rope_type": "linear", "factor": value} for value in (0, -1, "4", True, None, float("nan"), float("inf"), [])
] + [
  {"rope_type": 3, "factor": 2.0},
  {"rope_type": "linear", "type": "llama3", "factor": 2.0},
  {"rope_type": "linear", "factor": 2.0, "beta_fast": 32},
  {"rope_type": "default", "factor": 8.0},
  {"rope_theta": "big"},
  dict(VARIANTS["llama3"].rope_scaling) | {"low_freq_factor": 4.0},
  dict(VARIANTS["llama3"].rope_scaling) | {"original_max_position_embeddings": 0},
]


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_scaling_is_a_table_too(key):
  for value in ROPES:
    with pytest.raises(UserError, match="rotary scaling"):
      hf_config.parse_config(LLAMA | {key: value}, "c.json")


@pytest.mark.parametrize(
  ("base", "values", "message"),
  [
    (
      LLAMA,
      {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 4.0}},
      "different things",
    ),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "language-model head"),
    (LLAMA, {"architectures": ["MistralForCausalLM"]}, "is not LlamaForCausalLM"),
    (LLAMA, {"num_local_experts": 8}, "num_local_experts 8"),
    (LLAMA, {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    (LLAMA, {"logit_scale": 0.0625}, "logit_scale"),
    (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    (LLAMA, {"rope_interleaved": True}, "rope_interleaved"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (LLAMA, {"quantization": {"bits": 4}}, "use the unquantised one"),
    (LLAMA, {"model_type": "llava", "text_config": {}}, "multimodal model"),
    (LLAMA, {"model_type": "gemma3", "text_config": {}}, "c.json: text_config: hidden_size, .* must be given"),
    (LLAMA, {"model_type": None, "peft_type": "LORA"}, "LoRA adapter"),
    (LLAMA, {"layer_types": ["full_attention"] * 2}, "2 layers of 3"),
    (LLAMA, {"layer_types": ["sliding_attention"] * 3}, "the window of llama is None"),
    (MISTRAL, {"layer_types": ["full_attention"] * 3}, "the window of mistral is 5"),
    (LLAMA, {"use_sliding_window": True}, "use_sliding_window True"),
    (QWEN2, {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, "no sliding_window in use"),
    (LLAMA, {"head_dim": None, "hidden_size": 30}, "not a multiple of 4 heads"),
    (GEMMA3, {"rope_scaling": None, "rope_parameters": {"full_attention": 3}}, "an object for each kind"),
    (GEMMA3, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
  ],
)
def test_options_that_would_change_the_model_are_refused(base, values, message):
  with pytest.raises(UserError, match=message):
    hf_config.parse_config(base | values, "c.json")


def test_keys_without_meaning_pass_and_others_are_told(caplog):
  quiet = {"use_cache": True, "transformers_version": "5", "unsloth_fixed": True, "pretraining_tp": 1, "_name": "x"}
  quiet |= {"is_llama_config": True, "rope_interleaved": False, "attention_dropout": 0.0, "eos_token_id": [1, 2]}
  with caplog.at_level(logging.WARNING):
    hf_config.parse_config(LLAMA | quiet, "quiet.json")
    assert not caplog.text
    hf_config.parse_config(LLAMA | {"mood": 3, "attention_dropout": 0.1}, "loud.json")
  assert "keys without effect here: mood, attention_dropout 0.1 (nothing is dropped)" in caplog.text


# --- JSON files


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b'{"hidden_size": 1, "hidden_size": 2}', "'hidden_size' stands twice"),
    (b'{"a": {"b": 1, "b": 1}}', "'b' stands twice"),
    (b'{"rms_norm_eps": NaN}', "NaN is no JSON number"),
    (b'{"rms_norm_eps": -Infinity}', "-Infinity is no JSON number"),
    (b"[" * 100_000, "nested without end"),
    (b'{"a":' * 100_000, "nested without end"),
    (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON"),
    (b"\xff\xfe{}", "broken JSON"),
    (b"", "broken JSON"),
    (b"[]", "holds a JSON list"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer.*git lfs pull"),
    (b"<!DOCTYPE html><html></html>", "a web page"),
    (b"\x1f\x8b\x08\0", "gzip"),
  ],
)
def test_files_that_are_no_strict_json_are_named(folder, content, message):
  shard(folder)
  for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
    before = (folder / name).read_bytes() if (folder / name).exists() else b"{}"
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
      weights.load_hf_dir(folder)
    (folder / name).write_bytes(before)
  weights.load_hf_dir(folder)


# --- folders


def put(name, content=b"{}"):
  return lambda folder: (folder / name).write_bytes(content)


def index(change):
  def apply(folder):
    shard(folder)
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))

  return apply


def place(value):
  return index(lambda values: values["weight_map"].update({"model.norm.weight": value}))


def twice(folder):
  files = shard(folder)
  tensors = safetensors.numpy.load_file(folder / files[1])
  tensors["model.norm.weight"] = np.ones(32, np.float32)
  safetensors.numpy.save_file(tensors, folder / files[1])


def cast(dtype):
  return lambda folder: edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(dtype)}))


def rename(old, new):
  return lambda folder: edit_tensors(folder, lambda t: t.update({new: t.pop(old)}))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (put("adapter_config.json"), "LoRA adapter beside a model.*merge_and_unload"),
    (put("adapter_model.safetensors"), "LoRA adapter beside a model"),
    (lambda f: (put("adapter_config.json")(f), (f / "config.json").unlink()), "adapter without its base model"),
    (put("quantize_config.json"), "quantised checkpoint"),
    (put("model-00001-of-00002.safetensors"), "1 weight file belongs to no index"),
    (lambda f: (shard(f), put("model-00003-of-00003.safetensors")(f)), "1 weight file belongs to no index"),
    (put("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}'), "1 shard named in .* is missing"),
    (put("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    (put("model.safetensors", b"\xff" * 100), "not a complete safetensors file"),
    (put("model.safetensors", b""), "not a complete safetensors file"),
    (place("../model.safetensors"), "no safetensors file of this folder"),
    (place("/etc/passwd.safetensors"), "no safetensors file of this folder"),
    (place("a/../../m.safetensors"), "no safetensors file of this folder"),
    (place("..\\m.safetensors"), "no safetensors file of this folder"),
    (place("C:m.safetensors"), "no safetensors file of this folder"),
    (place("config.json"), "no safetensors file of this folder"),
    (place(3), "no safetensors file of this folder"),
    (place(None), "no safetensors file of this folder"),
    (index(lambda values: values.update(weight_map=[])), "no weight_map"),
    (index(lambda values: values["weight_map"].pop("model.norm.weight")), "model.norm.weight is not in"),
    (index(lambda v: v["weight_map"].update({"x": "model-00001-of-00002.safetensors"})), "says that it holds x"),
    (twice, "model.norm.weight is in .* too"),
    (cast(np.int8), "lm_head.weight is stored as I8"),
    (rename("lm_head.weight", "head.weight"), "missing: lm_head.weight.*tie_word_embeddings"),
    (lambda f: edit_tensors(f, lambda t: t.update({"vision_tower.x": np.ones(2, np.float32)})), "multimodal"),
    (
      rename("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.qweight"),
      "up_proj.weight; a quantised checkpoint",
    ),
    (lambda f: edit_config(f, hidden_size=2**20, vocab_size=2**24), "GB of memory"),
    (lambda f: edit_config(f, vocab_size=41), r"lm_head.*asks for|embed_tokens.*asks for"),
  ],
)
def test_folders_that_are_not_what_they_say_are_refused(folder, change, message):
  change(folder)
  with pytest.raises(UserError, match=message) as caught:
    weights.load_hf_dir(folder)
  assert "\n" not in str(caught.value)


def test_weights_of_other_programs_are_told_and_not_read(folder, caplog):
  for name in ("consolidated.safetensors", "pytorch_model.bin", "optimizer.pt", "training_args.bin"):
    (folder / name).write_bytes(b"x")
  with caplog.at_level(logging.WARNING):
    weights.load_hf_dir(folder)
  assert "not read: consolidated.safetensors, pytorch_model.bin; " in caplog.text


@pytest.mark.parametrize("case", ["equal", "other", "shape"])
def test_a_stored_head_of_a_tied_model_is_compared(tmp_path, caplog, case):
  config = VARIANTS["tied"]
  weights.save_hf_dir(tmp_path, config, make_params(config))
  head = safetensors.numpy.load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].copy()
  head[-1, -1] += case == "other"
  head = head[1:] if case == "shape" else head
  edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": head}))
  if case == "shape":
    with pytest.raises(UserError, match="lm_head.weight is"):
      weights.load_hf_dir(tmp_path)
    return
  with caplog.at_level(logging.WARNING):
    loaded, params = weights.load_hf_dir(tmp_path)
  assert loaded.tie_embeddings == (case == "equal") == ("lm_head" not in params) == (not caplog.text)
  assert weights._hf_config(tmp_path) == loaded  # what is told without reading the weights is what is loaded
  if case == "other":
    np.testing.assert_array_equal(params["lm_head"]["kernel"], head.T)


def test_many_tensors_take_linear_time(folder):
  shard(folder)
  names = [f"model.layers.{i}.x" for i in range(50_000)]
  where = folder / "model.safetensors.index.json"
  file = "model-00001-of-00002.safetensors"
  safetensors.numpy.save_file(dict.fromkeys(names, np.zeros(1, np.float32)), folder / file)
  where.write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
  (folder / "model-00002-of-00002.safetensors").unlink()
  before = time.process_time()
  with pytest.raises(UserError, match="tensors are missing"):
    weights.load_hf_dir(folder)
  assert time.process_time() - before < 20


# --- GGUF headers


def text(value):
  data = value.encode() if isinstance(value, str) else value
  return struct.pack("<Q", len(data)) + data


def header(tensors=(), values=(), version=3, counts=None):
  """A GGUF file: tensors (name, shape, kind, offset) of zeros, values (key, kind, bytes)."""
  made = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(values))))
  for key, kind, value in values:
    made += text(key) + struct.pack("<I", kind) + value
  for name, shape, kind, offset in tensors:
    made += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
  return made + bytes(-len(made) % 32) + bytes(512)


ARRAY = struct.pack("<IQ", 9, 1)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (header(version=1), "GGUF version 1"),
    (header(version=0x03000000), "big-endian"),
    (header(counts=(10**18, 0)), "announces 1000000000000000000 tensors"),
    (header(counts=(0, 2**64 - 1)), "more than .* bytes can hold"),
    (header(values=[("a", 4, bytes(4)), ("a", 4, bytes(4))]), "a stands twice"),
    (header([("a", (8,), 0, 0), ("a", (8,), 0, 32)]), "tensor a stands twice"),
    (header([("a", (8,), 0, 0), ("b", (8,), 0, 0)]), "a and b overlap"),
    (header([("a", (16,), 0, 0), ("b", (8,), 0, 32)]), "a and b overlap"),
    (header([("a", (8,), 0, 4)]), "no multiple of general.alignment 32"),
    (header([("a", (8,), 0, 10**6)]), "ends inside tensor a"),
    (header([("a", (8,), 0, 2**64 - 32)]), "ends inside tensor a"),
    (header([("a", (2**40, 2**40), 0, 0)]), "ends inside tensor a"),
    (header([("a", (0, 8), 0, 0)]), r"shape \(8, 0\)"),
    (header([("a", (33,), 8, 0)]), "Q8_0 cannot have"),
    (header([("a", (), 0, 0)]), "0 axes"),
    (header([("a", (1,) * 9, 0, 0)]), "9 axes"),
    (header([("a", (8,), 999, 0)]), r"types \[999\]"),
    (header(values=[("k", 9, struct.pack("<IQ", 0, 2**62))]), "cut off or damaged"),
    (header(values=[("k", 9, ARRAY * 1000)]), "cut off or damaged"),
    (header(values=[("k", 8, struct.pack("<Q", 2**63))]), "cut off or damaged"),
    (header(values=[("k", 77, bytes(8))]), "cut off or damaged"),
    (header(values=[("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment is 0"),
    (header(values=[("general.alignment", 6, struct.pack("<f", 32))]), "general.alignment is 32.0"),
    (header(values=[("tokenizer.ggml.tokens", 8, text("a"))]), "a list of texts"),
    (header(values=[("tokenizer.ggml.scores", 9, struct.pack("<IQf", 6, 1, float("nan")))]), "finite numbers"),
    (header(values=[("tokenizer.ggml.eos_token_id", 5, struct.pack("<i", -4))]), "eos_token_id is -4"),
    (b"version https://git-lfs.github.com/spec/v1\nsize 3\n", "Git LFS pointer"),
    (b"<html>" + bytes(100), "a web page"),
    (b"PK\x03\x04" + bytes(100), "zip archive"),
  ],
)
def test_gguf_headers_that_cannot_be_are_refused(tmp_path, content, message):
  (tmp_path / "m.gguf").write_bytes(content)
  with pytest.raises(UserError, match=message):
    gguf_file.read_gguf(tmp_path / "m.gguf")


BAD = (0, 2**30, 1.5, "4")
KEYS = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
OTHERS = {"attention.layer_norm_rms_epsilon": (0.0, float("nan"), float("inf"), "x", 4), "rope.freq_base": (0.0, "x")}
OPTIONS = {"logit_scale": 2.0, "expert_count": 8, "attention.value_length": 4, "attention.scale": 0.5, "split.count": 2}


def test_gguf_metadata_is_checked_by_the_same_kind_of_table(tmp_path):
  right = gguf_file.read_gguf(write_gguf(tmp_path / "m.gguf", CONFIG, make_params(CONFIG)))
  assert weights.gguf_config(right) == CONFIG
  cases = [(f"llama.{key}", value) for key in KEYS for value in BAD]
  cases += [(f"llama.{key}", value) for key, values in OTHERS.items() for value in values]
  cases += [(key if "split" in key else f"llama.{key}", value) for key, value in OPTIONS.items()]
  cases += [("general.type", "adapter"), ("llama.attention.head_count", [4, 4, 4])]
  for key, value in cases:
    file = gguf_file.GgufFile(right.path, right.metadata | {key: value}, right.tensors, right._bytes)
    with pytest.raises(UserError, match=r"m\.gguf: "):
      weights.gguf_config(file)


def test_many_gguf_tensors_take_linear_time(tmp_path):
  count = 50_000
  rows = b"".join(text(f"blk.{i}.x") + struct.pack("<IQIQ", 1, 8, 0, 32 * i) for i in range(count))
  made = b"GGUF" + struct.pack("<IQQ", 3, count, 0) + rows
  (tmp_path / "m.gguf").write_bytes(made + bytes(32 * count + 64))
  before = time.process_time()
  assert len(gguf_file.read_gguf(tmp_path / "m.gguf").tensors) == count
  assert time.process_time() - before < 10


# --- what --model says


def test_the_wrong_kind_of_model_is_named(folder, monkeypatch):
  path = write_gguf(folder.parent / "alone.gguf", CONFIG, make_params(CONFIG))
  (folder.parent / "ggufs").mkdir()
  (folder.parent / "ggufs" / "m.gguf").write_bytes(path.read_bytes())
  cases = {
    "meta-llama/Llama-3.2-1B": "nothing is downloaded: fetch it with `hf download",
    "hf:meta-llama/Llama-3.2-1B": "nothing is downloaded: fetch it with `hf download",
    "https://huggingface.co/a/b": "nothing is downloaded",
    f"hf:{path}": "it is a GGUF file: give gguf:FILE",
    f"hf:{folder / 'model.safetensors'}": f"give hf:{folder}",
    f"gguf:{folder}": f"give hf:{folder}",
    f"gguf:{folder.parent / 'ggufs'}": "give gguf:.*m.gguf",
    f"random:{folder}": "give random:.*config.json",
    "hf:/absent/folder": "no such folder",
    "hf:a\0b": "no file can have this name",
    "hf:" + "a" * 5000: "no file can have this name",
  }
  for spec, message in cases.items():
    for load in (weights.load_model, weights.describe_model):
      with pytest.raises(UserError, match=message):
        load(spec)
  monkeypatch.setenv("HOME", "")
  monkeypatch.delenv("HOME")
  with pytest.raises(UserError, match="no home directory|no such folder"):
    weights.load_model("hf:~nobody-of-this-name/m")


def test_a_bare_path_is_taken_as_what_it_is(folder, caplog):
  path = write_gguf(folder.parent / "bare.gguf", CONFIG, make_params(CONFIG))
  with caplog.at_level(logging.WARNING):
    assert weights.full_spec(str(folder)) == f"hf:{folder}"
    assert weights.full_spec(str(path)) == f"gguf:{path}"
  assert caplog.text.count("is taken as") == 2
  assert weights.full_spec("gemma3") == "gemma3" and weights.full_spec("truncated:gemma3:2") == "truncated:gemma3:2"


def test_every_magic_has_a_remedy():
  assert all(words for words in map(model_files.kind_of, (b"GGUF", b"\n <!DOCTYPE HTML>", b"\x28\xb5\x2f\xfd")))
  assert not model_files.kind_of(b'{"a": 1}') and gguf.GGUF_MAGIC


@pytest.mark.parametrize("length", [0x0280, 0x028020])  # as a pickle begins, also behind white space
def test_a_header_whose_length_looks_like_another_kind_of_file_is_read(tmp_path, length):
  header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
  (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + b"\0\0\x80\x3f")
  assert model_files.open_safetensors(tmp_path / "model.safetensors").get_tensor("a") == [1.0]
