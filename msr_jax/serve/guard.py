"""What stands before every request: whose it is, how large and how slow it may be; and the headers of every answer."""

import asyncio
import ipaddress
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response

STALL = 20.0  # seconds that an upload may stand still
SLOWEST = 4096  # bytes a second of an upload, after the first of those
SAFE = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; media-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware.

    `token`: without it nothing but /healthz is answered; a visit to `/?token=…` leaves it in a cookie. Without a token the
    server is on the loopback address, and only pages of its own may speak to it: a request has to name a loopback host, so
    that no foreign name that points here (DNS rebinding) does, and what changes something must not come from another origin.
    """

    def __init__(self, app: Any, token: str | None, max_bytes: int, origins: tuple[str, ...] = ()):
        self.app, self.token, self.max_bytes, self.origins = app, token, max_bytes, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        origin = headers.get("origin")

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {**HEADERS, **_cors(origin, self.origins)}
                given = {k.lower() for k, _ in message["headers"]}
                added = [(k.encode(), v.encode()) for k, v in own.items() if k.encode() not in given]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        answer = self._refusal(scope, headers, origin)
        if answer is not None:
            await answer(scope, receive, sealed)
            return
        await self.app(scope, self._counted(receive), sealed)

    def _refusal(self, scope: Scope, headers: dict[str, str], origin: str | None) -> Any:
        host = headers.get("host", "")
        if self.token is None and not is_loopback(_hostname(host)):
            return _error(421, "this server answers to localhost alone; start it with --host and --token for others")
        allowed = {f"http://{host}", f"https://{host}", *self.origins}
        if origin in self.origins and scope["method"] == "OPTIONS":
            return Response(status_code=204)
        if scope["method"] not in SAFE and origin is not None and origin not in allowed:
            return _error(403, "requests from other sites are not taken")
        if self.token is not None and scope["path"] != "/healthz":
            asked = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
            if scope["path"] == "/" and asked and secrets.compare_digest(asked.encode(), self.token.encode()):
                answer = RedirectResponse("/", 303)
                answer.set_cookie(_cookie(host), quote(self.token, safe=""), httponly=True, samesite="strict")
                return answer
            if not secrets.compare_digest(_given_token(headers).encode(), self.token.encode()):
                return _error(401, "the token is missing or wrong; open the link that the server printed at its start")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_bytes:
            return _error(413, self._too_large())
        return None

    def _too_large(self) -> str:
        return f"the upload is larger than the {self.max_bytes / 1e6:g} MB that are taken here"

    def _counted(self, receive: Receive) -> Receive:
        total, begun = 0, time.monotonic()

        async def counted() -> Message:
            nonlocal total
            waits = total >= 0  # of the body; after its end only a disconnection is waited for, however long
            try:
                message = await (asyncio.wait_for(receive(), STALL) if waits else receive())
            except TimeoutError:
                raise HTTPException(408, f"nothing was received for {STALL:g} seconds") from None
            if message["type"] == "http.request" and waits:
                total += len(message.get("body", b""))
                if total > self.max_bytes:
                    raise HTTPException(413, self._too_large())
                if total < SLOWEST * (time.monotonic() - begun - STALL):
                    raise HTTPException(408, f"the upload is slower than {SLOWEST} bytes a second")
                if not message.get("more_body", False):
                    total = -1
            return message

        return counted


def _error(status: int, text: str) -> JSONResponse:
    return JSONResponse({"detail": text}, status, {"connection": "close"})


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own; no other names are, whatever they point to."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _cookie(host: str) -> str:
    # Browsers send the cookies of every port of a host to all of them; another server's must not take this one's place.
    port = re.search(r":(\d{1,5})$", host, re.ASCII)
    return f"msr_token_{port[1] if port else 'web'}"


def _cors(origin: str | None, origins: tuple[str, ...]) -> dict[str, str]:
    if origin is None or origin not in origins:
        return {}
    return {
        "access-control-allow-origin": origin,
        "access-control-allow-headers": "authorization, content-type",
        "access-control-allow-methods": "GET, POST, DELETE",
        "access-control-expose-headers": "content-disposition, location, x-column-bands, x-column-samples",
        "vary": "origin",
        "cross-origin-resource-policy": "cross-origin",
    }


def _given_token(headers: dict[str, str]) -> str:
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    # By hand: other programs of this host have cookies of their own, and SimpleCookie stops at the first that is not by the book.
    pairs = (pair.strip().partition("=") for pair in headers.get("cookie", "").split(";"))
    name = _cookie(headers.get("host", ""))
    return next((unquote(value) for own, _, value in pairs if own == name), "")
