"""What pages have in common: Jinja's environment and filters, and files that a page carries, with their hashes."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import jinja2
import markupsafe

from in2core_jax.errors import how_many
from in2core_jax.report import table_text

TEMPLATES = Path(__file__).parent / "templates"
_FLAG = re.compile(r"--[a-z]\S*?(?=[.,;:)]*(?:\s|$))")  # without the marks after it


def environment(html: bool = True) -> jinja2.Environment:
  """Of the folder of templates; `html`: values are escaped."""
  made = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=html,  # noqa: S701, Markdown is not escaped here
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=not html,
  )
  made.filters |= {
    "cell": table_text.format_value,
    "percent": lambda share: f"{share:.1%}",
    "how_many": how_many,
    "unbroken": unbroken,
  }
  return made


def unbroken(text: str) -> markupsafe.Markup:
  """A text in which no line ends inside of a flag: browsers break a line after each hyphen."""
  escaped = str(markupsafe.escape(text))
  return markupsafe.Markup(_FLAG.sub(lambda match: f'<span class="flag">{match[0]}</span>', escaped))


def carried(name: str) -> tuple[markupsafe.Markup, str]:
  """(a style sheet or script that the page carries, its hash for the content security policy)."""
  text = (TEMPLATES / name).read_text(encoding="utf-8")
  return markupsafe.Markup(text), "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
