"""Ends a training process at a moment that is told to it, from inside of it.

By audit events, so that nothing of the code under test is named: reading a file to be copied,
opening one to be written, and moving one are events of Python's own.
"""

import hashlib
import json
import os
import resource
import signal
import sys
import threading

OWN, OF_CHILD = "MOMENT", "MOMENT_OF_CHILD"
"""Variables of the environment: of the process that is forked, or of the one that it starts."""
KINDS = ("step", "validation", "saving", "copying", "moving", "full saving", "full copying")


NEVER = {"kind": "never", "count": 1, "share": 0.0}


def draw(rng):
    """A moment: in which of those that begin it ends, and after how much of it."""
    kind = rng.choice(KINDS)
    latest = {"step": 12, "validation": 3, "moving": 6}.get(kind, 4)
    return {"kind": kind, "count": rng.randint(1, latest), "share": rng.random()}


def install(variable):
    """Wait for the moment of the environment; write the state of random numbers at each update."""
    told = os.environ.get(variable)
    if told:
        _Moment(**json.loads(told)).wait()


class _Moment:
    def __init__(self, kind, count, share, file_bytes, random_file):
        self.kind = kind
        self.left = count
        self.share = share
        self.bytes = int(share * file_bytes)
        self.random_file = random_file
        self.copying = self.patched = self.limited = False

    def wait(self):
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        if not self.patched and hasattr(sys.modules.get("fairseq.trainer"), "Trainer"):
            self.patched = True
            self.patch(sys.modules["fairseq.trainer"].Trainer)
        if self.limited and event in ("os.remove", "os.rename"):
            self.lift_limit()
        if event == "shutil.copyfile" and ".pt" in str(arguments[1]):
            self.copying = True
        elif event == "open" and ".pt" in str(arguments[0]) and "w" in str(arguments[1]):
            self.begin("copying" if self.copying else "saving", self.limit_size)
            self.copying = False
        elif event == "os.rename" and ".pt" in str(arguments[1]):
            self.begin("moving", self.kill)

    def patch(self, trainer):
        for kind, name in (("step", "train_step"), ("validation", "valid_step")):
            setattr(trainer, name, self.timed(kind, getattr(trainer, name)))

    def timed(self, kind, method):
        def call(*arguments, **more):
            self.begin(kind, lambda: threading.Timer(0.02 * self.share, self.kill).start())
            result = method(*arguments, **more)
            if kind == "step":
                self.write_random_state()
            return result

        return call

    def begin(self, kind, end):
        if kind == self.kind.split()[-1]:
            self.left -= 1
            if self.left == 0:
                end()

    def limit_size(self):
        """Let the file end after so many bytes: an error as of a full disk, or of the process."""
        if not self.kind.startswith("full"):
            signal.signal(signal.SIGXFSZ, lambda number, frame: self.kill())
        self.limited = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes, resource.RLIM_INFINITY))

    def lift_limit(self):
        """Logs go on, when the file that did not fit has gone."""
        self.limited = False
        resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (resource.RLIM_INFINITY,))

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def write_random_state(self):
        import numpy as np
        import torch

        states = [torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()).encode()]
        rank = dict(zip(sys.argv, sys.argv[1:])).get("--distributed-rank", "0")
        with open(f"{self.random_file}.{rank}.partial", "w") as file:
            json.dump([hashlib.sha256(state).hexdigest() for state in states], file)
        os.replace(file.name, f"{self.random_file}.{rank}")
