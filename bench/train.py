"""Rows a second of training, in one process after the other: an MLP 20-128-128-1, 1,024 rows a step, from one Parquet file, shuffled.

All ways have the same network, the same fused AdamW and the same clipping; they differ in where a batch comes from and in the loop around the step:

- ours: `slml_nb.train`, rows in memory, index batches; and streamed, row groups of the file in random order, shuffled in a buffer, in every pass;
- ceiling: our loop, fed slices of contiguous tensors in the order of the file;
- DataLoader: our loop, fed by `DataLoader(TensorDataset(…), shuffle=True)` with its defaults;
- bf16: ours with 8,192 rows a step, beside the same in fp32;
- Lightning: its `Trainer`, fed our batches; in an environment of its own, which borrows torch from this one.

    python bench/train.py            once, as JSON
"""
import json, math, os, statistics as st, subprocess, sys, tempfile, time
from pathlib import Path

here = Path(__file__).resolve().parent
root = here.parent
sys.path[:0] = [str(root)]
ROWS, INPUTS, BATCH, PASSES = 300_000, 20, 1024, 3


def make(path, rows=ROWS):
    "Numbers and a target that depends on them."
    import duckdb
    columns = ", ".join(f"hash(range * {2 * i + 3})::double / 18446744073709551615 * 3.46 - 1.73 as x{i}" for i in range(INPUTS))
    duckdb.sql(f"copy (select *, abs(x0) + x1 * x2 as target from (select range as row_id, 'train' as split, {columns} from range({rows}))) to '{path}' (format parquet, row_group_size 61440)")


def parts(path, stream="off"):
    "What a training is made of: encoder, scale, edges, source."
    from slml_nb.sql import connect, register
    from slml_nb.train import DEFAULTS, open_training
    con = connect()
    register(con, "features", path)
    recipe = {"classes": [], "features": [{"name": f"x{i}", "kind": "numeric"} for i in range(INPUTS)]}
    return open_training(con, recipe, {**DEFAULTS, "loss": "mse", "bins": 0, "stream": stream, "buffer": 131072}, "cpu", Path(path).parent)


def training(path, source=None, stream="off", **more):
    "A training at its first step."
    import torch
    from slml_nb.train import DEFAULTS, Training, build_network
    encoder, scale, edges, own, _ = parts(path, stream)
    torch.manual_seed(0)
    network = build_network(INPUTS, [], 1, [128, 128], 0.0, edges, *scale)
    none = torch.zeros(0, INPUTS), torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0)
    return Training(network, source(own) if source else own, none, {**DEFAULTS, "loss": "mse", "batch": BATCH, "epochs": PASSES + 1, **more})


class Contiguous:
    "Slices in the order of the file."
    def __init__(self, own): self.data, self.rows = own.data, own.rows
    def batches(self, epoch, batch, seed, start=0, share=(0, 1)):
        from slml_nb.train import slices
        return slices(self.data, batch)


class Loader:
    "PyTorch's own, with its defaults."
    def __init__(self, own):
        from torch.utils.data import DataLoader, TensorDataset
        numeric, self.none, y = own.data
        self.rows, self.loader = own.rows, DataLoader(TensorDataset(numeric, y), batch_size=BATCH, shuffle=True)
    def batches(self, epoch, batch, seed, start=0, share=(0, 1)):
        for numeric, y in self.loader: yield len(y), numeric, self.none[:len(y)], y


def rate(t):
    "Rows a second: the median of a few passes, after one that does not count."
    seconds = []
    for _ in range(PASSES + 1):
        start = time.perf_counter()
        t.one_epoch()
        seconds.append(time.perf_counter() - start)
    if not math.isfinite(t.history[-1]["train"]) or t.history[-1]["train"] > 0.9 * t.history[0]["train"]: sys.exit(f"it does not learn: {t.history}")
    return t.source.rows / st.median(seconds[1:])


