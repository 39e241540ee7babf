"""Record the inputs of the decoder layers, and turn their final output into logits.

Neither needs the layers in memory: stand-ins replace them and pass the hidden states through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache

from harness.calibration.calls import LayerCall, Returned, differ, marked, merged
from harness.calibration.gram import windows_per_shard
from harness.calibration.passage import Passage, brought, own_windows
from harness.compute import Compute
from harness.errors import UserError
from harness.models.decoder import DecoderLayers, as_text


@torch.no_grad()
def capture_inputs(
    model: nn.Module,
    decoder: DecoderLayers,
    windows: torch.Tensor,
    compute: Compute = Compute(),
    step: Callable[[], object] = lambda: None,
) -> Passage:
    """Record the inputs of the first layer for every window, and the arguments of every layer.

    Of several processes, each records its own windows.

    Parameters
    ----------
    model : nn.Module
        A causal language model.
    decoder : DecoderLayers
        Its decoder layers.
    windows : (samples, seqlen) int64 tensor
        Token ids.
    compute : Compute
        Where to run the first layer, to learn the form of its output and whether it looks ahead.
    step : callable
        Called after every window that this process records.

    Returns
    -------
    Passage
        Its calls, one per layer. All windows have the same length and no padding, so they share masks and
        positions; arguments that depend on the text are kept for every window. Its decoder layers are those
        given, without the matrices of layers that text skips.

    Raises
    ------
    UserError
        If the model does more than pass hidden states from layer to layer and turn the last into logits, or
        attends to later tokens, or arguments of a layer depend on what earlier layers computed; or if there
        are more processes than can share the windows.
    """
    hidden = []
    count, seqlen = windows.shape
    own = windows[own_windows(count, seqlen, compute.ranks)]
    for window in own:
        hidden.append(_enter_layers(model, decoder, window)[0])
        step()
    extra = _extra_output(*_enter_layers(model, decoder, windows[0]), decoder, compute, windows.shape[1])
    calls = _record_pass(model, decoder, windows[0], extra)
    if len(windows) > 1 and any(map(differ, calls, _record_pass(model, decoder, windows[-1], extra))):
        _require_only_text(model, decoder, windows[0], calls, extra)
        recorded = [_record_pass(model, decoder, window, extra) for window in own]
        calls = [merged(iter(of_windows)) for of_windows in zip(*recorded, strict=True)]
    decoder = decoder.without([index for index, call in enumerate(calls) if call.skipped])
    passage = Passage(decoder, hidden, calls, compute, windows_per_shard(count, seqlen))
    _require_heard(model, passage, own[0])
    return passage


def _require_only_text(
    model: nn.Module,
    decoder: DecoderLayers,
    window: torch.Tensor,
    calls: list[LayerCall],
    extra: int | None,
) -> None:
    """Refuse a model whose layers take arguments that change with the hidden states."""
    others = _record_pass(model, decoder, window, extra, torch.neg)
    for index, (call, other) in enumerate(zip(calls, others, strict=True)):
        if differ(call, other):
            raise UserError(
                f"decoder layer {index} of {type(model).__name__} takes arguments that depend on what "
                "earlier layers computed, other than the hidden states; such models cannot be calibrated "
                "layer by layer"
            )


@torch.no_grad()
def logits_after(
    model: nn.Module, passage: Passage, window: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Turn the output of the last decoder layer into logits, by the model's final norm and head.

    Parameters
    ----------
    model : nn.Module
        A causal language model; everything but its decoder layers must be in memory, on one device.
    passage : Passage
        Its decoder layers, and how they are called.
    window : (seqlen,) int64 tensor
        Token ids of the window.
    hidden : (1, seqlen, width) tensor
        Output of the last layer, on the device of the model.

    Returns
    -------
    (1, seqlen, vocabulary) tensor
    """
    with _replaced(passage.decoder.layers, lambda states: hidden, passage.calls[0].extra):
        return model(**as_text(model, window[None].to(hidden.device)), use_cache=False).logits


def _enter_layers(
    model: nn.Module, decoder: DecoderLayers, window: torch.Tensor
) -> tuple[torch.Tensor, LayerCall]:
    """Return the hidden states that enter the first layer, and its other arguments."""
    seen: list[tuple[torch.Tensor, LayerCall]] = []

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_split(args, kwargs))
        raise _Captured

    handle = decoder.layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        _run(model, window)
    finally:
        handle.remove()
    if not seen:
        raise UserError(
            f"text does not go through {decoder.prefix} of {type(model).__name__}; such models cannot be "
            "calibrated layer by layer"
        )
    hidden = seen[0][0]
    if len(window) not in hidden.shape[:-1]:
        raise UserError(
            f"{type(model).__name__} passes hidden states of shape {tuple(hidden.shape)} through its decoder "
            f"layers for {len(window)} tokens, not one or several vectors a token; such models cannot be "
            "calibrated layer by layer"
        )
    return seen[0]


@torch.no_grad()
def require_causal(model: nn.Module, decoder: DecoderLayers, window: torch.Tensor) -> None:
    """Refuse a model whose first layer, run in float32 on the host, sees later tokens as an encoder does.

    Raises
    ------
    UserError
        If the output of the first layer for a token depends on later tokens.
    """
    _extra_output(*_enter_layers(model, decoder, window), decoder, Compute(), len(window))


