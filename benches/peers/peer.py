"""PyTorch's side of `cargo xtask bench --peer PYTHON`: answers one JSON object a line, see benches/src/protocol.rs.

    python peer.py --threads 2

Needs torch and nothing else. One process runs one layout: `nchw` and `nhwc` (channels last) in f32, `bf16` under
autocast with channels last.
"""
import argparse
import json
import math
import statistics
import sys
import time

HELLO = "segdistill-bench 1"
WARM_BELOW_MS = 100.0
MOST_RUNS = 400


def finite(value):
    """JSON has neither NaN nor infinity: the largest number stands for both, which no answer comes near."""
    return value if math.isfinite(value) else sys.float_info.max


def say(**reply):
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def memory_kib(field):
    """A field of /proc/self/status; 0 where there is none."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith(field + ":"):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0


def reset_peak():
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError:
        pass  # The high-water mark then covers the life of the process.


def make(case, layout):
    """The work of a case: an object with `answer()` and `run()`."""
    import csc
    import deeplab
    import losses
    import operations
    import relations

    work = case["work"]
    kinds = {**operations.KINDS, **csc.KINDS, **losses.KINDS, **relations.KINDS, **deeplab.KINDS}
    return kinds[work["op"]](work, layout)


class Ready:
    def __init__(self, work):
        self.work, self.last_ms = work, 0.0

    def timed(self):
        begun = time.perf_counter()
        self.work.run()
        return (time.perf_counter() - begun) * 1e3

    def round(self, least_ms):
        if self.last_ms < WARM_BELOW_MS:
            self.timed()
        taken = []
        while not taken or (sum(taken) < least_ms and len(taken) < MOST_RUNS):
            taken.append(self.timed())
        self.last_ms = statistics.median(taken)
        return {"ms": self.last_ms, "runs": len(taken), "peak_kib": memory_kib("VmHWM")}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    threads = parser.parse_args().threads
    try:
        import torch
    except ImportError as error:
        hint = "--peer takes a Python with torch: `python3 -m venv .venv && .venv/bin/pip install torch`"
        say(error=f"{sys.executable} has no torch ({error})", hint=hint, usage=True)
        return
    torch.set_num_threads(threads)
    say(hello=HELLO, about=f"torch {torch.__version__}", threads=torch.get_num_threads(), idle_kib=memory_kib("VmRSS"))
    ready = None
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            if request["do"] == "prepare":
                ready = None  # Freed first: the two need not fit together.
                work = make(request["case"], request["variant"])
                answer = {k: finite(v) for k, v in work.answer().items()} if request["answer"] else {}
                ready = Ready(work)
                reset_peak()
                say(answer=answer)
            elif request["do"] == "round":
                say(**ready.round(request["least_ms"]))
            else:
                say(error=f"unknown request {request['do']}")
        except Exception as error:  # Told to the other side, which decides.
            say(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
