"What `vugen evaluate` measures beside the pictures that it is given."
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from vugen.data.scenes import World
from vugen.evaluate import scene_parser
from vugen.lab import evaluate
from vugen.lab.cli import main


class Parser:
    image_size = 32
    def to(self, device): return self


def test_the_parser_is_judged_on_what_is_held_out(tmp_path, monkeypatch):
    world, asked = World(held_out=("red circle",)), []
    (tmp_path / "parser").mkdir()
    (tmp_path / "parser" / "run.json").write_text(json.dumps({"world": world.asdict()}))
    monkeypatch.setattr(scene_parser.SceneParser, "from_pretrained", lambda folder: Parser())
    monkeypatch.setattr(scene_parser, "prompt_accuracy", lambda *rest, **columns: [])
    monkeypatch.setattr(scene_parser, "parser_accuracy", lambda parser, world, *rest, **columns: asked.append(world) or [])
    monkeypatch.setattr(evaluate, "readable_images", lambda files, size, progress=None: (torch.zeros(len(files), 3, size, size), list(files), {}))
    evaluate.prompt_rows(tmp_path, {"one.png": "a red circle"}, tmp_path, "cpu")
    assert asked == [World(held_out=("red circle",), split="test")]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for name, count, spread in (("real", 30, 200), ("drawn", 24, 150)):
        (tmp_path / name).mkdir()
        for place in range(count): Image.fromarray(random.integers(0, spread, (40, 36, 3), dtype=np.uint8)).save(tmp_path / name / f"{place}.png")
    return tmp_path


def call(*words):
    with pytest.raises(SystemExit) as end: main([str(word) for word in words])
    return end.value.code


def rows_of(path): return json.loads(path.read_text())["rows"]


def test_a_folder_against_a_folder_and_against_its_statistics(folders, capsys):
    (folders / "drawn" / "torn.png").write_bytes(b"\x89PNG\r\n")
    options = ["--extractor", "efficientnet:32", "--subsets", 3, "--no-intervals"]
    sets = ["--metrics", "fid", "kid", "density", "coverage", "precision", "recall", "cmmd"]
    assert call("evaluate", "--images", folders / "drawn", "--reference", folders / "real", *sets, *options, "--save-statistics", folders / "real.safetensors", "--keep-features", "--json", folders / "one.json") == 0
    first = rows_of(folders / "one.json")
    assert "1 of 25 pictures" in capsys.readouterr().out and {row["n"] for row in first if row["metric"].startswith(("Fréchet", "kernel", "density"))} == {24}
    assert all(row["extractor"] in row["metric"] and row["images"] == "drawn" and row["n_reference"] == 30 for row in first)
    assert call("evaluate", folders / "drawn", "--reference", folders / "real.safetensors", *sets, *options, "--json", folders / "two.json") == 0
    assert [row["value"] for row in rows_of(folders / "two.json")] == pytest.approx([row["value"] for row in first], rel=1e-9)
    assert str(folders) not in (folders / "one.json").read_text().replace(str(folders / "drawn" / "torn.png"), "")


def test_the_short_form_measures_what_can_be_read(folders, capsys):
    for folder in ("drawn", "real"): (folders / folder / "0.png").write_bytes(b"\x89PNG\r\n")
    assert call("evaluate", folders / "drawn", "--reference", folders / "real", "--json", folders / "short.json") == 0
    found, told = {row["metric"]: row for row in rows_of(folders / "short.json")}, capsys.readouterr().out
    assert "1 of 24 pictures" in told and "1 of 30 reference pictures" in told and found["PSNR"]["n"] == 23
    frechet = found["Fréchet-efficientnet-lite0/16"]
    assert (frechet["n"], frechet["n_reference"], frechet["reference"], frechet["resize"]) == (23, 29, "real", "middle square, 128×128")
    for path in (folders / "drawn").iterdir(): path.rename(path.with_stem(f"other-{path.stem}"))
    assert call("evaluate", folders / "drawn", "--reference", folders / "real", "--json", folders / "short.json") == 0
    assert [row["metric"] for row in rows_of(folders / "short.json")] == ["Fréchet-efficientnet-lite0/16"] and "no two files have the same name" in capsys.readouterr().out
    for path in (folders / "drawn").iterdir(): path.write_bytes(b"no picture")
    assert call("evaluate", folders / "drawn", "--reference", folders / "real") == 2 and "can be read" in capsys.readouterr().err


