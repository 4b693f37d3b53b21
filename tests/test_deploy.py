"""Deploying: templates under the real linter, change sets against moto, the function's zip where nothing is installed, and the container's application."""
import contextlib, csv, json, os, socket, subprocess, sys, zipfile
from pathlib import Path

import pytest

from slml_nb.core import SlmlError
from slml_nb.deploy import batch_template, container_template, deploy, deploy_batch, execute, function_files, lambda_template, made_by, plan, plan_text, propose, run_batch, same_answer, sagemaker_template, stack_now, storage_template, undo, undo_batch, write_edge, write_image, write_zip
from slml_nb.stage import made_in, sample_folder

RECORD = made_in(sample_folder())["package"]
FLIGHTS = Path(RECORD["root"]) / RECORD["file"]
SAMPLE = json.loads((FLIGHTS / "sample.json").read_text())
TEMPLATES = {"storage": storage_template(), "lambda": lambda_template("a" * 64), "open": lambda_template("a" * 64, "NONE", online="features"), "container": container_template(), "serverless": sagemaker_template(), "instances": sagemaker_template("ml.m5.large"), "batch": batch_template("s3://rows/trips", "s3://answers/trips")}


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


def test_the_zip_of_a_linear_model_is_a_few_kilobytes_and_answers_where_nothing_is_installed(tmp_path):
    files = function_files(FLIGHTS)
    code = write_zip({k: v for k, v in files.items() if not k.startswith("package/")}, tmp_path / "code.zip")
    made = write_zip(files, tmp_path / "function.zip")
    assert code["zip_mb"] < 0.016 and made["zip_mb"] < 0.04, (code, made)
    zipfile.ZipFile(made["file"]).extractall(tmp_path / "task")
    answer, loaded = answer_alone(tmp_path / "task", SAMPLE["request"])
    assert answer["prediction"] == pytest.approx(SAMPLE["response"]["prediction"], rel=1e-12) and loaded == []


ODD = [SAMPLE["request"], [SAMPLE["request"]] * 70, {}, [], "text", [SAMPLE["request"], {}], {**SAMPLE["request"], "unheard": 1}, *({**SAMPLE["request"], n: v} for n in list(SAMPLE["request"])[:3] for v in (None, "", -1e300, "Ö", True, {}, [1]))]


def test_the_small_zip_says_what_the_whole_code_says(tmp_path):
    from slml_nb.serve import lambda_handler
    zipfile.ZipFile(write_zip(function_files(FLIGHTS), tmp_path / "function.zip")["file"]).extractall(tmp_path / "task")
    event = lambda body, kind="application/json", method="POST", path="/predict": {"rawPath": path, "headers": {"Content-Type": kind}, "requestContext": {"http": {"method": method}}, "body": body}
    fields = [f["name"] for f in json.loads((FLIGHTS / "signature.json").read_text())["inputs"]]
    csv = ",".join(fields) + "\n" + ",".join(str(SAMPLE["request"].get(f, "")) for f in fields) + "\n"
    events = [*ODD, *(event(json.dumps(o)) for o in ODD), event("{no"), event("", method="GET"), event("", path="/x"), event("", method="GET", path="/healthz"), event(csv, "text/csv"), event(csv + "1\n", "text/csv"),
              event(csv, "image/png"), event("\n".join(json.dumps(SAMPLE["request"]) for _ in range(3)), "application/jsonlines"), event("x" * 6_100_000)]
    code = "import json, sys; sys.path.insert(0, '.'); sys.modules['numpy'] = None; import app; [print(json.dumps(app.handler(json.loads(l)))) for l in sys.stdin]"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], input="".join(json.dumps(e) + "\n" for e in events), cwd=tmp_path / "task", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = lambda_handler(FLIGHTS)
    def plain(answer):
        if not isinstance(answer, dict) or "headers" not in answer: return answer
        return {**answer, "headers": {k: v for k, v in answer["headers"].items() if k != "server-timing"}, "body": json.loads(answer["body"]) if answer["headers"]["content-type"] == "application/json" else answer["body"]}
    for event, said in zip(events, done.stdout.splitlines(), strict=True): assert same_answer(plain(json.loads(said)), plain(json.loads(json.dumps(whole(event))))), (str(event)[:300], said[:300])


