"""An account of one's own for the tests: what AWS does with a training job, done on this machine.

`with peer() as p:` starts an HTTP server in front of moto. Requests to SageMaker are held against botocore's service model first (types, enums, patterns,
limits; moto takes `ml.banana`). A training job is recorded in moto and executed: its channels are downloaded as SageMaker does, /opt/ml is a mount of
its own, the entry point is process 1 of a namespace of its own, what it prints goes to CloudWatch Logs, checkpoints are kept in step with S3,
the status goes its way, and StopTrainingJob is SIGTERM, a while later SIGKILL. Switches: `fail`, `no_capacity`, `interrupt`, `expire`, `down`.
`Pipelines(p)` adds what moto lacks of pipelines and tuning jobs: executions whose steps are the calls that they stand for, and trials that are training jobs.

    with peer() as p:
        subprocess.run([...], env={**os.environ, **p.env})        # boto3, the SageMaker SDK and pyarrow talk to it
        job = p.run_job(request)                                  # what CreateTrainingJob does, for a request made elsewhere (a step of a pipeline)
        job.thread.join(); job.status, job.secondary, job.reason  # "Completed", "Completed", ""
        p.logs(job.name)                                          # what it printed

The image is a virtual environment that has what the job's requirements ask for, and what those ask for in turn, and nothing else: neither slml_nb, which must
come with the job, nor what happens to be installed here. A job without requirements sees all packages of this environment but slml_nb.
"""
import contextlib, json, os, re, signal, shutil, subprocess, sys, tarfile, tempfile, threading, time, venv
from pathlib import Path

REGION, ACCOUNT = "us-east-1", "123456789012"
CAPACITY = "CapacityError: Unable to provision requested ML compute capacity. Please retry using a different ML instance type."


def wrong(shape, value, where=""):
    "What a service's model has against a value: unknown members, missing ones, enums, patterns, limits."
    kind = shape.type_name
    if kind == "structure":
        if not isinstance(value, dict): return [f"{where}: not a structure"]
        found = [f"{where}.{m}: unknown" for m in value if m not in shape.members] + [f"{where}.{m}: missing" for m in shape.required_members if m not in value]
        return found + [w for m, v in value.items() if m in shape.members for w in wrong(shape.members[m], v, f"{where}.{m}")]
    least, most = (shape.metadata.get(k) for k in ("min", "max"))
    size = len(value) if kind in ("string", "list", "map") and value is not None else value
    if kind == "string" and not isinstance(value, str) or kind == "list" and not isinstance(value, list) or kind == "map" and not isinstance(value, dict): return [f"{where}: {value!r} is no {kind}"]
    if kind in ("integer", "long") and (isinstance(value, bool) or not isinstance(value, int)) or kind == "boolean" and not isinstance(value, bool): return [f"{where}: {value!r} is no {kind}"]
    found = [f"{where}: {value!r:.80} is outside of {least}..{most}"] if kind not in ("timestamp", "blob", "boolean") and (least is not None and size < least or most is not None and size > most) else []
    if kind == "string" and getattr(shape, "enum", None) and value not in shape.enum: found.append(f"{where}: {value!r} is none of its values")
    pattern = shape.metadata.get("pattern")
    if kind == "string" and pattern:
        with contextlib.suppress(re.error):  # a pattern of Java's that Python does not know
            if not re.fullmatch(pattern, value): found.append(f"{where}: {value!r:.120} does not match {pattern}")
    if kind == "list": found += [w for i, v in enumerate(value) for w in wrong(shape.member, v, f"{where}[{i}]")]
    if kind == "map": found += [w for k, v in value.items() for w in wrong(shape.key, k, f"{where}.{k}") + wrong(shape.value, v, f"{where}.{k}")]
    return found


def closure(lines):
    "The installed distributions that some requirements ask for, all the way down."
    from importlib.metadata import PackageNotFoundError, distribution
    from packaging.requirements import Requirement
    found, todo = {}, [(Requirement(line), {""}) for line in lines]
    while todo:
        r, extras = todo.pop()
        if r.marker and not any(r.marker.evaluate({"extra": e}) for e in extras): continue
        try: d = distribution(r.name)
        except PackageNotFoundError: continue  # the job says so, when it tries
        name, wanted = re.sub("[-_.]+", "-", r.name).lower(), {"", *r.extras}
        if wanted <= found.setdefault(name, (d, set()))[1]: continue
        found[name][1].update(wanted)
        todo += [(Requirement(line), wanted) for line in d.requires or []]
    return [d for d, _ in found.values()]


def asked_for(folder):
    "The requirements that lie among a job's files; None: it has none."
    files = sorted(Path(folder).rglob("requirements.txt"))
    return tuple(sorted({line.strip() for f in files for line in f.read_text().splitlines() if line.strip()})) if files else None


def image(place, lines=None):
    "A container's Python: what some requirements ask for, or all packages of this environment, without slml_nb; torchrun and pip on its PATH."
    home = Path(place) / f"image{abs(hash(lines)) if lines is not None else ''}"
    with IMAGES:
        if not (home / "ready").exists(): _furnished(home, lines)
    return home


IMAGES = threading.Lock()


