"""Ablations: killed anywhere they end with the same rows, nothing is computed twice, another plan is refused, and the table says what numpy and scipy say."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy import stats

from vugen.errors import UserError
from vugen.evaluate.intervals import mean_interval, student_quantile, student_share
from vugen.paths import checkpoints_dir
from vugen.train import ablations
from vugen.train.ablations import (ABLATIONS, MEASURES, Ablation, Left, Measure, Step, Variant, collect, find_ablation, make_plan, markdown_table, plot, run_ablation, seeds_held, slug, stored_rows,
                                   summarise, table_rows)
from vugen.train.presets import load_preset

ROOT, SMOKE = checkpoints_dir(), load_preset("smoke")
TWO = Ablation("Does a coarser reduction lose anything?", "this test", steps={"decoder": 600}, shows=(("scenes", "psnr"),), axis="r",
               variants=tuple(Variant(f"r = {ratio}", (Measure("reconstruction", "decoder", {"number": 200, "steps": 1}),), (Step("decoder", {"model.ratio": ratio}),), x=ratio) for ratio in (8, 32)))


@pytest.fixture(autouse=True)
def two_variants(monkeypatch):
    "A small ablation under a name of its own, and a count of what is trained and measured."
    monkeypatch.setitem(ABLATIONS, "two", TWO)
    monkeypatch.setattr(ablations, "judge", lambda: Brightness())


class Brightness:
    "A cheap extractor: mean of each channel in the four quarters."
    name = "brightness"
    def __call__(self, images): return images.unfold(2, 16, 16).unfold(3, 16, 16).mean((-1, -2)).flatten(1)


def run_two(out, seeds=(0, 1), **options): return run_ablation("two", "smoke", ROOT, out, seeds, show=False, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The ablation run from end to end."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ABLATIONS, "two", TWO); patch.setattr(ablations, "judge", lambda: Brightness())
        return run_two(tmp_path_factory.mktemp("whole") / "two")


def first_seed(found): return [row for row in found["rows"] if row["seed"] == 0]


# ---- the runner -------------------------------------------------------------------------------------------------------------

def test_rows_name_variant_and_seed_and_follow_the_plan(whole):
    assert [(row["variant"], row["seed"]) for row in whole["rows"] if row["metric"] == "psnr"] == [("r = 8", 0), ("r = 8", 1), ("r = 32", 0), ("r = 32", 1)]
    assert all(set(row) - {"dimension", "n_reference"} == set(ablations.COLUMNS) and np.isfinite(row["value"]) and row["n"] >= 6 for row in whole["rows"])
    work = whole["run"]["work"]
    assert len(work) == 4 and all(each["trained"]["decoder"]["steps"] == 3 for each in work)
    assert not list(whole["out"].glob("trained/*/.state-*")) and json.loads((whole["out"] / "rows.json").read_text())["rows"] == whole["rows"]


def test_a_second_run_computes_nothing(whole, monkeypatch, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole["out"], out, symlinks=True)
    def never(*words, **more): raise AssertionError("computed again")
    monkeypatch.setattr(ablations, "run", never)
    monkeypatch.setitem(MEASURES, "reconstruction", never)
    assert run_two(out)["rows"] == whole["rows"]
    with pytest.raises(AssertionError, match="computed again"): run_two(out, seeds=(0, 1, 2))


def test_stopped_inside_a_training_and_inside_a_measurement_it_ends_with_the_same_rows(whole, monkeypatch, tmp_path):
    out, loop_run, measure, count = tmp_path / "two", ablations.run, MEASURES["reconstruction"], {"run": 0, "measure": 0}
    def stopping(*words, **more):
        count["run"] += 1
        return loop_run(*words, **more, **({"stop_after": 2} if count["run"] % 2 else {}))  # every training is left once, after two of its three steps
    def failing(*words, **more):
        count["measure"] += 1
        if count["measure"] % 2: raise KeyboardInterrupt
        return measure(*words, **more)
    monkeypatch.setattr(ablations, "run", stopping)
    monkeypatch.setitem(MEASURES, "reconstruction", failing)
    outcomes = []
    while "finished" not in outcomes:
        try: outcomes.append((result := run_two(out, seeds=(0,)))["status"])
        except KeyboardInterrupt: outcomes.append("killed")
        assert len(outcomes) < 20
    assert outcomes.count("stopped") == 2 and outcomes.count("killed") == 2
    assert result["rows"] == first_seed(whole)


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import test_train_ablations as here
here.ABLATIONS["two"] = here.TWO
here.ablations.judge = lambda: here.Brightness()
here.run_two(here.ablations.Path(sys.argv[2]), seeds=(0,))
"""


