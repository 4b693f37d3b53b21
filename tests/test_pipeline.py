"""A pipeline from a parameter set: rendered, created, started, executed step by step with the real containers' commands, and what it leaves."""
import json, threading
from dataclasses import replace

import pytest

import tiny
from peer_sagemaker import ACCOUNT, REGION, Pipelines, peer, possible
from slml_nb.aws import action_of
from test_aws import allows

pytestmark = pytest.mark.skipif(bool(possible()), reason=possible() or "")
ROLE = f"arn:aws:iam::{ACCOUNT}:role/slml"


DIG = tiny.notebook("dig", "", "ore", "source: str = 'data/ore.csv'  # file\ndepth: int = 3  # metres\nnote: str = \"Ann's 100 % ore\"  # what SageMaker's driver would stumble over",
                    tiny.HEAD.format(stage="dig") + "import csv\nstage.save('ore', {'kg': sum(float(r['kg']) for r in csv.DictReader(open(source))) * depth})\nstage.metric(depth=depth)\nstage.done()", reads="source")
MELT = tiny.notebook("melt", "ore", "iron, verdict, package", "heat: float = 1.5  # kelvin\nlimit: float = 5.0\nbreaks: bool = False",
                     tiny.HEAD.format(stage="melt") + "from pathlib import Path\nfrom oven import melt\nif breaks: raise ValueError('the oven is cold')\nkg = melt(stage.json('ore')['kg']) * heat\nstage.save('iron', {'kg': kg})",
                     "folder = Path(stage.folder('package'))\n(folder / 'card.md').write_text('# Iron')\n(folder / 'manifest.json').write_text('{\"hash\": \"abc\"}')\nstage.save('package', folder)\n"
                     "stage.save('verdict', {'met': kg >= limit, 'sentence': f'{kg} kg (100 %), {limit} were asked for.', 'candidate': 'oven', 'metric': 'kg', 'candidates': [{'name': 'oven', 'kg': kg, 'interval': [1.0, 2.5]}]})\nstage.done()")


@pytest.fixture(scope="module")
def house():
    from slml_nb.jobs import wheel
    with peer(grace=3) as p:
        house = Pipelines(p)
        house.wheel = wheel()
        yield house


@pytest.fixture
def mine(project, house, monkeypatch):
    "The tiny use case, with the store in the bucket; the environment of a client."
    for name, value in house.p.env.items(): monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLML_CACHE", str(project.folder / "cache"))
    monkeypatch.chdir(project.folder)
    from slml_nb import jobs, pipeline
    for room in (jobs, pipeline): monkeypatch.setattr(room, "wheel", lambda: house.wheel)  # built once
    project.write("data/ore.csv", "kg\n6\n")
    project.write("params/oven.py", "def melt(kg): return kg / 2\n")
    tiny.use_case(project, {"dig": DIG, "melt": MELT}, store="s3://shop/slml", sagemaker=json.dumps({"role": ROLE, "region": REGION}))
    return project


def load(**head):
    from slml_nb.core import load_params
    params = load_params("params/mine.yaml")
    return replace(params, sagemaker={**params.sagemaker, **head})


def over(house, arn):
    e = house.executions[arn]
    e["thread"].join(240)
    return e


def said_by(capsys, *words):
    "The same command in this process, which has SageMaker's SDK already."
    from slml_nb.cli import main
    capsys.readouterr()
    code = main([*words])
    return code, capsys.readouterr().out


def typed(project, *words):
    "A command at the shell: exit code, output and errors together."
    code, out, err = project.slml(*words)
    return code, out + err


