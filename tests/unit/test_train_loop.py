"""The loop's parts: sample numbers, decay groups, moving average, states on disk."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from vugen.errors import UserError
from vugen.train.loop import _shard_precision, stage_parser, train_stage, Ema, Progress, SharedDraws, differences, recompute_blocks, repeated_blocks, step_seed, seed_everything, training_mode, check_free, learning_rate_at, load_tensors, make_optimizer, prepare, read_log, restore, run, sample_indices, save_state, snapshots, states, train_until, trained_tensors
from vugen.train.presets import Preset, Recipe, StagePreset


class Stage:
    "A regression with a frozen part; `spoil` may bend a batch."
    name = "toy"

    def __init__(self, preset, spoil=None): self.preset, self.spoil = preset, spoil
    def build(self): return nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 1))

    def batch(self, indices):
        inputs = torch.stack([torch.tensor(indices).float().mul(scale).sin() for scale in (0.2, 0.5, 0.9)], 1)
        return self.spoil(inputs, indices) if self.spoil else {"inputs": inputs}

    def loss(self, module, batch, generator):
        loss = (module(batch["inputs"])[:, 0] - batch["inputs"].sum(1) + 0.1 * torch.randn(len(batch["inputs"]), generator=generator)).square().mean()
        return loss, {"error": loss.detach().sqrt()}

    def save(self, module, out): save_file({"weight": module[1].weight.detach().clone()}, out / "model.safetensors")

    def measure(self, module, out):
        return {"weight": module[1].weight.detach().norm()}


def preset(**changes):
    recipe = Recipe(**{**dict(precision="fp32", steps=12, batch_size=6, learning_rate=0.01, warmup_steps=2, ema_decay=0.9, log_every=4, checkpoint_every=5), **changes})
    return Preset("toy", {}, {"toy": StagePreset({}, recipe)})


def make(**changes):
    made = preset(**changes)
    return Stage(made), made.stage("toy").recipe


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_processes_and_parts_share_no_sample_and_leave_none_out(step, world, parts, size):
    total = world * parts * size
    found = sum((sample_indices(step, total, rank, world, part, parts) for part in range(parts) for rank in range(world)), [])
    assert found == list(range(step * total, (step + 1) * total))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="multiple of 6"): sample_indices(0, 10, world=3, parts=2)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(0, 100), st.sampled_from(["constant", "cosine"]))
def test_learning_rate_stays_between_zero_and_its_peak(steps, warmup, schedule):
    recipe = Recipe(steps, 1, 0.5, warmup_steps=warmup, schedule=schedule)
    assert all(0 <= learning_rate_at(recipe, step) <= 0.5 for step in range(steps))


def test_only_matrices_decay():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(4, 4), nn.Embedding(5, 4))
    decaying, plain = make_optimizer(module, Recipe(1, 1, weight_decay=0.3)).param_groups
    assert {value.ndim for value in decaying["params"]} == {2, 4} and {value.ndim for value in plain["params"]} == {1}
    assert decaying["weight_decay"] == 0.3 and plain["weight_decay"] == 0
    with pytest.raises(UserError, match="trainable"): make_optimizer(nn.Linear(1, 1).requires_grad_(False), Recipe(1, 1))


def test_moving_average_equals_its_definition():
    module, expected = nn.Linear(1, 1, bias=False), None
    module.weight.data.fill_(0.0)
    average, expected = Ema(module, 0.5), 0.0
    for step in range(30):
        module.weight.data.fill_(math.sin(step))
        average.update(module)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * math.sin(step)
    assert average.average["weight"].item() == pytest.approx(expected, abs=1e-6)


def test_gradient_accumulation_takes_the_same_step_as_one_batch():
    weights = []
    for parts in (1, 2, 3):
        stage, recipe = make(gradient_accumulation=parts)
        stage.loss = lambda module, batch, generator: ((module(batch["inputs"])[:, 0] - batch["inputs"].sum(1)).square().mean(), {})
        training = prepare(stage, recipe, "unused")
        train_until_without_states(training, 4)
        weights.append(training.module[1].weight.detach().clone())
    assert torch.allclose(weights[0], weights[1], atol=1e-6) and torch.allclose(weights[0], weights[2], atol=1e-6)


def train_until_without_states(training, last):
    from vugen.train.loop import micro_batches, train_step
    for step in range(last): assert train_step(training, micro_batches(training, step))


def test_frozen_parts_are_neither_saved_nor_changed(tmp_path):
    stage, recipe = make()
    training = prepare(stage, recipe, tmp_path / "state")
    before = training.module[0].weight.clone()
    train_until(training, 12, Progress("toy", 12, 0, show=False))
    assert torch.equal(training.module[0].weight, before)
    assert sorted(trained_tensors(training.module)) == ["1.bias", "1.weight"]
    assert [path.name for path in states(tmp_path / "state")] == ["step-00000010", "step-00000012"]


def test_another_frozen_part_is_noticed_at_resume(tmp_path):
    stage, recipe = make()
    run(stage, recipe, tmp_path / "out", stop_after=5, show=False)
    stage.build = lambda: nn.Sequential(nn.Linear(3, 4).requires_grad_(False).apply(lambda part: part.weight.data.zero_()), nn.Linear(4, 1))
    with pytest.raises(UserError, match="frozen weights"): run(stage, recipe, tmp_path / "out", resume=True, show=False)


def test_a_damaged_state_names_the_file(tmp_path):
    stage, recipe = make()
    run(stage, recipe, tmp_path / "out", stop_after=5, show=False)
    path = states(tmp_path / ".state-out")[-1] / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="optimizer.safetensors"): run(stage, recipe, tmp_path / "out", resume=True, show=False)


def test_foreign_weights_are_refused():
    with pytest.raises(UserError, match="has no 'bias'"): load_tensors(nn.Linear(2, 2), {"weight": torch.zeros(2, 2)}, "file")


def test_what_lies_there_is_not_overwritten_by_accident(tmp_path):
    stage, recipe = make()
    run(stage, recipe, tmp_path / "out", show=False)
    first = (tmp_path / "out/model.safetensors").read_bytes()
    with pytest.raises(UserError, match="--overwrite"): run(stage, recipe, tmp_path / "out", show=False)
    with pytest.raises(UserError, match="--overwrite"): run(stage, recipe, tmp_path / "out", resume=True, show=False)
    stage, recipe = make(seed=1)
    assert run(stage, recipe, tmp_path / "out", overwrite=True, show=False)["status"] == "finished"
    assert (tmp_path / "out/model.safetensors").read_bytes() != first
    (tmp_path / "mine").mkdir(); (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a finished run"): run(stage, recipe, tmp_path / "mine", overwrite=True, show=False)
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work"


def test_an_unfinished_run_is_not_begun_again_by_accident(tmp_path):
    stage, recipe = make()
    run(stage, recipe, tmp_path / "out", stop_after=5, show=False)
    with pytest.raises(UserError, match="step 5.*--resume"): run(stage, recipe, tmp_path / "out", show=False)
    check_free(tmp_path / "out", tmp_path / ".state-out", resume=False, overwrite=True)


def test_weights_that_cannot_be_written_leave_no_half_checkpoint(tmp_path):
    stage, recipe = make()
    stage.save = lambda module, out: (out / "half.safetensors").write_bytes(b"half") and None or 1 / 0
    with pytest.raises(ZeroDivisionError): run(stage, recipe, tmp_path / "out", show=False)
    assert [path.name for path in tmp_path.iterdir()] == [".state-out"]
    del stage.save
    assert run(stage, recipe, tmp_path / "out", resume=True, show=False)["status"] == "finished"


def failing(module, out): raise MemoryError("no room for\n5,000 pictures")


def test_a_failing_evaluation_leaves_a_checkpoint_and_the_same_command_measures_it(tmp_path, monkeypatch):
    stage, recipe = make()
    expected = run(stage, recipe, tmp_path / "whole", show=False)["record"]["rows"]
    stage.measure = failing
    with pytest.raises(UserError, match=r"weights are written to .*out and can be used.*MemoryError: no room for\): .*same command again") as caught: run(stage, recipe, tmp_path / "out", show=False)
    assert "\n" not in str(caught.value) and isinstance(caught.value.__cause__, MemoryError)
    record, card = json.loads((tmp_path / "out/run.json").read_text()), (tmp_path / "out/README.md").read_text()
    assert record["unmeasured"] and record["rows"] == [] and record["steps"] == 12 and "Not measured yet" in card
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes() and (tmp_path / "out/log.jsonl").exists()
    del stage.measure
    monkeypatch.setattr(stage, "loss", lambda *_: pytest.fail("it learned again"))
    result = run(stage, recipe, tmp_path / "out", show=False)  # without resume, as the command was
    assert result["status"] == "finished" and result["record"]["rows"] == expected
    assert "unmeasured" not in json.loads((tmp_path / "out/run.json").read_text()) and "Not measured yet" not in (tmp_path / "out/README.md").read_text()
    with pytest.raises(UserError, match="--overwrite"): run(stage, recipe, tmp_path / "out", show=False)


def test_an_evaluation_goes_on_only_with_its_own_training(tmp_path):
    stage, recipe = make()
    stage.measure = failing
    with pytest.raises(UserError, match="evaluation failed"): run(stage, recipe, tmp_path / "out", show=False)
    other, faster = make(learning_rate=0.02)
    with pytest.raises(UserError, match="recipe.learning_rate = 0.01"): run(other, faster, tmp_path / "out", show=False)
    with pytest.raises(UserError, match="holds no state.*use the weights as they are"): run(stage, recipe, tmp_path / "out", state=tmp_path / "elsewhere", show=False)
    assert run(other, faster, tmp_path / "out", overwrite=True, show=False)["status"] == "finished"


def test_a_failing_batch_ends_the_run_with_its_own_error(tmp_path):
    def spoil(inputs, indices):
        if indices[0] >= 36: raise KeyError("no such sample")
        return {"inputs": inputs}
    stage, recipe = make()
    stage.spoil = spoil
    with pytest.raises(KeyError, match="no such sample"): run(stage, recipe, tmp_path / "out", show=False)


def test_the_first_step_is_not_finite(tmp_path):
    stage, recipe = make()
    stage.spoil = lambda inputs, indices: {"inputs": inputs * math.nan}
    with pytest.raises(UserError, match="step 1; no step was taken"): run(stage, recipe, tmp_path / "out", show=False)


def test_a_torn_log_line_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == [1, 2]


def test_the_card_and_run_record_tell_what_happened(tmp_path):
    stage, recipe = make()
    record = run(stage, recipe, tmp_path / "out", command="vugen train toy", show=False)["record"]
    written = json.loads((tmp_path / "out/run.json").read_text())
    assert written == json.loads(json.dumps(record)) and written["recipe"]["batch_size"] == 6 and written["rows"][0]["metric"] == "weight"
    card = (tmp_path / "out/README.md").read_text()
    assert "vugen train toy" in card and "learning_rate" in card and str(tmp_path) not in card + json.dumps(written)


KILLED_WHILE_SAVING = """
import sys, time
from pathlib import Path
import vugen.train.loop as loop
sys.path.insert(0, {folder!r})
from test_train_loop import make
save_file = loop.save_file
def slow(tensors, path):
    save_file(tensors, path)
    if training.step == 8: Path({mark!r}).touch(); time.sleep(60)
