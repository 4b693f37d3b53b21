"""Submitting a stage as a training job: the time that is our own, beside that of the calls to AWS.

The account is moto's, in a process of its own. Each run is a process of its own too, as `slml run --on` is one. A round is two of them: the first finds an empty cache folder, so SageMaker's SDK must be asked for a form
of the request; the second finds the form. Within a run, the first job pays for imports and clients, those after it do not. What counts as a call is the time between a request that leaves and its answer.

    python bench/submit.py 2        rounds
"""
import json, os, subprocess, sys, tempfile, threading, time
from pathlib import Path
from types import SimpleNamespace

root = Path(__file__).resolve().parent.parent
STAGES = ("baseline", "train", "evaluate", "features")  # one after the other, as jobs of one run


def serve():
    "moto, until our input is closed."
    import logging
    from moto.server import ThreadedMotoServer
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print("http://%s:%s" % server.get_host_and_port(), flush=True)
    sys.stdin.read()


class Calls:
    "Seconds between requests and their answers, and how many there were."

    def __init__(self):
        from botocore.httpsession import URLLib3Session
        self.seconds, self.count, self.lock, send = 0.0, 0, threading.Lock(), URLLib3Session.send
        def timed(session, request):
            start = time.perf_counter()
            try: return send(session, request)
            finally:
                with self.lock: self.seconds, self.count = self.seconds + time.perf_counter() - start, self.count + 1
        URLLib3Session.send = timed


def submit() -> list[dict]:  # stage, seconds, api_s, own_s, calls, sdk; the first includes what a run pays once
    "Submit some stages, as one run does."
    begun, calls = time.perf_counter(), Calls()
    from slml_nb.core import load_params
    from slml_nb.graph import key_of, key_parts, plan
    from slml_nb.jobs import Away
    from slml_nb.run import Run, store_of, task_of
    params = load_params(root / "params/sample.yaml")
    params.store, params.sagemaker = "s3://shop/slml", {"role": "arn:aws:iam::123456789012:role/slml", "region": "us-east-1"}
    graph, values = plan(params)
    away, found = Away(params, graph, "ml.m5.large"), []
    run = Run(params, graph, values, {}, folder=Path(os.environ["SLML_CACHE"]) / "run")
    runner = SimpleNamespace(store=store_of(params), emit=lambda **event: None, kernels=SimpleNamespace(stopped=False))
    for stage in STAGES:
        node, seen = graph.nodes[stage], (calls.seconds, calls.count)
        parts = key_parts(node, values[stage], {"bench": {"sha256": os.urandom(8).hex()}}, {})  # inputs that nobody has had: a job of its own
        away.begin(runner, task_of(node, values[stage], run, graph, False), key_of(parts), parts)
        took, begun = time.perf_counter() - begun, time.perf_counter()
        found.append({"stage": stage, "seconds": took, "api_s": calls.seconds - seen[0], "own_s": took - calls.seconds + seen[0], "calls": calls.count - seen[1], "sdk": "sagemaker.train" in sys.modules})
    return found


def measure(
    rounds: int = 3,
) -> list[dict]:  # round, form (whether the machine has the form of the request), first (whether it was the run's first job), stage, seconds, api_s, own_s, calls, sdk (whether the SDK was imported)
    "The first round uploads the package; to the later ones it is there."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "SLML_"))}
    server = subprocess.Popen([sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        env |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": server.stdout.readline().strip()}
        subprocess.run([sys.executable, "-c", "import boto3; boto3.client('s3').create_bucket(Bucket='shop')"], env=env, check=True)
        found = []
        for i in range(rounds):
            with tempfile.TemporaryDirectory(prefix="slml_bench_") as cache:
                for form in (False, True):
                    done = subprocess.run([sys.executable, __file__, "submit"], cwd=root, env={**env, "SLML_CACHE": cache}, capture_output=True, text=True)
                    if done.returncode: sys.exit(f"submit: {done.stderr[-2000:]}")
                    found += [{"round": i, "form": form, "first": n == 0, **job} for n, job in enumerate(json.loads(done.stdout.splitlines()[-1]))]
        return found
    finally: server.stdin.close(), server.wait(timeout=30)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]: serve()
    elif sys.argv[1:2] == ["submit"]: print(json.dumps(submit()))
    else:
        for job in measure(*(int(a) for a in sys.argv[1:2])): print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in job.items()}))
