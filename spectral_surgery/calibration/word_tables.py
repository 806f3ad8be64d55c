"""What errors in the tables of words cost, by row and by column: embeddings, and the output layer of a language model.

The logits of a language model are z = E h. A small error e in row i of E changes the KL of a token's distribution p by
about p_i (e · h)² / 2, so that rows count by how likely their words are, and columns by the second moment of the last
hidden states. As an embedding, row i counts by how often its word is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_surgery.calibration.block_streaming import ActivationStore, LazyModel
from spectral_surgery.calibration.layer_moments import BATCH_TOKENS
from spectral_surgery.inputs.model_input import ModelInput, equal_shapes
from spectral_surgery.live.blocks import Batch, Held, hidden_of, next_inputs
from spectral_surgery.live.moments import SecondMoment
from spectral_surgery.live.running import called
from spectral_surgery.live.stacks import Chain

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


def read_costs(inputs: Sequence[ModelInput], shape: tuple[int, int]) -> TableCosts:
    """Of an embedding of a shape [V, D] that is only read."""
    read = torch.cat([ids for one in inputs for name, ids in one.read().items() if name.endswith("input_ids")])
    return TableCosts(_shares(torch.bincount(read, minlength=shape[0]).float()), torch.eye(shape[1]))


def output_costs(
    lazy: LazyModel,
    inputs: Sequence[ModelInput],
    store: ActivationStore,
    head: Callable[[], Tensor],
    *,
    read: bool,
) -> TableCosts:
    """Of the output layer of a language model, from the original on some text.

    Args:
        lazy: the model without that layer.
        inputs: what it is run on.
        store: for activations that wait.
        head: reads its matrix, [V, D].
        read: whether it is the embedding too.

    Raises:
        UnchainedError: when the model does something of its own between two blocks.
    """
    chain, batches = lazy.chain, equal_shapes(inputs, BATCH_TOKENS, lazy.device)
    ends: list[list[Held]] = []
    for number, stack in enumerate(chain.stacks):
        with chain.outside(number), lazy.computing():
            samples = chain.enter(number, batches, ends, store.put)
        for place, block in enumerate(stack.blocks):
            with lazy.holding(f"{stack.prefix}.{place}."), lazy.computing():
                samples = next_inputs(block, samples, store.put)
        ends.append([sample.hidden for sample in samples])
    with chain.outside(len(chain.stacks)):
        table = head().float().to(lazy.device)
        moment, likely = SecondMoment(table.shape[1], table.device), torch.zeros(len(table), device=table.device)
        for place, batch in enumerate(batches):
            hidden = _last_hidden(chain, batch, [left[place] for left in ends]).reshape(-1, table.shape[1]).float()
            moment.add(hidden)
            likely += (hidden @ table.T).softmax(-1).sum(0)
    whole = moment.whole().cpu()
    whole = whole / whole.diagonal().mean()
    return TableCosts(_shares(likely.cpu()), whole + _READ * torch.eye(len(whole)) if read else whole)


@torch.no_grad()
def _last_hidden(chain: Chain, batch: Batch, ends: Sequence[Held]) -> Tensor:
    """What a model makes of what its last block gives: a norm, mostly."""
    with chain.left(ends):
        return hidden_of(called(chain.entry, named={**batch, "return_dict": False}))


def _shares(counts: Tensor) -> Tensor:
    shares = counts / counts.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (shares + _UNSEEN) / (1 + _UNSEEN)
