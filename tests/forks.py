"""Training processes that start at once: forked from one that has imported everything.

Importing the libraries takes ten seconds of processor time a process; a fork takes none, and is a process of
its own all the same: it can be killed, and several join a process group as under torchrun.

Run as a script it is the server: it reads a JSON line a command on standard input and answers with one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PATIENCE = 200.0  # seconds until a run counts as hanging


class Processes:
    """The processes of one launch."""

    def __init__(self, server: Server, pids: list[int], log: Path):
        self.server, self.pids, self.log = server, pids, log

    def wait(self, patience: float = PATIENCE) -> list[int]:
        """Exit codes by rank, minus the signal's number for a killed one; a hang fails the test."""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            codes = self.server.ask("codes", pids=self.pids)
            if all(code is not None for code in codes):
                return codes
            time.sleep(0.05)
        self.kill(9)
        raise AssertionError(f"still running after {patience:.0f} s:\n{self.text()}")

    def until(self, ready: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Wait until something is so while the processes run."""
        stop = time.monotonic() + patience
        while not ready():
            assert time.monotonic() < stop, f"waited in vain:\n{self.text()}"
            assert None in self.server.ask("codes", pids=self.pids), f"ended too early:\n{self.text()}"
            time.sleep(0.01)

    def kill(self, number: int, group: bool = False) -> None:
        """Send a signal to every rank (with `group` to its data workers too, as a terminal does)."""
        for pid in self.pids:
            try:
                (os.killpg if group else os.kill)(pid, number)
            except ProcessLookupError:
                pass

    def text(self) -> str:
        """What all ranks printed."""
        return "\n".join(
            path.read_text(errors="replace") for path in sorted(self.log.parent.glob(self.log.name + "*"))
        )


class Server:
    """Starts processes; one for a session of tests."""

    def __init__(self, folder: Path):
        self.folder, self.launches = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )

    def ask(self, command: str, **values: Any) -> Any:
        """One command and its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"command": command, **values}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *commands: Sequence[str], ranks: int = 1, **environment: str) -> Processes:
        """Run `vlm-adapt` commands one after the other in each of `ranks` processes.

        The processes end with the first code that is not 0.
        """
        self.launches += 1
        log = self.folder / f"log-{self.launches}-"
        if ranks > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        told = {"commands": [list(map(str, one)) for one in commands], "ranks": ranks, "log": str(log)}
        return Processes(self, self.ask("start", environment=environment, **told), log)

    def run(self, *commands: Sequence[str], ranks: int = 1, **environment: str) -> Processes:
        """`start`, then wait for 0 of every rank."""
        started = self.start(*commands, ranks=ranks, **environment)
        codes = started.wait()
        assert codes == [0] * ranks, f"exit codes {codes}:\n{started.text()}"
        return started

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:  # a process forked since holds the other end of the pipe
            self.process.kill()
            self.process.wait()


def write(tree: dict[str, Any]) -> str:
    """A run's plain values as a YAML file beside its output folder; its path."""
    path = Path(tree["output_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def clean_environment() -> dict[str, str]:
    """The environment without what a process group of this process has left there."""
    kept = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# The server ----------------------------------------------------------------------------------------


def _serve() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.t5.modeling_t5
    import transformers.models.vit.modeling_vit  # noqa: F401

    import vlm_adapt.cli
    import vlm_adapt.connectors.mlp
    import vlm_adapt.train.run
    import vlm_adapt.vision.hf  # noqa: F401

    codes: dict[int, int] = {}
    for line in sys.stdin:
        told = json.loads(line)
        if told["command"] == "start":
            answer: Any = [_fork(rank, told) for rank in range(told["ranks"])]
        else:
            for pid in told["pids"]:
                if pid not in codes:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        codes[pid] = os.waitstatus_to_exitcode(status)
            answer = [codes.get(pid) for pid in told["pids"]]
        print(json.dumps(answer), flush=True)


def _fork(rank: int, told: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(f"{told['log']}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ |= told["environment"]
        if told["ranks"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(told["ranks"])}
        from vlm_adapt.cli import main

        for words in told["commands"]:
            code = main(words)
            if code:
                break
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
