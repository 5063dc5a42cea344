"""A training killed at any moment and resumed ends in the same bits; what goes wrong on the way leaves whole files and one sentence."""
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vugen.errors import UserError
from vugen.paths import checkpoints_dir, data_dir
from vugen.train.loop import read_log, stage_parser, states, train_stage
from vugen.train.presets import Preset, Recipe, StagePreset

STAGE = Path(__file__).with_name("line_stage.py")
RECIPE = Recipe(precision="fp32", steps=120, batch_size=16, learning_rate=0.01, warmup_steps=5, ema_decay=0.9, schedule="cosine", log_every=10, checkpoint_every=7, gradient_accumulation=2, seed=3)


def write_preset(folder, recipe=RECIPE):
    path = folder / "preset.json"
    path.write_text(json.dumps(Preset("line", {"image_size": 32}, {"line": StagePreset({}, recipe)}).to_dict()))
    return path


def start(preset, out, *words, launcher=(), **environment):
    command = [sys.executable, *launcher, str(STAGE), "--preset", str(preset), "--root", str(preset.parent), "--out", str(out), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=preset.parent, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def complete(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def wait_for(condition, process, seconds=200):
    "Until the condition holds; the process must not end before."
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def step_in(out): return max([row["step"] for row in read_log(out.parent / f".state-{out.name}" / "log.jsonl")], default=0)


def weights(out): return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The run that nothing interrupts."
    folder = tmp_path_factory.mktemp("whole")
    code, out, err = complete(start(write_preset(folder), folder / "line"))
    assert code == 0, err
    return folder / "line"


def test_killed_twice_at_random_steps_and_resumed_is_bit_identical(whole, tmp_path):
    preset, out = write_preset(tmp_path), tmp_path / "line"
    state, chance = tmp_path / ".state-line", random.Random()
    for words in ([], ["--resume"]):
        process = start(preset, out, *words, LINE_PAUSE="0.01")
        goal = step_in(out) + chance.choice([10, 20, 30])
        wait_for(lambda goal=goal: step_in(out) >= goal, process)
        time.sleep(chance.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not out.exists() and states(state)
    killed_at = [path.name for path in states(state)]
    code, _, err = complete(start(preset, out, "--resume"))
    assert code == 0, err
    assert weights(out) == weights(whole), f"resumed from {killed_at}"
    assert [row["loss"] for row in read_log(out / "log.jsonl")][-3:] == [row["loss"] for row in read_log(whole / "log.jsonl")][-3:]
    assert not list(state.glob(".*.tmp*"))


def test_sigterm_saves_and_says_so_and_resumes_exactly(whole, tmp_path):
    preset, out = write_preset(tmp_path), tmp_path / "line"
    process = start(preset, out, LINE_PAUSE="0.01")
    wait_for(lambda: step_in(out) >= 20, process)
    process.send_signal(signal.SIGTERM)
    code, _, err = complete(process)
    assert code == 128 + signal.SIGTERM and "--resume" in err and len(err.strip().splitlines()) == 1
    saved = int(states(tmp_path / ".state-line")[-1].name[5:])
    assert f"step {saved}" in err
    code, _, err = complete(start(preset, out, "--resume"))
    assert code == 0, err
    assert weights(out) == weights(whole)
    record = json.loads((out / "run.json").read_text())
    assert record["wall_seconds"] > 0.01 * saved  # both parts count


def test_killed_while_measuring_the_checkpoint_is_there_and_the_same_command_measures_it(whole, tmp_path):
    preset, out = write_preset(tmp_path), tmp_path / "line"
    process = start(preset, out, LINE_MEASURE="100")
    wait_for(lambda: (out / "run.json").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert json.loads((out / "run.json").read_text())["unmeasured"] and weights(out) == weights(whole)
    code, said, err = complete(start(preset, out))
    assert code == 0, err
    assert "resumed at step 120" in said and json.loads((out / "run.json").read_text())["rows"] == json.loads((whole / "run.json").read_text())["rows"]


@pytest.fixture
def line(monkeypatch):
    "The stage's module, imported as a test may bend it."
    monkeypatch.syspath_prepend(str(STAGE.parent))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that `start` makes: sums over two threads round differently
    yield importlib.import_module("line_stage")
    torch.set_num_threads(threads)


def train(line, preset, out, *words):
    "The same as the program, in this process."
    return train_stage(line.LineStage, stage_parser("line").parse_args(["--preset", str(preset), "--root", str(preset.parent), "--out", str(out), *words]))


def test_non_finite_loss_keeps_the_last_good_weights(whole, line, monkeypatch, tmp_path):
    preset, out = write_preset(tmp_path), tmp_path / "line"
    with monkeypatch.context() as broken, pytest.raises(UserError, match=r"step 41.*step-00000040.*recipe\.learning_rate"):
        broken.setattr(line, "BROKEN_FROM", 16 * 40)
        train(line, preset, out)
    assert not out.exists()
    kept = states(tmp_path / ".state-line")[-1]
    assert kept.name == "step-00000040"
    for name in ("weights", "ema", "optimizer"):
        assert all(value.isfinite().all() for value in load_file(kept / f"{name}.safetensors").values())
    assert train(line, preset, out, "--resume")["status"] == "finished"  # with the samples mended, the run goes on as if nothing had been
    assert weights(out) == weights(whole)


def test_resume_with_another_recipe_is_refused_and_can_be_accepted(line, tmp_path):
    preset, out = write_preset(tmp_path), tmp_path / "line"
    assert train(line, preset, out, "--stop-after", "30")["status"] == "stopped"
    with pytest.raises(UserError, match=r"recipe\.learning_rate = 0\.01.*0\.002.*--accept-changes"): train(line, preset, out, "--resume", "--set", "recipe.learning_rate=0.002")
    assert not out.exists()
    train(line, preset, out, "--resume", "--accept-changes", "--set", "recipe.learning_rate=0.002")
    assert json.loads((out / "run.json").read_text())["changes"] == [{"step": 30, "keys": {"recipe.learning_rate": [0.01, 0.002]}}]
    assert "Changed on the way" in (out / "README.md").read_text()


def launcher(config):
    "accelerate with a configuration file that comes with the package, on the CPU."
    with socket.socket() as probe: probe.bind(("127.0.0.1", 0)); port = probe.getsockname()[1]
    return ("-m", "accelerate.commands.launch", "--config_file", str(data_dir() / "accelerate" / f"{config}.yaml"), "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port))


ON_CPU = {"ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "lo"}


def furthest(one, two):
    "The largest difference of two checkpoints' weights."
    one, two = ({path.relative_to(out).as_posix(): load_file(path) for path in sorted(out.rglob("*.safetensors"))} for out in (one, two))
    assert one and {file: set(tensors) for file, tensors in one.items()} == {file: set(tensors) for file, tensors in two.items()}
    return max((tensors[name].float() - two[file][name].float()).abs().max().item() for file, tensors in one.items() for name in tensors)


def test_two_processes_train_the_same_model_as_one(line, monkeypatch, tmp_path):
    preset = write_preset(tmp_path)
    double = start(preset, tmp_path / "two", "--steps", "40", launcher=launcher("ddp-one-node"), LINE_PLAIN="1", LINE_MEASURE="3", **ON_CPU)  # one process measures when the other has left
    monkeypatch.setattr(line, "PLAIN", True)
    train(line, preset, tmp_path / "one", "--steps", "40")
    code, out, err = complete(double)
    assert code == 0, err
    assert json.loads((tmp_path / "two/run.json").read_text())["processes"] == 2
    assert furthest(tmp_path / "one", tmp_path / "two") < 1e-5
    one, two = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=1e-4)  # the log tells of all processes


def stage_command(stage, out, *words, launcher=(), **environment):
    command = [sys.executable, *launcher, "-m", f"vugen.train.{stage}", "--preset", "smoke", "--root", str(checkpoints_dir("tiny")), "--out", str(out), "--set", "recipe.precision=fp32", "--set", "recipe.epsilon=0.001", *words]  # weights whose true gradient is zero do not wander on rounding
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


@pytest.mark.parametrize("stage,config,words", [
    ("decoder", "ddp-one-node", ()),  # the whitening of a batch is that of all processes
    ("generator", "ddp-one-node", ("--set", "recipe.gradient_accumulation=2")),
    ("generator", "fsdp-one-node", ("--set", "recipe.gradient_accumulation=2", "--set", "recipe.gradient_checkpointing=true", "--set", "recipe.ema_device=cpu")),
    ("vlm", "fsdp-one-node", ())])  # tied embeddings
def test_two_processes_train_a_real_stage_as_one_does(stage, config, words, tmp_path):
    alone = stage_command(stage, tmp_path / "one")
    code, _, err = complete(alone)
    assert code == 0, err
    code, _, err = complete(stage_command(stage, tmp_path / "two", *words, launcher=launcher(config), **ON_CPU))
    assert code == 0, err
    record = json.loads((tmp_path / "two/run.json").read_text())
    assert record["processes"] == 2 and record.get("sharding") == ("FSDP" if config.startswith("fsdp") else None)
    assert furthest(tmp_path / "one", tmp_path / "two") < 1e-5


def test_a_sharded_run_is_resumed_by_one_process(tmp_path):
    words = ("--set", "recipe.ema_start=1")
    code, _, err = complete(stage_command("generator", tmp_path / "one", *words))
    assert code == 0, err
    code, _, err = complete(stage_command("generator", tmp_path / "two", *words, "--stop-after", "2", launcher=launcher("fsdp-one-node"), **ON_CPU))
    assert code == 0, err
    state = states(tmp_path / ".state-two")[-1]
    whole = load_file(states(tmp_path / ".state-one")[0] / "optimizer.safetensors")
    shared = load_file(state / "optimizer.safetensors")
    assert {name: value.shape for name, value in shared.items()} == {name: value.shape for name, value in whole.items()}  # whole tensors, whoever wrote them
    code, _, err = complete(stage_command("generator", tmp_path / "two", *words, "--resume"))
    assert code == 2 and "processes" in err and "--accept-changes" in err
    code, _, err = complete(stage_command("generator", tmp_path / "two", *words, "--resume", "--accept-changes"))
    assert code == 0, err
    assert furthest(tmp_path / "one", tmp_path / "two") < 1e-5
