"""A run that is killed, starved, lied to and crowded. What is lost each time: nothing; what is made twice: nothing that was already there."""
import collections, hashlib, json, os, random, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

from tiny import HEAD, answer, artifacts, drive, made_by, nobody_left, notebook, processes, program, start, states, until, use_case

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
unshared = pytest.mark.skipif(not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0, reason="no right to mount a small disk here")
warm_and_cold = pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
COUNT = "with open('{folder}/count', 'a') as f: f.write('{stage} ' + str(n) + '\\n')\n"  # one write, appended: whole whoever else writes


def chain(project, length=6, nap=0.05, **settings):
    "Stages in a row, each adds to what the one before has made, counts that it ran, and takes a nap."
    def stage(i):
        body = HEAD.format(stage=f"s{i}") + COUNT.format(folder=project.folder, stage=f"s{i}") + f"import time; time.sleep({nap})"
        before = f"stage.json('a{i - 1}')" if i else "[]"
        return notebook(f"s{i}", f"a{i - 1}" if i else "", f"a{i}", "n: int = 1  # of the round", body, f"stage.save('a{i}', {before} + [n * {i + 1}])\nstage.done()")
    return use_case(project, {f"s{i}": stage(i) for i in range(length)}, **settings)


def counted(project):
    "How often each stage was begun."
    file = project.folder / "count"
    return collections.Counter(file.read_text().splitlines()) if file.exists() else collections.Counter()


def rounds(n, length=6): return {f"s{i}.n": n for i in range(length)}


def kept(project):
    "The stages in the store, as 'stage round'; each whole."
    found = set()
    for file in (project.folder / "runs/.store").glob("*/*/*/made.json"):
        made = json.loads(file.read_text())
        row, = [json.loads((file.parent / r["file"]).read_text()) for r in made["artifacts"].values()]
        found.add((made["stage"], tuple(row)))
    return found


# ---- kill -9, at random moments

def family(pid):
    "The processes of a run: runner, template, kernels."
    from slml_nb.meter import descendants
    return [pid, *descendants(pid)]


def kills(project, number, seed):
    "Kill something of a run, again and again; every run that ends well ends a round. How many rounds there were."
    use, draw, done, n = chain(project), random.Random(seed), 0, 1
    struck = collections.Counter()
    while done < number:
        before, there = counted(project), kept(project)
        p = start(project, use, overrides=rounds(n))
        aim = draw.choices(["runner", "template", "kernel"], [5, 1, 5])[0]
        place = {"runner": 0, "template": 1, "kernel": 2}[aim]
        until(lambda: p.poll() is not None or len(family(p.pid)) > place, 30)
        time.sleep(draw.choice([0, draw.uniform(0, 0.1), draw.uniform(0, 1)]))
        alive = family(p.pid) if p.poll() is None else []
        if len(alive) > place:
            try: os.kill(draw.choice(alive[2:]) if aim == "kernel" else alive[place], signal.SIGKILL)
            except ProcessLookupError: done -= 1  # it was just over
            struck[aim] += 1
            done += 1
        out, err = p.communicate(timeout=60)
        assert nobody_left(project.folder), processes(project.folder)
        again = [k for k in (f"{s} {row[0]}" for s, row in there) if counted(project)[k] > before[k]]
        assert not again, again
        if p.returncode == 0 and json.loads(out)["state"] == "done":
            check_round(project, json.loads(out), n)
            n += 1
    check_round(project, drive(project, use, overrides=rounds(n)), n)
    assert struck["runner"] and struck["kernel"], struck
    return n


def check_round(project, record, n):
    "The run is done, and its artifacts are those of a run that nobody has disturbed."
    assert record["state"] == "done" and set(states(record).values()) <= {"made", "reused"}, states(record)
    for i in range(6):
        made = json.loads((Path(record["folder"]) / f"s{i}/made.json").read_text())
        file = Path(record["folder"]) / f"s{i}" / made["root"] / made["artifacts"][f"a{i}"]["file"]
        assert json.loads(file.read_text()) == [n * (j + 1) for j in range(i + 1)]


def only_what_gc_removes(project):
    "No half file: records are whole, and what is hidden is what `slml gc` knows as left by a killed process."
    from slml_nb.core import sealed
    from slml_nb.keep import leftovers
    runs = project.folder / "runs"
    known = leftovers(runs, runs / ".store", time.time() + 3 * 86400)
    hidden = [p for p in runs.rglob(".*") if not p.name.startswith((".store", ".claims", ".gone", ".tracking"))]
    for p in hidden:
        if p.parent.name == "out": assert json.loads((p.parents[2] / "run.json").read_text())["state"] != "done"  # a stage that was killed at work; the folder goes with its run
        else: assert any(k == p or k in p.parents for k in known), (p, known)
    for file in runs.rglob("run.json"): json.loads(file.read_text())
    for file in runs.rglob("made.json"): assert file.parent.parent.name.startswith(".") or sealed(json.loads(file.read_text())) or "root" in json.loads(file.read_text()), file
    assert not [p for p in (runs / ".store/.claims").glob("*") if locked(p)]


def locked(path):
    import fcntl
    with open(path) as f:
        try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError: return True
    return False


