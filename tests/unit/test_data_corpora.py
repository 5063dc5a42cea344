"""Corpora: pure functions of the sample's number, mixtures as asked for, and folders full of trouble."""
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vugen.data.corpora import HELD_OUT_PHOTOGRAPHS, NAMES_KEPT, TRAINING_PHOTOGRAPHS, ImageFolder, Lane, Pairs, SceneCorpus, StreamCorpus, open_corpus, open_webdataset, photograph_crops, quotas, spread_out, tar_files, told_by
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


def test_what_a_killed_program_was_writing_is_no_picture(folder):
    before, known = ImageFolder(folder, 16).files, ImageFolder(folder, 16).fingerprint()
    Image.new("RGB", (20, 20)).save(folder / ".late.png.12345678.tmp.png")
    (folder / ".cache").mkdir(); Image.new("RGB", (20, 20)).save(folder / ".cache/late.png")
    assert ImageFolder(folder, 16).files == before and ImageFolder(folder, 16).fingerprint() == known


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
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no .tar"): open_webdataset(str(tmp_path / "none"))
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
    assert set(CORPUS) == {"kind", "path", "caption", "template", "metadata", "image", "config", "split", "held_out", "block", "workers", "validation", "sets"}
    with pytest.raises(UserError, match="corpus.path"): corpus_of({"kind": "images"})
    with pytest.raises(UserError, match="folder"): open_corpus(corpus_of({"path": "nowhere"}), 8)
    with pytest.raises(UserError, match="kind"): open_corpus(corpus_of({"kind": "zip", "path": "x"}), 8)
    assert told_by({"json": {"text": " a  b "}}, "caption") == "a b" and told_by({"caption": ["one", "two"]}, "caption") == "one"


# ---- names of classes, validation sets, mixtures ------------------------------------------------------------------------------

def grey(path, level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (12, 10), level).save(path)


@pytest.fixture
def imagenet(tmp_path):
    "Three classes as ImageNet names their folders, and a validation folder beside them."
    for place, each in (("train", 6), ("val", 2)):
        for name in ("n01440764", "n01443537", "n01484850"):
            for number in range(each): grey(tmp_path / place / name / f"{name}_{place}_{number}.png", 20 * number)
    return tmp_path


TEMPLATE = "This is an image of a [CLS]."


def test_identifiers_of_classes_are_never_told_as_names(imagenet):
    with pytest.raises(UserError, match="n01440764.*classes.json.*all 3") as caught: ImageFolder(imagenet / "train", 8, template=TEMPLATE)
    assert "\n" not in str(caught.value)
    ImageFolder(imagenet / "train", 8)  # without a template nothing is told, for a decoder
    (imagenet / "train/classes.json").write_text(json.dumps({"n01440764": "tench", "n01443537": "goldfish"}))
    with pytest.raises(UserError, match="n01484850"): ImageFolder(imagenet / "train", 8, template=TEMPLATE)
    (imagenet / "train/classes.json").write_text(json.dumps({"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great_white_shark"}))
    assert set(ImageFolder(imagenet / "train", 8, template=TEMPLATE).told(18)) == {f"This is an image of a {name}." for name in ("tench", "goldfish", "great white shark")}
    (imagenet / "train/n01484850/n01484850_train_0.txt").write_text("a shark")  # a caption of its own needs no name
    (imagenet / "train/classes.json").write_text(json.dumps({"n01440764": "tench", "n01443537": "goldfish"}))
    assert "a shark" in ImageFolder(imagenet / "train", 8, template=TEMPLATE).told(18)


def test_a_template_needs_classes_or_captions(tmp_path):
    for number in range(3): grey(tmp_path / f"ILSVRC2012_val_{number:08d}.png")
    with pytest.raises(UserError, match="needs classes"): ImageFolder(tmp_path, 8, template=TEMPLATE)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "ILSVRC2012_val_00000000.png", "text": "a tench"}))
    assert ImageFolder(tmp_path, 8, template=TEMPLATE).told(3) == ["a tench", "", ""]