def test_killed_by_the_system_it_goes_on_to_the_same_rows(whole, tmp_path):
    out = tmp_path / "two"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, os.path.dirname(__file__), str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(out.glob("points/*/*.json")): time.sleep(0.02)
    process.send_signal(signal.SIGKILL); process.wait()
    assert 1 <= len(list(out.glob("points/*/*.json"))) <= 2
    (out / "points/r-8/.reconstruction-seed-0.json.0.tmp.json").write_text('{"rows": [')  # what a kill inside a write leaves
    assert run_two(out, seeds=(0,))["rows"] == first_seed(whole)


def test_parts_that_do_not_differ_are_trained_once(monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(ablations, "run", lambda stage, *words, **more: trained.append(stage.name) or {"status": "stopped", "signal": 0})
    points, _ = make_plan(ABLATIONS["decoder"], SMOKE, ROOT, (0,))
    keys = {point.variant.name: point.parts["decoder"].key for point in points}
    assert len(set(keys.values())) == 1 and {"PDD, 8 steps", "PDD, 1 step", "LDM, 8 steps"} <= set(keys)
    with pytest.raises(Left): ablations.train_part(points[0].parts["decoder"], tmp_path, ROOT, "", show=False)
    assert trained == ["decoder"]
    monkeypatch.setattr(ablations, "run", lambda *words, **more: {"status": "finished", "signal": signal.SIGTERM})  # which came in the last step
    with pytest.raises(Left) as left: ablations.train_part(points[0].parts["decoder"], tmp_path, ROOT, "", show=False)
    assert left.value.result == {"status": "interrupted", "signal": signal.SIGTERM}
    seeds = {point.seed: point.parts["decoder"].key for point in make_plan(TWO, SMOKE, ROOT, (0, 1))[0]}
    assert seeds[0] != seeds[1]


def test_a_stage_sees_exactly_the_folders_that_it_names(whole):
    (home,) = {path for path in whole["out"].glob("trained/*") if json.loads((path / "decoder/run.json").read_text())["model"]["ratio"] == 8 and json.loads((path / "decoder/run.json").read_text())["recipe"]["seed"] == 0}
    assert sorted(path.name for path in home.iterdir()) == ["contrastive", "decoder", "parser"] and (home / "parser").resolve() == (ROOT / "parser").resolve()


def test_seeds_scale_and_measurements_are_checked(tmp_path):
    for options, words in (({"seeds": ()}, "at least one seed"), ({"steps_scale": 0}, "--steps-scale"), ({"only": "soup"}, "'soup'")):
        with pytest.raises(UserError, match=words): run_two(tmp_path / "two", **options)
    with pytest.raises(UserError, match="no ablation 'soup'"): find_ablation("soup")
    with pytest.raises(UserError, match="sized for"): make_plan(TWO, dataclasses.replace(SMOKE, name="paper-imagenet"), ROOT, (0,))
    assert not (tmp_path / "two").exists()


def test_another_plan_or_root_is_refused(whole, monkeypatch, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole["out"], out, symlinks=True)
    with pytest.raises(UserError, match="steps_scale"): run_two(out, steps_scale=2.0)
    with pytest.raises(UserError, match="ablation 'two'"): run_ablation("reducer", "smoke", ROOT, out, show=False, only="reconstruction")
    longer = dataclasses.replace(TWO, steps={"decoder": 2000})
    monkeypatch.setitem(ABLATIONS, "two", longer)
    with pytest.raises(UserError, match="another plan for r = 8/reconstruction"): run_two(out)
    monkeypatch.setitem(ABLATIONS, "two", TWO)
    root = tmp_path / "root"
    for name in ("contrastive", "parser"): shutil.copytree(ROOT / name, root / name)
    assert run_ablation("two", "smoke", root, out, (0, 1), show=False)["rows"] == whole["rows"]  # the same weights elsewhere are the same root
    config = json.loads((root / "parser/config.json").read_text())
    (root / "parser/config.json").write_text(json.dumps({**config, "another": 1}))
    with pytest.raises(UserError, match="another parser"): run_ablation("two", "smoke", root, out, (0, 1), show=False)
    foreign = tmp_path / "foreign"
    foreign.mkdir(); (foreign / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not an ablation"): run_two(foreign)


def test_new_variants_join_a_folder_that_was_begun_without_them(whole, monkeypatch, tmp_path):
    out, measured = tmp_path / "copy", []
    shutil.copytree(whole["out"], out, symlinks=True)
    new = dataclasses.replace(TWO.variants[0], name="r = 8, one step more", measures=(Measure("reconstruction", "decoder", {"number": 200, "steps": 2}),))
    monkeypatch.setitem(ABLATIONS, "two", dataclasses.replace(TWO, variants=(*TWO.variants, new)))
    monkeypatch.setattr(ablations, "run", lambda *words, **more: pytest.fail("its decoder is there already"))
    monkeypatch.setitem(MEASURES, "reconstruction", lambda view, *words, **more: measured.append(view) or [{"suite": "reconstruction", "category": "scenes", "metric": "psnr", "value": 1.0, "n": 6}])
    assert len([row for row in run_two(out)["rows"] if row["metric"] == "psnr"]) == 6 and len(measured) == 2


def test_a_seed_is_worked_on_by_one_process(tmp_path):
    with seeds_held(tmp_path, (0, 1)):
        with pytest.raises(UserError, match="seed 1"), seeds_held(tmp_path, (1, 2)): pass
        with seeds_held(tmp_path, (3,)): pass
    with seeds_held(tmp_path, (0, 1)): pass


def test_a_stage_or_option_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(ablations.TRAINABLE, "decoder-vq", ("decoder:VectorQuantised", ("contrastive", "parser")))
    lacking = dataclasses.replace(TWO, variants=(*TWO.variants, Variant("VQ", (Measure("reconstruction", "decoder-vq"),), (Step("decoder-vq"),))))
    with pytest.raises(UserError, match="no stage 'decoder-vq'"): make_plan(lacking, SMOKE, ROOT, (0,))
    points, notes = make_plan(dataclasses.replace(lacking, variants=(*TWO.variants, dataclasses.replace(lacking.variants[-1], optional=True))), SMOKE, ROOT, (0, 1))
    assert len(points) == 4 and "decoder-vq" in notes["VQ"]
    odd = dataclasses.replace(TWO, variants=(Variant("odd", (Measure("generation", "generator", {"temperature": 1}),)),))
    with pytest.raises(UserError, match="temperature"): make_plan(odd, SMOKE, ROOT, (0,))
    with pytest.raises(UserError, match="vugen train contrastive"): make_plan(TWO, SMOKE, tmp_path, (0,))


def test_every_ablation_is_sound_data():
    for name, ablation in ABLATIONS.items():
        names = [slug(variant.name) for variant in ablation.variants]
        assert len(set(names)) == len(names), name
        assert {step.stage for variant in ablation.variants for step in variant.chain} == set(ablation.steps)
        for variant in ablation.variants:
            for measure in variant.measures:
                steps, needs = ablations.closure(variant, measure)
                assert measure.kind in MEASURES and (not variant.chain or steps), (name, variant.name)
        assert json.loads(json.dumps(dataclasses.asdict(ablation)))  # data, not code
    equal = {tuple(sorted(set(ABLATIONS[name].steps.values()))) for name in ("target", "decoder")}
    assert all(len(steps) == 1 for steps in equal)


# ---- over training ----------------------------------------------------------------------------------------------------------

SHARES = (0.2, 1.0)
COURSE = Ablation("How fast is a decoder learned?", "this test", steps={"decoder": 1000}, shows=(("scenes", "psnr"),), axis="steps",
                  variants=tuple(Variant(f"joint, {share:.0%}", (Measure("reconstruction", "decoder", {"number": 200, "steps": 1, "share": share}),), (Step("decoder", snapshots=SHARES),), "joint") for share in SHARES))


def test_a_share_of_a_training_is_measured_on_the_weights_of_that_step(monkeypatch, tmp_path):
    monkeypatch.setitem(ABLATIONS, "course", COURSE)
    seen, measure, trained, loop_run = {}, MEASURES["reconstruction"], [], ablations.run
    monkeypatch.setitem(MEASURES, "reconstruction", lambda view, *words, **more: seen.update({(view / "decoder").resolve().name: more}) or measure(view, *words, **more))
    monkeypatch.setattr(ablations, "run", lambda *words, **more: trained.append(words[0].name) or loop_run(*words, **more))
    found = run_ablation("course", "smoke", ROOT, tmp_path / "course", show=False)
    assert trained == ["decoder"] and list(seen) == ["decoder-step-1", "decoder-step-5"] and "share" not in next(iter(seen.values()))
    rows = [row for row in found["rows"] if row["metric"] == "psnr"]
    assert [(row["variant"], row["x"]) for row in rows] == [("joint, 20%", 1), ("joint, 100%", 5)] and rows[0]["value"] != rows[1]["value"]
    plain = dataclasses.replace(COURSE, variants=(Variant("joint", (Measure("reconstruction", "decoder", {"number": 200, "steps": 1}),), (Step("decoder"),)),))
    monkeypatch.setitem(ABLATIONS, "course", plain)
    (end,) = (row for row in run_ablation("course", "smoke", ROOT, tmp_path / "plain", show=False)["rows"] if row["metric"] == "psnr")
    assert end["value"] == rows[1]["value"]  # the last snapshot is the training's end
    monkeypatch.setitem(ABLATIONS, "course", COURSE)
    assert run_ablation("course", "smoke", ROOT, tmp_path / "course", show=False)["rows"] == found["rows"] and trained == ["decoder"] * 2


def test_a_snapshot_that_is_gone_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(ABLATIONS, "course", COURSE)
    out = tmp_path / "course"
    run_ablation("course", "smoke", ROOT, out, show=False)
    (snapshot,) = out.glob("trained/*/decoder-step-1")
    shutil.rmtree(snapshot)
    next(out.glob("points/joint-20/*.json")).unlink()
    with pytest.raises(UserError, match="decoder-step-1 does not exist"): run_ablation("course", "smoke", ROOT, out, show=False)


def test_digests_of_plans_without_snapshots_are_those_of_older_versions():
    points, _ = make_plan(TWO, SMOKE, ROOT, (0,))
    parts = {place: [part.step.stage, dataclasses.asdict(part.preset.stage(part.step.stage))] for place, part in points[0].parts.items()}
    for _, part in parts.values(): del part["recipe"]["seed"], part["recipe"]["snapshots"]
    assert ablations.describe_point(points[0]) == ablations.digest([SMOKE.world, parts, dataclasses.asdict(points[0].measure)])
    watched = ablations.make_plan(COURSE, SMOKE, ROOT, (0,))[0][0].parts["decoder"]
    assert watched.preset.stage("decoder").recipe.snapshots == (1, 5) and watched.key != dataclasses.replace(watched, preset=ablations.override(watched.preset, "decoder", {"recipe.snapshots": []})).key


# ---- measurements -----------------------------------------------------------------------------------------------------------

class Guess:
    "A generator that leaves a known share of the velocity unexplained, more for later pictures."
    class vlm:
        class tokenizer:
            encode = staticmethod(lambda captions, eos: (torch.arange(len(captions))[:, None], torch.ones(len(captions), 1)))
    def encode_images(self, images): return images.flatten(2).transpose(1, 2)
    def __call__(self, latents, ids, mask, t, noise): return (latents - noise).square().mean((1, 2)) * (0.1 * ids[:, 0] + t)


def test_unexplained_velocity_is_the_share_left_at_evenly_spread_times_whatever_the_batch():
    images = torch.rand(5, 3, 4, 4)
    found = ablations.unexplained_velocity(Guess(), images, ["a red circle"] * 5, seed=3, times=4)
    assert torch.allclose(found, 0.1 * torch.arange(5) + 0.5, atol=1e-5)  # the middle of the times is 1/2
    assert torch.equal(found, ablations.unexplained_velocity(Guess(), images, ["a red circle"] * 5, seed=3, times=4, batch_size=2))


# ---- table and plot ---------------------------------------------------------------------------------------------------------

def row(variant, seed, value, low=None, high=None, **more):
    return {**dict.fromkeys(ablations.COLUMNS), "variant": variant, "group": "", "seed": seed, "suite": "s", "category": "c", "metric": "m", "value": value, "low": low, "high": high, "n": 50, **more}


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30, 101])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_students_distribution_is_scipys(freedom, confidence):
    assert student_quantile(confidence, freedom) == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-9)
    assert student_share(1.3, freedom) == pytest.approx(1 - 2 * stats.t.sf(1.3, freedom), abs=1e-12)


