"""Draws docs/images/sigma_densities.svg: how often each noise level is drawn, by sampling and flow shift.

Usage: draw_sigma_densities.py [OUT]
"""

import sys
from pathlib import Path

import torch

from wan_dist.core.flow_matching import SigmaSampler

OUT = Path(__file__).parent.parent / "docs" / "images" / "sigma_densities.svg"
SHIFTS = {1.0: "shift 1", 3.0: "shift 3 (i2v at 480p)", 5.0: "shift 5 (ti2v-5B, i2v-A14B)", 12.0: "shift 12 (t2v-A14B)"}
BOUNDARIES = {5.0: 0.9, 12.0: 0.875}
# Dark enough on white and on grey, and told apart without hue by their dashes.
SAMPLINGS: list[tuple[str, SigmaSampler, str, str]] = [
    ("uniform", SigmaSampler(1.0), "#1b1b1b", ""),
    ("logit_normal 0, 1 (= sigmoid 1)", SigmaSampler(1.0, sampling="logit_normal"), "#0b6fb8", "7 3"),
    ("mode 1.29", SigmaSampler(1.0, sampling="mode"), "#c2570c", "2 2"),
    ("beta 0.6, 0.6", SigmaSampler(1.0, sampling="beta"), "#2a8a3e", "9 3 2 3"),
]
WIDTH, HEIGHT, GAP, TOP, LEFT = 230, 190, 26, 64, 34
HIGHEST = 5.0


def density(sampler: SigmaSampler, shift: float) -> list[tuple[float, float]]:
    """Return points of the density of sigma, from differences of its CDF."""
    edges = torch.linspace(0, 1, 201, dtype=torch.float64)
    shifted = SigmaSampler(
        shift,
        sampler.sampling,
        mode_scale=sampler.mode_scale,
        beta_alpha=sampler.beta_alpha,
        beta_beta=sampler.beta_beta,
    )
    heights = shifted.probabilities(edges).diff() / edges.diff()
    return list(zip(((edges[1:] + edges[:-1]) / 2).tolist(), heights.tolist(), strict=True))


def panel(number: int, shift: float) -> str:
    """Return one panel."""
    x0, y0 = LEFT + number * (WIDTH + GAP), TOP + HEIGHT

    def place(sigma: float, height: float) -> str:
        return f"{x0 + sigma * WIDTH:.1f},{y0 - min(height, HIGHEST) / HIGHEST * HEIGHT:.1f}"

    parts = [f'<text x="{x0}" y="{TOP - 10}" class="title">{SHIFTS[shift]}</text>']
    parts.append(f'<path d="M{x0},{TOP}V{y0}H{x0 + WIDTH}" class="axis"/>')
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(
            f'<text x="{x0 + tick * WIDTH:.1f}" y="{y0 + 15}" class="tick" text-anchor="middle">{tick:g}</text>'
        )
    for tick in (1, 2, 3, 4, 5) if number == 0 else ():
        y = y0 - tick / HIGHEST * HEIGHT
        parts.append(f'<text x="{x0 - 5}" y="{y + 4:.1f}" class="tick" text-anchor="end">{tick}</text>')
    if boundary := BOUNDARIES.get(shift):
        x = x0 + boundary * WIDTH
        parts.append(f'<path d="M{x:.1f},{TOP}V{y0}" class="boundary"/>')
        parts.append(
            f'<text x="{x - 4:.1f}" y="{TOP + 10}" class="tick" text-anchor="end">boundary {boundary:g}</text>'
        )
    for _, sampler, colour, dashes in SAMPLINGS:
        points = " ".join(place(*point) for point in density(sampler, shift))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" class="curve" stroke-dasharray="{dashes}"/>'
        )
    return "\n".join(parts)


def legend() -> str:
    """Return the names of the curves in one row."""
    parts, x = [], LEFT
    for name, _, colour, dashes in SAMPLINGS:
        parts.append(f'<path d="M{x},18h34" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>')
        parts.append(f'<text x="{x + 40}" y="22" class="name">{name}</text>')
        x += 70 + 7 * len(name)
    return "\n".join(parts)


def main(out: Path) -> None:
    """Write the figure."""
    width, height = LEFT + len(SHIFTS) * (WIDTH + GAP), TOP + HEIGHT + 40
    style = (
        "text{font-family:sans-serif;fill:#1b1b1b}.title{font-size:13px;font-weight:bold}.tick{font-size:11px;fill:#555}"
        ".curve{stroke-width:1.8}.name{font-size:12px}.axis{fill:none;stroke:#888}"
        ".boundary{stroke:#888;stroke-dasharray:3 3}"
    )
    label = f'<text x="{LEFT}" y="{height - 6}" class="tick">noise level sigma; density, cut at {HIGHEST:g}</text>'
    body = "\n".join([legend(), *(panel(i, shift) for i, shift in enumerate(SHIFTS)), label])
    out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
        f'<style>{style}</style><rect width="{width}" height="{height}" fill="#fff"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
