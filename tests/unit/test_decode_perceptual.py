"Perceptual distances and feature alignment: identities, gradients, names, faults."
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vugen.decode.perceptual import (
    LPIPSVGG, VGG16, EfficientNetPerceptual, FeatureAlignment, GridConvolution, LPIPSPerceptual, alignment_encoder, build_perceptual, feature_distance, lpips_weights,
    spatial_normalise, tokens_to_grid, unit_channels,
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


@pytest.fixture(scope="module")
def published():
    "Random weights under the names that torchvision and lpips publish."
    torch.manual_seed(0)
    numbers, place, trunk, width = [], 0, {}, 3
    for step in VGG16:
        if step == "halve": place += 1; continue
        trunk |= {f"features.{place}.weight": torch.randn(step, width, 3, 3) * (2 / (9 * width)) ** 0.5, f"features.{place}.bias": torch.randn(step) * 0.1}
        numbers.append(place); place, width = place + 2, step
    assert numbers == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    return trunk, {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1) for k, width in enumerate((64, 128, 256, 512, 512))}


def lpips_by_hand(trunk, linear, first, second):
    "The published formula in numpy's float64: VGG16 up to relu5_3, unit vectors, squared differences, weights, means, sum."
    windows = lambda x: np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1))), (3, 3), (1, 2))
    def maps(image):
        x, place, kept = (2 * image - 1 - np.array([-.030, -.088, -.188])[:, None, None]) / np.array([.458, .448, .450])[:, None, None], 0, []
        for step in (*VGG16, "halve"):
            if step == "halve":
                kept.append(x / (np.sqrt((x**2).sum(0, keepdims=True)) + 1e-10))
                if len(kept) == 5: return kept
                x, place = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).max((2, 4)), place + 1
                continue
            weight, bias = (trunk[f"features.{place}.{kind}"].double().numpy() for kind in ("weight", "bias"))
            x, place = np.maximum(np.einsum("chwij,ocij->ohw", windows(x), weight, optimize=True) + bias[:, None, None], 0), place + 2
    pairs = zip(maps(first), maps(second))
    return sum(((a - b) ** 2 * linear[f"lin{k}.model.1.weight"].double().numpy()[0]).sum(0).mean() for k, (a, b) in enumerate(pairs))


def test_lpips_equals_the_published_formula_in_float64(published, tmp_path):
    trunk, linear = published
    save_file(trunk, tmp_path / "vgg16.safetensors"), torch.save(linear, tmp_path / "vgg.pth")
    lpips, images = build_perceptual(f"lpips-vgg:{tmp_path}"), torch.rand(2, 2, 3, 16, 32, generator=torch.Generator().manual_seed(1))
    assert lpips.name == "LPIPS-VGG" and not any(p.requires_grad for p in lpips.parameters()) and not lpips.train().training
    expected = [lpips_by_hand(trunk, linear, a, b) for a, b in zip(images[0].double().numpy(), images[1].double().numpy())]
    np.testing.assert_allclose(lpips(images[0], images[1]), expected, rtol=1e-4)
    assert lpips(images[0], images[0]).abs().max() == 0
    start = torch.zeros(1, 3, 16, 16, requires_grad=True)
    lpips(start, images[0, :1, :, :, :16]).sum().backward()
    assert torch.isfinite(start.grad).all() and start.grad.abs().sum() > 0


def test_lpips_reads_every_published_layout_and_names_what_is_missing(published, tmp_path):
    trunk, linear = published
    taps = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
    whole = {f"net.slice{taps[int(name.split('.')[1])]}.{name.split('.', 1)[1]}": value for name, value in trunk.items()}
    whole |= {**linear, **{name.replace("lin", "lins."): value for name, value in linear.items()}, "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    torch.save(whole, tmp_path / "lpips.pt"), torch.save({**trunk, "classifier.0.bias": torch.zeros(4)}, tmp_path / "vgg16.pth")
    ours = LPIPSVGG.from_weights(tmp_path / "lpips.pt").state_dict()
    assert all(torch.equal(ours[name], value) for name, value in trunk.items()) and torch.equal(ours["linears.3"], linear["lin3.model.1.weight"])
    with pytest.raises(UserError, match="lacks linears.0"): LPIPSVGG.from_weights(tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match="does not exist"): build_perceptual("lpips-vgg:/nowhere/vgg")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="torn.safetensors holds no weights"): lpips_weights(tmp_path)


def test_lpips_unpickles_nothing(tmp_path):
    import pickle
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"features.0.weight": Distrusted()}, protocol=2))
    with pytest.raises(UserError, match="evil.pth"): lpips_weights(tmp_path)
    assert not Distrusted.ran


class Distrusted:
    ran = False
    def __reduce__(self): return _run, ()


def _run(): Distrusted.ran = True; return 0


def test_names_of_the_lpips_package(monkeypatch):
    from types import SimpleNamespace
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda net, verbose: torch.nn.Identity()))
    assert [LPIPSPerceptual(network).name for network in ("vgg", "alex")] == ["LPIPS-VGG", "LPIPS-AlexNet"]
    with pytest.raises(UserError, match="choose vgg"): build_perceptual("lpips-resnet")


