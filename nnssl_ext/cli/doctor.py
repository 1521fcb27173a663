"""nnssl_doctor: is this machine ready?"""

from __future__ import annotations

import argparse
import json
import sys

from nnssl_ext.cli.common import parser, run


def arguments() -> argparse.ArgumentParser:
    result = parser("nnssl_doctor", "Check packages, GPU, folders, limits and a tiny training; every problem comes with a remedy.", "nnssl_doctor")
    result.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
    result.add_argument("--quick", action="store_true", help="leave out the tiny training")
    return result


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when there is no problem (warnings count as none), 1 otherwise."""
    return run(arguments(), _main, argv)


def _main(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from nnssl_ext.evaluation.doctor import examine, worst

    findings = []
    for finding in examine(self_test=not options.quick):
        findings.append(finding)
        if not options.json:
            print(finding, flush=True)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        count = {state: sum(finding.state == state for finding in findings) for state in ("problem", "warning")}
        print(f"\n{count['problem']} problems, {count['warning']} warnings")
    return 1 if worst(findings) == "problem" else 0


if __name__ == "__main__":
    sys.exit(main())
