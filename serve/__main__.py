"""Serve bundles over HTTP: python -m serve BUNDLE ... --port 8000"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import os
import socket
import sys
from pathlib import Path
from threading import Thread

from runtime.errors import ClosedError, RequestError
from runtime.errors.arguments import integer
from runtime.terminal.output import say
from runtime.terminal.verbs import program, run_verb

from .auth import host_name, read_tokens
from .models import Models
from .settings import Settings

SWITCH_S = 0.0005
"""Seconds after which a thread must let another one run."""


def main(arguments: list[str] | None = None) -> int:
    return run_verb(_parser(), serve, arguments)


def serve(given: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit status."""
    settings = settings_of(given)
    integer("port", given.port, 0, 65535)
    # First, so that a port in use is reported before any bundle is loaded.
    listener = listen(given.host, given.port)
    models = Models(given.bundles, settings)
    # Graphs are loaded and measured while the web server's modules are imported.
    Thread(target=_open, args=(models,), daemon=True).start()
    from . import log
    from .app import app_of
    from .server import Server

    log.to_stderr()
    server = Server(app_of(models))
    port = listener.getsockname()[1]
    host = f"[{given.host}]" if ":" in given.host else given.host
    say(f"http://{host}:{port}", flush=True)
    # The inference thread takes Python's lock twice a network call. By default it would wait up to
    # 5 ms each time while the event loop is busy with refusals.
    sys.setswitchinterval(SWITCH_S)
    asyncio.run(server.serve([listener]))
    # A bundle that cannot be opened has stopped the server, unless a signal has.
    failure = models.failure
    if failure is not None and not isinstance(failure, ClosedError):
        raise failure
    if failure is None and not models.opened:
        # A signal came while a bundle was opened. The thread that does this cannot be stopped, and
        # an inference library aborts if Python ends around it.
        os._exit(0)
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises RequestError if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay of 40 ms off only for sockets that name their protocol.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # A restart need not wait for the connections of the last process.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(2048)
    except OSError as error:
        found.close()
        raise RequestError(
            f"cannot listen at {host}, port {port} ({error.strerror or error}). Pass another "
            "--host or --port; port 0 is a free one."
        ) from error
    return found


def _open(models: Models) -> None:
    # The server asks again, and reports what this raises.
    with contextlib.suppress(Exception):
        models.open()


def settings_of(given: argparse.Namespace) -> Settings:
    """The settings that a command line asks for.

    Raises:
        RequestError: The address is not this machine's own, and there is neither a token file nor
            --open.
    """
    local = is_loopback(given.host)
    tokens = read_tokens(given.token_file) if given.token_file else {}
    if not local and not tokens and not given.open:
        raise RequestError(
            f"{given.host} can be reached from other machines. Pass --token-file FILE, so that "
            "only users with a token may use the service, or --open to let everybody."
        )
    hosts = {host_name(name) for name in given.host_name}
    # A page whose name was rebound to this machine has its own name as Host.
    if local:
        hosts |= {"localhost", "127.0.0.1", "[::1]", host_name(given.host)}
    return Settings(
        backend=given.backend,
        precision=given.precision,
        threads=given.threads,
        streams=given.streams,
        min_psnr=given.min_psnr,
        drain_s=given.drain,
        tokens=tokens,
        hosts=tuple(sorted(hosts)),
        cors=given.cors,
        proxies=tuple(given.proxy),
    )


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("serve"), description=__doc__)
    add = parser.add_argument
    add("bundles", nargs="+", type=Path, metavar="BUNDLE", help="a bundle's folder, or emoji32")
    add("--host", default="127.0.0.1", help="the address to listen at [127.0.0.1]")
    add("--port", type=int, default=8000, help="0 takes a free one [8000]")
    add("--token-file", type=Path, metavar="FILE", help="TOKEN or NAME TOKEN, one a line")
    add("--open", action="store_true", help="let other machines use it without a token")
    add(
        "--host-name",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that the Host header may have; again for more [those of this machine]",
    )
    add("--cors", action="store_true", help="let pages of other origins use it")
    add(
        "--proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a proxy whose X-Forwarded-For is believed; again for more",
    )
    add("--drain", type=float, default=30.0, help="seconds to finish work after SIGTERM [30]")
    add("--backend", default="auto", help="inference library, or fastest, which measures [auto]")
    add("--min-psnr", type=float, help="dB to fp32 that --backend fastest keeps [fp32 alone]")
    add("--precision", default="auto", help="one that the bundles hold [auto: fp32]")
    add("--threads", type=int, help="of the inference library [one a core]")
    add("--streams", type=int, help="parts of a batch that run at once [what is fastest]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
