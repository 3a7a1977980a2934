"""Open a directory that deepzoo wrote in transformers, and compare its logits with a golden case.

    oracle/bin/python tests/golden/check_saved.py DIRECTORY CASE

DIRECTORY is what zoo.save_hf(zoo.load("tests/golden/CASE"), DIRECTORY) left. Runs in the
environment described at the top of make.py. Prints the largest absolute differences; exits 1 when
the logits, the MTP logits or the router's choices differ (by more than 1e-6: nothing may change on
the way through).
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import make
import numpy as np
import oracle


def main(directory, case):
    """Compare, and return the exit status."""
    expected = np.load(make.HERE / case / "expected.npz")
    with tempfile.TemporaryDirectory() as tmp:
        for file in Path(directory).iterdir():
            if file.is_file():
                shutil.copy(file, tmp)
        config = json.loads((Path(tmp) / "config.json").read_text())
        if "quantization_config" in config:
            make.dequantise(Path(tmp))
        model = oracle.load(tmp, make.oracle_config(tmp, config))
        logits, hidden, calls = oracle.forward(model, expected["tokens"])
        worst = {"logits": float(np.abs(logits - expected["logits"]).max())}
        if calls:
            chosen = np.stack([c[1].reshape(*expected["tokens"].shape, -1) for c in calls])
            worst["router choices that differ"] = int((chosen != expected["routing"]).sum())
        if "mtp_logits" in expected:
            worst["mtp logits"] = float(
                np.abs(
                    oracle.mtp(model, expected["tokens"], hidden)[0] - expected["mtp_logits"]
                ).max()
            )
    for what, value in worst.items():
        print(f"{case}: {what}: {value}")
    return int(max(worst.values()) > 1e-6)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    oracle.prepare()
    sys.exit(main(*sys.argv[1:]))
