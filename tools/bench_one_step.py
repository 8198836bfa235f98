"""Part `one-step` of tools.bench: a picture in one step beside the same in 48 steps.

1024 px at the published sizes with random weights, on every device what sample.py runs. The times
do not include reading the weights. A CPU computes the first of the 48 steps; all count alike.
"""
from functools import partial

import torch

import meissonic
import vq
from engine import fast
from tools.bench_picture import draw_ids, phase, published_setup, time_text

STEPS = 48
STEPS_ON_CPU = 1                                      # that are computed


def time_one_step(report, device, start):
    report.jobs([("one step", partial(time_ways, report, published_setup(device)))], start)


@torch.no_grad()
def time_ways(report, setup):
    """A row for one step, and one for 48."""
    cuda = setup.device.type == "cuda"
    tokens = setup.side ** 2
    plan = meissonic.Schedule(STEPS, 9.0, (2.0, 0.0), "cosine", "step").plan(tokens, tokens)
    plan = plan if cuda else plan[:STEPS_ON_CPU]
    (cond, uncond), text_time, _, text_peak = time_text(setup)
    model = setup.model(meissonic.Transformer, setup.transformer)
    ways = {"one step": partial(draw_one_step, setup, model, cond),
            f"{STEPS} steps": partial(draw_ids, setup, model, cond, uncond, False, plan)}
    times = {}                                        # name -> (seconds, GB)
    ids = None                                        # of one step: all known
    for name, draw in ways.items():
        drawn, *measured = phase(setup, draw if cuda else lambda: None, draw)
        ids = drawn if ids is None else ids
        times[name] = measured[0], measured[2]
    fast.release(model)
    del model, ways, draw
    decode = partial(setup.model(vq.VQModel, setup.vq).decode, ids)
    _, decode_time, _, decode_peak = phase(setup, decode if cuda else lambda: None, decode)
    for name, (seconds, peak) in times.items():
        steps = 1 if name == "one step" else STEPS
        loop = seconds * (1 if steps == 1 else STEPS / len(plan))
        report.row(path=name, pixels=setup.size, dtype=str(setup.dtype)[6:], text_s=text_time,
                   loop_s=loop, decode_s=decode_time, picture_s=text_time + loop + decode_time,
                   computed_steps=min(steps, len(plan)), peak_GB=max(text_peak, peak, decode_peak))


def draw_one_step(setup, model, cond):
    """The tokens of one picture in one step -> (1, h, w)."""
    ids = torch.empty((1, setup.side, setup.side), dtype=torch.int64, device=setup.device)
    predict = fast.one_step_predictor(model, cond)
    return meissonic.sample_one_step(predict, ids, model.config, [0], meissonic.OneStep())
