"""Tokenizers as transformers fast tokenizers: from the vocabulary in a GGUF file, or from a Hugging Face folder."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from in2core_jax.errors import UserError
from in2core_jax.gguf_file import Place, read_gguf

# tokenizer.ggml.token_type: control and user-defined tokens are never made by merging, but matched in the text as they
# are.
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6

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


def _smollm_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
  """Digits one by one, then the split of GPT-2 into words with their leading space, then bytes."""
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )


def _gpt2_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
  """The split of GPT-2 into words with their leading space, then bytes."""
  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# `tokenizer.ggml.pre` -> how text is cut before merging. A wrong cut gives wrong tokens without any error, so a name
# that is not here is refused.
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
  "smollm": _smollm_pre_tokenizer,
  "gpt-2": _gpt2_pre_tokenizer,
}


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
  if kind == "gpt2" and cut not in _PRE_TOKENIZERS:
    raise UserError(
      f"{path}: tokenizer.ggml.pre is {cut!r}; known: {', '.join(_PRE_TOKENIZERS)}; use the model's Hugging Face folder"
    )
  if kind == "llama" and metadata.get("tokenizer.ggml.add_space_prefix", True):
    raise UserError(
      f"{path}: its SentencePiece vocabulary wants a space in front of every text, which is not supported; use the "
      "model's Hugging Face folder"
    )
  needed = ("tokens", "token_type", "merges" if kind == "gpt2" else "scores")
  missing = [key for key in needed if not metadata.get(f"tokenizer.ggml.{key}")]
  if missing:
    raise UserError(f"{path}: the file has no tokenizer.ggml.{missing[0]}, so no tokenizer; use another file")
  backend = _byte_level_bpe(metadata, _PRE_TOKENIZERS[cut]()) if kind == "gpt2" else _scored_bpe(metadata)
  _add_whole_tokens(backend, metadata)
  names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
  vocabulary = metadata["tokenizer.ggml.tokens"]
  named = {
    role: vocabulary[metadata[f"tokenizer.ggml.{key}_token_id"]]
    for role, key in names.items()
    if f"tokenizer.ggml.{key}_token_id" in metadata
  }
  is_gemma = kind == "llama" and {"<start_of_turn>", "<end_of_turn>"} <= set(vocabulary)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    chat_template=metadata.get("tokenizer.chat_template", GEMMA_TEMPLATE if is_gemma else None),
    clean_up_tokenization_spaces=False,
    **named,
  )


def _byte_level_bpe(metadata: dict[str, Any], pre_tokenizer: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
  vocabulary = metadata["tokenizer.ggml.tokens"]
  # Both sides of a merge are written in the byte alphabet, which has no space: the one space divides them.
  merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
  backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
  backend.pre_tokenizer = pre_tokenizer
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


def tokenizer_from_dir(path: str | pathlib.Path) -> transformers.PreTrainedTokenizerFast:
  """Reads the tokenizer of a Hugging Face folder; nothing is downloaded and no code of the folder is run.

  Args:
    path: a folder with `tokenizer.json` and `tokenizer_config.json`.

  Returns:
    The fast tokenizer.

  Raises:
    UserError: no such folder, no `tokenizer.json` in it, or one that cannot be read.
  """
  folder = pathlib.Path(path).expanduser()
  if not folder.is_dir():
    raise UserError(f"{path}: no such folder; give a Hugging Face model folder with tokenizer.json")
  if not (folder / "tokenizer.json").is_file():
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
    raise UserError(f"{folder}: no tokenizer.json (found: {found}); save the model's fast tokenizer there")
  try:
    # Parsed here first: for a broken file the tokenizers library raises a bare Exception, without the file's name.
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{folder / 'tokenizer.json'} is not JSON ({error}); save the tokenizer again") from error
  if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
    raise UserError(f"{folder / 'tokenizer.json'} has no 'model', so it is no tokenizer; save the tokenizer again")
  try:
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
  except (ValueError, OSError, KeyError) as error:
    detail = " ".join(str(error).split())[:300]
    raise UserError(f"{folder}: the tokenizer cannot be loaded ({detail}); check tokenizer_config.json") from error
