"""What `import meta_peft` offers."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module

import pytest
from surface import run_python

import meta_peft


def test_every_public_name_is_there_whatever_was_imported_before():
    """`adapt` and `meta_gradient` are functions of modules with the same name: importing those must not hide them."""
    for module in pkgutil.walk_packages(meta_peft.__path__, "meta_peft."):
        import_module(module.name)
    for name in meta_peft.__all__:
        found = getattr(meta_peft, name)
        assert inspect.isclass(found) or inspect.isfunction(found), name
        assert found.__name__ == name


def test_functions_with_the_name_of_their_module():
    run_python(
        "from meta_peft import adapt, meta_gradient\nimport meta_peft\n"
        "assert meta_peft.adapt is adapt and meta_peft.meta_gradient is meta_gradient\n"
        "assert adapt.__name__ == 'adapt' and meta_gradient.__name__ == 'meta_gradient'"
    )


def test_importing_it_is_cheap():
    run_python("import sys, meta_peft\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules")


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'adopt'"):
        meta_peft.adopt  # noqa: B018  # the access is the test