def test_one_folder_and_one_file_of_code_at_the_edge(tmp_path):
    from slml_nb.package import load_package, predict_table
    made = write_edge(FLIGHTS, tmp_path / "edge")
    assert made["needs"] == [] and made["zip_mb"] < 0.016 and {p.name for p in (tmp_path / "edge").iterdir()} == {"package", "predict.pyz"}
    fields = list(SAMPLE["request"])
    rows = [",".join(str(SAMPLE["request"][f]) for f in fields), ",".join("?" for f in fields)]
    (tmp_path / "rows.csv").write_text("\n".join([",".join(fields), *rows * 50]) + "\n")
    alone = lambda *args: subprocess.run([sys.executable, "-I", "-S", tmp_path / "edge/predict.pyz", *map(str, args)], capture_output=True, text=True, cwd=tmp_path)
    done = alone(tmp_path / "rows.csv", tmp_path / "there.csv")
    assert done.returncode == 0 and json.loads(done.stdout)["errors"] == 50, done.stderr
    predict_table(load_package(FLIGHTS), tmp_path / "rows.csv", tmp_path / "here.csv")
    assert (tmp_path / "there.csv").read_text() == (tmp_path / "here.csv").read_text()
    assert "needs DuckDB" in alone(tmp_path / "edge/predict.pyz", tmp_path / "x.parquet").stderr  # a file that is no CSV, where there is only Python


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


def python_of(folder, libraries):
    "A Python that has what an image would install, and nothing else."
    from peer_sagemaker import image
    return image(folder / "image", tuple(libraries)) / "bin/python3"


@contextlib.contextmanager
def container(folder, **env):
    "The application of the image in a process of its own; its port."
    import time
    from slml_nb.serve import listen
    python = python_of(folder, write_image(FLIGHTS, folder))
    sock = listen(port=0)
    port = sock.getsockname()[1]
    sock.close()
    (folder / "app.py").write_text((folder / "app.py").read_text().replace("/opt/slml/package", str(folder / "package")).replace('address="0.0.0.0"', 'address="127.0.0.1"'))
    process = subprocess.Popen([python, "app.py", "serve"], cwd=folder, env={"PATH": os.environ["PATH"], "PORT": str(port), "PYTHONDONTWRITEBYTECODE": "1", **env})
    try:
        for _ in range(400):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1): break
            time.sleep(0.05)
        yield port
    finally: process.terminate(); process.wait(30)


def test_a_transform_job_gets_a_line_for_each_line(tmp_path):
    """The container as a transform job starts it: pieces of a file with refused rows among them; every line has its answer or its reason, in its place."""
    import http.client
    from slml_nb.deploy import batch_requests
    fields = [f["name"] for f in json.loads((FLIGHTS / "signature.json").read_text())["inputs"]]
    good = ",".join(str(SAMPLE["request"].get(f, "")) for f in fields)
    bad = ["", "1,2", '"' + good, good + ",9", ",".join("?" for _ in fields), "\x00"]
    lines = [good, *(l for b in bad for l in (b, good))] * 20
    environment = batch_requests(FLIGHTS, "s3://rows/", "s3://answers/", "i", "r")["model"]["PrimaryContainer"]["Environment"]
    with container(tmp_path, **environment) as port:
        def ask(body, kind="text/csv"):
            c = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            c.request("POST", "/invocations", body.encode(), {"Content-Type": kind, "Accept": kind})
            reply = c.getresponse()
            return reply.status, reply.read().decode()
        for body in ("\n".join(lines), "\n".join([",".join(fields), *lines]) + "\n"):
            status, said = ask(body)
            assert status == 200 and len(said.splitlines()) == len(body.removesuffix("\n").split("\n"))
            rows = list(csv.reader(said.splitlines()))[-len(lines):]
            for line, row in zip(lines, rows, strict=True):
                if line == good: assert float(row[0]) == pytest.approx(SAMPLE["response"]["prediction"]) and row[-1] == ""
                else: assert row[0] == "" and row[-1]
        status, said = ask("\n".join([json.dumps(SAMPLE["request"]), "{", "{}", json.dumps(SAMPLE["request"])]), "application/jsonlines")
        assert status == 200 and [bool(json.loads(l).get("error")) for l in said.splitlines()] == [False, True, True, False]
        status, said = ask(",".join(fields[::-1]) + "\n" + good)
        assert status == 400 and "another order" in said  # what the pieces after the first would mean nobody could know


