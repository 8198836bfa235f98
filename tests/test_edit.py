"""Editing and seeing, on a tiny random model: what must hold whatever the weights are."""
import io
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from common import GOLDEN, random_text, tiny_transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence
from test_sample import MODEL, SMALL, assert_refused, picture, tree

import data
import disk
import editing
import meissonic
import sample
from pipeline import JUDGED, MOST_PARTS, candidate_seed, shortened

RUN = SMALL[:-4] + ("--steps", 4)                                             # at the model's size or the picture's
PNG = (*RUN, "--out", "a.png")


LOADED = lru_cache(sample.Pipeline)


@pytest.fixture(autouse=True)
def load_once(monkeypatch):
    """Most of a small run is reading the model: here it is read once for all."""
    monkeypatch.setattr(sample, "Pipeline", LOADED)


@pytest.fixture(scope="module")
def pipeline():
    return LOADED(MODEL, torch.device("cpu"), torch.float32, None)


def noise(width=64, height=64, mode="RGB", seed=0):
    """A random picture of any mode, with every alpha and palette index."""
    rng = np.random.default_rng(seed)
    bands = len(Image.new(mode if mode != "I;16" else "L", (1, 1)).getbands())
    pixels = rng.integers(0, 256, (height, width, bands), np.uint8)
    if mode in ("P", "1"):
        return Image.fromarray(pixels[..., 0]).convert(mode)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), np.uint16))
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def box(width, height, left, top, right, bottom):
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def as_picture(mask):
    return Image.fromarray(mask.astype(np.uint8) * 255)


def pixels(path):
    return np.asarray(picture(path))


def as_read(path):
    """The pixels that an edit must bring back."""
    return np.asarray(disk.read_picture(path)[0])


# ---------------------------------------------------------------------------------------------------------
# Masks

MASKS = st.builds(lambda h, w, seed, share: np.random.default_rng(seed).random((h, w)) < share,
                  st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.sampled_from((0.01, 0.5, 0.99, 1.0)))


@settings(deadline=None)
@given(MASKS, st.integers(1, 12), st.integers(1, 12))
def test_a_cell_is_touched_if_any_of_its_pixels_is(mask, h, w):
    """Against the definition: the pixel's square and the cell's share an area."""
    found, (height, width) = editing.shrink(mask, h, w), mask.shape
    assert found.shape == (h, w)
    for i in range(h):
        for j in range(w):
            rows = [y for y in range(height) if y * h < (i + 1) * height and (y + 1) * h > i * height]
            columns = [x for x in range(width) if x * w < (j + 1) * width and (x + 1) * w > j * width]
            assert found[i, j] == mask[np.ix_(rows, columns)].any()


@settings(deadline=None)
@given(MASKS, st.integers(0, 6))
def test_a_feather_lies_inside_the_mask(mask, feather):
    soft = np.asarray(editing.feathered(mask, feather))
    assert ((soft == 0) == ~mask).all()
    if feather == 0 or mask.all():
        assert (soft[mask] == 255).all()


def test_a_feather_rises_over_its_pixels():
    soft = np.asarray(editing.feathered(box(40, 40, 10, 10, 40, 40), 3))
    assert soft[25, 8:16].tolist() == [0, 0, 64, 128, 191, 255, 255, 255] and soft[25, 39] == 255


@settings(deadline=None, max_examples=15)
@given(MASKS, st.sampled_from(("RGB", "RGBA")), st.integers(0, 4), st.integers(0, 9))
def test_inpainting_any_mask(pipeline, mask, mode, feather, seed):
    """Pixels outside are the picture's, byte for byte; tokens that it does not touch stay, the others are masked."""
    original = noise(mask.shape[1], mask.shape[0], mode, seed)
    edit, size = editing.Edit(original, mask, feather), (64, 96)
    start = edit.start(pipeline, ["x"], [seed], size)[0]
    whole = editing.Edit(original, strength=0).start(pipeline, ["x"], [seed], size)[0]
    touched = torch.from_numpy(editing.shrink(mask, *start.shape))
    assert ((start == 71) == touched).all() and (start[~touched] == whole[~touched]).all()
    done = edit.finish(noise(*size, seed=seed + 1))
    assert done.size == original.size and done.mode == mode
    assert (np.asarray(done)[~mask] == np.asarray(original)[~mask]).all()


