"""The secrets of a study, in a file of their own beside its store, so that links live through a restart."""

from __future__ import annotations

import hashlib
import html
import json
import os
import secrets
import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path

from plaudit.errors import PlauditError
from plaudit.feedback.store import Store

SHORTEST = 20
"""Characters of a token that a user makes up."""


@dataclass
class Secrets:
    """manager, joining: tokens of the review link and of the link that anybody may join with. people: tokens of those
    who were named. port: where the server was last, so that links and what browsers keep stay good."""

    manager: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    joining: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    people: dict[str, str] = field(default_factory=dict)
    port: int = 0

    @property
    def study(self) -> str:
        """A short name of the study that tells nothing of its secrets."""
        return hashlib.sha256(self.joining.encode()).hexdigest()[:8]

    def invite(self, store: Store, names: tuple[str, ...]) -> dict[str, str]:
        """Tokens of these people, who are made where needed. Raises PlauditError for a name that cannot be one."""
        known = store.people()
        for name in names:
            token = self.people.get(name, "")
            person = store.who(token) if token else None
            if person is None or person.name != name:
                self.people[name] = store.renew(name) if name in known else store.join(name)
        return {name: self.people[name] for name in names}


def path_of(store: Path) -> Path:
    """Where the secrets of a store are."""
    return store.with_name(f"{store.name}.secrets")


def load(store: Path) -> Secrets:
    """The secrets of a store, new ones if there are none. Raises PlauditError if others may read them."""
    path = path_of(store)
    text = _private(path)
    if text is None:
        return Secrets()
    try:
        return Secrets(**json.loads(text))
    except (ValueError, TypeError):
        raise PlauditError(f"{path}: holds no secrets of a study; remove it to get new links.") from None


def save(store: Path, found: Secrets) -> None:
    """Writes the secrets so that only their owner may read them, and the old or the new ones are there."""
    _keep(path_of(store), json.dumps(asdict(found), ensure_ascii=False, indent=1))


def doorway(store: Path, link: str) -> str:
    """The address of a page beside the store that only its owner may read, and that leads on to `link`: a program which
    opens it tells nobody the token, as the link itself would in the list of the machine's processes."""
    path = door_of(store)
    _keep(path, f'<!doctype html>\n<meta http-equiv="refresh" content="0; url={html.escape(link)}">\n')
    return path.resolve().as_uri()


def door_of(store: Path) -> Path:
    """Where `doorway` keeps its page."""
    return store.with_name(f"{store.name}.open.html")


def given(path: Path) -> str:
    """The token in a file of the user's. Raises PlauditError if it is not there, too short, or others may read it."""
    text = _private(path)
    token = (text or "").strip()
    if len(token) < SHORTEST or not token.isascii() or not token.replace("-", "").replace("_", "").isalnum():
        raise PlauditError(
            f"token_file: {path} must hold a secret of {SHORTEST} or more letters, digits, - and _, "
            "as `openssl rand -hex 24` makes one."
        )
    return token


def _keep(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _private(path: Path) -> str | None:
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise PlauditError(f"{path}: others on this machine may read it; first `chmod 600 {path}`.")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise PlauditError(f"{path}: cannot be read ({error}).") from None
