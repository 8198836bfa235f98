"""What makes sampling fast and lean changes no picture: each saving alone, all together, and what 8 bits cost."""
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from common import random_text, tiny_transformer

import clip
import kernels
import meissonic
import sample
import vq
from kernels import bench
from kernels.attention import attention_by_head, attention_plain

SEED = st.integers(0, 2 ** 16)
few = settings(max_examples=15, deadline=None)
EIGHT = (torch.int8, torch.float8_e4m3fn)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def inputs(seed, batch, downsample=True):
    model, g = tiny_transformer(downsample), generator(seed)
    model.mlm_layer.conv2.weight.mul_(0.2)                                # many codes are likely
    return model, random_text(g, batch, model), random_text(g, batch, model)


# ---------------------------------------------------------------------------------------------------------
# The fast path is the plain path


@few
@given(SEED, st.sampled_from((1, 2, 3, 5)), st.booleans(), st.sampled_from((1, 1.0, 3.0, -2.0)), st.integers(1, 20),
       st.sampled_from(("step", "rate", "rate1000")), st.sampled_from(("cosine", "linear")))
def test_a_whole_run_draws_the_same_tokens(seed, batch, downsample, guidance, steps, convention, schedule):
    model, text, negative = inputs(seed, batch, downsample)
    tokens = torch.full((batch, 4, 6), model.config.mask_token)
    known = torch.rand(24, generator=generator(seed)) < 0.3
    tokens.flatten(1)[:, known] = torch.randint(40, (batch, int(known.sum())), generator=generator(seed))
    runs = [meissonic.sample(model, text, negative, tokens, list(range(batch)), steps, guidance, schedule=schedule,
                             convention=convention, plain=plain) for plain in (False, True)]
    assert torch.equal(*runs) and torch.equal(runs[0].flatten(1)[:, known], tokens.flatten(1)[:, known])
    other = meissonic.sample(model, text, negative, tokens, [s + 7 for s in range(batch)], steps, guidance)
    assert known.sum() > 16 or not torch.equal(other, runs[0])


@few
@given(SEED, st.sampled_from((1, 3)), st.booleans(), st.sampled_from((1, 3.0, 9.0)))
def test_logits_of_both_paths(seed, batch, downsample, guidance):
    model, text, negative = inputs(seed, batch, downsample)
    tokens = torch.randint(40, (batch, 4, 4), generator=generator(seed))
    positions = torch.rand(batch, 16, generator=generator(seed)).argsort(1)[:, :7]
    tokens.flatten(1).scatter_(1, positions, model.config.mask_token)
    times = [0.75, 3.0]
    plain, fast = (path(model, text, negative, times, guidance) for path in (meissonic.plain_path, meissonic.fast_path))
    for i in range(2):
        logits, x = plain(i, tokens, positions), fast(i, tokens, positions)
        torch.testing.assert_close(model.mlm_layer.conv2(x), logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())
    assert not torch.allclose(plain(0, tokens, positions), plain(1, tokens, positions))


