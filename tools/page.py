"""A web page that draws pictures and shows how the model comes to them.

    python -m tools.page                                      # then open the address it prints
    python -m tools.page --model meissonic --port 8080
    python -m tools.page --like out/a-star-0.png              # begins with these settings
    python -m tools.page --host 0.0.0.0                       # for other machines, with a token

Takes the flags of sample.py as the settings that the page begins with; --best-of is 1 if not given.
tools/page.html is the page, this file its server, tools/page_drawing.py what it draws. Replies are
JSON; /draw replies with a line for each step, until the page is closed or has enough.
"""
import argparse
import base64
import contextlib
import copy
import io
import json
import re
import secrets
import socket
import tempfile
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

import sample
from engine import hub, pipeline
from engine.checkpoint import UserError
from engine.cli import is_out_of_memory, say, script, visible, whole
from engine.edit import Edit, check_flags, extend_canvas
from engine.images import FORMATS, decode_image, picture_error, save_png
from engine.jobs import Job, Run, file_stem, load_pipeline, read_prompts
from engine.settings import SOFTWARE, check_like, from_text, parse_like, setting_flags, to_text
from tools.page_drawing import Drawing

PAGE = Path(__file__).with_name("page.html")
SETTINGS = ("prompt", "negative", "seed", "steps", "cfg", "size", "temperature", "schedule",
            "remask", "best-of", "score-condition")
KEPT = 8                                                      # drawings; page.html knows it, too
MAX_BODY = 2 ** 25                                            # bytes of a request
MAX_PIXELS = 2 ** 26                                          # of a picture that is dropped
MAX_RECORDED = 2 ** 24                                        # tokens x steps x candidates
LOOPBACK = r"localhost|127(\.\d+){3}|::1"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff"}


@script("tools.page", out_of_memory=sample.OUT_OF_MEMORY)
def main(argv=None):
    parser = sample.make_parser("tools.page", __doc__)
    parser.add_argument("--host", default="127.0.0.1",
                        help="address to listen at (default: 127.0.0.1, for this machine alone)")
    parser.add_argument("--port", type=whole(0, 65535), default=8000,
                        help="0 takes a free one (default: 8000)")
    args = parse_like(parser, argv)
    check_flags(args)
    if args.image:
        raise UserError("--image: drop the picture on the page")
    session = Session(args)
    with Server(args.host, args.port, session) as server:
        say(f"open {server.address} (Ctrl-C ends it)")
        try:
            server.serve_forever()
        finally:
            session.stop()


# --------------------------------------------------------------------------------------------------
# What the page asks for. A query is {name: text}, a request what JSON has


def refuse():
    raise UserError("a drawing is under way, try again when it is done")


