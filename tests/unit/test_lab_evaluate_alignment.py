"`vugen evaluate --suite geneval|dpg|scenes|clipscore` as a user types it, with miniatures in the real formats in place of the models."
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vugen.data.scenes import World, render, scene_from_caption
from vugen.errors import UserError
from vugen.evaluate.detectors import save_detector_miniature
from vugen.evaluate.judgements import JudgementStore
from vugen.evaluate.scene_suite import scene_prompts
from vugen.generate.adapters import save_miniature
from vugen.lab.cli import main
from vugen.lab.evaluate_alignment import ANSWER_BRIEFLY, NO, YES, YesOrNo, model_parts
from vugen.understand.pretrained import load_pretrained, save_pair_miniature

TABLE = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\none,a red circle,,1,0,entity,whole,t,Is there a circle?\none,a red circle,,2,1,attribute,color,t,Is it red?\ntwo,a blue star,,1,0,entity,whole,t,Is there a star?\n"


def picture(seed, side=32): return Image.fromarray((np.random.default_rng(seed).random((side, side, 3)) * 255).astype(np.uint8))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pair_miniature("clip", folder / "clip"); save_miniature("llava", folder / "llava"); save_detector_miniature("mask2former", folder / "mask2former", ("dog", "tv"))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))


def call(*words, code=0):
    with pytest.raises(SystemExit) as left: main(["evaluate", *map(str, words)])
    assert left.value.code == code


def lay_out(folder, lines, draw, samples=2):
    for number, line in enumerate(lines):
        (folder / f"{number:05d}" / "samples").mkdir(parents=True)
        (folder / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(line))
        for sample in range(samples): draw(line, number, sample).save(folder / f"{number:05d}" / "samples" / f"{sample:04d}.png")
    return folder


def truth(line, number, sample): return Image.fromarray(render(scene_from_caption(line["prompt"], World(), sample, number), 32))


def read(path):
    found = json.loads(path.read_text())
    return found["run"], found["rows"]


def test_geneval_with_a_detector_and_clip(tmp_path, models, capsys):
    lines = [{"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"}, {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "bench", "count": 1}], "prompt": "a photo of a dog and a bench"}]
    folder = lay_out(tmp_path / "drawn", lines, lambda line, number, sample: picture(10 * number + sample))
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {**lines[0], "prompt": "a photo of one more red dog"}]))
    call(folder, "--suite", "geneval", "--items", tmp_path / "items.jsonl", "--model", f"detector:{models / 'mask2former'},clip:{models / 'clip'}", "--json", tmp_path / "rows.json", "--answers", tmp_path / "a.parquet", "--device", "cpu")
    run, rows = read(tmp_path / "rows.json")
    assert {row["category"]: row["n"] for row in rows if row["metric"] == "accuracy"} == {"single_object": 0, "two_object": 0, "counting": 0, "colors": 2, "position": 0, "color_attr": 0}
    assert rows[0]["detector"] == "mask2former" and rows[0]["colors"] == "clip" and rows[0]["anchors"]["SDXL"] == .98 and run["rules"]["counting_threshold"] == 0.9
    assert "bench" in run["notes"]["unknown classes"] and "2 of 6" in run["notes"]["missing pictures"] and str(tmp_path) not in json.dumps(run) and str(models) not in json.dumps(run)
    said = capsys.readouterr().out
    assert "SDXL" in said and "Notes:" in said
    call(folder, "--suite", "geneval", "--model", f"detector:{models / 'mask2former'}", code=2)
    assert "asks for a colour" in capsys.readouterr().err


def test_geneval_of_drawn_scenes_needs_no_foreign_model_and_is_drawn_again_without_any(tmp_path):
    lines = [line for line in scene_prompts(World(), 3) if line["tag"] != "counting"]
    folder = lay_out(tmp_path / "drawn", lines, truth)
    call(folder, "--suite", "geneval", "--model", "detector:parser", "--json", tmp_path / "one.json")
    call(folder, "--suite", "geneval", "--json", tmp_path / "two.json")
    (run, rows), (_, again) = read(tmp_path / "one.json"), read(tmp_path / "two.json")
    assert rows == again and rows[6]["value"] > 0.9 and "parser" in run["checkpoints"] and list((tmp_path / "cache" / "evaluate").glob("geneval-*.parquet"))


def test_scenes_with_ceiling_and_floor(tmp_path):
    lines = scene_prompts(World(), 3)
    folder = lay_out(tmp_path / "drawn", lines, truth, samples=1)
    (folder / "generate.json").write_text(json.dumps({"run": {"command": "vugen generate --suite scenes", "settings": {"suite": "scenes", "seed": 4}}, "rows": []}))
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call(folder, "--suite", "scenes", "--items", tmp_path / "items.jsonl", "--json", tmp_path / "rows.json")
    run, rows = read(tmp_path / "rows.json")
    found = {row["images"]: row["value"] for row in rows if row["metric"] == "exact, mean of 5 tags"}
    assert found["generated"] > 0.9 and found["rendered"] > 0.9 and found["generated, prompts shuffled"] < 0.2 and run["pictures"]["seed"] == 4 and rows[0]["wording"] == "world"
    assert {"images", "suite", "category", "metric", "value", "low", "high", "n"} <= set(rows[0]) and "counting" in run["notes"]["not applicable"]


