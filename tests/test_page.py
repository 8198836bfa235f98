"""tools/page.py: what it shows is what meissonic.sample did, what it changes is what was asked for,
and nobody but its own page can use it. The slow tests drive a browser, where there is one."""
import base64
import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from common import (GOLDEN_MODEL, ROOT, SMALL_RUN, assert_refused, encoded, environment, noise,
                    open_picture)
from PIL import Image
from shared_pipeline import load_once      # noqa: F401

import kernels
import meissonic
import sample
from engine import rerank
from engine.settings import parse_like
from tools import page

pytestmark = pytest.mark.usefixtures("load_once")

SETTINGS = {"prompt": "a star", "seed": "5", "size": "64", "steps": "4", "cfg": "3",
            "temperature": "2 0", "remask": "2", "best-of": "1"}         # 4 + 2 steps
QUICK = SETTINGS | {"steps": "1", "remask": "0", "cfg": "1"}
UNTOUCHED = {"marked": [], "margins": [0, 0, 0, 0]}


@contextmanager
def serving(session, host="127.0.0.1"):
    """A server of a Session in a thread of its own."""
    with page.Server(host, 0, session) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@lru_cache
def make_session(*flags):
    """The same one for the same flags."""
    parser = sample.make_parser("tools.page", "")
    argv = [str(flag) for flag in ("--model", GOLDEN_MODEL, *SMALL_RUN[2:], *flags)]
    return page.Session(parse_like(parser, argv))


@pytest.fixture
def session(load_once):                    # noqa: F811
    session = make_session()
    session.drawings.clear()
    return session


@pytest.fixture
def server(session):
    with serving(session) as server:
        yield server