def test_a_spoiled_drawing_is_left_out_of_its_prompts(folders, capsys):
    names = [f"{place}.png" for place in range(3)]
    (folders / "drawn" / "generate.json").write_text(json.dumps({"run": {}, "rows": [{"image": name, "prompt": prompt} for name, prompt in zip(names, ("a red circle", "a blue square", "a red star"))]}))
    (folders / "drawn" / names[1]).write_bytes(b"no picture")
    assert call("evaluate", folders / "drawn", "--json", folders / "rows.json") == 0
    assert "1 of 3 generated pictures" in capsys.readouterr().out and {row["n"] for row in rows_of(folders / "rows.json") if row["images"] == "generated"} == {2}


def test_what_has_no_partner_is_told(folders, capsys):
    for words in (["--metrics", "rfid", "psnr", "--extractor", "efficientnet:32", "--no-intervals"], []):
        (folders / "drawn" / "5.png").rename(folders / "drawn" / f"extra-{len(words)}.png")
        assert call("evaluate", folders / "drawn", "--reference", folders / "real", *words) == 0
        told = capsys.readouterr().out
        assert "1 of 24 pictures have no original" in told and "7 of 30 originals have no picture" in told
        (folders / "drawn" / f"extra-{len(words)}.png").rename(folders / "drawn" / "5.png")


def test_a_prompt_outside_the_grammar_is_left_out(folders, capsys):
    rows = [{"image": f"{place}.png", "prompt": prompt} for place, prompt in enumerate(("a red circle", "somebody at a window", "a red star"))]
    (folders / "drawn" / "generate.json").write_text(json.dumps({"run": {}, "rows": rows}))
    assert call("evaluate", folders / "drawn", "--json", folders / "rows.json") == 0
    assert "1 of 3 prompts" in capsys.readouterr().out and {row["n"] for row in rows_of(folders / "rows.json") if row["images"] == "generated"} == {2}
    (folders / "drawn" / "generate.json").write_text(json.dumps({"run": {}, "rows": rows[1:2]}))
    assert call("evaluate", folders / "drawn", "--reference", folders / "real") == 0 and "It is not measured: " in capsys.readouterr().out
    (folders / "drawn" / "generate.json").write_text(json.dumps({"run": {}, "rows": [{"image": "0.png", "prompt": 3}]}))
    assert call("evaluate", folders / "drawn") == 2 and "generate.json cannot be read" in capsys.readouterr().err


def test_linked_folders_are_searched_once(folders):
    (folders / "few").mkdir()
    Image.new("RGB", (9, 9)).save(folders / "few" / "own.png")
    (folders / "few" / "sub").symlink_to(folders / "real"); (folders / "few" / "loop").symlink_to(folders / "few")
    assert call("evaluate", "--images", folders / "few", "--reference", folders / "real", "--metrics", "fid", "--extractor", "efficientnet:32", "efficientnet:032", "--no-intervals", "--json", folders / "rows.json") == 0
    assert [(row["n"], row["images"]) for row in rows_of(folders / "rows.json")] == [(31, "few")]


def test_a_folder_has_a_name_where_one_stands_in_it(folders, monkeypatch):
    monkeypatch.chdir(folders / "drawn")
    assert call("evaluate", "--images", ".", "--reference", "../real", "--metrics", "psnr", "--json", folders / "rows.json") == 0
    assert {(row["images"], row["reference"]) for row in rows_of(folders / "rows.json")} == {("drawn", "real")}


