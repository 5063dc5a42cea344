"Runs of the controlled experiment: the controls control, a killed run goes on, processes share a folder, plans are not mixed."
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from vugen.data.scenes import World, batch, holds, parse
from vugen.errors import UserError
from vugen.experiment.items import KINDS, make_items, outcomes
from vugen.experiment.plans import load_plan_vae, PRESETS, make_plan, moments, plan_digest, spent_at, write_plan
from vugen.experiment.runner import OUTCOMES, UNTRAINED, ArmStage, Run, collect, pilot_record, read_scores, restore, run_plan, score_untrained, untrained_arms
from vugen.lab.cli import main
from vugen.lab.experiment import Experiment

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


def test_a_sham_head_changes_no_score(undisturbed, plan):
    plain, sham = (told(scores_of(undisturbed, name), plan["steps"]) for name in ("contrastive", "contrastive+sham"))
    assert plain == sham


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
    last = start(plan_file, out)
    said = last.communicate()[1].decode()
    assert last.returncode == 0, said
    here = Run(out)
    for name in ARMS: assert scores_of(here, name) == scores_of(undisturbed, name)


@pytest.fixture(scope="module")
def light(plan): return {**plan, "arms": {name: plan["arms"][name] for name in ("contrastive", "llava-frozen")}, "comparisons": [], "items": {**plan["items"], "suites": ["seen"], "per_kind": 2}, "readouts": {"pictures": 24}}


@pytest.fixture(scope="module")
def calm(light, tmp_path_factory):
    here = Run(tmp_path_factory.mktemp("calm"), light)
    run_plan(here, show=False)
    return here


def remains(here): return [path for path in here.folder.rglob("*") if path.name.startswith(("weights", ".state-")) or path.name == "moments"]


class Killed(BaseException): "Nobody catches it."


@pytest.mark.parametrize("where", ["finish_job", "_parameters", "_tidy", "shutil.rmtree"])
def test_ended_anywhere_while_finishing_it_goes_on_and_leaves_nothing(where, calm, light, tmp_path, monkeypatch):
    "With moments and no scores; with scores and no record; with a record and all weights; with some of the weights gone."
    from vugen.experiment import runner
    here = Run(tmp_path / "run", light)
    job, rmtree = here.job("contrastive", 0), shutil.rmtree
    def dying(path, *rest, **more):
        if where == "shutil.rmtree":
            rmtree(path, *rest, **more)
            if not here.done("contrastive", 0): return
        raise Killed
    tidy = runner._tidy
    monkeypatch.setattr(f"vugen.experiment.runner.{where}", dying if where != "_tidy" else lambda here, seed: dying(None) if here.done("contrastive", seed) else tidy(here, seed))
    with pytest.raises(Killed): run_plan(here, show=False)
    monkeypatch.undo()
    assert list(job.glob("*weights*")) and here.done("contrastive", 0) == (where in ("_tidy", "shutil.rmtree"))
    assert not run_plan(here, show=False)["left"] and not remains(here)
    for arm in light["arms"]: assert scores_of(here, arm) == scores_of(calm, arm)  # the later arm begins with what was left of the earlier


KILLED = """
import os, signal, sys
from vugen.experiment import runner
tidy = runner._tidy
runner._tidy = lambda here, seed: os.kill(os.getpid(), signal.SIGKILL) if here.done("contrastive", seed) else tidy(here, seed)
runner.run_plan(runner.Run(sys.argv[2], runner.read_plan(sys.argv[1])), show=False)
"""


def test_what_a_job_killed_last_of_all_leaves_is_cleared_too(calm, light, tmp_path):
    "Its record is there, so that nothing is left to do but to clear up."
    alone = {**light, "arms": {"contrastive": light["arms"]["contrastive"]}}
    plan_file, out = write_plan(alone, tmp_path / "plan.json"), tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(plan_file), str(out)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    here = Run(out)
    assert killed.returncode == -signal.SIGKILL and here.done("contrastive", 0) and remains(here), killed.stderr
    run_plan(here, show=False)
    assert not remains(here) and scores_of(here, "contrastive") == scores_of(calm, "contrastive")


