#!/usr/bin/env bash
# datasets 5.2.0: strings of a JSON file become datetimes if all look like dates, whatever is asked for.
#
# JSON has no dates, and "2024-01-05" in quotes is a string, so one would expect load_dataset("json") to give
# that string. If every string of a column has an ISO form of a date or time stamp, the rows are datetimes,
# and as text "2024-01-05 00:00:00". An offset such as +02:00 is applied and then gone. With one row that is
# no date, such as "unknown", all are strings; so are "2024/01/05" and "12:30". Asking for strings with
# features=... does not give the file's: the column is converted to datetimes first and then to text,
# "2024-01-05 00:00:00" again.
#
# It matters to those who evaluate on files of their own: an answer that is a date matches no answer of a
# model, and whether it is one depends on the other rows, so a subset of a file scores differently from the
# file. Reading the lines with Python's json and Dataset.from_list avoids it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
unset PYTHONPATH
export HF_HOME="$tmp/home" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
python3 -m venv env
env/bin/pip install --quiet --no-compile --disable-pip-version-check datasets==5.2.0 numpy==2.4.6 pyarrow==26.0.1

env/bin/python - <<'EOF_PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset, Features, Value, load_dataset

print("datasets", version("datasets"), "pyarrow", version("pyarrow"))


def read(name, answers, **options):
    path = Path(f"{name}.jsonl")
    path.write_text("".join(json.dumps({"answer": answer}) + "\n" for answer in answers))
    rows = load_dataset("json", data_files=str(path), split="train", **options)
    found = [str(row["answer"]) for row in rows]
    print(f"{answers} -> {rows.features['answer'].dtype} {found}")
    return found


dates = ["2024-01-05", "2023-12-31"]
assert read("dates", dates) == ["2024-01-05 00:00:00", "2023-12-31 00:00:00"]
assert read("mixed", [*dates, "unknown"]) == [*dates, "unknown"]
offset = ["2024-01-05T01:00:00+02:00", "2023-12-31T10:00:00Z"]
assert read("offset", offset) == ["2024-01-04 23:00:00", "2023-12-31 10:00:00"]
assert read("slashes", ["2024/01/05", "12:30"]) == ["2024/01/05", "12:30"]
asked = Features({"answer": Value("string")})
assert read("typed", dates, features=asked) == ["2024-01-05 00:00:00", "2023-12-31 00:00:00"]
listed = Dataset.from_list([{"answer": date} for date in dates])
print("Dataset.from_list:", listed.features["answer"].dtype, listed["answer"][:])
assert listed["answer"][:] == dates
EOF_PYTHON
