"""The benchmark scripts: the list of rows, compare.py on the CPU from end to end, the pages that report.py writes."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import candidates
import compare
import compare_errors
import host_time
import report
import report_gpu
import result_file
import rows
import training
from reference import gated_delta_rule

ROOT = Path(__file__).parents[2]


def test_rows_are_read() -> None:
    listed = {row.name: row for row in rows.rows()}
    assert listed["forward/16/64/4x8192"].lengths == (8192,) * 4
    assert (listed["forward/16/64/4x8192"].must_ms, listed["forward/16/64/4x8192"].aim_ms) == (0.56, 0.42)
    assert len(listed["forward/16/32/mix24"].lengths) == 24
    assert listed["forward/16/32/tail80"].tokens == 27680
    step = listed["step/16/32/8x4/bfloat16/v_first"]
    assert (step.lengths, step.state_type, step.layout) == ((4,) * 8, "bfloat16", "v_first")
    for heads in report_gpu.GRID_HEADS:
        assert sum(name.startswith(f"forward/{heads}/") for name in listed) >= 14
    with pytest.raises(ValueError, match="invalid literal"):
        rows.parse_lengths("4x")


@pytest.mark.parametrize("name", ["forward/2/8/1x512", "step/16/32/1x4/bfloat16/v_first", "backward/2/4/1101+7091"])
def test_data_is_what_the_row_says(name: str) -> None:
    row = next(r for r in rows.rows() if r.name == name)
    if row.operation == "step":
        d = candidates.step_data(row, "cpu")
        assert d.pool.shape == (2, 32, 128, 128)
        assert d.pool.dtype == torch.bfloat16
        first = d.states()
        first[0].zero_()
        assert d.pool.any()  # calls change copies
        return
    d = candidates.data(row, "cpu")
    assert d.q.shape == (1, row.tokens, row.H, 128)
    assert d.cu_seqlens.tolist()[-1] == row.tokens
    torch.testing.assert_close(d.k.float().norm(dim=-1), torch.ones(1, row.tokens, row.H), atol=0.01, rtol=0)
    assert not d.g[..., ::4].any()
    assert (d.g[..., 1::4] < 0).all()
    assert ((d.beta > 0) & (d.beta < 1)).all()


def test_speed_is_measured_and_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "compare.json"
    step = r"step/16/32/1x1/bfloat16/v_first$"
    command = ["speed", "--device", "cpu", "--output", str(output), "--filter"]
    assert compare.main([*command, rf"^(forward/2/8/1x512|{step})"]) == 0
    said = capsys.readouterr().out
    assert "flashinfer: left out, needs a CUDA device" in said
    assert "2 rows measured" in said
    first = json.loads(output.read_text())
    entries = {entry["name"]: entry for entry in first["benchmarks"]}
    assert set(entries) == {
        "forward/2/8/1x512/flashdelta",
        "forward/2/8/1x512/flashdelta_whole",
        "step/16/32/1x1/bfloat16/v_first/flashdelta",
    }
    for entry in entries.values():
        assert 0 < entry["p10_us"] <= entry["real_time"] <= entry["p90_us"]
        assert entry["difference"] == 0
    assert first["context"]["commit"] == result_file.commit()
    assert compare.main([*command, rf"^(forward/2/8/1x(512|1024)|{step})"]) == 0
    assert "1 rows measured" in capsys.readouterr().out
    second = {entry["name"]: entry for entry in json.loads(output.read_text())["benchmarks"]}
    assert second["forward/2/8/1x512/flashdelta"] == entries["forward/2/8/1x512/flashdelta"]
    assert "forward/2/8/1x1024/flashdelta" in second
    assert compare.main([*command, "forward/2/8/1x2048", "--seconds", "-1"]) == 0
    assert "0 rows measured, 1 left for lack of time" in capsys.readouterr().out


def test_host_times_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, threads = tmp_path / "host_time.json", torch.get_num_threads()
    try:
        assert host_time.main(["--device", "cpu", "--output", str(output), "--processes", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    entries = {entry["name"]: entry for entry in json.loads(output.read_text())["benchmarks"]}
    assert len(entries) == len(capsys.readouterr().out.splitlines()) - 1
    for entry in entries.values():
        assert 0 < entry["p10_us"] <= entry["real_time"] <= entry["p90_us"]
    forward = {name: entries[f"host/forward/1x512{name}"]["real_time"] for name in ("", "/key", "/allocation", "/pack")}
    assert sum(forward.values()) < 2 * forward[""]
    assert entries["host/first call/done"]["real_time"] >= entries["host/first call/returned"]["real_time"]


def test_a_candidate_that_fails_is_a_result(tmp_path: Path) -> None:
    class Broken:
        version = "0"

        def forward(self, d: Any) -> Any:
            raise RuntimeError("no such kernel")

    class Wrong(candidates.Flashdelta):
        def forward(self, d: candidates.Data) -> Any:
            call = super().forward(d)
            return lambda: tuple(2 * x for x in call())

    row = next(r for r in rows.rows() if r.name == "forward/2/8/1x512")
    results = result_file.Results(tmp_path / "r.json", {"commit": "x"}, again=True)
    found = {"flashdelta": candidates.Flashdelta("cpu"), "flash_qla": Broken(), "fla": Wrong("cpu")}
    compare.measure_row(row, found, "cpu", results)
    assert results.benchmarks[f"{row.name}/flash_qla"]["error_message"] == "RuntimeError: no such kernel"
    assert results.benchmarks[f"{row.name}/fla"]["difference"] == pytest.approx(1)
    shown = compare.line(row, results)
    assert "flash_qla failed (RuntimeError: no such kernel)" in shown
    assert "differs by 1.0e+00" in shown
    assert not results.has(f"{row.name}/flash_qla")


def test_errors_are_small_and_found(tmp_path: Path) -> None:
    output = tmp_path / "errors.json"
    options = ["--device", "cpu", "--seeds", "2", "--lengths", "9", "20", "--candidates", "flashdelta"]
    assert compare.main(["errors", "--output", str(output), *options]) == 0
    entries = {entry["name"]: entry for entry in json.loads(output.read_text())["benchmarks"]}
    for kind in compare_errors.KINDS:
        for dtype, limit in (("bfloat16", 4e-3), ("float16", 5e-4)):
            entry = entries[f"errors/{kind}/{dtype}/flashdelta"]
            assert entry["iterations"] == 2
            assert all(0 < entry[result] < limit for result in compare_errors.RESULTS), entry
    d = compare_errors.error_data("random", 0, "cpu", torch.bfloat16, (5, 9))
    expected = compare_errors.truth(d)
    o = expected["o"].clone()
    o[0, 7, 3] *= 2  # one head of one token
    assert compare_errors.worst_error("o", o, expected["o"], d) > 0.1
    o[0, 0, 0, 0] = math.nan
    assert compare_errors.worst_error("o", o, expected["o"], d) == compare_errors.HUGE


def test_a_failing_candidate_leaves_the_errors_of_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def forward(self, d: Any) -> Any:
            raise RuntimeError("no such kernel")

    class Best(candidates.Flashdelta):
        def forward(self, d: candidates.Data) -> Any:
            expected = compare_errors.truth(d)
            return lambda: (expected["o"], expected["final_state"])

    results = result_file.Results(tmp_path / "e.json", {"commit": "x"}, again=True)
    found = {"flash_qla": Broken(), "flashdelta": candidates.Flashdelta("cpu"), "flashinfer": Best("cpu")}
    deadline = result_file.Deadline(60)
    assert compare_errors.measure(found, results, "cpu", 1, (3, 5), deadline) == 2 * len(compare_errors.KINDS)
    said = capsys.readouterr().out
    assert "ABOVE errors/decay/bfloat16/flashdelta: final_state" in said
    assert "0 of 6 cells left for lack of time" in said
    assert results.benchmarks["errors/random/bfloat16/flash_qla"]["error_message"] == "RuntimeError: no such kernel"
    assert results.benchmarks["errors/random/bfloat16/flashinfer"]["o"] == 0
    late = result_file.Results(tmp_path / "late.json", {"commit": "x"}, again=True)
    assert compare_errors.measure(found, late, "cpu", 1, (3, 5), result_file.Deadline(-1)) == 0
    assert json.loads(late.path.read_text())["benchmarks"] == []


def test_rows_that_share_compiled_kernels_stand_together() -> None:
    found = {
        "flashdelta": candidates.Flashdelta("cpu"),
        "flash_qla": candidates.FlashQLA,
        "flashinfer": candidates.FlashInfer,
    }
    chosen = compare.rows_to_measure("^(forward|training_forward|backward)/", found)
    assert len(chosen) == len([row for row in rows.rows() if row.operation != "step"])
    groups = [(row.must_ms is None, row.operation, row.H, row.HV) for row, _ in chosen]
    assert len(set(groups)) == sum(a != b for a, b in zip(groups, [None, *groups], strict=False))
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    assert all("flashinfer" not in able for row, able in chosen if row.operation == "backward")
    jobs = compare.compile_jobs([row for row, _ in chosen], found)
    assert {job.peer for job in jobs} == {"flash_qla"}
    assert {job.heads for job in jobs if not job.training} == {tuple(map(int, h.split("/"))) for h in report_gpu.GRID_HEADS}
    assert jobs[0].training
    assert sum(len(job.rows) for job in jobs) == len(chosen)
    late = compare.compile_ahead(jobs[:2], 2, result_file.Deadline(-1))
    assert sorted(late) == sorted(jobs[:2])


def entry(name: str, **counters: Any) -> dict[str, Any]:
    return {"name": name, "real_time": counters.pop("us", 1000.0), "time_unit": "us", **counters}


def test_results_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{i}.json" for i in range(3)]
    first = {"gpu": "H200", "commit": "a", "command": "one"}
    paths[0].write_text(
        json.dumps({"context": first, "benchmarks": [entry("x/iterations:40/manual_time", us=1.0), entry("y", us=2.0)]})
    )
    broken = {"name": "x", "error_occurred": True}
    second = {"gpu": "H200", "commit": "b", "command": "two"}
    paths[1].write_text(json.dumps({"context": second, "benchmarks": [entry("y", us=3.0), broken]}))
    paths[2].write_text(json.dumps({"context": {"gpu": "H100"}, "benchmarks": []}))
    merged = tmp_path / "merged.json"
    assert compare.main(["merge", str(merged), str(paths[0]), str(paths[1])]) == 0
    result = json.loads(merged.read_text())
    assert result["context"]["commands"] == ["one", "two"]
    assert {e["name"]: (e["real_time"], e["commit"]) for e in result["benchmarks"]} == {"x": (1.0, "a"), "y": (3.0, "b")}
    assert compare.main(["merge", str(merged), str(paths[0]), str(paths[2])]) == 1
    assert "H100" in capsys.readouterr().err
    paths[2].write_text('{"context": {"gpu": "H200"')
    assert compare.main(["merge", str(merged), str(paths[0]), str(paths[2])]) == 1
    assert "cut short" in capsys.readouterr().err
    assert len(json.loads(merged.read_text())["benchmarks"]) == 2


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pages and results."""
    pytest.importorskip("matplotlib")
    for name in ("docs", "bench/results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "bench/results" / report.GPU_RESULT).unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", ["report.py"])
    return tmp_path