class Client:
    """Sends requests to a server as its page does."""

    def __init__(self, server):
        self.server = server
        self.session = server.session

    def request(self, method, path, body=None, headers={}):
        """-> (status, headers, bytes)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=30)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        reply = response.status, response.headers, response.read()
        connection.close()
        return reply

    def get(self, path):
        return json.loads(self.request("GET", path)[2])

    def post(self, path, body):
        """-> the lines of the reply"""
        raw = body if isinstance(body, bytes) else json.dumps(body)
        return [json.loads(line) for line in self.request("POST", path, raw)[2].splitlines()]

    def draw(self, **request):
        """-> (page_drawing.Drawing, its name, the lines of the reply)"""
        replies = [reply for reply in self.post("/draw", request) if "wait" not in reply]
        assert replies[-1] == {"done": True}, replies[-1]
        return self.session.drawings[replies[0]["of"]], replies[0]["of"], replies

    def error(self, path, body=None):
        """The one line that says why a request is refused."""
        reply = self.post(path, body)[-1] if body is not None else self.get(path)
        assert list(reply) == ["error"] and "\n" not in reply["error"]
        return reply["error"]


@pytest.fixture
def client(server):
    return Client(server)


def pixels(data_url):
    raw = base64.b64decode(data_url.removeprefix("data:image/png;base64,"))
    return np.asarray(open_picture(io.BytesIO(raw)))


def direct_run(pipe, settings):
    """The same picture by Pipeline.draw -> (ids, [(ids, masked, logits)] of its steps)."""
    steps = []

    def watch(n, ids, masked, logits):
        steps.append((ids, masked, logits))

    numbers = [float(text) for text in settings["temperature"].split()]
    schedule = replace(pipe.schedule, steps=int(settings["steps"]), temperature=tuple(numbers),
                       cfg_scale=float(settings["cfg"]))
    ids = pipe.draw([settings["prompt"]], [int(settings["seed"])], size=(64, 64), schedule=schedule,
                    remask=int(settings["remask"]), best_of=int(settings["best-of"]), watch=watch)
    return ids, steps


# --------------------------------------------------------------------------------------------------
# What is shown


def test_the_steps_are_those_of_a_direct_run(client):
    """In every token and every pixel, in re-masking passes, too."""
    drawing, _, (first, start, *shown, done) = client.draw(settings=SETTINGS)
    ids, steps = direct_run(client.session.pipe, SETTINGS)
    assert first["steps"] == len(steps) == len(drawing.records) == len(shown) > first["plan"] == 4
    assert start["masked"] == list(range(16)) and torch.equal(drawing.ids, ids)
    for n, (frame, record, (ids, masked, _)) in enumerate(zip(shown, drawing.records, steps), 1):
        assert (frame["n"], frame["count"], frame["total"]) == (n, n, len(steps))
        assert torch.equal(record.ids, ids) and torch.equal(record.masked, masked)
        assert frame["drawn"] == masked[0].tolist()
        picture, = client.session.pipe.decode(ids)
        assert (pixels(frame["picture"]) == np.asarray(picture)).all()


def test_the_picture_is_that_of_the_reference(client):
    """meissonic.sample with the plain predictor, without the pipeline."""
    drawing, _, _ = client.draw(settings=SETTINGS | {"remask": "0"})
    pipe = client.session.pipe
    cond = pipe.encode(["a star"], (64, 64), pipe.score)
    uncond = pipe.encode([""], (64, 64), pipe.score)
    predict = meissonic.reference_predictor(pipe.transformer, cond, uncond)
    ids = torch.full((1, 4, 4), pipe.mask_token)
    ids = meissonic.sample(predict, ids, pipe.mask_token, [5], drawing.plan)
    assert torch.equal(drawing.ids, ids)


def test_what_is_masked_after_a_step_is_drawn_in_the_next(client):
    _, _, (first, _, *shown, _) = client.draw(settings=SETTINGS)
    for n, (frame, following) in enumerate(zip(shown, shown[1:]), 1):
        if frame["masked"]:
            assert frame["masked"] == following["drawn"]
        else:
            assert n >= first["plan"]                         # a pass begins after this step
    assert shown[-1]["masked"] == []


def test_the_facts_of_a_token_are_those_of_the_logits(client):
    drawing, name, _ = client.draw(settings=SETTINGS)
    _, steps = direct_run(client.session.pipe, SETTINGS)
    seeds = torch.tensor([5])
    for n in (3, 5):                                          # 5: of a re-masking pass
        ids, masked, logits = steps[n - 1]
        step = drawing.records[n - 1].step
        noise = kernels.gumbel_noise(seeds, [step.number], 16)[0].gather(1, masked)
        _, log_p = kernels.sample_masked(logits, masked, seeds, step.number)
        for m, position in enumerate(masked[0].tolist()):
            facts = client.get(f"/token?of={name}&n={n}&position={position}")
            p = logits[0, m].softmax(0)
            assert facts["step"] == n and facts["code"] == ids.flatten()[position]
            assert facts["p"] == p[facts["code"]].item() == pytest.approx(log_p[0, m].exp().item())
            assert facts["entropy"] == pytest.approx(torch.distributions.Categorical(p).entropy())
            assert facts["confidence"] == (log_p + step.temperature * noise)[0, m].item()
            assert [one["p"] for one in facts["likely"]] == p.sort(descending=True)[0][:5].tolist()
            assert all(p[one["code"]].item() == one["p"] for one in facts["likely"])
            again = steps[n][1].tolist() if step.num_masked else [[]]
            assert facts["settled"] == (position not in again[0])


def test_a_settled_token_is_told_of_the_step_that_settled_it(client):
    drawing, name, (_, _, *shown, _) = client.draw(settings=SETTINGS)
    for position in (0, 6, 15):
        drawn = [frame["n"] for frame in shown if position in frame["drawn"]]
        for n in (1, 3, 4, 6):
            facts = client.get(f"/token?of={name}&n={n}&position={position}")
            assert facts["step"] == max(k for k in drawn if k <= n)
    assert client.get(f"/token?of={name}&n=0&position=3") == {"step": None}


def test_patches_are_decoded_where_they_would_be(client):
    """In the picture with this code."""
    settings = SETTINGS | {"size": "32", "steps": "1", "cfg": "1"}
    drawing, name, _ = client.draw(settings=settings)         # 2 x 2 tokens: all are neighbours
    for position, corner in enumerate(np.ndindex(2, 2)):
        facts = client.get(f"/token?of={name}&n=1&position={position}")
        for one in facts["likely"]:
            ids = drawing.records[0].ids.clone()
            ids[0][corner] = one["code"]
            picture, = client.session.pipe.decode(ids)
            x, y = 16 * corner[1], 16 * corner[0]
            expected = np.asarray(picture)[y:y + 16, x:x + 16].astype(int)
            assert abs(pixels(one["patch"]) - expected).max() <= 1


@pytest.mark.parametrize("at_once", (1, 2, 4))
def test_the_best_candidate_is_shown(client, cli, monkeypatch, at_once):
    """Its records end with the picture that sample.py makes, and its numbers are its own."""
    monkeypatch.setattr(rerank, "MAX_TOKENS", 16 * at_once)
    settings = SETTINGS | {"best-of": "4", "seed": "11"}
    drawing, name, replies = client.draw(settings=settings)
    ids, _ = direct_run(client.session.pipe, settings)
    T = drawing.steps
    assert torch.equal(drawing.ids, ids) and len(drawing.records) == T
    frames = [reply for reply in replies if "picture" in reply]
    assert len(frames) == 1 + T * 4 // at_once + T
    assert [frame["n"] for frame in frames[-T:]] == list(range(1, T + 1))
    alone, _ = direct_run(client.session.pipe, settings | {"best-of": "1", "seed": drawing.seed})
    assert torch.equal(alone, ids)
    record = drawing.records[2]
    facts = client.get(f"/token?of={name}&n=3&position={int(record.masked[0, 0])}")
    noise = kernels.gumbel_noise(torch.tensor([drawing.seed]), [2], 16)[0, 0, record.masked[0, 0]]
    expected = np.log(facts["p"]) + record.step.temperature * noise
    assert facts["confidence"] == pytest.approx(expected.item(), abs=1e-4)


# --------------------------------------------------------------------------------------------------
# Settings, links, files


def test_the_page_begins_with_the_flags(load_once):           # noqa: F811
    session = make_session("--prompt", "a heart", "--cfg", 4, "--negative", "blue")
    told = session.model({})
    assert told["settings"] | {"prompt": "a heart", "cfg": "4.0", "negative": "blue",
                               "best-of": "1", "steps": "2"} == told["settings"]
    untouched, touched = session.run_of({})[0], session.run_of(told["settings"])[0]
    assert untouched.png_texts(untouched.jobs) == touched.png_texts(touched.jobs)


def save(client, name):
    """Write page.png."""
    reply = client.get(f"/save?of={name}")
    assert reply["name"] == "a-star-5.png"
    Path("page.png").write_bytes(base64.b64decode(reply["png"]))


def test_a_saved_picture_is_that_of_sample(client, cli):
    """With the settings of the page on the command line, and by --like."""
    _, name, _ = client.draw(settings=SETTINGS)
    save(client, name)
    flags = []
    for name, text in SETTINGS.items():
        flags += [f"--{name}", *(text.split() if name == "temperature" else [text])]
    model = ("--model", GOLDEN_MODEL, "--device", "cpu", "--dtype", "float32")
    assert cli(*model, *flags, "--batch", 1, "--out", "b.png")[0] == 0
    status, _, err = cli("--like", "page.png", "--out", "c.png")
    assert status == 0 and err.count("note") == 0
    made = open_picture("page.png")
    for other in ("b.png", "c.png"):
        assert (np.asarray(open_picture(other)) == np.asarray(made)).all()
        assert open_picture(other).text == made.text


def test_a_picture_changed_by_hand_carries_no_settings(client, cli):
    """sample.py --like would make another one."""
    drawing, name, _ = client.draw(settings=SETTINGS)
    _, name, _ = client.draw(of=name, settings=SETTINGS, **UNTOUCHED | {"marked": [3]})
    save(client, name)
    assert open_picture("page.png").text.keys() == {"parameters"}
    assert_refused(cli, ("--like", "page.png"), "no settings")


def test_a_drawn_seed_is_told(client):
    drawing, _, replies = client.draw(settings=SETTINGS | {"seed": "-1"})
    assert int(replies[0]["seed"]) == drawing.job.seed >= 0
    again, _, _ = client.draw(settings=SETTINGS | {"seed": replies[0]["seed"]})
    assert torch.equal(again.ids, drawing.ids)


# --------------------------------------------------------------------------------------------------
# Changes


@pytest.mark.parametrize("remask", (0, 2))
def test_the_same_code_again_changes_nothing(client, remask):
    """The steps after the change are those of the old drawing, in its plan."""
    settings = SETTINGS | {"remask": str(remask)}
    old, name, _ = client.draw(settings=settings)
    for n in (1, 2, 4):
        settled = set(old.records[n - 1].masked[0].tolist())
        settled -= set(old.records[n - 1].remasked()[0].tolist())
        position = settled.pop()
        code = int(old.records[n - 1].ids.flatten()[position])
        new, _, replies = client.draw(of=name, n=n, position=position, code=code)
        assert [r["n"] for r in replies if "n" in r][0] == n
        for before, after in zip(old.records[:4], new.records[:4], strict=True):
            assert torch.equal(before.ids, after.ids)
        if not remask:
            assert torch.equal(old.ids, new.ids)


@pytest.mark.parametrize("n", (1, 3, 4, 5, 6))                # 5 and 6 are of re-masking passes
def test_a_chosen_code_stays(client, n):
    old, name, _ = client.draw(settings=SETTINGS)
    for position in old.records[n - 1].masked[0].tolist()[::5]:
        new, other, replies = client.draw(of=name, n=n, position=position, code=7)
        assert new.ids.flatten()[position] == 7 and new.changed
        assert (new.ids != client.session.pipe.mask_token).all()
        assert replies[0]["steps"] == new.steps
        assert new.records[:n - 1] == old.records[:n - 1] and len(new.records) == new.steps
        assert all((record.masked != position).all() for record in new.records[n:])
        facts = client.get(f"/token?of={other}&n={new.steps}&position={position}")
        assert facts["step"] == n and facts["settled"] and facts["confidence"] == 1e9
        assert old.ids.equal(direct_run(client.session.pipe, SETTINGS)[0])         # untouched


def test_marked_tokens_are_drawn_anew(client):
    old, name, _ = client.draw(settings=SETTINGS)
    changed = SETTINGS | {"seed": "6", "prompt": "a blue heart"}
    new, _, replies = client.draw(of=name, settings=changed, **UNTOUCHED | {"marked": [0, 5, 6]})
    kept = [i for i in range(16) if i not in (0, 5, 6)]
    assert torch.equal(new.ids.flatten()[kept], old.ids.flatten()[kept])
    assert replies[1]["masked"] == [0, 5, 6] and new.job.prompt == "a blue heart"
    start = old.ids.clone()
    start.view(-1)[[0, 5, 6]] = client.session.pipe.mask_token
    schedule = new.run.schedule
    expected = client.session.pipe.draw(["a blue heart"], [6], start, size=(64, 64), remask=2,
                                        schedule=schedule, best_of=1)
    assert torch.equal(new.ids, expected)


def test_one_token_is_drawn_anew_and_chosen(client):
    """No re-masking pass has anything to draw then."""
    _, name, _ = client.draw(settings=SETTINGS)
    new, name, _ = client.draw(of=name, settings=SETTINGS, **UNTOUCHED | {"marked": [9]})
    n = len(new.records)
    chosen, _, _ = client.draw(of=name, n=1, position=9, code=3)
    assert chosen.ids.flatten()[9] == 3 and (chosen.ids != new.ids).sum() <= 1 <= n


def test_margins_are_drawn(client):
    """Left 2 tokens and below 4: the old tokens are where they were."""
    old, name, _ = client.draw(settings=SETTINGS)
    new, _, replies = client.draw(of=name, settings=SETTINGS, marked=[], margins=[2, 0, 0, 4])
    assert new.ids.shape == (1, 8, 6) and torch.equal(new.ids[:, :4, 2:], old.ids)
    assert new.run.size == (96, 128)
    assert client.error("/draw", {"of": name, "settings": SETTINGS, "marked": [],
                                  "margins": [1, 0, 0, 0]}).startswith("size 80x64 does not fit")


def test_a_dropped_picture_keeps_its_pixels(client):
    """But for those of marked tokens, in a second change, too."""
    picture = noise(0, 64, 64)
    reply, = client.post("/upload", encoded(picture))
    assert (pixels(reply["picture"]) == picture).all() and reply["rows"] == 4
    new, name, replies = client.draw(of=reply["of"], settings=SETTINGS, marked=[0, 1],
                                     margins=[0, 0, 2, 0])
    shown = pixels(replies[-2]["picture"])
    assert shown.shape == (64, 96, 3)
    assert (shown[16:, :64] == picture[16:]).all()
    assert (shown[:16, 32:64] == picture[:16, 32:]).all()
    assert (shown[:16, :32] != picture[:16, :32]).any()
    _, _, replies = client.draw(of=name, settings=SETTINGS, **UNTOUCHED | {"marked": [23]})
    again = pixels(replies[-2]["picture"])
    assert (again[:48] == shown[:48]).all() and (again[:, :80] == shown[:, :80]).all()


@pytest.mark.parametrize("width, height, size", (
    (64, 64, (64, 64)), (300, 100, (64, 32)), (5, 400, (32, 64)), (1, 1, (32, 32)),
    (200, 201, (64, 64))))
def test_the_size_of_a_dropped_picture(session, monkeypatch, width, height, size):
    """At most the model's own; its grid has steps of 32."""
    monkeypatch.setattr(session.pipe, "size", (64, 64))
    reply = session.upload(encoded(Image.new("RGB", (width, height), "red")))
    assert (reply["columns"] * 16, reply["rows"] * 16) == size


