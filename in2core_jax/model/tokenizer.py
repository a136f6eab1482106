"""Tokenizers as transformers fast tokenizers: from the vocabulary in a GGUF file, or from a Hugging Face folder."""

from __future__ import annotations

import collections
import json
import pathlib
import re
from typing import Any

import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers

from in2core_jax.data.tokenizer_errors import told_by_tokenizers
from in2core_jax.errors import UserError, how_many
from in2core_jax.model.gguf_cuts import CUTS, Cut
from in2core_jax.model.gguf_file import Place, read_gguf
from in2core_jax.model.model_files import read_object

# tokenizer.ggml.token_type: control and user-defined tokens are never made by merging, but matched in the text as they
# are.
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
_MOST_IDS = 2**24  # the library walks through all ids up to the largest, which would take minutes
_TOKEN_TYPES = frozenset(range(7))  # with 0 undefined, 2 unknown, 5 unused

# Gemma 3's own turn format, for files of its vocabulary that carry no template (those of pre-trained models): the
# system message is folded into the first user turn.
GEMMA_TEMPLATE = (
  "{{ bos_token }}"
  "{% if messages[0].role == 'system' %}"
  "{% set prefix = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}"
  "{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}"
  "{% for turn in turns %}"
  "{% if (turn.role == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
  "{{ '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\n' }}"
  "{{ (prefix if loop.first else '') + (turn.content | trim) + '<end_of_turn>\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


_GGUF_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def tokenizer_from_gguf(place: Place) -> transformers.PreTrainedTokenizerFast:
  """Builds the tokenizer that a GGUF file describes: byte-level BPE, or SentencePiece's BPE with scores.

  Args:
    place: a `.gguf` file with `tokenizer.ggml.model` "gpt2" and a known `tokenizer.ggml.pre`, or with "llama" and no
      space put in front.

  Returns:
    The tokenizer, with the file's chat template (Gemma's, where the vocabulary is Gemma's and the file has none) and
    bos, eos, pad and unk tokens. Control tokens in a text are recognised as such; they are never added by themselves.

  Raises:
    UserError: no such file, not a GGUF file, no vocabulary in it, or a tokenizer of an unknown kind.
  """
  file = read_gguf(place)
  path, metadata = file.path, file.metadata
  kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
  if kind not in ("gpt2", "llama"):
    raise UserError(
      f"{path}: tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level BPE) and 'llama' (SentencePiece) can be read "
      "from GGUF; use the model's Hugging Face folder"
    )
  if kind == "gpt2" and not (isinstance(cut, str) and cut in CUTS):
    raise UserError(
      f"{path}: tokenizer.ggml.pre is {cut!r}; known: {', '.join(CUTS)}; use the model's Hugging Face folder"
    )
  if kind == "llama" and metadata.get("tokenizer.ggml.add_space_prefix", True):
    raise UserError(
      f"{path}: its SentencePiece vocabulary needs a space in front of every text, which is not supported; use the "
      "model's Hugging Face folder"
    )
  _check_vocabulary(path, metadata, "merges" if kind == "gpt2" else "scores")
  with told_by_tokenizers(f"{path}: the tokenizer cannot be made"):
    backend = _byte_level_bpe(metadata, CUTS[cut]) if kind == "gpt2" else _scored_bpe(metadata)
    _add_whole_tokens(backend, metadata)
  vocabulary = metadata["tokenizer.ggml.tokens"]
  named = {
    role: vocabulary[metadata[f"tokenizer.ggml.{key}_token_id"]]
    for role, key in _GGUF_ROLES.items()
    if f"tokenizer.ggml.{key}_token_id" in metadata
  }
  is_gemma = kind == "llama" and {"<start_of_turn>", "<end_of_turn>"} <= set(vocabulary)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    chat_template=metadata.get("tokenizer.chat_template", GEMMA_TEMPLATE if is_gemma else None),
    clean_up_tokenization_spaces=False,
    **named,
  )


