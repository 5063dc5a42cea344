"Perceptual distances and feature alignment: identities, gradients, names, faults."
import sys

import pytest
import torch

from vugen.decode.perceptual import (
    EfficientNetPerceptual, FeatureAlignment, LPIPSPerceptual, alignment_encoder, build_perceptual, feature_distance, tokens_to_grid, unit_channels,
)
from vugen.errors import UserError
from vugen.models.seams import Patches


@pytest.fixture(scope="module")
def perceptual(): return EfficientNetPerceptual(image_size=32, layers=2)


def test_distance_is_zero_only_for_equal_pictures(perceptual):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert perceptual(images, images).abs().max() < 1e-6
    near, far = perceptual(images, images + 0.02 * torch.randn(images.shape)), perceptual(images, images.flip(0))
    assert near.shape == (3,) and 0 < near[0] < far[0]


def test_only_pictures_get_gradients(perceptual):
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    perceptual(images, torch.rand(1, 3, 32, 32)).sum().backward()
    assert images.grad.abs().sum() > 0 and not any(p.requires_grad for p in perceptual.parameters())
    assert not perceptual.train().training and not perceptual.features.training


def test_small_pictures_are_enlarged():
    perceptual = EfficientNetPerceptual(image_size=64, layers=1)
    assert perceptual.maps(torch.rand(1, 3, 32, 32))[0].shape[-1] == 32     # stride 2 at 64 pixels


def test_unit_channels_survive_a_dead_place():
    features = torch.randn(1, 4, 2, 2)
    features[..., 0, 0] = 0
    scaled = unit_channels(features)
    assert torch.isfinite(scaled).all() and torch.allclose(scaled.norm(dim=1)[0, 1], torch.ones(2), atol=1e-4)
    assert feature_distance([features], [features]).item() == 0


def test_names_do_not_pretend():
    assert "EfficientNet" in EfficientNetPerceptual.name and "LPIPS" not in EfficientNetPerceptual.name


def test_missing_lpips_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="pip install lpips"): LPIPSPerceptual()
    with pytest.raises(UserError, match="choose efficientnet"): build_perceptual("alexnet")
    assert build_perceptual("none") is None


def test_alignment_is_zero_for_parallel_tokens_and_two_for_opposite():
    alignment = FeatureAlignment(4, 4)
    alignment.projector = torch.nn.Identity()
    tokens = torch.randn(2, 9, 4)
    assert alignment(tokens, 3 * tokens).abs() < 1e-6 and abs(alignment(tokens, -tokens) - 2) < 1e-5


def test_tokens_are_brought_to_the_decoders_grid():
    tokens = torch.arange(16.0).view(1, 16, 1)
    patches = Patches(tokens, (4, 4), tokens.mean(1))
    assert tokens_to_grid(patches, 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(tokens_to_grid(patches, 16), tokens) and tokens_to_grid(patches, 64).shape == (1, 64, 1)


def test_alignment_encoder_follows_the_grid():
    assert alignment_encoder(None, 4) is None
    encoder = alignment_encoder("efficientnet", 4)
    assert encoder.grid == (4, 4) and encoder(torch.rand(1, 3, 32, 32)).tokens.shape == (1, 16, encoder.hidden_size)
    with pytest.raises(UserError): alignment_encoder("./no-such-folder", 4)
