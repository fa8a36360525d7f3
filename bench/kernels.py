"""The kernels' benchmark from a source checkout; the same as `moekern bench`:  python -m bench.kernels --help"""

from __future__ import annotations

import sys

from moekern.cli.app import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench"]
    main()