def _check_vocabulary(path: Any, metadata: dict[str, Any], ranks: str) -> None:
  """Looks at all that the tokenizer is made of before it is made.

  Args:
    path: of the file, for messages.
    metadata: of the file.
    ranks: what decides the merges: "merges" or "scores".

  Raises:
    UserError: a list is missing, has another kind of entries or another length than the tokens; a token stands twice; a
      special token's id is no token; the template is no text.
  """
  kinds = {"tokens": str, "token_type": int, "merges": str, "scores": float}
  lists = {key: metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", ranks)}
  for key, values in lists.items():
    if not isinstance(values, list) or not values:
      raise UserError(f"{path}: the file has no tokenizer.ggml.{key}, so no tokenizer; use another file")
    wrong = next((value for value in values if type(value) is not kinds[key]), None)
    if wrong is not None or (key == "scores" and not np.isfinite(values).all()):
      what = "NaN or infinite" if wrong is None else repr(wrong)[:40]
      raise UserError(f"{path}: tokenizer.ggml.{key} holds {what}; the file is damaged, use another one")
    if key != "merges" and len(values) != len(lists["tokens"]):
      raise UserError(
        f"{path}: tokenizer.ggml.{key} has {how_many(len(values), 'entr[y|ies]')} for "
        f"{how_many(len(lists['tokens']), 'token')}; use another file"
      )
  strange = set(lists["token_type"]) - _TOKEN_TYPES
  if strange:
    raise UserError(
      f"{path}: tokenizer.ggml.token_type holds {min(strange)}, which is no kind of token; use another file"
    )
  tokens = lists["tokens"]
  if len(set(tokens)) < len(tokens):
    twice = collections.Counter(tokens).most_common(1)[0][0]
    raise UserError(f"{path}: the token {twice!r} stands twice in tokenizer.ggml.tokens; use another file")
  for name in [f"tokenizer.ggml.{key}_token_id" for key in _GGUF_ROLES.values()]:
    if name in metadata and (type(metadata[name]) is not int or not 0 <= metadata[name] < len(tokens)):
      raise UserError(
        f"{path}: {name} is {metadata[name]!r}, but the tokens are 0 to {len(tokens) - 1}; use another file"
      )
  if not isinstance(metadata.get("tokenizer.chat_template", ""), str):
    raise UserError(f"{path}: tokenizer.chat_template is not a text; use another file")
  if ranks == "scores" and "tokenizer.ggml.unknown_token_id" not in metadata:
    raise UserError(f"{path}: the file has no tokenizer.ggml.unknown_token_id, which its kind needs; use another file")


def _byte_level_bpe(metadata: dict[str, Any], cut: Cut) -> tokenizers.Tokenizer:
  vocabulary = metadata["tokenizer.ggml.tokens"]
  # Both sides of a merge are written in the byte alphabet, which has no space: the one space divides them.
  merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
  words = {token: i for i, token in enumerate(vocabulary)}
  backend = tokenizers.Tokenizer(models.BPE(words, merges, ignore_merges=cut.whole_words))
  backend.pre_tokenizer = cut.parts()
  if cut.composed:
    backend.normalizer = normalizers.NFC()
  backend.decoder = decoders.ByteLevel()
  return backend


def _scored_bpe(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
  """SentencePiece's BPE: of all neighbours whose union is a token, those of the highest score are merged first.

  The same as a list of merges: every cut of a token in two tokens, in the order of the token's score. Spaces are
  written as U+2581; a character that is no token becomes the tokens of its UTF-8 bytes.
  """
  vocabulary, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
  scored = zip(vocabulary, kinds, metadata["tokenizer.ggml.scores"], strict=True)
  scores = {token: score for token, kind, score in scored if kind == _NORMAL}
  merges = []
  for token, score in scores.items():
    for i in range(1, len(token)):
      if token[:i] in scores and token[i:] in scores:
        merges.append((score, i, token[:i], token[i:]))
  merges.sort(key=lambda merge: merge[:2], reverse=True)
  model = models.BPE(
    {token: i for i, token in enumerate(vocabulary)},
    [merge[2:] for merge in merges],
    unk_token=vocabulary[metadata["tokenizer.ggml.unknown_token_id"]],
    fuse_unk=True,
    byte_fallback=_BYTE in kinds,
  )
  backend = tokenizers.Tokenizer(model)
  backend.normalizer = normalizers.Replace(" ", "\u2581")
  backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
  return backend


def _add_whole_tokens(backend: tokenizers.Tokenizer, metadata: dict[str, Any]) -> None:
  kinds = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
  whole = [(token, kind) for token, kind in kinds if kind in (_CONTROL, _USER_DEFINED)]
  backend.add_special_tokens(
    [tokenizers.AddedToken(t, special=True, normalized=False) for t, k in whole if k == _CONTROL]
  )
  backend.add_tokens(
    [tokenizers.AddedToken(t, special=False, normalized=False) for t, k in whole if k == _USER_DEFINED]
  )


_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_from_dir(path: str | pathlib.Path) -> transformers.PreTrainedTokenizerFast:
  """Reads the tokenizer of a Hugging Face folder; nothing is downloaded and no code of the folder is run.

  The ids are those of `tokenizer.json`, whatever class `tokenizer_config.json` names: transformers rebuilds the
  tokenizers of some classes by rules of the class, which can differ from the file's.

  Args:
    path: a folder with `tokenizer.json`; special tokens and the chat template come from the files beside it, where they
      are: `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`, `chat_template.json`,
      `additional_chat_templates/`.

  Returns:
    The fast tokenizer. Its `chat_template` is a text, or {name: text} with "default" where there are several.

  Raises:
    UserError: no such folder, no `tokenizer.json` in it, files that cannot be read or contradict each other, or named
      templates of which none is the default.
  """
  folder = pathlib.Path(path).expanduser()
  if not folder.is_dir():
    raise UserError(f"{path}: no such folder; give a Hugging Face model folder with tokenizer.json")
  file = folder / "tokenizer.json"
  if not file.is_file():
    entries = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
    raise UserError(f"{folder}: no tokenizer.json (found: {entries}); save the model's fast tokenizer there")
  content = _read(file)
  if not isinstance(content.get("model"), dict):
    raise UserError(f"{file} has no 'model', so it is no tokenizer; save the tokenizer again")
  _check_content(file, content)
  with told_by_tokenizers(f"{file}: the tokenizer cannot be loaded"):
    whole = _with_whole_offsets(content.get("post_processor"))
    if whole == content.get("post_processor"):
      backend = tokenizers.Tokenizer.from_file(str(file))
    else:
      backend = tokenizers.Tokenizer.from_str(json.dumps(content | {"post_processor": whole}))
  _check_added(file, content, backend)
  # Cutting and padding are state that a tokenizer may have been saved in; they are no part of its ids.
  backend.no_truncation()
  backend.no_padding()
  config = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the later one decides
    if (folder / name).is_file():
      config |= {key: value for key, value in _read(folder / name).items() if value is not None}
  _add_configured_tokens(backend, config, folder)
  roles, template = _role_tokens(backend, config, folder), _chat_template(folder, config)
  with told_by_tokenizers(f"{folder}: the tokenizer cannot be used"):
    tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **roles
    )
  tokenizer.template_tokens = _template_tokens(backend, config, folder, template)
  return tokenizer


def _with_whole_offsets(part: Any) -> Any:
  """A post-processor that leaves offsets as they are; trimmed, a token of spaces would come from no character."""
  if isinstance(part, dict):
    return {key: False if key == "trim_offsets" else _with_whole_offsets(value) for key, value in part.items()}
  return [_with_whole_offsets(value) for value in part] if isinstance(part, list) else part


def _read(file: pathlib.Path) -> dict[str, Any]:
  return read_object(file, "save the tokenizer again")


def _check_content(file: pathlib.Path, content: dict[str, Any]) -> None:
  """Refuses what the tokenizers library would accept and make other tokens of, or end the whole process at.

  Raises:
    UserError: merges dropped at random, a prefix that merges do not have (the library aborts), an id for two tokens.
  """
  model = content["model"]
  if model.get("dropout"):
    raise UserError(
      f"{file}: its model has dropout={model['dropout']}, so that tokens are drawn at random; set it to null"
    )
  prefix, merges = model.get("continuing_subword_prefix"), model.get("merges") or []
  if isinstance(prefix, str) and prefix and model.get("type") == "BPE":
    seconds = [merge[-1] if isinstance(merge, list) and merge else str(merge).rpartition(" ")[2] for merge in merges]
    if not all(str(second).startswith(prefix) for second in seconds):
      raise UserError(f"{file}: continuing_subword_prefix is {prefix!r}, which its merges do not have; save it again")
  vocabulary = model.get("vocab")
  if isinstance(vocabulary, dict):
    ids = [value for value in vocabulary.values() if isinstance(value, int)]
    if len(set(ids)) < len(vocabulary):
      raise UserError(f"{file}: tokens of its vocabulary share an id, or have none; save the tokenizer again")
    if max(ids, default=0) >= _MOST_IDS:
      raise UserError(
        f"{file}: a token has the id {max(ids)}, more than any vocabulary holds; save the tokenizer again"
      )


def _check_added(file: pathlib.Path, content: dict[str, Any], backend: tokenizers.Tokenizer) -> None:
  """Refuses added tokens that the library has put elsewhere than the file says."""
  for token in content.get("added_tokens") or ():
    if backend.token_to_id(token["content"]) != token["id"]:
      raise UserError(
        f"{file} gives the added token {token['content']!r} the id {token['id']}, but by its order it is "
        f"{backend.token_to_id(token['content'])}; save the tokenizer again"
      )


def _token_text(value: Any, what: str) -> str:
  """The text of a token that is written as a string or as an object."""
  text = value.get("content") if isinstance(value, dict) else value
  if not isinstance(text, str):
    raise UserError(f"{what} is {str(value)[:80]!r}, neither a string nor an object with 'content'")
  return text


def _add_configured_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], folder: pathlib.Path) -> None:
  """Adds the tokens of tokenizer_config.json that tokenizer.json lacks, under the ids that the former gives them.

  Raises:
    UserError: the two files give a token different ids.
  """
  where = folder / "tokenizer_config.json"
  listed = config.get("added_tokens_decoder", {})
  if not isinstance(listed, dict) or not all(str(key).isdecimal() and len(str(key)) < 10 for key in listed):
    raise UserError(f"{where}: added_tokens_decoder must be an object of ids and tokens; save the tokenizer again")
  for key, value in sorted(listed.items(), key=lambda item: int(item[0])):
    text = _token_text(value, f"{where}: the added token {key}")
    known = backend.token_to_id(text)
    if known is None:
      flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
      given = {name: bool(value[name]) for name in flags if isinstance(value, dict) and name in value}
      backend.add_tokens([tokenizers.AddedToken(text, **given)])
      known = backend.token_to_id(text)
    if known != int(key):
      raise UserError(
        f"{where} gives the token {text!r} the id {key}, but by tokenizer.json it is {known}: the two files are not of "
        "one tokenizer; save it again"
      )