class Session:
    """The model, whose turn it is to use it, and the newest drawings."""

    def __init__(self, args):
        args.prompt = read_prompts(args)[:1]
        args.best_of = args.best_of or 1
        args.batch = 1
        self.args, self.pipe = args, load_pipeline(args)
        if self.pipe.one_step:
            raise UserError("this model draws in one step: there is nothing to watch")
        weights = hub.fingerprint(self.pipe.folders, self.pipe.dtype)
        self.provenance = {"software": SOFTWARE, "weights": weights}
        check_like(args, self.provenance)
        self.parser = sample.make_parser()                    # its flags are the settings of a PNG
        self.flags = {name: setting_flags(self.parser)[name] for name in SETTINGS}
        self.drawings = {}                                    # {name: Drawing}, the oldest first
        self.lock = threading.Lock()
        self.thread = None                                    # the last that used the model
        self.stopped = False
        for part in ("text_encoder", "transformer", "vq"):    # read before the first request
            getattr(self.pipe, part)

    @contextlib.contextmanager
    def turn(self, wait=refuse):
        """Within it the model is this thread's alone. wait() is called each second until then."""
        while not self.lock.acquire(timeout=1):
            wait()
        self.thread = threading.current_thread()
        try:
            if self.pipe.device.index is not None:
                torch.cuda.set_device(self.pipe.device)       # each thread has its own
            yield
        finally:
            self.lock.release()

    def stop(self):
        """End the drawing under way: PyTorch aborts if Python exits while a thread computes."""
        self.stopped = True
        self.lock.acquire()
        if self.thread:
            self.thread.join()

    def keep(self, drawing):
        """-> what the page has to know of a drawing first."""
        name = secrets.token_hex(8)
        self.drawings[name] = drawing
        for old in list(self.drawings)[:-KEPT]:
            del self.drawings[old]
        h, w = drawing.start.shape[1:]
        return {"of": name, "rows": h, "columns": w, "seed": str(drawing.job.seed),
                "steps": drawing.steps, "plan": len(drawing.plan), "changed": drawing.changed}

    def find(self, request):
        if request.get("of") not in self.drawings:
            raise UserError("the server no longer has this picture, draw it again")
        return self.drawings[request["of"]]

    def model(self, query):
        """What the page has to know of the model, and the settings to begin with."""
        values = vars(self.args) | {"prompt": self.args.prompt[0]}
        return {"model": self.args.model, "codes": self.pipe.transformer.config.codebook_size,
                "unit": self.pipe.multiple // self.pipe.f, "max_body": MAX_BODY,
                "settings": {k: to_text(flag, values[flag.dest]) for k, flag in self.flags.items()},
                "choices": {k: flag.choices for k, flag in self.flags.items() if flag.choices}}

    def token(self, query):
        drawing = self.find(query)
        n = number(query, "n", 0, len(drawing.records))
        with self.turn():
            return drawing.facts(n, number(query, "position", 0, drawing.start.numel() - 1))

    def save(self, query):
        """-> a PNG and its name. It has the settings if they alone make the picture again."""
        drawing = self.find(query)
        text, = drawing.run.png_texts([drawing.job])
        if drawing.changed:
            text = {"parameters": text["parameters"] + ", changed by hand"}
        with self.turn(), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "picture.png"
            save_png(path, sample.decode(drawing.run, drawing.ids[0]), text)
            return {"png": base64.b64encode(path.read_bytes()).decode(),
                    "name": file_stem(drawing.job.prompt, drawing.job.seed) + ".png"}

    def upload(self, raw):
        """The bytes of a picture file -> what the page has to know of it. The picture gets a size
        that the model takes, of at most its own."""
        picture = read_picture(raw)
        shrink = min(1, self.pipe.size[0] / picture.width, self.pipe.size[1] / picture.height)
        size = self.pipe.nearest_size(shrink * picture.width, shrink * picture.height)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        run, job = self.run_of({}, size)
        run.edit = Edit(picture, np.zeros(size[::-1], bool))
        with self.turn():
            drawing = Drawing(run, job, self.pipe.encode_image(picture), changed=True)
            return self.keep(drawing) | drawing.frame(0)

    def draw(self, request, send):
        """Draw what is asked for. send(dict) tells the page of each step."""
        with self.turn(lambda: send({"wait": "Another drawing is under way, this one waits."})):
            drawing, go = self.prepare(request)
            send(self.keep(drawing))
            send(drawing.frame(len(drawing.records)))
            go(lambda: self.show(drawing, send))
            if drawing.batches > 1 or drawing.run.args.best_of > 1:       # which one is known now
                for n in range(drawing.steps):
                    send(drawing.frame(n + 1))
            send({"done": True})

    def show(self, drawing, send):
        if self.stopped:
            raise UserError("the server was stopped")
        count = len(drawing.records)
        n = (count - 1) % drawing.steps + 1                   # of one batch of candidates
        send(drawing.frame(count) | {"n": n, "count": count,
                                     "total": drawing.batches * drawing.steps})

    def prepare(self, request):
        """-> (Drawing, its method that draws). A request with a code changes a token of a drawing,
        one with marked draws tokens of it anew, all others draw a new picture."""
        if "code" in request:
            drawing = self.recode(request)
            return drawing, drawing.draw_on
        if "marked" in request:
            drawing = self.repaint(request)
        else:
            run, job = self.run_of(request["settings"])
            drawing = Drawing(run, job, self.pipe.all_masked(1, run.size))
        return drawing, drawing.draw

    def recode(self, request):
        old = self.find(request)
        n = number(request, "n", 1, len(old.records))
        position = number(request, "position", 0, old.start.numel() - 1)
        code = number(request, "code", 0, self.pipe.transformer.config.codebook_size - 1)
        return old.recode(n, position, code)

    def repaint(self, request):
        """-> a Drawing like an older one, with the marked positions masked, and margins of masked
        tokens (left, top, right, bottom) around it."""
        old = self.find(request)
        h, w = old.start.shape[1:]
        marked = [number({"marked": m}, "marked", 0, h * w - 1) for m in request["marked"]]
        margins = [number({"margins": m}, "margins", 0, 1000) for m in request["margins"]]
        left, top, right, bottom = margins
        f, mask_token = self.pipe.f, self.pipe.mask_token
        size = f * (left + w + right), f * (top + h + bottom)
        run, job = self.run_of(request["settings"], size)
        ids = old.ids.flatten(1).clone()
        ids[0, marked] = mask_token
        start = F.pad(ids.view(1, h, w), (left, right, top, bottom), value=mask_token)
        mask = (start[0] == mask_token).cpu().numpy()                                     # (h, w)
        if not mask.any():
            raise UserError("nothing is marked: brush over what is to be drawn anew")
        if old.run.edit:                                      # a given picture keeps its pixels
            picture = sample.decode(old.run, old.ids[0])
            picture, _ = extend_canvas(picture, None, *(f * margin for margin in margins))
            run.edit = Edit(picture, mask.repeat(f, 0).repeat(f, 1))
        return Drawing(run, job, start, changed=True)

    def run_of(self, settings, size=None):
        """{setting: text}, (width, height) in place of its size -> (Run, Job)."""
        args = copy.copy(self.args)
        for name, text in settings.items():
            if name not in SETTINGS:
                raise UserError(f"unknown setting {name:.60}")
            try:
                setattr(args, self.flags[name].dest, from_text(self.flags[name], str(text)))
            except argparse.ArgumentTypeError as e:
                raise UserError(f"{name}: {e}") from None
        args.size = size or args.size
        if args.seed == -1:
            args.seed = secrets.randbelow(2 ** 32)
        self.pipe.check_size(*args.size)
        tokens = args.size[0] * args.size[1] // self.pipe.f ** 2
        if tokens > pipeline.MAX_TOKENS:
            raise UserError(f"{tokens} tokens are more than the {pipeline.MAX_TOKENS} of this page")
        if tokens * args.steps * (1 + args.remask) * args.best_of > MAX_RECORDED:
            raise UserError("too many steps: lower steps, remask or best-of")
        job = Job(read_prompts(args)[0], args.seed, None)
        return Run(self.parser, args, self.pipe, None, [job], self.provenance), job


