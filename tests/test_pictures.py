"""Pictures from a disk: every source gives the same, and every file is read rightly or refused by name."""
import gzip
import io
import json
import os
import pickle
import resource
import struct
import tarfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from common import ROOT                                                # noqa: F401  (puts the repository on the path)
from hypothesis import given, settings, strategies as st
from PIL import Image

import data
import disk

CORNERS = [(220, 20, 30), (20, 160, 40), (30, 60, 220), (240, 210, 20)]     # upper left and right, lower left and right


# ---------------------------------------------------------------------------------------------------------
# Inputs


def noise(seed, width=24, height=20):
    """uint8 (height, width, 3)"""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def corners(width=48, height=32):
    """Four quarters in four colours -> uint8 (height, width, 3)"""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:height // 2, :width // 2], picture[:height // 2, width // 2:] = CORNERS[:2]
    picture[height // 2:, :width // 2], picture[height // 2:, width // 2:] = CORNERS[2:]
    return picture


def encoded(array, kind="PNG", **options):
    """Bytes of a file; `array` of pixels or an Image."""
    image, file = array if isinstance(array, Image.Image) else Image.fromarray(array), io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width, height, depth, colour, rows, chunks=()):
    """A PNG written by hand: `rows` yields the bytes of each line."""
    part = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    press = zlib.compressobj(1)
    body = b"".join([press.compress(b"\0" + row) for row in rows] + [press.flush()])
    head = part(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(part(*c) for c in chunks) + part(b"IDAT", body) + part(b"IEND", b"")


def write(folder, files):
    """{path: bytes or text} -> the folder, with them in it."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    folder.mkdir(exist_ok=True)
    return folder


def write_tar(path, files):
    """[(name, bytes or text)] or {name: ...} -> an uncompressed tar, in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(number=5):
    """{name: bytes or text} of `number` pictures with captions, the names not in order of their making."""
    made = {}
    for i in np.random.default_rng(0).permutation(number):
        made[f"{i:03}.png" if i % 2 else f"{i:03}.jpg"] = encoded(noise(i, 20 + i), "PNG" if i % 2 else "JPEG")
        made[f"{i:03}.txt"] = f"picture {i}"
    return made


def contents(pictures):
    return [(np.asarray(picture).tolist(), caption, score) for picture, caption, score in pictures]


def captions(pictures):
    return [caption for _, caption, _ in pictures]


def read(folder, raw, name="a.jpg", **options):
    """The picture that the bytes of one captioned file give."""
    write(folder, {name: raw, f"{name.rsplit('.', 1)[0]}.txt": "a"})
    picture, caption, score = disk.Pictures(folder, **options)[0]
    assert (picture.mode, type(picture), caption, score) == ("RGB", Image.Image, "a", None)
    return picture


def refusal(folder, raw, name="a.jpg", **options):
    """The message with which those bytes are refused: one line that begins with the path of the file."""
    with pytest.raises(disk.PictureError) as caught:
        read(folder, raw, name, **options)
    message = str(caught.value)
    assert message.startswith(f"{folder / name}: ") and "\n" not in message and len(message) > len(f"{folder / name}: ")
    return message.removeprefix(f"{folder / name}: ")


def source_error(source):
    with pytest.raises(disk.SourceError) as caught:
        disk.Pictures(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def close(picture, wanted, by=0):
    got = np.asarray(picture).astype(int)
    assert got.shape == np.shape(wanted), (got.shape, np.shape(wanted))
    assert np.abs(got - np.asarray(wanted, int)).max() <= by


# ---------------------------------------------------------------------------------------------------------
# Sources


def test_all_sources_agree(tmp_path):
    files = samples()
    names = sorted(n for n in files if not n.endswith(".txt"))
    lines = [json.dumps({"file_name": n, "text": files[n[:3] + ".txt"]}) for n in names[::-1]]
    pairs = [(n, files[n]) for n in sorted(files)]
    write(tmp_path / "folder", files)
    write(tmp_path / "lines", {n: files[n] for n in names} | {"metadata.jsonl": "\n".join(lines)})
    write_tar(tmp_path / "one.tar", files)
    write_tar(tmp_path / "shards" / "0.tar", pairs[:6])
    write_tar(tmp_path / "shards" / "1.tar", pairs[6:])
    sources = [tmp_path / n for n in ("folder", "lines", "one.tar", "shards")]
    sources += [str(tmp_path / "sh*" / "?.tar"), str(tmp_path / "folder")]
    read = [contents(disk.Pictures(source)) for source in sources]
    assert captions(disk.Pictures(sources[0])) == [f"picture {i}" for i in range(5)]
    assert [len(pixels[0]) for pixels, _, _ in read[0]] == [20 + i for i in range(5)]
    assert all(one == read[0] for one in read)
    assert read[0][1][0] == noise(1, 21).tolist()                      # a PNG, to the pixel


def test_the_order_is_that_of_the_names(tmp_path, monkeypatch):
    """Whatever order the file system lists them in, and the same for a tar."""
    names = ["b/2", "a", "b/10", "Z", "b-1", "b/c/0", "0"]
    files = {f"{n}.{end}": encoded(noise(0)) if end == "png" else n for n in names for end in ("txt", "png")}
    write(tmp_path / "d", files)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: reversed([(w, d, n[::-1]) for w, d, n in walk(*a, **k)]))
    turned = captions(disk.Pictures(tmp_path / "d"))
    monkeypatch.undo()
    wanted = ["0", "Z", "a", "b-1", "b/10", "b/2", "b/c/0"]
    assert turned == captions(disk.Pictures(tmp_path / "d")) == wanted
    assert captions(disk.Pictures(write_tar(tmp_path / "t.tar", files))) == wanted


def test_a_folder(tmp_path):
    """Endings in capitals, dots in names; hidden files and other files count for nothing."""
    picture = encoded(noise(0))
    found = disk.Pictures(write(tmp_path, {
        "A.JPG": picture, "A.TXT": "capitals", "v1.a.png": picture, "v1.a.txt": "one", "v1.b.png": picture, "v1.b.txt": "two",
        "deep/er/x.tiff": picture, "deep/er/x.txt": "deep", ".hidden.png": picture, ".hidden.txt": "no", ".git/y.png": picture,
        ".git/y.txt": "no", "README.txt": "no picture", "A.json": "[]", "list.csv": "no", "deep/x.txt": "no picture",
        "alone.png": picture, "alone.json": '{"text": "a .json is no caption here"}', "v1.a.gif": picture}))
    assert captions(found) == ["capitals", "deep", "one", "two"]       # of one name, v1.a.gif comes before v1.a.png
    assert sorted(found.skipped) == [f"{tmp_path / 'alone.png'}: no caption",
                                     f"{tmp_path / 'v1.a.png'}: v1.a.gif has the same caption"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": encoded(noise(0)), "a.txt": "a", "shut/b.png": b"", "shut/b.txt": "b"})
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = disk.Pictures(tmp_path)
    assert len(found) == 1 and found.skipped == [f"{tmp_path / 'shut'}: Permission denied"]


def test_metadata(tmp_path):
    """A byte order mark, blank lines, CRLF, a line separator within a caption, half a character; names that lead nowhere."""
    outside = ["../out.png", "in/../../out.png", str(tmp_path / "out.png")]
    nowhere = ["gone.png", "", "in", "a\0.png", "long" * 100]
    lines = ['{"file_name": "a.png", "text": "an \\u00e4\u2028b", "score": 6}', "",
             '{"file_name": "c.png", "text": "half \\ud800"}', '{"file_name": "in/b.png", "caption": "", "score": 5.5}',
             *(json.dumps({"file_name": name, "text": "x"}) for name in outside + nowhere),
             '{"file_name": "a.png", "text": null}', '{"file_name": "a.png"}',
             '{"file_name": "in/../c.png", "text": "again", "score": null}']
    picture = encoded(noise(0))
    folder = write(tmp_path / "d", {"a.png": picture, "in/b.png": picture, "c.png": picture, "u.png": picture,
                                    "u.txt": "not listed", "metadata.jsonl": "\ufeff" + "\r\n".join(lines) + "\r\n"})
    write(tmp_path, {"out.png": picture})
    found = disk.Pictures(folder)
    assert [(c, s) for _, c, s in found] == [("an ä\u2028b", 6.0), ("half ?", None), ("again", None), ("", 5.5)]
    assert type(found[0][2]) is float
    reasons = [line.rsplit(": ", 1)[1] for line in found.skipped]
    assert reasons == ["outside the folder"] * 3 + ["no such file"] * 5 + ["no caption"] * 2


@pytest.mark.parametrize("line, reason", [
    ("{", "not a JSON object"), ("[1]", "not a JSON object"), ("[" * 100_000, "not a JSON object"),
    ('{"text": "x"}', "no file_name"),
    ('{"file_name": 3, "text": "x"}', "file_name 3"), ('{"file_name": "a.png", "text": ["x"]}', "text ['x']"),
    *[(f'{{"file_name": "a.png", "text": "x", "score": {s}}}', "is not a number")
      for s in ('"6"', "true", "[1]", "NaN", "Infinity", "1e999", "1" + "0" * 400)]])
def test_a_broken_line_is_named(tmp_path, line, reason):
    good = '{"file_name": "a.png", "text": "x"}'
    folder = write(tmp_path, {"a.png": encoded(noise(0)), "metadata.jsonl": f"{good}\n\n{line}\n{good}"})
    message = source_error(folder)
    assert message.startswith(f"{folder / 'metadata.jsonl'}, line 3: ") and reason in message and len(message) < 300


def test_sources_that_cannot_be_used(tmp_path):
    picture = encoded(noise(0))
    folder = write(tmp_path / "d", {"a.png": picture, "b.txt": "b", "c.png": picture})
    empty = write_tar(tmp_path / "e" / "e.tar", {})
    squeezed = write(tmp_path / "z", {"z.tar": gzip.compress(write_tar(tmp_path / "z.tar", samples()).read_bytes())})
    for source, reason in [(tmp_path / "gone", "no such file or folder"), (str(tmp_path / "?.jpg"), "no such file or folder"),
                           (write(tmp_path / "empty", {}), "no captioned picture"), (empty, "no captioned picture"),
                           (write(tmp_path / "m", {"metadata.jsonl": ""}), "no captioned picture"),
                           (folder, "(2 left out, the first: "),
                           (folder / "a.png", "not a whole uncompressed tar"), (squeezed, "not a whole uncompressed tar"),
                           (write(tmp_path / "0", {"0.tar": b""}) / "0.tar", "not a whole uncompressed tar")]:
        message = source_error(source)
        assert message.startswith(f"{source}: ") and reason in message
    assert f"{folder / 'a.png'}: no caption" in source_error(folder)
    assert issubclass(disk.SourceError, ValueError) and issubclass(disk.PictureError, ValueError)


def test_metadata_that_cannot_be_opened(tmp_path, monkeypatch):
    write(tmp_path, {"metadata.jsonl": "{}"})
    monkeypatch.setattr(disk.File, "read", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert "Permission denied" in source_error(tmp_path)


def test_special_characters_in_a_folder_name(tmp_path):
    folder = tmp_path / "[1] *x"
    write_tar(folder / "a.tar", samples(2))
    assert captions(disk.Pictures(folder)) == captions(disk.Pictures(folder / "a.tar")) == ["picture 0", "picture 1"]


def test_a_name_that_is_no_text(tmp_path):
    """Messages can be printed even where a file's name is not UTF-8."""
    folder = os.fsencode(write(tmp_path / "d", {}))
    for name, content in ((b"\xff.png", b"x"), (b"\xff.txt", b"a"), (b"\xfe.png", b"x")):
        with open(folder + b"/" + name, "wb") as file:
            file.write(content)
    found = disk.Pictures(tmp_path / "d")
    with pytest.raises(disk.PictureError) as caught:
        found[0]
    assert f"{caught.value} {found.skipped}".encode() and found.skipped[0].endswith(".png: no caption")


# ---------------------------------------------------------------------------------------------------------
# Tars


def test_members_that_belong_together(tmp_path):
    """WebDataset's rule, up to the first dot of the name; captions from .txt or .json, scores from .json."""
    picture = encoded(noise(0))
    path = write_tar(tmp_path / "a.tar", [
        ("./x/0.jpg", picture), ("x/1.png", picture), ("x/1.json", '{"text": "one", "score": 4}'), ("./x/0.txt", "nought"),
        ("2.webp", picture), ("2.json", '{"caption": "two"}'), ("y.1/0.jpg", picture), ("y.1/0.txt", "dotted folder"),
        ("3.mask.png", b"no picture"), ("3.png", picture), ("3.txt", "a"), ("3.json", '{"text": "not this one", "score": 7.5}'),
        ("4.png", picture), ("5.txt", "x"), ("._3.png", b"junk of a Mac"), ("6.jpg", b"an old one"), ("6.txt", "old"),
        ("6.jpg", picture), ("6.txt", "new"), ("7.cls", "3"), ("8.jpg", picture), ("8.txt", ""),
        ("8.json", '{"text": null, "score": 1}')])
    found = disk.Pictures(path)
    assert [(c, s) for _, c, s in found] == [("two", None), ("a", 7.5), ("new", None), ("", 1.0), ("nought", None),
                                             ("one", 4.0), ("dotted folder", None)]
    assert sorted(found.skipped) == [f"{path}: 3.mask.png: 3.png has the same caption", f"{path}: 4.png: no caption"]


def test_members_that_are_no_files(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, kind in enumerate((tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(f"{i}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
            tar.addfile(tarfile.TarInfo(f"{i}.txt"), io.BytesIO())
    assert "no captioned picture" in source_error(tmp_path / "a.tar")


def test_the_same_names_in_two_tars(tmp_path):
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", {"a.png": encoded(noise(i)), "a.txt": f"of {i}"})
    found = disk.Pictures(tmp_path)
    assert captions(found) == ["of 0", "of 1"]
    assert [np.array_equal(found[i][0], noise(i)) for i in range(2)] == [True, True]


@pytest.mark.parametrize("format", (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
def test_tar_formats_and_long_names(tmp_path, format):
    name, picture = "folder/" * 20 + "\u00e4" * 40, encoded(noise(0))                   # 180 letters
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for end, content in ((".png", picture), (".txt", b"long")):
            member = tarfile.TarInfo(name + end)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = disk.Pictures(tmp_path / "a.tar")
    assert captions(found) == ["long"] and found.skipped == []


def test_access_at_random(tmp_path, monkeypatch):
    """A tar is gone through once; afterwards one picture costs its own bytes, in any order, in any process or thread."""
    files = samples(8)
    path, wanted = write_tar(tmp_path / "a.tar", files), contents(disk.Pictures(write(tmp_path / "d", files)))
    found = disk.Pictures(path)
    monkeypatch.setattr(tarfile, "open", None)
    took, read = [], disk.File.read
    monkeypatch.setattr(disk.File, "read", lambda self: (lambda raw: took.append(len(raw)) or raw)(read(self)))
    picture, caption, score = found[5]
    assert (np.asarray(picture).tolist(), caption, score) == wanted[5]
    assert sorted(took) == sorted([len(files["005.png"]), len(files["005.txt"])])
    order = np.random.default_rng(1).permutation(8).tolist()
    assert [contents([found[i]])[0] for i in order] == [wanted[i] for i in order]
    assert contents(pickle.loads(pickle.dumps(found))) == wanted
    with ThreadPoolExecutor(4) as pool:
        assert contents(pool.map(found.__getitem__, list(range(8)) * 4)) == wanted * 4
    assert (len(found), found[-1][1]) == (8, "picture 7")
    with pytest.raises(IndexError):
        found[8]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_tar_cut_anywhere(tmp_path_factory, draw):
    """What was whole before the cut is read as ever, the rest is not there, and the tar is named."""
    folder = tmp_path_factory.mktemp("cut")
    path = write_tar(folder / "a.tar", samples(4))
    whole = contents(disk.Pictures(path))
    with tarfile.open(path) as tar:
        ends = {m.name: m.offset_data + m.size for m in tar}
        end = max(-(-e // 512) * 512 for e in ends.values())
    cut = draw.draw(st.one_of(st.integers(0, end), st.integers(0, end // 512).map(lambda n: 512 * n)))
    path.write_bytes(path.read_bytes()[:cut])
    left = sorted(i for i in range(4) if all(e <= cut for n, e in ends.items() if n.startswith(f"{i:03}")))
    if not left:
        assert "not a whole uncompressed tar" in source_error(path)
        return
    found = disk.Pictures(path)
    assert contents(found) == [whole[i] for i in left]
    assert sum(line.startswith(f"{path}: not a whole uncompressed tar") for line in found.skipped) == 1


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_damaged_tar(tmp_path_factory, draw):
    """Bytes changed anywhere, headers above all: what can be read is, or is refused; nothing else is raised."""
    folder = tmp_path_factory.mktemp("damaged")
    raw = bytearray(write_tar(folder / "a.tar", samples(3)).read_bytes())
    with tarfile.open(folder / "a.tar") as tar:
        heads = [m.offset for m in tar]
    for _ in range(draw.draw(st.integers(1, 4))):
        raw[draw.draw(st.sampled_from(heads)) + draw.draw(st.integers(0, 511))] = draw.draw(st.integers(0, 255))
    (folder / "a.tar").write_bytes(raw)
    try:
        found = disk.Pictures(folder / "a.tar")
        for i in range(len(found)):
            found[i]
    except (disk.SourceError, disk.PictureError) as e:
        assert str(folder / "a.tar") in str(e)


def test_a_header_with_a_negative_size(tmp_path):
    """It would send tarfile back to where it was, for ever."""
    path = write_tar(tmp_path / "a.tar", [(n, samples()[n]) for n in ("000.jpg", "000.txt", "001.png", "001.txt")])
    with tarfile.open(path) as tar:
        head = tar.getmember("001.png").offset
    raw = bytearray(path.read_bytes())
    raw[head + 124:head + 136] = b"\xff" * 10 + struct.pack(">h", -512)
    raw[head + 148:head + 156] = b" " * 8
    raw[head + 148:head + 156] = b"%06o\0 " % sum(raw[head:head + 512])
    path.write_bytes(raw)
    found = disk.Pictures(path)
    assert captions(found) == ["picture 0"] and "001.png" in found.skipped[0]


def test_one_bad_tar_among_good_ones(tmp_path):
    write_tar(tmp_path / "0.tar", samples(2))
    write(tmp_path, {"1.tar": b"no tar" * 1000, "2.tar": b""})
    write_tar(tmp_path / "3.tar", samples(2))
    found = disk.Pictures(tmp_path)
    assert captions(found) == ["picture 0", "picture 1"] * 2
    assert [line.split(": ")[0] for line in found.skipped] == [str(tmp_path / "1.tar"), str(tmp_path / "2.tar")]


def test_members_that_are_broken_are_named(tmp_path):
    picture = encoded(noise(0))
    path = write_tar(tmp_path / "a.tar", {
        "0.png": picture[:len(picture) // 2], "0.txt": "x", "1.png": picture, "1.json": "{",
        "2.png": picture, "2.json": '{"score": 3}',
        "3.png": picture, "3.json": '{"text": "x", "score": "high"}', "4.png": picture, "4.txt": "good"})
    found, messages = disk.Pictures(path), []
    for i in range(4):
        with pytest.raises(disk.PictureError) as caught:
            found[i]
        messages.append(str(caught.value).removeprefix(f"{path}: "))
    assert messages[0].startswith("0.png: ") and messages[1:] == [
        "1.json: not a JSON object", "2.json: no text or caption in it", "3.json: score 'high' is not a number"]
    assert found[4][1] == "good"
    path.unlink()
    with pytest.raises(disk.PictureError, match="4.txt: No such file"):
        found[4]


# ---------------------------------------------------------------------------------------------------------
# Captions


@pytest.mark.parametrize("raw, caption", [
    (b"\xef\xbb\xbfa cat\r\n", "a cat"), (b"two\r\nlines\r\n", "two\nlines"), ("\u00e4 \u732b".encode(), "\u00e4 \u732b"),
    (b"caf\xe9 au lait", "caf\ufffd au lait"), (b"", ""), (b" \r\n", ""), (b"\xff\xfe\xfd", "\ufffd" * 3)])
def test_captions(tmp_path, raw, caption):
    files = {"a.png": encoded(noise(0)), "a.txt": raw}
    for source in (write(tmp_path / "d", files), write_tar(tmp_path / "a.tar", files)):
        assert captions(disk.Pictures(source)) == [caption]


# ---------------------------------------------------------------------------------------------------------
# Kinds of pictures


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", dict(compression="tiff_lzw")),
                                           ("TIFF", dict(compression="tiff_deflate")), ("WEBP", dict(lossless=True))])
def test_lossless_kinds(tmp_path, kind, options):
    """To the pixel, and whatever the file is called."""
    for name in ("a.jpg", "b.gif"):
        close(read(tmp_path / name, encoded(noise(3), kind, **options), name), noise(3))


@pytest.mark.parametrize("kind, options", [("JPEG", dict(quality=95)), ("JPEG", dict(quality=95, progressive=True)),
                                           ("GIF", {}), ("WEBP", dict(quality=95))])
def test_kinds_with_loss(tmp_path, kind, options):
    picture = read(tmp_path, encoded(corners(), kind, **options))
    for (x, y), colour in zip([(8, 8), (40, 8), (8, 24), (40, 24)], CORNERS):
        assert np.abs(np.subtract(picture.getpixel((x, y)), colour)).max() <= 6


def ramp(height=16):
    """A gradient over all 16-bit levels, uint16 (height, 256), and what it is with 8 bits (height, 256, 3)."""
    wide = (np.arange(256, dtype=np.uint16) * 257)[None].repeat(height, 0)
    return wide, np.arange(256)[None, :, None].repeat(height, 0).repeat(3, 2)


def test_16_bit_png(tmp_path):
    wide, narrow = ramp()
    close(read(tmp_path, png(256, 16, 16, 0, [row.astype(">u2").tobytes() for row in wide])), narrow, by=1)


def test_16_bit_png_that_is_dark(tmp_path):
    """The scale is that of the format, not of the picture."""
    wide, narrow = ramp()
    close(read(tmp_path, png(256, 16, 16, 0, [(row // 8).astype(">u2").tobytes() for row in wide])), narrow / 8, by=1)


def test_16_bit_colours(tmp_path):
    deep = noise(2).astype(">u2") * 257
    close(read(tmp_path, png(24, 20, 16, 2, [row.tobytes() for row in deep])), noise(2))
    both = np.dstack([noise(2)[..., 0], np.full((20, 24), 255)]).astype(">u2") * 257
    close(read(tmp_path, png(24, 20, 16, 4, [row.tobytes() for row in both])), noise(2)[..., :1].repeat(3, 2))


def tiff(array, format, bits, photometric=1):
    """A grey TIFF written by hand; `array` in the byte order that its dtype says, format 1 unsigned, 2 signed, 3 float."""
    order = ">" if array.dtype.byteorder == ">" else "<"
    height, width = array.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height),
            (279, array.nbytes), (339, format)]
    body = array.tobytes()
    head = struct.pack(order + "2sHI", b"MM" if order == ">" else b"II", 42, 8 + len(body))
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    return head + body + struct.pack(order + "H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("dtype, format, bits, scale", [
    ("<u2", 1, 16, 1), (">u2", 1, 16, 1), ("<i4", 2, 32, 1), (">i4", 2, 32, 1), ("<i4", 2, 32, 30_000), ("<f4", 3, 32, 1),
    ("<f4", 3, 32, 1 / 65535), (">f4", 3, 32, 1 / 65535), ("<f4", 3, 32, 1 / 257), ("<f4", 3, 32, 1000)])
def test_deep_grey_tiffs(tmp_path, dtype, format, bits, scale):
    wide, narrow = ramp()
    close(read(tmp_path, tiff((wide.astype(float) * scale).astype(dtype), format, bits), "a.tif"), narrow, by=1)


def test_grey_levels_below_zero(tmp_path):
    wide, narrow = ramp()
    close(read(tmp_path / "f", tiff((wide / 100 - 300).astype("<f4"), 3, 32)), narrow, by=1)
    close(read(tmp_path / "i", tiff(wide.astype("<i4") - 40_000, 2, 32)), narrow, by=1)
    close(read(tmp_path / "c", tiff(np.full((16, 16), -3, "<f4"), 3, 32)), np.zeros((16, 16, 3)))
    close(read(tmp_path / "z", tiff(np.zeros((16, 16), "<f4"), 3, 32)), np.zeros((16, 16, 3)))


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
def test_values_that_are_not_finite(tmp_path, value):
    wide = ramp()[0].astype("<f4")
    wide[3, 5] = value
    assert refusal(tmp_path, tiff(wide, 3, 32)) == "some of its values are not finite"


@pytest.mark.parametrize("dtype, bits", [("<u2", 16), ("u1", 8)])
def test_white_is_zero(tmp_path, dtype, bits):
    wide, narrow = ramp()
    levels = wide if bits == 16 else narrow[..., 0]
    close(read(tmp_path, tiff(levels.astype(dtype), 1, bits, photometric=0)), 255 - narrow, by=1)


def test_grey_one_bit_and_palette(tmp_path):
    grey = noise(1)[..., 0]
    three = grey[..., None].repeat(3, 2)
    close(read(tmp_path / "L", encoded(grey)), three)
    bits, both = grey > 127, (three > 127) * 255
    close(read(tmp_path / "1", encoded(Image.fromarray(bits))), both)
    close(read(tmp_path / "h", png(24, 20, 1, 0, [np.packbits(row).tobytes() for row in bits])), both)
    close(read(tmp_path / "P", encoded(Image.fromarray(corners()).quantize(4))), corners(), by=1)


def test_palette_with_transparency(tmp_path):
    """Index 1 is half clear, index 2 wholly; both a PNG's list and a GIF's single index."""
    index = np.arange(20)[:, None].repeat(24, 1) % 3
    colours, alpha = np.array([[10, 20, 30], [200, 100, 0], [5, 5, 5]]), np.array([255, 128, 0])
    over = np.round(colours * alpha[:, None] / 255 + 255 - alpha[:, None])
    raw = png(24, 20, 8, 3, [row.astype(np.uint8).tobytes() for row in index],
              [(b"PLTE", colours.astype(np.uint8).tobytes()), (b"tRNS", alpha.astype(np.uint8).tobytes())])
    close(read(tmp_path, raw), over[index], by=1)
    image = Image.new("P", (24, 20))
    image.putdata(index.ravel().tolist())
    image.putpalette(colours.ravel().tolist())
    close(read(tmp_path, encoded(image, "GIF", transparency=2)), np.array([*colours[:2], [255] * 3])[index])


def test_alpha_goes_over_white(tmp_path):
    rng = np.random.default_rng(4)
    alpha = rng.integers(0, 256, (20, 24, 1), dtype=np.uint8)
    alpha[0], alpha[1] = 0, 255
    over = lambda colour: np.round(colour * (alpha / 255) + 255 * (1 - alpha / 255))
    rgba, la = np.dstack([noise(4), alpha]), np.dstack([noise(4)[..., :1], alpha])
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", dict(lossless=True, exact=True))):
        close(read(tmp_path, encoded(rgba, kind, **options)), over(noise(4)), by=1)
    close(read(tmp_path, encoded(la)), over(noise(4)[..., :1]).repeat(3, 2), by=1)
    keyed = corners()                                                  # one colour of an RGB picture that stands for nothing
    clear = (keyed == CORNERS[0]).all(-1, keepdims=True)
    close(read(tmp_path, encoded(keyed, transparency=CORNERS[0])), np.where(clear, 255, keyed))


@pytest.mark.parametrize("kind", ("JPEG", "TIFF"))
@pytest.mark.parametrize("ink, colour", [((0, 255, 255, 0), (255, 0, 0)), ((255, 255, 0, 0), (0, 0, 255)),
                                         ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 0, 0), (255, 255, 255))])
def test_cmyk(tmp_path, kind, ink, colour):
    close(read(tmp_path, encoded(Image.new("CMYK", (20, 20), ink), kind)), np.full((20, 20, 3), colour), by=3)


def stored(upright, orientation):
    """How a camera stores a picture (H, W, 3) under each EXIF orientation: which side of it row 0 and column 0 are."""
    side = np.swapaxes(upright, 0, 1)
    return {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
            5: side, 6: side[::-1], 7: side[::-1, ::-1], 8: side[:, ::-1]}[orientation]


@pytest.mark.parametrize("kind", ("JPEG", "PNG", "WEBP", "TIFF"))
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, kind, orientation):
    """6, for one: row 0 is the right side, column 0 the top. Checked at the corners, and the shape with them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {} if kind == "TIFF" else dict(quality=95)
    raw = encoded(np.ascontiguousarray(stored(corners(200, 140), orientation)), kind, exif=exif, **quality)
    for near in (None, 16):
        picture = read(tmp_path, raw, near=near)
        small = kind == "JPEG" and near
        assert picture.size == ((50, 35) if small else (200, 140)) and picture.info["original"] == (140, 200)
        width, height = picture.size
        for (x, y), colour in zip([(4, 4), (width - 5, 4), (4, height - 5), (width - 5, height - 5)], CORNERS):
            assert np.abs(np.subtract(picture.getpixel((x, y)), colour)).max() <= 8


def exif_block(*entries, order=b"MM\0*"):
    """EXIF data by hand; entries (tag, type, count, four bytes)."""
    return b"Exif\0\0" + order + struct.pack(">IH", 8, len(entries)) + b"".join(
        struct.pack(">HHI", *e[:3]) + e[3] for e in entries) + bytes(4)


def test_orientation_in_deep_grey(tmp_path):
    wide, narrow = ramp()
    turned = png(16, 256, 16, 0, [row.astype(">u2").tobytes() for row in stored(wide, 6)],
                 [(b"eXIf", exif_block((0x0112, 3, 1, b"\0\6\0\0"))[6:])])
    close(read(tmp_path, turned), narrow, by=1)


@pytest.mark.parametrize("kind", ("JPEG", "PNG"))
def test_odd_exif(tmp_path, kind):
    """The orientation counts beside tags of wrong types; EXIF data that is none costs no picture."""
    turned = (0x0112, 3, 1, b"\0\6\0\0")
    odd = exif_block(turned, (0x011A, 2, 4, b"abc\0"), (0x0128, 2, 4, b"no!\0"), (0x9003, 4, 1, b"\0\0\0\1"))
    picture = np.ascontiguousarray(stored(corners(), 6))
    got = read(tmp_path, encoded(picture, kind, exif=odd))
    assert got.size == (48, 32) and np.abs(np.subtract(got.getpixel((4, 4)), CORNERS[0])).max() <= 8
    for bad in (b"Exif\0\0" + b"no exif at all", exif_block(turned, order=b"MQ\0*"),
                exif_block((0x0112, 3, 1, b"\0\x63\0\0")), exif_block((0x0112, 2, 4, b"abc\0"))):
        assert read(tmp_path, encoded(corners(), kind, exif=bad)).size == (48, 32)


@pytest.mark.parametrize("kind", ("GIF", "PNG", "WEBP", "TIFF"))
def test_the_first_frame_of_several(tmp_path, kind):
    frames = [Image.new("RGB", (20, 20), colour) for colour in CORNERS[:3]]
    options = {"TIFF": {}, "WEBP": dict(duration=100, lossless=True)}.get(kind, dict(duration=100))
    raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(raw)).n_frames == 3
    close(read(tmp_path, raw), np.full((20, 20, 3), CORNERS[0]))


# ---------------------------------------------------------------------------------------------------------
# Files that cannot be read


@pytest.mark.parametrize("kind", ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"))
def test_truncated_files(tmp_path, kind):
    raw = encoded(noise(0, 64, 64), kind)
    assert read(tmp_path / "whole", raw).size == (64, 64)
    for share in (0.02, 0.3, 0.6, 0.9):
        refusal(tmp_path / "cut", raw[:int(share * len(raw))])


def test_files_that_are_no_pictures(tmp_path):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n"
    for raw in (b"", b"\0", b"not a picture at all\n" * 50, b"<svg xmlns='http://www.w3.org/2000/svg'/>", postscript,
                encoded(noise(0), "PPM"), b"\xff\xd8\xff"):
        assert refusal(tmp_path, raw).startswith("not a picture (JPEG, PNG, ")


def test_files_that_went_away(tmp_path):
    write(tmp_path, {"a.png": encoded(noise(0)), "a.txt": "a", "b.png": encoded(noise(0)), "b.txt": "b"})
    found = disk.Pictures(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.png").unlink()
    for i, name in enumerate(("a.txt", "b.png")):
        with pytest.raises(disk.PictureError) as caught:
            found[i]
        assert str(caught.value) == f"{tmp_path / name}: No such file or directory"


def test_tiny_pictures(tmp_path):
    assert refusal(tmp_path, encoded(noise(0, 15, 400))) == "15 x 400 pixels, smaller than 16"
    assert refusal(tmp_path, encoded(noise(0, 400, 1))) == "400 x 1 pixels, smaller than 16"
    assert read(tmp_path, encoded(noise(0, 16, 400))).size == (16, 400)
    assert refusal(tmp_path, encoded(noise(0, 63, 80)), smallest=64) == "63 x 80 pixels, smaller than 64"
    assert read(tmp_path, encoded(noise(0, 1, 1)), smallest=1).size == (1, 1)


def test_a_decompression_bomb(tmp_path):
    """A file of 0.2 MB that would be 400 million pixels."""
    raw = png(20_000, 20_000, 1, 0, (bytes(2500) for _ in range(20_000)))
    assert len(raw) < 400_000
    assert "400000000 pixels" in refusal(tmp_path, raw)


def test_large_pictures_without_a_warning(tmp_path, monkeypatch):
    """Between Pillow's limit for warnings and twice that, where it refuses, a picture is read."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 20 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        close(read(tmp_path, encoded(noise(0))), noise(0))
        assert "exceeds limit" in refusal(tmp_path, encoded(noise(0, 48, 20)))
        assert warnings.filters == before


def seeds():
    """One small file of each kind, deep grey and alpha among them."""
    wide = ramp()[0]
    return {"JPEG": encoded(corners(), "JPEG", exif=exif_block((0x0112, 3, 1, b"\0\6\0\0"))), "PNG": encoded(noise(0)),
            "GIF": encoded(corners(), "GIF"), "BMP": encoded(noise(0), "BMP"), "WEBP": encoded(corners(), "WEBP"),
            "TIFF": encoded(noise(0), "TIFF", compression="tiff_lzw"), "I;16": tiff(wide, 1, 16),
            "F": tiff(wide.astype("<f4"), 3, 32), "P": encoded(Image.fromarray(corners()).quantize(4), transparency=1),
            "CMYK": encoded(Image.new("CMYK", (20, 20)), "JPEG")}


SEEDS = seeds()


@settings(deadline=None, max_examples=250)
@given(st.sampled_from(sorted(SEEDS)), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
       st.floats(0, 1), st.booleans())
def test_damaged_bytes(tmp_path_factory, kind, changes, cut, whole):
    """Any bytes give an RGB picture or a PictureError that names the file; no warning, nothing else."""
    raw = bytearray(SEEDS[kind])
    for at, value in changes:                                          # half of them in the first 64 bytes: headers
        raw[int(at * 2 * 63) if at < 0.5 else int((at - 0.5) * 2 * (len(raw) - 1))] = value
    folder = tmp_path_factory.getbasetemp()
    write(folder / "fuzz", {"a.jpg": bytes(raw) if whole else bytes(raw[:int(cut * len(raw))]), "a.txt": "a"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            picture, _, _ = disk.Pictures(folder / "fuzz")[0]
            assert picture.mode == "RGB" and min(picture.size) >= 16
            assert np.asarray(picture).shape == (picture.height, picture.width, 3)
        except disk.PictureError as e:
            assert str(e).startswith(f"{folder / 'fuzz' / 'a.jpg'}: ") and "\n" not in str(e)


# ---------------------------------------------------------------------------------------------------------
# Decoding near a size, cropping


def smooth(width, height):
    """A picture without edges, that resizing changes little: uint8 (height, width, 3)"""
    x, y = np.linspace(0, 1, width), np.linspace(0, 1, height)
    grid = np.stack(np.broadcast_arrays(x[None], y[:, None], 0.5 + 0.5 * np.sin(6 * (x[None] + y[:, None]))), -1)
    return np.round(20 + 215 * grid).astype(np.uint8)


@pytest.mark.parametrize("size, near, wanted", [
    ((800, 600), 32, (100, 75)), ((800, 600), 64, (200, 150)), ((799, 601), 128, (400, 301)), ((800, 600), 200, (800, 600)),
    ((4000, 30), 8, (4000, 30))])
def test_decoding_near_a_size(tmp_path, size, near, wanted):
    """Smaller by a power of two, never below twice the size asked for, and the same to look at."""
    raw = encoded(smooth(*size), "JPEG", quality=95)
    full, small = read(tmp_path, raw), read(tmp_path, raw, near=near)
    assert (full.size, small.size) == (size, wanted)
    assert full.info["original"] == small.info["original"] == size[::-1]
    a, conditions = disk.crop(full, near, np.random.default_rng(0))
    b, same = disk.crop(small, near, np.random.default_rng(0))
    assert conditions[:2] == same[:2] == size[::-1] and np.abs(np.subtract(conditions[2:], same[2:])).max() <= 1
    assert np.abs(a.astype(int) - b).mean() < 3
    assert read(tmp_path, encoded(smooth(*size)), near=near).size == size        # not a JPEG: as it is


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 96), st.integers(0, 2 ** 32))
def test_crop_is_a_piece_of_the_whole(width, height, size, seed):
    """Against the whole picture resized, then cut at the corner that crop names."""
    picture = Image.fromarray(smooth(width, height))
    square, (oh, ow, top, left) = disk.crop(picture, size, np.random.default_rng(seed))
    assert square.shape == (size, size, 3) and square.dtype == np.uint8 and (oh, ow) == (height, width)
    whole = [round(side * size / min(width, height)) for side in (width, height)]
    assert 0 <= left <= whole[0] - size and 0 <= top <= whole[1] - size
    kind = Image.Resampling.LANCZOS if size < min(width, height) else Image.Resampling.BICUBIC
    wanted = np.asarray(picture.resize(whole, kind))[top:top + size, left:left + size]
    assert np.abs(square.astype(int) - wanted).max() <= 3


def test_crop_places(tmp_path):
    """Every place of the longer side, and no other; the corner is where the picture says; the same for the same rng."""
    wide = Image.fromarray((np.arange(40)[None, :, None] * 6).repeat(32, 0).repeat(3, 2).astype(np.uint8))
    high = wide.transpose(Image.Transpose.TRANSPOSE)
    seen = set()
    for seed in range(150):
        square, conditions = disk.crop(wide, 32, np.random.default_rng(seed))
        again, same = disk.crop(wide, 32, np.random.default_rng(seed))
        assert np.array_equal(square, again) and conditions == same
        assert conditions[:3] == (32, 40, 0) and square[0, 0, 0] == 6 * conditions[3]
        assert all(type(c) is int for c in conditions)
        seen.add(conditions[3])
        square, (height, width, top, left) = disk.crop(high, 32, np.random.default_rng(seed))
        assert (height, width, left) == (40, 32, 0) and square[0, 0, 0] == 6 * top
    assert seen == set(range(9))
    rng = np.random.default_rng(0)
    assert len({disk.crop(wide, 32, rng)[1] for _ in range(50)}) > 5    # and goes on with the generator
    disk.crop(wide, 32, rng)[0][:] = 0                                  # the pixels are the caller's own


def test_crop_reduces_without_aliasing():
    """A board of black and white pixels is grey from afar."""
    board = Image.fromarray((np.indices((512, 640)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    close(disk.crop(board, 32, np.random.default_rng(0))[0], np.full((32, 32, 3), 127.5), by=4)


@pytest.mark.parametrize("size", ((2000, 40), (40, 2000), (80_000, 16), (16, 80_000), (1, 50)))
def test_crop_of_a_strip(size):
    """Resized whole, 80000 x 16 would be 2560000 x 512 pixels."""
    strip = Image.new("RGB", size, (10, 200, 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    square, conditions = disk.crop(strip, 512, np.random.default_rng(0))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000                         # kB
    close(square, np.full((512, 512, 3), (10, 200, 30)))
    assert conditions[:2] == size[::-1] and max(conditions[2:]) > 0 and min(conditions[2:]) == 0


def test_crop_of_the_world_of_shapes():
    """Drawn at the size that is asked for: not a pixel is changed."""
    picture, _, _ = data.example(np.random.default_rng(0), 64)
    square, conditions = disk.crop(picture, 64, np.random.default_rng(0))
    assert np.array_equal(square, picture) and conditions == (64, 64, 0, 0)
