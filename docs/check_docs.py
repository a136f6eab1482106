"""Checks of what people read: length of sentences and lines, links, commands, names of flags and files.

    python docs/check_docs.py

Prints one line for each fault and exits with 1 when there is one. `./run.sh docs` calls it before it builds the site,
and `tests/test_docs.py` calls it in the test suite.
"""

import ast
import dataclasses
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags as absl_flags

ROOT = Path(__file__).resolve().parents[1]
LONGEST_SENTENCE, LONGEST_LINE = 30, 400  # words, characters
OWN_COMMANDS = {"setup", "test", "lint", "docs", "help"}  # of run.sh
NOT_OURS = {"flagfile", "help", "helpfull"}  # flags of absl itself


@dataclasses.dataclass(frozen=True)
class Page:
  """A Markdown file.

  Attributes:
    path: relative to the root of the project.
    text: its content.
  """

  path: Path
  text: str

  def is_plain(self) -> bool:
    """Whether long sentences are faults in it: everywhere but in the page of those who change the code."""
    return self.path.name != "WORKSPACE.md"


def pages(root: Path = ROOT) -> list[Page]:
  """README, WORKSPACE and the pages of the site that people write."""
  paths = [root / "README.md", root / "WORKSPACE.md", *sorted((root / "docs").rglob("*.md"))]
  skipped = ("_build", "results", "generated")
  kept = [path for path in paths if not set(path.relative_to(root).parts) & set(skipped)]
  return [Page(path.relative_to(root), path.read_text()) for path in kept]


