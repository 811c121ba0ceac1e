"""The server over HTTP: pages for people, and an interface for pages and programs.

Every answer is JSON; what is refused is {"error": one sentence} with the status 400, 401, 403, 404, 409, 413, 429 or
507. Who answers is known from the token, and what is asked from the store; nothing of that is read from a request.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from plaudit.errors import PlauditError
from plaudit.feedback import views
from plaudit.feedback.access import Access, Guard, Session, is_same, read_json
from plaudit.feedback.assigning import Assignment, Rules
from plaudit.feedback.following import Following
from plaudit.feedback.forms import item_from_json
from plaudit.feedback.items import read_answer
from plaudit.feedback.refusals import HANDLERS, Refused
from plaudit.feedback.standing import Progress
from plaudit.feedback.store import Store

PAGES = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
DOORS = ("join.html", "joined.html", "lost.html")
"""What people see before they are let in."""
MOST_TASKS = 20
PER_PAGE = 50
LARGEST = 10**15 - 1
"""The largest priority; SQLite holds a few digits more."""
RATE_EVERY = 60.0
"""Seconds after which a page is told anew how fast people answer, though nothing was written."""
RESTING = 9.0
"""So many times as long as it took to work out the figures of agreement they are kept, whatever was answered meanwhile:
they cost more than everything else here, and people who answer should not wait for them."""

R = TypeVar("R")
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Study:
    """What is asked, and how.

    title, instructions: shown to people. ratings: lowest and highest; (0, 1) shows thumbs. strength: pairs also ask
    how much better. joining: the token of the link that anybody may join with; None if all people are named.
    """

    title: str = "plaudit"
    instructions: str = ""
    ratings: tuple[int, int] = (1, 7)
    strength: bool = False
    joining: str | None = None
    rules: Rules = field(default_factory=Rules)


def application(
    store: Store, study: Study, access: Access, renewed: Callable[[str, str], None] = lambda name, token: None
) -> ASGIApp:
    """The whole server, for uvicorn or any other ASGI server. `renewed` is told the name and the new token of everybody
    whose old one has become void."""
    return Desk(store, study, access, renewed).application()


class Desk:
    """The handlers, over one store."""

    def __init__(self, store: Store, study: Study, access: Access, renewed: Callable[[str, str], None]) -> None:
        self.store, self.study, self.access, self.renewed = store, study, access, renewed
        self.files = _pages()
        self.following = Following(store)
        self.figures: tuple[str, dict[str, Any]] = "", {}
        self.figuring, self.rested = threading.Lock(), 0.0
        # One works while the other waits for the disk. More would only stand before the store's lock, which they get
        # in any order, so that some people would wait three times as long as others.
        self._worker = ThreadPoolExecutor(2, "store")

    async def _do(self, work: Callable[..., R], *given: Any) -> R:
        """What the store is asked for, without holding up other requests."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *given)

    def application(self) -> ASGIApp:
        """Routes, errors as JSON, and the guard before everything."""
        get: dict[str, Handler] = {
            "/": self.page,
            "/join/{token}": self.join,
            "/review": self.review_page,
            "/page/{name}": self.file,
            "/api/study": self.about,
            "/api/next": self.next,
            "/api/progress": self.progress,
            "/api/review": self.review,
            "/api/agreement": self.agreement,
        }
        post: dict[str, Handler] = {
            "/join/{token}": self.enrol,
            "/api/answer": self.answer,
            "/api/skip": self.skip,
            "/api/undo": self.undo,
            "/api/items": self.add,
            "/api/people": self.person,
        }
        inner = Starlette(
            routes=[
                *(Route(path, handler, methods=["GET"]) for path, handler in get.items()),
                *(Route(path, handler, methods=["POST"]) for path, handler in post.items()),
            ],
            exception_handlers=HANDLERS,
        )
        # Not as Starlette's middleware, which stands behind what answers for an unexpected exception.
        return Guard(inner, self.access)

    # -------------------------------------------------------------------------------------------- pages

    def _send(self, name: str, status: int = 200) -> Response:
        content, kind = self.files[name]
        return Response(content, status, media_type=kind)

    async def file(self, request: Request) -> Response:
        """One of the pages' own files; a name is looked up, never joined to a folder."""
        name = request.path_params["name"]
        if name not in self.files or name.endswith(".html"):
            raise Refused(404, "There is no such page.")
        return self._send(name)

    async def page(self, request: Request) -> Response:
        """Where people answer."""
        return await self._page(request, "person", "page.html")

    async def review_page(self, request: Request) -> Response:
        """Where the manager looks."""
        return await self._page(request, "manager", "review.html")

    async def _page(self, request: Request, role: str, name: str) -> Response:
        try:
            await self.access.session(request, role)
        except Refused as refused:
            if refused.status != 401:
                raise
            return self._send("lost.html", 401)
        return self._send(name)

    async def join(self, request: Request) -> Response:
        """A link of one's own, or the study's, which asks for a name."""
        token = request.path_params["token"]
        if self._lets_join(token):
            return self._send("join.html")
        found = await self.access.find(token)
        if found is None:
            return self._send("lost.html", 404)
        role = found[1]
        there = "/" if role == "person" else "/review"
        response: Response = RedirectResponse(there, 303)
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            # Who follows the link from another site's page would come to `there` without the strict cookie.
            response = self._send("joined.html")
            response.headers["refresh"] = f"0; url={there}"
        self.access.admit(request, response, token, role)
        return response

    def _lets_join(self, token: str) -> bool:
        return self.study.joining is not None and is_same(token, self.study.joining)

    async def enrol(self, request: Request) -> Response:
        """Makes a person of a name; only with the study's link."""
        self.access.same_site(request)
        if not self._lets_join(request.path_params["token"]):
            await self.access.find(request.path_params["token"])
            raise Refused(404, "This link is not known here; ask for another one.")
        self.access.enrol()
        body = await read_json(request, self.access.limits.body)
        name, key = _text(body, "name"), _text({"key": "", **body}, "key")
        # A browser that did not hear that it was let in asks again with its key, and gets the same token.
        made = self.access.made(name, key) if key else ""
        token = await self._do(lambda: self.store.join(name, token=made))
        response = JSONResponse({"ok": True})
        self.access.admit(request, response, token, "person")
        return response

    # -------------------------------------------------------------------------------------------- people

    async def about(self, request: Request) -> Response:
        """What a page must know before it asks for questions."""
        role = request.query_params.get("as", "person")
        if role not in ("person", "manager"):
            raise Refused(400, "as: is person or manager.")
        session = await self.access.session(request, role)
        return JSONResponse(
            {
                "study": self.access.study,
                "title": self.study.title,
                "instructions": self.study.instructions,
                "ratings": self.study.ratings,
                "strength": self.study.strength,
                "person": session.name,
                "csrf": session.csrf,
            }
        )

    async def next(self, request: Request) -> Response:
        """The next questions of this person."""
        person = (await self.access.session(request, "person")).name
        count = _count(request, "count", 1, MOST_TASKS)

        def ask() -> dict[str, Any]:
            given = self.store.next(person, count, self.study.rules, time.time())
            return {"tasks": [views.task(one) for one in given], "progress": self._progress(person)}

        return JSONResponse(await self._do(ask))

    async def progress(self, request: Request) -> Response:
        """How far this person is."""
        person = (await self.access.session(request, "person")).name
        return JSONResponse(await self._do(self._progress, person))

    async def answer(self, request: Request) -> Response:
        """Keeps an answer; acknowledged once it has reached the disk."""
        session, body = await self._body(request, "person")
        given = body.get("answer")
        if not isinstance(given, dict):
            raise Refused(400, "answer: must be an object.")
        ms = body.get("ms", 0)
        if type(ms) is not int or ms < 0:
            raise Refused(400, "ms: is a whole number of milliseconds.")

        def keep() -> dict[str, Any]:
            asked = self._asked(body, session)
            views.check_rating(asked, given, self.study.ratings)
            answer = read_answer(asked.item.kind, len(asked.order), given)
            key = _text(body, "key")
            self.store.answer(asked.id, session.name, answer, key=key, ms=ms, now=time.time())
            return {"ok": True, "progress": self._progress(session.name)}

        return JSONResponse(await self._do(keep))

    async def skip(self, request: Request) -> Response:
        """Lets a question go."""
        session, body = await self._body(request, "person")

        def let_go() -> dict[str, Any]:
            asked = self._asked(body, session)
            self.store.skip(asked.id, session.name, key=_text(body, "key"), now=time.time())
            return {"ok": True, "progress": self._progress(session.name)}

        return JSONResponse(await self._do(let_go))

    async def undo(self, request: Request) -> Response:
        """Takes this person's last answer back, and gives the question again with it."""
        session, body = await self._body(request, "person")
        key = _text(body, "key")

        def take_back() -> dict[str, Any]:
            lease = self.study.rules.lease_seconds
            found = self.store.undo(session.name, key=key, now=time.time(), lease_seconds=lease)
            if found is None:
                return {"task": None, "answer": None}
            asked, answer = found
            return {
                "task": {**views.task(asked), "again": True},
                "answer": views.sent(asked, answer, self.study.ratings == (0, 1)),
            }

        return JSONResponse(await self._do(take_back))

    async def _body(self, request: Request, role: str) -> tuple[Session, dict[str, Any]]:
        session = await self.access.session(request, role)
        limits = self.access.limits
        return session, await read_json(request, limits.body if role == "person" else limits.manager_body)

    def _asked(self, body: Mapping[str, Any], session: Session) -> Assignment:
        name = _text(body, "assignment")
        try:
            return self.store.assigned(name, session.name)
        except PlauditError as error:
            raise Refused(404, str(error)) from None

    def _progress(self, person: str) -> dict[str, Any]:
        """Others' names and counts are not for this person's eyes."""
        found = self.store.progress(person, self.study.rules, time.time())
        return {"done": found.done, "left": found.left, "mine": found.mine, "per_minute": found.per_minute}

    # -------------------------------------------------------------------------------------------- the manager

    async def add(self, request: Request) -> Response:
        """More items, which people get as soon as they ask."""
        _, body = await self._body(request, "manager")
        items, priority = body.get("items"), body.get("priority", 0)
        if not isinstance(items, list) or type(priority) is not int or abs(priority) > LARGEST:
            raise Refused(400, "items: must be a list, and `priority` a whole number of at most 15 digits.")

        def keep() -> int:
            read = [item_from_json(value, f"items[{place}]") for place, value in enumerate(items)]
            return self.store.add(read, priority=priority)

        return JSONResponse({"added": await self._do(keep)})

    async def person(self, request: Request) -> Response:
        """A new person, or with `renew` a new token for a known one, whose old token is void."""
        _, body = await self._body(request, "manager")
        name = _text(body, "name")
        if body.get("renew") is True:
            token = await self._do(self.store.renew, name)
            self.access.forget()
            await self._do(self.renewed, name, token)
        else:
            token = await self._do(self.store.join, name)
        return JSONResponse({"token": token})

    async def review(self, request: Request) -> Response:
        """Progress, and one page of answers, the newest first; the `version` alone where that is still the one of which
        the page says that it is known, by `since`."""
        await self.access.session(request, "manager")
        page, since = _count(request, "page", 1, 10**9), request.query_params.get("since", "")

        def look() -> dict[str, Any]:
            now = time.time()
            # The rate of answering falls while nothing happens, so that no version lasts for ever.
            version = f"{page}.{now // RATE_EVERY:.0f}.{self.store.version}"
            if version == since:
                return {"version": version}
            progress: Progress = self.store.progress(None, self.study.rules, now)
            return {
                "version": version,
                "title": self.study.title,
                "progress": {"done": progress.done, "left": progress.left, "per_minute": progress.per_minute},
                "people": progress.people,
                "skipped": self.store.skipped(),
                "page": page,
                "pages": -(-sum(progress.people.values()) // PER_PAGE),
                "labels": [views.reviewed(label) for label in self.store.newest(PER_PAGE, (page - 1) * PER_PAGE)],
            }

        return JSONResponse(await self._do(look))

    async def agreement(self, request: Request) -> Response:
        """Figures of agreement: worked out when an answer was given or taken back, after a rest."""
        await self.access.session(request, "manager")

        def figure() -> dict[str, Any]:
            with self.figuring:  # whoever asks meanwhile waits for the same figures
                began, version = time.monotonic(), self.following.version
                if version != self.figures[0] and began >= self.rested:
                    # scipy and krippendorff take a second to load, which the pages of people should not wait for.
                    from plaudit.feedback.agreement import summary

                    self.figures = version, summary(self.following.labels())
                    now = time.monotonic()
                    self.rested = now + RESTING * (now - began)
                return self.figures[1]

        return JSONResponse(await run_in_threadpool(figure))


def _pages() -> dict[str, tuple[bytes, str]]:
    """By name, the files of the pages and what they are. Those that stand before the questions share a frame, which
    the standard library fills, so that the server need not load jinja2 before it answers."""
    files = {path.name: (path.read_text("utf-8"), TYPES[path.suffix]) for path in PAGES.iterdir()}
    frame, kind = files.pop("door.html")
    files |= {name: (Template(frame).substitute(main=files[name][0]), kind) for name in DOORS}
    return {name: (text.encode(), kind) for name, (text, kind) in files.items()}


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise Refused(400, f"{name}: must be text.")
    return value


def _count(request: Request, name: str, least: int, most: int) -> int:
    value = request.query_params.get(name, str(least))
    if not (value.isascii() and value.isdecimal() and len(value) < 16 and least <= int(value) <= most):
        raise Refused(400, f"{name}: is a whole number from {least} to {most}.")
    return int(value)