def test_the_outcome_of_a_transform_job(aws, tmp_path, capsys):
    "Counted at the command line, from what lies in the bucket; moto ends a job at once and answers nothing, so the answers are put there by hand."
    import boto3
    from slml_nb.cli import main
    from slml_nb.deploy import batch_requests
    storage, sagemaker = aws[1], boto3.client("sagemaker")
    for name in ("rows", "answers"): storage.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    storage.put_object(Bucket="rows", Key="trips/a.csv", Body=b"1\nfar\n3\n")
    storage.put_object(Bucket="rows", Key="trips/b.csv", Body=b"x\n")
    asked = batch_requests(FLIGHTS, "s3://rows/trips", "s3://answers", "i", "arn:aws:iam::123456789012:role/slml")
    (file := tmp_path / "batch.json").write_text(json.dumps(asked))
    run_batch(sagemaker, file)
    storage.put_object(Bucket="answers", Key="trips/a.csv.out", Body=b"1,3.0,\nfar,,\"field 'km' is 'far': send a number\"\n3,9.0,\n")
    storage.put_object(Bucket="answers", Key="trips/old.csv.out", Body=b"1,3.0,\n")
    assert main(["deploy", "--outcome", str(file)]) == 1  # one file has no answers
    said = capsys.readouterr().out
    assert "4 rows in 2 files: 2 answered, 1 refused" in said and "line 2 of a.csv: field 'km' is 'far'" in said and "1 lines have no answer" in said
    storage.put_object(Bucket="answers", Key="trips/b.csv.out", Body=b"x,,no\n")
    assert main(["deploy", "--outcome", str(file)]) == 0
    assert "2 answered, 2 refused" in capsys.readouterr().out


