"Diffusers pipelines as denoisers and scorers: one adapter against diffusers' own schedulers, plain loops, folders in the real format and what goes wrong in them."
import json
import shutil

import pytest
import torch

from vugen.data.images import to_pil
from vugen.errors import UserError
from vugen.models.flow import convert_error, interpolate, reversed_time, signal_to_noise, velocity_target
from vugen.models.seams import Scorer
from vugen.understand.pipelines import (PipelineScorer, RectifiedFlow, SD3Denoiser, TextStates, UNetDenoiser, VariancePreserving, default_dtype, load_denoiser, pipeline_scorer, resize_pictures, tiny_pipeline)
from vugen.understand.published import ScoreStore, load_published, run_published

diffusers = pytest.importorskip("diffusers")
KINDS = ("epsilon", "v_prediction", "flow")  # Stable Diffusion 1.5, 2.1, 3
TEXTS = ["a red circle", "a blue square", "a green star"]


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipelines")
    for kind in (*KINDS, "sample"): tiny_pipeline(kind, seed=3).save_pretrained(place / kind)
    return place


@pytest.fixture(scope="module")
def denoisers(root): return {kind: load_denoiser(root / kind) for kind in (*KINDS, "sample")}


@pytest.fixture(scope="module")
def pictures(): return torch.nn.functional.interpolate(torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)), (32, 32))


@pytest.fixture
def copied(root, tmp_path):
    def make(kind): return shutil.copytree(root / kind, tmp_path / kind)
    return make


def training_scheduler(kind, root):
    "The scheduler that such a network is trained with, from the folder's own configuration"
    if kind == "flow": return diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(root / kind, subfolder="scheduler")
    return diffusers.DDPMScheduler.from_pretrained(root / kind, subfolder="scheduler", clip_sample=False)


def theirs(kind, scheduler, data, noise, step):
    "(noisy latent, timestep that the network is told, its exact target) as diffusers makes them"
    steps = torch.full((len(data),), step)
    if kind == "flow": return scheduler.scale_noise(data, scheduler.timesteps[steps], noise), scheduler.timesteps[steps], noise - data
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(data, noise, steps), "sample": data}[kind]
    return scheduler.add_noise(data, noise, steps), steps, target


def time_of(kind, scheduler, step):
    "The step in our convention, from first principles in float64"
    if kind == "flow": return 1 - scheduler.sigmas[step].double().item()
    share = scheduler.alphas_cumprod[step].double()
    return (share.sqrt() / (share.sqrt() + (1 - share).sqrt())).item()


def own_error(kind): return "velocity" if kind == "flow" else "epsilon"


# One adapter for prediction target and direction of time: the identities

@pytest.mark.parametrize("kind", [*KINDS, "sample"])
@pytest.mark.parametrize("step", [1, 250, 500, 900, 999])
def test_an_oracle_has_no_error(denoisers, root, kind, step):
    denoiser, scheduler = denoisers[kind], training_scheduler(kind, root)
    data, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    t = torch.full((2,), time_of(kind, scheduler, step)).float()
    seen, told, target = theirs(kind, scheduler, data, noise, step)
    def oracle(latents, timestep):
        assert torch.allclose(latents, seen, atol=2e-6) and torch.allclose(timestep.float(), told.float(), atol=1e-3)
        return target
    wrong = denoiser.clock.velocity(lambda latents, timestep: oracle(latents, timestep) + 1, interpolate(data, noise, t), t)
    error = (denoiser.clock.velocity(oracle, interpolate(data, noise, t), t) - velocity_target(data, noise)).square().flatten(1).sum(1)
    assert (error < 1e-5).all() and ((wrong - velocity_target(data, noise)).square().flatten(1).sum(1) > .5).all()
    assert (convert_error(error, t, "velocity", own_error(kind)) < 1e-7).all()


