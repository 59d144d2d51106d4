"""The pod scripts against a gcloud that only records its calls; nothing here has met a real one."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
NAMES = sorted(p.name for p in SCRIPTS.glob("*.sh") if p.name != "common.sh")
FAKE = """#!{python}
import os, sys
arguments = sys.argv[1:]
with open(os.environ["CALLS"], "a") as f:
    f.write(repr(arguments) + "\\n")
if "describe" in arguments:
    state = os.environ.get("STATE", "READY")
    print(state) if state != "ABSENT" else sys.exit("not found")
if any("nohup" in a for a in arguments):
    sys.exit(int(os.environ.get("LAUNCHED", "0")))
if arguments[:2] == ["storage", "ls"]:
    sys.exit(0 if os.path.exists(os.environ["SUMMARY"]) else 1)
if "rsync" in arguments:
    open(os.environ["SUMMARY"], "w")
"""


@pytest.fixture
def call(tmp_path):
    """Runs a script: (exit status, output, the calls of gcloud)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    gcloud = folder / "gcloud"
    gcloud.write_text(FAKE.format(python=sys.executable))
    gcloud.chmod(gcloud.stat().st_mode | stat.S_IEXEC)
    calls = tmp_path / "calls"

    def run(script, *arguments, **settings):
        calls.write_text("")
        defaults = {"PROJECT": "proj", "ZONE": "here", "TPU_NAME": "pod", "BUCKET": "gs://b", "RUN": "r"}
        env = os.environ | defaults | {"CALLS": str(calls), "SUMMARY": str(tmp_path / "summary")} | settings
        env["PATH"] = f"{folder}:{env['PATH']}"
        done = subprocess.run(
            [SCRIPTS / f"{script}.sh", *arguments],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return (
            done.returncode,
            done.stdout + done.stderr,
            [eval(line) for line in calls.read_text().splitlines()],
        )

    return run


WHERE = ["--project=proj", "--zone=here"]


def test_create(call):
    code, _, calls = call("create", ACCELERATOR="v4-64", RUNTIME="base")
    assert code == 0
    assert calls == [
        ["compute", "tpus", "tpu-vm", "create", "pod", *WHERE, "--version=base", "--accelerator-type=v4-64"]
    ]
    assert "--spot" in call("create", SPOT="yes")[2][0]


def test_create_in_a_queue_waits_until_it_is_ready(call):
    code, _, calls = call("create", QUEUED="yes", POLL_SECONDS="0")
    assert code == 0
    assert calls[0][2:5] == ["queued-resources", "create", "pod"] and "--node-id=pod" in calls[0]
    assert "describe" in calls[1]


def test_setup_sends_what_git_tracks_and_installs_on_all_workers(call):
    code, _, (copy, install) = call("setup")
    assert code == 0
    assert copy[2:4] == ["tpu-vm", "scp"] and copy[5] == "pod:ovseg_jax.tar.gz" and "--worker=all" in copy
    assert (
        "--worker=all" in install
        and 'pip install --quiet --python .venv -e ".[tpu,pretrained]"' in install[-1]
    )


def test_launch_gives_all_workers_the_same_command(call):
    config = "--config=configs/openseg.py:data=coco,data_dir=gs://b/my data"
    code, _, (ssh,) = call("launch", config)
    assert code == 0 and "--worker=all" in ssh
    assert (
        r"--distributed --workdir=gs://b/r --config=configs/openseg.py:data=coco\,data_dir=gs://b/my\ data"
        in ssh[-1]
    )


def test_watch_stop_delete(call):
    assert "--worker=3" in call("watch", "3")[2][0]
    assert "pkill -TERM" in call("stop")[2][0][-1]
    assert call("delete")[2][0][2:5] == ["tpu-vm", "delete", "pod"]
    assert call("delete", QUEUED="yes")[2][0][2:5] == ["queued-resources", "delete", "pod"]


@pytest.mark.parametrize(
    ("state", "verbs"),
    [
        ("READY", ["describe", "ssh"]),
        ("ABSENT", ["describe", "create", "scp", "ssh", "ssh"]),
        ("PREEMPTED", ["describe", "delete", "create", "scp", "ssh", "ssh"]),
    ],
)
def test_resume_makes_what_is_missing(call, state, verbs):
    code, out, calls = call("resume", "--config=a.py", STATE=state)
    assert code == 0 and f"pod is {state}" in out
    assert [c[3] for c in calls] == verbs
    assert "--config=a.py" in calls[-1][-1]


def test_resume_leaves_a_run_that_is_under_way(call):
    assert call("resume", "--config=a.py", LAUNCHED="3")[0] == 0
    assert call("resume", "--config=a.py", LAUNCHED="1")[0] != 0


def test_resume_watches_until_there_is_a_summary(call, tmp_path):
    (tmp_path / "summary").touch()
    code, out, calls = call("resume", "--watch", "--config=a.py")
    assert code == 0 and "finished: gs://b/r/summary.json" in out and len(calls) == 1


def test_results_leave_checkpoints_out_unless_asked(call, tmp_path):
    code, _, (sync,) = call("results", "here")
    assert code == 0 and (tmp_path / "here").is_dir()
    assert sync[:4] == ["storage", "rsync", "gs://b/r", "here"] and "--exclude=^checkpoints/" in sync
    assert not any("exclude" in a for a in call("results", "--all")[2][0])


@pytest.mark.parametrize("name", NAMES)
def test_dry_runs_print_and_do_nothing(call, name):
    code, out, calls = call(name.removesuffix(".sh"), "--dry-run", "--config=a.py", STATE="ABSENT")
    assert code == 0
    assert all("describe" in c for c in calls)  # Only looked.
    assert "gcloud" in out


@pytest.mark.parametrize("name", NAMES)
def test_help_and_what_is_missing(call, name):
    code, out, _ = call(name.removesuffix(".sh"), "--help")
    assert code == 0 and "--dry-run" in out
    code, out, calls = call(name.removesuffix(".sh"), "--config=a.py", PROJECT="")
    assert code == 2 and "PROJECT is not set" in out and not calls


def test_launch_without_a_bucket_or_a_command(call):
    assert "BUCKET is not set" in call("launch", "--config=a.py", BUCKET="")[1]
    assert "say what to run" in call("launch")[1]
    assert "say what to run" in call("resume", "--watch")[1]


def test_shellcheck_is_content():
    shellcheck = shutil.which("shellcheck") or Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [shellcheck, "-x", "-P", "SCRIPTDIR", *SCRIPTS.glob("*.sh")],
        cwd=SCRIPTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
