"""A run's folder as a model folder: what --init brings, what a stage finds there, what it leaves.

    copy_init(run)                                        # the parts of --init
    model = load_part(run.out / "transformer", meissonic.Transformer)         # None: not there
    save_model(run, recipe, model, state, {"size": 64, "steps": 16, "cfg": 3.0})

Parts: tokenizer, vqvae, text_encoder, transformer, scheduler.
"""
import filecmp
import shutil
from functools import partial

import clip
import meissonic
import vq
from engine import resume
from engine.checkpoint import UserError, remove_prefix, write_folder, write_json
from engine.cli import note
from engine.data import DEFAULT_SCORE
from engine.lora import save_lora
from engine.pipeline import check_parts
from engine.task import save_half

PARTS = ("tokenizer", "vqvae", "text_encoder", "transformer", "scheduler")
MADE_BY = {"tokenizer": "tokenizer", "text": "text_encoder", "vq": "vqvae"}   # stage -> its part
MODELS = {"vqvae": vq.VQModel, "text_encoder": clip.TextEncoder,
          "transformer": meissonic.Transformer}
PER_RUN = {"downsample", "upsample", "vocab_size", "eos_token_id"}            # not of a preset


# --------------------------------------------------------------------------------------------------
# --init


def copy_init(run, wanted=PARTS):
    """Copy the parts of --init into the run's folder, each whole or not at all. With --resume only
    the missing ones. Raises UserError if the folder holds other parts, or if a text encoder comes
    without its tokenizer."""
    if run.init and run.is_main and not run.init.samefile(run.out):
        parts = [part for part in wanted if init_folder(run, part).is_dir()]
        if "text_encoder" in parts and "tokenizer" not in parts:
            raise UserError(f"--init {run.init}: the text encoder's tokenizer is not there")
        there = [part for part in parts if (run.out / part).is_dir()]
        for part in there:
            if not run.resume and not same_files(init_folder(run, part), run.out / part):
                raise UserError(f"--out {run.out} holds another {part}: --resume goes on with it, "
                                "another folder is for another model")
        for part in parts:
            if part not in there:
                check_part(init_folder(run, part), part)
                write_folder(run.out / part, partial(copy_files, init_folder(run, part)), ["*"])
    run.barrier()


def check_part(folder, part):
    """Raises CheckpointError, which names what is missing or wrong, before anything is copied."""
    if part == "tokenizer":
        clip.Tokenizer.from_pretrained(folder)
    elif part == "scheduler":
        meissonic.Schedule.from_pretrained(folder)
    else:
        MODELS[part].from_pretrained(folder, device="meta")


def copy_files(source, folder):
    """Copy the files of a part, not their modes: network shares may refuse them."""
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def init_folder(run, part):
    """Where --init has a part. --text-encoder may name another model's text encoder."""
    if part == "text_encoder" and run.init_text_encoder:
        return run.init_text_encoder
    return run.init / part


def same_files(a, b):
    """Whether two folders hold the same files."""
    names = sorted(path.name for path in a.iterdir() if path.is_file())
    others = sorted(path.name for path in b.iterdir() if path.is_file())
    return names == others and filecmp.cmpfiles(a, b, names)[0] == names


def report_sizes(run, configs):
    """Say on stderr where the models in the run's folder are not of the preset's sizes: they keep
    their own. configs: an entry of train.MODELS."""
    kinds = {"vqvae": (vq.Config, "vq"), "text_encoder": (clip.Config, "text"),
             "transformer": (meissonic.Config, "transformer")}
    for part, (kind, name) in kinds.items():
        path = run.out / part / "config.json"
        if path.is_file() and run.is_main:
            found = vars(kind.from_json(path))
            wanted = vars(kind(**configs[name]))
            sizes = [f"{key} {found[key]}, not {wanted[key]}" for key in wanted
                     if key not in PER_RUN and found[key] != wanted[key]]
            if sizes:
                note(f"note: the {part} in {run.out} keeps its sizes, not those of preset "
                     f"{run.preset}: {'; '.join(sizes)}")


# --------------------------------------------------------------------------------------------------
# What a stage finds


