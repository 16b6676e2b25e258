"""Coverage-guided fuzzing: ``python -m tests.fuzz TARGET [--seconds N]``, or ``... TARGET --replay FILE``.

Starts from ``tests/fuzz/corpus/TARGET``. What reaches new code is kept in ``fuzz-results/TARGET/corpus``, where the
next run goes on; an input that makes the target raise, hang or crash is written to ``fuzz-results/TARGET``.
"""

import argparse
import sys
from pathlib import Path

from tests.fuzz.targets import CORPUS, TARGETS, target

RESULTS = Path("fuzz-results")


def main() -> None:
    """Run a target until time is over or it fails; the exit status says which."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Look for inputs that raise, hang or crash."
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="how long; default: 60")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the target once, on an input that was written")
    options = parser.parse_args()
    if options.replay:
        target(options.target)(options.replay.read_bytes())
    else:
        fuzz(options.target, options.seconds)


def fuzz(name: str, seconds: int) -> None:
    """Run a target under libFuzzer, which ends the process."""
    try:
        import atheris
    except ImportError:
        raise SystemExit("atheris is not installed: `make fuzz` does that, where there are wheels of it") from None
    # Coverage is seen only in modules that are imported here for the first time.
    with atheris.instrument_imports(include=["segrpc.service", "PIL", f"tests.fuzz.{name}"]):
        run = target(name)
    results = RESULTS / name
    found = results / "corpus"
    found.mkdir(parents=True, exist_ok=True)
    print(f"fuzzing {name} for {seconds} s; what fails is written to {results}/", flush=True)
    options = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={results}/",
        "-timeout=10",  # a slow input is a finding
        "-rss_limit_mb=2048",
        "-max_len=65536",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS / name)], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
