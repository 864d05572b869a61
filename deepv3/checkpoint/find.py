"""Which checkpoint a run starts from, and whether the run folder is this run's at all."""

import shutil
from logging import getLogger
from pathlib import Path

from deepv3.checkpoint import manifest as manifests
from deepv3.checkpoint.publish import step_of, steps
from deepv3.checkpoint.reader import Reader
from deepv3.config.compose import differences
from deepv3.config.schema import Config
from deepv3.config.typed import build
from deepv3.dist import Grid
from deepv3.errors import CheckpointError, ConfigError

FOLDER = "checkpoints"
log = getLogger(__name__)


def newest(run_dir: Path, grid: Grid | None = None) -> Path | None:
    """The newest checkpoint of a run that is complete and whose hashes are right; None where there is none at all.

    With a grid, all ranks call it and share the reading. Damaged ones are named in the log and passed over; raises
    CheckpointError where every one is damaged, because starting afresh would bury them.
    """
    grid = grid or Grid(1, 0)
    folder = Path(run_dir) / FOLDER
    seen = grid.gather([path.name for path in steps(folder)])  # a disk of one node may lack what another published
    candidates = [folder / name for name in seen[0] if all(name in names for names in seen)]
    damaged = []
    for path in candidates:
        wrong = problems(path, grid)
        if not wrong:
            return path
        damaged += wrong
        if grid.rank == 0:
            log.warning("checkpoint %s passed over: %s", path.name, "; ".join(wrong))
    if damaged:
        raise CheckpointError(
            f"{run_dir}: none of its {len(candidates)} checkpoints can be read:\n  " + "\n  ".join(damaged) + "\n"
            "give train.resume the path of another one, or start afresh in another run_dir"
        )
    return None


def problems(path: Path, grid: Grid) -> list[str]:
    """What keeps a checkpoint from being read, in words: files, sizes, hashes. Collective; the ranks share the work.

    Each shard is looked at by one rank; one that lies on another node's disk, by the first rank that sees it.
    """

    def look() -> tuple[list[str], list[str]]:
        try:
            return Reader(path, complete=False).verify(grid.rank, grid.world_size)
        except CheckpointError as error:
            return [str(error)], []

    found = grid.gather(look())
    wrong = [problem for here, _ in found for problem in here]
    absent = [name for _, names in found for name in names]
    if absent and not wrong:
        reader = Reader(path, complete=False)
        elsewhere = {name: reader.look_at(name) for name in absent if (path / name).exists()}
        known = [rank for rank in grid.gather(elsewhere) if rank]
        for name in absent:
            results = [rank[name] for rank in known if name in rank]
            wrong += results[:1] if results else [f"{path / name}: missing, so the checkpoint is incomplete"]
    return list(dict.fromkeys(problem for problem in wrong if problem))


def other_checkpoints(path: Path) -> str:
    """What to do about a checkpoint that cannot be read: the ones beside it, newest first."""
    beside = [other for other in steps(path.parent) if other.name != path.name]
    before = [other for other in beside if manifests.STEP.fullmatch(path.name) and step_of(other) < step_of(path)]
    if not beside:
        return f"Give train.resume another checkpoint; {path.parent} holds none"
    return f"Give train.resume another checkpoint, e.g. train.resume={(before or beside)[0]}"


def choose(cfg: Config, grid: Grid) -> Path | None:
    """The checkpoint that train.resume names; None to start afresh. Collective.

    auto: run_dir's newest sound one. never: none, and what run_dir holds is put aside in checkpoints.replaced.
    A path: that checkpoint, or the newest one of the run in that folder. A path outside run_dir is where a run begins:
    once run_dir has a sound checkpoint of its own, a restart goes on from that.
    """
    run_dir = Path(cfg.run_dir)
    if cfg.train.resume == "never":
        if grid.rank == 0 and (run_dir / FOLDER).exists():
            shutil.rmtree(run_dir / f"{FOLDER}.replaced", ignore_errors=True)
            (run_dir / FOLDER).rename(run_dir / f"{FOLDER}.replaced")
        grid.barrier()
        return None
    if cfg.train.resume == "auto":
        return newest(run_dir, grid)
    path = Path(cfg.train.resume)
    if not path.resolve().is_relative_to(run_dir.resolve()) and (own := newest(run_dir, grid)) is not None:
        return own
    if (path / FOLDER).is_dir():
        path = newest(path, grid) or path
    return path


def check_run_folder(run_dir: Path, cfg: Config) -> None:
    """Refuse to continue a run under another config. Raises CheckpointError naming each field with both values.

    Which fields a run may change is config.compose.FREE; train.resume=never starts another run and changes any.
    """
    if cfg.train.resume == "never":
        return
    for path in steps(Path(run_dir) / FOLDER):
        try:
            stored = build(Config, manifests.read(path).config)
        except (CheckpointError, ConfigError) as error:
            log.warning("%s: config not compared: %s", path, error)
            continue
        differing = differences(stored, cfg)
        if differing:
            raise CheckpointError(
                f"{run_dir} belongs to another run; {path.name} was made with (stored -> wanted):\n  "
                + "\n  ".join(differing)
                + "\nset these fields back, choose another run_dir, or start over with train.resume=never"
            )
        return
