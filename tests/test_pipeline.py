"""A pipeline from a parameter set: rendered, created, started, executed step by step with the real containers' commands, and what it leaves."""
import json, os, subprocess, threading, time, types
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from peer_sagemaker import ACCOUNT, REGION, image, peer, possible, wrong

pytestmark = pytest.mark.skipif(bool(possible()), reason=possible() or "")
ROLE = f"arn:aws:iam::{ACCOUNT}:role/slml"


class Executor:
    "SageMaker Pipelines, as small as a test allows: steps in their order, each through the call that it stands for."

    def __init__(self, p):
        import boto3
        self.p, self.executions, self.tokens = p, {}, {}
        self.real, p.sagemaker, self.lock = p.sagemaker, self.answer, threading.Lock()
        self.model = boto3.client("sagemaker", region_name=REGION).meta.service_model

    def answer(self, operation, environ, start):
        "What moto lacks: executions that are executed, once for each token."
        import io
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"], request = io.BytesIO(body), json.loads(body or b"{}")
        if shape := self.model.operation_model(operation).input_shape: assert not wrong(shape, request), wrong(shape, request)
        arn = request.get("PipelineExecutionArn")
        if operation == "StartPipelineExecution": said = {"PipelineExecutionArn": self.start(request)}
        elif operation == "ListPipelineExecutionSteps": said = {"PipelineExecutionSteps": self.executions[arn]["steps"][::-1]}
        elif operation == "StopPipelineExecution": said = {"PipelineExecutionArn": arn, **(self.executions[arn].update(stop=True) or {})}
        elif operation == "ListPipelineExecutions":
            said = {"PipelineExecutionSummaries": [{"PipelineExecutionArn": a, "PipelineExecutionStatus": e["status"], "PipelineExecutionDisplayName": e["shown"], "StartTime": e["begun"]} for a, e in self.executions.items()]}
        elif operation == "DescribePipelineExecution": said = {"PipelineExecutionArn": arn, "PipelineExecutionStatus": self.executions[arn]["status"], "FailureReason": self.executions[arn]["why"], "CreationTime": self.executions[arn]["begun"]}
        elif operation == "DescribePipelineDefinitionForExecution": said = {"PipelineDefinition": json.dumps(self.executions[arn]["definition"])}
        else: return self.real(operation, environ, start)
        start("200 OK", [("Content-Type", "application/x-amz-json-1.1")])
        return [json.dumps(said).encode()]

    def start(self, request):
        "StartPipelineExecution: the same token is the same execution."
        with self.lock: return self.begin(request)

    def begin(self, request):
        "A new execution, unless its token is known."
        if request["ClientRequestToken"] in self.tokens: return self.tokens[request["ClientRequestToken"]]
        there = self.p.client("sagemaker").describe_pipeline(PipelineName=request["PipelineName"])
        arn = f"{there['PipelineArn']}/execution/{len(self.executions):012d}"
        self.tokens[request["ClientRequestToken"]] = arn
        definition = json.loads(there["PipelineDefinition"])
        types_ = {"String": str, "Integer": int, "Float": float, "Boolean": lambda v: v == "true"}
        given = {x["Name"]: x["Value"] for x in request.get("PipelineParameters", [])}
        values = {x["Name"]: types_[x["Type"]](given[x["Name"]]) if x["Name"] in given else x["DefaultValue"] for x in definition["Parameters"]}
        e = self.executions[arn] = {"definition": definition, "values": values, "steps": [], "status": "Executing", "why": "", "shown": request.get("PipelineExecutionDisplayName", ""), "begun": time.time(), "stop": False, "requests": {}, "files": {}}
        e["thread"] = threading.Thread(target=self.execute, args=(arn, e), daemon=True)
        e["thread"].start()
        return arn

    def execute(self, arn, e):
        "All steps whose turn it is, until none is left or one fails."
        from slml_nb.pipeline import steps_in
        try: self.branch(arn, e, e["definition"]["Steps"])
        except Failed as failed: e["status"], e["why"] = "Failed", str(failed)
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
            row = {"StepName": step["Name"], "StepStatus": "Executing", "StartTime": time.time(), "Metadata": {}}
            e["steps"].append(row)
            try: getattr(self, step["Type"].lower())(arn, e, step, row)
            except Failed as failed:
                row.update(StepStatus="Failed", FailureReason=str(failed))
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
        from slml_nb.pipeline import filled
        request = filled(step["Arguments"], self.known(arn, e))
        e["requests"][step["Name"]] = request
        return request

    def training(self, arn, e, step, row):
        name = f"pipelines-{arn.rpartition('/')[2]}-{step['Name'].replace('_', '-')}"[:63]
        row["Metadata"] = {"TrainingJob": {"Arn": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{name}"}}
        job = self.p.run_job({**self.filled(arn, e, step), "TrainingJobName": name})
        job.thread.join()
        if job.status != "Completed": print(*self.p.logs(name)[-40:], sep="\n")
        if job.status != "Completed": raise Failed(f"ClientError: {job.reason}")

    def processing(self, arn, e, step, row):
        request, name = self.filled(arn, e, step), f"pipelines-{arn.rpartition('/')[2]}-{step['Name']}"
        assert not wrong(self.model.operation_model("CreateProcessingJob").input_shape, {**request, "ProcessingJobName": name})
        row["Metadata"] = {"ProcessingJob": {"Arn": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:processing-job/{name}"}}
        ml = self.p.place / "jobs" / name
        for folder in ("input/config", "output", "processing"): (ml / folder).mkdir(parents=True)
        for i in request["ProcessingInputs"]: self.p.download(i["S3Input"]["S3Uri"], ml / i["S3Input"]["LocalPath"].removeprefix("/opt/ml/"))
        env = {"PATH": f"{image(self.p.place)}/bin:/usr/bin:/bin", "HOME": "/root", "AWS_ENDPOINT_URL": self.p.url, "AWS_ACCESS_KEY_ID": "AKIDROLE", "AWS_SECRET_ACCESS_KEY": "test", "OMP_NUM_THREADS": "1", **request["Environment"]}
        app = request["AppSpecification"]
        done = self.p.in_namespace(ml, [*app["ContainerEntrypoint"], *app["ContainerArguments"]], env)
        said = done.communicate()[0].decode()
        if done.returncode: raise Failed(f"AlgorithmError: {(ml / 'output/message').read_text() if (ml / 'output/message').exists() else said[-500:]}, exit code: {done.returncode}")
        for o in request["ProcessingOutputConfig"]["Outputs"]:
            place, (bucket, _, prefix) = ml / o["S3Output"]["LocalPath"].removeprefix("/opt/ml/"), o["S3Output"]["S3Uri"].removeprefix("s3://").partition("/")
            for f in [f for f in place.rglob("*") if f.is_file()]: self.p.client("s3").upload_file(str(f), bucket, f"{prefix}/{f.relative_to(place).as_posix()}")
            for x in step.get("PropertyFiles", []):
                if x["OutputName"] == o["OutputName"]: e["files"][step["Name"], x["PropertyFileName"]] = json.loads((place / x["FilePath"]).read_text())

    def condition(self, arn, e, step, row):
        from slml_nb.pipeline import filled
        meets = {"GreaterThanOrEqualTo": lambda a, b: a >= b, "Equals": lambda a, b: a == b}
        sides = [filled([c["LeftValue"], c["RightValue"]], self.known(arn, e)) for c in step["Arguments"]["Conditions"]]
        met = all(meets[c["Type"]](*s) for c, s in zip(step["Arguments"]["Conditions"], sides))
        row.update(StepStatus="Succeeded", Metadata={"Condition": {"Outcome": str(met).lower()}})
        self.branch(arn, e, step["Arguments"]["IfSteps" if met else "ElseSteps"])

    def registermodel(self, arn, e, step, row):
        row["Metadata"] = {"RegisterModel": {"Arn": self.p.client("sagemaker").create_model_package(**self.filled(arn, e, step))["ModelPackageArn"]}}

    def fail(self, arn, e, step, row):
        row["Metadata"] = {"Fail": {"ErrorMessage": self.filled(arn, e, step)["ErrorMessage"]}}
        raise Failed(row["Metadata"]["Fail"]["ErrorMessage"])


class Failed(Exception):
    "A step did not succeed."


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
        house = Executor(p)
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


@pytest.mark.slow
def test_pipeline_makes_what_a_run_makes(mine, house):
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
    assert {r["step"]: r["state"] for r in told["steps"]} == {"dig": "made", "melt": "made", "gate": "done", "met": "met", "register": "done", "not-met": "waiting"}
    run = execute(params)  # on this machine, with the same store
    assert tiny.states(run) == {"dig": "reused", "melt": "reused"}
    assert {s: v["key"] for s, v in run["stages"].items()} == {r["step"]: r["key"] for r in told["steps"] if r["key"]}
    package = house.p.client("sagemaker").describe_model_package(ModelPackageName=e["steps"][-1]["Metadata"]["RegisterModel"]["Arn"])
    assert (package["ModelApprovalStatus"], package["ModelPackageGroupName"]) == ("PendingManualApproval", "slml-mine")
    said = package["CustomerMetadataProperties"]
    assert (said["words"], said["value"], said["interval"]) == ("13.5 kg 100 percent 5.0 were asked for.", "13.5", "1 to 2.5")
    bucket, _, key = package["InferenceSpecification"]["Containers"][0]["ModelDataUrl"].removeprefix("s3://").partition("/")
    assert house.p.client("s3").head_object(Bucket=bucket, Key=key)["ContentLength"] > 50


@pytest.mark.slow
def test_gate_not_met(mine, house):
    from slml_nb.pipeline import create, start, status
    from slml_nb.run import execute
    create(params := load())
    assert tiny.states(execute(params, {"depth": "2"}, stop="dig"))["dig"] == "made"  # here first
    e = over(house, start(params, {"melt.limit": "99", "depth": "2"})["arn"])
    assert (e["status"], e["why"]) == ("Failed", "The gate was not met: 9.0 kg (100 %), 99.0 were asked for.")
    rows = {r["step"]: r for r in status(params)["steps"]}
    assert [rows[n]["state"] for n in ("dig", "melt", "met", "register")] == ["reused", "made", "not met", "waiting"] and rows["not-met"]["why"] == e["why"]
    assert e["requests"]["melt"]["HyperParameters"]["p_limit"] == "99.0"


@pytest.mark.slow
def test_failing_stage_is_named(mine, house):
    from slml_nb.pipeline import create, start, status, status_text
    create(params := load())
    e = over(house, start(params, {"breaks": "yes"})["arn"])
    told = status(params)
    rows = {r["step"]: r for r in told["steps"]}
    assert (e["status"], rows["melt"]["state"], rows["gate"]["state"]) == ("Failed", "failed", "waiting")
    text = status_text(told)
    assert "ValueError: the oven is cold" in text and "melt, cell" in rows["melt"]["why"] + text and "aws logs tail /aws/sagemaker/TrainingJobs --log-stream-name-prefix " + rows["melt"]["job"] in text


@pytest.mark.slow
def test_starts_at_the_same_moment_are_one_that_can_be_stopped(mine, house):
    from slml_nb.pipeline import create, start, status, stop
    create(params := load())
    said = []
    starters = [threading.Thread(target=lambda: said.append(start(params, {"melt.heat": "7"})["arn"])) for _ in range(3)]
    for t in starters: t.start()
    for t in starters: t.join()
    assert len(set(said)) == 1 and stop(params) == said[0]
    assert over(house, said[0])["status"] == "Stopped" and status(params)["state"] == "stopped"


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
