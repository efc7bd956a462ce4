"""Asking the hub, and the places it sends us on to, for one thing at a time.

Requests go through the session of huggingface_hub, which takes a long time to import: so this
module is imported by those alone who need the network. Redirections are followed here, because the
token is for the hub and not for the places that it sends us on to.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import OfflineModeIsEnabled

from cpuinfer import __version__
from cpuinfer.gguf_errors import escape
from cpuinfer.hub import names

_TIMEOUT = 30.0  # seconds without any sign of the server
_MAX_REDIRECTS = 10
_REDIRECTIONS = (301, 302, 303, 307, 308)


@contextmanager
def opened(url: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
    """The answer of the last server in a chain of redirections, its body still to be read.

    ValueError for an HF_ENDPOINT or a token that cannot be used, OSError for a redirection that is
    not followed; `reaching` tells what else goes wrong.
    """
    hub = _hub()
    token = _token()
    # Not the headers of huggingface_hub, which tell what other packages are installed.
    headers = headers | {"User-Agent": f"cpuinfer/{__version__}", "Accept-Encoding": "identity"}
    address = httpx2.URL(url)
    for _ in range(_MAX_REDIRECTS):
        ours = token is not None and _place(address) == _place(hub)
        sent = headers | ({"Authorization": f"Bearer {token}"} if ours else {})
        with get_session().stream(
            "GET", address, headers=sent, timeout=_TIMEOUT, follow_redirects=False
        ) as response:
            if "Location" not in response.headers or response.status_code not in _REDIRECTIONS:
                yield response
                return
            address = _next(address, response.headers["Location"])
    raise refused(url, "the server sends us on again and again")


def _hub() -> httpx2.URL:
    hub = names.endpoint()
    if not hub.lower().startswith(("https://", "http://")) or not names.host_of(hub):
        raise ValueError(f"HF_ENDPOINT is {hub}, which is no address such as {names.ENDPOINT}")
    return httpx2.URL(hub)


def _token() -> str | None:
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token is not None and not (token.isascii() and token.isprintable()):
        raise ValueError("HF_TOKEN has characters that no token has")
    return token


def _place(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _next(address: httpx2.URL, location: str) -> httpx2.URL:
    """Where a redirection leads, if it is a place to follow it to."""
    try:
        target = address.join(location)
    except httpx2.InvalidURL:
        raise refused(str(address), f"the server sends us on to {location!r}") from None
    if target.scheme not in ("https", address.scheme) or target.scheme not in ("http", "https"):
        raise refused(str(address), f"the server sends us on to {target}, which is refused")
    return target.copy_with(username=None, password=None)


# What goes wrong


@contextmanager
def reaching() -> Iterator[None]:
    """What the network does, as OSErrors that name the hub."""
    try:
        yield
    except OfflineModeIsEnabled:
        reason = "not asked, since HF_HUB_OFFLINE is set"
        raise OSError(errno.ENETUNREACH, reason, names.endpoint()) from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason = f"the hub cannot be reached ({told_of(error)})"
        raise OSError(errno.EHOSTUNREACH, reason, names.endpoint()) from None


def told_of(error: Exception) -> str:
    """What an error of the network says, in one line."""
    return escape(str(error) or type(error).__name__)


def refused(url: str, reason: str) -> OSError:
    """What is said of an answer that is not used."""
    return OSError(errno.EPROTO, escape(reason), url)


def denied(repository: str) -> PermissionError:
    """What is said where the hub does not let us have a repository or a file of it."""
    page = f"{names.endpoint()}/{repository}"
    if _token() is None:
        step = (
            f"accept the licence at {page}, make a token in the settings of your account there, "
            "and set HF_TOKEN to it"
        )
    else:
        step = (
            f"was the licence at {page} accepted, and is your token (HF_TOKEN, or of "
            "`hf auth login`) still valid and allowed to read it?"
        )
    return PermissionError(errno.EACCES, f"the hub refuses access: {step}", repository)
