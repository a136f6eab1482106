"""Every format gives the records of the same data as JSON lines; what is broken ends in one line with file and row."""

import bz2
import datetime
import decimal
import gzip
import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from in2core_jax.data import folders, json_files, tables
from in2core_jax.data.file_kinds import check_data_file
from in2core_jax.data.records import BadRecords
from in2core_jax.data.source_specs import sources_of
from in2core_jax.data.sources import check_fields, load_records, name_of
from in2core_jax.errors import UserError

PAIRS = [
  {"id": "7", "instruction": 'Say "é",\nplease', "input": "", "output": "é\u2028🙂"},
  {"id": "08", "instruction": "Add; 1, 2", "input": "1\t2", "output": "3"},
  {"id": "c", "instruction": "Is it so?", "input": "", "output": "true"},
]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CHATS = [
  {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "score": 0.5},
  {
    "messages": [
      {"role": "user", "content": "Q2", "name": "ann"},
      {"role": "assistant", "content": "", "tool_calls": [CALL]},
      {"role": "tool", "content": "7"},
      {"role": "assistant", "content": "A2"},
    ],
    "score": 1.0,
  },
]


def json_lines(rows):
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows, **options):
  sink = io.BytesIO()
  pq.write_table(pa.Table.from_pylist(rows), sink, **options)
  return sink.getvalue()


def arrow(rows, stream=False):
  sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
  with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
    writer.write_table(table, max_chunksize=2)
  return sink.getvalue()


def quoted(rows, sign=",", end="\n"):
  cell = lambda text: '"' + text.replace('"', '""') + '"'  # noqa: E731
  lines = [sign.join(map(cell, row)) for row in ([*rows[0]], *([*row.values()] for row in rows))]
  return (end.join(lines) + end).encode()


def zstd(data):
  return pa.compress(data, codec="zstd", asbytes=True)


ANY = {
  "d.json": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
  "pretty.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=2).encode(),
  "wrapped.json": lambda rows: json.dumps({"version": "1.0", "n": 3, "data": rows}, ensure_ascii=False).encode(),
  "printed.json": lambda rows: json.dumps({"rows": rows, "about": {"a": [1]}}, ensure_ascii=False, indent=1).encode(),
  "d.jsonl.gz": lambda rows: gzip.compress(json_lines(rows[:1])) + gzip.compress(json_lines(rows[1:])),
  "d.json.gz": lambda rows: gzip.compress(json.dumps(rows, ensure_ascii=False).encode()),
  "d.jsonl.zst": lambda rows: zstd(json_lines(rows)),
  "d.jsonl.bz2": lambda rows: bz2.compress(json_lines(rows)),
  "no_suffix": lambda rows: gzip.compress(json_lines(rows)),
  "d.parquet": lambda rows: parquet(rows, row_group_size=2),
  "z.parquet": lambda rows: parquet(rows, compression="zstd", use_dictionary=True),
  "d.arrow": arrow,
  "stream.arrow": lambda rows: arrow(rows, stream=True),
}
TEXTS = {
  "d.csv": quoted,
  "d.tsv": lambda rows: quoted(rows, "\t"),
  "semicolons.csv": lambda rows: quoted(rows, ";"),
  "d.csv.gz": lambda rows: gzip.compress(quoted(rows)),
  "excel.csv": lambda rows: b"\xef\xbb\xbf" + quoted(rows, end="\r\n"),
}


def written(path, data):
  path.write_bytes(data)
  return f"file:{path}"


@pytest.mark.parametrize(
  ("name", "rows"), [(name, rows) for rows in (PAIRS, CHATS) for name in (*ANY, *(TEXTS if rows is PAIRS else ()))]
)
def test_each_format_gives_the_records_of_json_lines(tmp_path, name, rows):
  expected = load_records(written(tmp_path / "expected.jsonl", json_lines(rows)))
  found = load_records(written(tmp_path / name, (ANY | TEXTS)[name](rows)))
  assert [record.messages for record in found] == [record.messages for record in expected]
  assert [record.example_id for record in found] == [record.example_id for record in expected]
  assert [record.unread for record in found] == [()] * len(rows)
  assert [record.raw for record in found] == [record.raw for record in expected]
  assert all(str(tmp_path / name) == record.source for record in found)