@pytest.mark.parametrize("kind", [*KINDS, "sample"])
@pytest.mark.parametrize("step", [3, 200, 500, 800, 997])
def test_the_errors_of_the_network_in_three_currencies(denoisers, root, pictures, kind, step):
    "Computed directly with diffusers' schedulers, and through the adapter"
    denoiser, scheduler = denoisers[kind], training_scheduler(kind, root)
    data, noise = denoiser.encode(pictures), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    conditions = denoiser.prepare(TEXTS[:2])
    noisy, told, target = theirs(kind, scheduler, data, noise, step)
    with torch.no_grad(): answer = denoiser.call(denoiser.network, noisy, told, conditions)
    square = lambda difference: difference.square().flatten(1).sum(1)
    if kind == "flow":
        sigma = scheduler.sigmas[step]
        one_step = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        one_step.set_timesteps(sigmas=[sigma.item()])
        drawn = one_step.step(answer, one_step.timesteps[0], noisy).prev_sample  # one Euler step from u to 0
        epsilon = drawn + answer
        direct = {"velocity": square(answer - target), "data": square(drawn - data), "epsilon": square(epsilon - noise)}
        assert torch.allclose(direct["epsilon"], (1 - sigma) ** 2 * direct["velocity"], rtol=2e-3) and torch.allclose(direct["data"], sigma ** 2 * direct["velocity"], rtol=2e-3)
    else:
        drawn, share = scheduler.step(answer, step, noisy).pred_original_sample, scheduler.alphas_cumprod[step]
        epsilon = (noisy - share.sqrt() * drawn) / (1 - share).sqrt()
        direct = {"data": square(drawn - data), "epsilon": square(epsilon - noise)}
        assert torch.allclose(direct["data"], direct["epsilon"] / (share / (1 - share)), rtol=2e-3)
        if kind == "epsilon": assert torch.allclose(direct["epsilon"], square(answer - noise), rtol=1e-3)
        if kind == "v_prediction": assert torch.allclose(direct["epsilon"], share * square(answer - target), rtol=2e-3)
    t = torch.full((2,), time_of(kind, scheduler, step)).float()
    ours = square(denoiser.velocity(interpolate(data, noise, t), t, conditions) - velocity_target(data, noise))
    for currency, error in direct.items(): assert torch.allclose(convert_error(ours, t, "velocity", currency), error, rtol=2e-3), currency
    assert signal_to_noise(t[0]).item() == pytest.approx(((1 - sigma) / sigma).square().item() if kind == "flow" else (share / (1 - share)).item(), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_reversing_time_twice_changes_nothing(denoisers, kind):
    denoiser, conditions = denoisers[kind], denoisers[kind].prepare(TEXTS[:2])
    noisy, t = torch.randn(2, 4, 8, 8), denoiser.snap(torch.tensor([.3, .6]))
    velocity = lambda noisy, t: denoiser.velocity(noisy, t, conditions)
    for points in ("noise", "data"): assert torch.allclose(reversed_time(reversed_time(velocity, points), points)(noisy, t), velocity(noisy, t), atol=1e-5)
    once = reversed_time(velocity, "noise")
    assert torch.allclose(once(noisy, 1 - t), -velocity(noisy, t), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_all_thousand_steps_there_and_back(denoisers, root, kind):
    denoiser, scheduler = denoisers[kind], training_scheduler(kind, root)
    times = torch.tensor([time_of(kind, scheduler, step) for step in range(1000)], dtype=torch.float64).float()
    assert torch.equal(denoiser.snap(times), times) if kind == "flow" else torch.allclose(denoiser.snap(times), times, rtol=0, atol=1e-7)
    told = []
    denoiser.clock.velocity(lambda latents, timestep: told.append(timestep) or latents, torch.zeros(1000, 1), denoiser.snap(times))
    if kind == "flow": assert torch.allclose(told[0], scheduler.timesteps, rtol=0, atol=1e-3)
    else:
        assert torch.equal(told[0], torch.arange(1000)) and not told[0].is_floating_point()
        between = times[:-1] + .49 * times.diff()
        assert torch.equal(denoiser.clock.index(between), torch.arange(999)) and torch.equal(denoiser.snap(torch.tensor([0., 1.])), denoiser.clock.times[[999, 0]])


@pytest.mark.parametrize("betas", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}])
def test_other_schedules_up_to_pure_noise(betas):
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction", **betas)
    clock, steps = VariancePreserving(scheduler.alphas_cumprod, "v_prediction"), torch.arange(1000)
    data, noise = torch.randn(1000, 3), torch.randn(1000, 3)
    velocity = clock.velocity(lambda latents, timestep: scheduler.get_velocity(data, noise, steps), interpolate(data, noise, clock.times), clock.times)
    assert torch.allclose(velocity, data - noise, atol=1e-5) and torch.equal(clock.index(clock.times), steps)
    if "rescale_betas_zero_snr" in betas: assert clock.times[-1] == 0


