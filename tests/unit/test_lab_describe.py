"""What `describe` says of models is held against counts made another way, torch's own lists and a real training step."""
import functools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from vugen.errors import UserError
from vugen.lab import describe as module
from vugen.lab.describe import EXACT, PRODUCTS, Setup, describe, optional_parts, parts_of, published_vlm, saved_bytes, settled, stage_memory, unit_sizes
from vugen.train.presets import Recipe, StagePreset, load_preset, override, preset_from_dict


@functools.cache
def all_parts(): return parts_of(load_preset("paper-imagenet")) + optional_parts(load_preset("paper-imagenet"))[0]


def paper_parts(): return {part.name: part for part in all_parts()}


@functools.cache
def paper(): return describe("paper-imagenet")


def memory_of(stage, **setup): return stage_memory(stage, load_preset("paper-imagenet").stage(stage), all_parts(), Setup(**setup))


# parameters

@pytest.mark.parametrize("name,millions,tolerance", [("pixel decoder, a step", 48, 0.03), ("latent diffusion decoder, a step", 794, 0.03)])
def test_decoders_are_as_large_as_the_paper_says(name, millions, tolerance):
    row = next(row for row in paper()["parts"] if row["name"] == name)
    assert abs(row["parameters"] / 1e6 / millions - 1) < tolerance and row["trainable"] == row["parameters"] and row["frozen"] == 0


def test_the_generator_comes_to_1200_million_with_embeddings_and_982_without():
    layers, trained, whole = (row["parameters"] for row in paper()["counts"])
    block = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048  # queries and output, keys and values of 8 heads, gated feed-forward, two norms
    assert layers == 16 * block + 2048
    assert trained == layers + 2 * (2048**2 + 2048) + (64 * 2048 + 2048) + (2048 * 64 + 64)  # time embedding, in, out
    assert whole == layers + 128_256 * 2048 and abs(whole / 1.2e9 - 1) < 0.05
    assert next(row for row in paper()["parts"] if row["name"] == "image tower, a step")["trainable"] == trained


def test_what_is_published_is_frozen_and_of_its_size():
    rows = {row["name"]: row for row in paper()["parts"]}
    assert rows["language model"]["parameters"] == 1_235_814_400  # Llama 3.2 1B
    assert abs(rows["vision encoder"]["parameters"] - 291_415_040) < 50_000  # timm's vit_pe_lang_large_patch14_448
    assert rows["alignment encoder"]["parameters"] == 86_580_480  # DINOv2-B as transformers loads it
    for name in ("vision encoder", "projector", "language model", "VAE asymmetric-autoencoder-kl-x-2", "perceptual network", "alignment encoder"): assert rows[name]["trainable"] == 0 and rows[name]["frozen"] == rows[name]["parameters"]


@pytest.mark.parametrize("name", ["paper-stockmix", "paper-imagenet-improved"])
def test_every_paper_preset_has_the_same_models(name):
    counted = {part.name: part.parameters() for part in parts_of(load_preset(name))}
    heads = {key: counted.pop(key) for key in list(counted) if key == "alignment head"}
    assert len(counted) + len(heads) == 13 and counted == {key: paper_parts()[key].parameters() for key in counted}
    assert set(heads.values()) <= {9 * 2048 * 1024 + 1024 if "improved" in name else paper_parts()["alignment head"].parameters()}  # iREPA's 3×3 convolution


# operations

class Attentions(TorchFunctionMode):
    "Counts the two products of every attention."
    def __init__(self): super().__init__(); self.total = 0
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            self.total += 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return func(*args, **(kwargs or {}))


def counted_by_hand(part):
    "GFLOPs of one pass: layers by their shapes, attention by its shapes; nothing of torch's counter."
    total, handles = [0], []
    def note(layer, inputs, output):
        fan_in = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
        total[0] += 2 * output.numel() * fan_in
    for layer in part.module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)): handles.append(layer.register_forward_hook(note))
    try:
        with torch.no_grad(), Attentions() as attentions: part.run(1)
    finally:
        for handle in handles: handle.remove()
    return (total[0] + attentions.total) / 1e9


