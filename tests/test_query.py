"""Questions in SQL, typed as a user types them: three engines, the meter, the catalog, and what can go wrong."""
import contextlib, json, logging, os, signal, subprocess, sys, threading, time
from pathlib import Path

import pytest

from slml_nb.core import sha256_file, sha256_text
from slml_nb.sql import connect

TABLES = {"clean": "select range as row_id, 'car ' || (range % 3) as \"car, name\", range * 0.25e0 as fare, timestamp '2024-01-01' + range * interval 1 minute as seen, case when range % 7 > 0 then range % 7 end as grp from range(2000)",
          "names": "select 'car ' || range as \"car, name\", [range, 2] as pair, {'a': range, 'b': 'x'} as both from range(3)", "nothing": "select 1 as a where false"}
SPECIAL = "select 1 as \"order\", 2 as \"say \"\"hi\"\"\", 3 as \"Köln (km)\""


def a_run(project, run="20240101-100000-aaaa", name="shop", tables=TABLES, root=None):
    "The folder of a run whose tables are made by one stage."
    con, place = connect(threads=1), Path(root or project.folder) / "runs" / name / run / "quality"
    (place / "out").mkdir(parents=True)
    made = {"stage": "quality", "sentence": "Rows that can be used.", "root": "out", "artifacts": {}}
    for table, sql in tables.items():
        file = place / f"out/{table}.parquet"
        rows = con.execute(f"copy ({sql}) to '{file}' (format parquet)").fetchall()[0][0]
        columns = [[r[0], str(r[1])] for r in con.execute(f"describe {sql}").fetchall()]
        made["artifacts"][table] = {"kind": "table", "file": file.name, "sha256": sha256_file(file), "bytes": file.stat().st_size, "rows": rows, "columns": columns}
    (place / "made.json").write_text(json.dumps(made))
    (place.parent / "run.json").write_text(json.dumps({"project": name, "run": run, "who": "ann", "started": "2024-01-01T10:00:00", "state": "done", "stages": {}}))
    return place.parent


@pytest.fixture(scope="module")
def asked(shop):
    "A project with a run, and a folder with partitions."
    a_run(shop)
    connect(threads=1).execute(f"copy (select range as id, range % 4 as month from range(400)) to '{shop.folder}/trips' (format parquet, partition_by (month))")
    return shop


def answer(project, *argv, **env):
    "`slml sql … --json`."
    code, out, err = project.slml("sql", *argv, "--json", **env)
    assert code == 0, err
    return json.loads(out)


def fails(project, *argv, code=2, **env):
    "One message, nothing on standard output."
    got, out, err = project.slml("sql", *argv, **env)
    assert (got, out) == (code, "") and err.startswith("slml: ") and len(err.splitlines()) == 1 and "Traceback" not in err, (got, out, err)
    return err


QUESTION = "select \"car, name\" as car, count(*) as n, avg(fare) as fare, max(seen) as latest from clean where grp is not null group by \"car, name\" order by car"


def test_a_table_for_people_and_the_meter(asked):
    code, out, err = asked.slml("sql", QUESTION)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["car", "n", "fare", "latest"] and lines[2].startswith("car 0  571") and "3 rows" in lines[-1] and "Athena would charge $0.0000477" in lines[-1]


def test_json_csv_parquet(asked):
    found = answer(asked, "select row_id, grp from clean order by row_id limit 8")
    assert found["columns"] == [["row_id", "BIGINT"], ["grp", "BIGINT"]] and found["rows"][:2] == [[0, None], [1, 1]] and found["meter"]["rows"] == 8 and found["meter"]["tables"]["clean"].startswith("shop.clean@")
    code, out, err = asked.slml("sql", "select row_id, grp from clean order by row_id limit 2", "--format", "csv")
    assert (code, out) == (0, "row_id,grp\n0,\n1,1\n") and "2 rows" in err
    assert [json.loads(l) for l in asked.slml("sql", "select pair, \"both\" from names order by pair", "--format", "json")[1].splitlines()][2] == {"pair": [2, 2], "both": {"a": 2, "b": "x"}}
    assert asked.slml("sql", "from clean", "-o", "all.parquet")[0] == 0
    assert answer(asked, "select count(*) from 'all.parquet'")["rows"] == [[2000]]
    assert "add -o FILE.parquet" in fails(asked, "select 1", "--format", "parquet")
    assert "no such folder" in fails(asked, "select 1", "-o", "nowhere/x.csv")
    assert "says no format" in fails(asked, "select 1", "-o", "x.xlsx") and not asked.left_behind()


