"""Editing: what is masked, what comes back unchanged, what is refused."""
import io
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from common import GOLDEN, GOLDEN_MODEL, SMALL_RUN, assert_refused, open_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shared_pipeline import load, load_once      # noqa: F401

from engine import edit as editing
from engine.checkpoint import UserError
from engine.edit import Edit
from engine.images import read_image

pytestmark = pytest.mark.usefixtures("load_once")

RUN = (*SMALL_RUN[:6], "--steps", 4)              # at the picture's size
PNG = (*RUN, "--out", "a.png")
MASK_TOKEN = 71


@pytest.fixture(scope="module")
def pipe():
    return load(GOLDEN_MODEL, torch.device("cpu"), torch.float32, None, None, False)


def noise(width=64, height=64, mode="RGB", seed=0):
    """A random Image of any mode, with every alpha and palette index."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), np.uint16))
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = rng.integers(0, 256, (height, width, bands), np.uint8)
    if mode in ("P", "1"):
        return Image.fromarray(pixels[..., 0]).convert(mode)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def box(width, height, left, top, right, bottom):
    """(height, width) bool, True in the box."""
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def save_mask(mask, path="m.png"):
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def pixels(path):
    return np.asarray(open_picture(path))


def as_read(path):
    """The pixels that an edit must bring back."""
    return np.asarray(read_image(path)[0])


# --------------------------------------------------------------------------------------------------
# Masks

MASKS = st.builds(
    lambda h, w, seed, share: np.random.default_rng(seed).random((h, w)) < share,
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 99),
    st.sampled_from((0.01, 0.5, 0.99, 1.0)))


@settings(deadline=None, max_examples=50)
@given(MASKS, st.integers(1, 12), st.integers(1, 12))
def test_a_cell_is_masked_if_it_overlaps_a_masked_pixel(mask, h, w):
    """Against the definition: the squares of pixel and cell share an area."""
    height, width = mask.shape
    found = editing.mask_to_grid(mask, h, w)
    assert found.shape == (h, w)
    for i in range(h):
        rows = [y for y in range(height) if y * h < (i + 1) * height and (y + 1) * h > i * height]
        for j in range(w):
            columns = [x for x in range(width) if x * w < (j + 1) * width
                       and (x + 1) * w > j * width]
            assert found[i, j] == mask[np.ix_(rows, columns)].any()


@settings(deadline=None, max_examples=50)
@given(MASKS, st.integers(0, 6))
def test_a_feather_is_inside_the_mask(mask, feather):
    soft = np.asarray(editing.feathered(mask, feather))
    assert ((soft == 0) == ~mask).all()
    if feather == 0 or mask.all():
        assert (soft[mask] == 255).all()


def test_a_feather_rises_over_its_pixels():
    soft = np.asarray(editing.feathered(box(40, 40, 10, 10, 40, 40), 3))
    assert soft[25, 8:16].tolist() == [0, 0, 64, 128, 191, 255, 255, 255] and soft[25, 39] == 255


@settings(deadline=None, max_examples=15)
@given(MASKS, st.sampled_from(("RGB", "RGBA")), st.integers(0, 4), st.integers(0, 9))
def test_inpainting_with_any_mask(pipe, mask, mode, feather, seed):
    """Pixels outside the mask stay byte for byte; tokens that it touches are masked."""
    size = (64, 96)
    original = noise(mask.shape[1], mask.shape[0], mode, seed)
    edit = Edit(original, mask, feather)
    start = edit.start(pipe, ["x"], [seed], size)[0]                                   # (h, w)
    whole = Edit(original, strength=0).start(pipe, ["x"], [seed], size)[0]
    touched = torch.from_numpy(editing.mask_to_grid(mask, *start.shape))
    assert ((start == MASK_TOKEN) == touched).all()
    assert (start[~touched] == whole[~touched]).all()
    done = edit.finish(noise(*size, seed=seed + 1))
    assert done.size == original.size and done.mode == mode
    assert (np.asarray(done)[~mask] == np.asarray(original)[~mask]).all()


MODES = (("RGB", "png"), ("RGBA", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("1", "png"),
         ("I;16", "png"), ("CMYK", "jpg"), ("RGB", "jpg"), ("L", "tiff"))


@pytest.mark.parametrize("mode, kind", MODES)
def test_every_mode_comes_back_exactly(cli, mode, kind):
    """At a size that no grid takes; the mask is of another size and mode."""
    noise(75, 50, mode).save(f"p.{kind}")
    Image.fromarray(box(30, 20, 6, 4, 18, 12).astype(np.uint8) * 255).convert("LA").save("m.png")
    assert cli("--image", f"p.{kind}", "--mask", "m.png", "--feather", 2, *PNG)[0] == 0
    done = pixels("a.png")
    original = as_read(f"p.{kind}")
    kept = ~box(75, 50, 15, 6, 45, 30)                        # where 30 x 20 lies on 75 x 50
    assert done.shape == original.shape and (done[kept] == original[kept]).all()
    assert (done != original).any()


@pytest.mark.parametrize("mode", ("RGB", "RGBA"))
def test_a_larger_canvas(cli, mode):
    noise(75, 50, mode).save("p.png")
    assert cli("--image", "p.png", "--outpaint", "5,0,30,7", *PNG)[0] == 0
    done = pixels("a.png")
    assert done.shape[:2] == (57, 110) and (done[:50, 5:80] == as_read("p.png")).all()


@pytest.mark.parametrize("flags", (["--model", GOLDEN / "plain"], ["--dtype", "bfloat16"],
                                   ["--dtype", "float16"]), ids=lambda flags: Path(flags[1]).name)
def test_other_layouts_and_dtypes(cli, flags):
    """Without compression the grid takes 48 pixels; the decoder's dtype is its own."""
    noise(75, 50).save("p.png")
    save_mask(box(75, 50, 0, 0, 75, 25))
    assert cli("--image", "p.png", "--mask", "m.png", *PNG, *flags)[0] == 0
    done, original = pixels("a.png"), as_read("p.png")
    assert (done[25:] == original[25:]).all() and (done[:25] != original[:25]).any()
    captions = ("--prompt", "a star", "--source", "a heart")
    assert cli("--image", "p.png", *captions, *PNG, *flags)[0] == 0
    assert open_picture("a.png").size == (75, 50)


