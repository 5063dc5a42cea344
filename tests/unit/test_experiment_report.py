"The report of the experiment: what it refuses, what it says, what it writes."
import functools
import json
import re
from html.parser import HTMLParser

import pytest

from vugen.errors import UserError
from vugen.experiment.report import all_comparisons, analyse, deviations, load_results, page_blocks, primary_result, report, sham_sentence
from vugen.experiment.statistics import simulate_scores, write_scores

DIGEST, COSTS = "0123456789ab", {"contrastive": 1.0, "contrastive+pixels": 1.6, "contrastive+sham": 1.6}


def plan(**changes):
    primary = dict(metric="text", family="binding", suite="seen", readout="native", arm="contrastive+pixels", against="contrastive+sham", at="steps", alpha=0.05, smallest_effect=0.05, items=90, seeds=5, hypothesis="A head helps.")
    return {"digest": DIGEST, "name": "trial", "question": "Does it help?", "arms": {name: {} for name in COSTS}, "seeds": [0, 1, 2, 3, 4], "steps": 400, "comparisons": [["contrastive+pixels", "contrastive+sham"], ["contrastive+sham", "contrastive"]], **changes,
            "primary": {**primary, **changes.get("primary", {})}}


def record(arm, seed, **changes): return {"plan": DIGEST, "arm": arm, "seed": seed, "parameters": {"encoder": 10, "total": 20}, "seconds": 60, "versions": {"torch": "2.13.0"}, **changes}


@functools.lru_cache
def scores(pixels=0.7, items=30, curve=(100, 200, 400), readouts=("native", "attention"), seed_sd=0.02):
    return simulate_scores(lambda arm, readout, suite, family, kind, step: 0.85 if family == "atom" else 0.25 + ((pixels if arm == "contrastive+pixels" else 0.5) - 0.25) * step / 400 if step < 400 else pixels if arm == "contrastive+pixels" else 0.5,
                           COSTS, items=items, steps=400, curve=curve, readouts=readouts, seed_sd=seed_sd)


def jobs(table): return [(arm, seed) for arm in table.names("arm") for seed in table.where(arm=arm).names("seed")]


def together(folder, table, said=None, records=None):
    "Committed results: three files"
    write_scores(table, folder / "scores.parquet")
    (folder / "plan.json").write_text(json.dumps(said or plan()))
    (folder / "records.json").write_text(json.dumps(records if records is not None else [record(*job) for job in jobs(table)]))
    return folder


def apart(folder, table, said=None):
    "A run: one folder a job"
    for arm, seed in jobs(table):
        write_scores(table.where(arm=arm, seed=seed), folder / arm / str(seed) / "scores.parquet")
        (folder / arm / str(seed) / "record.json").write_text(json.dumps(record(arm, seed)))
    (folder / "plan.json").write_text(json.dumps(said or plan()))
    return folder


# ---- what is refused

def test_job_folders_and_joined_files_say_the_same(tmp_path):
    one, other = primary_result(load_results(together(tmp_path / "a", scores()))), primary_result(load_results(apart(tmp_path / "b", scores())))
    assert one == other and one["verdict"] == "higher" and not one["preliminary"]


def test_a_job_of_another_plan_is_refused_by_the_name_of_its_file(tmp_path):
    folder = apart(tmp_path, scores().where(seed=[0, 1]))
    foreign = folder / "contrastive+sham" / "1" / "record.json"
    foreign.write_text(json.dumps(record("contrastive+sham", 1, plan="ffffffffffff")))
    with pytest.raises(UserError, match="never mixed") as error: load_results(folder)
    assert str(foreign) in str(error.value) and str(error.value).count(". ") == 0
    with pytest.raises(UserError, match="never mixed"): load_results(apart(tmp_path / "all", scores().where(seed=0)), digest="ffffffffffff")


@pytest.mark.parametrize("records,said", [
    ([{"plan": DIGEST}], "no record of a job"), ([record("contrastive", 0), record("nobody", 0)], "does not ask for"), ([record("contrastive", 0), record("contrastive", 77)], "does not ask for"),
    ([record("contrastive", 0)] * 2, "names a job twice"), ([record("contrastive", 0), record("contrastive", 1)], "has no scores"), ({}, "no list"), ([], "no finished job")])
def test_records_and_scores_belong_together(tmp_path, records, said):
    with pytest.raises(UserError, match=said): load_results(together(tmp_path, scores().where(arm="contrastive", seed=0), records=records))