@pytest.mark.slow
def test_pipeline_makes_what_a_run_makes(mine, house):
    from slml_nb.aws import policy_for
    from slml_nb.graph import plan
    from slml_nb.pipeline import create, start, status, status_text
    from slml_nb.run import execute
    params = load(pipeline={"approval": "person"})
    assert create(params)["state"] == "new" and create(params)["state"] == "unchanged"
    one, two = start(params), start(params)  # typed twice: one execution
    assert (one["state"], two["state"], one["arn"]) == ("started", "under way", two["arn"])
    e = over(house, one["arn"])
    told = status(params)
    print(status_text(told))
    assert (e["status"], told["state"]) == ("Succeeded", "done"), e["why"]
    assert {r["step"]: r["state"] for r in told["steps"]} == {"dig": "made", "melt": "made", "gate": "done", "met": "met", "register": "done", "not-met": "not run"}
    run = execute(params)  # on this machine, with the same store
    assert tiny.states(run) == {"dig": "reused", "melt": "reused"}
    assert {s: v["key"] for s, v in run["stages"].items()} == {r["step"]: r["key"] for r in told["steps"] if r["key"]}
    package = house.p.client("sagemaker").describe_model_package(ModelPackageName=e["steps"][-1]["Metadata"]["RegisterModel"]["Arn"])
    assert (package["ModelApprovalStatus"], package["ModelPackageGroupName"]) == ("PendingManualApproval", "slml-mine")
    said = package["CustomerMetadataProperties"]
    assert (said["words"], said["value"], said["interval"]) == ("13.5 kg 100 percent 5.0 were asked for.", "13.5", "1 to 2.5")
    bucket, _, key = package["InferenceSpecification"]["Containers"][0]["ModelDataUrl"].removeprefix("s3://").partition("/")
    assert house.p.client("s3").head_object(Bucket=bucket, Key=key)["ContentLength"] > 50
    assert "waits for a person: aws sagemaker update-model-package --model-package-arn arn:" in status_text(told)
    house.p.client("sagemaker").update_model_package(ModelPackageArn=package["ModelPackageArn"], ModelApprovalStatus="Rejected", ApprovalDescription="too hot")
    assert "rejected (too hot)" in status_text(status(params))
    made = [(o, r) for o, r, who in house.requests if who == "AKIDPIPELINE" and "slml-mine" in json.dumps(r)]
    policy = policy_for(params, *plan(params), "pipeline-role")
    assert {o for o, _ in made} == {"CreateTrainingJob", "DescribeTrainingJob", "CreateProcessingJob", "CreateModelPackage"} and missing(policy, "sagemaker", made) == []
    assert missing(policy_for(replace(params, project="mine-2"), *plan(params), "pipeline-role"), "sagemaker", made)  # the role of another project may not


@pytest.mark.slow
def test_gate_not_met(mine, house):
    from slml_nb.pipeline import create, start, status
    from slml_nb.run import execute
    create(params := load())
    assert tiny.states(execute(params, {"depth": "2"}, stop="dig"))["dig"] == "made"  # here first
    e = over(house, start(params, {"melt.limit": "99", "depth": "2"})["arn"])
    assert (e["status"], e["why"]) == ("Failed", "The gate was not met: 9.0 kg (100 %), 99.0 were asked for.")
    rows = {r["step"]: r for r in status(params)["steps"]}
    assert [rows[n]["state"] for n in ("dig", "melt", "met", "register")] == ["reused", "made", "not met", "not run"] and rows["not-met"]["why"] == e["why"]
    assert e["requests"]["melt"]["HyperParameters"]["p_limit"] == "99.0"


@pytest.mark.slow
def test_failing_stage_is_named(mine, house):
    from slml_nb.pipeline import create, start, status, status_text
    create(params := load())
    e = over(house, start(params, {"breaks": "yes"})["arn"])
    told = status(params)
    rows = {r["step"]: r for r in told["steps"]}
    assert (e["status"], rows["melt"]["state"], rows["gate"]["state"]) == ("Failed", "failed", "not run")
    text = status_text(told)
    assert "ValueError: the oven is cold" in text and "melt, cell" in rows["melt"]["why"] + text and "aws logs tail /aws/sagemaker/TrainingJobs --log-stream-name-prefix " + rows["melt"]["job"] in text


