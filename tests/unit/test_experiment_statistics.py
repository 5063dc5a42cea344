"Statistics of the experiment against closed forms, scipy, scikit-learn, least squares and simulations of known truth."
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn.isotonic import IsotonicRegression

from vugen.errors import UserError
from vugen.experiment.statistics import (CHANCE, KINDS, NUMBERS, WORDS, Components, Curve, Grid, Interval, adjusted, area, beyond, bootstrap_draws, clustered_error, compare, components, curve, detectable, equivalence, grid, holm,
                                         interval, join, lag, make_scores, mcnemar, mean_squares, milestones, odds_ratio, paired, paired_areas, power, reach, read_scores, readout_row, readout_verdict, rising, seed_test,
                                         shared_span, simulate_cell, simulate_plan, simulate_scores, standard_error, tail, told, two_sided, write_scores)
from vugen.evaluate.intervals import wilson


def cell(values, seeds=None, label="cell"): return Grid(np.asarray(values, dtype=float), tuple(seeds or range(len(values))), np.arange(len(values[0])), label)


def world(accuracy=0.6, **options): return simulate_scores(lambda *about: accuracy, {"arm": 1.0}, items=10, **options)


# ---- the table

def test_tables_survive_the_disk_and_plain_strings_are_read_too(tmp_path):
    scores = world()
    back = read_scores(write_scores(scores, tmp_path / "a.parquet"))
    plain = pa.table({**{name: [scores.words[name][place] for place in scores.columns[name]] for name in WORDS}, **{name: scores.columns[name].astype("int64" if name != "gflops" else "float64") for name in NUMBERS}})
    pa.parquet.write_table(plain, tmp_path / "b.parquet")
    for table in (back, read_scores(tmp_path / "b.parquet")):
        assert len(table) == len(scores) and {name: kind.dtype.name for name, kind in table.columns.items() if name in NUMBERS} == NUMBERS
        chosen = dict(readout="linear", moment="steps", kind="size", seed=3)
        assert table.where(**chosen).columns["text"].tolist() == scores.where(**chosen).columns["text"].tolist()


@pytest.mark.parametrize("change,said", [
    (lambda table: table.drop(["across"]), "'across'"), (lambda table: table.set_column(0, "arm", pa.array([None] * len(table), pa.string())), "'arm'"),
    (lambda table: table.set_column(table.column_names.index("text"), "text", pa.array([2] * len(table), pa.uint8())), "neither 0 nor 1"),
    (lambda table: table.set_column(table.column_names.index("seed"), "seed", pa.array(["x"] * len(table))), "another kind")])
def test_a_table_of_another_shape_is_refused_in_a_sentence(tmp_path, change, said):
    path = write_scores(world(), tmp_path / "scores.parquet")
    pa.parquet.write_table(change(pa.parquet.read_table(path)), path)
    with pytest.raises(UserError, match=said) as error: read_scores(path)
    assert str(path) in str(error.value)


def test_a_torn_table_is_refused(tmp_path):
    path = write_scores(world(), tmp_path / "scores.parquet")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="no complete Parquet"): read_scores(path)


def test_joined_tables_keep_their_words():
    first, second = world(), simulate_scores(lambda *about: 0.5, {"other": 1.0}, items=4, suites=("style",))
    both = join([first, second])
    assert len(both) == len(first) + len(second) and both.names("arm") == ["arm", "other"]
    assert both.where(arm="other").names("suite") == ["style"] and both.where(arm="nobody").names("arm") == []
    assert len(join([])) == 0


def test_a_cell_is_a_whole_rectangle():
    scores = world().where(moment="steps", readout="native", family="binding")
    whole = grid(scores)
    by_hand = [scores.where(seed=seed, kind=kind, item=item).columns["text"][0] for seed, kind, item in ((0, "swap color", 0), (4, "reverse relation", 9))]
    assert whole.values.shape == (5, 30) and [whole.values[0, 0], whole.values[4, 29]] == by_hand
    shuffled = scores.take(np.random.default_rng(0).permutation(len(scores)))
    assert np.array_equal(grid(shuffled).values, whole.values) and np.array_equal(grid(shuffled).items, whole.items)
    with pytest.raises(UserError, match="seed 0 lacks 2 of 30"): grid(scores.take(slice(2, None)))
    with pytest.raises(UserError, match="more than once"): grid(join([scores, scores]))
    with pytest.raises(UserError, match="no scores"): grid(scores.where(arm="nobody"))
    with pytest.raises(UserError, match="metric 'words'"): grid(scores, "words")


