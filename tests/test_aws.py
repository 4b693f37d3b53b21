"""An account of AWS's: policies against real lists of actions and against the calls that are made, the doctor against a server, and no boto3 where nothing runs away."""
import ast, contextlib, fnmatch, functools, json, os, subprocess, sys
from pathlib import Path

import boto3, pytest
from botocore import xform_name
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from moto import mock_aws

from slml_nb import aws
from slml_nb.aws import Account, Scope, action_of, check_images, check_key, check_network, doctor, idle, job_name, job_statements, make_bucket, policy_for, role_of, run_statements, tags_of, trust_policy
from slml_nb.core import ParamSet, Secret
from slml_nb.graph import Graph, Node
from slml_nb.store import open_store, put_folder

ROOT = Path(__file__).resolve().parent.parent
NUMBER, REGION = "123456789012", "eu-central-1"
ROLE, KEY = f"arn:aws:iam::{NUMBER}:role/slml-taxi", f"arn:aws:kms:{REGION}:{NUMBER}:key/1234abcd-12ab-34cd-56ef-1234567890ab"
IMAGE = f"{NUMBER}.dkr.ecr.{REGION}.amazonaws.com/slml/cpu:1"


def use(store="s3://my-bucket/slml", project="taxi", **head): return ParamSet("taxi.yaml", project, {}, {}, store=store, sagemaker={"role": ROLE, "region": REGION, **head})


def graph(**machine):
    token = Secret("x")
    token.name = "TOKEN"
    train = Node("train", Path("train.ipynb"), {"needs": [], "makes": ["model"], "reads": "extra", "title": "Train"}, {}, {}, {"on": "ml.g5.xlarge", **machine})
    return Graph([train]), {"train": {"extra": ["s3://other-bucket/rows/*.csv"], "token": token}}


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    "No account of whoever runs the tests."
    for name in [n for n in os.environ if n.startswith(("AWS_", "SLML_SAGEMAKER"))]: monkeypatch.delenv(name)
    for name, value in dict(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_REGION=REGION, AWS_DEFAULT_REGION=REGION, AWS_EC2_METADATA_DISABLED="true").items(): monkeypatch.setenv(name, value)


SETS = ("run", "job", "pipeline", "pipeline-role", "doctor", "bucket")
FULL = dict(pipeline={"cron": "0 6 * * mon-fri", "new_objects": "s3://inbox/ore/"}, kms=KEY, subnets=["subnet-1"], security_groups=["sg-1"], images={"cpu": IMAGE})


def policies(monkeypatch, which, **head):
    monkeypatch.setenv("SLML_SECRET_TOKEN", "taxi/token")
    return policy_for(use(**head), *graph(), which)


# ---------------------------------------------------------------- what IAM itself knows

def test_the_linter_takes_the_policies(tmp_path, monkeypatch):
    "Names of actions against AWS's Service Authorization Reference, forms of resources for each action, versions, conditions: cfn-lint's rules for IAM, and the data that it ships."
    def template(policy): return {"Resources": {"P": {"Type": "AWS::IAM::ManagedPolicy", "Properties": {"PolicyDocument": policy}}, "R": {"Type": "AWS::IAM::Role", "Properties": {"AssumeRolePolicyDocument": trust_policy(NUMBER)}}}}
    found = {f"{which}-{i}": template(policies(monkeypatch, which, **head)) for which in SETS for i, head in enumerate(({}, FULL))}
    wrong = json.loads(json.dumps(found["run-0"]).replace("s3:ListBucket", "s3:ListBuckett"))
    for name, t in {**found, "wrong": wrong}.items(): (tmp_path / f"{name}.json").write_text(json.dumps(t))
    done = subprocess.run([Path(sys.executable).with_name("cfn-lint"), "--include-checks", "I", "--regions", "eu-central-1", "--format", "json", "--", *map(str, sorted(tmp_path.glob("*.json")))], capture_output=True, text=True)
    said = json.loads(done.stdout)
    about = {(Path(f["Filename"]).stem, f["Rule"]["Id"], f["Message"]) for f in said}
    assert {name for name, *_ in about} == {"wrong"}, about  # and it does look


