"""The test that needs an account, against a server that plays one: that it refuses without --yes, goes through, and leaves nothing behind."""
import os, subprocess, sys
from pathlib import Path

import pytest
from peer_sagemaker import peer, possible

SCRIPT = Path(__file__).parent / "aws_account.py"


def test_it_refuses_without_yes_and_says_what_it_costs():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env={**os.environ, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    assert done.returncode != 0 and "less than a dollar" in done.stdout and "Nothing was done" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(bool(possible()), reason=possible() or "")
def test_it_goes_through_and_leaves_nothing(tmp_path):
    with peer(grace=2) as p:
        env = {**os.environ, **p.env, "SLML_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", "AWS_MAX_ATTEMPTS": "1"}
        buckets = lambda: {b["Name"] for b in p.client("s3").list_buckets()["Buckets"]}  # moto keeps those of tests before this one
        before = buckets()
        done = subprocess.run([sys.executable, SCRIPT, "--yes"], capture_output=True, text=True, env=env, timeout=900)
        said = done.stdout + done.stderr
        assert "ok  baseline ran on ml.m5.large" in said and "ok  the same stage here is reused" in said and "\nNO" not in said, said
        assert done.returncode == 0 and buckets() == before, said
        assert [r["RoleName"] for r in p.client("iam").list_roles()["Roles"] if "slml-test" in r["RoleName"]] == []
