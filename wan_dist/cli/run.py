"""Run a command line program: one line per user error, fixed exit statuses, logs on stderr."""

import logging
import os
import sys
from typing import NoReturn

import typer
from typer.exceptions import Abort, Exit, TyperException

from wan_dist.core.errors import WanDistError

EXIT_INTERRUPTED = 130


def run_app(app: typer.Typer, prog: str) -> NoReturn:
    """Run `app` on the process's arguments and end the process.

    Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted. A `WanDistError` is printed as one
    line on stderr without a traceback; any other exception is our own mistake and keeps its traceback.

    Args:
        app: the typer application.
        prog: program name as the user types it, for help and error lines.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for package in ("wan_dist", "data_tools"):
        logging.getLogger(package).setLevel(logging.INFO)
    # Where diffusers finds bitsandbytes, its import warns of CPU kernels that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    status = _status_of(app, prog)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
    sys.exit(status)


def _status_of(app: typer.Typer, prog: str) -> int:
    try:
        result = app(prog_name=prog, standalone_mode=False)
    except WanDistError as error:
        return _report(prog, str(error), error.exit_code)
    except TyperException as error:
        # A bare call shows the help; its message is that help.
        message = error.format_message()
        if message.lstrip().lower().startswith("usage:") or not message:
            return error.exit_code
        return _report(prog, f"{message} Try '{prog} --help'.", error.exit_code)
    except (KeyboardInterrupt, Abort):
        return _report(prog, "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        _silence_stdout()
        return 1
    except OSError as error:
        # A path that cannot be read or written is the user's to mend; an error without one is ours.
        if error.filename is None:
            raise
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        return _report(prog, f"{os.fsdecode(error.filename)}: {(error.strerror or str(error)).lower()}.", 1)
    except Exit as stop:
        return stop.exit_code
    # Outside standalone mode typer returns the status of `typer.Exit`, and otherwise what the command returned.
    return result if isinstance(result, int) else 0


def _report(prog: str, message: str, status: int) -> int:
    # A configuration's problems are reported together, each in a line of its own.
    for line in message.splitlines() or [""]:
        print(f"{prog}: {' '.join(line.split())}", file=sys.stderr)
    return status


def _silence_stdout() -> None:
    # The reader went away (`| head`): python would complain again when it flushes stdout at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
