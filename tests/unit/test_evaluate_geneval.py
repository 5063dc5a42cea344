"GenEval's rules on detections written by hand: every tag right, wrong, at the threshold and at a tie; folders in the published layout with everything that can be wrong."
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vugen.errors import UserError
from vugen.evaluate.detectors import ClipColors, Detection, TransformersDetector, save_detector_miniature
from vugen.evaluate.geneval import TAGS, Rules, anchors_of, box_overlap, geneval_rows, positions, read_folder, read_item, read_items, run_geneval, sift, tag_rows, verdict
from vugen.evaluate.judgements import JudgementStore

LINES = {
    "single_object": {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    "two_object": {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "tv", "count": 1}], "prompt": "a photo of a dog and a tv"},
    "counting": {"tag": "counting", "include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}], "prompt": "a photo of three dogs"},
    "colors": {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"},
    "position": {"tag": "position", "include": [{"class": "tv", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}], "prompt": "a photo of a dog left of a tv"},
    "color_attr": {"tag": "color_attr", "include": [{"class": "dog", "count": 1, "color": "red"}, {"class": "tv", "count": 1, "color": "blue"}], "prompt": "a photo of a red dog and a blue tv"}}
LEFT, RIGHT = (0, 40, 20, 60), (60, 40, 80, 60)


def thing(label, score=0.95, box=LEFT, color=None): return Detection(label, score, box, None, color)


def right(tag, *things):
    item = read_item(LINES[tag])
    return verdict(sift(things, tag), item, lambda found, label: [each.color for each in found]).correct


CASES = [ # tag, things, whether the picture is right
    ("single_object", [thing("dog", 0.31)], True), ("single_object", [thing("dog", 0.3)], False), ("single_object", [], False), ("single_object", [thing("dog"), thing("tv"), thing("dog")], True),
    ("two_object", [thing("dog"), thing("tv")], True), ("two_object", [thing("dog"), thing("dog")], False), ("two_object", [thing("dog"), thing("tvmonitor")], True),
    ("counting", [thing("dog")] * 3, True), ("counting", [thing("dog")] * 2, False), ("counting", [thing("dog")] * 4, False), ("counting", [thing("dog")] * 3 + [thing("dog", 0.9)], True), ("counting", [thing("dog", 0.9)] * 3, False),
    ("colors", [thing("dog", color="red")], True), ("colors", [thing("dog", color="blue")], False), ("colors", [thing("dog", 0.9, color="blue"), thing("dog", 0.8, color="red")], False), ("colors", [thing("dog", 0.8, color="blue"), thing("dog", 0.9, color="red")], True), ("colors", [thing("tv", color="red")], False),
    ("position", [thing("dog"), thing("tv", box=RIGHT)], True), ("position", [thing("tv"), thing("dog", box=RIGHT)], False), ("position", [thing("dog"), thing("tv")], False), ("position", [thing("dog")], False),
    ("position", [thing("dog", 0.9), thing("dog", 0.95, RIGHT), thing("tv", box=(30, 40, 50, 60))], False),
    ("color_attr", [thing("dog", color="red"), thing("tv", color="blue")], True), ("color_attr", [thing("dog", color="blue"), thing("tv", color="red")], False), ("color_attr", [thing("dog", color="red")], False)]


@pytest.mark.parametrize("tag,things,wanted", CASES)
def test_every_tag(tag, things, wanted): assert right(tag, *things) is wanted


def test_a_failed_entry_is_no_target():
    item = read_item({**LINES["position"], "include": [{"class": "tv", "count": 1, "color": "red"}, LINES["position"]["include"][1]]})
    found = verdict(sift([thing("tv", box=RIGHT, color="blue"), thing("dog")], "position"), item, lambda things, label: [each.color for each in things])
    assert not found.correct and "nothing that dog could be left of" in found.reason and "1 red tv wanted, seen: blue" in found.reason


def test_several_subjects_must_all_stand_there():
    item = read_item({**LINES["position"], "include": [LINES["position"]["include"][0], {"class": "dog", "count": 2, "position": ["left of", 0]}]})
    scene = lambda box: verdict(sift([thing("tv", box=RIGHT), thing("dog"), thing("dog", 0.9, box)], "position"), item, None).correct
    assert scene((0, 30, 20, 50)) and not scene((100, 40, 120, 60))


def test_only_the_surest_sixteen_are_kept():
    many = [thing("dog", 0.5 + number / 100) for number in range(20)]
    kept = sift(many, "single_object")["dog"]
    assert len(kept) == 16 and [each.score for each in kept] == sorted((each.score for each in many), reverse=True)[:16]


def test_overlapping_boxes_are_dropped_where_the_rules_say_so():
    pair = [thing("dog", 0.9, (0, 0, 9, 9)), thing("dog", 0.8, (0, 0, 9, 8)), thing("dog", 0.7, (0, 30, 9, 39))]
    assert box_overlap(pair[0].box, pair[1].box) == pytest.approx(0.9) and box_overlap(pair[0].box, pair[2].box) == 0
    counts = [len(sift(pair, "colors", replace(Rules(), max_overlap=limit))["dog"]) for limit in (1.0, 0.95, 0.9, 0.5)]
    assert counts == [3, 3, 2, 2] # at the limit itself a box is dropped


def test_positions_by_hand():
    "Two boxes of side 20: 0.1 · (20 + 20) = 4 pixels of an offset do not count, the rest is measured by the whole offset"
    square = lambda x, y: (x - 10, y - 10, x + 10, y + 10)
    assert positions(square(8, 50), square(0, 50)) == set() # (8 - 4) / 8 = 0.5 is not above one half
    assert positions(square(8.1, 50), square(0, 50)) == {"right of"} and positions(square(4, 50), square(0, 50)) == set()
    assert positions(square(0, 0), square(30, 30)) == {"left of", "above"} # (30 - 4) / 42.4 = 0.61 on both axes
    assert positions(square(0, 0), square(30, 60)) == {"above"} and positions(square(5, 5), square(5, 5)) == set()
    flat = (-50, 40, 50, 60)
    assert positions(flat, square(20, 50)) == set() # 0.1 · 120 = 12 of 20: a wide thing has to be further off
    for x, y in np.random.default_rng(0).uniform(-80, 80, (200, 2)): # opposite places are opposite, and never two on one axis
        there, back = positions(square(x, y), square(0, 0)), positions(square(0, 0), square(x, y))
        assert {{"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[name] for name in there} == back and not {"left of", "right of"} <= there


@pytest.mark.parametrize("change,said", [({"prompt": " "}, "no prompt"), ({"tag": "size"}, "tag 'size'"), ({"include": []}, "includes nothing"), ({"include": [{"count": 1}]}, "names no class"), ({"include": [{"class": "dog", "count": 0}]}, "count 0"),
                                         ({"include": [{"class": "dog", "position": ["near", 0]}]}, "position"), ({"include": [{"class": "dog", "position": ["above", 0]}]}, "does not come before")])
def test_broken_lines_are_refused(change, said):
    with pytest.raises(UserError, match=said): read_item({**LINES["single_object"], **change})


def test_a_broken_list_is_named_with_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(LINES["colors"]) + "\n{'tag'\n")
    with pytest.raises(UserError, match="a.jsonl, line 2, is no JSON"): read_items(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"): read_items(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\ufeff" + json.dumps(LINES["position"]) + "\n\n")
    assert read_items(tmp_path / "a.jsonl")[0].include[1].position == ("left of", 0)


def lay_out(folder, lines, samples=2, size=(60, 40)):
    for number, line in enumerate(lines):
        (folder / f"{number:05d}" / "samples").mkdir(parents=True)
        (folder / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(line))
        for sample in range(samples): Image.fromarray((np.random.default_rng(10 * number + sample).random((*size[::-1], 3)) * 255).astype(np.uint8)).save(folder / f"{number:05d}" / "samples" / f"{sample:05d}.png")
    return folder


def test_folders_and_what_is_missing(tmp_path):
    items = [read_item(line) for line in LINES.values()]
    folder = lay_out(tmp_path / "a", list(LINES.values())[:4])
    (folder / "00001" / "samples" / "00001.png").unlink(); (folder / "00002" / "grid.png").write_bytes(b""); (folder / "notes").mkdir()
    shots, notes = read_folder(folder, items)
    assert len(shots) == 7 and "5 of 12" in notes["missing pictures"] and "2 of 6 prompts have none" in notes["missing pictures"]
    assert read_folder(folder)[1]["missing pictures"].startswith("1 of 8")
    with pytest.raises(UserError, match="00000 was drawn for 'a photo of a dog', and the list has"): read_folder(folder, items[::-1])
    with pytest.raises(UserError, match="has no line in the list of 2"): read_folder(folder, items[:2])
    (folder / "00000" / "metadata.jsonl").unlink()
    assert read_folder(folder, items)[0][0].item == items[0]
    shots, notes = read_folder(folder)
    assert {shot.number for shot in shots} == {1, 2, 3} and "00000 has no metadata.jsonl" in notes["prompts left out"]
    (folder / "00000" / "metadata.jsonl").write_text('{"tag": "colors", ')
    for known in (None, items):
        shots, notes = read_folder(folder, known)
        assert len(shots) == 5 and {shot.number for shot in shots} == {1, 2, 3} and "1 cannot be read" in notes["prompts left out"] and "00000/metadata.jsonl" in notes["prompts left out"]
    assert notes["missing pictures"].startswith("5 of 10")
    shots, notes = read_folder(folder, items, 2) # nothing is missing of what was not asked for
    assert {shot.number for shot in shots} == {1} and "missing pictures" not in notes
    (folder / "00003" / "samples" / "00005.png").symlink_to(tmp_path / "nowhere.png"); (folder / "00003" / "samples" / "00006.png").mkdir()
    shots, notes = read_folder(folder)
    assert sum(shot.number == 3 for shot in shots) == 2 and notes["no files"].startswith("2 names") and "00003/samples/00005.png" in notes["no files"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="GenEval's layout"): read_folder(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["mask2former", "detr"])
def test_real_formats_from_end_to_end(tmp_path, kind):
    detector = TransformersDetector(save_detector_miniature(kind, tmp_path / kind))
    folder, store = lay_out(tmp_path / "drawn", LINES.values()), JudgementStore(tmp_path / "answers.parquet")
    class Red: # names every colour red
        name, fingerprint = "red", "red"
        def __call__(self, image, things, label): return ["red"] * len(things)
    shots, _ = read_folder(folder)
    lenient = Rules(threshold=0.06, counting_threshold=0.06)
    rows, notes = run_geneval(shots, detector, Red(), store, lenient)
    assert [row["n"] for row in rows[:6]] == [2] * 6 and rows[6]["metric"] == "mean of 6 tags" and rows[6]["value"] == pytest.approx(sum(row["value"] for row in rows[:6]) / 6)
    assert rows[0]["detector"] == kind and rows[0]["colors"] == "red" and notes == {}
    for record in store.read(): # the verdict follows from what was kept
        kept = {label: len(boxes) for label, boxes in json.loads(record["details"])["boxes"].items()}
        if record["tag"] == "single_object": assert record["correct"] == (kept.get("dog", 0) >= 1)
        if record["tag"] == "counting": assert record["correct"] == (kept.get("dog", 0) == 3)
    class Gone:
        name, fingerprint, classes = detector.name, detector.fingerprint, detector.classes
    assert run_geneval(shots, Gone(), Red(), store, lenient)[0] == rows and run_geneval(shots, None, None, store)[0] == rows
    assert {row["n"] for row in run_geneval(shots, detector, Red(), store)[0][:6]} == {2} and len(store.read()) == 24 # other rules are another judge


class Blind:
    name, fingerprint, classes = "blind", "b", frozenset({"dog"})
    def __call__(self, images): return [[] for _ in images]


def test_unknown_classes_unread_colours_and_broken_pictures(tmp_path):
    folder = lay_out(tmp_path / "drawn", [LINES["single_object"], LINES["two_object"]])
    (folder / "00000" / "samples" / "00000.png").write_bytes(b"nothing")
    shots, _ = read_folder(folder)
    rows, notes = run_geneval(shots, Blind(), None, JudgementStore(tmp_path / "a.parquet"))
    assert "2 of 4 pictures" in notes["unknown classes"] and "tv" in notes["unknown classes"] and "00000.png" in notes["pictures left out"] and "two_object" in notes["tags"]
    assert [(row["category"], row["n"]) for row in rows if row["n"]] == [("single_object", 1), ("all", 1), ("all", 1)]
    assert run_geneval(shots, None, None, JudgementStore(tmp_path / "a.parquet")) == (rows, notes) # what was left out is left out again
    with pytest.raises(UserError, match="knows none of the classes"): run_geneval(shots[2:], Blind(), None, JudgementStore(tmp_path / "b.parquet"))
    with pytest.raises(UserError, match="asks for a colour"): run_geneval(read_folder(lay_out(tmp_path / "red", [LINES["colors"]]))[0], Blind(), None, JudgementStore(tmp_path / "c.parquet"))
    with pytest.raises(UserError, match="no picture could be judged"): geneval_rows([{"correct": None, "problem": "all broken"}])


def test_the_score_is_the_mean_of_the_tags_not_of_the_pictures():
    verdicts = [("single_object", f"a{number}", True) for number in range(90)] + [("colors", "b", False)] * 10
    rows = tag_rows(verdicts)
    assert rows[6]["value"] == 0.5 and rows[6]["low"] < 0.5 < rows[6]["high"] and rows[0]["n"] == 90 and rows[3]["prompts"] == 1


def test_published_scores_average_to_the_published_mean():
    for model in ("SD 1.5", "SD 2.1", "SDXL", "IF-XL"): assert abs(sum(anchors_of(tag)[model] for tag in TAGS) / 6 - anchors_of("all")[model]) <= 0.01
    assert anchors_of("all")["VUGEN"] == 0.5681 and "VUGEN" not in anchors_of("colors")


def test_clip_names_the_colours_of_what_was_found(tmp_path):
    from vugen.understand.pretrained import TransformersContrastive, save_pair_miniature
    colors = ClipColors(TransformersContrastive.from_pretrained(save_pair_miniature("clip", tmp_path / "clip")))
    detector = TransformersDetector(save_detector_miniature("mask2former", tmp_path / "m"))
    store = JudgementStore(tmp_path / "a.parquet")
    run_geneval(read_folder(lay_out(tmp_path / "drawn", [LINES["colors"]], 4))[0], detector, colors, store, Rules(threshold=0.06))
    for record in store.read():
        details = json.loads(record["details"])
        assert record["correct"] == (bool(details["boxes"].get("dog")) and details["colors"]["dog"] == ["red"])
