"""The generated reference pages: flags from the settings, the API from signatures and docstrings.

Nothing of the package is imported for the API: its files are parsed, so a page shows what stands in the source. Pages
are written into `docs/reference/generated/`, which git ignores.
"""

import ast
import dataclasses
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

PACKAGE, COMMANDS = "in2core_jax", "experiments"
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
_FIELDS = {"Args": "param", "Attributes": "param", "Raises": "raises"}
_ENTRY = re.compile(r"(\*{0,2}[A-Za-z_][\w.]*(?:, [A-Za-z_]\w*)*):\s+(.*)", re.S)


# --- text -----------------------------------------------------------------------------------------------------------


def escaped(text: str) -> str:
  """Plain text as Markdown that shows the same; what stands in backticks stays code."""
  parts = re.split(r"(`+[^`]+`+)", text)
  parts[::2] = [re.sub(r"([\\*_\[\]<>#|~$^{}])", r"\\\1", part) for part in parts[::2]]
  return "".join(parts)


def cell(text: str) -> str:
  """Text inside of a table."""
  return escaped(" ".join(text.split())).replace("\\|", "&#124;")


def blocks(text: str) -> Iterator[tuple[str, str]]:
  """("code", text) of indented paragraphs and ("text", text) of others."""
  for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
    kind = "code" if paragraph.startswith("  ") else "text"
    yield kind, textwrap.dedent(paragraph)


def markdown(text: str) -> str:
  """A docstring without its sections as Markdown."""
  shown = []
  for kind, body in blocks(text):
    lines = body.splitlines()
    shown.append(f"```text\n{body}\n```" if kind == "code" else "\n".join(map(escaped, lines)))
  return "\n\n".join(shown)


def entries(body: str) -> Iterator[tuple[str, str]]:
  """(name, text) of the entries of a section; an entry without a name has the empty one."""
  for entry in re.split(r"\n(?=\S)", textwrap.dedent(body).strip("\n")):
    text = " ".join(entry.split())
    match = _ENTRY.fullmatch(text)
    yield (match[1], match[2]) if match else ("", text)


def docstring(text: str) -> str:
  """A docstring as Markdown; arguments, results and errors as a list of fields."""
  pieces = re.split(rf"^({'|'.join(SECTIONS)}):\n", text or "", flags=re.M)
  shown, fields = [markdown(pieces[0])], []
  for section, body in zip(pieces[1::2], pieces[2::2], strict=True):
    body, _, rest = re.compile(r"\n\n(?=\S)").sub("\0", body, count=1).partition("\0")
    for name, text in entries(body) if section in _FIELDS else [("", " ".join(body.split()))]:
      key = f"{_FIELDS[section]} {name.lstrip('*')}" if name and section in _FIELDS else section.lower()
      fields.append(f":{'returns' if key == 'yields' else key}: {escaped(text)}")
    if rest.strip():
      shown.append(markdown(rest))
  return "\n\n".join([*(part for part in shown if part), *(["\n".join(fields)] if fields else [])])


def with_links(page: str, docs: Path) -> str:
  """A generated page in which "method.md section 3" leads there."""
  headings = re.findall(r"^## ((\d+)\. .*)$", (docs / "method.md").read_text(), flags=re.M)
  anchors = {number: re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title, number in headings}
  link = lambda match: f"[{match[0]}](../../../method.md#{anchors[match[1]]})"  # noqa: E731
  return re.sub(r"method\.md section (\d+)", link, page)


# --- the API --------------------------------------------------------------------------------------------------------


def is_public(node: ast.AST) -> bool:
  """Whether a definition is a class or function for others."""
  return isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")


def _decorators(node) -> set[str]:
  return {ast.unparse(decorator).split("(")[0].rsplit(".", 1)[-1] for decorator in node.decorator_list}


def signature(node: ast.FunctionDef, bound: bool = False) -> str:
  """The arguments and the result of a function, without `self` of a method."""
  arguments = ast.unparse(node.args)
  if bound and "staticmethod" not in _decorators(node):
    arguments = re.sub(r"^(self|cls)(: \S+)?(, )?", "", arguments)
  return f"({arguments})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def _field(row: ast.AnnAssign) -> str:
  value = "" if row.value is None else f" = {ast.unparse(row.value)}"
  return f"{ast.unparse(row.target)}: {ast.unparse(row.annotation)}{' = ...' if len(value) > 40 else value}"


