"""Picture files: any format is decoded correctly or refused by name; crops; PNGs with text."""
import io
import os
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
from common import CORNERS, corners, encoded, noise, tree, write
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine import images
from engine.images import (PictureError, crop_square, decode_image, flatten_alpha, read_image,
                           read_png_text, save_png, side_by_side)


def decode(raw, smallest=16, near=None):
    """The picture that the bytes of a file give; always a plain RGB Image."""
    image = decode_image(raw, smallest, near)
    assert (image.mode, type(image)) == ("RGB", Image.Image)
    return image


def refusal(path):
    """Why read_image refuses a file: one line that begins with its path."""
    with pytest.raises(PictureError) as caught:
        read_image(path)
    message = str(caught.value)
    reason = message.removeprefix(f"{path}: ")
    assert reason and reason != message and "\n" not in message
    return reason


def assert_close(image, wanted, by=0):
    """Equal shape, and no channel differs by more than `by`."""
    got = np.asarray(image).astype(int)
    assert got.shape == np.shape(wanted), (got.shape, np.shape(wanted))
    assert np.abs(got - np.asarray(wanted, int)).max() <= by


def assert_colours(image, points, colours, by):
    for point, colour in zip(points, colours):
        assert np.abs(np.subtract(image.getpixel(point), colour)).max() <= by


# ------------------------------------------------------------------------------------------------
# Files written by hand, for what Pillow does not write


def png(width, height, depth, colour_type, rows, chunks=()):
    """A PNG; `rows` yields the bytes of each line."""
    def chunk(name, body):
        checksum = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)

    compressor = zlib.compressobj(1)
    body = b"".join([compressor.compress(b"\0" + row) for row in rows] + [compressor.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*extra) for extra in chunks), chunk(b"IDAT", body)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def tiff(array, sample_format, bits, photometric=1):
    """A grey TIFF in the byte order of the array; sample_format 1 unsigned, 2 signed, 3 float."""
    order = ">" if array.dtype.byteorder == ">" else "<"
    height, width = array.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8),
            (277, 1), (278, height), (279, array.nbytes), (339, sample_format)]
    body = array.tobytes()
    header = struct.pack(order + "2sHI", b"MM" if order == ">" else b"II", 42, 8 + len(body))
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    return header + body + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def exif_block(*entries, order=b"MM\0*"):
    """EXIF data with entries (tag, type, count, four bytes)."""
    block = b"Exif\0\0" + order + struct.pack(">IH", 8, len(entries))
    for tag, kind, count, value in entries:
        block += struct.pack(">HHI", tag, kind, count) + value
    return block + bytes(4)


TURNED = (0x0112, 3, 1, b"\0\6\0\0")              # EXIF entry: orientation 6


def stored(upright, orientation):
    """(H, W, ...) -> how a camera stores it under an EXIF orientation, which says what side of the
    picture row 0 and column 0 are."""
    side = np.swapaxes(upright, 0, 1)
    ways = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
            5: side, 6: side[::-1], 7: side[::-1, ::-1], 8: side[:, ::-1]}
    return np.ascontiguousarray(ways[orientation])


def ramp(height=16):
    """A gradient in 16 bits, uint16 (height, 256), and the same in 8 bits, (height, 256, 3)."""
    deep = (np.arange(256, dtype=np.uint16) * 257)[None].repeat(height, 0)
    return deep, np.arange(256)[None, :, None].repeat(height, 0).repeat(3, 2)


def lines(array):
    """The bytes of each row, for png()."""
    return [row.tobytes() for row in array]


# ------------------------------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize("kind, options", [
    ("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_deflate"}), ("WEBP", {"lossless": True})])
def test_lossless_formats_are_exact(kind, options):
    assert_close(decode(encoded(noise(3), kind, **options)), noise(3))


@pytest.mark.parametrize("kind, options", [
    ("JPEG", {"quality": 95}), ("JPEG", {"quality": 95, "progressive": True}), ("GIF", {}),
    ("WEBP", {"quality": 95})])
def test_lossy_formats(kind, options):
    image = decode(encoded(corners(), kind, **options))
    assert_colours(image, [(8, 8), (40, 8), (8, 24), (40, 24)], CORNERS, by=6)


