"""The runs of a comparison as jobs of a cluster, which submitit hands to its scheduler."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from matchdistill import ending
from matchdistill.data.module import Sources
from matchdistill.files import atomic_write, read_json, write_json
from matchdistill.locking import LOCK, held, is_locked
from matchdistill.messages import cause, listed, number, whole
from matchdistill.runs.compare import Cell, Compared, finish, prepare, run_cell, told, train_teacher
from matchdistill.runs.metrics import RunMetrics, read_metrics
from matchdistill.runs.recipe import Recipe, resolved_config
from matchdistill.runs.store import CELLS, CHECKPOINT, RECIPE

JOBS = "jobs"  # what submitit writes, and why a run has failed
SUBMITTED = f"{JOBS}/submitted.json"
TEACHER = "teacher"
# Submitit's parameters for more than a process with its device.
ONE = ("nodes", "tasks_per_node", "ntasks_per_node", "gpus_per_task", "num_gpus")
MOST_MINUTES = 60 * 24 * 366
PREFIX = "slurm_"  # of submitit's parameters for Slurm alone


@dataclass
class Cluster:
    """Where the runs of a comparison run as jobs, which submitit submits.

    Args:
        name: slurm, or local for processes of this machine; null: no jobs.
        timeout_min: minutes that a job may take at a time; a run that is not done then goes on in its job's next turn.
        max_num_timeout: how many turns more a job gets (Slurm only).
        gpus_per_node: 1 for a GPU to each job; null: none is asked for.
        cpus_per_task: cores of a job (Slurm only); null: as Slurm has it.
        mem_gb: memory of a job (Slurm only); null: as Slurm has it.
        partition: of Slurm.
        account: of Slurm.
        qos: of Slurm, the quality of service.
        constraint: of Slurm, features of the machines.
        parameters: further ones of submitit by its own names, {slurm_exclude: node7, slurm_setup: [module load cuda]}.
    """

    sources: ClassVar[Sources] = {
        "submitit": (
            "timeout_min",
            "max_num_timeout",
            "gpus_per_node",
            "cpus_per_task",
            "mem_gb",
            "partition",
            "account",
            "qos",
            "constraint",
            "parameters",
        )
    }
    prefixed: ClassVar[tuple[str, ...]] = ("partition", "account", "qos", "constraint")  # by submitit
    of_slurm: ClassVar[tuple[str, ...]] = (*prefixed, "cpus_per_task", "mem_gb", "max_num_timeout")

    name: Literal["slurm", "local"] | None = None
    timeout_min: int = 60 * 24
    max_num_timeout: int = 100
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values."""
        yield from whole(f"{prefix}.timeout_min", self.timeout_min, 1, MOST_MINUTES)
        yield from whole(f"{prefix}.max_num_timeout", self.max_num_timeout, 0)
        yield from whole(f"{prefix}.gpus_per_node", self.gpus_per_node, 0, 1, ": a job trains on one device")
        yield from whole(f"{prefix}.cpus_per_task", self.cpus_per_task, 1)
        if self.mem_gb is not None:
            yield from number(f"{prefix}.mem_gb", self.mem_gb, 0, above=True)
        for name, value in self.parameters.items():
            known = name.removeprefix(PREFIX).removeprefix("local_")
            if known == "gpus_per_node":
                yield f"{prefix}.parameters has {name}: give {prefix}.gpus_per_node"
            if known in ONE and value != 1:
                yield f"{prefix}.parameters has {name} {value}: expected 1, a job trains in one process on one device"
        changed = [name for name, value in asdict(self).items() if value != asdict(Cluster())[name]]
        if self.name is None and changed:
            yield f"{prefix}.{changed[0]} needs --cluster slurm or --cluster local"
        if self.name == "local" and (given := [name for name in self.of_slurm if name in changed]):
            yield f"{prefix}.{given[0]} is for Slurm only: leave it out with --cluster local"

    def executor(self, folder: Path, at_once: int | None) -> Any:
        """What submits jobs.

        Args:
            folder: where their logs go.
            at_once: how many jobs of an array run at a time; None: all.

        Raises:
            ValueError: the package or the scheduler is missing, or parameters that it does not have.
        """
        try:
            import submitit
        except ImportError as error:
            raise ValueError(f"--cluster needs {error.name}: pip install 'matchdistill[cluster]'") from error
        given = {name: getattr(self, name) for name in ("timeout_min", "gpus_per_node", "cpus_per_task", "mem_gb")}
        given |= {f"{PREFIX}{name}": getattr(self, name) for name in self.prefixed}
        if at_once is not None and self.name == "slurm":
            given[f"{PREFIX}array_parallelism"] = at_once
        try:
            executor = submitit.AutoExecutor(folder, self.name, slurm_max_num_timeout=self.max_num_timeout)
            executor.update_parameters(name="matchdistill", **given | self.parameters)
        except Exception as error:  # it asserts, and fails in other ways
            raise ValueError(f"jobs of {self.name} cannot be set up ({cause(error)})") from error
        return executor


