"""The cascade: thresholds against brute force, the breaker against a plain model, services that misbehave, and money that adds up."""
import http.server, json, math, subprocess, sys, threading, time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from slml_nb.cascade import (Breaker, Cascade, Comprehend, HttpApi, Kept, Model, Purse, Refused, Rekognition, Rows, Step, choose, frontier, gather, judge, levels,
                             open_cascade, outcome)
from slml_nb.core import SlmlError

law = settings(max_examples=80, deadline=None, derandomize=True)


class Toy:
    "A service that says what the request says."
    def __init__(self, name, usd=0.0): self.name, self.usd, self.asked, self.lock = name, usd, [], threading.Lock()
    def price(self, request): return self.usd
    def ask(self, request, candidates):
        with self.lock: self.asked.append(request.get("n"))
        said = request.get(self.name, {})
        if said == "down": raise OSError("HTTP 503")
        if said == "late": raise TimeoutError("too late")
        if said == "refuse": raise Refused("broken picture")
        return said


def package(folder):
    "A package of a rule that tells long trips from short ones."
    from slml_nb.model import save_model
    from slml_nb.package import write_package
    km = {"name": "km", "type": "DOUBLE", "required": True, "missing": 0.0, "min": 0.5, "max": 30.0, "values": [], "example": 2.5, "from": ""}
    recipe = {"target": "trip", "task": "classification", "unit": "", "classes": ["long", "short"], "time": "", "inputs": [km],
              "features": [{"name": "km", "kind": "numeric", "sql": "km", "reads": ["km"]}], "lookups": [], "examples": [{"km": 2.5}]}
    (folder / "recipe").mkdir(parents=True)
    (folder / "recipe/recipe.json").write_text(json.dumps(recipe))
    save_model(folder / "rule", {"kind": "rule", "task": "classification", "target": "trip", "classes": ["long", "short"], "features": ["km"],
                                 "expression": "if(km < 4, 'short', 'long')", "odds": {"short": [0.25, 0.75], "long": [0.9, 0.1]}, "fallback": [0.5, 0.5]})
    verdict = {"candidate": "rule", "best": "rule", "sentence": "A rule.", "metric": "accuracy", "requirements": [], "candidates": [], "rows_test": 0}
    return write_package(folder / "package", folder / "rule", folder / "recipe", {"target": "trip", "task": "classification"}, verdict).folder


# -- thresholds

scores = st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.2, 0.5, 0.5, 0.9, 1.0]), st.booleans(), st.sampled_from([-1.0, 0.1, 0.3, 0.6, 1.0]), st.booleans()), min_size=1, max_size=12)


def brute(first, second, people_usd, people_right):
    "Every pair, one row at a time."
    for a in {*(c for c in first.confidence if c >= 0), math.inf}:
        for b in {*(c for c in second.confidence if c >= 0), math.inf}:
            right = usd = 0.0
            for c1, r1, c2, r2 in zip(first.confidence, first.right, second.confidence, second.right):
                usd += 1.0
                if c1 >= a: right += r1; continue
                usd += 0.25
                if c2 >= b: right += r2; continue
                usd, right = usd + people_usd, right + people_right
            yield right / len(first.right), 1000 * usd / len(first.right)


@law
@given(scores, st.sampled_from([0.0, 0.5, 5.0]), st.sampled_from([0.5, 0.9, 1.0]))
def test_the_frontier_is_what_brute_force_finds(rows, people_usd, people_right):
    c1, r1, c2, r2 = (np.array(x, float) for x in zip(*rows))
    first, second = Rows(c1, r1, 1.0), Rows(c2, r2, 0.25)
    front, all_ = frontier(first, second, people_usd, people_right), list(brute(first, second, people_usd, people_right))
    for a, b in zip(front, front[1:]): assert a["usd_per_1000"] < b["usd_per_1000"] and a["accuracy"] < b["accuracy"]
    for p in front:  # each point is a real one
        right, usd, who = outcome([first, second], p["accept"], people_usd, people_right)
        assert np.isclose(right.mean(), p["accuracy"]) and np.isclose(1000 * usd.mean(), p["usd_per_1000"])
    for right, usd in all_:  # and nothing beats the best of them at its price
        assert max(p["accuracy"] for p in front if p["usd_per_1000"] <= usd + 1e-6) >= right - 1e-9
    cheapest = min(usd for _, usd in all_)
    assert np.isclose(front[0]["usd_per_1000"], cheapest) and np.isclose(front[-1]["accuracy"], max(r for r, _ in all_))