@pytest.mark.parametrize(
  ("name", "numbers"),
  [
    ("d.json", [1, 1, 1]),
    ("d.parquet", [1, 2, 3]),
    ("d.arrow", [1, 2, 3]),
    ("d.csv", [2, 4, 5]),
    ("d.jsonl.gz", [1, 2, 3]),
  ],
)
def test_places_are_lines_of_texts_and_rows_of_tables(tmp_path, name, numbers):
  spec = written(tmp_path / name, (ANY | TEXTS)[name](PAIRS))
  assert [record.line for record in load_records(spec)] == numbers


def test_nulls_that_columns_add_are_not_there(tmp_path):
  record = load_records(written(tmp_path / "d.parquet", ANY["d.parquet"](CHATS)))[1]
  assert record.messages[1]["tool_calls"] == [CALL] and "name" not in record.messages[2]


def test_cells_that_are_no_texts(tmp_path):
  text = "instruction,output,weight,label,num_turns,messages\nQ,1,1,True,3,\n"
  (record,) = load_records(written(tmp_path / "d.csv", text.encode()))
  assert [m["content"] for m in record.messages] == ["Q", "1"] and not record.unread
  for column, cell, message in (
    ("weight", "0", "takes the record out of the loss"),
    ("weight", "-0.3", "all examples weigh the same"),
    ("label", "False", "not to be learnt"),
  ):
    with pytest.raises(UserError, match=message):
      load_records(written(tmp_path / "d.csv", f"instruction,output,{column}\nQ,1,{cell}\n".encode()))
  (record,) = load_records(written(tmp_path / "d.csv", b"instruction,output,weight\nQ,1,0.3\n"))
  assert record.weight == 0.3
  turns = json.dumps(CHATS[0]["messages"]).replace('"', '""')
  (record,) = load_records(written(tmp_path / "d.csv", f'messages,\n"{turns}",0\n'.encode()))
  assert record.messages[1]["content"] == "A" and json.loads(record.raw)["Unnamed: 1"] == "0"


def test_values_of_tables_that_json_lacks():
  assert tables.to_plain({"a": None, "b": [None, b"\xc3\xa9", b"\xff"], "c": float("nan")}) == {
    "b": [None, "é", {"bytes": 1}],
    "c": None,
  }
  assert tables.to_plain(datetime.datetime(2024, 1, 2, 3)) == "2024-01-02T03:00:00"
  assert tables.to_plain([decimal.Decimal("1.5"), True, 7]) == [1.5, True, 7]


def test_columns_of_all_types_are_read(tmp_path):
  pairs = {"prompt": pa.array(["Q"]).dictionary_encode(), "response": pa.array([b"R"])}
  others = {
    "created_at": pa.array([1], pa.timestamp("ns", "UTC")),
    "date": pa.array([datetime.date(2024, 1, 2)]),
    "score": pa.array([decimal.Decimal("1.50")]),
    "payload": pa.array([b"\xff"]),
    "meta": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
  }
  pq.write_table(pa.table(pairs | others), tmp_path / "d.parquet")
  (record,) = load_records(str(tmp_path / "d.parquet"))
  assert [m["content"] for m in record.messages] == ["Q", "R"] and record.unread == ("payload",)
  assert json.loads(record.raw) == {
    "prompt": "Q",
    "response": "R",
    "created_at": "1970-01-01T00:00:00+00:00",
    "date": "2024-01-02",
    "score": 1.5,
    "payload": {"bytes": 1},
    "meta": {"k": 1},
  }


# --- what is broken


