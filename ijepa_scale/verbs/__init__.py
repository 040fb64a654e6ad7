"""What a user can ask for, one verb a file: its arguments, and the few calls that answer it.

A verb's main(arguments) is called by launch/VERB.py of a checkout and by `ijepa-scale VERB`, which command.py is. At
its top a verb imports nothing that takes time: --help is quick, and a rank notices signals before torch is imported.
"""

import argparse
import sys
from pathlib import Path


def parser_of(verb: str, description: str | None) -> argparse.ArgumentParser:
    """An empty parser of a verb's arguments, under the name that the verb was called by. description: its module's."""
    called = Path(sys.argv[0]).name == f"{verb}.py"
    return argparse.ArgumentParser(
        prog=f"launch/{verb}.py" if called else f"ijepa-scale {verb}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