MODES = (("RGB", "png"), ("RGBA", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("1", "png"), ("I;16", "png"), ("CMYK", "jpg"),
         ("RGB", "jpg"), ("L", "tiff"))


@pytest.mark.parametrize("mode, kind", MODES)
@pytest.mark.parametrize("flags", (["--mask", "m.png", "--feather", 2], ["--outpaint", "5,0,30,7"]), ids=lambda f: f[0])
def test_every_mode_comes_back_exactly(cli, mode, kind, flags):
    """Odd sizes that no grid takes; the mask of another size and mode."""
    noise(75, 50, mode).save(f"p.{kind}")
    as_picture(box(30, 20, 6, 4, 18, 12)).convert("LA").save("m.png")
    assert cli("--image", f"p.{kind}", *flags, *PNG)[0] == 0
    done, original = pixels("a.png"), as_read(f"p.{kind}")
    if flags[0] == "--mask":
        kept = ~box(75, 50, 15, 6, 45, 30)                                    # where 30 x 20 lies on 75 x 50
        assert done.shape == original.shape and (done[kept] == original[kept]).all() and (done != original).any()
    else:
        assert done.shape[:2] == (57, 110) and (done[:50, 5:80] == original).all()


@pytest.mark.parametrize("flags", (["--model", GOLDEN / "plain"], ["--dtype", "bfloat16"], ["--dtype", "float16"]),
                         ids=("plain", "bfloat16", "float16"))
def test_other_layouts_and_dtypes(cli, flags):
    """Without compression the grid takes 48 pixels; the decoder's dtype is its own."""
    noise(75, 50).save("p.png")
    as_picture(box(75, 50, 0, 0, 75, 25)).save("m.png")
    assert cli("--image", "p.png", "--mask", "m.png", *PNG, *flags)[0] == 0
    assert (pixels("a.png")[25:] == as_read("p.png")[25:]).all() and (pixels("a.png")[:25] != as_read("p.png")[:25]).any()
    assert cli("--image", "p.png", "--prompt", "a star", "--source", "a heart", *PNG, *flags)[0] == 0
    assert picture("a.png").size == (75, 50)


def test_a_turned_photograph(cli):
    """EXIF orientation: the mask is as the picture is seen, and so is the result."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(80, 40).save("p.jpg", exif=exif)
    as_picture(box(40, 80, 0, 0, 40, 20)).save("m.png")
    assert cli("--image", "p.jpg", "--mask", "m.png", *PNG)[0] == 0
    assert picture("a.png").size == (40, 80) and (pixels("a.png")[20:] == as_read("p.jpg")[20:]).all()


def test_transparent_parts_of_a_mask_are_not_white(cli):
    noise().save("p.png")
    mask = np.zeros((64, 64, 4), np.uint8)
    mask[:, :, :3], mask[:32, :32, 3] = 255, 255
    Image.fromarray(mask).save("m.png")
    assert cli("--image", "p.png", "--mask", "m.png", *PNG)[0] == 0
    assert (pixels("a.png")[32:] == as_read("p.png")[32:]).all() and (pixels("a.png")[:32, :32] != as_read("p.png")[:32, :32]).any()


@pytest.mark.parametrize("size", ("64x128", "96x128"))
def test_a_full_mask_is_text_to_image(cli, size):
    """At 1:2 and 3:4; so is image to image at strength 1."""
    width, height = map(int, size.split("x"))
    noise(width, height).save("p.png")
    as_picture(np.ones((7, 5), bool)).save("m.png")
    base = ("--prompt", "a star", "--seed", 3, *RUN)
    assert cli(*base, "--size", size, "--out", "text.png")[0] == 0
    for name, flags in (("mask", ["--mask", "m.png"]), ("strength", ["--strength", 1]), ("free", ["--strength", 1, "--source", "x"])):
        assert cli(*base, "--image", "p.png", *flags, "--out", f"{name}.png")[0] == 0
        assert (pixels(f"{name}.png") == pixels("text.png")).all(), name


# ---------------------------------------------------------------------------------------------------------
# The whole picture


def test_strength(pipeline):
    """0 is the picture through the VQ model; what a strength redraws, a greater one does too; it is ever less alike."""
    original = noise(256, 256).resize((16, 16)).resize((256, 256))
    plain, = pipeline.decode(pipeline.encode_picture(original))
    masks, far = [], []
    for strength in (0, 0.25, 0.5, 0.75, 1):
        edit = editing.Edit(original, strength=strength)
        tokens = edit.start(pipeline, ["a star"] * 2, [0, 1], (256, 256))
        made = pipeline(["a star"] * 2, [0, 1], size=(256, 256), tokens=tokens, steps=edit.steps(8))
        masks.append(tokens == 71)
        far.append(np.mean([np.abs(np.asarray(p, float) - np.asarray(plain, float)).mean() for p in made]))
    assert far[0] < 0.01 and (np.diff(far) > 0).all(), far                    # at 0 but for rounding
    assert [m[0].sum().item() for m in masks] == [0, 64, 128, 192, 256]
    assert all((a <= b).all() for a, b in zip(masks, masks[1:])) and (masks[1][0] != masks[1][1]).any()
    assert [editing.Edit(original, strength=s).steps(8) for s in (0, 0.5, 1)] == [1, 4, 8]


@pytest.mark.parametrize("convention", ("step", "rate", "rate1000"))
def test_likelihoods(convention):
    """With all masked, the model's own log-probabilities; a rate of a half leaves half of the tokens unseen."""
    model, generator = tiny_transformer(), torch.Generator().manual_seed(0)
    texts = [random_text(generator, 2, model) for _ in range(2)]
    tokens = torch.randint(0, 40, (2, 6, 4), generator=generator)
    found = meissonic.likelihoods(model, tokens, texts, (1.0,), convention)
    time = torch.tensor([meissonic.timestep(convention, 0, 48, 24, 24)])
    for text, one in zip(texts, found):
        logits = model(torch.full_like(tokens, model.config.mask_token), text.hidden, text.pooled, text.micro_conds, time)
        torch.testing.assert_close(one, logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0], rtol=1e-4, atol=1e-5)
    half = meissonic.likelihoods(model, tokens, texts, (0.5,), convention)
    assert found.shape == half.shape == (2, 2, 6, 4) and ((half == 0).flatten(2).sum(-1) == 12).all() and half.max() <= 0


