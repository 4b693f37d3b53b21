"""The laws of the house, for every notebook at once."""
import ast, builtins, json, re, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root / "nbs").glob("[0-9][0-9]_*.ipynb"))
HEAVY = {"pandas", "numpy", "sklearn", "torch", "matplotlib", "duckdb", "boto3", "sagemaker", "pyarrow", "lightgbm", "fastapi",
         "uvicorn", "onnx", "onnxruntime", "papermill", "nbclient", "nbformat", "IPython", "jupyter_client", "scipy"}
NUMPY_IS_FINE = {"model", "serve"}  # rooms whose functions are numpy through and through


def cells(path): return [dict(c, source="".join(c["source"])) for c in json.loads(path.read_text())["cells"]]
def exported(path): return [c["source"] for c in cells(path) if c["cell_type"] == "code" and re.search(r"^#\|\s*exports?\b", c["source"], re.M)]
def parameter_cells(path): return [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
def module(path): return path.stem.split("_", 1)[1]


def front(path):
    from slml_nb.core import read_front_matter, read_notebook
    return read_front_matter(read_notebook(path))


def imported_rooms(source):
    "Names of the modules of slml_nb that a piece of code imports, wherever it does."
    for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M))):
        if isinstance(node, ast.ImportFrom) and (node.module or "") == "slml_nb": yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("slml_nb."): yield node.module.split(".")[1]
        elif isinstance(node, ast.Import): yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("slml_nb."))


jobs = [p for p in notebooks if parameter_cells(p)]
number = {module(p): int(p.name[:2]) for p in notebooks}
pytestmark = pytest.mark.skipif(not notebooks, reason="an installed package has no nbs/")
each_notebook = pytest.mark.parametrize("path", notebooks, ids=lambda p: p.stem)
each_job = pytest.mark.parametrize("path", jobs, ids=lambda p: p.stem)


@each_notebook
def test_imports_run_down_the_numbers(path):
    up = {r for source in exported(path) for r in imported_rooms(source) if number.get(r, 0) >= number[module(path)]}
    assert not up, f"{path.name} imports {up}: only lower numbers"


def test_a_stage_imports_from_the_platform_and_its_own_life():
    "Data flows between stages through artifacts: a job notebook imports other jobs from its own decade or lower only."
    for path in jobs:
        for source in exported(path):
            for room in imported_rooms(source): assert number.get(room, 0) // 10 <= number[module(path)] // 10, (path.name, room)


def test_imports_stay_light():
    "One fresh interpreter; what each module adds to sys.modules is charged to it."
    code = ("import importlib, json, sys, time\nout = {}\n"
            f"for name in {['', *sorted(number, key=number.get)]!r}:\n"
            "    before, t = set(sys.modules), time.perf_counter()\n"
            "    importlib.import_module('slml_nb' + ('.' + name if name else ''))\n"
            "    out[name] = [round(time.perf_counter() - t, 3), sorted({m.split('.')[0] for m in set(sys.modules) - before})]\n"
            "print(json.dumps(out))")
    out = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout)
    allowed = {name: {"numpy"} if name in NUMPY_IS_FINE else set() for name in out}
    heavy = {name: sorted((HEAVY - allowed[name]) & set(added)) for name, (_, added) in out.items()}
    assert not any(heavy.values()), {k: v for k, v in heavy.items() if v}


@each_notebook
def test_opens_with_title_and_sentence(path):
    found = front(path)
    assert found["title"] and found["sentence"], f"{path.name}: first cell is '# Title' and '> one sentence'"


@each_job
def test_job_contract(path):
    found, code = front(path), [c["source"] for c in cells(path) if c["cell_type"] == "code"]
    assert found.get("stage") == module(path), "front matter says - stage: NAME, the name of the module"
    assert found["makes"], "front matter says what the stage makes"
    assert len(parameter_cells(path)) == 1
    start = next(i for i, c in enumerate(code) if c == parameter_cells(path)[0]["source"])
    job = "\n".join(code[start:])
    for call in ("stage.figure(", "stage.table_out(", "stage.done()"): assert call in job, f"{path.name}: its job never calls {call}"
    for artifact in found["makes"]: assert re.search(rf"""stage\.save\(\s*['"]{artifact}['"]""", job), f"{path.name} makes {artifact}, saves it never"
    assert not re.search(r"stage\.(save|figure|table_out|metric|finding)\(", job.rpartition("stage.done()")[2]), "nothing is said after stage.done()"


