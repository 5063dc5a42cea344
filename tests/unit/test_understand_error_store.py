"The store of single errors: nothing computed twice, nothing lost, the same numbers after a kill, replays without a network."
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch

from vugen.errors import UserError
from vugen.understand.denoisers import MixtureDenoiser
from vugen.understand.diffusion_classifier import (LOSSES, WEIGHTS, GaussianMixtureClasses, accuracy_by_samples, classifier_scores, denoising_errors, fit_time_weight, residual_losses, sample_plan, weighted)
from vugen.understand.error_store import (ClassifierItem, ErrorStore, Evaluator, LiveErrors, NoiseBank, StoredErrors, append_errors, compact, error_table, fill, only_model, picture_digest, replay, show_progress,
                                          snapped, stacked, stored_plan, suite_items)

WORLD = GaussianMixtureClasses(torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), .4)
PLAN = sample_plan(10, "antithetic", seed=3)


def points(count, seed=1): return WORLD.sample(torch.arange(count) % 3, torch.Generator().manual_seed(seed))


def make_items(count, seed=1):
    return [ClassifierItem(f"point/{number}", ("class 0", "class 1", "class 2"), number % 3, point) for number, point in enumerate(points(count, seed))]


class Counting(MixtureDenoiser):
    "Remembers every evaluation"
    def __init__(self): super().__init__(WORLD); self.seen, self.batches, self.read = [], [], []
    def prepare(self, captions): self.read.append(list(captions)); return super().prepare(captions)
    def velocity(self, noisy, t, conditions):
        self.batches.append(len(noisy))
        self.seen += [(round(time, 6), int(label), *[round(value, 4) for value in row]) for time, label, row in zip(t.tolist(), conditions.labels.tolist(), noisy.tolist())]
        return super().velocity(noisy, t, conditions)


@pytest.fixture
def denoiser(): return Counting()


def test_errors_are_those_of_the_classifier(tmp_path, denoiser):
    "Against `denoising_errors`, which was there first"
    items = make_items(4)
    with ErrorStore(tmp_path) as store:
        found = torch.stack([LiveErrors(store, denoiser, item, PLAN).errors(torch.arange(3), torch.arange(10)) for item in items])
    direct = denoising_errors(WORLD.velocity, points(4), [0, 1, 2], PLAN.times.float(), PLAN.noises((4,)))
    assert found.dtype == torch.float64 and torch.allclose(found.float(), direct, rtol=1e-5)


def test_all_losses_of_one_call(tmp_path, denoiser):
    item = make_items(1)[0]
    store = ErrorStore(tmp_path)
    live = LiveErrors(store, denoiser, item, PLAN)
    live.errors(torch.arange(3), torch.arange(10))
    noise, t = PLAN.noises((4,)), PLAN.times.float()
    clean = points(1)
    velocity = WORLD.velocity(t[:, None] * clean + (1 - t[:, None]) * noise, t, [1] * 10)
    assert torch.allclose(live.table[1], residual_losses(velocity, clean - noise), rtol=1e-5)
    store.flush()
    for loss in LOSSES:
        for weight in WEIGHTS:
            replayed = StoredErrors(ErrorStore(tmp_path), item, PLAN, loss=loss, weight=weight).errors(torch.tensor([1]), torch.arange(10))[0]
            assert torch.allclose(replayed, weighted(live.table[1], PLAN.times, loss, weight))
    assert len(denoiser.seen) == 30