def test_the_choice_is_the_best_for_the_money_and_the_cheapest_that_is_good():
    rng = np.random.default_rng(0)
    c = rng.random((2, 300)).round(2)
    first, second = (Rows(x, (rng.random(300) < x).astype(float), u) for x, u in zip(c, (0.001, 0.0)))
    front = frontier(first, second)
    for usd in (10, 30, 45): assert choose(front, usd_per_1000=usd) == max((p for p in front if p["usd_per_1000"] <= usd), key=lambda p: p["accuracy"])
    for right in (0.8, 0.95): assert choose(front, accuracy=right) == min((p for p in front if p["accuracy"] >= right), key=lambda p: p["usd_per_1000"])
    with pytest.raises(SlmlError, match="no thresholds are that good"): choose(front, usd_per_1000=2, accuracy=0.99)


def test_the_interval_is_as_wide_as_a_share_has_it():
    "All to one who is right in 80 of 100 cases: the normal interval of a share."
    n = 2000
    found = judge([Rows(np.ones(n), (np.arange(n) % 5 > 0).astype(float), 0.002)], [0.5], n_boot=3000)
    half = 1.96 * math.sqrt(0.8 * 0.2 / n)
    assert np.allclose(found["accuracy"], [0.8, 0.8 - half, 0.8 + half], atol=0.003)
    assert np.allclose(found["usd_per_1000"], 2.0) and found["shares"] == [1.0, 0.0]


def test_many_thresholds_are_thinned_and_the_ends_stay():
    c = np.linspace(0, 1, 5001)
    t = levels(c, 100)
    assert len(t) <= 101 and t[0] == 0 and t[-1] == math.inf and t[-2] == 1 and set(t[:-1]) <= set(c)


# -- the breaker

def reference(ops, most, window, rest, rest_most, probes):
    "The same said plainly: a list of calls that went out in each state."
    state, calls, until, now, pause, good, out = "closed", [], 0.0, 0.0, rest, 0, []
    for op in ops:
        if isinstance(op, float): now += op; continue
        if state == "open" and now >= until: state, good = "half open", 0
        out.append(state != "open")
        if state == "closed":
            calls = (calls + [op])[-window:]
            if calls.count(False) >= most: state, until, pause, calls = "open", now + rest, rest, []
        elif state == "half open":
            if op:
                good += 1
                if good >= probes: state, calls = "closed", []
            else: pause = min(2 * pause, rest_most); state, until = "open", now + pause
    return out, state


@settings(law, max_examples=400)
@given(st.lists(st.sampled_from([True, False, False, 0.5, 1.0, 2.0, 4.0]), max_size=60), st.integers(1, 2), st.integers(0, 2), st.integers(1, 3))
def test_the_breaker_does_what_the_plain_model_does(ops, most, more, probes):
    now, out = [0.0], []
    b = Breaker(most, most + more, 2.0, 6.0, probes, clock=lambda: now[0])
    for op in ops:
        if isinstance(op, float): now[0] += op; continue
        ticket = b.begin()
        out.append(ticket is not None)
        if ticket is not None: b.end(ticket, op)
    assert (out, b.state) == reference(ops, most, most + more, 2.0, 6.0, probes)


def test_a_probe_that_never_comes_back_is_given_up():
    now = [0.0]
    b = Breaker(1, 1, 1.0, 10.0, 1, clock=lambda: now[0])
    b.end(b.begin(), False)
    now[0] = 1.0; lost = b.begin()
    now[0] = 10.9; assert b.begin() is None
    now[0] = 11.0; probe = b.begin()
    b.end(lost, True); assert b.state == "half open"
    b.end(probe, True); assert b.state == "closed"


def test_an_open_breaker_costs_neither_time_nor_money_and_probes_later(tmp_path):
    now = [0.0]
    api = Toy("api", 0.01)
    c = Cascade([Step(api, 0.5, Breaker(2, 4, 5.0, probes=1, clock=lambda: now[0])), Step(Toy("model"), 0.5)], tmp_path / "c.db", people_usd=None)
    ask = lambda said: c.answer({"api": said, "model": {"cat": 0.9}})
    assert [ask("down")["by"] for _ in range(10)] == ["model"] * 10 and len(api.asked) == 2
    now[0] = 5.0
    assert [ask({"dog": 0.9})["by"] for _ in range(3)] == ["api"] * 3
    assert [ask("refuse")["by"] for _ in range(10)] == ["model"] * 10 and c.steps[0].breaker.state == "closed"  # the request's fault, not the service's


