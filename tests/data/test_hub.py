"""Data sets and models of the Hub, from the library's own cache layout in a temporary folder; nothing is fetched."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import _tree_cache, constants
from test_weights import CONFIG, make_params
from tiny import make_tokenizer

from in2core_jax.data import hub
from in2core_jax.data.sources import load_records, name_of
from in2core_jax.data.summaries import data_summary, told_lines
from in2core_jax.data.tokenizing import tokenize
from in2core_jax.errors import UserError
from in2core_jax.model import weights

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  hub._snapshot.cache_clear()
  yield tmp_path
  hub._snapshot.cache_clear()


def add(cache, repo, files, kind="dataset", commit=NEW, refs=("main",)):
  """Puts a commit into the cache as the library does: contents among the blobs, links among the snapshots."""
  root = cache / f"{kind}s--{repo.replace('/', '--')}"
  for name, data in files.items():
    blob = root / "blobs" / f"{commit[:4]}{abs(hash(name)):x}"
    link = root / "snapshots" / commit / name
    for path in (blob, link):
      path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    link.symlink_to(os.path.relpath(blob, link.parent))
  for ref in refs:
    (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)


def rows(*prompts, answer="A"):
  return "".join(json.dumps({"prompt": p, "response": answer}) + "\n" for p in prompts).encode()


def parquet(*prompts):
  sink = pa.BufferOutputStream()
  pq.write_table(pa.Table.from_pylist([{"prompt": p, "response": "A"} for p in prompts]), sink)
  return sink.getvalue().to_pybytes()


SHARDS = {
  "README.md": b"# a set",
  "data/train-00000-of-00002.parquet": parquet("1", "2"),
  "data/train-00001-of-00002.parquet": parquet("3"),
  "data/test-00000-of-00001.parquet": parquet("t"),
}
CONFIGS = {
  "main/train-00000-of-00001.parquet": parquet("m"),
  "main/test-00000-of-00001.parquet": parquet("mt"),
  "socratic/train-00000-of-00001.parquet": parquet("s"),
}
FLAT = {"train.jsonl": rows("1"), "test.jsonl": rows("t"), "dataset_infos.json": b"{}"}
SFT = {"data/train_sft-00000-of-00001.parquet": parquet("s"), "data/train_gen-00000-of-00001.parquet": parquet("g")}
CONVERTED = {"default/train/0000.parquet": parquet("1"), "default/train/0001.parquet": parquet("2"),
             "default/test/0000.parquet": parquet("t")}  # fmt: skip


@pytest.mark.parametrize(
  ("files", "words", "prompts"),
  [
    (SHARDS, "/train", "123"),
    (SHARDS, "/test", "t"),
    (CONFIGS, "/main/train", "m"),
    (CONFIGS, "/socratic", "s"),
    (FLAT, "/train", "1"),
    (FLAT, "/train.jsonl", "1"),
    (SFT, "/train_sft", "s"),
    (CONVERTED, "/train", "12"),
    (CONVERTED, "/default/test", "t"),
    ({"valid.csv": b"prompt,response\nv,A\n"}, "/validation", "v"),
    ({"all.jsonl": rows("x")}, "", "x"),
  ],
)
def test_parts_of_a_data_set(cache, files, words, prompts):
  add(cache, "some-org/a.set", files)
  records = load_records(f"hub:some-org/a.set{words}")
  assert "".join(record.messages[0]["content"] for record in records) == prompts
  assert {name_of(record) for record in records} == {f"hub:some-org/a.set{words}"}
  assert all(record.source.startswith(f"hub:some-org/a.set@{NEW}/") for record in records)
  named = load_records(f"chatterbot:food+own=hub:some-org/a.set{words}*1")
  assert named[-1].example_id == f"own:{records[-1].example_id}"


def test_a_revision_is_kept_to(cache):
  add(cache, "org/set", {"d.jsonl": rows("old")}, commit=OLD, refs=("v1", "refs/convert/parquet"))
  add(cache, "org/set", {"d.jsonl": rows("new")}, commit=NEW)
  revisions = {"": "new", "@main": "new", "@v1": "old", "@refs/convert/parquet": "old", f"@{OLD}": "old"}
  for revision, prompt in revisions.items():
    (record,) = load_records(f"hub:org/set{revision}")
    assert record.messages[0]["content"] == prompt and name_of(record) == "hub:org/set"
  summary = data_summary({"train": tokenize([record], make_tokenizer(2000), 64)})
  assert summary["hub"] == [f"hub:org/set@{OLD}"] and any(OLD in line for line in told_lines(summary))


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("hub:org/shards", r"several sets of files: data/test, data/train; name one: hub:org/shards/data/test"),
    ("hub:org/configs/train", "several sets of files: main/train, socratic/train"),
    ("hub:org/sft/train", "several sets of files: data/train_gen, data/train_sft"),
    ("hub:org/shards/dev", "has no files of dev; it has data/test, data/train"),
    ("hub:org/script", "has no data files; no code of a data set is run"),
    ("hub:org/part", "hub:org/part: 1 of 2 files is in the Hub's cache; HF_HUB_OFFLINE=0"),
    ("hub:org/nothing", r"hub:org/nothing is not in the Hub's cache \(.*\); HF_HUB_OFFLINE=0"),
    ("hub:org/shards@v9", "is not in the Hub's cache"),
    ("hub:one", "is no name on the Hub; write hub:ORG/NAME"),
    ("hub:", "unknown data source 'hub:'"),
    ("hf:org/shards", "a data set of the Hub is hub:org/shards"),
    ("org/shards", "a data set of the Hub is hub:org/shards"),
    ("jsonl:org/shards", "write hub:org/shards"),
    ("hub:or..g/set", "is no name on the Hub"),
  ],
)
def test_what_is_not_there_is_told_in_one_line(cache, spec, message):
  add(cache, "org/shards", SHARDS)
  add(cache, "org/configs", CONFIGS)
  add(cache, "org/sft", SFT)
  add(cache, "org/script", {"set.py": b"", "README.md": b""})
  add(cache, "org/part", dict(list(SHARDS.items())[:2]))
  with pytest.raises(UserError, match=message) as caught:
    load_records(spec)
  assert "\n" not in str(caught.value)


def test_a_commit_that_is_cached_in_part_is_refused(cache):
  add(cache, "org/set", {"a.jsonl": rows("x")})
  entry = {"size": 1, "blob_id": "x", "lfs_sha256": None, "lfs_size": None, "xet_hash": None}
  entries = {name: _tree_cache.TreeCacheEntry(**entry) for name in ("a.jsonl", "b.jsonl")}
  _tree_cache.write_tree_cache(str(cache / "datasets--org--set"), NEW, entries)  # as the library lists a commit
  with pytest.raises(UserError, match="in the Hub's cache only in part"):
    load_records("hub:org/set")


def test_a_model_of_the_hub_is_its_folder(cache, tmp_path):
  folder = tmp_path / "own"
  make_tokenizer(2000).save_pretrained(folder)
  weights.save_hf_dir(folder, CONFIG, make_params(CONFIG))
  files = {path.name: path.read_bytes() for path in folder.iterdir()}
  add(cache, "org/model", files, kind="model")
  add(cache, "org/gguf", {"a.gguf": b"GGUF"}, kind="model")
  config, params, _, digest = weights.load_model("hub:org/model")
  expected = weights.load_model(f"hf:{folder}")
  assert (config, digest) == (expected[0], expected[3])
  assert weights.load_model("truncated:hub:org/model:1")[0].num_layers == 1
  assert weights.describe_model(f"hub:org/model@{NEW}")[0] == config and params.keys() == expected[1].keys()
  for spec, message in (
    ("hub:org/other", "--model=hub:org/other is not in the Hub's cache"),
    ("hub:org/model/x", "write hub:ORG/NAME or hub:ORG/NAME@REVISION"),
    ("hub:org/gguf", "has no config.json; for GGUF files"),
    ("hf:org/model", "or give hub:org/model"),
  ):
    with pytest.raises(UserError, match=message):
      weights.load_model(spec)
