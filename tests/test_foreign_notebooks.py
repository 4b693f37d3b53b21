"""Notebooks that know nothing of this house, through its engine and its command: every output as plain Papermill leaves it."""
import json, os, re, subprocess, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

root = Path(__file__).resolve().parent.parent

# ---- the notebooks: name -> cells. A cell is its source, or (source, tags); "md:" begins a Markdown cell

printing = [
    "md:# Foreign\nNo front matter, no types.",
    "print('one'); print('two', end=''); print(' and', 3, flush=True)",
    "import sys\nfor i in range(4): print(i, file=[sys.stdout, sys.stderr][i % 2])",
    "sys.stderr.write('only stderr\\n')",
    "print('ä€🐌\\t|\\x07|', '\\r overwritten')\nprint()",
    "for i in range(20_000): print(i)",
    "print('x' * 300_000)",
    "",
    "   \n\n",
    "# only a comment",
    "x = 1;",
    "x + 1;",
    "None",
    "x, [x] * 3",
    "1\n2\nprint('between')\n3",
    "print(_, __, Out, In[-1])",
    "sys.stdout.isatty(), sys.stdout.encoding, sys.stdout.writable(), sys.stdout.name",
    "import os, subprocess\nsubprocess.run(['sh', '-c', 'echo to file descriptor 1; echo and to 2 >&2']).returncode",
    "os.write(1, b'written below Python\\n')",
    "!echo from a shell line; exit 3",
    "found = !echo a; echo b\nfound",
    "_exit_code",
    "%%bash\necho in bash\necho complains >&2",
    "%%sh --out kept\necho kept",
    "kept",
    "import logging\nlogging.warning('a warning of logging')\nlogging.info('below the level')",
    "import warnings\nwarnings.warn('look out')\nwarnings.warn('old', DeprecationWarning)",
    "import threading\nt = threading.Thread(target=print, args=('from a thread',)); t.start(); t.join()",
    "def broken(): raise ValueError('in a thread')\nt = threading.Thread(target=broken); t.start(); t.join()",
    "print({k: os.environ.get(k) for k in ('PAGER', 'GIT_PAGER', 'TERM', 'CLICOLOR', 'FORCE_COLOR')})",
    "print(callable(input), callable(open), callable(exit), callable(quit))",
    "with open('/dev/null') as f: print(f.read() == '')",
    "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as s: print('caught')\ns.getvalue()",
    "print('half a line', end='')",
]

showing = [
    "from IPython.display import *\nfrom IPython import get_ipython\ndisplay('text', 3, [1])",
    "display(HTML('<b>b</b>'), Markdown('*m*'), Latex('$x$'), SVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>'), JSON({'a': [1, None]}), Javascript('1'))",
    "display({'text/plain': 'p', 'text/html': '<i>p</i>'}, raw=True, metadata={'text/html': {'isolated': True}})",
    "import base64\nImage(base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='), width=7)",
    "h = display('first', display_id=True)\nprint('between')\nh.update('second')",
    "h2 = display('shown once', display_id='mine')\nNone",
    "h2.update('changed from another cell')",
    "display('shown twice', display_id='mine')",
    "update_display('changed in both', display_id='mine')",
    "update_display('nobody has this id', display_id='nobody')",
    "print('gone'); display('gone too'); clear_output(); print('stays')",
    "print('replaced'); clear_output(wait=True); print('replacement')",
    "print('kept, since nothing follows'); clear_output(wait=True)",
    "for i in range(3): clear_output(wait=True); display(i)",
    "class Rich:\n    def _repr_html_(self): return '<u>u</u>'\n    def __repr__(self): return 'rich'\nRich()",
    "class Bundle:\n    def _repr_mimebundle_(self, include=None, exclude=None): return {'text/plain': 'b', 'application/x-own+json': {'k': 1}}, {'application/x-own+json': {'m': 2}}\nBundle()",
    "class Own:\n    def _ipython_display_(self): print('shows itself')\nOwn()",
    "import pandas as pd\npd.DataFrame({'a': [1.5, None], 'b': ['x', 'ÿ']}, index=['p', 'q'])",
    "pd.Series([1, 2], name='s')",
    "pd.DataFrame({'a': range(100)})",
    "print(pd.DataFrame({'a': [1], 'a rather long name': ['x' * 60], 'another rather long name': ['y' * 60]}))",
    "list(range(2000))",
    "{'k' * 30: list(range(30)), 'nested': {'a': {'b': ('c',) * 3}}}",
    "import matplotlib, matplotlib.pyplot as plt\nprint(matplotlib.get_backend())\nplt.plot([1, 2, 4])",
    "fig, ax = plt.subplots(figsize=(2, 1)); ax.plot([3, 1]); plt.show(); print('after the figure')",
    "plt.figure(figsize=(1, 1)); plt.figure(figsize=(1, 2)); None",
    "fig",
    "%matplotlib inline\n%config InlineBackend.figure_formats = ['svg']\nplt.rcParams['svg.hashsalt'] = 's'\nplt.figure(figsize=(1, 1)).add_subplot().plot([1, 2]);",
    "plt.get_fignums()",
    "%config InlineBackend.close_figures",
    "from tqdm import tqdm\nimport sys\nfor i in tqdm(range(3), mininterval=0, file=sys.stdout): pass",
    "for i in tqdm(range(3), mininterval=0, desc='to stderr'): pass",
    "try: from tqdm.notebook import tqdm as fancy; list(fancy(range(2)))\nexcept ImportError as e: print('no widgets:', str(e).splitlines()[0])",
    "try: import ipywidgets\nexcept ImportError as e: print(e)",
    "%%html\n<p>cell magic</p>",
    "%%javascript\nvoid 0",
    "%%latex\n$y$",
    "%%markdown\n**bold**",
    "ProgressBar(3)",
    "Code('x = 1', language='python')",
    "display()",
    "display(pd.DataFrame({'u': [1]}).style.set_uuid('fixed').format('{:.1f}'))",
]