def test_the_policies_fit_into_iam(monkeypatch):
    "6,144 characters without blanks are the limit of a managed policy, 10,240 of what a role carries itself; a use case of thirty stages is no longer."
    for which in SETS: assert len(json.dumps(policies(monkeypatch, which, **FULL), separators=(",", ":"))) < 6144, which


# ---------------------------------------------------------------- nothing missing, nothing superfluous

def allows(policy, action, resource, context=()):
    "What IAM would say: a statement whose action, resource and conditions all fit."
    context = dict(context)
    def fits(values, value): return any(fnmatch.fnmatchcase(value, v) for v in ([values] if isinstance(values, str) else values))
    return any(action in s["Action"] and fits(s["Resource"], resource) and all(k in context and fits(v, context[k]) for keys in s.get("Condition", {}).values() for k, v in keys.items()) for s in policy["Statement"])


def resource_of(service, operation, given):
    "What a call is about, as IAM names it, and what IAM knows of the request."
    def here(rest, service=service): return f"arn:aws:{service}:{REGION}:{NUMBER}:{rest}"
    if service == "s3": return f"arn:aws:s3:::{given['Bucket']}" + (f"/{given['Key']}" if "Key" in given else ""), {"s3:prefix": given.get("Prefix", "")}
    if service == "iam": return given.get("PolicySourceArn") or f"arn:aws:iam::{NUMBER}:role/{given['RoleName']}", {}
    if service == "logs": return here(f"log-group:{given['logGroupName']}:" + (f"log-stream:{given['logStreamName']}" if "logStreamName" in given else "*")), {}
    if service == "ecr": return f"arn:aws:ecr:{REGION}:{given['registryId']}:repository/{given['repositoryName']}", {}
    if service == "kms": return given["KeyId"], {}
    names = {"TrainingJobName": "training-job", "EndpointName": "endpoint", "EndpointConfigName": "endpoint-config", "NotebookInstanceName": "notebook-instance"}
    name = next((n for n in names if n in given), None)
    return (here(f"{names[name]}/{given[name]}"), {}) if service == "sagemaker" and name and not operation.startswith("List") else ("*", {})


class Recorded:
    "The calls that were made: (action, resource, context)."
    def __init__(self): self.calls = []

    def note(self, service, operation, given):
        def add(action, resource, context): self.calls.append((action, resource, context)) if action else None
        for one in [{**given, "Key": o["Key"]} for o in given["Delete"]["Objects"]] if operation == "DeleteObjects" else [given]: add(action_of(f"{service}:{operation}"), *resource_of(service, operation, one))
        if given.get("Tags") and operation.startswith("Create"): add(f"{service}:AddTags", *resource_of(service, operation, given))
        if "RoleArn" in given: add("iam:PassRole", given["RoleArn"], {"iam:PassedToService": "sagemaker.amazonaws.com"})

    def missing(self, policy): return sorted({(a, r) for a, r, c in self.calls if not allows(policy, a, r, c)})
    def actions(self): return {a for a, *_ in self.calls}


def allowed_actions(policy): return {a for s in policy["Statement"] for a in s["Action"]}


@contextlib.contextmanager
def recording(**answers):
    "moto, what moto does not play, and a record of every call."
    made, real = Recorded(), BaseClient._make_api_call
    def call(self, operation, given):
        made.note(self.meta.service_model.service_name, operation, given)
        return answers[operation](given) if operation in answers else real(self, operation, given)
    with mock_aws(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseClient, "_make_api_call", call)
        yield made


REQUEST = {"RoleArn": ROLE, "AlgorithmSpecification": {"TrainingImage": IMAGE, "TrainingInputMode": "File"}, "OutputDataConfig": {"S3OutputPath": "s3://my-bucket/slml/taxi/jobs/output"},
           "ResourceConfig": {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 30}, "StoppingCondition": {"MaxRuntimeInSeconds": 600}}


