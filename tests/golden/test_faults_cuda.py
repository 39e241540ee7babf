"""The planter of faults in CUDA C++, and the judge of one small kernel."""

import shutil
from pathlib import Path
from textwrap import dedent

import pytest

from tests.faults.__main__ import Project, judge
from tests.faults.cuda import find_faults, parse
from tests.faults.fault import MODULE_LEVEL
from tests.faults.judge import PASSED, UNCOMPILED

SAMPLE = dedent(
    """
    #define SIZE (1 + 1)
    constexpr int LANES = 32;  // a < b

    template <class T, int N = 3>
    __device__ inline float sample(const float *x, float (&y)[2][4], unsigned mask, int n) {
        __shared__ float all[LANES + 1];
        float sum[2] = {}, limit = 0.5f;
    #pragma unroll
        for (int i = threadIdx.x; i < n; i += 4)
    #pragma unroll
            for (int d = 0; d < 2; d++) sum[d] += x[i + d] * limit;
        __syncthreads();
        if (n > 0 && !(mask & 0xffu)) return 0;
        asm("add.f32 %0, %1, 1;" : "=f"(sum[0]) : "f"(x[1]));
        y[n][1] = fmaf(-x[0], sum[1], limit), y[0][0] = add<T, 4>(static_cast<int>(x[2]));
        while (true) {
            if (n--) continue;
            break;
        }
        return mask ? __shfl_xor_sync(mask, sum[0], 1) : min(limit, x[n / 2]);
    }

    DEFINE(sample_float, 4, true)
    """
)
# Kinds of faults, and lines of the sample with one of them.
EXPECTED = {
    "constant": {
        "constexpr int LANES = 33;  // a < b",
        "constexpr int LANES = 31;  // a < b",
        "float sum[2] = {1}, limit = 0.5f;",
        "float sum[2] = {}, limit = 0.505f;",
        "if (n > 0 && !(mask & 0x100u)) return 0;",
        "y[n][1] = fmaf(-x[0], sum[1], limit), y[1][0] = add<T, 4>(static_cast<int>(x[2]));",
        "while (false) {",
    },
    "boolean": {"if (((n > 0) || !(mask & 0xffu))) return 0;"},
    "condition": {
        "if (true) return 0;",
        "if (false) return 0;",
        "for (int d = 0; false; d++) sum[d] += x[i + d] * limit;",
        "return __shfl_xor_sync(mask, sum[0], 1);",
        "return min(limit, x[n / 2]);",
    },
    "comparison": {
        "for (int d = 0; d <= 2; d++) sum[d] += x[i + d] * limit;",
        "if (n >= 0 && !(mask & 0xffu)) return 0;",
        "if (n < 0 && !(mask & 0xffu)) return 0;",
    },
    "not": {"if (n > 0 && (mask & 0xffu)) return 0;"},
    "index": {
        "for (int d = 0; d < 2; d++) sum[d + 1] += x[i + d] * limit;",
        "for (int d = 0; d < 2; d++) sum[d] += x[(i + d) + 1] * limit;",
        "y[1][n] = fmaf(-x[0], sum[1], limit), y[0][0] = add<T, 4>(static_cast<int>(x[2]));",
    },
    "statement": {
        ";",
        "for (int d = 0; d < 2; d++) ;",
        "if (n--) ;",
        "y[0][0] = add<T, 4>(static_cast<int>(x[2]));",
        "y[n][1] = fmaf(-x[0], sum[1], limit);",
    },
    "operator": {
        "for (int i = threadIdx.x; i < n; i -= 4)",
        "for (int d = 0; d < 2; d--) sum[d] += x[i + d] * limit;",
        "for (int d = 0; d < 2; d++) sum[d] = x[i + d] * limit;",
        "for (int d = 0; d < 2; d++) sum[d] -= x[i + d] * limit;",
        "for (int d = 0; d < 2; d++) sum[d] += x[i - d] * limit;",
        "if (n > 0 && !((mask | 0xffu))) return 0;",
    },
    "sign": {
        "y[n][1] = fmaf(x[0], sum[1], limit), y[0][0] = add<T, 4>(static_cast<int>(x[2]));",
        "y[n][1] = fmaf(-x[0], sum[1], -limit), y[0][0] = add<T, 4>(static_cast<int>(x[2]));",
    },
    "term": {
        "for (int d = 0; d < 2; d++) sum[d] += x[d] * limit;",
        "for (int d = 0; d < 2; d++) sum[d] += limit;",
        "if (n > 0) return 0;",
        "y[n][1] = (-x[0] * sum[1]), y[0][0] = add<T, 4>(static_cast<int>(x[2]));",
        "return mask ? __shfl_xor_sync(mask, sum[0], 1) : limit;",
    },
    "function": {
        "return mask ? __shfl_xor_sync(mask, sum[0], 1) : max(limit, x[n / 2]);",
        "return mask ? sum[0] : min(limit, x[n / 2]);",
    },
}