def test_mean_interval_is_scipys_and_needs_two_values():
    values = np.random.default_rng(0).normal(3, 2, 7)
    found, wanted = mean_interval(values), stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    assert (found.value, found.low, found.high, found.n) == pytest.approx((values.mean(), *wanted, 7))
    for wrong in ([1.0], [], [1.0, np.nan]):
        with pytest.raises(UserError): mean_interval(wrong)


def test_the_table_gives_mean_interval_and_paired_difference():
    first, second = [0.50, 0.61, 0.55], [0.58, 0.70, 0.60]
    rows = [row(name, seed, value, chance=chance) for name, values, chance in (("A", first, 0.1), ("B", second, 0.2)) for seed, value in enumerate(values)]
    one, two = summarise(rows)
    assert (two["value"], two["low"], two["high"]) == pytest.approx((np.mean(second), *stats.t.interval(0.95, 2, np.mean(second), stats.sem(second))))
    gaps = np.subtract(second, first)
    assert (two["difference"], two["difference_low"], two["difference_high"]) == pytest.approx((gaps.mean(), *stats.t.interval(0.95, 2, gaps.mean(), stats.sem(gaps))))
    assert one["difference"] is None and one["seeds"] == dict(enumerate(first)) and two["over"] == "3 seeds" and two["chance"] == pytest.approx(0.2)
    assert table_rows(rows)[0]["by seed"] == "0: 0.5, 1: 0.61, 2: 0.55" and markdown_table(rows).count("\n") == 3 and markdown_table([]) == "No rows."


