"""A synthetic annotator: it has a hidden taste, errs as people do, and answers over HTTP like anybody else."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np

from plaudit.errors import PlauditError
from plaudit.feedback.items import Kind
from plaudit.rows import Text

Reward = Callable[[list[Text], list[Text]], Sequence[float]]
PAUSE = 0.2
"""Seconds between two looks for questions when there are none."""
AT_ONCE = 2
"""Questions that are taken at once."""


class Taste:
    """Answers drawn from a hidden reward r.

    compare  right or left with P(a > b) = sigma((r_a - r_b) / temperature), but equal where the rewards differ by at
             most `tie_band`
    rank     an order by Plackett-Luce with the same temperature (Luce 1959); neighbours of it whose rewards differ
             from the first of their tier by at most `tie_band` share a tier. For two answers that is the above
    rate     of n + 1 points from the lowest to the highest, the lowest plus Binomial(n, sigma(r / temperature)); a
             thumb is n = 1

    With probability `cant_share` nothing can be compared; otherwise with probability `noise` the answer is uniform
    over orders or points, whatever the rewards: P = 0.9 sigma + 0.05 for two answers at the default of 0.1 (Christiano
    et al. 2017, arXiv:1706.03741, section 2.2.3). A temperature of 0 takes the best.

    What is random depends only on `seed`, on the question, and on how often it was asked before: the same questions
    get the same answers, in whatever order and on whatever sides they are shown. `reward` is called as
    reward(prompts, completions).
    """

    def __init__(
        self,
        reward: Reward,
        temperature: float = 1.0,
        noise: float = 0.1,
        tie_band: float = 0.0,
        cant_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.reward, self.temperature, self.noise = reward, temperature, noise
        self.tie_band, self.cant_share, self.seed = tie_band, cant_share, seed
        self._asked: Counter[bytes] = Counter()

    def answer(self, kind: Kind, prompt: Text, answers: Sequence[Text], ratings: tuple[int, int]) -> dict[str, Any]:
        """What this annotator sends for answers in the order shown, in the form that `items.read_answer` reads;
        `ratings` are the lowest and the highest point of the scale, (0, 1) being thumbs."""
        # Everything random is drawn for the answers in an order of their own.
        texts = [json.dumps(text, sort_keys=True) for text in answers]
        order = sorted(range(len(texts)), key=texts.__getitem__)
        rng = self._random(kind, json.dumps(prompt, sort_keys=True), [texts[place] for place in order])
        scores = [float(score) for score in self.reward([prompt] * len(answers), list(answers))]
        sorted_scores = np.array([scores[place] for place in order])
        cant, at_random = rng.random() < self.cant_share, rng.random() < self.noise
        if kind == "rate":
            return self._rating(scores[0], ratings, at_random, rng)
        if cant:
            return {"choice": "cant"}
        ranks = np.empty(len(order), np.int64)
        ranks[order] = self._ranks(sorted_scores, at_random, rng)
        if kind == "rank":
            return {"tiers": ranks.tolist()}
        left, right = ranks.tolist()
        return {"choice": "equal" if left == right else "left" if left < right else "right"}

    def _random(self, kind: Kind, prompt: str, texts: Sequence[str]) -> np.random.Generator:
        asked = hashlib.sha256(json.dumps([kind, prompt, texts]).encode()).digest()
        before = self._asked[asked]
        self._asked[asked] += 1
        return np.random.default_rng([self.seed, before, int.from_bytes(asked)])

    def _ranks(self, scores: np.ndarray[Any, Any], at_random: bool, rng: np.random.Generator) -> list[int]:
        """Tiers from 1, of scores in their own order."""
        # The order of scores with Gumbel noise is that of Plackett-Luce (Yellott 1977).
        noise = rng.gumbel(size=len(scores))
        keys = noise if at_random else scores + self.temperature * noise
        # At temperature 0 equal scores are in any order.
        order = np.lexsort((noise, keys))[::-1]
        ranks, tier, head = [0] * len(scores), 0, math.inf
        for place in order:
            if tier == 0 or at_random or abs(scores[place] - head) > self.tie_band:
                tier, head = tier + 1, scores[place]
            ranks[place] = tier
        return ranks

    def _rating(
        self, score: float, ratings: tuple[int, int], at_random: bool, rng: np.random.Generator
    ) -> dict[str, Any]:
        steps = ratings[1] - ratings[0]
        if at_random:
            points = int(rng.integers(steps + 1))
        else:
            above = score / self.temperature if self.temperature else math.copysign(math.inf, score) if score else 0.0
            points = int(rng.binomial(steps, 0.5 * (1 + math.tanh(0.5 * above))))
        if tuple(ratings) == (0, 1):
            return {"thumb": ("down", "up")[points]}
        return {"rating": ratings[0] + points}


class Annotator:
    """One person's place at a label server: `url` and that person's `token`, with a taste to answer from.

    `answered` counts what was acknowledged; a `limit` of 0 has no end. Requests that fail on the way or find the
    server busy are made again, with the same key, for `patience` seconds.
    """

    def __init__(self, url: str, token: str, taste: Taste, *, limit: int = 0, patience: float = 10.0) -> None:
        self.taste, self.limit, self.patience, self.answered = taste, limit, patience, 0
        headers = {"Authorization": f"Bearer {token}"}
        # What is on this machine is not asked for through a proxy.
        self.client = httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False)
        try:
            low, high = self._call("GET", "/api/study")["ratings"]
        except BaseException:
            self.close()
            raise
        self.ratings = (int(low), int(high))

    @property
    def done(self) -> bool:
        """Whether the limit is reached."""
        return bool(self.limit) and self.answered >= self.limit

    def turn(self) -> int:
        """Answers the questions that are there for this person, a few at most, and returns how many they were. Raises
        PlauditError."""
        before = self.answered
        count = min(AT_ONCE, self.limit - before) if self.limit else AT_ONCE
        for task in self._call("GET", "/api/next", params={"count": count})["tasks"][:count]:
            self._answer(task)
        return self.answered - before

    def _answer(self, task: Mapping[str, Any]) -> None:
        started = time.perf_counter()
        answer = self.taste.answer(task["kind"], task["prompt"], task["answers"], self.ratings)
        ms = max(1, round(1000 * (time.perf_counter() - started)))
        sent = {"assignment": task["assignment"], "key": uuid.uuid4().hex, "ms": ms, "answer": answer}
        # 409: others answered it meanwhile, and there is nothing left to say.
        self.answered += self._call("POST", "/api/answer", json=sent, gone=409) is not None

    def _call(self, method: str, path: str, gone: int = 0, **given: Any) -> Any:
        """What the server says; None at the status `gone`."""
        until = time.monotonic() + self.patience
        while True:
            try:
                reply = self.client.request(method, path, **given)
            except httpx.TransportError as error:
                if time.monotonic() > until:
                    raise PlauditError(
                        f"no label server answers at {self.client.base_url} ({error}): start `plaudit label`."
                    ) from None
                time.sleep(PAUSE)
                continue
            if reply.is_success:
                return reply.json()
            if reply.status_code == gone:
                return None
            if reply.status_code not in (429, 500, 502, 503, 507) or time.monotonic() > until:
                raise PlauditError(f"the label server refused {path}: {_sentence(reply)}")
            time.sleep(min(float(reply.headers.get("retry-after", PAUSE)), max(until - time.monotonic(), 0)) + 0.01)

    def close(self) -> None:
        """Ends the connection."""
        self.client.close()


def annotate(
    url: str,
    token: str | Sequence[str],
    taste: Taste | Sequence[Taste],
    *,
    limit: int = 0,
    patience: float = 10.0,
    stop: threading.Event | None = None,
) -> list[int]:
    """Answers as the people of one or several tokens, each with a taste, by turns, and returns how often each did.

    It ends when everybody reached the `limit`, when there was nothing to answer for `patience` seconds, or when `stop`
    is set. Raises PlauditError if there is no server, or it refuses the token.
    """
    tokens = [token] if isinstance(token, str) else list(token)
    tastes = [taste] if isinstance(taste, Taste) else list(taste)
    stop = stop or threading.Event()
    with ExitStack() as opened:
        people = []
        for own, liking in zip(tokens, tastes, strict=True):
            people.append(Annotator(url, own, liking, limit=limit, patience=patience))
            opened.callback(people[-1].close)
        last = time.monotonic()
        while not stop.is_set() and not all(person.done for person in people):
            if sum(person.turn() for person in people if not person.done):
                last = time.monotonic()
            elif time.monotonic() - last > patience:
                break
            else:
                stop.wait(PAUSE)
    return [person.answered for person in people]


def admitted(url: str, manager: str, people: Sequence[str]) -> list[str]:
    """The tokens of people whom the manager, who has this token, lets in under new names. Raises PlauditError."""
    tokens = []
    headers = {"Authorization": f"Bearer {manager}"}
    with httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False) as client:
        for name in people:
            try:
                reply = client.post("/api/people", json={"name": name})
            except httpx.TransportError as error:
                raise PlauditError(f"no label server answers at {url} ({error}): start `plaudit label`.") from None
            if not reply.is_success:
                raise PlauditError(f"the label server did not let {name!r} in: {_sentence(reply)}")
            tokens.append(str(reply.json()["token"]))
    return tokens


def _sentence(reply: httpx.Response) -> str:
    try:
        said = reply.json()
    except ValueError:
        said = {}
    return str(said.get("error") if isinstance(said, dict) and "error" in said else f"status {reply.status_code}.")
