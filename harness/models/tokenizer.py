"""Load the tokenizer of a model folder or id, refuse one without a vocabulary; read a processor's files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.files import read_json
from harness.models.folder import PROCESSOR, PROCESSOR_TEMPLATE, require_no_pointer
from harness.models.original import quiet_transformers, summary

# Files that hold a vocabulary, as far as tokenizers have names in common.
VOCABULARIES = ("tokenizer.json", "*.model", "*vocab*", "*.tiktoken", "tekken.json")
CONFIG = "tokenizer_config.json"
# Classes of tokenizers whose rules are all in tokenizer.json, by their names now and before transformers 5.
PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
# A text that is looked for in what a chat template writes.
PROBE = "probe-of-the-template"
SETTINGS = (CONFIG, "special_tokens_map.json", "added_tokens.json", "*merges*")


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer; code shipped with it runs only if trusted.

    For some architectures AutoTokenizer replaces rules in the files by those of another class (Qwen2's, say),
    which a tokenizer from a GGUF file may not have.

    Raises
    ------
    UserError
        If there is none, or it cannot be read.
    """
    transformers = quiet_transformers()

    folder = Path(source) if Path(source).is_dir() else None
    if folder is not None:
        for file in (file for pattern in (*VOCABULARIES, *SETTINGS) for file in folder.glob(pattern)):
            require_no_pointer(file)
    reader = transformers.AutoTokenizer
    config = None if folder is None else folder / CONFIG
    if config is not None and config.is_file() and read_json(config).get("tokenizer_class") in PLAIN_CLASSES:
        reader = transformers.PreTrainedTokenizerFast
    try:
        tokenizer = reader.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain Exception
        if folder is not None and not any(file for name in VOCABULARIES for file in folder.glob(name)):
            raise _lacking(source) from None
        raise UserError(f"the tokenizer of {source} cannot be read: {summary(error)}") from None
    # Of files that are not there, transformers makes a tokenizer of special tokens for some models.
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():
        raise _lacking(source)
    template = _found(source, PROCESSOR_TEMPLATE)
    if template is not None and not tokenizer.chat_template:
        tokenizer.chat_template = read_json(template).get("chat_template")
    return tokenizer


def chat_writer(tokenizer: Any) -> Callable[..., str]:
    """Return what writes messages by the chat template of a tokenizer.

    Templates of models of images and text want the content of a message as a list of parts. Of a text, many
    write nothing, without a word; so it is tried here on a message of its own. The function that is returned
    may raise anything, as a template is a program.
    """

    def written(messages: list[dict[str, Any]], parted: bool, **options: Any) -> str:
        if parted:
            messages = [{**m, "content": _parts(m["content"])} for m in messages]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def writes(parted: bool) -> bool:
        with suppress(Exception):
            return PROBE in written([{"role": "user", "content": PROBE}], parted)
        return False

    return partial(written, parted=not writes(parted=False) and writes(parted=True))


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def read_processor(source: str | Path) -> dict[str, bytes]:
    """Read the files of a model folder or id that its processor needs beside those of the tokenizer."""
    files = {name: _found(source, name) for name in PROCESSOR}
    return {name: file.read_bytes() for name, file in files.items() if file is not None}


def _found(source: str | Path, name: str) -> Path | None:
    """Find a file of a model folder or id; None if it has none, or none that was downloaded before."""
    found = quiet_transformers().utils.hub.cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        return None
    require_no_pointer(Path(found))
    return Path(found)


def _lacking(source: str | Path) -> UserError:
    return UserError(
        f"{source} has no tokenizer; put tokenizer.json and tokenizer_config.json (or tokenizer.model) of "
        "the model into it"
    )
