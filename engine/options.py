"""The command line of train.py: its flags, the stages they ask for, and the run they describe.

    args = parse_arguments(PRESETS, STAGES, description, ["--preset", "tiny", "--out", "runs/a"])
    run = open_run(args, PRESETS)
"""
from pathlib import Path

import torch

from engine import hub
from engine.checkpoint import UserError
from engine.cli import Parser, finite, home, natural, note, path, positive, say
from engine.data import ImageFiles
from engine.distributed import Run, own_device

TEXT_LR = 0.3                                     # see chosen_stages


def parse_arguments(presets, stages, description, argv=None, name="train.py"):
    """Read the flags. Errors end the program with one line."""
    p = Parser(prog=name, description=description)
    p.add_argument("--out", type=path, metavar="FOLDER",
                   help="folder of the run (default: runs/PRESET)")
    p.add_argument("--preset", choices=presets,
                   help="set of stages and sizes (default: small on a GPU, else tiny)")
    p.add_argument("--stage", choices=stages, help="one stage (default: all, in turn)")
    p.add_argument("--resume", action="store_true",
                   help="go on from the run's checkpoints; finished stages are kept")
    p.add_argument("--init", type=home, metavar="MODEL",
                   help="start from the parts that this model has: a folder, meissonic, monetico "
                        "or a hub id; its tokenizer and VQ model are kept")
    p.add_argument("--text-encoder", type=home, metavar="NAME",
                   help="in place of that of --init: own, laion, a folder or a hub id (default: as "
                        "in sample.py)")
    p.add_argument("--data", type=home, default="shapes", metavar="SOURCE",
                   help="shapes; a folder of pictures with NAME.txt or metadata.jsonl; a .tar, a "
                        "folder or a pattern of WebDataset shards, such as 'x/{000..003}.tar' "
                        "(default: %(default)s)")
    p.add_argument("--encode", action="store_true",
                   help="encode the picture files and stop (training does it if need be)")
    p.add_argument("--seed", type=natural, default=0,
                   help="of every random choice (default: %(default)s)")
    p.add_argument("--steps", type=positive,
                   help="optimizer steps of the stage named by --stage (default: the preset's)")
    p.add_argument("--batch", type=positive,
                   help="pictures in a step, over all processes (default: the preset's)")
    p.add_argument("--lr", type=finite, help="peak learning rate (default: the preset's)")
    p.add_argument("--accumulate", type=positive, default=1,
                   help="forward and backward passes in one step (default: %(default)s)")
    p.add_argument("--checkpointing", action="store_true",
                   help="recompute the blocks in the backward pass: less memory, a third slower")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile the transformer's blocks (a CPU needs a C++ compiler)")
    p.add_argument("--shard", action="store_true",
                   help="split parameters, gradients and moments over the processes")
    p.add_argument("--lora", type=positive, metavar="RANK",
                   help="train low-rank terms only; written to lora.safetensors")
    p.add_argument("--save-every", type=positive, default=500,
                   help="steps between checkpoints (default: %(default)s)")
    p.add_argument("--eval-every", type=positive, default=1000,
                   help="steps between sheets of pictures and scores (default: %(default)s)")
    p.add_argument("--eval-captions", type=positive, default=24, metavar="N",
                   help="pictures on a sheet (default: %(default)s)")
    p.add_argument("--no-eval", action="store_true", help="draw no sheets")
    p.add_argument("--device", help="cpu, cuda (default: cuda if there is one, else cpu)")
    p.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's choice)")
    args = p.parse_args(argv)
    args.device, args.device_reason = hub.choose_device(own_device(args.device))
    args.chosen_preset = ""
    if args.preset is None:
        args.preset = "tiny" if args.device.type == "cpu" else "small"
        args.chosen_preset = f" (chosen for {args.device.type})"
    args.out = args.out or Path("runs") / args.preset
    check_arguments(p, args, chosen_stages(args, presets))
    return args


