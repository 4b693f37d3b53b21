"""Measures what the project promises, side by side with plain Papermill and Ploomber, and writes bench/results.md.

    make bench                      everything: about an hour and a half on two cores; run nothing beside it
    python bench/run.py --only start,demo --rounds 3
    python bench/run.py --only fleet,ladder --quick        does it still work? Tiny sizes, one round, results.md stays as it is
"""
import argparse, json, os, platform, shutil, statistics as st, subprocess, sys, tempfile, time
from datetime import datetime
from pathlib import Path

root = Path(__file__).resolve().parent.parent
bin = Path(sys.executable).parent
sys.path[:0] = [str(root), str(root / "bench")]
import automl, fleet, ladder, notebooks, onerow, serving, store, submit, train, trips


def clock(command, cwd=root, ok=(0, 3), **kw):
    "Seconds of one whole command; what it printed is kept for the message when it fails."
    start = time.perf_counter()
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, **kw)
    seconds = time.perf_counter() - start
    settle(cwd)
    if done.returncode not in ok: sys.exit(f"{' '.join(map(str, command))[:300]} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return seconds


def settle(place, most=30):
    "Wait until nothing runs in a folder any more, such as the tracking that goes on behind a run: it must not slow down what is measured next."
    end = time.time() + most
    while time.time() < end and any(_cwd(p).startswith(f"{place}") for p in os.listdir("/proc") if p.isdigit() and int(p) != os.getpid() and str(place) != str(root)): time.sleep(0.1)


def _cwd(pid):
    try: return os.readlink(f"/proc/{pid}/cwd")
    except OSError: return ""


def row(name, values, goal="", unit="s", digits=2, least=False):
    "One line of the table: median, min, max, and whether the goal is met; `least`: the goal is a minimum."
    values = sorted(values)
    median = st.median(values)
    met = "" if goal == "" else ("yes" if (median >= goal if least else median <= goal) else "**no**")
    bound = "" if goal == "" else f"{'≥' if least else '≤'} {goal}"
    return f"| {name} | {median:.{digits}f} | {values[0]:.{digits}f} | {values[-1]:.{digits}f} | {unit} | {len(values)} | {bound} | {met} |"


def pairs(name, peer, house, goal=""):
    "How many times faster, pair by pair."
    return row(f"{name}, pair by pair", [p / h for p, h in zip(peer, house)], goal, "×", least=True)


HEAD = "| what | median | min | max | unit | runs | goal | met |\n| --- | --- | --- | --- | --- | --- | --- | --- |"


def project():
    "An empty project with the parameter sets."
    place = Path(tempfile.mkdtemp(prefix="slml_bench_"))
    shutil.copytree(root / "params", place / "params")
    return place


def start(rounds):
    "What one waits for before anything happens."
    imports = [clock([bin / "python", "-c", "import slml_nb"]) for _ in range(rounds)]
    bare = [clock([bin / "python", "-c", "pass"]) for _ in range(rounds)]
    helps = [clock([bin / "slml", "--help"]) for _ in range(rounds)]
    papers = [clock([bin / "papermill", "--help"]) for _ in range(rounds)]
    return [row("`import slml_nb`, whole process", imports, 0.3), row("(the same process, `pass`)", bare), row("`slml --help`", helps, 0.5), row("peer: `papermill --help`", papers)]


def demo(rounds, params="flights"):
    "The demo, and the same notebooks by the plain papermill command, in turn."
    first, plain, outside, idle, shares = [], [], [], [], {}
    for _ in range(rounds):
        place = project()
        first.append(clock([bin / "slml", "run", f"params/{params}.yaml"], place))
        file = next(place.glob("runs/*/*/run.json"))
        record = json.loads(file.read_text())
        outside += [s["outside"] for s in record["stages"].values() if "outside" in s]
        idle.append(1 - busy(file.parent) / first[-1])
        plain.append(papermill(record, place))
        service = json.loads(next(place.glob("runs/.store/**/service.json")).read_text())
        for k, v in service.items():
            if isinstance(v, (int, float)): shares.setdefault(k, []).append(v)
        for k, v in (service.get("share") or {}).items(): shares.setdefault(f"share of {k}", []).append(v)
        shutil.rmtree(place, ignore_errors=True)
    rows = [row(f"`slml run params/{params}.yaml`, nothing there yet", first, 45),
            row("share of it in which no cell of any stage was running", idle, 0.1, "fraction"),
            row("a stage outside its own cells (kernel, saving, store)", outside),
            row("peer: the same twelve notebooks, `papermill` one after the other", plain), pairs("papermill / slml", plain, first)]
    rows += [row("one `/predict` over loopback, p50", shares["p50_ms"], 3, "ms"), row("one `/predict` over loopback, p99", shares["p99_ms"], unit="ms")]
    return rows + [row(k, v, unit="fraction") for k, v in shares.items() if k.startswith("share of")]


def busy(run):
    "Seconds of a run in which at least one cell was running, by the times that its notebooks keep."
    spans, total, end = [], 0, 0
    for book in run.glob("*/notebook.ipynb"):
        for c in json.loads(book.read_text())["cells"]:
            times = c["metadata"].get("papermill", {})
            if c["cell_type"] == "code" and times.get("start_time") and times.get("end_time"):
                spans.append([datetime.fromisoformat(times[k]).timestamp() for k in ("start_time", "end_time")])
    for a, b in sorted(spans):
        total += max(0, b - max(a, end))
        end = max(end, b)
    return total


def papermill(record, place):
    "Seconds of all stages by hand: the same notebooks and parameters, Papermill's own engine and command."
    from slml_nb.stage import shipped_notebooks
    run, books = place / "by_hand", shipped_notebooks()
    run.mkdir()
    total = 0
    for stage in record["order"]:
        values = {**record["parameters"][stage], "run": str(run)}
        total += clock([bin / "papermill", books[stage], place / f"{stage}.ipynb", "-y", json.dumps(values), "--no-progress-bar"], place)
    return total


def twelve(extra=""):
    "An empty project with the twelve short notebooks."
    from slml_nb.stage import shipped_notebooks
    place = Path(tempfile.mkdtemp(prefix="slml_bench_"))
    return place, notebooks.ours(place, shipped_notebooks(), extra)


def lifecycle(rounds):
    "Twelve short notebooks in a graph, each way, in turn."
    lean, times = notebooks.peer("lean"), {}
    notebooks.peer("ploomber")
    for _ in range(rounds):
        place, params = twelve()
        for way in ("slml", "pool", "ploomber", "papermill, lean", "papermill beside jupyterlab"): times.setdefault(way, []).append(_lifecycle(way, place, params, lean))
        answers = {json.loads(f.read_text())["mean"] for f in (place / "pool/n12.json", place / "ploomber/out/n12.json", *place.glob("runs/.store/**/from_n12.json"))}
        if len(answers) != 1: sys.exit(f"the ways do not agree: {answers}")
        shutil.rmtree(place, ignore_errors=True)
    t = times.__getitem__
    return [row("`slml run`, two workers, nothing there yet", t("slml")), row("peer: `papermill`, one after the other, lean environment", t("papermill, lean")),
            row("peer: `papermill`, one after the other, beside jupyterlab", t("papermill beside jupyterlab")), row("peer: `ploomber build`, parallel executor, two workers", t("ploomber")),
            row("peer: `papermill.execute_notebook` in a pool of two processes", t("pool")), pairs("papermill (lean) / slml", t("papermill, lean"), t("slml"), 15),
            pairs("papermill (beside jupyterlab) / slml", t("papermill beside jupyterlab"), t("slml")), pairs("ploomber / slml", t("ploomber"), t("slml"), 8), pairs("pool / slml", t("pool"), t("slml"))]


def _lifecycle(way, place, params, lean):
    "Seconds of one way."
    if way == "slml": return clock([bin / "slml", "run", params, "--workers", "2"], place, ok=(0,))
    folder = place / way.split(",")[0].replace(" ", "_")
    if way == "ploomber":
        notebooks.ploomber(folder)
        own = notebooks.peer("ploomber")
        return clock([own / "ploomber", "build", "--force"], folder, ok=(0,), env={**os.environ, "PLOOMBER_STATS_ENABLED": "false", "PATH": f"{own}:{os.environ['PATH']}"})
    notebooks.plain(folder)
    if way == "pool":
        (folder / "pool.py").write_text(notebooks.POOL)
        return clock([lean / "python", "pool.py", json.dumps(notebooks.TWELVE)], folder, ok=(0,))
    command = (lean if "lean" in way else bin) / "papermill"
    return sum(clock([command, f"{n}.ipynb", f"{n}.out.ipynb", "--no-progress-bar"], folder, ok=(0,)) for n in notebooks.TWELVE)


def cells_of(n):
    "A notebook of n trivial cells."
    return notebooks.notebook(*[f"x = {i}\nprint(x)\nx * 2" for i in range(n)])


def one(rounds, n=20):
    "One notebook: from a cold shell, and in a process that has run one before."
    lean, place = notebooks.peer("lean"), Path(tempfile.mkdtemp(prefix="slml_bench_"))
    (place / "in.ipynb").write_text(cells_of(n))
    cold, thin, thick = [], [], []
    for _ in range(rounds):
        cold.append(clock([bin / "slml", "exec", "in.ipynb", "out.ipynb"], place, ok=(0,)))
        thin.append(clock([lean / "papermill", "in.ipynb", "p.ipynb", "--no-progress-bar"], place, ok=(0,)))
        thick.append(clock([bin / "papermill", "in.ipynb", "p.ipynb", "--no-progress-bar"], place, ok=(0,)))
    warm, peer = in_turn(rounds, place, place / "o.ipynb")
    shutil.rmtree(place, ignore_errors=True)
    return [row(f"`slml exec`, {n} cells, from a cold shell", cold), row("peer: `papermill`, lean environment", thin), row("peer: `papermill`, beside jupyterlab", thick),
            pairs("papermill (lean) / slml", thin, cold, 6), pairs("papermill (beside jupyterlab) / slml", thick, cold),
            row("`run_notebook`, warm, in one process", warm, digits=3), row("peer: `papermill.execute_notebook`, in one process", peer, digits=3), pairs("papermill / slml, warm", peer, warm, 20)]


def in_turn(rounds, place, output):
    "Seconds of in.ipynb in this process, here and by Papermill, after one of each that does not count."
    import papermill as pm
    from slml_nb.run import Kernels, run_notebook
    source, mine, theirs = json.loads((place / "in.ipynb").read_text()), [], []
    with Kernels() as kernels:
        for _ in range(rounds + 1):
            start = time.perf_counter()
            meter = run_notebook(source, output, {}, kernels, cwd=place)
            mine.append(time.perf_counter() - start)
            if "failed" in meter or meter["kernel"] != "warm": sys.exit(f"not as it should be: {meter}")
            start = time.perf_counter()
            pm.execute_notebook(place / "in.ipynb", output, progress_bar=False)
            theirs.append(time.perf_counter() - start)
            time.sleep(3 if len(mine) == 1 else 0)  # the template goes on importing while the first kernel runs
    return mine[1:], theirs[1:]


HEAVY = "import torch, pandas, sklearn.linear_model"


def warm(rounds):
    "From asking for a kernel to the end of its first cell, which needs heavy libraries."
    from jupyter_client.manager import start_new_kernel
    from slml_nb.kernel import WarmKernels
    mine, theirs = [], []
    with WarmKernels() as kernels:
        for i in range(rounds + 1):
            start = time.perf_counter()
            kernel, said = kernels.start(), []
            done = kernel.execute(HEAVY, said.append)
            mine.append(time.perf_counter() - start)
            if done["status"] != "ok": sys.exit(f"not as it should be: {said}")
            kernel.stop()
            if not i: continue
            start = time.perf_counter()
            manager, client = start_new_kernel(kernel_name="python3")
            client.execute_interactive(HEAVY)
            theirs.append(time.perf_counter() - start)
            client.stop_channels(), manager.shutdown_kernel(now=True)
    return [row("a warm kernel, to the end of its first cell", mine[1:], 0.2, digits=3), row("(the first of all: the template is still importing)", mine[:1]),
            row("peer: ipykernel, the same", theirs), pairs("ipykernel / warm", theirs, mine[1:])]


def cells(rounds, n=200):
    "What saving costs: many trivial cells, saved and not."
    place = Path(tempfile.mkdtemp(prefix="slml_bench_"))
    (place / "in.ipynb").write_text(cells_of(n))
    (bare, peer_bare), (saved, peer) = zip(*[[v[0] for v in in_turn(1, place, None)] for _ in range(rounds)]), zip(*[[v[0] for v in in_turn(1, place, place / "o.ipynb")] for _ in range(rounds)])
    shutil.rmtree(place, ignore_errors=True)
    return [row(f"{n} trivial cells, saved", saved, digits=3), row("the same, not saved", bare, digits=3), row("saved / not saved, pair by pair", [a / b for a, b in zip(saved, bare)], 1.3, "×"),
            row("peer: papermill, saved", peer), row("peer: papermill, not saved", peer_bare), row("papermill: saved / not saved, pair by pair", [a / b for a, b in zip(peer, peer_bare)], unit="×")]


def again(rounds, params="flights"):
    "The same command when nothing has changed."
    place = project()
    clock([bin / "slml", "run", f"params/{params}.yaml"], place)
    times = [clock([bin / "slml", "run", f"params/{params}.yaml"], place) for _ in range(max(5, rounds))]
    states = {s["state"] for s in json.loads(max(place.glob("runs/*/*/run.json"), key=os.path.getmtime).read_text())["stages"].values()}
    shutil.rmtree(place, ignore_errors=True)
    if states != {"reused"}: sys.exit(f"not everything was reused: {states}")
    return [row(f"`slml run params/{params}.yaml`, nothing changed", times, 1)]


def sweep(rounds, points=100, sample=5):
    "Many points that share all but the last stage, against as many plain runs."
    swept, single = [], []
    for _ in range(rounds):
        place, params = twelve(f"matrix:\n  n12.factor: {list(range(2, points + 2))}\n")
        swept.append(clock([bin / "slml", "run", params], place))
        runs = [json.loads(f.read_text()) for f in place.glob("runs/twelve/*/run.json")]
        made = [p for r in runs for p in r.get("points", []) if p.get("state") in ("done", "made", "reused")]
        shutil.rmtree(place, ignore_errors=True)
        if len(made) != points: sys.exit(f"{len(made)} of {points} points")
        for i in range(sample):
            place, params = twelve()
            single.append(clock([bin / "slml", "run", params, "-p", f"n12.factor={i + 2}"], place))
            shutil.rmtree(place, ignore_errors=True)
    plain = [points * st.mean(single[i * sample:(i + 1) * sample]) for i in range(rounds)]
    return [row(f"a sweep of {points} points over the last of twelve stages", swept), row("one plain run, nothing there yet", single),
            row(f"{points} plain runs (the mean of {sample}, times {points})", plain), pairs("plain runs / sweep", plain, swept, 5)]


def memory(rounds):
    "The most memory that the runner itself ever had (VmHWM), while it runs the twelve notebooks."
    peaks = []
    for _ in range(rounds):
        place, params = twelve()
        p, peak = subprocess.Popen([bin / "slml", "run", params], cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
        while p.poll() is None:
            found = [int(l.split()[1]) / 1024 for l in _lines(f"/proc/{p.pid}/status") if l.startswith("VmHWM")]
            peak = max([peak, *found])
            time.sleep(0.01)
        if p.returncode: sys.exit(f"slml run ended with {p.returncode}")
        peaks.append(peak)
        shutil.rmtree(place, ignore_errors=True)
    return [row("`slml run` of the twelve notebooks, the runner's own process", peaks, 150, "MB", 0)]


def _lines(file):
    try: return Path(file).read_text().splitlines()
    except OSError: return []


def prepare(rounds, rows=20_000_000):
    "CSV to Parquet with rules, features and a sample, here and by the peers, in turn; then four times the rows."
    place = Path(tempfile.mkdtemp(prefix="slml_bench_"))
    trips.make(place / "trips.csv", rows)
    trips.make(place / "more.csv", 4 * rows)
    got = {job: [] for job in (*trips.JOBS, "more")}
    for _ in range(rounds):
        for job in trips.JOBS: got[job].append(trips.measure(job, place / "trips.csv", place / f"{job}.parquet"))
        got["more"].append(trips.measure("slml", place / "more.csv", place / "more.parquet"))
    left = {job: {g[2] for g in all} for job, all in got.items()}
    if left["slml"] != left["duckdb"] or left["slml"] != left["pyspark"] or len(left["slml"]) != 1: sys.exit(f"the ways do not agree: {left}")
    size = (place / "trips.csv").stat().st_size / 2**30
    shutil.rmtree(place, ignore_errors=True)
    s, mb = ({job: [g[i] for g in all] for job, all in got.items()} for i in (0, 1))
    ratio = lambda name, a, b, goal, least, which=s: row(name, [x / y for x, y in zip(which[a], which[b])], goal, "×", least=least)
    names = {"slml": f"`prepare`, {rows:,} rows, {size:.1f} GB of CSV", "typed_scan": "peer: DuckDB only reads every column, typed", "duckdb": "peer: DuckDB by hand", "polars": "peer: Polars, streaming (its own hash)",
             "pandas_arrow": "peer: pandas, Arrow reader (its own hash)", "pandas_c": "peer: pandas, C reader (its own hash)", "pyspark": "peer: PySpark, local[2]", "more": f"`prepare`, {4 * rows:,} rows"}
    return ([row(names[j], s[j]) for j in names] + [row(f"peak memory, {names[j]}", mb[j], 400 if j in ("slml", "more") else "", "MB", 0) for j in names]
            + [row("`prepare`, million rows a second", [rows / 1e6 / t for t in s["slml"]], unit="M rows/s"), ratio("prepare / typed scan, pair by pair", "slml", "typed_scan", 2, False), ratio("prepare / DuckDB by hand, pair by pair", "slml", "duckdb", "", False),
               ratio("prepare / Polars, pair by pair", "slml", "polars", 1.3, False), ratio("pandas (Arrow) / prepare, pair by pair", "pandas_arrow", "slml", 3, True), ratio("pandas (C) / prepare, pair by pair", "pandas_c", "slml", 5, True),
               ratio("PySpark / prepare, pair by pair", "pyspark", "slml", 5, True), ratio("four times the rows: time", "more", "slml", 4.4, False), ratio("four times the rows: peak memory", "more", "slml", 1.1, False, mb)])


def one_row(rounds):
    "The features of one flight, compiled to Python, beside the same SQL in DuckDB; each number is the median of thousands of calls."
    got = [onerow.measure() for _ in range(rounds)]
    us = {way: [g[way]["median_us"] for g in got] for way in ("compiled, request read", "compiled", "DuckDB, request read", "DuckDB")}
    what = f"{got[0]['features']} features of {got[0]['fields']} fields"
    return [row(f"{what}, from the request as JSON gives it", us["compiled, request read"], 30, "µs", 1), row("the same, its values read already", us["compiled"], 30, "µs", 1),
            row("peer: DuckDB, planned once, from the request", us["DuckDB, request read"], unit="µs", digits=0), row("peer: DuckDB, its values read already", us["DuckDB"], unit="µs", digits=0),
            pairs("DuckDB / compiled, from the request", us["DuckDB, request read"], us["compiled, request read"])]


def training(rounds, seeds=True):
    "Rows a second of one network, fed in several ways; each number of a round is the median of a few passes in a process of its own."
    got = [train.measure() for _ in range(rounds)]
    rate = lambda way: [g[way] / 1e6 for g in got]
    million = lambda name, way: row(name, rate(way), unit="M rows/s")
    ratio = lambda name, a, b, goal: row(f"{name}, pair by pair", [x / y for x, y in zip(rate(a), rate(b))], goal, "×", least=True)
    there = all("lightning" in g for g in got)
    gone = "| peer: Lightning could not be installed on this machine | | | | | | ≥ 1.35 | not measured |"
    with tempfile.TemporaryDirectory(prefix="slml_bench_") as place:
        train.make(f"{place}/rows.parquet")
        r2 = train.alone("quality", f"{place}/rows.parquet") if seeds else {}
    return [million("training from Parquet, in memory, shuffled", "ours"), million("the same, streamed", "streamed"), million("peer: the same loop, fed contiguous tensors", "ceiling"),
            million("peer: the same loop, fed by `DataLoader(TensorDataset)`", "dataloader"), million("peer: Lightning, fed the same batches", "lightning") if there else gone,
            ratio("in memory / contiguous tensors", "ours", "ceiling", 0.92), ratio("in memory / DataLoader", "ours", "dataloader", 5.5), *([ratio("in memory / Lightning", "ours", "lightning", 1.35)] if there else []),
            million("8,192 rows a step, fp32", "fp32, 8,192 rows a step"), million("8,192 rows a step, bf16", "bf16, 8,192 rows a step"), ratio("bf16 / fp32", "bf16, 8,192 rows a step", "fp32, 8,192 rows a step", 2.2),
            *([row("R² on new rows, fp32, a few seeds", r2["fp32"], unit="", digits=4), row("the same, bf16", r2["bf16"], round(min(r2["fp32"]), 4), "", 4, least=True)] if r2 else []), row("from Parquet to tensors", [g["seconds to load"] for g in got])]


def fleets(rounds, **size):
    "Many small models together, beside one by one; and the curve over their number."
    got = fleet.measure(rounds=rounds, **size)
    n, lines = got["models"], []
    for kind, name, goal in (("ridge", f"{n} weighted sums of {fleet.ROWS:,} rows × {fleet.INPUTS}", 15), ("ridge_200_rows", f"{n} weighted sums of 200 rows × {fleet.INPUTS}", 15), ("mlp", f"{n} networks of {fleet.UNITS} units × {fleet.EPOCHS} passes", 10)):
        of = {way: g["seconds"] for way, g in got[kind].items()}
        lines += [row(f"{name}, together", of["together"], digits=3), *(row(f"peer: {way}" + ("" if way == "joblib" else ", one by one"), t, digits=3) for way, t in of.items() if way != "together"),
                  *(pairs(f"{way} / together", t, of["together"], goal if way == "scikit-learn" else "") for way, t in of.items() if way != "together"),
                  row("R² on new rows, together", [got[kind]["together"]["r2"]], got[kind]["scikit-learn"]["r2"], "", 4, least=True)]
    lines.append(row("R² of scikit-learn's networks with our learning rate", [got["r2_our_rate"]], unit="", digits=4))
    for m, part in got["curve"].items():
        for kind, name in (("ridge", "weighted sums"), ("mlp", "networks")):
            together, single = (part[kind][way]["seconds"] for way in ("together", "scikit-learn"))
            lines += [row(f"{m} {name}, together", together, digits=3), pairs(f"{m} {name}, scikit-learn / together", single, together)]
    fleet.draw(got["curve"], pictures / "fleet.svg")
    return [*lines, "", "![Seconds over the number of models](fleet.svg)"]


def automls(rounds, seconds=9, **size):
    "AutoML beside FLAML in the same seconds and LightGBM as it comes: each round with another seed."
    ways = ("slml", "flaml", "lightgbm as it comes")
    got = [{(g["table"], g["way"]): g for g in automl.measure(seconds, ways=ways, seed=i, **size)} for i in range(rounds)]
    lines = []
    for table in dict.fromkeys(t for t, _ in got[0]):
        of = {way: [g[table, way] for g in got] for way in ways}
        error, metric = {way: [g["error"] for g in gs] for way, gs in of.items()}, of["slml"][0]["metric"]
        name = {"slml": f"{table}, {of['slml'][0]['rows']:,} rows: AutoML, {seconds:g} s", "flaml": f"peer: FLAML, {seconds:g} s", "lightgbm as it comes": "peer: LightGBM as it comes"}
        lines += [row(name[way], error[way], unit=metric, digits=4) for way in ways] + [row(f"error of {w} / error of AutoML, pair by pair", [a / b for a, b in zip(error[w], error["slml"])], unit="×", digits=3) for w in ways[1:]]
        lines += [row(f"seconds of {way}", [g["seconds"] for g in of[way]]) for way in ways]
    return lines


def rungs(_, **size):
    "Every rung on three real tables: one run each, the intervals resample its days."
    return [line for title, lines in ladder.measure(**size).items() for line in (f"### {title}", "", ladder.HEAD, *lines, "")]


def served(rounds, **size):
    "One package everywhere: over HTTP beside MLflow and BentoML, in process, as a function, over a file, under load."
    return serving.tables(serving.measure(rounds, **size), row, pairs)


def stored(rounds, **size):
    "A large artifact to a bucket and back, beside boto3's own transfer."
    got, lines = store.measure(rounds, **size), []
    for kind, name in (("moto", "moto"), ("plain", "a server that does next to nothing")):
        of = {way: [g for g in got if (g["server"], g["way"]) == (kind, way)] for way in store.WAYS}
        for where in ("up", "down"):
            lines += [row(f"{name}, {where}: " + {"slml": "the store" + (", hashed" if where == "down" else "")}.get(way, f"peer: {way}"), [g[where] for g in of[way]], unit="MB/s", digits=0) for way in store.WAYS]
            lines += [row(f"{name}, {where}: the store / {way}, pair by pair", [a[where] / b[where] for a, b in zip(of["slml"], of[way])], 0.9, "×", least=True) for way in store.WAYS[1:]]
        lines += [row(f"{name}: most memory of {'the store' if way == 'slml' else way}", [g["peak_mb"] for g in of[way]], 200 if way == "slml" else "", "MB", 0) for way in store.WAYS]
    return lines


def submitted(rounds):
    "A stage sent away as a job: what is ours, beside the calls to AWS."
    jobs = submit.measure(rounds)
    first = [j for j in jobs if j["first"]]
    return [row("a job of a run that has sent one already: our own time", [j["own_s"] for j in jobs if not j["first"]], 2, "s"),
            row("the calls to AWS (here to moto)", [j["api_s"] for j in jobs if not j["first"]], unit="s"),
            row("the first job of a run, on a machine that has sent one before: our own time", [j["own_s"] for j in first if j["form"]], 2, "s"),
            row("the first job that a machine ever sends (SageMaker's SDK is asked beside): our own time", [j["own_s"] for j in first if not j["form"]], unit="s")]


SECTIONS = {"start": (start, "Before anything happens"), "lifecycle": (lifecycle, "Twelve short notebooks that import pandas"), "one": (one, "One notebook of 20 cells"),
            "warm": (warm, "A warm kernel: torch, pandas, scikit-learn"), "cells": (cells, "200 trivial cells"), "again": (again, "Nothing changed"),
            "sweep": (sweep, "A sweep"), "memory": (memory, "Memory of the runner"), "prepare": (prepare, "From CSV to features in one pass"), "onerow": (one_row, "One row of features"),
            "train": (training, "Training: an MLP 20-128-128-1, 1,024 rows a step"), "fleet": (fleets, "A fleet: many small models together"), "automl": (automls, "AutoML, in the same time"),
            "ladder": (rungs, "The ladder on three real tables"), "serving": (served, "Serving: 200 trees on the flights, everywhere"),
            "store": (stored, "1 GB to a bucket and back"), "submit": (submitted, "A stage sent away as a job"), "demo": (demo, "The demo: 336,776 flights, twelve notebooks")}

BARE = ("ladder", "serving")  # sections that bring the heads of their tables
QUICK = {"lifecycle": {}, "one": {"n": 5}, "cells": {"n": 20}, "again": {"params": "sample"}, "sweep": {"points": 4, "sample": 1}, "prepare": {"rows": 200_000}, "demo": {"params": "sample"},
         "train": {"seeds": False}, "fleet": {"models": 8, "curve": (2, 8)}, "automl": {"seconds": 3, "rows": 1500}, "ladder": {"tables": ("sample", "chicago_taxi"), "seconds": 5}, "serving": serving.TINY, "store": {"megabytes": 64}}  # sizes of --quick
pictures = root / "bench"  # folder of the drawings


def machine():
    memory = next((int(l.split()[1]) // 2**20 for l in open("/proc/meminfo") if l.startswith("MemTotal")), 0)
    model = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores ({model}), {memory} GB, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=0, help="5; with --quick 1")
    p.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; nothing is written to results.md")
    p.add_argument("--only", default=",".join(SECTIONS))
    p.add_argument("--out", default="")
    a = p.parse_args()
    global pictures
    out = Path(a.out or (Path(tempfile.mkdtemp(prefix="slml_bench_")) if a.quick else root / "bench") / "results.md")
    pictures = out.resolve().parent
    sections = sections_of(out)
    for name in a.only.split(","):
        measure, title = SECTIONS[name]
        lines = measure(a.rounds or (1 if a.quick else 5), **(QUICK.get(name, {}) if a.quick else {}))
        sections[title] = f"*{machine()}*\n\n" + ("" if name in BARE else f"{HEAD}\n") + "\n".join(lines).strip()
        print(f"## {title}\n\n{sections[title]}", flush=True)
        write(out, sections)
    if a.quick: print(f"\n{out}")


def sections_of(out) -> dict:  # title -> text
    "What an earlier bench has written: a section that is not measured now stays as it was."
    parts = out.read_text().split("\n## ")[1:] if out.exists() else []
    return {title: text.strip() for title, _, text in (part.partition("\n") for part in parts)}


def write(out, sections):
    "All sections in their order, and how to read them."
    text = ["# Figures\n\nMeasured by `make bench`, each section on the machine and the day that it names.\nMedians with minimum and maximum; the machines are shared and noisy, so the ratios say more than the seconds."]
    text += [f"## {title}\n\n{sections[title]}" for _, title in SECTIONS.values() if title in sections]
    out.write_text("\n\n".join([*text, (root / "bench" / "notes.md").read_text().strip()]) + "\n")


if __name__ == "__main__": main()
