"""Runs the server: in this process for `plaudit label`, or beside another program with `start`."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from plaudit.errors import PlauditError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PATIENCE = 60.0
"""Seconds that a started server may take until it answers."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a study is served. store: the file; the others as in `plaudit.settings.feedback.Label`."""

    store: str
    title: str = ""
    instructions: str = ""
    ratings: tuple[int, int] = (1, 7)
    strength: bool = False
    overlap: int = 1
    lease: float = 600
    gold_share: float = 0.0
    repeat_share: float = 0.0
    seed: int = 0
    people: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    hostnames: tuple[str, ...] = ()
    address: str = ""
    token_file: str = ""


@dataclass(frozen=True)
class Links:
    """Where people and the manager go, and the `url` by which programs on this machine reach the server. join: anybody
    may join with it; empty where people are named."""

    url: str
    join: str
    people: dict[str, str]
    review: str
    manager_token: str


def check(options: Options) -> None:
    """Raises PlauditError for a server that others could reach, unless the user made a token for it, and for an address
    that is none."""
    origin_of(options.address)
    if not _is_loopback(options.host) and not options.token_file:
        raise PlauditError(
            f"host: {options.host} can be reached by other machines; that needs `token_file` too, a file with a "
            "secret for the review page."
        )


def origin_of(address: str) -> str:
    """The address as browsers write it: scheme, host, and port unless it is the scheme's own; "" for "".

    Raises PlauditError for anything else than that.
    """
    if not address:
        return ""
    try:
        parts = urlsplit(address)
        port = "" if parts.port in (None, {"http": 80, "https": 443}.get(parts.scheme)) else f":{parts.port}"
    except ValueError:
        parts, port = urlsplit(""), ""
    host = parts.hostname or ""
    known = parts.scheme in ("http", "https") and host.isascii() and re.fullmatch(r"[\w.:-]+", host)
    if not known or "@" in parts.netloc or parts.path.strip("/") or parts.query or parts.fragment:
        raise PlauditError(f"address: {address!r:.90} is none such as https://labels.example.org, which has no path.")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(options: Options, ready: Callable[[Links], None], stop: threading.Event | None = None) -> int:
    """Serves until SIGINT, SIGTERM or `stop`, and returns how many answers there are then.

    ready: called once, when people can be let in. Raises PlauditError for what the user can put right.
    """
    from plaudit.feedback import secret
    from plaudit.feedback.store import Store

    check(options)
    token = secret.given(Path(options.token_file).expanduser()) if options.token_file else ""
    path = Path(options.store).expanduser()
    with Store.open(path) as store:
        known = secret.load(path)
        known.manager = token or known.manager
        listener = _bound(options.host, options.port, known.port)
        with listener:
            known.port = listener.getsockname()[1]
            people = known.invite(store, options.people)
            secret.save(path, known)
            _serve(options, store, known, people, listener, ready, stop or threading.Event())
        return len(store.labels())


def _serve(
    options: Options,
    store: Any,
    known: Any,
    people: dict[str, str],
    listener: socket.socket,
    ready: Callable[[Links], None],
    stop: threading.Event,
) -> None:
    from plaudit.feedback import secret
    from plaudit.feedback.access import Access
    from plaudit.feedback.server import application

    joining = None if options.people else known.joining
    study = _study(options, store, joining)
    wide = not _is_loopback(options.host)
    address = origin_of(options.address)
    named = {*options.hostnames, *filter(None, [urlsplit(address).hostname])}
    names = {*LOOPBACK, *named, *((options.host, socket.gethostname()) if wide else ())}
    access = Access(store.who, known.manager, known.study, names, wide, address)
    url = f"http://{_named(options, wide)}:{known.port}"
    public = address or url

    def renewed(name: str, token: str) -> None:
        if name in known.people:  # or the next start would find the old link void, and make this one void too
            known.people[name] = token
            secret.save(Path(store.path), known)

    server = _quiet_server(application(store, study, access, renewed))

    def end(*_: object) -> None:
        server.should_exit = True

    def watch() -> None:
        while not server.started and not server.should_exit:
            time.sleep(0.005)
        links = {name: f"{public}/join/{token}" for name, token in people.items()}
        join = f"{public}/join/{joining}" if joining else ""
        ready(Links(url, join, links, f"{public}/join/{known.manager}", known.manager))
        stop.wait()
        end()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    in_main = threading.current_thread() is threading.main_thread()
    try:
        if in_main:
            # uvicorn raises what it caught once more after it has ended: that must then do no harm.
            for number in before:
                signal.signal(number, end)
        threading.Thread(target=watch, daemon=True).start()
        server.run(sockets=[listener])
    finally:
        stop.set()
        if in_main:
            for number, handler in before.items():
                signal.signal(number, handler)


