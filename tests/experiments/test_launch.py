"""The launch scripts are valid shell, and they and their pages use configs, variants and fields that exist."""

import configparser
import os
import pathlib
import re
import shutil
import signal
import subprocess

import pytest

from experiments import program
from varedit_jax.config import RunConfig
from varedit_jax.config.annotations import field_types
from varedit_jax.errors import DEFECT, MISTAKE, RESTART

ROOT = pathlib.Path(__file__).parents[2]
DIRECTORY = ROOT / "experiments" / "launch"
SCRIPTS = ("tpu_vm.sh", "gke_xpk.sh", "slurm.sbatch")
UNIT = "varedit@.service"
PAGES = ("tpu_vm.md", "gke.md", "slurm.md")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.subprocess
def test_the_shell_can_read_it(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(DIRECTORY / name)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", [*SCRIPTS, *PAGES])
def test_configs_variants_and_fields_exist(name: str) -> None:
    text = (DIRECTORY / name).read_text()
    configs = set(re.findall(r"experiments/configs/\w+\.py(?::\w+)?", text))
    assert configs
    for config in configs:
        assert isinstance(program.load_config(str(ROOT / config), RunConfig), RunConfig)
    fields = set(re.findall(r"--config\.([\w.]*\w)=", text))
    assert {"init_from", "cadence.save_minutes"} <= fields
    assert fields <= set(field_types(RunConfig))


@pytest.mark.parametrize(("script", "page"), list(zip(SCRIPTS, PAGES, strict=True)))
def test_a_page_shows_the_command_of_its_script(script: str, page: str) -> None:
    def flags(name: str) -> set[str]:
        command = (DIRECTORY / name).read_text().partition("experiments.train")[2]
        return set(re.findall(r"--(?:config\.)?[\w.]*\w=", command.partition("\n\n")[0]))

    assert flags(page) <= flags(script) and len(flags(page)) == 8


def test_only_what_a_restart_helps_is_restarted() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DIRECTORY / UNIT)
    codes = [
        int(word) if word.isdecimal() else 128 + signal.Signals[word]
        for word in unit["Service"]["RestartForceExitStatus"].split()
    ]
    assert tuple(codes) == RESTART and unit["Service"]["Restart"] == "no"
    (case,) = re.findall(r"\n([\d |]+)\) if", (DIRECTORY / "slurm.sbatch").read_text())
    assert tuple(map(int, case.split("|"))) == RESTART
    (more,) = re.findall(r"--restart-on-exit-codes=(\S+)", (DIRECTORY / "gke_xpk.sh").read_text())
    assert {int(more), *range(127, 256)} >= set(RESTART) and not {MISTAKE, DEFECT} & {int(more), *range(127, 256)}


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.subprocess
def test_systemd_can_read_the_unit(tmp_path: pathlib.Path) -> None:
    (tmp_path / UNIT).write_text((DIRECTORY / UNIT).read_text())
    command = ["systemd-analyze", "verify", str(tmp_path / UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.subprocess
def test_slurm_requeues_a_job(tmp_path: pathlib.Path) -> None:
    """After codes that a restart helps, unless one process has another, or it ends quickly for the third time in a row,
    or has been restarted often enough."""
    fakes(tmp_path, srun='echo trained; echo "srun: error: node3: $SAID" >&2; exit $CODE', scontrol='echo "$@"')

    def job(code: int, restarts: int, seconds: int = 0, said: str = "task 0: Aborted") -> bool:
        """Returns True if a job whose processes end with `code` after some seconds runs again."""
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "DISK": str(tmp_path),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "CODE": str(code),
            "SAID": said,
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(restarts),
            "SECONDS": str(seconds),
        }
        command = ["bash", str(DIRECTORY / "slurm.sbatch")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code and done.stdout in ("trained\n", "trained\nrequeue 7\n"), done
        assert f"srun: error: node3: {said}\n" in done.stderr
        return "requeue" in done.stdout

    assert [job(code, 0) for code in (0, 1, 70, 137, *RESTART)] == [False] * 4 + [True] * 3
    assert [job(134, 0, said=f"tasks 0-3: Exited with exit code {n}") for n in (1, 70, 75)] == [False, False, True]
    assert [job(75, 1), job(75, 2, seconds=3600), job(75, 3), job(75, 4), job(75, 5)] == [True] * 4 + [False]
    assert [job(143, 99, seconds=3600), job(143, 100, seconds=3600)] == [True, False]
    assert job(75, 0)  # a new submission


class Pod:
    """A TPU machine of one host, whose `gcloud`, `systemctl` and others write down how they are called."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.bin, self.host, self.log = directory / "bin", directory / "host", directory / "calls"
        self.bin.mkdir()
        self.host.mkdir()
        (directory / "state").write_text("READY")
        self.unit("inactive", began=0)
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(directory),
            "NAME": "pod",
            "ZONE": "z",
            "BUCKET": "gs://b",
            "POLL": "0.1",
        }
        fakes(
            self.bin,
            gcloud=f"""
echo "gcloud $*" | head -1 >>{self.log}
case "$*" in
*" describe "*) cat {directory}/state ;;
*"queued-resources create"*) echo -n READY >{directory}/state ;;
*"queued-resources delete"*) echo -n >{directory}/state ;;
*" scp "*) mkdir {self.host}/varedit_jax ; cp -r {ROOT}/experiments {self.host}/varedit_jax ;;
*" ssh "*) cd {self.host}; for last; do :; done; HOME={self.host} bash -c "${{last#--command=}}" ;;
esac""",
            sudo='[[ $1 == cp || $1 == systemctl || $1 == add-apt-repository || $1 == apt-get ]] && "$@"',
            systemctl=f"""