class NotDoneError(ValueError):
    """A comparison of which runs are missing, or whose table another process is about to write."""


class Submitted(NamedTuple):
    """A job of a comparison.

    Attributes:
        job: its number; of local ones, of its process.
        log: the file with its errors.
        runs: what it runs: "teacher", or such as "kd seed 0".
    """

    job: str
    log: str
    runs: list[str]


@dataclass
class Work:
    """What a job does: runs of a comparison one after the other; none stands for its teacher.

    Called in the job. The scheduler can cut it at any time: called again, it goes on with the last whole epoch.
    """

    config: dict[str, Any]
    out: Path
    cells: list[Cell]
    threads: int | None = None  # their number changes sums a little; None: as the job has cores

    def __call__(self) -> None:
        """Do it.

        Raises:
            RuntimeError: of what has failed.
            ValueError: all runs are done, but their table cannot be made.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        with ending.of_others():
            runs: list[Cell | None] = [*self.cells] or [None]
            failed = [text for each in runs if (text := self._failure(each)) is not None]
            if failed:
                raise RuntimeError("; ".join(failed))
            if self.cells:
                with contextlib.suppress(NotDoneError):
                    collect(self.out)

    def checkpoint(self) -> Any:
        """The same again: what is done is in the folders of the runs."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _failure(self, cell: Cell | None) -> str | None:
        """Do a run; returns what went wrong in it."""
        error = _error_of(self.out, cell)
        error.unlink(missing_ok=True)
        outcome: RunMetrics | str
        if cell is not None:
            outcome = run_cell(self.config, cell, self.out)
        else:
            try:
                outcome = train_teacher(Recipe.of(self.config), self.out)
            except (Exception, ending.OutOfTime) as problem:  # as of the other runs
                outcome = f"{type(problem).__name__}: {problem}"
        print(f"{_named(cell)}: {outcome if isinstance(outcome, str) else told(outcome)}", flush=True)
        if isinstance(outcome, str):
            text = outcome
            atomic_write(error, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))
            return f"{_named(cell)} failed with {outcome}"
        return None


def submit(
    recipe: Recipe, out: Path, methods: Sequence[str], seeds: int, cluster: Cluster, at_once: int | None = None
) -> list[Submitted]:
    """Have the runs of a comparison done by jobs; called again, of all that is not done yet.

    Args:
        recipe: what to run.
        out: folder of the comparison, which the jobs must see by the same name.
        methods: distillation methods.
        seeds: runs per method.
        cluster: where.
        at_once: how many jobs run at a time; None: all. On this machine each job does several runs then.

    Returns:
        The jobs. The last one to end writes the table and the page, as `collect` does.

    Raises:
        ValueError: it cannot be run so, or jobs of an earlier call are not over.
        RuntimeError: the scheduler does not take them, or the teacher has failed in a local job.
    """
    _check_devices(recipe, cluster, at_once)
    methods, out = list(dict.fromkeys(methods)), out.absolute()
    executor = cluster.executor(out / JOBS, at_once)
    with held(out):
        if going := [each for each in _submitted(out) if _is_going_on(out, each)]:
            raise ValueError(
                f"{out} has jobs that are not over: {listed(each.job for each in going)}; wait for them, or cancel "
                f"them (if they are of others, or Slurm does not know them any more, remove {out / SUBMITTED})"
            )
        cells, needs_teacher = prepare(recipe, out, methods, seeds)
        (out / JOBS).mkdir(exist_ok=True)
        missing = [cell for cell in cells if read_metrics(out / cell.folder) is None]
        threads = None
        if cluster.name == "local":  # as by --jobs, whatever is missing
            threads = max(1, torch.get_num_threads() // (at_once or len(cells)))
        submitted: list[Submitted] = []

        def note() -> None:
            jobs = [each._asdict() for each in submitted]
            place = {"cluster": cluster.name, "host": socket.gethostname()}
            write_json(out / SUBMITTED, {**place, "methods": methods, "seeds": seeds, "jobs": jobs})

        with _refused(cluster):
            if needs_teacher and missing and read_metrics(out / TEACHER) is None:
                job = executor.submit(Work(recipe.config, out, [], threads))
                submitted.append(Submitted(job.job_id, str(job.paths.stderr), [TEACHER]))
                note()
                _after(executor, job, out, cluster)
            shares = [[cell] for cell in missing]
            if cluster.name == "local" and at_once is not None:  # whose jobs all run at once
                shares = [share for start in range(at_once) if (share := missing[start::at_once])]
            with executor.batch() if shares else contextlib.nullcontext():
                jobs = [executor.submit(Work(recipe.config, out, share, threads)) for share in shares]
        for job, share in zip(jobs, shares, strict=True):
            submitted.append(Submitted(job.job_id, str(job.paths.stderr), list(map(_named, share))))
        note()
    return submitted


def _check_devices(recipe: Recipe, cluster: Cluster, at_once: int | None) -> None:
    """Raise a ValueError unless each job has one device for itself."""
    if recipe.trainer.devices != 1 or recipe.trainer.num_nodes != 1:
        raise ValueError(f"a job trains in one process: compare on one device, not on {recipe.trainer.devices}")
    if cluster.name == "local" and cluster.gpus_per_node and at_once != 1:
        raise ValueError(
            "jobs on this machine would all have its first GPU: give --array 1, or leave out gpus_per_node"
        )


def _after(executor: Any, teacher: Any, out: Path, cluster: Cluster) -> None:
    """Have the jobs that follow start when the teacher is there."""
    if cluster.name == "slurm":
        own = dict(cluster.parameters.get(f"{PREFIX}additional_parameters", {}))
        own |= {"dependency": f"afterok:{teacher.job_id}", "kill-on-invalid-dep": "yes"}
        executor.update_parameters(slurm_additional_parameters=own)
        return
    teacher.wait()
    if read_metrics(out / TEACHER) is None:
        raise RuntimeError(_of_failure(out, None, str(teacher.paths.stderr)))


@contextlib.contextmanager
def _refused(cluster: Cluster) -> Iterator[None]:
    """Tell in one line what the scheduler says."""
    try:
        yield
    except (RuntimeError, KeyboardInterrupt):
        raise
    except Exception as error:  # of submitit and of the commands that it calls
        raise RuntimeError(f"{cluster.name} does not take the jobs ({cause(error)})") from error


def collect(out: Path) -> Compared:
    """Make the table and the page of a comparison whose runs were jobs.

    Raises:
        NotDoneError: another process writes there, or runs are missing: which, why, and where their logs are.
        ValueError: the folder is of no such comparison, or its files are damaged.
    """
    if not (out / SUBMITTED).is_file() or not (out / RECIPE).is_file():
        raise ValueError(
            f"{out} is not the folder of a comparison that ran as jobs: it has no {SUBMITTED}, which --cluster writes"
        )
    out = out.absolute()
    values = read_json(out / SUBMITTED, methods=list[str], seeds=int, jobs=list[dict[str, object]])
    config = resolved_config(out / RECIPE)
    cells = [Cell(method, config["seed"] + each) for each in range(values["seeds"]) for method in values["methods"]]
    runs = {cell: found for cell in cells if (found := read_metrics(out / cell.folder)) is not None}
    if missing := [cell for cell in cells if cell not in runs]:
        logs = {name: each.log for each in _submitted(out) for name in each.runs}
        rows = [_of_failure(out, cell, logs.get(_named(cell))) for cell in missing]
        if TEACHER in logs and read_metrics(out / TEACHER) is None:
            rows.insert(0, _of_failure(out, None, logs.get(TEACHER)))
        raise NotDoneError(f"{len(missing)} of {len(cells)} runs are missing: {'; '.join(rows)}")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(out))
        except ValueError as error:
            raise NotDoneError(str(error)) from error
        return finish(config, values["methods"], [runs[cell] for cell in cells], out)


