"""Frozen encoders: every family from a folder in the real format, against the transformers model called directly; faults; EfficientNet."""
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from vugen.data.images import sample_photographs, to_tensor
from vugen.encode.encoders import EfficientNetFeatures, EfficientNetLite0, FrozenEncoder, cut_patches, read_preprocessing, resize_images
from vugen.errors import UserError
from vugen.models.seams import VisionEncoder

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
VISION = dict(SMALL, image_size=32, patch_size=8)


def make(kind):
    torch.manual_seed(0)
    tf = transformers
    if kind == "clip": return tf.CLIPModel(tf.CLIPConfig(vision_config=VISION, text_config=dict(SMALL, vocab_size=50), projection_dim=8))
    if kind == "clip_vision": return tf.CLIPVisionModel(tf.CLIPVisionConfig(**VISION))
    if kind == "siglip": return tf.SiglipModel(tf.SiglipConfig(vision_config=VISION, text_config=dict(SMALL, vocab_size=50)))
    if kind == "siglip_vision": return tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION))
    if kind == "siglip2": return tf.Siglip2Model(tf.Siglip2Config(vision_config=dict(SMALL, patch_size=8, num_patches=16), text_config=dict(SMALL, vocab_size=50)))
    if kind == "dinov2": return tf.Dinov2Model(tf.Dinov2Config(**VISION))
    if kind == "dinov2_registers": return tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3))
    if kind == "ijepa": return tf.IJepaModel(tf.IJepaConfig(**VISION), add_pooling_layer=False)
    if kind == "vit": return tf.ViTModel(tf.ViTConfig(**VISION))
    if kind == "vjepa2":
        return tf.VJEPA2Model(tf.VJEPA2Config(patch_size=8, crop_size=32, frames_per_clip=4, tubelet_size=2, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                              mlp_ratio=2, pred_hidden_size=16, pred_num_attention_heads=2, pred_num_hidden_layers=1, pred_num_mask_tokens=2))


def direct_tokens(kind, model, pixels):
    "The transformers model called as its documentation says, prefix tokens stripped by what is known of each family."
    if kind in ("clip", "siglip"): model = model.vision_model
    if kind == "vjepa2": return model(pixel_values_videos=torch.stack([pixels, pixels], 1), skip_predictor=True).last_hidden_state
    if kind == "siglip2":
        return model.vision_model(pixel_values=cut_patches(pixels, 8), pixel_attention_mask=torch.ones(len(pixels), 16, dtype=torch.long),
                                  spatial_shapes=torch.tensor([[4, 4]] * len(pixels))).last_hidden_state
    prefix = {"clip": 1, "clip_vision": 1, "dinov2": 1, "dinov2_registers": 4, "vit": 1}.get(kind, 0)
    return model(pixel_values=pixels).last_hidden_state[:, prefix:]


KINDS = ["clip", "clip_vision", "siglip", "siglip_vision", "siglip2", "dinov2", "dinov2_registers", "ijepa", "vit", "vjepa2"]
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Each model saved once, with the preprocessing file its family uses."
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = folder, make(kind).eval()
        made[kind][1].save_pretrained(folder)
        name = "video_preprocessor_config.json" if kind == "vjepa2" else "preprocessor_config.json"
        (folder / name).write_text(json.dumps(dict(image_mean=MEAN, image_std=STD, resample=3, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})))
    return made


def images(size=32, count=3): return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_family_equals_the_model_called_directly(kind, folders):
    folder, model = folders[kind]
    encoder = FrozenEncoder.from_pretrained(folder)
    pixels = (images() - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad(): expected = direct_tokens(kind, model, pixels)
    found = encoder(images())
    assert isinstance(encoder, VisionEncoder)
    assert found.tokens.shape == (3, 16, 32) == (3, encoder.grid[0] * encoder.grid[1], encoder.hidden_size)
    assert found.grid == encoder.grid == (4, 4) and found.pooled.shape == (3, 32) and encoder.image_size == 32
    torch.testing.assert_close(found.tokens, expected)
    assert torch.equal(encoder(images()).tokens, found.tokens)
    assert not any(parameter.requires_grad for parameter in encoder.parameters()) and not encoder.train().training


@pytest.mark.parametrize("kind", ["clip", "vjepa2", "siglip2"])
def test_other_sizes_are_resized_and_rows_are_independent(kind, folders):
    encoder = FrozenEncoder.from_pretrained(folders[kind][0])
    large = images(50)
    torch.testing.assert_close(encoder(large).tokens, encoder(resize_images(large, 32, "bicubic")).tokens)
    torch.testing.assert_close(encoder(large).tokens[1:2], encoder(large[1:2]).tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "ijepa", "vit", "vjepa2"])
def test_another_picture_size_interpolates_positions(kind, folders):
    encoder = FrozenEncoder.from_pretrained(folders[kind][0], image_size=48)
    assert encoder.grid == (6, 6) and encoder(images(48)).tokens.shape == (3, 36, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_lie_in_reading_order(kind, folders):
    "Change one patch of the picture: the token that moves most is that patch's own."
    encoder = FrozenEncoder.from_pretrained(folders[kind][0])
    plain = images(count=1) * 0 + 0.5
    for row, column in ((0, 1), (2, 0), (3, 3)):
        marked = plain.clone()
        marked[:, :, row * 8:row * 8 + 8, column * 8:column * 8 + 8] = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(2))
        moved = (encoder(marked).tokens - encoder(plain).tokens).norm(dim=-1)[0]
        assert int(moved.argmax()) == row * 4 + column


def test_pixels_equal_transformers_own_processor(folders):
    picture = sample_photographs(("cat",))["cat"].crop((0, 0, 200, 200))
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    found = FrozenEncoder.from_pretrained(folders["clip"][0]).preprocess(to_tensor(picture, 200))
    assert (found - expected).abs().max() < 2 / 255 / min(STD)


