"Attention of image tokens to words: the plain softmax of queries and keys, unharmed sampling, sums and figures."
import pytest
import torch

from vugen.errors import UserError
from vugen.generate.mixture_of_transformers import joint_mask, normed, project_heads
from vugen.understand.attention_maps import PromptAttention, inside_ratio, layer_attention, plot_words, prompt_attention, prompt_words
from vugen.understand.scorers import Parts

MODEL = Parts().generator
PROMPT = "a red circle left of a blue square"
FOUND = prompt_attention(MODEL, PROMPT, num_inference_steps=3, seed=5)


def test_shapes_sums_and_words():
    layers, heads = len(MODEL.mixture.tower.layers), MODEL.mixture.decoder.config.num_attention_heads
    assert FOUND.weights.shape == (3, layers, heads, MODEL.mixture.num_tokens, len(FOUND.words)) and FOUND.words[1:9] == tuple(PROMPT.split()) and FOUND.words == prompt_words(MODEL, PROMPT)
    assert (FOUND.weights >= 0).all() and (FOUND.weights.sum(-1) <= 1 + 1e-5).all() and FOUND.weights.sum(-1).min() < 1
    assert FOUND.map("blue").shape == (3, *MODEL.mixture.grid) and torch.allclose(FOUND.map("blue", [0]).flatten(1), FOUND.weights[:, 0, :, :, FOUND.words.index("blue")].mean(1)) and FOUND.share().shape == (3, layers, len(FOUND.words))


@pytest.mark.parametrize("guidance", (1.0, 3.0))
def test_sampling_is_what_it_was_and_times_are_the_samplers(guidance):
    found = prompt_attention(MODEL, PROMPT, guidance, 3, seed=2)
    assert torch.equal(found.latents, MODEL.generate([PROMPT], guidance, 3, seed=2)[0]) and found.times[0] == 0 and len(found.times) == 3
    if MODEL.shift == 1: assert torch.allclose(found.times, torch.tensor([0, 1 / 3, 2 / 3]))


def test_every_layer_is_the_softmax_of_its_queries_and_keys_in_float64():
    latents, t, prompts = torch.randn(2, MODEL.mixture.num_tokens, MODEL.latent_dim), torch.tensor([.2, .7]), [PROMPT, "a blue square left of a red circle"]
    read, cache, tower = layer_attention(MODEL, latents, t, prompts), MODEL.prompt_cache(prompts), MODEL.mixture.tower
    with torch.no_grad():
        hidden = MODEL.mixture.latent_in(latents) + MODEL.mixture.positions + MODEL.mixture.time(t)[:, None]
        for number, layer in enumerate(tower.layers):
            query, key, _ = project_heads(layer.self_attn, normed(layer.input_layernorm, hidden))
            keys = torch.cat([cache.keys[number], key], 2).repeat_interleave(query.shape[1] // key.shape[1], 1)
            plain = (query.double() @ keys.double().mT * layer.self_attn.scaling + joint_mask(cache, hidden.shape[1]).double()).softmax(-1)
            assert torch.allclose(read[number].double(), plain, atol=1e-5) and torch.allclose(read[number].sum(-1), torch.ones(()), atol=1e-5)
            hidden = layer(hidden, cache.keys[number], cache.values[number], joint_mask(cache, hidden.shape[1]))


def test_the_ratio_of_a_place():
    weights = torch.full((2, 1, 1, 4, 2), .1); weights[:, :, :, 0, 1] = .4
    made = PromptAttention(weights, ("<bos>", "red"), torch.tensor([0., .5]), (2, 2), torch.zeros(4, 1), "red")
    mask = torch.tensor([[True, False], [False, False]])
    assert torch.allclose(inside_ratio(made, "red", mask), torch.tensor(.4 / .175)) and torch.allclose(inside_ratio(made, "<bos>", mask), torch.tensor(1.)) and torch.allclose(inside_ratio(made, 1, torch.ones(2, 2).bool()), torch.tensor(1.))
    with pytest.raises(UserError, match="'green'"): made.map("green")
    for bad in (torch.zeros(2, 2).bool(), torch.ones(3, 2).bool()):
        with pytest.raises(UserError, match="mask"): inside_ratio(made, "red", bad)


def test_the_figure_has_a_map_for_every_word_and_step():
    from matplotlib import pyplot
    figure = plot_words(FOUND, picture=torch.rand(3, 32, 32))
    assert len(figure.axes) == (len(FOUND.words) - 1) * 4 and len(plot_words(FOUND, steps=[0], words=["red", "blue"]).axes) == 2
    pyplot.close("all")


def test_bad_prompts_are_one_sentence():
    for prompt in ("", "a red zebra", "<bos>"):
        with pytest.raises(UserError): prompt_attention(MODEL, prompt, num_inference_steps=2)
    with pytest.raises(UserError, match="at least 1"): prompt_attention(MODEL, PROMPT, num_inference_steps=0)