shell = [
    "print(sorted(k for k in globals() if not k.startswith('_')))",
    "print(__name__, '__file__' in globals(), __builtins__.__name__)",
    "ip = get_ipython()\nprint(type(ip).__name__, 'IPKernelApp' in ip.config, ip.user_ns is globals(), ip.execution_count)",
    "import sys, os, signal\nprint(sys.path.count(''), sys.path[0] == '', os.path.basename(os.getcwd()) != '', sys.stdin is not None, signal.getsignal(signal.SIGINT) is signal.default_int_handler)",
    "import inspect\ndef f(x):\n    'Doc.'\n    return x + 1\nprint(inspect.getsource(f)); f.__module__",
    "f?",
    "f??",
    "len?",
    "%time y = sum(range(10))",
    "%%time\nz = 3\nz",
    "%%capture kept\nprint('caught'); print('and', file=sys.stderr); display(5)\n7",
    "kept.stdout, kept.stderr, len(kept.outputs)",
    "%env FOO=bar",
    "%%writefile written.txt\na line",
    "%cat written.txt",
    "%pwd\nNone",
    "%who_ls str",
    "%precision 2\n3.14159",
    "%precision\nNone",
    "%load_ext autoreload\n%autoreload 2",
    "%%script cat\npassed through",
    "%%python\nprint('another interpreter')",
    "%history -n 1-2",
    "from dataclasses import dataclass\nimport pickle\n@dataclass\nclass P: x: int = 0\npickle.loads(pickle.dumps(P(3)))",
    "import multiprocessing as mp\ndef square(x): return x * x\nwith mp.get_context('fork').Pool(2) as pool: print(pool.map(square, [1, 2, 3]))",
    "p = mp.get_context('fork').Process(target=print, args=('from a forked child',), kwargs={'flush': True}); p.start(); p.join(); p.exitcode",
    "if (pid := os.fork()) == 0: os._exit(7)\nos.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])",
    "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(2) as pool: print(list(pool.map(square, range(4))))",
    "from joblib import Parallel, delayed\nParallel(n_jobs=2)(delayed(square)(i) for i in range(4))",
    "import numpy as np, random\nnp.random.seed(0); random.seed(0)\nprint(np.random.rand(2), random.random())",
    "np.geterr(), np.array([1.0]) / 0",
    "import gc\ngc.isenabled(), gc.get_threshold()[0] > 0",
    "sys.getrecursionlimit(), sys.gettrace() is None",
    "import threading\nthreading.current_thread() is threading.main_thread(), threading.active_count() >= 1",
    "import atexit\natexit.register(lambda: None) is not None",
    "from IPython.display import display\n[display] and get_ipython().display_formatter.format(1)",
    "get_ipython().run_cell_magic('time', '', '1')\nNone",
    "get_ipython().run_line_magic('alias_magic', 't time')",
    "get_ipython().system('echo system'); get_ipython().getoutput('echo got')",
    "get_ipython().set_next_input('x = 1')",
    "def gen():\n    yield 1\n_ = 5\nlist(gen())",
    "_",
    ("print('not run')", ["skip-execution"]),
    "%%writefile beside.py\nVALUE = 42",
    "import beside\nbeside.VALUE",
    "from __future__ import annotations\ndef g(x: Undefined): ...\ng.__annotations__",
    "def h(x: Undefined2): ...\nh.__annotations__",
    "match 3:\n    case 3: print('matched')",
    "[print(i) for i in range(2)];",
    "exec('hidden = 5'); hidden",
    "(lambda: locals())(), type(lambda: 0).__name__",
    "!!echo doubled",
    "%timeit -n1 -r1 -q pass",
    "%lsmagic\nNone",
    "%reset_selective -f ^hidden$\n'hidden' in globals()",
]

