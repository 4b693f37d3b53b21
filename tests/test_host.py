"""The host under faults: workers that are killed, leak, hang or die at once; packages that come, change and go under load; clients that are slow or have no key."""
import asyncio, http.client, json, os, shutil, signal, socket, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slml_nb.host import Host, host, hosting, looked
from slml_nb.package import load_package, seal
from slml_nb.serve import running_code
from slml_nb.stage import made_in, sample_folder
from tiny import until

RECORD = made_in(sample_folder())["package"]
FLIGHTS = Path(RECORD["root"]) / RECORD["file"]
SAMPLE = json.loads((FLIGHTS / "sample.json").read_text())
ASK, RIGHT = json.dumps(SAMPLE["request"]).encode(), load_package(FLIGHTS).predict([SAMPLE["request"]])[0]

# What a bad model does, by a field that no model reads: the worker itself is not changed
EVIL = """import os, time
import slml_nb.package as package
was = package.Predictor.timed
hoard = []
def timed(self, requests):
    for r in requests:
        do = r.get("what it does") if isinstance(r, dict) else None
        if do == "die": os.kill(os.getpid(), 9)
        if do == "hang": time.sleep(60)
        if do == "nap": time.sleep(0.05)
        if do == "fail": raise RuntimeError("oh")
        if do == "burst": hoard.append(bytearray(2_000_000_000))
        if do == "leak": hoard.append(bytearray(os.urandom(1000) * 20_000))
    return was(self, requests)
package.Predictor.timed = timed
"""


def call(port, method="POST", path="/predict", body=ASK, **headers):
    "Status, answer and headers of one request on a connection of its own."
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read()), dict(reply.headers)
    finally: connection.close()


def workers(package=""):
    "Process ids of the workers on this machine that this test has started."
    found = []
    for p in os.listdir("/proc"):
        try: line = Path(f"/proc/{p}/cmdline").read_text() if p.isdigit() else ""
        except OSError: continue
        if "slml_nb.host import work" in line and "/slml-host-" in line and package in line: found.append(int(p))
    return found


class Load:
    "Clients that ask without a pause, until the block ends."
    def __init__(self, port, path="/predict", clients=3, body=ASK): self.port, self.path, self.clients, self.body, self.over, self.said = port, path, clients, body, threading.Event(), []

    def run(self):
        while not self.over.is_set():
            try: self.said.append(call(self.port, path=self.path, body=self.body)[:2])
            except OSError as e: self.said.append((0, repr(e)))

    def __enter__(self):
        self.threads = [threading.Thread(target=self.run) for _ in range(self.clients)]
        for t in self.threads: t.start()
        return self

    def __exit__(self, *e):
        self.over.set()
        for t in self.threads: t.join()

    def failed(self): return [s for s in self.said if s != (200, RIGHT)]


@pytest.fixture
def evil(tmp_path, monkeypatch):
    "Workers that do what a request tells them."
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/sitecustomize.py").write_text(EVIL)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "evil"), str(Path(__file__).parents[1])]))


def do(what): return json.dumps({**SAMPLE["request"], "what it does": what}).encode()


def changed(folder, note):
    "The same package with another card, and so another hash."
    shutil.copytree(FLIGHTS, folder)
    (folder / "card.md").write_text(f"# {note}\n\n")
    return folder, seal(folder)["hash"][:12]


def test_kill_9_under_load_fails_no_request():
    with hosting({"flights": FLIGHTS}, most=2) as port:
        with Load(port) as load:
            for _ in range(4):
                time.sleep(0.1)
                for pid in workers(): os.kill(pid, signal.SIGKILL)
                assert call(port)[0] == 200
        counts = call(port, "GET", "/", None)[1]["packages"]["flights"]
    assert len(load.said) > 50 and not load.failed(), load.failed()[:3]
    assert counts["died"] >= 3 and counts["started"] >= 3
    assert until(lambda: not workers(), 10)  # and nobody is left behind


def test_what_one_package_does_the_others_do_not_feel(evil):
    with hosting({"good": FLIGHTS, "bad": FLIGHTS}, most=1, seconds=1.0, memory_mb=300) as port:
        with Load(port, "/good/predict", clients=2) as load:
            said = {what: call(port, path="/bad/predict", body=do(what)) for what in ("fail", "die", "hang", "burst")}
            leaks = [call(port, path="/bad/predict", body=do("leak"))[0] for _ in range(30)]
            well = call(port, path="/bad/predict")
        counts = call(port, "GET", "/", None)[1]["packages"]
    assert {w: s[0] for w, s in said.items()} == {"fail": 500, "die": 500, "hang": 504, "burst": 500}
    assert all(sorted(s[1]["error"]) == ["allowed", "field", "request", "value", "what"] for s in said.values())
    assert set(leaks) == {200} and counts["bad"]["retired"] >= 1  # 600 MB leaked where 300 are allowed: replaced in time, nobody refused
    assert counts["bad"]["died"] >= 3 and counts["bad"]["hung"] == 1
    assert well[:2] == (200, RIGHT)
    assert not load.failed() and counts["good"]["died"] == 0, load.failed()[:3]


