#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, the most valuable evidence first. A GPU may be there for minutes only: gpu.json
# holds all results at every moment, whatever ends this script.
#
#   build      the extension for this card, in place, with the installed packages: nothing is fetched. Where there is a
#              second assembler (ptxas), also a second library of the same PTX: an assembler can be wrong, and a test
#              that executes PTX cannot see it
#   smoke      small calls of every kernel against the exact result, with each library
#   triton     the tests that take a device, of the Triton kernels alone: first each result and gradient against the
#              reference, then the laws
#   quick      our kernels, CUDA's and Triton's, at many shapes, beside torch's functions without a compiler, a matrix
#              product and a copy
#   profile    hardware counters of each kernel (ncu), beside those expected from its machine code
#   tests      the tests that take a device, of all other backends: every kernel against the reference, and
#              tests/test_cuda.py
#   wrappers   single instructions and tile functions: the GPU and the emulator beside plain torch
#   sanitizer  small calls of every kernel under each tool of compute-sanitizer: memcheck and racecheck, then the others
#   bench      attention beside other packages, FlexAttention last; the other operations; the model: forward, training
#              step and what takes its time, generation
#   host       the other tests, which need no GPU, with the versions installed here. Only if named by --only
#
#   tests/gpu.sh [--only build,smoke,...] [--budget SECONDS] [--list] [--rehearse]
#
# No failure stops a later step. A step ends when its allowance is used up, to which earlier steps add the seconds that
# they did not use; the last step has the rest of the budget. A call with --only continues the gpu.json that an earlier
# one left in OUT or, where OUT is emptied between calls, in build/gpu: results are replaced step by step, and each has
# its commit. If that file is of other sources of the library, or of another GPU, the call starts anew and says so; the
# earlier file is kept in OUT as gpu-COMMIT.json. --rehearse runs every step with its real commands on the CPU, at tiny
# sizes, where there is no GPU.
#
# Tables come last: times, counts of tests, bars, predictions (benchmarks/predictions.json) beside the measurements, and
# the result of each step. The exit code is 0 if every step passed, or could not run for lack of a tool. In OUT:
#
#   gpu.json           described in tests/gpu_report.py
#   gpu.log            the output of the steps, one after the other
#   gpu_memcheck.log   and racecheck, initcheck, synccheck
#
# From the environment:
#
#   OUT                   the folder for these (default: benchmarks/results)
#   BUDGET                as --budget (540)
#   PYTHON                the interpreter with torch (python3)
#   WHEELS                a folder of wheels that are missing here, hypothesis for instance; installed into a folder of
#                         their own
#   PTXAS2                the assembler of the second library, as ANDROMEDA_PTXAS in setup.py: a path, or nvcc for its
#                         own (default), which differs from the first where a newer one was found
#   TORCH_CUDA_ARCH_LIST  default: this card's alone; empty: the list of CMakeLists.txt
#   COMMIT                the commit to record (default: git's)
#   KEEP                  the folder of the second library and of the copy of gpu.json (build/gpu)
#   STEP_SECONDS          the allowance of every step, in place of its own
#   TRITON_CACHE_DIR      where Triton keeps what it compiled, for all processes (KEEP/triton)
#
# shellcheck disable=SC2317,SC2329  # the steps are called by name
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STEPS=(build smoke triton quick profile tests wrappers sanitizer bench host)
# Seconds. Estimates for sixteen cores and a Hopper card: compiling a library takes 40 to 60 s, two at a time; `import
# torch` and a context take 6 s; a case of `quick` 1 to 2 s; a kernel under ncu 8 s, nearly all of it the start; Triton
# compiles a variant of a kernel in 1 to 3 s.
declare -A ALLOWANCE=([build]=95 [smoke]=35 [triton]=100 [quick]=110 [profile]=45 [tests]=120 [wrappers]=45
  [sanitizer]=60 [bench]=120 [host]=60)
DEVICE_TESTS=(tests/test_attention.py tests/test_qk_norm_rotary.py tests/test_token_shift_norm.py
  tests/test_linear_cross_entropy.py tests/test_feed_forward.py)
NOT_RUN=77 # exit code of a step that cannot run here; the last line of its log says why
SPOILT=75  # exit code of benchmarks/attn_grid.py: an error of the GPU; a new process can continue

