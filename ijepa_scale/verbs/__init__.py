"""What a user can ask for, one verb a file: its arguments, and the few calls that answer it.

A verb's main(arguments) is called by launch/VERB.py of a checkout and by `ijepa-scale VERB`, which command.py is. At
its top a verb imports nothing that takes time: --help is quick, and a rank notices signals before torch is imported.
"""

import argparse
import sys
import time
from pathlib import Path


def parser_of(verb: str, description: str | None) -> argparse.ArgumentParser:
    """An empty parser of a verb's arguments, under the name that the verb was called by. description: its module's."""
    called = Path(sys.argv[0]).name == f"{verb}.py"
    return argparse.ArgumentParser(
        prog=f"launch/{verb}.py" if called else f"ijepa-scale {verb}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def fail(error: Exception, code: int) -> int:
    """Say it, less secrets, once a machine. The exit code."""
    from ijepa_scale.config.redaction import redacted
    from ijepa_scale.engine.launchers import launcher_rank, speaks

    if speaks() or any(getattr(one, "local", False) for one in (error, error.__cause__)):
        place = f" (rank {launcher_rank()})" if launcher_rank() else ""
        print(f"error{place}: {redacted(str(error))}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # a launcher ends all ranks when one ends: rank 0 speaks first
    return code