def test_names(asked):
    assert answer(asked, "select count(*) from shop.clean")["rows"] == [[2000]]
    version = answer(asked, "select 1 from clean limit 1")["meter"]["tables"]["clean"]
    assert answer(asked, f'select count(*) from "{version}"')["rows"] == [[2000]]
    assert answer(asked, 'select count(*) from "clean@20240101-100000-aaaa"', )["rows"] == [[2000]]
    assert answer(asked, "select count(*) from 'trips/**/*.parquet' where month = 1")["rows"] == [[100]]
    assert answer(asked, "select count(*) from 'trips/'")["rows"] == [[400]]
    assert answer(asked, "with clean as (select * from clean limit 5) select count(*) from clean")["rows"] == [[5]]
    assert answer(asked, "describe clean")["rows"][1][:2] == ["car, name", "VARCHAR"]
    assert asked.slml("sql", "-", "--json")[0] == 2  # nothing on standard input
    for text, words in [("select * from claen", "did you mean 'clean'?"), ("select * from shp.clean", "did you mean 'shop.clean'?"), ("select * from clean@x1", 'write "clean@x1"'), ("select * from \"clean@zz\"", "has no version zz"),
                        ("select * from 'trips/none.parquet'", "no such file"), ("select far from clean", "did you mean 'fare'?"), ("drop table clean", "only a query"), ("select 1; select 2", "one question at a time"), ("selec 1", "not SQL"),
                        ("select * from read_text('/etc/hostname')", "opens the files of the tables it names"), ("select fare + seen from clean", "query: ")]:
        assert words in fails(asked, text), text
    assert "no run 'nope'" in fails(asked, "select 1 from clean", "--run", "nope")


def test_weird_columns_empty_answers_nested_values(asked):
    a_run(asked, "20240102-100000-bbbb", "odd", {"odd": SPECIAL})
    assert asked.slml("sql", "select * from odd.odd", "--format", "csv")[1] == 'order,"say ""hi""",Köln (km)\n1,2,3\n'
    assert answer(asked, "select * from shop.nothing")["rows"] == [] and asked.slml("sql", "select * from shop.nothing")[1].splitlines()[-1].startswith("0 rows")
    assert asked.slml("sql", "select * from shop.nothing", "--format", "csv")[1] == "a\n"
    code, out, _ = asked.slml("sql", "select chr(27) || '[2J' || chr(10) as x, repeat('y', 500) as y from range(100)")
    assert code == 0 and "\x1b" not in out and max(map(len, out.splitlines())) < 130 and "… 60 more rows" in out


def test_explain_reads_nothing_and_names_the_cost(asked):
    found = answer(asked, "select sum(row_id) from shop.clean where fare > 3", "--dry-run")
    import pyarrow.parquet as pq
    meta = pq.read_metadata(next(asked.folder.glob("runs/shop/*/quality/out/clean.parquet")))
    sizes = {meta.row_group(0).column(i).path_in_schema: sum(meta.row_group(g).column(i).total_compressed_size for g in range(meta.num_row_groups)) for i in range(meta.num_columns)}
    assert found["bytes"] == sizes["row_id"] + sizes["fare"] and found["athena_usd"] == 10 / 2**20 * 5
    out = asked.slml("sql", "select sum(row_id) as s from shop.clean", "--dry-run", "--engine", "spark")[1]
    assert "`row_id`" in out and "at most" in out
    assert "not portable" in fails(asked, "select median(fare) from shop.clean", "--engine", "spark", "--dry-run")


