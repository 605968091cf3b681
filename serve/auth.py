"""Who may use the service: tokens, the Host header, and the origin of a page."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from runtime.errors import RequestError
from runtime.errors.messages import shown_path

from .problems import Problem
from .settings import Settings

PAGE_SCRIPTS = ("app.js", "api.js", "combobox.js", "form.js", "mask.js", "pictures.js")
READY_PATH = "/readyz"
OPEN_PATHS = ("/livez", READY_PATH, "/", "/style.css", *(f"/{name}" for name in PAGE_SCRIPTS))
"""Paths that need no token: probes, and the page, which asks its user for one."""
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def read_tokens(path: Path) -> dict[str, str]:
    """Read a file of tokens: one a line, `TOKEN` or `NAME TOKEN`; # starts a comment.

    Returns:
        Users' names by token. A token without a name is its own user.

    Raises:
        RequestError: The file cannot be read, or holds no token.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{shown_path(path)} cannot be read: {reason}.") from None
    tokens: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 2:
            raise RequestError(f"{shown_path(path)}:{number} must be TOKEN or NAME TOKEN.")
        tokens[words[-1]] = words[0] if len(words) == 2 else f"token {number}"
    if not tokens:
        raise RequestError(f"{shown_path(path)} holds no token. Write one a line.")
    return tokens


def check(headers: Headers, method: str, path: str, settings: Settings) -> str | None:
    """Return the user of a request, see `user_of`.

    Raises:
        Problem: The request is for another host, of another origin, or of a stranger.
    """
    check_host(headers, path, settings)
    check_origin(headers, method, settings)
    return user_of(headers, path, settings.tokens)


def user_of(headers: Headers, path: str, tokens: Mapping[str, str]) -> str | None:
    """Return the user's name; None if the service has no tokens, or the path needs none.

    Raises:
        Problem: The request has no valid token (401).
    """
    if not tokens:
        return None
    # The scheme's name has no case (RFC 9110, section 11.1).
    scheme, _, given = headers.get("authorization", "").partition(" ")
    found = None
    # Every token is compared, so that the time says nothing about which one is close.
    for token, name in tokens.items():
        if hmac.compare_digest(token.encode(), given.strip().encode()):
            found = name
    if scheme.lower() == "bearer" and found is not None:
        return found
    # A valid token counts on these paths too: its user is a flow there.
    if path in OPEN_PATHS:
        return None
    raise Problem(
        401,
        "this service needs a token. Send the header Authorization: Bearer TOKEN.",
        headers={"www-authenticate": 'Bearer realm="unnoise"'},
    )


def check_host(headers: Headers, path: str, settings: Settings) -> None:
    """Check the Host header, against pages whose name was rebound to this machine's address.

    /readyz is exempt.

    Raises:
        Problem: The header names another host (421).
    """
    # A container's health check calls an address and knows no name. /readyz holds no user's data.
    if not settings.hosts or path == READY_PATH:
        return
    if host_name(headers.get("host", "")) not in map(host_name, settings.hosts):
        raise Problem(421, "the Host header names another host. Pass --host-name NAME to allow it.")


def check_origin(headers: Headers, method: str, settings: Settings) -> None:
    """Check that a page which sends work belongs to this service.

    Raises:
        Problem: The Origin header names another origin (403).
    """
    origin = headers.get("origin")
    if origin is None or settings.cors or method in SAFE_METHODS:
        return
    # Browsers send the Origin of a page with every request that may change something.
    if _place(origin) != headers.get("host", "").lower():
        raise Problem(403, "pages of other origins may not use this service. See --cors.")


def _place(origin: str) -> str | None:
    """Return the host and port in an Origin header; None if it is not a URL."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def host_name(host: str) -> str:
    """Return the name in a Host header, without the port; or a name that it may have."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    # An address of IPv6 has brackets in the header, and none on a command line.
    if host.count(":") > 1:
        return f"[{host}]"
    return host.partition(":")[0]
