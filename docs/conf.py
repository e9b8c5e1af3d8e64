"""Configuration of the documentation site: `sphinx-build -W -b html docs site`."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]  # for site_pages, and for the package of this checkout

import cadsurgery  # noqa: E402 - the path comes first

project = "cadsurgery"
author = "The cadsurgery maintainers"
copyright = "the cadsurgery maintainers, Apache-2.0"
version = release = cadsurgery.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_design", "site_pages"]
exclude_patterns = ["generated/parts/*", "bench/*"]

# Pages. Anchors of headings are those that links on GitHub use.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # notebooks show the outputs that are committed with them; tests run them
nb_ipywidgets_js = {}  # the default loads scripts of widgets from other hosts, and no notebook has widgets

# Docstrings: Google style; single backticks are code.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list; as entries they would stand twice, beside the members
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
# Types in quotes are taken for references, and attributes of several classes have the same name, such as `high`.
suppress_warnings = ["ref.python"]
python_maximum_signature_line_length = 90

# The page as a browser gets it: everything lies in the folder that is written, so that it works from file://.
html_theme = "furo"
html_title = f"cadsurgery {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["filter.js"]
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # summaries of results are fetched, which browsers refuse for file://
