"The bench of the classifier: arithmetic by hand, intervals against simulation, and a run on four items that resumes without a network."
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vugen.errors import UserError
from vugen.lab import bench_classifier
from vugen.lab.bench import Bench
from vugen.lab.bench_classifier import (Outcome, SETTINGS, bench_items, bench_schedules, cheapest, classifier_bench, classifier_table, crossed_sharpness, item_plan, one_sample_row,
                                        outcome_rows, paired_difference, plateau, published_row, replay_schedules, schedule_seconds)
from vugen.lab.cli import main
from vugen.paths import data_dir
from vugen.understand.error_store import ErrorStore


def made_up(items, candidates=2, samples=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(candidates, samples, generator=generator, dtype=torch.float64) + torch.arange(candidates)[:, None].clamp(max=1) for _ in range(items)]


# arithmetic

def test_rows_by_hand():
    full = Outcome("exhaustive", "exhaustive", winners=[0, 0, 1, 0], calls=[20] * 4, rounds=[1] * 4, decided=[True] * 4)
    staged = Outcome("Li's stages", "Li's stages, nested", winners=[0, 0, 0, 0], calls=[10] * 4, rounds=[2] * 4, decided=[True] * 4)
    race = Outcome("racing", "racing 0.1", .1, winners=[0, None, 1, 1], calls=[2, 4, 4, 6], rounds=[1, 2, 2, 3], decided=[True, True, True, False])
    for each in (full, staged, race): each.samples.update([1, 3])
    rows = outcome_rows([full, staged, race], [0, 0, 0, 0], {"difficulty": "close", "model": "generator"}, tokens=64, flops=[1e9, 1e9, 2e9, 1e9], batches={1: .1, 2: .15})
    found = {row["metric"]: row for row in rows if row["schedule"] == "racing 0.1"}
    assert found["accuracy"]["value"] == .25 and found["accuracy less exhaustive"]["value"] == -.5 and found["other winner than exhaustive"]["value"] == .5
    assert found["calls an item"]["value"] == 4 and found["calls an item"]["ratio_to"] == {"exhaustive": 5, "plateau": 5, "Li's stages": 2.5}
    assert found["tokens an item"]["value"] == 256 and found["GFLOP an item"]["value"] == (2 + 4 + 2 * 4 + 6) / 4 and found["rounds an item"]["value"] == 2
    assert found["seconds an item, alone"]["value"] == pytest.approx(.3) and found["seconds an item, many at a time"]["value"] == pytest.approx(.3)
    assert found["decided before the budget"]["value"] == .75 and found["samples a candidate"]["histogram"] == {"1": 1, "3": 1}
    assert found["fewer calls than exhaustive"]["value"] == 5 and found["fewer calls than exhaustive"]["low"] <= 5 <= found["fewer calls than exhaustive"]["high"]


def test_the_plateau_is_where_more_samples_stop_helping():
    right = {64: 90, 32: 91, 16: 89, 8: 88, 4: 92}
    outcomes = [Outcome("exhaustive", str(count), winners=[0] * won + [1] * (100 - won), calls=[count] * 100) for count, won in right.items()]
    assert plateau(outcomes, [0] * 100).name == "16" and plateau(outcomes, [0] * 100, .02).name == "4"


def test_cheapest_is_the_fewest_calls_within_the_loss():
    rows = [{"schedule": name, "family": family, "metric": metric, "value": value} for name, family, lost, calls in (("a", "x", 0., 100.), ("b", "x", -.01, 10.), ("c", "y", -.02, 1.))
            for metric, value in (("accuracy less exhaustive", lost), ("calls an item", calls))]
    assert cheapest(rows)["schedule"] == "b" and cheapest(rows, .03)["schedule"] == "c" and cheapest(rows, .01, "y") is None


def test_one_sample_by_hand():
    table = torch.tensor([[1., 5., 2.], [2., 4., 2.], [3., 6., 9.]])
    assert one_sample_row([table], [0], {"difficulty": "d", "model": "m"})["value"] == pytest.approx(1 / 3)  # the third is a tie
    assert one_sample_row([table], [1], {"difficulty": "d", "model": "m"})["value"] == pytest.approx(1 / 3)


def test_published_budgets():
    calls = [published_row({"difficulty": "d", "candidates": count})["value"] for count in (2, 100, 1000)]
    assert calls == [2000, 100 * 50 + 50 * 100 + 10 * 400, 124_500]