def _role_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], folder: pathlib.Path) -> dict[str, str]:
  """{role: token} of the special tokens that tokenizer.json knows.

  Raises:
    UserError: the beginning or the end of a text has a token that tokenizer.json does not know.
  """
  found = {}
  for role in _ROLES:
    if role not in config:
      continue
    text = _token_text(config[role], f"{folder}: {role} in the tokenizer's files")
    if backend.token_to_id(text) is not None:
      found[role] = text
    elif role in ("bos_token", "eos_token"):  # a chat template may write these; nothing of ours needs the others
      raise UserError(
        f"{folder}: the tokenizer's files name {text!r} as {role}, and tokenizer.json does not know it; save the "
        "tokenizer again"
      )
  return found


def _template_tokens(
  backend: tokenizers.Tokenizer, config: dict[str, Any], folder: pathlib.Path, template: str | dict[str, str] | None
) -> dict[str, str]:
  """{name: token} of a model's own tokens, which its chat template may write: `eot_token`, say.

  Raises:
    UserError: the template names one that tokenizer.json does not know.
  """
  named = {key: value for key, value in config.items() if key.endswith("_token")}
  for key in ("model_specific_special_tokens", "extra_special_tokens"):
    named |= config[key] if isinstance(config.get(key), dict) else {}
  source, found = "".join(template.values() if isinstance(template, dict) else [template or ""]), {}
  for name, value in named.items():
    if not isinstance(value, str | dict) or name in ("bos_token", "eos_token"):
      continue
    text = _token_text(value, f"{folder}: {name} in the tokenizer's files")
    if backend.token_to_id(text) is not None:
      found[name] = text
    elif re.search(rf"\b{re.escape(name)}\b", source):
      raise UserError(
        f"{folder}: the chat template writes {name}, which is {text!r}, and tokenizer.json does not know it; save the "
        "tokenizer again"
      )
  return found


