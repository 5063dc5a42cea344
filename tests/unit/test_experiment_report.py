"The report of the experiment: what it refuses, what it says, what it writes."
import functools
import json
import re
from html.parser import HTMLParser

import pytest

from vugen.errors import UserError
from vugen.experiment.plans import plan_digest
from vugen.experiment.report import (UNTRAINED, all_comparisons, analyse, areas_table, arms_table, begun, comparisons_table, deviations, families_table, heads_table, limits, load_results, milestones_table, page_blocks, pair_table, planned_power, power_table, primary_result,
                                     readouts_figure, readouts_table, report, sham_sentence, untrained_sentence)
from vugen.experiment.statistics import Scores, grid, interval, join, paired, simulate_plan, simulate_scores, write_scores

COSTS = {"contrastive": 1.0, "contrastive+pixels": 1.6, "contrastive+sham": 1.6}


def plan(**changes): return simulate_plan(**{"costs": COSTS, "items": 30, "steps": 400, "curve": (100, 200), "name": "trial", "question": "Does it help?", **changes})


DIGEST = plan_digest(plan())


def record(arm, seed, **changes): return {"plan": DIGEST, "arm": arm, "seed": seed, "parameters": {"encoder": 10, "total": 20}, "seconds": 60, "versions": {"torch": "2.13.0"}, **changes}


@functools.lru_cache
def scores(pixels=0.7, items=30, curve=(100, 200, 400), readouts=("native", "attention"), seed_sd=0.02):
    return simulate_scores(lambda arm, readout, suite, family, kind, step: 0.85 if family == "atom" else 0.25 + ((pixels if arm == "contrastive+pixels" else 0.5) - 0.25) * step / 400 if step < 400 else pixels if arm == "contrastive+pixels" else 0.5,
                           COSTS, items=items, steps=400, curve=curve, readouts=readouts, seed_sd=seed_sd)


@functools.lru_cache
def bare(attention=0.6, seeds=5, items=30):
    "Untrained encoders, as the probes read them"
    return simulate_scores(lambda arm, readout, suite, family, kind, step: attention if readout == "attention" else 0.5, {UNTRAINED: 1.0}, seeds=seeds, items=items, steps=0, readouts=("linear", "attention"), seed=1).where(moment="steps")


def jobs(table): return [(arm, seed) for arm in table.names("arm") for seed in table.where(arm=arm).names("seed")]


def together(folder, table, said=None, records=None, untrained=None):
    "Committed results: three files, and a fourth of untrained encoders"
    said = said or plan()
    write_scores(table, folder / "scores.parquet")
    if untrained: write_scores(untrained, folder / "untrained.parquet")
    (folder / "plan.json").write_text(json.dumps(said))
    (folder / "records.json").write_text(json.dumps(records if records is not None else [record(*job, plan=plan_digest(said)) for job in jobs(table)]))
    return folder


def apart(folder, table, said=None):
    "A run: one folder a job"
    said = said or plan()
    for arm, seed in jobs(table):
        write_scores(table.where(arm=arm, seed=seed), folder / arm / str(seed) / "scores.parquet")
        (folder / arm / str(seed) / "record.json").write_text(json.dumps(record(arm, seed, plan=plan_digest(said))))
    (folder / "plan.json").write_text(json.dumps(said))
    return folder


def analysed(folder, table, said=None, untrained=None): return analyse(load_results(together(folder, table, said, untrained=untrained)), draws=200)


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


def test_the_digest_is_computed_and_not_believed(tmp_path):
    folder = together(tmp_path / "a", scores(), plan())
    (folder / "plan.json").write_text(json.dumps({**plan(steps=100, primary={"alpha": 0.2}), "digest": DIGEST}))
    with pytest.raises(UserError, match="unknown key 'digest'"): load_results(folder)
    (folder / "plan.json").write_text(json.dumps(plan(primary={"alpha": 0.2})))
    with pytest.raises(UserError, match="never mixed") as error: load_results(folder)
    assert DIGEST in str(error.value) and plan_digest(plan(primary={"alpha": 0.2})) in str(error.value)
    assert load_results(together(tmp_path / "b", scores(), plan(pilot=[], question="Or not?"))).digest == DIGEST


