"""From the config to everything that is read while training: the tokenizer and the tokenised sources, made or found.

    data.cache_dir/tokenizers/KEY/   tokenizer.json, tokenizer_config.json of a trained tokenizer
    data.cache_dir/tokens/KEY/       one source: pieces (tokenise.py), tokenizer/, summary.json
    run_dir/tokenizer/               the run's own copy, which its resumes and exports use

A key is a hash over what the content depends on: files with sizes and times, field, tokenizer, FIM rate and seed, held
out share. Changing anything makes a new folder; the old one stays until someone removes it. ``launch/prepare_data.py``
calls ``prepare`` ahead of training, training calls it again and finds the work done. Any number of ranks and runs may
call it at once (cache.py). An interrupted preparation goes on with the pieces that are missing.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deepv3.config.schema import Config, SourceConfig
from deepv3.data import tokenizer as tokenizers
from deepv3.data.cache import build_once, digest, write_json
from deepv3.data.corpus import Source, open_source
from deepv3.data.encoding import PARTS, TRAIN, VALIDATION, Rules
from deepv3.data.packing import SUMMARY, RowShape
from deepv3.data.progress import Bar
from deepv3.data.tokenise import Job, Summary, bad_document, summary_file, tokenise
from deepv3.data.tokenizer import Tokenizer, save_tokenizer
from deepv3.errors import DataError

VERSION = 1  # of the files in a tokens folder; part of their key
MOST_PROCESSES = 8

Say = Callable[[str], None]


@dataclass
class Ready:
    """A source that can be trained or validated on. folder: its tokens, None for a stream; counts: its summary."""

    source: Source
    rules: Rules
    folder: Path | None
    counts: Summary

    def tokens(self, part: str) -> int:
        """Tokens of train or validation; 0 for a stream, which nobody has counted."""
        return self.counts["tokens"][part] if self.folder else 0


@dataclass
class Prepared:
    """What ``prepare`` leaves. shape: of the packed rows. validation is empty where nothing is held out."""

    tokenizer: Tokenizer
    shape: RowShape
    train: list[Ready]
    validation: list[Ready]

    def describe(self) -> list[str]:
        """Lines for the user: every source with what was read, held out and left out, then the whole."""
        unique = {id(ready): ready for ready in [*self.train, *self.validation]}
        lines = [line for ready in unique.values() for line in _describe(ready)]
        rows = sum(self.shape.rows(ready.tokens(TRAIN)) for ready in self.train)
        trained = f"{rows:,} sequences of {self.shape.seq_len:,} tokens an epoch" if rows else "a stream"
        held = sum(self.shape.rows(ready.tokens(VALIDATION)) for ready in self.validation)
        return [*lines, f"training on {trained}, {held:,} held out; tokenizer of {self.tokenizer.size:,} tokens"]


def say_to_stderr(text: str) -> None:
    """A line to the user."""
    print(text, file=sys.stderr, flush=True)


def prepare(cfg: Config, say: Say = say_to_stderr) -> Prepared:
    """Open the sources, get the tokenizer, tokenise what does not stream. Every rank may call this at the same time.

    Raises DataError for a source that is missing, empty or unreadable, ConfigError for a tokenizer that does not fit,
    ResourceError where disk or memory do not suffice.
    """
    train = _open(cfg, cfg.data.sources, "sources")
    validation = _open(cfg, cfg.data.validation_sources, "validation_sources")
    tokenizer = _tokenizer(cfg, train, say)
    held_out = 0.0 if validation else cfg.data.validation_fraction
    shape = RowShape(cfg.data.seq_len, cfg.data.seq_len + 1 + cfg.model.num_nextn_predict_layers)
    ready = [_ready(cfg, source, tokenizer, held_out, say) for source in train]
    others = [_ready(cfg, source, tokenizer, 1.0, say) for source in validation]
    prepared = Prepared(tokenizer, shape, ready, others or (ready if held_out else []))
    _check_rows(cfg, prepared)
    return prepared


def prepare_validation(cfg: Config, tokenizer: Tokenizer, say: Say = say_to_stderr) -> Prepared:
    """What ``prepare`` holds out, and nothing to train on: all of validation_sources, else a share of the sources."""
    name = "validation_sources" if cfg.data.validation_sources else "sources"
    held_out = 1.0 if cfg.data.validation_sources else cfg.data.validation_fraction
    shape = RowShape(cfg.data.seq_len, cfg.data.seq_len + 1 + cfg.model.num_nextn_predict_layers)
    sources = _open(cfg, getattr(cfg.data, name), name) if held_out else []
    prepared = Prepared(tokenizer, shape, [], [_ready(cfg, source, tokenizer, held_out, say) for source in sources])
    _check_rows(cfg, prepared)
    return prepared


def _open(cfg: Config, configs: list[SourceConfig], name: str) -> list[Source]:
    cache, stop = Path(cfg.data.cache_dir), cfg.data.bad_documents == "stop"
    if name == "sources" and not configs:
        raise DataError("data.sources is empty; give e.g. data.sources=[{path: /corpus}]")
    return [open_source(config, f"data.{name}[{i}]", cache, stop) for i, config in enumerate(configs)]


def _tokenizer(cfg: Config, sources: list[Source], say: Say) -> Tokenizer:
    """A run keeps its tokenizer: were it trained again on changed files, a resumed model would read other ids."""
    kept = Path(cfg.run_dir) / "tokenizer"
    request = {"tokenizer": cfg.data.tokenizer, "size": None if cfg.data.tokenizer else tokenizers.vocabulary(cfg)}
    try:
        same = json.loads((kept / "request.json").read_text(encoding="utf-8")) == request
    except (OSError, ValueError):
        same = False
    if not same:
        return tokenizers.obtain(cfg, sources, say)
    tokenizer = tokenizers.read_tokenizer(kept)
    tokenizers.check(tokenizer, cfg)
    return tokenizer


def keep_tokenizer(cfg: Config, tokenizer: Tokenizer) -> None:
    """Write the run's own copy; called by one rank."""
    kept = Path(cfg.run_dir) / "tokenizer"
    request = {"tokenizer": cfg.data.tokenizer, "size": None if cfg.data.tokenizer else tokenizers.vocabulary(cfg)}
    save_tokenizer(tokenizer, kept, cfg.model.max_position_embeddings)
    write_json(kept / "request.json", request)


