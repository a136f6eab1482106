"""Records: every key is read, known to be without meaning, told, or a refusal; bad records are counted together."""

import hashlib
import json
import os

import pytest
from tiny import make_tokenizer

from in2core_jax.data.record_shapes import read_record
from in2core_jax.data.records import BadRecords, Item, content_key, to_records, weights_of, with_weight
from in2core_jax.data.sources import load_records
from in2core_jax.data.summaries import data_summary, format_summary, told_lines
from in2core_jax.data.tokenizing import tokenize
from in2core_jax.errors import UserError


def read(value, fields=None):
  bad = BadRecords()
  records = to_records([Item(value, json.dumps(value), "d.jsonl", 1, fields or {})], bad)
  bad.raise_if_any()
  return records[0]


def lines(path, *values):
  path.write_text("".join(json.dumps(value) + "\n" for value in values))
  return f"jsonl:{path}"


def chat(*turns, **more):
  return {"messages": [*turns], **more}


def turn(role, content, **more):
  return {"role": role, "content": content, **more}


U, A = turn("user", "Q"), turn("assistant", "A")
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
READ_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

# --- earlier rounds


@pytest.mark.parametrize(
  "history",
  [
    [["q1", "a1"], ["q2", "a2"]],
    [{"user": "q1", "assistant": "a1"}, {"user": "q2", "assistant": "a2"}],
    [{"question": "q1", "answer": "a1"}, {"question": "q2", "answer": "a2"}],
    [turn("user", "q1"), turn("assistant", "a1"), turn("user", "q2"), turn("assistant", "a2")],
  ],
)
@pytest.mark.parametrize(
  "row", [{"instruction": "Q", "output": "A"}, {"prompt": "Q", "response": "A"}, {"prompt": "Q", "completion": "A"}]
)
def test_earlier_rounds_come_before_the_question(history, row):
  record = read(row | {"history": history})
  said = [(m["role"], m["content"]) for m in record.messages]
  rounds = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
  assert said == [*rounds, ("user", "Q"), ("assistant", "A")] and not record.unread
  assert record.content_key != read(row).content_key
  assert read(row | {"history": []}).content_key == read(row).content_key


# --- per-turn loss flags

