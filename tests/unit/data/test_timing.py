"""Which frames are chosen for a training frame rate."""

import numpy as np
import pytest

from wan_dist.data.timing import available_frames, choose_frames, timing_problem


def stamps(num_frames: int, fps: float) -> np.ndarray:
    return np.arange(num_frames) / fps


@pytest.mark.parametrize(("fps", "step"), [(16, 1), (32, 2), (48, 3), (160, 10)])
def test_a_multiple_of_the_rate_is_taken_evenly(fps: int, step: int) -> None:
    chosen = choose_frames(stamps(40 * step, fps), 21, 16, 0.0, False)
    assert chosen.tolist() == [step * k for k in range(21)]


def test_each_target_takes_the_nearest_frame() -> None:
    source = stamps(100, 30)
    chosen = choose_frames(source, 33, 16, 0.0, False)
    nearest = [int(np.abs(source - k / 16).argmin()) for k in range(33)]
    assert chosen.tolist() == nearest


def test_a_slightly_slow_source_gives_no_frame_twice() -> None:
    chosen = choose_frames(stamps(60, 15), 49, 16, 0.3, False)
    assert (np.diff(chosen) >= 1).all()
    assert chosen[-1] < 60


def test_duplicates_only_when_allowed() -> None:
    source = stamps(20, 8)
    assert available_frames(20, 8, 16, False) == 20
    assert available_frames(20, 8, 16, True) == 39
    assert choose_frames(source, 5, 16, 0.0, True).tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("fps", [12, 15, 16, 24, 29.97, 50])
def test_random_windows_stay_inside_and_never_repeat(fps: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        source = np.cumsum(rng.uniform(0.5, 1.5, 90)) / fps
        source -= source[0]
        mean_fps = 89 / source[-1]
        available = available_frames(90, mean_fps, 12, False)
        frames = int(rng.integers(1, available + 1))
        chosen = choose_frames(source, frames, 12, float(rng.random()), False)
        assert len(chosen) == frames
        assert chosen[0] >= 0
        assert chosen[-1] < 90
        assert (np.diff(chosen) >= 1).all()


def test_window_places() -> None:
    source = stamps(100, 16)
    assert choose_frames(source, 21, 16, 0.0, False)[0] == 0
    assert choose_frames(source, 20, 16, 0.5, False)[0] == 40
    assert choose_frames(source, 21, 16, 0.999999, False)[-1] == 99


def test_available_frames_count_real_frames() -> None:
    assert available_frames(81, 16, 16, False) == 81
    assert available_frames(121, 24, 16, False) == 81
    assert available_frames(120, 24, 16, False) == 80
    assert available_frames(1, 0, 16, False) == 1


def test_slow_or_broken_time_lines_are_named() -> None:
    assert timing_problem(14.4, 0.07, 16, False) is None
    assert timing_problem(14.3, 0.07, 16, False) == "low_fps"
    assert timing_problem(8, 0.125, 16, True) is None
    assert timing_problem(16, 0.26, 16, False) == "frame_gap"
    assert timing_problem(0, 0, 16, False) is None
