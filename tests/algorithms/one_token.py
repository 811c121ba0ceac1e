"""A policy over answers of one token: all that a loss or a loop asks of a policy, in one logit each."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from plaudit.policy import Output


class OneToken(torch.nn.Module):
    """One logit for each answer."""

    adapter, frozen, value, begins_at_reference = None, 0, None, True

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())

    def parts(self, batch, tokens):
        return batch.parts(tokens)

    def learning(self):
        return dict(self.named_parameters())

    def keep_reference(self):
        self.kept = self.logits.detach().clone()

    @contextmanager
    def as_reference(self):
        own, self.logits.data = self.logits.data, self.kept
        yield
        self.logits.data = own

    def forward(self, batch, **asked):
        logprobs = self.logits.log_softmax(0)[batch.tokens]
        return Output(logprobs=torch.where(batch.actions, logprobs, torch.zeros_like(logprobs)))
