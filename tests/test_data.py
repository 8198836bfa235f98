"""Training data: all kinds of sources agree, broken files are named, tokens are encoded once."""
import gzip
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from common import ROOT, encoded, golden_tokenizer, noise, photos, tiny_vq, write
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine import data, image_files
from engine.checkpoint import CheckpointError, UserError
from engine.data import FileSource, TokenDataset, encode_images, epoch_indices, readable, to_float
from engine.image_files import MAX_TEXT, Entry, File, ImageFiles, SourceError
from engine.images import PictureError, crop_square

# ------------------------------------------------------------------------------------------------
# Inputs


def write_tar(path, files):
    """{name: bytes or text}, or pairs of these -> an uncompressed tar, in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(number=5):
    """{name: bytes or text} of `number` captioned pictures, in a shuffled order."""
    files = {}
    for i in np.random.default_rng(0).permutation(number):
        kind = "PNG" if i % 2 else "JPEG"
        files[f"{i:03}.png" if i % 2 else f"{i:03}.jpg"] = encoded(noise(i, 20 + i), kind)
        files[f"{i:03}.txt"] = f"picture {i}"
    return files


def contents(images):
    return [(np.asarray(image).tolist(), caption, score) for image, caption, score in images]


def captions(images):
    return [caption for _, caption, _ in images]


def source_error(source):
    """Why a source is refused: one line that begins with its path."""
    with pytest.raises(SourceError) as caught:
        ImageFiles(source)
    message = str(caught.value)
    assert message.startswith(f"{source}") and "\n" not in message
    return message


PICTURE = encoded(noise(0))


# ------------------------------------------------------------------------------------------------
# Kinds of sources


def test_all_kinds_of_sources_agree(tmp_path):
    files = samples()
    names = sorted(name for name in files if not name.endswith(".txt"))
    lines = [json.dumps({"file_name": n, "text": files[n[:3] + ".txt"]}) for n in names[::-1]]
    pairs = [(name, files[name]) for name in sorted(files)]
    write(tmp_path / "folder", files)
    write(tmp_path / "lines", {name: files[name] for name in names})
    write(tmp_path / "lines", {"metadata.jsonl": "\n".join(lines)})
    write_tar(tmp_path / "one.tar", files)
    write_tar(tmp_path / "no-suffix", files)                              # content decides
    write_tar(tmp_path / "shards" / "0.tar", pairs[:6])
    write_tar(tmp_path / "shards" / "1.tar", pairs[6:])
    sources = [tmp_path / name for name in ("folder", "lines", "one.tar", "no-suffix", "shards")]
    sources += [str(tmp_path / "sh*" / "?.tar"), str(tmp_path / "folder")]
    found = [contents(ImageFiles(source)) for source in sources]
    assert [caption for _, caption, _ in found[0]] == [f"picture {i}" for i in range(5)]
    assert [len(pixels[0]) for pixels, _, _ in found[0]] == [20 + i for i in range(5)]
    assert all(one == found[0] for one in found)
    assert found[0][1][0] == noise(1, 21).tolist()                        # the PNG is exact


def test_pictures_come_in_the_order_of_their_names(tmp_path, monkeypatch):
    """Whatever order the file system lists them in, and the same for a tar."""
    names = ["b/2", "a", "b/10", "Z", "b-1", "b/c/0", "0"]
    files = {f"{name}.txt": name for name in names} | {f"{name}.png": PICTURE for name in names}
    write(tmp_path / "d", files)
    walk = os.walk

    def reversed_walk(*args, **options):
        found = [(where, folders, names[::-1]) for where, folders, names in walk(*args, **options)]
        return reversed(found)

    monkeypatch.setattr(os, "walk", reversed_walk)
    backwards = captions(ImageFiles(tmp_path / "d"))
    monkeypatch.undo()
    wanted = ["0", "Z", "a", "b-1", "b/10", "b/2", "b/c/0"]
    assert backwards == captions(ImageFiles(tmp_path / "d")) == wanted
    assert captions(ImageFiles(write_tar(tmp_path / "t.tar", files))) == wanted


def test_a_new_kind_of_source_is_one_function(tmp_path, monkeypatch):
    """A .csv beside its pictures, "name,caption" a line."""
    def open_csv(path, skipped):
        if path.suffix != ".csv":
            return None
        rows = [line.split(",") for line in path.read_text().splitlines()]
        return [Entry(File(str(path.with_name(name)), name), caption) for name, caption in rows]

    write(tmp_path, {"a.png": PICTURE, "b.png": PICTURE, "list.csv": "a.png,one\nb.png,two\n"})
    assert "not a source of pictures" in source_error(tmp_path / "list.csv")
    monkeypatch.setitem(image_files.SOURCES, "a .csv file", open_csv)
    assert captions(ImageFiles(tmp_path / "list.csv")) == ["one", "two"]
    assert "a .csv file" in source_error(tmp_path / "a.png")


def test_files_of_no_known_kind_are_refused_by_name(tmp_path):
    """A file is never taken for a tar because of its name or because it is a file."""
    tar = write_tar(tmp_path / "a" / "0.tar", samples(2)).read_bytes()
    files = {"photo.png": PICTURE, "metadata.jsonl": '{"file_name": "photo.png", "text": "x"}',
             "packed.tar": gzip.compress(tar), "packed.tar.gz": gzip.compress(tar),
             "text.tar": b"no tar" * 1000, "empty.tar": b"", "cut.tar": tar[:300]}
    write(tmp_path, files)
    os.mkfifo(tmp_path / "pipe")                                          # opening it would hang
    for name in (*files, "pipe"):
        message = source_error(tmp_path / name)
        assert message.startswith(f"{tmp_path / name}: not a source of pictures, such as ")
        assert "a whole uncompressed tar" in message


def test_sources_with_nothing_in_them(tmp_path):
    folder = write(tmp_path / "d", {"a.png": PICTURE, "b.txt": "b", "c.png": PICTURE})
    empty = write_tar(tmp_path / "e" / "e.tar", {})
    packed = write(tmp_path / "z", {"z.tar": gzip.compress(empty.read_bytes())})
    for source, reason in [
            (tmp_path / "gone", "no such file or folder"),
            (str(tmp_path / "?.jpg"), "no such file or folder"),
            (write(tmp_path / "empty", {}), "no captioned picture"),
            (empty, "no captioned picture"),
            (write(tmp_path / "m", {"metadata.jsonl": ""}), "no captioned picture"),
            (folder, f"(2 left out, the first: {folder / 'a.png'}: no caption)"),
            (packed, f"{packed / 'z.tar'}: not a whole uncompressed tar"),
            (str(tmp_path / "d" / "*.png"), "a.png: not a whole uncompressed tar")]:
        message = source_error(source)
        assert message.startswith(f"{source}: ") and reason in message
    assert issubclass(SourceError, UserError)


def test_special_characters_in_a_folder_name(tmp_path):
    folder = tmp_path / "[1] *x"
    write_tar(folder / "a.tar", samples(2))
    for source in (folder, folder / "a.tar"):
        assert captions(ImageFiles(source)) == ["picture 0", "picture 1"]


# ------------------------------------------------------------------------------------------------
# Folders


def test_a_folder(tmp_path):
    """Suffixes in capitals and dots in names are fine; hidden and other files do not count."""
    images = ImageFiles(write(tmp_path, {
        "A.JPG": PICTURE, "A.TXT": "capitals", "A.json": "[]",
        "v1.a.png": PICTURE, "v1.a.txt": "one", "v1.a.gif": PICTURE,
        "v1.b.png": PICTURE, "v1.b.txt": "two",
        "deep/er/x.tiff": PICTURE, "deep/er/x.txt": "deep", "deep/x.txt": "no picture",
        ".hidden.png": PICTURE, ".hidden.txt": "no", ".git/y.png": PICTURE, ".git/y.txt": "no",
        "README.txt": "no picture", "list.csv": "no",
        "alone.png": PICTURE, "alone.json": '{"text": "a .json is no caption here"}'}))
    assert captions(images) == ["capitals", "deep", "one", "two"]
    assert sorted(images.skipped) == [f"{tmp_path / 'alone.png'}: no caption",
                                      f"{tmp_path / 'v1.a.png'}: v1.a.gif has the same caption"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": PICTURE, "a.txt": "a", "shut/b.png": b"", "shut/b.txt": "b"})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    images = ImageFiles(tmp_path)
    assert len(images) == 1 and images.skipped == [f"{tmp_path / 'shut'}: Permission denied"]


def test_a_name_that_is_no_text(tmp_path):
    """Messages can be printed even if a file's name is not UTF-8."""
    folder = os.fsencode(write(tmp_path / "d", {}))
    for name, content in ((b"\xff.png", b"x"), (b"\xff.txt", b"a"), (b"\xfe.png", b"x")):
        with open(folder + b"/" + name, "wb") as file:
            file.write(content)
    images = ImageFiles(tmp_path / "d")
    with pytest.raises(PictureError) as caught:
        images[0]
    assert f"{caught.value} {images.skipped}".encode()
    assert images.skipped[0].endswith("\\udcfe.png: no caption")


