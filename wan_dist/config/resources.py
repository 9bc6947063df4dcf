"""Where the files lie that ship with wan_dist."""

from pathlib import Path

_PACKAGE_DIR = Path(__file__).resolve().parents[1]


def configs_dir() -> Path:
    """Return the folder of shipped configs: inside an installed wheel, else the checkout's `configs/`."""
    packaged = _PACKAGE_DIR / "shipped" / "configs"
    return packaged if packaged.is_dir() else _PACKAGE_DIR.parent / "configs"


def train_configs() -> list[Path]:
    """Return the shipped training configs, sorted by name."""
    return sorted((configs_dir() / "train").glob("*.yaml"))