def plain_bucket():
    "A bucket without the policy that refuses requests without TLS: moto does not read the condition, and would refuse all."
    boto3.client("s3").create_bucket(Bucket="my-bucket", CreateBucketConfiguration={"LocationConstraint": REGION})


def stored_things(tmp_path, project="taxi", many=True):
    "What a run does to the store, below its project."
    store, big = open_store("s3://my-bucket/slml"), tmp_path / "big"
    big.write_bytes(os.urandom(1 << 20) * 40)
    folder = tmp_path / "k"
    (folder).mkdir()
    (folder / "made.json").write_text("{}"), (folder / "t").write_text("rows")
    with store.claim(f"{project}/ab/key"): put_folder(store, f"{project}/ab/key", folder)
    store.exists(f"{project}/ab/none"), store.put(f"{project}/.writable", "yes"), store.put(f"{project}/big", big), store.get(f"{project}/ab/key/made.json"), store.list(f"{project}/ab/")
    store.local(f"{project}/big"), store.delete(f"{project}/big")
    if many: store.delete_folder(f"{project}/ab/key")


def test_whoever_starts_a_run_may_do_what_it_does_and_no_more(tmp_path, monkeypatch):
    account, job = aws.account_of(use()), job_name("taxi", "train", "0" * 16)
    monkeypatch.setenv("SLML_CACHE", str(tmp_path / "cache"))
    with recording(DescribeLogStreams=lambda g: {"logStreams": []}, GetLogEvents=lambda g: {"events": []}, StopTrainingJob=lambda g: {}) as made:
        plain_bucket()
        made.calls.clear()
        stored_things(tmp_path)
        client, logs = account.client("sagemaker"), account.client("logs")
        client.create_training_job(TrainingJobName=job, Tags=tags_of(account), **REQUEST), client.describe_training_job(TrainingJobName=job), client.stop_training_job(TrainingJobName=job)
        logs.describe_log_streams(logGroupName="/aws/sagemaker/TrainingJobs", logStreamNamePrefix=f"{job}/"), logs.get_log_events(logGroupName="/aws/sagemaker/TrainingJobs", logStreamName=f"{job}/algo-1-1")
    policy = policy_for(use())
    assert made.missing(policy) == []
    assert allowed_actions(policy) - made.actions() <= {"s3:AbortMultipartUpload"}  # boto3 asks for it when an upload is broken off
    assert [a for a, *_ in made.missing(policy_for(use(project="taxi-2")))]  # and the policy of another project does not let it


# what AWS's services do in the name of the role, and no code of ours: docs.aws.amazon.com/sagemaker/latest/dg/sagemaker-roles.html, "CreateTrainingJob API: Execution Role Permissions"
SERVICE = {"cloudwatch:PutMetricData", "logs:CreateLogGroup", "logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams", "ecr:GetAuthorizationToken", "ecr:BatchCheckLayerAvailability", "ecr:GetDownloadUrlForLayer", "ecr:BatchGetImage",
           "kms:CreateGrant", "kms:DescribeKey", "kms:Decrypt", "kms:GenerateDataKey", "s3:AbortMultipartUpload", "ec2:CreateNetworkInterface", "ec2:CreateNetworkInterfacePermission", "ec2:DeleteNetworkInterface", "ec2:DeleteNetworkInterfacePermission",
           "ec2:DescribeNetworkInterfaces", "ec2:DescribeVpcs", "ec2:DescribeDhcpOptions", "ec2:DescribeSubnets", "ec2:DescribeSecurityGroups"}


def test_a_job_may_do_what_it_does_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setenv("SLML_CACHE", str(tmp_path / "cache"))
    policy = policies(monkeypatch, "job", **FULL)
    with recording() as made:
        plain_bucket()
        made.calls.clear()
        stored_things(tmp_path)
    assert made.missing(policy) == []
    assert allowed_actions(policy) - made.actions() - SERVICE == {"secretsmanager:GetSecretValue"}
    assert allows(policy, "secretsmanager:GetSecretValue", f"arn:aws:secretsmanager:{REGION}:{NUMBER}:secret:taxi/token-AbC123") and not allows(policy, "secretsmanager:GetSecretValue", f"arn:aws:secretsmanager:{REGION}:{NUMBER}:secret:other/token-AbC123")
    assert allows(policy, "s3:GetObject", "arn:aws:s3:::other-bucket/rows/a.csv") and not allows(policy, "s3:PutObject", "arn:aws:s3:::other-bucket/rows/a.csv")


