"""Tokenizers of Hugging Face folders: the ids of tokenizer.json, templates beside it, refusals."""

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from in2core_jax.data.tokenizing import Record, tokenize
from in2core_jax.errors import UserError
from in2core_jax.model.tokenizer import tokenizer_from_dir

WORDS = [
  "the",
  "Hel",
  "lo",
  "wor",
  "ld",
  "12",
  "é",
  "H",
  "e",
  "l",
  "o",
  "w",
  "r",
  "d",
  "t",
  "h",
  "1",
  "2",
  "3",
  ".",
  ",",
]
QWEN_CUT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_CUT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


def _byte_level(cut=None, normalizer=None, prefix_space=False):
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("1", "2"), ("Ã", "©"), ("Ġ", "Ġ")]
  tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate([*alphabet, *map("".join, merges)])}, merges))
  level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=cut is None)
  split = [] if cut is None else [pre_tokenizers.Split(Regex(cut), "isolated")]
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
  if normalizer:
    tokenizer.normalizer = normalizer
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _pieces(normalizer=None, pre_tokenizer=None):
  single = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *WORDS]
  merges = [("▁", "the"), ("Hel", "lo"), ("▁", "wor"), ("▁wor", "ld")]
  vocabulary = {t: i for i, t in enumerate([*single, *map("".join, merges)])}
  tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
  if normalizer:
    tokenizer.normalizer = normalizer
  if pre_tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizer
  return tokenizer


def _unigram():
  scored = [("<unk>", 0.0), ("▁", -2.0), *((word, -3.0 - i / 10) for i, word in enumerate(WORDS)), ("▁the", -2.5)]
  tokenizer = Tokenizer(models.Unigram(scored, 0, False))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
  return tokenizer


def _word_piece():
  tokenizer = Tokenizer(
    models.WordPiece({t: i for i, t in enumerate(["[UNK]", *WORDS, "##lo", "##ld"])}, unk_token="[UNK]")
  )
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  return tokenizer


def _word_level():
  tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(["<unk>", "Hello", *WORDS])}, unk_token="<unk>"))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  return tokenizer


_LLAMA2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
KINDS = {
  "gpt2": _byte_level,
  "gpt2 with a space": lambda: _byte_level(prefix_space=True),
  "qwen2": lambda: _byte_level(QWEN_CUT, normalizers.NFC()),
  "llama3": lambda: _byte_level(LLAMA3_CUT),
  "llama2": lambda: _pieces(_LLAMA2),
  "llama2, first": lambda: _pieces(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
  "gemma": lambda: _pieces(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")),
  "t5": _unigram,
  "bert": _word_piece,
  "word level": _word_level,
}
CLASSES = (
  *("Qwen2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "GemmaTokenizer", "T5Tokenizer"),
  *("BertTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "NobodysTokenizer", None),
)
TEXTS = (
  *("Hello world", " Hello", "  the  world ", "hello hello 12123\n\n the\t1,2.", "e\u0301 é naïve", "it's THE"),
  *(
    "<|im_start|>the<|im_end|>\nHello",
    "Hello<|im_start|> world",
    " <tool> Hello <tool>",
    "the<s>Hello</s> 12",
    "",
    "日本 🙂",
  ),
)


def write_folder(folder, tokenizer, config=None, whole=True):
  if whole:
    tokenizer.add_special_tokens(
      [AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>", "<s>", "</s>")]
    )
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True, normalized=True)])
  folder.mkdir(exist_ok=True)
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
  return folder


def ids_of(tokenizer, text):
  return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_file_whatever_class_is_named(tmp_path, kind):
  made = KINDS[kind]()
  made.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
  config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_prefix_space": True, "legacy": True}
  folder = write_folder(tmp_path / "model", made, config)
  made.enable_truncation(3)
  made.enable_padding(length=40)
  made.save(str(folder / "tokenizer.json"))  # state of whoever saved it, no part of the ids
  plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
  plain.no_truncation()
  plain.no_padding()
  for name in CLASSES:
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ({"tokenizer_class": name} if name else {})))
    loaded = tokenizer_from_dir(folder)
    for text in TEXTS:
      expected = plain.encode(text, add_special_tokens=False)
      found = loaded(text, add_special_tokens=False, return_offsets_mapping=True)
      assert found["input_ids"] == expected.ids, (name, text)
      assert found["offset_mapping"] == expected.offsets, (name, text)
  assert loaded.is_fast and (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")


def test_code_of_a_folder_is_never_run(tmp_path):
  config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}, "chat_template": "a"}
  folder = write_folder(tmp_path / "model", _word_level(), config)
  (folder / "mine.py").write_text("raise SystemExit(99)")
  assert ids_of(tokenizer_from_dir(folder), "Hello") == [1]