usage() { sed -n '2,/^# shellcheck/{/^# shellcheck/d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }

need() { [[ -n ${2:-} ]] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }; }

only="" inside="" # inside: the step that this process is
BUDGET=${BUDGET:-540}
while (($#)); do
  case $1 in
    --only | --budget | --inside)
      need "$1" "${2:-}"
      set -- "$1=$2" "${@:3}"
      continue
      ;;
    --only=*) only=${1#*=} only=${only//,/ } ;;
    --budget=*) BUDGET=${1#*=} ;;
    --inside=*) inside=${1#*=} ;;
    --rehearse) export REHEARSE=1 ;;
    --list)
      printf '%s\n' "${STEPS[@]}"
      exit
      ;;
    -h | --help)
      usage
      exit
      ;;
    *)
      echo "gpu.sh: unknown argument '$1'; known are --only, --budget, --list, --rehearse, --help" >&2
      exit 2
      ;;
  esac
  shift
done
only=${only:-${STEPS[*]/host/}}
for name in $only; do
  if [[ " ${STEPS[*]} " != *" $name "* ]]; then
    echo "gpu.sh: --only knows ${STEPS[*]}, got '$name'" >&2
    exit 2
  fi
done
if [[ ! $BUDGET =~ ^[0-9]+$ ]]; then
  echo "gpu.sh: --budget must be a number of seconds, got '$BUDGET'" >&2
  exit 2
fi

# ---- the steps: each is this script again, under `timeout`, with --inside -------------------------------------------

# A rehearsal differs by the device and the sizes, and only collects tests.
device=cuda sizes=() collect=()
[[ -z ${REHEARSE:-} ]] || device=cpu sizes=(--quick) collect=(--collect-only)

benchmark() { "$PYTHON" "benchmarks/$1.py" --device "$device" --json "$parts/${2:-$1}.json" "${@:3}" "${sizes[@]}"; }

# The benchmarks of the operations other than attention.
OTHERS=(qk_norm_rotary token_shift_norm linear_cross_entropy feed_forward)

# pytest, with a file of counts for gpu.json. PART NAME ARGUMENTS...
count_tests() {
  PART="$parts/$1.json" "$PYTHON" -m pytest -q -p gpu_report -p no:cacheprovider --device "$device" "${collect[@]}" "${@:2}"
}

# Several processes at once, where pytest can: tests mostly launch and compare.
workers() { if [[ -z ${REHEARSE:-} ]] && "$PYTHON" -c 'import xdist' 2>/dev/null; then echo "-n ${1:-4}"; fi; }

run_build() {
  if [[ -z ${TORCH_CUDA_ARCH_LIST+set} && -z ${REHEARSE:-} ]]; then
    # Hopper's own instructions need the name that no other chip answers to.
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else ""))')
    export TORCH_CUDA_ARCH_LIST
  fi
  echo "architectures: ${TORCH_CUDA_ARCH_LIST:-those of CMakeLists.txt}"
  local second=""
  if [[ -z ${REHEARSE:-} ]]; then
    export ANDROMEDA_CUDA=1
    build_second >"$SCRATCH/second.log" 2>&1 &
    second=$!
  fi
  if ! "$PYTHON" setup.py build_ext --inplace; then
    [[ -z $second ]] || kill "$second" || true
    return 1
  fi
  if [[ -n $second ]]; then
    "$PYTHON" -c '
import torch
from andromeda.ops import _select
reasons = _select.cuda_unavailable(torch.device("cuda", 0))
if reasons:
    raise SystemExit("the kernels do not run on this GPU: " + "; ".join(reasons))'
  fi
  "$PYTHON" -m andromeda info
  if [[ -n $second ]]; then # its failure does not fail the step
    while kill -0 "$second" 2>/dev/null && ((SECONDS + 8 < ${STEP_LIMIT:?})); do sleep 0.2; done
    if kill "$second" 2>/dev/null || ! wait "$second"; then
      echo "the second library was not built, or not in time:"
      tail -n 5 "$SCRATCH/second.log"
    else
      "$PYTHON" tests/gpu_report.py libraries "$SECOND"
    fi
  fi
}

