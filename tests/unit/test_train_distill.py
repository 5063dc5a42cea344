"Distillation to one step and its control: the loss by hand, the pool, the stages by the public command, the comparison."
import json

import numpy as np
import pytest
import torch

from vugen.decode.autoencoder import PixelAutoencoder, encoder_link, load_decoder, psnr
from vugen.decode.feed_forward import FeedForwardDecoder
from vugen.decode.pixel_diffusion import PixelDiffusionDecoder, noise_for
from vugen.encode.reducers import MLPReducer, PCAReducer
from vugen.errors import UserError
from vugen.models.vit import VisionTransformer
from vugen.train.distill import (
    DistillStage, DistillTraining, FeedForwardStage, TeacherPool, compare_decoders, comparison_rows, held_out_pictures, load_decoders, paint_all,
)
from vugen.train.presets import Preset, Recipe, StagePreset, load_preset

WORLD = load_preset("tiny").world


def vision(seed=0):
    torch.manual_seed(seed)
    return VisionTransformer(hidden_size=32, num_layers=1, num_heads=2).eval()


def awake(seed=0, **options):
    torch.manual_seed(seed)
    decoder = PixelDiffusionDecoder(base_channels=8, num_layers=1, **options)
    for parameter in decoder.parameters():
        if parameter.abs().sum() == 0: torch.nn.init.normal_(parameter, std=0.05)
    return decoder.eval()


@pytest.fixture
def root(tmp_path):
    MLPReducer(32, 8).save_pretrained(tmp_path / "decoder/reducer")
    awake().save_pretrained(tmp_path / "decoder/pixel_decoder")
    (tmp_path / "decoder/encoder.json").write_text(json.dumps(encoder_link(vision())))
    return tmp_path


def stage_of(kind, root, model=None, **options):
    options = dict(mixture={"scenes": 0.5, "photographs": 0.5}, latent_noise=0.2, evaluation=6, **options)
    return kind(Preset("test", WORLD, {kind.name: StagePreset(model or {}, Recipe(steps=1, batch_size=4), options)}), root, vision())


class Distance(torch.nn.Module):
    name = "mean absolute difference"
    def forward(self, first, second): return (first - second).abs().flatten(1).mean(1)


class Target(torch.nn.Module):
    name, hidden_size = "constant encoder", 5
    def __init__(self): super().__init__(); self.seen = []
    def forward(self, images):
        from vugen.models.seams import Patches
        self.seen.append(images)
        tokens = images.mean((1, 2, 3))[:, None, None] * torch.arange(1.0, 6).expand(1, 16, 5)
        return Patches(tokens, (4, 4), tokens.mean(1))


def test_the_students_loss_by_hand():
    teacher, student, target = awake(1), awake(2), Target()
    training = DistillTraining(vision(), MLPReducer(32, 8), student, teacher, Distance(), target, dict(teacher_steps=3))
    images, noise = torch.rand(2, 3, 32, 32), noise_for(5, range(2), (3, 32, 32))
    lesson = training.lesson(images, torch.full((2, 64, 8), 0.1), noise)
    latents = training.reducer.encode(training.encoder(images).tokens) + 0.1
    assert torch.allclose(lesson["latents"], latents)
    x = noise.double()                                                                    # the teacher's three Euler steps, written out
    for step in range(3): x = x + teacher.velocity(x.float(), torch.full((2,), step / 3), latents).double() / 3
    painted = ((x + 1) / 2).clamp(0, 1)
    assert torch.allclose(lesson["painted"].double(), painted, atol=1e-5)
    loss, metrics = training(**lesson, noise=noise, images=images)
    velocity, hidden = student(noise, torch.zeros(2), latents)
    estimate, aim = (noise + velocity).double(), 2 * painted - 1
    flow = (estimate - aim).square().mean()                                               # at t = 0 the velocity's error is the picture's
    perceptual = ((estimate + 1) / 2 - painted).abs().mean()
    vectors, axis = training.alignment.projector(hidden).double().detach().numpy(), np.arange(1.0, 6)
    alignment = np.mean(1 - vectors @ axis / np.linalg.norm(vectors, axis=-1) / np.linalg.norm(axis))
    assert loss.item() == pytest.approx((flow + 0.5 * perceptual).item() + 0.25 * alignment, abs=1e-5)
    assert target.seen[0] is images                                                       # alignment looks at the real picture
    assert metrics[f"perceptual ({Distance.name})"].item() == pytest.approx(perceptual.item(), abs=1e-5)
    assert f"alignment ({Target.name})" in metrics


