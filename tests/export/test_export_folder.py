"""What stands on the disk after an export: whole, readable by others, in place of nothing that is not ours."""

import errno
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_run import SMALL

from deepv3.errors import CheckpointError, ConfigError, ResourceError
from deepv3.export import shards, staging
from deepv3.export.hf import export
from deepv3.export.verify import verify

WEIGHTS = "model.safetensors"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def hidden(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.startswith(".")]


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_small_model_is_one_file_without_index_and_obeys_the_umask(make_run, tmp_path):
    run = make_run()
    old = os.umask(0o027)
    try:
        folder = export(run.dir, tmp_path / "hf")
    finally:
        os.umask(old)
    required = {
        WEIGHTS,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert required <= names(folder) and shards.INDEX not in names(folder)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
    assert folder.stat().st_mode & 0o777 == 0o750
    assert not hidden(tmp_path)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == json.loads((folder / "config.json").read_text())["eos_token_id"]


def test_shards_are_listed_in_the_index_and_mtp_lies_alone_in_the_last_ones(make_run, tmp_path):
    run = make_run(num_nextn_predict_layers=2)
    folder = export(run.dir, tmp_path / "hf", shard_bytes=40_000)
    index = json.loads((folder / shards.INDEX).read_text())
    files = sorted(name for name in names(folder) if name.endswith(".safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    found, total = {}, 0
    for file in files:
        assert (folder / file).stat().st_size < 45_000
        with safe_open(folder / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        found |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == found and index["metadata"]["total_size"] == total
    of_mtp = {name for name in found if name.startswith(("model.layers.3.", "model.layers.4."))}
    alone = sorted({found[name] for name in of_mtp})
    assert alone == files[-len(alone) :]
    assert {name for name in found if found[name] in alone} == of_mtp
    assert verify(folder, run.dir)["logits_relative_difference"] <= 1e-5


def test_an_experts_matrices_never_part(make_run, tmp_path):
    folder = export(make_run().dir, tmp_path / "hf", shard_bytes=5_000)  # little more than an expert's 3 x 1024 bytes
    where = json.loads((folder / shards.INDEX).read_text())["weight_map"]
    for e in range(SMALL.n_routed_experts):
        files = {file for name, file in where.items() if name.startswith(f"model.layers.2.mlp.experts.{e}.")}
        assert len(files) == 1


def unit(layer: int, size: int, apart: bool = False) -> shards.Unit:
    return shards.Unit((), layer, apart, {f"{layer}/{size}": torch.empty(size, dtype=torch.uint8, device="meta")})


def sizes(plan) -> list[list[int]]:
    return [[u.nbytes for u in units] for _, units in plan]


def test_layers_stay_whole_where_they_fit_and_mtp_starts_a_file():
    plan = shards.plan([unit(0, 4), unit(1, 3), unit(1, 2), unit(2, 3), unit(3, 1, apart=True)], 9)
    assert sizes(plan) == [[4, 3, 2], [3], [1]]
    plan = shards.plan([unit(0, 4), unit(1, 4), unit(1, 2), unit(2, 3)], 9)
    assert sizes(plan) == [[4], [4, 2, 3]]


def test_a_layer_larger_than_a_file_begins_one_and_is_cut_between_units():
    plan = shards.plan([unit(0, 2), unit(1, 4), unit(1, 4), unit(1, 4), unit(2, 5)], 9)
    assert sizes(plan) == [[2], [4, 4], [4, 5]]
    assert sizes(shards.plan([unit(0, 2), unit(1, 20)], 9)) == [[2], [20]]


def test_wider_numbers_lie_first_so_that_every_tensor_is_aligned(tmp_path):
    tensors = {"odd": torch.ones(3, dtype=torch.bfloat16), "wide": torch.tensor([1.5, 2.5])}
    with shards.ShardFile(tmp_path / "x.safetensors", tensors) as file:
        for name in tensors:
            file.put(name, tensors[name])
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in tensors.items())
    header = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert length % 8 == 0 and json.loads(header[8 : 8 + length])["wide"]["data_offsets"] == [0, 8]


# -- the place -------------------------------------------------------------------------------------------------------


def test_an_export_of_ours_is_replaced(make_run, tmp_path):
    run = make_run(step=7)
    export(run.dir, tmp_path / "hf", "float32")
    run = make_run(step=8)
    folder = export(run.dir, tmp_path / "hf")
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert verify(folder, run.dir)["logits_positions"] > 0
    assert not hidden(tmp_path)


def test_replacing_works_where_folders_cannot_be_exchanged(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_exchange", lambda a, b: False)
    run = make_run()
    export(run.dir, tmp_path / "hf", "float32")
    folder = export(run.dir, tmp_path / "hf")
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16" and not hidden(tmp_path)


@pytest.mark.parametrize("what", ["a foreign folder", "a foreign file in an export", "a file", "the run folder"])
def test_what_is_not_ours_is_never_replaced(what, make_run, tmp_path):
    run = make_run()
    output = tmp_path / "hf"
    if what == "a foreign folder":
        output.mkdir()
        (output / "thesis.txt").write_text("mine")
    elif what == "a foreign file in an export":
        (export(run.dir, output) / "thesis.txt").write_text("mine")
    elif what == "a file":
        output.write_text("mine")
    else:
        output = run.dir
    before = names(output) if output.is_dir() else output.read_text()
    with pytest.raises(ConfigError, match="output=.*(thesis|not an export|is a file)"):
        export(run.dir, output)
    assert (names(output) if output.is_dir() else output.read_text()) == before
    assert not hidden(tmp_path)


def test_an_empty_folder_is_a_place_to_write(make_run, tmp_path):
    (tmp_path / "hf").mkdir()
    assert WEIGHTS in names(export(make_run().dir, tmp_path / "hf"))


def test_two_exports_to_one_output_do_not_meet(make_run, tmp_path):
    run = make_run()
    with staging.staged(tmp_path / "hf", 0), pytest.raises(CheckpointError, match="another export to it is under way"):
        export(run.dir, tmp_path / "hf")
    assert WEIGHTS in names(export(run.dir, tmp_path / "hf"))


def test_too_small_a_disk_is_refused_before_anything_is_written(make_run, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    run = make_run()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(ResourceError, match="needs 0.06 GiB, but .* has 0.00 GiB free.*another disk"):
        export(run.dir, tmp_path / "hf")
    assert names(tmp_path) == {"run"}


def test_a_disk_that_fills_up_leaves_the_old_export(make_run, tmp_path, monkeypatch):
    run = make_run()
    folder = export(run.dir, tmp_path / "hf", "float32")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(self, name, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.ShardFile, "put", full)
    with pytest.raises(ResourceError, match="disk filled up"):
        export(run.dir, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and not hidden(tmp_path)


def export_and_die(run_dir: Path, output: Path) -> None:
    """Killed in the middle of the weights."""
    written = shards.ShardFile.put

    def put(self, name, tensor):
        written(self, name, tensor)
        if len(self._missing) == 20:
            os.kill(os.getpid(), signal.SIGKILL)

    shards.ShardFile.put = put
    export(run_dir, output)


def test_a_killed_export_leaves_no_half_one_and_the_next_one_succeeds(make_run, tmp_path):
    run = make_run()
    child = multiprocessing.get_context("fork").Process(target=export_and_die, args=(run.dir, tmp_path / "hf"))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "hf").exists()
    assert hidden(tmp_path), "the test must have died inside the export"
    verify(export(run.dir, tmp_path / "hf"), run.dir)
    assert not hidden(tmp_path)


# -- the checkpoint --------------------------------------------------------------------------------------------------


def test_a_run_folder_gives_its_newest_complete_checkpoint(make_run, tmp_path):
    make_run(step=7)
    run = make_run(step=9)
    (run.checkpoint / "manifest.json").unlink()
    marker = json.loads((export(run.dir, tmp_path / "hf") / "deepv3_export.json").read_text())
    assert marker["step"] == 7


@pytest.mark.parametrize("damage", ["manifest missing", "shard missing", "shard cut", "shard altered"])
def test_an_incomplete_checkpoint_is_refused_by_the_name_of_its_file(damage, make_run, tmp_path):
    checkpoint = make_run().checkpoint
    shard = checkpoint / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "manifest missing":
        (checkpoint / "manifest.json").unlink()
    elif damage == "shard missing":
        shard.unlink()
    elif damage == "shard cut":
        shard.write_bytes(content[:-100])
    else:
        content[-100] ^= 1
        shard.write_bytes(content)
    file = "manifest.json" if damage == "manifest missing" else shard.name
    for source in (checkpoint, checkpoint.parent.parent):
        with pytest.raises(CheckpointError, match=file):
            export(source, tmp_path / "hf")
    assert names(tmp_path) == {"run"}


def test_a_checkpoint_without_one_of_its_models_tensors_is_refused(make_run, tmp_path, monkeypatch):
    run = make_run()
    from deepv3.checkpoint.reader import Reader

    whole = Reader.__init__

    def incomplete(self, *arguments, **options):
        whole(self, *arguments, **options)
        del self.shapes["layers.1.mlp.experts.down_proj.weight"]

    monkeypatch.setattr(Reader, "__init__", incomplete)
    with pytest.raises(CheckpointError, match="layers.1.mlp.experts.down_proj.weight is missing"):
        export(run.checkpoint, tmp_path / "hf")


def test_averages_that_were_not_kept_are_refused(make_run, tmp_path):
    with pytest.raises(CheckpointError, match="optim.ema_decay=0; use ema=false"):
        export(make_run().dir, tmp_path / "hf", ema=True)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="source=.*is no folder"):
        export(tmp_path / "nowhere", tmp_path / "hf")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        export(tmp_path / "run", tmp_path / "hf")


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command():
    path = Path(__file__).parents[2] / "launch" / "export_hf.py"
    spec = importlib.util.spec_from_file_location("launch_export_hf", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_command_exports_and_verifies(command, make_run, tmp_path, capsys):
    run = make_run()
    command([f"source={run.dir}", f"output={tmp_path / 'hf'}", "dtype=float32", "verify=true"])
    out = capsys.readouterr().out
    assert str(tmp_path / "hf") in out and "nothing missing" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output=x"], "source and output are both needed"),
        (["sourc=x", "output=x"], "Did you mean source"),
        (["source=x", "output=x", "+typo=1"], "typo"),
        (["source=x", "output=x", "ema=maybe"], "ema='maybe'"),
        (["source=x", "output=x", "dtype=int8"], "dtype=int8.*bfloat16, float8, float32"),
    ],
)
def test_the_command_refuses(command, arguments, message):
    with pytest.raises(ConfigError, match=message):
        command(arguments)
