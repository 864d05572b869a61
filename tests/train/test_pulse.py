"""What the beats of ranks say: who died, who left, who is behind."""

import os
import socket
import subprocess
import sys
import threading

from deepv3.train.pulse import Pulse, here, is_gone, who_died, who_hangs

HERE = Pulse(9, 5, "step (loop.py:1)", True, "", socket.gethostname(), os.getpid())
AWAY = HERE._replace(host="another-node")


def test_a_pulse_goes_through_the_store_and_back():
    assert Pulse.from_json(HERE.to_json()) == HERE


def test_a_process_of_this_node_is_dead_when_it_is_gone_and_only_then():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pulse = HERE._replace(pid=child.pid)
    assert is_gone(HERE) is False and is_gone(pulse) is False and is_gone(AWAY) is None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its parent has not asked
    assert is_gone(pulse) is True
    child.wait()
    assert is_gone(pulse) is True
    assert (
        who_died({0: (HERE, 99.0), 1: (pulse, 0.0)}, 0, 3.0) == "rank 1 died in step 5, last seen in step (loop.py:1)"
    )


def test_a_rank_of_another_node_is_dead_when_its_beat_stands_still():
    assert who_died({1: (AWAY, 2.9)}, 0, 3.0) is None
    assert who_died({1: (AWAY, 3.1), 2: (AWAY, 4.0)}, 0, 3.0).startswith("ranks 1, 2 died in step 5")
    assert who_died({0: (AWAY, 99.0)}, 0, 3.0) is None  # oneself


def test_who_says_that_it_leaves_did_not_die():
    for reason in ("done", "PeerLost"):
        assert who_died({1: (AWAY._replace(left=reason), 99.0)}, 0, 3.0) is None
    left = {1: (AWAY._replace(left="KeyError: 'x'"), 99.0)}
    assert who_died(left, 0, 3.0) == "rank 1 left in step 5: KeyError: 'x'"
    assert who_died(left, 0, 3.0, only_silent=True) is None


def test_the_rank_that_computes_while_others_wait_hangs():
    busy = HERE._replace(waits=False, where="sleeping (x.py:3)")
    assert who_hangs({0: HERE, 1: busy, 2: HERE}) == "rank 1 hangs in step 5, in sleeping (x.py:3)"


def test_the_rank_at_an_earlier_step_hangs_even_if_it_waits():
    assert who_hangs({0: HERE, 1: HERE._replace(step=4)}).startswith("rank 1 hangs in step 4")


def test_where_all_wait_all_are_named():
    assert who_hangs({0: HERE, 1: HERE}) == "all ranks wait for one another in step 5, in step (loop.py:1)"


def test_a_threads_place_is_its_innermost_line_outside_of_libraries():
    inside, leave = threading.Event(), threading.Event()

    def waits_in_a_library():
        inside.set()
        leave.wait()

    thread = threading.Thread(target=waits_in_a_library)
    thread.start()
    inside.wait()
    where, waits = here(thread.ident)
    leave.set()
    thread.join()
    assert where.startswith("waits_in_a_library (train/test_pulse.py:") and waits
    assert here(None) == ("nowhere", False)
