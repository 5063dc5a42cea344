"Pictures of a benchmark's prompts: the right folders, the right noises, and a run that goes on."
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vugen.evaluate.dpg_bench import read_dpg, samples_of
from vugen.evaluate.geneval import read_folder, read_items
from vugen.generate import text_to_image
from vugen.lab import generate_suite
from vugen.lab.cli import main
from vugen.lab.generate_suite import chunks

LINES = [{"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"}, {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
         {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "blue"}], "prompt": "a blue star"}]
TABLE = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\none,a red circle,,1,0,entity,whole,t,Is there a circle?\none,a red circle,,2,1,attribute,color,t,Is it red?\ntwo,a bench in a park,,1,0,entity,whole,t,Is there a bench?\nthree,a blue star,,1,0,entity,whole,t,Is there a star?\n"


class Painter:
    "A generator whose pictures tell their noise: red is the seed, green the number, blue the prompt"
    guidance_scale, guidance_interval, num_inference_steps, device = 2.0, (0.0, 1.0), 5, torch.device("cpu")
    calls = []

    def to(self, device): return self
    def images(self, prompts, seed, first, **options):
        Painter.calls.append((len(prompts), seed, first))
        colors = [[seed, first + place, len(prompt)] for place, prompt in enumerate(prompts)]
        return (torch.tensor(colors).float() / 255)[:, :, None, None].expand(-1, -1, 8, 8)


@pytest.fixture(autouse=True)
def painter(monkeypatch):
    Painter.calls = []
    monkeypatch.setattr(text_to_image.TextToImage, "from_pretrained", lambda *rest: Painter())


@pytest.fixture
def lists(tmp_path):
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (tmp_path / "list.csv").write_text(TABLE)
    return tmp_path


def call(*words, code=0):
    with pytest.raises(SystemExit) as left: main(["generate", *map(str, words)])
    assert left.value.code == code


def test_genevals_folders_and_noises(lists, capsys):
    out = lists / "out"
    call("--suite", "geneval", "--items", lists / "items.jsonl", "--out", out, "--seed", 7)
    shots, notes = read_folder(out, read_items(lists / "items.jsonl"))
    assert [shot.key for shot in shots] == [f"{number:05d}/samples/{sample:04d}.png" for number in (0, 2) for sample in range(4)] and "4 of 12" in notes["missing pictures"]
    for shot in shots: assert Image.open(shot.path).getpixel((0, 0)) == (7 + int(shot.path.stem), shot.number, len(shot.item.prompt))
    record = json.loads((out / "generate.json").read_text())
    assert record["rows"][5] == {"image": "00002/samples/0001.png", "prompt": "a blue star", "seeds": [8], "index": 2} and record["run"]["settings"]["samples"] == 4
    assert "1 of 3" in record["run"]["notes"]["prompts skipped"] and "1 of 3" in capsys.readouterr().out


def test_a_broken_run_draws_what_is_missing_and_the_same(lists):
    out = lists / "out"
    call("--suite", "geneval", "--items", lists / "items.jsonl", "--out", out)
    before = {path: path.read_bytes() for path in out.glob("*/samples/*.png")}
    gone = sorted(before)[1], sorted(before)[6]
    for path in gone: path.unlink()
    Painter.calls = []
    call("--suite", "geneval", "--items", lists / "items.jsonl", "--out", out)
    assert {path: path.read_bytes() for path in out.glob("*/samples/*.png")} == before and sum(count for count, *_ in Painter.calls) == 2
    Painter.calls = []
    call("--suite", "geneval", "--items", lists / "items.jsonl", "--out", out)
    assert Painter.calls == []


def test_a_killed_run_leaves_whole_pictures(lists, monkeypatch):
    out, written = lists / "out", []
    def dying(picture, images, folder):
        if len(written) == 3: raise KeyboardInterrupt
        written.append(picture.name); whole(picture, images, folder)
    whole = generate_suite.write_picture
    monkeypatch.setattr(generate_suite, "write_picture", dying)
    call("--suite", "geneval", "--items", lists / "items.jsonl", "--out", out, code=130)
    monkeypatch.setattr(generate_suite, "write_picture", whole)
    assert len(list(out.glob("*/samples/*.png"))) == 3 and json.loads((out / "generate.json").read_text())["rows"]
    call("--suite", "geneval", "--items", lists / "items.jsonl", "--out", out)
    assert len(read_folder(out)[0]) == 8


