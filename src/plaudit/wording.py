"""Figures, names and settings as a reader would have them."""

from __future__ import annotations

import math
import re
from typing import Any, TypeGuard

LONGEST_TEXT = 2_000  # characters of a sample that are shown
MINUS, DASH, TIMES, APOSTROPHE = "\N{MINUS SIGN}\N{EN DASH}\N{MULTIPLICATION SIGN}\N{RIGHT SINGLE QUOTATION MARK}"
# What summary.json calls a figure, as a reader would. What is not named here is shown under its own name.
FACTS = {
    "seconds": "time",
    "peak_memory_mb": "peak memory",
    "tokens_per_second": "tokens per second",
    "nll_before": "held-out loss before",
    "nll_after": "held-out loss after",
    "accuracy": "held-out accuracy",
    "accuracy_one_rater": "one human rater",
    "pairs": "held-out pairs",
    "kl": "KL, nats",
    "positive_share": "positive",
    "distinct_2": "distinct-2",
    "completion_tokens": "tokens",
}
ACRONYMS = (
    "sft ppo dpo wpo mpo ipo kto cpo bco orpo exo nca sppo aot rrhf grpo gdpo rloo vpg ilql dapo gspo gmpo cispo luspo "
    "sapo vespo"
)
SHARES = re.compile(r"accuracy|_share$|^win_rate|^agreement$")


def number(value: Any, decimals: int | None = None) -> str:
    """Three significant digits (or so many decimals), thousands separated, a true minus sign; a dash for no number."""
    if not is_number(value):
        return DASH
    size = abs(value)
    if decimals is None and 0 < size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}{TIMES}10" + str(int(exponent)).translate(
            str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
        )
    elif decimals is None:
        places = 0 if float(value).is_integer() or size >= 100 else 2 - math.floor(math.log10(size))
        text = f"{value:,.{places}f}"
    else:
        text = f"{value:,.{decimals}f}"
        text = text.lstrip("-") if not float(text.replace(",", "")) else text
    return text.replace("-", MINUS)


def percent(value: Any) -> str:
    return f"{100 * value:.1f}%" if is_number(value) else DASH


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{number(seconds, 1 if seconds < 10 else 0)} s"


def figure(value: Any, name: str) -> str:
    """`value` in the unit that `name` tells."""
    if not is_number(value):
        return DASH
    if name == "seconds":
        return duration(value)
    if name == "peak_memory_mb":
        return f"{value / 1000:.1f} GB" if value >= 1000 else f"{value:.0f} MB"
    if name == "tokens_per_second":
        return number(value, 0 if value >= 10 else 1)
    return percent(value) if SHARES.search(name) else number(value)


def change(before: float, after: float, decimals: int | None = None) -> str:
    text = number(after - before, decimals)
    return text if text.startswith(MINUS) or not text.strip("0.") else f"+{text}"


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def capitalised(name: str) -> str:
    words = name.replace("_", " ").replace("/", " ").strip()
    return words[:1].upper() + words[1:]


def label(name: str) -> str:
    return FACTS.get(name, name.replace("_", " "))


def model_name(name: str) -> str:
    return name.upper() if name in ACRONYMS.split() else name


def plain(text: Any) -> str:
    """A text, or a conversation as lines "role: content"; cut where it is too long to read here."""
    if isinstance(text, list):
        text = "".join(f"{turn.get('role')}: {turn.get('content')}\n" for turn in text if isinstance(turn, dict))
    words = str(text)
    return words if len(words) <= LONGEST_TEXT else words[:LONGEST_TEXT] + " …"


def flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as (dotted name, text)."""
    pairs: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            pairs += flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", _setting(value)))
    return pairs


def _setting(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: DASH, True: "yes", False: "no"}[value]
    return plain(", ".join(map(str, value)) if isinstance(value, list) else value)
