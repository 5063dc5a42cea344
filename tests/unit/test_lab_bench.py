"""Speed tables: cases and refusals, what is counted, what is compared, and the file that is written."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vugen.decode.pixel_diffusion import PixelDiffusionDecoder, gflops_per_image
from vugen.errors import UserError
from vugen.generate.mixture_of_transformers import flops_per_token
from vugen.lab import bench
from vugen.lab.bench import (
    Bench, Case, NotMeasured, VARIANTS, alternate, bench_rows, check_bench, decoder_sizes, decoder_work, first_call, generator_work, in_child, load_decoder, load_mixture, main,
    measure, mixture_gflops, plan, prepare, read_words, resident_growth, rows_of, wide_rows)

FOUND = {"pictures_per_second": 10.0, "milliseconds_per_step": 100.0, "matrix_gflops": 50.0, "share": 0.5, "peak_mib": None, "noise_milliseconds": 1.0, "ratio": 2.0, "difference": 1e-6}


def told(size="smoke", batch=2, steps=1, variant="plain", prompts=""):
    return Case("generator" if prompts else "decoder", size, batch, steps, variant, prompts)


def test_every_combination_once():
    cases = plan("generator", "tiny", (1, 8), (4, 8), VARIANTS["generator"])
    assert len(cases) == len(set(cases)) == len(set(map(str, cases))) == 2 * 2 * 4 * 2


@pytest.mark.parametrize("words", [dict(name="soup"), dict(name="decoder", batches=()), dict(name="decoder", batches=(0,)), dict(name="decoder", steps=(0,)), dict(name="decoder", seconds=0.0),
                                   dict(name="decoder", weights="gold"), dict(name="generator", compile_mode="fast"), dict(name="decoder", threads=0), dict(name="decoder", limit=0)])
def test_impossible_options_are_refused(words):
    with pytest.raises(UserError): check_bench(Bench(**words))


@pytest.mark.parametrize("words", [dict(name="decoder", size="huge"), dict(name="generator", size="M"), dict(name="decoder", variants=("fp8",)), dict(name="generator", variants=("channels_last",))])
def test_unknown_sizes_and_variants_are_refused_before_anything_is_measured(words, monkeypatch):
    monkeypatch.setattr(bench, "in_child", lambda *words, **options: pytest.fail("measured"))
    with pytest.raises(UserError): bench_rows(Bench(**words))


def test_operations_grow_with_batch_and_steps():
    one = decoder_work(told(batch=1), weights="random").gflops
    assert decoder_work(told(batch=3, steps=2), weights="random").gflops == pytest.approx(6 * one)
    assert one == pytest.approx(gflops_per_image(load_decoder("smoke", weights="random")), rel=0.01)  # a fused attention kernel hides its products from the counter


def test_the_published_decoder_is_the_one_that_is_built():
    with torch.device("meta"): ours = PixelDiffusionDecoder(**decoder_sizes("M"))
    assert sum(value.numel() for value in ours.parameters()) / 1e6 == pytest.approx(48, rel=0.03)


def test_operations_of_the_tower_by_arithmetic():
    mixture = load_mixture("smoke")
    step, reading = mixture_gflops(mixture, 2)
    tower, layers, width = flops_per_token(mixture.tower) * 64, len(mixture.tower.layers), mixture.decoder.config.hidden_size
    attention = sum(layers * 4 * 64 * (64 + length) * width for length in (bench.PROMPT_TOKENS, 1))
    assert step * 1e9 == pytest.approx(2 * (2 * tower + attention), rel=0.05)
    assert 0 < reading < step


def test_recomputing_costs_a_reading_a_step():
    work = {way: generator_work(told(steps=5, prompts=way)) for way in ("cached", "recomputed")}
    reading = mixture_gflops(load_mixture("smoke"), 2)[1]
    assert work["recomputed"].gflops - work["cached"].gflops == pytest.approx(4 * reading)


def test_the_trained_decoder_of_tiny_is_taken():
    from vugen.paths import checkpoints_dir
    if not (checkpoints_dir() / "decoder").is_dir(): pytest.skip("no embedded decoder in this checkout")
    assert load_decoder("tiny").config == load_decoder("tiny", weights="embedded").config
    assert load_decoder("tiny", weights="random").config["latent_dim"] == load_decoder("tiny").config["latent_dim"]


@pytest.mark.parametrize("load", [lambda: load_decoder("smoke", weights="random"), lambda: load_mixture("smoke")])
def test_random_models_are_the_same_each_time_and_never_silent(load):
    first, second = load().state_dict(), load().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.any() for name, value in first.items() if value.ndim > 1)


def test_channels_last_changes_no_picture():
    work = decoder_work(told(batch=3, steps=2), weights="random")
    with torch.no_grad():
        plain = work.sample(*prepare(work.load(), set()), set())
        moved = work.sample(*prepare(work.load(), {"channels_last"}), {"channels_last"})
    assert (plain - moved).abs().max() < 1e-4 and plain.std() > 0.05


@pytest.mark.parametrize("work", [lambda: decoder_work(told(), weights="random"), lambda: generator_work(told(prompts="cached"))])
def test_bf16_stays_near_fp32(work):
    work = work()
    with torch.no_grad():
        plain = work.sample(*prepare(work.load(), set()), set())
        half = work.sample(*prepare(work.load(), {"bf16"}), {"bf16"})
    assert half.dtype == torch.float32 and 0 < (plain - half).abs().max() < 0.1


def test_a_busy_machine_changes_no_ratio():
    calls = []
    def slow(name, seconds): calls.append(name); time.sleep(seconds * (3 if len(calls) > 12 else 1))
    found = alternate({"one": lambda: slow("one", 0.002), "two": lambda: slow("two", 0.004)}, 0.06)
    assert calls[::2] == ["one"] * (len(calls) // 2) and 1.2 < found["two"] / found["one"] < 3


def test_memory_is_seen_although_it_is_given_back():
    grown = resident_growth(lambda: bytearray(50_000_000).count(1))
    assert grown is None or 45e6 < grown < 80e6
    after = resident_growth(lambda: None)
    assert after is None or after < 5e6


def test_the_cached_line_carries_the_ratio():
    found = measure(told(prompts="cached", steps=3), seconds=0.02)
    assert found["ratio"] > 0 and "difference" not in found
    again = measure(told(prompts="recomputed", steps=3), seconds=0.02)
    assert again["difference"] < 1e-5 and "ratio" not in again


def test_a_processor_without_bf16_says_so(monkeypatch):
    monkeypatch.setattr("vugen.train.loop.multiplies_bf16", lambda: False)
    with pytest.raises(NotMeasured, match="bf16"): measure(told(variant="bf16"), weights="random")


def test_no_compiler_is_told_in_words():
    def broken(): raise RuntimeError("No working C++ compiler found in cxx: (None, 'g++')")
    with pytest.raises(NotMeasured, match="torch.compile does not work here .*compiler"): first_call(broken, {"compile"})
    with pytest.raises(RuntimeError): first_call(broken, set())


def test_a_process_that_dies_or_dawdles_is_a_line_of_the_table(monkeypatch):
    real = subprocess.run
    def instead(code): return lambda words, **options: real([sys.executable, "-c", code], **options)
    monkeypatch.setattr(bench.subprocess, "run", instead("import os; os.kill(os.getpid(), 9)"))
    assert "memory" in in_child(told())["reason"]
    monkeypatch.setattr(bench.subprocess, "run", instead("raise SystemError('no bananas')"))
    assert "no bananas" in in_child(told())["reason"]
    monkeypatch.setattr(bench.subprocess, "run", instead("import time; time.sleep(9)"))
    assert "longer than" in in_child(told(), limit=0.5)["reason"]


def test_rows_keep_the_shape_of_every_bench():
    rows = rows_of(told(), FOUND) + rows_of(told(size="M"), {"reason": "no GPU was used here"}, "cuda")
    assert all({"case", "metric", "value", "unit", "ratio_to"} <= set(row) for row in rows)
    assert rows[0]["ratio_to"] == {"plain": 2.0} and not any(row["metric"] == "peak memory" for row in rows)
    assert rows[-1]["value"] is None and rows[-1]["note"].startswith("not measured")
    lines = wide_rows(rows)
    assert len(lines) == 2 and list(lines[0]) == list(lines[1]) and lines[1]["pictures/s"] == "not measured"


def test_without_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "in_child", lambda case, **options: FOUND)
    monkeypatch.setitem(sys.modules, "tyro", None)
    target = tmp_path / "rows.json"
    main(["decoder", "--size", "smoke", "--batches", "1", "8", "--steps", "1", "--variants", "plain", "compile", "--device", "cpu", "--json", str(target)])
    found = json.loads(target.read_text())
    assert set(found) == {"device", "run", "rows"} and found["run"]["command"].startswith("vugen bench decoder")
    assert len({row["case"] for row in found["rows"]}) == 4 + 1 and "not measured" in capsys.readouterr().out


def test_what_is_measured_outlives_an_interruption(tmp_path, monkeypatch):
    answers = iter([FOUND])
    monkeypatch.setattr(bench, "in_child", lambda case, **options: next(answers))
    with pytest.raises(StopIteration): main(["decoder", "--size", "smoke", "--batches", "1", "--steps", "1", "--variants", "plain", "bf16", "--device", "cpu", "--json", str(tmp_path / "rows.json")])
    assert {row["variant"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]} == {"plain"}


def test_both_readers_make_the_same():
    from vugen.lab.cli import read_verb
    words = ["generator", "--batches", "1", "8", "--variants", "bf16", "--compile-mode", "max-autotune", "--seconds", "2", "--threads", "3"]
    assert read_words(words) == read_verb(["bench", *words])


def test_a_process_of_its_own_names_what_it_does_not_know():
    found = in_child(told(size="soup"), weights="random")
    assert "soup" in found["reason"]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("VUGEN_SLOW") != "1", reason="compiles for minutes: set VUGEN_SLOW=1")
def test_compiled_pictures_are_the_same():
    assert in_child(told(variant="compile"), weights="random", seconds=0.1)["difference"] < 1e-4


def test_importing_needs_no_torch():
    words = "import sys, vugen.lab.bench; assert 'torch' not in sys.modules and 'tyro' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", words], cwd=Path(bench.__file__).parents[2], timeout=60).returncode == 0
