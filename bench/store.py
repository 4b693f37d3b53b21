"""A large artifact to a bucket and back: the store beside boto3's own transfer, on two servers of this machine.

moto keeps a whole object in memory and cuts a range out of a copy of it, so with it the server is what is measured. The second server here does as
little as a server can: parts are files, ranges leave by sendfile. With it what the client costs is measured.

    python bench/store.py 256        megabytes; one round
"""
import hashlib, http.server, json, os, re, socket, subprocess, sys, tempfile, threading, time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
MB = 1 << 20
WAYS = ("slml", "boto3", "boto3, tuned")


class Plain(http.server.BaseHTTPRequestHandler):
    "As much of S3 as a transfer needs: objects are lists of files."
    protocol_version, objects, parts, place = "HTTP/1.1", {}, {}, None

    def log_message(self, *_): pass

    def answer(self, status=200, body=b"", **headers):
        self.send_response_only(status)
        for k, v in {"Date": self.date_time_string(), "Content-Length": len(body), **{k.replace("_", "-"): v for k, v in headers.items()}}.items(): self.send_header(k, v)
        self.end_headers()
        if body: self.wfile.write(body)

    def asked(self):
        path, _, query = self.path.partition("?")
        return path, dict(q.partition("=")[::2] for q in query.split("&"))

    def do_PUT(self):
        path, query = self.asked()
        left, name = int(self.headers.get("Content-Length") or 0), os.path.join(self.place, os.urandom(8).hex())
        with open(name, "wb", buffering=0) as f:
            while left and (block := self.rfile.read1(min(left, MB))): left -= f.write(block)
        if "partNumber" in query: self.parts.setdefault(query["uploadId"], {})[int(query["partNumber"])] = name
        else: self.objects[path] = [name]
        self.answer(ETag='"x"')

    def do_POST(self):
        path, query = self.asked()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "uploads" in query: return self.answer(body=f"<InitiateMultipartUploadResult><UploadId>{os.urandom(8).hex()}</UploadId></InitiateMultipartUploadResult>".encode())
        self.objects[path] = [name for _, name in sorted(self.parts.pop(query["uploadId"]).items())]
        self.answer(body=b'<CompleteMultipartUploadResult><ETag>"x-1"</ETag></CompleteMultipartUploadResult>')

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        files = self.objects.get(self.asked()[0])
        if files is None: return self.answer(404, b"" if self.command == "HEAD" else b"<Error><Code>NoSuchKey</Code><Message/></Error>")
        sizes = [os.path.getsize(f) for f in files]
        first, last = 0, sum(sizes)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""): first, last = int(asked[1]), min(last, int(asked[2] or last) + 1)
        self.send_response_only(206 if asked else 200)
        for k, v in {"Content-Length": last - first, "ETag": '"x-1"', "Last-Modified": self.date_time_string(), **({"Content-Range": f"bytes {first}-{last - 1}/{sum(sizes)}"} if asked else {})}.items(): self.send_header(k, v)
        self.end_headers()
        if self.command == "GET": self.pour(files, sizes, first, last)

    def pour(self, files, sizes, first, last):
        "Send the bytes from first to last of files that follow each other."
        start = 0
        for name, size in zip(files, sizes):
            a, b = max(first - start, 0), min(last - start, size)
            with open(name, "rb") as f:
                while a < b: a += os.sendfile(self.connection.fileno(), f.fileno(), a, b - a)
            start += size

    def do_DELETE(self):
        for name in self.objects.pop(self.asked()[0], []): os.unlink(name)
        self.answer(204)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128
    def handle_error(self, *_): pass  # a client that hangs up


def serve(kind: str, place: str):
    "One of the two servers, in a process of its own."
    if kind == "moto":
        import logging
        from moto.server import ThreadedMotoServer
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        address = server.get_host_and_port()
    else:
        Plain.place = place
        server = Server(("127.0.0.1", 0), Plain)
        address = server.server_address
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print("http://%s:%s" % address, flush=True)
    sys.stdin.read()  # until its parent goes


