"""Planted bottlenecks: each is named by what was measured, in a block of code, and in the stages of a run."""
import json, os, signal, subprocess, sys, time

import pytest
from hypothesis import given, settings, strategies as st

from slml_nb.profile import BOUNDS, Pace, Watch, advice, bounds, energy, loading, shares
from tiny import HEAD, notebook, use_case

cores = len(os.sched_getaffinity(0))
BURN = "import time\nend = time.process_time() + {seconds}\nwhile time.process_time() < end: pass\n"
steady = settings(derandomize=True, deadline=None, max_examples=200)


def test_one_core():
    if cores < 2: pytest.skip("one core is all there is")
    with Watch(gpu=False) as w: exec(BURN.format(seconds=0.8))
    share = w.record["cpu"] / w.record["seconds"]
    assert bounds(w.record)[0] == "one core" or share < 0.85, w.record  # a machine that is busy otherwise gives less than a core


def test_all_cores():
    with Watch(gpu=False) as w:
        for p in [subprocess.Popen([sys.executable, "-c", BURN.format(seconds=1)]) for _ in range(cores)]: p.wait()
    share = w.record["cpu"] / w.record["seconds"] / cores
    assert w.record["cpu"] >= 0.95 * cores
    assert "cpu" in bounds(w.record) or share < 0.6, w.record


def test_cores_that_others_keep_busy():
    others = [subprocess.Popen(["setsid", sys.executable, "-c", f"import time\nend = time.time() + 3\nwhile time.time() < end: pass"], start_new_session=True) for _ in range(3 * cores)]
    try:
        seen = f"import json\nfrom slml_nb.profile import Watch, bounds\nwith Watch(gpu=False) as w: exec({BURN.format(seconds=0.4)!r})\nprint(json.dumps([bounds(w.record), w.record['cpu'], w.record['delayed'], w.record['seconds']]))"
        found, cpu, late, seconds = json.loads(subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True).stdout)
    finally:
        for p in others: os.killpg(p.pid, signal.SIGKILL), p.wait()
    if cpu / seconds > 0.6: pytest.skip("there were cores enough for all")
    assert found[0] == "crowded" and late > 0.1, (found, cpu, late, seconds)


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


SERVER = """
import socket, time
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(1)
print(s.getsockname()[1], flush=True)
there, _ = s.accept()
for _ in range({n}): there.sendall(b"x" * {piece}); time.sleep({pause})
"""


@pytest.mark.parametrize("n, piece, pause", [(40, 250_000, 0.02), (12, 100_000, 0.1)], ids=["fast", "a megabyte a second"])
def test_the_network(n, piece, pause):
    import socket
    with subprocess.Popen([sys.executable, "-c", SERVER.format(n=n, piece=piece, pause=pause)], stdout=subprocess.PIPE, text=True) as server:
        port = int(server.stdout.readline())
        read = f"import socket\nc = socket.create_connection(('127.0.0.1', {port}))\nwhile c.recv(1 << 20): pass"
        with Watch(gpu=False, loopback=True) as w: exec(read, {})
    assert w.record["wire"] > 2 * n * piece  # sent and received, and headers
    assert bounds(w.record, wire_mb_per_second=10)[0] == "network" or w.record["cpu"] > 0.6 * w.record["seconds"], w.record
    assert any("MB a second" in a for a in advice(w.record, wire_mb_per_second=10))


def test_a_disk_that_writes_through(tmp_path):
    with Watch(gpu=False) as w:
        end = time.time() + 1.5
        with open(tmp_path / "x", "wb", buffering=0) as f:
            while time.time() < end: f.write(os.urandom(64) * 65536), os.fsync(f.fileno())
    if w.record["stalled_io"] is None or w.record["disk_written"] < 1e6: pytest.skip("this machine does not tell, or the folder is in memory")
    share = w.record["stalled_io"] / w.record["seconds"]
    assert ("disk" in bounds(w.record)) == (share >= 1 / 3), w.record


