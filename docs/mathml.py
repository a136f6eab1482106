"""Equations as MathML, which browsers render by themselves: the site loads nothing from the network."""

from docutils import nodes
from latex2mathml import converter


def _inline(translator, node: nodes.math) -> None:
  translator.body.append(converter.convert(node.astext(), display="inline"))
  raise nodes.SkipNode


def _block(translator, node: nodes.math_block) -> None:
  translator.body.append(f'<div class="equation">{converter.convert(node.astext(), display="block")}</div>\n')
  raise nodes.SkipNode


def setup(app) -> None:
  """Registers the renderer under the name `mathml`."""
  app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
