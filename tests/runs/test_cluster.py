"""Comparisons by jobs: of Slurm up to its commands, which are scripts here, and of submitit's local executor for real."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from matchdistill import cli
from matchdistill.locking import LOCK, held
from matchdistill.runs.cluster import Cluster, Work, collect, submit
from matchdistill.runs.compare import Cell, compare
from matchdistill.runs.metrics import read_metrics
from records import timeless

submitit = pytest.importorskip("submitit")

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")

TEACHER = ("--teacher.weights=null", "--teacher.training.epochs=1")
METHODS = ["none", "mgd-amp"]
SBATCH = """#!{python}
import sys
from pathlib import Path
kept = Path({folder!r})
number = len(list(kept.glob("*.sbatch"))) + 1
(kept / f"{{number}}.sbatch").write_text(Path(sys.argv[1]).read_text())
print(f"Submitted batch job {{number}}")
"""
SACCT = """#!{python}
from pathlib import Path
print("JobID|State|NodeList")
for number in range(1, 20):
    print(f"{{number}}|{{(Path({folder!r}) / 'state').read_text()}}|node")
    for each in range(4):
        print(f"{{number}}_{{each}}|{{(Path({folder!r}) / 'state').read_text()}}|node")
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder that stands for Slurm: what was given to sbatch, and the state of all jobs."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("sacct", SACCT), ("srun", SBATCH)):
        (folder / name).write_text(text.format(python=sys.executable, folder=str(folder)))
        (folder / name).chmod(0o755)
    (folder / "state").write_text("PENDING")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def asked(slurm, number):
    """The options of a job that sbatch was given."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", (slurm / f"{number}.sbatch").read_text(), re.MULTILINE))


def students(out):
    return {
        path.parent.relative_to(out).as_posix(): load_file(path)
        for path in (out / "cells").rglob("student.safetensors")
    }


def same(first, second):
    first, second = students(first), students(second)
    assert first.keys() == second.keys()
    assert first
    for place, weights in first.items():
        assert all(torch.equal(value, second[place][name]) for name, value in weights.items()), place
    return True


def test_jobs_of_slurm(tiny, tmp_path, slurm):
    """What Slurm is asked for, and the same comparison when it has run the jobs, in any order."""
    recipe, out = tiny(*TEACHER), tmp_path / "out"
    cluster = Cluster(
        "slurm",
        timeout_min=30,
        gpus_per_node=1,
        mem_gb=8,
        partition="gpu",
        parameters={"slurm_comment": "ours", "slurm_additional_parameters": {"mail-type": "END"}},
    )
    first = submit(recipe, out, METHODS, 2, cluster, at_once=3)
    cells = [Cell(method, seed) for seed in (0, 1) for method in METHODS]
    assert [(each.job, each.runs) for each in first] == [
        ("1", ["teacher"]),
        *((f"2_{number}", [f"{cell.method} seed {cell.seed}"]) for number, cell in enumerate(cells)),
    ]
    for number in (1, 2):
        wanted = {"partition": "gpu", "gpus-per-node": "1", "mem": "8GB", "time": "30", "signal": "USR2@90"}
        wanted |= {"comment": "ours", "mail-type": "END"}
        assert {name: asked(slurm, number)[name].strip("'\"") for name in wanted} == wanted
    assert "dependency" not in asked(slurm, 1)
    assert asked(slurm, 2)["dependency"] == "afterok:1"
    assert asked(slurm, 2)["array"] == "0-3%3"

    with pytest.raises(
        ValueError,
        match=r"out has jobs that are not over: 1, 2_0, 2_1, 2_2, 2_3; wait for them.*Slurm does not know them any more",
    ):
        submit(recipe, out, METHODS, 2, cluster)
    with pytest.raises(
        ValueError, match=r"4 of 4 runs are missing: teacher has not begun.*; none seed 0 has not begun"
    ):
        collect(out)
    for each in (first[0], *reversed(first[1:])):
        assert not (out / "metrics.json").exists()
        job = submitit.SlurmJob(out / "jobs", each.job)
        submitit.core.utils.DelayedSubmission.load(job.paths.submitted_pickle).result()
    expected = compare(recipe, tmp_path / "plain", METHODS, 2)
    found = collect(out)
    assert timeless(found.runs) == timeless(expected.runs)
    assert found.plain() == json.loads((out / "metrics.json").read_text())
    assert (out / "metrics.csv").is_file()
    assert same(out, tmp_path / "plain")
    (slurm / "state").write_text("COMPLETED")
    assert submit(recipe, out, METHODS, 2, cluster) == []


def test_a_failed_run_is_named_with_its_log_and_goes_on(tiny, tmp_path, slurm):
    recipe, out = tiny(), tmp_path / "out"
    cluster = Cluster("slurm")
    jobs = submit(recipe, out, METHODS, 1, cluster)
    blocked = out / "cells" / "mgd-amp" / "seed0"
    blocked.parent.mkdir()
    blocked.write_text("a file where a folder should be")
    Work(recipe.config, out, [Cell("none", 0)])()
    with pytest.raises(RuntimeError, match=r"mgd-amp seed 0 failed with \w+Error"):
        Work(recipe.config, out, [Cell("mgd-amp", 0)])()
    said = rf"1 of 2 runs are missing: mgd-amp seed 0 failed with \w+Error: .*seed0.* \(log: {jobs[1].log}\)"
    with pytest.raises(ValueError, match=said):
        collect(out)
    blocked.unlink()
    (slurm / "state").write_text("FAILED")
    submitit.SlurmJob.watcher.clear()
    (again,) = submit(recipe, out, METHODS, 1, cluster)
    assert again.runs == ["mgd-amp seed 0"]
    assert "array" not in asked(slurm, 2)
    with pytest.raises(ValueError, match=rf"mgd-amp seed 0 failed .*log: {again.log}"):
        collect(out)
    Work(recipe.config, out, [Cell("mgd-amp", 0)])()
    assert [run.method for run in collect(out).runs] == METHODS


def test_what_hinders_the_table_is_said_by_the_last_job(tiny, tmp_path, slurm, monkeypatch):
    recipe, out = tiny(), tmp_path / "out"
    submit(recipe, out, METHODS, 1, Cluster("slurm"))
    Work(recipe.config, out, [Cell("none", 0)])()  # not the last one
    last = Work(recipe.config, out, [Cell("mgd-amp", 0)])
    with held(out):  # whoever holds it writes the table
        last()
    assert not (out / "metrics.json").exists()

    def full(*_):
        raise ValueError("no table")

    with monkeypatch.context() as patch:
        patch.setattr("matchdistill.runs.cluster.finish", full)
        with pytest.raises(ValueError, match="no table"):
            last()
    last()
    assert (out / "metrics.json").is_file()


def test_a_teacher_that_is_gone_fails_the_run_alone(tiny, tmp_path, slurm):
    recipe, out = tiny(*TEACHER), tmp_path / "out"
    submit(recipe, out, METHODS, 1, Cluster("slurm"))
    with pytest.raises(RuntimeError, match=r"mgd-amp seed 0 failed with .*teacher"):
        Work(recipe.config, out, [Cell("mgd-amp", 0), Cell("none", 0)])()
    assert read_metrics(out / Cell("none", 0).folder) is not None
    assert (out / "jobs" / "mgd-amp.seed0.error").is_file()


def test_a_teacher_that_fails_is_said_first(tiny, tmp_path, slurm):
    recipe, out = tiny(*TEACHER), tmp_path / "out"
    (job, *_) = submit(recipe, out, METHODS, 1, Cluster("slurm"))
    (out / "teacher").write_text("a file where a folder should be")
    with pytest.raises(RuntimeError, match="teacher failed with"):
        Work(recipe.config, out, [])()
    with pytest.raises(ValueError, match=rf"2 of 2 runs are missing: teacher failed with .*\(log: {job.log}\); none"):
        collect(out)


def test_what_a_requeued_job_does_is_the_same(tiny, tmp_path):
    work = Work(tiny().config, tmp_path, [Cell("none", 0)])
    again = work.checkpoint()
    assert again.function is work
    assert (again.args, again.kwargs) == ((), {})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cluster=slurmm",), "cluster.name is 'slurmm': expected 'slurm' or 'local' or null; did you mean 'slurm'"),
        (("--cluster=slurm",), "jobs of slurm cannot be set up \\(RuntimeError: Could not detect"),
        (("--cluster.partition=gpu",), "cluster.partition needs --cluster slurm or --cluster local"),
        (("--cluster=local", "--cluster.qos=high"), "cluster.qos is for Slurm only: leave it out with --cluster local"),
        (("--cluster=local", "--cluster.cpus_per_task=2"), "cluster.cpus_per_task is for Slurm only"),
        (("--cluster=local", "--cluster.mem_gb=2"), "cluster.mem_gb is for Slurm only"),
        (("--cluster=local", "--cluster.max_num_timeout=2"), "cluster.max_num_timeout is for Slurm only"),
        (
            ("--cluster=slurm", "--cluster.gpus_per_node=2"),
            "cluster.gpus_per_node is 2: expected .*: a job trains on one",
        ),
        (("--cluster=slurm", "--cluster.parameters={nodes: 2}"), "cluster.parameters has nodes 2: expected 1, a job"),
        (
            ("--cluster=slurm", "--cluster.parameters={slurm_ntasks_per_node: 4}"),
            "cluster.parameters has slurm_ntasks_per_node 4: expected 1, a job trains in one process",
        ),
        (
            ("--cluster=slurm", "--cluster.parameters={slurm_gpus_per_node: 4}"),
            "cluster.parameters has slurm_gpus_per_node: give cluster.gpus_per_node",
        ),
        (("--cluster=local", "--cluster.gpus_per_node=1"), "would all have its first GPU: give --array 1"),
        (("--cluster=local", "--cluster.gpus_per_node=1", "--array=2"), "would all have its first GPU: give --array 1"),
        (("--cluster=local", "--open"), "--open has no page to show before the jobs end: give it with --collect"),
        (("--cluster=local", "--cluster.timeout_min=0"), "cluster.timeout_min is 0: expected"),
        (("--cluster=local", "--cluster.parameters={slurm_no: 1}"), "Unknown argument 'no' for executor 'slurm'"),
        (("--cluster=local", "--array=0"), "--array is 0: expected"),
        (("--array=2",), "--array needs --cluster slurm or --cluster local"),
        (("--cluster=local", "--jobs=2"), "--jobs is for processes of this command: give --array with --cluster"),
        (("--cluster=local", "--trainer.devices=2"), "a job trains in one process: compare on one device, not on 2"),
        (("--cluster=local", "--student.name=timm:resnt18"), "did you mean 'resnet18'"),
    ],
)
def test_mistakes_are_found_before_a_job(tiny_file, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(submitit.LocalExecutor, "submit", lambda *_: pytest.fail("a job was submitted"))
    assert cli.main(["compare", str(tiny_file), f"--out={tmp_path}/out", *arguments]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_a_folder_without_jobs_is_not_collected(tmp_path, capsys):
    assert cli.main(["compare", "--collect", str(tmp_path)]) == 2
    assert (
        "is not the folder of a comparison that ran as jobs: it has no jobs/submitted.json" in capsys.readouterr().err
    )


def children(process):
    """The processes that one has started."""
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(each) for each in found.read_text().split()] if found.exists() else []


def until(what, seconds=240):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs the processes of Linux")
@pytest.mark.parametrize("how", [signal.SIGUSR2, signal.SIGUSR1, signal.SIGKILL])
def test_a_comparison_on_this_machine(tiny, tiny_file, tmp_path, how, capsys, monkeypatch):
    """Whole, by the command; a job is preempted, or killed and the command given again, and the end is the same."""
    if how == signal.SIGUSR1:  # as clusters do that send another signal than submitit's own
        monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    out, given = tmp_path / "out", (*TEACHER, "--training.epochs=12", "--data.train_limit=400")
    command = [sys.executable, "-m", "matchdistill", "compare", str(tiny_file), f"--out={out}", *given]
    command += [f"--methods={','.join(METHODS)}", "--seeds=1", "--cluster=local", "--array=1"]

    def run():
        with (tmp_path / "told").open("w+") as told:  # a pipe would stay open until the jobs end
            done = subprocess.run(command, stdout=told, stderr=told, check=False)
            told.seek(0)
            text = told.read()
        assert done.returncode == 0, text
        return text

    assert re.search(r"^job \d+: none seed 0, mgd-amp seed 0$", run(), re.MULTILINE)
    cell = out / "cells" / "mgd-amp" / "seed0"
    until((cell / "last.ckpt").exists)
    job = json.loads((out / "jobs" / "submitted.json").read_text())["jobs"][-1]
    (task,) = children(int(job["job"]))
    os.kill(task, signal.SIGTERM)  # which comes before, and is not the end
    time.sleep(1)
    assert children(int(job["job"])) == [task]
    os.kill(task, how)
    assert read_metrics(cell) is None
    if how == signal.SIGKILL:
        until(lambda: not Path(f"/proc/{job['job']}").exists())
        assert cli.main(["compare", f"--collect={out}"]) == 2
        said = (
            rf"1 of 2 runs are missing: mgd-amp seed 0 has begun and goes on from its last epoch \(log: {job['log']}\)"
        )
        assert re.search(said, capsys.readouterr().err)
        assert re.search(r"^job \d+: mgd-amp seed 0$", run(), re.MULTILINE)
    until((out / "metrics.json").exists)
    until(lambda: not (out / LOCK).exists())  # its writer goes on to the table
    if how != signal.SIGKILL:
        told = Path(job["log"]).read_text() + Path(job["log"]).with_suffix(".out").read_text()
        assert "Bypassing signal SIGTERM" in told
        assert "this job is preempted" in told
        assert f"Requeued job {job['job']}" in told
    assert cli.main(["compare", "--collect", str(out)]) == 0
    assert "mgd-amp" in capsys.readouterr().out
    threads = torch.get_num_threads()
    expected = compare(tiny(*given), tmp_path / "plain", METHODS, 1)
    assert torch.get_num_threads() == threads
    assert timeless(collect(out).runs) == timeless(expected.runs)
    assert same(out, tmp_path / "plain")