# Links to the Python files beside the library of the other assembler: a process that starts there imports them.
build_second() {
  rm -rf "$SECOND"
  mkdir -p "$SECOND/andromeda"
  ANDROMEDA_PTXAS=${PTXAS2:-nvcc} ANDROMEDA_BUILD_TREE="$SECOND-tree" "$PYTHON" setup.py build_ext \
    --build-lib "$SECOND" --build-temp "$SECOND-temp"
  local file
  for file in andromeda/*; do
    [[ $file == */_C.* || $file == */__pycache__ ]] || ln -sfn "$PWD/$file" "$SECOND/$file"
  done
}

run_smoke() {
  local failed=0 root=$PWD
  count_tests default tests/test_cuda.py -k small_calls || failed=1
  if [[ -f $SECOND/complete ]]; then
    (cd "$SECOND" && LIBRARY=$SECOND count_tests second --rootdir "$root" -c "$root/pyproject.toml" \
      "$root/tests/test_cuda.py" -k small_calls) || failed=1
  fi
  return "$failed"
}

run_triton() {
  local backend=triton
  [[ $device == cuda ]] || backend=cpu # where the Triton kernels run in the emulator, under tests of their own
  # Many processes, because compiling takes most of the time; what one has compiled serves all. The results come first.
  # shellcheck disable=SC2046  # two words
  TESTS_FIRST="matches forward backward" count_tests triton --maxfail=25 --durations=15 $(workers 14) \
    "${DEVICE_TESTS[@]}" -k "$backend and not emulated"
}

run_quick() {
  local failed=0 code=$SPOILT attempt
  for attempt in 1 2 3 4 5; do # each continues after the line at which the one before ended
    code=0
    benchmark attn_grid attn_grid --resume || code=$?
    ((code == SPOILT || code > 128)) || break
    echo "attempt $attempt of attn_grid ended with code $code"
  done
  ((code == 0)) || failed=1
  local name
  for name in "${OTHERS[@]}"; do
    benchmark "$name" "$name" --short || failed=1
  done
  return "$failed"
}

run_profile() {
  if [[ -n ${REHEARSE:-} ]]; then
    benchmark counters counters --without-ncu
  else
    benchmark counters
  fi
}

run_tests() {
  local failed=0
  # These watch the memory of the GPU and keep it busy, so they run alone.
  count_tests cuda --maxfail=25 --durations=15 tests/test_cuda.py || failed=1
  # shellcheck disable=SC2046  # two words
  count_tests device --maxfail=25 --durations=15 $(workers) "${DEVICE_TESTS[@]}" -k "not triton and not emulated" || failed=1
  return "$failed"
}

run_wrappers() { count_tests wrappers -rA tests/emulator/test_wrappers.py; }

find_sanitizer() {
  local candidate
  for candidate in "$(command -v compute-sanitizer || true)" "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
    $("$PYTHON" -c 'import sys; print(*(p + "/nvidia/cu13/bin/compute-sanitizer" for p in sys.path if p))'); do
    if [[ -f $candidate ]]; then
      [[ -x $candidate ]] || chmod +x "$candidate" # pip installs the program of the wheel without this permission
      echo "$candidate"
      return
    fi
  done
}

# Wrong reports of the tools, and how they are avoided:
#   memcheck   Libraries ask the driver for functions of other versions and get an error, so errors of API calls are not
#              reported. The code itself checks launches (check.cuh).
#   all        torch makes tensors from pieces of large allocations, which hides accesses from one into another. Without
#              its cache each tensor is an allocation.
#   racecheck, synccheck   Kernels of other libraries are left out: we cannot mend them, and they take minutes.
#   initcheck  All kernels are included, since memory that torch's kernels write counts as initialised.
sanitize() { # TOOL SANITIZER
  local -a tool=()
  if [[ -n $2 ]]; then
    tool=("$2" --tool "$1" --report-api-errors no --error-exitcode 9 --print-limit 20)
    [[ $1 == initcheck ]] || tool+=(--kernel-name kns=andromeda)
  fi
  PART="$parts/$1.json" PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${tool[@]}" "$PYTHON" -m pytest -q -p gpu_report \
    -p no:cacheprovider --device "$device" "${collect[@]}" tests/test_cuda.py -k small_calls
}