def test_times_between_steps_are_refused(denoisers):
    denoiser = denoisers["epsilon"]
    with pytest.raises(ValueError, match="snap"): denoiser.velocity(torch.zeros(1, 4, 8, 8), (denoiser.clock.times[500:501] + denoiser.clock.times[501:502]) / 2, denoiser.prepare(["a cat"]))
    with pytest.raises(UserError, match="'flow_prediction'"): VariancePreserving(torch.linspace(.99, .01, 10), "flow_prediction")
    assert torch.equal(RectifiedFlow().snap(torch.tensor([.123])), torch.tensor([.123]))


# Latents, captions, cost

@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_diffusers(root, denoisers, kind):
    images = torch.rand(6, 3, 48, 40)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(root / kind)
    vae = pipeline.vae
    small = torch.nn.functional.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad(): mean = vae.encode(pipeline.image_processor.normalize(small)).latent_dist.mode()
    expected = (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    found = denoisers[kind].encode(images)
    assert torch.allclose(found, expected, atol=1e-5) and found.dtype == torch.float32 and torch.equal(found, denoisers[kind].encode(images))
    assert abs(vae.config.scaling_factor - 1) > .1 and (kind != "flow" or vae.config.shift_factor)  # neither is a bystander
    assert torch.allclose(denoisers[kind].encode(images[[4]]), found[[4]], atol=1e-5)


def test_resizing_is_antialiased_and_refuses_what_is_no_picture():
    fine = (torch.arange(64) % 2).float().expand(1, 3, 64, 64)  # stripes of one pixel
    assert (resize_pictures(fine, (16, 16))[..., 2:-2] - .5).abs().max() < .05 and resize_pictures(fine, (64, 64)).data_ptr() == fine.data_ptr()
    assert resize_pictures(torch.rand(1, 3, 9, 5), (8, 12)).shape == (1, 3, 8, 12)
    with pytest.raises(UserError, match="B, 3, H, W"): resize_pictures(torch.rand(3, 8, 8), (4, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_read_as_diffusers_reads_them(root, denoisers, kind):
    pipeline, found = diffusers.DiffusionPipeline.from_pretrained(root / kind), denoisers[kind].prepare([*TEXTS, ""])
    for row, text in enumerate([*TEXTS, ""]):
        with torch.no_grad(): made = pipeline.encode_prompt(prompt=text, **({"prompt_2": None, "prompt_3": None} if kind == "flow" else {}), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        assert torch.allclose(found.states[row], made[0][0], atol=1e-5)
        if kind == "flow": assert torch.allclose(found.pooled[row], made[2][0], atol=1e-5)
    picked = found.select(torch.tensor([1, 1, 0]))
    assert torch.equal(picked.states, found.states[[1, 1, 0]]) and (picked.pooled is None) == (kind != "flow")


@pytest.mark.parametrize("kind", KINDS)
def test_long_captions_are_named_and_cut_only_when_asked(root, denoisers, kind):
    long = "a circle that is red and round " * 6
    with pytest.raises(UserError, match="'a circle that is red.* tokens and .* reads 77"): denoisers[kind].prepare(["a cat", long])
    scorer = PipelineScorer(denoisers[kind], num_times=1)
    with pytest.raises(UserError, match="scorer 'diffusion:"): scorer.score(torch.rand(1, 3, 32, 32), [long])
    cut = load_denoiser(root / kind, truncate=True)
    states, longer = (cut.prepare([text]).states for text in (long, long + "and more"))
    assert torch.equal(states[:, :77], longer[:, :77])  # what CLIP reads
    if kind == "flow": assert not torch.equal(states[:, 77:], longer[:, 77:])  # T5 reads on


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_flops_and_what_else_a_denoiser_promises(denoisers, kind):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    denoiser = denoisers[kind]
    assert denoiser.shape == (4, 8, 8) and denoiser.tokens == (16 if kind == "flow" else 64) and denoiser.device.type == "cpu" and denoiser.name == kind
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoiser.call(denoiser.network, torch.randn(1, 4, 8, 8), torch.tensor([10]), denoiser.prepare(["a cat"]))
        text = FlopCounterMode(display=False)
        with text: denoiser.prepare(["a cat"])
    assert denoiser.flops == counter.get_total_flops() - 2 * text.get_total_flops() > 1e6
    assert not any(weight.requires_grad for weight in denoiser.network.parameters()) and not denoiser.network.training


# The scorer

def plain_score(kind, root, denoiser, picture, text, scorer):
    "Minus the mean error of one picture under one caption, in diffusers' words"
    scheduler = training_scheduler(kind, root)
    if kind == "flow": scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipeline, data = denoiser.pipeline, denoiser.encode(picture[None])
    noises, errors = torch.randn(len(scorer.times), 4, 8, 8, generator=torch.Generator().manual_seed(scorer.seed)), []
    for t, noise in zip(scorer.times, noises):
        if kind == "flow":
            states, _, pooled, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False)
            noisy = (1 - t) * noise + t * data
            with torch.no_grad(): answer = pipeline.transformer(noisy, states, pooled, (1000 * (1 - t))[None]).sample
            errors.append((answer - (noise - data)).square().sum().item())
        else:
            step = min(range(1000), key=lambda step: abs(time_of(kind, scheduler, step) - t.item()))
            noisy, told, target = theirs(kind, scheduler, data, noise[None], step)
            with torch.no_grad(): answer = pipeline.unet(noisy, told, pipeline.encode_prompt(text, "cpu", 1, False)[0]).sample
            share = scheduler.alphas_cumprod[step]
            errors.append((answer - target).square().sum().item() * (share.item() if kind == "v_prediction" else 1))
    return -sum(errors) / len(errors)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_a_plain_loop(root, denoisers, pictures, kind):
    scorer = pipeline_scorer(root / kind, num_times=3, seed=5)
    bare = pipeline_scorer(root / kind, num_times=3, seed=5, subtract_unconditional=False)
    assert isinstance(scorer, Scorer) and scorer.picture_size == 32 and scorer.name == f"diffusion:{kind}" and scorer.error == own_error(kind)
    expected = torch.tensor([[plain_score(kind, root, scorer.generator, picture, text, scorer) for text in ["", *TEXTS]] for picture in pictures])
    assert torch.allclose(bare.score(pictures, TEXTS), expected[:, 1:], rtol=5e-5)
    assert torch.allclose(scorer.score(pictures, TEXTS), expected[:, 1:] - expected[:, :1], atol=1e-4 * expected.abs().max().item(), rtol=0)
    assert (expected[:, 1:].std(1) > 2e-4 * expected.abs().max()).all()  # captions matter to these networks, beyond the tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_all_candidates_together_or_one_at_a_time(denoisers, pictures, kind):
    together = PipelineScorer(denoisers[kind], num_times=2, batch_size=64).score(pictures, TEXTS)
    one = PipelineScorer(denoisers[kind], num_times=2, batch_size=1)
    tolerance = dict(rtol=1e-4, atol=2e-3)
    assert torch.allclose(torch.cat([one.score(pictures[[row]], [text]) for row in range(2) for text in TEXTS]).view(2, 3), together, **tolerance)
    odd = PipelineScorer(denoisers[kind], num_times=2, batch_size=5)
    assert torch.allclose(odd.score_pairs(pictures, TEXTS[:2]), together[:, :2].diag(), **tolerance) and torch.allclose(odd.score_items(pictures[None], [TEXTS[:2]])[0], together[:, :2], **tolerance)
    assert torch.allclose(odd.score(pictures, [*TEXTS[::-1], TEXTS[0]])[:, [2, 1, 0]], together, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_share_noise_captions_are_read_once_and_guidance_never(root, pictures, monkeypatch, kind):
    denoiser, seen, read = load_denoiser(root / kind), [], []
    call, encode = denoiser.call, denoiser.pipeline.encode_prompt
    monkeypatch.setattr(denoiser, "call", lambda network, latents, timestep, conditions: seen.append((latents, timestep)) or call(network, latents, timestep, conditions))
    monkeypatch.setattr(denoiser.pipeline, "encode_prompt", lambda prompt, *rest, **more: read.append(list(prompt)) or encode(prompt, *rest, **more))
    scorer = PipelineScorer(denoiser, num_times=2, batch_size=4, seed=9)
    scorer.score(pictures, [*TEXTS, TEXTS[0]])
    assert sum(len(latents) for latents, _ in seen) == 2 * 2 * (4 + 1) and read == [TEXTS, [""]]
    data, noises = denoiser.encode(pictures), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    for number, (latents, timestep) in enumerate(seen[:4]):  # picture 0 under four captions at two times, then picture 1
        t = scorer.times[number % 2]
        scale = 1 if kind == "flow" else (denoiser.clock.signal + denoiser.clock.noise)[timestep[0]]
        assert torch.allclose(latents / scale, (t * data[number // 2] + (1 - t) * noises[number % 2]).expand(4, -1, -1, -1), atol=1e-5) and len(set(timestep.tolist())) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_caption_that_a_network_denoises_best_wins(denoisers, pictures, monkeypatch, kind):
    "A network that is right under the second caption only: score 0 there, below elsewhere"
    denoiser = denoisers[kind]
    scorer = PipelineScorer(denoiser, num_times=3, subtract_unconditional=False)
    data, noises, number = denoiser.encode(pictures[:1]), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), iter(range(3))
    def oracle(network, latents, timestep, conditions):
        noise, wrong = noises[next(number)], torch.tensor([1., 0., 1.]).view(3, 1, 1, 1)
        if kind == "v_prediction":
            share = denoiser.pipeline.scheduler.alphas_cumprod[timestep][0]
            return share.sqrt() * noise - (1 - share).sqrt() * data + wrong
        return (noise if kind == "epsilon" else noise - data) + wrong
    monkeypatch.setattr(denoiser, "call", oracle)
    scores = scorer.score(pictures[:1], TEXTS)[0]
    assert scores.argmax() == 1 and abs(scores[1]) < 1e-6 and (scores[[0, 2]] < -50).all()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_sums_in_single(root, denoisers, pictures, kind):
    half = load_denoiser(root / kind, dtype="bfloat16")
    assert half.network.dtype == torch.bfloat16 and next(half.vae.parameters()).dtype == torch.float32 and torch.equal(half.encode(pictures), denoisers[kind].encode(pictures))
    conditions, noisy, t = half.prepare(TEXTS[:2]), torch.randn(2, 4, 8, 8), half.snap(torch.tensor([.4, .4]))
    assert conditions.states.dtype == torch.bfloat16 and half.velocity(noisy, t, conditions).dtype == torch.float32
    coarse, fine = (PipelineScorer(each, num_times=2, subtract_unconditional=False)._errors(each.encode(pictures), TEXTS[:2]) for each in (half, denoisers[kind]))
    assert coarse.dtype == torch.float32 and torch.allclose(coarse, fine, rtol=.05) and not torch.equal(coarse, fine) and half.fingerprint != denoisers[kind].fingerprint
    assert not torch.equal(coarse, coarse.bfloat16().float())  # a sum in half precision would have eight bits
    assert default_dtype("cuda") == torch.float16 and default_dtype("cpu") == torch.float32


def test_the_error_that_is_summed_can_be_chosen(denoisers, pictures):
    plain, other = (PipelineScorer(denoisers["epsilon"], num_times=1, error=error, subtract_unconditional=False) for error in (None, "data"))
    ratio = other.score(pictures, TEXTS) / plain.score(pictures, TEXTS)
    assert torch.allclose(ratio, (1 / signal_to_noise(plain.times)).expand(2, 3), rtol=1e-4)
    settings = [{}, {"num_times": 3}, {"low": .1}, {"seed": 1}, {"error": "velocity"}, {"subtract_unconditional": False}]
    made = [PipelineScorer(denoisers["epsilon"], **each).fingerprint for each in settings]
    assert len(set(made)) == len(settings) and made[0] == PipelineScorer(denoisers["epsilon"], batch_size=3, name="other").fingerprint
    for wrong in ({"error": "loss"}, {"num_times": 0}, {"low": .9, "high": .1}, {"batch_size": 0}):
        with pytest.raises(UserError): PipelineScorer(denoisers["epsilon"], **wrong)


# Folders

@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints_are_of_what_is_computed_not_of_where_it_lies(root, copied, denoisers, kind):
    folder, first = copied(kind), denoisers[kind].fingerprint
    assert load_denoiser(folder).fingerprint == first and len(first) == 16 and load_denoiser(folder, size=64).fingerprint != first
    denoisers[kind].prepare(["a cat"])
    assert load_denoiser(root / kind).fingerprint == first
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    changed = {"num_train_timesteps": 500} if kind == "flow" else {"beta_end": .013}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, **changed}))
    assert load_denoiser(folder).fingerprint != first
    assert len({denoiser.fingerprint for denoiser in denoisers.values()}) == len(denoisers)


def test_another_size(root):
    denoiser = load_denoiser(root / "flow", size=64)
    assert denoiser.shape == (4, 16, 16) and denoiser.tokens == 64 and denoiser.encode(torch.rand(1, 3, 32, 32)).shape == (1, 4, 16, 16)
    assert denoiser.velocity(torch.randn(1, 4, 16, 16), torch.tensor([.5]), denoiser.prepare(["a cat"])).shape == (1, 4, 16, 16)
    with pytest.raises(UserError, match="multiple of 8"): load_denoiser(root / "flow", size=60)
    with pytest.raises(UserError, match="at most 128"): load_denoiser(root / "flow", size=136)


def test_t5_may_be_absent_or_left_out(root, tmp_path, pictures):
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(root / "flow", text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path / "small")
    assert json.loads((tmp_path / "small" / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    with torch.no_grad(): states = pipeline.encode_prompt("a cat", None, None, do_classifier_free_guidance=False)[0]
    absent, left_out = load_denoiser(tmp_path / "small"), load_denoiser(root / "flow", t5=False)
    for denoiser in (absent, left_out): assert torch.allclose(denoiser.prepare(["a cat"]).states, states, atol=1e-6) and states[:, 77:].abs().max() == 0 and states.shape[1] == 333
    assert absent.fingerprint == left_out.fingerprint
    shutil.copytree(root / "flow", tmp_path / "torn"); shutil.rmtree(tmp_path / "torn" / "text_encoder_3")
    with pytest.raises(UserError, match="text_encoder_3.*t5=False"): load_denoiser(tmp_path / "torn")
    assert load_denoiser(tmp_path / "torn", t5=False).fingerprint == absent.fingerprint


def test_older_folders_load_the_same(copied, denoisers):
    "Vocabulary in two files, attention of the VAE under its old names, half-precision variants"
    from safetensors.torch import load_file, save_file
    folder, states = copied("epsilon"), denoisers["epsilon"].prepare(TEXTS)
    model = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {name.replace(new, was): value for name, value in weights.items() for new, was in [next(((new, was) for new, was in old.items() if f".{new}." in name), ("", ""))]}
    assert len(renamed) == len(weights) and any("proj_attn" in name for name in renamed)
    save_file(renamed, folder / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    loaded, images = load_denoiser(folder), torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.prepare(TEXTS).states, states.states) and torch.allclose(loaded.encode(images), denoisers["epsilon"].encode(images), atol=1e-6)


def test_variants_are_named_and_taken_when_asked_for(root, tmp_path):
    diffusers.DiffusionPipeline.from_pretrained(root / "flow").save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(UserError, match="variant='fp16'"): load_denoiser(tmp_path / "half")
    assert torch.equal(load_denoiser(tmp_path / "half", variant="fp16").prepare(["a cat"]).states, load_denoiser(root / "flow").prepare(["a cat"]).states)


def break_json(folder): (folder / "model_index.json").write_text('{"_class_name": ')
def edit(**changes):
    def change(folder):
        path = folder / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return change
def as_pickle(folder):
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin"); (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
def truncated(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
def lacking(folder):
    from safetensors.torch import load_file, save_file
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "position_embedding" not in name}, path, metadata={"format": "pt"})
def scheduler(folder): (folder / "scheduler" / "scheduler_config.json").write_text("{")
def tokenizer(folder): (folder / "tokenizer" / "tokenizer.json").write_text("{")
def flow_scheduler(folder):
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    edit(scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])(folder)
def inpainting(folder):
    unet = diffusers.UNet2DConditionModel.from_config({**json.loads((folder / "unet" / "config.json").read_text()), "in_channels": 9})
    unet.save_pretrained(folder / "unet")

@pytest.mark.parametrize("damage, words", [
    (lambda folder: (folder / "model_index.json").unlink(), "no model_index.json"), (break_json, "cannot be read as JSON"), (edit(_class_name="FluxPipeline"), "FluxPipeline.*StableDiffusionPipeline, StableDiffusion3Pipeline"),
    (edit(_class_name=None), "no pipeline of diffusers"), (edit(unet=[None, None]), "no unet"), (edit(unet=["evil", "Pickled"]), "unet of class Pickled"), (edit(scheduler=["diffusers", "NoSuchScheduler"]), "NoSuchScheduler.*update"),
    (lambda folder: shutil.rmtree(folder / "vae"), "no folder vae"), (as_pickle, "pickle.*never opened"), (lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "vae has no weights"),
    (truncated, "unet cannot be loaded as UNet2DConditionModel"), (lacking, "lacks weights of CLIPTextModel.*position_embedding"), (scheduler, "scheduler cannot be loaded as PNDMScheduler"), (tokenizer, "tokenizer cannot be loaded as CLIPTokenizer"),
    (flow_scheduler, "FlowMatchEulerDiscreteScheduler, which knows no alphas_cumprod"), (inpainting, "reads 9 channels"), (lambda folder: shutil.rmtree(folder) or folder.write_text("x"), "is a file"), (lambda folder: shutil.rmtree(folder), "does not exist"),
])
def test_what_is_wrong_with_a_folder_is_said_in_one_sentence(copied, damage, words):
    folder = copied("epsilon")
    damage(folder)
    with pytest.raises(UserError, match=words) as told: load_denoiser(folder)
    assert str(folder) in str(told.value) or folder.name in str(told.value)
    assert "\n" not in str(told.value) and str(told.value).endswith(".") and len(str(told.value)) < 400


def test_a_hub_that_cannot_be_reached_and_one_that_can(root, monkeypatch, tmp_path):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="nobody/nothing is neither a folder here nor a pipeline on the hub that can be reached"): load_denoiser("nobody/nothing")
    with pytest.raises(UserError, match="does not exist"): load_denoiser("just-a-name")
    asked = {}
    index = json.loads((root / "epsilon" / "model_index.json").read_text())
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda name: {**index, "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]})
    def download(name, **options):
        asked.update(options, name=name)
        return root / "epsilon"
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "download", download)
    found = load_denoiser("owner/model", variant=None)
    assert found.name == "owner/model" and asked["use_safetensors"] is True and asked["safety_checker"] is None
    def refuse(name, **options): raise OSError("no safetensors\nat all")
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "download", refuse)
    with pytest.raises(UserError, match="cannot be fetched.*no safetensors at all"): load_denoiser("owner/model")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda name: {"_class_name": "FluxPipeline"})
    with pytest.raises(UserError, match="owner/model holds a FluxPipeline"): load_denoiser("owner/model")


