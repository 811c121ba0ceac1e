"""Folders and Hub names in, policies, reward models and tokenizers out; and back into folders that
`from_pretrained` opens without plaudit."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import nn

from plaudit import machine
from plaudit.backbone import heads_of, layers_of, load_backbone, logit_transform, tail_of
from plaudit.batch import Batch, collate
from plaudit.checks import ACTION_HEADS, check_model, read_config
from plaudit.errors import PlauditError
from plaudit.heads import ActionHeads, Perceptron
from plaudit.layout import Layout, padded, shared, side_by_side
from plaudit.policy import Policy
from plaudit.seq2seq import arrange

_VALUE_HEAD = "value_head.safetensors"


def _without_bars() -> None:
    """plaudit shows one progress bar, its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, with an end token: an encoder's is what it closes each text with. Raises PlauditError
    if it has none."""
    from transformers import AutoTokenizer

    _without_bars()
    check_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of a damaged file, the tokenizers library raises nothing narrower
        raise PlauditError(f"model: cannot load the tokenizer of {name!r}: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None and tokenizer.cls_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise PlauditError(f"model: the tokenizer of {name!r} has no end token: set `eos_token` and save it again.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks come from lengths, never from token ids
    return tokenizer


def encodes(name: str) -> bool:
    """Whether prompts go to an encoder in this model. A name that leads nowhere is left to those who load it."""
    from transformers import AutoConfig

    read_config(name)
    try:
        return bool(AutoConfig.from_pretrained(name, trust_remote_code=False).is_encoder_decoder)
    except (OSError, ValueError):
        return False


@machine.handing_back()
def load_policy(
    name: str,
    *,
    precision: str = "float32",
    train_layers: int = 0,
    lora_rank: int = 0,
    lora_alpha: float = 16.0,
    value_head: bool = False,
    value_hidden: int = 0,
    action_heads: bool = False,
    learns: bool = True,
) -> Policy:
    """A language model, causal or encoder-decoder, to train or sample from (`learns=False`: all of it frozen), with
    the heads that are asked for: those beside the model, or new ones.

    train_layers: only the last so many layers and the final norm learn (0: all). lora_rank: only low-rank
    adapters of that rank learn (0: none). value_hidden: the value head has a hidden layer so many times as wide as the
    states (0: none). Raises PlauditError for a wrong name, a combination of both ways, or a saved value head of
    another shape.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    both = encodes(name)
    model = load_backbone(name, AutoModelForSeq2SeqLM if both else AutoModelForCausalLM)
    if both and train_layers:
        raise PlauditError(
            "train_layers: an encoder-decoder model has two stacks of layers and no common trunk: "
            "train all of it, or set lora_rank."
        )
    policy = _prepare(model, "SEQ_2_SEQ_LM" if both else "CAUSAL_LM", train_layers, lora_rank, lora_alpha)
    if not learns:
        policy.requires_grad_(False)
    if value_head:
        policy.value = _value_head(name, policy.width, value_hidden)
    if action_heads:
        policy.heads = ActionHeads(policy.width, policy.backbone.get_output_embeddings().weight.shape[0])
        saved = Path(name) / ACTION_HEADS
        if saved.is_file():
            policy.heads.load(load_file(saved))
        if not learns:
            policy.heads.requires_grad_(False)
    return _finish(policy, name, precision)


def _value_head(name: str, width: int, wider: int) -> nn.Linear | Perceptron:
    """The value head beside a model, or a new one that is zero: before it has learned anything, the best guess of every
    advantage is the reward itself."""
    head: nn.Linear | Perceptron
    if wider:
        head = Perceptron(width, 1, wider)
    else:
        head = nn.Linear(width, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    path = Path(name) / _VALUE_HEAD
    if path.is_file():
        saved = load_file(path)
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in head.state_dict().items()}:
            own = len(saved["into.bias"]) // width if "into.bias" in saved else 0
            raise PlauditError(
                f"value_hidden is {wider}, but the value head that lies in {name!r} was made with {own}: set "
                f"value_hidden to {own}, or remove {_VALUE_HEAD} there to begin with a new one."
            )
        head.load_state_dict(saved)
    return head


