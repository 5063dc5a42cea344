"Plans of the experiment: what cannot be run is refused in one sentence, and every arm gets the same budget."
import copy
import json
import statistics

import pytest

from vugen.data.scenes import World
from vugen.errors import UserError
from vugen.experiment.arms import PRETRAINING
from vugen.experiment.plans import PRESETS, check_plan, load_plan_vae, make_plan, moments, plan_digest, read_plan, spent_at, step_costs, training_batch, training_flops, write_plan
from vugen.experiment.runner import ArmStage, Run
from vugen.lab.cli import main
from vugen.models.text import WordTokenizer, scene_words


@pytest.fixture(scope="module")
def whole(): return make_plan("smoke")


@pytest.fixture
def plan(whole): return copy.deepcopy(whole)


def sentence_of(error): # one sentence, on one line, that ends
    text = str(error)
    assert text.endswith(".") and "\n" not in text and len(text) > 20, text
    return text


def put(plan, path, value):
    *way, last = path
    for step in way: plan = plan[step]
    plan[last] = value


WRONG = {  # what is put where, and what the sentence names
    "steps as text": (("steps",), "6", "steps"), "steps as a fraction": (("steps",), 6.5, "steps"), "steps that nobody measures": (("steps",), 5, "curve"),
    "steps true": (("steps",), True, "steps"), "no list of seeds": (("seeds",), 3, "seeds"), "a seed as text": (("seeds",), [0, "1"], "seeds"), "a seed twice": (("seeds",), [1, 1], "seeds"), "no seed": (("seeds",), [], "seeds"),
    "an unknown size": (("sizes", "hiden_size"), 16, "hiden_size"), "a size as text": (("sizes", "hidden_size"), "wide", "hidden_size"), "an unknown entry of the recipe": (("recipe", "lr"), 1e-3, "lr"), "a rate as text": (("recipe", "learning_rate"), "fast", "learning_rate"),
    "an unknown entry of the items": (("items", "per_sort"), 3, "per_sort"), "an unknown dial": (("world", "colour"), ["red"], "colour"), "an unknown colour": (("world", "colors"), ["reddish", "blue"], "reddish"),
    "an unknown arm": (("arms", "contrastive+sound"), {}, "contrastive+sound"), "an arm that is no table": (("arms", "contrastive"), 5, "contrastive"), "an arm's steps as text": (("arms", "contrastive", "steps"), "six", "steps"), "an unknown entry of an arm": (("arms", "contrastive", "stepz"), 6, "stepz"),
    "an unknown setting of an arm": (("arms", "contrastive", "settings"), {"temprature": 1}, "temprature"), "an unknown entry of the plan": (("stepz",), 6, "stepz"), "a budget as text": (("gflops",), "much", "gflops"), "a curve with text": (("curve",), [3, "6"], "curve"),
    "no primary arm": (("primary",), {"metric": "text"}, "primary"), "a comparison with an unknown arm": (("comparisons",), [["contrastive", "contrastive+sound"]], "contrastive+sound"), "an unknown suite": (("items", "suites"), ["seen", "unseen"], "unseen"), "a negative step": (("curve",), [-3, 6], "curve"),
    "no items": (("items", "per_kind"), 0, "per_kind"), "a seed too large": (("seeds",), [40_000], "40000"), "a seed below zero": (("seeds",), [-1], "-1"), "no pictures for the probes": (("readouts", "pictures"), 0, "pictures"),
    "a level above one": (("primary", "alpha"), 7.0, "alpha"), "a moment that is none": (("primary", "at"), "time", "time"), "a score that is none": (("primary", "metric"), "txt", "txt"), "a readout that is none": (("primary", "readout"), "x", "readout"),
    "a family that is none": (("primary", "family"), "bindings", "bindings"), "a primary suite that is not scored": (("primary", "suite"), "unseen", "unseen"), "an effect of nothing": (("primary", "smallest_effect"), 0.0, "smallest_effect"),
    "more primary items than are scored": (("primary", "items"), 5, "items: 5"), "more primary seeds than there are": (("primary", "seeds"), 9, "seeds: 9"), "an arm against itself": (("comparisons",), [["contrastive", "contrastive"]], "two arms"),
    "a comparison twice": (("comparisons",), [["contrastive+pixels", "contrastive+sham"]] * 2, "twice"), "a setting below zero": (("arms", "vugen", "settings"), {"reduction_steps": -2}, "reduction_steps: -2"),
    "an arm that begins with itself": (("arms", "contrastive", "earlier"), "contrastive", "contrastive"), "an arm that begins with a later one": (("arms", "captioner", "earlier"), "vugen", "captioner"), "another beginning": (("arms", "vugen", "before"), 1, "vugen"),
    "a pilot of numbers": (("pilot",), [3], "pilot"), "a pilot whose curves are numbers": (("pilot",), [{"curves": [3]}], "pilot"), "a pilot whose seeds are no list": (("pilot",), [{"curves": [], "seeds": 3}], "pilot")}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_plan_is_refused_in_one_sentence(wrong, plan, tmp_path, capsys):
    path, value, named = WRONG[wrong]
    put(plan, path, value)
    file = write_plan(plan, tmp_path / "plan.json")
    with pytest.raises(UserError) as found: read_plan(file)
    assert named in sentence_of(found.value)
    with pytest.raises(SystemExit) as left: main(["experiment", "run", str(file), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert left.value.code == 2 and named in said and "Traceback" not in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()  # nothing was begun


@pytest.mark.parametrize("words,named", [((), "run PLAN"), (("plan", "--preset", "smoke", "--why", "it was clear"), "--pilot")])
def test_a_wrong_command_is_one_sentence(words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left: main(["experiment", *words])
    said = capsys.readouterr().err
    assert left.value.code == 2 and named in said and "Traceback" not in said and not list(tmp_path.iterdir())


def places(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else (): yield from places(inner, (*path, key))


def test_no_change_of_a_plan_ends_in_anything_but_a_sentence(tmp_path):
    "Every entry in turn taken out, or something else in its place."
    plan = make_plan("smoke", arms={name: {} for name in ("contrastive", "contrastive+pixels", "contrastive+sham", "llava-frozen")})
    refused = taken = 0
    for path in list(places(plan))[1:]:
        for value in (None, "text", -1, [], {}, True, [None], {"a": 1}, 1e999, "taken out"):
            changed = copy.deepcopy(plan)
            put(changed, path, value)
            if value == "taken out":
                inner = changed
                for step in path[:-1]: inner = inner[step]
                del inner[path[-1]]
            try: check_plan(json.loads(json.dumps(changed)), "plan.json")
            except UserError as error: sentence_of(error); refused += 1
            except Exception as error: raise AssertionError(f"{path} = {value!r}: {type(error).__name__}: {error}") from error
            else: taken += 1
    assert refused > taken > 0


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\x00", '{"name": "tiny"}'])
def test_a_file_that_is_no_plan(content, tmp_path, capsys):
    file = tmp_path / "plan.json"
    file.write_text(content)
    with pytest.raises(SystemExit) as left: main(["experiment", "run", str(file), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "plan.json" in said and "Traceback" not in said


def test_a_missing_plan_and_a_folder_in_its_place(tmp_path, capsys):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(SystemExit) as left: main(["experiment", "run", str(path)])
        assert left.value.code == 2 and str(path) in capsys.readouterr().err


def test_an_arm_without_its_earlier_one(plan):
    for name in ("llava-frozen", "vugen"):
        changed = copy.deepcopy(plan)
        changed["arms"] = {name: plan["arms"][name]}
        with pytest.raises(UserError, match="add that arm too"): check_plan(changed)


def test_a_primary_comparison_needs_both_arms(plan):
    del plan["arms"]["contrastive+pixels"]
    with pytest.raises(UserError, match="both must be among its arms"): check_plan(plan)


def test_another_vae_than_the_plan_was_written_with(plan, tmp_path, capsys):
    plan["vae_fingerprint"] = "0" * 16
    with pytest.raises(UserError, match="other weights") as found: load_plan_vae(plan)
    sentence_of(found.value)
    file = write_plan(plan, tmp_path / "plan.json")
    with pytest.raises(SystemExit) as left: main(["experiment", "run", str(file), "--out", str(tmp_path / "run"), "--arms", "show-o2", "--seeds", "0"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "0" * 16 in said and "Traceback" not in said
    plan["arms"] = {"contrastive": plan["arms"]["contrastive"]}
    assert load_plan_vae(plan) is None  # nobody asks for it


def test_a_plan_is_read_as_it_was_written(plan, tmp_path):
    again = read_plan(write_plan(plan, tmp_path / "plan.json"))
    assert again == json.loads(json.dumps(plan, default=list)) and plan_digest(again) == plan_digest(plan)
    for key in ("world", "sizes", "recipe", "arms", "seeds", "steps", "items"):
        changed = copy.deepcopy(plan)
        changed[key] = [*plan[key], 7] if key == "seeds" else plan[key] + 1 if key == "steps" else {**plan[key], "more": 1}
        assert plan_digest(changed) != plan_digest(plan)


# Budgets

def test_every_arm_of_a_plan_spends_the_budget_to_within_a_step(whole):
    assert set(whole["arms"]) == set(PRESETS["smoke"]["arms"])
    for name, arm in whole["arms"].items():
        steps, samples, gflops = spent_at(whole, name, arm["equal_flops"])
        assert abs(gflops - whole["gflops"]) <= max(arm["gflops_per_step"]), name
        assert steps == arm["before"] + arm["equal_flops"] and samples == steps * whole["recipe"]["batch_size"]
        asked = moments(whole, name)
        assert [step for step, kinds in asked.items() if "flops" in kinds] == [arm["equal_flops"]]
        assert [step for step, kinds in asked.items() if "steps" in kinds] == [whole["steps"] - arm["before"]] and max(asked) == arm["steps"]


def test_dearer_arms_take_fewer_steps(whole):
    steps = {name: arm["before"] + arm["equal_flops"] for name, arm in whole["arms"].items()}
    assert steps["show-o2"] < steps["captioner"] and steps["contrastive+pixels"] < steps["contrastive"] and steps["contrastive+sham"] == steps["contrastive+pixels"]
    cost = {name: arm["gflops_per_step"] for name, arm in whole["arms"].items()}
    assert cost["contrastive+sham"] == cost["contrastive+pixels"] and cost["vugen"][0] != cost["vugen"][1] and cost["llava-frozen"][0] < cost["llava-unfrozen"][0]


def test_what_vugen_spends_is_added_up_step_by_step(whole):
    arm = whole["arms"]["vugen"]
    early, later = arm["gflops_per_step"]
    assert arm["settings"]["reduction_steps"] == 2 and arm["gflops_before"] == pytest.approx(whole["steps"] // 2 * whole["arms"]["captioner"]["gflops_per_step"][0])
    for step in range(1, 8): assert spent_at(whole, "vugen", step)[2] == pytest.approx(arm["gflops_before"] + sum(early if each < 2 else later for each in range(step)))


def test_the_price_of_a_step_is_what_the_stage_spends(whole):
    "Counted on a whole batch of the stage itself, from its own start."
    vae = load_plan_vae(whole)
    for name in ("contrastive", "captioner", "llava-frozen", "show-o2", "vugen"):
        stage = ArmStage(whole, name, 0, vae)
        size = whole["recipe"]["batch_size"]
        counted = training_flops(stage.build(), stage.batch(range(size))) / 1e9
        assert counted == pytest.approx(whole["arms"][name]["gflops_per_step"][0], rel=0.06)  # captions of another batch may be longer by a word


def test_the_price_of_i_jepa_is_a_mean_over_masks(whole):
    world, size = World.from_dict(whole["world"]), whole["recipe"]["batch_size"]
    data = training_batch(world, WordTokenizer(scene_words(world)), 0, list(range(size)), size)
    stage = ArmStage(whole, "i-jepa pretraining", 0)
    drawn = [training_flops(stage.build(), data, seed) / 1e9 for seed in range(16)]
    assert len(set(drawn)) > 3  # a mask's size changes the price
    assert step_costs(whole, None, "i-jepa pretraining") == pytest.approx((statistics.mean(drawn),) * 2)
    assert whole["arms"]["i-jepa"]["gflops_before"] == pytest.approx(whole["steps"] // 2 * statistics.mean(drawn))
    assert set(PRETRAINING) == {arm["earlier"] for arm in whole["arms"].values() if arm["earlier"] and arm["earlier"] not in whole["arms"]}


def test_no_arm_is_drawn_into_a_folder_of_another_plan(plan, tmp_path):
    Run(tmp_path / "run", plan)
    with pytest.raises(UserError, match="never mixed"): Run(tmp_path / "run", {**plan, "steps": 3, "curve": [3, 6]})