def test_names_with_terminal_escapes(tmp_path):
    """What is printed and written to skipped.txt has one line for each file, and acts on no
    terminal."""
    evil = "a\x1b[2J\n1 pictures skipped\u202e"
    tar = {f"{evil}.png": PICTURE, "b.png": PICTURE, "b.txt": "b"}
    write_tar(tmp_path / "a.tar", tar)
    write(tmp_path / "d", tar | {f"c{evil}.png": b"no picture", f"c{evil}.txt": "c"})
    for source in ("a.tar", "d"):
        images = ImageFiles(tmp_path / source)
        assert len(images.skipped) == 1 and images.skipped[0].isprintable()
        assert "a\\x1b[2J\\n1 pictures skipped\\u202e.png: no caption" in images.skipped[0]
    with pytest.raises(PictureError) as caught:
        images[1]
    assert str(caught.value).isprintable()
    with pytest.raises(SourceError) as caught:
        ImageFiles(tmp_path / f"no{evil}")
    assert str(caught.value).isprintable()


def test_files_that_never_end(tmp_path):
    """Captions, sidecars and pictures that are devices, or of a size that no such file has."""
    write(tmp_path, {"a.png": PICTURE, "b.txt": "b", "c.png": PICTURE, "d.txt": "d"})
    os.symlink("/dev/zero", tmp_path / "a.txt")
    os.symlink("/dev/zero", tmp_path / "b.png")
    for name, size in (("c.txt", MAX_TEXT), ("d.png", 10 ** 13)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size + 1)                           # sparse: takes no room
    images = ImageFiles(tmp_path)
    reasons = ("a.txt: not a regular", "b.png: not a regular", "c.txt: larger", "d.png: larger")
    for i, reason in enumerate(reasons):
        with pytest.raises(PictureError) as caught:
            images[i]
        assert str(caught.value).startswith(str(tmp_path / reason))