@linux
@pytest.mark.parametrize("number, seed", [(8, 1), pytest.param(30, 2, marks=pytest.mark.slow)])
def test_killed_at_random_moments(project, number, seed):
    n = kills(project, number, seed)
    artifacts(project)  # all whole
    only_what_gc_removes(project)
    assert len({row for s, row in kept(project) if s == "s5"}) == n  # each round is there once


@linux
def test_the_artifacts_of_a_disturbed_run_are_those_of_an_undisturbed_one(tmp_path_factory):
    from conftest import Project
    one, two = (Project(tmp_path_factory.mktemp(name)) for name in ("quiet", "harried"))
    drive(one, chain(one))
    use = chain(two)
    for wait in (0.3, 0.7, 1.0):
        p = start(two, use)
        time.sleep(wait)
        p.kill(), p.communicate()
        assert nobody_left(two.folder)
    drive(two, use)
    assert artifacts(one) == artifacts(two) and len(artifacts(one)) == 6


# ---- children that a notebook leaves behind

LEAKS = """
import multiprocessing as mp, os, subprocess, time
def note(*pids):
    with open(r'{folder}/leaked', 'a') as f: f.write(''.join(str(p) + chr(10) for p in pids))
note(subprocess.Popen(['sleep', '600']).pid, subprocess.Popen(['sleep', '600'], start_new_session=True).pid)
os.system('sleep 600 & echo $! >> "{folder}/leaked"')
if os.fork() == 0:  # a daemon, as in the book: two forks, a session of its own, another directory
    os.setsid()
    if os.fork() == 0:
        os.chdir('/')
        note(os.getpid())
        time.sleep(600)
    os._exit(0)
pool = mp.get_context('fork').Pool(2)
note(*[w.pid for w in pool._pool])
held = mp.get_context('fork').Process(target=time.sleep, args=(600,))
held.start()
note(held.pid)
while len(open(r'{folder}/leaked').read().split()) < 7: time.sleep(.02)
"""


def leaked(project): return [int(p) for p in (project.folder / "leaked").read_text().split()]


