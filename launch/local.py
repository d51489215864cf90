"""Several processes on this machine, as one cluster: python launch/local.py --processes=2 --config=FILE.py [...]"""

import os
import socket
import subprocess
import sys


def main() -> int:
    given = [argument for argument in sys.argv[1:] if argument.startswith("--processes=")]
    if len(given) != 1 or not given[0].partition("=")[2].isdigit():
        print(f"{__doc__}\n--processes: missing; say how many, e.g. --processes=2", file=sys.stderr)
        return 2
    count = int(given[0].partition("=")[2])
    rest = [argument for argument in sys.argv[1:] if argument not in given]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "itjax.main", *rest],
            env={
                **os.environ,
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
            },
        )
        for i in range(count)
    ]
    return max(process.wait() for process in processes)


if __name__ == "__main__":
    sys.exit(main())
