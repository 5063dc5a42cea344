"The seam of the diffusion classifier: adapters, costs that add up, operations against a closed form."
import dataclasses

import pytest
import torch

from vugen.data.scenes import World, batch
from vugen.encode.reducers import MLPReducer
from vugen.errors import UserError
from vugen.generate.baselines import decoupled
from vugen.generate.mixture_of_transformers import flops_per_token
from vugen.generate.text_to_image import TextToImage
from vugen.generate.vlm import SceneVLM, world_words
from vugen.models.vit import VisionTransformer
from vugen.understand.denoisers import Cost, Denoiser, GeneratorDenoiser, MixtureDenoiser, call_flops, class_captions, combined_fingerprint, counted_flops, generator_denoisers
from vugen.understand.diffusion_classifier import GaussianMixtureClasses


def toy(seed=0, latent_dim=4):
    torch.manual_seed(seed)
    vision = VisionTransformer(image_size=32, patch_size=8, hidden_size=16, num_layers=1, num_heads=2)
    vlm = SceneVLM(world_words(World()), vision_hidden_size=16, vision_grid=(4, 4), hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64).attach(vision).eval()
    model = TextToImage(latent_dim=latent_dim, grid=(4, 4)).attach(vlm, MLPReducer(hidden_size=16, dim=latent_dim)).eval()
    torch.nn.init.normal_(model.mixture.latent_out.weight, std=.2)
    return model


@pytest.fixture(scope="module")
def generator(): return toy()


def test_costs_add_up():
    parts = [Cost(1, 64, 10., .5, 2, 1), Cost(3, 192, 30., .25), Cost(prompts=4)]
    total = sum(parts)
    assert total == Cost(4, 256, 40., .75, 6, 1) == parts[2] + parts[1] + parts[0]
    assert all(getattr(total, field.name) == sum(getattr(part, field.name) for part in parts) for field in dataclasses.fields(Cost))
    assert Cost(**total.asdict()) == total and sum([], Cost()) == Cost()
    with pytest.raises(TypeError): 3 + Cost()


@pytest.mark.parametrize("length", [1, 7, 30])
def test_operations_have_a_closed_form(generator, length):
    "Linear layers of the tower on image tokens, attention to prompt and image, the two projections and the time's MLP"
    mixture, denoiser = generator.mixture, GeneratorDenoiser(generator, prompt_tokens=length)
    tokens, hidden = mixture.num_tokens, mixture.latent_in.out_features
    attention = mixture.tower.layers[0].self_attn
    heads = attention.q_proj.out_features
    expected = flops_per_token(mixture.tower.layers) * tokens + len(mixture.tower.layers) * 2 * 2 * heads * tokens * (length + tokens)
    expected += 2 * 2 * tokens * generator.latent_dim * hidden + 2 * 2 * hidden * hidden
    assert denoiser.flops == expected


def test_fused_attention_is_counted():
    query, key = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 11, 8)
    assert counted_flops(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, key)) == 2 * 2 * (2 * 3 * 5 * 11 * 8)


def test_longer_captions_cost_more(generator):
    denoiser = GeneratorDenoiser(generator)
    short, long = (denoiser.prepare([text]) for text in ("a red circle", "a red circle left of a blue square"))
    assert denoiser.flops_of(short) < denoiser.flops_of(long) == call_flops(denoiser, long)
    class Plain: flops = 5.
    assert call_flops(Plain(), short) == 5


def test_is_the_generator_itself(generator):
    denoiser, samples = GeneratorDenoiser(generator, "toy"), batch(World(), 0, range(3))
    assert isinstance(denoiser, Denoiser) and denoiser.shape == (16, 4) and denoiser.tokens == 16 and denoiser.device == torch.device("cpu")
    latents = denoiser.encode(samples["images"])
    assert torch.equal(latents, generator.encode_images(samples["images"]))
    conditions, index, t = denoiser.prepare(samples["captions"]), torch.tensor([2, 0, 2]), torch.tensor([.2, .5, .9])
    direct = generator.velocity(latents, t, [samples["captions"][place] for place in index])
    assert torch.allclose(denoiser.velocity(latents, t, conditions.select(index)), direct, atol=1e-5)
    assert torch.equal(denoiser.snap(t), t)


