"""Votes, signals, and which errors are another rank's fault."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist

from deepv3.config import cli
from deepv3.dist import Grid
from deepv3.train.faults import Votes, is_lost_connection


def test_everyones_votes_are_the_sum_of_each_ones():
    ranks = [Grid(3, rank) for rank in range(3)]
    votes = [Votes.pack(ranks[0], False, True, 0.5), Votes.pack(ranks[1], True, False, 0.25)]
    total = torch.stack([*votes, Votes.pack(ranks[2], False, False, 2.0)]).sum(0)
    assert Votes.unpack(total) == Votes(True, True, [0.5, 0.25, 2.0])
    assert Votes.unpack(votes[1]) == Votes(True, False, [0.0, 0.25, 0.0])


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistNetworkError("recvValue failed"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("NCCL communicator was aborted on rank 3"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("Connection closed by peer"), False),
    ],
)
def test_a_collective_that_fails_is_told_from_a_mistake(error, lost):
    assert is_lost_connection(error) is lost


def _child(body: str) -> subprocess.Popen:
    code = "from deepv3.train.faults import StopSignal\nimport os, signal, sys, time\nstop = StopSignal()\n"
    code += textwrap.dedent(body)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)


def test_a_handler_only_notes_the_wish_and_wakes_the_watchdog_and_children_keep_their_own():
    """One process, several claims: importing torch is what takes time here."""
    child = _child("""
        stop.ready()
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        print("wanted", stop.wanted, os.read(stop.wake, 9) == bytes([signal.SIGUSR1]))
        ready, born = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(born, b"1")  # Python forgets a signal that comes before the child is quite there
            time.sleep(30)
            os._exit(0)
        os.read(ready, 1)
        os.kill(pid, signal.SIGTERM)
        print("child", os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM)
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            print("second wish interrupts")
        stop._ready = False
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except Exception as error:
            print(type(error).__name__, error)
    """)
    out, errors = child.communicate(timeout=120)
    assert out.splitlines() == [
        "wanted True True",
        "child True",
        "second wish interrupts",
        "Stopped stopped by SIGTERM before the first step; nothing was to be saved",
    ], errors


def test_after_the_users_mistake_a_launchers_restart_stops_at_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "exit.json").write_text('{"code": 2, "reason": "model.x is wrong", "rank": 0, "step": null}')
    ran = []
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert cli.guarded(lambda: ran.append(1), tmp_path) == 2 and not ran
    assert "model.x is wrong" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # a person starts it again
    assert cli.guarded(lambda: ran.append(1), tmp_path) == 0 and ran
    (tmp_path / "exit.json").write_text('{"code": 75, "reason": "rank 1 died", "rank": 0, "step": 3}')
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert cli.guarded(lambda: ran.append(2), tmp_path) == 0 and ran == [1, 2]
