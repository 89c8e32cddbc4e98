"""A step of `python -m pykernels gpu` for tests: its first argument says how it ends, FAKE_RESULTS what it writes."""

import json
import os
import pathlib
import sys
import time

how, file = sys.argv[1], pathlib.Path(sys.argv[-1])
if how == "abort":
    print("illegal instruction", flush=True)
    os.abort()
if how == "hang":
    time.sleep(60)
file.write_text(json.dumps(json.loads(os.environ.get("FAKE_RESULTS", "{}")).get(how, {"results": []})))
sys.exit(how == "fail")
