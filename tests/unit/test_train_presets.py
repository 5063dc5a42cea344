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


@pytest.mark.parametrize("stage,key,value,wanted", [
    ("decoder", "recipe.learning_rate", "nan", "a number, such as 0.0015"), ("decoder", "recipe.learning_rate", "NaN", "a number"), ("decoder", "recipe.steps", "x", "a whole number, such as 3000"),
    ("decoder", "recipe.steps", "2.5", "a whole number"), ("decoder", "recipe.gradient_checkpointing", "1", "true or false"), ("decoder", "recipe.betas", "[0.9]", "two numbers"), ("decoder", "recipe.betas", '["x", 0.9]', "a number"),
    ("decoder", "recipe.epsilon", "0", "positive"), ("decoder", "model.ratio", "0", "at least 1"), ("decoder", "model.base_channels", "-8", "at least 1"), ("decoder", "options.mixture.scenes", "x", "a number, such as 0.8"),
    ("decoder", "options.mixture", '{"scenes": "x"}', "a number"), ("distill", "options.teacher_steps", "0", "at least 1"), ("generator", "model.guidance_scale", "x", "a number, such as 2.0"), ("generator", "model.shift", "x", 'a number or "dimension"'),
    ("generator", "options.pool", "-1", "at least 0"), ("contrastive", "world.colors", "red", "a list"), ("contrastive", "world.image_size", "x", "a whole number, such as 32")])
def test_a_bad_value_is_told_with_its_key_and_what_is_wanted(stage, key, value, wanted):
    with pytest.raises(UserError) as caught: override(load_preset("tiny"), stage, {key: value})
    assert str(caught.value).startswith(key) and wanted in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("stage,key,value,read", [
    ("decoder", "recipe.learning_rate", ".001", 0.001), ("decoder", "recipe.learning_rate", "1", 1), ("decoder", "recipe.steps", "1e3", 1000), ("decoder", "model.ratio", "2.5", 2.5), ("decoder", "options.feature_weight", "0", 0), ("generator", "options.pool", "0", 0),
    ("generator", "model.shift", "dimension", "dimension"), ("decoder", "options.alignment", "7", "7"), ("generator", "options.latent_cache", "folder", "folder"), ("decoder", "recipe.betas", "[0.5, 0.9]", (0.5, 0.9))])
def test_a_good_value_is_read_as_what_it_replaces(stage, key, value, read):
    part = override(load_preset("tiny"), stage, {key: value}).stage(stage)
    place, name = key.split(".")
    found = getattr(part.recipe, name) if place == "recipe" else getattr(part, place)[name]
    assert found == read and type(found) is type(read)


def test_the_value_that_stands_there_can_always_be_given_again():
    for preset in PRESETS.values():
        for name, part in preset.stages.items():
            plain = json.loads(json.dumps({"recipe": asdict(part.recipe), "model": part.model, "options": part.options}))
            again = override(preset, name, {f"{place}.{key}": value if isinstance(value, str) else json.dumps(value) for place, values in plain.items() for key, value in values.items()})
            assert json.dumps(again.to_dict(), sort_keys=True) == json.dumps(preset.to_dict(), sort_keys=True)


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


UNEMBEDDED = {"generator-decoupled", "generator-repa"}  # baselines, trained where they are compared (`vugen ablate target`): all weights together stay below 40 MB


@pytest.mark.parametrize("name", sorted(set(load_preset("tiny").stages) - UNEMBEDDED))
def test_the_embedded_checkpoints_were_trained_as_the_preset_says(name):
    run = json.loads((checkpoints_dir("tiny") / name / "run.json").read_text())
    part = load_preset("tiny").stage(name)
    said = json.loads(json.dumps({"model": part.model, "options": part.options, "recipe": asdict(part.recipe)}))
    run["recipe"] = json.loads(json.dumps(asdict(Recipe(**run["recipe"]))))  # a record may be older than the newest keys, whose defaults change nothing
    assert {key: run[key] for key in said} == said and run["steps"] == part.recipe.steps


PAPERS = ("paper-imagenet", "paper-stockmix")


@pytest.mark.parametrize("name,steps,gpus,begin,guidance", [("paper-imagenet", 50_000, 8, 10_000, 1.8), ("paper-stockmix", 200_000, 32, 50_000, 5.0)])
def test_the_papers_presets_say_what_the_paper_says(name, steps, gpus, begin, guidance):
    part = load_preset(name).stage("generator")
    recipe = part.recipe
    assert (recipe.steps, recipe.ema_start, recipe.ema_decay, recipe.betas, recipe.weight_decay, recipe.learning_rate) == (steps, begin, 0.9999, (0.9, 0.95), 0.1, 3e-4)
    assert (recipe.warmup_steps, recipe.gradient_clip, recipe.schedule, recipe.batch_size) == (2000, 1.0, "constant", 8 * gpus)
    assert (part.model["guidance_scale"], part.model["num_inference_steps"], part.model["shift"], part.options["prompt_dropout"]) == (guidance, 50, 1.0, 0.1)
    assert part.model["vlm"] == load_preset(name).stage("decoder").options["encoder"] == "facebook/Perception-LM-1B"


