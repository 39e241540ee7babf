"""The command line of python -m harness.serve."""

from __future__ import annotations

import argparse
import ipaddress
import socket
import sys
from pathlib import Path
from typing import Any

from transformers.utils.import_utils import is_serve_available

from harness.cli import HelpFormatter, add_trust_remote_code, add_verbose, model_name, run
from harness.compute import default_compute
from harness.errors import UserError
from harness.generate.decode import require_whole
from harness.hf import open_model
from harness.models.loading import MODEL_HELP
from harness.models.original import is_verbose
from harness.serve.app import Generator, build_app
from harness.signals import leave

DESCRIPTION = """\
Serve a ternary checkpoint, or an original model for comparison, over HTTP. Programs that talk to OpenAI's
API can use it: POST /v1/chat/completions and /v1/completions, streamed or not, and GET /v1/models.
Requests are answered one after the other, by the server that comes with transformers.

  python -m harness.serve smollm2-ternary

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "smollm2-ternary", "messages": [{"role": "user", "content": "Hello!"}]}'

The model's name is that of its folder. A request without a temperature samples with the model's own
settings, or else at 1; temperature 0 is greedy.
Ctrl-C ends the server.
"""


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
