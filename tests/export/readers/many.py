"""Run one of the readers for many folders in one process: ``many.py SCRIPT JOBS.json``, whose arguments are listed.

What fails leaves its reason in ``OUT.error``, where OUT is the third argument of a reader.
"""

import json
import runpy
import sys
import traceback
from pathlib import Path


def main() -> None:
    script, jobs = sys.argv[1:]
    for words in json.loads(Path(jobs).read_text()):
        sys.argv = [script, *words]
        try:
            runpy.run_path(script, run_name="__main__")
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            Path(f"{words[2]}.error").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
