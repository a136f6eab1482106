"""Records -> chat template -> token ids with response mask; splits.

The response mask follows from the structure of the chat template (`template_layout`), never from searching the text for
a marker:

    <|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n
                                                           ^start         ^end (trailing white space is not response)

The whole rendering is tokenised once, and a token is a response token when its first character lies in [start, end).
So a text that itself contains `<|im_start|>assistant` cannot move the mask. Nor can it forge a turn: where a text
spells a control token, that is tokenised as plain characters (`quoting`).
"""

from __future__ import annotations

import array
import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from in2core_jax.data import ragged
from in2core_jax.data.chat_template import Renderer
from in2core_jax.data.records import (
  BadRecords,
  Record,
  content_keys,
  first_of,
  first_pair,
  first_plain,
  ids_of,
  topics_of,
)
from in2core_jax.data.responses import Rendered
from in2core_jax.data.sources import load_records
from in2core_jax.data.template_program import TemplateRefusal
from in2core_jax.data.tokenizer_errors import told_by_tokenizers
from in2core_jax.errors import UserError, how_many

__all__ = ["Record", "TokenizedDataset", "load_records", "split_records", "tokenize"]

_LONG = 2**17  # characters of a text that are tokenised in any case
_CHUNK = 256  # texts per call of the tokenizer: enough to spread its overhead; what comes out takes 300 bytes a token

_Encoding = tuple[list[int], list[tuple[int, int]]]  # token ids, the characters that each came from


@dataclasses.dataclass(frozen=True)
class TokenizedDataset:
  """N examples as token ids with response masks, ragged.

  Attributes:
    name: of the part: "train", "eval", "test".
    records: the N records; those of a data source lie on the disk.
    tokens: int32 [T_i] of each example.
    response_mask: bool [T_i] of each example. True: token t is a response token; it is predicted from position t - 1.
      Never True at t = 0.
    truncated: bool [N], whether tokens were cut off at the maximal length.
    template: what the chat template did to the whole part, as far as there is anything to tell: `date` that it prints,
      `changes` of what stands in the records {words: turns}, `alike` (different records that became one text).
    second: int64 [N] where the examples are preference pairs, else None: tokens and mask of an example are those of the
      chosen side, and from here on those of the rejected one.
  """

  name: str
  records: Sequence[Record]
  tokens: Sequence[np.ndarray]
  response_mask: Sequence[np.ndarray]
  truncated: np.ndarray
  template: dict[str, Any] = dataclasses.field(default_factory=dict)
  second: np.ndarray | None = None

  def __post_init__(self):
    sizes = {len(self.records), len(self.tokens), len(self.response_mask), len(self.truncated)}
    if len(sizes) != 1:
      raise ValueError(f"{self.name}: records, tokens, response_mask and truncated differ in length: {sorted(sizes)}")
    wrong = self.num_tokens != ragged.lengths_of(self.response_mask)
    wrong |= ragged.firsts_of(self.response_mask)
    if wrong.any():
      one = self.ids[int(np.argmax(wrong))]
      raise ValueError(f"{self.name}: example {one!r} has a response mask that does not fit its tokens")

  def __len__(self) -> int:
    return len(self.records)

  @property
  def ids(self) -> Sequence[str]:
    """The example ids, in order."""
    return ids_of(self.records)

  @property
  def topics(self) -> tuple[str, ...]:
    """The topic of each example, "" where it has none."""
    return topics_of(self.records)

  @property
  def copies(self) -> np.ndarray:
    """int64 [N], equal for examples whose records say the same (`first_of`)."""
    return first_of(self.records)

  @property
  def num_tokens(self) -> np.ndarray:
    """int32 [N], tokens of each example."""
    return ragged.lengths_of(self.tokens)

  @property
  def longest(self) -> int:
    """Tokens of the longest sequence; a preference pair has two."""
    sizes, first = self.num_tokens, self.second
    return int(np.max(sizes if first is None else np.maximum(first, sizes - first), initial=0))

  @property
  def num_response_tokens(self) -> np.ndarray:
    """int32 [N], response tokens of each example."""
    return ragged.counts_of(self.response_mask)

  def take(self, rows: Sequence[int]) -> TokenizedDataset:
    """Returns the examples `rows` (int [n]), in the order given."""
    rows = np.asarray(rows, np.int64).reshape(-1)
    return TokenizedDataset(
      self.name,
      ragged.taken(self.records, rows),
      ragged.taken(self.tokens, rows),
      ragged.taken(self.response_mask, rows),
      self.truncated[rows],
      self.template,
      None if self.second is None else self.second[rows],
    )


