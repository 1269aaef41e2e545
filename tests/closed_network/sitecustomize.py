"""Python imports this first where its folder is on the path: the network ends at this machine.

Each attempt to leave it is refused, and noted in the file that CLOSED_NETWORK_LOG names.
"""

import errno
import os
import socket
import sys

_HERE = {None, "", "localhost", "::1", "0.0.0.0", "::", socket.gethostname()}


def _is_here(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    return name in _HERE or str(name).startswith("127.")


def _refuse(event: str, arguments: tuple) -> None:
    if event == "socket.connect":
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if not _is_here(host):
        with open(os.environ["CLOSED_NETWORK_LOG"], "a") as log:
            log.write(f"{event} {host} in {sys.argv}\n")
        raise OSError(errno.ENETUNREACH, "the network is closed")


sys.addaudithook(_refuse)
