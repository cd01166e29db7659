"""``serve``: a model answers over HTTP, by OpenAI's API."""

import ipaddress
from collections.abc import Callable
from importlib.util import find_spec

from ulbq.config.generate import ServeRequest
from ulbq.errors import InputError, ResourceError
from ulbq.progress import Progress, Silent
from ulbq.serving.generator import TextGenerator
from ulbq.serving.worker import Worker

_PACKAGES = ("starlette", "uvicorn")
_OWN_NAMES = ("localhost", "127.0.0.1", "::1")


def serve(
    request: ServeRequest, on_ready: Callable[[str], object] = lambda address: None, progress: Progress | None = None
) -> None:
    """Answer requests until the process is interrupted or terminated.

    Args:
        request: what to do.
        on_ready: called with the address that clients take, once requests are taken: ``http://127.0.0.1:8000/v1``.
        progress: told how it goes, and of every answer.

    Raises:
        UsageError: options that do not go together, or a host that is none.
        InputError: a source that is no model.
        ResourceError: the packages for serving, the port, the model, the device or memory are not to be had.
    """
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        what = f"{' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        raise ResourceError(f"Serving needs {what}.", hint="pip install 'ulbq[serve]'")
    from ulbq.serving.app import Limits, build_app
    from ulbq.serving.server import run, take_port

    progress = progress or Silent()
    generator = TextGenerator(request, progress)
    with take_port(request.host, request.port) as bound:
        try:
            generator.chat_tokens([{"role": "user", "content": "Hello"}])
        except InputError as error:
            progress.warn(f"{error.message} Texts are taken, chats are not.")
        generator.load(progress)
        worker = Worker(generator)
        limits = Limits(request.model_name or generator.source.name, request.max_new_tokens, _names(request.host))
        port = bound.getsockname()[1]
        shown = f"[{request.host}]" if ":" in request.host else request.host
        address = f"http://{shown}:{port}/v1"
        run(build_app(worker, limits, progress), bound, worker, lambda: on_ready(address))


def _names(host: str) -> tuple[str, ...]:
    """Names by which a server at this address may be asked: its own alone where no other machine reaches it."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    return (host, *_OWN_NAMES) if local else ("*",)
