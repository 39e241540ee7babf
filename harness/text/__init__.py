"""Text for calibration and evaluation.

content     what a text is: a stream, conversations, a mixture
published   wikitext2, c4 and ptb: splits, joiners, download
rows        files of rows, compressed or not
sources     from the name on a command line to a text
"""

from harness.text.content import AnyText, Chat, Mixture, Text, require_unicode
from harness.text.published import CALIBRATION, DATA_SETS, EVALUATION
from harness.text.rows import COMPRESSED, READERS
from harness.text.sources import BUILTIN, SOURCES_HELP, read_text, require_rows

__all__ = [
    "BUILTIN",
    "CALIBRATION",
    "COMPRESSED",
    "DATA_SETS",
    "EVALUATION",
    "READERS",
    "SOURCES_HELP",
    "AnyText",
    "Chat",
    "Mixture",
    "Text",
    "read_text",
    "require_rows",
    "require_unicode",
]
