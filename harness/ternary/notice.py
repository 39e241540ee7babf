"""Keep transformers from loading a ternary checkpoint where nothing can read its trits.

By itself transformers only warns about a ``quant_method`` that it does not know, initializes the layers at
random, and the model runs. It does refuse a config whose ``transformers_weights``, an entry that may name the
file of the weights, names no safetensors file; the error quotes the entry. So config.json has `NOTICE` there,
and whoever loads the checkpoint without ``import harness.hf`` reads what to do.

Every other reader finds the weights under their usual names, and ignores the entry. Other forms were worse:
other names of files, which ``save_pretrained`` would not write; trits named ``weight``, refused for their
shape without advice; a ``model_type`` of our own, about which a concrete class such as ``LlamaForCausalLM``
only warns, and which other readers do not know.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from harness.ternary.format import QUANT_METHOD
from reference.packing import FORMAT_VERSION

ENTRY = "transformers_weights"
NOTICE = (
    f"none: this is a ternary checkpoint of format version {FORMAT_VERSION}. Install a version of pt2-llm "
    "that reads it, and run `import harness.hf` before from_pretrained"
)


def add_notice(config: Any) -> None:
    """Put the notice into a config, and into that of its decoder, which a class of its own may load."""
    for part in (config, config.get_text_config(decoder=True)):
        setattr(part, ENTRY, NOTICE)


def drop_notice(config: Any) -> None:
    """Remove the notice again, for a model without trits."""
    for part in (config, config.get_text_config(decoder=True)):
        vars(part).pop(ENTRY, None)


class _KeptNotice:
    """``transformers_weights`` of a config: as it was set, but for ternary models.

    The weights of a ternary model have their usual names, so reading gives None. Deleting changes nothing, as
    ``save_pretrained`` deletes the entry before it writes config.json.
    """

    def __get__(self, config: Any, owner: Any = None) -> Any:
        if config is None:
            return self
        if ENTRY not in vars(config):
            raise AttributeError(ENTRY)
        return None if _is_ternary(config) else vars(config)[ENTRY]

    def __set__(self, config: Any, value: Any) -> None:
        vars(config)[ENTRY] = value

    def __delete__(self, config: Any) -> None:
        if not _is_ternary(config):
            del vars(config)[ENTRY]


def _is_ternary(config: Any) -> bool:
    quantization = vars(config).get("quantization_config")
    if isinstance(quantization, dict):
        return quantization.get("quant_method") == QUANT_METHOD
    return getattr(quantization, "quant_method", None) == QUANT_METHOD


def read_past_notices() -> None:
    """Let transformers load ternary models despite the notice, and keep it when it saves them."""
    # A quantizer has no hook for either: between 5.5 and 5.23 those that see the config before files are
    # looked for have changed, and none comes after save_pretrained has deleted the entry.
    setattr(PreTrainedConfig, ENTRY, _KeptNotice())
