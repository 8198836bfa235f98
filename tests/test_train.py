"""Training: its pieces, and a tiny run of all stages with frozen first losses."""
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import ROOT, tiny_transformer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import clip
import data
import dataset
import meissonic
import sample
import train
import train_vq
import trainer
import vq

# ---------------------------------------------------------------------------------------------------------
# Pieces


def test_decay_groups():
    """Weight decay on matrices and kernels; none on biases, norms and embeddings; every parameter in one group."""
    student = tiny_student()
    for module in (student, vq.VQModel(vq.Config(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4))):
        decayed, rest = trainer.decay_groups(module)
        assert decayed["weight_decay"] == 0.01 and rest["weight_decay"] == 0
        names = {id(p): n for n, p in module.named_parameters()}
        assert sorted(names) == sorted(id(p) for g in (decayed, rest) for p in g["params"])
        spared = {names[id(p)] for p in rest["params"]}
        assert spared == {n for n in names.values() if n.endswith("bias") or "norm" in n and ".linear." not in n or "embedding" in n
                          and not n.startswith(("transformer.time_text_embed", "transformer.embed.conv",
                                                "transformer.cond_embed"))}


def test_learning_rate():
    """Up to the peak in a straight line, then down a cosine to 2% of it."""
    rate = [trainer.learning_rate(i, 1000, 0.5) for i in range(1000)]
    assert np.isclose(rate[0], 0.5 / 100, rtol=1e-3) and np.isclose(rate[49], 0.25, rtol=0.01)
    assert 0.95 * 0.5 < max(rate) <= 0.5 and rate.index(max(rate)) == 99
    assert all(a > b for a, b in zip(rate[99:], rate[100:])) and np.isclose(rate[-1], 0.02 * 0.5, rtol=0.01)
    assert np.isclose(rate[500], 0.51 * 0.5, rtol=0.01)
    assert [trainer.learning_rate(i, 1000, 0.5, floor=1) for i in (100, 500, 999)] == [0.5] * 3


def test_k_means_finds_clusters():
    g = torch.Generator().manual_seed(0)
    points = (10 * torch.eye(4)[:, None] + 0.1 * torch.randn(4, 50, 4, generator=g)).flatten(0, 1)
    centres = train_vq.k_means(points, 8, np.random.default_rng(0))
    assert centres.shape == (8, 4) and centres.isfinite().all()
    distance = torch.cdist(points, centres).min(1).values
    assert distance.max() < 1


def test_k_means_with_fewer_points_than_centres():
    points = torch.randn(5, 3)
    centres = train_vq.k_means(points, 16, np.random.default_rng(0))
    assert centres.shape == (16, 3) and centres.isfinite().all() and torch.cdist(points, centres).min(1).values.max() < 1


def test_a_wired_encoder_sees_its_patch_alone():
    """Its latents are the patches' principal components, whatever stands beside them, and it is not trained."""
    model = vq.VQModel(vq.Config(**train.MODELS["cpu"]["vq"])).eval()
    rng = np.random.default_rng(0)
    images = dataset.pixels(np.stack([np.asarray(data.example(rng, 64)[0]) for _ in range(40)]))
    train_vq.wire(model, images)
    latent = model.latent(images)                                                            # (40, 24, 16, 16)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)    # (40, 16, 16, 48)
    assert latent.square().sum() > 0.99 * patches.square().sum()                             # lengths are kept
    alone = model.latent(patches.view(-1, 3, 4, 4)).view(40, 16, 16, 24).permute(0, 3, 1, 2)
    torch.testing.assert_close(latent, alone, rtol=0, atol=0.02)
    assert not any(p.requires_grad for p in (*model.encoder.parameters(), *model.quant_conv.parameters()))
    assert all(p.requires_grad for p in model.decoder.parameters())


def test_a_code_is_two_colours_and_an_outline():
    """The codebook shows nearly all there is in flat pictures, in the order that its features say."""
    rng = np.random.default_rng(0)
    images, others = (dataset.pixels(np.stack([np.asarray(data.example(rng, 64)[0]) for _ in range(n)])) for n in (200, 50))
    book, features = train_vq.two_tone(images, 8, 36, np.random.default_rng(0)), train_vq.code_features(8, 36)
    assert book.shape == (1016, 3, 4, 4) and features.shape == (1016, 8 + 28 + 36 + 1)
    error = torch.cdist(train_vq.patches_of(others).flatten(1), book.flatten(1)).square().amin(1).mean() / 48
    assert -10 * error.log10() > 30                                            # dB
    palette, pixels = book[-8:, :, 0, 0], book.flatten(2)                       # (8, 3), (1016, 3, 16)
    assert (book[-8:] == palette[..., None, None]).all() and (palette.sum(1).diff() > 0).all()
    expected = (np.array([*data.COLOURS.values()]) / 255).tolist()
    torch.testing.assert_close(sorted(palette.tolist()), sorted(expected), rtol=0, atol=1e-6)
    for code in range(0, 1008, 41):
        dark, light = palette[features[code, :8].nonzero()[:, 0]]
        on_line = (pixels[code].T - dark) @ (light - dark) / (light - dark).square().sum()
        torch.testing.assert_close(dark + on_line[:, None] * (light - dark), pixels[code].T, rtol=0, atol=1e-5)
        same = (features[:, 36:72].argmax(1) == features[code, 36:72].argmax()) & (features[:, 72] == 0)
        assert same.sum() == 28
        for other in same.nonzero()[::9, 0]:                                   # as much of the lighter colour everywhere
            dark, light = palette[features[other, :8].nonzero()[:, 0]]
            torch.testing.assert_close(dark + on_line[:, None] * (light - dark), pixels[other].T, rtol=0, atol=1e-5)