# --------------------------------------------------------------------------------------------------
# Bad input: one line, and the next request works


@pytest.mark.parametrize("name, text", (
    ("steps", "0"), ("steps", "x"), ("seed", "1.5"), ("seed", str(2 ** 64)), ("size", "65"),
    ("size", "0"), ("cfg", "nan"), ("temperature", "1 x"), ("schedule", "no"), ("best-of", "0"),
    ("model", "x"), ("out", "x"), ("size", "4096"), ("remask", "1000"), ("prompt", "\ud800")))
def test_bad_settings(client, name, text):
    many = {"steps": "10000"} if name == "remask" else {}
    error = client.error("/draw", {"settings": SETTINGS | many | {name: text}})
    assert name in error or "tokens" in error or text in error or name == "remask"
    client.draw(settings=QUICK)


@pytest.mark.parametrize("body", (b"", b"{", b"[]", b"3", b"{}", b'{"settings": 3}', b"\xff",
                                  b'{"of": "x", "marked": [], "margins": []}', b'{"code": 3}'))
def test_bad_requests(client, body, capsys):
    assert client.error("/draw", body)
    client.draw(settings=QUICK)


@pytest.mark.parametrize("change", (
    {"n": 0}, {"n": 99}, {"n": "x"}, {"position": 16}, {"position": -1}, {"code": 64},
    {"code": None}, {"of": "x"}, {"of": []}, {"marked": [16]}, {"margins": [0, 0, 0]},
    {"margins": [0, 0, 0, -2]}, {"margins": [1000, 0, 1000, 0]}))