def test_a_plan_that_could_not_be_run_is_refused(tmp_path):
    for said, word in (({**plan(), "seeds": [0, 0]}, "seeds"), ({**plan(), "curve": [100]}, "curve"), (plan(primary={"alpha": "small"}), "alpha"), (plan(costs={**COSTS, "nobody": 1.0}), "nobody")):
        with pytest.raises(UserError, match=word): load_results(together(tmp_path / word, scores(), said, records=[]))


def marked(path, digest):
    "The same file, which says by which plan it was made"
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).replace_schema_metadata({"plan": digest}), path)


def test_scores_of_another_plan_are_refused_wherever_they_lie(tmp_path):
    own = plan_digest(plan())
    for place, name in ((together(tmp_path / "a", scores(), untrained=bare()), "scores.parquet"), (together(tmp_path / "b", scores(), untrained=bare()), "untrained.parquet"), (apart(tmp_path / "c", scores()), "contrastive/0/scores.parquet")):
        marked(place / name, own)
        load_results(place)
        marked(place / name, "0123456789ab")
        with pytest.raises(UserError, match=f"{name.split('/')[-1]} holds scores of the plan 0123456789ab"): load_results(place)


@pytest.mark.parametrize("wrong", [{"parameters": None}, {"seconds": "long"}, {"versions": ["x"]}, {"arm": ["x"]}, {"seed": "0"}, {"hardware": 3}])
def test_a_damaged_record_is_one_sentence(tmp_path, wrong):
    first, *rest = jobs(scores())
    with pytest.raises(UserError, match="records.json"): load_results(together(tmp_path, scores(), records=[{**record(*first, plan=plan_digest(plan())), **wrong}, *(record(*job, plan=plan_digest(plan())) for job in rest)]))


# ---- untrained encoders

def test_an_arm_that_sees_pictures_in_its_own_way_is_held_against_its_own_start(tmp_path):
    truth = lambda arm, readout, suite, family, kind, step: {"untrained": 0.9, "untrained contrastive": 0.4}.get(arm, 0.6)
    table = simulate_scores(truth, {**COSTS, "untrained": 1.0, "untrained contrastive": 1.0}, items=300, readouts=("native", "attention"))
    starts = table.where(arm=["untrained", "untrained contrastive"], readout="attention", moment="steps")
    analysis = analysed(tmp_path, table.where(arm=list(COSTS)), plan(items=300), starts)
    verdicts = {row[0]: row[-1].split(":")[0] for row in readouts_table(analysis, "steps").rows}
    assert verdicts["contrastive"] == "gained" and {verdicts[arm] for arm in COSTS if arm != "contrastive"} == {"lost"} and {"untrained encoder", "untrained encoder of contrastive"} <= set(verdicts)



def test_untrained_encoders_are_no_jobs_and_are_never_missing(tmp_path):
    one, other = load_results(together(tmp_path / "a", scores(), untrained=bare())), load_results(apart(tmp_path / "b", join([scores(), bare()])))
    for found in (one, other): assert not found.missing and len(found.records) == 15 and UNTRAINED not in found.scores.names("arm") and found.untrained.names("arm") == [UNTRAINED] and len(found.untrained) == len(bare())
    (tmp_path / "b" / UNTRAINED / "4" / "scores.parquet").unlink()
    assert load_results(tmp_path / "b").untrained.names("seed") == [0, 1, 2, 3]


