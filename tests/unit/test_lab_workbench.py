"The verdict's marks and the foils of a typed caption, against the facts of what was drawn."
import re

import numpy as np
import pytest
from PIL import Image

from vugen.data.foils import FOIL_KINDS, caption_foils
from vugen.data.scenes import World, caption_of, facts, holds, parse, sample_scene, scene_from_caption
from vugen.errors import UserError
from vugen.lab.playground_fields import LARGEST_SEED, checked_captions, number_between, scene_of, seed_of
from vugen.lab.playground_gallery import Result
from vugen.lab.playground_tabs import kept_words, on_draw, reading_note, shown_again, undrawn
from vugen.lab.workbench import KINDS, Verdict, Workbench, beyond, draw_caption, folded, listed, starters, true_of, verdict_table, with_foils

VERDICT = Verdict(("a dog", "a cat", "a cow"), ("caption", "", ""), {"first": (2.0, 1.0, 0.0), "second": (0.0, 1.0, 0.5), "even": (1.0, 1.0, 0.0)}, {})


def marks(page): return re.findall(r"best (.)", page)


@pytest.mark.parametrize("truth, wanted", [(0, ["✓", "✗"]), (1, ["✗", "✓"]), (2, ["✗", "✗"]), (None, ["•", "•"])])
def test_a_choice_is_marked_by_what_is_known(truth, wanted):
    page = verdict_table(VERDICT, truth)
    assert sorted(marks(page)) == sorted(wanted) and page.count(">tie<") == 2
    assert page.count('class="right"') == wanted.count("✓") and page.count('class="wrong"') == wanted.count("✗")


def test_without_a_truth_neither_table_nor_legend_speaks_of_right():
    page = verdict_table(VERDICT, None)
    assert not set("✓✗") & set(page) and page.count('class="chosen"') == 2


@pytest.mark.parametrize("caption", ["a dog left of a tree", "a circle above a square", "a red circle left of a blue square"])
def test_no_attribute_is_added_that_the_models_may_never_have_read(caption):
    for scene in (None, *(scene_from_caption(caption, seed=seed) for seed in range(6))):
        captions, kinds = with_foils(caption, scene)
        assert "add-attribute" in caption_foils(caption) and "add-attribute" not in kinds and len(captions) > 4
        assert not {"striped", "outlined", "solid", "small", "large"} & set(" ".join(captions).split())


def told_scenes():
    "Drawn scenes with a caption that names all their things, with and without colours."
    for index in range(80):
        scene = sample_scene(World(), 5, index)
        for attributes in ((), ("color",)):
            try: yield scene, caption_of(facts(scene, attributes))
            except UserError: continue


def test_foils_made_without_a_scene_are_false_of_the_picture():
    shown = 0
    for scene, caption in told_scenes():
        for foil in with_foils(caption)[0][1:]:
            try: assert not holds(scene, parse(foil)), (caption, foil)
            except UserError: continue
            shown += 1
    assert shown > 300


def test_every_other_foil_is_kept_and_none_is_true_of_its_scene():
    shown = 0
    for scene, caption in told_scenes():
        made, (captions, _) = caption_foils(caption), with_foils(caption, scene)
        assert {made[kind] for kind in set(made) - {"add-attribute"}} == set(captions[1:]) and len(set(captions)) == len(captions)
        assert not any(true_of(scene, foil) for foil in captions[1:])
        shown += len(captions) - 1
    assert shown > 300


def test_two_edits_that_write_the_same_are_one_foil():
    captions, kinds = with_foils("a green star above a pink star")
    assert captions.count("a pink star above a green star") == 1 and "swap-object" not in kinds


@pytest.mark.parametrize("gap, text", [(0.004, "-0.004"), (0.25, "-0.25"), (172.266, "-172.27")])
def test_small_margins_keep_a_digit_that_differs(gap, text):
    assert f">{text}<" in verdict_table(Verdict(("a dog", "a cat"), ("", ""), {"first": (1.0, 1.0 - gap)}), 0)


def test_nobody_knows_the_truth_of_a_photograph_or_of_free_words():
    assert true_of(None, "a dog") is None and true_of(scene_from_caption("a dog"), "somebody crossing a street") is None


def test_a_scene_is_known_by_its_pixels_alone():
    picture, drawn, *_ = on_draw("a red circle left of a blue square", 3)
    scene = scene_from_caption(drawn["caption"], seed=drawn["seed"])
    assert np.array_equal(np.asarray(picture), np.asarray(draw_caption("a red circle left of a blue square", 3)))
    assert scene_of(picture, scene) is scene and scene_of(picture.convert("RGBA"), scene) is scene
    touched = picture.copy()
    touched.putpixel((0, 0), (1, 2, 3))
    assert scene_of(touched, scene) is None and scene_of(picture.resize((64, 64)), scene) is None and scene_of(Image.new("RGB", picture.size), None) is None


def test_what_the_scene_contradicts_is_refused_in_a_sentence():
    scene = scene_from_caption("a red circle left of a blue square")
    with pytest.raises(UserError, match="does not show 'a blue circle'"): checked_captions(scene, ["a blue circle", "a dog"])
    with pytest.raises(UserError, match="'a blue square' is true of this picture as well"): checked_captions(scene, ["a red circle left of a blue square", "a blue square"])
    for known, captions in ((scene, ["a red circle", "a dog", "free words"]), (scene, ["free words", "a dog"]), (None, ["a blue circle", "a blue square"])):
        assert checked_captions(known, captions) == captions