@given(st.lists(st.text("ab,", min_size=1, max_size=3), max_size=40))
def test_a_prompt_without_each_of_its_parts(words):
    """Each part is left out once, alone; a part is one word as long as there are not too many."""
    short = [prompt.split() for prompt in shortened("  ".join(words))]
    assert len(short) == min(len(words), MOST_PARTS)
    assert sum(len(words) - len(rest) for rest in short) == len(words)
    start = 0
    for rest in short:
        stop = start + len(words) - len(rest)
        assert stop > start and rest == words[:start] + words[stop:]
        start = stop


def test_the_candidate_that_fits_best_is_taken(pipeline):
    """Each is the picture of a seed of its own, the first that of the picture's, beside any others; fitting is what is likely
    and no likelier with a word of the prompt left out; the film is of the one taken."""
    prompts, seeds, seen = ["a star", "a big red heart"], [5, 2 ** 63 - 1], []
    drawn = pipeline.draw(prompts, seeds, "a cross", candidates=3, steps=3, cfg=4, watch=lambda *moment: seen.append(moment))
    places, penalties = [], []
    for prompt, seed, tokens in zip(prompts, seeds, drawn):
        each = torch.cat([pipeline.draw([prompt], [candidate_seed(seed, k)], "a cross", candidates=1, steps=3, cfg=4)
                          for k in range(3)])
        words, likely = prompt.split(), []
        for told in (prompt, *(" ".join(w for w in words if w != one) for one in words)):
            text = pipeline.encode_text([told] * 3, *pipeline.size, pipeline.score_condition)
            likely.append([meissonic.likelihoods(pipeline.transformer, each, [text], rates, pipeline.convention)[0].mean((1, 2))
                           for rates in (JUDGED, JUDGED[:4])])
        penalty = sum(torch.relu(untold - likely[0][1]) for _, untold in likely[1:])
        fit = likely[0][0] - 4 * penalty
        places.append(fit.argmax().item())
        penalties.append(penalty)
        assert (tokens == each[places[-1]]).all() and fit.max() > fit.min()
    assert any(places) and torch.cat(penalties).any() and candidate_seed(-7, 0) == -7
    assert [n for n, _, _ in seen] == [0, 1, 2, 3] and (seen[-1][1] == drawn).all() and not seen[-1][2].any()