def test_tokens_of_the_configuration_join_those_of_the_file(tmp_path):
  folder = write_folder(tmp_path / "model", _word_level(), whole=False)
  size = len(tokenizer_from_dir(folder))
  write = lambda **config: (folder / "tokenizer_config.json").write_text(json.dumps(config))  # noqa: E731
  entry = {"content": "<call>", "special": True, "normalized": False}
  write(added_tokens_decoder={str(size): entry})
  assert ids_of(tokenizer_from_dir(folder), "Hello<call>Hello") == [1, size, 1]
  for key, value, message in (
    (str(size + 3), entry, r"the id \d+, but by tokenizer.json it is"),
    ("0", {"content": "Hello"}, "the id 0, but by tokenizer.json it is 1"),
    ("-1", entry, "must be an object of ids and tokens"),
    (str(size), 7, "neither a string nor an object"),
    (str(size), {"content": None}, "neither a string nor an object"),
  ):
    write(added_tokens_decoder={key: value})
    with pytest.raises(UserError, match=message):
      tokenizer_from_dir(folder)
  write(eos_token="<nobody>")
  with pytest.raises(UserError, match="name '<nobody>' as eos_token, and tokenizer.json does not know it"):
    tokenizer_from_dir(folder)
  write(pad_token="<nobody>", unk_token={"content": "<unk>"})
  assert tokenizer_from_dir(folder).unk_token == "<unk>"


def test_the_chat_template_is_found_where_models_keep_it(tmp_path):
  def loaded(config=None, files=()):
    folder = write_folder(tmp_path / "model", _word_level(), {"chat_template": config} if config is not None else {})
    for name, text in files:
      (folder / name).parent.mkdir(exist_ok=True)
      (folder / name).write_text(text)
    try:
      return tokenizer_from_dir(folder).chat_template
    finally:
      for name, _ in files:
        (folder / name).unlink()

  assert loaded() is None
  assert loaded("A") == "A"
  assert loaded("A", [("chat_template.jinja", "B")]) == "B"
  assert loaded(None, [("chat_template.json", '{"chat_template": "C"}')]) == "C"
  assert loaded("A", [("chat_template.json", '{"chat_template": "C"}')]) == "A"
  named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "T"}]
  assert loaded(named) == {"default": "A", "tool_use": "T"}
  assert loaded(named[:1]) == "A" and loaded([{"name": "only", "template": "O"}]) == "O"
  both = [("chat_template.jinja", "B"), ("additional_chat_templates/tool_use.jinja", "T")]
  assert loaded(None, both) == {"default": "B", "tool_use": "T"}
  for config, message in (
    ([{"name": "rag", "template": "R"}, {"name": "tool_use", "template": "T"}], "none is named default"),
    ({"rag": "R", "tool_use": "T"}, "none is named default"),
    ([{"name": "rag"}], "neither a text nor a list"),
    (7, "neither a text nor a list"),
    ({"default": 7}, "'default' is not a text"),
  ):
    with pytest.raises(UserError, match=message):
      loaded(config)


_GOOD = json.loads(_word_level().to_str())


_ADDED = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False) | {"content": "<new>"}
_BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}


def _with(**changes):
  return json.dumps(_GOOD | changes)


