"Hard items: a pure function of their names, one true caption each, the others false of the picture."
import dataclasses

import numpy as np
import pytest
import torch

from vugen.data.scenes import World, facts, holds, parse, render, sample_scene, to_float
from vugen.errors import UserError
from vugen.understand.difficulty import DIFFICULTIES, NEAR_COLORS, choice_items, choice_pictures, crowd_captions, difficulty, part_world


@pytest.mark.parametrize("name, count", [("close", 30), ("crowd-100", 6), ("crowd-1000", 2)])
def test_one_caption_is_true_and_all_others_are_false(name, count):
    for item in choice_items(name, count):
        told = [parse(caption) for caption in item.captions]
        assert len(item.captions) == DIFFICULTIES[name].candidates and len({each.canonical() for each in told}) == len(told)
        assert [holds(item.scene, each) for each in told] == [place == item.truth for place in range(len(told))]


def test_items_are_a_function_of_name_seed_and_number():
    assert choice_items("close", 7) == choice_items("close", 9)[:7] and choice_items("close", 3) != choice_items("close", 3, seed=1)
    assert len({item.key for item in choice_items("close", 9)} | {item.key for item in choice_items("close", 9, seed=1)}) == 18


def test_the_true_caption_stands_anywhere():
    assert 8 < sum(item.truth for item in choice_items("close", 30)) < 22
    assert np.std([item.truth for item in choice_items("crowd-100", 12)]) > 15


def test_close_items_differ_in_near_colours_only():
    for item in choice_items("close", 30):
        words = [set(caption.replace("an ", "a ").split()) for caption in item.captions]
        assert words[0] ^ words[1] <= set(NEAR_COLORS) and {thing.color for thing in item.scene.items} <= set(NEAR_COLORS)
        assert len(item.scene.clutter) >= 10 and max(thing.scale for thing in item.scene.items) <= .2


def test_half_of_a_crowd_is_near():
    "One or two of five facts changed, or an exchange"
    for item in choice_items("crowd-100", 4):
        def told(caption):
            read = parse(caption)
            return {(thing.name, thing.color) for thing in read.objects}
        truth = told(item.captions[item.truth])
        assert sum(len(truth & told(caption)) >= 1 for caption in item.captions) >= 25
        swapped = {(name, color) for (name, _), (_, color) in zip(sorted(truth), sorted(truth)[::-1])}
        first, second = item.scene.items
        if first.name != second.name and first.color != second.color: assert any(told(caption) == swapped for caption in item.captions)


def test_pictures_are_the_scenes():
    items = choice_items("close", 2)
    pictures = choice_pictures(items, 48)
    assert pictures.shape == (2, 3, 48, 48) and torch.equal(pictures, to_float(np.stack([render(item.scene, 48) for item in items])))


def test_the_models_world_is_kept():
    world = part_world(DIFFICULTIES["close"].parts[0], World(image_size=64, shapes=("circle", "square"), held_out=("red circle",)))
    assert world.image_size == 64 and world.shapes == ("circle", "square") and world.held_out == ("red circle",) and world.clutter == 16
    with pytest.raises(UserError, match="pink"): part_world(DIFFICULTIES["close"].parts[0], World(colors=("red", "orange", "blue")))


def test_a_world_too_small_for_a_crowd():
    small = World(shapes=("circle", "square"), colors=("red", "blue"), counts={2: 1.0})
    with pytest.raises(UserError, match="different things"): crowd_captions(sample_scene(small, 0, 0), small, 1000, np.random.default_rng(0))


def test_captions_tell_the_scene_and_names_are_checked():
    world = dataclasses.replace(World(), counts={2: 1.0})
    scene = sample_scene(world, 0, 1)
    assert parse(crowd_captions(scene, world, 50, np.random.default_rng(0))[0]).canonical() == facts(scene).canonical()
    with pytest.raises(UserError, match="no difficulty 'far'"): difficulty("far")
