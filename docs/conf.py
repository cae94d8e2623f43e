"""How the site is built: `make docs`. Every warning is an error, and a reference that points nowhere is a warning."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import hf_balancemix

project = "hf_balancemix"
author = "The contributors of hf_balancemix"
copyright = author
version = release = hf_balancemix.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "myst_nb"]
html_theme = "furo"
html_title = "hf_balancemix"
html_static_path = ["static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build", "results"]  # docs/results: cells and tables of the paper grid

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # a notebook's outputs are kept; a test runs it

default_role = "code"  # in docstrings `x` is code
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # what torch and transformers say of their methods stays with them
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False  # one entry may name several parameters: `first, second`
napoleon_custom_sections = [("Attributes", "params_style")]  # as these
nitpicky = True
# Names of other packages in signatures; of ours each must exist.
nitpick_ignore_regex = [("py:.*", r"(?!hf_balancemix)[A-Za-z_]+\..*|Tensor|Module|dict\[str")]


def _existing(name: str, near: str) -> bool:
    """Whether `name` is an object of the package, seen from the module or class `near`, or by its full path."""
    for start in (near, ""):
        path = [*filter(None, start.split(".")), *name.split(".")]
        for split in range(len(path), 0, -1):
            try:
                found = import_module(".".join(path[:split]))
                for part in path[split:]:
                    found = getattr(found, part)
            except (ImportError, AttributeError):
                continue
            return True
    return False


def internal_names_are_code(app, env, node, contnode):
    """A docstring may name what is ours and not public: that is plain code. What does not exist stays a warning."""
    target = node.get("reftarget", "")
    module = node.get("py:module") or ""
    nears = [module, f"{module}.{node.get('py:class') or ''}".rstrip(".")]
    for near in nears:  # a class's own module is below the room that shows it
        room = import_module(near) if near == module and near else None
        inner = getattr(room, (node.get("py:class") or "").split(".")[0], None)
        nears += [inner.__module__] if inner is not None and inner.__module__ not in nears else []
    return contnode if any(_existing(target, near) for near in nears) else None


def parameter_groups(app, what, name, obj, options, lines):
    """The groups `> Parameters that control ...` of the training arguments, as definition lists."""
    if not any(line.startswith("> ") for line in lines):
        return
    shown, inside = [], False
    for line in lines:
        entry = re.match(r"([a-z_, ]+) (\([^)]*\)(?:\))?): (.*)", line) if inside else None
        if line.startswith("> "):
            inside, line = True, f"**{line[2:]}**"
        if entry:
            names = ", ".join(f"``{word}``" for word in entry[1].split(", "))
            shown += ["", f"{names} {entry[2]}", f"    {entry[3]}"]
        else:
            shown.append(line)
    lines[:] = shown


def copy_notebooks(app):
    """The notebooks of examples/ are shown among the tutorials, and link to these from elsewhere."""
    tutorials = Path(__file__).parent / "tutorials"
    for notebook in (tutorials.parents[1] / "examples/notebooks").glob("*.ipynb"):
        text = notebook.read_text(encoding="utf-8").replace("../../docs/tutorials/", "")
        (tutorials / notebook.name).write_text(text, encoding="utf-8")


def setup(app):
    app.connect("builder-inited", copy_notebooks)
    app.connect("missing-reference", internal_names_are_code)
    app.connect("autodoc-process-docstring", parameter_groups, priority=400)  # before napoleon
