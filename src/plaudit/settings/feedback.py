"""Settings of asking people, and of learning from what they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from plaudit.settings.common import Common, Count, CountOrNone, Machine, NotNegative, Positive, Share
from plaudit.settings.rewards import RewardSources
from plaudit.settings.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Which of the answers that a policy gives are asked about."""

    method: Literal["random", "disagreement", "margin", "coverage"] = "random"
    """Any; those on which the reward models disagree most; those that the reward models tell apart least; or those
    that are least like each other."""
    pool: Count = 10
    """So many times the questions are sampled, and the best of them asked; `random` needs no more than it asks."""
    share: Share = 0.0
    """Share of the questions that is drawn at random from all the others."""


@dataclass(frozen=True, kw_only=True)
class Loop(Machine):
    """Ask, learn what is liked, learn to please, ask again: rounds of all three over one folder."""

    model: str
    """The first policy: a Hugging Face folder or Hub name; reward models begin with it too."""
    prompts: str | tuple[str, ...]
    """Prompts that policies answer."""
    output: str = "runs/loop"
    """Folder of the loop: the store of answers, and a folder for each round."""
    rounds: Count = 3
    """Rounds of asking, fitting a reward model, and improving the policy."""
    labels: Count = 300
    """Answers that people give in all rounds together."""
    people: tuple[str, ...] = ()
    """Names of those who answer, each with a link of their own; without any, whoever has the link may join."""
    overlap: Count = 1
    """So many people answer each question."""
    instructions: str = ""
    """What people are told to look for, in a sentence or two."""
    first: Share = 0.25
    """Share of the questions that is asked before any training; 0 leaves that to `schedule`."""
    schedule: Literal["constant", "hyperbolic", "annealed"] = "constant"
    """How the other questions are spread over the rounds: evenly, falling as T / (t + T) with T a fifth of the rounds,
    or falling by one factor a round to a hundredth."""
    wait: Share = 1.0
    """Share of a round's answers that training waits for; what is late counts in the next round, if there is one."""
    online: bool = True
    """Ask about the newest policy's answers; otherwise always about the first one's."""
    latest: CountOrNone = 3000
    """Learn from the last so many answers that decide anything; 0 learns from all."""
    target: Share = 0.0
    """Stop once the reward model is right about so large a share of the held-out answers; 0 never does."""
    reference: Literal["first", "last"] = "first"
    """What the policy is held to: the first policy, or the one that the round begins with."""
    queries: Mapping[str, Any] = field(default_factory=dict)
    """`method` and `pool`: which questions are asked."""
    reward: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `reward`, for each round."""
    policy: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the algorithm that its `verb` names, `ppo` by default, for each round."""
    synthetic: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `annotate`, for a program that answers in place of people; without any, people do."""
    port: CountOrNone = 0
    """Where the page for people answers; 0 takes any that is free."""
    address: str = ""
    """Where people reach the page through a proxy, as https://labels.example.org; it stands in the links."""
    split: str = "train"
    """Split of a Hub data set."""
    seed: CountOrNone = 0
    """Seeds everything that is random but the order in which answers are shown."""


@dataclass(frozen=True, kw_only=True)
class Compare(Sampling, Common):
    """Two policies before people, blind, or before a judge: how often the one is preferred to the other."""

    model: str = ""
    """The reference of KL and perplexity, where a judge decides; by default `a`."""
    a: str
    """The policy that is compared with, a folder or `name=folder`."""
    b: str
    """The policy whose win rate is told, a folder or `name=folder`."""
    output: str = "runs/compare"
    """Run folder; people's answers are kept in its store."""
    people: bool = False
    """People decide, in the browser; otherwise `judge` does."""
    overlap: Count = 1
    """So many people see each pair."""
    judge: str = ""
    """Who decides where people do not: given as a reward is."""
    prompts: Count = 100
    """Prompts to sample from."""
    rows: Count = 64
    """Completions that are sampled side by side."""
    port: CountOrNone = 0
    """Where the page for people answers; 0 takes any that is free."""
    address: str = ""
    """Where people reach the page through a proxy, as https://labels.example.org; it stands in the links."""


