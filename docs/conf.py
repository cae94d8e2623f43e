"""How the site is built: `make docs`. Every warning is an error, and a reference that points nowhere is a warning."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

from sphinx.ext.napoleon.docstring import GoogleDocstring

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
exclude_patterns = ["jupyter_execute", "_build", "results"]  # docs/results: cells and tables of the paper grid

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
# Else what stands before a colon in the docstring of a property would be its type.
GoogleDocstring._parse_attribute_docstring = GoogleDocstring._consume_to_end
nitpicky = True
# Names of other packages in signatures; of ours each must exist.
nitpick_ignore_regex = [("py:.*", r"(?!hf_balancemix)[A-Za-z_]+\..*|Tensor|Module|dict\[str")]


def _within(start, name):
    """Whether `name`, perhaps with dots, is an attribute of `start`."""
    for part in name.split("."):
        if not hasattr(start, part):
            return False
        start = getattr(start, part)
    return True


def internal_names_are_code(app, env, node, contnode):
    """A docstring may name what is ours and not public: that is plain code. What does not exist stays a warning."""
    target, room = node.get("reftarget", ""), node.get("py:module") or "hf_balancemix"
    near = [module for name, module in sys.modules.items() if f"{name}.".startswith(f"{room}.")]
    near += [getattr(module, owner) for module in near if hasattr(module, owner := node.get("py:class") or " ")]
    module, _, name = target.rpartition(".")
    while module.startswith("hf_balancemix"):  # the full path, of a module, or of a class in it
        try:
            near.append(import_module(module))
            break
        except ImportError:
            module, _, owner = module.rpartition(".")
            name = f"{owner}.{name}"
    exists = any(_within(start, target) for start in near) or (module and name and _within(near[-1], name))
    return contnode if exists else None


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


def short_signature(app, what, name, obj, options, signature, return_annotation):
    """Trainer's arguments are 150, and the docstring has ours."""
    return ("(output_dir=None, **arguments)", None) if name.endswith("TrainingArguments") else None


def copy_notebooks(app):
    """The notebooks of examples/ are shown among the tutorials, and link to these from elsewhere."""
    tutorials = Path(__file__).parent / "tutorials"
    for notebook in (tutorials.parents[1] / "examples/notebooks").glob("*.ipynb"):
        text = notebook.read_text(encoding="utf-8").replace("../../docs/tutorials/", "")
        (tutorials / notebook.name).write_text(text, encoding="utf-8")


def setup(app):
    app.connect("builder-inited", copy_notebooks)
    app.connect("autodoc-process-signature", short_signature)
    app.connect("missing-reference", internal_names_are_code)
    app.connect("autodoc-process-docstring", parameter_groups, priority=400)  # before napoleon