def test_bad_changes(client, change):
    _, name, _ = client.draw(settings=QUICK)
    request = {"of": name, "n": 1, "position": 0, "code": 1}
    if "marked" in change or "margins" in change:
        request = {"of": name, "settings": SETTINGS} | UNTOUCHED
    assert client.error("/draw", request | change)


def test_nothing_marked(client):
    _, name, _ = client.draw(settings=QUICK)
    assert "nothing is marked" in client.error("/draw", {"of": name, "settings": SETTINGS}
                                               | UNTOUCHED)


@pytest.mark.parametrize("raw", (b"", b"x" * 1000, encoded(noise(0))[:50],
                                 encoded(Image.new("1", (70_000, 1000)))),
                         ids=("empty", "text", "cut", "pixels"))
def test_bad_pictures(client, raw):
    assert "picture" in client.error("/upload", raw)


def test_a_body_has_a_limit(client):
    length = {"Content-Length": str(page.MAX_BODY + 1)}
    status, _, raw = client.request("POST", "/upload", headers=length)
    assert status == 400 and b"whole number from 0" in raw


def test_unknown_places(client):
    assert client.error("/nothing") == client.error("/../README.md") == "no such page"
    assert "of" not in client.get("/token?of=x&n=1&position=1")
    assert client.request("PUT", "/draw")[0] == 501