def test_a_picture_of_too_few_colours():
    with pytest.raises(sample.UserError, match="2 colours.*wants 8"):
        train_vq.two_tone(torch.eye(16).expand(1, 3, 16, 16), 8, 36, np.random.default_rng(0))


def test_codes_share_what_is_learned_of_their_features():
    """A step on one code moves those that share a feature with it, and no others; merged, it is a plain model."""
    student, features = tiny_student(), torch.eye(20).repeat(2, 1)              # 40 codes: c and c + 20 are of a kind
    ids, tokens, mask, rates, micro = tiny_batch()
    before = student(ids, tokens, mask, rates, micro)[0]
    train.share_features(student.transformer, features, anew=False)
    torch.testing.assert_close(student(ids, tokens, mask, rates, micro)[0], before)
    embedding = student.transformer.embed.embeddings
    start = embedding.weight.detach().clone()                                  # (41, C)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    embedding(torch.tensor([7])).sum().backward()
    optimizer.step()
    assert (embedding.weight != start).any(1).nonzero()[:, 0].tolist() == [7, 27]
    student.zero_grad()
    student(ids, tokens, mask, rates, micro)[0].backward()
    optimizer.step()
    plain = tiny_student()
    plain.transformer.load_state_dict(train.merged(student.transformer, student.transformer.state_dict()))
    plain.encoder.load_state_dict(student.encoder.state_dict())
    inputs = ids, tokens, mask, rates, micro
    torch.testing.assert_close(plain(*inputs)[0], student(*inputs)[0])
    assert not torch.allclose(plain(*inputs)[0], before)


def test_the_preset_cpu(tmp_path, monkeypatch):
    """The encoder is still the wired one at the end, a flat picture is one token, and codes begin as their features; the text
    encoder is that of its own stage."""
    stages = {"text": dict(steps=2, batch=4), "vq": dict(steps=3, batch=4, pool=40), "1": dict(steps=2, batch=4, pictures=40), "2": dict(steps=2, batch=4, pictures=40)}
    monkeypatch.setitem(train.PRESETS, "cpu", {s: train.PRESETS["cpu"][s] | short for s, short in stages.items()})
    monkeypatch.setattr(train, "look", lambda *a: None)
    read = []
    monkeypatch.setattr(train, "train_text", lambda run, train_text=train.train_text: (
        train_text(run), read.append(load_file(run.out / "text_encoder" / "model.safetensors"))))
    command("--preset", "cpu", "--out", tmp_path / "run")
    same = load_file(tmp_path / "run" / "text_encoder" / "model.safetensors")
    assert all(torch.equal(read[0][k], v) for k, v in same.items()) and read[0].keys() == same.keys()
    model = vq.VQModel.from_pretrained(tmp_path / "run" / "vqvae")
    assert (model.encoder.conv_norm_out.weight == 128).all() and not model.encoder.mid_block.resnets[0].conv2.weight.any()
    images = torch.tensor(list(data.COLOURS.values()))[..., None, None].expand(-1, -1, 16, 16) / 255
    tokens = model.encode(images)
    assert (tokens == tokens[:, :1, :1]).all() and tokens.unique().tolist() == list(range(1008, 1016)) and model.decode(tokens).isfinite().all()
    transformer = meissonic.Transformer.from_pretrained(tmp_path / "run" / "transformer")
    features = train_vq.code_features(8, 36).double()
    for weight in (transformer.embed.embeddings.weight[:-1], transformer.mlm_layer.conv2.weight.flatten(1)):
        weight = weight.detach().double()
        told = features @ torch.linalg.lstsq(features, weight, driver="gelsd").solution
        assert (told - weight).square().sum() < 0.01 * weight.square().sum()


