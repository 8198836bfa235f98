"""Orders of revealing, guidance over the steps and re-masking, side by side.

    python -m tools.compare --n 25
    python -m tools.compare --n 100 --steps 8 32 --variants confidence halton random

Each variant draws the same held-out captions of the world of shapes with the same seeds, without
--best-of. A row shows the share of pictures that are right, for the six tasks and overall, each
with its standard error; `gain`, overall less that of the first variant with as many steps, whose
error is smaller because the captions are the same; and for one picture the passes through the
transformer, with the prompt and with the negative prompt, and seconds.
"""
import argparse
import time
from dataclasses import replace
from functools import partial
from typing import Callable, NamedTuple

import numpy as np
from tqdm import tqdm

import meissonic
import sample
from engine import orders, rerank
from engine.checkpoint import UserError
from engine.cli import (Parser, batch_size, finite, home, number_of_passes, number_of_pictures,
                        number_of_steps, say, script, size)
from engine.jobs import load_pipeline, schedule_of
from shapes import world
from shapes.score import image_matches

STEPS = (4, 8, 16, 32)
COLUMNS = {"variant": 13, "steps": 5, **dict.fromkeys((*world.TASKS, "overall"), 11), "gain": 12,
           "cond": 5, "uncond": 6, "seconds": 7}              # widths in letters


class Variant(NamedTuple):
    """What is changed of plain sampling."""
    order: Callable = meissonic.confidence
    edit_plan: Callable | None = None         # list of Step -> list of Step
    every: int = 1                            # steps from one unconditional pass to the next
    remask: int | None = None                 # passes; None: --remask


VARIANTS = {
    "confidence": Variant(),
    "halton": Variant(order=orders.halton),
    "random": Variant(order=orders.random),
    "unguided": Variant(edit_plan=partial(orders.constant_guidance, scale=1.0)),
    "guided-early": Variant(edit_plan=partial(orders.guidance_between, first=0.0, last=0.5)),
    "guided-middle": Variant(edit_plan=partial(orders.guidance_between, first=0.25, last=0.75)),
    "guided-late": Variant(edit_plan=partial(orders.guidance_between, first=0.5, last=1.0)),
    "growing": Variant(edit_plan=orders.growing_guidance),
    "every-2nd": Variant(every=2),
    "every-4th": Variant(every=4),
    "remask-1": Variant(remask=1),
    "remask-4": Variant(remask=4),
}


@script("tools.compare", out_of_memory=sample.OUT_OF_MEMORY)
def main(argv=None):
    args = parse_arguments(argv)
    numbers, args.steps = args.steps, None                    # None: the Schedule's, not used
    pipe = load_pipeline(args)
    if pipe.one_step:
        raise UserError(f"--model {args.model}: a one-step generator has no order")
    prompts = []
    for task in world.TASKS:
        prompts += world.test_prompts(task, args.n)
    say(row(COLUMNS))
    say(row(["---"] * len(COLUMNS)))
    for steps in numbers:
        first = None
        for name in args.variants:
            right, passes, seconds = run_variant(pipe, args, VARIANTS[name], steps, prompts)
            first = right if first is None else first
            say(row([name, str(steps), *scores(right, first), f"{passes['cond']:.1f}",
                     f"{passes['uncond']:.1f}", f"{seconds:.2f}"]))


def parse_arguments(argv):
    """A few flags of its own; the rest of what sample.py takes has its defaults."""
    parser = Parser("tools.compare", __doc__)
    add = parser.add_argument
    add("--n", type=number_of_pictures, default=25, metavar="N",
        help="captions of each task (default: 25)")
    add("--steps", type=number_of_steps, nargs="+", default=STEPS, metavar="N",
        help="numbers of steps to compare at (default: 4 8 16 32)")
    add("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), metavar="NAME",
        help=f"what to compare, all with the first one: {', '.join(VARIANTS)} (default: all)")
    add("--cfg", type=finite, help="guidance scale (default: the model's)")
    add("--remask", type=number_of_passes, default=0, metavar="N",
        help="re-masking passes of all variants but remask-1 and remask-4 (default: 0)")
    for flag, kind, text in (("--model", home, "see sample.py (default: shapes)"),
                             ("--size", size, "see sample.py"),
                             ("--batch", batch_size, "pictures drawn at a time (default: 16)"),
                             ("--device", str, "see sample.py"), ("--dtype", str, "see sample.py")):
        add(flag, type=kind, help=text)
    parser.set_defaults(model="shapes", batch=16)
    args = parser.parse_args(argv)
    others = sample.make_parser().parse_args([])
    return argparse.Namespace(**vars(others) | vars(args))


