"""Settings of Sphinx; `./run.sh docs` builds the site."""

import os
import sys
from pathlib import Path

from docutils import nodes

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

os.environ["PYTHONPATH"] = str(DOCS.parent)  # for the notebook, which runs in a process of its own

import generate  # noqa: E402
import mathml  # noqa: E402

project = "in2core_jax"
author = "the in2core_jax authors"
copyright = author
extensions = ["myst_nb", "sphinx_copybutton"]
nb_execution_mode = "force"  # the notebook is run by every build, so that what it shows is what the code gives
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_merge_streams = True
exclude_patterns = ["_build"]

# Anchors are those that GitHub makes of headings, so that a link works in both places.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
# The pages in results/ are written by programs and begin their sections where their tables do.
# Two modules may have a class of one name; a signature that names it then links to neither.
suppress_warnings = ["myst.header", "ref.python"]

smartquotes = False  # two dashes begin a flag

html_theme = "furo"
html_title = "in2core_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
maximum_signature_line_length = 90
add_module_names = False


def _with_dashes(app, doctree, name) -> None:
  """Writes dashes between arguments and their texts: Sphinx leaves that to smart quotes, which would change flags."""
  for text in list(doctree.findall(nodes.Text)):
    if text == " -- ":
      text.parent.replace(text, nodes.Text(" \N{EN DASH} "))


def setup(app):
  """Writes the generated pages before the sources are read, and registers the renderer of equations."""
  mathml.setup(app)
  app.connect("config-inited", lambda *_: generate.write_all(DOCS))
  app.connect("doctree-resolved", _with_dashes)
