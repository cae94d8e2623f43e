"""How the site is built: `make docs`. Every warning is an error, and a reference that points nowhere is a warning."""

from __future__ import annotations

import hf_balancemix

project = "hf_balancemix"
author = "The contributors of hf_balancemix"
copyright = author
version = release = hf_balancemix.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "myst_nb"]
html_theme = "furo"
html_title = "hf_balancemix"
exclude_patterns = ["_build", "results"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # a notebook's outputs are kept; a test runs it

default_role = "code"  # in docstrings `x` is code
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpicky = True
# Names of other packages in signatures; of ours each must be found.
nitpick_ignore_regex = [("py:.*", r"(?!hf_balancemix)[a-z_]+\..*")]