GOOD = json_lines(PAIRS)
WRAPPED = b'{"data": [' + json.dumps(PAIRS[0]).encode()
BROKEN = [
  ("d.jsonl.gz", gzip.compress(GOOD)[:-12], r"d.jsonl.gz:\d: cannot be read on \(Truncated compressed stream\)"),
  ("d.jsonl.gz", gzip.compress(GOOD)[:4], r"d.jsonl.gz:1: cannot be read on"),
  ("d.jsonl.zst", zstd(GOOD)[:-9], r"d.jsonl.zst:\d: cannot be read on"),
  ("d.json.gz", gzip.compress(b"[" + GOOD[:-1])[:-12], r"d.json.gz:\d: (cannot be read on|broken JSON array)"),
  ("d.jsonl.gz", gzip.compress(gzip.compress(GOOD)), "d.jsonl.gz is a binary file, not text"),
  ("d.parquet.gz", gzip.compress(parquet(PAIRS)), "a table compressed by gzip as a whole; unpack it first"),
  ("d.json", WRAPPED, r"d.json:1: broken JSON array \(expected a comma or the closing bracket\) at ''"),
  ("d.json", WRAPPED + b'], "more": [{"a": 1}]}', "one object with two lists, 'data' and 'more'"),
  ("d.json", WRAPPED + b"\n]} {}", r"d.json:2: broken JSON array \(text after the object that holds 'data'\)"),
  ("d.json", b"[" + GOOD.splitlines()[0] + b",\n\n" + b'{"a": "\xff"}]', r"d.json:3: byte 0xff is not UTF-8"),
  ("d.parquet", parquet(PAIRS)[:-4], "d.parquet: the Parquet file cannot be read"),
  ("d.parquet", b"PAR1", "d.parquet: the Parquet file cannot be read"),
  ("d.parquet", parquet([PAIRS[0]])[:40] + b"\0" * 40 + parquet([PAIRS[0]])[80:], "d.parquet: row group 0 after row 0"),
  ("d.parquet", b"PAR1" + b"\0" * 20, "the Parquet file cannot be read"),
  ("d.arrow", arrow(PAIRS)[:-20], "d.arrow: the (schema of the )?Arrow file cannot be read"),
  ("d.arrow", arrow(PAIRS, stream=True)[:-300], "d.arrow: the batch after row 2 cannot be read"),
  ("d.csv", b"instruction,output\nQ,A,B\n", r"d.csv:2: it has 3 cells, and the header has 2"),
  ("d.csv", b'instruction,output\nQ,A\nQ,"A\n\n', r"d.csv:3: broken CSV \(unexpected end of data\)"),
  ("d.csv", b'instruction,output\nQ,A\nQ,"A"B\n', r"d.csv:3: broken CSV"),
  ("d.csv", b"instruction,output\nQ,\xff\n", r"d.csv:2: line 2 is not UTF-8"),
  ("d.csv", b"instruction,instruction\nQ,A\n", "the column 'instruction' stands twice"),
  ("d.csv", b"instruction,output\n", "d.csv has no rows"),
  ("d.csv", b"\n\ninstruction;output\nQ;A;B\n", r"d.csv:4: it has 3 cells"),
  ("d.csv", b"", "d.csv is empty|d.csv has no rows"),
  ("d.parquet", parquet([{"odd": 1}]), r"d.parquet:1: unknown record shape"),
  ("d.parquet", parquet([*PAIRS[:2], {"id": None}]), r"d.parquet:3: 'instruction' must be a string"),
]


@pytest.mark.parametrize(("name", "data", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_files_end_in_one_line(tmp_path, name, data, message):
  with pytest.raises(UserError, match=message) as caught:
    load_records(written(tmp_path / name, data))
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_a_table_without_rows_is_refused(tmp_path):
  pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "d.parquet")
  with pytest.raises(UserError, match="d.parquet has no rows"):
    load_records(f"file:{tmp_path / 'd.parquet'}")


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow", "stream.arrow", "d.jsonl.gz", "d.jsonl.zst", "d.csv"])
def test_flipped_bits_are_read_or_told(tmp_path, name):
  whole, draws = (ANY | TEXTS)[name](PAIRS * 3), random.Random(0)
  for _ in range(60):
    data = bytearray(whole)
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    try:
      load_records(written(tmp_path / name, bytes(data)), bad=BadRecords(skip=True))
    except UserError as error:
      assert "\n" not in str(error)


def test_bad_rows_are_left_out_and_the_others_stay(tmp_path):
  bad = BadRecords(skip=True)
  spec = written(tmp_path / "d.csv", b"instruction,output\nQ,A,B\nQ2,A2\n\xff,A\nQ3,A3\n")
  assert [record.line for record in load_records(spec, bad=bad)] == [3, 5]
  assert [entry["place"].rpartition(":")[2] for entry in bad.kept] == ["2", "4"]


# --- reading piece by piece


VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
  max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, max_size=6), st.integers(1, 40), st.booleans(), st.sampled_from([None, 1]))
