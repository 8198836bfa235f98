"""What several test files share: paths, the golden checkpoints, tiny models."""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import meissonic                                                                                     # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
KINDS = ("compressed", "plain")


def expected(kind):
    """The golden numbers of one checkpoint, by name."""
    return load_file(GOLDEN / kind / "expected.safetensors")


def prompts(kind):
    return json.loads((GOLDEN / kind / "prompts.json").read_text(encoding="utf-8"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tiny_transformer(downsample=True, seed=0):
    """A random transformer with 40 codes whose logits differ enough for draws to depend on the prompt."""
    torch.manual_seed(seed)
    model = meissonic.Transformer(meissonic.Config(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=8, joint_attention_dim=12,
        pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), codebook_size=40, vocab_size=48, downsample=downsample,
        upsample=downsample))
    for name, p in model.named_parameters():
        if "conv2" in name:
            torch.nn.init.normal_(p, std=1.0)
    return model.eval().requires_grad_(False)


def random_text(generator, batch, model):
    """Random conditions for `batch` pictures, as if encoded from captions."""
    c = model.config
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return meissonic.Text(draw(batch, 5, c.joint_attention_dim), draw(batch, c.pooled_projection_dim),
                          torch.tensor([64.0, 64, 0, 0, 6]).expand(batch, 5))
