"The U-ViT decoder: shapes, sizes, determinism, conditioning, learning, faults."
import math

import pytest
import torch

from vugen.decode.pixel_diffusion import (
    SIZES, LatentStretch, PixelDiffusionDecoder, RelativeAttention, build_size, describe_sizes, linear_velocity, match_grid, noise_for,
    relative_index, skip_widths, square_grid, to_signed, to_unit, upsampling_factor, with_estimates,
)
from vugen.errors import UserError


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    decoder = PixelDiffusionDecoder(base_channels=8, num_layers=2, precondition=0.85, shuffle_channels=4).eval()
    for parameter in decoder.parameters():  # an untrained decoder is silent: give every branch a voice
        if parameter.abs().sum() == 0: torch.nn.init.normal_(parameter, std=0.05)
    return decoder


def test_published_size_m_has_the_papers_parameters():
    millions = describe_sizes()
    assert abs(millions["M"] / 48 - 1) < 0.03
    assert set(millions) == set(SIZES) and millions["tiny"] < 4
    published = [millions[size] for size in ("S", "B", "M", "L", "XL", "H")]
    assert published == sorted(published)


def test_sizes_halve_three_times_and_keep_one_transformer():
    decoder = build_size("M", "meta", latent_dim=64, image_size=256, grid_size=16)
    assert len(decoder.network.down.halve) == 3 and len(decoder.network.middle.blocks) == 12
    assert [len(level) for level in decoder.network.down.levels] == [2] * 4 and [len(level) for level in decoder.network.up.levels] == [3] * 4
    assert decoder.network.middle.blocks[0].attention.num_heads == 4   # clamp(288 / 64, 4, 16)


@pytest.mark.parametrize("image_size, grid_size, tokens", [(32, 8, 64), (64, 8, 64), (64, 16, 256), (32, 4, 16), (48, 12, 144)])
def test_grids_and_picture_sizes(image_size, grid_size, tokens):
    decoder = PixelDiffusionDecoder(latent_dim=4, image_size=image_size, grid_size=grid_size, base_channels=8, num_layers=1)
    assert decoder.decode(torch.randn(2, tokens, 4), 1).shape == (2, 3, image_size, image_size)


def test_256_pixels_from_16_by_16_latents_on_meta():
    decoder = build_size("S", "meta", latent_dim=64, image_size=256, grid_size=16)
    meta = dict(device="meta")
    velocity, hidden = decoder(torch.zeros(1, 3, 256, 256, **meta), torch.zeros(1, **meta), torch.zeros(1, 256, 64, **meta))
    assert velocity.shape == (1, 3, 256, 256) and hidden.shape == (1, 32 * 32, decoder.hidden_size)


def test_untrained_decoder_predicts_the_linear_guess():
    torch.manual_seed(0)
    x_t, t, latents = torch.randn(3, 3, 32, 32), torch.rand(3), torch.randn(3, 64, 8)
    plain, tuned = PixelDiffusionDecoder(base_channels=8), PixelDiffusionDecoder(base_channels=8, precondition=0.7)
    assert plain.velocity(x_t, t, latents).abs().max() == 0
    assert torch.allclose(tuned.velocity(x_t, t, latents), linear_velocity(x_t, t, 0.7))


@pytest.mark.parametrize("moment", [0.25, 0.85])
@pytest.mark.parametrize("time", [0.0, 0.3, 0.8, 1.0])
def test_linear_velocity_is_the_least_squares_guess(moment, time):
    generator = torch.Generator().manual_seed(1)
    data, noise = torch.randn(200_000, generator=generator) * math.sqrt(moment), torch.randn(200_000, generator=generator)
    x_t = time * data + (1 - time) * noise
    best = (x_t * (data - noise)).mean() / x_t.square().mean()
    slope = linear_velocity(torch.ones(1, 1, 1, 1), torch.tensor([time]), moment).item()
    assert abs(slope - best.item()) < 0.02


def test_decode_is_a_function_of_seed_and_index(decoder):
    latents = torch.randn(5, 64, 8, generator=torch.Generator().manual_seed(0))
    pictures = decoder.decode(latents, 3, seed=1)
    assert torch.equal(pictures, decoder.decode(latents, 3, seed=1))
    assert torch.allclose(pictures[:2], decoder.decode(latents[:2], 3, seed=1), atol=1e-5)
    assert not torch.allclose(pictures, decoder.decode(latents, 3, seed=2), atol=1e-3)


def test_noise_is_normal_and_independent_across_indices():
    noise = noise_for(3, range(64), (3, 16, 16))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    rows = noise.flatten(1)
    correlation = torch.corrcoef(rows) - torch.eye(64)
    assert correlation.abs().max() < 0.2
    assert torch.equal(noise_for(3, [63], (3, 16, 16))[0], noise[63])


def test_latents_steer_every_level(decoder):
    x_t, t = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    latents = torch.zeros(1, 64, 8, requires_grad=True)
    decoder.velocity(x_t, t, latents)[..., :4, :4].sum().backward()
    influence = latents.grad[0].abs().sum(-1).view(8, 8)
    assert influence[0, 0] == influence.max()                    # its own corner most
    assert influence.min() > 0                                   # through the transformer, every place


def test_time_matters(decoder):
    x_t, latents = torch.zeros(2, 3, 32, 32), torch.zeros(2, 64, 8)
    early, late = decoder.velocity(x_t, torch.tensor([0.1, 0.9]), latents)
    assert not torch.allclose(early, late, atol=1e-4)


