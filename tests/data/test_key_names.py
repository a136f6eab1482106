"""Keys in other words or case, media and what stands for them, ids of calls: read, told or refused."""

import time

import numpy as np
import pytest
from tiny import make_tokenizer

from in2core_jax.data.record_shapes import read_record
from in2core_jax.data.records import Record, content_key
from in2core_jax.data.summaries import told_lines
from in2core_jax.data.tokenizing import tokenize
from in2core_jax.errors import UserError

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = ({"type": "function", "function": {"name": "f"}},)
PAIR = {"instruction": "Q", "output": "A"}


def read(value):
  return read_record(value, {})


def chat(*turns, **more):
  return {"messages": list(turns), **more}


def said(conversation):
  return [(message["role"], message["content"]) for message in conversation.messages]


ROUNDS = [["q", "a"]]
EARLIER = [("user", "q"), ("assistant", "a"), ("user", "Q"), ("assistant", "A")]
WITH_SYSTEM = [("system", "S"), ("user", "Q"), ("assistant", "A")]


@pytest.mark.parametrize(
  ("value", "wanted"),
  [
    *((PAIR | {key: ROUNDS}, EARLIER) for key in ("chat_history", "History", "conversationHistory", "past_turns")),
    (PAIR | {"dialogue_history": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, EARLIER),
    (PAIR | {"chat_history": '[["q", "a"]]'}, EARLIER),
    *((chat(USER, ANSWER, **{key: "S"}), WITH_SYSTEM) for key in ("System", "systemPrompt", "sys_prompt")),
    ({"System": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, WITH_SYSTEM),
    ({"Messages": [{"Role": "user", "Content": "Q"}, {"Role": "assistant", "Content": "A"}]}, WITH_SYSTEM[1:]),
    ({"Instruction": "Q", "Output": "A", "Input": "I"}, [("user", "Q\n\nI"), ("assistant", "A")]),
    (PAIR | {"Input": "I"}, [("user", "Q\n\nI"), ("assistant", "A")]),
    ({"Question": "Q", "Answer": "A"}, WITH_SYSTEM[1:]),
    # The shape that the record has by its own names stays its shape.
    ({"question": "Q", "answer": "A", "Prompt": "other"}, WITH_SYSTEM[1:]),
  ],
)
def test_parts_in_other_words_are_read(value, wanted):
  found = read(value)
  assert said(found) == wanted
  assert found.unread == (("Prompt",) if "Prompt" in value else ())


@pytest.mark.parametrize("key", ["available_tools", "tool_definitions", "Tools", "functionDefinitions", "apis"])
def test_tools_in_other_words_are_read(key):
  assert read(chat(USER, ANSWER, **{key: [{"name": "f"}]})).tools == TOOLS
  assert read(chat({**USER, "tools": [{"name": "f"}]}, ANSWER)).tools == TOOLS
  assert read(chat(USER, ANSWER, **{key: "none"} if key != "Tools" else {})).tools == ()


@pytest.mark.parametrize("key", ["toolCalls", "tool_call", "function_calls"])
def test_calls_in_other_words_are_read(key):
  turn = {"role": "assistant", "content": "", key: CALL if key == "tool_call" else [CALL]}
  assert read(chat(USER, turn)).messages[1]["tool_calls"][0]["function"]["name"] == "f"


@pytest.mark.parametrize("key", ["reasoningContent", "Reasoning", "cot", "chain_of_thought", "think"])
def test_reasoning_in_other_words_is_read(key):
  for value in (chat(USER, ANSWER | {key: "R"}), PAIR | {key: "R"}):
    assert read(value).messages[1]["reasoning_content"] == "R"


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (chat(USER, ANSWER, chat_history=ROUNDS), "'chat_history' holds earlier rounds beside a list of turns"),
    (chat(USER, ANSWER | {"prefix": True}), "prefix=true: an unfinished answer would be learnt as a finished one"),
    (chat(USER, ANSWER, continue_final_message=True), "'continue_final_message' is true: an unfinished answer"),
    (chat(USER, ANSWER | {"channel": "analysis"}), "write what was thought as 'reasoning_content'"),
    (chat(USER, ANSWER | {"recipient": "functions.f"}), "write a call of a tool as 'tool_calls'"),
    (chat(USER | {"reasoning_content": "R"}, ANSWER), "in a turn of user; only the assistant thinks"),
    (chat(USER, ANSWER, weight="0.5"), "all examples weigh the same"),
    (chat(USER, ANSWER, weight=10**400), "all examples weigh the same"),
  ],
)
def test_what_would_be_another_conversation_is_refused(value, message):
  with pytest.raises(UserError, match=message):
    read(value)


@pytest.mark.parametrize("more", [{"prefix": False}, {"partial": 0}, {"channel": "final"}, {"recipient": "all"}])
def test_flags_that_say_what_is_done_anyway_are_no_news(more):
  assert read(chat(USER, ANSWER | more)).unread == ()
  assert read(chat(USER, ANSWER, add_generation_prompt=True, continue_final_message=False)).unread == ()