@pytest.mark.slow
def test_starts_at_the_same_moment_are_one_that_can_be_stopped(mine, house, monkeypatch):
    "Also when an answer is lost, so that botocore asks again with the same token; and a service that is too busy is asked again while one watches."
    from slml_nb.pipeline import create, start, status
    params, said = replace(load(), project="lost"), []
    monkeypatch.setattr(house, "held", True)  # it is not over before it was looked at
    lost = [house.p.fail(f"SageMaker.{what}", "lost answer") for what in ("CreatePipeline", "StartPipelineExecution")]
    assert create(params)["state"] == "new" and create(params)["state"] == "unchanged"
    starters = [threading.Thread(target=lambda: said.append(start(params)["arn"])) for _ in range(3)]
    for t in starters: t.start()
    for t in starters: t.join()
    arn, = {*said}
    asked = [r for o, r, _ in house.requests if o == "StartPipelineExecution" and r["PipelineName"] == "slml-lost"]
    assert [a for a in house.executions if "/slml-lost/" in a] == [arn] and all(f["hits"] for f in lost) and len(asked) > 1 and len({r["ClientRequestToken"] for r in asked}) == 1
    busy = [house.p.fail(f"SageMaker.{what}", "ThrottlingException", "Rate exceeded", times=2) for what in ("DescribePipelineExecution", "ListPipelineExecutionSteps", "DescribePipelineDefinitionForExecution")]
    assert status(params)["state"] == "running" and all(f["hits"] == 2 for f in busy)
    assert typed(mine, "stop", arn) == (0, f"{arn} is being stopped\n")
    assert over(house, arn)["status"] == "Stopped" and status(params)["state"] == "stopped"


def test_what_starts_it(mine, house):
    from slml_nb.pipeline import create
    house.p.client("s3").create_bucket(Bucket="inbox")
    queue = {"QueueConfigurations": [{"QueueArn": f"arn:aws:sqs:{REGION}:{ACCOUNT}:q", "Events": ["s3:ObjectCreated:*"]}]}
    house.p.client("sqs").create_queue(QueueName="q")
    house.p.client("s3").put_bucket_notification_configuration(Bucket="inbox", NotificationConfiguration=queue)
    params = load(pipeline={"cron": "0 6 * * mon-fri", "zone": "Europe/Berlin", "new_objects": "s3://inbox/ore/"})
    for _ in range(2): told = create(params)  # a second time it is brought up to date
    assert len(told["triggers"]) == 2
    plan = house.p.client("scheduler").get_schedule(Name="slml-mine")
    assert (plan["ScheduleExpression"], plan["ScheduleExpressionTimezone"], plan["Target"]["Arn"]) == ("cron(0 6 ? * MON,TUE,WED,THU,FRI *)", "Europe/Berlin", told["arn"])
    events, iam = house.p.client("events"), house.p.client("iam")
    assert json.loads(events.describe_rule(Name="slml-mine")["EventPattern"])["detail"] == {"bucket": {"name": ["inbox"]}, "object": {"key": [{"prefix": "ore/"}]}}
    target, = events.list_targets_by_rule(Rule="slml-mine")["Targets"]
    assert (target["Arn"], target["RoleArn"]) == (told["arn"], plan["Target"]["RoleArn"])
    allowed, = iam.get_role_policy(RoleName="slml-mine-trigger", PolicyName="start")["PolicyDocument"]["Statement"]
    assert (allowed["Action"], allowed["Resource"]) == ("sagemaker:StartPipelineExecution", told["arn"])
    from moto.s3.models import s3_backends
    kept = s3_backends[ACCOUNT]["aws"].buckets["inbox"].notification_configuration  # moto's GET leaves EventBridge out
    assert kept.event_bridge is not None and len(kept.queue) == 1  # what was there stays


def test_changed_is_shown_first(mine, house):
    from slml_nb.pipeline import create
    create(load())
    calls = house.p.count("CreatePipeline|UpdatePipeline|s3.PUT")
    told = create(load(), {"melt.heat": "9"}, dry=True)
    assert (told["state"], house.p.count("CreatePipeline|UpdatePipeline|s3.PUT")) == ("changed", calls) and "parameter melt-heat: 1.5 → 9.0" in told["changes"]
    assert create(load(), {"melt.heat": "9"})["state"] == "changed"
    assert create(load(), {"melt.heat": "9"})["state"] == "unchanged"


