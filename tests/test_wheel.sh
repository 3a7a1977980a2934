#!/usr/bin/env bash
# Build the distribution from the tracked files, check that nothing is missing from it, install it in an empty environment
# with the versions of constraints.txt, and run tests against it from another folder: those named as arguments (options of
# pytest and paths below tests/), or all.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$root"

# A copy, because setuptools' build/ folder remembers files that are long gone. The wheel is built from the sdist.
mkdir "$dir/source" "$dir/elsewhere"
git ls-files -z | xargs -0 cp -P --parents -t "$dir/source"
uv build -q --python 3.12 --out-dir "$dir/dist" "$dir/source"
wheel=("$dir"/dist/deepzoo-*.whl)

uv venv -q --python 3.12 "$dir/env"
uv pip install -q --python "$dir/env/bin/python" -c constraints.txt --group pyproject.toml:dev "${wheel[0]}"

"$dir/env/bin/python" - "${wheel[0]}" <<'PY'
import subprocess, sys, zipfile

listed = subprocess.run(["git", "ls-files", "-z", "kernels", "recipes", "seeds", "zoo"], capture_output=True, check=True)
tracked = {f"deepzoo/{name}" for name in listed.stdout.decode().split("\0") if name}
packed = {n for n in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in n}
if tracked != packed:
    sys.exit(f"not in the wheel: {sorted(tracked - packed)}; only in the wheel: {sorted(packed - tracked)}")
print(f"{len(packed)} files in the wheel, as many as are tracked")
PY

cd "$dir/elsewhere"
"$dir/env/bin/python" -c '
import sys
from deepzoo import zoo
if "site-packages" not in str(zoo.__file__):
    sys.exit(f"the tests would see {zoo.__file__}, not the wheel")'
"$dir/env/bin/deepzoo" --help > "$dir/help"
grep -q deepzoo "$dir/help"
cd "$root/tests" # pytest's folder is no package's: `deepzoo` still comes from the wheel
"$dir/env/bin/pytest" -p no:cacheprovider -q "$@"