@pytest.mark.parametrize("pattern, names", (
    ("{000..002}.tar", ["000", "001", "002"]), ("{8..11}.tar", ["8", "9", "10", "11"]),
    ("{08..11}.tar", ["08", "09", "10", "11"]), ("{a,b}{1..2}.tar", ["a1", "a2", "b1", "b2"]),
    ("{3..3}.tar", ["3"]), ("{1,1}.tar", ["1"]), ("[ab]{1..2}.tar", ["a1", "a2", "b1", "b2"])))
def test_braces_in_a_pattern(tmp_path, pattern, names):
    for name in {*names, "0", "12"}:
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": PICTURE, f"{name}.txt": name})
    images = ImageFiles(tmp_path / pattern)
    assert sorted(image[1] for image in images) == sorted(names)


@pytest.mark.parametrize("pattern, word", (
    ("{0..1}.tar", "1.tar"), ("{0..999999}.tar", "more than"), ("{0..9999999}.tar", "no such file"),
    ("{0..9999}{0..9999}", "more"),
    ("{5..1}.tar", "no such file"), ("{0..x}.tar", "no such file"), ("{,}", "")))
def test_braces_that_match_no_file(tmp_path, pattern, word):
    """Of shards in a row none may be missing."""
    write_tar(tmp_path / "0.tar", {"a.png": PICTURE, "a.txt": "a"})
    assert word in source_error(tmp_path / pattern)


def test_a_name_with_braces_is_itself(tmp_path):
    write_tar(tmp_path / "{0..1}.tar", {"a.png": PICTURE, "a.txt": "a"})
    assert len(ImageFiles(tmp_path / "{0..1}.tar")) == 1


@pytest.mark.parametrize("raw, caption", [
    (b"\xef\xbb\xbfa cat\r\n", "a cat"), (b"two\r\nlines\r\n", "two\nlines"),
    ("\u00e4 \u732b".encode(), "\u00e4 \u732b"), (b"", ""), (b" \r\n", ""),
    ("\ufeffcaf\u00e9 \U0001f408\r\n".encode("utf-16-le"), "caf\u00e9 \U0001f408"),
    ("\ufeffcaf\u00e9 \u0a41".encode("utf-16-be"), "caf\u00e9 \u0a41"), (b"\xff\xfe", "")])
def test_captions(tmp_path, raw, caption):
    """UTF-8, and UTF-16 with a byte-order mark."""
    files = {"a.png": PICTURE, "a.txt": raw}
    for source in (write(tmp_path / "d", files), write_tar(tmp_path / "a.tar", files)):
        assert captions(ImageFiles(source)) == [caption]


NOT_UTF_8 = "line 1 is not UTF-8; save it as UTF-8"
NOT_UTF_16 = "line 2 is not UTF-16; save it as UTF-8"
ZERO_BYTES = "no text: it has zero bytes; save it as UTF-8"


@pytest.mark.parametrize("raw, reason", [
    ("caf\u00e9 au lait".encode("latin-1"), NOT_UTF_8), ("\u732b\u5728".encode("gbk"), NOT_UTF_8),
    ("a cat".encode("utf-16-le"), ZERO_BYTES),                            # without a mark
    ("\ufeffa".encode("utf-32-le"), ZERO_BYTES), ("\ufeffa".encode("utf-32-be"), NOT_UTF_8),
    ("\ufeffa\n\ud83d".encode("utf-16-le", "surrogatepass"), NOT_UTF_16),
    ("\ufeffa\nb".encode("utf-16-be")[:-1], NOT_UTF_16), (b"a cat\0\0\0", ZERO_BYTES)])
def test_captions_that_are_not_unicode(tmp_path, raw, reason):
    """The picture is left out and its caption named, never one with replacement characters."""
    files = {"a.png": PICTURE, "a.txt": raw, "b.png": PICTURE, "b.txt": "good"}
    folder = write(tmp_path / "d", files)
    for source, name in ((folder, folder / "a.txt"),
                         (write_tar(tmp_path / "a.tar", files), f"{tmp_path / 'a.tar'}: a.txt")):
        images = ImageFiles(source)
        with pytest.raises(PictureError) as caught:
            images[0]
        assert str(caught.value) == f"{name}: {reason}"
        assert images[1][1] == "good"
    encode(FileSource(folder, 0, 20), tmp_path / "run")
    assert (tmp_path / "run" / "skipped.txt").read_text() == f"{folder / 'a.txt'}: {reason}\n"


def test_metadata_in_utf_16_or_worse(tmp_path):
    line = '{"file_name": "a.png", "text": "caf\u00e9"}'
    folder = write(tmp_path, {"a.png": PICTURE, "metadata.jsonl": f"\ufeff{line}".encode("utf-16")})
    assert captions(ImageFiles(folder)) == ["caf\u00e9"]
    write(folder, {"metadata.jsonl": f"{{}}\n\n{line}".encode("latin-1")})
    message = source_error(folder)
    assert message == f"{folder}/metadata.jsonl: line 3 is not UTF-8; save it as UTF-8"


def test_pictures_and_captions_that_are_pipes(tmp_path):
    """Opening one would hang."""
    write(tmp_path, {"a.txt": "a", "b.png": PICTURE})
    os.mkfifo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.txt")
    images = ImageFiles(tmp_path)
    for i, name in enumerate(("a.png", "b.txt")):
        with pytest.raises(PictureError) as caught:
            images[i]
        assert str(caught.value) == f"{tmp_path / name}: not a regular file"