waiting = [
    "import asyncio\nawait asyncio.sleep(0.01)\n'awaited'",
    "async def later(x):\n    await asyncio.sleep(0.01)\n    return x\nawait asyncio.gather(later(1), later(2))",
    "task = asyncio.create_task(later('made in a cell without await'))",
    "await task",
    "asyncio.get_running_loop().is_running()",
    "try: asyncio.run(later(1))\nexcept RuntimeError as e: print(e)",
    "async def ticks():\n    for i in range(2): yield i\nasync for i in ticks(): print(i)",
    "[i async for i in ticks()]",
    "async with asyncio.timeout(5): print(await later('in time'))",
    "loop = asyncio.get_event_loop(); seen = []\nloop.call_soon(seen.append, 'called between cells')\nNone",
    "await asyncio.sleep(0.01); seen",
    "import contextvars\nv = contextvars.ContextVar('v', default='unset'); token = v.set('set')",
    "v.get()",
]

learning = [
    "import numpy as np, pandas as pd, torch\ntorch.manual_seed(0)\na = torch.randn(300, 300)\nprint((a @ a).sum().item())",
    "from sklearn.linear_model import LogisticRegression\nrng = np.random.default_rng(0); X = rng.normal(size=(200, 3)); y = X[:, 0] > 0\nmodel = LogisticRegression().fit(X, y)\nmodel",
    "from sklearn.ensemble import RandomForestClassifier\nRandomForestClassifier(20, n_jobs=2, random_state=0).fit(X, y).score(X, y)",
    "net = torch.nn.Linear(3, 1); loss = torch.nn.functional.mse_loss(net(torch.tensor(X, dtype=torch.float32))[:, 0], torch.tensor(y, dtype=torch.float32)); loss.backward(); loss",
    "import duckdb\nduckdb.sql('select 42 as answer')",
    "duckdb.sql('select sum(i) as s from range(1000000) t(i)').df()",
    "import lightgbm as lgb\nlgb.train({'verbose': -1, 'seed': 0, 'num_threads': 2, 'deterministic': True}, lgb.Dataset(X, y), 5).predict(X[:2]).round(4)",
    "from torch.utils.data import DataLoader, TensorDataset\nsum(len(b[0]) for b in DataLoader(TensorDataset(torch.arange(10)), batch_size=4, num_workers=1))",
    "pd.Series(pd.date_range('2024-01-01', periods=3)).dt.day_name().tolist()",
]

