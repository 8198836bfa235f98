"""Picture files: decode any common format to upright RGB pixels, crop, write PNGs with text.

    image, raw = read_image("photo.jpg")                        # RGB or RGBA Image, upright
    pixels, place = crop_square(flatten_alpha(image), 512, np.random.default_rng(0))
    save_png("out/photo.png", Image.fromarray(pixels), {"prompt": "a lighthouse"})
    read_png_text("out/photo.png")["prompt"]

A file is read correctly or refused with a PictureError that names it. Letters: H W pixels.
"""
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.PngImagePlugin import PngInfo

from engine.checkpoint import atomic_write, read_file
from engine.cli import visible

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")       # recognised by content, not by name
if features.check("avif"):                                    # a Pillow of 11.3 or more
    FORMATS += ("AVIF",)
MAX_BYTES = 2 ** 30                                           # of a picture file

# EXIF orientation -> the operation that turns the stored picture upright
TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)                                    # orientations that exchange H and W
TIFF_PHOTOMETRIC = 262
WHITE_IS_ZERO = 0


class PictureError(ValueError):
    """A picture that cannot be used; the message is one line: the file's name and the reason."""


def picture_error(name, error):
    """Any exception -> a PictureError that names the file, on one line."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return PictureError(visible(f"{name}: {' '.join(reason.split())}"))


def printable(text):
    """Text without surrounding blanks and carriage returns, encodable as UTF-8: file names and JSON
    can hold lone surrogates."""
    return text.strip().replace("\r\n", "\n").encode(errors="replace").decode()


# ------------------------------------------------------------------------------------------------
# Decoding


def read_image(path):
    """Read one picture file -> (RGB Image, or RGBA if parts are transparent; the file's bytes).
    Raises PictureError."""
    try:
        raw = read_file(path, MAX_BYTES)
        return _decode_upright(raw), raw
    except Exception as e:                        # Pillow raises struct.error, KeyError and others
        raise picture_error(path, e) from None


def decode_image(raw, smallest=1, near=None):
    """Bytes of a picture file -> upright RGB Image, transparent parts over white.

    smallest    a shorter side of fewer pixels is refused
    near        if given, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, as long as no side falls
                below 2 * near pixels
    info["original"] of the result is the full (height, width). Raises ValueError for bytes that are
    no picture, and anything that Pillow raises for damaged ones.
    """
    image = _decode_upright(raw, smallest, near)
    flat = flatten_alpha(image)
    flat.info = image.info
    return flat


def flatten_alpha(image, ground="white"):
    """RGB or RGBA Image -> RGB Image, transparent parts over the ground colour."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")


def _decode_upright(raw, smallest=1, near=None):
    """As decode_image, but -> RGBA if parts are transparent. Of several frames the first is read.
    NOTE colour profiles are not applied."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")       # large pictures, odd EXIF data
        try:
            image = Image.open(io.BytesIO(raw), formats=FORMATS)      # refuses decompression bombs
        except UnidentifiedImageError:
            raise ValueError(f"not a picture ({', '.join(FORMATS)})") from None
        width, height = image.size
        if min(width, height) < smallest:
            raise ValueError(f"{width} x {height} pixels, smaller than {smallest}")
        if near:
            image.draft(None, (2 * near, 2 * near))
        image.load()
        orientation = _orientation(image)
        if image.mode[0] in "IF":                             # I, I;16, I;16B, F
            image = _deep_grey_to_8_bits(image)
        if orientation in TO_UPRIGHT:
            image = image.transpose(TO_UPRIGHT[orientation])
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    swapped = orientation in SWAPS_SIDES
    image.info = {"original": (width, height) if swapped else (height, width)}
    return image


def _orientation(image):
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except SyntaxError:                                       # broken EXIF data count as none
        return None


def _deep_grey_to_8_bits(image):
    """Grey Image of 16 or 32 bits or floats -> L Image. Raises ValueError for NaN and infinity.

    White is 65535 for integers; for floats it is the first of 1, 255, 65535 that no value exceeds.
    If there is no such white or some values are negative, the picture's own range is stretched.
    """
    grey = np.asarray(image, np.float64)                      # (H, W)
    low = grey.min()
    high = grey.max()
    if not np.isfinite(high - low):
        raise ValueError("some of its values are not finite")
    whites = (1, 255, 65535) if image.mode == "F" else (65535,)
    white = next((white for white in whites if 0 <= low and high <= white), None)
    if white:
        grey = grey / white
    else:
        grey = (grey - low) / max(high - low, 1e-300)
    tags = getattr(image, "tag_v2", {})
    if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:           # Pillow inverts 8-bit greys only
        grey = 1 - grey
    return Image.fromarray(np.round(255 * grey).astype(np.uint8))


# ------------------------------------------------------------------------------------------------
# Cropping


def crop_square(image, size, rng):
    """RGB Image -> (uint8 (size, size, 3), (original height, original width, top, left)).

    The shorter side is resized to `size`; then a square is cut at a random place along the longer
    side. The four numbers are SDXL's micro conditions (Podell et al. 2023, section 2.2): the size
    before resizing, and the corner of the cut in pixels after it. Only the pixels of the square are
    computed, so that a long strip costs no more than a square picture.
    """
    scale = size / min(image.size)
    width = round(image.width * scale)                        # after resizing
    height = round(image.height * scale)
    left = int(rng.integers(width - size + 1))
    top = int(rng.integers(height - size + 1))
    box = (left * image.width / width,                        # the square before resizing
           top * image.height / height,
           (left + size) * image.width / width,
           (top + size) * image.height / height)
    resampling = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    square = np.array(image.resize((size, size), resampling, box))                # (size, size, 3)
    original = image.info.get("original", (image.height, image.width))
    return square, (*original, top, left)


# ------------------------------------------------------------------------------------------------
# Writing


def save_png(path, image, text):
    """Write an Image as PNG with {key: text} in its text chunks. The file is written atomically and
    its folder is made."""
    path = Path(path)
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value.encode(errors="replace").decode())     # a path may be no Unicode
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda temporary: image.save(temporary, "PNG", pnginfo=info))


def read_png_text(path):
    """The text chunks of a PNG -> {key: text}. Raises PictureError."""
    try:
        with Image.open(io.BytesIO(read_file(path, MAX_BYTES)), formats=["PNG"]) as image:
            return dict(image.text)
    except UnidentifiedImageError:
        raise picture_error(path, ValueError("not a PNG")) from None
    except Exception as e:                                    # Pillow raises many kinds
        raise picture_error(path, e) from None


def side_by_side(images):
    """RGB Images of equal height -> one row of them with white gaps of 4 pixels."""
    gap = np.full((images[0].height, 4, 3), 255, np.uint8)
    row = [np.asarray(images[0])]
    for image in images[1:]:
        row += [gap, np.asarray(image)]
    return Image.fromarray(np.hstack(row))