def test_files_that_went_away(tmp_path):
    write(tmp_path, {"a.png": PICTURE, "a.txt": "a", "b.png": PICTURE, "b.txt": "b"})
    images = ImageFiles(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.png").unlink()
    for i, name in enumerate(("a.txt", "b.png")):
        with pytest.raises(PictureError) as caught:
            images[i]
        assert str(caught.value) == f"{tmp_path / name}: No such file or directory"


def test_small_and_reduced_pictures(tmp_path):
    """`smallest` and `near` reach the decoder."""
    write(tmp_path, {"a.png": encoded(noise(0, 15, 40)), "a.txt": "a",
                     "b.jpg": encoded(noise(0, 400, 300), "JPEG"), "b.txt": "b"})
    images = ImageFiles(tmp_path, near=64)
    assert images[1][0].size == (200, 150) and images[1][0].info["original"] == (300, 400)
    with pytest.raises(PictureError, match="a.png: 15 x 40 pixels, smaller than 16"):
        images[0]
    assert ImageFiles(tmp_path, smallest=1)[0][0].size == (15, 40)


# ------------------------------------------------------------------------------------------------
# metadata.jsonl


def test_metadata(tmp_path):
    """Byte order mark, blank lines, CRLF, a line separator and half a character in captions, names
    that lead nowhere or outside."""
    outside = ["../out.png", "in/../../out.png", str(tmp_path / "out.png")]
    nowhere = ["gone.png", "", "in", "a\0.png", "long" * 100]
    lines = ['{"file_name": "a.png", "text": "an \\u00e4\u2028b", "score": 6}', "",
             '{"file_name": "c.png", "text": "half \\ud800"}',
             '{"file_name": "in/b.png", "caption": "", "score": 5.5}']
    lines += [json.dumps({"file_name": name, "text": "x"}) for name in outside + nowhere]
    lines += ['{"file_name": "a.png", "text": null}', '{"file_name": "a.png"}',
              '{"file_name": "in/../c.png", "text": "again", "score": null}']
    write(tmp_path, {"out.png": PICTURE})
    folder = write(tmp_path / "d", {
        "a.png": PICTURE, "in/b.png": PICTURE, "c.png": PICTURE, "u.png": PICTURE,
        "u.txt": "not listed", "metadata.jsonl": "\ufeff" + "\r\n".join(lines) + "\r\n"})
    images = ImageFiles(folder)
    found = [(caption, score) for _, caption, score in images]
    assert found == [("an ä\u2028b", 6.0), ("half ?", None), ("again", None), ("", 5.5)]
    assert type(images[0][2]) is float
    reasons = [line.rsplit(": ", 1)[1] for line in images.skipped]
    assert reasons == ["outside the folder"] * 3 + ["no such file"] * 5 + ["no caption"] * 2


BAD_SCORES = ('"6"', "true", "[1]", "NaN", "Infinity", "1e999", "1" + "0" * 400,
              "1e299", "3.5e38", "-1e39", str(10 ** 39))                  # beyond float32


@pytest.mark.parametrize("line, reason", [
    ("{", "not a JSON object"), ("[1]", "not a JSON object"), ("[" * 100_000, "not a JSON object"),
    ('{"text": "x"}', "no file_name"), ('{"file_name": 3, "text": "x"}', "file_name 3"),
    ('{"file_name": "a.png", "text": ["x"]}', "text ['x']"),
    *[(f'{{"file_name": "a.png", "text": "x", "score": {score}}}', "is not a number")
      for score in BAD_SCORES]])
def test_a_broken_line_is_named(tmp_path, line, reason):
    good = '{"file_name": "a.png", "text": "x"}'
    text = f"{good}\n\n{line}\n{good}"
    message = source_error(write(tmp_path, {"a.png": PICTURE, "metadata.jsonl": text}))
    assert message.startswith(f"{tmp_path / 'metadata.jsonl'}, line 3: ")
    assert reason in message and len(message) < 300


def test_metadata_that_cannot_be_opened(tmp_path, monkeypatch):
    def refuse(self, limit):
        raise PermissionError(13, "Permission denied")

    write(tmp_path, {"metadata.jsonl": "{}"})
    monkeypatch.setattr(File, "read", refuse)
    assert "Permission denied" in source_error(tmp_path)


# ------------------------------------------------------------------------------------------------
# Tars


def test_members_that_belong_together(tmp_path):
    """WebDataset's rule: equal up to the first dot; captions in .txt or .json, scores in .json."""
    path = write_tar(tmp_path / "a.tar", [
        ("./x/0.jpg", PICTURE), ("x/1.png", PICTURE), ("x/1.json", '{"text": "one", "score": 4}'),
        ("./x/0.txt", "nought"), ("2.webp", PICTURE), ("2.json", '{"caption": "two"}'),
        ("y.1/0.jpg", PICTURE), ("y.1/0.txt", "dotted folder"),
        ("3.mask.png", b"no picture"), ("3.png", PICTURE), ("3.txt", "a"),
        ("3.json", '{"text": "not this one", "score": 7.5}'), ("4.png", PICTURE), ("5.txt", "x"),
        ("._3.png", b"junk of a Mac"), ("6.jpg", b"an old one"), ("6.txt", "old"),
        ("6.jpg", PICTURE), ("6.txt", "new"), ("7.cls", "3"), ("8.jpg", PICTURE), ("8.txt", ""),
        ("8.json", '{"text": null, "score": 1}')])
    images = ImageFiles(path)
    assert [(caption, score) for _, caption, score in images] == [
        ("two", None), ("a", 7.5), ("new", None), ("", 1.0), ("nought", None), ("one", 4.0),
        ("dotted folder", None)]
    assert sorted(images.skipped) == [f"{path}: 3.mask.png: 3.png has the same caption",
                                      f"{path}: 4.png: no caption"]


def test_members_that_are_no_files(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        kinds = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)
        for i, kind in enumerate(kinds):
            member = tarfile.TarInfo(f"{i}.png")
            member.type = kind
            member.linkname = "/etc/passwd"
            tar.addfile(member)
            tar.addfile(tarfile.TarInfo(f"{i}.txt"), io.BytesIO())
    assert "no captioned picture" in source_error(tmp_path / "a.tar")


def test_the_same_names_in_two_tars(tmp_path):
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", {"a.png": encoded(noise(i)), "a.txt": f"of {i}"})
    images = ImageFiles(tmp_path)
    assert captions(images) == ["of 0", "of 1"]
    assert all(np.array_equal(images[i][0], noise(i)) for i in range(2))


@pytest.mark.parametrize("kind", (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
def test_tar_formats_and_long_names(tmp_path, kind):
    name = "folder/" * 20 + "\u00e4" * 40                                 # 180 letters
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        for suffix, content in ((".png", PICTURE), (".txt", b"long")):
            member = tarfile.TarInfo(name + suffix)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    images = ImageFiles(tmp_path / "a.tar")
    assert captions(images) == ["long"] and images.skipped == []


def test_random_access_to_a_tar(tmp_path, monkeypatch):
    """A tar is listed once. Then a picture costs its own bytes, in any order, process or thread."""
    files = samples(8)
    wanted = contents(ImageFiles(write(tmp_path / "d", files)))
    images = ImageFiles(write_tar(tmp_path / "a.tar", files))
    monkeypatch.setattr(tarfile, "open", None)
    sizes = []
    read = File.read

    def counting_read(self, *limit):
        raw = read(self, *limit)
        sizes.append(len(raw))
        return raw

    monkeypatch.setattr(File, "read", counting_read)
    assert contents([images[5]]) == [wanted[5]]
    assert sorted(sizes) == sorted([len(files["005.png"]), len(files["005.txt"])])
    for i in np.random.default_rng(1).permutation(8).tolist():
        assert contents([images[i]]) == [wanted[i]]
    assert contents(pickle.loads(pickle.dumps(images))) == wanted
    with ThreadPoolExecutor(4) as pool:
        assert contents(pool.map(images.__getitem__, list(range(8)) * 4)) == wanted * 4
    assert (len(images), images[-1][1]) == (8, "picture 7")
    with pytest.raises(IndexError):
        images[8]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_tar_cut_anywhere(tmp_path_factory, draw):
    """What is whole before the cut is read, the rest is left out, and the tar is named."""
    path = write_tar(tmp_path_factory.mktemp("cut") / "a.tar", samples(4))
    whole = contents(ImageFiles(path))
    with tarfile.open(path) as tar:
        ends = {member.name: member.offset_data + member.size for member in tar}
    blocks = -(-max(ends.values()) // 512)
    anywhere = st.integers(0, 512 * blocks)
    between_blocks = st.integers(0, blocks).map(lambda n: 512 * n)
    cut = draw.draw(st.one_of(anywhere, between_blocks))
    path.write_bytes(path.read_bytes()[:cut])
    left = []
    for i in range(4):
        if all(end <= cut for name, end in ends.items() if name.startswith(f"{i:03}")):
            left.append(i)
    if not left:
        assert "a whole uncompressed tar" in source_error(path)
        return
    images = ImageFiles(path)
    assert contents(images) == [whole[i] for i in left]
    named = [line for line in images.skipped if "not a whole uncompressed tar" in line]
    assert len(named) == 1 and named[0].startswith(f"{path}: ")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_damaged_tar(tmp_path_factory, draw):
    """Changed headers: what can be read is read, the rest is refused; nothing else is raised."""
    path = write_tar(tmp_path_factory.mktemp("damaged") / "a.tar", samples(3))
    raw = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    for _ in range(draw.draw(st.integers(1, 4))):
        place = draw.draw(st.sampled_from(headers)) + draw.draw(st.integers(0, 511))
        raw[place] = draw.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        images = ImageFiles(path)
        for i in range(len(images)):
            images[i]
    except (SourceError, PictureError) as e:
        assert str(path) in str(e)


def test_a_header_with_a_negative_size(tmp_path):
    """tarfile alone would go back and read the same header for ever."""
    files = samples()
    names = ("000.jpg", "000.txt", "001.png", "001.txt")
    path = write_tar(tmp_path / "a.tar", [(name, files[name]) for name in names])
    with tarfile.open(path) as tar:
        header = tar.getmember("001.png").offset
    raw = bytearray(path.read_bytes())
    raw[header + 124:header + 136] = b"\xff" * 10 + struct.pack(">h", -512)
    raw[header + 148:header + 156] = b" " * 8
    raw[header + 148:header + 156] = b"%06o\0 " % sum(raw[header:header + 512])
    path.write_bytes(raw)
    images = ImageFiles(path)
    assert captions(images) == ["picture 0"] and "001.png" in images.skipped[0]


def test_bad_tars_among_good_ones(tmp_path):
    write_tar(tmp_path / "0.tar", samples(2))
    write(tmp_path, {"1.tar": b"no tar" * 1000, "2.tar": b""})
    write_tar(tmp_path / "3.tar", samples(2))
    images = ImageFiles(tmp_path)
    assert captions(images) == ["picture 0", "picture 1"] * 2
    named = [line.split(": ")[0] for line in images.skipped]
    assert named == [str(tmp_path / "1.tar"), str(tmp_path / "2.tar")]


def test_broken_members_are_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", {
        "0.png": PICTURE[:len(PICTURE) // 2], "0.txt": "x", "1.png": PICTURE, "1.json": "{",
        "2.png": PICTURE, "2.json": '{"score": 3}', "3.png": PICTURE,
        "3.json": '{"text": "x", "score": "high"}', "4.png": PICTURE, "4.txt": "good"})
    images = ImageFiles(path)
    messages = []
    for i in range(4):
        with pytest.raises(PictureError) as caught:
            images[i]
        messages.append(str(caught.value).removeprefix(f"{path}: "))
    assert messages[0].startswith("0.png: ")
    assert messages[1:] == ["1.json: not a JSON object", "2.json: no text or caption in it",
                            "3.json: score 'high' is not a number"]
    assert images[4][1] == "good"
    path.unlink()
    with pytest.raises(PictureError, match="4.txt: No such file"):
        images[4]


# ------------------------------------------------------------------------------------------------
# The source of picture files


def test_file_source(tmp_path):
    """A square, its caption, and as micro conditions the original width and height, top, left of
    the crop, and the score; 6 where there is none. The same each time, another for another seed."""
    lines = [{"file_name": "a.png", "text": "one", "score": 4.5},
             {"file_name": "b.png", "text": "two"}]
    write(tmp_path, {"a.png": encoded(noise(0, 90, 30)), "b.png": encoded(noise(1, 20, 64)),
                     "metadata.jsonl": "\n".join(map(json.dumps, lines))})
    source = FileSource(tmp_path, seed=3, size=24)
    assert len(source) == 2 and source.size == 24 and source.skipped == []
    for i, (caption, score) in enumerate((("one", 4.5), ("two", data.DEFAULT_SCORE))):
        picture, said, micro_conds = source[i]
        image = source.images[i][0]
        wanted, (height, width, top, left) = crop_square(image, 24, np.random.default_rng([3, i]))
        assert np.array_equal(picture, wanted) and said == caption
        assert micro_conds.tolist() == [width, height, top, left, score]
        assert micro_conds.dtype == np.float32 and picture.dtype == np.uint8
        assert np.array_equal(picture, source[i][0])
    assert any(FileSource(tmp_path, seed, 24)[0][2][3] != source[0][2][3] for seed in range(5))


def test_readable(tmp_path):
    """As many as asked for, from any index on and round the end, without the broken ones."""
    source = FileSource(photos(tmp_path / "a", 5, broken=(1, 3)), 0, 40)
    for number, first, wanted in ((2, 0, [0, 2]), (3, 3, [4, 0, 2]), (9, 1, [2, 4, 0])):
        pictures, captions, micro_conds = readable(source, number, first)
        assert captions == tuple(f"a red circle, number {i}" for i in wanted)
        assert np.array_equal(pictures, [noise(i, 40, 40) for i in wanted])
        assert np.shape(micro_conds) == (len(wanted), 5)
    with pytest.raises(UserError, match="no picture of --data could be read"):
        readable(FileSource(photos(tmp_path / "b", 2, broken=(0, 1)), 0, 40), 1)


def test_to_float():
    pictures = np.stack([noise(0), noise(1)])
    images = to_float(pictures)
    assert images.shape == (2, 3, 20, 24) and images.dtype == torch.float32
    assert images[1, 2, 5, 7] == pictures[1, 5, 7, 2] / np.float32(255)


# ------------------------------------------------------------------------------------------------
# Ahead of the loop


def make_item(step, attempt):
    """-> a str, an array and a tensor."""
    rng = np.random.default_rng([step, attempt])
    return f"{step} {attempt}", rng.random(3), torch.from_numpy(rng.random((2, 2)))


@pytest.mark.parametrize("workers", (0, 2))
def test_prefetched_items_are_those_of_direct_calls(workers):
    """In turn, from any step and attempt on, and after the end."""
    prefetch = data.Prefetch(make_item, 6, workers)
    calls = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (4, 1), (5, 1), (5, 1), (2, 2), (1, 0), (5, 2)]
    for step, attempt in calls:
        name, array, tensor = prefetch(step, attempt)
        expected = make_item(step, attempt)
        assert name == expected[0] and np.array_equal(array, expected[1])
        assert torch.equal(tensor, expected[2]) and not tensor.is_shared()
    assert prefetch.pool is None


@pytest.mark.skipif(sys.platform != "linux", reason="workers are for Linux")
def test_items_are_made_ahead_up_to_the_last_step():
    prefetch = data.Prefetch(make_item, 12, 2)
    ahead = []
    for step in range(12):
        prefetch(step, 0)
        ahead.append(len(prefetch.pending))
    assert ahead == [7, 7, 7, 7, 7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("workers", (0, 2))
@pytest.mark.parametrize("error", (UserError("no picture"), PictureError("a.png: broken"),
                                   KeyError("x")), ids=lambda error: type(error).__name__)
def test_errors_of_workers_arrive_as_they_are(workers, error):
    def make(step, attempt):
        if step == 2:
            raise error
        return step

    prefetch = data.Prefetch(make, 9, workers)
    assert [prefetch(0, 0), prefetch(1, 0)] == [0, 1]
    with pytest.raises(type(error)) as caught:
        prefetch(2, 0)
    assert caught.value.args == error.args


@pytest.mark.skipif(sys.platform != "linux", reason="workers are for Linux")
def test_a_killed_worker_is_an_error_of_one_line():
    prefetch = data.Prefetch(lambda step, attempt: os.kill(os.getpid(), signal.SIGKILL), 9, 1)
    with pytest.raises(UserError, match="memory"):
        prefetch(0, 0)


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from engine import data
seen = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: seen.append(number))
prefetch = data.Prefetch(lambda step, attempt: os.getpid(), 30, 2)
workers = {prefetch(0, 0)}
for number in (signal.SIGINT, signal.SIGTERM):
    os.killpg(os.getpgid(0), number)
workers |= {prefetch(step, 0) for step in range(1, 30)}
print(len(seen), os.getpid() in workers, any(os.path.exists(f"/proc/{pid}") for pid in workers))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are for Linux")
def test_signals_are_for_the_main_process():
    """Ctrl-C reaches the whole group: the workers go on, and end with the last step."""
    done = subprocess.run([sys.executable, "-c", SIGNALLED, str(ROOT)], capture_output=True,
                          text=True, timeout=60, start_new_session=True)
    assert done.stdout.split() == ["2", "False", "False"], done.stderr


@pytest.mark.parametrize("cores, processes, on_cpu, on_gpu", (
    (2, 1, 1, 1), (16, 1, 1, 15), (64, 1, 1, 16), (64, 8, 1, 7), (4, 8, 1, 1)))
def test_the_number_of_workers(monkeypatch, cores, processes, on_cpu, on_gpu):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert data.worker_number(torch.device("cpu")) == on_cpu
    assert data.worker_number(torch.device("cuda")) == on_gpu


# ------------------------------------------------------------------------------------------------
# Encoding


def one_process(out, rank=0, world_size=1):
    out.mkdir(exist_ok=True)
    return SimpleNamespace(rank=rank, world_size=world_size, is_main=rank == 0, out=out,
                           device=torch.device("cpu"), barrier=lambda: None)


def encode(source, out, chunk=5, about="photos", model=None, **place):
    """Encode a source of 40 x 40 pixels into out/tokens -> the files."""
    folder = out / "tokens"
    model = model or tiny_vq()
    run = one_process(out, **place)
    encode_images(source, folder, model, golden_tokenizer(), about, run, chunk)
    return sorted(folder.iterdir())


def stamps(files):
    return [path.stat().st_mtime_ns for path in files]


def assert_same_tensors(files, others):
    assert [path.name for path in files] == [path.name for path in others]
    for path, other in zip(files, others):
        tensors = load_file(path)
        wanted = load_file(other)
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)


def test_encoding_a_folder(tmp_path, capsys):
    """What the files hold; broken pictures are left out, counted and named."""
    source = FileSource(photos(tmp_path / "photos", broken=(3, 7)), 0, 40)
    files = encode(source, tmp_path / "run")
    assert [path.name for path in files] == [f"{k:06d}.safetensors" for k in range(3)]
    parts = [load_file(path) for path in files]
    assert [len(part["text"]) for part in parts] == [4, 4, 2]
    assert {key: tensor.dtype for key, tensor in parts[0].items()} == {
        "tokens": torch.int16, "text": torch.int32, "micro": torch.float32}
    pictures, texts, micro_conds = readable(source, 12)
    images = to_float(np.stack(pictures))
    tokens = torch.cat([part["tokens"] for part in parts])                        # (10, 10, 10)
    text = torch.cat([part["text"] for part in parts])                            # (10, L)
    micro = torch.cat([part["micro"] for part in parts])                          # (10, 5)
    assert torch.equal(tokens.long(), tiny_vq().encode(images))
    assert torch.equal(text.long(), golden_tokenizer()(texts))
    assert torch.equal(micro, torch.from_numpy(np.stack(micro_conds)))
    assert (micro == torch.tensor([40, 40, 0, 0, data.DEFAULT_SCORE])).all()
    err = capsys.readouterr().err
    assert "2 pictures skipped" in err and "003.png" in err
    named = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0][-7:] for line in named] == ["003.png", "007.png"]
    with safe_open(files[0], framework="pt") as file:
        assert file.metadata().keys() == {"format", "source", "state", "skipped"}
        assert file.metadata()["source"] == "photos"