def test_the_interval_of_a_paired_difference_covers():
    draw, covered = np.random.default_rng(0), []
    for _ in range(600):
        both = draw.choice(4, 120, p=[.7, .04, .08, .18])  # both right, only before, only after, none
        found = paired_difference(np.isin(both, (0, 1)), np.isin(both, (0, 2)))
        covered.append(found.low <= .04 <= found.high)
    assert .93 <= np.mean(covered) <= .985
    assert paired_difference([True] * 10, [False] * 10).value == -1 and paired_difference([True] * 500, [True] * 500).high < .01


def test_seconds_between_measured_batches():
    batches = {1: 1., 4: 2.5, 16: 4.}
    assert schedule_seconds(6, 6, batches) == (6, 1.5) and schedule_seconds(20, 5, batches)[0] == pytest.approx(12.5) and schedule_seconds(64, 1, batches)[0] == 16


# replays

def test_the_sharpness_of_an_item_is_fitted_on_others():
    tables = made_up(6)
    plain = crossed_sharpness(tables)
    assert plain[0] == plain[2] != plain[1] == plain[3]
    changed = crossed_sharpness([tables[0] * 3, *tables[1:]])
    assert changed[0] == plain[0] and changed[1] != plain[1]
    with pytest.raises(UserError, match="2 or more"): crossed_sharpness(tables[:1])


@pytest.mark.parametrize("candidates, samples", [(2, 2), (2, 32), (7, 16), (100, 8)])
def test_all_schedules_replay_on_every_size(candidates, samples):
    tables = made_up(4, candidates, samples)
    outcomes = replay_schedules(tables, [torch.linspace(0, 1, samples)] * 4, [1.] * 4)
    assert outcomes[0].name == "exhaustive" and outcomes[0].winners == [int(table.mean(1).argmin()) for table in tables]
    assert len({outcome.name for outcome in outcomes}) == len(outcomes) and all(len(outcome.calls) == 4 for outcome in outcomes) and all(max(outcome.calls) <= candidates * samples for outcome in outcomes)
    assert all(sum(outcome.samples.values()) == 4 * candidates for outcome in outcomes)
    assert {outcome.family for outcome in outcomes} >= {"exhaustive", "Li's stages", "racing", "posterior"} and bench_schedules(candidates, samples, 1.)


def test_plans_differ_between_items_and_keep_to_the_range():
    plans = [item_plan(SETTINGS["close"], "generator-decoupled", number) for number in range(3)]
    assert all(.1 <= float(plan.times.min()) and float(plan.times.max()) <= .7 for plan in plans) and plans[0].seed != plans[1].seed


def test_prices_are_those_of_every_items_captions():
    from vugen.understand.scorers import Parts
    parts = Parts()
    items, denoiser = bench_items("close", 2, parts.world), bench_classifier.load_denoiser(parts, "generator", "bf16")
    assert bench_classifier.call_prices(denoiser, items) == [denoiser.flops_of(denoiser.prepare(list(item.captions))) for item in items]
    assert len(set(bench_classifier.call_prices(denoiser, items))) == 2
    class Plain: flops = 5
    assert bench_classifier.call_prices(Plain(), items) == [5., 5.]


def test_weights_and_losses_by_hand():
    "One sample of each time: the first time is right under squares, the last under absolute values; the fitted weight finds out which"
    draw, truths = np.random.default_rng(0), [0, 1] * 20
    losses, times = [], torch.tensor([.3, .5, .7], dtype=torch.float64)
    for truth in truths:
        table = torch.from_numpy(draw.normal(size=(2, 3, 3)) + 9)
        table[truth, 0, 0] -= 8  # l2 at t = 0.3
        table[truth, 2, 1] -= 8  # l1 at t = 0.7
        table[1 - truth, 1:, 0] -= 6  # squares mislead later
        losses.append(table)
    rows = {(row["loss"], row["weight"]): row for row in bench_classifier.weight_rows(losses, [times] * 40, truths, {"difficulty": "d", "model": "m"})}
    means = torch.stack([table[..., 0].mean(1) for table in losses])
    assert rows["l2", "uniform"]["value"] == pytest.approx(np.mean([int(mean.argmin()) == truth for mean, truth in zip(means, truths)])) and rows["l2", "uniform"]["value"] < .3
    assert rows["l2", "fitted"]["value"] > .95 and rows["l1", "uniform"]["value"] > .95 and all(row["n"] == 40 and row["low"] <= row["value"] <= row["high"] for row in rows.values())
    ties = bench_classifier.weight_rows([torch.ones(2, 3, 3)] * 4, [times] * 4, [0] * 4, {"difficulty": "d", "model": "m"})
    assert all(row["value"] == 0 for row in ties)  # a tie is no win


# the whole measurement

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "No test meets the user's cache"
    monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))


