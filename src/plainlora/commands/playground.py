"""`plainlora playground`: a local page on which a base and its adapters answer side by side."""

import argparse
import ipaddress
import socket
import sys
from time import sleep

from plainlora.commands.chat import open_session
from plainlora.commands.model_flags import add_base_flags
from plainlora.errors import UserError


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"must be a port from 1 to 65535, not {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("--adapter", nargs="+", required=True, help="folder of an adapter, or several on one base")
    parser.add_argument("--port", type=_port, default=7860, help="port of the page (default: 7860)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add_base_flags(parser)


def check_address(host: str, port: int) -> None:
    """Raises `UserError` if nothing can listen there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: a port just left is free
            listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"nothing can listen on {host} port {port} ({error}); give another --port or --host"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(arguments: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C."""
    import plainlora.quiet  # noqa: F401
    from plainlora.chat.page import build, serve

    check_address(arguments.host, arguments.port)
    session = open_session(arguments)
    if not is_loopback(arguments.host):
        print(
            f"warning: everybody who reaches {arguments.host} can use this page; there is no password",
            file=sys.stderr,
        )
    page = build(session, str(session.model.name_or_path))
    print(f"PlainLoRA playground: {serve(page, arguments.host, arguments.port)}  (Ctrl-C ends it)", flush=True)
    try:
        while True:
            sleep(1)
    except KeyboardInterrupt:
        print()
    finally:
        session.close()
        page.close(verbose=False)
