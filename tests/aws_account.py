"""What can only be seen with an account of AWS's: run it with `make test-aws YES=--yes`, or `python tests/aws_account.py --yes`.

It costs less than a dollar (about ten cents) and takes about half an hour. It makes a bucket, two roles and one or two small jobs, all with names that begin with slml-test-, and removes them
at the end, whatever happens. Without --yes it says this and does nothing. It needs the right to make buckets and roles, which is more than a run needs.

Here, without an account, tests/test_aws_account.py runs it against a server that plays one; what that server does not enforce is said."""
import argparse, contextlib, json, os, re, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STAGE, BUDGET = "baseline", 0.50  # US dollars; the run stops itself above it
PLAYED = bool(os.environ.get("AWS_ENDPOINT_URL"))  # not AWS, but a server of a test


class Report:
    "What was seen: a line each, and whether all of it was as it should be."
    def __init__(self): self.lines, self.bad = [], 0

    def __call__(self, what, ok, found=""):
        "One finding; ok None: it could not be seen."
        self.bad += ok is False
        line = f"{'ok' if ok else '--' if ok is None else 'NO'}  {what}{': ' + str(found) if found != '' else ''}"
        self.lines.append(line)
        print(line, flush=True)
        return ok

    @contextlib.contextmanager
    def step(self, what):
        "A step that may fail without ending the others."
        try: yield
        except Exception as e: self(what, False, f"{type(e).__name__}: {e}")


def refused(call, codes=("AccessDenied", "403", "AccessDeniedException")):
    "The code with which a call was refused; '' when it was not."
    import botocore.exceptions
    try: call()
    except botocore.exceptions.ClientError as e: return e.response["Error"]["Code"]
    return ""


def slml(place, *argv):
    "Type a command in the project: exit code, standard output, standard error."
    code = "import sys; from slml_nb.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT), "SLML_TRACKING": "off"}, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def make_role(iam, name, trust, policy, later):
    "A role with one policy, removed at the end."
    iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(trust), Tags=[{"Key": "slml-project", "Value": "test"}])
    later.callback(iam.delete_role, RoleName=name)
    iam.put_role_policy(RoleName=name, PolicyName="slml", PolicyDocument=json.dumps(policy))
    later.callback(iam.delete_role_policy, RoleName=name, PolicyName="slml")


def empty_bucket(s3, bucket):
    "Remove a bucket with everything in it."
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        if found := page.get("Contents"): s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": o["Key"]} for o in found], "Quiet": True})
    s3.delete_bucket(Bucket=bucket)


def prepare(args, place, report, later):
    "Bucket, roles and parameter set; the account."
    from slml_nb.aws import account_of, caller_of, client_of, make_bucket, policy_for, trust_policy
    from slml_nb.core import ParamSet
    mark = os.urandom(3).hex()
    project, number = f"test-{mark}", caller_of(account_of(ParamSet("", "x", {}, {}, sagemaker={"region": args.region})))["Account"]
    bucket, role = f"slml-test-{number}-{mark}", f"arn:aws:iam::{number}:role/slml-test-{mark}"
    head = {"role": role, "region": args.region, "budget_usd": BUDGET, "tags": {"made-by": "slml-test"}, **({"images": {"cpu": args.image}} if args.image else {})}
    params = ParamSet("", project, {}, {}, store=f"s3://{bucket}/slml", sagemaker=head)
    account, iam = account_of(params), client_of("iam")
    report("account", True, f"{number} in {args.region}, bucket {bucket}")
    later.callback(empty_bucket, account.client("s3"), bucket)
    report("bucket made private and encrypted", len(make_bucket(account)) >= 4 and make_bucket(account) == [])
    if PLAYED: account.client("s3").delete_bucket_policy(Bucket=bucket)  # this server does not read its condition, and would refuse everything
    make_role(iam, role.split("/")[-1], trust_policy(number), policy_for(params, which="job"), later)
    other = ParamSet("", f"{project}-2", {}, {}, store=params.store, sagemaker=head)
    mine = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"AWS": f"arn:aws:iam::{number}:root"}, "Action": "sts:AssumeRole"}]}
    make_role(iam, f"slml-test-{mark}-other", mine, policy_for(other, which="job"), later)
    for name in ("sample.yaml", "flights.yaml"): (place / "params" / name).write_bytes((ROOT / "params" / name).read_bytes())
    (place / "params/aws.yaml").write_text(f"extends: sample.yaml\nproject: {project}\nstore: {params.store}\nsagemaker: {json.dumps(head)}\n{STAGE}: {{on: {args.instance}, max_hours: 0.5}}\n")
    time.sleep(0 if PLAYED else 20)  # a new role is known everywhere after some seconds
    return account, number, mark


def isolated(account, number, mark, report):
    "What the role of another project can see of this one: nothing; and of itself: what is not there."
    import boto3
    keys = account.client("sts").assume_role(RoleArn=f"arn:aws:iam::{number}:role/slml-test-{mark}-other", RoleSessionName="slml-test")["Credentials"]
    s3 = boto3.session.Session(keys["AccessKeyId"], keys["SecretAccessKey"], keys["SessionToken"], region_name=account.region).client("s3")
    there = account.client("s3").list_objects_v2(Bucket=account.bucket, Prefix=f"slml/{account.project}/")["Contents"][0]["Key"]
    for what, call in (("reads an artifact", lambda: s3.get_object(Bucket=account.bucket, Key=there)), ("lists its names", lambda: s3.list_objects_v2(Bucket=account.bucket, Prefix=f"slml/{account.project}/")), ("lists the bucket", lambda: s3.list_objects_v2(Bucket=account.bucket))):
        code = refused(call)
        report(f"the role of another project {what}", None if PLAYED else code == "AccessDenied", code or ("not refused: this server does not enforce roles" if PLAYED else "it was not refused"))
    code = refused(lambda: s3.head_object(Bucket=account.bucket, Key=f"slml/{account.project}-2/none"))
    report("a missing object of its own is 404 and not 403, with names permitted below a prefix", None if PLAYED else code in ("404", "NoSuchKey"), code)


