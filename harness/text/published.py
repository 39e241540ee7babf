"""Data sets that papers measure on: their splits, how rows are joined, and where they are downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.errors import UserError
from harness.models.original import is_verbose

CALIBRATION, EVALUATION = "calibration", "evaluation"


@dataclass(frozen=True)
class Split:
    hub: dict[str, Any]  # arguments of datasets.load_dataset
    joiner: str
    rows: int | None = None  # use only the first rows; None for all
    windows: int | None = None  # evaluate only the first windows; None for all


@dataclass(frozen=True)
class DataSet:
    column: str
    keeps_newline: bool  # whether a row of the published text file ends with its newline
    splits: dict[str, Split]


_C4 = {"path": "allenai/c4", "streaming": True, "split": "train"}
_PTB = {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"}
_WIKITEXT2 = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}

# Splits, joiners and sizes follow the GPTQ family, so that perplexities are comparable.
DATA_SETS = {
    "wikitext2": DataSet(
        "text",
        True,
        {
            CALIBRATION: Split({**_WIKITEXT2, "split": "train"}, "\n\n"),
            EVALUATION: Split({**_WIKITEXT2, "split": "test"}, "\n\n"),
        },
    ),
    "c4": DataSet(
        "text",
        False,
        {
            CALIBRATION: Split(
                {**_C4, "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}, "\n\n", rows=20000
            ),
            EVALUATION: Split(
                {**_C4, "data_files": {"train": "en/c4-validation.00000-of-00008.json.gz"}},
                " ",
                rows=1100,
                windows=256,
            ),
        },
    ),
    "ptb": DataSet(
        "sentence",
        False,
        {
            CALIBRATION: Split({**_PTB, "split": "train"}, " "),
            EVALUATION: Split({**_PTB, "split": "test"}, " "),
        },
    ),
}


def download(name: str, use: str) -> list[str]:
    """Return the rows of a data set from the Hugging Face Hub, or from its cache.

    Raises
    ------
    UserError
        If the package `datasets` is missing or the download fails.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"downloading {name} requires the package `datasets`; run pip install '.[eval]' in the clone, "
            f"or pass a local copy as {name}:FILE"
        ) from None
    if not is_verbose():
        datasets.disable_progress_bars()
    data_set = DATA_SETS[name]
    split = data_set.splits[use]
    try:
        loaded = datasets.load_dataset(**split.hub)
        rows = loaded.take(split.rows) if split.rows else loaded
        return [row[data_set.column] for row in rows]
    except Exception as error:  # errors of the hub share no base class
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name} could not be downloaded ({type(error).__name__}: {first_line}); "
            f"without access to the Hugging Face Hub, pass a local copy as {name}:FILE"
        ) from None