NAMES = ["vision encoder", "projector", "language model", "reducer", "pixel decoder, a step", "distilled decoder, its one step", "VAE asymmetric-autoencoder-kl-x-2", "VAE stable-diffusion-3-medium-diffusers", "latent diffusion decoder, a step", "image tower, a step", "image tower of Decoupled, a step", "image tower of REPA, a step", "alignment head", "perceptual network", "alignment encoder", "alignment projector"]


@pytest.mark.parametrize("name", NAMES)
def test_operations_agree_with_a_count_by_layers(name):
    part = paper_parts()[name]
    assert part.row()["gflops_per_image"] == pytest.approx(counted_by_hand(part), rel=1e-3)


def test_the_list_of_parts_is_complete(): assert set(NAMES) == set(paper_parts())


def test_operations_on_shapes_are_those_on_a_cpu(monkeypatch):
    preset = load_preset("smoke")
    ghosts = {part.name: part.row() for part in parts_of(preset)}
    monkeypatch.setattr(module, "_meta", lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype))
    with sdpa_kernel(SDPBackend.MATH): real = {part.name: part.row() for part in module.scene_parts(preset)}
    assert set(real) == set(ghosts) and all(part.device.type == "cpu" for each in module.scene_parts(preset) for part in each.module.parameters())
    for name, row in real.items(): assert row["gflops_per_image"] == pytest.approx(ghosts[name]["gflops_per_image"], rel=1e-6), name


def test_drawing_a_picture_adds_up():
    cost = {row["name"]: row["gflops_per_image"] for row in paper()["parts"]}
    drawing = {row["what"]: row["gflops_per_image"] for row in paper()["pictures"]}
    assert drawing["image tower, 50 steps with guidance"] == pytest.approx(100 * cost["image tower, a step"], rel=1e-6)
    assert drawing["pixel decoder, 8 steps"] == pytest.approx(8 * drawing["pixel decoder distilled to 1 step"], rel=1e-6)


# activations

def autocast_lists():
    "Names in torch's header for CUDA's autocast: (bf16, fp32)."
    text = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    def names(macro): return set(re.findall(r"_\((\w+)", re.search(rf"#define {macro}\(_\)(.*?)\n\n", text, re.S).group(1)))
    return names("AT_FORALL_LOWER_PRECISION_FP"), names("AT_FORALL_FP32") | names("AT_FORALL_FP32_SET_OPT_DTYPE") | {"norm"}


def test_dtypes_follow_torchs_own_lists():
    low, high = autocast_lists()
    made_of_others = {"interpolate", "cross_entropy"}  # upsampling; log-softmax and nll_loss
    assert PRODUCTS <= low and EXACT - made_of_others <= high
    rare = {"chain_matmul", "conv_tbc", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "convolution", "acos", "asin", "cosh", "erfinv", "sinh", "tan", "native_layer_norm", "frobenius_norm", "nuclear_norm"}
    common = {name for name in low | high if not name.startswith("_") and (hasattr(F, name) or hasattr(torch, name)) and not name.endswith(("_loss", "_loss2d"))} - rare
    assert common <= PRODUCTS | EXACT, common - PRODUCTS - EXACT


def hooked(run):
    "Bytes that autograd really keeps, all storages together."
    kept = {}
    def pack(tensor): kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage(); return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor): result = run()
    del result
    return sum(storage.nbytes() for storage in kept.values())