def test_an_interrupted_encode_loses_one_chunk(tmp_path):
    """Stopped in the third file, then resumed: the first two stay, and all are as uninterrupted."""
    class Interrupted(FileSource):
        def __getitem__(self, i):
            if i == 10:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    folder = photos(tmp_path / "photos")
    whole = encode(FileSource(folder, 0, 40), tmp_path / "whole", chunk=4)
    with pytest.raises(KeyboardInterrupt):
        encode(Interrupted(folder, 0, 40), tmp_path / "run", chunk=4)
    files = sorted((tmp_path / "run" / "tokens").iterdir())
    assert [path.name for path in files] == ["000000.safetensors", "000001.safetensors"]
    before = stamps(files)
    files = encode(FileSource(folder, 0, 40), tmp_path / "run", chunk=4)
    assert stamps(files[:2]) == before
    assert_same_tensors(files, whole)


def test_several_processes_share_the_files(tmp_path):
    source = FileSource(photos(tmp_path / "photos", broken=(3, 7)), 0, 40)
    alone = encode(source, tmp_path / "alone")
    odd = encode(source, tmp_path / "run", rank=1, world_size=2)
    assert [path.name for path in odd] == ["000001.safetensors"]
    files = encode(source, tmp_path / "run", rank=0, world_size=2)
    assert_same_tensors(files, alone)
    assert len((tmp_path / "run" / "skipped.txt").read_text().splitlines()) == 2


