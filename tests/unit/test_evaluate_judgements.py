"Stored judgements: nothing is judged twice, a killed run goes on, and intervals cover what they promise where pictures share a prompt."
import subprocess
import sys
import time

import numpy as np
import pytest

from vugen.errors import UserError
from vugen.evaluate.intervals import wilson
from vugen.evaluate.judgements import Job, JudgementStore, clustered_mean, clustered_share, digest_of, judged, mean_of_estimates


def jobs(count): return [Job(str(number), digest_of(number), number) for number in range(count)]


def even(jobs): return [{"right": job.payload % 2 == 0, "note": None} for job in jobs]


def test_records_come_back_in_the_order_of_the_jobs(tmp_path):
    store = JudgementStore(tmp_path / "a.parquet")
    judged(store, "m", jobs(7)[::-1], even, batch_size=3)
    assert [record["right"] for record in judged(store, "m", jobs(7), lambda jobs: pytest.fail("judged twice"))] == [number % 2 == 0 for number in range(7)]


def test_another_judge_or_a_changed_thing_is_judged_anew_and_old_answers_stay(tmp_path):
    store, seen = JudgementStore(tmp_path / "a.parquet"), []
    def watched(jobs): seen.extend(job.key for job in jobs); return even(jobs)
    judged(store, "m", jobs(3), watched)
    judged(store, "other", jobs(2), watched)
    judged(store, "m", [Job("1", "changed", 4)], watched)
    assert seen == ["0", "1", "2", "0", "1", "1"] and len(store.read()) == 6
    judged(store, "m", jobs(3), lambda jobs: pytest.fail("an answer was lost"))


def test_a_replay_needs_a_finished_run_and_every_answer(tmp_path):
    store = JudgementStore(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no finished run"): judged(store, "", jobs(1), None)
    judged(store, "m", jobs(2), even, {"judge": "even"})
    assert judged(store, "", jobs(2), None)[0]["right"] and store.about()["judge"] == "even"
    with pytest.raises(UserError, match="1 of 3 things .first: 2."): judged(store, "", jobs(3), None)


def test_a_broken_store_is_named(tmp_path):
    with pytest.raises(UserError, match="parquet"): JudgementStore(tmp_path / "a.json")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(UserError, match="a.parquet is no complete Parquet"): JudgementStore(tmp_path / "a.parquet").read()
    import pyarrow, pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="lacks the column 'mark'"): JudgementStore(tmp_path / "b.parquet").read()


SLOW = """
import sys, time
from pathlib import Path
from vugen.evaluate.judgements import Job, JudgementStore, digest_of, judged
def judge(jobs):
    with open(sys.argv[2], "a") as log: log.write(jobs[0].key + "\\n")
    time.sleep(0.2)
    return [{"right": True}]
judged(JudgementStore(sys.argv[1]), "m", [Job(str(number), digest_of(number), number) for number in range(50)], judge, batch_size=1)
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    log = tmp_path / "log"
    run = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / "a.parquet"), str(log)])
    while not (log.is_file() and len(log.read_text().split()) >= 4) and run.poll() is None: time.sleep(0.05)
    run.kill(); run.wait()
    before = {record["key"] for record in JudgementStore(tmp_path / "a.parquet").read()}
    assert 3 <= len(before) < 50
    seen = []
    def judge(jobs): seen.extend(job.key for job in jobs); return [{"right": True} for _ in jobs]
    judged(JudgementStore(tmp_path / "a.parquet"), "m", jobs(50), judge)
    assert set(seen) == {str(number) for number in range(50)} - before and not list(tmp_path.glob("*.parts"))


def test_intervals_cover_the_truth_where_pictures_share_a_prompt():
    generator, inside, naive = np.random.default_rng(0), 0, 0
    for _ in range(400): # prompts differ: Beta(1, 1), so four pictures of one prompt are alike
        rights = generator.binomial(4, generator.uniform(size=60))
        found, plain = clustered_share([(int(right), 4) for right in rights]), wilson(int(rights.sum()), 240)
        inside += found.low <= 0.5 <= found.high
        naive += plain.low <= 0.5 <= plain.high
    assert inside >= 0.92 * 400 and naive < inside - 20


@pytest.mark.parametrize("groups", [[(0, 4)] * 20, [(4, 4)] * 20])
def test_where_all_agree_every_prompt_counts_once(groups):
    assert np.allclose(clustered_share(groups)[1:3], wilson(20 * groups[0][0] // 4, 20)[1:3])


def test_shares_of_single_pictures_are_wilsons():
    assert np.allclose(clustered_share([(1, 1)] * 7 + [(0, 1)] * 5)[:3], wilson(7, 12)[:3], atol=0.02)
    with pytest.raises(UserError, match="no picture"): clustered_share([])


def test_the_bootstrap_over_groups_has_the_standard_error_of_group_means():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(300), 5)
    values = generator.normal(size=300)[groups] + 0.1 * generator.normal(size=1500)
    found, error = clustered_mean(values, groups), values.reshape(300, 5).mean(1).std(ddof=1) / 300**0.5
    assert abs((found.high - found.low) / (2 * 1.96 * error) - 1) < 0.08 and found.value == pytest.approx(values.mean())


def test_one_group_tells_nothing_of_others():
    assert clustered_mean([0.2, 0.4], ["a", "a"]) == (pytest.approx(0.3), None, None, 2) and str(clustered_mean([0.5], ["a"])) == "0.500 (n=1)"


def test_the_mean_of_shares_is_as_wide_as_theory_has_it():
    each = [wilson(50, 100)] * 4
    half = (each[0].high - each[0].low) / 2
    assert mean_of_estimates(each).high - mean_of_estimates(each).value == pytest.approx(half / 2, rel=1e-6)
    with pytest.raises(UserError): mean_of_estimates([])