def test_arrays_in_pieces_are_whole_arrays(tmp_path_factory, values, piece, wrapped, indent):
  values = [{"n": i, "v": value} for i, value in enumerate(values)]
  path = tmp_path_factory.mktemp("pieces") / "d.json"
  path.write_text(json.dumps({"data": values} if wrapped and values else values, indent=indent, ensure_ascii=False))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(json_files, "_PIECE", piece)
    found = list(json_files.json_items(check_data_file(path), {}, BadRecords()))
  assert [item.value for item in found] == values
  lines = path.read_text().split("\n")
  assert all(lines[item.line - 1].lstrip(' [,{"dat:').startswith(("n", '"n', "")) for item in found)


def test_records_that_begin_with_a_list_are_lines(tmp_path):
  rows = [{"examples": [{"a": i}], "prompt": f"Q{i}", "response": "A"} for i in range(3)]
  records = load_records(written(tmp_path / "d.jsonl", json_lines(rows)))
  assert len(records) == 3 and records[0].unread == ("examples",)


@pytest.mark.parametrize("cut", range(1, 60))
def test_an_array_that_ends_too_early_is_refused(tmp_path, cut):
  path = tmp_path / "d.json"
  whole = '[{"a": "x\\u00e9", "b": [1.5e3, true, null]}, {"a": "y"}]'
  path.write_text(whole[: min(cut, len(whole) - 1)])
  with pytest.raises(UserError, match="d.json:1: broken JSON array"):
    list(json_files.json_items(check_data_file(path), {}, BadRecords()))


def test_a_large_table_is_read_in_batches(tmp_path):
  path, count = tmp_path / "d.parquet", 200_000
  text = pa.array(["x" * 200 + str(i) for i in range(count)])
  pq.write_table(pa.table({"prompt": text, "response": text}), path, row_group_size=100_000, compression="zstd")
  del text
  before, peak, line = pa.total_allocated_bytes(), 0, 0
  for item in tables.table_items(check_data_file(path), {}, BadRecords()):
    line += 1
    assert item.line == line
    if not line % 500:
      peak = max(peak, pa.total_allocated_bytes() - before)
  assert line == count
  assert peak < 16e6, f"{peak / 1e6:.0f} MB of a table of 82 MB"


# --- folders, patterns, standard input


def test_a_folder_is_all_of_its_data_in_order(tmp_path):
  (tmp_path / "data").mkdir()
  written(tmp_path / "data/b.parquet", parquet(PAIRS[1:2]))
  written(tmp_path / "data/a.jsonl.gz", gzip.compress(json_lines(PAIRS[:1])))
  written(tmp_path / "data/c.csv", quoted(PAIRS[2:]))
  for other in ("README.md", ".hidden.jsonl", "_SUCCESS", "dataset_info.json"):
    (tmp_path / "data" / other).write_text("{}")
  patterns = (f"{tmp_path}/data/[abc]*", f"jsonl:{tmp_path}/**/*.[jpc]*")
  for spec in (str(tmp_path), f"file:{tmp_path}/data", *patterns):
    records = load_records(spec)
    assert [record.example_id for record in records] == ["7", "08", "c"]
    assert len({name_of(record) for record in records}) == 1 and len({record.source for record in records}) == 3
  assert len(load_records(f"{tmp_path}/data/[ab]*+{tmp_path}/data/c*")) == 3


