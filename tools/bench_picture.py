"""Parts `tokens` and `picture` of tools.bench: are all paths the same, and how fast is a picture?

On a GPU a picture of 1024 px at the published sizes with random weights, guidance 9, 48 steps; on a
CPU the sizes of the bundled model. `plain` is meissonic.reference_predictor with the plain kernels,
`fast` what sample.py runs. One model is in memory at a time.
"""
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

import clip
import meissonic
import vq
from engine import fast
from engine.hub import BUNDLED, default_dtype
from engine.pipeline import Pipeline
from engine.quantize import quantize
from tools.bench_timing import ceilings, now, peak_memory, plain_kernels, reset_peak_memory

PROMPTS = ["a red circle above a blue square", "three green stars on white",
           "a large yellow letter A", "a black heart left of an orange cross"]


def compare_tokens(report, device):
    """Tokens of the bundled model in float32: the share that equals those of the CPU."""
    paths = {"cpu": ("cpu", True)}
    if device.type == "cuda":
        paths |= {"cuda, plain": ("cuda", True), "cuda, Triton": ("cuda", False)}
    tokens = {}
    for name, (where, plain) in paths.items():
        with plain_kernels() if plain else nullcontext():
            pipe = Pipeline(BUNDLED, where)
            ids = pipe.draw(PROMPTS, range(len(PROMPTS)), remask=0, best_of=1)   # (B, h, w)
        tokens[name] = ids.cpu()
        equal = (tokens[name] == tokens["cpu"]).float().mean().item()
        report.row(path=name, pictures=len(PROMPTS), equal_tokens=f"{equal:.2%}")