if [[ $1 == show ]]; then cat {directory}/unit; else echo "systemctl $*" >>{self.log}; fi
if [[ $1 == enable ]]; then sed -i s/inactive/active/ {directory}/unit; fi""",
            cp=f'if [[ ${{@: -1}} == /etc/* ]]; then echo "cp $*" >>{self.log}; else exec /bin/cp "$@"; fi',
            hostname="echo t1v-n-w-0",
            id="echo somebody",
            **{
                "add-apt-repository": "",
                "apt-get": "",
                "python3.11": 'mkdir -p "$3/bin"; ln -sf /bin/true "$3/bin/pip"',
            },
        )

    def unit(self, active: str, code: int = 0, began: int = 9) -> None:
        """Sets the unit of the host."""
        said = f"ActiveState={active}\nExecMainStatus={code}\nExecMainStartTimestampMonotonic={began}\n"
        (self.host.parent / "unit").write_text(said)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs the script of the checkout."""
        command = ["bash", str(DIRECTORY / "tpu_vm.sh"), *arguments]
        environment = self.environment | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)

    def calls(self, pattern: str) -> list[str]:
        """Returns the calls with the pattern."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if re.search(pattern, line)]


@pytest.fixture
def pod(tmp_path: pathlib.Path) -> Pod:
    """A machine that is ready, with nothing on it."""
    return Pod(tmp_path)


def fakes(directory: pathlib.Path, **commands: str) -> None:
    """Writes shell scripts that stand in for commands."""
    for name, lines in commands.items():
        (directory / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (directory / name).chmod(0o755)


@pytest.mark.subprocess
def test_start_installs_and_starts_a_unit_on_all_hosts(pod: Pod) -> None:
    done = pod.run("start", RUN="mine")
    assert done.returncode == 0, done.stderr
    assert pod.calls("^systemctl enable") == ["systemctl enable --now varedit@somebody"]
    assert pod.calls("^cp varedit_jax/experiments/launch/varedit@.service /etc/systemd/system/")
    assert all("--worker=all" in call for call in pod.calls(" ssh ")) and not pod.calls("create")
    variables = dict(line.split("=", 1) for line in (pod.host / "varedit.env").read_text().splitlines())
    assert (variables["BUCKET"], variables["RUN"]) == ("gs://b", "mine")
    again = pod.run("start")  # as from another terminal
    assert again.returncode == 0 and "under way" in again.stderr and len(pod.calls("^systemctl enable")) == 1


@pytest.mark.subprocess
def test_a_machine_that_is_gone_is_created(pod: Pod) -> None:
    (pod.host.parent / "state").write_text("")
    assert pod.run("start").returncode == 0
    (created,) = pod.calls("create")
    assert "--accelerator-type=v5p-256" in created and "--spot" in created
    assert "--spot" not in created.replace("--spot", "", 1) and pod.calls("^systemctl enable")


@pytest.mark.subprocess
def test_status_logs_and_stop(pod: Pod) -> None:
    pod.unit("failed", 70)
    (pod.host / "varedit.log").write_text("first\nlast\n")
    said = pod.run("status").stdout
    assert said.startswith("pod is READY\nunit t1v-n-w-0 ActiveState=failed ExecMainStatus=70") and "| last\n" in said
    assert "queued-resources delete pod" in pod.run("stop").stderr
    assert pod.calls("^systemctl disable") == ["systemctl disable --now varedit@somebody"]
    (pod.host.parent / "state").write_text("")  # the machine is gone
    pod.run("logs", "3")
    assert pod.calls("storage cat") == ["gcloud storage cat gs://b/runs/varedit_8b_512/logs/*-w-3.log"]
    assert pod.run("strat").returncode == 1


@pytest.mark.parametrize(
    ("active", "status", "code", "said"),
    [("inactive", 0, 0, "is finished"), ("inactive", 143, 0, "was stopped"), ("failed", 1, 1, "ExecMainStatus=1")],
)
@pytest.mark.subprocess
def test_keep_ends_with_the_run(pod: Pod, active: str, status: int, code: int, said: str) -> None:
    fakes(pod.bin, sleep=f"""printf 'ActiveState={active}\\nExecMainStatus={status}\\n' >{pod.host.parent}/unit""")
    done = pod.run("keep")
    assert done.returncode == code and said in done.stderr
    assert bool(pod.calls("^systemctl disable")) == (active == "failed")  # the others would wait for it


@pytest.mark.subprocess
def test_keep_creates_machines_with_an_end(pod: Pod) -> None:
    """Each is gone when it is looked at."""
    fakes(pod.bin, sleep=f"[[ -s {pod.host.parent}/state ]] && echo -n >{pod.host.parent}/state; true")
    done = pod.run("keep", MACHINES="3")
    assert done.returncode == 1 and "MACHINES=3" in done.stderr and len(pod.calls("create")) == 2


@pytest.mark.subprocess
def test_a_host_trains_and_uploads_its_log(pod: Pod) -> None:
    (pod.host / "venv" / "bin").mkdir(parents=True)
    launch = pod.host / "varedit_jax" / "experiments" / "launch"
    launch.mkdir(parents=True)
    fakes(pod.host / "venv" / "bin", python=f'echo "$JAX_COMPILATION_CACHE_DIR $*" >>{pod.log}; sleep 0.5; exit 75')
    command = ["bash", shutil.copy(DIRECTORY / "tpu_vm.sh", launch)]
    environment = pod.environment | {"HOME": str(pod.host), "NAME": "", "ZONE": "", "RUN": "mine"}
    options = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    program = subprocess.Popen([*command, "train"], start_new_session=True, **options)  # type: ignore[call-overload]
    assert program.wait(30) == 75
    os.killpg(program.pid, signal.SIGKILL)  # as systemd ends what is left of a unit
    (trained,) = pod.calls("experiments.train")
    assert trained.startswith("gs://b/cache -m experiments.train ") and "--workdir=gs://b/runs/mine " in trained
    upload = f"gcloud storage cp --quiet {pod.host}/varedit.log gs://b/runs/mine/logs/t1v-n-w-0.log"
    uploads = pod.calls("storage cp")
    assert upload in uploads
    assert subprocess.run([*command, "upload"], env=environment, check=False).returncode == 0
    assert pod.calls("storage cp")[-1] == upload and len(pod.calls("storage cp")) > len(uploads)
