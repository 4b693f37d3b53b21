"""Every stage notebook under the plain `papermill` command, Papermill's own engine, its parameters given by hand."""
import json, os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slml_nb.core import load_params, mask
from slml_nb.graph import plan
from slml_nb.stage import made_in, sample_folder, shipped_notebooks

root, bin = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
MACHINE = {"p50_ms", "p99_ms", "seconds", "usd_per_1000"}  # measured, so never the same twice


@pytest.mark.slow
def test_the_lifecycle_by_hand(tmp_path):
    "A dozen commands, each after those whose artifacts it needs, make what `slml run` made: the same artifacts, with the same columns and as many rows."
    graph, values = plan(load_params(root / "params" / "sample.yaml"))
    books, over = shipped_notebooks(), {}
    assert len(graph.order) >= 12
    def by_hand(stage):
        if any(over[b].result() for b in (*graph.before(stage), *filter(None, [graph.gate(stage)]))): return f"{stage}: what it needs was not made"
        given = json.dumps({**mask(values[stage]), "run": str(tmp_path)})
        done = subprocess.run([bin / "papermill", books[stage], tmp_path / f"{stage}.ipynb", "-y", given, "--no-progress-bar"], cwd=root, capture_output=True, text=True)
        return done.returncode and f"{stage}: {done.stderr[-2000:]}"
    with ThreadPoolExecutor(2) as two:  # in the order of the graph, so nobody waits for one that has not begun
        for stage in graph.order: over[stage] = two.submit(by_hand, stage)
    failed = [said for f in over.values() if (said := f.result())]
    assert not failed, "\n".join(failed)
    by_hand, sample = made_in(tmp_path), made_in(sample_folder())
    assert set(by_hand) == set(sample), "slml_nb/sample is stale: make sample"
    for name, record in by_hand.items():
        kept = sample[name]
        assert (record["kind"], record.get("columns")) == (kept["kind"], kept.get("columns")), f"{name}: slml_nb/sample is stale: make sample"
        if name in ("raw", "clean", "splits", "features"): assert record["rows"] == kept["rows"], name
    verdicts = [json.loads((Path(m["verdict"]["root"]) / m["verdict"]["file"]).read_text()) for m in (by_hand, sample)]
    assert verdicts[0]["rows_test"] == verdicts[1]["rows_test"]
    assert (tmp_path / "report.html").is_file()


def test_parameters_that_arrive_as_text(tmp_path):
    "As a remote job sends them: `-r` makes each a string. The declared types make numbers of them again, or refuse."
    nb = json.loads(shipped_notebooks()["sample"].read_text())
    nb["cells"] = [c for c in nb["cells"] if not "".join(c["source"]).startswith("#| test")]  # a job leaves them out, too
    (tmp_path / "sample.ipynb").write_text(json.dumps(nb))
    def sample(**given):
        words = [w for k, v in given.items() for w in ("-r", k, v)]
        return subprocess.run([bin / "papermill", tmp_path / "sample.ipynb", tmp_path / "o.ipynb", *words, "--no-progress-bar"], cwd=root, capture_output=True, text=True, env={**os.environ, "IN_TEST": "1"})
    done = sample(fraction="0.5", shares='{"train": 0.8, "valid": 0.1, "test": 0.1}', key="flight, tailnum")
    assert done.returncode == 0, done.stderr[-2000:]
    done = sample(fraction="half")
    assert done.returncode != 0 and "fraction is 'half', but it is declared float: give a number" in done.stderr


SLOW_READER = """
import sys, time, papermill
from slml_nb import engine
Client = engine._client()
def slow(self, msg, cell, index, real=Client.process_message):
    if msg["msg_type"] == "stream": time.sleep(1.2)
    return real(self, msg, cell, index)
Client.process_message = slow
papermill.execute_notebook(sys.argv[1], sys.argv[2], engine_name="slml", progress_bar=False, **eval(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("given, word", [({}, ""), ({"iopub_timeout": 1}, "raise iopub_timeout")], ids=["by itself", "as asked for"])
def test_a_busy_machine_loses_no_output(tmp_path, given, word):
    "nbclient gives up when what a cell has printed is not read four seconds after its end; here the reader needs longer."
    cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "outputs": [], "execution_count": None, "source": s} for i, s in enumerate(["for i in range(5): print(i, flush=True)", "print('last')"])]
    source, made = tmp_path / "in.ipynb", tmp_path / "out.ipynb"
    source.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}, "nbformat": 4, "nbformat_minor": 5}))
    done = subprocess.run([sys.executable, "-c", SLOW_READER, source, made, repr(given)], capture_output=True, text=True, cwd=tmp_path)
    said = ["".join(o["text"]) for c in json.loads(made.read_text())["cells"] for o in c["outputs"] if o["output_type"] == "stream"]
    if word: assert done.returncode != 0 and word in done.stderr, done.stderr[-1000:]
    else: assert done.returncode == 0 and said == ["0\n1\n2\n3\n4\n", "last\n"], done.stderr[-2000:]