def test_the_text_encoder_learns_what_captions_say(tmp_path, monkeypatch):
    """In 300 steps a small one answers the questions of data.whereabouts better than by how often each is true."""
    tiny = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    monkeypatch.setitem(train.MODELS["cpu"], "text", train.MODELS["cpu"]["text"] | tiny)
    monkeypatch.setitem(train.PRESETS["cpu"], "text", dict(steps=300, batch=32, lr=5e-3))
    monkeypatch.setattr(trainer.Log.__init__, "__defaults__", (1,))
    for stage in ("tokenizer", "text"):
        command("--preset", "cpu", "--out", tmp_path / "run", "--stage", stage)
    told = np.mean([data.whereabouts(data.sample_example(np.random.default_rng(i), "position" if i % 2 else None, letters=0.3)[1])
                    for i in range(500)], 0)
    told = told.clip(1e-6, 1 - 1e-6)
    blind, seen = np.mean(-told * np.log(told) - (1 - told) * np.log(1 - told)), losses(tmp_path / "run", "text")
    assert np.mean([seen["text", i] for i in range(276, 301)]) < 0.9 * blind, (seen, blind)
    with pytest.raises(SystemExit):
        command("--preset", "cpu", "--out", tmp_path / "run", "--stage", "text", "--data", tmp_path)


def test_pictures_of_ones_own_teach_the_text_encoder_along():
    arguments = ["--preset", "cpu", "--data"]
    stages = [train.changed(train.PRESETS, train.parse_arguments(arguments + [source])) for source in ("shapes", "photos")]
    assert "text" in stages[0] and "text" not in stages[1]
    assert [[s[k]["text"] for k in "123"] for s in stages] == [[0.0] * 3, [0.3] * 3]


def test_a_frozen_text_encoder_must_be_there(tmp_path):
    run = trainer.Run(tmp_path / "run", train.PRESETS["cpu"], preset="cpu")
    train.run_stage("tokenizer", run, False)
    with pytest.raises(sample.UserError, match="--stage text"):
        train.check_stages(run, ["1"])
    train.check_stages(run, ["text", "1"])


def test_revive_moves_unused_codes_to_the_data():
    book, latents = torch.arange(8.0)[:, None].repeat(1, 2), 100 + torch.rand(20, 2)
    used = torch.tensor([1.0, 0, 3, 0, 1, 1, 1, 0])
    before = book.clone()
    miss = torch.arange(20.0)
    train_vq.revive(book, used, latents, miss, np.random.default_rng(0))
    assert torch.equal(book[used > 0], before[used > 0])
    served_worst = latents[-4 * 3:]
    assert all((served_worst == row).all(1).any() for row in book[used == 0])


def test_distinct_keeps_one_point_of_each_cell():
    """A flat ground, seen 1000 times with a little noise, counts as few points; what is rare is kept."""
    g = torch.Generator().manual_seed(0)
    flat, rare = 0.01 * torch.randn(1000, 3, generator=g), 5 + torch.arange(12.0).reshape(4, 3)
    kept = train_vq.distinct(torch.cat((flat, rare)))
    assert len(kept) <= 12 and all((kept == row).all(1).any() for row in rare)


def test_revive_with_nothing_to_do():
    book = torch.rand(4, 2)
    before = book.clone()
    train_vq.revive(book, torch.ones(4), torch.rand(9, 2), torch.rand(9), np.random.default_rng(0))
    assert torch.equal(book, before)


def tiny_student():
    torch.manual_seed(0)
    encoder = clip.TextEncoder(clip.Config(hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                           projection_dim=16, max_position_embeddings=6, vocab_size=20, eos_token_id=19))
    transformer = copy.deepcopy(tiny_transformer()).requires_grad_(True).train()
    return train.Student(encoder, transformer)


def tiny_batch(seed=0, batch=4):
    g = torch.Generator().manual_seed(seed)
    ids, tokens = torch.randint(19, (batch, 6), generator=g), torch.randint(40, (batch, 4, 4), generator=g)
    mask, rates = train.sample_mask(np.random.default_rng(seed), batch, 16)
    micro = torch.tensor([[SIZE, SIZE, 0.0, 0.0, 6.0]]).expand(batch, 5)
    return ids, tokens, torch.from_numpy(mask), torch.from_numpy(rates), micro


def test_loss_is_the_cross_entropy_of_the_masked_tokens():
    student = tiny_student()
    ids, tokens, mask, rates, micro = tiny_batch()
    hidden, pooled = student.encoder(ids)
    shown = torch.where(mask.view(tokens.shape), student.transformer.config.mask_token, tokens)
    time = torch.tensor([meissonic.timestep("rate", 0, 1, int(m.sum()), m.numel()) for m in mask])
    logits = student.transformer(shown, hidden, pooled, micro, time)
    loss = F.cross_entropy(logits.flatten(1, 2)[mask], tokens.flatten(1)[mask], reduction="sum")
    torch.testing.assert_close(student(ids, tokens, mask, rates, micro)[0], loss)


