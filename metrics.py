"""metrics.jsonl: what a run measured, one JSON object per line, for plot.py and for people."""
import json
from collections import Counter
from contextlib import suppress

from device import device_name, peak_flops
from files import Output, atomic_write, to_json


class Metrics:
    """Writes out_dir/metrics.jsonl. What an interrupted run wrote after the checkpoint from
    which this one resumes is cut off; a run that does not resume starts a new file."""

    def __init__(self, run, start, flops_per_token, stop_request):
        path, lines = run.out_dir / "metrics.jsonl", []
        if path.exists() and start.resuming:
            for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True):
                with suppress(ValueError, KeyError, TypeError):     # of a line torn by a crash
                    if json.loads(line)["step"] <= start.step and line.endswith("\n"):
                        lines.append(line)
        with atomic_write(path) as temporary:
            temporary.write_text("".join(lines), "utf-8")
        self.file = Output(open(path, "a", encoding="utf-8"), stop_request)
        peak = peak_flops(device_name(run.world.device), run.dtype)
        self.tokens_per_second_at_peak = peak and peak * run.world.size / flops_per_token
        self.tokens, self.seconds, self.sequences = 0, 0, Counter()

    def record_step(self, rows, context, seconds):
        """Counts a step. Speed and mixture of the next record are those of the steps since the last
        one, without evaluations and saves."""
        self.sequences.update(name for name, _ in rows)
        self.tokens, self.seconds = self.tokens + len(rows) * context, self.seconds + seconds

    def write(self, record, memory):
        if self.tokens:
            rate = self.tokens / self.seconds
            peak = self.tokens_per_second_at_peak
            record |= {"tokens_per_second": rate, "mfu": rate / peak if peak else None,
                       "memory": memory, "mixture": {name: count / self.sequences.total()
                                                     for name, count in self.sequences.items()}}
            self.tokens, self.seconds, self.sequences = 0, 0, Counter()
        self.file.write(to_json(record) + "\n")
        self.last = record


def format_record(record, steps):
    """A record as one line of text."""
    text = f"step {record['step']}/{steps}"
    if "loss" in record:
        text += (f"  loss {record['loss']:.3f}  lr {record['lr']:.2e}  "
                 f"norm {record['grad_norm']:.2f}  {record['tokens_per_second']:,.0f} tok/s")
        if record["mfu"]:
            text += f"  MFU {record['mfu']:.1%}"
    for name, bits in record.get("bits_per_byte", {}).items():
        text += f"  | {name} {record['val_loss'][name]:.3f} nats/token, {bits:.3f} bits/byte"
    return text
