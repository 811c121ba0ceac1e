"""`plaudit loop`: ask, learn what is liked, learn to please, ask again (Christiano et al. 2017, arXiv:1706.03741).

One folder holds the store of answers and, for each round, the questions (`ask.jsonl`), the answers that it learned
from (`labels.jsonl`), the reward model (`reward`) and the policy (`policy`). What is there is not made again, so the
same command goes on wherever it was stopped.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from plaudit import config, machine, sources
from plaudit.errors import PlauditError
from plaudit.feedback.desk import Desk, keep, share_of
from plaudit.feedback.exporting import rows_of
from plaudit.feedback.items import Item, Label
from plaudit.loop_plan import FREE, Round, Sections, look_ahead, questions, read
from plaudit.records import Prompt
from plaudit.rows import rows as rows_in
from plaudit.run import Run, write_atomically
from plaudit.settings.common import Training
from plaudit.settings.feedback import Loop

STORE = "answers.sqlite"
"""The store of the whole loop."""
FEWEST = 8
"""Answers that the first reward model waits for at least, where so many are asked for."""


# -------------------------------------------------------------------------------------------------------- running


def run(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Runs the loop of a file, or goes on with it, and returns the path of its page. Raises PlauditError,
    Interrupted."""
    return loop(read(path, overrides))


def loop(settings: Loop) -> Path:
    """Runs the loop, or goes on with it, and returns the path of its page: see `read` for settings from a file.

    Raises PlauditError, Interrupted.
    """
    from plaudit import loop_page

    settings = config.check(settings)
    sections = Sections.of(settings)
    prompts = look_ahead(settings, sections)
    with Run.open(settings.output, {"verb": "loop", **asdict(settings)}, FREE) as whole:
        if not whole.finished:
            _begun(Looping(replace(settings, model=sources.resolve(settings.model)), sections, prompts, whole))
        return loop_page.write(whole.folder)


def _begun(looping: Looping) -> None:
    """Where a mistake ends a loop before its first questions are chosen, its settings are not kept."""
    try:
        looping.run()
    except PlauditError:
        if not looping.rounds[0].ask.exists():
            (looping.whole.folder / "config.yaml").unlink()
        raise


