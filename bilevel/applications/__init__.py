"""Ready-made bilevel problems: a folder each, with its model, its problem and its data together.

Import a folder by its name, `from bilevel.applications import biformer`: nothing is loaded before, and the rest of the
package knows nothing of them. What a folder's constructors return is an `Application`.
"""

from bilevel.applications.application import Application

__all__ = ["Application"]