def test_what_a_kill_inside_a_write_leaves_is_passed_over(calm, light, tmp_path):
    here = Run(tmp_path / "run", light)
    torn = here.job("contrastive", 0) / "moments/.step-00000003.parquet.12345678.tmp.parquet"
    torn.parent.mkdir(parents=True); torn.write_bytes(b"PAR1")
    assert not run_plan(here, arms=["contrastive"], show=False)["left"] and scores_of(here, "contrastive") == scores_of(calm, "contrastive")


def test_a_wish_to_end_in_the_last_step_of_a_training_is_followed(calm, light, tmp_path, monkeypatch):
    "The training is whole then, the plan is not."
    from vugen.train import loop
    train_step, here = loop.train_step, Run(tmp_path / "run", light)
    def last_of_all(training, batches):
        fine = train_step(training, batches)
        if training.step == training.recipe.steps: os.kill(os.getpid(), signal.SIGTERM)
        return fine
    monkeypatch.setattr(loop, "train_step", last_of_all)
    found = run_plan(here, show=False)
    assert found["signal"] == signal.SIGTERM and not found["done"] and (here.job("contrastive", 0) / "weights/run.json").is_file()
    monkeypatch.undo()
    assert not run_plan(here, show=False)["left"]
    for arm in light["arms"]: assert scores_of(here, arm) == scores_of(calm, arm)


def test_a_program_that_waits_for_its_helper_takes_it_along(light, tmp_path, monkeypatch, capsys):
    "Its own jobs are done, the helper's is not."
    helper, pid = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)", tmp_path / "pid"
    monkeypatch.setattr("vugen.lab.experiment.helper_command", lambda *_: [sys.executable, "-c", helper, str(pid)])
    def nothing_left(*_):
        while not pid.is_file() or not pid.read_text(): time.sleep(0.01)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return {"done": [], "left": [], "signal": 0}
    monkeypatch.setattr("vugen.experiment.runner.run_plan", nothing_left)
    threads = torch.get_num_threads()
    try: left = Experiment(("run", str(write_plan(light, tmp_path / "plan.json"))), out=tmp_path / "run", processes=2, device="cpu")("vugen experiment")
    finally: torch.set_num_threads(threads)
    assert left == 128 + signal.SIGTERM and "the same command goes on" in capsys.readouterr().out
    with pytest.raises(ProcessLookupError): os.kill(int(pid.read_text()), 0)


def test_two_processes_share_a_run(undisturbed, plan, tmp_path):
    plan_file, out = write_plan(plan, tmp_path / "plan.json"), tmp_path / "run"
    found = [process.wait() for process in [start(plan_file, out), start(plan_file, out)]]
    assert found == [0, 0] and start(plan_file, out).wait() == 0  # one may leave while the other still holds the last job
    for name in ARMS: assert scores_of(Run(out), name) == scores_of(undisturbed, name)
    assert not list(out.glob("*/*/weights*"))


def test_results_of_two_plans_are_never_mixed(undisturbed, plan, tmp_path, capsys):
    other = write_plan({**plan, "seeds": [0, 1], "primary": {**plan["primary"], "seeds": 2}}, tmp_path / "other.json")
    with pytest.raises(SystemExit) as left: main(["experiment", "run", str(other), "--out", str(undisturbed.folder)])
    assert left.value.code == 2 and "never mixed" in capsys.readouterr().err
    record = undisturbed.job("contrastive", 0) / "record.json"
    kept = record.read_text()
    try:
        record.write_text(json.dumps({**json.loads(kept), "plan": "000000000000"}))
        with pytest.raises(UserError, match="another plan"): collect(undisturbed, tmp_path / "data")
    finally: record.write_text(kept)