def fields_of(node: ast.ClassDef) -> str:
  """The fields of a dataclass or named tuple, or the arguments of `__init__`, as a signature."""
  bases = {ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases}
  if _decorators(node) & {"dataclass"} or "NamedTuple" in bases:
    rows = [item for item in node.body if isinstance(item, ast.AnnAssign) and not item.target.id.startswith("_")]
    return f"({', '.join(map(_field, rows))})"
  made = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
  return signature(made[0], bound=True) if made else ""


def directive(kind: str, head: str, body: str, ticks: int, *options: str) -> str:
  """A directive of Sphinx's Python domain."""
  fence = "`" * ticks
  lines = [f"{fence}{{py:{kind}}} {head}", *(f":{option}:" for option in options), "", body, fence]
  return "\n".join(lines)


def described(node) -> str:
  """A class with its public methods, or a function."""
  text = docstring(ast.get_docstring(node))
  if isinstance(node, ast.FunctionDef):
    return directive("function", node.name + signature(node), text, 5)
  parts = [text]
  for item in filter(is_public, node.body):
    kinds = _decorators(item)
    body = docstring(ast.get_docstring(item))
    if isinstance(item, ast.ClassDef):
      parts.append(directive("class", item.name + fields_of(item), body, 4))
    elif kinds & {"property", "cached_property"}:
      parts.append(directive("property", item.name, body, 4))
    else:
      options = [name for name in ("classmethod", "staticmethod") if name in kinds]
      parts.append(directive("method", item.name + signature(item, bound=True), body, 4, *options))
  return directive("class", node.name + fields_of(node), "\n\n".join(parts), 6)


def module_page(path: Path, name: str) -> str:
  """The page of a module."""
  tree = ast.parse(path.read_text())
  parts = [f"# {name}", f"```{{py:module}} {name}\n```", docstring(ast.get_docstring(tree))]
  parts += [described(node) for node in filter(is_public, tree.body)]
  return "\n\n".join(part for part in parts if part) + "\n"


def first_line(path: Path) -> str:
  """The first sentence of a module's docstring."""
  text = ast.get_docstring(ast.parse(path.read_text())) or ""
  return text.strip().split("\n\n")[0].replace("\n", " ")


def package_page(folder: Path, name: str, children: list[tuple[str, str]]) -> str:
  """The page of a package: its docstring, a table of what is in it, and their pages."""
  start = folder / "__init__.py"
  rows = [f"| [{child.rsplit('.', 1)[-1]}]({child}.md) | {cell(line)} |" for child, line in children]
  tree = "\n".join(f"{child.rsplit('.', 1)[-1]} <{child}>" for child, _ in children)
  return (
    "\n\n".join(
      [
        f"# {name}",
        docstring(ast.get_docstring(ast.parse(start.read_text()))) if start.exists() else "",
        "\n".join(["| module | job |", "|---|---|", *rows]),
        f"```{{toctree}}\n:hidden:\n\n{tree}\n```",
      ]
    )
    + "\n"
  )


def room_jobs(root: Path) -> dict[str, str]:
  """{package: its job} by the table of rooms in WORKSPACE.md."""
  table = root / "WORKSPACE.md"
  return dict(re.findall(r"^\| `(\w+)/` \| (.*?) \|", table.read_text() if table.exists() else "", flags=re.M))


def api_pages(root: Path) -> dict[str, str]:
  """{name of the page: its text} for the package and all that is below it."""
  pages, jobs = {}, room_jobs(root)

  def walk(folder: Path, name: str) -> None:
    children = []
    for path in sorted(folder.iterdir()):
      child = f"{name}.{path.stem}"
      if path.is_dir() and any(path.glob("*.py")):
        walk(path, child)
        told = first_line(path / "__init__.py") if (path / "__init__.py").exists() else ""
        children.append((child, told or jobs.get(path.name, "")))
      elif path.suffix == ".py" and path.stem != "__init__":
        pages[f"api/{child}.md"] = module_page(path, child)
        children.append((child, first_line(path)))
    pages[f"api/{name}.md"] = package_page(folder, name, children)

  walk(root / PACKAGE, PACKAGE)
  return pages


# --- flags ----------------------------------------------------------------------------------------------------------


def own_defaults() -> dict[str, dict[str, str]]:
  """{command: {flag: default}} where a command has other defaults than the stage."""
  from experiments import flags
  from experiments import settings as commands

  kinds = {kind for kind in vars(commands).values() if isinstance(kind, type) and issubclass(kind, flags.Settings)}
  kinds |= set(flags.OTHERS)
  found = {}
  for kind in sorted(kinds - {flags.Settings}, key=lambda kind: kind.__name__):
    command = re.search(r"`(\w+)`", kind.__doc__ or "")
    fields = {field.name: field.default for field in dataclasses.fields(flags.Settings)}
    changed = {field.name: field for field in dataclasses.fields(kind) if field.name in fields}
    values = {
      name: _text(field.default) for name, field in changed.items() if _text(field.default) != _text(fields[name])
    }
    found[command[1] if command else kind.__name__] = values
  return found