OUT = (
  *({"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"train": False}, {"train": 0}, {"training": False}),
  *({"loss": False}, {"trainable": False}, {"train_on_turn": False}, {"masked": True}, {"loss_weight": 0}),
  *({"ignore_loss": True}, {"loss_mask": 0}, {"weight": 0, "train": False}),
  *({"is_trainable": False}, {"supervise": 0}, {"unmasked": False}, {"no_grad": True}, {"skip": True}, {"exclude": 1}),
)
IN = ({"weight": 1}, {"weight": 1.0}, {"train": True}, {"loss": True}, {"loss": 1}, {"masked": False}, {"weight": None})


@pytest.mark.parametrize("flag", OUT)
def test_a_turn_out_of_the_loss_is_context(flag):
  last = turn("assistant", "B")
  record = read(chat(U, A | flag, U, last))
  assert [m.get("train") for m in record.messages] == [None, False, None, None] and not record.unread
  assert record.content_key != read(chat(U, A, U, last)).content_key
  shares = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"} | flag]}
  shares["conversations"] += [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "B"}]
  assert [m.get("train") for m in read(shares).messages] == [None, False, None, None]
  # What follows the last response that is learnt teaches nothing; nothing but such turns is no response.
  assert len(read(chat(U, A, U, last | flag)).messages) == 2
  assert not read(chat(U, A | flag)).has_response


@pytest.mark.parametrize("flag", IN)
def test_a_turn_in_the_loss_is_an_ordinary_one(flag):
  assert read(chat(U, A | flag)).messages == read(chat(U, A)).messages


# --- tools, reasoning, contents


@pytest.mark.parametrize(
  "value",
  [
    chat(U, turn("assistant", None, tool_calls=[CALL]), turn("tool", "7", tool_call_id="c1"), A, tools=[TOOL]),
    chat(
      U, turn("assistant", "", tool_calls=[CALL]), turn("tool", "7", tool_call_id="c1"), A, tools=json.dumps([TOOL])
    ),
  ],
)
def test_calls_results_and_definitions_are_read(value):
  record = read(value)
  assert record.messages[1]["tool_calls"] == [READ_CALL | {"id": "c1"}] and record.messages[1]["content"] == ""
  assert record.messages[2] == {"role": "tool", "content": "7", "tool_call_id": "c1"}
  assert record.tools == (TOOL,) and not record.unread
  plain = read(chat(U, A))
  assert len({record.content_key, plain.content_key, content_key(record.messages)}) == 3


def test_calls_of_other_spellings_are_the_same():
  called = turn("assistant", None, function_call={"name": "f", "arguments": '{"x": 1}'})
  old = read(chat(U, called, turn("function", "7", name="f"), A))
  share = [{"from": "human", "value": "Q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]
  share += [{"from": "observation", "value": "7"}, {"from": "gpt", "value": "A"}]
  new = read({"conversations": share, "tools": json.dumps([TOOL])})
  for record in (old, new):
    assert record.messages[1]["tool_calls"] == [READ_CALL]
    assert (record.messages[2]["role"], record.messages[2]["content"]) == ("tool", "7")
    assert not record.unread
  assert new.tools == (TOOL,)


def test_calls_and_results_among_the_parts_of_a_content_are_turns_of_their_own():
  used = {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}
  result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "7"}]}
  called = turn("assistant", [{"type": "text", "text": "Look."}, used])
  record = read(chat(U, called, turn("user", [result | {"is_error": True}, {"type": "text", "text": "So?"}]), A))
  assert record.messages[1] == turn("assistant", "Look.", tool_calls=[READ_CALL | {"id": "c1"}])
  assert record.messages[2:4] == (turn("tool", "7", tool_call_id="c1"), turn("user", "So?"))
  assert record.unread == ("messages[].is_error",)
  plain = [turn("assistant", "Look.", tool_calls=[CALL]), turn("tool", "7", tool_call_id="c1"), A]
  blocks = chat(U, called, turn("user", [result]), A)
  assert read(blocks).content_key == read(chat(U, *plain)).content_key
  for wrong, why in [
    ([used, {"type": "text", "text": "A"}], "other parts follow it"),
    ([used | {"name": ""}], "no 'name' of a function"),
  ]:
    with pytest.raises(UserError, match=why):
      read(chat(U, turn("assistant", wrong), A))
  with pytest.raises(UserError, match="tool calls twice"):
    read(chat(U, turn("assistant", [used], tool_calls=[CALL]), A))


def test_a_call_that_says_two_things_is_told():
  double = {"name": "g", "arguments": {"z": 1}} | CALL
  record = read(chat(U, turn("assistant", "", tool_calls=[double]), A))
  assert record.messages[1]["tool_calls"][0]["function"]["name"] == "f"
  assert record.unread == ("messages[].tool_calls[].name", "messages[].tool_calls[].arguments")


@pytest.mark.parametrize(
  "answer",
  [
    *(turn("assistant", "A", **{key: "T"}) for key in ("reasoning_content", "reasoning", "thinking")),
    turn("assistant", [{"type": "thinking", "thinking": "T"}, {"type": "text", "text": "A"}]),
  ],
)
def test_reasoning_is_read(answer):
  assert read(chat(U, answer)).messages[1] == {"role": "assistant", "content": "A", "reasoning_content": "T"}