def test_what_is_read_of_a_folder_and_what_is_not_is_told(tmp_path, caplog):
  for name in ("b.jsonl", "a.jsonl"):
    written(tmp_path / name, json_lines(PAIRS[:1]))
  for name in ("README.md", "LICENSE"):
    (tmp_path / name).write_text("{}")
  with caplog.at_level("INFO"):
    load_records(str(tmp_path))
    load_records(f"{tmp_path}/a.json*")
  told = f"{tmp_path}: reads 2 data files (2 .jsonl): a.jsonl, b.jsonl; skips 2 other files (1 without ending, 1 .md)"
  assert caplog.messages == [told, f"{tmp_path}/a.json*: reads 1 data file (1 .jsonl): {tmp_path}/a.jsonl"]


def test_splits_are_not_mixed_without_a_word(tmp_path):
  for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
    written(tmp_path / f"{name}.jsonl", json_lines(PAIRS[:1]))
  with pytest.raises(UserError, match=r"several splits \(test, train\), which would become one"):
    load_records(str(tmp_path))
  assert len(load_records(f"{tmp_path}/train*")) == 2


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({}, "is an empty folder; data files end in .jsonl"),
    ({"a.png": b"", "b.txt": b""}, r"2 other files \(1 .png, 1 .txt\) and no data file"),
    (
      {"a.json": b"", "b.csv": b""} | {f"{number}.log": b"" for number in range(21)},
      r"holds 2 data files \(1 .json, 1 .csv\), such as a.json, among 21 other files \(21 .log\), so it is no folder",
    ),
    ({"adapter_config.json": b"{}"}, "a folder with an adapter"),
    ({"config.json": b"{}", "model.safetensors": b""}, "with a model, which goes into --model=hf:FOLDER"),
    ({"manifest.json": b"{}", "coreset.jsonl": b""}, "of a select run; its selection is coreset.jsonl"),
    ({"a.jsonl": b"version https://git-lfs.github.com/spec/v1\n"}, "a.jsonl is a Git LFS pointer"),
    ({"dataset_info.json": b"{}", "state.json": b"{"}, "state.json cannot be read"),
    ({"dataset_info.json": b"{}", "state.json": b'{"_data_files": [{"filename": "../x"}]}'}, "outside its folder"),
    ({"dataset_dict.json": b'{"splits": ["train", "test"]}'}, r"holds the splits train, test; name one: .*/train"),
    ({"dataset_dict.json": b'{"splits": ["train"]}'}, "names a split 'train', which is not there"),
  ],
)
def test_folders_that_are_not_read(tmp_path, files, message):
  for name, data in files.items():
    (tmp_path / name).write_bytes(data)
  with pytest.raises(UserError, match=message):
    load_records(f"file:{tmp_path}")


