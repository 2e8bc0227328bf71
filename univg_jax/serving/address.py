"""Where a server or a page listens. The address is taken before a model is loaded."""

import ipaddress
import socket

from univg_jax.errors import UserError


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens, so that nobody else can have its address; port 0 is any.

    Who connects waits until it is served. Raises UserError where it cannot have the address.
    """
    if not host:
        raise UserError("--host is empty: expected an address, such as 127.0.0.1")
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        # Two sockets may be bound to one address, but only one of them can listen.
        found.listen()
    except OSError as error:
        found.close()
        raise UserError(f"--host={host} --port={port}: {error.strerror or error}") from None
    return found


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def url_of(listening: socket.socket) -> str:
    """What to type into a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
