"""Corpora: pure functions of the sample's number, mixtures as asked for, and folders full of trouble."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vugen.data.corpora import HELD_OUT_PHOTOGRAPHS, TRAINING_PHOTOGRAPHS, ImageFolder, SceneCorpus, photograph_crops
from vugen.data.scenes import World, batch
from vugen.errors import UserError

MIXTURE = [(2, World()), (1, {"emoji": ["dog", "car"], "emoji_share": 1.0, "relations": ["left of", "above"]}), (1, "photographs")]


def test_a_sample_depends_on_its_number_alone():
    corpus = SceneCorpus(World(), 3, MIXTURE)
    whole = corpus.batch(range(40))
    for part in (range(7, 19), [33, 2, 11]):
        some = corpus.batch(part)
        for row, index in enumerate(part):
            assert torch.equal(some["images"][row], whole["images"][index]) and some["captions"][row] == whole["captions"][index] and some["scenes"][row] == whole["scenes"][index]
    assert not torch.equal(SceneCorpus(World(), 4, MIXTURE).batch(range(40))["images"], whole["images"])


def test_shares_are_kept_and_scenes_of_the_main_world_are_its_own():
    corpus = SceneCorpus(World(), 0, MIXTURE)
    chosen = corpus.sources(range(8000))
    assert np.bincount(chosen) / 8000 == pytest.approx([.5, .25, .25], abs=.02)
    rows = [index for index in range(30) if chosen[index] == 0]
    assert torch.equal(corpus.batch(rows)["images"], batch(World(), 0, rows)["images"])
    alone = SceneCorpus(World(), 0).batch(range(5))
    assert torch.equal(alone["images"], batch(World(), 0, range(5))["images"]) and all(alone["captions"])


def test_the_sources_of_a_mixture_are_what_they_say():
    corpus = SceneCorpus(World(), 0, MIXTURE)
    made, chosen = corpus.batch(range(60)), corpus.sources(range(60))
    for source, caption, scene in zip(chosen, made["captions"], made["scenes"]):
        if source == 2: assert caption == "" and scene is None
        else: assert {item.kind for item in scene.items} == {"shape" if source == 0 else "emoji"}
    assert made["images"].shape == (60, 3, 32, 32) and made["images"].min() >= 0 and made["images"].max() <= 1


@pytest.mark.parametrize("mixture", [[(1, "movies")], [(0, World())], [(-1, World()), (2, "photographs")], [(1, {"colour": "red"})]])
def test_impossible_mixtures_are_refused(mixture):
    with pytest.raises(UserError): SceneCorpus(World(), 0, mixture)


def test_held_out_photographs_never_enter_training_crops(monkeypatch):
    assert not set(HELD_OUT_PHOTOGRAPHS) & set(TRAINING_PHOTOGRAPHS) and SceneCorpus(World()).photographs == TRAINING_PHOTOGRAPHS
    crops = photograph_crops(1, range(30), 16)
    assert crops.shape == (30, 3, 16, 16) and len({crop.numpy().tobytes() for crop in crops}) == 30


@pytest.fixture
def folder(tmp_path):
    for number in range(5): Image.new("RGB", (20 + number, 12), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "sub").mkdir()
    Image.new("L", (9, 9), 200).save(tmp_path / "sub" / "grey.JPG", format="JPEG")
    (tmp_path / "0.txt").write_text("a  red\ncircle \n")
    rows = [{"file_name": "1.png", "text": "one"}, {"file_name": "sub/grey.JPG", "caption": "grey"}, {"file_name": "0.png", "text": "not this"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n[1]\n\n")
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


def test_captions_come_from_sidecars_first(folder):
    pictures = ImageFolder(folder, 8)
    captions = {pictures.name(number): pictures.caption(number) for number in range(len(pictures))}
    assert captions == {"0.png": "a red circle", "1.png": "one", "2.png": "", "3.png": "", "4.png": "", "sub/grey.JPG": "grey"}
    assert set(pictures.skipped) == {"metadata.jsonl:4", "metadata.jsonl:5"}


def test_every_epoch_visits_every_file_once_in_its_own_order(folder):
    pictures = ImageFolder(folder, 8)
    epochs = [pictures.batch(range(6 * epoch, 6 * epoch + 6))["names"] for epoch in range(4)]
    assert all(sorted(names) == sorted(epochs[0]) and len(set(names)) == 6 for names in epochs) and len({tuple(names) for names in epochs}) > 1
    assert torch.equal(ImageFolder(folder, 8).batch([8])["images"], pictures.batch([8])["images"])


def test_broken_files_are_named_and_never_fatal(folder):
    good = (folder / "2.png").read_bytes()
    (folder / "empty.png").touch()
    (folder / "half.png").write_bytes(good[: len(good) // 2])
    (folder / "text.jpg").write_text("hello")
    pictures = ImageFolder(folder, 8)
    names = [name for start in range(0, 27, 9) for name in pictures.batch(range(start, start + 9))["names"]]
    assert not {"empty.png", "half.png", "text.jpg"} & set(names) and len(names) == 27
    report = pictures.check()
    assert report["good"] == 6 and {"empty.png", "half.png", "text.jpg"} <= set(report["skipped"]) and all(report["skipped"].values())


def test_folders_without_a_readable_picture_are_refused(tmp_path, folder):
    with pytest.raises(UserError, match="nowhere"): ImageFolder(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="holds no picture"): ImageFolder(tmp_path / "bare")
    (tmp_path / "bare" / "a.png").write_text("x")
    with pytest.raises(UserError, match="can be read"): ImageFolder(tmp_path / "bare").batch([0])
