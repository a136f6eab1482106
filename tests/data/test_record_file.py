"""Records on the disk are those that were written, whatever they hold, and in whatever order they are asked for."""

import json
import tempfile

import numpy as np
import pytest

from in2core_jax.data import record_file, records
from in2core_jax.data.ragged import taken
from in2core_jax.data.records import BadRecords, Item, Raws, to_records
from in2core_jax.errors import UserError
from in2core_jax.selection import aggregation

CALL = {
  "role": "assistant",
  "content": "",
  "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {"x": 1e9}}}],
}
TURNS = [
  {"role": "user", "content": "q \u2028 \U0001f642"},
  CALL,
  {"role": "tool", "content": "[1]", "tool_call_id": "c"},
]
VALUES = [
  {"messages": [*TURNS, {"role": "assistant", "content": "a"}], "tools": [{"name": "f"}], "mood": "half \ud83d"},
  {"prompt": "p", "chosen": "good", "rejected": "bad", "topic": "pairs", "id": 7},
  {"prompt": "p", "response": "", "topic": "empty"},
  {"prompt": "p", "response": "r", "topic": "pairs"},
  {"prompt": "p", "response": "r"},
]


def written(values=VALUES, source="d\udcff.jsonl", **more):
  raws = [json.dumps(value, ensure_ascii=False) for value in values]
  items = [Item(value, raw, source, i, {}, **more) for i, (value, raw) in enumerate(zip(values, raws, strict=True), 1)]
  return to_records(items, BadRecords(True)), raws


def test_records_are_what_was_read_and_columns_are_theirs():
  found, raws = written(name="own", origin="own")
  assert [record.raw for record in found] == raws == [*Raws(found)] == [*Raws([*found])]
  assert [record.line for record in found] == [1, 2, 3, 4, 5] and found[1].example_id == "own:7"
  assert found[0].messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1e9} and found[0].unread == ("mood",)
  assert found[1].rejected[-1]["content"] == "bad" and isinstance(found[0].messages, tuple)
  assert found.ids == tuple(record.example_id for record in found) and found.ids[-1] == f"{found[3].example_id}-2"
  for of in (found, [*found]):  # by column, and record by record
    assert [*records.content_keys(of)] == [record.content_key for record in found]
    assert records.prompt_digests(of)[3] == records.prompt_digests(of)[4] != records.prompt_digests(of)[0]
    assert records.topics_of(of) == ("", "pairs", "empty", "pairs", "") and tuple(records.ids_of(of)) == found.ids
    assert records.first_of(of).tolist() == [0, 1, 2, 3, 3] and records.has_response(of)
    assert records.first_pair(of).line == 2 and records.first_plain(of).line == 1
    assert [record.line for record in records.with_unread(of)] == [1]


def test_ids_in_columns_have_the_order_of_their_code_points_and_equal_ones_stay():
  names = ["b", "a", "", "\U0001f642", "\uffff", "\udcff", "b", "a\ue000", "ab", "é", "Z", "a"] * 9
  ids = record_file.Texts.of(names)
  wanted = sorted(range(len(names)), key=names.__getitem__)
  assert aggregation.id_order(ids).tolist() == wanted == aggregation.id_order(np.array(names)).tolist()
  assert aggregation.ids_of(ids, np.array([3, 0])) == aggregation.ids_of(names, [3, 0]) == ["\U0001f642", "b"]


def test_ids_of_hashes_number_copies_within_each_name(monkeypatch):
  monkeypatch.setattr(record_file, "_BLOCK", 4)
  rng, items = np.random.default_rng(0), []
  for i in range(40):
    value = {"prompt": str(rng.integers(5)), "response": "r"}
    items.append(Item(value, json.dumps(value), "d.jsonl", i + 1, {}, name=("", "one", "two")[rng.integers(3)]))
  found = to_records(items, BadRecords(True))
  keys, names, seen = [record.content_key[:16] for record in found], [item.name for item in items], {}
  for name, key, own in zip(names, keys, found.ids, strict=True):
    whole = f"{name}:{key}" if name else key
    seen[whole] = seen.get(whole, 0) + 1
    assert own == whole + (f"-{seen[whole]}" if seen[whole] > 1 else "")
  assert max(seen.values()) > 2 and len(set(found.ids)) == 40
  assert records._unique_ids([None] * 40, found.column("content"), names) == list(found.ids)


def test_some_records_come_in_the_order_asked_for_across_blocks(monkeypatch):
  monkeypatch.setattr(record_file, "_BLOCK", 3)
  monkeypatch.setattr(record_file, "_TOGETHER", 64)
  found, raws = written([{"prompt": f"p{i}", "response": "r" * i, "topic": f"t{i % 4}"} for i in range(20)])
  rows = np.array([19, 0, 7, 7, 3, 12])
  part = taken(taken(found, np.arange(20)[::-1]), 19 - rows)
  assert [*Raws(part)] == [raws[row] for row in rows] and part == [found[int(row)] for row in rows]
  assert part.names("topic") == [f"t{row % 4}" for row in rows] and part.column("line").tolist() == (rows + 1).tolist()
  assert part.ids == tuple(found.ids[int(row)] for row in rows) and part[-1] == found[12] and part[1:3][0] == found[0]
  assert len(taken(found, np.array([], int))) == 0 and not taken(found, np.array([], int)).names("topic")
  with pytest.raises(IndexError):
    part[6]


def test_a_full_disk_is_told_with_its_folder(monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(record_file.os, "write", full)
  with pytest.raises(UserError, match=rf"{tempfile.gettempdir()}: .*No space left.*set TMPDIR"):
    written()

  def none(*_, **__):
    raise FileNotFoundError(2, "No usable temporary directory found")

  monkeypatch.setattr(tempfile, "gettempdir", none)
  monkeypatch.setattr(tempfile, "mkstemp", none)
  with pytest.raises(UserError, match=r"No usable temporary directory.*set TMPDIR"):
    written()


def test_texts_equal_the_same_texts_and_nothing_else():
  found = record_file.Texts.of(["a", "b"])
  assert found == ("a", "b") and found == ["a", "b"] and found != ("a",) and found != ("a", "c") and found != (1, 2)