def test_tables_list_describe_register_drop(asked):
    code, out, _ = asked.slml("tables")
    assert code == 0 and "shop.clean" in out and "2,000" in out and "20240101-100000-aaaa" in out
    assert asked.slml("tables", "trips", "--register", "trips", "--owner", "city", "--description", "taxi trips")[0] == 0
    found = json.loads(asked.slml("tables", "trips", "--json")[1])
    assert (found["rows"], found["partitions"], found["owner"], found["description"], [v["version"] for v in found["versions"]]) == (400, ["month"], "city", "taxi trips", ["1"])
    assert answer(asked, "select month, count(*) from trips group by month order by month")["rows"] == [[m, 100] for m in range(4)]
    assert "taxi trips" in asked.slml("tables", "trips")[1]
    assert asked.slml("tables", "trips", "--drop")[0] == 0 and "there is no table 'trips'" in fails(asked, "from trips") and (asked.folder / "trips/month=0").is_dir()
    for argv, words in [(["none"], "there is no table"), (["x-y", "--register", "trips"], "letters, digits and _"), (["--register", "trips"], "no table is named"), (["shop.clean", "--glue"], "lies on this machine"), (["trips", "--drop"], "is registered")]:
        code, out, err = asked.slml("tables", *argv)
        assert (code, out) == (2, "") and words in err, (argv, err)


def test_one_line_in_a_notebook(asked):
    code = "from slml_nb.query import sql\ndf = sql('select grp, count(*) as n from shop.clean group by grp order by grp')\nprint(type(df).__name__, len(df), df.attrs['meter']['rows'])"
    out = subprocess.run([sys.executable, "-c", code], cwd=asked.folder, env=asked.environment(), capture_output=True, text=True)
    assert out.stdout.splitlines()[0].startswith("7 rows · ") and out.stdout.splitlines()[1] == "DataFrame 7 7", out.stderr


