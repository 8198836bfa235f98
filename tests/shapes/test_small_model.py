"""What a tiny model needs for the world of shapes: computed codes, tied codes, a text encoder."""
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import random_conditioning, tiny_transformer

import clip
import meissonic
import vq
from engine.checkpoint import UserError
from shapes import codebook, text_pretraining, tied_codes, world

COLOURS, OUTLINES = 8, 36
NUM_CODES = 28 * OUTLINES + COLOURS                # 28 pairs of colours


def images_of(rng, number):
    """(number, 3, 64, 64) float32 pictures of the world."""
    pictures = [np.asarray(world.render(world.sample_example(rng)[1], 64)) for _ in range(number)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def images():
    return images_of(np.random.default_rng(0), 120)


@pytest.fixture(scope="module")
def codes(images):
    """(V, 3, 4, 4)"""
    return codebook.block_truncation_codebook(images, COLOURS, OUTLINES, np.random.default_rng(0))


def random_vq(f):
    """A VQ model of f pixels per token, 4, 8 or 16."""
    torch.manual_seed(0)
    channels = {4: (16, 32, 64), 8: (16, 16, 32, 64), 16: (16, 32, 32, 32, 64)}[f]
    return vq.VQModel(vq.Config(
        block_out_channels=channels, layers_per_block=1, latent_channels=24, vq_embed_dim=24,
        num_vq_embeddings=NUM_CODES, norm_num_groups=8)).eval()


@pytest.fixture(scope="module", params=(4, 8, 16), ids="f{}".format)
def patch_vq(images, request):
    model = random_vq(request.param)
    large = enlarged(images[:60], request.param // 4)
    codebook.set_patch_codes(model, large, COLOURS, OUTLINES, np.random.default_rng(0))
    return model


def enlarged(images, scale):
    """Each pixel as scale x scale equal ones."""
    return images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


# ------------------------------------------------------------------------------------------------
# The computed codebook


@torch.no_grad()
def test_the_patch_encoder_sees_its_patch_alone(patch_vq, images):
    """Its latents are the principal components of the patches, averaged to 4 x 4 pixels, whatever
    the neighbours are."""
    f = patch_vq.config.f
    large = enlarged(images[:6], f // 4)
    large = large + 0.02 * torch.randn(large.shape, generator=torch.Generator().manual_seed(0))
    latents = patch_vq.encode_latents(large)                                      # (6, 24, 16, 16)
    patches = codebook.to_patches(F.avg_pool2d(large, f // 4))                     # (1536, 3, 4, 4)
    assert latents.square().sum() > 0.99 * patches.square().sum()                # lengths are kept
    whole = large.unfold(2, f, f).unfold(3, f, f).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    alone = patch_vq.encode_latents(whole).view(6, 16, 16, 24).permute(0, 3, 1, 2)
    torch.testing.assert_close(latents, alone, rtol=0, atol=0.02)


@torch.no_grad()
def test_the_quick_encoder_gives_the_same_tokens(patch_vq, images):
    """Of pictures averaged to 4 pixels per token. It knows which models it is for."""
    scale = patch_vq.config.f // 4
    encode = codebook.PatchEncoder(patch_vq)
    ids = patch_vq.encode(enlarged(images[60:68], scale))                          # (8, 16, 16)
    assert torch.equal(encode(images[60:68]), ids)
    noisy = torch.rand(2, 3, 32 * scale, 32 * scale, generator=torch.Generator().manual_seed(0))
    same = encode(F.avg_pool2d(noisy, scale)) == patch_vq.encode(noisy)
    assert same.float().mean() > 0.98                                    # two codes may be as near
    assert codebook.has_patch_encoder(patch_vq)
    assert not codebook.has_patch_encoder(random_vq(4))


def test_only_the_decoder_is_trained(patch_vq):
    trained = {name.split(".")[0] for name, p in patch_vq.named_parameters() if p.requires_grad}
    assert trained == {"post_quant_conv", "decoder"}
    assert all(p.requires_grad for p in patch_vq.decoder.parameters())


@torch.no_grad()
def test_a_flat_picture_is_one_token(patch_vq):
    values = torch.tensor(list(world.COLOURS.values())) / 255                      # (8, 3)
    side = 4 * patch_vq.config.f
    ids = patch_vq.encode(values[..., None, None].expand(-1, -1, side, side))      # (8, 4, 4)
    assert (ids == ids[:, :1, :1]).all()
    assert ids.unique().tolist() == list(range(NUM_CODES - COLOURS, NUM_CODES))


def test_the_codebook_shows_nearly_all_patches(codes):
    """Measured on other pictures than it was made of: a PSNR of over 30 dB."""
    others = codebook.to_patches(images_of(np.random.default_rng(1), 50)).flatten(1)
    error = torch.cdist(others, codes.flatten(1)).square().amin(1).mean() / 48
    assert codes.shape == (NUM_CODES, 3, 4, 4) and -10 * error.log10() > 30


def test_the_plain_codes_are_the_colours_of_the_world(codes):
    plain = codes[-COLOURS:]                                                       # (8, 3, 4, 4)
    palette = plain[:, :, 0, 0]
    assert (plain == palette[..., None, None]).all()
    assert (palette.sum(1).diff() > 0).all()                                       # dark to light
    expected = (np.array([*world.COLOURS.values()]) / 255).tolist()
    torch.testing.assert_close(sorted(palette.tolist()), sorted(expected), rtol=0, atol=1e-6)


def test_codes_show_the_features_they_are_said_to(codes):
    """A code lies on the line between its two colours. Codes with the same outline have as much of
    the lighter colour in each pixel."""
    features = codebook.code_features(COLOURS, OUTLINES)
    assert features.shape == (NUM_CODES, 8 + 28 + 36 + 1 + 8 * 36)
    palette = codes[-COLOURS:, :, 0, 0]                                            # (8, 3)
    pixels = codes.flatten(2).mT                                                   # (V, 16, 3)
    is_edge = features[:, 72] == 0
    outline = features[:, 36:72].argmax(1)
    for code in range(0, 1008, 41):
        dark, light = palette[features[code, :8].nonzero()[:, 0]]
        share = (pixels[code] - dark) @ (light - dark) / (light - dark).square().sum()   # (16,)
        alike = (is_edge & (outline == outline[code])).nonzero()[:, 0]
        assert len(alike) == 28 and code in alike
        for other in {code, *alike[::9].tolist()}:
            dark, light = palette[features[other, :8].nonzero()[:, 0]]
            expected = dark + share[:, None] * (light - dark)                      # (16, 3)
            torch.testing.assert_close(pixels[other], expected, rtol=0, atol=1e-5)


def test_outlines_come_in_pairs(codes):
    """The second half is the first with the two colours exchanged."""
    edges = codes[:-COLOURS].unflatten(0, (28, 2, OUTLINES // 2))       # (28, 2, 18, 3, 4, 4)
    dark, light = codes[-COLOURS:][torch.combinations(torch.arange(COLOURS))].transpose(0, 1)
    sums = edges.sum(1)                                                            # (28, 18, ...)
    torch.testing.assert_close(sums, (dark + light)[:, None].expand_as(sums), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="35 outlines"):
        codebook.block_truncation_codebook(torch.rand(1, 3, 16, 16), 2, 35, None)


def test_codes_that_fill_the_same_part_with_a_colour(codes):
    """Have that colour in the same pixels, whatever the other colour is, darker or lighter."""
    features = codebook.code_features(COLOURS, OUTLINES)
    filled = features[:, -COLOURS * OUTLINES:].view(NUM_CODES, COLOURS, OUTLINES)
    assert (filled[:-COLOURS].sum((1, 2)) == 2).all() and not filled[-COLOURS:].any()
    assert (filled.sum(0) == COLOURS - 1).all()         # one code for each other colour
    palette = codes[-COLOURS:, :, 0, 0]                                            # (8, 3)
    pixels = codes.flatten(2).mT                                                   # (V, 16, 3)
    for colour in range(COLOURS):
        for part in range(0, OUTLINES, 5):
            shares = []
            for code in filled[:, colour, part].nonzero()[:, 0]:
                pair = features[code, :COLOURS].nonzero()[:, 0].tolist()
                other = palette[sum(pair) - colour]
                span = palette[colour] - other
                shares.append((pixels[code] - other) @ span / span.square().sum())
            shares = torch.stack(shares)                                           # (7, 16)
            torch.testing.assert_close(shares, shares[:1].expand_as(shares), rtol=0, atol=1e-4)


def test_pictures_of_too_few_colours_are_refused():
    images = torch.eye(16).expand(1, 3, 16, 16)
    with pytest.raises(UserError, match="2 colours.*wants 8"):
        codebook.block_truncation_codebook(images, COLOURS, OUTLINES, np.random.default_rng(0))


# ------------------------------------------------------------------------------------------------
# Tied codes

TWINS = torch.eye(20).repeat(2, 1)                 # (40, 20): codes c and c + 20 have one feature


@pytest.fixture
def model():
    return tiny_transformer().requires_grad_(True)


def logits_of(model):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.codebook_size, (2, 4, 4), generator=g)
    cond = random_conditioning(g, 2, model)
    return model(ids, cond.hidden, cond.pooled, cond.micro_conds, torch.tensor([0.3, 0.7]))


def test_tying_changes_no_output(model):
    before = logits_of(model)
    tied_codes.tie_codes(model, TWINS, fresh=False)
    torch.testing.assert_close(logits_of(model), before)


def test_a_step_on_one_code_moves_the_codes_that_share_a_feature(model):
    tied_codes.tie_codes(model, TWINS, fresh=False)
    embedding = model.embed.embeddings
    before = embedding.weight.detach().clone()                                     # (V + 1, C)
    embedding(torch.tensor([7])).sum().backward()
    torch.optim.SGD(embedding.parameters(), lr=0.1).step()
    assert (embedding.weight != before).any(1).nonzero()[:, 0].tolist() == [7, 27]


def test_untied_state_is_that_of_a_plain_model(model):
    tied_codes.tie_codes(model, TWINS, fresh=False)
    before = logits_of(model)
    before.square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    after = logits_of(model)
    plain = tiny_transformer(seed=1)
    plain.load_state_dict(tied_codes.untie(model, model.state_dict()))
    torch.testing.assert_close(logits_of(plain), after)
    assert not torch.allclose(after, before)


def test_the_state_of_a_plain_model_stays(model):
    state = model.state_dict()
    untied = tied_codes.untie(model, state)
    assert untied.keys() == state.keys() and all(untied[name] is state[name] for name in state)


def test_fresh_codes_are_the_sum_of_their_features(model):
    tied_codes.tie_codes(model, TWINS, fresh=True)
    for weight in (model.embed.embeddings.weight, model.mlm_layer.conv2.weight):
        assert torch.equal(weight[:20], weight[20:40])
        assert len(weight[:20].unique(dim=0)) == 20


# ------------------------------------------------------------------------------------------------
# Text pretraining


def pretraining_task(out, steps, batch):
    """A text Task of one process with a tiny text encoder."""
    def rng(stage, step, attempt):
        return np.random.default_rng([step, attempt])

    tokenizer = clip.learn_tokenizer(world.sample_captions(0, 4000), 32)
    vocabulary = tokenizer.bpe.get_vocab()
    torch.manual_seed(0)
    text_encoder = clip.TextEncoder(clip.Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=192, max_position_embeddings=32, vocab_size=len(vocabulary),
        eos_token_id=vocabulary[clip.END]))
    for embedding in (m for m in text_encoder.modules() if isinstance(m, torch.nn.Embedding)):
        torch.nn.init.normal_(embedding.weight, std=0.3)           # as train.py does
    run = SimpleNamespace(device=torch.device("cpu"), accumulate=1, out=out, rng=rng,
                          rank_slice=lambda *batch: [batch], precision=contextlib.nullcontext,
                          to_device=torch.as_tensor)
    settings = {"steps": steps, "batch": batch, "lr": 4e-3}
    return text_pretraining.text_task(run, text_encoder, tokenizer, settings, {})


def train(task, steps):
    """Train on the batches of these steps -> the losses."""
    optimizer = torch.optim.AdamW(task.param_groups(), betas=(0.9, 0.98))
    losses = []
    for i, step in enumerate(steps):
        warmup = min(1, 3 * (i + 1) / len(steps))
        for group in optimizer.param_groups:
            group["lr"] = task.lr * warmup * 0.5 * (1 + np.cos(np.pi * i / len(steps)))
        optimizer.zero_grad()
        for loss, _ in task.micro_batches(task.module, step, 0):
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(task.module.parameters(), 1.0)
        optimizer.step()
    return losses


def blind_loss(number=500):
    """The loss of one who knows how often each label is true, but not the caption."""
    _, labels = text_pretraining.sample_labels(np.random.default_rng(0), number, False, {})
    p = labels.mean(0).clamp(1e-6, 1 - 1e-6)                                       # (182,)
    return float(-(p * p.log() + (1 - p) * (1 - p).log()).mean())


def test_the_text_encoder_overfits_one_batch(tmp_path):
    losses = train(pretraining_task(tmp_path, steps=1, batch=8), [0] * 40)
    assert losses[-1] < 0.7 * blind_loss() < losses[0]


@pytest.mark.slow
def test_the_text_encoder_learns_what_captions_say(tmp_path):
    """It answers better than by how often each label is true."""
    losses = train(pretraining_task(tmp_path, steps=300, batch=32), range(300))
    assert np.mean(losses[-25:]) < 0.95 * blind_loss()


def test_pretraining_saves_the_text_encoder_alone(tmp_path):
    task = pretraining_task(tmp_path, steps=1, batch=4)
    task.save(task.module.state_dict())
    saved = clip.TextEncoder.from_pretrained(tmp_path / "text_encoder").state_dict()
    trained = task.module.text_encoder.state_dict()
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], trained[name].half().float()) for name in saved)


@pytest.mark.parametrize("relations_only, lowest, highest", ((True, 1, 1), (False, 0.5, 0.7)))
def test_share_of_captions_with_a_relation(relations_only, lowest, highest):
    rng = np.random.default_rng(0)
    captions, labels = text_pretraining.sample_labels(rng, 200, relations_only, {})
    wordings = [wording for pair in world.RELATIONS.values() for wording in pair]
    share = np.mean([any(f" {w} " in caption for w in wordings) for caption in captions])
    assert lowest <= share <= highest
    assert labels.shape == (200, text_pretraining.NUM_LABELS)


# ------------------------------------------------------------------------------------------------
# The score, a micro condition


@pytest.mark.slow
def test_a_low_score_asks_for_a_degraded_picture(steps=500, batch=32):
    """A model that is trained on pictures with their scores draws clean ones for CLEAN_SCORE, and
    degraded ones for 4 less. Its codes are 20 greys of 2 x 2 pixels, 20 more if they are uneven."""
    examples = [grey_example(i) for i in range(1500)]
    ids = torch.stack([ids for ids, _ in examples])                                # (1500, 8, 8)
    micro_conds = torch.stack([micro_conds for _, micro_conds in examples])        # (1500, 5)
    clean, degraded = micro_conds[:, 4] == world.CLEAN_SCORE, micro_conds[:, 4] < 4
    assert share_uneven(ids[clean]) < 0.3 and share_uneven(ids[degraded]) > 0.9
    model = tiny_transformer().requires_grad_(True).train()
    cond = random_conditioning(torch.Generator().manual_seed(0), batch, model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    rng = np.random.default_rng(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        chosen = rng.integers(len(ids), size=batch)
        loss = masked_loss(model, ids[chosen], cond, micro_conds[chosen], rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert share_uneven(draw_with_score(model, cond, world.CLEAN_SCORE)) < 0.4
    assert share_uneven(draw_with_score(model, cond, world.CLEAN_SCORE - 4)) > 0.8


def grey_example(i):
    """-> ids (8, 8) int64 of a 16 x 16 picture, micro_conds (5,)."""
    rng = np.random.default_rng([5, i])
    picture, _, micro_conds = world.training_example(rng, 16, concepts=1.0, augment_prob=0.5)
    blocks = picture.astype(float).reshape(8, 2, 8, 2, 3).swapaxes(1, 2).reshape(8, 8, 4, 3)
    grey = blocks.mean((2, 3)) // 13
    uneven = blocks.std(2).max(-1) > 6
    return torch.from_numpy(grey + 20 * uneven).long(), torch.from_numpy(micro_conds)


def share_uneven(ids):
    return (ids >= 20).float().mean().item()


def masked_loss(model, ids, cond, micro_conds, rng):
    """Mean cross-entropy of masked ids, at a rate drawn as in section 2.2."""
    rates = np.cos(np.pi / 2 * rng.random(len(ids)))
    mask = torch.from_numpy(rng.random(ids.shape) < rates[:, None, None])          # (B, h, w)
    masked_ids = ids.masked_fill(mask, model.config.mask_token)
    timestep = torch.from_numpy(rates).float()
    logits = model(masked_ids, cond.hidden, cond.pooled, micro_conds, timestep)    # (B, h, w, V)
    return F.cross_entropy(logits[mask], ids[mask])


def draw_with_score(model, cond, score):
    """-> ids (B, 8, 8)."""
    batch = len(cond.hidden)
    micro_conds = torch.tensor([16.0, 16, 0, 0, score]).expand(batch, 5)
    cond = meissonic.Conditioning(cond.hidden, cond.pooled, micro_conds)
    predict = meissonic.reference_predictor(model, cond, cond)
    plan = meissonic.Schedule(16, 1.0, (2.0, 0.0), "cosine", "rate").plan(64, 64)
    empty = torch.full((batch, 8, 8), model.config.mask_token)
    return meissonic.sample(predict, empty, model.config.mask_token, range(batch), plan)
