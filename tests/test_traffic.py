"""Traffic under stress: many processes on one state, workers that are killed, a store that goes away, alarms that must be rare, a compaction that dies."""
import json, math, multiprocessing, os, random, signal, subprocess, sys, time

import numpy as np
import pytest

from slml_nb.experiment import gain
from slml_nb.feedback import FeedbackLog, Learner, compact, read_joined, read_log
from slml_nb.traffic import Reward, Traffic, fresh_state, learn_into, learned, open_state, read_spec, simulate


def most(times, rate):
    "More than so many of so many happen once in a thousand times."
    from scipy import stats
    return stats.binom.ppf(0.999, times, rate)


def spec_in(folder, **more): return {"name": "cab", "policy": "thompson", "variants": ["old", "new"], "state": str(folder / "state.db"), "log": str(folder / "log"), "half_life": 0, **more}


def test_serving_needs_numpy_only():
    "Choosing and logging import neither pandas nor anything heavier."
    heavy = "pandas torch sklearn scipy duckdb pyarrow boto3 lightgbm onnxruntime matplotlib".split()
    code = f"""import sys, tempfile; from slml_nb.feedback import FeedbackLog; from slml_nb.traffic import Traffic
d = tempfile.mkdtemp()
spec = dict(name='a', policy='linear', variants=['x', 'y', 'z'], context=dict(km=dict(min=0, max=1)), state=d + '/s.db', log=d)
t = Traffic.open(spec); log = FeedbackLog.open(spec, t); c = t.choose(dict(km=1)); log.prediction(c, dict(km=1), 1.0); log.feedback(c.id, 1.0); log.learner.step(); log.close(); t.close()
assert t.state['rewards'] == 1; print([m for m in {heavy} if m in sys.modules])"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def _teach(folder, who):
    from pathlib import Path
    spec = read_spec(spec_in(Path(folder)))
    store = open_state(spec["state"])
    mine = [Reward(f"{who}-{i}", ("old", "new")[i % 2], 1.0) for i in range(100)] + [Reward(f"shared-{i}", "new", 0.5) for i in range(50)]
    random.Random(who).shuffle(mine)
    for i in range(0, len(mine), 25): learn_into(store, mine[i:i + 25], spec, {f"file-{who}": (i, i + 25, {"old": (7, 1)})})


@pytest.mark.slow
def test_many_processes_lose_nothing(tmp_path):
    "Four processes teach one state, each its own rewards and some that all of them know: every reward counts once."
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_teach, args=(tmp_path, who)) for who in range(4)]
    for w in workers: w.start()
    for w in workers: w.join(120)
    assert [w.exitcode for w in workers] == [0] * 4
    _, state = open_state(tmp_path / "state.db").load("cab")
    assert state["rewards"] == 450 and state["arms"]["old"]["n"] == 200 and state["arms"]["new"]["n"] == 250
    assert state["arms"]["new"]["total"] == 200 + 25
    assert [state["arms"]["old"]["answers"], state["arms"]["old"]["failures"]] == [4 * 6 * 7, 4 * 6]


WORKER = """import sys, json
from slml_nb.feedback import FeedbackLog
from slml_nb.traffic import Traffic
spec, who = json.loads(sys.argv[1]), sys.argv[2]
traffic = Traffic.open(spec); log = FeedbackLog.open(spec, traffic)
for i in range(100_000):
    choice = traffic.choose({}, f"{who}-{i}")
    log.prediction(choice, {}, 1.0); log.feedback(choice.id, 1.0); print(choice.id, choice.variant, flush=True)"""


@pytest.mark.slow
def test_workers_that_are_killed(tmp_path):
    "Three workers share a folder and are killed one after the other, the learner first: whatever was acknowledged is learned, once."
    spec = spec_in(tmp_path, refresh_s=0.2)
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(spec), str(i)], stdout=open(tmp_path / f"told{i}", "w")) for i in range(3)]
    for w in workers:
        time.sleep(1.2)
        w.send_signal(signal.SIGKILL)
        w.wait()
    told = [line.split() for i in range(3) for line in (tmp_path / f"told{i}").read_text().splitlines() if len(line.split()) == 2]
    traffic = Traffic.open(spec, background=False)
    before = traffic.state["rewards"]
    Learner(spec["log"], traffic).step()
    table = read_joined(spec)
    rewarded = {i for i, r in zip(table["id"].to_pylist(), table["reward"].to_pylist()) if r == 1.0}
    assert {i for i, _ in told} <= rewarded and len(told) > 30
    assert before > 0  # a worker has taken over while the others ran
    assert traffic.state["rewards"] == len(rewarded) == sum(a["n"] for a in traffic.state["arms"].values())
    assert sum(a["answers"] for a in traffic.state["arms"].values()) == table.num_rows


def test_the_store_goes_away_and_comes_back(tmp_path):
    "Predictions and feedback go on without the state store; when it is back, all of it is learned."
    spec = spec_in(tmp_path)
    traffic = Traffic.open(spec, background=False)
    log = FeedbackLog.open(spec, traffic, background=False)
    log.learner.step()
    traffic.learn([Reward(f"{i}", "new", 1.0) for i in range(50)] + [Reward(f"o{i}", "old", 0.0) for i in range(50)])
    shares = dict(traffic.shares)
    traffic.store.db.close()
    (tmp_path / "state.db").rename(tmp_path / "kept")
    (tmp_path / "state.db").mkdir()
    for i in range(40):
        choice = traffic.choose({}, f"ride {i}")
        log.prediction(choice, {}, 1.0)
        assert log.answer(json.dumps({"id": choice.id, "reward": 1}).encode())[0] == 202
        if i % 10 == 0: assert log.learner.step() is False
    assert traffic.shares == shares and traffic.away
    (tmp_path / "state.db").rmdir()
    (tmp_path / "kept").rename(tmp_path / "state.db")
    assert log.learner.step() and not traffic.away
    assert traffic.state["rewards"] == 140
    log.close()


@pytest.mark.slow
def test_a_compaction_that_is_killed(tmp_path):
    "Killed at any moment, a compaction loses no line and doubles none."
    for i in range(300):
        if i % 20 == 0: log = FeedbackLog(tmp_path)
        log._put({"k": "f", "id": f"{i}", "t": 0.0, "w": 1.0})
        if i % 20 == 19: log.close()
    code = f"import os, threading, random; from slml_nb.feedback import compact; import pyarrow.parquet; threading.Timer(random.random() * 0.02, os._exit, [9]).start(); compact({str(tmp_path)!r}, 0)"
    for _ in range(6):
        subprocess.run([sys.executable, "-c", code], capture_output=True)
        assert sorted(read_log(tmp_path)["id"].to_pylist(), key=int) == [f"{i}" for i in range(300)]
    compact(tmp_path, 0)
    assert sorted(read_log(tmp_path)["id"].to_pylist(), key=int) == [f"{i}" for i in range(300)]
    assert not list((tmp_path / "segments").glob("*.jsonl"))


@pytest.mark.slow
def test_a_good_canary_is_rarely_sent_back():
    "Of challengers that are as good, no more than alpha are sent back, in failures or in rewards, over all steps."
    spec = read_spec({"name": "c", "policy": "canary", "variants": ["old", "new"], "steps": [0.1, 0.5], "per_step": 200})
    def ends(seed, failing):
        state, chance = fresh_state(spec), np.random.default_rng(seed)
        for _ in range(40):
            new = [10, 50][min(state["canary"]["step"], 1)]
            rewards = [Reward("", v, float(x)) for v, n in (("new", new), ("old", 100 - new)) for x in chance.random(n) < 0.2]
            learned(state, rewards, spec, {"old": (100 - new, chance.binomial(100 - new, 0.02)), "new": (new, chance.binomial(new, failing))})
            if state["canary"]["state"] == "rolled back": return True
        return False
    assert sum(ends(seed, 0.02) for seed in range(200)) <= most(200, 0.05)
    assert sum(ends(seed, 0.2) for seed in range(40)) == 40


@pytest.mark.slow
def test_a_learning_policy_makes_no_winners():
    "While Thompson sampling moves the shares between two equal variants, the any-look limits hold, and the estimate is unbiased when one is better."
    def run(seed, gap, rounds=1500):
        spec, chance = read_spec({"name": "t", "policy": "thompson", "variants": ["old", "new"], "explore": 0.2}), np.random.default_rng(seed)
        state, rows = fresh_state(spec), []
        from slml_nb.traffic import shares
        for _ in range(0, rounds, 50):
            p = shares(state, spec)["new"]
            pick = chance.random(50) < p
            reward = (chance.random(50) < 0.3 + gap * pick).astype(float)
            rows += [(("old", "new")[int(k)], p if k else 1 - p, r) for k, r in zip(pick, reward)]
            learned(state, [Reward("", ("old", "new")[int(k)], r) for k, r in zip(pick, reward)], spec)
        return gain(*map(np.array, zip(*rows)), "old", "new")
    alarms = sum(bool(((g["low"] > 0) | (g["high"] < 0)).any()) for g in (run(seed, 0.0) for seed in range(150)))
    assert alarms <= most(150, 0.05)
    found = [run(seed, 0.1) for seed in range(100)]
    assert sum(g["low"][-1] <= 0.1 <= g["high"][-1] for g in found) >= 100 - most(100, 0.05)
    values = [g["estimate"][-1] for g in found]
    assert abs(np.mean(values) - 0.1) < 4 * np.std(values) / math.sqrt(100)


@pytest.mark.slow
def test_thompson_loses_little():
    "Regret grows like the logarithm: the second 10,000 requests cost less than half of the first, and all less than a tenth of equal shares (0.05 a request, the exploring share apart)."
    runs = [simulate({"name": "t", "policy": "thompson", "variants": ["a", "b"], "half_life": 0, "explore": 0.001}, lambda v, m, r: {"a": 0.5, "b": 0.6}[v], 20_000, 100, seed) for seed in range(4)]
    regret = np.mean([r["regret"] for r in runs], axis=0)
    assert regret[-1] - regret[99] < 0.5 * regret[99] and regret[-1] < 0.1 * 0.05 * 20_000


def test_command(tmp_path, capsys):
    "slml traffic says who gets what and why, draws it, and forgets when asked."
    from slml_nb.cli import main
    spec = spec_in(tmp_path)
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    traffic = Traffic.open(spec, background=False)
    log = FeedbackLog.open(spec, traffic, background=False)
    for i in range(400):
        choice = traffic.choose({}, f"{i}")
        log.prediction(choice, {}, 1.0)
        log._put({"k": "f", "id": choice.id, "t": 0.0, "w": float(choice.variant == "new")})
    log.learner.step()
    log.close()
    assert main(["traffic", str(tmp_path / "spec.json"), "--picture", str(tmp_path / "x.png")]) == 0
    said = capsys.readouterr().out
    assert "why: new is the best one with a chance of 100%" in said and "new is better than old" in said and (tmp_path / "x.png").exists()
    assert main(["traffic", str(tmp_path / "spec.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rewards"] == 400
    assert main(["traffic", str(tmp_path / "spec.json"), "--compact", "--forget"]) == 0
    assert "0 rewards" in capsys.readouterr().out
    assert main(["traffic", str(tmp_path / "nothing.json")]) == 2


# -- the state store gone, under load

LOAD = """import json, os, sys, time
from slml_nb.feedback import open_traffic
from slml_nb.traffic import DynamoState
DynamoState.answer_s = 1.5
spec, who, end = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
traffic, log = open_traffic(spec)
i = 0
while not os.path.exists(end):
    choice = traffic.choose({}, f"{who}-{i}"); i += 1
    log.prediction(choice, {}, 1.0)
    status, _ = log.answer(json.dumps({"id": choice.id, "reward": float(choice.variant == "new")}).encode())
    print(json.dumps([choice.id, choice.variant, choice.probability, status, bool(traffic.away)]), flush=True)
    time.sleep(float(sys.argv[4]))