def running(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError: return False


def leaky(project, then):
    return use_case(project, {"dig": notebook("dig", "", "ore", "n: int = 1", HEAD.format(stage="dig") + "stage.save('ore', {'kg': n})\nstage.done()", LEAKS.format(folder=project.folder), then)})


@linux
@pytest.mark.parametrize("then", ["pass", "1 / 0", "import os; os.kill(os.getpid(), 9)"], ids=["well", "error", "killed"])
@warm_and_cold
def test_a_notebook_that_leaks_processes(project, then, cold):
    r = drive(project, leaky(project, then), cold=cold)
    assert r["state"] == ("done" if then == "pass" else "failed")
    if "9" in then: assert "killed by SIGKILL" in r["stages"]["dig"]["error"]["message"]
    pids = leaked(project)
    assert len(pids) == 7 and until(lambda: not any(map(running, pids)), 20), [p for p in pids if running(p)]
    assert nobody_left(project.folder)


@linux
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
@warm_and_cold
def test_interrupted(project, sign, cold):
    "Ctrl-C goes to all processes of the terminal's foreground group, SIGTERM to one: kernels and what they have leaked go with the run."
    use = leaky(project, f"open(r'{project.folder}/ready', 'w').close(); import time; time.sleep(600)")
    p = start(project, use, cold=cold)
    assert until(lambda: (project.folder / "ready").exists() or p.poll() is not None) and p.poll() is None
    (os.killpg if sign == signal.SIGINT else os.kill)(p.pid, sign)
    out, err = p.communicate(timeout=90)
    assert p.returncode == 130 and "Traceback" not in err, err
    assert until(lambda: not any(map(running, leaked(project))), 20) and nobody_left(project.folder)
    record = json.loads(next(project.folder.glob("runs/mine/*/run.json")).read_text())
    assert record["state"] == "interrupted" and record["finished"] and record["seconds"] >= 0


@linux
@pytest.mark.parametrize("cold", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["warm", "cold"])
def test_interrupted_at_any_moment(project, cold):
    "Also between two stages, and while a kernel is just starting."
    use, draw = chain(project, nap=0.02), random.Random(3)
    for i in range(5):
        p = start(project, use, overrides=rounds(i), cold=cold)
        until(lambda: list(project.folder.glob("runs/mine/*/run.json")) and len(list(project.folder.glob("runs/mine/*/run.json"))) > i)
        time.sleep(draw.uniform(0.1, 1.5 if cold else 0.9))
        os.killpg(p.pid, signal.SIGINT)
        _, err = p.communicate(timeout=90)
        assert p.returncode in (130, 0, -2) and nobody_left(project.folder), err
        newest = max(project.folder.glob("runs/mine/*/run.json"), key=lambda f: f.stat().st_mtime_ns)
        assert json.loads(newest.read_text())["state"] in ("interrupted", "done")
    check_round(project, drive(project, use, overrides=rounds(1)), 1)
    artifacts(project)


@linux
def test_killed_runner_takes_everything_with_it(project):
    "kill -9 of the runner alone: template, kernels, and what a kernel has leaked."
    use = leaky(project, f"open(r'{project.folder}/ready', 'w').close(); import time; time.sleep(600)")
    p = start(project, use)
    assert until(lambda: (project.folder / "ready").exists() or p.poll() is not None) and p.poll() is None
    p.kill(), p.communicate()
    assert until(lambda: not any(map(running, leaked(project))), 20), [x for x in leaked(project) if running(x)]
    assert nobody_left(project.folder)


# ---- disks

def in_a_mount(project, script, *command):
    "A command after some mounts that only it sees."
    return subprocess.run(["unshare", "-rm", "sh", "-c", script + ' && "$@"; code=$?; find runs -name ".*.*" -type f 2>/dev/null | grep -v -e .claims -e .tracking | sed "s/^/LEFT /"; exit $code', "sh", *command],
                          cwd=project.folder, env=project.environment(), capture_output=True, text=True, timeout=120)


@unshared
@pytest.mark.parametrize("size", ["16k", "100k", *[pytest.param(s, marks=pytest.mark.slow) for s in ("48k", "400k", "900k")]])
def test_full_disk(project, size):
    "A disk that is full sooner or later: while the record is written, the notebook, or the artifact."
    body = HEAD.format(stage="dig") + "print('x' * 20_000)\nstage.save('ore', 'x' * 1_000_000)\nstage.done()"
    use = use_case(project, {"dig": notebook("dig", "", "ore", "n: int = 1", body)})
    (project.folder / "runs").mkdir()
    r = in_a_mount(project, f"mount -t tmpfs -o size={size} none runs", *project.command("run", use))
    assert r.returncode == 1 and "Traceback" not in r.stderr, (r.returncode, r.stderr)
    assert "disk is full" in r.stderr or "No space left" in r.stderr, r.stderr
    assert "LEFT" not in r.stdout, r.stdout
    assert nobody_left(project.folder)


@unshared
def test_read_only_store(project):
    "What is there is reused; what could not be kept is not begun."
    use, read_only = chain(project, 2), "mount --bind runs/.store runs/.store && mount -o remount,ro,bind runs/.store"
    drive(project, use)
    count, there = counted(project), artifacts(project)
    r = in_a_mount(project, read_only, *program(use))
    assert r.returncode == 0 and states(json.loads(r.stdout)) == {"s0": "reused", "s1": "reused"}, r.stderr
    r = in_a_mount(project, read_only, *project.command("run", use, "-p", "s0.n=7"))
    assert r.returncode == 1 and "can only be read" in r.stderr and "store:" in r.stderr and "Traceback" not in r.stderr, r.stderr
    assert counted(project) == count and artifacts(project) == there
    r = drive(project, use, overrides=rounds(7, 2))  # and elsewhere it goes on
    assert set(states(r).values()) == {"made"}


# ---- bits

MANY = """
fig, ax = stage.axes()
ax.plot([1, 2])
stage.figure(fig, 'a line')
stage.table_out(stage.sql('select 1 as a'), 'one')
stage.save('rows', stage.sql('select range as id from range(1000)'))
stage.save('limits', {'most': n})
stage.save('words', 'some words')
place = stage.folder('box')
(place / 'deep').mkdir()
(place / 'deep/file').write_bytes(bytes(range(256)))
stage.save('box', place)
print('n is', n)
stage.done()
"""
IN_STORE = ["rows.parquet", "limits.json", "words.txt", "box/deep/file", "figure_1.svg", "table_1.json", "made.json", "key.json", "notebook.ipynb", "meter.json"]
IN_RUN = ["run.json", "many/made.json", "many/key.json", "many/notebook.ipynb", "many/meter.json", "many/log.jsonl"]


def flip(path, draw):
    "One bit of a file."
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    from conftest import Project
    project = Project(tmp_path_factory.mktemp("flipped"))
    project.use = use_case(project, {"many": notebook("many", "", "rows, limits, words, box", "n: int = 1", HEAD.format(stage="many") + MANY),
                                     "last": notebook("last", "rows, limits", "sum", "n: int = 1", HEAD.format(stage="last") + "stage.save('sum', {'n': stage.sql('select count(*) from rows').fetchall()[0][0] + stage.json('limits')['most']})\nstage.done()")})
    project.first = drive(project, project.use)
    project.good = artifacts(project)
    assert len(project.good) == 5
    return project


@pytest.mark.parametrize("seed", [0, *[pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3)]])
@pytest.mark.parametrize("name", IN_STORE)
def test_a_bit_flips_in_the_store(flipped, name, seed):
    file, = [f for f in (flipped.folder / "runs/.store").glob(f"mine/*/*/{name}") if (f.parents[name.count("/")] / "rows.parquet").exists()]
    flip(file, random.Random(f"{name}{seed}"))
    r = drive(flipped, flipped.use)
    assert r["state"] == "done" and made_by(r) == flipped.good
    harmless = name in ("key.json", "notebook.ipynb", "meter.json")  # tell about a stage, are not made by it
    assert states(r) == {"many": "reused" if harmless else "made", "last": "reused"}
    if harmless: shutil.rmtree(file.parent)  # the next case begins with a whole one
    drive(flipped, flipped.use)


