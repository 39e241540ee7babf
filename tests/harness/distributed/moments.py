"""Kill processes of a run at random moments, and go on with another number.

    python -m tests.harness.distributed.moments --moments 30

At each moment, a run of two to four processes loses one of them, or all. Runs of other numbers of processes
go on with it, and lose some again, until one reaches its end. The checkpoint must have the bytes of a run
that nobody disturbs. Too slow for a test: ten seconds and more for a moment.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from harness.quantize.options import NO_EVALUATION, RECIPES, Options
from harness.quantize.run import quantize
from tests.harness import tiny
from tests.harness.distributed.processes import end, forked, in_processes
from tests.harness.quantize.stopping import files_of

# Seconds in which all processes must have ended after one has died.
LIMIT = 60.0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.harness.distributed.moments")
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out, best = folder / "out", RECIPES["best"]
        (folder / "words.txt").write_text(tiny.words(400))
        options = Options(
            model=str(tiny.save(tiny.make_model("qwen3", ternary=False), folder / "model")),
            out=out,
            backend="cpu",
            calibration=str(folder / "words.txt"),
            evaluation=NO_EVALUATION,
            nsamples=64,
            seqlen=24,
            keep_states=folder / "states",
            config=best.config,
            targets=best.targets,
            token_weights=True,
            true_sequential=True,
            resume=True,
        )
        quantize(options, say=lambda line: None)
        shutil.rmtree(out)
        began = time.monotonic()
        quantize(options, say=lambda line: None)
        seconds, whole = time.monotonic() - began, files_of(out)
        shutil.rmtree(out)
        done = longest = finished = 0
        work = lambda ranks: quantize(options, say=lambda line: None)  # noqa: E731
        while done < arguments.moments:
            size = chance.randint(2, 4)
            with forked(size, work) as processes:
                time.sleep(chance.uniform(0, 2 * seconds))
                alive = [process for process in processes if process.is_alive()]
                if alive:
                    victims = alive if chance.random() < 0.2 else [chance.choice(alive)]
                    for victim in victims:
                        os.kill(victim.pid, signal.SIGKILL)
                    took = end(processes, LIMIT)
                    longest, done = max(longest, took), done + 1
                    print(
                        f"{done}: {len(victims)} of {size} killed, all ended after {took:.1f} s", flush=True
                    )
            if (out / "config.json").exists() or not alive:
                finished += 1
                assert files_of(out) == whole, "other bytes"
                shutil.rmtree(out)
        if not (out / "config.json").exists():
            in_processes(chance.randint(1, 4), work)
        assert files_of(out) == whole, "other bytes"
    print(f"{done} moments, {finished + 1} runs to the end, the same bytes; at most {longest:.1f} s to end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