def _require_heard(model: nn.Module, passage: Passage, window: torch.Tensor) -> None:
    """Refuse a model whose logits do not depend on what its decoder layers return."""
    few = min(len(window), 4)
    states = passage.hidden[0].narrow(_token_axis(passage.hidden[0], len(window)), 0, few)
    first, other = (logits_after(model, passage, window[:few], sign * states) for sign in (1, -1))
    if torch.equal(first, other):
        raise UserError(
            f"the logits of {type(model).__name__} do not depend on {passage.decoder.prefix}, which its text "
            "goes through; such models cannot be calibrated layer by layer"
        )


def _token_axis(hidden: torch.Tensor, tokens: int) -> int:
    """Axis of the tokens: some models have several vectors for each, (1, tokens, 4, width) or
    (4, 1, tokens, width)."""
    return hidden.shape[:-1].index(tokens)


def _extra_output(
    hidden: torch.Tensor, call: LayerCall, decoder: DecoderLayers, compute: Compute, tokens: int
) -> int | None:
    """Count the values that layers return after the hidden states; None if they return no tuple.

    Raises
    ------
    UserError
        If the output of the first layer for a token depends on later tokens, as in an encoder; or if the
        layer keeps keys and values from call to call although it is asked not to.
    """
    call = call.to(compute)
    layer = decoder.working_copy(0, compute)
    hidden = brought(hidden, compute)
    axis = _token_axis(hidden, tokens)
    half = tokens // 2
    begin, end = hidden.split([half, tokens - half], axis)
    output = layer(hidden, *call.args, **call.kwargs)
    if any(isinstance(value, Cache) and value.get_seq_length() for value in call.kwargs.values()):
        raise UserError(
            "the decoder layers keep keys and values for layers after them; such models cannot be calibrated "
            "layer by layer"
        )
    first = (output[0] if isinstance(output, tuple | list) else output).narrow(axis, 0, half).float()
    changed = call(layer, torch.cat([begin, -end], axis), 0, {}).narrow(axis, 0, half).float()
    # Masked positions contribute zeros, so a causal layer differs at most by rounding.
    if (first - changed).abs().max() > 16 * torch.finfo(hidden.dtype).eps * first.abs().max():
        raise UserError(
            "the model is not a causal language model: the output of its first layer for a token depends on "
            "later tokens. Encoders have no perplexity and cannot be ternarized"
        )
    return len(output) - 1 if isinstance(output, tuple | list) else None


def _record_pass(
    model: nn.Module,
    decoder: DecoderLayers,
    window: torch.Tensor,
    extra: int | None,
    stand_in: Callable[[torch.Tensor], torch.Tensor] = lambda states: states,
) -> list[LayerCall]:
    """Record the call of every layer in a forward pass of the whole model, with stand-ins for the layers."""
    layers = decoder.layers
    calls: dict[int, LayerCall] = {}
    expected: list[torch.Tensor] = []
    passed_on = True

    def entering(index: int) -> Callable[..., None]:
        def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal passed_on
            states, call = _split(args, kwargs)
            passed_on &= index > max(calls, default=-1)
            call = replace(call, index=index, extra=extra, args=marked(call.args), kwargs=marked(call.kwargs))
            passed_on &= call.sources <= {max(calls, default=-1)}
            passed_on &= not expected or torch.equal(expected.pop(), states)
            expected.append(stand_in(states))
            calls[index] = call

        return enter

    def leave(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise _Captured

    handles = [
        layer.register_forward_pre_hook(entering(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    handles.append(layers[-1].register_forward_hook(leave))
    try:
        with _replaced(layers, stand_in, extra, Returned):
            _run(model, window)
    finally:
        for handle in handles:
            handle.remove()
    if not passed_on:
        raise UserError(
            f"{type(model).__name__} does more between its decoder layers than pass on the hidden states; "
            "such models cannot be calibrated layer by layer"
        )
    for source in {source for call in calls.values() for source in call.sources}:
        calls[source] = replace(calls[source], returns=True)
    skipped = LayerCall((), {}, extra, skipped=True)
    return [calls.get(index, skipped) for index in range(len(layers))]


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, LayerCall]:
    """Split a layer's arguments into the hidden states and the rest."""
    if args:
        return args[0], LayerCall(args[1:], kwargs)
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), LayerCall((), kwargs)


@contextmanager
def _replaced(
    layers: nn.ModuleList,
    stand_in: Callable[[torch.Tensor], torch.Tensor],
    extra: int | None,
    more: Callable[[int, int], Any] = lambda layer, place: None,
) -> Iterator[None]:
    """Replace every layer by `stand_in`, with an output of the same form as the layer's.

    After the hidden states, a layer returns `more` of its index and of the place.
    """

    def forward(index: int, *args: Any, **kwargs: Any) -> Any:
        states = stand_in(_split(args, kwargs)[0])
        return states if extra is None else (states, *(more(index, place) for place in range(extra)))

    # Libraries that offload weights replace a module's forward by their own.
    own = [vars(layer).get("forward") for layer in layers]
    for index, layer in enumerate(layers):
        layer.forward = partial(forward, index)
    try:
        yield
    finally:
        for layer, previous in zip(layers, own, strict=True):
            if previous is None:
                del layer.forward
            else:
                layer.forward = previous


def _run(model: nn.Module, window: torch.Tensor) -> None:
    """Run a forward pass until a hook ends it."""
    with suppress(_Captured):
        model(**as_text(model, window[None]), use_cache=False)


class _Captured(Exception):
    """Ends a forward pass once everything needed is recorded."""
