"""Configuration of the documentation site: ``make docs``."""

from __future__ import annotations

import re
from importlib.metadata import version as version_of
from typing import Any

project = "passion-plugin"
author = "The passion-plugin contributors"
version = release = version_of("passion-plugin")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

source_suffix = {".md": "markdown"}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

# With --fail-on-warning a link to a name of ours that no page describes is an error. Names of other projects would need
# their inventories from the network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!passion_plugin\.).*")]

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
# Types are in the signatures; the docstrings give shapes and dtypes.
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Attributes of a dataclass are described once, in its docstring.
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"passion-plugin {release}"


def _escape_axes(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Escape the asterisk in shapes such as (B, *spatial): it is no emphasis."""
    lines[:] = [re.sub(r"(?<=[(, ])\*(?=\w+[,)])", r"\\*", line) for line in lines]


def _unlink_files(_app: Any, _page: str, source: list[str]) -> None:
    """Turn links to files outside this folder into text: the site has no page for them."""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", source[0])


def _public_name(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Link annotations, which name private files, to the room or the root that describes the name; else leave text."""
    target = node.get("reftarget", "")
    if not target.startswith("passion_plugin."):
        return None
    in_room = re.sub(r"\._[a-z]\w*", "", target)
    in_root = re.sub(r"^passion_plugin\.[a-z]\w*\.", "passion_plugin.", in_room)
    for name in (in_room, in_root):
        found = env.get_domain("py").resolve_xref(
            env, node["refdoc"], app.builder, node["reftype"], name, node, contnode
        )
        if found is not None:
            return found
    return contnode if "._" in target else None


def setup(app: Any) -> None:
    """Connect what the configuration values cannot say."""
    app.connect("autodoc-process-docstring", _escape_axes)
    app.connect("missing-reference", _public_name)
    app.connect("source-read", _unlink_files)
