"""The pictures of the documentation: `make pictures` (needs Chromium) draws them from the code as it is.

The report that they show is of a run that is made up: a GPU, and the embedding model that Cuepoint was born from.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from made import make_results  # noqa: E402

from cuepoint.report import write_report  # noqa: E402

SIZES = {"report.png": (900, 1330), "report-narrow.png": (500, 1500)}  # Chromium's windows are at least 500 wide


def main() -> None:
    """Write the report of a made-up run, and photograph it."""
    chromium = shutil.which("chromium") or sys.exit("make pictures needs chromium (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder:
        layout, settings, run = make_results(Path(folder), videos=24, model="gte-Qwen2-1.5B-instruct")
        write_report(layout, settings, run)
        page = (layout.report / "report.html").as_uri()
        for name, (width, height) in SIZES.items():
            options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            target = HERE / "pictures" / name
            target.parent.mkdir(exist_ok=True)
            subprocess.run(
                [chromium, *options, f"--window-size={width},{height}", f"--screenshot={target}", page],
                check=True,
                capture_output=True,
            )
            print(target)


if __name__ == "__main__":
    main()
