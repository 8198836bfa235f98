"""Text to image with a masked generative transformer: Meissonic (arXiv 2410.08261).

    python sample.py --prompt "a red circle above a blue square on a white background"
    python sample.py --model meissonic --prompt "a lighthouse in a storm, oil painting"   # 1024 px
    python sample.py --model dimo --prompt "a lighthouse in a storm"      # the same in one step
    python sample.py --prompt "a star" "a heart" --n 4 --seed 7 --steps 32 --cfg 5 --out pictures
    python sample.py --image P --mask M --prompt "a star"         # redraw where M is white
    python sample.py --image P --outpaint 0,0,256,0               # a canvas 256 pixels wider
    python sample.py --image P --prompt "a blue star" --source "a red star"  # where they differ
    python sample.py --like out/a-star-0.png --cfg 5              # as before, one setting changed

`main` shows the four steps from text to pixels; engine/pipeline.py has the models behind them.
tools/ has what else can be done with the same flags: films, sweeps, scores, reconstruction.
Letters: B pictures of a batch, h w tokens.
"""
from pathlib import Path

from engine.cli import (Parser, batch_size, feather, finite, home, margins, number_of_candidates,
                        number_of_passes, number_of_pictures, number_of_steps, path, say, script,
                        seed, share, size)
from engine.hub import QUANTIZED
from engine.images import save_png
from engine.jobs import DEFAULT_PROMPT, prepare
from engine.settings import parse_like
from meissonic import MASK_SCHEDULES

TURN = 32                                 # pictures that are filled in before they are decoded
OUT_OF_MEMORY = ("lower --size, --batch, --n, or --best-of if it is above 1, or use --dtype "
                 "bfloat16")


def make_parser(prog="sample.py", description=__doc__):
    """The flags of sample.py, which the tools take too."""
    p = Parser(prog=prog, description=description)
    add = p.add_argument
    add("--prompt", nargs="+", metavar="TEXT",
        help=f'one or more; "" is allowed (default: "{DEFAULT_PROMPT}")')
    add("--prompt-file", type=path, metavar="FILE", help="more prompts, one a line, UTF-8")
    add("--negative", metavar="TEXT",
        help="the prompt that guidance steers away from (default: the model's; for meissonic and "
             'monetico the official list of quality words, else "", which means none)')
    add("--n", type=number_of_pictures, default=1,
        help="pictures for each prompt, with seeds SEED, SEED + 1, ... (default: 1)")
    add("--seed", type=seed, default=0,
        help="the same seed gives the same picture; -1 draws one (default: 0)")
    add("--size", type=size, metavar="N|WxH",
        help="pixels (default: the model's; 1024 for meissonic, 256 for shapes)")
    add("--out", type=path, default=Path("out"), metavar="PATH",
        help="a .png file for one picture, else a folder, where no file is replaced (default: out)")
    add("--like", type=path, metavar="FILE.png",
        help="use the settings that are stored in a PNG of this program; other flags override them")

    add = p.add_argument_group("sampling").add_argument
    add("--steps", type=number_of_steps,
        help="sampling steps (default: the model's; 48 for meissonic, 24 for shapes)")
    add("--cfg", type=finite,
        help="guidance scale, 1 is none (default: the model's; 9 for meissonic, 1.5 for shapes)")
    add("--temperature", type=finite, nargs="+", metavar=("A", "B"),
        help="of the noise on the confidences, at the first and the last step; one number, that of "
             "the draw, for a one-step generator (default: the model's; 2 0 for meissonic, 4 0 for "
             "shapes, 1 for dimo)")
    add("--schedule", choices=tuple(MASK_SCHEDULES),
        help="how the number of masked tokens falls over the steps (default: the model's, cosine)")
    add("--remask", type=number_of_passes, metavar="N",
        help="passes that mask a random quarter of the finished tokens and draw them again "
             "(default: the model's; 0 for meissonic, 2 for shapes)")
    add("--best-of", type=number_of_candidates, metavar="N",
        help="candidates drawn for each picture; the one that fits its prompt best is kept "
             "(default: the model's, 1)")
    add("--score-condition", type=finite,
        help="aesthetic score to ask for (default: the model's, 6)")

    add = p.add_argument_group("model and device").add_argument
    add("--model", type=home, default="auto",
        help="shapes, meissonic, monetico, dimo (Meissonic in one step), a hub id or a folder "
             "(default: auto: meissonic where there is a CUDA GPU and the weights can be "
             "downloaded, else shapes)")
    add("--text-encoder", type=home, metavar="NAME",
        help="own (the model's), laion (the original CLIP tower), a folder or a hub id; the "
             "tokenizer stays the model's (default: laion for meissonic, as in the official "
             "program, else own)")
    add("--lora", type=home, metavar="FILE[:SCALE]",
        help="low-rank terms to merge, from train.py --lora, PEFT, diffusers or kohya, and their "
             "strength (default: 1)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    add("--dtype", choices=("float32", "bfloat16", "float16", *QUANTIZED),
        help="of weights and arithmetic; int8 and fp8 quantize the transformer's blocks (default: "
             "bfloat16 where the device multiplies it, else float16 on CUDA and float32 on a CPU)")
    add("--compile", action="store_true",
        help="torch.compile the transformer's blocks: takes half a minute, pays for many pictures "
             "(on a CPU it needs a C++ compiler)")
    add("--batch", type=batch_size,
        help="pictures made at a time (default: as many as 4096 tokens hold, at most 16)")

    add = p.add_argument_group(
        "editing", "The result has the size of --image; --size is the one at which the model "
        "works (default: the nearest that it takes).").add_argument
    add("--image", type=path, metavar="P",
        help="the picture to edit; with --prompt alone, the tokens are redrawn whose likelihood "
             "falls most under the prompt")
    add("--mask", type=path, metavar="M",
        help="a picture of any size, stretched to that of --image: white is redrawn")
    add("--invert-mask", action="store_true", help="black in M is redrawn, not white")
    add("--outpaint", type=margins, metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="pixels to add on each side")
    add("--feather", type=feather, default=0, metavar="PX",
        help="pixels inside the mask's edge over which old turns to new (default: 0, a hard edge)")
    add("--strength", type=share, metavar="S",
        help="share of tokens redrawn, 0 to 1: random ones, or with --source where the captions "
             "differ (default there: as many as differ)")
    add("--source", metavar="OLD", help="caption of --image as it is (default: the empty one)")
    return p


