"Shares of a score: closed forms, completeness, Captum's own delta, and rollout written out with transformers' eager attention."
import pytest
import torch
from torch import nn
from torch.nn import functional

from vugen.errors import UserError
from vugen.understand.attributions import DifferentiablePair, attention_rollout, differentiable, embedded, integrated_gradients, plot_attribution, rollout
from vugen.understand.pretrained import TransformersContrastive, save_pair_miniature
from vugen.understand.scorers import BagOfWordsScorer, ContrastiveScorer, LiTScorer, Parts

PARTS = Parts()
IMAGE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
CAPTION = "a red circle left of a blue square"


def scorers(tmp_path):
    yield "contrastive", ContrastiveScorer(PARTS.contrastive, temperature=.5)
    yield "model itself", PARTS.contrastive
    for family in ("clip", "siglip", "siglip2"): yield family, TransformersContrastive.from_pretrained(save_pair_miniature(family, tmp_path / family), name=family)


def whole(found): return found.image.sum() + found.values.sum()


def test_shares_are_complete_for_every_pair(tmp_path):
    for name, scorer in scorers(tmp_path):
        pair = differentiable(scorer, IMAGE, CAPTION, blank="gray")
        with torch.no_grad(): score = pair(pair.pixels, pair.embeddings)
        assert torch.allclose(score.double(), scorer.score(IMAGE[None], [CAPTION])[0].double(), atol=1e-4), name
        found = integrated_gradients(pair, num_steps=48)
        gained = found.score - found.baseline
        assert abs(whole(found) - gained) < .02 * abs(gained) + 1e-3 and abs(whole(found) - gained - found.delta) < 1e-3 and abs(found.delta) < .02 * abs(gained) + 1e-3, name
        assert len(found.values) == len(found.words) == len(pair.content) and (found.values[~pair.content] == 0).all()
        followed = attention_rollout(pair)
        assert followed.image.shape == pair.grid and (followed.image >= 0).all() and followed.image.sum() > 0 and (followed.values >= 0).all() and abs(followed.score - found.score) < 1e-3, name


def test_the_lit_pair_has_shares_and_no_rollout():
    scorer = LiTScorer(PARTS.lit)
    pair = differentiable(scorer, IMAGE, "a red ball")
    rough, found = integrated_gradients(pair, num_steps=8, max_steps=8), integrated_gradients(pair, num_steps=32, max_steps=128)
    assert torch.allclose(pair(pair.pixels, pair.embeddings), scorer.score(IMAGE[None], ["a red ball"])[0], atol=1e-5) and [word for word, _ in found.by_word()] == ["a", "red", "ball"]
    for each in (rough, found): assert abs(whole(each) - (each.score - each.baseline) - each.delta) < 1e-3  # what is lacking is told
    assert abs(found.delta) < abs(rough.delta) and abs(found.delta) < 1e-3 * found.image.abs().sum()
    with pytest.raises(UserError, match="no attention"): attention_rollout(pair)


def test_a_linear_score_is_shared_out_by_weight_times_difference():
    weight, other = torch.randn(3, 4, 4), torch.randn(3, 5)
    pair = DifferentiablePair(nn.Identity(), lambda pixels, embeddings: (pixels * weight).sum((1, 2, 3)) + (embeddings * other).sum((1, 2)), torch.rand(1, 3, 4, 4), torch.randn(1, 3, 5), ["<bos>", "a", "b"], [False, True, True], torch.ones(1, 3, 4, 4), torch.full((5,), .3), torch.rand(3, 4, 4))
    found = integrated_gradients(pair, num_steps=2)
    assert torch.allclose(found.image, ((pair.pixels[0] - 1) * weight).sum(0), atol=1e-5)
    assert torch.allclose(found.values, ((pair.embeddings[0] - .3) * other).sum(1) * torch.tensor([0., 1, 1]), atol=1e-5) and [word for word, _ in found.by_word()] == ["a", "b"]
    assert abs(whole(found) - (found.score - found.baseline)) < 1e-4


def test_a_product_is_shared_by_its_known_integral():
    "s = x y along the straight way from (0, 0): each gets half."
    pair = DifferentiablePair(nn.Identity(), lambda pixels, embeddings: pixels.flatten(1).sum(1) * embeddings.flatten(1).sum(1), torch.full((1, 3, 1, 1), 2.), torch.full((1, 1, 1), 5.), ["a"], [True], torch.zeros(1, 3, 1, 1), torch.zeros(1), torch.zeros(3, 1, 1))
    found = integrated_gradients(pair, num_steps=8)
    assert torch.isclose(found.image.sum(), torch.tensor(15.), atol=1e-4) and torch.isclose(found.values.sum(), torch.tensor(15.), atol=1e-4) and found.score == 30


