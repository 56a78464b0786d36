"""Sphinx configuration: everything is built from the repository, without a download."""

import re
from pathlib import Path

import pyro_guides

project = "pyro_guides"
author = "The pyro_guides developers"
release = pyro_guides.__version__

extensions = [
    "myst_parser",  # pages are Markdown, so that they read well in a repository browser, too
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # docstrings are Google style
    "sphinx.ext.mathjax",  # pages refer to the script; nothing is fetched here
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3  # links to headings work as they do in a repository browser

napoleon_numpy_docstring = False
napoleon_use_ivar = True  # dataclasses say under "Attributes:" what their fields are
napoleon_attr_annotations = False
autodoc_typehints = "none"  # "Args:" says what arguments are
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}

nitpicky = True  # a reference that leads nowhere is a warning, and warnings are errors in the tests
nitpick_ignore_regex = [
    ("py:class", r"(abc|collections|np|numpy|pyro|torch)\..*|Module|NDArray"),  # not of this package
    ("py:class", r"pyro_guides\.scoring\.Simulation"),  # what a Prediction holds, and nobody else needs
]

html_theme = "furo"
html_title = f"pyro_guides {release}"
html_copy_source = False


def resolve_name(app, env, node, contnode):
    """Lead a reference to a name, whatever module it was taken from, to the one place that documents it."""
    domain = env.get_domain("py")
    name = "." + node.get("reftarget", "").split(".")[-1]
    places = [place for place, entry in domain.objects.items() if place.endswith(name) and not entry.aliased]
    if len(places) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], places[0], node, contnode)


def drop_outside_links(app, docname, source):
    """Keep only the text of links to folders and pages outside of the docs, which a repository can show."""
    folder = Path(app.srcdir, docname).parent

    def shown(link):
        target = (folder / link[2]).resolve()
        outside = not target.is_relative_to(Path(app.srcdir).resolve())
        return link[1] if outside and (target.is_dir() or target.suffix == ".md") else link[0]

    source[0] = re.sub(r"\[([^\]]+)\]\((\.\.[^)#\s]+)[^)]*\)", shown, source[0])


def setup(app):
    """Register what is above."""
    app.connect("source-read", drop_outside_links)
    app.connect("missing-reference", resolve_name)
