"""Control words inside texts: the tokens of a rendering in which only the template's own are control tokens.

A fast tokenizer cuts a text at control tokens first; what stands between them is normalised and cut on, and whether a
space is put in front depends on where in the whole text a piece stands. So nothing may be tokenised apart from the
rest. Instead the template's control words get other names of the same length, of private characters that do not occur
in the text, and the whole is tokenised by a copy of the tokenizer that knows the control tokens by these names alone:

    <s>[INST] What is </s>? [/INST]    ->    @@@[INST] What is </s>? [/INST]
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

_PRIVATE = range(0xF0000, 0xFFFFE)


class Quoting:
  """Knows a tokenizer's control words, and tokenises texts in which some of them are quoted."""

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.special and str(token.content)]
    self._words = sorted({str(token.content) for token in added}, key=len, reverse=True)
    self._ids = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    self._id_of = {str(token.content): id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    self._control = re.compile("|".join(map(re.escape, self._words)) or "(?!)")
    self._backends: dict[int, tuple[Tokenizer, np.ndarray]] = {}

  def spells(self, text: str) -> str | None:
    """The first control word in a text."""
    found = self._control.search(text)
    return found[0] if found else None

  @staticmethod
  def marks(text: str) -> tuple[str, str]:
    """Two characters that do not occur in a text."""
    free = (chr(code) for code in _PRIVATE if chr(code) not in text)
    return next(free), next(free)

  def mark(self, text: str, marks: tuple[str, str]) -> str:
    """Puts the control words in a text between two marks."""
    return self._control.sub(lambda found: marks[0] + found[0] + marks[1], text)

  def places(self, marked: str, marks: tuple[str, str]) -> set[int]:
    """Where the marked words begin once the marks are gone."""
    places, gone = set(), 0
    for found in re.finditer(f"{marks[0]}({self._control.pattern}){marks[1]}|[{marks[0]}{marks[1]}]", marked):
      start = found.start() - gone
      gone += len(found[0]) - len(found[1] or "")
      if found[1]:
        places.add(start)
    return places

  def encode(self, text: str, quoted: set[int]) -> tuple[list[int], list[tuple[int, int]]] | None:
    """Tokenises a text.

    Args:
      text: a rendering.
      quoted: where control words stand in it that are words.

    Returns:
      Token ids and the characters [start, end) of `text` that each came from; None where the tokenizer makes a control
      token from plain text, or plain text from a control token.
    """
    first = next(base for base in _PRIVATE[:: len(self._words)] if not _holds(text, base, len(self._words)))
    backend, ids = self._backend(first)
    places, plain, renamed = set(), set(), []

    def rename(found: re.Match) -> str:
      if found.start() not in quoted:
        renamed.append(found)
      (plain if found.start() in quoted else places).update(range(*found.span()))
      return found[0] if found.start() in quoted else _name(first, self._words.index(found[0]), found[0])

    encoded = backend.encode(self._control.sub(rename, text), add_special_tokens=False)
    tokens = ids[np.asarray(encoded.ids, np.int64)].tolist()
    for token, (start, end) in zip(tokens, encoded.offsets, strict=True):
      here = range(start, end)
      is_unknown = token == self._tokenizer.unk_token_id and plain.isdisjoint(here)
      if token in self._ids and places.isdisjoint(here) and not is_unknown:
        return None
    # Where the tokenizer asks more of a control word than its letters (`single_word`), its other name is plain text.
    made = {(token, at) for token, span in zip(tokens, encoded.offsets, strict=True) for at in range(*span)}
    if not all((self._id_of[word[0]], word.start()) in made for word in renamed):
      return None
    return tokens, encoded.offsets

  def _backend(self, first: int) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer with other names for its control tokens, and the token id of each of its ids."""
    if first not in self._backends:
      content = json.loads(self._tokenizer.backend_tokenizer.to_str())
      added = content["added_tokens"]
      content |= {"added_tokens": [t for t in added if not t["special"]], "truncation": None, "padding": None}
      backend = Tokenizer.from_str(json.dumps(content))
      names = {t["content"]: _name(first, self._words.index(t["content"]), t["content"]) for t in added if t["special"]}
      flags = ("single_word", "lstrip", "rstrip", "normalized")
      backend.add_special_tokens(
        [AddedToken(names[t["content"]], **{flag: t[flag] for flag in flags}) for t in added if t["special"]]
      )
      ids = np.arange(1 + max(backend.get_vocab(with_added_tokens=True).values()))
      for token in added:
        ids[backend.token_to_id(names.get(token["content"], token["content"]))] = token["id"]
      self._backends[first] = backend, ids
    return self._backends[first]


def _name(first: int, number: int, word: str) -> str:
  """Another name of a control word, as long as the word: so all characters keep their places."""
  return chr(first + number) * len(word)


def _holds(text: str, first: int, count: int) -> bool:
  return re.search(f"[{chr(first)}-{chr(first + count)}]", text) is not None
