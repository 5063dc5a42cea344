"""Every kind of foil in a small and a rich world: one fact differs, and each caption belongs to its own picture."""
import dataclasses

import numpy as np
import pytest
import torch

from vugen.data import foils
from vugen.data.foils import ATTEMPTS, FOIL_KINDS, caption_foils, foil_batch, make_foil, meaning
from vugen.data.scenes import CONVERSE, RELATIONS, World, facts, holds, named_attributes, parse, relation_holds
from vugen.errors import UserError

TINY = World()
RICH = World(image_size=64, emoji=("dog", "car", "tree", "apple"), fills=("solid", "striped", "outlined"), attributes_per_object=2, relations=RELATIONS,
             counts={1: .2, 2: .6, 3: .2}, background=("white", "sky"), clutter=1)
SWAPS, REPLACES = ("swap-attribute", "swap-object"), ("replace-object", "replace-attribute", "replace-relation")
PARALLEL = FOIL_KINDS[:-1]
CLUTTERED = World(clutter=3, relations=RELATIONS, counts={2: 1.0})


def many(world, kind, number=20, seed=0): return [make_foil(world, kind, seed, index) for index in range(number)]


def words(caption): return sorted("a" if word == "an" else word for word in caption.replace(",", "").split())


@pytest.mark.parametrize("world", [TINY, RICH], ids=["tiny", "rich"])
@pytest.mark.parametrize("kind", PARALLEL)
def test_each_caption_tells_its_own_picture_and_not_the_other(world, kind):
    attributes = named_attributes(world)
    for foil in many(world, kind, 12):
        told = parse(foil.caption_0), parse(foil.caption_1)
        assert told[0] != told[1]
        assert told[1] == facts(foil.scene_1, attributes) != facts(foil.scene_0, attributes)
        shown = [[holds(scene, each) for each in told] for scene in (foil.scene_0, foil.scene_1)]
        assert shown == [[True, False], [kind.startswith("add"), True]], (shown, foil)  # what an addition leaves out is true of both pictures
        if kind != "add-attribute": assert told[0] == facts(foil.scene_0, attributes)
        for scene in (foil.scene_0, foil.scene_1):
            assert all(relation_holds(scene.items[link.subject], scene.items[link.object], link.name) for link in scene.relations)
        pictures = foil.pictures(48)
        assert np.abs(pictures[0].astype(int) - pictures[1]).max() > 30


@pytest.mark.parametrize("world", [TINY, RICH], ids=["tiny", "rich"])
@pytest.mark.parametrize("kind", SWAPS)
def test_swaps_keep_the_bag_of_words(world, kind):
    for foil in many(world, kind): assert words(foil.caption_0) == words(foil.caption_1) and foil.caption_0 != foil.caption_1


@pytest.mark.parametrize("world", [TINY, RICH], ids=["tiny", "rich"])
@pytest.mark.parametrize("kind", ["replace-object", "replace-attribute"])
def test_replacements_change_one_word(world, kind):
    for foil in many(world, kind):
        first, second = (["a" if word == "an" else word for word in caption.split()] for caption in (foil.caption_0, foil.caption_1))
        assert len(first) == len(second) and sum(a != b for a, b in zip(first, second)) == 1


@pytest.mark.parametrize("world", [TINY, RICH], ids=["tiny", "rich"])
def test_a_replaced_relation_is_false_of_the_first_picture_and_the_old_one_of_the_second(world):
    for foil in many(world, "replace-relation"):
        (old,), (new,) = foil.scene_0.relations, foil.scene_1.relations
        assert old.name != new.name and (old.subject, old.object) == (new.subject, new.object)
        assert [(item.name, item.color) for item in foil.scene_0.items] == [(item.name, item.color) for item in foil.scene_1.items]
        assert not relation_holds(foil.scene_0.items[new.subject], foil.scene_0.items[new.object], new.name)
        assert not relation_holds(foil.scene_1.items[old.subject], foil.scene_1.items[old.object], old.name)