def test_captions_are_read_once(generator, monkeypatch):
    calls = []
    cache = generator.prompt_cache
    monkeypatch.setattr(generator, "prompt_cache", lambda prompts: calls.append(len(prompts)) or cache(prompts))
    denoiser = GeneratorDenoiser(generator)
    conditions = denoiser.prepare(["a red circle", "a blue square"])
    for _ in range(5): denoiser.velocity(torch.zeros(4, 16, 4), torch.full((4,), .5), conditions.select(torch.tensor([0, 1, 1, 0])))
    assert calls == [2]


def test_fingerprints_tell_networks_apart(generator):
    base = GeneratorDenoiser(generator).fingerprint
    assert GeneratorDenoiser(toy(0)).fingerprint == base and len(base) == 16 and int(base, 16) >= 0
    assert GeneratorDenoiser(toy(1)).fingerprint != base
    for part in ("mixture.latent_out.weight", "vlm.language_model.model.embed_tokens.weight", "reducer.latent_mean"):
        other = toy(0)
        tensor = other.state_dict()[part]
        tensor.view(-1)[0] += 1
        assert GeneratorDenoiser(other).fingerprint != base, part
    assert combined_fingerprint({"b": 1, "a": 2}) == combined_fingerprint({"a": 2, "b": 1})


def test_without_parts():
    with pytest.raises(UserError, match="no parts yet"): GeneratorDenoiser(TextToImage(latent_dim=4, grid=(4, 4)), "bare")


def test_the_baselines_are_read_in_the_same_way(tmp_path, generator):
    from vugen.decode.vae import ConvVAE
    torch.manual_seed(2)
    model = decoupled(generator.vlm, ConvVAE(), 32)
    model.space.fit_whitening([batch(World(), 0, range(4))["images"]])
    denoiser = GeneratorDenoiser(model.eval(), "Decoupled")
    images = batch(World(), 1, range(2))["images"]
    latents = denoiser.encode(images)
    assert latents.shape == (2, *denoiser.shape) and denoiser.fingerprint != GeneratorDenoiser(generator).fingerprint
    assert denoiser.velocity(latents, torch.full((2,), .5), denoiser.prepare(["a red circle", ""])).shape == latents.shape
    assert generator_denoisers(tmp_path) == {}


@pytest.fixture(scope="module")
def world(): return GaussianMixtureClasses(torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), .4)


def test_mixture_is_exact(world):
    denoiser = MixtureDenoiser(world)
    assert isinstance(denoiser, Denoiser) and denoiser.captions == class_captions(3)
    noisy, t = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.linspace(.05, .95, 6)
    told = denoiser.prepare([*denoiser.captions, ""])
    for label in range(3):
        assert torch.allclose(denoiser.velocity(noisy, t, told.select(torch.full((6,), label))), world.velocity(noisy, t, [label] * 6), atol=1e-5)
    every = GaussianMixtureClasses(world.means.reshape(1, 6, 4), .4)
    assert torch.allclose(denoiser.velocity(noisy, t, told.select(torch.full((6,), 3))), every.velocity(noisy, t, [0] * 6), atol=1e-5)
    assert torch.equal(denoiser.encode(noisy.view(6, 1, 2, 2)), noisy)
    with pytest.raises(UserError, match="no caption 'a cat'"): denoiser.prepare(["class 0", "a cat"])


def test_mixtures_have_their_own_fingerprints(world):
    base = MixtureDenoiser(world).fingerprint
    assert base == MixtureDenoiser(GaussianMixtureClasses(world.means.clone(), .4)).fingerprint
    assert len({base, MixtureDenoiser(GaussianMixtureClasses(world.means, .5)).fingerprint, MixtureDenoiser(GaussianMixtureClasses(world.means + .1, .4)).fingerprint}) == 3
