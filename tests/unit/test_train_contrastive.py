"The contrastive stage: its samples, its foils and its figures."
import dataclasses

import pytest
import torch

from vugen.data.scenes import World, batch as scene_batch, caption_of, facts, holds, parse
from vugen.encode.contrastive import ContrastiveModel
from vugen.models.seams import Patches
from vugen.models.text import scene_tokenizer, scene_words
from vugen.train import contrastive as stage_module
from vugen.train.contrastive import FOILS, HELD_OUT, ContrastiveStage, binding_rows, contrastive_batch, false_caption, probe_rows, retrieval_rows
from vugen.train.presets import load_preset

WORLD = World(**load_preset("tiny").world)
PAIRS = dataclasses.replace(WORLD, counts={2: 1.0})


def test_batches_are_pure_functions_of_the_index():
    tokenizer = scene_tokenizer(world=WORLD)
    whole, part = contrastive_batch(WORLD, tokenizer, 0, list(range(20))), contrastive_batch(WORLD, tokenizer, 0, [17, 4])
    assert torch.equal(part["images"], whole["images"][[17, 4]]) and torch.equal(part["groups"], whole["groups"][[17, 4]])
    length = part["ids"].shape[1]
    assert torch.equal(part["ids"], whole["ids"][[17, 4], :length]) and torch.equal(part["mask"], whole["mask"][[17, 4], :length])


def test_groups_are_equal_exactly_where_facts_are():
    tokenizer, data = scene_tokenizer(world=WORLD), scene_batch(WORLD, 0, range(150))
    groups = contrastive_batch(WORLD, tokenizer, 0, list(range(150)))["groups"]
    told = [parse(caption) for caption in data["captions"]]
    for i in range(150):
        for j in range(i): assert (groups[i] == groups[j]) == (told[i] == told[j])


def test_no_caption_of_the_world_is_unknown_to_its_tokenizer():
    tokenizer = scene_tokenizer(world=WORLD)
    captions = scene_batch(WORLD, 5, range(500))["captions"]
    ids, mask = tokenizer.encode(captions)
    assert ids[mask].ne(tokenizer.unk_id).all()
    assert [tokenizer.decode(ids)[i].replace(" ,", ",") for i in range(500)] == captions


@pytest.mark.parametrize("kind", FOILS)
def test_foils_are_false_and_grammatical(kind):
    draw, scenes = torch.Generator().manual_seed(0), scene_batch(PAIRS, 1, range(200))["scenes"]
    captions = [false_caption(scene, PAIRS, kind, draw) for scene in scenes]
    made = [(scene, caption) for scene, caption in zip(scenes, captions) if caption is not None]
    assert len(made) > 150
    for scene, caption in made:
        claim = parse(caption)
        assert claim != facts(scene) and len(claim.objects) == 2
        colors, shapes = ({getattr(part, name) for part in claim.objects} for name in ("color", "name"))
        here = {item.color for item in scene.items}, {item.name for item in scene.items}
        if kind.startswith("swap"): assert (colors, shapes) == here # the same words, otherwise bound
        if kind == "replace-color": assert shapes == here[1] and not colors <= here[0]
        if kind == "replace-shape": assert colors == here[0] and not shapes <= here[1]


def test_a_perfect_scorer_scores_one_and_a_bag_of_words_is_fooled():
    class Knows:
        def __init__(self, right): self.right = right
        def score_pairs(self, images, captions): return torch.tensor([self.right(caption) for caption in captions], dtype=torch.float)
    truth = {caption_of(facts(scene)) for scene in scene_batch(PAIRS, 3, range(60))["scenes"]}
    assert all(row["value"] == 1 and row["high"] == 1 for row in binding_rows(Knows(lambda caption: caption in truth), WORLD, 3, 60) if row["category"] == "swap-color")
    words = {row["category"]: row["value"] for row in binding_rows(Knows(lambda caption: hash(frozenset(caption.split())) % 97), WORLD, 3, 60)}
    assert words["swap-object"] < .5 # ties count as wrong


def test_untrained_retrieval_and_binding_are_at_chance():
    torch.manual_seed(0)
    model = ContrastiveModel(scene_words(WORLD), hidden_size=16, num_layers=1, num_heads=2, text_hidden_size=16, text_layers=1, text_heads=2).eval()
    for row in retrieval_rows(model, WORLD, HELD_OUT, 128, 64): assert row["value"] < .2 and row["n"] == 128
    for row in binding_rows(model, WORLD, HELD_OUT, 100): assert row["low"] < .6 and row["high"] > .4


class Pooled(torch.nn.Module):
    "An encoder whose pooled vector is a function of the pictures"
    def __init__(self, read):
        super().__init__()
        self.read, self.weight = read, torch.nn.Parameter(torch.zeros(1))
    def forward(self, images): return Patches(images.new_zeros(len(images), 1, 1), (1, 1), self.read(images))


def test_probes_read_what_is_there_and_no_noise():
    draw = torch.Generator().manual_seed(0)
    noise = probe_rows(Pooled(lambda images: torch.randn(len(images), 10, generator=draw)), WORLD, HELD_OUT, 400)
    assert all(abs(row["value"] - row["chance"]) < .08 for row in noise)
    color, shape = probe_rows(Pooled(lambda images: images.mean((2, 3))), WORLD, HELD_OUT, 200)
    assert color["value"] > .9 and shape["value"] < .6


@pytest.mark.parametrize("held", [("red circle", "star left of heart"), ("star left of heart",)])
def test_what_is_held_out_is_measured_and_fits_no_probe(held, tmp_path, monkeypatch):
    preset, drawn = load_preset("smoke"), []
    monkeypatch.setattr(stage_module, "scene_batch", lambda world, *rest: drawn.append((world, scene_batch(world, *rest))) or drawn[-1][1])
    stage = ContrastiveStage(dataclasses.replace(preset, world={**preset.world, "held_out": held}), tmp_path)
    stage.measure(stage.build().eval(), tmp_path)
    counts = {"train": 0, "test": 0}
    for world, data in drawn:
        counts[world.split] += 1
        alone = world.counts == {1: 1.} and "red circle" not in held  # a pair cannot be held out of single things
        shown = [any(holds(scene, parse(told)) for told in held) for scene in data["scenes"]]
        assert len({len(scene.items) for scene in data["scenes"]}) == 1 or len(world.counts) > 1
        assert all(shown) if world.split == "test" and not alone else not any(shown)
    assert counts["train"] == 2 and counts["test"] >= 3  # probe; binding, retrieval and the probe's test


def test_probe_rows_split_by_index():
    torch.manual_seed(0)
    model = ContrastiveModel(scene_words(WORLD), hidden_size=16, num_layers=1, num_heads=2, text_hidden_size=16, text_layers=1, text_heads=2).eval()
    rows = probe_rows(model.vision, WORLD, HELD_OUT, 60)
    assert [row["n"] for row in rows] == [60, 60] and [row["chance"] for row in rows] == [1 / 8, 1 / 6]


def test_stage_makes_a_folder_that_loads(tmp_path):
    stage = ContrastiveStage(load_preset("smoke"), tmp_path)
    model = stage.build().eval()
    stage.save(model, tmp_path)
    rows = stage.measure(model, tmp_path)
    loaded = ContrastiveModel.from_pretrained(tmp_path)
    images = stage.batch([0, 1])["images"]
    assert torch.equal(loaded.score(images, ["a red circle"]), model.score(images, ["a red circle"]))
    assert {"value", "low", "high", "n", "chance", "metric", "category", "suite", "scorer"} <= rows[0].keys()