@dataclass
class Setup:
    """What a picture is made with."""
    device: torch.device
    dtype: torch.dtype
    transformer: meissonic.Config
    text: clip.Config
    vq: vq.Config
    size: int                                         # pixels along a side
    length: int                                       # text positions

    @property
    def side(self):                                   # tokens along a side
        return self.size // self.vq.f

    def model(self, kind, config):
        """A model with PyTorch's random weights."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = kind(config)
        return model.to(self.dtype).eval().requires_grad_(False)


def make_setup(device):
    """The published sizes on a GPU, else those of the bundled model."""
    if device.type == "cuda":
        return published_setup(device)
    pipe = Pipeline(BUNDLED)
    parts = {"transformer": meissonic.Transformer, "text_encoder": clip.TextEncoder,
             "vqvae": vq.VQModel}
    configs = [kind.from_pretrained(BUNDLED / part, torch.float32, "meta").config
               for part, kind in parts.items()]
    length = pipe.tokenizer.length
    return Setup(device, torch.float32, *configs, size=pipe.size[0], length=length)


def published_setup(device):
    dtype, _ = default_dtype(device)
    configs = meissonic.Config(), clip.Config(), vq.Config()
    return Setup(device, dtype, *configs, size=1024, length=77)


def time_pictures(report, device, start):
    """One row for each way to make a picture, and how far it is from the plain one."""
    setup = make_setup(device)
    paths = {"plain": None, "fast": None}
    if device.type == "cuda":
        paths |= {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
    steps = 48 if device.type == "cuda" else 8
    plan = meissonic.Schedule(steps, 9.0, (2.0, 0.0), "cosine", "step").plan(
        setup.side ** 2, setup.side ** 2)
    product = ceilings(device, setup.dtype)[1]
    logits = {}                                       # of each path, to compare
    jobs = [(name, partial(time_picture, report, setup, name, quantized, plan, product, logits))
            for name, quantized in paths.items()]
    report.jobs(jobs, start)


@torch.no_grad()
def time_picture(report, setup, name, quantized, plan, product, logits):
    plain = name == "plain"
    with plain_kernels() if plain else nullcontext():
        (cond, uncond), text_time, _, text_peak = time_text(setup)
        model = setup.model(meissonic.Transformer, setup.transformer)
        if quantized:
            quantize(model, quantized, setup.device, host_norms=False)
        draw = partial(draw_ids, setup, model, cond, uncond, plain)
        ids, loop, warm_up, loop_peak = phase(setup, lambda: draw(plan[:2]), lambda: draw(plan))
        logits[name] = half_masked_logits(setup, model, cond, uncond, plain, plan)
        fast.release(model)
        del model, draw
        decoder = setup.model(vq.VQModel, setup.vq)
        decode = partial(decoder.decode, ids)
        _, decode_time, _, decode_peak = phase(setup, decode, decode)
    rate = step_operations(setup) * len(plan) / loop
    report.row(path=name, pixels=setup.size, dtype=str(setup.dtype)[6:], text_s=text_time,
               loop_s=loop, decode_s=decode_time, picture_s=text_time + loop + decode_time,
               ms_per_step=1e3 * loop / len(plan), warm_up_s=warm_up,
               peak_GB=max(text_peak, loop_peak, decode_peak), TFLOP_per_s=rate / 1e12,
               of_product=f"{rate / product:.0%}")
    if "plain" in logits and not plain:
        error = (logits[name] - logits["plain"]).square().mean().sqrt() / logits["plain"].std()
        report.note(f"{name}: logits of a half-masked picture differ from the plain ones by "
                    f"{error.item():.2g} of their standard deviation")


def phase(setup, warm_up, function):
    """-> (result of function(), its seconds, seconds of warm_up(), GB at most)."""
    reset_peak_memory(setup.device)
    begin = now(setup.device)
    warm_up()
    middle = now(setup.device)
    result = function()
    return result, now(setup.device) - middle, middle - begin, peak_memory(setup.device)


def time_text(setup):
    """`phase` of encoding a prompt and the negative prompt -> ((cond, uncond), ...)."""
    encoder = setup.model(clip.TextEncoder, setup.text)
    words = torch.arange(2 * setup.length, device=setup.device).view(2, 1, -1)
    micro = torch.tensor([[setup.size, setup.size, 0, 0, 6.0]], device=setup.device)

    def encode():
        return [meissonic.Conditioning(*encoder(word), micro) for word in words]

    return phase(setup, encode, encode)


def predictor(model, cond, uncond, plain, plan):
    if plain:
        return meissonic.reference_predictor(model, cond, uncond)
    return fast.predictor(model, cond, uncond, plan)


def draw_ids(setup, model, cond, uncond, plain, plan):
    """The loop of one picture -> (1, h, w). A part of a plan leaves tokens masked."""
    shape = 1, setup.side, setup.side
    ids = torch.full(shape, model.config.mask_token, device=setup.device)
    predict = predictor(model, cond, uncond, plain, plan)
    return meissonic.sample(predict, ids, model.config.mask_token, [0], plan)


def half_masked_logits(setup, model, cond, uncond, plain, plan):
    """Logits (1, M, V) of every second position; the other codes are the same for all paths."""
    index = torch.arange(setup.side ** 2, device=setup.device)[None]             # (1, N)
    masked = index[:, ::2]                                                       # (1, M)
    known = index * 7 % model.config.codebook_size
    half = known.scatter(1, masked, model.config.mask_token).view(1, setup.side, -1)
    step = plan[len(plan) // 2]
    return predictor(model, cond, uncond, plain, [step])(step, half, masked).float()


def step_operations(setup):
    """Operations of one step with guidance, all positions through the head, by PyTorch's count."""
    with torch.device("meta"):
        model = meissonic.Transformer(setup.transformer)
        ids = torch.zeros(1, setup.side, setup.side, dtype=torch.int64)
        hidden = torch.zeros(1, setup.length, setup.text.hidden_size)
        pooled = torch.zeros(1, setup.text.projection_dim)
        micro = torch.zeros(1, 5)
        timestep = torch.zeros(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, hidden, pooled, micro, timestep)
    return 2 * counter.get_total_flops()
