"""How often pictures of a model of the world of shapes show what their captions say.

    python -m tools.score --n 100                             # held-out captions of each task
    python -m tools.score --edits 20                          # edits of each kind

Takes the flags of sample.py that choose the model and the sampling. The first prints the share of
pictures that are right for each task; `overall` is the mean of the six tasks of GenEval. The second
prints for each kind of edit the share of pictures that show the new caption, and the share of other
pixels that keep their colour: of mask-free edits, and of as many tokens chosen at random.
"""
import sample
from engine.cli import number_of_pictures, say, script
from engine.jobs import load_pipeline, schedule_of
from shapes.score import score_edits, score_tasks
from shapes.world import WORLDS


@script("tools.score", out_of_memory=sample.OUT_OF_MEMORY)
def main(argv=None):
    parser = sample.make_parser("tools.score", __doc__)
    parser.set_defaults(n=100)
    parser.add_argument("--edits", type=number_of_pictures, nargs="?", const=20, metavar="N",
                        help="score N edits of each kind, in place of captions (default N: 20)")
    parser.add_argument("--world", choices=WORLDS, default="full",
                        help="whose captions: tiny for a model of train.py --preset tiny "
                             "(default: full)")
    args = parser.parse_args(argv)
    pipe = load_pipeline(args)
    settings = {
        "negative": args.negative,
        "size": args.size,
        "score": args.score_condition,
        "schedule": schedule_of(args, pipe),
        "remask": args.remask,
        "best_of": args.best_of,
    }
    if args.edits:
        print_edits(score_edits(pipe, args.edits, args.strength, **settings))
    else:
        for task, right in score_tasks(pipe, args.n, world_name=args.world, **settings).items():
            say(f"{task:12} {right:.2f}")


def print_edits(table):
    """{kind: ((shows, kept) mask-free, (shows, kept) at random)}."""
    say(f"{'':12} mask-free     at random")
    say(f"{'':12} shows   kept  shows   kept")
    for kind, ways in table.items():
        numbers = [f"{shows:5.2f}  {kept:5.2f}" for shows, kept in ways]
        say(f"{kind:12} " + "  ".join(numbers))


if __name__ == "__main__":
    main()