def test_the_container_serves_as_its_dockerfile_says(tmp_path):
    import http.client, time
    from slml_nb.serve import listen
    python = python_of(tmp_path, write_image(FLIGHTS, tmp_path))
    sock = listen(port=0)
    port = sock.getsockname()[1]
    sock.close()
    app = (tmp_path / "app.py").read_text().replace("/opt/slml/package", str(tmp_path / "package")).replace('address="0.0.0.0"', 'address="127.0.0.1"')
    (tmp_path / "app.py").write_text(app)
    env = {"PATH": os.environ["PATH"], "PORT": str(port), "SLML_OPEN": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen([python, "app.py", "serve"], cwd=tmp_path, env=env)
    try:
        for _ in range(200):
            try:
                c = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                c.request("POST", "/invocations", json.dumps(SAMPLE["request"]), {"Content-Type": "application/json"})
                reply = c.getresponse()
                break
            except OSError: time.sleep(0.05)
        assert reply.status == 200 and json.loads(reply.read()) == SAMPLE["response"]
        c.request("POST", "/invocations", json.dumps([SAMPLE["request"]] * 300), {"Content-Type": "application/json"})  # many rows take arrays, and so NumPy: it is in the image
        assert len(json.loads(c.getresponse().read())) == 300 and "numpy==" in (tmp_path / "Dockerfile").read_text()
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


def test_a_transform_job_is_asked_for_as_it_was_shown(aws, tmp_path):
    import boto3
    client, storage = aws
    there = "s3://rows/trips", "s3://answers/trips"
    job = lambda **given: deploy_batch(FLIGHTS, *there, "flights", out=tmp_path, given=given)
    execute(client, storage, "slml-storage", job()["changeset"])
    assert job()["notes"][0].startswith("docker build")
    image = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/slml@sha256:0"
    role = job(Image=image)
    assert role["stack"] == "flights-batch" and [c[2] for c in role["changes"]] == ["AWS::IAM::Role"]
    execute(client, storage, "flights-batch", role["changeset"])
    shown, sagemaker = job(Image=image), boto3.client("sagemaker")
    assert sagemaker.list_models()["Models"] == [] and shown["file"].endswith("batch.json")
    asked = json.loads(Path(shown["file"]).read_text())
    name = run_batch(sagemaker, shown["file"])
    made = sagemaker.describe_transform_job(TransformJobName=name)
    for key, value in asked["job"].items(): assert made[key] == value, key
    model = sagemaker.describe_model(ModelName=made["ModelName"])
    assert model["PrimaryContainer"]["Image"] == image and model["ExecutionRoleArn"].startswith("arn:aws:iam::") and asked["model"]["EnableNetworkIsolation"] is True
    assert "stopped" in undo_batch(sagemaker, shown["file"]) and sagemaker.list_models()["Models"] == []


def test_what_a_transform_job_sends_is_answered():
    """Pieces of files, cut at line ends: with a header in the first of them only, one line, many, and none."""
    from slml_nb.package import load_package
    from slml_nb.serve import invoke
    package, request = load_package(FLIGHTS), SAMPLE["request"]
    fields = [i["name"] for i in package.function.inputs if not i["from"]]
    line = ",".join(str(request.get(f, "")) for f in fields)
    for body, rows in ((line, 1), (line + "\n", 1), ("\n".join([line] * 40), 40), (",".join(fields) + "\n" + line, 2)):
        status, headers, text = invoke(package, body.encode(), "text/csv", "text/csv")
        assert (status, headers["content-type"].split(";")[0], len(text.splitlines())) == (200, "text/csv", rows)
        assert float(text.splitlines()[-1].split(",")[0]) == pytest.approx(SAMPLE["response"]["prediction"])
    for rows in (1, 40):
        status, _, text = invoke(package, "\n".join([json.dumps(request)] * rows).encode(), "application/jsonlines", "application/jsonlines")
        assert status == 200 and [json.loads(l)["prediction"] for l in text.splitlines()] == [pytest.approx(SAMPLE["response"]["prediction"])] * rows
    assert invoke(package, json.dumps(request).encode(), "application/json", "application/json")[0] == 200


def test_the_command_line_plans_a_transform_job(capsys):
    from slml_nb.cli import main
    assert main(["deploy", str(FLIGHTS), "--to", "sagemaker", "--batch", "s3://rows/trips", "s3://answers", "--plan", "--rows", "1e7"]) == 0
    said = capsys.readouterr().out
    assert "s3:GetObject" in said and "s3://rows/trips to s3://answers" in said and "once, for 10,000,000 rows" in said
    assert main(["deploy", str(FLIGHTS), "--batch", "s3://rows/trips", "s3://answers", "--plan"]) != 0
    assert "--to sagemaker" in capsys.readouterr().err


@pytest.mark.parametrize("words, why", [("--to lamda --plan", "did you mean 'lambda'?"), ("--plan --rps -1", "--rps is -1"), ("--plan --instance ml.m5.large", "no effect on lambda"), ("--plan --share 2", "from 0 to 1"),
                                        ("--execute none.json", "writes deploy/batch.json"), ("--outcome none.json", "writes deploy/batch.json"), ("--to sagemaker --plan --batch s3://rows/x s3://rows/x-out", "rows of the next job")])
def test_what_cannot_be_meant_is_said_at_once(words, why, capsys, tmp_path, monkeypatch):
    "No plan, no call, no account: a message that names it, and the way out."
    from slml_nb.cli import main
    monkeypatch.chdir(tmp_path)
    assert main(["deploy", str(FLIGHTS), *words.split()]) == 2
    assert why in capsys.readouterr().err


def test_other_commands_say_it_at_once(capsys, tmp_path, monkeypatch):
    from slml_nb.cli import main
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text("name: eta\nvariants: [old, new]\n")
    (tmp_path / "odd.json").write_text("{oh")
    (tmp_path / "a.csv").write_text("x\n1\n")
    for words, why in ((["place", str(FLIGHTS), "--rps", "nan"], "--rps is nan"), (["place", str(FLIGHTS), "--p99", "0"], "--p99 is 0"), (["serve", "--traffic", "two.yaml", "--port", "0"], "variant 'old' of 'eta' has no package"),
                       (["traffic", "odd.json"], "this is no JSON"), (["traffic", "two.yaml", "--picture", "x.bmp"], "not drawn as '.bmp'"), (["predict", str(FLIGHTS), "a.csv", "--out", "a.xlsx"], "--out FILE.parquet")):
        assert main(words) == 2
        assert why in capsys.readouterr().err, words
