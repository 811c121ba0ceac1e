"""What to ask people: answers of one or several policies to the same prompts, and which of them teach most."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from plaudit import comparing, data, sources
from plaudit.algorithms.on_policy import Asked
from plaudit.errors import PlauditError
from plaudit.feedback import queries
from plaudit.feedback.items import MOST, Candidate, Item, Kind
from plaudit.loading import encodes, load_tokenizer
from plaudit.records import Prompt, Text, left_out
from plaudit.rewards import load_rewards
from plaudit.sampler import Sampling
from plaudit.settings.sampling import Sampling as Drawing
from plaudit.templates import Template
from plaudit.world import World

TRIES = 20
"""How often more answers are sampled where a policy says the same twice, or what was asked before."""
Answered = tuple[Prompt, list[Candidate]]
"""A prompt, and what was said to it."""


def candidates(
    policies: Sequence[str],
    prompts: Sequence[Prompt],
    drawing: Drawing,
    world: World,
    *,
    tell: Callable[[str], None] = lambda sentence: None,
    **options: Any,
) -> list[Item]:
    """What policies say to the same prompts, to be compared or ranked: `questions` of `answers`, which see."""
    return questions(answers(policies, prompts, drawing, world, tell=tell, **options), tell)


def answers(
    policies: Sequence[str],
    prompts: Sequence[Prompt],
    drawing: Drawing,
    world: World,
    *,
    seed: int = 0,
    several: int = 2,
    rows: int = 64,
    advance: Callable[[int], None] = lambda count: None,
    tell: Callable[[str], None] = lambda sentence: None,
) -> list[Answered]:
    """What policies say to the same prompts, without prompts that are too long for one of them.

    policies  model folders; of one, `several` (2 to 9) answers of its own to each prompt; of two or more, one of each
    drawing   max_prompt_tokens, max_new_tokens, temperature and stop
    rows      how many answers are sampled side by side
    advance   called with how many answers have come
    tell      called with sentences about prompts that were left out

    Each answer's `source` names model, step (where the run beside the model tells), temperature and seed. The same
    seed gives the same answers. Raises PlauditError.
    """
    repeats = several if len(policies) == 1 else 1
    every = repeats * len(policies)
    if not 2 <= every <= MOST:
        raise PlauditError(f"policies: {every} answers to a prompt cannot be asked about: make it 2 to {MOST}.")
    said: list[list[Candidate]] = [[] for _ in prompts]
    for place, folder in enumerate(policies):
        origin = {"model": folder, **_step(folder), "temperature": drawing.temperature, "seed": seed}
        own = seed * len(policies) + place
        found, notes = _said(folder, prompts, drawing, world, seed=own, repeats=repeats, rows=rows, advance=advance)
        for so_far, texts in zip(said, found, strict=True):
            so_far += [Candidate(text, origin) for text in texts]
        for note in notes:
            tell(note)
    return [(prompt, texts) for prompt, texts in zip(prompts, said, strict=True) if len(texts) == every]


def distinct(
    names: str | Sequence[str], split: str, tell: Callable[[str], None] = lambda sentence: None
) -> list[Prompt]:
    """The prompts in data, each once; `tell` hears what is left out. Raises PlauditError."""
    loaded = data.load(names, Prompt, split)
    prompts = list({data.key_of(prompt.prompt): prompt for prompt in loaded.records}.values())
    for note in left_out(loaded.dropped):
        tell(note)
    if again := len(loaded.records) - len(prompts):
        tell(f"{again} of {len(loaded.records)} prompts are there more than once; each is asked about once.")
    return prompts


def fitting(
    policy: str, prompts: Sequence[Prompt], longest: int, tell: Callable[[str], None] = lambda sentence: None
) -> list[Prompt]:
    """Prompts of at most `longest` tokens; `tell` hears how many are left out. Raises PlauditError if all are."""
    folder = sources.resolve(policy)
    template = Template(load_tokenizer(folder), encodes(folder))
    kept, notes = data.within(prompts, lambda each: len(template.prompt(each.prompt)), longest, "prompt")
    for note in notes:
        tell(note)
    return kept


def questions(said: Sequence[Answered], tell: Callable[[str], None] = lambda sentence: None) -> list[Item]:
    """What can be asked about answers: which of two is better, or in what order several stand. What is said twice to a
    prompt is asked once, and a prompt to which only one thing is said is not asked. All the others are: unless
    `chosen` picks some of them, chance alone made them, and nothing that was made was left out. `tell` hears how much
    was said twice."""
    query, items, twice = queries.query("random", 1.0), [], 0
    for prompt, texts in said:
        distinct: dict[str, Candidate] = {}
        for answer in texts:
            distinct.setdefault(json.dumps(answer.text), answer)
        if len(distinct) > 1:
            kind: Kind = "compare" if len(texts) == 2 else "rank"
            items.append(Item(kind, prompt.prompt, tuple(distinct.values()), query, columns=prompt.columns))
            twice += len(texts) - len(distinct)
    if len(items) < len(said):
        tell(f"{len(said) - len(items)} of {len(said)} prompts are not asked about: all answers to them are the same.")
    if twice:
        tell(f"{twice} answers say what another one says to the same prompt; such are shown once.")
    return items


def unasked(
    policy: str,
    prompts: Sequence[Prompt],
    wanted: int,
    drawing: Drawing,
    world: World,
    *,
    before: Sequence[Item],
    seed: int,
    advance: Callable[[int], None],
    tell: Callable[[str], None],
) -> list[Item]:
    """So many pairs of one policy's answers, unlike each other and those asked `before`; fewer where it has not so much
    to say in TRIES attempts. `tell` hears how many others were sampled."""
    asked = {_question(item) for item in before}
    found: list[Item] = []
    drawn = alike = empty = 0
    order = data.Order(len(prompts), wanted, seed)
    for attempt in range(TRIES):
        part = [prompts[place] for place in order[attempt][: wanted - len(found)]]
        sampled = candidates([policy], part, drawing, world, seed=seed * TRIES + attempt, advance=advance)
        drawn, alike = drawn + len(part), alike + len(part) - len(sampled)
        for item in sampled:
            if not all(map(_says, item.candidates)):
                empty += 1
            elif _question(item) not in asked:
                asked.add(_question(item))
                found.append(item)
        if len(found) == wanted:
            break
    if passed := drawn - len(found):
        counts = {"say the same twice": alike, "hold an empty answer": empty, "came before": passed - alike - empty}
        tell(f"{passed} of {drawn} pairs that were sampled are not asked about: {reasons(counts)}.")
    return found


def _question(item: Item) -> str:
    """What makes two questions the same: the prompt and the texts, whoever said them."""
    texts = sorted(json.dumps(candidate.text) for candidate in item.candidates)
    return json.dumps([item.prompt, texts])


def _says(candidate: Candidate) -> bool:
    """Whether anything is said: answers that are empty teach nothing, because records leave them out."""
    text = candidate.text
    return bool((text if isinstance(text, str) else text[0]["content"]).strip())


def reasons(counts: Mapping[str, int]) -> str:
    """How often each of the reasons holds that hold at all, in words."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)