def test_faults_of_every_kind_are_planted():
    lines = {}
    for fault in find_faults(SAMPLE, "sample.cu"):
        lines.setdefault(fault.kind, set()).add(fault.planted(SAMPLE).splitlines()[fault.line - 1].strip())
        assert fault.function == (MODULE_LEVEL if fault.line == 3 else "sample")
    assert lines.keys() == EXPECTED.keys()
    for kind, expected in EXPECTED.items():
        assert lines[kind] >= expected, kind


def test_what_is_left_alone():
    lines = SAMPLE.splitlines()
    alone = ("#define", "#pragma", "template", "__shared__", "asm", "DEFINE")
    for fault in find_faults(SAMPLE, "sample.cu"):
        assert not any(text in lines[fault.line - 1] for text in alone), fault
        assert not any(text in fault.planted(SAMPLE) for text in ("add<T, 5>", "sum[3] =", "a > b"))


def test_faults_are_shown_without_comments_and_the_loops_around_them():
    changes = [fault.change for fault in find_faults(SAMPLE, "sample.cu")]
    assert "constexpr int LANES = 32; → constexpr int LANES = 33;" in changes
    assert "__syncthreads(); → ;" in changes
    assert "sum[d] += x[i + d] * limit; → sum[d] += x[d] * limit;" in changes
    assert "for (int d = 0; d < 2; d++) → for (int d = 0; d < 2; d--)" in changes


def test_every_fault_of_a_function():
    source = "__device__ int f(int a, int b) {\n    return a % 8 | b;  // a % b\n}\n"
    texts = [fault.planted(source).splitlines()[1].strip() for fault in find_faults(source, "a.cu")]
    assert sorted(texts) == sorted(
        f"return {text};  // a % b"
        for text in ("a / 8 | b", "a | b", "a % 9 | b", "a % 7 | b", "((a % 8) & b)", "a % 8", "b")
    )


SOURCES = [name for name in Project().sources() if not name.endswith(".py")]


@pytest.mark.parametrize("file", SOURCES)
def test_a_fault_is_one_change_of_a_file_that_parses(file):
    source = (Project().root / file).read_text(encoding="utf-8")
    faults = find_faults(source, file)
    assert len({fault.key for fault in faults}) == len(faults) > 0
    for fault in faults[::25]:
        planted = fault.planted(source)
        assert "(ERROR" not in str(parse(planted))
        assert planted != source
        assert planted.encode()[: fault.start] == source.encode()[: fault.start]


def test_what_only_a_device_runs_is_not_judged():
    assert {Path(name).name for name in SOURCES} == {
        path.name for path in (Project().root / "gpu").rglob("*.cu*") if path.name != "instructions.cuh"
    }


