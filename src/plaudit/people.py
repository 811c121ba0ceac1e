"""What people said, looked at and imitated: the doors of `plaudit agreement` and `plaudit annotate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plaudit import checks, config
from plaudit.errors import PlauditError
from plaudit.run import write_atomically
from plaudit.settings.feedback import Agreement, Annotate

if TYPE_CHECKING:
    from plaudit.feedback.annotator import Taste
    from plaudit.world import World


def agreement(settings: Agreement) -> Path:
    """Prints the figures of agreement, writes agreement.json and agreement.html, and returns the path of the page.

    Raises PlauditError for what the user can put right.
    """
    from plaudit import feedback_report
    from plaudit.feedback.agreement import summary
    from plaudit.feedback.gathering import gather

    settings = config.check(settings)
    names = checks.names_of(settings.data)
    labels = gather(names)
    if not labels:
        raise PlauditError(f"data: {' and '.join(names)} holds no labels yet.")
    found = summary(labels, settings.seed, settings.resamples)
    folder = Path(settings.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "agreement.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        write_atomically(folder / "agreement.html", feedback_report.page(found, title=", ".join(names)))
    except OSError as error:
        raise PlauditError(f"output: {folder} cannot be written ({error.strerror}); choose another.") from None
    feedback_report.show(found)
    return folder / "agreement.html"


def annotate(settings: Annotate) -> list[int]:
    """Answers at a label server until there is nothing left to answer, and returns how often each person did.

    Raises PlauditError for what the user can put right.
    """
    settings = config.check(settings)
    url, tokens = _places(settings)
    checks.check_rewards(checks.listed(settings.rewards))
    from plaudit.feedback import annotator

    if settings.people:
        tokens = annotator.admitted(url, tokens[0], settings.people)
    own = tastes(settings, len(tokens))
    return annotator.annotate(url, tokens, own, limit=settings.limit, patience=settings.patience)


def tastes(settings: Annotate, people: int, world: World | None = None) -> list[Taste]:
    """One taste for each of so many people, with seeds of their own and one reward. Raises PlauditError."""
    from plaudit.feedback.annotator import Taste
    from plaudit.recipes import start_world
    from plaudit.rewards import load_rewards

    world = world or start_world(settings)
    rewards = load_rewards(
        settings.rewards, weights=settings.reward_weights, precision=world.precision, device=world.device
    )

    def reward(prompts: Any, completions: Any) -> list[float]:
        return [float(value) for value in rewards(prompts, completions, {})]

    return [
        Taste(reward, settings.temperature, settings.noise, settings.ties, settings.cant, settings.seed + person)
        for person in range(people)
    ]


def _places(settings: Annotate) -> tuple[str, list[str]]:
    """The server's address, and the tokens of those who answer."""
    url, _, inside = settings.url.partition("/join/")
    if not url:
        raise PlauditError("url: give the address of the label server, or a link that lets one person in.")
    tokens = [token for token in (settings.token, inside) if token]
    if settings.token_file:
        path = Path(settings.token_file)
        if not path.is_file():
            raise PlauditError(f"token_file: there is no file {settings.token_file!r}.")
        try:
            tokens += path.read_text("utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise PlauditError(f"token_file: {settings.token_file} cannot be read ({error}).") from None
    if not tokens:
        raise PlauditError("token: nobody answers: give `token`, `token_file`, or the link of one person as `url`.")
    if settings.people and len(tokens) > 1:
        raise PlauditError("people: these are let in by the manager: give the manager's token, and no other.")
    return url, tokens