def _said(
    folder: str,
    prompts: Sequence[Prompt],
    drawing: Drawing,
    world: World,
    *,
    seed: int,
    repeats: int,
    rows: int,
    advance: Callable[[int], None],
) -> tuple[list[list[Text]], list[str]]:
    """`repeats` answers of one policy to each prompt, none where the prompt is too long, and sentences about these."""
    policy, template = comparing.load(sources.resolve(folder), world, drawing.temperature)
    asked = [Asked(prompt, template.prompt(prompt.prompt)) for prompt in prompts]
    fitting, notes = data.within(
        enumerate(asked), lambda numbered: len(numbered[1]), drawing.max_prompt_tokens, "prompt"
    )
    repeated = [each for _, each in fitting for _ in range(repeats)]
    limits = Sampling(
        max_new_tokens=drawing.max_new_tokens,
        temperature=drawing.temperature,
        stop_ids=(template.end,),
        stop_strings=drawing.stop,
    )
    _, texts = comparing.answer(policy, repeated, template, limits, world, seed=seed, rows=rows, advance=advance)
    found: list[list[Text]] = [[] for _ in prompts]
    for number, (place, each) in enumerate(fitting):
        own = texts[number * repeats : (number + 1) * repeats]
        found[place] = [_formed(each.record.prompt, text) for text in own]
    return found, notes


def _formed(prompt: Text, text: str) -> Text:
    """The answer in the form of its prompt: a text, or a message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _step(folder: str) -> dict[str, Any]:
    """How many steps the run took whose final model this is, where its summary says so."""
    summary = Path(folder).parent / "summary.json"
    steps = json.loads(summary.read_bytes()).get("steps") if summary.is_file() else None
    return {} if steps is None else {"step": steps}


def chosen(
    items: Sequence[Item],
    count: int,
    method: str,
    *,
    world: World,
    rewards: str = "",
    asked: Sequence[Item] = (),
    share: float = 0.0,
    seed: int = 0,
    **more: Any,
) -> list[Item]:
    """So many of the items, each with its `query`: the method, the propensity, and `more`.

    method   as in `feedback.queries`: random, or coverage, for which `asked` are the questions before; or disagreement
             or margin, which the members of the ensemble `rewards` (`ensemble:RULE@FOLDER`) decide
    share    of the questions that is drawn at random from all the others

    Raises PlauditError where the ensemble cannot be loaded.
    """
    rng = np.random.default_rng((seed, len(items)))
    if method == "random":
        found = queries.random(len(items), count, rng)
    elif method == "coverage":
        before = Counter(data.key_of(item.prompt) for item in asked)
        times = [before[data.key_of(item.prompt)] for item in items]
        features = queries.hashed_ngrams([json.dumps(item.prompt, ensure_ascii=False) for item in items])
        found = queries.coverage(features, times, count, rng, share)
    else:
        picked = queries.disagreement if method == "disagreement" else queries.margin
        found = picked(_differences(items, rewards, world), count, rng, share)
    return [
        replace(items[place], query=queries.query(method, propensity, **more))
        for place, propensity in zip(found.indices.tolist(), found.propensities.tolist(), strict=True)
    ]


def _differences(items: Sequence[Item], rewards: str, world: World) -> Any:
    """(members, items) each member's score of the first answer less that of the second, on the scale that it was fitted
    on, where the sigmoid is a preference: normalised members would all seem about as sure."""
    ensemble: Any = load_rewards(rewards, precision=world.precision, device=world.device).sources[rewards]
    prompts = [item.prompt for item in items]
    with world.autocast():
        first, second = (ensemble.each(prompts, [item.candidates[place].text for item in items]) for place in (0, 1))
    deviations = np.array([member.policy.score_deviation for member in ensemble.members])
    return (first - second).numpy() * deviations[:, None]