@pytest.mark.parametrize("mode, resample", [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)])
@pytest.mark.parametrize("size", [33, 224])
def test_resize_equals_pillow(mode, resample, size):
    picture = sample_photographs(("coffee",))["coffee"].crop((100, 100, 220, 220))
    expected = np.asarray(picture.resize((size, size), resample)).transpose(2, 0, 1) / 255
    # Pillow rounds and clips between its two passes, so bicubic overshoot at sharp edges may differ more at single pixels.
    difference = np.abs(resize_images(to_tensor(picture, 120), size, mode)[0].numpy() - expected) * 255
    assert difference.mean() < 0.6 and np.quantile(difference, 0.999) < 2.5


def test_family_statistics_when_the_folder_is_silent(tmp_path):
    assert read_preprocessing(tmp_path, "clip")["mean"] == (0.48145466, 0.4578275, 0.40821073)
    assert read_preprocessing(tmp_path, "siglip2")["std"] == (0.5, 0.5, 0.5)
    assert read_preprocessing(tmp_path, "dinov2")["mean"] == (0.485, 0.456, 0.406)


def test_untrained_pooler_is_not_used(tmp_path, folders):
    "A folder without pooler weights (as ImageNet ViTs are published) gives the mean over patches, never a random vector."
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**VISION), add_pooling_layer=False).save_pretrained(tmp_path)
    found = FrozenEncoder.from_pretrained(tmp_path)(images())
    torch.testing.assert_close(found.pooled, found.tokens.mean(1))
    with_pooler = FrozenEncoder.from_pretrained(folders["vit"][0])(images())
    assert not torch.allclose(with_pooler.pooled, with_pooler.tokens.mean(1))


def broken(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["clip"][0], folder)
    return folder


def test_missing_folder_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"): FrozenEncoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="config.json is missing"): FrozenEncoder.from_pretrained(tmp_path)


def test_folder_without_weights(folders, tmp_path):
    folder = broken(folders, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no readable safetensors weights"): FrozenEncoder.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.99])
def test_truncated_weights(folders, tmp_path, keep):
    path = broken(folders, tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(UserError, match="no readable safetensors weights"): FrozenEncoder.from_pretrained(path.parent)


def test_weights_that_do_not_fill_the_model(folders, tmp_path):
    path = broken(folders, tmp_path) / "model.safetensors"
    weights = load_file(path)
    lost = next(key for key in weights if "vision" in key and "fc1.weight" in key)
    save_file({key: value for key, value in weights.items() if key != lost}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks weights"): FrozenEncoder.from_pretrained(path.parent)


def test_weights_of_another_architecture(folders, tmp_path):
    folder = broken(folders, tmp_path)
    shutil.copy(folders["dinov2"][0] / "model.safetensors", folder)
    with pytest.raises(UserError): FrozenEncoder.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"hidden_size": 3}', '{"model_type": "no such model"}'])
def test_foreign_config(folders, tmp_path, text):
    folder = broken(folders, tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"): FrozenEncoder.from_pretrained(folder)


def test_damaged_preprocessing_file(folders, tmp_path):
    folder = broken(folders, tmp_path)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="preprocessor_config.json"): FrozenEncoder.from_pretrained(folder)


def test_text_model_is_no_vision_encoder(tmp_path):
    transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bert model has no square image patches"): FrozenEncoder.from_pretrained(tmp_path)


def test_wrong_picture_size_and_shape(folders):
    with pytest.raises(UserError, match="multiple of 8"): FrozenEncoder.from_pretrained(folders["clip"][0], image_size=33)
    with pytest.raises(UserError, match=r"\[B, 3, H, W\]"): FrozenEncoder.from_pretrained(folders["clip"][0])(torch.zeros(3, 32, 32))


@pytest.fixture(scope="module")
def photographs(): return sample_photographs(("cat", "coffee", "rocket", "motorcycle"))


@pytest.mark.parametrize("stride, width", [(2, 16), (4, 24), (8, 40), (16, 112), (32, 320)])
def test_efficientnet_taps(stride, width, photographs):
    encoder = EfficientNetLite0(stride, 64)
    found = encoder(to_tensor(photographs["cat"], 100))
    assert found.tokens.shape == (1, (64 // stride) ** 2, width) and found.pooled.shape == (1, 1280) and isinstance(encoder, VisionEncoder)
    assert encoder.hidden_size == width and encoder.grid == (64 // stride,) * 2
    torch.testing.assert_close(found.as_map(), encoder.features(resize_images(to_tensor(photographs["cat"], 100), 64, "bicubic"))[encoder.tap])


def test_efficientnet_sees_the_cat_and_the_cup(photographs):
    best = EfficientNetLite0(image_size=224).logits(torch.cat([to_tensor(photographs[name], 224) for name in ("cat", "coffee")])).argmax(-1)
    assert int(best[0]) in range(281, 286) and int(best[1]) in (504, 967, 968)


def test_efficientnet_features_give_gradients_and_stay_frozen():
    features = EfficientNetFeatures().train()
    picture = torch.rand(2, 3, 64, 64, requires_grad=True)
    before = {name: value.clone() for name, value in features.named_buffers()}
    sum(tap.mean() for tap in features(picture)).backward()
    assert picture.grad.abs().sum() > 0 and not features.training and all(parameter.grad is None for parameter in features.parameters())
    assert all(torch.equal(value, before[name]) for name, value in features.named_buffers())
    assert features.channels == (16, 24, 40, 112, 320)


def test_efficientnet_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="no tap at stride 3"): EfficientNetLite0(3)
    with pytest.raises(UserError, match="multiple of 32"): EfficientNetLite0(16, 100)
