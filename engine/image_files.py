"""Captioned picture files: folders, folders with metadata.jsonl, WebDataset tars.

    images = ImageFiles("photos")
    image, caption, score = images[0]         # RGB Image, str, float or None

To read another kind, write an opener and add it to SOURCES. Every file is read correctly or refused
by name.
"""
import codecs
import glob
import json
import os
import re
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from engine.checkpoint import UserError, read_file
from engine.cli import visible
from engine.images import MAX_BYTES, decode_image, picture_error, printable

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MAX_SCORE = 3.4028234663852886e38             # the largest float32
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif",
            ".avif")
MAX_TEXT = 2 ** 24                            # bytes of a caption, or of the JSON beside a picture
MAX_METADATA = 2 ** 32                        # bytes of a metadata.jsonl
MAX_SHARDS = 100_000                          # that one pattern names


class SourceError(UserError):
    """A source that cannot be used; the message names it, or the line of its metadata."""


class File(NamedTuple):
    """A file, or the `size` bytes at `offset` of a tar; `name` is the path in the folder or tar."""
    path: str
    name: str
    offset: int | None = None
    size: int = -1

    def __str__(self):
        return self.path if self.offset is None else f"{self.path}: {self.name}"

    def read(self, limit=MAX_BYTES):
        """The bytes. Raises ValueError if they are more than `limit`, or no regular file's."""
        if self.offset is None:
            return read_file(self.path, limit)
        if self.size > limit:
            raise ValueError(f"larger than {limit / 2 ** 20:.0f} MiB")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def read_text(self, limit=MAX_TEXT):
        """UTF-8, or UTF-16 with a byte-order mark. Raises ValueError for anything else."""
        raw = self.read(limit)
        encoding = "UTF-16" if raw.startswith(UTF16_MARKS) else "UTF-8"
        try:
            text = raw.decode(encoding).removeprefix("\ufeff")
        except UnicodeDecodeError as e:
            line = raw[:e.start].decode(encoding).count("\n") + 1
            raise ValueError(f"line {line} is not {encoding}; save it as UTF-8") from None
        if "\0" in text:                      # UTF-16 without a mark, or UTF-32
            raise ValueError("no text: it has zero bytes; save it as UTF-8")
        return text


class Entry(NamedTuple):
    """A picture file and where its caption is: in `caption`, else in `about`."""
    picture: File
    caption: str | File | None = None         # the text, or a .txt file with it
    about: File | None = None                 # a .json file with caption and score
    score: float | None = None


class ImageFiles:
    """The captioned pictures of a folder, tar or pattern (SOURCES), in the order of their names.

    images[i] -> (RGB Image, caption, score or None). Raises PictureError for a picture that cannot
    be used; see decode_image for `smallest` and `near`. `skipped` tells what the listing left out,
    "name: reason". Raises SourceError if nothing is left. Files are opened at each access, so that
    threads and processes can share an ImageFiles.
    """

    def __init__(self, source, smallest=16, near=None):
        self.smallest = smallest
        self.near = near
        self.entries, skipped = open_files(source)
        self.skipped = [visible(line) for line in skipped]
        if not self.entries:
            why = f" ({len(skipped)} left out, the first: {skipped[0]})" if skipped else ""
            raise SourceError(visible(f"{source}: no captioned picture in it{why}"))

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        picture, caption, about, score = self.entries[i]
        file = picture                        # the one that a message names
        try:
            if about:
                file = about
                _, caption_there, score = _parse_json(about.read_text())
                caption = caption_there if caption is None else caption
            if isinstance(caption, File):
                file = caption
                caption = caption.read_text()
            if caption is None:
                raise ValueError("no text or caption in it")
            file = picture
            image = decode_image(picture.read(), self.smallest, self.near)
        except Exception as e:                # Pillow raises struct.error, KeyError and others
            raise picture_error(file, e) from None
        return image, printable(caption), score

    def state(self, i):
        """What identifies picture i: names, sizes and times of its files, listed caption, score."""
        state = []
        for part in self.entries[i]:
            state.append((part, _size_and_time(part.path)) if isinstance(part, File) else part)
        return state


@lru_cache(maxsize=64)
def _size_and_time(path):
    try:
        found = os.stat(path)
    except OSError as e:
        return str(e)
    return found.st_size, found.st_mtime_ns


