#!/usr/bin/env bash
# torch 2.13.0: a maximum over processes loses NaN, and true maxima with it, by position in the tensor.
#
# torch.max, torch.amax and torch.maximum give NaN if any number is NaN, so one would expect all_reduce with
# ReduceOp.MAX to do the same, or always to skip NaN. Gloo keeps one of two operands by a comparison that NaN
# fails, and the order of the operands changes from segment to segment of a tensor. Let two processes hold 1
# and NaN everywhere: half of the maxima are 1, the others NaN. With three processes, where the others hold 1
# and 2, a third of the maxima can be 1: NaN is gone, and 2 as well. All processes agree. MIN is alike.
#
# It matters to those who calibrate on several processes: the range of activations is such a maximum. The NaN
# of one process shows up in some channels only, and others get a range that is finite and too small. Reducing
# isnan too, as integers, or torch.amax of what all_gather brings avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check numpy==2.4.6 torch==2.13.0

cat > maximum.py <<'EOF_PYTHON'
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

# What each process holds, and all numbers that the maximum turns out to be.
CASES = [
    ([1.0, torch.nan], {"1.0", "nan"}),
    ([torch.nan, 2.0], {"2.0", "nan"}),
    ([1.0, torch.nan, 2.0], {"1.0", "2.0", "nan"}),
]


def run(rank, case):
    values, expected = CASES[case]
    store = Path(f"store{case}").absolute().as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=len(values))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        mine = torch.full((1200,), values[rank], dtype=dtype)
        every = [torch.empty_like(mine) for _ in values]
        dist.all_gather(every, mine)
        assert torch.stack(every).amax(0).isnan().all()

        dist.all_reduce(mine, dist.ReduceOp.MAX)
        found = dict(Counter(map(str, mine.tolist())))
        seen = [None] * len(values)
        dist.all_gather_object(seen, found)
        if rank == 0:
            print(f"{dtype}, processes hold {values}: maxima of {len(mine)} channels {found}", flush=True)
        assert seen == [found] * len(values)
        assert set(found) == expected and min(found.values()) >= 300
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", version("torch"))
    for case, (values, _) in enumerate(CASES):
        torch.multiprocessing.spawn(run, (case,), nprocs=len(values))
EOF_PYTHON
env/bin/python maximum.py
