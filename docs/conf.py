"""The documentation's build: `sphinx-build -W docs docs/_build/html`. It needs no network."""

import logging
import sys
import urllib.request
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "bilevel"
author = "the bilevel authors"
copyright = "the bilevel authors"
release = version = installed_version("bilevel")

extensions = [
    "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode", "sphinx_copybutton", "sphinx-mathjax-offline", "docstrings",
]  # fmt: skip
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = f"bilevel {version}"
html_last_updated_fmt = "%Y-%m-%d"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
autosummary_generate = False


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "objects.inv", timeout=5):
            return True
    except OSError:
        return False


# Names of other packages are links where their inventories can be read: a build without a network has none of them.
intersphinx_mapping = {
    name: (url, None)
    for name, url in {
        "python": "https://docs.python.org/3/",
        "jax": "https://docs.jax.dev/en/latest/",
        "optax": "https://optax.readthedocs.io/en/latest/",
        "flax": "https://flax.readthedocs.io/en/latest/",
    }.items()
    if _reachable(url)
}

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


def setup(app):
    """Pages are read by several processes (`-j`), which an extension that only copies files does not say it allows."""
    app.extensions["sphinx-mathjax-offline"].parallel_read_safe = True
