"""What processes do together; the tests of a refresh hold the rest."""

import subprocess
import sys

SCRIPT = """
import atexit, sys
import torch.distributed as dist
from matchdistill.distributed import leave_at_exit

atexit.register(lambda: print("in a group:", dist.is_initialized()))  # comes last: the first that is registered
leave_at_exit()
leave_at_exit()
if len(sys.argv) > 1:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    print("in a group:", dist.is_initialized())
"""


def told(*arguments):
    ran = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def test_a_process_leaves_its_group_before_it_ends(tmp_path):
    assert told(str(tmp_path / "store")) == ["in a group: True", "in a group: False"]


def test_a_process_without_a_group_ends_as_well():
    assert told() == ["in a group: False"]
