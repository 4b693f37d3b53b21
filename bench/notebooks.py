"""What bench/run.py measures with: notebooks made here, the same work for the house and for its peers; and the peers themselves."""
import json, subprocess, sys
from pathlib import Path

here = Path(__file__).resolve().parent

# twelve short notebooks: {name: those whose result it needs}
TWELVE = {"n01": [], "n02": ["n01"], "n03": ["n01"], "n04": ["n01"], "n05": ["n02", "n03"], "n06": ["n04"], "n07": ["n05", "n06"],
          "n08": ["n07"], "n09": ["n07"], "n10": ["n07"], "n11": ["n08", "n09"], "n12": ["n10", "n11"]}

WORK = """import pandas as pd
rows = pd.DataFrame({"group": [i % 7 for i in range(5000)], "value": [(i * 37 + start) % 101 for i in range(5000)]})
means = rows.groupby("group")["value"].mean()
answer = {"mean": float(means.mean()), "most": float(means.max())}
means"""


def notebook(*cells, first=""):
    "A notebook; a cell is its source, and the one that begins with '# parameters' is tagged so."
    def _cell(i, s):
        return {"cell_type": "code", "id": f"c{i}", "metadata": {"tags": ["parameters"]} if s.startswith("# parameters") else {}, "source": s, "outputs": [], "execution_count": None}
    prose = [{"cell_type": "markdown", "id": "prose", "metadata": {}, "source": first}] if first else []
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return json.dumps({"cells": prose + [_cell(i, s) for i, s in enumerate(cells)], "metadata": {"kernelspec": spec, "language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5})


def ours(place: Path, leave_out, extra=""):
    "The twelve as stages of a parameter set; its path."
    folder = place / "params"
    folder.mkdir(parents=True, exist_ok=True)
    for name, needs in TWELVE.items():
        first = f"# {name}\n\n> One of twelve.\n\n- stage: {name}\n- needs: {', '.join(f'from_{n}' for n in needs)}\n- makes: from_{name}"
        start = " + ".join(["factor", *(f'int(stage.json("from_{n}")["most"])' for n in needs)])
        (folder / f"{name}.ipynb").write_text(notebook('# parameters\nfactor: int = 1  # of the start\nrun: str = ""  # folder of the run',
                                                       f"from slml_nb.stage import Stage\nstage = Stage('{name}', run)\nstart = {start}", WORK,
                                                       f"stage.save('from_{name}', answer)\nstage.metric(**answer)\nstage.done()", first=first))
    stages = "".join(f"  {n}: {n}.ipynb\n" for n in TWELVE) + "".join(f"  {s}: false\n" for s in leave_out)
    (folder / "twelve.yaml").write_text(f"project: twelve\nstages:\n{stages}{extra}")
    return "params/twelve.yaml"


def plain(place: Path):
    "The twelve for plain Papermill: results are files in the working folder."
    place.mkdir(parents=True, exist_ok=True)
    for name, needs in TWELVE.items():
        start = " + ".join(["factor", *(f'int(json.load(open("{n}.json"))["most"])' for n in needs)])
        (place / f"{name}.ipynb").write_text(notebook("# parameters\nfactor = 1", f"import json\nstart = {start}", WORK, f"json.dump(answer, open('{name}.json', 'w'))"))


def ploomber(place: Path):
    "The twelve for Ploomber, with its parallel executor and two processes."
    place.mkdir(parents=True, exist_ok=True)
    tasks = ""
    for name, needs in TWELVE.items():
        start = " + ".join(["factor", *(f'int(json.load(open(upstream["{n}"]["data"]))["most"])' for n in needs)])
        (place / f"{name}.ipynb").write_text(notebook(f"# parameters\nupstream = {needs or None}\nproduct = None\nfactor = 1", f"import json\nstart = {start}", WORK, "json.dump(answer, open(product['data'], 'w'))"))
        tasks += f"  - source: {name}.ipynb\n    name: {name}\n    product: {{nb: out/{name}.ipynb, data: out/{name}.json}}\n"
    (place / "pipeline.yaml").write_text(f"executor:\n  dotted_path: ploomber.executors.Parallel\n  processes: 2\ntasks:\n{tasks}")


POOL = '''
import json, sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
import papermill


def one(name): papermill.execute_notebook(f"{name}.ipynb", f"{name}.out.ipynb", progress_bar=False); return name


if __name__ == "__main__":
    graph, done, running = json.loads(sys.argv[1]), set(), {}
    with ProcessPoolExecutor(2) as pool:
        while len(done) < len(graph):
            for n, needs in graph.items():
                if n not in done and n not in running and done.issuperset(needs): running[n] = pool.submit(one, n)
            for f in wait(running.values(), return_when=FIRST_COMPLETED)[0]: done.add(f.result()), running.pop(f.result())
'''


PEERS = {"lean": ["papermill==2.7.0", "ipykernel==7.4.0", "nbclient==0.11.0", "pandas==3.1.1"], "ploomber": ["ploomber==0.23.3", "papermill==2.7.0", "ipykernel==7.4.0", "pandas==3.1.1"]}


def peer(name):
    "An environment of a peer's own, built once in bench/.peers: the folder of its commands. Ploomber brings jupyterlab along, so Papermill's is apart."
    venv = here / ".peers" / name
    if not (venv / "done").exists():
        print(f"building bench/.peers/{name}: a minute, once", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        subprocess.run([venv / "bin/python", "-m", "pip", "install", "-qq", "--disable-pip-version-check", *PEERS[name]], check=True)
        (venv / "done").touch()
    return venv / "bin"
