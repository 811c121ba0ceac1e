"""`plaudit label`: puts questions into a store, and serves the page on which people answer them."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

from plaudit import checks, config
from plaudit.errors import PlauditError
from plaudit.feedback import secret, serving
from plaudit.feedback.items import Item
from plaudit.feedback.store import Store
from plaudit.settings.feedback import Label

SAMPLED = (
    "policies",
    "prompts",
    "several",
    "limit",
    "seed",
    "max_prompt_tokens",
    "max_new_tokens",
    "temperature",
    "stop",
)


def label(settings: Label) -> None:
    """Serves until Ctrl-C or SIGTERM. Raises PlauditError for what the user can put right."""
    settings = config.check(settings)
    names = {field.name for field in fields(serving.Options)}
    options = serving.Options(**{name: getattr(settings, name) for name in names})
    serving.check(options)
    path = Path(settings.store).expanduser()
    count = _filled(settings, path)

    def ready(links: serving.Links) -> None:
        serving.announce(links, str(path), count, settings.browser)

    try:
        answers = serving.serve(options, ready)
    finally:
        secret.door_of(path).unlink(missing_ok=True)
    print(
        f"\nStopped. {answers} answer{'s' * (answers != 1)} in {path}; `plaudit agreement --data {path}` looks at them."
    )


def _filled(settings: Label, path: Path) -> int:
    """Adds what is to be asked to the store, and returns how many questions it then holds."""
    items = _of_files(settings) if settings.data else []
    if settings.policies:
        checks.check_data(settings.prompts)
        for policy in settings.policies:
            checks.check_model(policy)
    elif not items and not path.exists():
        raise PlauditError("data: give what is to be judged, or `policies` and `prompts`.")
    with Store.open(path) as store:
        asked = json.dumps({name: config.plain(getattr(settings, name)) for name in SAMPLED})
        if settings.policies and store.setting("sampled") != asked:
            store.add(_of_policies(settings))
            store.describe(sampled=asked)  # the same command again does not sample again
        store.add(items)
        return len(store.items())


def _of_files(settings: Label) -> list[Item]:
    from plaudit.feedback.candidates import read_items

    kind = None if settings.kind == "auto" else settings.kind
    items = read_items(checks.names_of(settings.data), kind, lambda note: print(note, file=sys.stderr))
    return items[: settings.limit or None]


def _of_policies(settings: Label) -> list[Item]:
    """What the policies say to the prompts."""
    from plaudit import asking, machine, sources
    from plaudit.hooks import progress_bar, tell
    from plaudit.recipes import start_world

    prompts = asking.distinct(settings.prompts, settings.split, tell)[: settings.limit or None]
    folders = [sources.resolve(folder) for folder in settings.policies]
    bar, task = progress_bar(
        "sample", len(prompts) * (len(folders) if len(folders) > 1 else settings.several), 0, "answers"
    )
    with bar:
        items = asking.candidates(
            folders,
            prompts,
            settings,
            start_world(settings),
            seed=settings.seed,
            several=settings.several,
            rows=settings.rows,
            advance=lambda count: bar.advance(task, count),
            tell=tell,
        )
    machine.release()
    if not items:
        raise PlauditError(f"policies: they say the same to all {len(prompts)} prompts, so nothing is to be asked.")
    if settings.kind != "auto":
        items = [replace(item, kind=settings.kind) for item in items]
    return items