def _text(value) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


def _default(field: dataclasses.Field) -> str:
  if field.default != field.default:  # not-a-number
    return "unset"
  text = _text(field.default)
  return f"`{text}`" if text else "empty"


def _values(field: dataclasses.Field) -> str:
  if field.metadata["choices"]:
    return "One of " + ", ".join(f"`{choice}`" for choice in field.metadata["choices"] if choice) + "."
  return f"A number {_range(field.metadata['within'])}." if field.metadata["within"] else ""


def _range(bounds) -> str:
  """A range in words, without a largest number that only keeps integers from overflowing."""
  text = re.sub(r"\d+", lambda match: f"{int(match[0]):,}" if len(match[0]) > 4 else match[0], str(bounds))
  return text.split(" and ")[0] if bounds.high >= 10**6 else text


def _meaning(field: dataclasses.Field) -> str:
  """The help text of a flag, with flags in it as code, and its values."""
  text = re.sub(
    r"(?<![`\w])--\w+(=\w+)?",
    lambda match: f"`{match[0]}`",
    " ".join(filter(None, (field.metadata["help"], field.metadata["more"]))),
  )
  text = cell(text[0].upper() + text[1:] if re.match(r"[a-z]+[ ,-]", text) else text)
  return f"{text}{'' if text.endswith('.') else '.'} {_values(field)}".strip()


def flags_page() -> str:
  """All flags by group, with defaults, choices, ranges and help."""
  from experiments import flags

  parts = [
    "# Flags",
    "Every command takes every flag, so one flagfile can serve the whole chain. `--help` shows those that it uses. "
    "This page is made from the settings when the site is built.",
    "A value follows `=`. A boolean flag is `--name` or `--name=true`, and `--noname` or `--name=false`. "
    "`--flagfile=FILE` reads flags from a file, one a line; `#` starts a comment; later flags win.",
  ]
  for group, title in flags.GROUPS.items():
    rows = [field for field in flags.every_field() if field.metadata["group"] == group]
    if not rows:
      continue
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for field in rows:
      lines.append(f"| `--{field.name}` | {_default(field)} | {_meaning(field)} |")
    parts += [f"## {group}", title[0].upper() + title[1:] + ".", "\n".join(lines)]
  rows = [
    f"| `{command}` | " + ", ".join(f"`--{name}={value}`" for name, value in values.items()) + " |"
    for command, values in own_defaults().items()
    if values
  ]
  parts += ["## Defaults of single commands", "\n".join(["| command | default |", "|---|---|", *rows])]
  return "\n\n".join(parts) + "\n"


# --- results ---------------------------------------------------------------------------------------------------------


def results_page(docs: Path) -> str:
  """The tables that experiments have left in `docs/results`, by folder."""
  found = sorted(path.relative_to(docs) for path in (docs / "results").rglob("*.md") if path.stem != "README")
  indexes = sorted(path.relative_to(docs) for path in (docs / "results").rglob("README.md"))
  tree = [f"{path.parent.name} (overview) </{path.with_suffix('')}>" for path in indexes]
  tree += [f"{path.parent.name} </{path.with_suffix('')}>" for path in found]
  rows = [f"| [{path.parent.name}](../../{path}) | `docs/{path}` |" for path in [*indexes, *found]]
  return (
    "\n\n".join(
      [
        "# Results",
        "Tables that the experiments wrote. Each page ends with its command, machine, date and commit. What they mean "
        "is in [Which selection to trust](../../selection.md) and [The paper's claims](../../paper.md).",
        "\n".join(["| experiment | file |", "|---|---|", *rows]),
        "```{toctree}\n:hidden:\n\n" + "\n".join(tree) + "\n```",
      ]
    )
    + "\n"
  )


# --- writing --------------------------------------------------------------------------------------------------------


def write_all(docs: Path) -> None:
  """Writes all generated pages, leaves unchanged ones alone and removes those of modules that are gone."""
  root, folder = docs.parent, docs / "reference" / "generated"
  pages = {"flags.md": flags_page(), "results.md": results_page(docs)} | {
    name: with_links(text, docs) for name, text in api_pages(root).items()
  }
  for name, text in pages.items():
    path = folder / name
    if not path.exists() or path.read_text() != text:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
  for path in folder.rglob("*.md"):
    if str(path.relative_to(folder)) not in pages:
      path.unlink()
