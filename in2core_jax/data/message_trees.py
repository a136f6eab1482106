"""Files of single messages that name their parents (OpenAssistant) -> conversations, one for each last answer.

A file is one of these when its first record has `message_id`, `parent_id`, `role` and `text`, or is a whole tree with
`message_tree_id` and `prompt`. Every path from a first message to an answer that no other answer follows is a
conversation, as in the trainers of that project, so a turn with several answers stands in several of them.
"""

from __future__ import annotations

import collections
import itertools
import json
import logging
from collections.abc import Iterator
from typing import Any

from in2core_jax.data.records import BadRecords, Item, shorten
from in2core_jax.data.turns import type_name
from in2core_jax.errors import how_many, printable

log = logging.getLogger(__name__)

_FLAT = frozenset(["message_id", "parent_id", "role", "text"])
_TREE = frozenset(["message_tree_id", "prompt"])
_READY = "ready_for_export"
_LONGEST = 1000  # messages of a conversation; each of them is kept once for every answer at its end
# What the project says of a message, beside its text, that is no part of the conversation.
_ABOUT = frozenset(
  ["message_id", "parent_id", "message_tree_id", "tree_state", "role", "text", "user_id", "created_date", "lang"]
  + ["review_count", "review_result", "deleted", "rank", "synthetic", "model_name", "detoxify", "emojis", "labels"]
  + ["replies", "events", "id"]
)


def assembled(items: Iterator[Item], bad: BadRecords) -> Iterator[Item]:
  """The items of one file, or the conversations that its messages make.

  Args:
    items: what the file holds.
    bad: gets messages that cannot be used.
  """
  first = next(items, None)
  if first is None:
    return iter(())
  items = itertools.chain([first], items)
  keys = first.value.keys() if isinstance(first.value, dict) else frozenset()
  if first.fields or not (keys >= _FLAT or (keys >= _TREE and isinstance(first.value["prompt"], dict))):
    return items
  return _Messages(bad).conversations(items)


class _Messages:
  """The messages of a file by their ids."""

  def __init__(self, bad: BadRecords):
    self._bad = bad
    self._of: dict[str, Item] = {}
    self._replies: dict[str | None, list[str]] = collections.defaultdict(list)
    self._left_out: collections.Counter[str] = collections.Counter()

  def conversations(self, items: Iterator[Item]) -> Iterator[Item]:
    """Reads all messages, then yields an item for each path that ends in an answer."""
    for item in items:
      if isinstance(item.value, dict) and item.value.keys() >= _TREE:
        self._read_tree(item)
      else:
        self._read(item, item.value)
    reached: set[str] = set()
    paths = list(self._paths(reached))
    inner = {name for path in paths for name in path[:-1]}
    yield from (self._conversation(path) for path in dict.fromkeys(paths) if path[-1] not in inner)
    for name, item in self._of.items():
      if name not in reached:
        parent = shorten(repr(item.value["parent_id"]))
        self._refuse(item, f"its parent {parent} is not in the file, or is left out; add it, or remove this message")
    for reason, count in self._left_out.items():
      log.info(
        "%s", printable(f"{item.source}: {how_many(count, 'message[s] [is|are]')} left out, with all replies: {reason}")
      )

  def _refuse(self, item: Item, reason: str) -> None:
    self._bad.read += 1
    self._bad.refuse(item.place, item.raw, reason)

  def _read_tree(self, item: Item) -> None:
    """Takes the messages of a nested tree, which hold their replies."""
    waiting: list[tuple[Any, Any]] = [(item.value["prompt"], None)]
    while waiting:
      message, parent = waiting.pop()
      if not isinstance(message, dict):
        self._refuse(item, f"a message of the tree is {type_name(message)}, not an object")
        return
      replies = message.get("replies") or []
      state = {"tree_state": item.value["tree_state"]} if "tree_state" in item.value else {}
      self._read(item, {key: own for key, own in message.items() if key != "replies"} | {"parent_id": parent} | state)
      replies = replies if isinstance(replies, list) else [replies]
      waiting += [(reply, message.get("message_id")) for reply in reversed(replies)]

  def _read(self, item: Item, value: Any) -> None:
    """Takes one message, unless it is not ready."""
    name = value.get("message_id") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name or "role" not in value or not isinstance(value.get("text"), str):
      self._refuse(item, "a message of a tree needs the texts 'message_id', 'parent_id' (or null), 'role' and 'text'")
      return
    if name in self._of:
      self._refuse(item, f"the message {shorten(name)!r} stands twice, first at {self._of[name].place}; remove one")
      return
    parent = value.get("parent_id") or None
    if parent is not None and not isinstance(parent, str):
      self._refuse(item, f"'parent_id' must be a string or null but is {type_name(parent)}")
      return
    self._of[name] = Item(value | {"parent_id": parent}, item.raw, item.source, item.line)
    self._replies[parent].append(name)

  def _not_ready(self, value: dict[str, Any]) -> str | None:
    """Why a message takes part in no conversation."""
    if value.get("tree_state") not in (None, "", _READY):
      return f"their tree is not {_READY}"
    if value.get("deleted") is True:
      return "they are deleted"
    return "they failed their review" if value.get("review_result") is False else None

  def _paths(self, reached: set[str]) -> Iterator[tuple[str, ...]]:
    """The ids of each path up to its last answer, depth first; `reached` gets those that are read or left out."""
    waiting: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in reversed(self._replies[None])]
    while waiting:
      name, before = waiting.pop()
      path = (*before, name)
      reached.add(name)
      item = self._of[name]
      reason = self._not_ready(item.value)
      if reason or len(path) > _LONGEST:
        self._left_out[reason or f"they come after {_LONGEST} messages"] += 1
        self._pass_over(name, reached)
        replies = []
      else:
        before = path
        replies = self._replies.get(name, [])
      waiting += [(reply, path) for reply in reversed(replies)]
      answers = [i for i, one in enumerate(before) if self._answers(one)] if not replies else []
      if answers:
        yield before[: answers[-1] + 1]

  def _answers(self, name: str) -> bool:
    return str(self._of[name].value["role"]).lower() == "assistant"

  def _pass_over(self, name: str, reached: set[str]) -> None:
    waiting = [name]
    while waiting:
      replies = self._replies.get(waiting.pop(), [])
      reached.update(replies)
      waiting += replies

  def _conversation(self, path: tuple[str, ...]) -> Item:
    rows = [self._of[name] for name in path]
    turns = [{"role": row.value["role"], "content": row.value["text"]} for row in rows]
    raw = json.dumps({"id": path[-1], "messages": turns}, ensure_ascii=False)
    # What else its messages say is read, told or refused like that of any turn.
    more = [{key: value for key, value in row.value.items() if key not in _ABOUT} for row in rows]
    turns = [turn | extra for turn, extra in zip(turns, more, strict=True)]
    return Item({"id": path[-1], "messages": turns}, raw, rows[-1].source, rows[-1].line)
