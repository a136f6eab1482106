"""How a byte-level vocabulary of a GGUF file is applied to a text, by its `tokenizer.ggml.pre`."""

import dataclasses
from collections.abc import Callable

import tokenizers
from tokenizers import pre_tokenizers


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


def _split_pre_tokenizer(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
  """The parts of a text that match, then bytes."""
  return lambda: pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


# Words as byte-level BPE of today cuts them: how many digits stay together, whether small letters follow capital ones.
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str, digits: str) -> str:
  """Capital letters and small ones behind them, as tekken and GPT-4o cut words."""
  words = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{a}{_LOWER}{b}{ending}" for a, b in (("*", "+"), ("+", "*"))]
  return "|".join([*words, digits]) + _REST.replace(r"[\r\n]*", r"[\r\n/]*")


@dataclasses.dataclass(frozen=True)
class Cut:
  """How a byte-level vocabulary is applied.

  Attributes:
    parts: cuts a text before merging.
    whole_words: a part that is a token is that token, whatever the merges say.
    composed: characters are composed first (NFC).
  """

  parts: Callable[[], pre_tokenizers.PreTokenizer]
  whole_words: bool = False
  composed: bool = False


# `tokenizer.ggml.pre` -> how text is cut. A wrong cut gives wrong tokens without any error, so a name that is not here
# is refused.
CUTS: dict[str, Cut] = {
  "smollm": Cut(_smollm_pre_tokenizer),
  "gpt-2": Cut(_gpt2_pre_tokenizer),
  "llama-bpe": Cut(_split_pre_tokenizer(_LLAMA3), whole_words=True),
  "llama3": Cut(_split_pre_tokenizer(_LLAMA3), whole_words=True),
  "llama-v3": Cut(_split_pre_tokenizer(_LLAMA3), whole_words=True),
  "dbrx": Cut(_split_pre_tokenizer(_LLAMA3)),  # Phi-4
  "qwen2": Cut(_split_pre_tokenizer(_QWEN2), composed=True),
  "tekken": Cut(_split_pre_tokenizer(_cased("", r"\p{N}")), whole_words=True),
  "gpt-4o": Cut(_split_pre_tokenizer(_cased(_SHORT + "?", r"\p{N}{1,3}"))),  # Phi-4-mini
}
