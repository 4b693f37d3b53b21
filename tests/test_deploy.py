"""Deploying: templates under the real linter, change sets against moto, the function's zip where nothing is installed, and the container's application."""
import json, os, subprocess, sys, zipfile
from pathlib import Path

import pytest

from slml_nb.core import SlmlError
from slml_nb.deploy import container_template, deploy, execute, function_files, lambda_template, made_by, plan, plan_text, propose, sagemaker_template, stack_now, storage_template, undo, write_image, write_zip
from slml_nb.stage import made_in, sample_folder

RECORD = made_in(sample_folder())["package"]
FLIGHTS = Path(RECORD["root"]) / RECORD["file"]
SAMPLE = json.loads((FLIGHTS / "sample.json").read_text())
TEMPLATES = {"storage": storage_template(), "lambda": lambda_template("a" * 64), "open": lambda_template("a" * 64, "NONE", online="features"), "container": container_template(), "serverless": sagemaker_template(), "instances": sagemaker_template("ml.m5.large")}


def lint(folder, templates):
    "Exit code and findings of cfn-lint."
    for name, t in templates.items(): (folder / f"{name}.json").write_text(json.dumps(t))
    done = subprocess.run([Path(sys.executable).with_name("cfn-lint"), "--regions", "us-east-1", "eu-central-1", "--", *(str(folder / f"{n}.json") for n in templates)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_templates_pass_the_linter(tmp_path):
    code, said = lint(tmp_path, TEMPLATES)
    assert code == 0, said
    wrong = lambda_template("a" * 64)
    wrong["Resources"]["Function"]["Properties"]["Runtime"] = "python2.6"
    assert lint(tmp_path, {"wrong": wrong})[0] != 0  # and it does look


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_is_open_and_everything_is_encrypted(name):
    resources = TEMPLATES[name]["Resources"].values()
    for r in resources:
        p, text = r["Properties"], json.dumps(r["Properties"])
        assert "0.0.0.0/0" not in text and '"AdministratorAccess"' not in text
        if r["Type"] == "AWS::S3::Bucket": assert all(p["PublicAccessBlockConfiguration"].values()) and p["BucketEncryption"]
        if r["Type"] == "AWS::ECS::TaskDefinition": assert all(c["ReadonlyRootFilesystem"] and c["User"] == "10001:10001" and c["LinuxParameters"]["Capabilities"] == {"Drop": ["ALL"]} for c in p["ContainerDefinitions"])
        if r["Type"] == "AWS::ApiGatewayV2::Route": assert p["AuthorizationType"] == ("NONE" if name == "open" else "AWS_IAM")
        if r["Type"] == "AWS::SageMaker::Model": assert p["EnableNetworkIsolation"] is True
        if r["Type"] == "AWS::IAM::Role":
            for s in [s for policy in p.get("Policies", []) for s in policy["PolicyDocument"]["Statement"]]:
                assert not any("*" in a for a in s["Action"]) and (s["Resource"] != "*" or s["Action"] == ["ecr:GetAuthorizationToken"])


def answer_alone(folder, package_request):
    "What app.py in a folder answers, where neither the environment's packages nor this checkout can be imported."
    code = "import json, sys; sys.path.insert(0, '.'); import app; print(json.dumps(app.handler(json.loads(sys.argv[1])))); print(sorted({m.split('.')[0] for m in sys.modules} & {'numpy', 'onnxruntime', 'duckdb', 'pandas', 'torch', 'fastapi'}))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, json.dumps(package_request)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(l.replace("'", '"')) for l in done.stdout.splitlines()]


def test_the_zip_answers_where_nothing_is_installed(tmp_path):
    made = write_zip(function_files(FLIGHTS), tmp_path / "function.zip")
    assert made["zip_mb"] < 25 and made["unzipped_mb"] < 80
    zipfile.ZipFile(made["file"]).extractall(tmp_path / "task")
    answer, loaded = answer_alone(tmp_path / "task", SAMPLE["request"])
    assert answer["prediction"] == pytest.approx(SAMPLE["response"]["prediction"], rel=1e-12) and loaded == ["numpy"]


@pytest.mark.slow
def test_the_zip_of_a_network_fits_and_answers(tmp_path):
    from onnx import TensorProto, helper, numpy_helper
    from slml_nb.model import fit_encoding, save_network
    from slml_nb.package import write_package
    field = {"name": "km", "type": "DOUBLE", "required": True, "missing": 0.0, "min": 0, "max": 9, "values": [], "example": 2.0, "from": ""}
    recipe = {"target": "y", "task": "regression", "unit": "", "classes": [], "time": "", "inputs": [field], "features": [{"name": "km", "kind": "numeric", "sql": "km", "reads": ["km"]}], "lookups": [], "examples": [{"km": 2.0}]}
    graph = helper.make_graph([helper.make_node("ReduceSum", ["numeric", "axis"], ["y"], keepdims=0)], "sum", [helper.make_tensor_value_info("numeric", TensorProto.FLOAT, ["n", 1])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])], [numpy_helper.from_array(__import__("numpy").array([1]), "axis")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    save_network(tmp_path / "network", {"task": "regression", "target": "y", "features": ["km"], "encoding": fit_encoding({"km": [1.0, 3.0]}, {"km": "numeric"})}, model.SerializeToString())
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/recipe.json").write_text(json.dumps(recipe))
    write_package(tmp_path / "package", tmp_path / "network", tmp_path / "recipe", {"target": "y"}, {"candidate": None, "best": "m", "sentence": "", "metric": "mae", "requirements": [], "candidates": [], "rows_test": 0})
    made = write_zip(function_files(tmp_path / "package"), tmp_path / "function.zip")
    assert made["zip_mb"] <= 40, made
    zipfile.ZipFile(made["file"]).extractall(tmp_path / "task")
    answer, loaded = answer_alone(tmp_path / "task", {"km": 3.0})
    assert answer["prediction"] == pytest.approx(1.0, abs=1e-6) and loaded == ["numpy", "onnxruntime"]


def test_the_container_serves_as_its_dockerfile_says(tmp_path):
    import http.client, time
    from slml_nb.serve import listen
    write_image(FLIGHTS, tmp_path)
    sock = listen(port=0)
    port = sock.getsockname()[1]
    sock.close()
    app = (tmp_path / "app.py").read_text().replace("/opt/slml/package", str(tmp_path / "package")).replace('address="0.0.0.0"', 'address="127.0.0.1"')
    (tmp_path / "app.py").write_text(app)
    env = {"PATH": os.environ["PATH"], "PORT": str(port), "SLML_OPEN": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen([sys.executable, "app.py", "serve"], cwd=tmp_path, env=env)
    try:
        for _ in range(200):
            try:
                c = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                c.request("POST", "/invocations", json.dumps(SAMPLE["request"]), {"Content-Type": "application/json"})
                reply = c.getresponse()
                break
            except OSError: time.sleep(0.05)
        assert reply.status == 200 and json.loads(reply.read()) == SAMPLE["response"]
    finally:
        process.terminate()
        process.wait(10)
    closed = subprocess.run([sys.executable, "app.py"], cwd=tmp_path, env={**env, "SLML_OPEN": ""}, capture_output=True, text=True)
    assert closed.returncode != 0 and "nobody is asked for a key" in closed.stderr


@pytest.fixture
def aws(monkeypatch):
    "AWS by moto: calls and their shapes, no behaviour of the services."
    from moto import mock_aws
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "eu-central-1", "AWS_REGION": "eu-central-1"}.items(): monkeypatch.setenv(name, value)
    with mock_aws():
        import boto3
        yield boto3.client("cloudformation"), boto3.client("s3")


def test_proposed_executed_changed_undone(aws, tmp_path):
    client, storage = aws
    first = deploy(FLIGHTS, "lambda", "flights", out=tmp_path)
    assert first["stack"] == "slml-storage" and stack_now(client, "slml-storage") is None  # proposed: nothing is there
    assert {c[1] for c in first["changes"]} == {"Bucket", "BucketPolicy", "Images"}
    execute(client, storage, "slml-storage", first["changeset"])
    bucket = made_by(client, "slml-storage")["Bucket"]

    simple = {"AWSTemplateFormatVersion": "2010-09-09", "Parameters": {"Days": {"Type": "Number", "Default": 7}}, "Resources": {"Log": {"Type": "AWS::Logs::LogGroup", "Properties": {"LogGroupName": "/slml/x", "RetentionInDays": {"Ref": "Days"}}}}, "Outputs": {}}
    one = propose(client, "flights", simple, {})
    assert stack_now(client, "flights") is None
    assert execute(client, storage, "flights", one["changeset"], bucket)["status"] == "CREATE_COMPLETE"
    two = propose(client, "flights", simple, {"Days": 30})
    assert execute(client, storage, "flights", two["changeset"], bucket)["parameters"]["Days"] == "30"
    assert undo(client, storage, "flights", bucket) == "the stack is as it was before" and stack_now(client, "flights")["parameters"].get("Days", "7") == "7"
    with pytest.raises(SlmlError, match="nothing was kept"): undo(client, storage, "flights", bucket)
    with pytest.raises(SlmlError, match="there is no change set"): execute(client, storage, "flights", "slml-typed-wrong", bucket)
    three = propose(client, "other", json.loads(json.dumps(simple).replace("/slml/x", "/slml/y")), {})
    execute(client, storage, "other", three["changeset"], bucket)
    assert "deleted" in undo(client, storage, "other", bucket) and stack_now(client, "other") is None


def test_what_is_sent_for_each_target(aws, tmp_path, monkeypatch):
    client, storage = aws
    execute(client, storage, "slml-storage", deploy(FLIGHTS, "lambda", "f", out=tmp_path)["changeset"])
    said = deploy(FLIGHTS, "lambda", "f", out=tmp_path)
    assert "MB zipped" in said["notes"][0] and {"AWS::Lambda::Function", "AWS::Lambda::Alias", "AWS::ApiGatewayV2::Api"} <= {c[2] for c in said["changes"]}
    bucket = made_by(client, "slml-storage")["Bucket"]
    assert [o["Key"].split("/")[0] for o in storage.list_objects_v2(Bucket=bucket)["Contents"]] == ["f"]
    steps = deploy(FLIGHTS, "sagemaker", "e", out=tmp_path)
    assert steps["changeset"] == "" and steps["notes"][0].startswith("docker build -t 123456789012.dkr.ecr.eu-central-1.amazonaws.com/")
    assert "USER 10001" in (tmp_path / "image/Dockerfile").read_text()
    made = deploy(FLIGHTS, "sagemaker", "e", out=tmp_path, given={"Image": "123.dkr.ecr.eu-central-1.amazonaws.com/slml@sha256:0"})
    assert {"AWS::SageMaker::Model", "AWS::SageMaker::EndpointConfig", "AWS::SageMaker::Endpoint"} <= {c[2] for c in made["changes"]}
    with pytest.raises(SlmlError, match="--set Vpc=…"): deploy(FLIGHTS, "container", "c", out=tmp_path, given={"Image": "x"})


def test_a_plan_needs_no_account(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_REGION", "AWS_DEFAULT_REGION"): monkeypatch.delenv(name, raising=False)
    text = plan_text(plan(FLIGHTS, "container", rps=5))
    assert "AWS::ECS::Service" in text and "secretsmanager:GetSecretValue" in text and "a month at 5 requests a second" in text