def test_modulations_made_once_are_those_of_each_step():
    model, text, _ = inputs(0, 3)
    times = [0.9, 0.5, 0.1]
    made = meissonic.made_once(model, text, times)                                                 # (T, B, W)
    for row, time in zip(made, times):
        temb = model.conditioning(text.pooled, text.micro_conds, torch.tensor([time]))
        torch.testing.assert_close(row, model.modulations(temb), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(row, torch.cat([torch.cat(norm(temb), -1) for norm in model.norms()], -1), rtol=1e-5, atol=1e-6)
    assert made.shape[-1] == sum(norm.linear.out_features for norm in model.norms())


def test_adaptive_norms_may_stay_on_the_host(tmp_path):
    """By name, exactly: what `host` names is all that the adaptive norms hold, and is read from the CPU's file."""
    model = tiny_transformer()
    model.save_pretrained(tmp_path)
    names = {n for n, _ in model.named_parameters() if any(h in n for h in model.ADAPTIVE)}
    assert names == {n for n, m in model.named_parameters() if ".norm" in n and ".linear." in n} and len(names) == 6
    loaded = meissonic.Transformer.from_pretrained(tmp_path, host=model.ADAPTIVE)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    moved = loaded.lean("meta")                                           # a device that is not the CPU, for want of a GPU
    assert {n for n, p in moved.named_parameters() if p.device.type == "cpu"} == names


def test_attention_by_head():
    """Against float64: no worse than twice the library's kernel in the same dtype."""
    g = generator(0)
    text, image = torch.randn(2, 9, 3, 2, 32, generator=g), torch.randn(2, 600, 3, 2, 32, generator=g)
    norms, angles = torch.rand(4, 32, generator=g).unbind(0), torch.rand(600, 16, generator=g) * 6
    rest = (norms[:2], norms[2:], angles.cos(), angles.sin())
    torch.testing.assert_close(attention_by_head(text, image, *rest), attention_plain(text, image, *rest), rtol=1e-4, atol=1e-5)
    exact = attention_plain(text.double(), image.double(), *rest)
    error = lambda f: (f(text.bfloat16(), image.bfloat16(), *rest).double() - exact).abs().max()
    assert 0 < error(attention_by_head) <= 2 * error(attention_plain)
    with torch.no_grad():
        assert torch.equal(kernels.attention(text.bfloat16(), image.bfloat16(), *rest),
                           attention_by_head(text.bfloat16(), image.bfloat16(), *rest))


def test_gelu_compiled():
    """The form that compiles well is the same function, and so are its gradients."""
    compiled, results = torch.compile(meissonic.gelu, backend="aot_eager"), []
    for function in (compiled, meissonic.gelu):
        x = torch.linspace(-9, 9, 101, dtype=torch.float64, requires_grad=True)
        y = function(x)
        results += [y.detach(), *torch.autograd.grad(y.sum(), x)]
    torch.testing.assert_close(results[:2], results[2:], rtol=1e-12, atol=1e-12)


class FakeGraph:
    """What a CUDA graph does, on the CPU: the function runs again on the tensors that it was recorded with."""
    def replay(self):
        self.graph.output.copy_(self.function(*self.graph.inputs))


def test_compiled_blocks_draw_the_same(cli, monkeypatch):
    """--compile: one graph for each kind of block and size of a batch, here when drawing and when judging; the PNG says so."""
    run = "--prompt", "a red star", "--model", "shapes", "--dtype", "float32", "--size", 32, "--steps", 4, "--redraws", 0, "--candidates", 3
    compile_block, counted = torch.nn.Module.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(sample, "check_compile", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *a, **k: compile_block(*a, **k, backend="aot_eager", fullgraph=True))
    for flags in (run, (*run, "--compile"), ("--like", "2.png")):
        torch._dynamo.reset()
        counted.clear()
        assert cli(*flags, "--out", f"{len(list(Path().glob('*.png'))) + 1}.png")[0] == 0
        assert counted["stats"]["unique_graphs"] == (0 if flags is run else 4)
    plain, compiled, again = (Image.open(f"{i}.png") for i in (1, 2, 3))
    assert plain.tobytes() == compiled.tobytes() == again.tobytes()
    assert "compile" not in plain.text and compiled.text["compile"] == again.text["compile"] == "True"


def test_a_graph_reads_its_inputs_at_each_launch(monkeypatch):
    fake = SimpleNamespace(wait_stream=lambda other: None, __enter__=None)
    nothing = lambda *a, **k: __import__("contextlib").nullcontext()
    for name, value in (("Stream", lambda: fake), ("current_stream", lambda: fake), ("stream", nothing), ("graph", nothing),
                        ("CUDAGraph", FakeGraph)):
        monkeypatch.setattr(torch.cuda, name, value)
    function = lambda x, y: x * y
    graph = meissonic.Graph(function, torch.ones(3), torch.ones(3))
    graph.graph.graph, graph.graph.function = graph, function
    for i in range(3):
        assert torch.equal(graph(torch.full((3,), float(i)), torch.arange(3.0)), i * torch.arange(3.0))


# ---------------------------------------------------------------------------------------------------------
# In turn, and in strips


def test_equal_prompts_are_encoded_once(monkeypatch):
    pipeline, seen = sample.Pipeline(sample.BUNDLED), []
    forward = clip.TextEncoder.forward
    monkeypatch.setattr(clip.TextEncoder, "forward", lambda self, ids: (seen.append(len(ids)), forward(self, ids))[1])
    text = pipeline.encode_text(["a star", "", "a star", "a heart", ""], 64, 64, 6)
    assert seen == [1, 1, 1] and torch.equal(text.hidden[0], text.hidden[2]) and torch.equal(text.pooled[1], text.pooled[4])
    alone = pipeline.encode_text(["a heart"], 64, 64, 6)
    torch.testing.assert_close(text.hidden[3], alone.hidden[0], rtol=1e-5, atol=1e-5)


def test_the_models_take_turns(monkeypatch, tmp_path):
    """Nothing of the text encoder is alive in the loop, nor of the transformer when pixels are made; each is read once for
    a turn of several batches, whose candidates are judged by the prompts without each of their words."""
    alive, reads = {}, Counter()
    for model in (clip.TextEncoder, meissonic.Transformer, vq.VQModel):
        load = model.from_pretrained.__func__
        def from_pretrained(cls, *a, load=load, **k):
            made = load(cls, *a, **k)
            if next(made.parameters()).device.type != "meta":
                reads[cls.__name__] += 1
                alive[cls.__name__] = [weakref.ref(p) for p in made.parameters()] + [weakref.ref(made)]
            return made
        monkeypatch.setattr(model, "from_pretrained", classmethod(from_pretrained))
    living = lambda name: sum(ref() is not None for ref in alive.get(name, ()))
    run, decode, seen = meissonic.sample, vq.VQModel.decode, []
    monkeypatch.setattr(meissonic, "sample", lambda *a, **k: (seen.append(("loop", living("TextEncoder"), living("VQModel"))), run(*a, **k))[1])
    monkeypatch.setattr(vq.VQModel, "decode", lambda *a: (seen.append(("pixels", living("Transformer"), living("TextEncoder"))), decode(*a))[1])
    sample.main(["--model", "shapes", "--prompt", "a b", "b c", "c d", "--batch", "2", "--steps", "2", "--out", str(tmp_path), "--device", "cpu"])
    assert reads == {"TextEncoder": 1, "Transformer": 1, "VQModel": 1}
    assert seen == [("loop", 0, 0)] * 2 + [("pixels", 0, 0)] * 3 and len(list(tmp_path.glob("*.png"))) == 3


def test_a_batch_changes_no_picture(tmp_path):
    arguments = ["--model", "shapes", "--prompt", "a star", "two hearts", "", "--n", "2", "--steps", "3", "--candidates", "3", "--device", "cpu"]
    sample.main([*arguments, "--batch", "4", "--out", str(tmp_path / "a")])
    sample.main([*arguments, "--batch", "1", "--out", str(tmp_path / "b")])
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(names) == 6
    for name in names:
        a, b = (np.asarray(Image.open(tmp_path / x / name)).astype(int) for x in "ab")
        assert np.abs(a - b).max() <= 1


def test_interrupted_what_is_painted_is_written(monkeypatch, tmp_path):
    run, calls = meissonic.sample, []
    def interrupted(*a, **k):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*a, **k)
    monkeypatch.setattr(meissonic, "sample", interrupted)
    with pytest.raises(SystemExit) as stop:
        sample.main(["--model", "shapes", "--prompt", "a", "b", "c", "--batch", "1", "--steps", "2", "--out", str(tmp_path), "--device", "cpu"])
    assert stop.value.code == 130 and [p.name for p in tmp_path.iterdir()] == ["a-0.png"]