def test_loss_does_not_see_what_is_masked():
    """The gradient of the embeddings of codes that are nowhere shown is zero: no label leaks into the input."""
    student = tiny_student()
    ids, _, mask, rates, micro = tiny_batch()
    hidden_code, shown_code = torch.tensor(5), torch.tensor(6)
    tokens = torch.where(mask.view(-1, 4, 4), hidden_code, shown_code)
    student(ids, tokens, mask, rates, micro)[0].backward()
    grad = student.transformer.embed.embeddings.weight.grad
    assert grad[5].abs().sum() == 0 and grad[6].abs().sum() > 0 and grad[student.transformer.config.mask_token].abs().sum() > 0


def test_every_parameter_is_trained():
    student = tiny_student()
    sum(student(*tiny_batch())).backward()
    idle = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    text_key = lambda n: n.endswith("self_attn.qkv.bias")                                # softmax does not see a key's bias
    assert [n for n in idle if not text_key(n)] == []


def test_overfitting_one_batch():
    student, batch = tiny_student(), tiny_batch()
    optimizer = torch.optim.AdamW(trainer.decay_groups(student))
    losses = []
    for _ in range(150):
        loss = student(*batch)[0] / batch[2].sum()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3 and losses[-1] < 0.2, losses[::15]


def test_fresh_blocks_are_the_identity(monkeypatch):
    shrink(monkeypatch)
    student = train.Student(*train.build("shapes", {clip.END: 19}, True))
    train.fresh(student)
    norms = [m for m in student.modules() if isinstance(m, meissonic.AdaNorm)]
    assert len(norms) == 3 and not any(p.any() for m in norms for p in m.parameters())


def test_the_tokenizer_knows_the_words_of_the_world():
    """Each word of the world is one token, any other text is still covered, and the special tokens come last."""
    tokenizer = train.train_tokenizer(train.world_captions(0), 32)
    words = ("red orange yellow green blue purple black white circle circles square triangle star stars hearts diamond "
             "crosses arrows letter letters small large two three four left right above below background picture drawing").split()
    for word in words:
        assert len(tokenizer.bpe.encode(word, add_special_tokens=False).ids) == 1, word
    size = tokenizer.bpe.get_vocab_size()
    assert (tokenizer.start, tokenizer.end) == (size - 2, size - 1) and size <= 1024
    assert (tokenizer(["Zebra, 7 €!"]) == tokenizer.end).sum() == tokenizer.length - 2 - (
        len(tokenizer.bpe.encode("Zebra, 7 €!", add_special_tokens=False).ids) - 1)


# ---------------------------------------------------------------------------------------------------------
# A tiny run of all stages


SIZE, STEPS, SAVE = 16, 30, 10


def shrink(patch):
    """Make train.py's models and stages tiny: f = 2, 8 x 8 tokens, then 16 x 16 behind compression layers."""
    patch.setitem(train.MODELS, "shapes", dict(
        sampling=dict(steps=4, cfg=3.0),
        vq=dict(block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, num_vq_embeddings=32, norm_num_groups=4),
        transformer=dict(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=8, joint_attention_dim=16,
                         pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), codebook_size=32, vocab_size=33),
        text=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
                  max_position_embeddings=32)))
    patch.setitem(train.PRESETS, "shapes", {
        "vq": dict(size=SIZE, steps=STEPS, batch=8, lr=2e-3, warm=5, adversary=20, pool=64),
        "1": dict(size=SIZE, steps=STEPS, batch=8, lr=1e-3, text=0.3, compress=False, pictures=200, concepts=1.0),
        "3": dict(size=2 * SIZE, steps=4, batch=8, lr=1e-3, text=0.3, compress=True, pictures=40),
        "4": dict(size=2 * SIZE, steps=2, batch=8, lr=1e-4, text=1.0, compress=True, pictures=40)})


# What a process of its own runs: train.py with the tiny stages. STOP kills it in the middle of a checkpoint's write.
TINY = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import dataset, pytest, test_train, train, trainer, vq
test_train.shrink(pytest.MonkeyPatch())
if os.environ.get("KILL_AT_SAVE"):
    write, saves = vq.save_file, []
    def save_and_die(tensors, path, **options):
        saves.append(path)
        write(tensors, path, **options)
        if len(saves) == int(os.environ["KILL_AT_SAVE"]):
            os.truncate(path, 1000)
            os.kill(os.getpid(), 9)
    dataset.save_file = trainer.save_file = save_and_die
