"""Warm kernels are as good as fresh ones: nothing leaks from one to the next, libraries work after the fork, and when the template is gone the run goes on."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

from tiny import HEAD, answer, artifacts, drive, nobody_left, notebook, start, states, until, use_case
from slml_nb.kernel import HEAVY, KernelDied, TimeUp, WarmKernels, warm_possible
from slml_nb.run import Kernels, run_notebook

pytestmark = pytest.mark.skipif(bool(warm_possible()), reason=warm_possible() or "there are warm kernels")


@pytest.fixture(scope="module")
def heavy():
    "One template for many tests, with all heavy libraries; kernels have two cores' worth of threads."
    with Kernels(HEAVY) as kernels: yield kernels


@pytest.fixture(scope="module")
def fresh():
    with Kernels(cold=True) as kernels: yield kernels


@pytest.fixture(autouse=True)
def no_pytest(monkeypatch): monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)  # else ipykernel leaves to the terminal what child processes print


def cells(*sources): return {"metadata": {}, "nbformat": 4, "nbformat_minor": 5, "cells": [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": s, "outputs": [], "execution_count": None} for i, s in enumerate(sources)]}


def said(kernels, place, *sources, limit=60):
    "What a notebook prints; its meter must not say that it failed."
    name = place / f"{len(list(place.glob('*.ipynb')))}.ipynb"
    meter = run_notebook(cells(*sources), name, {}, kernels, limit=limit, cwd=place)
    outs = [o for c in json.loads(name.read_text())["cells"] for o in c["outputs"]]
    assert "failed" not in meter, (meter["failed"], outs)
    return "".join("".join(o.get("text", "")) for o in outs if o.get("name") == "stdout")


# ---- no state leaks

SPOILS = {
    "a variable": ("leak = 1", "'leak' in globals()", "False"),
    "a patched library": ("import pandas as pd; pd.DataFrame.sum = None", "__import__('pandas').DataFrame({'a': [1]}).sum().a", "1"),
    "a patched builtin": ("import builtins; builtins.sum = lambda *_: 42", "sum([1])", "1"),
    "a patched module": ("import json; json.loads = None", "__import__('json').loads('1')", "1"),
    "an attribute of the platform": ("import slml_nb.core; slml_nb.core.project_root = None", "callable(__import__('slml_nb.core').core.project_root)", "True"),
    "a removed module": ("import sys; sys.modules['numpy'] = None", "bool(__import__('numpy').pi)", "True"),
    "an option of pandas": ("import pandas as pd; pd.set_option('display.max_rows', 3)", "__import__('pandas').get_option('display.max_rows')", "60"),
    "numpy's errors": ("import numpy as np; np.seterr(all='raise')", "__import__('numpy').geterr()['divide']", "warn"),
    "torch's threads and type": ("import torch; torch.set_default_dtype(torch.float64)", "__import__('torch').get_default_dtype()", "torch.float32"),
    "an environment variable": ("import os; os.environ['LEAK'] = 'x'; os.environ.pop('HOME', 0)", "('LEAK' in __import__('os').environ, 'HOME' in __import__('os').environ)", "(False, True)"),
    "the directory": ("import os; os.chdir('/')", "__import__('os').getcwd() == '/'", "False"),
    "the path": ("import sys; sys.path.append('/leak')", "'/leak' in __import__('sys').path", "False"),
    "a warning filter": ("import warnings; warnings.simplefilter('error')", "any(f[0] == 'error' and f[2] is Warning for f in __import__('warnings').filters)", "False"),
    "the limit of recursion": ("import sys; sys.setrecursionlimit(123456)", "__import__('sys').getrecursionlimit() == 123456", "False"),
    "a signal handler": ("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)", "__import__('signal').getsignal(2) == __import__('signal').default_int_handler", "True"),
    "the mask of new files": ("import os; os.umask(0o777)", "oct(__import__('os').umask(0o22))", oct(os.umask(0o22)) if (os.umask(os.umask(0o22)),) else ""),
    "the locale": ("import locale; locale.setlocale(locale.LC_ALL, 'C')", "__import__('locale').setlocale(__import__('locale').LC_NUMERIC)", "C"),
    "a magic": ("from IPython import get_ipython; get_ipython().register_magic_function(lambda l: 1, magic_name='leak')", "'leak' in get_ipython().magics_manager.magics['line']", "False"),
    "a closed stream": ("import sys, os; os.close(2)", "__import__('os').write(2, b'') == 0", "True"),
    "matplotlib's style": ("import matplotlib; matplotlib.rcParams['font.size'] = 99", "__import__('matplotlib').rcParams['font.size'] == 99", "False"),
    "a limit of the system": ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))", "__import__('resource').getrlimit(7)[0] == 64", "False"),
    "the priority": ("import os; os.nice(5)", "__import__('os').nice(0)", str(os.nice(0))),
    "warnings that libraries silence": ("import warnings; warnings.resetwarnings()", "__import__('torch') and any('numpy.ndarray' in str(f[1]) for f in __import__('warnings').filters)", "True"),
    "a collector that is off": ("import gc; gc.disable()", "__import__('gc').isenabled()", "True"),
}


def test_nothing_leaks(heavy, tmp_path):
    "Each notebook spoils all it can; the next one finds none of it."
    looks = [f"print({what!r}, {look}, sep=': ')" for what, (_, look, _) in SPOILS.items()]
    want = [f"{what}: {expected}" for what, (_, _, expected) in SPOILS.items()]
    assert said(heavy, tmp_path, *looks).splitlines() == want
    for spoil in [spoil for spoil, _, _ in SPOILS.values()]: run_notebook(cells(spoil), None, {}, heavy, cwd=tmp_path)
    run_notebook(cells(*[spoil for spoil, _, _ in SPOILS.values()]), None, {}, heavy, cwd=tmp_path)
    assert said(heavy, tmp_path, *looks).splitlines() == want


def test_no_two_draw_the_same(heavy, tmp_path):
    draw = "import random, numpy as np, torch, uuid, secrets, tempfile\nprint(random.random(), np.random.rand(), torch.rand(1).item(), np.random.default_rng().random(), uuid.uuid4(), secrets.token_hex(), tempfile.mktemp())"
    drawn = [said(heavy, tmp_path, draw).split() for _ in range(4)]
    assert all(len(set(column)) == 4 for column in zip(*drawn)), drawn


def test_two_at_a_time_do_not_see_each_other(heavy, tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    def one(i):
        (tmp_path / str(i)).mkdir()
        return said(heavy, tmp_path / str(i), f"import os, numpy as np, time\nos.environ['I'] = '{i}'\nnp.mine = {i}\ntime.sleep(.1)", "print(os.environ['I'], np.mine, os.getcwd()[-1])")
    with ThreadPoolExecutor(4) as pool: assert list(pool.map(one, range(8))) == [f"{i} {i} {i}\n" for i in range(8)]


# ---- libraries after the fork: the same results as in a fresh kernel

WORK = {
    "multiprocessing-fork": "import multiprocessing as mp\ndef f(x): return x * x\nwith mp.get_context('fork').Pool(2) as pool: print(pool.map(f, range(5)))",
    "multiprocessing-spawn": "import multiprocessing as mp, operator\nif True:\n    with mp.get_context('spawn').Pool(2) as pool: print(pool.map(abs, [-1, 2, -3]))",
    "multiprocessing-forkserver": "import multiprocessing as mp\nwith mp.get_context('forkserver').Pool(2) as pool: print(pool.map(abs, [-1, 2, -3]))",
    "process-pool": "from concurrent.futures import ProcessPoolExecutor\nwith ProcessPoolExecutor(2) as pool: print(list(pool.map(abs, [-1, 2, -3])))",
    "threads": "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as pool: print(sum(pool.map(len, ['a', 'bb'] * 50)))",
    "subprocess": "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'print(6 * 7)'], capture_output=True, text=True).stdout.strip())",
    "asyncio": "import asyncio\nasync def f(x):\n    await asyncio.sleep(.01)\n    return x\nprint(await asyncio.gather(f(1), f(2)))",
    "numpy": "import numpy as np\na = np.arange(250_000.).reshape(500, 500) % 7\nprint(float((a @ a).sum()), round(float(np.linalg.svd(a[:60, :60], compute_uv=False)[0]), 6))",
    "torch": "import torch\ntorch.set_num_threads(2)\ntorch.manual_seed(3)\nx = torch.randn(2000, 20); y = x.sum(1, keepdim=True)\nnet = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))\nopt = torch.optim.Adam(net.parameters(), 0.01)\nfor _ in range(20):\n    opt.zero_grad(); loss = ((net(x) - y) ** 2).mean(); loss.backward(); opt.step()\nprint(round(loss.item(), 4))",
    "torch-loader": "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\nprint(sum(b[0].sum().item() for b in DataLoader(TensorDataset(torch.arange(64.)), batch_size=8, num_workers=2, multiprocessing_context='fork')))",
    "sklearn": "import numpy as np\nfrom sklearn.ensemble import RandomForestRegressor\nr = np.random.default_rng(0); x = r.random((300, 5)); y = x.sum(1)\nprint(round(float(RandomForestRegressor(10, n_jobs=2, random_state=0).fit(x, y).predict(x[:3]).sum()), 8))",
    "joblib-processes": "from joblib import Parallel, delayed\nprint(Parallel(n_jobs=2)(delayed(pow)(i, 2) for i in range(4)))",
    "duckdb": "import duckdb\nc = duckdb.connect(); c.execute('set threads = 4')\nprint(c.sql('select count(*), sum(i % 7)::BIGINT from range(2000000) t(i)').fetchall(), len(c.sql('select * from range(5)').df()))",
    "lightgbm": "import numpy as np, lightgbm as lgb\nr = np.random.default_rng(0); x = r.random((2000, 5)); y = x.sum(1)\nb = lgb.train({'num_threads': 2, 'verbose': -1, 'deterministic': True, 'force_row_wise': True, 'seed': 0}, lgb.Dataset(x, y), 10)\nprint(round(float(b.predict(x[:5]).sum()), 8))",
    "pyarrow": "import pyarrow as pa, pyarrow.parquet as pq, pyarrow.compute as pc, pandas as pd\npd.DataFrame({'a': range(200000), 'b': ['x', 'y'] * 100000}).to_parquet('t.parquet')\nt = pq.read_table('t.parquet', use_threads=True)\nprint(pc.sum(t['a']).as_py(), t.group_by('b').aggregate([('a', 'sum')]).sort_by('b').to_pydict()['a_sum'])",
    "onnxruntime": "import onnx, onnxruntime as ort, numpy as np\nfrom onnx import helper as h, TensorProto as T\ng = h.make_graph([h.make_node('MatMul', ['x', 'x'], ['y'])], 'g', [h.make_tensor_value_info('x', T.FLOAT, [64, 64])], [h.make_tensor_value_info('y', T.FLOAT, [64, 64])])\nm = h.make_model(g, opset_imports=[h.make_opsetid('', 17)], ir_version=8)\nprint(float(ort.InferenceSession(m.SerializeToString()).run(None, {'x': np.eye(64, dtype='float32') * 2})[0].sum()))",
    "matplotlib": "from matplotlib.figure import Figure\nimport io\nf = Figure(); f.subplots().plot([1, 2]); b = io.BytesIO(); f.savefig(b); print(b.getvalue()[1:4])",
}


@pytest.mark.parametrize("names", [[n] for n in WORK], ids=list(WORK))
def test_libraries_after_the_fork(heavy, fresh_results, tmp_path, names):
    "Two kernels at once, forked from one template, against a fresh one."
    from concurrent.futures import ThreadPoolExecutor
    def one(i):
        (tmp_path / str(i)).mkdir()
        return said(heavy, tmp_path / str(i), WORK[names[0]])
    with ThreadPoolExecutor(2) as pool: results = list(pool.map(one, range(2)))
    assert heavy.why_cold == "" and results == [fresh_results[names[0]]] * 2 and results[0].strip()


@pytest.fixture(scope="module")
def fresh_results(fresh, tmp_path_factory):
    "All of it in one fresh kernel: what each prints."
    place = tmp_path_factory.mktemp("fresh")
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    meter = run_notebook(cells(*WORK.values()), place / "all.ipynb", {}, fresh, limit=300, cwd=place)
    outs = ["".join("".join(o.get("text", "")) for o in c["outputs"] if o.get("name") == "stdout") for c in json.loads((place / "all.ipynb").read_text())["cells"]]
    assert "failed" not in meter, meter["failed"]
    return dict(zip(WORK, outs))


def test_all_libraries_in_one_kernel(heavy, fresh_results, tmp_path):
    "Thread pools of several libraries side by side; processes forked after they have run."
    assert said(heavy, tmp_path, *WORK.values(), limit=200) == "".join(fresh_results.values())


def test_a_library_that_is_missing(tmp_path):
    "The template does without it; the cell that wants it gets the error."
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('half installed')")
    with Kernels(["no_such_library", "broken_module", "json", "also.not.there"]) as kernels:
        assert said(kernels, tmp_path, "print(6 * 7)") == "42\n" and kernels.why_cold == ""
        meter = run_notebook(cells("import no_such_library"), None, {}, kernels)
        assert meter["kernel"] == "warm" and meter["failed"][1:] == ("ModuleNotFoundError", "No module named 'no_such_library'")


def test_a_library_that_ends_the_template(tmp_path, monkeypatch):
    "What a library does to its process on import is not the run's end."
    (tmp_path / "deadly_module.py").write_text("import os; os._exit(7)")
    monkeypatch.syspath_prepend(tmp_path)
    with Kernels(["deadly_module"]) as kernels:
        for _ in range(2):
            meter = run_notebook(cells("print(6 * 7)", "import time; time.sleep(.5)"), tmp_path / "out.ipynb", {}, kernels, cwd=tmp_path)
            assert "failed" not in meter
        assert meter["kernel"] == "fresh" and kernels.why_cold


# ---- the template dies

def running(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError: return False


def template_of(project, pid):
    from slml_nb.meter import descendants
    return next((p for p in descendants(pid) if b"slml_nb.kernel" in Path(f"/proc/{p}/cmdline").read_bytes()), None)


def test_the_template_is_killed_in_mid_run(project):
    "Two stages are at work, with what they have started: both are made in fresh kernels, and so is what comes after; nothing is left of the warm ones."
    ready = project.folder / "ready"
    def body(s): return HEAD.format(stage=s) + f"import subprocess, time, sys\nonce = 'ipykernel_launcher' in ' '.join(sys.argv)\nif not once:\n    p = subprocess.Popen(['sleep', '600'], start_new_session=True)\n    open(r'{ready}', 'a').write(f'{{p.pid}}\\n')\n    time.sleep(600)"
    last = "stage.save('{a}', {{'n': 1}})\nstage.done()"
    stages = {s: notebook(s, "", f"of_{s}", "n: int = 1", body(s), last.format(a=f"of_{s}")) for s in ("one", "two")}
    stages["three"] = notebook("three", "of_one, of_two", "of_three", "n: int = 1", HEAD.format(stage="three") + last.format(a="of_three"))
    p = start(project, use_case(project, stages))
    assert until(lambda: p.poll() is not None or ready.exists() and len(ready.read_text().split()) == 2) and p.poll() is None
    leaked = [int(x) for x in ready.read_text().split()]
    os.kill(template_of(project, p.pid), signal.SIGKILL)
    r = answer(p)
    assert r["state"] == "done" and states(r) == dict.fromkeys(["one", "two", "three"], "made") and {s["kernel"] for s in r["stages"].values()} == {"fresh"}
    assert len(artifacts(project)) == 3 and nobody_left(project.folder) and not any(map(running, leaked))


def test_the_template_is_killed_between_two_notebooks(tmp_path):
    with Kernels([]) as kernels:
        assert run_notebook(cells("1"), None, {}, kernels)["kernel"] == "warm"
        kernels.template.process.kill(), kernels.template.process.wait()
        for _ in range(2): assert run_notebook(cells("1"), None, {}, kernels)["kernel"] == "fresh"
        assert "template" in kernels.why_cold


def test_a_kernel_that_dies_is_no_reason_to_go_cold(heavy, tmp_path):
    "A notebook that kills its kernel has failed; it is not run again."
    meter = run_notebook(cells(f"open(r'{tmp_path}/n', 'a').write('x')\nimport os; os.kill(os.getpid(), 9)"), None, {}, heavy)
    assert meter["failed"][1] == "DeadKernelError" and (tmp_path / "n").read_text() == "x" and heavy.why_cold == ""
    assert said(heavy, tmp_path, "print(1)") == "1\n"


@pytest.mark.parametrize("how", ["mp.get_context('fork').Process(target=time.sleep, args=(600,)).start()", "os.system('sleep 600 &')", "os.fork() or time.sleep(600)", "mp.get_context('fork').Pool(2)"])
def test_a_dead_kernel_is_seen_although_its_children_live(heavy, tmp_path, how):
    "They have a copy of all that it had open."
    begin = time.monotonic()
    meter = run_notebook(cells(f"import os, time, multiprocessing as mp\nme = os.getpid()\nx = {how}\ntime.sleep(.1)\nif os.getpid() == me: os.kill(me, 9)"), None, {}, heavy, cwd=tmp_path, limit=40)
    assert meter["failed"][1] == "DeadKernelError" and "SIGKILL" in meter["failed"][2], meter
    assert nobody_left(tmp_path) and time.monotonic() - begin < 40


def test_what_a_forked_child_prints_and_shows(heavy, tmp_path):
    "Its text arrives; it cannot speak for the notebook."
    text = said(heavy, tmp_path, "import os, sys\nif os.fork() == 0:\n    print('from the child', flush=True)\n    display('x')\n    1 / 0\nelse: os.wait()\nprint('from the parent')", "print('and on')")
    assert sorted(text.splitlines()) == ["and on", "from the child", "from the parent"]


def test_many_kernels_one_after_the_other(heavy, tmp_path):
    "No file, no process, no memory is left of each."
    def here(): return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{heavy.template.process.pid}/fd"))
    run_notebook(cells("1"), None, {}, heavy)
    before = here()
    for _ in range(20): run_notebook(cells("x = 1"), None, {}, heavy)
    from slml_nb.meter import descendants
    assert until(lambda: not descendants(heavy.template.process.pid), 10)  # they end in the background
    assert until(lambda: all(now < then + 5 for now, then in zip(here(), before)), 10), (here(), before)  # one each would be twenty


# ---- an interrupt in the moment between receiving a cell and beginning it

PAUSE = """import slml_nb.kernel as inside, time
begin = inside._run_cell
def paused(*a):
    open({ready!r}, 'w').close()
    end = time.monotonic() + {seconds}
    while time.monotonic() < end: time.sleep(0.01)
    return begin(*a)
