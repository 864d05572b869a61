"""What one release of transformers makes of our exports; run by test_versions.py with that release on PYTHONPATH.

python version_child.py RUNS WORK        prints one JSON object: transformers' version, figures by export
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from deepv3.checkpoint.reader import Reader
from deepv3.export.importer import import_hf
from deepv3.export.load import load_export
from deepv3.export.verify import verify


def comes_back(folder: Path, run: Path, work: Path) -> dict:
    """Load and save with this release, then import: the spelling it writes, and whether our main weights return."""
    saved = work / f"{folder.name}-saved"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(saved)
    hf = json.loads((saved / "config.json").read_text())
    made = import_hf(saved, work / f"{folder.name}-imported")
    back, own = Reader(made.path / "checkpoints" / "step-00000000"), Reader(next((run / "checkpoints").glob("step-*")))
    same = all(torch.equal(back.read(name), own.read(name)) for name in back.shapes)
    return {"spelling": "v5" if "rope_parameters" in hf else "v4", "names": len(back.shapes), "same": same}


def own_fp8_reader(folder: Path) -> dict:
    """transformers' own reading of an FP8 export, dequantised on the CPU, against ours."""
    from transformers import FineGrainedFP8Config

    how = FineGrainedFP8Config(dequantize=True)
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how).float()
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}".splitlines()[0]}
    tokens = torch.randint(theirs.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, ours = theirs(tokens).logits, load_export(folder).logits(tokens)
    return {"relative_difference": ((logits - ours).abs().max() / ours.abs().max()).item()}


def main(runs: Path, work: Path) -> None:
    """runs: one folder per shape, holding run/ and an export per dtype."""
    out: dict = {"version": transformers.__version__, "verified": {}, "saved": {}}
    for shape in sorted(path for path in runs.iterdir() if path.is_dir()):
        for folder in sorted(path for path in shape.iterdir() if path.name != "run"):
            figures = verify(folder, shape / "run")
            out["verified"][f"{shape.name}/{folder.name}"] = figures["logits_relative_difference"]
        out["saved"][shape.name] = comes_back(shape / "float32", shape / "run", work / shape.name)
    out["fp8"] = own_fp8_reader(runs / "whole blocks" / "float8")
    print(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
