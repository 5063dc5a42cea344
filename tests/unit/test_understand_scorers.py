"Scorers: seams, captions they refuse, the same numbers by every way, loading from folders."
import json

import pytest
import torch

from vugen.data.scenes import World, batch, caption_of, facts
from vugen.errors import UserError
from vugen.models.seams import Scorer
from vugen.understand.scorers import (SCORERS, BagOfWordsScorer, CaptionLikelihoodScorer, CaptionOnlyScorer, ContrastiveScorer, Parts, PerfectScorer, RandomScorer, WordSpotter,
                                      load_scorers, score_items, scorer_names, select_prompts, word_shuffled, world_of)

WORLD = World()


@pytest.fixture(scope="module")
def samples(): return batch(WORLD, 5, range(6))


@pytest.fixture(scope="module")
def contrastive():
    from vugen.encode.contrastive import ContrastiveModel
    from vugen.generate.vlm import world_words
    torch.manual_seed(0)
    return ContrastiveModel(world_words(WORLD), hidden_size=32, num_layers=1, text_hidden_size=32, text_layers=1, projection_dim=16).eval()


@pytest.fixture(scope="module")
def vlm(contrastive):
    from vugen.generate.vlm import SceneVLM, world_words
    torch.manual_seed(1)
    return SceneVLM(world_words(WORLD), vision_hidden_size=32, vision_grid=(8, 8), hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64).attach(contrastive.vision).eval()


@pytest.fixture(scope="module")
def scorers(contrastive, vlm, samples):
    return [ContrastiveScorer(contrastive), CaptionLikelihoodScorer(vlm), CaptionLikelihoodScorer(vlm, "likelihood-pmi", prior=1.), CaptionOnlyScorer(vlm), BagOfWordsScorer(samples["captions"]),
            PerfectScorer(samples["images"], samples["scenes"]), WordSpotter(samples["images"], samples["scenes"])]


def test_matrix_pairs_and_items_agree(scorers, samples):
    images, captions = samples["images"], samples["captions"]
    for scorer in [*scorers, *map(word_shuffled, scorers)]:
        matrix = scorer.score(images, captions)
        assert isinstance(scorer, Scorer) and matrix.shape == (6, 6)
        assert torch.allclose(scorer.score_pairs(images, captions), matrix.diag(), atol=1e-4), scorer.name
        items = score_items(scorer, images.view(3, 2, 3, 32, 32), [captions[:2], captions[2:4], captions[4:]])
        assert all(torch.allclose(items[item], matrix[2 * item:2 * item + 2, 2 * item:2 * item + 2], atol=1e-4) for item in range(3)), scorer.name


def test_captions_are_scored_by_place_not_by_kind(scorers, samples):
    "Repeated captions and another order change nothing"
    order = [3, 1, 1, 0]
    for scorer in scorers:
        whole = scorer.score(samples["images"], samples["captions"])
        assert torch.allclose(scorer.score(samples["images"], [samples["captions"][place] for place in order]), whole[:, order], atol=1e-4), scorer.name


def test_contrastive_is_the_models_cosine(contrastive, samples):
    matrix = ContrastiveScorer(contrastive).score(samples["images"], samples["captions"])
    assert torch.allclose(matrix, contrastive.score(samples["images"], samples["captions"]), atol=1e-6) and matrix.abs().max() <= 1 + 1e-6
    assert torch.allclose(ContrastiveScorer(contrastive, temperature=.1).score(samples["images"], samples["captions"]), 10 * matrix, atol=1e-5)


def test_likelihood_minus_prior(vlm, samples):
    images, captions = samples["images"], samples["captions"]
    plain, information = (CaptionLikelihoodScorer(vlm, prior=prior).score(images, captions) for prior in (0., 1.))
    assert torch.allclose(plain - information, vlm.caption_log_likelihood(None, captions).expand(6, -1), atol=1e-4) and (plain < 0).all()
    assert torch.equal(CaptionOnlyScorer(vlm).score(images, captions)[0], CaptionOnlyScorer(vlm).score(1 - images, captions)[5])


def test_bag_of_words_by_hand():
    bag = BagOfWordsScorer(["a red circle", "a circle"])
    # a: 2 of 5 words, circle: 2, red: 1; one added to each of three
    assert bag.score_pairs(None, ["a red circle"])[0].exp().item() == pytest.approx(3 / 8 * 2 / 8 * 3 / 8)


def test_bag_of_words_ties_exactly_on_every_order():
    import itertools
    bag = BagOfWordsScorer(["the red circle is left of a blue square and above a green star"])
    words = "the red circle is left of a blue".split()
    scores = {bag.score_pairs(None, [" ".join(order)]).item() for order in itertools.islice(itertools.permutations(words), 0, 40320, 97)}
    assert len(scores) == 1


