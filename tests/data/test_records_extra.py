"""Whatever JSON stands under the keys of a record, it is read or refused in one line: never another error."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from in2core_jax.data.file_kinds import check_data_file
from in2core_jax.data.key_names import meant
from in2core_jax.data.records import BadRecords, Item, to_records
from in2core_jax.data.sources import load_records
from in2core_jax.errors import UserError

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


# ---- records in the manner of public data sets and APIs --------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
PAIR = {"prompt": "Q", "response": "A"}


def _chat(*turns, **more):
  return {"messages": [*turns], **more}


def _read(value):
  bad = BadRecords(skip=True)
  records = to_records([Item(value, json.dumps(value), "d.jsonl", 1)], bad)
  return records[0] if records else bad.kept[0]["reason"]


@pytest.mark.parametrize(
  ("value", "unread"),
  [
    *((PAIR | {"reasoning": switch}, ("reasoning",)) for switch in ("on", "off", "Low", True, False)),
    (_chat(USER, ANSWER | {"thinking": True}), ("messages[].thinking",)),
    (_chat(USER, ANSWER | {"metadata": "get_weather"}), ("messages[].metadata",)),  # ChatGLM's tool
    *((PAIR | {"metadata": {key: [["q", "a"]]}}, ("metadata",)) for key in ("chat_history", "available_tools", "cot")),
    (PAIR | {"meta": '{"system_prompt": "Be brief."}'}, ("meta",)),
    (PAIR | {"metadata": '{"url": "u"}', "split": "train", "problem_type": "algebra", "views": 3}, ()),
    *((_chat(USER, ANSWER | {"tool_calls": nothing}), ()) for nothing in ("[]", "null", [], [{"function": None}])),
  ],
)
def test_switches_and_what_stands_beside_make_no_other_answer(value, unread):
  found = _read(value)
  assert found.messages == (USER, ANSWER) and found.unread == unread


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (_chat(USER, ANSWER | {"content": "<think>T</think>A", "reasoning": "T"}), "has reasoning in its text, <think>"),
    (
      _chat(USER, ANSWER | {"content": [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "T"}]}),
      "part 1 of 'content' is reasoning behind a text",
    ),
    (_chat(USER, ANSWER | {"function_calls": "f(x=1)"}), "'function_calls' in a turn of assistant cannot be rendered"),
    (_chat(USER, ANSWER | {"thinking": 3}), "'thinking' must be a string but is a number"),
    ({"input_ids": [1, 2], "labels": [-100, 2]}, "'input_ids' holds token ids of another program"),
    ({"contents": [{"role": "user", "parts": [{"text": "Q"}]}]}, "'contents' holds turns of Gemini's API"),
    ({"dialog": [USER, ANSWER]}, "data_fields=messages=dialog"),
    ({"text": "USER: Q ASSISTANT: A", "id": 3}, "'text' alone does not say what in it is the response"),
    ({"system": "s", "chat": "USER: Q"}, "name the columns"),
  ],
)
def test_what_could_be_read_wrongly_is_refused_with_what_would_help(value, message):
  assert message in _read(value)


def test_reasoning_has_its_tags_once():
  for text in ("T", "<think>T</think>", "<think>\nT\n</think>\n"):
    for value in (_chat(USER, ANSWER | {"reasoning_content": text}), PAIR | {"reasoning": text}):
      assert _read(value).messages[1]["reasoning_content"] == "T"
  several = "<think>a</think> and <think>b</think>"
  assert _read(PAIR | {"thinking": several}).messages[1]["reasoning_content"] == several


@pytest.mark.parametrize(
  ("content", "text"),
  [
    (7, "7"),
    (True, "true"),
    ({"type": "temp", "text": "7"}, '{"type": "temp", "text": "7"}'),
    ({"text": "7"}, '{"text": "7"}'),
    ([{"type": "row", "x": 1}], '[{"type": "row", "x": 1}]'),
    ([{"type": "text", "text": "7"}], "7"),
    ({"type": "text", "text": "7"}, "7"),
    (["7"], "7"),
  ],
)
def test_the_result_of_a_tool_is_any_json(content, text):
  calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
  assert _read(_chat(USER, calls, {"role": "tool", "content": content}, ANSWER)).messages[2]["content"] == text


def test_a_system_prompt_in_the_first_round_is_one():
  rounds = [{"system": "S", "input": "Q", "output": "A"}, {"input": "Q", "output": "A", "system": ""}]
  roles = [message["role"] for message in _read({"conversation": rounds}).messages]
  assert roles == ["system", "user", "assistant", "user", "assistant"]


MARKED = st.builds(lambda i: f"zq{i}zq{'x' * 600}", st.integers(0, 10**6))
KEPT = st.recursive(MARKED, lambda part: st.lists(part, max_size=2) | _objects(part), max_leaves=4)


@settings(max_examples=150, deadline=None)
@given(
  st.dictionaries(st.sampled_from(RECORD_KEYS), KEPT, max_size=4),
  st.lists(st.dictionaries(st.sampled_from(TURN_KEYS[4:]), KEPT, max_size=2), min_size=2, max_size=2),
)
def test_every_long_text_of_a_record_is_rendered_or_its_key_is_told(more, turns):
  value = {**more, "messages": [base | turn for base, turn in zip((USER, ANSWER), turns, strict=True)]}
  found = _read(value)
  if isinstance(found, str):
    return
  rendered = json.dumps([found.messages, found.tools, found.topic, found.example_id])
  told = {meant(part.removesuffix("[]")) for key in found.unread for part in key.split(" ")[0].split(".")}
  for key, item in [*more.items(), *(pair for turn in turns for pair in turn.items())]:
    for mark in re.findall(r"zq\d+zq", json.dumps(item)) if key != "messages" else ():
      assert mark in rendered or meant(key) in told, key


def test_a_line_of_zeros_is_one_bad_record(tmp_path):
  path = tmp_path / "d.jsonl"
  path.write_bytes(b'{"prompt": "Q", "response": "A"}\n' + bytes(64) + b'\n{"prompt": "R", "response": "A"}\n')
  with pytest.raises(UserError, match=r"d.jsonl:2: broken JSON .*1 of 3 records; --skip_bad_records"):
    load_records(f"jsonl:{path}")
  assert [record.line for record in load_records(f"jsonl:{path}", bad=BadRecords(skip=True))] == [1, 3]
