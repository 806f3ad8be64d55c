"""What errors in the tables of words cost, by row and by column: embeddings, and the output layer of a language model.

The logits of a language model are z = E h. A small error e in row i of E changes the KL of a token's distribution p by
about p_i (e · h)² / 2, so that rows count by how likely their words are, and columns by the second moment of the last
hidden states. As an embedding, row i counts by how often its word is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectral_surgery.calibration.block_streaming import ActivationStore, LazyModel
from spectral_surgery.calibration.layer_moments import BATCH_TOKENS
from spectral_surgery.live.blocks import captured_inputs, find_blocks, hidden_of, next_inputs, returning
from spectral_surgery.live.moments import SecondMoment
from spectral_surgery.live.running import called
from spectral_surgery.text.sequences import equal_lengths

_UNSEEN = 0.1  # of the mean is added to what a row counts: words that are not in the text are not free
_READ = 0.1  # of what an error in a logit counts, does an error in an embedding, where one table is both


@dataclass(frozen=True)
class TableCosts:
    """What errors cost.

    Attributes:
        rows: [V] float32, with mean 1.
        moment: [D, D] float32, with a diagonal of mean 1.
    """

    rows: Tensor
    moment: Tensor


def read_costs(sequences: Sequence[Sequence[int]], shape: tuple[int, int]) -> TableCosts:
    """Of an embedding of a shape [V, D] that is only read."""
    read = torch.cat([torch.tensor(sequence) for sequence in sequences])
    return TableCosts(_shares(torch.bincount(read, minlength=shape[0]).float()), torch.eye(shape[1]))


def output_costs(
    lazy: LazyModel,
    sequences: Sequence[Sequence[int]],
    store: ActivationStore,
    head: Callable[[], Tensor],
    *,
    read: bool,
) -> TableCosts:
    """Of the output layer of a language model, from the original on some text.

    Args:
        lazy: the model without that layer.
        sequences: token ids.
        store: for activations that wait.
        head: reads its matrix, [V, D].
        read: whether it is the embedding too.

    Raises:
        UnchainedError: when the model does something of its own between two blocks.
    """
    prefix, blocks = find_blocks(lazy.model)
    batches = [lazy.placed(batch) for batch in equal_lengths(sequences, BATCH_TOKENS)]
    with lazy.holding("", f"{prefix}."), lazy.holding(f"{prefix}.0."), lazy.computing():
        samples = [captured_inputs(lazy.model, blocks, batch, store.put) for batch in batches]
    for number, block in enumerate(blocks):
        with lazy.holding(f"{prefix}.{number}."), lazy.computing():
            samples = next_inputs(block, samples, store.put)
    with lazy.holding("", f"{prefix}."), lazy.holding(f"{prefix}.0."):
        table = head().float().to(lazy.device)
        moment, likely = SecondMoment(table.shape[1], table.device), torch.zeros(len(table), device=table.device)
        for batch, sample in zip(batches, samples, strict=True):
            hidden = _last_hidden(lazy.model, blocks, batch, sample.hidden()).reshape(-1, table.shape[1]).float()
            moment.add(hidden)
            likely += (hidden @ table.T).softmax(-1).sum(0)
    whole = moment.whole().cpu()
    whole = whole / whole.diagonal().mean()
    return TableCosts(_shares(likely.cpu()), whole + _READ * torch.eye(len(whole)) if read else whole)


@torch.no_grad()
def _last_hidden(model: nn.Module, blocks: nn.ModuleList, batch: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """What a model makes of what its last block gives: a norm, mostly."""
    with returning(blocks, hidden):
        return hidden_of(called(model, named={**batch, "return_dict": False}))


def _shares(counts: Tensor) -> Tensor:
    shares = counts / counts.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (shares + _UNSEEN) / (1 + _UNSEEN)