def test_report_keeps_the_pages_without_gpu_results(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (site / "docs/benchmarks.md").read_text(), (site / "README.md").read_text()
    assert report.main(site) == 0
    assert "h200.json is not there" in capsys.readouterr().out
    assert ((site / "docs/benchmarks.md").read_text(), (site / "README.md").read_text()) == before


def test_report_writes_the_gpu_tables(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "forward/16/64/4x8192"
    single = [entry(f"forward/2/8/1x{T}/{c}", us=T * f) for T in (512, 2048) for c, f in (("flashdelta", 0.1), ("fla", 0.3))]
    benchmarks = [
        entry(name, us=410.0, median_us=400.0, percent_of_floor=92.0, sm_MHz=1500.0),
        entry(f"{name}/cp_off", us=410.0, median_us=430.0),
        entry(f"{name}/flashdelta", us=420.0, host_us=14.0),
        entry(f"{name}/flash_qla", us=1224.0),
        entry(f"{name}/flashinfer", us=735.0),
        {"name": f"{name}/fla", "error_occurred": True, "error_message": "no"},
        entry("step/16/32/8x1/float32/v_first", us=8.0, GB_per_s=4000.0, percent_of_floor=93.0),
        entry("errors/random/bfloat16/fla", us=0.0, o=0.004, final_state=0.0038),
        entry("errors/random/bfloat16/flash_qla", us=0.0, o=0.005, final_state=0.003),
        entry("errors/random/bfloat16/flashdelta", us=0.0, o=0.0042, final_state=0.0032),
        entry("memory/backward/16/32/1x32768/flashdelta", us=0.0, peak_MB=1000.0),
        entry("memory/backward/16/32/1x32768/flash_qla", us=0.0, peak_MB=1500.0),
        entry("training_forward/16/32/1x32768/flashdelta", us=500.0),
        entry("training_forward/16/32/1x32768/flash_qla", us=1200.0),
        entry("backward/16/32/1x32768/flashdelta", us=1500.0),
        entry("backward/16/32/1x32768/flash_qla", us=2400.0),
        entry("host/forward/1x512", us=14.0, p10_us=13.0, p90_us=15.5, after_wait_us=20.0),
        entry("stress/cuda/forward", iterations=10000, alone=3000, compared=625, seed=1, commit="abc"),
        *(
            entry(
                f"training/{path}/0",
                us=9000.0,
                loss=[8.0 - 0.1 * i for i in range(40)],
                held_out=4.5,
                apart=0.01,
                model="small",
            )
            for path in training.PATHS
        ),
        *single,
    ]
    context = {"gpu": "NVIDIA H200", "commit": "abc", "date": "today", "commands": ["one", "two"], "flashdelta": "0.1.0"}
    path = site / "bench/results" / report.GPU_RESULT
    path.write_text(json.dumps({"context": context, "benchmarks": benchmarks}))
    assert report.main(site) == 0
    page, readme = (site / "docs/benchmarks.md").read_text(), (site / "README.md").read_text()
    assert "| 16/64/4x8192 | 0.42 | 1.22 | 0.735 |  | 1.75 | 0.56 / 0.42, aim reached | 92 % |" in page
    assert "| 16/64/4x8192 | 0.4 | 0.43 |  |" in page
    assert "| 16/32/8x1/float32/v_first | 8 |  |  | 4,000 | 93 % |" in page
    assert "| random, bfloat16 | FLA | 4.00e-03 | 3.80e-03 |" in page
    assert "| random, bfloat16 | flashdelta | 4.20e-03 | 3.20e-03 (above) |" in page
    assert "2 of 126 rows have a peer's time, 2 are faster than every peer; geometric mean" in page
    assert (
        "1 of 32 rows have a peer's time, 1 are faster than every peer; geometric mean of the ratio to the fastest" in page
    )
    assert "| FlashQLA | 1,500 |" in page
    assert "| forward/1x512 | 14 | 13 | 15.5 | 20 |" in page
    assert "| 16/32/1x32768 | 2 | 3.6 |  | 1.8 |" in page
    assert "| forward | 10000 | 3000 | 625 | 1 | abc |" in page
    assert "| flashdelta, bf16 | 0 | 5.050 | 4.500 | 0.0100 | 9 |" in page
    assert "(./h200_tokens.svg)" in page
    assert "(./h200_training.svg)" in page
    assert "16/64/4x8192" in readme
    assert "NVIDIA H200" in readme
    assert "random, bfloat16" not in readme
    assert (site / "docs/h200_tokens.svg").exists()
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    assert report.main(site) == 0
    benchmarks[2]["real_time"] = 800.0
    path.write_text(json.dumps({"context": context, "benchmarks": benchmarks}))
    assert report.main(site) == 1
    measured = report_gpu.Measured({"context": context, "benchmarks": benchmarks})
    said = report_gpu._summary(measured, [r for r in rows.rows() if r.name == name], "Forward")
    assert "1 of 1 rows have a peer's time, 0 are faster" in said
    assert f"slower than the fastest peer: {name}" in said


def test_training_paths_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "training.json"
    sizes = ["--steps", "3", "--seeds", "1", "--layers", "1", "--context", "70", "--batch", "2", "--held-out", "2100"]
    assert training.main(["--device", "cpu", "--output", str(output), *sizes]) == 0
    assert "1 of 1 seeds, 0 further apart" in capsys.readouterr().out
    found = {entry["name"]: entry for entry in json.loads(output.read_text())["benchmarks"]}
    assert set(found) == {f"training/{path}/0" for path in training.PATHS}
    ours, plain = found["training/flashdelta/0"], found["training/float32/0"]
    assert len(ours["loss"]) == 3
    assert ours["loss"] != plain["loss"]  # bf16
    assert 0 < ours["apart"] < 0.01
    assert ours["held_out"] == pytest.approx(plain["held_out"], abs=0.01)
    assert training.apart([1.0] * 30, [1.0] * 29 + [3.0]) == pytest.approx(2 / training.SMOOTH)
    assert training.main(["--device", "cpu", "--output", str(output), "--seconds", "-1"]) == 1


def test_the_plain_rule_is_the_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 150, 2, 16)] * 3 + [(2, 150, 2)] * 2 + [(2,)] * 2 + [(2, 2, 16, 16)]
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    q, k, v, g, beta, A_log, dt_bias, state = leaves
    o, final = training.plain_rule(q, k, v, g, beta, A_log, dt_bias, state)
    options = {"A_log": A_log, "dt_bias": dt_bias, "qk_l2norm": True, "beta_logit": True}
    expected, expected_final = gated_delta_rule(q, k, v, g, beta, initial_state=state, **options)
    weight = torch.randn(o.shape, generator=generator)
    torch.testing.assert_close(o.double(), expected, atol=1e-5, rtol=1e-4)
    got = torch.autograd.grad((o * weight).sum() + final.sum(), leaves)
    truth = torch.autograd.grad((expected * weight).sum() + expected_final.sum(), leaves)
    for a, b in zip(got, truth, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()