@pytest.mark.parametrize("world", [RICH, CLUTTERED], ids=["rich", "cluttered"])
@pytest.mark.parametrize("kind", PARALLEL)
def test_clutter_and_background_do_not_give_a_picture_away(world, kind):
    made = many(world, kind, 15)
    for foil in made:
        clutter = [sorted((item.name, round(item.scale, 9)) for item in scene.clutter) for scene in (foil.scene_0, foil.scene_1)]
        assert clutter[0] == clutter[1]
        assert (foil.scene_0.background, foil.scene_0.style) == (foil.scene_1.background, foil.scene_1.style)
    if kind != "add-object": assert any(foil.scene_0.clutter for foil in made)


def test_a_shuffle_that_can_be_drawn_does_not_give_itself_away(monkeypatch):
    monkeypatch.setattr(foils, "shuffled", lambda caption, draw: "a red star left of a blue heart")
    world = dataclasses.replace(CLUTTERED, background=("white", "sky", "mint"), styles=("flat", "inked"))
    for foil in many(world, "shuffle", 8):
        assert foil.complete and foil.scene_0.clutter == foil.scene_1.clutter == ()
        assert (foil.scene_0.background, foil.scene_0.style) == (foil.scene_1.background, foil.scene_1.style)


@pytest.mark.parametrize("kind", PARALLEL)
def test_foils_of_a_test_split_start_from_what_is_held_out(kind):
    world = World(held_out=("red circle", "star above heart"), split="test")
    for foil in many(world, kind, 10): assert any(holds(foil.scene_0, parse(told)) for told in world.held_out)


def test_public_names_are_explained_and_meet_no_others():
    import vugen.data.scenes as scenes
    assert not set(foils.__all__) & set(scenes.__all__) - {"ATTEMPTS"}
    assert all(getattr(foils, name).__doc__ for name in foils.__all__ if callable(getattr(foils, name)))


@pytest.mark.parametrize("kind", ["swap-attribute", "swap-object", "replace-object", "replace-attribute", "add-attribute"])
def test_places_and_widths_are_shared(kind):
    for foil in many(TINY, kind):
        assert [(item.x, item.y, item.scale, item.size) for item in foil.scene_0.items] == [(item.x, item.y, item.scale, item.size) for item in foil.scene_1.items]
        assert foil.scene_0.background == foil.scene_1.background


def test_a_turned_relation_keeps_the_widths():
    for foil in many(TINY, "replace-relation"):
        assert [item.scale for item in foil.scene_0.items] == pytest.approx([item.scale for item in foil.scene_1.items])


@pytest.mark.parametrize("world", [TINY, RICH], ids=["tiny", "rich"])
def test_additions_only_add(world):
    for foil in many(world, "add-object", 12):
        assert foil.scene_1.items[:-1] == foil.scene_0.items and foil.caption_1.replace(",", "").startswith(foil.caption_0.split(" and ")[0].split(",")[0])
    for foil in many(world, "add-attribute", 40):
        left, right = words(foil.caption_0), words(foil.caption_1)
        extra = {word for word in right if right.count(word) > left.count(word)}
        assert len(right) == len(left) + 1 and len(extra) == 1


def test_shuffles_keep_the_words_and_lose_the_meaning():
    for foil in many(TINY, "shuffle", 40):
        assert sorted(foil.caption_0.split()) == sorted(foil.caption_1.split()) and parse(foil.caption_0) == facts(foil.scene_0) != meaning(foil.caption_1)
        assert foil.complete == (foil.scene_1 is not None) and (foil.complete <= (meaning(foil.caption_1) is not None))


