"""What the server says when it cannot do what it is asked: a status of HTTP, and one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from plaudit.errors import PlauditError
from plaudit.feedback.store import Conflict, StoreFull


class Refused(Exception):
    """A request that is turned down: the status of HTTP, one sentence, and perhaps seconds to wait."""

    def __init__(self, status: int, sentence: str, wait: int = 0) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.wait = status, sentence, wait

    def response(self) -> Response:
        """The sentence as JSON."""
        headers = {"retry-after": str(self.wait)} if self.wait else {}
        return JSONResponse({"error": self.sentence}, self.status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


async def _full(request: Request, error: Exception) -> Response:
    return Refused(507, "The server's disk is full; nothing was kept of this.", 5).response()


async def _conflict(request: Request, error: Exception) -> Response:
    return Refused(409, str(error)).response()


async def _wrong(request: Request, error: Exception) -> Response:
    return Refused(400, str(error)).response()


async def _missing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    return Refused(status, "There is no such page." if status == 404 else error.detail).response()


async def _broken(request: Request, error: Exception) -> Response:
    return Refused(500, "Something went wrong in the server; its terminal says what.").response()


HANDLERS: Mapping[Any, Any] = {
    Refused: _refused,
    StoreFull: _full,
    Conflict: _conflict,
    PlauditError: _wrong,
    HTTPException: _missing,
    Exception: _broken,
}
"""For Starlette, by exception."""