def test_nothing_is_evaluated_twice(tmp_path, denoiser):
    item, store = make_items(1)[0], ErrorStore(tmp_path)
    live = LiveErrors(store, denoiser, item, PLAN)
    generator, wanted = torch.Generator().manual_seed(0), set()
    for _ in range(20):
        candidates, samples = torch.randperm(3, generator=generator)[:2], torch.randint(10, (4,), generator=generator)
        assert live.errors(candidates, samples).shape == (2, 4)  # samples may repeat
        wanted |= {(c, s) for c in candidates.tolist() for s in samples.tolist()}
    assert len(denoiser.seen) == len(set(denoiser.seen)) == len(wanted) == live.cost.calls == live.asked.calls == len(store)
    assert denoiser.read == [["class 0", "class 1", "class 2"]] and live.cost.prompts == 3 and live.cost.pictures == 1
    assert live.cost.tokens == live.cost.calls * denoiser.tokens and live.cost.flops == live.cost.calls * denoiser.flops
    store.flush()
    before = len(denoiser.seen)
    other = LiveErrors(ErrorStore(tmp_path), denoiser, item, PLAN)  # another run, and another schedule
    other.errors(torch.arange(3), torch.arange(10))
    assert len(denoiser.seen) - before == 30 - len(wanted) == other.cost.calls and other.asked.calls == 30 and len(set(denoiser.seen)) == 30


def test_plans_share_what_they_have_in_common(tmp_path, denoiser):
    items, store = make_items(2), ErrorStore(tmp_path)
    fill(store, denoiser, items, sample_plan(6, "stratified", seed=3))
    assert fill(store, denoiser, items, sample_plan(9, "stratified", seed=3)).calls == 2 * 3 * 3
    assert fill(store, denoiser, items, sample_plan(6, "stratified", seed=4)).calls == 2 * 3 * 6  # other noises
    renamed = [ClassifierItem("again/" + item.key, (*item.captions[:2],), 0, item.image) for item in items]
    assert fill(store, denoiser, renamed, sample_plan(6, "stratified", seed=3)).calls == 0  # the same pictures and captions under other names


def test_batches_run_over_items_candidates_and_samples(tmp_path, denoiser):
    cost = fill(ErrorStore(tmp_path), denoiser, make_items(7), PLAN, batch_size=64, block=4)
    assert denoiser.batches == [64, 56, 64, 26] and cost.calls == 210 and cost.pictures == 7 and cost.prompts == 3


def test_each_item_may_have_its_own_plan(tmp_path, denoiser):
    items, store = make_items(3), ErrorStore(tmp_path)
    plans = [sample_plan(5, "uniform", seed=number) for number in range(3)]
    fill(store, denoiser, items, lambda number: plans[number], block=2)
    errors, _, times = stacked(store, lambda item: plans[int(item.key.split("/")[1])])
    for number in range(3):
        direct = denoising_errors(WORLD.velocity, points(3)[number:number + 1], [0, 1, 2], plans[number].times.float(), plans[number].noises((4,)))
        assert torch.allclose(errors[number].float(), direct[0], rtol=1e-5) and torch.equal(times[number], plans[number].times)
    assert torch.equal(stacked(store)[0], errors)  # the plans as they were stored


def test_repeated_candidates_and_pictures_are_one(tmp_path, denoiser):
    image = points(1)[0]
    item = ClassifierItem("twice", ("class 0", "class 1", "class 0"), 0, image)
    same = ClassifierItem("same picture", ("class 2", "class 1"), 0, image)
    store = ErrorStore(tmp_path / "filled")
    assert fill(store, denoiser, [item, same, make_items(2, seed=5)[1]], PLAN).calls == 10 * (2 + 1 + 3) == len(store) == len(set(denoiser.seen))
    errors = StoredErrors(store, item, PLAN).errors(torch.arange(3), torch.arange(10))
    assert torch.equal(errors[0], errors[2]) and not torch.equal(errors[0], errors[1])
    assert torch.equal(StoredErrors(store, same, PLAN).errors(torch.tensor([1]), torch.arange(10))[0], errors[1])
    live = LiveErrors(ErrorStore(tmp_path / "live"), denoiser, item, PLAN)
    assert torch.allclose(live.errors(torch.arange(3), torch.arange(10)), errors, rtol=1e-5) and live.cost.calls == 20 == live.asked.calls


