"The decoder without diffusion: seam, size, determinism, learning, saving, faults."
import pytest
import torch

from vugen.decode.autoencoder import PixelAutoencoder, load_decoder
from vugen.decode.feed_forward import FeedForwardDecoder
from vugen.decode.pixel_diffusion import SIZES, PixelDiffusionDecoder, ResBlock, to_signed
from vugen.encode.reducers import MLPReducer
from vugen.errors import UserError
from vugen.models.seams import Decoder
from vugen.models.vit import VisionTransformer


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    decoder = FeedForwardDecoder(base_channels=8, num_layers=2, shuffle_channels=4).eval()
    for parameter in decoder.parameters():
        if parameter.abs().sum() == 0: torch.nn.init.normal_(parameter, std=0.05)
    return decoder


def test_steps_seed_and_neighbours_change_nothing(decoder):
    latents = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(0))
    pictures = decoder.decode(latents)
    assert isinstance(decoder, Decoder) and pictures.shape == (4, 3, 32, 32) and 0 <= pictures.min() and pictures.max() <= 1
    assert torch.equal(pictures, decoder.decode(latents, 25, seed=9)) and torch.allclose(pictures[1:2], decoder.decode(latents[1:2]), atol=1e-5)


@pytest.mark.parametrize("size", ["tiny", "M"])
def test_it_is_the_diffusion_decoder_less_time_and_noise(size):
    shape = dict(SIZES[size], **(dict(latent_dim=64, image_size=256, grid_size=16) if size == "M" else {}))
    with torch.device("meta"): plain, diffusion = FeedForwardDecoder(**shape), PixelDiffusionDecoder(**shape)
    kept = {name.replace("conditioning.", ""): value.shape for name, value in diffusion.named_parameters() if ".time." not in name}
    ours = {name: value.shape for name, value in plain.named_parameters()}
    assert set(ours) == set(kept) and [name for name in ours if ours[name] != kept[name]] == ["network.conv_in.weight"]
    assert sum(p.numel() for p in plain.parameters()) > 0.93 * sum(p.numel() for p in diffusion.parameters())


def test_a_block_without_time_reads_none():
    block = ResBlock(8, 8, 0, 8)
    assert block.time is None and block(torch.randn(1, 8, 4, 4), None, torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)


def test_one_batch_can_be_learned():
    torch.manual_seed(0)
    decoder = FeedForwardDecoder(latent_dim=4, image_size=16, grid_size=4, base_channels=8, num_layers=1, shuffle_channels=4)
    images, latents = torch.rand(4, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3), torch.randn(4, 16, 4)
    optimizer, losses = torch.optim.Adam(decoder.parameters(), 5e-3), []
    for _ in range(40):
        loss = (decoder(latents)[0] - to_signed(images)).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert (decoder.decode(latents) - images).square().mean() < 0.3 * (0.5 - images).square().mean()


def test_every_latent_matters_everywhere_and_more_at_home(decoder):
    latents = torch.zeros(1, 64, 8, requires_grad=True)
    decoder(latents)[0][..., :4, :4].sum().backward()
    influence = latents.grad[0].abs().sum(-1).view(8, 8)
    assert influence[:2, :2].mean() > 2 * influence[-2:, -2:].mean() and influence.min() > 0


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_saving_in_any_precision(dtype, tmp_path, decoder):
    decoder.save_pretrained(tmp_path, dtype)
    again, latents = load_decoder(tmp_path), torch.randn(2, 64, 8)
    rounded = {name: value if dtype is None else value.to(dtype).float() for name, value in decoder.state_dict().items()}
    assert all(torch.equal(value, rounded[name]) and value.dtype == torch.float32 for name, value in again.state_dict().items())
    assert (again.decode(latents) - decoder.decode(latents)).abs().max() < (1e-9 if dtype is None else 0.05)
    assert all(value.dtype == torch.float32 for value in decoder.state_dict().values())             # the model itself is left alone


def test_it_plugs_into_the_autoencoder(decoder):
    pair = PixelAutoencoder(VisionTransformer(hidden_size=32, num_layers=1, num_heads=2), MLPReducer(32, 8), decoder).eval()
    images = torch.rand(3, 3, 50, 40)
    assert torch.equal(pair.reconstruct(images), decoder.decode(pair.encode(images)))
    with pytest.raises(UserError, match="latents of 4"): PixelAutoencoder(VisionTransformer(hidden_size=32, num_layers=1, num_heads=2), MLPReducer(32, 4), decoder)


def test_bad_input_is_told_in_a_sentence(decoder, tmp_path):
    with pytest.raises(UserError, match=r"\[B, N, 8\]"): decoder.decode(torch.zeros(1, 64, 9))
    with pytest.raises(UserError, match="square grid"): decoder.decode(torch.zeros(1, 50, 8))
    with pytest.raises(UserError, match="whole number"): FeedForwardDecoder(image_size=32, grid_size=7)
    MLPReducer(32, 8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds a MLPReducer"): load_decoder(tmp_path)


def test_the_recommended_steps_of_a_diffusion_decoder(tmp_path):
    torch.manual_seed(0)
    decoder, latents = PixelDiffusionDecoder(base_channels=8, num_layers=1), torch.randn(1, 64, 8)
    torch.nn.init.normal_(decoder.network.conv_out.weight, std=0.1)
    decoder.save_pretrained(tmp_path)
    one, eight = PixelDiffusionDecoder.from_pretrained(tmp_path, num_inference_steps=1), PixelDiffusionDecoder.from_pretrained(tmp_path)
    assert torch.equal(one.decode(latents), decoder.decode(latents, 1)) and torch.equal(eight.decode(latents), decoder.decode(latents, 8))
    pair = lambda part: PixelAutoencoder(VisionTransformer(hidden_size=32, num_layers=1, num_heads=2), MLPReducer(32, 8), part).eval()
    assert torch.equal(pair(one).decode(latents), decoder.decode(latents, 1)) and torch.equal(pair(one).decode(latents, 3), decoder.decode(latents, 3))
