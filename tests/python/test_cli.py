"""`python -m flashdelta`: what it prints and how it exits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashdelta
from flashdelta import __main__ as cli


def test_info_lists_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert flashdelta.__version__ in out
    for backend in flashdelta.backends():
        assert backend.name in out
        assert backend.detail in out


def test_check_passes_and_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["check", "--tokens", "70"]) == 0
    out = capsys.readouterr().out
    assert "all errors are within their limits" in out
    assert out.count("backward") == 9
    monkeypatch.setattr(cli, "LIMITS", {dtype: (1e-12, 1e-12, 1e-12) for dtype in cli.LIMITS})
    assert cli.main(["check", "--tokens", "5"]) == 1
    assert "above their limit" in capsys.readouterr().out


def test_a_process_of_its_own() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = [sys.executable, "-m", "flashdelta"]
    done = subprocess.run([*run, "info"], capture_output=True, text=True, env=environment, check=True)
    assert "backends, best first:" in done.stdout
    assert subprocess.run([*run, "nothing"], capture_output=True, env=environment).returncode == 2


def test_bench_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert cli.main(["bench", "--plot", str(tmp_path / "plot.png")]) == 1
    assert "bench needs tqdm" in capsys.readouterr().err