@pytest.mark.parametrize("dtype", ["half-ish", "int64", 3])
def test_unknown_precisions_are_refused(root, dtype):
    with pytest.raises(UserError, match="dtype"): load_denoiser(root / "epsilon", dtype=dtype)


def test_diffusers_missing_is_said(root, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="pip install diffusers"): load_denoiser(root / "epsilon")


def test_kinds_of_tiny_pipelines_repeat():
    first, second = tiny_pipeline("flow", seed=1), tiny_pipeline("flow", seed=1)
    assert SD3Denoiser(first, "a").fingerprint == SD3Denoiser(second, "b").fingerprint != SD3Denoiser(tiny_pipeline("flow", seed=2), "a").fingerprint
    assert isinstance(UNetDenoiser(tiny_pipeline("sample"), "x").prepare(["a"]), TextStates)
    with pytest.raises(ValueError, match="bigger"): tiny_pipeline("bigger")


# On a published benchmark

def test_winoground_with_a_store_that_is_resumed(root, tmp_path, monkeypatch):
    rows = [{"id": number, "image_0": f"ex_{number}_img_0", "image_1": f"ex_{number}_img_1", "caption_0": "a red circle, left", "caption_1": "left, a red circle", "collapsed_tag": "Relation"} for number in range(3)]
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for row in rows:
        for side in (0, 1): to_pil(torch.rand(3, 8, 8)).save(tmp_path / "data" / "images" / f"{row[f'image_{side}']}.png")
    suite, scorer, store = load_published("winoground", tmp_path, size=32), pipeline_scorer(root / "flow", num_times=1), ScoreStore(tmp_path / "scores.parquet")
    found = run_published(suite, {scorer.name: scorer}, store, scorer.fingerprint, 32, batch_size=2)
    assert {row["metric"] for row in found["rows"]} >= {"text", "image", "group"} and all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in found["rows"])
    images = torch.stack([suite.pictures([index])[0] for index in range(3)])
    expected = scorer.score_items(images, [item.captions for item in suite.items])
    kept = sorted(store.read(), key=lambda record: record["place"])
    assert torch.allclose(torch.tensor([record["scores"] for record in kept]).view(3, 2, 2), expected, atol=2e-3, rtol=1e-4) and {record["scorer"] for record in kept} == {"diffusion:flow"}
    monkeypatch.setattr(scorer.generator, "call", None)  # nothing is asked a second time
    assert run_published(suite, {scorer.name: scorer}, store, scorer.fingerprint, 32)["rows"] == found["rows"]


def test_the_command_line_names_a_pipeline_by_its_folder(root, tmp_path, capsys, monkeypatch):
    from vugen.lab.cli import main
    monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as left: main(["bind", "--suite", "scenes", "--scorer", f"diffusion:{root / 'flow'}", "--limit", "1", "--json", str(tmp_path / "rows.json")])
    found = json.loads((tmp_path / "rows.json").read_text())
    assert left.value.code == 0 and {row["scorer"] for row in found["rows"]} == {"diffusion:flow"} and str(root) not in json.dumps(found)
    assert set(found["run"]["pretrained"]) == {"diffusion:flow"}
