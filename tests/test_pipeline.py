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
def house(tmp_path_factory):
    from slml_nb.jobs import wheel
    with peer(grace=3) as p:
        house = Pipelines(p)
        house.wheel, house.forms = wheel(), tmp_path_factory.mktemp("forms")
        yield house


@pytest.fixture
def mine(project, house, monkeypatch):
    "The tiny use case, with the store in the bucket; the environment of a client."
    for name, value in house.p.env.items(): monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLML_CACHE", str(project.folder / "cache"))
    (project.folder / "cache").mkdir()
    (project.folder / "cache/sagemaker").symlink_to(house.forms)  # what SageMaker's SDK was asked once
    monkeypatch.chdir(project.folder)
    from slml_nb import jobs, pipeline
    for room in (jobs, pipeline): monkeypatch.setattr(room, "wheel", lambda *_: house.wheel)  # built once
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
    params = load(pipeline={"approval": "person"}, kms="alias/ore")
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
    assert [r["SecurityConfig"] for o, r in made if o == "CreateModelPackage"] == [{"KmsKeyId": "alias/ore"}]
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
    assert (plan["ScheduleExpression"], plan["ScheduleExpressionTimezone"], plan["Target"]["Arn"]) == ("cron(0 6 ? * MON-FRI *)", "Europe/Berlin", told["arn"])
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


def quiet(house, monkeypatch): monkeypatch.setattr(house, "execute", lambda arn, e: None)  # executions begin, and nothing comes of them


def test_code_of_an_older_definition_stays_while_an_execution_needs_it(mine, house, monkeypatch):
    "Created, started, created anew with other code, and swept: what the execution under way reads is there until it is over."
    import datetime as dt
    from moto.s3.models import s3_backends
    from slml_nb import jobs
    from slml_nb.keep import gc
    from slml_nb.pipeline import create, start
    from slml_nb.store import open_store
    quiet(house, monkeypatch)
    params, parts, store = replace(load(), project="older"), jobs.wheel_parts(), open_store("s3://shop/slml")
    def code(n): monkeypatch.setattr(jobs, "wheel_parts", lambda: {**parts, "slml_nb/n.py": b"# %d" % n})  # a change of the package
    def there():
        for key in s3_backends[ACCOUNT]["aws"].buckets["shop"].keys.values(): key.last_modified -= dt.timedelta(days=60)
        (mine.folder / "runs").mkdir(exist_ok=True)
        gc(mine.folder / "runs", "30d", dry_run=False, store="s3://shop/slml", cache=mine.folder / "cache")
        return {name.split("/")[3] for name in store.list("older/jobs/code/")}
    store.put("older/jobs/code/0000/start.py", b"nobody needs this"), store.put("older/jobs/code/0000/.whole", b"")
    code(1), create(params)
    first, arn = there(), start(params)["arn"]
    assert len(first) == 1 and "0000" not in first  # the broom does sweep
    code(2)
    assert "the package slml_nb changed" in create(params)["changes"][0]
    both = there()
    assert first < both and len(both) == 2
    two = start(params, {"melt.heat": "9"})["arn"]
    code(3), create(params)
    assert len(there()) == 3  # two executions, of two older definitions
    house.executions[arn]["status"] = "Succeeded"
    assert create(params)["state"] == "unchanged" and there() == there() - first and len(there()) == 2
    house.executions[two]["status"] = "Stopping"  # its jobs may still read
    create(params)
    assert len(there()) == 2
    house.executions[two]["status"] = "Failed"
    create(params)
    assert len(there()) == 1


KINDS = tiny.notebook("kinds", "", "seen", "i: int = 3\nf: float = 1e-5\nb: bool = True\ns: str = 'grüße ☃ 日本'\nnone: str | None = None\noi: int | None = 4\nls: list[str] = ['a', 'ü']\nd: dict[str, float] = {'a': 1.5}\n"
                      "c: Literal['red', 'green'] = 'red'\nany_: list = [1, 'a']\nmany: str = 'line one\\nline two'\ngröße: int = 5\nwhen: date = '2020-01-02'", tiny.HEAD.format(stage="kinds") + "stage.save('seen', {'i': i})\nstage.done()")
