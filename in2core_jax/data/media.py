"""Pictures, sound and films in a record: keys and values that are them, words in a text that stand for them.

None of them can be read, and an example without its picture teaches to invent what is in it. So a key with media
refuses the record, and a placeholder that no such key explains is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from in2core_jax.data.key_names import snake
from in2core_jax.errors import UserError

IN_A_TEXT = " in a text"  # behind a placeholder, among the keys that nobody reads

_MEDIUM = r"(image|img|picture|photo|pic|video|audio|pixel|screenshot|attachment)s?"
_MEDIA = re.compile(
  rf"(\w+_)?{_MEDIUM}(_?(path|url|uri|file|name|data|byte|b64|base64|value|content)s?)?|media|multi_?media"
)
_MEDIA_COUNT = re.compile(r"(num|n)_\w+|\w+_(count|id|caption|description|width|height)")
_FILE = re.compile(
  r"\S{1,2000}\.(png|jpe?g|gif|bmp|webp|tiff?|heic|wav|mp3|flac|ogg|oga|m4a|aac|opus|mp4|avi|mov|mkv|webm)", re.I
)
_DATA_URI = re.compile(r"data:(?:image|audio|video)/[\w.+-]{1,40};base64", re.I)
_WORD = r"(?:image|img|video|audio|sound|speech|picture)"
_PLACEHOLDER = re.compile(
  rf"<\|?{_WORD}(?:[_-]?(?:pad|placeholder|token|soft_token|start|end|bos|eos|here))?(?:[_-]?\d{{1,4}})?\|?>"
  rf"|<(?:start|end)_of_{_WORD}>|<\|vision_(?:start|end|pad)\|>|\[IMG\]|\[IMAGE\]|{_DATA_URI.pattern}",
  re.I,
)
_SIGNS = re.compile(r"<[|\w]|\[I|;base64").search


def is_medium(key: str) -> bool:
  """Whether a key names pictures, sound or films."""
  name = snake(key)
  return _MEDIA.fullmatch(name) is not None and not _MEDIA_COUNT.fullmatch(name)


def placeholders(messages: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
  """The words in texts that stand for pictures, sound or films; numbers in them as N, so that there are few."""
  texts = (message["content"] for message in messages)
  # Most texts have none: one look for a character is fifty times as fast as the pattern.
  found = (word[0] for text in texts if _SIGNS(text) for word in _PLACEHOLDER.finditer(text))
  return tuple(dict.fromkeys(re.sub(r"\d+", "N", word.lower()) for word in found))


def refuse_key(
  key: str, value: Any, words: Iterable[str] = (), where: str = "the record", none_known: bool = True
) -> None:
  """Refuses pictures, sound and films.

  Args:
    key, value: of a record, a turn or a part of its content.
    words: placeholders in the texts: with them, a path of a picture is no mere source.
    where: for the message.
    none_known: whether the key is not known to be without meaning.

  Raises:
    UserError: the key names media, or holds some, and they are there.
  """
  if (is_medium(key) and isinstance(value, str | list | dict)) or ((none_known or any(words)) and _is_media(value)):
    raise UserError(f"{where} has {key!r}: images, audio and video cannot be read; remove such records, or the column")


def _is_media(value: Any) -> bool:
  """Whether a value is the name of such a file, or the file: alone, in a list, or in an object with its path or URL."""
  if isinstance(value, list):
    return bool(value) and all(map(_is_media, value))
  if isinstance(value, dict):
    return any(_is_media(value.get(key)) for key in ("path", "url", "file", "data"))
  return isinstance(value, str) and bool(_FILE.fullmatch(value.strip()) or _DATA_URI.match(value))