def test_only_the_student_learns_and_the_teacher_stays():
    training = DistillTraining(vision(), MLPReducer(32, 8), awake(2), awake(1), options=dict(teacher_steps=2))
    optimizer = torch.optim.Adam([p for p in training.parameters() if p.requires_grad], 2e-3)
    images, noise = torch.rand(4, 3, 32, 32), noise_for(0, range(4), (3, 32, 32))
    before, lesson, errors = {name: value.clone() for name, value in training.named_parameters()}, training.lesson(images, 0, noise), []
    for _ in range(8):
        loss, metrics = training(**lesson, noise=noise, images=images)
        optimizer.zero_grad(); loss.backward(); optimizer.step(); errors.append(metrics["estimate_mse"].item())
    assert errors[-1] < 0.7 * errors[0]
    assert {name.split(".")[0] for name, value in training.named_parameters() if not torch.equal(value, before[name])} == {"decoder"}


def test_a_copy_of_a_one_step_teacher_has_nothing_to_learn():
    training = DistillTraining(vision(), MLPReducer(32, 8), awake(1), awake(1), options=dict(teacher_steps=1))
    images, noise = torch.rand(2, 3, 32, 32), noise_for(0, range(2), (3, 32, 32))
    _, metrics = training(**training.lesson(images, 0, noise), noise=noise, images=images)
    assert metrics["estimate_mse"] < 1e-10


def test_the_pool_computes_blocks_once():
    asked = []
    def make(numbers): asked.extend(numbers); return {"value": torch.tensor(numbers), "square": torch.tensor(numbers) ** 2}
    pool = TeacherPool(make, 12, 4)
    assert pool[[13, 1, 25]]["value"].tolist() == [1, 1, 1] and asked == [0, 1, 2, 3]
    assert pool[list(range(24))]["square"].tolist() == [number**2 for number in range(12)] * 2 and sorted(asked) == list(range(12))
    with pytest.raises(UserError, match="multiple"): TeacherPool(make, 10, 4)


def test_batches_are_pure_and_the_pool_changes_nothing(root):
    pooled, fresh = stage_of(DistillStage, root, teacher_steps=2, pool=8, pool_block=4), stage_of(DistillStage, root, teacher_steps=2, pool=0)
    pooled.build(), fresh.build()
    together = pooled.batch([3, 4, 11])
    assert all(torch.equal(value[0], value[2]) for value in together.values())            # 11 = 3 in a pool of 8
    for name, value in fresh.batch([3, 4]).items(): torch.testing.assert_close(value, together[name][:2], rtol=1e-4, atol=1e-5)
    teacher = load_decoder(root / "decoder/pixel_decoder")
    torch.testing.assert_close(teacher.paint(together["noise"], together["latents"], 2), together["painted"], rtol=1e-4, atol=1e-5)


def test_noise_on_latents_is_uniform_in_its_strength(root):
    from scipy.stats import kstest
    noise = stage_of(DistillStage, root).latent_noise(range(400))
    assert noise.shape == (400, 64, 8) and kstest(noise.flatten(1).std(1).numpy() / 0.2, "uniform").pvalue > 0.01