@script("sample.py", out_of_memory=OUT_OF_MEMORY)
def main(argv=None):
    parser = make_parser()
    run = prepare(parser, parse_like(parser, argv))
    run.pipe.one_at_a_time = True                         # each model is alone in memory
    for turn in in_turns(run.batches()):                  # and is read once a turn
        run.pipe.prompt_cache.clear()
        texts = [encode(run, batch) for batch in turn]                        # 1. text
        filled = []
        try:
            for batch, text in zip(turn, texts):
                ids = starting_ids(run, batch)                                # 2. what is unknown
                with run.progress_bar(batch, ids) as bar:
                    watch = lambda *_: bar.update()
                    ids = fill_in(run, batch, ids, text, watch)               # 3. fill in
                filled.append((batch, ids, run.png_texts(batch)))
        finally:                                          # after Ctrl-C, too
            for batch, ids, png_texts in filled:
                save_pictures(run, batch, ids, png_texts)                     # 4. pixels


def encode(run, batch):
    """Hidden states of a batch's texts -> Conditionings: of the prompts, of the negative prompt,
    and for --best-of of the prompts with one word left out in turn, see engine/rerank.py."""
    size = run.size
    score = run.args.score_condition
    prompts = [job.prompt for job in batch]
    cond = run.pipe.encode(prompts, size, score)
    uncond = None                                             # a one-step generator has no guidance
    if not run.pipe.one_step:
        uncond = run.pipe.encode([run.args.negative] * len(batch), size, score)
    ablated = run.pipe.encode_ablated(prompts, size, score) if run.args.best_of > 1 else []
    if run.edit and run.edit.source is not None:
        run.pipe.encode([run.edit.source], size, score)           # cached for starting_ids
    return cond, uncond, ablated


def starting_ids(run, batch):
    """-> ids (B, h, w), mask_token where unknown: everywhere, or where the edit redraws."""
    if run.edit is None:
        return run.pipe.all_masked(len(batch), run.size)
    prompts = [job.prompt for job in batch]
    seeds = [job.seed for job in batch]
    return run.edit.start(run.pipe, prompts, seeds, run.size, run.args.score_condition)


def fill_in(run, batch, ids, text, watch=None):
    """Draw the masked tokens in a few steps, see meissonic.sample -> ids (B, h, w)."""
    cond, uncond, ablated = text
    seeds = [job.seed for job in batch]
    return run.pipe.fill_in(ids, cond, uncond, seeds, run.schedule, run.args.remask,
                            run.args.best_of, ablated, watch)


def decode(run, ids):
    """(h, w) -> Image, of the size of --image if there is one."""
    image, = run.pipe.decode(ids[None])
    return run.edit.finish(image) if run.edit else image


def save_pictures(run, batch, ids, png_texts):
    """Decode ids (B, h, w) and write a PNG for each Job that has a path -> their paths, or None."""
    paths = []
    for job, job_ids, text in zip(batch, ids, png_texts):
        paths.append(run.place(job) if job.path else None)
        if job.path:
            save_png(paths[-1], decode(run, job_ids), text)
            say(f"wrote {paths[-1]}")
    return paths


def in_turns(batches):
    """Split a list of batches -> lists of batches of together about TURN pictures."""
    number = max(1, TURN // len(batches[0]))
    return [batches[i:i + number] for i in range(0, len(batches), number)]


if __name__ == "__main__":
    main()
