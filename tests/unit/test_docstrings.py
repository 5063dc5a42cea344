"""Whatever can be called from outside says what it does."""
import ast
from pathlib import Path

import pytest

import vugen

MODULES = sorted(path for path in Path(vugen.__file__).parent.rglob("*.py") if path.name != "_modidx.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_public_functions_and_classes_have_docstrings(path):
    found = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    assert not [node.name for node in found if not node.name.startswith("_") and not ast.get_docstring(node)]
