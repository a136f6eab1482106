"""README and the pages of the site: what people read is short, leads somewhere, and its commands parse."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name: str):
  """A module of `docs/`, which is no package."""
  spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
  sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


check, generate = load("check_docs"), load("generate")


@pytest.fixture(scope="module")
def parse():
  """Reads command lines as a command does."""
  from experiments import flags

  return flags.Parser(tells_costs=True)


def page(text: str, name: str = "docs/howto/page.md"):
  return check.Page(Path(name), text)


def test_pages_have_no_faults():
  found = check.faults()
  assert not found, "\n".join(found)


def test_readme_is_short_and_has_every_part():
  text = (ROOT / "README.md").read_text()
  assert len(text.split()) <= 900
  parts = ["Quickstart", "What it gains", "Your data", "What it writes", "Which rule, solver, layers", "Documentation"]
  assert [text.index(f"## {part}") for part in [*parts, "Limits", "Tests", "Licence"]]
  assert "When not to use it" in text


LONG = " ".join(["word"] * 31)


@pytest.mark.parametrize(
  ("text", "count"),
  [
    (f"{LONG}.", 1),
    (f"Short one. {LONG.capitalize()}. Short again.", 1),
    ("A word " + "of many " * 13 + "ends.", 0),
    (f"- item\n- {LONG}", 1),
    (f"| cell | {LONG} |", 1),
    (f"    {LONG}", 0),
    (f"```bash\n{LONG}\n```", 0),
    (f"# {LONG}", 0),
    (f"<!-- {LONG} -->", 0),
    ("Ten words of text, and `" + LONG + "` as one word.", 0),
    ("word " * 16 + "\n" + "word " * 16, 1),
  ],
)
def test_long_sentences_are_found_in_text_lists_and_tables_alone(text, count):
  assert len(list(check.long_sentences(page(text)))) == count


def test_places_that_wait_for_text_are_found():
  assert len(list(check.placeholders(page("Text.\n\n@@TABLES@@\n\n| cell | @@WHY@@ |\n")))) == 2
  assert not list(check.placeholders(page("a@@b, `@@`, @@lower@@")))


def test_long_lines_and_links_that_lead_nowhere_are_found():
  assert len(list(check.long_lines(page("a" * 400 + "\n" + "b" * 401)))) == 1
  own = "# Some `code`, and more\n\n## Twice\n\n## Twice\n"
  links = "[a](#some-code-and-more) [b](#twice-1) [c](../method.md#2-curvature) [d](https://x.org/y) `[e](no)`"
  assert not list(check.broken_links(page(own + links)))
  wrong = "[a](#elsewhere) [b](no.md) [c](../method.md#no-such-section) ![d](no.svg)"
  assert len(list(check.broken_links(page(own + wrong)))) == 4


def test_commands_are_read_out_of_every_kind_of_code():
  text = """
    ./run.sh select --a=1 \\
      --b=2   # why
    X=1 python -m experiments.finetune --c="d e" &
    ssh --command="cd x && ./run.sh check --f=g"
Inline `./run.sh demo` and ./run.sh test.
"""
  found = [words[1:] for words in check.commands(text)]
  assert found[:4] == [["select", "--a=1", "--b=2"], ["finetune", "--c=d e"], ["check", "--f=g"], ["demo"]]


@pytest.mark.parametrize(
  ("command", "fault"),
  [
    ("./run.sh select --solver=cg --layers=last:4", ""),
    ("./run.sh select --flagfile=mine.flags --dry_run", ""),
    ("python -m experiments.demo --flagfile=experiments/flags/ci.flags", ""),
    ("./run.sh test tests/test_x.py -k y", ""),
    ("./run.sh slect", "no command"),
    ("./run.sh select --no_such_flag", "no_such_flag"),
    ("./run.sh select --solver=magic", "solver"),
    ("./run.sh select --fraction=2", "fraction"),
    ("./run.sh select stray", "stray"),
    ("./run.sh demo --flagfile=experiments/flags/none.flags", "none.flags"),
  ],
)
def test_commands_that_would_be_refused_are_found(parse, command, fault):
  found = list(check.wrong_commands(page(f"    {command}\n"), parse))
  assert bool(found) == bool(fault) and fault in "".join(found)


def test_flags_and_files_that_are_gone_are_found():
  assert not list(check.unknown_flags(page("`--layers=all`, `--nodry_run`, `--flagfile=x`")))
  assert len(list(check.unknown_flags(page("`--layerz=all` and `--no_such`")))) == 2
  assert not list(check.missing_files(page("`experiments/flags/` and `tests/conftest.py`")))
  assert len(list(check.missing_files(page("`in2core_jax/no_such_module.py`")))) == 1


def test_python_that_would_fail_is_found():
  block = "```python\nimport in2core_jax as i2c\n{}\n```\n"
  assert not list(check.wrong_python(page(block.format("i2c.select(i2c.Settings(layers='all'), run_dir='x')"))))
  for wrong in ("i2c.chose()", "i2c.select(layerz='all')", "i2c.select("):
    assert len(list(check.wrong_python(page(block.format(wrong))))) == 1, wrong


DOCSTRING = """One line with `code_x` and a *b_c* |x|.

  y = a * b

Args:
  x: f32 [N], the
    input.
  more: others.

Returns:
  The result.

Raises:
  ValueError: why.
"""


def test_docstrings_become_markdown_that_shows_them_as_they_are():
  shown = generate.docstring(DOCSTRING)
  assert shown.startswith("One line with `code_x` and a \\*b\\_c\\* \\|x\\|.")
  assert "```text\ny = a * b\n```" in shown
  fields = shown[shown.index(":param") :].splitlines()
  assert fields == [
    ":param x: f32 \\[N\\], the input.",
    ":param more: others.",
    ":returns: The result.",
    ":raises ValueError: why.",
  ]


def test_every_public_name_and_every_flag_has_an_entry(tmp_path):
  package = tmp_path / "in2core_jax" / "inner"
  package.mkdir(parents=True)
  (package / "one.py").write_text(
    '"""Job."""\nimport dataclasses\n\ndef f(a: int = 1) -> int:\n  """Does."""\n\ndef _hidden():\n  pass\n\n'
    '@dataclasses.dataclass\nclass C:\n  """Holds."""\n  x: int = 0\n\n  def m(self, b):\n    """Moves."""\n'
  )
  pages = generate.api_pages(tmp_path)
  text = pages["api/in2core_jax.inner.one.md"]
  assert "{py:function} f(a: int=1) -> int" in text and "_hidden" not in text
  assert "{py:class} C(x: int = 0)" in text and "{py:method} m(b)" in text
  assert "[inner](in2core_jax.inner.md)" in pages["api/in2core_jax.md"]
  assert "one <in2core_jax.inner.one>" in pages["api/in2core_jax.inner.md"]
  shown = generate.flags_page()
  from experiments import flags

  assert all(f"| `--{name}` |" in shown for name in flags.Settings.__dataclass_fields__)
  assert "| `study` | `--run_dir=runs/study`" in shown
