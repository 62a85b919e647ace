"""Work of several threads is gathered into calls."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from msr_jax.separate.chunks import ahead
from msr_jax.separate.gather import Calls


def squares(items):
    return [item**2 for item in items]


@pytest.mark.parametrize("size, abreast", [(1, 1), (3, 1), (1, 4), (4, 2), (50, 3)])
def test_results_come_in_the_order_of_their_items(size, abreast):
    assert Calls()(list(range(20)), "square", squares, size, abreast) == squares(range(20))


def test_no_call_is_larger_than_asked_and_no_more_run_at_a_time():
    running, most, sizes, lock = 0, 0, [], threading.Lock()

    def run(items):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            sizes.append(len(items))
        time.sleep(0.02)
        with lock:
            running -= 1
        return items

    calls = Calls()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda k: calls([k] * 7, "same", run, 2, 3), range(3)))
    assert most == 3 and max(sizes) == 2 and sum(sizes) == 21


def test_items_of_several_threads_share_a_call_if_they_may():
    seen, first = [], threading.Event()

    def run(items):
        first.wait(5)
        seen.append(sorted(items))
        return squares(items)

    calls = Calls()
    with ThreadPoolExecutor(4) as pool:
        busy = pool.submit(calls, [1], "a", run, 4, 1)
        while not calls._running:
            time.sleep(0.001)
        asked = []
        for items, key in (([2, 3], "a"), ([4], "a"), ([5], "b")):
            asked.append(pool.submit(calls, items, key, run, 4, 1))
            while calls._line[-1][2] != items[-1]:
                time.sleep(0.001)
        first.set()
        assert busy.result() == [1] and [one.result() for one in asked] == [[4, 9], [16], [25]]
    assert seen == [[1], [2, 3, 4], [5]]


def test_what_goes_wrong_in_one_call_is_raised_and_no_further_one_begins_but_others_get_theirs():
    begun = []

    def run(items):
        begun.extend(items)
        if 1 in items:
            raise ValueError("the second")
        time.sleep(0.05)
        return items

    calls = Calls()
    with pytest.raises(ValueError, match="the second"):
        calls(list(range(20)), "x", run, 1, 3)
    assert len(begun) <= 5
    assert calls([30, 31], "x", run, 1, 3) == [30, 31]
    assert len(begun) <= 7


def test_what_is_made_ahead_begins_before_it_is_asked_for_and_ends_where_nobody_wants_it():
    made, ended = threading.Event(), threading.Event()

    def items():
        try:
            made.set()
            yield from range(100)
        finally:
            ended.set()

    waiting = ahead(items())
    assert made.wait(5)
    waiting.close()
    assert ended.wait(5) and list(waiting) == []
    assert list(ahead(range(5))) == [0, 1, 2, 3, 4]


def test_the_end_of_a_program_waits_for_a_thread_that_computes_and_lets_none_begin(tmp_path):
    program = f"""
import threading, time
from pathlib import Path
from msr_jax.separate.gather import waited_for

def work():
    with waited_for():
        begun.set()
        time.sleep(0.5)
        with waited_for():  # it may go on inside
            Path({str(tmp_path / "whole")!r}).touch()
    with waited_for():
        Path({str(tmp_path / "more")!r}).touch()

begun = threading.Event()
threading.Thread(target=work, daemon=True).start()
begun.wait()
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_the_end_of_a_program_is_not_held_up_by_who_waits_to_compile():
    program = """
import threading, time
from msr_jax.separate import network
from msr_jax.separate.gather import waited_for
from msr_jax.separate.network import Network

def compile(*_):
    begun.set()
    time.sleep(0.5)
    return object()

net = object.__new__(Network)
net._compiling, net._programs, net._bytes, net._read = threading.Lock(), {}, {}, {}
net.batch_size = net.stems = net.memory = 1
net.is_growing, net._compile, network._bytes_of_call = False, compile, lambda _: 0
begun = threading.Event()

def inside(shape):
    with waited_for():
        net._fitting(shape)

for k, work in enumerate((net._fitting, net._fitting, inside)):
    threading.Thread(target=work, args=((k, 1),), daemon=True).start()
begun.wait()
time.sleep(0.1)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