@pytest.mark.parametrize("words, said", [
    ("--metrics psnr --k 3", "--k goes with"), ("--metrics fid --subsets 2", "--subsets goes with"), ("--metrics fid --perceptual none", "--perceptual goes with"), ("--metrics psnr --extractor efficientnet:64", "--extractor goes with"),
    ("--metrics fid --keep-features", "--save-statistics"), ("--metrics fid --root nowhere", "--root goes with"), ("--save-statistics here/p.png", ".safetensors"), ("--suite geneval --before detector:x", "--before goes with"),
    ("--suite clipscore --reference nowhere", "--reference goes with"), ("--suite clipscore --root nowhere", "--root goes with"), ("--suite dpg --seed 9", "--seed goes with"), ("--suite geneval --batch-size 3", "--batch-size goes with"),
    ("--suite mme --items elsewhere", "two places"), ("--suite scenes --prove-frozen", "--prove-frozen goes with")])
def test_an_option_that_nothing_looks_at_is_refused(folders, capsys, words, said):
    words = words.split()
    sets = ["--reference", folders / "real"] if "--suite" not in words else []
    assert call("evaluate", folders / "drawn", *sets, *words) == 2 and said in (told := capsys.readouterr().err) and told.count("\n") == 1


def test_ssim_of_small_pictures_leaves_psnr_alone(folders, capsys):
    for folder in ("drawn", "real"): Image.effect_noise((8, 8), 40).convert("RGB").save(folders / folder / "0.png")
    assert call("evaluate", folders / "drawn", "--reference", folders / "real", "--metrics", "psnr", "ssim", "--json", folders / "rows.json") == 0
    assert {row["metric"]: row["n"] for row in rows_of(folders / "rows.json")} == {"PSNR": 24, "SSIM": 23} and "0.png has no SSIM" in capsys.readouterr().out


def test_one_pair_has_no_interval(folders):
    for path in list((folders / "drawn").iterdir())[1:]: path.unlink()
    assert call("evaluate", "--images", folders / "drawn", "--reference", folders / "real", "--metrics", "psnr", "--json", folders / "rows.json") == 0
    row = rows_of(folders / "rows.json")[0]
    assert (row["n"], row["low"], row["high"], row["reference"]) == (1, None, None, "real")


def test_reconstructions(folders, capsys):
    Image.new("RGB", (9, 9)).save(folders / "drawn" / "29.png")
    assert call("evaluate", "--images", folders / "drawn", "--reference", folders / "real", "--metrics", "rfid", "psnr", "ssim", "lpips", "--extractor", "efficientnet:32", "--json", folders / "rows.json") == 0
    found = {row["metric"]: row for row in rows_of(folders / "rows.json")}
    assert found["PSNR"]["n"] == 24 and found["reconstruction Fréchet-EfficientNet-Lite0@32"]["n_reference"] == 25 and "EfficientNet-Lite0 feature distance" in found and "LPIPS" not in "".join(found)
    assert "1 comparison:" in (told := capsys.readouterr().out) and "29.png has 9×9" in told


def test_only_statistics(folders):
    assert call("evaluate", "--reference", folders / "real", "--extractor", "efficientnet:32", "--save-statistics", folders / "s.safetensors") == 0
    assert call("evaluate", "--images", folders / "drawn", "--reference", folders / "s.safetensors", "--extractor", "efficientnet:32", "--metrics", "fid", "--no-intervals") == 0


@pytest.mark.parametrize("words,told", [
    ("--images {0}/drawn --metrics fid", "--reference"), ("--images {0}/drawn --reference {0}/real --metrics soup", "soup"), ("--reference {0}/real --metrics fid", "--images"),
    ("--images {0}/empty --reference {0}/real --metrics fid", "holds no pictures"), ("--images {0}/drawn --reference {0}/real --metrics density --k 24", "k is 24"),
    ("--images {0}/drawn --reference {0}/real --metrics fid --extractor soup", "soup"), ("--images {0}/drawn --reference {0}/real --metrics density --k 0", "--k"),
    ("--images {0}/drawn --reference {0}/torn --metrics fid", "truncated"), ("--images {0}/drawn --reference {0}/pickle --metrics fid", "truncated"), ("--images {0}/drawn --reference {0}/none --metrics fid", "none"),
    ("--images {0}/drawn --reference {0}/s.safetensors --metrics kid", "--keep-features"), ("--images {0}/drawn --reference {0}/s.safetensors --metrics fid --extractor efficientnet:64", "same extractor"),
    ("--images {0}/one --reference {0}/real --metrics fid", "at least 2"), ("--images {0}/drawn --reference {0}/real --metrics psnr --suite soup", "soup"), ("{0}/drawn --images {0}/drawn --reference {0}/real", "two folders"),
    ("--images {0}/drawn --reference {0}/real --metrics fid --limit 10", "--limit"), ("{0}/drawn --reference {0}/real --extractor efficientnet:128", "--extractor"), ("{0}/drawn --suite scenes --metrics fid", "--metrics")])