def test_spatial_normalisation_and_the_convolution_against_numpy():
    torch.manual_seed(0)
    tokens = torch.randn(3, 16, 5) * 4 + 7
    by_hand = tokens.double().numpy()
    np.testing.assert_allclose(spatial_normalise(tokens), (by_hand - by_hand.mean(1, keepdims=True)) / by_hand.std(1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(spatial_normalise(tokens, 0.5), (by_hand - 0.5 * by_hand.mean(1, keepdims=True)) / by_hand.std(1, keepdims=True), atol=1e-5)
    head = GridConvolution(5, 6)
    padded, weight = np.pad(by_hand.reshape(3, 4, 4, 5), ((0, 0), (1, 1), (1, 1), (0, 0))), head.conv.weight.double().detach().numpy()
    place = sum(padded[:, 1 + i, 2 + j] @ weight[:, :, i, j].T for i in range(3) for j in range(3)) + head.conv.bias.double().detach().numpy()
    np.testing.assert_allclose(head(tokens).detach()[:, 1 * 4 + 2], place, rtol=1e-4, atol=1e-4)


def test_irepa_sees_layout_and_not_what_all_places_share():
    torch.manual_seed(0)
    alignment, hidden, targets = FeatureAlignment(4, 6, "irepa"), torch.randn(2, 9, 4), torch.randn(2, 9, 6)
    assert torch.allclose(alignment(hidden, targets), alignment(hidden, targets * 3 + 50), atol=1e-3)
    projected, normed = alignment.projector(hidden).detach().double().numpy(), spatial_normalise(targets).double().numpy()
    cosine = (projected * normed).sum(-1) / np.linalg.norm(projected, axis=-1) / np.linalg.norm(normed, axis=-1)
    assert alignment(hidden, targets).item() == pytest.approx(1 - cosine.mean(), abs=1e-5)
    assert "projector.0.weight" in FeatureAlignment(4, 6).state_dict()                       # the published head as before
    with pytest.raises(UserError, match="repa or irepa"): FeatureAlignment(4, 6, "cknna")


def test_dinov2_from_a_folder_guides_a_decoder_under_its_name(tmp_path):
    from transformers import Dinov2Config, Dinov2Model
    from vugen.decode.pixel_diffusion import PixelDiffusionDecoder
    from vugen.encode.reducers import MLPReducer
    from vugen.models.vit import VisionTransformer
    from vugen.train.decoder import DecoderTraining
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)).eval()
    model.save_pretrained(tmp_path / "dinov2-tiny")
    target, images = alignment_encoder(str(tmp_path / "dinov2-tiny"), 4), torch.rand(2, 3, 32, 32)
    assert target.grid == (4, 4) and target.image_size == 56
    with torch.no_grad(): theirs = model(target.preprocess(images)).last_hidden_state[:, 1:]
    torch.testing.assert_close(target(images).tokens, theirs, rtol=1e-4, atol=1e-4)
    for head in ("repa", "irepa"):
        training = DecoderTraining(VisionTransformer(hidden_size=32, num_layers=1, num_heads=2), MLPReducer(32, 8), PixelDiffusionDecoder(base_channels=8, num_layers=1), None, target, dict(alignment_head=head))
        loss, metrics = training(images, torch.Generator().manual_seed(0))
        loss.backward()
        assert set(metrics) == {"flow", "alignment (dinov2-tiny)", "estimate_mse"}
        assert loss.item() == pytest.approx(metrics["flow"].item() + 0.25 * metrics["alignment (dinov2-tiny)"].item(), abs=1e-6)
        assert all(p.grad is None for p in target.parameters()) and any(p.grad is not None for p in training.alignment.parameters())


def test_dinov2_b_out_of_reach_is_one_sentence(monkeypatch):
    import huggingface_hub
    asked = []
    def refuse(name, **options): asked.append(name); raise ConnectionError("no route")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match="facebook/dinov2-base is neither a folder here nor a hub model that can be reached") as told: alignment_encoder("dinov2-b", 4)
    assert asked == ["facebook/dinov2-base"] and "\n" not in str(told.value)


def test_lpips_on_alexnet_equals_torchmetrics(tmp_path, monkeypatch):
    "torchmetrics' own LPIPS and linear weights, on an AlexNet with random weights in the place of torchvision's."
    from torchmetrics.functional.image import lpips as theirs
    from vugen.decode.perceptual import LPIPSAlex
    torch.manual_seed(0)
    trunk, _ = LPIPSAlex.layers()
    save_file({f"features.{name}": value for name, value in trunk.state_dict().items()}, tmp_path / "alexnet.safetensors")
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda name, pretrained=False: trunk)
    judge, ours = theirs._LPIPS(net="alex"), build_perceptual(f"lpips-alex:{tmp_path}")
    first, second = torch.rand(2, 3, 70, 64), torch.rand(2, 3, 70, 64)
    with torch.no_grad(): expected, found = judge(first, second, normalize=True).flatten(), ours(first, second)
    assert ours.name == "LPIPS-AlexNet" and expected.min() > 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    (tmp_path / "alexnet.safetensors").unlink(), save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="lacks features.0.bias of LPIPS-AlexNet"): build_perceptual(f"lpips-alex:{tmp_path}")