@pytest.mark.parametrize("seed", [0, *[pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3)]])
def test_bits_flip_in_a_run(flipped, seed):
    for name in IN_RUN if seed else IN_RUN[:3]:
        again = drive(flipped, flipped.use, start="many")
        run = Path(again["folder"])
        assert made_by(again) == flipped.good
        flip(run / name, random.Random(f"{name}{seed}"))
        r = drive(flipped, flipped.use)
        assert states(r) == {"many": "reused", "last": "reused"} and made_by(r) == flipped.good
        r = drive(flipped, flipped.use, overrides={"many.n": IN_RUN.index(name) + 10 * seed + 2}, stop="many")  # looks for a reason in the runs before
        assert states(r) == {"many": "made", "last": "skipped"}
        shutil.rmtree((run.parent / r["run"] / "many" / json.loads((Path(r["folder"]) / "many/made.json").read_text())["root"]).resolve())


def test_a_damaged_record_does_not_hide_the_other_runs(project):
    use = chain(project, 1)
    first, second, third = (Path(drive(project, use)["folder"]) for _ in range(3))
    (first / "run.json").write_bytes(b"\x00{")
    record = json.loads((second / "run.json").read_text())
    (second / "run.json").write_text(json.dumps({**record, "state": "failed"}))  # not what was sealed
    (third / "s0/made.json").write_text('{"stage"')
    fourth = drive(project, use)
    code, out, err = project.slml("runs", "--json")
    assert code == 0 and "Traceback" not in err, err
    assert fourth["run"] in {r["run"] for r in json.loads(out)}
    code, out, err = project.slml("runs")
    assert code == 0 and fourth["run"] in out, err


# ---- the clock on the wall

CLOCK = """
import datetime, os, time
_time, _real = time.time, datetime.datetime
def _shift():
    try: return float(open(os.environ['SLML_TEST_CLOCK']).read() or 0)
    except OSError: return 0.0
class Back(_real):
    @classmethod
    def now(cls, tz=None): return _real.fromtimestamp(_time() - _shift(), tz)
    @classmethod
    def utcnow(cls): return _real.fromtimestamp(_time() - _shift(), datetime.timezone.utc).replace(tzinfo=None)
time.time, datetime.datetime = lambda: _time() - _shift(), Back
"""


def test_the_clock_is_set_back(project):
    "By a year, between two runs and in the middle of a stage: what is reused is right, and nothing takes less than no time."
    from tiny import root
    project.write("clock/sitecustomize.py", CLOCK)
    clock = project.folder / "shift"
    env = {"PYTHONPATH": os.pathsep.join([str(project.folder / "clock"), str(root)]), "SLML_TEST_CLOCK": str(clock)}
    body = HEAD.format(stage="dig") + f"import time\nt = time.time()\nopen(r'{clock}', 'w').write(str(n * 31_536_000))\nassert n == 1 or time.time() < t\nstage.save('ore', {{'n': n}})\nstage.done()"
    use = use_case(project, {"dig": notebook("dig", "", "ore", "n: int = 1", body), "melt": notebook("melt", "ore", "iron", "n: int = 1", HEAD.format(stage="melt") + "stage.save('iron', stage.json('ore'))\nstage.done()")})
    years = []
    for overrides, expected in (({}, "made"), ({}, "reused"), ({"dig.n": 2}, "made"), ({}, "reused"), ({"dig.n": 2}, "reused")):
        r = drive(project, use, env=env, overrides=overrides)
        assert r["state"] == "done" and set(states(r).values()) == {expected}, states(r)
        years.append(int(r["started"][:4]))
        assert r["seconds"] >= 0 and all(s["seconds"] >= 0 and s["offset"] >= 0 and s.get("outside", 0) >= 0 for s in r["stages"].values())
        for file in Path(r["folder"]).rglob("*.json"):
            if file.name in ("made.json", "meter.json"): assert json.loads(file.read_text())["seconds"] >= 0, file
    assert years[1] == years[0] - 1 and years[3] == years[0] - 2  # the clock was set back indeed
    with_n = {json.loads(f.read_text())["n"] for f in project.folder.glob("runs/.store/**/iron.json")}
    assert with_n == {1, 2}
    from slml_nb.stage import list_runs
    assert list_runs(project.folder / "runs")[0].name == r["run"]  # the latest is the latest, whatever its name says


# ---- 200 MB of text

PRINTS = """
import sys
line = 'x' * 998 + '\\n'
for i in range(100_000): print(f'{i:07}', line[7:], sep='', end='')
print('y' * 100_000_000)
"""


@linux
@pytest.mark.parametrize("cold", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["warm", "cold"])
@pytest.mark.parametrize("secret", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "with-secret"])
def test_prints_200_mb(project, cold, secret):
    use = use_case(project, {"dig": notebook("dig", "", "ore", "key: str = ''", PRINTS, HEAD.format(stage="dig") + "stage.save('ore', {})\nstage.done()")})
    if secret: project.write(use, (project.folder / use).read_text() + "dig: {key: !env PLANTED}\n")
    r = drive(project, use, cold=cold, env={"PLANTED": "s3cr3t-of-the-house"})
    place = Path(r["folder"]) / "dig"
    assert r["state"] == "done", r["stages"]["dig"]
    r["events"].clear()
    if not cold: assert r["runner_mb"] < 150, r["runner_mb"]
    assert (place / "notebook.ipynb").stat().st_size < 3_000_000 and (place / "log.jsonl").stat().st_size < 3_000_000
    out, = json.loads((place / "notebook.ipynb").read_text())["cells"][-2]["outputs"]
    head = "".join(out["text"]).split("\n… ")[0].encode()
    want, got, size = hashlib.sha256(), hashlib.sha256(head), len(head)
    for i in range(100_000): want.update(f"{i:07}".encode() + b"x" * 991 + b"\n")
    for _ in range(100): want.update(b"y" * 1_000_000)
    want.update(b"\n")
    with open(*place.glob("cell_*_stdout.txt"), "rb") as f:
        while part := f.read(1 << 20): got.update(part), (size := size + len(part))
    assert size == 199_900_000 + 1 and got.digest() == want.digest()  # nothing is lost