def ran(words):
    with pytest.raises(SystemExit) as done: main(["bench", "classifier", *words])
    assert done.value.code == 0


def computed(path): return [row["value"] for row in json.loads(path.read_text())["rows"] if row["metric"] == "calls computed now"]


def same_numbers(path):
    "All rows but those that tell seconds and how much was new"
    return [row for row in json.loads(path.read_text())["rows"] if "econds" not in row["metric"] and "computed" not in row["metric"]]


def test_errors_are_kept_without_being_told_to(tmp_path, capsys):
    words = ["--samples", "4", "--json"]
    ran(["--items", "4", *words, str(tmp_path / "first.json")])
    (folder,) = (tmp_path / "cache/bench/classifier").iterdir()
    assert f"errors of generator are kept in {folder} (there already: 0)" in capsys.readouterr().err and folder.name.startswith("close-generator-") and len(ErrorStore(folder)) == 32
    ran(["--items", "4", *words, str(tmp_path / "second.json")])
    assert f"{folder} (there already: 32)" in capsys.readouterr().err and computed(tmp_path / "second.json") == [0] and same_numbers(tmp_path / "second.json") == same_numbers(tmp_path / "first.json")
    ran(["--items", "6", *words, str(tmp_path / "more.json")])  # more of the same items go on from there
    assert computed(tmp_path / "more.json") == [16] and str(tmp_path) not in (tmp_path / "more.json").read_text()
    assert list((tmp_path / "cache/bench/classifier").iterdir()) == [folder]


def test_other_weights_precisions_and_items_lie_elsewhere():
    from types import SimpleNamespace
    from vugen.data.scenes import World
    made = lambda mark="a", name="close", world=World(), seed=0: bench_classifier.errors_folder(SimpleNamespace(name="generator", fingerprint=mark), name, world, seed)
    assert made() == made() and len({made(), made("b"), made(name="crowd-100"), made(world=World(clutter=3)), made(seed=1)}) == 5


DYING = """
import os, signal, sys
from vugen.understand.error_store import ErrorStore
ErrorStore.__init__.__defaults__ = (1, 0.0)  # a part is written after every few batches, not after half a minute
flush = ErrorStore.flush
def flush_and_die(store):
    flush(store)
    if len(store): os.kill(os.getpid(), signal.SIGKILL)
ErrorStore.flush = flush_and_die
from vugen.lab.cli import main
main(sys.argv[1:])
"""


