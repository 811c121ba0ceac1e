"""Settings that several verbs share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, Lt

Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]
CountOrNone = Annotated[int, Ge(0)]
Precision = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["constant", "linear", "cosine", "step", "plateau"]
if TYPE_CHECKING:
    Names: TypeAlias = Any  # in Python also the rows themselves, which `train` and `evaluate` put into files
else:
    Names = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What every verb that may run a model takes."""

    seed: Annotated[int, Ge(0)] = 0
    """Seeds everything that is random; the same seed on the same machine gives the same bits."""
    precision: Precision = "auto"
    """bfloat16 autocast over float32 weights, or float32; auto takes bfloat16 where the machine is faster in it."""
    device: str | None = None
    """cuda, mps or cpu; by default the first that is found."""
    threads: CountOrNone = 0
    """CPU threads; 0 leaves PyTorch's choice."""


@dataclass(frozen=True, kw_only=True)
class Common(Machine):
    """What every verb that loads a model takes."""

    model: str
    """Hugging Face folder or Hub name; `smollm2-135m-instruct` is pulled from the package index."""
    data: Names
    """JSON lines (.jsonl, .jsonl.gz), a Hub name, or several of them."""
    output: str
    """Run folder: settings, metrics, samples, checkpoints, final model, report."""
    split: str = "train"
    """Split of a Hub data set."""


@dataclass(frozen=True, kw_only=True)
class ByColumn:
    """What verbs take whose held-out figures may be told apart by a column of the data."""

    eval_by: str = ""
    """Column by whose values held-out figures are reported too, such as language: heldout_accuracy/de."""


@dataclass(frozen=True, kw_only=True)
class Following:
    """What every algorithm with a reference takes."""

    reference_every: CountOrNone = 0
    """Steps after each of which the reference moves towards the policy; 0 leaves it where it is."""
    reference_share: Annotated[float, Gt(0), Le(1)] = 0.6
    """How far it moves then: the reference becomes (1 - share) reference + share policy."""


@dataclass(frozen=True, kw_only=True)
class Training(Common):
    """What every verb that trains takes."""

    eval_data: Names | None = None
    """Held-out data; without it, `holdout` of the data is kept back."""
    holdout: Share = 0.05
    """Share of the prompts that is held out when there is no `eval_data`."""
    eval_limit: Count = 512
    """At most so many held-out rows are looked at."""
    train_fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of the training rows that is learned from, drawn by the seed; a smaller one is part of a larger one."""
    batch_size: Count = 64
    """Rows (or pairs) that one optimizer step sees, over all processes."""
    tokens_per_pass: CountOrNone = 0
    """Memory: at most so many padded tokens go through the model at once; 0 takes what the free memory holds."""
    steps: CountOrNone = 0
    """Optimizer steps; 0 means `epochs` times the data."""
    epochs: Positive = 1.0
    """Times the data, when `steps` is 0."""
    learning_rate: Positive = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Schedule = "linear"
    """What the learning rate does after the warm-up: stay, fall to zero in a line or a cosine, be lowered every
    `drop_every` steps, or be lowered where the held-out figure `watch` no longer gets better."""
    drop_every: Count = 1000
    """Steps after each of which the schedule `step` lowers the learning rate."""
    drop_after: Count = 2
    """Evaluations in a row without a better `watch` after which the schedule `plateau` lowers the learning rate."""
    drop_factor: Annotated[float, Gt(0), Lt(1)] = 0.1
    """What the learning rate is multiplied by when it is lowered."""
    warmup: Share = 0.05
    """Share of the steps over which the learning rate rises."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay, on matrices only."""
    adam_beta2: Annotated[float, Gt(0), Le(1)] = 0.999
    """Decay of AdamW's second moment."""
    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""
    train_layers: CountOrNone = 0
    """Train only the last so many layers over a frozen trunk; 0 trains all."""
    lora_rank: CountOrNone = 0
    """Train low-rank adapters of this rank instead of the weights; 0 trains the weights."""
    lora_alpha: Positive = 16.0
    """Scale of the adapters: alpha / rank."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    log_every: Count = 1
    """Steps between two lines of metrics."""
    evaluate_every: CountOrNone = 0
    """Steps between two evaluations; 0 evaluates at the beginning, where that says something, and at the end."""
    watch: str = ""
    """Held-out figure that `plateau`, `patience` and `save_best` go by, such as heldout_loss."""
    patience: CountOrNone = 0
    """End the run after so many evaluations in a row without a better `watch`; 0 never does."""
    save_best: bool = False
    """Make `final` the policy that had the best `watch`, not the last one."""
    save_every: CountOrNone = 50
    """Steps between two checkpoints; 0 saves only when the run is interrupted."""
    keep: Count = 1
    """Checkpoints that are kept."""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also log to a tracker."""
    track_project: str = "plaudit"
    """Project of `wandb` or `trackio` in which the run appears, under the name of its folder."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite never reaches the weights: stop the run, or skip the step."""