def lightning(path):
    "Rows a second of Lightning's Trainer over our batches."
    import logging, warnings, torch
    import lightning as L
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch"): logging.getLogger(name).setLevel(logging.ERROR)
    t, starts = training(path), []

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self): starts.append(time.perf_counter()); return iter(t.source.batches(len(starts), BATCH, 0))

    class Module(L.LightningModule):
        def __init__(self): super().__init__(); self.network = t.network
        def training_step(self, batch, i): return torch.nn.functional.mse_loss(self.network(batch[1], batch[2])[:, 0], batch[3])
        def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    trainer = L.Trainer(max_epochs=PASSES + 1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0)
    trainer.fit(Module(), torch.utils.data.DataLoader(Batches(), batch_size=None))
    starts.append(time.perf_counter())
    return t.source.rows / st.median([b - a for a, b in zip(starts[1:], starts[2:])])


def peer():
    "The Python of an environment with Lightning; None where it cannot be made. Torch and the rest are borrowed from ours."
    import sysconfig
    venv = here / ".peers" / "lightning"
    if not (venv / "done").exists():
        print("building bench/.peers/lightning: half a minute, once", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        next(venv.glob("lib/python*/site-packages")).joinpath("borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        done = subprocess.run([venv / "bin/python", "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", root / "constraints.txt", "lightning==2.6.6"], capture_output=True, text=True)
        if done.returncode: return print(done.stderr[-2000:], file=sys.stderr)
        (venv / "done").touch()
    return venv / "bin" / "python"


def quality(path, seeds=5):
    "R² on rows that were not learnt from, in fp32 and in bf16, a few seeds each."
    import torch
    from slml_nb.train import InMemory, Training, DEFAULTS, apply_network, build_network
    encoder, scale, edges, own, _ = parts(path)
    cut, found = own.rows // 5, {"fp32": [], "bf16": []}
    held, learnt = [t[:cut] for t in own.data], [t[cut:] for t in own.data]
    for precision in found:
        for seed in range(seeds):
            torch.manual_seed(seed)
            network = build_network(INPUTS, [], 1, [128, 128], 0.0, edges, *scale)
            t = Training(network, InMemory(*learnt), [x[:0] for x in held], {**DEFAULTS, "loss": "mse", "batch": 8192, "epochs": 12, "seed": seed, "precision": precision})
            for _ in range(12): t.one_epoch()
            said = apply_network(network.eval(), *held[:2])[:, 0]
            found[precision].append(1 - float(((said - held[2]) ** 2).mean() / held[2].var()))
    return found


def alone(way, path, python=sys.executable):
    "One way in a process of its own, so that none warms up for the next."
    done = subprocess.run([python, __file__, way, path], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    if done.returncode: sys.exit(f"{way} ended with {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


WAYS = {"ours": lambda p: rate(training(p)), "streamed": lambda p: rate(training(p, stream="on")), "ceiling": lambda p: rate(training(p, Contiguous)),
        "dataloader": lambda p: rate(training(p, Loader)), "lightning": lightning,
        "fp32, 8,192 rows a step": lambda p: rate(training(p, batch=8192)), "bf16, 8,192 rows a step": lambda p: rate(training(p, batch=8192, precision="bf16"))}


def measure() -> dict:
    "Rows a second of each way, and the seconds from Parquet to tensors; without Lightning where it cannot be installed."
    with tempfile.TemporaryDirectory(prefix="slml_bench_") as place:
        path = f"{place}/rows.parquet"
        make(path)
        python = peer()
        found = {way: alone(way, path, python if way == "lightning" else sys.executable) for way in WAYS if way != "lightning" or python}
        return {**found, "seconds to load": alone("load", path)}


def load(path):
    start = time.perf_counter()
    parts(path)
    return time.perf_counter() - start


if __name__ == "__main__":
    if len(sys.argv) > 1: print(json.dumps({**WAYS, "load": load, "quality": quality}[sys.argv[1]](sys.argv[2])))
    else: print(json.dumps(measure(), indent=1))
