"""Methods to compare: PT²-LLM and its ablations, the steps of the recipe beyond it, 2-bit baselines."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from harness.calibration.methods import BASELINES
from harness.quantize.options import OUTPUTS, PT2_LLM, RECIPES, STREAM, WEIGHTS, Options
from reference.types import BEST, TernaryConfig

NO_ORDER = TernaryConfig(reorder="none")
DAMPED = replace(NO_ORDER, damping=BEST.damping)
FED = replace(DAMPED, aga="conditional", feed_forward=True)


@dataclass(frozen=True)
class Method:
    """A method to compare: its name in the results, and the settings of its run."""

    words: str
    method: str = PT2_LLM
    config: TernaryConfig = field(default_factory=TernaryConfig)
    targets: str = WEIGHTS
    strength: float = 1.0
    token_weights: bool = False
    true_sequential: bool = False

    def options(self, options: Options, out: Path | None) -> Options:
        """The options of a run by this method."""
        own = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name != "words"}
        return replace(options, **own, out=out if self.method == PT2_LLM else None)


def _best(words: str, strength: float = 1.0, **config: Any) -> Method:
    return Method(words, PT2_LLM, replace(RECIPES["best"].config, **config), STREAM, strength, True, True)


_GPTQ_BEST = "gptq-2bit-best"

METHODS: dict[str, Method] = {
    "pt2-llm": Method("SSR + ITF + AGA (PT²-LLM)"),
    "int8-grid": Method("SSR + ITF + AGA, alpha and mu in 8 bits", config=TernaryConfig(grid="int8")),
    "conditional": Method("SSR + ITF + conditional AGA", config=TernaryConfig(aga="conditional")),
    "hessian": Method("Hessian order + ITF + AGA", config=TernaryConfig(reorder="hessian")),
    "random": Method("random order + ITF + AGA", config=TernaryConfig(reorder="random")),
    "no-order": Method("ITF + AGA", config=NO_ORDER),
    "no-compensation": Method("ITF + AGA, no compensation", config=replace(NO_ORDER, compensation=False)),
    "itf-only": Method("ITF", config=replace(NO_ORDER, aga="none")),
    "aga-only": Method("AGA", config=replace(NO_ORDER, itf=False)),
    "init-only": Method("initialization only", config=replace(NO_ORDER, itf=False, aga="none")),
    "eq13": Method("SSR + ITF + Eq. 13 as printed", config=TernaryConfig(aga="printed")),
    "ssr-init-only": Method("SSR, initialization only", config=TernaryConfig(itf=False, aga="none")),
    "ssr-itf-only": Method("SSR + ITF", config=TernaryConfig(aga="none")),
    "ssr-aga-only": Method("SSR + AGA", config=TernaryConfig(itf=False)),
    "symmetric-start": Method("SSR + ITF from Eq. 1-3 + AGA", config=TernaryConfig(start="twn")),
    **{
        f"pt2-llm-{k}": Method(f"PT²-LLM, blocks of {k}", config=TernaryConfig(block_size=k))
        for k in (64, 256)
    },
    **{name: Method(f"{name} ({what})", name) for name, what in BASELINES.items()},
    # The recipe beyond the paper, one step after the other.
    "pt2-llm-targets": Method(
        "PT²-LLM with targets", targets=STREAM, token_weights=True, true_sequential=True
    ),
    "damped": Method(f"ITF + AGA, damping {DAMPED.damping}", config=DAMPED),
    "fed": Method("+ conditional AGA, rounding fed forward", config=FED),
    "joint": Method("+ joint grid", config=replace(FED, refinement="grid")),
    "descent": Method("+ descent on trits", config=BEST),
    "sequential": Method("+ inputs collected again inside a layer", config=BEST, true_sequential=True),
    "outputs": Method("+ targets: outputs", config=BEST, true_sequential=True, targets=OUTPUTS),
    "stream": Method("+ targets: residual stream", config=BEST, true_sequential=True, targets=STREAM),
    "token-weights": _best("+ token weights", block_size=128, grid="float16"),
    "best": _best("+ blocks of 64, alpha and mu in 8 bits (best)"),
    "best-strength-0.5": _best("best, strength 0.5", 0.5),
    "best-strength-0.75": _best("best, strength 0.75", 0.75),
    "best-damping-0.03": _best("best, damping 0.03", damping=0.03),
    "best-damping-0.1": _best("best, damping 0.1", damping=0.1),
    "best-damping-0.6": _best("best, damping 0.6", damping=0.6),
    "best-32": _best("best, blocks of 32", block_size=32),
    "best-128": _best("best, blocks of 128", block_size=128),
    "best-256": _best("best, blocks of 256", block_size=256),
    **{
        f"best-symmetric-{k}": _best(f"best, mu = 0, blocks of {k}", block_size=k, shift="none")
        for k in (64, 128, 256)
    },
    "gptq-2bit-best-targets": Method(
        f"{_GPTQ_BEST} with the targets of best",
        _GPTQ_BEST,
        DAMPED,
        targets=STREAM,
        token_weights=True,
        true_sequential=True,
    ),
}
