"""Every stage of a paper preset from a vision–language model in its real format to a generated picture: the preset's own values, bf16 included, with sizes that a test can bear."""
import json

import pytest
import torch

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
from vugen.train.presets import load_preset

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