ENDINGS = {  # each is the second of three cells; the third must not run, unless plain Papermill runs it
    "zero division": "1 / 0",
    "deep": "def a(): b()\ndef b(): raise KeyError('deep')\na()",
    "chained": "try: 1 / 0\nexcept ZeroDivisionError as e: raise ValueError('two\\nlines ä') from e",
    "notes": "e = RuntimeError('noted'); e.add_note('a note'); raise e",
    "syntax": "x = = 1",
    "indentation": "if True:\nprint()",
    "names": "undefined_name",
    "recursion": "def r(): return r()\nr()",
    "own": "class Own(Exception):\n    def __str__(self): return 'own words'\nraise Own(1, 2)",
    "group": "raise ExceptionGroup('many', [ValueError(1), TypeError(2)])",
    "base": "class Base(BaseException): pass\nraise Base('base')",
    "interrupt": "raise KeyboardInterrupt",
    "stop iteration": "next(iter([]))",
    "empty": "raise Exception",
    "exit 0": "import sys; sys.exit(0)",
    "exit 1": "import sys; sys.exit(1)",
    "exit text": "raise SystemExit('enough')",
    "exit none": "raise SystemExit",
    "exit()": "print('shown'); exit()",
    "input": "input('your name? ')",
    "getpass": "import getpass; getpass.getpass()",
    "breakpoint": "breakpoint()",
    "no magic": "%nosuchmagic",
    "no cell magic": "%%nosuchmagic\n1",
    "magic fails": "%run nosuch.py",
    "bash fails": "%%bash\necho out\nexit 3",
    "outputs first": "print('before'); display(3); import sys; print('err', file=sys.stderr); assert False, 'said'",
    "in async": "async def f(): raise ValueError('async')\nawait f()",
    "bad repr": "class B:\n    def __repr__(self): raise ValueError('repr')\nB()",
    "bad html": "class Bad:\n    def _repr_html_(self): raise ValueError('cannot')\n    def __repr__(self): return 'still there'\nBad()",
    "import": "import no_such_module",
    "from file": "import json; json.loads('{')",
    "pandas": "import pandas as pd; pd.DataFrame({'a': [1]})['b']",
    "long": "raise ValueError('x' * 5000)",
    "allowed": ("1 / 0", ["raises-exception"]),
    "late": "import threading, time\nthreading.Timer(0.2, print, ['from a thread, later']).start()\ntime.sleep(0.5); 1 / 0",
}

values = ["# defaults\ntext = 'default'; count = 1; share = 0.5; flag = False; nothing = None; many = []; table = {}",
          "for name in ('text', 'count', 'share', 'flag', 'nothing', 'many', 'table'): print(name, type(globals()[name]).__name__, repr(globals()[name]))"]
GIVEN = {"text": "quo\"te 'n' \\ back\nline ä {x} $y", "count": -(10 ** 20), "share": 1e-300, "flag": True, "nothing": None,
         "many": [1, "two", [3.5, None, {"k": False}]], "table": {"a": {"b": [1, {"c": "d"}]}, "ü": "ß"}}

NOTEBOOKS = {"printing": printing, "showing": showing, "shell": shell, "waiting": waiting, "learning": learning,
             "untyped parameters": [(values[0], ["parameters"]), values[1]], "no parameters cell": values,
             **{f"ends: {k}": ["print('first')", v, "print('last')"] for k, v in ENDINGS.items()}}
PARAMETERS = {"untyped parameters": GIVEN, "no parameters cell": {"given": 3}}

# ---- where the house is better on purpose. A notebook that ends so must fail, with these words
NOBODY = "nobody to ask"
BETTER = {  # for kernels of our own: {notebook: (why, what the message says; "": it ends well)}
    "ends: input": ("papermill names the front end, not what to do", NOBODY), "ends: getpass": ("the same", NOBODY),
    "ends: breakpoint": ("papermill passes over it without a word", NOBODY),
    "ends: exit()": ("papermill runs on in a kernel that was told to end", ""),
    "ends: exit 0": ("papermill marks the cell as failed, and the notebook as done", ""), "ends: exit none": ("the same", ""),
    "ends: allowed": ("papermill runs all cells, and fails then", ""),
}
MORE = ("f?", "f??", "len?", "import os, subprocess", "os.write(1,")  # so begin cells that print what papermill loses: help, and what is written below Python


def written(name, cells):
    "A notebook as a stranger would have saved it."
    out = []
    for i, c in enumerate(cells):
        source, tags = c if isinstance(c, tuple) else (c, [])
        kind = "markdown" if source.startswith("md:") else "code"
        out.append({"cell_type": kind, "id": f"cell-{i}", "metadata": {"tags": tags} if tags else {}, "source": source.removeprefix("md:"),
                    **({"outputs": [{"output_type": "stream", "name": "stdout", "text": "of an earlier run"}], "execution_count": 99} if kind == "code" else {})})
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": out, "metadata": {"kernelspec": spec, "mine": name}, "nbformat": 4, "nbformat_minor": 5}


def ended(engine, source, target, parameters):
    "Through Papermill, in a process of its own: how it ended, in words."
    os.chdir(Path(source).parent)
    import papermill
    try: papermill.execute_notebook(source, target, parameters, engine_name=engine, progress_bar=False)
    except papermill.PapermillExecutionError as e: return f"{e.ename}: {e.evalue}", e.exec_count
    except Exception as e: return f"{type(e).__name__}: {e}", None
    return "", None