def test_untrained_encoders_of_another_plan_are_refused(tmp_path):
    folder = apart(tmp_path / "a", join([scores().where(seed=0), bare().where(seed=0)]))
    foreign = folder / UNTRAINED / "0" / "record.json"
    foreign.write_text(json.dumps(record(UNTRAINED, 0, plan="ffffffffffff")))
    with pytest.raises(UserError, match="never mixed") as error: load_results(folder)
    assert str(foreign) in str(error.value)
    with pytest.raises(UserError, match="untrained.parquet holds scores of contrastive"): load_results(together(tmp_path / "b", scores(), untrained=scores().where(arm="contrastive")))
    with pytest.raises(UserError, match="untrained.parquet holds the seed 5"): load_results(together(tmp_path / "c", scores(), untrained=bare(seeds=6)))
    with pytest.raises(UserError, match="different items"): analysed(tmp_path / "d", scores(), untrained=bare(items=20))


@pytest.mark.parametrize("attention,verdict,sentence", [(0.2, "gained", "the training put it into the tokens"), (0.95, "lost", "the training lost what an untrained encoder gives")])
def test_verdicts_are_given_beside_an_untrained_encoder(tmp_path, attention, verdict, sentence):
    analysis = analysed(tmp_path, scores(curve=()), untrained=bare(attention))
    table, probe = readouts_table(analysis, "steps"), dict(readout="attention", moment="steps", family="binding")
    assert table.rows[0][-1] == f"{verdict}: {sentence}" and table.rows[-1][0] == "untrained encoder" and "–" in table.rows[-1]
    both = join([scores(curve=()), bare(attention)])
    gap = interval(paired(grid(both.where(arm="contrastive", **probe)), grid(both.where(arm=UNTRAINED, **probe))).values, least=-1, most=1, draws=200)
    assert table.rows[0][table.columns.index("attention − untrained, points")] == gap.points()
    found = analysis.untrained["attention", "binding"]
    assert f"Binding: untrained encoder: attention {found.value:.0%}; contrastive: " in readouts_figure(analysis).alt and found.percent() in table.rows[-1]
    assert "2,000 labelled scenes" in untrained_sentence(analysis) and "untrained encoders of 5 seeds" in page_blocks(analysis)[-1][1]


def test_no_more_than_an_untrained_encoder_gives(tmp_path):
    alike = simulate_scores(lambda arm, readout, suite, family, kind, step: 0.8 if readout == "attention" else 0.5, {**COSTS, UNTRAINED: 1.0}, items=300, readouts=("native", "attention"), steps=400, seed_sd=0.005).where(moment="steps")
    both = analysed(tmp_path / "a", alike.where(arm=list(COSTS)), plan(items=300), alike.where(arm=UNTRAINED, readout="attention"))
    assert readouts_table(both, "steps").rows[1][-1] == "no gain: no more than an untrained encoder gives the probe"
    few = analysed(tmp_path / "b", alike.where(arm=list(COSTS), item=list(range(9)), seed=0), plan(items=300), alike.where(arm=UNTRAINED, readout="attention", item=list(range(9)), seed=0))
    assert readouts_table(few, "steps").rows[1][-1].endswith("(one seed: of these two models only)") and "1 of 5 seeds are in" in untrained_sentence(few)