run_sanitizer() {
  local sanitizer failed=0 pair tool code
  sanitizer=$(find_sanitizer)
  [[ -z $sanitizer ]] || "$sanitizer" --version
  if [[ -z $sanitizer && -z ${REHEARSE:-} ]]; then
    echo "compute-sanitizer not found (PATH, CUDA_HOME, wheel nvidia-cuda-sanitizer-api)"
    return "$NOT_RUN"
  fi
  local -A process
  for pair in "memcheck racecheck" "initcheck synccheck"; do # two at a time: most time passes before a kernel runs
    [[ -z ${REHEARSE:-} || $pair == memcheck* ]] || break
    if ((SECONDS + 20 > ${STEP_LIMIT:?})); then
      echo "$pair: no time left"
      continue
    fi
    for tool in $pair; do
      sanitize "$tool" "$sanitizer" >"$OUT/gpu_$tool.log" 2>&1 &
      process[$tool]=$!
    done
    for tool in $pair; do
      code=0
      wait "${process[$tool]}" || code=$?
      echo "== $tool: exit code $code; $(grep -h 'ERROR SUMMARY\|RACECHECK SUMMARY' "$OUT/gpu_$tool.log" | tail -n 1)"
      ((code == 0)) || { failed=1 && tail -n 15 "$OUT/gpu_$tool.log"; }
    done
  done
  return "$failed"
}

run_bench() {
  local failed=0 pass name
  local -a shape=(--dtype bfloat16)
  [[ -n ${REHEARSE:-} ]] || shape+=(--seqlen 8192 --keys 131072)
  for pass in forward backward decode; do
    benchmark attn "attn_$pass" --pass "$pass" "${shape[@]}" --contenders andromeda sdpa flash_attn || failed=1
  done
  benchmark model || failed=1
  local -a large=() # 530 million parameters
  [[ -n ${REHEARSE:-} ]] || large=(--dim 1280 --depth 24 --heads 10 --dim-head 128 --seqlen 8192)
  benchmark model model_500m --pass training --profile "${large[@]}" || failed=1
  benchmark decode || failed=1
  for name in "${OTHERS[@]}"; do
    benchmark "$name" || failed=1
  done
  for pass in forward decode backward; do # FlexAttention compiles longer than all the others run
    benchmark attn "flex_$pass" --pass "$pass" "${shape[@]}" --contenders andromeda flex || failed=1
    [[ -z ${REHEARSE:-} ]] || break
  done
  return "$failed"
}