def test_correction_takes_the_unconditional_error_of_the_same_sample(tmp_path, denoiser):
    store, item = ErrorStore(tmp_path), make_items(1)[0]
    source = LiveErrors(store, denoiser, item, PLAN, weight="simple", correct=True)
    found, plain = source.errors(torch.arange(3), torch.tensor([4, 1])), StoredErrors(store, item, PLAN, weight="simple").errors(torch.arange(3), torch.tensor([4, 1]))
    free = StoredErrors(store, ClassifierItem("free", ("",), 0, item.image), PLAN, weight="simple").errors(torch.tensor([0]), torch.tensor([4, 1]))
    assert torch.equal(found, plain - free) and source.cost.calls == 8 == source.asked.calls and source.cost.prompts == 4
    assert torch.equal(found.mean(1).argsort(), plain.mean(1).argsort())
    assert fill(store, denoiser, [item], PLAN, correct=True).calls == 4 * 10 - 8


def test_networks_and_pictures_are_kept_apart(tmp_path, denoiser):
    store, items = ErrorStore(tmp_path), make_items(2)
    fill(store, denoiser, items, PLAN)
    other = MixtureDenoiser(GaussianMixtureClasses(WORLD.means + .5, .4), "moved")
    assert fill(store, other, items, PLAN).calls == 60
    assert {told["name"] for told in ErrorStore(tmp_path).models.values()} == {"mixture", "moved"}
    with pytest.raises(UserError, match="2 networks"): stacked(store, PLAN)
    with pytest.raises(UserError, match="0 networks"): only_model(ErrorStore(tmp_path / "empty"))
    first, second = (stacked(store, PLAN, model=each.fingerprint)[0] for each in (denoiser, other))
    assert not torch.allclose(first, second)
    changed = ClassifierItem(items[0].key, items[0].captions, 0, items[0].image + 1)  # the same key on another picture
    assert changed.digest() != items[0].digest() and fill(store, denoiser, [changed], PLAN).calls == 30


def test_a_network_that_knows_some_times_only(tmp_path):
    class Stepped(MixtureDenoiser):
        def snap(self, times): return (times * 10).round() / 10
    denoiser, store, item = Stepped(WORLD), ErrorStore(tmp_path), make_items(1)[0]
    live = LiveErrors(store, denoiser, item, PLAN)
    live.errors(torch.arange(3), torch.arange(10))
    assert torch.equal(live.plan.times, (PLAN.times * 10).round() / 10)
    assert len(StoredErrors(store, item, snapped(PLAN, denoiser)).errors(torch.arange(3), torch.arange(10))) == 3
    with pytest.raises(UserError, match="lacks"): StoredErrors(store, item, PLAN).errors(torch.arange(3), torch.arange(10))
    assert torch.equal(stored_plan(store, denoiser.fingerprint, item).times.sort()[0], live.plan.times.unique().repeat_interleave(torch.unique(live.plan.times, return_counts=True)[1]))


def test_what_is_missing_is_named(tmp_path, denoiser):
    store, items = ErrorStore(tmp_path), make_items(2)
    fill(store, denoiser, items[:1], PLAN[:4])
    source = StoredErrors(store, "point/0", PLAN)
    assert source.errors(torch.arange(3), torch.arange(4)).shape == (3, 4)
    with pytest.raises(UserError, match=rf"lacks 3 of 15 errors of item 'point/0' \(first: caption 'class 0', t = {PLAN.times[4]:.4f}, noise 2 of seed 3\)"): source.errors(torch.arange(3), torch.arange(5))
    with pytest.raises(UserError, match="knows no item 'point/9': it holds 1 items, such as point/0"): StoredErrors(store, "point/9", PLAN)
    with pytest.raises(UserError, match="has no picture"): LiveErrors(store, denoiser, ClassifierItem("bare", ("class 0",)), PLAN)
    with pytest.raises(UserError, match="holds no items"): stacked(ErrorStore(tmp_path / "none"), PLAN, model="x")
    with pytest.raises(UserError, match="holds nothing of item"): stored_plan(store, denoiser.fingerprint, items[1])
    with pytest.raises(UserError, match="no loss 'l3'"): StoredErrors(store, "point/0", PLAN, loss="l3").errors(torch.arange(1), torch.arange(1))
    with pytest.raises(UserError, match="no weight"): StoredErrors(store, "point/0", PLAN, weight="heavy")
    assert len(denoiser.seen) == 12