def check_arguments(parser, args, stages):
    """Combinations that mean nothing."""
    if args.steps and args.stage in (None, "tokenizer"):
        parser.error("--steps needs --stage, one of text, vq, 1, 2, 3, 4, one-step")
    if args.stage not in (None, "tokenizer", *stages):
        parser.error(f"the preset {args.preset} has no stage {args.stage}")
    if args.lr is not None and args.lr <= 0:
        parser.error(f"--lr {args.lr} is not positive")
    if args.text_encoder and not args.init:
        parser.error("--text-encoder wants --init")
    if args.encode and args.data == "shapes":
        parser.error("--encode is for picture files: those of shapes are drawn as they are needed")
    if args.preset == "paper" and args.data == "shapes":
        parser.error("--preset paper wants --data: it has no codes that shapes are drawn with")
    if args.lora and args.stage not in ("1", "2", "3", "4"):
        parser.error("--lora wants --stage: 1, 2, 3 or 4")
    if args.stage == "vq" and stages["vq"]["steps"] <= stages["vq"]["quantize_from"]:
        parser.error(f"--steps {args.steps}: latents are quantised after "
                     f"{stages['vq']['quantize_from']} steps, ask for more")


def chosen_stages(args, presets):
    """{stage: settings} of --preset, changed by --steps, --batch, --lr and --data. Picture files
    have more than a few colours: the whole VQ model is trained. They have no scenes to learn
    captions from: the text encoder is trained along with the transformer, at TEXT_LR of its
    rate."""
    flags = {"steps": args.steps, "batch": args.batch, "lr": args.lr}
    flags = {name: value for name, value in flags.items() if value}
    stages = {stage: settings | flags for stage, settings in presets[args.preset].items()}
    if args.data == "shapes":
        return stages
    if stages["vq"].pop("patch_codes", None):
        stages["vq"] |= dict(steps=6000, quantize_from=800, adversary_from=5000) | flags
    if stages.pop("text", None):
        for stage, settings in stages.items():
            if "text_lr" in settings:
                stages[stage] = settings | {"text_lr": settings["text_lr"] or TEXT_LR}
    return stages


def open_run(args, presets):
    """Check what can be checked before the folder is made -> Run. Prints what it runs on."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device
    if args.data != "shapes":
        ImageFiles(args.data)                     # raises SourceError
    if args.compile:
        hub.check_compile(device)                 # now, and not in an hour
    init = text_encoder = None
    negative = ""
    if args.init:
        found = hub.find_model(args.init, device, torch.float32, args.text_encoder)
        if found.transformer:
            raise UserError(f"--init {args.init}: a one-step generator is no start for training")
        init, text_encoder, negative = found.folder, found.text_encoder, found.negative
    run = Run(args.out, chosen_stages(args, presets), args.seed, device, args.preset, args.data,
              args.resume, init, args.save_every, 0 if args.no_eval else args.eval_every,
              args.eval_captions, args.accumulate, args.shard, args.checkpointing, args.compile,
              args.lora, text_encoder, negative)
    if run.is_main:
        say(f"run: {run.out} | preset: {run.preset}{args.chosen_preset} | "
            f"device: {run.device} ({args.device_reason}) | "
            f"processes: {run.world_size} | products: {str(run.dtype)[6:]} | "
            f"kernels: {hub.kernel_path(run.device, run.dtype)} | seed: {run.seed}")
        if run.resume and not (run.out / "tokenizer").is_dir() and not init:
            note(f"note: nothing to resume in {run.out}; starting from step 0")
        if run.device.type == "cpu" and run.preset != "tiny" and not args.stage:
            note(f"note: the preset {run.preset} is for a GPU; tiny is made for two CPU cores")
        new = not (args.stage or run.resume or args.encode)
        own = init is not None and init.samefile(run.out)
        if new and not own and (run.out / "tokenizer").is_dir():
            raise UserError(f"--out {run.out} holds a model: --resume goes on with its training, "
                            "another folder is a new one's")
    return run