def test_who_makes_the_bucket_may_do_that_and_no_more():
    with recording() as made:
        make_bucket(aws.account_of(use()))
        make_bucket(aws.account_of(use()))
    policy = policy_for(use(), which="bucket")
    assert made.missing(policy) == [] and allowed_actions(policy) == made.actions()


EVERYTHING = dict(
    SimulatePrincipalPolicy=lambda g: {"EvaluationResults": [{"EvalActionName": a, "EvalResourceName": "x", "EvalDecision": "allowed"} for a in g["ActionNames"]]},
    ListServiceQuotas=lambda g: {"Quotas": []}, BatchGetImage=lambda g: {"images": [{}]}, DescribeKey=lambda g: {"KeyMetadata": {"KeyState": "Enabled"}},
    DescribeSubnets=lambda g: {"Subnets": [{"VpcId": "vpc-1"}]}, DescribeSecurityGroups=lambda g: {"SecurityGroups": [{"VpcId": "vpc-1"}]},
    ListEndpoints=lambda g: {"Endpoints": [{"EndpointName": "e"}]}, DescribeEndpoint=lambda g: {"EndpointConfigName": "c", "ProductionVariants": [{"VariantName": "all", "CurrentInstanceCount": 1}]},
    DescribeEndpointConfig=lambda g: {"ProductionVariants": [{"VariantName": "all", "InstanceType": "ml.m5.large"}]}, GetMetricStatistics=lambda g: {"Datapoints": []},
    ListNotebookInstances=lambda g: {"NotebookInstances": [{"NotebookInstanceName": "n", "InstanceType": "ml.t3.medium", "NotebookInstanceStatus": "Stopped"}]}, DescribeNotebookInstance=lambda g: {"VolumeSizeInGB": 5},
    ListApps=lambda g: {}, ListSpaces=lambda g: {}, ListTrainingJobs=lambda g: {"TrainingJobSummaries": [{"TrainingJobName": "j"}]}, DescribeTrainingJob=lambda g: {"ResourceConfig": {"InstanceType": "ml.m5.large"}},
    ListMultipartUploads=lambda g: {"Uploads": [{"Key": "slml/taxi/k", "UploadId": "u", "Initiated": aws.dt.datetime(2020, 1, 1, tzinfo=aws.dt.timezone.utc)}]}, ListParts=lambda g: {"Parts": [{"Size": 1}]})


def test_who_asks_the_doctor_may_look_and_no_more():
    params, (nodes, values) = use(**FULL), graph()
    with recording(**EVERYTHING) as made:
        make_bucket(aws.account_of(use()))
        boto3.client("iam").create_role(RoleName="slml-taxi", AssumeRolePolicyDocument=json.dumps(trust_policy(NUMBER)))
        made.calls.clear()
        lines, (things, unseen) = doctor(params, nodes, values), idle(aws.account_of(params))
    assert not unseen and len(things) == 4 and {l.name: l.state for l in lines}["vpc"] == "there"
    policy = policy_for(params, nodes, values, "doctor")
    assert made.missing(policy) == []
    assert allowed_actions(policy) - made.actions() == {"sagemaker:DescribeSpace", "ecr:BatchCheckLayerAvailability", "ecr:GetDownloadUrlForLayer"} - made.actions()


# ---------------------------------------------------------------- the code as text

@functools.cache
def methods():
    "Names of boto3's methods for the services that matter: {method: service and operation}."
    session = boto3.session.Session()
    services = ("s3", "sagemaker", "logs", "iam", "sts", "ecr", "kms", "ec2", "cloudwatch", "service-quotas", "secretsmanager", "ssm")
    return {xform_name(o): f"{s}:{o}" for s in reversed(services) for o in session._session.get_service_model(s).operation_names}