@pytest.mark.parametrize("whole", [False, True])
def test_a_validation_folder_is_what_is_measured_on_and_all_else_is_trained_on(imagenet, whole):
    (imagenet / "classes.json").write_text(json.dumps({"n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark"}))  # above both
    said = str(imagenet / "val") if not whole else {"path": str(imagenet / "val"), "template": "A [CLS]."}
    pairs = Pairs(corpus_of({"path": str(imagenet / "train"), "template": TEMPLATE, "held_out": 0.5, "validation": said}), 8, batch_size=4)
    assert len(pairs) == 18 and len(pairs.held_out(100)[0]) == 6
    images, told = pairs.held_out(3)
    assert all(caption.startswith("A " if whole else "This is an image of a ") for caption in told)
    trained = pairs.train.batch(range(18))["names"]
    assert len(set(trained)) == 18 and all("train" in name for name in trained) and len(pairs.of_seed(9)) == 18
    assert pairs.fingerprint() == ImageFolder(imagenet / "train", 8).fingerprint()


def test_a_few_held_out_pictures_are_of_many_classes(tmp_path):
    for kind in "abcdefghij":
        for number in range(10): grey(tmp_path / kind / f"{kind}{number}.png")
    told = ImageFolder(tmp_path, 8, template="{}").first(20)[1]
    assert len(set(told)) >= 6 and told == ImageFolder(tmp_path, 8, template="{}").first(50)[1][:20]


def test_cocos_own_captions_are_read(tmp_path):
    for number in (7, 9): grey(tmp_path / f"val2014/COCO_val2014_{number:012d}.png")
    content = {"images": [{"id": number, "file_name": f"COCO_val2014_{number:012d}.png"} for number in (9, 7)],
               "annotations": [{"id": 5, "image_id": 7, "caption": "later"}, {"id": 4, "image_id": 7, "caption": " A cat\n"}, {"id": 6, "image_id": 9, "caption": "A dog"}]}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/captions_val2014.json").write_text(json.dumps(content))
    corpus = ImageFolder(tmp_path / "val2014", 8, metadata="../annotations/captions_val2014.json")
    assert corpus.told(2) == ["A cat", "A dog"]
    for wrong in ("{", "[]", '{"images": [], "annotations": [{"id": 1, "image_id": 3, "caption": "x"}]}'):
        (tmp_path / "annotations/captions_val2014.json").write_text(wrong)
        with pytest.raises(UserError, match="COCO"): ImageFolder(tmp_path / "val2014", 8, metadata="../annotations/captions_val2014.json")


def test_shards_are_found_in_subfolders_and_by_globs_over_folders(tmp_path):
    names = ["cc12m/000/00.tar", "cc12m/001/00.tar", "yfcc/00.tar", "yfcc/01.tar"]
    for name in names: (tmp_path / name).parent.mkdir(parents=True, exist_ok=True); (tmp_path / name).write_bytes(b"")
    (tmp_path / "yfcc/readme.txt").write_text("")
    def found(path): return [Path(each).relative_to(tmp_path).as_posix() for each in tar_files(str(tmp_path / path))]
    assert found(".") == found("**/*.tar") == names and found("*/*.tar") == names[2:] and found("*/*/*.tar") == names[:2]
    assert found("yfcc") == found("y*") == found("yfcc/0?.tar") == names[2:] and found("yfcc/01.tar") == ["yfcc/01.tar"]
    for nothing in ("*/*.zip", "none", "cc12m/000/*.tgz"):
        with pytest.raises(UserError, match="holds no .tar file"): found(nothing)


