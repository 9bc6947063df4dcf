import numpy as np
import torch

from wan_dist.core.rng import generator, mix, seed_of, uniform


def test_mix_is_splitmix64():
    # First outputs of the reference generator seeded with 0 (https://prng.di.unimi.it/splitmix64.c).
    state, seen = 0, []
    for _ in range(3):
        seen.append(mix(state))
        state = (state + 0x9E3779B97F4A7C15) & (2**64 - 1)
    assert seen == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_seeds_depend_on_every_part_and_their_order():
    seeds = {seed_of(0, "noise", 1, 2), seed_of(1, "noise", 1, 2), seed_of(0, "sigma", 1, 2), seed_of(0, "noise", 2, 1)}
    assert len(seeds) == 4
    assert all(0 <= s < 2**63 for s in seeds)


def test_generators_repeat_and_differ():
    a, b, c = (torch.randn(8, generator=generator(*key)) for key in ((0, "x"), (0, "x"), (1, "x")))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_uniform_numbers_are_uniform_and_uncorrelated_along_positions():
    drawn = np.array([uniform(7, "sigma", 0, q) for q in range(20_000)])
    assert 0 <= drawn.min() < drawn.max() < 1
    # Standard errors at 2e4 draws: 0.002 for the mean, 0.007 for the correlation.
    assert abs(drawn.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03
