"""A drawing that can be looked into and changed, for tools/page.py.

    drawing = Drawing(run, job, start)
    drawing.draw(show)                                        # calls show() after each step
    drawing.facts(3, position=17)                             # what the model thought of a token
    other = drawing.recode(3, position=17, code=5)            # other.draw_on(show) does the rest

Its numbers are what meissonic.sample tells `watch`, or the same predictor computes them again.
Letters: as in meissonic.py; R candidates (--best-of) that are drawn at a time.
"""
import base64
import copy
import io
from functools import lru_cache
from typing import NamedTuple

import torch

import kernels
import meissonic
import sample
from engine import fast, rerank
from engine.checkpoint import UserError

LIKELY = 5                                                    # codes shown of a token
AROUND = 2                                                    # neighbours decoded with a patch


class Record(NamedTuple):
    """One step of R candidates; of one, once the drawing is done."""
    step: meissonic.Step
    ids: torch.Tensor                                         # (R, h, w) with all that was drawn
    masked: torch.Tensor                                      # (R, M) positions that were drawn
    confidence: torch.Tensor                                  # (R, M) infinite: chosen by the user

    def remasked(self):
        """The positions (R, step.num_masked) that are masked again, as in meissonic.sample."""
        lowest = self.confidence.topk(self.step.num_masked, largest=False, sorted=False).indices
        return self.masked.gather(1, lowest)


