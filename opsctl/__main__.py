"""`opsctl`, and `python -m opsctl`."""

import gc
import signal

COLLECT_AFTER = 50_000
"""New containers. Going through all that was just imported each 700 of them takes 0.1 to 0.2 s of a run."""


def main() -> None:
    """The console script. Until a command answers Ctrl-C, it ends the process without a traceback of imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background of a shell it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.set_threshold(COLLECT_AFTER)
    from opsctl.cli import main as run

    run()


if __name__ == "__main__":
    main()