@pytest.mark.parametrize(
  ("content", "text"),
  [([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"), (["a"], "a"), (None, "")],
)
def test_contents_in_parts_or_missing(content, text):
  assert read(chat(turn("user", content), A)).messages[0]["content"] == text


@pytest.mark.parametrize("name", ["developer", "human", "gpt", "model", "bot", "ipython", "observation"])
def test_roles_in_other_words_are_known(name):
  assert read(chat(turn(name, "x"), U, A)).messages[0]["role"] in ("system", "user", "assistant", "tool")


def test_plain_turns_keep_the_hash_that_they_had():
  # Ids and splits of older runs hang on it.
  record = read(chat(U, turn("assistant", 'é"')))
  assert record.content_key == hashlib.sha256('[["user","Q"],["assistant","é\\""]]'.encode()).hexdigest()


# --- refusals


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (chat(U, A | {"weight": 0.5}), "weight=0.5: a turn is learnt"),
    (chat(U, A | {"weight": 0, "train": True}), "learnt by one of its keys and not by another"),
    (chat(U, A | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}), "completely or not at all"),
    (chat(U, A, images=["a.png"]), "'images': images, audio and video"),
    (chat(U, A, audio="a.wav"), "images, audio and video"),
    (
      chat(turn("user", [{"type": "image_url", "image_url": {"url": "x"}}]), A),
      "images, audio",
    ),
    (chat(turn("user", [{"type": "input_audio", "input_audio": {}}]), A), "images, audio, video and files"),
    ({"instruction": "Q", "output": "A", "history": "earlier"}, "'history' must be a list of earlier rounds"),
    ({"instruction": "Q", "output": "A", "history": [["q"]]}, "must be a question and its answer"),
    (chat(U, A, history=[["q", "a"]]), "earlier rounds beside a list of turns"),
    (chat(U, A, rejected="B"), "without the other answer: a preference pair has"),
    (chat(U, A, label=False), "an answer that is not to be learnt"),
    (chat(U, A, weight=0), "takes the record out of the loss"),
    (chat(U, A, weight=-2.5), "all examples weigh the same"),
    (chat(U, A, loss_weight=2.5), "all examples weigh the same"),
    (chat(U, A, train_on_inputs=True), "asks for other turns in the loss"),
    (chat(U, A, tools="not json"), "tools"),
    (chat(U, turn("assistant", "", tool_calls="x")), "is a tool call"),
    ({"prompt": "Q", "response": "A", "system": "a", "system_prompt": "b"}, "different system prompts"),
  ],
)
def test_what_would_be_another_conversation_is_refused(value, message):
  with pytest.raises(UserError, match=message):
    read(value)


@pytest.mark.parametrize(
  ("more", "fields", "expected"),
  [
    ({"weight": 0.5}, {}, 0.5),
    ({"weight": 0.5}, {"topic": "kind"}, 0.5),
    ({"weight": 0.5}, {"prompt": "q", "response": "a"}, 0.5),  # a coreset with weights, read as its pool was
    ({"imp": 2, "weight": 0.5}, {"prompt": "q", "response": "a", "weight": "imp"}, 2.0),
    ({"imp": 2}, {"weight": "imp"}, 2.0),
    ({"imp": 1}, {"weight": "imp"}, 1.0),
    ({"imp": None}, {"weight": "imp"}, 1.0),
    ({"weight": 0.5}, {"weight": "imp"}, 1.0),  # a record without the column that is named
  ],
)
def test_columns_that_are_named_leave_a_record_its_weight_or_name_it(more, fields, expected):
  said = {"q": "Q", "a": "A"} if "prompt" in fields else {"prompt": "Q", "response": "A"}
  found = read_record(said | {"kind": "k"} | more, fields)
  assert found.weight == expected and "imp" not in found.unread


@pytest.mark.parametrize(
  ("value", "named", "words"),
  [
    *[(value, True, f"'imp' is {said}, and a weight is a number above 0") for value, said in ((0, "0"), (-1, "-1"))],
    *[(value, True, "'imp' is .*, and a weight is") for value in ("0.5", True, 1e7, [1])],
    (0, False, "takes the record out of the loss"),
    (-1, False, "all examples weigh the same"),
  ],
)
def test_what_is_no_weight_is_refused_where_columns_are_named(value, named, words):
  fields = {"prompt": "q", "response": "a"} | ({"weight": "imp"} if named else {})
  with pytest.raises(UserError, match=words):
    read_record({"q": "Q", "a": "A", "imp" if named else "weight": value}, fields)


@pytest.mark.parametrize("weight", [2.5, 0.001, 1, 1e6])
def test_the_weight_of_a_record_is_read_and_written_beside_what_it_was(weight):
  raw = json.dumps(chat(U, A), ensure_ascii=False)
  weighted = with_weight(raw, weight)
  assert weighted.startswith(raw[:-1]) and json.loads(weighted) == chat(U, A, weight=weight)
  assert json.loads(with_weight(weighted, 0.25)) == chat(U, A, weight=0.25)
  record = read(json.loads(weighted))
  assert record.weight == weight and record.messages == read(chat(U, A)).messages and not record.unread
  assert weights_of([read(chat(U, A)), record]) is None if weight == 1 else weights_of([record]).tolist() == [weight]


