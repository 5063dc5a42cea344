"The latent diffusion decoder: EDM's formulas and sampler, the MM-DiT, the decoder around them, learning, faults."
import pytest
import torch
import torch.nn.functional as F

from vugen.data.scenes import World, batch
from vugen.decode.latent_diffusion import (
    LATENT_SIZES, JointAttention, JointBlock, LatentDiffusionDecoder, MMDiT, build_latent_decoder, denoiser_velocity, edm_euler, edm_loss, edm_loss_weight,
    edm_preconditioning, gaussian_denoiser, guided_denoiser, karras_sigmas, latent_gflops, patchify, positions, sample_sigma, sigma_of_time, time_of_sigma, unpatchify, start_from)
from vugen.decode.pixel_diffusion import scale_shift
from vugen.decode.vae import ConvVAE, LatentAutoencoder, Posterior
from vugen.errors import UserError
from vugen.models.flow import convert, euler, gaussian_velocity
from vugen.models.seams import Decoder
from vugen.train.presets import TINY_WORLD

SIGMA = torch.logspace(-2.7, 1.9, 60, dtype=torch.float64)


class Pooled(LatentAutoencoder):
    "Latents are mean colours of 4×4 pixels."
    name, latent_channels, factor, scaling_factor, shift_factor = "pooled", 3, 4, 1.6, 0.7
    def posterior(self, signed): return Posterior(F.avg_pool2d(signed, 4), torch.full((len(signed), 3, signed.shape[2] // 4, signed.shape[3] // 4), -30.0))
    def paint(self, raw): return F.interpolate(raw, scale_factor=4, mode="nearest")


def wake(module):
    "An untrained network is silent: give every branch a voice."
    for parameter in module.parameters():
        if parameter.abs().sum() == 0: torch.nn.init.normal_(parameter, std=0.05)
    return module


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return wake(LatentDiffusionDecoder(hidden_size=32, num_layers=2, vae_channels=3).attach(Pooled())).eval()


@pytest.fixture(scope="module")
def latents(): return torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(1))


def two_modes(x, sigma):
    "Exact denoiser of half N(−1, 0.3²), half N(1, 0.3²)."
    variance = torch.as_tensor(sigma, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1)) ** 2
    return (0.09 * x + variance * torch.tanh(x / (0.09 + variance))) / (0.09 + variance)


# EDM's formulas

@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_preconditioning_against_gaussian_data(sigma_data):
    "On N(0, σ_data²) the exact denoiser is c_skip·x, F's input and target have variance 1, and c_out is the least that allows it."
    skip, output, scale, level = edm_preconditioning(SIGMA, sigma_data)
    x = torch.randn(60, 7, dtype=torch.float64)
    torch.testing.assert_close(skip[:, None] * x, gaussian_denoiser(0.0, sigma_data)(x, SIGMA), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(scale**2 * (SIGMA**2 + sigma_data**2), torch.ones_like(SIGMA), rtol=1e-13, atol=0)
    target = lambda skip: (1 - skip)**2 * sigma_data**2 + skip**2 * SIGMA**2          # variance of data − skip·(data + σ·noise)
    torch.testing.assert_close(target(skip), output**2, rtol=1e-12, atol=0)
    assert (target(skip + 1e-3) > output**2).all() and (target(skip - 1e-3) > output**2).all()
    torch.testing.assert_close(level, SIGMA.log() / 4)
    torch.testing.assert_close(edm_loss_weight(SIGMA, sigma_data) * output**2, torch.ones_like(SIGMA), rtol=1e-13, atol=0)


def test_preconditioning_is_that_of_diffusers():
    from diffusers import EDMEulerScheduler
    scheduler, x, raw = EDMEulerScheduler(), torch.randn(60), torch.randn(60)
    sigma = SIGMA.float()
    skip, output, scale, level = edm_preconditioning(sigma)
    torch.testing.assert_close(scheduler.precondition_inputs(x, sigma), scale * x)
    torch.testing.assert_close(scheduler.precondition_noise(sigma), level)
    torch.testing.assert_close(scheduler.precondition_outputs(x, raw, sigma), skip * x + output * raw)


def test_gaussian_denoiser_by_counting():
    "E[data | x] from samples: regress data on x."
    data = 1.5 + 0.4 * torch.randn(400_000, dtype=torch.float64)
    x = data + 0.8 * torch.randn_like(data)
    slope = ((x - x.mean()) * data).mean() / x.var()
    points = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    regressed = data.mean() + slope * (points - x.mean())
    torch.testing.assert_close(gaussian_denoiser(1.5, 0.4)(points, torch.tensor([0.8, 0.8])), regressed, atol=0.01, rtol=0)


def test_training_noise_is_log_normal():
    levels = sample_sigma(50_000, -0.4, 1.0, torch.Generator().manual_seed(0)).log()
    assert abs(levels.mean() + 0.4) < 0.02 and abs(levels.std() - 1.0) < 0.02
    assert torch.equal(sample_sigma(5, generator=torch.Generator().manual_seed(3)), sample_sigma(5, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_loss_of_the_exact_denoiser(sigma):
    "For data of deviation s the least loss is s²(σ² + σ_data²) / (σ_data²(σ² + s²)); any other denoiser has more."
    data, at = 0.2 * torch.randn(400, 500, dtype=torch.float64), torch.full((400,), sigma, dtype=torch.float64)
    best = lambda scale: edm_loss(gaussian_denoiser(0.0, scale), data, at, torch.Generator().manual_seed(1)).item()
    assert best(0.2) == pytest.approx(0.04 * (sigma**2 + 0.25) / (0.25 * (sigma**2 + 0.04)), rel=0.02)
    assert best(0.2) < best(0.25) and best(0.2) < best(0.15)


# The sampler

@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("values", [{}, dict(sigma_min=0.01, sigma_max=20.0, rho=3.0)])
def test_levels_are_those_of_diffusers(steps, values):
    from diffusers import EDMEulerScheduler
    scheduler = EDMEulerScheduler(**values)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(karras_sigmas(steps, **values).float(), scheduler.sigmas, rtol=1e-5, atol=0)


def test_trajectory_is_that_of_diffusers():
    from diffusers import EDMEulerScheduler
    scheduler, begin = EDMEulerScheduler(), 80 * torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(20)
    x, places, estimates, seen = begin, [], [], []
    for time, level in zip(scheduler.timesteps, scheduler.sigmas):
        skip, output, *_ = edm_preconditioning(level)
        scheduler.scale_model_input(x, time)
        x, estimate = scheduler.step((two_modes(x, level) - skip * x) / output, time, x, return_dict=False)
        places.append(x), estimates.append(estimate)
    def recorded(x, sigma): seen.append(x); return two_modes(x, sigma)
    ours = []
    last = edm_euler(recorded, begin, karras_sigmas(20), lambda index, level, estimate: ours.append(estimate))
    torch.testing.assert_close(torch.stack([*seen[1:], last]), torch.stack(places), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(ours), torch.stack(estimates), rtol=1e-4, atol=1e-4)
    assert last.std() > 0.8


def test_euler_converges_to_the_exact_flow():
    start = 80 * torch.randn(500, dtype=torch.float64)
    exact = start * (0.3**2 / (0.3**2 + 80**2)) ** 0.5
    error = lambda steps: (edm_euler(gaussian_denoiser(0.0, 0.3), start, karras_sigmas(steps)) - exact).abs().max().item()
    assert error(400) < error(100) / 3.5 and error(400) < 0.02


def test_samples_of_two_modes_have_their_statistics():
    x = edm_euler(two_modes, 80 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64), karras_sigmas(500))
    assert abs(x.mean()) < 0.03 and x.abs().mean() == pytest.approx(1.0, abs=0.02) and x.std() == pytest.approx(1.09**0.5, abs=0.03)


def test_impossible_number_of_steps():
    with pytest.raises(ValueError, match="at least 1"): karras_sigmas(0)


# The adapter to the project's time

def test_velocity_of_gaussian_data():
    x, t = torch.randn(9, 5, dtype=torch.float64), torch.linspace(0.02, 0.99, 9, dtype=torch.float64)
    torch.testing.assert_close(sigma_of_time(time_of_sigma(SIGMA)), SIGMA)
    torch.testing.assert_close(denoiser_velocity(gaussian_denoiser(0.3, 0.7))(x, t), gaussian_velocity(0.3, 0.7)(x, t))


def test_velocity_gives_the_denoisers_data_back(decoder, latents):
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    data = decoder(x / t.view(3, 1, 1, 1), (1 - t) / t, latents)
    torch.testing.assert_close(convert(decoder.velocity(x, t, latents), x, t, "velocity", "data"), data, rtol=1e-4, atol=1e-4)


def test_both_samplers_reach_the_same_pictures(decoder, latents):
    "Many Euler steps along σ and along t follow the same flow."
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        along_sigma = edm_euler(lambda x, sigma: decoder(x, sigma, latents), 80 * noise, karras_sigmas(150))
        along_time = euler(lambda x, t: decoder.velocity(x, t, latents), noise, 300)
    assert (along_sigma - along_time).abs().mean() < 0.05 * along_sigma.std()


# The network

def test_patches_come_back():
    x = torch.randn(2, 4, 12, 12)
    for size in (1, 2, 3): assert torch.equal(unpatchify(patchify(x, size), size), x)
    assert torch.equal(patchify(x, 2)[0, 1].view(4, 2, 2), x[0, :, :2, 2:4])                    # row-major


def test_positions_share_one_frame():
    fine, coarse = positions(8, 8, 64), positions(4, 8, 64)
    assert (coarse @ fine.T).argmax(1).tolist()[0] in (0, 1, 8, 9) and fine.unique(dim=0).shape == (64, 64)


def test_tokens_of_a_kind_have_no_order_but_their_places():
    "Permuting all image tokens permutes the output; exchanging the kinds does not."
    torch.manual_seed(0)
    block, x, level, order = wake(JointBlock(32, 4)), torch.randn(2, 12, 32), torch.randn(2, 32), torch.randperm(8)
    permuted = torch.cat([x[:, :4], x[:, 4:][:, order]], 1)
    torch.testing.assert_close(block(permuted, level, 4)[:, 4:], block(x, level, 4)[:, 4:][:, order], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(block(x, level, 4), block(x, level, 8), atol=1e-3)


def test_attention_is_one_softmax_over_both_kinds():
    torch.manual_seed(0)
    attention, x = JointAttention(16, 2), torch.randn(1, 5, 16)
    qkv = torch.cat([attention.condition_qkv(x[:, :2]), attention.image_qkv(x[:, 2:])], 1)[0].view(5, 3, 2, 8)
    heads = [(qkv[:, 0, head] @ qkv[:, 1, head].T / 8**0.5).softmax(1) @ qkv[:, 2, head] for head in range(2)]
    torch.testing.assert_close(attention(x, 2)[0], attention.out(torch.cat(heads, 1)), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="divisible"): JointAttention(30, 4)


def test_silent_at_the_start_and_every_weight_is_reached():
    torch.manual_seed(0)
    network = MMDiT(4, 8, 32, 2, 4, 1)
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2), torch.randn(2, 16, 8)
    assert network(*inputs).abs().max() == 0
    wake(network)(*inputs).square().mean().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in network.parameters())


def test_output_depends_on_every_condition_token_and_on_the_level(decoder, latents):
    x, sigma = torch.randn(1, 3, 8, 8), torch.tensor([1.0])
    condition = latents[:1].clone().requires_grad_()
    decoder(x, sigma, condition).square().sum().backward()
    assert condition.grad.abs().sum(-1).min() > 0
    assert not torch.allclose(decoder.network(x, torch.zeros(1), latents[:1]), decoder.network(x, torch.ones(1), latents[:1]))


def test_paper_size():
    "794M ± 3% on the meta device, and which parts hold them."
    decoder = build_latent_decoder("paper", "meta")
    count = lambda part: sum(value.numel() for value in part.parameters())
    assert abs(count(decoder) / 794e6 - 1) < 0.03
    assert len(decoder.network.blocks) == 28 and decoder.network.hidden_size == 1152
    assert count(decoder.network.blocks[0]) == 21 * 1152**2 + 18 * 1152                           # matrices and their biases
    x = decoder(torch.zeros(1, 4, 32, 32, device="meta"), torch.ones(1, device="meta"), torch.zeros(1, 256, 64, device="meta"))
    assert x.shape == (1, 4, 32, 32)


def test_other_sizes_and_costs():
    assert set(LATENT_SIZES) == {"tiny", "small", "paper"}
    tiny = build_latent_decoder("tiny", "meta")
    assert sum(value.numel() for value in tiny.parameters()) < 2e6
    assert 0.1 < latent_gflops(tiny) < 0.4
    with pytest.raises(UserError, match="tiny, small, paper"): build_latent_decoder("huge")


# The decoder

def test_it_is_a_decoder(decoder, latents):
    assert isinstance(decoder, Decoder)
    images = decoder.decode(latents, 3)
    assert images.shape == (3, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
    assert torch.equal(decoder.decode(latents, 3), images) and not torch.equal(decoder.decode(latents, 3, seed=1), images)
    torch.testing.assert_close(decoder.decode(latents[:1], 3), images[:1], rtol=1e-4, atol=1e-4)   # noise belongs to the picture, not to the batch
    assert decoder.decode(latents[:, :16], 1).shape == (3, 3, 16, 16)                            # a smaller grid, a smaller picture


def test_every_step_is_reported(decoder, latents):
    film = []
    images = decoder.decode(latents, 4, callback=lambda step, t, estimate: film.append((step, t, estimate)))
    assert [step for step, *_ in film] == [0, 1, 2, 3] and film[0][1] == pytest.approx(1 / 81) and all(a[1] < b[1] for a, b in zip(film, film[1:]))
    torch.testing.assert_close(film[-1][2], images, rtol=1e-4, atol=1e-4)                         # the last step lands on the last estimate


def test_untrained_loss_is_one():
    decoder = LatentDiffusionDecoder(hidden_size=32, num_layers=1)
    loss = decoder.loss(torch.randn(512, 4, 8, 8), torch.randn(512, 64, 8), torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(1, abs=0.03)


def test_noise_scale_moves_every_level():
    plain, moved = (LatentDiffusionDecoder(hidden_size=32, num_layers=1, noise_scale=scale) for scale in (1.0, 2.0))
    assert (moved.sigma_min, moved.sigma_max) == (2 * plain.sigma_min, 2 * plain.sigma_max)
    draw = lambda decoder: sample_sigma(9, decoder.log_sigma_mean, decoder.log_sigma_std, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draw(moved), 2 * draw(plain))


def test_guidance(decoder, latents):
    assert guided_denoiser(two_modes, None, 1) is two_modes
    x, sigma = torch.randn(3, 3, 8, 8), torch.ones(3)
    told, untold = (lambda x, sigma: decoder(x, sigma, latents)), (lambda x, sigma: decoder(x, sigma, torch.zeros_like(latents)))
    torch.testing.assert_close(guided_denoiser(told, untold, 2.5)(x, sigma), untold(x, sigma) + 2.5 * (told(x, sigma) - untold(x, sigma)))
    torch.testing.assert_close(decoder.decode(torch.zeros_like(latents), 2, guidance_scale=3.0), decoder.decode(torch.zeros_like(latents), 2), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(decoder.decode(latents, 2, guidance_scale=3.0), decoder.decode(latents, 2))


def test_dropped_conditions_are_not_seen(decoder, latents):
    clean, draw = torch.randn(3, 3, 8, 8), lambda: torch.Generator().manual_seed(0)
    loss = lambda condition, dropout: decoder.loss(clean, condition, draw(), dropout)
    assert torch.equal(loss(latents, 1.0), loss(latents + 1, 1.0)) and not torch.equal(loss(latents, 0.0), loss(latents + 1, 0.0))


def test_saving_brings_the_vae(latents, tmp_path):
    torch.manual_seed(0)
    decoder = wake(LatentDiffusionDecoder(hidden_size=32, num_layers=1).attach(ConvVAE(widths=(8, 16, 16))))
    again = LatentDiffusionDecoder.from_pretrained(decoder.save_pretrained(tmp_path / "decoder"))
    assert torch.equal(again.decode(latents, 2), decoder.decode(latents, 2))
    from safetensors.torch import load_file
    assert not any(name.startswith("vae.") for name in load_file(tmp_path / "decoder" / "model.safetensors"))
    assert not any(value.requires_grad for value in again.vae.parameters())
    other = LatentDiffusionDecoder.from_pretrained(tmp_path / "decoder", vae=ConvVAE(widths=(8, 16, 16)))
    assert not torch.equal(other.decode(latents, 2), again.decode(latents, 2))


def test_faults_are_named(decoder, latents):
    with pytest.raises(UserError, match=r"attach\(load_vae"): LatentDiffusionDecoder(hidden_size=32, num_layers=1).decode(latents)
    with pytest.raises(UserError, match="pooled has 3 channels"): LatentDiffusionDecoder(hidden_size=32, num_layers=1).attach(Pooled())
    for wrong in (latents[..., :5], latents[0]):
        with pytest.raises(UserError, match=r"\[B, N, 8\]"): decoder.decode(wrong)
    with pytest.raises(UserError, match="square"): decoder.decode(latents[:, :60])
    with pytest.raises(UserError, match="multiple of 8"): LatentDiffusionDecoder(image_size=36, patch_size=2)


def test_four_pictures_are_learned():
    "At tiny size, within 100 steps: the loss falls to less than half, and pictures painted from pure noise come 1.5 times closer to the originals than untrained ones."
    images = batch(World(**TINY_WORLD), seed=4, indices=range(4))["images"]
    torch.manual_seed(0)
    vae = Pooled()
    vae.scaling_factor, vae.shift_factor = 3.1, 0.88                                              # of these four: mean 0, variance 1
    decoder, clean = build_latent_decoder("tiny", vae_channels=3).attach(vae), vae.encode(images)
    latents = clean.flatten(2).transpose(1, 2) @ torch.randn(3, 8)                                # tokens that say what is where
    error = lambda: (decoder.decode(latents, 8) - vae.decode(clean)).square().mean().item()
    before, curve = error(), []
    optimizer = torch.optim.AdamW(decoder.parameters(), 4e-3, betas=(0.9, 0.95))
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 10, (100 - step) / 30)
        loss = decoder.loss(clean, latents, torch.Generator().manual_seed(step))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        curve.append(loss.item())
    assert sum(curve[-10:]) < sum(curve[:10]) / 2
    assert error() < before / 1.5


# ---- starting from a pretrained model -----------------------------------------------------------------------------------------

def small_dit(**changes):
    "diffusers' DiT, untrained, with every weight awake; exact GELU and our epsilon, so that only the mapping is compared."
    from diffusers import DiTTransformer2DModel
    torch.manual_seed(5)
    sizes = dict(num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8, patch_size=2, num_embeds_ada_norm=10, activation_fn="gelu", norm_eps=1e-6)
    made = wake(DiTTransformer2DModel(**{**sizes, **changes})).eval()
    for block in made.transformer_blocks: block.norm1.emb.load_state_dict(made.transformer_blocks[0].norm1.emb.state_dict())  # as in the published checkpoints
    return made


def test_a_dit_is_the_same_network_after_the_start(tmp_path):
    theirs = small_dit()
    theirs.save_pretrained(tmp_path / "pipeline/transformer")
    decoder = wake(LatentDiffusionDecoder(hidden_size=32, num_layers=3, num_heads=4, patch_size=2))
    fresh = start_from(decoder, tmp_path / "pipeline")
    assert set(fresh) == {"network.embed_condition.weight", "network.embed_condition.bias"}
    network, x, t = decoder.network, torch.randn(2, 4, 8, 8), torch.tensor([700.0, 120.0])
    silent = torch.full((2,), 10)  # the class of no class
    with torch.no_grad():
        wanted = theirs(x, timestep=t, class_labels=silent).sample[:, :4]
        embedder = theirs.transformer_blocks[0].norm1.emb
        level = torch.nn.functional.silu(network.embed_level(embedder.time_proj(t)))
        tokens = theirs.pos_embed(x)  # their places, their order of the two halves
        assert torch.allclose(network.embed_image(patchify(x, 2)).roll(16, -1) + theirs.pos_embed.pos_embed, tokens, atol=1e-5)
        tokens = tokens.roll(16, -1)
        for block in network.blocks: tokens = block(tokens, level, 0)
        made = unpatchify(network.out(scale_shift(network.norm(tokens), network.modulation(level)[:, None], -1)), 2)
    assert torch.allclose(made, wanted, atol=1e-4) and wanted.std() > 0.1
    assert torch.equal(network.blocks[1].attention.condition_qkv.weight, network.blocks[1].attention.image_qkv.weight)


def test_places_of_a_dit_are_ours_with_the_halves_exchanged():
    theirs = small_dit().pos_embed.pos_embed[0]
    ours = positions(4, 4, 32)  # centres of cells, where theirs are corners: the same but for half a cell
    shifted = torch.arange(4, dtype=torch.float32)[:, None] * 10000.0 ** (-torch.arange(8, dtype=torch.float32) / 8)
    line = torch.cat([shifted.sin(), shifted.cos()], 1)
    assert torch.allclose(theirs.roll(16, -1), torch.cat([line.repeat_interleave(4, 0), line.repeat(4, 1)], 1), atol=1e-5) and ours.shape == theirs.shape


def test_our_own_checkpoint_is_a_start_for_another_condition(tmp_path):
    old = wake(LatentDiffusionDecoder(hidden_size=32, num_layers=2))
    old.save_pretrained(tmp_path / "stage/latent_decoder")
    same, other = LatentDiffusionDecoder(hidden_size=32, num_layers=2), LatentDiffusionDecoder(hidden_size=32, num_layers=2, latent_dim=16)
    assert start_from(same, tmp_path / "stage") == [] and all(torch.equal(value, old.state_dict()[name]) for name, value in same.state_dict().items())
    assert start_from(other, tmp_path / "stage/latent_decoder") == ["network.embed_condition.weight"]
    assert torch.equal(other.network.blocks[1].mlp.up.weight, old.network.blocks[1].mlp.up.weight) and torch.equal(other.network.embed_condition.bias, old.network.embed_condition.bias)


def test_a_start_that_does_not_fit_is_refused_in_a_sentence(tmp_path):
    small_dit().save_pretrained(tmp_path / "dit")
    LatentDiffusionDecoder(hidden_size=32, num_layers=2).save_pretrained(tmp_path / "own")
    (tmp_path / "sd3").mkdir(); (tmp_path / "sd3/config.json").write_text('{"_class_name": "SD3Transformer2DModel", "patch_size": 2, "in_channels": 16}')
    (tmp_path / "broken").mkdir(); (tmp_path / "broken/config.json").write_text("{")
    own_times = small_dit()
    torch.nn.init.ones_(own_times.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias)
    own_times.save_pretrained(tmp_path / "times")
    small_dit().save_pretrained(tmp_path / "torn"); (tmp_path / "torn/diffusion_pytorch_model.safetensors").write_bytes(b"123")
    sizes = dict(hidden_size=32, num_layers=3, num_heads=4, patch_size=2)
    for folder, changes, said in (("dit", dict(num_layers=2), "does not fit"), ("dit", dict(num_layers=4), "does not fit"), ("dit", dict(hidden_size=64), "does not fit"), ("dit", dict(patch_size=1), "patches of 2"),
                                  ("dit", dict(vae_channels=8), "4 channels"), ("own", dict(num_layers=1), "does not fit"), ("sd3", {}, "SD3Transformer2DModel"), ("times", {}, "own way"), ("none", {}, "config.json"), ("broken", {}, "JSON"), ("torn", {}, "truncated")):
        decoder = LatentDiffusionDecoder(**{**sizes, **changes})
        before = {name: value.clone() for name, value in decoder.state_dict().items()}
        with pytest.raises(UserError, match=said) as caught: start_from(decoder, tmp_path / folder)
        assert "\n" not in str(caught.value) and all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