GENERATORS = ("generator", "generator-decoupled", "generator-repa")


IMPROVEMENTS = {  # (stage, path): (off, in the improved twin)
    **{(stage, "model.shift"): (1.0, "dimension") for stage in GENERATORS}, **{(stage, "model.guidance_interval"): ((0.0, 1.0), (0.1, 1.0)) for stage in GENERATORS},
    ("generator-repa", "options.alignment_head"): ("mlp", "conv"), ("generator-repa", "options.alignment_targets"): ("plain", "spatial"), ("decoder", "options.feature_weight"): (0.0, 0.1),
    **{(stage, "options.latent_noise"): (0.0, 0.8) for stage in ("decoder", "decoder-pca", "distill", "decoder-ldm", "decoder-feedforward")},
    **{(stage, "options.alignment_head"): ("repa", "irepa") for stage in ("decoder", "decoder-pca", "distill", "decoder-feedforward")}}


def value_at(preset, stage, path):
    part, key = path.split(".")
    return getattr(preset.stage(stage), part).get(key)


@pytest.mark.parametrize("name", ["tiny", "small", *PAPERS])
def test_improved_twins_hold_every_improvement_and_nothing_else(name):
    from vugen.train.loop import differences
    plain, twin = load_preset(name), load_preset(f"{name}-improved")
    here = {key: values for key, values in IMPROVEMENTS.items() if key[0] in plain.stages}
    for (stage, path), (_, on) in here.items(): assert value_at(twin, stage, path) == on
    assert set(differences(plain.to_dict(), twin.to_dict())) == {"name", *(f"stages.{stage}.{path}" for stage, path in here), *(f"stages.{stage}.model.shift_base" for stage in GENERATORS)}
    for stage in GENERATORS: assert twin.stage(stage).model["shift_base"] == (57 if name in ("tiny", "small") else 4096)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_improvement_is_switched_alone_on_every_preset(name):
    from vugen.train.loop import differences
    preset = load_preset(name)
    for (stage, path), (off, on) in IMPROVEMENTS.items():
        if stage not in preset.stages: continue
        other = off if value_at(preset, stage, path) == on else on
        changed = override(preset, stage, {path: json.dumps(other)})
        assert list(differences(preset.to_dict(), changed.to_dict())) == [f"stages.{stage}.{path}"]
        assert override(preset, stage, {path: json.dumps(on)}).stage(stage).recipe == preset.stage(stage).recipe


def test_the_plain_presets_are_the_papers_and_those_of_scenes_say_what_differs():
    for name in ("tiny", "small", *PAPERS):
        for (stage, path), (off, _) in IMPROVEMENTS.items():
            if stage not in load_preset(name).stages: continue
            found = value_at(load_preset(name), stage, path)
            known = {("tiny", "model.shift"): 3.0, ("small", "model.shift"): 3.0, ("tiny", "options.latent_noise"): 0.1, ("small", "options.latent_noise"): 0.1}  # the embedded checkpoints were trained so
            assert found in (None, known.get((name, path), off))


def test_the_shift_of_the_papers_latents_is_two_and_tinys_is_that_of_its_checkpoint():
    from vugen.generate.text_to_image import TextToImage
    for name, dim, side, shift in (("paper-imagenet-improved", 64, 16, 2.0), ("tiny-improved", 8, 8, 3.0)):
        model = {key: value for key, value in load_preset(name).stage("generator").model.items() if key != "vlm"}
        made = TextToImage(latent_dim=dim, grid=(side, side), **model)
        assert made.shift == pytest.approx(shift, rel=0.01) and made.guidance_interval == (0.1, 1.0)
    off = override(load_preset("paper-imagenet"), "generator", {"model.guidance_interval": "[0, 1]"}).stage("generator").model
    assert TextToImage(latent_dim=64, grid=(16, 16), **off).guidance_interval == TextToImage(latent_dim=64, grid=(16, 16)).guidance_interval == (0, 1)


