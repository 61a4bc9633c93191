"""Other Python processes that run code on request, started afresh as a serving engine starts its workers."""

import json
import select
import subprocess
import sys
from pathlib import Path

from tests.support.patience import HANG

ROOT = Path(__file__).parents[3]
_LOOP = """
import json, sys, traceback
import torch
from engram_kernels import EngramTable
from engram_kernels.tables.memory import shared_protocol
shared_protocol._free_huge_pages = lambda: 0  # tables of tests lie in /dev/shm, whatever else the machine has
space = dict(torch=torch, EngramTable=EngramTable)
print("ready", flush=True)
for line in sys.stdin:
    try:
        exec(json.loads(line), space)
        answer = [True, space.pop("result", None)]
    except Exception as error:
        answer = [False, f"{type(error).__name__}: {error}"]
    print(json.dumps(answer), flush=True)
"""


class Peer:
    """A process that keeps its variables; code leaves its answer in ``result``."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LOOP], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid

    def wait_ready(self):
        assert self.process.stdout.readline() == "ready\n"
        return self

    def start(self, code):
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def answer(self, timeout=HANG):
        """What ``result`` was; an exception's type and text where there was one."""
        assert select.select([self.process.stdout], [], [], timeout)[0], "no answer in time"
        return json.loads(self.process.stdout.readline())[1]

    def run(self, code):
        self.start(code)
        return self.answer()

    def end(self, kill=False):
        """End it: as a program ends, or at once."""
        if kill:
            self.process.kill()
        self.process.stdin.close()
        self.process.wait(HANG)
        self.process.stdout.close()
