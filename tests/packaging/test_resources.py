"""tools/resources.py on captured ptxas output."""

import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("resources", Path(__file__).parents[2] / "tools/resources.py")
resources = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resources)

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2fd4stepEPf' for 'sm_90a'
ptxas info    : Function properties for _ZN2fd4stepEPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 2048 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 3.541 ms
ptxas info    : Compiling entry function '_ZN2fd4stepEPf' for 'sm_80'
ptxas info    : Function properties for _ZN2fd4stepEPf
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""
SLOW = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in '_ZN2fd4stepEPf'"


def test_parse() -> None:
    kernels, notes = resources.parse(LOG)
    assert kernels == {
        "_ZN2fd4stepEPf sm_90a": {"registers": 168, "shared": 2048, "stack": 0, "spill": 0},
        "_ZN2fd4stepEPf sm_80": {"registers": 255, "shared": 0, "stack": 8, "spill": 16},
    }
    assert notes == []


def test_spills_serialised_wgmma_and_changes_are_problems() -> None:
    kernels, notes = resources.parse(LOG + SLOW)
    found = resources.problems(kernels, notes, kernels)
    assert [f for f in found if "C7510" in f]
    assert [f for f in found if "16 bytes spilled" in f]
    assert len(found) == 2
    del kernels["_ZN2fd4stepEPf sm_80"]
    assert resources.problems(kernels, [], kernels) == []
    changed = {"_ZN2fd4stepEPf sm_90a": kernels["_ZN2fd4stepEPf sm_90a"] | {"registers": 200}}
    assert len(resources.problems(kernels, [], changed)) == 1
    assert len(resources.problems(kernels, [], {})) == 1
    assert len(resources.problems({}, [], kernels)) == 1


def test_names_do_not_depend_on_where_the_source_lies() -> None:
    assert resources.plain("_ZN2fd39_GLOBAL__N__01234567_7_step_cu_89abcdef4stepEPf") == "_ZN2fd12_GLOBAL__N_14stepEPf"
