"""What a select run writes for other tools: tables of records, the mixture, conversations, lines for trainers."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from in2core_jax.data import record_tables
from in2core_jax.data.record_shapes import read_record
from in2core_jax.data.records import Item, Record, content_key, to_records
from in2core_jax.data.sources import load_records
from in2core_jax.data.tokenizing import TokenizedDataset
from in2core_jax.errors import UserError
from in2core_jax.pipeline import select_outputs, train_elsewhere
from in2core_jax.pipeline.settings import SelectSettings, Settings
from in2core_jax.report import train_with
from in2core_jax.runs.run_folder import RunDir

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
RAWS = [
  {"messages": TURNS, "id": "x", "influence": "mine", "n": 1, "mixed": 1, "empty": {}},
  {"messages": TURNS * 2, "n": 2.5, "mixed": "one", "meta": {"a": 1}, "big": 2**70},
  {"messages": [{"role": "user", "content": "\ud800"}, TURNS[1]], "meta": {"b": ["c"]}, "mixed": [None]},
]


def make_part(raws: list[dict], origins=()) -> TokenizedDataset:
  """Records with tokens 0, 1, 2, ... of which the last two are the response."""
  items = [Item(raw, json.dumps(raw), "made.jsonl", i + 1) for i, raw in enumerate(raws)]
  bad = type("Bad", (), {"read": 0, "refuse": None})()
  records = [
    Record(**{**vars(record), "origin": origin})
    for record, origin in zip(to_records(items, bad), origins or [""] * len(items), strict=True)
  ]
  tokens = tuple(np.arange(4 + i, dtype=np.int32) for i in range(len(records)))
  masks = tuple(np.arange(len(ids)) >= len(ids) - 2 for ids in tokens)
  return TokenizedDataset("train", tuple(records), tokens, masks, np.arange(len(records)) == 1)


def score_columns(size: int, selected) -> dict[str, np.ndarray]:
  chosen = np.isin(np.arange(size), selected)
  ids = np.array([f"e{i}" for i in range(size)], dtype=object)
  return {
    "example_id": ids,
    "influence": np.linspace(1, -1, size, dtype=np.float32),
    "selected": chosen,
    "topic": np.array(["", "t", "t"][:size], dtype=object),
    "reason": np.where(chosen, "best", "").astype(object),
  }


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_columns_have_what_their_values_share_and_are_json_texts_otherwise(monkeypatch):
  lines = [json.dumps(raw) for raw in RAWS]
  whole = record_tables.Table.of(lines)
  assert whole.columns.as_text == {"mixed", "empty", "big"}
  kinds = {field.name: field.type for field in whole.schema}
  assert kinds["n"] == pa.float64() and kinds["mixed"] == pa.string()
  assert {field.name for field in kinds["meta"]} == {"a", "b"}
  (batch,) = whole.batches()
  rows = batch.to_pylist()
  assert [row["mixed"] for row in rows] == ["1", '"one"', "[null]"] and rows[1]["big"] == str(2**70)
  assert rows[2]["messages"][0]["content"] == "\ufffd" and rows[0]["messages"] == TURNS and rows[0]["big"] is None
  monkeypatch.setattr(record_tables, "BLOCK", 1)  # the same table, whatever the blocks
  small = record_tables.Table.of(lines)
  assert small.schema == whole.schema
  assert pa.Table.from_batches(small.batches()).to_pylist() == rows


def test_a_column_of_ours_goes_before_one_of_the_records():
  table = record_tables.Table.of(['{"rank": 7, "record_rank": 8}'], {"rank": np.array([1])})
  (batch,) = table.batches()
  assert batch.to_pylist() == [{"rank": 1, "record_record_rank": 7, "record_rank": 8}] or batch.to_pylist() == [
    {"rank": 1, "record_rank": 8, "record_record_rank": 7}
  ]


def test_forms_hold_what_was_selected_and_are_written_once(tmp_path):
  train, columns = make_part(RAWS), score_columns(3, [0, 2])
  run_dir = RunDir.open(tmp_path / "run", {"stage": "select"})
  s = Settings(coreset_format="tokens,parquet,hf", write="pool")
  select_outputs.write_forms(run_dir, train, columns, s)
  folder = tmp_path / "run"
  for name in ("coreset.parquet", "coreset_hf"):  # as our own reader sees them, they are the records
    again = load_records(f"file:{folder / name}")
    assert [record.messages for record in again] == [train.records[row].messages for row in (0, 2)]
  pool = pq.read_table(folder / "pool_scored.parquet")
  assert pool.column_names[:3] == ["example_id", "source", "influence"]
  best = pool.sort_by([("influence", "descending")]).slice(0, 1).to_pylist()[0]
  found = [best[name] for name in ("example_id", "selected", "reason", "record_influence")]
  assert found == ["e0", True, "best", "mine"]
  assert pool["topic_quota"].to_pylist() == [1, 1, 1] and pool["source_quota"].to_pylist() == [2, 2, 2]
  with pa.OSFile(str(folder / "coreset_tokens" / "data-00000-of-00001.arrow")) as file:
    rows = pa.ipc.open_stream(file).read_all().to_pylist()
  assert rows[1] == {"input_ids": [0, 1, 2, 3, 4, 5], "labels": [-100] * 4 + [4, 5], "attention_mask": [1] * 6}
  before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "manifest.json"}
  select_outputs.write_forms(run_dir, train, columns, s)
  assert {path: path.stat().st_mtime_ns for path in before} == before
  assert run_dir.is_whole("pool_scored.parquet")


def test_what_is_written_besides_is_no_part_of_the_identity():
  plain, more = (Settings(**changes).identity("select") for changes in ({}, {"write": "pool"}))
  assert plain == more and "coreset_format" not in plain
  assert SelectSettings(coreset_format="hf").coreset_format == "jsonl,hf"
  with pytest.raises(UserError, match="coreset_format=csv: unknown 'csv'; use some of jsonl, parquet, hf, tokens"):
    SelectSettings(coreset_format="csv")


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_the_mixture_is_counts_shares_and_weights():
  names, selected = ["a", "a", "b", "a", "b", "c"], np.array([1, 0, 1, 0, 1, 0], bool)
  rows = select_outputs.mixture(names, selected, np.array([1, 2, 3, 4, 5, 6]))
  assert [row["source"] for row in rows] == ["a", "b", "c"]
  assert [row["examples"] for row in rows] == [1, 2, 0] and [row["pool_examples"] for row in rows] == [3, 2, 1]
  assert [row["share"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 0])
  assert [row["token_share"] for row in rows] == pytest.approx([1 / 9, 8 / 9, 0])
  assert [row["weight"] for row in rows] == pytest.approx([2 / 3, 2, 0])
  pool_shares = np.array([3, 2, 1]) / 6
  np.testing.assert_allclose([row["weight"] for row in rows] * pool_shares, [row["share"] for row in rows])


def test_every_source_has_a_file_of_its_own(tmp_path):
  train = make_part([{"messages": TURNS, "id": f"{i}"} for i in range(4)], ["x/data.jsonl", "y/data.jsonl"] * 2)
  run_dir = RunDir.open(tmp_path / "run", {"stage": "select"})
  select_outputs.write_sources(run_dir, train, np.array([True, True, True, False]))
  rows = json.loads((tmp_path / "run" / "mixture.json").read_text())["sources"]
  assert [row["file"] for row in rows] == ["coreset/x-data.jsonl", "coreset/y-data.jsonl"]
  lines = [(tmp_path / "run" / row["file"]).read_text().splitlines() for row in rows]
  assert lines == [[train.records[0].raw, train.records[2].raw], [train.records[1].raw]]
  names = select_outputs.file_names(["hub:a/b", "Hub:a/b", "../..", "talk"])
  assert len({name.casefold() for name in names.values()}) == 4
  assert all(name.count("/") == 1 and ".." not in name.removesuffix(".jsonl") for name in names.values())


# ---- for trainers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("raw", "system", "same"),
  [
    ({"messages": TURNS, "id": "1"}, "", True),
    ({"messages": TURNS}, "Be brief.", False),
    ({"messages": [{"role": "system", "content": "Own."}, *TURNS]}, "Be brief.", True),
    ({"messages": [{"role": "human", "content": "a"}, TURNS[1]]}, "", False),
    ({"messages": [*TURNS, {"role": "user", "content": "and?"}]}, "", False),  # which we do not render
    ({"instruction": "a", "input": "b", "output": "c"}, "", False),
    ({"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f"}}]}, "", True),
  ],
)
def test_conversations_are_written_where_the_records_say_something_else(raw, system, same, tmp_path):
  part = make_part([raw])
  run_dir = RunDir.open(tmp_path / "run", {"stage": "select"})
  name = train_elsewhere.write_chat(run_dir, part, system or "default")
  assert name == ("coreset.jsonl" if same else "coreset_chat.jsonl")
  value = json.loads(record_tables.chat_line(part.records[0], system))
  again = read_record(value, {})
  wanted = part.records[0].messages
  if system and wanted[0]["role"] != "system":
    wanted = ({"role": "system", "content": system}, *wanted)
  assert content_key(again.messages, again.tools) == content_key(wanted, part.records[0].tools)


RECIPE = {"batch_size": 4, "learning_rate": 1e-5, "warmup_ratio": 0.1, "weight_decay": 0.0, "max_grad_norm": 1.0}
TRAINING = train_with.Training(
  *("/models/a", "", "coreset_chat.jsonl", 100, 3, 2048, "Be | brief.", None, "mean", 2.0, 500),
  recipe=RECIPE | {"seed": 7},
  sources=2,
)


@pytest.mark.parametrize("rank", [0, 8])
def test_the_lines_for_trainers_parse_and_say_what_the_run_says(rank):
  page = train_with.page(train_with.Training(**{**vars(TRAINING), "lora_rank": rank}))
  blocks = [block.partition("\n") for block in page.split("```")[1::2]]
  for kind, _, text in blocks:
    if kind == "python":
      compile(text, "train_with.md", "exec")
    elif kind == "json":
      assert json.loads(text)["coreset"]["file_name"] == "coreset_chat.jsonl"
  axolotl, chat, factory, tune = (yaml.safe_load(text) for kind, _, text in blocks if kind == "yaml")
  theirs = ("base_model", "sequence_len", "num_epochs", "micro_batch_size", "learning_rate", "warmup_steps")
  assert [axolotl[key] for key in theirs] == ["/models/a", 2048, 2, 4, 1e-5, 5]
  theirs = ("model_name_or_path", "cutoff_len", "num_train_epochs", "per_device_train_batch_size", *theirs[4:])
  assert [factory[key] for key in theirs] == ["/models/a", 2048, 2, 4, 1e-5, 5]
  assert (axolotl.get("lora_r"), factory.get("lora_rank")) == ((8, 8) if rank else (None, None))
  assert chat["datasets"][0]["path"] == tune["dataset"]["data_files"] == "coreset_chat.jsonl"
  assert (tune["tokenizer"]["max_seq_len"], tune["optimizer"]["lr"], tune["epochs"]) == (2048, 1e-5, 2)
  assert "learning_rate=0.00001" in page and ("LoraConfig" in page) == bool(rank) and "interleave_datasets" in page
  assert r"that has none: Be \| brief." in page
