"The bench of fidelity: shapes of rows, and that both ways compute the same."
import pytest

from vugen.errors import UserError
from vugen.lab.bench import Bench
from vugen.lab.bench_fidelity import MOST_GIB, bench_fidelity, prdc_gib, run_bench, wide


def test_both_compute_the_same_in_processes_of_their_own():
    seen = []
    rows = bench_fidelity((60,), width=16, save=lambda rows: seen.append(len(rows)))
    assert all({"case", "metric", "value", "unit", "ratio_to"} <= set(row) for row in rows) and seen == [len(rows)]
    assert next(row["value"] for row in rows if row["metric"] == "largest difference") < 1e-12
    assert [row["ratio_to"] is None for row in rows if row["metric"] == "processor seconds"] == [True, False] and len(wide(rows)) == 2


def test_what_does_not_fit_is_told():
    assert prdc_gib(10_000) < MOST_GIB < prdc_gib(50_000)


@pytest.mark.parametrize("size", ["many", "5", "100,2"])
def test_impossible_sizes(size):
    with pytest.raises(UserError, match="--size"): run_bench(Bench("fidelity", size=size), "vugen bench fidelity")