@pytest.mark.parametrize("kind, model", [(DistillStage, {}), (FeedForwardStage, dict(base_channels=8, num_layers=1))])
def test_a_stage_evaluates_what_it_wrote(kind, model, root):
    stage = stage_of(kind, root, model, teacher_steps=2, pool=0, weights="fp16")
    module = stage.build()
    with torch.no_grad(): stage.save(module.eval(), root / kind.name); rows = stage.measure(module, root / kind.name)
    again, images = PixelAutoencoder.from_pretrained(root, kind.name, stage.encoder), stage.held_out()["scenes"]
    ours = next(row for row in rows if row["category"] in ("distilled, 1 step", "feed-forward") and row["metric"] == "PSNR")
    assert ours["value"] == pytest.approx(psnr(images, again.reconstruct(images)).double().mean().item(), abs=1e-4) and ours["n"] == 6
    assert again.decoder.num_inference_steps == 1
    assert type(again.decoder) is (PixelDiffusionDecoder if kind is DistillStage else FeedForwardDecoder)
    assert {row["images"] for row in rows} == {"scenes", "photographs"} and all(row["low"] <= row["value"] <= row["high"] for row in rows)


def test_judges_are_named_on_the_card(root):
    stage = stage_of(FeedForwardStage, root, dict(base_channels=8, num_layers=1), perceptual="efficientnet", alignment="efficientnet")
    module = stage.build()
    assert "EfficientNet-Lite0 feature distance" in stage.about and "efficientnet-lite0/16" in stage.about
    _, metrics = module(torch.rand(2, 3, 32, 32), torch.Generator().manual_seed(0))
    assert set(metrics) == {"mse", "perceptual (EfficientNet-Lite0 feature distance)", "alignment (efficientnet-lite0/16)", "estimate_mse"}


def test_stages_refuse_in_a_sentence(root, tmp_path_factory):
    with pytest.raises(UserError, match="encoder.json"): stage_of(DistillStage, tmp_path_factory.mktemp("empty"))
    with pytest.raises(UserError, match="weights"): stage_of(FeedForwardStage, root, weights="int4")
    (root / "decoder/encoder.json").write_text(json.dumps(encoder_link(vision(5))))
    with pytest.raises(UserError, match="another encoder"): stage_of(DistillStage, root)


def test_rows_of_the_comparison_against_numpy():
    generator = torch.Generator().manual_seed(0)
    originals, painted = torch.rand(9, 3, 8, 8, generator=generator), {name: torch.rand(9, 3, 8, 8, generator=generator) for name in ("many", "one")}
    rows = comparison_rows(painted, originals, "noise", Distance())
    value = lambda label, metric: next(row["value"] for row in rows if row["category"] == label and row["metric"] == metric)
    by_hand = {name: np.mean([10 * np.log10(1 / np.mean((a - b) ** 2)) for a, b in zip(each.double().numpy(), originals.double().numpy())]) for name, each in painted.items()}
    for name in painted: assert value(name, "PSNR") == pytest.approx(by_hand[name], abs=1e-4)
    assert value("one", "PSNR minus that of many") == pytest.approx(by_hand["one"] - by_hand["many"], abs=1e-4)
    assert value("one", Distance.name) == pytest.approx((painted["one"] - originals).abs().mean().item(), abs=1e-6)
    assert len(rows) == 5 and all(row["n"] == 9 for row in rows)


def test_the_same_noise_for_every_decoder():
    decoder, latents = awake(), torch.randn(5, 64, 8)
    painted = paint_all({"a": (decoder, 2), "b": (decoder, 2), "c": (decoder, 1)}, latents, seed=3, batch_size=2)
    assert torch.equal(painted["a"], painted["b"]) and not torch.equal(painted["a"], painted["c"])
    assert torch.equal(painted["a"][:2], decoder.decode(latents[:2], 2, 3))