def test_scores_lacking_a_column_are_named():
    with pytest.raises(UserError, match="'moment'"): make_scores({"arm": ["a"]})


# ---- intervals

def test_mean_squares_are_those_of_least_squares():
    values = np.random.default_rng(0).random((4, 7))
    row, column = np.indices(values.shape).reshape(2, -1)
    def left(*blocks):
        design = np.hstack([np.ones((28, 1)), *blocks])
        return np.square(values.reshape(-1) - design @ np.linalg.lstsq(design, values.reshape(-1), rcond=None)[0]).sum()
    rows, columns = np.eye(4)[row], np.eye(7)[column]
    expected = (left(columns) - left(rows, columns)) / 3, (left(rows) - left(rows, columns)) / 6, left(rows, columns) / 18
    assert np.allclose(mean_squares(values), expected)


def test_without_seeds_that_differ_the_components_are_those_of_items():
    values = np.tile(np.random.default_rng(0).random(50), (5, 1))
    found = components(values)
    assert found.seed == 0 and found.rest < 1e-12 and abs(found.item - values[0].var(ddof=1)) < 1e-12
    assert abs(standard_error(mean_squares(values), 5, 50)[0] - values[0].std(ddof=1) / 50**0.5) < 1e-12


def test_equal_items_leave_the_t_test_over_seeds():
    values = np.repeat(np.array([[0.1], [0.3], [0.2], [0.6]]), 30, axis=1)
    error, freedom = standard_error(mean_squares(values), 4, 30)
    assert abs(two_sided(values.mean(), error, freedom) - stats.ttest_1samp(values[:, 0], 0).pvalue) < 1e-9 and freedom == 3


def test_draws_are_the_two_way_resampling_by_hand():
    values = np.random.default_rng(0).random((3, 8))
    by_seed, by_item = np.random.default_rng([0, 3]).multinomial(3, [1 / 3] * 3, 50), np.random.default_rng([1, 8]).multinomial(8, [1 / 8] * 8, 50)
    by_hand = [np.mean([values[seed, item] for seed in np.repeat(range(3), rows) for item in np.repeat(range(8), columns)]) for rows, columns in zip(by_seed, by_item)]
    assert np.allclose(bootstrap_draws(values, 50), by_hand)


def test_one_seed_resamples_items_alone_and_says_so():
    row = (np.random.default_rng(0).random(300) < 0.7).astype(float)
    found, by_t = interval(row[None]), stats.t.interval(0.95, 299, row.mean(), row.std(ddof=1) / 300**0.5)
    assert "one seed" in found.over and abs(found.low - by_t[0]) < 0.01 and abs(found.high - by_t[1]) < 0.01


@pytest.mark.parametrize("value,least", [(1.0, 0.0), (0.0, 0.0), (0.0, -1.0)])
def test_equal_scores_take_wilsons_interval_and_stay_on_the_scale(value, least):
    found, reach_ = interval(np.full((5, 40), value), least=least), wilson(0, 40).high
    assert (found.low, found.high) == (max(least, value - reach_), min(1.0, value + reach_))


def _experiments(gap, seed_sd, times, seeds=5, items=80, base=0.5):
    draw = np.random.default_rng(11)
    for _ in range(times):
        hard, luck = 0.15 * draw.choice([-1, 1], items), draw.normal(0, 0.03, seeds)
        yield [cell(simulate_cell(accuracy, seeds, items, draw, seed_sd, hard, luck)) for accuracy in (base + gap, base)]


@pytest.mark.parametrize("seed_sd", [0.0, 0.04, 0.1])
def test_intervals_of_differences_cover_the_truth(seed_sd):
    found = [interval(paired(*pair).values, least=-1, most=1, draws=500) for pair in _experiments(0.1, seed_sd, 200)]
    covered = np.mean([each.low <= 0.1 <= each.high for each in found])
    assert covered > 0.95 - 3 * (0.95 * 0.05 / 200) ** 0.5


def test_intervals_of_shares_near_the_ceiling_cover_the_truth():
    draw = np.random.default_rng(12)
    found = [interval(simulate_cell(0.92, 5, 60, draw, 0.015).astype(float), draws=500) for _ in range(200)]
    assert np.mean([each.low <= 0.92 <= each.high for each in found]) > 0.95 - 3 * (0.95 * 0.05 / 200) ** 0.5
    assert all(0 <= each.low <= each.value <= each.high <= 1 for each in found)


