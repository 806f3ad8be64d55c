"""The modules of a model, guessed from the names and shapes of its tensors: enough to choose which carry an adapter.

Nothing here has numbers (all tensors are on the meta device) and nothing can run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# names of modules whose matrix is looked up, not multiplied
_EMBEDDING = re.compile(r"(?!embed_out$)(\w*embeddings?|embed_\w+|\w*embed|wte|wpe|shared|relative_attention_bias)")
_ROUTER = re.compile(r"(^|\.)(gate|\w*router\w*)$")  # mostly a parameter of the expert layer, not a linear layer
_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")  # one matrix of many, which transformers puts into one tensor
_TRANSPOSED_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_TRANSPOSED = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


class Conv1D(nn.Module):
    """Stands for the module of this name in transformers, a linear layer whose weight is [I, O]."""

    def __init__(self, weight: Tensor) -> None:
        """Hold a weight."""
        super().__init__()
        self.nf = weight.shape[1]
        self.weight = nn.Parameter(weight)


def skeleton(shapes: Mapping[str, tuple[int, ...]], model_type: str | None = None) -> nn.Module:
    """A tree of modules for the tensors of a checkpoint.

    Args:
        model_type: of config.json; tells models whose linear layers store [I, O].

    Returns:
        A module with the names of the model's: those with a matrix are Linear, Conv1D, Conv2d or Embedding, the
        others, among them numbered experts, plain modules with their parameters.
    """
    root = nn.Module()
    leaves: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        leaves.setdefault(owner, {})[leaf] = shape
    for name in sorted(leaves, key=lambda name: name.count(".")):
        module = _module(name, leaves[name], model_type) if name else root
        for leaf, shape in leaves[name].items():
            if leaf not in module._parameters:
                module._parameters[leaf] = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
        if name:
            _place(root, name, module)
    return root


def is_named_conv1d(name: str, model_type: object) -> bool:
    """Whether a module is known to store [I, O], as Conv1D of transformers does."""
    return model_type in _TRANSPOSED_MODELS and name.rpartition(".")[2] in _TRANSPOSED


def _module(name: str, tensors: Mapping[str, tuple[int, ...]], model_type: str | None) -> nn.Module:
    weight, leaf = tensors.get("weight", ()), name.rpartition(".")[2]
    with torch.device("meta"):
        if len(weight) == 4:
            out, channels, *kernel = weight
            return nn.Conv2d(channels, out, tuple(kernel), bias="bias" in tensors)  # type: ignore[arg-type]
        if len(weight) != 2 or _ROUTER.search(name) or _EXPERT.search(name):
            return nn.Module()
        if _EMBEDDING.fullmatch(leaf):
            return nn.Embedding(*weight)
        if is_named_conv1d(name, model_type):
            return Conv1D(torch.empty(weight))
        return nn.Linear(weight[1], weight[0], bias="bias" in tensors)


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    parent = root
    *path, leaf = name.split(".")
    for part in path:
        # not add_module, which refuses names that a module has for something else: type, half
        child = parent._modules.get(part) or nn.Module()
        parent._modules[part] = child
        parent = child
    parent._modules[leaf] = module