def test_the_sdk_writes_the_same(mine):
    "The objects of SageMaker's own SDK, where they say the same as we do."
    from sagemaker.core.workflow.conditions import ConditionGreaterThanOrEqualTo
    from sagemaker.core.workflow.execution_variables import ExecutionVariables
    from sagemaker.core.workflow.functions import Join, JsonGet
    from sagemaker.core.workflow.parameters import ParameterFloat, ParameterInteger, ParameterString
    from sagemaker.core.workflow.properties import PropertyFile
    from sagemaker.mlops.workflow.fail_step import FailStep
    from sagemaker.mlops.workflow.pipeline import interpolate
    from sagemaker.mlops.workflow.retry import StepExceptionTypeEnum, StepRetryPolicy
    from slml_nb.pipeline import RETRIES, render, steps_in
    definition, _ = render(load())
    steps, parameters = {s["Name"]: s for s in steps_in(definition["Steps"])}, {p["Name"]: p for p in definition["Parameters"]}
    for theirs in (ParameterInteger("dig-depth", 3), ParameterFloat("melt-heat", 1.5), ParameterString("dig-source", "data/ore.csv")): assert theirs.to_request() == parameters[theirs.name]
    file = PropertyFile("gate", "gate", "gate.json")
    assert [file.expr] == steps["gate"]["PropertyFiles"]
    def json_get(path): return JsonGet(step_name="gate", property_file=file, json_path=path)
    assert [interpolate(ConditionGreaterThanOrEqualTo(json_get("met"), 1).to_request(), {}, {}, "p")] == steps["met"]["Arguments"]["Conditions"]
    fail = FailStep("not-met", Join(on="", values=["The gate was not met: ", json_get("sentence")]), description="The gate was not met.")
    assert interpolate(fail.to_request(), {}, {}, "p") == steps["not-met"]
    assert ParameterFloat("melt-heat", 1.5).to_string().expr == steps["melt"]["Arguments"]["HyperParameters"]["p_heat"]
    assert Join(on="", values=["s3://shop/slml/mine/pipelines/", ExecutionVariables.PIPELINE_EXECUTION_ID, "/gate"]).expr == steps["gate"]["Arguments"]["ProcessingOutputConfig"]["Outputs"][0]["S3Output"]["S3Uri"]
    ours = StepRetryPolicy([StepExceptionTypeEnum.SERVICE_FAULT, StepExceptionTypeEnum.THROTTLING], interval_seconds=10, backoff_rate=2.0, max_attempts=5)
    assert ours.to_request() == RETRIES[0]


LADDER = tiny.notebook("simple", "", "ladder, problem, features, recipe", "enough: bool = False", "from slml_nb.stage import Stage, artifact_path, made_in, sample_folder\nimport json\nstage = Stage('simple', run)\nfound = made_in(sample_folder())",
                       "for name in ('problem', 'features', 'recipe'):\n    path = artifact_path(found[name])\n    stage.save(name, json.loads(path.read_text()) if path.suffix == '.json' else path)\nstage.save('ladder', {'enough': enough, 'why': 'the simple model does'})\nstage.done()")
JUDGE = tiny.notebook("judge", "ladder", "judged", "strict: bool = False", tiny.HEAD.format(stage="judge") + "stage.save('judged', {'both': stage.has('network')})\nstage.done()", uses="network")


@pytest.mark.slow
def test_two_machines_train_in_a_step_and_what_is_not_needed_is_not_made(mine, house):
    "The real train notebook under torchrun on two machines; and when the simple model is enough, neither of them begins to train."
    from slml_nb.pipeline import create, start, status
    from slml_nb.run import execute
    tiny.use_case(mine, {"simple": LADDER, "judge": JUDGE}, "ladder", store="s3://shop/slml", sagemaker=json.dumps({"role": ROLE, "region": REGION}))
    text = (mine.folder / "params/ladder.yaml").read_text().replace("  train: false\n", "") + "train: {on: ml.m5.large, instances: 2}\n"
    mine.write("params/ladder.yaml", text)
    from slml_nb.core import load_params
    params = load_params("params/ladder.yaml")
    small = {"train.epochs": "2", "train.hidden": "[16]", "train.threads": "1", "train.device": "cpu"}
    assert create(replace(params, climb=True), small)["state"] == "new"
    e = over(house, start(replace(params, climb=True))["arn"])
    assert e["status"] == "Succeeded", e["why"]
    job = house.p.jobs[e["job"]] if e["steps"][-1]["StepName"] == "train" else next(j for n, j in house.p.jobs.items() if "ladder--train" in n)
    said = house.p.logs(job.name)
    assert len(job.hosts) == 2 and any("--nnodes=2" in line for line in said) and [sum(f'"type": "{kind}"' in line for line in said) for kind in ("machine", "end")] == [1, 1]  # the notebook ran once
    run = execute(replace(params, climb=True), {**small, "train.on": "here"})
    assert set(tiny.states(run).values()) == {"reused"} and run["stages"]["train"]["metrics"]["weights"] > 0
    assert create(params)["state"] == "changed"  # without climb: a stage of the ladder may be left out
    e = over(house, start(params, {"simple.enough": "true"})["arn"])
    rows = {r["step"]: r for r in status(params)["steps"]}
    assert (e["status"], rows["train"]["state"], rows["judge"]["state"]) == ("Succeeded", "skipped", "made"), e["why"]
    assert "not needed: the simple model does" in rows["train"]["why"]
    run = execute(params, {"simple.enough": "true", "train.on": "here"})
    assert tiny.states(run) == {"simple": "reused", "train": "skipped", "judge": "reused"}