@pytest.mark.parametrize("kind", FOIL_KINDS)
def test_a_foil_is_a_pure_function_of_seed_and_index(kind):
    assert make_foil(TINY, kind, 3, 8) == make_foil(TINY, kind, 3, 8)
    assert make_foil(TINY, kind, 3, 8) != make_foil(TINY, kind, 4, 8) and make_foil(TINY, kind, 3, 8) != make_foil(TINY, kind, 3, 9)


def test_batches_agree_with_single_foils():
    batch = foil_batch(TINY, "replace-object", 0, [4, 9])
    assert torch.equal(foil_batch(TINY, "replace-object", 0, [9])["images_1"][0], batch["images_1"][1])
    assert batch["images_0"].dtype == torch.float32 and batch["images_0"].shape == (2, 3, 32, 32) and batch["complete"].all()
    shuffles = foil_batch(TINY, "shuffle", 0, range(6))
    assert (shuffles["images_1"][~shuffles["complete"]] == 1).all()


@pytest.mark.parametrize("world,kind,words", [
    (World(counts={1: 1.0}), "swap-attribute", "needs scenes"), (World(counts={1: 1.0}), "replace-relation", "needs scenes"), (World(relations=()), "swap-object", "relations"),
    (World(relations=("above",)), "replace-relation", "relations"), (TINY, "swap-verb", "no foil of the kind"),
    (World(colors=("red",)), "swap-attribute", "allows no swap-attribute"), (World(shapes=("star",)), "replace-object", "allows no replace-object"),
    (World(shapes=(), emoji=("dog", "cat", "car")), "replace-attribute", "allows no replace-attribute")])
def test_worlds_that_do_not_allow_a_kind_say_so(world, kind, words):
    with pytest.raises(UserError, match=words): make_foil(world, kind, 0, 0)


def test_singles_allow_the_kinds_that_need_no_relation():
    singles = dataclasses.replace(TINY, counts={1: 1.0})
    for kind in ("replace-object", "replace-attribute", "add-object", "add-attribute", "shuffle"):
        foil = make_foil(singles, kind, 0, 0)
        assert len(foil.scene_0.items) == 1 and foil.caption_0 != foil.caption_1
    assert len(make_foil(singles, "add-object", 0, 0).scene_1.items) == 2


CAPTIONS = ["a red circle left of a blue square", "There is an orange star above a heart.", "two red circles and a green cross", "a dog inside a ring", "a fire engine to the right of a blue star",
            "below the black cross is the pink heart", "a picture of a large striped red circle bigger than a small blue circle", "a red circle", "a dog and a cat"]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_foils_of_typed_captions_mean_something_else(caption):
    found = caption_foils(caption)
    assert {"replace-object", "add-object", "add-attribute", "shuffle"} <= set(found)
    for kind, text in found.items():
        assert meaning(text) != parse(caption)
        if kind != "shuffle": assert meaning(text) is not None
        if kind in SWAPS + ("shuffle",): assert words(text) == words(caption.lower().rstrip("."))
    assert found == caption_foils(caption)


def test_typed_replacements_stay_in_the_world_and_relations_turn():
    small = World(shapes=("circle", "square", "star"), colors=("red", "blue", "green"))
    found = caption_foils("a red circle left of a blue square", small)
    assert found["replace-relation"] == "a red circle right of a blue square" and "green" in found["replace-attribute"] and "star" in found["replace-object"]
    for name, converse in CONVERSE.items():
        caption = f"a red circle {name} a blue square"
        told = parse(caption_foils(caption)["replace-relation"])
        assert told != parse(caption) and (converse is None or told == parse(f"a red circle {converse} a blue square"))


@pytest.mark.parametrize("caption", ["", "a zebra-striped quux", "a " * 5000])
def test_captions_outside_the_grammar_are_refused(caption):
    with pytest.raises(UserError): caption_foils(caption)


def test_attempts_of_neighbours_do_not_meet():
    assert ATTEMPTS > 1 and len({make_foil(TINY, "replace-object", 0, index).scene_0 for index in range(60)}) == 60