def test_one_seed_keeps_the_interval_of_its_items_and_says_so():
    rows = [row("A", 4, 0.5, 0.4, 0.6), row("B", 4, 0.7, 0.6, 0.8), row("B", 5, 0.8, 0.7, 0.9)]
    one, two = summarise(rows)
    assert (one["low"], one["high"], one["over"]) == (0.4, 0.6, "50 items, one seed")
    assert summarise([row("A", 0, 3.0)])[0]["over"] == "one seed"  # nothing is claimed where nothing is known
    assert two["difference"] == pytest.approx(0.2) and two["difference_low"] is None and two["over"] == "2 seeds"  # one seed is shared: a difference, no interval


def test_groups_have_first_variants_of_their_own():
    rows = [row("A", 0, 1.0, group="x"), row("B", 0, 2.0, group="x"), row("C", 0, 5.0, group="y"), row("D", 0, 4.0, group="y")]
    assert [each["difference"] for each in summarise(rows)] == [None, 1.0, None, -1.0]


def test_plot_and_report_come_from_stored_rows_alone(whole, monkeypatch, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(whole["out"], out, symlinks=True)
    for part in ("trained", "views"): shutil.rmtree(out / part)
    found = stored_rows("two", "smoke", out)
    assert found["rows"] == whole["rows"] and [path.name for path in ablations.write_report(found, "two", out)] == ["table.md", "plot.png"]
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG") and "| scenes: psnr | r = 8 |" in (out / "table.md").read_text()
    axis = plot(found["rows"], TWO).axes[0]
    drawn = next(line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o")
    means = [np.mean([row["value"] for row in found["rows"] if row["variant"] == name and row["metric"] == "psnr"]) for name in ("r = 8", "r = 32")]
    assert list(drawn.get_xdata()) == [8, 32] and drawn.get_ydata() == pytest.approx(means)
    with pytest.raises(UserError, match="holds the ablation 'two'"): stored_rows("reducer", "smoke", out)
    with pytest.raises(UserError, match="None of the measures"): plot([], TWO)
    (next(out.glob("points/*/*.json"))).write_text("{")
    with pytest.raises(UserError, match="cannot be read"): collect(out, "two")


def test_rows_that_came_with_the_package_are_found(whole, monkeypatch, tmp_path):
    monkeypatch.setenv("VUGEN_DATA", str(tmp_path / "data")); monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))
    assert stored_rows("two", "smoke") is None
    place = tmp_path / "data/ablations/smoke/two"
    place.mkdir(parents=True)
    shutil.copy(whole["out"] / "rows.json", place)
    assert stored_rows("two", "smoke")["rows"] == whole["rows"]


