"""What people may add to jobs: options for sbatch that no setting speaks of, and shell commands that are not directives."""

import os
import subprocess

import pytest

from cryodask.cluster.service.batch import job_script
from cryodask.cluster.settings import parse_settings, read_cluster_file
from cryodask.cluster.slurm.allocation import allocation_script
from cryodask.cluster.slurm.slurm import dry_run
from cryodask.errors import ProjectFileError

SECTIONS = ("pools", "driver", "service")


def settings(section="pools", folder="", **given):
    """A cluster file in which one section has been given something."""
    pool = {"memory": "16GiB", "cores": 4, **(given if section == "pools" else {})}
    rest = {} if section == "pools" else {section: given}
    return parse_settings({"kind": "slurm", "interface": "lo", "pools": {"cpu": pool}, **rest}, folder=folder)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize(
    ("line", "says"),
    [
        *((line, "setting memory") for line in ("--mem=1G", "--mem 1G", "--mem-per-cpu=4G", "--mem-per-gpu=1G", "-C rome --mem=1G")),
        *((line, "setting walltime") for line in ("--time=10", "--time 10", "-t 10", "-t10", "--time-min=5")),
        *((line, "setting (cores|processes)") for line in ("-c 8", "-c8", "--cpus-per-task=8", "-n4", "--ntasks=4", "--ntasks-per-node 2")),
        *((line, "setting gpus") for line in ("--gres=gpu:a100:1", "--gres gpu:1", "--gpus=2", "-G 2", "-G2", "--gpus-per-node=1")),
        *((line, "setting (count|partition|account|qos)") for line in ("-N 2", "--array=0-9", "-a 0-9", "-p gpu", "-pgpu", "-A x", "-q y")),
        *((line, "setting logs") for line in ("--output=/dev/null", "-o /dev/null", "-e/dev/null", "--error=x")),
        *(
            (line, "set by cryodask")
            for line in ("--comment=mine", "-J mine", "--job-name=mine", "--requeue", "--no-requeue", "--wrap=true")
        ),
        *(
            (line, "set by cryodask")
            for line in ("--wrap=true", "--open-mode=truncate", "--export=NONE", "--hold", "-H", "-M other", "--clusters=other")
        ),
        # abbreviations, as sbatch accepts them
        *((line, "cannot be added") for line in ("--comm mine", "--me=1G", "--tim=10", "--const=rome", "--gre=gpu:1", "--outp=x")),
        *((line, "cannot be added") for line in ("--test-only", "--chdir=/", "-D /", "--uid=0", "--version", "--deadline=now", "-Q", "-W")),
        *((line, "not an option") for line in ("rome", "# --mem=1G", "--exclusive rome", "--contiguous 1")),
        *((line, "needs a value") for line in ("--constraint", "-C", "--nodelist -x", "--constraint=", "--nice=", "-C ''")),
        ("", "single line"),
        ("--exclusive\n#SBATCH --mem=1G", "single line"),
        ("--exclusive\r--mem=1G", "single line"),
    ],
)
def test_what_a_setting_speaks_of_is_refused_in_every_spelling_and_section(section, line, says):
    with pytest.raises(ProjectFileError, match=rf"{section}.*directives.*{says}"):
        settings(section, directives=[line])


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize(
    "line",
    [
        "--constraint=rome", "-C rome", "-Crome", "-C 'a&b'", "--exclusive", "--exclusive=user", "--exclude=c[1-4]", "--nodelist c7",
        "--reservation=em", "--licenses=matlab:1", "--nice", "--nice=100", "--begin=now+1hour", "--mail-type=FAIL --mail-user=a@b.org",
        "--hint=nomultithread", "--tmp=100G", "-x c1 -w c2", "--switches=1@0:10:00", "--dependency=afterok:1",
    ],
)  # fmt: skip
def test_what_no_setting_speaks_of_may_be_added(section, line):
    said = settings(section, directives=[line])
    script = dry_run(said)["cpu"] if section == "pools" else job_script(getattr(said, section), "true", name="x", log="/l", comment="c")
    assert f"#SBATCH {line}\n" in script


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("line", ["#SBATCH --mem=1G", "  #SBATCH --mem=1G", "#PBS -l mem=1gb", "#BSUB -M 1", "# SBATCH --mem=1G"])
def test_directives_among_shell_commands_are_refused(section, line):
    with pytest.raises(ProjectFileError, match=r"environment.*put it into directives"):
        settings(section, environment=["module load x", line])
    settings(section, environment=["# modules of the site", "module load x"])