def test_a_saved_data_set_is_read_in_its_own_order(tmp_path):
  folder = tmp_path / "saved/train"
  folder.mkdir(parents=True)
  names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
  for name, rows in zip(names, (PAIRS[:2], PAIRS[2:]), strict=True):
    (folder / name).write_bytes(arrow(rows, stream=True))
  (folder / "cache-1.arrow").write_bytes(arrow(PAIRS, stream=True))
  (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
  (folder / "dataset_info.json").write_text("{}")
  (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train"]}')
  for path in (tmp_path / "saved", folder):
    assert [record.example_id for record in load_records(str(path))] == ["7", "08", "c"]


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl.gz", "d.csv"])
def test_standard_input_is_read_once_and_can_be_used_again(tmp_path, monkeypatch, name):
  (tmp_path / name).write_bytes((ANY | TEXTS)[name](PAIRS))
  folders._standard_input.cache_clear()
  with (tmp_path / name).open() as stream:
    monkeypatch.setattr("sys.stdin", stream)
    for spec in ("-", "own=-*1", "file:-"):
      assert len(load_records(spec)) == 3
  assert load_records("-")[0].place.startswith("standard input:")
  folders._standard_input.cache_clear()


# --- names and shares


def test_names_are_in_front_of_ids(tmp_path):
  one = written(tmp_path / "one.jsonl", json_lines(PAIRS + PAIRS[:1]))
  two = written(tmp_path / "two.jsonl", json_lines([row | {"output": "else"} for row in PAIRS]))
  ids = [record.example_id for record in load_records(f"a={one}+b={two}+chatterbot:food")]
  assert ids[:7] == ["a:7", "a:08", "a:c", "a:7-2", "b:7", "b:08", "b:c"] and ":" not in ids[-1]
  plain = [record.example_id for record in load_records(f"{one}+chatterbot:food")]
  assert plain == [record.example_id for record in load_records(one) + load_records("chatterbot:food")]
  assert {name_of(record) for record in load_records(f"a={one}+{two}")} == {"a", str(tmp_path / "two.jsonl")}
  named = load_records("talk=chatterbot:food")
  assert named[0].example_id.startswith("talk:") and named[0].raw == load_records("chatterbot:food")[0].raw


@settings(max_examples=200, deadline=None)
@given(
  st.text(alphabet=st.sampled_from("ab=+*:.-/5[?"), max_size=12), st.sampled_from(["", "jsonl:", "hub:", "x=file:"])
)
def test_any_text_names_sources_or_is_told(text, word):
  try:
    found = sources_of(word + text)
  except UserError as error:
    assert "\n" not in str(error)
    return
  for source in found:
    assert 0 < source.share <= 1 and source.place in word + text and source.name in word + text


def test_columns_can_be_named_by_the_name_of_a_source(tmp_path):
  one = written(tmp_path / "one.jsonl", json_lines([{"q": "Q1", "a": "A1"}]))
  two = written(tmp_path / "two.csv", b"frage,antwort\nQ2,A2\n")
  fields = f"x=prompt=q,response=a;{two}=prompt=frage,response=antwort"
  assert [r.messages[0]["content"] for r in load_records(f"x={one}+{two}", fields)] == ["Q1", "Q2"]
  check_fields(fields, [f"x={one}+{two}"])
  with pytest.raises(UserError, match=f"no source 'x'; the sources: {one}"):
    check_fields(fields, [f"{one}+{two}"])


def test_a_share_is_drawn_by_content(tmp_path):
  rows = [{"prompt": f"Q{i}", "response": "A"} for i in range(100)]
  spec = written(tmp_path / "d.jsonl", json_lines(rows + rows[:50]))
  whole = {record.example_id for record in load_records(spec)}
  drawn = {share: load_records(f"{spec}*{share}") for share in ("0.1", ".5", "0.90", "1", "1e-9")}
  sizes = {share: len({record.content_key for record in records}) for share, records in drawn.items()}
  assert sizes == {"0.1": 10, ".5": 50, "0.90": 90, "1": 100, "1e-9": 1}
  keys = {share: {record.example_id for record in records} for share, records in drawn.items()}
  assert keys["0.1"] < keys[".5"] < keys["0.90"] < keys["1"] == whole  # ids are those of the whole source
  back = written(tmp_path / "back.jsonl", json_lines(rows[::-1]))
  assert {r.content_key for r in load_records(f"{back}*.5")} == {r.content_key for r in drawn[".5"]}
  half = load_records(f"chatterbot:food+{spec}*0.5")
  assert len(half) == len(load_records("chatterbot:food")) + len(drawn[".5"])


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ("{0}*2", r"d.jsonl\*2: a source is never repeated, so that its share is at most 1"),
    ("{0}*0", "a share of 0 leaves nothing of it; leave the source out"),
    ("a={0}+a={0}", "two sources are called 'a'"),
    ("{0}*0.5+{0}", "two sources are called .*; give each its own name"),
    ("a={0}.nothing*0.5", "d.jsonl.nothing: no such file"),
    ("{1}/*.nothing", "no file fits this pattern"),
    ("a=csv:x", "unknown data source 'csv:x'"),
  ],
)
def test_mistakes_in_names_and_shares(tmp_path, spec, message):
  path = written(tmp_path / "d.jsonl", json_lines(PAIRS))
  with pytest.raises(UserError, match=message):
    load_records(spec.format(path, tmp_path))


@pytest.mark.parametrize("name", ["a=b.jsonl", "x*0.5", "a+b.jsonl", "one=jsonl", "[1].jsonl"])
def test_a_path_that_is_there_is_taken_as_it_is(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  (tmp_path / name).write_bytes(json_lines(PAIRS))
  for spec in (name, f"jsonl:{name}", f"file:{tmp_path / name}"):
    assert [record.example_id for record in load_records(spec)] == ["7", "08", "c"]