def test_old_drawings_are_dropped(client):
    _, first, _ = client.draw(settings=QUICK)
    for _ in range(page.KEPT):
        _, last, _ = client.draw(settings=QUICK)
    assert len(client.session.drawings) == page.KEPT
    assert "no longer" in client.error(f"/token?of={first}&n=1&position=0")
    assert client.get(f"/token?of={last}&n=1&position=0")["step"] == 1


# --------------------------------------------------------------------------------------------------
# Who may ask


@pytest.mark.parametrize("headers, ok", (
    ({}, True), ({"Host": "localhost:1"}, True), ({"Host": "127.0.0.1"}, True),
    ({"Host": "[::1]:8000"}, True), ({"Host": "evil.example"}, False),
    ({"Host": "127.0.0.1.evil.example"}, False), ({"Host": ""}, False), ({"Host": "[x"}, False),
    ({"Origin": "http://evil.example"}, False), ({"Origin": "null"}, False),
    ({"Host": "localhost:8", "Origin": "http://localhost:8"}, True),
    ({"Host": "localhost:8", "Origin": "http://localhost:9"}, False),
    ({"Host": "localhost:8", "Origin": "https://localhost:8"}, False)))
def test_hosts_and_origins(client, headers, ok):
    for method, path in (("GET", "/"), ("GET", "/model"), ("POST", "/draw")):
        body = json.dumps({"settings": QUICK}) if method == "POST" else None
        status, _, raw = client.request(method, path, body, headers)
        assert (status == 200) == ok and (ok or list(json.loads(raw)) == ["error"])
    assert bool(client.session.drawings) == ok


def test_another_host_asks_for_a_token(session):
    with serving(session, "0.0.0.0") as server:
        client = Client(server)
        token = re.search(r"[?]token=([\w-]{20,})$", server.address)[1]
        for path in ("/", "/model", "/model?token=", "/model?token=x", f"/model?token={token}x"):
            assert client.request("GET", path, headers={"Host": "my-machine"})[0] == 400
        for path in ("/", "/model"):
            assert client.request("GET", f"{path}?token={token}", headers={"Host": "my-machine"}
                                  )[0] == 200


def test_loopback_is_the_default(server):
    assert server.server_address[0] == "127.0.0.1" and "token" not in server.address


def test_flags_that_make_no_sense(cli):
    Image.fromarray(noise(0)).save("p.png")
    assert_refused(cli, ("--image", "p.png", "--prompt", "x"), "--image", script="tools.page")
    assert_refused(cli, ("--mask", "p.png"), "--mask", script="tools.page")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, _, err = cli(*SMALL_RUN, "--port", taken.getsockname()[1], script="tools.page")
        assert status == 2 and err.count("\n") == 1 and "--port" in err