def test_a_cut_part_is_set_aside(tmp_path, denoiser):
    store, items = ErrorStore(tmp_path, flush_rows=1), make_items(4)
    for item in items: fill(store, denoiser, [item], PLAN)
    whole = stacked(store, PLAN)[0]
    parts = sorted(tmp_path.glob("errors-*.parquet"))
    assert len(parts) == 4
    parts[1].write_bytes(parts[1].read_bytes()[:-200])
    with pytest.warns(UserWarning, match=f"{parts[1].name} is cut off: it was set aside as") as said: again = ErrorStore(tmp_path)
    assert len(said) == 1 and len(again) == 90 and not parts[1].exists() and (tmp_path / f"{parts[1].name}.broken").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ErrorStore(tmp_path)  # told once
    assert fill(again, denoiser, items, PLAN).calls == 30 and torch.equal(stacked(again, PLAN)[0], whole)
    for part in sorted(tmp_path.glob("errors-*.parquet"))[:2]: part.write_bytes(b"")
    with pytest.raises(UserError, match="2 parts of the error store"): ErrorStore(tmp_path)


def test_strange_folders(tmp_path):
    import pyarrow as pa
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"): ErrorStore(tmp_path / "file")
    parquet.write_table(pa.table({"a": [1]}), tmp_path / "errors-1.parquet")
    with pytest.raises(UserError, match=r"errors-1.parquet is no part of an error store \(no column model\)"): ErrorStore(tmp_path)
    (tmp_path / "errors-1.parquet").unlink()
    (tmp_path / "model-abc.json").write_text("{")
    with pytest.raises(UserError, match="model-abc.json cannot be read"): ErrorStore(tmp_path)


def test_parts_are_plain_tables(tmp_path, denoiser):
    with ErrorStore(tmp_path) as store: fill(store, denoiser, make_items(2), PLAN)
    (path,) = tmp_path.glob("errors-*.parquet")
    row = parquet.read_table(path).to_pylist()[4]  # the second sample's second candidate
    assert row["model"] == denoiser.fingerprint and row["item"] == "point/0" and row["picture"] == picture_digest(points(2)[0]) and row["caption"] == "class 1"
    assert (row["t"], row["seed"], row["noise"], row["sign"]) == (PLAN.times[1].item(), 3, 0, -1)
    direct = denoising_errors(WORLD.velocity, points(2)[:1], [1], PLAN.times[1:2].float(), PLAN.noises((4,))[1:2])
    assert row["l2"] == pytest.approx(direct.item(), rel=1e-5)


def test_two_writers_and_compaction(tmp_path, denoiser):
    items = make_items(3)
    first, second = ErrorStore(tmp_path), ErrorStore(tmp_path)
    fill(first, denoiser, items[:2], PLAN); fill(second, denoiser, items[1:], PLAN)
    assert fill(first.refresh(), denoiser, items, PLAN).calls == 0 and len(first) == 120
    whole = stacked(first, PLAN)[0]
    compact(first)
    assert len(first) == 90 == len(ErrorStore(tmp_path)) and len(list(tmp_path.glob("errors-*"))) == 1
    assert torch.equal(stacked(ErrorStore(tmp_path), PLAN)[0], whole) and torch.equal(stacked(ErrorStore(tmp_path))[0], whole)


WRITER = """
import sys
from tests_store import MixtureDenoiser, WORLD, make_items, PLAN
from vugen.understand.error_store import ErrorStore, fill
with ErrorStore(sys.argv[1]) as store: fill(store, MixtureDenoiser(WORLD), make_items(5)[int(sys.argv[2]):], PLAN)
"""