@pytest.mark.parametrize("weights,number", [([2, 1, 1], 64), ([0.4, 0.35, 0.25], 7), ([1], 5), ([3, 1], 10), ([1, 1, 1, 1, 1, 1, 1], 256)])
def test_quotas_are_as_near_as_whole_numbers_can_be_and_spread(weights, number):
    found = quotas(weights, number)
    assert sum(found) == number and all(abs(each - number * weight / sum(weights)) < 1 for each, weight in zip(found, weights))
    order = spread_out(found)
    assert [order.count(part) for part in range(len(found))] == found
    for part, each in enumerate(found):  # half of the places hold half of a part
        assert abs(order[:number // 2].count(part) - each / 2) <= 1


@pytest.fixture(scope="module")
def blend(tmp_path_factory):
    "Two sets of shards, nested as StockMix's are, and a folder."
    place = tmp_path_factory.mktemp("blend")
    make_shards(place / "cc12m", shards=4, each=9, spoil=False); make_shards(place / "yfcc", shards=5)
    for number in range(13): grey(place / "stock" / f"{number}.png", 10 * number); (place / "stock" / f"{number}.txt").write_text(f"stock {number}")
    sets = [[5, {"path": str(place / "cc12m")}], [3, {"path": str(place / "yf*/*.tar"), "block": 3}], [2, {"kind": "images", "path": str(place / "stock")}]]
    return corpus_of({"kind": "webdataset", "block": 4, "workers": 2, "sets": sets, "held_out": 0.2})


def mixed(blend, part="train"): return open_corpus(blend, 8, seed=5, batch_size=20, part=part)


def test_a_mixture_is_its_parts_in_their_shares(blend):
    corpus = mixed(blend)
    alone = [open_corpus({**blend, "sets": None, **keys}, 8, seed=5, batch_size=number, part="train") for number, (_, keys) in zip((10, 6, 4), blend["sets"])]
    wanted = [[f"{caption}" for step in range(4) for caption in each.samples(range(step * number, step * number + number))[1]] for each, number in zip(alone, (10, 6, 4))]
    found = [[], [], []]
    for step in range(4):
        images, told = corpus.samples(range(20 * step, 20 * step + 20))
        for index, (image, caption) in enumerate(zip(images, told)):
            part, number = corpus.where(20 * step + index)
            found[part].append(caption)
            assert torch.equal(image, alone[part].samples([number])[0][0])
    assert found == wanted and corpus.fingerprint() != mixed({**blend, "sets": blend["sets"][:2]}).fingerprint()


def test_a_mixture_resumes_and_is_the_same_for_any_processes(blend):
    whole = mixed(blend)
    batches = [whole.samples(range(20 * step, 20 * step + 20)) for step in range(6)]
    halves = [mixed(blend) for _ in range(2)]
    for step, (images, told) in enumerate(batches):
        parts = [half.samples(range(20 * step + 10 * rank, 20 * step + 10 * rank + 10)) for rank, half in enumerate(halves)]
        assert torch.equal(torch.cat([part[0] for part in parts]), images) and parts[0][1] + parts[1][1] == told
    marks = [half.state() for half in halves]
    joined = {**marks[0], **{key: {**marks[0][key], **marks[1][key]} for key in ("skipped", "marks")}}  # as the loop joins them
    again = mixed(blend)
    again.load_state(json.loads(json.dumps(joined)))
    assert any(len(blocks.marks) > 1 for part in again.parts[:2] for blocks in part.blocks)
    images, told = again.samples(range(100, 120))
    assert torch.equal(images, batches[5][0]) and told == batches[5][1]
    report = whole.report()
    assert report["skipped"] >= 1 and all(name.startswith("1: ") for name in report["names"])


def test_held_out_samples_of_a_mixture_are_of_every_part_and_never_trained_on(blend):
    kept = mixed(blend, "test").first(10)[1]
    corpus = mixed(blend)
    trained = {caption for step in range(6) for caption in corpus.samples(range(20 * step, 20 * step + 20))[1]}
    assert any(caption.startswith("stock") for caption in kept) and any(caption.startswith("shard") for caption in kept)
    stock = {caption for caption in kept if caption.startswith("stock")}
    assert stock and not stock & trained
    assert len(Pairs(blend, 8, batch_size=20).told(30)) == 30


def test_impossible_mixtures_of_sets_are_refused_in_a_sentence(blend):
    with pytest.raises(UserError, match="less than one sample"): open_corpus({**blend, "sets": [[1000, blend["sets"][0][1]], [1, blend["sets"][1][1]]]}, 8, batch_size=20, part="train")
    for weights in ([0, 0], [-1, 2], []):
        with pytest.raises(UserError, match="weights"): quotas(weights, 8)
    for wrong in (["a", "b"], [[1, "path"]], [["1", {}]], {"a": 1}, "cc12m"):
        with pytest.raises(UserError, match="corpus.sets"): corpus_of({"sets": wrong})
    with pytest.raises(UserError, match="sets.0 has no key 'pth'"): corpus_of({"sets": [[1, {"pth": "x"}]]})
    with pytest.raises(UserError, match="sets.0 has no key 'sets'"): corpus_of({"sets": [[1, {"sets": []}]]})
    with pytest.raises(UserError, match="corpus.validation"): corpus_of({"path": "x", "validation": 0.1})
