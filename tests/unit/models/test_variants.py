"""The variants carry the official constants and unknown names are answered with near ones."""

import pytest

from wan_dist.core.errors import ConfigError
from wan_dist.models.wan.variants import VARIANTS, get_variant


def test_names_and_experts() -> None:
    assert list(VARIANTS) == ["ti2v-5B", "t2v-A14B", "i2v-A14B"]
    assert all(name == variant.name for name, variant in VARIANTS.items())
    assert get_variant("ti2v-5B").num_transformers == 1
    assert get_variant("i2v-A14B").experts == ("high_noise", "low_noise")


def test_channels_add_up() -> None:
    for variant in VARIANTS.values():
        assert variant.out_channels == variant.latent_channels
    assert get_variant("i2v-A14B").in_channels == 16 + 4 + 16
    assert [VARIANTS[name].needs_condition for name in VARIANTS] == [False, False, True]


def test_sizes_fit_the_pixel_multiple_and_frames_are_4n_plus_1() -> None:
    assert [variant.pixel_multiple for variant in VARIANTS.values()] == [32, 16, 16]
    for variant in VARIANTS.values():
        assert variant.num_frames % 4 == 1
        for size in variant.sizes_px:
            assert all(side % variant.pixel_multiple == 0 for side in size)


def test_schedule_constants_are_the_official_ones() -> None:
    assert [variant.flow_shift for variant in VARIANTS.values()] == [5.0, 12.0, 5.0]
    assert [variant.boundary for variant in VARIANTS.values()] == [None, 0.875, 0.9]
    for variant in VARIANTS.values():
        assert len(variant.guidance_scales) == variant.num_transformers
        assert (variant.boundary is None) == (variant.num_transformers == 1)


@pytest.mark.parametrize(("typo", "near"), [("ti2v-5b", "ti2v-5B"), ("t2v-14B", "t2v-A14B"), ("I2V_A14B", "i2v-A14B")])
def test_unknown_name_is_answered_with_the_nearest(typo: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean .*{near}"):
        get_variant(typo)


def test_name_unlike_any_lists_all() -> None:
    with pytest.raises(ConfigError, match="known are ti2v-5B, t2v-A14B, i2v-A14B"):
        get_variant("zzz")
