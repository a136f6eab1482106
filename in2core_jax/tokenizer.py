"""Tokenizers as transformers fast tokenizers: from the vocabulary in a GGUF file, or from a Hugging Face folder."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from in2core_jax.errors import UserError
from in2core_jax.gguf_file import read_gguf

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type: never made by merging, but matched in the text as a whole


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


def tokenizer_from_gguf(path: str | pathlib.Path) -> transformers.PreTrainedTokenizerFast:
  """Builds the byte-level BPE tokenizer that a GGUF file describes.

  Args:
    path: a `.gguf` file with `tokenizer.ggml.model` "gpt2" and a known `tokenizer.ggml.pre`.

  Returns:
    The tokenizer, with the file's chat template and bos, eos, pad and unk tokens. Control tokens in a text are
    recognised as such; they are never added by themselves.

  Raises:
    UserError: no such file, not a GGUF file, no vocabulary in it, or a tokenizer of an unknown kind.
  """
  metadata = read_gguf(path).metadata
  kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
  if kind != "gpt2":
    raise UserError(
      f"{path}: tokenizer.ggml.model is {kind!r}; only 'gpt2' (byte-level BPE) can be read from GGUF; "
      "use the model's Hugging Face folder"
    )
  if cut not in _PRE_TOKENIZERS:
    raise UserError(
      f"{path}: tokenizer.ggml.pre is {cut!r}; known: {', '.join(_PRE_TOKENIZERS)}; use the model's Hugging Face folder"
    )
  missing = [key for key in ("tokens", "merges", "token_type") if not metadata.get(f"tokenizer.ggml.{key}")]
  if missing:
    raise UserError(f"{path}: the file has no tokenizer.ggml.{missing[0]}, so no tokenizer; use another file")
  backend = _byte_level_bpe(metadata, _PRE_TOKENIZERS[cut]())
  names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
  vocabulary = metadata["tokenizer.ggml.tokens"]
  named = {
    role: vocabulary[metadata[f"tokenizer.ggml.{key}_token_id"]]
    for role, key in names.items()
    if f"tokenizer.ggml.{key}_token_id" in metadata
  }
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    chat_template=metadata.get("tokenizer.chat_template"),
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
  kinds = zip(vocabulary, metadata["tokenizer.ggml.token_type"], strict=True)
  whole = [(token, kind) for token, kind in kinds if kind in (_CONTROL, _USER_DEFINED)]
  backend.add_special_tokens(
    [tokenizers.AddedToken(t, special=True, normalized=False) for t, k in whole if k == _CONTROL]
  )
  backend.add_tokens(
    [tokenizers.AddedToken(t, special=False, normalized=False) for t, k in whole if k == _USER_DEFINED]
  )
  return backend


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