def test_the_program_runs_reports_and_refuses(whole, tmp_path, capsys):
    from vugen.lab.cli import main
    out = tmp_path / "copy"
    shutil.copytree(whole["out"], out, symlinks=True)
    def call(*words):
        with pytest.raises(SystemExit) as left: main([str(word) for word in words])
        return left.value.code, capsys.readouterr()
    common = ("--preset", "smoke", "--out", out)
    code, said = call("ablate", "two", *common, "--root", ROOT, "--seeds", 0, 1, "--json", tmp_path / "rows.json")
    assert code == 0 and "nothing to do" in said.out and json.loads((tmp_path / "rows.json").read_text())["rows"] == whole["rows"]
    code, said = call("ablate", "two", *common, "--report")
    assert code == 0 and "scenes: psnr" in said.out and "2 seeds" in said.out and "r = 32" in said.out
    code, said = call("ablate", "two", *common, "--report", "--json", "-")
    assert code == 0 and json.loads(said.out)["rows"] == whole["rows"]
    for words in (("soup",), ("two", "--seeds", -1), ("two", "--steps-scale", 0), ("two", "--preset", "smoke", "--report", "--out", tmp_path / "no"), ("two", "--root", tmp_path / "no")):
        code, said = call("ablate", *words)
        assert code == 2 and said.err.count("\n") == 1 and "Traceback" not in said.err, words