def _furnished(home, lines):
    "A new image."
    venv.create(home, with_pip=False, symlinks=True)
    site = next(home.glob("lib/python3*/site-packages"))
    theirs = next(p for p in sys.path if p.endswith("site-packages") and Path(p, "boto3").is_dir())
    if lines is None: (site / "image.pth").write_text(theirs + "\n")  # a path that a .pth adds does not have its own .pth files read: no editable install comes along
    else:
        tops = {f.parts[0] for d in closure((*lines, "pip")) for f in d.files or [] if not f.parts[0].startswith((".", "__"))}
        for top in tops: (site / top).exists() or (site / top).symlink_to(Path(theirs, top))
    for name, module in (("pip", "pip"), ("pip3", "pip"), ("torchrun", "torch.distributed.run")):
        (home / "bin" / name).write_text(f'#!/bin/sh\nexec {home}/bin/python3 -m {module} "$@"\n')
        (home / "bin" / name).chmod(0o755)
    (home / "bin/train").write_text(f"#!{home}/bin/python3\n{SCRIPT_MODE}")
    (home / "bin/train").chmod(0o755)
    (home / "ready").touch()


# What the program `train` of AWS's images does (SageMaker Training Toolkit), for a job that names no entry point of its own
SCRIPT_MODE = '''"""Unpack the archive, install what it asks for, start its program with the hyperparameters as options."""
import io, json, os, subprocess, sys, tarfile
try: from sagemaker_training.cli.train import main  # the real one, where it is installed
except ImportError: main = None
if main: sys.exit(main())
import boto3
given = {k: v.strip('"') for k, v in json.load(open("/opt/ml/input/config/hyperparameters.json")).items()}
bucket, _, key = given["sagemaker_submit_directory"].removeprefix("s3://").partition("/")
code = "/opt/ml/code"
tarfile.open(fileobj=io.BytesIO(boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read())).extractall(code, filter="data")
if os.path.exists(f"{code}/requirements.txt"): subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", f"{code}/requirements.txt"], check=True)
options = [w for k, v in sorted(given.items()) if not k.startswith("sagemaker_") and k != "_tuning_objective_metric" for w in (f"--{k}", v)]
os.chdir(code)
done = subprocess.run([sys.executable, given["sagemaker_program"], *options])
if done.returncode and not os.path.exists("/opt/ml/output/failure"): open("/opt/ml/output/failure", "w").write(f"ExecuteUserScriptError: {done.returncode}")
sys.exit(done.returncode)
'''


class Job:
    "A training job: its request, where it stands, and the processes of its containers."

    def __init__(self, request, record):
        self.name, self.request, self.record = request["TrainingJobName"], request, record
        self.containers, self.thread, self.asked, self.attempts, self.begun, self.hosts = [], None, "", 0, None, []
        self.moved("InProgress", "Starting", "Starting the training job")

    def moved(self, status, secondary, message="", reason=""):
        "Take the next status, on moto's record too."
        r, now = self.record, _now()
        self.status, self.secondary, self.reason = status, secondary, reason
        if not isinstance(getattr(r, "peer", None), list): r.secondary_status_transitions = r.peer = []
        if r.peer: r.peer[-1]["EndTime"] = now
        r.peer.append({"Status": secondary, "StartTime": now, "StatusMessage": message or reason})
        r.training_job_status, r.secondary_status, r.last_modified_time = status, secondary, now
        r.training_start_time, r.training_end_time = self.begun, None if status in ("InProgress", "Stopping") else now
        if reason: r.failure_reason = reason
        if r.training_end_time and self.begun: r.training_time_in_seconds = r.billable_time_in_seconds = max(1, int((now - self.begun).total_seconds()))


def _now():
    from moto.core.utils import utcnow
    return utcnow()


