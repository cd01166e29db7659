"""The HTTP server: a port, and uvicorn on it until somebody stops it."""

import asyncio
import errno
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from ulbq.errors import ResourceError, UsageError
from ulbq.serving.worker import Worker

_PATIENCE = 5  # seconds that connections have to end in


def take_port(host: str, port: int) -> socket.socket:
    """A socket that is bound, and not listened at yet.

    Args:
        host: name or address.
        port: 0 takes a free one.

    Raises:
        UsageError: there is no such host here.
        ResourceError: the port is taken, or not to be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"'{host}' is no host.", hint="`host=127.0.0.1` is this machine alone.") from error
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # What ended a moment ago may still hold the port.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise UsageError(f"'{host}' is no address of this machine.", hint="Take 127.0.0.1 or 0.0.0.0.") from error
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
        raise ResourceError(f"Port {port} of {host} {why}.", hint="Take another `port`.") from error
    return bound


def run(app: Starlette, bound: socket.socket, worker: Worker, on_ready: Callable[[], object]) -> None:
    """Serve until SIGINT or SIGTERM, which then take their usual course; answers on the way are stopped.

    Args:
        app: what answers.
        bound: as of :func:`take_port`.
        worker: closed as soon as the signal comes.
        on_ready: called once requests are taken.
    """
    # Neither its banner nor a line for each request: only what goes wrong is logged.
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=_PATIENCE)
    asyncio.run(_run(uvicorn.Server(config), bound, worker, on_ready))


async def _run(server: uvicorn.Server, bound: socket.socket, worker: Worker, on_ready: Callable[[], object]) -> None:
    serving = asyncio.ensure_future(server.serve([bound]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    if server.started:
        on_ready()
    while not (server.should_exit or serving.done()):
        await asyncio.sleep(0.05)
    worker.close()
    await serving
