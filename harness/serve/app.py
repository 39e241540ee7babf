"""The application: transformers' handlers for requests, with one model, and in OpenAI's words."""

from __future__ import annotations

import asyncio
import threading
import uuid
from typing import Any

import torch
from jinja2 import TemplateError
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState

from harness.errors import UserError
from harness.generate.chat import end_tokens
from harness.generate.decode import context_length
from harness.generate.stops import UntilStop, cut
from harness.models.original import Original, summary
from harness.words import counted

# Fields that the handlers ignore, or take for something else, each with the value that asks for nothing.
IGNORED = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "top_logprobs": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_choice": "auto",
    "functions": [],
    "function_call": "auto",
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "reasoning_effort": None,
    "prediction": None,
    "audio": None,
    "web_search_options": None,
}
# Of these, the handler for completions ignores more.
IGNORED_IN_COMPLETIONS = {**IGNORED, "logit_bias": {}}

# As many as OpenAI's API takes.
MOST_STOPS = 4


class RequestError(UserError):
    """A request that cannot be answered because of one of its fields."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}")
        self.field = field


class PinnedModel(ModelManager):
    """Gives transformers' request handlers one model that is loaded already, and no other."""

    def __init__(self, original: Original, name: str) -> None:
        super().__init__(device="cpu")  # for models that it loads itself, which it never does
        self.original = original
        self.force_model = name

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Return the name as it is; it has no revision."""
        return model_id

    def load_model_and_processor(self, *arguments: Any, **rest: Any) -> tuple[Any, Any]:
        """Return the model and its tokenizer."""
        return self.original.model, self.original.tokenizer


class QueueUntilStop:
    """The queue that a handler reads an answer from, without the text that stops it, and what follows.

    Parameters
    ----------
    queue : asyncio.Queue
        Pieces of text, other parts of an answer, and None at the end.
    stops : tuple of str
        Stop texts.
    """

    def __init__(self, queue: asyncio.Queue[Any], stops: tuple[str, ...]) -> None:
        self._queue, self._until_stop = queue, UntilStop(stops)

    async def get(self) -> Any:
        """Return the next part."""
        return self._passed(await self._queue.get())

    def get_nowait(self) -> Any:
        """Return the next part, or raise `asyncio.QueueEmpty`."""
        return self._passed(self._queue.get_nowait())

    def _passed(self, part: Any) -> Any:
        if type(part) is str:  # reasoning is a subclass
            return self._until_stop.take(part)
        if part is None and (rest := self._until_stop.take("", last=True)):
            self._queue.put_nowait(None)  # comes next
            return rest
        return part


class Generator(GenerateManager, GenerationState):
    """Answers the requests of all handlers one after the other, within the model's positions.

    transformers only warns of an answer that is longer than those, and cannot end one before its time.
    """

    def __init__(self, original: Original) -> None:
        GenerationState.__init__(self)
        GenerateManager.__init__(self)
        self.positions = context_length(original)
        self.ending = threading.Event()

    def get_manager(self, *arguments: Any, **rest: Any) -> GenerateManager:
        """Return what generates for every model."""
        return self

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *rest: Any, **named: Any
    ) -> Any:
        """Start to generate; return a queue of text, and what fills it."""
        inputs = self._checked(inputs, gen_config)
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, *rest, **named)
        return QueueUntilStop(queue, _stops(gen_config.stop_strings)), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *rest: Any, **named: Any
    ) -> Any:
        """Generate to the end; return the text, the length of the prompt, and the new tokens."""
        inputs = self._checked(inputs, gen_config)
        text, *others = await super().generate_non_streaming(
            model, processor, inputs, gen_config, *rest, **named
        )
        return cut(text, _stops(gen_config.stop_strings)), *others

    def _checked(self, inputs: Any, settings: Any) -> dict[str, Any]:
        """Limit the answer to the room that the prompt leaves, and let `ending` end it."""
        length = inputs["input_ids"].shape[1]
        if length == 0:
            raise UserError("the prompt is empty")
        if self.positions is not None:
            room = self.positions - length
            if room < 1:
                raise UserError(
                    f"the prompt has {counted(length, 'token')}, and the model "
                    f"{counted(self.positions, 'position')}; shorten it"
                )
            wanted = settings.max_new_tokens
            settings.max_new_tokens = room if wanted is None else min(wanted, room)
        return {**inputs, "stopping_criteria": [self._stopped]}

    def _stopped(self, tokens: torch.Tensor, scores: Any, **rest: Any) -> torch.Tensor:
        if self.ending.is_set():
            raise UserError("the server is shutting down")
        return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)


def build_app(original: Original, name: str, generator: Generator) -> Any:
    """Return an application with the endpoints for chat and completion of one model.

    The handlers are those of ``transformers serve``. Its application is not used: its endpoints /load_model
    and /reset let every client load other models and drop this one, pinned or not.

    Parameters
    ----------
    original : Original
        Model and tokenizer. The model's generation settings are changed: its end tokens are completed, and
        it samples unless a request asks for temperature 0.
    name : str
        The model's name in requests and answers.
    generator : Generator
        Runs the model.

    Returns
    -------
    fastapi.FastAPI
    """
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler

    settings = original.model.generation_config
    settings.eos_token_id = list(end_tokens(original))
    settings.do_sample = True  # without it the handlers ignore a request's temperature
    pinned = PinnedModel(original, name)
    chat, completion = ChatCompletionHandler(pinned, generator), CompletionHandler(pinned, generator)
    app = FastAPI(title=name)

    def failed(message: str, status: int = 400, field: str | None = None) -> Any:
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": field, "code": None}
        return JSONResponse({"error": error}, status_code=status)

    @app.exception_handler(UserError)
    async def refuse(request: Any, error: UserError) -> Any:
        return failed(str(error), field=error.field if isinstance(error, RequestError) else None)

    @app.exception_handler(HTTPException)
    async def explain(request: Any, error: HTTPException) -> Any:
        return failed(str(error.detail), error.status_code)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Any, error: RequestValidationError) -> Any:
        return failed(f"the request is not a JSON object: {error.errors()[0]['msg']}")

    @app.exception_handler(Exception)  # uvicorn also logs it
    async def apologize(request: Any, error: Exception) -> Any:
        return failed(f"the server failed: {summary(error)}", 500)

    async def answer(handler: Any, body: dict[str, Any], kind: str) -> Any:
        # These may be empty, which transformers refuses.
        body = {**body, **{field: body.get(field) or None for field in ("stop", "logit_bias")}}
        try:
            return await handler.handle_request(body, f"{kind}-{uuid.uuid4().hex}")
        except (AttributeError, KeyError, TypeError, ValueError, TemplateError) as error:
            # The handlers check the fields of a request by name alone, and templates refuse some roles.
            raise UserError(f"the request cannot be answered: {summary(error)}") from None

    @app.post("/v1/chat/completions")
    async def chat_completions(body: dict[str, Any]) -> Any:
        require_answerable(body, IGNORED)
        if not original.tokenizer.chat_template:
            raise UserError(f"{name} has no chat template; use /v1/completions")
        return await answer(chat, body, "chatcmpl")

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> Any:
        require_answerable(body, IGNORED_IN_COMPLETIONS)
        return await answer(completion, body, "cmpl")

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "local"}]}

    return app


def require_answerable(body: dict[str, Any], ignored: dict[str, Any]) -> None:
    """Refuse a request that asks for something that the handlers would ignore, or take wrongly.

    Parameters
    ----------
    body : dict
        The request.
    ignored : dict of str to Any
        Fields that the handler ignores, each with the value that asks for nothing.

    Raises
    ------
    RequestError
        The message names the field.
    """
    for field, nothing in ignored.items():
        value = body.get(field)
        # 0 log-probabilities are those of the chosen tokens alone, and not none.
        asks = value != nothing or (isinstance(nothing, bool) and not isinstance(value, bool))
        if value is not None and asks:
            raise RequestError(field, "is not supported; drop it from the request")
    share = body.get("top_p")
    if share is not None and not (type(share) in (int, float) and 0 < share <= 1):
        raise RequestError("top_p", f"must be above 0 and at most 1, got {share!r}")
    stops = _stops(body.get("stop"))
    if len(stops) > MOST_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise RequestError("stop", f"must be a text, or a list of at most {MOST_STOPS}, none of them empty")


def _stops(given: Any) -> tuple[Any, ...]:
    """The stop texts of a request or of generation settings: none, one, or several."""
    return () if given is None else tuple(given) if isinstance(given, list) else (given,)
