"""The port of the server."""

import socket

import pytest

from ulbq.errors import ResourceError, UsageError

pytest.importorskip("uvicorn")

from ulbq.serving.server import take_port


def test_a_port_is_bound_but_not_listened_at():
    with take_port("127.0.0.1", 0) as bound:
        address = bound.getsockname()
        assert address[1] > 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


def test_a_taken_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"Port {port} of 127\.0\.0\.1 is taken"):
            take_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no such host", "a" * 300, "203.0.113.7"])
def test_hosts_that_are_none_of_this_machine(host):
    with pytest.raises(UsageError, match=r"is no (host|address of this machine)"):
        take_port(host, 0)
