"""The program as a user meets it: trained from nothing, asked from any folder, and polite about every mistake."""
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vugen.data.images import load_image, to_pil
from vugen.data.scenes import World, batch
from vugen.lab.cli import main
from vugen.train.presets import load_preset

PROMPT = "a red circle left of a blue square"


def call(*words):
    "Exit code of the program, run in this process."
    with pytest.raises(SystemExit) as left: main([str(word) for word in words])
    return left.value.code


def program(*words, cwd, **environment):
    "The program in a process of its own."
    return subprocess.run([sys.executable, "-m", "vugen.lab.cli", *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    "Checkpoints of every stage that the verbs need, trained for a few steps by the public command."
    root = tmp_path_factory.mktemp("smoke")
    for stage in ("parser", "contrastive", "decoder", "vlm", "generator"):
        assert call("train", stage, "--preset", "smoke", "--root", root) == 0
    return root


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    "A scene as a file."
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    to_pil(batch(World(**load_preset("tiny").world), 1, [0])["images"][0]).resize((96, 96)).save(path)
    return path


def test_a_trained_stage_tells_how_it_came_about(smoke):
    for stage in ("parser", "contrastive", "decoder", "vlm", "generator"):
        record = json.loads((smoke / stage / "run.json").read_text())
        assert record["stage"] == stage and record["steps"] == 4 and record["rows"] and record["world"]["image_size"] == 32
        card = (smoke / stage / "README.md").read_text()
        assert "Held-out figures" in card and str(smoke) not in card + json.dumps(record)
    assert [path.name for path in smoke.iterdir() if not path.name.startswith(".")].__len__() == 5


# ---- what works -------------------------------------------------------------------------------------------------------------

def test_generate_writes_pictures_and_is_repeatable(smoke, tmp_path, capsys):
    for name in ("first", "second"):
        assert call("generate", PROMPT, "a green star", "--n", 2, "--steps", 2, "--seed", 5, "--out", tmp_path / name, "--root", smoke) == 0
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["00000.png", "00001.png", "00002.png", "00003.png", "generate.json"]
    pixels = [[np.array(load_image(tmp_path / name / f"0000{number}.png")) for number in range(4)] for name in ("first", "second")]
    assert all(np.array_equal(one, two) for one, two in zip(*pixels)) and not np.array_equal(pixels[0][0], pixels[0][1])
    written = json.loads((tmp_path / "first/generate.json").read_text())
    assert [row["prompt"] for row in written["rows"]] == [PROMPT, PROMPT, "a green star", "a green star"]
    assert written["run"]["seed"] == 5 and set(written["run"]["checkpoints"]) >= {"generator", "vlm"} and str(tmp_path) not in json.dumps(written)


def test_reconstruct_shows_and_measures(smoke, picture, tmp_path, capsys):
    assert call("reconstruct", picture, "--steps", 2, "--out", tmp_path / "out", "--root", smoke) == 0
    rows = json.loads((tmp_path / "out/reconstruct.json").read_text())["rows"]
    assert [row["images"] for row in rows] == ["learned"] and rows[0]["metric"] == "PSNR" and rows[0]["value"] > 3
    assert "pca" in (printed := capsys.readouterr().out).split("Notes:")[1] and "`vugen train decoder-pca`" in printed
    panel = load_image(tmp_path / "out" / rows[0]["file"])
    assert panel.width > 2 * 256 - 1


def test_reconstruct_without_the_learned_pair_says_so(smoke, picture, tmp_path, capsys):
    for part in ("contrastive", "decoder"): shutil.copytree(smoke / part, tmp_path / "root" / {"decoder": "decoder-pca"}.get(part, part))
    assert call("reconstruct", picture, picture, "--steps", 1, "--out", tmp_path / "out", "--root", tmp_path / "root") == 0
    printed = capsys.readouterr()
    assert "learned" in printed.out.split("Notes:")[1] and "`vugen train decoder`" in printed.out and "reconstruct: 2/2" in printed.err
    found = json.loads((tmp_path / "out/reconstruct.json").read_text())
    assert [row["images"] for row in found["rows"]] == ["pca"] * 2 and list(found["run"]["notes"]) == ["learned"]


def test_digits_are_read_as_the_words_that_they_stand_for(smoke, tmp_path):
    for name, prompt in (("digit", "2 red circles"), ("word", "two red circles")):
        assert call("generate", prompt, "--steps", 1, "--out", tmp_path / name, "--root", smoke) == 0
    assert np.array_equal(*(np.array(load_image(tmp_path / name / "00000.png")) for name in ("digit", "word")))


def test_classify_prints_and_writes_every_scorer(smoke, picture, tmp_path, capsys):
    assert call("classify", picture, "--captions", PROMPT, "a green star", "--json", tmp_path / "rows.json", "--root", smoke) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    scorers = {row["scorer"] for row in rows}
    assert {"contrastive", "likelihood", "denoising"} <= scorers and len(rows) == 2 * len(scorers)
    for scorer in scorers:
        own = [row for row in rows if row["scorer"] == scorer]
        assert sum(row["share"] for row in own) == pytest.approx(1, abs=1e-4) and sum(row["best"] for row in own) == 1
        assert max(own, key=lambda row: row["value"])["best"]
    printed = capsys.readouterr().out
    assert all(scorer in printed for scorer in scorers)


def test_scorers_that_cannot_read_a_caption_step_aside(smoke, picture, tmp_path, capsys):
    captions = "a cat looking into the camera", "a rocket on its launch pad"
    assert call("classify", picture, "--captions", *captions, "--json", tmp_path / "rows.json", "--root", smoke) == 0
    found, printed = json.loads((tmp_path / "rows.json").read_text()), capsys.readouterr().out
    answered, silent = {row["scorer"] for row in found["rows"]}, found["run"]["notes"]
    assert answered and {"contrastive", "likelihood", "denoising"} <= set(silent) and not answered & set(silent)
    assert all(why.endswith((".", "?")) and f"{name}: {why}" in printed for name, why in silent.items())


def test_the_seed_of_classify_is_that_of_the_noise(smoke, picture, tmp_path):
    def scores(seed):
        assert call("classify", picture, "--captions", PROMPT, "a green star", "--scorer", "denoising", "--seed", seed, "--json", tmp_path / "rows.json", "--root", smoke) == 0
        return [row["value"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert scores(3) == scores(3) != scores(4)


def test_guidance_of_zero_is_used_and_recorded(smoke, tmp_path):
    pictures = {}
    for scale in (0, 2):
        assert call("generate", PROMPT, "--guidance-scale", scale, "--steps", 2, "--out", tmp_path / str(scale), "--root", smoke) == 0
        assert json.loads((tmp_path / str(scale) / "generate.json").read_text())["run"]["guidance_scale"] == scale
        pictures[scale] = np.array(load_image(tmp_path / str(scale) / "00000.png"))
    assert not np.array_equal(pictures[0], pictures[2])


def test_repeated_settings_add_up(tmp_path):
    options = ("--set", "recipe.steps=2", "--set", "recipe.checkpoint_every=1", "recipe.warmup_steps=1", "--set=options.evaluation=8")
    assert call("train", "parser", "--preset", "smoke", "--root", tmp_path, *options) == 0
    record = json.loads((tmp_path / "parser/run.json").read_text())
    assert (record["recipe"]["steps"], record["recipe"]["checkpoint_every"], record["recipe"]["warmup_steps"], record["options"]["evaluation"]) == (2, 1, 1, 8)


def test_probe_tells_the_shape_of_layers_and_their_likeness(smoke, tmp_path, capsys):
    assert call("probe", "--geometry", "--against", "untrained", "--limit", 60, "--json", tmp_path / "geometry.json", "--root", smoke) == 0
    found, shown = json.loads((tmp_path / "geometry.json").read_text()), capsys.readouterr().out
    assert {"encoder", "suite", "category", "metric", "value", "low", "high", "n", "chance"} <= set(found["rows"][0]) and "versions" in found["run"] and found["run"]["command"].startswith("vugen probe --geometry") and str(smoke) not in json.dumps(found)
    layers = {row["category"] for row in found["rows"] if "against" not in row}
    assert {row["metric"] for row in found["rows"]} >= {"effective rank", "participation ratio", "CKA (linear, debiased)", "CKA (rbf, debiased)"} and all(layer in shown for layer in layers)
    assert len([row for row in found["rows"] if row["metric"].startswith("CKA")]) == 2 * len(layers) ** 2
    assert call("probe", "--geometry", "--layers", "norm", "--limit", 60, "--json", "--root", smoke) == 0
    assert {row["category"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"norm"}


def test_layers_by_name_are_those_of_both_encoders(smoke, tmp_path, capsys):
    assert call("probe", "--geometry", "--layers", "norm", "--against", "untrained", "--limit", 60, "--json", tmp_path / "geometry.json", "--root", smoke) == 0
    found, said = json.loads((tmp_path / "geometry.json").read_text()), capsys.readouterr()
    assert {(row["layer"], row["other_layer"]) for row in found["rows"] if "against" in row} == {("norm", "norm")}
    assert "layers of contrastive: 60/60" in said.err and "layers of untrained: 60/60" in said.err


def test_the_shape_of_layers_is_read_first_and_fits_a_terminal(capsys, monkeypatch):
    from vugen.lab.cli import show_geometry
    from vugen.understand.geometry import MEASURES
    monkeypatch.setenv("COLUMNS", "80")
    shape = [{"encoder": "contrastive", "category": f"vision.blocks.{a}", "metric": metric, "value": 123.4567, "n": 2000, "channels": 1024} for a in range(12) for metric in MEASURES]
    likeness = [{"encoder": "contrastive", "metric": "CKA (linear, debiased)", "value": a / (b + 12), "against": "efficientnet-lite0", "layer": f"vision.blocks.{a}", "other_layer": f"features.stage.{b}"} for a in range(12) for b in range(20)]
    show_geometry(likeness + shape)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and lines[1].split() == ["layer", "channels", "eff.", "rank", "part.", "ratio", "dim.", "TwoNN", "dim.", "MLE"] and sum("1024" in line for line in lines) == 12
    heads = [line.split() for line in lines if line.strip().replace(" ", "").isdigit()]
    assert sum(heads, []) == [str(b) for b in range(20)] and [f"{11 / (b + 12):.2f}" for b in range(len(heads[0]))] == [line for line in lines if line.startswith("vision.blocks.11")][1].split()[1:]


def test_bind_and_probe_write_long_rows(smoke, tmp_path, capsys):
    assert call("bind", "--suite", "scenes", "--scorer", "contrastive,bag-of-words", "--limit", 4, "--items", tmp_path / "items.parquet", "--json", tmp_path / "bind.json", "--root", smoke) == 0
    found = json.loads((tmp_path / "bind.json").read_text())
    assert {"scorer", "suite", "category", "metric", "value", "low", "high", "n", "chance"} <= set(found["rows"][0])
    assert all(row["low"] <= row["value"] <= row["high"] for row in found["rows"]) and "versions" in found["run"] and "seed" in found["run"]
    assert set(found["run"]["checkpoints"]) >= {"contrastive", "vlm"} and "weights" not in found["run"] and found["run"]["command"].startswith("vugen bind") and str(smoke) not in json.dumps(found)
    assert call("probe", "--encoder", "contrastive", "--limit", 60, "--json", tmp_path / "probe.json", "--root", smoke) == 0
    assert {"encoder", "suite", "category", "metric", "readout", "value", "low", "high", "n", "chance"} <= set(json.loads((tmp_path / "probe.json").read_text())["rows"][0])
    shown = capsys.readouterr().err
    assert "contrastive ViT, attention on the tokens: 20/20" in shown and "contrastive ViT, untrained, pictures: 105/105" in shown


def test_retrieve_names_the_captions_of_pictures(smoke, picture, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"): shutil.copy(picture, tmp_path / "pictures" / name)
    words = "--shortlist", 6, "--budget", 2, "--top", 3, "--json", tmp_path / "rows.json", "--out", tmp_path / "index"
    assert call("retrieve", picture, tmp_path / "pictures", "--captions", 300, *words, "--root", smoke) == 0
    shown, found = capsys.readouterr(), json.loads((tmp_path / "rows.json").read_text())
    assert [(row["images"], row["rank"]) for row in found["rows"]] == [(name, rank) for name in ("scene.png", "a.png", "b.png") for rank in (1, 2, 3)]
    assert all(row["category"] in shown.out for row in found["rows"]) and "embedding captions: 300/300" in shown.err and str(tmp_path) not in json.dumps(found)
    same = [[row["category"] for row in found["rows"] if row["images"] == name] for name in ("scene.png", "a.png")]
    assert same[0] == same[1]
    assert call("retrieve", picture, "--captions", 300, *words, "--root", smoke) == 0 and "embedding" not in capsys.readouterr().err  # the vectors lie there
    assert call("retrieve", picture, "--captions", 300, *words) == 2 and "another model" in capsys.readouterr().err  # the embedded checkpoints
    (tmp_path / "mine.txt").write_text("a red circle\na blue star\n")
    assert call("retrieve", picture, "--captions", tmp_path / "mine.txt", "--shortlist", 2, "--scorer", "likelihood", "--index", "hnsw", "--out", tmp_path / "other", "--json", tmp_path / "two.json", "--root", smoke) == 0
    two = json.loads((tmp_path / "two.json").read_text())
    assert {row["category"] for row in two["rows"]} == {"a red circle", "a blue star"} and "mine.txt" in two["run"]["command"] and str(tmp_path) not in json.dumps(two)


def test_retrieve_measures_itself_on_scenes(smoke, tmp_path, capsys):
    line = "retrieve", "--scenes", 8, "--captions", 300, "--index", "ivf", "--shortlist", 3, 6, "--budget", 1, 2, "--things", 2, 3, "--out", tmp_path / "index", "--json", tmp_path / "rows.json", "--root", smoke
    assert call(*line) == 0
    shown, found = capsys.readouterr(), json.loads((tmp_path / "rows.json").read_text())
    assert {"images", "suite", "category", "metric", "value", "low", "high", "n", "chance"} <= set(found["rows"][0]) and "versions" in found["run"] and str(tmp_path) not in json.dumps(found)
    assert {row["metric"] for row in found["rows"]} >= {"recall@1", "recall@100", "exact recall@10", "true@1"} and {row["n"] for row in found["rows"] if row["images"] == "all"} == {6}
    assert all((tmp_path / "index" / name).read_bytes()[:4] == b"\x89PNG" for name in ("recall.png", "pareto.png")) and "re-ranking: 96/96" in shown.err
    assert call(*line) == 0 and json.loads((tmp_path / "rows.json").read_text())["rows"] == found["rows"] and "embedding" not in capsys.readouterr().err


def test_evaluate_judges_generated_pictures_and_compares_folders(smoke, tmp_path, capsys):
    assert call("generate", PROMPT, "a green star", "--steps", 2, "--out", tmp_path / "drawn", "--root", smoke) == 0
    assert call("evaluate", tmp_path / "drawn", "--reference", tmp_path / "drawn", "--json", tmp_path / "rows.json", "--root", smoke) == 0
    shown = capsys.readouterr().err
    assert all(each in shown for each in ("reading pictures: 2/2", "generated pictures: 2/2", "rendered scenes: 500/500", "features: 2/2"))
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {"generated", "generated, prompts shuffled", "rendered"} <= {row["images"] for row in rows}
    psnr, frechet = [row for row in rows if row["metric"] == "PSNR"], [row for row in rows if row["metric"].startswith("Fréchet")]
    assert psnr[0]["value"] > 90 and frechet[0]["value"] == pytest.approx(0, abs=1e-3) and frechet[0]["metric"] != "FID"


def test_pictures_of_one_prompt_are_no_control_for_each_other(smoke, tmp_path, capsys, monkeypatch):
    from vugen.evaluate import scene_parser
    asked, real = [], scene_parser.prompt_accuracy
    monkeypatch.setattr(scene_parser, "prompt_accuracy", lambda parser, images, prompts, **columns: asked.append(list(prompts)) or real(parser, images, prompts, **columns))
    assert call("generate", PROMPT, "a green star", "--n", 2, "--steps", 1, "--out", tmp_path / "two", "--root", smoke) == 0
    assert call("evaluate", tmp_path / "two", "--root", smoke) == 0
    assert asked == [[PROMPT] * 2 + ["a green star"] * 2, ["a green star"] * 2 + [PROMPT] * 2]
    same = "a blue square right of a red circle"
    assert call("generate", PROMPT, same, "--n", 2, "--steps", 1, "--out", tmp_path / "one", "--root", smoke) == 0
    capsys.readouterr()
    assert call("evaluate", tmp_path / "one", "--json", tmp_path / "rows.json", "--root", smoke) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    assert {row["images"] for row in found["rows"]} == {"generated", "rendered"} and "prompts shuffled" in found["run"]["notes"]
    assert found["run"]["notes"]["prompts shuffled"] in capsys.readouterr().out


def test_describe_prints_json_without_weights(capsys, tmp_path):
    assert call("describe", "tiny", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["preset"] == "tiny" and found["memory_gib"] > 0
    assert all({"name", "parameters", "trainable", "gflops_per_image"} <= set(part) for part in found["parts"])
    assert sum(part["trainable"] for part in found["parts"]) < 12_000_000
    assert {"contrastive", "decoder", "lit", "vlm", "generator"} <= {stage["stage"] for stage in found["stages"]} | set(found["notes"])


def test_every_verb_has_help(capsys):
    from vugen.lab.cli import VERBS
    for verb in VERBS:
        assert call(verb, "--help") == 0
        assert VERBS[verb].__doc__.split(",")[0][:30] in capsys.readouterr().out


def test_help_answers_at_once(tmp_path):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = program("--help", cwd=tmp_path)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and "generate" in done.stdout
    print(f"vugen --help: {min(times):.2f} s")
    light = subprocess.run([sys.executable, "-X", "importtime", "-m", "vugen.lab.cli", "--help"], cwd=tmp_path, capture_output=True, text=True)
    loaded = {line.rsplit("|", 1)[-1].strip() for line in light.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "transformers", "tyro", "PIL", "gradio", "matplotlib"}


# ---- the embedded checkpoints -----------------------------------------------------------------------------------------------

def test_embedded_checkpoints_answer_from_any_folder(picture, tmp_path):
    done = program("generate", PROMPT, "--out", "drawn", "--steps", 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_image(tmp_path / "drawn/00000.png").size == (32, 32)
    done = program("reconstruct", picture, "--out", "back", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    quality = {row["images"]: row["value"] for row in json.loads((tmp_path / "back/reconstruct.json").read_text())["rows"]}
    assert set(quality) == {"learned", "pca"} and min(quality.values()) > 12
    done = program("classify", picture, "--captions", PROMPT, "a green star", "--json", cwd=tmp_path)
    assert done.returncode == 0 and {"contrastive", "likelihood", "denoising"} <= {row["scorer"] for row in json.loads(done.stdout)["rows"]}, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "drawn"]


# ---- what is refused --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def bad(tmp_path_factory, picture, smoke):
    "Files and folders that are wrong in one way each."
    folder = tmp_path_factory.mktemp("bad")
    (folder / "truncated.png").write_bytes(picture.read_bytes()[:120])
    (folder / "empty.png").write_bytes(b"")
    (folder / "words.png").write_text("not a picture")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "zoo.txt").write_text("a zebra\na red circle\n")
    for name in ("missing", "truncated", "foreign", "garbled"): shutil.copytree(smoke, folder / name)
    (folder / "missing/generator/model.safetensors").unlink()
    weights = folder / "truncated/generator/model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    config = json.loads((folder / "foreign/generator/config.json").read_text())
    (folder / "foreign/generator/config.json").write_text(json.dumps({**config, "class": "BertModel"}))
    (folder / "garbled/generator/config.json").write_text("{")
    (folder / "nothing").mkdir()
    (folder / "results").mkdir()
    (folder / "results/old.json").write_text("[]")
    return folder


MISTAKES = {
    "missing image": ("reconstruct {bad}/none.png --out {out} --root {smoke}", "none.png"),
    "truncated image": ("reconstruct {bad}/truncated.png --out {out} --root {smoke}", "truncated.png"),
    "empty image": ("reconstruct {bad}/empty.png --out {out} --root {smoke}", "empty.png"),
    "text as image": ("reconstruct {bad}/words.png --out {out} --root {smoke}", "words.png"),
    "second image bad": ("reconstruct {picture} {bad}/words.png --out {out} --root {smoke}", "words.png"),
    "folder as image": ("classify {bad} --captions a_red_circle a_blue_star --root {smoke}", "bad"),
    "no image": ("reconstruct --out {out} --root {smoke}", "image"),
    "no steps": ("reconstruct {picture} --steps 0 --out {out} --root {smoke}", "--steps"),
    "no prompt": ("generate --out {out} --root {smoke}", "prompt"),
    "empty prompt": ("generate EMPTY --out {out} --root {smoke}", "empty"),
    "blank prompt": ("generate _ --out {out} --root {smoke}", "empty"),
    "endless prompt": ("generate ENDLESS --out {out} --root {smoke}", "10,000 characters"),
    "foreign prompt": ("generate a_purple_idea --out {out} --root {smoke}", "idea"),
    "second prompt foreign": ("generate a_red_circle a_purple_idea --out {out} --root {smoke}", "idea"),
    "foreign caption": ("classify {picture} --captions a_red_circle the_quick_fox --scorer contrastive,likelihood,denoising --root {smoke}", "fox|quick|the"),
    "empty caption": ("classify {picture} --captions a_red_circle EMPTY --root {smoke}", "The caption is empty"),
    "endless caption": ("classify {picture} --captions a_red_circle ENDLESS --root {smoke}", "10,000 characters"),
    "word the models never learned": ("generate a_red_arrow --out {out} --root {smoke}", "arrow"),
    "one caption": ("classify {picture} --captions a_red_circle --root {smoke}", "two captions"),
    "no pictures wanted": ("generate a_red_circle --n 0 --out {out} --root {smoke}", "--n"),
    "absurdly many pictures wanted": ("generate a_red_circle --n 100000 --out {out} --root {smoke}", "256"),
    "seed below zero": ("generate a_red_circle --seed -1 --out {out} --root {smoke}", "--seed"),
    "seed beyond any generator": ("generate a_red_circle --seed 99999999999999999999 --out {out} --root {smoke}", "--seed"),
    "size below zero": ("generate a_red_circle --size -5 --out {out} --root {smoke}", "--size"),
    "no size": ("generate a_red_circle --size 0 --out {out} --root {smoke}", "--size"),
    "absurd size": ("generate a_red_circle --size 1000000 --out {out} --root {smoke}", "--size"),
    "no decoder steps": ("generate a_red_circle --decoder-steps 0 --out {out} --root {smoke}", "--decoder-steps"),
    "guidance that is no number": ("generate a_red_circle --guidance-scale nan --out {out} --root {smoke}", "--guidance-scale"),
    "seed below zero, reconstruct": ("reconstruct {picture} --seed -1 --out {out} --root {smoke}", "--seed"),
    "panels below zero": ("reconstruct {picture} --size -5 --out {out} --root {smoke}", "--size"),
    "no panels": ("reconstruct {picture} --size 0 --out {out} --root {smoke}", "--size"),
    "seed below zero, classify": ("classify {picture} --captions a_red_circle a_blue_star --seed -1 --root {smoke}", "--seed"),
    "seed below zero, bind": ("bind --seed -1 --root {smoke}", "--seed"),
    "no items": ("bind --limit 0 --root {smoke}", "--limit"),
    "seed below zero, probe": ("probe --seed -1 --root {smoke}", "--seed"),
    "seed below zero, train": ("train parser --preset smoke --root {out} --seed -1", "--seed"),
    "no seconds": ("bench scenes --seconds 0", "--seconds"),
    "no sampler steps": ("generate a_red_circle --steps 0 --out {out} --root {smoke}", "steps"),
    "no such root": ("generate a_red_circle --out {out} --root {bad}/none", "none"),
    "empty root": ("generate a_red_circle --out {out} --root {bad}/nothing", "nothing"),
    "missing checkpoint": ("generate a_red_circle --out {out} --root {bad}/missing", "model.safetensors"),
    "truncated checkpoint": ("generate a_red_circle --out {out} --root {bad}/truncated", "model.safetensors"),
    "foreign checkpoint": ("generate a_red_circle --out {out} --root {bad}/foreign", "BertModel"),
    "garbled config": ("generate a_red_circle --out {out} --root {bad}/garbled", "config.json"),
    "empty root, reconstruct": ("reconstruct {picture} --out {out} --root {bad}/nothing", "nothing"),
    "empty root, classify": ("classify {picture} --captions a_red_circle a_blue_star --root {bad}/nothing", "nothing"),
    "out is a file": ("generate a_red_circle --steps 1 --out {picture} --root {smoke}", "scene.png"),
    "json is a folder": ("describe smoke --json {bad}/results", "results is a folder"),
    "json is the folder itself": ("describe smoke --json .", "is a folder"),
    "json is the root of all": ("describe smoke --json /", "is a folder"),
    "json below a file": ("describe smoke --json {picture}/rows.json", "scene.png is a file"),
    "out below a file": ("generate a_red_circle --out {picture}/deep/out --root {smoke}", "scene.png is a file"),
    "no such device": ("generate a_red_circle --device toaster --out {out} --root {smoke}", "toaster"),
    "device without memory": ("generate a_red_circle --device meta --out {out} --root {smoke}", "'meta'"),
    "device without memory, bind": ("bind --device meta --root {smoke}", "'meta'"),
    "device without memory, probe": ("probe --device meta --root {smoke}", "'meta'"),
    "graphics card that is not there": ("generate a_red_circle --device cuda:99 --out {out} --root {smoke}", "GPU"),
    "no such suite": ("bind --suite soup --root {smoke}", "soup"),
    "no such scorer": ("bind --scorer soup --root {smoke}", "soup"),
    "no such encoder": ("probe --encoder {bad}/none --root {smoke}", "none"),
    "comparison without geometry": ("probe --against untrained --root {smoke}", "--geometry"),
    "no such layer": ("probe --geometry --limit 40 --layers soup --root {smoke}", "soup"),
    "layer that the other encoder lacks": ("probe --geometry --limit 40 --layers norm --against efficientnet-lite0 --root {smoke}", "'efficientnet-lite0'"),
    "no such encoder to compare with": ("probe --geometry --limit 40 --against {bad}/none --root {smoke}", "none"),
    "no such bench": ("bench soup", "soup"),
    "no such preset": ("describe soup", "soup"),
    "no such stage": ("train soup --root {out}", "soup"),
    "no such preset to train": ("train parser --preset soup --root {out}", "soup"),
    "no such dial": ("train parser --preset smoke --root {out} --set recipe.stepz=3", "stepz"),
    "no value": ("train parser --preset smoke --root {out} --set recipe.steps", "recipe.steps"),
    "impossible value": ("train parser --preset smoke --root {out} --steps 0", "steps"),
    "stage before it missing": ("train decoder --preset smoke --root {out}", "contrastive"),
    "no such folder": ("evaluate {bad}/none --root {smoke}", "none"),
    "folder without prompts": ("evaluate {bad}/nothing --root {smoke}", "generate.json"),
    "no picture to find captions for": ("retrieve --root {smoke}", "picture"),
    "truncated image, retrieve": ("retrieve {bad}/truncated.png --captions 200 --out {out} --root {smoke}", "truncated.png"),
    "folder without pictures": ("retrieve {bad}/nothing --captions 200 --out {out} --root {smoke}", "nothing"),
    "blank captions": ("retrieve {picture} --captions {bad}/blank.txt --out {out} --root {smoke}", "blank.txt"),
    "no such captions": ("retrieve {picture} --captions {bad}/none.txt --out {out} --root {smoke}", "none.txt"),
    "captions that the tower cannot read": ("retrieve {picture} --captions {bad}/zoo.txt --shortlist 1 --out {out} --root {smoke}", "zebra"),
    "no captions": ("retrieve {picture} --captions 0 --out {out} --root {smoke}", "at least 1"),
    "more captions than the world has": ("retrieve {picture} --captions 99999999 --out {out} --root {smoke}", "different captions"),
    "shortlist longer than the captions": ("retrieve {picture} --captions 200 --shortlist 300 --out {out} --root {smoke}", "from 1 to 200"),
    "shortlist of nothing": ("retrieve {picture} --captions 200 --shortlist 0 --out {out} --root {smoke}", "--shortlist"),
    "no budget": ("retrieve {picture} --captions 200 --budget 0 --out {out} --root {smoke}", "--budget"),
    "two shortlists for a picture": ("retrieve {picture} --captions 200 --shortlist 5 10 --out {out} --root {smoke}", "one shortlist"),
    "no such index": ("retrieve {picture} --captions 200 --index tree --out {out} --root {smoke}", "flat, ivf, hnsw"),
    "option of another index": ("retrieve {picture} --captions 200 --index hnsw --nprobe 3 --out {out} --root {smoke}", "nprobe"),
    "no two towers": ("retrieve {picture} --captions 200 --encoder denoising --out {out} --root {smoke}", "denoising"),
    "too few scenes": ("retrieve --scenes 3 --captions 200 --out {out} --root {smoke}", "--scenes"),
    "scenes and a picture": ("retrieve {picture} --scenes 8 --out {out} --root {smoke}", "two questions"),
    "seed below zero, retrieve": ("retrieve {picture} --seed -1 --out {out} --root {smoke}", "--seed"),
    "empty root, retrieve": ("retrieve {picture} --out {out} --root {bad}/nothing", "nothing"),
    "no number of captions": ("bench retrieval --size many", "many"),
    "no such verb": ("dance", "dance"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake, bad, smoke, picture, tmp_path, capsys):
    line, named = MISTAKES[mistake]
    out = tmp_path / "out"
    special = {"EMPTY": "", "_": " ", "ENDLESS": "red " * 2500}
    words = [special.get(word, word.format(bad=bad, smoke=smoke, picture=picture, out=out)) for word in line.split()]
    words = [word if "/" in word or word.startswith("--") or word in special.values() else word.replace("_", " ") for word in words]
    before = picture.read_bytes()
    code = call(*words)
    printed = capsys.readouterr()
    assert code == 2 and len(printed.err.strip().splitlines()) == 1 and "Traceback" not in printed.err, printed.err
    assert any(name in printed.err for name in named.split("|")), printed.err
    assert len(printed.err) < 600 and printed.err.strip().endswith((".", "?"))
    assert not out.exists() and not list(tmp_path.iterdir()) and picture.read_bytes() == before


GENERATE, RECONSTRUCT, CLASSIFY = "generate a_red_circle", "reconstruct {picture}", "classify {picture} --captions a_red_circle a_blue_square"
SPOILED = [  # a file of the checkpoints, what stands in it (a dict: these keys are others), the verb that reads it
    ("generator/config.json", {"unheard_of": 1}, GENERATE), ("generator/config.json", {"grid": None}, GENERATE), ("generator/config.json", {"position_scale": "far"}, GENERATE),
    ("generator/config.json", {"latent_dim": 0}, GENERATE), ("generator/config.json", {"vlm": 3}, GENERATE), ("generator/config.json", {"guidance_scale": "much"}, GENERATE),
    ("generator/config.json", {"num_inference_steps": None}, GENERATE), ("generator/config.json", {"class": []}, GENERATE),
    ("vlm/config.json", [1], GENERATE), ("vlm/config.json", {"num_heads": 0}, GENERATE), ("vlm/config.json", {"encoder": None}, GENERATE), ("vlm/config.json", {"class": None, "model_type": []}, GENERATE),
    ("contrastive/config.json", {"patch_size": 0}, CLASSIFY), ("contrastive/config.json", {"hidden_size": 0}, CLASSIFY), ("contrastive/config.json", {"num_heads": 0}, CLASSIFY),
    ("decoder/encoder.json", [1], RECONSTRUCT), ("decoder/pixel_decoder/config.json", {"grid_size": 0}, RECONSTRUCT), ("decoder/reducer/config.json", {"class": []}, RECONSTRUCT),
    ("contrastive/run.json", [1], CLASSIFY), ("contrastive/run.json", None, CLASSIFY), ("contrastive/run.json", {"world": {"counts": 3}}, CLASSIFY),
    ("contrastive/run.json", {"world": {"image_size": "a"}}, CLASSIFY), ("contrastive/run.json", {"world": {"no_such_dial": 1}}, CLASSIFY),
]


@pytest.mark.parametrize("file, content, line", SPOILED)
def test_a_spoiled_checkpoint_is_one_sentence(file, content, line, smoke, picture, tmp_path, capsys):
    shutil.copytree(smoke, tmp_path / "root", ignore=shutil.ignore_patterns(".*"))
    path = tmp_path / "root" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **content} if isinstance(content, dict) else content))
    words = [word.format(picture=picture) if "{" in word else word.replace("_", " ") for word in line.split()]
    code, target = call(*words, *(() if line == CLASSIFY else ("--out", tmp_path / "out")), "--root", tmp_path / "root"), tmp_path / "out"
    printed = capsys.readouterr().err
    assert code == 2 and len(printed.strip().splitlines()) == 1 and len(printed) < 800 and file.rsplit("/", 1)[0] in printed and not target.exists(), printed


@pytest.mark.parametrize("line", ["describe tiny", "bind --root none", "probe --root none", "bench decoder --root none", "evaluate none", "classify none.png --captions one two --root none", "retrieve none.png --root none"])
def test_json_never_takes_the_place_of_a_folder_and_is_refused_before_anything_is_read(line, bad, tmp_path, capsys):
    assert call(*line.split(), "--json", bad / "results") == 2 and "results is a folder: name a file" in capsys.readouterr().err
    assert (bad / "results/old.json").read_text() == "[]"


@pytest.mark.parametrize("spoil", ["folder", "config.json"])
def test_a_missing_part_of_the_generator_tells_what_trains_it(spoil, smoke, tmp_path, capsys):
    shutil.copytree(smoke, tmp_path / "root", ignore=shutil.ignore_patterns(".*", *(["vlm"] if spoil == "folder" else [])))
    if spoil != "folder": (tmp_path / "root/vlm" / spoil).unlink()
    assert call("generate", "a red circle", "--out", tmp_path / "out", "--root", tmp_path / "root") == 2
    printed = capsys.readouterr().err
    assert "`vugen train vlm --root" in printed and ".." not in printed and str(tmp_path / "root/vlm") in printed and "hub" not in printed


def test_the_longest_caption_is_one_number_and_is_asked_before_anything_is_loaded(picture, capsys):
    from vugen.data.scenes import LONGEST
    from vugen.generate.text_to_image import check_prompts
    longest = "a red circle and ".ljust(LONGEST, "a")
    assert check_prompts([longest]) == [longest]
    for words in (("generate", longest + "a"), ("classify", picture, "--captions", "a star", longest + "a")):
        assert call(*words, "--root", "none") == 2 and f"{LONGEST + 1} characters: shorten it to at most {LONGEST}" in capsys.readouterr().err
        assert call(*words[:-1], longest, "--root", "none") == 2 and "characters" not in capsys.readouterr().err


@pytest.mark.parametrize("line", ["generate circle", "reconstruct none.png"])
def test_out_is_refused_before_anything_is_read(line, picture, capsys):
    assert call(*line.split(), "--root", "none", "--out", picture) == 2 and "scene.png is a file: name a folder" in capsys.readouterr().err


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    done = program("reconstruct", "none.png", "--out", "out", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "none.png" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_unknown_options_leave_with_code_two(tmp_path, capsys):
    assert call("generate", "a red circle", "--guidence-scale", "3") == 2
    assert "guidance-scale" in capsys.readouterr().err


def test_an_unwritable_file_is_one_sentence(smoke, picture, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call("describe", "tiny", "--json", tmp_path / "file" / "rows.json") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_an_interrupt_says_so(monkeypatch, capsys):
    def interrupted(words): raise KeyboardInterrupt
    monkeypatch.setattr("vugen.lab.cli.run_verb", interrupted)
    assert call("bench", "scenes") == 130 and "interrupted" in capsys.readouterr().err


def test_a_failure_while_writing_leaves_nothing(smoke, tmp_path, monkeypatch):
    import vugen.data.images as images
    real, seen = images.save_png, []
    def failing(image, path):
        seen.append(Path(path))
        if len(seen) == 2: raise OSError(28, "No space left on device")
        return real(image, path)
    monkeypatch.setattr(images, "save_png", failing)
    assert call("generate", PROMPT, "--n", 3, "--steps", 1, "--out", tmp_path / "out", "--root", smoke) == 2
    assert len(seen) == 2 and not list(tmp_path.iterdir())


def test_pictures_of_every_kind_are_reconstructed(smoke, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    kinds = {"sixteen.png": Image.fromarray((rng.random((40, 60)) * 65535).astype(np.uint16)), "cmyk.jpg": Image.fromarray(pixels).convert("CMYK"),
             "palette.png": Image.fromarray(pixels).convert("P"), "alpha.png": Image.fromarray(np.dstack([pixels, pixels[..., :1]])), "grey.png": Image.fromarray(pixels).convert("L")}
    for name, image in kinds.items(): image.save(tmp_path / name)
    Image.fromarray(pixels).save(tmp_path / "moving.gif", save_all=True, append_images=[Image.fromarray(pixels[::-1])])
    names = [*kinds, "moving.gif"]
    assert call("reconstruct", *(tmp_path / name for name in names), "--steps", 1, "--out", tmp_path / "out", "--root", smoke) == 0
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.png")) == sorted(Path(name).stem for name in names)