@few
@given(SEED, st.sampled_from((50, 700, 9000)), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_strips_give_the_whole_picture(seed, strip, batch, h, w, random):
    torch.manual_seed(seed)
    model = vq.VQModel.from_pretrained(sample.BUNDLED / "vqvae") if not random else vq.VQModel(vq.Config(
        block_out_channels=(8, 8, 16), latent_channels=4, num_vq_embeddings=32, norm_num_groups=4)).eval()
    tokens = torch.randint(32, (batch, h, w))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        whole = model.decode(tokens)
        latent = model.latent(whole)
        patch.setattr(vq, "STRIP", strip)
        assert vq.large(whole) or whole.numel() <= strip
        torch.testing.assert_close(model.decode(tokens), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.latent(whole), latent, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------
# 8 bits


@pytest.mark.parametrize("dtype", EIGHT)
@few
@given(seed=SEED, rows=st.integers(1, 20), scale=st.sampled_from((1e-4, 1.0, 1e4)))
def test_the_error_of_8_bits_is_that_of_rounding(dtype, seed, rows, scale):
    """With |x - x_q s_x| <= e_x and the same of w: |error| <= sum(|x| e_w + |w| e_x + e_x e_w). int8: half a step of the
    row's largest / 127; float8: 2^-4 of each number, or half of the smallest subnormal, 2^-10 steps."""
    g = generator(seed)
    x, w = torch.randn(2, rows, 64, generator=g) * scale, torch.randn(48, 64, generator=g)
    w[0], x[0, 0] = 0, 0                                                  # rows of zeros stay zeros
    bias = torch.randn(48, generator=g) * scale
    weight, s = kernels.round8(w, dtype)
    def bound(y):
        step = y.abs().amax(-1, keepdim=True) / (127 if dtype == torch.int8 else 448)
        return step.expand(y.shape) / 2 if dtype == torch.int8 else torch.maximum(y.abs() / 16, step / 2 ** 10)
    e_x, e_w = bound(x), bound(w)
    allowed = x.abs() @ e_w.t() + e_x @ w.abs().t() + e_x @ e_w.t() + 1e-5 * scale
    y = kernels.linear8(x, weight, s, bias)
    assert y.shape == (2, rows, 48) and ((y - (x @ w.t() + bias)).abs() <= 1.001 * allowed).all()
    torch.testing.assert_close(y[0, 0], bias)
    assert weight.dtype == dtype and (kernels.linear8(x, weight, s) + bias - y).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("dtype, most", ((torch.int8, 0.08), (torch.float8_e4m3fn, 0.2)))
def test_the_bundled_model_in_8_bits(dtype, most):
    """Logits differ by a small share of their spread, half of the picture known; measured: 0.04 and 0.10."""
    exact, rounded = (sample.Pipeline(sample.BUNDLED, rounded=d) for d in (None, dtype))
    text = exact.encode_text(["a red circle on blue", ""], 64, 64, 6)
    tokens = torch.randint(exact.vq.config.num_vq_embeddings, (1, 16, 16), generator=generator(0))
    positions = torch.arange(0, 256, 2)[None]
    tokens.flatten(1).scatter_(1, positions, exact.mask_token)
    a, b = (p.transformer.mlm_layer.conv2(meissonic.fast_path(p.transformer, text.rows([0]), text.rows([1]), [0.5], 3.0)(0, tokens, positions))
            for p in (exact, rounded))
    error = ((a - b).square().mean().sqrt() / a.std()).item()
    assert 0 < error < most, error
    linear = [m for m in rounded.transformer.modules() if isinstance(m, meissonic.Linear8)]
    c = exact.transformer.config
    assert len(linear) == 8 * c.num_layers + 2 * c.num_single_layers and all(m.weight.dtype == dtype for m in linear)


@pytest.mark.parametrize("name", sample.ROUNDED)
def test_8_bits_on_the_command_line(name, tmp_path, capsys):
    sample.main(["--model", "shapes", "--prompt", "a star", "--dtype", name, "--steps", "2", "--candidates", "2", "--device", "cpu", "--out", str(tmp_path / "a.png")])
    within = str(sample.choose_dtype(None, torch.device("cpu"))[0])[6:]
    assert Image.open(tmp_path / "a.png").size == (64, 64) and f"dtype: {name} (--dtype, in {within})" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------
# The benchmark


@pytest.mark.parametrize("name", ("float32", "int8"))
def test_bench_holds_both_paths_against_each_other(name, capsys):
    sample.main(["--model", "shapes", "--bench", "--steps", "2", "--device", "cpu", "--n", "2", "--dtype", name])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: [float(x.strip("%")) for x in line.split()[1:]] for line in lines if line.startswith(("plain  ", "fast  "))}
    assert set(rows) == {"plain", "fast"} and all(len(r) == 8 and min(r[:4]) > 0 for r in rows.values())
    same = float(lines[-1].split("%")[0].split()[-1])
    assert same == 100 if name == "float32" else 50 < same < 100


def test_step_flops_are_those_of_the_products():
    """2 operations for each weight and position of the blocks and the head; 4 S^2 C for an attention."""
    pipeline = sample.Pipeline(sample.BUNDLED)
    c, width, rows, words = pipeline.transformer.config, 192, 64, 32
    both = c.num_layers * 24 * width ** 2 * (rows + words) + c.num_single_layers * 24 * width ** 2 * (rows + words)
    attention = (c.num_layers + c.num_single_layers) * 4 * (rows + words) ** 2 * width
    ends = 2 * width ** 2 * (256 * (1 + 1 + 1 + 1) + rows * 2) + 2 * 256 * width * c.codebook_size
    assert bench.step_flops(meissonic, pipeline, (64, 64), 1) == pytest.approx(both + attention + ends, rel=0.01)
    assert bench.step_flops(meissonic, pipeline, (64, 64), 3.0) == 2 * bench.step_flops(meissonic, pipeline, (64, 64), 1)
