"""Serve a model over HTTP, as OpenAI's API does: python -m harness.serve PATH."""

from __future__ import annotations

import argparse
import ipaddress
import socket
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState
from transformers.utils.import_utils import is_serve_available

from harness.cli import HelpFormatter, add_trust_remote_code, add_verbose, model_name, run
from harness.compute import default_compute
from harness.errors import UserError
from harness.generate.chat import end_tokens
from harness.generate.decode import context_length, require_whole
from harness.hf import open_model
from harness.models.loading import MODEL_HELP
from harness.models.original import Original, is_verbose, summary
from harness.signals import leave

DESCRIPTION = """\
Serve a ternary checkpoint, or an original model for comparison, over HTTP. Programs that talk to OpenAI's
API can use it: POST /v1/chat/completions and /v1/completions, streamed or not, and GET /v1/models.
Requests are answered one after the other, by the server that comes with transformers.

  python -m harness.serve smollm2-ternary

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "smollm2-ternary", "messages": [{"role": "user", "content": "Hello!"}]}'

The model's name is that of its folder. A request without a temperature samples with the model's own
settings, or else at 1; temperature 0 is greedy. The text of "stop" is part of the answer.
Ctrl-C ends the server.
"""

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
}


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
        """Start to generate; return a queue of text."""
        inputs = self._checked(inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *rest, **named)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *rest: Any, **named: Any
    ) -> Any:
        """Generate to the end."""
        inputs = self._checked(inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, *rest, **named)

    def _checked(self, inputs: Any, settings: Any) -> dict[str, Any]:
        """Limit the answer to the room that the prompt leaves, and let `ending` end it."""
        length = inputs["input_ids"].shape[1]
        if length == 0:
            raise UserError("the prompt is empty")
        if self.positions is not None:
            room = self.positions - length
            if room < 1:
                raise UserError(
                    f"the prompt has {length} tokens, and the model {self.positions} positions; shorten it"
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

    @app.exception_handler(UserError)
    async def refuse(request: Any, error: UserError) -> Any:
        return JSONResponse({"error": {"message": str(error)}}, status_code=400)

    @app.exception_handler(HTTPException)  # which clients expect under another key than FastAPI's
    async def explain(request: Any, error: HTTPException) -> Any:
        return JSONResponse({"error": {"message": error.detail}}, status_code=error.status_code)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Any, error: RequestValidationError) -> Any:
        reason = f"the request is not a JSON object: {error.errors()[0]['msg']}"
        return JSONResponse({"error": {"message": reason}}, status_code=400)

    async def answer(handler: Any, body: dict[str, Any], kind: str) -> Any:
        require_answerable(body)
        try:
            return await handler.handle_request(body, f"{kind}-{uuid.uuid4().hex}")
        except (AttributeError, KeyError, TypeError, ValueError, TemplateError) as error:
            # The handlers check the fields of a request by name alone, and templates refuse some roles.
            raise UserError(f"the request cannot be answered: {summary(error)}") from None

    @app.post("/v1/chat/completions")
    async def chat_completions(body: dict[str, Any]) -> Any:
        if not original.tokenizer.chat_template:
            raise UserError(f"{name} has no chat template; use /v1/completions")
        return await answer(chat, body, "chatcmpl")

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> Any:
        return await answer(completion, body, "cmpl")

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "local"}]}

    return app


def require_answerable(body: dict[str, Any]) -> None:
    """Refuse a request that asks for something that the handlers would ignore, or sample wrongly by.

    Raises
    ------
    UserError
        The message names the field.
    """
    for field, nothing in IGNORED.items():
        value = body.get(field)
        # 0 log-probabilities are those of the chosen tokens alone, and not none.
        asks = value != nothing or (isinstance(nothing, bool) and not isinstance(value, bool))
        if value is not None and asks:
            raise UserError(f"{field} is not supported; drop it from the request")
    share = body.get("top_p")
    if share is not None and not (type(share) in (int, float) and 0 < share <= 1):
        raise UserError(f"top_p must be above 0 and at most 1, got {share!r}")


def run_server(app: Any, bound: socket.socket, generator: Generator) -> None:
    """Answer requests until Ctrl-C or SIGTERM, which ends the answers under way with an error.

    A second signal ends the process at once.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, number: int, frame: Any) -> None:
            if self.should_exit:
                leave(number, frame)
            generator.ending.set()
            super().handle_exit(number, frame)

    config = uvicorn.Config(app, log_level="info" if is_verbose() else "error")
    Server(config).run(sockets=[bound])


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, so that a port in use is told before a model is loaded.

    Raises
    ------
    UserError
        If there is no such address, or the port is in use or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # where it would let two servers share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot serve at {host}, port {port}: {error.strerror}; choose another --port or --host"
        ) from None
    return bound


def _port(value: str) -> int:
    if not value.isdecimal() or int(value) > 65535:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 65535, got {value!r}")
    return int(value)


def _parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.serve", description=DESCRIPTION, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    what = f"a ternary checkpoint; or {MODEL_HELP}"
    add("model", nargs="?", type=model_name, metavar="PATH", help=what)
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen at; others than a loopback address let other machines in, and nobody is "
        "asked for a key",
    )
    add("--port", type=_port, default=8000, metavar="N", help="port to listen at; 0 for any free one")
    add("--cpu", action="store_true", help="run on the CPU even if torch has a CUDA GPU")
    add_trust_remote_code(parser)
    add_verbose(parser)
    return parser


def main() -> int:
    """Run the command line."""
    arguments = _parser().parse_args()
    if not is_serve_available():
        raise UserError("serving requires more packages; run pip install '.[serve]' in the clone")
    with bind(arguments.host, arguments.port) as bound:
        device = "cpu" if arguments.cpu else default_compute().device
        original = open_model(arguments.model, device, trust_remote_code=arguments.trust_remote_code)
        require_whole(original)
        original.model.to(device)
        name = Path(original.name).resolve().name if Path(original.name).exists() else original.name
        host, port = bound.getsockname()[:2]
        if not ipaddress.ip_address(host).is_loopback:
            print(f"warning: whoever reaches {host} can use the model; there are no keys", file=sys.stderr)
        bound.listen()  # whoever connects before the server runs waits for it
        address = f"[{host}]" if ":" in host else host
        print(f"serving {name} at http://{address}:{port}/v1, on {original.model.device}", file=sys.stderr)
        generator = Generator(original)
        run_server(build_app(original, name, generator), bound, generator)
    return 0


if __name__ == "__main__":
    run(main)
