"""Draw the report of a run again: python -m harness.report DIR."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.cli import HelpFormatter, add_verbose, path, run
from harness.errors import UserError
from harness.files import read_json
from harness.models.folder import PAGE, PROGRESS, REPORT, STAGING
from harness.page.page import write_page

DESCRIPTION = """\
Draw the report of a quantization run as a page, report.html, from its report.json. A run does so at its
end; this draws the page of an older checkpoint, of a run that is still going on, or of one that had no
matplotlib.

  python -m harness.report smollm2-ternary
  python -m harness.report smollm2-ternary/.incomplete/progress.json --out so-far.html
"""


def draw(source: Path, target: Path | None = None) -> Path:
    """Draw the page of a record.

    Parameters
    ----------
    source : Path
        A folder with a report.json, or a JSON file with the same contents.
    target : Path, optional
        The HTML file to write; by default report.html beside the record.

    Returns
    -------
    Path
        The HTML file.

    Raises
    ------
    UserError
        If the record is missing, damaged or of something else, or the page cannot be written.
    """
    file = source / REPORT if source.is_dir() else source
    target = target or file.with_name(PAGE)
    if not file.is_file():
        progress = source / STAGING / PROGRESS
        hint = f"; its run is unfinished, draw {progress}" if progress.is_file() else ""
        raise UserError(f"{file} does not exist{hint}")
    record = read_json(file)
    try:
        write_page(record, target)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{file} is not the report of a quantization run, or damaged: {what}") from None
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    return target


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.report", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    parser.add_argument("path", type=path, metavar="PATH", help="folder of a checkpoint, or a report.json")
    parser.add_argument("--out", type=path, metavar="FILE", help="the page; by default report.html beside it")
    add_verbose(parser)
    arguments = parser.parse_args()
    print(draw(arguments.path, arguments.out))
    return 0


if __name__ == "__main__":
    run(main)
