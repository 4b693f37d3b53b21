"""The service as callers meet it: every malformed request in one shape, slow and greedy clients, keys and tokens, several processes on one port, and what schemathesis makes of its OpenAPI."""
import asyncio, contextlib, http.client, http.server, json, os, signal, socket, subprocess, sys, threading, time
from pathlib import Path

import pytest

from slml_nb.core import SlmlError
from slml_nb.model import save_model
from slml_nb.package import write_package
from slml_nb.serve import Guard, Limits, Tokens, running, running_code, token_rules
from slml_nb.stage import made_in, sample_folder
from tiny import until

RECORD = made_in(sample_folder())["package"]
FLIGHTS = Path(RECORD["root"]) / RECORD["file"]
SHAPE = ["allowed", "field", "request", "value", "what"]
FIELDS = {"km": ("DOUBLE", 2.5, "km"), "people": ("BIGINT", 2, "CAST(people AS DOUBLE)"), "late": ("BOOLEAN", True, "CAST(late AS DOUBLE)"), "zone name": ("VARCHAR", "Bronx", 'CAST("zone name" IS NOT NULL AS DOUBLE)'),
          "day": ("DATE", "2024-05-01", "CAST(day IS NOT NULL AS DOUBLE)"), "when": ("TIMESTAMP", "2024-05-01T08:30:00", 'CAST("when" IS NOT NULL AS DOUBLE)')}


def everything(folder, classes=()):
    "A package with a field of every type, each once required and once not."
    inputs, features = [], []
    for name, (kind, example, sql) in FIELDS.items():
        for must in (True, False):
            field = name if must else f"{name} too"
            inputs.append({"name": field, "type": kind, "required": must, "missing": 0.0, "min": None, "max": None, "values": [], "example": example, "from": ""})
            features.append({"name": f"f {field}", "kind": "numeric", "sql": sql if must else sql.replace(f'"{name}"', f'"{field}"').replace(name, f'"{field}"') if '"' not in sql else sql.replace(name, field), "reads": [field]})
    task = "classification" if classes else "regression"
    recipe = {"target": "minutes", "task": task, "unit": "min", "classes": list(classes), "time": "", "inputs": inputs, "features": features, "lookups": [],
              "examples": [{i["name"]: i["example"] for i in inputs}]}
    (folder / "recipe").mkdir(parents=True)
    (folder / "recipe/recipe.json").write_text(json.dumps(recipe))
    odds = {"odds": {c: [0.5, 0.5] for c in classes}, "fallback": [0.5, 0.5]} if classes else {"fallback": 5.0}
    save_model(folder / "rule", {"kind": "rule", "task": task, "target": "minutes", "classes": list(classes), "features": [f["name"] for f in features],
                                 "expression": "if(\"f km\" < 4, 'short', 'long')" if classes else '"f km" * 3 + 0 * coalesce("f km too", 0)', **odds})
    verdict = {"candidate": "rule", "best": "rule", "sentence": "A rule is enough.", "metric": "mae", "requirements": [], "candidates": [], "rows_test": 0}
    return write_package(folder / "package", folder / "rule", folder / "recipe", {"target": "minutes", "task": task}, verdict).folder


@pytest.fixture(scope="module")
def package(tmp_path_factory): return everything(tmp_path_factory.mktemp("cab"))


@pytest.fixture(scope="module")
def good(package): return json.loads((package / "sample.json").read_text())["request"]


@pytest.fixture(scope="module")
def port(package):
    with running(package) as port: yield port


def call(port, body=None, method="POST", path="/predict", **headers):
    "Status, headers and answer of one request on a connection of its own."
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, json.dumps(body) if isinstance(body, (dict, list)) else body, {k.replace("_", "-"): v for k, v in headers.items()})
        reply = connection.getresponse()
        return reply.status, dict(reply.headers), reply.read().decode()
    finally: connection.close()


def said(port, raw: bytes, wait=5.0, then=b"", half=False):
    "What a server says to bytes, until it hangs up or is silent."
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as s:
        s.sendall(raw)
        if then: time.sleep(0.2); s.sendall(then)
        if half: s.shutdown(socket.SHUT_WR)
        out = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while more := s.recv(65536): out += more
        return out


