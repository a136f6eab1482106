"""The shapes that people write records in: one record of each, as its data set has it -> messages."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from in2core_jax.data.records import BadRecords, Item, to_records
from in2core_jax.data.sources import load_records
from in2core_jax.errors import UserError

S, U, A, T = "system", "user", "assistant", "tool"


def read(value):
  bad = BadRecords()
  records = to_records([Item(value, json.dumps(value), "d.jsonl", 1)], bad)
  bad.raise_if_any()
  return records[0]


def said(record):
  return [(m["role"], m["content"]) for m in record.messages]


def turn(role, content, **more):
  return {"role": role, "content": content, **more}


QA = [(U, "Q"), (A, "R")]
# name -> record, what it says, its topic
SHAPES = {
  "chat": ({"messages": [turn(S, "s"), turn(U, "Q"), turn(A, "R")]}, [(S, "s"), *QA], ""),
  "sharegpt": (
    {"id": "x_0", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "R"}]},
    QA,
    "",
  ),
  "alpaca": (
    {"instruction": "Q", "input": "i", "output": "R", "text": "Below ### Q\n\ni ### R"},
    [(U, "Q\n\ni"), QA[1]],
    "",
  ),
  "dolly": (
    {"instruction": "Q", "context": "c", "response": "R", "category": "closed_qa"},
    [(U, "Q\n\nc"), QA[1]],
    "closed_qa",
  ),
  "dolly without context": ({"instruction": "Q", "context": "", "response": "R", "category": "open_qa"}, QA, "open_qa"),
  "gsm8k": (
    {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    [(U, "2 + 2?"), (A, "2 + 2 = <<2+2=4>>4\n#### 4")],
    "",
  ),
  "flan": (
    {
      "inputs": "Q",
      "targets": "R",
      "_template_idx": 3,
      "_task_source": "P3",
      "_task_name": "t",
      "_template_type": "fs",
    },
    QA,
    "",
  ),
  "openorca": ({"id": "niv.1", "system_prompt": "s", "question": "Q", "response": "R"}, [(S, "s"), *QA], ""),
  "openorca without system": ({"id": "niv.1", "system_prompt": "", "question": "Q", "response": "R"}, QA, ""),
  "aya": (
    {
      "inputs": "Q",
      "targets": "R",
      "language": "Sinhala",
      "language_code": "sin",
      "annotation_type": "original-annotations",
      "user_id": "f0",
    },
    QA,
    "",
  ),
  "lima": (
    {"conversations": ["Q", "R", "Q2", "R2"], "source": "multi_turn"},
    [*QA, (U, "Q2"), (A, "R2")],
    "multi_turn",
  ),
  "ultrachat": ({"id": "0", "data": ["Q", "R"]}, QA, ""),
  "guanaco": ({"text": "### Human: Q### Assistant: R"}, QA, ""),
  "guanaco, long": (
    {"text": "### Human: Q\n### Assistant: R\nr\n### Human: Q2\n### Assistant: R2"},
    [(U, "Q"), (A, "R\nr"), (U, "Q2"), (A, "R2")],
    "",
  ),
  "metamath": ({"query": "Q", "response": "R", "type": "MATH_AnsAug"}, QA, ""),
  "numina": ({"source": "aops", "problem": "Q", "solution": "R"}, QA, "aops"),
  "input and output": ({"input": "Q", "output": "R"}, QA, ""),
  "lmsys": (
    {
      "conversation_id": "a",
      "model": "m",
      "conversation": [turn(U, "Q"), turn(A, "R")],
      "turn": 1,
      "language": "English",
    },
    QA,
    "",
  ),
  "capybara": (
    {"source": "c", "conversation": [{"input": "Q", "output": "R"}, {"input": "Q2", "output": "R2"}]},
    [*QA, (U, "Q2"), (A, "R2")],
    "c",
  ),
  "moss": ({"conversation": [{"human": "Q", "assistant": "R"}], "category": "b"}, QA, "b"),
  "trl": ({"prompt": "Q", "completion": "R"}, QA, ""),
  "trl, conversational": ({"prompt": [turn(S, "s"), turn(U, "Q")], "completion": [turn(A, "R")]}, [(S, "s"), *QA], ""),
  "trl, a text as completion": ({"prompt": [turn(U, "Q")], "completion": "R"}, QA, ""),
  "text parts": (
    {"messages": [turn(U, [{"type": "text", "text": "Q"}]), turn(A, [{"type": "text", "text": "R"}])]},
    QA,
    "",
  ),
  "turns in a text": ({"messages": json.dumps([turn(U, "Q"), turn(A, "R")])}, QA, ""),
  "columns of turns": ({"messages": {"role": [U, A], "content": ["Q", "R"]}}, QA, ""),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_record_of_each_shape(name):
  value, expected, topic = SHAPES[name]
  record = read(value)
  assert (said(record), record.topic, record.unread) == (expected, topic, ())
  assert record.has_response and record.raw == json.dumps(value)
  # The order of the keys says nothing.
  assert read(dict(reversed(value.items()))).content_key == record.content_key


def test_a_prompt_of_turns_is_context():
  record = read({"prompt": [turn(U, "Q"), turn(A, "R"), turn(U, "Q2")], "completion": [turn(A, "R2")]})
  assert [m.get("train") for m in record.messages] == [None, False, None, None]


def test_tools_and_results_stand_in_completions_too():
  call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
  value = {
    "prompt": [turn(U, "Q")],
    "completion": [turn(A, "", tool_calls=[call]), turn(T, "7", name="f"), turn(A, "R")],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
  }
  record = read(value)
  assert record.messages[1]["tool_calls"] == [call] and record.messages[2]["name"] == "f" and len(record.tools) == 1


@pytest.mark.parametrize(
  ("names", "role"),
  [
    (("user", "USER", "human", "Human:", "prompter", "customer", "usr", "question"), U),
    (("assistant", "gpt", "GPT-4", "model", "bot", "AI Assistant", "ChatGPT", "agent", "bing", "answer"), A),
    (("system", "developer", "System", "system-prompt"), S),
    (("tool", "function", "observation", "Tool Response", "environment", "ipython"), T),
  ],
)
def test_spellings_of_roles(names, role):
  for name in names:
    for role_key, text_key in (("role", "content"), ("from", "value"), ("role", "text"), ("speaker", "text")):
      value = {"conversations": [{role_key: name, text_key: "x"}, turn(U, "Q"), turn(A, "R")]}
      assert said(read(value))[0] == (role, "x")


# What fits several shapes is of the first.
BOTH = [
  ({"messages": [turn(U, "Q"), turn(A, "R")], "prompt": "P", "completion": "C"}, QA, {"prompt", "completion"}),
  ({"instruction": "Q", "output": "R", "response": "other"}, QA, {"response"}),
  ({"prompt": "Q", "response": "R", "question": "q", "answer": "a"}, QA, {"question", "answer"}),
  ({"question": "Q", "response": "R", "answer": "a"}, QA, {"answer"}),
  ({"problem": "Q", "solution": "R", "answer": "4"}, QA, {"answer"}),
  ({"prompt": "Q", "response": None, "question": "q", "answer": "a"}, [(U, "Q")], {"question", "answer"}),
  ({"prompt": "", "response": "R", "question": "q", "answer": "a"}, [(U, ""), (A, "R")], {"question", "answer"}),
  ({"instruction": "", "input": "Q", "output": ""}, [(U, "\n\nQ")], set()),
  ({"prompt": None, "response": None, "question": "Q", "answer": "R"}, QA, set()),
  ({"instruction": "", "output": "", "question": "Q", "answer": "R"}, QA, set()),
  ({"question": "Q", "answer": "R", "context": "c", "choices": ["a", "b"]}, QA, {"context", "choices"}),
  ({"prompt": "Q", "completion": "R", "text": "another text"}, QA, {"text"}),
]


@pytest.mark.parametrize(("value", "expected", "unread"), BOTH)
def test_a_record_of_two_shapes_is_of_the_first_and_the_rest_is_told(value, expected, unread):
  for keys in (value, dict(reversed(value.items()))):
    record = read(keys)
    assert said(record) == expected and set(record.unread) == unread


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ({"text": "a document"}, "unknown record shape: its columns are text; known shapes: messages"),
    ({"text": "### Assistant: R"}, "unknown record shape"),
    ({"text": "A chat. ### Human: Q### Assistant: R"}, "before its first speaker"),
    ({"question": "Q", "answer": 4}, "'answer' must be a string but is a number"),
    ({"question": "Q", "answer": True}, "'answer' must be a string but is a boolean"),
    ({"prompt": ["Q"], "completion": "R"}, "'prompt' must be a string but is a list"),
    ({"prompt": [{"role": "narrator", "content": "x"}], "completion": "R"}, "has role='narrator'; known: system"),
    ({"conversations": ["Q", {"from": "gpt", "value": "R"}]}, "turn 0 of 'conversations' must be an object"),
    ({"messages": "[{"}, "'messages' is a text, but not a list in JSON"),
    ({"messages": "hello"}, "'messages' must be a list of turns but is a string"),
  ],
)
def test_what_is_of_no_shape_is_refused(value, message):
  with pytest.raises(UserError, match=message):
    read(value)


@settings(max_examples=200, deadline=None)
@given(
  st.lists(st.text(alphabet="ab#: \n", min_size=1, max_size=8).map(str.strip).filter(bool), min_size=2, max_size=6)
)
def test_turns_written_out_are_read_back(texts):
  texts = [text.replace("#", "") or "x" for text in texts]
  text = "".join(f"### {('Human', 'Assistant')[i % 2]}: {one}" for i, one in enumerate(texts))
  last = len(texts) // 2 * 2
  expected = [((U, A)[i % 2], one.strip()) for i, one in enumerate(texts[:last])]
  if all(one for _, one in expected):
    assert said(read({"text": text})) == expected


# --- messages that name their parents


def message(name, parent, role, text, **more):
  about = {"message_tree_id": "t", "tree_state": "ready_for_export", "lang": "en", "deleted": False, "review_count": 3}
  return {"message_id": name, "parent_id": parent, "role": role, "text": text} | about | more


FLAT = [
  message("1", None, "prompter", "Q", rank=None, emojis={"name": ["+1"], "count": [2]}, review_result=True),
  message("2", "1", "assistant", "R", rank=0),
  message("3", "1", "assistant", "other", rank=1),
  message("4", "2", "prompter", "Q2"),
  message("5", "4", "assistant", "R2", synthetic=False),
  message("6", "2", "prompter", "unanswered"),
  message("7", "3", "prompter", "unanswered too"),
]
THREADS = {"5": [*QA, (U, "Q2"), (A, "R2")], "3": [(U, "Q"), (A, "other")]}


def nested(rows, name):
  (own,) = [{key: row[key] for key in row if key != "parent_id"} for row in rows if row["message_id"] == name]
  return own | {"replies": [nested(rows, row["message_id"]) for row in rows if row["parent_id"] == name]}


def loaded(path, rows, **more):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return load_records(f"jsonl:{path}", **more)


def test_threads_of_messages(tmp_path):
  for rows in (FLAT, FLAT[::-1]):
    records = loaded(tmp_path / "d.jsonl", rows)
    assert {record.example_id: said(record) for record in records} == THREADS
    assert all(not record.unread for record in records)
  # A coreset of them can be read again.
  again = loaded(tmp_path / "e.jsonl", [json.loads(record.raw) for record in records])
  assert [(r.example_id, r.content_key) for r in again] == [(r.example_id, r.content_key) for r in records]
  tree = {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": nested(FLAT, "1")}
  whole = loaded(tmp_path / "d.jsonl", [tree])
  assert {record.example_id: said(record) for record in whole} == THREADS


@pytest.mark.parametrize(
  ("changed", "left"),
  [
    ({0: {"tree_state": "prompt_lottery_waiting"}}, set()),
    ({1: {"deleted": True}}, {"3"}),
    ({4: {"review_result": False}}, {"2", "3"}),
    ({2: {"review_result": False}}, {"5"}),
  ],
)
def test_only_ready_threads_are_read(tmp_path, changed, left):
  rows = [row | changed.get(i, {}) for i, row in enumerate(FLAT)] + [message("a", None, "prompter", "Z")]
  rows.append(message("b", "a", "assistant", "Y"))
  assert {record.example_id for record in loaded(tmp_path / "d.jsonl", rows)} == left | {"b"}


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    (message("8", "gone", "assistant", "x"), "its parent 'gone' is not in the file"),
    (message("1", None, "prompter", "x"), "the message '1' stands twice"),
    (message("8", "8", "assistant", "x"), "its parent '8' is not in the file, or is left out"),
    (message("8", "2", "narrator", "x"), None),
    ({"message_id": "8"}, "a message of a tree needs"),
    (message("8", ["1"], "assistant", "x"), "'parent_id' must be a string or null"),
    (message("8", "5", "assistant", None), "a message of a tree needs"),
  ],
)
def test_messages_without_a_place_are_bad_records(tmp_path, row, reason):
  bad = BadRecords(skip=True)
  records = loaded(tmp_path / "d.jsonl", [*FLAT, row], bad=bad)
  assert {record.example_id for record in records} == set(THREADS)
  assert [(entry["place"].endswith(":8"), reason in entry["reason"]) for entry in bad.kept] == (
    [(True, True)] if reason else []
  )


def test_keys_of_messages_in_trees_are_told_or_refused(tmp_path):
  records = loaded(tmp_path / "d.jsonl", [FLAT[0] | {"mood": "sad"}, *FLAT[1:]])
  assert records[0].unread == ("messages[].mood",)
  with pytest.raises(UserError, match=r"d.jsonl:5: .*'image'.*images, audio and video"):
    loaded(tmp_path / "d.jsonl", [*FLAT[:4], FLAT[4] | {"image": "x.png"}, *FLAT[5:]])
