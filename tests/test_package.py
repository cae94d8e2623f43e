"""The package as a whole: light to import, every public name there, a fresh install complete."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hf_balancemix
import hf_balancemix.core
import hf_balancemix.data


def test_importing_the_package_loads_nothing_heavy():
    code = "import hf_balancemix, sys; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", [hf_balancemix, hf_balancemix.core, hf_balancemix.data])
def test_every_public_name_exists_and_says_what_it_is(module):
    for name in module.__all__:
        thing = getattr(module, name)
        assert name.isupper() or thing.__doc__, f"{module.__name__}.{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'BalanceMax'"):
        hf_balancemix.BalanceMax  # noqa: B018