def calls_in(file):
    "Calls of AWS's APIs that a module names: a method of a client, or the name of a list that is read page by page."
    tree, names = ast.parse(file.read_text()), set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Attribute): names.add(n.attr)
        elif isinstance(n, ast.Constant) and isinstance(n.value, str): names.add(n.value)
    return {methods()[n] for n in names if n in methods() and "_" in n}


@pytest.mark.parametrize("module", ["aws", "store", "jobs"])
def test_every_call_in_the_code_is_permitted_to_somebody(module, monkeypatch):
    file = ROOT / "slml_nb" / f"{module}.py"
    if not file.exists(): pytest.skip("no such room yet")
    everybody = set().union(*(allowed_actions(policies(monkeypatch, w, **FULL)) for w in SETS)) | {"ssm:GetParameter"}
    inside = {"sagemaker:DescribeUserProfile", "sagemaker:DescribeDomain"}  # asked by a notebook in Studio for its own role; Studio's role has them
    wanted = {action_of(c) for c in calls_in(file)} - {""}
    assert wanted - everybody - inside == set()


# ---------------------------------------------------------------- moto's own idea of actions

def test_moto_with_permissions_switched_on_lets_the_run_through(tmp_path, monkeypatch):
    "moto maps each request to an action by itself and refuses what no policy names. Of S3 it reads resources too; of other services it does not know them, so those statements are widened here. Conditions it leaves out."
    import moto.core
    monkeypatch.setenv("SLML_CACHE", str(tmp_path / "cache"))
    with mock_aws():
        account, iam, policy = aws.account_of(use()), boto3.client("iam"), policy_for(use())
        plain_bucket()
        boto3.client("s3").put_object(Bucket="my-bucket", Key="slml/taxi-2/secret", Body=b"x")
        wide = {**policy, "Statement": [s if s["Action"][0].startswith("s3:") else {**s, "Resource": "*"} for s in policy["Statement"]]}
        iam.create_user(UserName="ann")
        key = iam.create_access_key(UserName="ann")["AccessKey"]
        iam.put_user_policy(UserName="ann", PolicyName="slml", PolicyDocument=json.dumps(wide))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"]), monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        @moto.core.set_initial_no_auth_action_count(0)
        def as_ann():
            stored_things(tmp_path, many=False)  # moto asks bucket policies alone about DeleteObjects
            client, s3, job = account.client("sagemaker"), account.client("s3"), job_name("taxi", "train", "0" * 16)
            client.create_training_job(TrainingJobName=job, **REQUEST), client.describe_training_job(TrainingJobName=job)
            for refused in (lambda: s3.get_object(Bucket="my-bucket", Key="slml/taxi-2/secret"), lambda: s3.put_object(Bucket="my-bucket", Key="slml/taxi-2/x", Body=b""), lambda: s3.delete_bucket(Bucket="my-bucket"), lambda: client.delete_model(ModelName="x")):
                with pytest.raises(ClientError, match="AccessDenied|Forbidden"): refused()
        as_ann()


# ---------------------------------------------------------------- the command

@pytest.fixture
def server():
    import logging, urllib.request
    from moto.server import ThreadedMotoServer
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    s = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s.start()
    url = "http://%s:%s" % s.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()  # moto's state is that of the process
    yield url
    s.stop()


SET = "project: taxi\nstore: s3://my-bucket/slml\nsagemaker: {region: eu-central-1, role: slml-taxi, images: {cpu: %s}, budget_usd: 1}\ntrain: {on: ml.m5.large}\nextends: sample.yaml\n" % IMAGE