train.main(sys.argv[1:])
"""


def tiny(tmp_path):
    script = tmp_path / "tiny.py"
    script.write_text(TINY.format(root=str(ROOT), tests=str(ROOT / "tests")))
    return str(script)


def start(arguments, **environment):
    return subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def command(*arguments):
    train.main([*map(str, arguments), "--look-every", "1000", "--save-every", str(SAVE)])


def losses(out, stage=None):
    """{(stage, step): loss} of a run's log."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {(e["stage"], e["step"]): e["loss"] for e in entries if "event" not in e and stage in (None, e["stage"])}


def same_files(a, b, *files):
    for file in files:
        mine, theirs = load_file(a / file), load_file(b / file)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine), file


RESULTS = ("vqvae/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors",
           "text_encoder/model.safetensors", "vq-0000030.checkpoint.safetensors", "1-0000030.checkpoint.safetensors",
           "3-0000004.checkpoint.safetensors", "4-0000002.checkpoint.safetensors")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums over other numbers of threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


IDS = []                                                       # the captions' tokens of every transformer step of `run`


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All stages in a folder, each step logged."""
    out, forward = tmp_path_factory.mktemp("train") / "run", train.Student.forward
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr(train.Student, "forward", lambda self, ids, *rest: (IDS.append(ids), forward(self, ids, *rest))[1])
        patch.setattr(train, "look", lambda *a: None)
        patch.setattr(trainer.Log.__init__, "__defaults__", (1,))
        command("--out", out, "--seed", 3)
    return out


def test_first_losses(run, tmp_path, monkeypatch):
    """Frozen: a change of the data, the models, their initialisation or the losses shows here. The bounds leave room
    for another processor's bfloat16 alone; the transformer's pictures are tokens of a fresh VQ model for that reason,
    since after 30 steps of training its tokens differ from one processor to the next, and with them every loss."""
    shrink(monkeypatch)
    torch.manual_seed(0)
    vq.VQModel(vq.Config(**train.MODELS["shapes"]["vq"])).save_pretrained(tmp_path / "parts/vqvae")
    shutil.copytree(run / "tokenizer", tmp_path / "parts/tokenizer")
    monkeypatch.setattr(trainer.Log.__init__, "__defaults__", (1,))
    command("--out", tmp_path / "run", "--init", tmp_path / "parts", "--stage", "1", "--steps", 3, "--seed", 3)
    seen = losses(run, "vq") | losses(tmp_path / "run", "1")
    assert np.allclose([seen["vq", i] for i in (1, 2, 3)], FIRST_VQ, atol=0.01), seen
    assert np.allclose([seen["1", i] for i in (1, 2, 3)], FIRST_TRANSFORMER, atol=0.003), seen


FIRST_VQ = (0.580, 0.772, 0.583)
FIRST_TRANSFORMER = (4.543, 4.630, 4.597)


def test_losses_fall(run):
    for stage, last, drop in (("vq", 20, 0.05), ("1", STEPS, 0.08)):           # vq: before the discriminator joins
        seen = losses(run, stage)
        assert len(seen) == STEPS and seen[stage, last] < seen[stage, 1] - drop


def test_what_a_run_leaves(run):
    """Logs, the loss curves, and a checkpoint folder in half precision that draws."""
    assert {"log.jsonl", "loss.png", "model_index.json", "tokens"} < {p.name for p in run.iterdir()}
    assert not [p for p in run.rglob(".*")]
    stock = load_file(run / "tokens" / "1" / "000000.safetensors")
    assert stock["tokens"].shape == (200, 8, 8) and stock["text"].shape == (200, 32) and stock["micro"].shape == (200, 5)
    pipeline = sample.Pipeline(run)
    assert pipeline.size == (2 * SIZE, 2 * SIZE) and pipeline.convention == "rate" and pipeline.score_condition == data.CLEAN
    picture, = pipeline(["a red circle"], [0])
    assert picture.size == (2 * SIZE, 2 * SIZE)
    for result in RESULTS[:3]:
        with safe_open(run / result, framework="pt") as file:
            assert {file.get_slice(k).get_dtype() for k in file.keys()} == {"F16"}


def test_captions_are_dropped_one_time_in_ten(run):
    tokenizer = clip.Tokenizer.from_pretrained(run / "tokenizer")
    empty = (torch.cat(IDS) == tokenizer([""])).all(1).double()
    assert len(empty) == 8 * (STEPS + 4 + 2) and abs(empty.mean() - 0.1) < 4 * np.sqrt(0.09 / len(empty))


def test_the_result_is_the_average(run):
    """What is saved are the averaged weights, not the last ones."""
    flat = load_file(run / "4-0000002.checkpoint.safetensors")
    model = meissonic.Transformer.from_pretrained(run / "transformer").state_dict()
    name = "project_to_hidden.weight"
    assert torch.equal(model[name], flat[f"shadow.transformer.{name}"].half().float())
    assert not torch.equal(flat[f"shadow.transformer.{name}"], flat[f"student.transformer.{name}"])


def test_the_sheet_and_the_scores(run, tmp_path, monkeypatch):
    out = shutil.copytree(run, tmp_path / "run")
    train.look(trainer.Run(out, train.PRESETS["shapes"]), "4", 2, number=1)
    scores = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert {*scores} - {"stage", "step", "event"} == {"single", "two", "counting", "colours", "position", "attribution", "unseen", "overall"}
    assert (out / "sheet.png").is_file()


def test_init_goes_on_from_a_model(run, tmp_path, monkeypatch):
    """The tokenizer and the VQ model are kept; with a learning rate of nearly nothing so are the other weights."""
    shrink(monkeypatch)
    monkeypatch.setattr(train, "look", lambda *a: None)
    for stage in ("tokenizer", "vq", "4"):
        command("--out", tmp_path / "run", "--init", run, "--lr", 1e-9, "--stage", stage, "--resume")
    same_files(run, tmp_path / "run", *RESULTS[:3])
    assert (run / "tokenizer" / "vocab.json").read_bytes() == (tmp_path / "run" / "tokenizer" / "vocab.json").read_bytes()


# ---------------------------------------------------------------------------------------------------------
# Never losing a run


def test_killed_inside_a_write_then_resumed_equals_uninterrupted(run, tmp_path):
    """kill -9 in the middle of writing a checkpoint, in either stage: the one before is whole, and going on from it
    gives the uninterrupted run's weights, averages and moments bit for bit."""
    out = tmp_path / "run"
    arguments = [tiny(tmp_path), "--out", out, "--seed", "3", "--save-every", SAVE, "--look-every", "1000", "--threads", "1"]
    for kill in ("3", "2"):
        process = start([*arguments, "--resume"], KILL_AT_SAVE=kill)
        process.communicate()
        assert process.returncode == -9
    done = start([*arguments, "--resume"])
    out_text, err = done.communicate()
    assert done.returncode == 0, err
    same_files(run, out, *RESULTS)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_saves_first(run, tmp_path, monkeypatch, number):
    """SIGTERM and Ctrl-C during step 13 leave the checkpoint of step 13."""
    shrink(monkeypatch)
    out = tmp_path / "run"
    shutil.copytree(run / "tokenizer", out / "tokenizer")
    rate = trainer.learning_rate
    monkeypatch.setattr(trainer, "learning_rate",
                        lambda step, *a: (signal.raise_signal(number) if step == 12 else None, rate(step, *a))[1])
    with pytest.raises(SystemExit) as caught:
        command("--out", out, "--seed", 3, "--stage", "vq")
    assert caught.value.code == 130
    with safe_open(trainer.checkpoints(out, "vq")[-1], framework="pt") as file:
        assert file.metadata()["step"] == "13"
    monkeypatch.setattr(trainer, "learning_rate", rate)
    command("--out", out, "--seed", 3, "--stage", "vq", "--resume")
    same_files(run, out, RESULTS[0], RESULTS[3])