# ---- ends of all kinds

ENDS = {
    "cell_limit": ("#| timeout: 0.5\nimport time; time.sleep(60)", {}, "longer than 0.5 s"),
    "whole_limit": ("import time; time.sleep(60)", {"timeout": 3}, "longer than"),
    "deaf": ("#| timeout: 0.5\nimport signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True:\n    try: time.sleep(60)\n    except BaseException: pass", {}, "longer than 0.5 s"),
    "segfault": ("b = b'x' * 100_000_000\nimport ctypes; ctypes.string_at(0)", {}, "SIGSEGV"),
    "exits": ("import os; os._exit(3)", {}, "exit code 3"),
    "abort": ("import os; os.abort()", {}, "SIGABRT"),
    "memory": ("raise MemoryError('full')", {}, "MemoryError: full"),
    "sysexit1": ("import sys; sys.exit(1)", {}, "SystemExit: 1"),
    "syntax": ("1 +", {}, "SyntaxError"),
    "recursion": ("def f(): return f()\nf()", {}, "RecursionError"),
}


@linux
@pytest.mark.parametrize("cold", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["warm", "cold"])
def test_ends_of_all_kinds(project, cold):
    "Each of them is told as what it was, with the outputs that were there before; those beside it end well."
    def stage(name, cell, front): return notebook(name, "", f"of_{name}", "n: int = 1", HEAD.format(stage=name) + f"print('before')\nstage.save('of_{name}', {{}})\nstage.done()", cell, **front)
    stages = {name: stage(name, cell, front) for name, (cell, front, _) in ENDS.items()}
    stages["sysexit0"], stages["well"] = stage("sysexit0", "import sys; sys.exit(0)", {}), stage("well", "pass", {})
    r = drive(project, use_case(project, stages), cold=cold)
    assert r["state"] == "failed" and states(r) == {**dict.fromkeys(ENDS, "failed"), "sysexit0": "made", "well": "made"}
    for name, (_, _, words) in ENDS.items():
        error = r["stages"][name]["error"]
        assert words in error["message"] and f"{name}, cell 5" in error["message"] and "the same command goes on" in error["message"], error["message"]
        nb = json.loads((Path(r["folder"]) / name / "notebook.ipynb").read_text())
        said = [o for c in nb["cells"] for o in c.get("outputs", [])]
        assert any("before" in "".join(o.get("text", "")) for o in said) and any(o["output_type"] == "error" for o in said), name
        assert [c["metadata"]["papermill"]["status"] for c in nb["cells"] if "n: int" not in "".join(c["source"]) and c["cell_type"] == "code" and "papermill-error" not in str(c["metadata"].get("tags"))][-1] == "failed"
    assert cold or {s["kernel"] for s in r["stages"].values()} == {"warm"}
    if not cold:
        for name in ("segfault", "exits"):
            peak = int(re.search(r"it had ([\d,]+) MB", r["stages"][name]["error"]["message"])[1].replace(",", ""))
            assert peak >= 100 if name == "segfault" else peak > 0
    assert artifacts(project).keys() == {"sysexit0/of_sysexit0", "well/of_well"} and nobody_left(project.folder)


@pytest.fixture
def cgroup():
    "A memory control group of 300 MB for one command, where one may be made."
    own = next((l.split(":", 2)[2] for l in Path("/proc/self/cgroup").read_text().splitlines() if l.split(":")[1] in ("", "memory")), None) if os.path.exists("/proc/self/cgroup") else None
    one = next((l.split(":", 2)[2] for l in Path("/proc/self/cgroup").read_text().splitlines() if l.split(":")[1] == "memory"), None) if own is not None else None
    for base, limit in ((f"/sys/fs/cgroup/memory{one}", "memory.limit_in_bytes"), (f"/sys/fs/cgroup{own}", "memory.max")):
        place = Path(base) / f"slml-test-{os.getpid()}"
        try:
            place.mkdir()
            (place / limit).write_text(str(300 << 20))
        except OSError:
            if place.is_dir(): place.rmdir()
            continue
        yield place
        until(lambda: not (place / "cgroup.procs").read_text().strip(), 10)
        place.rmdir()
        return
    pytest.skip("no memory control group can be made here")


