"""Every refusal in the check code is made by a call of tests/check_test.cpp: gcov says so."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["api", "check", "plan"]


def lines_never_run(report: str) -> set[int]:
    """Line numbers of a gcov text report that ran in no instance of a template; a line of several instances is listed
    once in all and once for each."""
    most: dict[int, int] = {}
    for count, number in re.findall(r"^ *([0-9]+|#####|=====)\*?: *([0-9]+):", report, re.MULTILINE):
        most[int(number)] = max(most.get(int(number), 0), 0 if count[0] in "#=" else int(count))
    return {number for number, count in most.items() if count == 0}


def test_every_refusal_is_made_by_a_test(tmp_path: Path) -> None:
    library = Path(os.environ["FLASHDELTA_LIBRARY"]).parent / "libflashdelta_static.a"
    flags = ["g++", "-std=c++20", "-O0", "--coverage", "-fopenmp", f"-I{ROOT}", f"-I{ROOT}/include", f"-I{ROOT}/src"]
    objects = [f"{name}.o" for name in SOURCES]
    for name in SOURCES:
        subprocess.run([*flags, "-c", f"{ROOT}/src/{name}.cpp", "-o", f"{name}.o"], cwd=tmp_path, check=True)
    test = [f"{ROOT}/tests/check_test.cpp", *objects, str(library), "-lgtest_main", "-lgtest", "-lpthread", "-o", "check"]
    subprocess.run([*flags, *test], cwd=tmp_path, check=True)
    subprocess.run(["./check", "--gtest_brief=1"], cwd=tmp_path, check=True)
    refusals = 0
    for name in SOURCES:
        report = subprocess.run(
            ["gcov", "-t", f"{name}.gcda"], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout
        begin = report.index(f"Source:{ROOT}/src/{name}.cpp")
        end = report.find("0:Source:", begin + 1)
        missed = lines_never_run(report[begin : end if end > 0 else None])
        for number, line in enumerate((ROOT / f"src/{name}.cpp").read_text().splitlines(), 1):
            if "refuse(" in line:
                refusals += 1
                assert number not in missed, f"src/{name}.cpp:{number} is never reached: {line.strip()}"
    assert refusals > 50, "the check code was not found"