def transfer(way: str, url: str, file: str, digest: str) -> dict:
    "Up and down once; megabytes a second, and the most memory that this process had."
    sys.path.insert(0, str(root))
    place = Path(tempfile.mkdtemp(dir=Path(file).parent))
    if way == "slml":
        from slml_nb.store import S3Store
        store = S3Store("s3://rows/bench", url, place)
        s3, up, down = store.s3, lambda: store.put("big", Path(file)), lambda: store.local("big", digest)
    else:
        import boto3
        from boto3.s3.transfer import TransferConfig
        s3 = boto3.client("s3", endpoint_url=url)
        how = TransferConfig(multipart_chunksize=32 * MB, multipart_threshold=32 * MB, max_concurrency=10, io_chunksize=MB) if way == "boto3, tuned" else None
        up, down = lambda: s3.upload_file(file, "rows", "bench/big", Config=how), lambda: (s3.download_file("rows", "bench/big", str(place / "big"), Config=how), place / "big")[1]
    s3.put_object(Bucket="rows", Key="bench/small", Body=b"x"), s3.get_object(Bucket="rows", Key="bench/small")["Body"].read()  # connected
    size, clock, cpu = os.path.getsize(file) / 1e6, time.perf_counter, time.process_time
    t0, c0 = clock(), cpu()
    up()
    t1, c1 = clock(), cpu()
    back = down()
    t2, c2 = clock(), cpu()
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    with open(back, "rb") as f: right = hashlib.file_digest(f, "sha256").hexdigest() == digest
    s3.delete_object(Bucket="rows", Key="bench/big")
    if not right: sys.exit(f"{way}: other bytes came back")
    return {"up": size / (t1 - t0), "down": size / (t2 - t1), "up_cpu_s": c1 - c0, "down_cpu_s": c2 - c1, "peak_mb": peak}


def measure(
    rounds: int = 1,
    megabytes: int = 1024,
    servers=("plain", "moto"),
) -> list[dict]:  # round, server, way, up and down in MB/s, up_cpu_s, down_cpu_s, peak_mb
    "All ways in turn, each in a process of its own; another is first in each round."
    env = {**{k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "SLML_"))}, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    found = []
    with tempfile.TemporaryDirectory(prefix="slml_bench_") as place:
        file, digest = Path(place) / "big", hashlib.sha256()
        with open(file, "wb") as f:
            for _ in range(megabytes):
                f.write(block := os.urandom(MB))
                digest.update(block)
            f.flush(), os.fsync(f.fileno())  # the disk has nothing left to do when the clock starts
        for kind in servers:
            for i in range(rounds):
                server = subprocess.Popen([sys.executable, __file__, "serve", kind, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                url = server.stdout.readline().strip()
                try:
                    if kind == "moto": subprocess.run([sys.executable, "-c", "import boto3, sys; boto3.client('s3', endpoint_url=sys.argv[1]).create_bucket(Bucket='rows')", url], env=env, check=True)
                    for n, way in enumerate(("slml", *WAYS[i % 3:], *WAYS[:i % 3])):  # the first is not counted: the server warms up
                        done = subprocess.run([sys.executable, __file__, "transfer", way, url, str(file), digest.hexdigest()], env=env, capture_output=True, text=True)
                        if done.returncode: sys.exit(f"{way} on {kind}: {done.stderr[-2000:]}")
                        if n: found.append({"round": i, "server": kind, "way": way, **json.loads(done.stdout)})
                        for p in Path(place).glob("tmp*/**/*"): p.is_file() and p.unlink()
                finally: server.stdin.close(), server.wait(timeout=30)
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]: serve(*sys.argv[2:])
    elif sys.argv[1:2] == ["transfer"]: print(json.dumps(transfer(*sys.argv[2:])))
    else:
        for g in measure(1, *(int(a) for a in sys.argv[1:2]), *([tuple(sys.argv[2:])] if sys.argv[2:] else [])): print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in g.items()}))
