"""Corpora: pure functions of the sample's number, mixtures as asked for, and folders full of trouble."""
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from vugen.data.corpora import HELD_OUT_PHOTOGRAPHS, NAMES_KEPT, TRAINING_PHOTOGRAPHS, ImageFolder, Lane, Pairs, SceneCorpus, StreamCorpus, open_corpus, open_webdataset, photograph_crops, told_by
from vugen.data.scenes import World, batch
from vugen.errors import UserError
from vugen.train.presets import CORPUS, corpus_of

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


def test_class_folders_are_told_by_a_template(tmp_path):
    for name in ("great_white_shark", "n01440764"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name / "0.png")
    (tmp_path / "classes.json").write_text('{"n01440764": "tench"}')
    for template in ("This is an image of a {}.", "This is an image of a [CLS]."):
        assert sorted(ImageFolder(tmp_path, 8, template=template).samples([0, 1])[1]) == ["This is an image of a great white shark.", "This is an image of a tench."]
    with pytest.raises(UserError, match="place for the class"): ImageFolder(tmp_path, 8, template="an image").samples([0])
    assert ImageFolder(tmp_path, 8).samples([0])[1] == [""]


def test_a_named_file_of_captions_comes_before_sidecars_and_a_missing_one_is_refused(folder):
    (folder / "captions-blip.jsonl").write_text('{"file_name": "0.png", "caption": "said anew"}\n')
    anew = ImageFolder(folder, 8, metadata="captions-blip.jsonl")
    assert anew.caption(0) == "said anew" and anew.caption(1) == ""
    with pytest.raises(UserError, match="captions-git"): ImageFolder(folder, 8, metadata="captions-git.jsonl")


def test_held_out_pictures_are_a_function_of_names_alone(folder):
    def names(part): corpus = ImageFolder(folder, 8, part=part, held_out=0.3); return {corpus.name(number) for number in corpus.members}
    train, test = names("train"), names("test")
    assert len(test) == 2 and not train & test and len(train | test) == 6
    Image.new("RGB", (9, 9)).save(folder / "later.png")
    assert len(names("test") & (test | {"later.png"})) == 2  # what is added moves none of the others into training but the one that it replaces


def test_the_fingerprint_of_a_folder_follows_its_content(folder):
    first = ImageFolder(folder, 8).fingerprint()
    assert ImageFolder(folder, 16, seed=3).fingerprint() == first
    (folder / "0.txt").write_text("a red circle, longer")
    assert ImageFolder(folder, 8).fingerprint() != first


def test_names_of_broken_files_are_capped_and_their_count_is_not(folder):
    for number in range(NAMES_KEPT + 5): (folder / f"broken-{number}.png").write_text("x")
    pictures = ImageFolder(folder, 8)
    pictures.check()
    report = pictures.report()
    assert report["skipped"] == NAMES_KEPT + 5 + 2 and len(report["names"]) == NAMES_KEPT and str(folder) not in json.dumps(report)