# -- money, and asking once

@law
@given(st.lists(st.sampled_from([0.0005, 0.001, 0.004]), min_size=1, max_size=80), st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.integers(1, 10))
def test_no_stretch_of_requests_spends_more_than_its_shares(prices, budget, burst):
    purse, spent = Purse(budget, burst), []
    for p in prices:
        purse.fill()
        spent.append(p if purse.take(p) else 0.0)
    for i in range(len(spent)):
        for j in range(i + 1, len(spent) + 1): assert sum(spent[i:j]) <= budget / 1000 * (j - i + burst) + 1e-9
    assert math.isclose(purse.spent, sum(spent), abs_tol=1e-12)


said = st.one_of(st.sampled_from(["down", "late", "refuse"]), st.dictionaries(st.sampled_from(["cat", "dog"]), st.sampled_from([0.1, 0.6, 0.95])))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 6), said, said), min_size=1, max_size=15), st.sampled_from([None, 0.0, 20.0]))
def test_nothing_is_asked_twice_and_cost_adds_up(tmp_path_factory, requests, budget):
    folder = tmp_path_factory.mktemp("law")
    api, model = Toy("api", 0.01), Toy("model", 0.002)
    make = lambda: Cascade([Step(api, 0.9), Step(model, 0.9)], folder / "c.db", 0.05, budget, burst=3)
    c, results = make(), {}
    for k, (n, a, m) in enumerate(requests):
        if k == len(requests) // 2: c = make()  # another process goes on
        got = c.answer({"n": n, "api": a, "model": m}, f"id {n}")
        assert results.setdefault(n, got) == got
        assert got["sure"] == (got["confidence"] >= 0.9) or got["label"] is None or not got["sure"]
        assert got["label"] is None or got["by"] in ("api", "model")
    for toy in (api, model): assert len(toy.asked) == len(set(toy.asked))
    for got in results.values():
        steps = c.kept.said(got["id"])
        assert [s.step for s in steps] == [s["step"] for s in got["steps"]]
        assert math.isclose(got["usd"], sum(s.usd for s in steps) + 0.05 * got["waiting"])
    assert math.isclose(sum(g["usd"] for g in results.values()), sum(t["usd"] for t in c.kept.totals().values()) + 0.05 * len(c.kept.waiting()), abs_tol=1e-9)


def test_threads_that_ask_the_same_thing_at_once_ask_once(tmp_path):
    api = Toy("api", 0.01)
    c, got = Cascade([Step(api, 0.9)], tmp_path / "c.db"), []
    work = lambda: got.extend(c.answer({"n": i, "api": {"cat": 0.95}}, f"{i}")["label"] for i in range(20))
    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert got == ["cat"] * 120 and sorted(api.asked) == list(range(20)) and c.lost == 0 and c._busy == {}


def test_a_file_that_is_away_is_no_reason_to_fail(tmp_path):
    c = Cascade([Step(Toy("api"), 0.9)], tmp_path / "c.db")
    def away(*_): raise SlmlError("away")
    c.kept.keep = c.kept.said = c.kept.end = c.kept.ended = c.kept.ask = away
    got = c.answer({"api": {"cat": 0.95}})
    assert (got["label"], got["sure"], c.lost, c.problem) == ("cat", True, 4, "away")
    unsure = c.answer({"api": {"cat": 0.5}})
    assert (unsure["label"], unsure["sure"], unsure["waiting"]) == ("cat", False, False)


def test_the_queue_keeps_the_first_answer(tmp_path):
    a, b = Kept(tmp_path / "q.db"), Kept(tmp_path / "q.db")
    assert [a.ask("1", {"image": b"1234567"}, {"cat": 0.4}), b.ask("1", {}, {}), b.ask("2", {}, {})] == [True, False, True]
    assert [q["id"] for q in b.waiting()] == ["1", "2"] and b.waiting()[0]["request"] == {"image": "7 bytes"}
    assert [a.answer("1", "cat", "Ann"), b.answer("1", "dog", "Bo")] == [True, False]
    assert [q["id"] for q in a.waiting()] == ["2"]
    for bad in ("", None, 3):
        with pytest.raises(SlmlError, match="is no label"): a.answer("2", bad)