def test_worker_processes_read_the_same(tmp_path, monkeypatch):
    source = FileSource(photos(tmp_path / "photos", broken=(3, 7)), 0, 40)
    alone = encode(source, tmp_path / "alone")
    monkeypatch.setattr(data, "MIN_FOR_WORKERS", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)                               # one is left free
    loader = mock.Mock(wraps=data.DataLoader)
    monkeypatch.setattr(data, "DataLoader", loader)
    assert_same_tensors(encode(source, tmp_path / "run"), alone)
    assert loader.call_args.kwargs["num_workers"] == 2
    assert len((tmp_path / "run" / "skipped.txt").read_text().splitlines()) == 2


def test_tokens_are_made_again_for_another_model_or_source_only(tmp_path):
    folder = photos(tmp_path / "photos")
    source = FileSource(folder, 0, 40)
    before = stamps(encode(source, tmp_path / "run"))
    assert stamps(encode(source, tmp_path / "run")) == before
    files = encode(source, tmp_path / "run", about="photos, another model", model=tiny_vq(seed=1))
    assert all(new != old for new, old in zip(stamps(files), before))
    (folder / "011.png").unlink()
    (folder / "010.png").unlink()
    files = encode(FileSource(folder, 0, 40), tmp_path / "run")                   # now two chunks
    assert [path.name for path in files] == ["000000.safetensors", "000001.safetensors"]


