"""Stands for the program that exports beside training: obeys a file beside the exports."""

import os
import sys
import time
from pathlib import Path

_, checkpoint, output = sys.argv[1:]
target = Path(output)
order = (target.parent.parent / "order").read_text()
temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
temporary.mkdir(parents=True)
assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
if order == "fail":
    temporary.rmdir()
    sys.stderr.write("a warning\nerror: no space\n")
    sys.exit(2)
if order == "hang":
    (target.parent.parent / "hangs").write_text(str(os.getpid()))
    time.sleep(600)
(temporary / "made_of").write_text(checkpoint)
temporary.rename(target)