def make_shards(folder, shards=5, each=11, spoil=True):
    "Tar shards of numbered grey pictures; one picture and one archive are broken."
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for number in range(each):
                stream = io.BytesIO()
                Image.new("L", (12, 10), 20 * number + shard).save(stream, format="PNG")
                content = b"no picture" if spoil and (shard, number) == (1, 4) else stream.getvalue()
                for name, data in ((f"{number:04d}.png", content), (f"{number:04d}.txt", f"shard {shard} number {number}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    if spoil: (folder / "003.tar").write_bytes((folder / "003.tar").read_bytes()[:6 * 2048 + 512 + 60])  # inside the seventh picture
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory): return make_shards(tmp_path_factory.mktemp("corpus") / "shards")


def stream_of(shards, **changes): return open_corpus(corpus_of({"kind": "webdataset", "path": str(shards), "block": 4, "workers": 2, **changes}), 8, seed=5, batch_size=20, part="train")


def test_a_stream_killed_and_resumed_gives_the_samples_of_an_unbroken_one(shards):
    whole = stream_of(shards)
    batches = [whole.samples(range(20 * step, 20 * step + 20)) for step in range(8)]  # three epochs
    part = stream_of(shards)
    for step in range(4): part.samples(range(20 * step, 20 * step + 20))  # the loop makes one batch ahead
    for bookmarks in (json.loads(json.dumps(part.state())), {}):  # without bookmarks it only takes longer
        again = stream_of(shards)
        again.load_state(bookmarks)
        reads = [blocks.number for blocks in again.blocks]
        for step in range(3, 8):
            images, captions = again.samples(range(20 * step, 20 * step + 20))
            assert captions == batches[step][1] and torch.equal(images, batches[step][0]), step
        assert reads == [-1] * again.lanes
    assert any(mark for marks in part.state()["marks"].values() for mark in marks.values())


def test_bookmarks_spare_reading_from_the_beginning(shards, monkeypatch):
    part = stream_of(shards)
    part.samples(range(20 * 30, 20 * 31))
    read, following = [], Lane.__next__
    monkeypatch.setattr(Lane, "__next__", lambda lane: [read.append(1), following(lane)][1])
    again = stream_of(shards)
    again.load_state(json.loads(json.dumps(part.state())))
    again.samples(range(20 * 30, 20 * 31))
    assert len(read) <= 2 * 4 * again.lanes < 20 * 30


def test_processes_and_micro_batches_read_their_own_shards(shards):
    from vugen.train.loop import sample_indices
    whole = stream_of(shards)
    assert whole.lanes == 5
    expected = whole.samples(range(40, 60))[1]
    said, opened = [], []
    for rank in range(5):
        one = stream_of(shards)
        said += one.samples(sample_indices(2, 20, rank, 5))[1]
        opened.append({lane for lane, blocks in enumerate(one.blocks) if blocks.number >= 0})
    assert said == expected and all(len(lanes) == 1 for lanes in opened) and len(set.union(*opened)) == 5


def test_broken_samples_and_shards_are_counted_and_named(shards):
    stream = stream_of(shards)
    captions = [caption for step in range(6) for caption in stream.samples(range(20 * step, 20 * step + 20))[1]]
    report = stream.report()
    assert report["skipped"] == 2 and "shard 1, sample 4" in report["names"] and any(name.startswith("shard 3 after sample") for name in report["names"])
    assert "shard 1 number 4" not in captions and len(captions) == 120
    again = stream_of(shards)
    again.load_state(stream.state())
    assert again.report() == report  # the count survives a resume


def test_a_stream_shows_every_readable_sample_once_an_epoch(tmp_path):
    folder = make_shards(tmp_path / "whole", shards=4, each=6, spoil=False)
    stream = StreamCorpus(open_webdataset(str(folder))[0], 8, batch_size=4, block=3)
    epochs = [stream.samples(range(24 * epoch, 24 * epoch + 24))[1] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(f"shard {shard} number {number}" for shard in range(4) for number in range(6)) for epoch in epochs) and epochs[0] != epochs[1]


def test_held_out_samples_of_a_stream_are_never_trained_on(shards):
    pairs = Pairs(corpus_of({"kind": "webdataset", "path": str(shards), "held_out": 0.2, "block": 4}), 8, seed=1, batch_size=20)
    kept = set(pairs.held_out(100)[1])
    trained = {caption for step in range(8) for caption in pairs.samples(range(20 * step, 20 * step + 20))[1]}
    assert kept and trained and not kept & trained and len(kept | trained) >= 45
    with pytest.raises(UserError, match="held_out"): Pairs(corpus_of({"kind": "webdataset", "path": str(shards), "held_out": 1e-9}), 8)


def test_a_broken_first_shard_is_passed_over_and_a_folder_of_nothing_refused(tmp_path):
    folder = make_shards(tmp_path / "some", shards=2, each=6, spoil=False)
    (folder / "000.tar").write_bytes(b"x" * 2000)
    stream = stream_of(folder)
    assert {caption.split()[1] for caption in stream.samples(range(20))[1]} == {"1"} and stream.report()["skipped"] == 1
    with pytest.raises(UserError, match=r"no .tar"): open_webdataset(str(tmp_path))
    (folder / "001.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match="not one of 2 shards"): open_webdataset(str(folder))


def test_a_hub_set_is_streamed_with_its_classes(tmp_path):
    import datasets
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["tench", "great_white_shark"])})
    for shard in range(2):
        rows = [{"picture": Image.new("RGB", (9, 9), (40 * number, 0, 0)), "label": number % 2} for number in range(6)]
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set" / f"train-{shard}.parquet")
    corpus = corpus_of({"kind": "hub", "path": str(tmp_path / "set"), "caption": "label", "template": "This is an image of a [CLS].", "block": 3})
    stream = open_corpus(corpus, 8, batch_size=4)
    images, captions = stream.samples(range(12))
    assert images.shape == (12, 3, 8, 8) and sorted(captions) == 6 * ["This is an image of a great white shark."] + 6 * ["This is an image of a tench."]
    state = json.loads(json.dumps(stream.state()))
    again = open_corpus(corpus, 8, batch_size=4)
    again.load_state(state)
    assert torch.equal(again.samples(range(12, 20))[0], stream.samples(range(12, 20))[0])
    with pytest.raises(UserError, match="corpus has no column"): open_corpus({**corpus, "image": "pictur"}, 8)
    with pytest.raises(UserError, match="cannot be opened"): open_corpus({**corpus, "split": "testing"}, 8)


def test_presets_and_corpora_know_the_same_keys():
    assert set(CORPUS) == {"kind", "path", "caption", "template", "metadata", "image", "config", "split", "held_out", "block", "workers"}
    with pytest.raises(UserError, match="corpus.path"): corpus_of({"kind": "images"})
    with pytest.raises(UserError, match="folder"): open_corpus(corpus_of({"path": "nowhere"}), 8)
    with pytest.raises(UserError, match="kind"): open_corpus(corpus_of({"kind": "zip", "path": "x"}), 8)
    assert told_by({"json": {"text": " a  b "}}, "caption") == "a b" and told_by({"caption": ["one", "two"]}, "caption") == "one"