inside._run_cell = paused"""


def test_a_limit_that_is_reached_before_the_cell_begins_stops_it(heavy, tmp_path):
    "The cell does not run, the kernel need not be killed, and the reason is the limit."
    kernel, got = heavy.warm(tmp_path, {}, []), []
    kernel.execute(PAUSE.format(ready=str(tmp_path / "ready"), seconds=1.0), got.append)
    with pytest.raises(TimeUp, match="^the cell ran longer than 0.2 s$"): kernel.execute("open('ran', 'w').close()", got.append, limit=0.2)
    assert [m["ename"] for m in got] == ["KeyboardInterrupt"] and not (tmp_path / "ran").exists()
    assert kernel.ended is None and kernel.execute("print('alive')", got.append)["status"] == "ok" and got[-1]["text"] == "alive\n"
    heavy.retire(kernel)


def test_ctrl_c_before_a_cell_begins_ends_the_run(project):
    use = use_case(project, {"one": notebook("one", "", "kept", "n: int = 1", PAUSE.format(ready=f"{project.folder}/ready", seconds=600), HEAD.format(stage="one") + "stage.save('kept', {'n': n})\nstage.done()")})
    p = start(project, use)
    assert until(lambda: (project.folder / "ready").exists() or p.poll() is not None) and p.poll() is None
    os.killpg(p.pid, signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and "Traceback" not in err, err
    assert nobody_left(project.folder) and json.loads(next(project.folder.glob("runs/mine/*/run.json")).read_text())["state"] == "interrupted"
