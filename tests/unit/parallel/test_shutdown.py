import os
import signal
import subprocess
import sys
import textwrap
import time

from wan_dist.parallel.shutdown import StopRequest, launcher_pids


def run(program: str, *, env: dict[str, str] | None = None, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, **(env or {})},
    )


def test_nothing_is_requested_before_a_signal() -> None:
    stop = StopRequest()
    assert (stop.requested, stop.exit_code(), stop.wait(0.0)) == (False, 0, False)


def test_a_signal_is_noted_and_the_process_goes_on() -> None:
    done = run(
        """
        import os, signal, sys
        from wan_dist.parallel.shutdown import StopRequest
        stop = StopRequest()
        stop.install()
        os.kill(os.getpid(), signal.SIGTERM)
        print(stop.wait(5), stop.exit_code())
        """
    )
    assert (done.returncode, done.stdout) == (0, "True 143\n")
    assert done.stderr == "SIGTERM: stopping after this step\n"


def test_only_rank_0_announces() -> None:
    program = """
    import os, signal
    from wan_dist.parallel.shutdown import StopRequest
    StopRequest().handle(signal.SIGINT)
    """
    assert run(program, env={"RANK": "1"}).stderr == ""
    assert run(program, env={"RANK": "0"}).stderr == "SIGINT: stopping after this step\n"


def test_after_the_grace_time_the_process_ends_itself_and_says_where_it_stood() -> None:
    started = time.monotonic()
    done = run(
        """
        import os, signal, time
        from wan_dist.parallel.shutdown import StopRequest
        stop = StopRequest(grace_s=0.5, before_force=lambda why: print(why, flush=True))
        stop.install()
        os.kill(os.getpid(), signal.SIGTERM)
        def a_collective_that_never_returns():
            while True:
                time.sleep(60)
        a_collective_that_never_returns()
        """
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - started < 30
    assert done.stdout == "ended by force after 0 s of grace\n"
    assert "a_collective_that_never_returns" in done.stderr


def test_a_failing_last_word_does_not_keep_the_process() -> None:
    done = run(
        """
        import signal, time
        from wan_dist.parallel.shutdown import StopRequest
        def fail(why):
            raise OSError("disk full")
        StopRequest(grace_s=0.2, before_force=fail).handle(signal.SIGTERM)
        time.sleep(60)
        """
    )
    assert done.returncode == 128 + signal.SIGTERM


def test_a_repeated_signal_within_milliseconds_is_the_launchers_a_later_one_a_persons() -> None:
    done = run(
        """
        import os, signal, time
        from wan_dist.parallel.shutdown import StopRequest
        stop = StopRequest()
        stop.handle(signal.SIGINT)
        stop.handle(signal.SIGINT)
        print("still here", flush=True)
        time.sleep(1.1)
        stop.handle(signal.SIGINT)
        print("not reached", flush=True)
        """
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "still here\n")


def test_a_process_without_a_launcher_has_none_above() -> None:
    assert launcher_pids() == []


PRINT_PIDS = "from wan_dist.parallel.shutdown import launcher_pids; print(len(launcher_pids()))"


def test_a_shell_that_only_mentions_a_launcher_is_none() -> None:
    # `; true` keeps the shell from replacing itself by the command.
    script = f'echo deepspeed torchrun >/dev/null; "{sys.executable}" -c "{PRINT_PIDS}"; true'
    done = subprocess.run(["/bin/sh", "-c", script, "deepspeed"], capture_output=True, text=True, check=False)
    assert done.stdout == "0\n", done.stderr


def test_a_python_that_runs_a_launcher_is_one() -> None:
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PRINT_PIDS!r}])"
    done = subprocess.run(
        [sys.executable, "-c", f"'deepspeed.launcher.runner'; {program}"], capture_output=True, text=True, check=False
    )
    assert done.stdout == "1\n", done.stderr


def test_a_rank_is_told_to_stop_when_its_launcher_is_gone() -> None:
    rank = """
import os, signal
from wan_dist.parallel.shutdown import StopRequest
stop = StopRequest()
stop.install()
print("ready", os.getpid(), flush=True)
print("stopped", stop.wait(30), flush=True)
"""
    launcher = f"'deepspeed.launcher.launch'; import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready")
    process.kill()
    process.wait()
    assert process.stdout.readline() == "stopped True\n"