def test_scores_without_a_record_are_refused(tmp_path):
    with pytest.raises(UserError, match="contrastive, seed 1 has no record"): load_results(together(tmp_path, scores().where(arm="contrastive", seed=[0, 1]), records=[record("contrastive", 0)]))


def test_scores_in_the_folder_of_another_job_are_refused(tmp_path):
    folder = apart(tmp_path, scores().where(arm="contrastive", seed=[0, 1]))
    write_scores(scores().where(arm="contrastive", seed=0), folder / "contrastive" / "1" / "scores.parquet")
    with pytest.raises(UserError, match="another job"): load_results(folder)


def test_a_folder_without_a_plan_or_with_a_torn_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="plan.json cannot be read"): load_results(tmp_path)
    (tmp_path / "plan.json").write_text('{"arms":')
    with pytest.raises(UserError, match="no complete JSON"): load_results(tmp_path)
    for said, word in (({"arms": {}}, "'seeds'"), ({**plan(), "primary": {"metric": "text"}}, "'family'"), (plan(comparisons=[["contrastive", "nobody"]]), "'nobody'"), ([], "'arms'")):
        (tmp_path / "plan.json").write_text(json.dumps(said))
        with pytest.raises(UserError, match=word): load_results(tmp_path)


def test_a_job_that_is_not_finished_is_missing_and_not_an_error(tmp_path):
    folder = apart(tmp_path, scores())
    (folder / "contrastive" / "4" / "scores.parquet").unlink()
    assert load_results(folder).missing == [("contrastive", 4)]


# ---- what is said

def test_what_falls_short_of_the_plan_is_named(tmp_path):
    found = deviations(load_results(together(tmp_path / "a", scores().where(seed=[0, 1, 2]), plan(steps=500, primary={"items": 120}))))
    assert found[0] == "3 of 5 seeds are in: the primary test is not yet run as planned."
    assert any("90 items where the plan says 120" in each for each in found) and any("after 400 steps where the plan says 500" in each for each in found)
    waiting = primary_result(load_results(together(tmp_path / "b", scores().where(arm="contrastive"))))
    assert waiting["verdict"] == "not measured" and waiting["preliminary"] and "cannot be drawn yet" in waiting["sentence"] and any("contrastive+pixels has no scores" in each for each in waiting["deviations"])
    assert "0 of 5 seeds" in deviations(load_results(together(tmp_path / "c", scores().where(readout="attention"))))[0]


@pytest.mark.parametrize("pixels,items,verdict,words", [
    (0.7, 30, "higher", "scores .* points higher than contrastive.sham .* the whole interval lies beyond|scores .* points higher .* is open"), (0.3, 30, "lower", "scores .* points lower than contrastive.sham"),
    (0.5, 400, "equivalent", "No difference larger than 5.0 points was found .* rule a larger one out"), (0.5, 6, "open", "No difference was found .* is not ruled out, so this experiment cannot tell")])
def test_the_result_is_said_whichever_way_it_falls(tmp_path, pixels, items, verdict, words):
    table = scores(pixels, items, (), ("native",), 0.005 if items == 400 else 0.02)
    found = primary_result(load_results(together(tmp_path, table, plan(primary={"items": 3 * items}))))
    assert found["verdict"] == verdict and re.search(words, found["sentence"]) and not found["preliminary"]
    gap = found["comparison"].difference
    assert f"{100 * gap.low:+.1f} to {100 * gap.high:+.1f} points" in found["sentence"] and found["sentence"].count(". ") == 0


def test_a_single_seed_is_not_the_planned_test(tmp_path):
    found = primary_result(load_results(together(tmp_path, scores().where(seed=2))))
    assert found["sentence"].startswith("Preliminary: ") and "1 seed ×" in found["sentence"] and found["comparison"].difference.seeds == 1


def test_holm_counts_the_comparisons_that_are_not_in_yet(tmp_path):
    more = plan(arms={**{name: {} for name in COSTS}, "captioner": {}}, comparisons=[*plan()["comparisons"], ["captioner", "contrastive"]])
    found = all_comparisons(load_results(together(tmp_path, scores(), more)))["steps"]
    smallest = min(found, key=lambda one: one.p)
    assert len(found) == 2 and smallest.p_holm == pytest.approx(min(1, 3 * smallest.p))


# ---- what is written

