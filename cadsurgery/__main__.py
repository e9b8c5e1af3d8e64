"""Run the command line: `python -m cadsurgery`."""

from cadsurgery.cli.main import main

if __name__ == "__main__":
    main()