def refused(got):
    "Status and error of a refusal; its shape is the one shape."
    status, headers, text = got
    error = json.loads(text)["error"]
    assert sorted(error) == SHAPE and headers["content-type"] == "application/json", got
    assert error["what"] and error["allowed"], got
    return status, error


def raw_refused(answer: bytes):
    head, _, body = answer.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:])
    assert int(headers["content-length"]) == len(body), answer
    return refused((int(head.split()[1]), headers, body.decode()))


BAD = [("km", "far", "a number"), ("km", True, "a number"), ("km", [1], "a number"), ("km", None, "a number"), ("km", {"a": 1}, "a number"), ("people", 1.5, "a whole number"), ("people", 2**63, "a whole number"), ("late", "perhaps", "true or false"),
       ("zone name", 1.5, "text"), ("day", "May", "a date like 2024-05-01"), ("when", 7, "a time like 2024-05-01T08:30:00"), ("people too", "x", "a whole number"), ("zone name too", [], "text"), ("day", "2024-02-30", "a date like 2024-05-01")]


@pytest.mark.parametrize("field, value, allowed", BAD)
def test_a_wrong_value_is_named_with_what_is_allowed(port, good, field, value, allowed):
    status, error = refused(call(port, {**good, field: value}))
    assert (status, error["field"], error["allowed"], error["request"]) == (422, field, allowed, None)
    assert error["value"] == (value if isinstance(value, (bool, float, type(None))) or isinstance(value, int) and value < 1e15 else str(value))
    assert refused(call(port, [good, {**good, field: value}]))[1]["request"] == 1


def test_what_is_fine_is_answered(port, good):
    right = [{"prediction": 7.5}]
    less = {k: v for k, v in good.items() if not k.endswith("too")}
    for body in (good, less, {**good, "zone name": "a zone never seen"}, {**good, "km too": float("nan")}, {**good, "km": "2.5"}, {**good, "colour": "red"}, {**good, "zone name": 10**30}):
        status, headers, text = call(port, [body])
        assert (status, json.loads(text)) == (200, right), text
        assert headers["server-timing"].startswith("features;dur=")
    assert json.loads(call(port, [])[2]) == []


def test_bodies_that_are_no_requests(port, good):
    line = json.dumps(good)
    for body, kind, status in ((b"", "", 400), (b"{", "", 400), (b"\xff\xfe", "", 400), (b"null", "", 400), (b'"text"', "", 400), (b"[1]", "", 422), (b"[" * 100_000, "", 400), (b'{"km": ' + b"[" * 980 + b"]" * 980 + b"}", "", (400, 422)),  # it depends on what else is on the stack whether that is too deep to be read
                               (b'{"km": "\\ud800"}', "", 422), (b'{"km": 1e999}', "", 422), (b'{"km": NaN}', "", 422), (line, "text/plain", 415), (line, "application/xml", 415), (b"a=b", "application/x-www-form-urlencoded", 415),
                               (b"km\n1\n", "text/csv", 400), (b'"', "text/csv", 400), (b"{}\n{", "application/jsonlines", 400), (b" " * 10_000_000, "", 413)):
        assert refused(call(port, body, content_type=kind) if kind else call(port, body))[0] in (status if isinstance(status, tuple) else (status,)), (body[:40], kind)
    assert refused(call(port, line, content_encoding="gzip"))[0] == 415
    chunks = (b" " * 100_000 for _ in range(100))  # ten megabytes whose length nobody tells
    assert refused(call(port, chunks))[0] == 413
    assert call(port, good)[0] == 200


def test_paths_and_methods(port):
    assert refused(call(port, None, "GET", "/nowhere"))[0] == refused(call(port, None, "GET", "/%ff%00<script>"))[0] == 404
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        got = call(port, None, method)
        assert (refused(got)[0], got[1]["allow"]) == (405, "POST")
    assert call(port, None, "HEAD", "/healthz")[::2] == (200, "") and call(port, None, "GET", "/docs")[0] == 200
    assert call(port, None, "GET", "/")[1]["location"] == "/docs"


