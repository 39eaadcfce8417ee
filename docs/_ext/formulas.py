"""Formulas as pictures drawn at build time: a page needs no script, and its reader no font."""

from __future__ import annotations

from html import escape

import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

SIZE = 18  # pixels, beside text of 16
ziamath.config.svg2 = False  # else formulas of one page share the names of their glyphs


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("formulas", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    """A formula in a line, on the line's baseline."""
    self.body.append(drawn(node.astext(), inline=True))
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """A formula on lines of its own, which scrolls where the screen is narrow."""
    self.body.append(f'<div class="formula">{drawn(node.astext(), inline=False)}</div>\n')
    raise nodes.SkipNode


def drawn(latex: str, *, inline: bool) -> str:
    """SVG in the colour of the text, read aloud as its LaTeX."""
    formula = ziamath.Latex(latex, size=SIZE, inline=inline, color="currentColor")
    svg: str = formula.svg()
    shift = formula.getyofst() if inline else 0
    label = f'role="img" aria-label="{escape(latex)}" style="vertical-align: {shift:.2f}px"'
    return svg.replace("<svg ", f"<svg {label} ", 1)