def test_packages_come_change_and_go_under_load(tmp_path):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    shutil.copytree(FLIGHTS, shelf / "one")
    new, digest = changed(tmp_path / "new", "a new one")
    with running_code("import json; from slml_nb.host import Host, Guard, Limits, run_app; run_app(Guard(Host(watch=sys.argv[2], every=0.1, most=1), Limits()), sock)", shelf) as port:
        with Load(port, "/one/predict", clients=2) as load:
            assert call(port, path="/two/predict")[0] == 404
            shutil.copytree(FLIGHTS, tmp_path / "draft")
            (tmp_path / "draft").rename(shelf / "two")
            assert until(lambda: call(port, path="/two/predict")[0] == 200, 20)
            (shelf / "one").rename(tmp_path / "old")
            new.rename(shelf / "one")
            assert until(lambda: call(port, path="/one/predict")[2]["slml-package"] == digest, 20)
            (shelf / "three").mkdir()  # half written: no seal that fits
            (shelf / "three/manifest.json").write_text("{}")
            assert until(lambda: "three" in call(port, "GET", "/", None)[1]["trouble"], 20)
            (shelf / "one/card.md").write_text("changed behind its back")
            os.utime(shelf / "one/manifest.json")
            assert until(lambda: "changed since" in call(port, "GET", "/", None)[1]["trouble"].get("one", ""), 20)
            assert call(port, path="/one/predict")[2]["slml-package"] == digest  # what answers is as it was
            shutil.rmtree(shelf / "two")
            assert until(lambda: call(port, path="/two/predict")[0] == 404, 20)
    assert len(load.said) > 30 and not load.failed(), load.failed()[:3]
    assert until(lambda: not workers(), 10)


FOLLOWS = "from slml_nb.host import Host, Guard, Limits, run_app; run_app(Guard(Host(watch=sys.argv[2], every=0.02, most=1), Limits()), sock)"


