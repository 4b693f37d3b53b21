"""What serving costs: our server beside MLflow's and BentoML's with the same trees, one row in process, a Lambda function, a file of ten million rows, rising load, and variants that change under load.

Everybody answers for the same model: 200 boosted trees of LightGBM, 31 leaves each, trained here on the flights. What a way does beside that:

- ours: `slml serve PACKAGE` gets the fields of a flight as an airline has them, checks each, computes 20 features (some are looked up), predicts, and says where the time went;
- MLflow and BentoML get the 20 features ready, as numbers: they neither check nor compute any;
- floor: uvicorn with an application that says the same sentence to everybody.

    python bench/serving.py                tiny, once, as JSON
    python bench/serving.py http one       these parts alone (http, one, lambda, file, large file, steps, swaps)
    python bench/serving.py --whole http   in the sizes that count, on the flights
"""
import asyncio, contextlib, http.client, itertools, json, math, os, re, shutil, signal, socket, statistics as st, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

here = Path(__file__).resolve().parent
root = here.parent
bin = Path(sys.executable).parent
sys.path[:0] = [str(root), str(here)]
import notebooks

TREES, LEAVES = 200, 31
ENV = {**{k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "SLML_TRACKING": "off", "MLFLOW_DISABLE_TELEMETRY": "true", "BENTOML_DO_NOT_TRACK": "True", "PYTHONPATH": str(root)}
WEATHER = ("temp", "wind_dir", "wind_speed", "precip", "pressure", "visib")
notebooks.PEERS["bento"] = ["bentoml==1.4.39", "lightgbm==4.7.0", "scikit-learn==1.9.1"]


def said(command, cwd, env=ENV) -> str:
    "What a command prints, run to its end."
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 3): sys.exit(f"{' '.join(map(str, command))[:300]} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def seconds_of(command, cwd, env=ENV) -> float:
    "How long it takes, from its start to its end."
    start = time.perf_counter()
    said(command, cwd, env)
    return time.perf_counter() - start


# What is served

def artifacts(place: Path, params: str) -> dict:  # name -> path
    "What the parameter set has made as far as its network; `sample`: what is built in."
    from slml_nb.stage import made_in, sample_folder
    run = sample_folder()
    if params != "sample":
        shutil.copytree(root / "params", place / "params")
        said([bin / "slml", "run", f"params/{params}.yaml", "--to", "train", "--climb", "-p", "train.epochs=1"], place)
        run = next(place.glob(f"runs/{params}/*/run.json")).parent
    return {n: Path(a["root"]) / a["file"] for n, a in made_in(run).items()}


def learn(place: Path, there: dict, trees=TREES):
    "Three packages (a weighted sum, trees, a network), the trees in LightGBM's own words, and every row with its features ready."
    import duckdb
    from slml_nb.baseline import boost, fit_linear, tree_parameters
    from slml_nb.model import Encoder, fit_encoding, kinds_of, read_split, save_trees
    from slml_nb.sql import connect, register
    con, recipe = connect(), json.loads((there["recipe"] / "recipe.json").read_text())
    register(con, "features", str(there["features"]))
    train, kinds = read_split(con, "train", recipe["classes"], learn=True), kinds_of(recipe)
    spec = {"task": "regression", "target": recipe["target"], "classes": [], "features": list(kinds), "encoding": fit_encoding(train[0], kinds, 100), "trained": {"rows": len(train[1])}}
    encoder = Encoder(spec["encoding"])
    x, codes = encoder.raw(train[0]), list(range(len(encoder.names), len(encoder.features)))
    booster, _ = boost(x, train[1], None, tree_parameters("regression", [], "l1", *x.shape, num_leaves=LEAVES, learning_rate=0.1, seed=0), codes, "l1", trees)
    (place / "lightgbm.txt").write_text(booster.model_to_string())
    save_trees(place / "models/trees", spec, booster.model_to_string())
    fit_linear(place / "models/linear", spec, train, "mae")
    shutil.copytree(next(there["network"].glob("**/model.onnx")).parent, place / "models/onnx")
    for name in ("linear", "trees", "onnx"): packaged(place / "packages" / name, place / "models" / name, there)
    return encoder, x, train[1]


def packaged(folder: Path, model: Path, there: dict):
    "A package of a model."
    from slml_nb.package import write_package
    verdict = {"candidate": None, "best": model.name, "metric": "mae", "sentence": "Made to be measured.", "requirements": [], "candidates": [], "rows_test": 0}
    folder.mkdir(parents=True)
    write_package(folder, model, there["recipe"], json.loads(there["problem"].read_text()), verdict)


def asking(place: Path, there: dict, encoder, n=500):
    "Some flights as bodies for us, and the same with their features ready as bodies for the peers; both must say the same."
    import duckdb, lightgbm, numpy as np
    from slml_nb.package import load_package
    predictor = load_package(place / "packages/trees")
    con = duckdb.connect()
    got = con.execute(f"select * exclude (row_id) from '{there['recipe']}/requests.parquet' using sample reservoir({n} rows) repeatable (0)")
    requests = [{d[0]: v for d, v in zip(got.description, r) if v is not None} for r in got.fetchall()]
    requests = [json.loads(json.dumps(r, default=str)) for r in requests]
    x = encoder.raw(predictor.function.rows(requests))
    whole = ~np.isnan(x).any(axis=1)  # JSON knows no NaN
    requests, x = [r for r, w in zip(requests, whole) if w], x[whole]
    ours, theirs = [a["prediction"] for a in predictor.predict(requests)], lightgbm.Booster(model_file=str(place / "lightgbm.txt")).predict(x)
    if not np.allclose(ours, theirs, rtol=1e-6): sys.exit("the package and LightGBM do not say the same")
    return requests, x.tolist(), ours


# Who is asked, and by what

def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def server(name, command, cwd, healthy, env=ENV, wait=90):
    "A server as its user starts it, for the length of a block; PORT in its command stands for the port that it yields."
    import psutil
    port, log = free_port(), open(Path(cwd) / f"{name}.log", "w+")
    p = subprocess.Popen([str(c).replace("PORT", str(port)) for c in command], cwd=cwd, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.time() + wait
        while not _well(port, healthy):
            if p.poll() is not None or time.time() > end: sys.exit(f"{name} did not start\n{(Path(cwd) / f'{name}.log').read_text()[-3000:]}")
            time.sleep(0.1)
        yield port
    finally:
        family = [*psutil.Process(p.pid).children(recursive=True)] if p.poll() is None else []
        p.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired): p.wait(10)
        for child in family:
            with contextlib.suppress(psutil.Error): child.kill()
        if p.poll() is None: p.kill()
        p.wait()
        log.close()


def _well(port, path):
    try: return ask(port, "GET", path)[0] == 200
    except (OSError, http.client.HTTPException): return False


def ask(port, method, path, body=None):
    "Status and text of one request."
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        c.request(method, path, body, {"Content-Type": "application/json"})
        r = c.getresponse()
        return r.status, r.read().decode()
    finally: c.close()


FLOOR = '''
import sys, uvicorn
start, end = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json"), (b"content-length", b"20")]}, {"type": "http.response.body", "body": b'{"prediction": 12.34}'[:20]}
async def app(scope, receive, send):
    if scope["type"] != "http": return
    await receive()
    await send(start)
    await send(end)
uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False, lifespan="off")
'''

BENTO = '''
import bentoml, lightgbm, numpy as np
@bentoml.service
class Flights:
    def __init__(self): self.model = lightgbm.Booster(model_file="lightgbm.txt")
    @bentoml.api
    def predict(self, rows: np.ndarray) -> np.ndarray: return self.model.predict(rows)
'''


def saved_for_mlflow(place: Path, x):
    "The trees as MLflow keeps them: with a signature, which its server checks requests against, and without."
    import lightgbm, mlflow.lightgbm, pandas as pd
    from mlflow.models import infer_signature
    booster, table = lightgbm.Booster(model_file=str(place / "lightgbm.txt")), pd.DataFrame(x, columns=[f"x{i}" for i in range(len(x[0]))])
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        mlflow.lightgbm.save_model(booster, place / "mlflow", pip_requirements=["lightgbm"], signature=infer_signature(table, booster.predict(table)))
        mlflow.lightgbm.save_model(booster, place / "mlflow_bare", pip_requirements=["lightgbm"])
    return list(table.columns)


def servers(place: Path, package: Path, x, requests) -> dict:  # way -> (context, path, bodies)
    "Everybody, as a user would start them."
    names, bento = saved_for_mlflow(place, x), notebooks.peer("bento")
    (place / "service.py").write_text(BENTO)
    (place / "floor.py").write_text(FLOOR)
    ours, alone = {**ENV, "PATH": f"{bin}:{ENV['PATH']}"}, {**{k: v for k, v in ENV.items() if k != "PYTHONPATH"}, "BENTOML_HOME": str(place / "bentoml"), "PATH": f"{bento}:{ENV['PATH']}"}
    mlflow = lambda model: server(model, [bin / "mlflow", "models", "serve", "-m", place / model, "--env-manager", "local", "-h", "127.0.0.1", "-p", "PORT"], place, "/ping", ours)
    return {"ours": (server("ours", [bin / "slml", "serve", package, "--port", "PORT", *logging_on(place)], place, "/healthz"), "/predict", [json.dumps(r) for r in requests]),
            "MLflow": (mlflow("mlflow"), "/invocations", [json.dumps({"dataframe_split": {"columns": names, "data": [r]}}) for r in x]),
            "MLflow, bare": (mlflow("mlflow_bare"), "/invocations", [json.dumps({"inputs": [r]}) for r in x]),
            "BentoML": (server("bento", [bento / "bentoml", "serve", "service:Flights", "--host", "127.0.0.1", "--port", "PORT"], place, "/readyz", alone), "/predict", [json.dumps({"rows": [r]}) for r in x]),
            "floor": (server("floor", [bin / "python", "floor.py", "PORT"], place, "/"), "/", [json.dumps(requests[0])])}


def logging_on(place: Path) -> list[str]:
    "The option that has every prediction written down, where the command has it."
    has = "--log" in said([bin / "slml", "serve", "--help"], place)
    return ["--log", str(place / "log")] if has else []


WRK = '''
local bodies, i = {}, 0
function init(args)
  wrk.headers["Content-Type"] = "application/json"
  for line in io.lines(os.getenv("BODIES")) do bodies[#bodies + 1] = wrk.format("POST", wrk.path, wrk.headers, line) end
end
function request() i = i + 1; return bodies[i % #bodies + 1] end
function done(s, l, r)
  local e = s.errors
  io.write(string.format('\\n{"requests": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f, "failed": %d}\\n', s.requests, s.duration / 1e6, l:percentile(50) / 1e3, l:percentile(99) / 1e3, e.connect + e.read + e.write + e.status + e.timeout))
end
'''


def hammer(place: Path, port, path, bodies, seconds, connections=8) -> dict:  # requests, seconds, p50_ms, p99_ms, failed
    "As many requests as are answered over kept-alive connections, by wrk; by our own client where wrk is missing."
    if not shutil.which("wrk"):
        print("wrk is missing, so our own client in Python asks, which is slower than our server: apt-get install -y wrk", file=sys.stderr, flush=True)
        return client(port, [(path, b) for b in bodies], seconds, connections)
    (place / "wrk.lua").write_text(WRK)
    (place / "bodies").write_text("\n".join(bodies))
    done = subprocess.run(["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", place / "wrk.lua", f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True, env={**ENV, "BODIES": str(place / "bodies")})
    if done.returncode: sys.exit(f"wrk ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# Our own client: it can ask at a given rate, and looks at what it gets

def client(port, asks, seconds, connections=8, rate=0.0, right=None) -> dict:
    "The client in a process of its own; right: the prediction of each request, when every answer is to be compared."
    return client_ended(client_begun(port, asks, seconds, connections, rate, right))


def client_begun(*what):
    p = subprocess.Popen([sys.executable, __file__, "client"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV)
    p.stdin.write(json.dumps(what))
    p.stdin.close()
    return p


def client_ended(p):
    text = p.stdout.read()
    if p.wait(): sys.exit(f"the client ended with {p.returncode}")
    return json.loads(text)


async def run_client(port, asks, seconds, connections, rate, right):
    "Ask; at a rate, a request's time begins when it was due, even if nobody was free to send it."
    took, failed, begin, turn, stopped = [], [], time.perf_counter(), itertools.count(), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async def one():
        writer = None
        while not stopped.is_set():
            i = next(turn)
            due = begin + i / rate if rate else time.perf_counter()
            if due > begin + seconds or time.perf_counter() > begin + seconds + 30: break
            if (wait := due - time.perf_counter()) > 0: await asyncio.sleep(wait)
            path, body = asks[i % len(asks)]
            try:
                if writer is None: reader, writer = await asyncio.open_connection("127.0.0.1", port)
                status, text = await exchange(reader, writer, path, body)
                if status != 200 or right and not any(math.isclose(json.loads(text)["prediction"], r, rel_tol=1e-6) for r in right[i % len(asks)]): failed.append(f"{status} {text[:200]}")
            except (OSError, asyncio.IncompleteReadError) as e:
                failed.append(repr(e))
                writer = None
            took.append(1000 * (time.perf_counter() - due))
    await asyncio.gather(*(one() for _ in range(connections)))
    at = lambda q: sorted(took)[max(0, math.ceil(q * len(took)) - 1)]
    return {"requests": len(took), "seconds": time.perf_counter() - begin, "p50_ms": at(0.5), "p99_ms": at(0.99), "failed": len(failed), "why": failed[:3]}


async def exchange(reader, writer, path, body):
    "One request and its answer on an open connection."
    body = body.encode()
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    async with asyncio.timeout(30): head = await reader.readuntil(b"\r\n\r\n")
    size = int(re.search(rb"(?i)content-length: *(\d+)", head)[1])
    return int(head[9:12]), (await reader.readexactly(size)).decode()


# The measurements

def over_http(place, package, requests, x, rounds, seconds) -> dict:  # way -> list of what `hammer` says
    "Every server is started once; then they are asked in turn."
    got = {}
    with contextlib.ExitStack() as stack:
        ways = servers(place, package, x, requests)
        with ThreadPoolExecutor() as pool: ports = dict(zip(ways, pool.map(lambda w: stack.enter_context(w[0]), ways.values())))
        for way, (_, path, bodies) in ways.items():
            if way != "floor": same_answer(way, *ask(ports[way], "POST", path, bodies[0]), json.loads(ask(ports["ours"], "POST", "/predict", ways["ours"][2][0])[1])["prediction"])
            hammer(place, ports[way], path, bodies, 1)
        for _ in range(rounds):
            for way, (_, path, bodies) in ways.items(): got.setdefault(way, []).append(hammer(place, ports[way], path, bodies, seconds))
    for way, all in got.items():
        if any(g["failed"] for g in all): sys.exit(f"{way} failed: {all}")
    return got


def same_answer(way, status, text, right):
    "The first number in an answer must be the prediction."
    if status != 200 or not math.isclose(float(re.search(r"-?\d+\.?\d*(e-?\d+)?", text)[0]), right, rel_tol=1e-6): sys.exit(f"{way} says {status} {text[:300]}, not {right}")


def in_process(place, requests, calls) -> dict:  # (package, what) -> microseconds, the median of many calls
    "One row, model and features apart; each in a process of its own."
    return {name: json.loads(said([sys.executable, __file__, "row", place / "packages" / name, json.dumps(requests[:50]), calls], place)) for name in ("linear", "trees", "onnx")}


def one_row(package, requests, calls, warm=1.5) -> dict:
    "Microseconds of the parts of one answer, by the clock of the package itself: the model's are those after the features, until the answer is there."
    from slml_nb.package import load_package
    predictor, parts = load_package(package), {"model": [], "features": [], "all": []}
    if hasattr(predictor, "warm"): predictor.warm()
    end = time.perf_counter() + warm
    while time.perf_counter() < end: predictor.timed([requests[0]])
    for i in range(calls):
        start = time.perf_counter()
        _, features, model = predictor.timed([requests[i % len(requests)]])
        for part, seconds in (("model", model), ("features", features), ("all", time.perf_counter() - start)): parts[part].append(seconds)
    return {part: 1e6 * st.median(took) for part, took in parts.items()}


def under_lambda(place, name, request, calls, rounds) -> list[dict] | None:  # milliseconds of each round: cold, warm
    "The first and the following invocations of the function that would be deployed, under AWS's emulator; None where that is missing. As on Lambda, no bytecode is kept from one start to the next."
    import zipfile
    sys.path.append(str(root / "tests"))
    try: from test_lambda import deployed, emulator
    except ImportError: return None
    try: emulator()
    except BaseException: return None  # the tests would fail here
    from slml_nb.deploy import function_files, write_zip
    zipfile.ZipFile(write_zip(function_files(place / "packages" / name), place / f"{name}.zip")["file"]).extractall(folder := place / f"function_{name}")
    found = []
    for _ in range(rounds):
        with mock.patch.dict(os.environ, PYTHONDONTWRITEBYTECODE="1"), deployed(folder, timeout=30, app="", path=str(folder)) as function: took = [_invoked(function, request) for _ in range(calls + 1)]
        found.append({"cold": took[0], "warm": st.median(took[1:])})
    return found


def _invoked(function, request):
    start = time.perf_counter()
    status, text = function.invoke(request)
    took = 1000 * (time.perf_counter() - start)
    if status != 200 or "prediction" not in text: sys.exit(f"the function says {status} {text[:500]}")
    return took


# A file of many rows

def raw_rows(there: dict, inputs: list) -> str:
    "SQL: every flight as it would be asked about, with the last weather report before it left."
    names = [i["name"] for i in inputs if not i["from"]]
    reports = next(iter(there["tables"].glob("weather*")), None) if "tables" in there else None
    if not reports: return f"select * exclude (row_id) from '{there['recipe']}/requests.parquet'"
    columns = ", ".join(f"w.{n}" if n in WEATHER else f"c.{n}" for n in names)
    return f"select {columns} from '{there['clean']}' c asof left join '{reports}' w on c.origin = w.origin and c.departed >= w.time_hour"


def files(place, there, encoder, rows):
    "The same number of rows twice: as requests for us, and with the features ready, as numbers, for the peers."
    import duckdb, numpy as np, pyarrow as pa, pyarrow.parquet as pq
    from slml_nb.package import load_package
    con = duckdb.connect()
    inputs = json.loads((place / "packages/trees/recipe.json").read_text())["inputs"]
    con.execute(f"create table base as {raw_rows(there, inputs)}")
    n = con.execute("select count(*) from base").fetchone()[0]
    times = math.ceil(rows / n)
    con.execute(f"copy (select b.* from range({times}), base b limit {rows}) to '{place}/requests.parquet'")
    f = con.execute(f"from '{there['features']}'").fetchnumpy()
    x = encoder.raw({k: np.ma.filled(v, None if v.dtype == object else np.nan) for k, v in f.items()})
    table = pa.table({f"x{i}": c for i, c in enumerate(x.T)})
    with pq.ParquetWriter(place / "ready.parquet", table.schema) as out:
        for i in range(0, rows, len(x)): out.write_table(table.slice(0, min(len(x), rows - i)))


PEER = '''
import sys, pickle, numpy as np, pyarrow as pa, pyarrow.parquet as pq
way, model, source, out = sys.argv[1:]
if way == "lightgbm":
    import lightgbm
    predict = lightgbm.Booster(model_file=model).predict
else: predict = pickle.load(open(model, "rb")).predict
with pq.ParquetWriter(out, pa.schema({"prediction": pa.float64()}), compression="zstd") as writer:
    for batch in pq.ParquetFile(source).iter_batches(500_000):
        x = np.column_stack([c.to_numpy(zero_copy_only=False) for c in batch.columns])
        writer.write_table(pa.table({"prediction": predict(x)}))
'''


def histogram(place, encoder, x, y, trees=TREES):
    "scikit-learn's trees, trained on the same rows."
    import pickle
    from sklearn.ensemble import HistGradientBoostingRegressor
    codes = list(range(len(encoder.names), x.shape[1]))
    model = HistGradientBoostingRegressor(loss="absolute_error", max_iter=trees, max_leaf_nodes=LEAVES, learning_rate=0.1, early_stopping=False, categorical_features=codes, random_state=0).fit(x[:50_000], y[:50_000])
    (place / "sklearn.pickle").write_bytes(pickle.dumps(model))
    (place / "peer.py").write_text(PEER)


def of_a_file(place, rounds) -> dict:  # way -> list of seconds
    "The whole command each time: start, read, compute, predict, write."
    cores, got = {k: v for k, v in ENV.items() if k not in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}, {}
    for _ in range(rounds):
        got.setdefault("ours", []).append(seconds_of([bin / "slml", "predict", place / "packages/trees", place / "requests.parquet", "--out", place / "answers.parquet"], place, cores))
        for way, model in (("scikit-learn", "sklearn.pickle"), ("lightgbm", "lightgbm.txt")):
            got.setdefault(way, []).append(seconds_of([bin / "python", "peer.py", way, model, "ready.parquet", "peer.parquet"], place, cores))
    return got


# Load that rises, variants that change

def steps(place, requests, plan, idle) -> list[dict]:
    "The host of three packages under load that rises step by step, then nothing; and how many workers there were. Workers without a request for so many seconds go."
    with server("host", [bin / "slml", "serve", *(f"{n}={place / 'packages' / n}" for n in ("linear", "trees", "onnx")), "--port", "PORT", "--idle", str(idle)], place, "/healthz") as port:
        asks = [(f"/{n}/predict", json.dumps(r)) for r in requests[:100] for n in ("trees", "linear", "onnx")]
        return [counted(port, rate, lambda: client(port, asks, seconds, 32, rate)) for rate, seconds in plan] + [counted(port, 0, lambda: rest(port, idle + 10))]


def rest(port, seconds):
    "Wait until no worker is left."
    begin = time.perf_counter()
    while workers(port) and time.perf_counter() - begin < seconds: time.sleep(0.2)
    return {"seconds": time.perf_counter() - begin}


def workers(port) -> int: return sum(p["workers"] for p in json.loads(ask(port, "GET", "/")[1])["packages"].values())


def counted(port, rate, work) -> dict:
    "What the work says, and the number of workers, every half second."
    seen, over = [], threading.Event()
    def look():
        while not over.wait(0.5): seen.append(workers(port))
    watch = threading.Thread(target=look)
    watch.start()
    try: said = work()
    finally:
        over.set()
        watch.join()
    return {"rate": rate, **said, "workers": [*seen, workers(port)]}


SWAPPED = "import json; from slml_nb.cli import _variants; from slml_nb.host import host; host({}, sys.argv[2], sock, traffic=[_variants(sys.argv[3], {})], every=0.05, most=1)"


def swaps(place, requests, answers, n) -> dict:
    "A name with two variants; one of them is replaced n times by another package, while clients ask without a pause and compare every answer."
    from slml_nb.package import load_package
    from slml_nb.serve import running_code
    shelf, kinds = place / "shelf", ("linear", "trees")
    shelf.mkdir()
    for v in ("old", "new"): shutil.copytree(place / "packages/trees", shelf / f"eta.{v}")
    (place / "spec.json").write_text(json.dumps({"name": "eta", "policy": "shares", "variants": {"old": "", "new": ""}, "shares": {"old": 0.5, "new": 0.5}, "state": str(place / "traffic.db"), "log": str(place / "swaplog")}))
    requests, answers = requests[:50], answers[:50]
    other = [a["prediction"] for a in load_package(place / "packages/linear").predict(requests)]
    hashes = {k: json.loads((place / "packages" / k / "manifest.json").read_text())["hash"] for k in kinds}
    with running_code(SWAPPED, shelf, place / "spec.json") as port:
        load, took = client_begun(port, [("/eta/predict", json.dumps(r)) for r in requests], 3600, 4, 0.0, list(zip(answers, other))), []
        try:
            for i in range(n): took.append(swap(place, shelf / "eta.new", kinds[i % 2], hashes, port))
        finally: load.terminate()
        return {**client_ended(load), "swaps": n, "swap_s": st.median(took)}


def swap(place, target, kind, hashes, port) -> float:
    "Replace a package, and wait until the host answers with it; seconds."
    shutil.copytree(place / "packages" / kind, draft := place / f"draft_{kind}")
    start = time.perf_counter()
    target.rename(place / "away")
    draft.rename(target)
    while json.loads(ask(port, "GET", "/")[1])["packages"]["eta.new"]["hash"] != hashes[kind]:
        if time.perf_counter() > start + 30: sys.exit(f"the host does not take the new version: {ask(port, 'GET', '/')[1][:500]}")
        time.sleep(0.01)
    shutil.rmtree(place / "away")
    return time.perf_counter() - start


def measure(rounds=5, params="flights", seconds=3, calls=5000, invocations=200, rows=1_000_000, most=10_000_000, plan=((1, 5), (50, 10), (500, 15)), idle=5, changes=100, only=()) -> dict:
    "Everything, one after the other, on one machine; only: some of http, one, lambda, file, large file, steps, swaps."
    place, got = Path(tempfile.mkdtemp(prefix="slml_bench_")), {}
    try:
        there = artifacts(place, params)
        encoder, x, y = learn(place, there)
        requests, ready, answers = asking(place, there, encoder)
        histogram(place, encoder, x, y)
        def a_file(n, times):
            files(place, there, encoder, n)
            return {"rows": n, **of_a_file(place, times)}
        parts = {"http": lambda: over_http(place, place / "packages/trees", requests, ready, rounds, seconds), "one": lambda: [in_process(place, requests, calls) for _ in range(rounds)],
                 "lambda": lambda: {n: under_lambda(place, n, requests[0], invocations, rounds) for n in ("linear", "onnx")},
                 "file": lambda: a_file(rows, rounds), **({"large file": lambda: a_file(most, 1)} if most else {}), "steps": lambda: steps(place, requests, plan, idle), "swaps": lambda: swaps(place, requests, answers, changes)}
        for name in only or parts:
            start = time.perf_counter()
            got[name] = parts[name]()
            print(f"serving: {name}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return got
    finally: shutil.rmtree(place, ignore_errors=True)


# The tables

HEAD = "| what | median | min | max | unit | runs | goal | met |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
GONE = "| Lambda: the emulator is not on this machine (make .venv puts it there) | | | | | | | not measured |"


def tables(got: dict, row, pairs) -> list[str]:
    "What was measured, as Markdown; `row` and `pairs` are those of bench/run.py."
    of = {"One row a request, 8 connections kept alive": http_rows(got["http"], row, pairs), "One row in process": one_rows(got["one"], row), "As a Lambda function": lambda_rows(got["lambda"], row),
          "A file": [line for part in ("file", "large file") if part in got for line in file_rows(got[part], row, pairs)], "Variants that change under load": swap_rows(got["swaps"], row)}
    lines = [line for title, rows in of.items() for line in (f"### {title}", "", HEAD, *rows, "")]
    return [*lines, "### Load that rises, and ends", "", "| requests/s | seconds | requests | failed | p50 ms | p99 ms | workers |", "| --- | --- | --- | --- | --- | --- | --- |", *map(step_row, got["steps"])]


def http_rows(http, row, pairs):
    rate = {way: [g["requests"] / g["seconds"] for g in all] for way, all in http.items()}
    ms = {way: {q: [g[q] for g in all] for q in ("p50_ms", "p99_ms")} for way, all in http.items()}
    name = {"ours": f"`slml serve`: fields checked, features, {TREES} trees", "MLflow": "peer: `mlflow models serve`, features ready, a signature", "MLflow, bare": "peer: the same, an array and no signature: nothing is checked", "BentoML": "peer: `bentoml serve`, features ready", "floor": "(floor: uvicorn, a constant)"}
    ratios = [pairs("ours / BentoML", rate["ours"], rate["BentoML"], 15), pairs("ours / MLflow", rate["ours"], rate["MLflow"], 20), pairs("ours / MLflow, bare", rate["ours"], rate["MLflow, bare"]), pairs("floor / ours", rate["floor"], rate["ours"])]
    waits = [row(f"{w}, {q[:3]}", ms[w][q], 3 if (w, q) == ("ours", "p99_ms") else "", "ms") for w in ms for q in ms[w]]
    return [*(row(name[w], rate[w], unit="requests/s", digits=0) for w in rate), *ratios, *waits]


def one_rows(one, row):
    goals, names = {"linear": 2, "trees": 40, "onnx": 10}, {"linear": "weighted sum", "trees": f"{TREES} trees", "onnx": "network, ONNX Runtime"}
    part = lambda k, p: [g[k][p] for g in one]
    return [*(row(f"{names[k]}: the model alone", part(k, "model"), g, "µs", 1) for k, g in goals.items()), row("features of the trees, from the request", part("trees", "features"), unit="µs", digits=1),
            *(row(f"{names[k]}: from the request to the answer", part(k, "all"), unit="µs", digits=1) for k in goals)]


def lambda_rows(found, row):
    if not found["linear"]: return [GONE]
    part = lambda k, p: [g[p] for g in found[k]]
    return [row("weighted sum: first invocation", part("linear", "cold"), 100, "ms", 0), row("weighted sum: the following, p50", part("linear", "warm"), 1.5, "ms"),
            row("network in ONNX: first invocation", part("onnx", "cold"), 400, "ms", 0), row("network in ONNX: the following, p50", part("onnx", "warm"), unit="ms")]


def file_rows(got, row, pairs):
    n, names = got["rows"], {"ours": "`slml predict`, from requests, features computed", "scikit-learn": "peer: scikit-learn's histogram trees, features ready", "lightgbm": "peer: LightGBM, features ready"}
    return [*(row(f"{n:,} rows of Parquet, {names[w]}", got[w]) for w in names), row(f"{n:,} rows, `slml predict`", [n / t for t in got["ours"]], unit="rows/s", digits=0),
            *(pairs(f"{n:,} rows, {w} / ours", got[w], got["ours"], 2 if w == "scikit-learn" else "") for w in names if w != "ours")]


def swap_rows(got, row):
    return [row(f"requests while a variant changed {got['swaps']} times, each answer compared", [got["requests"]], unit="requests", digits=0), row("failed among them", [got["failed"]], 0, "requests", 0),
            row("p50 of them, 4 callers without a pause", [got["p50_ms"]], unit="ms"), row("p99", [got["p99_ms"]], unit="ms"), row("from putting a package there to its first answer", [got["swap_s"]])]


def step_row(s):
    counts = " → ".join(str(n) for n, _ in itertools.groupby(s["workers"]))
    if not s["rate"]: return f"| none | {s['seconds']:.1f} | | | | | {counts} |"
    return f"| {s['rate']} | {s['seconds']:.0f} | {s['requests']} | {s['failed']} | {s['p50_ms']:.2f} | {s['p99_ms']:.2f} | {counts} |"


TINY = {"params": "sample", "seconds": 1, "calls": 300, "invocations": 20, "rows": 10_000, "most": 0, "plan": ((1, 2), (50, 1), (200, 2)), "idle": 1, "changes": 3}

if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]: print(json.dumps(asyncio.run(run_client(*json.load(sys.stdin)))))
    elif sys.argv[1:2] == ["row"]: print(json.dumps(one_row(sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))))
    else: print(json.dumps(measure(only=sys.argv[2:]) if sys.argv[1:2] == ["--whole"] else measure(1, **TINY, only=sys.argv[1:]), indent=1))
