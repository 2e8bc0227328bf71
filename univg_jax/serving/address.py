"""Where a server or a page listens. The address is taken before a model is loaded."""

import socket

from univg_jax.errors import UserError


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that has its address, and refuses connections until it is served; port 0 is any.

    Raises UserError where it cannot have it.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise UserError(f"--host={host} --port={port}: {error.strerror or error}") from None
    return found


def url_of(listening: socket.socket) -> str:
    """What to type into a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
