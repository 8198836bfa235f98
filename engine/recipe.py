"""What --data decides: the pictures, the captions, and what a stage does besides the paper's.

    recipe = FileRecipe(run)                              # pictures with captions, read from files
    dataset = recipe.dataset("1")                         # their tokens, in run.out/tokens/1
    evaluate(run, recipe, "1", step)                      # sheet.png

The methods of FileRecipe that return their input or nothing are for a recipe that does more:
shapes/recipe.py, which helps a tiny model to learn a drawn world.
"""
import math
import zlib

from PIL import Image
from tqdm import tqdm

import clip
import vq
from engine import log
from engine.checkpoint import atomic_write
from engine.data import FileSource, TokenDataset, encode_images, readable
from engine.pipeline import MAX_TOKENS, Pipeline


class FileRecipe:
    """Training on files as the paper does."""

    def __init__(self, run):
        self.run = run

    def source(self, stage):
        """The pictures of a stage, a Source of engine.data."""
        return FileSource(self.run.data, self.run.seed, self.run.stages[stage]["size"])

    def tokenizer_captions(self):
        """Captions to learn byte pairs from."""
        _, captions, _ = readable(self.source("vq"), 2000)
        return captions

    def make_tokenizer(self, length):
        """Learn the tokenizer, for texts of `length` positions."""
        tokenizer = clip.learn_tokenizer(self.tokenizer_captions(), length)
        tokenizer.save_pretrained(self.run.out / "tokenizer")

    def dataset(self, stage):
        """The encoded pictures of a stage, with the interface of engine.data.TokenDataset. Encodes
        those that are not yet."""
        encode_stage(self.run, self.source(stage), stage)
        return TokenDataset(self.run.out / "tokens" / stage)

    def sheet_captions(self, stage, number):
        """The captions of sheet.png."""
        _, captions, _ = readable(self.source(stage), number)
        return list(captions)

    def scores(self, stage, pictures):
        """{name: share of the sheet's pictures that are right}; none without a way to judge."""
        return {}

    def text_task(self, text_encoder):
        """The Task of stage "text"."""
        raise NotImplementedError("captions alone teach nothing: the text encoder learns later")

    def set_codes(self):
        """The set_codes of vq_training.vq_task."""
        return None

    def prepare(self, transformer, fresh):
        """Change a transformer before it is trained, in place. fresh: it has random weights."""

    def plain_state(self, transformer, state):
        """The state_dict of a prepared transformer -> that of a plain one."""
        return state


def encode_stage(run, source, stage):
    """Encode the pictures of a stage that are not encoded yet, see encode_images."""
    tokenizer = clip.Tokenizer.from_pretrained(run.out / "tokenizer")
    vq_model = vq.VQModel.from_pretrained(run.out / "vqvae", device=run.device)
    checksums = []
    for part in ("vqvae", "tokenizer"):
        for path in sorted((run.out / part).iterdir()):
            if path.is_file():
                checksums.append(zlib.crc32(path.read_bytes()))
    about = (f"{run.data}, {len(source)} pictures, seed {run.seed}, {source.size} px, "
             f"{checksums}")
    encode_images(source, run.out / "tokens" / stage, vq_model, tokenizer, about, run)


@log.noted("sheet.png")
def evaluate(run, recipe, stage, step):
    """Draw sheet.png with the model as saved so far, and log its scores -> {name: score}. Training
    waits for it, so it is a handful of pictures, each drawn once: no best of several."""
    lora = run.out / "lora.safetensors" if run.lora else None
    pipe = Pipeline(run.out, run.device, lora=lora)
    pipe.best_of = 1
    captions = recipe.sheet_captions(stage, run.eval_captions)
    pictures = []
    batch = max(1, min(16, MAX_TOKENS * pipe.f ** 2 // math.prod(pipe.size)))
    for first in range(0, len(captions), batch):
        some = captions[first:first + batch]
        pictures += pipe(some, list(range(first, first + len(some))))
    write_sheet(run.out / "sheet.png", pictures)
    scores = {name: round(score, 3) for name, score in recipe.scores(stage, pictures).items()}
    if scores:
        log.append(run.out, stage=stage, step=step, event="scores", **scores)
        text = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
        tqdm.write(f"stage {stage} step {step}: {text}")
    return scores


def write_sheet(path, pictures, columns=6):
    """Write pictures of one size side by side."""
    side = pictures[0].width
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * side, i // columns * side))
    atomic_write(path, lambda temporary: sheet.save(temporary, "PNG"))