# -- services

class Service(http.server.BaseHTTPRequestHandler):
    "Does what the path says."
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        said, status = {"labels": ["Cat", "Dog"], "p": [90, 10], "heard": body, "key": self.headers.get("authorization")}, 200
        type(self).heard = said  # before the answer: whoever has it may look
        if self.path == "/redirect":
            self.send_response(302); self.send_header("location", "/"); self.end_headers(); return
        if self.path[1:].isdigit(): status = int(self.path[1:])
        if self.path == "/strange": said["p"] = [float("nan"), 1]
        if self.path == "/uneven": said["p"] = [1]
        if self.path == "/other": said = [1]
        text = json.dumps(said).encode() if self.path != "/html" else b"<html>"
        if self.path == "/huge": text += b" " * 200_000
        self.send_response(status); self.send_header("content-length", str(len(text))); self.end_headers()
        for i in range(len(text)) if self.path == "/drip" else ():
            try: self.wfile.write(text[i:i + 1]); self.wfile.flush(); time.sleep(0.05)
            except OSError: return
        if self.path != "/drip": self.wfile.write(text)
    def log_message(self, *_): pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown(); server.server_close()


def api(address, path, **more): return HttpApi(address + path, {"text": "$review", "top": 2}, "labels", "p", 0.001, names={"Cat": "cat"}, scale=100, timeout_s=0.4, limit_mb=0.1, **more)


def test_any_service_by_a_small_mapping(address, monkeypatch):
    monkeypatch.setenv("PETS_KEY", "s3cret")
    service = api(address, "/", headers={"authorization": "Bearer ${PETS_KEY}"})
    assert service.ask({"review": "miaow", "more": 1}, {}) == {"cat": 0.9, "Dog": 0.1}
    assert Service.heard["heard"] == {"text": "miaow", "top": 2} and Service.heard["key"] == "Bearer s3cret"
    assert "s3cret" not in repr(service)
    with pytest.raises(SlmlError, match="no environment variable NO_SUCH"): api(address, "/", headers={"a": "${NO_SUCH}"})


@pytest.mark.parametrize("path,blamed", [("/400", False), ("/422", False), ("/413", False), ("/401", True), ("/429", True), ("/500", True), ("/503", True), ("/redirect", True),
                                         ("/strange", True), ("/uneven", True), ("/other", True), ("/html", True), ("/huge", True), ("/drip", True)])
def test_a_service_that_misbehaves_never_fails_the_request(address, tmp_path, path, blamed):
    c = Cascade([Step(api(address, path), 0.5, Breaker(1, 1)), Step(Toy("model"), 0.5)], tmp_path / "c.db")
    got = c.answer({"review": "miaow", "model": {"cat": 0.8}})
    assert (got["by"], got["sure"]) == ("model", True) and got["steps"][0]["why"]
    assert c.steps[0].breaker.state == ("open" if blamed else "closed")
    assert got["usd"] == (0.001 if path == "/drip" else 0.0)  # what timed out may have been billed