def test_bf16_keeps_what_real_autocast_keeps():
    def network(device): return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.SiLU(), nn.Conv2d(8, 4, 3, stride=2, bias=False), nn.Flatten(), nn.Linear(36, 16, bias=False), nn.GELU(), nn.Linear(16, 2, bias=False)).to(device)
    real, ghost = network("cpu"), network("meta")
    weights = sum(value.numel() for value in real.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16): measured = hooked(lambda: real(torch.randn(5, 3, 9, 9)))
    found = saved_bytes(lambda: ghost(torch.zeros(5, 3, 9, 9, device="meta")), ghost, "bf16")
    assert found.copies == 2 * weights
    # the first layer needs no gradient of its input, the others keep their weights' copies
    assert measured == found.activations + found.copies
    assert hooked(lambda: real(torch.randn(5, 3, 9, 9))) == saved_bytes(lambda: ghost(torch.zeros(5, 3, 9, 9, device="meta")), ghost).activations + 4 * weights


@pytest.mark.parametrize("shape", [(2, 4, 64, 16), (1, 2, 33, 32)])
def test_fused_attention_keeps_what_torchs_own_kernel_keeps(shape):
    def run(device):
        query, key, value = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(3))
        return F.scaled_dot_product_attention(query, key, value)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION): measured = hooked(lambda: run("cpu"))
    assert saved_bytes(lambda: run("meta"), nn.Identity()).activations == measured