def _quiet_server(application: Any) -> Any:
    """uvicorn's, which says nothing but errors and ends within a second."""
    import uvicorn

    config = uvicorn.Config(
        application,
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def _study(options: Options, store: Any, joining: str | None) -> Any:
    """What is asked: what was said of the study before holds until something else is said."""
    from plaudit.feedback.assigning import Rules
    from plaudit.feedback.server import Study

    said = {name: getattr(options, name) for name in ("title", "instructions") if getattr(options, name)}
    store.describe(**said)
    rules = Rules(options.overlap, options.lease, options.gold_share, options.repeat_share, options.seed)
    title = store.title or "plaudit"
    return Study(title, store.instructions, options.ratings, options.strength, joining, rules)


def _named(options: Options, wide: bool) -> str:
    """The host in links, unless an address is given, which then stands in them."""
    if options.hostnames and not options.address:
        return options.hostnames[0]
    host = socket.gethostname() if wide and options.host in ("0.0.0.0", "::") else options.host
    return f"[{host}]" if ":" in host else host


def _bound(host: str, port: int, last: int) -> socket.socket:
    """A listening socket: at the port asked for; else where the server was last, if that is free; else anywhere."""
    for place in [port] if port else [last, 0]:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, place), family=family, backlog=128)
        except (OSError, OverflowError) as error:
            if place == 0 or place == port:
                reason = getattr(error, "strerror", None) or error
                raise PlauditError(f"port: cannot listen at {host}:{place} ({reason}); choose another.") from None
            continue
        # Else head and body of an answer are 40 ms apart; asyncio sets this only where it made the socket itself.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    raise AssertionError


# ------------------------------------------------------------------------------------------------ for programs


@dataclass
class Served:
    """A server in a process of its own; it ends with `stop`, with the block of `with`, and with this process."""

    url: str
    manager_token: str
    join_url: str
    people: dict[str, str]
    review_url: str
    process: subprocess.Popen[bytes] = field(repr=False)

    def stop(self) -> None:
        """Ends the server and waits for it. What it acknowledged is on the disk."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def start(store: str | Path, **more: Any) -> Served:
    """Starts a server for the store at `store`, and returns once it answers. `more`: see `Options`.

    Raises PlauditError with the server's own sentence if it cannot start.
    """
    options = json.dumps(asdict(Options(store=str(store), **more)))
    process = subprocess.Popen(
        [sys.executable, "-m", "plaudit.feedback.serving", options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A Ctrl-C in the terminal is for the program that started the server, which then ends it in good order.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    told = select.select([process.stdout], [], [], PATIENCE)[0]
    line = process.stdout.readline() if told else b""
    said = json.loads(line) if line else {"error": "the label server did not start; its last words are above."}
    if "error" in said:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
        raise PlauditError(said["error"])
    links = Links(**said)
    return Served(links.url, links.manager_token, links.join, links.people, links.review, process)


def _child(text: str) -> int:
    """Serves what `start` asks for, until the standard input ends, which it does with the other process."""
    stop = threading.Event()

    def follow() -> None:
        while os.read(0, 4096):
            pass
        stop.set()

    def tell(value: dict[str, Any]) -> None:
        print(json.dumps(value), flush=True)

    threading.Thread(target=follow, daemon=True).start()
    given = json.loads(text)
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    try:
        serve(Options(**given), lambda links: tell(asdict(links)), stop)
    except PlauditError as error:
        tell({"error": str(error)})
        return 2
    return 0


# ------------------------------------------------------------------------------------------------ for people


def announce(links: Links, store: str, items: int, browser: bool) -> None:
    """Tells the terminal where to go; opens the page there if that was asked for and somebody sits before it."""
    print(f"{items} question{'s' * (items != 1)} in {store}. Open a link to answer:\n")
    width = max([len(name) for name in links.people], default=0) + 2
    for name, link in links.people.items():
        print(f"  {name:<{width}}{link}")
    if links.join:
        print(f"  {links.join}")
    print(f"\nProgress, agreement and every answer, for you alone:\n\n  {links.review}\n")
    print("Every answer is saved as it is given. Ctrl+C ends the server; the links stay good.", flush=True)
    if browser and sys.stdout.isatty():
        from plaudit.feedback import secret

        webbrowser.open(secret.doorway(Path(store), links.join or next(iter(links.people.values()))))


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1]))