def test_non_finite_steps_are_dropped_then_the_checkpoint_reloaded(run, tmp_path, monkeypatch):
    """One bad step is dropped; three in a row bring back step 10 and other data; the run ends well."""
    shrink(monkeypatch)
    out = tmp_path / "run"
    shutil.copytree(run / "tokenizer", out / "tokenizer")
    forward, calls = train_vq.VQStudent.forward, []

    def poisoned(self, images, quantise, adversary):
        calls.append(images)
        loss, *rest = forward(self, images, quantise, adversary)
        return (loss * (float("nan") if len(calls) in (5, 14, 15, 16) else 1), *rest)

    monkeypatch.setattr(train_vq.VQStudent, "forward", poisoned)
    command("--out", out, "--seed", 3, "--stage", "vq")
    events = [e for e in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "event" in e]
    assert [(e["step"], e["event"]) for e in events] == \
        [(5, "dropped"), (14, "dropped"), (15, "dropped"), (16, "dropped"), (10, "reloaded")]
    assert len(calls) == STEPS + 6 and not torch.equal(calls[10], calls[16])
    weights = load_file(trainer.checkpoints(out, "vq")[-1])
    assert all(w.isfinite().all() for w in weights.values())


def test_a_full_disk_leaves_the_last_checkpoint_whole(run, tmp_path, monkeypatch, capsys):
    shrink(monkeypatch)
    out = tmp_path / "run"
    shutil.copytree(run / "tokenizer", out / "tokenizer")
    write, saves = trainer.save_file, []

    def full(tensors, path, **options):
        saves.append(path)
        if len(saves) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, path, **options)

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(SystemExit) as caught:
        command("--out", out, "--seed", 3, "--stage", "vq")
    assert caught.value.code == 2 and "No space left" in capsys.readouterr().err
    with safe_open(trainer.checkpoints(out, "vq")[-1], framework="pt") as file:
        assert file.metadata()["step"] == "10"
    assert not [p for p in out.rglob(".*")]