def test_rollout_of_clip_is_the_one_written_out(tmp_path):
    scorer = TransformersContrastive.from_pretrained(save_pair_miniature("clip", tmp_path), name="clip")
    pair = differentiable(scorer, IMAGE, CAPTION)
    found = attention_rollout(pair)
    model = scorer.model
    model.set_attn_implementation("eager")
    inputs = scorer.text_inputs([CAPTION])
    pixels, embeddings = pair.pixels.clone().requires_grad_(), pair.embeddings.clone().requires_grad_()
    with embedded(model.text_model.get_input_embeddings(), embeddings): text = model.text_model(**inputs, output_attentions=True)
    vision = model.vision_model(pixel_values=pixels, output_attentions=True)
    score = model.logit_scale.exp() * (functional.normalize(model.visual_projection(vision.pooler_output), dim=1) * functional.normalize(model.text_projection(text.pooler_output), dim=1)).sum()
    slopes = torch.autograd.grad(score, [*vision.attentions, *text.attentions])
    def by_hand(attentions, gradients):
        relevance = torch.eye(attentions[0].shape[-1])
        for attention, gradient in zip(attentions, gradients): relevance = relevance + torch.relu(attention[0] * gradient[0]).mean(0) @ relevance
        return relevance
    image, words = by_hand(vision.attentions, slopes[:2]), by_hand(text.attentions, slopes[2:])
    end = inputs["input_ids"][0].tolist().index(model.config.text_config.eos_token_id)
    own = words[end].clone(); own[end] -= 1
    assert torch.allclose(found.image.flatten(), image[0, 1:], rtol=1e-3, atol=1e-7) and torch.allclose(found.values, own, rtol=1e-3, atol=1e-7)


def test_rollout_rules():
    attention, ones = torch.rand(2, 3, 3), torch.ones(2, 3, 3)
    assert torch.allclose(rollout([attention], [ones], [1]), attention.mean(0)[1]) and torch.allclose(rollout([attention], [ones]), attention.mean(0).mean(0)) and (rollout([attention], [-ones]) == 0).all()
    pool = torch.rand(2, 1, 3)
    assert torch.allclose(rollout([attention, pool], [ones, torch.ones(2, 1, 3)]), (pool.mean(0) @ (torch.eye(3) + attention.mean(0)))[0])


def test_what_the_score_does_not_use_gets_nothing():
    "A picture that is blank where it matters not: patches that do not change have no share."
    image = torch.ones(3, 32, 32); image[:, 8:16, 8:16] = torch.tensor([.9, .1, .1])[:, None, None]
    found = integrated_gradients(differentiable(PARTS.contrastive, image, "a red square"), num_steps=16)
    outside = torch.ones(32, 32, dtype=torch.bool); outside[8:16, 8:16] = False
    assert (found.image[outside] == 0).all() and found.image[8:16, 8:16].abs().sum() > 0


def test_the_embedding_layer_is_as_before_after_an_error():
    layer = nn.Embedding(3, 2)
    with pytest.raises(RuntimeError):
        with embedded(layer, torch.zeros(1, 1, 2)): raise RuntimeError
    assert not layer._forward_hooks


@pytest.mark.parametrize("call,said", [
    (lambda: differentiable(BagOfWordsScorer(["a red circle"]), IMAGE, CAPTION), "bag-of-words"), (lambda: differentiable(PARTS.contrastive, IMAGE[None], CAPTION), "[3, H, W]"), (lambda: differentiable(PARTS.contrastive, IMAGE, "  "), "empty"),
    (lambda: differentiable(PARTS.contrastive, IMAGE, "a red zebra"), "zebra"), (lambda: differentiable(PARTS.contrastive, IMAGE, CAPTION, blank="noise"), "white"), (lambda: integrated_gradients(differentiable(PARTS.contrastive, IMAGE, CAPTION), 0), "at least 1")])
def test_bad_input_is_one_sentence(call, said):
    with pytest.raises(UserError) as caught: call()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_figure_shades_every_word():
    from matplotlib import pyplot
    pair = differentiable(PARTS.contrastive, IMAGE, CAPTION)
    for found in (integrated_gradients(pair, 8), attention_rollout(pair)):
        axis = plot_attribution(found, cell=4)
        assert [text.get_text() for text in axis.texts] == CAPTION.split() and axis.images[1].get_array().shape == (32, 32)
    pyplot.close("all")


def test_without_captum_the_mend_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    with pytest.raises(UserError, match="captum"): integrated_gradients(differentiable(PARTS.contrastive, IMAGE, CAPTION))
