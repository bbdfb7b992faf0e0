#!/usr/bin/env bash
# Everything that needs a CUDA device, in one command under ten minutes and without a network:
# build and install, GPU tests, compute-sanitizer on small shapes, benchmarks. Results go to benchmarks/results/,
# the sanitizer's and the tests' output to gpu-check.log. PYTHON must already hold torch and the packages of
# pyproject.toml, and nvcc must be on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LOG=${LOG:-gpu-check.log}

"$PYTHON" -c "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 'gpu-check: torch sees no CUDA device')"
"$PYTHON" -m pip install --no-build-isolation --no-deps --editable .
"$PYTHON" - <<'PY' 2>&1 | tee "$LOG"
import json, hpa_ext, torch
print(torch.cuda.get_device_name(0), torch.__version__, torch.version.cuda)
print(json.dumps(hpa_ext.build_info(), indent=1))
PY

"$PYTHON" -m pytest -m gpu --ignore=python_tests/test_gram_sm90.py python_tests 2>&1 | tee -a "$LOG"
# The wgmma kernel of gram is off by default. Should it fail or hang, the rest goes on without it.
wgmma=passed
timeout --signal=KILL 120 "$PYTHON" -m pytest --maxfail=5 -m gpu python_tests/test_gram_sm90.py 2>&1 | tee -a "$LOG" || wgmma=failed

sanitize() {
  compute-sanitizer --tool "$1" --error-exitcode 1 "$PYTHON" benchmarks/sanitize.py "${@:2}" 2>&1 | tail -n 5 | tee -a "$LOG"
}
for tool in memcheck racecheck; do
  sanitize "$tool"
  [ "$wgmma" = failed ] || sanitize "$tool" --wgmma
done

benchmarks=(gram inverse_diagonal column_scores column_mask project_merge routed_lora low_rank harmonize compromise hide)
[ "$wgmma" = failed ] || benchmarks+=(gram_kernels)
"$PYTHON" -m hpa_ext.cli.main bench "${benchmarks[@]}" --device cuda --native-cuda
# The step at 7B shapes with its peers, two minutes by estimate; apart, so that it cannot cost the other numbers.
hopper=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_capability() == (9, 0))")
[ "$wgmma" = failed ] || [ "$hopper" = False ] || export HPA_EXT_GRAM_KERNEL=wgmma
step=passed
timeout --signal=KILL 240 "$PYTHON" -m hpa_ext.cli.main bench step --device cuda --native-cuda \
  --time-line benchmarks/results/step.png 2>&1 | tee -a "$LOG" || step=failed
[ "$step" = passed ] || { echo "gpu-check: the step as a whole was wrong, did not end or did not fit" | tee -a "$LOG"; exit 1; }
[ "$wgmma" = passed ] || { echo "gpu-check: the wgmma kernel of gram failed its tests or did not end" | tee -a "$LOG"; exit 1; }