def _of_failure(out: Path, cell: Cell | None, log: str | None) -> str:
    """Why a run is not there."""
    folder, error = out / (TEACHER if cell is None else cell.folder), _error_of(out, cell)
    if error.is_file():
        state = f"failed with {' '.join(error.read_text('utf-8', 'replace').split())}"
    elif (folder / LOCK).is_file() and is_locked(folder / LOCK):
        state = "is running"
    elif (folder / CHECKPOINT).is_file():
        state = "has begun and goes on from its last epoch"
    else:
        state = "has not begun, or not ended its first epoch"
    return f"{_named(cell)} {state}" + ("" if log is None else f" (log: {log})")


def _named(cell: Cell | None) -> str:
    return TEACHER if cell is None else f"{cell.method} seed {cell.seed}"


def _error_of(out: Path, cell: Cell | None) -> Path:
    """The file that says why a run has failed."""
    return out / JOBS / f"{TEACHER if cell is None else '.'.join(cell.folder.relative_to(CELLS).parts)}.error"


def _submitted(out: Path) -> list[Submitted]:
    """The jobs of the last call."""
    if not (out / SUBMITTED).is_file():
        return []
    try:
        return [Submitted(**each) for each in read_json(out / SUBMITTED, jobs=list[dict[str, object]])["jobs"]]
    except TypeError as error:
        raise ValueError(f"{out / SUBMITTED} is damaged, or of another version ({cause(error)})") from error


def _is_going_on(out: Path, submitted: Submitted) -> bool:
    """Whether a job waits or runs."""
    values = read_json(out / SUBMITTED, cluster=str, host=str)
    import submitit

    if values["cluster"] == "slurm":
        return not submitit.SlurmJob(out / JOBS, submitted.job).done(force_check=True)
    if values["host"] != socket.gethostname() or (
        submitit.LocalJob(out / JOBS, submitted.job).paths.result_pickle.exists()
    ):
        return False  # of another machine nobody here can tell, but runs that go on hold their folders
    with contextlib.suppress(OSError):
        os.kill(int(submitted.job), 0)
        return True
    return False
