"""Who may do what: tokens, cookies, the names that the server answers to, limits, and the headers that keep pages safe.

A token is the whole secret of a person. Programs send it as `Authorization: Bearer TOKEN`; a browser gets it as a
cookie when its join link is opened, and then needs a second value, which other sites cannot read, for every POST.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plaudit.feedback.refusals import Refused

HEADERS = {
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


SHORTEST_KEY = 16
"""Characters of the key with which a browser joins."""


@dataclass(frozen=True)
class Limits:
    """What one person may ask of the server. Bodies in bytes; rates in requests per second, of which `burst` seconds
    may come at once; `failures` are unknown tokens per minute, from everybody together."""

    body: int = 256 * 1024
    manager_body: int = 64 * 1024 * 1024
    browser: float = 20
    program: float = 500
    burst: float = 5
    failures: int = 30


class Known(Protocol):
    """A person as the store knows one."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...


@dataclass(frozen=True)
class Session:
    """Who a request comes from."""

    name: str
    role: str
    token: str
    by_cookie: bool

    @property
    def csrf(self) -> str:
        """What a page must send along with every POST; only pages of this server can learn it."""
        return hmac.new(self.token.encode(), b"plaudit csrf", hashlib.sha256).hexdigest()


class Bucket:
    """Lets through `rate` requests a second, and as many at once as gather in `burst` seconds."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self.rate, self.most, self.clock = rate, rate * burst, clock
        self.left, self.filled = self.most, clock()

    def take(self) -> bool:
        """Whether there was room for one more."""
        now = self.clock()
        self.left = min(self.most, self.left + (now - self.filled) * self.rate)
        self.filled = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


@dataclass
class Access:
    """Decides who a request comes from, by nothing but its token.

    `who` finds the person of a token in the store. `names` are the hosts that the server is reached by; where `wide`,
    it is also reached by any numeric address, which no foreign name server can point here. `address` is the origin by
    which browsers reach it, whatever Host a proxy names; "" where that is the Host.
    """

    who: Callable[[str], Known | None]
    manager_token: str
    study: str
    names: Iterable[str] = ("127.0.0.1", "localhost", "::1")
    wide: bool = False
    address: str = ""
    limits: Limits = field(default_factory=Limits)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.names = frozenset(name.lower() for name in self.names)
        self._known: dict[str, tuple[str, str]] = {}
        self._buckets: dict[tuple[str, str, bool], Bucket] = {}
        self._enrolling = Bucket(1.0, 30.0, self.clock)
        self._failures: deque[float] = deque()

    def cookie(self, role: str) -> str:
        """The cookie's name: browsers share cookies among all ports of a host, so each study has its own."""
        return f"plaudit-{role}-{self.study}"

    def made(self, name: str, key: str) -> str:
        """The token of somebody who joins under this name, with a key that nobody else has. Raises Refused (400) for
        one that could be guessed."""
        if not SHORTEST_KEY <= len(key) <= 200:
            raise Refused(400, f"key: has {SHORTEST_KEY} to 200 characters, drawn at random for each person.")
        said = json.dumps(["plaudit join", key, name]).encode()
        return hmac.new(self.manager_token.encode(), said, hashlib.sha256).hexdigest()

    def forget(self) -> None:
        """Tokens are looked up again, because some have been replaced."""
        self._known = {}

    async def find(self, token: str) -> tuple[str, str] | None:
        """(name, role) of a token. Raises Refused (429) after too many unknown ones.

        Known tokens pass even then: 256 random bits cannot be guessed, and nobody should be able to lock others out.
        """
        if is_same(token, self.manager_token):
            return "manager", "manager"
        if token in self._known:
            return self._known[token]
        known = self._known
        person = await run_in_threadpool(self.who, token) if token else None
        if person is None:
            self._fail()
            return None
        # Where `forget` came meanwhile, this may be void already, and is kept where nobody looks any more.
        known[token] = person.name, person.role
        return known[token]

    def _fail(self) -> None:
        now = self.clock()
        while self._failures and self._failures[0] < now - 60:
            self._failures.popleft()
        if len(self._failures) >= self.limits.failures:
            raise Refused(429, "Too many unknown links or tokens were tried; wait a minute.", 60)
        self._failures.append(now)

    def enrol(self) -> None:
        """Raises Refused (429) when new people come faster than one a second for long."""
        if not self._enrolling.take():
            raise Refused(429, "Too many people join at once; wait a few seconds.", 5)

    async def session(self, request: Request, role: str) -> Session:
        """The person of a request to this role's pages. Raises Refused: 401, 403 (other role, other site, no CSRF
        value), 429."""
        token, by_cookie = self._token(request, role)
        found = await self.find(token) if token else None
        if found is None:
            raise Refused(401, "Open the link that you were given; this browser is not known here.")
        session = Session(*found, token, by_cookie)
        if session.role != role:
            raise Refused(403, f"This is for a {role}; your link is that of a {session.role}.")
        key = role, session.name, by_cookie
        rate = self.limits.browser if by_cookie else self.limits.program
        if not self._buckets.setdefault(key, Bucket(rate, self.limits.burst, self.clock)).take():
            raise Refused(429, "Too many requests; wait a second.", 1)
        if by_cookie:
            self.same_site(request)
            sent = request.headers.get("x-csrf-token", "")
            if request.method == "POST" and not is_same(sent, session.csrf):
                raise Refused(403, "The page is out of date; load it again.")
        return session

    def _token(self, request: Request, role: str) -> tuple[str, bool]:
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return value.strip(), False
        return request.cookies.get(self.cookie(role), ""), True

    def admit(self, request: Request, response: Response, token: str, role: str) -> None:
        """Gives the browser its cookie, which scripts cannot read and other sites cannot send."""
        secure = "https" in (request.url.scheme, urlsplit(self.address).scheme)
        response.set_cookie(
            self.cookie(role), token, max_age=365 * 86400, httponly=True, samesite="strict", secure=secure
        )

    def same_site(self, request: Request) -> None:
        """Raises Refused (403) if the browser says that another site's page asks."""
        origin = request.headers.get("origin")
        own = origin is None or origin == self.address or origin.partition("://")[2] == request.headers.get("host")
        if not own or request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise Refused(403, "A page of another site asked for this; see the setting `address`.")

    def is_host(self, header: str) -> bool:
        """Whether a Host header names this server. Ports are left open: tunnels change them."""
        try:
            host = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        if set(header) & set("@/?#\\"):
            return False
        return host in self.names or (self.wide and _is_address(host))


def is_same(one: str, other: str) -> bool:
    """Whether two secrets are equal, in a time that does not tell how far they are."""
    return hmac.compare_digest(one.encode(), other.encode())


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """The object in a request's body. Raises Refused: 413 over `limit` bytes, 400 for anything else than an object."""
    sentence = f"The body has more than {limit} bytes."
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise Refused(413, sentence)
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(400, "The body must be application/json.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise Refused(413, sentence)
    try:
        value = json.loads(body.decode())  # of bytes, it would take other encodings, and halves of surrogate pairs
        if b"\\ud" in body.lower():  # an escaped half of a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise Refused(400, "The body is not valid JSON in UTF-8.") from None
    if not isinstance(value, dict):
        raise Refused(400, "The body must be a JSON object.")
    return value


class Guard:
    """Stands before every answer of the server: refuses foreign hosts, and adds the headers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if self.access.is_host(Headers(scope=scope).get("host", "")):
            await self.app(scope, receive, guarded)
        else:
            sentence = "This server does not answer to that name; see the settings `address` and `hostnames`."
            await Refused(403, sentence).response()(scope, receive, guarded)
