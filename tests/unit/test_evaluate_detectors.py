"Detectors in transformers' real formats against its own post-processing; colours by CLIP against plain arithmetic."
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn.functional import normalize

from vugen.errors import UserError
from vugen.evaluate import detectors
from vugen.evaluate.detectors import ClipColors, Detection, PaletteColors, TransformersDetector, class_name, cut_out, masked_instances, save_detector_miniature
from vugen.understand.pretrained import TransformersContrastive, pair_tokenizer, save_pair_miniature


def picture(seed, width=384, height=384): return Image.fromarray((np.random.default_rng(seed).random((height, width, 3)) * 255).astype(np.uint8))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    for kind in ("mask2former", "detr"): save_detector_miniature(kind, folder / kind)
    save_pair_miniature("clip", folder / "clip")
    return folder


def test_mask2former_instances_are_those_of_transformers(root):
    "At the side that transformers resizes masks to, both do the same arithmetic."
    detector, images = TransformersDetector(root / "mask2former"), [picture(0), picture(1)]
    inputs = detector.processor(images=images, return_tensors="pt")
    with torch.no_grad(): outputs = detector.model(**inputs)
    wanted = detector.processor.post_process_instance_segmentation(outputs, threshold=0.05, target_sizes=[(384, 384)] * 2, return_binary_maps=True)
    for mine, theirs in zip(detector(images), wanted):
        told = {(class_name(detector.model.config.id2label[info["label_id"]]), round(info["score"], 4)): mask for info, mask in zip(theirs["segments_info"], theirs["segmentation"])}
        assert len(mine) == len(theirs["segments_info"]) > 0
        for thing in mine:
            mask = told[thing.label, round(thing.score, 4)].numpy().astype(bool)
            assert (mask == thing.mask).all()
            rows, columns = np.where(mask)
            assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_detr_boxes_are_those_of_transformers(root):
    detector, images = TransformersDetector(root / "detr", batch_size=2), [picture(0, 60, 40), picture(1, 40, 40), picture(2, 60, 40)]
    found = detector(images)
    for image, mine in zip(images, found):
        with torch.no_grad(): outputs = detector.model(**detector.processor(images=[image], return_tensors="pt"))
        theirs = detector.processor.post_process_object_detection(outputs, threshold=0.05, target_sizes=[(image.height, image.width)])[0]
        assert len(mine) == len(theirs["scores"]) > 0 and detector.classes == {"dog", "potted plant", "tv"}
        assert np.allclose([thing.score for thing in mine], theirs["scores"], atol=1e-5) and np.allclose([thing.box for thing in mine], theirs["boxes"], atol=1e-3)


def test_owl_vit_looks_for_what_it_is_asked(tmp_path):
    tokenizer = pair_tokenizer("clip")
    tokenizer.model_max_length = 64
    shape, marks = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2), {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = transformers.OwlViTConfig(text_config=dict(shape, vocab_size=len(tokenizer), max_position_embeddings=64, **marks), vision_config=dict(shape, image_size=64, patch_size=16), projection_dim=32)
    transformers.OwlViTForObjectDetection(config).save_pretrained(tmp_path); tokenizer.save_pretrained(tmp_path)
    transformers.OwlViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="name classes"): TransformersDetector(tmp_path)
    detector = TransformersDetector(tmp_path, ["computer mouse", "dog"])
    found, = detector([picture(0, 60, 40)])
    assert detector.classes == {"mouse", "dog"} and found and {thing.label for thing in found} <= detector.classes
    words = [[f"a photo of a {name}" for name in ("mouse", "dog")]]
    inputs = detector.processor(text=words, images=[picture(0, 60, 40)], return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad(): theirs = detector.processor.post_process_grounded_object_detection(detector.model(**inputs), threshold=0.05, target_sizes=[(40, 60)])[0]
    assert np.allclose([thing.score for thing in found], theirs["scores"], atol=1e-5)


def test_what_is_no_detector_is_refused(root, tmp_path):
    with pytest.raises(UserError, match="clip model is no detector"): TransformersDetector(root / "clip")
    with pytest.raises(UserError, match="not a folder"): TransformersDetector(tmp_path / "nowhere")
    save_detector_miniature("detr", tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").rename(tmp_path / "bare" / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors"): TransformersDetector(tmp_path / "bare")
    save_detector_miniature("detr", tmp_path / "cut")
    weights = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[:len(weights) // 2])
    with pytest.raises(UserError, match="cannot be loaded"): TransformersDetector(tmp_path / "cut")
    save_detector_miniature("detr", tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**config, "encoder_layers": 2}))
    with pytest.raises(UserError, match="lacks weights"): TransformersDetector(tmp_path / "wide")


def test_the_fingerprint_is_that_of_the_weights(root, tmp_path):
    again, other = save_detector_miniature("detr", tmp_path / "again"), save_detector_miniature("detr", tmp_path / "other", seed=1)
    assert TransformersDetector(root / "detr").fingerprint == TransformersDetector(again).fingerprint != TransformersDetector(other).fingerprint


def test_an_instance_without_a_mask_is_none():
    assert masked_instances(torch.tensor([[9.0, 0.0]]), torch.full((1, 4, 4), -1.0), [(4, 4)]) == []


def test_colours_are_the_nearest_mean_of_three_sentences(root):
    matcher = TransformersContrastive.from_pretrained(root / "clip")
    model, processor = matcher.model, matcher.processor
    image, thing = picture(3, 50, 50), Detection("dog", 0.9, (5.0, 5.0, 30.0, 40.0))
    vectors = []
    for color in detectors.TEN_COLORS:
        with torch.no_grad(): said = normalize(model.get_text_features(**processor(text=[f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"], padding=True, return_tensors="pt")).pooler_output, dim=-1)
        vectors.append(normalize(said.mean(0), dim=0))
    with torch.no_grad(): seen = normalize(model.get_image_features(**processor(images=image.crop((5, 5, 30, 40)), return_tensors="pt")).pooler_output, dim=-1)
    wanted = detectors.TEN_COLORS[int((seen @ torch.stack(vectors).T).argmax())]
    assert ClipColors(matcher)(image, [thing], "dog") == [wanted] and ClipColors(matcher)(image, [], "dog") == []


def test_what_the_mask_leaves_out_is_gray():
    mask = np.zeros((10, 10), bool)
    mask[2:4, 2:4] = True
    cut = cut_out(Image.new("RGB", (10, 10), "red"), Detection("dog", 1.0, (1.0, 1.0, 5.0, 5.0), mask))
    assert cut.size == (4, 4) and cut.getpixel((0, 0)) == (153, 153, 153) and cut.getpixel((1, 1)) == (255, 0, 0)


def test_plain_ground_has_no_colour():
    assert PaletteColors()(Image.new("RGB", (20, 20), "white"), [Detection("star", 1.0, (2, 2, 12, 12))]) == [""]
