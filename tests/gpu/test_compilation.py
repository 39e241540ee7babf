"""Every kernel compiles for the GPUs people have, which shows errors of type without one, and spills."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.kernels import arrange, decode, dense, prefill, sources, warpgroup

ROOT = Path(__file__).parents[2]
SOURCES = [module.SOURCE for module in (arrange, decode, prefill, warpgroup, dense)]
THREADS = {
    "decode": decode.THREADS,
    "arrange": arrange.THREADS,
    "prefill": prefill.THREADS,
    "dense": dense.THREADS,
    "warpgroup": warpgroup.THREADS,
    "gather": warpgroup.GATHER_THREADS,
    "combine": warpgroup.COMBINE_THREADS,
}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(capability):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), str(capability)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder = ROOT / "gpu" / "kernels"
    # The others hold kernels of Numba, but for these, and for the launchers of CUDA C++.
    kernels = {path.stem for path in folder.glob("*.py") if not path.with_suffix(".cu").exists()}
    kernels -= {"__init__", "choice", "lanes", "launching", "layout", "parameters", "sources"}
    assert kernels == {line.split(".")[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(source, target, id=f"{source.file}-{target}")
        for source in SOURCES
        for target in ([source.target] if source.target else ("sm_80", "sm_90", "sm_100"))
    ],
)
def test_sources_compile_to_machine_code_without_spills(source, target):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    names = list(source.kernels)
    text = source.text().encode()
    _, program = nvrtc.nvrtcCreateProgram(text, source.file.encode(), 0, [], [])
    options = [
        f"-arch={target}".encode(),
        *(option.encode() for option in sources.OPTIONS),
        b"-ftz=true",  # CuPy adds it
        b"--ptxas-options=-v",
    ]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(program)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", log.decode())
    assert kernels
    assert sorted(kernels) == sorted((name, target) for name in names)
    assert "serialized" not in log.decode()  # products of warpgroups, which the compiler makes wait otherwise
    # Registers of a launch must fit the 65536 of an SM, or it fails.
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log.decode())]
    for (name, _), count in zip(kernels, registers, strict=True):
        print(f"{target} {name}: {count} registers")
        assert count * THREADS[re.match("[a-z]+", name)[0]] <= 65536
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", log.decode()) == [("0", "0")] * len(
        kernels
    )
