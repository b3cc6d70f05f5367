"""python -m guided_distill.demo --bundle=DIR [--host=127.0.0.1] [--port=7860]."""

import argparse
import importlib.util
import os
import sys

from guided_distill.errors import UserError


def main(argv=None):
    """Serves the page until it is interrupted; returns the exit code, with one line on stderr where not 0."""
    flags = _flags().parse_args(argv)
    try:
        _serve(flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 0
    return 0


def _flags():
    parser = argparse.ArgumentParser("guided_distill.demo", description="A page to play with students of a bundle.")
    parser.add_argument("--bundle", required=True, help="a directory that --mode=export --formats=bundle wrote")
    parser.add_argument("--host", default="127.0.0.1", help="whom to listen to; 0.0.0.0: everyone, without a password")
    parser.add_argument("--port", type=int, default=7860)
    return parser


def _serve(flags):
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio, which is not installed: pip install 'guided_distill[demo]'")
    if not 1 <= flags.port <= 65535:
        raise UserError(f"--port={flags.port}: must be 1 ... 65535")
    # Gradio reads these when it is imported: without them it tells its makers of every start.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    import guided_distill
    from guided_distill.demo import page
    from guided_distill.demo.player import Player

    player = Player(guided_distill.load(flags.bundle))
    print("compiling: the first picture takes longest", file=sys.stderr, flush=True)
    player.warm_up()
    page.serve(page.build(player), flags.host, flags.port)


if __name__ == "__main__":
    sys.exit(main())
