"Variational autoencoders: the Gaussian, our small one, published ones through diffusers, learning, faults."
import builtins
import json

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vugen.data.scenes import World, batch
from vugen.decode.vae import DIFFUSERS_VAES, ConvVAE, DiffusersVAE, Posterior, as_posterior, load_vae, vae_loss
from vugen.errors import UserError
from vugen.train.presets import TINY_WORLD

SMALL = dict(norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4)


def published(kind, **changes):
    import diffusers
    torch.manual_seed(0)
    widths = dict(block_out_channels=(8, 16, 16)) if kind == "AutoencoderKL" else dict(down_block_out_channels=(8, 16, 16), up_block_out_channels=(16, 16, 32))
    return getattr(diffusers, kind)(**{**SMALL, **widths, **changes}).eval()


@pytest.fixture(scope="module")
def images(): return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(1)
    return ConvVAE(widths=(8, 16, 16)).eval()


def test_divergence_is_that_of_torch():
    posterior = Posterior(3 * torch.randn(5, 4, 8, 8), 2 * torch.randn(5, 4, 8, 8))
    known = kl_divergence(Normal(posterior.mean, (posterior.log_variance / 2).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(posterior.kl(), known, rtol=1e-5, atol=1e-3)


def test_gaussian_is_that_of_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    moments = 40 * torch.randn(2, 8, 4, 4)                                       # some logarithms beyond the limits
    ours, theirs = as_posterior(moments), DiagonalGaussianDistribution(moments)
    assert torch.equal(ours.mean, theirs.mode()) and torch.equal(ours.log_variance, theirs.logvar)
    torch.testing.assert_close(ours.kl(), theirs.kl(), rtol=1e-5, atol=0)
    draw = lambda: torch.Generator().manual_seed(7)
    assert torch.equal(ours.sample(draw()), theirs.sample(draw()))


def test_draws_have_the_posteriors_moments():
    posterior = Posterior(torch.full((1, 1, 200, 200), 2.0), torch.full((1, 1, 200, 200), 0.5).log() * 2)
    drawn = posterior.sample(torch.Generator().manual_seed(0))
    assert abs(drawn.mean() - 2) < 0.01 and abs(drawn.std() - 0.5) < 0.01


def test_default_size():
    vae = ConvVAE()
    assert sum(value.numel() for value in vae.parameters()) < 500_000
    assert (vae.latent_channels, vae.factor) == (4, 4)
    assert vae.encode(torch.rand(1, 3, 64, 32)).shape == (1, 4, 16, 8)


def test_scale_is_measured_and_undone(vae, images):
    raw = vae.posterior(images * 2 - 1).mean
    fitted = ConvVAE(widths=(8, 16, 16))
    fitted.load_state_dict(vae.state_dict())
    fitted.eval().fit_scale(images.split(2))
    latents = fitted.encode(images)
    torch.testing.assert_close(latents, (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fitted.decode(latents), vae.decode(raw), rtol=1e-4, atol=1e-5)   # the scale of `vae` is 1, its shift 0


def test_encoding_draws_only_when_asked(vae, images):
    draw = lambda seed: vae.encode(images, torch.Generator().manual_seed(seed))
    assert torch.equal(vae.encode(images), vae.encode(images)) and torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_saving_keeps_weights_and_statistics(vae, images, tmp_path):
    vae = ConvVAE(widths=(8, 16, 16)).fit_scale([images])
    again = load_vae(vae.save_pretrained(tmp_path / "vae"))
    assert isinstance(again, ConvVAE) and torch.equal(again.encode(images), vae.encode(images)) and not any(value.requires_grad for value in again.parameters())


def test_four_pictures_are_learned():
    "The reconstruction error falls by a factor of ten within 60 steps."
    images = batch(World(**TINY_WORLD), seed=4, indices=range(4))["images"]
    torch.manual_seed(0)
    vae, curve = ConvVAE(), []
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, betas=(0.9, 0.95))
    for step in range(60):
        loss, parts, _ = vae_loss(vae, images, torch.Generator().manual_seed(step))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        curve.append(parts["reconstruction"].item())
    assert sum(curve[-5:]) / 5 < curve[0] / 10
    assert (vae.reconstruct(images) - images).square().mean() < 0.01


def test_loss_weighs_the_divergence_per_number(vae, images):
    loss, parts, painted = vae_loss(vae, images, torch.Generator().manual_seed(0), kl_weight=0.5)
    posterior = vae.posterior(images * 2 - 1)
    assert torch.allclose(parts["kl"], posterior.kl().mean() / 256) and torch.allclose(loss, parts["reconstruction"] + 0.5 * parts["kl"])
    assert torch.allclose(parts["reconstruction"], (painted - (images * 2 - 1)).square().mean())


@pytest.mark.parametrize("kind", DIFFUSERS_VAES)
@pytest.mark.parametrize("place", ["", "vae"])
def test_published_ones_mean_what_diffusers_means(kind, place, images, tmp_path):
    model = published(kind)
    model.save_pretrained(tmp_path / place)
    vae = load_vae(tmp_path)
    assert isinstance(vae, DiffusersVAE) and vae.name == kind and (vae.latent_channels, vae.factor) == (4, 4)
    with torch.no_grad():
        known = model.encode(images * 2 - 1).latent_dist.mode() * model.config.scaling_factor
        painted = (model.decode(known / model.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(vae.encode(images), known)
        torch.testing.assert_close(vae.decode(known), painted)
    assert not any(value.requires_grad for value in vae.parameters()) and not vae.train().model.training


def test_shift_and_statistics_of_published_ones(images):
    with torch.no_grad():
        model = published("AutoencoderKL", shift_factor=0.5, scaling_factor=2.0)
        raw = model.encode(images * 2 - 1).latent_dist.mode()
        torch.testing.assert_close(DiffusersVAE(model).encode(images), (raw - 0.5) * 2)
        model = published("AutoencoderKL", latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0], scaling_factor=0.5)
        mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1), torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
        vae = DiffusersVAE(model)
        torch.testing.assert_close(vae.encode(images), (raw - mean) * 0.5 / std)
        torch.testing.assert_close(vae.decode(vae.encode(images)), (model.decode(raw).sample / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_published_ones_are_saved_whole(images, tmp_path):
    vae = DiffusersVAE(published("AsymmetricAutoencoderKL"))
    again = load_vae(vae.save_pretrained(tmp_path / "vae"))
    with torch.no_grad(): assert torch.equal(again.encode(images), vae.encode(images))
    assert not list((tmp_path / "vae").glob("*.bin"))


@pytest.mark.parametrize("content, word", [({"_class_name": "UNet2DModel"}, "UNet2DModel"), ({}, "no model of diffusers"), ([], "no model of diffusers")])
def test_foreign_folders_are_named(content, word, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=word): load_vae(tmp_path)


def test_missing_torn_and_partial_weights(tmp_path):
    from safetensors.torch import load_file, save_file
    model = published("AutoencoderKL")
    model.save_pretrained(tmp_path)
    path, = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if not name.startswith("decoder.conv_out")}, path)
    with pytest.raises(UserError, match="decoder.conv_out"): load_vae(tmp_path)
    path.write_bytes(whole[:1000])
    with pytest.raises(UserError, match="cannot be loaded"): load_vae(tmp_path)
    path.unlink()
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")                 # a pickle is not opened
    with pytest.raises(UserError, match="cannot be loaded"): load_vae(tmp_path)


def test_names_that_lead_nowhere(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "config.json").write_text("{torn")
    for name, word in ((tmp_path / "nothing", "does not exist"), ("nothing", "does not exist"), (tmp_path / "file", "is a file"), (tmp_path, "JSON")):
        with pytest.raises(UserError, match=word): load_vae(name)


def test_without_diffusers(monkeypatch, tmp_path):
    published("AutoencoderKL").save_pretrained(tmp_path)
    real = builtins.__import__
    def without(name, *rest, **named):
        if name.split(".")[0] == "diffusers": raise ImportError(name)
        return real(name, *rest, **named)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install diffusers"): load_vae(tmp_path)


def test_hub_ids_are_asked_at_both_places(monkeypatch):
    import diffusers
    asked = []
    def absent(name, **place): asked.append((name, place)); raise OSError("offline")
    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", absent)
    with pytest.raises(UserError, match="someone/something"): load_vae("someone/something")
    assert asked == [("someone/something", {}), ("someone/something", {"subfolder": "vae"})]


def test_pictures_that_do_not_fit(vae):
    for shape in ((1, 3, 30, 32), (3, 32, 32)):
        with pytest.raises(UserError, match="multiples of 4"): vae.encode(torch.zeros(shape))