@linux
def test_out_of_memory(project, cgroup):
    use = use_case(project, {"dig": notebook("dig", "", "ore", "n: int = 1", "print('before')\nblocks = []\nwhile True: blocks.append(b'x' * 10_000_000)"), "well": chain_stage()})
    r = subprocess.run(["sh", "-c", f'echo $$ > {cgroup}/cgroup.procs && exec "$@"', "sh", *program(use)], cwd=project.folder, env=project.environment(), capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr
    record = json.loads(r.stdout)
    assert states(record) == {"dig": "failed", "well": "made"}
    said = record["stages"]["dig"]["error"]["message"]
    assert "killed by SIGKILL, by the system's out-of-memory killer" in said and re.search(r"it had \d+ MB at its peak", said), said


def chain_stage(): return notebook("well", "", "of_well", "n: int = 1", HEAD.format(stage="well") + "stage.save('of_well', {})\nstage.done()")


# ---- many at once

def test_eight_at_once(project):
    "Eight runs of one set, started together: each stage is made once in all, and all end with the same."
    use = chain(project)
    found = [answer(p) for p in [start(project, use) for _ in range(8)]]
    assert {r["state"] for r in found} == {"done"} and len({r["run"] for r in found}) == 8
    assert counted(project) == collections.Counter({f"s{i} 1": 1 for i in range(6)})
    assert len({tuple(s["key"] for s in r["stages"].values()) for r in found}) == 1
    assert sum(s["state"] == "made" for r in found for s in r["stages"].values()) == 6
    assert len(artifacts(project)) == 6 and not project.left_behind()
    for r in found: check_round(project, r, 1)


def test_one_of_several_is_killed_with_its_claim(project):
    use = chain(project, nap=0.3)
    first = start(project, use)
    assert until(lambda: "s0 1" in counted(project))
    others = [start(project, use) for _ in range(2)]
    assert until(lambda: len(list(project.folder.glob("runs/mine/*/s0"))) == 3)
    first.kill(), first.communicate()
    for r in map(answer, others): check_round(project, r, 1)
    lost = {k: v - 1 for k, v in counted(project).items() if v > 1}
    assert sum(lost.values()) <= 1, lost  # the one that was being made
    assert len(artifacts(project)) == 6


@pytest.fixture(scope="module")
def s3():
    pytest.importorskip("moto.server")
    import boto3, logging
    from moto.server import ThreadedMotoServer
    from test_store_faults import Proxy
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port())  # S3's conditions are atomic; the proxy lets writes through one at a time
    env = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": proxy.url}
    boto3.client("s3", endpoint_url=proxy.url, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1").create_bucket(Bucket="rows")
    yield env
    proxy.shutdown(), server.stop()


def in_bucket(s3, prefix):
    import boto3
    client = boto3.client("s3", endpoint_url=s3["AWS_ENDPOINT_URL"], aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1")
    return sorted(o["Key"] for page in client.get_paginator("list_objects_v2").paginate(Bucket="rows", Prefix=prefix) for o in page.get("Contents", []))


@pytest.mark.parametrize("killed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["all-live", "one-killed"])
def test_several_on_one_bucket(project, s3, killed):
    "The machines share nothing but a prefix."
    prefix = "killed" if killed else "quiet"
    use = chain(project, 3, nap=0.3, store=f"s3://rows/{prefix}")
    env = {**s3, "SLML_TEST_BEAT": "0.5", "SLML_CACHE": str(project.folder / "cache")}
    first = start(project, use, env=env)
    if killed: assert until(lambda: "s0 1" in counted(project))
    others = [start(project, use, env=env) for _ in range(3)]
    if killed:
        assert until(lambda: len(list(project.folder.glob("runs/mine/*/s0"))) == 4)
        first.kill(), first.communicate()
    found = [answer(p) for p in ([] if killed else [first]) + others]
    assert {r["state"] for r in found} == {"done"} and len({tuple(s["key"] for s in r["stages"].values()) for r in found}) == 1
    assert sum((counted(project) - collections.Counter({f"s{i} 1": 1 for i in range(3)})).values()) <= killed
    records = [k for k in in_bucket(s3, prefix) if k.endswith("/made.json")]
    assert len(records) == 3 and not [k for k in in_bucket(s3, prefix) if k.endswith(".claim")]
    hashes = set()
    for r in found:
        made = [json.loads((Path(r["folder"]) / f"s{i}/made.json").read_text()) for i in range(3)]
        assert all(m["root"].startswith("s3://rows/") for m in made)
        hashes.add(tuple(a["sha256"] for m in made for a in m["artifacts"].values()))
    assert hashes == {tuple(hashlib.sha256(json.dumps([j + 1 for j in range(i + 1)], indent=1).encode()).hexdigest() for i in range(3))}


# ---- retries

def test_retries(project):
    "Twice it fails, then it works: the log says so, and the record counts."
    body = f"import os\nwith open(r'{project.folder}/tries', 'a') as f: f.write('x')\nassert os.path.getsize(r'{project.folder}/tries') > 2, 'not yet'\n" + HEAD.format(stage="dig") + "stage.save('ore', {})\nstage.done()"
    r = drive(project, use_case(project, {"dig": notebook("dig", "", "ore", "n: int = 1", body, retries=3, retry_after=0.1)}))
    assert states(r) == {"dig": "made"} and r["stages"]["dig"]["attempts"] == 3 and (project.folder / "tries").read_text() == "xxx"
    said = [l for e in r["events"] if e["type"] == "log" and e.get("stream") == "engine" for l in e["lines"]]
    assert len(said) == 2 and "AssertionError: not yet: tried again in 0.1 s (1 of 3)" in said[0] and "0.2 s (2 of 3)" in said[1]


def test_retries_are_not_endless(project):
    r = drive(project, use_case(project, {"dig": notebook("dig", "", "ore", "n: int = 1", "1 / 0", retries=2, retry_after=0.05)}))
    assert states(r) == {"dig": "failed"} and r["stages"]["dig"]["attempts"] == 3 and "tried 3 times" in r["stages"]["dig"]["error"]["message"]


# ---- memory

def spans(project):
    "When each stage was at work, on the one clock that all processes share."
    return {f.stem: tuple(map(float, f.read_text().split())) for f in project.folder.glob("*.span")}


def timed(project, name, takes="", nap=0.6, **front):
    body = f"import time\nbegan = time.monotonic()\n{takes}\ntime.sleep({nap})\nopen(r'{project.folder}/{name}.span', 'w').write(f'{{began}} {{time.monotonic()}}')\n"
    return notebook(name, "", f"of_{name}", "n: int = 1", body + HEAD.format(stage=name) + f"stage.save('of_{name}', {{}})\nstage.done()", **front)


def together(project, a, b):
    (a0, a1), (b0, b1) = spans(project)[a], spans(project)[b]
    return a0 < b1 and b0 < a1


def test_a_memory_budget(project):
    "What does not fit waits; what does goes on meanwhile; what is larger than all runs alone."
    stages = {n: timed(project, n, memory=m) for n, m in {"a": "300MB", "b": "300MB", "c": "100MB", "huge": "900MB"}.items()}
    r = drive(project, use_case(project, stages), memory="500MB", workers=4)
    assert r["state"] == "done"
    assert not together(project, "a", "b") and together(project, "a", "c")
    assert not any(together(project, "huge", n) for n in "abc")


@linux
def test_memory_is_learned(project):
    "Of a stage that is not known a worker's share is set aside; afterwards what it took."
    stages = {n: timed(project, n, "block = b'x' * 400_000_000", nap=0.8) for n in "ab"}
    use = use_case(project, stages)
    drive(project, use, memory="600MB", workers=2)
    assert together(project, "a", "b")
    r = drive(project, use, memory="600MB", workers=2, force=True)
    assert not together(project, "a", "b") and all(s["peak_mb"] > 380 for s in r["stages"].values())


def test_a_size_that_is_none(project):
    "Is told before anything runs, and the run is not left as running."
    code, out, err = project.slml("run", use_case(project, {"a": timed(project, "a", memory="much")}))
    assert code != 0 and "'much' is no size" in err and "memory: 2GB" in err and "Traceback" not in err, err
    assert {json.loads(f.read_text())["state"] for f in project.folder.glob("runs/mine/*/run.json")} <= {"failed"} and not spans(project)


# ---- secrets

PLANTED = {"PLANTED": "pl4nted-s3cr3t-0f-the-h0use", "QUOTED": 'pä"ss<w&rd>\'\\end', "LINES": "first-line-of-it\nsecond-line-of-it"}
TELLS = """
import json, sys, base64, html, os
from IPython.display import HTML, Image, display
for s in (key, quoted, lines):
    print(s); print('the key is ' + s + ', says the notebook', file=sys.stderr)
    print(s[:7], end='', flush=True); import time; time.sleep(.1); print(s[7:])
    print(s[:3], end=''); sys.stdout.flush(); os.write(1, b'')
    print(s[3:], repr(s), json.dumps(s), [s], {'key': s})
    display(s), display(HTML(f'<b title="{html.escape(s)}">{s}</b>')), display({'text/plain': s, 'application/json': {'deep': [s]}}, raw=True)
    os.system('echo "$PLANTED$QUOTED$LINES"')
    handle = display(s, display_id=True); handle.update('now ' + s)
    print('x' * 70000 + s + 'x' * 70000, end='')
    stage.metric(**{f'note_{len(s)}': s, 'n': 1}); stage.finding('the key is ' + s)
fig, ax = stage.axes()
ax.set_title(key); ax.set_xlabel(quoted)
stage.figure(fig, 'with the key ' + key)
import pandas as pd
stage.table_out(pd.DataFrame({'a': [key], quoted: [1]}), 'a table, ' + quoted)
pd.DataFrame({'a': [key]})
"""
SECRET_ENDS = {"well": "key", "error": "raise ValueError('bad ' + key + quoted)", "chained": "try: {}[key]\nexcept KeyError as e: raise RuntimeError(f'{quoted!r} and {lines}') from e",
               "dead": "import faulthandler, os\nprint(key, end='', flush=True); os.write(2, ('core: ' + key).encode()); os.kill(os.getpid(), 11)", "late": "#| timeout: 1\nprint(key, end='', flush=True)\nimport time; time.sleep(30)",
               "slml": "from slml_nb.core import SlmlError\nraise SlmlError('no door opens with ' + key, quoted, lines)"}


@pytest.mark.parametrize("cold", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["warm", "cold"])
def test_a_planted_secret_is_nowhere(project, cold):
    "A notebook tells it in every way there is, and ends in every way there is; then every byte that the run has left is searched."
    parameters = "key: str = ''\nquoted: str = ''\nlines: str = ''"
    stages = {n: notebook(n, "", f"of_{n}", parameters, HEAD.format(stage=n), TELLS, f"stage.save('of_{n}', {{}})\nstage.done()", end) for n, end in SECRET_ENDS.items()}
    use = use_case(project, stages)
    given = "".join(f"{n}: {{key: !env PLANTED, quoted: !env QUOTED, lines: !env LINES}}\n" for n in stages)
    project.write(use, (project.folder / use).read_text() + given)
    p = start(project, use, env=PLANTED, cold=cold)
    said = p.communicate(timeout=120)
    assert p.returncode == 0, said[1]
    r = json.loads(said[0])
    assert states(r) == {n: "made" if n == "well" else "failed" for n in stages}, {n: s.get("error", {}).get("message") for n, s in r["stages"].items()}
    files = {str(f): f.read_bytes() for f in project.folder.rglob("*") if f.is_file()}
    files |= {"what the program says": said[0].encode(), "its errors": said[1].encode()}
    if not cold:
        for more in ([], ["--json"]): files |= {f"slml run {more}": "".join(map(str, project.slml("run", use, *more, **PLANTED))).encode()}
        files |= {"slml runs": "".join(map(str, project.slml("runs", **PLANTED))).encode()}
        files |= {str(f): f.read_bytes() for f in project.folder.rglob("*") if f.is_file()}
        assert any(f.endswith("report.html") for f in files)
    assert {"run.json", "made.json", "key.json", "log.jsonl", "notebook.ipynb"} <= {Path(f).name for f in files}
    from slml_nb.engine import spellings
    for part in (p for s in PLANTED.values() for p in s.splitlines()):
        for form in spellings(part):
            found = [f for f, data in files.items() if form.encode() in data]
            assert not found, (form, found)
    log = next(data for f, data in files.items() if f.endswith("well/log.jsonl")).decode()
    assert "the key is ***, says the notebook" in log  # it was struck out, and the rest is there


# ---- a clock in an artifact

def lap(project):
    "A stage that times something, one that follows its conclusions, and one that tells the times."
    clocked = notebook("lap", "", "verdict", "rounds: int = 3  # timed", HEAD.format(stage="lap") + "import time; verdict = {'ms': time.monotonic_ns(), 'met': True, 'rounds': rounds}",
                       "stage.save('verdict', verdict, counts={'met': verdict['met']})\nstage.done()")
    plain = notebook("pack", "verdict", "pack", "n: int = 1", HEAD.format(stage="pack") + "v = stage.json('verdict')", "stage.save('pack', [v['met'], n])\nstage.done()")
    told = notebook("tell", "verdict, pack", "page", "n: int = 1", HEAD.format(stage="tell") + "v = stage.json('verdict')", "stage.save('page', v)\nstage.done()")
    return use_case(project, {"lap": clocked, "pack": plain, "tell": told})


def keys(record): return {s: v["key"] for s, v in record["stages"].items() if v["state"] != "skipped"}


def page(record):
    "What the last stage was told, and what the first one says."
    where = Path(record["folder"])
    read = lambda s, n: json.loads((where / s / json.loads((where / s / "made.json").read_text())["root"] / f"{n}.json").read_text())
    return read("tell", "page"), read("lap", "verdict")


def test_a_clocks_reading_is_in_no_key_and_never_stale(project):
    "Two stores that time for themselves have the same keys. One that loses the times makes again what told of them, under its key, and gc and verify agree."
    lap(project)
    one = drive(project)
    timed = page(one)
    shutil.move(project.folder / "runs/.store", project.folder / "elsewhere")
    two = drive(project)
    assert keys(one) == keys(two) and page(two) != timed
    assert set(states(two).values()) == {"made"} and page(two)[0] == page(two)[1]
    assert set(states(drive(project)).values()) == {"reused"}

    for file in (project.folder / "runs/.store").glob("*/*/*/verdict.json"): shutil.rmtree(file.parent)
    three = drive(project)
    assert states(three) == {"lap": "made", "pack": "made", "tell": "made"} and keys(three) == keys(one) and page(three)[0] == page(three)[1]
    assert three["stages"]["tell"]["why"] == "input verdict was timed again"
    assert set(states(drive(project)).values()) == {"reused"}

    longer = drive(project, overrides={"lap.rounds": 4})
    assert set(states(longer).values()) == {"made"} and not set(keys(longer).values()) & set(keys(three).values()) and page(longer)[0] == page(longer)[1]
    told = page(three)[0]
    again = drive(project, start="lap")
    assert set(states(again).values()) == {"made"} and keys(again) == keys(three) and page(again)[0] == page(again)[1]
    assert page(three)[0] == told != page(again)[0]  # what was made from the measurement before stays as it was
    from slml_nb.lineage import history
    graph = history(project.folder / "runs")
    assert all(len(graph["behind"][n["id"]]) == 2 for n in graph["nodes"].values() if n["type"] == "stage" and n["stage"] == "tell") and not graph["problems"]  # each from one verdict
    code, out, err = project.slml("verify", again["folder"])
    assert code == 0, out + err
    for _ in range(2):
        code, out, err = project.slml("gc", "--keep", "0h")
        assert code == 0, out + err
    assert set(states(drive(project)).values()) == {"reused"} and set(states(drive(project, overrides={"lap.rounds": 4})).values()) == {"reused"}
