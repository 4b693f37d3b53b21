"""Measures what the project promises, side by side with plain Papermill, and writes bench/results.md.

    make bench                      everything: about 25 minutes on two cores; run nothing beside it
    python bench/run.py --only start,demo --rounds 3
"""
import argparse, json, os, platform, shutil, statistics as st, subprocess, sys, tempfile, time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
bin = Path(sys.executable).parent
sys.path.insert(0, str(root))


def clock(command, cwd=root, ok=(0, 3), **kw):
    "Seconds of one whole command; what it printed is kept for the message when it fails."
    start = time.perf_counter()
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, **kw)
    seconds = time.perf_counter() - start
    if done.returncode not in ok: sys.exit(f"{' '.join(map(str, command))[:300]} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return seconds


def row(name, values, goal="", unit="s", digits=2):
    "One line of the table: median, min, max, and whether the goal is met."
    values = sorted(values)
    median = st.median(values)
    met = "" if goal == "" else ("yes" if median <= goal else "**no**")
    return f"| {name} | {median:.{digits}f} | {values[0]:.{digits}f} | {values[-1]:.{digits}f} | {unit} | {len(values)} | {goal} | {met} |"


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
    "The demo, again, and the same notebooks by the plain papermill command, in turn."
    first, again, plain, outside, overhead, shares = [], [], [], [], [], {}
    for _ in range(rounds):
        place = project()
        first.append(clock([bin / "slml", "run", f"params/{params}.yaml"], place))
        again += [clock([bin / "slml", "run", f"params/{params}.yaml"], place) for _ in range(1)]
        folders = sorted(place.glob("runs/*/*/run.json"))
        record = json.loads(folders[0].read_text())
        outside += [s["outside"] for s in record["stages"].values() if "outside" in s]
        plain.append(papermill(record, place))
        service = json.loads(next(place.glob("runs/.store/**/service.json")).read_text())
        for k, v in service.items():
            if isinstance(v, (int, float)): shares.setdefault(k, []).append(v)
        for k, v in (service.get("share") or {}).items(): shares.setdefault(f"share of {k}", []).append(v)
        shutil.rmtree(place)
    ratio = [p / f for p, f in zip(plain, first)]
    rows = [row(f"`slml run params/{params}.yaml`, nothing there yet", first, 90), row("the same again, nothing changed", again, 3),
            row("a stage outside its own cells (kernel, sockets, saving)", outside, 1.5),
            row("peer: the same twelve notebooks, `papermill` one after the other", plain), row("papermill / slml, pair by pair", ratio, unit="×")]
    rows += [row("one `/predict` over loopback, p50", shares["p50_ms"], 3, "ms"), row("one `/predict` over loopback, p99", shares["p99_ms"], unit="ms")]
    return rows + [row(k, v, unit="fraction") for k, v in shares.items() if k.startswith("share of")]


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


def machine():
    memory = next((int(l.split()[1]) // 2**20 for l in open("/proc/meminfo") if l.startswith("MemTotal")), 0)
    model = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores ({model}), {memory} GB, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--only", default="start,demo")
    p.add_argument("--out", default=str(root / "bench" / "results.md"))
    a = p.parse_args()
    titles = {"start": (start, "Before anything happens"), "demo": (demo, "The demo: 336,776 flights, twelve notebooks")}
    text = [f"# Figures\n\nMeasured by `make bench` on {machine()}.\nMedians with minimum and maximum; the machine is shared and noisy, so the ratios say more than the seconds."]
    for name in a.only.split(","):
        measure, title = titles[name]
        text.append(f"## {title}\n\n{HEAD}\n" + "\n".join(measure(a.rounds)))
        print(text[-1], flush=True)
    notes = root / "bench" / "notes.md"
    if notes.exists(): text.append(notes.read_text().strip())
    Path(a.out).write_text("\n\n".join(text) + "\n")


if __name__ == "__main__": main()
