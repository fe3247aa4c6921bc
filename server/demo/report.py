"""What a scenario of the demo leaves behind: a table with intervals, a chart of behaviour, the transcript."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from rich.table import Table

from agent_rl.monitors import Interval
from server.demo.scenario import Preference, Results


def table(results: Results) -> Table:
    shown = Table("held-out answers", "before", "after", box=None, pad_edge=False, title=f"“{results.complaint}”")
    for name, before in results.before_measures.items():
        shown.add_row(name, interval(before), interval(results.after_measures[name]))
    return shown


def interval(value: Interval) -> str:
    return f"{value.mean:.2f}" if value.n == 1 else f"{value.mean:.2f}  [{value.low:.2f}, {value.high:.2f}]"


def chart(preference: Preference, results: Results, path: Path) -> None:
    """Behaviour per conversation: tokens and pleasure, means over the last eight, swaps marked. Written as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    talk = results.talk
    x = range(1, len(talk) + 1)
    pleased = [float(preference.pleased(a.text)) for a in talk]
    left.plot(x, [a.tokens for a in talk], ".", color="tab:blue", alpha=0.4)
    left.plot(x, rolling([float(a.tokens) for a in talk]), color="tab:blue", label="tokens per answer")
    right.plot(x, rolling(pleased), color="tab:green", label="share of answers that please")
    for i, (a, b) in enumerate(itertools.pairwise(talk), 1):
        if a.release != b.release and b.release not in {t.release for t in talk[:i]}:
            left.axvline(i + 0.5, color="tab:red", linewidth=0.8)
            left.text(i + 0.6, left.get_ylim()[1], b.release, rotation=90, va="top", fontsize=6, color="tab:red")
    left.set(xlabel="conversation", ylabel="tokens", title=f"“{results.complaint}” (red: new weights serve)")
    right.set(ylabel="share", ylim=(-0.02, 1.02))
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=130)


def rolling(values: Sequence[float], n: int = 8) -> list[float]:
    return [fmean(values[max(0, i - n + 1) : i + 1]) for i in range(len(values))]


def keep(results: Results, preference: Preference, folder: Path) -> None:
    """transcript.jsonl, result.json and chart.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "transcript.jsonl").open("w") as file:
        for part in ("before", "talk", "after"):
            for answer in getattr(results, part):
                file.write(json.dumps({"part": part, **asdict(answer)}) + "\n")
    brief = {k: v for k, v in asdict(results).items() if k not in ("before", "talk", "after")}
    (folder / "result.json").write_text(json.dumps(brief, indent=1))
    if results.talk:
        chart(preference, results, folder / "chart.png")
