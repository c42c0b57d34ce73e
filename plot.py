"""Pictures of runs: python plot.py out/RUN [out/OTHER ...] [--out=FILE.png]

Plots what metrics.jsonl of each run holds over the tokens seen: the loss, bits per byte of each
source's validation split, the learning rate, the mixture, and the speed. Dotted lines stand between
stages. A run that forked from another begins where it forked. Needs matplotlib.
"""
import argparse
import hashlib
import json
import sys
from pathlib import Path

from files import as_path, atomic_write, run_program, to_json


def read_metrics(run):
    """The records of a run's folder, a list of dicts; without a last line that is being written."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        sys.exit(f"there is no {path}: give the folder of a run, such as out/demo")
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                record = json.loads(line)
                valid = isinstance(record["step"] + record["tokens"], int) and all(
                    isinstance(record.get(key, {}), dict) for key in ("mixture", "bits_per_byte"))
            except (ValueError, KeyError, TypeError):
                valid = False
            if not valid:
                sys.exit(f"{path}, line {number} is no record of a run")
            records.append(record)
    if not any("loss" in record for record in records):
        sys.exit(f"{path} has no step yet: train a little further")
    return records


def read_series(records, key, source=None, default=None):
    """(tokens, values) of the records that have a `key`; given a source, of its entry there, or of
    `default` where there is none."""
    tokens, values = [], []
    for record in records:
        value = record.get(key)
        if source is not None and value is not None:
            value = value.get(source, default)
        if value is not None:
            tokens.append(record["tokens"])
            values.append(value)
    return tokens, values


def find_stages(records):
    """{stage: (the record before its first one, its last record)}."""
    if records[0].get("stage") == 1:             # without validation there is no record of step 0
        records = [{"step": 0, "tokens": 0}, *records]
    stages = {}
    for before, record in zip(records, records[1:]):
        if "stage" in record:
            first, _ = stages.get(record["stage"], (before, None))
            stages[record["stage"]] = first, record
    return stages


def format_count(n, _=None):
    """350B for 350e9. (matplotlib also gives the position on the axis.)"""
    for limit, unit in (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"):
        if n >= limit:
            return f"{n / limit:.4g}{unit}"
    return f"{n:.0f}"


def new_figure(**options):
    """A matplotlib Figure, to draw into a file: no screen is needed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("pictures need matplotlib: pip install matplotlib")
    return Figure(**options, layout="constrained")


def save_figure(figure, out, data=None):
    """Writes a figure to the PNG `out`, whole or not at all, and in it a checksum of the `data` it
    was drawn from: so a test can tell whether a picture and a file of numbers belong together."""
    sha256 = data and {"sha256 of data": hashlib.sha256(to_json(data).encode()).hexdigest()}
    with atomic_write(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata=sha256)


def mark_stages(axes, stages, labelled):
    """Draws a dotted line between stages, and writes the number and batch of those that are not
    `labelled` yet above the first of `axes`."""
    for stage, (first, last) in stages.items():
        for ax in axes if stage + 1 in stages else ():
            ax.axvline(last["tokens"], color="grey", linestyle=":", linewidth=0.8)
        if stage not in labelled:
            batch = (last["tokens"] - first["tokens"]) / (last["step"] - first["step"])
            words = f"{batch:,.0f}" if batch < 1e6 else format_count(batch)
            axes[0].text((first["tokens"] + last["tokens"]) / 2, 1,
                         f"stage {stage}\n{words} per step", ha="center", va="bottom",
                         fontsize="small", transform=axes[0].get_xaxis_transform())


def plot_runs(runs, out):
    """Plots {name: records} to the PNG `out`."""
    figure = new_figure(figsize=(9, 10))
    axes = figure.subplots(5, sharex=True, height_ratios=(3, 3, 1, 1, 1))
    loss, bits, rate, mixture, speed = axes
    sources = sorted({source for records in runs.values() for record in records
                      for key in ("mixture", "bits_per_byte") for source in record.get(key, ())})
    labelled, starts = set(), []
    for i, (name, records) in enumerate(runs.items()):
        look = {"linestyle": ("-", "--", "-.", ":")[i % 4], "linewidth": 1.2, "marker": ".",
                "markersize": 3}
        for ax, key in (loss, "loss"), (rate, "lr"), (speed, "tokens_per_second"):
            ax.plot(*read_series(records, key), color="black", label=name, **look)
        for k, source in enumerate(sources):
            tokens, values = read_series(records, "bits_per_byte", source)
            if tokens:
                bits.plot(tokens, values, color=f"C{k}", **look,
                          label=source if len(runs) == 1 else f"{name}: {source}")
            mixture.plot(*read_series(records, "mixture", source, default=0.0), color=f"C{k}",
                         label=source if i == 0 else None, **look)
        stages = find_stages(records)
        mark_stages(axes, stages, labelled)
        labelled |= stages.keys()
        starts += [first["tokens"] for first, _ in stages.values()]
    for ax, title in zip(axes, ("loss, nats per token", "validation, bits per byte",
                                "learning rate", "mixture", "tokens/s")):
        ax.set_ylabel(title)
        ax.grid(alpha=0.2)
        if ax in (loss, bits, mixture) and ax.lines:
            ax.legend(fontsize="small")
    loss.set_xlim(left=min([loss.get_xlim()[0], *starts]))
    rate.set_ylim(bottom=0)
    mixture.set_ylim(-0.05, 1.05)
    speed.set(ylim=(0, None), xlabel="tokens")
    speed.yaxis.set_major_formatter(format_count)
    speed.xaxis.set_major_formatter(format_count)
    save_figure(figure, out, [*runs.values()])


def plot_dots(groups, out):
    """Plots {title: {variant: bits per byte of its runs}}, side by side, to the PNG `out`: a dot
    for each run, in the colour of its seed, and a line at the mean."""
    figure = new_figure(figsize=(9, 1 + 0.4 * len(next(iter(groups.values())))))
    for ax, (title, variants) in zip(figure.subplots(1, len(groups), sharey=True), groups.items()):
        for variant, bits in reversed(variants.items()):
            for seed, value in enumerate(bits):
                ax.plot(value, variant, "o", color=f"C{seed}", alpha=0.6)
            ax.plot(sum(bits) / len(bits), variant, "|", color="black", markersize=16)
        ax.set_xlabel(f"{title}, bits per byte")
        ax.grid(alpha=0.2)
    save_figure(figure, out, groups)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=as_path, help="such as out/demo")
    parser.add_argument("--out", metavar="FILE", type=as_path,
                        help="the picture; plot.png in the first RUN")
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
    run_program(main)
