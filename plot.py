"""Pictures of runs: python plot.py out/RUN [out/OTHER ...] [--out=FILE.png]

Draws what metrics.jsonl of each run holds over the tokens seen: the loss, bits per byte of each
source's validation part, the learning rate, the mixture, and the speed. Dotted lines stand between
stages. A run that forked from another begins where it forked. Needs matplotlib.
"""
import argparse
import json
import os
import sys
from pathlib import Path

STYLES = "-", "--", "-.", (0, (4, 1, 1, 1, 1, 1))                # of the runs, in order


def read_metrics(run):
    """The records of a run folder, a list of dicts. A line torn by a run that is just writing it is
    left out."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        sys.exit(f"there is no {path}: give the folder of a run, such as out/demo")
    records = []
    lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                record = json.loads(line)
                _ = record["step"] + record["tokens"], {**record.get("mixture", {})}, {
                    **record.get("bits_per_byte", {})}
                records.append(record)
            except (ValueError, KeyError, TypeError) as error:
                sys.exit(f"{path}, line {number} is no record of a run ({error!r})")
    if not any("loss" in record for record in records):
        sys.exit(f"{path} has no step yet: train a little further")
    return records


def series(records, *keys, absent=None):
    """(tokens, values) of the records that have a value at this path of keys; `absent` is that of
    an object without the last one."""
    x, y = [], []
    for record in records:
        value = record.get(keys[0])
        if value is not None and keys[1:]:
            value = value.get(keys[1], absent)
        if value is not None:
            x.append(record["tokens"])
            y.append(value)
    return x, y


def stages_of(records):
    """{stage: (the record before its first, its last)}, as far as there are two."""
    found = {}
    if records[0].get("stage") == 1:             # without validation nothing is written of step 0
        records = [{"step": 0, "tokens": 0}, *records]
    for before, record in zip(records, records[1:]):
        if "stage" in record:
            first, _ = found.get(record["stage"], (before, None))
            found[record["stage"]] = first, record
    return found


def format_count(tokens, _=None):
    """350B for 350e9."""
    for limit, unit in (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"):
        if tokens >= limit:
            return f"{tokens / limit:.4g}{unit}"
    return f"{tokens:.0f}"


def pyplot():
    """matplotlib.pyplot, drawing to files: no screen is needed."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("pictures need matplotlib: pip install matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    return plt


def save_figure(figure, out):
    """Writes a figure to the PNG `out`, whole or not at all."""
    temporary = Path(f"{out}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=110)
        os.replace(temporary, out)
    except OSError as error:
        sys.exit(f"{out} cannot be written: {error}")
    finally:
        temporary.unlink(missing_ok=True)
        pyplot().close(figure)


def plot_runs(runs, out):
    """Draws {name: records} to the PNG `out`."""
    plt = pyplot()
    figure, axes = plt.subplots(5, 1, sharex=True, figsize=(9, 10), height_ratios=(3, 3, 1, 1, 1),
                                layout="constrained")
    sources = sorted({s for records in runs.values() for r in records
                      for s in (*r.get("mixture", ()), *r.get("bits_per_byte", ()))})
    colours = {source: f"C{k}" for k, source in enumerate(sources)}
    labelled, starts = set(), []

    def line(ax, x, y, **look):
        ax.plot(x, y, linestyle=style, linewidth=1.2, **({"marker": "."} if len(x) == 1 else {})
                | look)

    for (name, records), style in zip(runs.items(), STYLES * len(runs)):
        label = f"{name}: " * (len(runs) > 1)
        line(axes[0], *series(records, "loss"), color="black", label=name)
        for source in sources:
            x, y = series(records, "bits_per_byte", source)
            if x:
                line(axes[1], x, y, color=colours[source], marker=".", label=label + source)
            line(axes[3], *series(records, "mixture", source, absent=0.0), color=colours[source],
                 label=source if records is next(iter(runs.values())) else None)
        line(axes[2], *series(records, "lr"), color="black")
        line(axes[4], *series(records, "tokens_per_second"), color="black")
        stages = stages_of(records)
        for stage, (first, last) in stages.items():
            if stage + 1 in stages:
                for ax in axes:
                    ax.axvline(last["tokens"], color="grey", linestyle=":", linewidth=0.8)
            starts.append(first["tokens"])
            if stage not in labelled:
                labelled.add(stage)
                batch = (last["tokens"] - first["tokens"]) / (last["step"] - first["step"])
                words = f"{batch:,.0f}" if batch < 1e6 else format_count(batch)
                axes[0].text((first["tokens"] + last["tokens"]) / 2, 1.0,
                             f"stage {stage}\n{words} a step", ha="center", va="bottom",
                             fontsize="small", transform=axes[0].get_xaxis_transform())
    for ax, title in zip(axes, ("loss, nats a token", "validation, bits a byte", "learning rate",
                                "mixture", "tokens/s")):
        ax.set_ylabel(title)
        ax.grid(alpha=0.2)
    left, right = axes[0].get_xlim()
    axes[0].set_xlim(min([left, *starts]), right)
    axes[0].legend()
    if axes[1].lines:
        axes[1].legend()
    axes[2].set_ylim(bottom=0)
    if sources:
        axes[3].legend(fontsize="small", loc="center left")
    axes[3].set_ylim(-0.05, 1.05)
    axes[4].set_ylim(bottom=0)
    axes[4].yaxis.set_major_formatter(format_count)
    axes[4].set_xlabel("tokens")
    axes[4].xaxis.set_major_formatter(format_count)
    save_figure(figure, out)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, such as out/demo")
    parser.add_argument("--out", metavar="FILE", help="the picture; plot.png in the first RUN")
    args = parser.parse_args(argv)
    if args.out and not args.out.endswith(".png"):
        parser.error(f"--out={args.out} must end in .png")
    return args


def main(argv):
    args = parse_args(argv)
    out = args.out or str(Path(args.runs[0]) / "plot.png")
    plot_runs({str(Path(run)): read_metrics(run) for run in args.runs}, out)
    print(out)


if __name__ == "__main__":
    main(sys.argv[1:])
