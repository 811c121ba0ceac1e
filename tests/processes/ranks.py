"""Trains a small model for three steps on this rank's share of one batch and prints, as JSON, what came of it.

Run alone, it is the reference; started by a launcher with two processes, it must come to the same. The rows, the
micro-batches and the tokens of the two ranks differ in number.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from plaudit.world import World

ROWS, VOCABULARY = 12, 11
SHARES = {1: [[[0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]], 2: [[[0, 1], [2, 3, 4]], [[5, 6, 7], [8, 9], [10, 11]]]}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.hidden = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 1)  # a head that the loss leaves out
        self.register_buffer("scale", torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(self.embedding(tokens))) * self.scale
        return hidden @ self.embedding.weight.T  # tied


def data() -> tuple[Tensor, Tensor]:
    """Tokens (12, 9) and a mask (12, 8) of those to learn, of very different numbers per row."""
    tokens = torch.randint(VOCABULARY, (ROWS, 9), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(8) < torch.tensor([8, 1, 3, 2, 7, 1, 1, 2, 1, 4, 1, 2])[:, None]


def loss_sum(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits[mask], tokens[:, 1:][mask], reduction="sum")


def train(world: World) -> dict[str, object]:
    torch.manual_seed(world.rank)  # what counts is rank 0's weights
    model = Model()
    model, optimizer = world.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    tokens, mask = data()
    share = SHARES[world.size][world.rank]
    losses, norms, clipped = [], [], []
    for limit in (None, 0.1, 0.5):
        total = world.sum(sum(mask[rows].sum() for rows in share))
        loss = torch.zeros(())
        for i, rows in enumerate(share):
            with world.synchronised(model, last=i == len(share) - 1):
                part = loss_sum(model, tokens[rows], mask[rows])
                world.backward(part / total)
            loss += part.detach()
        norms.append(world.clip(model.parameters(), limit).item())
        clipped.append(world.clip(model.parameters(), None).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append((world.sum(loss) / total).item())
    with torch.no_grad():  # evaluation: ranks may hold different numbers of batches
        for rows in share:
            loss_sum(model, tokens[rows], mask[rows])
    plain = world.unwrap(model)
    parameters = torch.cat([p.detach().flatten() for name, p in plain.named_parameters() if "unused" not in name])
    return {
        "loss": losses,
        "norm": norms,
        "clipped": clipped,
        "parameters": parameters.tolist(),
        "keys": list(plain.state_dict()),
    }


def exchange(world: World) -> dict[str, object]:
    tensor = torch.tensor([1, 10]) * (world.rank + 1)
    stops = []
    for step in range(5):  # rank 1 is asked to stop at step 2
        stops.append(world.stop_requested(world.rank == 1 and step == 2))
        if stops[-1]:
            break
    world.barrier()
    return {
        "rank": world.rank,
        "size": world.size,
        "main": world.is_main,
        "sum": [world.sum(0.1 * (world.rank + 1)), world.sum(tensor).tolist(), tensor.tolist()],
        "maximum": [world.maximum(world.rank - 7.5), world.maximum(tensor * (1 - 2 * world.rank)).tolist()],
        "gather": world.gather([f"{world.rank}.{i}" for i in range(world.rank + 1)]),
        "share": world.share({"rank": world.rank}),
        "stops": stops,
        "lockstep": world.lockstep,
    }


def main() -> None:
    torch.set_num_threads(1)
    world = World.start(device="cpu")
    result = {"train": train(world), "exchange": exchange(world), "accelerate": "accelerate" in sys.modules}
    Path(sys.argv[1], f"rank-{world.rank}.json").write_text(json.dumps(result))
    world.close()
    # As `plaudit.cli` leaves: at the interpreter's own end gloo's threads may abort the process.
    os._exit(0)


if __name__ == "__main__":
    main()
