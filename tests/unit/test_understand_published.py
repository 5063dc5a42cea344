"Published benchmarks: real formats with everything that goes wrong in them, rules against hand-computed cases, stores that are killed half-way."
import itertools
import json
import random

import numpy as np
import pytest
import torch

from vugen.data.images import to_pil
from vugen.errors import UserError
from vugen.understand.benchmarks import winoground_scores
from vugen.understand.published import (BENCHMARKS, RULES, PublishedItem, ScoreStore, Shot, anchored, benchmark_named, bind, incomplete_sets, item_scores, joint_verdicts, limited, load_published, macro_interval, open_shot,
                                        order_options, published_rows, rows_from_items, run_published)
from vugen.understand.scorers import BagOfWordsScorer, ContrastiveScorer, PairScorer, RandomScorer


def picture(path, color=(1., 0., 0.)):
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(torch.tensor(color)[:, None, None].expand(3, 8, 12)).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")


def winoground(root):
    rows = [{"id": str(n) if n % 2 else n, "image_0": f"ex_{n}_img_0", "image_1": f"ex_{n}_img_1", "caption_0": f"un café {n} à gauche", "caption_1": f"à gauche un café {n}", "tag": "Order", "secondary_tag": "", "num_main_preds": 1,
             "collapsed_tag": ("Object", "Relation")[n % 2], "more": {"x": 1}} for n in range(4)]
    write(root / "data/examples.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    for n, side in itertools.product(range(4), range(2)):
        if (n, side) != (2, 1): picture(root / f"data/images/ex_{n}_img_{side}.png")

def aro(name, more, count=3):
    def make(root):
        box = {"bbox_x": 2, "bbox_y": 1, "bbox_w": 100, "bbox_h": 4}
        write(root / name, [{"image_path": f"{n}.jpg", **box, "true_caption": "the man on the horse", "false_caption": "the horse on the man", "image_id": n, **more(n)} for n in range(count)])
        for n in range(count - 1): picture(root / f"images/{n}.jpg")
    return make

def order(name, key="image"):
    def make(root):
        write(root / name, [{key: f"val2014/{n}.jpg", "caption_options": ["a b c", "c b a", "b a c", "a c b", "c a b"], "image_id": n} for n in range(3)])
        for n in range(2): picture(root / f"val2014/{n}.jpg")
    return make

def sugar(extra, aslist=False):
    def make(root):
        rows = {str(n): {"filename": f"{n:012d}.jpg", "caption": "a crêpe on a plate", "negative_caption": "a plate on a crêpe", **extra} for n in range(3)}
        for kind in ("swap_obj", "replace_att"): write(root / f"{kind}.json", [{"id": int(key), **row} for key, row in rows.items()] if aslist else rows)
        for n in range(2): picture(root / f"val2017/{n:012d}.jpg")
    return make

def mmvp_vlm(root):
    write(root / "Questions.csv", "\ufeffQuestion ID,Type,Statement\n" + "".join(f'{n},Color and Appearance,"a, {n}"\n' for n in range(1, 7)))
    for n in range(1, 6): picture(root / f"MLLM_VLM Images/Color and Appearance/{n}.jpg")

def mmvp(root):
    write(root / "Questions.csv", "Index,Question,Options,Correct Answer\n" + "".join(f"{n},Open or closed?,(a) Open (b) Closed,({'ab'[n % 2]})\n" for n in range(1, 5)))
    for n in range(1, 4): picture(root / f"MMVP Images/{n}.jpg")

def whatsup(name, places):
    def make(root):
        rows = [{"image_path": f"data/{name[:-13]}/mug_{place}_of_{thing}.jpeg", "caption_options": [f"A mug {each} a {thing}" for each in (place, *(other for other in places if other != place))]} for thing in ("plate", "table") for place in places]
        write(root / name, rows)
        for row in rows[:-1]: picture(root / name[:-13] / row["image_path"].split("/")[-1])
    return make

def questions(prefix, names):
    def make(root):
        for count in ("one", "two"): write(root / f"{prefix}_qa_{count}_obj.json", [[n if n else "0", "a dog on the left", "a dog on the right"] for n in range(3)])
        for n in range(2): picture(root / names(n))
    return make

def valse(root):
    write(root / "existence.json", {f"existence_{n}": {"dataset": "visual7w", "image_file": f"{n}.jpg", "caption": "There are no people.", "foil": "There are people.", "mturk": {"caption": n, "foil": 0, "other": 0}} for n in range(5)})
    write(root / "plurals.json", {"plurals_1": {"image_file": "1.jpg", "caption": ["exactly one dog"], "foil": "several dogs", "mturk": {"caption": 3}}})
    for n in range(4): picture(root / f"visual7w/images/{n}.jpg")
    picture(root / "plurals/test_images/1.jpg")

def bivlc(root):
    import pyarrow, pyarrow.parquet
    picture(root / "x.png"); picture(root / "y.png", (0., 0., 1.))
    red, blue = ({"bytes": (root / name).read_bytes(), "path": name} for name in ("x.png", "y.png"))
    rows = [{"image": red, "caption": f"one {n}", "negative_image": blue, "negative_caption": f"two {n}", "type": "Swap", "subtype": "Object"} for n in range(5)]
    (root / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "data/test-00000-of-00001.parquet", row_group_size=2)

def colorswap(root):
    write(root / "test.json", [{"id": n, "caption_1": "a red fox", "caption_2": "a fox, red", "image_1": f"images/{n}_1.png", "image_2": f"images/{n}_2.png"} for n in range(3)])
    for n, side in itertools.product(range(3), (1, 2)):
        if (n, side) != (0, 1): picture(root / f"images/{n}_{side}.png")

def natural(root):
    write(root / "metadata.json", [{"index": n, "image_0": f"{n}_0.jpg", "image_1": f"{n}_1.jpg", "caption_0": "one", "caption_1": "two"} for n in range(2)])
    for n, side in ((0, 0), (0, 1), (1, 0)): picture(root / f"images/{n}_{side}.jpg")

def clevr(root):
    for kind in ("pair_binding_color", "spatial"): write(root / f"captions/{kind}.json", {f"CLEVR_new_{n:06d}.png": [["A red cube.", "A blue cube."], ["A blue ball.", "A red ball."]] for n in range(2)})
    picture(root / "images/CLEVR_new_000000.png")

# name → what writes it, items that are kept, items in the list
MADE = {"winoground": (winoground, 3, 4), "aro-relation": (aro("visual_genome_relation.json", lambda n: {"relation_name": "on"}), 2, 3), "aro-attribution": (aro("visual_genome_attribution.json", lambda n: {"attributes": ["red", "big"]}), 2, 3),
        "aro-coco-order": (order("coco_order.json"), 2, 3), "aro-flickr-order": (order("flickr30k_order.json", "image_path"), 2, 3), "sugarcrepe": (sugar({"seen": True}), 4, 6), "sugarcrepe++": (sugar({"caption2": "on a plate, a crêpe"}, True), 4, 6),
        "mmvp-vlm": (mmvp_vlm, 2, 3), "mmvp": (mmvp, 3, 4), "whatsup-a": (whatsup("controlled_images_dataset.json", ("left", "right", "on", "under")), 7, 8), "whatsup-b": (whatsup("controlled_clevr_dataset.json", ("left", "right", "in-front", "behind")), 7, 8),
        "whatsup-coco-qa": (questions("coco", lambda n: f"val2017/{n:012d}.jpg"), 4, 6), "whatsup-vg-qa": (questions("vg", lambda n: f"vg_images/{n}.jpg"), 4, 6), "valse": (valse, 3, 4), "bivlc": (bivlc, 5, 5), "colorswap": (colorswap, 2, 3),
        "naturalbench-retrieval": (natural, 1, 2), "gdbench-clevr": (clevr, 4, 8)}


@pytest.fixture
def folder(tmp_path):
    def make(name):
        root = tmp_path / name.replace("+", "p"); root.mkdir()
        MADE[name][0](root)
        return root
    return make


class Oracle(PairScorer):
    "Knows which caption stands first; `flip` likes the others"
    def __init__(self, suite, sign=1.0): self.true, self.sign, self.name = {caption for item in suite.items for caption in item.captions[:2 if suite.name == "sugarcrepe++" else 1]}, sign, "oracle"
    def score_pairs(self, images, captions): return torch.tensor([self.sign * (caption in self.true) for caption in captions])


def test_every_benchmark_is_tested(): assert set(MADE) == set(BENCHMARKS)


@pytest.mark.parametrize("name", MADE)
def test_real_formats_with_missing_pictures(name, folder, tmp_path):
    suite = load_published(name, folder(name), size=6)
    _, kept, total = MADE[name]
    assert len(suite) == kept and len({item.key for item in suite.items}) == kept
    assert ("missing pictures" in suite.notes) == (kept < total) and (kept == total or suite.notes["missing pictures"].startswith(f"{total - kept} of {total} items"))
    assert suite.pictures([0]).shape == (1, RULES[BENCHMARKS[name].rule].pictures, 3, 6, 6)
    assert len(load_published(name, tmp_path / name.replace("+", "p"), pictures=False)) == total
    chance = run_published(suite, {"tie": Constant()}, ScoreStore(tmp_path / "tie.parquet"))
    assert all(row["value"] == 0 and 0 < row["chance"] < 1 for row in chance["rows"])  # a tie is no win, anywhere


class Constant(PairScorer):
    name = "constant"
    def score_pairs(self, images, captions): return torch.ones(len(captions))


@pytest.mark.parametrize("name", [name for name, each in BENCHMARKS.items() if each.rule in ("choice", "both") and name not in ("gdbench-clevr", "mmvp", "whatsup-a", "whatsup-b")])
def test_right_and_wrong_scorers(name, folder, tmp_path):
    suite = load_published(name, folder(name), size=6)
    value = lambda sign: {row["value"] for row in run_published(suite, {"o": Oracle(suite, sign)}, ScoreStore(tmp_path / f"{sign}.parquet"), f"{sign}")["rows"]}
    assert value(1.) == {1.} and value(-1.) == {0.}


def test_non_ascii_and_extra_fields_survive(folder):
    suite = load_published("winoground", folder("winoground"), size=6)
    assert suite.items[0].captions == ("un café 0 à gauche", "à gauche un café 0") and [item.category for item in suite.items] == ["Object", "Relation", "Relation"]
    assert [item.key for item in suite.items] == ["0", "1", "3"]


def test_boxes_are_cut_from_the_full_picture(tmp_path):
    wide = torch.zeros(3, 4, 4000); wide[1, :, 3000:] = 1  # wider than what pictures are scaled to elsewhere
    to_pil(wide).save(tmp_path / "wide.png")
    assert open_shot(Shot(tmp_path / "wide.png", box=(3100, 0, 9000, 50)), 4)[1].min() > .95 and open_shot(Shot(tmp_path / "wide.png", box=(-50, -5, 2900, 4)), 4).max() < .05
    with pytest.raises(UserError, match="outside"): open_shot(Shot(tmp_path / "wide.png", box=(4000, 0, 4100, 4)), 4)


def test_a_box_outside_costs_its_item_only(folder, tmp_path):
    root = folder("aro-relation")
    rows = json.loads((root / "visual_genome_relation.json").read_text()); rows[0]["bbox_x"] = 500
    write(root / "visual_genome_relation.json", rows)
    found = run_published(load_published("aro-relation", root, size=6), {"r": RandomScorer()}, ScoreStore(tmp_path / "i.parquet"))
    assert found["rows"][-1]["n"] == 1 and found["notes"]["damaged pictures"].startswith("1 of 2") and rows_from_items(tmp_path / "i.parquet")["rows"] == found["rows"]


def test_pictures_of_a_table_are_the_right_ones(folder):
    suite = load_published("bivlc", folder("bivlc"), size=4)
    red, blue = suite.pictures([4])[0]
    assert red[0].min() > .9 and red[2].max() < .1 and blue[2].min() > .9 and suite.items[4].captions == ("one 4", "two 4") and suite.items[4].category == "Swap Object"


def test_mmvp_answers_come_first(folder):
    items = load_published("mmvp", folder("mmvp"), size=4).items
    assert items[0].captions == ("Open or closed? Closed", "Open or closed? Open") and (items[0].group, items[0].slot, items[1].group, items[1].slot) == ("1", "1", "1", "2")


def test_valse_keeps_what_annotators_found_valid(folder):
    assert [item.key for item in load_published("valse", folder("valse"), size=4).items] == ["existence/existence_2", "existence/existence_3", "plurals/plurals_1"]


def test_rules_against_brute_force():
    for scores in itertools.product(range(3), repeat=3):
        assert RULES["choice"].verdicts(np.array([scores], float))["accuracy"] == (scores[0] > scores[1] and scores[0] > scores[2])
        assert RULES["both"].verdicts(np.array([scores], float)) == {"both": scores[0] > scores[2] and scores[1] > scores[2], "accuracy": scores[0] > scores[2]}
    for a, b, c, d in itertools.product(range(3), repeat=4):
        matrix = np.array([[a, b], [c, d]], float)
        assert RULES["pictures"].verdicts(matrix) == {"pair_accuracy": a > c and d > b, "text": a > b and d > c}
        assert RULES["matching"].verdicts(matrix) == {name: bool(won) for name, won in winoground_scores(matrix[None]).items() if name != "pair"}


def test_chances_are_those_of_all_orders():
    for rule, shape in (("choice", (1, 4)), ("both", (1, 3)), ("matching", (2, 2)), ("pictures", (2, 2))):
        orders = [RULES[rule].verdicts(np.array(order, float).reshape(shape)) for order in itertools.permutations(range(shape[0] * shape[1]))]
        for metric, chance in RULES[rule].chance(shape[1]).items():
            share = sum(order[metric] for order in orders) / len(orders)
            assert share == pytest.approx(chance) if metric != "group_match" else share <= chance  # whole numbers tie there


def test_sets_and_pairs_by_hand():
    items = [PublishedItem(place, f"{thing}{place}", tuple("abcd"), group=thing, slot=place) for thing in ("mug", "cup") for place in ("left", "right", "on", "under")][:-1]
    sets = joint_verdicts(BENCHMARKS["whatsup-a"], items, [True, True, True, True, True, False, True], [.25] * 7)
    assert [won for won, _ in sets["pair_accuracy"]] == [True, False, True] and [won for won, _ in sets["set_accuracy"]] == [True]  # the cup's set lacks a photograph
    assert {chance for _, chance in sets["set_accuracy"]} == {1 / 256}


def test_small_and_symmetric_categories_are_dropped():
    make = lambda category, n: [PublishedItem(category, f"{category}{k}", ("a", "b")) for k in range(n)]
    right, wrong = np.array([[1., 0.]]), np.array([[0., 1.]])
    rows = published_rows(BENCHMARKS["aro-attribution"], "s", make("x", 25) + make("y", 24) + make("z", 50), [right] * 25 + [wrong] * 24 + [right] * 25 + [wrong] * 25)
    value = {(row["category"], row["metric"]): row["value"] for row in rows}
    assert value["all", "macro_accuracy"] == .75 and value["all", "accuracy"] == 50 / 99 and ("y", "accuracy") not in value
    rows = published_rows(BENCHMARKS["aro-relation"], "s", make("on", 2) + make("next to", 2), [right] * 2 + [wrong] * 2)
    assert {row["category"] for row in rows} == {"on", "all"} and all(row["value"] == 1 for row in rows)
    macro = next(row for row in rows if row["metric"] == "macro_accuracy")
    assert macro["anchors"]["CLIP L/14"] == .53 and "CLIP L/14 53%" in anchored([macro])[0]["anchors"]


def test_macro_of_one_category_is_wilson():
    from vugen.evaluate.intervals import wilson
    assert macro_interval([(7, 20)]) == pytest.approx(tuple(wilson(7, 20)[:3]))


def test_limit_keeps_groups_whole():
    items = [PublishedItem(place, f"{thing}{place}", ("a", "b"), group=thing, slot=place) for place in ("left", "right") for thing in "xyz"]
    assert [item.group for item in limited(items, 2)] == ["x", "y", "x", "y"] and len(limited(items, None)) == 6
    assert len(limited([PublishedItem(kind, kind + str(n), ("a", "b")) for n in range(5) for kind in "xy"], 2)) == 4


def test_blocks_of_a_contrastive_scorer_are_those_of_single_items():
    class Towers:
        def encode_image(self, images): return torch.nn.functional.normalize(images.flatten(1) @ torch.linspace(-1, 1, 12 * 5).view(12, 5), dim=1)
        def encode_text(self, captions): return torch.nn.functional.normalize(torch.tensor([[float(ord(letter)) - 98 for letter in (caption * 5)[:5]] for caption in captions]), dim=1)
    scorer, pictures, captions = ContrastiveScorer(Towers()), list(torch.rand(3, 1, 3, 2, 2)), [("ab", "ba", "cc"), ("a", "cb"), ("bc", "ca", "ac", "aa")]
    for found, images, words in zip(item_scores(scorer, pictures, captions), pictures, captions): assert np.allclose(found, scorer.score(images, list(words)).numpy(), atol=1e-6)


def test_order_options_keep_the_words():
    tags = lambda caption: [(word, len(word) > 3) for word in caption.split()]
    options = order_options("the brown horse eats fresh grass in a field", tags)
    assert len(options) == 5 and all(sorted(option.split()) == sorted(options[0].split()) for option in options) and options == order_options("the brown horse eats fresh grass in a field", tags)
    for place, (word, named) in enumerate(tags(options[0])):
        if not named: assert options[1].split()[place] == word
        else: assert options[2].split()[place] == word


class Dies(PairScorer):
    "Answers by caption alone, and dies after some calls"
    name = "dies"
    def __init__(self, left): self.left, self.asked = left, 0
    def score_pairs(self, images, captions):
        self.asked += 1
        if self.asked > self.left: raise KeyboardInterrupt
        return torch.tensor([random.Random(caption + str(float(image.mean()))).random() for image, caption in zip(images, captions)])


def test_killed_half_way_it_ends_with_the_same_numbers(folder, tmp_path):
    suite = load_published("whatsup-a", folder("whatsup-a"), size=6)
    whole = run_published(suite, {"d": Dies(99)}, ScoreStore(tmp_path / "whole.parquet"), batch_size=2)
    with pytest.raises(KeyboardInterrupt): run_published(suite, {"d": Dies(5)}, ScoreStore(tmp_path / "killed.parquet"), batch_size=2)
    assert not (tmp_path / "killed.parquet").exists()
    rest = Dies(99)
    again = run_published(suite, {"d": rest}, ScoreStore(tmp_path / "killed.parquet"), batch_size=2)
    assert again["rows"] == whole["rows"] and rest.asked == 7 - 4 and not (tmp_path / "killed.parquet.parts").exists()
    assert rows_from_items(tmp_path / "killed.parquet")["rows"] == whole["rows"]


def test_other_weights_or_pictures_are_scored_again(folder, tmp_path):
    root, store = folder("sugarcrepe"), ScoreStore(tmp_path / "i.parquet")
    for weights, calls in (("a", 4), ("a", 0), ("b", 4)):
        scorer = Dies(99)
        run_published(load_published("sugarcrepe", root, size=6), {"d": scorer}, store, weights)
        assert scorer.asked == calls
    rows = json.loads((root / "swap_obj.json").read_text()); rows["0"]["caption"] = "another"
    write(root / "swap_obj.json", rows)
    scorer = Dies(99)
    run_published(load_published("sugarcrepe", root, size=6), {"d": scorer}, store, "b")
    assert scorer.asked == 1


def test_a_smaller_limit_throws_no_scores_away(folder, tmp_path):
    root, store = folder("sugarcrepe"), ScoreStore(tmp_path / "i.parquet")
    run_published(load_published("sugarcrepe", root, size=6), {"d": Dies(99)}, store)
    small = run_published(load_published("sugarcrepe", root, size=6, limit=1), {"d": Dies(0)}, store)
    assert rows_from_items(store.path)["rows"] == small["rows"] and small["rows"][0]["n"] == 1
    run_published(load_published("sugarcrepe", root, size=6), {"d": Dies(0)}, store)


def test_a_store_of_another_suite_is_refused(folder, tmp_path):
    store = ScoreStore(tmp_path / "i.parquet")
    run_published(load_published("sugarcrepe", folder("sugarcrepe"), size=6), {"r": RandomScorer()}, store)
    with pytest.raises(UserError, match="sugarcrepe, not of mmvp"): run_published(load_published("mmvp", folder("mmvp"), size=6), {"r": RandomScorer()}, store)
    with pytest.raises(UserError, match="parquet"): ScoreStore(tmp_path / "i.json")


def test_captions_alone_need_no_picture(folder, tmp_path):
    suite = load_published("sugarcrepe", folder("sugarcrepe"), pictures=False)
    words = BagOfWordsScorer(["a crêpe on a plate"])
    found = run_published(suite, {"bag": words}, ScoreStore(tmp_path / "b.parquet"), blind=True)
    assert {row["value"] for row in found["rows"]} == {0.} and found["rows"][-1]["n"] == 6  # the same words tie


@pytest.mark.parametrize("name, file, content, words", [
    ("sugarcrepe", "swap_obj.json", '{"0": {"filename": "1.jpg", "capt', "swap_obj.json is no complete JSON, line 1, column"), ("sugarcrepe", "swap_obj.json", '{"0": {}, "0": {}}', "'0' twice"),
    ("sugarcrepe", "swap_obj.json", '{"7": {"filename": "1.jpg", "caption": "a"}}', "key '7' has no 'negative_caption'"), ("sugarcrepe", "swap_obj.json", '{"7": {"filename": "1.jpg", "caption": 3, "negative_caption": "b"}}', "key '7' has 'caption' that is a int"),
    ("winoground", "data/examples.jsonl", '{"id": 0, "caption_0"\n', "examples.jsonl"), ("mmvp-vlm", "Questions.csv", "Question ID,Type,Statement\n1,x,a\n3,x,b\n", "line 2 has the id 1 and no line has 2"),
    ("mmvp-vlm", "Questions.csv", "Question ID,Type,Statement\n1,x,a\n1,x,b\n", "line 3 has the id 1 a second time"), ("mmvp", "Questions.csv", "Index,Question,Options,Correct Answer\n1,q,(a) x (b) y,(c)\n", "line 2"),
    ("whatsup-a", "controlled_images_dataset.json", '[{"image_path": "controlled_images/mug_near_cup.jpeg", "caption_options": ["a", "b"]}]', "mug_near_cup"), ("gdbench-clevr", "captions/spatial.json", '{"x.png": ["a", "b"]}', "'x.png' is no list of pairs"),
    ("whatsup-coco-qa", "coco_qa_one_obj.json", '[[1, "a"]]', "entry 0 is no row"), ("aro-attribution", "visual_genome_attribution.json", '[{"image_path": "1.jpg"}]', "entry 0 has no 'bbox_x'"), ("colorswap", "test.json", "[]", "without any item")])
def test_what_is_wrong_is_one_sentence(name, file, content, words, folder):
    root = folder(name)
    write(root / file, content)
    with pytest.raises(UserError) as error: load_published(name, root)
    assert words in str(error.value) and "\n" not in str(error.value) and "expected" in str(error.value)


def test_duplicate_ids_are_named(folder):
    root = folder("winoground")
    lines = (root / "data/examples.jsonl").read_text(encoding="utf-8").splitlines()
    write(root / "data/examples.jsonl", "\n".join([*lines, lines[1]]))
    with pytest.raises(UserError, match="'1' twice"): load_published("winoground", root)


def test_the_wrong_folder_is_recognised(folder, tmp_path):
    for name, other in (("winoground", "sugarcrepe"), ("sugarcrepe", "sugarcrepe++"), ("sugarcrepe++", "sugarcrepe"), ("mmvp", "mmvp-vlm"), ("mmvp-vlm", "mmvp"), ("colorswap", "bivlc")):
        root = tmp_path / other.replace("+", "p")
        if not root.exists(): folder(other)
        with pytest.raises(UserError, match="holds .*--suite") as error: load_published(name, root)
        assert f"--suite {other})" in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no data/examples.jsonl: expected"): load_published("winoground", tmp_path / "empty")
    with pytest.raises(UserError, match="not a folder"): load_published("winoground", tmp_path / "nowhere")
    with pytest.raises(UserError, match="'soup'.*winoground"): benchmark_named("soup")


def test_pictures_may_lie_elsewhere_and_none_at_all_is_an_error(folder, tmp_path):
    import shutil
    root = folder("sugarcrepe")
    shutil.move(root / "val2017", tmp_path / "coco")
    with pytest.raises(UserError, match="each of the 6 items.*--images"): load_published("sugarcrepe", root)
    assert len(load_published("sugarcrepe", root, images=tmp_path / "coco")) == 4
    write(root / "swap_obj.json", {"0": {"filename": "../secret.jpg", "caption": "a", "negative_caption": "b"}})
    with pytest.raises(UserError, match="secret"): load_published("sugarcrepe", root)


def test_scores_of_scenes_are_drawn_again(tmp_path):
    from vugen.understand.benchmarks import run_suite, scene_suite
    result = run_suite(RandomScorer(), scene_suite(n=3))
    assert rows_from_items(result.save(tmp_path / "scenes.parquet"))["rows"] == result.rows()


def test_bind_by_name(folder, tmp_path, monkeypatch):
    from vugen.understand import published
    monkeypatch.setattr(published, "load_scorers", lambda parts, names, device="cpu": {name: RandomScorer(name=name) for name in names})
    found = bind("winoground", "contrastive,lit", root=folder("winoground"), items=tmp_path / "i.parquet", size=8, limit=1)
    assert found["run"]["items"] == 2 and {row["scorer"] for row in found["rows"]} == {"contrastive", "lit"} and {"Object", "Relation", "all"} == {row["category"] for row in found["rows"]}
    for arguments, words in (({"root": None}, "--root"), ({"limit": 0}, "limit"), ({"captions_only": True}, "looks at pictures"), ({"scorers": "soup"}, "'soup'"), ({"suite": "soup"}, "'soup'")):
        with pytest.raises(UserError, match=words): bind(**{"suite": "winoground", "scorers": "lit", "root": tmp_path / "winoground", **arguments})


def test_the_program_draws_its_table_again(folder, tmp_path, capsys):
    from vugen.lab.cli import main
    root = folder("sugarcrepe")
    def call(*words):
        with pytest.raises(SystemExit) as left: main([str(word) for word in words])
        return left.value.code
    assert call("bind", "--suite", "sugarcrepe", "--root", root, "--captions-only", "--scorer", "bag-of-words", "--items", tmp_path / "i.parquet", "--json", tmp_path / "a.json") == 0
    assert "CLIP L/14 60.2%" in capsys.readouterr().out
    assert call("bind", "--from-items", tmp_path / "i.parquet", "--json", tmp_path / "b.json") == 0
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert first["rows"] == second["rows"] and str(tmp_path) not in first["run"]["command"]
    assert call("bind", "--suite", "winoground", "--root", root) == 2 and "holds SugarCrepe" in capsys.readouterr().err


def test_a_separator_of_lines_inside_a_caption_ends_no_row(tmp_path):
    from vugen.understand.published import read_list
    for mark in ("\u2028", "\u2029", "\x85"):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"id": 1, "caption": f"a red{mark}circle"}, ensure_ascii=False) + "\r\n" + json.dumps({"id": 2, "caption": "b"}) + "\n", encoding="utf-8")
        (tmp_path / "rows.csv").write_text(f'id,caption\n1,"a red{mark}circle"\n2,b\n', encoding="utf-8")
        for name in ("rows.jsonl", "rows.csv"):
            rows = [row for *_, row in read_list(tmp_path / name, "rows")]
            assert [row["caption"] for row in rows] == [f"a red{mark}circle", "b"], name


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
from vugen.understand.published import ScoreStore, load_published, run_published
from vugen.understand.scorers import PairScorer
class Slow(PairScorer):
    "Waits for the other process, then answers by caption; dies without a word after some calls"
    def __init__(self): self.name, self.asked = name, 0
    def score_pairs(self, images, captions):
        if not self.asked and other:
            Path(f"{store}.{name}").touch()
            while not Path(f"{store}.{other}").exists(): time.sleep(.001)
        self.asked += 1
        if self.asked > int(deaths):
            assert __name__ == "__main__", "what is known was asked again"  # not the process of the tests
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor([float(sum(map(ord, caption)) % 7) for caption in captions])
found = run_published(load_published("gdbench-clevr", root, size=4), {name: Slow()}, ScoreStore(store), batch_size=1)
"""
NAMES = ("root", "store", "name", "other", "deaths")


def here(*words):
    "The same in this process"
    names = {**dict(zip(NAMES, map(str, words))), "__name__": "here"}
    exec(SCRIPT, names)
    return names["found"]["rows"]


def started(*words):
    import subprocess
    import sys
    return subprocess.Popen([sys.executable, "-c", f"import sys; {', '.join(NAMES)} = sys.argv[1:]\n{SCRIPT}", *map(str, words)], stderr=subprocess.PIPE, text=True)


def test_two_processes_may_share_a_store(folder, tmp_path):
    root, store = folder("gdbench-clevr"), tmp_path / "i.parquet"
    names = [f"CLEVR_{n}.png" for n in range(12)]
    write(root / "captions/spatial.json", {name: [["A red cube.", "A blue cube."], ["A blue ball.", "A red ball."]] for name in names})
    for name in names: picture(root / f"images/{name}")
    running = [started(root, store, "one", "two", 99), started(root, store, "two", "one", 99)]
    for each in running: assert (each.communicate()[1], each.returncode) == ("", 0)
    found = ScoreStore(store).read()
    keys = {item.key for item in load_published("gdbench-clevr", root, size=4).items}
    for name in ("one", "two"): assert sorted(record["key"] for record in found if record["scorer"] == name) == sorted(keys)
    assert not (tmp_path / "i.parquet.parts").exists() and not list(tmp_path.glob(".*"))


def test_a_killed_process_leaves_its_scores_to_the_next(folder, tmp_path):
    root, store = folder("gdbench-clevr"), tmp_path / "i.parquet"
    assert started(root, store, "one", "", 3).wait() == -9 and not store.exists()
    kept = ScoreStore(store).read()
    rows, whole = here(root, store, "one", "", 1), tmp_path / "whole.parquet"  # one item is left
    assert len(kept) == 3 and not (tmp_path / "i.parquet.parts").exists() and here(root, whole, "one", "", 99) == rows == rows_from_items(store)["rows"] and ScoreStore(whole).read() == ScoreStore(store).read()


def test_a_table_drawn_again_knows_nothing_of_a_run_in_progress(folder, tmp_path):
    root, store = folder("sugarcrepe"), ScoreStore(tmp_path / "i.parquet")
    small = run_published(load_published("sugarcrepe", root, size=6, limit=1), {"d": Dies(99)}, store)
    with pytest.raises(KeyboardInterrupt): run_published(load_published("sugarcrepe", root, size=6), {"d": Dies(1)}, store, "other weights", batch_size=1)
    assert store.parts.exists() and rows_from_items(store.path)["rows"] == small["rows"]
    with pytest.raises(UserError, match="not finished"): 
        ScoreStore(tmp_path / "new.parquet").add(store.read()[:1]); rows_from_items(tmp_path / "new.parquet")


def test_a_picture_of_equal_size_is_another_picture(folder, tmp_path):
    root, store = folder("sugarcrepe"), ScoreStore(tmp_path / "i.parquet")
    run_published(load_published("sugarcrepe", root, size=6), {"d": Dies(99)}, store)
    file = root / "val2017" / f"{1:012d}.jpg"
    size = file.stat().st_size
    picture(file, (0., 1., 0.))
    data = file.read_bytes()[:size]
    file.write_bytes(data + b"\0" * (size - len(data)))
    scorer = Dies(99)
    run_published(load_published("sugarcrepe", root, size=6), {"d": scorer}, store)
    assert file.stat().st_size == size and scorer.asked == 2  # one picture of two lists


def test_a_damaged_picture_is_tried_again(folder, tmp_path):
    root, store = folder("sugarcrepe"), ScoreStore(tmp_path / "i.parquet")
    file = root / "val2017" / f"{1:012d}.jpg"
    good = file.read_bytes()
    file.write_bytes(good[:200])
    found = run_published(load_published("sugarcrepe", root, size=6), {"d": Dies(99)}, store)
    assert found["notes"]["damaged pictures"].startswith("2 of 4")
    file.write_bytes(good)
    scorer = Dies(99)
    found = run_published(load_published("sugarcrepe", root, size=6), {"d": scorer}, store)
    assert scorer.asked == 2 and "damaged pictures" not in found["notes"] and found["rows"][-1]["n"] == 4
    # the same where the file did not change, as on a disk that was away: what could not be scored is asked again
    record = [{**record, "scores": [], "problem": "away"} if record["place"] == 0 else record for record in store.finished()]
    store.finish(record, store.about())
    scorer = Dies(99)
    run_published(load_published("sugarcrepe", root, size=6), {"d": scorer}, store)
    assert scorer.asked == 1


@pytest.mark.parametrize("name, found, missing", [("sugarcrepe", "2 of 7", "replace_obj.json"), ("sugarcrepe++", "2 of 5", "replace_rel.json"), ("valse", "2 of 11", "foil-it.json"), ("gdbench-clevr", "2 of 7", "recognition_shape.json")])
def test_a_part_of_the_lists_is_no_whole(name, found, missing, folder, tmp_path):
    suite = load_published(name, folder(name), size=6)
    assert suite.notes["missing lists"].startswith(f"{found} lists found") and missing in suite.notes["missing lists"]
    run = run_published(suite, {"r": RandomScorer()}, ScoreStore(tmp_path / "i.parquet"))
    assert all(row["partial"] == (f"{found} lists" if row["category"] == "all" else "") for row in run["rows"]) and rows_from_items(tmp_path / "i.parquet")["rows"] == run["rows"]


def test_whole_benchmarks_carry_no_flag(folder, tmp_path):
    for name in ("whatsup-coco-qa", "bivlc", "mmvp"):
        suite = load_published(name, folder(name), size=6)
        assert "missing lists" not in suite.notes and "partial" not in run_published(suite, {"r": RandomScorer()}, ScoreStore(tmp_path / f"{name}.parquet"))["rows"][0]
    (tmp_path / "whatsup-coco-qa" / "coco_qa_two_obj.json").unlink()
    assert load_published("whatsup-coco-qa", tmp_path / "whatsup-coco-qa", size=6).notes["missing lists"].startswith("1 of 2 lists found, coco_qa_two_obj.json is missing")


def test_no_anchor_stands_beside_a_part(folder, tmp_path):
    root = folder("bivlc")
    (root / "data/test-00000-of-00001.parquet").rename(root / "data/test-00001-of-00003.parquet")
    suite = load_published("bivlc", root, size=6)
    rows = run_published(suite, {"r": RandomScorer()}, ScoreStore(tmp_path / "i.parquet"))["rows"]
    assert "1 of 3" in suite.notes["missing lists"] and "test-00000-of-00003.parquet" in suite.notes["missing lists"] and not any(row["anchors"] for row in rows)
    assert published_rows(BENCHMARKS["bivlc"], "s", suite.items, [np.eye(2)] * 5)[-2]["anchors"]  # as it would stand without the flag


def test_a_category_without_any_picture_makes_a_part(folder, tmp_path):
    root = folder("winoground")
    for n in (0, 2): (root / f"data/images/ex_{n}_img_0.png").unlink()
    suite = load_published("winoground", root, size=6)
    rows = run_published(suite, {"r": RandomScorer()}, ScoreStore(tmp_path / "i.parquet"))["rows"]
    assert suite.notes["missing categories"].startswith("no item of Object") and {row["partial"] for row in rows if row["category"] == "all"} == {"1 of 2 categories"} and not any(row["anchors"] for row in rows)


def test_categories_are_large_or_small_whatever_the_limit(tmp_path):
    root = tmp_path / "aro"
    count = {("red", "big"): 25, ("old", "wet"): 30, ("new", "dry"): 24}
    row = lambda pair: {"image_path": "0.jpg", "bbox_x": 0, "bbox_y": 0, "bbox_w": 5, "bbox_h": 5, "true_caption": "a b", "false_caption": "b a", "attributes": list(pair)}
    write(root / "visual_genome_attribution.json", [row(pair) for pair, n in count.items() for _ in range(n)]); picture(root / "images/0.jpg")
    suite = load_published("aro-attribution", root, size=4, limit=2)
    rows = run_published(suite, {"r": RandomScorer()}, ScoreStore(tmp_path / "i.parquet"))["rows"]
    assert {row["category"]: row["n"] for row in rows if row["metric"] == "accuracy"} == {"old_wet": 2, "red_big": 2, "all": 6} and rows[-1]["metric"] == "macro_accuracy" and rows[-1]["n"] == 4
    assert suite.notes["small categories"].startswith("1 of 3 categories (24 of 79 items) ha") and rows_from_items(tmp_path / "i.parquet")["rows"] == rows


def test_symmetric_relations_are_counted(tmp_path):
    root = tmp_path / "aro"
    row = lambda name: {"image_path": "0.jpg", "bbox_x": 0, "bbox_y": 0, "bbox_w": 5, "bbox_h": 5, "true_caption": "a b", "false_caption": "b a", "relation_name": name}
    write(root / "visual_genome_relation.json", [row(name) for name in ("on", "next to", "near", "on", "near")]); picture(root / "images/0.jpg")
    suite = load_published("aro-relation", root, size=4)
    assert len(suite) == 2 and suite.notes["symmetric relations"].startswith("3 of 5 items") and "near (2), next to (1)" in suite.notes["symmetric relations"]
    write(root / "visual_genome_relation.json", [row("near")])
    with pytest.raises(UserError, match="1 of 1 items.*near"): load_published("aro-relation", root)


@pytest.mark.parametrize("key, value, words", [("bbox_x", "NaN", "'bbox_x' that is no finite number (nan)"), ("bbox_y", "-Infinity", "'bbox_y' that is no finite number (-inf)"), ("bbox_h", "1e999", "'bbox_h' that is no finite number (inf)"), ("bbox_w", "1" + "0" * 400, "'bbox_w' that is no finite number"),
                                               ("bbox_w", "0", "'bbox_w' that is not above 0 (0)"), ("bbox_h", "-3", "'bbox_h' that is not above 0 (-3)"), ("bbox_x", "9" * 5000, "no complete JSON")])
def test_boxes_are_made_of_finite_numbers(key, value, words, folder):
    root = folder("aro-relation")
    path = root / "visual_genome_relation.json"
    rows = json.loads(path.read_text()); rows[1][key] = "HERE"
    write(path, json.dumps(rows).replace('"HERE"', value))
    with pytest.raises(UserError) as error: load_published("aro-relation", root)
    assert words in str(error.value) and path.name in str(error.value) and ("entry 1" in str(error.value) or "JSON" in words)


def test_votes_are_finite_and_an_empty_election_says_so(folder):
    root = folder("valse")
    (root / "plurals.json").unlink()
    rows = json.loads((root / "existence.json").read_text())
    write(root / "existence.json", json.dumps({"a": rows["existence_3"]}).replace('"caption": 3', '"caption": NaN'))
    with pytest.raises(UserError, match="'a' has 'caption' that is no finite number"): load_published("valse", root)
    write(root / "existence.json", {key: rows[key] for key in ("existence_0", "existence_1")})
    with pytest.raises(UserError, match="all 2 items .*existence.json.* fewer than 2") as error: load_published("valse", root)
    assert "without any item" not in str(error.value)


def test_pairs_of_two_types_are_named(folder):
    root = folder("mmvp-vlm")
    write(root / "Questions.csv", "Question ID,Type,Statement\n" + "".join(f"{n},{kind},a\n" for n, kind in ((1, "x"), (2, "x"), (3, "x"), (4, "y"))))
    for name in ("x/1", "x/2", "x/3", "y/4"): picture(root / f"MLLM_VLM Images/{name}.jpg")
    suite = load_published("mmvp-vlm", root, size=4)
    assert suite.notes["types"].startswith("3 (x) and 4 (y)") and len(suite) == 2 and [item.category for item in suite.items] == ["x", "x"]


def test_incomplete_sets_are_counted(folder, tmp_path):
    items = [PublishedItem(place, f"{thing}{place}", tuple("abcd"), group=thing, slot=place) for thing in ("mug", "cup") for place in ("left", "right", "on", "under")][:-1]
    assert incomplete_sets(BENCHMARKS["whatsup-a"], items) == {"pair_accuracy": (1, 4), "set_accuracy": (1, 2)} and incomplete_sets(BENCHMARKS["valse"], items) == {}
    found = run_published(load_published("whatsup-a", folder("whatsup-a"), size=6), {"r": RandomScorer()}, ScoreStore(tmp_path / "i.parquet"))
    assert found["notes"]["incomplete sets"].startswith("1 of 4 sets of pair_accuracy and 1 of 2 sets of set_accuracy") and rows_from_items(tmp_path / "i.parquet")["run"]["notes"] == found["notes"]
    whole = tmp_path / "whatsup-a" / "controlled_images" / "mug_under_of_table.jpeg"
    picture(whole)
    assert "incomplete sets" not in run_published(load_published("whatsup-a", tmp_path / "whatsup-a", size=6), {"r": RandomScorer()}, ScoreStore(tmp_path / "i.parquet"))["notes"]


@pytest.mark.parametrize("suite", ["scenes", "winoground"])
def test_captions_only_never_overrides_a_scorer(suite, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))
    root = {"root": folder("winoground")} if suite == "winoground" else {}
    with pytest.raises(UserError, match="'contrastive' looks at pictures"): bind(suite, "bag-of-words,contrastive", captions_only=True, limit=1, **root)
    assert {row["scorer"] for row in bind(suite, "bag-of-words", captions_only=True, limit=1, **root)["rows"]} == {"bag-of-words"}