def test_a_changed_caption_or_picture_is_encoded_again(tmp_path):
    """And the files of the others are kept."""
    folder = photos(tmp_path / "photos")

    def encode_as_another_process():
        image_files._size_and_time.cache_clear()
        return stamps(encode(FileSource(folder, 0, 40), tmp_path / "run", chunk=4))

    first = encode_as_another_process()
    (folder / "005.txt").write_text("a star")
    second = encode_as_another_process()
    assert [a == b for a, b in zip(first, second)] == [True, False, True]
    Image.new("RGB", (40, 40), "red").save(folder / "009.png")
    third = encode_as_another_process()
    assert [a == b for a, b in zip(second, third)] == [True, True, False]


def test_a_chunk_of_broken_pictures(tmp_path):
    """Its file is empty and skipped by the dataset; without any picture there is no dataset."""
    source = FileSource(photos(tmp_path / "photos", 6, broken=(2, 3)), 0, 40)
    encode(source, tmp_path / "run", chunk=2)
    dataset = TokenDataset(tmp_path / "run" / "tokens")
    assert len(dataset) == 4 and dataset.grid == (10, 10)
    encode(FileSource(photos(tmp_path / "b", 2, broken=(0, 1)), 0, 40), tmp_path / "bad")
    with pytest.raises(UserError, match="no picture in it could be read"):
        TokenDataset(tmp_path / "bad" / "tokens")


