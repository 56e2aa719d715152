#!/usr/bin/env bash
# Install the package with each extra in turn into an empty environment, and run what the extra is for.
#
#   tools/try_extras.sh                 # all of them; some minutes and some GB in a temporary folder
#   tools/try_extras.sh plot monai      # some
#   TORCH=torch==2.6.0 tools/try_extras.sh core
#
# `core` is the package without extras. Needs python3 (3.10 or later) and a package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The same pin as in the Makefile, so that no range picks a build with CUDA.
TORCH="${TORCH:-torch==2.13.0}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export MPLBACKEND=Agg

MODEL='
import sys
from examples.backbones import UHeMISLike
from passion_plugin import PassionWrapper, load_addon, save_addon
model = PassionWrapper(UHeMISLike(("t1", "t2"), 2), ("t1", "t2"), missing_rates={"t1": 0.2, "t2": 0.8})
'
SAVE_AND_LOAD="$MODEL"'
save_addon(model, sys.argv[1])
load_addon(model, sys.argv[1])
'
LOG_A_RUN="$MODEL"'
import torch
from passion_plugin.runs import RunLog
log = RunLog(sys.argv[1])
for epoch in range(2):
    model(torch.rand(1, 2, 16, 16, 16), torch.ones(1, 2, dtype=torch.bool))
    model.passion_loss(torch.zeros(1, 16, 16, 16, dtype=torch.long))
    model.end_epoch()
    log(model.metrics())
'

run_example() {
  case "$1" in
    core) python -m examples.three_lines ;;
    monai) python -m examples.monai_trainer ;;
    lightning) python -m examples.lightning_callback && python -m examples.fabric_loop ;;
    accelerate) python -m examples.accelerate_loop ;;
    tensorboard) python -m examples.tensorboard_log ;;
    safetensors) python - "$work/addon.safetensors" <<< "$SAVE_AND_LOAD" ;;
    plot) python - "$work/run" <<< "$LOG_A_RUN" && python -m passion_plugin report "$work/run" ;;
    testing) python -c "from passion_plugin.testing import strategies; print(*strategies.__all__)" ;;
    triton) TRITON_INTERPRET=1 python -c "from passion_plugin.ops.kernels import pixel; print(pixel.__all__)" ;;
    examples | all) python -m examples.demo --smoke --out "$work/demo" ;;
    *) echo "no extra $1" >&2; return 2 ;;
  esac
}

extras=("$@")
[[ ${#extras[@]} -gt 0 ]] ||
  extras=(core monai lightning accelerate tensorboard safetensors plot testing triton examples all)
for extra in "${extras[@]}"; do
  printf '\n== %s (%ss)\n' "$extra" "$SECONDS"
  python3 -m venv "$work/$extra"
  (
    # shellcheck disable=SC1091
    source "$work/$extra/bin/activate"
    python -m pip install --quiet "$TORCH"
    python -m pip install --quiet "$([[ $extra == core ]] && echo . || echo ".[$extra]")" "$TORCH"
    run_example "$extra"
  )
  rm -rf "${work:?}/$extra"
done
printf '\nevery extra installs and runs (%ss)\n' "$SECONDS"