class Looping:
    """A loop at work: settings with the model resolved, the prompts, the run of the whole folder."""

    def __init__(self, settings: Loop, sections: Sections, prompts: Sequence[Prompt], whole: Run) -> None:
        self.settings, self.sections, self.prompts, self.whole = settings, sections, list(prompts), whole
        self.doing = ""
        self.failure: Exception | None = None
        counts = questions(settings)
        self.rounds = [
            Round(number, count, whole.folder / f"round-{number:03d}") for number, count in enumerate(counts, 1)
        ]

    def run(self) -> None:
        """All rounds, with the server open for as long as they last."""
        from plaudit.hooks import tell

        settings = self.settings
        with (
            Desk.open(
                self.whole.folder / STORE,
                port=settings.port,
                address=settings.address,
                overlap=settings.overlap,
                people=self.sections.names(settings),
                instructions=settings.instructions,
            ) as desk,
            self._answering(desk),
        ):
            for number, now in enumerate(self.rounds, 1):
                tell(f"round {number}/{len(self.rounds)}")
                if self._round(now, desk):
                    break
        self._finish()

    def _round(self, now: Round, desk: Desk) -> bool:
        """One round, or what is missing of it; whether the reward model has come as far as it should."""
        self.doing = f"Round {now.number}: choosing what to ask"
        with self.shown():
            items = self._asked(now)
        if not now.labels.exists():
            desk.ask(items, priority=now.number)
            self._gather(now, desk)
        fitted = self._trained(now.reward, self._reward(now), f"Round {now.number}: learning what is liked")
        reached = self._trained(now.policy, self._policy(now), f"Round {now.number}: learning to please")
        if now.number not in [row["step"] for row in self.whole.metrics()]:
            self.whole.log(now.number, self._figures(now, fitted, reached, desk))
        return self._far_enough(now)

    def _far_enough(self, now: Round) -> bool:
        """Whether the reward models of a round that is done foresee as much as they should."""
        from plaudit.hooks import tell

        if not self.settings.target:
            return False
        agreement = next(row for row in self.whole.metrics() if row["step"] == now.number).get("agreement")
        if agreement is None:
            tell(f"round {now.number}: no held-out answer prefers anything, so `target` cannot be looked at.")
        return agreement is not None and agreement >= self.settings.target

    @contextmanager
    def _answering(self, desk: Desk) -> Iterator[None]:
        """Somebody answers while the block runs: people, who are told where, or a program in their place."""
        from plaudit.hooks import tell

        if self.sections.synthetic is None:
            desk.tell(tell)
            yield
            return
        from plaudit import people
        from plaudit.feedback.annotator import PAUSE, Annotator

        own = people.tastes(self.sections.synthetic, len(desk.people))
        tokens = [link.rpartition("/join/")[2] for link in desk.people.values()]
        annotators = [Annotator(desk.url, token, taste) for token, taste in zip(tokens, own, strict=True)]
        over = threading.Event()

        def work() -> None:
            try:
                while not over.is_set():
                    if not sum(annotator.turn() for annotator in annotators):
                        over.wait(PAUSE)
            except Exception as error:  # whatever it is: nobody else answers, and the loop would wait for ever
                self.failure = error

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            for annotator in annotators:
                annotator.close()

    # ------------------------------------------------------------------------------------------------- questions

    def _asked(self, now: Round) -> list[Item]:
        """The round's questions: chosen once, and from then on as its file says."""
        if not now.ask.exists():
            keep(now.ask, self._chosen(now))
            machine.release()
        return now.items()

    def _chosen(self, now: Round) -> list[Item]:
        """Pairs of answers of the present policy, or of the first one, that were never asked about before."""
        from plaudit import asking
        from plaudit.recipes import start_world

        queries, before = self.sections.queries, self._before(now)
        # The first round has no reward models to ask.
        informed = queries.method != "random" and (before is not None or queries.method == "coverage")
        method = queries.method if informed else "random"
        world = start_world(self.settings)
        items = self._sampled(now, now.questions * (queries.pool if informed else 1), world)
        return asking.chosen(
            items,
            now.questions,
            method,
            world=world,
            rewards="" if before is None else self._spec(before),
            asked=self._items(now.number - 1),
            share=queries.share,
            seed=self._seed(now),
            round=now.number,
        )

    def _sampled(self, now: Round, wanted: int, world: Any) -> list[Item]:
        """So many pairs, or at least as many as are asked. Raises PlauditError if the policy has not that much to
        say."""
        from plaudit import asking
        from plaudit.hooks import progress_bar, tell

        speaker, drawing = self._speaker(now), self.sections.policy
        # Those that are too long for the policy would otherwise be drawn again, and at last nothing else.
        prompts = asking.fitting(speaker, self.prompts, drawing.max_prompt_tokens, tell)
        bar, task = progress_bar("ask", 2 * wanted, unit="answers")
        with bar:
            found = asking.unasked(
                speaker,
                prompts,
                wanted,
                drawing,
                world,
                before=self._items(now.number - 1),
                seed=self._seed(now),
                advance=lambda count: bar.advance(task, count),
                tell=lambda note: tell(f"round {now.number}: {note}"),
            )
        if len(found) < now.questions:
            raise PlauditError(
                f"round {now.number}: {speaker} says the same again and again: of {wanted} questions only "
                f"{len(found)} are new. Give more prompts, a higher temperature in `policy`, or fewer labels."
            )
        return found

    def _speaker(self, now: Round) -> str:
        """Whose answers are asked about."""
        return self._beginning(now) if self.settings.online else self.settings.model

    def _beginning(self, now: Round) -> str:
        """The policy that a round begins with."""
        before = self._before(now)
        return self.settings.model if before is None else str(before.policy / "final")

    def _items(self, count: int) -> list[Item]:
        """What the first so many rounds asked."""
        return [item for each in self.rounds[:count] for item in each.items()]

    def _seed(self, now: Round) -> int:
        """What a round draws with; the members of its reward model take the next ones."""
        return self.settings.seed * 100_003 + now.number * 101

    def _before(self, now: Round) -> Round | None:
        return None if now.number == 1 else self.rounds[now.number - 2]

    # --------------------------------------------------------------------------------------------------- answers

    def _gather(self, now: Round, desk: Desk) -> None:
        """Waits for the answers that the round is to have, and writes down all that it learns from."""
        from plaudit.hooks import progress_bar

        mine = now.items()
        asked = len(mine) * self.settings.overlap
        needed = share_of(asked, self.settings.wait)
        if now.number == 1:
            needed = max(needed, min(FEWEST, asked))
        bar, task = progress_bar("answers", asked, unit="answers")

        def told(count: int) -> None:
            bar.update(task, completed=count)
            self.doing = f"Round {now.number}: {count} of {asked} answers are there"

        told(0)
        with bar, self.shown():
            desk.wait(mine, needed, told, self._check_answering)
        self._write(now, desk.labels(self._items(now.number)))

    def _check_answering(self) -> None:
        """Raises what the program failed with that answers in place of people, if it did."""
        if self.failure is not None:
            raise self.failure

    def _write(self, now: Round, labels: Sequence[Label]) -> None:
        """The latest answers that decide anything, as comparisons, with who gave them, when, and about whom. Raises
        PlauditError without any.

        One is `stale` if it is not about the policy that this round improves, which has moved on since."""
        from plaudit.asking import reasons
        from plaudit.hooks import tell

        decided = rows_of(labels, "comparisons")
        rows = decided[-self.settings.latest :]
        if len(rows) < len(labels):
            cannot, old = len(labels) - len(decided), len(decided) - len(rows)
            why = reasons({"could not compare": cannot, "came before the `latest`": old})
            tell(f"round {now.number}: {len(rows)} of {len(labels)} answers are learned from; {why}.")
        if not rows:
            raise PlauditError(
                f"round {now.number}: all {len(labels)} answers say that the two cannot be compared, which teaches "
                "nothing: change some of them, or begin again with other prompts."
            )
        newest = self._beginning(now)
        for row in rows:
            row["stale"] = any(source["model"] != newest for source in row["provenance"]["sources"])
        write_atomically(now.labels, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    # -------------------------------------------------------------------------------------------------- training

    def _trained(self, folder: Path, settings: Training, doing: str) -> dict[str, Any]:
        """The summary of a run, which is made, or goes on, unless it is done."""
        from plaudit.recipes import train

        done = Run(folder, -1)
        if not done.finished:
            self.doing = doing
            with self.shown():
                done = train(settings)
            machine.release()
        return done.summary

    def _reward(self, now: Round) -> Training:
        """The settings of a round's reward models."""
        return replace(self.sections.reward, data=str(now.labels), output=str(now.reward), seed=self._seed(now))

    def _spec(self, of: Round) -> str:
        """How a round's reward models are named as a reward."""
        several = self.sections.reward.members > 1
        return f"ensemble:mean@{of.reward}" if several else str(of.reward / "final")

    def _policy(self, now: Round) -> Training:
        """The settings with which a round improves the policy."""
        policy = self.sections.policy
        apart = now.number > 1 and self.settings.reference == "first" and hasattr(policy, "reference")
        return replace(
            policy,
            model=self._beginning(now),
            data=self.settings.prompts,
            split=self.settings.split,
            rewards=self._spec(now),
            output=str(now.policy),
            seed=self._seed(now),
            **({"reference": self.settings.model} if apart else {}),
        )

    # --------------------------------------------------------------------------------------------------- telling

    def _figures(self, now: Round, fitted: Mapping[str, Any], reached: Mapping[str, Any], desk: Desk) -> dict[str, Any]:
        """What a round's line of the metrics says."""
        figures = {
            "asked": now.questions,
            "labels": len(desk.labels(self._items(now.number))),
            "stale": sum(row["stale"] for _, row in rows_in(now.labels)),
            "agreement": self._agreement(now),
            "score": reached.get("score"),
            "kl": reached.get("kl"),
            "seconds": fitted["seconds"] + reached["seconds"],
        }
        return {name: value for name, value in figures.items() if value is not None}

    def _agreement(self, now: Round) -> float | None:
        """How often the reward models, together as they reward, put the held-out answers in people's order; None where
        no answer is held out that prefers anything."""
        from plaudit.algorithms.reward import of_pairs
        from plaudit.recipes import load_records, start_world
        from plaudit.rewards import load_rewards

        pairs = load_records(self._reward(now)).held
        if not pairs:
            return None
        world = start_world(self.settings)
        rewards = load_rewards(self._spec(now), precision=world.precision, device=world.device)
        prompts = [pair.prompt for pair in pairs]
        with world.autocast():
            better, worse = (
                rewards(prompts, texts, {})
                for texts in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
            )
        machine.release()
        preference = better.new_tensor([pair.preference for pair in pairs])
        return of_pairs(better - worse, preference).get("accuracy")

    def shown(self) -> AbstractContextManager[None]:
        """Keeps the page up to date while the block runs."""
        from plaudit import loop_page

        return loop_page.kept(self.whole.folder, lambda: self.doing)

    def _finish(self) -> None:
        """The summary, whose stages `plaudit report` shows."""
        last = self.whole.metrics()[-1]
        done = self.rounds[: last["step"]]
        stages: dict[str, Any] = {f"{each.folder.name}/{part}": {} for each in done for part in ("reward", "policy")}
        figures = {name: value for name, value in last.items() if name not in ("step", "asked", "seconds")}
        self.whole.finish({"verb": "loop", "rounds": len(done), **figures, "stages": stages})