def test_decoders_on_other_latents_are_left_out_with_a_reason(root):
    for folder, decoder in (("distill", awake(3)), ("decoder-feedforward", FeedForwardDecoder(base_channels=8, num_layers=1))):
        MLPReducer.from_pretrained(root / "decoder/reducer").save_pretrained(root / folder / "reducer")
        decoder.save_pretrained(root / folder / "pixel_decoder")
        (root / folder / "encoder.json").write_text(json.dumps(encoder_link(vision())))
    rows, notes = compare_decoders(root, {"files": torch.rand(3, 3, 40, 40)}, steps=2, encoder=vision())
    assert not notes and [row["category"] for row in rows[:4]] == ["diffusion, 2 steps", "diffusion, 1 step", "distilled, 1 step", "feed-forward"]
    pca = PCAReducer(32, 8)
    pca.partial_fit(torch.randn(99, 32)).finalize().save_pretrained(root / "distill/reducer")
    assert "another decoder" in load_decoders(root, 2, vision())[2]["distilled, 1 step"]
    with pytest.raises(UserError, match="run.json"): held_out_pictures(root, 4)


def test_smoke_preset_trains_both_stages_by_the_public_command(tmp_path, capsys):
    from vugen.encode.contrastive import ContrastiveModel
    from vugen.lab.cli import main
    ContrastiveModel(["red", "circle"], **load_preset("smoke").stage("contrastive").model).save_pretrained(tmp_path / "contrastive")
    def call(*words):
        with pytest.raises(SystemExit) as left: main([*map(str, words), "--root", str(tmp_path)])
        return left.value.code
    for name in ("decoder", "distill", "decoder-feedforward"):
        assert call("train", name, "--preset", "smoke", "--set", "options.evaluation=4") == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "distill/run.json").read_text())
    assert {row["category"] for row in record["rows"]} == {"diffusion, 8 steps", "diffusion, 1 step", "distilled, 1 step"} and record["frozen_weights"]
    assert "distilled, 1 step" in (tmp_path / "distill/README.md").read_text()
    assert call("reconstruct", "--compare", "--limit", 4, "--steps", 2, "--json", tmp_path / "rows.json") == 0
    told = json.loads((tmp_path / "rows.json").read_text())
    assert {row["category"] for row in told["rows"] if row["metric"] == "PSNR"} == {"diffusion, 2 steps", "diffusion, 1 step", "distilled, 1 step", "feed-forward"}
    assert str(tmp_path) not in told["run"]["command"]
    assert call("reconstruct") == 2


def test_an_interrupted_distillation_resumes_to_the_same_weights(root):
    from vugen.train.loop import run
    def train(folder, **options):
        stage = stage_of(DistillStage, root, teacher_steps=2, pool=8, pool_block=4)
        recipe = Recipe(steps=4, batch_size=4, warmup_steps=1, checkpoint_every=2, precision="fp32", ema_decay=0.9)
        return run(stage, recipe, root / folder, show=False, **options)
    train("whole")
    assert train("parts", stop_after=2)["status"] == "stopped" and train("parts", resume=True)["status"] == "finished"
    whole, parts = (load_decoder(root / folder / "pixel_decoder").state_dict() for folder in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


class Loop:
    "The accelerator of a loop in bf16."
    device = torch.device("cpu")
    def autocast(self): return torch.autocast("cpu", dtype=torch.bfloat16)


def test_lessons_are_taught_in_the_trainings_precision(root):
    "They are made in a background thread, which inherits no autocast."
    from concurrent.futures import ThreadPoolExecutor
    stage = stage_of(DistillStage, root, {}, teacher_steps=2, pool=0)
    module, seen = stage.build(), set()
    next(part for part in module.teacher.modules() if isinstance(part, torch.nn.Conv2d)).register_forward_hook(lambda part, inputs, output: seen.add(output.dtype))
    with ThreadPoolExecutor(1) as background:
        plain = background.submit(stage.lesson, [0, 1]).result()
        stage.accelerator = Loop()
        eased = background.submit(stage.lesson, [0, 1]).result()
    assert seen == {torch.float32, torch.bfloat16} and all(value.dtype == torch.float32 for value in eased.values())
    assert (plain["painted"] - eased["painted"]).abs().mean() < 0.02