TYPED = {"i": ("7", 7), "f": (".5", 0.5), "b": ("no", False), "s": ("it's 100 %\nor %27", "it's 100 %\nor %27"), "none": ("x", "x"), "oi": ("null", None), "ls": ("b,c", ["b", "c"]), "d": ("{a: 2}", {"a": 2.0}), "c": ("green", "green"), "any_": ("[1]", [1]), "many": ("1\r\n2", "1\r\n2")}


def test_parameters_of_every_type_arrive_as_they_were_typed(mine, house, monkeypatch):
    "From -p through the request of the execution and that of the job to what the notebook is given."
    from slml_nb.core import load_params
    from slml_nb.pipeline import bundle_of, create, opened, parameter_name, pipeline_parameters, plan, start, unsheltered
    quiet(house, monkeypatch)
    tiny.use_case(mine, {"kinds": KINDS}, "kinds", store="s3://shop/slml", sagemaker=json.dumps({"role": ROLE, "region": REGION}))
    params = load_params("params/kinds.yaml")
    create(params)
    assert pipeline_parameters(*plan(params), params, {})[1] == ["kinds.größe", "kinds.when"]  # a name that SageMaker does not take, and a date that is a text: as the set has them
    for n, f in bundle_of(params, *plan(params)).items(): mine.write(f"there/{n}", f.decode())
    for given, expected in (({}, {}), ({n: text for n, (text, _) in TYPED.items()}, {n: v for n, (_, v) in TYPED.items()})):
        e = house.executions[arn := start(params, given)["arn"]]
        step = next(s for s in e["definition"]["Steps"] if s["Name"] == "kinds")
        told = house.filled(arn, e, step)["HyperParameters"]
        monkeypatch.chdir(mine.folder / "there")
        got = opened(mine.folder / "there", "s3://shop/slml", {f"kinds.{n[2:]}": unsheltered(v) for n, v in told.items() if n.startswith("p_")})[2]["kinds"]
        monkeypatch.chdir(mine.folder)
        assert got == {**plan(params)[1]["kinds"], **expected}
    assert parameter_name("kinds", "größe") not in {p["Name"] for p in e["definition"]["Parameters"]}


@pytest.mark.parametrize("typed, way_out", [
    ("melt.spot=true", "slml pipeline create PARAMS -p melt.spot="), ("melt.on=ml.banana", "cannot run on 'ml.banana'"), ("melt.on=here", "cannot run on 'here'"), ("melt.on=ml.g5.xlarge", "create the pipeline again"), ("no.on=ml.m5.large", "there is dig, melt"),
    ("melt.heet=3", "did you mean 'heat'?"), ("heat=hot", "give a number"), ("heat=inf", "cannot carry"), ("note=" + "x" * 1025, "cannot carry"), (f"depth={2**63}", "cannot carry"), ("breaks=maybe", "true or false")])
def test_what_cannot_start_is_refused_with_a_way_out(mine, house, capsys, monkeypatch, typed, way_out):
    from slml_nb.cli import main
    quiet(house, monkeypatch)
    if not any(n == "CreatePipeline" and r["PipelineName"] == "slml-mine" for n, r, _ in house.requests): main(["pipeline", "create", "params/mine.yaml"])
    begun = house.p.count("StartPipelineExecution")
    code, capsys_said = main(["pipeline", "start", "params/mine.yaml", "-p", typed]), capsys.readouterr()
    assert code == 2 and way_out in capsys_said.err and house.p.count("StartPipelineExecution") == begun, capsys_said


