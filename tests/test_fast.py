"""What makes sampling fast changes no picture: the fast predictor, graphs, 8 bits, compiled blocks.

Letters: as in meissonic.py; T steps, W width of all modulations side by side.
"""
import contextlib
import json
import resource
import shutil
import struct
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from common import (GOLDEN, GOLDEN_MODEL, ROOT, environment, generator, masked_grid,
                    random_conditioning, tiny_transformer)
from hypothesis import given, settings
from hypothesis import strategies as st

import meissonic
from engine import fast
from engine.pipeline import Pipeline
from engine.quantize import QuantizedLinear, quantize
from meissonic import Schedule

SEED = st.integers(0, 2 ** 16)
MASK = 47                                                    # the tiny models' mask token
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]
BUNDLED = ROOT / "weights" / "shapes"
SCHEDULE = Schedule(6, 3.0, (2.0, 0.0), "cosine", "rate")
few = settings(max_examples=10, deadline=None)


def inputs(seed, batch, downsample=True):
    """-> model, prompt, negative prompt. The codes are more equally likely than in the tiny model,
    so that draws depend on small differences."""
    model = tiny_transformer(downsample)
    model.mlm_layer.conv2.weight.mul_(0.2)
    g = generator(seed)
    return model, random_conditioning(g, batch, model), random_conditioning(g, batch, model)


# -------------------------------------------------------------------------------------------------
# The fast predictor against the reference


@few
@given(SEED, st.sampled_from([1, 2, 3]), st.booleans(), st.sampled_from([1, 3.0, -2.0]),
       st.integers(1, 20), st.integers(1, 24), st.sampled_from(sorted(meissonic.RATE_CONDITIONS)))
def test_a_whole_run_draws_the_same_ids(seed, batch, downsample, scale, steps, unknown, convention):
    model, cond, uncond = inputs(seed, batch, downsample)
    ids = masked_grid(seed, batch, 4, 6, unknown, model)
    plan = Schedule(steps, scale, (2.0, 0.0), "cosine", convention).plan(unknown, 24)
    runs = []
    for make in (meissonic.reference_predictor, fast.predictor):
        predict = make(model, cond, uncond, *([plan] if make is fast.predictor else []))
        runs.append(meissonic.sample(predict, ids, MASK, range(batch), plan))
    assert torch.equal(*runs)


@few
@given(SEED, st.sampled_from([1, 3]), st.booleans(), st.sampled_from([1, 3.0, 9.0]))
def test_logits_of_both_predictors(seed, batch, downsample, scale):
    model, cond, uncond = inputs(seed, batch, downsample)
    ids = masked_grid(seed, batch, 4, 4, 7, model)
    masked = meissonic.masked_positions(ids.flatten(1), MASK)
    plan = Schedule(2, scale, (2.0, 0.0), "cosine", "rate").plan(7, 16)
    reference = meissonic.reference_predictor(model, cond, uncond)
    predict = fast.predictor(model, cond, uncond, plan)
    logits = [reference(step, ids, masked) for step in plan]
    for step, expected in zip(plan, logits):
        tolerance = 1e-4 * expected.abs().max().item()
        found = predict(step, ids, masked)
        assert found.shape == (batch, 7, 40)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance)
    assert not torch.allclose(*logits)                       # the timestep matters


def test_steps_of_one_plan_may_differ_in_guidance():
    """Steps with guidance 1 beside others."""
    model, cond, uncond = inputs(0, 2)
    ids = masked_grid(0, 2, 4, 4, 7, model)
    masked = meissonic.masked_positions(ids.flatten(1), MASK)
    plan = [step._replace(cfg_scale=scale) for step, scale in zip(SCHEDULE.plan(7, 16), (1, 4.0))]
    reference = meissonic.reference_predictor(model, cond, uncond)
    predict = fast.predictor(model, cond, uncond, plan)
    for step in plan:
        expected = reference(step, ids, masked)
        torch.testing.assert_close(predict(step, ids, masked), expected, rtol=1e-4, atol=1e-4)


def test_guidance_one_needs_no_negative():
    model, cond, _ = inputs(0, 1)
    plan = [step._replace(cfg_scale=1.0) for step in SCHEDULE.plan(16, 16)]
    predict = fast.predictor(model, cond, None, plan)
    assert (meissonic.sample(predict, torch.full((1, 4, 4), MASK), MASK, [0], plan) < 40).all()