def another_process(tmp_path, folder, first):
    "A second writer: a process of its own that fills items from number `first` on"
    (tmp_path / "tests_store.py").write_text(textwrap.dedent(HELPER))
    place = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    subprocess.run([sys.executable, "-c", WRITER, str(folder), str(first)], env={**os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1"}, check=True)


@pytest.mark.parametrize("moment", ["after reading", "before removing"])
def test_compaction_keeps_what_another_process_wrote_meanwhile(tmp_path, denoiser, monkeypatch, moment):
    folder, items = tmp_path / "store", make_items(5)
    store = ErrorStore(folder)
    fill(store, denoiser, items[:3], PLAN)
    told, calls = store.flush, []
    def flush():
        calls.append(len(calls))
        if moment == "after reading" and len(calls) == 1: another_process(tmp_path, folder, 3)
        told()
        if moment == "before removing" and len(calls) == 2: another_process(tmp_path, folder, 3)
    monkeypatch.setattr(store, "flush", flush)
    compact(store)
    assert len(calls) == 2 and len(list(folder.glob("errors-*.parquet"))) == 2
    again = ErrorStore(folder)
    assert len(again) == 150 and fill(again, denoiser, items, PLAN).calls == 0
    whole = ErrorStore(tmp_path / "whole")
    fill(whole, denoiser, items, PLAN)
    assert torch.equal(stacked(again, PLAN)[0], stacked(whole, PLAN)[0])


def test_a_part_that_is_compacted_away_while_another_reads_is_not_lost(tmp_path, denoiser, monkeypatch):
    "The reader has the list of parts, and another process puts one in their place before it opens them"
    from vugen.understand import error_store
    folder, items, read = tmp_path / "store", make_items(4), error_store._read_part
    for item in items: fill(ErrorStore(folder), denoiser, [item], PLAN)
    waiting = [True]
    def read_late(path, columns):
        if waiting: waiting.clear(); compact(ErrorStore(folder))
        return read(path, columns)
    monkeypatch.setattr(error_store, "_read_part", read_late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = ErrorStore(folder)
    assert len(list(folder.glob("errors-*"))) == 1 and len(reader) == 120 and fill(reader, denoiser, items, PLAN).calls == 0


def test_noise_bank_starts_anew_when_full():
    bank = NoiseBank((2,), torch.device("cpu"), capacity=4)
    fresh = NoiseBank((2,), torch.device("cpu"), capacity=100)
    for keys in ([(0, 0), (0, 1)], [(1, 0), (0, 1)], [(2, 0), (2, 1), (0, 0)], [(3, number) for number in range(6)], [(0, 1)]):
        assert torch.equal(bank.take(keys), fresh.take(keys))


def test_conditions_are_kept_for_a_few_lists(denoiser):
    evaluator = Evaluator(denoiser, kept=2)
    for captions in (["class 0"], ["class 1"], ["class 0"], ["class 2"], ["class 0"], ["class 1"]): evaluator.conditions(captions)
    assert denoiser.read == [["class 0"], ["class 1"], ["class 2"], ["class 1"]] and evaluator.cost.prompts == 4


SCRIPT = """
import sys, time, torch
from tests_store import Slow, make_items, PLAN
from vugen.understand.error_store import ErrorStore, fill
fill(ErrorStore(sys.argv[1], flush_seconds=0), Slow(), make_items(20), PLAN, batch_size=8, block=6)
"""

HELPER = """
import time, torch
from vugen.understand.denoisers import MixtureDenoiser
from vugen.understand.diffusion_classifier import GaussianMixtureClasses, sample_plan
from vugen.understand.error_store import ClassifierItem
WORLD = GaussianMixtureClasses(torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), .4)
PLAN = sample_plan(10, "antithetic", seed=3)
def make_items(count):
    found = WORLD.sample(torch.arange(count) % 3, torch.Generator().manual_seed(1))
    return [ClassifierItem(f"point/{n}", ("class 0", "class 1", "class 2"), n % 3, point) for n, point in enumerate(found)]
class Slow(MixtureDenoiser):
    def __init__(self): super().__init__(WORLD)
    def velocity(self, *inputs): time.sleep(.05); return super().velocity(*inputs)
"""


def test_killed_and_resumed_gives_the_same_numbers(tmp_path, denoiser):
    (tmp_path / "tests_store.py").write_text(textwrap.dedent(HELPER))
    folder = tmp_path / "killed"
    place = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env={**os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("errors-*.parquet"))) < 2 and time.monotonic() < deadline and run.poll() is None: time.sleep(.01)
    finally: run.send_signal(signal.SIGKILL); run.wait()
    assert run.returncode == -signal.SIGKILL
    store = ErrorStore(folder)
    kept, items = len(store), make_items(20)
    assert 64 * 2 <= kept < 600
    cost = fill(store, denoiser, items, PLAN, batch_size=8, block=6)
    assert cost.calls == 600 - kept and len(ErrorStore(folder)) == 600
    unbroken = ErrorStore(tmp_path / "whole")
    fill(unbroken, denoiser, items, PLAN, batch_size=8, block=6)
    for loss in LOSSES: assert torch.equal(stacked(ErrorStore(folder), PLAN, loss=loss)[0], stacked(unbroken, PLAN, loss=loss)[0])


def test_replays_of_one_exhaustive_store(tmp_path, denoiser):
    "Estimators, weights, losses and a fitted weight, with no network call"
    items = make_items(60)
    with ErrorStore(tmp_path) as store:
        plans = {name: sample_plan(16, name, .05, .95) for name in ("uniform", "even", "stratified", "antithetic")}
        for plan in plans.values(): fill(store, denoiser, items, plan)
    calls, store = len(denoiser.seen), ErrorStore(tmp_path)
    for name, plan in plans.items():
        errors, labels, times = stacked(store, plan)
        direct = denoising_errors(WORLD.velocity, points(60), [0, 1, 2], plan.times.float(), plan.noises((4,)))
        assert torch.allclose(classifier_scores(errors), classifier_scores(direct), rtol=1e-4), name
        assert accuracy_by_samples(errors, labels)[-1] > .6
    fitted = fit_time_weight(errors[:20], labels[:20], times[:20])
    scores = replay(store, lambda source: source.errors(torch.arange(3), torch.arange(16)).mean(1), plans["antithetic"], weight=fitted, items=["point/3", items[5]])
    assert list(scores) == ["point/3", "point/5"] and torch.allclose(scores["point/3"], (errors[3] * fitted(times[3])).mean(1))
    assert len(denoiser.seen) == calls


def test_different_numbers_of_candidates_are_not_stacked(tmp_path, denoiser):
    store, (first, second) = ErrorStore(tmp_path), make_items(2)
    fill(store, denoiser, [first, ClassifierItem("two", second.captions[:2], 0, second.image)], PLAN)
    with pytest.raises(UserError, match="different numbers"): stacked(store, PLAN)
    assert stacked(store, PLAN, items=["two"])[0].shape == (1, 2, 10)


def test_a_million_rows(tmp_path):
    captions, plan = [f"caption {number}" for number in range(10)], sample_plan(100, "antithetic")
    samples, told = plan[torch.arange(100).repeat(10)], [caption for caption in captions for _ in range(100)]
    values = np.random.default_rng(0).random((1000, 3), dtype=np.float32)
    with ErrorStore(tmp_path) as store:
        for number in range(1000): append_errors(store, "net", ClassifierItem(f"item {number}", tuple(captions), picture=f"{number:016x}"), f"{number:016x}", told, samples, values + number); store.flush_if_due()
    store = ErrorStore(tmp_path)
    assert len(store) == 1_000_000
    for number in (0, 512, 999): assert torch.equal(error_table(store, "net", f"{number:016x}", captions, plan), torch.from_numpy(values + number).view(10, 100, 3))


def test_suite_items_and_progress(capsys):
    from vugen.data.scenes import World
    from vugen.understand.benchmarks import scene_suite
    suite = scene_suite(World(), kinds=("swap-attribute", "add-object"), n=2)
    items = suite_items(suite, sides=(0, 1))
    assert [item.label for item in items] == [0, 1, 0, 1, 0, 0] and len({item.key for item in items}) == 6  # the second picture of a one-way item is not asked
    assert torch.equal(items[1].pixels(), suite.pictures([0])[0, 1]) and items[1].captions == tuple(suite.items[0].captions)
    show_progress(50, 100, 5.); show_progress(100, 100, 10.)
    assert "50/100 errors, 10/s, 5 s left" in capsys.readouterr().err


def test_a_generator_in_the_store(tmp_path):
    "The whole chain on a tiny TextToImage: fill in blocks, live one by one"
    from test_understand_denoisers import toy
    from vugen.data.scenes import World, batch
    from vugen.understand.denoisers import GeneratorDenoiser
    samples, denoiser = batch(World(), 0, range(3)), GeneratorDenoiser(toy())
    items = [ClassifierItem(f"scene/{number}", tuple(samples["captions"]), number, image) for number, image in enumerate(samples["images"])]
    with ErrorStore(tmp_path / "a") as store: cost = fill(store, denoiser, items, PLAN, batch_size=16)
    assert cost.calls == 90 and cost.tokens == 90 * 16 and cost.flops == 90 * denoiser.flops_of(denoiser.prepare(samples["captions"]))
    live = [LiveErrors(ErrorStore(tmp_path / "b"), denoiser, item, PLAN).errors(torch.arange(3), torch.arange(10)) for item in items]
    assert torch.allclose(torch.stack(live), stacked(store, PLAN)[0], rtol=1e-4)


def test_a_call_is_billed_at_the_length_of_its_captions(tmp_path):
    "Against the counter of torch on the very call, not at the usual sixteen tokens"
    from test_understand_denoisers import toy
    from vugen.data.scenes import World, batch
    from vugen.understand.denoisers import GeneratorDenoiser, counted_flops
    samples, denoiser = batch(World(), 0, range(2)), GeneratorDenoiser(toy())
    short, long = (ClassifierItem(name, captions, 0, image) for name, captions, image in zip(("short", "long"), (("red", "blue"), ("a red circle " * 9, "blue")), samples["images"]))
    every, totals = (torch.arange(2), torch.arange(4)), []
    for item in (short, long):
        conditions = denoiser.prepare(list(item.captions))
        noisy = torch.zeros(1, *denoiser.shape)
        totals.append(8 * counted_flops(lambda: denoiser.velocity(noisy, torch.full((1,), .5), conditions.select(torch.tensor([1])))))
        with ErrorStore(tmp_path / item.key) as store: live = LiveErrors(store, denoiser, item, PLAN[:4]); live.errors(*every)
        replayed = StoredErrors(ErrorStore(tmp_path / item.key), item, PLAN[:4])
        assert replayed.asked.flops == 0
        replayed.errors(*every)
        assert live.asked.flops == live.cost.flops == replayed.asked.flops == totals[-1] and replayed.asked.calls == 8
        replayed.errors(torch.tensor([0]), torch.tensor([1]))  # asked again: not paid again
        assert replayed.asked.flops == totals[-1]
    assert totals[0] < 8 * denoiser.flops < totals[1]
    with ErrorStore(tmp_path / "filled") as store: cost = fill(store, denoiser, [short, long], PLAN[:4])
    sources = [StoredErrors(ErrorStore(tmp_path / "filled"), item, PLAN[:4]) for item in (short, long)]
    for source in sources: source.errors(*every)
    assert sum(source.asked for source in sources).flops == cost.flops


def test_parts_without_prices_are_read_and_billed_as_usual(tmp_path, denoiser):
    items = make_items(2)
    with ErrorStore(tmp_path) as store: fill(store, denoiser, items, PLAN)
    for path in tmp_path.glob("errors-*"): parquet.write_table(parquet.read_table(path).drop_columns("flops"), path)
    old = StoredErrors(ErrorStore(tmp_path), items[0], PLAN)
    assert torch.equal(old.errors(torch.arange(3), torch.arange(10)), StoredErrors(store, items[0], PLAN).errors(torch.arange(3), torch.arange(10)))
    assert old.asked.flops == 30 * denoiser.flops
    compact(again := ErrorStore(tmp_path))
    assert len(again) == 60 and torch.equal(stacked(ErrorStore(tmp_path), PLAN)[0], stacked(store, PLAN)[0])