SEARCHED = tiny.notebook("melt", "ore", "iron", "heat: float = 1.5\nmarks: list[str] = ['a']", tiny.HEAD.format(stage="melt") + "from oven import melt\nkg = melt(stage.json('ore')['kg']) * heat",
                         "stage.save('iron', {'kg': kg})\nstage.metric(valid_error=abs(kg - 20))\nstage.done()")


@pytest.mark.slow
def test_a_search_tries_and_the_pipeline_takes_its_best(mine, house, capsys):
    "A tuning job of two trials, each a training job in the way of AWS's images; its best values start the pipeline, which takes from the store what the best trial made."
    tiny.use_case(mine, {"dig": DIG, "melt": SEARCHED}, "search", store="s3://shop/slml", sagemaker=json.dumps({"role": ROLE, "region": REGION}),
                  tune=json.dumps({"space": {"melt.heat": {"low": 0.5, "high": 4, "log": True}, "melt.marks": [["a"], ["it's"]]}, "metric": "melt.valid_error", "trials": 2, "workers": 1, "seed": 7}))
    code, said = said_by(capsys, "pipeline", "tune", "params/search.yaml")
    assert code == 0 and "at most 2 jobs, 1 at a time, started" in said, said
    name, = [n for n in house.searches if n.startswith("slml-search--")]
    search = house.searches[name]
    search["thread"].join(240)
    assert search["status"] == "Completed", search
    assert [abs(9 * float(t["values"]["melt__heat"]) - 20) == pytest.approx(t["value"], rel=1e-9) for t in search["trials"]] == [True, True]  # 6 kg × 3 m / 2 × heat, wanted are 20
    best = min(search["trials"], key=lambda t: t["value"])
    code, said = said_by(capsys, "pipeline", "tune", "params/search.yaml")  # again: it is shown, not started
    assert code == 0 and "done, 2 of 2 trials" in said and f"melt.heat={best['values']['melt__heat']}" in said, said
    assert said_by(capsys, "pipeline", "create", "params/search.yaml")[0] == 0
    code, said = said_by(capsys, "pipeline", "start", "params/search.yaml", "--tuned")
    assert code == 0, said
    arn, = [a for a in house.executions if "/slml-search/" in a]
    e = over(house, arn)
    assert e["status"] == "Succeeded", e["why"]
    assert e["requests"]["melt"]["HyperParameters"]["p_heat"] == best["values"]["melt__heat"]
    from slml_nb.core import load_params
    from slml_nb.pipeline import status
    assert {r["step"]: r["state"] for r in status(load_params("params/search.yaml"))["steps"]} == {"dig": "reused", "melt": "reused"}
    for what in (arn, search["arn"]): assert said_by(capsys, "stop", what) == (0, f"{what} is over already\n")


# ---------------------------------------------------------------- who may do it

NAMES = {"PipelineName": "pipeline", "ModelPackageGroupName": "model-package-group", "HyperParameterTuningJobName": "hyper-parameter-tuning-job", "TrainingJobName": "training-job", "ProcessingJobName": "processing-job"}


