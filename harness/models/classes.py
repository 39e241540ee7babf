"""Which class of transformers a model folder is for: a language model, alone or with vision, or a head."""

from __future__ import annotations

from typing import Any

from harness.errors import UserError
from harness.models.original import quiet_transformers

# Classes with a vocabulary at their end: decoders alone, with vision, with any other inputs.
LANGUAGE = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
# Classes with labels at their end; those of images count if they read text too (ShieldGemma 2).
CLASSIFIERS = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForImageClassification",
)
# Classes that end otherwise; without a word here they would be said to lack the tensors of a language model.
OTHERS = ("AutoModelForQuestionAnswering", "AutoModelForMultipleChoice")


def auto_class(config: Any, name: str) -> Any:
    """Choose the Auto class of transformers that makes the class which a config names.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The config. Its `architectures` choose; where they say nothing that transformers knows, the first of
        `LANGUAGE` that has the config's type is chosen.
    name : str
        Name of the model, for messages.

    Raises
    ------
    UserError
        If it is an encoder-decoder, or no language model and no classifier.
    """
    transformers = quiet_transformers()
    named = config.architectures or []
    what = named[0] if named else f"a model of type {config.model_type}"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} is {what}, an encoder-decoder; only decoder-only models can be used")
    tables = {auto: getattr(transformers, auto) for auto in (*LANGUAGE, *CLASSIFIERS, *OTHERS)}
    classes = {auto: _classes(table, config) for auto, table in tables.items()}
    found = [auto for auto in tables if set(named) & set(classes[auto])]
    found = found or [auto for auto in LANGUAGE if classes[auto]]
    if not found or found[0] in OTHERS:
        raise UserError(
            f"{name} is {what}, which cannot be used; only decoder-only language models can, alone, with "
            "vision or with a classification head"
        )
    return tables[found[0]]


def _classes(auto: Any, config: Any) -> list[str]:
    """Names of the classes that an Auto class makes of a config and that read text."""
    found = auto._model_mapping.get(type(config), ())
    kinds = found if isinstance(found, tuple | list) else (found,)
    names = [kind.__name__ for kind in kinds if "text" in kind.input_modalities]
    own = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
    return names if own is None else [own.rpartition(".")[2], *names]  # code that comes with the model first


def is_classifier(model: Any) -> bool:
    """Whether a model has labels at its end, no vocabulary."""
    transformers = quiet_transformers()
    name = type(model).__name__
    return any(name in _classes(getattr(transformers, auto), model.config) for auto in CLASSIFIERS)


def require_vocabulary(model: Any, name: str, what: str) -> None:
    """Refuse a classifier where tokens are to be predicted.

    Raises
    ------
    UserError
        If the model is one; `what` says what it cannot do.
    """
    if is_classifier(model):
        raise UserError(f"{name} is {type(model).__name__}, which predicts labels, not tokens: it {what}")
