"""Renders records by a tokenizer's chat template: the text, its responses, and what of a record is not rendered."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable
from typing import Any

from in2core_jax.data.quoting import Quoting
from in2core_jax.data.records import Record
from in2core_jax.data.responses import Rendered, Responses
from in2core_jax.data.template_program import DEFAULT_DATE, TemplateRefusal
from in2core_jax.errors import UserError


class Renderer:
  """Renders records with the chat template of a tokenizer, under one choice of the system prompt.

  Attributes:
    notes: what the template did not render as it stands in the records so far: {words: turns}.
  """

  def __init__(self, tokenizer: Any, system_prompt: str, date: str | None = None):
    """Reads the template.

    Args:
      tokenizer: a transformers fast tokenizer with a chat template.
      system_prompt: "default", "none" or a text, see `tokenizing.tokenize`.
      date: what the template is told that today is, YYYY-MM-DD; None: `DEFAULT_DATE`.

    Raises:
      UserError: no chat template or none to choose, a slow tokenizer, a template that cannot be used.
    """
    self._sources = _sources(tokenizer)
    if not tokenizer.is_fast:
      raise UserError(
        "the tokenizer is not a fast one (tokenizer.json), so it cannot tell which text a token came from"
      )
    self.tokenizer, self._system_prompt, self._date = tokenizer, system_prompt, date or DEFAULT_DATE
    self.notes: collections.Counter = collections.Counter()
    self._changed: dict[int, set[str]] = collections.defaultdict(set)  # content keys of what is rendered as one text
    self._layouts: dict[str, Responses] = {}
    self._quoting = Quoting(tokenizer)
    self._layout(False)

  def _layout(self, with_tools: bool) -> Responses:
    source = self._sources[with_tools]
    if source not in self._layouts:
      try:
        self._layouts[source] = Responses(source, self.tokenizer, self._system_prompt, self._date)
      except TemplateRefusal as refusal:
        raise UserError(
          f"the tokenizer's chat template cannot be used: {refusal}; correct it, or take another model"
        ) from refusal
    return self._layouts[source]

  @property
  def date(self) -> str | None:
    """The date that the template prints; None where it has asked for none."""
    return self._date if any(layout.program.date_used for layout in self._layouts.values()) else None

  def __call__(self, record: Record) -> Rendered:
    """Renders a record and finds its responses.

    Raises:
      TemplateRefusal: the template refuses the conversation or does not render a part of it, or the responses cannot
        be told from the template's words.
    """
    tools = record.tools
    rendered = self._layout(bool(tools)).spans(record.messages, tools)
    if any(rendered.notes.values()):
      self.notes.update(rendered.notes)
      self._changed[hash(rendered.text)].add(record.content_key)
    return rendered

  def told(self) -> dict[str, Any]:
    """What there is to tell of the template: `date` that it prints, `changes` and `alike` (`data_summary`)."""
    changes = {words: count for words, count in sorted(self.notes.items()) if words and count}
    alike = sum(len(keys) for keys in self._changed.values() if len(keys) > 1)
    found = {"date": self.date, "changes": changes, "alike": alike}
    return {key: value for key, value in found.items() if value}

  def spells_control_token(self, record: Record) -> bool:
    """Whether a text of the record contains the name of a control token."""
    return any(self._quoting.spells(text) for text in _texts([*record.messages, *record.tools]))

  def encode_quoted(
    self, record: Record, text: str, most: int | None = None
  ) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenises the rendering `text` of a record with control tokens only where the template wrote them.

    The record is rendered once more with its control words between two characters that occur nowhere, which tells the
    template's words and the record's apart. Only the first `most` characters are tokenised, where they are given.

    Returns:
      Token ids, and the characters [start, end) of `text` that each came from.

    Raises:
      TemplateRefusal: the template rewrites texts that spell control tokens, or the tokenizer makes a control token
        from plain text.
    """
    tools = record.tools
    marks = self._quoting.marks(text)
    change = lambda value: self._quoting.mark(value, marks)  # noqa: E731
    try:
      marked = (
        self._layout(bool(tools)).spans(_mapped(list(record.messages), change), _mapped(list(tools), change)).text
      )
    except TemplateRefusal:
      marked = ""
    quoted = self._quoting.places(marked, marks)
    if re.sub(f"[{marks[0]}{marks[1]}]", "", marked) != text:
      raise TemplateRefusal(
        f"it contains the control token {self._found(record)!r} as text, and the chat template rewrites texts, so the "
        "two cannot be distinguished; remove it from the data"
      )
    encoded = self._quoting.encode(text[:most], quoted)
    if encoded is None:
      raise TemplateRefusal(
        f"it contains the control token {self._found(record)!r} as text, which this tokenizer cannot write in other "
        "tokens; remove it from the data"
      )
    return encoded

  def _found(self, record: Record) -> str:
    texts = _texts([*record.messages, *record.tools])
    return next(filter(None, map(self._quoting.spells, texts)))


def _sources(tokenizer: Any) -> tuple[str, str]:
  """The tokenizer's templates for conversations without tools and with them."""
  template = getattr(tokenizer, "chat_template", None)
  if not template:
    raise UserError(
      "the tokenizer has no chat template, so its model was not made for conversations; use an instruction-tuned "
      "model, or add a chat_template to its tokenizer_config.json"
    )
  if isinstance(template, dict) and isinstance(template.get("default"), str):
    return template["default"], template.get("tool_use") or template["default"]
  if isinstance(template, dict):
    names = ", ".join(map(repr, sorted(template)))
    raise UserError(
      f"the tokenizer has several chat templates ({names}) and none of the name 'default': leave the right one alone "
      "as chat_template in its tokenizer_config.json"
    )
  if not isinstance(template, str):
    raise UserError(f"the tokenizer's chat_template is no text but {type(template).__name__}; correct its files")
  return template, template


def _texts(value: Any) -> list[str]:
  """All texts in a JSON value."""
  if isinstance(value, str):
    return [value]
  children = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
  return [text for child in children for text in _texts(child)]


def _mapped(value: Any, change: Callable[[str], str], key: str = "") -> Any:
  """A JSON value with its texts and the names of its keys changed, but for roles."""
  if isinstance(value, str):
    return value if key == "role" else change(value)
  if isinstance(value, dict):
    return {change(name): _mapped(child, change, name) for name, child in value.items()}
  return [_mapped(child, change) for child in value] if isinstance(value, (list, tuple)) else value
