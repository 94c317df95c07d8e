"""Every program of the project starts beside a Transformer Engine that is installed and broken."""

import json
import re
import subprocess
import sys

from tests.unit.parallel.test_packages import ROOT, broken, environment

# Each in a fork of one process that has PyTorch: the imports of one must not prepare the next.
IMPORT_EACH = """
import importlib.util, json, os, sys, traceback
import torch
said = {}
for path in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    if os.fork() == 0:
        problem = ""
        try:
            spec = importlib.util.spec_from_file_location("program", path)
            module = importlib.util.module_from_spec(spec)
            sys.modules["program"] = module
            spec.loader.exec_module(module)
            if "--help" in sys.argv:
                module.main(["--help"])
        except SystemExit:
            pass
        except BaseException as error:
            problem = traceback.format_exc()[-1500:]
        os.write(writer, problem.encode())
        os._exit(0)
    os.close(writer)
    said[path] = open(reader).read()
    os.wait()
json.dump(said, sys.stdout)
"""


def programs():
    """Files that a user starts."""
    for folder in ("", "benchmarks", "dattn_mcore", "examples/python", "tools"):
        pattern = "**/*.py" if folder else "*.py"
        for file in sorted((ROOT / folder).glob(pattern)):
            if re.search(r'^if __name__ == "__main__":', file.read_text(), re.MULTILINE):
                yield file.relative_to(ROOT).as_posix()


def test_each_is_imported_beside_a_broken_transformer_engine(tmp_path):
    broken(tmp_path, "transformer_engine", "OSError", "no library of it")
    files = list(programs())
    assert {"benchmarks/peak_memory.py", "examples/python/own_loop.py"} <= set(files)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_EACH, json.dumps(files)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    problems = {file: said for file, said in json.loads(done.stdout).items() if said}
    assert not problems, "\n".join(f"{file}:\n{said}" for file, said in problems.items())