def test_film_reports_an_estimate_a_step_and_changes_nothing(decoder):
    latents, film = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0)), []
    pictures = decoder.decode(latents, 4, callback=lambda step, t, estimate: film.append((step, t, estimate)))
    assert [step for step, _, _ in film] == [0, 1, 2, 3] and [t for _, t, _ in film] == [0, 0.25, 0.5, 0.75]
    assert all(estimate.shape == (2, 3, 32, 32) and 0 <= estimate.min() and estimate.max() <= 1 for _, _, estimate in film)
    assert torch.equal(pictures, decoder.decode(latents, 4))
    field = lambda x, t: x
    assert with_estimates(field, None) is field


def test_relative_bias_depends_on_the_offset_only():
    index = relative_index(6, 6, window=3)
    at = lambda a, b: index[a[0] * 6 + a[1], b[0] * 6 + b[1]]
    assert at((1, 1), (2, 3)) == at((3, 2), (4, 4)) != at((2, 3), (1, 1))
    assert at((0, 0), (5, 5)) == at((0, 0), (2, 2))              # beyond the window: the edge's value
    assert index.unique().numel() == 25


def test_the_index_of_the_relative_bias_is_made_once_and_serves_training_too(monkeypatch):
    from vugen.decode import pixel_diffusion
    made, real = [], pixel_diffusion.relative_index
    monkeypatch.setattr(pixel_diffusion, "relative_index", lambda *sizes: made.append(sizes) or real(*sizes))
    pixel_diffusion.kept_index.cache_clear()
    attention, x = RelativeAttention(16, 4, window=4), torch.randn(2, 12, 16)
    with torch.inference_mode(): before = attention(x, (3, 4))
    for _ in range(3): assert torch.equal(attention(x, (3, 4)), before)
    torch.nn.init.normal_(attention.out.weight)
    attention(x, (3, 4)).square().sum().backward()
    assert attention.bias.grad.abs().sum() > 0 and made == [(3, 4, 4)]
    attention(torch.randn(2, 9, 16), (3, 3))
    assert made == [(3, 4, 4), (3, 3, 4)]


def test_attention_with_equal_bias_equals_plain_attention():
    torch.manual_seed(0)
    attention = RelativeAttention(16, 4, window=4)
    torch.nn.init.normal_(attention.out.weight)
    x = torch.randn(2, 9, 16)
    before = attention(x, (3, 3))
    with torch.no_grad(): attention.bias += 2.5                  # softmax ignores a constant
    assert torch.allclose(before, attention(x, (3, 3)), atol=1e-5)
    with torch.no_grad(): attention.bias[24] += 5.0              # offset (0, 0) of window 4: row 3·7+3
    assert not torch.allclose(before, attention(x, (3, 3)), atol=1e-3)


def test_match_grid_and_stretch():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(match_grid(match_grid(x, (8, 8)), (4, 4)), x) and match_grid(x, (4, 4)) is x
    plain, shuffled = LatentStretch(1, 2, 0), LatentStretch(1, 2, 3)
    assert plain(x, (8, 8)).shape == (1, 1, 8, 8) and shuffled(x, (8, 8)).shape == (1, 4, 8, 8)
    assert torch.equal(shuffled(x, (8, 8))[:, :1], plain(x, (8, 8)))


def test_skip_widths_are_used_up():
    widths = [8, 16, 24, 24]
    assert len(skip_widths(widths)) == 3 * len(widths)


def test_one_batch_can_be_learned_from_its_latents():
    torch.manual_seed(0)
    decoder = PixelDiffusionDecoder(latent_dim=4, image_size=16, grid_size=4, base_channels=8, num_layers=1, precondition=0.85, shuffle_channels=4)
    images, latents = torch.rand(4, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3), torch.randn(4, 16, 4)
    optimizer, signed, t = torch.optim.Adam(decoder.parameters(), 5e-3), to_signed(images), torch.zeros(4)
    error = lambda: (decoder.decode(latents, 1) - images).square().mean().item()
    before = error()
    for _ in range(60):                                          # from pure noise, so that only the latents can tell
        noise = torch.randn(signed.shape)
        loss = (decoder.velocity(noise, t, latents) - (signed - noise)).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert error() < 0.6 * before


def test_save_and_load(tmp_path, decoder):
    decoder.save_pretrained(tmp_path / "pixel_decoder")
    again = PixelDiffusionDecoder.from_pretrained(tmp_path / "pixel_decoder")
    latents = torch.randn(2, 64, 8)
    assert torch.equal(again.decode(latents, 2), decoder.decode(latents, 2)) and again.config == {**decoder.config, "multipliers": [1, 2, 3, 3]}


def test_values_stay_in_range(decoder):
    pictures = decoder.decode(torch.randn(2, 64, 8) * 50, 2)
    assert torch.isfinite(pictures).all() and 0 <= pictures.min() and pictures.max() <= 1
    assert torch.allclose(to_unit(to_signed(torch.rand(5))), to_unit(to_signed(torch.rand(5))), atol=1)


@pytest.mark.parametrize("call, words", [
    (lambda: upsampling_factor(256, 18), "not a whole number"),
    (lambda: upsampling_factor(36, 9), "multiple of 8"),
    (lambda: square_grid(65), "square grid"),
    (lambda: build_size("XS"), "choose one of"),
    (lambda: PixelDiffusionDecoder(image_size=32, grid_size=7), "whole number"),
    (lambda: PixelDiffusionDecoder(base_channels=8).decode(torch.zeros(1, 64, 9), 1), "[B, N, 8]"),
    (lambda: PixelDiffusionDecoder(base_channels=8).decode(torch.zeros(1, 50, 8), 1), "50"),
])
def test_bad_input_is_told_in_a_sentence(call, words):
    with pytest.raises(UserError) as error: call()
    assert words in str(error.value)
