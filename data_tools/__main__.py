"""`python -m data_tools`, the same as the `wan-data` command."""

from typing import NoReturn

from data_tools.app import app
from wan_dist.cli.run import run_app


def main() -> NoReturn:
    """Run `wan-data` on the process's arguments."""
    run_app(app, "wan-data")


if __name__ == "__main__":
    main()