@pytest.mark.parametrize("name", ["partition", "account", "qos", "interface"])
@pytest.mark.parametrize("value", ["cpu --mem=1G", "cpu\n#SBATCH --mem=1G", "", "a;b", "$(id)", "'x'"])
def test_names_are_single_words_so_they_bring_no_option_with_them(name, value):
    with pytest.raises(ProjectFileError, match=name):
        settings(**{name: value})
    assert settings(**{name: "em-1,em_2" if name == "partition" else "em"})


@pytest.mark.parametrize(
    ("option", "pool", "driver"),
    [("mem", "--mem=16384M", "--mem=4096M"), ("mem-per-cpu", "--mem-per-cpu=4096M", "--mem-per-cpu=2048M"), ("none", "", "")],
)
def test_memory_is_asked_for_as_the_site_wants_and_once(option, pool, driver):
    def asked(script):
        return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH --mem")]

    said = settings(memory_option=option, count=2)
    assert asked(dry_run(said)["cpu"]) == [pool] * bool(pool)
    assert "--memory-limit 14.40GiB" in dry_run(said)["cpu"]
    assert asked(allocation_script(said, "true")) == (["--mem-per-cpu=4096M"] if pool else [])
    job = settings("driver", memory_option=option, cores=2).driver
    assert asked(job_script(job, "true", name="x", log="/l", comment="c")) == [driver] * bool(driver)


def test_paths_of_a_cluster_file_begin_in_its_folder_and_home_and_variables_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.setenv("SITE", "/sw")
    (tmp_path / "c.yaml").write_text(
        "kind: slurm\nlogs: logs\npools:\n"
        "  a: {memory: 1GiB, python: ~/env/bin/python, image: $SITE/c.sif, scratch: ~/scratch}\n"
        "  b: {memory: 1GiB, python: python3.11, image: 'docker://site/image:1', scratch: '${TMPDIR:-/tmp}/$USER'}\n"
        "  c: {memory: 1GiB, python: env/bin/python, image: ../c.sif}\n"
    )
    monkeypatch.chdir("/")
    read = read_cluster_file(tmp_path / "c.yaml")
    assert read.logs == str(tmp_path / "logs")
    a, b, c = (read.pools[name] for name in "abc")
    assert (a.python, a.image, a.scratch) == ("/home/anna/env/bin/python", "/sw/c.sif", "/home/anna/scratch")
    assert (b.python, b.image, b.scratch) == ("python3.11", "docker://site/image:1", "${TMPDIR:-/tmp}/$USER")
    assert (c.python, c.image) == (str(tmp_path / "env/bin/python"), str(tmp_path.parent / "c.sif"))


@pytest.mark.parametrize("given", ["$NOT_SET_HERE/python", "${NOT_SET_HERE}/python", "~nobody_of_this_name/python"])
@pytest.mark.parametrize("name", ["python", "image"])
def test_what_cannot_be_replaced_is_refused(name, given):
    with pytest.raises(ProjectFileError, match=rf"{name}: .*(not set|not the home folder)"):
        settings(**{name: given})


def test_a_scratch_in_the_home_folder_is_looked_for_there_on_the_node(tmp_path):
    line = next(line for line in dry_run(settings(scratch="~/scratch"))["cpu"].splitlines() if "stat -f" in line)
    assert f'scratch="{os.path.expanduser("~")}/scratch"' in line
    assert subprocess.run(["bash", "-n", "-c", line]).returncode == 0


@pytest.mark.parametrize("line", ["--licenses=a:1", "-La:1", "'--licenses'=a:1", "-'L' a:1", "-s \\-L a:1"])
def test_licences_are_asked_for_once_in_every_spelling(line):
    pool = {"cores": 1, "memory": "1GiB", "licences": {"a": 1}, "directives": [line]}
    with pytest.raises(ProjectFileError, match="licences are requested from Slurm already"):
        parse_settings({"kind": "slurm", "pools": {"cpu": pool}})