def test_modulations_computed_once_are_those_of_each_step():
    model, cond, _ = inputs(0, 3)
    timesteps = [0.9, 0.5, 0.1]
    found = fast.precompute_modulations(model, cond, timesteps)                       # (T, B, W)
    norms = [model.transformer_blocks[0].norm1, model.transformer_blocks[0].norm1_context,
             model.single_transformer_blocks[0].norm]
    assert found.shape == (3, 3, (6 + 6 + 3) * 16)
    for row, timestep in zip(found, timesteps):
        temb = model.embed_timestep(torch.tensor([timestep]), torch.float32)
        temb = temb + model.embed_prompt(cond.pooled, cond.micro_conds)                   # (B, C)
        expected = torch.cat([norm(temb) for norm in norms], -1)                          # (B, W)
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------
# Adaptive norms on the host


def test_adaptive_norms_may_stay_on_the_host(tmp_path):
    """ADAPTIVE_NORMS names all their parameters and no other. Moved to a device that is not the
    CPU, which is `meta` here, the model leaves just these behind."""
    tiny_transformer().save_pretrained(tmp_path)
    model = meissonic.Transformer.from_pretrained(tmp_path, host=fast.ADAPTIVE_NORMS)
    kept = {id(p) for norm in fast.modulation_layers(model) for p in norm.linear.parameters()}
    named = {name for name, p in model.named_parameters() if id(p) in kept}
    assert len(named) == 6
    assert named == {name for name, _ in model.named_parameters()
                     if any(part in name for part in fast.ADAPTIVE_NORMS)}
    quantize(model, torch.int8, "meta")
    assert named == {name for name, p in model.named_parameters() if p.device.type == "cpu"}
    quantize(model, torch.int8, "meta", host_norms=False)
    assert all(p.device.type == "meta" for p in model.parameters())


# -------------------------------------------------------------------------------------------------
# CUDA graphs, with stand-ins for CUDA


class FakeGraph:
    """What a CUDA graph does: the function runs again on the tensors of the recording."""
    function = None

    def replay(self):
        self.owner.output.copy_(self.function(*self.owner.inputs))