def test_a_broken_token_file_is_named(tmp_path):
    source = FileSource(photos(tmp_path / "photos", 6), 0, 40)
    path = encode(source, tmp_path / "run")[1]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{path}: not a whole safetensors file.*remove it"):
        encode(source, tmp_path / "run")


# ------------------------------------------------------------------------------------------------
# Reading tokens


def test_tokens_are_read_across_files(tmp_path):
    """Codes above 32767 wrap in int16 and are read back as they were."""
    g = torch.Generator().manual_seed(0)
    parts = []
    for number in (3, 1, 4):
        parts.append({"tokens": torch.randint(40_000, (number, 2, 2), generator=g).to(torch.int16),
                      "text": torch.randint(50_000, (number, 3), generator=g).int(),
                      "micro": torch.rand(number, 5, generator=g)})
    parts[0]["tokens"][0, 0, 0] = -1                                              # 65535
    for i, part in enumerate(parts):
        save_file(part, tmp_path / f"{i}.safetensors")
    dataset = TokenDataset(tmp_path)
    index = np.array([7, 0, 3, 2, 4])
    ids, text_ids, micro_conds = dataset[index]
    whole = {key: torch.cat([part[key] for part in parts])[index] for key in parts[0]}
    assert len(dataset) == 8 and dataset.grid == (2, 2)
    assert ids.dtype == text_ids.dtype == torch.int64 and micro_conds.dtype == torch.float32
    assert torch.equal(ids, whole["tokens"].long() & 0xFFFF) and ids[1, 0, 0] == 65535
    assert torch.equal(text_ids, whole["text"].long())
    assert torch.equal(micro_conds, whole["micro"])
    assert np.array_equal(dataset.indices([3, 0], 2, 4), epoch_indices([3, 0], 2, 4, 8))


def test_each_example_comes_once_in_an_epoch():
    for batch, number in ((8, 30), (7, 20), (16, 10)):
        seen = np.concatenate([epoch_indices([0, 0], i, batch, number) for i in range(4 * number)])
        for epoch in range(len(seen) // number):
            part = seen[epoch * number:(epoch + 1) * number]
            assert sorted(part) == list(range(number))
        assert not np.array_equal(seen[:number], seen[number:2 * number])
    first = epoch_indices([0, 0], 0, 8, 30)
    assert not np.array_equal(first, epoch_indices([0, 1], 0, 8, 30))
    assert np.array_equal(first, np.random.default_rng([0, 0, 0]).permutation(30)[:8])
