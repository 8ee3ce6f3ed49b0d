"""The scripts for a machine with a GPU, with programs made up for the purpose: limits, logs, what is said at the end."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "PYTHON": sys.executable}
    command = [str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=path | environment, check=False)


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A folder as tools/gpu_pack.sh makes it; its programs only print."""
    folder = tmp_path / "pack"
    programs = {
        "bin/gpu_forward_test": "echo '[  PASSED  ] 3 tests.'",
        "bin/gpu_test": "echo '[  PASSED  ] 0 tests.'; echo '[  SKIPPED ] 9 tests.'",
        "bin/stress": "echo 'WRONG forward'; exit 1",
        "bin/bench_gpu": '[ "$1" != --list ] || { echo forward/1/1/1x1; exit 0; }; echo "$@"',
        "traps/gpu_forward_test": "echo 'barrier 5'; exit 1",
    }
    for name, body in programs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    for name in ("lib", "programs", "site"):
        (folder / name).mkdir()
    (folder / "commit").write_text("abc1234\n")
    return folder


def test_every_step_is_run_and_told(pack: Path, tmp_path: Path) -> None:
    out, archive = tmp_path / "out", tmp_path / "logs.tar.xz"
    done = run(
        "tools/gpu.sh",
        *("--prebuilt", str(pack), "--steps", "smoke,step,forward,stress,bench"),
        *("--out", str(out), "--archive", str(archive)),
    )
    assert done.returncode == 1
    table = [line.split()[:2] for line in (out / "summary.txt").read_text().splitlines()]
    assert table == [
        ["smoke", "passed"],
        ["step", "FAILED"],
        ["forward", "passed"],
        ["stress", "FAILED"],
        ["bench", "passed"],
    ]
    assert "2 of the steps failed" in done.stdout
    assert (out / "stress.log").read_text().count("WRONG") == 3  # one run an operation
    assert (out / "bench.log").read_text().count("--operation=") == 1  # only the forward has rows
    assert f"--benchmark_out={out}/bench-forward.json" in (out / "bench.log").read_text()
    with tarfile.open(archive) as logs:
        assert {"./smoke.log", "./stress.log", "./summary.txt"} <= set(logs.getnames())


def test_a_step_without_time_is_not_begun(pack: Path, tmp_path: Path) -> None:
    done = run(
        "tools/gpu.sh", "--prebuilt", str(pack), "--steps", "forward", "--seconds", "5", "--out", str(tmp_path / "out")
    )
    assert done.returncode == 1
    assert "no time" in done.stdout
    assert not (tmp_path / "out/forward.log").exists()


def test_help_and_wrong_arguments(pack: Path, tmp_path: Path) -> None:
    assert "Usage: tools/gpu.sh" in run("tools/gpu.sh", "--help").stdout
    assert "unknown option --bla" in run("tools/gpu.sh", "--bla", "1").stderr
    wrong = run("tools/gpu.sh", "--prebuilt", str(pack), "--steps", "bla", "--out", str(tmp_path / "out"))
    assert wrong.returncode == 2
    assert "no step bla" in wrong.stdout


def test_peers_are_put_together_from_parts(tmp_path: Path) -> None:
    source = tmp_path / "source/fla"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text("version = 1\n" * 4000)
    (tmp_path / "source/z3.data/platlib").mkdir(parents=True)
    data = tmp_path / "all.tar.xz"
    with tarfile.open(data, "w:xz") as tar:
        tar.add(tmp_path / "source", ".")
    content = data.read_bytes()
    site = tmp_path / "site"
    for i, part in enumerate((content[:100], content[100:])):
        folder = tmp_path / f"part{i}"
        folder.mkdir()
        (folder / f"base.0{i}").write_bytes(part)
        (folder / "base.count").write_text("2\n")
        assert not (site / "fla").exists()
        assert run("bench/peers.sh", "unpack", str(folder), str(site)).returncode == 0
    assert (site / "fla/__init__.py").read_text().startswith("version")
    said = run("bench/peers.sh", "env", str(site)).stdout
    assert said.startswith(f"export PYTHONPATH={site}:")
    assert f"{site}/z3.data/platlib" in said
    assert run("bench/peers.sh").returncode == 2
