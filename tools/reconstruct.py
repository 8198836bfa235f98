"""What a model's VQ autoencoder makes of a picture: the two side by side, and the PSNR.

    python -m tools.reconstruct photo.jpg
    python -m tools.reconstruct photo.jpg --model meissonic --out pair.png

Of the flags of sample.py those matter that choose the model and the output.
"""
import numpy as np
from PIL import Image

import sample
from engine.checkpoint import UserError
from engine.cli import path, say, script
from engine.images import PictureError, flatten_alpha, read_image, save_png, side_by_side
from engine.jobs import free_path, load_pipeline, plan_jobs
from engine.settings import SOFTWARE, parse_like, settings_of


@script("tools.reconstruct", out_of_memory="use a smaller picture or --dtype bfloat16")
def main(argv=None):
    parser = sample.make_parser("tools.reconstruct", __doc__)
    parser.set_defaults(text_encoder="own")       # it is not read: no other one is fetched
    parser.add_argument("picture", type=path, help="the picture, of any size and format")
    args = parse_like(parser, argv)
    try:
        picture = flatten_alpha(read_image(args.picture)[0])
    except PictureError as e:
        raise UserError(str(e)) from None
    pipe = load_pipeline(args)
    name = f"{args.picture.stem} reconstructed"
    job, = plan_jobs(args.out, [name], [args.seed])
    again = reconstruct(pipe, picture)
    text = settings_of(parser, args) | {"picture": str(args.picture), "software": SOFTWARE}
    out = job.path if job.path == args.out else free_path(job.path)
    save_png(out, side_by_side([picture, again]), text)
    say(f"wrote {out}")
    say(f"PSNR {psnr(picture, again):.2f} dB")


def reconstruct(pipe, picture):
    """RGB Image -> the same through the VQ model and back, of its size."""
    size = pipe.nearest_size(*picture.size)
    ids = pipe.encode_image(picture.resize(size, Image.Resampling.LANCZOS))       # (1, h, w)
    again, = pipe.decode(ids)
    return again.resize(picture.size, Image.Resampling.LANCZOS)


def psnr(a, b):
    """Peak signal-to-noise ratio of two RGB Images in dB."""
    error = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return float(10 * np.log10(255 ** 2 / max(error, 1e-10)))


if __name__ == "__main__":
    main()
