"""Every stage of a paper preset from a vision–language model in its real format to a generated picture: the preset's own values, bf16 included, with sizes that a test can bear."""
import io
import json
import tarfile

import pytest
import torch

from vugen.data.corpora import Lane, Pairs
from vugen.data.images import load_image, save_png, to_tensor
from vugen.data.scenes import World, batch
from vugen.decode.autoencoder import PixelAutoencoder
from vugen.decode.vae import ConvVAE
from vugen.errors import UserError
from vugen.generate.adapters import linked_encoder, load_adapter, save_miniature
from vugen.generate.text_to_image import TextToImage
from vugen.lab.cli import main, stage_class
from vugen.models.saving import weights_dtype
from vugen.train.distill import load_decoders
from vugen.train.latent_decoder import load_latent_autoencoder
from vugen.train.loop import stage_parser, train_stage
from vugen.train.presets import load_preset, override

RECIPE = dict(steps=2, batch_size=4, warmup_steps=1, log_every=1, checkpoint_every=2, ema_start=0)
PIXELS = dict(statistics=16, evaluation=4, perceptual="none", alignment="none")
SMALLER = {  # stage: (model, options)
    "decoder": (dict(ratio=2, base_channels=8, num_layers=1), PIXELS),
    "distill": ({}, PIXELS),
    "decoder-ldm": (dict(hidden_size=32, num_layers=1, num_heads=2), dict(evaluation=3)),
    **dict.fromkeys(("generator", "generator-decoupled", "generator-repa"), (dict(num_inference_steps=2), dict(evaluation=3))),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shrunk(name, folder):
    "A paper preset as a file: sizes, steps and names of published models replaced, everything else as it is."
    plain = load_preset(name).to_dict()
    plain["world"] = {"image_size": 32}
    plain["corpus"].update(path=str(folder / "corpus"), kind="images", held_out=0.1, workers=1)
    for stage, (model, options) in SMALLER.items():
        part = plain["stages"][stage]
        part["recipe"].update(RECIPE); part["model"].update(model)
        part["options"] = {**part["options"], **options, **{key: value for key, value in dict(vae=str(folder / "vae"), statistics=8).items() if key in part["options"]}}
        if "encoder" in part["options"]: part["options"].update(encoder=str(folder / "plm"), encoder_size=16)
        if "vlm" in part["model"]: part["model"].update(vlm=str(folder / "plm"), image_size=16)
    plain["stages"] = {stage: plain["stages"][stage] for stage in SMALLER}
    (folder / "preset.json").write_text(json.dumps(plain))
    return folder / "preset.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A miniature PerceptionLM, a small VAE and 40 pictures in class folders."
    folder = tmp_path_factory.mktemp("paper")
    save_miniature("perception_lm", folder / "plm")
    torch.manual_seed(0)
    ConvVAE(widths=(8, 8, 8)).save_pretrained(folder / "vae")
    made = batch(World(**load_preset("smoke").world), 7, range(40))
    for number, image in enumerate(made["images"]):
        (folder / f"corpus/class_{number % 4}").mkdir(parents=True, exist_ok=True)
        save_png(image, folder / f"corpus/class_{number % 4}/{number:02d}.png")
    return folder


def train(stage, folder, preset, *words):
    words = ["--preset", str(preset), "--root", str(folder / "root"), *words]
    return train_stage(stage_class(stage), stage_parser(stage).parse_args(words), stage)


@pytest.fixture(scope="module")
def root(place):
    "All stages, trained one after the other."
    preset = shrunk("paper-imagenet", place)
    for stage in SMALLER: assert train(stage, place, preset)["status"] == "finished"
    return place / "root"


def vugen(*words):
    with pytest.raises(SystemExit) as left: main(list(map(str, words)))
    return left.value.code


@pytest.mark.parametrize("name", ["generator", "generator-decoupled", "generator-repa"])
def test_a_generator_draws_from_the_folders_alone(name, root, tmp_path):
    said = ("This is an image of a class_1.", "quite free words, which no world of scenes knows")
    assert vugen("generate", *said, "--root", root, "--out", tmp_path / "made", "--generator", name, "--decoder-steps", 1) == 0
    rows = json.loads((tmp_path / "made/generate.json").read_text())["rows"]
    assert [row["prompt"] for row in rows] == list(said) and load_image(tmp_path / "made/00001.png").size == (32, 32)
    config = json.loads((root / name / "config.json").read_text())
    assert config["vlm_dtype"] == "bfloat16" and config["vlm"] == str((root.parent / "plm").resolve())


def test_what_is_loaded_is_what_was_trained(root):
    "The same numbers, as bf16 keeps them; a VLM that was read in fp32 passes as the same one, another one does not."
    model, folder = TextToImage.from_pretrained(root), root.parent
    assert weights_dtype(model.vlm) == "bfloat16" and model.vlm.vision.image_size == 16 and model.grid == (4, 4)
    assert weights_dtype(model.mixture.tower) == "float32"
    again = TextToImage.from_pretrained(root, vlm=load_adapter(folder / "plm", 16))
    prompts = ["a red circle", "a star"]
    assert torch.allclose(again.generate(prompts), model.generate(prompts), atol=0.1)
    other = load_adapter(save_miniature("perception_lm", folder / "other", seed=1), 16, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="not the one this generator was trained with"): TextToImage.from_pretrained(root, vlm=other)


def test_pictures_go_through_the_encoder_that_the_decoder_was_trained_on(root, tmp_path):
    picture = next((root.parent / "corpus").rglob("*.png"))
    assert not (root / "contrastive").exists()
    assert vugen("reconstruct", picture, "--root", root, "--out", tmp_path / "back") == 0 and (tmp_path / "back/reconstruct.json").is_file()
    link = json.loads((root / "decoder/encoder.json").read_text())
    assert (link["dtype"], link["image_size"], link["pixels"]) == ("bfloat16", 16, 16)
    image = to_tensor(load_image(picture), 32)
    made = [PixelAutoencoder.from_pretrained(root, "decoder", encoder).reconstruct(image, 2) for encoder in (linked_encoder(root), load_adapter(root.parent / "plm", 16).vision)]
    assert torch.allclose(*made, atol=0.05)
    assert load_latent_autoencoder(root).reconstruct(image, 2).shape == image.shape
    assert set(load_decoders(root)[1]) == {"diffusion, 8 steps", "diffusion, 1 step", "distilled, 1 step"}
    with pytest.raises(UserError, match="linked_encoder"): PixelAutoencoder.from_pretrained(root)
    with pytest.raises(UserError, match="pixels = 16"): PixelAutoencoder.from_pretrained(root, "decoder", load_adapter(root.parent / "plm", dtype=torch.bfloat16).vision)


def test_a_pair_trained_on_one_model_is_refused_by_a_generator_on_another(root, place):
    save_miniature("perception_lm", place / "second", seed=1)
    with pytest.raises(UserError, match="trained on another encoder"): train("generator", place, place / "preset.json", "--out", str(place / "never"), "--set", f"model.vlm={place / 'second'}")



# What the generators learn from, and what is kept of it

def stage_of(name, place, **settings):
    "A stage on the shrunk preset, built."
    preset = override(load_preset(str(place / "preset.json")), name, settings)
    stage = stage_class(name).on_corpus()(preset, place / "root")
    stage.build()
    return stage


@pytest.fixture(scope="module")
def shards(place):
    "The corpus' pictures again, in four tar shards."
    (place / "shards").mkdir()
    pictures = sorted((place / "corpus").rglob("*.png"))
    for number in range(4):
        with tarfile.open(place / f"shards/{number}.tar", "w") as tar:
            for path in pictures[number::4]:
                for suffix, content in (("png", path.read_bytes()), ("txt", f"picture {path.stem}".encode())):
                    member = tarfile.TarInfo(f"{path.stem}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return {"corpus.kind": "webdataset", "corpus.path": str(place / "shards"), "corpus.block": 4}


def test_the_pool_covers_the_corpus(root, place, tmp_path, monkeypatch):
    stage = stage_of("generator", place)
    assert stage.pool is None and len({stage.corpus.train.order(index) for index in range(len(stage.corpus))}) == len(stage.corpus) == 36
    assert stage_of("generator", place, **{"options.latent_cache": str(tmp_path / "one")}).pool.size == 36
    monkeypatch.setattr(Pairs, "__len__", lambda pairs: 1_281_167)
    assert stage_of("generator", place, **{"options.latent_cache": str(tmp_path / "two")}).pool.size == 1_281_167
    assert stage_of("generator", place, **{"options.pool": 12}).pool.size == 12


@pytest.mark.parametrize("setting,value,named", [("corpus.template", "A [CLS].", "corpus.template"), ("corpus.caption", "words", "corpus.caption"), ("corpus.held_out", 0.2, "corpus.held_out"),
                                                 ("options.pool", 12, "pool"), ("options.pool_block", 6, "pool_block")])
def test_a_cache_made_with_another_value_is_refused_by_name(root, place, tmp_path, setting, value, named):
    cached = {"options.latent_cache": str(tmp_path / "cache")}
    stage = stage_of("generator", place, **cached)
    with pytest.raises(UserError, match=f"made with {named} = "): stage_of("generator", place, **cached, **{setting: value})
    stage_of("generator", place, **cached, **{"corpus.workers": 3})  # who reads does not matter
    stage.model.vlm.vision.preprocessing = {**stage.model.vlm.vision.preprocessing, "mean": (0.4, 0.5, 0.5)}
    with pytest.raises(UserError, match="encoder.preprocessing"): stage.make_pool()


def test_a_stream_is_cached_lane_by_lane(root, place, shards, tmp_path):
    def lanes_read(stage): return [lane for lane, blocks in enumerate(stage.corpus.train.blocks) if blocks.number >= 0]
    def cached(name): return {**shards, "options.latent_cache": str(tmp_path / name), "options.pool_block": 3, "recipe.steps": 5}
    for rank in range(2):
        stage = stage_of("generator", place, **cached("shared"))
        stage.ready(stage.model, rank, 2)
        assert lanes_read(stage) == [rank, rank + 2]  # no other process' shards
    alone = stage_of("generator", place, **cached("alone"))
    alone.ready(alone.model, 0, 1)
    assert lanes_read(alone) == [0, 1, 2, 3]
    def content(name): return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
    assert content("shared") == content("alone") and len(content("alone")) == 8
    plain = stage_of("generator", place, **shards)
    found, expected = alone.batch(list(range(4, 12))), plain.batch(list(range(4, 12)))
    assert plain.pool is None and torch.allclose(found["latents"], expected["latents"], atol=1e-2) and torch.equal(found["ids"], expected["ids"])


@pytest.mark.parametrize("name", ["generator", "generator-repa"])
def test_of_several_processes_each_encodes_its_own_samples(root, place, name, monkeypatch):
    stage, seen = stage_of(name, place, **{"options.pool": 30}), []
    samples = stage.corpus.train.samples
    monkeypatch.setattr(stage.corpus, "samples", lambda indices: [seen.append(list(indices)), samples(indices)][1])
    stage.ready(None, 0, 1)
    whole = stage.batch([40, 41])
    assert all(len(each) > 2 for each in seen[:1])  # one process keeps whole blocks
    seen.clear()
    stage.ready(None, 1, 2)
    own = stage.batch([40, 41])
    assert seen == [[stage.pool.place(40), stage.pool.place(41)]]
    assert torch.allclose(own["latents"], whole["latents"], atol=1e-2) and torch.equal(own["ids"], whole["ids"])


def test_repa_reads_a_streams_pictures_once(root, place, shards, tmp_path, monkeypatch):
    read, following = [], Lane.__next__
    monkeypatch.setattr(Lane, "__next__", lambda lane: [read.append(1), following(lane)][1])
    settings = {**shards, "options.pool": 8, "recipe.steps": 6}
    stage = stage_of("generator-repa", place, **settings)
    assert stage.pool is None
    read.clear()
    for step in range(6): made = stage.batch(list(range(4 * step, 4 * step + 4)))
    assert made["targets"].shape == (4, 16, 24) and len(read) <= 24 + 4 * 4  # and a block a lane ahead
    kept = stage_of("generator-repa", place, **settings, **{"options.latent_cache": str(tmp_path / "cache"), "options.keep_targets": True})
    kept.ready(kept.model, 0, 1)
    read.clear()
    found, expected = [kept.batch(list(range(4 * step, 4 * step + 4))) for step in range(6)][0], stage_of("generator-repa", place, **shards).batch([0, 1, 2, 3])
    assert torch.allclose(found["targets"].float(), expected["targets"].float(), atol=0.05) and torch.allclose(found["latents"], expected["latents"], atol=1e-2)
    with pytest.raises(UserError, match="keep_targets"): stage_of("generator-repa", place, **settings, **{"options.latent_cache": str(tmp_path / "third")})


def test_repas_cache_needs_the_corpus_no_more(root, place, tmp_path, monkeypatch):
    stage = stage_of("generator-repa", place, **{"options.latent_cache": str(tmp_path / "cache"), "options.keep_targets": True})
    stage.ready(stage.model, 0, 1)
    monkeypatch.setattr(stage.corpus, "samples", lambda indices: pytest.fail("a picture was read"))
    assert stage.batch([0, 5])["targets"].dtype == torch.float16


def test_held_out_pictures_are_encoded_in_parts(root, place, tmp_path, monkeypatch):
    from vugen.train.generator import TOGETHER
    stage, sizes = stage_of("generator", place), []
    images, told = batch(World(**load_preset("smoke").world), 3, range(150))["images"], [f"picture {number}" for number in range(150)]
    monkeypatch.setattr(stage.corpus, "held_out", lambda count: (images, told))
    encode = stage.model.encode_images
    monkeypatch.setattr(stage.model, "encode_images", lambda part: [sizes.append(len(part)), encode(part)][1])
    with torch.no_grad(): rows = stage.measure(stage.model, tmp_path)
    assert max(sizes) <= TOGETHER and sum(sizes) == 150 and rows[0]["n"] == 150
