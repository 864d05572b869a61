"""What one evaluation asks for, checked before the weights are read, then carried out: held-out data, text, tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import glob

from deepv3.config.schema import Config, SourceConfig, knob
from deepv3.data.tokenizer import Tokenizer
from deepv3.errors import ConfigError, DataError
from deepv3.eval.score import Extend
from deepv3.model.transformer import Transformer


@dataclass
class Request:
    """Arguments of launch/eval.py that say what to measure."""

    sequences: int | None = knob(None, "Held-out sequences; null takes train.eval_sequences.")
    text: str = knob("", "File or folder whose documents are scored one by one.")
    format: str = knob("auto", "Of the files of text, see data.sources.")
    field: str = knob("text", "Column of their documents.")
    suffixes: list[str] = knob([], "Files taken of a folder of text.")
    tasks: list[str] = knob([], "Tasks of lm_eval: names or YAML files.")
    limit: int | None = knob(None, "Examples of each task.")
    num_fewshot: int | None = knob(None, "Examples in front of each question; null leaves it to the task.")
    length: int | None = knob(None, "Longest input for text and tasks, tokens.")


def evaluate(
    request: Request,
    cfg: Config,
    tokenizer: Tokenizer,
    load: Callable[[], Transformer],
    held: bool,
    extend: Extend,
    say: Callable[[str], None],
) -> dict:
    """Carry out `request`; returns every figure by name and tells each as a line.

    held: whether to measure on what cfg.data holds out. load: reads the weights; extend: continues prompts,
    for tasks that ask for text. Raises ConfigError or DataError.
    """
    length = checked_length(request, cfg, tokenizer)
    tasks = _harness(request.tasks).load_tasks(request.tasks) if request.tasks else {}
    from deepv3.eval.perplexity import documents, held_out

    model, out = load(), {}
    if held:
        figures = held_out(model, cfg, tokenizer, request.sequences)
        out["held_out"] = figures.as_dict()
        _tell(figures.describe(), say)
    if request.text:
        source = SourceConfig(request.text, request.format, field=request.field, suffixes=request.suffixes)
        figures = documents(model, tokenizer, source, length, cfg.data.cache_dir)
        out["text"] = figures.as_dict()
        _tell(figures.describe(), say)
    if tasks:
        harness = _harness(request.tasks)
        adapter = harness.Adapter(model, tokenizer, length, extend)
        out["tasks"], table = harness.run(adapter, tasks, request.limit, request.num_fewshot)
        say(table)
    return out


def checked_length(request: Request, cfg: Config, tokenizer: Tokenizer) -> int:
    """Longest input for text and tasks. Raises ConfigError or DataError for what cannot be evaluated."""
    length, reach = request.length or cfg.data.seq_len, cfg.model.max_position_embeddings
    if not 2 <= length <= reach:
        raise ConfigError(
            f"length = {length} must be at least 2 and at most model.max_position_embeddings = {reach}; set length"
        )
    if request.text and not glob(request.text):
        raise DataError(f"text={request.text} is no file, folder or pattern that fits one; give a path that exists")
    if (request.text or request.tasks) and tokenizer.eos is None:
        raise DataError("the tokenizer has no eos token to put in front of a text; set it in its tokenizer_config.json")
    return length


def _harness(tasks: Sequence[str]):
    """The adapter's file, imported only now: it needs a package that training does not."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"tasks = {list(tasks)} needs the package lm_eval, which cannot be imported ({error}): "
            "pip install lm_eval, or leave tasks out"
        ) from None
    from deepv3.eval import harness

    return harness


def _tell(lines: Sequence[str], say: Callable[[str], None]) -> None:
    for line in lines:
        say(line)
