"""lm-evaluation-harness on our models. Needs the package lm_eval (0.4.13 tried), which only this file imports.

Tasks are names that lm_eval knows or paths of YAML files; with local `data_files` nothing is fetched. The harness wants
three things of a model: the log-probability of a continuation, of a whole text, and a greedy or drawn continuation up
to a stop string. An empty context is the eos, as in front of every document in training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from deepv3.data.tokenizer import Tokenizer
from deepv3.errors import ConfigError
from deepv3.eval.score import Extend, Row, fitted, score, windows
from deepv3.model.transformer import Transformer

ROWS = 16  # prompts continued at once
NEW_TOKENS = 256  # where a task sets no max_gen_toks, as in the harness's own models


class Adapter(TemplateLM):
    """The model as the harness asks it. length: longest input, tokens; extend: see score.Extend."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, length: int, extend: Extend) -> None:
        super().__init__()
        self.model, self.text, self.length, self.extend = model, tokenizer, length, extend

    @property
    def eot_token_id(self) -> int:
        """What stands in front of an empty context."""
        assert self.text.eos is not None, "checked before the model is read"
        return self.text.eos

    @property
    def max_length(self) -> int:
        """Longest input, tokens."""
        return self.length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of the text alone: training saw no token around it."""
        return self.text.encode(string)

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        rows = [fitted(context, targets, self.length) for _, context, targets in requests]
        return [(result.logprob, result.greedy) for result in score(self.model, rows)]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, every token counted once."""
        rows: list[Row] = []
        ends = []
        for request in requests:
            rows += windows(self.text.encode(request.args[0]), self.eot_token_id, self.length)
            ends.append(len(rows))
        results = [result.logprob for result in score(self.model, rows)]
        return [sum(results[start:end]) for start, end in zip([0, *ends], ends)]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut before the first stop string. Given up: rows run to max_gen_toks or eos, then are cut."""
        texts: dict[int, str] = {}
        for options, numbers in _grouped([request.args[1] for request in requests]).items():
            asked = dict(options)
            stops = asked.get("until") or ()
            new = min(int(asked.get("max_gen_toks", NEW_TOKENS)), self.length - 1)
            drawn = asked.get("do_sample", False)
            temperature = float(asked.get("temperature", 1.0)) if drawn else 0.0
            top_p = float(asked.get("top_p", 1.0)) if drawn else 1.0
            for first in range(0, len(numbers), ROWS):
                chunk = numbers[first : first + ROWS]
                prompts = [self.text.encode(requests[n].args[0]) or [self.eot_token_id] for n in chunk]
                prompts = [prompt[-(self.length - new) :] for prompt in prompts]
                out = self.extend(self.model, prompts, new, temperature, top_p, self.eot_token_id)
                texts |= {n: _cut(self.text.decode(ids, True), stops) for n, ids in zip(chunk, out)}
        return [texts[n] for n in range(len(requests))]


def _grouped(options: Sequence[dict]) -> dict[tuple, list[int]]:
    """Requests with the same options, by number."""
    groups: dict[tuple, list[int]] = {}
    for number, asked in enumerate(options):
        until = asked.get("until", ())
        plain = asked | {"until": (until,) if isinstance(until, str) else tuple(until)}
        groups.setdefault(tuple(sorted(plain.items())), []).append(number)
    return groups


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((text.index(stop) for stop in stops if stop and stop in text), default=len(text))]


def load_tasks(names: Sequence[str]) -> dict:
    """The tasks, their data read. Raises ConfigError, naming the one that cannot be had."""
    known = all(Path(name).suffix in (".yaml", ".yml") for name in names)
    manager = TaskManager(include_defaults=not known)  # looking through the thousands it brings takes seconds
    loaded: dict[str, Any] = {}
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # files, YAML, datasets and the hub raise their own
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ConfigError(
                f"tasks={name}: lm_eval cannot load it ({reason}); give a name it knows or the path of a task's YAML "
                "file, whose data_files are found from here"
            ) from error
        loaded |= found["tasks"]
    return loaded


def run(adapter: Adapter, tasks: dict, limit: int | None = None, num_fewshot: int | None = None) -> tuple[dict, str]:
    """(lm_eval's results by task, its table). limit: examples of each task; num_fewshot: None leaves it to the task."""
    out = simple_evaluate(
        model=adapter,
        tasks=list(tasks.values()),
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        num_fewshot=num_fewshot,
        log_samples=False,
    )
    return out["results"], make_table(out)