def _ready(cfg: Config, source: Source, tokenizer: Tokenizer, held_out: float, say: Say) -> Ready:
    rules = Rules(cfg.seed, 0.0 if held_out == 1 else cfg.data.fim_rate, held_out)
    if source.config.streaming:
        return Ready(source, rules, None, {})
    seed = rules.seed if rules.fim_rate else None  # nothing else in the files depends on it
    rule = [rules.fim_rate, seed, rules.held_out]
    key = digest([VERSION, source.identity, tokenizer.digest, tokenizer.eos, tokenizer.fim, rule])
    folder = Path(cfg.data.cache_dir) / "tokens" / key
    build_once(folder, lambda work: _tokenise(cfg, source, tokenizer, rules, work, say), say)
    counts = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    if cfg.data.bad_documents == "stop" and counts["bad_documents"]:
        name, reason = counts["bad_documents"][0]
        raise bad_document(source.label, {"name": name, "error": reason})
    return Ready(source, rules, folder, counts)


def _tokenise(cfg: Config, source: Source, tokenizer: Tokenizer, rules: Rules, work: Path, say: Say) -> None:
    save_tokenizer(tokenizer, work / "tokenizer")
    stop, cache = cfg.data.bad_documents == "stop", cfg.data.cache_dir
    job = Job(source, str(work / "tokenizer"), rules, str(work), cache, stop)
    everything = range(len(source.pieces))
    missing = [piece for piece in everything if not summary_file(work, piece).is_file()]
    processes = cfg.data.num_proc or min(MOST_PROCESSES, _cores())
    done = len(everything) - len(missing)
    resumed = f", {done} of them done before" if done else ""
    say(f"tokenising {source.config.path}: {source.bytes / 1e6:,.1f} MB in {len(everything)} pieces{resumed}")
    with Bar(sum(piece.bytes for piece in source.pieces), say) as bar:
        bar.add(sum(source.pieces[i].bytes for i in everything if i not in set(missing)), 0, 0)
        for piece, counts in tokenise(job, missing, processes):
            bar.add(source.pieces[piece].bytes, sum(counts["tokens"].values()), counts["bad"])
    write_json(work / SUMMARY, _sum_up(source, work))


