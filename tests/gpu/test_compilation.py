"""Every kernel compiles for the GPUs people have, which shows errors of type without one, and spills."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.kernels import tensor_cores
from tests.gpu.emulation import SOURCES

ROOT = Path(__file__).parents[2]
HOPPERS = "warpgroup.cu"


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
    # lanes.py is what the kernels of the other files are made of, launching.py launches them,
    # tensor_cores.py those in CUDA C++, layout.py is what they read.
    kernels = {path.stem for path in (ROOT / "gpu" / "kernels").glob("*.py")}
    kernels -= {"__init__", "lanes", "launching", "layout", "tensor_cores"}
    assert kernels == {line.split(".")[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize(
    ("source", "target"),
    [(source, target) for source in SOURCES for target in ("sm_80", "sm_90", "sm_100") if source != HOPPERS]
    + [(HOPPERS, tensor_cores.HOPPER_TARGET)],
)
def test_sources_compile_to_machine_code_without_spills(source, target):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    names = list(tensor_cores.kernels(source))
    text = tensor_cores.source(source, names).encode()
    _, program = nvrtc.nvrtcCreateProgram(text, source.encode(), 0, [], [])
    options = [
        f"-arch={target}".encode(),
        *(option.encode() for option in tensor_cores.OPTIONS),
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
    # Registers of a launch must fit the 65536 of a processor, or it fails.
    threads = {
        "decode": tensor_cores.DECODE_THREADS,
        "arrange": tensor_cores.ARRANGE_THREADS,
        "prefill": tensor_cores.PREFILL_THREADS,
        "dense": tensor_cores.DENSE_THREADS,
        "warpgroup": tensor_cores.WARPGROUP_THREADS,
        "gather": tensor_cores.GATHER_THREADS,
        "combine": tensor_cores.COMBINE_THREADS,
    }
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log.decode())]
    for (name, _), count in zip(kernels, registers, strict=True):
        print(f"{target} {name}: {count} registers")
        assert count * threads[re.match("[a-z]+", name)[0]] <= 65536
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", log.decode()) == [("0", "0")] * len(
        kernels
    )