def moved(args, place, report):
    "A stage as a job, the bill, and the same stage here, reused."
    code, out, err = slml(place, "run", "params/aws.yaml", "--to", STAGE, "--json")
    record = json.loads(out) if out.strip().startswith("{") else {}
    stage = record.get("stages", {}).get(STAGE, {})
    report(f"{STAGE} ran on {args.instance}", code == 0 and stage.get("state") == "made", stage.get("job") or (err or out)[-600:])
    bill = stage.get("bill") or {}
    report("its bill", None if PLAYED or not bill else bill.get("usd") is not None and bill["usd"] < BUDGET, f"${bill['usd']:.4f} for {bill['seconds']} s" if bill.get("usd") is not None else "this server bills nothing" if PLAYED else "the record has none")
    code, out, _ = slml(place, "run", "params/aws.yaml", "--to", STAGE, "-p", f"{STAGE}.on=here", "--json")
    report("the same stage here is reused, not made", code == 0 and json.loads(out)["stages"][STAGE]["state"] == "reused")
    return stage.get("job", "")


def endpoint(args, account, mark, report, later):
    "A serverless endpoint of a package's image: it costs what it answers."
    if not args.image_of_package: return report("serverless endpoint", None, "left out: --image-of-package NUMBER.dkr.ecr.….amazonaws.com/NAME:TAG (slml deploy --to sagemaker says how to push one)")
    client, name, role = account.client("sagemaker"), f"slml-test-{mark}", account.role
    client.create_model(ModelName=name, PrimaryContainer={"Image": args.image_of_package}, ExecutionRoleArn=role)
    later.callback(client.delete_model, ModelName=name)
    client.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[{"VariantName": "all", "ModelName": name, "ServerlessConfig": {"MemorySizeInMB": 2048, "MaxConcurrency": 1}}])
    later.callback(client.delete_endpoint_config, EndpointConfigName=name)
    client.create_endpoint(EndpointName=name, EndpointConfigName=name)
    later.callback(client.delete_endpoint, EndpointName=name)
    client.get_waiter("endpoint_in_service").wait(EndpointName=name, WaiterConfig={"Delay": 1 if PLAYED else 15, "MaxAttempts": 80})
    sample = json.loads((ROOT / "slml_nb/sample/package/out/package/sample.json").read_text())
    said = account.client("sagemaker-runtime").invoke_endpoint(EndpointName=name, ContentType="application/json", Body=json.dumps(sample["request"]))["Body"].read()
    report("serverless endpoint answers", None if PLAYED else "prediction" in json.loads(said), said[:200])


def looked_at(place, report):
    "The doctor with a real account: everything known, nothing idle that this test has made."
    code, out, err = slml(place, "doctor", "--on", "sagemaker", "params/aws.yaml", "--json")
    if not out.strip().startswith("{"): return report("doctor", False, err[-300:])
    found = json.loads(out)
    for c in found["checks"]: report(f"doctor: {c['name']}", None if PLAYED and (c["state"] == "unknown" or c["name"] == "bucket") else c["state"] != "missing" and not (c["state"] == "unknown" and c["name"] not in ("image", "budget")), c["found"])
    report("nothing of this test lies idle", not [i for i in found["idle"] if "slml-test" in i["name"]])


def forget_logs(account, job):
    "Remove the log of a job."
    if not job: return
    logs, group = account.client("logs"), "/aws/sagemaker/TrainingJobs"
    for s in logs.describe_log_streams(logGroupName=group, logStreamNamePrefix=job)["logStreams"]: logs.delete_log_stream(logGroupName=group, logStreamName=s["logStreamName"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yes", action="store_true", help="do it, and pay for it")
    parser.add_argument("--region", default=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1")
    parser.add_argument("--instance", default="ml.m5.large", help="for the job (default: ml.m5.large, $0.115 an hour in us-east-1)")
    parser.add_argument("--image", default="", help="an image for the job (default: AWS's own)")
    parser.add_argument("--image-of-package", default="", help="an image in ECR of a package, for a serverless endpoint (default: no endpoint)")
    args = parser.parse_args()
    if not args.yes: print(__doc__), sys.exit("Nothing was done: --yes does it.")
    report, job = Report(), ""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as later:
        place = Path(folder)
        (place / "params").mkdir()
        try:
            account, number, mark = prepare(args, place, report, later)
            with report.step("doctor"): looked_at(place, report)
            with report.step("job"): job = moved(args, place, report)
            with report.step("isolation"): isolated(account, number, mark, report)
            with report.step("endpoint"): endpoint(args, account, mark, report, later)
            with report.step("logs"): forget_logs(account, job)
        finally:
            print("cleaning up", flush=True)
            later.close()
    print(f"\n{sum(l.startswith('ok') for l in report.lines)} as they should be, {report.bad} not, {sum(l.startswith('--') for l in report.lines)} not seen")
    sys.exit(1 if report.bad else 0)


if __name__ == "__main__": main()