@pytest.mark.parametrize("convention", ("step", "rate", "rate1000"))
def test_a_change_of_opinion(convention):
    """None between equal captions, the opposite the other way round, each picture's its own; chance follows no state."""
    model, generator = tiny_transformer(), torch.Generator().manual_seed(0)
    old, new = (random_text(generator, 2, model) for _ in range(2))
    tokens = torch.randint(0, 40, (2, 6, 4), generator=generator)
    change = lambda *texts: meissonic.opinion_change(model, tokens, *texts, convention)
    there = change(old, new)
    assert there.shape == tokens.shape and there.isfinite().all() and there.abs().max() > 0.01
    assert change(old, old).abs().max() == 0
    torch.testing.assert_close(change(new, old), -there)
    swapped = meissonic.opinion_change(model, tokens.flip(0), *(meissonic.Text(t.hidden.flip(0), t.pooled.flip(0), t.micro_conds)
                                                                for t in (old, new)), convention)
    torch.testing.assert_close(swapped.flip(0), there, rtol=1e-4, atol=1e-5)


def test_mask_free_editing_redraws_where_opinion_changes(pipeline):
    edit = editing.Edit(noise(128, 128), strength=0.3, source="a heart")
    tokens = edit.start(pipeline, ["a star", "a heart"], [0, 1], (128, 128))
    whole = pipeline.encode_picture(edit.picture)
    rank = edit.rank(pipeline, whole.repeat(2, 1, 1), ["a star", "a heart"], [0, 1], None)
    masked = tokens == 71
    assert masked.flatten(1).sum(1).tolist() == [19, 19] and (tokens[~masked] == whole.repeat(2, 1, 1)[~masked]).all()
    assert rank[0][masked[0]].min() >= rank[0][~masked[0]].max() and rank[1].abs().max() == 0


def test_mask_free_editing_on_the_command_line(cli):
    """The prompt alone is an edit from the empty caption; another source is another edit."""
    noise(100, 70).save("p.png")
    for name, flags in (("a", []), ("b", ["--source", ""]), ("c", ["--source", "a heart and a cross"])):
        assert cli("--image", "p.png", "--prompt", "a star", *flags, *RUN, "--size", "128x96", "--out", f"{name}.png")[0] == 0
    assert picture("a.png").size == (100, 70) and (pixels("a.png") == pixels("b.png")).all()
    assert picture("a.png").text["source"] == "" and picture("c.png").text["source"] == "a heart and a cross"


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(data.EDITS), st.integers(0, 999))
def test_edits_of_the_world(kind, seed):
    """The picture shows the old caption, not the new one; what an edit keeps is not what it is about."""
    edit = data.sample_edit(np.random.default_rng(seed), kind, 64)
    scene = data.read(edit.picture)
    assert not data.holds(scene, edit.claim) and edit.old != edit.new
    assert edit.keep.shape == (64, 64) and 0 < edit.keep.mean() < 1
    painted = np.asarray(edit.picture).copy()
    painted[~edit.keep] = data.COLOURS[scene.background]
    left = len(data.read(Image.fromarray(painted)).items)                     # of the objects those stay that it must keep
    assert left == {"recolour": 1, "turn": 1, "remove": 1, "background": 2, "add": 1}[kind]


def test_the_score_of_edits(cli, pipeline):
    status, out, _ = cli(*SMALL, "--score-edits", 1)
    assert status == 0 and [line.split()[0] for line in out.splitlines()[3:]] == list(data.EDITS) and tree(".") == []
    table = editing.score_edits(pipeline, 2, strength=0, size=(64, 64), steps=1, progress=iter)
    assert all(free == plain for free, plain in table.values())               # nothing redrawn: the same either way


def test_schedules(cli):
    """Counted over the masked region alone."""
    assert meissonic.masked_counts(4, 8, "linear") == [6, 4, 2, 0]
    noise(128, 128).save("p.png")
    as_picture(box(128, 128, 0, 0, 64, 64)).save("m.png")
    for name in ("cosine", "linear"):
        assert cli("--image", "p.png", "--mask", "m.png", *RUN, "--schedule", name, "--out", f"{name}.png")[0] == 0
    assert (pixels("cosine.png") != pixels("linear.png")).any()


