"""nnssl_train --slurm: trainings as jobs of a cluster, one per trainer and seed, which go on by themselves after preemption and time limits."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from nnssl_ext.benchmark.lanes import finish_all
from nnssl_ext.benchmark.units import Unit
from nnssl_ext.cli import train
from nnssl_ext.core.errors import UserError, did_you_mean
from nnssl_ext.core.paths import RESULTS, root
from nnssl_ext.trainers.launch import make_trainer
from nnssl_ext.trainers.signals import STOPS

TIMEOUTS = 1000  # how often a job may reach its time limit and go on
SYNONYMS = {"time": "timeout_min", "job_name": "name", "ntasks_per_node": "tasks_per_node"}  # sbatch's words for what submitit calls otherwise
OURS = {"additional_parameters", "srun_args", "use_srun", "num_gpus", "gpus_per_task", "cpus_per_gpu"}  # set here, or at odds with one process per card
DEFAULTS: dict[str, Any] = {
    "name": "nnssl",
    "timeout_min": 24 * 60,
    "stderr_to_stdout": True,
    "slurm_signal_delay_s": 180,  # between the warning and the time limit: a step and a checkpoint must fit
    "slurm_srun_args": ["--kill-on-bad-exit=1"],  # a process that fails ends the others, which would wait for it
    "slurm_additional_parameters": {"requeue": True},
}


@dataclass(frozen=True)
class Job:
    """What a job runs: nnssl_train, from the latest checkpoint where there is one.

    While it trains, the loop takes the signals and ends with a checkpoint behind the step it is in. Then the signal is
    raised again for submitit, whose handler was there before: SIGUSR2 (time limit, preemption) puts the job back into the
    queue. SIGTERM does not, since a cancelled job must not come back; SLURM itself requeues a job that it preempts so, but
    only if it has to end it, which is why the job waits for that.

    Args:
        words: of the command line, without the program.
        folder: results folder of the run.
    """

    words: tuple[str, ...]
    folder: Path

    def __call__(self) -> None:
        _join_processes()
        begun = any((self.folder / f"checkpoint_{name}.pth").exists() for name in ("latest", "previous"))
        code = train.main([*self.words, *(["--c"] if begun else [])])
        number = code - 128
        if number in STOPS:  # no process of several may fail here: that would end the one that still writes the checkpoint
            if callable(signal.getsignal(number)):
                signal.raise_signal(number)
            while number == signal.SIGTERM:
                signal.pause()
        elif code:
            sys.exit(code)

    def checkpoint(self) -> Any:
        """What the job does when it starts again; called by submitit."""
        return _submitit().helpers.DelayedSubmission(self)


def _join_processes() -> None:
    """Set the variables by which the tasks of this job form one group, as torchrun would (RANK, WORLD_SIZE, MASTER_ADDR, ...)."""
    environment = _submitit().helpers.TorchDistributedEnvironment()
    if environment.world_size > 1:
        environment.export(set_cuda_visible_devices=False, overwrite=True)


def submit(options: argparse.Namespace) -> int:
    """Submit a job array: one training per trainer and seed that the command line names.

    Raises:
        UserError: submitit or SLURM is missing, SLURM refuses, an unknown or impossible setting, or a mistake in one of the trainings.
    """
    given = settings(options.slurm)
    cluster = _cluster(given)
    jobs = [_job(single) for single in _singles(options)]
    submitted = _submitted(jobs, {**_resources(options, given), **given}, cluster, root(RESULTS) / "slurm_logs")
    _tell(submitted, jobs, cluster)
    return 0


def _cluster(given: dict[str, Any]) -> str:
    """Takes the kind of cluster out of the settings."""
    cluster: str = given.pop("cluster", "slurm")
    if cluster not in ("slurm", "local"):
        raise UserError(f"unknown cluster '{cluster}'", "option --slurm", "known: slurm, local (jobs on this machine, to try it out)")
    return cluster


def _submitted(jobs: Sequence[Any], parameters: dict[str, Any], cluster: str, logs: Path) -> list[Any]:
    """A job array of submitit."""
    submitit = _submitit()
    try:
        executor = submitit.AutoExecutor(logs, cluster=cluster, slurm_max_num_timeout=TIMEOUTS)
    except RuntimeError:
        raise UserError("SLURM was not found (there is no srun)", "option --slurm", "submit from a machine of the cluster") from None
    with submitit.helpers.clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext():
        try:
            executor.update_parameters(**{**DEFAULTS, **parameters})
            with redirect_stderr(io.StringIO()):  # where submitit repeats what sbatch says
                return list(executor.submit_array(jobs))
        except (ValueError, submitit.core.utils.FailedJobError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"the jobs were not accepted: {reason}", "option --slurm", "correct the settings, then submit again") from None


@dataclass(frozen=True)
class ChainJob:
    """Units of a benchmark one after the other: a pretraining and what follows it.

    Args:
        units: those that need others come after them.
        out: the benchmark's folder.
    """

    units: tuple[Unit, ...]
    out: Path

    def __call__(self) -> None:
        """Finish them in a process of one thread; the job fails where one of them does. Waits after SIGTERM to be ended, as `Job` does."""
        ended: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
        errors = finish_all(self.units, self.out, 1)
        while ended:
            signal.pause()
        if errors:
            sys.exit(1)

    def checkpoint(self) -> Any:
        """What the job does when it starts again; called by submitit."""
        return _submitit().helpers.DelayedSubmission(self)


def submit_chains(units: Sequence[Unit], out: Path, texts: Sequence[str], device: str, command: Sequence[str]) -> int:
    """Submit the units of a benchmark, a job for each that needs no other and what needs it; raises what `submit` raises."""
    chains: dict[str, list[Unit]] = {}
    for unit in units:
        first = unit
        while first.needs is not None and first.needs in units:
            first = first.needs
        chains.setdefault(first.digest, []).append(unit)
    jobs = [ChainJob(tuple(chain), out) for chain in chains.values()]
    resources = {"tasks_per_node": 1, "cpus_per_task": 2 if device == "cpu" else 10, **({} if device == "cpu" else {"gpus_per_node": 1})}
    given = settings(texts)
    cluster = _cluster(given)
    submitted = _submitted(jobs, {**resources, **given}, cluster, out / "slurm_logs")
    for job, own in zip(submitted, jobs):
        print(f"job {job.job_id}: {', '.join(unit.name for unit in own.units)}\n  log: tail -F {job.task(0).paths.stdout}")
    number = submitted[0].job_id.split("_")[0]
    print(f"cancel: {'scancel ' + number if cluster == 'slurm' else 'kill JOB'}\nafterwards, for the report: nnssl_benchmark {shlex.join(command)}")
    return 0


def settings(texts: Sequence[str]) -> dict[str, Any]:
    """Settings of submitit's executor, from ``partition=gpu time=2-00:00:00`` as sbatch names them or as submitit does.

    Raises:
        UserError: malformed text, unknown key (with the closest one), value of another type.
    """
    submitit = _submitit()
    shared: dict[str, type] = submitit.AutoExecutor._typed_parameters()
    slurm = submitit.SlurmExecutor._valid_parameters() - OURS
    found: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"'{text}' is not of the form key=value", "option --slurm", "write for example --slurm partition=gpu time=1-00:00:00")
        key = key.replace("-", "_").removeprefix("slurm_")
        name = SYNONYMS.get(key, key)
        if name in shared:
            found[name] = _minutes(value) if name == "timeout_min" else _convert(value, shared[name], text)
        elif name in slurm:
            found[f"slurm_{name}"] = [value] if name in ("setup", "teardown") else _convert(value, int, text) if name in _NUMBERS else value
        elif name == "cluster":
            found[name] = value
        else:
            raise UserError(f"unknown setting '{key}'", "option --slurm", did_you_mean(key, {*shared, *slurm, *SYNONYMS, "cluster"}))
    return found


_NUMBERS = ("signal_delay_s", "array_parallelism")


def _convert(value: str, kind: type, text: str) -> Any:
    try:
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise UserError(f"'{value}' is not a valid {kind.__name__}", f"option --slurm {text}") from None


def _minutes(value: str) -> int:
    """Of a time as sbatch reads it: minutes, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES[:SECONDS]; seconds are rounded up."""
    match = re.fullmatch(r"(?:(?P<days>\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", value)
    if match is None:
        raise UserError(f"'{value}' is not a time", f"option --slurm time={value}", "write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS")
    first, second, third = (int(part or 0) for part in match.groups()[1:])
    if match["days"] is not None or match[4] is not None:
        hours, minutes, seconds = first, second, third
    else:
        hours, minutes, seconds = 0, first, second
    return (int(match["days"] or 0) * 24 + hours) * 60 + minutes + -(-seconds // 60)


def _resources(options: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """One process per card, with CPUs for its loader; settings of the user win."""
    processes = given.get("gpus_per_node") or options.num_gpus
    cards = {} if options.device == "cpu" or "slurm_gres" in given else {"gpus_per_node": processes}
    return {"tasks_per_node": processes, "cpus_per_task": 2 if options.device == "cpu" else 10, **cards}


def _singles(options: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The command line of each job: one trainer, one seed, one process."""
    device = options.device or "cuda"  # what the jobs find, not this machine
    for trainer, seed in product(dict.fromkeys(options.tr), dict.fromkeys(options.seeds or [None])):
        overrides = options.o if seed is None else [*options.o, f"seed={seed}"]
        yield argparse.Namespace(**{**vars(options), "tr": [trainer], "o": overrides, "seeds": None, "slurm": None, "num_gpus": 1, "device": device})


