#!/usr/bin/env python3
"""Stands in for a worker's Python interpreter: answers the worker protocol at once, without torch.

The runner and the store that talk to it are the real ones; only the measuring is pretended, so that a test
can afford many restarts.
"""

import json
import sys
import time

ENVIRONMENT = {"kind": "cpu", "device": "fake", "capability": None, "memory_bytes": None}
ENVIRONMENT |= {"torch": "0", "triton": None, "driver": None}
CHECK = {"passed": True, "rows": 1}

for line in sys.stdin:
    command = json.loads(line)
    do = command["do"]
    answer = {"status": "ok"}
    if do == "hello":
        answer |= {"environment": ENVIRONMENT, "environment_key": "fake0000"}
    elif do == "ceilings":
        answer |= {"ceilings": {}}
    elif do == "prepare":
        time.sleep(0.01)
        answer = {"status": "ready"}
    elif do == "sample":
        answer |= {"samples": 10, "done": "precise"}
    elif do == "finish":
        samples = [1.0 + i / 100 for i in range(100)]
        fields = {
            "latency_ms": 1.5,
            "latency_ci_ms": [1.4, 1.6],
            "samples": samples,
            "timing": {},
            "s_flop": 0.0,
        }
        answer["fields"] = fields | {"checked": CHECK, "recheck": CHECK}
    print(json.dumps(answer), flush=True)