def test_resuming_a_finished_run_changes_nothing(run, tmp_path, monkeypatch):
    shrink(monkeypatch)
    out = shutil.copytree(run, tmp_path / "run")
    command("--out", out, "--seed", 3, "--resume")
    same_files(run, out, *RESULTS, "tokens/1/000000.safetensors")


def interrupted(monkeypatch, step, *arguments):
    """A run that SIGTERM ends after a step, and that then goes on."""
    rate = trainer.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "learning_rate", lambda n, *a: (signal.raise_signal(signal.SIGTERM) if n == step - 1 else None, rate(n, *a))[1])
        with pytest.raises(SystemExit):
            command(*arguments)
    command(*arguments, "--resume")


def test_codes_are_revived_alike_after_an_interruption(run, tmp_path, monkeypatch):
    """The count of the codes in use since the last revival outlives a stop between two revivals."""
    shrink(monkeypatch)
    monkeypatch.setitem(train.PRESETS["shapes"], "vq", train.PRESETS["shapes"]["vq"] | dict(steps=130, adversary=130))
    moved, revive = [], train_vq.revive
    monkeypatch.setattr(train_vq, "revive", lambda book, used, *rest: (moved.append(int((used == 0).sum())), revive(book, used, *rest)))
    for name in ("whole", "stopped"):
        shutil.copytree(run / "tokenizer", tmp_path / name / "tokenizer")
        arguments = "--out", tmp_path / name, "--stage", "vq"
        command(*arguments) if name == "whole" else interrupted(monkeypatch, 63, *arguments)
    assert len(moved) == 4 and moved[1] > 0 and moved[:2] == moved[2:], moved
    same_files(tmp_path / "whole", tmp_path / "stopped", RESULTS[0], "vq-0000130.checkpoint.safetensors")


def test_a_frozen_text_encoder_leaves_the_loss_alone(run, tmp_path, monkeypatch):
    """What is logged is the masked tokens' loss, before and after an interruption the same."""
    shrink(monkeypatch)
    monkeypatch.setattr(train, "look", lambda *a: None)
    monkeypatch.setattr(trainer.Log.__init__, "__defaults__", (1,))
    monkeypatch.setitem(train.PRESETS["shapes"]["1"], "text", 0.0)
    for name in ("whole", "stopped"):
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("*.checkpoint.safetensors", "log.jsonl"))
        arguments = "--out", tmp_path / name, "--stage", "1", "--steps", 12
        command(*arguments) if name == "whole" else interrupted(monkeypatch, 5, *arguments)
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines():
        assert json.loads(line)["loss"] == pytest.approx(json.loads(line)["masked_loss"], abs=1e-4)


def test_a_stage_is_over_when_its_model_is_written(run, tmp_path, monkeypatch):
    """Stopped at the last save, while the model is written: the stage goes on, and ends as uninterrupted."""
    shrink(monkeypatch)
    shutil.copytree(run / "tokenizer", tmp_path / "tokenizer")
    write, saves = vq.VQModel.save_pretrained, []

    def full(self, *a):
        saves.append(a)
        if len(saves) == 3:
            raise OSError(28, "No space left on device")
        write(self, *a)

    monkeypatch.setattr(vq.VQModel, "save_pretrained", full)
    with pytest.raises(SystemExit):
        command("--out", tmp_path, "--seed", 3, "--stage", "vq")
    command("--out", tmp_path, "--seed", 3, "--stage", "vq", "--resume")
    same_files(run, tmp_path, RESULTS[0], RESULTS[3])


def test_a_full_disk_is_one_line_in_safetensors_words_too(run, tmp_path, monkeypatch, capsys):
    shrink(monkeypatch)
    shutil.copytree(run / "tokenizer", tmp_path / "tokenizer")

    def full(*a, **k):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(vq, "save_file", full)
    with pytest.raises(SystemExit) as caught:
        command("--out", tmp_path, "--stage", "vq")
    error = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and "No space left" in error[-1] and not any("Traceback" in line for line in error)


