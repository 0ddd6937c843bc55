"""Run distributed's own tests with our schedulers in the place of its own (``make test-distributed``).

A test counts that passes with plain distributed, fails with ours, twice, and is not among the differences of ``docs/lanes.md``.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from io import BytesIO
from pathlib import Path

import distributed

HERE = Path(__file__).parent
REPOSITORY = "https://github.com/dask/distributed"
SECTION = "## distributed's own tests"
MODULES = ("client", "worker", "steal", "spill", "failed_workers", "actor", "variable")
TESTS = [f"distributed/tests/test_{name}.py" for name in MODULES] + ["distributed/shuffle/tests", "distributed/deploy/tests"]
ROWS = {
    "plain": {"CRYODASK_SUBSTITUTE": "plain"},
    "one lane": {"CRYODASK_SUBSTITUTE": "lanes"},
    "two lanes": {"CRYODASK_SUBSTITUTE": "lanes", "CRYODASK_LANES": "2"},
    "guarded": {"CRYODASK_SUBSTITUTE": "guarded"},
}
# what takes minutes or a network is marked by distributed itself
LEFT_OUT = "not slow and not gpu and not ipython and not memray"


def tests_of(version: str, repository: str, folder: Path) -> Path | None:
    """The folders of tests of the release ``version``, from the tag of that name (the source archive has none); None without one."""
    if not (folder / "distributed").is_dir():
        clone = folder / "git"
        command = ["git", "clone", "--quiet", "--bare", "--depth", "1", "--branch", version, repository, str(clone)]
        if subprocess.run(command, check=False).returncode != 0:
            return None
        content = subprocess.run(["git", "-C", str(clone), "archive", version, "distributed"], check=True, capture_output=True).stdout
        with tarfile.open(fileobj=BytesIO(content)) as archive:
            # the tests alone: the package that they test is the installed one
            archive.extractall(folder, [member for member in archive if "/tests" in member.name], filter="data")
    return folder


def differences(page: str) -> dict[str, str]:
    """Rows of the table under ``SECTION``: the test, or the beginning of several, and the reason why it may fail."""
    table = page.partition(SECTION)[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([^`|]+)` \| (.+) \|$", table, re.MULTILINE))


def failed(folder: Path, row: str, jobs: int, tests: list[str]) -> tuple[set[str], int]:
    """Names of tests that failed, and how many passed."""
    report = folder / f"{row.replace(' ', '-')}.xml"
    (folder / "pytest.ini").write_text("[pytest]\njunit_family = xunit1\n")
    # processes that the tests start import the substitution, too
    (folder / "sitecustomize.py").write_text("import substitution\n")
    paths = os.pathsep.join([str(folder), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ROWS[row], "CRYODASK_TESTS_OF_DISTRIBUTED": str(folder), "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "substitution", "-p", "distributed.utils_test", "-p", "no:asyncio"]
    command += ["-p", "no:cacheprovider", "--rootdir", str(folder), "-c", str(folder / "pytest.ini"), "--import-mode=importlib"]
    command += ["--timeout", "120", "-m", LEFT_OUT, f"--junitxml={report}", *(["-n", str(jobs)] if jobs > 1 else []), *tests]
    subprocess.run(command, cwd=folder, check=False, env=environment)
    bad, good = set(), 0
    for case in ElementTree.parse(report).iter("testcase"):
        if any(child.tag in ("failure", "error") for child in case):
            bad.add(f"{case.get('file')}::{case.get('name')}")
        elif not any(child.tag == "skipped" for child in case):
            good += 1
    return bad, good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", default=os.environ.get("DISTRIBUTED_REPOSITORY", REPOSITORY), help="git repository of distributed")
    parser.add_argument("--version", default=distributed.__version__, help="tag whose tests run (default: of the installed version)")
    parser.add_argument("--folder", type=Path, required=True, help="where the tests are kept, and the reports written")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS][1:], default=[*ROWS][1:])
    parser.add_argument("--jobs", type=int, default=5)
    parser.add_argument("tests", nargs="*", help="modules below distributed/, all that are listed if none are named")
    args = parser.parse_args()
    folder = tests_of(args.version, args.repository, args.folder.resolve() / args.version)
    if folder is None:
        print(f"SKIPPED: no tests of distributed {args.version} at {args.repository} (DISTRIBUTED_REPOSITORY=..., --version)")
        return 0
    tests = args.tests or TESTS
    expected = differences((HERE.parents[1] / "docs" / "lanes.md").read_text())
    plain, good = failed(folder, "plain", args.jobs, tests)
    print(f"plain: {good} passed, {len(plain)} failed")
    unexpected = 0
    for row in args.rows:
        bad, good = failed(folder, row, args.jobs, tests)
        bad -= plain
        if bad:  # what fails beside others may pass alone
            bad, _ = failed(folder, row, 1, sorted(bad))
        new = sorted(test for test in bad if not any(test.removeprefix("distributed/").startswith(name) for name in expected))
        print(f"{row}: {good} passed, {len(bad)} differ, {len(new)} of them not listed in docs/lanes.md", *new, sep="\n  ")
        unexpected += len(new)
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