run_host() {
  # Files whose imports are missing here cannot be collected: pytest names them and runs the others.
  local -a files
  mapfile -t files < <("$PYTHON" - "${DEVICE_TESTS[@]}" tests/test_cuda.py <<'PYTHON_CODE'
import ast, importlib.util, pathlib, sys

def missing(path):
    """Names of packages that the file, or one beside it that it imports, needs and this machine lacks."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in {name.partition(".")[0] for name in names}:
            beside = path.with_name(f"{name}.py")
            if beside.exists():
                found |= missing(beside)
            elif name != "emulator" and importlib.util.find_spec(name) is None:
                found.add(name)
    return found

for path in sorted(pathlib.Path("tests").glob("test_*.py")):
    if str(path) not in sys.argv[1:]:
        if names := missing(path):
            print(f"not run here: {path} (needs {', '.join(sorted(names))})", file=sys.stderr)
        else:
            print(path)
PYTHON_CODE
  )
  echo "not run here: tests/emulator but for its wrappers (the same on every machine)"
  device=cpu
  # shellcheck disable=SC2046  # two words
  count_tests host $(workers 8) "${files[@]}"
}

if [[ -n $inside ]]; then
  parts=$SCRATCH/parts/$inside
  mkdir -p "$parts"
  "run_$inside"
  exit
fi

# ---- running them ---------------------------------------------------------------------------------------------------

if [[ -n ${REHEARSE:-} ]]; then # apart from the results of a GPU, with time for any machine
  STEP_SECONDS=${STEP_SECONDS:-300} BUDGET=2400
  KEEP=${KEEP:-build/gpu/rehearsal} OUT=${OUT:-${KEEP:-build/gpu/rehearsal}/out}
fi
export OUT=${OUT:-benchmarks/results} KEEP=${KEEP:-build/gpu} PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
mkdir -p "$OUT" "$KEEP"
OUT=$(cd "$OUT" && pwd)
KEEP=$(cd "$KEEP" && pwd)
[[ $PYTHON != */* ]] || PYTHON=$(realpath -s "$PYTHON") # some commands start in another folder
SCRATCH=$(mktemp -d)
export SCRATCH SECOND=$KEEP/second TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$KEEP/triton}
running=() # processes of the current step
trap 'rm -rf "$SCRATCH"' EXIT
trap 'stop TERM' TERM
trap 'stop INT' INT
trap 'stop HUP' HUP
stop() { # by a signal: gpu.json is complete, and says that the current step did not end
  trap - TERM INT HUP
  ((${#running[@]} == 0)) || kill -TERM "${running[@]}" 2>/dev/null || true
  wait
  echo "gpu.sh: ended by SIG$1; what is finished is in $OUT/gpu.json" >&2
  exit 143
}
report() { "$PYTHON" tests/gpu_report.py "$@"; }

export PYTHONPATH="$PWD:$PWD/tests:$SCRATCH/site${PYTHONPATH:+:$PYTHONPATH}"
if [[ -n ${WHEELS:-} ]]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SCRATCH/site" "$WHEELS"/*.whl ||
    echo "gpu.sh: the wheels of $WHEELS were not installed: going on without" >&2
  find "$SCRATCH/site" -path '*/bin/*' -type f -exec chmod +x {} + || true # not every wheel marks its programs as such
fi
report facts >"$SCRATCH/facts.json"
if [[ -z ${REHEARSE:-} ]] && grep -q '"gpu": null' "$SCRATCH/facts.json"; then
  echo "gpu.sh: torch of $PYTHON finds no CUDA device" >&2
  exit 1
fi
printf '== a call of %s: %s\n' "$(date '+%F %T')" "$only" >>"$OUT/gpu.log"
# shellcheck disable=SC2086  # words
report begin $only

deadline=$SECONDS least=10 last="" # allowances count from here, the budget from the start
[[ -z ${STEP_SECONDS:-} ]] || least=1
for name in "${STEPS[@]}"; do
  [[ " $only " == *" $name "* ]] || continue
  last=$name
done
for name in "${STEPS[@]}"; do
  [[ " $only " == *" $name "* ]] || continue
  ((deadline += ${STEP_SECONDS:-${ALLOWANCE[$name]}}))
  [[ $name != "$last" || -n ${STEP_SECONDS:-} ]] || deadline=$BUDGET
  limit=$(((deadline < BUDGET ? deadline : BUDGET) - SECONDS))
  if ((limit < least)); then
    printf '== %s: %s\n' "$name" "$(report end "$name" skipped 0 "$limit")"
    continue
  fi
  printf '== %s (at %d s, at most %d s): ' "$name" "$SECONDS" "$limit"
  begin=$SECONDS
  code=0
  printf '\n== %s (at %d s, at most %d s)\n' "$name" "$SECONDS" "$limit" >>"$OUT/gpu.log"
  log_before=$(wc -c <"$OUT/gpu.log")
  "$PYTHON" tests/gpu_report.py watch "$name" "$limit" $$ &
  watcher=$!
  STEP_LIMIT=$limit timeout --kill-after=5 "$limit" tests/gpu.sh ${REHEARSE:+--rehearse} --inside "$name" \
    >>"$OUT/gpu.log" 2>&1 </dev/null &
  running=("$!" "$watcher")
  wait "${running[0]}" || code=$?
  kill "$watcher" 2>/dev/null || true
  wait "$watcher" || true
  kill -KILL -- "-${running[0]}" 2>/dev/null || true # the group of `timeout`: processes that the step left
  running=()
  report end "$name" "$code" $((SECONDS - begin)) "$limit" || echo "not recorded" # continue: the next one may be
  if ((code != 0 && code != NOT_RUN)); then
    tail -c +$((log_before + 1)) "$OUT/gpu.log" | tail -n 25
  fi
done
report show