def bound_by(tree):
    "Names that a piece of code gives a value to."
    for n in ast.walk(tree):
        if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load): yield n.id
        elif isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)) and n.name: yield n.name
        elif isinstance(n, ast.arg): yield n.arg
        elif isinstance(n, (ast.Import, ast.ImportFrom)): yield from ((a.asname or a.name).split(".")[0] for a in n.names)


def used_at_once(node):
    "Names that are read when a cell runs; bodies of functions run later."
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load): yield child.id
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or child in getattr(node, "decorator_list", []): yield from used_at_once(child)


@each_job
def test_a_batch_run_needs_only_what_it_runs(path):
    "Tests and examples are left out by `slml run`: no other cell may use a name that only they have defined so far."
    from slml_nb.engine import left_out
    bound, out = set(dir(builtins)) | {"get_ipython", "display"}, left_out(cells(path))
    for source in [c["source"] for i, c in enumerate(cells(path)) if c["cell_type"] == "code" and i not in out]:
        tree = ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M))
        bound |= set(bound_by(tree))
        assert not (missing := set(used_at_once(tree)) - bound), f"{path.name} uses {missing}, which only a test or an example defines: {source[:200]}"


@each_job
def test_parameters_are_typed_and_explained(path):
    from slml_nb.core import coerce, read_notebook, read_parameters
    source = parameter_cells(path)[0]["source"]
    assert all(isinstance(n, ast.AnnAssign) for n in ast.parse(source).body), "only lines of `name: type = default  # comment`"
    for p in read_parameters(read_notebook(path), path.name).values():
        assert p.comment, f"{path.name}: parameter {p.name} has no comment"
        assert coerce(p.default, p.type) == p.default, f"{path.name}: the default of {p.name} is not {p.type}"
    assert p.name == "run", "the last parameter is run"


def test_graph_is_complete_and_acyclic():
    maker, needs = {}, {}
    for path in jobs:
        found = front(path)
        needs[found["stage"]] = found["needs"]
        for artifact in found["makes"]:
            assert artifact not in maker, f"{artifact} is made by {maker[artifact]} and {found['stage']}"
            maker[artifact] = found["stage"]
    missing = {(s, a) for s, wanted in needs.items() for a in wanted if a not in maker}
    assert not missing, f"needed, made by nobody: {missing}"
    order, left = [], dict(needs)
    while left:
        ready = [s for s in left if all(maker[a] in order for a in left[s])]
        assert ready, f"a circle among {sorted(left)}"
        order += ready
        for s in ready: del left[s]
    for stage in needs:  # numbers are the order of life
        for a in needs[stage]: assert number[maker[a]] < number[stage], f"{stage} needs {a}, which {maker[a]} makes later"


def committed():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    names = listed.stdout.split("\n") if listed.returncode == 0 else []
    return [root / n for n in names if n and (root / n).is_file()]


def test_no_absolute_paths_of_a_machine():
    machine = re.compile(r"(?<![\w.])/(?:home|root|Users|work|mnt|private)/[\w.]+|[A-Z]:\\\\Users")
    for path in committed():
        if path.suffix in (".ipynb", ".py", ".yaml", ".yml", ".md", ".ini", ".txt", ".json", ".html", ".svg", "") and path != Path(__file__):
            try: found = machine.search(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError: continue
            assert not found, f"{path.relative_to(root)} holds {found[0]}"


@each_notebook
def test_no_outputs(path):
    noisy = [c["id"] for c in cells(path) if c["cell_type"] == "code" and (c["outputs"] or c["execution_count"])]
    assert not noisy, f"{path.name}: cells {noisy} have outputs"


def test_no_pickle():
    for path in notebooks:
        for source in exported(path): assert not re.search(r"\b(pickle|joblib|cloudpickle)\.", source), path.name
