"""What every console script shares: one way to parse, to report errors and to end."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from nnssl_ext import __version__
from nnssl_ext.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from nnssl_ext.preprocessing.parallel import Workers

CHECKPOINT_HELP = "checkpoint of nnssl_train: a file, or a shared model as a folder or hf://owner/name[@revision]"
DONE, SOME_FAILED, USER_ERROR, INTERNAL_ERROR, INTERRUPTED = 0, 1, 2, 70, 130


def parser(program: str, description: str, example: str) -> argparse.ArgumentParser:
    """An argument parser in the project's style: example in the help, --version, --verbose, --print-completion."""
    result = _Parser(
        prog=program, description=description, epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    result.add_argument("--version", action="version", version=f"nnssl_ext {__version__}")
    result.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    result.add_argument("--print-completion", action=_Completion, choices=("bash", "zsh", "tcsh"), help="print a script that completes this command's options")
    return result


class _Parser(argparse.ArgumentParser):
    """Tells a mistake like every other one: what, where, how to mend it; not the whole usage."""

    def _get_option_tuples(self, option_string: str) -> list:
        return []  # what a shortened option could stand for: `allow_abbrev` forbids only those with two dashes

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (-\S+)", message)
        known = [option for action in self._actions for option in action.option_strings]
        fix = f"see {self.prog} --help" if unknown is None else f"{did_you_mean(unknown[1], known)}; see {self.prog} --help".replace("?;", "?")
        self.exit(USER_ERROR, f"error: {UserError(message, 'command line', fix)}\n")


class _Completion(argparse.Action):
    """Prints the completion script of the parser for a shell, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None) -> None:
        try:
            shtab = importlib.import_module("shtab")
        except ImportError:
            parser.error("completion needs the package shtab: pip install shtab")
        print(shtab.complete(parser, shell=values))
        parser.exit(DONE)


def run(arguments: argparse.ArgumentParser, main: Callable[[argparse.Namespace], int | None], argv: Sequence[str] | None = None) -> int:
    """Parse, run `main` and return the exit code.

    0 done, 1 some cases failed, 2 user error, 70 internal error, 130 interrupted from the keyboard, 141 the reader of the output went away.
    """
    try:
        try:
            return _outcome(main, arguments.parse_args(argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output went away (as in `| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _outcome(main: Callable[[argparse.Namespace], int | None], options: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # between libraries; nothing a user can mend
    try:
        return main(options) or DONE
    except UserError as error:
        if options.verbose:
            raise
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; files already written stay valid", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        if options.verbose:
            raise
        print(f"internal error: {type(error).__name__}: {error}\n  fix: run again with --verbose and report the traceback", file=sys.stderr)
        return INTERNAL_ERROR


def add_dataset(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument("-d", metavar="ID", nargs="+", required=True, help="dataset IDs or names")


def add_configurations(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument("-c", metavar="CONFIG", nargs="+", default=["3d_fullres"], help="configurations (default: 3d_fullres)")


def add_workers(arguments: argparse.ArgumentParser) -> None:
    cores = min(8, os.cpu_count() or 1)
    arguments.add_argument("-np", metavar="N", type=at_least_one, default=cores, help="worker processes (default: the number of cores, at most 8)")
    help_dask = "work on a Dask cluster: tcp://HOST:PORT of a running scheduler, local, or slurm (-np jobs)"
    arguments.add_argument("--dask-scheduler", metavar="ADDRESS", help=help_dask)


def add_storage(arguments: argparse.ArgumentParser) -> None:
    help_text = "number format of the stored voxels: float32 is exact; float16 and uint16 take half the space, their largest error is written beside each case"
    arguments.add_argument("-storage", choices=("float32", "float16", "uint16"), default="float32", help=help_text + " (default: float32)")
    arguments.add_argument("-device", choices=("cpu", "cuda"), default="cpu", help="where volumes are resampled (default: cpu)")


def workers(options: argparse.Namespace) -> Workers:
    """Who does the work, as the options of `add_workers` say."""
    from nnssl_ext.preprocessing.parallel import Workers

    return Workers(options.np, options.dask_scheduler)


def add_planning(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument("-p", metavar="PLANS", default="nnsslPlans", help="name of the plans (default: %(default)s)")
    arguments.add_argument("-pl", metavar="PLANNER", default="Planner", help="planner class, built-in or from $nnssl_extPath (default: %(default)s)")
    arguments.add_argument("-gpu_memory_target", metavar="GB", type=float, help="memory to plan for (default: the card's; 4 without one)")


def add_device(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument("-device", choices=("cpu", "cuda"), help="default: cuda where there is a card")


def chosen_device(options: argparse.Namespace) -> str:
    """What the option of `add_device` says.

    Raises:
        UserError: CUDA is wanted and there is none.
    """
    import torch

    device: str = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA card is available", "option -device", "use -device cpu, or check the driver with nvidia-smi")
    return device


def add_results(arguments: argparse.ArgumentParser, each: str) -> None:
    arguments.add_argument("-out", metavar="FILE", type=Path, help=f"also write FILE.csv ({each}) and FILE.json (summary)")


def at_least_one(text: str) -> int:
    """A whole number of an option, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)
