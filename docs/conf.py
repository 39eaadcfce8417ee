"""The documentation as a site, offline and without a font or script from elsewhere.

    sphinx-build -W -c docs . build/site

The source is the whole repository, so that a link leads to the same place on the site and beside
the files; build/site/index.html leads to docs/index.html.
"""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = html_title = "ddpm_fast"
version = release = version_of("ddpm_fast")
copyright = "ddpm_fast contributors"

root_doc = "docs/index"
include_patterns = ["docs/**", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/*.md"]
exclude_patterns = [".*", "build", "ddpm_fast", "csrc", "tests"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "formulas",
]
myst_enable_extensions = ["dollarmath"]  # what Markdown has on GitHub too
myst_heading_anchors = 3

html_theme = "furo"
html_static_path = ["_static"]
html_extra_path = ["_redirect"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_math_renderer = "formulas"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 70  # a longer one has a line for each parameter