def test_a_rotated_photograph(cli):
    """The mask is as the picture is seen (EXIF orientation), and so is the result."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(80, 40).save("p.jpg", exif=exif)
    save_mask(box(40, 80, 0, 0, 40, 20))
    assert cli("--image", "p.jpg", "--mask", "m.png", *PNG)[0] == 0
    assert open_picture("a.png").size == (40, 80)
    assert (pixels("a.png")[20:] == as_read("p.jpg")[20:]).all()


def test_transparent_parts_of_a_mask_count_as_black(cli):
    noise().save("p.png")
    mask = np.zeros((64, 64, 4), np.uint8)
    mask[:, :, :3] = 255
    mask[:32, :32, 3] = 255
    Image.fromarray(mask).save("m.png")
    assert cli("--image", "p.png", "--mask", "m.png", *PNG)[0] == 0
    done, original = pixels("a.png"), as_read("p.png")
    assert (done[32:] == original[32:]).all() and (done[:32, :32] != original[:32, :32]).any()


def save_rgba(grey, alpha, path="m.png"):
    """uint8 arrays (H, W), or numbers, as a grey picture with transparency."""
    shape = np.broadcast(grey, alpha).shape
    bands = [np.broadcast_to(band, shape).astype(np.uint8) for band in (grey, grey, grey, alpha)]
    Image.fromarray(np.stack(bands, -1)).save(path)


HALF = box(64, 64, 0, 0, 64, 32)                  # the upper half
MASKS_IN_A_FILE = {                               # grey, alpha: what is redrawn, words on stderr
    "black strokes": (0, HALF * 255, HALF, "opaque part is repainted"),
    "white strokes": (255, HALF * 255, HALF, "opaque part is repainted"),
    "grey strokes": (90, HALF * 255, HALF, "opaque part is repainted"),
    "white with a hole": (255, ~HALF * 255, ~HALF, "--invert-mask repaints the transparent part"),
    "white with an emptied hole": (~HALF * 255, ~HALF * 255, ~HALF, "--invert-mask repaints"),
    "soft strokes": (0, HALF * 127 + 64, HALF, "opaque part"),
    "black and white": (HALF * 255, np.full((64, 64), 255), HALF, None),
    "a transparent corner": (HALF * 255, ~box(64, 64, 0, 48, 64, 64) * 255, HALF, None),
    "an erased corner": (~HALF * 255, ~box(64, 64, 0, 48, 64, 64) * 255,
                         box(64, 64, 0, 32, 64, 48), None),
    "half transparent": (HALF * 255, np.full((64, 64), 200), HALF, None),
    "zero and one": (HALF * 1, np.full((64, 64), 255), HALF, "0 and 1"),
    "zero and one, a hole": (HALF * 1, ~box(64, 64, 0, 48, 64, 64) * 255, HALF, "0 and 1")}


@pytest.mark.parametrize("kind", MASKS_IN_A_FILE)
def test_readings_of_a_mask(kind, tmp_path, capsys):
    """And the reverse with --invert-mask."""
    grey, alpha, redrawn, words = MASKS_IN_A_FILE[kind]
    save_rgba(grey, alpha, tmp_path / "m.png")
    image, _ = read_image(tmp_path / "m.png")
    assert (editing.read_mask(image, noise(), "m.png") == redrawn).all()
    err = capsys.readouterr().err
    assert (words in err and "--mask m.png" in err) if words else not err
    assert err.count("\n") == bool(words)
    assert (editing.read_mask(image, noise(), "m.png", invert=True) == ~redrawn).all()


ONES = HALF.astype(np.uint8)
NUMBERS = {                                       # file: what is saved there
    "l.png": Image.fromarray(ONES), "rgb.png": Image.fromarray(ONES).convert("RGB"),
    "la.png": Image.fromarray(ONES).convert("LA"), "1.png": Image.fromarray(HALF),
    "16-bit.png": Image.fromarray(ONES.astype(np.uint16) * 255),
    "float.tif": Image.fromarray(ONES.astype(np.float32))}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_mask_of_zeros_and_ones(name, tmp_path):
    """As arrays of labels are saved; also floats, and 16 bits whose white is 255."""
    NUMBERS[name].save(tmp_path / name)
    image, _ = read_image(tmp_path / name)
    assert (editing.read_mask(image, noise(), name) == HALF).all()


def test_masks_that_cannot_be_read_safely(tmp_path):
    """A photograph with a hole, all transparent, all black; all white with --invert-mask."""
    grey = np.asarray(noise().convert("L"))
    save_rgba(grey // 2 + 64, HALF * 255, tmp_path / "photo.png")
    save_rgba(255, np.zeros((64, 64)), tmp_path / "clear.png")
    save_rgba(255, np.full((64, 64), 255), tmp_path / "white.png")
    for name, invert, words in (("photo", False, "a picture with a transparent part"),
                                ("photo", True, "a picture with a transparent part"),
                                ("clear", False, "no white"), ("white", True, "--invert-mask")):
        image, _ = read_image(tmp_path / f"{name}.png")
        with pytest.raises(UserError, match=words) as caught:
            editing.read_mask(image, noise(), name, invert)
        assert str(caught.value).startswith(f"--mask {name}: ")


def test_a_picture_keeps_its_own_transparency(pipe):
    """Of the whole picture where it has no mask; what is repainted in a mask is opaque."""
    original = noise(40, 40, "RGBA")
    alpha = np.asarray(original)[..., 3]
    mask = box(40, 40, 0, 0, 20, 40)
    for edit in (Edit(original, strength=0.5), Edit(original, source="")):
        done = np.asarray(edit.finish(noise(64, 64)))
        assert done.shape == (40, 40, 4) and (done[..., 3] == alpha).all()
    done = np.asarray(Edit(original, mask).finish(noise(64, 64)))
    assert (done[..., 3] == np.where(mask, 255, alpha)).all()
    assert Edit(noise(40, 40), strength=0.5).finish(noise(64, 64)).mode == "RGB"


def test_transparency_survives_on_the_command_line(cli):
    """Of an RGBA file, a palette with a transparent colour, and grey with alpha."""
    files = {"rgba": noise(75, 50, "RGBA"), "la": noise(75, 50, "LA"), "p": noise(75, 50, "P")}
    for name, image in files.items():
        image.save(f"{name}.png", **({"transparency": 3} if name == "p" else {}))
        alpha = as_read(f"{name}.png")[..., 3]
        flags = ("--strength", 0.5, "--prompt", "a star")
        assert cli("--image", f"{name}.png", *flags, *PNG)[0] == 0
        assert (pixels("a.png")[..., 3] == alpha).all() and alpha.min() == 0, name


def test_invert_mask_on_the_command_line(cli):
    """The two readings of white with a hole; the PNG has the flag, so that --like does the same."""
    noise().save("p.png")
    save_rgba(255, ~HALF * 255)
    base = ("--image", "p.png", "--mask", "m.png", *RUN)
    for name, flags, redrawn in (("a", [], ~HALF), ("b", ["--invert-mask"], HALF)):
        code, _, err = cli(*base, *flags, "--out", f"{name}.png")
        assert code == 0 and "note: --mask m.png" in err
        changed = (pixels(f"{name}.png") != as_read("p.png")).any(-1)
        assert changed[redrawn].any() and not changed[~redrawn].any()
    assert cli("--like", "b.png", "--out", "c.png")[0] == 0
    assert (pixels("c.png") == pixels("b.png")).all()


@pytest.mark.parametrize("strength", (0, 0.0001))
@pytest.mark.parametrize("source", (None, "a heart"))
def test_nothing_to_draw(cli, strength, source):
    """A start without a masked token is its own result, with re-masking and candidates, too."""
    noise().save("p.png")
    captions = ["--prompt", "a star"] + (["--source", source] if source else [])
    flags = ("--image", "p.png", "--strength", strength, *captions, *RUN, "--remask", 4)
    for best_of in (1, 3):
        code, _, err = cli(*flags, "--best-of", best_of, "--out", f"{best_of}.png")
        assert code == 0, err
    assert (pixels("1.png") == pixels("3.png")).all()


@pytest.mark.parametrize("size", ("64x128", "96x128"))
def test_everything_masked_is_text_to_image(cli, size):
    """A full mask; image to image and mask-free editing at strength 1."""
    noise(*map(int, size.split("x"))).save("p.png")
    save_mask(np.ones((7, 5), bool))
    base = ("--prompt", "a star", "--seed", 3, *RUN)
    assert cli(*base, "--size", size, "--out", "text.png")[0] == 0
    for flags in (["--mask", "m.png"], ["--strength", 1], ["--strength", 1, "--source", "x"]):
        assert cli(*base, "--image", "p.png", *flags, "--out", "edit.png")[0] == 0
        assert (pixels("edit.png") == pixels("text.png")).all(), flags


def test_the_schedule_is_of_the_masked_tokens(cli):
    """So that --schedule matters for a small region, too."""
    noise(128, 128).save("p.png")
    save_mask(box(128, 128, 0, 0, 64, 64))
    base = ("--image", "p.png", "--mask", "m.png", *RUN)
    for name in ("cosine", "linear"):
        assert cli(*base, "--schedule", name, "--out", f"{name}.png")[0] == 0
    assert (pixels("cosine.png") != pixels("linear.png")).any()


# --------------------------------------------------------------------------------------------------
# The whole picture


def test_strength(pipe):
    """0 is the picture through the VQ model; what one strength redraws, a greater one does too."""
    original = noise(256, 256).resize((16, 16)).resize((256, 256))
    plain, = pipe.decode(pipe.encode_image(original))
    masks = []
    distances = []
    for strength in (0, 0.5, 1):
        edit = Edit(original, strength=strength)
        ids = edit.start(pipe, ["a star"] * 2, [0, 1], (256, 256))
        schedule = edit.schedule(replace(pipe.schedule, steps=8))
        assert schedule.steps == max(1, 8 * strength)
        pictures = pipe(["a star"] * 2, [0, 1], ids=ids, size=(256, 256), schedule=schedule)
        masks.append(ids == MASK_TOKEN)
        distances.append(np.mean([np.abs(np.asarray(picture, float) - np.asarray(plain)).mean()
                                  for picture in pictures]))
    assert distances[0] < 0.01 and (np.diff(distances) > 0).all(), distances
    assert [int(mask[0].sum()) for mask in masks] == [0, 128, 256]
    assert all((less <= more).all() for less, more in zip(masks, masks[1:]))
    assert (masks[1][0] != masks[1][1]).any()                 # each seed chooses its own tokens


def test_mask_free_editing_redraws_where_the_captions_differ(pipe):
    """And nothing is ranked where they do not."""
    edit = Edit(noise(128, 128), strength=0.3, source="a heart")
    prompts = ["a star", "a heart"]
    ids = edit.start(pipe, prompts, [0, 1], (128, 128))                                # (2, h, w)
    whole = pipe.encode_image(edit.picture).repeat(2, 1, 1)
    saliency = edit.saliency(pipe, whole, prompts, (128, 128), None)                   # (2, h, w)
    masked = ids == MASK_TOKEN
    assert masked.flatten(1).sum(1).tolist() == [19, 19]
    assert (ids[~masked] == whole[~masked]).all()
    assert saliency[0][masked[0]].min() >= saliency[0][~masked[0]].max()
    assert saliency[1].abs().max() == 0


def test_mask_free_editing_on_the_command_line(cli):
    """The prompt alone edits from the empty caption; the PNG tells the source."""
    noise(100, 70).save("p.png")
    base = ("--image", "p.png", "--prompt", "a star", *RUN, "--size", "128x96")
    sources = {"a": [], "b": ["--source", ""], "c": ["--source", "a heart and a cross"]}
    for name, flags in sources.items():
        assert cli(*base, *flags, "--out", f"{name}.png")[0] == 0
    assert open_picture("a.png").size == (100, 70)
    assert (pixels("a.png") == pixels("b.png")).all()
    assert open_picture("a.png").text["source"] == ""
    assert open_picture("c.png").text["source"] == "a heart and a cross"


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_the_threshold_separates_two_groups(high, low, seed):
    """Values around 10 from values around 0; of a batch the larger share."""
    rng = np.random.default_rng(seed)
    values = np.concatenate([10 + rng.random(high), rng.random(low)])
    x = torch.from_numpy(rng.permutation(values))[None]                                # (1, N)
    assert editing.otsu_split(x) == high / (high + low)
    assert editing.otsu_split(torch.cat([x, -x])) == max(high, low) / (high + low)


def test_sizes_at_which_pictures_are_edited(pipe):
    """The nearest that fits; a large picture at about as many tokens as a batch holds."""
    assert pipe.nearest_size(64, 128) == (64, 128)
    assert pipe.nearest_size(75, 50) == (64, 64)
    assert pipe.nearest_size(1, 1) == (32, 32)
    for width, height in ((4000, 3000), (3000, 4000), (1025, 1024)):
        w, h = pipe.nearest_size(width, height)
        assert w % 32 == h % 32 == 0 and w * h <= 1.05 * 1024 * 1024
        assert abs(w / h - width / height) < 0.05


# --------------------------------------------------------------------------------------------------
# Bad input


@lru_cache
def huge():
    """The bytes of a small file of 400 million pixels."""
    file = io.BytesIO()
    Image.new("1", (20000, 20000)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def files(cli):
    noise(64, 64).save("p.png")
    Image.new("L", (64, 64)).save("black.png")
    whole = Path("p.png").read_bytes()
    Path("cut.png").write_bytes(whole[:len(whole) // 2])
    Path("none.png").write_bytes(b"not a picture")
    Path("empty.png").touch()
    Path("huge.png").write_bytes(huge())


@pytest.mark.parametrize("name", ("nowhere.png", "cut.png", "none.png", "empty.png", "huge.png",
                                  "."))
def test_pictures_that_cannot_be_read(cli, files, name):
    assert_refused(cli, ["--image", name, "--prompt", "x", *RUN], "--image", name)
    assert_refused(cli, ["--image", "p.png", "--mask", name, *RUN], "--mask", name)


@pytest.mark.parametrize("flags, words", (
    (["--mask", "black.png"], ["black.png", "no white"]),
    (["--outpaint", "0,0,0,0"], ["--outpaint"]), (["--outpaint=-8,0,0,0"], ["--outpaint"]),
    (["--outpaint", "8,8"], ["--outpaint"]), (["--outpaint", "8,8,8,x"], ["--outpaint"]),
    (["--outpaint", "999999999,0,0,0"], ["--outpaint", "too many"]),
    (["--strength", "1.1"], ["--strength"]), (["--strength=-0.1"], ["--strength"]),
    (["--strength", "nan"], ["--strength"]), ([], ["--prompt", "--mask"]),
    (["--mask", "p.png", "--strength", "0.5"], ["--strength", "--mask"]),
    (["--outpaint", "1,1,1,1", "--source", "x"], ["--source", "--outpaint"]),
    (["--feather", "3", "--strength", "0.5"], ["--feather"]),
    (["--mask", "p.png", "--feather", "-1"], ["--feather"]),
    (["--strength", "0.5", "--invert-mask"], ["--invert-mask", "--mask"]),
    (["--strength", "0.5", "--schedule", "sine"], ["--schedule", "cosine"]),
    (["--prompt", "x", "--size", "65"], ["65x65", "64x64"]),
    (["--strength", "1", "--size", str(2 ** 40)], ["--size"])), ids=lambda flags: " ".join(flags))
def test_edits_that_make_no_sense(cli, files, flags, words):
    assert_refused(cli, ["--image", "p.png", *RUN, *flags], *words)


@pytest.mark.parametrize("flags", (["--mask", "p.png"], ["--outpaint", "1,1,1,1"],
                                   ["--strength", "0.5"], ["--source", "x"], ["--feather", "1"]))
def test_edits_need_a_picture(cli, files, flags):
    assert_refused(cli, ["--prompt", "x", *SMALL_RUN, *flags], flags[0], "--image")
