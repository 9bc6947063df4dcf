"""`wan-dist train` with one formula broken on purpose, for `test_memorisation.py`.

Usage: sabotaged_train.py BREAKAGE CONFIG
"""

import sys

from wan_dist.core import flow_matching
from wan_dist.data.encode import Encoders

SHIFT = 5.0


def _unshifted_timestep(sigma):
    return sigma / (SHIFT - (SHIFT - 1) * sigma) * 1000


BREAKAGES = {
    "none": lambda: None,
    "velocity sign": lambda: setattr(flow_matching, "velocity", lambda latents, noise: latents - noise),
    "timestep scale": lambda: setattr(flow_matching, "timestep_of", lambda sigma: sigma),
    "shift left out of the timestep": lambda: setattr(flow_matching, "timestep_of", _unshifted_timestep),
    "normalisation": lambda: setattr(Encoders, "normalise", lambda self, latents: latents.float()),
}

if __name__ == "__main__":
    breakage, config = sys.argv[-2:]
    BREAKAGES[breakage]()
    sys.argv = ["wan-dist", "train", config]
    from wan_dist.__main__ import main

    main()