def test_the_page_fetches_nothing_from_elsewhere(client):
    status, headers, raw = client.request("GET", "/")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.search(rb"https?://|\bsrc=|@import|<link|url\(", raw)


# --------------------------------------------------------------------------------------------------
# One at a time


def ask_and_leave(server, request, last_word):
    """Post a request, and close the connection once these bytes have come."""
    body = json.dumps(request)
    head = f"POST /draw HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    received = b""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as tab:
        tab.sendall((head + body).encode())
        while last_word not in received:
            received += tab.recv(10_000)


def test_a_closed_page_stops_its_drawing(client, cli):
    """What was drawn until then can be looked into."""
    settings = SETTINGS | {"steps": "16", "remask": "500"}
    ask_and_leave(client.server, {"settings": settings}, b'"count": 3')
    with client.session.turn():
        (name, drawing), = client.session.drawings.items()
    assert 3 <= len(drawing.records) < drawing.steps
    assert client.get(f"/token?of={name}&n=2&position=0")["step"]
    save(client, name)
    assert open_picture("page.png").text.keys() == {"parameters"}         # it is not the whole one
    client.draw(settings=SETTINGS)


def test_another_page_waits(client):
    """It is told so, and gets its turn; if it is closed, nothing is drawn for it."""
    request = {"settings": SETTINGS}
    replies = []
    with client.session.turn():
        waiting = threading.Thread(target=lambda: replies.extend(client.post("/draw", request)))
        waiting.start()
        ask_and_leave(client.server, request, b"wait")
        time.sleep(2.5)                                       # it is written to each second
    waiting.join(30)
    assert list(replies[0]) == ["wait"] and replies[-1] == {"done": True}
    assert len(client.session.drawings) == 1


def test_what_does_not_wait(client):
    _, name, _ = client.draw(settings=QUICK)
    with client.session.turn():
        for path in (f"/token?of={name}&n=1&position=0", f"/save?of={name}"):
            assert "under way" in client.error(path)
        assert "under way" in client.error("/upload", encoded(noise(0)))
        assert client.get("/model")