# --- text -----------------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
  """The text with fenced and indented code and comments blanked, line by line."""
  text = re.sub(r"<!--.*?-->", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
  shown, fence = [], ""
  for line in text.splitlines():
    mark = re.match(r"\s*(`{3,}|:{3,})", line)
    if mark and (not fence or mark[1].startswith(fence)):
      fence = "" if fence else mark[1]
      shown.append("")
    else:
      is_code = fence or (line.startswith("    ") and not re.match(r"\s*([-*]|\d+\.) ", line) and not _in_list(shown))
      shown.append("" if is_code else line)
  return "\n".join(shown)


def _in_list(before: list[str]) -> bool:
  """Whether the line after these goes on with an item of a list."""
  for line in reversed(before):
    if not line.strip():
      return False
    if re.match(r"\s*([-*]|\d+\.) ", line):
      return True
  return False


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
  """(line, text) of paragraphs, items of lists and cells of tables; headings are left out."""
  start, parts = 0, []
  for number, line in enumerate([*without_code(text).splitlines(), ""], 1):
    begins = re.match(r"\s*([-*>]|\d+\.) +", line)
    if parts and (not line.strip() or begins or line.lstrip().startswith(("|", "#"))):
      yield start, " ".join(parts)
      parts = []
    if line.lstrip().startswith("|"):
      yield from ((number, cell.strip()) for cell in line.split("|") if cell.strip(" -:"))
    elif line.strip() and not line.startswith("#"):
      start = start if parts else number
      parts.append(line[begins.end() :] if begins else line.strip())


def sentences(text: str) -> Iterator[str]:
  """The sentences of a paragraph; a link counts as its text, code as one word."""
  text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
  text = re.sub(r"`+[^`]*`+", "CODE", text)
  text = re.sub(r"\$[^$]+\$", "MATH", text).replace("*", "")
  yield from re.split(r"(?<=[.!?])\)?\s+(?=[A-Z0-9(\"])", text)


def words(sentence: str) -> int:
  """How many words a sentence has."""
  return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def long_sentences(page: Page) -> Iterator[str]:
  """Sentences of more than 30 words."""
  for number, paragraph in paragraphs(page.text):
    for sentence in sentences(paragraph):
      if words(sentence) > LONGEST_SENTENCE:
        yield f"{page.path}:{number}: a sentence of {words(sentence)} words: {sentence[:60]} ..."


def long_lines(page: Page) -> Iterator[str]:
  """Lines of more than 400 characters."""
  for number, line in enumerate(page.text.splitlines(), 1):
    if len(line) > LONGEST_LINE:
      yield f"{page.path}:{number}: a line of {len(line)} characters"


def placeholders(page: Page) -> Iterator[str]:
  """Places that wait for text, written as @@NAME@@."""
  for number, line in enumerate(page.text.splitlines(), 1):
    for name in re.findall(r"@@[A-Z_]+@@", line):
      yield f"{page.path}:{number}: {name} waits for its text"


# --- links ----------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
  """The anchors that GitHub and the site make of headings."""
  found: dict[str, int] = {}
  for heading in re.findall(r"^#{1,6} +(.*)$", without_code(text), flags=re.M):
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
    found[slug] = found.get(slug, -1) + 1
    if found[slug]:
      found[f"{slug}-{found[slug]}"] = 0
  return set(found)


def broken_links(page: Page, root: Path = ROOT) -> Iterator[str]:
  """Links inside of the project that lead nowhere; those to generated pages are left to the build."""
  prose = re.sub(r"`+[^`\n]*`+", "", without_code(page.text))
  for target in re.findall(r"\]\(([^)\s]+)\)", prose):
    if re.match(r"[a-z]+:", target) or "generated/" in target:
      continue
    name, _, anchor = target.partition("#")
    path = (root / page.path).parent / name
    if not path.exists():
      yield f"{page.path}: the link {target} leads to no file"
    elif anchor and anchor not in anchors(path.read_text() if name else page.text):
      yield f"{page.path}: the link {target} leads to no heading"


def missing_files(page: Page, root: Path = ROOT) -> Iterator[str]:
  """Files of the project that a page names in backticks and that are not there."""
  for name in re.findall(r"`((?:in2core_jax|experiments|tests|docs|third_party)/[\w./-]*)`", page.text):
    is_made = "/PRESET" in name or "_build" in name or "/generated" in name
    if not is_made and not (root / name).exists():
      yield f"{page.path}: `{name}` is not there"


# --- commands -------------------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
  """The words of every call of `./run.sh` and `python -m experiments.NAME`, in code of either kind."""
  text = re.sub(r"\\\n\s*", " ", text)
  for line in text.splitlines():
    for match in re.finditer(r"(?:\./run\.sh|python -m experiments\.)", line):
      rest = line[match.start() :]
      before = line[: match.start()]
      if before.count("`") % 2:
        rest = rest.split("`")[0]
      if before.count('"') % 2:
        rest = rest.split('"')[0]
      lexer = shlex.shlex(rest, posix=True, punctuation_chars="&|;")
      lexer.whitespace_split = True
      found = list(lexer)
      end = next((index for index, word in enumerate(found) if set(word) <= set("&|;")), len(found))
      found = found[:end]
      if found[0] == "python":
        found[:3] = ["./run.sh", found[2].removeprefix("experiments.")]
      yield found


def read_flagfile(word: str, root: Path) -> list[str]:
  """The flags that a word stands for: the lines of a flagfile of ours, nothing for one that the reader writes."""
  if not word.startswith("--flagfile="):
    return [word]
  path = root / word.partition("=")[2]
  if not path.is_relative_to(root / "experiments"):
    return []
  return [line for line in path.read_text().splitlines() if line.startswith("--")]


def is_command(name: str, root: Path) -> bool:
  """Whether `./run.sh NAME` runs an experiment."""
  places = (root / f"experiments/{name}.py", root / f"experiments/{name}/__main__.py")
  return any(place.exists() and '__name__ == "__main__"' in place.read_text() for place in places)


def wrong_commands(page: Page, parse, root: Path = ROOT) -> Iterator[str]:
  """Commands that do not exist, or whose flags the command refuses to parse."""
  for _, name, *arguments in (words for words in commands(page.text) if len(words) > 1):
    if name in OWN_COMMANDS or not re.fullmatch(r"[a-z_]+", name):
      continue
    shown = " ".join([name, *arguments])
    if not is_command(name, root):
      yield f"{page.path}: there is no command {name!r}"
      continue
    try:
      parse(*(flag for word in arguments if word not in ("...", "--help") for flag in read_flagfile(word, root)))
    except (absl_flags.Error, ValueError, OSError) as error:
      yield f"{page.path}: ./run.sh {shown}: {error}"


def wrong_python(page: Page) -> Iterator[str]:
  """Blocks of Python that do not parse, and public names or settings in them that there are not."""
  import in2core_jax
  from experiments import flags

  known = {field.name for field in dataclasses.fields(flags.Settings)} | {"session", "select_runs"}
  known |= {"minutes", "rules"}  # of `recommend`
  for block in re.findall(r"^```python\n(.*?)^```", page.text, flags=re.M | re.S):
    try:
      tree = ast.parse(block)
    except SyntaxError as error:
      yield f"{page.path}: Python that does not parse: {error}"
      continue
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Attribute)):
      if ast.unparse(node.value) == "i2c" and node.attr not in in2core_jax.__all__:
        yield f"{page.path}: in2core_jax has no {node.attr}"
    for call in (call for call in calls if ast.unparse(call.func).startswith("i2c.")):
      for keyword in call.keywords:
        if keyword.arg not in known:
          yield f"{page.path}: {ast.unparse(call.func)} has no {keyword.arg}"


def unknown_flags(page: Page) -> Iterator[str]:
  """Flags that a page names in backticks and that are none of ours."""
  from experiments import flags

  known = {field.name for field in flags.every_field()} | NOT_OURS
  for name in re.findall(r"`--(?:no)?(\w+)(?:=[^`]*)?`", page.text):
    if name not in known and f"no{name}" not in known:
      yield f"{page.path}: `--{name}` is no flag"


def faults(root: Path = ROOT) -> list[str]:
  """All faults, one line each."""
  from experiments import flags

  found, parse = [], flags.Parser(tells_costs=True)
  for page in pages(root):
    found += [*long_lines(page), *(long_sentences(page) if page.is_plain() else ())]
    found += [*placeholders(page), *broken_links(page, root), *missing_files(page, root)]
    found += [*wrong_commands(page, parse, root), *unknown_flags(page), *wrong_python(page)]
  return found


if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))
  lines = faults()
  print("\n".join(lines) if lines else f"{len(pages())} pages: nothing to mend")
  sys.exit(1 if lines else 0)
