"""The transformer: shapes, identities of its parts, rotary positions, config errors.

test_golden.py compares its numbers with the official implementation.
Letters: as in meissonic.py.
"""
import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import generator, masked_grid, random_conditioning, tiny_transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from shape_comments import ShapeComments

import kernels
import meissonic
from engine import fast, rerank
from engine.checkpoint import CheckpointError
from meissonic import Config

SEED = st.integers(0, 2 ** 32 - 1)
some = settings(max_examples=15, deadline=None)
AXES = (2, 6, 8)                                            # of rotary positions; D = 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


@pytest.fixture(scope="module")
def plain_model():
    return tiny_transformer(downsample=False)


def forward(model, ids, cond, timestep=0.5):
    """A batch of ids and a Conditioning -> logits."""
    return model(ids, cond.hidden, cond.pooled, cond.micro_conds, torch.tensor([timestep]))


# -------------------------------------------------------------------------------------------------
# Shapes


@some
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), SEED)
def test_logits_have_the_shape_of_the_grid(model, h, w, batch, seed):
    ids = masked_grid(seed, batch, 2 * h, 2 * w, 1, model)
    x, grid = model.embed_image(ids)
    assert x.shape == (batch, h * w, model.config.width) and tuple(grid) == (h, w)
    logits = forward(model, ids, random_conditioning(generator(seed), batch, model))
    assert logits.shape == (batch, 2 * h, 2 * w, 40) and logits.isfinite().all()


@some
@given(st.integers(1, 7), st.integers(1, 7))
def test_odd_grids(model, plain_model, h, w):
    """Refused by name with compression layers, fine without."""
    ids = torch.zeros(1, h, w, dtype=torch.int64)
    cond = random_conditioning(generator(), 1, model)
    assert forward(plain_model, ids, cond).shape == (1, h, w, 40)
    if h % 2 or w % 2:
        with pytest.raises(ValueError, match=f"{h}x{w}"):
            forward(model, ids, cond)


def run_everything():
    """Call every function of meissonic, engine.fast and engine.rerank that has shape comments."""
    model = tiny_transformer()
    conds = [random_conditioning(generator(i), 2, model) for i in range(2)]
    cond, uncond = conds
    mask = model.config.mask_token
    schedule = meissonic.Schedule(4, 3.0, (2.0, 0.0), "cosine", "rate")
    plan = schedule.plan(24, 24)
    ids = torch.full((2, 4, 6), mask)

    def fill(ids, cond, uncond, seeds):
        predict = meissonic.reference_predictor(model, cond, uncond)
        return meissonic.sample(predict, ids, mask, seeds, plan)

    drawn = rerank.best_of(2, fill, model, ids, cond, uncond, [0, 1], [uncond], "rate")
    predict = fast.predictor(model, cond, uncond, plan)
    meissonic.sample(predict, ids, mask, [0, 1], plan)
    rerank.remask(predict, drawn, torch.arange(24).expand(2, -1), mask, [0, 1], plan, 1)
    rerank.token_saliency(model, drawn, cond, uncond, "rate")
    for predictor in (meissonic.one_step_predictor, fast.one_step_predictor):
        predict = predictor(model, cond)
        meissonic.sample_one_step(predict, ids, model.config, [0, 1], meissonic.OneStep())


def test_shape_comments_are_true():
    """With sizes that tell the letters apart: a grid of 4 x 6 gives N = 6 and S = 11."""
    meissonic.rope_table.cache_clear()
    with ShapeComments(meissonic, fast, rerank, C=16, H=2, D=8, V=40, L=5) as comments:
        run_everything()
    assert not comments.wrong, sorted(set(comments.wrong))
    assert not comments.unseen() and len(comments.seen) > 40


WRONG = """
def f(x):                                                   # (B, C) -> (C, B)
    y = x.repeat(2, 1)                                      # (2B, C)
    z = x[:, None]                                          # (B, C)
    return y.t()                                            # (C, 3B)
"""