NO_HTTP = [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET /nowhere HTTP/9.9\r\n\r\n", b"GET /\x01 HTTP/1.1\r\nhost: a\r\n\r\n", b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: many\r\n\r\n", b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
           b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n{}", b"POST /predict HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n2\r\n{}\r\n0\r\n\r\n", b"GET /healthz HTTP/1.1\r\nbad header: x\r\n\r\n", b"GET /healthz HTTP/1.1\r\nhost: a\x00b\r\n\r\n"]


@pytest.mark.parametrize("plain", [False, True])  # with httptools and uvloop, and without
def test_what_is_no_http_is_told_so_in_the_same_shape(package, port, plain):
    code = ("sys.modules['httptools'] = sys.modules['uvloop'] = None\n" if plain else "") + "from slml_nb.serve import serve; serve(sys.argv[2], sock=sock)"
    with running_code(code, package) as port:
        for raw in NO_HTTP:
            status, error = raw_refused(said(port, raw, half=True))
            assert 400 <= status < 500, raw
        many = b"GET /healthz HTTP/1.1\r\n" + b"".join(b"x-%d: %s\r\n" % (i, b"y" * 1000) for i in range(300))
        assert raw_refused(said(port, many))[0] in (400, 431)
        assert b"200 OK" in said(port, b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: upgrade, close\r\nupgrade: websocket\r\n\r\n", 1.0)
        two = b"GET /ping HTTP/1.1\r\nhost: a\r\n\r\nGET /ping HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        assert said(port, two).count(b"HTTP/1.1 200 OK") == 2
        assert call(port, None, "GET", "/healthz")[0] == 200


def test_who_asks_first_need_not_send_what_is_refused(port):
    head = b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    assert raw_refused(said(port, head % 10_000_000))[0] == 413
    assert b"100 Continue" in said(port, head % 2, 1.0, b"{}") and b"422" in said(port, head % 2, 1.0, b"{}")


def test_slow_clients_and_too_many_of_them(package, good):
    code = "from slml_nb.serve import build_app, Limits, run_app; run_app(build_app(sys.argv[2], guard=Limits(body_seconds=0.5)), sock, head_seconds=0.5, open_connections=20)"
    with running_code(code, package) as port:
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(10)]
        for i, s in enumerate(slow): s.sendall([b"", b"POST /pre", b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n{"][i % 3])
        assert call(port, good)[0] == 200  # they hold nobody up
        slow[0].settimeout(5), slow[2].settimeout(5)
        assert slow[0].recv(100) == b"" and raw_refused(slow[2].recv(9999))[0] == 408
        crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        status, error = raw_refused(said(port, b"GET /ping HTTP/1.1\r\nhost: a\r\n\r\n"))
        assert (status, error["what"]) == (503, "too many connections at once")
        for s in slow + crowd: s.close()
        assert until(lambda: call(port, good)[0] == 200, 10)


# ---- in one piece, and in several

def raw_request(body, *more) -> tuple[bytes, bytes]:
    "Head and body of a request."
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"\r\n".join([b"POST /predict HTTP/1.1", b"host: a", b"content-type: application/json", b"content-length: %d" % len(body), *more, b"", b""]), body


def answers(data: bytes) -> list[tuple[int, dict, str]]:
    "The answers in a stream of bytes."
    out = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        size = int(headers["content-length"])
        out.append((int(first.split()[1]), headers, data[:size].decode()))
        data = data[size:]
    return out


def test_a_request_in_one_piece_is_answered_like_one_in_several(port, good):
    for body in (good, [good, good], {**good, "km": "far"}, b"{", {**good, "zone name": "\u00c5lesund"}, b'{"km": "\\ud800"}', {**good, "km": 1e9}):
        head, body = raw_request(body, b"connection: close")
        (whole,), (parts,) = answers(said(port, head + body)), answers(said(port, head + body[:1], then=body[1:]))
        assert whole[0] == parts[0] and whole[2] == parts[2] and sorted(whole[1]) == sorted(parts[1]) and "date" in whole[1]
        assert whole[1]["connection"] == parts[1]["connection"] == "close"
    assert answers(said(port, b"".join(raw_request(good)).replace(b"HTTP/1.1", b"HTTP/1.0")))[0][1]["connection"] == "close"


def test_requests_in_one_packet_are_answered_in_their_order(port, good):
    packet = b"".join(b"".join(raw_request({**good, "km": float(k)})) for k in range(1, 8)) + b"GET /ping HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    got = answers(said(port, packet))
    assert [json.loads(text).get("prediction") for _, _, text in got] == [3.0 * k for k in range(1, 8)] + [None] and {status for status, _, _ in got} == {200}


def test_keys_and_rates_hold_for_requests_in_one_piece(package, good):
    code = "from slml_nb.serve import build_app, Limits, run_app; run_app(build_app(sys.argv[2], guard=Limits(keys=('a key of some length', 'another one of its length'), rate=2)), sock)"
    with running_code(code, package) as port:
        for key in (b"a key of some length", b"another one of its length"):
            packet = b"".join(raw_request(good, b"x-api-key: " + key)) * 3 + b"".join(raw_request(good, b"x-api-key: " + key, b"connection: close"))
            assert [status for status, _, _ in answers(said(port, packet))] == [200, 200, 429, 429]
        for more in ((), (b"x-api-key: wrong",), (b"x-forwarded-for: 10.0.0.7",), (b"x-api-key: wrong", b"x-forwarded-for: 10.0.0.7")):
            (status, headers, text), = answers(said(port, b"".join(raw_request(good, b"connection: close", *more))))
            assert (status, headers["www-authenticate"], sorted(json.loads(text)["error"])) == (401, "Bearer", SHAPE)


def test_a_rate_counts_each_caller_behind_a_proxy(package, good):
    code = "from slml_nb.serve import build_app, Limits, run_app; run_app(build_app(sys.argv[2], guard=Limits(rate=2)), sock)"
    with running_code(code, package) as port:
        for caller in (b"10.0.0.7", b"10.0.0.8", b""):
            who = [b"x-forwarded-for: " + caller] if caller else []
            packet = b"".join(raw_request(good, *who)) * 2 + b"".join(raw_request(good, b"connection: close", *who))
            assert [status for status, _, _ in answers(said(port, packet))] == [200, 200, 429]


def test_what_was_answered_is_in_the_log_of_a_killed_server(package, good, tmp_path):
    from slml_nb.feedback import read_lines, read_log
    code = "import os; from pathlib import Path; from slml_nb.cli import _noted; from slml_nb.serve import serve; Path(sys.argv[3]).write_text(str(os.getpid())); serve(sys.argv[2], sock=sock, noted=_noted(sys.argv[4], 'cab'))"
    asked = [{**good, "km": float(k), "zone name": name} for k, name in enumerate(["Bronx", "\u00c5lesund", 'a "quote"', "two\nlines", "\u2028", "back\\slash"] * 20, 1)]
    bodies = [json.dumps(a, indent=(None, 0, "\r\n")[i % 3], ensure_ascii=i % 2 == 0).encode() for i, a in enumerate(asked)] + [b'{"km": "\\ud800"}']
    with running_code(code, package, tmp_path / "pid", tmp_path / "log") as port:
        (pair,) = [call(port, asked[:2])]
        got = []
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as c:
            for body in bodies:
                c.request("POST", "/predict", body, {"content-type": "application/json"})
                reply = c.getresponse()
                got.append((reply.status, reply.headers.get("x-prediction-id"), json.loads(reply.read())))
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    there = {r["id"]: r for f in (tmp_path / "log/segments").glob("*.jsonl") for _, r in read_lines(f)[0]}
    assert [s for s, _, _ in got] == [200] * 120 + [422]
    assert [(there[id]["r"], there[id]["a"], there[id]["v"], there[id]["q"]) for _, id, _ in got[:-1]] == [(a, answer, "cab", 1.0) for a, (_, _, answer) in zip(asked, got)]
    assert [there[f"{pair[1]['x-prediction-id']}/{i}"]["r"] for i in (0, 1)] == asked[:2] and len(there) == 122
    assert read_log(tmp_path / "log").num_rows == 122


# ---- keys and tokens

@pytest.fixture(scope="module")
def issuer():
    "Somebody who signs tokens and shows the keys at an address; what is asked of the address is counted."
    import jwt
    from cryptography.hazmat.primitives.asymmetric import rsa

    class Issuer(http.server.ThreadingHTTPServer):
        keys, asked, up = {}, 0, True
        def new(self, kid): self.keys = {**self.keys, kid: rsa.generate_private_key(65537, 2048)}
        def token(self, kid, key=None, **more): return jwt.encode({"iss": "https://issuer.example", "aud": "cab", "sub": "Ann", "exp": time.time() + 60, "scope": "predict look", **more}, key or self.keys[kid], "RS256", headers={"kid": kid})

    class Keys(http.server.BaseHTTPRequestHandler):
        def log_message(self, *a): pass
        def do_GET(self):
            self.server.asked += 1
            body = json.dumps({"keys": [{**json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(k.public_key())), "kid": n, "use": "sig", "alg": "RS256"} for n, k in self.server.keys.items()]}).encode()
            self.send_response(200 if self.server.up else 500)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = Issuer(("127.0.0.1", 0), Keys)
    server.new("one")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def rules(issuer, **more): return token_rules(" ".join(f"{k}={v}" for k, v in {"alg": "RS256", "jwks": f"http://127.0.0.1:{issuer.server_port}/keys", "iss": "https://issuer.example", "aud": "cab", **more}.items()))


def test_tokens_over_http(package, good, issuer):
    from dataclasses import asdict
    from cryptography.hazmat.primitives.asymmetric import rsa
    other = rsa.generate_private_key(65537, 2048)
    code = "import json; from slml_nb.serve import build_app, Limits, TokenRules, run_app; run_app(build_app(sys.argv[2], guard=Limits(keys=('a key of some length',), tokens=TokenRules(**json.loads(sys.argv[3])))), sock)"
    with running_code(code, package, json.dumps(asdict(rules(issuer, scope="predict")))) as port:
        ask = lambda token: call(port, good, authorization=f"Bearer {token}")
        assert ask(issuer.token("one"))[0] == 200 == call(port, good, x_api_key="a key of some length")[0] == ask("a key of some length")[0]
        for token, status, what, told in ((issuer.token("one", exp=time.time() - 60), 401, "the token has expired", "invalid_token"), (issuer.token("one", aud="shoes"), 401, "the token is for another service", "invalid_token"),
                                          (issuer.token("one", nbf=time.time() + 60), 401, "the token is not good yet", "invalid_token"), (issuer.token("one", iss="thief"), 401, "the token is of another issuer", "invalid_token"),
                                          (issuer.token("one", scope="look"), 403, "the token does not allow 'predict'", "insufficient_scope"), (issuer.token("one", other), 401, "the signature of the token is wrong", "invalid_token"),
                                          ("x.y.z", 401, "the token cannot be read", "invalid_token"), (issuer.token("two", other), 401, "the token's key is not one of the issuer's", "invalid_token"), ("", 401, "a key or a token is needed, and this request has no good one", "Bearer")):
            got = ask(token)
            assert (refused(got)[0], refused(got)[1]["what"]) == (status, what) and told in got[1]["www-authenticate"] and (not token or token not in got[2])
        assert refused(call(port, good))[0] == 401 and call(port, None, "GET", "/healthz")[0] == 200
        assert refused(call(port, None, "GET", "/openapi.json"))[0] == 401
        described = json.loads(call(port, None, "GET", "/openapi.json", x_api_key="a key of some length")[2])
        assert sorted(described["components"]["securitySchemes"]) == ["bearer", "key"]


def test_an_issuer_that_changes_its_keys_and_goes_away(issuer):
    tokens = Tokens(rules(issuer), pause=0.0)
    assert tokens.check(issuer.token("one"), time.time()) == "https://issuer.example|Ann"
    issuer.new("two")
    assert tokens.due("two") and not tokens.due("one") and not tokens.due()
    tokens.renew()
    assert tokens.check(issuer.token("two"), time.time()) and not tokens.trouble
    issuer.up = False
    try:
        tokens.renew()
        assert tokens.trouble and tokens.check(issuer.token("one"), time.time())  # the keys of before
        with pytest.raises(SlmlError, match="cannot be read"): Tokens(rules(issuer))
    finally: issuer.up = True
    calm = Tokens(rules(issuer), pause=60.0)
    assert calm.due("invented")
    calm.renew()
    before = issuer.asked
    assert not any(calm.due(f"invented {i}") for i in range(100)) and issuer.asked == before  # liars do not make us ask


def test_one_look_at_the_keys_is_for_all_who_wait(issuer):
    async def app(scope, receive, send): await send({"type": "http.response.start", "status": 200, "headers": []})
    guard, before = Guard(app, Limits(tokens=rules(issuer))), issuer.asked
    async def ask(token):
        sent = []
        async def receive(): return {"type": "http.request", "body": b"", "more_body": False}
        async def send(m): sent.append(m)
        await guard({"type": "http", "path": "/predict", "headers": [(b"authorization", b"Bearer " + token.encode())], "client": ("10.0.0.7", 1)}, receive, send)
        return sent[0]["status"]
    async def many(*tokens): return await asyncio.gather(*map(ask, tokens))
    issuer.new("three")
    assert asyncio.run(many(*(issuer.token("three", sub=str(i)) for i in range(8)))) == [200] * 8 and issuer.asked == before + 1
    issuer.new("four")
    assert asyncio.run(many(*(issuer.token("four") for i in range(8)))) == [401] * 8 and issuer.asked == before + 1  # not twice in half a minute


# ---- the command, and several processes

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def children(pid): return [int(p) for p in os.listdir("/proc") if p.isdigit() and (s := _stat(p)) and s[1] == str(pid) and s[0] != "Z"]
def _stat(p):
    with contextlib.suppress(OSError): return Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()


def test_replicas_share_a_port_and_are_replaced(project, package, good):
    port = free_port()
    server = subprocess.Popen(project.command("serve", str(package), "--port", str(port), "--replicas", "2", "--log", "kept"), cwd=project.folder, env=project.environment(), start_new_session=True, stderr=subprocess.PIPE)
    def up():
        with contextlib.suppress(OSError): return call(port, good)[0] == 200
    try:
        assert until(up, 60) and len(before := children(server.pid)) == 2
        os.kill(before[0], signal.SIGKILL)
        assert until(lambda: len(now := children(server.pid)) == 2 and before[0] not in now, 30) and until(up, 30)
        got = [call(port, good) for _ in range(20)]
        assert {g[0] for g in got} == {200} and len({g[1]["x-prediction-id"] for g in got}) == 20
        server.terminate()
        assert server.wait(30) == 0
        assert not any(_stat(p) for p in before), "somebody is left behind"
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        server.stderr.close()
    kept = {r["id"]: r for f in (project.folder / "kept/segments").glob("*.jsonl") for r in map(json.loads, f.read_text().splitlines())}
    assert all(kept[g[1]["x-prediction-id"]]["a"] == json.loads(g[2]) and kept[g[1]["x-prediction-id"]]["r"] == good for g in got)


def test_replicas_end_with_who_started_them(project, package, good):
    port = free_port()
    server = subprocess.Popen(project.command("serve", str(package), "--port", str(port), "--replicas", "2"), cwd=project.folder, env=project.environment(), stdout=subprocess.DEVNULL)
    def up():
        with contextlib.suppress(OSError): return call(port, good)[0] == 200
    try:
        assert until(up, 60) and len(those := children(server.pid)) == 2
    finally:
        server.kill()
        server.wait()
    assert until(lambda: not any((s := _stat(p)) and s[0] != "Z" for p in those), 10)


def test_a_package_that_cannot_be_opened_is_not_started_for_ever(project, package):
    (broken := project.folder / "broken").mkdir()
    (broken / "manifest.json").write_text("{}")
    code, out, err = project.slml("serve", str(broken), "--port", str(free_port()), "--replicas", "2", timeout=60)
    assert code == 2 or code == 1, err
    assert "package" in err or "manifest" in err


@pytest.mark.parametrize("how", [(), ("--replicas", "2"), ("--workers", "1")], ids=["alone", "replicas", "host"])
@pytest.mark.parametrize("shared", [False, True], ids=["taken", "shared"])
def test_a_taken_port_is_said_before_any_address(project, package, how, shared):
    "Also when its owner would share it: nobody shares a port with strangers."
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared: other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, out, err = project.slml("serve", str(package), "--port", str(port), *how, timeout=60)
    assert code == 2 and "http://" not in out and f"port {port} of 127.0.0.1 cannot be used (Address already in use)" in err and f"--port {port + 1}" in err, (out, err)


@pytest.mark.parametrize("how", [(), ("--replicas", "2"), ("--workers", "1")], ids=["alone", "replicas", "host"])
def test_the_port_that_the_system_gave_is_said(project, package, good, how):
    server = subprocess.Popen(project.command("serve", str(package), "--port", "0", *how), cwd=project.folder, env=project.environment(), stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while "http://" not in (line := server.stdout.readline()): assert line, server.wait(10)
        port = int(line.split("http://127.0.0.1:")[1].split("/")[0])
        def asked():
            with contextlib.suppress(OSError, http.client.HTTPException): return call(port, good, path=f"/{package.name}/predict" if "--workers" in how else "/predict")[0]
        assert port and until(lambda: asked() == 200, 60)
        server.terminate()
        assert server.wait(30) == 0
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        server.stdout.close()


def test_the_command_says_what_is_wrong_with_its_rules(project, package):
    for argv, says in ((("--jwt", "alg=none iss=a aud=b key=k"), "choose one of HS256, RS256, ES256"), (("--jwt", "alg=RS256 iss=a aud=b key=nowhere"), "cannot be read"), (("--host", "0.0.0.0"), "or --jwt for tokens")):
        code, out, err = project.slml("serve", str(package), "--port", str(free_port()), *argv, SLML_KEYS="", SLML_JWT="", timeout=60)
        assert code and says in err, err


# ---- schemathesis

def schemathesis(port, path, *more):
    pytest.importorskip("schemathesis")
    command = [sys.executable, "-c", "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())", "run", f"http://127.0.0.1:{port}{path}", "--url", f"http://127.0.0.1:{port}",
               "--generation-deterministic", "--continue-on-failure", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0 and "No issues found" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


def test_schemathesis_finds_nothing(port, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schemathesis(port, "/openapi.json", "--phases", "examples,fuzzing", "--max-examples", "5")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["everything", "classes", "flights", "locked", "host"])
def test_schemathesis_finds_nothing_in_many_requests(package, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    kinds = everything(tmp_path / "classes", ["long", "short"])
    key, count = ("-H", "X-Api-Key: a key of some length"), ("--max-examples", "15")
    locked = "from slml_nb.serve import build_app, Limits, run_app; run_app(build_app(sys.argv[2], guard=Limits(keys=('a key of some length',))), sock)"
    host = "from slml_nb.host import Host; from slml_nb.serve import Guard, Limits, run_app; run_app(Guard(Host({'a': sys.argv[2], 'b': sys.argv[3]}, most=1, least=1), Limits()), sock)"
    if what == "host":
        with running_code(host, package, kinds) as port:
            schemathesis(port, "/b/openapi.json", *count)
    else:
        # a month 13 is a whole number, and no date: that fields must go together no schema says
        more = {"flights": ("--exclude-checks", "positive_data_acceptance"), "locked": key}.get(what, ())
        with running_code(locked if what == "locked" else "from slml_nb.serve import serve; serve(sys.argv[2], sock=sock)", {"classes": kinds, "flights": FLIGHTS}.get(what, package)) as port:
            schemathesis(port, "/openapi.json", *count, *more)
