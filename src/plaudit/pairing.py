"""What people said, turned into the form that an algorithm learns from: pairs, single answers, or rankings. Whatever
has to be left out for that is said in a sentence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from plaudit.errors import PlauditError
from plaudit.records import Comparison, Ranking, Rating, comparisons_of, ranking_of, ratings_of

Judgement = Comparison | Ranking | Rating


def comparisons(judgements: Sequence[Judgement], soft: bool, name: str = "data") -> tuple[list[Comparison], list[str]]:
    """Pairs of answers to one prompt, and sentences about what was left out.

    Of a ranking, every two answers of different rank; of the ratings of one prompt, every two answers of different
    mean. Unless the loss has a use for soft preferences, the side that more people prefer counts as chosen, and ties
    are left out. Raises PlauditError, naming the setting `name` if there is one, if no pair is left.
    """
    notes: list[str] = []
    if all(isinstance(one, Comparison) for one in judgements):
        pairs = [one for one in judgements if isinstance(one, Comparison)]
    else:
        ranked, notes = rankings(judgements, name)
        pairs = [pair for ranking in ranked for pair in comparisons_of(ranking) if pair.chosen != pair.rejected]
    if not soft:
        decided = [pair for pair in pairs if pair.preference != 0.5]
        notes += _left_out(len(pairs) - len(decided), "ties", "this loss has no use for them")
        pairs = [_turned(pair) for pair in decided]
    if not pairs and name:
        raise PlauditError(f"{name}: there is no pair of answers of which people prefer one: {_instead(judgements)}.")
    return pairs, notes


def rankings(judgements: Sequence[Judgement], name: str = "data") -> tuple[list[Ranking], list[str]]:
    """Two or more answers to each prompt with their ranks, and sentences about what was left out. Raises PlauditError,
    naming the setting `name` if there is one, if nothing is ranked."""
    ranked, single = [], 0
    rated: dict[str, list[Rating]] = {}
    for one in judgements:
        if isinstance(one, Rating):
            rated.setdefault(json.dumps(one.prompt), []).append(one)
        elif isinstance(one, Ranking):
            ranked.append(one)
        else:
            pair = _turned(one)
            ranks = (1, 1) if pair.preference == 0.5 else (1, 2)
            ranked.append(Ranking(pair.prompt, (pair.chosen, pair.rejected), ranks, pair.columns))
    for answers in rated.values():
        if len(answers) > 1:
            ranked.append(ranking_of(answers))
        single += len(answers) == 1
    kept = [ranking for ranking in ranked if len(set(ranking.ranks)) > 1]
    notes = _left_out(single, "prompts", "they have one answer each, and nothing to compare it with")
    notes += _left_out(len(ranked) - len(kept), "prompts", "people found their answers equally good")
    if not kept and name:
        raise PlauditError(f"{name}: no prompt has two answers of which people prefer one: {_instead(judgements)}.")
    return kept, notes


def thumbs(judgements: Sequence[Judgement], name: str = "data") -> tuple[list[Rating], list[str]]:
    """Single answers, good (rated 1.0) or bad (0.0), and sentences about what was left out.

    A comparison gives one of each; where several people gave thumbs, the majority decides. Raises PlauditError, naming
    the setting `name`, for ratings that are no thumbs, for rankings, and if no answer is left or all answers in `data`,
    from which is learned, are of one kind.
    """
    where = name or "data"
    found: list[Rating] = []
    for one in judgements:
        if isinstance(one, Ranking):
            raise PlauditError(
                f"{where}: a ranking does not say which answers are good by themselves: take `dpo` or `rrhf`, or data "
                "of comparisons or of ratings by `label`."
            )
        if isinstance(one, Comparison):
            found += ratings_of(_turned(one))
            continue
        odd = next((rating for rating in one.ratings if rating not in (0, 1)), None)
        if odd is not None:
            raise PlauditError(
                f"{where}: a rating of {odd:g} is neither good (1, true) nor bad (0, false): give each answer a "
                "`label`, or learn from such ratings by `reward`."
            )
        found.append(one)
    means = [sum(one.ratings) / len(one.ratings) for one in found]
    kept = [replace(one, ratings=(float(mean > 0.5),)) for one, mean in zip(found, means, strict=True) if mean != 0.5]
    notes = _left_out(len(found) - len(kept), "answers", "as many people found them good as bad")
    if not kept and name:
        raise PlauditError(f"{name}: as many people found each answer good as bad: add answers that they agree on.")
    if name == "data" and len({one.ratings for one in kept}) < 2:
        kind = "good" if kept[0].ratings == (1.0,) else "bad"
        raise PlauditError(
            f"data: all answers are {kind}, so there is nothing to tell apart: add answers of both kinds."
        )
    return kept, notes


def _instead(judgements: Sequence[Judgement]) -> str:
    """What to do where nothing is preferred to anything: other verbs are named only if they take these judgements."""
    try:
        thumbs(judgements)
    except PlauditError:
        rated = any(isinstance(one, Rating) for one in judgements)
        return "take data of comparisons" + (", or learn from such ratings by `reward`" if rated else "")
    return "take `kto` or `bco`, which learn from single answers, or data of comparisons"


def _turned(pair: Comparison) -> Comparison:
    """The same with the side first that more people prefer."""
    if pair.preference >= 0.5:
        return pair
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen, preference=1 - pair.preference)


def _left_out(count: int, what: str, reason: str) -> list[str]:
    return [f"{count} {what} left out: {reason}"] if count else []
