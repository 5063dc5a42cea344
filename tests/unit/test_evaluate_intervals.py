"""Intervals against published values, their own defining equation and simulation."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vugen.errors import UserError
from vugen.evaluate import intervals
from vugen.evaluate.intervals import bootstrap_mean, wilson


@pytest.mark.parametrize("successes,n,low,high", [(81, 263, .2553, .3662), (15, 148, .0624, .1605), (0, 20, 0, .1611), (1, 29, .0061, .1718)])
def test_wilson_matches_newcombe_1998_table_1(successes, n, low, high):
    got = wilson(successes, n)
    assert got.low == pytest.approx(low, abs=6e-5) and got.high == pytest.approx(high, abs=6e-5)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilson_ends_solve_the_score_equation(n, share):
    right = round(share * n)
    got, z = wilson(right, n), 1.959963984540054
    for end in (got.low, got.high):
        if 1e-9 < end < 1 - 1e-9:
            assert (got.value - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / n, rel=1e-6)
    mirror = wilson(n - right, n)
    assert got.low == pytest.approx(1 - mirror.high, abs=1e-12) and 0 <= got.low <= got.value <= got.high <= 1


@pytest.mark.parametrize("successes,n", [(1, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(UserError): wilson(successes, n)


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    estimates = [bootstrap_mean(generator.exponential(1.0, 80), samples=300, seed=trial) for trial in range(300)]
    assert 0.89 < np.mean([estimate.low <= 1.0 <= estimate.high for estimate in estimates]) < 0.98


def test_bootstrap_is_a_pure_function_of_its_seed():
    values = np.random.default_rng(1).normal(size=50)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    same = bootstrap_mean([2.0] * 7)
    assert (same.value, same.low, same.high, same.n) == (2.0, 2.0, 2.0, 7)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_values_without_a_mean_are_refused(values):
    with pytest.raises(UserError): bootstrap_mean(values)


def test_a_mean_over_pairs_holds_the_known_mean_difference_of_a_normal_distribution():
    from scipy.stats import bootstrap  # what was done before: items' means as if they were independent
    random, truth, held = np.random.default_rng(3), 2 / np.pi**0.5, [0, 0]
    for _ in range(300):
        points = random.normal(size=10)
        table = np.abs(points[:, None] - points)
        found = intervals.pairwise_mean(table)
        naive = bootstrap((table.sum(1) / 9,), np.mean, n_resamples=200, method="percentile", random_state=random).confidence_interval
        held[0] += found.low <= truth <= found.high; held[1] += naive.low <= truth <= naive.high
    assert held[0] > 265 and held[1] < 225
    assert found.value == pytest.approx(table[np.triu_indices(10, 1)].mean())
    for wrong in (table[:2, :2], table[:3], np.full((4, 4), np.nan)):
        with pytest.raises(UserError): intervals.pairwise_mean(wrong)


@pytest.mark.parametrize("judge", ["manifold_scores", "kernel_distance", "subset_kid", "cmmd", "frechet_distance", "FrechetTo", "moments"])
def test_features_that_are_not_finite_are_refused_by_every_metric(judge):
    from vugen.evaluate import fidelity, kernels, manifolds, reference
    good = np.random.default_rng(0).normal(size=(5000, 8)).astype(np.float32)
    bad = good.copy()
    bad[4321, 2] = np.nan
    call = next(getattr(module, judge) for module in (manifolds, kernels, fidelity, reference) if hasattr(module, judge))
    for first, second in ((bad, good), (good, bad)):
        with pytest.raises(UserError, match="row 4321 of 5000 features is not finite"):
            if judge == "FrechetTo": call(*reference.moments(second[:4000]))(first) if first is bad else call(*reference.moments(second))
            elif judge == "moments": call(bad)
            else: call(first, second)