def test_a_line_that_was_cut_off_is_no_entry(run, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes((run / "log.jsonl").read_bytes()[:-20])
    assert len(list(trainer.entries(log))) == len((run / "log.jsonl").read_text().splitlines()) - 1
    trainer.draw_losses(log, tmp_path / "loss.png")


def test_a_second_run_in_a_folder_is_refused(run, tmp_path, monkeypatch, capsys):
    shrink(monkeypatch)
    out = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(SystemExit) as caught:
        command("--out", out)
    assert caught.value.code == 2 and "--resume" in capsys.readouterr().err
    same_files(run, out, *RESULTS)


def test_a_stage_done_again_ends_those_after_it(run, tmp_path, monkeypatch):
    """Their checkpoints would else count as theirs who follow."""
    shrink(monkeypatch)
    monkeypatch.setattr(train, "look", lambda *a: None)
    out = shutil.copytree(run, tmp_path / "run")
    command("--out", out, "--stage", "3", "--steps", 2)
    assert [bool(trainer.checkpoints(out, stage)) for stage in ("vq", "1", "3", "4")] == [True, True, True, False]


def test_a_folder_may_be_its_own_beginning(run, tmp_path, monkeypatch):
    shrink(monkeypatch)
    monkeypatch.setattr(train, "look", lambda *a: None)
    out = shutil.copytree(run, tmp_path / "run")
    command("--out", out, "--init", out, "--stage", "4", "--steps", 1, "--lr", 1e-9)
    same_files(run, out, *RESULTS[:3])


def test_the_summary(run, capsys):
    """A line for each stage: its last step, loss, speed and scores."""
    train.summary(SimpleNamespace(out=run))
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["stage", "steps", "loss", "samples/s"] and head.split()[-1] == "overall"
    assert [line.split()[:2] for line in lines] == [["vq", "30"], ["1", "30"], ["3", "4"], ["4", "2"]]
    assert float(lines[1].split()[2]) == pytest.approx(losses(run)["1", 30], abs=1e-4)


def test_a_broken_checkpoint_is_named(tmp_path, monkeypatch, capsys):
    shrink(monkeypatch)
    (tmp_path / "vq-0000010.checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(SystemExit) as caught:
        command("--out", tmp_path, "--stage", "vq", "--resume")
    assert caught.value.code == 2 and "vq-0000010.checkpoint.safetensors" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# At scale


def test_two_processes_equal_one(run, tmp_path):
    """Data parallel over two gloo processes: the same global batches, the same losses to 1e-5; one process writes."""
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        shutil.copytree(run, out, ignore=lambda folder, names: [n for n in names if n.startswith(("1-", "3-", "4-", "transformer", "text_encoder", "log"))])
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        script = Path(tiny(tmp_path)).read_text().replace("train.main", """
trainer.Log.__init__.__defaults__ = (1,)
trainer.Run.precision = lambda self: __import__("contextlib").nullcontext()            # float32: bfloat16 rounds to 1e-3
train.main""")
        (tmp_path / "exact.py").write_text(script)
        process = start([*launcher, tmp_path / "exact.py", "--out", out, "--seed", 3, "--stage", "1", "--resume",
                         "--steps", 12, "--look-every", 1000, "--save-every", 100])
        _, err = process.communicate()
        assert process.returncode == 0, err
        found[processes] = losses(out, "1")
    assert len(found[1]) == len(found[2]) == 12
    for key in found[1]:
        assert abs(found[1][key] - found[2][key]) <= 1e-5 + 1e-5 * abs(found[1][key]), (key, found)


def test_each_process_reads_its_own_part(monkeypatch):
    """The slices of a global batch are disjoint and cover it; a batch that does not divide is refused."""
    parts = []
    for rank in range(4):
        run = object.__new__(trainer.Run)
        run.rank, run.world, run.accumulate = rank, 4, 3
        parts += [int(i) for part, in run.parts(np.arange(24)) for i in part]
    assert sorted(parts) == list(range(24))
    with pytest.raises(sample.UserError, match="4 processes"):
        run.parts(np.arange(10))


# ---------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("arguments", (["--steps", "0", "--stage", "vq"], ["--steps", "5"], ["--stage", "nothing"],
                                       ["--steps", "5", "--stage", "tokenizer"], ["--speed", "1"], ["--device", "nothing"],
                                       ["--data", "/nowhere"], ["--preset", "cpu", "--stage", "4"], ["--shard"],
                                       ["--init", "/nowhere"], ["--without", "everything"], ["--lora", "0"], ["--seed", "-1"],
                                       ["--lr", "0"], ["--lr", "-1"], ["--lora", "2"], ["--stage", "vq", "--steps", "5"]))
def test_bad_arguments(arguments, tmp_path, monkeypatch, capsys):
    shrink(monkeypatch)
    with pytest.raises(SystemExit) as caught:
        command("--out", tmp_path / "run", *arguments)
    assert caught.value.code == 2 and not (tmp_path / "run").exists()
    error = capsys.readouterr().err
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_a_stage_without_what_it_needs(tmp_path, monkeypatch, capsys):
    shrink(monkeypatch)
    with pytest.raises(SystemExit) as caught:
        command("--out", tmp_path / "run", "--stage", "1")
    assert caught.value.code == 2 and "tokenizer" in capsys.readouterr().err


def test_help():
    done = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--resume" in done.stdout
