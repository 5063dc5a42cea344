"Scenes in GenEval's tags: prompts that the grammar reads back, exact verdicts from scene graphs, ceiling, floor, and counting for worlds that have it."
import json

import pytest
from PIL import Image

from vugen.data.scenes import World, parse, render, scene_from_caption
from vugen.errors import UserError
from vugen.evaluate.detectors import Detection, SceneDetector
from vugen.evaluate.geneval import TAGS, read_folder, read_item
from vugen.evaluate.judgements import JudgementStore
from vugen.evaluate.scene_parser import SceneParser
from vugen.evaluate.scene_suite import drawn_truth, facts_of, possible_tags, run_scenes, scene_prompts, scene_verdicts, shuffled
from vugen.paths import checkpoints_dir

CROWD = World(counted=1.0, counts={1: .2, 2: .4, 3: .4}, emoji=("dog", "cat"))


@pytest.mark.parametrize("wording", ["world", "bare"])
@pytest.mark.parametrize("world", [World(), CROWD, World(relations=("inside",)), World(emoji=("dog", "cat", "apple"), shapes=())], ids=["plain", "crowd", "inside", "emoji"])
def test_prompts_are_read_back_as_what_is_judged(world, wording):
    lines = scene_prompts(world, 12, 3, wording)
    assert {line["tag"] for line in lines} == set(possible_tags(world)) and lines == scene_prompts(world, 12, 3, wording)
    for line in lines:
        item, told = read_item(json.loads(json.dumps(line))), parse(line["prompt"])
        names = {thing.name: thing for thing in told.objects}
        assert len(names) == len(item.include)
        for each in item.include: assert names[each.label].count == each.count and (each.color is None or names[each.label].color == each.color)
        if item.tag == "position": assert told.relations == parse(line["prompt"]).relations and facts_of(item).canonical().relations == told.relations
        if wording == "bare": assert facts_of(item).canonical() == told # nothing more is told than is judged
        assert scene_from_caption(line["prompt"], world).items


def test_prompts_of_a_tag_differ_and_other_seeds_give_others():
    lines = scene_prompts(World(), 40)
    for tag in possible_tags(World()): assert len({line["prompt"] for line in lines if line["tag"] == tag}) == 40
    assert scene_prompts(World(), 40, seed=1) != lines and len(scene_prompts(World(), 40, wording="bare")) < 200


def test_impossible_wishes():
    with pytest.raises(UserError, match="wording"): scene_prompts(World(), 4, wording="poem")
    with pytest.raises(UserError, match="at least 1"): scene_prompts(World(), 0)
    assert "counting" not in possible_tags(World()) and "position" not in possible_tags(World(relations=())) and "color_attr" not in possible_tags(World(shapes=("star",)))


class Seeing:
    "A detector that sees what a scene holds: perfect, but for what is done to it"
    name, fingerprint, classes = "seeing", "s", None

    def __init__(self, scenes, change=lambda things: things): self.scenes, self.change = scenes, change
    def __call__(self, images): return [self.change([Detection(item.name, 0.9, self.box(item, image.width), None, item.color) for item in self.scenes[image.tobytes()].items]) for image in images]
    @staticmethod
    def box(item, side): return tuple(side * edge for edge in (item.x - item.scale / 2, item.y - item.scale / 2, item.x + item.scale / 2, item.y + item.scale / 2))


