"""Jobs of two forked ranks that save while something goes wrong; driven by `test_save_faults.py`.

Everything is imported once, then each trial forks its ranks, so that a trial costs about a second instead of ten.

Usage: faults_program.py OUT TRIALS.json
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 - before the forks
import torch
import torch.distributed as dist

from tests.distributed import engines
from wan_dist.io import synced_file
from wan_dist.io.checkpoint import newest_whole
from wan_dist.io.restoring import restore
from wan_dist.io.saving import Outcome, Saver

WRITES = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "memfd_create")
LAST_STEP = 4
TRIAL_S = 60.0


class Points:
    """Counts what a rank does to the disk, and kills it at one of these points."""

    def __init__(self, kill_at: int | None) -> None:
        self.count, self.kill_at, self.on = 0, kill_at, False

    def passed(self) -> None:
        if self.on:
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1

    def install(self) -> None:
        for name in WRITES:
            setattr(os, name, self._wrapped(getattr(os, name)))
        write = synced_file.HashingFile.write

        def half_written(out: Any, data: Any) -> int:
            if len(data) < 256:  # heads of a zip's members: 150 of them in a save
                return write(out, data)
            if self.on and self.count == self.kill_at:
                write(out, memoryview(data)[: len(data) // 2])
                out.flush()
            self.passed()
            return write(out, data)

        synced_file.HashingFile.write = half_written  # type: ignore[method-assign]

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*words: Any, **options: Any) -> Any:
            self.passed()
            return function(*words, **options)

        return counted


def engine_of(seed: int = 1) -> Any:
    return engines.build(engines.settings(3), seed=seed, frozen=False)


def digest(engine: Any) -> str:
    """Return a hash of all weights and moments; collective."""
    state = engines.full_state(engine)
    content = b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state))
    return hashlib.sha256(content).hexdigest()


def save(saver: Saver, engine: Any, step: int) -> Outcome:
    saver.start({"transformer": engine}, step, {"epoch": 0}, zero_stage=3, exclude_frozen=False)
    outcome = saver.wait()
    assert outcome is not None
    return outcome


def run(root: Path, trial: dict[str, Any], rank: int) -> dict[str, Any]:
    """Train to the last step, saving every step, from the newest whole checkpoint if there is one."""
    found = [newest_whole(root) if rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    engine, first = engine_of(seed=1 if found[0] is None else 7), 0
    if found[0] is not None:
        restore({"transformer": engine}, found[0], exclude_frozen=False)
        first = found[0].step
    points = Points(trial.get("at") if trial.get("rank") == rank else None)
    points.install()
    saver = Saver(root, torch.device("cpu"), asynchronous=trial.get("async", False), keep_last=2)
    problems = {}
    for step in range(first, LAST_STEP):
        engines.train(engine, [step])
        points.on = step + 1 == trial.get("step")
        fault(trial, saver, root, step + 1, rank)
        if outcome_problem := save(saver, engine, step + 1).problem:
            problems[step + 1] = outcome_problem
        points.on = False
    saver.close()
    return {"digest": digest(engine), "points": points.count, "problems": problems, "began": first}


def fault(trial: dict[str, Any], saver: Saver, root: Path, step: int, rank: int) -> None:
    """Prepare what goes wrong in the save of this step."""
    kind = trial.get("fault")
    if kind == "writer killed" and step == trial["step"] and rank == trial["rank"]:
        hand_over = saver._hand_over

        def and_die(path: Path, name: str, image_of: Any) -> bool:
            done = hand_over(path, name, image_of)
            if saver._writer:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(saver._writer.pid, signal.SIGKILL)
            return done

        saver._hand_over = and_die  # type: ignore[method-assign]
    elif kind == "writer killed" and step != trial["step"] and "_hand_over" in vars(saver):
        del saver._hand_over  # type: ignore[attr-defined]
    if kind in ("disk full", "disk too small"):
        filler = root.parent / "filler"
        if rank == 0 and step == trial["step"]:
            with filler.open("wb") as out:
                free = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
                out.write(bytes(max(free - trial["left"], 0)))
        elif rank == 0:
            filler.unlink(missing_ok=True)
        if kind == "disk full":
            saver._last_size = lambda: 0  # type: ignore[method-assign]  # nobody saw it coming
        dist.barrier()


def job(root: Path, trial: dict[str, Any]) -> dict[str, Any]:
    """Run a job of two ranks; return what rank 0 reports, the ranks' statuses and how long they took to end."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.parent.glob(f"{root.name}.rank-*"):
        leftover.unlink()
    store = root.parent / f"{root.name}.store-{time.time_ns()}"

    def work(rank: int) -> None:
        Path(f"{root}.rank-{rank}.json").write_text(json.dumps(run(root, trial, rank)))

    pids = engines.fork_ranks(2, work, store, str(root))
    started, statuses = time.monotonic(), {}
    first_end = None
    while len(statuses) < 2:
        for pid in pids:
            if pid not in statuses and (status := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = os.waitstatus_to_exitcode(status[1])
                first_end = first_end or time.monotonic()
        if time.monotonic() - started > TRIAL_S:
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    store.unlink(missing_ok=True)
    report = Path(f"{root}.rank-0.json")
    result = json.loads(report.read_text()) if report.exists() else {}
    points = [json.loads(p.read_text())["points"] for p in sorted(root.parent.glob(f"{root.name}.rank-*.json"))]
    assert first_end is not None
    return {
        **result,
        "points": points,
        "statuses": [statuses[pid] for pid in pids],
        "survivor_s": time.monotonic() - first_end,
    }


def attempt(out: Path, name: str, trial: dict[str, Any]) -> dict[str, Any]:
    """Run a job with its fault, look at what it left, and run it again to the end."""
    root = out / name
    failed = job(root, trial)
    whole = newest_whole(root)
    left = whole.step if whole else 0
    again = job(root, {}) if failed["statuses"] != [0, 0] else failed
    final = newest_whole(root)
    return {
        "first": failed,
        "left": left,
        "again": again,
        "final": final.step if final else 0,
        "folders": sorted(path.name for path in root.iterdir()),
    }


def main(out: Path, wanted: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {"clean": attempt(out, "clean", {"step": 3})}
    every = wanted.pop("every point", None)
    if every is not None:
        for rank, count in enumerate(results["clean"]["first"]["points"]):
            for at in range(0, count, every["stride"]):
                wanted[f"rank {rank} at {at}"] = {"step": 3, "rank": rank, "at": at}
    for name, trial in wanted.items():
        if trial.get("at", 0) < 0:
            trial["at"] += results["clean"]["first"]["points"][trial["rank"]]
        if "left" in trial and not os.path.ismount(out / "small"):
            continue
        folder = out / "small" if "left" in trial else out
        results[name] = attempt(folder, name.replace(" ", "-"), trial)
    (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