def _parse_json(text):
    """A JSON object -> (file_name, caption, score), None for missing keys. Raises ValueError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    name = found.get("file_name")
    caption = found.get("text", found.get("caption"))
    score = found.get("score")
    for key, value in (("file_name", name), ("text", caption)):
        if not isinstance(value, str | None):
            raise ValueError(f"{key} {value!r:.40} is not a string")
    if score is None:
        return name, caption, None
    if type(score) not in (int, float) or not abs(score) <= MAX_SCORE:    # bool, NaN, infinity
        raise ValueError(f"score {score!r:.40} is not a number")
    return name, caption, float(score)


# ------------------------------------------------------------------------------------------------
# Kinds of sources


def open_files(source):
    """A path or pattern -> ([Entry], ["name: reason" for what is left out]). Raises SourceError.

    It asks the openers of SOURCES in turn. opener(path, skipped) returns [Entry], or None if the
    path is of another kind, and appends to `skipped`.
    """
    path = Path(source)
    skipped = []
    for opener in SOURCES.values():
        entries = opener(path, skipped)
        if entries is not None:
            return entries, skipped
    reason = "no such file or folder"
    if path.exists():
        reason = f"not a source of pictures, such as {', '.join(SOURCES)}"
    raise SourceError(visible(f"{source}: {reason}"))


def open_metadata(folder, skipped):
    """metadata.jsonl: a line has "file_name", "text" (or "caption"), and "score" if it is known.
    Raises SourceError that names the line."""
    path = str(folder / "metadata.jsonl")
    if not os.path.isfile(path):
        return None
    entries = []
    number = 0
    try:
        for number, line in enumerate(File(path, path).read_text(MAX_METADATA).split("\n"), 1):
            if line.strip():
                entry, reason = _metadata_entry(folder, line)
                if reason:
                    skipped.append(f"{entry.picture}: {reason}")
                else:
                    entries.append(entry)
    except (OSError, ValueError) as e:
        where = f"{path}, line {number}" if number else path  # 0: it could not be read
        raise SourceError(visible(f"{where}: {e}")) from None
    return _by_name(entries)


def open_tars(source, skipped):
    """Uncompressed WebDataset shards: one tar, recognised by content; all *.tar of a folder; all
    that match a pattern, which may have braces (x/{000..003}.tar). Beside a picture is NAME.txt, or
    NAME.json with the keys of metadata.jsonl, or both (then the .txt is the caption); NAME ends at
    the first dot."""
    if source.is_dir():
        paths = glob.glob(os.path.join(glob.escape(str(source)), "*.tar"))
    elif source.exists():
        paths = [str(source)] if _is_tar(source) else []
    else:
        paths = match_pattern(str(source))
    if not paths:
        return None
    entries = []
    for path in sorted(paths):
        entries += _match(_tar_members(path, skipped), str.partition, skipped)
    return entries


def match_pattern(pattern):
    """The files of a pattern. Each pattern that its braces stand for must match a file.
    Raises SourceError."""
    patterns = expand_braces(pattern)
    paths = []
    for one in patterns:
        found = glob.glob(one, recursive=True)
        if not found and one != pattern:
            raise SourceError(visible(f"{pattern}: no file {one}"))
        paths += found
    return list(dict.fromkeys(paths))


def expand_braces(pattern):
    """x/{08..11}.tar -> [x/08.tar, x/09.tar, x/10.tar, x/11.tar]; {a,b} too, as in a shell."""
    patterns = [""]
    for piece in re.split(r"(\{[0-9]{1,6}\.\.[0-9]{1,6}\}|\{[^{}]*,[^{}]*\})", pattern):
        choices = brace_choices(piece)
        if len(patterns) * len(choices) > MAX_SHARDS:
            raise SourceError(visible(f"{pattern}: more than {MAX_SHARDS} files"))
        patterns = [start + choice for start in patterns for choice in choices]
    return patterns


def brace_choices(piece):
    """{08..11} -> 08, 09, 10, 11; {a,b} -> a, b; other text is itself."""
    ends = re.fullmatch(r"\{([0-9]+)\.\.([0-9]+)\}", piece)
    if ends:
        first, last = int(ends[1]), int(ends[2])
        width = max(map(len, ends.groups())) if ends[1][0] == "0" else 1
        return [f"{number:0{width}d}" for number in range(first, last + 1)]
    if piece[:1] == "{" and piece[-1:] == "}" and "," in piece:
        return piece[1:-1].split(",")
    return [piece]


def open_folder(folder, skipped):
    """Pictures at any depth, NAME.txt beside each; NAME ends at the last dot."""
    if not folder.is_dir():
        return None
    files = []
    for where, _, names in os.walk(folder, onerror=lambda e: skipped.append(_os_error(e))):
        for name in names:
            path = Path(where, name)
            if path.suffix.lower() != ".json":                # here it may hold anything
                files.append(File(str(path), path.relative_to(folder).as_posix()))
    return _match(files, str.rpartition, skipped)


SOURCES = {                                   # description: opener
    "a folder with metadata.jsonl": open_metadata,
    "a whole uncompressed tar (a folder or pattern of them)": open_tars,
    "a folder of pictures": open_folder,
}


def _metadata_entry(folder, line):
    """A line of metadata.jsonl -> (Entry, None or why it is left out). Raises ValueError."""
    name, caption, score = _parse_json(line)
    if name is None:
        raise ValueError("no file_name")
    entry = Entry(File(str(folder / name), name), caption, None, score)
    path = os.path.normpath(name)
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
        return entry, "outside the folder"
    if caption is None:
        return entry, "no caption"
    if not os.path.isfile(entry.picture.path):
        return entry, "no such file"
    return entry, None


def _os_error(e):
    return f"{e.filename}: {e.strerror}"


def _is_tar(path):
    """Whether a file begins with a header of an uncompressed tar, or as an empty tar does."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "replace")
    except tarfile.EOFHeaderError:            # zeros: the end of a tar
        return True
    except tarfile.HeaderError:
        return False
    return True