def split_records(
  records: Sequence[Record], fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
) -> tuple[Sequence[Record], Sequence[Record], Sequence[Record]]:
  """Splits the records into train, eval and test by a hash of their content.

  A record's part depends on its messages alone: not on its neighbours, its order or its id, so a grown file keeps its
  old split, and exact duplicates always fall into the same part.

  Args:
    records: N records.
    fractions: expected shares of the three parts; they add up to 1.

  Returns:
    (train, eval, test), each in source order.

  Raises:
    UserError: fractions that are negative or do not add up to 1.
  """
  if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
    raise UserError(f"fractions={tuple(fractions)} must be three shares of at least 0 that add up to 1")
  number = np.zeros(len(records), np.int8)
  for row, key in enumerate(content_keys(records)):
    place = int.from_bytes(hashlib.sha256(f"split/{key}".encode()).digest()[:8], "big") / 2**64
    number[row] = 0 if place < fractions[0] else 1 if place < fractions[0] + fractions[1] else 2
  return tuple(ragged.taken(records, np.flatnonzero(number == part)) for part in range(3))


def tokenize(
  records: Sequence[Record],
  tokenizer: Any,
  max_length: int,
  system_prompt: str = "default",
  name: str = "train",
  *,
  vocab_size: int | None = None,
  date: str | None = None,
  bad: BadRecords | None = None,
  on_chunk: Callable[[int], None] = lambda count: None,
) -> TokenizedDataset:
  """Renders records with the tokenizer's chat template and marks the response tokens.

  Args:
    records: N records.
    tokenizer: a transformers fast tokenizer with a chat template.
    max_length: tokens beyond this are cut off; of a preference pair, those of each side.
    system_prompt: "default" (what the template adds by itself), "none" (no system message), or the text of one. An
      example's own system message is kept in any case.
    name: of the part.
    vocab_size: rows of the model's embedding; None: not looked at.
    date: what a template that prints the date is told that today is, YYYY-MM-DD; None: always the same day.
    bad: takes the records that cannot be rendered (`refuse(place, raw, reason)`), which are left out then; None: the
      first one is an error.
    on_chunk: called with the number of records that are done, again and again.

  Returns:
    The N examples in the same order. An example whose response is missing or cut off has a mask of False only.

  Raises:
    UserError: no chat template, a template that refuses an example, a token that the embedding has no row for, or
      records of which none keeps a response token.
  """
  if max_length < 2:
    raise UserError(f"max_length={max_length} must be at least 2: one token to predict from and one to predict")
  if not isinstance(records, _Side) and first_pair(records) is not None:
    more = {"vocab_size": vocab_size, "date": date, "bad": bad, "on_chunk": on_chunk}
    return _pairs(records, name, lambda some: tokenize(some, tokenizer, max_length, system_prompt, name, **more))
  render = Renderer(tokenizer, system_prompt, date)
  kept, truncated = array.array("q"), array.array("b")
  tokens, masks = ragged.Growing(ragged.TokenIds), ragged.Growing(ragged.Masks)
  for count, done, encodings in _chunks(render, records, max_length, bad):
    for (row, record, rendered), (ids, offsets) in zip(done, encodings, strict=True):
      if render.spells_control_token(record):
        try:
          ids, offsets = _quoted(render, record, rendered.text, max_length)
        except TemplateRefusal as refusal:
          _refuse(record, refusal, bad)
          continue
      if vocab_size is not None and ids and max(ids) >= vocab_size:
        raise UserError(_beyond_embedding(record, ids, vocab_size, tokenizer))
      kept.append(row)
      tokens.append(ids[:max_length])
      masks.append(_response_mask(offsets[:max_length], rendered.spans, rendered.marked, rendered.text))
      truncated.append(len(ids) > max_length)
    on_chunk(count)
  whole = len(kept) == len(records) and not isinstance(records, list)
  there = records if whole else ragged.taken(records, np.array(kept, np.int64))
  found = tokens.done()
  dataset = TokenizedDataset(name, there, found, masks.done(beside=found), np.array(truncated, bool), render.told())
  if len(dataset) and not dataset.num_response_tokens.any():
    raise UserError(_nothing_to_learn(dataset, max_length))
  return dataset


