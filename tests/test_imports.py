"""The imports of `in2core_jax/` against the table of rooms in WORKSPACE.md."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "in2core_jax"
FORBIDDEN = {"experiments", "tests", "torch", "tensorflow", "pickle"}


def read_table(text: str) -> dict[str, set[str]]:
  """The rows under "Rooms of `in2core_jax/`": module -> modules that it may import."""
  section = re.split(r"^## ", text.split(f"## Rooms of `{PACKAGE}/`", 1)[1], maxsplit=1, flags=re.M)[0]
  rows = {}
  for line in section.splitlines():
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    name = re.fullmatch(r"`(\w+)\.py`", cells[0])
    if name:
      assert name[1] not in rows, f"two rows for {name[1]}.py"
      rows[name[1]] = set(re.findall(r"\w+", cells[-1].replace(".py", "")))
  return rows


def imports_of(source: str) -> set[str]:
  """The dotted names that a module's source imports, also inside functions; relative ones made absolute."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = ".".join([PACKAGE] * bool(node.level) + [node.module] * bool(node.module))
      names |= {f"{base}.{alias.name}" for alias in node.names}
  return names


def rooms(names: set[str], modules: set[str]) -> set[str]:
  """Which of the package's modules are among the imported names."""
  parts = [name.split(".") for name in names if name.startswith(f"{PACKAGE}.")]
  return {part[1] for part in parts if part[1] in modules}


def violations(sources: dict[str, str], table: dict[str, set[str]]) -> list[str]:
  found = []
  for module, source in sources.items():
    names = imports_of(source)
    for other in sorted(rooms(names, set(sources)) - table.get(module, set())):
      found.append(f"{module}.py imports {other}, which its row does not allow")
    found += [f"{module}.py imports {name}" for name in sorted(names) if name.split(".")[0] in FORBIDDEN]
  found += [f"{module}.py has no row" for module in sources if module not in table]
  found += [f"{module}.py has a row and no file" for module in table if module not in sources]
  return found


def project_sources() -> dict[str, str]:
  return {path.stem: path.read_text() for path in sorted((ROOT / PACKAGE).glob("*.py")) if path.stem != "__init__"}


def test_imports_follow_the_table():
  found = violations(project_sources(), read_table((ROOT / "WORKSPACE.md").read_text()))
  assert not found, "\n".join(["see the table of rooms in WORKSPACE.md:", *found])


def test_table_has_no_circles_and_no_unknown_names():
  table = read_table((ROOT / "WORKSPACE.md").read_text())
  assert len(table) > 10
  unknown = {name for allowed in table.values() for name in allowed} - set(table)
  assert not unknown, f"rows allow imports of modules that have no row: {sorted(unknown)}"
  TopologicalSorter(table).prepare()  # raises CycleError with the circle


def test_experiments_need_no_other_framework():
  names = {name for path in (ROOT / "experiments").glob("*.py") for name in imports_of(path.read_text())}
  assert not {name for name in names if name.split(".")[0] in FORBIDDEN - {"experiments"}}


@pytest.mark.parametrize(
  ("source", "finding"),
  [
    ("from in2core_jax import b", "a.py imports b, which its row does not allow"),
    ("from in2core_jax.b import x", "a.py imports b, which its row does not allow"),
    ("def f():\n  import in2core_jax.b", "a.py imports b, which its row does not allow"),
    ("from . import b", "a.py imports b, which its row does not allow"),
    ("from .b import x", "a.py imports b, which its row does not allow"),
    ("import experiments.flags", "a.py imports experiments.flags"),
    ("from torch import nn", "a.py imports torch.nn"),
    ("from in2core_jax import __version__", None),
    ("from in2core_jax.c import x\nimport jax", None),
  ],
)
def test_the_check_itself(source, finding):
  table = read_table(
    f"## Rooms of `{PACKAGE}/`\n| module | job | may import |\n|---|---|---|\n"
    "| `a.py` | x | c |\n| `b.py` | y | - |\n| `c.py` | z | - |\n\n## Next\n| `d.py` | no | - |\n"
  )
  assert table == {"a": {"c"}, "b": set(), "c": set()}
  assert violations({"a": source, "b": "", "c": ""}, table) == ([finding] if finding else [])


def test_missing_rows_and_files_are_found():
  assert violations({"a": ""}, {"b": set()}) == ["a.py has no row", "b.py has a row and no file"]