def _chat_template(folder: pathlib.Path, config: dict[str, Any]) -> str | dict[str, str] | None:
  """The chat template: files of its own come before tokenizer_config.json, as in transformers.

  Raises:
    UserError: something else than a text, or several named ones without a default.
  """
  named = {}
  inside, where = config.get("chat_template"), folder / "tokenizer_config.json"
  beside = folder / "chat_template.json"  # the place of multimodal models, whose processor has it
  if inside is None and beside.is_file():
    inside, where = _read(beside).get("chat_template"), beside
  if isinstance(inside, list) and all(isinstance(each, dict) and {"name", "template"} <= set(each) for each in inside):
    if len({str(each["name"]) for each in inside}) < len(inside):
      raise UserError(f"{where}: two chat templates have the same name; save the tokenizer again")
    inside = {each["name"]: each["template"] for each in inside}
  if isinstance(inside, str):
    named["default"] = inside
  elif isinstance(inside, dict):
    named |= inside
  elif inside is not None:
    raise UserError(f"{where}: chat_template is neither a text nor a list of named ones; save the tokenizer again")
  files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
  if (folder / "chat_template.jinja").is_file():
    files["default"] = folder / "chat_template.jinja"
  for name, file in files.items():
    try:
      named[name] = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
      raise UserError(f"{file} is not UTF-8 text ({error}); save the tokenizer again") from error
  for name, template in named.items():
    if not isinstance(name, str) or not isinstance(template, str):
      raise UserError(f"{where}: the chat template {str(name)[:40]!r} is not a text; save the tokenizer again")
  if named and "default" not in named:
    if len(named) > 1:
      raise UserError(
        f"{folder}: several chat templates ({', '.join(named)}) and none is named default; name one of them default in "
        f"{where.name}, or put it into chat_template.jinja"
      )
    return next(iter(named.values()))
  return named["default"] if len(named) == 1 else named or None