loop.save_file = slow
stage, recipe = make(checkpoint_every=4)
training = loop.prepare(stage, recipe, {state!r})
loop.train_until(training, 12, loop.Progress("toy", 12, 0, show=False))
"""


def test_killed_while_saving_leaves_the_state_before_it(tmp_path):
    mark, state = tmp_path / "mark", tmp_path / "state"
    code = KILLED_WHILE_SAVING.format(folder=os.path.dirname(__file__), mark=str(mark), state=str(state))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 200
    while not mark.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.name for path in states(state)] == ["step-00000004"] and list(state.glob(".*.tmp*"))
    stage, recipe = make(checkpoint_every=4)
    result = run(stage, recipe, tmp_path / "out", resume=True, state=state, show=False)
    assert result["status"] == "finished" and not list(state.glob(".*.tmp*"))
    run(*make(checkpoint_every=4), tmp_path / "whole", show=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    stage, recipe = make()
    training = prepare(stage, recipe, tmp_path / "state")
    def full(*arguments): raise OSError(28, "No space left on device")
    monkeypatch.setattr("vugen.train.loop.save_file", full)
    with pytest.raises(UserError, match="No space left"): save_state(training)
    assert not states(tmp_path / "state") and not restore(training)


def test_an_average_that_begins_late_costs_nothing_before_and_survives_a_resume(tmp_path):
    results = {}
    for name, halves in (("whole", [None]), ("halved", [3, None]), ("late", [8, None])):  # stopped before the average begins, and after
        stage, recipe = make(ema_decay=0.5, ema_start=6, ema_device="cpu", checkpoint_every=100)
        for number, stop in enumerate(halves): run(stage, recipe, tmp_path / name, resume=number > 0, stop_after=stop, show=False)
        results[name] = (tmp_path / name / "model.safetensors").read_bytes()
        begun = {path.name: (path / "ema.safetensors").exists() for path in states(tmp_path / f".state-{name}")}
        assert all(there == (int(step[5:]) > 6) for step, there in begun.items()) and begun
    assert results["whole"] == results["halved"] == results["late"]


def test_a_late_average_equals_its_definition():
    module, expected = nn.Linear(1, 1, bias=False), None
    average = Ema(module, 0.9, "cpu", start=4)
    for step in range(12):
        module.weight.data.fill_(math.cos(step))
        average.update(module)
        done = step - 4
        if done == 0: expected = math.cos(step)
        if done > 0: decay = min(0.9, (1 + done) / (10 + done)); expected = decay * expected + (1 - decay) * math.cos(step)
    assert average.average["weight"].item() == pytest.approx(expected, abs=1e-6)


def test_only_what_learns_is_averaged():
    module = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 1))
    assert sorted(Ema(module, 0.9).average) == ["1.bias", "1.weight"] and not Ema(module, 0.9, start=1).average


def smoke_stage(name):
    from vugen.lab.cli import stage_class
    from vugen.paths import checkpoints_dir
    from vugen.train.presets import load_preset
    return stage_class(name)(load_preset("smoke"), checkpoints_dir("tiny"))


@pytest.mark.parametrize("name", ["decoder", "decoder-ldm", "vlm", "generator"])
def test_gradient_checkpointing_gives_the_same_bits(name):
    gradients = []
    for recompute in (False, True):
        stage = smoke_stage(name)
        seed_everything(step_seed(0, "build"))
        module = training_mode(stage.build())
        with torch.no_grad():
            for value in module.parameters():
                if value.requires_grad and not value.any(): value.normal_(std=0.02, generator=torch.Generator().manual_seed(value.numel()))  # layers that begin at zero let no gradient through
        blocks, called = repeated_blocks(module), set()
        for block in blocks: block.register_forward_hook(lambda block, inputs, output: called.add(id(block)))
        if recompute: recompute_blocks(module)
        seed_everything(1)
        loss, _ = stage.loss(module, stage.batch([0, 1, 2]), torch.Generator().manual_seed(2))
        loss.backward()
        assert called == {id(block) for block in blocks} and blocks  # every block runs through its own forward pass
        gradients.append([loss.detach(), *(value.grad for value in module.parameters() if value.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) and all(torch.equal(one, other) for one, other in zip(*gradients))
    assert sum(value.abs().sum() > 0 for value in gradients[0]) > len(gradients[0]) / 2


def test_checkpointed_blocks_keep_less():
    from torch.autograd.graph import saved_tensors_hooks
    def kept(layers):
        sizes = []
        with saved_tensors_hooks(lambda value: [sizes.append(value.numel()), value][1], lambda value: value):
            hidden = torch.randn(2, 64, 16, requires_grad=True)
            for layer in layers[0]: hidden = layer(hidden)
        return sum(sizes)
    layers = nn.ModuleList([nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True) for _ in range(4))])
    assert kept(recompute_blocks(layers)) * 5 < kept(nn.ModuleList([nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True) for _ in range(4))]))


def test_batch_statistics_are_not_counted_twice():
    blocks = nn.Sequential(nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)))
    with pytest.raises(UserError, match="gradient_checkpointing"): recompute_blocks(blocks)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 100))
def test_noise_belongs_to_samples(rows, places, seed):
    def draw(place, places, rows):
        generator = torch.Generator().manual_seed(seed)
        with SharedDraws(generator, place, places):
            return torch.randn(rows, 3, generator=generator), torch.randn(size=(rows, 2), generator=generator), torch.rand(rows, generator=generator), torch.randn((4,)).shape
    alone = draw(0, 1, rows * places)
    parts = [draw(place, places, rows) for place in range(places)]
    assert all(torch.equal(one, torch.cat([part[number] for part in parts])) for number, one in enumerate(alone[:3]))


def test_a_state_from_before_a_key_was_known_counts_as_its_default():
    old = {"recipe": {"steps": 12, "learning_rate": 0.1}}
    new = {"recipe": {"steps": 12, "learning_rate": 0.1, "gradient_checkpointing": False, "ema_start": 0, "ema_device": "same"}}
    assert not differences(old, new) and differences(old, {"recipe": {**new["recipe"], "ema_start": 5}}) == {"recipe.ema_start": (0, 5)}


class AsOnGPU(TorchFunctionMode):
    "Casts inputs as CUDA's autocast does."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        from vugen.lab.describe import EXACT, PRODUCTS
        name = getattr(func, "__name__", "")
        wanted = torch.bfloat16 if name in PRODUCTS else torch.float32 if name in EXACT else None
        def cast(value): return value.to(wanted) if wanted and torch.is_tensor(value) and value.dtype in (torch.float32, torch.bfloat16) else value
        return func(*tree_map(cast, args), **tree_map(cast, kwargs or {}))


@pytest.mark.parametrize("name", ["contrastive", "decoder", "decoder-ldm", "vlm", "generator", "generator-repa", "distill"])
def test_every_stage_learns_with_weights_gathered_as_bf16(name):
    "What FSDP gives a block on a GPU: bf16 weights, inputs as they come, autocast around; no operation may meet two dtypes that it cannot join."
    stage = smoke_stage(name)
    module = training_mode(stage.build())
    stage.ready(module, 0, 1) if hasattr(stage, "ready") else None
    exact = stage.loss(module, stage.batch([0, 1, 2]), torch.Generator().manual_seed(2))[0].item()
    for value in module.parameters():
        if value.requires_grad: value.data = value.data.bfloat16()
    with AsOnGPU(): loss, _ = stage.loss(module, stage.batch([0, 1, 2]), torch.Generator().manual_seed(2))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=0.05)


def test_fsdp_gathers_bf16_on_gpus_alone_and_never_batch_statistics():
    def policy(precision, device, module=nn.Linear(2, 2)): return _shard_precision(SimpleNamespace(mixed_precision=precision, device=torch.device(device)), module)
    found = policy("bf16", "cuda")
    assert (found.param_dtype, found.reduce_dtype, found.output_dtype, found.cast_forward_inputs) == (torch.bfloat16, torch.float32, None, False)
    assert policy("no", "cuda") is policy("bf16", "cpu") is policy("bf16", "cuda", nn.BatchNorm1d(2)) is None


@pytest.mark.parametrize("words,why", [("model.num_heads=3", "hidden_size 32 is not divisible by num_heads 3"), ("options.same_caption=nonsense", "same_caption is 'nonsense', choose one of")])
def test_values_that_do_not_go_together_are_one_sentence(words, why, tmp_path):
    from vugen.train.contrastive import ContrastiveStage
    with pytest.raises(UserError) as caught: train_stage(ContrastiveStage, stage_parser("contrastive").parse_args(["--preset", "smoke", "--root", str(tmp_path), "--set", words]))
    assert why in str(caught.value) and "--set KEY=VALUE" in str(caught.value) and "\n" not in str(caught.value)


# ---- snapshots --------------------------------------------------------------------------------------------------------------

def weights_of(folder): return (folder / "model.safetensors").read_bytes()


def test_a_run_with_snapshots_ends_in_the_same_bits(tmp_path):
    plain = run(*make(), tmp_path / "plain", show=False)
    watched = run(*make(snapshots=(4, 7, 12)), tmp_path / "watched", show=False)
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "watched")
    for row, other in zip(read_log(tmp_path / "plain/log.jsonl"), read_log(tmp_path / "watched/log.jsonl")): assert {**row, "seconds": 0} == {**other, "seconds": 0}
    assert plain["record"]["rows"] == watched["record"]["rows"] and list(snapshots(tmp_path / "watched")) == [4, 7, 12] and not snapshots(tmp_path / "plain")
    assert weights_of(snapshots(tmp_path / "watched")[12]) == weights_of(tmp_path / "watched") != weights_of(snapshots(tmp_path / "watched")[7])


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.0}, {"ema_start": 6}])
def test_a_snapshot_is_what_a_run_holds_at_that_step(tmp_path, changes):
    run(*make(snapshots=(4, 9), **changes), tmp_path / "watched", show=False)
    for step, folder in snapshots(tmp_path / "watched").items():
        stage, recipe = make(**changes)
        training = prepare(stage, recipe, tmp_path / "unused")
        train_until(training, step, Progress("toy", 12, 0, show=False))
        if training.ema: training.ema.copy_to(training.module)
        assert torch.equal(load_file(folder / "model.safetensors")["weight"], training.module[1].weight)
        record = json.loads((folder / "run.json").read_text())
        assert record["steps"] == step and record["snapshot"] and record["rows"] == [] and (folder / "README.md").is_file()


def test_a_stage_that_changes_its_module_while_it_saves_disturbs_neither_run_nor_checkpoint(tmp_path):
    class Spoiling(Stage):
        def save(self, module, out):
            super().save(module, out)
            with torch.no_grad(): module[1].weight.add_(torch.rand(1))  # as whitening is measured when a decoder is saved
    for name, kept in (("plain", ()), ("watched", (4, 12))):
        made = preset(snapshots=kept)
        run(Spoiling(made), made.stage("toy").recipe, tmp_path / name, show=False)
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "watched") and json.loads((tmp_path / "plain/run.json").read_text())["rows"] == json.loads((tmp_path / "watched/run.json").read_text())["rows"]


def test_snapshots_survive_a_stop_and_leave_with_an_overwritten_run(tmp_path, capsys):
    run(*make(snapshots=(4, 7, 12)), tmp_path / "whole", show=False)
    run(*make(snapshots=(4, 7, 12)), tmp_path / "halved", stop_after=8, show=False)
    assert not snapshots(tmp_path / "halved") and len(list((tmp_path / ".state-halved/snapshots").iterdir())) == 2
    run(*make(snapshots=(4, 7, 12)), tmp_path / "halved", resume=True, show=False)
    for step, folder in snapshots(tmp_path / "whole").items(): assert weights_of(folder) == weights_of(snapshots(tmp_path / "halved")[step])
    (tmp_path / "halved-step-99").mkdir(); (tmp_path / "halved-step-99/thesis.tex").write_text("years of work")
    run(*make(snapshots=(5,)), tmp_path / "halved", overwrite=True, show=False)
    assert list(snapshots(tmp_path / "halved")) == [5] and (tmp_path / "halved-step-99/thesis.tex").exists()


def test_snapshots_that_are_asked_for_too_late_are_named(tmp_path, capsys):
    run(*make(), tmp_path / "out", stop_after=5, show=False)
    run(*make(snapshots=(3, 9)), tmp_path / "out", resume=True, show=False)
    assert list(snapshots(tmp_path / "out")) == [9] and "no snapshot of step 3" in capsys.readouterr().out


@pytest.mark.parametrize("value", [(0,), (13,), (2.5,), ("4",), (True,)])
def test_impossible_snapshots_are_refused(value):
    with pytest.raises(UserError, match="recipe.snapshots"): preset(snapshots=value)


def test_a_state_of_a_version_without_snapshots_can_be_resumed(tmp_path):
    stage, recipe = make()
    run(stage, recipe, tmp_path / "out", stop_after=5, show=False)
    path = states(tmp_path / ".state-out")[-1] / "state.json"
    content = json.loads(path.read_text())
    del content["description"]["recipe"]["snapshots"]
    path.write_text(json.dumps(content))
    assert run(stage, recipe, tmp_path / "out", resume=True, show=False)["status"] == "finished"
