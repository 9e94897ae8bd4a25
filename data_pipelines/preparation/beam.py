"""A stage as a pipeline of Apache Beam, on any of its runners. Imported only where such a pipeline is run.

Versions that this was written against: apache-beam 2.77.0, dask and distributed 2026.8.0.
"""

import multiprocessing
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import apache_beam
import grpc
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, PortableOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.portability.portable_runner import PortableRunner
from apache_beam.runners.runner import PipelineRunner, create_runner

from data_pipelines.preparation import messages, stages
from data_pipelines.preparation.pool import at_end
from varedit_jax.errors import UserError

# Beam 2.77.0: DirectRunner would first try to download another runner, Prism.
_LOCAL = ("directrunner", "fnapirunner", "switchingdirectrunner")
_FOREVER = 10 * 365 * 24 * 3600  # seconds
_DASK = "apache_beam.runners.dask.dask_runner.DaskRunner"  # Beam 2.77.0 does not know it by its short name


def run(
    runner: str,
    options: Sequence[str],
    name: str,
    work: Callable[[Any], object],
    tasks: Sequence[stages.StageTask],
    directory: pathlib.Path,
    log: pathlib.Path,
) -> None:
    """Runs tasks on one of Beam's runners. Messages of workers go to `directory`; what is printed is in `log`.

    Raises UserError if the runner does not exist or fails.
    """
    try:
        chosen = _create(runner)
        if isinstance(chosen, PortableRunner):
            options = _patient(options)
        parsed = _options(runner, chosen, options)
        if isinstance(
            chosen, FnApiRunner
        ):  # Beam 2.77.0 starts all of its processes, for each stage, whatever is to do
            local = parsed.view_as(DirectOptions)
            local.direct_num_workers = min(local.direct_num_workers or multiprocessing.cpu_count(), len(tasks))
        pipeline = apache_beam.Pipeline(chosen, parsed)
        tasks_P = pipeline | apache_beam.Create(list(tasks)) | apache_beam.Reshuffle()
        _ = tasks_P | name >> apache_beam.ParDo(_Do(work, directory))
        result = pipeline.run()
        at_end(result.cancel)
        result.wait_until_finish()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # runners raise what comes, and argparse exits
        raise UserError(
            f"--runner={runner} failed: {_reason(error, log)}; check --runner_options and that its workers run, "
            f"then run the same command again; {log} has all that it printed"
        ) from error


def _create(runner: str) -> PipelineRunner:
    if runner.lower() in _LOCAL:
        return FnApiRunner()
    try:
        return create_runner(_DASK if _is_dask(runner) else runner)
    except (ValueError, ImportError, AttributeError) as error:
        if _is_dask(runner):
            raise UserError(
                f"--runner={runner} needs the packages dask and distributed; install them with pip install "
                f"'varedit-jax[dask]'"
            ) from error
        raise UserError(
            f"Apache Beam has no runner {runner!r} here ({_last_line(str(error))}); DirectRunner works everywhere"
        ) from error


def _is_dask(runner: str) -> bool:
    return runner.rpartition(".")[2].lower() == "daskrunner"


def _options(runner: str, chosen: PipelineRunner, options: Sequence[str]) -> PipelineOptions:
    """Returns the options for Beam. Raises UserError for one that is unknown, which Beam would pass over."""
    if bare := [option for option in options if not option.startswith("--")]:
        raise UserError(f"--runner_options has {bare[0]!r}; each is --NAME=VALUE, and commas stand between them")
    parsed = PipelineOptions(list(options))
    if isinstance(chosen, PortableRunner):  # whose job service has options of its own
        return parsed
    unknown = parsed.get_all_options(retain_unknown_options=True).keys() - parsed.get_all_options().keys()
    if unknown:
        raise UserError(f"--runner_options has --{min(unknown)}, but {runner} has no such option; correct its name")
    if _is_dask(runner) and not any(option.startswith(("--dask_npart", "--dask_part")) for option in options):
        # Beam 2.77.0 would give 128 tasks to one worker, to be done one after another.
        return PipelineOptions([*options, "--dask_partition_size=1"])
    return parsed


def _patient(options: Sequence[str]) -> list[str]:
    """Returns the options of a job service without a limit to the time of a pipeline, if the service is there.

    Beam 2.77.0 applies --job_server_timeout, 60 seconds, to both: a longer pipeline fails with "Deadline Exceeded".
    """
    given = PipelineOptions(list(options)).view_as(PortableOptions)
    if given.job_endpoint and given.job_endpoint != "embed":
        with grpc.insecure_channel(given.job_endpoint) as channel:
            try:
                grpc.channel_ready_future(channel).result(given.job_server_timeout)
            except grpc.FutureTimeoutError as error:
                raise UserError(
                    f"no job service answers at --job_endpoint={given.job_endpoint} within {given.job_server_timeout} "
                    f"seconds; start it, or correct --runner_options"
                ) from error
    return [*options, f"--job_server_timeout={_FOREVER}"]


def _reason(error: BaseException, log: pathlib.Path) -> str:
    """Returns what an error says, in a line."""
    if isinstance(error, SystemExit):  # argparse has printed why
        return _last_line(log.read_text(errors="replace"))
    details = getattr(error, "details", None)  # of gRPC
    text = details() if callable(details) else str(error)
    return f"{type(error).__name__}: {_last_line(text)}".removesuffix(": ")


def _last_line(text: str) -> str:
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return lines[-1][:400] if lines else ""


class _Do(apache_beam.DoFn):
    """Does tasks, on a worker."""

    def __init__(self, work: Callable[[Any], object], directory: pathlib.Path) -> None:
        self._work, self._directory = work, directory

    def process(self, task: Any) -> None:
        """Does a task, and tells the first process of a failure: runners wrap exceptions, or try again."""
        if messages.has_failed(self._directory):
            return
        try:
            with messages.pulse(self._directory):
                stages.do(self._work, task, self._directory.parent)
        except Exception as error:
            messages.tell_failure(self._directory, error)