def test_the_doctor_says_what_is_missing_and_makes_the_bucket(project, server):
    for name in ("sample.yaml", "flights.yaml"): project.write(f"params/{name}", (ROOT / "params" / name).read_bytes())
    project.write("params/taxi.yaml", SET)
    env = dict(AWS_ENDPOINT_URL=server, AWS_MAX_ATTEMPTS="1", SLML_CACHE=str(project.folder / "cache"))
    code, out, err = project.slml("doctor", "--on", "sagemaker", "params/taxi.yaml", "--make-bucket", **env)
    assert code != 0 and "+ made s3://my-bucket in eu-central-1" in out and "✓ bucket" in out and "aws iam create-role --role-name slml-taxi" in out, out + err
    assert "could not be looked at" in out and "? quotas" in out  # moto knows no quotas of SageMaker: said, and not taken for granted
    code, out, err = project.slml("doctor", "--on", "sagemaker", "--policy", "job", "params/taxi.yaml", **env)
    policy = json.loads(out)
    assert code == 0 and policy["Version"] == "2012-10-17" and any(s["Resource"] == [f"arn:aws:ecr:{REGION}:{NUMBER}:repository/slml/cpu"] for s in policy["Statement"]), out + err
    code, out, err = project.slml("doctor", "--on", "sagemaker", "--policy", "rnu", "params/taxi.yaml", **env)
    assert code != 0 and "did you mean 'run'?" in err


@pytest.mark.slow
def test_a_run_says_what_it_costs_and_stops_above_its_budget(project, server):
    for name in ("sample.yaml", "flights.yaml"): project.write(f"params/{name}", (ROOT / "params" / name).read_bytes())
    project.write("params/taxi.yaml", SET.replace("train: {on: ml.m5.large}", "baseline: {on: ml.m5.large, max_hours: 2}"))
    boto3.client("s3", endpoint_url=server).create_bucket(Bucket="my-bucket", CreateBucketConfiguration={"LocationConstraint": REGION})
    env = dict(AWS_ENDPOINT_URL=server, AWS_MAX_ATTEMPTS="1", SLML_CACHE=str(project.folder / "cache"), SLML_SAGEMAKER_ROLE=ROLE)
    code, out, err = project.slml("run", "params/taxi.yaml", "--dry-run", "--to", "baseline", **env)
    assert code == 0 and "1 × ml.m5.large" in err and "About $0.024, of a budget of $1.00, at most $0.24" in err and "a guess of 10 minutes" in err, out + err
    code, out, err = project.slml("run", "params/taxi.yaml", "--to", "baseline", "-p", "baseline.on=ml.p4d.24xlarge", **env)
    assert code != 0 and "the budget is $1.00; nothing was started" in err and not list((project.folder / "runs").rglob("run.json")), out + err


def test_a_run_that_stays_here_knows_nothing_of_aws(project):
    for name in ("sample.yaml", "flights.yaml"): project.write(f"params/{name}", (ROOT / "params" / name).read_bytes())
    code = "import sys; from slml_nb.cli import main; r = main(); print({m.split('.')[0] for m in sys.modules} & {'boto3', 'botocore', 'sagemaker'} | {m for m in sys.modules if m == 'slml_nb.aws'}, file=sys.stderr); sys.exit(r)"
    done = subprocess.run([sys.executable, "-c", code, "run", "params/sample.yaml", "--dry-run"], cwd=project.folder, env=project.environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip().splitlines()[-1] == "set()", done.stderr


@pytest.mark.slow
def test_the_sdk_reports_nothing(tmp_path, monkeypatch):
    "The file that quiet_sdk writes is one that the SDK reads, by the SDK's own path to the word."
    monkeypatch.setenv("SLML_CACHE", str(tmp_path)), monkeypatch.setenv("SAGEMAKER_USER_CONFIG_OVERRIDE", str(tmp_path / "none.yaml"))
    file = aws.quiet_sdk()
    code = "import json, jsonschema, yaml, sys; from sagemaker.core.config.config_schema import SAGEMAKER_PYTHON_SDK_CONFIG_SCHEMA as s, TELEMETRY_OPT_OUT_PATH as p; c = yaml.safe_load(open(sys.argv[1])); jsonschema.validate(c, s); [c := c[k] for k in p.split('.')]; print(c)"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