log.close(); traffic.close()"""


class Loaded:
    "Processes that choose, log and take feedback without a pause; what each of them said."

    def __init__(self, folder, specs, pause_s=0.003):
        self.end, self.told = folder / "end", [folder / f"told {i}" for i in range(len(specs))]
        self.workers = [subprocess.Popen([sys.executable, "-c", LOAD, json.dumps(s), f"{i}", str(self.end), str(pause_s)], stdout=open(t, "w")) for i, (s, t) in enumerate(zip(specs, self.told))]

    def lines(self): return [[json.loads(l) for l in t.read_text().splitlines(keepends=True) if l.endswith("\n")] for t in self.told]

    def until(self, enough, what):
        "Wait until every worker has said enough since now."
        start, stop = [len(l) for l in self.lines()], time.monotonic() + 60
        while not all(enough(l[n:]) for l, n in zip(self.lines(), start)): assert time.monotonic() < stop and all(w.poll() is None for w in self.workers), what; time.sleep(0.05)

    def close(self):
        self.end.touch()
        try: return [w.wait(60) for w in self.workers]
        finally: [w.kill() for w in self.workers]


def away(n): return lambda lines: sum(l[4] for l in lines) >= n
def there(n): return lambda lines: sum(not l[4] for l in lines) >= n


def went_on(loaded, specs):
    "All was answered, without a store by the last known shares; all of it was learned in the end, once."
    assert loaded.close() == [0] * len(specs)
    said = loaded.lines()
    assert all(l[3] == 202 for lines in said for l in lines)
    for lines in said:
        spans, before = [], False
        for l in lines:
            if l[4]: spans = spans if before else [*spans, {}]; spans[-1].setdefault(l[1], set()).add(l[2])
            before = l[4]
        assert spans and all(len(p) == 1 for span in spans for p in span.values())  # nothing moved while nobody could know better
    for log in {s["log"] for s in specs}:
        traffic = Traffic.open(next(s for s in specs if s["log"] == log), background=False)
        assert Learner(log, traffic).step(), traffic.away
    state = Traffic.open(specs[0], background=False).state
    total = sum(map(len, said))
    assert state["rewards"] == total == sum(a["answers"] for a in state["arms"].values())
    assert state["arms"]["new"]["total"] == sum(l[1] == "new" for lines in said for l in lines)


@pytest.mark.slow
def test_the_table_hangs_under_load(tmp_path):
    "DynamoDB takes connections and answers nothing for a while; two machines share it."
    from test_kinesis import KEYS, moto_server
    with moto_server() as (server, url), pytest.MonkeyPatch.context() as patch:
        for k, v in KEYS.items(): patch.setenv(k, v)
        specs = [spec_in(tmp_path, state="dynamodb://traffic", endpoint_url=url, refresh_s=0.2, log=str(tmp_path / f"log {i}")) for i in range(2)]
        loaded = Loaded(tmp_path, specs, 0.03)  # moto copies a whole table for each transaction
        try:
            loaded.until(there(30), "started")
            server.send_signal(signal.SIGSTOP)
            loaded.until(away(30), "went on without it")
            server.send_signal(signal.SIGCONT)
            loaded.until(there(30), "came back")
            went_on(loaded, specs)
        finally: server.send_signal(signal.SIGCONT); loaded.close()


@pytest.mark.slow
def test_the_table_is_lost_under_load(tmp_path):
    "DynamoDB is killed and comes back with nothing in it: what was known is written again, and goes on from there."
    from test_kinesis import KEYS, free_port, moto_server
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for k, v in KEYS.items(): patch.setenv(k, v)
        specs = [spec_in(tmp_path, state="dynamodb://traffic", endpoint_url=f"http://127.0.0.1:{port}", refresh_s=0.2)] * 2
        with moto_server(port):
            loaded = Loaded(tmp_path, specs, 0.03)
            try: loaded.until(there(30), "started")
            except BaseException: loaded.close(); raise
        try:
            loaded.until(away(30), "went on without it")
            with moto_server(port):
                loaded.until(there(30), "came back")
                went_on(loaded, specs)
        finally: loaded.close()


@pytest.mark.slow
def test_the_disk_of_the_state_is_away_and_locked_under_load(tmp_path):
    "First the folder of the SQLite file is gone, then somebody else holds its lock and is killed."
    import sqlite3
    (tmp_path / "disk").mkdir()
    specs = [spec_in(tmp_path, state=str(tmp_path / "disk/state.db"), refresh_s=0.2)] * 2
    loaded = Loaded(tmp_path, specs)
    try:
        loaded.until(there(60), "started")
        (tmp_path / "disk").rename(tmp_path / "kept"); (tmp_path / "disk").touch()
        loaded.until(away(60), "went on without it")
        (tmp_path / "disk").unlink(); (tmp_path / "kept").rename(tmp_path / "disk")
        loaded.until(there(60), "came back")
        code = f"import sqlite3, time; c = sqlite3.connect({specs[0]['state']!r}, timeout=60, isolation_level=None); c.execute('begin exclusive'); print('mine', flush=True); time.sleep(600)"
        holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert holder.stdout.readline() == "mine\n"
        with sqlite3.connect(f"file:{specs[0]['state']}?mode=ro", uri=True) as c: before = c.execute("select version from traffic").fetchone()
        loaded.until(lambda lines: len(lines) >= 150, "went on while it was locked")
        with sqlite3.connect(f"file:{specs[0]['state']}?mode=ro", uri=True) as c: assert c.execute("select version from traffic").fetchone() == before
        holder.kill(); holder.wait(); holder.stdout.close()
        loaded.until(there(60), "unlocked")
        went_on(loaded, specs)
    finally: loaded.close()


# -- two machines, one state

MACHINE = """import json, os, sys, time
from slml_nb.feedback import open_traffic
from slml_nb.traffic import DynamoState
DynamoState.answer_s = 1.5
spec, who, mine, other, end, pause_s = json.loads(sys.argv[1]), *sys.argv[2:6], float(sys.argv[6])
traffic, log = open_traffic(spec)
out, read, i = open(mine, "a"), 0, 0
def say(*words): print(*words, file=out, flush=True)
def tell(id, variant): say("f", id, log.answer(json.dumps({"id": id, "reward": float(variant == "new")}).encode())[0])
while not os.path.exists(end):
    choice = traffic.choose({}, f"{who}-{i}"); i += 1
    log.prediction(choice, {"km": i % 7}, 1.0)
    say("p", choice.id, choice.variant, choice.probability)
    whole = open(other).read() if os.path.exists(other) else ""
    whole = whole[:whole.rfind("\\n") + 1]
    for line in whole[read:].splitlines():  # what became of its predictions is told to the other machine, some of it twice, some to both
        kind, id, variant, *_ = line.split()
        if kind == "p":
            for _ in range(1 + (hash(id) % 3 == 0)): tell(id, variant)
    read = len(whole)
    if i % 4 == 0: tell(choice.id, choice.variant)
    time.sleep(pause_s)
