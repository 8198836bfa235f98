"""The fast predictor: the logits of meissonic.reference_predictor, but for rounding.

    predict = fast.predictor(model, cond, uncond, plan)
    ids = meissonic.sample(predict, ids, mask_token, seeds, plan)

What it saves:
- the text embedding and the modulations of all adaptive norms depend on the prompt and the step
  alone. They are computed once for all steps, so that the 264 M parameters behind them need not be
  read in the loop and may stay on the host (`ADAPTIVE_NORMS`, for from_pretrained(host=...))
- both passes of guidance run as one batch
- the head sees the masked positions alone. Its last layer is linear, so guidance is applied to its
  input: one product instead of two
- on CUDA the blocks are captured in a graph, once for each shape, and launched as one

Letters: as in meissonic.py; T steps, W width of all modulations side by side.
"""
import weakref

import torch
import torch.nn.functional as F

from meissonic import Conditioning, apply_cfg, gather_positions

ADAPTIVE_NORMS = (".norm.linear.", ".norm1.linear.", ".norm1_context.linear.")
MAX_GRAPHS = 2                                        # shapes: of sampling and of re-ranking
_graphs = weakref.WeakKeyDictionary()                 # {model: {shapes: Graph}}


def predictor(model, cond, uncond, plan):
    """-> predict(step, ids (B, h, w), masked (B, M)) -> logits (B, M, V), for steps of `plan`."""
    guided = any(step.cfg_scale != 1 for step in plan)
    both = concatenate(cond, uncond) if guided else cond
    passes = 2 if guided else 1
    text = model.embed_text(both.hidden)                                         # (2B, L, C)
    timesteps = list(dict.fromkeys(step.timestep for step in plan))
    modulations = precompute_modulations(model, both, timesteps)                  # (T, 2B, W)
    index = {timestep: i for i, timestep in enumerate(timesteps)}
    head = model.mlm_layer.conv2

    def predict(step, ids, masked):
        x = features(model, ids.repeat(passes, 1, 1), text, modulations[index[step.timestep]])
        x = model.head_features(gather_positions(x, masked.repeat(passes, 1)))   # (2B, M, C)
        if guided:
            x = apply_cfg(*x.chunk(2), step.cfg_scale)                            # (B, M, C)
        return head(x)                                                            # (B, M, V)
    return predict


def concatenate(*conditionings):
    """Conditionings of B rows each -> one of all rows."""
    parts = zip(*(vars(c).values() for c in conditionings))
    return Conditioning(*(torch.cat(part) for part in parts))


def modulation_layers(model):
    """All adaptive norms in the order in which the blocks use them."""
    return [norm for block in model.blocks for norm in block.modulation_layers]


def precompute_modulations(model, cond, timesteps):
    """What each adaptive norm makes of temb, for all timesteps -> (T, B, W). The weights are read
    once; they may lie on the host. Written in place, because the result is large."""
    norms, device = modulation_layers(model), cond.pooled.device
    time = model.embed_timestep(torch.tensor(timesteps, device=device), cond.pooled.dtype)
    temb = time[:, None] + model.embed_prompt(cond.pooled, cond.micro_conds)           # (T, B, C)
    x, sizes = F.silu(temb), [norm.linear.out_features for norm in norms]
    result = x.new_empty(*x.shape[:2], sum(sizes))                                     # (T, B, W)
    for norm, part in zip(norms, result.split(sizes, -1)):
        part.copy_(F.linear(x, norm.linear.weight.to(device), norm.linear.bias.to(device)))
    return result


def features(model, ids, text, modulations):
    """All but the head. ids (B, h, w), text (B, L, C), modulations (B, W) -> (B, h, w, C); on CUDA
    as a graph, whose result the next call overwrites."""
    if not ids.is_cuda:
        return run(model, ids, text, modulations)
    graphs, shapes = _graphs.setdefault(model, {}), (ids.shape, text.shape)
    if shapes not in graphs:
        if len(graphs) == MAX_GRAPHS:
            graphs.clear()
        pool = next(iter(graphs.values())).pool if graphs else torch.cuda.graph_pool_handle()
        graphs[shapes] = Graph(lambda *x: run(model, *x), (ids, text, modulations), pool)
    return graphs[shapes](ids, text, modulations)


def one_step_predictor(model, cond):
    """meissonic.one_step_predictor, with adaptive norms that may lie on the host. No graph: in one
    pass it saves less than it takes to capture."""
    text = model.embed_text(cond.hidden)                                          # (B, L, C)
    modulations = precompute_modulations(model, cond, [0.0])[0]                   # (B, W)

    def predict(ids, perturb):
        x = run(model, ids, text, modulations, perturb).flatten(1, 2)             # (B, N, C)
        return model.mlm_layer.conv2(model.head_features(x))                      # (B, N, V)
    return predict


def run(model, ids, text, modulations, perturb=None):
    sizes = [norm.linear.out_features for norm in modulation_layers(model)]
    parts = iter(modulations.split(sizes, -1))

    def run_block(block, a, b, rope):
        return block.forward_modulated(a, b, [next(parts) for _ in block.modulation_layers], rope)
    return model.run_blocks(ids, text, run_block, perturb)


def release(model):
    """Drop the model's graphs and their memory."""
    _graphs.pop(model, None)


class Graph:
    """A function of tensors, recorded as a CUDA graph: the host, which needs about 5 microseconds
    for each of some 600 kernels, launches once. The function itself is not kept. Graphs may share a
    memory `pool`, because their results are used before the next one runs."""
    def __init__(self, function, inputs, pool):
        self.pool, self.graph = pool, torch.cuda.CUDAGraph()
        self.inputs = [x.clone() for x in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                 # compiles kernels and fills cached tables
            function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph, pool=pool, stream=side):
            self.output = function(*self.inputs)

    def __call__(self, *inputs):
        for mine, x in zip(self.inputs, inputs):
            mine.copy_(x)
        self.graph.replay()
        return self.output
