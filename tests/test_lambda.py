"""The package as a Lambda function, under AWS's own Runtime Interface Emulator."""
import contextlib, http.client, json, os, platform, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest
from slml_nb.stage import made_in, sample_folder

VERSION = "1.170.0"  # of aws-sam-cli, whose wheel carries the emulator
APP = """import sys, time
for absent in ("duckdb", "pandas", "sklearn", "torch", "pyarrow", "scipy", "fastapi", "uvicorn"): sys.modules[absent] = None  # what the function's zip need not hold
from slml_nb.serve import lambda_handler
answer = lambda_handler()

def handler(event, context):
    if isinstance(event, dict) and "sleep" in event: time.sleep(event["sleep"])
    return answer(event, context)
"""


def emulator() -> Path:
    "The binary of this machine's architecture."
    machine = {"aarch64": "arm64", "arm64": "arm64"}.get(platform.machine(), "x86_64")
    binary = Path(os.environ.get("SLML_RIE") or Path(sys.prefix) / "rie" / "samcli/local/rapid" / f"aws-lambda-rie-{machine}")
    if not binary.is_file():
        pytest.fail(f"the Lambda emulator is not at {binary}; type: {sys.executable} -m pip install --no-deps --target {Path(sys.prefix) / 'rie'} aws-sam-cli=={VERSION}")
    return binary


def package() -> Path:
    made = made_in(sample_folder())
    assert "package" in made, f"there is no package in {sample_folder()}: run the stages on the sample first"
    return Path(made["package"]["root"]) / made["package"]["file"]


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in socks: s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in socks]


class Function:
    "A function under the emulator."
    def __init__(self, port, log): self.port, self.log = port, log

    def invoke(self, event, timeout=60):
        "Status and body of an invocation; the event is JSON, or bytes as they are."
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", "/2015-03-31/functions/function/invocations", event if isinstance(event, bytes) else json.dumps(event).encode())
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        finally: connection.close()


@contextlib.contextmanager
def deployed(folder: Path, timeout: int, app: str = APP, path: str = str(Path(__file__).parents[1])):
    "The handler under the emulator, which may run `timeout` seconds."
    binary = folder / "rie"
    shutil.copy(emulator(), binary)
    binary.chmod(0o755)
    if app: (folder / "app.py").write_text(app)
    port, api = free_ports(2)
    env = {**os.environ, "SLML_PACKAGE": str(package().resolve()), "AWS_LAMBDA_FUNCTION_TIMEOUT": str(timeout), "AWS_LAMBDA_FUNCTION_NAME": "slml",
           "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "1769", "AWS_REGION": "eu-central-1", "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])}
    if not app: del env["SLML_PACKAGE"]
    log = open(folder / "log.txt", "w+")
    process = subprocess.Popen([binary, "--runtime-interface-emulator-address", f"127.0.0.1:{port}", "--runtime-api-address", f"127.0.0.1:{api}",
                                sys.executable, "-m", "awslambdaric", "app.handler"], cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.time() + 30
        while time.time() < deadline and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1): break
            time.sleep(0.05)
        assert process.poll() is None, (folder / "log.txt").read_text()
        yield Function(port, folder / "log.txt")
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)  # the emulator and the Python below it
        process.wait()
        log.close()


@pytest.fixture(scope="module")
def function(tmp_path_factory):
    with deployed(tmp_path_factory.mktemp("lambda"), timeout=60) as f: yield f


@pytest.fixture(scope="module")
def sample(): return json.loads((package() / "sample.json").read_text())


def gateway(body, method="POST", path="/predict"):
    "An event of an API Gateway HTTP API."
    return {"version": "2.0", "rawPath": path, "headers": {"content-type": "application/json"}, "isBase64Encoded": False,
            "requestContext": {"http": {"method": method, "path": path}}, "body": body if isinstance(body, str) else json.dumps(body)}


def close(answer, expected): assert answer["prediction"] == (pytest.approx(expected["prediction"], rel=1e-6) if isinstance(expected["prediction"], float) else expected["prediction"])


def test_a_good_request(function, sample):
    status, body = function.invoke(gateway(sample["request"]))
    reply = json.loads(body)
    assert (status, reply["statusCode"], reply["headers"]["content-type"]) == (200, 200, "application/json")
    close(json.loads(reply["body"]), sample["response"])


def test_a_direct_invocation(function, sample):
    close(json.loads(function.invoke(sample["request"])[1]), sample["response"])


def test_a_batch(function, sample):
    reply = json.loads(function.invoke(gateway([sample["request"]] * 500))[1])
    answers = json.loads(reply["body"])
    assert len(answers) == 500
    close(answers[-1], sample["response"])


def test_a_bad_request_gets_a_4xx_that_names_the_field(function, sample):
    field = next(f["name"] for f in json.loads((package() / "signature.json").read_text())["inputs"] if f["required"])
    reply = json.loads(function.invoke(gateway({**sample["request"], field: {"not": "a value"}}))[1])
    error = json.loads(reply["body"])["error"]
    assert (reply["statusCode"], error["field"]) == (422, field) and error["allowed"]
    assert json.loads(function.invoke(gateway("{no json"))[1])["statusCode"] == 400
    assert json.loads(function.invoke(gateway("", "GET"))[1])["statusCode"] == 405
    assert json.loads(function.invoke(gateway("", "GET", "/elsewhere"))[1])["statusCode"] == 404


def test_it_says_how_it_is(function):
    reply = json.loads(function.invoke(gateway("", "GET", "/healthz"))[1])
    assert json.loads(reply["body"])["package"] == json.loads((package() / "manifest.json").read_text())["hash"]


def test_more_than_six_megabytes_are_refused(function, sample):
    just_above = json.loads(function.invoke(gateway(json.dumps(sample["request"]) + " " * 6_000_001))[1])  # 6 MB, but not yet 6 MiB: ours to refuse
    assert just_above["statusCode"] == 413 and "6 MB" in json.loads(just_above["body"])["error"]["what"]
    body = function.invoke([sample["request"]] * (7_000_000 // len(json.dumps(sample["request"]))))[1]  # Lambda's own limit cuts it off
    assert "errorType" in json.loads(body) and "prediction" not in body, body[:300]
    close(json.loads(function.invoke(sample["request"])[1]), sample["response"])  # and it still answers


def test_the_timeout_is_enforced(tmp_path, sample):
    with deployed(tmp_path, timeout=2) as function:
        close(json.loads(function.invoke(sample["request"])[1]), sample["response"])
        start = time.time()
        body = function.invoke({"sleep": 30})[1]
        assert "timed out after 2.00 seconds" in body and time.time() - start < 10


def test_the_deployed_zip_answers_csv_and_json(tmp_path, sample):
    import zipfile
    from slml_nb.deploy import function_files, write_zip
    zipfile.ZipFile(write_zip(function_files(package()), tmp_path / "function.zip")["file"]).extractall(tmp_path / "task")
    with deployed(tmp_path / "task", timeout=30, app="", path=str(tmp_path / "task")) as function:
        close(json.loads(json.loads(function.invoke(gateway(sample["request"]))[1])["body"]), sample["response"])
        fields = [f["name"] for f in json.loads((package() / "signature.json").read_text())["inputs"]]
        event = gateway(",".join(str(sample["request"].get(f, "")) for f in fields), path="/invocations")
        reply = json.loads(function.invoke({**event, "headers": {"Content-Type": "text/csv"}})[1])
        assert reply["statusCode"] == 200 and reply["headers"]["content-type"].startswith("text/csv"), reply
        assert reply["body"].startswith(str(sample["response"]["prediction"])[:8])