def test_wrong_shape_comments_are_found(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(WRONG)
    spec = importlib.util.spec_from_file_location("wrong", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with ShapeComments(module, C=5) as comments:
        module.f(torch.zeros(3, 5))
    lines = [text.partition(": ")[0] for text in comments.wrong]
    assert lines == ["wrong.py:4", "wrong.py:5", "wrong.py:2"] and not comments.unseen()


# -------------------------------------------------------------------------------------------------
# Small modules against the operations that they stand for


def test_compression_layers_are_convolutions(model):
    """They are computed as linear layers on patches; the weights are those of convolutions."""
    x = torch.randn(2, 4, 6, 16, generator=generator())
    down, up = model.down_block.downsample, model.up_block.upsample
    channels_first = down.norm(x).permute(0, 3, 1, 2)
    expected = F.conv2d(channels_first, down.conv.weight, stride=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(down(x), expected, rtol=1e-4, atol=1e-5)
    channels_first = up.norm(x).permute(0, 3, 1, 2)
    expected = F.conv_transpose2d(channels_first, up.conv.weight, stride=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(up(x), expected, rtol=1e-4, atol=1e-5)
    conv = model.embed.conv
    expected = F.conv2d(x.permute(0, 3, 1, 2), conv.weight).permute(0, 2, 3, 1)
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)


def test_timestep_embedding():
    """cos and sin of x 10000^(-i / 128), of any shape."""
    x = torch.tensor([[0.0, 1.0, 47.0], [0.25, 999.0, 1000.0]])
    angles = x.double()[..., None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat((angles.cos(), angles.sin()), -1).float()
    found = meissonic.timestep_embedding(x)
    assert found.shape == (2, 3, 256) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_rope_table():
    """Position (0, row, column), 10000^(-2 i / d) radians for pair i of each axis."""
    axes, w = (16, 56, 56), 20
    cos, sin = meissonic.rope_table(48, w, axes, CPU)
    assert cos.shape == sin.shape == (960, 64) and cos.dtype == torch.float32
    for position in (0, 1, 20, 479, 959):
        place = 0, position // w, position % w
        angles = [p * 10000 ** (-2 * i / d) for p, d in zip(place, axes) for i in range(d // 2)]
        assert np.allclose(cos[position], np.cos(angles), atol=1e-6)
        assert np.allclose(sin[position], np.sin(angles), atol=1e-6)


# -------------------------------------------------------------------------------------------------
# Rotary positions, through the attention that the model calls


def attend(seed, cos, sin):
    """Attention of random image rows without text -> (1, N, H D)."""
    g, n, d = generator(seed), len(cos), sum(AXES)
    image = torch.randn(1, n, 3, 2, d, generator=g)
    norms = tuple(torch.rand(2, d, generator=g) + 0.5)
    return kernels.attention(image[:, :0], image, norms, norms, cos, sin)


@some
@given(SEED, st.integers(0, 8), st.integers(0, 8))
def test_rope_cancels_at_equal_positions(seed, row, column):
    """With all rows at one position the rotation cancels from every product of q and k."""
    n = 5
    cos, sin = (table[row * 9 + column].expand(n, -1).contiguous()
                for table in meissonic.rope_table(9, 9, AXES, CPU))
    still = attend(seed, torch.ones_like(cos), torch.zeros_like(cos))
    torch.testing.assert_close(attend(seed, cos, sin), still, rtol=1e-4, atol=1e-5)


@some
@given(SEED, st.integers(0, 20), st.integers(0, 20), st.integers(1, 3), st.integers(2, 3))
def test_rope_depends_on_relative_positions_alone(seed, down, right, h, w):
    """A window of a large grid gives what the same window at the origin gives."""
    cos, sin = (table.view(24, 24, -1) for table in meissonic.rope_table(24, 24, AXES, CPU))

    def window(table, row, column):
        return table[row:row + h, column:column + w].reshape(h * w, -1)

    origin = attend(seed, window(cos, 0, 0), window(sin, 0, 0))
    moved = attend(seed, window(cos, down, right), window(sin, down, right))
    torch.testing.assert_close(moved, origin, rtol=1e-4, atol=2e-5)
    mirrored = attend(seed, window(cos, 0, 0).flip(0), window(sin, 0, 0))
    assert not torch.allclose(mirrored, origin, atol=1e-4)


# -------------------------------------------------------------------------------------------------
# Blocks


def block_inputs(model, batch=2, h=2, w=3):
    g = generator(1)
    x = torch.randn(batch, h * w, 16, generator=g)                                     # (B, N, C)
    text = torch.randn(batch, 5, 16, generator=g)                                      # (B, L, C)
    temb = torch.randn(batch, 16, generator=g)                                            # (B, C)
    return x, text, temb, meissonic.rope_table(h, w, model.config.axes_dims_rope, CPU)


def zero_gates(norm):
    """Adaptive norm whose gates are zero, whatever temb is. The chunks are shift, scale, gate."""
    weight, bias = (p.clone() for p in norm.linear.parameters())
    chunks = len(bias) // 48
    for part in (weight, bias):
        part.unflatten(0, (chunks, 3, 16))[:, 2] = 0
    norm.linear.weight.data, norm.linear.bias.data = weight, bias


def test_a_block_whose_gates_are_zero_is_the_identity():
    model = tiny_transformer()
    x, text, temb, rope = block_inputs(model)
    multi, single = model.blocks
    s = torch.cat((text, x), 1)                                                        # (B, S, C)
    assert not torch.allclose(multi(x, text, temb, rope)[0], x)
    assert not torch.allclose(single(s, 5, temb, rope), s)
    for block in model.blocks:
        for norm in block.modulation_layers:
            zero_gates(norm)
    after, after_text = multi(x, text, temb, rope)
    assert torch.equal(after, x) and torch.equal(after_text, text)
    assert torch.equal(single(s, 5, temb, rope), s)


def layer_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def test_a_single_block_is_its_formula():
    """s + gate * W [attention ; gelu(mlp)], both of the same modulated norm of s."""
    model = tiny_transformer()
    x, text, temb, rope = block_inputs(model)
    block = model.single_transformer_blocks[0]
    s = torch.cat((text, x), 1)                                                        # (B, S, C)
    shift, scale, gate = block.norm.linear(F.silu(temb))[:, None].chunk(3, -1)
    y = layer_norm(s) * (1 + scale) + shift
    q, k, v, mlp = (F.linear(y, w, b) for w, b in zip(
        block.qkv_mlp.weight.split((16, 16, 16, 64)), block.qkv_mlp.bias.split((16, 16, 16, 64))))
    qkv = torch.stack((q, k, v), 2).unflatten(-1, (2, 8))                        # (B, S, 3, H, D)
    norms = block.attn.norm_q.weight, block.attn.norm_k.weight
    attended = kernels.attention(qkv[:, :5], qkv[:, 5:], norms, norms, *rope)
    out = block.proj_out(torch.cat((attended, F.gelu(mlp, approximate="tanh")), -1))
    torch.testing.assert_close(block(s, 5, temb, rope), s + gate * out, rtol=1e-4, atol=1e-5)


def test_text_has_no_positions(model):
    """Another order of the text rows leaves the logits, but for rounding."""
    cond = random_conditioning(generator(), 2, model)
    ids = masked_grid(0, 2, 4, 6, 9, model)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = meissonic.Conditioning(cond.hidden[:, order], cond.pooled, cond.micro_conds)
    expected = forward(model, ids, cond)
    torch.testing.assert_close(forward(model, ids, shuffled), expected, rtol=1e-3, atol=1e-4)


def test_every_input_matters(model):
    cond = random_conditioning(generator(), 1, model)
    ids = masked_grid(0, 1, 4, 4, 5, model)
    inputs = [ids, cond.hidden, cond.pooled, cond.micro_conds, torch.tensor([0.5])]
    before = model(*inputs)
    for i, x in enumerate(inputs):
        other = x.flip(1) if i == 0 else 0.5 * x
        changed = model(*inputs[:i], other, *inputs[i + 1:])
        assert (changed - before).abs().max() > 1e-3, i


def test_the_head_is_on_top_of_the_features(model):
    cond = random_conditioning(generator(), 2, model)
    ids = masked_grid(0, 2, 4, 6, 9, model)
    x = model.features(ids, cond.hidden, cond.pooled, cond.micro_conds, torch.tensor([0.5]))
    logits = model.mlm_layer.conv2(model.head_features(x))
    assert torch.equal(logits, forward(model, ids, cond))


# -------------------------------------------------------------------------------------------------
# Published names, config


def test_fused_weights_have_published_names(model):
    """Our fused projections are the published ones, q, k, v and the MLP, one below the other."""
    table = model.weight_map()
    rows = {"attn.to_q": slice(0, 16), "attn.to_k": slice(16, 32), "attn.to_v": slice(32, 48)}
    for stem, fused in (("transformer_blocks.0.", "attn.qkv"),
                        ("single_transformer_blocks.0.", "qkv_mlp")):
        for name, part in rows.items():
            assert table[f"{stem}{name}.weight"] == (f"{stem}{fused}.weight", part)
            assert table[f"{stem}{name}.bias"] == (f"{stem}{fused}.bias", part)
    mlp = table["single_transformer_blocks.0.proj_mlp.weight"]
    assert mlp == ("single_transformer_blocks.0.qkv_mlp.weight", slice(48, 112))
    covered = {}
    for name, part in table.values():
        covered.setdefault(name, []).extend(range(len(model.state_dict()[name]))[part])
    for name, tensor in model.state_dict().items():
        assert covered[name] == list(range(len(tensor))), name


@pytest.mark.parametrize("change, word", [
    (dict(axes_dims_rope=(64, 64)), "axes_dims_rope"),
    (dict(axes_dims_rope=(16, 56, 55)), "axes_dims_rope"),
    (dict(axes_dims_rope=(15, 57, 56)), "axes_dims_rope"),
    (dict(axes_dims_rope=(16, 16, 40, 56)), "axes_dims_rope"),
    (dict(pooled_projection_dim=768), "pooled_projection_dim"),
    (dict(upsample=False), "upsample"), (dict(vocab_size=8192), "mask token")], ids=str)
def test_configs_that_make_no_sense(change, word):
    with pytest.raises(CheckpointError, match=word):
        Config(**change)