@machine.handing_back()
def load_reward_model(
    name: str,
    tokenizer: Any,
    *,
    precision: str = "float32",
    train_layers: int = 0,
    lora_rank: int = 0,
    lora_alpha: float = 16.0,
    learns: bool = True,
) -> Policy:
    """A sequence classifier with one output (`learns=False`: all of it frozen): a decoder, scored at its last token, or
    an encoder with a head of its own. A model that has no such head yet gets a new one. A decoder's is drawn from
    N(0, 1/(d+1)) (Ziegler et al. 2019), and its padding token is made another than the end token, since Hugging Face
    classifiers read the score at the last token that is not padding. Raises PlauditError for any other model."""
    from transformers import AutoModelForSequenceClassification

    new = not _is_classifier(name)
    model = load_backbone(name, AutoModelForSequenceClassification, **({"num_labels": 1} if new else {}))
    if model.config.is_encoder_decoder:
        raise PlauditError(
            f"model: {name!r} ({type(model).__name__}) has an encoder and a decoder, and a reward model is either; "
            "a probability of its labels can be a reward: 'label:LABEL@MODEL'."
        )
    if model.config.num_labels != 1:
        raise PlauditError(
            f"model: {name!r} is a classifier of {model.config.num_labels} labels, not a reward model; a probability "
            "of its labels can be a reward: 'label:LABEL@MODEL'."
        )
    decodes = isinstance(getattr(model, "score", None), nn.Linear)
    if new and decodes:
        _distinct_padding(model, tokenizer)
        nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.config.get_text_config().hidden_size + 1))
    policy = _prepare(model, "SEQ_CLS", train_layers, lora_rank, lora_alpha)
    policy.own_head = not decodes
    policy.rearranges &= decodes
    if not lora_rank:  # the adapter brings heads of its own
        for head in heads_of(model).values():
            head.requires_grad_(True)
    if not learns:
        policy.requires_grad_(False)
    return _finish(policy, name, precision)


def end_every_text(tokenizer: Any) -> None:
    """Makes the tokenizer itself close each text with the end token, so that whoever opens the saved reward model
    gets the scores that plaudit gets. Tokenizers that already close their texts (BERT's) are left alone."""
    ids = tokenizer("a").input_ids
    if ids[-1] == tokenizer.eos_token_id or not tokenizer.is_fast or tokenizer.eos_token is None:
        return
    special = [(tokenizer.eos_token, tokenizer.eos_token_id)]
    begins = ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id is not None
    if begins:
        special.append((tokenizer.bos_token, tokenizer.bos_token_id))
    single = f"{tokenizer.bos_token}:0 $A:0 {tokenizer.eos_token}:0" if begins else f"$A:0 {tokenizer.eos_token}:0"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)


def save_pretrained(policy: Policy, tokenizer: Any, folder: Path) -> None:
    """A folder that `from_pretrained` opens: adapters merged (and kept beside it in `adapter/`), in the number
    type that the model came in, other heads in files of their own."""
    model = policy.backbone
    if policy.adapter is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*save_embedding_layers.*")  # it keeps those that grew, as it should
            policy.adapter.save_pretrained(str(folder / "adapter"))
        model = copy.deepcopy(policy.adapter).merge_and_unload()
    else:
        model = copy.deepcopy(model)
    model.to(policy.stored_dtype).save_pretrained(str(folder))
    if policy.value is not None:
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in policy.value.state_dict().items()}, folder / _VALUE_HEAD
        )
    if policy.heads is not None:
        kept = policy.heads.kept().items()
        save_file({k: v.to(policy.stored_dtype).contiguous().cpu() for k, v in kept}, folder / ACTION_HEADS)
    tokenizer.save_pretrained(str(folder))


def _is_classifier(name: str) -> bool:
    from transformers import AutoConfig

    names = AutoConfig.from_pretrained(name, trust_remote_code=False).architectures or []
    return any(architecture.endswith("ForSequenceClassification") for architecture in names)


def _distinct_padding(model: nn.Module, tokenizer: Any) -> None:
    config = model.config.get_text_config()
    end = tokenizer.eos_token_id
    if tokenizer.pad_token_id in (None, end):
        others = [i for i in tokenizer.all_special_ids if i != end]
        if others:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(others[-1])
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer))
    config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id


