"""Launch files: what they start, with stubs for the schedulers, and that they fit together."""

import json
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys

import pytest
import yaml

from configs import common
from gigatok_jax.run import launchers, signals

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

# A task of a job: it tells what it got, and ends as the test wants.
TASK = f"""#!{sys.executable} -I
import json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ)]))
sys.exit(int(os.environ["STATUS"]))
"""
# Two nodes of `TASKS` tasks; like the real one it ends with the highest status.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
worst=0 total=$((2 * TASKS))
for rank in $(seq 0 $((total - 1))); do
  SLURM_STEP_NUM_TASKS=$total SLURM_STEP_NODELIST='n[1-2]' SLURM_PROCID=$rank \\
    SLURM_NODEID=$((rank / TASKS)) SLURM_LOCALID=$((rank % TASKS)) \\
    SLURM_STEP_TASKS_PER_NODE="$TASKS(x2)" "$@" || status=$?
  ((${status:-0} > worst)) && worst=$status
done
exit "$worst"
"""
SCONTROL = '#!/usr/bin/env bash\necho "scontrol $*"\n'
# The command runs on one host, which is this one.
GCLOUD = """#!/usr/bin/env bash
echo "gcloud ${*%%--command=*}"
for last; do :; done
exec bash -c "${last#--command=}"
"""


@pytest.fixture
def stubs(tmp_path):
    """A folder of programs that come before the real ones."""
    made = {"python": TASK, "srun": SRUN, "scontrol": SCONTROL, "gcloud": GCLOUD}
    for name, text in made.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run(stubs, *command, **environment) -> subprocess.CompletedProcess:
    path = {"PATH": f"{stubs}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu", "HOME": str(stubs)}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("XLA", "SLURM"))}
    return subprocess.run(
        list(map(str, command)),
        env=clean | path | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def slurm(stubs, *arguments, **environment) -> subprocess.CompletedProcess:
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "5", "SLURM_NTASKS": "4"}
    return run(stubs, LAUNCH / "slurm.sh", *arguments, **(job | {"TASKS": "1"} | environment))


def test_slurm_starts_a_task_per_gpu(stubs):
    done = slurm(stubs, "--config=a b", TASKS="2", STATUS="0", CUDA_VISIBLE_DEVICES="0,1")
    assert done.returncode == 0, done.stderr
    tasks = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(tasks) == 4
    for i, (arguments, env) in enumerate(tasks):
        place = launchers.find(common.cluster_config(), env)
        assert place == launchers.Place("Slurm", 4, i, "n1:61445", (i % 2,))
        assert arguments == ["main.py", "--config=a b"]
        assert (env["XLA_PYTHON_CLIENT_MEM_FRACTION"], env["NCCL_NVLS_ENABLE"]) == ("0.92", "0")


@pytest.mark.parametrize(
    "status, restarts, again",
    [
        (128 + signal.SIGTERM, 0, True),
        (signals.LOST, 0, True),
        (134, 3, True),
        (1, 0, False),
        (143, 50, False),
    ],
)
def test_slurm_takes_back_what_may_go_on(stubs, status, restarts, again):
    done = slurm(stubs, STATUS=str(status), SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == status
    assert ("scontrol requeue 5" in done.stdout) == again


def test_slurm_one_task_per_node_takes_all_gpus(stubs):
    done = slurm(stubs, STATUS="0", CUDA_VISIBLE_DEVICES="0,1", HARDWARE="cpu")
    for i, (_, env) in enumerate(map(json.loads, done.stdout.splitlines())):
        place = launchers.find(common.cluster_config(), env)
        assert place == launchers.Place("Slurm", 2, i, "n1:61445", None)
        assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in env


def test_tpu_pod_starts_again_after_a_loss_and_keeps_quotes(stubs):
    counter = stubs / "count"
    (stubs / "python3").write_text(
        f'#!/usr/bin/env bash\nprintf "<%s>" "$@"; echo >>{counter}\n'
        f'[[ $(wc -l <{counter}) -lt 3 ]] && exit {signals.LOST}; exit "$STATUS"\n'
    )
    (stubs / "python3").chmod(0o755)
    arguments = ("pod", "us-east5-a", "--config=configs/ss.py", "--config.data.folder=my 'images'")
    done = run(stubs, LAUNCH / "tpu_pod.sh", *arguments, STATUS="143", FOLDER=str(ROOT))
    assert done.returncode == 143, done.stderr
    assert "compute tpus tpu-vm ssh pod --zone=us-east5-a --worker=all" in done.stdout
    line = "<main.py><--config=configs/ss.py><--config.data.folder=my 'images'>"
    assert done.stdout.count(line) == 3


def test_tpu_pod_stops_what_it_started(stubs):
    with subprocess.Popen(["sleep", "60"]) as started:
        (stubs / ".gigatok_jax.pid").write_text(f"{started.pid}\n")
        done = run(stubs, LAUNCH / "tpu_pod.sh", "pod", "zone", "--stop")
        assert done.returncode == 0, done.stderr
        assert started.wait() == -signal.SIGTERM


def test_tpu_pod_needs_its_arguments(stubs):
    done = run(stubs, LAUNCH / "tpu_pod.sh", "pod")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script):
    beside = pathlib.Path(sys.executable).parent  # where pip puts it
    program = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
    if not program:
        pytest.skip("no shellcheck")
    done = subprocess.run(
        [program, "-x", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_what_is_started_by_name_may_be():
    for name in ("slurm.sh", "tpu_pod.sh"):
        assert (LAUNCH / name).stat().st_mode & stat.S_IXUSR


def test_what_is_set_is_kept(stubs):
    script = "source launch/xla_flags.sh gpu && echo $XLA_PYTHON_CLIENT_MEM_FRACTION $XLA_FLAGS"
    for fraction, expected in {"0.5": "0.5", "": "0.92"}.items():
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": fraction, "XLA_FLAGS": "--mine"}
        done = run(stubs, "bash", "-euc", script, **environment)
        assert done.stdout == f"{expected} --mine\n"


def test_hardware_is_known_by_name(stubs):
    assert run(stubs, "bash", "-euc", "source launch/xla_flags.sh abacus").returncode == 1
    for kind in ("tpu", "cpu"):
        assert run(stubs, "bash", "-euc", f"source launch/xla_flags.sh {kind}").returncode == 0


# JobSets. The files were also checked against the published schemas, see launch/README.md; here
# stand the facts that no schema knows.


def documents(kind) -> tuple[dict, dict]:
    """JobSet and NetworkPolicy."""
    return tuple(yaml.safe_load_all((LAUNCH / f"gke_{kind}.yaml").read_text()))


def only(values):
    (value,) = values
    return value


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_parts_of_a_jobset_fit_together(kind):
    jobset, policy = documents(kind)
    name, replicated = jobset["metadata"]["name"], only(jobset["spec"]["replicatedJobs"])
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    container = only(pod["containers"])
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    codes = only(job["podFailurePolicy"]["rules"])["onExitCodes"]
    assert codes["values"] == [1] and codes["containerName"] == container["name"]
    rule = only(jobset["spec"]["failurePolicy"]["rules"])
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    selector = {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": name}}
    assert policy["spec"]["podSelector"] == selector
    assert only(only(policy["spec"]["ingress"])["from"])["podSelector"] == selector
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    config = only(a for a in container["args"] if a.startswith("--config="))
    assert (ROOT / config.removeprefix("--config=")).exists()
    assert f"xla_flags.sh {kind}" in container["command"][2]


def test_pods_of_the_gpu_jobset_find_each_other():
    jobset, _ = documents("gpu")
    name, replicated = jobset["metadata"]["name"], only(jobset["spec"]["replicatedJobs"])
    job = replicated["template"]["spec"]
    container = only(job["template"]["spec"]["containers"])
    env = {one["name"]: one["value"] for one in container["env"]} | {"JOB_COMPLETION_INDEX": "3"}
    flag = only(a for a in container["args"] if "cluster.processes" in a)
    flags = common.cluster_config()
    flags.processes = int(flag.split("=")[1])
    place = launchers.find(flags, env)
    assert (place.processes, place.process) == (job["parallelism"], 3)
    # Pods are called <set>-<job>-<job index>-<pod index>.<set>.
    assert place.coordinator == f"{name}-{replicated['name']}-0-0.{name}:{launchers.PORT}"


def test_the_tpu_jobset_has_a_pod_for_each_host():
    jobset, _ = documents("tpu")
    job = only(jobset["spec"]["replicatedJobs"])["template"]["spec"]
    pod = job["template"]["spec"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = only(pod["containers"])["resources"]["limits"]["google.com/tpu"]
    x, y, z = map(int, sides)
    assert x * y * z == job["parallelism"] * chips


def test_the_image_holds_what_it_runs():
    lines = (LAUNCH / "Dockerfile").read_text()
    words = re.findall(r"^([A-Z]+) ", lines, re.MULTILINE)
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT"}
    assert words[0] == "FROM" and set(words) <= known
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().split()
    assert not {"configs", "gigatok_jax", "launch", "main.py", "requirements.txt"} & set(ignored)