def stubbed(service):
    import boto3
    from botocore.stub import Stubber
    client = boto3.client(service, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")
    return client, Stubber(client)


def test_rekognition():
    client, stub = stubbed("rekognition")
    found = {"Labels": [{"Name": "Canine", "Confidence": 98.5}, {"Name": "Dog", "Confidence": 91.0}]}
    with stub:
        r = Rekognition(client=client, names={"Canine": "dog", "Dog": "dog"})
        stub.add_response("detect_labels", found, {"Image": {"Bytes": b"abc"}, "MaxLabels": 10})
        stub.add_response("detect_labels", found, {"Image": {"S3Object": {"Bucket": "pets", "Name": "a/b.jpg"}}, "MaxLabels": 10})
        assert [r.ask({"image": x}, {}) for x in ("YWJj", "s3://pets/a/b.jpg")] == [{"dog": 0.985}] * 2
        arn = "arn:aws:rekognition:us-east-1:123456789012:project/pets/version/1/1600000000000"
        stub.add_response("detect_custom_labels", {"CustomLabels": [{"Name": "wolf", "Confidence": 60.0}]}, {"ProjectVersionArn": arn, "Image": {"Bytes": b"abc"}, "MaxResults": 10})
        assert Rekognition(client=client, project=arn).ask({"image": b"abc"}, {}) == {"wolf": 0.6}
        stub.add_client_error("detect_labels", "InvalidImageFormatException")
        with pytest.raises(Refused): r.ask({"image": b"x"}, {})
        stub.add_client_error("detect_labels", "ThrottlingException")
        with pytest.raises(Exception, match="Throttling"): r.ask({"image": b"x"}, {})
        for bad in ({}, {"image": 3}, {"image": "no base64!"}):
            with pytest.raises(Refused): r.ask(bad, {})
        stub.assert_no_pending_responses()


def test_comprehend():
    client, stub = stubbed("comprehend")
    with stub:
        c = Comprehend(client=client, names={"Positive": "good"})
        stub.add_response("detect_sentiment", {"Sentiment": "POSITIVE", "SentimentScore": {"Positive": 0.75, "Negative": 0.125, "Neutral": 0.125, "Mixed": 0.0}}, {"Text": "nice", "LanguageCode": "en"})
        assert c.ask({"text": "nice"}, {}) == {"good": 0.75, "Negative": 0.125, "Neutral": 0.125, "Mixed": 0.0}
        arn = "arn:aws:comprehend:us-east-1:123456789012:document-classifier-endpoint/pets"
        stub.add_response("classify_document", {"Classes": [{"Name": "dog", "Score": 0.5}]}, {"Text": "wuff", "EndpointArn": arn})
        assert Comprehend(client=client, endpoint=arn).ask({"text": "wuff"}, {}) == {"dog": 0.5}
        stub.add_client_error("detect_sentiment", "TextSizeLimitExceededException")
        with pytest.raises(Refused): c.ask({"text": "x" * 6000}, {})
        with pytest.raises(Refused): c.ask({"text": ""}, {})
    assert [round(c.price({"text": "x" * n}), 4) for n in (1, 300, 301, 1000)] == [0.0003, 0.0003, 0.0004, 0.001]  # Amazon's example: units of 100, 3 at least


# -- all together

def test_a_cascade_with_a_package_and_thresholds_from_labelled_rows(tmp_path, address):
    folder = package(tmp_path / "p")
    spec = {"kept": str(tmp_path / "c.db"), "steps": [{"kind": "http", "url": address + "/503", "send": {"km": "$km"}, "scores": "p"}, {"kind": "package", "package": str(folder), "accept": 0.8}]}
    (tmp_path / "cascade.yaml").write_text(json.dumps(spec))
    c = open_cascade(tmp_path / "cascade.yaml")
    assert [(g["label"], g["by"], g["sure"]) for g in (c.answer({"km": 9}), c.answer({"km": 1}), c.answer({"km": "far"}))] == [
        ("long", "model", True), ("short", "model", False), (None, "nobody", False)]
    rows = gather(c, [{"km": k} for k in (1, 2, 5, 9)], ["short", "long", "long", "long"])
    assert list(rows[0].confidence) == [-1.0] * 4 and list(rows[1].right) == [1, 0, 1, 1]
    best = choose(frontier(*rows), accuracy=1.0)
    assert best["accept"][1] == 0.9 and math.isclose(best["usd_per_1000"], 25.0)
    with pytest.raises(SlmlError, match="no such file"): open_cascade(tmp_path / "none.yaml")


def test_answering_needs_numpy_only(tmp_path):
    folder = package(tmp_path / "p")
    heavy = "pandas torch sklearn scipy duckdb pyarrow boto3 lightgbm onnxruntime matplotlib".split()
    code = f"""import sys; from slml_nb.cascade import open_cascade
c = open_cascade(dict(kept={str(tmp_path / 'c.db')!r}, steps=[dict(kind='http', url='http://127.0.0.1:9/', send={{}}), dict(kind='package', package={str(folder)!r}, accept=0.8)]))
assert c.answer(dict(km=9))['label'] == 'long'; print([m for m in {heavy} if m in sys.modules])"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_model_of_numbers_is_no_step():
    with pytest.raises(SlmlError, match="predicts numbers"): Model(type("P", (), {"classes": [], "predict": 1})())