def test_memory_that_grows():
    import mmap
    kept, block = [], b"x" * 10_000_000
    with Watch(every=0.05, gpu=False) as w:
        for _ in range(25):  # pages of their own: the heap of a process that has done much has room for more
            kept.append(mmap.mmap(-1, len(block), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            kept[-1][:] = block
            time.sleep(0.05)
    del kept
    first = w.record["samples"]["rows"][0][2]
    assert 200 < w.record["peak_mb"] - first < 300  # 250,000,000 bytes are 238 MB
    small = {**w.record, "memory_mb": w.record["peak_mb"] / 0.99}  # on a machine that has no more
    assert bounds(small)[0] == "memory"
    assert any("memory grows to the end" in a for a in advice(small)) and not any("grows" in a for a in advice({**w.record, "memory_mb": 1e6}))


def test_a_gpu_that_computes(tmp_path, monkeypatch):
    "There is no GPU here: what nvidia-smi would print stands in for it, and nothing behind it."
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nwhile true; do echo '93, 2000, 61.5, 0'; sleep 0.1; done\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with Watch() as w: time.sleep(1)
    assert bounds(w.record)[0] == "gpu" and w.record["gpu_busy"] == 0.93 and w.record["gpu_mb"] == 2000
    assert "GPU 93% busy" in advice(w.record)[0]
    used = energy(w.record)
    assert used["how"] == "partly measured" and abs(used["measured"] - 61.5 * w.record["seconds"]) < 1e-6


amounts = st.floats(0, 1e4)
records = st.builds(lambda s, c, cpu, mb, room, disk, wire, on, io, mem, late, gpu, loader, step: {"seconds": s, "cores": c, "cpu": cpu, "peak_mb": mb, "memory_mb": room, "disk_read": disk, "disk_written": 0, "wire": wire,
                    "on_the_wire": on, "stalled_io": io, "stalled_memory": mem, "delayed": late, **({} if gpu is None else {"gpu_busy": gpu}),
                    "phases": {} if loader is None else {"loader": {"seconds": loader, "cpu": 0.0, "count": 3}, "step": {"seconds": step, "cpu": 0.0, "count": 3}}},
                    st.floats(0.001, 1e5), st.integers(1, 128), amounts, amounts, st.none() | st.floats(1, 1e6), amounts, st.floats(0, 1e12), amounts, st.none() | amounts, st.none() | amounts, amounts,
                    st.none() | st.floats(0, 1), st.none() | amounts, amounts)


@steady
@given(records)
def test_every_record_gets_shares_and_sentences(record):
    found = shares(record)
    assert list(found) == list(BOUNDS) and all(0 <= v <= 1 for v in found.values())
    named = bounds(record)
    assert named == sorted(named, key=lambda b: (-found[b], BOUNDS.index(b))) and len(advice(record)) >= len(named)
    assert energy(record)["joules"] >= 0 and energy({**record, "cpu": record["cpu"] + 1})["joules"] > energy(record)["joules"] - 1e-6


# ---- the stages of a run

SLEEP = notebook("sleeper", "", "slept", "n: int = 100  # rows", HEAD.format(stage="sleeper") + "import time\ntime.sleep(1.2)\nstage.metric(rows=n)\nstage.save('slept', {'n': n})\nstage.done()")
WORK = notebook("worker", "slept", "worked", "n: int = 100  # rows", HEAD.format(stage="worker") + BURN.format(seconds="1 + n / 1000") + "stage.metric(rows=n)\nstage.save('worked', {'n': n})\nstage.done()")
LOOP = notebook("trainer", "slept", "trained", "n: int = 100  # rows", HEAD.format(stage="trainer") + """import time
from slml_nb.profile import Pace
def slow():
    for i in range(40): time.sleep(0.03); yield i
pace = Pace(steps=40)
for batch in pace.batches(slow()): time.sleep(0.005), pace()
stage.metric(rows_train=n, **pace.metrics())
stage.save('trained', {'n': n})
stage.done()""")


@pytest.mark.slow
def test_the_stages_of_a_run_are_named_and_compared_with_earlier_runs(project):
    params = use_case(project, {"sleeper": SLEEP, "worker": WORK, "trainer": LOOP})
    for n in (100, 200, 400):
        code, record = project.run(params, "--workers", "1", *(x for s in ("sleeper", "worker", "trainer") for x in ("-p", f"{s}.n={n}")))
        assert code == 0, record
    code, out, err = project.slml("profile", "--json")
    assert code == 0, err
    found = json.loads(out)
    stages = {s["stage"]: s for s in found["stages"]}
    assert stages["sleeper"]["bound"] == "waiting"
    worker = stages["worker"]
    assert worker["bound"] == ("cpu" if cores == 1 else "one core") or worker["record"]["cpu"] / worker["seconds"] < 0.85, worker
    assert stages["trainer"]["bound"] == "loader" and "fetch with" in stages["trainer"]["advice"][0], stages["trainer"]
    assert stages["trainer"]["said"].startswith("after its first steps, training estimated 1.")
    assert worker["expected"]["runs"] == 2 and worker["expected"]["seconds"] >= 1.2 and found["joules"] > 0
    picture = (project.folder / found["picture"]) if not os.path.isabs(found["picture"]) else __import__("pathlib").Path(found["picture"])
    assert "<svg" in picture.read_text() and all(s in picture.read_text() for s in stages)
    code, out, _ = project.slml("profile", "latest", "--stage", "trainer")
    assert code == 0 and "the loop waits for its data" in out and "estimated" in out
    code, _, err = project.slml("profile", "--stage", "trainr")
    assert code == 2 and "did you mean 'trainer'?" in err
    code, record = project.run(params, "--workers", "1", *(x for s in ("sleeper", "worker", "trainer") for x in ("-p", f"{s}.n=400")))
    assert code == 0 and "all of it was reused" in project.slml("profile")[1]