def test_arguments_that_json_would_change_stay_as_they_are():
  for text in ('{"x": NaN}', '{"x": 1e999}', '{"x": 1, "x": 2}', '{"x": -Infinity}'):
    call = {"function": {"name": "f", "arguments": text}}
    found = read(chat(USER, ANSWER | {"tool_calls": [call]}))
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == text


# ---- media ---------------------------------------------------------------------------

PLACEHOLDERS = ["<image>", "<video>", "<audio>", "<|image|>", "<image_1>", "<|vision_start|>", "<start_of_image>"]
PLACEHOLDERS += ["[IMG]", "<|image_pad|>", "<|AUDIO|>", "<img>", "data:image/png;base64,iVBO"]


@pytest.mark.parametrize("word", PLACEHOLDERS)
def test_a_placeholder_without_its_picture_is_told_and_one_with_it_is_refused(word):
  turns = {"role": "user", "content": f"{word}\nWhat is it?"}, ANSWER
  for more in ({}, {"image": None}, {"images": []}):
    (told,) = read(chat(*turns, **more)).unread
    assert told.endswith(" in a text")
  for more in ({"images": ["a.png"]}, {"file": "x/a.jpg"}, {"url": "https://x.org/a.mp4"}, {"source": ["a.wav"]}):
    with pytest.raises(UserError, match=f"'{next(iter(more))}': images, audio and video"):
      read(chat(*turns, **more))


def test_placeholders_are_counted_in_one_line():
  turns = {"role": "user", "content": "<image_1> <image_2>"}, ANSWER
  (key,) = read(chat(*turns)).unread
  (line,) = told_lines({"unread_keys": {key: {"count": 3, "first": "d.jsonl:2"}}})
  assert line.startswith(
    "'<image_N>' stands in texts of 3 records, the first at d.jsonl:2, and is learnt as plain text"
  )


def test_keys_without_end_are_told_in_few_words():
  keys = {f"k{i}{'x' * 10_000}": {"count": 1, "first": "d.jsonl:1"} for i in range(1000)}
  told = told_lines({"unread_keys": keys})
  assert len(told) == 31 and max(map(len, told)) < 400 and "970 more keys" in told[-1]


@pytest.mark.parametrize(
  "more",
  [
    *({"attachments": ["a.pdf"]}, {"screenshot": "a.png"}, {"speech": "a.wav"}, {"clip": "s.mp4"}),
    *({"figure": {"path": "f.png", "bytes": None}}, {"x": "data:image/png;base64,iVBO"}),
  ],
)
def test_values_that_are_media_are_refused_whatever_their_key(more):
  for value in (chat(USER, ANSWER, **more), chat(USER | more, ANSWER)):
    with pytest.raises(UserError, match="images, audio and video cannot be read"):
      read(value)


@pytest.mark.parametrize("more", [{"source": "a.jpg"}, {"file_name": "a.wav"}, {"note": "see the picture a.png"}])
def test_names_of_files_that_say_where_a_text_is_from_are_no_media(more):
  assert read(chat({"role": "user", "content": "Is 1 < 2 <b>image</b>?"}, ANSWER, **more)).messages


def test_a_conversation_of_thousands_of_turns_takes_no_minutes():
  turns = [message for i in range(1500) for message in ({"role": "user", "content": f"q{i}"}, ANSWER)]
  tokenizer = make_tokenizer(2000)
  record = Record("r", tuple(turns), "", "{}", "memory", 1)
  began = time.thread_time()
  dataset = tokenize([record], tokenizer, 200_000)
  assert time.thread_time() - began < 4  # quadratic work took ten times as long
  starts = np.flatnonzero(np.diff(dataset.response_mask[0].astype(int)) == 1)
  assert len(starts) == 1500


# ---- content keys --------------------------------------------------------------------


def called(first, second, order=(0, 1)):
  ids = (first, second)
  calls = [CALL | {"id": one} if one else {k: v for k, v in CALL.items() if k != "id"} for one in ids]
  results = [{"role": "tool", "content": str(n)} | ({"tool_call_id": ids[n]} if ids[n] else {}) for n in order]
  return content_key(read(chat(USER, {"role": "assistant", "tool_calls": calls}, *results, ANSWER)).messages)


def test_ids_of_calls_make_no_other_record_but_what_they_join_does():
  key = called("call_1", "call_2")
  assert called("call_abc123", "call_x") == called("1", "0") == called(None, None) == key
  assert called("call_1", "call_2", (1, 0)) == called("b", "a", (1, 0)) != key
  swapped = chat(USER, {"role": "assistant", "tool_calls": [CALL, CALL | {"id": "c2"}]})
  results = [{"role": "tool", "content": str(n), "tool_call_id": f"c{2 - n}"} for n in (0, 1)]
  assert content_key(read(swapped | {"messages": [*swapped["messages"], *results, ANSWER]}).messages) != key
