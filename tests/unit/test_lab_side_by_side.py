"Encoders asked on many scenes, against scorers whose answers are known; the embedded latent spaces narrowed."
import pytest
import torch

from vugen.data.scenes import World, batch
from vugen.encode.reducers import MLPReducer, RunningMoments, narrowed, principal_components
from vugen.errors import UserError
from vugen.lab.side_by_side import QUESTIONS, compare, comparison_table, confuses, measured_narrowing, question_suite, ratios, said_of, token_share
from vugen.lab.workbench import Workbench
from vugen.understand.scorers import BagOfWordsScorer, PerfectScorer, RandomScorer

WORLD = World()


def test_ratios_halve_down_to_one_number():
    assert ratios(MLPReducer(128, 8)) == {16: 8, 32: 4, 64: 2, 128: 1} and ratios(MLPReducer(24, 6)) == {4: 6, 8: 3, 24: 1}


def test_narrowing_keeps_more_of_the_tokens_than_the_loudest_latents_do():
    bench = Workbench()
    model, scenes = bench.autoencoders["learned"], batch(bench.parts.world, 3, range(32))["images"]
    latents, way = model.encode(scenes), measured_narrowing(model, bench.parts.world, 128)
    loudest = principal_components(RunningMoments(model.reducer.dim).update(latents).covariance(), model.reducer.dim)[1].float()
    for kept in (2, 4): assert token_share(model, scenes, narrowed(latents, way, kept)) > token_share(model, scenes, latents @ loudest[:kept].T @ loudest[:kept]) + 0.005


@pytest.mark.parametrize("question", QUESTIONS)
def test_who_knows_the_scene_answers_every_question_and_who_counts_words_none_of_order(question):
    suite = question_suite(question, WORLD, 40)
    images = suite.pictures(range(40))
    perfect = PerfectScorer(images.flatten(0, 1), [scene for pair in suite.scenes for scene in pair])
    words = BagOfWordsScorer(["a red circle left of a blue square"])
    *_, rows = compare({"perfect": perfect, "words": words}, [question], WORLD, 40)
    known = {row["scorer"]: row for row in rows}
    assert known["perfect"]["value"] == 1 and not confuses(known["perfect"]) and known["perfect"]["n"] == 40
    if QUESTIONS[question][0].startswith("swap"): assert known["words"]["value"] == 0, "the same words tie, and a tie is no answer"
    assert known["words"]["control"] and not known["perfect"]["control"] and "perfect" in comparison_table(rows)
    assert ("words" in said_of(question, rows)) is not confuses(known["words"]), "a control is named where it answers, and only there"


def row(scorer, low, control=False): return {"question": "Left or right?", "scorer": scorer, "low": low, "value": low + 0.1, "high": low + 0.2, "chance": 0.5, "n": 40, "control": control}


@pytest.mark.parametrize("rows, wanted", [
    ([row("a", 0.4), row("b", 0.6), row("blind", 0.4, True)], "Left or right? Not told from guessing: a; answered by b."),
    ([row("a", 0.4), row("c", 0.3)], "Left or right? Not told from guessing: a and c."),
    ([row("b", 0.6), row("blind", 0.7, True)], "Left or right? Answered by b. Answered without the picture by blind: the captions alone give it away."),
    ([row("blind", 0.4, True)], "Left or right? Only controls were asked."),
])
def test_what_is_said_of_a_question(rows, wanted): assert said_of("Left or right?", rows) == wanted


def test_controls_are_marked_and_have_no_colour():
    page = comparison_table([row("a", 0.4), row("b", 0.6), row("blind", 0.4, True)])
    assert page.count('class="wrong"') == 1 and page.count('class="right"') == 1 and page.count("control: blind to the picture") == 1
    *_, rows = compare({"random": RandomScorer(0)}, ["Left or right?"], WORLD, 10)
    assert rows[0]["control"]


def test_questions_about_places_keep_to_them():
    for question, words in (("Left or right?", {"left", "right"}), ("Above or below?", {"above", "below"})):
        for item in question_suite(question, WORLD, 30).items:
            first, second = ({word for word in caption.split()} & {"left", "right", "above", "below"} for caption in item.captions)
            assert first <= words and second <= words and item.captions[0] != item.captions[1]


def test_another_seed_asks_other_scenes_and_the_same_seed_the_same():
    one, same, other = (question_suite("Left or right?", WORLD, 20, seed) for seed in (0, 0, 1))
    assert torch.equal(one.pictures([3, 4]), same.pictures([3, 4])) and not torch.equal(one.pictures([3, 4]), other.pictures([3, 4]))
    with pytest.raises(UserError, match="choose among"): question_suite("why?", WORLD)