def needs(service, operation, given):
    "What IAM asks for a call: (action, resource, context)."
    def here(rest): return f"arn:aws:{service}:{REGION}:{ACCOUNT}:{rest}"
    name = next((n for n in NAMES if n in given), "")
    if service == "s3": what = f"arn:aws:s3:::{given['Bucket']}" + (f"/{given['Key']}" if "Key" in given else "")
    elif service == "iam": what = f"arn:aws:iam::{ACCOUNT}:role/{given['RoleName']}"
    elif service in ("scheduler", "events"): what = here(f"schedule/default/{given['Name']}" if service == "scheduler" else f"rule/{given.get('Name') or given['Rule']}")
    else: what = given.get("PipelineExecutionArn") or given.get("ModelPackageName") or here(f"{NAMES[name]}/{given[name]}")
    found = [(action_of(f"{service}:{operation}"), what, {"s3:prefix": given.get("Prefix", "")})]
    if given.get("Tags"): found.append((f"{service}:{'TagRole' if service == 'iam' else 'AddTags'}", what, {}))
    roles = [given.get("RoleArn"), given.get("TrainingJobDefinition", {}).get("RoleArn")] + [t.get("RoleArn") for t in [given.get("Target", {}), *given.get("Targets", [])]]
    return found + [("iam:PassRole", r, {"iam:PassedToService": f"{service}.amazonaws.com"}) for r in roles if r]


def missing(policy, service, calls): return sorted({(a, r) for o, given in calls for a, r, c in needs(service, o, given) if a and not allows(policy, a, r, c)})


def test_whoever_starts_pipelines_may_do_what_that_takes_and_no_more(mine, house, monkeypatch):
    "Created twice, started, watched, stopped; searched; by a timetable and by new objects: every call that was made, against the policy."
    from botocore.client import BaseClient
    from slml_nb.aws import policy_for
    from slml_nb.graph import plan
    from slml_nb.pipeline import _searched, create, start, status, stop
    house.p.client("s3").create_bucket(Bucket="arrivals")
    params = replace(load(pipeline={"cron": "0 6 * * *", "new_objects": "s3://arrivals/ore/"}), project="allowed", tune={"space": {"dig.depth": {"low": 1, "high": 9}}, "metric": {"dig.depth": "maximise"}, "trials": 2})
    monkeypatch.setattr(house, "execute", lambda arn, e: None), monkeypatch.setattr(house, "search", lambda name: None)  # nothing runs
    made, real = [], BaseClient._make_api_call
    def call(self, operation, given):
        if self._request_signer._credentials.access_key == "AKIDCLIENT": made.append((self.meta.service_model.service_name, operation, given))
        return real(self, operation, given)
    monkeypatch.setattr(BaseClient, "_make_api_call", call)
    create(params), create(params, {"melt.heat": "2"})
    arn = start(params)["arn"]
    group = house.p.client("sagemaker").create_model_package(ModelPackageGroupName="slml-allowed", ModelApprovalStatus="Approved", InferenceSpecification={"Containers": [{"Image": "x"}], "SupportedContentTypes": ["text/csv"], "SupportedResponseMIMETypes": ["text/csv"]})
    house.executions[arn]["steps"].append({"StepName": "register", "StepStatus": "Succeeded", "StartTime": 0, "Metadata": {"RegisterModel": {"Arn": group["ModelPackageArn"]}}})
    assert status(params)["steps"][-2]["approval"] == "approved" and stop(params)[0] == arn
    for _ in range(2): _searched(params, {}, False)
    from slml_nb.pipeline import stop_by_arn
    stop_by_arn(next(s["arn"] for n, s in house.searches.items() if "allowed" in n))
    policy = policy_for(params, *plan(params), "pipeline")
    assert [m for s in sorted({s for s, *_ in made}) for m in missing(policy, s, [(o, g) for x, o, g in made if x == s])] == []
    used = {a for s, o, g in made for a, *_ in needs(s, o, g)}
    extra = {a for x in policy["Statement"] for a in x["Action"]} - used
    assert extra <= {"s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject", "s3:ListBucket", "iam:GetRole"}, extra  # the store's own, of its retries, and to be told 404 and not 403 of what is not there; a role that is there
    other = policy_for(replace(params, project="allowed-2"), *plan(params), "pipeline")
    assert {o for o, _ in [(o, 0) for s, o, g in made if s == "sagemaker" and missing(other, s, [(o, g)])]} == {o for s, o, g in made if s == "sagemaker"}  # none of it is another project's
