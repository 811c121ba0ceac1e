"""Settings of fetching public models and data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pull:
    """A public model or data set, pinned by its SHA-256, into the user's cache."""

    names: tuple[str, ...]
    """What to pull: smollm2-135m-instruct, movie-reviews."""
    output: str | None = None
    """Copy data sets into this folder too."""
