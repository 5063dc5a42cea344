"""Stages that learn from a folder of pictures with captions: killed and resumed bit for bit, with broken files named; with a latent cache the same bits without the encoder."""
import json

import pytest
import torch

from vugen.data.images import save_png
from vugen.data.scenes import World, batch
from vugen.errors import UserError
from vugen.lab.cli import stage_class
from vugen.paths import checkpoints_dir
from vugen.train.generator import GeneratorStage
from vugen.train.loop import read_log, stage_parser, train_stage
from vugen.train.presets import load_preset

ROOT = checkpoints_dir("tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "24 small pictures with captions, one of them broken, one with a word that no world has."
    folder = tmp_path_factory.mktemp("corpus") / "pictures"
    folder.mkdir()
    made = batch(World(**load_preset("smoke").world), 7, range(24))
    for number, (image, caption) in enumerate(zip(made["images"], made["captions"])):
        save_png(image, folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption + (" gleaming" if number == 5 else ""))
    (folder / "broken.png").write_bytes((folder / "00.png").read_bytes()[:50])
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(stage, out, pictures, *words):
    words = ["--preset", "smoke", "--root", str(ROOT), "--out", str(out), "--set", "recipe.precision=fp32", *words]
    if pictures: words += ["--set", f"corpus.path={pictures}", "--set", "corpus.held_out=0.1"]
    return train_stage(stage_class(stage), stage_parser(stage).parse_args(words), stage)


def weights(out): return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


@pytest.mark.parametrize("stage", ["decoder", "generator", "vlm", "vae", "decoder-ldm"])
def test_a_stage_on_a_corpus_killed_and_resumed_is_bit_identical(stage, pictures, tmp_path):
    whole = train(stage, tmp_path / "whole", pictures)
    assert train(stage, tmp_path / "halved", pictures, "--stop-after", "2")["status"] == "stopped"
    halved = train(stage, tmp_path / "halved", pictures, "--resume")
    assert weights(tmp_path / "whole") == weights(tmp_path / "halved") and weights(tmp_path / "whole")
    records = [each["record"] for each in (whole, halved)]
    assert records[0]["rows"] == records[1]["rows"] and records[0]["corpus"] == records[1]["corpus"]
    assert records[0]["skipped"] == 1 and list(records[0]["names"]) == ["broken.png"] and str(pictures) not in json.dumps(records)
    assert any(row.get("skipped_names") == ["broken.png"] for row in read_log(tmp_path / "whole/log.jsonl"))


def test_a_changed_corpus_is_noticed_at_resume(pictures, tmp_path):
    import shutil
    shutil.copytree(pictures, tmp_path / "pictures")
    train("vae", tmp_path / "out", tmp_path / "pictures", "--stop-after", "2")
    (tmp_path / "pictures/03.txt").write_text("quite another caption")
    with pytest.raises(UserError, match="corpus.fingerprint"): train("vae", tmp_path / "out", tmp_path / "pictures", "--resume")


def test_a_stage_of_drawn_scenes_refuses_a_corpus(pictures, tmp_path):
    with pytest.raises(UserError, match="drawn scenes only"): train("parser", tmp_path / "out", pictures)


@pytest.mark.parametrize("on_corpus", [False, True])
def test_with_a_latent_cache_the_same_bits_without_the_encoder(on_corpus, pictures, tmp_path, monkeypatch):
    source = pictures if on_corpus else None
    cached = ("--set", f"options.latent_cache={tmp_path / 'cache'}", "--set", "options.pool_block=10")
    train("generator", tmp_path / "plain", source, *cached[2:])
    seen, encode = [], GeneratorStage.latents
    from vugen.train import generator
    for name, kind in (("latents", GeneratorStage), ("pairs", generator.CorpusGeneratorStage)):
        monkeypatch.setattr(kind, name, lambda stage, indices, made=getattr(kind, name): [seen.append(len(indices)), made(stage, indices)][1])
    train("generator", tmp_path / "first", source, *cached)
    assert weights(tmp_path / "first") == weights(tmp_path / "plain") and sum(seen) >= 20 and encode is not GeneratorStage.latents
    seen.clear()
    record = train("generator", tmp_path / "second", source, *cached)["record"]
    assert weights(tmp_path / "second") == weights(tmp_path / "plain") and not seen  # what is there is not computed again
    assert record["options"]["latent_cache"] is True and str(tmp_path) not in json.dumps(record)
    with pytest.raises(UserError, match="seed.*latent_cache"): train("generator", tmp_path / "third", source, *cached, "--seed", "5")


def test_a_stage_on_a_mixture_with_a_validation_set(pictures, tmp_path):
    others = tmp_path / "others"
    others.mkdir()
    for number, image in enumerate(batch(World(**load_preset("smoke").world), 9, range(6))["images"]): save_png(image, others / f"{number}.png")
    sets = json.dumps([[0.75, {"path": str(pictures)}], [0.25, {"path": str(others)}]])
    words = "--set", f"corpus.sets={sets}", "--set", f"corpus.validation={others}", "--set", "options.evaluation=6"
    found = train("decoder", tmp_path / "out", None, *words)["record"]
    told = found["corpus"]
    assert told["sets"] == [[0.75, {"path": "pictures"}], [0.25, {"path": "others"}]] and told["validation"] == {"path": "others"} and str(tmp_path) not in json.dumps(found)
    assert {row["n"] for row in found["rows"] if row["metric"] == "psnr, 1 step"} == {6} and found["skipped"] == 1 and list(found["names"]) == ["0: broken.png"]
    with pytest.raises(UserError, match="sets.1.path nowhere is not a folder"): train("decoder", tmp_path / "none", None, "--set", f"corpus.sets={sets.replace(str(others), 'nowhere')}")
