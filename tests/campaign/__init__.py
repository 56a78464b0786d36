"""Random models, each taken through all that a user does with it.

A model is data (`description`), made by Hypothesis (`generate`), run by an interpreter (`program`) and held
against densities that are written by hand (`densities`). `checks` says what must hold.
"""

from .checks import check
from .description import Description
from .generate import descriptions

__all__ = ["Description", "check", "descriptions"]