def row(cells):
    """One row of a table in Markdown."""
    padded = [f"{cell:{width}}" for cell, width in zip(cells, COLUMNS.values())]
    return f"| {' | '.join(padded)} |"


def scores(right, first):
    """right, of a variant, and `first`, of the one to compare with, (tasks, n) bool -> the text of
    each task, of the mean over tasks, and of its difference."""
    each = [f"{mean:.2f} ± {error:.2f}" for mean, error in map(mean_and_error, right[:, None])]
    mean, error = mean_and_error(right)
    gain, gain_error = mean_and_error(right.astype(float) - first)
    return [*each, f"{mean:.2f} ± {error:.2f}", f"{gain:+.2f} ± {gain_error:.2f}"]


def mean_and_error(values):
    """values (tasks, n) -> the mean over tasks and its standard error. Captions are drawn within
    each task, so the variances of the tasks' means add up."""
    tasks, n = values.shape
    variance = values.var(1, ddof=1) / n if n > 1 else np.full(tasks, np.nan)
    return values.mean(), np.sqrt(variance.sum()) / tasks


def run_variant(pipe, args, variant, steps, prompts):
    """Draw all prompts, (caption, PromptSpec) pairs -> (right (tasks, n) bool, {"cond", "uncond":
    passes for a picture}, seconds for a picture). Seconds are of filling in alone."""
    draw = partial(draw_batch, pipe, args, variant)
    passes, seconds, right = {"cond": 0, "uncond": 0}, 0.0, []
    draw(prompts[:args.batch], range(args.batch), 1, dict(passes))         # warms up: CUDA graphs
    for start in tqdm(range(0, len(prompts), args.batch), leave=False):
        batch = prompts[start:start + args.batch]
        ids, spent = draw(batch, range(start, start + len(batch)), steps, passes)
        seconds += spent
        right += [image_matches(picture, spec)
                  for picture, (_, spec) in zip(pipe.decode(ids), batch)]
    number = len(prompts)
    per_picture = {name: count / number for name, count in passes.items()}
    return np.reshape(right, (len(world.TASKS), -1)), per_picture, seconds / number


def draw_batch(pipe, args, variant, batch, seeds, steps, passes):
    """-> (ids (B, h, w), seconds). Adds to `passes`."""
    cond = pipe.encode([caption for caption, _ in batch], args.size, args.score_condition)
    uncond = pipe.encode([args.negative] * len(batch), args.size, args.score_condition)
    ids = pipe.all_masked(len(batch), args.size)
    plan = plan_of(schedule_of(args, pipe), variant, steps, ids[0].numel())
    pipe.transformer                                          # read it before the time is taken
    start = time.perf_counter()
    conditional = counted(orders.unguided(pipe.transformer, cond, plan), passes, "cond")
    unconditional = counted(orders.unguided(pipe.transformer, uncond, plan), passes, "uncond")
    predict = orders.guided(conditional, unconditional, variant.every)
    unknown = meissonic.masked_positions(ids.flatten(1), pipe.mask_token)              # (B, M)
    seeds = list(seeds)[:len(batch)]
    ids = meissonic.sample(predict, ids, pipe.mask_token, seeds, plan, order=variant.order)
    remask = args.remask if variant.remask is None else variant.remask
    ids = rerank.remask(predict, ids, unknown, pipe.mask_token, seeds, plan, remask)
    ids = ids.cpu().to(ids.device)                            # waits for the device
    return ids, time.perf_counter() - start


def plan_of(schedule, variant, steps, tokens):
    """The Steps that draw all tokens of a picture as the variant has it."""
    plan = replace(schedule, steps=steps).plan(num_masked=tokens, num_tokens=tokens)
    return variant.edit_plan(plan) if variant.edit_plan else plan


def counted(predict, passes, name):
    """A predictor that adds the rows that it evaluates to passes[name]."""
    def count(step, ids, masked):
        passes[name] += len(ids)
        return predict(step, ids, masked)
    return count


if __name__ == "__main__":
    main()