def test_without_an_untrained_encoder_there_is_no_verdict(tmp_path):
    analysis = analysed(tmp_path, scores(curve=()))
    assert all(row[-1] == "no verdict: no untrained encoder to compare with" for row in readouts_table(analysis, "steps").rows) and len(readouts_table(analysis, "steps").rows) == 3
    assert readouts_table(analysis, "steps").html().count('class="long"') == 3
    assert "No untrained encoder was measured" in untrained_sentence(analysis) and untrained_sentence(analysis) in [content for _, content in page_blocks(analysis)] and "no untrained encoder" in page_blocks(analysis)[-1][1]


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
    more = plan(costs={**COSTS, "captioner": 1.2}, comparisons=[*plan()["comparisons"], ["captioner", "contrastive"]])
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
    said = plan(question="<script>alert(1)</script> | a", pilot=[{"decision": "</pre><b>", "digest": "</summary><b>", "curves": [{"arm": "<i>", "family": "atom", "step": 3, "value": 0.5}]}])
    analysis = analyse(load_results(together(tmp_path / "run", scores(curve=(), readouts=("native",)), said)), draws=300)
    assert any(kind == "details" for kind, _ in page_blocks(analysis))
    report(tmp_path / "run", tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in text and "</pre><b>" not in text and "</summary><b>" not in text + (tmp_path / "out" / "report.md").read_text() and "<i>" not in text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    together(tmp_path / "run", scores(curve=(), readouts=("native",)).where(seed=[0, 1]))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"): report(tmp_path / "run", tmp_path / "file")


# ---- what must not be read as a result

def copied(table, arm, name):
    "Scores of one arm under another arm's name"
    rows = table.where(arm=arm)
    return Scores({**rows.columns, "arm": rows.columns["arm"] * 0}, {**rows.words, "arm": [name]})


def test_the_same_models_are_no_second_result(tmp_path):
    steps = scores(curve=(), readouts=("native",)).where(moment="steps")
    flops = Scores({**steps.columns, "moment": steps.columns["moment"] * 0}, {**steps.words, "moment": ["flops"]})
    same = analysed(tmp_path / "a", join([steps, flops]))
    said = [content for kind, content in page_blocks(same) if kind == "text"]
    assert "At equal FLOPs these are the same models, scored once: there is no second result." in said and not any("The same pair" in each for each in said)
    assert "Of contrastive+pixels − contrastive+sham, contrastive+sham − contrastive these are the same models as at equal steps." in comparisons_table(same, "flops").note and "same models" not in comparisons_table(same, "steps").note
    assert any(str(content).startswith("The same pair at equal FLOPs") for _, content in page_blocks(analysed(tmp_path / "b", scores(curve=(), readouts=("native",)))))


def test_arms_that_must_agree_are_said_to_be_identical(tmp_path):
    table = scores(curve=(), readouts=("native",)).where(moment="steps")
    analysis = analysed(tmp_path, join([table.where(arm=["contrastive", "contrastive+pixels"]), copied(table, "contrastive", "contrastive+sham")]))
    assert sham_sentence(analysis) == "Control: with the sham head, whose gradient never reaches the encoder, the arm is identical on all 450 scores, as it must be by construction."
    row = comparisons_table(analysis, "steps").rows[1]
    assert row[-1] == "identical on all 450 scores, as it must be by construction" and row[3] == "0, exactly" and row[4:8] == ["–"] * 4 and analysis.comparisons["steps"][0].p_holm == pytest.approx(min(1, 2 * analysis.comparisons["steps"][0].p))


def test_heads_against_more_steps_are_outside_holm(tmp_path):
    analysis = analysed(tmp_path, scores(curve=(), readouts=("native",)))
    table = heads_table(analysis)
    assert table.title.startswith("Not planned") and [row[0] for row in table.rows] == ["contrastive+pixels − contrastive"] and table.rows[0][1] == "250 against 400"
    assert analysis.unplanned[0].p_holm is None and len(analysis.comparisons["flops"]) == 2
    planned = analysed(tmp_path / "planned", scores(curve=(), readouts=("native",)), plan(comparisons=[*plan()["comparisons"], ["contrastive+pixels", "contrastive"]]))
    assert heads_table(planned) is None


def test_the_primary_pair_stands_in_every_cell(tmp_path):
    analysis = analysed(tmp_path, scores(curve=()))
    table = pair_table(analysis)
    assert [row[:3] for row in table.rows] == [[readout, "seen", family] for readout in ("native", "attention") for family in ("atom", "binding")] and len(table.columns) == 3 + 5
    assert table.rows[1][3] == analysis.primary["comparison"].difference.points() + " (primary)" and str(table.rows).count("(primary)") == 1


def test_one_seed_speaks_of_two_models(tmp_path):
    analysis = analysed(tmp_path, scores().where(seed=3))
    assert {row[-1] for row in comparisons_table(analysis, "steps").rows} == {"one seed: of these two models only"} and "of these two models only" in analysis.primary["sentence"]


def test_arms_that_agree_by_chance_are_not_said_to_be_identical(tmp_path):
    table = scores(curve=(), readouts=("native",)).where(moment="steps", seed=[0, 1], item=[0, 1])
    analysis = analysed(tmp_path, join([table.where(arm=["contrastive", "contrastive+sham"]), copied(table, "contrastive+sham", "contrastive+pixels")]))
    assert "is not ruled out, so this experiment cannot tell" in analysis.primary["sentence"] and comparisons_table(analysis, "steps").rows[0][-1] == "cannot tell" and "identical" not in analysis.primary["sentence"]


# ---- VUGEN

def tower(folder, reduction=150):
    "VUGEN after the captioner's 200 steps, with a reduction of some steps of its own"
    costs = {"captioner": 1.0, "vugen": 1.0}
    said = plan(costs=costs, comparisons=[["vugen", "captioner"]])
    said["arms"]["vugen"].update(before=200, earlier="captioner", settings={"reduction_steps": reduction})
    table = simulate_scores(lambda arm, *about: 0.5, costs, items=10, steps=400, curve=(200, 400), readouts=("native", "denoising"))
    return analysed(folder, table, said)


def test_a_tower_that_has_not_begun_has_no_score(tmp_path):
    idle, working = tower(tmp_path / "a", 250), tower(tmp_path / "b")
    shown = [readouts_table(each, "steps") for each in (idle, working)]
    place = shown[0].columns.index("binding, denoising")
    assert shown[0].rows[1][place] == "–" != shown[1].rows[1][place] and shown[0].rows[0][place] != "–"
    assert "begins after 250 own steps, and here it had 200" in shown[0].note and "begins after" not in shown[1].note
    assert "vugen" not in begun(idle.results).where(readout="denoising", moment="steps").names("arm")
    assert "captioner, which had half of the steps; at equal steps its tower has not begun." in comparisons_table(idle, "steps").note and "which had half of the steps." in comparisons_table(working, "steps").note
    assert any("its tower has not begun" in line for line in limits(idle))


def test_a_score_that_cannot_move_has_no_milestones(tmp_path):
    analysis = tower(tmp_path)
    assert [row[0] for row in milestones_table(analysis).rows] == ["captioner"] and "cannot move" in milestones_table(analysis).note and areas_table(analysis) is None


# ---- along training, sizes, limits

def test_areas_are_of_pairs_over_the_range_they_share(tmp_path):
    late = join([scores().where(arm=["contrastive", "contrastive+sham"]), scores().where(arm="contrastive+pixels", moment=["steps", "flops"]), scores().where(arm="contrastive+pixels", moment="curve", step=[200, 400])])
    analysis = analysed(tmp_path, late)
    spans = {(one["arm"], one["against"], one["axis"]): one["span"] for one in analysis.areas}
    assert spans["contrastive+sham", "contrastive", "samples"] == (6400, 25600) and spans["contrastive+pixels", "contrastive+sham", "samples"] == (12800, 25600) and spans["contrastive+sham", "contrastive", "gflops"] == (160, 400)
    assert areas_table(analysis).rows[0][2] == "12,800 – 25,600" and all(one["low"] <= one["value"] <= one["high"] for one in analysis.areas)


def test_areas_lag_and_pairs_are_among_the_rows(page):
    folder, made = page
    found = {row["metric"] for row in made["rows"]}
    assert {"area over samples difference", "area over gflops difference", "lag at 75%", "samples to 40%", "across paired difference"} <= found
    assert [row["planned"] for row in made["rows"] if row["metric"] == "text difference" and "planned" in row].count(False) == 1


def test_the_planned_size_is_among_the_powers(tmp_path):
    analysis = analysed(tmp_path, scores(curve=(), readouts=("native",)))
    assert "90 items, as planned" in power_table(analysis).columns and "The planned size, 5 seeds × 90 items, finds a difference of 5.0 points with a power of" in planned_power(analysis)


def test_limits_are_said_on_the_page(tmp_path):
    analysis = analysed(tmp_path, scores(readouts=("native",)))
    said = limits(analysis)
    assert said[0].startswith("Binding is still rising") and "3 of 3 arms" in said[0] and "the learning rate is 0.001 in all" in said[1] and "instead of" in said[2]
    texts = [content for kind, content in page_blocks(analysis) if kind == "text"]
    assert set(said) <= set(texts) and "flop counter when the plan is written" in arms_table(analysis).note


def test_another_encoder_is_named_beside_the_arms(tmp_path):
    costs = {"contrastive": 1.0, "captioner": 1.0, "show-o2": 1.0}
    said = plan(costs=costs, comparisons=[["show-o2", "captioner"]], primary={"arm": "show-o2", "against": "captioner"})
    table = simulate_scores(lambda *about: 0.5, costs, items=5, steps=400, readouts=("native",))
    records = [record(arm, seed, plan=plan_digest(said), parameters={"encoder": 451_488 if arm == "show-o2" else 455_712}) for arm, seed in jobs(table)]
    analysis = analyse(load_results(together(tmp_path, table, said, records)), draws=100)
    assert "show-o2: 451,488 against 455,712 parameters, because it reads VAE latents" in arms_table(analysis).note


def test_a_plan_of_few_arms_has_no_primary_result(tmp_path):
    costs = {"contrastive": 1.0, "captioner": 1.2}
    table = simulate_scores(lambda *about: 0.5, costs, items=10, steps=400, curve=(100, 400), seeds=2, readouts=("native", "attention"))
    made = report(together(tmp_path / "run", table, plan(costs=costs, seeds=2, comparisons=[])), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert made["primary"]["verdict"] == "none planned" and not made["primary"]["preliminary"] and "This plan has no primary comparison: its curves go into a plan with --pilot." in text and "Preliminary" not in text
    assert len(families_table(analyse(load_results(tmp_path / "run"), draws=100), "steps").rows) == 2


def test_the_pilot_is_a_table_folded_away(tmp_path):
    curves = [{"arm": "contrastive", "family": family, "step": step, "samples": 64 * step, "value": step / 400, "n": 30} for family in ("atom", "binding") for step in (100, 200)]
    said = plan(pilot=[{"digest": "abc", "seeds": [100], "curves": curves, "decision": "Neither floor nor ceiling."}])
    report(together(tmp_path / "run", scores(curve=(), readouts=("native",)), said), tmp_path / "out")
    for name in ("report.html", "report.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "<details><summary>Pilot 1: abc</summary>" in text and "Neither floor nor ceiling." in text and '"curves"' not in text and "50%" in text[text.index("Pilot 1"):]


def test_kinds_and_groupmatch_stand_beside_the_primary_score(tmp_path):
    from vugen.experiment.report import kinds_sentence, matched_table, pair_kinds
    results = load_results(together(tmp_path, scores()))
    analysis, found = analyse(results, draws=200), pair_kinds(results)
    first, second = (results.scores.where(arm=results.plan["primary"][name], moment="steps", readout="native", suite="seen", family="binding", kind="swap color") for name in ("arm", "against"))
    assert found["swap color"].value == pytest.approx(grid(first).values.mean() - grid(second).values.mean()) and set(found) == {"swap color", "swap object", "reverse relation"}
    assert all(one.points() in kinds_sentence(analysis) for one in found.values()) and "describe" in kinds_sentence(analysis)
    table = matched_table(analysis, "steps")
    assert "GroupMatch" in table.title and table.rows[0][-1] == interval(grid(results.scores.where(arm=table.rows[0][0], moment="steps", readout="native", suite="seen", kind="reverse relation"), "match").values, draws=200).percent()