def check_stages(run, stages):
    """Raises UserError for what a stage would find missing only after those before it."""
    has_text = (run.out / "text_encoder").is_dir()
    for stage in stages:
        settings = run.stages.get(stage, {})
        run.rank_slice(range(settings.get("batch", 0)))
        if not has_text and not settings.get("text_lr", stage != "one-step"):
            hint = "begin with --stage text, or " if "text" in run.stages else ""
            raise UserError(f"{run.out / 'text_encoder'}: not there, and stage {stage} does not "
                            f"train it: {hint}--init a model that has one")
        has_text = has_text or stage not in ("tokenizer", "vq")
        if stage.isdigit() and is_one_step(run.out):
            raise UserError(f"--out {run.out} holds a one-step generator: stage {stage} trains a "
                            "model of many steps")
    if "one-step" in stages and not (run.out / "transformer").is_dir():
        raise UserError(f"stage one-step starts from a model: {run.out / 'transformer'} is not "
                        "there; --init says which")
    if run.lora and not (run.out / "transformer").is_dir():
        raise UserError(f"--lora trains terms of a model: {run.out / 'transformer'} is not there; "
                        "--init says which")


def is_one_step(folder):
    """Whether a model folder says that it holds a one-step generator."""
    scheduler = folder / "scheduler"
    has_config = (scheduler / "scheduler_config.json").is_file()
    return has_config and meissonic.OneStep.from_pretrained(scheduler) is not None


def is_finished(run, stage, encode_only):
    """Whether a stage has nothing to do: --init brought its part, now or in an earlier call; its
    part is there and only the pictures are to be encoded; or with --resume its last checkpoint is
    the end. (Later stages may have changed the model since.)"""
    part = MADE_BY.get(stage)
    if part and run.init and init_folder(run, part).is_dir():
        if stage in run.stages and run.is_main:
            note(f"note: stage {stage} is left out, as --init has a {part}")
        return True
    made = part and (run.out / part).is_dir()
    trained = resume.checkpoints(run.out, stage)  # none: a tokenizer, or what --init brought
    done = resume.steps_done(run, stage) if run.resume else 0
    run.barrier()                                 # until all processes have looked
    if made and (not trained if run.resume else encode_only):
        return True
    if encode_only and part != "vqvae":
        return stage == "text"
    return stage != "tokenizer" and done >= run.stages[stage]["steps"]


def load_part(folder, kind):
    """A Pretrained to be trained, or None if the folder holds none."""
    if not folder.is_dir():
        return None
    return kind.from_pretrained(folder).train().requires_grad_(True)


def check_fit(run, model):
    """Raises CheckpointError if the model does not fit the run's tokenizer and VQ model."""
    tokenizer = clip.Tokenizer.from_pretrained(run.out / "tokenizer")
    pixels = vq.VQModel.from_pretrained(run.out / "vqvae", device="meta").config
    check_parts(run.out, tokenizer, model.text_encoder.config, model.transformer.config, pixels)


def rate_condition_of(folder):
    """How training tells the model in a folder the masking rate, see meissonic.RATE_CONDITIONS. The
    public weights are sampled with the step, and were trained with 1000 times the rate."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return "rate"
    convention = meissonic.Schedule.from_pretrained(path.parent).rate_condition
    return "rate1000" if convention == "step" else convention


# --------------------------------------------------------------------------------------------------
# What a stage leaves


def save_model(run, recipe, model, state, sampling):
    """Write what was trained of a MaskedImageModel, given its averaged state_dict: the low-rank
    terms, or the models in the published layout. sampling: defaults of the scheduler's config."""
    transformer_state = remove_prefix(state, "transformer.")
    if run.lora:
        save_lora(run.out / "lora.safetensors", model.transformer, transformer_state)
        return
    plain_state = recipe.plain_state(model.transformer, transformer_state)
    save_half(run.out / "transformer", model.transformer, plain_state)
    if any(p.requires_grad for p in model.text_encoder.parameters()):
        text_state = remove_prefix(state, "text_encoder.")
        save_half(run.out / "text_encoder", model.text_encoder, text_state)
    save_scheduler(run, model.transformer, sampling)


def save_scheduler(run, transformer, sampling, **more):
    """Write scheduler_config.json and model_index.json. sampling: its defaults."""
    scheduler = {"_class_name": "Scheduler", "_diffusers_version": "0.30.2",
                 "masking_schedule": "cosine", "mask_token_id": transformer.config.mask_token,
                 "rate_condition": rate_condition_of(run.out), **more,
                 "defaults": {"score_condition": DEFAULT_SCORE, **sampling}}
    (run.out / "scheduler").mkdir(exist_ok=True)
    write_json(run.out / "model_index.json", MODEL_INDEX)
    write_json(run.out / "scheduler" / "scheduler_config.json", scheduler)


MODEL_INDEX = {
    "_class_name": "Pipeline", "_diffusers_version": "0.30.2",
    "scheduler": ["scheduler", "Scheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["transformer", "Transformer2DModel"],
    "vqvae": ["diffusers", "VQModel"]}