def peak_bytes(run):
    "The most memory that `run()` had allocated at once, as torch's profiler saw it."
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler: run()
    events = sorted((event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"), key=lambda event: event.start_ns())
    level = highest = 0
    for event in events: level += event.nbytes(); highest = max(highest, level)
    return highest


@pytest.mark.parametrize("stage,batch", [("vae", 4), ("vae", 16), ("decoder", 8)])
def test_a_real_training_step_peaks_where_the_rule_says(stage, batch, monkeypatch):
    """Models, AdamW, moving average and two steps on this CPU, every allocation counted; convolutions, so that no kernel differs from a GPU's."""
    from vugen.train.loop import Ema
    preset = load_preset("tiny")
    preset = override(preset, "decoder", {"model.num_layers": "0"})
    part = preset.stage(stage)
    ghosts = [each for each in parts_of(preset) if each.stage == stage]
    said = stage_memory(stage, part, ghosts, Setup(batch=batch))
    monkeypatch.setattr(module, "_meta", lambda *shape, dtype=torch.float32: torch.rand(shape).to(dtype))

    def train():
        if stage == "vae": own = [each for each in module.latent_decoder_parts(preset, module.World(**preset.world), fake_vision(), fake_reducer()) if each.stage == stage]
        else: own = module.decoder_parts(preset, module.World(**preset.world), fake_vision())[1]
        weights = [value for each in own for value in each.module.parameters()]
        optimizer, averages = torch.optim.AdamW(weights, lr=1e-4, fused=True), [Ema(each.module, 0.99) for each in own]
        for _ in range(2):
            sum(each.run(batch) for each in own).backward()
            optimizer.step(); optimizer.zero_grad(set_to_none=True)
            for average, each in zip(averages, own): average.update(each.module)
    train()  # first use of kernels
    measured = peak_bytes(train)
    assert 0.95 * said["at_least"] < measured < 1.05 * said["total"], (said, measured)  # a twentieth for workspaces of kernels, which the rule leaves out


def fake_vision(): return module.SimpleNamespace(hidden_size=128, grid=(8, 8))
def fake_reducer(): return module.SimpleNamespace(dim=8)


def test_activations_grow_with_the_batch_and_shrink_in_bf16():
    one, four, half = (memory_of("generator", batch=batch, precision=precision) for batch, precision in ((1, "fp32"), (4, "fp32"), (4, "bf16")))
    assert four["activations"] == pytest.approx(4 * one["activations"], rel=0.01) and half["activations"] < 0.75 * four["activations"]
    assert half["copies"] > 0 == four["copies"] and half["weights"] < four["weights"]  # the frozen model is kept in bf16


# sharing

def test_what_is_fixed_follows_from_the_counts():
    found, count = memory_of("generator", batch=8), {each["name"]: each["parameters"] for each in paper()["parts"]}
    trained = count["image tower, a step"]
    assert (found["gradients"], found["moments"], found["ema"]) == (4 * trained, 8 * trained, 4 * trained)
    published = sum(count[name] for name in ("vision encoder", "projector", "language model"))
    assert found["weights"] == 4 * trained + 2 * published + 4 * (count["reducer"] + count["pixel decoder, a step"])
    row = next(row for row in paper()["stages"] if row["stage"] == "generator")  # whose own values are 8 pictures and bf16
    assert row["memory_gib"] == pytest.approx(found["total"] / 2**30, abs=1e-3) and row["at_least_gib"] == pytest.approx(found["at_least"] / 2**30, abs=1e-3)


@pytest.mark.parametrize("stage,frozen", [("decoder-ldm", {"VAE asymmetric-autoencoder-kl-x-2", "reducer"}), ("generator", {"reducer", "pixel decoder, a step"}), ("generator-repa", {"VAE stable-diffusion-3-medium-diffusers"})])
def test_sharding_divides_what_is_trained_alone(stage, frozen):
    alone, ddp, fsdp, more = memory_of(stage, batch=8), memory_of(stage, batch=8, sharding="ddp", gpus=8), memory_of(stage, batch=8, sharding="fsdp", gpus=8), memory_of(stage, batch=8, sharding="fsdp", gpus=64)
    assert ddp["total"] == alone["total"] + alone["gradients"]
    for kind in ("gradients", "moments", "ema"): assert alone[kind] / 8 <= fsdp[kind] < 1.001 * alone[kind] / 8
    count = {each["name"]: each["parameters"] for each in paper()["parts"]}
    published = {"vision encoder"} | ({"projector", "language model"} if stage.startswith("generator") else set())
    whole = 4 * sum(count[name] for name in frozen) + 2 * sum(count[name] for name in published)  # the loop tells FSDP to leave frozen parts alone
    assert fsdp["weights"] == whole + fsdp["gradients"] and alone["weights"] == whole + alone["gradients"]
    assert alone["activations"] == fsdp["activations"] and alone["total"] > fsdp["total"] > more["total"] > more["activations"] + whole
    assert memory_of(stage, batch=8, ema="cpu")["ema"] == 0 < alone["ema"]


def test_a_stage_holds_its_own_vae():
    count = {each["name"]: each["parameters"] for each in paper()["parts"]}
    assert count["VAE stable-diffusion-3-medium-diffusers"] == 83_819_683  # as diffusers counts SD3's
    vugen, decoupled = memory_of("generator", batch=8), memory_of("generator-decoupled", batch=8)
    other = count["image tower of Decoupled, a step"] - count["image tower, a step"]
    assert decoupled["weights"] - vugen["weights"] == 4 * (other + 83_819_683 - count["reducer"] - count["pixel decoder, a step"])


def test_micro_batches_keep_whole_gradients_under_fsdp():
    part, setup = load_preset("paper-imagenet").stage("generator"), Setup(batch=8, sharding="fsdp", gpus=8)
    one, two = (stage_memory("generator", replace(part, recipe=replace(part.recipe, gradient_accumulation=number)), all_parts(), setup) for number in (1, 2))
    assert two["copies"] - one["copies"] == 4 * paper_parts()["image tower, a step"].trainable()


CASES = [(precision, batch) for precision in ("bf16", "fp32") for batch in (24, 2000)]


def test_two_processes_under_fsdp_hold_no_more_than_the_rule_says(tmp_path):
    """FSDP 2 itself, with the precision that the loop gives it, AdamW and moving average: weights outweigh activations, and the other way round."""
    from shards_probe import Network
    probe, cases = Path(__file__).with_name("shards_probe.py"), [f"{precision}:{batch}" for precision, batch in CASES]
    first, second = (subprocess.Popen([sys.executable, str(probe), rank, str(tmp_path), *cases], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in "01")
    out, err = first.communicate(timeout=400)
    assert first.returncode == 0 == second.wait(timeout=60), err
    measured = json.loads(next(line for line in out.splitlines() if line.startswith("measured")).removeprefix("measured"))
    ghost = Network().to("meta")
    network = module.Part("network", "toy", ghost, lambda batch: ghost(torch.zeros(batch, 16, device="meta")))
    for precision, batch in CASES:
        said = stage_memory("toy", StagePreset({}, Recipe(1, 2 * batch, ema_decay=0.9)), [network], Setup(batch=batch, precision=precision, sharding="fsdp", gpus=2))
        assert 0.95 * said["at_least"] < measured[f"{precision}:{batch}"] < said["total"] < 1.5 * measured[f"{precision}:{batch}"], (precision, batch, said, measured)


def test_distillation_holds_its_teacher_and_its_judges():
    taught, alone, count = memory_of("distill", batch=2), memory_of("decoder", batch=2), {each["name"]: each["parameters"] for each in paper()["parts"]}
    assert taught["weights"] - alone["weights"] == 4 * count["pixel decoder, a step"]  # the frozen reducer weighs what the trained one does
    assert alone["gradients"] - taught["gradients"] == 4 * count["reducer"] and taught["activations"] / alone["activations"] == pytest.approx(1, rel=0.01)


def test_fsdp_gathers_blocks_of_what_is_trained_in_turn():
    gathered, tower = memory_of("generator", batch=8, sharding="fsdp", gpus=8)["copies"], paper_parts()["image tower, a step"]
    block, vectors = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048, 16 * 2 * 2048 + 2048 + 3 * 2048 + 64
    outside = tower.trainable() - 16 * block  # and nothing of the frozen language model, whose embeddings alone have 263 million
    assert gathered == 3 * 2 * block + 2 * block + 2 * 4 * block + (2 + 2 + 4) * outside + 4 * vectors
    assert gathered < memory_of("generator", batch=8, precision="bf16")["copies"]  # less than the copies that autocast would keep


def test_a_gathered_model_is_never_larger_than_whole():
    for part in paper_parts().values():
        outside, blocks = unit_sizes(part.module)
        assert outside + sum(blocks) == part.parameters() and outside >= 0


@pytest.mark.parametrize("wrong,message", [(dict(sharding="zero"), "sharding"), (dict(precision="fp8"), "precision"), (dict(batch=0), "batch"), (dict(gpus=0, sharding="ddp"), "gpus"), (dict(gpus=2), "share the work"), (dict(ema="disk"), "ema")])
def test_impossible_setups_are_refused_in_a_sentence(wrong, message):
    with pytest.raises(UserError, match=message): describe("tiny", **wrong)


@pytest.mark.parametrize("name,gpus", [("paper-imagenet", 8), ("paper-stockmix", 32)])
def test_without_a_word_the_papers_own_launch_is_meant(name, gpus):
    own = settled(Setup(sharding="fsdp"), load_preset(name).stage("generator"))
    assert (own.batch, own.precision, own.gpus) == (8, "bf16", gpus)


# other models

def test_a_model_in_a_folder_is_described_too(tmp_path):
    from transformers import AutoModelForImageTextToText

    from vugen.generate.adapters import save_miniature
    folder = save_miniature("perception_lm", tmp_path / "plm")
    real = AutoModelForImageTextToText.from_pretrained(folder)
    plain = load_preset("paper-imagenet").to_dict()
    plain["stages"]["generator"]["model"].update(vlm=str(folder), image_size=None)
    parts = {part.name: part for part in parts_of(preset_from_dict(plain))}
    assert parts["vision encoder"].parameters() == sum(value.numel() for value in real.model.vision_tower.parameters())
    assert parts["language model"].parameters() == sum(value.numel() for value in real.model.language_model.parameters())
    assert all(value.device.type == "meta" for part in parts.values() for value in part.module.parameters())


def test_unknown_models_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="not known here"): published_vlm("nobody/nothing")
    with pytest.raises(UserError, match="describe"): describe(str(write_preset(tmp_path)))


def write_preset(folder):
    (folder / "one.json").write_text(json.dumps({"name": "one", "world": {"image_size": 32}, "stages": {"vae": load_preset("tiny").to_dict()["stages"]["vae"]}}))
    return folder / "one.json"
