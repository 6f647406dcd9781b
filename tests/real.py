"""Real models for tests: files that `tools/fetch_real_models.py` has put into the folder `GGJAC_REAL_MODELS`."""

import os
from pathlib import Path

import pytest

VARIABLE = "GGJAC_REAL_MODELS"
FILES = {"smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma3": "gemma-3-270m-q4_k_m.gguf"}
HINT = "python tools/fetch_real_models.py FOLDER, then GGJAC_REAL_MODELS=FOLDER pytest -m real"


def find(name: str) -> Path:
    """Return the path of a model, or skip. The small one must be in the folder if there is a folder."""
    if not (folder := os.environ.get(VARIABLE)):
        pytest.skip(f"needs real models: {HINT}")
    path = Path(folder).expanduser().absolute() / FILES[name]
    if not path.is_file() and name == "smollm2":
        pytest.fail(f"{VARIABLE} is set, but {path} is absent: {HINT}")
    if not path.is_file():
        pytest.skip(f"{path} is absent: {HINT}")
    return path
