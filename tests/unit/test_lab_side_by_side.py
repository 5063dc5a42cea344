"Encoders asked on many scenes, latents narrowed: against scikit-learn, and against scorers whose answers are known."
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from vugen.data.scenes import World
from vugen.encode.reducers import MLPReducer
from vugen.errors import UserError
from vugen.lab.side_by_side import QUESTIONS, compare, comparison_table, confuses, directions, narrow, question_suite, ratios, said_of
from vugen.understand.scorers import BagOfWordsScorer, PerfectScorer

WORLD = World()


class Encoded:
    "A model of which only the latents matter: whitened, correlated."
    def __init__(self, dim=6):
        mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1))
        self.reducer, self.mix = MLPReducer(24, dim), mix

    def encode(self, images):
        raw = torch.randn(len(images), 16, len(self.mix), generator=torch.Generator().manual_seed(2)) @ self.mix
        return (raw - raw.mean((0, 1))) / raw.flatten(0, 1).std(0)


@pytest.mark.parametrize("kept", [1, 2, 5, 6])
def test_narrowed_latents_are_those_of_scikit_learn(kept):
    model = Encoded()
    latents = model.encode(torch.zeros(64, 3, 8, 8))
    basis = directions(model, WORLD, 64)
    known = PCA(kept).fit(latents.flatten(0, 1).double().numpy())
    wanted = known.inverse_transform(known.transform(latents.flatten(0, 1).double().numpy()))
    np.testing.assert_allclose(narrow(latents, basis, kept).flatten(0, 1).numpy(), wanted, atol=1e-4)


def test_ratios_halve_down_to_one_number():
    assert ratios(MLPReducer(128, 8)) == {16: 8, 32: 4, 64: 2, 128: 1} and ratios(MLPReducer(24, 6)) == {4: 6, 8: 3, 24: 1}
    for kept in (0, 7):
        with pytest.raises(UserError, match="cannot be kept"): narrow(torch.zeros(1, 1, 6), torch.eye(6), kept)


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
    assert "words" in said_of(question, rows) and "perfect" in comparison_table(rows)


def test_questions_about_places_keep_to_them():
    for question, words in (("Left or right?", {"left", "right"}), ("Above or below?", {"above", "below"})):
        for item in question_suite(question, WORLD, 30).items:
            first, second = ({word for word in caption.split()} & {"left", "right", "above", "below"} for caption in item.captions)
            assert first <= words and second <= words and item.captions[0] != item.captions[1]


def test_another_seed_asks_other_scenes_and_the_same_seed_the_same():
    one, same, other = (question_suite("Left or right?", WORLD, 20, seed) for seed in (0, 0, 1))
    assert torch.equal(one.pictures([3, 4]), same.pictures([3, 4])) and not torch.equal(one.pictures([3, 4]), other.pictures([3, 4]))
    with pytest.raises(UserError, match="choose among"): question_suite("why?", WORLD)