class Drawing:
    """One picture: the engine.jobs.Run and Job of its settings, the ids to start from (1, h, w),
    masked where to draw, and a Record of each step. changed: more than the settings decides it."""

    def __init__(self, run, job, start, changed=False):
        self.run, self.job, self.start, self.changed = run, job, start, changed
        self.pipe, self.mask_token = run.pipe, run.pipe.mask_token
        self.ids = start                                      # (1, h, w), the picture so far
        self.seed = job.seed                                  # later that of the kept candidate
        self.records = []
        self.unknown = meissonic.masked_positions(start.flatten(1), self.mask_token)      # (1, M)
        self.plan = run.schedule.plan(self.unknown.shape[1], start.numel())
        self.batches, self.steps = run.count_steps(start) if self.plan else (1, 0)
        self.at_once = max(1, rerank.MAX_TOKENS // start.numel())                   # candidates

    def step(self, n):
        """The n-th Step of Pipeline.fill_in, from 0. Those after the plan are of re-masking."""
        if n < len(self.plan):
            return self.plan[n]
        again, _ = rerank.tail(self.plan, self.unknown.shape[1])
        return again[(n - len(self.plan)) % len(again)]._replace(number=n)

    def draw(self, show):
        """Fill in the start. What show() raises stops it."""
        self.text = sample.encode(self.run, [self.job])
        watch = self.recorder(show)
        try:
            self.ids = sample.fill_in(self.run, [self.job], self.start, self.text, watch)
        except Exception:
            self.changed = True
            raise
        finally:
            self.keep_one()

    def recorder(self, show):
        """-> a `watch` of meissonic.sample that makes Records of all candidates."""
        def watch(n, ids, masked, logits):
            batch, n = divmod(len(self.records), self.steps)
            numbers = range(batch * self.at_once, batch * self.at_once + len(ids))
            seeds = [rerank.candidate_seed(self.seed, k) for k in numbers]
            seeds = torch.tensor(seeds, device=ids.device)                                # (R,)
            step = self.step(n)
            _, log_p = kernels.sample_masked(logits, masked, seeds, step.number)          # (R, M)
            noise = kernels.gumbel_noise(seeds, [step.number], ids[0].numel())[0]         # (R, N)
            noise = noise.gather(1, masked)                                               # (R, M)
            confidence = meissonic.confidence(step, log_p, noise, masked, ids.shape[1:])
            self.records.append(Record(step, ids, masked, confidence))
            show()
        return watch

    def keep_one(self):
        """Keep the Records of the candidate that became the picture. If the drawing was stopped, of
        the first one of the last batch."""
        for batch, first in enumerate(range(0, len(self.records), self.steps)):
            records = self.records[first:first + self.steps]
            equal = (records[-1].ids == self.ids).flatten(1).all(1)                       # (R,)
            r = int(equal.int().argmax())
            if equal[r] or records[-1] is self.records[-1]:
                self.seed = rerank.candidate_seed(self.seed, batch * self.at_once + r)
                self.records = [Record(step, *(part[r:r + 1] for part in parts))
                                for step, *parts in records]
                self.ids = self.records[-1].ids
                return

    def frame(self, n):
        """What the page shows after n steps: the tokens that were drawn last, those that are masked
        then, and what the model takes the picture for."""
        if n == 0:
            drawn, masked = self.unknown[:, :0], self.unknown
            ids = self.start.masked_fill(self.start == self.mask_token, 0)      # the page hides it
        else:
            record = self.records[n - 1]
            drawn, masked, ids = record.masked, record.remasked(), record.ids
        return {"n": n, "drawn": drawn[0].tolist(), "masked": masked[0].tolist(),
                "picture": data_url(sample.decode(self.run, ids[0]))}

    def facts(self, n, position):
        """What the model thought of a token when it was drawn last, up to the n-th step -> dict;
        its step is None if it was not drawn, the entropy is in nats."""
        drawn = [k for k in range(n) if (self.records[k].masked == position).any()]
        if not drawn:
            return {"step": None}
        record = self.records[drawn[-1]]
        here = record.masked[0] == position                                               # (M,)
        code = int(record.ids.flatten()[position])
        p = logits_at(self, drawn[-1])[0, here][0].float().softmax(0)                     # (V,)
        top = p.topk(LIKELY)
        patches = decode_patches(self.pipe, record.ids[0], position, top.indices)
        likely = zip(top.indices.tolist(), top.values.tolist(), patches)
        return {"step": drawn[-1] + 1, "code": code, "p": float(p[code]),
                "entropy": float(torch.special.entr(p).sum()),
                "confidence": float(record.confidence[0, here].clamp(max=1e9)),
                "settled": not (record.remasked() == position).any(),
                "likely": [{"code": c, "p": p, "patch": data_url(patch)} for c, p, patch in likely]}

    def recode(self, n, position, code):
        """-> this drawing up to the n-th step, in which a token gets another code and stays."""
        old = self.records[n - 1]
        here = old.masked == position                                                     # (1, M)
        if not here.any():
            raise UserError("this token was not drawn in this step")
        new = copy.copy(self)
        new.ids = old.ids.flatten(1).index_fill(1, old.masked[here], code).view_as(old.ids)
        confidence = old.confidence.masked_fill(here, torch.inf)
        chosen = old._replace(ids=new.ids, confidence=confidence)
        new.records = [*self.records[:n - 1], chosen]
        new.changed, new.batches = True, 1
        if n <= len(self.plan):                               # no re-masking pass draws it again
            new.unknown = self.unknown[self.unknown != position][None]                  # (1, M-1)
            again, _ = rerank.tail(self.plan, new.unknown.shape[1])
            new.steps = len(self.plan) + self.run.args.remask * len(again)
        else:
            ends = [k for k in range(1, self.steps + 1) if self.step(k - 1).num_masked == 0]
            new.steps = min(k for k in ends if k >= n)
        return new

    def draw_on(self, show):
        """After recode: the steps that are left. NOTE A re-masking pass is the last one then, as
        rerank.remask begins with the first."""
        n = len(self.records)
        in_plan = n <= len(self.plan)
        left = [self.step(k) for k in range(n, len(self.plan) if in_plan else self.steps)]
        passes = self.run.args.remask if in_plan else 0
        ids = self.ids.flatten(1).scatter(1, self.records[-1].remasked(), self.mask_token)
        settings = self.mask_token, [self.seed]
        predict, watch = predictor(self), self.recorder(show)
        try:
            ids = meissonic.sample(predict, ids.view_as(self.ids), *settings, left, watch)
            rerank.remask(predict, ids, self.unknown, *settings, self.plan, passes, watch)
        finally:
            self.ids = self.records[-1].ids


@lru_cache(maxsize=1)                                         # large, for a large model
def predictor(drawing):
    cond, uncond, _ = drawing.text
    return fast.predictor(drawing.pipe.transformer, cond, uncond, drawing.plan)


@lru_cache(maxsize=1)
@torch.no_grad()
def logits_at(drawing, k):
    """The logits (1, M, V) of the k-th Record, computed again."""
    step, ids, masked, _ = drawing.records[k]
    before = ids.flatten(1).scatter(1, masked, drawing.mask_token).view_as(ids)
    return predictor(drawing)(step, before, masked)


def decode_patches(pipe, ids, position, codes):
    """The pixels of a token for each of some codes (K,), among its neighbours in ids (h, w)
    -> list of Images."""
    row, column = divmod(position, ids.shape[1])
    top, left = max(0, row - AROUND), max(0, column - AROUND)
    window = ids[top:row + AROUND + 1, left:column + AROUND + 1].repeat(len(codes), 1, 1)
    window[:, row - top, column - left] = codes                           # (K, 5, 5) or less
    x, y = pipe.f * (column - left), pipe.f * (row - top)
    return [image.crop((x, y, x + pipe.f, y + pipe.f)) for image in pipe.decode(window)]


def data_url(image):
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