# ---------------------------------------------------------------------------------------------------------
# Seeing


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.integers(1, 20), st.integers(1, 24))
def test_what_watch_sees(seed, steps, known):
    """steps + 1 moments: all that was to be drawn masked at first, less each time, none at last; beliefs are whole."""
    model, seen = tiny_transformer(), []
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 40, (2, 4, 6), generator=generator).flatten(1)
    start[:, torch.randperm(24, generator=generator)[known:]] = model.config.mask_token
    start = start.view(2, 4, 6)
    text, negative = (random_text(generator, 2, model) for _ in range(2))
    done = meissonic.sample(model, text, negative, start, [seed, 1], steps, 3.0, watch=lambda *now: seen.append(now))
    assert [i for i, _, _ in seen] == list(range(steps + 1))
    assert (seen[0][2] == (start == model.config.mask_token)).all() and not seen[-1][2].any() and (seen[-1][1] == done).all()
    for (_, believed, masked), (_, _, later) in zip(seen, seen[1:] + seen[-1:]):
        assert (later <= masked).all() and believed.max() < 40 and (believed[~masked] == done[~masked]).all()
    assert (meissonic.sample(model, text, negative, start, [seed, 1], steps, 3.0) == done).all()


@pytest.mark.parametrize("flags, grid", ((["--film", 3], 0), (["--film-tokens", 5], 1), (["--film"], 0)))
def test_a_film_has_the_frames_asked_for(cli, flags, grid):
    """Strip and animation; at first nothing is known, at last everything."""
    assert cli("--prompt", "a star", *SMALL, "--steps", 7, *flags, "--out", "a.png")[0] == 0
    assert tree(".") == ["a-film.gif", "a-film.png", "a.png"]
    number = (flags + [8])[1]
    with Image.open("a-film.gif") as gif:
        assert gif.n_frames == number
        sizes = {frame.size for frame in ImageSequence.Iterator(gif)}
    strip = pixels("a-film.png")
    assert strip.shape == (2 * 64 + 8, number * 68 - 4, 3) and sizes == {(64, 136)}
    first, last = strip[66:130, :64], strip[66:130, -64:]
    assert (strip[:64, -64:] == pixels("a.png")).all()
    assert (first[1:15, 1:15] == 128).all() and ((first == 0).all(-1).sum() > 0) == bool(grid)
    assert grid or ((first == 128).all() and (last == strip[:64, -64:]).all())


def test_a_film_of_an_edit(cli):
    """Grey is what the mask touches."""
    noise(64, 64).save("p.png")
    as_picture(box(64, 64, 0, 0, 64, 16)).save("m.png")
    assert cli("--image", "p.png", "--mask", "m.png", *RUN, "--film", 2, "--out", "a.png")[0] == 0
    strip = pixels("a-film.png")
    assert (strip[66:82, :64] == 128).all() and (strip[82:130, :64] == strip[16:64, :64]).all()


@pytest.mark.parametrize("axes", (["steps=1,3", "cfg=1,4.5"], ["temperature=0,9", "seed=5,-2"], ["strength=0,1", "score-condition=6,1"],
                                  ["seed=1,2,3"], ["redraws=0,2"], ["candidates=1,3"]), ids=" ".join)
def test_a_sweep_is_its_single_runs(cli, axes):
    noise(64, 64).save("p.png")
    base = ("--prompt", "a star", *RUN, "--size", 64, *(["--image", "p.png"] if "strength" in axes[0] else []))
    assert cli(*base, "--sweep", *axes, "--out", "sheet.png")[0] == 0
    assert tree(".") == ["p.png", "sheet.png"]
    sheet, (across, columns), (down, lines) = pixels("sheet.png"), *([a.split("=") for a in axes] + [("", "")])[:2]
    width = (sheet.shape[1] - 64 * len(columns.split(","))) // 1
    for j, y in enumerate(lines.split(",")):
        for i, x in enumerate(columns.split(",")):
            flags = [f for name, value in ((across, x), (down, y)) if name for f in
                     ([f"--{name}", value, 0] if name == "temperature" else [f"--{name}={value}"])]
            assert cli(*base, *flags, "--out", "one.png")[0] == 0
            windows = np.lib.stride_tricks.sliding_window_view(sheet[20 + 68 * j:84 + 68 * j], (64, 64, 3))[0, :, 0]
            found = [k for k, window in enumerate(windows) if (window == pixels("one.png")).all()]
            assert len(found) >= 1 and found[0] < width + 64 * (i + 1), (x, y)