@dataclass(frozen=True, kw_only=True)
class Label(Sampling, Machine):
    """People judge answers in the browser: pairs, rankings or ratings, of files or of policies."""

    data: str | tuple[str, ...] = ()
    """JSON lines of candidates: `completions`, `chosen` and `rejected`, or `completion`, mostly with a `prompt`."""
    policies: tuple[str, ...] = ()
    """Instead of `data`: folders of policies that are sampled; of one, `several` answers to each prompt."""
    prompts: str | tuple[str, ...] = ()
    """Prompts that the policies answer."""
    store: str = "labels.db"
    """File that keeps questions and answers; the same command again goes on with it."""
    kind: Literal["auto", "compare", "rank", "rate"] = "auto"
    """What is asked: which of two is better, the order of several, how good each is; auto goes by their number."""
    people: tuple[str, ...] = ()
    """Who answers, each with a link of their own; without names, one link lets in whoever gives a name."""
    overlap: Count = 1
    """So many people answer each question."""
    lease: Positive = 600.0
    """Seconds for which a question is kept for the person it was shown to."""
    gold_share: Share = 0.0
    """Share of questions whose right answer is known (`gold` in the data), which tell how careful people are."""
    repeat_share: Share = 0.0
    """Share of questions that a person has answered before, which tell how steady people are."""
    title: str = ""
    """What the study is called, over every question."""
    instructions: str = ""
    """What people should look for, in a sentence or two, over every question."""
    ratings: tuple[int, int] = (1, 7)
    """The lowest and the highest rating; 0 and 1 are thumbs."""
    strength: bool = False
    """Pairs also ask, to be left out at will, whether the better one is slightly, clearly or much better."""
    host: str = "127.0.0.1"
    """Where the server listens; anywhere but on this machine alone needs `token_file`."""
    port: Annotated[int, Ge(0), Le(65535)] = 0
    """Where the server listens; 0 takes the port of last time, or any that is free."""
    address: str = ""
    """Where people reach the page through a proxy, as https://labels.example.org; it stands in the links."""
    hostnames: tuple[str, ...] = ()
    """Names by which others reach the server otherwise; without `address`, the first stands in the links."""
    token_file: str = ""
    """File with a secret of your own for the review page, which a server for other machines needs."""
    browser: bool = False
    """Open the page in the browser, by a private page beside the store, which the link is read from."""
    limit: CountOrNone = 0
    """Only the first so many rows of the data, or prompts; 0 takes all."""
    several: Annotated[int, Ge(2), Le(9)] = 2
    """Answers to each prompt that are sampled of a single policy."""
    rows: Count = 64
    """Completions that are sampled side by side."""
    split: str = "train"
    """Split of a Hub data set of prompts."""
    seed: CountOrNone = 0
    """Seeds the samples, and what is asked again; the order in which answers are shown is always drawn anew."""

    def __post_init__(self) -> None:
        if self.data and self.policies:
            raise ValueError("give `data` or `policies`, not both.")
        if bool(self.policies) != bool(self.prompts):
            raise ValueError("`policies` and `prompts` go together: what is sampled, and from what.")
        if self.policies and self.kind == "rate":
            raise ValueError("`kind` rate needs `data`; `plaudit sample` writes a file that can be rated.")
        answers = len(self.policies) if len(self.policies) > 1 else self.several
        if self.policies and self.kind == "compare" and answers != 2:
            raise ValueError(f"`kind` compare is of two answers, and {answers} are sampled to each prompt: take rank.")
        lowest, highest = self.ratings
        if not 0 <= lowest < highest <= 10 or highest - lowest > 9:
            raise ValueError("`ratings` are at most ten whole numbers from 0 to 10, the lowest first: each has a key.")
        if self.gold_share + self.repeat_share > 1:
            raise ValueError("`gold_share` and `repeat_share` are more than 1 together.")


@dataclass(frozen=True, kw_only=True)
class Import:
    """Labels into a store: those of another store, or comparisons, rankings and ratings from anywhere."""

    data: str | tuple[str, ...]
    """Stores, or JSON lines that `export` wrote, or with `chosen` and `rejected`, `completions` and `ranking`, or
    `completion` and `rating`."""
    output: str
    """The store; it is made if it is not there."""
    by: str = ""
    """Who judged, where a row has no `person`."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What people said, out of a store: as records to train on, or all of it."""

    data: str
    """The store."""
    output: str
    """The file that is written: JSON lines (.jsonl, .jsonl.gz), or with the kind `labels` a table (.csv)."""
    kind: Literal["comparisons", "rankings", "ratings", "thumbs", "demonstrations", "transcripts", "labels"] = (
        "comparisons"
    )
    """Records, each with its `provenance`: `thumbs` are what KTO takes, `transcripts` what hh-rlhf is; `labels` lose
    nothing, and can be imported again."""
    ties: Literal["half", "drop"] = "half"
    """What becomes of two answers that are equally good: a preference of one half, or nothing."""
    gold: bool = False
    """Also the items that check who answers; `labels` always hold them."""
    repeats: bool = False
    """Also what a person was asked once more; `labels` always hold it."""
    last: CountOrNone = 0
    """Only the last so many labels; 0 takes all."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far people agree, whom to rely on, which model is stronger: figures with intervals, and a page of them."""

    data: str | tuple[str, ...]
    """A store, JSON lines of the kind `labels`, or rows with `response1`, `response2` and one column `annotator1`,
    `annotator2` ... for each person: 1, 2, or 0 for a tie."""
    output: str = "runs/agreement"
    """Folder for agreement.json and agreement.html, which are written anew each time."""
    resamples: Count = 1000
    """Resamples of the items from which the intervals come."""
    seed: CountOrNone = 0
    """Seeds the resamples."""


@dataclass(frozen=True, kw_only=True)
class Annotate(RewardSources, Machine):
    """A synthetic annotator, which answers at a label server in place of people: to try a loop, or to test it."""

    url: str = ""
    """Address of the label server, or a link that lets one person in, which holds the token too."""
    token: str = ""
    """Who answers: a person's token; with `people`, the manager's. Other users of a machine can see what a command line
    holds, so a file is better."""
    token_file: str = ""
    """File of tokens, one a line: each is another person, by turns."""
    people: tuple[str, ...] = ()
    """Names that answer by turns; the manager, whose token this needs, lets them in."""
    temperature: NotNegative = 1.0
    """A better answer wins with probability sigma(difference of the rewards / temperature); 0 always takes it."""
    noise: Share = 0.1
    """Share of answers that are given at random, whatever the rewards."""
    ties: NotNegative = 0.0
    """Answers whose rewards differ by no more than this are equally good."""
    cant: Share = 0.0
    """Share of comparisons and rankings that are answered with "can't compare"."""
    limit: CountOrNone = 0
    """Answers that each person gives at most; 0 answers all there is."""
    patience: NotNegative = 10.0
    """Seconds without anything to answer after which it ends."""
    seed: CountOrNone = 0
    """Seeds the answers; of several people, each has a seed of its own from there on."""
