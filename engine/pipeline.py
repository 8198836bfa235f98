"""The models of one checkpoint folder, from text to pixels.

    pipe = Pipeline("weights/shapes")
    picture, = pipe(["a red circle above a blue square on a white background"], [4])

Text -> CLIP text tower -> transformer that fills in masked ids -> VQ decoder -> pixels.
Letters: B pictures, H W pixels, h w tokens.
"""
import gc
import reprlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import clip
import meissonic
import vq
from engine import fast, rerank
from engine.checkpoint import CheckpointError, UserError, check_value, read_json
from engine.lora import add_terms, parse_lora, read_lora
from engine.quantize import quantize

MAX_TOKENS = rerank.MAX_TOKENS                # of a batch, and of an edit unless told otherwise
NORMS_ON_GPU = 12e9                           # bytes of GPU memory from which adaptive norms fit


# Defaults of scheduler_config.json that are not the schedule's: type, lowest, highest
DEFAULTS = {"size": (int, 1, 2 ** 16), "score_condition": (float, -1e6, 1e6),
            "remask": (int, 0, 1000), "best_of": (int, 1, 1000)}


class Pipeline:
    """Tokenizer, text encoder, transformer and VQ model of a checkpoint folder.

    Everything is checked at once, but each model is read when it is first used. With
    `one_at_a_time` loading one model frees the others, and encoded prompts are kept.

    Attributes: text_encoder, transformer, vq; mask_token; f, pixels per token along a side;
    multiple, which sizes must be multiples of; one_step, whether it is a one-step generator; and
    the checkpoint's defaults schedule (a meissonic.Schedule or OneStep), size (width, height),
    score, remask, best_of.
    """

    def __init__(self, folder, device="cpu", dtype=torch.float32, lora=None, quantize=None,
                 compile=False, text_encoder=None, transformer=None, schedule=None):
        """lora: FILE or FILE:SCALE of low-rank terms to merge. quantize: torch.int8 or
        float8_e4m3fn for the blocks' weights. compile: torch.compile the blocks, once for each
        batch size. text_encoder: folder of another text encoder than the checkpoint's, for example
        of a whole CLIP model; the tokenizer stays. transformer, schedule: folder of a one-step
        generator in place of the checkpoint's transformer, and its OneStep. Raises CheckpointError
        that names the part at fault."""
        self.folder, self.device, self.dtype = Path(folder), torch.device(device), dtype
        self.quantize, self.compile = quantize, compile
        self.one_at_a_time, self.prompt_cache = False, {}
        if not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        self.folders = {"transformer": Path(transformer or self.folder / "transformer"),
                        "vqvae": self.folder / "vqvae",
                        "text_encoder": Path(text_encoder or self.folder / "text_encoder")}
        self.tokenizer = clip.Tokenizer.from_pretrained(self.folder / "tokenizer")
        load = lambda model, part: model.from_pretrained(self.folders[part], dtype, "meta").config
        text = load(clip.TextEncoder, "text_encoder")
        plain = meissonic.Transformer.from_pretrained(self.folders["transformer"], dtype, "meta")
        self.lora_terms = read_lora(plain, *parse_lora(str(lora))) if lora else []
        pixels = load(vq.VQModel, "vqvae")
        for part, name in (("transformer", "transformer"), ("text_encoder", "text encoder")):
            if self.folders[part] != self.folder / part:
                folder = f"{folder} with the {name} {self.folders[part]}"
        check_parts(folder, self.tokenizer, text, plain.config, pixels)
        self.mask_token = plain.config.mask_token
        self.f, self.multiple = pixels.f, pixels.f * plain.config.compression
        scheduler = self.folder / "scheduler"
        many_steps = meissonic.Schedule.from_pretrained(scheduler)
        one_step = schedule or meissonic.OneStep.from_pretrained(scheduler)
        self.schedule = one_step or many_steps
        self.one_step = one_step is not None
        self.set_defaults(scheduler / "scheduler_config.json",
                          1024 if plain.config.downsample else 512)

    def set_defaults(self, path, size):
        raw = read_json(path)
        if raw.get("mask_token_id", self.mask_token) != self.mask_token:
            raise CheckpointError(f"{path}: mask_token_id {reprlib.repr(raw['mask_token_id'])} is "
                                  "not the transformer's last token")
        published = {"size": size, "score_condition": 6.0, "remask": 0, "best_of": 1}
        own = raw.get("defaults", {})
        defaults = published | own
        known = {*DEFAULTS, "steps", "cfg", "temperature"}          # three are the schedule's
        if self.one_step:
            known = {"size", "score_condition"}
        unknown = own.keys() - known
        if unknown:
            raise CheckpointError(f"{path}: defaults: unknown key {reprlib.repr(min(unknown))}")
        for key, bounds in DEFAULTS.items():
            try:
                check_value(key, defaults[key], *bounds)
            except CheckpointError as e:
                raise CheckpointError(f"{path}: defaults: {e}") from None
        self.size = defaults["size"], defaults["size"]
        self.score = defaults["score_condition"]
        self.remask = defaults["remask"]
        self.best_of = defaults["best_of"]

    @cached_property
    def text_encoder(self):
        self.make_room()
        return clip.TextEncoder.from_pretrained(self.folders["text_encoder"], self.dtype,
                                                self.device)

    @cached_property
    def transformer(self):
        self.make_room()
        device = "cpu" if self.quantize else self.device
        host = fast.ADAPTIVE_NORMS if self.norms_on_host() else ()
        model = meissonic.Transformer.from_pretrained(self.folders["transformer"], self.dtype,
                                                      device, host)
        add_terms(model, self.lora_terms)
        if self.quantize:
            quantize(model, self.quantize, self.device, self.norms_on_host())
        if self.compile:
            for block in model.blocks:
                block.forward_modulated = torch.compile(block.forward_modulated, dynamic=False)
        return model

    @cached_property
    def vq(self):                                 # NOTE the published decoder overflows in float16
        self.make_room()
        dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        return vq.VQModel.from_pretrained(self.folders["vqvae"], dtype, self.device)

    def norms_on_host(self):
        """Whether the adaptive norms, read once per picture, are kept out of GPU memory."""
        if self.device.type != "cuda":
            return False
        return torch.cuda.get_device_properties(self.device).total_memory < NORMS_ON_GPU

    def make_room(self):
        if self.one_at_a_time:
            self.release("text_encoder", "transformer", "vq")

    def release(self, *parts):
        """Drop some of text_encoder, transformer and vq. The next use reads them again."""
        for part in parts:
            self.__dict__.pop(part, None)
        if self.device.type == "cuda":
            gc.collect()                          # compiled blocks are in reference cycles
            torch.cuda.empty_cache()

    def check_size(self, width, height):
        """Raises UserError, with the nearest size that fits, unless the grid takes these pixels."""
        if width < 1 or height < 1 or width % self.multiple or height % self.multiple:
            m = self.multiple
            near = [max(m, round(side / m) * m) for side in (width, height)]
            raise UserError(f"size {width}x{height} does not fit: width and height must be "
                            f"positive multiples of {m}, for example {near[0]}x{near[1]}")

    def nearest_size(self, width, height):
        """The size at which a picture of these pixels is edited: the nearest that the grid takes,
        of about MAX_TOKENS tokens at most -> (width, height)."""
        shrink = min(1, (MAX_TOKENS * self.f ** 2 / (width * height)) ** 0.5)
        m = self.multiple
        sides = [max(m, round(side * shrink / m) * m) for side in (width, height)]
        longest = round(MAX_TOKENS * self.f ** 2 / min(sides) / m) * m     # of a thin picture
        return tuple(min(side, longest) for side in sides)

    # The four steps: encode, all_masked (or engine/edit.py), fill_in, decode

    @torch.no_grad()
    def encode(self, prompts, size, score, warn=True):
        """list of str, (width, height), score -> Conditioning of len(prompts) rows. Prompts are
        encoded one by one: batching changes rounding. warn: say which prompts are cut."""
        cache = self.prompt_cache if self.one_at_a_time else {}
        for prompt in prompts:
            if prompt not in cache:
                cache[prompt] = self.text_encoder(
                    self.tokenizer([prompt], warn).to(self.device))
        hidden = torch.cat([cache[prompt][0] for prompt in prompts])                # (B, L, D)
        pooled = torch.cat([cache[prompt][1] for prompt in prompts])                   # (B, C)
        micro = torch.tensor([[*size, 0, 0, score]], device=self.device, dtype=torch.float32)
        return meissonic.Conditioning(hidden, pooled, micro.expand(len(prompts), 5))

    def encode_ablated(self, prompts, size, score):
        """The prompts with one word left out in turn, for best_of -> list of Conditionings."""
        return [self.encode(texts, size, score, warn=False)
                for texts in rerank.ablated_prompts(prompts)]

    def all_masked(self, batch, size):
        """-> ids (B, h, w) of a picture of which nothing is known."""
        width, height = size
        self.check_size(width, height)
        shape = batch, height // self.f, width // self.f
        return torch.full(shape, self.mask_token, device=self.device)

    def fill_in(self, ids, cond, uncond, seeds, schedule, remask=0, best_of=1, ablated=(),
                watch=None):
        """Draw the ids (B, h, w) that are mask_token -> ids. remask: passes that draw a quarter of
        them again. best_of: candidates, of which the best is kept; `ablated` of encode_ablated
        scores them. watch: as in meissonic.sample, called for every batch of candidates.
        Raises UserError if the logits are NaN, or for what a one-step generator cannot do."""
        if isinstance(schedule, meissonic.OneStep):
            if remask or best_of > 1:
                raise UserError("a one-step generator has no remask and no best_of")
            return self.draw_in_one_step(ids, cond, seeds, schedule, watch)

        def fill(ids, cond, uncond, seeds):
            unknown = meissonic.masked_positions(ids.flatten(1), self.mask_token)
            plan = schedule.plan(unknown.shape[1], ids[0].numel())
            predictor = fast.predictor(self.transformer, cond, uncond, plan)
            sums = []              # if one logit of a position is NaN, all are: one is enough

            def predict(*inputs):
                logits = predictor(*inputs)                                         # (B, M, V)
                sums.append(logits[..., 0].sum(dtype=torch.float32))
                return logits

            ids = meissonic.sample(predict, ids, self.mask_token, seeds, plan, watch)
            ids = rerank.remask(predict, ids, unknown, self.mask_token, seeds, plan, remask, watch)
            self.check_finite(sums)               # here, so that no step waits for the device
            return ids

        if best_of == 1:
            return fill(ids, cond, uncond, seeds)
        return rerank.best_of(best_of, fill, self.transformer, ids, cond, uncond, seeds, ablated,
                              schedule.rate_condition)

    @torch.no_grad()
    def draw_in_one_step(self, ids, cond, seeds, one_step, watch=None):
        """fill_in of a one-step generator, which draws all ids (B, h, w) -> ids."""
        if (ids != self.mask_token).any():
            raise UserError("a one-step generator draws whole pictures: it cannot keep tokens")
        predictor = fast.one_step_predictor(self.transformer, cond)
        sums = []

        def predict(*inputs):
            logits = predictor(*inputs)                                             # (B, N, V)
            sums.append(logits[..., 0].sum(dtype=torch.float32))                    # as in fill_in
            return logits

        ids = meissonic.sample_one_step(predict, ids, self.transformer.config, seeds, one_step,
                                        watch)
        self.check_finite(sums)
        return ids

    def check_finite(self, sums):
        """Raises UserError if one of a list of scalars on the device is not finite."""
        if not sums or torch.stack(sums).isfinite().all():
            return
        name = str(self.dtype).removeprefix("torch.")
        if self.dtype == torch.float32:
            raise UserError("the logits are NaN, in float32: the weights of the checkpoint or of "
                            "--lora are at fault")
        raise UserError(f"the logits are NaN: {name} does not work on this device or with this "
                        "model; use --dtype float32")

    @torch.no_grad()
    def decode(self, ids):
        """(B, h, w) -> list of RGB Images, decoded one at a time."""
        images = []
        for one in ids.split(1):
            pixels = self.vq.decode(one)[0].float().clamp(0, 1)                     # (3, H, W)
            array = (pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy()    # (H, W, 3)
            images.append(Image.fromarray(array))
        return images

    @torch.no_grad()
    def encode_image(self, image):
        """RGB Image whose sides divide by f -> ids (1, h, w)."""
        pixels = torch.from_numpy(np.array(image)).to(self.device)                  # (H, W, 3)
        return self.vq.encode(pixels.permute(2, 0, 1)[None] / 255)

    @torch.no_grad()
    def draw(self, prompts, seeds, ids=None, negative="", size=None, score=None, schedule=None,
             remask=None, best_of=None, watch=None):
        """A batch of pictures, one for each prompt and seed -> ids (B, h, w). ids: what to start
        from, masked where to draw; None draws everything. What is None is the checkpoint's."""
        size = size or self.size
        score = self.score if score is None else score
        best_of = self.best_of if best_of is None else best_of
        cond = self.encode(prompts, size, score)
        uncond = None if self.one_step else self.encode([negative] * len(prompts), size, score)
        ablated = self.encode_ablated(prompts, size, score) if best_of > 1 else ()
        ids = self.all_masked(len(prompts), size) if ids is None else ids
        remask = self.remask if remask is None else remask
        return self.fill_in(ids, cond, uncond, seeds, schedule or self.schedule, remask, best_of,
                            ablated, watch)

    def __call__(self, *args, **settings):
        """`draw`, decoded -> list of RGB Images."""
        return self.decode(self.draw(*args, **settings))


def check_parts(folder, tokenizer, text, transformer, pixels):
    """Raises CheckpointError where the parts of a model, given as configs, do not fit together."""
    if text.hidden_size != transformer.joint_attention_dim \
            or text.projection_dim != transformer.pooled_projection_dim:
        raise CheckpointError(f"{folder}: text encoder and transformer do not fit each other")
    if max(tokenizer.bpe.get_vocab().values()) >= text.vocab_size \
            or tokenizer.length > text.max_position_embeddings:
        raise CheckpointError(f"{folder}: the tokenizer has more words or positions than the text "
                              "encoder")
    if pixels.num_vq_embeddings != transformer.codebook_size:
        raise CheckpointError(f"{folder}: the VQ model has {pixels.num_vq_embeddings} codes, the "
                              f"transformer {transformer.codebook_size}")
