"Features of folders: what is read, left out, kept, refused; and statistics of a reference."
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from vugen.errors import UserError
from vugen.evaluate.features import Extractor, FeatureStore, build_extractor, folder_features, middle_square, picture_files, squeezed, squeezed_float
from vugen.evaluate.reference import ReferenceStatistics, moments


def small(pixels): return torch.nn.functional.adaptive_avg_pool2d(pixels, 3).flatten(1)


def toy(network=small, **more): return Extractor(**{**dict(name="toy", size=16, resize="squeezed", prepare=squeezed, network=network, weights="none"), **more})


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for place in range(7):
        path = tmp_path / "pictures" / ("a" if place % 2 else "b") / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20 + place, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def test_every_picture_of_any_size_in_every_folder(folder, tmp_path):
    found = folder_features(toy(), folder, batch_size=3, cache=tmp_path / "known")
    assert found.names == list(picture_files(folder)) == ["a/1.png", "a/3.png", "a/5.png", "b/0.png", "b/2.png", "b/4.png", "b/6.png"] and found.values.shape == (7, 27)
    by_hand = small(squeezed(Image.open(folder / "b/4.png"), 16)[None]).numpy()[0]
    np.testing.assert_allclose(found.values[5], by_hand, rtol=1e-6)


def test_unreadable_pictures_are_named_and_the_rest_is_measured(folder, tmp_path):
    (folder / "torn.png").write_bytes((folder / "a/1.png").read_bytes()[:200])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>not found</html>")
    found = folder_features(toy(), folder, cache=tmp_path / "known")
    assert len(found) == 7 and set(found.unreadable) == {"torn.png", "empty.png", "page.jpg"} and all(str(folder) in why for why in found.unreadable.values())
    assert list(found.note()) == ["3 of 10 pictures"]
    for path in list(folder.glob("?/*")): path.unlink()
    with pytest.raises(UserError, match="No picture"): folder_features(toy(), folder, cache=tmp_path / "known")


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_a_folder_without_pictures(tmp_path, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=place): folder_features(toy(), tmp_path / place)


def test_features_that_are_not_finite_name_their_picture(folder, tmp_path):
    target = squeezed(Image.open(folder / "a/3.png"), 16)
    def broken(pixels): return torch.where((pixels - target).abs().amax((1, 2, 3))[:, None] == 0, torch.nan, small(pixels))
    for _ in range(2): # what has no features is not kept either
        found = folder_features(toy(broken), folder, batch_size=1, cache=tmp_path / "known")
        assert "a/3.png" not in found.names and len(found) == 6 and "not finite" in found.note()["1 of 7 pictures"] and np.isfinite(found.values).all()
    with pytest.raises(UserError, match="No picture in .* not finite"): folder_features(toy(lambda pixels: small(pixels) * torch.nan, resize="other"), folder, cache=tmp_path / "known")


def test_a_killed_run_goes_on_and_nothing_is_extracted_twice(folder, tmp_path):
    seen = []
    def dies(pixels):
        if len(seen) == 4: raise KeyboardInterrupt
        seen.extend(pixels)
        return small(pixels)
    with pytest.raises(KeyboardInterrupt): folder_features(toy(dies), folder, batch_size=2, cache=tmp_path / "known")
    again = folder_features(toy(), folder, cache=tmp_path / "known")
    assert again.extracted == 3
    (folder / "b/0.png").rename(folder / "zero.png")
    moved = folder_features(toy(), folder, cache=tmp_path / "known")
    assert moved.extracted == 0 and np.array_equal(moved.values[moved.names.index("zero.png")], again.values[again.names.index("b/0.png")])
    assert folder_features(toy(resize="another"), folder, cache=tmp_path / "known").extracted == 7
    for path in (tmp_path / "known").rglob("*.safetensors"): path.write_bytes(path.read_bytes()[:40])
    assert folder_features(toy(), folder, cache=tmp_path / "known").extracted == 7
    assert not FeatureStore(toy(), tmp_path / "other").rows


def test_resizing_against_pillow():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 50, 3), dtype=np.uint8))
    assert np.array_equal(squeezed(picture, 9).permute(1, 2, 0).mul(255).round().byte(), np.array(picture.resize((9, 9), Image.Resampling.BICUBIC)))
    assert torch.equal(middle_square(picture, 31), squeezed(picture.crop((9, 0, 40, 31)), 31))
    exact = np.stack([np.array(Image.fromarray(np.array(band, np.float32)).resize((9, 9), Image.Resampling.BICUBIC)) for band in picture.split()])
    np.testing.assert_allclose(squeezed_float(picture, 9) * 255, exact.clip(0, 255), atol=1e-4)