# Threads of one block turn an array around by way of shared memory.
KERNEL = """\
struct Turned {
    const unsigned *x;
    unsigned *y;
};
__device__ inline void reverse(const unsigned *x, unsigned *y) {
    extern __shared__ uint4 shared[];
    unsigned *staged = reinterpret_cast<unsigned *>(shared);
    const unsigned *own = x + threadIdx.x;
    if (threadIdx.x >= 64) return;
    staged[threadIdx.x] = *own;
    __syncthreads();
    y[threadIdx.x] = staged[63 - threadIdx.x];
}
#define DECODE(NAME) __global__ void NAME(const Turned p) { reverse(p.x, p.y); }
"""
DEVICE = "import numpy as xp\n\nArray = xp.ndarray\n"
LAYOUT = "class Layout: ...\n"
KERNEL_TESTS = """\
import numpy as np
import pytest

from gpu.kernels.parameters import Pointer, Struct
from gpu.kernels.sources import Source
from tests.gpu.emulation import Emulator

WORDS = Pointer("uint32")
TURNED = Struct("Turned", x=WORDS, y=WORDS)
SOURCE = Source("decode.cu", {}, [TURNED], {"reverse64": "DECODE(reverse64)"})


def turned(emulator):
    x = np.arange(64, dtype=np.uint32)
    y = np.zeros_like(x)
    emulator(SOURCE, "reverse64", (1,), 64, 256, TURNED.of(x=x, y=y))
    return (y == x[::-1]).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_turned(reverse, tmp_path):
    assert turned(Emulator(tmp_path, reverse))


def test_an_edit_is_seen(tmp_path):
    assert not turned(Emulator(tmp_path, edit=("threadIdx.x >= 64", "threadIdx.x >= 0")))
"""
VERDICTS = {
    "__syncthreads(); → ;": "test_turned",
    "y[threadIdx.x] = staged[63 - threadIdx.x]; → y[threadIdx.x] = staged[62 - threadIdx.x];": "test_turned",
    # The test that changes this condition itself does not find it, which says nothing about the fault.
    "if (threadIdx.x >= 64) → if (threadIdx.x > 64)": PASSED,
    "const unsigned *own = x + threadIdx.x; → const unsigned *own = threadIdx.x;": UNCOMPILED,
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to emulate a device")
def test_faults_of_a_kernel_are_judged_by_those_who_run_it(tmp_path):
    root = Project().root
    kept = ("gpu/kernels/parameters.py", "gpu/kernels/sources.py")
    kept += tuple(f"reference/{name}.py" for name in ("checks", "layout", "packing", "types"))
    emulation = ("emulation.py", "emulation.cpp", "emulation.hpp", "emulation_numbers.hpp")
    kept += tuple(f"tests/gpu/{name}" for name in emulation)
    matrix = (root / "gpu/kernels/ternary.cuh").read_text(encoding="utf-8")
    for name, text in {
        "gpu/__init__.py": "",
        "gpu/kernels/__init__.py": "",
        "gpu/device.py": DEVICE,
        "gpu/kernels/layout.py": LAYOUT,
        "gpu/kernels/instructions.cuh": "",
        "gpu/kernels/ternary.cuh": matrix[matrix.index("struct Matrix") :].partition("};")[0] + "};\n",
        "gpu/kernels/decode.cu": KERNEL,
        "tests/__init__.py": "",
        "tests/gpu/test_reverse.py": KERNEL_TESTS,
        "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '--import-mode=importlib'\n",
        **{name: (root / name).read_text(encoding="utf-8") for name in kept},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    project = Project(tmp_path, {"gpu": ("tests/gpu",)}, ("gpu", "reference", "tests", "pyproject.toml"))
    faults = [fault for fault in project.faults("gpu/kernels/decode.cu") if fault.change in VERDICTS]
    verdicts = {
        verdict.fault.change: verdict.by.rpartition("::")[2].partition("[")[0]
        for verdict in judge(project, "gpu", faults)
    }
    assert verdicts == VERDICTS