def test_a_job_that_another_plan_began_is_not_gone_on_with(light, tmp_path):
    "Also where plan.json was edited in the run's own folder."
    from vugen.experiment import runner
    here = Run(tmp_path / "run", light)
    runner.train_arm(here, "contrastive", 0, show=False)
    edited = {**light, "items": {**light["items"], "seed": 5}}
    write_plan(edited, here.folder / "plan.json")
    with pytest.raises(UserError, match="never mixed"): run_plan(Run(here.folder), show=False)
    write_plan(light, here.folder / "plan.json")
    assert not run_plan(Run(here.folder), arms=["contrastive"], show=False)["left"]
    write_plan(edited, here.folder / "plan.json")
    with pytest.raises(UserError, match="never mixed"): run_plan(Run(here.folder), show=False)


def test_the_untrained_encoder_is_scored_beside_the_arms(calm, light, collected, tmp_path):
    rows = scores_of(calm, UNTRAINED)
    assert {row["readout"] for row in rows} == {"linear", "attention"} and {(row["arm"], row["seed"], row["step"], row["moment"]) for row in rows} == {(UNTRAINED, 0, 0, "steps")}
    assert {(row["suite"], row["kind"], row["item"]) for row in rows} == {(row["suite"], row["kind"], row["item"]) for row in scores_of(calm, "contrastive") if row["readout"] == "linear"}
    assert read_scores(collected / "untrained.parquet") == rows == score_untrained(light, 0) and UNTRAINED not in {row["arm"] for row in read_scores(collected / "scores.parquet")}
    here = Run(tmp_path / "run", light)
    restore(here, collected)
    assert scores_of(here, UNTRAINED) == rows and here.record(UNTRAINED, 0)["plan"] == plan_digest(light)


def test_an_encoder_that_sees_pictures_in_its_own_way_has_a_start_of_its_own():
    plan = make_plan("smoke", seeds=[0])
    plan, vae = {**plan, "items": {**plan["items"], "suites": ["seen"], "per_kind": 2}, "readouts": {"pictures": 24}}, load_plan_vae(plan)
    arms = untrained_arms(plan, 0, vae)
    assert set(arms) == {UNTRAINED, f"{UNTRAINED} show-o2", f"{UNTRAINED} diffusion"}, "all others begin with the tokens of the contrastive arm"
    rows = score_untrained(plan, 0, vae=vae)
    assert {row["arm"] for row in rows} == set(arms) and [row for row in rows if row["arm"] == UNTRAINED] == score_untrained({**plan, "arms": {"contrastive": plan["arms"]["contrastive"]}}, 0)


