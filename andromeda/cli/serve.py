"""`andromeda serve`: a server with OpenAI's interface, that of `transformers serve`, for one model of this package."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import importlib.util
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from andromeda.cli.arguments import add_model_options, integer
from andromeda.cli.console import UsageError, say
from andromeda.cli.loading import find_model, load_model, read_device, tokenizer_of

if TYPE_CHECKING:
    from fastapi.responses import JSONResponse
    from transformers import PreTrainedTokenizerBase

DESCRIPTION = """\
Answer the requests of OpenAI's clients with a trained model: /v1/completions and /v1/chat/completions, both also as a
stream, and /v1/models. It is the server of `transformers serve`, which needs `pip install 'transformers[serving]'`;
requests are answered one after the other. Ctrl-C ends it; a request that is being answered then has 5 seconds.

  andromeda serve run --port 8000
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "run", "prompt": "Once upon"}'"""

_SECONDS_TO_FINISH = 5  # for the requests that are being answered at Ctrl-C
_NEEDED = ("fastapi", "openai", "pydantic", "uvicorn")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("checkpoint", metavar="MODEL", help="folder of a saved model, a checkpoint or a run")
    parser.add_argument("--host", default="localhost", metavar="NAME", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=integer(1, 65535), default=8000, metavar="N", help="port to listen on")
    parser.add_argument("--name", metavar="NAME", help="name of the model in requests (default: MODEL as given)")
    parser.add_argument(
        "--chat-template", metavar="FILE", help="template of chats, in Jinja (default: the tokenizer's, if it has one)"
    )
    parser.add_argument("--cors", action="store_true", help="let web pages of other hosts send requests")
    parser.add_argument("--continuous-batching", action="store_true", help=argparse.SUPPRESS)
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with these options; returns the exit code."""
    if arguments.continuous_batching:
        raise UsageError(
            "--continuous-batching is not possible: it keeps keys and values in pages of its own, and the cache of "
            "this model also holds the token shift and the segments of the positions; leave it out, and requests are "
            "answered one after the other"
        )
    _check_packages()
    device = read_device(arguments.device)
    folder = find_model(arguments.checkpoint)
    tokenizer = tokenizer_of(folder, arguments.tokenizer).tokenizer
    if arguments.chat_template is not None:
        tokenizer.chat_template = _read_template(arguments.chat_template)
    _check_address(arguments.host, arguments.port)
    model = load_model(folder, device, arguments.dtype)
    for token in ("eos_token_id", "pad_token_id"):
        if getattr(model.generation_config, token) is None:
            setattr(model.generation_config, token, getattr(tokenizer, token))
    # Requests name a temperature. Without sampling it would be ignored; a temperature of 0 still gives greedy search.
    model.generation_config.do_sample = True
    name = arguments.name or arguments.checkpoint
    _serve(name, model, tokenizer, host=arguments.host, port=arguments.port, cors=arguments.cors)
    return 0


def _check_packages() -> None:
    if missing := [package for package in _NEEDED if importlib.util.find_spec(package) is None]:
        raise ImportError(f"serve needs {', '.join(missing)}, not installed: pip install 'transformers[serving]'")
    if importlib.util.find_spec("transformers.cli.serving") is None:
        raise ImportError("serve needs transformers 5.23 or newer: pip install --upgrade transformers")


def _check_address(host: str, port: int) -> None:
    """OSError now, before the model is loaded, if the server could not listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise OSError(
            f"serve: cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host"
        ) from error


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat-template: {path} must be a text file in UTF-8: {error}") from error


def _serve(name: str, model: Any, tokenizer: PreTrainedTokenizerBase, *, host: str, port: int, cors: bool) -> None:
    """Run the server of transformers, with this model in place of one that it would look up in its own namespace."""
    import uvicorn
    from fastapi import HTTPException
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager, server

    def no_template(*arguments: Any, **options: Any) -> None:
        raise HTTPException(
            status_code=400,
            detail="the tokenizer of this model has no chat template: send the text to /v1/completions, or start the "
            "server with --chat-template FILE",
        )

    if tokenizer.chat_template is None:
        vars(tokenizer)["apply_chat_template"] = no_template
    entry = {"id": name, "object": "model", "owned_by": "andromeda", "created": round(time.time())}

    class OneModel(model_manager.ModelManager):
        """Knows one model, which is loaded already, under a name that need not be a path or a repository."""

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        def _load_model(self, *arguments: Any, **options: Any) -> Any:
            return model

        def _load_processor(self, *arguments: Any, **options: Any) -> Any:
            return tokenizer

        @staticmethod
        def get_gen_models(  # type: ignore[override]  # not one that remembers its result
            cache_dir: str | None = None,
        ) -> list[dict[str, Any]]:
            return [entry]

    build = server.build_server

    def build_server(*arguments: Any, **options: Any) -> Any:
        app = build(*arguments, **options)
        for kind in (HTTPException, TypeError, ValueError):
            app.add_exception_handler(kind, _refusal)
        return app

    configure = functools.partial(uvicorn.Config, timeout_graceful_shutdown=_SECONDS_TO_FINISH)
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    say(f"serving {name!r} on http://{host}:{port}/v1; Ctrl-C ends it")
    with (
        _replaced(model_manager, "ModelManager", OneModel),
        _replaced(server, "build_server", build_server),
        _replaced(uvicorn, "Config", configure),
    ):
        Serve(force_model=name, host=host, port=port, device=str(model.device), enable_cors=cors)


def _refusal(request: object, error: Exception) -> JSONResponse:
    """The answer to a request that cannot be fulfilled, in the form whose message OpenAI's client shows."""
    from fastapi.responses import JSONResponse

    message = getattr(error, "detail", None) or str(error) or type(error).__name__
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, status_code=getattr(error, "status_code", 400))


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Whether a message is not the traceback of a request that was cut off because the server ends."""
    return record.exc_info is None or record.exc_info[0] is not asyncio.CancelledError


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """In the block, `Serve` finds `value` where it looks for a part of its own."""
    theirs = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, theirs)
