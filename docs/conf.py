"""Sphinx builds the documentation site from this folder: ``make docs``. It needs no network."""

from __future__ import annotations

import html
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from docutils.utils.math.unichar2tex import uni2tex_table

from lightning_imaml import __version__

project = "lightning_imaml"
release = version = __version__
copyright = "the lightning_imaml authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_preserve_defaults = True
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Shapes"]
# Our own cross-references must lead somewhere; those to PyTorch and Lightning would need the network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!lightning_imaml).*")]

html_theme = "furo"
html_title = f"lightning_imaml {version}"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False


def _math(self: Any, node: nodes.math | nodes.math_block) -> None:
    """Write MathML, which browsers show by themselves: MathJax would be loaded from another site."""
    block = isinstance(node, nodes.math_block)
    tag = "div" if block else "span"
    label = html.escape(node.astext(), quote=True)
    written = tex2mathml(node.astext().translate(uni2tex_table))
    if block:
        written = written.replace("<math ", '<math display="block" ', 1)
    self.body.append(f'<{tag} class="math notranslate" title="{label}">{written}</{tag}>')
    raise nodes.SkipNode


def _is_field(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave the fields of named tuples to the class's own "Attributes"."""
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    """Add what no extension has."""
    app.add_html_math_renderer("mathml", inline_renderers=(_math, None), block_renderers=(_math, None))
    app.connect("autodoc-skip-member", _is_field)