def test_reconstruct(cli, pipeline):
    noise(70, 50).save("p.png")
    status, out, _ = cli("--reconstruct", "p.png", *PNG)
    sheet = pixels("a.png").astype(float)
    assert status == 0 and sheet.shape == (50, 144, 3) and (sheet[:, :70] == as_read("p.png")).all()
    error = ((sheet[:, :70] - sheet[:, 74:]) ** 2).mean()
    assert float(re.search(r"PSNR (\S+) dB", out)[1]) == pytest.approx(10 * np.log10(255 ** 2 / error), abs=0.01)
    assert error > 0


# ---------------------------------------------------------------------------------------------------------
# Settings in the PNG


@pytest.mark.parametrize("flags", (
    ["--negative", "ein Grün\nund -1", "--cfg", -1.5, "--temperature", 1, -0.5, "--schedule", "linear", "--score-condition", 3, "--redraws", 2],
    ["--candidates", 3, "--film", 2],
    ["--n", 3, "--seed=-2", "--film", 2], ["--image", "p.png", "--mask", "m.png", "--feather", 3], ["--image", "p.png", "--source", ""],
    ["--image", "p.png", "--strength", 0.5], ["--image", "p.png", "--outpaint", "0,3,0,9"], ["--sweep", "cfg=1,2", "seed=0,1"],
    ["--reconstruct", "p.png"]), ids=lambda f: f[0] + str(f[-1]))
def test_like_makes_it_again(cli, flags):
    """Every PNG of a run, bit for bit, its settings too."""
    noise(70, 50).save("p.png")
    as_picture(box(70, 50, 3, 4, 30, 30)).save("m.png")
    assert cli("--prompt", "-a * \U0001f3a8", *RUN, *([] if "--image" in flags else ["--size", 64]), *flags)[0] == 0
    made = sorted(Path("out").glob("*.png"))
    assert made and {"seed", "model", "software", "weights", "steps", "cfg"} <= picture(made[0]).text.keys()
    for path in made[-2:]:
        status, _, err = cli("--like", path, "--out", "again/")
        assert status == 0 and "note" not in err, err
        again = next(p for p in Path("again").glob("*.png") if p.name.endswith(path.name))
        assert again.read_bytes() == path.read_bytes()


def test_like_with_one_setting_changed(cli):
    """As if that flag had been another from the start; the others stay."""
    base = ("--prompt", "a star", *SMALL, "--seed", 5)
    assert cli(*base, "--out", "a.png")[0] == 0 and cli(*base, "--cfg", 2, "--out", "b.png")[0] == 0
    assert cli("--like", "a.png", "--cfg", 2, "--out", "c.png")[0] == 0
    assert Path("c.png").read_bytes() == Path("b.png").read_bytes() != Path("a.png").read_bytes()
    assert cli("--like", "a.png", "--prompt", "a heart", "--out", "d.png")[0] == 0
    changed = {k for k, v in picture("d.png").text.items() if picture("a.png").text[k] != v}
    assert changed == {"prompt"}


def test_like_notices_other_inputs(cli):
    noise(64, 64).save("p.png")
    assert cli("--image", "p.png", "--strength", 0.5, *PNG)[0] == 0
    noise(64, 64, seed=1).save("p.png")
    assert_refused(cli, ["--like", "a.png"], "p.png", "changed")
    assert cli("--prompt", "x", *SMALL, "--out", "b.png")[0] == 0
    changed, about = picture("b.png"), picture("b.png").text | {"software": "torch 0"}
    sample.write_picture(Path("b.png"), changed, about)
    status, _, err = cli("--like", "b.png", "--out", "c.png")
    assert status == 0 and "torch 0" in err


# ---------------------------------------------------------------------------------------------------------
# Bad input


