"""One run on a GPU: what grpo_plus gives and takes there, stage by stage, each with its own deadline.

python -m benchmarks.gpu --out FOLDER [--stages probe exact ...] [--budget 520] [--repeats 3]
python -m benchmarks.gpu --rehearse --out FOLDER        tiny, on a CPU, to see that every line runs

Needs a checkout and its `[qlora]` packages; it need not be installed. `results.json` and `summary.txt` in the folder
are written again after every item. To publish a run, copy `results.json` to benchmarks/results/gpu_<card>.json.
"""

import argparse
import faulthandler
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

SECONDS = {  # of each stage, counted from the end of the one before; what is left over goes to the next
    "probe": 25,
    "exact": 70,
    "attention": 20,
    "kernels": 30,
    "rollouts": 45,
    "updates": 170,
    "planner": 75,
    "step": 85,
}
RESERVED = 0.2  # share of its time that every later stage keeps, however late it gets
REHEARSED = 4  # times the seconds on a CPU


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rehearse", action="store_true", help="every stage on the CPU, at tiny sizes")
    parser.add_argument("--stages", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--budget", type=float, default=520.0, help="seconds in all")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of an update")
    args = parser.parse_args()
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    _run(args)


def _run(args: argparse.Namespace) -> None:
    from benchmarks.gpu.gauges import clean
    from benchmarks.gpu.record import OutOfTimeError, Record, Setting, Stage, at_most, described
    from benchmarks.machine import describe, device_name

    times = REHEARSED if args.rehearse else 1
    setting = Setting("cpu" if args.rehearse else "cuda", args.repeats)
    options = [f"--stages {' '.join(args.stages)}", f"--budget {args.budget:g}", f"--repeats {args.repeats}"]
    record = Record(args.out, " ".join(["python -m benchmarks.gpu", *["--rehearse"] * args.rehearse, *options]))
    record.results["machine"] = describe(("peft", "bitsandbytes")) | {"device": device_name(setting.device)}
    faulthandler.enable()
    faulthandler.dump_traceback_later(args.budget * times + 25, exit=True)
    end = time.perf_counter()
    for position, name in enumerate(args.stages):
        end += SECONDS[name] * times
        reserve = sum(RESERVED * SECONDS[later] for later in args.stages[position + 1 :])
        left = min(end, record.began + (args.budget - reserve) * times) - time.perf_counter()
        record.say(f"== {name} ({left:.0f} s)")
        if left < 2:
            record.say("  no time left")
            continue
        stage, started = Stage(name, record), time.perf_counter()
        try:
            with at_most(left):
                _stage(name)(stage, setting)
        except OutOfTimeError:
            record.say(f"  {name}: out of time")
        except (Exception, SystemExit) as failure:  # the later stages are wanted all the same
            record.results["stages"][name] |= described(failure)
            record.say(f"  STAGE FAILED {name}: {record.results['stages'][name]['failure'][:300]}")
        record.results["stages"][name]["took_s"] = round(time.perf_counter() - started, 1)
        clean()
        record.save()
    faulthandler.cancel_dump_traceback_later()
    failed = [row["label"] for stage in record.results["stages"].values() for row in stage["rows"] if "failure" in row]
    record.say(f"done; {len(failed)} rows failed{': ' + ', '.join(failed) if failed else ''}")
    record.save()
    sys.exit(1 if args.rehearse and failed else 0)


def _stage(name: str) -> Callable[..., None]:
    """Imported when its turn comes, so that what cannot be imported ends one stage."""
    from benchmarks.gpu.probe import probe

    if name == "probe":
        return probe
    if name == "exact":
        from benchmarks.gpu.exact import exact

        return exact
    if name in ("attention", "kernels"):
        from benchmarks.gpu import parts

        return parts.attention if name == "attention" else parts.kernels
    if name == "rollouts":
        from benchmarks.gpu.rollouts import rollouts

        return rollouts
    if name == "updates":
        from benchmarks.gpu.updates import updates

        return updates
    from benchmarks.gpu import steps

    return steps.planner if name == "planner" else steps.step


if __name__ == "__main__":
    main()
