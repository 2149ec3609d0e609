"""A Python with the toolboxes imported, which forks to run a script: no seconds spent.

    warm_python.py serve SOCKET            imports, then forks a process per request
    warm_python.py run SOCKET [-u] SCRIPT|-m MODULE [ARGUMENT ...]   acts as python

A script gets its own process, with the arguments, environment, folder, input and
outputs of who asked; it ends as the script ends, by a signal too. The server ends when
all who hold a lease (:func:`lease`) have gone.
"""

import atexit
import contextlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

MODULES = ("mmcastling.run.exporting", "mmcastling.train", "mmdet.apis")
MODULES += ("mmpretrain.apis", "mmseg.apis", "quick_mmengine")


def lease(address: Path, log: Path) -> socket.socket:
    """A connection that keeps the server at ``address`` alive, started if it is not."""
    with contextlib.suppress(OSError):
        return _connect(address)
    address.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # no pool that a fork breaks
    command = [sys.executable, __file__, "serve", str(address)]
    with log.open("w") as said:
        server = subprocess.Popen(
            command, env=environment, stdin=-3, stdout=said, stderr=said
        )
    while not address.exists():
        assert server.poll() is None, log.read_text()
        time.sleep(0.05)
    return _connect(address)


def _connect(address: Path | str) -> socket.socket:
    link = socket.socket(socket.AF_UNIX)
    link.connect(str(address))
    if not link.recv(1):
        raise ConnectionError(f"the server at {address} has ended")
    return link


def run(address: str, arguments: list[str]) -> None:
    """Have the server run a script; end as it ends."""
    with _connect(address) as link:
        request = dict(argv=arguments, env=dict(os.environ), cwd=os.getcwd())
        body = json.dumps(request).encode()
        socket.send_fds(link, [len(body).to_bytes(8, "big")], [0, 1, 2])
        link.sendall(body)
        replies = link.makefile()
        pid = int(replies.readline())

        def forward(number: int, frame: object) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, forward)
        code = int(replies.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _serve(address: str) -> None:
    """Serve until the last lease ends; in a forked process, return to run a script."""
    import gc
    import importlib

    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    children: dict[int, socket.socket] = {}
    links: set[socket.socket] = set()
    while True:
        for key, _ in selector.select(0.02 if children else None):
            link = key.fileobj
            if link is listener:
                link, _ = listener.accept()
                link.sendall(b"!")
                links.add(link)
                selector.register(link, selectors.EVENT_READ)
                continue
            head, fds, *_ = socket.recv_fds(link, 8, 3)
            if not head:  # gone: what it asked for goes too
                _drop(link, selector, links)
                for pid in [pid for pid, owner in children.items() if owner is link]:
                    os.kill(pid, signal.SIGKILL)
                continue
            request = json.loads(_read(link, int.from_bytes(head, "big")))
            if (pid := os.fork()) == 0:
                selector.close()
                for other in (listener, *links):
                    other.close()
                _become(request, fds)
                return
            for fd in fds:
                os.close(fd)
            children[pid] = link
            link.sendall(f"{pid}\n".encode())
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            link, code = children.pop(pid), os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                link.sendall(f"{code}\n".encode())
        if not links:
            os.unlink(address)
            os._exit(0)


def _drop(
    link: socket.socket, selector: selectors.BaseSelector, links: set[socket.socket]
) -> None:
    selector.unregister(link)
    links.discard(link)
    link.close()


def _read(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += link.recv(size - len(data))
    return data


def _become(request: dict, fds: list[int]) -> None:
    """Take over what a process of its own would have been given."""
    import numpy as np
    import torch

    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    asked = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    known = [path for path in sys.path[1:] if path not in inherited]
    sys.path[:] = [sys.path[0], *filter(None, asked), *known]
    sys.path_importer_cache.clear()
    sys.argv = request["argv"]
    if sys.argv[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        del sys.argv[0]
    random.seed(), np.random.seed(), torch.seed()


def _run_script() -> None:
    """Run what ``sys.argv`` names and end, as ``python`` would, but free nothing."""
    code: object = 0
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            sys.path[0] = os.getcwd()
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    if not isinstance(code, (int, type(None))):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(sys.argv[2], sys.argv[3:])
    else:
        _serve(sys.argv[2])
        _run_script()