def read_picture(raw):
    """The bytes of a picture file -> RGB Image. Raises UserError or PictureError."""
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
        return decode_image(raw)
    except UnidentifiedImageError:
        raise UserError(f"this is no picture ({', '.join(FORMATS)})") from None
    except Exception as e:                                    # Pillow raises many kinds
        raise picture_error("the picture", e) from None


def number(request, name, low, high):
    """A whole number of a request. Raises UserError."""
    try:
        return whole(low, high)(str(request.get(name)))
    except argparse.ArgumentTypeError as e:
        raise UserError(f"{name}: {e}") from None


# --------------------------------------------------------------------------------------------------
# The server


class Server(ThreadingHTTPServer):
    """Listens at host:port. At another host than loopback, every request needs the token."""

    def __init__(self, host, port, session):
        self.session = session
        self.token = "" if re.fullmatch(LOOPBACK, host) else secrets.token_urlsafe(16)
        try:
            super().__init__((host, port), Handler)
        except OSError as e:
            raise UserError(f"--host {host} --port {port}: {e.strerror or e}") from None
        name = socket.gethostname() if host == "0.0.0.0" else host
        query = f"?token={self.token}" if self.token else ""
        self.address = f"http://{name}:{self.server_port}/{query}"

    def check(self, headers, query):
        """Refuse what other web sites make a browser send: under a name of theirs that stands for
        this machine (DNS rebinding), or from their pages."""
        host = headers.get("Host", "")
        if not self.token and not re.fullmatch(LOOPBACK, urlsplit(f"//{host}").hostname or ""):
            raise UserError("this address is not one of this machine")
        if headers.get("Origin", f"http://{host}") != f"http://{host}":
            raise UserError("the request is from another web site")
        if not secrets.compare_digest(query.get("token", "").encode(), self.token.encode()):
            raise UserError("the address lacks the token that the server printed")

    def handle_error(self, request, client_address):
        """Called if a page is closed before it has its reply. That is no error."""


class Handler(BaseHTTPRequestHandler):
    timeout = 60                                              # seconds of one read or write
    begun = False                                             # whether a part of the reply is sent

    def do_GET(self):
        session = self.server.session
        self.answer({"/": lambda query: self.write(PAGE.read_bytes(), "text/html; charset=utf-8"),
                     "/model": lambda query: self.send(session.model(query)),
                     "/token": lambda query: self.send(session.token(query)),
                     "/save": lambda query: self.send(session.save(query))})

    def do_POST(self):
        session = self.server.session
        self.answer({"/upload": lambda query: self.send(session.upload(self.body())),
                     "/draw": lambda query: session.draw(json.loads(self.body()), self.send)})

    def answer(self, routes):
        """Call the function of the path with the query. An error is the last line of the reply."""
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        try:
            self.server.check(self.headers, query)
            if url.path not in routes:
                raise UserError("no such page")
            routes[url.path](query)
        except (ConnectionError, TimeoutError):               # the page was closed
            pass
        except Exception as e:
            self.send({"error": one_line(e)}, 400)

    def body(self):
        length = number(self.headers, "Content-Length", 0, MAX_BODY)
        return self.rfile.read(length)

    def send(self, content, status=200):
        self.write(json.dumps(content).encode() + b"\n", "application/json", status)

    def write(self, raw, kind, status=200):
        """Send bytes, after the headers if these are the first ones. The end of the connection ends
        the reply."""
        if not self.begun:
            self.begun = True
            self.send_response(status)
            for name, value in {**HEADERS, "Content-Type": kind}.items():
                self.send_header(name, value)
            self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        """Requests are not printed."""


def one_line(error):
    """What the page says of an error. One that is nobody's mistake is printed here in full."""
    if is_out_of_memory(error):
        return f"out of memory: {sample.OUT_OF_MEMORY}"
    if not isinstance(error, (UserError, ValueError)):
        traceback.print_exception(error)
    return visible(error)[:300]


if __name__ == "__main__":
    main()
