"""A plan for people: tables in the terminal, from the same document that JSON prints."""

from typing import Any

from rich.console import Console
from rich.table import Table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _range(values: list[float], form: str) -> str:
    return f"{values[0]:{form}} - {values[1]:{form}}"


def _billions(count: float) -> str:
    """671026404352 -> 671.03 B; below a billion in millions."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _summary(d: dict[str, Any]) -> Table:
    c, layout, step, run = d["cluster"], d["layout"], d["step"], d["run"]
    table = _table(
        f"{c['devices']:,} x {c['device']}, {c['per_node']} a node, {c['network']}: PP{layout['pp_size']} x "
        f"DP{layout['dp']}, EP{layout['ep_size']}, {layout['schedule']}, {layout['precision']}, recompute "
        f"{layout['recompute']}",
        "at the full batch", "", "range",
    )  # fmt: skip
    least, most = map(_billions, d["active_parameters_range"])
    table.add_row("parameters: total, MTP", f"{_billions(d['total_parameters'])}, {_billions(d['mtp_parameters'])}", "")
    table.add_row("parameters: active", _billions(d["active_parameters"]), f"{least} - {most}, with embedding")
    table.add_row("step", f"{d['step_seconds']:.3f} s", _range(d["step_seconds_range"], ".3g"))
    rate, rates = d["tokens_per_second_per_gpu"], d["tokens_per_second_per_gpu_range"]
    table.add_row("tokens/s per device", f"{rate:,.0f}", _range(rates, ",.0f"))
    table.add_row("MFU, causal (full square)", f"{step['mfu']:.1%} ({step['mfu_full_attention']:.1%})", "")
    table.add_row("bubble, of the step", f"{step['bubble_share']:.1%}", "")
    table.add_row("communication hidden", f"{step['hidden_communication']:.1%}", "")
    table.add_row("limited by", f"{step['limited_by']} ({next(iter(step['shares'].values())):.0%})", "")
    hours = d["gpu_hours_per_trillion_tokens"]
    trillion = _range([h / 1e3 for h in d["gpu_hours_per_trillion_tokens_range"]], ".0f")
    table.add_row("GPU hours per trillion tokens", f"{hours / 1e3:,.1f} K", f"{trillion} K")
    table.add_row("days, money per trillion tokens", _days_and_money(d), "")
    total = _range([h / 1e6 for h in run["gpu_hours_range"]], ".2f")
    table.add_row("whole run", f"{run['gpu_hours'] / 1e6:.3f} M GPU hours, ${run['dollars'] / 1e6:.2f} M", f"{total} M")
    return table


def _days_and_money(d: dict[str, Any]) -> str:
    return f"{d['days_per_trillion_tokens']:.2f} days, ${d['dollars_per_trillion_tokens'] / 1e3:,.0f} K"


COLUMNS = 6
"""Ranks that the memory table shows at most."""


def _memory(d: dict[str, Any]) -> Table:
    memory = d["memory"]
    alike: dict[tuple[float, ...], list[dict[str, Any]]] = {}
    for row in memory["ranks"]:
        alike.setdefault((row["parameters"], row["in_flight"], round(row["total_gib"], 2)), []).append(row)
    shown = sorted(alike.values(), key=lambda rows: -rows[0]["total_gib"])[:COLUMNS]
    names = [_numbers([row["rank"] for row in rows]) for rows in shown]
    table = _table(f"memory, GiB of {memory['capacity_gib']:.1f}; fullest ranks first", "pipeline rank", *names)
    table.add_row("stages of the first", *(rows[0]["role"] for rows in shown))
    table.add_row("parameters", *(_billions(rows[0]["parameters"]) for rows in shown))
    table.add_row("micro-batches in flight", *(str(rows[0]["in_flight"]) for rows in shown))
    table.add_section()
    for part in memory["ranks"][0]["parts_gib"]:
        table.add_row(part, *(f"{rows[0]['parts_gib'][part]:.1f}" for rows in shown))
    table.add_section()
    table.add_row("total", *(f"{rows[0]['total_gib']:.1f}" for rows in shown))
    table.add_row("range", *(_range(rows[0]["total_gib_range"], ".0f") for rows in shown))
    return table


def _kept(d: dict[str, Any]) -> Table:
    kept = d["memory"]["layer_bytes_per_token"]
    table = _table("what a layer keeps for backward, bytes per token", "part", *kept)
    for part in dict.fromkeys(part for parts in kept.values() for part in parts):
        table.add_row(part, *(f"{parts.get(part, 0):,}" for parts in kept.values()))
    table.add_section()
    table.add_row("sum", *(f"{sum(parts.values()):,}" for parts in kept.values()))
    return table


def _numbers(ranks: list[int]) -> str:
    """[1, 2, 3] -> 1-3; [0, 15] -> 0, 15."""
    whole = len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]}-{ranks[-1]}" if whole else ", ".join(map(str, ranks))


def _flops(d: dict[str, Any]) -> Table:
    flops = d["flops_per_token"]
    table = _table("GFLOP per token, forward and backward", "part", "causal", "full attention")
    for part, value in flops["parts_causal"].items():
        table.add_row(part, f"{value / 1e9:.2f}", f"{flops['parts_full_attention'][part] / 1e9:.2f}")
    table.add_row("all but MTP", f"{flops['causal'] / 1e9:.1f}", f"{flops['full_attention'] / 1e9:.1f}")
    return table


def _time(d: dict[str, Any]) -> Table:
    step, seconds = d["step"], d["step_seconds"]
    table = _table(f"where a step's {seconds:.2f} s go (rank {step['busiest_rank']})", "what", "s", "share")
    for name, share in step["shares"].items():
        if share < 5e-4:
            continue
        table.add_row(name, f"{share * seconds:.3f}", f"{share:.1%}")
    table.add_section()
    for name, busy in step["busy_seconds"].items():
        table.add_row(f"{name} chunks", f"{busy:.3f}", f"{busy / seconds:.1%}")
    return table


def _phases(d: dict[str, Any]) -> Table:
    run = d["run"]
    table = _table("the whole run", "phase", "tokens", "steps", "days", "devices", "GPU hours", "money")
    for row in run["phases"]:
        money = row["gpu_hours"] * run["price_per_gpu_hour"]
        table.add_row(
            row["name"], f"{row['tokens'] / 1e9:,.1f} B", f"{row['steps']:,.0f}", f"{row['days']:.1f}",
            f"{row['gpus']:,}", f"{row['gpu_hours'] / 1e3:,.0f} K", f"${money / 1e3:,.0f} K",
        )  # fmt: skip
    if run["post_training_gpu_hours"]:
        table.add_row("post-training (as reported)", *[""] * 4, f"{run['post_training_gpu_hours'] / 1e3:,.0f} K")
    return table


def _networks(d: dict[str, Any]) -> Table:
    table = _table(
        "networks of 64-port switches, full (HW Table 3)", "topology", "ends", "switches", "links", "$ per end"
    )
    for name, row in d["network"]["topologies"].items():
        counts = (f"{row[key]:,.0f}" for key in ("ends", "switches", "links", "dollars_per_end"))
        table.add_row(name, *counts)
    return table


def _measured(d: dict[str, Any]) -> list[str]:
    if "measured" not in d:
        return []
    m, rate = d["measured"], d["tokens_per_second_per_gpu"]
    memory = f"{m['memory_gib']:.1f} GiB ({m['memory_error']:+.1%})" if m["memory_gib"] else "no memory on this device"
    return [
        f"measured over {m['steps']} steps: {m['tokens_per_second_per_gpu']:,.0f} tokens/s per device, planned "
        f"{rate:,.0f} ({m['throughput_error']:+.1%}); {memory}"
    ]


def _remarks(d: dict[str, Any]) -> list[str]:
    """Sentences below the tables."""
    run, fail = d["run"], d["run"]["failures"]
    largest = sorted(d["uncertainty"].items(), key=lambda item: -abs(item[1]))[:4]
    causes = ", ".join(f"{name} {change:+.1%}" for name, change in largest)
    return [
        *_measured(d),
        f"made again in backward: {', '.join(d['memory']['recomputed'])}",
        *(f"note: {row['name']}: {note}" for row in run["phases"] for note in row["notes"]),
        *(f"note: {name} is left out: {reason}" for name, reason in run.get("left_out", {}).items()),
        *(f"note: {note}" for note in d["step"]["notes"]),
        f"failures: {fail['expected']:,.0f} expected in the first phase, one each {fail['between_hours']:,.1f} h; a "
        f"checkpoint of {fail['checkpoint_bytes'] / 1e12:.2f} TB takes {fail['checkpoint_seconds']:.1f} s, best every "
        f"{fail['interval_seconds'] / 60:.0f} min; {fail['lost_share']:.1%} of the time lost in all",
        f"network: {d['network']['fabric']}, ${d['network']['cost_dollars'] / 1e6:.1f} M",
        f"calibration: {d['calibration']}; what the ranges come from most: {causes or 'nothing'}",
    ]


def show(d: dict[str, Any], console: Console) -> None:
    """Print all tables; what does not fit is said last."""
    for table in (_summary(d), _time(d), _memory(d), _kept(d), _flops(d), _phases(d), _networks(d)):
        console.print(table)
    for sentence in _remarks(d):
        console.print(sentence, highlight=False)


def show_search(found: dict[str, Any], console: Console) -> None:
    """Print the ranking and why the rest was turned down."""
    table = _table(
        f"{found['tried']} layouts, {len(found['ranked'])} ranked", "layout", "tokens/s/device", "step, s", "GiB"
    )
    for row in found["ranked"]:
        table.add_row(
            row["text"], f"{row['tokens_per_second_per_gpu']:,.0f}", f"{row['step_seconds']:.2f}", f"{row['gib']:.1f}"
        )
    console.print(table)
    reasons = _table("turned down", "reason", "layouts", "for example")
    for reason, rows in sorted(found["reasons"].items(), key=lambda item: -len(item[1])):
        reasons.add_row(reason, str(len(rows)), rows[0])
    console.print(reasons)