def _chunks(
  render: Renderer, records: Sequence[Record], max_length: int, bad: BadRecords | None
) -> Iterator[tuple[int, list[tuple[int, Record, Rendered]], list[_Encoding]]]:
  """(number of records, what `_rendered` gives of them, its encodings), some records at a time.

  While a chunk is rendered and used, another thread encodes the next one: the tokenizer runs outside of Python's lock.
  """
  backend = render.tokenizer.backend_tokenizer  # transformers' own call copies all that comes out, most of it unused
  backend.no_truncation()
  backend.no_padding()
  backend.encode_special_tokens = render.tokenizer.split_special_tokens
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    ahead = None
    for start in range(0, len(records), _CHUNK):
      some = records[start : start + _CHUNK]
      done = list(_rendered(render, some, bad, start))
      before, ahead = ahead, (len(some), done, thread.submit(_encoded, backend, done, max_length))
      if before:
        yield *before[:2], before[2].result()
    if ahead:
      yield *ahead[:2], ahead[2].result()


def _quoted(render: Renderer, record: Record, text: str, max_length: int) -> _Encoding:
  """(ids, offsets) of a record that spells a control token, which stays the text that it is.

  Raises:
    TemplateRefusal: no tokens stand for that text.
  """
  with told_by_tokenizers(_no_tokens(record)):
    return _of_beginning(text, max_length, lambda beginning: render.encode_quoted(record, text, len(beginning)))


def _nothing_to_learn(dataset: TokenizedDataset, max_length: int) -> str:
  """Why no example of a part has a response token, as far as it is known."""
  changes = dataset.template.get("changes", {}).items()
  return (
    f"{dataset.name}: none of the {how_many(len(dataset), 'example')} has a response token within "
    f"max_length={max_length} ({int(dataset.truncated.sum()):,} truncated); raise max_length, or give data with "
    "responses" + "".join(f"; the chat template: {words} in {how_many(n, 'turn')}" for words, n in changes)
  )


def _pairs(
  records: Sequence[Record], name: str, side: Callable[[Sequence[Record]], TokenizedDataset]
) -> TokenizedDataset:
  """Preference pairs: both sides one after the other.

  A pair of which the cut leaves a side without response, or two sides that are equal, has no response token.

  Args:
    records: of one part.
    name: of the part.
    side: tokenises records of one conversation each.

  Raises:
    UserError: not all of them are pairs, or what `tokenize` refuses.
  """
  plain = first_plain(records)
  if plain is not None:
    raise UserError(
      f"the {name} set has conversations ({plain.place}) and preference pairs ({first_pair(records).place}): they have "
      "different losses; keep one kind"
    )
  chosen = side(_Side(records, lambda record: dataclasses.replace(record, rejected=())))
  other = lambda record: dataclasses.replace(record, messages=record.rejected, rejected=())  # noqa: E731
  rejected = side(_Side(chosen.records.pairs, other))
  places = {one: row for row, one in enumerate(chosen.ids)}
  chosen = chosen.take([places[one] for one in rejected.ids])  # without those whose rejected side is refused
  tokens, masks = ragged.Growing(ragged.TokenIds), ragged.Growing(ragged.Masks)
  for ours, theirs, won, lost in zip(
    chosen.tokens, rejected.tokens, chosen.response_mask, rejected.response_mask, strict=True
  ):
    differ = won.any() and lost.any() and not np.array_equal(ours, theirs)
    tokens.append(np.concatenate([ours, theirs]))
    masks.append(np.concatenate([won, lost]) & differ)
  found = tokens.done()
  return TokenizedDataset(
    name,
    chosen.records.pairs,
    found,
    masks.done(beside=found),
    chosen.truncated | rejected.truncated,
    _both_told(chosen.template, rejected.template),
    chosen.num_tokens.astype(np.int64),
  )


class _Side(Sequence):
  """One side of preference pairs, as records of conversations; made when they are asked for.

  Attributes:
    pairs: the whole pairs.
  """

  def __init__(self, pairs: Sequence[Record], side: Callable[[Record], Record]):
    self.pairs, self._side = pairs, side

  def __len__(self) -> int:
    return len(self.pairs)

  def __getitem__(self, index):
    return [*map(self._side, self.pairs[index])] if isinstance(index, slice) else self._side(self.pairs[index])

  def take(self, rows: np.ndarray) -> _Side:
    """Some of them."""
    return _Side(ragged.taken(self.pairs, rows), self._side)


