"""Presets are plain data: they survive JSON, refuse what cannot be, and load without torch."""
import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from vugen.data.scenes import World
from vugen.errors import UserError
from vugen.paths import checkpoints_dir
from vugen.train.presets import PRESETS, Recipe, data_fingerprint, load_preset, override, preset_from_dict


def test_presets_load_without_torch():
    done = subprocess.run([sys.executable, "-c", "import sys, vugen.train.presets; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_survives_json_and_makes_a_world(name, tmp_path):
    preset = load_preset(name)
    path = tmp_path / "preset.json"
    path.write_text(json.dumps(preset.to_dict()))
    again = load_preset(str(path))
    assert again.world == preset.world and json.dumps(again.to_dict(), sort_keys=True) == json.dumps(preset.to_dict(), sort_keys=True)
    assert World(**preset.world) == World(**again.world)


def test_smoke_has_the_stages_of_tiny():
    assert set(load_preset("smoke").stages) == set(load_preset("tiny").stages)


@pytest.mark.parametrize("key,value", [("steps", 0), ("learning_rate", 0), ("learning_rate", float("nan")), ("ema_decay", 1.0), ("schedule", "stairs"), ("precision", "fp8"), ("gradient_accumulation", 5), ("batch_size", 0)])
def test_impossible_recipes_name_the_key(key, value):
    with pytest.raises(UserError, match=key if key != "gradient_accumulation" else "micro-batches"): Recipe(**{"steps": 10, "batch_size": 8, key: value})


@pytest.mark.parametrize("path", ["recipe.learnig_rate", "model.hiden_size", "options.los", "world.image_sise", "steps", "recipe.steps.more", "nothing.at.all", ""])
def test_override_refuses_what_is_not_there(path):
    with pytest.raises(UserError): override(load_preset("tiny"), "contrastive", {path: "1"})


def test_override_checks_the_new_recipe_and_leaves_the_old_preset_alone():
    with pytest.raises(UserError, match="steps"): override(load_preset("tiny"), "contrastive", {"recipe.steps": "-3"})
    before = json.dumps(load_preset("tiny").to_dict())
    changed = override(load_preset("tiny"), "contrastive", {"recipe.steps": "3", "model.hidden_size": "64", "world.counts": '{"1": 1.0}'})
    assert changed.stage("contrastive").recipe.steps == 3 and changed.stage("contrastive").model["hidden_size"] == 64 and changed.world["counts"] == {1: 1.0}
    assert json.dumps(load_preset("tiny").to_dict()) == before


def test_the_fingerprint_follows_the_data_alone():
    tiny = load_preset("tiny")
    same = override(tiny, "contrastive", {"recipe.learning_rate": "0.5"})
    other = override(tiny, "contrastive", {"world.clutter": "3"})
    assert data_fingerprint(tiny, "contrastive") == data_fingerprint(same, "contrastive") != data_fingerprint(other, "contrastive")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "x"}', '{"name": "x", "world": {}, "stages": {"a": {"model": {}, "recipe": {"step": 1}}}}'])
def test_files_that_are_no_preset(text, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError): load_preset(str(path))
    with pytest.raises(UserError, match="none.json"): load_preset(str(tmp_path / "none.json"))


def test_unknown_recipe_keys_are_named():
    with pytest.raises(UserError, match="momentum"):
        preset_from_dict({"name": "x", "world": {}, "stages": {"a": {"model": {}, "recipe": {"steps": 1, "batch_size": 1, "momentum": 0.9}}}})


@pytest.mark.parametrize("name", sorted(load_preset("tiny").stages))
def test_the_embedded_checkpoints_were_trained_as_the_preset_says(name):
    run = json.loads((checkpoints_dir("tiny") / name / "run.json").read_text())
    part = load_preset("tiny").stage(name)
    said = json.loads(json.dumps({"model": part.model, "options": part.options, "recipe": asdict(part.recipe)}))
    run["recipe"] = json.loads(json.dumps(asdict(Recipe(**run["recipe"]))))  # a record may be older than the newest keys, whose defaults change nothing
    assert {key: run[key] for key in said} == said and run["steps"] == part.recipe.steps