def drawn(folder, world, lines):
    "Pictures of prompts in GenEval's folders, and the scene behind every picture"
    known = {}
    for number, line in enumerate(lines):
        scene = scene_from_caption(line["prompt"], world, 7, number)
        image = Image.fromarray(render(scene, world.image_size))
        known[image.tobytes()] = scene
        (folder / f"{number:05d}" / "samples").mkdir(parents=True)
        (folder / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(line))
        image.save(folder / f"{number:05d}" / "samples" / "0000.png")
    items = [read_item(line) for line in lines]
    for place, image in enumerate(drawn_truth([item for item in items for _ in range(2)], world)): known[image.tobytes()] = scene_from_caption(items[place // 2].prompt, world, 0, place)
    return known


def values(rows, images, metric): return {row["category"]: row["value"] for row in rows if row["images"] == images and row["metric"].split(",")[0] == metric}


def test_true_scenes_are_right_in_all_six_tags_and_shuffled_ones_wrong(tmp_path):
    known = drawn(tmp_path / "drawn", CROWD, scene_prompts(CROWD, 6))
    rows, notes = run_scenes(read_folder(tmp_path / "drawn")[0], Seeing(known), CROWD, JudgementStore(tmp_path / "a.parquet"), truths=2)
    for metric in ("exact", "geneval"):
        assert values(rows, "generated", metric) == dict.fromkeys((*TAGS, "all"), 1.0) == values(rows, "rendered", metric)
        assert values(rows, "generated, prompts shuffled", metric)["color_attr"] == 0
    assert notes == {} and values(rows, "generated, prompts shuffled", "exact")["counting"] == 0


def test_one_thing_too_many_is_wrong_for_the_scene_graph_alone(tmp_path):
    known = drawn(tmp_path / "drawn", CROWD, scene_prompts(CROWD, 4))
    more = lambda things: [*things, Detection("cross" if all(thing.label != "cross" for thing in things) else "heart", 0.8, (1, 1, 4, 4), None, "red")]
    rows, _ = run_scenes(read_folder(tmp_path / "drawn")[0], Seeing(known, more), CROWD, JudgementStore(tmp_path / "a.parquet"), truths=2)
    assert set(values(rows, "generated", "exact").values()) == {0} and set(values(rows, "generated", "geneval").values()) == {1}


def test_counting_forbids_more_of_the_same_under_both_rules():
    item = read_item({"tag": "counting", "include": [{"class": "star", "count": 2}], "exclude": [{"class": "star", "count": 3}], "prompt": "two stars"})
    scene = lambda count: scene_verdicts(*zip(*[(SceneParserThing(place), Detection("star", 0.9, (place, 0, place + 1, 1))) for place in range(count)]), item)
    assert scene(2) == {"exact": True, "geneval": True} and not any(scene(3).values()) and not any(scene(1).values())


def SceneParserThing(place):
    from vugen.evaluate.scene_parser import ParsedObject
    return ParsedObject("star", "red", "solid", "small", 0.2 + 0.2 * place, 0.5, 0.1, 0.9)


def test_the_embedded_parser_reads_what_is_drawn_and_says_what_is_not_applicable(tmp_path):
    lines = scene_prompts(World(), 5)
    drawn(tmp_path / "drawn", World(), lines)
    (tmp_path / "drawn" / "00001" / "samples" / "0000.png").write_bytes(b"no picture")
    detector, store = SceneDetector(SceneParser.from_pretrained(checkpoints_dir() / "parser"), fingerprint="e"), JudgementStore(tmp_path / "a.parquet")
    shots = read_folder(tmp_path / "drawn")[0]
    rows, notes = run_scenes(shots, detector, World(), store, truths=4, wording="world")
    assert values(rows, "generated", "exact")["all"] > 0.9 and values(rows, "rendered", "exact")["all"] > 0.95 and values(rows, "generated, prompts shuffled", "exact")["all"] < 0.1
    assert {row["n"] for row in rows if row["category"] == "counting"} == {0} and notes["not applicable"].startswith("counting") and "00001" not in notes["not applicable"] and "2 of" in notes["pictures left out"]
    assert run_scenes(shots, None, World(), store, truths=4, wording="world")[0] == rows


def test_another_world_is_refused(tmp_path):
    drawn(tmp_path / "drawn", CROWD, [line for line in scene_prompts(CROWD, 6) if line["include"][0]["class"] == "dog"][:1])
    with pytest.raises(UserError, match="has no 'dog'"): run_scenes(read_folder(tmp_path / "drawn")[0], None, World(), JudgementStore(tmp_path / "a.parquet"))


def test_where_all_ask_the_same_nothing_is_shuffled():
    item = read_item({"tag": "single_object", "include": [{"class": "star"}], "prompt": "a star"})
    other = read_item({"tag": "single_object", "include": [{"class": "star"}], "prompt": "a red star"})
    assert shuffled([item, other]) == [None, None]
