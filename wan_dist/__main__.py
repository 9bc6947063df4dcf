"""`python -m wan_dist` and the `wan-dist` command."""

import re
import sys

_LOCAL_RANK = re.compile(r"--local[_-]rank=\d+")


def main() -> None:
    """Run the command line in `sys.argv` and exit with its status."""
    # DeepSpeed's launcher puts --local_rank=N before the verb; the ranks read LOCAL_RANK from the environment.
    sys.argv[1:] = [argument for argument in sys.argv[1:] if not _LOCAL_RANK.fullmatch(argument)]
    from wan_dist.cli.main import app
    from wan_dist.cli.run import run_app

    run_app(app, "wan-dist")


if __name__ == "__main__":
    main()
