"""Walk through COURSE.md with a stopwatch, and write cpu_course.json: OMP_NUM_THREADS=1 python results/course.py

Run it in a fresh clone (out/ must not hold the course's runs yet). It runs the page's own commands in their order, then
the notebook, and notes how long each took and what the routers of stops 4 and 5 gained.
"""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent


def commands(page):
    """COURSE.md -> [(stop, command)], without the exercises"""
    found = []
    for stop in re.findall(r"^## Stop \d.*?(?=^## )", page, re.M | re.S):
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", stop, re.M | re.S):
            found += [(int(stop[8]), line) for line in block.splitlines() if not language]
    return found


def routers(out_dir):
    """-> of each router its loss minus that of the best fixed pattern: estimate, low, high"""
    rows = [row for row in json.loads((out_dir / "routers.json").read_text()) if row["domain"] == "all"]
    return [{"name": row["name"], "budget": row["budget"], "big": row["achieved"], "sequences": row["sequences"],
             "minus_fixed": row["versus"]["fixed"]} for row in rows]


def timed(command):
    start = time.time()
    subprocess.run(command, cwd=ROOT, check=True, shell=True, env=os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"})
    return round(time.time() - start)


def main():
    rows = [{"stop": stop, "command": command, "seconds": timed(command)}
            for stop, command in commands((ROOT / "COURSE.md").read_text())]
    notebook = timed("python tests/test_notebook.py")
    (HERE / "cpu_course.json").write_text(json.dumps({
        "command": "python results/course.py, in a fresh clone", "device": f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "commands": rows, "notebook_seconds": notebook,
        "routers": routers(ROOT / "out/cpu")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
