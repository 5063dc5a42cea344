"""The image tower beside a frozen decoder: what must hold exactly, what to rounding, and what is refused."""
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from vugen.errors import UserError
from vugen.generate.mixture_of_transformers import ImageTower, MixtureOfTransformers, joint_mask, prompt_cache, project_heads, rotate, text_decoder

SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2)
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),  # biases in the projections
}
IDS = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 3, 0, 0], [1, 0, 0, 0, 0]])
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])


@pytest.fixture(params=FAMILIES)
def language_model(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


@pytest.fixture
def mixture(language_model):
    made = MixtureOfTransformers(language_model, latent_dim=4, grid=(3, 4)).eval()
    nn.init.normal_(made.latent_out.weight, std=0.3)
    return made


@pytest.fixture
def noisy():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 12, 4, generator=generator), torch.tensor([0.1, 0.5, 0.9])


def test_a_new_tower_predicts_zero(language_model, noisy):
    made = MixtureOfTransformers(language_model, latent_dim=4, grid=(3, 4))
    assert made(*noisy, made.prompt_cache(IDS, MASK)).abs().max() == 0


def test_the_copy_continues_the_text_as_the_original_does(language_model):
    "A word in place of an image token, right after the prompt, reaches the state that the language model itself gives it"
    decoder = text_decoder(language_model)
    tower = ImageTower(decoder)
    cache = prompt_cache(decoder, IDS[:1, :4], MASK[:1, :4])
    ours = tower(decoder.embed_tokens(IDS[:1, 4:]), cache)
    assert torch.allclose(ours, decoder(input_ids=IDS[:1]).last_hidden_state[:, 4:], atol=1e-5)


def test_at_the_start_keys_and_values_of_copy_and_original_are_equal(language_model):
    decoder = text_decoder(language_model)
    tower = ImageTower(decoder)
    seen = decoder(input_ids=IDS[:1], use_cache=True).past_key_values
    words = decoder.embed_tokens(IDS[:1])
    _, key, value = project_heads(tower.layers[0].self_attn, tower.layers[0].input_layernorm(words))
    assert torch.allclose(rotate(key, decoder.rotary_emb, torch.arange(5)[None]), seen.layers[0].keys, atol=1e-5)
    assert torch.equal(value, seen.layers[0].values)


def test_understanding_is_untouched_to_the_bit(language_model, noisy):
    before = language_model(IDS, attention_mask=MASK.long()).logits
    made = MixtureOfTransformers(language_model, latent_dim=4, grid=(3, 4)).train()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        (made(*noisy, made.prompt_cache(IDS, MASK)) - noisy[0]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(language_model(IDS, attention_mask=MASK.long()).logits, before)
    assert not torch.allclose(made.tower.layers[0].mlp.up_proj.weight, made.decoder.layers[0].mlp.up_proj.weight)
    assert not made.decoder.training and all(p.grad is None for p in made.decoder.parameters())


def test_no_storage_is_shared_between_the_towers(mixture):
    frozen = {p.data_ptr() for p in mixture.decoder.parameters()}
    assert frozen.isdisjoint(p.data_ptr() for p in mixture.tower.parameters())


def test_padding_leaves_no_trace(mixture, noisy):
    together = mixture(*noisy, mixture.prompt_cache(IDS, MASK))
    for row, length in enumerate((5, 3, 1)):
        alone = mixture(noisy[0][row:row + 1], noisy[1][row:row + 1], mixture.prompt_cache(IDS[row:row + 1, :length], MASK[row:row + 1, :length]))
        assert torch.allclose(alone[0], together[row], atol=1e-5)


def test_tokens_and_places_commute(mixture, noisy):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    cache = mixture.prompt_cache(IDS, MASK)
    straight = mixture(*noisy, cache)
    assert torch.allclose(mixture(noisy[0][:, order], noisy[1], cache, places=order), straight[:, order], atol=1e-5)
    assert not torch.allclose(mixture(noisy[0][:, order], noisy[1], cache), straight[:, order], atol=1e-3)


def test_every_image_token_is_heard_by_every_other(mixture, noisy):
    latents = noisy[0][:1].clone().requires_grad_()
    cache = mixture.prompt_cache(IDS[:1], MASK[:1])
    for place in (0, 11):
        heard = torch.autograd.grad(mixture(latents, noisy[1][:1], cache)[0, place].sum(), latents)[0][0].abs().sum(1)
        assert (heard > 0).all()  # both ways: the first hears the last, and the last the first


def test_the_prompt_knows_neither_image_nor_time(mixture, noisy):
    cache = mixture.prompt_cache(IDS, MASK)
    kept = [part.clone() for part in (*cache.keys, *cache.values)]
    mixture(*noisy, cache), mixture(noisy[0] * 3, noisy[1] * 0, cache)
    assert all(torch.equal(before, after) for before, after in zip(kept, (*cache.keys, *cache.values)))
    assert not any(part.requires_grad for part in (*cache.keys, *cache.values))


def test_each_layer_listens_to_its_own_keys(mixture, noisy):
    cache = mixture.prompt_cache(IDS, MASK)
    heard = mixture(*noisy, cache)
    for layer in range(3):
        values = [value + (place == layer) for place, value in enumerate(cache.values)]
        changed = mixture(*noisy, type(cache)(cache.keys, values, cache.mask))
        assert not torch.allclose(changed, heard, atol=1e-4)


def test_selected_rows_are_the_rows(mixture, noisy):
    cache, index = mixture.prompt_cache(IDS, MASK), torch.tensor([2, 0, 0])
    chosen = mixture(noisy[0], noisy[1], cache.select(index))
    expected = mixture(noisy[0], noisy[1], mixture.prompt_cache(IDS[index], MASK[index]))
    assert torch.allclose(chosen, expected, atol=1e-5)


def test_the_image_stands_right_after_the_prompt(language_model):
    "Rotating keys back by the prompt's length is the same as giving every image token the index after it"
    decoder = text_decoder(language_model)
    cache = prompt_cache(decoder, IDS[:1], MASK[:1])
    seen = decoder(input_ids=IDS[:1], use_cache=True).past_key_values.layers[1].keys
    query = torch.randn(1, 2, 3, 8)
    ahead = rotate(query, decoder.rotary_emb, torch.full((1, 1), 5))
    assert torch.allclose(ahead @ seen.mT, query @ cache.keys[1].mT, atol=1e-4)


def test_mask_counts_words_and_patches():
    mask = joint_mask(type("C", (), {"mask": MASK})(), 12)
    assert mask.shape == (3, 1, 12, 17) and (mask == 0).sum((1, 3))[:, 0].tolist() == [17, 15, 13]


def test_gradients_reach_all_that_is_trained(mixture, noisy):
    mixture(*noisy, mixture.prompt_cache(IDS, MASK)).square().mean().backward()
    silent = [name for name, value in mixture.named_parameters() if value.requires_grad and (value.grad is None or value.grad.abs().max() == 0)]
    silent = [name for name in silent if not name.endswith("k_proj.bias")]  # a shift of all keys alike changes no softmax over the image alone
    assert silent == []


def test_what_has_no_decoder_is_refused():
    with pytest.raises(UserError, match="Llama-style"): text_decoder(nn.Linear(2, 2))