class Page(HTMLParser):
    "Open tags, their balance, pictures and addresses"
    def __init__(self): super().__init__(); self.open, self.pictures, self.links, self.headings = [], [], [], []

    def handle_starttag(self, tag, attributes):
        said = dict(attributes)
        if tag == "img": self.pictures.append(said)
        self.links += [said[name] for name in ("src", "href") if name in said]
        if tag not in ("img", "meta"): self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("h1", "h2"): self.headings.append(text)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return folder, report(together(folder / "run", scores()), folder / "out")


def test_the_page_needs_nothing_beside_it(page):
    folder, made = page
    read = Page()
    read.feed((folder / "out" / "report.html").read_text())
    assert not read.open and read.pictures and all(each.startswith("data:image/png;base64,") for each in read.links) and all(len(each["alt"]) > 60 for each in read.pictures)
    assert {"Primary result", "Arms", "Differences", "Atoms and binding", "Was it lost, or not used?", "Along training", "Power", "Provenance"} <= set(read.headings)


def test_markdown_names_the_figures_that_were_written(page):
    folder, made = page
    text = (folder / "out" / "report.md").read_text()
    named = re.findall(r"\]\((figures/[\w-]+\.png)\)\{fig-alt=\"", text)
    assert len(named) >= 6 and all((folder / "out" / name).read_bytes()[:4] == b"\x89PNG" for name in named) and {folder / "out" / name for name in named} <= set(made["written"])
    assert made["primary"]["sentence"] in text and str(folder) not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE): assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_rows_are_plain_long_form_and_agree_with_the_table(page):
    folder, made = page
    stored = json.loads((folder / "out" / "rows.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert stored["run"]["plan"] == DIGEST and stored["rows"] == json.loads(json.dumps(made["rows"])) and all({"scorer", "category", "metric", "value", "low", "high", "n", "chance"} <= set(row) for row in made["rows"])
    row = next(row for row in made["rows"] if (row["scorer"], row["category"], row["metric"], row.get("moment"), row.get("readout")) == ("contrastive+sham", "binding", "group", "flops", "attention"))
    cell = scores().where(arm="contrastive+sham", moment="flops", readout="attention", family="binding")
    assert row["value"] == pytest.approx(cell.columns["group"].mean()) and row["n"] == 90 and row["chance"] == pytest.approx(1 / 6) and row["low"] <= row["value"] <= row["high"]
    assert json.loads(json.dumps(made["primary"]))["difference"]["seeds"] == 5


def test_the_same_results_give_the_same_page(page, tmp_path):
    folder, made = page
    report(folder / "run", tmp_path)
    for path in made["written"]: assert (tmp_path / path.relative_to(folder / "out")).read_bytes() == path.read_bytes(), path.name


def test_a_run_on_its_way_gives_a_preliminary_page(tmp_path):
    started = scores(curve=(), readouts=("native",)).where(seed=[0, 1], moment="steps")
    made = report(apart(tmp_path / "run", started), tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert made["primary"]["preliminary"] and "<h1>Preliminary: Experiment trial</h1>" in text and "2 of 5 seeds are in" in text and "9 of 15 jobs" in text
    alone = report(apart(tmp_path / "one", started.where(arm="contrastive")), tmp_path / "one out")
    assert alone["primary"]["verdict"] == "not measured" and "Power needs the primary comparison" in (tmp_path / "one out" / "report.md").read_text()


def test_the_sham_head_is_told_apart_from_a_head_that_works(tmp_path):
    quiet = simulate_scores(lambda *about: 0.6, COSTS, items=300, steps=400, readouts=("native",), seed_sd=0.005)
    loud = simulate_scores(lambda arm, *about: 0.6 if arm == "contrastive" else 0.75, COSTS, items=60, steps=400, readouts=("native",))
    said = [sham_sentence(analyse(load_results(together(tmp_path / name, table)), draws=300)) for name, table in (("quiet", quiet), ("loud", loud))]
    assert "changes nothing beyond ±5.0 points" in said[0] and "is not shown" in said[1]


def test_a_foreign_word_cannot_break_the_page(tmp_path):
    said = plan(question="<script>alert(1)</script> | a", pilot={"note": "</pre><b>"})
    analysis = analyse(load_results(together(tmp_path / "run", scores(curve=(), readouts=("native",)), said)), draws=300)
    assert any(kind == "code" for kind, _ in page_blocks(analysis))
    report(tmp_path / "run", tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in text and "</pre><b>" not in text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    together(tmp_path / "run", scores(curve=(), readouts=("native",)).where(seed=[0, 1]))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"): report(tmp_path / "run", tmp_path / "file")