def test_killed_and_interrupted(asked):
    "Ctrl-C ends a long query at once; what stood in the file before stands there still."
    asked.write("kept.csv", "before\n")
    for sign in (signal.SIGINT, signal.SIGKILL):
        p = subprocess.Popen(asked.command("sql", "select count(*) from range(100000000) a, range(100000) b where a.range % 7 = b.range % 11", "-o", "kept.csv"), cwd=asked.folder, env=asked.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            until(lambda: list(asked.folder.glob(".*kept.csv")) or p.poll() is not None)
            time.sleep(0.3)
            p.send_signal(sign)
            out, err = p.communicate(timeout=90)
        finally: p.kill()  # it would count for hours
        if sign == signal.SIGINT: assert p.returncode == 130 and "interrupted" in err and not list(asked.folder.glob(".*kept.csv")), err
        assert (asked.folder / "kept.csv").read_text() == "before\n"
    for f in asked.folder.glob(".*kept.csv"): f.unlink()


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end: time.sleep(0.05)


def test_more_than_memory_spills(asked):
    "A sort of several times what it may hold."
    found = answer(asked, "select count(*) as n from (select md5(a.range::varchar) as h, a.range as i from range(1500000) a order by h limit 1400000)", "--memory", "60MB")
    assert found["rows"] == [[1400000]]
    assert "needs more memory" in fails(asked, "select list(md5(range::varchar)) from range(3000000)", "--memory", "30MB")


# ---------------------------------------------------------------- a bucket, Glue and Athena on a server that enforces the calls

@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    "moto, with an Athena that executes what it is sent: its Trino is read by sqlglot and answered by DuckDB."
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    env = dict(AWS_ENDPOINT_URL="http://%s:%s" % server.get_host_and_port(), AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1", SLML_CACHE=str(tmp_path_factory.mktemp("cache")))
    clients = {n: boto3.client(n, endpoint_url=env["AWS_ENDPOINT_URL"], region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test") for n in ("s3", "glue", "athena", "emr-serverless")}
    clients["s3"].create_bucket(Bucket="rows")
    yield env, clients
    server.stop()


@pytest.fixture(scope="module")
def lake(cloud, tmp_path_factory):
    "A store in the bucket, as the runner leaves it, and a folder with partitions."
    env, clients = cloud
    con = connect(threads=1)
    for name, sql in TABLES.items():
        place, key = tmp_path_factory.mktemp("t"), sha256_text(name)
        con.execute(f"copy ({sql}) to '{place}/{name}.parquet' (format parquet)")
        columns = [[r[0], str(r[1])] for r in con.execute(f"describe {sql}").fetchall()]
        record = {"kind": "table", "file": f"{name}.parquet", "sha256": sha256_file(place / f"{name}.parquet"), "bytes": (place / f"{name}.parquet").stat().st_size, "rows": 1, "columns": columns}
        at = f"base/shop/{key[:2]}/{key}/0123456789ab"
        clients["s3"].upload_file(str(place / f"{name}.parquet"), "rows", f"{at}/{name}.parquet")
        clients["s3"].put_object(Bucket="rows", Key=f"{at}/key.json", Body=json.dumps({"shown": {"made_by": "20240101-100000-aaaa"}}))
        clients["s3"].put_object(Bucket="rows", Key=f"{at}/notebook.ipynb", Body="{}")
        clients["s3"].put_object(Bucket="rows", Key=f"base/shop/{key[:2]}/{key}/made.json", Body=json.dumps({"stage": "quality", "at": "0123456789ab", "artifacts": {name: record}}))
    con.execute(f"copy (select range as id, range % 4 as month from range(400)) to '{place}/trips' (format parquet, partition_by (month))")
    for f in (place / "trips").rglob("*.parquet"): clients["s3"].upload_file(str(f), "rows", f"trips/{f.relative_to(place / 'trips')}")
    return "s3://rows/base"


def quoted(value): return "" if value is None else '"' + str(value).replace('"', '""') + '"'


def rows_by_trino(text, tables):
    "What Athena would answer: its text, read as Trino, executed by DuckDB over the files that Glue names."
    import sqlglot
    con = connect(threads=1)
    for name, files in tables.items(): con.execute(f"create view \"{name}\" as select * from read_parquet({files!r}, hive_partitioning = true)")
    done = con.execute(sqlglot.transpile(text, read="trino", write="duckdb")[0])
    return [d[0] for d in done.description], done.fetchall()


@pytest.fixture
def athena(cloud, tmp_path, monkeypatch):
    "Every query that moto is sent is executed before it says that it has begun."
    from moto.athena.models import AthenaBackend
    env, clients = cloud
    seen, start = [], AthenaBackend.start_query_execution

    def started(self, query, context, config, workgroup, execution_parameters):
        ident = start(self, query, context, config, workgroup, execution_parameters)
        tables = {}
        for t in clients["glue"].get_tables(DatabaseName=context["Database"])["TableList"]:
            where, files = t["StorageDescriptor"]["Location"].removeprefix("s3://rows/"), []
            for o in clients["s3"].list_objects_v2(Bucket="rows", Prefix=where).get("Contents", []):
                body = clients["s3"].get_object(Bucket="rows", Key=o["Key"])["Body"].read()
                keys = [k.removeprefix("s3://rows/") for k in body.decode().split()] if "Symlink" in t["StorageDescriptor"]["InputFormat"] else [o["Key"]]
                for k in keys:
                    files.append(str(tmp_path / k))
                    Path(files[-1]).parent.mkdir(parents=True, exist_ok=True)
                    clients["s3"].download_file("rows", k, files[-1])
            tables[t["Name"]] = files
        names, rows = rows_by_trino(query, tables)
        text = "\n".join([",".join(map(quoted, names)), *(",".join(map(quoted, r)) for r in rows)]) + "\n"
        place = self.executions[ident].config["OutputLocation"].removeprefix("s3://rows/")
        clients["s3"].put_object(Bucket="rows", Key=place, Body=text)
        seen.append((query, context, self.executions[ident].config))
        return ident
    monkeypatch.setattr(AthenaBackend, "start_query_execution", started)
    return seen


def test_a_store_in_a_bucket_is_read_piece_by_piece(asked, cloud, lake):
    env, clients = cloud
    found = answer(asked, QUESTION, "--store", lake, **env)
    assert found["rows"] == answer(asked, QUESTION.replace("from clean", "from shop.clean"))["rows"]
    assert found["meter"]["bytes"] < clients["s3"].head_object(Bucket="rows", Key=next(o["Key"] for o in clients["s3"].list_objects_v2(Bucket="rows", Prefix="base/shop")["Contents"] if o["Key"].endswith("clean.parquet")))["ContentLength"] + 70_000
    assert answer(asked, "select count(*) from 's3://rows/trips/' where month = 2", **env)["rows"] == [[100]]
    assert "NoSuchBucket" in fails(asked, "select 1 from 's3://nowhere/x/'", **env) and "did you mean" in fails(asked, "select 1 from claen", "--store", lake, **env)


def test_athena_gives_the_same_answer(asked, cloud, lake, athena):
    env, clients = cloud
    assert asked.slml("tables", "trips", "--register", "s3://rows/trips", "--store", lake, **env)[0] == 0
    for text in [QUESTION, "select c.\"car, name\" as car, count(distinct c.grp) as n, min(c.fare) as low, cast(sum(c.fare) as decimal(18,2)) as d, true as yes, case when min(c.grp) > 9 then 'x' else '' end as empty from clean c join names n on c.\"car, name\" = n.\"car, name\" group by c.\"car, name\" order by car",
                 "select month, count(*) as n from trips where month > 1 group by month order by month", "select a from nothing", "select grp, seen from clean where row_id in (0, 1, 2) order by row_id"]:
        mine, theirs = (answer(asked, text, "--store", lake, "--engine", e, **env) for e in ("duckdb", "athena"))
        assert mine["rows"] == theirs["rows"] and mine["columns"] == theirs["columns"], text
        assert theirs["meter"]["athena_usd"] == 10 / 2**20 * 5 and theirs["meter"]["query_id"]
    query, context, config = athena[0]
    assert context == {"Database": "slml", "Catalog": "AwsDataCatalog"} and '"shop_clean_' in query
    assert not clients["s3"].list_objects_v2(Bucket="rows", Prefix="base/catalog/answers/").get("Contents")  # nothing of the answers is left
    kept = answer(asked, "select a from nothing", "--store", lake, "--engine", "athena", "--output", "s3://rows/mine", **env)
    assert kept["rows"] == [] and clients["s3"].list_objects_v2(Bucket="rows", Prefix="mine/").get("Contents")  # those that were asked for stay
    assert "lies on this machine" in fails(asked, "select 1 as a from shop.clean", "--engine", "athena", **env)
    assert "register it" in fails(asked, "select 1 as a from 's3://rows/trips/'", "--engine", "athena", **env)


def test_glue_lists_what_is_in_the_bucket(asked, cloud, lake):
    env, clients = cloud
    code, out, err = asked.slml("tables", "--glue", "house", "--store", lake, **env)
    assert code == 0, err
    assert "house.shop_clean" in out and {"shop_clean", "shop_names"} <= {t["Name"] for t in clients["glue"].get_tables(DatabaseName="house")["TableList"]}
    assert dict((c["Name"], c["Type"]) for c in clients["glue"].get_table(DatabaseName="house", Name="shop_names")["Table"]["StorageDescriptor"]["Columns"])["both"] == "struct<a:bigint,b:string>"


def test_a_failed_query_says_why(asked, cloud, lake, athena, monkeypatch):
    from moto.athena import models
    env, _ = cloud

    def failed(self, exec_id):
        self.executions[exec_id].status = "FAILED"
        return self.executions[exec_id]
    monkeypatch.setattr(models.AthenaBackend, "get_query_execution", failed)
    assert "failed" in fails(asked, "select a from nothing", "--store", lake, "--engine", "athena", **env)


def test_jobs_by_submission(asked, cloud, lake, monkeypatch):
    "The script and the order lie in S3 while the job runs; the answer that the job leaves there comes back; then all is gone."
    from moto.emrserverless.models import EMRServerlessBackend
    env, clients = cloud
    application = clients["emr-serverless"].create_application(name="sql", releaseLabel="emr-7.9.0", type="SPARK")["applicationId"]
    begin, orders = EMRServerlessBackend.start_job_run, []

    def started(self, **how):
        driver = how["job_driver"]["sparkSubmit"]
        order = json.loads(clients["s3"].get_object(Bucket="rows", Key=driver["entryPointArguments"][0].removeprefix("s3://rows/"))["Body"].read())
        compile(clients["s3"].get_object(Bucket="rows", Key=driver["entryPoint"].removeprefix("s3://rows/"))["Body"].read(), "job.py", "exec")
        connect().execute(f"copy (select 'car 0' as car, 5::BIGINT as n) to '{asked.folder}/part.parquet' (format parquet)")
        home = order["out"].removeprefix("s3://rows/").removesuffix("answer")
        clients["s3"].upload_file(str(asked.folder / "part.parquet"), "rows", f"{home}answer/part-00000.parquet")
        clients["s3"].put_object(Bucket="rows", Key=f"{home}told/part-00000.txt", Body=json.dumps({"seconds": 1, "bytes": 12}))
        orders.append(order)
        return begin(self, **how)
    monkeypatch.setattr(EMRServerlessBackend, "start_job_run", started)
    how = ["select \"car, name\" as car, count(*) as n from clean group by \"car, name\"", "--store", lake, "--engine", "spark", "--master", f"emr-serverless:{application}"]
    found = answer(asked, *how, "--role", "arn:aws:iam::123456789012:role/job", **env)
    assert found["rows"] == [["car 0", 5]] and found["meter"]["bytes"] == 12 and orders[0]["columns"] == ["car", "n"]
    assert all(f.startswith("s3://rows/base/shop/") for t in orders[0]["tables"].values() for f in t["files"])
    assert not clients["s3"].list_objects_v2(Bucket="rows", Prefix="base/catalog/jobs/").get("Contents")
    assert "--role" in fails(asked, *how, **env)
    assert "ResourceNotFoundException" in fails(asked, *how[:-1], "emr-serverless:00none", "--role", "arn:aws:iam::123456789012:role/job", **env)
    assert not clients["s3"].list_objects_v2(Bucket="rows", Prefix="base/catalog/jobs/").get("Contents")
    assert "--output s3://" in fails(asked, "select 1 as a from shop.clean", "--engine", "spark", "--master", "glue:sql", **env)


def test_spark_that_is_not_there_is_said(asked):
    assert "Spark needs Java" in fails(asked, "select row_id from shop.clean", "--engine", "spark", JAVA_HOME="", PATH="/nowhere")
    code = "import sys; sys.modules['pyspark'] = None; sys.modules['pyspark.sql'] = None; from slml_nb.cli import main; sys.exit(main(['sql', 'select row_id from shop.clean', '--engine', 'spark']))"
    r = subprocess.run([sys.executable, "-c", code], cwd=asked.folder, env=asked.environment(), capture_output=True, text=True)
    assert r.returncode == 2 and 'pip install "slml_nb[spark]"' in r.stderr, r.stderr


IN_ONE_SESSION = """
import json, sys
from slml_nb.query import query, spark_session
with spark_session() as spark:
    found = [query(text, "spark") for text in json.loads(sys.argv[1])]
    assert spark.sql("select 1").count() == 1  # a session that was there is left alone
print(json.dumps([{"rows": a.rows(), "columns": a.columns, "read": a.meter["bytes"]} for a in found], default=str))
"""


@pytest.mark.slow
def test_spark_gives_the_same_answer(asked):
    "The script that clusters are sent, on a Spark of this machine; nothing runs afterwards."
    pytest.importorskip("pyspark")
    assert asked.slml("tables", "months", "--register", "trips")[0] == 0
    texts = [QUESTION.replace("from clean", "from shop.clean"), "select month, count(*) as n from months where month > 1 group by month order by month", "select a from shop.nothing", "select grp, seen, 'x' as \"a b (c)\" from shop.clean where row_id in (0, 1) order by row_id"]
    r = subprocess.run([sys.executable, "-c", IN_ONE_SESSION, json.dumps(texts)], cwd=asked.folder, env=asked.environment(), capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    for text, theirs in zip(texts, json.loads(r.stdout), strict=True):
        mine = answer(asked, text)
        assert mine["rows"] == theirs["rows"] and mine["columns"] == theirs["columns"] and theirs["read"] > 0 or not mine["rows"], text
    text = texts[-1]
    code, out, err = asked.slml("sql", text, "--engine", "spark")
    assert code == 0 and err == "" and "on spark" in out
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"slml_spark_" in read(p)]


def read(path):
    with contextlib.suppress(OSError): return path.read_bytes()
    return b""


@pytest.mark.slow
def test_the_script_runs_by_itself(asked, tmp_path):
    "As spark-submit runs it: an order, an answer, and what it took."
    pytest.importorskip("pyspark")
    from slml_nb.query import spark_script
    file = next(asked.folder.glob("runs/shop/*/quality/out/clean.parquet"))
    (tmp_path / "job.py").write_text(spark_script())
    (tmp_path / "order.json").write_text(json.dumps({"sql": "SELECT count(*) AS `n` FROM `t`", "conf": {"spark.sql.ansi.enabled": "true"}, "columns": ["n"], "tables": {"t": {"files": [f"file://{file}"], "base": ""}}, "out": f"file://{tmp_path}/answer"}))
    r = subprocess.run([sys.executable, "job.py", "--slml_order", f"file://{tmp_path}/order.json"], cwd=tmp_path, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    assert connect().execute(f"select n from read_parquet('{tmp_path}/answer/*.parquet')").fetchall() == [(2000,)]
    assert json.loads(next((tmp_path / "told").glob("part-*")).read_text())["bytes"] > 0