def test_nothing_there_and_nothing_running_is_said(mine, house, capsys, monkeypatch):
    from slml_nb.cli import main
    from slml_nb.pipeline import pipeline_name
    quiet(house, monkeypatch)
    tiny.use_case(mine, {"dig": DIG, "melt": MELT}, "fresh.and_new", store="s3://shop/slml", sagemaker=json.dumps({"role": ROLE, "region": REGION}), about=json.dumps("Two lines,\nand 100 % of it"))
    def said(*words):
        code, out = main(["pipeline", *words]), capsys.readouterr()
        return code, (out.out + out.err).strip()
    file = "params/fresh.and_new.yaml"
    for what in ("start", "status", "stop"): assert said(what, file)[0] == 2 and "slml pipeline create" in said(what, file)[1]
    code, text = said("create", file)
    assert (code, text.splitlines()[0]) == (0, f"{pipeline_name('fresh.and_new')} created"), text
    for what in ("status", "stop"): assert "slml pipeline start" in said(what, file)[1]
    assert said("status", file, f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:pipeline/slml-mine/execution/1")[0] == 2
    arn = said("start", file)[1].partition(": ")[0]
    assert said("stop", file) == (0, f"{arn} is being stopped") and said("stop", file) == (0, f"{arn} is being stopped already")
    house.executions[arn]["status"] = "Stopped"
    assert said("stop", file) == (0, f"{arn} is over already")
    for wrong in ("arn:foo", f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:model/x"):
        assert main(["stop", wrong]) == 2 and "names nothing that could be stopped" in capsys.readouterr().err


def test_two_sets_of_one_project_do_not_start_each_other(mine, house, monkeypatch):
    from slml_nb.core import SlmlError
    from slml_nb.pipeline import create, start
    quiet(house, monkeypatch)
    one, two = replace(load(), project="shared"), replace(load(), project="shared", file="params/two.yaml", values={"melt": {"heat": 7.0}})
    create(one)
    assert create(two)["changes"][:2] == ["set: params/mine.yaml → params/two.yaml", "parameter melt-heat: 1.5 → 7.0"]
    with pytest.raises(SlmlError, match="created from params/two.yaml"): start(one)
    assert start(two)["state"] == "started" and create(one)["state"] == "changed" and start(one)["state"] == "started"


def test_what_the_set_no_longer_names_starts_nothing_any_more(mine, house, monkeypatch):
    "A timetable and a rule come, change and go; a word that is wrong changes nothing."
    from botocore.exceptions import ClientError
    from slml_nb.core import SlmlError
    from slml_nb.pipeline import create
    house.p.client("s3").create_bucket(Bucket="coming")
    events, scheduler = house.p.client("events"), house.p.client("scheduler")
    def made(**words): return create(replace(load(pipeline=words), project="comes"))
    def pipeline(): return house.p.client("sagemaker").describe_pipeline(PipelineName="slml-comes")
    for words, why in (({"cron": "61 6 * * *"}, "no minute"), ({"cron": "0 6 * * *", "zone": "Mars/Base"}, "no time zone"), ({"steps": "many"}, "how many steps"), ({"new_objects": "s3://no-such-bucket-here/in/"}, "there is no bucket 'no-such-bucket-here'")):
        with pytest.raises(SlmlError, match=why): made(**words)
        with pytest.raises(ClientError, match="not find|not exist"): pipeline()
    odd = "s3://coming/größe & 'gut' [1]/"
    assert len(made(cron="0 6 * * *", new_objects=odd, steps="2")["triggers"]) == 2
    assert json.loads(events.describe_rule(Name="slml-comes")["EventPattern"])["detail"]["object"] == {"key": [{"prefix": "größe & 'gut' [1]/"}]}
    assert [r["ParallelismConfiguration"] for o, r, _ in house.requests if o == "CreatePipeline" and r["PipelineName"] == "slml-comes"] == [{"MaxParallelExecutionSteps": 2}]
    told = made(cron="0 7 * * *", new_objects="s3://coming/*/ore.csv", steps="4")
    assert {"cron: 0 6 * * * → 0 7 * * *", f"new_objects: {odd} → s3://coming/*/ore.csv", "steps: 2 → 4"} == set(told["changes"])
    assert scheduler.get_schedule(Name="slml-comes")["ScheduleExpression"] == "cron(0 7 * * ? *)" and "wildcard" in events.describe_rule(Name="slml-comes")["EventPattern"]
    assert [r["ParallelismConfiguration"] for o, r, _ in house.requests if o == "UpdatePipeline" and r["PipelineName"] == "slml-comes"] == [{"MaxParallelExecutionSteps": 4}]
    assert made(cron="0 7 * * *")["triggers"][1] == "no longer when an object s3://coming/*/ore.csv arrives"
    with pytest.raises(ClientError, match="not exist"): events.describe_rule(Name="slml-comes")
    assert made()["triggers"] == ["no longer at 0 7 * * *"] and made()["triggers"] == []
    with pytest.raises(ClientError, match="not exist|not found"): scheduler.get_schedule(Name="slml-comes")


@pytest.mark.parametrize("melt, head", [
    ({"on": "ml.m5.large"}, {}), ({"on": "ml.g5.xlarge", "spot": True, "max_hours": 2.0, "volume_gb": 60}, {}), ({"on": "ml.m5.large", "keep_warm_minutes": 10}, {"tags": {"größe": "日本"}}), ({"on": "sagemaker"}, {"images": {"cpu": "123456789012.dkr.ecr.us-east-1.amazonaws.com/x:1", "serve": "123456789012.dkr.ecr.us-east-1.amazonaws.com/y:1"}}),
    ({"on": "ml.m5.large", "image": "123456789012.dkr.ecr.us-east-1.amazonaws.com/own:1"}, {"kms": "alias/ore"}), ({}, {"kms": "arn:aws:kms:us-east-1:123456789012:key/1", "subnets": ["subnet-1"], "security_groups": ["sg-1"]}),
    ({"on": "ml.m5.large", "spot": True}, {"region": "cn-north-1", "role": "arn:aws-cn:iam::123456789012:role/slml", "pipeline": {"approval": "person", "steps": "3"}})])
def test_every_option_is_what_the_calls_take(mine, house, melt, head):
    "Each step's arguments, with each word of a stage and of the account, against botocore's model: by our own check, and by the one that the test's server has."
    from peer_sagemaker import wrong
    from slml_nb.pipeline import CALLS, defaults_of, filled, problems_of, render, steps_in
    definition, _ = render(replace(load(**head), values={"melt": melt}))
    assert problems_of(definition) == []
    known, model = defaults_of(definition), house.model
    by = {s["Name"]: filled(s["Arguments"], lambda kind, path: "word" if kind != "Get" else known.get(path, "e1")) for s in steps_in(definition["Steps"]) if s["Type"] in CALLS}
    for s in steps_in(definition["Steps"]):
        if s["Type"] in CALLS: assert wrong(model.operation_model(CALLS[s["Type"]]).input_shape, by[s["Name"]]) == [], s["Name"]
    assert {s["Type"] for s in steps_in(definition["Steps"])} == {"Training", "Processing", "Condition", "RegisterModel", "Fail"}
    kms = [by["register"].get("SecurityConfig", {}).get("KmsKeyId"), by["melt"]["OutputDataConfig"].get("KmsKeyId"), by["melt"]["ResourceConfig"].get("VolumeKmsKeyId"), by["gate"]["ProcessingOutputConfig"].get("KmsKeyId")]
    assert kms == [head.get("kms")] * 4


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
    before, bare = len(made), replace(params, sagemaker={n: v for n, v in params.sagemaker.items() if n != "pipeline"})
    assert [t.partition(" ")[0] for t in create(bare)["triggers"]] == ["no"] * 2  # no longer, by the policy of a set that names neither
    assert {"DeleteSchedule", "RemoveTargets", "DeleteRule"} <= {o for _, o, _ in made[before:]} and [m for s, o, g in made[before:] for m in missing(policy_for(bare, *plan(bare), "pipeline"), s, [(o, g)])] == []
    used = {a for s, o, g in made for a, *_ in needs(s, o, g)}
    extra = {a for x in policy["Statement"] for a in x["Action"]} - used
    assert extra <= {"s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject", "s3:ListBucket", "iam:GetRole"}, extra  # the store's own, of its retries, and to be told 404 and not 403 of what is not there; a role that is there
    other = policy_for(replace(params, project="allowed-2"), *plan(params), "pipeline")
    assert {o for o, _ in [(o, 0) for s, o, g in made if s == "sagemaker" and missing(other, s, [(o, g)])]} == {o for s, o, g in made if s == "sagemaker"}  # none of it is another project's