def test_a_longer_list_and_fewer_samples_keep_the_pictures(lists):
    out = lists / "out"
    call("--suite", "geneval", "--items", lists / "items.jsonl", "--out", out, "--limit", 1)
    call("--suite", "geneval", "--items", lists / "items.jsonl", "--out", out)
    assert len(json.loads((out / "generate.json").read_text())["rows"]) == 8
    call("--suite", "geneval", "--items", lists / "items.jsonl", "--out", out, "--limit", 1)
    assert len(json.loads((out / "generate.json").read_text())["rows"]) == 8 # those beyond the limit are still there


def test_grids_of_four_for_dpg(lists):
    call("--suite", "dpg", "--items", lists / "list.csv", "--out", lists / "out")
    assert sorted(path.name for path in (lists / "out").glob("*.png")) == ["one.png", "three.png"]
    for item in read_dpg(lists / "list.csv"):
        if item.key == "two": continue
        parts = samples_of(Image.open(lists / "out" / f"{item.key}.png").convert("RGB"))
        assert [part.getpixel((4, 4)) for part in parts] == [(sample, 0 if item.key == "one" else 2, len(item.text)) for sample in range(4)] and parts[0].size == (8, 8)
    call("--suite", "dpg", "--items", lists / "list.csv", "--out", lists / "single", "--n", 1)
    assert Image.open(lists / "single" / "one.png").size == (8, 8)


def test_scenes_make_their_own_prompts(lists):
    call("--suite", "scenes", "--n", 2, "--limit", 3, "--out", lists / "out")
    assert len(read_items(lists / "out" / "evaluation_metadata.jsonl")) == 15 and len(read_folder(lists / "out", read_items(lists / "out" / "evaluation_metadata.jsonl"))[0]) == 30


MISTAKES = [ # words, what the sentence says
    (("--suite", "soup"), "There is no suite 'soup'"), (("--suite", "geneval"), "name it with --items (evaluation_metadata.jsonl)"), (("--suite", "dpg"), "(dpg_bench.csv)"), (("a red circle", "--suite", "scenes"), "has its own prompts"), (("--suite", "scenes", "--size", "64"), "--size"),
    (("--suite", "scenes", "--n", "0"), "--n is 0"), (("--suite", "scenes", "--limit", "0"), "--limit is 0"), (("--suite", "dpg", "--items", "list.csv", "--n", "3"), "--n is 3"), (("--suite", "geneval", "--items", "none.jsonl"), "none.jsonl cannot be read"), (("a red circle", "--limit", "3"), "belong to a benchmark")]


@pytest.mark.parametrize("words,said", MISTAKES)
def test_mistakes_are_one_sentence(lists, monkeypatch, capsys, words, said):
    monkeypatch.chdir(lists)
    call(*words, "--out", "out", code=2)
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and not Path("out").exists()


def test_nothing_readable_and_other_settings_are_refused(lists, capsys):
    (lists / "free.jsonl").write_text(json.dumps(LINES[1]) + "\n")
    call("--suite", "geneval", "--items", lists / "free.jsonl", "--out", lists / "out", code=2)
    assert "none of the 1 prompts" in capsys.readouterr().err
    call("--suite", "geneval", "--items", lists / "items.jsonl", "--out", lists / "out")
    for words, said in ((("--seed", "1"), "with seed 0, not 1"), (("--steps", "9"), "num_inference_steps 5, not 9"), (("--n", "2"), "samples 4, not 2")):
        call("--suite", "geneval", "--items", lists / "items.jsonl", "--out", lists / "out", *words, code=2)
        assert said in capsys.readouterr().err
    (lists / "items.jsonl").write_text(json.dumps(LINES[2]) + "\n")
    call("--suite", "geneval", "--items", lists / "items.jsonl", "--out", lists / "out", code=2)
    assert "holds 00000/samples/0000.png for 'a red circle', and it is wanted for 'a blue star'" in capsys.readouterr().err


def test_chunks_hold_neighbours_of_one_sample():
    todo = [(number, sample) for number in (0, 1, 2, 5, 6, 40) for sample in (0, 1)]
    made = chunks(todo, 2)
    assert sorted(pair for run in made for pair in run) == sorted(todo) and all(len({sample for _, sample in run}) == 1 and len(run) <= 2 and [number for number, _ in run] == list(range(run[0][0], run[0][0] + len(run))) for run in made)
