"""What `import meta_peft` offers."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module

import pytest
from surface import run_python

import meta_peft


def test_every_public_name_is_there_whatever_was_imported_before():
    """A name that is a module's as well would become that module once it is imported."""
    modules = [module.name for module in pkgutil.walk_packages(meta_peft.__path__, "meta_peft.")]
    assert not {f"meta_peft.{name}" for name in meta_peft.__all__} & set(modules)
    for module in modules:
        import_module(module)
    for name in meta_peft.__all__:
        found = getattr(meta_peft, name)
        assert inspect.isclass(found) or inspect.isfunction(found), name
        assert found.__name__ == name


def test_a_name_is_the_same_by_import_and_by_attribute():
    from meta_peft import adapt, meta_gradient

    assert meta_peft.adapt is adapt
    assert meta_peft.meta_gradient is meta_gradient
    assert adapt.__name__ == "adapt"
    assert meta_gradient.__name__ == "meta_gradient"


def test_importing_it_is_cheap():
    run_python("import sys, meta_peft\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules")


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'adopt'"):
        meta_peft.adopt  # noqa: B018  # the access is the test
