"""How logical rows lie in memory: padded, packed, or with each prompt computed once for all its answers.

Algorithms see (B, T) rows. The backbone sees R physical rows of L columns, cheapest first: rows side by side
behind a block mask cost no padding, and answers that hang from one prompt need that prompt only once. Every
arrangement gives the same numbers (positions restart, and no token sees another document), so the choice is
a matter of counted operations alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plaudit.attention import Blocks, Piece, Plan
from plaudit.batch import Batch


@dataclass(frozen=True)
class Layout:
    """source (R, L): flat index b * T + t of the logical token at each physical place.
    where (B, T): flat index r * L + l of each logical token; 0 where there is none.
    positions (R, L): the position that each place has in its own row. mask (R, 1, L, L): True where a query may
    look, or None where plain causal attention is right, or `Blocks` where attention knows who sees whom. cost: counted
    operations, to compare layouts with."""

    source: Tensor
    where: Tensor
    positions: Tensor
    mask: Tensor | None
    cost: float

    def spread(self, stream: Tensor) -> Tensor:
        """(B, T, ...) logical stream -> (R, L, ...) physical."""
        return stream.flatten(0, 1)[self.source]

    def collect(self, stream: Tensor) -> Tensor:
        """(R, L, ...) physical stream -> (B, T, ...) logical."""
        return stream.flatten(0, 1)[self.where]


@dataclass(frozen=True)
class _Family:
    """Rows that hang from one computed prefix of `prefix` tokens (0 for a row on its own)."""

    rows: tuple[int, ...]
    prefix: int
    length: int


def padded(batch: Batch, width: int) -> Layout:
    """One physical row for each logical one; right padding is invisible to causal attention, so no mask."""
    rows, columns = batch.tokens.shape
    places = torch.arange(rows * columns, device=batch.tokens.device).view(rows, columns)
    positions = torch.arange(columns, device=batch.tokens.device).expand(rows, columns)
    return Layout(places, places, positions, None, _cost(rows, columns, width, masked=False))


def arrange(batch: Batch, width: int) -> Layout:
    """The cheapest exact layout for `batch` in a causal backbone of hidden size `width`."""
    lengths = batch.lengths.tolist()
    plain = padded(batch, width)
    options = [[_Family((i,), 0, length) for i, length in enumerate(lengths)]]
    shared = _shared_prefixes(batch, lengths)
    most = max((len(rows) for rows, prefix in shared if prefix), default=1)
    children = 2
    while children < 2 * most:
        options.append(_families(shared, lengths, min(children, most)))
        children *= 2
    plans = [_bins(families) for families in options]
    costs = [_cost(len(bins), max(_length(b) for b in bins), width, masked=True) for bins in plans]
    best = min(range(len(plans)), key=costs.__getitem__)
    return _build(batch, lengths, plans[best], costs[best]) if costs[best] < plain.cost else plain


def shared(batch: Batch, width: int) -> Layout:
    """Every group hung from the prefix that its rows share, whatever it costs."""
    lengths = batch.lengths.tolist()
    bins = _bins(_families(_shared_prefixes(batch, lengths), lengths, len(lengths)))
    return _build(batch, lengths, bins, _cost(len(bins), max(_length(b) for b in bins), width, masked=True))


def side_by_side(batch: Batch, width: int) -> Layout:
    """All tokens in one physical row, none of it padding, each group's rows hung from the prefix that they share.
    For backbones that attend by blocks: nobody pays for pairs of tokens that do not see each other."""
    lengths, columns = batch.lengths.tolist(), batch.tokens.shape[1]
    source: list[np.ndarray] = []
    where = np.zeros((len(batch), columns), np.int64)
    pieces: list[Piece] = []
    count = 0
    for rows, prefix in _shared_prefixes(batch, lengths):
        above = count
        if prefix:
            pieces.append(Piece(count, count + prefix))
            source.append(rows[0] * columns + np.arange(prefix))
            where[rows, :prefix] = count + np.arange(prefix)
            count += prefix
        for row in rows:
            stop = count + lengths[row] - prefix
            pieces.append(Piece(count, stop, above, above + prefix))
            source.append(row * columns + np.arange(prefix, lengths[row]))
            where[row, prefix : lengths[row]] = np.arange(count, stop)
            count = stop
    device = batch.tokens.device
    places = torch.from_numpy(np.concatenate(source)[None]).to(device)
    pairs = sum((p.stop - p.start) * ((p.stop - p.start) / 2 + p.below - p.above) for p in pieces)
    mask = Blocks.of(Plan.of(pieces, count), device)
    return Layout(places, torch.from_numpy(where).to(device), places % columns, mask, 6.0 * width * count + pairs)


def computed(batch: Batch) -> list[int]:
    """How many tokens of each group are computed when its rows lie side by side."""
    lengths = batch.lengths.tolist()
    shared = _shared_prefixes(batch, lengths)
    return [prefix + sum(lengths[row] - prefix for row in rows) for rows, prefix in shared]


def _cost(rows: int, columns: int, width: int, masked: bool) -> float:
    """Operations of a layer, in units of 4 * width: 24 width^2 a token for its matrices, 4 width * columns for
    attention, half of that where the kernel can skip the future."""
    return rows * columns * (6.0 * width + columns * (1.0 if masked else 0.5))


def _length(families: Sequence[_Family]) -> int:
    return sum(family.length for family in families)


def _shared_prefixes(batch: Batch, lengths: list[int]) -> list[tuple[list[int], int]]:
    """Each group's rows with the length of the prefix that they all share: never beyond what precedes the first
    action, and never a whole row, so that every row keeps a token of its own."""
    tokens = batch.tokens.cpu().numpy()
    first = torch.where(batch.actions.any(1), batch.actions.int().argmax(1), batch.lengths - 1).tolist()
    found = []
    for block in batch.blocks():
        rows = block.tolist()
        limit = min(first[i] for i in rows)
        differs = (tokens[rows, :limit] != tokens[rows[0], :limit]).any(0) if limit > 0 else np.zeros(0, bool)
        prefix = int(differs.argmax()) if differs.any() else max(limit, 0)
        found.append((rows, prefix if len(rows) > 1 else 0))
    return found


def _families(shared: list[tuple[list[int], int]], lengths: list[int], children: int) -> list[_Family]:
    families = []
    for rows, prefix in shared:
        size = children if prefix else 1
        for part in (tuple(rows[k : k + size]) for k in range(0, len(rows), size)):
            kept = prefix if len(part) > 1 else 0
            families.append(_Family(part, kept, kept + sum(lengths[i] - kept for i in part)))
    return families


def _bins(families: list[_Family]) -> list[list[_Family]]:
    """First fit decreasing into rows as wide as the longest family: wider rows would only cost attention."""
    ordered = sorted(families, key=lambda family: (-family.length, family.rows[0]))
    capacity = ordered[0].length
    bins: list[list[_Family]] = []
    room: list[int] = []
    for family in ordered:
        fits = next((i for i, space in enumerate(room) if space >= family.length), None)
        if fits is None:
            bins.append([family])
            room.append(capacity - family.length)
        else:
            bins[fits].append(family)
            room[fits] -= family.length
    return bins


def _build(batch: Batch, lengths: list[int], bins: list[list[_Family]], cost: float) -> Layout:
    columns = batch.tokens.shape[1]
    shape = (len(bins), max(_length(families) for families in bins))
    source = np.zeros(shape, np.int64)
    positions = np.zeros(shape, np.int64)
    segment = np.full(shape, -1, np.int64)
    parent = np.full(shape, -2, np.int64)
    where = np.zeros((len(batch), columns), np.int64)
    for r, families in enumerate(bins):
        place = number = 0
        for family in families:
            root = -2
            if family.prefix:
                pieces = [(family.rows[0], 0, family.prefix)]
                where[list(family.rows), : family.prefix] = r * shape[1] + place + np.arange(family.prefix)
                root = number
            else:
                pieces = []
            pieces += [(i, family.prefix, lengths[i]) for i in family.rows]
            for i, start, stop in pieces:
                span = slice(place, place + stop - start)
                source[r, span] = i * columns + np.arange(start, stop)
                positions[r, span] = np.arange(start, stop)
                segment[r, span] = number
                parent[r, span] = root
                where[i, start:stop] = r * shape[1] + np.arange(span.start, span.stop)
                place, number = span.stop, number + 1
    device = batch.tokens.device
    ids, parents = torch.from_numpy(segment).to(device), torch.from_numpy(parent).to(device)
    earlier = torch.ones(shape[1], shape[1], dtype=torch.bool, device=device).tril()
    seen = (ids[:, :, None] == ids[:, None, :]) | (parents[:, :, None] == ids[:, None, :])
    # A place without a token still needs something to look at, or its softmax is 0/0: padding sees padding.
    mask = (seen & earlier)[:, None]
    arrays = (torch.from_numpy(array).to(device) for array in (source, where, positions))
    return Layout(*arrays, mask, cost)
