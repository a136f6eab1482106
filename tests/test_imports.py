"""The imports of `in2core_jax/` against the table of rooms in WORKSPACE.md."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "in2core_jax"
FORBIDDEN = {"experiments", "tests", "torch", "tensorflow", "pickle"}
NUMPY_ONLY = ("selection", "evaluation")  # as their rows say


def read_table(text: str) -> dict[str, set[str]]:
  """The rows under "Rooms of `in2core_jax/`": room -> rooms that it may import."""
  section = re.split(r"^## ", text.split(f"## Rooms of `{PACKAGE}/`", 1)[1], maxsplit=1, flags=re.M)[0]
  rows = {}
  for line in section.splitlines():
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    name = re.fullmatch(r"`(\w+)(?:\.py|/)`", cells[0])
    if name:
      assert name[1] not in rows, f"two rows for {name[1]}"
      rows[name[1]] = set(re.findall(r"\w+", cells[-1]))
  return rows


def imports_of(source: str, package: str = PACKAGE) -> set[str]:
  """The dotted names that a module's source imports, also inside functions; relative ones made absolute."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
      base = ".".join([*above, *([node.module] if node.module else [])])
      names |= {f"{base}.{alias.name}" for alias in node.names}
  return names


def room_of(module: str) -> str:
  """`in2core_jax.data.records` -> data."""
  return module.split(".")[1]


def arrows(sources: dict[str, str]) -> dict[str, set[str]]:
  """Room -> other rooms that its modules import; `sources` are those of the modules by dotted name."""
  rooms = {room_of(module) for module in sources}
  found = {room: set() for room in rooms}
  for module, source in sources.items():
    names = imports_of(source, module.rpartition(".")[0])
    others = {room_of(name) for name in names if name.startswith(f"{PACKAGE}.")}
    found[room_of(module)] |= (others & rooms) - {room_of(module)}
  return found


def violations(sources: dict[str, str], table: dict[str, set[str]]) -> list[str]:
  drawn = arrows(sources)
  found = []
  for room, others in sorted(drawn.items()):
    allowed = table.get(room, set())
    found += [f"{room} imports {other}, which its row does not allow" for other in sorted(others - allowed)]
    found += [f"{room} may import {other} and does not" for other in sorted(allowed - others)]
  for module, source in sources.items():
    forbidden = FORBIDDEN | ({"jax"} if room_of(module) in NUMPY_ONLY else set())
    found += [f"{module} imports {name}" for name in sorted(imports_of(source)) if name.split(".")[0] in forbidden]
  found += [f"{room} has no row" for room in sorted(drawn) if room not in table]
  found += [f"{room} has a row and no file" for room in table if room not in drawn]
  return found


def project_sources() -> dict[str, str]:
  paths = [path.relative_to(ROOT) for path in sorted((ROOT / PACKAGE).rglob("*.py"))]
  return {".".join(path.with_suffix("").parts): (ROOT / path).read_text() for path in paths if len(path.parts) > 2} | {
    ".".join(path.with_suffix("").parts): (ROOT / path).read_text()
    for path in paths
    if len(path.parts) == 2 and path.stem != "__init__"
  }


def test_imports_follow_the_table():
  found = violations(project_sources(), read_table((ROOT / "WORKSPACE.md").read_text()))
  assert not found, "\n".join(["see the table of rooms in WORKSPACE.md:", *found])


def test_table_has_no_circles_and_at_most_90_arrows():
  table = read_table((ROOT / "WORKSPACE.md").read_text())
  assert len(table) > 10
  unknown = {name for allowed in table.values() for name in allowed} - set(table)
  assert not unknown, f"rows allow imports of rooms that have no row: {sorted(unknown)}"
  TopologicalSorter(table).prepare()  # raises CycleError with the circle
  assert sum(map(len, table.values())) <= 90


def test_experiments_need_no_other_framework():
  names = {name for path in (ROOT / "experiments").rglob("*.py") for name in imports_of(path.read_text())}
  assert not {name for name in names if name.split(".")[0] in FORBIDDEN - {"experiments"}}


def test_modules_inside_the_rooms_import_each_other_in_no_circle():
  sources = project_sources()
  graph = {
    module: {
      other
      for name in imports_of(source, module.rpartition(".")[0])
      for other in (name, name.rpartition(".")[0])
      if other in sources and other != module
    }
    for module, source in sources.items()
  }
  TopologicalSorter(graph).prepare()


def test_select_is_six_named_steps_of_at_most_ten_lines():
  tree = ast.parse((ROOT / PACKAGE / "pipeline" / "select.py").read_text())
  defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
  calls = [node.func for node in ast.walk(defined["run"]) if isinstance(node, ast.Call)]
  steps = [name for name in defined if name in {call.id for call in calls if isinstance(call, ast.Name)}]
  assert len(steps) == 6
  for name in steps:
    first = defined[name].body[1]  # after the docstring
    assert defined[name].end_lineno - first.lineno < 10, name


@pytest.mark.parametrize(
  ("source", "findings"),
  [
    ("from in2core_jax.b import x", ["a imports b, which its row does not allow"]),
    ("from in2core_jax import b", ["a imports b, which its row does not allow"]),
    ("def f():\n  import in2core_jax.b.y", ["a imports b, which its row does not allow"]),
    ("from ..b import x", ["a imports b, which its row does not allow"]),
    ("from . import other", []),
    ("import experiments.flags", ["in2core_jax.a.one imports experiments.flags"]),
    ("from torch import nn", ["in2core_jax.a.one imports torch.nn"]),
    ("from in2core_jax import __version__", []),
    ("import jax", []),
  ],
)
def test_the_check_itself(source, findings):
  table = read_table(
    f"## Rooms of `{PACKAGE}/`\n| room | job | may import |\n|---|---|---|\n"
    "| `a/` | x | c |\n| `b/` | y | - |\n| `c.py` | z | - |\n\n## Next\n| `d.py` | no | - |\n"
  )
  assert table == {"a": {"c"}, "b": set(), "c": set()}
  sources = {"in2core_jax.a.one": source, "in2core_jax.a.two": "from in2core_jax.c import x"}
  assert violations(sources | {"in2core_jax.b.y": "", "in2core_jax.c": ""}, table) == findings


def test_rows_of_nothing_and_rooms_without_row_are_found():
  assert violations({"in2core_jax.a.x": ""}, {"b": set()}) == ["a has no row", "b has a row and no file"]
  assert violations({"in2core_jax.a": "", "in2core_jax.b": ""}, {"a": {"b"}, "b": set()}) == [
    "a may import b and does not"
  ]
  assert violations({"in2core_jax.selection.x": "import jax"}, {"selection": set()}) == [
    "in2core_jax.selection.x imports jax"
  ]