def test_a_whole_clip_gives_the_vectors_that_its_own_model_gives(tmp_path):
    from transformers import CLIPModel
    from vugen.understand.pretrained import save_pair_miniature
    save_pair_miniature("clip", tmp_path / "clip-whole")
    extractor, model = build_extractor(f"clip:{tmp_path / 'clip-whole'}"), CLIPModel.from_pretrained(tmp_path / "clip-whole").eval()
    side = model.config.vision_config.image_size
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    mean, std = (torch.tensor(value)[:, None, None] for value in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    pixels = (torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 - mean) / std
    with torch.no_grad(): expected = model.visual_projection(model.vision_model(pixels[None]).pooler_output)
    np.testing.assert_allclose(extractor([picture]), torch.nn.functional.normalize(expected, dim=-1), rtol=1e-4, atol=1e-6)
    assert extractor([picture]).shape == (1, model.config.projection_dim) and not extractor.scores


def test_clip_vectors_equal_those_of_transformers(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, projection_dim=16)).eval()
    model.save_pretrained(tmp_path / "clip-toy")
    extractor = build_extractor(f"clip:{tmp_path / 'clip-toy'}")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    mean, std = (torch.tensor(value)[:, None, None] for value in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    pixels = (torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 - mean) / std
    with torch.no_grad(): expected = model(pixels[None]).image_embeds
    np.testing.assert_allclose(extractor([picture]), torch.nn.functional.normalize(expected, dim=-1), rtol=1e-4, atol=1e-6)
    assert extractor.name == "clip-toy" and not extractor.scores
    with pytest.raises(UserError, match="config.json"): build_extractor(f"clip:{tmp_path}")


@pytest.mark.parametrize("name", ["resnet", "inception", "clip:", "efficientnet:big", "inception:/nowhere.pth", "encoder:/nowhere"])
def test_extractors_that_there_are_not(name):
    with pytest.raises(UserError): build_extractor(name)


def test_moments_against_numpy():
    values = (np.random.default_rng(0).normal(size=(500, 9)) + 1000).astype(np.float32)
    mean, covariance = moments(values, rows=33)
    np.testing.assert_allclose(covariance, np.cov(values.astype(np.float64), rowvar=False), rtol=1e-9)
    with pytest.raises(UserError): moments(values[:1])


def test_statistics_that_do_not_fit_or_are_torn_or_are_something_else(folder, tmp_path):
    found = folder_features(toy(), folder, cache=tmp_path / "known")
    path = ReferenceStatistics.of(found).save(tmp_path / "real.safetensors")
    whole = ReferenceStatistics.load(path)
    whole.check(toy())
    assert np.array_equal(whole.features, found.values) and whole.names == found.names
    with pytest.raises(UserError, match="same extractor"): whole.check(toy(resize="another"))
    for size in (5, 100, path.stat().st_size - 7):
        (tmp_path / "torn").write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match="truncated"): ReferenceStatistics.load(tmp_path / "torn")
    (tmp_path / "evil").write_bytes(pickle.dumps(Distrusted()))
    torch.save({"mean": torch.zeros(3)}, tmp_path / "torch.pt")
    np.savez(tmp_path / "old.npz", mu=np.zeros(3), sigma=np.eye(3))
    for name in ("evil", "torch.pt", "old.npz", "none"):
        with pytest.raises(UserError, match=name): ReferenceStatistics.load(tmp_path / name)
    assert not Distrusted.ran
    from safetensors.numpy import save_file
    save_file({"weight": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="that vugen wrote"): ReferenceStatistics.load(tmp_path / "model.safetensors")


class Distrusted:
    ran = False
    def __reduce__(self): return _run, ()


def _run(): Distrusted.ran = True


def test_a_kill_costs_seconds_and_not_the_run(folder, tmp_path, monkeypatch):
    seen, now = [], [0.0]
    monkeypatch.setattr("vugen.evaluate.features.time.monotonic", lambda: now[0])
    def slow(pixels):
        if len(seen) == 5: os._exit(9)  # as SIGKILL ends it: nothing runs afterwards
        seen.extend(pixels)
        now[0] += 6
        return small(pixels)
    child = os.fork()
    if not child: folder_features(toy(slow), folder, batch_size=1, cache=tmp_path / "known"); os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert folder_features(toy(), folder, cache=tmp_path / "known").extracted <= 4


@pytest.mark.parametrize("wrong", [{"n": "thirty"}, {"n": "-5"}, {"n": "1"}, {"names": "[broken"}, {"names": "3"}, {"covariance": -1}])
def test_statistics_that_cannot_be_are_refused(tmp_path, wrong):
    from safetensors.numpy import load_file, save_file
    values = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    about = {"format": "vugen reference statistics 1", "n": "9", "extractor": "toy", "fingerprint": "0", "resize": "none", "names": "null", **{key: value for key, value in wrong.items() if key != "covariance"}}
    mean, covariance = moments(values)
    save_file({"mean": mean, "covariance": covariance * wrong.get("covariance", 1)}, tmp_path / "s.safetensors", about)
    with pytest.raises(UserError, match="s.safetensors"): ReferenceStatistics.load(tmp_path / "s.safetensors")
    save_file(load_file(tmp_path / "s.safetensors") | {"covariance": covariance}, tmp_path / "s.safetensors", {**about, "n": "9", "names": "null"})
    assert ReferenceStatistics.load(tmp_path / "s.safetensors").n == 9
