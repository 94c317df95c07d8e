"""Writers of a checkpoint end with a rank that is killed."""

import subprocess
import sys

import psutil
import pytest

PROGRAM = """
import multiprocessing, os, subprocess, sys, time
from dattn_mcore.orphans import end_forks_with_parent

end_forks_with_parent()
fork = multiprocessing.get_context("fork")

def below():
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(600)

def writer():
    fork.Process(target=below).start()
    below()

fork.Process(target=writer).start()
program = [sys.executable, "-c", "import time; time.sleep(600)"]
os.write(1, b"%d\\n" % subprocess.Popen(program, stdout=subprocess.DEVNULL).pid)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's kernel watches parents")
def test_forks_end_with_a_killed_parent():
    rank = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    pids = {int(rank.stdout.readline()) for _ in range(3)}
    below = psutil.Process(rank.pid).children(recursive=True)
    assert {child.pid for child in below} == pids
    other = next(child for child in below if child.cmdline()[-1].startswith("import time;"))
    try:
        rank.kill()
        rank.wait()
        writers = [child for child in below if child != other]
        _, alive = psutil.wait_procs(writers, timeout=20)
        assert len(writers) == 2 and not alive
        assert other.is_running()  # another program is not concerned
    finally:
        other.kill()


CHILD = """
import os, sys, time
from dattn_mcore.orphans import end_with_parent

end_with_parent(int(sys.argv[1]))
os.write(1, b"here\\n")
time.sleep(600)
"""
PARENT = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}, str(os.getpid())])
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it looks once a second")
def test_a_program_ends_with_a_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "here\n"
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=20)
    assert not alive


def test_a_program_whose_parent_has_ended_already_ends_at_once():
    """The id that it was given is another process's."""
    done = subprocess.run([sys.executable, "-c", CHILD, "1"], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, b"")