log.close(); traffic.close()"""


class Pair:
    "Two machines, each with a disk of its own and a process that may be killed; both say what they do."

    def __init__(self, folder, pause_s=0.02, **more):
        self.folder, self.pause_s, self.born = folder, pause_s, 0
        self.specs = [spec_in(folder, refresh_s=0.2, log=str(folder / f"disk {k}"), **more) for k in range(2)]
        self.running = [self.start(k) for k in range(2)]

    def start(self, k):
        self.born += 1
        told = [str(self.folder / f"told {i}") for i in (k, 1 - k)]
        return subprocess.Popen([sys.executable, "-c", MACHINE, json.dumps(self.specs[k]), f"{k}.{self.born}", *told, str(self.folder / "end"), str(self.pause_s)])

    def lines(self): return [[l.split() for l in (self.folder / f"told {k}").read_text().splitlines(keepends=True) if l.endswith("\n")] if (self.folder / f"told {k}").exists() else [] for k in range(2)]

    def more(self, n, what):
        "Wait until both have said so much more."
        start, stop = [len(l) for l in self.lines()], time.monotonic() + 60
        while not all(len(l) >= s + n for l, s in zip(self.lines(), start)): assert time.monotonic() < stop and all(p.poll() is None for p in self.running), what; time.sleep(0.05)

    def killed(self, k):
        self.running[k].kill(); self.running[k].wait()
        with open(self.folder / f"told {k}", "rb+") as f: f.truncate((self.folder / f"told {k}").read_bytes().rfind(b"\n") + 1)  # half a line is no word
        self.running[k] = self.start(k)

    def close(self):
        (self.folder / "end").touch()
        try: return [p.wait(60) for p in self.running]
        finally: [p.kill() for p in self.running]

    def learned(self):
        "Everything that was acknowledged is learned, once, from whichever machine it was told to."
        assert self.close() == [0, 0]
        learners = [Learner(s["log"], Traffic.open(s, background=False)) for s in self.specs]
        for _ in range(2): assert all(l.step() for l in learners), [l.traffic.away for l in learners]
        logs = [read_log(s["log"]).to_pylist() for s in self.specs]
        made = {r["id"]: (k, r["variant"]) for k, rows in enumerate(logs) for r in rows if r["kind"] == "prediction"}
        said = [{r["id"] for r in rows if r["kind"] == "feedback"} for rows in logs]
        assert all({l[1] for l in lines if l[0] == "f" and l[2] == "202"} <= there for lines, there in zip(self.lines(), said))
        assert all(l[2] == "202" for lines in self.lines() for l in lines if l[0] == "f")
        state = Traffic.open(self.specs[0], background=False).state
        known = set(made) & (said[0] | said[1])
        assert state["rewards"] == len(known) == sum(a["rewards"] for a in state["arms"].values())
        assert state["arms"]["new"]["total"] == sum(made[i][1] == "new" for i in known) and state["arms"]["old"]["total"] == 0
        assert sum(a["answers"] for a in state["arms"].values()) == len(made)
        astray = {i for i in known if i not in said[made[i][0]]}
        assert len(astray) > 20 and len(known - astray) > 5  # most of it came to the other machine, some to both
        return learners


def test_what_is_told_to_another_machine_is_learned(tmp_path):
    "Two processes, two disks, one SQLite file: every feedback comes to the other machine, some twice, some to both."
    pair = Pair(tmp_path, 0.005)
    try:
        pair.more(120, "began")
        pair.learned()
    finally: pair.close()


@pytest.mark.slow
def test_machines_that_are_killed_learn_what_they_told_each_other(tmp_path):
    "kill -9 of one, of the other, of the first again, and the state gone in between."
    (tmp_path / "disk").mkdir()
    pair = Pair(tmp_path, 0.005, state=str(tmp_path / "disk/state.db"))
    try:
        for k in (0, 1, 0): pair.more(60, "before it was killed"); pair.killed(k)
        pair.more(60, "after")
        (tmp_path / "disk").rename(tmp_path / "kept"); (tmp_path / "disk").touch()
        pair.more(60, "without a state")
        pair.killed(1)  # what it was told lies on its disk only
        pair.more(60, "without a state, begun anew")
        (tmp_path / "disk").unlink(); (tmp_path / "kept").rename(tmp_path / "disk")
        pair.more(60, "the state is back")
        pair.learned()
    finally: pair.close()


@pytest.mark.slow
def test_machines_that_share_a_table_learn_what_they_told_each_other(tmp_path):
    "The same in DynamoDB, which hangs for a while; one machine is killed meanwhile."
    from test_kinesis import KEYS, moto_server
    with moto_server() as (server, url), pytest.MonkeyPatch.context() as patch:
        for k, v in KEYS.items(): patch.setenv(k, v)
        pair = Pair(tmp_path, 0.05, state="dynamodb://traffic", endpoint_url=url)
        try:
            pair.more(60, "began")
            server.send_signal(signal.SIGSTOP)
            pair.more(30, "went on without it")
            pair.killed(0)
            pair.more(30, "went on, begun anew")
            server.send_signal(signal.SIGCONT)
            pair.more(40, "came back")
            pair.learned()
        finally: server.send_signal(signal.SIGCONT); pair.close()


def test_late_from_another_machine(tmp_path):
    "By the time when it was told, not by the time when the letter comes: what was in time counts, what was late does not, and silence waits for letters."
    here, there = (spec_in(tmp_path, silence=0.0, wait_s=3600.0, log=str(tmp_path / d)) for d in ("here", "there"))
    learners = [Learner(s["log"], Traffic.open(s, background=False)) for s in (here, there)]
    logs = [FeedbackLog.open(s, l.traffic, background=False) for s, l in zip((here, there), learners)]
    now = time.time()
    for id in ("in time", "late"): logs[0]._put({"k": "p", "id": id, "t": now - 3590, "v": "new", "q": 0.5, "r": {}, "a": 1.0})
    logs[1]._keep([{"k": "f", "id": "in time", "t": now, "w": 1.0}, {"k": "f", "id": "late", "t": now + 20, "w": 1.0}])
    learners[0].step(now + 30)  # the hour is over, and a letter may be on its way
    learners[1].step(now + 30); learners[0].step(now + 31)
    assert learners[0].told["silent"] == 0 and learners[0].told["late"] == 1 and learners[0].traffic.state["arms"]["new"]["total"] == 1
    learners[0].step(now + 100)
    arm = learners[0].traffic.store.load("cab")[1]["arms"]["new"]
    assert (arm["rewards"], arm["total"]) == (2, 1.0)
    learners[1].step(now + 4000)
    assert (learners[1].told["learned elsewhere"], learners[1].told["without prediction"]) == (2, 0)
    for log in logs: log.close()


def test_context_and_truth_of_another_machine(tmp_path):
    "The contextual policy and rewards from the truth need what only the prediction's own machine has: it joins."
    spec = spec_in(tmp_path, policy="linear", reward="error", kind="number", goal="min", context={"km": {"min": 0, "max": 10}})
    here, there = ({**spec, "log": str(tmp_path / d)} for d in ("here", "there"))
    learners = [Learner(s["log"], Traffic.open(s, background=False)) for s in (here, there)]
    logs = [FeedbackLog.open(s, l.traffic, background=False) for s, l in zip((here, there), learners)]
    for km in range(40):
        choice = learners[0].traffic.choose({"km": km % 10}, f"{km}")
        logs[0].prediction(choice, {"km": km % 10}, {"prediction": 10.0})
        assert logs[1].answer(json.dumps({"id": choice.id, "truth": 10.0 + km % 10}).encode())[0] == 202
    for l in (learners[1], learners[0]): l.step()
    state = learners[0].traffic.state
    assert state["rewards"] == 40 and sum(a["total"] for a in state["arms"].values()) == 4 * 45
    from slml_nb.traffic import _sums
    sums = [_sums(state["arms"][v], 2)[0] for v in ("old", "new")]
    assert sum(s[0, 0] for s in sums) == pytest.approx(40, abs=1e-9) and sum(s[1, 1] for s in sums) == pytest.approx(4 * sum(((k - 5) / 5) ** 2 for k in range(10)), abs=1e-9)
    for log in logs: log.close()