# --- keys that nobody reads


@pytest.mark.parametrize(
  ("more", "unread"),
  [
    ({"id": "a", "source": "web", "score": 0.5, "lang": "en", "created_at": "2024", "model": "m", "num_turns": 2}, ()),
    ({"id": None, "mood": None, "context": "", "notes": [], "more": {"a": None}}, ()),
    ({"context": "Read this first."}, ("context",)),
    ({"mood": "sad", "id": 3}, ("mood",)),
    ({"prompt": "another"}, ("prompt",)),
    ({"source": "x" * 600}, ()),
    ({"title": "Vectors", "state": "Ohio", "subject": "physics"}, ()),
    ({"state": "The patient has had a fever of 39 degrees for two days."}, ("state",)),
    ({"metadata": {"url": "u", "sizes": [{"text_length": 3}], "text": ""}}, ()),
    ({"metadata": {"history": [["q", "a"]]}}, ("metadata",)),
    ({"meta": [{"more": {"systemPrompt": "Be brief."}}]}, ("meta",)),
    ({"source": {"weight": 0}, "header": {"image": "a.png"}}, ("source", "header")),
  ],
)
def test_keys_are_without_meaning_or_told(more, unread):
  assert read(chat(U, A, **more)).unread == unread


def test_keys_of_turns_and_of_other_shapes_are_told():
  assert read(chat(U | {"mood": "sad"}, A)).unread == ("messages[].mood",)
  both = read({"instruction": "Q", "output": "A", **chat(U, A)})
  assert set(both.unread) == {"instruction", "output"}
  named = read({"question": "Q", "answer": "A", "context": "C"}, {"prompt": "question", "response": "answer"})
  assert named.unread == ("context",)


def test_each_key_is_told_once_with_its_count_and_first_place(tmp_path):
  values = [chat(turn("user", f"Q{i}"), A, **({"mood\x1b[2J": "sad"} if i else {}), topic="a\x1bb") for i in range(3)]
  part = tokenize(load_records(lines(tmp_path / "d.jsonl", *values)), make_tokenizer(2000), 64)
  summary = data_summary({"train": part})
  assert summary["unread_keys"] == {"mood\x1b[2J": {"count": 2, "first": f"{tmp_path}/d.jsonl:2"}}
  (told,) = told_lines(summary)
  assert "2 records have it, the first at" in told
  assert "\x1b" not in format_summary(summary)


# --- bad records together


def test_bad_records_are_counted_or_left_out(tmp_path):
  spec = lines(tmp_path / "d.jsonl", chat(U, A), chat(U, A, images=["x"]), {"odd": 1}, chat(turn("user", "Q2"), A))
  with pytest.raises(
    UserError, match=r"2 of 4 records cannot be used .*the first is .*d.jsonl:2: .*images.*--skip_bad"
  ):
    load_records(spec)
  limited = BadRecords()
  limited.read, limited.looked_at = 300, 100
  for line in (1, 2):
    limited.refuse(f"d.jsonl:{line}", "", "the template refuses it")
  with pytest.raises(UserError, match="2 of the 100 records that limits, topics or --dedup leave of 300 cannot"):
    limited.raise_if_any()
  bad = BadRecords(skip=True)
  assert [record.line for record in load_records(spec, bad=bad)] == [1, 4]
  kept = [json.loads(line) for line in bad.lines().splitlines()]
  assert [entry["place"].rpartition(":")[2] for entry in kept] == ["2", "3"] and "odd" in kept[1]["record"]
  assert bad.summary()["count"] == 2 and len(bad.summary()["reasons"]) == 2


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"prompt": "a", "prompt": "b", "response": "c"}', "'prompt' stands twice"),
    ('{"prompt": ' + "[" * 5000 + "]" * 5000 + "}", "deep"),
    ('{"prompt": ' + "[" * 100000, "deep"),
    ('{"prompt": "a", "response": "b", "n": ' + "9" * 5000 + "}", "5,000 digits"),
  ],
)
def test_json_that_python_would_misread_is_refused(tmp_path, line, message):
  (tmp_path / "d.jsonl").write_text(line + "\n")
  with pytest.raises(UserError, match=message):
    load_records(f"jsonl:{tmp_path / 'd.jsonl'}")