def typed(source, target, parameters):
    "Through `slml exec`: how it ended."
    import yaml
    Path(source).with_name("given.yaml").write_text(yaml.safe_dump(parameters), encoding="utf-8")
    given = ["-f", "given.yaml"] if parameters else []
    done = subprocess.run([sys.executable, "-c", "import sys; from slml_nb.cli import main; sys.exit(main())", "exec", source, target, *given], cwd=Path(source).parent,
                          env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def forked(jobs):
    "Notebooks in kernels forked from one template, in turn: how each ended."
    from slml_nb.engine import CellFailed, Recorder, inject, run_cells
    from slml_nb.kernel import WarmKernels
    ends = []
    with WarmKernels() as kernels:
        for source, target, parameters in jobs:
            nb = json.loads(Path(source).read_text())
            if parameters: inject(nb, parameters)
            record, kernel, end = Recorder(nb, target), kernels.start(cwd=Path(source).parent), ("", None)
            record.start(parameters=parameters)
            try: run_cells(record, kernel)
            except CellFailed as e: end = f"{e.name}: {e.message}", nb["cells"][e.index]["execution_count"]
            finally: record.finish(), kernel.stop()
            ends.append(end)
    return ends


def has_exec():
    from slml_nb import cli
    return "exec" in cli.COMMANDS


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "Every notebook, every way: {way: {name: (notebook or None, how it ended)}}."
    place, found = tmp_path_factory.mktemp("foreign"), {}
    ways = {"papermill": None, "engine": "slml"}
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:  # half of the time a notebook waits for its kernel to begin or to end
        jobs = {}
        for way in ["forked", *ways, *(["exec"] if has_exec() else [])]:  # the longest job first
            todo = []
            for i, (name, cells) in enumerate(NOTEBOOKS.items()):
                folder = place / way / str(i)
                folder.mkdir(parents=True)
                (folder / "in.ipynb").write_text(json.dumps(written(name, cells)))
                todo.append((str(folder / "in.ipynb"), str(folder / "out.ipynb"), PARAMETERS.get(name, {})))
            if way == "forked": jobs[way] = [pool.submit(forked, todo)]
            else: jobs[way] = [pool.submit(typed, *t) if way == "exec" else pool.submit(ended, ways[way], *t) for t in todo]
        for way in jobs:
            ends = [j.result() for j in jobs[way]] if way != "forked" else jobs[way][0].result()
            files = [place / way / str(i) / "out.ipynb" for i in range(len(NOTEBOOKS))]
            found[way] = {name: (json.loads(f.read_text()) if f.exists() else None, how) for name, f, how in zip(NOTEBOOKS, files, ends)}
    return found


# ---- what is compared

NOISE = [(r"\x1b\[[0-9;]*m", ""), (r"0x[0-9a-f]{6,}", "0x"), (r"/tmp/ipykernel_\d+/\d+\.py|<ipython-input-[^>]*>|/tmp/slml[^\s:]*\.py", "<cell>"),
         (r"(\d\d:\d\d<\d\d:\d\d|\d\d:\d\d<\?|\?it/s|[\d.]+(it/s|s/it))", "T"), (r"[\d.e+]+ [mµμun]?s\b", "T"), (r"(?<=T\]) +", ""), (r"\b\d{5,}\.py\b", "<cell>"), (r"\d{4}-\d\d-\d\dT[\d:.]+", "DATE"), (r"/tmp/pytest-[^\s'\"]*/(\d+)", "HERE"), (r"Thread-\d+", "Thread-N"),
         (r"<ipython-\S*>", "<cell>")]


def plain(text):
    "Text without what differs from run to run: addresses, file names of cells, times."
    text = "".join(text) if isinstance(text, list) else text
    for pattern, by in NOISE: text = re.sub(pattern, by, text)
    return text


def outputs(cell):
    "What a cell shows; printed text between two outputs is one text a stream, since the order of the two streams is left to chance."
    out = []
    for o in cell.get("outputs", []):
        o = {k: v for k, v in o.items() if k != "transient"}
        if o["output_type"] == "stream":
            if not out or out[-1]["output_type"] != "printed": out.append({"output_type": "printed"})
            out[-1][o["name"]] = out[-1].get(o["name"], "") + plain(o["text"])
        elif o["output_type"] == "error": out.append({**o, "evalue": plain(o["evalue"]), "traceback": _traceback(o["traceback"])})
        else: out.append({**o, "data": {k: plain(v) if isinstance(v, (str, list)) and "json" not in k else v for k, v in o["data"].items()}})
    return out


def _traceback(lines):
    "Which cells it leads through, and how it ends. Which lines around a line it shows depends on the file name that a cell is given."
    text = plain("\n".join(lines))
    return sorted(set(re.findall(r"Cell In\[\d+\]", text))), text.strip().split("\n\n")[-1] if "Traceback" in text else text


def cells_of(nb):
    "The cells without those that Papermill or the house has put in."
    def _added(c): return {"papermill-error-cell-tag", "injected-parameters"} & set(c["metadata"].get("tags", []))
    return [c for c in nb["cells"] if not _added(c)]


def differences(theirs, ours, more):
    "Where two executed notebooks differ, cell by cell, for a person."
    found = []
    if (theirs is None) != (ours is None): return [f"saved: papermill {theirs is not None}, here {ours is not None}"]
    a, b = cells_of(theirs), cells_of(ours)
    if len(a) != len(b): return [f"{len(a)} cells there, {len(b)} here"]
    for i, (x, y) in enumerate(zip(a, b)):
        for what, of in (("source", lambda c: "".join(c["source"])), ("outputs", outputs), ("execution_count", lambda c: c.get("execution_count")), ("id", lambda c: c.get("id")),
                         ("tags", lambda c: c["metadata"].get("tags", [])), ("status", lambda c: c["metadata"].get("papermill", {}).get("status")),
                         ("exception", lambda c: bool(c["metadata"].get("papermill", {}).get("exception")))):
            here = of(y)
            if what == "outputs" and more and "".join(x["source"]).startswith(MORE): here = [o for o in here if o["output_type"] != "printed"]
            if of(x) != here: found.append(f"cell {i} ({''.join(x['source'])[:60]!r}), {what}:\n   papermill {_short(of(x))}\n   here      {_short(here)}")
    for key in ("kernelspec", "mine"):
        if theirs["metadata"].get(key) != ours["metadata"].get(key): found.append(f"metadata.{key}: papermill {theirs['metadata'].get(key)}, here {ours['metadata'].get(key)}")
    for key in ("parameters", "exception"):
        if theirs["metadata"]["papermill"].get(key) != ours["metadata"].get("papermill", {}).get(key):
            found.append(f"metadata.papermill.{key}: papermill {theirs['metadata']['papermill'].get(key)}, here {ours['metadata'].get('papermill', {}).get(key)}")
    return found


def _short(value, most=700):
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= most else f"{text[:most // 2]} … {text[-most // 2:]}"


@pytest.mark.parametrize("way", ["engine", "forked", "exec"])
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_output_as_papermill_leaves_it(ran, way, name):
    if way not in ran: pytest.skip("slml has no exec yet")
    (theirs, how), (ours, here) = ran["papermill"][name], ran[way][name]
    if not name.startswith("ends: "): assert not how[0], f"plain papermill: {how}"
    if way != "engine" and name in BETTER: return better(name, ours, here)
    if name == "ends: exit()" and "DeadKernelError" in how[0] + here[0]:  # Jupyter's kernel lives on for a tenth of a second: on a busy machine not until the next cell, whoever runs it
        assert [outputs(c) for c in cells_of(theirs)[:2]] == [outputs(c) for c in cells_of(ours)[:2]]
        return
    found = differences(theirs, ours, way != "engine")
    if way != "exec":
        said_more = plain(how[0]) == "CellExecutionError: " and here[0]  # what was wrong stands only in its exception's traceback
        if plain(here[0]) != plain(how[0]) and not said_more or here[1] != how[1]: found.append(f"ended: papermill {how}, here {here}")
    else:
        if here[0] != (1 if how[0] else 0): found.append(f"ended: papermill {how}, here exit code {here}")
        if theirs["metadata"]["language_info"] != ours["metadata"].get("language_info"): found.append(f"language_info: {ours['metadata'].get('language_info')}")
        if "Traceback (most recent" in here[1]: found.append(f"a traceback of the command itself: {here[1][-1500:]}")
    assert not found, f"{len(found)} differences\n" + "\n".join(found)


def better(name, nb, how):
    "What is asked of the house where it does otherwise."
    words = BETTER[name][1]
    last, middle = cells_of(nb)[2], cells_of(nb)[1]
    assert bool(how[0]) == bool(words), how
    assert words in " ".join(map(str, how)), how
    if words: assert words in json.dumps(outputs(middle)) and middle["metadata"]["papermill"]["status"] == "failed", outputs(middle)
    assert bool(last["outputs"]) == (name == "ends: allowed"), last
