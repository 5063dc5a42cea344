"""Whatever can be called from outside says what it does."""
import ast
import importlib
from pathlib import Path

import pytest

import vugen

MODULES = sorted(path for path in Path(vugen.__file__).parent.rglob("*.py") if path.name != "_modidx.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_public_functions_and_classes_have_docstrings(path):
    found = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    assert not [node.name for node in found if not node.name.startswith("_") and not ast.get_docstring(node)]


DEFAULTS = {  # where the paper is silent: what must be said where the choice is made
    "encode.reducers:MLPReducer": ("LayerNorm, Linear(D, D), SiLU, Linear(D, d)",), "encode.reducers:WhitenedReducer": ("whitened", "frozen"), "encode.reducers:PCAReducer": ("centred",),
    "generate.mixture_of_transformers:MixtureOfTransformers": ("added", "2-D sin-cos", "one rotary index", "zero at the start", "no norm"), "generate.mixture_of_transformers:TimeEmbedding": ("added", "adaLN"),
    "models.flow:sample_time": ("logit-normal(0, 1)",), "generate.text_to_image:generate": ("Euler with 50 steps", "start token alone"), "train.generator:GeneratorStage": ("0.1 of the samples", "start token alone", "logit-normal(0, 1)"),
    "generate.latent_spaces:VAESpace": ("mean",), "generate.baselines:alignment_layer": ("min(4, layers // 2)",), "train.presets:_paper_stages": ("warm-up of 2000 steps", "clip at 1.0", "constant", "3e-4", "garbled")}


@pytest.mark.parametrize("name,said", DEFAULTS.items())
def test_defaults_where_the_paper_is_silent_are_named(name, said):
    module, kind = name.split(":")
    text = getattr(importlib.import_module(f"vugen.{module}"), kind).__doc__
    assert "FACTS default" in text and all(" ".join(clause.split()) in " ".join(text.split()) for clause in said)