def test_not_a_number_is_a_missing_text(tmp_path):
  (tmp_path / "d.jsonl").write_text('{"instruction": "Q", "input": NaN, "output": "A"}\n')
  (record,) = load_records(f"jsonl:{tmp_path / 'd.jsonl'}")
  assert record.messages[0]["content"] == "Q"


def test_ids_that_two_files_share_are_told_apart_by_the_file(tmp_path):
  other = chat(turn("user", "another"), A, id=1)
  one, two = lines(tmp_path / "one.jsonl", chat(U, A, id=1)), lines(tmp_path / "two.jsonl", other)
  assert [record.example_id for record in load_records(f"{one}+{two}")] == ["one:1", "two:1"]
  assert [record.example_id for record in load_records(one)] == ["1"]


def test_columns_are_named_for_each_source(tmp_path):
  one = lines(tmp_path / "one.jsonl", {"q": "Q1", "a": "A1"})
  two = lines(tmp_path / "two.jsonl", {"frage": "Q2", "antwort": "A2"})
  fields = f"{one}=prompt=q,response=a;{two}=prompt=frage,response=antwort"
  assert [record.messages[0]["content"] for record in load_records(f"{one}+{two}", fields)] == ["Q1", "Q2"]


# --- files that are no JSON text


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("d.jsonl.xz", b"\xfd7zXZ\x00", "compressed by xz; unpack it first: unxz -k d.jsonl.xz"),
    ("d.parquet", b"PARE\x15\x04", "an encrypted Parquet file"),
    ("d.xlsx", b"PK\x03\x04....xl/workbook.xml", "an Excel file"),
    ("d.zip", b"PK\x03\x04....d.jsonl", "a zip archive"),
    ("d.pkl", b"\x80\x04\x95\x00", "a Python pickle"),
    ("d.db", b"SQLite format 3\x00", "an SQLite data base"),
    ("d.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ("d.jsonl", b"<!DOCTYPE html><html>", "a web page"),
    ("d.jsonl", b"\xff\xfe{\x00}\x00", "UTF-16"),
    ("d.gguf", b"GGUF\x03\x00\x00\x00", "a GGUF model"),
    ("d.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00" + b'{"a": 1}', "a safetensors file"),
  ],
)
def test_files_of_another_kind_are_named(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    load_records(f"jsonl:{tmp_path / name}")


def test_what_is_no_file_is_named(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "model").mkdir()
  (tmp_path / "model/adapter_config.json").write_text("{}")
  (tmp_path / "a.jsonl").write_text("{}")
  for spec, message in (
    (f"jsonl:{tmp_path}/pipe", "is a pipe"),
    (f"jsonl:{tmp_path}/model", "is a folder with an adapter"),
    (f"jsonl:{tmp_path}/*.jsonl", r"a.jsonl:1: unknown record shape: its columns are \(none\)"),
    ("jsonl:tatsu-lab/alpaca", "the name of a data set on a hub"),
    (f"hf:{tmp_path}/a.jsonl", "hf:"),
    ("jsonl:https://example.com/d.jsonl", "nothing is fetched"),
  ):
    with pytest.raises(UserError, match=message):
      load_records(spec)


def test_a_bare_path_is_a_file_of_json_lines(tmp_path):
  lines(tmp_path / "d.jsonl", chat(U, A))
  assert len(load_records(str(tmp_path / "d.jsonl"))) == 1


def test_the_first_bad_record_is_the_first_line(tmp_path):
  (tmp_path / "d.jsonl").write_text('{"odd": 1}\n{"broken\n{"prompt": "Q", "response": "A"}\n')
  with pytest.raises(UserError, match=r"2 of 3 records cannot be used .*first is .*d.jsonl:1: unknown record shape"):
    load_records(f"jsonl:{tmp_path / 'd.jsonl'}")
  bad = BadRecords(skip=True)
  load_records(f"jsonl:{tmp_path / 'd.jsonl'}", bad=bad)
  assert [json.loads(line)["place"][-1] for line in bad.lines().splitlines()] == ["1", "2"]
