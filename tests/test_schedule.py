"""Laws of the scheduler, on graphs that Hypothesis draws: each task once, after what it needs, within workers and memory; a failure takes with it what depends on it and nothing else."""
import threading, time
from pathlib import Path
from types import SimpleNamespace

from hypothesis import HealthCheck, example, given, settings, strategies as st

import slml_nb.run as room
from slml_nb.core import SlmlError
from slml_nb.run import Kernels, Runner, Task, schedule


@st.composite
def cases(draw):
    "Tasks in an order in which each comes after those it needs; some fail; how many workers, how much memory."
    n = draw(st.integers(1, 9))
    needs = [draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set() for i in range(n)]
    return SimpleNamespace(needs=needs, fails=draw(st.sets(st.integers(0, n - 1), max_size=2)), workers=draw(st.integers(1, 4)), budget=draw(st.sampled_from([100, 250, 1000])),
                           memory=[draw(st.sampled_from([None, 50, 100, 200, 400])) for _ in range(n)], peaks={i: draw(st.sampled_from([30, 150])) for i in draw(st.sets(st.integers(0, n - 1), max_size=3))},
                           naps=[draw(st.sampled_from([0, 0, 0.002])) for _ in range(n)], odd=draw(st.booleans()))


def run(case):
    "The case, scheduled for real, with a task that only says when it ran."
    lock, log, notes, ended, events = threading.Lock(), [], {}, [], []

    def run_task(runner, task, inputs):
        i = int(task.id)
        with lock: log.append(("begin", i, dict(inputs)))
        time.sleep(case.naps[i])
        with lock: log.append(("end", i))
        if i in case.fails: raise (ValueError if case.odd else SlmlError)("no")
        return {f"a{i}": f"hash{i}"}

    record = SimpleNamespace(record={"stages": {}}, elapsed=lambda: 1.0, folder=Path("x"))
    def task(i):
        front = {"memory": f"{case.memory[i]}MB"} if case.memory[i] else {}
        return Task(str(i), SimpleNamespace(stage=str(i), front=front), {}, record, Path("x"), {f"a{p}": str(p) for p in sorted(case.needs[i])}, False, lambda **what: notes.setdefault(i, []).append(what))
    real, room.run_task = room.run_task, run_task
    try:
        runner = Runner(None, Kernels(cold=True), lambda **e: events.append(e), case.budget, case.workers, peaks={str(i): mb for i, mb in case.peaks.items()})
        schedule(runner, [task(i) for i in range(len(case.needs))], lambda t, state: ended.append((int(t.id), state)))
    finally: room.run_task = real
    return log, notes, ended, events


def mb(case, i): return case.memory[i] or case.peaks.get(i) or case.budget / case.workers


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_laws(case):
    log, notes, ended, events = run(case)
    n = len(case.needs)
    # what becomes of each task, from the graph alone
    want = {}
    for i in range(n): want[i] = "skipped" if any(want[p] != "done" for p in case.needs[i]) else "failed" if i in case.fails else "done"
    assert dict(ended) == want and len(ended) == n  # each is over, once
    begun = [e[1] for e in log if e[0] == "begin"]
    assert sorted(begun) == [i for i in range(n) if want[i] != "skipped"]  # each at most once, none in vain
    # only after what it needs, and with what that has made
    over, at_work = set(), set()
    for kind, i, *inputs in log:
        if kind == "begin":
            assert case.needs[i] <= over and inputs[0] == {f"a{p}": f"hash{p}" for p in case.needs[i]}
            at_work.add(i)
            assert len(at_work) <= case.workers
            assert len(at_work) == 1 or sum(mb(case, j) for j in at_work) <= case.budget + 1e-9, (at_work, case)
        else: at_work.discard(i), over.add(i)
    # the record says so, in words
    for i in range(n):
        if want[i] == "failed": assert notes[i][-1]["state"] == "failed" and notes[i][-1]["error"]["message"]
        if want[i] == "skipped":
            broken = {str(p) for p in case.needs[i] if want[p] != "done"}
            assert notes[i][-1]["state"] == "skipped" and set(notes[i][-1]["why"].removesuffix(" did not finish").split(" and ")) == broken
    assert sorted(int(e["stage"]) for e in events if e["type"] == "end") == [i for i in range(n) if want[i] != "done"]  # the rest is said by run_task itself


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(2, 8))
def test_workers_are_used(workers, tasks):
    "As many at a time as may be: the first ones wait until all of them are there."
    together = min(workers, tasks)
    meet = threading.Barrier(together)
    real = room.run_task
    def run_task(runner, task, inputs):
        if int(task.id) < together: meet.wait(60)  # BrokenBarrierError if they are not at work at the same time
        return {}
    room.run_task = run_task
    record, ended = SimpleNamespace(record={"stages": {}}, elapsed=lambda: 1.0, folder=Path("x")), []
    try: schedule(Runner(None, Kernels(cold=True), lambda **e: None, 1000, workers),
                  [Task(str(i), SimpleNamespace(stage=str(i), front={}), {}, record, Path("x"), {}, False, lambda **w: None) for i in range(tasks)], lambda t, s: ended.append(s))
    finally: room.run_task = real
    assert ended == ["done"] * tasks


class Elsewhere:
    "Makes the stages of even numbers."
    def takes(self, node): return int(node.stage) % 2 == 0


def test_stages_elsewhere_take_no_place_here():
    "One worker here: a stage at work elsewhere leaves it, and its memory, to others; two stages here still wait for each other."
    meet, at_work, most = threading.Barrier(4), set(), []
    def run_task(runner, task, inputs):
        i = int(task.id)
        if i % 2: at_work.add(i), most.append(len(at_work))
        if i != 3: meet.wait(60)  # 0, 2 and 4 elsewhere and 1 here are all at work before any of them ends
        at_work.discard(i)
        return {}
    real, room.run_task = room.run_task, run_task
    record, ended = SimpleNamespace(record={"stages": {}}, elapsed=lambda: 1.0, folder=Path("x")), []
    try: schedule(Runner(None, Kernels(cold=True), lambda **e: None, 100, 1, away=Elsewhere()),
                  [Task(str(i), SimpleNamespace(stage=str(i), front={"memory": "90MB"}), {}, record, Path("x"), {}, False, lambda **w: None) for i in range(5)], lambda t, s: ended.append((t.id, s)))
    finally: room.run_task = real
    assert sorted(ended) == [(str(i), "done") for i in range(5)] and max(most) == 1


def test_a_stage_for_elsewhere_never_runs_here_by_mistake(tmp_path):
    from slml_nb.core import load_params
    from slml_nb.run import execute
    (tmp_path / "p.yaml").write_text(f"extends: {Path('params/sample.yaml').resolve()}\ntrain: {{on: ml.g5.xlarge}}\nruns: {tmp_path}/runs\n")
    for how in ({}, {"dry_run": True}):
        try: execute(load_params(tmp_path / "p.yaml"), **how)
        except SlmlError as e: assert "train runs on ml.g5.xlarge" in str(e) and "p.yaml:2" in str(e)
        else: raise AssertionError("it ran here")
    assert not (tmp_path / "runs").exists()
