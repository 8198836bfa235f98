"""Helpers that several test files share: golden checkpoints, tiny models, pictures, scripts.

Nothing of the project is imported at the top, so that a test file can set environment variables
before `kernels` is imported. Letters: B batch, H W pixels, h w tokens, L text positions.
"""
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
KINDS = ("compressed", "plain")         # golden checkpoints with and without compression layers
GOLDEN_MODEL = GOLDEN / "compressed"
SMALL_RUN = ("--model", GOLDEN_MODEL, "--device", "cpu", "--dtype", "float32",
             "--size", 64, "--steps", 2)


# ------------------------------------------------------------------------------------------------
# Golden checkpoints


def expected(kind):
    """{name: tensor}: what the official implementation computes from one golden checkpoint."""
    return load_file(GOLDEN / kind / "expected.safetensors")


def prompts(kind):
    return json.loads((GOLDEN / kind / "prompts.json").read_text(encoding="utf-8"))


def edit_json(path, **changes):
    """Replace keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ------------------------------------------------------------------------------------------------
# Tiny models


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_transformer(downsample=True, seed=0):
    """A random transformer with 40 codes whose logits depend strongly on the prompt."""
    import meissonic
    torch.manual_seed(seed)
    model = meissonic.Transformer(meissonic.Config(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=8,
        joint_attention_dim=12, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
        codebook_size=40, vocab_size=48, downsample=downsample, upsample=downsample))
    for name, parameter in model.named_parameters():
        if "conv2" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    return model.eval().requires_grad_(False)


def random_conditioning(generator, batch, model):
    """A Conditioning of random numbers for `batch` pictures, for prompts of 5 tokens."""
    import meissonic
    config = model.config
    hidden = torch.randn(batch, 5, config.joint_attention_dim, generator=generator)
    pooled = torch.randn(batch, config.pooled_projection_dim, generator=generator)
    micro_conds = torch.tensor([64.0, 64, 0, 0, 6]).expand(batch, 5)
    return meissonic.Conditioning(hidden, pooled, micro_conds)


def masked_grid(seed, batch, h, w, unknown, model):
    """(batch, h, w) int64: random codes, `unknown` of them in each picture masked."""
    g = generator(seed)
    ids = torch.randint(model.config.codebook_size, (batch, h * w), generator=g)
    where = torch.rand(batch, h * w, generator=g).argsort(1)[:, :unknown]
    return ids.scatter_(1, where, model.config.mask_token).view(batch, h, w)


def tiny_vq(seed=0):
    """A random VQ model: 4 x 4 pixels a token, 32 codes."""
    import vq
    torch.manual_seed(seed)
    model = vq.VQModel(vq.Config(
        block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        vq_embed_dim=4, num_vq_embeddings=32))
    return model.eval().requires_grad_(False)


def golden_tokenizer():
    import clip
    return clip.Tokenizer.from_pretrained(GOLDEN_MODEL / "tokenizer")


# ------------------------------------------------------------------------------------------------
# Pictures and files

# upper left, upper right, lower left, lower right
CORNERS = [(220, 20, 30), (20, 160, 40), (30, 60, 220), (240, 210, 20)]


def noise(seed, width=24, height=20):
    """uint8 (height, width, 3)"""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def corners(width=48, height=32):
    """Four quarters in the four colours of CORNERS -> uint8 (height, width, 3)."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:height // 2, :width // 2] = CORNERS[0]
    picture[:height // 2, width // 2:] = CORNERS[1]
    picture[height // 2:, :width // 2] = CORNERS[2]
    picture[height // 2:, width // 2:] = CORNERS[3]
    return picture


def encoded(picture, kind="PNG", **options):
    """The bytes of a picture file; `picture` is an array of pixels or an Image."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write(folder, files):
    """{path within the folder: bytes or text} -> the folder, with these files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def photos(folder, number=12, broken=(), size=40):
    """A folder of captioned PNGs, 000.png with 000.txt and so on; `broken` ones are cut off."""
    files = {}
    for i in range(number):
        raw = encoded(noise(i, size, size))
        files[f"{i:03d}.png"] = raw[:60] if i in broken else raw
        files[f"{i:03d}.txt"] = f"a red circle, number {i}"
    return write(folder, files)


def open_picture(path):
    """The Image in a file, read at once."""
    image = Image.open(path)
    image.load()
    return image


def tree(folder):
    """All paths below a folder, as sorted text."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


# ------------------------------------------------------------------------------------------------
# The command line


def assert_refused(cli, arguments, *words, script="sample"):
    """Exit status 2, nothing written, and one line on stderr that has all these words."""
    before = tree(".")
    status, out, err = cli(*arguments, script=script)
    assert status == 2 and err.count("\n") == 1 and "error: " in err, (status, err)
    assert len(err) < 500 and all(str(word) in err for word in words), err
    assert "wrote" not in out and tree(".") == before


def environment(**changes):
    """A user's environment: without this test run's variables, the hub unreachable by default."""
    ours = ("HF_", "HUGGING", "TRITON_", "PYTEST")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | offline | {name: str(value) for name, value in changes.items()}


def shell(arguments, cwd, script="sample.py", **changes):
    """Run a script in a process of its own -> CompletedProcess with text output."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    env = environment(**changes)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)
