"""What a run is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from reference.types import TernaryConfig

PT2_LLM = "pt2-llm"


NO_EVALUATION = "none"


AS_IT_IS, INT8 = "as-it-is", "int8"


@dataclass(frozen=True)
class Options:
    """What a run is asked for; the command line of `harness.quantize` explains the fields.

    `measure_original` is for runs that follow others on the same model.
    """

    model: str | None = None
    out: Path | None = None
    force: bool = False
    resume: bool = False
    backend: str = "auto"
    embedding: str = AS_IT_IS
    gguf_dtype: str = "bfloat16"
    trust_remote_code: bool = False
    calibration: str | None = None
    text_column: str | None = None
    nsamples: int = 128
    seqlen: int = 2048
    true_sequential: bool = False
    method: str = PT2_LLM
    config: TernaryConfig = field(default_factory=TernaryConfig)
    evaluation: str | None = None
    evaluation_seqlen: int = 2048
    evaluation_windows: int | None = None
    measure_original: bool = True
