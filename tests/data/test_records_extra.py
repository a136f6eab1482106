"""Whatever JSON stands under the keys of a record, it is read or refused in one line: never another error."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from in2core_jax.data.file_kinds import check_data_file
from in2core_jax.data.records import BadRecords, Item, to_records

RECORD_KEYS = (
  *("messages", "conversations", "instruction", "input", "output", "prompt", "response", "completion", "history"),
  *("system", "system_prompt", "tools", "functions", "id", "topic", "weight", "label", "images", "chosen", "mask"),
  *("reasoning_content", "mood", "question", "answer", "context", "inputs", "targets", "text", "data", "conversation"),
)
TURN_KEYS = (
  *("role", "content", "from", "value", "tool_calls", "function_call", "reasoning", "thinking", "weight", "train"),
  *("name", "tool_call_id", "mask", "tools", "images", "mood", "type", "text", "function", "arguments", "user"),
)
SCALARS = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-1, 2),
  st.sampled_from([0.0, 0.5, 1.0, float("inf")]),
  st.sampled_from(["", " ", "x", "\ud800", "\x1b"]),
)
WORDS = st.sampled_from(
  [
    "user",
    "gpt",
    "tool",
    "system",
    "function_call",
    "text",
    "thinking",
    "[]",
    "### Human: x### Assistant: y",
    '{"name": "f"}',
  ]
)


def _objects(values):
  return st.dictionaries(st.sampled_from(TURN_KEYS), values, max_size=4)


VALUES = st.recursive(SCALARS | WORDS, lambda part: st.lists(part, max_size=3) | _objects(part), max_leaves=5)
TURNS = st.lists(
  st.fixed_dictionaries({"role": WORDS, "content": VALUES}, optional=dict.fromkeys(TURN_KEYS[2:], VALUES)), max_size=3
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(RECORD_KEYS), VALUES | TURNS, max_size=5))
def test_any_record_is_read_or_refused(value):
  bad = BadRecords(skip=True)
  records = to_records([Item(value, json.dumps(value), "d.jsonl", 1)], bad)
  assert len(records) + len(bad) == 1
  for record in records:
    assert len(record.content_key) == len(record.prompt_key) == 64
    for message in record.messages:
      assert message["role"] in ("system", "user", "assistant", "tool") and isinstance(message["content"], str)
      assert all(item not in ("", [], None) for key, item in message.items() if key != "content")


def test_a_call_of_a_list_is_refused():
  call = {"role": "assistant", "content": "x", "tool_calls": [{"function": [1], "name": "f"}]}
  bad = BadRecords(skip=True)
  assert not to_records([Item({"messages": [{"role": "user", "content": "q"}, call]}, "", "d.jsonl", 1)], bad)
  assert "must be an object but is a list" in bad.kept[0]["reason"]


def test_a_quoted_table_is_recognised_and_lone_texts_are_not_one(tmp_path):
  path = tmp_path / "d.jsonl"
  path.write_text('"prompt","response"\n"a","b"\n')
  assert check_data_file(path).kind == "csv"
  path.write_text('"text"\n')
  assert check_data_file(path).kind == "json"  # refused as a record that is no object
