"""The latent diffusion decoder with a reducer that learns with it, with a start from pretrained weights, and under a generator, at the size of `smoke`."""
import json

import pytest
import torch

from vugen.decode.autoencoder import PixelAutoencoder
from vugen.decode.latent_diffusion import LatentDiffusionDecoder
from vugen.encode.reducers import load_reducer
from vugen.errors import UserError
from vugen.generate.text_to_image import TextToImage
from vugen.lab.cli import stage_class
from vugen.paths import checkpoints_dir
from vugen.train.decoder import batch_whiten
from vugen.train.latent_decoder import LatentDecoderStage, load_latent_autoencoder
from vugen.train.loop import stage_parser, train_stage
from vugen.train.presets import load_preset, override


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(stage, root, *words):
    words = ["--preset", "smoke", "--root", str(root), "--set", "recipe.precision=fp32", *words]
    return train_stage(stage_class(stage), stage_parser(stage).parse_args(words), stage)["record"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "The embedded parts that a latent decoder and a generator stand on, and a pair that learned jointly in place of the pixel decoder's."
    folder = tmp_path_factory.mktemp("root")
    for name in ("contrastive", "vae", "vlm", "parser", "decoder-ldm"): (folder / name).symlink_to(checkpoints_dir("tiny") / name)
    train("decoder-ldm", folder, "--out", str(folder / "decoder"), "--set", "options.reducer=joint", "--set", "options.statistics=256")
    return folder


def test_the_reducer_learns_with_the_decoder_and_is_whitened_at_the_end(root):
    stage = LatentDecoderStage(override(load_preset("smoke"), "decoder-ldm", {"options.reducer": "joint", "options.statistics": 256}), root)
    torch.manual_seed(0)
    module = stage.build()
    loss, _ = stage.loss(module, stage.batch(range(8)), torch.Generator().manual_seed(0))
    torch.nn.init.normal_(module.decoder.network.out.weight, std=0.1)  # a silent decoder teaches its reducer nothing
    for block in module.decoder.network.blocks: torch.nn.init.normal_(block.modulation.weight, std=0.1)
    loss, _ = stage.loss(module, stage.batch(range(8)), torch.Generator().manual_seed(0))
    loss.backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in module.reducer.parameters()) and not any(value.requires_grad for value in [*module.encoder.parameters(), *module.decoder.vae.parameters()])
    images = stage.batch(range(8))["images"]
    assert torch.allclose(module.reduced(images), batch_whiten(module.reducer.encode_raw(module.encoder(images).tokens)))
    pair = load_latent_autoencoder(root, "decoder")
    latents = pair.encode(stage.pictures.images(stage.seed + 1, list(range(256)))).flatten(0, 1)
    assert latents.mean(0).abs().max() < 1e-3 and (latents.std(0) - 1).abs().max() < 1e-3
    untrained = LatentDecoderStage(stage.preset, root).build().reducer
    assert pair.reducer.dim == untrained.dim == 8 and not torch.isnan(load_reducer(root / "decoder/reducer").explained)


def test_a_generator_stands_on_the_pair_and_paints_with_it(root):
    train("generator", root)
    assert not (root / "decoder/pixel_decoder").exists()
    model = TextToImage.from_pretrained(root)
    assert isinstance(model.pixel_decoder, LatentDiffusionDecoder)
    pictures = model.images(["a red circle"], decoder_steps=2)
    assert pictures.shape == (1, 3, 32, 32) and torch.isfinite(pictures).all()
    assert type(PixelAutoencoder.from_pretrained(root, "decoder").decoder) is LatentDiffusionDecoder


def test_pretrained_weights_are_the_first_ones_and_their_folder_stays_out_of_the_record(root, tmp_path):
    own = load_preset("tiny").stage("decoder-ldm").model
    sizes = [word for key in ("hidden_size", "num_layers", "num_heads") for word in ("--set", f"model.{key}={own[key]}")]
    start = root / "decoder-ldm"
    record = train("decoder-ldm", root, "--out", str(tmp_path / "again"), *sizes, "--set", f"options.start={start}", "--set", "options.reducer=joint", "--set", "options.ratio=32", "--set", "recipe.learning_rate=1e-9")
    assert record["options"]["start"] == "decoder-ldm" and str(root) not in json.dumps(record) and "began with the weights of decoder-ldm" in record["about"]
    old, new = (LatentDiffusionDecoder.from_pretrained(folder / "latent_decoder").state_dict() for folder in (start, tmp_path / "again"))
    assert torch.allclose(old["network.blocks.3.mlp.up.weight"], new["network.blocks.3.mlp.up.weight"], atol=1e-6) and new["network.embed_condition.weight"].shape[1] == 4
    with pytest.raises(UserError, match="does not fit this decoder"): train("decoder-ldm", root, "--out", str(tmp_path / "none"), "--set", f"options.start={start}", "--set", "options.reducer=joint")


def test_every_stage_of_the_papers_ablations_is_in_its_presets():
    for name in ("paper-imagenet", "paper-stockmix"):
        stages = load_preset(name).stages
        assert {"decoder", "decoder-pca", "decoder-ldm", "distill", "decoder-feedforward"} <= set(stages)
        assert stages["decoder-pca"] == stages["decoder"] and stages["decoder-feedforward"].recipe == stages["decoder"].recipe
        assert override(load_preset(name), "decoder-ldm", {"options.reducer": "joint", "options.start": "dit", "options.ratio": 8}).stage("decoder-ldm").options["start"] == "dit"