def _job(options: argparse.Namespace) -> Job:
    """A job whose mistakes show now, not when it starts."""
    run, probe = train.run_of(options)
    trainer = make_trainer(replace(run, device="cpu"))
    if probe is not None:
        probe(trainer.plan, trainer.configuration)
    begun = (trainer.folder / "checkpoint_latest.pth").exists()
    if begun and not (options.c or options.val):
        raise UserError("the results folder already holds a run", trainer.folder, "continue it with --c, or move the folder away")
    return Job(tuple(_words(argparse.Namespace(**{**vars(options), "c": False}))), trainer.folder.absolute())


def _words(options: argparse.Namespace) -> Iterator[str]:
    """The command line that says `options`."""
    for action in train.arguments()._actions:
        value = getattr(options, action.dest, action.default)
        if value != action.default:
            yield from action.option_strings[:1]
            yield from () if value is True else map(str, value if isinstance(value, list) else [value])


def _tell(submitted: Sequence[Any], jobs: Sequence[Job], cluster: str) -> None:
    for job, own in zip(submitted, jobs):
        print(f"job {job.job_id}: nnssl_train {shlex.join(own.words)}\n  results: {own.folder}\n  log: tail -F {job.task(0).paths.stdout}")
    number = submitted[0].job_id.split("_")[0]
    print(f"queue: squeue -j {number}\ncancel: scancel {number}" if cluster == "slurm" else "cancel: kill JOB")


def _submitit() -> ModuleType:
    try:
        return importlib.import_module("submitit")
    except ImportError:
        raise UserError("--slurm needs the package submitit", "option --slurm", "pip install submitit") from None
