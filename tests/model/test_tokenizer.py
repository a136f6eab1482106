"""Tokenizers: a GGUF file written here, a Hugging Face folder, the embedded file; round trips and refusals."""

import dataclasses

import gguf
import jinja2
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from in2core_jax.data.assets import asset_path
from in2core_jax.errors import UserError
from in2core_jax.model import tokenizer
from in2core_jax.model.tokenizer import tokenizer_from_dir, tokenizer_from_gguf

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


PIECES = ["▁", "h", "e", "l", "o", "he", "ll", "lo", "ol", "llo", "▁he", "hello", "▁hello"]


def _write_sentencepiece_gguf(path, model="llama", leave_out=(), space_prefix=False):
  """Writes a vocabulary with scores: control tokens, two that are matched as they are, all bytes, a few pieces."""
  control = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
  whole, single = ["\n", "  "], [f"<0x{byte:02X}>" for byte in range(256)]
  tokens = [*control, *whole, *single, *PIECES]
  scores = {"lo": -6.0, "ol": -7.0, "llo": -1.0, "he": -2.0, "ll": -0.5, "▁he": -3.0, "hello": -4.0, "▁hello": -5.0}
  writer = gguf.GGUFWriter(str(path), "gemma3")
  writer.add_tokenizer_model(model)
  writer.add_token_list(tokens)
  if "scores" not in leave_out:
    writer.add_token_scores([scores.get(token, -1000.0) for token in tokens])
  writer.add_token_types([3] * len(control) + [4] * len(whole) + [6] * len(single) + [1] * len(PIECES))
  writer.add_bos_token_id(2)
  writer.add_eos_token_id(1)
  writer.add_unk_token_id(3)
  writer.add_pad_token_id(0)
  writer.add_add_space_prefix(space_prefix)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _write_gguf(path, pre="smollm", model="gpt2", leave_out=()):
  """Writes a vocabulary: three control tokens, one of the user's, all bytes, a few merges."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
  tokens = ["<|im_start|>", "<|im_end|>", "<file>", "<tab>", *alphabet, *(m.replace(" ", "") for m in merges)]
  writer = gguf.GGUFWriter(str(path), "llama")
  writer.add_tokenizer_model(model)
  if pre is not None:
    writer.add_tokenizer_pre(pre)
  if "tokens" not in leave_out:
    writer.add_token_list(tokens)
  if "merges" not in leave_out:
    writer.add_token_merges(merges)
  writer.add_token_types([3, 3, 3, 4] + [1] * (len(tokens) - 4))
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(1)
  writer.add_pad_token_id(1)
  writer.add_chat_template(TEMPLATE)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
  return _write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.fixture(scope="module")
def small(small_file):
  return tokenizer_from_gguf(small_file)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
  return tokenizer_from_gguf(_write_sentencepiece_gguf(tmp_path_factory.mktemp("gguf") / "pieces.gguf"))


def test_scores_decide_what_is_merged_first(pieces):
  cut = lambda text: pieces.convert_ids_to_tokens(pieces(text, add_special_tokens=False)["input_ids"])  # noqa: E731
  assert cut("hello hello") == ["hello", "▁hello"]
  assert cut("hell") == ["he", "ll"] and cut(" helo") == ["▁he", "lo"]
  # Neighbours that share a letter: lo before ol, wherever they stand.
  assert cut("lol") == ["lo", "l"] and cut("ollol") == ["o", "llo", "l"] and cut("oloh") == ["o", "lo", "h"]
  assert cut("  hello\n") == ["  ", "hello", "\n"]  # matched in the text as they are, before anything is merged
  assert cut("é") == ["<0xC3>", "<0xA9>"]
  assert cut("<end_of_turn>h") == ["<end_of_turn>", "h"]
  assert pieces("é h", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (0, 1), (1, 2), (2, 3)]
  assert (pieces.bos_token, pieces.eos_token, pieces.pad_token_id, pieces.unk_token_id) == ("<bos>", "<eos>", 0, 3)


WORDS = {"smollm": ["hello", "Ġ", "1", "2"], "llama-bpe": ["hello", "Ġ", "12"], "qwen2": ["hello", "Ġ", "1", "2"]}


@pytest.mark.parametrize(("pre", "words"), (WORDS | {"tekken": WORDS["qwen2"], "gpt-4o": WORDS["llama-bpe"]}).items())
def test_digits_stay_together_where_the_vocabulary_was_made_so(tmp_path, pre, words):
  tokenizer = tokenizer_from_gguf(_write_gguf(tmp_path / "g.gguf", pre=pre))
  assert tokenizer.convert_ids_to_tokens(tokenizer("hello 12")["input_ids"]) == words
  composed = tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]
  assert composed == (pre == "qwen2")


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁"), max_size=40))
def test_round_trip_of_any_text_in_pieces(pieces, text):
  assert pieces.decode(pieces(text, add_special_tokens=False)["input_ids"]) == text


def test_a_gemma_vocabulary_without_template_gets_gemmas(pieces):
  turns = [{"role": r, "content": f" {r} "} for r in ("system", "user", "assistant", "user")]
  expected = "<bos><start_of_turn>user\n system \n\nuser<end_of_turn>\n<start_of_turn>model\nassistant<end_of_turn>\n"
  assert pieces.apply_chat_template(turns[:3], tokenize=False) == expected
  question = "<start_of_turn>user\nuser<end_of_turn>\n<start_of_turn>model\n"
  assert pieces.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == expected + question
  for wrong in (turns[2:], turns[1:2] * 2):
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
      pieces.apply_chat_template(wrong, tokenize=False)


def test_merges_digits_and_control_tokens(small):
  assert isinstance(small, transformers.PreTrainedTokenizerFast)
  pieces = small.convert_ids_to_tokens(small("hello hello 12<|im_end|>", add_special_tokens=False)["input_ids"])
  # The merge "1 2" is in the file, but digits are cut apart before merging.
  assert pieces == ["hello", "Ġhello", "Ġ", "1", "2", "<|im_end|>"]
  assert small("<file>hello<tab>")["input_ids"][::2] == [2, 3]  # control tokens without a role, and the user's own
  assert small.decode(small("<file>hello<tab>")["input_ids"], skip_special_tokens=True) == "hello<tab>"
  assert small("hello")["input_ids"] == small("hello", add_special_tokens=False)["input_ids"]  # nothing added
  assert (small.bos_token, small.eos_token, small.pad_token_id) == ("<|im_start|>", "<|im_end|>", 1)
  assert small.decode(small("hello<|im_end|>")["input_ids"], skip_special_tokens=True) == "hello"


def test_gpt2_cut_keeps_digits_together(tmp_path):
  tokenizer = tokenizer_from_gguf(_write_gguf(tmp_path / "g.gguf", pre="gpt-2"))
  assert tokenizer.convert_ids_to_tokens(tokenizer("12")["input_ids"]) == ["12"]


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_round_trip_of_any_text(small, text):
  assert small.decode(small(text, add_special_tokens=False)["input_ids"]) == text


def test_chat_template_comes_from_the_file(small):
  assert small.chat_template == TEMPLATE
  messages = [{"role": "user", "content": "hello"}]
  assert small.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nhello<|im_end|>\n"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"pre": "viking"}, r"pre is 'viking'; known: smollm, gpt-2, llama-bpe"),
    ({"pre": None}, r"pre is None; known: smollm"),
    ({"model": "bert"}, r"model is 'bert'; only 'gpt2' .* and 'llama'"),
    ({"model": "llama"}, "needs a space in front of every text"),
    ({"leave_out": ("tokens",)}, r"no tokenizer.ggml.tokens"),
    ({"leave_out": ("merges",)}, r"no tokenizer.ggml.merges"),
  ],
)
def test_unknown_kinds_are_refused(tmp_path, change, message):
  with pytest.raises(UserError, match=message):
    tokenizer_from_gguf(_write_gguf(tmp_path / "g.gguf", **change))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"space_prefix": True}, "needs a space in front of every text"),
    ({"leave_out": ("scores",)}, r"no tokenizer.ggml.scores"),
  ],
)
def test_unknown_kinds_of_pieces_are_refused(tmp_path, change, message):
  with pytest.raises(UserError, match=message):
    tokenizer_from_gguf(_write_sentencepiece_gguf(tmp_path / "g.gguf", **change))


def test_not_a_gguf_file(tmp_path):
  with pytest.raises(UserError, match="no such GGUF file"):
    tokenizer_from_gguf(tmp_path / "missing.gguf")
  (tmp_path / "text.gguf").write_text("this is not a model, only a text")
  with pytest.raises(UserError, match="not a GGUF file"):
    tokenizer_from_gguf(tmp_path / "text.gguf")


def test_saved_folder_gives_the_same_tokens(small, tmp_path):
  small.save_pretrained(tmp_path)
  again = tokenizer_from_dir(tmp_path)
  text = "<|im_start|>user\nhello 2024, naïve 東京 🙂<|im_end|>\n"
  assert again(text, add_special_tokens=False)["input_ids"] == small(text, add_special_tokens=False)["input_ids"]
  assert again.chat_template == TEMPLATE
  assert (again.eos_token_id, again.pad_token_id) == (1, 1)


def test_folder_errors(tmp_path):
  with pytest.raises(UserError, match="no such folder"):
    tokenizer_from_dir(tmp_path / "missing")
  (tmp_path / "model.safetensors").write_bytes(b"")
  with pytest.raises(UserError, match=r"no tokenizer.json \(found: model.safetensors\)"):
    tokenizer_from_dir(tmp_path)
  (tmp_path / "tokenizer.json").write_text('{"version": ')
  with pytest.raises(UserError, match="tokenizer.json: broken JSON"):
    tokenizer_from_dir(tmp_path)
  (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
  with pytest.raises(UserError, match="has no 'model'"):
    tokenizer_from_dir(tmp_path)
  backend = Tokenizer(models.BPE({"a": 0}, []))
  backend.decoder = decoders.ByteLevel()
  backend.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text("{broken")
  with pytest.raises(UserError, match="tokenizer_config.json"):
    tokenizer_from_dir(tmp_path)


@pytest.mark.real
def test_embedded_tokenizer():
  tokenizer = tokenizer_from_gguf(asset_path("smollm2-135m-instruct-q4_1"))
  assert len(tokenizer) == 49152
  ids = tokenizer("The capital of France is Paris.", add_special_tokens=False)["input_ids"]
  assert tokenizer.convert_ids_to_tokens(ids) == ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis", "ĠParis", "."]
  assert tokenizer.convert_ids_to_tokens(tokenizer("in 1969")["input_ids"]) == ["in", "Ġ", "1", "9", "6", "9"]
  for text in ["naïve 東京 🙂🏽", "a\u2028b\r\n\tc", "x = [1,2]  # two", " lead and trail "]:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
    1,
    2,
    2,
    0,
  )
  assert tokenizer("<|im_start|>user\n")["input_ids"] == [1, tokenizer.convert_tokens_to_ids("user"), 198]


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("bos_token_id", 10**9, "bos_token_id is 1000000000, but the tokens are 0 to"),
    ("eos_token_id", -1, "eos_token_id is -1"),
    ("padding_token_id", 1.0, "padding_token_id is 1.0"),
    ("unknown_token_id", "x", "unknown_token_id is 'x'"),
    ("tokens", ["a", "a"], "2 tokens|entries for 2"),
    ("tokens", "abc", "no tokenizer.ggml.tokens"),
    ("tokens", [1, 2], "tokens holds 1"),
    ("token_type", [3], "token_type has 1 entry"),
    ("token_type", ["x"], "token_type holds 'x'"),
    ("merges", [7], "merges holds 7"),
    ("merges", ["no space at all nowhere"], "cannot be made"),
    ("merges", ["alone"], "cannot be made"),
    ("chat_template", 7, "chat_template is not a text"),
  ],
)
def test_absurd_values_of_a_gguf_vocabulary_are_refused(small_file, monkeypatch, key, value, message):
  read = tokenizer.read_gguf(small_file)
  name = f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}"
  changed = dataclasses.replace(read, metadata=read.metadata | {name: value})
  monkeypatch.setattr(tokenizer, "read_gguf", lambda place: changed)
  with pytest.raises(UserError, match=message):
    tokenizer_from_gguf(small_file)


def test_scores_that_are_no_numbers_and_tokens_that_stand_twice_are_refused(tmp_path, monkeypatch):
  read = tokenizer.read_gguf(_write_sentencepiece_gguf(tmp_path / "pieces.gguf"))
  tokens = read.metadata["tokenizer.ggml.tokens"]
  for key, value, message in (
    ("scores", [float("nan")] * len(tokens), "scores holds NaN"),
    ("tokens", [*tokens[:-1], tokens[0]], "'<pad>' stands twice"),
  ):
    changed = dataclasses.replace(read, metadata=read.metadata | {f"tokenizer.ggml.{key}": value})
    monkeypatch.setattr(tokenizer, "read_gguf", lambda place, changed=changed: changed)
    with pytest.raises(UserError, match=message):
      tokenizer_from_gguf(tmp_path)