def test_what_cannot_be_measured_is_one_sentence(folders, words, told, capsys):
    for name in ("empty", "one"): (folders / name).mkdir()
    Image.new("RGB", (40, 36)).save(folders / "one" / "0.png")
    assert call("evaluate", "--reference", folders / "real", "--extractor", "efficientnet:32", "--save-statistics", folders / "s.safetensors") == 0
    (folders / "torn").write_bytes((folders / "s.safetensors").read_bytes()[:999])
    (folders / "pickle").write_bytes(pickle.dumps({"mean": 1}))
    capsys.readouterr()
    words = words.format(folders).split()
    if "--extractor" not in words: words += ["--extractor", "efficientnet:32"]
    assert call("evaluate", *words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vugen evaluate: ") and told in error and "Traceback" not in error


def test_what_few_pictures_allow_is_measured_and_the_rest_is_told(folders, capsys):
    (folders / "few").mkdir()
    for place in range(4): Image.open(folders / "drawn" / f"{place}.png").save(folders / "few" / f"{place + 28}.png")
    words = ("evaluate", "--images", folders / "few", "--reference", folders / "real", "--extractor", "efficientnet:32", "--subsets", 3, "--json", folders / "rows.json")
    assert call(*words) == 0
    found, told = {row["metric"].split("-")[0] for row in rows_of(folders / "rows.json")}, capsys.readouterr().out
    assert found == {"Fréchet", "kernel"} and "density-EfficientNet-Lite0@32: It is not measured: k is 5 and there are 4 pictures" in told
    words = [*words[:words.index("--subsets")], *words[words.index("--subsets") + 2:]]
    assert call(*words, "--metrics", "psnr", "rfid", "density") == 0
    assert {row["metric"] for row in rows_of(folders / "rows.json")} >= {"PSNR", "reconstruction Fréchet-EfficientNet-Lite0@32"} and "2 of 4 pictures have no original" in capsys.readouterr().out


def test_a_statistics_file_without_features_still_serves_for_fid(folders, capsys):
    assert call("evaluate", "--reference", folders / "real", "--extractor", "efficientnet:32", "--save-statistics", folders / "s.safetensors") == 0
    assert call("evaluate", "--images", folders / "drawn", "--reference", folders / "s.safetensors", "--extractor", "efficientnet:32", "--metrics", "kid", "fid", "psnr", "rfid", "--json", folders / "rows.json") == 0
    told = capsys.readouterr().out
    assert {row["metric"] for row in rows_of(folders / "rows.json")} == {"Fréchet-EfficientNet-Lite0@32", "Fréchet-EfficientNet-Lite0@32∞"} and "--keep-features" in told and "is no folder: PSNR" in told


def test_every_extractor_is_loaded_before_the_first_is_used(folders, capsys):
    assert call("evaluate", "--images", folders / "drawn", "--reference", folders / "real", "--metrics", "fid", "--extractor", "efficientnet:32", "encoder:nowhere") == 2
    assert "reference, " not in capsys.readouterr().err


def test_two_extractors_and_a_reference_of_one(folders, capsys):
    assert call("evaluate", "--reference", folders / "real", "--extractor", "efficientnet:32", "--save-statistics", folders / "s.safetensors") == 0
    assert call("evaluate", "--images", folders / "drawn", "--reference", folders / "s.safetensors", "--extractor", "efficientnet:64", "efficientnet:32", "--metrics", "fid", "--json", folders / "rows.json") == 0
    assert len({row["fingerprint"] for row in rows_of(folders / "rows.json")}) == 1 and "fid of efficientnet:64: It is not measured" in capsys.readouterr().out