@pytest.mark.parametrize(
  "content",
  [
    *("", "[]", "null", "{", "\x00", "[" * 5000, '{"model":' * 3000, "7", '{"version": "1.0"}', '{"model": []}'),
    _with(model={"type": "Nothing"}),
    _with(model=_GOOD["model"] | {"vocab": {"a": -1}}),
    _with(model=_GOOD["model"] | {"vocab": {"a": 1e400}}),
    _with(model=_GOOD["model"] | {"vocab": ["a"]}),
    _with(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}),
    _with(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["abc"]}),
    _with(model={"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0]]}),
    _with(added_tokens=[{"id": -1, "content": "x"}]),
    _with(added_tokens={"id": 1}),
    _with(added_tokens=[_ADDED | {"id": 60000}]),
    _with(added_tokens=[_ADDED | {"id": 0}]),
    _with(model=_GOOD["model"] | {"vocab": {"a": 0, "b": 0}}),
    _with(model=_GOOD["model"] | {"vocab": {"a": 0, "b": 2**31}}),
    _with(model={"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "dropout": 0.5}),
    _with(model=_BPE | {"continuing_subword_prefix": "x"}),
    '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "model": {}}',
    _with(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    _with(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
  ],
)
def test_a_broken_tokenizer_file_is_one_line(tmp_path, content):
  folder = write_folder(tmp_path / "model", _word_level())
  (folder / "tokenizer.json").write_text(content)
  with pytest.raises(UserError, match="tokenizer") as told:
    tokenizer_from_dir(folder)
  assert "\n" not in str(told.value) and len(str(told.value)) < 900


def test_a_text_of_which_no_tokens_can_be_made_is_named(tmp_path):
  made = _word_level()
  made.pre_tokenizer = pre_tokenizers.FixedLength(0)
  config = {"chat_template": "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"}
  tokenizer = tokenizer_from_dir(write_folder(tmp_path / "model", made, config))
  messages = ({"role": "user", "content": "the"}, {"role": "assistant", "content": "12"})
  with pytest.raises(UserError, match=r"example 'e' .d.jsonl:3.: the tokenizer makes no tokens of it"):
    tokenize([Record("e", messages, "", "{}", "d.jsonl", 3)], tokenizer, 64)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.json"])
@pytest.mark.parametrize("content", ["{broken", "[]", "[" * 5000, "7", ""])
def test_a_broken_file_beside_it_is_named(tmp_path, name, content):
  folder = write_folder(tmp_path / "model", _word_level())
  (folder / name).write_text(content)
  with pytest.raises(UserError, match=name):
    tokenizer_from_dir(folder)


TRIMMING = [
  processors.ByteLevel(trim_offsets=True),
  processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True),
  processors.Sequence([processors.ByteLevel(trim_offsets=True)]),
]


@pytest.mark.parametrize("processor", TRIMMING)
def test_spaces_within_an_answer_are_learnt_where_the_file_trims_offsets(tmp_path, processor):
  tokenizer, text = _byte_level(), "if x:\n    hello  12   "
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  template = "{% for m in messages %}{{ m.role }}|{{ m.content }};{% endfor %}"
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
  record = Record("r", ({"role": "user", "content": "hello"}, {"role": "assistant", "content": text}), "", "{}", "m", 1)
  plain = tokenize([record], tokenizer_from_dir(tmp_path), 99)
  tokenizer.post_processor = processor
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  trimmed = tokenize([record], tokenizer_from_dir(tmp_path), 99)
  assert trimmed.tokens[0].tolist() == plain.tokens[0].tolist()
  assert trimmed.response_mask[0].tolist() == plain.response_mask[0].tolist()
  assert tokenizer.decode(plain.tokens[0][plain.response_mask[0]].tolist()) == f"{text};"


NAMED = [
  {"eot_token": "<|im_end|>"},
  {"extra_special_tokens": {"eot_token": "<|im_end|>"}},
  {"model_specific_special_tokens": {"eot_token": {"content": "<|im_end|>"}}},
]


@pytest.mark.parametrize("config", NAMED)
def test_a_template_writes_the_tokens_that_the_configuration_names(tmp_path, config):
  template = "{% for m in messages %}{{ m.role }}|{{ m.content }}{{ eot_token }}{% endfor %}"
  folder = write_folder(tmp_path / "model", _byte_level(), config | {"chat_template": template})
  messages = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "the"}
  tokenizer = tokenizer_from_dir(folder)
  found = tokenize([Record("r", messages, "", "{}", "m", 1)], tokenizer, 99)
  assert tokenizer.decode(found.tokens[0]) == "user|hello<|im_end|>assistant|the<|im_end|>"
  (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eot_token": "<|eot|>"}))
  with pytest.raises(UserError, match=r"the chat template writes eot_token, which is '<\|eot\|>'"):
    tokenizer_from_dir(folder)
