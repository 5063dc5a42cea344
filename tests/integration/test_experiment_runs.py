"Runs of the controlled experiment: the controls control, a killed run goes on, processes share a folder, plans are not mixed."
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from vugen.data.scenes import World, batch, holds, parse
from vugen.errors import UserError
from vugen.experiment.items import KINDS, make_items, outcomes
from vugen.experiment.plans import PRESETS, make_plan, moments, plan_digest, spent_at, write_plan
from vugen.experiment.runner import OUTCOMES, ArmStage, Run, collect, read_scores, run_plan
from vugen.lab.cli import main

ARMS = ("contrastive", "contrastive+pixels", "contrastive+sham", "llava-frozen")


@pytest.fixture(scope="module")
def plan(): return make_plan("smoke", arms={name: {} for name in ARMS}, seeds=[0])


@pytest.fixture(scope="module")
def undisturbed(plan, tmp_path_factory):
    here = Run(tmp_path_factory.mktemp("undisturbed"), plan)
    assert not run_plan(here, show=False)["left"]
    return here


def scores_of(here, name, seed=0): return read_scores(here.job(name, seed) / "scores.parquet")


def told(rows, step): return [tuple(row[key] for key in ("item", "readout", "suite", *OUTCOMES)) for row in rows if row["step"] == step and row["moment"] == "steps"]


def test_a_sham_head_changes_no_score_and_a_real_one_may(undisturbed, plan):
    plain, sham, real = (told(scores_of(undisturbed, name), plan["steps"]) for name in ("contrastive", "contrastive+sham", "contrastive+pixels"))
    assert plain == sham
    assert [row for row in real if row[1] != "denoising"] != plain


def test_two_runs_of_a_seed_are_identical_and_two_seeds_are_not(undisturbed, plan, tmp_path):
    again = Run(tmp_path / "again", plan)
    run_plan(again, arms=["contrastive"], show=False)
    assert scores_of(again, "contrastive") == scores_of(undisturbed, "contrastive")
    other = Run(tmp_path / "other", {**plan, "seeds": [1]})
    run_plan(other, arms=["contrastive"], show=False)
    assert [row["text"] for row in scores_of(other, "contrastive", 1)] != [row["text"] for row in scores_of(undisturbed, "contrastive")]


def start(plan_file, out): return subprocess.Popen([sys.executable, "-m", "vugen.experiment.runner", str(plan_file), str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_killed_twice_it_goes_on_to_the_same_scores(undisturbed, plan, tmp_path):
    plan_file, out = write_plan(plan, tmp_path / "plan.json"), tmp_path / "run"
    for mark in ("contrastive/0/weights/run.json", "contrastive+pixels/0/moments/*.parquet"):
        process = start(plan_file, out)
        while process.poll() is None and not list(out.glob(mark)): time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(plan_file, out).wait() == 0
    here = Run(out)
    for name in ARMS: assert scores_of(here, name) == scores_of(undisturbed, name)


def test_two_processes_share_a_run(undisturbed, plan, tmp_path):
    plan_file, out = write_plan(plan, tmp_path / "plan.json"), tmp_path / "run"
    found = [process.wait() for process in [start(plan_file, out), start(plan_file, out)]]
    assert found == [0, 0] and start(plan_file, out).wait() == 0  # one may leave while the other still holds the last job
    for name in ARMS: assert scores_of(Run(out), name) == scores_of(undisturbed, name)
    assert not list(out.glob("*/*/weights*"))


def test_results_of_two_plans_are_never_mixed(undisturbed, plan, tmp_path, capsys):
    other = write_plan({**plan, "seeds": [0, 1]}, tmp_path / "other.json")
    with pytest.raises(SystemExit) as left: main(["experiment", "run", str(other), "--out", str(undisturbed.folder)])
    assert left.value.code == 2 and "never mixed" in capsys.readouterr().err
    record = undisturbed.job("contrastive", 0) / "record.json"
    kept = record.read_text()
    try:
        record.write_text(json.dumps({**json.loads(kept), "plan": "000000000000"}))
        with pytest.raises(UserError, match="another plan"): collect(undisturbed, tmp_path / "data")
    finally: record.write_text(kept)


def test_what_is_collected_is_reported(undisturbed, tmp_path, capsys):
    collect(undisturbed, tmp_path / "data")
    with pytest.raises(SystemExit) as left: main(["experiment", "report", str(tmp_path / "data"), "--out", str(tmp_path / "report"), "--json", str(tmp_path / "rows.json")])
    assert left.value.code == 0
    assert (tmp_path / "report/report.html").stat().st_size > 10_000 and json.loads((tmp_path / "rows.json").read_text())["rows"]


def test_the_data_of_an_arm_follow_those_of_the_earlier_one(plan):
    own, earlier = ArmStage(plan, "llava-frozen", 0), ArmStage(plan, "contrastive", 0)
    size = plan["recipe"]["batch_size"]
    assert torch.equal(own.batch([0, 1])["images"], earlier.batch([3 * size, 3 * size + 1])["images"])


def test_all_arms_spend_the_budget(plan):
    for name, arm in plan["arms"].items():
        last = max(moments(plan, name))
        assert abs(spent_at(plan, name, last)[2] - plan["gflops"]) <= max(arm["gflops_per_step"])


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_captions_of_items_are_true_of_their_own_pictures_alone(preset):
    from vugen.experiment.items import make_item, suite_world
    world = World(**PRESETS[preset]["world"])
    for suite in ("seen", "composition", "style"):
        for family, kind in KINDS:
            for index in range(6):
                item = make_item(suite_world(world, suite), family, kind, 5, index)
                for place, scene in enumerate(item.scenes):
                    assert [holds(scene, parse(caption)) for caption in item.captions] == [place < 2, place >= 2]


def test_training_never_shows_what_is_held_out():
    world = World(**PRESETS["tiny"]["world"])
    scenes, banned = batch(world, 0, range(2000))["scenes"], [parse(entry) for entry in world.held_out]
    assert not any(holds(scene, told) for scene in scenes for told in banned) and world.held_out_style not in {scene.style for scene in scenes}
    held_out = make_items(world, "composition", 4, 9)
    assert all(any(entry in caption.replace("small ", "").replace("large ", "") for entry in world.held_out for caption in pair) for pair in held_out["captions"])


def test_captions_dealt_to_other_items_are_at_chance():
    "A scorer that knows everything, asked with the captions of other items."
    from vugen.experiment.items import make_item, planted_scores
    world = World(**PRESETS["tiny"]["world"])
    items = [make_item(world, "binding", kind, 1, index) for kind in ("swap color", "swap object", "reverse relation") for index in range(40)]
    assert outcomes(planted_scores(items))["text"].all()
    from dataclasses import replace
    dealt = [replace(item, captions=items[(place * 7 + 11) % len(items)].captions) for place, item in enumerate(items)]
    assert outcomes(planted_scores(dealt))["text"].float().mean() < 0.1


def test_a_digest_forgets_the_pilot_alone(plan):
    assert plan_digest({**plan, "pilot": [1]}) == plan_digest(plan) != plan_digest({**plan, "gflops": 1.0})