@pytest.mark.parametrize("seed_sd", [0.0, 0.06])
def test_the_test_cries_wolf_no_more_often_than_it_says(seed_sd):
    cries = np.mean([compare(*pair, draws=400).found for pair in _experiments(0.0, seed_sd, 200)])
    assert cries < 0.05 + 3 * (0.95 * 0.05 / 200) ** 0.5


def test_the_test_finds_what_is_there():
    assert np.mean([compare(*pair, draws=400).found for pair in _experiments(0.2, 0.02, 40)]) > 0.9


# ---- tests and effects

def test_pairs_share_seeds_and_items():
    first, second = cell(np.ones((3, 4)), (0, 1, 2)), cell(np.zeros((3, 4)), (2, 1, 5))
    second.values[0] = [1, 1, 0, 0]  # of seed 2
    assert paired(first, second).seeds == (1, 2) and paired(first, second).values.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    with pytest.raises(UserError, match="share no seed"): paired(first, cell(np.ones((1, 4)), (9,)))
    with pytest.raises(UserError, match="different items"): paired(first, cell(np.ones((3, 5)), (0, 1, 2)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_sign_test(wins, losses):
    assert math.isclose(mcnemar(wins, losses), stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0, rel_tol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_by_its_definition(values):
    found = holm(values)
    for place, value in enumerate(values):
        before = [(len(values) - sum(other < each for other in values)) * each for each in values if each <= value]  # step-down: every smaller one has to fall first
        assert math.isclose(found[place], min(1.0, max(before)), abs_tol=1e-12) and found[place] >= value


def test_adjusted_comparisons_keep_everything_else():
    each = [compare(*pair) for pair in _experiments(0.1, 0.02, 3)]
    done = adjusted(each)
    assert [one.p_holm for one in done] == holm([one.p for one in each]) and [one.p for one in done] == [one.p for one in each]


@settings(max_examples=40, deadline=None)
@given(st.floats(-6, 6), st.integers(1, 60))
def test_tails_of_students_distribution(statistic, freedom): assert math.isclose(tail(statistic, freedom), stats.t.sf(statistic, freedom), rel_tol=1e-7, abs_tol=1e-12)


def test_seed_test_and_odds_by_hand():
    first, second = np.random.default_rng(0).random((2, 6, 30)) < 0.6
    found = seed_test(paired(cell(first), cell(second)))
    assert math.isclose(found["p"], stats.ttest_rel(first.mean(1), second.mean(1)).pvalue, rel_tol=1e-9)
    assert seed_test(cell([[1, 0]])) == {} and seed_test(cell([[1, 0], [0, 1]]))["p"] == 0.0 and seed_test(cell([[1, -1], [-1, 1]]))["p"] == 1.0
    assert odds_ratio(3, 1, 1, 3) == 9 and odds_ratio(5, 0) == 5.5 * 1.5 / (0.5 * 1.5)


def test_equivalence_is_the_interval_of_twice_alpha_and_two_t_tests():
    draw = np.random.default_rng(5)
    for spread, gap in ((0.01, 0.0), (0.05, 0.04), (0.2, 0.0)):
        values = gap + spread * draw.standard_normal((5, 1)) + 0.1 * draw.standard_normal((5, 200))
        error, freedom = standard_error(mean_squares(values), 5, 200)
        by_scipy = max(stats.t.sf((values.mean() + 0.05) / error, freedom), stats.t.cdf((values.mean() - 0.05) / error, freedom))
        found = equivalence(values, 0.05)
        assert abs(found["p"] - by_scipy) < 1e-9 and found["equivalent"] == (by_scipy <= 0.05 and -0.05 < found["low"] and found["high"] < 0.05)
    with pytest.raises(UserError, match="no smallest effect"): equivalence(values, 0)
    assert equivalence(np.zeros((5, 400)), 0.05)["equivalent"] and not equivalence(np.zeros((5, 20)), 0.05)["equivalent"]  # 20 equal items prove little


# ---- power

def test_power_is_the_noncentral_t_and_grows():
    for threshold, shift, freedom in ((2.776, 1.5, 4), (2.0, 4.0, 50), (3.2, 0.0, 3)):
        assert abs(beyond(threshold, shift, freedom) - (stats.nct.sf(threshold, freedom, shift) + stats.nct.cdf(-threshold, freedom, shift))) < 1e-5
    parts = Components(0.02**2, 0.01, 0.3, 5, 100)
    assert power(0.05, parts, 3, 200) < power(0.05, parts, 5, 200) < power(0.05, parts, 5, 800) < power(0.1, parts, 5, 800)
    assert abs(power(detectable(parts, 8, 300), parts, 8, 300) - 0.8) < 1e-4 and abs(power(1e-9, parts, 8, 300) - 0.05) < 1e-3
    more = [detectable(parts, 5, items) for items in (1000, 10**6)]
    assert more[1] > 0.5 * more[0]  # items cannot make up for seeds


# ---- curves

@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_rising_is_isotonic_regression(values): assert np.allclose(rising(np.array(values)), IsotonicRegression().fit_transform(np.arange(len(values)), values))


def _curve(values, samples=(100, 200, 400, 800)): return Curve(np.array(samples), np.array(samples, dtype=float), 3.0 * np.array(samples), np.asarray(values, dtype=float), tuple(range(len(values[0]))))


def test_levels_are_reached_for_good_or_not_at_all():
    places = np.array([0, 100, 200, 400])
    assert reach(places, [0.0, 0.5, 0.9, 1.0], 0.25) == 50  # from nothing, in a straight line
    assert float(reach(places, [0.1, 0.5, 0.9, 1.0], 0.7)) == pytest.approx(100 * 2**0.5) and reach(places, [0.1, 0.5, 0.9, 1.0], 1.0) == 400
    assert reach(places, [0.1, 0.95, 0.2, 0.3], 0.9) == np.inf and reach(places, [0.9, 0.95, 0.9, 1.0], 0.9) == 0
    found = milestones(_curve(np.broadcast_to(np.array([0, 0, 1, 1])[:, None, None], (4, 2, 5))), (0.5,))
    assert [row["value"] for row in found] == pytest.approx([200 * 2**0.5, 600 * 2**0.5]) and told(found[0]) == "283"
    never = milestones(_curve(np.zeros((4, 2, 5))), (0.5,))[0]
    assert told(never) == "not reached by 800" and never["by_seed"] == {0: math.inf, 1: math.inf}
    assert told(milestones(_curve(np.ones((4, 2, 5))), (0.5,))[0]) == "by 100"


def test_area_is_the_trapezoid_over_logarithms():
    places, heights = np.array([1.0, 3.0, 20.0, 50.0]), np.random.default_rng(0).random(4)
    assert float(area(places, heights)) == pytest.approx(np.trapezoid(heights, np.log(places)) / math.log(50))
    assert float(area(np.array([0.0, *places]), np.array([0.9, *heights]))) == pytest.approx(float(area(places, heights)))
    fine = np.geomspace(2, 30, 20_001)
    assert float(area(places, heights, 2, 30)) == pytest.approx(np.interp(np.log(fine), np.log(places), heights).mean(), abs=1e-3)
    with pytest.raises(UserError, match="some width"): area(places, heights, 30, 30)
    with pytest.raises(UserError, match="two measured moments"): area([5.0], [1.0])


def test_lag_says_who_never_arrives():
    early, late, never = (_curve(np.broadcast_to(np.array(each)[:, None, None], (4, 2, 5))) for each in ([0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]))
    assert lag(early, late, 0.5)["value"] == pytest.approx(4) and lag(never, late, 0.5)["value"] is None
    assert math.isinf(lag(early, never, 0.5)["value"]) and lag(early, never, 0.5)["at_least"] == pytest.approx(800 / (100 * 2**0.5))


def test_a_curve_of_unlike_moments_is_refused():
    scores = simulate_scores(lambda *about: 0.5, {"arm": 1.0}, items=5, curve=(10, 20)).where(family="atom")
    assert curve(scores).values.shape == (2, 5, 20) and curve(scores).samples.tolist() == [640, 1280]
    damaged = join([scores.where(step=10, seed=[0, 1]), scores.where(step=20)])
    with pytest.raises(UserError, match="same steps"): curve(damaged)
    with pytest.raises(UserError, match="along training"): curve(scores.where(moment="steps"))


# ---- readouts

def at(low, high): return Interval((low + high) / 2, low, high, 0.01, 10, 5, 100)


@pytest.mark.parametrize("atoms,learned,verdict", [
    (at(.8, .9), at(-.3, -.1), "lost"), (at(.2, .3), at(.1, .2), "no verdict"), (at(.8, .9), at(.01, .2), "gained"), (at(.8, .9), at(-.04, .04), "no gain"), (at(.8, .9), at(-.04, .06), "open"), (at(.8, .9), at(-.2, .01), "no gain"),
    (None, None, "no verdict"), (None, at(.1, .2), "no verdict"), (at(.8, .9), None, "no verdict")])
def test_the_rule_of_the_verdict(atoms, learned, verdict): assert readout_verdict(atoms, learned, 0.25, 0.05)[0] == verdict


def test_a_verdict_of_one_seed_says_so():
    alone = Interval(0.1, 0.05, 0.15, 0.01, 10, 1, 100)
    assert readout_verdict(at(.8, .9), alone, 0.25, 0.05) == ("gained", "the training put it into the tokens (one seed: of these two models only)")
    assert readout_verdict(at(.8, .9), None, 0.25, 0.05)[1] == "no untrained encoder to compare with"


def test_a_bag_of_words_binds_nothing_and_knows_its_atoms():
    truth = lambda arm, readout, suite, family, kind, step: 0.85 if family == "atom" else 0.7 if arm == "untrained" else CHANCE["text"]
    scores = simulate_scores(truth, {"bag": 1.0, "untrained": 1.0}, items=200, seed_sd=0.01, item_sd=0.1)
    bag, bare = (scores.where(moment="steps", arm=arm) for arm in ("bag", "untrained"))
    row = readout_row(bag, untrained=bare)
    assert row["verdict"] == "lost" and row["cells"]["native", "binding"].low < 0.25 < row["cells"]["native", "binding"].high and row["cells"]["native", "atom"].low > 0.7
    assert set(row["cells"]) == {(readout, family) for readout in ("native", "linear", "attention") for family in KINDS} and row["learned"].value < -0.3 and abs(row["gain"].value) < 0.1
    assert readout_row(bag)["verdict"] == "no verdict" and readout_row(bag.where(readout="native"), untrained=bare)["sentence"] == "no attention probe was measured"
    assert readout_row(bag.where(seed=[0, 1]), untrained=bare.where(seed=[3, 4]))["learned"] is None


# ---- pairs of curves

def test_two_curves_are_compared_over_what_they_share():
    early, late = _curve(np.broadcast_to(np.array([0, 0.5, 1, 1])[:, None, None], (4, 2, 5))), _curve(np.broadcast_to(np.array([0, 0, 0.5, 1])[:, None, None], (4, 2, 5)))
    short = Curve(late.steps[1:], late.samples[1:], late.gflops[1:], late.values[1:], late.seeds)
    found = paired_areas(early, short)
    assert found["span"] == (float(short.samples[0]), float(early.samples[-1])) and found["value"] == found["first"] - found["second"] == pytest.approx(area(early.samples, [0, 0.5, 1, 1], *found["span"]) - area(short.samples, [0, 0.5, 1])) and found["low"] <= found["value"] <= found["high"]
    apart = Curve(late.steps, late.samples * 1000, late.gflops, late.values, late.seeds)
    assert shared_span(early, apart) is None and paired_areas(early, apart) is None and paired_areas(early, Curve(late.steps, late.samples, late.gflops, late.values, (7, 8))) is None


def test_curves_that_differ_by_luck_of_seeds_alone_are_paired():
    draw = np.random.default_rng(0)
    luck = draw.random((1, 5, 40)) * 0.5
    first, second = (_curve(np.clip(luck + np.linspace(0, 0.4, 4)[:, None, None] + shift, 0, 1)) for shift in (0.05, 0.0))
    found = paired_areas(first, second)
    assert found["high"] - found["low"] < 1e-6 and found["value"] == pytest.approx(0.05)


def test_items_of_one_scene_can_be_one_unit():
    values = np.random.default_rng(1).random((4, 30))
    gap = Grid(np.concatenate([values, values], 1), (0, 1, 2, 3), np.concatenate([np.arange(30), np.arange(30) + 100_000 + (1 << 32)]))
    apart, together = clustered_error(gap)
    assert together == pytest.approx(standard_error(mean_squares(values), 4, 30)[0]) and apart < together
    assert clustered_error(Grid(gap.values[:, :50], gap.seeds, gap.items[:50])) is None


def test_the_simulated_plan_could_be_run():
    from vugen.experiment.plans import check_plan
    assert check_plan(simulate_plan({"contrastive": 1.0, "contrastive+sham": 2.0, "contrastive+pixels": 2.0}))["arms"]["contrastive+sham"]["equal_flops"] == 500
