"""Starts Python modules that import fairseq again and again, importing it once.

A server forks a process for each command; what that process does to modules is gone with it.
"""

import atexit
import contextlib
import importlib
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback

from support.forks import status_of

TIMEOUT_SECONDS = 600
"""Until commands that hang are killed."""


class ForkServer:
    """Used as a context."""

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=os.path.dirname(os.path.dirname(__file__)),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(self, *commands, output, environment=None, patience=0):
        """Run commands at the same time; where one fails, the others are killed.

        Args:
            commands: (module, *arguments) each.
            output: file that is added to.
            environment: more of it.
            patience: seconds in which the others may end by themselves before that.

        Returns:
            Their exit statuses, negative for signals.
        """
        commands = [list(map(str, command)) for command in commands]
        request = {
            "commands": commands,
            "output": str(output),
            "environment": environment or {},
            "patience": patience,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _serve():
    for name in ("fairseq_cli.hydra_train", "fairseq_cli.train", "fairseq_sparsemixer"):
        importlib.import_module(name)
    logging.getLogger().handlers.clear()  # each command has its own
    for line in sys.stdin:
        request = json.loads(line)
        pids = [_fork(command, request) for command in request["commands"]]
        statuses = {}
        killers = [_killer(TIMEOUT_SECONDS, pids, statuses)]
        while len(statuses) < len(pids):
            pid, status = os.wait()
            statuses[pid] = os.waitstatus_to_exitcode(status)
            if statuses[pid] and len(killers) == 1:
                killers.append(_killer(request["patience"], pids, statuses))
        for killer in killers:
            killer.cancel()
            killer.join()
        print(json.dumps([statuses[pid] for pid in pids]), flush=True)


def _killer(seconds, pids, ended):
    """Kills those that have not ended by then."""
    killer = threading.Timer(seconds, _kill, (pids, ended))
    killer.start()
    return killer


def _kill(pids, ended):
    for pid in set(pids) - ended.keys():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _fork(command, request):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = status_of(lambda: _begin(command, request))
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        os._exit(status)


def _begin(command, request):
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["environment"])
    _run(*command)


def _run(module, *arguments):
    from support import moments

    moments.install(moments.OWN)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