def test_a_pilot_tells_its_recipe_and_uses_no_seed_of_the_plan(tmp_path, calm, capsys, light):
    found = pilot_record(calm, "longer")
    assert (found["recipe"], found["steps"], found["seeds"], found["decision"]) == (light["recipe"], light["steps"], [0], "longer")
    words = ["experiment", "plan", "--preset", "smoke", "--arms", "contrastive", "--pilot", str(calm.folder), "--out", str(tmp_path / "plan.json")]
    with pytest.raises(SystemExit) as left: main([*words, "--seeds", "0", "1"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "seed 0" in said and not (tmp_path / "plan.json").exists()
    with pytest.raises(SystemExit) as left: main([*words, "--seeds", "1"])
    assert left.value.code == 0 and json.loads((tmp_path / "plan.json").read_text())["pilot"][0]["recipe"] == light["recipe"]


def test_what_is_collected_is_reported(undisturbed, tmp_path, capsys):
    collect(undisturbed, tmp_path / "data")
    with pytest.raises(SystemExit) as left: main(["experiment", "report", str(tmp_path / "data"), "--out", str(tmp_path / "report"), "--json", str(tmp_path / "rows.json")])
    assert left.value.code == 0
    assert (tmp_path / "report/report.html").stat().st_size > 10_000 and json.loads((tmp_path / "rows.json").read_text())["rows"]


@pytest.fixture(scope="module")
def collected(calm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("collected")
    collect(calm, folder)
    return folder


def test_collected_results_are_taken_over(calm, light, collected, tmp_path):
    here = Run(tmp_path / "run", light)
    assert set(restore(here, collected)) == {(name, 0) for name in light["arms"]} and restore(here, collected) == []
    for name in light["arms"]:
        assert here.done(name, 0) and scores_of(here, name) == scores_of(calm, name)
        assert json.loads((here.job(name, 0) / "record.json").read_text()) == json.loads((calm.job(name, 0) / "record.json").read_text())
    collect(here, tmp_path / "again")
    assert read_scores(tmp_path / "again/scores.parquet") == read_scores(collected / "scores.parquet")


def test_what_is_collected_of_some_arms_leaves_the_others_to_do(calm, light, tmp_path):
    "A later arm begins with one whose weights are long gone: its first half is trained again, to the same scores."
    some = Run(tmp_path / "some", light)
    run_plan(some, arms=["contrastive"], show=False)
    collect(some, tmp_path / "data")
    here = Run(tmp_path / "run", light)
    assert set(restore(here, tmp_path / "data")) == {("contrastive", 0)}
    before = (here.job("contrastive", 0) / "record.json").read_bytes()
    found = run_plan(here, show=False)
    assert not found["left"]
    assert (here.job("contrastive", 0) / "record.json").read_bytes() == before
    assert scores_of(here, "llava-frozen") == scores_of(calm, "llava-frozen")
    assert not list(here.folder.glob("*/*/*weights*"))


def test_some_seeds_of_a_plan_are_taken_over(light, tmp_path):
    both = {**light, "arms": {"contrastive": light["arms"]["contrastive"]}, "comparisons": [], "seeds": [0, 1]}
    some = Run(tmp_path / "some", both)
    run_plan(some, seeds=[1], show=False)
    collect(some, tmp_path / "data")
    here = Run(tmp_path / "run", both)
    assert restore(here, tmp_path / "data") == [("contrastive", 1)]
    assert [job for job in here.jobs() if not here.done(*job)] == [("contrastive", 0)]
    assert {row["seed"] for row in scores_of(here, "contrastive", 1)} == {1}


def test_results_of_another_plan_and_torn_ones_are_not_taken_over(light, collected, tmp_path):
    other = Run(tmp_path / "other", {**light, "seeds": [0, 1]})
    with pytest.raises(UserError, match="never mixed"): restore(other, collected)
    assert not any(other.done(*job) for job in other.jobs())
    here = Run(tmp_path / "run", light)
    with pytest.raises(UserError, match="records.json"): restore(here, tmp_path)
    for name, text in (("records.json", "{"), ("records.json", '[{"arm": "contrastive"}]'), ("scores.parquet", "torn"), ("scores.parquet", None), ("plan.json", None)):
        folder = shutil.copytree(collected, tmp_path / "torn", dirs_exist_ok=True)
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
        with pytest.raises(UserError) as error: restore(here, folder)
        assert str(folder) in str(error.value) and not any(here.done(*job) for job in here.jobs()), (name, text)


def test_the_command_goes_on_from_collected_results(calm, light, collected, tmp_path, capsys):
    plan_file, out = write_plan(light, tmp_path / "plan.json"), tmp_path / "run"
    with pytest.raises(SystemExit) as left: main(["experiment", "run", str(plan_file), "--out", str(out), "--collected", str(collected), "--device", "cpu"])
    assert left.value.code in (0, None) and "2 of 2 jobs are done" in capsys.readouterr().out
    assert scores_of(Run(out), "contrastive") == scores_of(calm, "contrastive")
    other = write_plan({**light, "seeds": [0, 1]}, tmp_path / "other.json")
    with pytest.raises(SystemExit) as left: main(["experiment", "run", str(other), "--out", str(tmp_path / "second"), "--collected", str(collected), "--device", "cpu"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "never mixed" in said and "Traceback" not in said


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
