"""The console script, and `python -m ggjac` where it is not on the PATH."""

import sys


def main() -> None:
    """Run the command line; an interrupt that comes while it is being loaded ends it in one line, too."""
    try:
        from ggjac.cli import main as commands

        commands(prog_name="ggjac")
    except KeyboardInterrupt:
        print("\nInterrupted before anything was begun", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
