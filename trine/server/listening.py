"""Sockets that the server listens on."""

from __future__ import annotations

import errno
import socket

from trine.core.errors import ConfigurationError

BACKLOG = 2048


def listen(host: str, port: int, flag: str, *, reuse_port: bool = False) -> socket.socket:
    """A bound, listening socket. ConfigurationError says who or what is in the way, naming `flag`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigurationError(f"{host!r} is not an address of this machine: {error.strerror}", param=flag) from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            remedy = f"port {port} on {host} is in use: stop what listens there, or choose another with {flag}"
        elif error.errno == errno.EACCES:
            remedy = f"port {port} needs privileges: choose one from 1024 on with {flag}"
        else:
            remedy = f"can't listen on {host}:{port}: {error.strerror}"
        raise ConfigurationError(remedy, param=flag) from error
    return listener
