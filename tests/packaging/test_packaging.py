"""What a user gets: the C header, the installed library, the wheel, and a README whose code runs."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"
HEADER = ROOT / "include/flashdelta/flashdelta.h"

# What the library may need at run time. ld-linux is libc's; libgomp is the compiler's OpenMP. libstdc++ and libgcc stay shared:
# Debian 12's static ones need glibc 2.36 (arc4random, _dl_find_object), the library itself 2.29.
ALLOWED = {
    "libc.so.6",
    "libm.so.6",
    "libpthread.so.0",
    "libgomp.so.1",
    "ld-linux-x86-64.so.2",
    "libstdc++.so.6",
    "libgcc_s.so.1",
}


def run(*command: object, **options: object) -> str:
    """Runs a command; its output, or a failure that shows it."""
    environment = options.pop("env", None) or os.environ
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, **options)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}"
    return result.stdout


def needed(library: Path) -> set[str]:
    """The shared libraries that `library` needs."""
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", library)))


def version() -> str:
    return ".".join(re.findall(r"#define FD_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", HEADER.read_text()))


def test_header_is_c99_with_frozen_sizes_and_offsets() -> None:
    abi = ROOT / "tests/packaging/abi.c"
    run("cc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{ROOT}/include", abi)
    run("c++", "-x", "c++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{ROOT}/include", abi)
    text = HEADER.read_text()
    structs = dict(re.findall(r"typedef struct (\w+) \{(.*?)\n\} \w+;", text, re.S))
    frozen = abi.read_text()
    for name, body in structs.items():
        for member in re.findall(r"(\w+)(?:\[\d+\])?\s*;", re.sub(r"/\*.*?\*/", "", body, flags=re.S)):
            assert f"OFFSET({name}, {member}, " in frozen, f"tests/packaging/abi.c lacks {name}.{member}"
        assert f"SIZE({name}, " in frozen
    for name in re.findall(r"\b(FD_[A-Z0-9_]+) = \d+", text):
        assert f"VALUE({name}, " in frozen, f"tests/packaging/abi.c lacks {name}"


def test_library_exports_the_header_and_nothing_else() -> None:
    library = BUILD / "release/libflashdelta.so"
    exported = set(re.findall(r"^\S+ [TDBRVW] (\S+)$", run("nm", "-D", "--defined-only", library), re.M))
    assert exported == set(re.findall(r"^FD_API [\w* ]+?(\w+)\(", HEADER.read_text(), re.M))
    assert needed(library) <= ALLOWED


def test_installed_library_is_found_and_examples_run(tmp_path: Path) -> None:
    prefix, consumer = tmp_path / "prefix", tmp_path / "consumer"
    run("cmake", "--install", BUILD / "release", "--prefix", prefix)
    run("cmake", "-S", ROOT / "tests/packaging/consumer", "-B", consumer, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}",
        f"-DEXAMPLES={ROOT}/examples", "-DCMAKE_BUILD_TYPE=Release")  # fmt: skip
    run("cmake", "--build", consumer, "-j2")
    assert str(prefix) in run("ldd", consumer / "prefill")
    assert "key 7 -> 8" in run(consumer / "hello")
    assert "relative difference" in run(consumer / "prefill")
    assert run(consumer / "snippet").startswith("ok")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repaired wheel, built as a user without a network would."""
    raw, repaired = (tmp_path_factory.mktemp(name) for name in ("raw", "repaired"))
    # The build must see the library of the tree nowhere.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FLASHDELTA_LIBRARY")}
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", raw,
        "--config-settings=cmake.define.FLASHDELTA_CUDA=OFF", ROOT, env=environment)  # fmt: skip
    (built,) = raw.glob("*.whl")
    run(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", repaired, built)
    (result,) = repaired.glob("*.whl")
    return result


def test_wheel_tag_and_needed_libraries(wheel: Path, tmp_path: Path) -> None:
    name, number, *tag = wheel.stem.split("-")
    assert (name, number, tag[:2]) == ("flashdelta", version(), ["py3", "none"])
    assert "manylinux_2_34_x86_64" in tag[2].split(".") or re.search(r"manylinux_2_(1[7-9]|2\d|3[0-4])_x86_64", tag[2])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        files = archive.namelist()
    libraries = [f for f in files if ".so" in f]
    assert libraries == ["flashdelta/libflashdelta.so"]
    assert "flashdelta/__init__.py" in files
    assert needed(tmp_path / libraries[0]) <= ALLOWED


def test_wheel_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FLASHDELTA_LIBRARY")}
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # torch is borrowed: another copy would be gigabytes.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel, env=environment)
    where = run(python, "-c", "import flashdelta; print(flashdelta.__file__)", cwd=tmp_path, env=environment)
    assert where.strip().startswith(str(tmp_path))
    assert "torch.Size([1, 128, 4, 64])" in run(python, ROOT / "examples/snippet.py", cwd=tmp_path, env=environment)
    assert "cpu" in run(python, "-m", "flashdelta", "info", cwd=tmp_path, env=environment)


@pytest.mark.parametrize(("language", "file"), [("cpp", "examples/snippet.cpp"), ("python", "examples/snippet.py")])
def test_readme_shows_the_code_that_runs(language: str, file: str) -> None:
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert (ROOT / file).read_text() in blocks


def test_readme_tables_come_from_the_committed_results() -> None:
    run(sys.executable, ROOT / "bench/report.py", "--check")