def test_starters_carry_the_scene_they_show():
    drawn = [starter for starter in starters() if starter.scene]
    assert len(drawn) == 3
    for starter in drawn:
        assert scene_of(starter.picture, starter.scene) is starter.scene
        assert [true_of(starter.scene, caption) for caption in starter.captions] == [True, False, False]


def unread(*names, word="cat"): return {name: f"scorer {name!r} cannot read a caption: the word {word!r} is not known" for name in names}


def test_the_same_refusal_of_several_scorers_is_one_sentence():
    assert folded(unread("a", "b", "c")) == [("a, b and c", " cannot read a caption: the word 'cat' is not known.")]
    assert [names for names, _ in folded({**unread("a"), "d": "is broken", **unread("b"), **unread("e", word="dog")})] == ["a and b", "d", "e"]
    assert listed(["a"]) == "a" and listed(["a", "b"]) == "a and b" and folded({}) == []
    page = verdict_table(Verdict(VERDICT.captions, VERDICT.kinds, VERDICT.scores, unread("x", "y")))
    assert page.count("cannot read a caption") == 1 and "<b>x and y</b>" in page


def test_without_scores_there_is_no_table_but_the_reason():
    page = verdict_table(Verdict(VERDICT.captions, VERDICT.kinds, {}, unread("x")), None)
    assert "<table" not in page and "No scorer" in page and "cannot read" in page


def test_kinds_of_foils_are_words_and_columns_have_units():
    assert set(FOIL_KINDS) <= set(KINDS) and len(set(KINDS.values())) == len(KINDS) and not any("-" in word for word in KINDS.values())
    page = verdict_table(Verdict(("a", "b"), ("caption", "swap-attribute"), {"x": (1.0, 0.0)}, {}))
    assert "attributes exchanged" in page and "swap-attribute" not in page and "unit of its own" in page


@pytest.mark.parametrize("wrong", [1e12, -1, LARGEST_SEED + 1])
def test_a_bound_is_written_in_plain_figures(wrong):
    with pytest.raises(UserError, match="give a number from 0 to 2147483647[.]"): seed_of(wrong)
    with pytest.raises(UserError, match="from 0.1 to 20[.]"): number_between(99, "guidance", 0.1, 20)


@pytest.mark.parametrize("caption, word", [("a red circle left of a blue square", None), ("", None), ("a cat looking into the camera", "looking"), ("a dog left of a tree", "dog"), ("<b>", "&lt;b&gt;")])
def test_what_the_generator_cannot_draw_is_said_before(caption, word):
    bench = Workbench()
    note = reading_note(bench, caption)
    assert (undrawn(bench, caption) == "") == (word is None)
    if word is None: assert note == ""
    else: assert word in note and "generator cannot draw" in note and "<b>lit</b>" in note and "Reconstruct" not in reading_note(bench, caption, only_drawn=True)


@pytest.mark.parametrize("caption, unseen", [("three red stars", "“three stars”"), ("a yellow heart inside a black square", "“inside”"), ("a small blue square right of a large red circle", "“large” and “small”"), ("a red circle surrounding a striped star", "“striped” and “inside”")])
def test_what_no_training_showed_is_called_a_guess_and_may_be_drawn(caption, unseen):
    bench = Workbench()
    assert not undrawn(bench, caption) and all(f"without {unseen}:" in note and "a guess" in note for note in (reading_note(bench, caption), reading_note(bench, caption, only_drawn=True)))


def test_what_a_world_shows():
    told = parse("a red striped circle above three small dogs")
    assert beyond(told, World()) == ["dog", "striped", "small", "three dogs"]
    assert beyond(told, World(emoji=("dog",), fills=("solid", "striped"), attributes_per_object=3, counted=.5, counts={4: 1.})) == []
    assert beyond(parse("a red circle, a blue star and a green heart"), World()) == ["3 things"] and beyond(parse("a gray circle below a star"), World()) == ["gray"]


@pytest.mark.parametrize("numbers", [None, [], {}, 3, "x", [{"latents": "PCA"}], {"captions": ["a"], "kinds": [], "scores": {"x": [1]}, "notes": []}, {"as_asked": [True]}])
@pytest.mark.parametrize("tab", ["Bind", "Reconstruct", "Generate", "Classify"])
def test_a_record_that_tells_too_little_shows_nothing(tab, numbers):
    found = shown_again(Workbench(), Result(tab, "", {}, numbers, {}, None, None, ()))
    assert all("<script" not in str(each) for each in found.values()) and set(found) <= {"on_bind", "on_compare", "on_classify"}


def test_a_past_answer_is_text_and_never_markup():
    evil = "<img src=x onerror=alert(1)>"
    rows = [{"latents": evil, "numbers_a_patch": 4, "psnr": 3.0, "token_share": .5, "caption_read": None}] * 2
    plain = {"captions": [evil, "b"], "kinds": [evil, ""], "scores": {evil: [1.0, 2.0]}, "notes": {evil: evil}}
    shown = [*shown_again(Workbench(), Result("Classify", "", {}, plain, {}))["on_classify"], kept_words(rows, evil, evil)]
    assert all("<img" not in each and "&lt;img" in each for each in shown)