class Peer:
    "The server, its jobs and its switches."

    def __init__(self, place, grace=120.0):
        self.place, self.grace, self.jobs, self.calls, self.faults = Path(place), grace, {}, [], []
        self.clients, self.expired, self.dead, self.capacity_missing, self.lock, self.over = {}, set(), False, 0, threading.RLock(), False

    def start(self):
        "Serve."
        import botocore.session
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server
        import logging
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.models = {"SageMaker": botocore.session.get_session().get_service_model("sagemaker")}
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True, request_handler=MotoRequestHandler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.role = f"arn:aws:iam::{ACCOUNT}:role/slml"
        self.env = {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "AKIDCLIENT", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": REGION, "AWS_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true",
                    "SLML_SAGEMAKER_ROLE": self.role}
        self.client("s3").create_bucket(Bucket="shop")
        trust = json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"}]})
        with contextlib.suppress(Exception): self.client("iam").create_role(RoleName="slml", AssumeRolePolicyDocument=trust)
        with contextlib.suppress(Exception): self.client("logs").create_log_group(logGroupName="/aws/sagemaker/TrainingJobs")

    def client(self, service):
        "A client with the rights of the house."
        import boto3
        from botocore.config import Config
        with self.lock:
            if service not in self.clients: self.clients[service] = self.new_client(boto3, Config, service)
            return self.clients[service]

    def new_client(self, boto3, Config, service):
        "One that was not there yet: that takes a while."
        return boto3.session.Session("AKIDPEER", "test", region_name=REGION).client(service, endpoint_url=self.url, config=Config(s3={"addressing_style": "path"}, max_pool_connections=30))

    # what comes in

    def answer(self, environ, start):
        "One request: faults first, then SageMaker's jobs, then moto."
        target, key = environ.get("HTTP_X_AMZ_TARGET", ""), re.search(r"Credential=(\w+)/\d+/[\w-]+/([\w-]+)/", environ.get("HTTP_AUTHORIZATION", ""))
        who, service = (key[1], key[2]) if key else ("", "")
        name = target if target else f"{service}.{environ['REQUEST_METHOD']}"
        if self.dead and who == "AKIDCLIENT": return self.hang_up(environ, start)
        if who != "AKIDPEER":
            with self.lock: self.calls.append((name, environ.get("PATH_INFO", ""), who))
            if who in self.expired: return _refuse(start, service, "ExpiredToken" if service == "s3" else "ExpiredTokenException", "The security token included in the request is expired", 403 if service != "s3" else 400)
            for fault in list(self.faults):
                if fault["times"] and re.search(fault["on"], f"{name} {environ.get('PATH_INFO', '')}") and fault["who"] in (who, ""):
                    fault["times"] -= 1
                    fault["hits"] += 1
                    if fault["code"] == "lost answer": self.served(target, environ, lambda *a: None)
                    return self.hang_up(environ, start) if fault["code"] in ("hang up", "lost answer") else _refuse(start, service, fault["code"], fault["message"], fault["status"])
        return self.served(target, environ, start)

    def served(self, target, environ, start):
        "A request that nothing stands in the way of."
        if target.startswith("SageMaker."): return self.sagemaker(target.partition(".")[2], environ, start)
        return self.moto(environ, start)

    def hang_up(self, environ, start):
        "The network is gone."
        import socket
        with contextlib.suppress(OSError, KeyError): environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        start("500 gone", [])
        return [b""]

    def sagemaker(self, operation, environ, start):
        "A call of SageMaker: held against the model; training jobs are run."
        import io
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"], request = io.BytesIO(body), json.loads(body or b"{}")
        if operation not in self.models["SageMaker"].operation_names: return _refuse(start, "sagemaker", "UnknownOperationException", operation, 400)
        shape = self.models["SageMaker"].operation_model(operation).input_shape
        if problems := wrong(shape, request) if shape is not None else []:
            return _refuse(start, "sagemaker", "ValidationException", f"{len(problems)} validation error(s) detected: {'; '.join(problems)}", 400)
        if operation == "StopTrainingJob": return self.stop_job(request["TrainingJobName"], start)
        if operation != "CreateTrainingJob": return self.moto(environ, start)
        with self.lock:
            if request["TrainingJobName"] in self.jobs:
                return _refuse(start, "sagemaker", "ResourceInUse", "Training job names must be unique within an AWS account and region, or Training job already exists", 400)
            status = []
            said = self.moto(environ, lambda s, h, *a: (status.append(s), start(s, h, *a))[1])
            if status and status[0].startswith("200"): self.run_job(request)
        return said

    def run_job(self, request):
        "Execute what CreateTrainingJob was asked for; a request that moto has no record of is put on record first."
        record = self.records.get(request["TrainingJobName"])
        if record is None:
            self.client("sagemaker").create_training_job(**request)  # comes back here
            return self.jobs[request["TrainingJobName"]]
        with self.lock:
            job = self.jobs[request["TrainingJobName"]] = Job(request, record)
            job.thread = threading.Thread(target=self.live, args=(job,), daemon=True)
            job.thread.start()
        return job

    @property
    def records(self):
        "moto's own record of training jobs."
        from moto.sagemaker.models import sagemaker_backends
        return sagemaker_backends[ACCOUNT][REGION].training_jobs

    def stop_job(self, name, start):
        "StopTrainingJob."
        job = self.jobs.get(name)
        if not job: return _refuse(start, "sagemaker", "ValidationException", "Requested resource not found.", 400)
        if job.status not in ("InProgress", "Stopping"): return _refuse(start, "sagemaker", "ValidationException", f"The request was rejected because the training job is in status {job.status}.", 400)
        if job.status == "InProgress":
            job.asked = "stop"
            job.moved("Stopping", "Stopping", "Stopping the training job")
        start("200 OK", [("Content-Type", "application/x-amz-json-1.1")])
        return [b"{}"]

    # a job's life

    def live(self, job):
        "From Starting to its end, with as many interruptions as there are."
        try:
            if self.capacity_missing:
                self.capacity_missing -= 1
                return job.moved("Failed", "Failed", reason=CAPACITY)
            while True:
                job.attempts += 1
                code, said = self.attempt(job)
                if job.asked != "interrupt": break
                job.asked = ""
                job.moved("InProgress", "Interrupted", "Training job interrupted")
                time.sleep(0.2)
                job.moved("InProgress", "Starting", "Starting the training job")
            if job.asked == "stop": return job.moved("Stopped", "Stopped", "Training job stopped")
            if job.asked == "time": return job.moved("Stopped", "MaxRuntimeExceeded", "Training job exceeded MaxRuntimeInSeconds")
            self.model(job)
            if code == 0: return job.moved("Completed", "Completed", "Training job completed")
            job.moved("Failed", "Failed", reason=f"AlgorithmError: {said[:900] or 'framework error'}, exit code: {code}")
        except Exception as e:
            import traceback
            traceback.print_exc()
            job.moved("Failed", "Failed", reason=f"InternalServerError: {e}")

    def attempt(self, job):
        "The containers, once: exit code, and what stands in /opt/ml/output/failure."
        r, resources = job.request, job.request["ResourceConfig"]
        hosts = [f"algo-{i + 1}" for i in range(resources.get("InstanceCount", 1))]
        job.moved(job.status, "Downloading", "Downloading input data")
        job.hosts = [self.furnish(job, host, hosts) for host in hosts]
        if job.asked: return 143, ""
        job.begun = job.begun or _now()
        job.moved(job.status, "Training", "Training image download completed. Training in progress.")
        over, job.containers = threading.Event(), [self.container(job, ml, host) for ml, host in zip(job.hosts, hosts)]
        readers = [threading.Thread(target=self.read, args=(job, c, host)) for c, host in zip(job.containers, hosts)]
        keeper = threading.Thread(target=self.in_step, args=(job, over))
        for t in (*readers, keeper): t.start()
        limit, told = time.monotonic() + r["StoppingCondition"].get("MaxRuntimeInSeconds", 86400), None
        while any(c.poll() is None for c in job.containers) and not self.over:
            if time.monotonic() > limit and not job.asked: job.asked = "time"
            if any(c.poll() not in (None, 0) for c in job.containers) and not told: told = time.monotonic() - self.grace + 5  # one host has failed: the others are ended
            if job.asked and told is None:
                told = time.monotonic()
                self.tell(job, signal.SIGTERM)
            if told is not None and time.monotonic() > told + self.grace: self.tell(job, signal.SIGKILL)
            time.sleep(0.03)
        if self.over: self.tell(job, signal.SIGKILL)
        for c in job.containers: c.wait()
        over.set()
        for t in (*readers, keeper): t.join()
        job.moved(job.status, "Uploading", "Uploading generated training model")
        failed = [(c.returncode, _text(ml / "output/failure")) for c, ml in zip(job.containers, job.hosts) if c.returncode]
        return next((f for f in failed if f[1]), failed[0]) if failed else (0, "")

    def furnish(self, job, host, hosts):
        "/opt/ml of a host, as SageMaker fills it."
        r = job.request
        ml = self.place / "jobs" / job.name / str(job.attempts) / host
        for folder in ("input/config", "input/data", "output/data", "model", "checkpoints"): (ml / folder).mkdir(parents=True, exist_ok=True)
        for c in r.get("InputDataConfig", []): self.download(c["DataSource"]["S3DataSource"]["S3Uri"], ml / "input/data" / c["ChannelName"])
        if r.get("CheckpointConfig"): self.download(r["CheckpointConfig"]["S3Uri"], self.checkpoints(job, ml))
        kind = r["ResourceConfig"].get("InstanceType", "")
        config = {"hyperparameters": r.get("HyperParameters", {}), "inputdataconfig": {c["ChannelName"]: {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"} for c in r.get("InputDataConfig", [])},
                  "resourceconfig": {"current_host": host, "current_instance_type": kind, "current_group_name": "homogeneousCluster", "hosts": hosts, "network_interface_name": "lo",
                                     "instance_groups": [{"instance_group_name": "homogeneousCluster", "instance_type": kind, "hosts": hosts}]}}
        for name, what in config.items(): (ml / f"input/config/{name}.json").write_text(json.dumps(what))
        (ml / "hosts").write_text("127.0.0.1 localhost " + " ".join(hosts) + "\n")
        return ml

    def checkpoints(self, job, ml):
        "The folder that is kept in step with S3."
        return ml / job.request["CheckpointConfig"].get("LocalPath", "/opt/ml/checkpoints").removeprefix("/opt/ml/")

    def download(self, uri, to):
        "Every object whose name begins so, as SageMaker places them."
        to.mkdir(parents=True, exist_ok=True)
        s3, (bucket, _, prefix) = self.client("s3"), uri.removeprefix("s3://").partition("/")
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for o in page.get("Contents", []):
                rest = o["Key"].removeprefix(prefix) if prefix.endswith("/") or o["Key"].removeprefix(prefix).startswith("/") else o["Key"][prefix.rfind("/") + 1:]
                if rest.endswith("/") or not rest.strip("/"): continue
                file = to / rest.lstrip("/")
                file.parent.mkdir(parents=True, exist_ok=True)
                s3.download_file(bucket, o["Key"], str(file))

    def container(self, job, ml, host):
        "Process 1 of a namespace of its own, with /opt/ml, a host name and little else."
        spec, home = job.request["AlgorithmSpecification"], image(self.place, asked_for(ml / "input/data"))
        env = {"PATH": f"{home}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8", "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "AKIDROLE", "AWS_SECRET_ACCESS_KEY": "test",
               "AWS_REGION": REGION, "AWS_DEFAULT_REGION": REGION, "TRAINING_JOB_NAME": job.name, "TRAINING_JOB_ARN": job.record.arn, "CURRENT_HOST": host, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", **job.request.get("Environment", {})}
        return self.in_namespace(ml, [*spec.get("ContainerEntrypoint", ["train"]), *spec.get("ContainerArguments", [])], env, host)

    def in_namespace(self, ml, command, env, host="algo-1"):
        "A command as process 1 of a namespace in which a folder is /opt/ml; its output is a pipe."
        Path("/opt/ml").mkdir(parents=True, exist_ok=True)
        (Path(ml) / "hosts").exists() or (Path(ml) / "hosts").write_text(f"127.0.0.1 localhost {host}\n")
        inside = f'mount --bind "{ml}" /opt/ml && mount --bind "{ml}/hosts" /etc/hosts && hostname {host} && cd / && exec "$@"'
        unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", inside, "container"]
        return subprocess.Popen([*unshare, *command], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

    def tell(self, job, sig):
        "A signal to process 1 of each container; one without a handler does not hear SIGTERM, there as here."
        for c in job.containers:
            if c.poll() is None:
                for child in _children(c.pid):
                    with contextlib.suppress(ProcessLookupError): os.kill(child, sig)

    def read(self, job, container, host):
        "What a container prints, to CloudWatch Logs, in batches."
        logs, stream, batch, lock, ended = self.client("logs"), f"{job.name}/{host}-{job.attempts}", [], threading.Lock(), threading.Event()
        with contextlib.suppress(Exception): logs.create_log_stream(logGroupName="/aws/sagemaker/TrainingJobs", logStreamName=stream)
        def _send():
            while not ended.wait(0.25) or batch:
                with lock: now, batch[:] = batch[:1000], batch[1000:]
                if now: logs.put_log_events(logGroupName="/aws/sagemaker/TrainingJobs", logStreamName=stream, logEvents=now)
        sender = threading.Thread(target=_send)
        sender.start()
        for line in container.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            with lock: batch.append({"timestamp": int(time.time() * 1000), "message": text[:250_000] or " "})
        ended.set()
        sender.join()

    def in_step(self, job, over):
        "Checkpoints to S3 while it runs, and once more at the end."
        if not (where := job.request.get("CheckpointConfig")): return
        s3, (bucket, _, prefix), sent = self.client("s3"), where["S3Uri"].removeprefix("s3://").partition("/"), {}
        while True:
            last = over.wait(0.2)
            for ml in job.hosts:
                folder = self.checkpoints(job, ml)
                for f in [p for p in folder.rglob("*") if p.is_file()]:
                    with contextlib.suppress(FileNotFoundError):
                        mark = f.stat().st_mtime_ns, f.stat().st_size
                        if sent.get(f) == mark: continue
                        s3.upload_file(str(f), bucket, "/".join(p for p in (prefix.strip("/"), f.relative_to(folder).as_posix()) if p))
                        sent[f] = mark
            if last: return

    def model(self, job):
        "model.tar.gz, as SageMaker keeps it."
        if not any((job.hosts[0] / "model").iterdir()): return
        bucket, _, prefix = job.request["OutputDataConfig"]["S3OutputPath"].removeprefix("s3://").partition("/")
        with tempfile.NamedTemporaryFile(suffix=".tar.gz") as f:
            with tarfile.open(f.name, "w:gz") as tar: tar.add(job.hosts[0] / "model", ".")
            self.client("s3").upload_file(f.name, bucket, f"{prefix.strip('/')}/{job.name}/output/model.tar.gz".lstrip("/"))

    # switches and looks

    def fail(self, on, code, message="planted by a test", status=400, times=1, who="AKIDCLIENT"):
        "Answer the next calls whose `Service.Operation path` matches with an error; code 'hang up': not at all; 'lost answer': done, but nobody hears of it."
        fault = {"on": on, "code": code, "message": message, "status": status, "times": times, "who": who, "hits": 0}
        self.faults.append(fault)
        return fault

    def no_capacity(self, times=1):
        "The next jobs find no machine."
        self.capacity_missing = times

    def interrupt(self, name, hard=False):
        "Take a spot machine away: SIGTERM, then SIGKILL after the grace (at once when hard); the job starts again from its checkpoints."
        job = self.jobs[name]
        assert job.request.get("EnableManagedSpotTraining"), "not a spot job"
        job.asked = "interrupt"
        if hard: self.tell(job, signal.SIGKILL)

    def expire(self, who="AKIDCLIENT"):
        "Credentials that are not valid any more; `p.expired.clear()` renews them."
        self.expired.add(who)

    def down(self, seconds=None):
        "No network for the client, for a while or until `p.dead = False`."
        self.dead = True
        if seconds: threading.Timer(seconds, lambda: setattr(self, "dead", False)).start()

    def logs(self, name=""):
        "The lines that jobs have printed."
        logs, lines = self.client("logs"), []
        for s in logs.describe_log_streams(logGroupName="/aws/sagemaker/TrainingJobs", logStreamNamePrefix=name)["logStreams"] if name else logs.describe_log_streams(logGroupName="/aws/sagemaker/TrainingJobs")["logStreams"]:
            lines += [e["message"] for e in logs.get_log_events(logGroupName="/aws/sagemaker/TrainingJobs", logStreamName=s["logStreamName"], startFromHead=True)["events"]]
        return lines

    def count(self, what):
        "How many calls the client or a job has made, by `Service.Operation`."
        return sum(bool(re.search(what, f"{name} {path}")) for name, path, _ in list(self.calls))

    def stop(self):
        "End every job and the server."
        self.over = True
        for job in list(self.jobs.values()):
            self.tell(job, signal.SIGKILL)
            job.thread.join(20)
        self.server.shutdown()


def _refuse(start, service, code, message, status):
    "An error as AWS words it: XML from S3, JSON from the rest."
    if service == "s3":
        body, kind = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>', "application/xml"
    else: body, kind = json.dumps({"__type": code, "message": message}), "application/x-amz-json-1.1"
    start(f"{status} X", [("Content-Type", kind), ("Content-Length", str(len(body.encode())))])
    return [body.encode()]


def _text(path): return path.read_text(errors="replace").strip() if path.is_file() else ""


def _children(pid):
    try: return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError: return []


def possible():
    "'' when jobs can be run here, else why not: namespaces need root (or user namespaces)."
    if sys.platform != "linux" or not shutil.which("unshare"): return "needs Linux and unshare"
    r = subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "true"], capture_output=True)
    return "" if r.returncode == 0 else "needs the right to make namespaces"


@contextlib.contextmanager
def peer(grace=120.0):
    "An account; `grace` is the time between SIGTERM and SIGKILL in seconds (120 there)."
    from moto.core.base_backend import BaseBackend  # noqa: F401
    import moto.backends
    with tempfile.TemporaryDirectory(prefix="peer", ignore_cleanup_errors=True) as place:
        from moto.sagemaker.models import sagemaker_backends
        from moto.logs.models import logs_backends
        for backends in (sagemaker_backends, logs_backends): backends[ACCOUNT][REGION].reset()
        p = Peer(place, grace)
        p.start()
        _empty(p)
        try: yield p
        finally: p.stop()


def _empty(p):
    "A bucket that earlier tests of this process have not filled."
    s3 = p.client("s3")
    for o in s3.list_objects_v2(Bucket="shop").get("Contents", []): s3.delete_object(Bucket="shop", Key=o["Key"])


# ---------------------------------------------------------------- pipelines and tuning jobs

class Failed(Exception):
    "A step did not succeed."


class Pipelines:
    "SageMaker Pipelines, as small as a test allows: steps in their order, each through the call that it stands for. Tuning jobs: trials that are training jobs."

    def __init__(self, p):
        self.p, self.executions, self.answers, self.searches, self.requests = p, {}, {}, {}, []
        self.real, p.sagemaker, self.lock = p.sagemaker, self.answer, threading.Lock()
        self.held = False  # no step but the first of an execution begins, until it is stopped
        self.model = p.models["SageMaker"]

    def answer(self, operation, environ, start):
        "What moto lacks: executions that are executed, once for each token."
        import io
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"], request = io.BytesIO(body), json.loads(body or b"{}")
        shape, key = self.model.operation_model(operation).input_shape, re.search(r"Credential=(\w+)/", environ.get("HTTP_AUTHORIZATION", ""))
        self.requests.append((operation, request, key[1] if key else ""))
        if problems := wrong(shape, request) if shape is not None else []: return _refuse(start, "sagemaker", "ValidationException", "; ".join(problems), 400)
        with self.lock if request.get("ClientRequestToken") else contextlib.nullcontext():
            if (known := (operation, request.get("ClientRequestToken"))) in self.answers: return self.say(start, self.answers[known])  # sent twice
            try: said = getattr(self, _snake(operation))(request) if hasattr(self, _snake(operation)) else None
            except Refused as e: return _refuse(start, "sagemaker", e.args[0], e.args[1], 400)
            if said is None and operation == "CreatePipeline": said = json.loads(b"".join(self.real(operation, environ, lambda *a: None)))
            if said is not None and known[1] and "__type" not in said: self.answers[known] = said
        return self.real(operation, environ, start) if said is None else self.say(start, said)

    def say(self, start, said):
        "An answer."
        start("400 X" if "__type" in said else "200 OK", [("Content-Type", "application/x-amz-json-1.1")])
        return [json.dumps(said).encode()]

    def start_pipeline_execution(self, request):
        "A new execution of what the pipeline is at this moment."
        there = self.p.client("sagemaker").describe_pipeline(PipelineName=request["PipelineName"])
        arn, definition = f"{there['PipelineArn']}/execution/{len(self.executions):012d}", json.loads(there["PipelineDefinition"])
        types, given = {"String": str, "Integer": int, "Float": float, "Boolean": lambda v: v == "true"}, {x["Name"]: x["Value"] for x in request.get("PipelineParameters", [])}
        if unknown := set(given) - {x["Name"] for x in definition["Parameters"]}: raise Refused("ValidationException", f"Unknown parameters: {unknown}")
        values = {x["Name"]: types[x["Type"]](given[x["Name"]]) if x["Name"] in given else x["DefaultValue"] for x in definition["Parameters"]}
        e = self.executions[arn] = {"definition": definition, "values": values, "steps": [], "status": "Executing", "why": "", "shown": request.get("PipelineExecutionDisplayName", ""), "begun": time.time(), "stop": False, "requests": {}, "files": {},
                                    "role": there["RoleArn"]}
        e["thread"] = threading.Thread(target=self.execute, args=(arn, e), daemon=True)
        e["thread"].start()
        return {"PipelineExecutionArn": arn}

    def list_pipeline_executions(self, request):
        "All of a pipeline."
        return {"PipelineExecutionSummaries": [{"PipelineExecutionArn": a, "PipelineExecutionStatus": e["status"], "PipelineExecutionDisplayName": e["shown"], "StartTime": e["begun"]} for a, e in self.executions.items() if f"/{request['PipelineName']}/execution/" in a]}

    def one(self, request):
        "An execution by its ARN."
        if request["PipelineExecutionArn"] not in self.executions: raise Refused("ResourceNotFound", f"Pipeline execution {request['PipelineExecutionArn']} does not exist")
        return self.executions[request["PipelineExecutionArn"]]

    def list_pipeline_execution_steps(self, request): return {"PipelineExecutionSteps": self.one(request)["steps"][::-1]}

    def describe_pipeline_execution(self, request):
        e = self.one(request)
        return {"PipelineExecutionArn": request["PipelineExecutionArn"], "PipelineExecutionStatus": e["status"], "FailureReason": e["why"], "CreationTime": e["begun"]}

    def describe_pipeline_definition_for_execution(self, request): return {"PipelineDefinition": json.dumps(self.one(request)["definition"])}

    def stop_pipeline_execution(self, request):
        "The job that runs is stopped, no step begins."
        e = self.one(request)
        if e["status"] != "Executing": raise Refused("ValidationException", f"Pipeline execution is in status {e['status']}. Only pipelines with 'Executing' status can be stopped.")
        e.update(stop=True, status="Stopping")
        if (job := self.p.jobs.get(e.get("job", ""))) and job.status == "InProgress":
            job.asked = "stop"
            job.moved("Stopping", "Stopping", "Stopping the training job")
        return {"PipelineExecutionArn": request["PipelineExecutionArn"]}

    # an execution

    def execute(self, arn, e):
        "All steps whose turn it is, until none is left or one fails."
        try: self.branch(arn, e, e["definition"]["Steps"])
        except Failed as failed: e["status"], e["why"] = ("Stopped", "") if e["stop"] else ("Failed", str(failed))
        except Exception as error:
            import traceback
            traceback.print_exc()
            e["status"], e["why"] = "Failed", f"the test's executor: {error}"
        else: e["status"] = "Stopped" if e["stop"] else "Succeeded"

    def branch(self, arn, e, steps):
        "Steps in an order in which each comes after those that it waits for."
        left, over = list(steps), {s["StepName"] for s in e["steps"]}
        while left and not e["stop"]:
            step = next(s for s in left if set(s.get("DependsOn", [])) <= over)
            left.remove(step)
            while self.held and over and not e["stop"]: time.sleep(0.05)
            if e["stop"]: break
            row = {"StepName": step["Name"], "StepStatus": "Executing", "StartTime": time.time(), "Metadata": {}}
            e["steps"].append(row)
            try: getattr(self, f"do_{step['Type'].lower()}")(arn, e, step, row)
            except Failed as failed:
                row.update({"StepStatus": "Stopped"} if e["stop"] else {"StepStatus": "Failed", "FailureReason": str(failed)})
                raise
            row["StepStatus"] = "Succeeded"
            over.add(step["Name"])

    def known(self, arn, e):
        "What expressions give."
        def _known(kind, what):
            if kind == "Std:JsonGet":
                _, step, _, name = what["PropertyFile"]["Get"].split(".")
                value = e["files"][step, name]
                for part in what["Path"].split("."): value = value[part]
                return value
            if what.startswith("Parameters."): return e["values"][what.partition(".")[2]]
            return {"Execution.PipelineExecutionId": arn.rpartition("/")[2]}[what]
        return _known

    def filled(self, arn, e, step):
        "The request of a step."
        from slml_nb.pipeline import filled
        return e["requests"].setdefault(step["Name"], filled(step["Arguments"], self.known(arn, e)))

    def service(self):
        "The client that the pipeline's role has."
        import boto3
        with self.p.lock: return self.p.clients.setdefault("pipeline", boto3.session.Session("AKIDPIPELINE", "test", region_name=REGION).client("sagemaker", endpoint_url=self.p.url))

    def name_of(self, arn, e, step, request, word):
        "The name of a step's job: what the arguments say is its beginning."
        return f"{request.get(word) or 'pipelines'}-{arn.rpartition('/')[2]}-{len(e['steps'])}"

    def do_training(self, arn, e, step, row):
        request = self.filled(arn, e, step)
        name = e["job"] = self.name_of(arn, e, step, request, "TrainingJobName")
        row["Metadata"] = {"TrainingJob": {"Arn": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{name}"}}
        self.service().create_training_job(**{**request, "TrainingJobName": name})
        self.p.jobs[name].thread.join()
        job = self.service().describe_training_job(TrainingJobName=name)
        if job["TrainingJobStatus"] != "Completed" and not e["stop"]: print(*self.p.logs(name)[-40:], sep="\n")
        if job["TrainingJobStatus"] != "Completed": raise Failed(f"ClientError: {job.get('FailureReason', job['TrainingJobStatus'])}")

    def do_processing(self, arn, e, step, row):
        request = self.filled(arn, e, step)
        name = self.name_of(arn, e, step, request, "ProcessingJobName")
        self.service().create_processing_job(**{**request, "ProcessingJobName": name})
        row["Metadata"] = {"ProcessingJob": {"Arn": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:processing-job/{name}"}}
        ml = self.p.place / "jobs" / name
        for folder in ("input/config", "output", "processing"): (ml / folder).mkdir(parents=True)
        for i in request["ProcessingInputs"]: self.p.download(i["S3Input"]["S3Uri"], ml / i["S3Input"]["LocalPath"].removeprefix("/opt/ml/"))
        env = {"PATH": f"{image(self.p.place)}/bin:/usr/bin:/bin", "HOME": "/root", "AWS_ENDPOINT_URL": self.p.url, "AWS_ACCESS_KEY_ID": "AKIDROLE", "AWS_SECRET_ACCESS_KEY": "test", "OMP_NUM_THREADS": "1", **request["Environment"]}
        app = request["AppSpecification"]
        done = self.p.in_namespace(ml, [*app["ContainerEntrypoint"], *app["ContainerArguments"]], env)
        said = done.communicate()[0].decode()
        if done.returncode: raise Failed(f"AlgorithmError: {_text(ml / 'output/message') or said[-500:]}, exit code: {done.returncode}")
        for o in request["ProcessingOutputConfig"]["Outputs"]:
            place, (bucket, _, prefix) = ml / o["S3Output"]["LocalPath"].removeprefix("/opt/ml/"), o["S3Output"]["S3Uri"].removeprefix("s3://").partition("/")
            for f in [f for f in place.rglob("*") if f.is_file()]: self.p.client("s3").upload_file(str(f), bucket, f"{prefix}/{f.relative_to(place).as_posix()}")
            for x in step.get("PropertyFiles", []):
                if x["OutputName"] == o["OutputName"]: e["files"][step["Name"], x["PropertyFileName"]] = json.loads((place / x["FilePath"]).read_text())

    def do_condition(self, arn, e, step, row):
        from slml_nb.pipeline import filled
        meets = {"GreaterThanOrEqualTo": lambda a, b: a >= b, "Equals": lambda a, b: a == b}
        sides = [filled([c["LeftValue"], c["RightValue"]], self.known(arn, e)) for c in step["Arguments"]["Conditions"]]
        met = all(meets[c["Type"]](*s) for c, s in zip(step["Arguments"]["Conditions"], sides))
        row.update(StepStatus="Succeeded", Metadata={"Condition": {"Outcome": str(met).lower()}})
        self.branch(arn, e, step["Arguments"]["IfSteps" if met else "ElseSteps"])

    def do_registermodel(self, arn, e, step, row):
        row["Metadata"] = {"RegisterModel": {"Arn": self.service().create_model_package(**self.filled(arn, e, step))["ModelPackageArn"]}}

    def do_fail(self, arn, e, step, row):
        row["Metadata"] = {"Fail": {"ErrorMessage": self.filled(arn, e, step)["ErrorMessage"]}}
        raise Failed(row["Metadata"]["Fail"]["ErrorMessage"])

    # a tuning job

    def create_hyper_parameter_tuning_job(self, request):
        "Trials, one after the other, with values by chance."
        name = request["HyperParameterTuningJobName"]
        if name in self.searches: raise Refused("ResourceInUse", "Hyper parameter tuning job names must be unique within an AWS account and region")
        arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:hyper-parameter-tuning-job/{name}"
        self.searches[name] = {"request": request, "arn": arn, "status": "InProgress", "trials": [], "stop": False, "begun": time.time()}
        self.searches[name]["thread"] = threading.Thread(target=self.search, args=(name,), daemon=True)
        self.searches[name]["thread"].start()
        return {"HyperParameterTuningJobArn": arn}

    def search(self, name):
        "Every trial as a training job; its metric is what the definition's pattern finds in the log."
        import random
        s = self.searches[name]
        config, definition = s["request"]["HyperParameterTuningJobConfig"], s["request"]["TrainingJobDefinition"]
        by, objective = random.Random(config.get("RandomSeed", 0)), config["HyperParameterTuningJobObjective"]
        metrics = {m["Name"]: m["Regex"] for m in definition["AlgorithmSpecification"]["MetricDefinitions"]}
        for i in range(config["ResourceLimits"]["MaxNumberOfTrainingJobs"]):
            if s["stop"]: break
            values, job = drawn(config["ParameterRanges"], by), f"{name}-{i + 1:03d}-{by.getrandbits(32):08x}"
            given = {k: v for k, v in definition.items() if k in ("RoleArn", "InputDataConfig", "OutputDataConfig", "ResourceConfig", "StoppingCondition", "VpcConfig", "EnableManagedSpotTraining", "CheckpointConfig", "Environment", "AlgorithmSpecification",
                                                                 "EnableInterContainerTrafficEncryption")}
            ran = self.p.run_job({**given, "TrainingJobName": job, "HyperParameters": {**definition["StaticHyperParameters"], **values, "_tuning_objective_metric": objective["MetricName"]}, "Tags": s["request"].get("Tags", [])})
            s["job"] = job
            ran.thread.join()
            found = re.findall(metrics[objective["MetricName"]], "\n".join(self.p.logs(job)))
            s["trials"].append({"name": job, "values": values, "status": ran.status, "value": float(found[-1]) if found else None})
            if ran.status != "Completed": print(*self.p.logs(job)[-40:], sep="\n")
        done = [t for t in s["trials"] if t["value"] is not None]
        s["best"] = sorted(done, key=lambda t: t["value"] * (1 if objective["Type"] == "Minimize" else -1))[0] if done else None
        s["status"] = "Stopped" if s["stop"] else "Completed" if done else "Failed"

    def describe_hyper_parameter_tuning_job(self, request):
        "How a search is doing."
        if not (s := self.searches.get(request["HyperParameterTuningJobName"])): raise Refused("ResourceNotFound", "The requested resource was not found")
        done, config = [t["status"] for t in s["trials"]], s["request"]["HyperParameterTuningJobConfig"]
        best = {"BestTrainingJob": {"TrainingJobName": s["best"]["name"], "TrainingJobArn": s["arn"], "CreationTime": s["begun"], "TrainingJobStatus": "Completed", "TunedHyperParameters": s["best"]["values"],
                                    "FinalHyperParameterTuningJobObjectiveMetric": {"MetricName": config["HyperParameterTuningJobObjective"]["MetricName"], "Value": s["best"]["value"]}}} if s.get("best") else {}
        return {"HyperParameterTuningJobName": request["HyperParameterTuningJobName"], "HyperParameterTuningJobArn": s["arn"], "HyperParameterTuningJobConfig": config, "HyperParameterTuningJobStatus": s["status"], "CreationTime": s["begun"],
                "TrainingJobStatusCounters": {"Completed": done.count("Completed"), "InProgress": int(s["status"] == "InProgress"), "RetryableError": 0, "NonRetryableError": done.count("Failed"), "Stopped": done.count("Stopped")},
                "ObjectiveStatusCounters": {"Succeeded": done.count("Completed"), "Pending": 0, "Failed": done.count("Failed")}, **best}

    def stop_hyper_parameter_tuning_job(self, request):
        "No trial begins any more."
        self.searches[request["HyperParameterTuningJobName"]]["stop"] = True
        return {}


class Refused(Exception):
    "A request that is answered with an error: code, message."


def drawn(ranges, by):
    "Values by chance, as texts."
    import math
    out = {r["Name"]: by.choice(r["Values"]) for r in ranges.get("CategoricalParameterRanges", [])}
    for kind, say in (("IntegerParameterRanges", lambda v: str(round(v))), ("ContinuousParameterRanges", repr)):
        for r in ranges.get(kind, []):
            low, high = float(r["MinValue"]), float(r["MaxValue"])
            out[r["Name"]] = say(math.exp(by.uniform(math.log(low), math.log(high))) if r["ScalingType"] == "Logarithmic" else by.uniform(low, high))
    return out


def _snake(name): return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