def _prepare(model: nn.Module, task: str, train_layers: int, lora_rank: int, lora_alpha: float) -> Policy:
    if train_layers and lora_rank:
        raise PlauditError("train_layers and lora_rank exclude each other: an adapter already leaves the rest frozen.")
    if lora_rank:
        from peft import LoraConfig, TaskType, get_peft_model
        from transformers.pytorch_utils import Conv1D

        heads = list(heads_of(model)) if task == "SEQ_CLS" else None
        options = LoraConfig(
            task_type=TaskType[task],
            r=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's
            modules_to_save=heads,
        )
        adapter = get_peft_model(model, options)
        adapter.eval()
        return Policy(adapter.get_base_model(), adapter)
    policy = Policy(model)
    if train_layers:
        stack = layers_of(policy.base)
        if not 0 < train_layers <= len(stack):
            raise PlauditError(
                f"train_layers: {train_layers} of {len(stack)} layers: choose 1 to {len(stack)}, or 0 for all."
            )
        policy.frozen = len(stack) - train_layers
        model.requires_grad_(False)
        decodes = task != "SEQ_CLS" or hasattr(model, "score")
        for module in (*list(stack)[policy.frozen :], *_above(policy.base, decodes)):
            module.requires_grad_(True)
    return policy


def _above(base: Any, decodes: bool) -> list[nn.Module]:
    """What follows the layers: a decoder's final norm; an encoder's pooler, as what else is there may serve all layers
    (DeBERTa's relative positions do)."""
    if decodes:
        return list(tail_of(base).values())
    pooler = getattr(base, "pooler", None)
    return [] if pooler is None else [pooler]


def _finish(policy: Policy, name: str, precision: str) -> Policy:
    from transformers import AutoConfig

    if not policy.own_head:
        _probe(policy)
    # The type on disk decides: what is frozen may shrink in memory only if nothing is lost by it.
    policy.stored_dtype = AutoConfig.from_pretrained(name, trust_remote_code=False).dtype or torch.float32
    policy.autocasts = precision == "bfloat16"
    if policy.autocasts and policy.stored_dtype == torch.bfloat16:
        for parameter in policy.backbone.parameters():  # heads are no copies of what is on disk
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return policy


@torch.no_grad()
def _probe(policy: Policy) -> None:
    """Tries on a few tokens what cannot be known from a config: whether packed rows give this model's own answers,
    and whether its head is one matrix. What fails is not used; the plain way is always right. Raises PlauditError for a
    language model whose states depend on what comes later."""
    spread = range(3, min(policy.config.get_text_config().vocab_size, 400), 7)
    ids = list(spread)[:8] if len(spread) >= 8 else [1] * 8
    batch = collate([ids[:3], ids[:3]], [ids[3:6], ids[6:8]], groups=[0, 0]).to(policy.device)
    plain, _ = policy._run(batch, _plain(policy, batch))
    continues = not policy.encodes and not hasattr(policy.backbone, "score")
    if continues and not _looks_back(batch, plain):
        raise PlauditError(
            f"model: {policy.backbone.name_or_path!r} ({type(policy.backbone).__name__}) looks both ways, so it cannot "
            "continue a text: take a causal or an encoder-decoder model."
        )
    if policy.rearranges:
        policy.rearranges = _packs(policy, batch, shared(batch, policy.width), plain)
        policy.blocks &= policy.rearranges and _packs(policy, batch, side_by_side(batch, policy.width), plain)
    if policy.plain_head:
        policy.plain_head = _has_plain_head(policy, batch, plain)


def _plain(policy: Policy, batch: Batch) -> Layout:
    """The arrangement that is always right."""
    return arrange(batch) if policy.encodes else padded(batch, policy.width)


def _looks_back(batch: Batch, plain: torch.Tensor) -> bool:
    """Whether two rows that begin alike have the same states until they differ."""
    begun = int(batch.actions[0].int().argmax())
    first, second = plain.view(*batch.tokens.shape, -1)[:, :begun]
    return bool((first - second).abs().max() <= 1e-5 * first.abs().max())


def _packs(policy: Policy, batch: Batch, layout: Layout, plain: torch.Tensor) -> bool:
    try:
        packed, _ = policy._run(batch, layout)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False  # some models take no mask of this shape, and each says so in its own way
    kept = batch.attention.flatten()
    return _close(layout.collect(packed.view(*layout.source.shape, -1)).flatten(0, 1)[kept], plain[kept])


def _has_plain_head(policy: Policy, batch: Batch, plain: torch.Tensor) -> bool:
    head = policy.backbone.get_output_embeddings()
    if head is None:
        return hasattr(policy.backbone, "score")
    scale, cap = logit_transform(policy.config)
    logits = nn.functional.linear(plain, head.weight, head.bias) * scale
    logits = torch.tanh(logits / cap) * cap if cap else logits
    policy.plain_head = False
    layout = _plain(policy, batch)
    _, own = policy._run(batch, layout)
    kept = layout.where[batch.attention]
    return own is not None and _close(logits[kept], own[kept])


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-3 * (1e-3 + b.abs().max()))
