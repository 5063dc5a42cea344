"The whole experiment at its smallest, by its commands: all arms, two seeds, stopped once, collected, reported."
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from vugen.experiment.arms import ARMS
from vugen.experiment.plans import PRESETS, plan_digest, read_plan
from vugen.experiment.runner import read_scores
from vugen.paths import data_dir


def vugen(*words, **options):
    return subprocess.Popen([sys.executable, "-m", "vugen.lab.cli", "experiment", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def done(process):
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    said = done(vugen("plan", "--preset", "smoke", "--out", folder / "plan.json"))
    assert "14 arms × 2 seeds" in said and plan_digest(read_plan(folder / "plan.json")) in said
    run = ("run", folder / "plan.json", "--out", folder / "run", "--processes", 2)
    first = vugen(*run)
    while first.poll() is None and len(list(folder.glob("run/*/*/record.json"))) < 3: time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    said = first.communicate()[0]
    assert first.returncode == 128 + signal.SIGTERM and "the same command goes on" in said, said
    assert "28 of 28 jobs are done." in done(vugen(*run))
    done(vugen("collect", folder / "run", "--out", folder / "data"))
    return folder


def test_every_arm_and_seed_is_scored_at_equal_steps_and_at_equal_operations(smoke):
    rows = read_scores(smoke / "data/scores.parquet")
    assert {(row["arm"], row["seed"]) for row in rows} == {(arm, seed) for arm in ARMS for seed in (0, 1)}
    for arm in ARMS:
        assert {"curve", "steps", "flops"} == {row["moment"] for row in rows if row["arm"] == arm}
        assert {"native", "linear", "attention"} <= {row["readout"] for row in rows if row["arm"] == arm}
    assert not list((smoke / "run").glob("*/*/weights*")) and not list((smoke / "run").glob("*/*/.state*"))


def test_the_page_is_drawn_from_what_was_collected_alone(smoke):
    said = done(vugen("report", smoke / "data", "--out", smoke / "report"))
    page = (smoke / "report/report.html").read_text()
    assert "contrastive+pixels" in said and all(arm in page for arm in ARMS) and "http" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", page).replace("http-equiv", "")
    assert len(list((smoke / "report/figures").glob("*.png"))) == 7
    rows = json.loads((smoke / "report/rows.json").read_text())["rows"]
    assert {row["scorer"] for row in rows} >= set(ARMS)


def test_collected_results_count_as_done_elsewhere(smoke, tmp_path):
    said = done(vugen("run", smoke / "plan.json", "--out", tmp_path / "run", "--collected", smoke / "data"))
    assert said.count("28 of 28 jobs are done.") == 2
    done(vugen("collect", tmp_path / "run", "--out", tmp_path / "data"))
    assert read_scores(tmp_path / "data/scores.parquet") == read_scores(smoke / "data/scores.parquet")


def test_the_embedded_plan_is_one_that_runs():
    plan = read_plan(data_dir() / "experiment" / "tiny" / "plan.json")
    assert set(plan["arms"]) == set(PRESETS["tiny"]["arms"]) and len(plan["seeds"]) >= 5 and plan["pilot"]