@lru_cache
def huge():
    file = io.BytesIO()
    Image.new("1", (20000, 20000)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def files(cli):
    noise(64, 64).save("p.png")
    noise(64, 64).convert("L").point(lambda v: 0).save("black.png")
    whole = Path("p.png").read_bytes()
    Path("cut.png").write_bytes(whole[:len(whole) // 2])
    Path("none.png").write_bytes(b"not a picture")
    Path("empty.png").touch()
    Path("huge.png").write_bytes(huge())


@pytest.mark.parametrize("name", ("nowhere.png", "cut.png", "none.png", "empty.png", "huge.png", "."))
def test_pictures_that_cannot_be_read(cli, files, name):
    assert_refused(cli, ["--image", name, "--prompt", "x", *RUN], "--image", name)
    assert_refused(cli, ["--image", "p.png", "--mask", name, *RUN], "--mask", name)
    assert_refused(cli, ["--reconstruct", name, *RUN], "--reconstruct", name)
    assert_refused(cli, ["--like", name], "--like", name)


@pytest.mark.parametrize("flags, words", (
    (["--mask", "black.png"], ["black.png", "no white"]), (["--outpaint", "0,0,0,0"], ["--outpaint"]),
    (["--outpaint=-8,0,0,0"], ["--outpaint"]), (["--outpaint", "8,8"], ["--outpaint"]), (["--outpaint", "8,8,8,x"], ["--outpaint"]),
    (["--outpaint", "999999999,0,0,0"], ["--outpaint", "too many"]), (["--strength", "1.1"], ["--strength"]),
    (["--strength=-0.1"], ["--strength"]), (["--strength", "nan"], ["--strength"]), ([], ["--prompt", "--mask"]),
    (["--mask", "p.png", "--strength", "0.5"], ["--strength", "--mask"]), (["--outpaint", "1,1,1,1", "--source", "x"], ["--source"]),
    (["--feather", "3", "--strength", "0.5"], ["--feather"]), (["--mask", "p.png", "--feather", "-1"], ["--feather"]),
    (["--strength", "0.5", "--schedule", "sine"], ["--schedule"]), (["--prompt", "x", "--size", "65"], ["65x65", "64x64"]),
    (["--strength", "1", "--size", str(2 ** 40)], ["--size"]),
    (["--prompt", "x", "--film", "1"], ["--film"]), (["--prompt", "x", "--steps", "4", "--film", "9"], ["--film"]),
    (["--prompt", "x", "--sweep", "speed=1"], ["--sweep", "speed"]), (["--prompt", "x", "--sweep", "cfg=1", "cfg=2"], ["--sweep"]),
    (["--prompt", "x", "--sweep", "cfg=a"], ["--sweep"]), (["--prompt", "x", "--sweep", "cfg=1", "--film"], ["--sweep", "--film"]),
    (["--bench", "--compile"], ["--bench", "--compile"]),
    (["--prompt", "x", "--sweep", "cfg=1", "seed=1", "steps=1"], ["--sweep"]), (["--reconstruct", "p.png"], ["--reconstruct"])),
    ids=lambda f: " ".join(f))
def test_edits_that_make_no_sense(cli, files, flags, words):
    assert_refused(cli, ["--image", "p.png", *RUN, *flags], *words)


@pytest.mark.parametrize("flags", (["--mask", "p.png"], ["--outpaint", "1,1,1,1"], ["--strength", "0.5"], ["--source", "x"],
                                   ["--feather", "1"], ["--sweep", "strength=0,1"]))
def test_edits_want_a_picture(cli, files, flags):
    assert_refused(cli, ["--prompt", "x", *SMALL, *flags], flags[0] if "sweep" not in flags[0] else "strength", "--image")


def test_a_png_without_settings(cli, files):
    assert_refused(cli, ["--like", "p.png"], "p.png", "no settings")


def test_sizes_at_which_pictures_are_edited(pipeline):
    """The nearest that fits; a large picture is worked at no more tokens than a batch holds, whatever its shape."""
    assert pipeline.fit(64, 128) == (64, 128) and pipeline.fit(75, 50) == (64, 64) and pipeline.fit(1, 1) == (32, 32)
    for width, height in ((4000, 3000), (3000, 4000), (1025, 1024)):
        w, h = pipeline.fit(width, height)
        assert w % 32 == h % 32 == 0 and w * h <= 1.05 * 1024 * 1024 and abs(w / h - width / height) < 0.05
