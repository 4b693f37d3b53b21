"""Planted bottlenecks: each is named by what was measured."""
import os, socket, subprocess, sys, threading, time

import pytest

from slml_nb.profile import Watch, advice, bounds, loading

cores = len(os.sched_getaffinity(0))
BURN = "import time\nend = time.time() + 1.0\nwhile time.time() < end: pass"


def test_one_core():
    if cores < 2: pytest.skip("one core is all there is")
    with Watch(gpu=False) as w:
        end = time.process_time() + 0.8
        while time.process_time() < end: pass
    share = w.record["cpu"] / w.record["seconds"]
    assert bounds(w.record)[0] == "one core" or share < 0.8, w.record  # a machine that is busy otherwise gives less than a core


def test_all_cores():
    with Watch(gpu=False) as w:
        for p in [subprocess.Popen([sys.executable, "-c", BURN.replace("time.time()", "time.process_time()")]) for _ in range(cores)]: p.wait()
    share = w.record["cpu"] / w.record["seconds"] / cores
    assert w.record["cpu"] >= 0.95 * cores
    assert "cpu" in bounds(w.record) or share < 1 / 3, w.record


def test_a_loader_that_waits_and_one_that_computes():
    def batches(fetch):
        for _ in range(12):
            fetch()
            yield 1
    def computes():
        end = time.thread_time() + 0.03
        while time.thread_time() < end: pass
    for fetch, words in ((lambda: time.sleep(0.03), "fetching waits"), (computes, "fetching computes")):
        with Watch(gpu=False) as w:
            for _ in loading(w, batches(fetch)):
                with w.phase("step"): sum(range(1000))
        assert "loader" in bounds(w.record), w.record
        assert any(words in a and "worker" in a for a in advice(w.record)), advice(w.record)


def test_waiting_for_somebody_else():
    with Watch(gpu=False) as w: time.sleep(0.8)
    assert bounds(w.record)[0] == "waiting"


def test_the_network():
    server = socket.socket()
    server.bind(("127.0.0.1", 0)), server.listen(1)
    def serve():
        there, _ = server.accept()
        with there:
            for _ in range(40): there.sendall(b"x" * 250_000), time.sleep(0.02)
    thread = threading.Thread(target=serve)
    thread.start()
    with Watch(gpu=False, loopback=True) as w, socket.create_connection(server.getsockname()) as c:
        while c.recv(1 << 20): pass
    thread.join(), server.close()
    assert w.record["wire"] > 2 * 10_000_000  # sent and received
    assert bounds(w.record, wire_mb_per_second=10)[0] == "network", w.record


def test_a_disk_that_writes_through(tmp_path):
    with Watch(gpu=False) as w:
        end = time.time() + 1.5
        with open(tmp_path / "x", "wb", buffering=0) as f:
            while time.time() < end: f.write(os.urandom(64) * 65536), os.fsync(f.fileno())
    if w.record["stalled_io"] is None or w.record["disk_written"] < 1e6: pytest.skip("this machine does not tell, or the folder is in memory")
    share = w.record["stalled_io"] / w.record["seconds"]
    assert ("disk" in bounds(w.record)) == (share >= 1 / 3), w.record