@pytest.mark.slow
def test_ctrl_c_ends_a_drawing():
    """In a process of its own, with a drawing under way: no crash while Python exits."""
    command = [sys.executable, "-m", "tools.page", *map(str, SMALL_RUN), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    port = int(re.search(r"http://127.0.0.1:(\d+)/ ", process.stdout.readline())[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/draw", json.dumps({"settings": SETTINGS | {"remask": "900"}}))
    assert b"of" in connection.getresponse().readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.strip() == "stopped"
    connection.close()


def test_drawings_of_two_pages_do_not_mix(client):
    pages = [SETTINGS | {"seed": str(seed)} for seed in range(4)]
    made = {}

    def draw(settings):
        made[settings["seed"]], *_ = client.draw(settings=settings)

    threads = [threading.Thread(target=draw, args=(settings,)) for settings in pages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for settings in pages:
        ids, _ = direct_run(client.session.pipe, settings)
        assert torch.equal(made[settings["seed"]].ids, ids)


# --------------------------------------------------------------------------------------------------
# In a browser: Debian's chromium, or the one that playwright brings


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"),
                                             args=["--no-sandbox"])
        except playwright.Error as e:
            pytest.skip(f"no browser: {str(e).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, server):
    """The page, opened. In the end it has complained of nothing in the browser's console."""
    with opened(browser, server.address) as tab:
        yield tab


@contextmanager
def opened(browser, address, **options):
    context = browser.new_context(**options)
    tab = context.new_page()
    complaints = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(address)
    yield tab
    context.close()
    refused = "status of 400"                                 # of a request, shown on the page
    assert not [text for text in complaints if refused not in text and "readback" not in text]


def status(tab, words):
    from playwright.sync_api import expect
    expect(tab.locator("#status")).to_contain_text(words, timeout=30_000)


def draw(tab, **settings):
    tab.locator("details").evaluate("details => { details.open = true; }")
    for name, text in (SETTINGS | settings).items():
        tab.fill(f"[name={name}]", text)
    tab.click("#draw")
    status(tab, "Done.")


def newest(server):
    return [*server.session.drawings.values()][-1]


def place(tab, token, columns=4, rows=4):
    """The pixel of the window at the centre of a token."""
    tab.locator("#canvas").scroll_into_view_if_needed()
    box = tab.locator("#canvas").bounding_box()
    x = box["x"] + box["width"] * (token % columns + 0.5) / columns
    return x, box["y"] + box["height"] * (token // columns + 0.5) / rows


def colour(tab, token, columns=4):
    """(red, green, blue) of the canvas at the centre of a token."""
    return tuple(tab.evaluate(f"""() => {{
        const canvas = document.getElementById("canvas"), size = canvas.width / {columns};
        const x = ({token} % {columns} + 0.5) * size;
        const y = (Math.floor({token} / {columns}) + 0.5) * size;
        return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3);
    }}"""))


GREY = (141, 141, 141)


@pytest.mark.slow
def test_draw_and_scrub(tab, server):
    """Grey is what is masked, and nothing is with the box off."""
    draw(tab)
    drawing = newest(server)
    for n in range(drawing.steps + 1):
        tab.locator("#slider").fill(str(n))
        masked = drawing.frame(n)["masked"]
        assert f"{len(masked)} masked" in tab.locator("#step").inner_text()
        assert [i for i in range(16) if colour(tab, i) == GREY] == sorted(masked)
    tab.locator("#slider").fill("1")
    tab.uncheck("#grey")
    assert GREY not in [colour(tab, i) for i in range(16)]


@pytest.mark.slow
def test_hover(tab, server):
    """The numbers on the page are those of the drawing."""
    draw(tab)
    drawing = newest(server)
    tab.locator("#slider").fill("2")
    tab.mouse.move(*place(tab, 6))
    tab.wait_for_selector("#likely button")
    facts = drawing.facts(2, 6)
    told = tab.locator("aside").inner_text()
    assert "row 2, column 3" in told and f"in step {facts['step']}" in told
    assert f"{facts['entropy'] / np.log(2):.2f} of 6.0 bits" in told
    assert f"{facts['confidence']:.2f} = log p {np.log(facts['p']):.2f}" in told
    for one, button in zip(facts["likely"], tab.locator("#likely button").all(), strict=True):
        assert f"code {one['code']}" in button.inner_text()
        assert f"{100 * one['p']:.1f}%" in button.inner_text() or one["p"] < 1e-3
        assert button.locator("img").get_attribute("src") == one["patch"]


@pytest.mark.slow
def test_another_code(tab, server):
    """The token is held with a click, so that the pointer can go to the codes."""
    draw(tab)
    old = newest(server)
    tab.locator("#slider").fill("2")
    tab.mouse.click(*place(tab, int(old.records[1].masked[0, 0])))
    tab.wait_for_selector("#likely button")
    tab.mouse.move(*place(tab, 0))
    tab.locator("#likely button").nth(3).click()
    status(tab, "changed by hand")
    new = newest(server)
    assert new is not old and new.records[:1] == old.records[:1] and new.steps == 6
    assert tab.locator("#slider").get_attribute("max") == "6"
    tab.click("#undo")
    tab.mouse.move(*place(tab, 1))
    tab.wait_for_selector("#likely button")


@pytest.mark.slow
def test_brush(tab, server):
    """A corner with the mouse; a token is unmarked by a second stroke."""
    draw(tab)
    old = newest(server)
    tab.locator("#slider").fill("2")
    tab.mouse.click(*place(tab, 9))                           # a token that is held is let go
    tab.check("#brush")
    assert GREY not in [colour(tab, i) for i in range(16)]    # what is changed is the end
    tab.locator("#width").fill("0")
    tab.mouse.move(*place(tab, 0))
    tab.mouse.down()
    for token in (1, 5, 4):
        tab.mouse.move(*place(tab, token))
    tab.mouse.up()
    tab.mouse.click(*place(tab, 0))
    tab.fill("[name=prompt]", "a heart")
    tab.click("#repaint")
    status(tab, "Done.")
    new = newest(server)
    assert new.frame(0)["masked"] == [1, 4, 5] and new.job.prompt == "a heart"
    kept = [i for i in range(16) if i not in (1, 4, 5)]
    assert torch.equal(new.ids.flatten()[kept], old.ids.flatten()[kept])
    assert new.job.seed == old.job.seed + 1


@pytest.mark.slow
def test_keys(tab, server):
    """The brush and the frame without a mouse."""
    draw(tab)
    tab.check("#brush")
    tab.locator("#width").fill("0")
    tab.locator("#canvas").focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft", "Enter"):
        tab.keyboard.press(key)
    tab.locator(".handle").nth(2).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        tab.keyboard.press(key)
    tab.click("#repaint")
    status(tab, "Done.")
    masked = newest(server).frame(0)["masked"]
    assert masked == [4, 5, 10, 11, 12, 16, 17, 22, 23]       # of 4 rows and 6 columns


@pytest.mark.slow
def test_outpaint_with_the_mouse(tab, server):
    draw(tab)
    old = newest(server)
    x, y, width, height = tab.locator(".handle").nth(3).bounding_box().values()
    tab.mouse.move(x + width / 2, y + height / 2)
    tab.mouse.down()
    tab.mouse.move(x + width / 2, y + 0.5 * tab.locator("#canvas").bounding_box()["height"])
    tab.mouse.up()
    tab.click("#repaint")
    status(tab, "Done.")
    new = newest(server)
    assert new.ids.shape == (1, 6, 4) and torch.equal(new.ids[:, :4], old.ids)


@pytest.mark.slow
def test_stop(tab, server, monkeypatch):
    """What was drawn until then is there to look at, and the next drawing begins at once."""
    show = server.session.show
    monkeypatch.setattr(server.session, "show", lambda *args: (time.sleep(0.2), show(*args)))
    tab.locator("details").evaluate("details => { details.open = true; }")
    for name, text in (SETTINGS | {"steps": "16", "remask": "30"}).items():
        tab.fill(f"[name={name}]", text)
    tab.click("#draw")
    status(tab, re.compile(r"Step ([3-9]|\d\d+) of"))
    tab.click("#stop")
    status(tab, "Stopped.")
    steps = int(tab.locator("#slider").get_attribute("max"))
    assert 3 <= steps < 50
    tab.locator("#slider").fill("2")
    tab.mouse.move(*place(tab, 3))
    tab.wait_for_selector("#likely button")
    assert steps <= len(newest(server).records) < newest(server).steps
    draw(tab)


@pytest.mark.slow
def test_link(tab, server, browser):
    """Another tab makes the same picture from the address, without a click."""
    draw(tab, prompt="50% & ünï + #1?", seed="123456789012345678")
    with opened(browser, tab.url) as other:
        status(other, "Done.")
        assert other.input_value("[name=prompt]") == "50% & ünï + #1?"
        assert other.input_value("[name=steps]") == "4"
        first, second = server.session.drawings.values()
        assert torch.equal(first.ids, second.ids) and first.job == second.job


@pytest.mark.slow
def test_drop_a_picture(tab, server):
    picture = noise(0, 64, 64)
    data = tab.evaluate_handle("""raw => {
        const bytes = Uint8Array.from(atob(raw), c => c.charCodeAt(0)), data = new DataTransfer();
        data.items.add(new File([bytes], "p.png"));
        return data;
    }""", base64.b64encode(encoded(picture)).decode())
    tab.dispatch_event("body", "drop", {"dataTransfer": data})
    status(tab, "Brush over")
    x, y = place(tab, 5)
    tab.mouse.click(x, y)                                     # 3 x 3 tokens
    tab.click("#repaint")
    status(tab, "Done.")
    drawing = newest(server)
    shown = pixels(drawing.frame(drawing.steps)["picture"])
    assert (shown[48:] == picture[48:]).all() and (shown[:48, :48] != picture[:48, :48]).any()


@pytest.mark.slow
def test_bad_input(tab, server):
    """One line on the page; what was drawn stays."""
    draw(tab)
    for name, text in (("steps", "many"), ("size", "65"), ("seed", "")):
        tab.fill(f"[name={name}]", text)
        tab.click("#draw")
        status(tab, name)
        assert tab.locator("#status").get_attribute("class") == "bad"
        assert tab.locator("#slider").get_attribute("max") == "6"
        tab.fill(f"[name={name}]", SETTINGS[name])
    tab.set_input_files("#file", ROOT / "README.md")
    status(tab, "no picture")
    draw(tab)


@pytest.mark.slow
def test_save_and_close(tab, server, tmp_path):
    """A saved file is the picture; a tab that is closed stops its drawing."""
    draw(tab)
    with tab.expect_download() as download:
        tab.click("#save")
    assert download.value.suggested_filename == "a-star-5.png"
    picture, = server.session.pipe.decode(newest(server).ids)
    assert (np.asarray(open_picture(download.value.path())) == np.asarray(picture)).all()
    tab.fill("[name=remask]", "900")
    tab.click("#draw")
    status(tab, re.compile(r"Step \d+ of"))
    tab.close()
    with server.session.turn():
        assert len(newest(server).records) < newest(server).steps


@pytest.mark.slow
def test_with_a_token(session, browser):
    with serving(session, "0.0.0.0") as server:
        address = f"http://127.0.0.1:{server.server_port}/?token={server.token}"
        with opened(browser, address) as tab:
            draw(tab)
            assert server.token in tab.url
            tab.mouse.move(*place(tab, 6))
            tab.wait_for_selector("#likely button")


@pytest.mark.slow
def test_every_control_has_a_name_and_fits_a_phone(browser, server):
    with opened(browser, server.address, viewport={"width": 360, "height": 740}) as tab:
        draw(tab)
        tab.mouse.click(*place(tab, 6))
        tab.wait_for_selector("#likely button")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        nameless = tab.evaluate("""() =>
            [...document.querySelectorAll("button, input:not([hidden]), select, textarea, canvas")]
            .filter(e => !(e.labels?.length || e.ariaLabel || e.textContent.trim()))
            .map(e => e.outerHTML)""")
        assert nameless == []
