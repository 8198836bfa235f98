"""How a picture comes to be: a strip and an animation of moments of its sampling.

    python -m tools.film --prompt "a red circle on a white background" --seed 1 --out text.png
    python -m tools.film --image P --mask M --frames 12 --grid
    python -m tools.film --like out/a-star-0.png                  # of a picture made before

Takes the flags of sample.py. Beside each picture NAME.png it writes NAME-film.png and
NAME-film.gif. A frame shows what the model takes every token for, below that the same with the
masked tokens grey, and a bar for the time.
Letters: B pictures, h w tokens, N tokens of a picture, M masked ones.
"""
import numpy as np
import torch
from PIL import Image, ImageDraw

import sample
from engine.checkpoint import UserError, atomic_write
from engine.cli import say, script, whole
from engine.images import save_png, side_by_side
from engine.jobs import prepare
from engine.settings import parse_like

MIN_CELL = 8                                                  # pixels a token has at least
FRAME_MS = 300
LAST_FRAME_MS = 2000


@script("tools.film", out_of_memory=sample.OUT_OF_MEMORY)
def main(argv=None):
    parser = sample.make_parser("tools.film", __doc__)
    parser.add_argument("--frames", type=whole(2, 10_000), default=8, metavar="N",
                        help="moments shown, evenly over the steps (default: 8)")
    parser.add_argument("--grid", action="store_true", help="draw lines between the tokens")
    run = prepare(parser, parse_like(parser, argv))
    steps = run.schedule.steps
    if run.args.frames > steps + 1:
        raise UserError(f"{steps} steps have {steps + 1} moments, --frames asks for "
                        f"{run.args.frames}")
    run.pipe.one_at_a_time = True
    for batch in run.batches():
        ids, moments = record(run, batch)
        png_texts = run.png_texts(batch)
        paths = sample.save_pictures(run, batch, ids, png_texts)
        for place, path in enumerate(paths):
            if path:
                of_picture = [(ids[place], masked[place]) for ids, masked in moments]
                write_film(path, film(run, of_picture), png_texts[place])


def record(run, batch):
    """Fill in a batch -> (ids (B, h, w), moments): (ids with a draw for each masked token, masked
    bool), both (B, h, w), of each step and of the end, which is repeated for idle steps."""
    calls = []

    def watch(n, ids, masked, logits):
        unknown = torch.zeros_like(ids.flatten(1), dtype=torch.bool)                  # (B, N)
        calls.append((ids, unknown.scatter(1, masked, True).view(ids.shape)))

    text = sample.encode(run, batch)
    start = sample.starting_ids(run, batch)
    ids = sample.fill_in(run, batch, start, text, watch)
    moments = of_kept_candidates(calls, ids, run.count_steps(start)[1])
    end = (ids, torch.zeros_like(ids, dtype=torch.bool))
    moments += [end] * max(1, run.schedule.steps + 1 - len(moments))
    return ids, moments


def of_kept_candidates(calls, ids, steps):
    """Calls (ids, masked) of all candidates, batch by batch -> [(ids, masked)] of those that were
    kept, both (B, h, w), for each step."""
    moments = []
    for step in range(steps):
        at_step = calls[step::steps]                          # of each batch of candidates
        moments.append([torch.cat(parts) for parts in zip(*at_step)])         # (B K, h, w) each
    if not moments:
        return []
    drawn = moments[-1][0].unflatten(0, (len(ids), -1))                       # (B, K, h, w)
    equal = (drawn == ids[:, None]).flatten(2).all(-1)                        # (B, K)
    kept = torch.arange(len(ids), device=ids.device) * equal.shape[1] + equal.int().argmax(1)
    return [(drawn[kept], masked[kept]) for drawn, masked in moments]


def film(run, moments):
    """[(ids (h, w), masked (h, w))] -> --frames Images, evenly over the moments."""
    number = run.args.frames
    frames = []
    for k in range(number):
        ids, masked = moments[round(k * (len(moments) - 1) / (number - 1))]
        frames.append(draw_frame(run.pipe, ids, masked, (k + 1) / number, run.args.grid))
    return frames


def draw_frame(pipe, ids, masked, time, grid):
    """ids (h, w), masked (h, w) bool, time from 0 to 1 -> RGB Image."""
    h, w = masked.shape
    cell = pipe.f * -(-MIN_CELL // pipe.f)                    # a multiple of f, at least MIN_CELL
    size = (w * cell, h * cell)
    believed = pipe.decode(ids[None])[0].resize(size, Image.Resampling.NEAREST)
    veil = Image.fromarray(masked.cpu().numpy().astype(np.uint8) * 255)
    veil = veil.resize(size, Image.Resampling.NEAREST)
    known = Image.composite(Image.new("RGB", size, "grey"), believed, veil)
    if grid:
        draw_grid(known, cell)
    width, height = size
    frame = Image.new("RGB", (width, 2 * height + 8), "white")
    frame.paste(believed, (0, 0))
    frame.paste(known, (0, height + 2))
    frame.paste("black", (0, 2 * height + 4, round(width * time), 2 * height + 8))
    return frame


def draw_grid(image, cell):
    """Black lines between cells of so many pixels, in place."""
    pen = ImageDraw.Draw(image)
    for x in range(cell, image.width, cell):
        pen.line((x, 0, x, image.height), "black")
    for y in range(cell, image.height, cell):
        pen.line((0, y, image.width, y), "black")


def write_film(path, frames, text):
    """Write the strip and the animation beside the picture at `path`."""
    strip = path.with_name(f"{path.stem}-film.png")
    save_png(strip, side_by_side(frames), text)
    say(f"wrote {strip}")
    animation = path.with_name(f"{path.stem}-film.gif")
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    atomic_write(animation, lambda temporary: frames[0].save(
        temporary, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0))
    say(f"wrote {animation}")


if __name__ == "__main__":
    main()