def test_clipscore(tmp_path, models):
    (tmp_path / "drawn").mkdir()
    for number in range(3): picture(number).save(tmp_path / "drawn" / f"{number}.png"); (tmp_path / "drawn" / f"{number}.txt").write_text(f"a red circle and {number + 2} stars")
    call(tmp_path / "drawn", "--suite", "clipscore", "--model", f"clip:{models / 'clip'}", "--json", tmp_path / "rows.json", "--limit", 2)
    _, rows = read(tmp_path / "rows.json")
    assert [row["n"] for row in rows] == [2, 2] and rows[0]["value"] == pytest.approx(40 * rows[1]["value"]) and rows[0]["backbone"] == "clip" and rows[0]["anchors"]["VUGEN StockMix"] == 27.45


def test_yes_against_no_is_a_plain_forward(models):
    model, processor = load_pretrained(models / "llava", "vlm")[:2]
    question, image = "Is there a circle?", picture(5)
    answerer, shares = YesOrNo(model, processor), {}
    for answer in (*YES, *NO):
        text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ANSWER_BRIEFLY.replace("{question}", question)}]}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}], continue_final_message=True)
        ids = processor(text=[text], images=[image], return_tensors="pt")
        length = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) - len(processor.tokenizer(text[:-len(answer)], add_special_tokens=False)["input_ids"])
        with torch.no_grad(): logs = model(**ids).logits[0].double().log_softmax(-1)
        shares[answer] = float(sum(logs[place - 1, ids["input_ids"][0, place]] for place in range(-length, 0)).exp())
    wanted = sum(shares[answer] for answer in YES) / sum(shares.values())
    assert answerer(image, [question])[0] == pytest.approx(wanted, rel=1e-4) and len(answerer.counted) == 4
    with pytest.raises(UserError, match="{question}"): YesOrNo(model, processor, template="Yes or no?")


def test_dpg_with_a_vision_language_model_and_its_three_forms(tmp_path, models, capsys):
    (tmp_path / "list.csv").write_text(TABLE); (tmp_path / "drawn").mkdir()
    for number, key in enumerate(("one", "two")): picture(number, 64).save(tmp_path / "drawn" / f"{key}.png")
    known = ("--items", tmp_path / "list.csv", "--answers", tmp_path / "a.parquet")
    call(tmp_path / "drawn", "--suite", "dpg", *known, "--model", f"vqa:{models / 'llava'}", "--json", tmp_path / "one.json")
    call(tmp_path / "drawn", "--suite", "dpg", *known, "--json", tmp_path / "two.json")
    (run, rows), (_, again) = read(tmp_path / "one.json"), read(tmp_path / "two.json")
    assert rows == again and rows[0]["n"] == 2 and rows[0]["answers"] == "llava" and run["samples"] == 4
    answers = JudgementStore(tmp_path / "a.parquet").read()
    assert len(answers) == 12 and all(0 <= record["yes"] <= 1 and record["answer"] == (record["yes"] > 0.5) for record in answers)
    call(tmp_path / "drawn", "--suite", "dpg-published", *known, "--json", tmp_path / "published.json")
    run, rows = read(tmp_path / "published.json")
    assert rows[0]["rule"] == "published loop" and rows[0]["n"] == 1 and "one" in run["notes"]["first row"]
    call(tmp_path / "drawn", "--suite", "dpg-single", "--items", tmp_path / "list.csv", "--model", f"vqa:{models / 'llava'}", "--json", tmp_path / "single.json", "--answers", tmp_path / "b.parquet")
    assert read(tmp_path / "single.json")[1][0]["samples"] == 1 and len(JudgementStore(tmp_path / "b.parquet").read()) == 3


MISTAKES = [ # words, what the sentence says
    (("drawn", "--suite", "dpg"), "--items dpg_bench.csv"), (("drawn", "--suite", "geneval"), "no finished run"), (("drawn", "--suite", "geneval", "--model", "clip:x"), "name one with --model detector:NAME"), (("drawn", "--suite", "geneval", "--model", "soup:x"), "detector:NAME and clip:NAME"),
    (("drawn", "--suite", "geneval", "--model", "detector:./nowhere"), "not a folder"), (("drawn", "--suite", "scenes", "--model", "clip:x"), "leave --model out"), (("nowhere", "--suite", "clipscore"), "not a folder"), (("drawn", "--suite", "clipscore"), "no finished run"),
    (("drawn", "--suite", "geneval", "--answers", "a.json", "--model", "detector:parser"), "must end in .parquet"), (("drawn", "--suite", "scenes", "--items", "none.jsonl"), "none.jsonl cannot be read")]


@pytest.mark.parametrize("words,said", MISTAKES)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path / "drawn", scene_prompts(World(), 1)[:1], truth, samples=1)
    call(*words, code=2)
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_parts_of_a_model():
    assert model_parts(None, ("clip",)) == {} and model_parts("detector:a,b,clip:c:d", ("detector", "clip")) == {"detector": "a,b", "clip": "c:d"}
    with pytest.raises(UserError, match="once"): model_parts("clip:a,clip:b", ("clip",))