def test_a_graph_reads_its_inputs_at_each_launch(monkeypatch):
    """And it does not keep the function, which refers to the model, alive."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    nothing = contextlib.nullcontext
    for name, value in dict(Stream=lambda: stream, current_stream=lambda: stream,
                            stream=lambda s: nothing(), graph=lambda *_, **__: nothing(),
                            CUDAGraph=FakeGraph).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(FakeGraph, "function", staticmethod(torch.mul))

    def multiply(x, y):
        return x * y

    graph = fast.Graph(multiply, (torch.ones(3), torch.ones(3)), pool=None)
    graph.graph.owner = graph
    function = weakref.ref(multiply)
    del multiply
    assert function() is None
    for i in range(3):
        x, y = torch.full((3,), float(i)), torch.arange(3.0)
        assert torch.equal(graph(x, y), x * y)


class OnCuda(torch.Tensor):
    """A CPU tensor that says that it is on a GPU."""
    is_cuda = True


def test_one_graph_for_each_shape(monkeypatch):
    """At most MAX_GRAPHS of a model, which share a pool. `release` drops them."""
    made = []

    class Recorded:
        def __init__(self, function, inputs, pool):
            made.append(tuple(inputs[0].shape))
            self.function, self.pool = function, pool

        def __call__(self, ids, text, modulations):
            return self.function(ids.as_subclass(torch.Tensor), text, modulations)

    monkeypatch.setattr(fast, "Graph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    model, cond, _ = inputs(0, 2)
    text = model.embed_text(cond.hidden)
    modulations = fast.precompute_modulations(model, cond, [0.5])[0]

    def features(h, w):
        ids = torch.zeros(2, h, w, dtype=torch.int64)
        found = fast.features(model, ids.as_subclass(OnCuda), text, modulations)
        torch.testing.assert_close(found, fast.features(model, ids, text, modulations))

    for h, w in ((4, 4), (4, 6), (4, 4), (4, 6)):
        features(h, w)
    assert made == [(2, 4, 4), (2, 4, 6)]
    assert len({id(graph.pool) for graph in fast._graphs[model].values()}) == 1
    features(2, 2)
    assert made[2:] == [(2, 2, 2)] and len(fast._graphs[model]) == 1
    fast.release(model)
    assert model not in fast._graphs


# -------------------------------------------------------------------------------------------------
# 8 bits


@pytest.fixture(scope="module")
def exact():
    """The bundled model in float32, a batch with half of the ids known, and its logits."""
    pipe = Pipeline(BUNDLED)
    cond, uncond = (pipe.encode([prompt], (64, 64), 6.0) for prompt in ("a red circle on blue", ""))
    ids = torch.randint(pipe.transformer.config.codebook_size, (1, 16, 16), generator=generator())
    masked = torch.arange(0, 256, 2)[None]
    ids = ids.flatten(1).scatter(1, masked, pipe.mask_token).view(1, 16, 16)
    plan = [meissonic.Step(0, 0.5, 0.0, 3.0, 0)]

    def logits(model):
        return fast.predictor(model, cond, uncond, plan)(plan[0], ids, masked)

    return SimpleNamespace(logits=logits, expected=logits(pipe.transformer), pipe=pipe)


@pytest.mark.parametrize("dtype, most", [(torch.int8, 0.08), (torch.float8_e4m3fn, 0.2)])
def test_the_bundled_model_in_8_bits(exact, dtype, most):
    """Logits differ by a small share of their spread. Measured: 0.04 and 0.10. All linear layers
    of the blocks are quantized but the adaptive norms."""
    model = Pipeline(BUNDLED, quantize=dtype).transformer
    error = (exact.logits(model) - exact.expected).square().mean().sqrt() / exact.expected.std()
    assert 0 < error < most
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    config = model.config
    assert len(layers) == 8 * config.num_layers + 2 * config.num_single_layers
    assert all(layer.weight.dtype == dtype for layer in layers)
    for norm in fast.modulation_layers(model):
        assert norm.linear.weight.dtype == torch.float32


# -------------------------------------------------------------------------------------------------
# Compiled blocks


@pytest.mark.slow
def test_compiled_blocks_draw_the_same(monkeypatch):
    """One graph for each kind of block and size of a batch: here when drawing and when scoring. The
    backend is one that needs no compiler."""
    compile_function = torch.compile

    def compile_without_compiler(function, **options):
        return compile_function(function, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", compile_without_compiler)
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    drawn = []
    for compiled in (False, True):
        pipe = Pipeline(GOLDEN_MODEL, compile=compiled)
        schedule = Schedule(3, 2.0, (2.0, 0.0), "cosine", "step")
        drawn.append(pipe.draw(["a red star"], [0], size=(64, 64), schedule=schedule, best_of=3))
        assert counted["stats"]["unique_graphs"] == (4 if compiled else 0)
    assert torch.equal(*drawn)


# -------------------------------------------------------------------------------------------------
# The published sizes, 1.5 B parameters


def sparse_safetensors(path, shapes):
    """Write a safetensors file of float32 zeros that takes no room on the disk: a header, then a
    hole -> number of parameters."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start = end
        end += 4 * torch.Size(shape).numel()
        header[name] = dict(dtype="F32", shape=shape, data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end // 4


def published_size_checkpoint(folder):
    """A checkpoint of zeros with the published shapes -> number of parameters."""
    layout = json.loads((ROOT / "tests" / "public_layout.json").read_text())
    parameters = 0
    for part, stem in (("transformer", "diffusion_pytorch_model"),
                       ("vqvae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        entry = layout[f"MeissonFlow/Meissonic/{part}"]
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(entry["config"]))
        path = folder / part / f"{stem}.safetensors"
        parameters += sparse_safetensors(path, entry["tensors"])
    shutil.copytree(GOLDEN / "compressed" / "tokenizer", folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"mask_token_id": 8255}')
    return parameters


@pytest.mark.slow
def test_the_published_size_makes_a_step_in_16_gb(tmp_path):
    assert published_size_checkpoint(tmp_path / "model") > 1.5e9
    command = [sys.executable, ROOT / "sample.py", "--model", tmp_path / "model", "--steps", "1",
               "--size", "512", "--device", "cpu", "--out", tmp_path / "picture.png"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and (tmp_path / "picture.png").is_file(), done.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 16e9, f"{peak / 1e9:.1f} GB"
