"""The launch scripts are valid shell, and they and their pages use configs, variants and fields that exist."""

import os
import pathlib
import re
import subprocess

import pytest

from experiments import program
from varedit_jax.config import RunConfig
from varedit_jax.config.annotations import field_types

ROOT = pathlib.Path(__file__).parents[2]
DIRECTORY = ROOT / "experiments" / "launch"
SCRIPTS = ("tpu_vm.sh", "gke_xpk.sh", "slurm.sbatch")
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
    assert {"init_from", "cadence.save_minutes", "guard.hang_minutes"} <= fields
    assert fields <= set(field_types(RunConfig))


@pytest.mark.parametrize(("script", "page"), list(zip(SCRIPTS, PAGES, strict=True)))
def test_a_page_shows_the_command_of_its_script(script: str, page: str) -> None:
    def flags(name: str) -> set[str]:
        command = (DIRECTORY / name).read_text().partition("experiments.train")[2]
        return set(re.findall(r"--(?:config\.)?[\w.]*\w=", command.partition("\n\n")[0]))

    assert flags(page) <= flags(script) and len(flags(page)) == 9


@pytest.mark.subprocess
def test_slurm_requeues_a_job(tmp_path: pathlib.Path) -> None:
    """Unless it is finished, has a mistake, or ends quickly for the third time in a row."""
    for name, lines in (("srun", "exit $CODE"), ("scontrol", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)

    def job(code: int, restarts: int, seconds: int = 0) -> bool:
        """Returns True if a job whose processes end with `code` after some seconds runs again."""
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "DISK": str(tmp_path),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "CODE": str(code),
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(restarts),
            "SECONDS": str(seconds),
        }
        command = ["bash", str(DIRECTORY / "slurm.sbatch")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code and done.stdout in ("", "requeue 7\n"), done
        return bool(done.stdout)

    assert [job(0, 0), job(1, 0), job(143, 0)] == [False, False, True]
    assert [job(137, 1), job(137, 2, seconds=3600), job(137, 3), job(137, 4), job(137, 5)] == [True] * 4 + [False]
    assert job(137, 0)  # a new submission