def _tar_members(path, skipped):
    """-> Files of a tar; of two with one name the last. Of a broken tar those before the damage.
    Reads the headers only, once."""
    files = {}
    try:
        total = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + member.size
                if member.size < 0 or member.isreg() and end > total:
                    raise ValueError(f"it ends within {member.name}")
                if member.isreg() and not member.issparse():
                    name = os.path.normpath(member.name)
                    files[name] = File(path, name, member.offset_data, member.size)
            tar.fileobj.seek(tar.offset)
            block = tar.fileobj.read(tarfile.BLOCKSIZE)       # tarfile stops silently at damage
            if block != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"damaged or cut at byte {tar.offset}")
    except Exception as e:                    # damaged headers raise more than tarfile's own errors
        skipped.append(f"{path}: not a whole uncompressed tar ({e}), "
                       f"{len(files)} files before that are there")
    return files.values()


def _match(files, split, skipped):
    """Files -> [Entry]. Those belong together whose paths are equal up to the name's first dot
    (split = str.partition, the rule of WebDataset) or last dot (str.rpartition)."""
    groups = {}                               # (folder, NAME) -> {"picture", ".txt", ".json": File}
    for file in sorted(files, key=lambda file: (len(file.name), file.name)):
        kind = _kind_of(file.name)
        if kind is None:
            continue
        folder, _, name = file.name.rpartition("/")
        group = groups.setdefault((folder, split(name, ".")[0]), {})
        first = group.setdefault(kind, file)                  # a.jpg comes before a.mask.png
        if kind == "picture" and first is not file:
            skipped.append(f"{file}: {first.name} has the same caption")
    entries = []
    for group in groups.values():
        if "picture" in group and len(group) == 1:
            skipped.append(f"{group['picture']}: no caption")
        elif "picture" in group:
            entries.append(Entry(group["picture"], group.get(".txt"), group.get(".json")))
    return _by_name(entries)


def _kind_of(name):
    """"picture", ".txt" or ".json"; None for other files and hidden ones."""
    suffix = os.path.splitext(name)[1].lower()
    if any(part.startswith(".") for part in name.split("/")):
        return None
    if suffix in SUFFIXES:
        return "picture"
    return suffix if suffix in (".txt", ".json") else None


def _by_name(entries):
    return sorted(entries, key=lambda entry: entry.picture.name)