def _both_told(chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
  """What the chat template did to either side."""
  changes = collections.Counter(chosen.get("changes", {})) + collections.Counter(rejected.get("changes", {}))
  return rejected | chosen | ({"changes": dict(changes)} if changes else {})


def _no_tokens(record: Record) -> str:
  return f"example {record.example_id!r} ({record.place}): the tokenizer makes no tokens of it"


def _beginning(max_length: int) -> int:
  """How many characters of a text are tokenised, when that gives enough tokens."""
  return max(_LONG, 64 * max_length)


def _of_beginning(text: str, max_length: int, encode: Callable[[str], _Encoding]) -> _Encoding:
  """Token ids and offsets of a text, at least `max_length` + 1 where it has so many.

  A token takes a hundred bytes and more on its way, so of a text of megabytes only the beginning is tokenised. What is
  cut off far behind the last token that counts changes none of those.
  """
  most = _beginning(max_length)
  ids, offsets = encode(text[:most])
  if len(text) <= most or (len(offsets) > max_length and offsets[max_length][1] < most - most // 4):
    return ids, offsets
  return encode(text)


def _encoded(backend: Tokenizer, done: Sequence[tuple[int, Record, Rendered]], max_length: int) -> list[_Encoding]:
  """`_of_beginning` of the renderings; where the tokenizer fails, its record is named."""

  def encode(some: Sequence[str]) -> list[_Encoding]:
    return [(one.ids, one.offsets) for one in backend.encode_batch(list(some), add_special_tokens=False)]

  texts = [rendered.text for _, _, rendered in done]
  short = [text for text in texts if len(text) <= _beginning(max_length)]
  try:
    with told_by_tokenizers("the tokenizer makes no tokens"):
      found = iter(encode(short))
      return [
        next(found)
        if len(text) <= _beginning(max_length)
        else _of_beginning(text, max_length, lambda t: encode([t])[0])
        for text in texts
      ]
  except UserError:
    for _, record, rendered in done:
      with told_by_tokenizers(_no_tokens(record)):
        encode([rendered.text])
    raise


def _beyond_embedding(record: Record, ids: Sequence[int], vocab_size: int, tokenizer: Any) -> str:
  worst = next(one for one in ids if one >= vocab_size)
  return (
    f"example {record.example_id!r} ({record.place}) holds the token {tokenizer.convert_ids_to_tokens(worst)!r} with "
    f"id {worst}, and the model's embedding has {vocab_size:,} rows (ids 0 to {vocab_size - 1}): tokenizer and model "
    "do not fit; enlarge the embedding (resize_token_embeddings) or use the model's own tokenizer"
  )


def _rendered(
  render: Renderer, records: Sequence[Record], bad: BadRecords | None, start: int
) -> Iterator[tuple[int, Record, Rendered]]:
  """(row, record, its rendering), rows from `start` on, but for those that are refused."""
  for row, record in enumerate(records, start):
    try:
      yield row, record, render(record)
    except TemplateRefusal as refusal:
      _refuse(record, refusal, bad)


def _refuse(record: Record, refusal: TemplateRefusal, bad: BadRecords | None) -> None:
  if bad is None:
    raise UserError(f"example {record.example_id!r} ({record.source}:{record.line}): {refusal}") from refusal
  bad.refuse(f"{record.source}:{record.line}", record.raw, str(refusal))


def _response_mask(
  offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], marked: bool = False, text: str = ""
) -> np.ndarray:
  """Marks the tokens of the responses: bool [T].

  Args:
    offsets: the characters [start, end) that each token came from.
    spans: the characters of each response.
    marked: False: a token is a response token when its first character lies in a span; the token that joins white
      space in front of a response to its first word is one too. True: the spans are those of `{% generation %}` marks,
      and a response has the tokens from that of its first character to the first one of its last character, as
      transformers counts.
    text: the rendering.
  """
  flat = itertools.chain.from_iterable(offsets)
  places = np.fromiter(flat, np.int64, 2 * len(offsets)).reshape(-1, 2)
  mask = np.zeros(len(places), bool)
  if marked:
    of = lambda at: np.flatnonzero((places[:, 0] <= at) & (at < places[:, 1]))  # noqa: E731
    for start, end in spans:
      first, last = of(start), of(end - 1)
      if not len(first):
        break  # cut off
      mask[first[0] : last[0] + 1 if len(last) and last[0] else len(mask)] = True
  else:
    for start, end in spans:
      mask |= (places[:, 0] >= start) & (places[:, 0] < end) & (places[:, 1] > places[:, 0])
      for i in np.flatnonzero((places[:, 0] < start) & (start < places[:, 1])):  # "Bot: " and "Me." with a token " Me"
        low, high = places[i].tolist()
        mask[i] |= start < end and not text[low:start].strip() and bool(text[start : min(high, end)].strip())
  mask[:1] = False  # nothing comes before the first token that could predict it
  return mask