def test_a_bench_that_is_killed_goes_on_to_the_same_rows(tmp_path):
    words = ["--items", "20", "--samples", "32", "--json"]  # more errors than one part takes
    folder = tmp_path / "killed"
    run = subprocess.run([sys.executable, "-c", DYING, "bench", "classifier", "--errors", str(folder), *words, str(tmp_path / "never.json")], capture_output=True, timeout=300,
                         env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"})
    assert run.returncode == -signal.SIGKILL and not (tmp_path / "never.json").exists()
    kept = len(ErrorStore(folder))
    assert 0 < kept < 20 * 2 * 32
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ran(["--errors", str(folder), *words, str(tmp_path / "resumed.json")])
        ran([*words, str(tmp_path / "whole.json")])
    finally: torch.set_num_threads(threads)
    assert computed(tmp_path / "resumed.json") == [20 * 2 * 32 - kept] and computed(tmp_path / "whole.json") == [20 * 2 * 32]
    assert same_numbers(tmp_path / "resumed.json") == same_numbers(tmp_path / "whole.json")


def test_a_small_run_and_its_resumption(tmp_path, capsys, monkeypatch):
    words = ["bench", "classifier", "--items", "4", "--samples", "4", "--errors", str(tmp_path / "store"), "--json"]
    with pytest.raises(SystemExit) as done: main([*words, str(tmp_path / "rows.json")])
    assert done.value.code == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    assert set(found) == {"device", "run", "rows"} and all({"case", "metric", "value", "unit", "ratio_to"} <= set(row) for row in found["rows"])
    assert found["run"]["items"] == 4 and str(tmp_path) not in json.dumps(found) and "exhaustive" in capsys.readouterr().out
    assert [row["value"] for row in found["rows"] if row["metric"] == "calls computed now"] == [32]
    store = ErrorStore(tmp_path / "store")
    assert len(store) == 32 and len(store.items) == 4
    with pytest.raises(SystemExit) as done: main([*words, str(tmp_path / "again.json")])
    again = json.loads((tmp_path / "again.json").read_text())
    kept = lambda rows: [(row["case"], row["metric"], row["value"]) for row in rows if "econds" not in row["metric"] and "computed" not in row["metric"]]
    assert [row["value"] for row in again["rows"] if row["metric"] == "calls computed now"] == [0] and kept(again["rows"]) == kept(found["rows"])
    assert len(classifier_table(found["rows"])) == len({row["schedule"] for row in found["rows"] if "schedule" in row})


def test_the_table_is_the_networks_own():
    "The exhaustive schedule of the bench against errors computed directly"
    from vugen.understand.diffusion_classifier import denoising_errors
    from vugen.understand.scorers import Parts
    parts, setting = Parts(), SETTINGS["close"].__class__(2, 4, (.2, .8), (.2, .8))
    items, denoiser = bench_items("close", 2, parts.world), bench_classifier.load_denoiser(parts, "generator", "fp32")
    import tempfile
    with tempfile.TemporaryDirectory() as folder: tables, times, losses, spent = bench_classifier.stored_tables(ErrorStore(folder), denoiser, items, setting)
    plan = item_plan(setting, "generator", 1)
    direct = denoising_errors(parts.generator.velocity, parts.generator.encode_images(items[1].pixels()[None]), list(items[1].captions), plan.times.float(), plan.noises(denoiser.shape), parts.generator.prompt_cache)
    assert torch.allclose(tables[1].float(), direct[0], rtol=1e-3) and spent.calls == 16 and torch.equal(times[1], plan.times)
    clean, noises, t = parts.generator.encode_images(items[1].pixels()[None]), plan.noises(denoiser.shape), plan.times.float()
    with torch.no_grad(): velocity = parts.generator.velocity(t.view(-1, 1, 1) * clean + (1 - t.view(-1, 1, 1)) * noises, t, parts.generator.prompt_cache([items[1].captions[0]] * 4))
    for place, loss in enumerate((torch.nn.functional.mse_loss, torch.nn.functional.l1_loss, torch.nn.functional.huber_loss)):  # all three are in the store, whatever was asked for
        assert torch.allclose(losses[1][0, :, place], loss(velocity, clean - noises, reduction="none").sum((1, 2)), rtol=1e-3), loss


@pytest.mark.parametrize("words, said", [(dict(difficulty="far"), "no difficulty"), (dict(items=1), "--items"), (dict(models="vae"), "no model 'vae'"), (dict(models=" "), "no model"),
                                         (dict(precision="fp8"), "--precision"), (dict(samples=0), "--samples"), (dict(models="generator-repa"), "holds no generator-repa")])
def test_mistakes_are_one_sentence(words, said):
    with pytest.raises(UserError, match=said): classifier_bench(Bench("classifier", **words))


def test_a_store_that_is_a_file(tmp_path):
    (tmp_path / "store").write_text("")
    with pytest.raises(UserError, match="is a file"): classifier_bench(Bench("classifier", errors=tmp_path / "store"))


# what is told in the notebooks

def committed():
    return [row for path in sorted((data_dir() / "bench/classifier").glob("*.json")) for row in json.loads(path.read_text())["rows"]]


def test_committed_rows_can_be_read_and_name_no_folder():
    rows = committed()
    assert {(row["difficulty"], row["model"]) for row in rows if "schedule" in row} >= {(name, model) for name in ("close", "crowd-100") for model in ("generator", "generator-decoupled")}
    assert all({"case", "metric", "value", "unit", "ratio_to"} <= set(row) for row in rows) and "/" not in "".join(row["case"] for row in rows)


@pytest.mark.parametrize("model", ["generator", "generator-decoupled"])
def test_the_close_items_are_in_their_band(model):
    found = next(row for row in committed() if row["family"] == "one sample" and row["difficulty"] == "close" and row["model"] == model)
    full = next(row for row in committed() if row.get("schedule") == "exhaustive" and row["metric"] == "accuracy" and row["difficulty"] == "close" and row["model"] == model)
    assert .6 <= found["low"] < found["high"] <= .75 and found["n"] >= 300 and .8 <= full["value"] <= .95


def test_races_stop_no_more_often_than_their_level_allows_on_real_differences():
    found = [row for row in committed() if row["family"] == "null"]
    assert len(found) == 16 and {row["block"] for row in found} == {1, 8} and all(row["low"] <= 2 * row["setting"] for row in found)


def test_committed_rows_tell_every_level_of_both_races():
    for name, model in {(row["difficulty"], row["model"]) for row in committed() if "schedule" in row}:
        for family in ("racing", "racing, blocks of 8"):
            found = {row["setting"] for row in committed() if row["metric"] == "other winner than exhaustive" and (row["difficulty"], row["model"], row["family"]) == (name, model, family)}
            assert found == set(bench_classifier.LEVELS), (name, model, family)
