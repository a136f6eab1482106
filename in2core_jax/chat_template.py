"""Chat templates: renders conversations and finds the responses in what was rendered."""

from __future__ import annotations

import re
from typing import Any

import jinja2

from in2core_jax.errors import UserError
from in2core_jax.records import Messages, Record


class Renderer:
  """Renders messages with the chat template of a tokenizer, under one choice of the system prompt."""

  def __init__(self, tokenizer: Any, system_prompt: str):
    if not getattr(tokenizer, "chat_template", None):
      raise UserError(
        "the tokenizer has no chat template, so its model was not made for conversations; use an instruction-tuned "
        "model, or add a chat_template to its tokenizer_config.json"
      )
    if not tokenizer.is_fast:
      raise UserError(
        "the tokenizer is not a fast one (tokenizer.json), so it cannot tell which text a token came from"
      )
    self.tokenizer = tokenizer
    control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")
    self.system: Messages = ()
    self.strip, self.prepend = "", ""
    if system_prompt == "none":
      self._learn_empty_system()
    elif system_prompt != "default":
      self.system = ({"role": "system", "content": system_prompt},)

  def _learn_empty_system(self) -> None:
    """Finds out how to keep the template from adding a system message of its own.

    An explicit empty system message replaces the template's default; its own rendering, known from rendering it
    alone, is then cut off the front. A template that refuses or ignores a system message needs nothing of this.
    """
    empty = ({"role": "system", "content": ""},)
    probe = ({"role": "user", "content": "a"},)
    try:
      alone, together = self._apply(empty, False), self._apply((*empty, *probe), False)
    except jinja2.TemplateError:
      return
    bos = getattr(self.tokenizer, "bos_token", None) or ""
    # Where a system message renders as nothing by itself it is ignored, or folded into the first user turn (Gemma),
    # which an empty one would still change.
    if not alone.removeprefix(bos) or not together.startswith(alone):
      return
    self.system, self.strip = empty, alone
    # Some templates write a beginning-of-sequence token before the system message: that one has to stay.
    if bos and alone.startswith(bos) and not together[len(alone) :].startswith(bos):
      self.prepend = bos

  def _apply(self, messages: Messages, generation_prompt: bool) -> str:
    return self.tokenizer.apply_chat_template(
      list(messages), tokenize=False, add_generation_prompt=generation_prompt, continue_final_message=False
    )

  def __call__(self, messages: Messages, generation_prompt: bool = False) -> str:
    """Returns the rendering of `messages`, which must hold at least one turn that is not a system message."""
    if not self.system or messages[0]["role"] == "system":  # an example's own system message always stays
      return self._apply(messages, generation_prompt)
    text = self._apply((*self.system, *messages), generation_prompt)
    return self.prepend + text.removeprefix(self.strip)

  def spans(self, record: Record) -> tuple[str, list[tuple[int, int]]]:
    """Renders a record and finds its responses.

    Returns:
      The text, and [start, end) in characters of each assistant turn. Assistant turns before the first user turn
      answer nothing and are context.

    Raises:
      UserError: the template refuses the conversation, or renders a turn differently once more turns follow.
    """
    messages, where = record.messages, f"example {record.example_id!r} ({record.source}:{record.line})"
    try:
      text = self(messages)
      first_user = next((k for k, m in enumerate(messages) if m["role"] == "user"), len(messages))
      responses = [k for k in range(first_user, len(messages)) if messages[k]["role"] == "assistant"]
      spans = []
      for k in responses:
        before = self(messages[:k], generation_prompt=True)
        through = text if k + 1 == len(messages) else self(messages[: k + 1])
        if not (text.startswith(before) and text.startswith(through)) or len(before) > len(through):
          raise UserError(
            f"{where}: the chat template renders turn {k} differently when other turns follow, so the response tokens "
            "cannot be located; use single-turn data or a template that renders turn by turn"
          )
        spans.append((len(before), len(through.rstrip())))
    except jinja2.TemplateError as error:
      roles = " ".join(m["role"] for m in (*self.system, *messages))
      raise UserError(f"{where}: the chat template refuses the turns [{roles}]: {error}") from error
    return text, spans

  def spells_control_token(self, record: Record) -> bool:
    """Whether a text of the record contains the name of a control token."""
    return any(self._control.search(message["content"]) for message in record.messages)

  def encode_quoted(self, record: Record, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenises the rendering `text` of a record with control tokens only where the template wrote them.

    The template is rendered once more with numbered marks in place of the texts, which tells template and texts apart.

    Returns:
      Token ids, and the characters [start, end) of `text` that each came from.

    Raises:
      UserError: the template changes the texts by more than trimming them.
    """
    marked = [{"role": m["role"], "content": f"\ue000{i}\ue001"} for i, m in enumerate(record.messages)]
    pieces = re.split("\ue000([0-9]+)\ue001", self(tuple(marked)))  # template, number, template, ..., template
    texts = [m["content"] for m in record.messages]
    for change in (str, str.strip):
      pieces_now = [change(texts[int(piece)]) if i % 2 else piece for i, piece in enumerate(pieces)]
      if "".join(pieces_now) == text:
        break
    else:
      found = next(filter(None, map(self._control.search, texts)))[0]
      raise UserError(
        f"example {record.example_id!r} ({record.source}:{record.line}) contains the control token {found!r} as text, "
        "and the chat template rewrites texts, so the two cannot be told apart; remove it from the data"
      )
    ids, offsets, start = [], [], 0
    for i, piece in enumerate(pieces_now):
      encoded = self.tokenizer(
        piece, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=bool(i % 2)
      )
      ids += encoded["input_ids"]
      offsets += [(start + low, start + high) for low, high in encoded["offset_mapping"]]
      start += len(piece)
    return ids, offsets