@pytest.mark.parametrize("caption, words", [("a zebra", "zebra"), ("   ", "empty"), ("a <image>", "special")])
def test_unreadable_captions_name_scorer_and_word(scorers, samples, caption, words):
    for scorer in scorers[:4 if caption == "a zebra" else 5]:  # the bag of words counts a new word as seen zero times
        for call in (lambda: scorer.score(samples["images"][:1], ["a red circle", caption]), lambda: scorer.score_pairs(samples["images"][:1], [caption])):
            with pytest.raises(UserError) as caught: call()
            assert scorer.name in str(caught.value) and words in str(caught.value)


def test_endless_caption_is_refused(scorers, samples):
    for scorer in scorers[:4]:
        with pytest.raises(UserError, match=scorer.name): scorer.score(samples["images"][:1], ["red " * 2500])


def test_perfect_scorer_on_false_and_partial_captions(samples):
    perfect = PerfectScorer(samples["images"], samples["scenes"])
    for index, scene in enumerate(samples["scenes"]):
        image = samples["images"][[index]]
        assert perfect.score_pairs(image, [caption_of(facts(scene))]).item() == 1
        partial = f"a {scene.items[0].name}"
        assert 0 < perfect.score_pairs(image, [partial.replace("a o", "an o")]).item() < 1
        assert perfect.score_pairs(image, ["circle a of red left"]).item() == 0


def test_random_scorer_repeats_with_its_seed(samples):
    first, second, other = (RandomScorer(seed).score(samples["images"], samples["captions"]) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_prompt_caches_are_computed_once_for_each_prompt():
    class Generator:
        asked = []
        class Cache(list):
            def select(self, rows): return type(self)(self[row] for row in rows.tolist())
        def prompt_cache(self, prompts):
            self.asked.append(list(prompts))
            return self.Cache(prompts)
    generator = Generator()
    assert select_prompts(generator, ["b", "a", "b"]) == ["b", "a", "b"] and select_prompts(generator, ["x", "y"]) == ["x", "y"]
    assert generator.asked == [["b", "a"], ["x", "y"]]


def saved(root, contrastive, vlm):
    contrastive.save_pretrained(root / "contrastive")
    vlm.save_pretrained(root / "vlm")
    (root / "contrastive" / "run.json").write_text(json.dumps({"world": json.loads(json.dumps(WORLD.asdict()))}))
    return root


def test_scorers_from_a_folder(tmp_path, contrastive, vlm, samples):
    root = saved(tmp_path, contrastive, vlm)
    assert world_of(root) == WORLD
    loaded = load_scorers(root, "all")
    assert list(loaded) == ["contrastive", "likelihood", "likelihood-pmi", "caption-only", "bag-of-words"]  # neither generator nor lit was trained
    assert torch.allclose(loaded["contrastive"].score(samples["images"], samples["captions"]), contrastive.score(samples["images"], samples["captions"]), atol=1e-5)
    assert torch.allclose(loaded["likelihood"].score(samples["images"], samples["captions"]), vlm.caption_log_likelihood(samples["images"], samples["captions"]), atol=1e-4)
    assert loaded["likelihood"].vlm is loaded["caption-only"].vlm and loaded["likelihood"].vlm.vision is loaded["contrastive"].model.vision
    assert isinstance(loaded["bag-of-words"].score(samples["images"], samples["captions"]), torch.Tensor)


def test_scorers_are_put_on_the_device_that_is_asked_for(tmp_path, contrastive, vlm):
    loaded = load_scorers(saved(tmp_path, contrastive, vlm), "all", torch.device("meta"))
    assert {part.device.type for name in ("contrastive", "likelihood") for part in getattr(loaded[name], {"contrastive": "model"}.get(name, "vlm")).parameters()} == {"meta"}


def test_missing_parts_are_named(tmp_path, contrastive, vlm):
    root = saved(tmp_path, contrastive, vlm)
    with pytest.raises(UserError, match="generator"): load_scorers(root, "denoising")
    with pytest.raises(UserError, match="nowhere"): load_scorers(tmp_path / "nowhere")
    with pytest.raises(UserError, match="'clip'"): scorer_names("contrastive,clip")
    (root / "contrastive" / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json"): Parts(root).world


def test_a_truncated_checkpoint_is_named(tmp_path, contrastive, vlm):
    root = saved(tmp_path, contrastive, vlm)
    weights = root / "contrastive" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated"): load_scorers(root, "contrastive")


def test_registry_is_what_the_command_line_promises():
    assert {"contrastive", "likelihood", "denoising", "caption-only", "bag-of-words"} <= set(SCORERS) and scorer_names("all") == list(SCORERS)
