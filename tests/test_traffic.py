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