def test_presets_and_ablation_mean_the_same_improvements():
    from vugen.train.ablations import IMPROVED
    found = set()
    for variant in IMPROVED.variants:
        for step in variant.chain: found |= {(step.stage, path, value) for path, value in step.settings.items()}
        for measure in variant.measures: found |= {(measure.folder, f"model.{key}", value) for key, value in measure.options.items() if key == "guidance_interval"}
    for key in (("decoder", "options.feature_weight"), ("decoder", "options.latent_noise"), ("generator-repa", "options.alignment_head"), ("generator-repa", "options.alignment_targets"), ("generator", "model.guidance_interval")):
        assert (*key, IMPROVEMENTS[key][1]) in found
    assert ("generator", "model.shift", 3.0) in found  # tiny's shift by the rule, see above


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("stage", ["decoder", "generator"])
def test_what_is_missing_is_said_in_one_sentence(name, stage, tmp_path, monkeypatch):
    from vugen.train.presets import check_inputs
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as caught: check_inputs(load_preset(name), stage)
    text = str(caught.value)
    assert "corpus.path is not given" in text and "facebook/Perception-LM-1B" in text and text.count(".\n") == 0 and text.endswith(".")
    (tmp_path / "config.json").write_text("{}")
    given = override(load_preset(name), stage, {"corpus.path": str(tmp_path), **({"model.vlm": str(tmp_path)} if stage == "generator" else {"options.encoder": str(tmp_path), "options.alignment": str(tmp_path), "options.perceptual": "none"})})
    check_inputs(given, stage)
    if stage == "decoder":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="lpips-vgg needs the package lpips.*perceptual=lpips-vgg:FOLDER"): check_inputs(override(given, stage, {"options.perceptual": "lpips-vgg"}), stage)
        with pytest.raises(UserError, match="none.pth, do not exist"): check_inputs(override(given, stage, {"options.perceptual": "lpips-vgg:none.pth"}), stage)
    with pytest.raises(UserError, match="is not a folder"): check_inputs(override(given, stage, {"corpus.path": str(tmp_path / "none"), "corpus.kind": "images"}), stage)


def test_a_published_vae_is_looked_for_before_anything_large_is_fetched(tmp_path, monkeypatch):
    from vugen.encode import encoders
    from vugen.train.presets import missing_inputs
    fetched = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(encoders, "locate", fetched.append)
    given = override(load_preset("paper-imagenet"), "decoder-ldm", {"corpus.path": str(tmp_path), "options.vae": str(tmp_path / "none")})
    assert missing_inputs(given, "decoder-ldm") == [f"the VAE {tmp_path / 'none'} does not exist"] and fetched == ["facebook/Perception-LM-1B"]
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert missing_inputs(override(given, "decoder-ldm", {"options.vae": str(tmp_path)}), "decoder-ldm") == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package diffusers" in missing_inputs(given, "decoder-ldm")[0]


def test_a_corpus_survives_json_and_changes_the_fingerprint(tmp_path):
    paper = load_preset("paper-imagenet")
    given = override(paper, "generator", {"corpus.path": str(tmp_path)})
    (tmp_path / "mine.json").write_text(json.dumps(given.to_dict()))
    assert load_preset(str(tmp_path / "mine.json")).corpus == given.corpus and {**paper.corpus, "path": str(tmp_path)}.items() <= given.corpus.items()
    assert data_fingerprint(override(paper, "generator", {"corpus.template": "A [CLS]."}), "generator") != data_fingerprint(paper, "generator")
    assert paper.corpus["template"] == "This is an image of a [CLS]." and load_preset("paper-stockmix").corpus["template"] is None


def test_paths_of_a_corpus_stay_out_of_records_and_fingerprints(tmp_path):
    from vugen.train.presets import check_inputs, corpus_record
    def preset(place): return override(load_preset("paper-stockmix"), "decoder", {"corpus.kind": "images", "corpus.sets": json.dumps([[0.6, {"path": f"{place}/cc12m"}], [0.4, {"kind": "hub", "path": "owner/yfcc"}]]), "corpus.validation": f"{place}/coco"})
    here, there = preset(tmp_path), preset("/elsewhere")
    assert data_fingerprint(here, "decoder") == data_fingerprint(there, "decoder") != data_fingerprint(override(here, "decoder", {"corpus.sets": json.dumps([[1, {"path": "cc12m"}]])}), "decoder")
    told = corpus_record(here.corpus)
    assert told["sets"] == [[0.6, {"path": "cc12m"}], [0.4, {"kind": "hub", "path": "owner/yfcc"}]] and told["validation"] == {"path": "coco"} and str(tmp_path) not in json.dumps(told)
    with pytest.raises(UserError, match="corpus.sets.0.path .*cc12m is not a folder; corpus.validation.path .*coco is not a folder"): check_inputs(here, "decoder")
    named = [override(load_preset("paper-imagenet"), "decoder", {"corpus.path": path}) for path in ("one", "two/three")]
    assert data_fingerprint(named[0], "decoder") == data_fingerprint(named[1], "decoder")
