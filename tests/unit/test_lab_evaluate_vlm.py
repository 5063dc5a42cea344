"`vugen evaluate --suite mme|mmbench|mmmu` from files to JSON."
import base64
import csv
import io
import json

import pytest
from PIL import Image

from vugen.generate.adapters import save_miniature
from vugen.lab.cli import main
from vugen.lab.evaluate_vlm import short_names


def png(color):
    buffer = io.BytesIO(); Image.new("RGB", (20, 30), color).save(buffer, "PNG"); return buffer.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    for seed, name in enumerate(("before", "after")): save_miniature("llava", folder / name, seed)
    task = folder / "mme/color"; task.mkdir(parents=True)
    for number in range(3):
        (task / f"é{number}.png").write_bytes(png((90 * number, 0, 0)))
        (task / f"é{number}.txt").write_text("Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n", encoding="utf-8")
    with open(folder / "dev.tsv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter="\t"); rows.writerow(["index", "question", "A", "B", "answer", "category", "l2-category", "image"])
        rows.writerows([[number, "Which?", "red", "blue", "AB"[number % 2], "color", "perception", base64.b64encode(png("red")).decode()] for number in range(4)])
    (folder / "validation.json").write_text(json.dumps([{"id": f"validation_Math_{number}", "question": "<image 1> and <image 2>?", "options": "['one', 'two']" if number else "[]", "answer": "A" if number else "7", "question_type": "multiple-choice" if number else "open",
                                                         "image_1": base64.b64encode(png("red")).decode() + " " * 200, "image_2": base64.b64encode(png("blue")).decode() + " " * 200} for number in range(3)]))
    return folder


def run(root, monkeypatch, *words):
    monkeypatch.setenv("VUGEN_CACHE", str(root / "cache"))
    out = root / "rows.json"
    with pytest.raises(SystemExit) as stop: main(["evaluate", *map(str, words), "--json", str(out), "--device", "cpu"])
    assert stop.value.code == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("suite,place,main_metric", [("mme", "mme", "score"), ("mmbench", "dev.tsv", "circular_accuracy"), ("mmmu", "validation.json", "accuracy")])
def test_before_and_after_in_one_table(root, monkeypatch, capsys, suite, place, main_metric):
    words = [root / place, "--suite", suite, "--model", f"likelihood:{root / 'after'}", "--before", f"likelihood:{root / 'before'}", "--answers", root / f"{suite}.parquet"]
    found = run(root, monkeypatch, *words)
    rows = {(row["scorer"], row["category"], row["metric"]): row for row in found["rows"]}
    pair = "likelihood:before → likelihood:after"
    assert {scorer for scorer, _, _ in rows} == {"likelihood:before", "likelihood:after", "most frequent", pair}
    assert rows["likelihood:after", "all", main_metric]["low"] <= rows["likelihood:after", "all", main_metric]["value"] and rows[pair, "sample", "logits bit-identical"]["value"] == 0 and "p" in rows[pair, "all", next(metric for _, _, metric in rows if metric.endswith("difference") and metric != "largest logit difference")]
    assert found["run"]["suite"] == suite and len(found["run"]["models"]) == 2 and (root / f"{suite}.parquet").is_file()
    printed = capsys.readouterr()
    assert "logits bit-identical" in printed.out and (suite != "mme" or "13 of 14 tasks" in printed.out)
    assert run(root, monkeypatch, *words)["rows"] == found["rows"] and "likelihood:after: " not in capsys.readouterr().err  # nothing is asked twice


def test_blind_free_frequent_and_limit(root, monkeypatch):
    assert {row["scorer"] for row in run(root, monkeypatch, root / "mme", "--suite", "mme", "--model", f"blind:{root / 'after'}", "--limit", 1)["rows"]} == {"blind:after", "most frequent"}
    assert run(root, monkeypatch, root / "dev.tsv", "--suite", "mmbench", "--model", "frequent", "--limit", 2)["run"]["questions"] == 4
    free = run(root, monkeypatch, root / "validation.json", "--suite", "mmmu", "--model", f"generate:{root / 'after'}")
    assert next(row for row in free["rows"] if row["scorer"] == "generate:after" and row["metric"] == "accuracy" and row["category"] == "all")["n"] == 3


@pytest.mark.parametrize("words,why", [
    (["mme", "--suite", "mme"], "--model"), (["mme", "--suite", "mme", "--model", "clip:x"], "no kind 'clip'"), (["gone", "--suite", "mmbench", "--model", "frequent"], "does not exist"), (["dev.tsv", "--suite", "mmmu", "--model", "frequent"], "dev.tsv"),
    (["mme", "--suite", "mme", "--model", "frequent", "--before", "frequent"], "both frequent"), (["mme", "--suite", "mmvet", "--model", "frequent"], "mmvet")])
def test_mistakes_are_one_sentence(root, monkeypatch, capsys, words, why):
    monkeypatch.setenv("VUGEN_CACHE", str(root / "cache"))
    with pytest.raises(SystemExit) as stop: main(["evaluate", str(root / words[0]), *words[1:]])
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and why in said and len(said.splitlines()) == 1


def test_two_spellings_are_one_model(root, monkeypatch, capsys):
    monkeypatch.setenv("VUGEN_CACHE", str(root / "cache")); monkeypatch.chdir(root)
    for one, two in (("after", "./after"), ("after", str(root / "after")), ("before/../after", "after")):
        with pytest.raises(SystemExit) as stop: main(["evaluate", "mme", "--suite", "mme", "--model", f"likelihood:{one}", "--before", f"likelihood:{two}"])
        assert stop.value.code == 2 and "name two states" in capsys.readouterr().err


def test_short_names_tell_models_apart():
    assert short_names(["likelihood:/vlm", "likelihood:/a/vlm"]) == ["likelihood:vlm", "likelihood:a/vlm"]
    assert short_names(["likelihood:a/vlm"]) == ["likelihood:vlm"] and short_names(["likelihood:a/vlm", "likelihood:b/vlm"]) == ["likelihood:a/vlm", "likelihood:b/vlm"] and short_names(["frequent"]) == ["frequent"]


def test_the_proof_that_the_tower_is_frozen_is_a_flag(root, monkeypatch, capsys):
    from dataclasses import replace
    from vugen.data.scenes import render, sample_scenes
    from vugen.generate.vlm import question
    from vugen.paths import checkpoints_dir
    from vugen.understand.scorers import world_of
    world, task = replace(world_of(checkpoints_dir()), split="test"), root / "scenes/existence"
    task.mkdir(parents=True)
    for index, scene in enumerate(sample_scenes(world, 91, range(20))):
        said = {answer: text for text, answer, _ in filter(None, [question(scene, 91, 100 * index + each, "existence", world) for each in range(12)])}
        if len(said) < 2 or len(list(task.glob("*.png"))) == 2: continue
        Image.fromarray(render(scene, 32)).save(task / f"{index}.png"); (task / f"{index}.txt").write_text(f"{said['yes']}\tYes\n{said['no']}\tNo\n")
    words = [root / "scenes", "--suite", "mme", "--model", f"generator:{checkpoints_dir() / 'generator'}", "--before", f"scene:{checkpoints_dir() / 'vlm'}"]
    proof = {row["metric"]: row["value"] for row in run(root, monkeypatch, *words, "--prove-frozen")["rows"] if row["category"] == "proof"}
    assert proof["preserved"] == proof["the tower moved"] == proof["same logits after"] == proof["no shared memory"] == 1 and proof["largest logit difference"] == 0
    assert not [row for row in run(root, monkeypatch, *words)["rows"] if row["category"] == "proof"]
    with pytest.raises(SystemExit) as stop: main(["evaluate", *map(str, words[:-2]), "--prove-frozen"])
    assert stop.value.code == 2 and "--before scene:FOLDER" in capsys.readouterr().err