@pytest.mark.parametrize("swaps", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_a_package_is_swapped_under_load_again_and_again(tmp_path, swaps):
    shelf, versions = tmp_path / "shelf", [changed(tmp_path / f"v{i}", f"version {i}") for i in range(2)]
    shutil.copytree(versions[0][0], shelf / "one")
    with running_code(FOLLOWS, shelf) as port:
        hash_now = lambda: call(port, "GET", "/one/healthz", None)[1]["package"][:12]
        with Load(port, "/one/predict", clients=2) as load:
            for i in range(1, swaps + 1):
                folder, digest = versions[i % 2]
                shutil.copytree(folder, tmp_path / "draft")
                (shelf / "one").rename(tmp_path / "away")
                (tmp_path / "draft").rename(shelf / "one")
                assert until(lambda: hash_now() == digest, 20), i
                shutil.rmtree(tmp_path / "away")
        state = call(port, "GET", "/", None)[1]
    assert len(load.said) > 5 * swaps and not load.failed(), load.failed()[:3]
    assert not {n: why for n, why in state["trouble"].items() if n == "one"}
    assert until(lambda: not workers(), 10)  # those of all the versions before are gone, too


def test_a_version_that_cannot_be_opened_changes_nothing(tmp_path):
    version, digest = changed(tmp_path / "v1", "version 1")

    async def swap():
        house, said, over = Host({"flights": FLIGHTS}, most=1), [], asyncio.Event()
        await house.start()
        async def asking():
            while not over.is_set(): said.append((await house.pools["flights"].ask("", "", ASK))[0])
        clients = [asyncio.ensure_future(asking()) for _ in range(3)]
        with pytest.raises(Exception, match="no such folder"): await house.add("flights", tmp_path / "nowhere")
        before, after = house.pools["flights"].hash, await house.add("flights", version)
        over.set()
        await asyncio.gather(*clients)
        await house.stop()
        return said, before, after
    said, before, after = asyncio.run(swap())
    assert set(said) == {200} and before == load_package(FLIGHTS).hash and after.startswith(digest)
    assert until(lambda: not workers(), 10)


def test_workers_follow_the_load_and_go_to_zero(evil):
    with hosting({"flights": FLIGHTS}, most=2, idle=1.0) as port:
        count = lambda: call(port, "GET", "/", None)[1]["packages"]["flights"]["workers"]
        assert call(port)[0] == 200
        with Load(port, clients=6, body=do("nap")) as load:
            assert until(lambda: count() == 2, 20)
            assert {count() for _ in range(20)} == {2}  # and not more than there may be
        assert not load.failed(), load.failed()[:3]
        assert until(lambda: count() == 0 and not workers(), 10)
        assert call(port)[:2] == (200, RIGHT)  # and back again


@pytest.mark.slow
def test_load_rises_in_steps_and_ends():
    with hosting({"a": FLIGHTS, "b": FLIGHTS}, most=2, idle=1.0) as port:
        count = lambda: sum(p["workers"] for p in call(port, "GET", "/", None)[1]["packages"].values())
        said = []
        def ask(path, due):
            time.sleep(max(0.0, due - time.monotonic()))
            said.append(call(port, path=path)[:2])
        for rate in (1, 20, 100):
            begin = time.monotonic()
            with ThreadPoolExecutor(16) as pool: list(pool.map(ask, ["/a/predict", "/b/predict"] * rate, [begin + i / rate for i in range(2 * rate)]))
            assert 1 <= count() <= 4
        assert len(said) == 242 and set(map(str, said)) == {str((200, RIGHT))}, [s for s in said if s != (200, RIGHT)][:3]
        assert until(lambda: count() == 0 and not workers(), 10)


def test_slow_clients_hold_nobody_up():
    with running_code("import json; from slml_nb.host import Host, Guard, Limits, run_app; run_app(Guard(Host({'f': sys.argv[2]}, most=1), Limits(body_seconds=0.5)), sock, head_seconds=0.5)", FLIGHTS) as port:
        socks = []
        for said in [b"POST /predict HT", b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{\"a"] * 20:
            socks.append(socket.create_connection(("127.0.0.1", port)))
            socks[-1].sendall(said)
        assert call(port)[:2] == (200, RIGHT)
        time.sleep(1.0)
        got = []
        for s in socks:
            s.settimeout(5)
            got.append(s.recv(1000))
            s.close()
        assert got[0] == b"" and got[1].startswith(b"HTTP/1.1 408"), got[:2]
        assert call(port)[:2] == (200, RIGHT)


def test_a_public_door_is_locked(monkeypatch):
    monkeypatch.setenv("SLML_KEYS", "0123456789abcdef")
    with running_code("from slml_nb.host import Host, Guard, limits_for, run_app; run_app(Guard(Host({'f': sys.argv[2]}, most=1), limits_for('0.0.0.0', rate=5)), sock)", FLIGHTS) as port:
        assert call(port)[0] == call(port, authorization="Bearer nobody")[0] == call(port, "GET", "/", None)[0] == 401
        assert call(port, "GET", "/ping", None)[0] == 200
        said = [call(port, x_api_key="0123456789abcdef") for _ in range(12)]
        assert said[0][0] == 200 and said[-1][0] == 429 and int(said[-1][2]["retry-after"]) >= 1
        assert call(port, body=b"x" * 10_000_000)[0] == 401  # nobody reads ten megabytes for a stranger
    monkeypatch.delenv("SLML_KEYS")
    with pytest.raises(Exception, match="SLML_KEYS"): host({"f": FLIGHTS}, address="0.0.0.0", port=0)


def test_ten_megabytes_and_other_bad_bodies():
    with hosting({"flights": FLIGHTS}, most=1) as port:
        for body, kind, status in ((b" " * 10_000_000, "application/json", 413), (b"\x00\xff", "text/csv", 400), (b"", "application/json", 400), (b'{"a": NaN}', "application/json", 422), (b"[[]]", "application/jsonlines", 422), (b'{"carrier": "\\ud800"}', "application/json", 422), (ASK, "multipart/form-data", 415)):
            got = call(port, body=body, content_type=kind)
            assert (got[0], sorted(got[1]["error"])) == (status, ["allowed", "field", "request", "value", "what"]), (body[:20], got)
        assert call(port)[:2] == (200, RIGHT)


def test_a_folder_is_looked_through(tmp_path):
    for name in ("a", "b c", "docs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    assert list(looked(tmp_path)) == ["a"] and looked(tmp_path / "nowhere") == {}


def test_variants_share_a_name_and_feedback_is_kept(tmp_path):
    other, _ = changed(tmp_path / "other", "another")
    (tmp_path / "spec.json").write_text(json.dumps({"name": "eta", "policy": "shares", "variants": {"old": str(FLIGHTS), "new": str(other)}, "shares": {"old": 0.5, "new": 0.5}, "state": str(tmp_path / "traffic.db"), "log": str(tmp_path / "log")}))
    code = "from slml_nb.cli import _variants; from slml_nb.host import host; packages = {}; t = [_variants(sys.argv[2], packages)]; host(packages, sock=sock, traffic=t, most=1)"
    with running_code(code, tmp_path / "spec.json") as port:
        said = [call(port, path="/eta/predict", x_request_id=f"r{i}") for i in range(40)]
        assert {s[0] for s in said} == {200} and {s[2]["x-variant"] for s in said} == {"old", "new"}
        assert [s[2]["x-prediction-id"] for s in said] == [f"r{i}" for i in range(40)]
        assert call(port, path="/eta/predict", x_request_id="r0")[2]["x-variant"] == said[0][2]["x-variant"]  # the same id, the same variant
        assert call(port, path="/feedback", body=json.dumps([{"id": "r0", "reward": 1.0}, {"id": "r1", "reward": 0.0}]))[:2] == (202, {"kept": 2})
        assert call(port, path="/eta/feedback", body="{}")[0] in (400, 422)
        assert call(port, "GET", "/eta/traffic", None)[0] == 200
