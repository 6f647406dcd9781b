"""The demo model that ships with the package, so that every command works without arguments."""

from importlib import resources
from pathlib import Path


def demo_path() -> Path:
    """Return the path of the demo model; `tools/train_demo.py` tells what it is and how it was made."""
    return Path(str(resources.files("ggjac") / "data" / "demo.gguf"))
