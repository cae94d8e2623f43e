"""The reference: every public name is on a page. That the pages build without a warning, `make lint` checks."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments

import hf_balancemix
from hf_balancemix import BalanceMixTrainingArguments
from hf_balancemix.core import BalanceMixSettings

DOCS = Path(__file__).parents[2] / "docs"
PAGES = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))


def rooms() -> dict[str, list[str]]:
    """The public names of each package below `hf_balancemix`."""
    names = [m.name for m in pkgutil.iter_modules(hf_balancemix.__path__, "hf_balancemix.") if m.ispkg]
    names += ["hf_balancemix.core.losses", "hf_balancemix.data.noise"]
    modules = {name: importlib.import_module(name) for name in names}
    return {name: list(module.__all__) for name, module in modules.items() if hasattr(module, "__all__")}


def test_every_public_name_is_on_a_reference_page():
    shown = set(re.findall(r"^\.\. (?:autofunction|py:data):: ([\w.]+)$", PAGES, re.MULTILINE))
    for room, options in re.findall(r"^\.\. automodule:: ([\w.]+)\n((?:   :.*\n)*)", PAGES, re.MULTILINE):
        assert ":members:" in options
        left_out = re.findall(r"\w+", (re.findall(r":exclude-members: (.*)", options) or [""])[0])
        # Sphinx shows what has a docstring of its own; a constant has its type's.
        described = {
            name
            for name in rooms()[room]
            if isinstance(thing := getattr(importlib.import_module(room), name), type) or callable(thing)
            if thing.__doc__
        }
        shown |= {f"{room}.{name}" for name in described - set(left_out)}
    last_parts = {name.rsplit(".", 1)[1] for name in shown}
    absent = {f"{room}.{name}" for room, names in rooms().items() for name in names} - shown
    assert {name for name in absent if name.rsplit(".", 1)[1] not in last_parts} == set()
    assert set(hf_balancemix.__all__) <= last_parts


def test_every_knob_is_explained():
    """Those of our training arguments that Trainer has not."""
    page = (DOCS / "guides/knobs.md").read_text(encoding="utf-8")
    ours = {f.name for f in fields(BalanceMixTrainingArguments)} - {f.name for f in fields(TrainingArguments)}
    explained = set(re.findall(r"\*\*`(\w+)`\*\*", page))
    assert {*ours, *(f.name for f in fields(BalanceMixSettings))} <= explained


def test_code_that_is_only_read_names_what_exists():
    """Most of the tutorials' code is run (test_tutorials.py); here all of it, and the README's, is parsed."""
    for page in [DOCS.parent / "README.md", *DOCS.rglob("*.md")]:
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("hf_balancemix"):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, name.name) for name in node.names), f"{page.name}: {node.module}"


def test_every_link_to_a_file_leads_somewhere():
    for page in [DOCS.parent / "README.md", *DOCS.rglob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"
