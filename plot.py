"""Pictures of runs: python plot.py out/RUN [out/OTHER ...] [--out=FILE.png]

Draws what metrics.jsonl of each run holds over the tokens seen: the loss, bits per byte of each
source's validation part, the learning rate, the mixture, and the speed. Thin dotted lines mark the
ends of stages. A run that forked from another begins where it forked. Needs matplotlib.
"""
import argparse
import json
import os
import sys
from pathlib import Path

STYLES = "-", "--", ":", "-."                                     # of the runs, in order


def read_metrics(run):
    """The records of a run folder, a list of dicts. A line torn by a run that is just writing it is
    left out."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        sys.exit(f"there is no {path}: give the folder of a run, such as out/demo")
    records = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                record = json.loads(line)
                records.append({"step": record["step"], "tokens": record["tokens"]} | record)
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
            x, y = x + [record["tokens"]], y + [value]
    return x, y


def stages_of(records):
    """{stage: (the record before its first, its last)}."""
    found = {}
    for before, record in zip(records, records[1:]):
        if "stage" in record:
            first, _ = found.get(record["stage"], (before, None))
            found[record["stage"]] = first, record
    return found


def short(tokens, _=None):
    """350B for 350e9."""
    for limit, unit in (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"):
        if tokens >= limit:
            return f"{tokens / limit:.4g}{unit}"
    return f"{tokens:.0f}"


def draw(runs, out):
    """Draws {name: records} to the PNG `out`, which is written whole or not at all."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("plot.py needs matplotlib: pip install matplotlib")
    matplotlib.use("agg")                                         # no screen is needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(5, 1, sharex=True, figsize=(9, 10), height_ratios=(3, 3, 1, 1, 1),
                                layout="constrained")
    sources = sorted({s for records in runs.values() for r in records
                      for s in (*r.get("mixture", ()), *r.get("bits_per_byte", ()))})
    colours = {source: f"C{k}" for k, source in enumerate(sources)}
    for (name, records), style in zip(runs.items(), STYLES * len(runs)):
        label, line = f"{name}: " * (len(runs) > 1), {"linestyle": style, "linewidth": 1.2}
        axes[0].plot(*series(records, "loss"), color="black", label=name, **line)
        for source in sources:
            for ax, key, marker in (axes[1], "bits_per_byte", "."), (axes[3], "mixture", None):
                x, y = series(records, key, source, absent=0.0 if key == "mixture" else None)
                if any(y):
                    ax.plot(x, y, color=colours[source], marker=marker, label=label + source,
                            **line)
        axes[2].plot(*series(records, "lr"), color="black", **line)
        axes[4].plot(*series(records, "tokens_per_second"), color="black", **line)
        for stage, (first, last) in stages_of(records).items():
            for ax in axes:
                ax.axvline(last["tokens"], color="grey", linestyle=":", linewidth=0.8)
            if name == next(iter(runs)):
                batch = ((last["tokens"] - first["tokens"]) / (last["step"] - first["step"]))
                axes[0].text((first["tokens"] + last["tokens"]) / 2, 1.0,
                             f"stage {stage}\n{batch:,.0f} tokens a step", ha="center",
                             va="bottom", transform=axes[0].get_xaxis_transform())
    for ax, title in zip(axes, ("loss, nats a token", "validation, bits a byte", "learning rate",
                                "mixture", "tokens/s")):
        ax.set_ylabel(title)
        ax.grid(alpha=0.2)
    axes[0].legend()
    axes[1].legend()
    axes[2].set_ylim(bottom=0)
    axes[3].set_ylim(-0.05, 1.05)
    axes[4].set_ylim(bottom=0)
    axes[4].set_xlabel("tokens")
    axes[4].xaxis.set_major_formatter(short)
    temporary = Path(f"{out}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=110)
        os.replace(temporary, out)
    except OSError as error:
        sys.exit(f"{out} cannot be written: {error}")
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, such as out/demo")
    parser.add_argument("--out", metavar="FILE", help="the picture; plot.png in the first RUN")
    return parser.parse_args(argv)


def main(argv):
    args = parse_args(argv)
    out = args.out or str(Path(args.runs[0]) / "plot.png")
    draw({str(Path(run)): read_metrics(run) for run in args.runs}, out)
    print(out)


if __name__ == "__main__":
    main(sys.argv[1:])