def test_16_bit_png():
    """The scale is that of the format: a dark picture stays dark."""
    deep, narrow = ramp()
    assert_close(decode(png(256, 16, 16, 0, lines(deep.astype(">u2")))), narrow, by=1)
    assert_close(decode(png(256, 16, 16, 0, lines((deep // 8).astype(">u2")))), narrow / 8, by=1)


def test_16_bit_colours():
    deep = noise(2).astype(">u2") * 257
    assert_close(decode(png(24, 20, 16, 2, lines(deep))), noise(2))
    grey_alpha = np.dstack([noise(2)[..., 0], np.full((20, 24), 255)]).astype(">u2") * 257
    assert_close(decode(png(24, 20, 16, 4, lines(grey_alpha))), noise(2)[..., :1].repeat(3, 2))


@pytest.mark.parametrize("dtype, sample_format, bits, scale", [
    ("<u2", 1, 16, 1), (">u2", 1, 16, 1), ("<i4", 2, 32, 1), (">i4", 2, 32, 1),
    ("<i4", 2, 32, 30_000), ("<f4", 3, 32, 1), ("<f4", 3, 32, 1 / 65535),
    (">f4", 3, 32, 1 / 65535), ("<f4", 3, 32, 1 / 257), ("<f4", 3, 32, 1000)])
def test_deep_grey_tiffs(dtype, sample_format, bits, scale):
    deep, narrow = ramp()
    levels = (deep.astype(float) * scale).astype(dtype)
    assert_close(decode(tiff(levels, sample_format, bits)), narrow, by=1)


def test_grey_levels_below_zero_stretch_the_range():
    deep, narrow = ramp()
    assert_close(decode(tiff((deep / 100 - 300).astype("<f4"), 3, 32)), narrow, by=1)
    assert_close(decode(tiff(deep.astype("<i4") - 40_000, 2, 32)), narrow, by=1)
    black = np.zeros((16, 16, 3))
    assert_close(decode(tiff(np.full((16, 16), -3, "<f4"), 3, 32)), black)
    assert_close(decode(tiff(np.zeros((16, 16), "<f4"), 3, 32)), black)


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
def test_values_that_are_not_finite(tmp_path, value):
    levels = ramp()[0].astype("<f4")
    levels[3, 5] = value
    write(tmp_path, {"a.tif": tiff(levels, 3, 32)})
    assert refusal(tmp_path / "a.tif") == "some of its values are not finite"


@pytest.mark.parametrize("dtype, bits", [("<u2", 16), ("u1", 8)])
def test_white_is_zero(dtype, bits):
    deep, narrow = ramp()
    levels = deep if bits == 16 else narrow[..., 0]
    assert_close(decode(tiff(levels.astype(dtype), 1, bits, photometric=0)), 255 - narrow, by=1)


def test_grey_one_bit_and_palette():
    grey = noise(1)[..., 0]
    three = grey[..., None].repeat(3, 2)
    assert_close(decode(encoded(grey)), three)
    bits = grey > 127
    black_white = (three > 127) * 255
    assert_close(decode(encoded(Image.fromarray(bits))), black_white)
    assert_close(decode(png(24, 20, 1, 0, lines(np.packbits(bits, axis=1)))), black_white)
    assert_close(decode(encoded(Image.fromarray(corners()).quantize(4))), corners(), by=1)


@pytest.mark.parametrize("kind", ("JPEG", "TIFF"))
@pytest.mark.parametrize("ink, colour", [
    ((0, 255, 255, 0), (255, 0, 0)), ((255, 255, 0, 0), (0, 0, 255)),
    ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 0, 0), (255, 255, 255))])
def test_cmyk(kind, ink, colour):
    image = decode(encoded(Image.new("CMYK", (20, 20), ink), kind))
    assert_close(image, np.full((20, 20, 3), colour), by=3)


@pytest.mark.parametrize("kind", ("GIF", "PNG", "WEBP", "TIFF"))
def test_the_first_frame_of_several(kind):
    frames = [Image.new("RGB", (20, 20), colour) for colour in CORNERS[:3]]
    options = {} if kind == "TIFF" else {"duration": 100}
    if kind == "WEBP":
        options["lossless"] = True
    raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(raw)).n_frames == 3
    assert_close(decode(raw), np.full((20, 20, 3), CORNERS[0]))


# ------------------------------------------------------------------------------------------------
# Transparency


def test_palette_with_transparency():
    """Index 1 is half clear, index 2 wholly; a PNG lists alphas, a GIF has one clear index."""
    index = np.arange(20)[:, None].repeat(24, 1) % 3                              # (20, 24)
    colours = np.array([[10, 20, 30], [200, 100, 0], [5, 5, 5]])
    alpha = np.array([255, 128, 0])
    over_white = np.round(colours * alpha[:, None] / 255 + 255 - alpha[:, None])
    chunks = [(b"PLTE", colours.astype(np.uint8).tobytes()),
              (b"tRNS", alpha.astype(np.uint8).tobytes())]
    raw = png(24, 20, 8, 3, lines(index.astype(np.uint8)), chunks)
    assert_close(decode(raw), over_white[index], by=1)
    image = Image.fromarray(index.astype(np.uint8), "L").convert("P")
    image.putpalette(colours.ravel().tolist())
    clear = np.array([*colours[:2], [255] * 3])
    assert_close(decode(encoded(image, "GIF", transparency=2)), clear[index])


def test_alpha_goes_over_white():
    rng = np.random.default_rng(4)
    alpha = rng.integers(0, 256, (20, 24, 1), dtype=np.uint8)
    alpha[0] = 0
    alpha[1] = 255
    colour = noise(4)
    grey = colour[..., :1]
    white = 255 * (1 - alpha / 255)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        raw = encoded(np.dstack([colour, alpha]), kind, **options)
        assert_close(decode(raw), np.round(colour * (alpha / 255) + white), by=1)
    over_white = np.round(grey * (alpha / 255) + white).repeat(3, 2)
    assert_close(decode(encoded(np.dstack([grey, alpha]))), over_white, by=1)


def test_a_colour_that_means_transparent():
    picture = corners()
    clear = (picture == CORNERS[0]).all(-1, keepdims=True)
    raw = encoded(picture, transparency=CORNERS[0])
    assert_close(decode(raw), np.where(clear, 255, picture))


def test_read_image_keeps_alpha(tmp_path):
    """RGBA if something is transparent, else RGB; with it come the bytes of the file."""
    half = Image.new("RGBA", (20, 10), (255, 0, 0, 128))
    write(tmp_path, {"a.png": encoded(half), "b.png": encoded(noise(0))})
    image, raw = read_image(tmp_path / "a.png")
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (255, 0, 0, 128)
    assert raw == encoded(half)
    assert flatten_alpha(image).getpixel((0, 0)) == (255, 127, 127)
    assert flatten_alpha(image, "black").getpixel((0, 0)) == (128, 0, 0)
    assert_close(read_image(str(tmp_path / "b.png"))[0], noise(0))


# ------------------------------------------------------------------------------------------------
# Orientation


@pytest.mark.parametrize("kind", [kind for kind in images.FORMATS if kind not in ("BMP", "GIF")])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind, orientation):
    """Checked at the four corners, also where a JPEG is decoded at a quarter of its size."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {} if kind == "TIFF" else {"quality": 95}
    raw = encoded(stored(corners(200, 140), orientation), kind, exif=exif, **quality)
    for near in (None, 16):
        image = decode(raw, near=near)
        assert image.size == ((50, 35) if kind == "JPEG" and near else (200, 140))
        assert image.info["original"] == (140, 200)
        right = image.width - 5
        bottom = image.height - 5
        assert_colours(image, [(4, 4), (right, 4), (4, bottom), (right, bottom)], CORNERS, by=8)


def test_orientation_in_deep_grey():
    deep, narrow = ramp()
    rows = lines(stored(deep, 6).astype(">u2"))
    raw = png(16, 256, 16, 0, rows, [(b"eXIf", exif_block(TURNED)[6:])])
    assert_close(decode(raw), narrow, by=1)


@pytest.mark.parametrize("kind", ("JPEG", "PNG"))
def test_odd_exif(kind):
    """Tags of wrong types do not hide the orientation; broken EXIF data count as none."""
    odd = exif_block(TURNED, (0x011A, 2, 4, b"abc\0"), (0x0128, 2, 4, b"no!\0"),
                     (0x9003, 4, 1, b"\0\0\0\1"))
    image = decode(encoded(stored(corners(), 6), kind, exif=odd))
    assert image.size == (48, 32)
    assert_colours(image, [(4, 4)], CORNERS, by=8)
    for bad in (b"Exif\0\0no exif at all", exif_block(TURNED, order=b"MQ\0*"),
                exif_block((0x0112, 3, 1, b"\0\x63\0\0")), exif_block((0x0112, 2, 4, b"abc\0"))):
        assert decode(encoded(corners(), kind, exif=bad)).size == (48, 32)


# ------------------------------------------------------------------------------------------------
# Files that are refused


@pytest.mark.parametrize("kind", images.FORMATS)
def test_truncated_files(tmp_path, kind):
    raw = encoded(noise(0, 64, 64), kind)
    assert decode(raw).size == (64, 64)
    for share in (0.02, 0.3, 0.6, 0.9):
        write(tmp_path, {"a.jpg": raw[:int(share * len(raw))]})
        refusal(tmp_path / "a.jpg")


def test_files_that_are_no_pictures(tmp_path):
    postscript = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n"
                  b"%%EndComments\nshowpage\n")
    for raw in (b"", b"\0", b"not a picture at all\n" * 50, postscript, b"\xff\xd8\xff",
                b"<svg xmlns='http://www.w3.org/2000/svg'/>", encoded(noise(0), "PPM")):
        write(tmp_path, {"a.jpg": raw})
        assert refusal(tmp_path / "a.jpg").startswith("not a picture (JPEG, PNG, ")


def test_a_file_that_is_not_there(tmp_path):
    assert refusal(tmp_path / "gone.png") == "No such file or directory"
    assert refusal(tmp_path) == "not a regular file"


def test_files_that_never_end(tmp_path):
    """A pipe and a device, also behind a link, and a size that no picture has. Nothing is read."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(10 ** 13)                               # sparse: takes no room
    for name, reason in (("pipe.png", "not a regular file"), ("zero.png", "not a regular file"),
                         ("large.png", "larger than 1024 MiB")):
        assert refusal(tmp_path / name) == reason
        with pytest.raises(PictureError, match=reason):
            read_png_text(tmp_path / name)


def test_small_pictures():
    for raw, smallest, reason in [
            (encoded(noise(0, 15, 400)), 16, "15 x 400 pixels, smaller than 16"),
            (encoded(noise(0, 400, 1)), 16, "400 x 1 pixels, smaller than 16"),
            (encoded(noise(0, 63, 80)), 64, "63 x 80 pixels, smaller than 64")]:
        with pytest.raises(ValueError) as caught:
            decode(raw, smallest)
        assert str(caught.value) == reason
    assert decode(encoded(noise(0, 16, 400))).size == (16, 400)
    assert decode(encoded(noise(0, 1, 1)), smallest=1).size == (1, 1)


def test_a_decompression_bomb(tmp_path):
    """A file of 0.2 MB that would be 400 million pixels."""
    raw = png(20_000, 20_000, 1, 0, (bytes(2500) for _ in range(20_000)))
    assert len(raw) < 400_000
    write(tmp_path, {"a.png": raw})
    assert "400000000 pixels" in refusal(tmp_path / "a.png")


def test_large_pictures_give_no_warning(tmp_path, monkeypatch):
    """Pillow warns above its limit and refuses above twice that; the first are read silently."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 20 - 1)
    write(tmp_path, {"a.png": encoded(noise(0, 48, 20))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        assert_close(decode(encoded(noise(0))), noise(0))
        assert "exceeds limit" in refusal(tmp_path / "a.png")
        assert warnings.filters == before


def small_files():
    """One small file of each kind."""
    deep = ramp()[0]
    palette = Image.fromarray(corners()).quantize(4)
    return {
        "JPEG": encoded(corners(), "JPEG", exif=exif_block(TURNED)),
        "PNG": encoded(noise(0)),
        "GIF": encoded(corners(), "GIF"),
        "BMP": encoded(noise(0), "BMP"),
        "WEBP": encoded(corners(), "WEBP"),
        "TIFF": encoded(noise(0), "TIFF", compression="tiff_lzw"),
        "I;16": tiff(deep, 1, 16),
        "F": tiff(deep.astype("<f4"), 3, 32),
        "P": encoded(palette, transparency=1),
        "CMYK": encoded(Image.new("CMYK", (20, 20)), "JPEG"),
    }


SMALL_FILES = small_files()
CHANGES = st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.integers(0, 255)), max_size=8)


@settings(deadline=None, max_examples=250)
@given(st.sampled_from(sorted(SMALL_FILES)), CHANGES, st.floats(0, 1), st.booleans())
def test_damaged_bytes(tmp_path_factory, kind, changes, cut, whole):
    """Any bytes give a picture or a PictureError that names the file; no warning, nothing else."""
    raw = bytearray(SMALL_FILES[kind])
    for in_header, place, value in changes:
        end = 63 if in_header else len(raw) - 1
        raw[int(place * end)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.jpg"
    path.write_bytes(bytes(raw) if whole else bytes(raw[:int(cut * len(raw))]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image, _ = read_image(path)
            assert image.mode in ("RGB", "RGBA")
            assert np.asarray(flatten_alpha(image)).shape == (image.height, image.width, 3)
        except PictureError as e:
            assert str(e).startswith(f"{path}: ") and "\n" not in str(e)


# ------------------------------------------------------------------------------------------------
# Decoding near a size, cropping


def smooth(width, height):
    """A picture without edges, which resizing changes little: uint8 (height, width, 3)"""
    x = np.linspace(0, 1, width)[None]
    y = np.linspace(0, 1, height)[:, None]
    waves = 0.5 + 0.5 * np.sin(6 * (x + y))
    grid = np.stack(np.broadcast_arrays(x, y, waves), -1)
    return np.round(20 + 215 * grid).astype(np.uint8)


def crop(image, size, seed=0):
    return crop_square(image, size, np.random.default_rng(seed))


@pytest.mark.parametrize("size, near, wanted", [
    ((800, 600), 32, (100, 75)), ((800, 600), 64, (200, 150)), ((799, 601), 128, (400, 301)),
    ((800, 600), 200, (800, 600)), ((4000, 30), 8, (4000, 30))])
def test_decoding_near_a_size(size, near, wanted):
    """Smaller by a power of two, at least twice the wanted size, and the same crop."""
    raw = encoded(smooth(*size), "JPEG", quality=95)
    full = decode(raw)
    small = decode(raw, near=near)
    assert (full.size, small.size) == (size, wanted)
    assert full.info["original"] == small.info["original"] == size[::-1]
    square, place = crop(full, near)
    small_square, small_place = crop(small, near)
    assert place[:2] == small_place[:2] == size[::-1]
    assert np.abs(np.subtract(place[2:], small_place[2:])).max() <= 1
    assert np.abs(square.astype(int) - small_square).mean() < 3
    assert decode(encoded(smooth(*size)), near=near).size == size         # only JPEGs are reduced


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 96), st.integers(0, 2 ** 32))
def test_a_crop_is_a_piece_of_the_whole(width, height, size, seed):
    """The same as resizing the whole picture, then cutting at the corner that crop_square names."""
    image = Image.fromarray(smooth(width, height))
    square, (original_height, original_width, top, left) = crop(image, size, seed)
    assert square.shape == (size, size, 3) and square.dtype == np.uint8
    assert (original_height, original_width) == (height, width)
    whole = [round(side * size / min(width, height)) for side in (width, height)]
    assert 0 <= left <= whole[0] - size and 0 <= top <= whole[1] - size
    shrinks = size < min(width, height)
    kind = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
    wanted = np.asarray(image.resize(whole, kind))[top:top + size, left:left + size]
    assert np.abs(square.astype(int) - wanted).max() <= 3


def test_crops_are_anywhere_along_the_longer_side():
    """The corner is where the picture says; the same for the same seed."""
    columns = np.arange(40)[None, :, None] * 6
    wide = Image.fromarray(columns.repeat(32, 0).repeat(3, 2).astype(np.uint8))
    high = wide.transpose(Image.Transpose.TRANSPOSE)
    seen = set()
    for seed in range(150):
        square, place = crop(wide, 32, seed)
        again, same = crop(wide, 32, seed)
        assert np.array_equal(square, again) and place == same
        assert place[:3] == (32, 40, 0) and square[0, 0, 0] == 6 * place[3]
        assert all(type(number) is int for number in place)
        seen.add(place[3])
        square, (height, width, top, left) = crop(high, 32, seed)
        assert (height, width, left) == (40, 32, 0) and square[0, 0, 0] == 6 * top
    assert seen == set(range(9))
    rng = np.random.default_rng(0)
    assert len({crop_square(wide, 32, rng)[1] for _ in range(50)}) > 5    # the generator goes on
    square[:] = 0                                                         # the array is writable


def test_a_crop_of_the_whole_changes_nothing():
    square, place = crop(Image.fromarray(noise(0, 64, 64)), 64)
    assert np.array_equal(square, noise(0, 64, 64)) and place == (64, 64, 0, 0)


def test_cropping_does_not_alias():
    """A board of black and white pixels becomes grey."""
    board = (np.indices((512, 640)).sum(0) % 2 * 255).astype(np.uint8)
    square, _ = crop(Image.fromarray(board).convert("RGB"), 32)
    assert_close(square, np.full((32, 32, 3), 127.5), by=4)


@pytest.mark.parametrize("size", ((2000, 40), (40, 2000), (80_000, 16), (16, 80_000), (1, 50)))
def test_a_crop_of_a_strip_takes_little_memory(size):
    """Resized as a whole, 80000 x 16 would be 2560000 x 512 pixels."""
    strip = Image.new("RGB", size, (10, 200, 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    square, place = crop(strip, 512)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000      # kB
    assert_close(square, np.full((512, 512, 3), (10, 200, 30)))
    assert place[:2] == size[::-1] and max(place[2:]) > 0 and min(place[2:]) == 0


# ------------------------------------------------------------------------------------------------
# Writing


def test_png_text_round_trip(tmp_path):
    """Any text; only a lone surrogate, as a file name may have one, becomes a question mark."""
    text = {"prompt": "Füchslein 猫\n\"quoted\"", "seed": "7", "empty": "", "path": "a\udcff.png"}
    path = tmp_path / "deep" / "er" / "a.png"
    save_png(path, Image.fromarray(noise(0)), text)
    assert read_png_text(path) == text | {"path": "a?.png"}
    assert_close(read_image(path)[0], noise(0))
    assert tree(tmp_path) == ["deep", "deep/er", "deep/er/a.png"]


def test_a_png_that_cannot_be_written_leaves_the_old_one(tmp_path):
    save_png(tmp_path / "a.png", Image.fromarray(noise(0)), {})
    with pytest.raises(OSError):
        save_png(tmp_path / "a.png", Image.new("CMYK", (4, 4)), {})
    assert_close(read_image(tmp_path / "a.png")[0], noise(0))
    assert tree(tmp_path) == ["a.png"]


def test_png_text_of_other_files(tmp_path):
    write(tmp_path, {"a.png": encoded(noise(0), "JPEG"), "b.png": encoded(noise(0))[:20]})
    for name, reason in (("a.png", "not a PNG"), ("b.png", ""), ("", "not a regular file"),
                         ("gone.png", "No such file or directory")):
        with pytest.raises(PictureError) as caught:
            read_png_text(tmp_path / name)
        start = f"{tmp_path / name}: "
        assert str(caught.value).startswith(start) and reason in str(caught.value)


def test_side_by_side():
    row = np.asarray(side_by_side([Image.fromarray(noise(i, 8, 6)) for i in range(3)]))
    assert row.shape == (6, 3 * 8 + 2 * 4, 3)
    for i in range(3):
        assert np.array_equal(row[:, 12 * i:12 * i + 8], noise(i, 8, 6))
    assert (row[:, 8:12] == 255).all() and (row[:, 20:24] == 255).all()
