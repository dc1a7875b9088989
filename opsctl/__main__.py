"""`opsctl`, and `python -m opsctl`."""

import signal


def main() -> None:
    """The console script. Until a command answers Ctrl-C, it ends the process without a traceback of imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background of a shell it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from opsctl.cli import main as run

    run()


if __name__ == "__main__":
    main()