def _cores() -> int:
    """Cores this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sum_up(source: Source, work: Path) -> Summary:
    """The counts of all pieces and of the files that did not open. Raises DataError where no document came out."""
    pieces = [json.loads(summary_file(work, i).read_text(encoding="utf-8")) for i in range(len(source.pieces))]
    total: Counter = Counter()
    for piece in pieces:
        total.update({key: piece[key] for key in ("bad", "empty", "fim", "bytes")})
    bad = [*source.damaged, *(tuple(entry) for piece in pieces for entry in piece["bad_documents"])]
    summary: Summary = {key: total[key] for key in ("bad", "empty", "fim", "bytes")}
    summary["bad"] += len(source.damaged)
    for what in ("documents", "tokens"):
        summary[what] = {part: sum(piece[what][part] for piece in pieces) for part in PARTS}
    if not sum(summary["documents"].values()):
        named = "; ".join(f"{name}: {reason}" for name, reason in bad[:5])
        raise DataError(
            f"{source.label}.path={source.config.path} gives no document: {summary['empty']} empty, {summary['bad']} "
            f"bad{' (' + named + ')' if named else ''}; mend the files, or set {source.label}.field or .format"
        )
    summary["piece_tokens"] = {part: [piece["tokens"][part] for piece in pieces] for part in PARTS}
    return summary | {"path": source.config.path, "bad_documents": bad}


def _check_rows(cfg: Config, prepared: Prepared) -> None:
    """Raises DataError where a source does not fill one row, or all that is held out does not."""
    shape = prepared.shape
    needs = f"a row takes {shape.length} tokens (data.seq_len = {shape.seq_len} + 1 + MTP depth)"
    for ready in prepared.train:
        if ready.folder and not shape.rows(ready.tokens(TRAIN)):
            raise DataError(
                f"{ready.source.label} gives {ready.tokens(TRAIN):,} tokens to train on, but {needs}; give more text, "
                "lower data.seq_len or leave the source out"
            )
    if not prepared.validation or any(not r.folder or shape.rows(r.tokens(VALIDATION)) for r in prepared.validation):
        return
    held = sum(ready.tokens(VALIDATION) for ready in prepared.validation)
    documents = sum(sum(ready.counts["documents"].values()) for ready in prepared.validation)
    if cfg.data.validation_sources:
        raise DataError(f"data.validation_sources give {held:,} tokens, but {needs}; give more text")
    raise DataError(
        f"data.validation_fraction = {cfg.data.validation_fraction:g} of {documents:,} documents holds out {held:,} "
        f"tokens, but {needs}; raise it, give data.validation_sources, or set both it and train.eval_every to 0"
    )


def _describe(ready: Ready) -> list[str]:
    where = f"{ready.source.label} {ready.source.config.path}"
    if ready.folder is None:
        return [f"{where}: a stream, tokenised while training"]
    counts = ready.counts
    parts = [
        f"{counts['documents'][part]:,} documents, {counts['tokens'][part]:,} tokens {name}"
        for part, name in ((TRAIN, "to train on"), (VALIDATION, "held out"))
        if counts["documents"][part]
    ]
    rest = f"{counts['fim']:,} rewritten for FIM, {counts['empty']:,} empty and {counts['bad']:,} bad left out"
    rest += f", {ready.source.copies:,} copies of other files" if ready.source.copies else ""
    lines = [where, f"  {'; '.join(parts)}; {rest}", f"  in {ready.folder}"]
    lines += [f"  bad document {name}: {reason}" for name, reason in counts["bad_documents"][:5]]
    if counts["bad"] > 5:
        lines.append(f"  and {counts['bad'] - 5:,} more bad documents, named in {ready.folder / SUMMARY}")
    return lines
