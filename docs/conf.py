"""The documentation's build: `sphinx-build -W docs docs/_build/html`. It needs no network."""

import logging
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "bilevel"
author = "the bilevel authors"
copyright = "the bilevel authors"
release = version = installed_version("bilevel")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "docstrings"]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = "bilevel"

# Pages that are notebooks run at every build, so that what they print is what the code does today.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "deflist", "fieldlist"]
myst_heading_anchors = 3

# Google-style docstrings in plain text: docstrings.py.
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
autodoc_mock_imports = ["flwr"]  # an extra that pins widely used packages
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# A folder of pages may still be empty. Sphinx gives this warning no type by which suppress_warnings could name it.
logging.getLogger("sphinx.sphinx.directives.other").addFilter(
    lambda record: "didn't match any documents" not in str(record.msg)
)
