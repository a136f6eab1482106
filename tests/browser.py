"""A real headless Chromium for tests of pages: loads a file, lets its scripts run, and gives back the document.

    document = browser.load(path, "page=2", folder)        document.text("status")

Where there is none, tests that need it are skipped: `needs_browser` says what to install.
"""

import html.parser
import os
import pathlib
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(
  PROGRAM is None, reason=f"none of {', '.join(NAMES)} is on PATH; on Debian: apt-get install chromium"
)
_FLAGS = ("--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-extensions")
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Node:
  """An element: tag, attributes, children (elements and strings)."""

  def __init__(self, tag: str, attributes: dict[str, str | None]):
    self.tag, self.attributes, self.children = tag, attributes, []

  def all(self, tag: str | None = None, **attributes: str) -> "list[Node]":
    """Every element below, in order, of this tag and these attributes (`class_` for class, any of its words)."""
    found = []
    for child in self.children:
      if isinstance(child, Node):
        if (tag is None or child.tag == tag) and all(child.has(*pair) for pair in attributes.items()):
          found.append(child)
        found += child.all(tag, **attributes)
    return found

  def has(self, name: str, value: str) -> bool:
    if name == "class_":
      return value in (self.attributes.get("class") or "").split()
    return self.attributes.get(name.replace("_", "-")) == value

  def id(self, name: str) -> "Node":
    (node,) = self.all(id=name)
    return node

  @property
  def content(self) -> str:
    """All text below."""
    return "".join(child if isinstance(child, str) else child.content for child in self.children)

  def text(self, name: str) -> str:
    """The text of the element with this id."""
    return self.id(name).content


class _Parser(html.parser.HTMLParser):
  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.open = [Node("", {})]

  def handle_starttag(self, tag, attrs):
    node = Node(tag, dict(attrs))
    self.open[-1].children.append(node)
    if tag not in _VOID:
      self.open.append(node)

  def handle_startendtag(self, tag, attrs):
    self.open[-1].children.append(Node(tag, dict(attrs)))

  def handle_endtag(self, tag):
    places = [i for i, node in enumerate(self.open) if node.tag == tag]
    if places:
      del self.open[places[-1] :]

  def handle_data(self, data):
    self.open[-1].children.append(data)


def parse(text: str) -> Node:
  """The tree of an HTML text."""
  parser = _Parser()
  parser.feed(text)
  parser.close()
  return parser.open[0]


def load(path: pathlib.Path, address: str, folder: pathlib.Path, *flags: str) -> Node:
  """The document after its scripts ran and five virtual seconds went by.

  Args:
    path: the page. address: what follows # in its address. folder: for the browser's profile.
    flags: of Chromium, besides ours.
  """
  profile = f"--user-data-dir={folder / 'profile'}"
  # In a container the tests run as root, for whom Chromium has no sandbox.
  sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
  url = path.resolve().as_uri() + (f"#{address}" if address else "")
  command = [PROGRAM, *_FLAGS, *sandbox, profile, "--virtual-time-budget=5000", *flags, "--dump-dom", url]
  result = subprocess.run(command, capture_output=True, timeout=300, check=False)
  assert result.returncode == 0, result.stderr.decode(errors="replace")[-2000:]
  return parse(result.stdout.decode("utf-8"))
