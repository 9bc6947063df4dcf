"""`wan-dist train` with one formula broken on purpose, for `test_memorisation.py`.

Usage: sabotaged_train.py BREAKAGE CONFIG
"""

import sys

from wan_dist.core import flow_matching
from wan_dist.data.encode import Encoders


def _shift_backwards(u, shift):
    return u / (shift - (shift - 1) * u)


BREAKAGES = {
    "none": lambda: None,
    "velocity sign": lambda: setattr(flow_matching, "velocity", lambda latents, noise: latents - noise),
    "timestep scale": lambda: setattr(flow_matching, "timestep_of", lambda sigma: sigma),
    "shift applied backwards": lambda: setattr(flow_matching, "shift_sigma", _shift_backwards),
    "normalisation": lambda: setattr(Encoders, "normalise", lambda self, latents: latents.float()),
}

if __name__ == "__main__":
    breakage, config = sys.argv[-2:]
    BREAKAGES[breakage]()
    sys.argv = ["wan-dist", "train", config]
    from wan_dist.__main__ import main

    main()
