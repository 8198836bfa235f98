"""Tied code embeddings: codes with a feature in common share what is learned of it.

Of a codebook of block truncation coding (codebook.py) it is known what the codes show: two colours
and an outline. The transformer's embedding and its head have one row for each code, W (V, ...).
Here the rows are W + features T. The features (V, F) are given; T (F, ...) is trained along with W
and starts at zero. A step on one code then moves all codes that share a feature with it.

    tie_codes(transformer, code_features(8, 36), fresh=True)
    state = untie(transformer, transformer.state_dict())        # the state of the plain module

NOTE None of this is in the paper. It makes a tiny model learn the world of shapes on two CPU cores.
Letters: V codes (a transformer may have more rows: the mask token), F features.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

EMBEDDING_STD = 0.25                               # of the feature vectors that codes begin from
HEAD_STD = 0.04


class TiedCodeEmbedding(nn.Module):
    """The parametrisation W -> W + features T of a table of codes; see torch.nn.utils.parametrize.
    features (V, F); weight (rows, ...) with rows >= V; the rows after V have no features."""

    def __init__(self, features, weight):
        super().__init__()
        features = F.pad(features, (0, 0, 0, len(weight) - len(features)))         # (rows, F)
        self.register_buffer("features", features, persistent=False)
        self.table = nn.Parameter(torch.zeros(features.shape[1], weight[0].numel()))

    def forward(self, weight):
        with torch.autocast(weight.device.type, enabled=False):    # as exact as untie
            return weight + (self.features @ self.table).view_as(weight)


@torch.no_grad()
def tie_codes(transformer, features, fresh):
    """Tie the embedding and the head of a transformer by features (V, F), in place. With `fresh`
    each feature is a random vector and a code begins as the sum of its features. Without, the codes
    keep their values."""
    embedding, head = transformer.embed.embeddings, transformer.mlm_layer.conv2
    for module, std in ((embedding, EMBEDDING_STD), (head, HEAD_STD)):
        if fresh:
            codes = module.weight[:len(features)]                                  # (V, ...) a view
            table = std * torch.randn(features.shape[1], module.weight[0].numel())
            codes.copy_((features @ table).view_as(codes))
        tied = TiedCodeEmbedding(features, module.weight)
        parametrize.register_parametrization(module, "weight", tied)


def untie(transformer, state):
    """The state of a tied transformer, CPU tensors -> the state of the plain one. The state of a
    transformer that is not tied stays the same."""
    state = dict(state)
    for name, module in transformer.named_modules():
        if isinstance(module, TiedCodeEmbedding):      # name: PARENT.parametrizations.weight.0
            parametrized = name.removesuffix(".0")
            weight = state.pop(f"{parametrized}.original")
            table = state.pop(f"{name}.table")
            plain = parametrized.replace("parametrizations.", "")
            state[plain] = weight + (module.features.cpu() @ table).view_as(weight)
    return state
