"""Captioned pictures from a disk, of folders or tars: each is read rightly, or refused by name.

    pictures = Pictures("photos")
    picture, caption, score = pictures[0]                                  # RGB Image, str, float or None
    square, micro = crop(picture, 512, np.random.default_rng(0))           # uint8 (512, 512, 3), the micro conditions
"""
import glob
import io
import json
import os
import tarfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

KINDS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")                  # what a file holds decides, not its name
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
TURNS = dict(zip(range(2, 9), (Image.Transpose[name] for name in (     # EXIF orientation -> what undoes it
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"))))


class SourceError(ValueError):
    """A source of pictures that cannot be used; the message names it, or the line of its metadata."""


class PictureError(ValueError):
    """A picture that cannot be used; the message names its file, the member of its tar, and the reason."""


class File(NamedTuple):
    """A file, or the `size` bytes at `offset` of a tar; `name` is its path within the folder or the tar."""
    path: str
    name: str
    offset: int | None = None
    size: int = -1

    def __str__(self):
        return self.path if self.offset is None else f"{self.path}: {self.name}"

    def read(self):
        with open(self.path, "rb") as file:
            file.seek(self.offset or 0)
            return file.read(self.size)

    def text(self):
        return self.read().decode("utf-8-sig", errors="replace")


class Pictures:
    """The captioned pictures of a source, in the order of their names (tar by tar). A source is

        a folder with metadata.jsonl    lines with "file_name", "text" (or "caption"), and "score" where it is known
        a .tar, a folder of .tar files, or a pattern "shards/*.tar"      uncompressed WebDataset shards: NAME.jpg
                                        goes with NAME.txt, or NAME.json with those keys, or both (the .txt counts)
        any other folder                pictures at any depth, each with NAME.txt beside it

    pictures[i] -> (RGB Image, caption, score or None). Raises PictureError for one that cannot be used, or whose
    shorter side has fewer than `smallest` pixels. With `near`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size as
    long as no side falls below 2 * near pixels; info["original"] of the Image is the (height, width) it had.
    `skipped` lists what the listing left out, "name: reason". Raises SourceError where nothing is left, and for a
    broken line of metadata.jsonl. Files are opened for each reading: processes and threads can share a Pictures."""

    def __init__(self, source, smallest=16, near=None):
        self.smallest, self.near, skipped, folder = smallest, near, [], Path(source)
        if folder.is_dir():
            tars = sorted(glob.glob(os.path.join(glob.escape(str(folder)), "*.tar")))
        else:
            tars = [str(folder)] if folder.exists() else sorted(glob.glob(str(source), recursive=True))
        if (folder / "metadata.jsonl").is_file():
            self.entries = _read_metadata(folder, skipped)
        elif tars:
            self.entries = [e for tar in tars for e in _match(_list_tar(tar, skipped), str.partition, skipped)]
        elif folder.is_dir():
            self.entries = _match(_list_folder(folder, skipped), str.rpartition, skipped)
        else:
            raise SourceError(_clean(f"{source}: no such file or folder"))
        self.skipped = [_clean(line) for line in skipped]
        if not self.entries:
            why = f" ({len(skipped)} left out, the first: {skipped[0]})" if skipped else ""
            raise SourceError(_clean(f"{source}: no captioned picture in it{why}"))

    def __len__(self):
        return len(self.entries)

    def state(self, i):
        """What changes when the ith picture or its caption does: names, captions that were listed, sizes and times of files."""
        return [(part, _size_and_time(part.path)) if isinstance(part, File) else part for part in self.entries[i]]

    def __getitem__(self, i):
        picture, caption, about, score = self.entries[i]
        try:
            if file := about:
                _, said, score = _parse(file.text())
                caption = said if caption is None else caption
            if isinstance(caption, File):
                caption = (file := caption).text()
            if caption is None:
                raise ValueError("no text or caption in it")
            image = _decode_picture((file := picture).read(), self.smallest, self.near)
        except Exception as e:                     # broken pictures make Pillow raise struct.error, KeyError and more
            raise _picture_error(file, e) from None
        return image, _clean(caption), score


@lru_cache(maxsize=64)
def _size_and_time(path):
    try:
        found = os.stat(path)
    except OSError as e:
        return str(e)
    return found.st_size, found.st_mtime_ns


def _picture_error(file, e):
    why = getattr(e, "strerror", None) or str(e) or type(e).__name__
    return PictureError(_clean(f"{file}: {' '.join(why.split())}"))


def read_picture(path):
    """One picture file -> (RGB or, where it has transparent parts, RGBA Image; its bytes). Raises PictureError."""
    try:
        raw = File(str(path), str(path)).read()
        return _upright(raw, 1), raw
    except Exception as e:
        raise _picture_error(path, e) from None


def _clean(text):
    """Without blanks around it, carriage returns, and the halves of characters that JSON and file names may hold."""
    return text.strip().replace("\r\n", "\n").encode(errors="replace").decode()


def _parse(text):
    """A JSON object -> (file_name, caption, score), None for what it does not say. Raises ValueError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    name, caption, score = found.get("file_name"), found.get("text", found.get("caption")), found.get("score")
    for key, value in (("file_name", name), ("text", caption)):
        if not isinstance(value, str | None):
            raise ValueError(f"{key} {value!r:.40} is not a string")
    if score is not None and not (type(score) in (int, float) and abs(score) < 1e300):      # nor NaN, nor true
        raise ValueError(f"score {score!r:.40} is not a number")
    return name, caption, None if score is None else float(score)


def _read_metadata(folder, skipped):
    """metadata.jsonl -> entries (picture, caption, None, score) by name. Raises SourceError, naming the line."""
    entries, path, number = [], str(folder / "metadata.jsonl"), 0
    try:
        for number, line in enumerate(File(path, path).text().split("\n"), 1):
            if line.strip():
                name, caption, score = _parse(line)
                if name is None:
                    raise ValueError("no file_name")
                file, inside = File(str(folder / name), name), os.path.normpath(name)
                outside = os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir
                reason = "outside the folder" if outside else "no caption" if caption is None else "no such file"
                if outside or caption is None or not os.path.isfile(file.path):
                    skipped.append(f"{file}: {reason}")
                else:
                    entries.append((file, caption, None, score))
    except (OSError, ValueError) as e:
        raise SourceError(_clean(f"{path}, line {number}: {e}")) from None
    return sorted(entries, key=lambda entry: entry[0].name)


def _list_folder(folder, skipped):
    """-> Files at any depth. A .json beside a picture may be anybody's: there only a .txt is a caption."""
    for where, _, names in os.walk(folder, onerror=lambda e: skipped.append(f"{e.filename}: {e.strerror}")):
        for path in (Path(where, name) for name in names if not name.lower().endswith(".json")):
            yield File(str(path), path.relative_to(folder).as_posix())


def _list_tar(path, skipped):
    """-> Files of a tar (of two with one name, the last); of a broken one those before the damage. Headers alone
    are read, once."""
    files = {}
    try:
        total = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.size < 0 or member.isreg() and member.offset_data + member.size > total:
                    raise ValueError(f"it ends within {member.name}")
                if member.isreg() and not member.issparse():
                    name = os.path.normpath(member.name)
                    files[name] = File(path, name, member.offset_data, member.size)
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):    # tarfile just stops at damage
                raise ValueError(f"damaged or cut at byte {tar.offset}")
    except Exception as e:                         # damaged headers make tarfile raise its own errors and others
        skipped.append(f"{path}: not a whole uncompressed tar ({e}), {len(files)} files before that are there")
    return files.values()


def _match(files, split, skipped):
    """Files -> entries (picture, .txt or None, .json or None, None) by name. Those belong together whose paths are
    equal up to the name's first dot (split: str.partition, WebDataset's rule) or last (str.rpartition)."""
    groups = {}
    for file in sorted(files, key=lambda file: (len(file.name), file.name)):       # a.jpg comes before a.mask.png
        folder, _, name = file.name.rpartition("/")
        kind = os.path.splitext(name)[1].lower()
        kind = "picture" if kind in ENDINGS else kind
        if kind in ("picture", ".txt", ".json") and not any(part.startswith(".") for part in file.name.split("/")):
            first = groups.setdefault((folder, split(name, ".")[0]), {}).setdefault(kind, file)
            if kind == "picture" and first is not file:
                skipped.append(f"{file}: {first.name} has the same caption")
    entries = [(g["picture"], g.get(".txt"), g.get(".json"), None) for g in groups.values() if "picture" in g]
    skipped += [f"{picture}: no caption" for picture, text, about, _ in entries if not (text or about)]
    return sorted((e for e in entries if e[1] or e[2]), key=lambda entry: entry[0].name)


def _decode_picture(raw, smallest, near):
    """Bytes of a file -> RGB Image: as `_upright`, transparent parts over white."""
    picture = _upright(raw, smallest, near)
    info, picture = picture.info, flatten(picture)
    picture.info = info
    return picture


def flatten(picture, ground="white"):
    """RGB or RGBA Image -> RGB Image, transparent parts over the ground."""
    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture).convert("RGB")


def _upright(raw, smallest, near=None):
    """Bytes of a file -> RGB or, where it has transparent parts, RGBA Image: its first frame, upright; colour profiles
    are not applied. Raises ValueError, and whatever Pillow raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")                # a large picture, odd EXIF: read or refused
        try:
            picture = Image.open(io.BytesIO(raw), formats=KINDS)       # refuses decompression bombs
        except UnidentifiedImageError:
            raise ValueError(f"not a picture ({', '.join(KINDS)})") from None
        width, height = picture.size
        if min(width, height) < smallest:
            raise ValueError(f"{width} x {height} pixels, smaller than {smallest}")
        if near:
            picture.draft(None, (2 * near, 2 * near))
        picture.load()
        try:
            turn = picture.getexif().get(ExifTags.Base.Orientation)
        except SyntaxError:                                            # EXIF that is none says nothing
            turn = None
        if picture.mode[0] in "IF":                                    # I, I;16, I;16B, F
            picture = _grey(picture)
        if turn in TURNS:
            picture = picture.transpose(TURNS[turn])
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture.info = {"original": (width, height) if turn in (5, 6, 7, 8) else (height, width)}
    return picture


def _grey(picture):
    """A picture of greys of 16 or 32 bits or floats -> L. White is 65535, or for floats the first of 1, 255 and 65535
    that none exceeds; where there is no such white, or some are negative, the picture's own range is spread."""
    grey = np.asarray(picture, np.float64)                             # (H, W)
    low, high = grey.min(), grey.max()
    if not np.isfinite(high - low):
        raise ValueError("some of its values are not finite")
    whites = (1, 255, 65535) if picture.mode == "F" else (65535,)
    white = next((white for white in whites if 0 <= low and high <= white), None)
    grey = grey / white if white else (grey - low) / max(high - low, 1e-300)
    if getattr(picture, "tag_v2", {}).get(262) == 0:                   # a TIFF's WhiteIsZero, which Pillow leaves so
        grey = 1 - grey
    return Image.fromarray(np.round(255 * grey).astype(np.uint8))


def crop(picture, size, rng):
    """RGB Image -> (uint8 (size, size, 3), (original height, original width, top, left)): the shorter side resized to
    `size`, then a square cut from a random place of the longer. The four numbers are SDXL's micro conditions
    (Podell et al. 2023, section 2.2): the size before resizing, and the cut's corner in pixels after it.
    The square alone is ever computed, so that a strip of any length costs no more."""
    scale = size / min(picture.size)
    whole = [round(side * scale) for side in picture.size]             # width, height after resizing
    left, top = (int(rng.integers(side - size + 1)) for side in whole)
    ends = zip((left, top, left + size, top + size), 2 * picture.size, 2 * whole)
    box = [at * before / after for at, before, after in ends]          # the square's, before resizing
    kind = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    square = np.array(picture.resize((size, size), kind, box))         # (size, size, 3)
    return square, (*picture.info.get("original", (picture.height, picture.width)), top, left)
