"""Make the example page of the documentation: the report of the bundled demo, as `ggjac analyze` writes it.

    python tools/make_example_report.py [docs/example/report.html]

Apart from facts about the machine (platform, versions, times, memory), the page is the same each time.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OUTPUT = Path(__file__).parents[1] / "docs" / "example" / "report.html"
COMMAND = [
    "analyze",
    "--contrast",
    "--per-token",
    "--layers",
    "all",
]  # as the page shows it: with every part that `analyze` can compute


def make(output: Path = OUTPUT) -> Path:
    """Analyse the demo in an empty folder and keep the page."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "ggjac", *COMMAND], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (page,) = Path(folder).glob("ggjac-runs/*/report.html")
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, output)
    return output


if __name__ == "__main__":
    print(make(*map(Path, sys.argv[1:2])))
